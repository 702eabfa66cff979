"Columns in fastai's table, the picture below the bar, and sinks: the record's numbers, each once, and never in the way."
import csv
import json
import warnings
from types import SimpleNamespace

import fastai.callback.schedule  # noqa: F401  fit_one_cycle, fine_tune
import numpy as np
import pytest
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.learner import Recorder
from fastai.metrics import accuracy
from fastprogress import fastprogress
from helpers import at_most, ended, halves, learner, same_bits, say_nothing

from fastai_xent import live, sinks
from fastai_xent.live import XentGraph, XentProgress
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.sinks import XentLogger
from fastai_xent.views import plot_losses

OURS = ['train_el2n', 'valid_el2n', 'train_suspects']
ALL = [*OURS, 'valid_suspects']

@pytest.fixture(autouse=True)
def guard():
    with at_most(300): yield

@pytest.fixture
def said():
    "What is warned of."
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        yield got

def ours(said): return [str(o.message) for o in said if str(o.message).startswith('Xent')]

def table(learn, row=-1) -> dict: return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[row]))

def in_sql(record, epoch) -> dict:
    "The columns' numbers, asked from the record. A mixed row counts by its own share, one that fills up a batch does not."
    rows = record.sql(f"""
        select split, sum(w * el2n) / sum(w) as el2n, sum(w * (p_targ * exp(-margin) > .5)::int) / sum(w) as suspects
        from (select *, coalesce(lam, 1) as w from record where epoch = {epoch} and occurrence >= 0) group by split""")
    return {f"{o['split']}_{k}": o[k] for o in rows.to_dict('records') for k in ('el2n', 'suspects')}


# -- columns

@pytest.mark.parametrize('mix', [False, True])
def test_the_table_shows_the_numbers_of_the_record(mix):
    rec = XentRecorder()
    learn = learner([XentProgress(ALL), rec, *[MixUp()] * mix], n=37, metrics=accuracy)
    learn.fit(3, .01)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', *ALL, 'time']
    for k in range(3):
        want = in_sql(rec.record, k)
        got = {o: table(learn, k)[o] for o in ALL}
        assert got == pytest.approx(want, rel=1e-5) and 0 < got['valid_el2n'] < 2**.5

def train_plain(learn): learn.fit(2)
def train_one_cycle(learn): learn.fit_one_cycle(2, .01)
def train_fine_tune(learn): learn.fine_tune(1, .01)
def train_twice(learn): learn.fit(1); learn.fit(1)
def train_later(learn): learn.fit(3, start_epoch=1)
def train_looking(learn): learn.fit(1); learn.validate(); learn.get_preds(); learn.fit(1)
TRAIN = [train_plain, train_one_cycle, train_fine_tune, train_twice, train_later, train_looking]

def all_of_ours(): return [XentProgress(), XentGraph(plot_losses), XentLogger(sinks=[Kept()])]

class Kept:
    "A sink that keeps what it is given."
    has_table = False
    def __init__(self, id='kept'): self.id, self.got = id, []
    def send(self, values, epoch): self.got += [(epoch, name, v) for name, v in values.items()]
    def of(self, name) -> dict: return {e: v for e, o, v in self.got if o == name}

@pytest.fixture
def notebook(monkeypatch):
    "What a notebook would show: (new or in place, PNG)."
    shown = []
    def display(picture, display_id):
        shown.append(('new', picture.data))
        return SimpleNamespace(update=lambda picture: shown.append(('in place', picture.data)))
    monkeypatch.setattr('IPython.display.display', display)
    monkeypatch.setattr(fastprogress, 'IN_NOTEBOOK', True)
    return shown

class Bar(ProgressCallback):
    "fastai's progress bar, which says nothing."
    def before_fit(self): pass
    def _launch_pbar(self): self.pbar = SimpleNamespace(update=say_nothing, on_iter_end=say_nothing)

def with_bar(learn):
    bar = Bar()
    learn.add_cb(bar)
    learn.progress = bar
    return learn

@pytest.mark.parametrize('train', TRAIN)
def test_the_training_is_the_same_to_the_last_bit(train, notebook):
    def run(cbs, **kw):
        learn = with_bar(learner(cbs, metrics=accuracy, splitter=halves))
        train(learn)
        values = [list(v)[:len(v) - len(OURS) * kw.get('cut', 0)] for v in learn.recorder.values]
        learn.recorder.values = values
        return ended(learn).end
    plain = run([XentRecorder()])
    same_bits(run([XentRecorder(), *all_of_ours()], cut=1), plain)
    assert notebook

