"Asking a loss for its rows: the answer is true, or there is none and a reason; and the loss is as it was."
import copy
import functools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.losses import BaseLoss, CrossEntropyLossFlat, FocalLoss, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from torch import nn
from torch.testing import assert_close

from fastai_xent.asking import Asked, alike, copied, generators, random_kept
from fastai_xent.batch import read_batch
from fastai_xent.losses import XentLoss, XentLossFlat
from fastai_xent.rowloss import row_stats, xent_settings
from fastai_xent.rows import RowBuffer

N, C = 24, 4
GEN = torch.Generator().manual_seed(0)
PRED, TARG = torch.randn(N, C, generator=GEN), torch.randint(0, C, (N,), generator=GEN)
W = torch.tensor([1., 2., .5, .25])

def ce(z, y): return F.cross_entropy(z, y, reduction='none')
def focal_rows(z, y): return (1 - (-ce(z, y)).exp())**2 * ce(z, y)

def truth(rows, z, y):
    "Loss and gradient norm of each row, by a loop in float64."
    z = z.double().requires_grad_()
    losses = rows(z, y)
    grad, = torch.autograd.grad(losses.sum(), z)
    return losses.detach().float(), grad.norm(dim=1).float()


# -- losses that people write

def plain_focal(z, y): return focal_rows(z, y).mean()
def summed_focal(z, y): return focal_rows(z, y).sum()
def focal_with_reduction(z, y, gamma=2., reduction='mean'):
    rows = (1 - (-ce(z, y)).exp())**gamma * ce(z, y)
    return rows if reduction == 'none' else rows.mean() if reduction == 'mean' else rows.sum()
def by_index(z, y): return -z.log_softmax(1)[torch.arange(len(y)), y].mean()
def by_one_hot(z, y): return -(F.one_hot(y, z.shape[1]) * z.log_softmax(1)).sum(1).mean()
def by_scatter(z, y): return -(torch.zeros_like(z).scatter_(1, y[:, None], 1.) * z.log_softmax(1)).sum(1).mean()

class Focal(nn.Module):
    "No `reduction`; a buffer and a number."
    def __init__(self):
        super().__init__()
        self.gamma = 2
        self.register_buffer('one', torch.ones(()))
    def forward(self, z, y): return ((self.one - (-ce(z, y)).exp())**self.gamma * ce(z, y)).mean()

class Reducing(nn.Module):
    "A `reduction` that is read when it is called."
    def __init__(self, reduction='mean'):
        super().__init__()
        self.reduction = reduction
    def forward(self, z, y): return focal_with_reduction(z, y, reduction=self.reduction)

class Fixed(nn.Module):
    "A `reduction` that is read when it is made: setting it does nothing."
    def __init__(self, reduction='mean'):
        super().__init__()
        self.reduction, self.inner = reduction, Reducing(reduction)
    def forward(self, z, y): return self.inner(z, y)

class NoModule:
    def __call__(self, z, y): return plain_focal(z, y)
    def method(self, z, y): return plain_focal(z, y)

class Penalised(nn.CrossEntropyLoss):
    "A cross-entropy by name, and more."
    def forward(self, z, y): return super().forward(z, y) + .1 * z.square().mean()
class PenalisedFlat(CrossEntropyLossFlat):
    def __call__(self, z, y, **kw): return super().__call__(z, y, **kw) + .1 * z.square().mean()
class PenalisedXent(XentLoss):
    def forward(self, z, y): return super().forward(z, y) + .1 * z.square().mean()
class PenalisedXentFlat(XentLossFlat):
    def __call__(self, z, y, reduction=None): return super().__call__(z, y) + .1 * z.square().mean()
def penalised_rows(z, y): return ce(z, y) + .1 * z.square().mean(1)

def around(scale):
    "A function that keeps a module, a tensor and a number in the variables around it."
    inner, factor = nn.CrossEntropyLoss(), torch.tensor(scale)
    return lambda z, y: inner(z, y) * factor * scale

