"Scores by dask's workers, which read an object store: two processes, S3's protocol, one worker killed."
import os
import signal
from functools import partial

import fsspec
import numpy as np
import pandas as pd
import pytest
from runs import answers, everything, same_answers
from test_executors import N, Alone, long_run

from fastai_xent import cache, epochs
from fastai_xent.dynamics import MeanColumn
from fastai_xent.record import XentRecord

distributed = pytest.importorskip('distributed', reason='install `distributed` to try dask')
import dask  # noqa: E402  comes with it

S3 = dict(key='a', secret='b')

@pytest.fixture(scope='module')
def store():
    "An object store of this machine, and how to reach it, told to this process alone."
    pytest.importorskip('s3fs', reason='install `s3fs` to try an object store')
    moto = pytest.importorskip('moto.server', reason='install `moto[server]` to try an object store')
    server = moto.ThreadedMotoServer(port=0, ip_address='127.0.0.1')
    server.start()
    host, port = server.get_host_and_port()
    fsspec.config.conf['s3'] = dict(S3, endpoint_url=f'http://{host}:{port}')
    fsspec.filesystem('s3').mkdir('runs')
    yield 's3://runs'
    fsspec.config.conf.pop('s3')
    server.stop()

@pytest.fixture(scope='module')
def client():
    "Two workers, each a process of its own."
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host='127.0.0.1') as cluster:
        with distributed.Client(cluster) as client: yield client

@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cache, 'fold', partial(cache.fold, chunk=7))
    monkeypatch.setattr(epochs, '_AT_ONCE', 16)

@pytest.mark.slow
def test_two_workers_and_an_object_store(client, store, small, tmp_path):
    "The same answers as one process gets from a disk; each worker has read."
    alone, by = long_run(tmp_path / 'r'), long_run(f'{store}/first')
    before = len(client.run(os.getpid))
    with client.get_executor() as pool:
        pd.testing.assert_frame_equal(by.scores(executor=pool), alone.scores())
        by.scores('valid', executor=pool)
        assert answers(by) == answers(alone)
        pd.testing.assert_frame_equal(by.label_issues(noise_rate=.1, executor=pool), alone.label_issues(noise_rate=.1))
        by.compact(executor=pool)
    alone.compact()
    same_answers(everything(XentRecord(f'{store}/first')), everything(alone))
    assert before == 2 and len(fsspec.filesystem('s3').glob('runs/first/rows/*/compact-*.parquet')) == 2

def test_a_store_that_only_this_process_knows_is_told_to_the_workers(store, small):
    "Keys and address go with the chunks."
    by = long_run(f'{store}/second')
    one = Alone()
    by.scores(executor=one)
    assert one.n and answers(by) == answers(long_run(None))

class Deadly(MeanColumn):
    "It kills the worker that folds the first chunk, once."
    def __init__(self, once): super().__init__('loss'); self.once, self.home = str(once), os.getpid()
    @property
    def key(self): return 'deadly'
    def update(self, state, item, weight, **cols):
        if not os.path.exists(self.once):
            open(self.once, 'w').close()
            os.kill(os.getpid(), signal.SIGKILL)
        super().update(state, item, weight, **cols)

@pytest.mark.slow
@pytest.mark.skipif(os.name != 'posix', reason='no SIGKILL')
def test_a_killed_worker_is_survived(client, small, tmp_path):
    "dask gives its chunks to the other one."
    record = long_run(tmp_path / 'r')
    with client.get_executor() as pool: got = record.score(Deadly(tmp_path / 'once'), executor=pool)
    assert (tmp_path / 'once').exists()
    np.testing.assert_array_equal(got, record.score('loss'))
    assert N == len(got)

class Fatal(MeanColumn):
    "It kills every worker, but not the first process."
    def __init__(self): super().__init__('loss'); self.home = os.getpid()
    @property
    def key(self): return 'fatal'
    def update(self, state, item, weight, **cols):
        if os.getpid() != self.home: os.kill(os.getpid(), signal.SIGKILL)
        super().update(state, item, weight, **cols)

@pytest.mark.slow
@pytest.mark.skipif(os.name != 'posix', reason='no SIGKILL')
def test_when_all_workers_die_the_work_is_done_here(tmp_path):
    record = long_run(tmp_path / 'r')
    with dask.config.set({'distributed.scheduler.allowed-failures': 0}), distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None, host='127.0.0.1') as cluster:
        with distributed.Client(cluster) as client, client.get_executor() as pool:
            with pytest.warns(UserWarning, match='this process did 1 of the chunks, not the executor: KilledWorker'):
                got = record.score(Fatal(), executor=pool)
    np.testing.assert_array_equal(got, record.score('loss'))
