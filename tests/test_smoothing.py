"Label smoothing by the CPU's kernels: against float64 truth, torch, and itself in threads."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fastai_xent.cpu_kernels import FusedPass
from fastai_xent.losses import XentLoss, XentLossFlat
from fastai_xent.numerics import xent_grad, xent_stats
from fastai_xent.smoothing import smoothed_pass

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

@pytest.mark.parametrize('Loss', [XentLoss, XentLossFlat])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_loss_is_torchs(Loss, reduction, dtype):
    z, y = problem(64, 100)
    y[::7] = 5
    z, other = (z.to(dtype).requires_grad_() for _ in range(2))
    loss_func = Loss(label_smoothing=.1, reduction=reduction, ignore_index=5)
    loss = loss_func(z, y)
    want = F.cross_entropy(other.double(), y, label_smoothing=.1, reduction=reduction, ignore_index=5)
    assert isinstance(getattr(loss_func, 'func', loss_func)._last.done, FusedPass)
    assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    up = torch.rand_like(loss)
    loss.backward(up)
    want.backward(up.double())
    assert_close(z.grad, other.grad)
    for a, b in zip(loss_func.stats, xent_stats(z.detach(), y, None, 5, .1)): assert_close(a, b, equal_nan=True)

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

@pytest.mark.parametrize('what', ['weights', 'axis 0', 'mask', 'transposed', 'few'])
def test_others_are_torchs(what):
    z, y = problem(100, 100)
    loss_func = XentLoss(label_smoothing=.1)
    if what == 'weights': loss_func = XentLoss(torch.rand(100), label_smoothing=.1)
    if what == 'axis 0': loss_func = XentLoss(label_smoothing=.1, axis=0)
    if what == 'mask': z, y = torch.randn(2, 5, 40, 40), torch.randint(0, 5, (2, 40, 40))
    if what == 'transposed': z = z.T
    if what == 'few': z, y = problem(5, 5)
    loss = loss_func(z, y)
    assert loss_func._last.done is None
    want = F.cross_entropy(z.T if what == 'axis 0' else z, y, loss_func.weight, label_smoothing=.1)
    assert_close(loss, want)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 10**6))
def test_any_shape(n, c, eps, seed):
    z, y = problem(n, c, 10., seed=seed)
    done = smoothed_pass(z, y, eps, reduction='mean')
    assert_close(done.loss, F.cross_entropy(z.double(), y, label_smoothing=eps).float(), rtol=1e-5, atol=1e-6)
    assert_close(done.grad * n, xent_grad(z, y, label_smoothing=eps), rtol=1e-4, atol=1e-6)

def test_where_it_does_not_compile_torch_does_it(monkeypatch):
    import fastai_xent.smoothing as smoothing
    monkeypatch.setattr(smoothing, '_compiled', lambda keep: 1 / 0)
    smoothing._kernel.cache_clear()
    z, y = problem(64, 100)
    try:
        with pytest.warns(RuntimeWarning, match='does not compile the label smoothing of fastai_xent'):
            loss = XentLoss(label_smoothing=.1)(z, y)
    finally: smoothing._kernel.cache_clear()
    assert_close(loss, F.cross_entropy(z, y, label_smoothing=.1))
