"The Triton kernel against sums in double precision: compiled where there is a GPU, by Triton's interpreter elsewhere."
import math
import re
import subprocess
import warnings
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip('triton')
interpreter = pytest.importorskip('triton.runtime.interpreter')

from fastai_xent import gpu_kernels
from fastai_xent.gpu_kernels import KernelLoss, bad_target, kernel_loss, usable, xent_forward
from fastai_xent.numerics import XentStats, xent_grad, xent_stats

inf, nan = math.inf, math.nan
DEVICE = torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
F32 = dict(rtol=1e-5, atol=1e-6)
EXACT = dict(rtol=0, atol=0, equal_nan=True)
ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
OPTIONS = {
    'plain': {}, 'weight': dict(weight=True), 'ignored': dict(ignore_index=1), 'smooth': dict(label_smoothing=.1),
    'weight, ignored': dict(weight=True, ignore_index=-1), 'all': dict(weight=True, ignore_index=1, label_smoothing=.3),
    'negative': dict(weight='negative'), 'negative, all': dict(weight='negative', ignore_index=1, label_smoothing=.3),
}
SHAPES = {  # shape of the logits, class axis
    'n c': ((6, 5), 1), 'one row': ((1, 5), 1), 'a row without n': ((5,), 0), 'no row': ((0, 5), 1), 'c 1': ((5, 1), 1), 'c 2': ((9, 2), 1),
    'c a power of two': ((3, 16), 1), 'n d c': ((3, 4, 5), -1), 'n c d': ((3, 5, 4), 1), 'c n d': ((5, 3, 4), 0), 'n c h w': ((2, 5, 3, 6), 1),
    'many rows': ((135, 3), 1), 'many pixels': ((2, 3, 18, 16), 1), 'no pixel': ((2, 3, 0, 4), 1),
}
LIMITS = {'whole': None, 'in pieces': 4}


def problem(shape, axis=1, dtype=torch.float32, weight=False, ignore_index=-100, label_smoothing=0., scale=3., seed=0):
    "Logits, targets and arguments; where rows can be ignored, the first is."
    gen = torch.Generator().manual_seed(seed)
    axis %= len(shape)
    c, rows = shape[axis], [s for i, s in enumerate(shape) if i != axis]
    pred = (torch.randn(shape, generator=gen, dtype=torch.float64) * scale).to(dtype)
    targ = torch.randint(0, c, rows, generator=gen)
    if ignore_index != -100 and targ.numel() > 1: targ.view(-1)[0] = ignore_index
    kw = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    if weight: kw['weight'] = (torch.rand(c, generator=gen) * 2).to(DEVICE)
    if weight == 'negative': kw['weight'][::2] *= -1
    return pred.to(DEVICE), targ.to(DEVICE), kw


def wide(kw): return {k: v.double() if k == 'weight' else v for k, v in kw.items()}


def truth(pred, targ, kw, axis=1, reduction='none', up=None):
    "Loss and gradient of F.cross_entropy in double precision."
    leaf = pred.detach().double().requires_grad_()
    z = leaf.movedim(axis, 1) if leaf.ndim > 1 else leaf
    loss = F.cross_entropy(z, targ.long(), reduction=reduction, **wide(kw))
    return loss.detach(), torch.autograd.grad(loss, leaf, torch.ones_like(loss) if up is None else up.to(loss))[0]


def assert_grad(grad, exact, dtype):
    "Within two units of the last digit of `dtype`, or of float32 arithmetic."
    assert grad.dtype == dtype
    assert_close(grad.double(), exact, rtol=max(2 * ULP[dtype], 1e-5), atol=1e-6 if dtype != torch.float16 else 1e-5)


def assert_stats(stats, exact, **tol):
    for name in XentStats._fields[:-1]:
        got, want = getattr(stats, name), getattr(exact, name)
        assert got.dtype == torch.float32 and got.shape == want.shape
        assert_close(got.double(), want.double(), equal_nan=True, msg=lambda m: f'{name}: {m}', **(tol or F32))
    assert_close(stats.pred, exact.pred)


# -- the forward pass

