"linear_xent against the way with logits in double precision, and Learners with the head in the loss against the same without."
import copy
import io
import math
import pickle
import warnings
from itertools import product

import fastai.callback.all  # noqa: F401 (it gives Learner its one-cycle fit)
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import DataLoaders, Learner, TfmdDL, accuracy, load_learner
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import rnn_cbs
from fastai.callback.training import GradientAccumulation
from fastai.layers import LinBnDrop
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from fastai.text.models.core import get_language_model
from fastai.torch_core import TensorCategory, TensorImage, set_seed
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18

from fastai_xent import linear
from fastai_xent.linear import Features, HeadInLoss, LinearXentLossFlat, head_in_loss, linear_xent
from fastai_xent.losses import XentLossFlat
from fastai_xent.numerics import xent_stats

EXACT = dict(rtol=0, atol=0)
F64 = dict(rtol=1e-12, atol=1e-14)
F32 = dict(rtol=1e-5, atol=1e-6)
N, C, D = 11, 7, 5

OPTIONS = {
    'plain': {}, 'no bias': dict(bias=False), 'weight': dict(weight=True), 'ignore_index': dict(ignore_index=1), 'smooth': dict(label_smoothing=.1),
    'weight and ignore_index': dict(weight=True, ignore_index=-1), 'everything': dict(weight=True, ignore_index=1, label_smoothing=.3),
    'negative weight': dict(weight='negative'), 'negative weight, smooth': dict(weight='negative', ignore_index=1, label_smoothing=.3),
}
each_option = pytest.mark.parametrize('option', OPTIONS.values(), ids=OPTIONS.keys())
each_reduction = pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])


def problem(rows=(N,), bias=True, weight=False, ignore_index=-100, label_smoothing=0., dtype=torch.float64, scale=2., seed=0):
    "Features, head and targets; where rows can be ignored, the first is, and the last is not."
    gen = torch.Generator().manual_seed(seed)
    h, W, b = ((torch.randn(*s, generator=gen, dtype=torch.float64) * k).to(dtype).requires_grad_() for s, k in (((*rows, D), scale), ((C, D), 1), ((C,), 1)))
    targ = torch.randint(0, C, rows, generator=gen)
    if ignore_index != -100: targ.view(-1)[0], targ.view(-1)[-1] = ignore_index, 0
    kw = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    if weight: kw['weight'] = torch.linspace(.25 if weight is True else -1.5, 3, C)
    return h, W, b if bias else None, targ, kw


def down(loss):
    "The gradient that comes from above: a different number for each loss, ½ for one."
    return torch.linspace(.5, 2., loss.numel(), dtype=loss.dtype).view(loss.shape)


def run(h, W, b, targ, **kw):
    "Loss, gradients and statistics."
    loss, stats = linear_xent(h, W, targ, b, **kw, with_stats=True)
    return loss.detach(), torch.autograd.grad(loss, [o for o in (h, W, b) if o is not None], down(loss)), stats


def gradients(h, W, b, targ, **kw):
    "Of the loss itself, in double precision."
    return [o / .5 for o in truth(h, W, b, targ, **kw)[1]]


def truth(h, W, b, targ, weight=None, **kw):
    "The same in double precision, with logits."
    h, W, b = (None if o is None else o.detach().double().requires_grad_() for o in (h, W, b))
    weight = None if weight is None else weight.double()
    z = F.linear(h, W, b)
    loss = F.cross_entropy(z.movedim(-1, 1), targ, weight=weight, **kw)
    kw.pop('reduction', None)
    return loss.detach(), torch.autograd.grad(loss, [o for o in (h, W, b) if o is not None], down(loss)), xent_stats(z.detach(), targ, weight=weight, axis=-1, **kw)


def assert_same(got, want, **tol):
    "Losses, gradients and statistics agree."
    for a, b in zip((got[0], *got[1], *got[2]), (want[0], *want[1], *want[2]), strict=True):
        assert a.shape == b.shape
        assert_close(a.to(b.dtype), b, equal_nan=True, **tol)


# -- value, gradients and statistics

@pytest.mark.grid
@each_reduction
@each_option
@pytest.mark.parametrize('chunk', [1, 3, 4, N, N + 5, None])
def test_loss_gradients_and_statistics_are_those_of_the_logits(option, reduction, chunk):
    h, W, b, targ, kw = problem(**option)
    assert_same(run(h, W, b, targ, **kw, reduction=reduction, chunk=chunk), truth(h, W, b, targ, **kw, reduction=reduction), **F64)


