"Views of datasets: fewer items or other labels, of the kind that was there, and the dataset as it was."
import copy
import pickle
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import Datasets
from fastai.data.load import SkipItemException
from fastai.data.transforms import Categorize, Category
from fastai.tabular.core import TabularPandas
from fastai.data.block import CategoryBlock
from fastai.torch_core import TensorCategory
from fastcore.foundation import L
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset

from fastai_xent.datasets import Kept, Relabelled, class_of, fewer_items, label_field, label_kind, label_like, label_of, other_labels, part, places, with_part

NAMES, N = ['cat', 'dog', 'fox'], 12
Named = namedtuple('Named', 'x y')
class Animal(IntEnum): CAT, DOG, FOX = 0, 1, 2
class Pair(tuple): pass
class Listed(list): pass

@dataclass
class Plain:
    x: object
    y: object
@dataclass(frozen=True, slots=True)
class Frozen:
    x: object
    y: object

CONTAINERS = {
    'tuple': lambda x, y: (x, y), 'list': lambda x, y: [x, y], 'namedtuple': Named,
    'subclass of tuple': lambda x, y: Pair((x, y)), 'subclass of list': lambda x, y: Listed((x, y)),
    'three parts': lambda x, y: (x, x + 1, y), 'label before weight': lambda x, y: (x, y, 'weight'),
    'dict': lambda x, y: dict(x=x, y=y), 'OrderedDict': lambda x, y: OrderedDict(x=x, y=y),
    'UserDict': lambda x, y: UserDict(x=x, y=y), 'dataclass': Plain, 'frozen dataclass': Frozen}
LABELS = {
    'int': int, 'bool': lambda c: c > 0, 'float': float, 'text': lambda c: NAMES[c],
    'Category': lambda c: Category(NAMES[c]), 'np.str_': lambda c: np.str_(NAMES[c]), 'IntEnum': Animal,
    **{f'np.{o}': (lambda o: lambda c: np.dtype(o).type(c))(o) for o in ('int64', 'int8', 'uint8', 'float32')},
    **{f'array {o} {s}': (lambda o, s: lambda c: np.full(s, c, dtype=o))(o, s) for o in ('int64', 'uint8', 'bool')
       for s in ((), (1,), (1, 1)) if o != 'bool' or not s},
    **{f'tensor {o} {s}': (lambda o, s: lambda c: torch.full(s, c, dtype=getattr(torch, o)))(o, s)
       for o in ('int64', 'int8', 'bfloat16') for s in ((), (1,), (1, 1))},
    'TensorCategory': TensorCategory}

class Items:
    "Items that are kept, so that a change in place would be seen."
    def __init__(self, container, label, n=N): self.kept = [CONTAINERS[container](i, LABELS[label](i % 3 if 'bool' not in label else i % 2)) for i in range(n)]
    def __len__(self): return len(self.kept)
    def __getitem__(self, i): return self.kept[i]

def field_of(item, container): return label_field(item, 'y' if 'dict' in container.lower() or 'dataclass' in container else None, 1 if container == 'label before weight' else None)

@pytest.mark.parametrize('container', CONTAINERS)
@pytest.mark.parametrize('label', LABELS)
def test_kind_is_kept(container, label):
    ds = Items(container, label)
    field, before = field_of(ds[0], container), copy.deepcopy(ds.kept)
    new = {0: 1, 3: 1, 7: 0} if 'bool' in label else {0: 2, 3: 1, 7: 0, 11: 1}
    view = other_labels(ds, new, field, NAMES)
    for i in range(N):
        item, was = view[i], before[i]
        y, old = part(item, field), part(was, field)
        assert type(item) is type(was) and label_kind(y) == label_kind(old)
        assert class_of(y, NAMES) == new.get(i, class_of(old, NAMES)) == class_of(label_of(view, i, field), NAMES)
        assert (list(item) == list(was) if isinstance(was, dict) else True) and part(item, 0 if isinstance(was, (tuple, list)) else 'x') == i
        assert str(ds[i]) == str(was)                 # as before
    assert str(view[-1]) == str(view[N - 1]) and str(view[torch.tensor(3)]) == str(view[3])
    assert [str(o) for o in view.__getitems__([0, 3, 5])] == [str(view[i]) for i in (0, 3, 5)]
    assert str(list(pickle.loads(pickle.dumps(view)))) == str(list(view))
    with pytest.raises(IndexError): view[N]

