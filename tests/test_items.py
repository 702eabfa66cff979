"What the items of a dataset are called, where they stood, and whether they are still the same."
import hashlib
import os
import random
import warnings
from collections import UserList, deque
from operator import attrgetter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import CategoryBlock
from fastai.data.core import Datasets, TfmdLists
from fastai.data.transforms import Categorize, RandomSplitter, RegexLabeller, Transform, parent_label
from fastai.tabular.core import TabularPandas
from fastai.tabular.data import TabularDataLoaders
from fastai.torch_core import no_random
from fastcore.foundation import L
from helpers import rng_state, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset

from fastai_xent.items import (KnownItems, NoItemIdentity, difference, fingerprint, item_names, item_numbers, item_source,
                               items_frame, labels_of)


class Listed:
    "A dataset that keeps its items, if it has any."
    def __init__(self, items=None, n=None):
        self.n = len(items) if n is None else n
        if items is not None: self.items = items
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.tensor(i), torch.tensor(i % 3)

def why(ds, key_fn=None): return items_frame(ds, key_fn).attrs['why']
def frame_of(names): return items_frame(Listed(list(names)))


# -- an index that means an item

def test_whole_numbers_of_any_kind_are_indices():
    order = [torch.tensor(2), np.array(1), np.int64(0), 4]
    np.testing.assert_array_equal(item_numbers(order, 5), [2, 1, 0, 4])

@pytest.mark.parametrize('o', [torch.tensor([1]), np.array([1]), torch.tensor(1.), np.array(1.), np.float32(1), True, torch.tensor(True)], ids=repr)
def test_what_is_no_single_whole_number_is_no_index(o):
    with pytest.raises(NoItemIdentity, match='expected indices'): item_numbers([o, 2], 5)


# -- a name that can be kept

def test_names_are_objects_whatever_letters_they_have():
    for names in (['a', 'b'], ['é', 'b']): assert frame_of(names)['name'].dtype == object

@pytest.mark.parametrize('old, new', [([0, 1, 2], [1, 1, 2]), ([1, 1, 2], [0, 1, 2])])
def test_class_0_is_a_label_like_others(old, new):
    "Items without names are told apart by it, too."
    frames = [items_frame(Listed(n=3)) for _ in range(2)]
    assert f'the first is item 0: label {old[0]} then and {new[0]} now' in difference(*frames, labels=(old, new))
    assert not difference(*frames, labels=(old, [-1, *old[1:]]))

NOT_UTF8 = os.fsdecode(b'caf\xe9.png')

def test_names_that_share_their_beginning():
    "The whole name counts, whatever its length."
    for n in (0, 199, 459, 460, 461, 499, 500, 501, 5000, 100_000):
        names = item_names(Listed(['a' * n + end for end in ('x', 'y', 'xx', '')]))
        assert len(set(names)) == 4 and max(map(len, names)) <= 500
    assert item_names(Listed(['a' * 500])) == ['a' * 500]

@pytest.mark.parametrize('name', [NOT_UTF8, '\ud83d', 'a\udce9' * 300, Path(NOT_UTF8)],
    ids=['file', 'half an emoji', 'long', 'path'])
def test_names_that_are_no_text(name):
    "They can be stored, stay readable, and are told from the text that looks like them."
    got, = item_names(Listed([name]))
    got.encode()
    assert got.startswith(str(name)[:1].encode(errors='backslashreplace').decode()) and len(got) <= 500
    assert item_names(Listed([got, name, str(name).replace('\udce9', '\\udce9')])) [1] == got
    assert len(set(item_names(Listed([NOT_UTF8, os.fsdecode(b'caf\xe8.png'), 'caf\\udce9.png'])))) == 3

@settings(max_examples=300)
@given(st.lists(st.text(alphabet=st.characters(codec=None, exclude_categories=()),
    max_size=8).map(lambda s: s + 'é' * 250) | st.text(max_size=9), unique=True))