ASKED = {
    'function': (plain_focal, focal_rows), 'sum': (summed_focal, focal_rows), 'argument': (focal_with_reduction, focal_rows),
    'partial': (functools.partial(focal_with_reduction, gamma=2., reduction='sum'), focal_rows), 'partial of a function': (functools.partial(plain_focal), focal_rows),
    'index': (by_index, ce), 'one_hot': (by_one_hot, ce), 'scatter': (by_scatter, ce),
    'module': (Focal(), focal_rows), 'reduction': (Reducing(), focal_rows), 'reduction sum': (Reducing('sum'), focal_rows), 'fixed reduction': (Fixed(), focal_rows),
    'fixed sum': (Fixed('sum'), focal_rows), 'callable': (NoModule(), focal_rows), 'method': (NoModule().method, focal_rows), 'BaseLoss': (BaseLoss(Focal), focal_rows),
    'closure': (around(2.), lambda z, y: 4 * ce(z, y)), 'derived from nn.CrossEntropyLoss': (Penalised(), penalised_rows),
    'derived from XentLoss': (PenalisedXent(), penalised_rows), 'derived from XentLossFlat': (PenalisedXentFlat(), penalised_rows), 'derived from CrossEntropyLossFlat': (PenalisedFlat(), penalised_rows),
    'FocalLossFlat': (FocalLossFlat(), focal_rows), 'weighted FocalLossFlat': (FocalLossFlat(weight=W), lambda z, y: (1 - (-F.cross_entropy(z, y, W.to(z), reduction='none')).exp())**2 * F.cross_entropy(z, y, W.to(z), reduction='none')),
    'label smoothing': (LabelSmoothingCrossEntropyFlat(eps=.2), lambda z, y: F.cross_entropy(z, y, reduction='none', label_smoothing=.2)), 'margin': (nn.MultiMarginLoss(), lambda z, y: F.multi_margin_loss(z, y, reduction='none')),
    'a builtin function': (F.multi_margin_loss, lambda z, y: F.multi_margin_loss(z, y, reduction='none'))}

@pytest.mark.parametrize('n', [1, 3, N])
@pytest.mark.parametrize('name', ASKED)
def test_the_rows_of_a_loss_are_those_of_autograd(name, n):
    loss_func, rows = ASKED[name]
    if name == 'derived from XentLossFlat' or name == 'derived from CrossEntropyLossFlat': assert xent_settings(loss_func) is None
    asked = Asked(loss_func, PRED[:n], TARG[:n])
    assert asked.way is not None and asked.why == '', asked.why
    for got, want in zip(asked(PRED[:n], TARG[:n]), truth(rows, PRED[:n], TARG[:n])): assert_close(got, want, rtol=1e-4, atol=1e-6)
    if n > 1: assert asked.reduction == ('sum' if 'sum' in name or name == 'partial' else 'mean')

