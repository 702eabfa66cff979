"Methods that stand in a later module: there at once, read late, told as what they are."
import copy
import inspect
import pickle
import pydoc
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from fastai_xent import show, views
from fastai_xent.interpretation import XentInterpretation
from fastai_xent.later import LATER, Later
from fastai_xent.record import XentRecord
from fastai_xent.records import XentRecords
from test_show import datasets, folder, images, loaders, recorded  # noqa: F401
from test_views import record_of, seen

CLASSES = dict(XentRecord=XentRecord, XentRecords=XentRecords)
METHODS = [(c, m, name) for c, found in LATER.items() for m, names in found.items() for name in names.split()]


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')

@pytest.mark.parametrize('cls, module, name', METHODS, ids=[f'{c}.{n}' for c, _, n in METHODS])
def test_each_is_there_and_says_what_it_takes(cls, module, name):
    cls = CLASSES[cls]
    f = getattr(cls, name)
    assert (f.__module__, f.__name__) == (f'fastai_xent.{module}', name) and inspect.isfunction(f)
    first, *others = inspect.signature(f).parameters
    bound = getattr(cls.__new__(cls), name)
    assert first in ('record', 'runs') and [*inspect.signature(bound).parameters] == others
    for doc in (bound.__doc__, pydoc.render_doc(cls, renderer=pydoc.plaintext)):
        assert inspect.getdoc(f).split('\n')[0] in doc
    assert '\nParameters\n' in inspect.getdoc(f)

def test_every_picture_of_a_record_is_a_method_of_it():
    drawn = {o for o in views.__all__ if o.startswith('plot_')} | {o for o in show.__all__ if o.startswith('show_')}
    assert drawn - {'plot_runs'} <= {*LATER['XentRecord']['views'].split(), *LATER['XentRecord']['show'].split()}

def test_a_record_that_is_not_drawn_loads_nothing_that_draws():
    code = ("import sys; from fastai_xent.record import XentRecord; from fastai_xent.records import XentRecords; "
            "assert 'plot_losses' in dir(XentRecord); assert not {'matplotlib', 'fastai'} & {*sys.modules}; "
            "XentRecord.plot_losses; assert 'matplotlib' in sys.modules")
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr

def test_a_method_draws_what_the_function_draws():
    record, other = seen(), seen(seed=1)
    for name, args in dict(plot_losses=[], plot_data_map=['train', [0, 1]], plot_history=[2], plot_score=['el2n', 3],
                           plot_two_runs=[other], plot_two_scores=['loss', 'aum'], plot_training_time=[]).items():
        one, two = (f(*args) for f in (getattr(record, name), lambda *a: getattr(views, name)(record, *a)))
        assert one.get_title('left') == two.get_title('left')
        for a, b in zip(one.collections, two.collections): np.testing.assert_array_equal(a.get_offsets(), b.get_offsets())

def test_a_record_with_later_methods_is_copied_and_pickled():
    record = seen()
    record.plot_losses()
    for o in (copy.deepcopy(record), pickle.loads(pickle.dumps(record))): assert o.top(2).equals(record.top(2))

def test_an_inherited_method():
    class Mine(XentRecord): pass
    assert Mine.plot_losses is views.plot_losses

@pytest.mark.parametrize('module, name', [('views', 'nothing'), ('no_such_module', 'plot')])
def test_what_cannot_be_had_is_not_called_missing(module, name, monkeypatch):
    "`XentRecord` answers for methods that were renamed; an error of the later module must not end up there."
    monkeypatch.setattr(XentRecord, 'plot_mine', Later(module, name), raising=False)
    with pytest.raises(ImportError, match=f'{module}.*|{name}'): seen().plot_mine()

def test_another_module_may_put_its_function_in_anothers_place(monkeypatch):
    monkeypatch.setattr(views, 'plot_losses', lambda record: 'mine')
    assert seen().plot_losses() == 'mine'


# -- two of several runs

def runs(n=3): return XentRecords({f'run {o}': seen(seed=o) for o in range(n)})

def test_two_of_the_runs_are_drawn():
    three = runs()
    for names in (None, ['run 2', 'run 0']):
        ax = three.plot_runs(names=names)
        want = three.scores()[names or ['run 0', 'run 1']]
        np.testing.assert_allclose(ax.collections[0].get_offsets(), want)
        assert [ax.get_xlabel(), ax.get_ylabel()] == [f'suspicion in run {o}' for o in want]

def test_a_third_run_that_saw_little_takes_nothing_from_two_others():
    few = record_of([dict(p_targ=[.5], item=[3])], n=12)
    ax = XentRecords(dict(a=seen(), b=seen(seed=1), few=few)).plot_runs(k=5)
    assert 'of the first 5 are the same' in ax.get_title('left')

@pytest.mark.parametrize('n, names', [(1, None), (3, ['run 0']), (3, ['run 0', 'run 7']), (3, [])])
def test_two_runs_are_needed(n, names):
    with pytest.raises(ValueError, match='the runs are run 0.* expected two of them, got '): runs(n).plot_runs(names=names)


# -- the recorder's own

def test_the_recorder_knows_the_data_and_their_names(folder):  # noqa: F811  a fixture
    recorder = recorded(datasets(folder), key_fn=lambda f: f.stem.upper())
    recorder.show_top(4)
    fig = plt.gcf()
    assert fig.get_suptitle() == 'train: the first 4 of 6 items by suspicion' and len([o for o in fig.axes if o.images]) == 4
    recorder.show_items(recorder.record.top(2, split='valid'), 'valid', title='two')
    assert plt.gcf().get_suptitle() == 'two'
    recorder.show_history(3)
    assert len(plt.gcf().axes) == 2

def test_a_recorder_without_a_learner_shows_the_names(monkeypatch):
    shown = []
    monkeypatch.setattr('IPython.display.display', lambda o: shown.append(o.data))
    recorder = recorded(loaders(torch.as_tensor(images())))
    recorder.learn.remove_cb(recorder)
    recorder.show_top(2)
    assert 'item' in shown[0] and not plt.get_fignums()


# -- a record is left as it was

def contents(path): return {o.relative_to(path): o.read_bytes() for o in path.rglob('*') if o.is_file()}

def test_looking_changes_nothing(tmp_path):
    "Every picture and every question of an interpretation, of a record on disk."
    record, other = seen(path=tmp_path / 'run'), seen(seed=1)
    issues, top = record.top(12).assign(is_issue=True), record.top(3)       # by now the writer has written all
    before = contents(tmp_path)
    issues.loc[5:, 'is_issue'] = False
    kept = issues.copy(deep=True), top.copy(deep=True)
    record = XentRecord(tmp_path / 'run')
    args = dict(plot_history=[0], plot_class_pairs=[issues], plot_class_issues=[issues], plot_two_runs=[other],
                show_items=[top], show_history=[0])
    names = ' '.join(LATER['XentRecord'][o] for o in ('views', 'show')).split()
    for name in names:
        if name != 'plot_features': getattr(record, name)(*args.get(name, []))  # this record has none: test_features
    interp = XentInterpretation(record, split='train')
    interp.plot_top_losses(2), interp.plot_confusion_matrix(), interp.print_classification_report()
    interp.most_confused(), interp.top_losses(items=True)
    for old, new in zip(kept, (issues, top)): pd.testing.assert_frame_equal(new, old)
    assert before and contents(tmp_path) == before