@pytest.mark.grid
@pytest.mark.parametrize('limit', LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('shape, axis', SHAPES.values(), ids=SHAPES)
def test_against_double(shape, axis, options, limit):
    pred, targ, kw = problem(shape, axis, **options)
    out = xent_forward(pred, targ, axis=axis, limit=limit, **kw)
    if targ.numel():
        loss, grad = truth(pred, targ, kw, axis)
        assert_close(out.rows.double(), loss, **F32)
        assert_grad(out.grad, grad, pred.dtype)
    assert_stats(out.stats, xent_stats(pred.double(), targ, axis=axis, **wide(kw)))
    assert out.grad.shape == pred.shape and out.rows.shape == targ.shape
    assert bad_target(out.found.tolist()) is None


@pytest.mark.parametrize('limit', [None, 256])
@pytest.mark.parametrize('options', [OPTIONS['plain'], OPTIONS['all']], ids=['plain', 'all'])
@pytest.mark.parametrize('dtype', ULP)
@pytest.mark.parametrize('shape', [(5, 1000), (2, 40, 9, 7)])
def test_dtypes(shape, dtype, options, limit):
    pred, targ, kw = problem(shape, dtype=dtype, **options)
    out = xent_forward(pred, targ, limit=limit, **kw)
    loss, grad = truth(pred, targ, kw)
    assert_close(out.rows.double(), loss, **F32)
    assert_grad(out.grad, grad, dtype)
    assert_stats(out.stats, xent_stats(pred.double(), targ, **wide(kw)))


@pytest.mark.parametrize('limit', LIMITS.values(), ids=LIMITS)
def test_wide_range_keeps_its_digits(limit):
    m = torch.linspace(-80, 80, 161, device=DEVICE)
    pred, targ = torch.stack([torch.zeros_like(m), m, torch.full_like(m, -1)], 1), torch.ones(161, dtype=torch.long, device=DEVICE)
    out, exact = xent_forward(pred, targ, limit=limit), xent_stats(pred.double(), targ)
    assert_stats(out.stats, exact, rtol=1e-5, atol=0)
    assert_close(out.grad.double(), xent_grad(pred.double(), targ), rtol=1e-5, atol=0)


@pytest.mark.parametrize('limit', LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize('scale', [0., 1e-20, 1e4, 1e30])
def test_extreme_logits(scale, limit):
    pred, targ, kw = problem((7, 11), scale=scale)
    out = xent_forward(pred, targ, limit=limit)
    assert_stats(out.stats, xent_stats(pred, targ))
    assert_close(out.grad, xent_grad(pred, targ), **F32)


@pytest.mark.parametrize('limit', LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize('row', [
    [-inf, -inf, 2.], [2., -inf, -inf], [-inf, 1., 2.], [0., -inf, 1.], [inf, 0., 1.], [0., inf, 1.], [0., inf, inf], [nan, 0., 1.], [0., nan, 1.],
    [-inf, -inf, -inf], [3e38, -3e38, 0.], [-3e38, 3e38, 3e38], [-3.4028234663852886e38] * 3, [1., 1., 0.], [0., 1., 1.]], ids=str)
def test_edges_are_those_of_numerics(row, limit):
    pred = torch.tensor([row, [0., 1., 2.]], device=DEVICE)
    targ = torch.zeros(2, dtype=torch.long, device=DEVICE)
    out, want = xent_forward(pred, targ, limit=limit), xent_stats(pred, targ)
    assert_stats(out.stats, want)
    assert_close(out.grad, xent_grad(pred, targ), equal_nan=True)
    assert_close(out.rows, want.loss, equal_nan=True)


@pytest.mark.parametrize('limit', LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize('row', [[-inf, 1., 2.], [0., -inf, 1.], [inf, 0., 1.], [nan, 0., 1.]], ids=str)
@pytest.mark.parametrize('weight', [[1., 1., 1.], [0., 1., 1.], [1., 0., 1.]], ids=str)
def test_edges_of_smoothing(row, weight, limit):
    pred, kw = torch.tensor([row], device=DEVICE), dict(weight=torch.tensor(weight, device=DEVICE), label_smoothing=.2)
    targ = torch.zeros(1, dtype=torch.long, device=DEVICE)
    out = xent_forward(pred, targ, limit=limit, **kw)
    assert_stats(out.stats, xent_stats(pred, targ, **kw))
    assert_close(out.grad, xent_grad(pred, targ, **kw), equal_nan=True)


@pytest.mark.parametrize('n, c', [(4, 3), (3, 40)])
def test_ties_go_to_the_smaller_class(n, c):
    pred, targ = torch.zeros(n, c, device=DEVICE), torch.arange(n, device=DEVICE) % c
    for limit in LIMITS.values(): assert xent_forward(pred, targ, limit=limit).stats.pred.tolist() == [0] * n


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_small_integers(dtype):
    pred, targ, _ = problem((6, 5))
    assert_close(xent_forward(pred, targ.to(dtype)).rows, xent_forward(pred, targ).rows, **EXACT)


VIEWS = {
    'channels last': lambda z: z.contiguous(memory_format=torch.channels_last), 'transposed': lambda z: z.transpose(2, 3).contiguous().transpose(2, 3),
    'every second class': lambda z: z.repeat_interleave(2, 1)[:, ::2], 'every second row': lambda z: z.repeat_interleave(2, 2)[:, :, ::2],
    'a window': lambda z: F.pad(z, (1, 3, 2, 0, 1, 1))[:, 1:-1, 2:, 1:-3], 'not at the start': lambda z: torch.cat([z[:1], z])[1:],
}


@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    pred, targ, kw = problem((2, 5, 3, 4), **OPTIONS['all'])
    strided = view(pred)
    assert torch.equal(strided, pred)
    out, want = xent_forward(strided, targ.transpose(1, 2).contiguous().transpose(1, 2), **kw), xent_forward(pred, targ, **kw)
    assert_close(out.grad, want.grad)
    assert_close(out.stats, want.stats, equal_nan=True)


def test_expanded_logits():
    row, targ = torch.tensor([[1., 2., 3.]], device=DEVICE), torch.tensor([0, 1, 2, 1], device=DEVICE)
    assert_close(xent_forward(row.expand(4, 3), targ).grad, xent_grad(row.repeat(4, 1), targ))


def test_dense_views_are_not_copied():
    for z, axis in [(torch.empty(2, 5, 3, 4), 1), (torch.empty(2, 5, 3, 4).to(memory_format=torch.channels_last), 1), (torch.empty(5, 4, 3), 0), (torch.empty(4, 10)[:, :7], 1)]:
        assert gpu_kernels._tiles(z, True, axis, False, 2**14)[0] is z


def test_nothing_unasked():
    pred, targ, kw = problem((6, 5), **OPTIONS['all'])
    for limit in LIMITS.values():
        full = xent_forward(pred, targ, limit=limit, **kw)
        deaf, blind = xent_forward(pred, targ, limit=limit, want_stats=False, **kw), xent_forward(pred, targ, limit=limit, want_grad=False, **kw)
        assert deaf.stats is None and blind.grad is None
        assert_close(deaf.grad, full.grad, **EXACT)
        assert_close(deaf.rows, full.rows, **EXACT)
        assert_close(blind.stats, full.stats, **EXACT)


def test_every_element_is_written(monkeypatch):
    "Fresh memory that holds nan shows what a kernel left out."
    empty = torch.empty_like
    monkeypatch.setattr(torch, 'empty_like', lambda *a, **k: empty(*a, **k).fill_(nan))
    for shape in [(5, 1000), (3, 7), (2, 21, 9, 5)]:
        for limit in (None, 128): assert xent_forward(*problem(shape)[:2], limit=limit).grad.isfinite().all()


# -- targets that are no class

@pytest.mark.parametrize('limit', LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize('bad', [-1, 5, 2**40, -2**40])
@pytest.mark.parametrize('shape', [(9, 5), (3, 5, 2, 2)])
def test_bad_targets(shape, bad, limit):
    pred, targ, _ = problem(shape)
    clean = xent_forward(pred, targ, limit=limit)
    flat = targ.view(-1)
    flat[4], flat[7] = bad, -3
    out = xent_forward(pred, targ, limit=limit)
    assert bad_target(out.found.tolist()) == (4, min(max(bad, -2**31), 2**31 - 1), 2)
    wrong = torch.zeros_like(targ, dtype=torch.bool)
    wrong.view(-1)[[4, 7]] = True
    assert_close(out.rows, clean.rows.masked_fill(wrong, nan), **EXACT)
    assert_close(out.grad, clean.grad.masked_fill(wrong.unsqueeze(1), 0.), **EXACT)
    assert (out.stats.pred[wrong] == -1).all() and out.stats.el2n[wrong].isnan().all()
    assert_close(out.stats.el2n[~wrong], clean.stats.el2n[~wrong], **EXACT)


def test_255_as_ignored_uint8():
    pred, targ, _ = problem((6, 5))
    small = targ.to(torch.uint8)
    small[2] = 255
    out = xent_forward(pred, small, ignore_index=255)
    assert bad_target(out.found.tolist()) is None and out.rows[2] == 0
    assert bad_target(xent_forward(pred, small).found.tolist()) == (2, 255, 1)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_nothing_is_learned_from_a_bad_batch(reduction):
    pred, targ, _ = problem((6, 5))
    pred.requires_grad_()
    targ[3] = 9
    loss = KernelLoss.apply(pred, targ, None, -100, 0., 1, reduction, None)
    assert loss.isnan()
    loss.backward()
    assert_close(pred.grad, torch.zeros_like(pred), **EXACT)


# -- autograd

@pytest.mark.grid
@pytest.mark.parametrize('dtype, limit', [(torch.float32, None), (torch.float32, 4), (torch.float16, 4), (torch.bfloat16, None)])
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('shape', [(6, 5), (2, 5, 3, 4)])
def test_backward(shape, reduction, options, dtype, limit, monkeypatch):
    if limit: monkeypatch.setattr(gpu_kernels, 'LIMIT', limit)
    pred, targ, kw = problem(shape, dtype=dtype, **options)
    leaf = pred.clone().requires_grad_()
    args = kw.get('weight'), kw['ignore_index'], kw['label_smoothing'], 1, reduction, None
    loss = KernelLoss.apply(leaf, targ, *args)
    up = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) + .5
    want, want_grad = truth(pred, targ, kw, reduction=reduction, up=up)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), want, **F32)
    loss.backward(up, retain_graph=True)
    assert_grad(leaf.grad, want_grad, dtype)
    first, leaf.grad = leaf.grad, None
    loss.backward(up)
    assert_close(leaf.grad, first, rtol=2 * ULP[dtype], atol=1e-7)


@pytest.mark.parametrize('up', [1., 1., 65536., 65536., -.3, 0., 1/3, 2., inf, 1.])
def test_any_guess_gives_the_gradient(up):
    "One list of factors from above, one after the other: each meets the guess that the one before has left."
    pred, targ, _ = problem((6, 5))
    leaf = pred.requires_grad_()
    KernelLoss.apply(leaf, targ, None, -100, 0., 1, 'mean', None).backward(torch.tensor(up, device=DEVICE))
    want = truth(pred, targ, {}, reduction='mean')[1] * up
    assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-6 * max(1., up) if up < inf else 0)


def test_guess_does_not_change_a_bit():
    pred, targ, _ = problem((6, 5), dtype=torch.bfloat16)
    leaf, grads = pred.requires_grad_(), []
    for up in [.75, .75, 65536., .75]:
        loss = KernelLoss.apply(leaf, targ, None, -100, 0., 1, 'mean', None)
        grads.append(torch.autograd.grad(loss, leaf, torch.tensor(up, device=DEVICE))[0])
    for g in grads[1:2] + grads[3:]: assert_close(g, grads[0], **EXACT)
    assert_close(gpu_kernels._guess(DEVICE).item(), .5)


def test_right_guess_leaves_the_gradient_alone(monkeypatch):
    pred, targ, _ = problem((6, 5))
    leaf = pred.requires_grad_()
    for _ in range(2):
        seen = []
        monkeypatch.setattr(gpu_kernels, '_rescale', lambda grad, *a, real=gpu_kernels._rescale: (seen.append(grad.clone()), real(grad, *a)))
        (res,) = torch.autograd.grad(KernelLoss.apply(leaf, targ, None, -100, 0., 1, 'mean', None) * 1024, leaf)
        monkeypatch.undo()
    assert_close(seen[0], res, **EXACT)


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_double_backward(reduction, options):
    pred, targ, kw = problem((2, 5, 3), **options)
    def second(loss, leaf):
        g, = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        return torch.autograd.grad(g.square().sum(), leaf)[0]
    leaf, exact = pred.clone().requires_grad_(), pred.double().requires_grad_()
    got = second(KernelLoss.apply(leaf, targ, kw.get('weight'), kw['ignore_index'], kw['label_smoothing'], 1, reduction, None), leaf)
    assert_close(got.double(), second(F.cross_entropy(exact, targ, reduction=reduction, **wide(kw)), exact), **F32)


@pytest.mark.parametrize('shape', [(0, 3), (4, 3), (2, 3, 0)])
def test_nothing_to_average(shape):
    pred, targ, _ = problem(shape)
    leaf = pred.requires_grad_()
    loss = KernelLoss.apply(leaf, targ.fill_(-100), None, -100, 0., 1, 'mean', None)
    loss.backward()
    assert loss.item() == 0 and not leaf.grad.any()


def test_weights_of_zero_average_to_zero():
    pred, targ, _ = problem((6, 5))
    loss = KernelLoss.apply(pred.requires_grad_(), targ, torch.zeros(5, device=DEVICE), -100, 0., 1, 'mean', None)
    loss.backward()
    assert loss.item() == 0 and not pred.grad.any()


def test_more_rows_than_counters(monkeypatch):
    monkeypatch.setattr(gpu_kernels, '_PARTS', 4)
    n = 1024 * 9 + 77
    targ = torch.arange(n, device=DEVICE) % 3
    pred = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    loss = KernelLoss.apply(pred, targ, torch.tensor([1., 3.], device=DEVICE), 2, 0., 1, 'mean', None)
    assert_close(loss.double(), F.cross_entropy(pred.double(), targ, weight=torch.tensor([1., 3.], device=DEVICE).double(), ignore_index=2), rtol=1e-5, atol=0)


def test_no_graph_no_gradient(monkeypatch):
    pred, targ, _ = problem((6, 5))
    asked = []
    monkeypatch.setattr(gpu_kernels, '_pass', lambda *a, real=gpu_kernels._pass: (asked.append(a[7]), real(*a))[1])
    with torch.no_grad(): KernelLoss.apply(pred.clone().requires_grad_(), targ, None, -100, 0., 1, 'mean', None)
    KernelLoss.apply(pred, targ, None, -100, 0., 1, 'mean', None)
    KernelLoss.apply(pred.clone().requires_grad_(), targ, None, -100, 0., 1, 'mean', None)
    assert asked[1:] == [False, True]


def test_facts():
    pred, targ, kw = problem((6, 5), **OPTIONS['all'])
    facts, plain = {'stats': None}, {}
    args = kw['weight'], kw['ignore_index'], kw['label_smoothing'], 1, 'mean'
    losses = [KernelLoss.apply(pred, targ, *args, o) for o in (facts, plain, None)]
    for o in losses[1:]: assert_close(o, losses[0], **EXACT)
    assert_stats(facts['stats'], xent_stats(pred.double(), targ, **wide(kw)))
    assert set(plain) == {'found'} and not facts['stats'].loss.requires_grad


# -- which way

def test_usable():
    z = torch.zeros(2, 3, device=DEVICE)
    assert usable(z) == z.is_cuda
    assert usable(z, True) and usable(z.half(), True) and usable(z.bfloat16(), True) and not usable(z.double(), True)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(gpu_kernels, 'find_spec', lambda name: None)
    assert not usable(torch.zeros(2, 3), True)


def test_failure_warns_once(monkeypatch):
    pred, targ, _ = problem((6, 5))
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device('meta'))
    def broken(*a): raise RuntimeError('no compiler')
    monkeypatch.setattr(gpu_kernels, '_try', broken)
    monkeypatch.setattr(gpu_kernels, '_broken', set())
    with pytest.warns(RuntimeWarning, match='does not run on meta.*RuntimeError: no compiler'): assert kernel_loss(on_gpu, targ) is None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert kernel_loss(on_gpu, targ) is None
    monkeypatch.setattr(KernelLoss, 'apply', broken)
    with pytest.raises(RuntimeError, match='no compiler'): kernel_loss(pred, targ, always=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_small_problem_is_solved(dtype):
    gpu_kernels._try.__wrapped__(torch.device(DEVICE), dtype)


@pytest.mark.parametrize('wrong', ['loss', 'grad', *XentStats._fields])
def test_a_wrong_answer_to_the_small_problem_is_noticed(monkeypatch, wrong):
    real = gpu_kernels._pass
    def spoilt(*args, **kw):
        out = real(*args, **kw)
        if wrong == 'loss' : return out._replace(rows=out.rows * 1.01)
        if wrong == 'grad': return out._replace(grad=out.grad * 1.01)
        return out._replace(stats=out.stats._replace(**{wrong: getattr(out.stats, wrong) + 1}))
    monkeypatch.setattr(gpu_kernels, '_pass', spoilt)
    with pytest.raises(ArithmeticError, match='answers to a small problem are wrong'): gpu_kernels._try.__wrapped__(torch.device(DEVICE), torch.float32)


def test_memory_runs_out_loudly(monkeypatch):
    def full(*a): raise torch.OutOfMemoryError('full')
    monkeypatch.setattr(gpu_kernels, '_try', full)
    with pytest.raises(torch.OutOfMemoryError): kernel_loss(SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device('meta')), None)


