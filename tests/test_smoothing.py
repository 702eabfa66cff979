"Label smoothing and shares as targets by the CPU's kernels: against float64 truth, torch, and itself in threads."
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fastai_xent.batch import read_batch
from fastai_xent.cpu_kernels import FusedPass
from fastai_xent.losses import XentLoss, XentLossFlat
from fastai_xent.numerics import xent_grad, xent_stats
from fastai_xent.rows import RowBuffer
from fastai_xent.smoothing import fused_stats, smoothed_pass

inf = float('inf')
def problem(n, c, scale=4., dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, generator=gen, dtype=dtype) * scale, torch.randint(0, c, (n,), generator=gen)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('eps', [1e-3, .1, .5, 1.])
@pytest.mark.parametrize('n, c, scale', [(64, 100, 1), (7, 1, 1), (9, 2, 30), (3, 5000, 10), (40, 300, 100)])
def test_against_float64(n, c, scale, eps, dtype):
    z, y = problem(n, c, scale, dtype)
    y[0] = -100
    done = smoothed_pass(z, y, eps)
    want = xent_stats(z.double(), y, label_smoothing=eps)
    for name, a, b in zip(want._fields, done.stats(y.shape), want):
        assert_close(a, b.to(a.dtype), equal_nan=True, msg=lambda s, name=name: f'{name}: {s}')
    assert_close(done.grad, xent_grad(z.double(), y, label_smoothing=eps).to(dtype))

def test_a_row_at_its_optimum():
    "There p is the target: a norm from sums of squares would be rounding alone."
    c, eps = 100, .1
    t = torch.full((50, c), eps / c, dtype=torch.float64)
    y = torch.arange(50)
    t[y, y] += 1 - eps
    done = smoothed_pass(t.log().float(), y, eps)
    assert done.facts[1].max() < 2e-7

@pytest.mark.parametrize('row, k', [([inf, 0., 1.], 1), ([-inf, 0., 1.], 0), ([-inf, 0., 1.], 1), ([float('nan'), 0., 1.], 1),
                                    ([-inf, -inf, 0.], 2), ([3e38, -3e38, 0.], 1)])
def test_what_is_not_finite(row, k):
    z, y = torch.tensor([row, [1., 2., 3.]]), torch.tensor([k, 0])
    done, want = smoothed_pass(z, y, .2), xent_stats(z.double(), y, label_smoothing=.2)
    for name, a, b in zip(want._fields, done.stats(y.shape), want):
        assert_close(a[1:], b[1:].to(a.dtype))
        if name == 'loss': assert_close(a, b.float(), equal_nan=True)

def same_as_torch(loss_func, z, targ, kw, stats):
    "The kernel's loss, its gradient from any factors, and the rows' statistics."
    z, other = (z.clone().requires_grad_() for _ in range(2))
    loss = loss_func(z, targ)
    exact = targ.double() if targ.is_floating_point() else targ
    want = F.cross_entropy(other.double(), exact, **kw)
    assert isinstance(getattr(loss_func, 'func', loss_func)._last.done, FusedPass)
    assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    up = torch.rand_like(loss)
    loss.backward(up)
    want.backward(up.double())
    assert_close(z.grad, other.grad)
    assert loss_func.stats.loss.shape == z.shape[:1]
    for a, b in zip(loss_func.stats, stats): assert_close(a, b, equal_nan=True)

@pytest.mark.parametrize('Loss', [XentLoss, XentLossFlat])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_loss_is_torchs(Loss, reduction, dtype):
    z, y = problem(64, 100)
    y[::7] = 5
    same_as_torch(Loss(label_smoothing=.1, reduction=reduction, ignore_index=5), z.to(dtype), y,
                  dict(label_smoothing=.1, reduction=reduction, ignore_index=5), xent_stats(z.to(dtype), y, None, 5, .1))

def test_second_derivative():
    z, y = problem(64, 70, dtype=torch.float64)
    z, other = (z.clone().requires_grad_() for _ in range(2))
    grads = []
    for f, x in ((XentLoss(label_smoothing=.3), z), (lambda x, y: F.cross_entropy(x, y, label_smoothing=.3), other)):
        g, = torch.autograd.grad(f(x, y), x, create_graph=True)
        grads.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert_close(*grads)

def test_threads_change_no_bit(monkeypatch):
    z, y = problem(700, 1000)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, 'get_num_threads', lambda n=threads: n)
        done = smoothed_pass(z, y, .1, reduction='mean')
        found.append([done.loss, done.grad, torch.tensor(done.facts)])
    for a, b in zip(*found): assert torch.equal(a, b)