def settings(**kw):
    "A learner with another `Recorder` of fastai's."
    learn = learner([XentRecorder(), XentProgress()], metrics=accuracy)
    learn.remove_cb(Recorder)
    learn.add_cb(Recorder(**kw))
    return learn

@pytest.mark.parametrize('kw, names', [
    (dict(add_time=False), ['train_loss', 'valid_loss', 'accuracy', *OURS]),
    (dict(train_metrics=True), ['train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', *OURS, 'time']),
])
def test_they_stand_behind_those_of_fastai(kw, names):
    learn = settings(**kw)
    learn.fit(1)
    assert learn.recorder.metric_names == ['epoch', *names]
    assert len(learn.recorder.log) == 1 + len(names)
    want = in_sql(learn.xent_recorder.record, 0)
    assert {o: table(learn)[o] for o in OURS} == pytest.approx({o: want[o] for o in OURS}, rel=1e-5)

def test_csv_logger_and_trackers_read_them(tmp_path):
    learn = learner(metrics=accuracy, path=tmp_path)
    cbs = [CSVLogger(), SaveModelCallback('valid_el2n', np.less), EarlyStoppingCallback('train_suspects', np.less, patience=9)]
    learn.fit(3, .01, cbs=[XentRecorder(), XentProgress(), *cbs])
    rows = list(csv.DictReader(open(tmp_path / 'history.csv')))
    assert len(rows) == 3 and None not in rows[0]
    for k, row in enumerate(rows):
        assert {o: float(row[o]) for o in OURS} == {o: table(learn, k)[o] for o in OURS}
    assert (tmp_path / 'models/model.pth').exists()

def test_fastais_table_and_graph(capsys, notebook):
    learn = learner([XentRecorder(), XentProgress()])
    learn.logger = print
    bar = ProgressCallback()
    drawn = []
    learn.add_cbs([bar, ShowGraphCallback()])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fastprogress.ConsoleMasterBar, 'update_graph', lambda self, graphs, *_: drawn.append(graphs))
        learn.fit(2)
    lines = [o.split() for o in capsys.readouterr().out.splitlines()]
    head, row = (next(o for o in lines if o[:1] == [first]) for first in ('epoch', '0'))
    assert head[-4:] == [*OURS, 'time']
    assert [float(o) for o in row[3:6]] == pytest.approx([table(learn, 0)[o] for o in OURS], abs=1e-6)
    assert [v for _, v in zip(*drawn[-1][1])] == [v[1] for v in learn.recorder.values]

def test_validate_says_what_it_said_before():
    learn = learner([XentRecorder(), XentProgress()], metrics=accuracy)
    learn.fit(1)
    assert len(learn.validate()) == 2
    with learn.no_logging(): learn.fit(1)
    assert table(learn).keys() >= set(OURS)

class Stop(Callback):
    "Raise in the second epoch's validation, or look at valid in the middle of a training."
    order = 45
    def __init__(self, ex=None): self.ex, self.done = ex, False
    def before_validate(self):
        if self.ex and not self.done and self.learn.epoch == 1:
            self.done = True
            raise self.ex('enough')
    def after_epoch(self):
        if self.ex or self.done: return
        self.done = True
        self.learn.validate()

@pytest.mark.parametrize('ex', [KeyboardInterrupt, CancelFitException, ValueError])
def test_an_interrupted_fit_leaves_nothing_behind(ex):
    learn = learner([XentRecorder(), XentProgress(), Stop(ex)], metrics=accuracy)
    try: learn.fit(3)
    except (KeyboardInterrupt, ValueError): pass
    assert len(learn.metrics) == 1 and len(learn.validate()) == 2
    learn.fit(1)
    want = in_sql(learn.xent_recorder.record, learn.xent_recorder.record.n_epochs - 1)
    assert {o: table(learn)[o] for o in OURS} == pytest.approx({o: want[o] for o in OURS}, rel=1e-5)

def test_somebodys_validate_between_two_epochs():
    learn = learner([XentRecorder(), XentProgress(), Stop()], metrics=accuracy)
    learn.fit(2)
    assert learn.recorder.metric_names[-4:] == [*OURS, 'time']
    assert not np.isnan([table(learn)[o] for o in OURS]).any()

def test_without_a_recorder_it_is_told_once_and_fastais_table_is_as_before(said):
    learn = learner([XentProgress()], metrics=accuracy)
    learn.fit(2)
    learn.fit(1)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    assert len(ours(said)) == 1 and 'has no XentRecorder; add one' in ours(said)[0]

def test_what_is_not_recorded_is_nan(monkeypatch, said):
    monkeypatch.setattr('fastai_xent.recorder.read_batch', None)
    learn = learner([XentRecorder(), XentProgress()])
    learn.fit(1)
    assert np.isnan([table(learn)[o] for o in OURS]).all()

