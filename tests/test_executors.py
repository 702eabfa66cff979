"Chunks by an executor: the same bits as alone, whoever works them; a worker that dies; what cannot be sent."
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from pickle import PicklingError

import fsspec
import numpy as np
import pandas as pd
import pytest
from runs import answers, frame, put, rows

from fastai_xent import cache, epochs
from fastai_xent.chunks import in_order
from fastai_xent.dynamics import MeanColumn
from fastai_xent.record import XentRecord
from fastai_xent.records import XentRecords
from fastai_xent.running import BrokenScore
from fastai_xent.writer import XentWriter

N = 40

def long_run(path, seed=0):
    "A record of some epochs, with valid, in which every item has a label."
    writer = XentWriter(path)
    for split, n in (('train', N), ('valid', 9)):
        writer.set_items(split, frame(n, split + ' {}'), f'hash of {split}', list('abcd'))
        for e in range(4): put(writer, 0, e, split, rows(np.random.default_rng(e).permutation(n), seed=seed + e, ignored=0))
    writer.close()
    return writer.record

@pytest.fixture
def small(monkeypatch):
    "Chunks of seven items, so that a small record has many."
    monkeypatch.setattr(cache, 'fold', partial(cache.fold, chunk=7))
    monkeypatch.setattr(epochs, '_AT_ONCE', 16)

class Alone(Executor):
    "It works at once, on what was pickled and read again, and counts."
    def __init__(self): self.n = 0
    def submit(self, f, *args):
        self.n, job = self.n + 1, Future()
        try: job.set_result(pickle.loads(pickle.dumps(f))(*pickle.loads(pickle.dumps(args))))
        except Exception as e: job.set_exception(e)
        return job

POOLS = dict(
    threads=lambda: ThreadPoolExecutor(3), pickled=Alone,
    spawn=lambda: ProcessPoolExecutor(2, multiprocessing.get_context('spawn')),
    forkserver=lambda: ProcessPoolExecutor(2, multiprocessing.get_context('forkserver')))

SLOW = 'spawn',  # each worker imports torch and fastai anew
def kinds(names): return [pytest.param(o, marks=pytest.mark.slow) if o in SLOW else o for o in names]

@pytest.fixture(params=kinds(POOLS))
def pool(request):
    with POOLS[request.param]() as pool: yield pool


# -- the same bits

