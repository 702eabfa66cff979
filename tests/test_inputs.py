"What pictures and texts show, item by item, from passes without augmentation; and the copies that this finds."
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.text.data import TensorText
from fastai.torch_core import TensorImage, set_seed
from helpers import CpuAutocast, ended, same_bits, warned
from torch import nn

from fastai_xent.features import _inputs
from fastai_xent.inputs import input_sketch, projection
from fastai_xent.losses import XentLossFlat
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder

torch.set_num_threads(1)

class Rows:
    "Inputs and labels."
    def __init__(self, *ts, n_inp=1): self.ts, self.n_inp = ts, n_inp
    def __len__(self): return len(self.ts[0])
    def __getitem__(self, i): return tuple(t[i] for t in self.ts)

def pictures(n=200, seed=0, side=24):
    "Smooth pictures, cut out of larger ones, and the same moved by a pixel."
    world = torch.randn(n, 1, side + 8, side + 8, generator=torch.Generator().manual_seed(seed))
    world = nn.functional.avg_pool2d(world, 5, 1)
    return TensorImage(world[..., 2:2 + side, 2:2 + side]), TensorImage(world[..., 1:1 + side, 3:3 + side])

def texts(n=200, seed=0):
    "Texts of 6 to 14 words, filled up with 1, and the same with one other word."
    rng = np.random.default_rng(seed)
    x = np.ones((n, 14), dtype=int)
    for row, k in zip(x, rng.integers(6, 15, n)): row[:k] = rng.zipf(1.3, k) % 2900 + 2
    y = x.copy()
    y[np.arange(n), rng.integers(0, 6, n)] = 2999
    return TensorText(torch.tensor(x)), TensorText(torch.tensor(y))

def seen_as(x, width=40, c=3):
    "A model whose features are random."
    if x.ndim == 4: return nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), width), nn.Tanh(), nn.Linear(width, c))
    return nn.Sequential(nn.EmbeddingBag(3100, width, mode='mean'), nn.Tanh(), nn.Linear(width, c))

def learner(x, v, *cbs, model=None, n_inp=1, bs=32, loss_func=None, **kw):
    set_seed(0)
    y = [torch.arange(len(o if n_inp == 1 else o[0])) % 3 for o in (x, v)]
    ds = [Rows(*((o,) if n_inp == 1 else o), labels, n_inp=n_inp) for o, labels in zip((x, v), y)]
    dls = DataLoaders(TfmdDL(ds[0], bs=bs, shuffle=True, num_workers=0, **kw), TfmdDL(ds[1], bs=bs, num_workers=0, **kw))
    learn = Learner(dls, model or seen_as(x), loss_func=loss_func or XentLossFlat(), cbs=[*cbs])
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    return learn

def fit(learn, epochs=1, said=0):
    with warned() as messages, learn.no_logging(): learn.fit(epochs)
    assert len(messages) == said, messages
    return messages

def kept(record) -> set: return {(s, e) for _, s, e in record._epochs.parts('inputs')}

def shown(record, split): return _inputs(record, split, (split, record._list(split)))

DATA = dict(pictures=pictures, texts=texts)


# -- the right numbers on the right item

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', DATA)
def test_the_sketch_is_that_of_the_item(kind, workers, tmp_path):
    "Of valid and of train, which is shuffled when it trains; as far as one byte a number tells."
    (x, _), (v, _) = DATA[kind](), DATA[kind](90, 1)
    learn = learner(x, v, XentRecorder(tmp_path / 'r', features=True, eval_at_end=True))
    learn.dls.train.fake_l.num_workers = workers
    fit(learn, 2)
    record = XentRecord(tmp_path / 'r')
    for split, o in dict(train=x, valid=v).items():
        got = shown(record, split)
        want = input_sketch(torch.Tensor(o) if kind == 'pictures' else torch.tensor(o.numpy()), kind[:-1], projection(145)).numpy()
        spread = want.std(0) + 1e-9
        assert got.attrs['kind'] == kind[:-1] and got.shape == (len(o), 124)
        assert np.abs((got - want) / spread).max(axis=None) < np.abs((want - want.mean(0)) / spread).max() / 200
    file, = (tmp_path / 'r/_inputs/valid').iterdir()
    assert file.stat().st_size < 90 * (128 + 4) + 16_000