def test_different_texts_have_different_names(texts):
    names = item_names(Listed(texts)) if texts else []
    for o in names or []: o.encode()
    assert names is None or len(set(names)) == len(texts)

@pytest.mark.parametrize('index, want', {
    'default': (None, [0, 1, 2]), 'whole': ([30, 10, 20], [30, 10, 20]), 'negative': ([-1, 0, 1], [-1, 0, 1]),
        'small': (np.array([3, 1, 2], np.int8), [3, 1, 2]), 'unsigned': (np.array([3, 1, 2], np.uint64), [3, 1, 2]),
    'too large': (np.array([2**63, 1, 2], np.uint64), [str(2**63), '1', '2']),
        'huge': ([2**80, 1, 2], [str(2**80), '1', '2']),
        'nullable': (pd.array([3, None, 1], 'Int64'), [3, None, 1]), 'repeated': ([1, 1, 2], [1, 1, 2]),
    'text': (['a', 'b', 'c'], ['a', 'b', 'c']), 'fractions': ([.5, 1., 2.], ['0.5', '1.0', '2.0']),
        'booleans': ([True, False, True], ['True', 'False', 'True']), 'mixed': ([1, 'b', 2.], ['1', 'b', '2.0']),
    'dates': (pd.date_range('2024-01-01', periods=3),
        ['2024-01-01 00:00:00', '2024-01-02 00:00:00', '2024-01-03 00:00:00']),
        'missing': (['a', None, np.nan], ['a', None, None]),
    'levels': (pd.MultiIndex.from_tuples([('a', 1), ('a', 2), ('b', 1)]), ["('a', 1)", "('a', 2)", "('b', 1)"]),
        'categories': (pd.CategoricalIndex(['a', 'b', 'a']), ['a', 'b', 'a']),
        'range': (pd.RangeIndex(5, 11, 2), [5, 7, 9])}.values())
def test_labels_of_a_frame(index, want):
    for items in (pd.DataFrame({'x': [1, 2, 3]}, index=index), pd.Series([1, 2, 3], index=index)):
        got = item_names(Listed(items))
        assert got == want and [type(o) for o in got] == [type(o) for o in want] and not why(Listed(items))

@pytest.mark.parametrize('index', [[30, 10, 20], ['a', 'b', 'c'], None])
def test_names_find_the_rows_of_their_frame(index):
    df = pd.DataFrame({'x': [1, 2, 3]}, index=index)
    names = items_frame(Listed(df)).iloc[[2, 0]]['name']
    assert df.loc[names]['x'].tolist() == [3, 1]
    assert df.index.get_indexer(names).tolist() == [2, 0]


# -- what an item is called

@pytest.mark.parametrize('items', [['a', 'b'], ('a', 'b'), L('a', 'b'), np.array(['a', 'b']),
    np.array(['a', 'b'], dtype=object), pd.Index(['a', 'b']), deque('ab'), UserList('ab'), [Path('a'), 'b'],
    [Path('a'), Path('b')]], ids=lambda o: type(o).__name__)
def test_items_that_name_themselves(items):
    ds = Listed(items)
    assert item_names(ds) == ['a', 'b'] and all(type(o) is str for o in item_names(ds)) and not why(ds)
    assert item_names(ds, lambda o: f'{o}!') == ['a!', 'b!']
    assert KnownItems(ds).still(ds)

@pytest.mark.parametrize('items', [None, [1, 2], [{'a': 1}] * 2, [('a', 1)] * 2, [b'a', b'b'], np.zeros((2, 3)),
    torch.zeros(2, 3), torch.zeros(2), (o for o in 'ab'), [np.zeros(2)] * 2, [None] * 2, range(2)],
    ids=lambda o: type(o).__name__)
def test_items_without_names(items):
    "Nobody needs to hear of it."
    ds = Listed(items, 2)
    assert item_names(ds) is None and not why(ds) and items_frame(ds)['name'].isna().all()
    known = KnownItems(ds)
    assert known.still(ds) and not known.still(Listed(items, 2))

