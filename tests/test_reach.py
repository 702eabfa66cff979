"What a loss can reach: a loss that leads to what a copy does not have for itself is not called."
import copy
import functools
import itertools
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.losses import BaseLoss
from torch import nn

from fastai_xent.asking import Asked
from fastai_xent.reach import Names, Reach, names_of

GEN = torch.Generator().manual_seed(0)
PRED, TARG = torch.randn(24, 4, generator=GEN), torch.randint(0, 4, (24,), generator=GEN)
HISTORY, STEP, WEIGHTS = [], 0, torch.ones(4)

def ce(z, y): return F.cross_entropy(z, y)

class Counter:
    "Counts its calls."
    def __init__(self): self.n = 0
    def __call__(self):
        self.n += 1
        return self.n
    def method(self): return self()

class Averages:
    m = torch.ones(4)
    def __call__(self, z):
        self.m = .9 * self.m + .1 * z.detach().mean(0)
        return z - self.m

def factor():
    global STEP
    STEP += 1
    return min(1, STEP / 20)
def remember(v):
    HISTORY.append(1)
    return v * min(1, len(HISTORY) / 20)
def with_default(v, seen=[]):
    seen.append(1)
    return v * len(seen)
def counts(v):
    counts.n += 1
    return v
counts.n = 0
class Shared(nn.Module):
    n = 0
    def forward(self, z, y):
        Shared.n += 1
        return ce(z, y) * min(1, Shared.n / 20)
class SharedTensor(nn.Module):
    m = torch.zeros(4)
    def forward(self, z, y):
        SharedTensor.m = .9 * SharedTensor.m + .1 * z.detach().mean(0)
        return ce(z - SharedTensor.m, y)
class Reads(nn.Module):
    def forward(self, z, y): return remember(ce(z, y))
class Holds(nn.Module):
    "A function in an attribute is not copied."
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, z, y): return self.f(ce(z, y))
class OwnCopy(nn.Module):
    def __deepcopy__(self, memo): return self
    def forward(self, z, y): return ce(z, y)
class ByType(nn.Module):
    n = 0
    def forward(self, z, y):
        self.__class__.n += 1
        return ce(z, y)
OURS = types.ModuleType('ours')
exec('n = 0\ndef count(v):\n    global n\n    n += 1\n    return v * n\nseen = []\ndef half(v): return v / 2', vars(OURS))

def around(x, f): return lambda z, y: f(ce(z, y), x)
def nonlocal_helper():
    n = 0
    def f(v):
        nonlocal n
        n += 1
        return v * min(1, n / 20)
    return lambda z, y: f(ce(z, y))
def imports(z, y):
    import logging
    logging.info('asked')
    return ce(z, y)
def nested(z, y): return sum([next(c) for c in [CALLS]]) + ce(z, y)
CALLS = itertools.count(1)
class Base(BaseLoss):
    def __call__(self, z, y, **kw): return remember(super().__call__(z, y, **kw))

REACHES = {
    'object in a closure': (around(Counter(), lambda v, c: v * c()), 'Counter'), 'object that averages': (lambda z, y: ce(AVERAGES(z), y), 'Averages'),
    'method in a closure': (around(Counter().method, lambda v, c: v * c()), 'Counter'), 'partial of an object': (around(functools.partial(Counter()), lambda v, c: v * c()), 'Counter'),
    'global of a helper': (lambda z, y: ce(z, y) * factor(), '`STEP`'), 'list of a helper': (lambda z, y: remember(ce(z, y)), '`HISTORY`'),
    'default of a helper': (lambda z, y: with_default(ce(z, y)), 'a list'), 'variable of a helper': (nonlocal_helper(), '`n`'),
    'iterator': (lambda z, y: ce(z, y) * min(1, next(CALLS) / 20), '`'), 'iterator in a comprehension': (nested, '`'), 'zip over an iterator': (around(itertools.count(1), lambda v, c: v * [*zip([1], c)][0][1]), 'a count'),
    'generator': (around((i for i in range(99)), lambda v, c: v + min(zip([1], c))[1]), 'a generator'), 'numpy generator': (around(np.random.default_rng(0), lambda v, c: v + c.normal()), 'a Generator'),
    'tensor of a class': (SharedTensor(), '`SharedTensor.m`'), 'helper of a method': (Reads(), '`HISTORY`'), 'function in an attribute': (Holds(remember), '`HISTORY`'), 'own copy': (OwnCopy(), '__deepcopy__'),
    'through __class__': (ByType(), '`__class__`'), 'module of ones own': (lambda z, y: OURS.count(ce(z, y)), '`n`'), 'list in a module': (lambda z, y: OURS.seen.append(1) or ce(z, y), 'a list'),
    'import': (imports, '`logging`'), 'subclass of BaseLoss': (Base(nn.CrossEntropyLoss), '`HISTORY`'), 'bound append': (around([].append, lambda v, add: add(1) or v), 'builtin'),
    'cached helper': (around(functools.lru_cache(lambda: 2), lambda v, c: v * c()), '_lru_cache_wrapper'), 'globals': (lambda z, y: ce(z, y) * globals().setdefault('k', 1), '`globals`'),
    'partial of a helper': (functools.partial(lambda z, y, f: f(ce(z, y)), f=remember), '`HISTORY`'),
}
AVERAGES = Averages()

