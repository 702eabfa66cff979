"What the recorded numbers mean: mixed and dense rows, precision and engines, resume, evaluation passes, names, bad input."
import contextlib
import copy
import functools
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import fastai_xent.losses as losses
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, Callback
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.collab import CollabDataLoaders, TabularCollab, collab_learner
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import SkipItemException
from fastai.data.transforms import ColReader, IndexSplitter, ItemGetter, RandomSplitter, ToTensor
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.tabular.core import Categorify, TabularPandas
from fastai.tabular.learner import tabular_learner
from fastai.text.data import SortedDL, TensorText, pad_input
from fastai.torch_core import TensorCategory, TensorImage, set_seed, tensor
from fastai.vision.augment import RandTransform
from fastai.vision.data import ImageBlock
from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder
from fastai_xent.record import XentRecord
from helpers import FLOATS, CpuAutocast, Net, Points, learner, quiet, rng_state, same_bits, state, warned
from torch import nn
from torch.testing import assert_close

torch.set_num_threads(1)
W = torch.tensor([1., 2., .5])

@pytest.fixture(autouse=True)
def seeded(): set_seed(0)


# -- what a row should hold, computed with torch's own functions in float64

def rows_loss(z, y, axis=1, **kw):
    "The loss of each row, or of each of its positions; classes in `axis`."
    kw = {k: v.double() if k == 'weight' else v for k, v in kw.items()}
    z = z.movedim(axis, 1)
    return F.cross_entropy(z, y.movedim(axis, 1) if y.is_floating_point() else y, reduction='none', **kw)

def truth(z, y, loss, axis=1, ignore_index=-100) -> dict:
    "Columns of the rows with logits `z` and classes `y`, whose loss is `loss(z)`. Rows whose own target is ignored have nan."
    z = z.detach().as_subclass(torch.Tensor).double().requires_grad_()
    with torch.enable_grad():
        rows = loss(z)
        grad, = torch.autograd.grad(rows.sum(), z)
    z = z.detach().movedim(axis, -1)
    label = y.argmax(axis) if y.is_floating_point() else y
    ok = label != ignore_index if not y.is_floating_point() else torch.ones_like(label, dtype=torch.bool)
    hot = F.one_hot(label.where(ok, torch.zeros_like(label)), z.shape[-1])
    p = z.softmax(-1)
    cols = dict(loss=rows.detach(), grad_norm=grad.norm(dim=axis), el2n=(p - hot).norm(dim=-1), p_targ=(p * hot).sum(-1),
                margin=(z * hot).sum(-1) - z.masked_fill(hot.bool(), -torch.inf).amax(-1))
    return {**{k: v.where(ok, torch.full_like(v, torch.nan)) for k, v in cols.items()}, 'ok': ok}

def assert_cols(df, want, cols=FLOATS, rtol=2e-5, atol=2e-6):
    "Assert that these columns of a frame are those of `want`; null where that is nan."
    for o in cols: assert_close(torch.tensor(df[o].to_numpy(dtype=np.float64, na_value=np.nan)), want[o].double(), rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f'{o}: {m}')

class Saw(Callback):
    "Each batch of a fit: its inputs before and after other callbacks had their way, logits, targets and loss."
    def __init__(self): self.batches = []
    def heard(self): return not (self.learn.lock.locked() or hasattr(self.learn, 'lr_finder'))
    order = -5
    def before_batch(self): self.raw = self.learn.xb[0].detach().clone()
    def after_pred(self): self.came = self.learn.xb[0].detach().clone()
class SawLoss(Callback):
    order = 39
    def __init__(self, saw): self.saw = saw
    def after_loss(self):
        l = self.learn
        if self.saw.heard(): self.saw.batches.append(dict(
            split='train' if l.training else 'valid', epoch=l.epoch, raw=self.saw.raw, x=self.saw.came, z=l.pred.detach().clone(),
            y=l.yb[0].clone(), loss=l.loss.detach().clone()))

def gathered(batches, split, epoch) -> dict:
    "The rows of one pass, in order of arrival."
    found = [b for b in batches if b['split'] == split and b['epoch'] == epoch]
    assert found
    return {k: torch.cat([b[k] for b in found]) for k in ('raw', 'x', 'z', 'y')}

def spied(make, cbs=(), said_none=True, **kw):
    "`make(cbs)` with a checking recorder and a spy; gives the learner (not yet trained), recorder and the spy's batches."
    saw, rec = Saw(), XentRecorder(check=True, **kw)
    learn = make([saw, SawLoss(saw), rec, *cbs])
    return learn, rec, saw.batches

def fit(learn, *args, said=0, **kw):
    "Train, and assert how often the recorder warned."
    with warned() as messages: learn.fit(*args, **kw)
    assert len(messages) == said, messages
    return messages


# -- 1. options of the loss: loss and gradient as trained, the rest about the row's own label

OPTIONS = {'plain': {}, 'weight': dict(weight=W), 'smooth': dict(label_smoothing=.3), 'ignore': dict(ignore_index=1), 'all': dict(weight=W, label_smoothing=.1, ignore_index=2)}

def item_of(x): return x[:, -1].round().long()

@pytest.mark.parametrize('way', [None, 'torch'])
@pytest.mark.parametrize('Loss', [XentLossFlat, CrossEntropyLossFlat, nn.CrossEntropyLoss])
@pytest.mark.parametrize('option', OPTIONS)
def test_options(option, Loss, way, monkeypatch):
    monkeypatch.setattr(losses, 'WAY', way)
    kw = OPTIONS[option]
    learn, rec, batches = spied(lambda cbs: learner(cbs, Loss(**kw)))
    fit(learn, 2)
    for split in ('train', 'valid'):
        for epoch in (0, 1):
            got, saw = rec.record.to_df(split, epoch), gathered(batches, split, epoch)
            order = item_of(saw['x']).argsort()
            z, y = saw['z'][order], saw['y'][order]
            want = truth(z, y, lambda z: rows_loss(z, y, **kw), ignore_index=kw.get('ignore_index', -100))
            assert got['item'].tolist() == list(range(len(y)))
            assert_cols(got, want)
            own = truth(z, y, lambda z: rows_loss(z, y))
            same = got['grad_norm'].isna() | np.isclose(got['grad_norm'], got['el2n'], rtol=1e-4)
            assert same.all() == (option in ('plain', 'ignore'))           # el2n speaks of the label alone …
            assert_close(torch.tensor(got['el2n'].to_numpy())[want['ok']].double(), own['el2n'][want['ok']], rtol=2e-5, atol=2e-6)
            assert got['targ'].isna().tolist() == got['pred'].isna().tolist() == (~want['ok']).tolist()

class Soft(Points):
    "Probabilities for targets, another sharpness for each item."
    def soft(self): return torch.softmax(F.one_hot(self.y, 3) * (1. + torch.arange(len(self.y))[:, None] % 4), 1)
    def __getitem__(self, i): return self.x[i], self.soft()[i]

@pytest.mark.parametrize('Loss, kw', [(XentLossFlat, {}), (nn.CrossEntropyLoss, {}), (XentLossFlat, dict(weight=W, label_smoothing=.1)), (nn.CrossEntropyLoss, dict(label_smoothing=.2))])
def test_probabilities(Loss, kw):
    learn, rec, batches = spied(lambda cbs: learner(cbs, Loss(**kw), train=Soft(), valid=Soft(18, seed=1)))
    fit(learn, 2)
    for epoch in (0, 1):
        got, saw = rec.record.to_df('train', epoch), gathered(batches, 'train', epoch)
        order = item_of(saw['x']).argsort()
        z, y = saw['z'][order], learn.dls.train_ds.soft()
        assert_cols(got, truth(z, y, lambda z: rows_loss(z, y, **kw)))
        assert got['targ'].tolist() == learn.dls.train_ds.y.tolist()       # the largest is the label
        assert (got['grad_norm'] - got['el2n']).abs().max() > .01


# -- 2. MixUp and CutMix

N = 24

class Marked(Points):
    "The input ends in a one-hot vector of the index: a mixture of inputs tells what was mixed."
    def __init__(self, n=N, **kw):
        super().__init__(n, **kw)
        self.x = torch.cat([self.x[:, :4], torch.eye(n)], 1)

class Tiles(Points):
    "Images of 8×8 whose pixels are the item's index: a cut-out tells what was cut."
    def __init__(self, n=N, **kw):
        super().__init__(n, **kw)
        self.x = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 1, 8, 8).contiguous()

class TileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    def forward(self, x): return self.body(torch.sin(x * torch.arange(1, 65).view(8, 8)))

def mixer(kind, cbs=(), loss_func=None, soft=False, **kw):
    "A learner that mixes."
    train, valid = (Marked, Tiles)[kind == 'cutmix'](), (Marked, Tiles)[kind == 'cutmix'](12, seed=1)
    if soft: train.y, valid.y = F.one_hot(train.y, 3).float() * .7 + .1, F.one_hot(valid.y, 3).float() * .7 + .1
    set_seed(3)
    return learner([*cbs, MixUp(.8) if kind == 'mixup' else CutMix()], loss_func, bs=6, model=Net() if kind == 'mixup' else TileNet(), train=train, valid=valid, **kw)

def unmix(kind, raw, x):
    "Own item, partner and the own item's share, read off the inputs before and after mixing."
    if kind == 'mixup':
        own, mixed = raw[:, 4:].argmax(1), x[:, 4:]
        lam = mixed[torch.arange(len(x)), own]
        other = mixed.scatter(1, own[:, None], 0.)
        alone = other.amax(1) < 1e-7                       # mixed with itself
        return own, other.argmax(1).where(~alone, own), lam
    own, flat = raw[:, 0, 0, 0].long(), x.flatten(1).long()
    mine = flat == own[:, None]
    other = torch.where(mine, -1, flat).amax(1)
    return own, other.where(other >= 0, own), mine.double().mean(1)

MIXED = {**{f'XentLossFlat, {k}': functools.partial(XentLossFlat, **kw) for k, kw in OPTIONS.items()}, **{f'CrossEntropyLossFlat, {k}': functools.partial(CrossEntropyLossFlat, **kw) for k, kw in OPTIONS.items()}}

@pytest.mark.parametrize('way', [None, 'torch'])
@pytest.mark.parametrize('name', MIXED)
@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixed(kind, name, way, monkeypatch):
    "λ and the partner are those that the input shows; loss and gradient are those of the mixture; the rest speaks of the row's own label."
    monkeypatch.setattr(losses, 'WAY', way)
    kw = OPTIONS[name.split(', ')[1]]
    ignore = kw.get('ignore_index', -100)
    learn, rec, batches = spied(lambda cbs: mixer(kind, cbs, MIXED[name]()))
    fit(learn, 3)
    ys, partners = learn.dls.train_ds.y, 0
    for epoch in range(3):
        got, saw = rec.record.to_df('train', epoch), gathered(batches, 'train', epoch)
        own, other, lam = unmix(kind, saw['raw'], saw['x'])
        order = own.argsort()
        own, other, lam, z = own[order], other[order], lam[order].double(), saw['z'][order]
        assert got['item'].tolist() == own.tolist() == list(range(N))
        y, y1 = ys[own], ys[other]
        assert torch.equal(saw['y'][order], y)
        known = other != own                                # an item mixed with itself does not show its share
        partners += known.sum().item()
        ok = y != ignore
        assert torch.tensor(got['partner'].to_numpy(dtype=np.int64, na_value=-1)).equal(other)
        shares = torch.tensor(got['lam'].to_numpy(dtype=np.float64))
        assert_close(shares[known], lam[known], rtol=0, atol=1e-6)
        def mixture(z): return shares * rows_loss(z, y, **kw) + (1 - shares) * rows_loss(z, y1, **kw)
        want = truth(z, y, mixture, ignore_index=ignore)
        assert_cols(got, {**want, **truth(z, y, mixture)}, ['loss', 'grad_norm'])      # what was trained, also where only the partner has a label
        assert_cols(got, want, ['el2n', 'p_targ', 'margin'])
        assert got['targ'].isna().tolist() == (~ok).tolist()
        valid, there = rec.record.to_df('valid', epoch), gathered(batches, 'valid', epoch)
        assert valid['lam'].isna().all() and valid['partner'].isna().all()
        assert_cols(valid, truth(there['z'], there['y'], lambda z: rows_loss(z, there['y'], **kw), ignore_index=ignore))
    assert partners > 2 * N