def test_the_process_is_not_interpreted():
    "Triton as others use it stays a compiler."
    import triton
    import triton.language as tl
    if not hasattr(interpreter, '_LangPatchScope'): pytest.skip('this Triton leaves its language changed after interpreting')
    before = tl.load, tl.reduce, tl.tensor.__add__
    xent_forward(*problem((6, 5))[:2])
    assert (tl.load, tl.reduce, tl.tensor.__add__) == before
    assert type(triton.jit(gpu_kernels._rescale_kernel)).__name__ == 'JITFunction'


def test_refusals():
    targ = torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match='float64, expected float32, bfloat16 or float16'): xent_forward(torch.zeros(2, 3).double(), targ)
    with pytest.raises(TypeError, match='targ holds probabilities'): xent_forward(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match='weight has shape'): xent_forward(torch.zeros(2, 3), targ, weight=torch.ones(2))
    with pytest.raises(ValueError, match='label_smoothing is 2'): xent_forward(torch.zeros(2, 3), targ, label_smoothing=2)


# -- the compiler, for a GPU that is not here

COMPILED = {
    'rows': ((64, 1000), torch.float32, {}), 'rows, bfloat16, all': ((64, 1000), torch.bfloat16, dict(weight=True, label_smoothing=.1)),
    'wide rows': ((4, 128256), torch.bfloat16, {}), 'wide rows, all': ((4, 20000), torch.float32, dict(weight=True, label_smoothing=.1)),
    'masks': ((2, 21, 64, 64), torch.float32, {}), 'many pixels': ((2, 21, 512, 512), torch.float16, {}), 'one': ((1, 1), torch.float32, {}),
}
FEW = 'rows, bfloat16, all', 'many pixels', 'one'  # each of the others takes seconds and says little more


