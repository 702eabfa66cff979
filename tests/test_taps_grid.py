"Every kind of loader with every way to break the link between rows and items: right, or refused. Never wrong."
import random
from functools import wraps
from types import MethodType

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.core import TfmdDL
from fastai.data.load import DataLoader
from fastai.text.data import SortedDL
from fastai.torch_core import set_seed
from helpers import Coded, coded, decoded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from fastai_xent.taps import NoItemIdentity, tap_rows

TorchDL = torch.utils.data.DataLoader
N, BS = 23, 4

class Listable(Coded):
    "May be asked for many items at once, and for things that hold an index."
    def __getitem__(self, i):
        if isinstance(i, tuple): i = i[0]
        return coded(torch.as_tensor(i)) if isinstance(i, list) else super().__getitem__(int(i) % self.n)

class Uneven:
    "Batches of one, two, three … items, drawn when it is asked for them."
    def __len__(self): return 6
    def __iter__(self):
        order = torch.randperm(N).tolist()
        return iter([[order.pop() for _ in range(k + 1)] for k in range(6)])

# -- kinds of loader; each makes one of the class that it is given, if it is given one

FASTAI = dict(
    base=lambda cls=DataLoader, **kw: cls(Listable(N, kw.pop('skip', ())), bs=BS, **kw), tfmd=lambda cls=TfmdDL,
        **kw: cls(Listable(N, kw.pop('skip', ())), bs=BS, **kw),
    weighted=lambda cls=WeightedDL, **kw: cls(Listable(N, kw.pop('skip', ())), bs=BS, wgts=np.arange(N) + 1., **kw),
        partial=lambda cls=PartialDL, **kw: cls(Listable(N, kw.pop('skip', ())), bs=BS, partial_n=17, **kw),
    sorted=lambda cls=SortedDL, **kw: cls(Listable(N, kw.pop('skip', ())), bs=BS,
        res=[i * 7 % 11 for i in range(N)], **kw))
BASES = dict(base=DataLoader, tfmd=TfmdDL, weighted=WeightedDL, partial=PartialDL, sorted=SortedDL)

SAMPLERS = dict(
    plain=lambda: dict(batch_size=BS), shuffle=lambda: dict(batch_size=BS, shuffle=True),
        drop=lambda: dict(batch_size=BS, shuffle=True, drop_last=True),
        generator=lambda: dict(batch_size=BS, shuffle=True, generator=torch.Generator().manual_seed(3)),
    weighted=lambda: dict(batch_size=BS, sampler=WeightedRandomSampler(np.arange(N) + 1., 19)),
        subset=lambda: dict(batch_size=BS, sampler=SubsetRandomSampler([3, 8, 1, 20, 7, 9, 11])),
        repeats=lambda: dict(batch_size=BS, sampler=RandomSampler(range(N), replacement=True, num_samples=31)),
    listed=lambda: dict(batch_size=BS, sampler=[5, 3, 3, 8, 1]), uneven=lambda: dict(batch_sampler=Uneven()),
        batches=lambda: dict(batch_sampler=[[0, 3], (4,), np.array([1, 2]), torch.tensor([5, 9]), range(3)]),
    once=lambda: dict(batch_size=BS, sampler=(i for i in (4, 2, 9, 1, 0, 3))),
        nested=lambda: dict(batch_size=None, sampler=BatchSampler(RandomSampler(range(N)), BS, False)),
        nested_twice=lambda: dict(batch_sampler=BatchSampler(SubsetRandomSampler(range(3, 18)), 3, True)),
    distributed=lambda: dict(batch_size=BS, sampler=DistributedSampler(range(N), 3, 1, shuffle=True)),
        shard=lambda: dict(batch_sampler=BatchSamplerShard(BatchSampler(SequentialSampler(range(N)), 2, False), 3, 2)))

# -- what breaks the link

def backwards(batches): return reversed(list(batches))
def every_other(batches): return list(batches)[::2]
def twice(batches): return [b for b in batches for _ in range(2)]
def merged(batches):
    batches = list(batches)
    return [tuple(torch.cat(o) for o in zip(*batches[i:i + 2])) for i in range(0, len(batches), 2)]
def ahead(batches):
    batches = list(batches)
    return batches[1:] + batches[:1]
REORDERS = [backwards, every_other, twice, merged, ahead]

def with_iter(cls, how, name=None):
    "A loader whose own `__iter__` does something with the batches."
    class Own(cls):
        def __iter__(self): return iter(how(super().__iter__()))
    if name: Own.__iter__ = wraps(cls.__iter__)(Own.__iter__)
    return Own

class Odd:
    "A sampler of things that are no plain indices."
    def __init__(self, what): self.what = what
    def __len__(self): return 8
    def __iter__(self): return (self.what(i) for i in range(8))