def test_it_can_be_switched_off_as_fastai_does():
    learn = learner([XentRecorder(), XentProgress()])
    learn.xent_progress.run = False
    learn.fit(1)
    assert 'train_el2n' not in learn.recorder.metric_names
    learn.fit(1)
    assert 'train_el2n' in learn.recorder.metric_names

def test_masks_have_no_suspects():
    cols = dict(item=np.arange(2), el2n=np.float32([.5, 1.]), p_targ=np.float32([.5, .1]), margin=np.float32([0, -3]), n_pos=np.array([4, 4]))
    numbers = live.pass_numbers(cols)
    assert numbers['el2n'] == .75 and np.isnan(numbers['suspects'])
    assert np.isnan(list(live.pass_numbers({k: v[:0] for k, v in cols.items()}).values())).all()

def test_an_infinite_margin_is_suspect_or_not():
    cols = dict(item=np.arange(2), el2n=np.float32([0, 2**.5]), p_targ=np.float32([1, 0]), margin=np.float32([np.inf, -np.inf]))
    assert live.pass_numbers(cols)['suspects'] == .5


# -- the picture

def test_the_picture_is_drawn_in_place(notebook):
    learn = with_bar(learner([XentRecorder(), XentGraph()]))
    learn.fit(3)
    assert [how for how, _ in notebook] == ['new', 'in place', 'in place']
    assert all(o.startswith(b'\x89PNG') for _, o in notebook) and len({o for _, o in notebook}) == 3
    learn.fit(1)
    assert notebook[-1][0] == 'new'

def test_no_picture_without_a_bar(notebook, monkeypatch):
    learner([XentRecorder(), XentGraph()]).fit(1)
    learn = with_bar(learner([XentRecorder(), XentGraph()]))
    monkeypatch.setattr(fastprogress, 'NO_BAR', True)
    learn.fit(1)
    monkeypatch.setattr(fastprogress, 'NO_BAR', False)
    monkeypatch.setattr(fastprogress, 'IN_NOTEBOOK', False)
    learn.fit(1)
    assert not notebook

def test_a_picture_that_fails_is_told_once(notebook, said):
    def plot(record): raise ZeroDivisionError('no paint')
    learn = with_bar(learner([XentRecorder(), XentGraph(plot), XentProgress()]))
    learn.fit(3)
    assert len(ours(said)) == 1 and 'no paint' in ours(said)[0] and 'XentGraph does no more in this fit' in ours(said)[0]
    assert len(learn.xent_recorder.record.epochs) == 6 and table(learn)['valid_el2n'] > 0


# -- looking on

class Nosy(Callback):
    "Looks on, and fails."
    def see_rows(self, split, epoch, cols): raise ValueError('too nosy')

def test_who_looks_on_and_fails_is_told_once_and_the_record_is_whole(said):
    learn = learner([XentRecorder(), Nosy()])
    learn.fit(2)
    assert len(learn.xent_recorder.record.epochs) == 4
    assert ours(said) == ["XentRecorder goes on; Nosy, which looks on, has failed: ValueError('too nosy')"]

def test_they_hear_a_training_only():
    kept = Kept()
    learn = learner([XentRecorder(), XentLogger(sinks=[kept])])
    learn.validate()
    learn.get_preds()
    learn.lr_find(show_plot=False, num_it=5)
    assert not kept.got
    learn.fit(1)
    assert kept.of('xent/valid_el2n').keys() == {0}


# -- sinks

def values(path) -> tuple: # scalars by name and step; histograms; texts
    "What is in TensorBoard's files."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(path), dict.fromkeys(('scalars', 'histograms', 'tensors'), 0))
    events.Reload()
    tags = events.Tags()
    scalars = {o: [(e.step, e.value) for e in events.Scalars(o)] for o in tags['scalars']}
    histograms = {o: [(e.step, e.histogram_value) for e in events.Histograms(o)] for o in tags['histograms']}
    texts = {o: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(o)] for o in tags['tensors']}
    return scalars, histograms, texts

def boarded(path, logs, cbs=(), **kw):
    "A learner that writes to TensorBoard."
    from fastai.callback.tensorboard import TensorBoardCallback
    board = TensorBoardCallback(logs, trace_model=False, log_preds=False)
    return learner([XentRecorder(path, **kw), XentLogger(k=3), board, *cbs], metrics=accuracy)