def test_without_a_gradient_none_is_kept():
    z, y = problem(64, 100)
    loss_func = XentLoss(label_smoothing=.1)
    loss_func(z, y)
    assert loss_func._last.done.grad is None

SHAPES = {'rows': ((40, 30), 1), 'axis 0': ((30, 40), 0), 'mask': ((2, 5, 9, 13), 1), 'classes last': ((2, 9, 13, 5), 3), 'bare': ((6,), 0), 'no rows': ((0, 4), 1), 'one class': ((9, 1), 1)}
KINDS = 'smooth', 'soft', 'both'

def odd_problem(shape, axis, kind, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=gen, dtype=torch.float64).mul(4).to(dtype)
    rows = [o for i, o in enumerate(shape) if i != axis]
    y = torch.randint(0, shape[axis], rows, generator=gen)
    if kind == 'smooth': y = y.masked_fill(torch.rand(rows, generator=gen) < .2, -100)
    else: y = torch.randn(shape, generator=gen, dtype=torch.float64).mul(2).softmax(axis).to(dtype)
    return z, y, {} if kind == 'soft' else dict(label_smoothing=.1)

@pytest.mark.grid
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('weight', [None, 1., -1.], ids=['unweighted', 'weights', 'some negative'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shape, axis', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_every_layout_and_weights(reduction, shape, axis, kind, weight, dtype):
    "Loss and gradient against torch's in float64, statistics against those of `xent_stats`."
    z, y, kw = odd_problem(shape, axis, kind, dtype)
    w = None if weight is None else torch.linspace(weight, 2, shape[axis])
    leaf, true = z.clone().requires_grad_(), z.double().requires_grad_()
    func = XentLoss(w, axis=axis, reduction=reduction, **kw)
    loss = func(leaf, y)
    assert (func._last.done is None) == (z.ndim > 2)          # by the kernel; where torch is faster, that has the statistics alone
    wide = y.double() if y.is_floating_point() else y
    at = (lambda t: t.movedim(axis, 1) if t.ndim > 1 else t)
    want = F.cross_entropy(at(true), at(wide) if y.is_floating_point() else wide, None if w is None else w.double(), reduction=reduction, **kw)
    if reduction == 'mean' and (not z.numel() or kind == 'smooth' and (y == -100).all()): want = 0 * true.sum()
    tol = dict(rtol=1e-4, atol=2e-6) if dtype == torch.float32 else dict(rtol=1e-10, atol=1e-12)
    assert_close(loss.double(), want, **tol)
    if reduction != 'none' and z.numel():
        loss.backward(), want.backward()
        assert_close(leaf.grad.double(), true.grad, **tol)
    if z.ndim > 2: assert_close(smoothed_pass(z, y, kw.get('label_smoothing', 0.), weight=w, axis=axis).grad.double(), xent_grad(z.double(), wide, w, axis=axis, **kw), **tol)
    exact = xent_stats(z.double(), wide, w, axis=axis, **kw)
    for name, a, b in zip(exact._fields, func.stats, exact): assert_close(a.to(b.dtype), b, equal_nan=True, msg=lambda m: f'{name}: {m}', **tol)

@pytest.mark.grid
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('weight', [None, 1., -1.], ids=['unweighted', 'weights', 'some negative'])
@pytest.mark.parametrize('eps', [0., .1, 1.])
@pytest.mark.parametrize('n, c', [(40, 7), (9, 33), (3, 1), (5, 3000)])
def test_mixed_labels(n, c, eps, weight, dtype):
    "As MixUp does: the same label twice, the other's ignored, all or nothing of one's own."
    z, y, _ = odd_problem((n, c), 1, 'both', dtype)
    gen = torch.Generator().manual_seed(2)
    y, other, lam = torch.randint(0, c, (n,), generator=gen), torch.randint(0, c, (n,), generator=gen), torch.rand(n, generator=gen)
    other[0], lam[1], lam[2] = -100, 0., 1.
    if n > 4: other[3] = y[3]
    w = None if weight is None else torch.linspace(weight, 2, c)
    done = smoothed_pass(z, y, eps, weight=w, mix=(other, lam))
    exact = xent_stats(z.double(), y, w, label_smoothing=eps, mix=(other, lam.double()))
    tol = dict(rtol=1e-4, atol=2e-6) if dtype == torch.float32 else dict(rtol=1e-6, atol=1e-7)         # λ is a float32
    for name, a, b in zip(exact._fields, done.stats(y.shape), exact): assert_close(a.to(b.dtype), b, msg=lambda m: f'{name}: {m}', **tol)
    assert_close(fused_stats(z, y, w, label_smoothing=eps, mix=(other, lam)), done.stats(y.shape))

def test_mixed_rows_without_a_label_are_torchs():
    z, y, lam = torch.randn(4, 3), torch.tensor([0, -100, 2, 1]), torch.full((4,), .7)
    mix = y.flip(0), lam
    assert_close(fused_stats(z, y, mix=mix), xent_stats(z, y, mix=mix), equal_nan=True)

def test_weights_on_another_device_are_no_kernel_s():
    z, y, w = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.ones(3, device='meta')
    for kw in ({}, dict(label_smoothing=.1)):
        with pytest.raises((RuntimeError, NotImplementedError)): fused_stats(z, y, w, **kw)

def test_a_mixed_target_that_is_no_class_is_named():
    z, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(IndexError, match=r'targ\[2\] is 3, expected a class from 0 to 2'): fused_stats(z, y, mix=(torch.tensor([0, 1, 3, 0]), torch.ones(4)))

@pytest.mark.parametrize('kw', [{}, dict(weight=torch.ones(3))], ids=['plain', 'weights'])
def test_a_target_that_is_no_class_is_named_by_its_place(kw):
    y = torch.zeros(2, 4, dtype=torch.long)
    y[1, 2] = 5
    with pytest.raises(IndexError, match=r'targ\[1, 2\] is 5, expected a class from 0 to 2'): XentLoss(label_smoothing=.1, **kw)(torch.zeros(2, 3, 4), y)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 10**6))