@each_reduction
@each_option
def test_in_float32(option, reduction):
    h, W, b, targ, kw = problem(**option, dtype=torch.float32)
    got = run(h, W, b, targ, **kw, reduction=reduction, chunk=4)
    assert {o.dtype for o in (got[0], *got[1], *got[2][:5])} == {torch.float32} and got[2].pred.dtype == torch.int64
    assert_same(got, truth(h, W, b, targ, **kw, reduction=reduction), rtol=1e-5, atol=2e-6)


@each_reduction
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype, reduction):
    h, W, b, targ, kw = problem(weight=True, ignore_index=1, dtype=dtype)
    loss, grads, stats = run(h, W, b, targ, **kw, reduction=reduction, chunk=4)
    want, want_grads, want_stats = truth(h, W, b, targ, **kw, reduction=reduction)
    assert loss.dtype == torch.float32 and stats.loss.dtype == torch.float32
    assert_close(loss.double(), want, **F32)
    for a, e in zip(stats, want_stats): assert_close(a.to(e.dtype), e, equal_nan=True, **F32)
    for a, e in zip(grads, want_grads):
        assert a.dtype == dtype
        assert_close(a.double(), e, rtol=torch.finfo(dtype).eps, atol=1e-3 * e.abs().max().item())


def test_features_and_head_may_differ_in_precision():
    h, W, b, targ, kw = problem(dtype=torch.float32)
    low = h.detach().bfloat16().requires_grad_()
    loss, grads, _ = run(low, W, b, targ)
    assert [o.dtype for o in grads] == [torch.bfloat16, torch.float32, torch.float32]
    assert_close(loss.double(), truth(low, W, b, targ)[0], **F32)
    assert run(low, W.detach().double().requires_grad_(), b, targ)[0].dtype == torch.float64