@given(label=st.sampled_from(sorted(LABELS)), c=st.integers(0, 400), old=st.integers(0, 1))
def test_a_label_holds_its_class_or_is_refused(label, c, old):
    names, y = [*NAMES, *map(str, range(3, 401))], LABELS[label](old)
    try: new = label_like(y, c, names)
    except TypeError as e:
        assert 'cannot hold class' in str(e)
        return
    assert class_of(new, names) == c and label_kind(new) == label_kind(y) and class_of(y, names) == old

@pytest.mark.parametrize('label', [None, [1], (1,), {}, 1.5, np.nan, np.inf, -1, 3, '1', 'cow', 1j, b'cat',
                                   np.array('cat'), np.array([1, 2]), np.array([]), torch.tensor([0, 1]),
                                   torch.zeros(0), torch.tensor(-100),
                                   torch.tensor(1.5), np.array([None])], ids=repr)
def test_no_single_class(label): assert class_of(label, NAMES) is None

def test_two_classes_of_one_name(): assert class_of('a', ['a', 'b', 'a']) is None and class_of('b', ['a', 'b', 'a']) == 1

@pytest.mark.parametrize('item, kw, error, words', [
    (dict(x=1, labels=2), {}, TypeError,
     r"of type dict and have x, labels; say which is the label, such as `key='labels'`"),
     (Plain(1, 2), {}, TypeError, 'of type Plain and have x, y'),
    (dict(x=1), dict(key='y'), KeyError, "no 'y'; they have x"),
    (Plain(1, 2), dict(key='z'), KeyError, "no 'z'; they have x, y"),
    ((1,), {}, TypeError, '1 long, expected an input and a label'),
    ((), {}, TypeError, '0 long'), ((1, 2), dict(key=5), KeyError, 'no part 5; they have 0, 1'),
    (Named(1, 2), dict(key='z'), KeyError, "no part 'z'; they have x, y"),
    (torch.zeros(3), {}, TypeError, 'of type Tensor, expected tuples'), (5, {}, TypeError, 'of type int'),
    (None, {}, TypeError, 'of type NoneType')])
def test_where_is_the_label(item, kw, error, words):
    with pytest.raises(error, match=words): label_field(item, **kw)

@pytest.mark.parametrize('item, kw, want', [((1, 2), {}, 1), ([1, 2, 3], {}, 2), ((1, 2, 3), dict(n_inp=1), 1),
                                            ((1, 2), dict(n_inp=2), 1), (Named(1, 2), {}, 1),
                                            (Named(1, 2), dict(key='x'), 0), ((1, 2), dict(key=0), 0),
                                            (dict(a=1, b=2), dict(key='a'), 'a'),
                                            (Frozen(1, 2), dict(key='y'), 'y'), ({5: 1}, dict(key=5), 5)])
def test_the_place_of_the_label(item, kw, want): assert label_field(item, **kw) == want

def test_a_mapping_that_cannot_be_copied_is_refused():
    from types import MappingProxyType
    with pytest.raises(TypeError, match='of which no copy|cannot pickle'): with_part(MappingProxyType(dict(y=1)), 'y', 2)


# -- datasets over datasets

class Letters:
    "Items of letters, each with its number."
    def __init__(self, n=N, skip=(), at_once=False):
        self.n, self.skip, self.vocab = n, skip, NAMES
        if at_once: self.__getitems__ = lambda at: [self[i] for i in at]
    def __len__(self): return self.n
    def __getitem__(self, i):
        if i in self.skip: raise SkipItemException
        if not 0 <= i < self.n: raise IndexError(i)
        return torch.tensor(i), torch.tensor(i % 3)

class Arrays(Letters):
    "Gives several items as one batch, as datasets of time series do."
    def __init__(self, n=N, shape=(), kind='tensor'):
        super().__init__(n)
        self.x, self.y = torch.arange(n), (torch.arange(n) % 3).reshape(n, *shape)
        if kind == 'array': self.x, self.y = self.x.numpy(), self.y.numpy()
    def __getitem__(self, i): return self.x[i], self.y[i]

OVER = {
    'plain': Letters, 'read at once': lambda: Letters(at_once=True),
    'Subset': lambda: Subset(Letters(2 * N), range(N)),
    'Subset of Subset': lambda: Subset(Subset(Letters(30), range(20)), range(N)),
    'ConcatDataset': lambda: ConcatDataset([Letters(5), Shifted(5, 7)]),
    'Kept': lambda: Kept(Letters(20), range(N)), 'Kept of Subset': lambda: Kept(Subset(Letters(30), range(20)),
            range(N)),
    'Relabelled': lambda: Relabelled(Letters(), {}, 1, NAMES), 'tensors': Arrays,
    'arrays': lambda: Arrays(kind='array'), 'columns': lambda: Arrays(shape=(1,)),
    'Datasets': lambda: Datasets(list(range(N)), [[Number()], [Third(), Categorize()]]),
    'Datasets, split': lambda: Datasets(list(range(N + 3)), [[Number()], [Third(), Categorize()]],
                                        splits=[list(range(N)), list(range(N, N + 3))]).train}