def stack(cubin):
    "Bytes of stack that ptxas reports for the kernel: variables for which there was no register."
    import triton.backends.nvidia as nvidia
    tool = Path(nvidia.__file__).parent/'bin'/'cuobjdump'
    if not tool.exists(): return 0
    with NamedTemporaryFile(suffix='.cubin') as f:
        f.write(cubin)
        f.flush()
        out = subprocess.run([tool, '-res-usage', f.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r'STACK:(\d+)', out)[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason='compiled kernels are tested by running them')
@pytest.mark.parametrize('name', [pytest.param(o, marks=[pytest.mark.slow] * (o not in FEW)) for o in COMPILED])
def test_compiles(name, monkeypatch, tmp_path):
    "Triton takes the kernels, and ptxas puts every variable into a register (with Triton 3.8, all but one in one of them)."
    if not hasattr(interpreter, '_LangPatchScope'): pytest.skip('this Triton leaves its language changed after interpreting')
    import triton
    compiler, driver = pytest.importorskip('triton.backends.compiler'), pytest.importorskip('triton.runtime.driver').driver
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    shape, dtype, options = COMPILED[name]
    target = compiler.GPUTarget('cuda', 90, 32)
    built = []
    def build(fn, programs, x, *args, num_warps=4, **kw):
        built.append(triton.jit(fn).warmup(*args, grid=(programs,), num_warps=num_warps, enable_fp_fusion=False, **kw))
    pred, targ, kw = problem(shape, dtype=dtype, **options)
    there = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target)
    monkeypatch.setattr(driver, '_active' if hasattr(driver, '_active') else 'active', there)
    monkeypatch.setattr(gpu_kernels, '_launch', build)
    args = pred, targ, kw.get('weight'), -100, kw['label_smoothing'], 1
    out = gpu_kernels._pass(*args, 'mean', True, True)
    gpu_kernels._rescale(out.grad, torch.ones(()), out.used, out.found)
    assert len(built) == 3
    most = 8 if triton.__version__.startswith('3.8.') and shape[-1] == 512 else 0     # bytes
    assert all(stack(k.asm['cubin']) <= most for k in built)
    if pred.shape[0] == 2: return                     # the other variants differ no more with the shape
    gpu_kernels._pass(*args, 'sum', True, False)
    gpu_kernels._pass(*args, 'none', False, True)
    gpu_kernels._pass(*args, 'none', False, False)
    assert len(built) == 7


