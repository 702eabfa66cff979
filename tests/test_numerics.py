"The formulas of fastai_xent.numerics against exact arithmetic: be no worse than F.cross_entropy anywhere."
import math
from decimal import Decimal, localcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fastai.torch_core import TensorCategory, TensorImage, TensorMask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fastai_xent.numerics import XentStats, softmax_jacobian, xent_grad, xent_stats

inf, nan = math.inf, math.nan
HALF, WIDE = [torch.float16, torch.bfloat16], [torch.float32, torch.float64]
NUMBERS = XentStats._fields[:-1]


# -- the problems: one list of settings for every implementation

class Problem(NamedTuple):
    "Arguments of `xent_stats` and `xent_grad`."
    pred: Tensor
    targ: Tensor
    kw: dict  # weight, ignore_index, label_smoothing
    axis: int

    @property
    def i(self): return self.axis % self.pred.ndim

    @property
    def probs(self): return self.targ.is_floating_point()

    def stats(self): return xent_stats(self.pred, self.targ, axis=self.axis, **self.kw)
    def grad(self): return xent_grad(self.pred, self.targ, axis=self.axis, **self.kw)

    def torch(self, dtype=None):
        "Loss of each row and gradient by F.cross_entropy and autograd, in `dtype`."
        dtype = dtype or self.pred.dtype
        leaf = self.pred.to(dtype, copy=True).requires_grad_()
        kw = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in self.kw.items()}
        targ = self.targ.to(dtype).movedim(self.i, 1) if self.probs else self.targ
        rows = F.cross_entropy(leaf.movedim(self.i, 1), targ, reduction='none', **kw)
        rows.sum().backward()
        return rows.detach(), leaf.grad

    def rows(self, x): return x.movedim(self.i, -1).reshape(-1, x.shape[self.i])
    def unrows(self, x): return x.view(*self.pred.movedim(self.i, -1).shape[:-1], -1).movedim(-1, self.i)


def problem(n=3, c=4, d=(), axis=1, dtype=torch.float32, scale=3., kind='class', lead=0., ints=False, weight=None,
            label_smoothing=0., ignore_index=-100, ignored=0, seed=0):
    "Draw logits and targets; `lead` is added to the label's logit, `ignored` rows are not counted."
    gen = torch.Generator().manual_seed(seed)
    z = torch.randn(n, *d, c, generator=gen, dtype=torch.float64) * scale
    if ints: z = z.round()
    y = torch.randint(0, c, (n, *d), generator=gen)
    z = z.scatter_add(-1, y.unsqueeze(-1), torch.full_like(z[..., :1], lead)).clamp(-1e4, 1e4)
    kw = dict(ignore_index=-100 if kind == 'probs' else ignore_index, label_smoothing=label_smoothing)
    if weight is not None: kw['weight'] = (torch.arange(c) * 3 + weight) % 8 / 4. - int(weight < 0)  # 0, ¼, … 1¾; or −1 to ¾
    if kind == 'probs':
        y = torch.randint(0, 9, z.shape, generator=gen)
        y = (y / y.sum(-1, keepdim=True).clamp_min(1)).to(dtype).movedim(-1, axis)
    elif y.numel(): y.view(-1)[torch.randperm(y.numel(), generator=gen)[:ignored]] = ignore_index
    return Problem(z.to(dtype).movedim(-1, axis).contiguous(), y, kw, axis)


OPTIONS = {
    'plain': {},
    'weight': dict(weight=1),
    'weight with zeros': dict(weight=0),
    'negative weight': dict(weight=-1),
    'negative weight, smooth and ignored': dict(weight=-1, label_smoothing=.3, ignored=1),
    'probs, negative weight': dict(kind='probs', weight=-1),
    'ignored': dict(ignored=2),
    'a class is ignored': dict(ignore_index=1),
    'smooth': dict(label_smoothing=.1),
    'all smooth': dict(label_smoothing=1.),
    'weight, smooth and ignored': dict(weight=0, label_smoothing=.3, ignored=1),
    'probs': dict(kind='probs'),
    'probs, weight and smooth': dict(kind='probs', weight=0, label_smoothing=.2),
}
LAYOUTS = {
    'n c': dict(), 'n c, axis -1': dict(axis=-1), 'c n': dict(axis=0), 'one row': dict(n=1), 'no row': dict(n=0), 'one class': dict(c=1),
    'two classes': dict(c=2), 'n c d': dict(d=(5,)), 'n d c': dict(d=(5,), axis=-1), 'n c h w': dict(d=(2, 3)), 'n c h w, axis -3': dict(d=(2, 3), axis=-3),
    'n h c w': dict(d=(2, 3), axis=2), 'n h w c': dict(d=(2, 3), axis=-1), 'n c d h w': dict(d=(2, 1, 3)), 'no position': dict(d=(0, 2)),
}
each_option = pytest.mark.parametrize('option', OPTIONS.values(), ids=OPTIONS.keys())
each_layout = pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS.keys())
each_dtype = pytest.mark.parametrize('dtype', HALF + WIDE, ids=str)