def test_any_shape(n, c, eps, seed):
    z, y = problem(n, c, 10., seed=seed)
    done = smoothed_pass(z, y, eps, reduction='mean')
    assert_close(done.loss, F.cross_entropy(z.double(), y, label_smoothing=eps).float(), rtol=1e-5, atol=1e-6)
    assert_close(done.grad * n, xent_grad(z, y, label_smoothing=eps), rtol=1e-4, atol=1e-6)

def test_where_it_does_not_compile_torch_does_it(monkeypatch):
    from fastai_xent import cpu_kernels, smoothing
    monkeypatch.setattr(cpu_kernels, 'build', lambda code: 1 / 0)
    smoothing._kernel.cache_clear()
    z, y = problem(64, 100)
    try:
        with pytest.warns(RuntimeWarning, match='does not make the label smoothing of fastai_xent'):
            loss = XentLoss(label_smoothing=.1)(z, y)
    finally: smoothing._kernel.cache_clear()
    assert_close(loss, F.cross_entropy(z, y, label_smoothing=.1))

# -- targets that are shares

def shares(n, c, kind='soft', dtype=torch.float32, seed=1):
    "Probabilities of the classes: a teacher's; of votes, many of them none, which add up to 1.3; or one class alone."
    gen = torch.Generator().manual_seed(seed)
    if kind == 'one': return F.one_hot(torch.randint(0, c, (n,), generator=gen), c).to(dtype)
    if kind == 'soft': return (torch.randn(n, c, generator=gen, dtype=dtype) * 3).softmax(1)
    votes = torch.randint(-2, 3, (n, c), generator=gen).clamp_min(0).to(dtype)
    votes[:, 0] += 1
    return votes / votes.sum(1, keepdim=True) * 1.3

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('eps', [0., .1, 1.])
@pytest.mark.parametrize('kind', ['soft', 'votes', 'one'])
@pytest.mark.parametrize('n, c, scale', [(64, 100, 1), (7, 1, 1), (9, 2, 30), (3, 5000, 10), (40, 300, 100)])
def test_shares_against_float64(n, c, scale, kind, eps, dtype):
    z, t = problem(n, c, scale, dtype)[0], shares(n, c, kind, dtype)
    done, want = smoothed_pass(z, t, eps), xent_stats(z.double(), t.double(), label_smoothing=eps)
    for name, a, b in zip(want._fields, done.stats((n,)), want):
        assert_close(a, b.to(a.dtype), msg=lambda s, name=name: f'{name}: {s}')
    assert_close(done.grad, xent_grad(z.double(), t.double(), label_smoothing=eps).to(dtype))
    assert_close(torch.tensor(done.ints[1]), t.argmax(1))

@pytest.mark.parametrize('sure', [20, 40, 80])
def test_shares_where_the_label_is_certain(sure):
    "p − t and the loss are tiny there; no digit is lost."
    z, y = torch.zeros(50, 100), torch.full((50,), 3)
    z[:, 3] = sure
    done, want = smoothed_pass(z, F.one_hot(y, 100).float()), xent_stats(z.double(), y)
    assert_close(done.stats((50,)).loss.double(), want.loss, rtol=2e-5, atol=0)
    assert_close(done.grad.double(), xent_grad(z.double(), y), rtol=2e-5, atol=0)

