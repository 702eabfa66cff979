"What a model gives instead of logits, and generators that an extra look must not advance."
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import Categorize
from fastai.learner import Learner
from helpers import warned
from torch import nn

from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3

class Rows:
    "Items, with noise from a generator of its own if there is one."
    def __init__(self, rng=None): self.rng = rng
    def __len__(self): return 32
    def __getitem__(self, i): return X[i] + (0. if self.rng is None else self.noise()), Y[i]
    def noise(self):
        if isinstance(self.rng, torch.Generator): return float(torch.rand(1, generator=self.rng))
        return self.rng.random() if hasattr(self.rng, 'random') else self.rng.rand()

def fit(model, loss, recorder, rng=None, dls=None, epochs=1):
    dls = dls or DataLoaders(*[TfmdDL(Rows(rng), bs=8, shuffle=shuffle, num_workers=0) for shuffle in (True, False)])
    learn = Learner(dls, model, loss_func=loss, lr=.1, cbs=recorder)
    with learn.no_bar(), learn.no_logging(), warned() as said: learn.fit(epochs)
    return said

def of_probs(p, t): return F.nll_loss((p + 1e-9).log(), t)
def of_log_probs(p, t): return -p.gather(1, t[:, None]).mean()

def test_probabilities_are_refused():
    recorder = XentRecorder()
    said = fit(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), of_probs, recorder)
    assert len(said) == 2 and all('are probabilities' in o and 'without Softmax' in o for o in said) and not recorder.record.epochs

@pytest.mark.parametrize('end', [nn.Identity(), nn.LogSoftmax(1), nn.Sigmoid()], ids=['logits', 'log-probabilities', 'no sum of 1'])
def test_others_are_recorded(end):
    recorder = XentRecorder()
    assert not fit(nn.Sequential(nn.Linear(4, 3), end), of_log_probs, recorder)
    assert set(recorder.record.to_df()['split']) == {'train', 'valid'}

def test_log_probabilities_have_the_gradient_of_logits():
    recorder = XentRecorder(precision='full')
    fit(nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)), of_log_probs, recorder)
    rows = recorder.record.to_df('valid')
    assert np.allclose(rows.grad_norm, rows.el2n, atol=1e-5)          # both are the length of p − y

class Arc(nn.Module):
    "Classes are directions; the model gives embeddings."
    def __init__(self, n):
        super().__init__()
        self.W = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    def forward(self, e, t): return F.cross_entropy(10 * F.normalize(e) @ F.normalize(self.W).T, t)

@pytest.mark.parametrize('n', [5, 8])
def test_embeddings_are_refused(n):
    dsets = Datasets(list(range(32)), [[lambda i: X[i]], [lambda i: 'abc'[Y[i]], Categorize(vocab=list('abc'))]], splits=[list(range(24)), list(range(24, 32))])
    recorder = XentRecorder()
    said = fit(nn.Linear(4, n), Arc(n), recorder, dls=dsets.dataloaders(bs=8, num_workers=0))
    assert len(said) == 2 and all(f'{n} numbers an item' in o and 'for 3 classes' in o for o in said), said
    assert not recorder.record.epochs

GENERATORS = {'numpy': lambda: np.random.default_rng(0), 'old numpy': lambda: np.random.RandomState(0), 'Python': lambda: random.Random(0), 'torch': lambda: torch.Generator().manual_seed(0)}

@pytest.mark.parametrize('name', GENERATORS)
def test_an_extra_look_does_not_advance_a_generator_of_the_dataset(name):
    "Weights with and without it are the same."
    def run(recorder):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        model = nn.Linear(4, 3)
        fit(model, XentLossFlat(), recorder, GENERATORS[name](), epochs=3)
        return model.weight
    recorder = XentRecorder(eval_every=1)
    assert torch.equal(run([]), run([recorder])) and 'train_eval' in set(recorder.record.to_df()['split'])