@pytest.mark.parametrize('name', ASKED)
def test_another_batch_than_the_one_that_was_tried(name):
    loss_func, rows = ASKED[name]
    asked, z, y = Asked(loss_func, PRED, TARG), PRED.flip(0)[:7] * 3, (TARG + 1)[:7] % C
    for got, want in zip(asked(z, y), truth(rows, z, y)): assert_close(got, want, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('name', ['function', 'argument', 'FocalLossFlat', 'module'])
def test_mixed_rows_are_asked_for_both_targets(name):
    loss_func, rows = ASKED[name]
    lam, other = torch.rand(N, generator=torch.Generator().manual_seed(1)), TARG.flip(0)
    loss, norm = Asked(loss_func, PRED, TARG)(PRED, TARG, (other, lam))
    want = truth(lambda z, y: lam * rows(z, y) + (1 - lam) * rows(z, other), PRED, TARG)
    assert_close((loss, norm), want, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_precision(dtype):
    z = PRED.to(dtype)
    for got, want in zip(Asked(plain_focal, z, TARG)(z, TARG), truth(focal_rows, z, TARG)): assert_close(got.float(), want, rtol=1e-4, atol=1e-6)

def test_masks_are_asked_for_their_pixels():
    "fastai's loss gives them flat and in another order; what it calls does not."
    z, y = torch.randn(3, C, 4, 5, generator=torch.Generator().manual_seed(2)), torch.randint(0, C, (3, 4, 5))
    for loss_func in (FocalLossFlat(axis=1), Reducing(), BaseLoss(Reducing, axis=1)):
        loss, norm = Asked(loss_func, z, y)(z, y)
        assert_close(loss, focal_rows(z, y))
        assert norm.shape == y.shape
    assert 'many targets' in Asked(plain_focal, z, y).why
    last = z.movedim(1, -1)
    assert_close(Asked(FocalLossFlat(), last, y)(last, y)[0], focal_rows(z, y))

def test_rows_that_are_ignored_have_no_loss():
    y = TARG.clone()
    y[::3] = -100
    loss, norm = Asked(FocalLossFlat(), PRED, y)(PRED, y)
    assert torch.equal(torch.isnan(loss), y == -100) and torch.equal(torch.isnan(norm), y == -100)
    class Forgiving(nn.Module):
        reduction, ignore_index = 'mean', 9
        def forward(self, z, y): return F.cross_entropy(z, y, ignore_index=9, reduction=self.reduction)
    y = torch.where(y < 0, 9, y)
    loss, norm = Asked(Forgiving(), PRED, y)(PRED, y)
    assert_close(loss[y != 9], ce(PRED, y.clamp_max(3))[y != 9])
    assert torch.equal(torch.isnan(loss), y == 9)

def test_code_that_vmap_does_not_follow():
    "One call after the other, where they are few."
    def loss_func(z, y): return ce(z, y)[y >= 0].mean() if y.min().item() >= 0 else None
    for got, want in zip(Asked(loss_func, PRED[:8], TARG[:8])(PRED[:8], TARG[:8]), truth(ce, PRED[:8], TARG[:8])): assert_close(got, want)
    asked = Asked(loss_func, PRED, TARG)
    assert asked.way is None and 'when it is asked' in asked.why


# -- losses that are not asked

def hardest(z, y): return ce(z, y).topk(12).values.mean()
def above(z, y): return ce(z, y)[ce(z, y) > 1].mean()
def weighted(z, y): return F.cross_entropy(z, y, weight=W)
def with_row_weights(z, y, w): return (ce(z, y) * w).mean()
def noisy(z, y): return F.cross_entropy(z + torch.randn_like(z), y)
def by_luck(z, y): return plain_focal(z, y) * (1 + random.random())
def by_numpy(z, y): return plain_focal(z, y) + np.random.rand()
def contrast(z, y): return plain_focal(z, y) + z.softmax(1).mean(0).square().sum()
class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(.5)
    def forward(self, z, y): return ce(self.drop(z), y).mean()
class Counts(nn.Module):
    "Counts its calls."
    calls = 0
    def forward(self, z, y):
        self.calls += 1
        return plain_focal(z, y)
class Averages(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer('mean', torch.ones(()))
    def forward(self, z, y):
        loss = plain_focal(z, y)
        if self.in_place: self.mean.mul_(.9).add_(.1 * loss.detach())
        else: self.mean = self.mean * .9 + .1 * loss.detach()
        return loss / self.mean
class Remembers:
    def __init__(self): self.seen, self.stats = [], dict(n=0)
    def __call__(self, z, y):
        self.seen.append(z.detach())
        self.stats['n'] += len(z)
        return plain_focal(z, y)
def counter():
    calls, total = 0, torch.zeros(())
    def loss_func(z, y):
        nonlocal calls
        calls += 1
        total.add_(1)
        return plain_focal(z, y)
    return loss_func
N_CALLS, SEEN = 0, []
def counts_globally(z, y):
    global N_CALLS
    N_CALLS += 1
    SEEN.append(1)
    return plain_focal(z, y)
def counts_in_itself(z, y):
    counts_in_itself.calls += 1
    return plain_focal(z, y)
counts_in_itself.calls = 0
class Big(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(1024, 1024)
    def forward(self, z, y): return plain_focal(z, y) + self.model.weight.square().mean()
class Vector(nn.Module):
    def forward(self, z, y): return ce(z, y)

NOT_ASKED = {
    'hardest': (hardest, 'when it is asked'), 'above': (above, 'when it is asked'), 'class weights': (weighted, 'neither by their mean nor by their sum'),
    'row weights': (functools.partial(with_row_weights, w=torch.rand(N)), 'neither by their mean nor by their sum'), 'the batch as a whole': (contrast, 'neither by their mean nor by their sum'),
    'noise': (noisy, 'draws random numbers'), 'luck': (by_luck, 'draws random numbers'), 'numpy': (by_numpy, 'draws random numbers'), 'dropout': (Dropped(), 'draws random numbers'),
    'count': (Counts(), 'keeps something'), 'average in place': (Averages(True), 'keeps something'), 'average': (Averages(False), 'keeps something'), 'memory': (Remembers(), 'keeps something'),
    'closure': (counter(), 'keeps something'), 'global': (counts_globally, 'keeps something'), 'its own attribute': (counts_in_itself, 'keeps something'),
    'a model': (Big(), 'too much to copy'), 'no scalar': (Vector(), 'neither by their mean nor by their sum')}

def everything(f):
    "What a loss keeps, wherever."
    if isinstance(f, nn.Module): return copy.deepcopy(f.__dict__)
    if hasattr(f, '__closure__') and f.__closure__: return copy.deepcopy([c.cell_contents for c in f.__closure__ if not callable(c.cell_contents)])
    return copy.deepcopy(vars(f)) if hasattr(f, '__dict__') else None

@pytest.mark.parametrize('name', NOT_ASKED)
def test_a_loss_that_is_not_asked_says_why_and_stays_as_it_was(name):
    loss_func, why = NOT_ASKED[name]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before, kept = (N_CALLS, len(SEEN)), everything(loss_func)
    asked = Asked(loss_func, PRED, TARG)
    assert asked.way is None and why in asked.why, asked.why
    assert (N_CALLS, len(SEEN)) == before and alike(kept, everything(loss_func))
    loss, norm = asked(PRED, TARG)
    assert torch.isnan(loss).all() and torch.isnan(norm).all() and loss.shape == norm.shape == TARG.shape
    drawn = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    assert torch.equal(drawn[0], torch.rand(3)) and (drawn[1] == np.random.rand(3)).all() and drawn[2] == random.random()

def test_a_first_batch_of_one_class_and_of_hard_rows_does_not_mislead():
    "Class weights and thresholds show only where rows differ."
    z, y = PRED * .1, torch.zeros(N, dtype=torch.long)
    for loss_func in (weighted, above):
        assert_close(loss_func(z, y), ce(z, y).mean())
        assert Asked(loss_func, z, y).way is None

def test_nan_agrees_with_nothing():
    "A loss on probabilities that gets logits: all of it is nan, and nothing is known of its rows."
    def of_probs(z, y): return -z.log()[torch.arange(len(y)), y].topk(2).values.mean()
    assert Asked(of_probs, -PRED.abs() - 1, TARG).way is None
    def rows(z, y): return -z.log()[torch.arange(len(y)), y]
    p = PRED.softmax(1)
    assert_close(Asked(lambda z, y: rows(z, y).mean(), p, TARG)(p, TARG)[0], rows(p, TARG))

def test_the_reason_is_the_same_in_each_pass():
    "So that it is told once."
    for loss_func, _ in NOT_ASKED.values(): assert Asked(loss_func, PRED, TARG).why == Asked(loss_func, PRED.flip(0) * 2, TARG.flip(0)).why

def test_no_trace_in_a_loss_that_is_asked():
    "Neither in the loss, nor in what the last call of the training left behind, nor in gradients."
    loss_func = PenalisedXent(W)
    z = PRED.clone().requires_grad_()
    loss = loss_func(z, TARG)
    before, stats = everything(loss_func), [o.clone() for o in loss_func.stats]
    last = loss_func._last
    Asked(loss_func, PRED, TARG)(PRED, TARG)
    assert loss_func._last is last and all(torch.equal(a, b) for a, b in zip(stats, loss_func.stats)) and before.keys() == vars(loss_func).keys()
    loss.backward()
    want, = torch.autograd.grad(PenalisedXent(W)(leaf := PRED.clone().requires_grad_(), TARG), leaf)
    assert torch.equal(z.grad, want)
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, z, y): return ce(z * self.scale, y).mean()
    loss_func = Learned()
    assert Asked(loss_func, PRED, TARG)(PRED, TARG)[0].isfinite().all() and loss_func.scale.grad is None

def test_a_loss_that_changes_between_batches_is_asked_as_it_is():
    "A schedule of its settings counts; so does an error that comes later."
    loss_func = Focal()
    asked = Asked(loss_func, PRED, TARG)
    loss_func.gamma = 0
    assert_close(asked(PRED, TARG)[0], ce(PRED, TARG))
    loss_func.gamma = None
    assert torch.isnan(asked(PRED, TARG)[0]).all() and 'TypeError' in asked.why

def test_a_compiled_loss_is_asked_as_it_was_before():
    compiled = torch.compile(Focal(), backend='eager')
    assert isinstance(Asked(compiled, PRED, TARG).loss, Focal)
    assert_close(Asked(compiled, PRED, TARG)(PRED, TARG)[0], focal_rows(PRED, TARG))
    assert xent_settings(torch.compile(nn.CrossEntropyLoss(weight=W), backend='eager')).weight is not None
    assert Asked(torch.compile(plain_focal, backend='eager'), PRED, TARG).loss is plain_focal

def test_hooks_of_a_loss_do_not_hear_that_it_is_asked():
    loss_func, heard = Focal(), []
    loss_func.register_forward_hook(lambda *_: heard.append(1))
    asked = Asked(loss_func, PRED, TARG)
    asked(PRED, TARG)
    assert not heard and asked.way is not None

def test_random_states_come_back_after_an_error():
    torch.manual_seed(0)
    want = torch.rand(2)
    torch.manual_seed(0)
    with pytest.raises(KeyError), random_kept():
        torch.rand(5)
        raise KeyError
    assert torch.equal(torch.rand(2), want)

@pytest.mark.parametrize('loss_func', [copied(plain_focal), copied(around(2.)), copied(functools.partial(plain_focal)), copied(Focal())], ids=['function', 'closure', 'partial', 'module'])
def test_a_copy_computes_the_same(loss_func): assert torch.isfinite(loss_func(PRED, TARG))


# -- models that end in LogSoftmax

def own_nll(z, y): return -z.gather(1, y[:, None]).mean()
def focal_of_log_probs(z, y):
    logp = z.gather(1, y[:, None])
    return -((1 - logp.exp())**2 * logp).mean()

@pytest.mark.parametrize('n', [1, N])
def test_the_gradient_of_log_probabilities_is_that_in_the_logits_below(n):
    for loss_func, rows in ((own_nll, ce), (focal_of_log_probs, focal_rows)):
        got = Asked(loss_func, PRED[:n].log_softmax(1), TARG[:n])(PRED[:n].log_softmax(1), TARG[:n])
        for a, b in zip(got, truth(rows, PRED[:n], TARG[:n])): assert_close(a, b, rtol=1e-4, atol=1e-6)

def test_the_gradient_of_mixed_log_probabilities():
    lam, other = torch.rand(N, generator=torch.Generator().manual_seed(1)), TARG.flip(0)
    z = PRED.log_softmax(1)
    want = truth(lambda z, y: lam * ce(z, y) + (1 - lam) * ce(z, other), PRED, TARG)
    assert_close(Asked(own_nll, z, TARG)(z, TARG, (other, lam)), want, rtol=1e-4, atol=1e-6)


# -- generators of one's own

class Holder:
    of_class = np.random.default_rng(3)
    def __init__(self):
        hidden = np.random.RandomState(1)
        def f(): return hidden.rand()
        self.parts = dict(a=[np.random.default_rng(0), random.Random(2)], b=(torch.Generator(),), c=[f, functools.partial(f)], d=np.random.PCG64(5))
        self.me, self.data = self, list(range(10**5))

def test_generators_are_found_and_kept():
    o = Holder()
    def draw():
        a, b = o.parts['a']
        return a.random(), b.random(), torch.rand(1, generator=o.parts['b'][0]).item(), o.parts['c'][0](), o.of_class.random(), o.parts['d'].random_raw()
    found = generators([o])
    assert len(found) == 6
    with random_kept(own=found): first = draw()
    assert draw() == first
    assert generators(random.SystemRandom(), 3, None, torch.zeros(3)) == []

def test_a_library_s_wrapper_leads_to_what_it_wraps():
    "The variables around a library's function are its own; what it encloses may be the user's."
    gen, around = torch.Generator(), dict(__name__='pandas.core', rng=torch.Generator())
    def mine(): return gen
    exec('def wrap(f): return lambda: (rng, f())', around)
    assert generators(around['wrap'](mine)) == [gen]

# -- fastai's focal loss, which is known

def by_autograd(loss_func, z, y):
    "Loss and gradient norm of each row, as torch computes them in float64."
    z, func = z.detach().double().requires_grad_(), copy.deepcopy(loss_func.func)
    if func.weight is not None: func.weight = func.weight.double()
    loss = func(z, y)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0].norm(dim=1)

@pytest.mark.parametrize('c, scale', [(5, 1), (5, 6), (200, 4), (2, 15)])
@pytest.mark.parametrize('weight', [None, 'positive', 'negative'])
@pytest.mark.parametrize('gamma', [0, 1, 1.5, 2., 5])
def test_focal_loss_is_what_torch_makes_of_it(gamma, weight, c, scale):
    gen = torch.Generator().manual_seed(0)
    z, y = torch.randn(100, c, generator=gen) * scale, torch.randint(0, c, (100,), generator=gen)
    w = None if weight is None else torch.linspace(.5 if weight == 'positive' else -1., 2, c)
    if weight == 'negative' and gamma not in (0, 1, 2): pytest.skip('a power of a negative number is nan, or too large')
    want = by_autograd(FocalLossFlat(gamma=gamma, weight=w, reduction='none'), z, y)
    loss_func = FocalLossFlat(gamma=gamma, weight=w)
    assert xent_settings(loss_func).gamma == gamma
    stats = row_stats(loss_func, z, y)
    assert_close(stats.loss.double(), want[0], rtol=2e-5, atol=1e-9)
    assert_close(stats.grad_norm.double(), want[1], rtol=2e-5, atol=1e-9)
    assert_close(stats.el2n, row_stats(nn.CrossEntropyLoss(), z, y).el2n)

@pytest.mark.parametrize('gamma', [1, 2])
def test_focal_loss_of_certain_rows(gamma):
    "Right ones have neither loss nor gradient, wrong ones those of cross-entropy; nothing is nan."
    z, y = torch.tensor([[90., 0, 0], [0, 90., 0], [0, 0, 9.]]), torch.tensor([0, 0, -100])
    stats = row_stats(FocalLossFlat(gamma=gamma), z, y)
    assert_close(stats.loss[:2], torch.tensor([0., 90.]))
    assert_close(stats.grad_norm[:2], torch.tensor([0., 2**.5]))
    assert stats.loss[2].isnan() and stats.pred[2] == -1

@pytest.mark.parametrize('change', [dict(gamma=.5), dict(gamma=-1), dict(gamma=torch.tensor(2.)), dict(reduction='other')], ids=str)
def test_other_focal_losses_are_asked(change): assert xent_settings(FocalLossFlat(**change)) is None

def test_a_focal_loss_of_ones_own_is_asked():
    class Mine(FocalLoss):
        def forward(self, inp, targ): return super().forward(inp, targ) * 2
    patched = FocalLoss()
    patched.forward = lambda z, y: z.sum()
    assert [xent_settings(o) for o in (Mine(), patched)] == [None, None]

@pytest.mark.parametrize('n, c', [(8, 5), (64, 100)], ids=['small', 'large'])
def test_focal_losses_with_another_gamma_do_not_mix(n, c):
    "Rows that wait are computed with the gamma they were trained with."
    gen, rows = torch.Generator().manual_seed(0), RowBuffer(4 * n)
    batches = [(torch.randn(n, c, generator=gen), torch.randint(0, c, (n,), generator=gen)) for _ in range(4)]
    losses = [FocalLossFlat(gamma=g) for g in (2, 2, 1, 0)]
    for i, ((z, y), f) in enumerate(zip(batches, losses)):
        rows.add(i, read_batch(SimpleNamespace(pred=z, yb=(y,), loss_func=f, loss=f(z, y))), i)
    want = torch.cat([by_autograd(FocalLossFlat(gamma=f.func.gamma, reduction='none'), z, y)[0] for (z, y), f in zip(batches, losses)])
    assert_close(torch.tensor(rows.cols()['loss']).double(), want, rtol=2e-5, atol=1e-7)
    assert not rows.balance().differ.any()
