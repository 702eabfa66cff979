"Which item is row i? Items that say who they are, through every loader there is, and a count of the rows that were checked."
import copy
import os
import pickle
import subprocess
import sys
import zipfile
from functools import wraps
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.utils.data.dataloader as torch_loaders
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard, prepare_data_loader, skip_first_batches
from fastai.callback.core import Callback
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader
from fastai.data.block import CategoryBlock
from fastai.learner import Learner
from fastai.tabular.core import TabDataLoader, TabularPandas
from fastai.text.data import LMDataLoader, SortedDL
from fastai.torch_core import set_seed
from helpers import C, CHECKED, MIDDLE, UNIT, Coded, OneRow, Saw, Through, at_most, check, coded, decoded, end_workers, ended, little_memory, quiet, same_bits, through_learner, warned, wrong_rows
from torch.utils.data import DistributedSampler

import fastai_xent
from fastai_xent.taps import NoItemIdentity, tap_rows, why_not
from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder

@pytest.fixture(autouse=True)
def guard():
    with at_most(300): yield


# -- the matrix

SKIPS = {'none': [], 'one': [1], 'several': [0, 3, 12, 13, 14, 15, 16, 17, 18, 19, 20, 45],
    'a worker starves': [i for i in range(40) if i // 4 % 3 == 0]}
N = 50

class SkipTab(TabDataLoader):
    "A table whose rows can fail; tables have no SkipItemException of their own."
    skip = frozenset()
    def do_item(self, s): return None if s in self.skip and s is not None else super().do_item(s)

def table(n, skip=(), **kw):
    x, y = coded(torch.arange(n))
    df = pd.DataFrame({**{f'x{k}': x[:, k].numpy() for k in range(C)}, 'label': y.numpy()},
        index=[f'row {i}' for i in range(n)])
    to = TabularPandas(df, procs=[], cont_names=[f'x{k}' for k in range(C)], y_names='label', y_block=CategoryBlock())
    dl = SkipTab(to, **kw)
    dl.skip = frozenset(skip)
    return dl

def weighted(n, skip, **kw): return WeightedDL(Coded(n, skip), wgts=np.arange(n) % 5 + .1, **kw)
def partial(n, skip, **kw): return PartialDL(Coded(n, skip), partial_n=n - 9, **kw)
def sorted_dl(n, skip, **kw): return SortedDL(Coded(n, skip), res=[(i * 7919) % 101 for i in range(n)], **kw)
def prebatched(n, skip, bs, drop_last, **kw): return TfmdDL(OneRow(n, skip), bs=None, **kw)
def fewer(n, skip, **kw): return TfmdDL(Coded(n, skip), n=n - 13, **kw)

LOADERS = dict(tfmd=lambda n, skip, **kw: TfmdDL(Coded(n, skip), **kw), base=lambda n, skip,
    **kw: DataLoader(Coded(n, skip), **kw), weighted=weighted, partial=partial, sorted=sorted_dl,
               table=table, prebatched=prebatched, fewer=fewer)

@pytest.mark.grid
@pytest.mark.parametrize('skip', SKIPS)
@pytest.mark.parametrize('workers', [0, 2, 3])
@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('kind', LOADERS)
def test_matrix(kind, drop_last, shuffle, workers, skip):
    set_seed(3)
    train = LOADERS[kind](N, SKIPS[skip], bs=4, shuffle=shuffle, drop_last=drop_last, num_workers=workers)
    learn = check(train, table(7, bs=4) if kind == 'table' else None, epochs=1 if workers else 3)
    seen = [items for s, items in learn.seen if s == 'train']
    if shuffle and kind not in ('weighted', 'partial') and len(seen) > 1: assert not np.array_equal(seen[0], seen[1])

@pytest.mark.grid
@pytest.mark.parametrize('bs, drop_last', [(1, False), (1, True), (3, False), (3, True), (50, False), (64, False)])  # of fewer items than a batch fastai drops all
@pytest.mark.parametrize('skip', ['none', 'several'])
@pytest.mark.parametrize('workers', [0, 2])
def test_batch_sizes(bs, drop_last, skip, workers):
    set_seed(5)
    check(TfmdDL(Coded(N, SKIPS[skip]), bs=bs, shuffle=True, drop_last=drop_last, num_workers=workers), epochs=1)

@pytest.mark.parametrize('workers', [0, 2])
def test_valid_is_matched_as_well(workers):
    check(TfmdDL(Coded(9), bs=4, num_workers=0),
        TfmdDL(Coded(N, SKIPS['several']), bs=4, shuffle=True, num_workers=workers))

def test_ten_items():
    "Eight rows as without the skip, and seven of the eight are not where one would look for them."
    learn = check(TfmdDL(Coded(10, [1]), bs=4, drop_last=True, num_workers=0), epochs=1)
    assert learn.xent_recorder.record.to_df('train')['item'].tolist() == [0, 2, 3, 4, 5, 6, 7, 8]
    learn = check(TfmdDL(Coded(10, [1]), bs=4, drop_last=True, num_workers=2), epochs=1)
    assert learn.xent_recorder.record.to_df('train')['item'].tolist() == [0, 2, 3, 4, 5, 6, 7, 8]
    assert learn.seen[0][1].tolist() == [0, 2, 3, 8, 4, 5, 6, 7]

def test_an_item_that_fails_now_and_then():
    "What was skipped in one epoch may come through in the next."
    ds = Moody(N)
    check(TfmdDL(ds, bs=4, shuffle=True, num_workers=0), epochs=4)
    check(TfmdDL(ds, bs=4, shuffle=True, drop_last=True, num_workers=2), epochs=2)

class Moody(Coded):
    calls = 0
    def __getitem__(self, i):
        self.calls += 1
        self.skip = {i} if self.calls * 2654435761 % 5 == 0 else set()
        return super().__getitem__(i)

def test_nothing_comes_through():
    "Every item is skipped: fastai trains no batch, the recorder records none."
    saw, recorder = Saw(), XentRecorder()
    learn = through_learner(TfmdDL(Coded(8, range(8)), bs=4, num_workers=0), cbs=[recorder, saw])
    learn.recorder.train_metrics = False
    try: learn.fit(1)
    except Exception: pass                            # fastai's own: there is no loss to show
    assert not len(recorder.record.to_df()) or set(recorder.record.to_df()['split']) == {'valid'}


# -- torch's loader

def torch_dl(n=N, **kw): return torch.utils.data.DataLoader(Coded(n), **kw)

class Backwards(torch.utils.data.Sampler):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __iter__(self): return iter(range(self.n - 1, -1, -1))

class Uneven(torch.utils.data.Sampler):
    "Batches of one, two, three … items."
    def __len__(self): return 4
    def __iter__(self):
        order = torch.randperm(20).tolist()
        for k in range(4): yield [order.pop() for _ in range(k + 1)]

TORCH = dict(plain=dict(batch_size=4), shuffle=dict(batch_size=4, shuffle=True),
    drop_last=dict(batch_size=4, shuffle=True, drop_last=True),
             sampler=dict(batch_size=4, sampler=Backwards(N)),
                 weighted=dict(batch_size=4, sampler=torch.utils.data.WeightedRandomSampler(np.arange(N) + 1., 33)),
             batch_sampler=dict(batch_sampler=Uneven()),
                 generator=dict(batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3)),
                 one=dict(batch_size=1, shuffle=True))

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', TORCH)
def test_torch(kind, workers): check(torch_dl(**TORCH[kind], num_workers=workers), torch_dl(9, batch_size=4),
    epochs=1 if workers else 3)

def test_torch_without_batches():
    "batch_size=None: the sampler gives items, and each is a batch."
    check(torch.utils.data.DataLoader(OneRow(11), batch_size=None, shuffle=True))

@pytest.mark.parametrize('started', [False, True])
def test_torch_workers_that_stay(started):
    dl = torch_dl(batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)
    if started: assert len(list(dl)) == 13
    check(dl, torch_dl(9, batch_size=4), epochs=3)
    old = (dl.sampler, dl.batch_sampler)
    assert len(list(dl)) == 13                         # and they go on after the fit
    check(dl, torch_dl(9, batch_size=4), epochs=1)
    assert (dl.sampler, dl.batch_sampler) == old
    end_workers(dl)

def test_torch_loader_is_as_before():
    dl = torch_dl(batch_size=4, shuffle=True)
    before = dict(vars(dl))
    check(dl, torch_dl(9, batch_size=4))
    assert vars(dl) == before


# -- torch loaders that decide for themselves

TorchDL = torch.utils.data.DataLoader

class OwnTorchIter(TorchDL):
    def __iter__(self): return reversed(list(super().__iter__()))
class HiddenIter(TorchDL):
    @wraps(TorchDL.__iter__)
    def __iter__(self): return reversed(list(super().__iter__()))
class OwnIterator(TorchDL):
    def _get_iterator(self): return reversed(list(super()._get_iterator()))
class OwnIndexSampler(TorchDL):
    @property
    def _index_sampler(self): return [[3, 2], [1, 0]]
class OwnCollation(TorchDL):
    _auto_collation = property(lambda self: True)
class OwnAttributes(TorchDL):
    def __getattribute__(self, k): return super().__getattribute__(k)
class OwnSamplers(TorchDL):
    sampler = batch_sampler = property(lambda self: [[3, 2], [1, 0]], lambda self, v: None)
class Below(OwnTorchIter):
    "Two classes down."

def of_class(cls, **kw): return lambda: cls(Coded(20), batch_size=4, shuffle=True, **kw)
def given_iterator():
    dl = of_class(TorchDL)()
    dl._get_iterator = lambda: reversed(list(TorchDL._get_iterator(dl)))
    return dl
def swapped():
    dl = of_class(TorchDL)()
    dl.__class__ = OwnTorchIter
    return dl
def foreign_iterator():
    dl = of_class(TorchDL, num_workers=1, persistent_workers=True)()
    dl._iterator = iter([])
    return dl
def dispatched(): return DataLoaderDispatcher(Coded(20), batch_sampler=of_class(TorchDL)().batch_sampler)
def shard_with_own_iter():
    class Own(DataLoaderShard):
        def __iter__(self): return reversed(list(super().__iter__()))
    return Own(Coded(20), batch_sampler=of_class(TorchDL)().batch_sampler)
def shard_of_own_iter():
    dl = DataLoaderShard(Coded(20), batch_sampler=of_class(TorchDL)().batch_sampler)
    dl.base_dataloader = of_class(OwnTorchIter)()
    return dl
def filled_up_unseen():
    return TorchDL(Coded(20), batch_sampler=BatchSamplerShard(Uneven(), 2, 0))
class NoLength(Coded):
    def __len__(self): raise TypeError('endless')

OWN_WAY = {
    'own __iter__': (of_class(OwnTorchIter), 'OwnTorchIter has its own `__iter__`'),
        'below': (of_class(Below), 'Below has its own `__iter__`'),
        'hidden by wraps': (of_class(HiddenIter), 'own `__iter__`'),
        'own _get_iterator': (of_class(OwnIterator), 'own `_get_iterator`'),
    'own _index_sampler': (of_class(OwnIndexSampler), 'own `_index_sampler`'),
        'own _auto_collation': (of_class(OwnCollation), 'own `_auto_collation`'),
        'own attributes': (of_class(OwnAttributes), 'own `__getattribute__`'),
    'own samplers': (of_class(OwnSamplers), 'own `sampler`, `batch_sampler`'),
        'on the instance': (given_iterator, 'own `_get_iterator`'),
        'kept iterator': (foreign_iterator, 'own `__next__`'),
            'swapped': (swapped, 'OwnTorchIter has its own `__iter__`'),
        'dispatcher': (dispatched, 'dispatch_batches=False'),
    'a shard of its own': (shard_with_own_iter, 'own `__iter__`'),
        'a shard around one': (shard_of_own_iter, 'own `__iter__`'),
        'filled up unseen': (filled_up_unseen, 'even_batches=False'),
        'no length': (lambda: TorchDL(NoLength(20), batch_sampler=[[1]]), 'without a length')}

@pytest.mark.parametrize('kind', OWN_WAY)
def test_torch_loaders_with_a_way_of_their_own(kind):
    make, word = OWN_WAY[kind]
    with pytest.raises(NoItemIdentity) as e: tap_rows(make())
    assert word in str(e.value) and any(o in str(e.value) for o in ('followed exactly', 'distrib_ctx',
        'even_batches=False', 'give it `__len__`'))

def test_a_torch_loader_that_reorders_is_not_recorded():
    recorder = XentRecorder()
    learn = through_learner(of_class(OwnTorchIter)(), cbs=[recorder])
    with warned() as said: learn.fit(2)
    assert len(said) == 1 and "'train'" in said[0] and 'with a `sampler` or `batch_sampler`' in said[0], said
    assert set(recorder.record.to_df()['split']) == {'valid'}

@pytest.mark.parametrize('where, name', [(TorchDL, '__iter__'), (TorchDL, '_get_iterator'),
    (torch_loaders._SingleProcessDataLoaderIter, '_next_data'),
    (torch_loaders._utils.fetch._MapDatasetFetcher, 'fetch'), (DataLoader, '__iter__'), (TfmdDL, 'sample')])
def test_methods_that_somebody_has_replaced(where, name, monkeypatch):
    "In the library itself, for all loaders."
    old = getattr(where, name)
    @wraps(old)
    def new(self, *args): return old(self, *args)
    monkeypatch.setattr(where, name, new, raising=False)
    refused = [dl for dl in (of_class(TorchDL)(), TfmdDL(Coded(20), bs=4, num_workers=0)) if why_not(dl)]
    assert refused and all(f'{name}`' in why_not(dl) for dl in refused)
    if where in (torch_loaders._SingleProcessDataLoaderIter,
        torch_loaders._utils.fetch._MapDatasetFetcher): assert len(refused) == 2

@pytest.mark.parametrize('when', ['before', 'during'])
@pytest.mark.parametrize('make', [of_class(TorchDL), lambda: TfmdDL(Coded(20), bs=4, num_workers=0)],
    ids=['torch', 'fastai'])
def test_a_class_that_changes(make, when):
    "After the tap is on, the loader becomes another one."
    dl = make()
    tap = tap_rows(dl).install()
    class Own(type(dl)):
        def __iter__(self): return reversed(list(super().__iter__()))
    if when == 'before': dl.__class__ = Own
    for _ in dl:
        tap.freeze()
        dl.__class__ = Own
    tap.remove()
    with pytest.raises(NoItemIdentity, match='own `__iter__`'): tap.rows([0], [4])


# -- samplers that give something else

class AnyKey(Coded):
    def __getitem__(self, o):
        while isinstance(o, (tuple, list)): o = o[0]
        return coded(torch.tensor(int(o or 0) % self.n))

class GivesOdd(torch.utils.data.Sampler):
    def __init__(self, n, what): self.n, self.what = n, what
    def __len__(self): return self.n
    def __iter__(self): return (self.what(i) for i in range(self.n))

GIVEN = {'pairs': (lambda i: (i, 224), '(0, 224)'), 'text': (str, "'0'"), 'fractions': (float, '0.0'),
    'numpy fractions': (np.float32, 'np.float32(0.0)'), 'booleans': (lambda i: i > 3, 'False'),
    'tensors of booleans': (lambda i: torch.tensor(i > 3), 'tensor(False)'),
         'lists': (lambda i: [i], '[0]'), 'none': (lambda i: None, 'None'),
             'from the end': (lambda i: i - 20, '-20'), 'beyond': (lambda i: i + 20, '20')}

@pytest.mark.parametrize('batched', [False, True])
@pytest.mark.parametrize('kind', GIVEN)
def test_samplers_of_odd_things(kind, batched):
    "Told with the first batch, once, with what came."
    what, word = GIVEN[kind]
    dl = TorchDL(AnyKey(20), batch_sampler=[[what(i) for i in range(k, k + 4)] for k in range(0, 20,
        4)]) if batched else TorchDL(AnyKey(20), batch_size=4, sampler=GivesOdd(20, what))
    tap = tap_rows(dl).install()
    next(iter(dl))
    tap.freeze()
    tap.remove()
    with pytest.raises(NoItemIdentity) as e: tap.check()
    assert f'asks its dataset for {word}, expected indices: whole numbers from 0 to 19' in str(e.value)
    recorder = XentRecorder()
    learn = through_learner(dl, cbs=[recorder])
    with warned() as said: learn.fit(1)
    assert len(said) == 1 and "'train'" in said[0] and f'asks its dataset for {word}' in said[0], said
    assert set(recorder.record.to_df()['split']) == {'valid'}

@pytest.mark.parametrize('batch', [{0: 'a', 1: 'b'}, {0, 1}, 'ab', iter([0, 1])],
    ids=['dict', 'set', 'text', 'iterator'])
def test_batches_that_are_no_lists(batch):
    dl = TorchDL(AnyKey(20), batch_sampler=[batch], collate_fn=len)
    tap = tap_rows(dl).install()
    assert list(dl.batch_sampler) == [batch]               # untouched
    tap.freeze()
    tap.remove()
    with pytest.raises(NoItemIdentity, match='asks its dataset for'): tap.check()

def test_ragged_lists():
    "A batch of lists of different lengths."
    dl = TorchDL(AnyKey(20), batch_sampler=[[[1, 2], [3]], [[4], [5, 6]]])
    recorder = XentRecorder()
    with warned() as said: through_learner(dl, cbs=[recorder]).fit(1)
    assert len(said) == 1 and 'asks its dataset for [1, 2], expected' in said[0]

def test_fastai_orders_of_odd_things():
    "fastai's order is known as a whole before the first batch."
    dl = Order(AnyKey(20), bs=4, num_workers=0)
    dl.order = [(i, 1) for i in range(20)]
    tap = tap_rows(dl).install()
    next(iter(dl))
    tap.freeze()
    tap.remove()
    with pytest.raises(NoItemIdentity, match=r'asks its dataset for \(0, 1\)'): tap.check()


# -- a listener changes nothing

class DrawsAtOnce(torch.utils.data.Sampler):
    "Draws its order when it is asked for an iterator, from torch's own random numbers."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __iter__(self): return iter(torch.randperm(self.n).tolist())

class LazyOrder(TfmdDL):
    def get_idxs(self): return torch.utils.data.RandomSampler(self.dataset)

@pytest.mark.parametrize('make', [lambda: TorchDL(Coded(N),
    batch_sampler=torch.utils.data.BatchSampler(DrawsAtOnce(N), 4, False)),
    lambda: TorchDL(Coded(N), batch_size=None, sampler=DrawsAtOnce(N), collate_fn=as_batch),
                                  lambda: LazyOrder(Coded(N), bs=4, num_workers=0),
                                      lambda: TorchDL(Coded(N), batch_sampler=DrawsBatches())],
                                      ids=['batches', 'single', 'fastai', 'batches at once'])
def test_orders_that_are_drawn_when_read(make):
    "The training is the same to the bit, and each row has its item."
    def run(cbs):
        set_seed(3)
        learn = through_learner(make(), cbs=[*cbs, saw := Saw()])
        learn.fit(2)
        return ended(learn), saw.seen()
    recorder = XentRecorder()
    (plain, seen), (learn, again) = run([]), run([recorder])
    same_bits(plain.end, learn.end)
    for (s, a), (t, b) in zip(seen, again): assert s == t and np.array_equal(a, b)
    df = recorder.record.to_df()
    assert not wrong_rows(df).any() and len(df) == sum(len(o) for _, o in seen)

def as_batch(b): return tuple(o[None] for o in b)
class DrawsBatches:
    def __len__(self): return 5
    def __iter__(self): return iter(torch.randperm(N)[:45].view(5, 9))

def test_a_lazy_order_with_workers():
    "Each worker would draw its own."
    recorder = XentRecorder()
    with warned() as said: through_learner(LazyOrder(Coded(N), bs=4, num_workers=2), cbs=[recorder]).fit(1)
    assert len(said) == 1 and 'return a list' in said[0]
    assert set(recorder.record.to_df()['split']) == {'valid'}

def test_a_sampler_is_itself_while_it_is_listened_to():
    dl = TorchDL(Coded(N), sampler=(inner := DistributedSampler(range(N), 2, 0)), batch_size=4)
    sampler = dl.batch_sampler
    tap = tap_rows(dl).install()
    on = dl.batch_sampler
    assert on is not sampler and isinstance(on,
        torch.utils.data.BatchSampler) and len(on) == len(sampler) and on.sampler is inner
    on.batch_size, on.mine = 7, 'x'
    assert sampler.batch_size == 7 and sampler.mine == 'x' and not hasattr(on, 'yours')
    del on.mine
    assert not hasattr(sampler, 'mine')
    for copied in (copy.copy(on), copy.deepcopy(on),
        pickle.loads(pickle.dumps(on))): assert type(copied) is torch.utils.data.BatchSampler and copied.batch_size == 7
    assert type(copy.deepcopy(dl).batch_sampler) is torch.utils.data.BatchSampler
    again = tap_rows(dl).install()                         # after an interrupted fit
    assert again.sampler is sampler
    tap.remove()
    assert dl.batch_sampler is not sampler
    again.remove()
    assert dl.batch_sampler is sampler

@pytest.mark.parametrize('taken', [1, 3, 13])
def test_workers_that_stay_and_serve_somebody_else(taken):
    "Workers that stay serve one pass at a time: who takes batches in between takes the training's."
    dl = torch_dl(batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)
    def take(learn):
        for _ in zip(range(taken), learn.dls.train): pass
    recorder = XentRecorder()
    learn = through_learner(dl, cbs=[recorder,
        At('after_batch', take, 0, lambda learn: learn.training and learn.iter == 8)])
    with warned() as said: learn.fit(1)
    end_workers(dl)
    df = recorder.record.to_df()
    assert not wrong_rows(df).any()
    assert len(said) == 1 and 'somebody else took batches' in said[0] and set(df['split']) == {'valid'}


# -- several processes

@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize('n, ranks, bs', [(10, 3, 2), (9, 3, 2), (2, 4, 3), (23, 2, 5), (7, 7, 1)])
def test_repeats_of_a_distributed_sampler(n, ranks, bs, shuffle):
    for drop_last in (False, True):
        if drop_last and n < ranks: continue
        whole, marked = [], []
        for r in range(ranks):
            dl = TorchDL(Coded(n), batch_size=bs,
                sampler=DistributedSampler(range(n), ranks, r, shuffle=shuffle, drop_last=drop_last))
            items, padding = heard(dl)
            whole += items[~padding].tolist()
            marked += items[padding].tolist()
        if drop_last: assert not marked and len(set(whole)) == len(whole) == n // ranks * ranks
        else: assert sorted(whole) == list(range(n)) and len(marked) == -n % ranks

def heard(dl):
    "The items of one pass, which are as decoded, and which of them are repeats."
    tap = tap_rows(dl).install()
    seen = []
    for x, y in dl:
        tap.freeze()
        tap.check()
        seen.append(decoded(x, y))
    tap.remove()
    items = tap.rows([*range(len(seen))], [len(o) for o in seen])
    np.testing.assert_array_equal(items, np.concatenate(seen) if seen else [])
    return items, np.zeros(len(items), dtype=bool) if tap.padding is None else tap.padding

@pytest.mark.parametrize('split', [False, True])
@pytest.mark.parametrize('even', [False, True])
@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_repeats_of_accelerate(ranks, drop_last, even, split):
    "Each item once among those that are no repeats, however batches are dealt out or cut."
    for n in (1, 2, 5, 6, 7, 11, 12, 13, 24):
        order, whole, marked = np.random.default_rng(n).permutation(n).tolist(), [], []
        for r in range(ranks):
            inner = torch.utils.data.BatchSampler(order, 2 * ranks if split else 2, drop_last)
            dl = DataLoaderShard(Coded(n), batch_sampler=BatchSamplerShard(inner, ranks, r, split, even))
            items, padding = heard(dl)
            whole += items[~padding].tolist()
            marked += items[padding].tolist()
            later, repeats = heard(skip_first_batches(dl, 1))
            np.testing.assert_array_equal(later, items[2:])
            np.testing.assert_array_equal(repeats, padding[2:])
        assert len(set(whole)) == len(whole)
        if not drop_last: assert sorted(whole) == list(range(n))
        if drop_last or not even: assert not marked

@pytest.mark.parametrize('workers', [0, 2])
def test_loaders_that_accelerate_has_prepared(workers):
    "With seeds of their own, an epoch that is set, and one batch ahead."
    def prepared(n, **kw):
        dl = torch_dl(n, num_workers=workers, **kw)
        return prepare_data_loader(dl, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=5,
            rng_types=['generator'])
    learn = check(prepared(N, batch_size=4, shuffle=True), prepared(9, batch_size=4), epochs=2)
    seen = [o for s, o in learn.seen if s == 'train']
    assert not np.array_equal(*seen)
    before = dict(vars(learn.dls.train))
    check(learn.dls.train, prepared(9, batch_size=4), epochs=1)
    assert type(learn.dls.train.batch_sampler) is torch.utils.data.BatchSampler and before.keys() == vars(learn.dls.train).keys()


# -- tsai's loaders, by their own rules

class NumpyDataLoader(TfmdDL):
    "As tsai's: it chooses the items of a batch once more."
    __module__ = 'tsai.data.core'
    partial_n = weights = sampler = None
    sort = False

@pytest.mark.parametrize('kw, word', [(dict(shuffle=True), ''), (dict(), ''), (dict(shuffle=True, partial_n=5), ''),
    (dict(sort=True), ''), (dict(shuffle=True, sort=True), 'sort=False'),
    (dict(sampler=[1], sort=True), 'sort=False'), (dict(partial_n=5), 'shuffle=True'),
    (dict(weights=[1]), 'shuffle=True')])
def test_tsai(kw, word):
    dl = NumpyDataLoader(Coded(9), bs=4, num_workers=0, shuffle=kw.pop('shuffle', False))
    for k, v in kw.items(): setattr(dl, k, v)
    assert (word in why_not(dl)) if word else not why_not(dl)


# -- other ways to start a worker

@pytest.mark.parametrize('method', [pytest.param('spawn', marks=pytest.mark.slow), 'forkserver'])
def test_start_methods(method, tmp_path):
    code = f"""
import sys, torch
sys.path[:0] = [{str(Path(__file__).parent)!r}]
if __name__ == '__main__':
    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method({method!r})
    if {method!r} == 'forkserver': torch.multiprocessing.set_forkserver_preload(['helpers'])
    from helpers import CHECKED, Coded, TfmdDL, check, end_workers
    check(TfmdDL(Coded(50, {SKIPS['several']}), bs=4, shuffle=True, drop_last=True, num_workers=2), epochs=1)
    if {method!r} == 'forkserver':
        from accelerate.data_loader import DataLoaderShard
        valid = torch.utils.data.DataLoader(Coded(9), batch_size=4)
        dl = torch.utils.data.DataLoader(Coded(50), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)
        check(dl, valid, epochs=2)
        end_workers(dl)
        check(DataLoaderShard(Coded(50), batch_sampler=dl.batch_sampler, num_workers=1), valid, epochs=1)
    print('rows', CHECKED['rows'])
"""
    script = tmp_path / f'{method}.py'
    script.write_text(code)
    res = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240,
        env={**os.environ, 'PYTHONPATH': str(Path(fastai_xent.__file__).parents[1])})
    assert res.returncode == 0, res.stderr[-3000:]
    CHECKED['rows'] += int(res.stdout.split('rows ')[1])


