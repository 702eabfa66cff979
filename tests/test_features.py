"What the last layer got, item by item, against the same product in float64; and what is asked of it."
import io
import pickle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders, TfmdDL
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from helpers import CpuAutocast, Net, Points, ended, learner, same_bits, warned
from runs import put
from torch import nn

from fastai_xent.export import read_lists
from fastai_xent.features import _space
from fastai_xent.linear import head_in_loss
from fastai_xent.losses import XentLossFlat
from fastai_xent.parquet import lists_of, write_lists
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.records import XentRecords
from fastai_xent.sketch import projection
from fastai_xent.writer import XentWriter

torch.set_num_threads(1)

class Wide(nn.Module):
    "A last layer with 200 features."
    def __init__(self, dropout=0., width=200, by_name=False):
        super().__init__()
        self.body, self.fc, self.by_name = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(dropout)), nn.Linear(width, 3), by_name
    def forward(self, x):
        h = self.body(x[:, :4])
        return self.fc(input=h) if self.by_name else self.fc(h)

class Got(Callback):
    "What the last layer got in each row, in float64, by the item that the input names."
    order = 39
    def __init__(self, layer): self.layer, self.passes = layer, []
    def _see(self, layer, args, kwargs, out): self.h = (*args, *kwargs.values())[0].detach()
    def before_fit(self): self.handle = self.layer.register_forward_hook(self._see, with_kwargs=True)
    def after_fit(self): self.handle.remove()
    def before_train(self): self.passes.append(('train', {}))
    def before_validate(self): self.passes.append(('valid', {}))
    def after_loss(self):
        for i, h in zip(self.learn.xb[0][:, -1].round().long().tolist(), self.h.double()): self.passes[-1][1][i] = h

    def sketches(self, split, epoch, n):
        "`n k`, nan for an item that did not come."
        rows = [o for s, o in self.passes if s == split][epoch]
        d = len(next(iter(rows.values())))
        p = torch.eye(d, dtype=torch.float64) if d <= 124 else projection(d).double()
        want = np.full((n, p.shape[1]), np.nan)
        for i, h in rows.items(): want[i] = h @ p
        return want

def near(got, want):
    "As far as one byte a number tells: 1/254 of the largest in its row, in units of each place's spread; and half precision before."
    want, got = np.asarray(want), np.asarray(got)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    spread = np.nanstd(want, axis=0) + 1e-9
    z = np.abs(want - np.nanmean(want, axis=0)) / spread
    room = np.nanmax(z, axis=1, keepdims=True) * spread / 250 + np.abs(want) * 2.**-10 + 2.**-12
    assert (np.abs(got - want) <= room)[~np.isnan(want)].all(), np.nanmax(np.abs(got - want) / room)

def fit(learn, epochs=2, said=0):
    with warned() as messages: learn.fit(epochs)
    assert len(messages) == said, messages
    return messages

def kept(record) -> set: return {(s, e) for _, s, e in record._epochs.parts('features')}


# -- the right numbers on the right item

LEARNERS = {
    'shuffled': lambda: learner(model=Wide()),
    'few features': lambda: learner(),
    'dropout': lambda: learner(model=Wide(.5)),
    'workers': lambda: learner(model=Wide(), workers=2),
    'one batch': lambda: learner(model=Wide(), bs=100),
    'a last batch of one': lambda: learner(model=Wide(), bs=5),
    "fastai's loss": lambda: learner(model=Wide(), loss_func=CrossEntropyLossFlat()),
    'called by name': lambda: learner(model=Wide(by_name=True)),
    'mixed precision': lambda: learner([CpuAutocast()], model=Wide()),
}

@pytest.mark.parametrize('where', ['memory', 'disk', 'bucket'])
@pytest.mark.parametrize('name', LEARNERS)
def test_the_sketch_is_that_of_the_item(name, where, tmp_path):
    path = {'memory': None, 'disk': tmp_path / 'my rün [1]', 'bucket': f'memory://features/{name}'}[where]
    learn = LEARNERS[name]()
    got = Got(learn.model.body[-1] if isinstance(learn.model, Net) else learn.model.fc)
    learn.add_cbs([got, XentRecorder(path, features='every', overwrite=path is not None)])
    fit(learn, 3)
    record = learn.xent_recorder.record if path is None else XentRecord(path)
    for split, dl in zip(('train', 'valid'), learn.dls.loaders):
        for epoch in range(3):
            x = record.features(split, epoch)
            assert (x.dtypes == np.float32).all() and x.index.name == 'item' and x.attrs['epoch'] == epoch
            assert x.attrs['training'] == (split == 'train') and x.attrs['width'] == x.shape[1] <= 124
            near(x, got.sketches(split, epoch, len(dl.dataset)))
        pd.testing.assert_frame_equal(record.features(split), record.features(split, 2))
    assert record.to_df()['grand'].notna().all()

