"Masks and sequences: the parts of each item, where it goes wrong, and which are named first."
import os

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from fastai.callback.mixup import CutMix
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from fastai_xent.batch import Batch
from fastai_xent.dense import PARTS, Parts, as_bytes, as_doubts, checksum, limits, sides, spread, worst_two
from fastai_xent.losses import XentLossFlat
from fastai_xent.numerics import xent_stats
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.rows import RowBuffer
from fastai_xent.summary import summary
from fastai_xent.views import class_issues, class_pairs
from fastai_xent.writer import XentWriter
from test_rows import Watch

SHAPES = [(1,), (7,), (144,), (145,), (1000,), (1, 1), (12, 12), (13, 40), (48, 64), (3, 500), (4, 6, 9), (2, 2, 2, 3)]


def truth(loss, known):
    "Loss of each part in float64, from the limits that torch documents for adaptive pooling; of more than three axes as of one."
    if loss.ndim > 3: loss, known = loss.ravel(), known.ravel()
    k, out = sides(loss.shape), np.full(sides(loss.shape), -np.inf)
    for at in np.ndindex(*k):
        part = tuple(slice(i * s // m, -(-(i + 1) * s // m)) for i, s, m in zip(at, loss.shape, k))
        share = known[part].mean()
        if share: out[at] = loss[part][known[part]].sum() / known[part].size / max(share, .25)
    return out

def drawn(shape, n=5, c=4, seed=0, ignored=.3):
    gen = torch.Generator().manual_seed(seed)
    z, y = 3 * torch.randn(n, c, *shape, generator=gen), torch.randint(0, c, (n, *shape), generator=gen)
    return z, y.masked_fill(torch.rand(y.shape, generator=gen) < ignored, -100)

def true_parts(z, y):
    p = z.double().softmax(1).gather(1, y.clamp_min(0).unsqueeze(1)).squeeze(1)
    loss = -p.clamp_min(1e-7).log()
    return [truth(o.numpy(), k.numpy()) for o, k in zip(loss, y >= 0)], loss.numpy()


# -- the numbers

@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_parts_are_those_of_float64(shape):
    z, y = drawn(shape)
    y[1] = -100                                                       # nothing is labelled
    parts, (want, _) = Parts(), true_parts(z, y)
    cols = parts.take(0, y, xent_stats(z, y))
    t = parts.done(np.arange(5))
    for i, w in enumerate(want):
        two = -np.sort(-w.ravel())[:2]
        two = two[two > -np.inf]
        assert cols['worst'][i].item() == pytest.approx(two.mean() if len(two) else np.nan, rel=1e-5, nan_ok=True)
        got, doubt = as_doubts(np.array(t['parts'][i].as_py())), np.where(w > -np.inf, -np.expm1(-np.maximum(w, 0)), np.nan).ravel()
        np.testing.assert_allclose(got, doubt, atol=1 / 508 + 1e-5)
        assert len(got) <= PARTS and t['shape'][i].as_py() == list(shape)

@pytest.mark.parametrize('shape', [o for o in SHAPES if len(o) < 4], ids=str)
def test_the_place_is_the_worst_of_the_worst_part(shape):
    z, y = drawn(shape, seed=1)
    parts, (want, loss) = Parts(), true_parts(z, y)
    parts.take(0, y, xent_stats(z, y))
    t = parts.done(np.arange(5)).to_pandas()
    for i, w in enumerate(want):
        if not (w > -np.inf).any(): continue
        at = np.unravel_index(w.argmax(), w.shape)
        part = tuple(slice(j * s // m, -(-(j + 1) * s // m)) for j, s, m in zip(at, shape, w.shape))
        known = np.where(y[i].numpy() >= 0, loss[i], -1)
        place = np.unravel_index(t['place'][i], shape)
        assert known[place] == known[part].max() and all(s.start <= p < s.stop for s, p in zip(part, place))
        assert t['targ'][i] == y[i][place] and t['pred'][i] == z[i].argmax(0)[place]

@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_limits_hold_their_position(shape):
    for at in np.random.default_rng(0).integers(0, shape, (50, len(shape))):
        assert all(a <= p < b for p, (a, b) in zip(at, limits(shape, at)))

def test_spread_gives_each_position_a_part_that_holds_it():
    for shape in ((5,), (13, 40), (7, 12)):
        parts = np.arange(np.prod(sides(shape))).reshape(sides(shape))
        for at in np.ndindex(*shape):
            ends = limits(shape, at)
            part = np.unravel_index(spread(parts, shape)[at], parts.shape)
            assert ends == [(i * s // k, -(-(i + 1) * s // k)) for i, s, k in zip(part, shape, parts.shape)]

def test_ignored_positions_change_nothing():
    "Whatever the model says there."
    z, y = drawn((40, 30))
    other = torch.where((y == -100).unsqueeze(1), 50 * torch.randn(z.shape), z)
    a, b = Parts(), Parts()
    assert_close(a.take(0, y, xent_stats(z, y)), b.take(0, y, xent_stats(other, y)), equal_nan=True)
    assert a.done(np.arange(5)).equals(b.done(np.arange(5)))

@pytest.mark.parametrize('more', [0, 1, 20, 100])
def test_padding_of_a_sequence_counts_nowhere(more):
    z, y = drawn((40,), ignored=0.)
    long_z, long_y = torch.cat([z, torch.randn(5, 4, more)], 2), torch.cat([y, torch.full((5, more), -100)], 1)
    a, b = Parts(), Parts()
    assert_close(a.take(0, y, xent_stats(z, y)), b.take(0, long_y, xent_stats(long_z, long_y)))
    a, b = a.done(np.arange(5)), b.done(np.arange(5))
    assert a['place'].equals(b['place'])
    for x, y in zip(a['parts'].to_pylist(), b['parts'].to_pylist()): assert x == y[:40] and y[40:] == [255] * more

@pytest.mark.parametrize('z', [torch.full((1, 3, 4, 4), torch.nan), torch.full((1, 3, 4, 4), torch.inf)], ids=['nan', 'inf'])
def test_logits_that_are_no_numbers(z):
    y = torch.zeros(1, 4, 4, dtype=torch.long)
    parts = Parts()
    assert parts.take(0, y, xent_stats(z, y))['worst'].isnan().all()
    assert parts.done(np.zeros(1))['parts'].to_pylist() == [[255] * 16]

def test_one_position_has_a_bounded_say():
    z, y = torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long)
    z[0, 1, 0] = 1e6
    assert Parts().take(0, y, xent_stats(z, y))['worst'].item() == pytest.approx((-np.log(1e-7) + np.log(2)) / 2, rel=1e-4)

def test_a_byte_is_wrong_by_half_a_step_at_most():
    parts = torch.cat([torch.linspace(0, 20, 10001), torch.tensor([1e-9, 100.])])[None]
    np.testing.assert_allclose(as_doubts(as_bytes(parts).numpy())[0], -np.expm1(-parts[0].double().numpy()), atol=1 / 508 + 1e-6)

def test_a_checksum_tells_a_turned_mask():
    y = torch.randint(0, 5, (200, 20, 20), generator=torch.Generator().manual_seed(0))
    for other in (y.flip(-1), y.flip(-2), y.transpose(1, 2), y.roll(1, -1), (y + 1) % 5):
        assert (checksum(y) != checksum(other)).all()
    assert (checksum(y) == checksum(y.to(torch.uint8))).all()

def test_two_parts_at_most_make_the_score():
    assert_close(worst_two(torch.tensor([[3., 1., 2.], [5., -torch.inf, -torch.inf], [-torch.inf] * 3])), torch.tensor([2.5, 5., torch.nan]), equal_nan=True)
    assert_close(worst_two(torch.tensor([[3.]])), torch.tensor([3.]))

@pytest.mark.parametrize('shape', [(8, 5, 4), (8, 5, 30, 20), (8, 5, 4, 4, 4)], ids=str)
def test_no_batch_on_a_device_waits_for_it(shape):
    with FakeTensorMode():
        z, y = torch.zeros(shape, device='cuda'), torch.zeros(8, *shape[2:], device='cuda', dtype=torch.long)
        parts = Parts()
        rows = RowBuffer(100, parts)
        with Watch() as watch:
            for i in range(5): rows.add(i, Batch(z, y, nn.CrossEntropyLoss(), 1), i)
            assert watch.waits == [] and len(parts.kept) == 5
            assert all(o.device.type == 'cuda' for *_, levels, few in parts.kept for o in (levels, few))
            assert all(levels[0].numel() + few[0].numel() * 8 <= 256 for *_, levels, few in parts.kept)


# -- a record

def planted(n=30, size=30, seed=0):
    "Masks with a square, left out of each fifth; logits that see it."
    rng = np.random.default_rng(seed)
    true, corner = torch.zeros(n, size, size, dtype=torch.long), rng.integers(0, size - 8, (n, 2))
    for o, (a, b) in zip(true, corner): o[a:a + 8, b:b + 8] = 1
    wrong = np.arange(n) % 5 == 2
    y = torch.where(torch.tensor(wrong)[:, None, None], 0, true)
    y[:, :2] = -100
    z = [s * torch.eye(2)[true].movedim(-1, 1) + torch.tensor(rng.normal(size=(n, 2, size, size)), dtype=torch.float32) for s in (1, 2, 3)]
    return z, y, wrong, corner

def recorded(zs, y, path=None, bs=7, seed=0, **kw):
    "A loop of one's own, in an order drawn anew for each epoch."
    gen = torch.Generator().manual_seed(seed)
    with XentWriter(path, items=len(y), vocab=['ground', 'square'], **kw) as w:
        for e, z in enumerate(zs):
            for i in torch.randperm(len(y), generator=gen).split(bs): w.add(split='train', epoch=e, item=i, pred=z[i], targ=y[i])
    return w.record

def said(record):
    issues = record.label_issues()
    return issues.sort_values('item', ignore_index=True), issues.attrs, [record.where(i) for i in range(len(issues))]

def same(a, b, rtol=1e-6):
    (x, one, places), (y, two, others) = a, b
    pd.testing.assert_frame_equal(pd.DataFrame(x).drop(columns='score'), pd.DataFrame(y).drop(columns='score'))
    np.testing.assert_allclose(x['score'], y['score'], rtol=rtol)
    assert one['verdict'] == two['verdict']
    for p, q in zip(places, others):
        np.testing.assert_array_equal(p.pop('doubt'), q.pop('doubt'))
        assert p == q

def test_the_planted_come_first_with_their_place():
    zs, y, wrong, corner = planted()
    issues = recorded(zs, y).label_issues()
    assert wrong[issues['item'][:wrong.sum()]].all() and not issues['is_issue'].any() and issues['p_wrong'].isna().all()
    for o in issues[:wrong.sum()].itertuples():
        assert (o.targ, o.likely) == ('ground', 'square')
        a, b = ((int(s.split(':')[0]), int(s.split(':')[1])) for s in o.where.split(', '))
        assert a[0] < corner[o.item][0] + 8 and a[1] > corner[o.item][0] and b[0] < corner[o.item][1] + 8 and b[1] > corner[o.item][1]

@pytest.mark.parametrize('bs, seed', [(1, 1), (4, 2), (30, 3)])
def test_batches_and_their_order_change_nothing(bs, seed):
    zs, y, *_ = planted()
    same(said(recorded(zs, y)), said(recorded(zs, y, bs=bs, seed=seed)))

@pytest.mark.parametrize('where', ['disk', 'url'])
def test_it_is_the_same_wherever_it_lies(tmp_path, where):
    zs, y, *_ = planted()
    path = tmp_path / 'r' if where == 'disk' else f'memory://dense-{os.getpid()}/r'
    record = recorded(zs, y, path)
    want = said(recorded(zs, y))
    same(said(record), want, rtol=5e-3)
    same(said(XentRecord(path)), said(record))

def test_processes_leave_a_part_each(tmp_path, monkeypatch):
    "Each has half of the items of an epoch, and another half in the next."
    zs, y, *_ = planted()
    monkeypatch.setenv('WORLD_SIZE', '2')
    both = [XentWriter(tmp_path / 'r', items=len(y), vocab=['ground', 'square'], precision='full') for _ in range(2)]
    for rank, w in enumerate(both):
        monkeypatch.setenv('RANK', str(rank))
        for e, z in enumerate(zs):
            for i in torch.arange((rank + e) % 2, len(y), 2).split(4): w.add(split='train', epoch=e, item=i, pred=z[i], targ=y[i])
        w.close()
    record = XentRecord(tmp_path / 'r')
    assert len(record._place.files('_parts')) == 6
    same(said(record), said(recorded(zs, y)))

def test_rows_that_fill_up_a_batch_are_left_out():
    z, y = drawn((20,))
    parts = Parts()
    parts.take(0, y, xent_stats(z, y))
    t = parts.done(np.array([0, 1, 2, 0, 1]), np.array([False, False, False, True, True]))
    assert t['item'].to_pylist() == [0, 1, 2]

def test_an_item_that_the_last_epoch_left_out_has_the_place_of_the_one_before():
    zs, y, *_ = planted()
    with XentWriter(items=len(y)) as w:
        w.add(split='train', epoch=0, item=torch.arange(len(y)), pred=zs[0], targ=y)
        w.add(split='train', epoch=1, item=torch.arange(1, len(y)), pred=zs[1][1:], targ=y[1:])
    assert [w.record.where(i)['epoch'] for i in (0, 1)] == [0, 1] and w.record.label_issues()['where'].notna().all()
    assert w.record.where(1, epoch=0)['epoch'] == 0
    with pytest.raises(KeyError, match='no parts of item 0 .* in epoch 1'): w.record.where(0, epoch=1)

def test_an_item_without_a_label_has_no_place():
    zs, y, *_ = planted()
    y[3] = -100
    record = recorded(zs, y)
    last = record.label_issues().iloc[-1]
    assert last['item'] == 3 and pd.isna(last['score']) and pd.isna(last['where']) and last['targ'] is None
    assert np.isnan(record.where(3)['doubt']).all() and record.where(3)['targ'] is None

def test_decisions_give_a_verdict():
    zs, y, wrong, _ = planted(200)
    record = recorded(zs, y)
    asked = record.label_issues().to_review(30)
    asked['wrong'] = wrong[asked['item']]
    after = record.label_issues(reviewed=asked)
    assert 10 < after['is_issue'].sum() < 40 and wrong[after['item'][after['is_issue']]].all()  # cautious
    assert after.attrs['noise_rate_low'] <= .2 <= after.attrs['noise_rate_high']
    assert after.attrs['verdict'].startswith('Wrong labels among 200: about') and '30 were reviewed' in after.attrs['verdict']
    after = record.label_issues(reviewed=asked, cautious=False)
    assert set(after['item'][after['is_issue']]) == set(np.flatnonzero(wrong))
    assert len(record.label_issues(reviewed=asked, only_issues=True, cautious=False)) == 40
    assert class_pairs(after).to_dict('list') == dict(targ=['ground'], likely=['square'], items=[40])

def test_without_decisions_nothing_is_claimed(tmp_path):
    zs, y, *_ = planted()
    record = recorded(zs, y)
    issues = record.label_issues()
    assert 'no rate is stated' in repr(issues) and np.isnan(issues.attrs['noise_rate'])
    for f in (class_issues, class_pairs):
        with pytest.raises(ValueError, match='none of these masks or sequences is flagged'): f(issues)
    assert summary(record)['Labels of train'] == [issues.attrs['verdict']]

def test_refusals():
    zs, y, *_ = planted()
    record = recorded(zs, y)
    for kw in (dict(noise_rate=.1), dict(only_issues=True)):
        with pytest.raises(ValueError, match='give `reviewed=`'): record.label_issues(**kw)
    with pytest.raises(IndexError, match='item 30 is not in split'): record.where(30)
    off = recorded(zs, y, maps=False)
    assert not off._place.files('_parts') and off.to_df()['worst'].isna().all()
    with pytest.raises(ValueError, match='unless `maps=False`'): off.label_issues()
    with pytest.raises(KeyError, match='recorded with `maps=False`'): off.where(0)
    with pytest.raises(ValueError, match='expected at least 2'): recorded(zs[:1], y).label_issues()

def test_items_with_one_label_have_no_parts():
    with XentWriter(items=20) as w:
        for e in range(2): w.add(split='train', epoch=e, item=torch.arange(20), pred=torch.randn(20, 3), targ=torch.arange(20) % 3)
    assert not w.record._place.files('_parts') and w.record.to_df()['worst'].isna().all()
    with pytest.raises(KeyError, match='it has no mask or sequence'): w.record.where(0)


# -- files without the column

def without_the_column(record, epochs):
    for key, names in record._epochs.parts().items():
        for o in names if key[2] in epochs else ():
            path = record._place.at(o)
            pq.write_table(pq.ParquetFile(path).read().drop(['worst']), path)

@pytest.mark.parametrize('old', [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_files_of_before_are_read(tmp_path, old):
    zs, y, *_ = planted()
    recorded(zs, y, tmp_path / 'r', precision='full')
    want = recorded(zs, y).to_df().drop(columns='worst')
    without_the_column(XentRecord(tmp_path / 'r'), old)
    record = XentRecord(tmp_path / 'r')
    pd.testing.assert_frame_equal(record.to_df().drop(columns='worst'), want)
    n = record.sql('select epoch, count(worst) n from record group by all order by epoch')['n'].tolist()
    assert n == [0 if e in old else 30 for e in range(3)]
    assert len(record.item(0)) == 3 and np.isfinite(record.score('loss')).all() and np.isnan(record.score('worst')).all() == (len(old) == 3)
    if len(old) == 3:
        with pytest.raises(ValueError, match='whose parts were kept'): record.label_issues()
    record.compact()
    pd.testing.assert_frame_equal(XentRecord(tmp_path / 'r').to_df().drop(columns='worst'), want)


# -- a Learner

class Paint(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(1, 3, 3, padding=1)
    def forward(self, x): return self.net(x)

def mask_loaders(n=24, size=16, bs=5):
    set_seed(0)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, size, size, generator=gen)
    y = (x[:, 0] > .5).long() + (x[:, 0] > 1).long()
    class Items:
        def __init__(self, at): self.at = at
        def __len__(self): return len(self.at)
        def __getitem__(self, i): return x[self.at[i]], y[self.at[i]]
    return DataLoaders.from_dsets(Items(range(16)), Items(range(16, n)), bs=bs, num_workers=0, device='cpu')

def fit_recorded(dls, cbs=(), **kw):
    set_seed(0)
    recorder = XentRecorder(**kw)
    learn = Learner(dls, Paint(), loss_func=XentLossFlat(axis=1), cbs=[recorder, *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    return recorder

def test_a_training_is_the_same_to_the_bit_with_or_without():
    on, off = (fit_recorded(mask_loaders(), maps=maps) for maps in ((), False))
    for a, b in zip(on.learn.model.parameters(), off.learn.model.parameters()): assert torch.equal(a, b)
    assert len(on.record._place.files('_parts')) == 4 and not off.record._place.files('_parts')
    pd.testing.assert_frame_equal(on.record.to_df().drop(columns='worst'), off.record.to_df().drop(columns='worst'))
    assert on.record.where(3, 'valid')['doubt'].shape == (12, 12)

def test_named_items_have_both():
    r = fit_recorded(mask_loaders(), maps=[2]).record
    assert r.map(2)['loss'].shape == (16, 16) and r.where(2)['shape'] == (16, 16) == r.where(3)['shape']

def test_mixed_items_have_no_parts():
    r = fit_recorded(mask_loaders(), [CutMix()]).record
    assert all('/valid/' in o for o in r._place.files('_parts')) and r.to_df('train')['worst'].isna().all() and r.to_df('valid')['worst'].notna().all()
    with pytest.raises(KeyError, match='was mixed with another'): r.where(0)


def test_a_look_at_other_items_is_not_shown():
    "After the dataset has changed, an earlier look at train is of other masks."
    zs, y, *_ = planted()
    with XentWriter(items=dict(train=[f'a{i}' for i in range(len(y))], train_eval=[f'a{i}' for i in range(len(y))])) as w:
        for split in ('train', 'train_eval'): w.add(split=split, epoch=0, item=torch.arange(len(y)), pred=zs[0], targ=y)
    assert w.record.where(1)['split'] == 'train_eval'
    w.items = dict(train=[f'b{i}' for i in range(len(y))])
    with w: w.add(split='train', epoch=1, item=torch.arange(len(y)), pred=zs[1].flip(0), targ=y.flip(0))
    assert (w.record.where(1)['split'], w.record.where(1)['epoch']) == ('train', 1)