class Angry:
    def __len__(self): return 2
    def __getitem__(self, i): raise OSError('the disk is gone')
class Hidden(Listed):
    @property
    def items(self): raise RuntimeError('not yet')
class Mapped(dict):
    "A dataset that is a dict: its `items` is a method."
    def __getitem__(self, i): return torch.tensor(i), 0

def fails(o): raise KeyError('id')

@pytest.mark.parametrize('ds, key_fn, word', {
    'dict': (Listed({'a': 0, 'b': 1}), None, '`items` is a dict'),
        'set': (Listed({'a', 'b'}), None, '`items` is a set'),
        'views': (Listed({'a': 0}.keys()), None, '`items` is a dict_keys'),
    'shorter': (Listed(['a'], 2), None, '`items` has 1 entries, the dataset 2'),
        'mixed': (Listed(['a', 'b', 3.5]), None, 'item 2 is a float, expected a text or path'),
        'text and dict': (Listed(['a', {}]), None, 'item 1 is a dict'),
    'unreadable': (Listed(Angry()), None, 'the disk is gone'), 'hidden': (Hidden(n=2), None, 'not yet'),
        'frame of other length': (Listed(pd.DataFrame({'x': [1]}), 2), None, '1 entries, the dataset 2'),
    'no items': (Listed(n=2), str, '`key_fn` has nothing to name'),
        'a dict itself': (Mapped(a=0), str, '`key_fn` has nothing to name'),
        'a dict for key_fn': (Listed({'a': 0}), str, '`items` is a dict'),
    'raises': (Listed(['a', 'b']), fails, "`key_fn` failed for item 0, 'a': KeyError('id')"),
        'raises late': (Listed([1, 0]), lambda o: 1 // o, '`key_fn` failed for item 1, 0: ZeroDivisionError'),
    'only None': (Listed(['a', 'b']), lambda o: None, '`key_fn` gives a name to no item'),
        'subset': (Subset(Listed({'a': 0, 'b': 1}), [1]), None, '`items` is a dict'),
        'keys of a subset': (Subset(Listed(['a', 'b']), ['b']), None, 'expected whole numbers'),
    'beyond': (Subset(Listed(['a', 'b']), [5]), None, 'IndexError'),
        'concat': (ConcatDataset([Listed(['a']), Listed({'b': 0})]), None, '`items` is a dict')}.values())
def test_names_that_cannot_be_had(ds, key_fn, word):
    "There are none, and the reason is given; nothing is raised."
    frame = items_frame(ds, key_fn)
    assert item_names(ds, key_fn) is None and frame['name'].isna().all() and len(frame) == len(ds)
    assert word in frame.attrs['why']
    known = KnownItems(ds, key_fn)
    assert known.why == frame.attrs['why'] and known.fingerprint == fingerprint(frame)
    known.still(ds)

def test_keys():
    ds = Listed(['a', 'b', 'c'])
    assert item_names(ds, ord) == [97, 98, 99]
    assert item_names(ds, lambda o: Path(o)) == ['a', 'b', 'c']
    assert item_names(ds, lambda o: (o, 1)) == ["('a', 1)", "('b', 1)", "('c', 1)"]
    assert item_names(ds, lambda o: o * 600)[0][:460] == 'a' * 460 and not why(ds, ord)
    assert item_names(ds, lambda o: None if o == 'b' else ord(o)) == [97, None, 99]
    assert 'no name to 1 of 3 items' in why(ds, lambda o: None if o == 'b' else ord(o))
    assert item_names(ds, lambda o: o in 'ab') == ['True', 'True', 'False']
    assert "gives 2 names to 3 items: item 1 is called 'True' like item 0" in why(ds, lambda o: o in 'ab')
    assert item_names(Listed(pd.DataFrame({'id': [5, 6]})), lambda row: row.id) == [5, 6]
    assert item_names(Listed([{'id': 'x'}, {'id': 'y'}]), lambda o: o['id']) == ['x', 'y']

def test_a_key_that_draws():
    before = rng_state()
    item_names(Listed(['a', 'b']), lambda o: random.random() + np.random.rand() + float(torch.rand(1)))
    same_bits(rng_state(), before)


# -- where it stood

def test_subsets_of_subsets():
    base = Datasets(list('abcdefg'), [[str.upper]], splits=[[6, 4, 2, 0], [1, 3, 5]])
    for at in ([3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1]), pd.Index([3, 1]), range(3, 0, -2), [-1, -3]):
        sub = Subset(Subset(base.train, range(4)), at)
        assert item_names(sub) == ['a', 'e'] and item_source(sub).tolist() == [0, 4]
        frame = items_frame(sub)
        assert frame['item'].tolist() == [0, 1] and frame['name'].tolist() == ['a',
            'e'] and frame['source'].tolist() == [0, 4]
    whole = Listed(list('abcdefg'))
    assert item_source(Subset(Subset(whole, [6, 4, 2]), [2, 0])).tolist() == [2, 6]