ODD = [lambda i: (i, 224), lambda i: str(i), lambda i: float(i), lambda i: i > 3, lambda i: i - 4,
    lambda i: np.float32(i), lambda i: torch.tensor(i > 3), lambda i: [i], lambda i: i + N, lambda i: np.int16(i),
    lambda i: torch.tensor(i), lambda i: np.array(i), lambda i: None]

def short(b): return b[:-1] if len(b) > 1 else b
def collate_less(b): return torch.utils.data.default_collate(short(b))
def collate_list(b): return b

class Walk:
    "What a training would see: batches, and somebody who meddles at one of them."
    def __init__(self, dl, meddle=None, at=2,
        before=None): self.dl, self.meddle, self.at, self.before = dl, meddle, at, before
    def __call__(self, tap=None):
        if self.before: self.before(self.dl)
        seen = []
        for i, (x, y) in enumerate(self.dl):
            if tap is not None:
                tap.freeze()
                tap.check()
            seen.append(decoded(x, y))
            if self.meddle and i == self.at: self.meddle(self.dl)
            if i > 60: break
        return seen

def right_or_refused(make, meddle=None, at=2, before=None, seed=0):
    "The rows that a tap names are those that came; or it says why it cannot. The batches are those that come without a tap."
    def seeded():
        set_seed(seed)
        return make()
    try: plain = Walk(seeded(), meddle, at, before)()
    except Exception: return None     # what was done to it has broken the loader itself
    dl = seeded()
    try:
        tap = tap_rows(dl).install()
        try:
            seen = Walk(dl, meddle, at, before)()       # all of it, whatever is known by then
            for a, b in zip(plain, seen, strict=True): np.testing.assert_array_equal(a, b,
                'the tap has changed the batches')
        finally: tap.remove()
        dl = seeded()
        tap = tap_rows(dl).install()
        try: seen = Walk(dl, meddle, at, before)(tap)
        finally: tap.remove()
        named = tap.rows([*range(len(seen))], [len(o) for o in seen])
    except NoItemIdentity as e:
        assert str(e)
        return False
    np.testing.assert_array_equal(named, np.concatenate(seen) if seen else [])
    return True

# what somebody may do with a loader in the middle of a pass
def one_more(dl): next(iter(dl), None)
def all_more(dl): list(dl)
def begins(dl): iter(dl)
def one_batch(dl): dl.one_batch() if hasattr(dl, 'one_batch') else next(iter(dl), None)
def epoch(dl):
    for o in (dl, getattr(dl, 'sampler', None), getattr(dl, 'batch_sampler', None)):
        if hasattr(o, 'set_epoch'): o.set_epoch(7)
def other_sampler(dl):
    if isinstance(dl, TorchDL): object.__setattr__(dl, 'batch_sampler', BatchSampler(range(N), 2, False))
def other_bs(dl): dl.bs = 2 if hasattr(dl, 'bs') else None
def other_size(dl):
    if isinstance(getattr(dl, 'batch_sampler', None), BatchSampler): dl.batch_sampler.batch_size = 3
def swap(dl):
    if type(dl) is not DataLoaderShard: dl.__class__ = with_iter(type(dl), backwards)
def patch(dl): dl._get_iterator = MethodType(lambda self: iter(list(type(self)._get_iterator(self))[::-1]), dl)
def patch_batches(dl):
    if not isinstance(dl, TorchDL): dl.create_batches = lambda samps: (coded(torch.tensor([N - 1 - s])) for s in samps)
def patch_chunks(dl):
    if not isinstance(dl, TorchDL): dl.chunkify = lambda b: [[o] for o in b]
def patch_sample(dl):
    if not isinstance(dl, TorchDL): dl.sample = lambda: iter(range(N - 1, -1, -1))
def shuffle_left(dl):
    if not isinstance(dl, TorchDL): dl.fake_l.in_order = False
MEDDLES = [None, one_more, all_more, begins, one_batch, epoch, other_sampler, other_bs, other_size, swap, patch,
    patch_batches, patch_chunks, patch_sample, shuffle_left]

meddling = st.tuples(st.sampled_from(MEDDLES), st.integers(0, 5), st.sampled_from(MEDDLES[:1] * 6 + MEDDLES))
workers_of = st.sampled_from([0] * 14 + [2])

@settings(max_examples=150)
@given(st.sampled_from(sorted(FASTAI)), st.booleans(), st.booleans(),
    st.sampled_from([(), (1,), (0, 3, 4, 5, 6, 7, 12)]), workers_of, st.sampled_from([None, *REORDERS]),
    st.booleans(), st.sampled_from([None, short, collate_list]), meddling)
