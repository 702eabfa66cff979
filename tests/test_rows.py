"The rows of a pass: what is read and refused, their memory, their shape, and whether anyone waits for a device."
import tracemalloc
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_xent import losses, rowloss, rows as rows_module
from fastai_xent.losses import XentLoss, XentLossFlat
from fastai_xent.numerics import XentStats, xent_stats
from fastai_xent.batch import Batch, NotRecordable, _sums, read_batch
from fastai_xent.rows import RowBuffer, _may_wait, _Room

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

def doubled(w, k): w[k] *= 2
def doubled_unseen(w, k): w.data[k] *= 2
def doubled_by_numpy(w, k): w.numpy()[k] *= 2
@pytest.mark.parametrize('loss', [XentLoss, nn.CrossEntropyLoss])
@pytest.mark.parametrize('change', [doubled, doubled_unseen, doubled_by_numpy])
def test_weights_that_are_changed_in_place(loss, change):
    "Each batch has those that it was trained with, also where torch does not count the edit."
    gen = torch.Generator().manual_seed(0)
    loss_func, rows, want = loss(weight=torch.tensor([1., 2., 3.])), RowBuffer(40), []
    for i in range(5):
        z, y = torch.randn(8, 3, generator=gen), torch.randint(0, 3, (8,), generator=gen)
        loss_func(z, y)
        rows.add(i, Batch(z, y, loss_func, 1), i)
        want.append(F.cross_entropy(z, y, loss_func.weight, reduction='none'))
        change(loss_func.weight, i % 3)
    assert_close(torch.tensor(rows.cols()['loss']), torch.cat(want), rtol=1e-5, atol=1e-6)

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

WITHOUT_WAITING = {
    'ours': lambda axis: XentLossFlat(axis=axis), 'stock': lambda axis: nn.CrossEntropyLoss(), 'smooth': lambda axis: XentLossFlat(axis=axis, label_smoothing=.1),
    'weights': lambda axis: XentLossFlat(torch.ones(5, device='cuda'), axis=axis), 'stock weights': lambda axis: nn.CrossEntropyLoss(torch.ones(5, device='cuda')),
    'nll': lambda axis: nn.NLLLoss(), 'sum': lambda axis: nn.CrossEntropyLoss(reduction='sum')}

@pytest.mark.grid
@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(8, 5), (8, 5, 4)])
@pytest.mark.parametrize('make', WITHOUT_WAITING)
def test_no_batch_on_a_device_waits_for_it(monkeypatch, make, shape, dtype, soft):
    soft = soft and make != 'nll'                     # nll_loss takes no probabilities
    monkeypatch.setattr(losses, 'WAY', 'torch')
    monkeypatch.setattr(torch.cuda, 'Event', lambda: SimpleNamespace(record=lambda: None, query=lambda: False))
    with FakeTensorMode():
        loss_func, rows = WITHOUT_WAITING[make](axis=1), RowBuffer(100)
        z = torch.zeros(shape, device='cuda', dtype=dtype)
        y = torch.zeros(shape, device='cuda', dtype=dtype) if soft else torch.zeros(8, *shape[2:], device='cuda', dtype=torch.long)
        with Watch() as watch:
            for i in range(30):
                loss = loss_func(z, y)
                batch = read_batch(SimpleNamespace(pred=z, yb=(y,), loss_func=loss_func, loss=loss))
                rows.add(i, batch, i, extra=dict(grand=z.detach().flatten(1).sum(1)))
            assert watch.waits == [] and rows.n == 240 and len(rows.ledger.at) == 30
            assert len(rows.doubts) == 30 * (soft or make == 'nll')
            rows._flush()
            rows._fetch()
        assert set(watch.waits) == {'_to_copy'}       # the one wait, at the end of the pass