def test_datasets_one_after_the_other():
    base = Listed(list('abcdefg'))
    both = ConcatDataset([Subset(base, [3, 1]), Subset(base, [0])])
    assert item_names(both) == ['d', 'b', 'a'] and item_source(both).tolist() == [3, 1, 0]
    two = ConcatDataset([Subset(base, [3, 1]), Subset(Listed(list('xyz')), [0])])
    assert item_names(two) == ['d', 'b', 'x'] and item_source(two) is None      # places in two sources are none
    assert item_names(ConcatDataset([base, Listed(n=2)])) is None
    assert item_names(ConcatDataset([Listed(pd.DataFrame({'x': [0, 1]})), Listed(['a'])])) == ['0', '1', 'a']
    assert item_names(Subset(both, [2, 0])) == ['a', 'd'] and item_source(Subset(both, [2, 0])).tolist() == [0, 3]

@pytest.mark.parametrize('splits', [None, RandomSplitter(seed=3)(range(9)), ([4, 2], [1]),
    (np.array([4, 2]), np.array([1])), (range(4), range(4, 9)),
    ([True] * 4 + [False] * 5, [False] * 4 + [True] * 5)], ids=['none', 'random', 'some', 'arrays', 'ranges', 'masks'])
def test_splits(splits):
    for dsets in (Datasets(list('abcdefghi'), [[str.upper]], splits=splits),
        TfmdLists(list('abcdefghi'), [str.upper], splits=splits)):
        for ds in (dsets.train, dsets.valid):
            frame = items_frame(ds)
            assert not frame.attrs['why'] and KnownItems(ds).still(ds)
            if splits is None: assert frame['source'].isna().all()
            else: assert ['abcdefghi'[i] for i in frame['source']] == frame['name'].tolist() if len(ds) else True

class Series(Listed):
    "As tsai's datasets: `items` is all of the source, `splits` and `split_idxs` are the positions of this part."
    def __init__(self, at, x): self.at, self.items, self.splits, self.split_idx, self.split_idxs = at, x, at, 0, np.array(at)
    def __len__(self): return len(self.at)

def test_time_series():
    assert item_source(Series([5, 2, 7], torch.zeros(9, 1, 4))).tolist() == [5, 2, 7]
    assert item_source(Series([0, 1, 2], torch.zeros(3, 1, 4))) is None     # a part of its own: where from is not kept

def table(index, splits):
    df = pd.DataFrame({'x': np.arange(12.), 'y': list('abc') * 4}, index=index)
    return df, TabularPandas(df, cont_names=['x'], y_names='y', y_block=CategoryBlock(), splits=splits)

@pytest.mark.parametrize('index', [None, np.arange(12)[::-1] * 7, [f'row {i}' for i in range(12)],
    np.random.default_rng(0).permutation(12)], ids=['default', 'falling', 'text', 'shuffled'])