def test_fastai(kind, shuffle, drop_last, skip, workers, how, hidden, before_batch, meddle):
    cls = BASES[kind] if how is None else with_iter(BASES[kind], how, hidden)
    kw = dict(shuffle=shuffle, drop_last=drop_last, skip=skip, num_workers=workers)
    if before_batch and kind != 'base': kw['before_batch'] = [before_batch]
    ok = right_or_refused(lambda: FASTAI[kind](cls, **kw), *meddle)
    if how is None and meddle[0] is meddle[2] is None and kw.get('before_batch') != [short]: assert ok
    if how is not None: assert not ok

class Order(TfmdDL):
    def get_idxs(self): return self.order(super().get_idxs())

ORDERS = dict(
    list=lambda o: o, tuple=tuple, array=np.array, tensor=torch.tensor, iterator=iter,
        array_iterator=lambda o: iter(np.array(o)), range=lambda o: range(5, 20), reversed=lambda o: o[::-1],
        twice=lambda o: o * 2, few=lambda o: o[:7], none=lambda o: [],
    generator=lambda o: (i for i in o), map=lambda o: map(int, o), sampler=lambda o: RandomSampler(o),
        weighted=lambda o: WeightedRandomSampler(np.arange(N) + 1., N), backwards=reversed,
        odd=lambda o: [(i, 1) for i in o], text=lambda o: map(str, o), negative=lambda o: [-1, *o[1:]],
    drawn=lambda o: (random.randrange(N) for _ in o),
        drawn_by_torch=lambda o: (int(torch.randint(N, ())) for _ in o),
        too_many=lambda o: (i % N for i in range(3 * N)))

@settings(max_examples=120)
@given(st.sampled_from(sorted(ORDERS)), st.booleans(), st.booleans(), st.sampled_from([(), (1,), (0, 3, 4, 5)]),
    workers_of, meddling)
def test_orders(order, shuffle, drop_last, skip, workers, meddle):
    def make():
        dl = Order(Listable(N, skip), bs=BS, shuffle=shuffle, drop_last=drop_last, num_workers=workers)
        dl.order = ORDERS[order]
        return dl
    lazy = order in ('generator', 'map', 'sampler', 'weighted', 'backwards', 'text', 'drawn', 'drawn_by_torch',
        'too_many')
    if lazy and workers: return                           # a generator cannot go to a worker that is spawned; each forked one has its own
    ok = right_or_refused(make, *meddle)
    if meddle[0] is meddle[2] is None: assert ok == (order not in ('odd', 'text', 'negative', 'too_many'))

@settings(max_examples=150)
@given(st.sampled_from(sorted(SAMPLERS)), workers_of, st.booleans(), st.sampled_from([None] * 5 + REORDERS),
    st.booleans(), st.sampled_from([None, collate_less]), meddling)
def test_torch(kind, workers, persistent, how, hidden, collate, meddle):
    if kind == 'once' and workers: workers = 0            # a generator gives its items once
    if kind == 'nested' and collate: collate = None
    cls = TorchDL if how is None else with_iter(TorchDL, how, hidden)
    ok = right_or_refused(lambda: cls(Listable(N), num_workers=workers,
        persistent_workers=persistent and workers > 0, collate_fn=collate, **SAMPLERS[kind]()), *meddle)
    if how is None and collate is None and meddle[0] is meddle[2] is None: assert ok
    if how is not None: assert not ok

@settings(max_examples=60)
@given(st.sampled_from(ODD), st.booleans(), workers_of, st.booleans())
def test_odd_samplers(what, batched, workers, shard):
    class Any(Coded):
        def __getitem__(self, o):
            while isinstance(o, (tuple, list)): o = o[0]
            return coded(torch.tensor(int(o or 0) % N))
    def make():
        if batched: dl = TorchDL(Any(N), batch_sampler=[[what(i), what(i + 1)] for i in range(0, 8, 2)],
            num_workers=workers)
        else: dl = TorchDL(Any(N), batch_size=BS, sampler=Odd(what), num_workers=workers)
        return DataLoaderShard(dl.dataset, batch_sampler=dl.batch_sampler, num_workers=workers) if shard else dl
    assert right_or_refused(make) == (what in ODD[9:12])

@settings(max_examples=80)
@given(st.sampled_from(sorted(SAMPLERS)), workers_of, st.integers(0, 3), meddling)
def test_accelerate(kind, workers, skip, meddle):
    kw = SAMPLERS[kind]
    if kind in ('nested', 'once'): return
    def make(): return DataLoaderShard(Listable(N), batch_sampler=TorchDL(Listable(N), **kw()).batch_sampler,
        num_workers=workers, skip_batches=skip)
    ok = right_or_refused(make, *meddle)
    if meddle[0] is meddle[2] is None: assert ok