# -- other callbacks that use the same loader

class At(Callback):
    "Do something at one event, `when` it is time."
    def __init__(self, event, what, order=0,
        when=lambda learn: True): self.what, self.order, self.when, self.done = what, order, when, 0; setattr(self,
        event, self._do)
    def _do(self):
        if not self.when(self.learn): return
        self.done += 1
        self.what(self.learn)

def first_batch(learn): return learn.training and learn.iter == 0
def third_batch(learn): return learn.training and learn.iter == 2
def one_batch(learn): learn.dls.train.one_batch()
def begun(learn): next(iter(learn.dls.train))
def one_item(learn): assert learn.dls.train.do_item(3) is None    # one that cannot be read
def one_pass(learn):
    try: learn.dls.train._one_pass()
    except TypeError: pass                            # fastai cannot make a batch of an item that is skipped

WHEN = {'before_fit': ('before_fit', 5, None), 'before_train, first': ('before_train', 5, None),
    'before_train, last': ('before_train', 90, None), 'batch 0, first': ('before_batch', 5, first_batch),
        'batch 0, last': ('before_batch', 90, first_batch), 'batch 2': ('before_batch', 5, third_batch),
            'after batch 2': ('after_batch', 90, third_batch)}

@pytest.mark.grid
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('what', [one_batch, one_pass, one_item])
@pytest.mark.parametrize('name', WHEN)
def test_others_read_from_the_loader(name, what, workers):
    "Batches that other callbacks take for themselves are not the training's."
    event, order, when = WHEN[name]
    cb = At(event, what, order, when or (lambda learn: True))
    check(TfmdDL(Coded(N, SKIPS['several']), bs=4, shuffle=True, drop_last=True, num_workers=workers), cbs=[cb], epochs=2)
    assert cb.done

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', WHEN)
def test_others_begin_a_pass(name, workers):
    "Somebody starts an ordinary pass and leaves it. It may be impossible to tell it from the training's; it is not confused with it."
    event, order, when = WHEN[name]
    recorder, saw = XentRecorder(), Saw()
    learn = through_learner(TfmdDL(Coded(20, [1]), bs=4, shuffle=True, num_workers=workers),
        cbs=[recorder, saw, At(event, begun, order, when or (lambda learn: True))])
    with warned() as said: learn.fit(2)
    df = recorder.record.to_df()
    assert not wrong_rows(df).any()
    unclear = workers and name in ('before_train, last', 'batch 0, first')
    assert not said or (unclear and all('passes over the loader were started' in o for o in said))
    assert len(df[df['split'] == 'train']) == 38 or unclear
    CHECKED['rows'] += len(df)

