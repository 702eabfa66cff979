"How records introduce themselves, what `help` says, and where what was called otherwise has gone."
import inspect
import pickle
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import learner
from runs import RUN, fill, frame, put, rows

import fastai_xent
import fastai_xent.all as everything
from fastai_xent.docs import described
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.writer import XentWriter


class Text(HTMLParser):
    "The tags and the texts of a page."
    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)
    def handle_starttag(self, tag, attrs): self.tags.append(tag)
    def handle_data(self, data): self.texts.append(data)

def long_record(path):
    writer = XentWriter(path)
    writer.set_items('train', frame(3), 'f', [f'a class with a rather long name, number {i}' for i in range(9)])
    writer.set_items('<i>odd</i>', frame(3), 'f')
    put(writer, 0, 0, 'train', rows([0, 1]))
    put(writer, 0, 0, '<i>odd</i>', rows([0, 1]))
    writer.keep_cost(1., 80.)
    writer.close()
    return writer.record

def test_text_fits_80_columns(tmp_path):
    text = repr(long_record(None))
    assert max(map(len, text.splitlines())) <= 80
    flat = ' '.join(text.split())
    for word in ('XentRecord in memory: 1 fit', 'train: 3 items, 1 epoch', '9 classes: a class with a rather long name, number 0', 'number 5, …', 'recording: took 1.2% of the fit'): assert word in flat

def test_the_cost_says_that_looks_are_in_it():
    "A look at train is a forward pass of its own, and much of what recording takes."
    writer = XentWriter()
    for split in ('train', 'train_eval'):
        writer.set_items(split, frame(3), 'f')
        put(writer, 0, 0, split, rows([0, 1]))
        writer.keep_cost(20., 80.)
        flat = ' '.join(repr(writer.record).split())
        looked = ', looks at train included' in flat
        assert 'of the fit' in flat and looked == (split == 'train_eval')

def test_only_columns_that_hold_something(tmp_path):
    for path in (None, tmp_path / 'r'):
        writer = XentWriter(path)
        record = fill(writer, RUN)
        flat = ' '.join(repr(record).split())
        assert 'columns: fit, epoch, split, item, loss, grad_norm, el2n, p_targ, margin, pred, targ, occurrence' in flat and 'grand' not in flat and 'entropy' not in flat
        put(writer, 1, 3, 'train', {**rows([0, 1], ignored=0), 'entropy': np.ones(2)})
        writer.close()
        assert 'occurrence, entropy' in ' '.join(repr(record).split())
        record.compact()
        assert 'occurrence, entropy' in ' '.join(repr(record).split())

def test_html(tmp_path):
    "A table, whatever stands in the names."
    record = long_record(tmp_path / '<b>bold</b> & "quoted"')
    page = Text(record._repr_html_())
    assert {*page.tags} == {'div', 'b', 'table', 'tr', 'th', 'td'} and page.tags.count('tr') == 3 and page.tags.count('b') == 1
    assert '<i>odd</i>' in page.texts and any('<b>bold</b> & "quoted"' in o for o in page.texts)
    assert page.texts[page.texts.index('train'):][:3] == ['train', '3 items', '1 epoch']
    assert 'nothing recorded yet' in XentWriter().record._repr_html_()

def test_a_learner_s_record():
    rec = XentRecorder()
    learner([rec], n=20).fit(1)
    assert 'recording: took ' in repr(rec.record) and Text(rec.record._repr_html_()).tags.count('tr') == 3

# -- help

def test_help_says_what_parameters_mean():
    "For each public name: every comment beside a parameter is in the docstring, and so in `help`."
    seen = 0
    for name in everything.__all__:
        o = getattr(everything, name)
        for f in [o, *([v for k, v in vars(o).items() if not k.startswith('_') and inspect.isfunction(v)] if inspect.isclass(o) else [])]:
            if not (inspect.isclass(f) or inspect.isfunction(f)): continue
            lines = described(f)
            if not lines: continue
            seen += 1
            assert lines in f.__doc__ and max(map(len, lines.splitlines())) <= 80, f
    assert seen > 40
    text = XentRecord.top.__doc__
    assert text.startswith('The items a person should look at first.') and 'k: Number of items' in text and 'Returns' in text
    assert 'path: Directory or URL for the record' in ' '.join(XentRecorder.__doc__.split())

# -- what was called otherwise

@pytest.mark.parametrize('name, now', dict(new=r'XentWriter\(path\)', keys='record.epochs', add='XentWriter.write', set_items='XentWriter.set_items', top_losses='record.top', plot_top_losses='record.show_top', export='record.to_file').items())
def test_old_names(name, now):
    record = fill(None, RUN)
    for o in (XentRecord, record):
        with pytest.raises(AttributeError, match=f"XentRecord has no '{name}'; it is {now}"): getattr(o, name)
        with pytest.raises(AttributeError, match="XentRecord has no 'nonsense'$"): o.nonsense
        assert name not in dir(o)
    assert pickle.loads(pickle.dumps(record)).epochs == record.epochs

MOVED = dict(store='fastai_xent.record and fastai_xent.writer', bridges='fastai_xent.export',
             fused='fastai_xent.cpu_kernels', kernels='fastai_xent.gpu_kernels')


def refused(line, error):
    "What Python says when it runs `line` in a process where only this package can be imported."
    env = {'PYTHONPATH': str(Path(fastai_xent.__file__).parent.parent)}
    res = subprocess.run([sys.executable, '-S', '-c', line], env=env, capture_output=True, text=True)
    assert res.returncode == 1
    kind, _, what = res.stderr.splitlines()[-1].partition(': ')
    assert kind == error
    return what


@pytest.mark.parametrize('name, now', MOVED.items())
def test_old_modules(name, now):
    with pytest.raises(AttributeError, match=f"fastai_xent.{name} is {now} now"): getattr(fastai_xent, name)
    for line in (f'from fastai_xent.{name} import *', f'from fastai_xent import {name}', f'import fastai_xent.{name}'):
        assert refused(line, 'ModuleNotFoundError') == f'fastai_xent.{name} is {now} now'


def test_modules_that_never_were():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"): fastai_xent.nonsense
    assert refused('import fastai_xent.nonsense', 'ModuleNotFoundError') == "No module named 'fastai_xent.nonsense'"
    assert refused('import store', 'ModuleNotFoundError') == "No module named 'store'"  # none of ours


def test_questions():
    "What a person sees after `record.` and tab: questions; pictures and exports stand together, under `plot_`, `show_` and `to_`."
    names = [o for o in dir(fill(None, RUN)) if not o.startswith(('_', 'plot_', 'show_', 'to_'))]
    assert len(names) <= 24, names  # six of them ask what the last layer saw, or where a mask is wrong
    for o in ('top', 'item', 'sql', 'scores', 'score', 'label_issues', 'items', 'epochs', 'splits', 'vocab', 'path'): assert o in names