# -- the truth: the same quantities in 80 decimal digits

class Exact(NamedTuple):
    "What is true of each row, rounded to float64; `counts` is the sum of |t|, `size` the loss with |t| for t: what may cancel."
    loss: Tensor
    grad: Tensor
    grad_norm: Tensor
    el2n: Tensor
    p_targ: Tensor
    margin: Tensor
    pred: Tensor
    counts: Tensor
    size: Tensor


def _log1p(x): return x if x < Decimal('1e-50') else (1 + x).ln()


def _exact_row(z, t, y):
    "Loss, gradient, … of a row of Decimals with target weights `t` and label `y`."
    top = max(z)
    e = [(o - top).exp() for o in z]
    others = lambda x, k: sum(x[:k] + x[k+1:], Decimal(0))
    S = sum(e)
    p = [o / S for o in e]
    grad = [others(t, k) * p[k] - t[k] * others(p, k) for k in range(len(z))]  # T p − t, without a difference where t is one class
    parts = [b * _log1p(others(e, k) / e[k]) for k, b in enumerate(t) if b]
    loss, size, counts = sum(parts, Decimal(0)), sum(map(abs, parts), Decimal(0)), sum(map(abs, t))
    el2n = (others(p, y)**2 + sum(o**2 for k, o in enumerate(p) if k != y)).sqrt()
    margin = z[y] - max(z[:y] + z[y+1:]) if len(z) > 1 else Decimal('Infinity')
    return loss, grad, sum(o**2 for o in grad).sqrt(), el2n, p[y], margin, z.index(top), counts, size


def exact(q: Problem) -> Exact:
    "The truth about every row of a problem."
    c, got = q.pred.shape[q.i], []
    weight = [Decimal(o) for o in q.kw.get('weight', torch.ones(c)).tolist()]
    eps = Decimal(q.kw['label_smoothing'])
    targs = q.rows(q.targ) if q.probs else q.targ.flatten()
    with localcontext() as ctx:
        ctx.prec = 80
        for z, targ in zip(q.rows(q.pred).double().tolist(), targs.tolist()):
            if targ == q.kw['ignore_index']:
                got.append((nan, [0.] * c, nan, nan, nan, nan, -1, 0, 0))
                continue
            y = targ if not q.probs else targ.index(max(targ))
            t = [Decimal(o) for o in targ] if q.probs else [Decimal(k == y) for k in range(c)]
            got.append(_exact_row([Decimal(o) for o in z], [w * (o * (1 - eps) + eps / c) for o, w in zip(t, weight)], y))
    shape = [s for k, s in enumerate(q.pred.shape) if k != q.i]
    cols = list(zip(*got)) or [()] * 9
    res = [torch.tensor([float(o) for o in col], dtype=torch.float64).view(shape) for k, col in enumerate(cols) if k != 1]
    grad = q.unrows(torch.tensor([[float(o) for o in row] for row in cols[1]], dtype=torch.float64)) if got else torch.zeros(q.pred.shape, dtype=torch.float64)
    return Exact(res[0], grad, *res[1:5], res[5].long(), *res[6:])


# -- comparing

def precision(dtype): return torch.finfo(dtype if dtype in WIDE else torch.float32)


def assert_within(ours, truth, allowed):
    "|ours − truth| is at most `allowed`, element by element; nan only where the truth is nan."
    assert_close(ours.isnan(), truth.isnan(), rtol=0, atol=0)
    error = (ours.double() - truth).abs().masked_fill(ours.double() == truth, 0.)  # inf − inf
    assert_close((error - allowed).nan_to_num(0.).clamp_min(0), torch.zeros_like(truth), rtol=0, atol=0)


def digits(truth, info, ulps=8):
    "A few units in the last place; a number e^−d has the relative error of its d."
    x = truth.abs()
    return ulps * info.eps * torch.where(x > 0, x * (2 + x.clamp_min(1e-300).log().abs()), 0.) + 2 * info.tiny