def test_what_a_device_finds_is_told_at_the_end():
    "Targets that are no probabilities: that epoch has no rows."
    z, soft = torch.zeros(3, 4), torch.tensor([[1., 0, 0, 0], [0, 1, 1, 0], [.5, .5, .5, .5]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        good = Batch(z, torch.full((3, 4), .25), nn.CrossEntropyLoss(), 1, doubts=((_sums(torch.full((3, 4), .25, dtype=dtype), 1), 'rows'),))
        bad = Batch(z, soft, nn.CrossEntropyLoss(), 1, doubts=((_sums(soft.to(dtype), 1), 'rows of targets'),))
        rows = RowBuffer(9)
        rows.add(0, good)
        assert len(rows.cols()['loss']) == 3
        rows.add(1, bad)
        for _ in range(2):
            with pytest.raises(NotRecordable, match='2 rows of targets. Row 1 of the batch adds up to 2, its smallest is 0'): rows.cols()

# -- what cannot be read

Z, SEVERAL = torch.zeros(3, 4), torch.tensor([[1., 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])

class ModelOutput(OrderedDict):
    "As Hugging Face's models give it."
    def __getattr__(self, k): return self[k]

REFUSED = {
    'multi-hot': (Z, SEVERAL, nn.CrossEntropyLoss(), ['2 rows of targets are no probabilities', 'Row 1 of the batch adds up to 2', 'BCEWithLogitsLossFlat', 'divided by their sum']),
    'multi-hot, ours': (Z, SEVERAL, XentLossFlat(), ['Row 1 of the batch adds up to 2']), 'multi-hot, half': (Z.bfloat16(), SEVERAL.bfloat16(), XentLossFlat(), ['adds up to 2']),
    'multi-hot of integers': (Z, SEVERAL.long(), XentLossFlat(), ['several labels an item', 'expected one class an item, in shape [3]']),
    'multi-hot of bytes': (Z, SEVERAL.byte(), CrossEntropyLossFlat(), ['several labels an item']), 'multi-hot of booleans': (Z, SEVERAL.bool(), XentLossFlat(), ['several labels an item']),
    'multi-hot made floats by the loss': (Z, SEVERAL.long(), XentLossFlat(floatify=True), ['Row 1 of the batch adds up to 2']),
    'one item of several labels': (Z[:1], SEVERAL[1:2].long(), XentLossFlat(), ['several labels an item']), 'as many items as classes': (torch.zeros(4, 4), torch.ones(4, 4).long(), XentLossFlat(), ['several labels an item']),
    'shares': (Z, SEVERAL * .4, nn.CrossEntropyLoss(), ['3 rows', 'Row 0 of the batch adds up to 0.4']), 'negative shares': (Z, torch.tensor([[1.5, -.5, 0, 0]] * 3), nn.CrossEntropyLoss(), ['its smallest is -0.5']),
    'nan': (Z, torch.full((3, 4), torch.nan), nn.CrossEntropyLoss(), ['3 rows']), 'several labels a pixel': (torch.zeros(2, 4, 3), torch.ones(2, 4, 3), nn.CrossEntropyLoss(), ['6 rows of targets', 'adds up to 4']),
    'logits for nll_loss': (Z, torch.tensor([0, 1, 2]), nn.NLLLoss(), ['3 rows of predictions are no log-probabilities', 'End the model with `log_softmax`']),
    'a tuple': ((Z, Z), torch.tensor([0, 1, 2]), XentLossFlat(), ['the model gives a tuple of 2 (Tensor, Tensor)', 'self.learn.pred = self.pred[0]', '`RNNCallback`', 'rnn_cbs()']),
    'a list': ([Z], torch.tensor([0, 1, 2]), XentLossFlat(), ['the model gives a list of 1 (Tensor)', 'self.pred[0]']),
    'a ModelOutput': (ModelOutput(loss=Z, logits=Z), torch.tensor([0, 1, 2]), XentLossFlat(), ["the model gives a ModelOutput with 'loss', 'logits'", "self.learn.pred = self.pred['logits']"]),
    'a dict': (dict(out=Z, aux=Z), torch.tensor([0, 1, 2]), XentLossFlat(), ["the model gives a dict with 'out', 'aux'", 'let it give that']),
    'numpy': (Z.numpy(), torch.tensor([0, 1, 2]), XentLossFlat(), ['the model gives a ndarray of float32', 'expected a tensor of class logits']), 'nothing': (None, torch.tensor([0, 1, 2]), XentLossFlat(), ['the model gives a NoneType']),
    'whole numbers': (Z.long(), torch.tensor([0, 1, 2]), XentLossFlat(), ['predictions are torch.int64', 'expected class logits'])}

@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_read_is_refused_in_words(name):
    pred, targ, loss_func, words = REFUSED[name]
    with pytest.raises(NotRecordable) as e: read_batch(SimpleNamespace(pred=pred, yb=(targ,), loss_func=loss_func))
    assert all(o in str(e.value) for o in words), str(e.value)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_probabilities_are_taken(dtype):
    "Also rounded ones, of many classes."
    soft = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1).to(dtype)
    batch = read_batch(SimpleNamespace(pred=torch.zeros(50, 1000), yb=(soft,), loss_func=nn.CrossEntropyLoss()))
    assert batch.doubts == () and batch.targ.shape == (50, 1000)
    log_probs = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).mul(3).log_softmax(1).to(dtype)
    assert read_batch(SimpleNamespace(pred=log_probs, yb=(torch.zeros(50, dtype=torch.long),), loss_func=nn.NLLLoss())).settings.log_probs
    hot = F.one_hot(torch.arange(50) % 1000, 1000)
    assert read_batch(SimpleNamespace(pred=torch.zeros(50, 1000), yb=(hot,), loss_func=XentLossFlat(floatify=True))).targ.is_floating_point()

class OnDevice(RowBuffer):
    "Leaves all columns where they are until the pass is over."
    def _keep(self, cols, to): self.parts.append((cols, to))

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


@pytest.mark.parametrize('option', [{}, dict(label_smoothing=.1), dict(weight=torch.tensor([1., 2., .5])), dict(ignore_index=1)], ids=str)
@pytest.mark.parametrize('capacity', [1, 40, 1000])
def test_mixed_batches_wait_too(option, capacity, monkeypatch):
    "Small ones, plain ones between them; the statistics are those that each batch has alone."
    gen, times = torch.Generator().manual_seed(0), []
    monkeypatch.setattr(rows_module, 'fused_stats', lambda *args, **kw: times.append(len(args[0])) or xent_stats(*args, **kw))
    rows, loss_func, want, partner, lam = RowBuffer(capacity), nn.CrossEntropyLoss(**option), [], [], []
    kw = {'label_smoothing': 0., 'ignore_index': -100, 'weight': None, **option}
    for i, n in enumerate([8, 8, 8, 5, 8, 8, 3]):
        z, y, at = torch.randn(n, 3, generator=gen), torch.randint(0, 3, (n,), generator=gen), sum(rows.sizes)
        mix = None if i == 4 else (y.flip(0), torch.rand(n, generator=gen))
        b = Batch(z.clone(), y.clone(), loss_func, 1, mix=None if mix is None else (mix[0].clone(), mix[1].clone()))
        if mix is not None: b.partner = torch.arange(n).flip(0)
        rows.add(i, b, i)
        for o in (b.pred, b.targ, *(b.mix or ())): o.zero_()             # what waits is a copy
        want.append(xent_stats(z, y, mix=mix, **kw))
        partner += [-1] * n if mix is None else (at + b.partner).tolist()
        lam += [float('nan')] * n if mix is None else mix[1].tolist()
    cols = rows.cols()
    for name, parts in zip(XentStats._fields, zip(*want)):
        assert_close(torch.tensor(cols[name]), torch.cat(parts).to(torch.tensor(cols[name]).dtype), equal_nan=True)
    assert cols['partner'].tolist() == partner
    assert_close(torch.tensor(cols['lam']), torch.tensor(lam), equal_nan=True)
    assert sum(times) == 48 and len(times) <= {1: 7, 40: 3, 1000: 3}[capacity]

@pytest.mark.parametrize('n, c', [(6, 5), (64, 100)], ids=['small', 'large'])
@pytest.mark.parametrize('make', [nn.CrossEntropyLoss, XentLossFlat])
def test_probabilities_that_are_learned_too(make, n, c):
    "Targets with a gradient, a teacher's: their numbers are recorded, and their graph is let go."
    raw = torch.randn(n, c, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z, loss_func, rows = torch.randn(n, c, generator=torch.Generator().manual_seed(1)).requires_grad_(), make(), RowBuffer(n)
    t = raw.softmax(1)
    loss = loss_func(z, t)
    rows.add(0, read_batch(SimpleNamespace(pred=z, yb=(t,), loss_func=loss_func, loss=loss)))
    loss.backward()
    assert raw.grad.abs().sum() > 0
    cols, want = rows.cols(), xent_stats(z.detach(), t.detach())
    assert_close(torch.tensor(cols['loss']), want.loss)
    assert_close(torch.tensor(cols['grad_norm']), want.grad_norm)

# -- room

def test_room_grows_by_half_so_that_few_rows_are_copied():
    "Ten thousand batches of one row, and no idea how many will come."
    room, sizes = _Room(1), []
    grow = room._grow
    room._grow = lambda used: [grow(used), sizes.append(room.size)]
    for i in range(10_000): assert room.add(1) == slice(i, i + 1)
    assert sizes[0] == 1 and sizes[-1] >= 10_000
    assert sizes[1:] == [max(o + 1, o + o // 2) for o in sizes[:-1]]


# -- what waits, and what is asked

@pytest.mark.parametrize('device, most', [('cpu', rows_module._HOST // 8), ('meta', rows_module._DEVICE // 4)])
def test_small_batches_wait_for_their_statistics(device, most):
    "Small is what there is room for several times."
    def waits(c): return _may_wait(Batch(torch.empty(1, c, device=device), torch.zeros(1, dtype=torch.long, device=device), nn.CrossEntropyLoss(), 1))
    assert waits(most) and not waits(most + 1)


def test_a_batch_without_a_step_has_none():
    rows, (z, y) = RowBuffer(9), (torch.zeros(2, 3), torch.tensor([0, 2]))
    for i, step in enumerate(({}, dict(step=7), {})): rows.add(i, Batch(z, y, nn.CrossEntropyLoss(), 1), **step)
    assert rows.cols()['step'].tolist() == [-1, -1, 7, 7, -1, -1]


def test_rows_without_steps_have_no_such_column():
    rows = RowBuffer(9)
    assert rows.cols() == {}
    rows.add(0, Batch(torch.zeros(2, 3), torch.tensor([0, 2]), nn.CrossEntropyLoss(), 1))
    assert 'step' not in rows.cols()


class Focal(nn.Module):
    "A loss that is no cross-entropy."
    reduction = 'mean'
    def forward(self, pred, targ):
        ce = F.cross_entropy(pred, targ, reduction='none')
        rows = (1 - (-ce).exp()) * ce
        return rows if self.reduction == 'none' else rows.mean()


def test_a_loss_is_tried_once(monkeypatch):
    "Later batches ask it only for their rows."
    z, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1])
    rows, focal = RowBuffer(99), Focal()
    rows.add(0, Batch(z, y, focal, 1), 0)
    for o in rows_module, rowloss: monkeypatch.setattr(o, 'Asked', lambda *args: pytest.fail('it is tried again'))
    for i in 1, 2: rows.add(i, Batch(z, y, focal, 1), i)
    focal.reduction = 'none'
    assert_close(torch.from_numpy(rows.cols()['loss']), focal(z, y).repeat(3), rtol=1e-5, atol=1e-6)