def test_a_dropped_last_batch():
    learn = learner(model=Wide())
    learn.dls = DataLoaders(TfmdDL(Points(), bs=8, shuffle=True, drop_last=True, num_workers=0), learn.dls.valid)
    learn.add_cbs([got := Got(learn.model.fc), rec := XentRecorder(features=True)])
    fit(learn)
    x = rec.record.features()
    assert x.isna().all(axis=1).sum() == 4
    near(x, got.sketches('train', 1, 36))

def test_the_head_in_the_loss():
    model, loss_func = head_in_loss(nn.Sequential(Cut(), nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 3)))
    learn = learner([rec := XentRecorder(features=True)], model=model, loss_func=loss_func)
    learn.add_cb(got := Got(model[-1]))
    fit(learn)
    near(rec.record.features('valid'), got.sketches('valid', 1, 18))

class Cut(nn.Module):
    def forward(self, x): return x[:, :4]

def test_ranks_are_joined(tmp_path):
    "Two parts of one epoch, in one frame; rows that fill up a batch are in neither."
    writer = XentWriter(tmp_path / 'r')
    writer.set_items('train', pd.DataFrame({'item': range(5), 'name': list('abcde'), 'source': range(5)}), 'mark')
    x, facts = np.random.default_rng(0).normal(size=(4, 6)), dict(every=0, width=6)
    for rank, at in enumerate(([3, 0], [1, 2])):
        rows = dict(item=np.array(at), pred=np.zeros(2), targ=np.zeros(2))
        put(writer, 0, 0, 'train', rows, features=(np.array(at), x[2 * rank:2 * rank + 2], facts), rank=rank)
    got = writer.record.features()
    np.testing.assert_allclose(got.iloc[[3, 0, 1, 2]], x, atol=.02)
    assert got.iloc[4].isna().all()

def test_eval_passes_have_their_own():
    learn = learner([rec := XentRecorder(features=True, eval_every=2)], model=Wide(.5))
    fit(learn)
    x = rec.record.features()                             # of each item alone, without dropout
    assert x.attrs['split'] == 'train_eval' and not x.attrs['training']
    with torch.no_grad(): h = learn.model.eval().body(Points().x[:, :4])
    near(x, h.double() @ projection(200).double())
    assert rec.record._epochs.parts('features').keys() == {(0, 'train', 1), (0, 'train_eval', 1), (0, 'valid', 1)}


# -- which epochs stay

@pytest.mark.parametrize('features, epochs', [(True, {4}), ('every', {0, 1, 2, 3, 4}), (2, {1, 3, 4}), (5, {4})])
def test_which_epochs_stay(features, epochs, tmp_path):
    fit(learner([XentRecorder(tmp_path / 'r', features=features)], model=Wide()), 5)
    assert kept(XentRecord(tmp_path / 'r')) == {(s, e) for s in ('train', 'valid') for e in epochs}

def test_a_resumed_record_goes_on_and_an_overwritten_one_forgets(tmp_path):
    path = tmp_path / 'r'
    fit(learner([XentRecorder(path, features='every')], model=Wide()), 2)
    learn = learner([XentRecorder(path, features=True, resume=True)], model=Wide())
    learn.add_cb(got := Got(learn.model.fc))
    fit(learn, 2)
    assert kept(XentRecord(path)) == {(s, e) for s in ('train', 'valid') for e in (0, 1, 3)}   # what others kept stays
    near(XentRecord(path).features(), got.sketches('train', 1, 36))
    fit(learner([XentRecorder(path, overwrite=True)]), 1)
    assert not (path / '_features').exists()

def test_one_recorder_in_several_fits():
    learn = learner([rec := XentRecorder(features=True)], model=Wide())
    for _ in range(3): fit(learn, 1)
    assert kept(rec.record) == {('train', 2), ('valid', 2)}

def test_pickled():
    rec = pickle.loads(pickle.dumps(XentRecorder(features=True)))
    fit(learner([rec], model=Wide()), 1)
    assert rec.record.features('valid').shape == (18, 124)