def assert_no_worse(q: Problem):
    "Every number of `q` is within a few ulps of the truth, or at least as near as torch's."
    truth, info, stats, grad = exact(q), precision(q.pred.dtype), q.stats(), q.grad()
    rows, torch_grad = q.torch()
    hard = not q.probs and not q.kw['label_smoothing']
    c = q.pred.shape[q.i]
    one = truth.counts * info.eps * (8 if hard else 8 + c / 2)  # of a probability times T; torch's softmax adds up a strided axis term by term
    near = digits(truth.loss, info) if hard else digits(truth.size, info) + one * (1 + math.log(c))
    off = (rows.double() - truth.loss).abs().nan_to_num(inf)
    for o in stats[:-1]: assert o.dtype == grad.dtype == (torch.float64 if q.pred.dtype == torch.float64 else torch.float32)
    assert_within(stats.loss, truth.loss, torch.maximum(near, off))
    assert_within(grad, truth.grad, torch.maximum((torch_grad.double() - truth.grad).abs().nan_to_num(inf), one.unsqueeze(q.i)))
    assert_within(stats.el2n, truth.el2n, digits(truth.el2n, info))
    assert_within(stats.p_targ, truth.p_targ, digits(truth.p_targ, info))
    assert_within(stats.grad_norm, truth.grad_norm, digits(truth.grad_norm, info) if hard else one)
    assert_close(stats.margin, truth.margin.to(stats.margin.dtype), rtol=0, atol=0, equal_nan=True)
    assert_close(stats.pred, truth.pred, rtol=0, atol=0)


# -- value and gradient

@st.composite
def problems(draw, **given):
    "Any problem: layout, dtype, magnitude, confidence and options."
    d = draw(st.sampled_from([(), (), (1,), (2,), (2, 2), (1, 2, 2), (0,)]))
    c = draw(st.sampled_from([1, 2, 3, 4, 7, 50]))
    kw = dict(d=d, c=c, n=draw(st.integers(0, 3)), axis=draw(st.integers(-len(d) - 2, len(d) + 1)),
              dtype=draw(st.sampled_from(HALF + WIDE)), scale=draw(st.sampled_from([.01, 1., 10., 100., 1e4])),
              lead=draw(st.sampled_from([0., 0., 5., 20., 80., -20., -80., 1e4])), ints=draw(st.booleans()),
              kind=draw(st.sampled_from(['class', 'class', 'probs'])), weight=draw(st.sampled_from([None, 0, 1, -1])),
              label_smoothing=draw(st.sampled_from([0., 0., .1, 1.])), ignored=draw(st.integers(0, 2)),
              ignore_index=draw(st.sampled_from([-100, -1, 0])), seed=draw(st.integers(0, 2**20)))
    return problem(**{**kw, **given})


@given(problems())
@settings(max_examples=800)
def test_no_number_is_worse_than_torch_s(q): assert_no_worse(q)


@given(problems(kind='class', label_smoothing=0.))
@settings(max_examples=200)
def test_no_number_of_plain_cross_entropy_is_worse_than_torch_s(q): assert_no_worse(q)


@pytest.mark.grid
@each_option
@each_layout
@each_dtype
def test_no_number_is_worse_than_torch_s_in_any_layout(layout, option, dtype): assert_no_worse(problem(**layout, **option, dtype=dtype))


@pytest.mark.grid
@each_option
@each_layout
def test_loss_and_gradient_are_those_of_autograd(layout, option):
    q = problem(**layout, **option, dtype=torch.float64)
    rows, grad = q.torch()
    keep = q.targ != q.kw['ignore_index'] if not q.probs else torch.ones_like(rows, dtype=torch.bool)
    assert_close(q.stats().loss[keep], rows[keep], rtol=1e-12, atol=1e-14)
    assert_close(q.grad(), grad, rtol=1e-12, atol=1e-14)


@pytest.mark.grid
@each_option
@each_layout
@each_dtype
def test_grad_norm_is_the_length_of_the_gradient(layout, option, dtype):
    q = problem(**layout, **option, dtype=dtype)
    stats, norm = q.stats(), torch.linalg.vector_norm(q.grad(), dim=q.i)
    keep = stats.pred >= 0
    assert_close(stats.grad_norm[keep], norm[keep], rtol=1e-5, atol=1e-7)


@each_layout
def test_statistics_have_the_shape_of_the_targets_and_the_gradient_that_of_the_logits(layout):
    q = problem(**layout)
    for o in q.stats(): assert o.shape == q.targ.shape
    assert q.grad().shape == q.pred.shape


@pytest.mark.parametrize('option', [o for o in OPTIONS.values() if 'ignored' not in o and o.get('ignore_index') != 1])
def test_a_single_row_without_a_batch_is_a_batch_of_one(option):
    q = problem(n=1, **option)
    one = q._replace(pred=q.pred[0], targ=q.targ[0])
    for a, b in zip(one.stats(), q.stats()): assert_close(a, b[0], rtol=1e-6, atol=1e-7)
    assert_close(one.grad(), q.grad()[0], rtol=1e-6, atol=1e-7)


def test_the_label_of_a_distribution_is_its_largest_class_whatever_the_weights():
    pred, targ = torch.tensor([[1., 2., 4.]]), torch.tensor([[.2, .5, .3]])
    stats, hard = xent_stats(pred, targ, weight=torch.tensor([9., 0., 1.])), xent_stats(pred, torch.tensor([1]))
    for k in ('el2n', 'p_targ', 'margin', 'pred'): assert_close(getattr(stats, k), getattr(hard, k), rtol=0, atol=0)