def test_rows_of_a_table(index):
    "A row is called by its label, so the label finds it; fastai does not keep where it stood."
    df, to = table(index, RandomSplitter(seed=1)(range(12)))
    for ds in (to.train, to.valid):
        names = items_frame(ds)['name']
        assert df.index[df.index.get_indexer(names)].tolist() == names.tolist()
        assert df.loc[names]['x'].tolist() == ds.items['x'].tolist()
        assert df['x'].iloc[df.index.get_indexer(names)].tolist() == ds.items['x'].tolist()
        assert item_source(ds) is None
    dls = TabularDataLoaders.from_df(df, cont_names=['x'], y_names='y', y_block=CategoryBlock(), bs=4)
    assert df.loc[items_frame(dls.train_ds)['name']]['x'].tolist() == dls.train_ds.items['x'].tolist()

def test_a_table_keeps_nothing_but_labels():
    "The same part, cut from two frames in which its rows stand elsewhere, looks the same."
    df = pd.DataFrame({'x': np.arange(4.), 'y': list('abab')})
    moved = df.iloc[[2, 3, 0, 1]]
    a, b = (TabularPandas(o, cont_names=['x'], y_names='y', y_block=CategoryBlock(), splits=s).train.items for o,
        s in ((df, ([0, 1], [2, 3])), (moved, ([2, 3], [0, 1]))))
    pd.testing.assert_frame_equal(a, b)


# -- the same items?

def test_a_fingerprint_tells_lists_apart():
    lists = [['a', 'b'], ['b', 'a'], ['a'], ['a', 'b', 'c'], ['a\x1fb', 'c'], ['a', 'b\x1fc'], ['a', '\x1eb'],
        ['a', '\x1e\x1eb'], ['a', '\x1e0b'], ['None', 'b'], [None, 'b'], ['a', None], ['a', 'None'],
        ['a', '\x1eNone'], ['', 'a'], ['a', ''], ['', ''],
             [None, None], ['<NA>', 'b'], ['x' * 500 + 'a', 'b'], ['x' * 500 + 'b', 'b'], [NOT_UTF8, 'b'],
                 ['caf\\udce9.png', 'b']]
    frames = [items_frame(Listed(o + ['z'])).iloc[:-1] for o in lists]
    marks = [fingerprint(o) for o in frames]
    assert len(set(marks)) == len(marks)
    for i, a in enumerate(frames):
        for j, b in enumerate(frames): assert (difference(a, b) == '') == (i == j), (lists[i], lists[j])

@given(st.lists(st.lists(st.none() | st.text(alphabet='aN\x1e\x1f01', max_size=3) | st.just('None'), min_size=2,
    max_size=3), min_size=2, max_size=2, unique_by=tuple))
def test_no_two_lists_have_one_fingerprint(lists):
    a, b = (pd.DataFrame({'item': range(len(o)), 'name': pd.Series(o, dtype=object),
        'source': pd.array([None] * len(o), 'Int64')}) for o in lists)
    assert fingerprint(a) != fingerprint(b) and difference(a, b)

def test_fingerprints_of_older_records_hold():
    "They were written by an earlier version."
    frame = items_frame(Datasets([f'{i}.png' for i in range(5)], [[str.upper]], splits=[[4, 0], [1, 2, 3]]).train)
    assert fingerprint(frame) == OLD['split']
    assert fingerprint(items_frame(Listed(pd.DataFrame({'x': range(3)})))) == OLD['frame']
    assert fingerprint(items_frame(Listed(n=3))) == OLD['none']

OLD = dict(split='2f9783c5711d48b3', frame='4c5245c36e546e2a', none='fa084f5fa7d4015a')

