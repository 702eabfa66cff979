"The ledger: no alarm where all is right, and one message where the rows are not what was trained."
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import RNNRegularizer
from fastai.callback.training import GradientAccumulation
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.torch_core import set_seed
from helpers import Net, Points, learner, same_bits, state, warned
from torch import nn

from fastai_xent import cpu_kernels
from fastai_xent.batch import Batch
from fastai_xent.ledger import Ledger, Scalars, divisor
from fastai_xent.losses import XentLoss, XentLossFlat
from fastai_xent.recorder import XentRecorder
from fastai_xent.rows import RowBuffer

W = torch.tensor([1., 2., .5])

def told(cbs=(), loss_func=None, epochs=2, model=Net, **kw) -> tuple:
    "What the recorder says of a training, and the record; the training is the same to the bit without it."
    def run(more):
        set_seed(0)
        learn = learner([*more, *(o() for o in cbs)], loss_func() if loss_func else XentLossFlat(), model=model(), **kw)
        learn.fit(epochs)
        return state(learn)
    rec = XentRecorder()
    with warned() as said: end = run([rec])
    same_bits(end, run([]))
    assert not any('Traceback' in o for o in said), said
    return said, rec.record


# -- what is amiss is told, once

class Penalty(Callback):
    "Adds a penalty on the weights to the loss, as it is shown and as it is trained."
    order = 20
    def after_loss(self):
        penalty = .05 * sum(p.square().sum() for p in self.learn.model.parameters())
        self.learn.loss_grad = self.learn.loss_grad + penalty
        self.learn.loss = self.learn.loss_grad.detach().clone()

class Halves(Callback):
    order = 20
    def after_loss(self): self.learn.loss = self.learn.loss / 2

class MixesAndSwaps(Callback):
    "Mixes inputs, trains on both labels by a loss of its own, and leaves no trace of that behind."
    order = 5
    def before_batch(self):
        if not self.learn.training: return
        lam, perm, y = .6, torch.arange(len(self.y)).roll(1), self.y
        self.learn.xb, self.kept = (torch.lerp(self.x[perm], self.x, lam),), self.learn.loss_func
        self.learn.loss_func = lambda z, t: lam * self.kept(z, t) + (1 - lam) * self.kept(z, y[perm])
    def after_loss(self):
        if self.learn.training: self.learn.loss_func = self.kept

class ReplacesTargets(Callback):
    "Trains on the neighbour's label, and puts the targets back."
    order = 5
    def before_batch(self): self.kept, self.learn.yb = self.learn.yb, (self.y.roll(1),)
    def after_loss(self): self.learn.yb = self.kept

class SwapsForGood(Callback):
    "Exchanges the loss between a batch's loss and the recorder."
    order = 20
    def after_loss(self):
        if self.learn.iter == 2 and self.learn.training: self.learn.loss_func = XentLossFlat(label_smoothing=.3)

WRONG = {'penalty': (Penalty, 5, 'it differs by +'), 'factor': (Halves, 5, 'it is 0.5 times theirs, each time'), 'mixed': (MixesAndSwaps, 5, 'it differs by'), 'targets': (ReplacesTargets, 5, 'it differs by -')}

@pytest.mark.parametrize('way', ['ours', 'stock', 'asked'])
@pytest.mark.parametrize('name', WRONG)
def test_what_is_amiss_is_told_once_a_split(name, way):
    cb, n, words = WRONG[name]
    said, record = told([cb], dict(ours=XentLossFlat, stock=CrossEntropyLossFlat, asked=FocalLossFlat)[way])
    assert len(said) == (1 if name == 'mixed' else 2), said
    assert f"in epoch 0 of 'train' the losses of the rows do not add up to the Learner's in {n} of 5 batches; the first is batch 0" in said[0] and words in said[0]
    assert record.n_epochs == 2 and len(record.to_df('train')) == 72     # the rows are kept, they are told of

def test_one_batch_of_five():
    said, _ = told([SwapsForGood])
    assert len(said) == 1 and 'in 1 of 5 batches; the first is batch 2, where' in said[0] and 'each time' not in said[0]