def test_weight_and_smoothing_change_loss_and_grad_norm_only():
    q = problem(n=6, weight=1, label_smoothing=.2)
    plain, other = q._replace(kw={}).stats(), q.stats()
    for k in ('el2n', 'p_targ', 'margin', 'pred'): assert_close(getattr(other, k), getattr(plain, k), rtol=0, atol=0)
    assert ((other.loss - plain.loss).abs() > 1e-3).all() and ((other.grad_norm - plain.grad_norm).abs() > 1e-3).all()


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_every_integer_type_is_a_class(dtype):
    q = problem()
    for a, b in zip(q._replace(targ=q.targ.to(dtype)).stats(), q.stats()): assert_close(a, b, rtol=0, atol=0)


# -- the confident row

MARGINS = torch.arange(0, 80.01, .5)


@pytest.mark.parametrize('c', [2, 3, 10])
@pytest.mark.parametrize('spread', [0., 1., 30.], ids=['equal rivals', 'near rivals', 'far rivals'])
def test_a_confident_row_keeps_its_digits(c, spread):
    rivals = -torch.linspace(0, spread, c - 1).expand(len(MARGINS), -1)
    q = Problem(torch.cat([rivals, MARGINS[:, None]], 1), torch.full((len(MARGINS),), c - 1), dict(label_smoothing=0., ignore_index=-100), 1)
    stats, grad, truth = q.stats(), q.grad(), exact(q)
    assert (truth.loss > 0).all() and (grad != 0)[truth.grad.abs() > 1e-37].all()
    for k in ('loss', 'grad_norm', 'el2n', 'p_targ'): assert_close(getattr(stats, k).double(), getattr(truth, k), rtol=1e-5, atol=0)
    assert_close(grad.double(), truth.grad, rtol=1e-5, atol=1e-37)
    assert_close(stats.margin, MARGINS, rtol=0, atol=0)