@pytest.mark.parametrize('kind', DATA)
def test_copies_are_found(kind):
    "In train, and across train and valid; by the model alone nearly none are."
    (x, copy), (v, _) = DATA[kind](300), DATA[kind](100, 1)
    x, v = torch.cat([x, copy[:20]]), torch.cat([v, copy[50:60]])
    learn = learner(x, v, rec := XentRecorder(features=True, eval_at_end=True))
    fit(learn)
    found = rec.record.duplicates()
    group = found.set_index(['split', 'item'])['group']
    pairs = [(('train', i), ('train', 300 + i)) for i in range(20)] + [(('train', 50 + i), ('valid', 100 + i)) for i in range(10)]
    hits = sum(a in group.index and b in group.index and group[a] == group[b] for a, b in pairs)
    assert hits >= 27 and found['group'].nunique() <= hits + 4
    assert found['by'].str.contains('input').sum() >= 54
    assert not len(rec.record.duplicates('valid'))

@pytest.mark.parametrize('scale', [1, 255])
def test_size_and_scale_of_a_picture_do_not_matter(scale):
    a = torch.Tensor(pictures(4, side=96)[0])
    one, other = (input_sketch(o * scale, 'picture', projection(145)) for o in (a, nn.functional.avg_pool2d(a, 2)))
    assert (one - other).norm() < .1 * (one - one.flip(0)).norm()


# -- once in a fit, without augmentation

def test_which_passes_keep_them(tmp_path):
    (x, _), (v, _) = pictures(), pictures(60, 1)
    learn = learner(x, v, rec := XentRecorder(tmp_path / 'r', features=True, eval_every=2))
    fit(learn, 5)
    assert kept(rec.record) == {('valid', 0), ('train_eval', 1)}
    fit(learn, 2)                                         # the new ones stand for the old ones
    assert kept(rec.record) == {('valid', 5), ('train_eval', 5)}
    fit(learner(x, v, XentRecorder(tmp_path / 'r', overwrite=True)))
    assert not (tmp_path / 'r/_inputs').exists()

def test_of_augmented_items_nothing_is_kept():
    (x, _), (v, _) = pictures(), pictures(60, 1)
    learn = learner(x, v, rec := XentRecorder(features=True))
    fit(learn)
    assert kept(rec.record) == {('valid', 0)} and shown(rec.record, 'train') is None
    with pytest.warns(UserWarning, match='were taken while it trained'): found = rec.record.duplicates()
    assert 'input' not in found.attrs and 'input' in rec.record.duplicates('valid').attrs

def test_what_was_kept_of_other_items_is_not_used():
    "The dataset of train changes between two fits, and the second has no look."
    (x, copy), (v, _) = pictures(), pictures(60, 1)
    learn = learner(x, v, rec := XentRecorder(features=True, eval_at_end=True))
    fit(learn)
    rec.eval_at_end = False
    other = torch.cat([x[:150], copy[:20]])
    learn.dls = learner(other, v).dls
    fit(learn, said=1)
    assert shown(rec.record, 'train') is None and shown(rec.record, 'valid') is not None
    with pytest.warns(UserWarning, match='were taken while it trained'): assert 'input' not in rec.record.duplicates('train').attrs

def test_an_input_that_a_model_without_features_gets():
    "Pictures with masks have a target a position; the last layer has no row an item, and the pictures are compared."
    x, copy = pictures(60)
    x = torch.cat([x, copy[:5]])
    model = nn.Conv2d(1, 3, 1)
    ds = Rows(x, (torch.Tensor(x[:, 0]) > 0).long())
    learn = Learner(DataLoaders(TfmdDL(ds, bs=16), TfmdDL(ds, bs=16)), model, loss_func=XentLossFlat(axis=1), cbs=[rec := XentRecorder(features=True)])
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    with warned(), learn.no_logging(): learn.fit(1)
    found = rec.record.duplicates('valid')
    assert {*found.attrs} == {'input'} and {*range(5), *range(60, 65)} <= {*found['item']}
    with pytest.raises(KeyError, match='none were kept'): rec.record.features('valid')