@pytest.mark.parametrize('Loss', [XentLossFlat, nn.CrossEntropyLoss])
@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixed_probabilities(kind, Loss):
    "With a loss that mixes targets itself (`y_int`), and with one for which the callback mixes them."
    learn, rec, batches = spied(lambda cbs: mixer(kind, cbs, Loss(), soft=True))
    fit(learn, 2)
    ys = learn.dls.train_ds.y
    for epoch in (0, 1):
        got, saw = rec.record.to_df('train', epoch), gathered(batches, 'train', epoch)
        own, other, lam = unmix(kind, saw['raw'], saw['x'])
        order = own.argsort()
        own, other, z = own[order], other[order], saw['z'][order]
        lam = torch.tensor(got['lam'].to_numpy(dtype=np.float64))[:, None]
        mixed = lam * ys[own] + (1 - lam) * ys[other]
        assert got['partner'].tolist() == other.tolist()
        assert_cols(got, truth(z, mixed, lambda z: rows_loss(z, mixed)), ['loss', 'grad_norm'])
        assert_cols(got, truth(z, ys[own], lambda z: rows_loss(z, ys[own])), ['el2n', 'p_targ', 'margin'])
        assert got['targ'].tolist() == ys.argmax(1).tolist()

@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixed_focal_loss(kind):
    "A loss without a closed form here: asked for itself."
    learn, rec, batches = spied(lambda cbs: mixer(kind, cbs, FocalLossFlat(gamma=1.5)))
    fit(learn, 2)
    got, saw = rec.record.to_df('train', 1), gathered(batches, 'train', 1)
    own, other, _ = unmix(kind, saw['raw'], saw['x'])
    order = own.argsort()
    y, y1, z = learn.dls.train_ds.y[own[order]], learn.dls.train_ds.y[other[order]], saw['z'][order]
    lam = torch.tensor(got['lam'].to_numpy(dtype=np.float64))
    def focal(z, y):
        ce = rows_loss(z, y)
        return (1 - (-ce).exp())**1.5 * ce
    assert_cols(got, truth(z, y, lambda z: lam * focal(z, y) + (1 - lam) * focal(z, y1)))

@pytest.mark.parametrize('loss', ['plain', 'all'])
@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixing_is_left_alone(kind, loss):
    def run(cbs):
        learn = mixer(kind, cbs, XentLossFlat(**OPTIONS[loss]))
        learn.fit(2)
        return state(learn)
    plain, rec = run([]), XentRecorder(eval_every=1)
    same_bits(plain, run([rec]))
    assert rec.record.n_epochs == 2

class At(Callback):
    "Raise in one training batch."
    order = 70
    def __init__(self, ex, epoch=0, i=2, event='after_batch'): self.ex, self.at, self.event, self.done = ex, (epoch, i), event, False
    def after_batch(self): self._maybe('after_batch')
    def before_batch(self): self._maybe('before_batch')
    def _maybe(self, event):
        if self.learn.training and event == self.event and not self.done and (self.learn.epoch, self.learn.iter) == self.at:
            self.done = True
            raise self.ex

@pytest.mark.parametrize('ex, event', [(ex, e) for ex in (KeyboardInterrupt, CancelEpochException, CancelFitException) for e in ('before_batch', 'after_batch')] + [(CancelBatchException, 'before_batch')])
@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_interrupted_mixing(kind, ex, event):
    "The next fit works, is recorded whole and right, and the loss is the original."
    loss = XentLossFlat()
    learn, rec, batches = spied(lambda cbs: mixer(kind, [*cbs, At(ex('now'), 0, 2, event)], loss))
    with warned() as said:
        try: learn.fit(1)
        except KeyboardInterrupt: pass
    assert not said, said
    if ex is not KeyboardInterrupt: assert learn.loss_func is loss
    n = rec.record.n_epochs
    batches.clear()
    fit(learn, 2)
    assert learn.loss_func is loss
    df = rec.record.to_df('train')
    assert rec.record.n_epochs == n + 2 and df[df['epoch'] >= n].groupby('epoch').size().tolist() == [N, N]
    for e in (0, 1):
        got, saw = rec.record.to_df('train', n + e), gathered(batches, 'train', e)
        own, other, lam = unmix(kind, saw['raw'], saw['x'])
        order = own.argsort()
        assert got['partner'].tolist() == other[order].tolist()
        assert_close(torch.tensor(got['lam'].to_numpy(dtype=np.float64))[(other != own)[order]], lam[order][(other != own)[order]].double(), rtol=0, atol=1e-6)
    assert not [v for v in vars(next(cb for cb in learn.cbs if isinstance(cb, (MixUp, CutMix)))) if v == 'before_batch']

def test_scores_weigh_mixed_rows():
    "A row counts by the share of its own item; in validation rows count whole."
    rec = XentRecorder(check=True)
    fit(mixer('mixup', [rec]), 4)
    df = rec.record.to_df('train')
    lam = df['lam'].astype(float)
    assert lam.between(.5, 1).all() and lam.std() > .05
    value = {**{o: df[o].astype(float) for o in FLOATS}, 'margin_loss': np.logaddexp(0, -df['margin'].astype(float))}
    for by, v in value.items():
        want = (lam * v).groupby(df['item']).sum() / lam.groupby(df['item']).sum()
        np.testing.assert_allclose(rec.record.score(by), want, rtol=1e-5)
        assert not np.allclose(rec.record.score(by), v.groupby(df['item']).mean(), rtol=1e-4)
    valid = rec.record.to_df('valid')
    np.testing.assert_allclose(rec.record.score('loss', 'valid'), valid.astype({'loss': float}).groupby('item')['loss'].mean(), rtol=1e-5)

@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixed_fastai_tensors(kind):
    "TensorImage and TensorCategory, as vision loaders give them, and a loss that fastai flattens."
    class Typed(Marked if kind == 'mixup' else Tiles):
        def __getitem__(self, i): return TensorImage(self.x[i]), TensorCategory(self.y[i])
    learn, rec, batches = spied(lambda cbs: learner([*cbs, MixUp(.8) if kind == 'mixup' else CutMix()], LabelSmoothingCrossEntropyFlat(eps=.2), bs=6, model=Net() if kind == 'mixup' else TileNet(), train=Typed(N), valid=Typed(12, seed=1)), eval_every=1)
    fit(learn, 1)
    got, saw = rec.record.to_df('train'), {k: v.as_subclass(torch.Tensor) for k, v in gathered(batches, 'train', 0).items()}
    own, other, _ = unmix(kind, saw['raw'], saw['x'])
    order = own.argsort()
    y, y1, z = learn.dls.train_ds.y[own[order]], learn.dls.train_ds.y[other[order]], saw['z'][order]
    lam = torch.tensor(got['lam'].to_numpy(dtype=np.float64))
    assert_cols(got, truth(z, y, lambda z: lam * rows_loss(z, y, label_smoothing=.2) + (1 - lam) * rows_loss(z, y1, label_smoothing=.2)))
    assert len(rec.record.to_df('train_eval')) == N

def test_two_mixers_are_refused():
    def run(cbs):
        learn = mixer('mixup', [*cbs, MixUp(.4)], soft=True)
        learn.fit(1)
        return state(learn)
    rec = XentRecorder()
    with warned() as said: end = run([rec])
    assert len(said) == 1 and "nothing of 'train'" in said[0] and '2 callbacks mix the rows' in said[0]
    same_bits(end, run([]))
    assert [k[1] for k in rec.record.epochs] == ['valid']

def test_a_mixer_of_one_s_own():
    "Who was mixed with whom is not known if a subclass does not draw a permutation: refused, never guessed."
    class Neighbours(MixUp):
        def before_batch(self):
            self.lam, idx = torch.full((len(self.y),), .7), torch.arange(len(self.y)).roll(1)
            self.yb1 = (self.y[idx],)
            self.learn.xb = (torch.lerp(self.x[idx], self.x, .7),)
    def run(cbs):
        learn = learner([*cbs, Neighbours()], train=Marked(), bs=6)
        learn.fit(1)
        return state(learn)
    rec = XentRecorder()
    with warned() as said: end = run([rec])
    assert len(said) == 1 and 'Neighbours has mixed this batch of 6 rows in a way of its own' in said[0]
    same_bits(end, run([]))


# -- 3. masks, volumes, tokens

class Dense:
    "Inputs whose second channel is the item's index; item 0 has no valid position, if 3 is ignored."
    n_inp = 1
    def __init__(self, shape, n=14, last=False, soft=False, skip=(), seed=0):
        g = torch.Generator().manual_seed(seed)
        self.y = torch.randint(0, 4, (n, *shape), generator=g)
        self.y[0] = 3
        index = torch.arange(n).view(n, *[1] * len(shape)).expand(n, *shape).float()
        self.x = torch.stack([torch.randn(n, *shape, generator=g) + self.y, index], -1 if last else 1)
        if soft: self.y = torch.softmax(torch.randn(n, 4, *shape, generator=g), 1)
        self.skip = set(skip)
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        if int(i) in self.skip: raise SkipItemException
        return self.x[i], self.y[i]

class DenseNet(nn.Module):
    "A linear map of the first channel at each position."
    def __init__(self, last=False):
        super().__init__()
        self.last, self.lin = last, nn.Linear(2, 4)
    def forward(self, x):
        x = x if self.last else x.movedim(1, -1)
        z = self.lin(torch.stack([x[..., 0], x[..., 0].square()], -1))
        return z if self.last else z.movedim(-1, 1)

KINDS = {'mask': ((3, 4), 1), 'volume': ((2, 3, 2), 1), 'tokens': ((5,), -1), 'one token': ((1,), -1)}
W4 = torch.tensor([1., 2., .5, .25])
DENSE_OPTIONS = {'plain': {}, 'ignore': dict(ignore_index=3), 'weight': dict(weight=W4), 'all': dict(weight=W4, label_smoothing=.1, ignore_index=3)}
DENSE_LOSSES = {'mask': [XentLossFlat, CrossEntropyLossFlat], 'volume': [XentLossFlat], 'tokens': [XentLossFlat, CrossEntropyLossFlat], 'one token': [XentLossFlat]}

