"Progress bars of our jobs: after two seconds, where somebody looks, and never in the way of the job."
import io
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from fastprogress import fastprogress

from fastai_xent import bars
from fastai_xent.bars import Bar, no_bars, over
from fastai_xent.dynamics import SCORES
from fastai_xent.writer import XentWriter


class Drawn:
    "What fastprogress would draw."
    def __init__(self, gen, leave): self.total, self.leave, self.at, self.ended, self.comment = len(gen), leave, [], 0, ''
    def update(self, n): self.at.append(n)
    def on_iter_end(self): self.ended += 1

class Torn(Drawn):
    "Cannot be drawn."
    def update(self, n): raise OSError('the screen is gone')

class Terminal(io.StringIO):
    def isatty(self): return True

@pytest.fixture
def drawn(monkeypatch):
    "All bars that are drawn, in a terminal and without waiting."
    made = []
    def progress_bar(*args, **kw):
        made.append(Drawn(*args, **kw))
        return made[-1]
    monkeypatch.setattr(fastprogress, 'progress_bar', progress_bar)
    monkeypatch.setattr(bars, '_AFTER', -1)
    monkeypatch.setattr(bars, 'sys', SimpleNamespace(stdout=Terminal()))
    return made

def count(n=4): return list(over(range(n), 'counting'))

def test_a_bar_counts_the_steps_and_goes_away(drawn):
    assert count() == [0, 1, 2, 3]
    bar, = drawn
    assert (bar.total, bar.comment, bar.at, bar.ended, bar.leave) == (4, 'counting', [0, 1, 2, 3], 1, False)

def test_a_short_job_has_none(drawn, monkeypatch):
    monkeypatch.setattr(bars, '_AFTER', 1e9)
    count()
    assert not drawn

def test_no_bars_switches_them_off_and_on_again(drawn):
    with pytest.raises(KeyError), no_bars():
        count()
        assert not drawn
        raise KeyError
    count()
    assert len(drawn) == 1

def test_no_bar_into_a_file(drawn):
    bars.sys.stdout = io.StringIO()
    count()
    bars.sys.stdout = None
    count()
    assert not drawn

def test_no_bar_beside_the_training(drawn):
    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    assert not drawn

def test_a_notebook_needs_no_terminal(drawn, monkeypatch):
    bars.sys.stdout = io.StringIO()
    monkeypatch.setattr(fastprogress, 'IN_NOTEBOOK', True)
    count()
    assert len(drawn) == 1

def test_a_bar_that_fails_is_told_once_and_the_job_goes_on(drawn, monkeypatch):
    monkeypatch.setattr(fastprogress, 'progress_bar', Torn)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert count() == [0, 1, 2, 3]
    assert [str(o.message) for o in said] == [
        "no progress bar for counting: OSError('the screen is gone'); the job itself goes on"]

def test_a_job_that_fails_leaves_no_bar(drawn):
    with pytest.raises(ZeroDivisionError), Bar('dividing', 5) as bar:
        for i in (2, 1, 0):
            1 / i
            bar()
    assert [o.ended for o in drawn] == [1]

@pytest.mark.parametrize('kind', [fastprogress.ConsoleProgressBar, fastprogress.NBProgressBar])
def test_fastprogress_draws_them(drawn, monkeypatch, capsys, kind):
    shown = []
    monkeypatch.setattr(fastprogress, 'progress_bar', kind)
    monkeypatch.setattr('IPython.display.display', lambda *_, **__: SimpleNamespace(update=shown.append))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        count()
        count(1)
        count(0)
    assert kind is fastprogress.ConsoleProgressBar or 'counting' in str(shown[-2]), shown


# -- our jobs

def run(epochs=3, n=5):
    "A record in memory, with probabilities."
    writer, rng = XentWriter(), np.random.default_rng(0)
    for split in ('train', 'valid'):
        writer.set_items(split, pd.DataFrame(dict(item=range(n), name=list('abcdefgh'[:n]), source=pd.NA)), split, ['cat', 'dog'])
        for e in range(epochs):
            p = rng.uniform(.05, .95, n).astype(np.float32)
            cols = dict(item=np.arange(n), loss=-np.log(p), grad_norm=1 - p, el2n=1 - p, p_targ=p, margin=np.log(p / (1 - p)),
                        pred=(p < .5).astype(int), targ=np.zeros(n, dtype=int))
            writer.write(0, e, split, cols, probs=(np.arange(n), np.stack([p, 1 - p], 1)), fold=False)
    return writer.record

# The last step of a job takes its bar away, so `at` ends one before.
JOBS = {
    'score': (lambda r, d: r.score(), {'folding the epochs of train': 6}),            # label_doubt wants each epoch twice
    'label_issues': (lambda r, d: r.label_issues(noise_rate=.1), {'folding the epochs of train': 6}),
    'noise rate': (lambda r, d: r.label_issues(),
                   {f'{o} the epochs of {s}': k for s in ('train', 'valid') for o, k in (('folding', 6), ('reading', 3))}),
    'compact': (lambda r, d: r.compact(), {'compacting train': 5, 'compacting valid': 5}),
    'csv': (lambda r, d: r.to_file(d / 'a.csv'), {'folding the epochs of train': 6, 'exporting train': 3}),
    'jsonl': (lambda r, d: r.to_file(d / 'a.jsonl'), {'folding the epochs of train': 6, 'exporting train': 3}),
    'parquet': (lambda r, d: r.to_file(d / 'a.parquet'), {'folding the epochs of train': 6, 'exporting train': 3}),
    'cartography': (lambda r, d: r.to_cartography(d), {'reading the epochs of train': 3, 'exporting train': 3}),
}

@pytest.mark.parametrize('name', JOBS)
def test_every_long_job_has_a_bar_that_ends_where_it_should(drawn, monkeypatch, tmp_path, name):
    monkeypatch.setattr('fastai_xent.export._AT_ONCE', 2)
    monkeypatch.setattr('fastai_xent.epochs._AT_ONCE', 1)
    job, want = JOBS[name]
    job(run(), tmp_path)
    assert {o.comment: o.total for o in drawn} == want
    for o in drawn: assert o.at == list(range(o.total)) and o.ended == 1

def test_only_new_epochs_are_counted(drawn):
    record = run()
    kept = record._segment('train')
    record._cache.values(list(SCORES.values()), kept)
    drawn.clear()
    old = record._place.read('_running/train-0.pq')
    record._place.write('rows/train/fit-0-epoch-003-part-0.parquet',
                        lambda f: f.write(record._place.read('rows/train/fit-0-epoch-002-part-0.parquet')))
    record.score()
    assert record._place.read('_running/train-0.pq') != old
    assert [(o.comment, o.total, o.at) for o in drawn] == [('folding the epochs of train', 2, [0, 1])]

@pytest.mark.parametrize('ending, read', [('csv', pd.read_csv), ('parquet', pd.read_parquet),
                                          ('jsonl', lambda f: pd.read_json(f, lines=True))])
def test_a_file_that_is_written_in_pieces_is_the_same_file(monkeypatch, tmp_path, ending, read):
    record = run()
    whole, pieces = (record.to_file(tmp_path / f'{o}.{ending}') for o in 'ab' if not monkeypatch.setattr('fastai_xent.export._AT_ONCE', 2 if o == 'b' else 2**16))
    if ending != 'parquet': assert whole.read_bytes() == pieces.read_bytes()
    pd.testing.assert_frame_equal(read(whole), read(pieces))
    assert len(read(whole)) == 5
