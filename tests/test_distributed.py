"Two ranks under gloo: each writes its own part, padding is told apart, and rank 0 reads the whole."
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing as mp
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from fastai_xent.all import XentRecord

N, C, EPOCHS = 21, 5, 2


class Bucket(DirFileSystem):
    "An object store: a directory that only fsspec can reach, and in which nothing is renamed."
    protocol = 'bucket'
    def __init__(self, **kw): super().__init__(path=os.environ['XENT_TEST_BUCKET'],
        fs=LocalFileSystem(auto_mkdir=True), **kw)
    def mv(self, *args, **kw): raise NotImplementedError('an object store has no rename')


class Encoded:
    "Item i is the row of logits (i, 0, …, 0), with label i % C; `skip` cannot be read."
    def __init__(self, n, skip=()): self.n, self.skip = n, set(skip)
    def __len__(self): return self.n
    def __getitem__(self, i):
        from fastai.data.load import SkipItemException
        if i in self.skip: raise SkipItemException
        x = torch.zeros(C)
        x[0] = i / 8
        return x, torch.tensor(i % C)


class PassOn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.same = torch.nn.Parameter(torch.zeros(1)), torch.nn.Linear(C, C, bias=False)
        self.same.weight.requires_grad_(False).copy_(torch.eye(C))
    def forward(self, x): return self.same(x + 0 * self.w)


def model(how):
    "Plain, or its parameters spread over the ranks (FSDP)."
    if 'sharded' not in how: return PassOn()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    return fully_shard(PassOn(), mesh=init_device_mesh('cpu', (2,)))


SKIP = (0, 7)
SCENARIOS = [('plain', {}), ('plain', dict(resume=True)), ('skips', dict(skip=SKIP)), ('bucket://runs/shared', {}),
    ('own', dict(own=True)),
             ('sampler', dict(shared=True)), ('shard', dict(shared=True)), ('sharded', dict(shared=True, sharded=True))]


def shared(name, ds, rank):
    "torch's loader over the share that torch's sampler, or accelerate, gives this rank."
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
    from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
    if name != 'shard': return DataLoader(ds, batch_size=4, sampler=DistributedSampler(ds, 2, rank))
    return DataLoaderShard(ds, batch_sampler=BatchSamplerShard(BatchSampler(range(len(ds)), 4, False), 2, rank))


def order_without_gpu():
    "fastai sends the order of the items from rank to rank by the GPU, even where there is none."
    import fastai.distributed as fd
    def broadcast(self, t, rank):
        t = torch.LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    fd.DistributedDL._broadcast = broadcast


def train(rank, port, folder):
    "One rank: it trains for two epochs in each scenario, one after the other."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port), XENT_TEST_BUCKET=folder)
    fsspec.register_implementation('bucket', Bucket, clobber=True)
    torch.set_num_threads(1)
    from fastai.data.core import DataLoaders, TfmdDL
    from fastai.learner import Learner

    from fastai_xent.all import XentLossFlat, XentRecorder

    order_without_gpu()
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    torch.manual_seed(rank)
    for name, how in SCENARIOS:
        path = name if '://' in name else f"{folder}/{name}{f'-{rank}' if 'own' in how else ''}"
        dls = DataLoaders(TfmdDL(Encoded(N, how.get('skip', ())), bs=4, shuffle=True, num_workers=0),
            TfmdDL(Encoded(8), bs=4, num_workers=0), device='cpu')
        if 'shared' in how: dls = DataLoaders(shared(name, Encoded(N), rank), shared(name, Encoded(8), rank))
        recorder = XentRecorder(path, resume='resume' in how, check=True, keep_probs=True, features='every')
        learn = Learner(dls, model(how), loss_func=XentLossFlat(), cbs=recorder)
        ctx = nullcontext() if 'shared' in how else learn.distrib_ctx(sync_bn=False, cpu=True)
        with learn.no_bar(), learn.no_logging(), ctx: learn.fit(EPOCHS)
        torch.distributed.barrier()
        if rank == 0: recorder.record.top(3)
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Where two ranks have trained in every scenario."
    folder = tmp_path_factory.mktemp('ranks')
    mp.spawn(train, args=(free_port(), str(folder)), nprocs=2)
    return folder