def test_128_bytes_an_item(tmp_path):
    fit(learner([XentRecorder(tmp_path / 'r', features=True)], model=Wide(width=500), n=4000, bs=400), 2)
    file, = (tmp_path / 'r/_features/train').iterdir()
    assert file.stat().st_size < 4000 * (128 + 4) + 16_000


# -- the training does not change

@pytest.mark.parametrize('kw', [dict(), dict(loss_func=CrossEntropyLossFlat), dict(cbs=lambda: [MixUp()]), dict(cbs=lambda: [CpuAutocast()])],
                         ids=['plain', "fastai's loss", 'mixup', 'mixed precision'])
def test_same_training(kw):
    "To the bit, with features kept or nothing recorded at all."
    def run(*rec):
        projection.cache_clear()
        set_seed(1)
        learn = learner([*kw.get('cbs', list)(), *rec], kw.get('loss_func', XentLossFlat)(), model=Wide(.5))
        learn.fit(2)
        return ended(learn)
    same_bits(run().end, run(XentRecorder(features='every')).end)

def test_without_them_nothing_is_kept(tmp_path):
    fit(learner([rec := XentRecorder(tmp_path / 'r', head='auto')], model=Wide()), 1)
    assert not (tmp_path / 'r/_features').exists()
    with pytest.raises(KeyError, match=r"no features of 'train'; none were kept; ask for them before training, with `XentRecorder\(features=True\)`"): rec.record.features()
    with pytest.raises(KeyError, match="no split 'test'"): rec.record.features('test')

def test_a_full_disk(tmp_path, monkeypatch):
    "The rows were written before; the training goes on; what is told is the error."
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    plain = ended(trained(seeded()))
    monkeypatch.setattr(XentWriter, '_write_newest', full)
    learn = seeded(rec := XentRecorder(tmp_path / 'r', features=True))
    assert 'No space left on device' in fit(learn, 2, said=1)[0]
    same_bits(plain.end, ended(learn).end)
    assert ('train', 0) in {k[1:] for k in rec.record.epochs}

def seeded(*cbs):
    set_seed(1)
    return learner([*cbs], model=Wide())

def trained(learn):
    learn.fit(2)
    return learn

def test_the_old_ones_go_only_when_the_new_ones_are_there(tmp_path, monkeypatch):
    learn = learner([rec := XentRecorder(tmp_path / 'r', features=True)], model=Wide())
    fit(learn, 1)
    before = rec.record.features()
    real = XentWriter._write_lists
    def full(self, kind, *args):
        if kind == 'features': raise OSError(28, 'No space left on device')
        return real(self, kind, *args)
    monkeypatch.setattr(XentWriter, '_write_lists', full)
    fit(learn, 1, said=1)
    pd.testing.assert_frame_equal(XentRecord(tmp_path / 'r').features(), before)


# -- refusals

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_rows_have_none(mix):
    "They show two items at once; of valid, and of a pass without mixing, each item has its own."
    class Image(Points):
        def __init__(self, n=36): super().__init__(n); self.x = self.x[:, :4].reshape(n, 1, 2, 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 3))
    learn = learner([rec := XentRecorder(features=True, eval_every=2), mix()], model=model, train=Image(), valid=Image(18))
    said = fit(learn, 2, said=1)
    assert "keeps no features of 'train': a callback mixes rows" in said[0]
    assert kept(rec.record) == {('valid', 1), ('train_eval', 1)} and rec.record.features().attrs['split'] == 'train_eval'

class Tempered(Wide):
    def forward(self, x): return super().forward(x) / 2

class Twice(Wide):
    def forward(self, x): return self.fc(self.body(x[:, :4])) + self.fc(self.body(x[:, :4]))

class Pooled(Wide):
    "Logits of every position, averaged: no row of features an item."
    def forward(self, x): return self.fc(self.body(x[:, :4])[:, None].expand(-1, 5, -1)).mean(1)

class Half(Wide):
    "Some rows are changed on the way."
    def forward(self, x):
        z = super().forward(x)
        return torch.where(x[:, -1:] % 2 == 0, z, z / 2)

class Huge(Wide):
    def forward(self, x): return self.fc(self.body(x[:, :4]) * torch.where(x[:, -1:] % 3 == 0, 1e6, 1.))