class Number:
    def __call__(self, i): return torch.tensor(int(i))
class Third:
    def __call__(self, i): return NAMES[int(i) % 3]
class Shifted(Letters):
    "Goes on where another ends."
    def __init__(self, start, n): self.start = start; super().__init__(n)
    def __getitem__(self, i):
        if not 0 <= i < self.n: raise IndexError(i)
        return torch.tensor(self.start + i), torch.tensor((self.start + i) % 3)

def read(ds, n): return [(int(x), int(y)) for x, y in (ds[i] for i in range(n))]

@pytest.mark.parametrize('kind', OVER)
def test_views_of_every_dataset(kind):
    ds, new = OVER[kind](), {0: 2, 4: 0, 11: 1}
    plain = [(i, i % 3) for i in range(N)]
    want = [(i, new.get(i, y)) for i, y in plain]
    view = other_labels(ds, new, 1, NAMES)
    assert read(ds, N) == plain and read(view, N) == want
    assert [int(label_of(view, i, 1)) for i in range(N)] == [y for _, y in want]
    keep = np.array([0, 3, 4, 11])
    for short, own in ((fewer_items(ds, keep), plain), (fewer_items(view, keep), want)):
        assert len(short) == 4 and read(short, 4) == [own[i] for i in keep] and [int(label_of(short, i, 1)) for i in range(4)] == [own[i][1] for i in keep]
        again = other_labels(short, {1: 2}, 1, NAMES)
        assert read(again, 4) == [(own[i][0], 2 if i == 3 else own[i][1]) for i in keep]
    both = other_labels(view, {0: 1}, 1, NAMES)       # the later one counts
    assert read(both, N)[0] == (0, 1) and read(both, N)[1:] == want[1:]
    x, y = next(iter(torch.utils.data.DataLoader(view, batch_size=N)))
    assert y.flatten().tolist() == [y for _, y in want]
    assert read(ds, N) == plain

@pytest.mark.parametrize('kind', ['tensors', 'arrays', 'columns', 'Datasets', 'Datasets, split'])
@pytest.mark.parametrize('index', [slice(2, 9), slice(None), [0, 4, 7], [-1, 0], np.array([11, 4]),
                                   torch.tensor([4]), L(0, 11), np.arange(N) % 4 == 0, []], ids=repr)
def test_several_items_at_once(kind, index):
    "In the form in which the dataset gives them."
    ds, new = OVER[kind](), {0: 2, 4: 0, 11: 1}
    if isinstance(ds, Datasets) and not isinstance(index, (list, L, slice)): pytest.skip('fastai takes a tensor or an array for something else')
    if kind == 'arrays' and isinstance(index, torch.Tensor): pytest.skip('NumPy takes a tensor of one number for the number')
    if isinstance(index, L): index = index if isinstance(ds, Datasets) else list(index)
    at = places(index, N)
    for view, own in ((other_labels(ds, new, 1, NAMES), at), (Kept(other_labels(Kept(ds, range(N)), new, 1, NAMES), range(N)), at)):
        got, was = view[index], ds[index]
        assert type(got) is type(was)
        if isinstance(got, list): got = [torch.stack([o[k] for o in got]) for k in (0, 1)] if got else [torch.zeros(0)] * 2
        else: assert got[1].dtype == was[1].dtype and got[1].shape == was[1].shape
        assert got[0].tolist() == own and got[1].reshape(-1).tolist() == [new.get(i, i % 3) for i in own]
    assert read(ds, N) == [(i, i % 3) for i in range(N)]

def test_a_batch_of_text_is_refused():
    class Texts(Arrays):
        def __getitem__(self, i): return self.x[i], np.array(NAMES)[self.y[i].numpy()]
    view = other_labels(Texts(), {0: 1}, 1, [*NAMES[:2], 'a much longer name'])
    assert view[0][1] == 'dog'
    view.new[0] = 2
    with pytest.raises(TypeError, match='cannot hold class 2'): view[[0, 1]]
    class Lists(Arrays):
        def __getitem__(self, i): return (self.x[i], self.y[i].tolist()) if not isinstance(i, int) else super().__getitem__(i)
    with pytest.raises(TypeError, match='several items at once have the labels list, expected a tensor or an array of 2'): other_labels(Lists(), {0: 1}, 1, NAMES)[[0, 1]]

