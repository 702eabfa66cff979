"The recorder's life: what it hears and what not, that training never changes, that what is recorded is true."
import copy
import csv
import functools
import os
import pickle
import random
import re
import sys
import time

import fastai.callback.hook  # noqa: F401  learn.summary
import fastai.callback.schedule  # noqa: F401  fit_one_cycle, fine_tune, lr_find
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException,
                                  CancelStepException, CancelTrainException, CancelValidException)
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner, load_learner
from fastai.losses import (BaseLoss, BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropy,
                           LabelSmoothingCrossEntropyFlat, MSELossFlat)
from fastai.metrics import accuracy
from fastai.torch_core import TensorImage, set_seed
from helpers import COLUMNS, Net, Points, Truth, at_most, check_against_truth, ended, halves, learner, quiet, same_bits, same_rows, warned
from torch import nn

from fastai_xent import asking, items, losses, recorder, rows as rows_module, taps
from fastai_xent.losses import XentLoss, XentLossFlat
from fastai_xent.recorder import XentRecorder
from fastai_xent.record import XentRecord
from fastai_xent.writer import XentWriter


@pytest.fixture(autouse=True)
def guard():
    with at_most(120): yield


# -- Cancel*, in each phase, from below and from above

class Raise(Callback):
    "Raise `ex` once: at `phase`, in epoch `epoch`, and in batch `batch` of `split` where the phase has batches."
    def __init__(self, ex, phase, order, split='train', epoch=1, batch=1):
        self.ex, self.phase, self.order, self.split, self.epoch, self.batch, self.raised = ex, phase, order, split, epoch, batch, 0
        setattr(self, phase, self._maybe)
    def _maybe(self):
        learn = self.learn
        if self.raised: return
        if self.phase != 'before_fit':
            if self.phase != 'after_fit' and learn.epoch != self.epoch: return
            if self.phase in BATCH and (learn.iter != self.batch or learn.training != (self.split == 'train')): return
        self.raised += 1
        raise self.ex()

BATCH = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch']
OUTER = ['before_fit', 'before_epoch', 'before_train', 'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit']
PHASES = [(p, s) for p in BATCH for s in ('train', 'valid') if s == 'train' or p not in BATCH[3:7]] + [(p, 'train') for p in OUTER]
CANCELS = [CancelBatchException, CancelTrainException, CancelValidException, CancelEpochException, CancelFitException, CancelBackwardException, CancelStepException, KeyboardInterrupt]

def interrupted(cbs, **kw):
    "A fit that is interrupted, and one that is not. Some exceptions fastai does not catch, and some it does not survive: it gives them back."
    raiser, came = Raise(**kw), None
    learn = learner([*cbs, raiser], n=20)
    try: learn.fit(2)
    except (Exception, KeyboardInterrupt) as e: came = type(e)
    assert raiser.raised == 1
    learn.fit(1)
    return ended(learn), came