def check(df, fits=1):
    "Every item once an epoch, with its own numbers, and the repeats marked."
    train_rows = df[df['split'] == 'train']
    assert sorted(train_rows['epoch'].unique()) == list(range(EPOCHS * fits))
    for _, e in train_rows.groupby('epoch'):
        own = e[e['occurrence'] >= 0]
        assert sorted(own['item']) == list(range(N))
        assert len(e) - len(own) <= 1                  # 22 rows for 21 items
    for split in ('train', 'valid'):
        rows = df[df['split'] == split]
        item = rows['item'].to_numpy()
        np.testing.assert_array_equal(rows['targ'], item % C)
        z = np.where(item % C == 0, item / 8, -item / 8)
        np.testing.assert_allclose(rows['margin'], np.where((item % C != 0) | (item > 0), z, 0), rtol=1e-6)
    assert (df[df['split'] == 'valid'].groupby('epoch')['item'].nunique() == 8).all()


def test_two_ranks_write_one_record_and_resume_it(folder):
    record = XentRecord(folder / 'plain')
    check(record.to_df(), fits=2)
    assert record._n_fits == 2
    assert {Path(o).stem.rsplit('-', 1)[1] for o in (folder / 'plain/rows').rglob('*.parquet')} == {'0', '1'}
    assert (record.to_df('train')['occurrence'] == -1).sum() == 2 * EPOCHS      # 22 rows for 21 items, in each epoch
    assert (record.seen().rows == 2 * EPOCHS).all()


def test_items_skipped_by_a_rank_are_followed(folder):
    df = XentRecord(folder / 'skips').to_df()
    rows = df[(df['split'] == 'train') & (df['occurrence'] >= 0)]
    assert len(rows) > EPOCHS * (N - len(SKIP)) - 8 and not rows['item'].isin(SKIP).any()
    np.testing.assert_array_equal(rows['targ'], rows['item'] % C)


def test_two_ranks_that_share_only_an_object_store(folder, monkeypatch):
    monkeypatch.setenv('XENT_TEST_BUCKET', str(folder))
    fsspec.register_implementation('bucket', Bucket, clobber=True)
    check(XentRecord('bucket://runs/shared').to_df())


@pytest.mark.parametrize('name, repeats', [('sampler', 1), ('shard', 3), ('sharded', 1)])
def test_two_ranks_that_share_an_order(folder, name, repeats):
    """21 items: torch's sampler repeats one; accelerate fills up the last batch, which has 1 of 4 rows.

    Parameters that are spread over the ranks (FSDP) change nothing: rows come from what the loss is given."""
    df = XentRecord(folder / name).to_df()
    rows = df[df['split'] == 'train']
    for _, e in rows.groupby('epoch'):
        own = e[e['occurrence'] >= 0]
        assert sorted(own['item']) == list(range(N)) and len(e) - len(own) == repeats
    np.testing.assert_array_equal(df['targ'], df['item'] % C)
    assert (df[df['split'] == 'valid'].groupby('epoch')['item'].nunique() == 8).all()


def test_two_ranks_with_a_path_each(folder):
    rows = [XentRecord(folder / f'own-{r}').to_df('train', 0) for r in (0, 1)]
    own = sorted(i for df in rows for i in df.loc[df['occurrence'] >= 0, 'item'])
    assert own == list(range(N))