def test_at_margin_20_the_norm_is_five_billionths_where_the_naive_one_is_three():
    pred, targ = torch.tensor([[20., 0., 0.]]), torch.tensor([0])
    assert_close((pred.softmax(1) - F.one_hot(targ, 3)).norm(dim=1), torch.tensor([2.915e-9]), rtol=1e-3, atol=0)
    assert_close(xent_stats(pred, targ).el2n, torch.tensor([5.0488e-9]), rtol=1e-4, atol=0)
    assert_close(xent_stats(pred, targ).grad_norm, torch.tensor([5.0488e-9]), rtol=1e-4, atol=0)
    assert_close(xent_grad(pred, targ), torch.tensor([[-4.1223e-9, 2.0612e-9, 2.0612e-9]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize('dtype', WIDE, ids=str)
def test_for_two_classes_the_norm_is_root_two_times_the_probability_of_the_other(dtype):
    m = torch.linspace(-100, 80, 181, dtype=dtype)
    stats = xent_stats(torch.stack([m, torch.zeros_like(m)], 1), torch.zeros(181, dtype=torch.long))
    assert_close(stats.el2n, math.sqrt(2) * torch.sigmoid(-m), rtol=1e-6, atol=0)


@given(problems(kind='class'))
@settings(max_examples=100)
def test_the_norm_is_from_zero_to_root_two(q):
    el2n = q.stats().el2n
    el2n = el2n[~el2n.isnan()].double()
    assert ((0 <= el2n) & (el2n <= math.sqrt(2) * (1 + 1e-7))).all()


@each_dtype
def test_the_margin_is_one_subtraction_in_the_widened_type(dtype):
    q = problem(n=200, c=5, dtype=dtype, scale=50.)
    z, y = (q.pred if dtype in WIDE else q.pred.float()), q.targ[:, None]
    rival = z.scatter(1, y, -inf).amax(1)
    assert_close(q.stats().margin, z.gather(1, y)[:, 0] - rival, rtol=0, atol=0)


# -- the predicted class

@given(problems(ints=True, scale=1.))
@settings(max_examples=200)
def test_the_margin_is_positive_exactly_where_the_label_alone_has_the_largest_logit(q):
    stats = q.stats()
    z, y = q.pred.movedim(q.i, -1), (q.targ.argmax(q.i) if q.probs else q.targ)
    keep = stats.pred >= 0
    top = z.amax(-1, keepdim=True) == z
    assert_close(stats.pred[keep], z.argmax(-1)[keep], rtol=0, atol=0)
    assert_close((stats.margin > 0)[keep], (top.gather(-1, y.clamp_min(0)[..., None])[..., 0] & (top.sum(-1) == 1))[keep], rtol=0, atol=0)
    assert (stats.pred == y)[keep & (stats.margin > 0)].all()
    assert (stats.pred != y)[keep & (stats.margin < 0)].all()


def test_of_tied_classes_the_first_is_predicted_and_the_margin_is_zero():
    stats = xent_stats(torch.tensor([[1., 3., 3.], [2., 2., 2.], [0., 5., 5.]]), torch.tensor([2, 0, 0]))
    assert_close(stats.pred, torch.tensor([1, 0, 1]), rtol=0, atol=0)
    assert_close(stats.margin, torch.tensor([0., 0., -5.]), rtol=0, atol=0)


# -- infinite logits

INFINITE = {  # logits, label, the loss in the limit, its gradient in the limit (None: there is no limit)
    'a rival is impossible': ([1., -inf, 1.], 0, math.log(2), [-.5, 0., .5]),
    'all rivals are impossible': ([1., -inf, -inf], 0, 0., [0., 0., 0.]),
    'the label is impossible': ([-inf, 1., 1.], 0, inf, [-1., .5, .5]),
    'the label is impossible, one rival is not': ([-inf, -inf, 7.], 1, inf, [0., -1., 1.]),
    'the label is certain': ([inf, 1., 1.], 0, 0., [0., 0., 0.]),
    'a rival is certain': ([1., inf, 1.], 0, inf, [-1., 1., 0.]),
    'everything is impossible': ([-inf, -inf, -inf], 0, None, None),
    'label and rival are certain': ([inf, inf, 0.], 0, None, None),
    'a logit is nan': ([nan, 0., 1.], 2, None, None),
    'the logit of the label is nan': ([0., nan, 1.], 1, None, None),
}
each_infinite = pytest.mark.parametrize('z, y, loss, grad', INFINITE.values(), ids=INFINITE.keys())


def assert_limit_or_nan(ours, limit, theirs, **tol):
    "Equal to torch where torch is a number; elsewhere the limit or nan, never another number."
    assert_close(ours[~theirs.isnan()], theirs[~theirs.isnan()], **tol)
    if limit is None: assert ours.isnan().all()
    else: assert_close(ours[~ours.isnan()], limit.to(ours)[~ours.isnan()], **tol)


@each_infinite
@pytest.mark.parametrize('dtype', HALF + WIDE, ids=str)
def test_an_infinite_logit_never_gives_a_wrong_number(z, y, loss, grad, dtype):
    q = Problem(torch.tensor([z], dtype=dtype), torch.tensor([y]), dict(label_smoothing=0., ignore_index=-100), 1)
    rows, torch_grad = q._replace(pred=q.pred.float()).torch()
    stats, ours = q.stats(), q.grad()
    lim, glim = (None if loss is None else torch.tensor([loss])), (None if grad is None else torch.tensor([grad]))
    assert_limit_or_nan(stats.loss.float(), lim, rows, rtol=1e-6, atol=1e-7)
    assert_limit_or_nan(ours.float(), glim, torch_grad, rtol=1e-6, atol=1e-7)
    assert_limit_or_nan(stats.el2n.float(), None if glim is None else glim.norm(dim=1), torch.full((1,), nan), rtol=1e-6, atol=1e-7)
    assert_limit_or_nan(stats.p_targ.float(), None if lim is None else (-lim).exp(), torch.full((1,), nan), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('z, y, loss, grad', [v for k, v in INFINITE.items() if 'impossible' in k and 'everything' not in k])
def test_a_masked_class_is_as_good_as_absent(z, y, loss, grad):
    stats = xent_stats(torch.tensor([z]), torch.tensor([y]))
    assert_close(stats.loss, torch.tensor([loss]), rtol=1e-6, atol=0)
    assert_close(xent_grad(torch.tensor([z]), torch.tensor([y])), torch.tensor([grad]), rtol=1e-6, atol=0)
    assert_close(stats.el2n, torch.tensor([grad]).norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize('z, margin', [([-inf, 2., 1.], -inf), ([2., -inf, -inf], inf), ([3., -inf, 1.], 2.), ([inf, 0., 0.], inf)])
def test_the_margin_to_an_infinite_logit_is_infinite(z, margin):
    assert_close(xent_stats(torch.tensor([z]), torch.tensor([0])).margin, torch.tensor([margin]), rtol=0, atol=0)


@each_option
def test_masked_classes_in_random_places_agree_with_torch_where_torch_is_a_number(option):
    q = problem(n=40, c=5, **option)
    holes = torch.rand(q.pred.shape, generator=torch.Generator().manual_seed(1)) < .3
    q = q._replace(pred=q.pred.masked_fill(holes, -inf))
    rows, grad = q.torch()
    stats, keep = q.stats(), q.stats().pred >= 0
    known = ~rows.isnan() & keep
    assert known.any()
    assert_close(stats.loss[known], rows[known], rtol=1e-5, atol=1e-6)
    assert_close(q.grad()[~grad.isnan()], grad[~grad.isnan()], rtol=1e-5, atol=1e-6)


def test_a_distribution_may_give_nothing_to_an_impossible_class():
    pred, targ = torch.tensor([[0., -inf, 0.]]), torch.tensor([[.5, 0., .5]])
    assert F.cross_entropy(pred, targ).isnan()
    assert_close(xent_stats(pred, targ).loss, torch.tensor([math.log(2)]), rtol=1e-6, atol=0)
    assert_close(xent_grad(pred, targ), torch.zeros(1, 3), rtol=0, atol=1e-7)


@pytest.mark.parametrize('option', [{}, dict(label_smoothing=.1)])
def test_one_class_is_always_right(option):
    stats = xent_stats(torch.tensor([[3.], [-50.]]), torch.tensor([0, 0]), **option)
    for got, want in zip(stats, (0., 0., 0., 1., inf, 0)): assert_close(got, torch.full_like(got, want), rtol=0, atol=0)
    assert_close(xent_grad(torch.tensor([[3.]]), torch.tensor([0]), **option), torch.zeros(1, 1), rtol=0, atol=0)


@pytest.mark.parametrize('dtype', WIDE, ids=str)
def test_the_largest_numbers_of_the_type_do_not_overflow_to_nan(dtype):
    big = torch.finfo(dtype).max
    pred = torch.tensor([[big, -big, 0.], [-big, -big, -big], [big, big, -big]], dtype=dtype)
    stats = xent_stats(pred, torch.tensor([0, 1, 1]))
    assert_close(stats.loss, torch.tensor([0., math.log(3), math.log(2)], dtype=dtype), rtol=1e-6, atol=0)
    assert_close(stats.el2n, torch.tensor([0., math.sqrt(2/3), math.sqrt(.5)], dtype=dtype), rtol=1e-6, atol=0)


# -- ignored rows

IGNORING = {k: v for k, v in OPTIONS.items() if v.get('kind') != 'probs' and 'ignore_index' not in v}


@pytest.mark.parametrize('option', IGNORING.values(), ids=IGNORING.keys())
@pytest.mark.parametrize('ignore_index', [-100, -1, 2, 255])
def test_ignored_rows_are_marked_and_leave_the_others_alone(option, ignore_index):
    q = problem(n=6, d=(3,), c=5, **{**option, 'ignored': 0}, ignore_index=ignore_index)
    q = q._replace(targ=torch.where(q.targ == ignore_index, 0, q.targ))
    out = torch.zeros(6, 3, dtype=torch.bool)
    out[0, 1] = out[2] = out[5, 0] = True
    some = q._replace(targ=q.targ.masked_fill(out, ignore_index))
    whole, part = q.stats(), some.stats()
    for a, b in zip(part, whole): assert_close(a[~out], b[~out], rtol=0, atol=0)
    for k in NUMBERS: assert getattr(part, k)[out].isnan().all()
    assert (part.pred[out] == -1).all() and (part.pred[~out] >= 0).all()
    rows = lambda g: g.movedim(1, -1)
    assert_close(rows(some.grad())[~out], rows(q.grad())[~out], rtol=0, atol=0)
    assert_close(rows(some.grad())[out], torch.zeros(5, 5), rtol=0, atol=0)


@pytest.mark.parametrize('filler', [nan, inf, -inf])
@pytest.mark.parametrize('label_smoothing', [0., .1])
def test_the_logits_of_an_ignored_row_do_not_matter(filler, label_smoothing):
    pred, targ = torch.tensor([[1., 2., 3.], [filler] * 3]), torch.tensor([1, -100])
    stats, alone = (xent_stats(p, t, label_smoothing=label_smoothing) for p, t in ((pred, targ), (pred[:1], targ[:1])))
    for a, b in zip(stats, alone): assert_close(a[:1], b, rtol=1e-6, atol=0)
    assert stats.pred[1] == -1 and all(o[1].isnan() for o in stats[:-1])
    assert_close(xent_grad(pred, targ, label_smoothing=label_smoothing)[1], torch.zeros(3), rtol=0, atol=0)


def test_a_class_may_be_the_ignored_one_and_distributions_ignore_nothing():
    stats = xent_stats(torch.zeros(2, 3), torch.tensor([2, 1]), ignore_index=2)
    assert_close(stats.pred, torch.tensor([-1, 0]), rtol=0, atol=0)
    assert not xent_stats(torch.zeros(2, 3), torch.eye(3)[:2], ignore_index=0).loss.isnan().any()


# -- good manners

@each_option
@pytest.mark.parametrize('dtype', [torch.float16, *WIDE], ids=str)
def test_arguments_stay_as_they_were_and_results_carry_no_graph(option, dtype):
    q = problem(**option, dtype=dtype)
    tensors = [q.pred, q.targ, *([q.kw['weight']] if 'weight' in q.kw else [])]
    before = [(o.clone(), o._version) for o in tensors]
    q.pred.requires_grad_()
    for o in (*q.stats(), q.grad()): assert not o.requires_grad and o.grad_fn is None
    for o, (was, version) in zip(tensors, before):
        assert_close(o.detach(), was, rtol=0, atol=0)
        assert o._version == version
    assert q.pred.requires_grad and q.pred.grad is None


def test_results_do_not_share_memory_with_the_arguments():
    for q in (problem(), problem(label_smoothing=.1), problem(kind='probs')):
        mine = {o.untyped_storage().data_ptr() for o in (q.pred, q.targ)}
        assert not mine & {o.untyped_storage().data_ptr() for o in (*q.stats(), q.grad())}


@each_option
def test_fastai_s_tensors_are_welcome(option):
    q = problem(d=(2, 3), **option)
    like = TensorImage if q.probs else TensorMask
    sub = q._replace(pred=TensorImage(q.pred), targ=like(q.targ))
    for a, b in zip((*sub.stats(), sub.grad()), (*q.stats(), q.grad())):
        assert type(a) is Tensor
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert type(sub.pred) is TensorImage and type(sub.targ) is like


def test_categories_are_welcome():
    pred, targ = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1])
    for a, b in zip(xent_stats(TensorImage(pred), TensorCategory(targ)), xent_stats(pred, targ)): assert_close(a, b, rtol=0, atol=0)


@each_option
def test_strided_and_expanded_arguments_give_the_same(option):
    q = problem(n=4, d=(6,), **option)
    wide = torch.zeros(*q.pred.shape, 2)
    wide[..., 0] = q.pred
    strided = q._replace(pred=wide[..., 0], targ=q.targ.movedim(0, -1).contiguous().movedim(-1, 0))
    assert not strided.pred.is_contiguous() and not strided.targ.is_contiguous()
    for a, b in zip((*strided.stats(), strided.grad()), (*q.stats(), q.grad())): assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)
    one = q._replace(pred=q.pred[:1], targ=q.targ[:1])
    many = one._replace(pred=one.pred.expand(3, -1, -1), targ=one.targ.expand(3, *one.targ.shape[1:]))
    for a, b in zip((*many.stats(), many.grad()), (*one.stats(), one.grad())): assert_close(a, b.expand_as(a), rtol=1e-6, atol=1e-7, equal_nan=True)


# -- the derivative of softmax

@pytest.mark.parametrize('shape', [(1,), (5,), (3, 4), (2, 3, 4), (0, 4)], ids=str)
def test_softmax_jacobian_is_that_of_autograd(shape):
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    J = softmax_jacobian(z.softmax(-1))
    assert J.shape == (*shape, shape[-1])
    rows = [torch.autograd.functional.jacobian(lambda o: o.softmax(0), row) for row in z.reshape(-1, shape[-1])]
    want = torch.stack(rows).view(J.shape) if rows else torch.zeros(J.shape, dtype=z.dtype)
    assert_close(J, want, rtol=1e-12, atol=1e-14)


def test_through_the_jacobian_the_gradient_is_prediction_minus_target():
    q = problem(dtype=torch.float64)
    p, y = q.pred.softmax(1), F.one_hot(q.targ, 4).double()
    assert_close(torch.einsum('nji,nj->ni', softmax_jacobian(p), -y / p), q.grad(), rtol=1e-10, atol=1e-12)


# -- refusals

Z, Y = torch.zeros(8, 10), torch.zeros(8, dtype=torch.long)
IMG, MASK = torch.zeros(2, 5, 3, 4), torch.zeros(2, 3, 4, dtype=torch.long)
W = torch.ones(10)


def at(y, where, value):
    y = y.clone()
    y[where] = value
    return y


REFUSALS = {
    'integer logits': (TypeError, r'pred has dtype torch.int64, expected floating-point logits; use `pred.float\(\)`', (Z.long(), Y), {}),
    'complex logits': (TypeError, r'pred has dtype torch.complex64, expected floating-point logits', (Z.cfloat(), Y), {}),
    'a scalar': (ValueError, r'pred is a scalar, expected logits of shape \[n, c\]', (torch.tensor(1.), torch.tensor(0)), {}),
    'no class': (ValueError, r'pred has shape \[8, 0\]: no class in axis 1', (Z[:, :0], Y), {}),
    'no class in a single row': (ValueError, r'pred has shape \[0\]: no class in axis 0', (torch.zeros(0), torch.tensor(0)), {}),
    'no class, axis -1': (ValueError, r'pred has shape \[8, 2, 0\]: no class in axis 2', (torch.zeros(8, 2, 0), torch.zeros(8, 2, dtype=torch.long)), dict(axis=-1)),
    'axis too large': (IndexError, r'axis is 2, but pred of shape \[8, 10\] has axes 0 to 1', (Z, Y), dict(axis=2)),
    'axis too small': (IndexError, r'axis is -3, but pred of shape \[8, 10\] has axes 0 to 1', (Z, Y), dict(axis=-3)),
    'a column of targets': (ValueError, r'targ has shape \[8, 1\], expected \[8\] for pred \[8, 10\]; use `targ.squeeze\(1\)`', (Z, Y[:, None]), {}),
    'a row of targets': (ValueError, r'targ has shape \[1, 8\], expected \[8\].*use `targ.squeeze\(0\)`', (Z, Y[None]), {}),
    'a channel in the mask': (ValueError, r'targ has shape \[2, 1, 3, 4\], expected \[2, 3, 4\].*use `targ.squeeze\(1\)`', (IMG, MASK[:, None]), {}),
    'too few targets': (ValueError, r'targ has shape \[7\], expected \[8\] for pred \[8, 10\]$', (Z, Y[:7]), {}),
    'the right count in the wrong shape': (ValueError, r'targ has shape \[2, 4\], expected \[8\]', (Z, Y.view(2, 4)), {}),
    'classes in another axis': (ValueError, r'targ has shape \[2, 3, 4\], expected \[2, 5, 4\].*not in axis 2, say so with `axis=`', (IMG, MASK), dict(axis=2)),
    'float classes': (TypeError, r'targ has dtype torch.float32 and shape \[8\].*probabilities of shape \[8, 10\].*use `targ.long\(\)`', (Z, Y.float()), {}),
    'probabilities of another shape': (ValueError, r'targ has dtype torch.float32 and shape \[8, 9\]; expected probabilities of shape \[8, 10\]', (Z, Z[:, :9]), {}),
    'bool targets': (TypeError, r'targ has dtype torch.bool, expected integer classes or probabilities; use `targ.long\(\)`', (Z, Y.bool()), {}),
    'a class too large': (IndexError, r'targ\[3\] is 10, expected a class from 0 to 9 or ignore_index=-100; 1 row is out of range', (Z, at(Y, 3, 10)), {}),
    'two classes out of range': (IndexError, r'targ\[1\] is -1, .*; 2 rows are out of range', (Z, at(at(Y, 5, 10), 1, -1)), {}),
    'a pixel out of range': (IndexError, r'targ\[1, 2, 3\] is 255, expected a class from 0 to 4', (IMG, at(MASK, (1, 2, 3), 255)), {}),
    'another ignore_index': (IndexError, r'targ\[0\] is -100, .*ignore_index=255', (Z, at(Y, 0, -100)), dict(ignore_index=255)),
    'a scalar out of range': (IndexError, r'targ is 10, expected a class from 0 to 9', (Z[0], torch.tensor(10)), {}),
    'out of range with smoothing': (IndexError, r'targ\[7\] is 99', (Z, at(Y, 7, 99)), dict(label_smoothing=.1)),
    'too few weights': (ValueError, r'weight has shape \[9\], expected \[10\]: one number a class', (Z, Y), dict(weight=W[1:])),
    'a matrix of weights': (ValueError, r'weight has shape \[1, 10\], expected \[10\]', (Z, Y), dict(weight=W[None])),
    'a scalar weight': (ValueError, r'weight has shape \[\], expected \[10\]', (Z, Y), dict(weight=torch.tensor(1.))),
    'an infinite weight': (ValueError, r'weight\[4\] is -inf, expected finite numbers', (Z, Y), dict(weight=at(W, 4, -inf))),
    'a nan weight': (ValueError, r'weight\[2\] is nan, expected finite numbers', (Z, Y), dict(weight=at(W, 2, nan))),
    'weights by name': (TypeError, r'weight is a dict of 2, expected a tensor of class weights', (Z, Y), dict(weight=dict(a=1., b=2.))),
    'a list of weights': (TypeError, r'weight is a list of 10, .*`torch.as_tensor\(weight\)`', (Z, Y), dict(weight=[1.] * 10)),
    'smoothing below 0': (ValueError, r'label_smoothing is -0.1, expected a number from 0 to 1', (Z, Y), dict(label_smoothing=-.1)),
    'smoothing above 1': (ValueError, r'label_smoothing is 1.5, expected a number from 0 to 1', (Z, Y), dict(label_smoothing=1.5)),
    'smoothing nan': (ValueError, r'label_smoothing is nan, expected a number from 0 to 1', (Z, Y), dict(label_smoothing=nan)),
}


@pytest.mark.parametrize('fn', [xent_stats, xent_grad])
@pytest.mark.parametrize('error, message, args, kw', REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(fn, error, message, args, kw):
    with pytest.raises(error, match=message): fn(*args, **kw)


@pytest.mark.parametrize('args, kw', [((Z, Y), dict(axis=1)), ((Z, Y), dict(axis=-1)), ((Z, at(Y, 0, -100)), {}), ((Z, Y), dict(weight=W)), ((Z, Y), dict(weight=-W)),
                                      ((Z, Y), dict(label_smoothing=1)), ((IMG, MASK), {}), ((Z, Z), {})])
def test_what_is_right_is_not_refused(args, kw):
    assert xent_stats(*args, **kw).loss.shape == (8,) if args[0] is Z else MASK.shape
    assert xent_grad(*args, **kw).shape == args[0].shape