@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_under_autocast_it_multiplies_as_the_layer_does(reduction):
    h, W, b, targ, kw = problem(dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, stats = linear_xent(h, W, targ, b, reduction=reduction, chunk=4, with_stats=True)
        z = F.linear(h, W, b)
        stock = F.cross_entropy(z.float(), targ, reduction=reduction)
    assert loss.dtype == torch.float32 and z.dtype == torch.bfloat16
    assert_close(loss, stock, rtol=2e-2, atol=2e-2)
    assert not torch.equal(loss, linear_xent(h, W, targ, b, reduction=reduction))
    grads, want = (torch.autograd.grad(o, (h, W, b), down(o)) for o in (loss, stock))  # outside of autocast, as fastai does
    for a, e in zip(grads, want):
        assert a.dtype == torch.float32
        assert_close(a, e, rtol=5e-2, atol=2e-2)
    assert stats.loss.dtype == torch.float32


@pytest.mark.parametrize('rows', [(), (1,), (3, 4), (2, 3, 2), (2, 0)], ids=str)
@each_reduction
def test_rows_in_any_shape(rows, reduction):
    h, W, b, targ, kw = problem(rows=rows)
    loss, grads, stats = run(h, W, b, targ, reduction=reduction, chunk=5)
    want, want_grads, want_stats = run(h.reshape(-1, D), W, b, targ.flatten(), reduction=reduction)
    assert loss.shape == (rows if reduction == 'none' else ()) and all(o.shape == rows for o in stats)
    assert_close(loss.flatten(), want.flatten(), **F64)
    assert_close(grads[0].reshape(-1, D), want_grads[0], **F64)
    for a, e in zip((*grads[1:], *stats), (*want_grads[1:], *want_stats)): assert_close(a.flatten(), e.flatten(), **F64)


def test_strided_features_and_head():
    h, W, b, targ, kw = problem()
    want = run(h, W, b, targ)
    got = run(h.t().contiguous().t(), W.t().contiguous().t(), b, targ, chunk=4)
    assert_same(got, want, **F64)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_targets_of_any_integer_type(dtype):
    h, W, b, targ, kw = problem()
    assert_same(run(h, W, b, targ.to(dtype)), run(h, W, b, targ), **EXACT)


def test_subclasses_of_fastai_may_meet():
    h, W, b, targ, kw = problem(dtype=torch.float32)
    loss = linear_xent(TensorImage(h), W, TensorCategory(targ), b)
    assert type(loss) is torch.Tensor
    assert_close(loss, linear_xent(h, W, targ, b), **EXACT)


def test_a_known_row_keeps_its_digits():
    h, W = torch.tensor([[30.], [60.]]), torch.tensor([[1.], [0.], [0.]], requires_grad=True)
    loss = linear_xent(h, W, torch.tensor([0, 0]), reduction='none')
    assert_close(loss.detach().double(), F.softplus(math.log(2) - h[:, 0].double(), threshold=99), rtol=1e-5, atol=0)
    assert F.cross_entropy(F.linear(h, W), torch.tensor([0, 0])) == 0
    loss.sum().backward()
    assert W.grad[0] < 0


def test_infinite_logits():
    h, W, b = torch.ones(2, 1, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64), torch.tensor([0., -math.inf, 1.], dtype=torch.float64)
    targ = torch.tensor([0, 2])
    loss, stats = linear_xent(h, W, targ, b, with_stats=True)
    assert_close(loss, F.cross_entropy(F.linear(h, W, b), targ), **F64)
    for a, e in zip(stats, xent_stats(F.linear(h, W, b), targ)): assert_close(a, e, **F64)


# -- nothing to learn

NOTHING = {
    'all ignored': lambda t: (t.fill_(-100), {}), 'all ignored, smooth': lambda t: (t.fill_(-100), dict(label_smoothing=.1)),
    'all weights zero': lambda t: (t, dict(weight=torch.zeros(C))), 'all ignored, weight': lambda t: (t.fill_(-100), dict(weight=torch.ones(C))),
    'empty batch': lambda t: (t[:0], {}), 'empty batch, smooth, weight': lambda t: (t[:0], dict(label_smoothing=.1, weight=torch.ones(C))),
}


@each_reduction
@pytest.mark.parametrize('make', NOTHING.values(), ids=NOTHING.keys())
def test_nothing_to_learn_is_a_loss_and_gradients_of_zero(make, reduction):
    h, W, b, targ, _ = problem(dtype=torch.float32)
    targ, kw = make(targ)
    loss, grads, stats = run(h[:len(targ)].detach().requires_grad_(), W, b, targ, **kw, reduction=reduction)
    assert_close(loss, torch.zeros(targ.shape if reduction == 'none' else ()), **EXACT)
    for o in grads: assert_close(o, torch.zeros_like(o), **EXACT)
    if 'weight' not in kw: assert stats.pred.eq(-1).all() and stats.loss.isnan().all()


@pytest.mark.parametrize('eps', [0., .1])
def test_weights_that_cancel_have_no_mean_and_labels_without_weight_a_mean_of_zero(eps):
    h, W, b, _, _ = problem(rows=(3,), dtype=torch.float32)
    targ, weight = torch.tensor([0, 1, -100]), torch.tensor([1., -1., 0., 0., 2., 1., 1.])
    want = F.cross_entropy(F.linear(h, W, b), targ, weight=weight, label_smoothing=eps)
    loss, grads, _ = run(h, W, b, targ, weight=weight, label_smoothing=eps)
    assert not want.isfinite() and not loss.isfinite() and (eps or loss == want) and not any(o.isfinite().all() for o in grads[1:])
    loss, grads, _ = run(h, W, b, targ.clamp(max=0) + 2, weight=weight, label_smoothing=eps, ignore_index=-98)
    assert loss == 0 and not any(o.any() for o in grads)


def test_weights_by_name_are_those_in_order():
    head, names = nn.Linear(D, C), [f'class {i}' for i in range(C)]
    h, _, _, targ, _ = problem(dtype=torch.float32)
    loss_func = LinearXentLossFlat(head, {k: i + 1. for i, k in enumerate(reversed(names))})
    loss_func.set_vocab(names)
    want = LinearXentLossFlat(head, torch.arange(C, 0., -1))(Features.of(h, head), targ)
    assert_close(loss_func(Features.of(h, head), targ), want, **EXACT)


# -- the graph

def test_only_wanted_gradients_are_computed(monkeypatch):
    h, W, b, targ, kw = problem()
    want = gradients(h, W, b, targ)
    asked = []
    walk = linear._walk
    monkeypatch.setattr(linear, '_walk', lambda *args: asked.append(args[-1]) or walk(*args))
    for needs in product([False, True], repeat=3):
        args = [o.detach().requires_grad_(need) for o, need in zip((h, W, b), needs)]
        loss = linear_xent(*args[:2], targ, args[2], chunk=4)
        assert asked[-1] == needs and loss.requires_grad == any(needs)
        if any(needs): loss.backward()
        for o, need, e in zip(args, needs, want):
            if need: assert_close(o.grad, e, **F64)
            else: assert o.grad is None


@pytest.mark.parametrize('quiet', [torch.no_grad, torch.inference_mode])
@each_reduction
def test_without_a_graph_nothing_is_kept(quiet, reduction, monkeypatch):
    h, W, b, targ, kw = problem()
    want = run(h, W, b, targ, reduction=reduction)
    asked = []
    walk = linear._walk
    monkeypatch.setattr(linear, '_walk', lambda *args: asked.append(args[-1]) or walk(*args))
    with quiet(): loss, stats = linear_xent(h, W, targ, b, reduction=reduction, with_stats=True)
    assert asked == [(False,) * 3] and not loss.requires_grad and not any(o.requires_grad for o in stats)
    assert_close(loss.clone(), want[0], **F64)
    for a, e in zip(stats, want[2]): assert_close(a.clone(), e, **F64)


@each_reduction
def test_a_graph_that_is_kept_gives_the_same_again(reduction):
    h, W, b, targ, kw = problem()
    loss = linear_xent(h, W, targ, b, reduction=reduction).sum()
    first = [o.clone() for o in torch.autograd.grad(loss, (h, W, b), retain_graph=True)]
    second = torch.autograd.grad(3 * loss, (h, W, b), retain_graph=True)
    for a, e in zip(second, first): assert_close(a, 3 * e, **F64)
    for a, e in zip(torch.autograd.grad(loss, (h, W, b)), first): assert_close(a, e, **F64)
    with pytest.raises(RuntimeError, match='second time'): torch.autograd.grad(loss, (h, W, b))


def test_gradients_add_up_over_batches():
    h, W, b, targ, kw = problem()
    want = gradients(h, W, b, targ, reduction='sum')
    for rows in (slice(0, 4), slice(4, N)): linear_xent(h[rows], W, targ[rows], b, reduction='sum', chunk=3).backward()
    for o, e in zip((h, W, b), want): assert_close(o.grad, e, **F64)


def test_the_returned_loss_may_be_edited():
    h, W, b, targ, kw = problem()
    want = gradients(h, W, b, targ)
    loss = linear_xent(h, W, targ, b)
    loss /= 2
    for a, e in zip(torch.autograd.grad(loss, (h, W, b)), want): assert_close(a, e / 2, **F64)


def test_a_head_that_is_also_the_encoder_gets_both_gradients():
    gen = torch.Generator().manual_seed(0)
    W, words, targ = torch.randn(C, D, dtype=torch.float64, generator=gen).requires_grad_(), torch.tensor([1, 3, 0]), torch.tensor([3, 0, 6])
    grads = [torch.autograd.grad(f(W), W)[0] for f in (lambda W: linear_xent(W[words], W, targ), lambda W: F.cross_entropy(F.linear(W[words], W), targ))]
    assert_close(*grads, **F64)


@each_reduction
def test_gradcheck(reduction):
    h, W, b, targ, kw = problem(weight=True, ignore_index=1)
    assert torch.autograd.gradcheck(lambda *o: linear_xent(*o[:2], targ, o[2], **kw, reduction=reduction, chunk=4), (h, W, b))


@each_reduction
def test_a_second_derivative_is_refused(reduction):
    h, W, b, targ, kw = problem()
    with pytest.raises(NotImplementedError, match='no second derivative'): torch.autograd.grad(linear_xent(h, W, targ, b, reduction=reduction).sum(), W, create_graph=True)


class Largest(TorchDispatchMode):
    "The most elements that a result has."
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        self.n = max([self.n, *(o.untyped_storage().nbytes() for o in (res if isinstance(res, (tuple, list)) else [res]) if isinstance(o, torch.Tensor))])
        return res


@pytest.mark.parametrize('label_smoothing', [0., .1])
@each_reduction
def test_the_logits_never_exist(reduction, label_smoothing):
    gen = torch.Generator().manual_seed(0)
    h, W = torch.randn(512, 8, generator=gen).requires_grad_(), torch.randn(1000, 8, generator=gen).requires_grad_()
    with Largest() as seen: linear_xent(h, W, torch.randint(0, 1000, (512,), generator=gen), reduction=reduction, label_smoothing=label_smoothing, chunk=16).sum().backward()
    assert seen.n <= 4 * max(16 * 1000, 1000 * 8)


def test_the_gradient_of_a_mean_is_written_where_it_stays(monkeypatch):
    h, W, b, targ, kw = problem()
    made, walk = [], linear._walk
    def look(*args):
        stats, grads = walk(*args)
        made.extend(o.data_ptr() for o in grads)
        return stats, grads
    monkeypatch.setattr(linear, '_walk', look)
    linear_xent(h, W, targ, b).backward()
    assert [o.grad.data_ptr() for o in (h, W, b)] == made


# -- refusals

H, HEAD, B, Y, _ = problem(dtype=torch.float32)
REFUSED = {
    'width': (lambda: linear_xent(H, HEAD[:, :3], Y), ValueError, r'h has shape \[11, 5\], expected \[n, 3\] or \[n, d…, 3\] for head_weight \[7, 3\]'),
    'scalar': (lambda: linear_xent(H[0, 0], HEAD, Y), ValueError, r'h has shape \[\]'),
    'head': (lambda: linear_xent(H, HEAD[0], Y), ValueError, r'head_weight has shape \[5\], expected \[c, f\]'),
    'bias': (lambda: linear_xent(H, HEAD, Y, B[:3]), ValueError, r'head_bias has shape \[3\], expected \[7\] for head_weight \[7, 5\]'),
    'features': (lambda: linear_xent(H.long(), HEAD, Y), TypeError, 'h has dtype torch.int64, expected floating-point features'),
    'shape': (lambda: linear_xent(H, HEAD, Y[:, None]), ValueError, r'targ has shape \[11, 1\], expected \[11\] for pred \[11, 7\]; use `targ.squeeze\(1\)`'),
    'value': (lambda: linear_xent(H, HEAD, Y.clone().index_fill(0, torch.tensor([4, 6]), 9)), IndexError, r'targ\[4\] is 9, expected a class from 0 to 6 or ignore_index=-100; 2 rows are out of range'),
    'negative': (lambda: linear_xent(H.view(11, 1, 5), HEAD, Y.view(11, 1).clone().fill_(-1)), IndexError, r'targ\[0, 0\] is -1'),
    'probs': (lambda: linear_xent(H, HEAD, torch.zeros(11, 7)), TypeError, 'expected integer classes; probabilities are as large as the logits'),
    'bool': (lambda: linear_xent(H, HEAD, Y > 2), TypeError, r'targ has dtype torch.bool'),
    'weight': (lambda: linear_xent(H, HEAD, Y, weight=torch.ones(3)), ValueError, r'weight has shape \[3\], expected \[7\]'),
    'nan weight': (lambda: linear_xent(H, HEAD, Y, weight=torch.full((7,), torch.nan)), ValueError, r'weight\[0\] is nan'),
    'no tensor': (lambda: linear_xent((H, H), HEAD, Y), TypeError, r'h is a tuple of 2, expected a tensor of features; use `h\[0\]`'),
    'no tensor of targets': (lambda: linear_xent(H, HEAD, Y.tolist()), TypeError, 'targ is a list of 11, expected a tensor of classes'),
    'no tensor of logits': (lambda: LinearXentLossFlat(nn.Linear(5, 7))((H, H), Y), TypeError, 'pred is a tuple of 2, expected a tensor of logits'),
    'weights without a vocab': (lambda: LinearXentLossFlat(nn.Linear(5, 7), {'a': 1.})(Features.of(H, nn.Linear(5, 7)), Y), RuntimeError, 'this loss does not know the vocab'),
    'smoothing': (lambda: linear_xent(H, HEAD, Y, label_smoothing=2.), ValueError, 'label_smoothing is 2.0'),
    'reduction': (lambda: linear_xent(H, HEAD, Y, reduction='avg'), ValueError, "reduction is 'avg', expected one of mean, sum, none"),
    'chunk': (lambda: linear_xent(H, HEAD, Y, chunk=0), ValueError, 'chunk is 0'),
    'axis': (lambda: LinearXentLossFlat(nn.Linear(5, 7), axis=1), ValueError, 'axis is 1, expected -1'),
    'no linear layer': (lambda: head_in_loss(nn.Sequential(nn.Conv2d(1, 1, 1))), TypeError, r'the last layer of Sequential is Conv2d.*expected a plain nn.Linear'),
    'something behind it': (lambda: head_in_loss(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), TypeError, r'is BatchNorm1d.*if there is one, name it with `head=`'),
    'a layer of another kind': (lambda: head_in_loss(nn.Sequential(nn.LazyLinear(2))), TypeError, 'expected a plain nn.Linear'),
    'parametrized': (lambda: head_in_loss(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))), TypeError, 'expected a plain nn.Linear'),
    'hooks': (lambda: head_in_loss(nn.Sequential(hooked())), TypeError, 'with hooks'),
    'foreign': (lambda: head_in_loss(nn.Sequential(nn.Linear(2, 2)), head=nn.Linear(2, 2)), ValueError, 'is not a layer of this Sequential'),
}