def dense_learner(kind, cbs, loss_func, workers=0, **kw):
    shape, axis = KINDS[kind]
    return learner(cbs, loss_func, bs=4, workers=workers, model=DenseNet(axis == -1), train=Dense(shape, last=axis == -1, **kw), valid=Dense(shape, 6, last=axis == -1, seed=1))

def by_item(batches, split, epoch, axis):
    "Logits and targets of a pass in the order of items, and which items."
    saw = gathered(batches, split, epoch)
    index = (saw['x'][..., 1] if axis == -1 else saw['x'][:, 1]).flatten(1)[:, 0].long()
    order = index.argsort()
    return saw['z'][order], saw['y'][order], index[order]

def item_means(want, kind) -> tuple:
    "Of the positions' numbers, means over the valid ones; nan where there is none."
    ok = want['ok'].flatten(1)
    return {k: (v.flatten(1).nan_to_num(nan=0.) * ok).sum(1) / ok.sum(1) for k, v in want.items() if k != 'ok'}, ok.sum(1)

@pytest.mark.parametrize('way', [None, 'torch'])
@pytest.mark.parametrize('option', DENSE_OPTIONS)
@pytest.mark.parametrize('kind, Loss', [(k, o) for k, v in DENSE_LOSSES.items() for o in v])
def test_dense(kind, Loss, option, way, monkeypatch):
    "One row an item: means over its valid positions, and their count; null where there is none."
    monkeypatch.setattr(losses, 'WAY', way)
    (shape, axis), kw = KINDS[kind], DENSE_OPTIONS[option]
    ignore = kw.get('ignore_index', -100)
    learn, rec, batches = spied(lambda cbs: dense_learner(kind, cbs, Loss(axis=axis, **kw)))
    fit(learn, 2)
    for split, n in (('train', 14), ('valid', 6)):
        for epoch in (0, 1):
            got, (z, y, item) = rec.record.to_df(split, epoch), by_item(batches, split, epoch, axis)
            want, n_pos = item_means(truth(z, y, lambda z: rows_loss(z, y, axis, **kw), axis, ignore), kind)
            assert got['item'].tolist() == item.tolist() == list(range(n))
            assert got['n_pos'].tolist() == n_pos.tolist()
            assert_cols(got, want)
            assert got['targ'].isna().all() and got['pred'].isna().all()
    if 'ignore' in (option, 'all') or option == 'all':
        assert got['n_pos'].iloc[0] == 0 and got[FLOATS].iloc[0].isna().all() and got[FLOATS].iloc[1:].notna().sum().sum() > 0
        with warnings.catch_warnings():
            warnings.simplefilter('error')                                  # nan is no surprise here
            assert np.isnan(rec.record.score('loss')[0]) and 0 not in rec.record.top(14)['item'].tolist()
    else: assert (got['n_pos'] == np.prod(shape)).all()

def test_dense_probabilities():
    learn, rec, batches = spied(lambda cbs: dense_learner('mask', cbs, XentLossFlat(axis=1, label_smoothing=.2), soft=True))
    fit(learn, 2)
    got, (z, y, _) = rec.record.to_df('train', 1), by_item(batches, 'train', 1, 1)
    assert_cols(got, item_means(truth(z, y, lambda z: rows_loss(z, y, 1, label_smoothing=.2)), 'mask')[0])

def test_dense_with_an_axis_of_one():
    "Masks of shape [1, h, w], as some readers give them; a batch of one."
    class Deep(Dense):
        def __getitem__(self, i): return self.x[i], self.y[i][None]
    learn, rec, batches = spied(lambda cbs: learner(cbs, XentLossFlat(axis=1, ignore_index=3), bs=1, model=DenseNet(), train=Deep((3, 4), 5), valid=Deep((3, 4), 3, seed=1)))
    fit(learn, 2)
    got, (z, y, _) = rec.record.to_df('train', 1), by_item(batches, 'train', 1, 1)
    want, n_pos = item_means(truth(z, y[:, 0], lambda z: rows_loss(z, y[:, 0], ignore_index=3), 1, 3), 'mask')
    assert_cols(got, want)
    assert got['n_pos'].tolist() == n_pos.tolist()

def test_dense_cutmix():
    "CutMix has one share for the batch, so masks can be mixed; with it the positions' losses."
    class Square(Dense):
        def __getitem__(self, i): return self.x[i], self.y[i]
    saw = []
    class Lam(Callback):
        order = 30
        def after_loss(self):
            cb = next(o for o in self.learn.cbs if isinstance(o, CutMix))
            if self.learn.training: saw.append((self.learn.pred.detach().double(), self.learn.yb[0], cb.yb1[0], float(cb.lam)))
    rec = XentRecorder(check=True)
    learn = learner([rec, CutMix(), Lam()], XentLossFlat(axis=1), bs=7, model=DenseNet(), train=Square((4, 4)), valid=Square((4, 4), 6, seed=1))
    fit(learn, 1)
    got = rec.record.to_df('train').astype({o: float for o in FLOATS}).set_index('step')
    for step, (z, y, y1, lam) in enumerate(saw):
        want = lam * rows_loss(z, y) + (1 - lam) * rows_loss(z, y1)
        np.testing.assert_allclose(np.sort(got.loc[step, 'loss']), np.sort(want.flatten(1).mean(1)), rtol=1e-5)
        np.testing.assert_allclose(got.loc[step, 'lam'].astype(float), lam, rtol=1e-6)

@pytest.mark.parametrize('where', ['memory', 'disk'])
@pytest.mark.parametrize('workers, skip', [(0, ()), (0, (1, 5)), (2, (1, 5))])
@pytest.mark.parametrize('kind', ['mask', 'tokens'])
def test_maps(kind, workers, skip, where, tmp_path):
    "The chosen items' numbers at every position, in every epoch; of no others."
    (shape, axis), kw, chosen = KINDS[kind], DENSE_OPTIONS['all'], [0, 2, 9]
    learn, rec, batches = spied(lambda cbs: dense_learner(kind, cbs, XentLossFlat(axis=axis, **kw), workers, skip=skip), path=tmp_path / 'r' if where == 'disk' else None, maps=chosen)
    fit(learn, 2)
    record = rec.record if where == 'memory' else XentRecord(tmp_path / 'r')
    for split, own in (('train', chosen), ('valid', chosen[:2])):
        for epoch in (0, 1):
            z, y, item = by_item(batches, split, epoch, axis)
            want = truth(z, y, lambda z: rows_loss(z, y, axis, **kw), axis, 3)
            for i in own:
                at, found = item.tolist().index(i), record.map(i, split, epoch)
                for o in FLOATS: assert_close(torch.tensor(found[o]).double(), want[o][at], rtol=2e-5, atol=2e-6, equal_nan=True)
                pred = z.argmax(axis)[at]
                assert found['pred'].shape == shape and (torch.tensor(found['pred']) == pred.where(want['ok'][at], torch.full_like(pred, -1))).all()
    np.testing.assert_array_equal(record.map(2)['loss'], record.map(2, epoch=1)['loss'])
    for bad in (3, 13):
        with pytest.raises(KeyError, match=r'no map of item .*maps=\[…\]'): record.map(bad)
    with pytest.raises(KeyError, match='in epoch 5'): record.map(2, epoch=5)

def test_maps_add_up():
    "The mean of a map over its valid positions is the item's row."
    rec = XentRecorder(maps=range(14))
    fit(dense_learner('volume', [rec], XentLossFlat(axis=1, ignore_index=3)), 1)
    got = rec.record.to_df('train').set_index('item')
    for i in range(1, 14):
        for o in FLOATS: np.testing.assert_allclose(np.nanmean(rec.record.map(i)[o]), got.loc[i, o], rtol=1e-5, atol=1e-6)
        assert got.loc[i, 'n_pos'] == np.isfinite(rec.record.map(i)['loss']).sum()


# -- 4. precision and engines

class Fp16Scaled(MixedPrecision):
    "A scale so large that the first steps overflow and are skipped."
    def before_fit(self):
        super().before_fit()
        self.skips, self.autocast, self.learn.scaler = 0, torch.autocast('cpu', torch.bfloat16), torch.amp.GradScaler('cpu', init_scale=2.**127, backoff_factor=2.**-40)
    def before_backward(self): self.learn.loss_grad = self.scaler.scale(self.loss_grad * 16)
    def before_step(self):
        try: super().before_step()
        except CancelStepException:
            self.skips += 1
            raise

class Skips(Callback):
    "Steps that fail, as after an overflow."
    def before_step(self):
        if self.learn.iter % 2: raise CancelStepException

class Cast(Net):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
    def forward(self, x): return super().forward(x).to(self.dtype)

class Pictures(Points):
    "The item's index is in the last pixel."
    def __init__(self, n=36, **kw):
        super().__init__(n, **kw)
        self.x = self.x.view(n, 1, 1, 5).repeat(1, 3, 2, 1)
class PictureNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 4, (1, 2)), nn.Linear(4, 3)
    def forward(self, x):
        h = self.conv(x[..., :4])
        self.layout = h.stride()
        return self.body(h.relu().mean((2, 3)))

def compiled(backend):
    def then(learn):
        torch._dynamo.reset()
        learn.model = torch.compile(learn.model, backend=backend)
        return learn
    return then
ENGINES = {
    'to_bf16': dict(then=lambda l: l.to_bf16()), 'to_fp16': dict(then=lambda l: l.to_fp16()), 'autocast': dict(cbs=lambda: [CpuAutocast(amp_mode='bf16')]),
    'overflow': dict(cbs=lambda: [Fp16Scaled()]), 'skipped steps': dict(cbs=lambda: [Skips()]),
    'accumulate': dict(cbs=lambda: [GradientAccumulation(20)]), 'clip': dict(cbs=lambda: [GradientClip(.1)]), 'both': dict(cbs=lambda: [GradientAccumulation(20), GradientClip(.1), CpuAutocast(amp_mode='bf16')]),
    'eager': dict(then=compiled('eager')), 'aot_eager': dict(then=compiled('aot_eager')), 'float64': dict(model=lambda: Net().double(), double=True),
    'bf16 logits': dict(model=lambda: Cast(torch.bfloat16), kw={}), 'fp16 logits': dict(model=lambda: Cast(torch.float16), kw={}),
    'channels_last': dict(model=PictureNet, data=Pictures, cbs=lambda: [ChannelsLast()])}

class Double(Points):
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.x = self.x.double()

COMPILED = 'aot_eager',  # compiling takes seconds; 'eager' says most of it
@pytest.mark.parametrize('name, Loss', [pytest.param(k, o, marks=[pytest.mark.slow] * (k in COMPILED)) for k in ENGINES for o in (XentLossFlat, CrossEntropyLossFlat) if o is XentLossFlat or 'logits' not in k])   # fastai cannot show a loss in half precision
def test_engines(name, Loss):
    e = ENGINES[name]
    kw = e.get('kw', dict(weight=W, label_smoothing=.1))           # torch has no weighted loss in half precision
    Data = Double if e.get('double') else e.get('data', Points)
    def make(cbs):
        set_seed(0)
        learn = learner([*cbs, *e.get('cbs', list)()], Loss(**kw), model=e.get('model', Net)(), train=Data(), valid=Data(18, seed=1))
        return quiet(e['then'](learn)) if 'then' in e else learn
    learn, rec, batches = spied(make, eval_every=2)
    fit(learn, 2)
    for split in ('train', 'valid'):
        for epoch in (0, 1):
            got, saw = rec.record.to_df(split, epoch), gathered(batches, split, epoch)
            item = saw['x'].flatten(1)[:, -1].round().long() if name == 'channels_last' else item_of(saw['x'])
            order = item.argsort()
            z, y = saw['z'][order], saw['y'][order]
            assert got['item'].tolist() == list(range(len(y)))
            assert_cols(got, truth(z, y, lambda z: rows_loss(z, y, **kw)))
    assert len(rec.record.to_df('train_eval')) == 36
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plain = make([])
        plain.fit(2)
    same_bits(state(plain), state(learn))
    if name == 'overflow': assert 0 < learn.fp16_scaled.skips < 10
    if name == 'channels_last': assert learn.model.layout[1] == 1
    if 'autocast' in name: assert not torch.equal(saw['z'], learner(model=learn.model).model(saw['x']).detach())