@pytest.mark.parametrize('model, words', [
    (lambda: nn.Sequential(Wide(), nn.Softplus()), 'records no grand and no features: the last layer of Sequential is Softplus'),
    (Tempered, 'has no features for 36 of 36 rows'), (Twice, "keeps no features of 'train': the last layer was not called once"),
    (Pooled, "keeps no features of 'train': the last layer was not called once"),
])
def test_models_without(model, words):
    learn = learner([rec := XentRecorder(features=True)], model=model())
    with warned() as said: learn.fit(2)
    assert any(words in o for o in said), said
    assert len(rec.record.to_df()) == 108 and rec.record.to_df()['loss'].notna().all()
    with pytest.raises(KeyError, match='none were kept'): rec.record.features()

@pytest.mark.parametrize('model, gone', [(Half, lambda i: i % 2 == 1), (Huge, lambda i: i % 3 == 0)])
def test_rows_without(model, gone):
    learn = learner([rec := XentRecorder(features=True)], model=model())
    learn.add_cb(got := Got(learn.model.fc))
    with warned() as said: learn.fit(2)
    assert any('has no features for' in o for o in said), said
    x, want, out = rec.record.features(), got.sketches('train', 1, 36), gone(np.arange(36))
    assert x[out].isna().all(axis=None)
    near(x[~out], want[~out])
    with pytest.raises(KeyError, match=f"item {out.argmax()} of 'train' has no features in epoch 1: it was seen, but"):
        rec.record.neighbours(int(out.argmax()))

@pytest.mark.parametrize('bad', [0, -1, 'all', None, 1.5])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="expected True, False, 'every' or a number of epochs"): XentRecorder(features=bad)

def test_epochs_that_were_not_kept():
    fit(learner([rec := XentRecorder(features=True)], model=Wide()), 3)
    with pytest.raises(KeyError, match="no features of 'train' in epoch 0; kept are those of the epochs 2"): rec.record.features(epoch=0)


# -- what is asked

def record_of(rows, labels=None, training=False, split='train', writer=None):
    "A record of these features, in one pass."
    writer, n = writer or XentWriter(), len(rows)
    frame = pd.DataFrame(dict(item=range(n), name=[f'{split} {i}' for i in range(n)], source=range(n)))
    writer.set_items(split, frame, split, vocab=list('abc'))
    cols = dict(item=np.arange(n), pred=np.arange(n) % 3, targ=np.arange(n) % 3 if labels is None else labels)
    put(writer, 0, 0, split, cols, features=(np.arange(n), rows, dict(every=0, of=rows.shape[1], training=training)))
    return writer.record

def cloud(n, k=20, seed=0): return np.random.default_rng(seed).normal(size=(n, k)) * np.geomspace(100, .1, k)

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('n', [11, 50, 800])
def test_among_random_items_none_are_near(n, seed):
    "No structure, no duplicates: at most a pair by chance."
    assert len(record_of(cloud(n, seed=seed)).duplicates()) <= 2

@pytest.mark.parametrize('k', [8, 20, 120])
def test_planted_copies_are_found(k):
    "Of 600 items 30 are copied with little noise; few others are taken for copies."
    rng, x = np.random.default_rng(1), cloud(630, k)
    x[600:] = x[:30] + rng.normal(size=(30, k)) * np.geomspace(100, .1, k) * .02
    found = record_of(x).duplicates()
    groups = found.groupby('group')['item'].agg(tuple).map(sorted)
    hits = sum([i, 600 + i] in groups.tolist() for i in range(30))
    assert hits >= 28 and len(groups) <= hits + 3

def test_the_same_item_many_times():
    "More often than neighbours are looked at; and features that are all the same."
    x = cloud(100)
    x[40:60] = x[40]
    found = record_of(x).duplicates()
    first = found[found['group'] == 0]
    assert {*range(40, 60)} <= {*first['item']} and len(found) <= 24 and found['closeness'].eq(0).sum() == 20
    same = record_of(np.ones((30, 5))).duplicates()
    assert len(same) == 30 and same['closeness'].eq(0).all()

def test_across_train_and_valid():
    x, v = cloud(200), cloud(80, seed=1)
    v[5] = x[17] * 1.001
    writer = XentWriter()
    record_of(x, writer=writer)
    record = record_of(v, split='valid', labels=np.zeros(80, dtype=int), writer=writer)
    found = record.duplicates()
    assert list(zip(found['split'], found['item'])) in ([('train', 17), ('valid', 5)], [('valid', 5), ('train', 17)])
    assert set(found['name']) == {'train 17', 'valid 5'} and set(found['targ']) == {'c', 'a'}
    assert not len(record.duplicates('train')) and not len(record.duplicates('valid'))
    assert record.neighbours(17, n=1, among='valid')['item'].tolist() == [5]
    near = record.neighbours('valid 5', split='valid', among='train')
    assert near['item'][0] == 17 and len(near) == 10 and near['distance'].is_monotonic_increasing