def test_differences_in_words():
    a = frame_of(['a.png', 'b.png', 'c.png'])
    assert difference(a, a.copy()) == '' and difference(a, a.astype({'name': 'string'})) == ''
    assert difference(a, frame_of('ab')) == '3 items then, 2 now'
    assert difference(a, frame_of(['a.png', 'c.png',
        'b.png'])) == "2 of 3 items differ, the first is item 1: name 'b.png' then and 'c.png' now"
    assert difference(a, items_frame(Listed(n=3)),
        ('in a', 'in b')) == "3 of 3 items differ, the first is item 0: name 'a.png' in a and none in b"
    moved = a.assign(source=pd.array([7, 8, None], 'Int64'))
    assert difference(moved, moved.assign(source=pd.array([7, 9, None],
        'Int64'))) == '1 of 3 items differ, the first is item 1: source 8 then and 9 now'
    assert 'source none then and 7 now' in difference(a, moved)

def test_a_difference_deep_in_long_names():
    a, b = (frame_of(['The same words at the beginning of each. ' * k + end]) for k, end in ((8, 'cat'), (8, 'dog')))
    assert difference(a, b).endswith("then and '… beginning of each. dog' now")
    a, b = (frame_of(['x' * 2000 + end]) for end in 'ab')
    assert '… ' in difference(a, b) and len(difference(a, b)) < 250

def test_whole_numbers_and_the_same_as_text():
    "A record that was written when names were text goes on."
    a = items_frame(Listed(pd.DataFrame({'x': [0, 1]}, index=[30, 10])))
    b = a.assign(name=['30', '10'])
    assert difference(a, b) == '' and fingerprint(a) == fingerprint(b)

def test_labels_stand_in_for_names():
    a = items_frame(Listed(n=4))
    assert difference(a, a, labels=([0, 1, 2, -1], [0, 1, 2, 5])) == ''
    assert difference(a, a, labels=(np.array([0, 1, 2, 3]),
        np.array([0, 5, 9, 3]))) == '2 of 4 items differ, the first is item 1: label 1 then and 5 now'
    named = frame_of('abcd')
    assert difference(named, named, labels=([0, 1, 2, 3], [3, 2, 1, 0])) == ''

# -- labels

def test_labels_that_are_kept_in_arrays():
    from torch.utils.data import TensorDataset
    y = [2, 0, 1, 2]
    assert labels_of(TensorDataset(torch.zeros(4, 2), torch.tensor(y)), 4).tolist() == y
    assert labels_of(Subset(TensorDataset(torch.zeros(4, 2), torch.tensor(y)), [3, 1]), 2).tolist() == [2, 0]
    for kept in (y, tuple(y), np.array(y), torch.tensor(y), pd.Series(y)):
        for name in ('targets', 'labels'):
            ds = Listed(range(4))
            setattr(ds, name, kept)
            assert labels_of(ds, 4).tolist() == y and (labels_of(ds, 5) == -1).all()
    ds.labels = [.5, 1, 2, 3]
    assert (labels_of(ds, 4) == -1).all()
    assert (labels_of(TensorDataset(torch.zeros(4, 2), torch.zeros(4, 2)), 4) == -1).all()

def test_labels_of_datasets():
    dsets, n = Datasets(list('abcab'), [[str.upper, counted], [Categorize()]], splits=[[4, 2, 0], [1, 3]]), READ['items']
    assert labels_of(dsets.train, 3).tolist() == [1, 2, 0] and labels_of(dsets.train, 3, most=2).tolist() == [1, -1, 0]
    assert labels_of(Subset(dsets.train, [2, 1]), 2).tolist() == [0, 2]
    assert READ['items'] == n                          # only the labels were
    _, to = table(None, ([3, 1], [0]))
    assert labels_of(to.train, 2).tolist() == [0, 1]

@pytest.mark.parametrize('label', [parent_label, RegexLabeller(r'^(.)/'), attrgetter('parent.name')], ids=['parent_label', 'RegexLabeller', 'attrgetter'])
def test_labels_that_fastai_makes_of_names(label):
    dsets = Datasets([Path('a/1.png'), Path('b/2.png'), Path('a/3.png')], [[lambda o: o], [label, Categorize()]])
    assert labels_of(dsets, 3).tolist() == [0, 1, 0]

class Encodes(Transform):
    def encodes(self, o): return counted(o)