def test_tensorboard_has_the_numbers_of_the_record(tmp_path):
    learn = boarded(None, tmp_path)
    learn.fit(2)
    record = learn.xent_recorder.record
    scalars, histograms, texts = values(tmp_path)
    for k in range(2):
        for o, v in in_sql(record, k).items(): assert scalars[f'xent/{o}'][k] == (k, pytest.approx(v, rel=1e-5))
    step, h = histograms['xent/train_el2n_rows'][1]
    rows = record.to_df('train', 1)['el2n']
    assert step == 1 and h.num == len(rows) and h.sum == pytest.approx(rows.sum(), rel=1e-5) and h.max == pytest.approx(rows.max())
    (step, text), = texts['xent/top/text_summary']
    assert step == 1
    cells = [[c.strip() for c in o.strip('|').split('|')] for o in text.splitlines()[2:]]
    assert [int(o[0]) for o in cells] == record.top(3)['item'].tolist()
    assert [float(o[-1]) for o in cells] == pytest.approx(record.top(3)['score'].tolist(), rel=1e-3)

def test_nothing_is_there_twice_after_a_resume(tmp_path):
    for k in range(3): boarded(tmp_path / 'r', tmp_path / 'logs', resume=k > 0).fit(1 + (k == 0))
    scalars, histograms, texts = values(tmp_path / 'logs')
    for o in ALL: assert [step for step, _ in scalars[f'xent/{o}']] == [0, 1, 2, 3]
    assert [step for step, _ in histograms['xent/valid_loss_rows']] == [0, 1, 2, 3]
    assert [step for step, _ in texts['xent/top/text_summary']] == [1, 2, 3]

def test_an_epoch_whose_rows_were_lost_is_not_sent_again(tmp_path):
    boarded(tmp_path / 'r', tmp_path / 'logs').fit(2)
    before = values(tmp_path / 'logs')[0]['xent/train_el2n']
    for o in (tmp_path / 'r/rows').rglob('*epoch-001*'): o.unlink()
    boarded(tmp_path / 'r', tmp_path / 'logs', resume=True).fit(2)
    after = values(tmp_path / 'logs')[0]['xent/train_el2n']
    assert after[:2] == before and [step for step, _ in after] == [0, 1, 2]

def test_another_run_gets_its_own_and_a_new_record_begins_anew(tmp_path):
    boarded(tmp_path / 'r', tmp_path / 'a').fit(1)
    boarded(tmp_path / 'r', tmp_path / 'b', resume=True).fit(1)
    assert [step for step, _ in values(tmp_path / 'b')[0]['xent/train_el2n']] == [1]
    assert len(json.loads((tmp_path / 'r/_sent.json').read_text())) == 2
    boarded(tmp_path / 'r', tmp_path / 'c', overwrite=True).fit(1)
    assert [o.split('/')[-1] for o in json.loads((tmp_path / 'r/_sent.json').read_text())] == ['c']
    assert XentRecord(tmp_path / 'r').n_epochs == 1

def test_two_loggers_send_once():
    kept = Kept()
    class Second(XentLogger): pass
    learn = learner([XentRecorder(), XentLogger(sinks=[kept]), Second(sinks=[kept])])
    learn.fit(2)
    assert len({(e, o) for e, o, _ in kept.got}) == len(kept.got) > 0

def test_columns_of_the_table_are_not_sent_beside_it(tmp_path):
    learn = boarded(None, tmp_path, [XentProgress()])
    learn.fit(2)
    scalars = values(tmp_path)[0]
    assert {o for o in scalars if 'el2n' in o or 'suspects' in o} == {*OURS, 'xent/valid_suspects'}
    assert [v for _, v in scalars['valid_el2n']] == pytest.approx([table(learn, k)['valid_el2n'] for k in range(2)])

class Broken(Kept):
    "The net is down."
    def send(self, values, epoch):
        self.got.append(epoch)
        raise ConnectionError('the net is down')

def test_a_sink_that_fails_is_told_once_and_nothing_else_suffers(said):
    broken, kept = Broken('broken'), Kept()
    learn = learner([XentRecorder(), XentLogger(sinks=[broken, kept])])
    learn.fit(3)
    learn.fit(1)
    assert ours(said) == ["XentLogger sends no more of this fit to broken; the training and its record go on. "
                          "ConnectionError('the net is down')"]
    assert broken.got == [0, 3]                           # once a fit
    assert list(kept.of('xent/valid_el2n')) == [0, 1, 2, 3] and len(learn.xent_recorder.record.epochs) == 8
    plain = learner([XentRecorder()])
    plain.fit(3)
    plain.fit(1)
    same_bits(ended(learn).end['model'], ended(plain).end['model'])