def test_two_recorders():
    "Each has the whole, or says why not."
    class Second(XentRecorder): pass
    a, b = XentRecorder(), Second()
    learn = through_learner(TfmdDL(Coded(20), bs=4, shuffle=True, num_workers=0), cbs=[a, b])
    with warned() as said: learn.fit(2)
    for o in (a, b):
        df = o.record.to_df()
        assert not wrong_rows(df).any()
        assert len(df) == 2 * 27 or said
    assert not learn.loss_func.keep_stats

def test_one_loader_for_both():
    dl = TfmdDL(Coded(N, [3]), bs=4, shuffle=True, num_workers=0)
    check(dl, dl)

class Shifted(Coded):
    def __getitem__(self, i): return coded(super().__getitem__(i) and i + 30)

LOOKS = {'validate': (lambda learn: learn.validate(), [1]), 'train': (lambda learn: learn.get_preds(ds_idx=0, reorder=False), [1]),
    'its loader': (lambda learn: learn.get_preds(dl=learn.dls.train, reorder=False), [1]),
    'in order': (lambda learn: learn.get_preds(dl=learn.dls.train), [])}

@pytest.mark.grid
@pytest.mark.parametrize('look', LOOKS)
@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('order', [5, 90])
def test_another_loader_in_the_last_moment(order, workers, drop_last, look):
    "A callback that looks at the model in `before_train` leaves fastai with another loader than the recorder was told of."
    what, skip = LOOKS[look]
    recorder = XentRecorder()
    learn = through_learner(TfmdDL(Coded(10, skip), bs=4, shuffle=True, drop_last=drop_last,
        num_workers=workers), TfmdDL(Shifted(9), bs=4, num_workers=0), cbs=[recorder])
    learn.add_cb(At('before_train', what, order))
    with warned(): learn.fit(2)
    df = recorder.record.to_df()
    df = df[df['split'] == 'train']
    moved = df['item'] - (df['margin'].astype(float) / UNIT + MIDDLE).round()
    assert (moved == 0).all() or (order == 5 and (moved == -30).all())    # recorded as the dataset that it was, or not at all