def test_engines_with_mixup():
    "All at once: MixUp under autocast with accumulated, clipped gradients."
    def make(cbs): return mixer('mixup', [*cbs, CpuAutocast(amp_mode='bf16'), GradientAccumulation(12), GradientClip(.5)], XentLossFlat(**OPTIONS['weight']))
    learn, rec, batches = spied(make)
    fit(learn, 2)
    got, saw = rec.record.to_df('train', 1), gathered(batches, 'train', 1)
    own, other, _ = unmix('mixup', saw['raw'], saw['x'])
    order = own.argsort()
    ys, z, lam = learn.dls.train_ds.y, saw['z'][order], torch.tensor(got['lam'].to_numpy(dtype=np.float64))
    y, y1 = ys[own[order]], ys[other[order]]
    assert_cols(got, truth(z, y, lambda z: lam * rows_loss(z, y, weight=W) + (1 - lam) * rows_loss(z, y1, weight=W)))
    plain = make([])
    plain.fit(2)
    same_bits(state(plain), state(learn))

def test_check_finds_a_loss_that_does_not_add_up():
    "The check that the tests here rely on: it does speak up."
    class Other(Callback):
        order = 20
        def after_loss(self): self.learn.loss = self.learn.loss * 1.01
    with warned() as said: learner([XentRecorder(check=True), Other()]).fit(1)
    assert len(said) == 1 and "of 'train' the losses of the rows do not add up to the Learner's in 5 of 5 batches" in said[0] and 'it is 1.01 times theirs, each time' in said[0]


# -- 5. resume, export, segments

class Named(Points):
    "Points with the names of files."
    def __init__(self, n=36, names=None, vocab=('a', 'b', 'c'), **kw):
        super().__init__(n, **kw)
        self.items, self.vocab = [f'{i}.png' for i in (range(n) if names is None else names)], list(vocab)

def named(cbs, train=None, valid=None, vocab=None, **kw):
    learn = learner(cbs, train=train or Named(), valid=valid or Named(18, range(100, 118), seed=1), **kw)
    if vocab is not None: learn.dls.vocab = vocab
    return learn

@pytest.mark.parametrize('k', [1, 3])
def test_stop_and_go_on(k, tmp_path):
    "k epochs, saved, then the rest in a new Learner: the same record as of one training that was not stopped."
    opened = named
    def epochs(learn, *args, **kw):
        with warned() as said:
            for e in range(*args):
                set_seed(e)                            # the order of an epoch is that of its number
                learn.dls.train.rng = random.Random(e)
                learn.fit(1, reset_opt=False, **kw)
        assert not said, said
    whole = XentRecorder(tmp_path / 'whole')
    learn = opened([whole])
    epochs(learn, 5)
    first = opened([XentRecorder(tmp_path / 'parts', check=True)])
    epochs(first, k)
    first.save(tmp_path / 'stopped', with_opt=True)
    before = XentRecord(tmp_path / 'parts').to_df()
    second = opened([XentRecorder(tmp_path / 'parts', resume=True, check=True)])
    second.load(tmp_path / 'stopped', with_opt=True)
    epochs(second, k, 5)
    a, b = XentRecord(tmp_path / 'parts'), whole.record
    pd.testing.assert_frame_equal(a.to_df(), b.to_df())
    pd.testing.assert_frame_equal(a.to_df()[lambda o: o['epoch'] < k].reset_index(drop=True), before)
    np.testing.assert_array_equal(a.score(), b.score())
    same_bits(second.model.state_dict(), learn.model.state_dict())
    assert (a._n_fits, a.n_epochs) == (5, 5) and len(a.meta['splits']['train']['segments']) == 1

def test_start_epoch(tmp_path):
    "`fit(n, start_epoch=k)` after a resume trains the epochs that are missing; the record's numbers go on."
    class Stop(Callback):
        def after_epoch(self):
            if self.learn.epoch == 1: raise CancelFitException()
    first = named([XentRecorder(tmp_path / 'r'), Stop()])
    first.fit(5)
    first.save(tmp_path / 'stopped', with_opt=True)
    assert XentRecord(tmp_path / 'r').n_epochs == 2
    second = named([XentRecorder(tmp_path / 'r', resume=True)])
    fit(second.load(tmp_path / 'stopped', with_opt=True), 5, start_epoch=2)
    record = XentRecord(tmp_path / 'r')
    assert [(f, e) for f, s, e in record.epochs if s == 'train'] == [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4)]
    assert record.to_df('train').groupby('epoch').size().tolist() == [36] * 5

REFUSED = {
    'names': (dict(train=lambda: Named(names=[*range(35), 99])), "'train'", "1 of 36", "differ, the first is item 35", "'35.png' then and '99.png' now"),
    'order': (dict(train=lambda: Named(names=[1, 0, *range(2, 36)])), "'train'", '2 of 36', 'differ, the first is item 0'),
    'length': (dict(train=lambda: Named(37)), "'train'", '36 items then, 37 now'),
    'valid': (dict(valid=lambda: Named(18, range(101, 119), seed=1)), "'valid'", '18 of 18', 'differ'),
    'classes': (dict(vocab=['c', 'b', 'a']), "class 0 was 'a' and is 'c'", 'use a new record'),
    'number of classes': (dict(model=lambda: Net(out=5)), '5 classes', '3'),
}

@pytest.mark.parametrize('name', REFUSED)
def test_resume_that_does_not_fit(name, tmp_path):
    "Refused with the difference named; what was there stays; training goes on."
    kw, *words = REFUSED[name]
    named([XentRecorder(tmp_path / 'r')], vocab=['a', 'b', 'c']).fit(2)
    before, meta = XentRecord(tmp_path / 'r').to_df(), XentRecord(tmp_path / 'r').meta
    def run(cbs):
        set_seed(0)
        learn = named(cbs, **{'vocab': ['a', 'b', 'c'], **{k: v() if callable(v) else v for k, v in kw.items()}})
        learn.fit(2)
        return state(learn)
    with warned() as said: end = run([XentRecorder(tmp_path / 'r', resume=True)])
    assert said and all(w in said[0] for w in words), said
    same_bits(end, run([]))
    record = XentRecord(tmp_path / 'r')
    pd.testing.assert_frame_equal(record.to_df(), before)
    assert {k: record.meta[k] for k in ('vocab', 'splits', 'classes')} == {k: meta[k] for k in ('vocab', 'splits', 'classes')}
    fit(named([XentRecorder(tmp_path / 'r', resume=True)], vocab=['a', 'b', 'c']), 1)          # and it can still be resumed
    assert XentRecord(tmp_path / 'r').n_epochs == 3

def split_learner(cbs, seed, n=54, names=True):
    "A source that a RandomSplitter divides."
    source = Points(n)
    def x_of(i): return source.x[int(str(i).split('.')[0])]
    def y_of(i): return int(source.y[int(str(i).split('.')[0])])
    items = [f'{i}.png' for i in range(n)] if names else list(range(n))
    dsets = Datasets(items, [[x_of], [y_of]], splits=RandomSplitter(1/3, seed=seed)(items))
    set_seed(0)
    dls = dsets.dataloaders(bs=8, num_workers=0, after_item=[ToTensor()], drop_last=False, shuffle=True)
    return quiet(Learner(dls, Net(), loss_func=XentLossFlat(), lr=.05, cbs=cbs))

@pytest.mark.parametrize('names', [True, False])
def test_resume_after_another_split(names, tmp_path):
    "A splitter without a seed divides differently the next time: found out also where items have no names."
    split_learner([XentRecorder(tmp_path / 'r')], 1, names=names).fit(1)
    before = XentRecord(tmp_path / 'r').to_df()
    fit(split_learner([XentRecorder(tmp_path / 'r', resume=True)], 1, names=names), 1)
    with warned() as said: split_learner([XentRecorder(tmp_path / 'r', resume=True)], 2, names=names).fit(1)
    assert len(said) == 1 and "'train'" in said[0] and 'other items' in said[0] and re.search('of 36 (items )?differ', said[0])
    after = XentRecord(tmp_path / 'r').to_df()
    pd.testing.assert_frame_equal(after[after['epoch'] == 0].reset_index(drop=True), before)
    assert after['epoch'].max() == 1

@pytest.mark.parametrize('split', ['train', 'valid'])
def test_resume_without_names(split, tmp_path):
    "Datasets without names are told apart by their labels."
    learner([XentRecorder(tmp_path / 'r')]).fit(1)
    fit(learner([XentRecorder(tmp_path / 'r', resume=True)]), 1)
    before = XentRecord(tmp_path / 'r').to_df()
    other = learner([XentRecorder(tmp_path / 'r', resume=True)], **({'train': Points(36, seed=9)} if split == 'train' else {'valid': Points(18, seed=9)}))
    with warned() as said: other.fit(2)
    assert len(said) == 1 and repr(split) in said[0] and 'other labels' in said[0] and 'use a new path' in said[0]
    after = XentRecord(tmp_path / 'r').to_df()
    pd.testing.assert_frame_equal(after[after['epoch'] < 2].reset_index(drop=True), before)
    assert after[after['epoch'] >= 2].groupby(['epoch', 'split'], observed=True).size().to_dict() == ({} if split == 'train' else {(2, 'train'): 36})   # train comes before valid is seen

def test_save_model_and_early_stopping(tmp_path):
    class Worse(Callback):
        "A validation loss that grows."
        order = 45
        def after_loss(self):
            if not self.learn.training: self.learn.loss = self.learn.loss + self.learn.epoch
    def run(cbs):
        learn = named([*cbs, Worse(), SaveModelCallback(fname='best', with_opt=True), EarlyStoppingCallback(patience=2)], path=tmp_path, model_dir='m')
        with contextlib.redirect_stdout(None): learn.fit(10)
        return state(learn)
    rec = XentRecorder(tmp_path / 'r')
    with warned() as said: end = run([rec])
    assert not said, said
    same_bits(end, run([]))
    assert rec.record.n_epochs == 3 and rec.record.to_df().groupby(['epoch', 'split'], observed=True).size().tolist() == [36, 18] * 3
    learn = named([XentRecorder(tmp_path / 'r', resume=True)], path=tmp_path, model_dir='m')
    fit(learn.load('best', with_opt=True), 1)
    assert XentRecord(tmp_path / 'r').n_epochs == 4