@pytest.mark.parametrize('name', REACHES)
def test_a_loss_that_reaches_what_may_change_is_not_called(name):
    loss, why = REACHES[name]
    before = STEP, len(HISTORY), OURS.n, len(OURS.seen), ByType.n, SharedTensor.m, copy.copy(CALLS), vars(AVERAGES).copy()
    asked = Asked(loss, PRED, TARG)
    assert asked.way is None and why in asked.why, asked.why
    assert 'when it is asked' not in asked.why and 'keeps something' not in asked.why, asked.why   # found before it is called
    after = STEP, len(HISTORY), OURS.n, len(OURS.seen), ByType.n, SharedTensor.m, copy.copy(CALLS), vars(AVERAGES).copy()
    assert str(before) == str(after) and torch.isnan(asked(PRED, TARG)[0]).all()

@pytest.mark.parametrize('loss', [Shared(), lambda z, y: counts(ce(z, y))], ids=['class', 'function'])
def test_numbers_of_classes_and_functions_are_put_back(loss):
    Shared.n, counts.n = 3, 5
    assert 'keeps something' in Asked(loss, PRED, TARG).why
    assert (Shared.n, counts.n) == (3, 5)

def test_numbers_that_change_later_are_put_back():
    class Late(nn.Module):
        n = 0
        def forward(self, z, y):
            if z.abs().max() > 100: Late.n += 1
            return F.cross_entropy(z, y, reduction=self.reduction)
        reduction = 'mean'
    asked = Asked(Late(), PRED, TARG)
    assert asked(PRED, TARG)[0].isfinite().all()
    assert torch.isnan(asked(PRED * 1000, TARG)[0]).all() and Late.n == 0 and 'keeps something' in asked.why

def gamma_rows(z, y, gamma=2.):
    rows = F.cross_entropy(z, y, reduction='none')
    return (1 - (-rows).exp())**gamma * rows
GAMMA = 2.
class Smooth(nn.Module):
    "Methods, a static one, a property, a number of the class, an object of its own, another class."
    gamma = 2
    def __init__(self):
        super().__init__()
        self.rows, self.inner = gamma_rows, nn.ModuleList([Inner()])
    @staticmethod
    def mean(v): return v.mean()
    @property
    def power(self): return self.gamma
    def forward(self, z, y): return self.mean(self.rows(self.inner[0](z), y, self.power))
class Inner(nn.Module):
    def forward(self, z): return z * math_of(1.)
def math_of(v): return float(np.float64(v)) + int(isinstance(v, str))
class Square(torch.autograd.Function):
    @staticmethod
    def forward(v): return v**2
    @staticmethod
    def setup_context(ctx, inputs, output): ctx.save_for_backward(inputs[0])
    @staticmethod
    def backward(ctx, g): return 2 * g * ctx.saved_tensors[0]

KNOWN = [Smooth(), lambda z, y: gamma_rows(z, y, GAMMA).mean(), lambda z, y: OURS.half(ce(z, y)), lambda z, y: Inner()(ce(z, y)),
    lambda z, y: (gamma_rows(z, y) * WEIGHTS[0]).mean(), BaseLoss(Smooth), functools.partial(Smooth().forward), lambda z, y: max(ce(z, y), ce(z, y) * .5)]

@pytest.mark.parametrize('k', range(len(KNOWN)))
def test_what_only_computes_is_known(k): Reach(KNOWN[k])

def test_a_function_for_autograd_is_known(): Reach(lambda z, y: Square.apply(ce(z, y)))

def test_names_of_code():
    def f(x):
        global NEW
        import math
        NEW = [len(o.items) for o in x]
        return math.pi
    assert names_of(f.__code__) == Names(frozenset({'len'}), frozenset({'items', 'pi'}), frozenset({'math'}), frozenset({'NEW'}))