def test_a_torn_note_sends_nothing_rather_than_twice(tmp_path, said):
    rec, kept = XentRecorder(tmp_path / 'r'), Kept()
    learn = learner([rec, XentLogger(sinks=[kept])])
    learn.fit(1)
    n = len(kept.got)
    (tmp_path / 'r/_sent.json').write_text('{"kept": [')
    learn.fit(1)
    assert len(kept.got) == n and len(rec.record.epochs) == 4 and ours(said)

@pytest.mark.parametrize('name', ['a|b', '<img src=x onerror=alert(1)>', 'two\nlines', '*bold* `code` [link](x)', '\\|'])
def test_names_are_text_in_a_table_of_tensorboard(name):
    import markdown
    import pandas as pd
    html = markdown.markdown(sinks._markdown(pd.DataFrame(dict(name=[name], score=[.5]))), extensions=['tables'])
    assert html.count('<td>') == 2 and '<img' not in html and '<strong>' not in html and '<code>' not in html and '<a ' not in html

def test_no_library_is_imported_for_nothing():
    import subprocess
    import sys
    code = "import sys, fastai_xent.sinks; print([o for o in ('tensorboard', 'wandb', 'trackio') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# -- the libraries themselves, without the net

def wandb_history(folder) -> list: # Of dicts, a step each
    "What an offline run has written: records in blocks of 32 kB."
    import struct

    from wandb.proto import wandb_internal_pb2 as pb
    file, = folder.rglob('*.wandb')
    data, at, part, rows = file.read_bytes(), 7, b'', []
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7: at += 2**15 - at % 2**15
        _, n, kind = struct.unpack('<IHB', data[at:at + 7])
        part, at = part + data[at + 7:at + 7 + n], at + 7 + n
        if kind not in (1, 4): continue
        r = pb.Record()
        r.ParseFromString(part)
        part = b''
        if r.WhichOneof('record_type') == 'history': rows.append({o.key or '.'.join(o.nested_key): json.loads(o.value_json) for o in r.history.item})
    return rows

@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    from fastai.callback import wandb as board_module
    from fastai.callback.wandb import WandbCallback
    monkeypatch.setenv('WANDB_SILENT', 'true')
    args = board_module.init_args                         # of fastcore; since it asks `vars` of a number, no Learner can be logged
    monkeypatch.setattr(board_module, 'init_args', lambda o: args(o) if hasattr(o, '__dict__') else {})
    run = wandb.init(project='p', mode='offline', dir=tmp_path)
    board = WandbCallback(log_preds=False, log_model=False)
    learn = learner([XentRecorder(tmp_path / 'r'), XentLogger(k=3), board], metrics=accuracy, path=tmp_path)
    learn.fit(2)
    learn.fit(1)
    run.finish()
    rows, record = wandb_history(tmp_path), learn.xent_recorder.record
    if not any(o.get('xent/epoch') == 2 for o in rows): pytest.skip('W&B has not written its last rows into its file')
    ours = [o for o in rows if 'xent/epoch' in o]
    got = {o['xent/epoch']: {} for o in ours}
    for o in ours:
        assert not got[o['xent/epoch']].keys() & o.keys() - {'xent/epoch', '_step', '_runtime', '_timestamp', 'epoch', 'train_loss', 'raw_loss'}
        got[o['xent/epoch']].update(o)
    for k in range(3):
        assert {o: got[k][f'xent/{o}'] for o in ALL} == pytest.approx(in_sql(record, k), rel=1e-2)
        assert sum(got[k]['xent/train_loss_rows.values']) == len(record.to_df('train', k))
    assert [k for k in got if 'xent/top.nrows' in got[k]] == [1, 2] and got[2]['xent/top.nrows'] == 3
    assert sum('raw_loss' in o for o in rows) == 3 * len(learn.dls.train)     # fastai's own steps are all there

@pytest.mark.slow
def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
    trackio = pytest.importorskip('trackio')
    from trackio.sqlite_storage import SQLiteStorage
    trackio.init(project='p', name='r', embed=False, auto_log_gpu=False, auto_log_cpu=False)
    learn = learner([XentRecorder(), XentLogger(k=3)])
    try: learn.fit(2)
    finally: trackio.finish()
    got = {}
    for o in SQLiteStorage.get_logs('p', 'r'):
        assert not got.get(o['step'], {}).keys() & o.keys() - {'step', 'timestamp'}
        got.setdefault(o['step'], {}).update(o)
    for k in range(2): assert {o: got[k][f'xent/{o}'] for o in ALL} == pytest.approx(in_sql(learn.xent_recorder.record, k), rel=1e-5)
    assert sum(got[1]['xent/valid_el2n_rows']['values']) == 18 and len(got[1]['xent/top']['_value']) == 3