def test_neighbours_are_those_of_all_pairs():
    x = cloud(300, 6)
    record = record_of(x)
    z = (x - x.mean(0)) / x.std(0)
    for i in (0, 150, 299):
        d = np.linalg.norm(z - z[i], axis=1)
        d[i] = np.inf
        near = record.neighbours(i, n=20)
        assert i not in near['item'].tolist() and len(set(near['item']) & set(np.argsort(d)[:20])) >= 16
    with pytest.raises(IndexError, match='item 300 is not in split'): record.neighbours(300)
    with pytest.raises(KeyError, match="no item of 'train' is called 'x'"): record.neighbours('x')

def test_outliers_are_far_from_all():
    x = cloud(300)
    x[[7, 200], -3:] = [[300, 0, 0], [0, 300, 0]]         # far out in directions that others hardly use
    far = record_of(x).outliers(5)
    assert set(far['item'][:2]) == {7, 200} and far['distance'].is_monotonic_decreasing and len(far) == 5
    n = x / np.linalg.norm(x, axis=1, keepdims=True)
    apart = np.sort(1 - n @ n.T, axis=1)[:, 1:11].mean(1)
    np.testing.assert_allclose(far['distance'], apart[far['item']], atol=.03)
    assert far['strange'].is_monotonic_decreasing and far['strange'][0] == 1

def test_items_without_features_are_left_out():
    x, writer = cloud(60), XentWriter()
    frame = pd.DataFrame(dict(item=range(70), name=[f'i{i}' for i in range(70)], source=range(70)))
    writer.set_items('train', frame, 'mark')
    put(writer, 0, 0, 'train', dict(item=np.arange(60), pred=np.zeros(60), targ=np.zeros(60)),
        features=(np.arange(60), x, dict(every=0, of=20, training=False)))
    record = writer.record
    assert len(record.neighbours(0, n=100)) == 59 and len(record.outliers(100)) == 60
    with pytest.raises(KeyError, match="item 65 of 'train' has no features in epoch 0: it was not seen in that epoch"): record.neighbours(65)

COUNTS = dict(neighbours=lambda r, n: r.neighbours(0, n), outliers=lambda r, n: r.outliers(n), top=lambda r, n: r.top(n, 'forgetting'),
              influences=lambda r, n: r.influences(0, 'train', n), together=lambda r, n: XentRecords([r]).top(n, 'forgetting'))

@pytest.mark.parametrize('bad, error', [(-1, ValueError), (1.5, TypeError), ('9', TypeError), (None, TypeError), (True, TypeError)])
@pytest.mark.parametrize('ask', COUNTS)
def test_numbers_of_items_that_are_none(ask, bad, error):
    with pytest.raises(error, match=f"[nk] is {bad!r}, expected a number of items"): COUNTS[ask](record_of(cloud(50)), bad)

@pytest.mark.parametrize('bad', [1.5, 3., np.nan, True, None, [3], np.arange(2)])
def test_items_that_are_none(bad):
    record = record_of(cloud(50))
    for ask in (record.neighbours, record.item):
        with pytest.raises(TypeError, match='item is .*, expected its index, a whole number, or its name as text'): ask(bad)

@pytest.mark.parametrize('kind', [int, np.int8, np.array, torch.tensor])
def test_whole_numbers_of_any_kind(kind):
    record = record_of(cloud(50))
    assert len(record.neighbours(kind(3), kind(2))) == len(record.outliers(kind(2))) == 2 and len(record.item(kind(3))) == 1
    assert len(record.neighbours(3, kind(0))) == len(record.outliers(kind(0))) == len(record.top(kind(0), 'forgetting')) == 0

@pytest.mark.parametrize('bad', [np.nan, -1, 5, 1.01, 'many', None])
def test_a_chance_that_is_no_share(bad):
    with pytest.raises(ValueError, match=f'chance is {bad!r}, expected a share from 0 to 1'): record_of(cloud(50)).duplicates(chance=bad)

def test_duplicates_of_a_record_without_items():
    with pytest.raises(KeyError, match="no split 'train' in this record; nothing was recorded yet"): XentWriter().record.duplicates()
    with pytest.raises(KeyError, match="no split 'train' in this record; it has test"): record_of(cloud(50), split='test').duplicates()

def test_too_few_items():
    with pytest.raises(ValueError, match='10 items have features, expected more than 10'): record_of(cloud(10)).duplicates()