def hooked():
    res = nn.Linear(2, 2)
    res.register_forward_pre_hook(lambda *_: None)
    return res


@pytest.mark.parametrize('call, error, words', REFUSED.values(), ids=REFUSED.keys())
def test_refusals(call, error, words):
    with pytest.raises(error, match=words): call()


# -- features

def features(n=4):
    head = HeadInLoss(D, C)
    return head(torch.randn(n, D)), head


def test_features_stay_features_when_moved_and_converted():
    x, head = features()
    for y in (x, x.float(), x.half(), x.to('cpu'), x.detach(), x.clone(), x[:2], x[torch.tensor([1, 0])], copy.copy(x), nn.Identity()(x)):
        assert isinstance(y, Features) and y.head is head
    assert x.shape == (4, D) and x.ndim == 2 and len(x) == 4 and x.dtype == torch.float32 and 'Features' in repr(x) + type(x).__name__
    assert type(x.plain()) is torch.Tensor and type(x.logits()) is torch.Tensor


@pytest.mark.parametrize('use', [lambda x: x.argmax(1), lambda x: x + 1, lambda x: x.softmax(1), lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long)), lambda x: x.sum(),
                                 lambda x: CrossEntropyLossFlat()(x, torch.zeros(4, dtype=torch.long)), lambda x: XentLossFlat()(x, torch.zeros(4, dtype=torch.long)),
                                 lambda x: nn.BatchNorm1d(D)(x), lambda x: x.flatten(), lambda x: torch.stack([x, x]), lambda x: xent_stats(x, torch.zeros(4, dtype=torch.long))])