def test_a_penalty_has_the_rows_without_it():
    said, record = told([Penalty], epochs=1)
    plain, want = told(epochs=1)
    assert not plain
    assert record.to_df('train', 0)['loss'].notna().all()
    first = record.to_df('train', 0).set_index('step')['loss'].loc[0].astype(float)
    assert first.mean() == pytest.approx(want.to_df('train', 0).set_index('step')['loss'].loc[0].astype(float).mean(), rel=1e-6)

def test_a_loss_that_is_a_cross_entropy_by_name():
    "A class of one's own that adds something: its rows are asked, and add up."
    class Mine(nn.CrossEntropyLoss):
        def forward(self, z, y): return super().forward(z, y) + .1 * z.square().mean()
    said, record = told((), Mine)
    assert not said
    df = record.to_df('train')
    assert (df['loss'].astype(float) + np.log(df['p_targ'].astype(float)) > 1e-4).all()

class Collated:
    "A collate function that mixes, and a loss that knows how."
    other = None
    def collate(self, b):
        x, y = (torch.stack(o) for o in zip(*b))
        if len(b) > 1: self.other = y.roll(1)         # fastai also collates a single item, to see what it is made of
        return torch.lerp(x.roll(1, 0), x, .7), y
    def loss(self, z, y):
        if len(z) != len(self.other): raise ValueError("another batch")
        return .7 * F.cross_entropy(z, y) + .3 * F.cross_entropy(z, self.other)

class KnowsTheCollate(Callback):
    "Trains on the collate function's loss, where the Learner shows a plain one."
    order = 20
    def __init__(self, mix): self.mix = mix
    def after_loss(self):
        self.learn.loss_grad = self.mix.loss(self.learn.pred, *self.learn.yb)
        self.learn.loss = self.learn.loss_grad.detach().clone()

@pytest.mark.parametrize('behind', [False, True])
def test_mixing_in_a_collate_function(behind):
    "A loss that knows how the batch was mixed cannot be asked for its rows; behind a loss that passes for a plain one, they do not add up."
    def run(cbs):
        set_seed(0)
        mix = Collated()
        learn = learner([*cbs, *([KnowsTheCollate(mix)] if behind else [])], XentLossFlat() if behind else mix.loss, bs=36)
        learn.dls.valid.bs = 18
        for dl in learn.dls.loaders: dl.create_batch = mix.collate
        learn.fit(1)
        return state(learn)
    rec = XentRecorder()
    with warned() as said: end = run([rec])
    same_bits(end, run([]))
    assert len(said) == (2 if behind else 1) and all(('do not add up' if behind else 'ValueError when it is asked: another batch') in o for o in said), said
    df = rec.record.to_df('train')
    assert df['loss'].isna().all() != behind and df['margin'].notna().all()

def test_a_broken_row(monkeypatch):
    "Our own mistake: one number of one row is another."
    real = cpu_kernels.FusedPass.__init__
    def broken(self, *args, **kw):
        real(self, *args, **kw)
        self.facts[0, 0] += .01
    monkeypatch.setattr(cpu_kernels.FusedPass, '__init__', broken)
    rec = XentRecorder()
    with warned() as said: learner([rec]).fit(1)
    assert len(said) == 2 and '5 of 5 batches' in said[0]

def test_check_makes_it_an_error():
    rec = XentRecorder(check=True)
    with warned() as said: learner([rec, Halves()]).fit(1)
    assert len(said) == 1 and 'do not add up' in said[0] and 'RuntimeError' in said[0]


# -- and nothing is told where all is right

class Ignoring(Points):
    def __getitem__(self, i): return self.x[i], self.y[i] * (i % 4 > 0) - 100 * (i % 4 == 0)