# -- on a GPU alone

@gpu
@pytest.mark.parametrize('options', [{}, OPTIONS['all']], ids=['plain', 'all'])
@pytest.mark.parametrize('dtype', ULP)
@pytest.mark.parametrize('shape', [(2048, 1000), (512, 32000), (64, 128256), (256, 50257), (8, 21, 96, 96), (4, 21, 512, 512), (64, 10)], ids=str)
def test_on_gpu(shape, dtype, options):
    pred, targ, kw = problem(shape, dtype=dtype, **options)
    leaf, facts = pred.clone().requires_grad_(), {'stats': None}
    loss = KernelLoss.apply(leaf, targ, kw.get('weight'), kw['ignore_index'], kw['label_smoothing'], 1, 'mean', facts)
    loss.backward()
    want, grad = truth(pred, targ, kw, reduction='mean')
    assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    n = max(int((targ != kw['ignore_index']).sum()), 1)
    assert_close(leaf.grad.double() * n, grad * n, rtol=max(2 * ULP[dtype], 1e-5), atol=1e-6 if dtype != torch.float16 else n * 2.**-24)
    exact = xent_stats(pred.double(), targ, **wide(kw))
    assert_stats(facts['stats'], exact, rtol=2e-5, atol=1e-6)
    torch.cuda.empty_cache()