def test_probabilities_of_two_ranks(folder):
    "Each rank has written those of its own items; together they are all."
    record = XentRecord(folder / 'plain')
    for split, n in (('train', N), ('valid', 8)):
        z = torch.zeros(n, C)
        z[:, 0] = torch.arange(n) / 8
        for epoch in range(2 * EPOCHS): np.testing.assert_allclose(record.probs(split, epoch), z.softmax(1), rtol=2.**-11, atol=1e-6)
    parts = [pq.read_table(folder / f'plain/_probs/train/fit-0-epoch-000-part-{r}.pq')['item'].to_pylist() for r in (0, 1)]
    assert sorted(sum(parts, [])) == list(range(N)) and all(parts)


def test_features_of_two_ranks(folder):
    "What each rank's last layer got of its own items, without rows that only fill up."
    record = XentRecord(folder / 'plain')
    for split, n in (('train', N), ('valid', 8)):
        x = np.zeros((n, C))
        x[:, 0] = np.arange(n) / 8
        for epoch in range(2 * EPOCHS): np.testing.assert_allclose(record.features(split, epoch), x, atol=N / 8 / 254)
    parts = [pq.read_table(folder / f'plain/_features/train/fit-0-epoch-000-part-{r}.pq')['item'].to_pylist() for r in (0, 1)]
    assert sorted(sum(parts, [])) == list(range(N)) and all(parts)


# -- as users start it

SCRIPT = """
import os, signal, sys
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.distributed import *
from fastai.learner import Learner
from test_distributed import Encoded, N, PassOn, order_without_gpu
from fastai_xent.all import XentLossFlat, XentRecorder

path, epochs, dies, resume = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == 'resume'
torch.set_num_threads(1)
order_without_gpu()
class Dies(Callback):
    def after_batch(self):
        if self.training and self.epoch == dies and self.iter == 1 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)
dls = DataLoaders(TfmdDL(Encoded(N), bs=4, shuffle=True, num_workers=0), TfmdDL(Encoded(8), bs=4, num_workers=0), device='cpu')
learn = Learner(dls, PassOn(), loss_func=XentLossFlat(), cbs=[XentRecorder(path, resume=resume), Dies()])
with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging(): learn.fit(epochs)
"""

LAUNCHERS = dict(
    torchrun=['torch.distributed.run', '--nproc_per_node', '2', '--master_port'],
    accelerate=['accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no',
                '--dynamo_backend', 'no', '--main_process_port'])

def launch(launcher, folder, epochs, dies=-1, how='new'):
    (folder / 'train.py').write_text(SCRIPT)
    command = [sys.executable, '-W', 'ignore', '-m', *LAUNCHERS[launcher], str(free_port()), 'train.py', 'r', str(epochs), str(dies), how]
    path = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(path)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)

@pytest.mark.slow
@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_started_by_a_launcher(launcher, tmp_path):
    done = launch(launcher, tmp_path, EPOCHS)
    assert done.returncode == 0, done.stderr[-3000:]
    record = XentRecord(tmp_path / 'r')
    check(record.to_df())
    assert {o.stem.rsplit('-', 1)[1] for o in (tmp_path / 'r/rows').rglob('*.parquet')} == {'0', '1'}

@pytest.mark.slow
@pytest.mark.skipif(os.name != 'posix', reason='no SIGKILL')
def test_a_rank_is_killed_and_the_training_goes_on(tmp_path):
    "Rank 1 dies in the third epoch: two are whole. The next start goes on after them."
    done = launch('torchrun', tmp_path, 4, dies=2)
    assert done.returncode != 0 and f'Signal {signal.SIGKILL.value}' in done.stderr
    record = XentRecord(tmp_path / 'r')
    assert {k.epoch for k in record.epochs} == {0, 1}
    check(record.to_df())
    before = record.to_df()
    record.top(3)
    done = launch('torchrun', tmp_path, EPOCHS, how='resume')
    assert done.returncode == 0, done.stderr[-3000:]
    after = XentRecord(tmp_path / 'r')
    check(after.to_df(), fits=2)
    assert after.to_df()[lambda df: df['epoch'] < EPOCHS].reset_index(drop=True).equals(before)