def test_items_that_cannot_be_read():
    view = other_labels(Letters(skip=[3]), {3: 0, 4: 0}, 1, NAMES)
    with pytest.raises(SkipItemException): view[3]
    assert int(view[4][1]) == 0

def test_lists_of_a_view_are_not_those_below():
    ds = OVER['Datasets, split']()
    for view in (Kept(ds, [3, 1]), other_labels(ds, {0: 2}, 1, NAMES)):
        assert view.vocab == ds.vocab and view.n_inp == 1 and not hasattr(view, 'tls')

def test_items_of_a_view():
    class Own(Letters): items = [f'{i}.png' for i in range(N)]
    class Frame(Letters): items = pd.DataFrame({'a': range(N)}, index=[f'row {i}' for i in range(N)])
    class Mapped(Letters): items = {'a': 1}
    class Method(Letters):
        def items(self): return 'mine'
    assert Kept(Own(), [3, 1]).items == ['3.png', '1.png'] and Kept(Frame(), [3, 1]).items.index.tolist() == ['row 3', 'row 1']
    assert Kept(Mapped(), [3, 1]).items == {'a': 1} and Kept(Method(), [3, 1]).items() == 'mine'
    with pytest.raises(AttributeError): Kept(Letters(), [0]).items

def test_a_dataset_of_ones_own_keeps_what_it_needs():
    "A subclass of `Datasets` with a constructor of its own is wrapped, and not rebuilt without its settings."
    class Scaled(Datasets):
        def __init__(self, items=None, tfms=None, tls=None, n_inp=None, scale=1, **kw):
            super().__init__(items, tfms, tls, n_inp, **kw)
            self.scale = scale
        def __getitem__(self, i): return super().__getitem__(i)[0] * self.scale, super().__getitem__(i)[1]
    ds = Scaled(list(range(N)), [[Number()], [Third(), Categorize()]], splits=[list(range(9)), [9, 10, 11]], scale=10)
    assert [int(x) for x, _ in fewer_items(ds, np.array([2, 5]))] == [20, 50]
    view = other_labels(ds, {2: 0}, 1, NAMES)
    assert (int(view[2][0]), int(view[2][1]), int(label_of(view, 2, 1))) == (20, 0, 0)


# -- tables

@pytest.mark.parametrize('labels, kw', [([0, 1, 2] * 4, dict(y_block=CategoryBlock())), (['a', 'b', 'c'] * 4, {}),
                                        ([10, 20, 700] * 4, dict(y_block=CategoryBlock())), ([True, False] * 6, {})])
def test_tables(labels, kw):
    table = TabularPandas(pd.DataFrame({'x': np.arange(12.), 'label': labels}), cont_names=['x'], y_names='label', **kw)
    y, names = table.items['label'].copy(), list(table.procs.vocab)
    new = {0: 1, 5: 0, 11: 0}
    res = other_labels(table, new, 'label', names)
    assert res.items['label'].dtype == y.dtype and table.items['label'].equals(y) and type(res) is type(table)
    assert res.items['label'].tolist() == [new.get(i, o) for i, o in enumerate(y)] and res.items['x'].equals(table.items['x'])
    assert label_of(res, 5, 'label') == 0

@pytest.mark.parametrize('dtype, c', [('int8', 200), ('uint8', 300), ('bool', 2), ('category', 2)])
def test_columns_that_cannot_hold_a_class(dtype, c):
    table = TabularPandas(pd.DataFrame({'x': np.arange(4.), 'label': [0, 1, 0, 1]}), cont_names=['x'], y_names='label')
    table.items['label'] = pd.Series([0, 1, 0, 1], index=table.items.index).astype(dtype)
    with pytest.raises(TypeError): other_labels(table, {0: c}, 'label', range(1000))
    assert table.items['label'].tolist() == [0, 1, 0, 1]


@given(n=st.integers(1, 9), data=st.data())
def test_places(n, data):
    i = data.draw(st.integers(-n, n - 1) | st.slices(n) | st.lists(st.integers(-n, n - 1), max_size=5) | st.lists(st.booleans(), min_size=n, max_size=n))
    want = np.arange(n)[i].tolist() if not isinstance(i, list) or i else []
    for kind in ([lambda o: o] if isinstance(i, (int, slice)) else [list, L, np.array if i else list, torch.tensor if i else list]): assert places(kind(i), n) == want
    for out in (n, -n - 1, [n]):
        with pytest.raises(IndexError): places(out, n)
