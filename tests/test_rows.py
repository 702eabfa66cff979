"The rows of a pass: their memory, their shape, and whether anyone waits for a device."
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_xent import losses, rows as rows_module
from fastai_xent.losses import XentLoss, XentLossFlat
from fastai_xent.numerics import XentStats, xent_stats
from fastai_xent.batch import Batch, read_batch
from fastai_xent.rows import RowBuffer

LOSSES = {'ours': XentLoss(), 'stock': nn.CrossEntropyLoss()}

def collect(loss_func, z, y, capacity, times):
    "The buffer after `times` batches alike."
    rows = RowBuffer(capacity)
    for i in range(times):
        loss_func(z, y)
        rows.add(i, Batch(z, y, loss_func, 1), i)
    return rows

@pytest.mark.parametrize('exact, limit', [(True, 45), (False, 85)], ids=['a good guess', 'no guess'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('loss_func', LOSSES.values(), ids=LOSSES)
def test_bytes_a_row(loss_func, dtype, exact, limit):
    n, times = 1024, 256
    z, y = torch.zeros(n, 2, dtype=dtype), torch.zeros(n, dtype=torch.long)
    collect(loss_func, z, y, n, 2).cols()             # kernels compile
    tracemalloc.start()
    try: cols, (_, most) = collect(loss_func, z, y, n * times if exact else 1, times).cols(), tracemalloc.get_traced_memory()
    finally: tracemalloc.stop()
    assert len(cols['loss']) == n * times and 36 <= most / n / times <= limit

@pytest.mark.parametrize('loss_func', LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize('capacity', [1, 5000, 10**12])
def test_columns_are_right_whatever_the_guess(loss_func, capacity):
    gen = torch.Generator().manual_seed(0)
    z, y = torch.randn(13000, 3, generator=gen), torch.randint(0, 3, (13000,), generator=gen)
    rows, sizes = RowBuffer(capacity), [1, 4095, 1, 3000, 5903]
    for i, (a, b) in enumerate(zip(z.split(sizes), y.split(sizes))):
        other = LOSSES['stock'] if i == 2 else loss_func      # a batch between whose statistics do not come with the loss
        other(a, b)
        b = b.clone()
        last, own = getattr(other, '_last', None), Batch(a, b, other, 1)
        if last is not None: own.targ = last.targ
        rows.add(i, own, i, extra=dict(twice=2 * a[:, 0].double(), whole=b) if i != 3 else None)
        if i == 1: first = rows.cols()
    for cols, n in ((first, 4096), (rows.cols(), 13000)):
        for name, want in zip(XentStats._fields, xent_stats(z[:n], y[:n])): assert_close(torch.tensor(cols[name]).to(want.dtype), want, rtol=1e-5, atol=1e-6)
        assert cols['targ'].tolist() == y[:n].tolist() and cols['step'].tolist() == np.repeat(range(5), sizes)[:n].tolist()
    cols, gap = rows.cols(), slice(4097, 7097)
    assert np.isnan(cols['twice'][gap]).all() and (cols['whole'][gap] == -1).all()
    cols['twice'][gap], cols['whole'][gap] = 2 * z[gap, 0], y[gap]
    assert_close(torch.tensor(cols['twice']), 2 * z[:, 0])
    assert cols['whole'].tolist() == y.tolist() and {v.dtype for v in cols.values()} == {np.dtype(np.float32), np.dtype(np.int32)}

def test_rows_are_counted_across_the_class_axis():
    z, y, loss_func = torch.zeros(4, 1), torch.zeros(1, dtype=torch.long), XentLoss(axis=0)
    loss_func(z, y)
    rows = RowBuffer(4)
    rows.add(0, Batch(z, y, loss_func, 0))
    assert rows.sizes == [1] and len(rows.cols()['loss']) == 1

# -- waits

class Watch(TorchDispatchMode):
    "Keeps the names of operations that wait for a device: a number read by the host, or a copy to it that blocks."
    def __init__(self):
        super().__init__()
        self.waits = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, away = func.overloadpacket.__name__, [o for o in args if isinstance(o, torch.Tensor) and o.device.type != 'cpu']
        if name in ('_local_scalar_dense', 'nonzero', 'is_nonzero') and away: self.waits.append(name)
        res = func(*args, **kwargs)
        blocks = not (kwargs.get('non_blocking') or (name == 'copy_' and args[2:3] == (True,)))
        if name in ('copy_', '_to_copy') and away and res.device.type == 'cpu' and blocks: self.waits.append(name)
        return res

def test_the_watch_sees_who_waits():
    with FakeTensorMode(), Watch() as watch:
        z = torch.zeros(3, device='cuda')
        z.to('cuda', torch.float64)
        torch.empty(3).copy_(z, non_blocking=True)
        assert watch.waits == []
        z.cpu(), torch.empty(3).copy_(z)
        for wait in (lambda: z.sum().item(), lambda: bool(z.sum()), lambda: z.tolist(), lambda: z.nonzero()):
            with pytest.raises(Exception): wait()
    assert watch.waits == ['_to_copy', 'copy_', *['_local_scalar_dense'] * 3, 'nonzero']

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(8, 5), (8, 5, 4)])
@pytest.mark.parametrize('make', [XentLossFlat, lambda axis: nn.CrossEntropyLoss(), lambda axis: XentLossFlat(axis=axis, label_smoothing=.1), lambda axis: XentLossFlat(torch.ones(5, device="cuda"), axis=axis)])
def test_no_batch_on_a_device_waits_for_it(monkeypatch, make, shape, dtype):
    monkeypatch.setattr(losses, 'WAY', 'torch')
    monkeypatch.setattr(torch.cuda, 'Event', lambda: SimpleNamespace(record=lambda: None, query=lambda: False))
    with FakeTensorMode():
        loss_func, rows = make(axis=1), RowBuffer(100)
        z, y = torch.zeros(shape, device='cuda', dtype=dtype), torch.zeros(8, *shape[2:], device='cuda', dtype=torch.long)
        with Watch() as watch:
            for i in range(30):
                loss_func(z, y)
                rows.add(i, read_batch(SimpleNamespace(pred=z, yb=(y,), loss_func=loss_func)), i, extra=dict(grand=z.detach().flatten(1).sum(1)))
            assert watch.waits == [] and rows.n == 240
            rows.cols()
        assert set(watch.waits) == {'_to_copy'}       # the one wait, at the end of the pass

class OnDevice(RowBuffer):
    "A buffer that takes a CPU for a device: rows wait there until the pass is over."
    def _take(self, b, extra, to):
        part = {k: v.detach().clone() for k, v in extra.items()}
        if rows_module._may_wait(b): self._wait(b, part)
        else: part.update(rows_module._columns(b, self._stats(b), to.start))
        self.parts.append((part, to))

@pytest.mark.parametrize('waits', [False, True])
def test_rows_that_stay_on_a_device_are_the_same(monkeypatch, waits):
    gen = torch.Generator().manual_seed(0)
    z, y = torch.randn(60, 3, generator=gen), torch.randint(0, 3, (60,), generator=gen)
    def add_all(rows):
        for i, (a, b) in enumerate(zip(z.split(7), y.split(7))): rows.add(i, Batch(a, b, nn.CrossEntropyLoss(), 1), i, extra=dict(grand=a[:, 0].bfloat16(), k=b) if i % 2 else None)
        return rows.cols()
    want = add_all(RowBuffer(60))
    monkeypatch.setattr(rows_module, '_may_wait', lambda b: waits)
    got = add_all(OnDevice(20))
    assert list(got)[:8] == list(want)[:8] and got.keys() == want.keys()
    for k in want: assert_close(torch.tensor(got[k]), torch.tensor(want[k]), rtol=1e-5, atol=1e-6, equal_nan=True)