def test_whoever_computes_with_features_is_refused(use):
    x, head = features()
    with pytest.raises(RuntimeError, match=r'the features that HeadInLoss\(in_features=5, out_features=7, bias=True\) was given, not with logits'): use(x)


def test_the_graph_of_features_is_that_of_the_tensor():
    x = torch.randn(4, D, requires_grad=True)
    head = HeadInLoss(D, C)
    loss = LinearXentLossFlat(head)(head(x * 2), torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert x.grad.abs().sum() > 0 and head.weight.grad.abs().sum() > 0 and not hasattr(x, 'head')


def test_a_head_gives_logits_unless_it_trains_with_gradients():
    x = torch.randn(4, D)
    _, head = features()
    want = F.linear(x, head.weight, head.bias)
    with torch.no_grad(): assert_close(head(x), want, **EXACT)
    with torch.inference_mode(): assert_close(head(x).clone(), want, **EXACT)
    assert_close(head.eval()(x), want, **EXACT)
    assert_close(head.train()(x).logits(), want, **EXACT)


def test_what_could_be_features_or_logits_is_refused():
    loss_func, y = LinearXentLossFlat(nn.Linear(7, 7)), torch.zeros(4, dtype=torch.long)
    with pytest.raises(TypeError, match='it could be either'): loss_func(torch.zeros(4, 7, requires_grad=True), y)
    assert_close(loss_func(torch.zeros(4, 7), y), torch.tensor(7.).log())
    loss_func = LinearXentLossFlat(nn.Linear(9, 7))
    assert_close(loss_func(torch.zeros(4, 7, requires_grad=True), y), torch.tensor(7.).log())
    with pytest.raises(ValueError, match=r'inp is a Tensor of shape \[4, 9\], expected 7 logits a row, or `Features`'): loss_func(torch.zeros(4, 9), y)


@pytest.mark.parametrize('kw', [{}, dict(weight=torch.linspace(.5, 2, C)), dict(ignore_index=1, label_smoothing=.1), dict(reduction='sum'), dict(compat=True, reduction='none'), dict(chunk=2)], ids=str)
def test_the_loss_gives_the_same_of_features_as_of_logits(kw):
    torch.manual_seed(0)
    x, head = features(6)
    loss_func, y = LinearXentLossFlat(head, **kw), torch.tensor([[0], [1], [6], [2], [3], [1]], dtype=torch.int8)
    got, stats = loss_func(x, y), loss_func.stats
    want = loss_func(x.logits(), y)
    assert_close(got.detach(), want, **F32)
    for a, e in zip(stats, loss_func.stats): assert_close(a, e, equal_nan=True, **F32)
    assert loss_func(x, y, reduction='none').shape == (6,) and loss_func.reduction == kw.get('reduction', 'mean')


def test_the_loss_travels_without_a_batch_or_a_head():
    x, head = features()
    loss_func, y = LinearXentLossFlat(head, weight=[1.] * C), torch.zeros(4, dtype=torch.long)
    want = loss_func(x, y)
    for other in (pickle.loads(pickle.dumps(loss_func)), copy.deepcopy(loss_func)):
        assert (other.n_classes, other.n_features) == (C, D) and not any(o is head for o in vars(other).values())
        with pytest.raises(RuntimeError, match='call the loss first'): other.stats
        assert_close(other(x, y), want, **EXACT)
    assert 'LinearXentLossFlat(5 features, 7 classes' in repr(loss_func)


# -- models

def test_a_resnet_keeps_its_names_and_its_logits():
    torch.manual_seed(0)
    model, x = resnet18(num_classes=C).eval(), torch.randn(2, 3, 32, 32)
    want, names = model(x), list(model.state_dict())
    other, loss_func = head_in_loss(model)
    assert other is model and isinstance(model.fc, HeadInLoss) and list(model.state_dict()) == names and loss_func.n_features == 512
    assert_close(model(x), want, **EXACT)
    assert isinstance(model.train()(x), Features)


def test_a_second_time_changes_nothing():
    model = nn.Sequential(nn.Linear(4, C))
    head = head_in_loss(model)[0][0]
    model, loss_func = head_in_loss(model, label_smoothing=.1)
    assert model[0] is head and loss_func.label_smoothing == .1


def test_a_model_that_is_one_layer():
    linear = nn.Linear(D, C)
    model, loss_func = head_in_loss(linear)
    assert isinstance(model, HeadInLoss) and model.weight is linear.weight


def test_a_layer_in_two_places_is_replaced_in_both():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, C))
            self.last = self.body[0]
        def forward(self, x): return self.body(x)
    model, _ = head_in_loss(Two())
    assert model.last is model.body[0] and isinstance(model.last, HeadInLoss)