LOAD = """
import sys
sys.path.insert(0, {here!r})
if {blocked}:
    class No:
        def find_spec(self, name, *args):
            if name.startswith('fastai_xent'): raise ImportError(name)
    sys.meta_path.insert(0, No())
import json, torch
from fastai.learner import load_learner
told = {{}}
for path in {paths!r}:
    learn = load_learner(path, cpu=True)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    preds, _ = learn.get_preds(dl=learn.dls.test_dl([([i, 1., 2., 3.], 0) for i in range(5)]))
    told[path] = preds.tolist(), [cb.name for cb in learn.cbs]
print(json.dumps(told), any(k.startswith('fastai_xent') for k in sys.modules))
"""

def exported(where, tmp_path, loss_func, keep=True) -> tuple:
    "A learner that was trained, recorded and exported: the file, its predictions, and the place of its record."
    path = dict(disk=tmp_path / 'record', store='memory://runs/export').get(where)
    source = Points()
    dsets = Datasets([(x[:4].tolist(), int(y)) for x, y in zip(source.x, source.y)], [[ItemGetter(0), tensor], [ItemGetter(1)]], splits=RandomSplitter(1/3, seed=0)(range(36)))
    rec = XentRecorder(path, eval_every=1, overwrite=where == 'store')
    learn = quiet(Learner(dsets.dataloaders(bs=6, num_workers=0), nn.Sequential(nn.Linear(4, 3)), loss_func=loss_func, cbs=[rec, MixUp(.4)], path=tmp_path))
    fit(learn, 1)
    assert rec.record.n_epochs == 1
    if not keep: learn.remove_cb(rec)
    learn.logger = print                                  # not that of the helpers
    preds, _ = learn.get_preds(dl=learn.dls.test_dl([([i, 1., 2., 3.], 0) for i in range(5)]))
    learn.export(f'{where}.pkl')
    return str(tmp_path / f'{where}.pkl'), preds, path