# -- no traces

def of_ours(dl): return [k for k, v in vars(dl).items() if type(getattr(v, '__self__',
    v)).__module__.startswith('fastai_xent')]

def test_no_traces(tmp_path):
    "Hooks are on a loader during its pass, and never on one that was made from it."
    made, copies = [], []
    def make(learn):
        if learn.training: assert of_ours(learn.dl)   # or this test would prove nothing
        made.extend([learn.dls.train.new(), learn.dls.valid.new(), learn.dls.test_dl([1, 2]),
            learn.dls.test_dl([1, 2], with_labels=True), learn.dls.new_empty().train])
    def copy(learn): copies.append(pickle.loads(pickle.dumps(learn.dls.train)))
    from fastai.data.core import Datasets
    dsets = Datasets(list(range(20)), [[int_to_x], [int_to_y]], splits=[range(12), range(12, 20)])
    dls = dsets.dataloaders(bs=4, num_workers=0)
    learn = quiet(Learner(dls, Through(), loss_func=XentLossFlat(), lr=.1, path=tmp_path))
    learn.fit(1)
    plain = [set(vars(o)) for o in learn.dls]
    learn.add_cbs([XentRecorder(), At('after_batch', make), At('before_train', copy, 90)])
    learn.fit(2)
    assert len(made) == 50 and not any(map(of_ours, made))
    assert [set(vars(o)) for o in learn.dls] == plain and not any(map(of_ours, learn.dls))
    assert [len(list(o)) for o in copies] == [3, 3]    # a pickled loader still loads
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, At)])
    learn.export('x.pkl')
    assert b'fastai_xent.taps' not in zipfile.ZipFile(tmp_path / 'x.pkl').read('x/data.pkl')