def test_models_of_two_widths_are_not_compared():
    writer = XentWriter()
    record_of(cloud(50, 20), writer=writer)
    record = record_of(cloud(50, 30), split='valid', writer=writer)
    with pytest.raises(ValueError, match='last layers of different widths'): record.duplicates()

def test_features_of_training_are_told():
    with pytest.warns(UserWarning, match='were taken while it trained'): record_of(cloud(50), training=True).duplicates()

def test_a_record_that_was_run():
    "From the recorder to the answer: in Points item 3 stands twice."
    train = Points(60)
    train.x[40, :4] = train.x[3, :4]
    learn = learner([rec := XentRecorder(features=True, eval_every=2)], train=train, model=Wide(.5))
    fit(learn, 2)
    found = rec.record.duplicates('train')
    assert found['item'][:2].tolist() == [3, 40] and found['closeness'].eq(0).sum() == 2
    assert rec.record.neighbours(3, 1)['item'][0] == 40


# -- the picture

def test_a_point_an_item_and_some_ringed():
    rows = cloud(40)
    record = record_of(rows, labels=[i % 2 for i in range(40)])
    try:
        ax = record.plot_features()
        points = np.concatenate([o.get_offsets() for o in ax.collections])
        assert len(points) == 40 and np.isfinite(points).all()
        assert ax.get_title(loc='left').startswith('train: 40 items')
        marked = record.plot_features(mark=[3, 7])
        rings = marked.collections[-1].get_offsets()
        assert len(rings) == 2 and all((points == o).all(1).any() for o in rings)
    finally: plt.close('all')


# -- of one model, of the same items

def two_looks(train_epoch, look_epoch, valid_epoch):
    "Train, a look at it and valid, each with features of one epoch."
    writer, rows = XentWriter(), cloud(30)
    for split, e in dict(train=train_epoch, train_eval=look_epoch, valid=valid_epoch).items():
        if e is None: continue
        writer.set_items(split, pd.DataFrame(dict(item=range(30), name=None, source=range(30))), 'v' if split == 'valid' else 't', vocab=list('abc'))
        put(writer, 0, e, split, dict(item=np.arange(30), pred=np.arange(30) % 3, targ=np.arange(30) % 3),
            features=(np.arange(30), rows, dict(every=0, of=20, training=False)))
    return writer.record

@pytest.mark.parametrize('look, of', [(2, 'train_eval'), (1, 'train')])
def test_a_look_at_an_earlier_model_is_not_compared_with_valid(look, of):
    record = two_looks(2, look, 2)
    assert _space(record, 'train', 'valid').seen['train'].attrs['split'] == of
    assert _space(record, 'train').seen['train'].attrs['split'] == 'train_eval'

def test_features_of_different_models_are_refused():
    with pytest.raises(ValueError, match=r'different epochs \(train 1, valid 2\)'): two_looks(1, None, 2).duplicates()


# -- handed to a writer

@pytest.mark.parametrize('kind', ['features', 'inputs'])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e6, -1e30])
def test_one_bad_row_spoils_no_other(kind, bad):
    "It has no numbers, the others those that they have without it; of a repeated item the last good row counts."
    writer, lists = XentWriter(), cloud(30).astype(np.float32)
    item, wrong = np.arange(30), lists.copy()
    item[9] = 8
    wrong[4, 2] = wrong[9, 0] = wrong[29, 19] = bad
    ok = np.isin(np.arange(30), [4, 9, 29], invert=True)
    writer.set_items('train', pd.DataFrame(dict(item=range(30), name=None, source=range(30))), 't')
    for e, (i, rows) in enumerate(((item[ok], lists[ok]), (item, wrong))):
        cols = dict(item=np.arange(30), pred=np.arange(30) % 3, targ=np.arange(30) % 3)
        put(writer, 0, e, 'train', cols, **{kind: (i, rows, dict(every=1))})
    want, got = (read_lists(writer.record, kind, 'train', e, '', '')[0] for e in range(2))
    assert np.isnan(got).all(1).tolist() == [i in (4, 9, 29) for i in range(30)]
    np.testing.assert_array_equal(got, want)

def test_lists_of_bad_rows_alone():
    "Nothing is left, and can be read as nothing."
    write_lists(f := io.BytesIO(), np.arange(3), np.full((3, 5), np.nan), 'x', shared=True)
    got = lists_of([pq.read_table(f)], 'x', 3)
    assert got.shape == (3, 5) and np.isnan(got).all()