QUIET = {
    'accumulation': dict(cbs=[lambda: GradientAccumulation(20)], loss_func=lambda: CrossEntropyLossFlat(weight=W)),
    'sum': dict(loss_func=lambda: functools.partial(F.cross_entropy, reduction='sum', weight=W)), 'sum of ours': dict(loss_func=lambda: XentLossFlat(reduction='sum')),
    'function': dict(loss_func=lambda: F.cross_entropy), 'partial': dict(loss_func=lambda: functools.partial(F.cross_entropy, weight=W, label_smoothing=.1)),
    'ignored': dict(loss_func=lambda: CrossEntropyLossFlat(weight=W), train=Ignoring(), valid=Ignoring(18)), 'ignored focal': dict(loss_func=FocalLossFlat, train=Ignoring(), valid=Ignoring(18)),
    'ignored and smoothed': dict(loss_func=LabelSmoothingCrossEntropyFlat, train=Ignoring(), valid=Ignoring(18)), 'weighted and smoothed': dict(loss_func=lambda: LabelSmoothingCrossEntropyFlat(weight=W)),
    'ignored, mixed': dict(cbs=[MixUp], train=Ignoring(), valid=Ignoring(18)), 'ignored focal, mixed': dict(cbs=[MixUp], loss_func=FocalLossFlat, train=Ignoring(), valid=Ignoring(18)),
    'weighted, mixed': dict(cbs=[MixUp], loss_func=lambda: XentLossFlat(W)), 'all weights zero': dict(loss_func=lambda: XentLossFlat(torch.zeros(3))),
    'nll': dict(loss_func=lambda: nn.NLLLoss(weight=W, ignore_index=1), model=lambda: nn.Sequential(Net(), nn.LogSoftmax(1)))}

@pytest.mark.parametrize('name', QUIET)
def test_no_alarm(name):
    said, record = told(**QUIET[name])
    assert not said, said
    assert len(record.to_df()) == 2 * 54 and record.to_df()['loss'].notna().any()

def test_nan_and_inf_are_losses_like_others():
    "A training that has diverged is no mistake of the rows."
    class Explodes(Net):
        def forward(self, x): return super().forward(x) * (math.nan if self.training else 1e38)
    rec = XentRecorder()
    with warned() as said: learner([rec], model=Explodes(), valid=Points(18, seed=1)).fit(1)
    assert not said, said

@pytest.mark.parametrize('dtype, rtol', [(torch.float32, 1e-4), (torch.float64, 1e-4), (torch.float16, 4 * 2.**-10), (torch.bfloat16, 4 * 2.**-7)])
def test_tolerance_is_that_of_the_losses_type(dtype, rtol):
    for off, differs in ((rtol / 2, False), (rtol * 2, True)):
        ledger, z, y = Ledger(), torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
        loss = torch.tensor(math.log(2), dtype=torch.float64)
        ledger.add(0, Batch(z, y, XentLoss(), 1, loss=loss.to(dtype)))
        cols = dict(loss=np.full(4, float(loss.to(dtype)) * (1 + off)), pred=np.zeros(4, np.int32))
        balance = ledger.balance(cols, [4], [7])
        assert balance.differ.tolist() == [differs] and balance.batches.tolist() == [7] and balance.rtol == pytest.approx(rtol)

def test_many_batches_and_few_bytes():
    "A number a batch: some sixty bytes on the host, four on a device."
    import tracemalloc
    ledger, batch = Ledger(), Batch(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), XentLoss(), 1, loss=torch.ones(()))
    ledger.add(0, batch)
    tracemalloc.start()
    for k in range(10000): ledger.add(k, batch)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used / 10000 < 150

def test_numbers_of_both_kinds_come_in_order():
    "On the host, on a device (a meta tensor would do, had it numbers), and more than one room of them."
    class There(torch.Tensor):
        is_cpu = False
        __torch_function__ = torch._C._disabled_torch_function_impl
    scalars, want = Scalars(), []
    for k in range(2500):
        x = torch.tensor(float(k))
        scalars.add(k if k % 3 == 0 else x if k % 3 == 1 else x.as_subclass(There))
        x.fill_(-1)                                   # changed afterwards
        want.append(k)
    assert scalars.numpy().tolist() == want and len(scalars.rooms) == 1

def test_divisors():
    "Against the loss function itself: rows' sum by divisor is the loss."
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(12, 3, generator=g), torch.randint(0, 3, (12,), generator=g)
    y[::5] = -100
    for kw in ({}, dict(weight=W), dict(weight=W, label_smoothing=.2), dict(reduction='sum'), dict(weight=W, reduction='sum')):
        for loss_func in (nn.CrossEntropyLoss(**kw), XentLoss(**kw), CrossEntropyLossFlat(**kw)):
            loss = loss_func(z, y)
            rows = F.cross_entropy(z, y, reduction='none', **{k: v for k, v in kw.items() if k != 'reduction'})
            by = divisor(Batch(z, y, loss_func, 1, loss=loss))
            by = float(by) if by == by else (y >= 0).sum()
            torch.testing.assert_close(rows.sum() / by, loss.as_subclass(torch.Tensor))