def test_a_layer_that_is_not_the_last_is_noticed_by_the_first_batch():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, C)
        def forward(self, x): return self.lin(x).softmax(1)
    model, loss_func = head_in_loss(Hidden())
    with pytest.raises(RuntimeError, match='softmax was called with the features'): model(torch.zeros(2, 4))


# -- Learners

def learner(inside, cbs=None, metrics=accuracy, n=48, c=5, opt_func=None, **kw):
    "The same items, model and weights each time."
    set_seed(0)
    xs = torch.randn(n, 6)
    items = Items(zip(xs, xs[:, :c].argmax(1)))
    dls = DataLoaders(TfmdDL(items, bs=8, shuffle=True, num_workers=0), TfmdDL(Items(items[:20]), bs=8, num_workers=0))
    model = nn.Sequential(LinBnDrop(6, 16, act=nn.ReLU(), p=.2), nn.Sequential(nn.Linear(16, c)))
    if inside: model, loss_func = head_in_loss(model, **kw)
    else: loss_func = XentLossFlat(**kw)
    splitter = lambda m: [list(m[0].parameters()), list(m[1].parameters())]
    learn = Learner(dls, model, loss_func=loss_func, metrics=metrics, cbs=cbs, lr=.02, splitter=splitter)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    learn.logger = lambda *_: None
    return learn


