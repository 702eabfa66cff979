"Rows that are reordered after the loader, and label code that may not be run."
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import Categorize, parent_label
from fastai.learner import Learner
from helpers import Coded, coded, warned
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fastai_xent.acts import relabel
from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder

N = 20

class Through(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
    def forward(self, x): return x + 0 * self.w

def turned(b): return torch.utils.data.default_collate(list(b)[::-1])
def turn_round(b): return list(b)[::-1]
class Flip(Callback):
    def before_batch(self): self.learn.xb, self.learn.yb = (self.xb[0].flip(0),), (self.yb[0].flip(0),)
class Targets(Coded):
    "Keeps its labels in an array; they may stand for others."
    def __init__(self, n, kept): self.n, self.skip, self.targets = n, (), kept

class Ys(Targets):
    "The same, as many call them."
    def __init__(self, n, kept): self.n, self.skip, self.y = n, (), kept

def tensors(n=N): return TensorDataset(*coded(torch.arange(n)))
def made(n=N): return Datasets([Path(f'{i % 3}/{i}') for i in range(n)], [[lambda o: coded(int(o.name))[0]], [parent_label, Categorize()]])
def labels(n=N): return coded(torch.arange(n))[1]

def fit(train, valid, *cbs, epochs=1):
    recorder = XentRecorder()
    learn = Learner(DataLoaders(train, valid), Through(), loss_func=XentLossFlat(), cbs=[*cbs, recorder])
    with learn.no_bar(), learn.no_logging(), warned() as said: learn.fit(epochs)
    return recorder.record, said

def plain(ds, **kw): return DataLoader(ds, batch_size=6, **kw)

REORDERED = {
    'collate of valid': (lambda: (plain(tensors()), plain(tensors(), collate_fn=turned)), 'valid'),
    'collate of train': (lambda: (plain(tensors(), collate_fn=turned, shuffle=True), plain(tensors())), 'train'),
    'subset': (lambda: (plain(Subset(tensors(30), range(29, 5, -1)), collate_fn=turned), plain(tensors())), 'train'),
    'before_batch': (lambda: (TfmdDL(tensors(), bs=6, shuffle=True, num_workers=0, before_batch=[turn_round]), plain(tensors())), 'train'),
    'targets': (lambda: (plain(Targets(N, labels()), collate_fn=turned), plain(tensors())), 'train'),
    'y': (lambda: (plain(Ys(N, labels()), collate_fn=turned), plain(tensors())), 'train'),
    'Datasets': (lambda: (TfmdDL(made(), bs=6, shuffle=True, num_workers=0, before_batch=[turn_round]), plain(tensors())), 'train'),
    'more than are read at first': (lambda: (TfmdDL(made(600), bs=6, num_workers=0, before_batch=[turn_round]), plain(tensors())), 'train'),
}

@pytest.mark.parametrize('name', REORDERED)
def test_a_pass_whose_rows_were_reordered_is_refused_at_once(name):
    loaders, split = REORDERED[name]
    record, said = fit(*loaders())
    assert len(said) == 1 and f"records nothing of '{split}'" in said[0] and 'were reordered after the loader' in said[0], said
    assert set(record.to_df()['split']) == {'train', 'valid'} - {split}

def test_a_callback_that_turns_batches_round():
    record, said = fit(plain(tensors(), shuffle=True), plain(tensors()), Flip())
    assert len(said) == 2 and all('were reordered' in o for o in said)

@pytest.mark.parametrize('loader', [lambda: plain(tensors(), shuffle=True), lambda: plain(Targets(N, (labels() + 1) % 3)), lambda: plain(Targets(N, labels().tolist()), shuffle=True),
    lambda: TfmdDL(made(), bs=6, shuffle=True, num_workers=0)], ids=['tensors', 'other names', 'targets', 'Datasets'])
def test_what_is_in_order_is_recorded(loader):
    record, said = fit(loader(), plain(tensors()), epochs=2)
    assert not said and len(record.to_df('train')) == 2 * N

def test_labels_that_a_callback_changes_are_told():
    class Noise(Callback):
        def before_batch(self): self.learn.yb = (self.yb[0] * (torch.arange(len(self.yb[0])) > 2),)
    record, said = fit(plain(tensors()), plain(tensors()), Noise())
    assert all('other labels than before' in o for o in said) and len(said) == 2 and len(record.to_df('train')) == N

def test_a_label_function_with_a_generator_of_its_own_is_not_called():
    "The recorder on or off: the same weights."
    def run(cbs):
        torch.manual_seed(1), random.seed(1)
        rng = np.random.default_rng(0)
        def noisy(i): return int(i) % 3 if rng.random() > .3 else int(rng.integers(3))
        ds = Datasets(list(range(40)), [[lambda i: torch.randn(4, generator=torch.Generator().manual_seed(i))], [noisy]], splits=[list(range(32)), list(range(32, 40))])
        learn = Learner(ds.dataloaders(bs=8, num_workers=0), nn.Linear(4, 3), loss_func=XentLossFlat(), lr=.1, cbs=cbs)
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.fit(3)
        return learn.model.weight
    assert torch.equal(run([]), run([XentRecorder()]))

def test_relabel_is_no_reordering():
    "The user asked for other labels; what each epoch had is in the record."
    dls = DataLoaders(plain(Targets(N, labels()), shuffle=True), plain(tensors()))
    learn = Learner(dls, Through(), loss_func=XentLossFlat(), cbs=[recorder := XentRecorder()])
    with learn.no_bar(), learn.no_logging(), warned() as said:
        learn.fit(1)
        learn.dls = relabel(learn.dls, recorder.record, {2: 1, 5: 0})
        learn.fit(1)
    assert not said, said
    df = recorder.record.to_df('train')
    assert df[df['item'] == 2]['targ'].tolist() == [2, 1]

def test_a_dataset_made_anew_each_time_hides_no_reordering():
    "Its labels cannot be read, so those of the epochs before are what tells."
    class Anew(DataLoader):
        @property
        def dataset(self): return Hidden(N)
        @dataset.setter
        def dataset(self, ds): pass
    class Hidden(Coded):
        items = [f'item {i}' for i in range(N)]
        def __getitem__(self, i): return super().__getitem__(i)
    record, said = fit(Anew(Hidden(N), batch_size=6, shuffle=True, collate_fn=turned), plain(tensors()), epochs=3)
    assert any("items of 'train' have other labels than before" in o for o in said), said