def test_labels_that_need_code_of_ones_own_are_not_read():
    "Such code may draw random numbers, or count."
    class Own(Datasets): pass
    class Reads(Listed):
        @property
        def targets(self): return counted([0, 1, 2])
    items, read = ['a', 'b', 'c'], Datasets(list('abc'), [[lambda o: o], [counted, Categorize()]])
    made = Datasets(items, [[lambda o: o], [Encodes(), Categorize()]]), Own(items, [[lambda o: o], [Categorize()]]), Datasets(items, [[counted]])
    n = READ['items']
    for ds in (read, *made, Reads(items), Listed(items)): assert (labels_of(ds, 3) == -1).all()
    assert READ['items'] == n

READ = dict(items=0)
def counted(o):
    READ['items'] += 1
    return o


# -- still the same?

EXCHANGES = {
    'another list': lambda ds: setattr(ds, 'items', ['new', *ds.items[1:]]),
        'one entry': lambda ds: ds.items.__setitem__(3, 'new'), 'order': lambda ds: ds.items.reverse(),
    'longer': lambda ds: ds.items.append('new'), 'shorter': lambda ds: ds.items.pop(),
        'removed': lambda ds: delattr(ds, 'items'), 'a dict': lambda ds: setattr(ds, 'items', dict.fromkeys(ds.items))}

@pytest.mark.parametrize('how', EXCHANGES)
@pytest.mark.parametrize('around', [lambda ds: ds, lambda ds: Subset(ds, [5, 3, 0]),
    lambda ds: ConcatDataset([Listed(['z']), ds])], ids=['itself', 'subset', 'concat'])
def test_an_exchange_is_noticed(around, how):
    class Open(Listed):
        def __len__(self): return len(getattr(self, 'items', 'abcdef'))
    inner = Open([f'{i}.png' for i in range(6)])
    ds = around(inner)
    known = KnownItems(ds)
    assert known.still(ds) and known.still(ds)
    EXCHANGES[how](inner)
    assert not known.still(ds)
    again = KnownItems(ds)
    assert again.fingerprint != known.fingerprint or (how == 'longer' and isinstance(ds, (Subset, ConcatDataset)))
    assert again.still(ds) or how == 'a dict'

@pytest.mark.parametrize('change', [lambda ds: ds.items.__setitem__(1, 'new'),
    lambda ds: setattr(ds, 'items', ds.items[::-1].copy())])
def test_an_exchange_in_an_array(change):
    for dtype in ('U9', object):
        ds = Listed(np.array(['a', 'b', 'c'], dtype=dtype))
        known = KnownItems(ds)
        assert known.still(ds)
        change(ds)
        assert not known.still(ds)

def test_an_exchange_in_a_frame():
    df = pd.DataFrame({'id': [5, 6, 7]}, index=list('abc'))
    ds = Listed(df)
    plain, keyed = KnownItems(ds), KnownItems(ds, lambda row: row.id)
    assert plain.still(ds)
    df.loc['b', 'id'] = 9                              # with a `key_fn` the rows matter
    assert plain.still(ds) and not keyed.still(ds) and KnownItems(ds,
        lambda row: row.id).frame['name'].tolist() == [5, 9, 7]
    df.index = list('abx')
    assert not plain.still(ds)
    df.index = list('abc')
    assert plain.still(ds)
    ds.items = df.copy()
    assert plain.still(ds)

def test_an_item_that_changes_inside():
    ds = Listed([{'id': 1}, {'id': 2}])
    known = KnownItems(ds, lambda o: o['id'])
    ds.items[0]['id'] = 7
    assert not known.still(ds)
    paths = Listed(['a', 'b'])
    assert KnownItems(paths, str.upper).still(paths)   # texts do not change inside