def test_shares_at_their_optimum():
    t = shares(50, 300)
    assert smoothed_pass(t.double().log().float(), t).facts[1].max() < 3e-7

@pytest.mark.parametrize('row, t', [([inf, 0., 1.], [.2, .5, .3]), ([-inf, 0., 1.], [.6, .2, .2]), ([-inf, 0., 1.], [0., .5, .5]),
                                    ([float('nan'), 0., 1.], [.2, .5, .3]), ([-inf, -inf, 0.], [0., 0., 1.]), ([3e38, -3e38, 0.], [0., 1., 0.]),
                                    ([1., 2., 3.], [.2, float('nan'), .3]), ([1., 2., 3.], [0., 0., 0.]), ([1., 2., 3.], [-.5, 1., .5])])
def test_shares_that_are_not_finite_or_none(row, t):
    z, t = torch.tensor([row, [1., 2., 3.]]), torch.tensor([t, [.5, .3, .2]])
    done, want = smoothed_pass(z, t), xent_stats(z.double(), t.double())
    for name, a, b in zip(want._fields, done.stats((2,)), want):
        assert_close(a[1:], b[1:].to(a.dtype))
        if name == 'loss': assert_close(a, b.float(), equal_nan=True)

@pytest.mark.parametrize('Loss', [XentLoss, XentLossFlat])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('eps', [0., .2])
def test_the_loss_of_shares_is_torchs(Loss, reduction, dtype, eps):
    z, t = problem(64, 100)[0].to(dtype), shares(64, 100)
    same_as_torch(Loss(reduction=reduction, label_smoothing=eps, ignore_index=5), z, t,
                  dict(reduction=reduction, label_smoothing=eps), xent_stats(z, t, label_smoothing=eps))

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('eps', [0., .3])
def test_second_derivative_with_shares(reduction, eps):
    t = shares(64, 70, dtype=torch.float64)
    z, other = (problem(64, 70, dtype=torch.float64)[0].requires_grad_() for _ in range(2))
    grads, kw = [], dict(reduction=reduction, label_smoothing=eps)
    for f, x in ((XentLoss(**kw), z), (lambda x, y: F.cross_entropy(x, y, **kw), other)):
        g, = torch.autograd.grad(f(x, t).square().sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert_close(*grads)

def test_shares_that_were_changed_have_no_second_derivative():
    z, t = problem(64, 70)[0].requires_grad_(), shares(64, 70)
    loss = XentLoss()(z, t)
    t += 0
    with pytest.raises(RuntimeError, match='were changed in place'): torch.autograd.grad(loss, z, create_graph=True)

def test_shares_twice_through_one_graph():
    z, t = problem(64, 70)[0].requires_grad_(), shares(64, 70)
    loss = XentLoss()(z, t)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(z.grad, 2 * xent_grad(z, t) / 64)

@pytest.mark.parametrize('what', ['transposed', 'shares transposed', 'every other', 'shares with a gradient'])
def test_shares_in_any_memory(what):
    z, t = problem(100, 100)[0], shares(100, 100)
    if what == 'transposed': z = z.T
    if what == 'shares transposed': t = t.T.contiguous().T
    if what == 'every other': z, t = z[::2], shares(50, 200)[:, ::2]
    if what == 'shares with a gradient': t.requires_grad_()
    loss_func = XentLoss()
    loss = loss_func(z, t)
    assert (loss_func._last.done is None) == t.requires_grad      # these are torch's
    assert_close(loss, F.cross_entropy(z, t))
    if t.requires_grad: assert torch.autograd.grad(loss, t)[0].abs().sum() > 0

def test_threads_change_no_bit_of_shares(monkeypatch):
    z, t, found = problem(700, 1000)[0], shares(700, 1000), []
    for threads in (1, 3):
        monkeypatch.setattr(torch, 'get_num_threads', lambda n=threads: n)
        done = smoothed_pass(z, t, reduction='mean')
        found.append([done.loss, done.grad, torch.tensor(done.facts)])
    for a, b in zip(*found): assert torch.equal(a, b)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.floats(0, 1), st.sampled_from(['soft', 'votes', 'one']), st.integers(0, 10**6))
def test_shares_of_any_shape(n, c, eps, kind, seed):
    z, t = problem(n, c, 10., seed=seed)[0], shares(n, c, kind, seed=seed)
    done = smoothed_pass(z, t, eps, reduction='mean')
    assert_close(done.loss, F.cross_entropy(z.double(), t.double(), label_smoothing=eps).float(), rtol=1e-5, atol=1e-6)
    assert_close(done.grad * n, xent_grad(z, t, label_smoothing=eps), rtol=1e-4, atol=1e-6)