def test_a_pass_without_losses():
    "A buffer that nobody tells of losses has nothing to compare."
    rows = RowBuffer(4)
    assert rows.balance().differ.tolist() == []
    rows.add(0, Batch(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), XentLoss(), 1))
    assert rows.balance().differ.tolist() == [] and 'all of 0 batches' in str(rows.balance())


# -- what is trained, where it is not what is shown

class MixesGradient(Callback):
    "Mixes inputs, shows the plain loss, and trains on both labels."
    order, run_valid, through = 0, False, 'after_loss'
    def before_batch(self):
        self.perm = torch.arange(len(self.y)).roll(1)
        self.learn.xb = (torch.lerp(self.x[self.perm], self.x, .5),)
    def _mix(self, event):
        if event == self.through: self.learn.loss_grad = .5 * self.learn.loss_grad + .5 * self.loss_func(self.pred, self.y[self.perm])
    def after_loss(self): self._mix('after_loss')
    def before_backward(self): self._mix('before_backward')

class MixesLate(MixesGradient): order = 45
class MixesBeforeBackward(MixesGradient): through = 'before_backward'

class Scales(NonNativeMixedPrecision):
    "fastai's scaling of the loss, by another number in each batch, without its half precision."
    def __init__(self): self.loss_scale = 1.
    def before_fit(self): pass
    def before_batch(self): self.loss_scale *= 2
    def after_pred(self): pass
    def before_step(self):
        for p in self.learn.model.parameters(): p.grad /= self.loss_scale
    def after_step(self): pass
    def after_fit(self): pass

class Looks(Callback):
    "Somebody's callback that only reads."
    def after_loss(self): self.kept = self.learn.loss_grad.detach()

class Doubles(Callback):
    run_valid = False
    def after_loss(self): self.learn.loss_grad = 2 * self.learn.loss_grad

@pytest.mark.parametrize('more', [(), (lambda: GradientAccumulation(20),), (lambda: Scales(),)], ids=['alone', 'accumulation', 'scaled'])
@pytest.mark.parametrize('cb', [MixesGradient, MixesLate, MixesBeforeBackward])
def test_mixed_in_the_loss_that_is_trained(cb, more):
    said, record = told([cb, *more])
    said = [o for o in said if 'add up' in o]
    assert len(said) == 1 and "in epoch 0 of 'train'" in said[0] and "as it is trained (`learn.loss_grad`)" in said[0], said
    assert [o[1:3] for o in record.meta['ledger']] == [['train', 0], ['train', 1]]

@pytest.mark.parametrize('cbs', [[Looks], [Doubles], [lambda: GradientAccumulation(20), Looks], [lambda: GradientAccumulation(20), Doubles], [MixUp, Looks],
                                 [lambda: Scales(), Looks], [lambda: RNNRegularizer(1., 1.), Looks]])
@pytest.mark.parametrize('bs', [8, 11, 36])
def test_no_alarm_for_a_loss_that_is_only_multiplied(cbs, bs):
    if any(isinstance(o(), RNNRegularizer) for o in cbs): cbs = [*cbs, AsAnRNN]
    said, _ = told(cbs, bs=bs)
    assert not said, said

class AsAnRNN(Callback):
    "What `RNNRegularizer` reads."
    order = -20
    def after_pred(self): self.learn.rnn = type('Out', (), dict(raw_out=torch.stack([self.pred, self.pred], 1), out=self.pred))


# -- who asks the record is told

def test_the_record_does_not_pass_such_rows_off_as_plain():
    "Its repr says so, and a verdict on labels comes with a warning that names the epochs."
    _, record = told([MixesAndSwaps], epochs=3)
    assert "losses: train 0, 1, 2: those of the rows do not add up to the Learner's" in ' '.join(repr(record).split())
    assert 'do not add up' in record._repr_html_()
    with pytest.warns(UserWarning, match=r"do not add up to the Learner's \(train 0, 1, 2\)"): record.label_issues(noise_rate=.1)
    _, record = told(epochs=3)
    assert 'add up' not in repr(record)
    with warned() as said: record.label_issues(noise_rate=.1)
    assert not any('add up' in o for o in said)