def test_other_places_are_noticed():
    dsets = Datasets(list('aaaaaa'), [[str.upper]], splits=[[4, 2, 0], [1, 3]])
    known = KnownItems(dsets.train)
    ds = dsets.train
    known = KnownItems(ds)
    assert known.still(ds)
    ds.tls[0].splits = L([[4, 2, 1], [0, 3]])
    assert not known.still(ds)
    at = np.array([4, 2])
    sub = Subset(dsets, at)
    known = KnownItems(sub)
    assert known.still(sub)
    at[0] = 1
    assert not known.still(sub)

def test_a_dataset_that_does_not_say_how_long_it_is():
    class Open:
        def __getitem__(self, i): return i
    ds = Open()
    known = KnownItems(ds, n=5)
    assert len(known.frame) == 5 and known.still(ds, n=5) and not known.still(ds, n=6)


# -- names and labels at their edges

@pytest.mark.parametrize('names, whole', [([-2**63, 2**63 - 1], True), ([-7, 3], True), ([-2**63 - 1, 0], False), ([2**63, 0], False)], ids=str)
def test_whole_names_stay_numbers_if_they_fit(names, whole):
    assert item_names(Listed(names), lambda o: o) == [o if whole else str(o) for o in names]


def test_the_fingerprint_of_many_items_is_that_of_one_long_text():
    "It is made in pieces, and a record keeps it: another one would be another dataset."
    n = 2**16 + 100
    items = pd.DataFrame(dict(item=np.arange(n), name=[f'item {i}' for i in range(n)], source=pd.array(np.arange(n)[::-1], dtype='Int64')))
    text = f'{n}' + '\x1f'.join(items['name']) + '\x1f'.join(map(str, items['source']))
    assert fingerprint(items) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_dataset_may_have_slots():
    "So that its attributes are in no dict."
    class Slots:
        __slots__ = 'n',
        def __init__(self, n): self.n = n
        def __len__(self): return self.n
        def __getitem__(self, i): return i, 0
    assert (labels_of(Slots(3), 3) == -1).all()

# -- datasets that are lists

@pytest.mark.parametrize('kind', ['tensors', 'arrays', 'numbers'])
def test_lists_of_one_length_are_recorded(kind):
    "Train and valid alike, and loaders that are made anew: items that cannot be compared are told apart by their names."
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from helpers import quiet

    from fastai_xent.all import XentLossFlat, XentRecorder
    def items(seed):
        x = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))
        of = dict(tensors=lambda o: o, arrays=lambda o: o.numpy(), numbers=lambda o: float(o[0]))[kind]
        return [(of(o), i % 3) for i, o in enumerate(x)]
    class First(torch.nn.Linear):
        def forward(self, x): return super().forward(x.float().reshape(len(x), -1).expand(-1, 4))
    def dls(): return DataLoaders.from_dsets(items(0), items(1), bs=4, device='cpu', num_workers=0)
    learn = quiet(Learner(dls(), First(4, 3), loss_func=XentLossFlat(), cbs=XentRecorder()))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(1)
        learn.dls = dls()
        learn.fit(1)
    df = learn.xent_recorder.record.to_df()
    assert len(df) == 48 and not df[df.split == 'valid'].duplicated(['epoch', 'item']).any()


# -- random numbers

def test_what_is_read_draws_as_it_did_and_no_device_is_seeded(monkeypatch):
    "fastai's `no_random` seeds every device, and puts back the states of CUDA's alone."
    def drawn(o): return f'{o} {torch.rand(1).item()} {np.random.rand()} {random.random()}'
    with no_random(): want = [drawn(o) for o in 'abc']
    def seeds(*_): raise AssertionError("a device is seeded")
    for where, name in ((torch, 'manual_seed'), (torch.cuda, 'manual_seed_all'), (torch.cuda, 'get_rng_state_all')): monkeypatch.setattr(where, name, seeds)
    state = rng_state()
    assert item_names(Listed(list('abc')), drawn) == want == item_names(Listed(list('abc')), drawn)
    ds = Datasets(['x', 'y', 'x'], [[], [Categorize(vocab=['x', 'y'])]])
    assert labels_of(ds, 3).tolist() == [0, 1, 0]
    same_bits(rng_state(), state)