def test_where_shares_do_not_compile_torch_does_them(monkeypatch):
    from fastai_xent import cpu_kernels, smoothing
    monkeypatch.setattr(cpu_kernels, 'build', lambda code: 1 / 0)
    smoothing._kernel.cache_clear()
    z, t = problem(64, 100)[0], shares(64, 100)
    try:
        with pytest.warns(RuntimeWarning, match='does not make the loss of probabilities of fastai_xent'): loss = XentLoss()(z, t)
    finally: smoothing._kernel.cache_clear()
    assert_close(loss, F.cross_entropy(z, t))

@pytest.mark.parametrize('n, c', [(64, 100), (16, 10)], ids=['large', 'small'])
@pytest.mark.parametrize('make', [XentLossFlat, torch.nn.CrossEntropyLoss])
def test_shares_in_the_rows_of_a_pass(make, n, c):
    "The label is the class with the largest share, and the losses add up."
    loss_func, rows = make(), RowBuffer(3 * n)
    for i in range(3):
        z, t = problem(n, c, seed=i)[0], shares(n, c, seed=i)
        rows.add(i, read_batch(SimpleNamespace(pred=z, yb=(t,), loss_func=loss_func, loss=loss_func(z, t))), i)
    cols = rows.cols()
    for i in range(3):
        z, t, at = problem(n, c, seed=i)[0], shares(n, c, seed=i), slice(i * n, i * n + n)
        for name, want in zip(xent_stats(z, t)._fields, xent_stats(z, t)): assert_close(torch.tensor(cols[name][at]), want.to(torch.tensor(cols[name]).dtype))
        assert (cols['targ'][at] == t.argmax(1).numpy()).all()
    assert not rows.balance().differ.any()

def test_shares_may_be_the_first_loss_of_a_process():
    code = ("import torch, warnings; warnings.simplefilter('error', RuntimeWarning); from fastai_xent.losses import XentLoss; f = XentLoss()\n"
            "f(torch.zeros(64, 100), torch.full((64, 100), .01)); assert f._last.done is not None")
    subprocess.run([sys.executable, '-c', code], check=True)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('n, c', [(64, 100), (6, 5)], ids=['large', 'small'])
def test_a_class_without_a_share_may_be_impossible(n, c, reduction):
    "Large and small batches agree: its logit is −∞, and adds nothing."
    z, t = problem(n, c)[0], shares(n, c)
    z[:, 1], t[:, 1] = -inf, 0
    z.requires_grad_()
    loss, want = XentLoss(reduction=reduction)(z, t), xent_stats(z.detach(), t).loss
    assert_close(loss.detach(), want if reduction == 'none' else getattr(want, reduction)())
    loss.sum().backward()
    assert_close(z.grad, xent_grad(z.detach(), t) / (n if reduction == 'mean' else 1))

def test_a_loss_of_nan_has_no_gradient():
    "As torch has it, so that whoever looks for it finds it."
    z, t = problem(64, 100)[0], shares(64, 100)
    z[0, 0], t[1, 0] = inf, float('nan')
    z, other = (z.clone().requires_grad_() for _ in range(2))
    for f, x in ((XentLoss(reduction='none'), z), (lambda z, t: F.cross_entropy(z, t, reduction='none'), other)): f(x, t).sum().backward()
    assert z.grad[:2].isnan().all()
    assert_close(z.grad, other.grad, equal_nan=True)

@pytest.mark.parametrize('c, near', [(1000, .01), (100_000, .01), (100_000, .001)])
def test_shares_of_a_student_near_its_teacher(c, near):
    "Many shares, none of them large: the gradient has the digits that torch's has."
    gen = torch.Generator().manual_seed(0)
    t = torch.randn(4, c, generator=gen).softmax(1)
    z = t.log() + near * torch.randn(4, c, generator=gen)
    want, done = xent_grad(z.double(), t.double()), smoothed_pass(z, t)
    other = z.clone().requires_grad_()
    F.cross_entropy(other, t, reduction='sum').backward()
    error = lambda g: (g.double() - want).abs().max()
    assert error(done.grad) <= 2 * error(other.grad)

def test_numbers_with_the_negative_bit():
    z, t = problem(64, 100)[0], shares(64, 100)
    y = t.argmax(1)
    for f in (XentLoss(), XentLoss(label_smoothing=.1)):
        for a, b in ((torch._neg_view(-z), t), (z, torch._neg_view(-t)), (torch._neg_view(-z), y)): assert_close(f(a, b), f(z, b.resolve_neg()))