def int_to_x(i): return coded(i)[0]
def int_to_y(i): return i % C

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('phase', ['train', 'valid'])
def test_no_traces_after_an_interrupted_fit(phase, workers):
    "What a KeyboardInterrupt leaves behind, the next fit clears away, and is recorded whole."
    def stop(learn): raise KeyboardInterrupt
    cb = At('after_batch', stop, 0, lambda learn: learn.iter == 1 and learn.training == (phase == 'train'))
    recorder = XentRecorder()
    learn = through_learner(TfmdDL(Coded(20, [1]), bs=4, shuffle=True, num_workers=workers), cbs=[recorder, cb])
    for k in range(3):
        with pytest.raises(KeyboardInterrupt): learn.fit(2)
    learn.remove_cb(cb)
    learn.validate(), learn.get_preds()
    with warned() as said: check_again(learn)
    assert not said
    assert not any(map(of_ours, learn.dls)) and not learn.loss_func.keep_stats

def check_again(learn):
    saw, recorder = Saw(), learn.xent_recorder
    fits = recorder.record._n_fits
    learn.add_cb(saw)
    learn.fit(2)
    learn.remove_cb(saw)
    df = recorder.record.to_df()
    assert not wrong_rows(df).any()
    df = df[df['fit'] == fits]
    for k, (split, items) in enumerate(saw.seen()):
        got = df[(df['split'] == split) & (df['epoch'] == df['epoch'].min() + k // 2)]
        np.testing.assert_array_equal(got['item'], np.sort(items))
    CHECKED['rows'] += len(df)

def test_an_interrupted_fit_of_a_passing_recorder():
    "`fit(cbs=…)` takes the recorder away again, also when interrupted; the next one is not disturbed."
    def stop(learn): raise KeyboardInterrupt
    learn = through_learner(TfmdDL(Coded(20, [1]), bs=4, shuffle=True, num_workers=0))
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[XentRecorder(), At('after_batch', stop, 0, third_batch)])
    learn.add_cb(XentRecorder())
    check_again(learn)
    assert not any(map(of_ours, learn.dls)) and not learn.loss_func.keep_stats


# -- loaders without an answer

class Stream(torch.utils.data.IterableDataset):
    n_inp = 1
    def __iter__(self): return map(coded, range(20))

class StreamOfKnownLength(Stream):
    def __len__(self): return 20

class Endless:
    n_inp = 1
    def __getitem__(self, i): return coded(i)

class OwnIter(TfmdDL):
    def __iter__(self): yield from reversed(list(super().__iter__()))
class OwnSample(TfmdDL):
    def sample(self): return iter(sorted(super().sample()))
class OwnChunks(TfmdDL):
    def chunkify(self, b): return super().chunkify(reversed(list(b)))
class OwnBatches(TfmdDL):
    def create_batches(self, samps): return super().create_batches(reversed(list(samps)))

def left_behind():
    "`show_batch(unique=True)`, interrupted, leaves a loader that gives item 0 for ever."
    dl = TfmdDL(Coded(20), bs=4, num_workers=0)
    def stop(b): raise KeyboardInterrupt
    dl.after_batch = stop
    try: dl.show_batch(unique=True)
    except KeyboardInterrupt: pass
    del dl.after_batch
    from fasttransform import Pipeline
    dl.after_batch = Pipeline()
    assert not hasattr(dl.get_idxs(), '__len__')
    return dl

NO_ANSWER = {
    'a stream': (lambda: TfmdDL(Stream(), bs=4, n=18, num_workers=0), 'stream'),
    'a stream with workers': (lambda: TfmdDL(Stream(), bs=4, n=18, num_workers=2), 'stream'),
    "torch's stream": (lambda: torch.utils.data.DataLoader(StreamOfKnownLength(), batch_size=4), 'IterableDataset'),
    'in any order': (lambda: torch_dl(batch_size=4, num_workers=1, in_order=False), 'in_order=False'),
    'own __iter__': (lambda: OwnIter(Coded(20), bs=4, shuffle=True, num_workers=0), '`__iter__`'),
    'own sample': (lambda: OwnSample(Coded(20), bs=4, shuffle=True, num_workers=0), '`sample`'),
    'own chunkify': (lambda: OwnChunks(Coded(20), bs=4, shuffle=True, num_workers=0), '`chunkify`'),
    'own create_batches': (lambda: OwnBatches(Coded(20), bs=4, shuffle=True, num_workers=0), '`create_batches`'),
    'given create_batches': (lambda: TfmdDL(Coded(20), bs=4, num_workers=0,
        create_batches=lambda samps: (coded(torch.tensor([19 - s])) for s in samps)), '`create_batches`'),
    'given sample': (lambda: TfmdDL(Coded(20), bs=4, num_workers=0, sample=lambda: iter(range(19, -1, -1))),
        '`sample`'),
    'infinite': (left_behind, 'more than'),
}

@pytest.mark.parametrize('kind', NO_ANSWER)
def test_no_answer(kind):
    "It says so; nothing is recorded; valid is; and the training is the same to the bit."
    make, word = NO_ANSWER[kind]
    def run(cbs):
        set_seed(0)
        train = make()
        learn = through_learner(train, cbs=[*cbs,
            At('after_batch', cancel_train, 0, lambda learn: learn.training and learn.iter == 8), saw := Saw()])
        learn.fit(2)
        return ended(learn), saw
    plain, saw_plain = run([])
    recorder = XentRecorder()
    with at_most(60), little_memory(), warned() as said: learn, saw = run([recorder])
    assert said and all(word in o and "'train'" in o for o in said), said
    assert recorder.record.to_df().groupby(['split', 'epoch'],
        observed=True).size().index.tolist() == [('valid', 0), ('valid', 1)]
    assert not wrong_rows(recorder.record.to_df()).any()
    for (s, a), (t, b) in zip(saw_plain.seen(), saw.seen()): assert s == t and np.array_equal(a, b)
    same_bits(plain.end, learn.end)

def cancel_train(learn):
    from fastai.callback.core import CancelTrainException
    raise CancelTrainException

def test_no_length():
    "fastai's Learner wants to know a length; a loader without is refused for itself, without asking for its order."
    for dl in (DataLoader(Endless(), bs=4), TfmdDL(Endless(), bs=4, num_workers=0), DataLoader(Stream(), bs=4)):
        with at_most(30), little_memory(), pytest.raises(NoItemIdentity, match='stream'): tap_rows(dl)
    for o in (object(), [1, 2]):
        with pytest.raises(NoItemIdentity, match='how it orders its items is not known'): tap_rows(o)

class Keyed(Coded):
    "May be asked for other things than its indices."
    def __getitem__(self, i): return super().__getitem__(int(i) % len(self))

class Order(TfmdDL):
    def get_idxs(self): return self.order

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', ['fastai', 'torch'])
@pytest.mark.parametrize('order', [[*range(19), -1], list(range(-20, 0)), [*range(19), 20],
    [*range(19), 2**32 + 19], [str(i) for i in range(20)], [i + .5 for i in range(20)]],
                         ids=['one from the end', 'all from the end', 'beyond', 'far beyond', 'keys', 'fractions'])
def test_an_order_of_something_else(order, kind, workers):
    "What is no index from 0 to n − 1 names no item: −1 is not an item of its own beside the last."
    if kind == 'torch': dl = torch.utils.data.DataLoader(Keyed(20), batch_size=4, sampler=order, num_workers=workers)
    else:
        dl = Order(Keyed(20), bs=4, num_workers=workers)
        dl.order = order
    recorder = XentRecorder()
    learn = through_learner(dl, cbs=[recorder])
    with warned() as said: learn.fit(1)
    assert len(said) == 1 and "'train'" in said[0] and 'expected indices: whole numbers from 0 to 19' in said[0], said
    assert set(recorder.record.to_df()['split']) == {'valid'}

class Tokens:
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return (torch.arange(5 + i % 3) % 7,)

def test_language_model():
    def run(cbs):
        set_seed(0)
        dls = DataLoaders(*[LMDataLoader(Tokens(n), bs=4, seq_len=5, num_workers=0, shuffle=True) for n in (40, 20)])
        learn = quiet(Learner(dls, torch.nn.Sequential(torch.nn.Embedding(7, 8), torch.nn.Linear(8, 7)),
            loss_func=XentLossFlat(), lr=.1, cbs=cbs))
        learn.fit(2)
        return ended(learn)
    recorder = XentRecorder()
    with warned() as said: learn = run([recorder])
    assert len(said) == 2 and all('LMDataLoader' in o and 'no item of the dataset' in o for o in said)
    assert not len(recorder.record.to_df())
    same_bits(run([]).end, learn.end)


# -- batches that change on their way

def drop(learn): learn.xb, learn.yb = (learn.xb[0][1:],), (learn.yb[0][1:],)
def repeat(learn): learn.xb, learn.yb = tuple(torch.cat([o, o[:1]]) for o in learn.xb), tuple(torch.cat([o,
    o[:1]]) for o in learn.yb)

@pytest.mark.parametrize('event, order', [('before_batch', 5), ('before_batch', 45)])
def test_rows_come_and_go(event, order):
    "One batch loses a row and another gains one: the count over the epoch is right, and no row is recorded."
    recorder = XentRecorder()
    learn = through_learner(TfmdDL(Coded(20), bs=4, shuffle=True, num_workers=0), cbs=[recorder])
    learn.add_cbs([At(event, drop, order, third_batch), At(event, repeat, order, first_batch)])
    with warned() as said: learn.fit(2)
    assert len(said) >= 1 and all('rows, but the loader put 4 items into it' in o for o in said), said
    assert set(recorder.record.to_df()['split']) == {'valid'}

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('where', ['list', 'batch'])
def test_a_loader_that_drops_rows(where, workers):
    tfm = dict(before_batch=[lose_last]) if where == 'list' else dict(after_batch=[lose_row])
    recorder = XentRecorder()
    learn = through_learner(TfmdDL(Coded(20), bs=4, shuffle=True, num_workers=workers, **tfm), cbs=[recorder])
    with warned() as said: learn.fit(2)
    assert said and all('3 rows, but the loader put 4 items into it' in o for o in said), said
    assert set(recorder.record.to_df()['split']) == {'valid'}

def lose_last(b): return b[:-1]
def lose_row(x): return x[1:]                         # fastai applies it to inputs and targets
def turn_round(b): return list(b)[::-1]

def test_items_that_are_batches():
    "bs=None with several rows an item."
    class Four(Coded):
        def __getitem__(self, i): return coded(torch.arange(4 * i, 4 * i + 4))
    recorder = XentRecorder()
    learn = through_learner(TfmdDL(Four(6), bs=None, num_workers=0), cbs=[recorder])
    with warned() as said: learn.fit(1)
    assert len(said) == 1 and '4 rows, but the loader put 1 items into it' in said[0]
    assert set(recorder.record.to_df()['split']) == {'valid'}

@pytest.mark.parametrize('workers', [0, 2])
def test_rows_that_change_places(workers):
    "A transform that reorders a batch leaves no trace but labels that change from epoch to epoch; these are told."
    recorder = XentRecorder()
    learn = through_learner(TfmdDL(Coded(20), bs=4, shuffle=True, num_workers=workers, before_batch=[turn_round]),
        cbs=[recorder])
    with warned() as said: learn.fit(3)
    assert said and all("have other labels than before" in o and "'train'" in o for o in said)

def test_labels_that_stay_are_not_told():
    check(weighted(N, [], bs=4, shuffle=True, num_workers=0), epochs=4)   # check() wants no warning


# -- a million rows

class Bulk(DataLoader):
    "Items are numbers until the batch is made: as fast as this loader can be."
    def create_item(self, s):
        s = s or 0
        if s in self.dataset.skip: return self.dataset[s]
        return s
    def create_batch(self, b): return coded(torch.tensor(b))
    def retain(self, res, b): return res

class BulkTorch(Coded):
    def __getitems__(self, idxs): return torch.tensor(idxs)

@pytest.mark.parametrize('drop_last', [False, True])
def test_many_rows(drop_last):
    skip = np.random.default_rng(0).choice(300_000, 20_000, replace=False).tolist()
    check(Bulk(Coded(300_000, skip), bs=1024, shuffle=True, drop_last=drop_last), epochs=1)
    CHECKED['bulk'] = True

def test_many_rows_with_workers():
    skip = np.random.default_rng(1).choice(150_000, 30_000, replace=False).tolist()
    check(Bulk(Coded(150_000, skip), bs=256, shuffle=True, drop_last=True, num_workers=2), epochs=1)

def test_many_rows_of_torch():
    dl = torch.utils.data.DataLoader(BulkTorch(2**18), batch_size=4096, shuffle=True, collate_fn=coded)
    check(dl, torch_dl(9, batch_size=4), epochs=2)

def test_many_rows_of_a_table():
    check(table(60_000, range(0, 60_000, 7), bs=2048, shuffle=True), table(7, bs=4), epochs=1)

def test_at_least_a_million():
    "None of them was on the wrong item: each of the tests above has seen to that."
    if not CHECKED['bulk']: pytest.skip("the tests above were not run")
    print(f"\n{CHECKED['rows']:,} rows checked")
    assert CHECKED['rows'] >= 1_000_000


# -- what is skipped, and what an older loader lacks

@pytest.mark.parametrize('skip', [0, 1, 2])
@pytest.mark.parametrize('n', [5, 9, 13])
def test_repeats_behind_batches_that_a_loader_skips_itself(n, skip):
    "accelerate's loader reads them and throws them away."
    for r in range(2):
        def made(skip): return DataLoaderShard(Coded(n), skip_batches=skip,
            batch_sampler=BatchSamplerShard(torch.utils.data.BatchSampler(range(n), 2, False), 2, r))
        items, padding = heard(made(0))
        later, repeats = heard(made(skip))
        np.testing.assert_array_equal(later, items[2 * skip:])
        np.testing.assert_array_equal(repeats, padding[2 * skip:])
        assert padding.any() or r == 0


def test_a_loader_without_in_order_deals_in_order(monkeypatch):
    "As fastai's did before torch had the setting."
    dl = TfmdDL(Coded(4), bs=2)
    monkeypatch.delattr(type(dl.fake_l), 'in_order')
    assert why_not(dl) == ''