def both(*args, fit=lambda learn: learn.fit(2), **kw):
    "A Learner without and one with the head in its loss, after the same training."
    res = []
    for inside in (False, True):
        learn = learner(inside, *(o() for o in args), **{k: v for k, v in kw.items() if inside or k != 'chunk'})
        set_seed(1)
        fit(learn)
        res.append(learn)
    return res


class Items(list):
    def new_empty(self): return Items(self[:1])


class Autocast(Callback):
    "What fastai's MixedPrecision does, on a CPU."
    order = 10
    def before_batch(self): (setattr(self, 'cast', torch.autocast('cpu', dtype=torch.bfloat16)), self.cast.__enter__())
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.cast.__exit__(None, None, None)


FITS = {
    'plain': (lambda: None, {}), 'weight': (lambda: None, dict(weight=torch.linspace(.5, 2, 5))), 'ignore and smooth': (lambda: None, dict(ignore_index=2, label_smoothing=.1)),
    'chunks': (lambda: None, dict(chunk=3)), 'sum': (lambda: None, dict(reduction='sum')), 'accumulate': (lambda: [GradientAccumulation(16)], {}), 'mixup': (lambda: [MixUp()], {}),
}


def assert_same_training(a, b, **tol):
    for k, v in a.model.state_dict().items(): assert_close(b.model.state_dict()[k], v, **tol)
    for x, y in zip(a.recorder.values, b.recorder.values, strict=True): assert_close(torch.tensor(y), torch.tensor(x), **tol)
    assert_close(torch.stack(b.recorder.losses), torch.stack(a.recorder.losses), **tol)


