"Which training items changed an item's loss, against autograd in the last layer."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from helpers import learner, quiet, warned
from torch import nn

from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder

torch.set_num_threads(1)

class Narrow(nn.Module):
    "A last layer of 8 features, which a sketch keeps as they are."
    def __init__(self, bias=True):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3, bias=bias)
    def forward(self, x): return self.fc(self.body(x[:, :4]))

class Gradients(Callback):
    "Each row's gradient in the last layer, by autograd, and the mean learning rate of each epoch."
    order = 41 # after the recorder, since it calls the model again
    def __init__(self, layer): self.layer, self.rows, self.rates = layer, {}, []
    def before_train(self): self.rates.append([])
    def after_loss(self):
        split = 'train' if self.training else 'valid'
        if self.training: self.rates[-1].append(self.opt.hypers[-1]['lr'])
        with torch.enable_grad():
            z = self.model(self.xb[0])
            for i, row, y in zip(self.xb[0][:, -1].round().long().tolist(), z, self.yb[0]):
                g = torch.autograd.grad(F.cross_entropy(row, y), list(self.layer.parameters()), retain_graph=True)
                self.rows[split, self.epoch, i] = torch.cat([o.flatten() for o in g]).double()

    def influence(self, i, j, epochs, split='valid'):
        "Of train item `j` on item `i`."
        return sum(np.mean(self.rates[e]) * (self.rows['train', e, j] @ self.rows[split, e, i]).item() for e in epochs)

def fitted(model, epochs=3, **kw):
    learn = learner(model=model, cbs=[rec := XentRecorder(features='every', keep_probs=True, **kw)])
    learn.add_cb(truth := Gradients(model.fc))
    with warned() as said: learn.fit(epochs)
    assert not said
    return rec.record, truth

@pytest.mark.parametrize('bias', [True, False])
def test_it_is_the_product_of_the_gradients(bias):
    record, truth = fitted(Narrow(bias))
    for i in (0, 5, 17):
        got = record.influences(i, n=36).set_index('item')['influence']
        want = np.array([truth.influence(i, j, range(3)) for j in got.index])
        np.testing.assert_allclose(got, want, atol=.03 * np.abs(want).max())
        assert got.abs().is_monotonic_decreasing

def test_within_train():
    record, truth = fitted(Narrow())
    got = record.influences(4, split='train', n=36).set_index('item')['influence']
    want = np.array([truth.influence(4, j, range(3), 'train') for j in got.index])
    np.testing.assert_allclose(got, want, atol=.03 * np.abs(want).max())

def test_the_epochs_that_were_kept():
    learn = learner(model=Narrow(), cbs=[rec := XentRecorder(features=2, keep_probs=True)])
    learn.fit(5)
    assert rec.record.influences(0).attrs['epochs'] == [1, 3, 4]

@pytest.mark.parametrize('kw', [dict(), dict(features='every'), dict(keep_probs=True), dict(head='auto')])
def test_what_is_missing_is_told(kw):
    learn = learner(cbs=[rec := XentRecorder(**kw)])
    learn.fit(1)
    with pytest.raises(KeyError, match=r"ask for them before training, with `XentRecorder\(features='every', keep_probs=True\)`"): rec.record.influences(0)

def test_items_and_splits_that_are_not_there():
    record, _ = fitted(Narrow(), epochs=1)
    with pytest.raises(IndexError, match='item 18 is not in split'): record.influences(18)
    with pytest.raises(KeyError, match="no split 'test'"): record.influences(0, split='test')

class Unseen(Narrow):
    "The logits of item 5 are changed on the way, so what the last layer got of it is not known."
    def forward(self, x):
        z = super().forward(x)
        return torch.where(x[:, -1:].round() == 5, z / 2, z)

def test_an_item_without_features_is_refused():
    "A sum over no epoch is no influence of zero."
    learn = learner(model=Unseen(), cbs=[rec := XentRecorder(features='every', keep_probs=True)])
    with warned() as said: learn.fit(2)
    assert any('has no features for 1 of' in o for o in said)
    for split in ('train', 'valid'):
        with pytest.raises(KeyError, match=f"item 5 of '{split}' has no features, probabilities and label in any of the epochs 0, 1"):
            rec.record.influences(5, split)
    others = rec.record.influences(4, n=36)
    assert (others['influence'].abs() > 0).sum() == 35 and others.set_index('item')['influence'][5] == 0

class OtherLabels(Callback):
    "From epoch 1 on train items 3 and 8 have another label."
    def before_epoch(self):
        if self.epoch == 1:
            y = self.dls.train_ds.y
            for i in (3, 8): y[i] = (y[i] + 1) % 3

def test_each_epoch_has_its_own_labels():
    class Labelled:
        def __init__(self, n): self.x, self.y = torch.randn(n, 4, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 3
        def __len__(self): return len(self.x)
        def __getitem__(self, i): return torch.cat([self.x[i], torch.tensor([float(i)])]), self.y[i].clone()
    model = Narrow()
    dls = DataLoaders(*(TfmdDL(Labelled(n), bs=6, shuffle=n == 36, num_workers=0) for n in (36, 18)))
    rec = XentRecorder(features='every', keep_probs=True)
    learn = quiet(Learner(dls, model, loss_func=XentLossFlat(), lr=.1, cbs=[OtherLabels(), rec, truth := Gradients(model.fc)]))
    with warned() as said: learn.fit(3)
    assert any('have other labels than before' in o for o in said)
    got = rec.record.influences(5, n=36).set_index('item')['influence']
    want = np.array([truth.influence(5, j, range(3)) for j in got.index])
    np.testing.assert_allclose(got, want, atol=.03 * np.abs(want).max())