def loaded(paths, tmp_path, blocked=False) -> tuple:
    "In another process: predictions and callbacks of each learner, and whether this package was imported."
    program = tmp_path / 'load.py'
    program.write_text(LOAD.format(here=str(Path(__file__).resolve().parent.parent), paths=paths, blocked=blocked))
    ran = subprocess.run([sys.executable, '-W', 'ignore', program], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    told, imported = ran.stdout.strip().rsplit(' ', 1)
    return json.loads(told), imported == 'True'

def test_export(tmp_path):
    "A learner loads in another process after its record is gone, wherever that was, and predicts the same."
    files = [exported(where, tmp_path, XentLossFlat()) for where in ('disk', 'store', 'memory')]
    shutil.rmtree(files[0][2])
    told, imported = loaded([f[0] for f in files], tmp_path)
    for path, preds, _ in files:
        assert_close(torch.tensor(told[path][0]), preds)
        assert 'xent_recorder' in told[path][1]
    assert imported and not files[0][2].exists()

def test_export_names_nothing_of_ours_without_us(tmp_path):
    path, _, _ = exported('memory', tmp_path, CrossEntropyLossFlat(), keep=False)
    with zipfile.ZipFile(path) as z: names, = [o for o in z.namelist() if o.endswith('data.pkl')]
    with zipfile.ZipFile(path) as z: assert b'fastai_xent' not in z.read(names)

@pytest.mark.slow
def test_export_without_us(tmp_path):
    "Once the recorder is removed, and with fastai's loss, nothing of ours is left in the file: it loads where this package is not installed."
    path, preds, _ = exported('memory', tmp_path, CrossEntropyLossFlat(), keep=False)
    told, imported = loaded([path], tmp_path, blocked=True)
    assert_close(torch.tensor(told[path][0]), preds)
    assert 'xent_recorder' not in told[path][1] and not imported

def test_progressive_resizing(tmp_path):
    "The same items at another size are the same segment; another split is another one."
    rec = XentRecorder(tmp_path / 'r')
    learn = split_learner([rec], 1)
    fit(learn, 1)
    learn.dls = split_learner([], 1).dls
    fit(learn, 1)
    assert rec.record.items().shape[0] == 36 and len(rec.record.item(3)) == 2
    learn.dls = split_learner([], 2).dls
    said = fit(learn, 1, said=2)
    assert all("another one from epoch 2 on; its rows go to segment 1" in o for o in said)
    assert rec.record._list_at('train', 1) == 0 and rec.record._list_at('train', 2) == 1

@pytest.mark.parametrize('where', ['memory', 'disk'])
@pytest.mark.parametrize('has_names', [True, False])
def test_segments(has_names, where, tmp_path):
    "A, then B, then A again, then another set of B's size: no row of one in a score of another."
    rec = XentRecorder(tmp_path / 'r' if where == 'disk' else None)
    A, B, C = Points(36), Points(30, seed=3), Points(36, seed=5)
    if has_names: A, B, C = Named(36), Named(30, range(200, 230), seed=3), Named(36, range(300, 336), seed=5)
    learn = learner([rec], train=A)
    sets, said = [A, B, A, C, B, C], []
    for ds in sets:
        learn.dls = DataLoaders(TfmdDL(ds, bs=8, shuffle=True, num_workers=0), learn.dls.valid)
        with warned() as messages: learn.fit(1)
        said.append(len(messages))
    assert said == [0, 1, 0, 1, 0, 0]                          # told when a new segment begins
    record = rec.record if where == 'memory' else XentRecord(tmp_path / 'r')
    assert [record._list_at('train', e) for e in range(6)] == [0, 1, 0, 2, 1, 2]
    df = record.to_df('train')
    for k, ds in enumerate((A, B, C)):
        epochs = [e for e, o in enumerate(sets) if o is ds]
        mine = df[df['epoch'].isin(epochs)].astype({'loss': float, 'margin': float})
        assert mine.groupby('item')['targ'].first().tolist() == ds.y.tolist()
        np.testing.assert_allclose(record.score('loss', segment=k), mine.groupby('item')['loss'].mean(), rtol=1e-6)
        top = record.top(3, by='margin_loss', segment=k)
        best = np.logaddexp(0, -mine['margin']).groupby(mine['item']).mean().sort_values(ascending=False)
        assert top['item'].tolist() == best.index[:3].tolist()
        np.testing.assert_allclose(top['score'], best[:3], rtol=1e-6)
        assert top['targ'].tolist() == [record._class_name(int(ds.y[i])) for i in top['item']]
        if has_names: assert top['name'].tolist() == [ds.items[i] for i in top['item']]
        assert record.item(3, segment=k)['epoch'].tolist() == epochs
        assert record.seen(segment=k)['rows'].tolist() == [2] * len(ds)
    assert len(record.score('loss')) == 36
    with pytest.raises(IndexError, match='segment 3'): record.top(segment=3)

def test_a_dataset_that_only_looks_like_the_first():
    "Without names, a set of the first one's length and other labels is not the first one, also if there was another in between."
    rec = XentRecorder()
    learn = learner([rec], train=Points(36))
    for ds in (Points(36), Points(40, seed=3), Points(36, seed=5)):
        learn.dls = DataLoaders(TfmdDL(ds, bs=8, shuffle=True, num_workers=0), learn.dls.valid)
        with warned(): learn.fit(1)
    assert [rec.record._list_at('train', e) for e in range(3)] == [0, 1, 2]


# -- 6. the look without augmentation

class Jitter(RandTransform):
    "Augmentation with fastai's rule: train only, drawn from numpy's and python's generators."
    split_idx = 0
    def __init__(self): super().__init__(p=.8)
    def before_call(self, b, split_idx):
        super().before_call(b, split_idx)
        self.shift = random.random() + np.random.rand()
    def encodes(self, x: TensorImage): return x + self.shift * torch.rand(1)

class BatchJitter(RandTransform):
    split_idx = 0
    def before_call(self, b, split_idx):
        super().before_call(b, split_idx)
        self.shift = torch.rand(1)
    def encodes(self, x: TensorImage): return x + self.shift

def augmented(cbs, workers=0, epochs_seed=0, drop_last=True, dropout=.3):
    "Items, and pictures of them that augmentation changes; the index is the last column, rounded."
    source = Points(40)
    x_of, y_of = Looks(source.x[:, :4]), Looks(source.y)
    dsets = Datasets(list(range(40)), [[x_of, Image()], [y_of]], splits=[list(range(4, 32)), [0, 1, 2, 3, *range(32, 40)]])
    set_seed(epochs_seed)
    dls = dsets.dataloaders(bs=8, num_workers=workers, after_item=[Jitter(), ToTensor()], after_batch=[BatchJitter()], shuffle=True, drop_last=drop_last)
    return quiet(Learner(dls, Net(dropout=dropout), loss_func=XentLossFlat(label_smoothing=.1), lr=.05, cbs=cbs)), source

class Looks:
    def __init__(self, of): self.of = of
    def __call__(self, i): return self.of[int(i)]
class Image:
    def __call__(self, x): return TensorImage(x)

class Frozen(Callback):
    "After the epochs of interest, keeps a copy of the model; before the recorder."
    order = 39
    def __init__(self): self.models = {}
    def after_epoch(self): self.models[self.learn.epoch] = copy.deepcopy(self.learn.model).eval()

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('every', [1, 2])
def test_train_eval(every, workers):
    "Rows of 'train_eval' are those of a plain forward pass in eval mode over the items without augmentation."
    rec, models = XentRecorder(eval_every=every, check=True), Frozen()
    learn, source = augmented([models, rec], workers)
    fit(learn, 2 * every)
    record = rec.record
    assert [k[2] for k in record.epochs if k[1] == 'train_eval'] == list(range(every - 1, 2 * every, every))
    x, y = source.x[4:32, :4], source.y[4:32]
    for e in range(every - 1, 2 * every, every):
        got = record.to_df('train_eval', e)
        with torch.no_grad(): z = models.models[e](x)
        assert got['item'].tolist() == list(range(28))                   # all, though training drops the incomplete batch
        assert_cols(got, truth(z, y, lambda z: rows_loss(z, y, label_smoothing=.1)))
        assert got['pred'].tolist() == z.argmax(1).tolist() and got['targ'].tolist() == y.tolist() and got['step'].isna().all()
        train = record.to_df('train', e).merge(got, on='item', suffixes=('', '_eval'))
        assert len(train) == 24 and (train['loss'] - train['loss_eval']).abs().min() > 0
    assert record.items('train_eval')['source'].tolist() == list(range(4, 32))
    assert len(record.score('loss', 'train_eval')) == 28

@pytest.mark.parametrize('workers', [0, 2])
def test_train_eval_leaves_the_training_alone(workers):
    "Weights, optimizer, losses and random states are the same to the bit, with dropout, batch norm, shuffle and augmentation."
    def run(cbs):
        learn, _ = augmented(cbs, workers)
        learn.fit(2)
        return state(learn), [m.training for m in learn.model.modules()]
    plain = run([])
    for kw in (dict(), dict(eval_every=1), dict(eval_every=2)):
        rec = XentRecorder(**kw)
        with warned() as said: same_bits(plain, run([rec]))
        assert not said and rec.record.n_epochs == 2

def test_train_eval_random_states():
    "The generators of torch, numpy and python stand where they stood, at the end of every epoch."
    class States(Callback):
        order = 41                                                       # just after the recorder
        def before_fit(self): self.seen = []
        def after_epoch(self): self.seen.append((rng_state(), [m.training for m in self.learn.model.modules()], self.learn.training))
    def run(**kw):
        states = States()
        learn, _ = augmented([XentRecorder(**kw), states])
        learn.fit(2)
        return states.seen
    same_bits(run(), run(eval_every=1))

def test_train_eval_keeps_each_module_s_mode():
    "A frozen batch norm that the user holds in eval mode stays there, and the others go back to train."
    class Hold(Callback):
        def before_batch(self): self.learn.model.body[1].eval()
    modes = []
    class Modes(Callback):
        order = 41
        def after_epoch(self): modes.append([m.training for m in self.learn.model.modules()])
    for kw in ({}, dict(eval_every=1)): learner([Hold(), XentRecorder(**kw), Modes()]).fit(1)
    assert modes[0] == modes[1]

def test_train_eval_with_mixup_weights_and_torch_loaders():
    "Nothing is mixed in the look; a weighted loader's items come once each; torch loaders work."
    rec = XentRecorder(eval_every=1, check=True)
    fit(mixer('mixup', [rec]), 1)
    got = rec.record.to_df('train_eval')
    assert len(got) == N and got['lam'].isna().all()
    rec = XentRecorder(eval_every=1)
    learn = learner([rec])
    learn.dls = DataLoaders(WeightedDL(Points(), bs=8, wgts=np.arange(1., 37), shuffle=True, num_workers=0), learn.dls.valid)
    fit(learn, 1)
    assert rec.record.to_df('train_eval')['item'].tolist() == list(range(36))
    rec = XentRecorder(eval_every=1)
    set_seed(0)
    dls = DataLoaders(*(torch.utils.data.DataLoader(Points(n), batch_size=8, shuffle=True) for n in (36, 18)))
    learn = quiet(Learner(dls, Net(), loss_func=XentLossFlat(), lr=.1, cbs=rec))
    fit(learn, 1)
    with torch.no_grad(): z = learn.model.eval()(Points().x)
    assert_cols(rec.record.to_df('train_eval'), truth(z, Points().y, lambda z: rows_loss(z, Points().y)))

WHOLE = {'partial': lambda ds: PartialDL(ds, bs=4, partial_n=12, num_workers=0), 'n=': lambda ds: TfmdDL(ds, bs=4, n=20, shuffle=True, num_workers=0), 'drop_last': lambda ds: TfmdDL(ds, bs=8, shuffle=True, drop_last=True, num_workers=0),
         'sorted': lambda ds: SortedDL(ds, bs=4, res=[i * 7 % 36 for i in range(36)], shuffle=True, num_workers=0)}

@pytest.mark.parametrize('kind', WHOLE)
def test_train_eval_looks_at_all(kind):
    "Each item once, whatever part of them the training takes."
    rec = XentRecorder(eval_every=1, check=True)
    learn = learner([rec])
    learn.dls = DataLoaders(WHOLE[kind](Points()), learn.dls.valid)
    fit(learn, 2)
    with torch.no_grad(): z = learn.model.eval()(Points().x)
    got = rec.record.to_df('train_eval', 1)
    assert got['item'].tolist() == list(range(36)) and len(rec.record.to_df('train', 1)) == {'partial': 12, 'n=': 20, 'drop_last': 32, 'sorted': 36}[kind]
    assert_cols(got, truth(z, Points().y, lambda z: rows_loss(z, Points().y)))

def test_train_eval_of_a_table():
    df = tabular_frame()
    to = TabularPandas(df, procs=[Categorify], cat_names=['kind'], cont_names=['a', 'b'], y_names='label', splits=RandomSplitter(.25, seed=3)(range(60)), y_block=CategoryBlock())
    def run(cbs):
        set_seed(0)
        learn = quiet(tabular_learner(to.dataloaders(bs=16, num_workers=0), layers=[8], loss_func=XentLossFlat(), cbs=cbs))
        learn.fit(2)
        return learn
    rec = XentRecorder(eval_every=2, check=True)
    with warned() as said: learn = run([rec])
    assert not said, said
    same_bits(state(learn), state(run([])))
    with torch.no_grad(): z = learn.model.eval()(torch.tensor(to.train.cats.to_numpy()).long(), torch.tensor(to.train.conts.to_numpy()).float())
    y = torch.tensor(to.train.ys.to_numpy()).long().view(-1)
    got = rec.record.to_df('train_eval')
    assert got['item'].tolist() == list(range(45)) and rec.record.items('train_eval')['name'].tolist() == to.train.items.index.tolist()
    assert_cols(got, truth(z, y, lambda z: rows_loss(z, y)))

def test_train_eval_with_progress(capsys):
    "With fastai's bars: the same training, the same rows."
    recs = []
    for bars in (False, True):
        recs.append(XentRecorder(eval_every=1, check=True))
        learn = learner([recs[-1]])
        if bars: learn.add_cb(ProgressCallback())
        fit(learn, 2)
    pd.testing.assert_frame_equal(recs[0].record.to_df(), recs[1].record.to_df())
    assert '100.00%' in capsys.readouterr().out

def test_interrupted_train_eval():
    "Ctrl-C during the look: finished passes stay, the loader is as before, and the next fit is whole."
    class Stops(Points):
        reads = 0
        def __getitem__(self, i):
            self.reads += 1
            if self.reads == 36 + 5: raise KeyboardInterrupt
            return super().__getitem__(i)
    rec = XentRecorder(eval_every=1, check=True)
    learn = learner([rec], train=Stops())
    with pytest.raises(KeyboardInterrupt): learn.fit(2)
    assert not {'get_idxs', 'create_batches', 'do_item'} & set(vars(learn.dls.train))
    assert [k[1] for k in rec.record.epochs] == ['train', 'valid']
    fit(learn, 1)
    assert rec.record.to_df().groupby(['epoch', 'split'], observed=True).size().to_dict() == {(0, 'train'): 36, (0, 'valid'): 18, (1, 'train'): 36, (1, 'train_eval'): 36, (1, 'valid'): 18}

def test_train_eval_is_in_eval_mode():
    "Also if somebody has put the model back to train mode before; and there it stays for them."
    class Back(Callback):
        order = 38
        def after_epoch(self): self.learn.model.train()
    modes = []
    class After(Callback):
        order = 41
        def after_epoch(self): modes.append(self.learn.model.training)
    rec, models = XentRecorder(eval_every=1, check=True), Frozen()
    learn = learner([Back(), models, rec, After()], model=Net(dropout=.5))
    fit(learn, 1)
    with torch.no_grad(): z = models.models[0](Points().x)
    assert_cols(rec.record.to_df('train_eval'), truth(z, Points().y, lambda z: rows_loss(z, Points().y)))
    assert modes == [True]

class Pairs(Points):
    "Two inputs."
    n_inp = 2
    def __getitem__(self, i): return self.x[i], self.x[i], self.y[i]
class PairNet(Net):
    def forward(self, a, b): return super().forward(a) + 2 * super().forward(b)

@pytest.mark.parametrize('kind', ['fastai', 'torch'])
def test_train_eval_with_two_inputs(kind):
    rec = XentRecorder(eval_every=1, check=True)
    set_seed(0)
    if kind == 'fastai':
        dls = DataLoaders(TfmdDL(Pairs(), bs=8, shuffle=True, num_workers=0), TfmdDL(Pairs(18), bs=8, num_workers=0))
    else: dls = DataLoaders(*(torch.utils.data.DataLoader(Pairs(n), batch_size=8, shuffle=True) for n in (36, 18)))
    learn = quiet(Learner(dls, PairNet(), loss_func=XentLossFlat(), lr=.1, cbs=rec))
    fit(learn, 1)
    ds = Pairs()
    with torch.no_grad(): z = learn.model.eval()(ds.x, ds.x)
    assert_cols(rec.record.to_df('train_eval'), truth(z, ds.y, lambda z: rows_loss(z, ds.y)))


# -- 7. how stale is what is known of an item?

def test_seen_of_a_weighted_loader():
    "An item that comes several times an epoch has several rows; one that never comes is listed, and has no score."
    wgts = np.r_[0., 0., 0., np.full(33, 1.)]
    rec = XentRecorder(check=True)
    learn, saw = learner([rec]), Saw()
    learn.add_cbs([saw, SawLoss(saw)])
    learn.dls = DataLoaders(WeightedDL(Points(), bs=8, wgts=wgts, shuffle=True, num_workers=0), learn.dls.valid)
    fit(learn, 3)
    df, seen = rec.record.to_df('train'), rec.record.seen()
    counts, last = np.zeros(36, dtype=int), {}
    step = 0
    for b in saw.batches:
        if b['split'] != 'train': continue
        for i in item_of(b['x']).tolist():
            counts[i] += 1
            last[i] = (b['epoch'], step)
        step += 1
    assert counts[:3].tolist() == [0, 0, 0] and counts.max() > 3
    assert seen['rows'].tolist() == counts.tolist()
    for col, k in (('last_epoch', 0), ('last_step', 1)):
        assert [None if pd.isna(v) else v for v in seen[col]] == [last[i][k] if i in last else None for i in range(36)]
    assert (df.groupby(['epoch', 'item'])['occurrence'].apply(lambda o: sorted(o) == list(range(len(o))))).all() and df['occurrence'].max() > 0
    score = rec.record.score('loss')
    assert np.isnan(score).tolist() == (counts == 0).tolist()
    np.testing.assert_allclose(score[counts > 0], df.astype({'loss': float}).groupby('item')['loss'].mean(), rtol=1e-6)
    assert not {0, 1, 2} & set(rec.record.top(36)['item']) and len(rec.record.top(36)) == (counts > 0).sum()
    assert len(rec.record.item(0)) == 0

def test_seen_of_a_partial_loader():
    rec, saw = XentRecorder(check=True), Saw()
    learn = learner([rec, saw, SawLoss(saw)])
    learn.dls = DataLoaders(PartialDL(Points(), bs=4, partial_n=12, num_workers=0), learn.dls.valid)
    fit(learn, 2)
    came = [item_of(b['x']).tolist() for b in saw.batches if b['split'] == 'train']
    counts = np.bincount(np.concatenate(came), minlength=36)
    seen = rec.record.seen()
    assert seen['rows'].tolist() == counts.tolist() and counts.sum() == 24 and (counts == 0).any()
    assert seen['last_epoch'].isna().tolist() == (counts == 0).tolist() == np.isnan(rec.record.score('loss')).tolist()

def test_seen_across_fits_and_validation():
    "`last_step` counts in its fit; validation has no steps."
    rec = XentRecorder()
    learn = learner([rec])
    fit(learn, 2)
    fit(learn, 1)
    seen = rec.record.seen()
    assert (seen['rows'] == 3).all() and (seen['last_epoch'] == 2).all()
    last = rec.record.to_df('train', 2).set_index('item')['step']
    assert seen['last_step'].tolist() == last.tolist() and last.between(0, 4).all()
    assert rec.record.to_df('train', 1)['step'].between(5, 9).all()
    assert rec.record.seen('valid')['last_step'].isna().all() and (rec.record.seen('valid')['rows'] == 3).all()


# -- 8. names

def tabular_frame(n=60):
    g = np.random.default_rng(0)
    y = g.integers(0, 3, n)
    return pd.DataFrame({'kind': g.choice(['u', 'v'], n), 'a': g.normal(size=n) + y, 'b': np.arange(n).astype(float), 'label': np.array(['lo', 'mid', 'hi'])[y]}, index=[f'row-{7 * i % n}' for i in range(n)])

def test_tabular_learner():
    "Names are the labels of the frame's rows, whatever the split did to their order. (fastai draws a table's training rows with replacement.)"
    df = tabular_frame()
    set_seed(0)
    splits = RandomSplitter(.25, seed=3)(range(len(df)))
    to = TabularPandas(df, procs=[Categorify], cat_names=['kind'], cont_names=['a', 'b'], y_names='label', splits=splits, y_block=CategoryBlock())
    dls = to.dataloaders(bs=16, num_workers=0)
    saw = []
    class SawTable(Callback):
        order = 39
        def after_loss(self):
            if self.learn.training: saw.append((self.learn.xb[1][:, 1].clone(), self.learn.yb[0].view(-1).long().clone(), self.learn.pred.detach().clone()))
    rec = XentRecorder(check=True)
    learn = quiet(tabular_learner(dls, layers=[8], loss_func=XentLossFlat(), cbs=[rec, SawTable()]))
    fit(learn, 2)
    items, got = rec.record.items(), rec.record.to_df('train')
    assert items['name'].tolist() == [df.index[i] for i in splits[0]]
    assert rec.record.items('valid')['name'].tolist() == [df.index[i] for i in splits[1]]
    assert rec.record.meta['vocab'] == ['hi', 'lo', 'mid']
    merged = got.merge(items, on='item').set_index('name')
    assert [rec.record._class_name(c) for c in merged['targ']] == df.loc[merged.index, 'label'].tolist()
    b = torch.cat([o[0] for o in saw]).round().long().numpy()             # column b is the row's position in the frame
    z, y = torch.cat([o[2] for o in saw]), torch.cat([o[1] for o in saw])
    want = pd.DataFrame({'name': df.index[b], 'loss_want': rows_loss(z.double(), y).numpy(), 'epoch': np.repeat([0, 1], len(b) // 2)})
    want['occurrence'] = want.groupby(['epoch', 'name']).cumcount()
    both = got.merge(items, on='item').merge(want, on=['name', 'epoch', 'occurrence'])
    assert len(both) == len(got) == 2 * 32 and got['occurrence'].max() > 0
    np.testing.assert_allclose(both['loss'].astype(float), both['loss_want'], rtol=1e-5)
    assert set(rec.record.top(3)['name']) <= set(df.index)

def ratings(n=50, **cols):
    g = np.random.default_rng(0)
    return pd.DataFrame({'user': g.integers(0, 6, n), 'movie': g.choice(list('abcdef'), n), **cols}, index=np.arange(n) * 3 + 1000)

def test_collab_learner_of_ratings():
    "Ratings are a regression: told once for each split, and trained the same."
    def run(cbs):
        set_seed(0)
        dls = CollabDataLoaders.from_df(ratings(rating=np.random.default_rng(1).uniform(1, 5, 50)), valid_pct=.2, seed=1, bs=8)
        learn = quiet(collab_learner(dls, n_factors=3, y_range=(0, 5.5), cbs=cbs))
        learn.fit(2)
        return state(learn)
    with warned() as said: end = run([XentRecorder()])
    assert len(said) == 2 and 'expected class logits' in said[0], said
    same_bits(end, run([]))

class TwoTables(nn.Module):
    def __init__(self, sizes, c):
        super().__init__()
        self.tables, self.out = nn.ModuleList([nn.Embedding(n, 4) for n in sizes]), nn.Linear(8, c)
    def forward(self, x, _=None): return self.out(torch.cat([t(x[:, i]) for i, t in enumerate(self.tables)], 1))

def test_collab_classes():
    "Collaborative filtering with classes: rows keep the labels of the frame."
    df = ratings(rating=np.random.default_rng(1).choice(['bad', 'good', 'great'], 50))
    set_seed(0)
    to = TabularCollab(df, procs=[Categorify], cat_names=['user', 'movie'], y_names=['rating'], y_block=CategoryBlock(), splits=RandomSplitter(.2, seed=1)(range(50)))
    dls = to.dataloaders(bs=8, num_workers=0)
    rec = XentRecorder(check=True)
    learn = quiet(Learner(dls, TwoTables([len(to.classes[o]) for o in ('user', 'movie')], 3), loss_func=XentLossFlat(), cbs=rec))
    fit(learn, 2)
    got = rec.record.to_df('train').merge(rec.record.items(), on='item')
    assert [rec.record._class_name(c) for c in got['targ']] == df.loc[got['name'].astype(int), 'rating'].tolist()
    assert len(got) == 80

def test_names_of_a_data_block():
    "ImageBlock and ColReader from a DataFrame: row labels; `source` is the row's position."
    g = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as where:
        df = pd.DataFrame({'file': [f'{i}.png' for i in range(18)], 'label': g.choice(['cat', 'dog'], 18)}, index=[f'id{i}' for i in range(18)][::-1])
        for i in range(18): PIL.Image.fromarray(np.full((6, 6, 3), 10 * i, dtype=np.uint8)).save(f'{where}/{i}.png')
        splits = RandomSplitter(1/3, seed=2)(range(18))
        block = DataBlock([ImageBlock, CategoryBlock], get_x=ColReader('file', pref=f'{where}/'), get_y=ColReader('label'), splitter=IndexSplitter(splits[1]))
        set_seed(0)
        dls = block.dataloaders(df, bs=4, num_workers=0, drop_last=False)
        rec = XentRecorder(eval_every=1, check=True)
        saw = []
        class SawPicture(Callback):
            order = 39
            def after_loss(self):
                if not self.learn.lock.locked(): saw.append((self.learn.xb[0].flatten(1)[:, 0].mul(25.5).round().long(), rows_loss(self.learn.pred.detach().as_subclass(torch.Tensor).double(), self.learn.yb[0].as_subclass(torch.Tensor))))
        learn = quiet(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(108, 2)), loss_func=XentLossFlat(), lr=.01, cbs=[rec, SawPicture()]))
        fit(learn, 1)
        for split, k in (('train', 0), ('valid', 1)):
            items = rec.record.items(split)
            rows = sorted(splits[1]) if k else [i for i in range(18) if i not in set(splits[1])]
            assert sorted(items['source'].tolist()) == rows
            assert items['name'].tolist() == df.index[items['source'].to_numpy(dtype=int)].tolist()
            got = rec.record.to_df(split).merge(items, on='item')
            assert [rec.record._class_name(c) for c in got['targ']] == df['label'].iloc[got['source'].to_numpy(dtype=int)].tolist()
            want = {int(i): float(v) for pair in saw for i, v in zip(*pair)}
            np.testing.assert_allclose(got['loss'].astype(float), [want[i] for i in got['source']], rtol=1e-5)
        assert rec.record.items('train_eval')['name'].tolist() == rec.record.items('train')['name'].tolist()

def test_names_of_paths_and_sources(tmp_path):
    "Files: names are paths, `source` their positions before the split, also in validation."
    rec = XentRecorder(tmp_path / 'r')
    fit(split_learner([rec], 5), 1)
    train, valid = RandomSplitter(1/3, seed=5)(range(54))
    for split, idx in (('train', train), ('valid', valid)):
        items = XentRecord(tmp_path / 'r').items(split)
        assert items['source'].tolist() == list(idx) and items['name'].tolist() == [f'{i}.png' for i in idx]
    got = rec.record.to_df('train').merge(rec.record.items(), on='item')
    assert got['targ'].tolist() == Points(54).y[got['source'].to_numpy(dtype=int)].tolist()

def test_key_fn(tmp_path):
    "A key of the user's own names the items, and decides whether a record fits."
    def key(name): return f"patient {int(name.split('.')[0]) % 100}"
    rec = XentRecorder(tmp_path / 'r', key_fn=key)
    fit(named([rec]), 1)
    assert rec.record.items()['name'].tolist() == [f'patient {i}' for i in range(36)]
    assert rec.record.items('valid')['name'].tolist() == [f'patient {i}' for i in range(18)]
    moved = Named(names=range(100, 136))                                  # other files, the same keys
    fit(named([XentRecorder(tmp_path / 'r', resume=True, key_fn=key)], train=moved), 1)
    assert XentRecord(tmp_path / 'r').n_epochs == 2
    with warned() as said: named([XentRecorder(tmp_path / 'r', resume=True)], train=moved).fit(1)
    assert len(said) == 1 and "'patient 0' then and '100.png' now" in said[0]
    df = tabular_frame()
    to = TabularPandas(df, procs=[Categorify], cat_names=['kind'], cont_names=['a', 'b'], y_names='label', splits=RandomSplitter(.25, seed=3)(range(len(df))), y_block=CategoryBlock())
    rec = XentRecorder(key_fn=lambda row: f'{row.b:.0f}')
    fit(quiet(tabular_learner(to.dataloaders(bs=16, num_workers=0), layers=[4], loss_func=XentLossFlat(), cbs=rec)), 1)
    assert [df.index[int(o)] for o in rec.record.items()['name']] == to.train.items.index.tolist()

def test_a_key_fn_that_fails():
    "Told before the first batch; the fit is recorded without names, and the training is the same."
    heard = []
    class First(Callback):
        order = 1
        def before_train(self): heard.append(bool(rec._told))
    def run(cbs):
        learn = named(cbs)
        learn.fit(1)
        return state(learn)
    rec = XentRecorder(key_fn=lambda name: name.nothing)
    with warned() as said: end = run([rec, First()])
    assert 1 <= len(said) <= 2 and heard == [True] and all("has no attribute 'nothing'" in o for o in said), said
    same_bits(end, run([]))
    assert rec.record.to_df().groupby('split', observed=True).size().tolist() == [36, 18] and rec.record.items()['name'].isna().all()

class Texts:
    "Texts of different lengths; the first word is the item's index."
    def __init__(self, n=40, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.lens = torch.randint(2, 9, (n,), generator=g)
        self.y = torch.randint(0, 3, (n,), generator=g)
        self.x = [torch.cat([torch.tensor([10 + i]), torch.randint(1, 10, (int(l) - 1,), generator=g)]) for i, l in enumerate(self.lens)]
        self.items = [' '.join(map(str, o.tolist())) for o in self.x]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return TensorText(self.x[i]), TensorCategory(self.y[i])

class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(60, 6, padding_idx=0), nn.Linear(6, 3)
    def forward(self, x): return self.out(self.words(x).mean(1))

@pytest.mark.parametrize('workers', [0, 2])
def test_text(workers):
    "A loader that sorts by length: every row on its text."
    set_seed(0)
    train, valid = (SortedDL(Texts(n, s), bs=8, shuffle=n == 40, num_workers=workers, before_batch=[pad_input], sort_func=lambda o: len(o[0])) for n, s in ((40, 0), (15, 1)))
    rec, saw = XentRecorder(check=True), []
    class SawText(Callback):
        order = 39
        def after_loss(self): saw.append(('train' if self.learn.training else 'valid', self.learn.xb[0][:, 0].as_subclass(torch.Tensor) - 10, rows_loss(self.learn.pred.detach().as_subclass(torch.Tensor).double(), self.learn.yb[0].as_subclass(torch.Tensor))))
    learn = quiet(Learner(DataLoaders(train, valid), Bag(), loss_func=XentLossFlat(), lr=.1, cbs=[rec, SawText()]))
    fit(learn, 2)
    for split in ('train', 'valid'):
        got = rec.record.to_df(split, 1)
        mine = [o for o in saw if o[0] == split]
        half = len(mine) // 2
        want = {int(i): float(v) for _, items, vals in mine[half:] for i, v in zip(items, vals)}
        assert sorted(want) == got['item'].tolist()
        np.testing.assert_allclose(got['loss'].astype(float), [want[i] for i in got['item']], rtol=1e-5)
    assert rec.record.items()['name'].tolist() == Texts().items

def test_token_classification_text():
    "Texts padded to their batch: positions that only fill up do not count."
    class Tagged(Texts):
        def __getitem__(self, i): return TensorText(self.x[i]), TensorText(self.x[i] % 3 + 1)
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(60, 6, padding_idx=0), nn.Linear(6, 4)
        def forward(self, x): return self.out(self.words(x))
    set_seed(0)
    dl = functools.partial(TfmdDL, bs=8, num_workers=0, before_batch=[functools.partial(pad_input, pad_idx=0, pad_fields=[0, 1])])
    rec = XentRecorder(check=True)
    learn = quiet(Learner(DataLoaders(dl(Tagged(), shuffle=True), dl(Tagged(15, 1))), Tagger(), loss_func=XentLossFlat(ignore_index=0), lr=.1, cbs=rec))
    fit(learn, 2)
    assert rec.record.to_df('train', 1)['n_pos'].tolist() == Texts().lens.tolist()
    assert rec.record.to_df('valid', 1)['n_pos'].tolist() == Texts(15, 1).lens.tolist()


# -- 9. bad input: a clear message, and the training goes on as if nobody listened

class Clamped(nn.Module):
    "A loss of the user's own that forgives targets out of range."
    def forward(self, z, y): return F.cross_entropy(z, y.clamp(0, 2))

class Wild(Points):
    def __getitem__(self, i): return self.x[i], self.y[i] + 3 * (i % 5 == 0)
class Real(Points):
    def __getitem__(self, i): return self.x[i], self.y[i].float()
class Rating(Points):
    def __getitem__(self, i): return self.x[i], self.y[i, None] + 3
class Switch(Points):
    def __getitem__(self, i): return self.x[i], (self.y[i, None] > 0).long()
class Labels(Points):
    def __getitem__(self, i): return self.x[i], F.one_hot(self.y[i], 3).float()
class Several(Points):
    def __getitem__(self, i): return self.x[i], F.one_hot(self.y[i], 3).float() + (i % 3 == 0) * F.one_hot((self.y[i] + 1) % 3, 3)
class Shares(Points):
    def __getitem__(self, i): return self.x[i], F.one_hot(self.y[i], 3).float() * .5
class TwoTargets(Points):
    n_inp = 1
    def __getitem__(self, i): return self.x[i], self.y[i], self.y[i]
class Tuple(Net):
    def forward(self, x): return super().forward(x), 0
class Drops(Callback):
    "Leaves out a row of the batch."
    order = 5
    def before_batch(self): self.learn.xb, self.learn.yb = (self.x[1:],), (self.y[1:],)
class Adds(Callback):
    order = 5
    def before_batch(self): self.learn.xb, self.learn.yb = (torch.cat([self.x, self.x[:2]]),), (torch.cat([self.y, self.y[:2]]),)

def mse(z, y): return (z[:, 0] - y.view(-1)).square().mean()
def first_only(z, y): return F.cross_entropy(z[0], y)
def two(z, y, y2): return F.cross_entropy(z, y) + F.cross_entropy(z, y2)

BAD = {
    'targets out of range': (dict(data=Wild, loss=Clamped), ['expected a class from 0 to 2', 'out of range']),
    'rows left out': (dict(cbs=[Drops]), ['batch 0 has 7 rows, but the loader put 8 items into it', 'a `before_batch` callback']),
    'rows added': (dict(cbs=[Adds]), ['batch 0 has 10 rows, but the loader put 8 items into it', 'added or removed rows']),
    'regression': (dict(data=Real, loss=lambda: mse), ['a regression, or several labels an item', 'expected classes']),
    'regression of whole numbers': (dict(data=Rating, loss=MSELossFlat, model=lambda: Net(out=1)), ['a regression']),
    'one logit': (dict(data=Switch, loss=BCEWithLogitsLossFlat, model=lambda: Net(out=1)), ['a regression, or one logit for two classes', 'expected a logit for each class']),
    'several labels': (dict(data=Labels, loss=BCEWithLogitsLossFlat), ['a regression, or several labels an item', 'expected classes']),
    'two targets': (dict(data=TwoTargets, loss=lambda: two), ['a batch has 2 targets', 'expected one tensor of classes']),
    'a model that gives a tuple': (dict(model=Tuple, loss=lambda: first_only), ['the model gives a tuple of 2 (Tensor, int)', 'expected a tensor of class logits', 'self.learn.pred = self.pred[0]']),
}

@pytest.mark.parametrize('where', ['memory', 'disk'])
@pytest.mark.parametrize('name', BAD)
def test_bad_input(name, where, tmp_path):
    kw, words = BAD[name]
    Data = kw.get('data', Points)
    def run(cbs):
        set_seed(0)
        learn = learner([*cbs, *(o() for o in kw.get('cbs', ()))], kw.get('loss', XentLossFlat)(), model=kw.get('model', Net)(), train=Data(), valid=Data(18, seed=1))
        learn.fit(2)
        return state(learn)
    rec = XentRecorder(tmp_path / 'r' if where == 'disk' else None, eval_every=2)
    with warned() as said: end = run([rec])
    assert said and all(w in said[0] for w in words), said
    assert not any('error of its own' in o for o in said), said              # the cause is the input, and the message says so
    assert len(said) <= 4 and not any('Traceback' in o for o in said)
    same_bits(end, run([]))
    assert 'train' not in {k[1] for k in rec.record.epochs}

NO_PROBABILITIES = {
    'ours': (dict(data=Several), ['rows of targets are no probabilities', 'adds up to 2', 'BCEWithLogitsLossFlat']),
    'torch': (dict(data=Several, loss=nn.CrossEntropyLoss), ['rows of targets are no probabilities', 'adds up to 2']),
    'mixed': (dict(data=Several, loss=nn.CrossEntropyLoss, cbs=[MixUp]), ['rows of targets are no probabilities', 'adds up to 2']),
    'shares': (dict(data=Shares, loss=nn.CrossEntropyLoss), ['8 rows of targets are no probabilities', 'adds up to 0.5']),
    'logits for nll_loss': (dict(loss=nn.NLLLoss), ['8 rows of predictions are no log-probabilities', '`log_softmax`'])}

@pytest.mark.parametrize('name', NO_PROBABILITIES)
def test_what_does_not_add_up_to_one_is_refused(name):
    "Several labels an item, and logits where log-probabilities should be: not one row is recorded, and the training goes on."
    kw, words = NO_PROBABILITIES[name]
    Data = kw.get('data', Points)
    def run(cbs):
        set_seed(0)
        learn = learner([*cbs, *(o() for o in kw.get('cbs', ()))], kw.get('loss', XentLossFlat)(), train=Data(), valid=Data(18, seed=1))
        learn.fit(1)
        return state(learn)
    rec = XentRecorder()
    with warned() as said: end = run([rec])
    assert all(w in said[0] for w in words) and "nothing of 'train'" in said[0] and not any('error of its own' in o for o in said), said
    same_bits(end, run([]))
    assert not rec.record.n_epochs

def test_no_labels():
    "A Learner whose batches have no targets."
    class Unlabelled(Points):
        n_inp = 1
        def __getitem__(self, i): return (self.x[i],)
    class Own(Callback):
        "Trains on a loss of the model's own."
        def after_pred(self): self.learn.loss_grad = self.learn.pred.square().mean()
        def after_loss(self): self.learn.loss = self.learn.loss_grad.clone()
    def run(cbs):
        learn = learner([*cbs, Own()], train=Unlabelled(), valid=Unlabelled(18))
        learn.remove_cb(learn.recorder)
        learn.fit(1)
        return learn.model.state_dict()
    rec = XentRecorder()
    with warned() as said: end = run([rec])
    assert said and 'no labels' in said[0] and 'expected one tensor of classes' in said[0]
    same_bits(end, run([]))
    assert not rec.record.epochs

def test_a_path_that_is_not_ours(tmp_path):
    (tmp_path / 'thesis').mkdir()
    (tmp_path / 'thesis' / 'final.tex').write_text('mine')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'record.json').write_text('{"not": "ours"}')
    for kw in ({}, dict(resume=True)):
        with pytest.raises(FileExistsError, match='not a record of fastai_xent: it has final.tex. Use a path that does not exist'): XentRecorder(tmp_path / 'thesis', **kw)
    with pytest.raises(ValueError, match='give one of them'): XentRecorder(tmp_path / 'thesis', resume=True, overwrite=True)
    for kw in (dict(resume=True), dict(overwrite=True)):                     # a record.json of somebody else's
        with pytest.raises((FileExistsError, ValueError), match='record'): XentRecorder(tmp_path / 'other', **kw)
    assert (tmp_path / 'thesis' / 'final.tex').read_text() == 'mine' and (tmp_path / 'other' / 'record.json').read_text() == '{"not": "ours"}'

def test_a_recorder_added_twice(tmp_path):
    def run(cbs):
        learn = learner(cbs)
        learn.fit(2)
        return state(learn)
    first, second = XentRecorder(tmp_path / 'a'), XentRecorder(tmp_path / 'b')
    with warned() as said: end = run([first, second])
    assert len(said) == 1 and 'another XentRecorder already' in said[0] and 'learn.remove_cb' in said[0]
    same_bits(end, run([]))
    assert first.record.n_epochs == 2 and not second.record.epochs and not (tmp_path / 'b').exists()

def test_two_recorders_on_one_path_in_turn(tmp_path):
    "One writes after the other has: refused, with what to do; the first one's record stays whole."
    first, second = XentRecorder(tmp_path / 'r'), XentRecorder(tmp_path / 'r')
    named([first]).fit(2)
    before = XentRecord(tmp_path / 'r').to_df()
    def run(cbs):
        learn = named(cbs, train=Named(30, range(200, 230), seed=3))
        learn.fit(1)
        return state(learn)
    with warned() as said: end = run([second])
    assert len(said) == 1 and str(tmp_path / 'r') in said[0] and 'another' in said[0], said
    same_bits(end, run([]))
    record = XentRecord(tmp_path / 'r')
    pd.testing.assert_frame_equal(record.to_df(), before)
    assert len(record.items()) == len(record.score('loss')) == 36

def test_two_recorders_on_one_path_at_once(tmp_path):
    "One fit inside another, both on one path: told, and what is kept is one run's, whole."
    inner = XentRecorder(tmp_path / 'r')
    class Inner(Callback):
        order = 70
        def after_epoch(self):
            if self.learn.epoch == 0: named([inner], train=Named(30, range(200, 230), seed=3)).fit(1)
    outer = named([XentRecorder(tmp_path / 'r'), Inner()])
    with warned() as said: outer.fit(3)
    assert said and any('another' in o and str(tmp_path / 'r') in o for o in said)
    record = XentRecord(tmp_path / 'r')
    n = {'0.png': 36, '200.png': 30}
    for k in sorted({record._list_at('train', e) for e in range(record.n_epochs)}):
        items, epochs = record.items(segment=k), [o[2] for o in record._segment('train', k).found]
        for e in epochs: assert len(record.to_df('train', e)) == len(items) == n[items['name'][0]]
    assert record.score('loss').size