@pytest.mark.parametrize('cbs, kw', FITS.values(), ids=FITS.keys())
def test_a_training_is_the_same_with_the_head_in_the_loss(cbs, kw):
    a, b = both(cbs, fit=lambda learn: learn.fit_one_cycle(2), **kw)
    assert_same_training(a, b, rtol=1e-5, atol=1e-5)
    assert len(a.recorder.losses) == 12
    for x, y in zip(a.get_preds(with_loss=True, with_decoded=True), b.get_preds(with_loss=True, with_decoded=True), strict=True): assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert_close(torch.tensor(b.validate()), torch.tensor(a.validate()), **F32)


def test_a_training_under_autocast_is_close():
    a, b = both(Autocast)
    assert_same_training(a, b, rtol=.05, atol=.05)


def test_freezing_trains_the_head_alone():
    a, b = both(fit=lambda learn: (learn.freeze(), learn.fit(1)))
    assert_same_training(a, b, rtol=1e-5, atol=1e-5)
    before = copy.deepcopy(b.model[1][0].weight)
    b.fit(1)
    assert not torch.equal(before, b.model[1][0].weight)


def test_the_statistics_of_a_batch_are_those_of_its_logits():
    seen = []
    class Look(Callback):
        def after_loss(self):
            pred, loss_func = self.learn.pred, self.learn.loss_func
            assert isinstance(pred, Features) == self.learn.training
            z = pred.logits() if isinstance(pred, Features) else pred
            for a, e in zip(loss_func.stats, xent_stats(z, self.y), strict=True): assert_close(a, e, **F32)
            assert loss_func.n_classes == z.shape[1]
            seen.append(self.learn.training)
    learner(True, Look()).fit(1)
    assert seen == [True] * 6 + [False] * 3


def test_a_metric_of_the_training_is_refused_not_wrong():
    learn = learner(True)
    learn.recorder.train_metrics = True
    with pytest.raises(RuntimeError, match='argmax was called with the features'): learn.fit(1)


def test_a_learner_is_exported_and_saved(tmp_path):
    learn = learner(True)
    learn.fit(1)
    want = learn.get_preds()[0]
    learn.path = tmp_path
    learn.export('l.pkl')
    learn.save('m')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other = load_learner(tmp_path/'l.pkl')
    assert isinstance(other.loss_func, LinearXentLossFlat)
    assert_close(other.get_preds(dl=learn.dls.valid)[0], want, **F32)
    stock = learner(False)
    stock.path = tmp_path
    stock.load('m')
    assert_close(stock.get_preds()[0], want, **F32)
    other = copy.deepcopy(learn)
    other.fit(1)
    assert other.model[1][0] is not learn.model[1][0]
    assert_close(learn.get_preds()[0], want, **F32)


def test_a_tabular_model():
    torch.manual_seed(0)
    model, cat, cont, y = TabularModel([(4, 3)], 2, C, [8]), torch.tensor([[1], [2], [3]]), torch.randn(3, 2), torch.tensor([[0], [5], [6]])
    want = F.cross_entropy(model(cat, cont), y[:, 0])
    model, loss_func = head_in_loss(model)
    assert_close(loss_func(model(cat, cont), y), want, **F32)


def test_a_language_model_with_tied_weights():
    def fit(inside):
        set_seed(0)
        config = {**awd_lstm_lm_config, 'emb_sz': 6, 'n_hid': 8, 'n_layers': 1}
        model, loss_func = get_language_model(AWD_LSTM, 30, config), XentLossFlat()
        words = torch.randint(0, 30, (8, 13))
        items = [(o[:-1], o[1:]) for o in words]
        dls = DataLoaders(TfmdDL(items, bs=4, num_workers=0), TfmdDL(items, bs=4, num_workers=0))
        if inside: model, loss_func = head_in_loss(model, chunk=7)
        learn = Learner(dls, model, loss_func=loss_func, metrics=accuracy, cbs=rnn_cbs(alpha=2., beta=1.), lr=.02)
        learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
        learn.logger = lambda *_: None
        learn.fit(2)
        return learn
    a, b = fit(False), fit(True)
    assert b.loss_func.n_classes == 30 and b.model[1].decoder.weight is b.model[0].encoder.weight
    assert_same_training(a, b, rtol=1e-4, atol=1e-5)


def test_the_module_is_pickled_with_its_parameters():
    head = HeadInLoss(D, C)
    buf = io.BytesIO()
    torch.save(head, buf)
    buf.seek(0)
    assert_close(torch.load(buf, weights_only=False).weight, head.weight, **EXACT)