def test_a_picture_that_looks_like_no_other_is_strange():
    "To the model, whose features are random, it is one of many."
    (x, _), (v, _) = pictures(300), pictures(60, 1)
    x[17, :, 8:16] = 0
    x[17, :, :, 8:16] = 4
    set_seed(0)
    learn = learner(x, v, rec := XentRecorder(features=True, eval_at_end=True), model=nn.Sequential(Cut(), nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 3)))
    fit(learn)
    far = rec.record.outliers(20)
    assert 17 in far['item'].tolist() and far['strange'].is_monotonic_decreasing and not far['distance'].is_monotonic_decreasing
    by_model = rec.record.outliers(300).sort_values('distance', ascending=False)['item'].tolist()
    assert by_model.index(17) > 20

class Cut(nn.Module):
    "A corner of a picture."
    def forward(self, x): return x[:, 0, :4, :4].flatten(1)


# -- what has no such numbers

class First(nn.Module):
    def __init__(self, n): super().__init__(); self.model = nn.Sequential(nn.Flatten(), nn.Linear(n, 20), nn.ReLU(), nn.Linear(20, 3))
    def forward(self, x, *_): return self.model(x.float())

@pytest.mark.parametrize('make', [
    lambda x: (torch.randn(len(x), 9), 1), lambda x: (torch.Tensor(x[..., :7]), 1), lambda x: (torch.randn(len(x), 9) > 0, 1),
    lambda x: (torch.randn(len(x), 9, 9), 1), lambda x: ((torch.Tensor(x), torch.Tensor(x)), 2),
], ids=['a table', 'tiny', 'bits', 'a series', 'two inputs'])
def test_nothing_is_claimed_of_others(make):
    (x, _), (v, _) = pictures(60), pictures(60, 1)
    (x, n_inp), (v, _) = make(x), make(v)
    first = x[0] if n_inp == 2 else x
    learn = learner(x, v, rec := XentRecorder(features=True, eval_at_end=True), model=First(first[0].numel()), n_inp=n_inp)
    fit(learn)
    assert not kept(rec.record) and {*rec.record.duplicates().attrs} == {'features'}

class Breaks(Callback):
    "Some inputs are no number."
    def before_batch(self): self.learn.xb = (self.xb[0] / (torch.arange(len(self.xb[0])) != 3)[:, None, None, None],)

def test_inputs_that_are_no_number_are_told():
    (x, _), (v, _) = pictures(60), pictures(60, 1)
    learn = learner(x, v, rec := XentRecorder(features=True), Breaks())
    with warned() as said, learn.no_logging(): learn.fit(1)
    assert any("no sketch of the input of 2 of 60 rows" in o for o in said), said
    assert shown(rec.record, 'valid').isna().all(axis=1).sum() == 2


# -- the training does not change

@pytest.mark.parametrize('kw', [dict(), dict(loss_func=CrossEntropyLossFlat), dict(cbs=lambda: [MixUp()]), dict(cbs=lambda: [CpuAutocast()])],
                         ids=['plain', "fastai's loss", 'mixup', 'mixed precision'])
@pytest.mark.parametrize('kind', DATA)
def test_same_training(kind, kw):
    (x, _), (v, _) = DATA[kind](64), DATA[kind](40, 1)
    if kind == 'texts' and kw.get('cbs') and isinstance(kw['cbs']()[0], MixUp): pytest.skip('whole numbers are not mixed')
    def run(*rec):
        learn = learner(x, v, *kw.get('cbs', list)(), *rec, loss_func=kw.get('loss_func', XentLossFlat)())
        with warned(), learn.no_logging(): learn.fit(2)
        return ended(learn)
    same_bits(run().end, run(XentRecorder(features='every', eval_every=1)).end)