@gpu
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_the_host_never_waits(reduction):
    pred, targ, kw = problem((64, 1000), **OPTIONS['all'])
    leaf = pred.requires_grad_()
    def step():
        loss = kernel_loss(leaf, targ, kw['weight'], kw['ignore_index'], kw['label_smoothing'], 1, reduction, {'stats': None})
        loss.sum().backward()
    step()                                            # compiles
    torch.cuda.set_sync_debug_mode('error')
    try: step()
    finally: torch.cuda.set_sync_debug_mode('default')


@gpu
def test_memory_is_the_gradient():
    pred, targ, _ = problem((4096, 8192), dtype=torch.bfloat16)
    leaf = pred.requires_grad_()
    for _ in range(2):
        leaf.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        KernelLoss.apply(leaf, targ, None, -100, 0., 1, 'mean', {'stats': None}).backward()
    assert torch.cuda.max_memory_allocated() - before < pred.nbytes * 1.05


@gpu
def test_more_logits_than_32_bits_count():
    n, c = 70000, 32000
    pred = torch.empty(n, c, dtype=torch.bfloat16, device=DEVICE).normal_()
    targ = torch.randint(0, c, (n,), device=DEVICE)
    out = xent_forward(pred, targ)
    for rows in (slice(0, 8), slice(n - 8, n)):
        assert_close(out.rows[rows], F.cross_entropy(pred[rows].float(), targ[rows], reduction='none'), rtol=1e-5, atol=1e-6)
        assert_grad(out.grad[rows], xent_grad(pred[rows].double(), targ[rows]), torch.bfloat16)


@gpu
def test_same_bits_each_time():
    pred, targ, kw = problem((512, 1000), **OPTIONS['all'])
    a, b = (xent_forward(pred, targ, **kw) for _ in range(2))
    assert_close(a.grad, b.grad, **EXACT)
    assert_close(a.stats, b.stats, **EXACT)