def test_the_same_bits_as_alone(pool, small, tmp_path):
    "Scores, a score of one's own, the verdict and the compact file."
    alone, by = long_run(tmp_path / 'alone'), long_run(tmp_path / 'by')
    pd.testing.assert_frame_equal(by.scores(executor=pool), alone.scores())
    assert answers(by) == answers(alone)
    mine = MeanColumn('step')
    assert by.score(mine, executor=pool).tobytes() == alone.score(mine).tobytes()
    pd.testing.assert_frame_equal(by.top(3, 'aum', 'valid', executor=pool), alone.top(3, 'aum', 'valid'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        one, two = by.label_issues(executor=pool), alone.label_issues()
    pd.testing.assert_frame_equal(one, two)
    assert one.attrs == two.attrs
    by.compact(executor=pool)
    alone.compact()
    pd.testing.assert_frame_equal(by.to_df(), alone.to_df())
    assert answers(XentRecord(by.path)) == answers(alone)

@pytest.mark.parametrize('where', ['memory', 'disk'])
@pytest.mark.parametrize('listed', [False, True])
def test_compact_of_nothing(where, listed, tmp_path):
    "Nothing is done, in a place where nothing was ever written too; what is no executor is refused all the same."
    writer = XentWriter(None if where == 'memory' else tmp_path / 'r')
    if listed: writer.set_items('train', frame(3), 'f')
    before = writer.record._place.files()
    for executor in (None, Alone()): writer.record.compact(executor)
    for bad in (4, 'two', Alone):
        with pytest.raises(TypeError, match='expected a `concurrent.futures.Executor`'): writer.record.compact(bad)
    assert [o for o in writer.record._place.files() if o != '.lock'] == before

def test_only_new_epochs_are_read(small, tmp_path, monkeypatch):
    "States that are there go on, to the very file that one process writes."
    long_run(tmp_path / 'alone').scores()
    put(XentWriter(tmp_path / 'alone', resume=True), 0, 4, 'train', rows(range(N), seed=9))
    shutil.copytree(tmp_path / 'alone', tmp_path / 'by')
    XentRecord(tmp_path / 'alone').scores()
    read, real = [], epochs.read_items
    monkeypatch.setattr(epochs, 'read_items', lambda source, *a, **kw: read.append(source) or real(source, *a, **kw))
    XentRecord(tmp_path / 'by').scores(executor=Alone())
    assert {Path(o).name for o in read} == {'fit-0-epoch-004-part-0.parquet'}
    assert len(read) == -(-N // 7) + 1                     # each chunk, and once for the epoch as a whole
    one, two = ((tmp_path / o / '_running/train-0.pq').read_bytes() for o in ('alone', 'by'))
    assert one == two

def test_several_records_at_once(small, tmp_path):
    runs = XentRecords([long_run(tmp_path / f'{k}', seed=10 * k) for k in range(3)])
    want = XentRecords([long_run(tmp_path / f'o{k}', seed=10 * k) for k in range(3)]).scores('el2n')
    one = Alone()
    got = runs.scores('el2n', executor=one)
    np.testing.assert_array_equal(got, want)
    assert one.n >= 3 * -(-N // 7)
    asked = one.n
    np.testing.assert_array_equal(runs.scores('el2n', executor=one), want)
    assert one.n == asked                                 # the states are kept
    alike = XentRecords([long_run(tmp_path / f'a{k}') for k in range(2)])
    issues = alike.label_issues(executor=one)
    pd.testing.assert_frame_equal(issues, alike.label_issues())
    assert one.n >= asked + 2 * 2 * 4                     # the epochs of both splits, for the noise rate

def test_a_record_in_memory_by_threads(small):
    "Many threads read one file at once."
    want = answers(long_run(None))
    for _ in range(5):
        record = long_run(None)
        with ThreadPoolExecutor(8) as pool: record.scores(executor=pool), record.scores('valid', executor=pool)
        assert answers(record) == want

def test_a_worker_imports_no_torch():
    code = ("import sys, fastai_xent.cache, fastai_xent.label_issues; "
            "assert not {'torch', 'fastai', 'matplotlib'} & {*sys.modules}")
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr


# -- what goes wrong

@pytest.mark.parametrize('url', [None, 'memory://executors/r'])
def test_a_record_in_memory_is_refused_by_processes(url):
    if url and fsspec.filesystem('memory').exists('/executors'): fsspec.filesystem('memory').rm('/executors', recursive=True)
    record = long_run(url)
    with POOLS['spawn']() as pool:
        for ask in (record.scores, record.score, record.top, record.compact, record.label_issues):
            with pytest.raises(PicklingError, match='lies in the memory of this process.*ThreadPoolExecutor'): ask(executor=pool)
    assert record.top(3).equals(long_run(None).top(3))

class Deadly(MeanColumn):
    "It kills whoever folds the chunk of item 20, unless that is the first process."
    def __init__(self): super().__init__('loss'); self.first = os.getpid()
    @property
    def key(self): return 'deadly'
    def update(self, state, item, weight, **cols):
        if os.getpid() != self.first: os.kill(os.getpid(), signal.SIGKILL)
        super().update(state, item, weight, **cols)

@pytest.mark.skipif(os.name != 'posix', reason='no SIGKILL')
def test_killed_workers_are_survived(small, tmp_path):
    "What they did not do is done here, and told once; the record is whole."
    record, want = long_run(tmp_path / 'r'), long_run(tmp_path / 'want')
    with POOLS['forkserver']() as pool:
        with pytest.warns(UserWarning, match='this process did .* of the chunks, not the executor: BrokenProcessPool') as said:
            got = record.score(Deadly(), executor=pool)
        assert len(said) == 1
        np.testing.assert_array_equal(got, want.score('loss'))
        with pytest.warns(UserWarning, match='BrokenProcessPool'): record.scores(executor=pool)    # it stays broken
        with pytest.warns(UserWarning, match='BrokenProcessPool'): record.compact(executor=pool)
    want.compact()
    pd.testing.assert_frame_equal(record.to_df(), want.to_df())
    assert answers(XentRecord(tmp_path / 'r')) == answers(want)

class Unsteady(Executor):
    "It fails in all the ways there are, one after the other: here is what became of job `n`."
    def __init__(self): self.n = 0
    def submit(self, f, *args):
        self.n, job = self.n + 1, Future()
        if self.n % 5 == 1: raise RuntimeError('cannot schedule new futures after shutdown')
        if self.n % 5 == 2: job.cancel(), job.set_running_or_notify_cancel()
        elif self.n % 5 == 3: job.set_exception(BrokenProcessPool('a worker died'))
        elif self.n % 5 == 4: job.set_exception(FileNotFoundError('not on this machine'))
        else: job.set_result(f(*args))
        return job

def test_every_way_to_fail_is_survived(small, tmp_path):
    record = long_run(tmp_path / 'r')
    with pytest.warns(UserWarning, match=r'this process did \d+ of the chunks'): record.scores(executor=Unsteady())
    assert answers(record) == answers(long_run(tmp_path / 'want'))

class Wrong(MeanColumn):
    "A score that fails."
    def __init__(self): super().__init__('loss')
    @property
    def key(self): return 'wrong'
    def value(self, **cols): return cols['los']

@pytest.mark.parametrize('kind', kinds(['threads', 'pickled', 'spawn']))
def test_a_score_that_fails_says_the_same(kind, small, tmp_path):
    record = long_run(tmp_path / 'r')
    with pytest.raises(BrokenScore, match="the state 'wrong' could not be folded") as alone: record.score(Wrong())
    record._cache.broken.clear()
    with POOLS[kind]() as pool, pytest.raises(BrokenScore) as by: record.score(Wrong(), executor=pool)
    assert (str(by.value), repr(by.value.__cause__)) == (str(alone.value), repr(alone.value.__cause__))

@pytest.mark.parametrize('bad', [4, 0, False, 'process', ProcessPoolExecutor])
def test_what_is_no_executor(bad, tmp_path):
    "It is refused whatever is asked, and whether or not anything has to be read."
    record, empty = long_run(tmp_path / 'r'), XentWriter()
    empty.set_items('train', frame(3, '{}'), 'hash')
    asks = [o for r in (record, empty.record) for o in (r.scores, r.top, r.score, r.label_issues, r.compact)]
    record.scores()                                       # now all are up to date
    for ask in (*asks, XentRecords([record]).scores, XentRecords([record]).label_issues):
        with pytest.raises(TypeError, match='executor is .*, expected a `concurrent.futures.Executor`'): ask(executor=bad)
    record.compact()
    with pytest.raises(TypeError, match='expected a `concurrent.futures.Executor`'): record.compact(bad)

def test_few_chunks_wait(tmp_path):
    "However many there are: results that wait for their turn lie in this process's memory."
    class Slow(Alone):
        waiting = most = 0
        def submit(self, *args):
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            return super().submit(*args)
    pool, used = Slow(), []
    for o in in_order(abs, range(100), pool, ahead=5):
        pool.waiting -= 1
        used.append(o)
    assert used == list(range(100)) and pool.most == 5

def test_an_interrupt_takes_the_jobs_back():
    class Interrupted(Future):
        def result(self): raise KeyboardInterrupt
    class Never(Executor):
        def __init__(self): self.jobs = []
        def submit(self, f, *args):
            self.jobs.append(Interrupted())
            return self.jobs[-1]
    pool = Never()
    with pytest.raises(KeyboardInterrupt): list(in_order(abs, [1, 2, 3], pool))
    assert [o.cancelled() for o in pool.jobs[1:]] == [True, True]