@pytest.mark.grid
@pytest.mark.parametrize('third', range(3))
@pytest.mark.parametrize('order', [5, 45, 100])
@pytest.mark.parametrize('ex', CANCELS)
def test_cancel(ex, order, third):
    for k, (phase, split) in list(enumerate(PHASES))[third::3]:
        kw = dict(ex=ex, phase=phase, order=order, split=split, epoch=(k + order) % 2, batch=k // 2 % 2)
        truth, recorder = Truth(), XentRecorder()
        try:
            with warned() as said: learn, came = interrupted([truth, recorder], **kw)
            assert not said, said
            check_against_truth(recorder.record, truth.passes)
            last = [p for p in truth.passes if p['fit'] == truth.fit]
            assert len(last) == 2 and all('as' in p and len(p['rows']) == (3 if p['split'] == 'train' else 2) for p in last), "the next fit is not recorded whole"
            plain, as_plain = interrupted([Truth()], **kw)
            assert came is as_plain
            same_bits(learn.end, plain.end)
        except Exception as e: raise AssertionError(str(kw)) from e

@pytest.mark.parametrize('ex, split', [(CancelTrainException, 'train'), (CancelEpochException, 'train'), (CancelFitException, 'train'), (CancelValidException, 'valid'), (CancelEpochException, 'valid'), (CancelFitException, 'valid')])
def test_cancelled_passes_are_kept_as_far_as_they_went(ex, split):
    truth, rec = Truth(), XentRecorder()
    learn = learner([truth, rec, Raise(ex, 'before_batch', 5, split, batch=2)])
    learn.fit(2)
    assert rec.record.to_df(split).groupby('epoch').size().tolist() == [36 if split == 'train' else 18, 16]
    check_against_truth(rec.record, truth.passes)


# -- the training never changes

def train_plain(learn): learn.fit(2)
def train_one_cycle(learn): learn.fit_one_cycle(2, .01)
def train_fine_tune(learn): learn.fine_tune(1, .01)
def train_start(learn): learn.fit(3, start_epoch=1)
def train_twice(learn): learn.fit(1); learn.fit(1)
def train_looking(learn): learn.fit(1); learn.validate(); learn.get_preds(); learn.fit(1)

SAME = {
    'plain': dict(), 'workers': dict(workers=2), "fastai's loss": dict(loss_func=CrossEntropyLossFlat), 'torch': dict(loss_func=nn.CrossEntropyLoss), 'weight': dict(loss_func=lambda: XentLossFlat(torch.tensor([1., 2., .5]))),
    "fastai's loss, workers": dict(loss_func=CrossEntropyLossFlat, workers=2), 'smooth': dict(loss_func=lambda: XentLossFlat(label_smoothing=.1)), 'focal': dict(loss_func=FocalLossFlat),
    'label smoothing': dict(loss_func=LabelSmoothingCrossEntropyFlat), 'dropout': dict(model=lambda: Net(dropout=.5)), 'mixup': dict(cbs=lambda: [MixUp()]), "mixup, fastai's loss": dict(cbs=lambda: [MixUp()], loss_func=CrossEntropyLossFlat),
    'accumulate': dict(cbs=lambda: [GradientAccumulation(20)]), "accumulate, fastai's loss": dict(cbs=lambda: [GradientAccumulation(20)], loss_func=CrossEntropyLossFlat),
    'one cycle': dict(train=train_one_cycle), 'fine tune': dict(train=train_fine_tune), 'start epoch': dict(train=train_start), 'twice': dict(train=train_twice), 'looking': dict(train=train_looking, model=lambda: Net(dropout=.5)),
    'the kernel': dict(way=None), "torch's way": dict(way='torch'), "torch's way, fastai's loss": dict(way='torch', loss_func=CrossEntropyLossFlat), "torch's way, accumulate": dict(way='torch', cbs=lambda: [GradientAccumulation(20)]), "torch's way, mixup": dict(way='torch', cbs=lambda: [MixUp()]),
    'all': dict(workers=2, model=lambda: Net(dropout=.5), cbs=lambda: [MixUp(), GradientAccumulation(20)], train=train_one_cycle),
}

@pytest.mark.parametrize('name', SAME)
def test_same_training(name, tmp_path, monkeypatch):
    "Weights, optimizer, shown losses and random states are the same to the bit."
    kw = dict(SAME[name])
    if 'way' in kw: monkeypatch.setattr(losses, 'WAY', kw.pop('way'))
    train, cbs, loss, model = kw.pop('train', train_plain), kw.pop('cbs', list), kw.pop('loss_func', XentLossFlat), kw.pop('model', Net)
    def run(rec):
        set_seed(1)
        learn = learner([*cbs(), *rec], loss(), model=model(), splitter=halves, **kw)
        train(learn)
        return ended(learn)
    plain = run([])
    for make in (XentRecorder, lambda: XentRecorder(tmp_path / 'r', precision='full'), lambda: XentRecorder(eval_every=1)):
        with warned() as said: learn = run([make()])
        same_bits(plain.end, learn.end)
        assert not [o for o in said if 'error of its own' in o], said
        assert learn.xent_recorder.record.epochs

def test_same_training_is_no_vacuous_test():
    class Draw(Callback):
        def __init__(self, what): self.what = what
        def after_epoch(self): self.what()
    class Nudge(Callback):
        def after_epoch(self): self.learn.model.body[0].weight.data[0, 0] += 1e-7
    def run(*cbs):
        learn = learner(cbs)
        learn.fit(1)
        return ended(learn).end
    plain = run()
    same_bits(plain, run(Draw(lambda: None)))
    for cb in (Nudge(), *map(Draw, (lambda: torch.rand(1), np.random.rand, random.random))):
        with pytest.raises(AssertionError): same_bits(plain, run(cb))


# -- what the record holds

W = torch.tensor([1., 2., .5])
def ce(**kw): return lambda z, y: F.cross_entropy(z, y, reduction='none', **{k: v.double() if k == 'weight' else v for k, v in kw.items()})
def own(loss): return lambda z, y: loss(z, y)
def dotted(**kw): return functools.partial(F.cross_entropy, **kw)
VALUES = {
    'XentLossFlat': (XentLossFlat, ce(), {}), 'XentLoss': (XentLoss, ce(), {}), 'CrossEntropyLossFlat': (CrossEntropyLossFlat, ce(), {}), 'nn.CrossEntropyLoss': (nn.CrossEntropyLoss, ce(), {}),
    'F.cross_entropy': (lambda: F.cross_entropy, ce(), {}), 'partial': (lambda: dotted(label_smoothing=.2), ce(label_smoothing=.2), {}),
    'sum': (lambda: XentLossFlat(reduction='sum'), ce(), {}), 'axis': (lambda: CrossEntropyLossFlat(axis=1), None, {}),
    **{f'{f.__name__}, {k}': (functools.partial(f, **kw), ce(**kw), {o: v for o, v in kw.items() if o == 'ignore_index'}) for f in (XentLossFlat, CrossEntropyLossFlat, nn.CrossEntropyLoss)
       for k, kw in {'weight': dict(weight=W), 'smooth': dict(label_smoothing=.3), 'ignore': dict(ignore_index=1), 'all': dict(weight=W, label_smoothing=.1, ignore_index=2)}.items()},
    'FocalLossFlat': (lambda: FocalLossFlat(gamma=1.5), own(FocalLossFlat(gamma=1.5, reduction='none')), {}),
    'LabelSmoothingCrossEntropyFlat': (lambda: LabelSmoothingCrossEntropyFlat(eps=.2), own(LabelSmoothingCrossEntropyFlat(eps=.2, reduction='none')), {}),
    'LabelSmoothingCrossEntropy': (lambda: LabelSmoothingCrossEntropy(eps=.2), own(LabelSmoothingCrossEntropy(eps=.2, reduction='none')), {}),
}
del VALUES['axis']

@pytest.mark.parametrize('way', [None, 'torch'])
@pytest.mark.parametrize('name', VALUES)
def test_values(name, way, monkeypatch):
    "Every row of every epoch, train and valid, against float64 and autograd on the predictions of the very model state."
    monkeypatch.setattr(losses, 'WAY', way)
    make, rows, kw = VALUES[name]
    truth, rec = Truth(rows, **kw), XentRecorder()
    learn = learner([truth, rec], make(), metrics=accuracy if isinstance(make(), BaseLoss) else None)
    with warned() as said: learn.fit(2)
    assert not said, said
    check_against_truth(rec.record, truth.passes)
    df = rec.record.to_df()
    assert df.groupby(['split', 'epoch'], observed=True).size().tolist() == [36, 36, 18, 18] and list(df.columns[:len(COLUMNS)]) == COLUMNS
    if kw: assert df['loss'].isna().any() and (df['loss'].isna() == df['targ'].isna()).all()

def test_values_of_probabilities():
    class Soft(Points):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x, F.one_hot(y, 3) * .7 + .1
    for make in (XentLossFlat, nn.CrossEntropyLoss, lambda: XentLossFlat(weight=W, label_smoothing=.1), lambda: CrossEntropyLossFlat(flatten=False)):
        kw = dict(weight=W.double(), label_smoothing=.1) if 'weight=' in repr(make) or getattr(make(), 'label_smoothing', 0) else {}
        truth, rec = Truth(ce(**kw)), XentRecorder()
        learn = learner([truth, rec], make(), train=Soft(), valid=Soft(18, seed=1))
        with warned() as said: learn.fit(2)
        assert not said, said
        check_against_truth(rec.record, truth.passes)
        assert rec.record.n_epochs == 2

def test_values_of_half_precision():
    class Half(Net):
        def forward(self, x): return super().forward(x).half()
    truth, rec = Truth(), XentRecorder()
    learn = learner([truth, rec], XentLossFlat(), model=Half())
    learn.fit(1)
    check_against_truth(rec.record, truth.passes)
    assert len(rec.record.to_df()) == 54

def test_values_of_a_table_s_targets():
    "int8 targets of shape [n, 1], as fastai's tables give them."
    class Column(Points):
        def __getitem__(self, i): return self.x[i], self.y[i, None].to(torch.int8)
    class Flat(Truth):
        def rows(self, z, y, item): return super().rows(z, y.view(-1).long(), item)
    for make in (XentLossFlat, CrossEntropyLossFlat):
        truth, rec = Flat(), XentRecorder()
        learn = learner([truth, rec], make(), train=Column(), valid=Column(18, seed=1))
        with warned() as said: learn.fit(2)
        assert not said, said
        check_against_truth(rec.record, truth.passes)
        assert rec.record.n_epochs == 2

def test_the_mean_is_the_valid_loss():
    for make in (XentLossFlat, CrossEntropyLossFlat, FocalLossFlat, lambda: XentLossFlat(label_smoothing=.1), lambda: XentLossFlat(reduction='sum')):
        rec = XentRecorder()
        learn = learner([rec], make(), metrics=accuracy)
        learn.fit(3)
        df = rec.record.to_df('valid')
        got = df.groupby('epoch')['loss'].sum() if getattr(make(), 'reduction', '') == 'sum' else df.groupby('epoch')['loss'].mean()
        shown = [v[1] for v in learn.recorder.values]
        if getattr(make(), 'reduction', '') != 'sum': np.testing.assert_allclose(got.astype(float), shown, rtol=1e-5)
        np.testing.assert_allclose((df['pred'] == df['targ']).groupby(df['epoch']).mean().astype(float), [v[2] for v in learn.recorder.values], rtol=1e-6)

def test_a_loss_with_a_state_is_not_called_twice():
    class Counting:
        calls = 0
        def __call__(self, pred, targ):
            self.calls += 1
            return F.cross_entropy(pred, targ) / self.calls
    def run(cbs):
        loss = Counting()
        learn = learner(cbs, loss)
        learn.fit(2)
        return ended(learn), loss
    truth, rec = Truth(), XentRecorder()
    (learn, loss), (plain, plain_loss) = run([truth, rec]), run([])
    assert loss.calls == plain_loss.calls == 2 * (5 + 3)
    same_bits(plain.end, learn.end)
    df = rec.record.to_df()
    assert df[['loss', 'grad_norm']].isna().all(None)
    for (split, epoch), g in df.groupby(['split', 'epoch'], observed=True):
        p = [p for p in truth.passes if (p['split'], p['epoch']) == (split, epoch)][0]
        same_rows(g.assign(loss=np.nan, grad_norm=np.nan), {**p, 'rows': [{**r, 'loss': r['loss'] * np.nan, 'grad_norm': r['loss'] * np.nan} for r in p['rows']]})

def test_train_in_eval_mode():
    "`eval_every`: each item of train once, by the model as the epoch left it."
    class Keep(Callback):
        order, states = 39, {}
        def after_epoch(self): self.states[self.learn.epoch] = copy.deepcopy(self.learn.model).eval()
    rec, keep = XentRecorder(eval_every=2), Keep()
    learn = learner([rec, keep], model=Net(dropout=.5))
    learn.fit(5)
    df = rec.record.to_df('train_eval')
    assert df.groupby('epoch').size().to_dict() == {1: 36, 3: 36}
    for e, g in df.groupby('epoch'):
        ds = learn.dls.train_ds
        assert g['item'].tolist() == list(range(36))
        with torch.no_grad(): z = keep.states[e](ds.x)
        np.testing.assert_allclose(g['loss'].astype(float), F.cross_entropy(z, ds.y, reduction='none'), rtol=1e-4, atol=1e-6)


# -- what is not training

def to_image(i): return TensorImage(torch.full((3, 8, 8), i / 40))
def label_of(i): return 'abc'[i % 3]

def looker(cbs=None, **kw):
    "A learner on images, which fastai can show, predict and augment."
    set_seed(0)
    block = DataBlock((TransformBlock(to_image), CategoryBlock), get_y=label_of, splitter=IndexSplitter(range(30, 40)))
    dls = block.dataloaders(list(range(40)), bs=8, num_workers=0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return quiet(Learner(dls, model, loss_func=XentLossFlat(), lr=.01, cbs=cbs, **kw))

def stop_lr_find(learn):
    with pytest.raises(KeyboardInterrupt): _interrupt(learn)

def _interrupt(learn):
    learn.add_cb(cb := Raise(KeyboardInterrupt, 'after_batch', 0, epoch=0, batch=1))
    try: learn.lr_find(show_plot=False, num_it=20)
    finally: learn.remove_cb(cb)

LOOKS = dict(validate=lambda learn: learn.validate(), get_preds=lambda learn: learn.get_preds(), get_preds_train=lambda learn: learn.get_preds(ds_idx=0, with_loss=True), get_preds_dl=lambda learn: learn.get_preds(dl=learn.dls.train),
             tta=lambda learn: learn.tta(n=2), show_results=lambda learn: learn.show_results(), predict=lambda learn: learn.predict(3), summary=lambda learn: learn.summary(),
             lr_find=lambda learn: learn.lr_find(show_plot=False, num_it=20), lr_find_interrupted=stop_lr_find, nothing=lambda learn: None)

@pytest.mark.parametrize('name', LOOKS)
def test_a_look_is_not_recorded(name, monkeypatch, tmp_path):
    def run(cbs):
        learn = looker(cbs, path=tmp_path, model_dir=tmp_path)
        LOOKS[name](learn)                            # before there is a fit, between two, and after
        learn.fit(1)
        LOOKS[name](learn)
        learn.fit(2)
        LOOKS[name](learn)
        return ended(learn)
    rec = XentRecorder()
    with warned() as said: learn = run([rec])
    assert not said, said
    df = rec.record.to_df()
    assert df.groupby(['fit', 'epoch', 'split'], observed=True).size().to_dict() == {(f, e, s): n for f, e in ((0, 0), (1, 1), (1, 2)) for s, n in (('train', 24), ('valid', 10))}
    assert not learn.loss_func.keep_stats and not [k for dl in learn.dls for k in ('get_idxs', 'do_item', 'create_batches') if k in vars(dl)]
    same_bits(run([]).end, learn.end)

class Nested(Callback):
    def __init__(self, event, what, order): self.what, self.order, self.busy = what, order, False; setattr(self, event, self._do)
    def _do(self):
        if self.busy or self.learn.lock.locked(): return
        self.busy = True
        try: LOOKS[self.what](self.learn)
        finally: self.busy = False

@pytest.mark.grid
@pytest.mark.parametrize('order', [5, 45, 100])
@pytest.mark.parametrize('what', ['validate', 'get_preds', 'get_preds_train', 'get_preds_dl'])
@pytest.mark.parametrize('event', ['after_epoch', 'after_batch', 'after_train', 'before_validate', 'before_epoch'])
def test_a_look_inside_a_fit(event, what, order):
    truth, rec = Truth(), XentRecorder()
    learn = learner([truth, rec, Nested(event, what, order)], n=20)
    with warned(): learn.fit(2)
    df = rec.record.to_df()
    if event in ('after_epoch', 'before_epoch', 'after_batch'): check_against_truth(rec.record, truth.passes)
    if event == 'after_epoch': assert df.groupby(['epoch', 'split'], observed=True).size().tolist() == [20, 10] * 2

def test_start_epoch_and_numbers():
    truth, rec = Truth(), XentRecorder()
    learn = learner([truth, rec], splitter=halves)
    with warned() as said:
        learn.fit(2)
        learn.fit(4, start_epoch=2)
        learn.fine_tune(2)
        learn.fit(1)
    assert not said, said
    check_against_truth(rec.record, truth.passes)
    assert rec.record.epochs == [(f, s, e) for e, f in enumerate([0, 0, 1, 1, 2, 3, 3, 4]) for s in ('train', 'valid')]
    assert (rec.record._n_fits, rec.record.n_epochs) == (5, 8)

@pytest.mark.parametrize('phase', ['train', 'valid'])
def test_an_interrupted_fit_loses_no_finished_epoch(phase, tmp_path):
    truth, rec = Truth(), XentRecorder(tmp_path / 'r', precision='full')
    learn = learner([truth, rec, Raise(KeyboardInterrupt, 'after_batch', 100, phase, epoch=2)])
    with pytest.raises(KeyboardInterrupt): learn.fit(4)
    for record in (rec.record, XentRecord(tmp_path / 'r')):
        assert {(k[1], k[2]) for k in record.epochs} == {(s, e) for e in range(2) for s in ('train', 'valid')} | ({('train', 2)} if phase == 'valid' else set())
    learn.fit(1)
    check_against_truth(rec.record, truth.passes)
    assert len([k for k in rec.record.epochs if k[0] == 1]) == 2

def test_mixup_interrupted():
    "An interrupted MixUp leaves itself as the loss; the next fit is recorded with the true one."
    for ex in (KeyboardInterrupt, CancelFitException, CancelEpochException):
        rec = XentRecorder()
        learn = learner([rec])
        try: learn.fit(2, cbs=[MixUp(), Raise(ex, 'after_batch', 100, epoch=0)])
        except KeyboardInterrupt: pass
        truth = Truth()
        learn.add_cb(truth)
        fit = rec.record._n_fits
        with warned() as said: learn.fit(2)
        assert not said, said
        df = rec.record.to_df()
        for (epoch, split), g in df[df['fit'] == fit].groupby(['epoch', 'split'], observed=True):
            same_rows(g, [p for p in truth.passes if (p['split'], p['epoch']) == (split, epoch - df[df['fit'] == fit]['epoch'].min())][0])
        assert len(df[df['fit'] == fit]) == 2 * 54


# -- errors of ours

class Odd(Exception): pass

BREAK = {
    'write': (XentWriter, '_write_rows'), 'set_items': (XentWriter, 'set_items'), 'rows': (taps.RowTap, 'rows'), 'freeze': (taps.RowTap, 'freeze'), 'fingerprint': (items, 'fingerprint'),
    'items_frame': (items, 'items_frame'), 'class_names': (recorder, 'class_names'), 'tap_rows': (recorder, 'tap_rows'), 'n_epochs': (XentRecord, 'n_epochs'),
}

@pytest.mark.grid
@pytest.mark.parametrize('where', ['memory', 'disk'])
@pytest.mark.parametrize('ex', [Odd('something odd'), Odd(), OSError(28, 'No space left on device')], ids=['message', 'without', 'disk full'])
@pytest.mark.parametrize('name', BREAK)
def test_errors_of_ours(name, ex, where, tmp_path, monkeypatch):
    "One warning, which tells all; the training is the same to the bit; later fits are recorded."
    owner, attr = BREAK[name]
    path = tmp_path / 'r' if where == 'disk' else None
    plain = learner()
    plain.fit(3)
    ended(plain)
    truth, rec = Truth(), XentRecorder(path, precision='full')
    learn = learner([truth, rec])
    calls, real = [], getattr(owner, attr)
    def broken(self, *args, **kw):
        calls.append(1)
        raise ex
    with warned() as said, monkeypatch.context() as m:
        m.setattr(owner, attr, property(broken) if isinstance(real, property) else broken)
        learn.fit(3)
        ended(learn)
    assert calls
    assert len(said) == 1 and 'Traceback' in said[0] and type(ex).__name__ in said[0] and str(ex) in said[0], said
    same_bits(plain.end, learn.end)
    assert not learn.loss_func.keep_stats
    with warned() as said: learn.fit(1)
    assert not said, said
    assert len(rec.record.epochs) == 2
    check_against_truth(rec.record, [p for p in truth.passes if p['fit'] == truth.fit])

def test_an_error_in_the_second_epoch_keeps_the_first(monkeypatch, tmp_path):
    for path in (None, tmp_path / 'r'):
        truth, rec = Truth(), XentRecorder(path, precision='full')
        learn, real = learner([truth, rec]), XentWriter._write_rows
        def full(self, key, *args, **kw):
            time.sleep(.02)                           # so that more is waiting to be written when the first error is noticed
            if key[2] >= 1 and key[1] == 'valid': raise OSError(28, 'No space left on device')
            return real(self, key, *args, **kw)
        with warned() as said, monkeypatch.context() as m:
            m.setattr(XentWriter, '_write_rows', full)
            learn.fit(4)
        assert len(said) == 1 and 'No space left on device' in said[0]
        assert {(k[1], k[2]) for k in rec.record.epochs} >= {('train', 0), ('valid', 0), ('train', 1)}
        learn.fit(1)
        last = max(k[0] for k in rec.record.epochs)
        assert len([k for k in rec.record.epochs if k[0] == last]) == 2 and last >= 1
        for p in truth.passes:
            for k in rec.record.epochs:
                if k[1] == p['split'] and (k[0], k[2]) == (p['fit'], p['epoch']): same_rows(rec.record.to_df(k[1], k[2]), p)


# -- pickles and copies

@pytest.mark.parametrize('make', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
def test_copies_in_memory_have_a_record_each(make, tmp_path):
    learn = learner([XentRecorder(precision='full')], path=tmp_path)
    learn.fit(2)
    other = make(learn)
    rec = other.xent_recorder
    assert rec is not learn.xent_recorder and rec in list(other.cbs) and not len(rec.record.to_df())
    with warned() as said: other.fit(1), learn.fit(1)
    assert not said and len(rec.record.to_df()) == 54 and len(learn.xent_recorder.record.to_df()) == 3 * 54

def exported(learn):
    "As `learn.export` and `load_learner` make it."
    dls = learn.dls
    learn.export('e.pkl')
    other = quiet(load_learner(learn.path/'e.pkl'))
    other.dls = dls
    return other

class CopiesLater(Callback):
    "A copy that is made while a fit goes on."
    order = 90
    def after_epoch(self):
        if self.learn.epoch == 0: self.learn.copied = copy.deepcopy(self.learn)

def copied_in_a_fit(learn):
    with learn.added_cbs(CopiesLater()): learn.fit(2)
    copied = learn.copied
    copied.remove_cbs([o for o in copied.cbs if isinstance(o, CopiesLater)])
    return copied

COPIES = dict(deepcopy=copy.deepcopy, pickle=lambda o: pickle.loads(pickle.dumps(o)), export=exported)

@pytest.mark.parametrize('first', ['copy', 'original'])
@pytest.mark.parametrize('how', COPIES)
def test_of_copies_on_disk_the_first_that_writes_goes_on(how, first, tmp_path):
    learn = looker([XentRecorder(tmp_path/'r')], path=tmp_path)
    learn.fit(1)
    other = COPIES[how](learn)
    assert len(other.xent_recorder.record.to_df()) == 34
    other.validate()
    one, two = (other, learn) if first == 'copy' else (learn, other)
    with warned() as said: one.fit(2), one.fit(1)
    assert not said, said
    end = copy.deepcopy(two.model.state_dict())
    with warned() as said: two.fit(1)
    assert len(said) == 1 and 'the first that writes goes on' in said[0] and 'resume=True' in said[0]
    assert any(not torch.equal(v, end[k]) for k, v in two.model.state_dict().items())      # it trains all the same
    record = XentRecord(tmp_path/'r')
    assert (record._n_fits, record.n_epochs) == (3, 4)
    again = looker([XentRecorder(tmp_path/'r', resume=True)], path=tmp_path)
    with warned() as said: again.fit(1)
    assert not said and again.xent_recorder.record.n_epochs == 5

def test_a_copy_from_the_middle_of_a_fit(tmp_path):
    learn = learner([XentRecorder(tmp_path/'r')])
    other = copied_in_a_fit(learn)
    with warned() as said: other.fit(1)
    assert len(said) == 1 and 'the first that writes goes on' in said[0]
    with warned() as said: learn.fit(1)
    assert not said and XentRecord(tmp_path/'r').n_epochs == 3

def test_copies_before_the_first_fit(tmp_path):
    "As a loop over folds makes them: the first has the record, in memory each has its own."
    for path, epochs in ((tmp_path/'r', [1, 1]), (None, [1, 1])):
        learn = learner([XentRecorder(path)])
        folds = [copy.deepcopy(learn) for _ in range(2)]
        with warned() as said:
            for o in folds: o.fit(1)
        assert len(said) == (path is not None), said
        assert [o.xent_recorder.record.n_epochs for o in folds[:1]] == epochs[:1]

@pytest.mark.skipif(not hasattr(os, 'fork'), reason="no fork here")
def test_a_forked_process_that_goes_on(tmp_path):
    learn = learner([XentRecorder(tmp_path/'r')])
    learn.fit(1)
    pid = os.fork()
    if not pid:
        learn.fit(1)
        os._exit(0)
    os.waitpid(pid, 0)
    assert XentRecord(tmp_path/'r').n_epochs == 2
    with warned() as said: learn.fit(1)
    assert len(said) == 1 and 'the first that writes goes on' in said[0] and XentRecord(tmp_path/'r').n_epochs == 2

def test_another_recorder_that_resumes_while_the_first_goes_on(tmp_path):
    first = learner([XentRecorder(tmp_path/'r')])
    first.fit(1)
    second = learner([XentRecorder(tmp_path/'r', resume=True)])
    with warned() as said: second.fit(1)
    assert not said
    with warned() as said: first.fit(1)
    assert len(said) == 1 and 'someone else has written' in said[0]
    assert XentRecord(tmp_path/'r')._n_fits == 2

# -- what is told, and how often

class OtherNumbers(Callback):
    "A refusal that names another number each time."
    order = 30
    def before_train(self): self.learn.xent_recorder._leave('train', f'item -{3 + self.learn.epoch} of {36 * (1 + self.learn.epoch)} is unknown')

def test_a_refusal_that_names_a_value_is_told_once_a_fit():
    learn = learner([XentRecorder(), OtherNumbers()])
    with warned() as said: learn.fit(4)
    assert len(said) == 1 and 'item -3 of 36' in said[0]
    learn = learner([XentRecorder(), OtherNumbers()])
    with warned() as said:
        learn.xent_recorder._tell("says this of 'valid'"), learn.xent_recorder._tell("says this of 'train'")
    assert len(said) == 2

def test_a_recorder_of_two_learners():
    rec = XentRecorder()
    first, second = learner([rec]), learner([rec])
    with warned() as said: first.fit(1)
    assert len(said) == 1 and 'was given to another Learner' in said[0] and 'Traceback' not in said[0]
    with warned() as said: second.fit(1)
    assert not said and len(rec.record.to_df()) == 54

@pytest.mark.parametrize('interrupted', [False, True])
@pytest.mark.parametrize('where', ['memory', 'disk'])
def test_export(where, interrupted, tmp_path):
    path = tmp_path / 'r' if where == 'disk' else None
    learn = looker([XentRecorder(path, precision='full')], path=tmp_path)
    learn.fit(1)
    if interrupted:
        learn.add_cb(cb := Raise(KeyboardInterrupt, 'after_batch', 100, epoch=0))
        with pytest.raises(KeyboardInterrupt): learn.fit(1)
        learn.remove_cb(cb)
    want = learn.get_preds()[0]
    learn.export('e.pkl')
    loaded = load_learner(tmp_path / 'e.pkl')
    assert loaded.predict(3)[0] in 'abc'
    dl = loaded.dls.test_dl(list(range(30, 40)))
    torch.testing.assert_close(quiet(loaded).get_preds(dl=dl)[0], want)
    assert len(loaded.xent_recorder.record.to_df()) == (34 if path else 0)
    learn.fit(1)                                      # and the one that was exported goes on
    assert learn.xent_recorder.record._n_fits == 2 and len(learn.xent_recorder.record.to_df()) == 68

def test_pickled_in_the_middle():
    "A learner that is copied in the middle of an epoch."
    copies = []
    class Copy(Callback):
        order = 90
        def after_batch(self):
            if self.learn.iter == 1 and self.learn.epoch == 1: copies.append(copy.deepcopy(self.learn.xent_recorder))
    rec = XentRecorder()
    learn = learner([rec, Copy()])
    with warned() as said: learn.fit(2)
    assert not said and len(copies) == 2 and len(rec.record.to_df()) == 108
    other = learner([copies[0]])
    other.fit(1)
    assert len(copies[0].record.to_df()) == 54

def test_removed_and_added_again():
    truth, rec = Truth(), XentRecorder()
    learn = learner([truth, rec])
    learn.fit(1)
    learn.remove_cb(rec)
    learn.fit(1)
    assert rec.record.n_epochs == 1 and len(rec.record.to_df()) == 54
    learn.add_cb(rec)
    with warned() as said: learn.fit(1)
    learn.remove_cb(rec)
    learn.fit(1, cbs=rec)
    assert not said
    assert (rec.record._n_fits, rec.record.n_epochs, len(rec.record.to_df())) == (3, 3, 3 * 54)
    check_against_truth(rec.record, [p for p in truth.passes if p['fit'] != 1])

def test_with_removed_cbs():
    rec = XentRecorder()
    learn = learner([rec])
    with learn.removed_cbs(rec): learn.fit(1)
    assert not rec.record.epochs
    learn.fit(1)
    assert len(rec.record.to_df()) == 54


# -- refusals

class Pairs(Points):
    def __getitem__(self, i): return self.x[i], self.y[i].float()
class Several(Points):
    def __getitem__(self, i): return self.x[i], F.one_hot(self.y[i], 3).float()
class TwoTargets(Points):
    def __getitem__(self, i): return self.x[i], self.y[i], self.y[i]
class Unlabelled(Points):
    def __getitem__(self, i): return (self.x[i],)
class Tuple(Net):
    def forward(self, x): return super().forward(x), x

REFUSED = {
    'regression': (Pairs, lambda: Net(out=1), MSELossFlat, 'regression'), 'own regression': (Pairs, lambda: Net(out=1), lambda: lambda p, y: (p[:, 0] - y).square().mean(), 'regression'),
    'several labels': (Several, Net, BCEWithLogitsLossFlat, 'several labels'), 'tuple': (Points, Tuple, lambda: lambda p, y: F.cross_entropy(p[0], y), 'tuple'),
    'two targets': (TwoTargets, Net, lambda: lambda p, y, z: F.cross_entropy(p, y), '2 targets'),
}

@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    "Said once, and the training goes on."
    ds, model, loss, word = REFUSED[name]
    def run(cbs):
        set_seed(0)
        dls = DataLoaders(*[TfmdDL(ds(n), bs=8, shuffle=True, num_workers=0) for n in (36, 18)])
        dls.n_inp = 1
        for dl in dls: dl._n_inp = 1
        learn = quiet(Learner(dls, model(), loss_func=loss(), lr=.01, cbs=cbs))
        learn.fit(3)
        return ended(learn)
    rec = XentRecorder()
    with warned() as said: learn = run([rec])
    assert len(said) == len({*said}) <= 2 and said and all(word in o for o in said), said
    assert not rec.record.epochs and 'nothing recorded' in repr(rec.record)
    same_bits(run([]).end, learn.end)

def test_no_labels():
    "The model is its own loss: there is nothing to compare predictions with."
    def run(cbs):
        set_seed(0)
        dls = DataLoaders(*[TfmdDL(Unlabelled(n), bs=8, shuffle=True, num_workers=0) for n in (36, 18)])
        learn = quiet(Learner(dls, Net(), loss_func=XentLossFlat(), lr=.01, cbs=cbs))
        learn.remove_cb(learn.recorder)
        learn.fit(2)
        return ended(learn)
    rec = XentRecorder()
    with warned() as said: learn = run([rec])
    assert len(said) == 2 and all('no labels' in o for o in said), said
    assert not rec.record.epochs
    same_bits(run([]).end, learn.end)

def test_classes_that_change():
    rec = XentRecorder()
    learn = learner([rec])
    learn.fit(1)
    learn.model, learn.opt = Net(out=5), None
    with warned() as said: learn.fit(1)
    assert said and all('5 classes' in o for o in said)
    assert len(rec.record.to_df()) == 54


# -- the same record again

def test_resume(tmp_path):
    path, truth = tmp_path / 'r', Truth()
    learner([truth, XentRecorder(path, precision='full')]).fit(2)
    with pytest.raises(FileExistsError, match='resume=True'): XentRecorder(path, precision='full')
    rec = XentRecorder(path, resume=True)
    assert rec.record.n_epochs == 2
    learn = learner([truth, rec])
    with warned() as said: learn.fit(2)
    assert not said, said
    check_against_truth(XentRecord(path), truth.passes)
    assert (rec.record._n_fits, rec.record.n_epochs) == (2, 4)
    assert [k[2] for k in XentRecord(path).epochs if k[1] == 'train'] == [0, 1, 2, 3]
    with pytest.raises(ValueError): XentRecorder(path, resume=True, overwrite=True)
    fresh = XentRecorder(tmp_path / 'new', resume=True)
    learner([fresh]).fit(1)
    assert XentRecord(tmp_path / 'new').n_epochs == 1

class Named(Points):
    def __init__(self, n=36, prefix='a', **kw):
        super().__init__(n, **kw)
        self.items = [f'{prefix}{i}.png' for i in range(n)]

@pytest.mark.parametrize('other', [lambda: Named(36, 'b'), lambda: Named(40), lambda: Named(30)])
def test_resume_with_other_items(other, tmp_path):
    path = tmp_path / 'r'
    learner([XentRecorder(path, precision='full')], train=Named(), valid=Named(18, 'v', seed=1)).fit(2)
    before = XentRecord(path).to_df()
    rec = XentRecorder(path, resume=True)
    learn = learner([rec], train=other(), valid=Named(18, 'v', seed=1))
    with warned() as said: learn.fit(2)
    ended(learn)
    assert len(said) == 1 and "'train'" in said[0] and 'other items' in said[0], said
    after = XentRecord(path).to_df()
    assert after[after['split'] == 'train'].reset_index(drop=True).equals(before[before['split'] == 'train'].reset_index(drop=True))
    plain = learner(train=other(), valid=Named(18, 'v', seed=1))
    plain.fit(2)
    ended(plain)
    same_bits(plain.end, learn.end)

def test_overwrite(tmp_path):
    path = tmp_path / 'r'
    learner([XentRecorder(path, precision='full')]).fit(3)
    (path / 'picture.png').write_bytes(b'mine')
    truth = Truth()
    learner([truth, XentRecorder(path, overwrite=True, precision='full')], seed=1).fit(1)
    check_against_truth(XentRecord(path), truth.passes)
    assert XentRecord(path).n_epochs == 1 and (path / 'picture.png').read_bytes() == b'mine'

def test_foreign_paths(tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thesis.tex').write_text('mine')
    (tmp_path / 'file').write_text('mine')
    for p in ('full', 'file'):
        for kw in ({}, dict(resume=True)):
            with pytest.raises(FileExistsError if p == 'full' else OSError, match='another path|does not exist'): XentRecorder(tmp_path / p, **kw)
    assert (tmp_path / 'full' / 'thesis.tex').read_text() == (tmp_path / 'file').read_text() == 'mine'
    (tmp_path / 'empty').mkdir()
    learner([XentRecorder(tmp_path / 'empty')]).fit(1)
    learner([XentRecorder(str(tmp_path / 'a' / 'b' / 'c'))]).fit(1)
    assert XentRecord(tmp_path / 'a' / 'b' / 'c').n_epochs == 1

def test_nothing_is_written_before_there_is_something(tmp_path):
    rec = XentRecorder(tmp_path / 'r', precision='full')
    learn = learner([rec])
    learn.validate()
    assert not (tmp_path / 'r').exists()

@pytest.mark.parametrize('where', ['memory', 'disk'])
def test_another_dataset(where, tmp_path):
    "Data that is exchanged between two fits is kept apart, by names or, without names, by number."
    for named in (True, False):
        rec = XentRecorder(tmp_path / f'r{named}' if where == 'disk' else None, precision='full')
        make = Named if named else (lambda n, prefix='', **kw: Points(n, **kw))
        first, second = make(36), make(30, 'b', seed=7)
        learn = learner([rec], train=first)
        learn.fit(2)
        learn.dls = DataLoaders(TfmdDL(second, bs=8, shuffle=True, num_workers=0), learn.dls.valid)
        with warned() as said: learn.fit(1)
        assert said and all("'train'" in o for o in said), said
        record = rec.record
        assert len(record.score('loss')) == 30
        mine = record.to_df('train', 2)
        np.testing.assert_array_equal(mine['targ'], second.y)
        np.testing.assert_allclose(record.score('loss'), mine.set_index('item')['loss'].sort_index().astype(float), rtol=1e-6)
        assert len(record.item(3)) == 1

def test_the_same_data_in_new_objects():
    "Loaders made anew over the same items are no other dataset."
    rec = XentRecorder()
    learn = learner([rec], train=Named())
    learn.fit(1)
    learn.dls = DataLoaders(TfmdDL(Named(), bs=4, shuffle=True, num_workers=0), TfmdDL(Points(18, seed=1), bs=4, num_workers=0))
    with warned() as said: learn.fit(1)
    assert not said, said
    assert len(rec.record.item(3)) == 2 and rec.record.n_epochs == 2


# -- costs nothing that one would notice

OURS = [f'{o}.py' for o in ('recorder', 'passes', 'same_items', 'look', 'rows', 'batch', 'rowloss', 'ledger', 'asking', 'items', 'taps', 'writer')]

ON_A_CPU = {('ledger.py', '_number'), ('rows.py', '__init__'), ('rows.py', 'takes')}  # there it is a CPU's; test_rows has the devices

def test_no_waiting_for_the_device(monkeypatch):
    "Between before_train and after_train none of our callback's code brings a tensor to the host."
    class Window(Callback):
        def __init__(self, order, opens): self.order, self.opens = order, opens
        def before_batch(self):
            if self.opens and self.learn.training: inside[0] = True
        def after_train(self):
            if not self.opens: inside[0] = False
    inside, calls, total, tries = [False], [], [0], []
    def tried(self, *args, real=asking.Asked._try):       # once a pass, a loss of one's own is asked on trial
        tries.append(self)
        was, inside[0] = inside[0], False
        try: return real(self, *args)
        finally: inside[0] = was
    monkeypatch.setattr(asking.Asked, '_try', tried)
    def sums(p, axis, real=rows_module._add_up_to_one):       # and its first batch is looked at: are these logits?
        was, inside[0] = inside[0], False
        try: return real(p, axis)
        finally: inside[0] = was
    for o in (rows_module, asking): monkeypatch.setattr(o, '_add_up_to_one', sums)
    for name in ('cpu', 'item', 'tolist', 'numpy', '__bool__', '__float__', '__int__', '__index__', '__array__', '__iter__', '__len__'):
        real = getattr(torch.Tensor, name)
        def counted(self, *args, real=real, name=name, **kw):
            frame = sys._getframe(1)
            file = frame.f_code.co_filename.replace('\\', '/')
            total[0] += 1
            if name != '__len__' and inside[0] and file.rpartition('/')[2] in OURS and 'fastai_xent/' in file and (file.rpartition('/')[2], frame.f_code.co_name) not in ON_A_CPU:
                calls.append((name, frame.f_code.co_name, frame.f_lineno))
            return real(self, *args, **kw)
        monkeypatch.setattr(torch.Tensor, name, counted)
    for loss, way, cbs in ((XentLossFlat, None, []), (XentLossFlat, 'torch', []), (CrossEntropyLossFlat, None, []), (CrossEntropyLossFlat, 'torch', []), (FocalLossFlat, None, []), (lambda: FocalLossFlat(gamma=.5), None, []), (lambda: XentLossFlat(W, label_smoothing=.1), None, []),
                           (XentLossFlat, None, [MixUp()])):  # with gamma below 1 the focal loss is asked
        monkeypatch.setattr(losses, 'WAY', way)
        rec = XentRecorder()
        learn = learner([rec, Window(-5, True), Window(-5, False), *cbs], loss())
        learn.fit(2)
        assert rec.record.n_epochs == 2
    assert total[0] and not calls, calls
    assert 0 < len(tries) <= 4, 'two epochs of train and valid'

def test_what_fastai_shows_is_untouched(tmp_path):
    def run(cbs):
        learn = learner([*cbs, CSVLogger()], metrics=accuracy, path=tmp_path)
        learn.recorder.train_metrics = True
        learn.fit(2)
        with open(tmp_path / 'history.csv') as f: rows = list(csv.reader(f))
        return learn.recorder.metric_names, [r[:-1] for r in rows], learn.metrics
    plain, ours = run([]), run([XentRecorder()])
    assert list(plain[0]) == list(ours[0]) and plain[1] == ours[1] and len(plain[2]) == len(ours[2]) == 1


# -- what it costs

@pytest.mark.parametrize('where', ['memory', 'disk'])
def test_a_record_knows_what_it_has_cost(where, tmp_path):
    "Seconds of our own within the seconds of all fits; in the repr; there after a resume."
    path = tmp_path / 'r' if where == 'disk' else None
    rec = XentRecorder(path)
    learn = learner([rec])
    assert 'recording' not in repr(rec.record)
    learn.fit(1)
    first = dict(rec.record.meta['cost'])
    learn.fit(1)
    cost = rec.record.meta['cost']
    assert 0 < first['recording'] < first['fit'] < cost['fit'] and first['recording'] < cost['recording'] < cost['fit']
    assert cost['recording'] <= rec.seconds + .01 and cost['fit'] <= rec.fit_seconds + .01
    if where == 'disk':
        learner([XentRecorder(path, resume=True)]).fit(1)
        assert XentRecord(path).meta['cost']['fit'] > cost['fit'] and 'of the fits' in repr(XentRecord(path))
    assert re.search(r'recording: took \d+\.\d% of the fits', repr(rec.record))


# -- switched off

def test_run_is_fastais_switch():
    "`run = False` leaves out a fit, `run_train` and `run_valid` the batches of a split, as for any callback."
    recorder = XentRecorder()
    learn = learner([recorder], n=20)
    recorder.run = False
    learn.fit(1)
    assert recorder.record.epochs == [] and recorder.run
    recorder.run_valid = False
    learn.fit(1)
    recorder.run_valid, recorder.run_train = True, False
    learn.fit(1)
    assert recorder.record.epochs == [(0, 'train', 0), (1, 'valid', 1)]
    assert recorder.seconds > 0


# -- what changes between two fits

def exchanged(ds): ds.items[:] = [f'new{i}.png' for i in range(len(ds))]
def rebound(ds): ds.items = [f'new{i}.png' for i in range(len(ds))]
def one_renamed(ds): ds.items[7] = 'x.png'
def swapped(ds): ds.items[0], ds.items[1] = ds.items[1], ds.items[0]
def grown(ds): ds.x, ds.y, ds.items = torch.cat([ds.x, ds.x]), torch.cat([ds.y, ds.y]), [f'{i}.png' for i in range(72)]
def shrunk(ds): ds.x, ds.y, ds.items = ds.x[:20], ds.y[:20], ds.items[:20]

@pytest.mark.parametrize('change', [exchanged, rebound, one_renamed, swapped, grown, shrunk])
def test_items_that_change_in_place(change):
    "The same object, other items: found when the fit starts; the rows go to a list of their own, and nothing is lost."
    heard = []
    class First(Callback):
        order = 41
        def before_train(self): heard.append(len(rec._told))
    rec, ds = XentRecorder(), Named()
    learn = learner([rec, First()], train=ds)
    learn.fit(1)
    before = rec.record.items()['name'].tolist()
    change(ds)
    learn.dls = DataLoaders(TfmdDL(ds, bs=8, shuffle=True, num_workers=0), learn.dls.valid)     # fastai's loader keeps its length
    with warned() as said: learn.fit(1)
    assert len(said) == 1 and "the dataset of 'train' is another one from epoch 1 on; its rows go to segment 1" in said[0], said
    assert heard == [0, 1]                                # told before the first batch
    record = rec.record
    assert record.items(segment=0)['name'].tolist() == before and record.items()['name'].tolist() == list(ds.items)
    assert record.to_df('train').groupby('epoch').size().tolist() == [36, len(ds)]
    with warned() as said: learn.fit(1)
    assert not said and len(record.meta['splits']['train']['segments']) == 2

@pytest.mark.parametrize('items', [lambda n: {f'{i}.png': i for i in range(n)}, lambda n: [{'path': i} for i in range(n)]])
def test_items_that_have_no_names(items):
    "The fit is recorded without names rather than not at all."
    rec, ds = XentRecorder(), Points()
    ds.items = items(36)
    with warned() as said: learner([rec], train=ds).fit(2)
    assert not any('Traceback' in o for o in said) and len(said) <= 1, said
    assert len(rec.record.to_df('train')) == 72 and rec.record.items()['name'].isna().all()

def test_a_loss_learns_the_names_of_the_classes():
    "A loss that takes weights by name is told the vocab before the first batch; what it says of a wrong one is the user's to see."
    class ByName(XentLossFlat):
        def set_vocab(self, vocab):
            if 'd' in vocab: raise ValueError('no weight for d')
            told.append(list(vocab))
    told = []
    learn = learner([XentRecorder()], ByName())
    learn.dls.vocab = ['a', 'b', 'c']
    learn.fit(1)
    assert told == [['a', 'b', 'c']]
    learn.dls.vocab = ['a', 'b', 'd']
    with pytest.raises(ValueError, match='no weight for d'): learn.fit(1)

def test_the_recorder_introduces_itself(tmp_path):
    assert repr(XentRecorder()) == 'XentRecorder()'
    shown = repr(XentRecorder(tmp_path / ('long' * 30)))
    assert shown.startswith('XentRecorder(') and len(shown) <= 80


# -- arguments that are changed in place between the loss and the recorder

class InPlace(Callback):
    "Changes what the loss was called with, where torch would not notice: nothing goes back from valid."
    order = 30
    def __init__(self, what): self.what = what
    def after_loss(self):
        if self.training: return
        if self.what == 'targets': self.learn.yb[0].copy_((self.learn.yb[0] + 1) % 3)
        else: self.learn.loss_func.weight.mul_(torch.tensor([1., 3., 1.]))

@pytest.mark.parametrize('what', ['targets', 'weights'])
@pytest.mark.parametrize('way', [None, 'torch'])
def test_targets_or_weights_changed_in_place(way, what, monkeypatch):
    "What came with the loss is recorded as it was; torch's would be the numbers of other arguments than the loss had."
    monkeypatch.setattr(losses, 'WAY', way)
    recs = []
    for cbs in ([], [InPlace(what)]):
        learn = learner([rec := XentRecorder(), *cbs], XentLossFlat(weight=torch.tensor([1., 2., 3.])))
        with warned() as said: learn.fit(1)
        recs.append(rec.record)
    plain, edited = recs
    if way is None:
        first = slice(learn.dls.valid.bs)                     # later batches have other weights from the start
        assert not said and edited.to_df('valid')[first].equals(plain.to_df('valid')[first])
        return
    assert any("records nothing of 'valid': the logits, targets or weights were changed in place after the loss was called" in o for o in said), said
    assert 'train' in edited.splits and 'valid' not in edited.splits
