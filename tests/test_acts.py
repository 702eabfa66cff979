"Acts on a record: the right items, through every kind of dataset and loader, and nothing changed in place."
import copy
import json
import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.core import DataLoaders, Datasets, TfmdDL, TfmdLists
from fastai.data.transforms import Categorize, Category, IndexSplitter, ToTensor
from fastai.learner import Learner
from fastai.tabular.core import TabDataLoader, TabularPandas
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.text.data import SortedDL
from fastai.torch_core import TensorCategory, set_seed
from helpers import C, MIDDLE, Coded, Points, Through, coded, learner, quiet, rng_state, wrong_rows

from fastai_xent import acts, chosen, classes, datasets, dynamics
from fastai_xent.acts import prune, relabel, reweight
from fastai_xent.chosen import RANK_BY, check_items, items_named
from fastai_xent.datasets import label_kind
from fastai_xent.items import item_names, item_source, items_frame
from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder
from fastai_xent.writer import XentWriter

N = 40
pytestmark = [pytest.mark.filterwarnings(f'ignore:prune. {o}') for o in ('no training item of class', '. of 40 training items have no score')]  # with so few items; one test asks for it


# -- every kind of dataset, with items that say who they are: item i has the margin (i - MIDDLE) units and the class i % C

class Logits:
    def __call__(self, path): return coded(int(Path(path).stem))[0]
class Label:
    def __call__(self, path): return 'abc'[int(Path(path).stem) % C]
class Pair:
    def __call__(self, path): return coded(int(Path(path).stem))

class Farther(Coded):
    "Margins far enough apart to rank by any score."
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return (x + torch.nn.functional.one_hot(y, C) * (int(i) - N / 2)).float(), y

FILES = [Path(f'{i}.png') for i in range(2 * N)]
SPLITS = [list(range(2 * N - 1, N - 1, -1)), list(range(9))]    # backwards: an item is not its source

def frame():
    x, y = coded(torch.arange(N))
    return pd.DataFrame({**{f'x{k}': x[:, k].numpy() for k in range(C)}, 'label': y.numpy()}, index=[f'row {i}' for i in range(N)])

def table(): return TabularPandas(frame(), procs=[], cont_names=[f'x{k}' for k in range(C)], y_names='label', y_block=CategoryBlock())
def tab_dls(cls=TabDataLoader): return DataLoaders(cls(table(), bs=4, shuffle=True, num_workers=0), TabDataLoader(table(), bs=4, num_workers=0))
def of(dl): return DataLoaders(dl, TfmdDL(Coded(7), bs=4, num_workers=0))

DLS = {
    'Datasets': lambda: Datasets(FILES, [[Logits()], [Label(), Categorize()]], splits=SPLITS).dataloaders(bs=4,
            after_item=ToTensor, num_workers=0, drop_last=False),
    'TfmdLists': lambda: TfmdLists(FILES, [Pair()], splits=SPLITS).dataloaders(bs=4, num_workers=0, drop_last=False),
    'unsplit': lambda: of(TfmdDL(Datasets(FILES[:N], [[Logits()], [Label(), Categorize()]]), bs=4, shuffle=True,
                                 num_workers=0, after_item=ToTensor())),
    'plain': lambda: of(TfmdDL(Coded(N), bs=4, shuffle=True, num_workers=0)),
    'workers': lambda: of(TfmdDL(Coded(N), bs=4, shuffle=True, num_workers=2)),
    'Subset': lambda: of(TfmdDL(torch.utils.data.Subset(Coded(2 * N), range(N)), bs=4, shuffle=True, num_workers=0)),
    'WeightedDL': lambda: of(WeightedDL(Coded(N), wgts=np.arange(N) + 1., bs=4, shuffle=True, num_workers=0)),
    'PartialDL': lambda: of(PartialDL(Coded(N), partial_n=30, bs=4, shuffle=True, num_workers=0)),
    'SortedDL': lambda: of(SortedDL(Coded(N), res=[i * 7919 % 101 for i in range(N)], bs=4, shuffle=True,
                                    num_workers=0)),
    'torch': lambda: DataLoaders(torch.utils.data.DataLoader(Coded(N), batch_size=4, shuffle=True),
                                 torch.utils.data.DataLoader(Coded(7), batch_size=4)),
    'table': tab_dls}

CHANGES = ['item', 'name', 'source', 'what', 'old', 'new', 'weight', 'score', 'p_wrong', 'why']

def record_of(dls, epochs=3, loss=None, model=None):
    learn = quiet(Learner(dls, model or Through(), loss_func=loss or XentLossFlat(), cbs=XentRecorder(), lr=.1))
    learn.fit(epochs)
    return learn.xent_recorder.record

def contents(ds):
    "What a dataset gives, item by item."
    if hasattr(ds, 'iloc'): return ds.items.to_numpy().tolist()
    return [(ds[i][0].tolist(), int(ds[i][1])) for i in range(len(ds))]

def numbers(dls):
    "Which file or row each training item comes from, read off the items themselves."
    ds = dls.train.dataset
    if hasattr(ds, 'iloc'): x = torch.tensor(ds.items[[f'x{k}' for k in range(C)]].to_numpy(float))
    else: x = torch.stack([ds[i][0] for i in range(len(ds))]).double()
    return ((x.sum(1)) / 2.**-17).round().long().numpy() + MIDDLE   # the other logits are zero

@pytest.mark.parametrize('kind', DLS)
def test_prune_keeps_the_right_items(kind):
    set_seed(0)
    dls = DLS[kind]()
    record, before, own = record_of(dls), contents(dls.train.dataset), numbers(dls)
    names, source = item_names(dls.train.dataset), item_source(dls.train.dataset)
    keep = np.random.default_rng(1).permutation(N)[:17]
    pruned = prune(dls, record, keep=keep)
    keep = np.sort(keep)
    ds = pruned.train.dataset
    np.testing.assert_array_equal(numbers(pruned), own[keep])
    assert contents(ds) == [before[i] for i in keep]
    # names and places are those that they were
    assert item_names(ds) == (None if names is None else [names[i] for i in keep])
    if kind != 'table': np.testing.assert_array_equal(item_source(ds), keep if source is None else source[keep])
    # nothing else has changed
    assert contents(dls.train.dataset) == before and len(dls.train.dataset) == N
    assert pruned.valid is dls.valid and type(pruned) is type(dls) and type(pruned.train) is type(dls.train)
    assert len(list(pruned.train)) == -(-17 // 4)
    # and it trains: a record of the pruned items has their rows
    again = record_of(pruned, 2)
    items = again.items()
    rows = again.to_df('train').merge(items.assign(own=own[keep]), on='item')
    assert not wrong_rows(rows.assign(item=rows['own'])).any()
    if kind == 'WeightedDL': np.testing.assert_allclose(pruned.train.wgts, (keep + 1) / (keep + 1).sum())
    if kind == 'SortedDL': assert list(pruned.train.res) == [int(i) * 7919 % 101 for i in keep]

@pytest.mark.parametrize('kind', DLS)
def test_relabel_changes_the_right_labels(kind):
    set_seed(0)
    dls = DLS[kind]()
    record, before, own = record_of(dls), contents(dls.train.dataset), numbers(dls)
    new = {3: 1, 17: 0, 39: 2, 0: int(own[0] % C)}            # the last keeps its own
    relabelled = relabel(dls, record, new)
    audit, after = relabelled.xent_changes, contents(relabelled.train.dataset)
    for i in range(N):
        label = after[i][-1]
        assert label == new.get(i, own[i] % C) and after[i][:-1] == before[i][:-1]
    assert contents(dls.train.dataset) == before and relabelled.valid is dls.valid
    assert audit['item'].tolist() == list(new)
    named = [record._class_name(c) for c in (own[list(new)] % C)]
    assert audit['old'].tolist() == named and audit['new'].tolist() == [record._class_name(c) for c in new.values()]
    assert audit['why'].tolist() == ['has this label already: kept' if own[i] % C == c else 'given' for i, c in new.items()]
    np.testing.assert_array_equal(audit['name'].isna(), record.items()['name'].iloc[list(new)].isna())
    again = record_of(relabelled, 1 if kind != 'WeightedDL' else 12)
    targ = again.score(dynamics.Label())
    for i, c in new.items(): assert np.isnan(targ[i]) or targ[i] == c
    # the record of the first training still fits
    assert len(prune(relabelled, record, keep=[0, 3]).train.dataset) == 2
    np.testing.assert_array_equal([o[-1] for o in contents(prune(relabelled, record, keep=[0, 3]).train.dataset)], [new[0], new[3]])

@pytest.mark.parametrize('kind', ['Datasets', 'plain', 'WeightedDL', 'torch', 'table', 'unsplit'])
def test_reweight_draws_by_weight(kind):
    set_seed(0)
    dls = DLS[kind]()
    record, before = record_of(dls), contents(dls.train.dataset)
    w = np.zeros(N)
    w[[5, 11, 30]] = 1, 2, 1
    heavy = reweight(dls, record, w)
    assert heavy.train.dataset is dls.train.dataset and heavy.valid is dls.valid and contents(dls.train.dataset) == before
    rows = record_of(heavy, 12).to_df('train')['item'].value_counts()
    old = np.arange(N) + 1. if kind == 'WeightedDL' else np.ones(N)
    want = (w * old / (w * old).sum())[[5, 11, 30]] * 12 * N
    assert set(rows.index) == {5, 11, 30} and rows.sum() == 12 * N
    assert (abs(rows[[5, 11, 30]].to_numpy() - want) < 5 * np.sqrt(want)).all()

def test_reweight_in_balance():
    dls = of(TfmdDL(Farther(N), bs=4, shuffle=True, num_workers=0))
    record = record_of(dls)
    weights = np.exp(-record.score('margin_loss'))
    plain, balanced = (reweight(dls, record, weights, balanced=o).train.wgts for o in (False, True))
    w = 1 / (1 + np.exp(-(np.arange(N) - N / 2 + (np.arange(N) - MIDDLE) * 2.**-17)))
    np.testing.assert_allclose(plain, w / w.sum(), rtol=1e-4)
    for c in range(C): assert balanced[np.arange(N) % C == c].sum() == pytest.approx((np.arange(N) % C == c).mean())

def test_weights_of_a_frame():
    dls = DLS['plain']()
    record = record_of(dls)
    w = reweight(dls, record, pd.DataFrame({'item': [7, 2, 4], 'p_wrong': [.75, .5, np.nan]})).train.wgts
    np.testing.assert_allclose(w / w[0], np.where(np.arange(N) == 7, .25, np.where(np.arange(N) == 2, .5, 1)))
    w = reweight(dls, record, pd.DataFrame({'item': [7], 'weight': [3.], 'p_wrong': [.5]})).train.wgts
    assert w[7] / w[0] == pytest.approx(3)


# -- which items

@pytest.fixture(scope='module')
def ranked():
    dls = of(TfmdDL(Farther(N), bs=4, shuffle=True, num_workers=0))
    return dls, record_of(dls)

def left(dls): return [int(i) for i in item_source(dls.train.dataset)]

def test_shares(ranked):
    dls, record = ranked                              # the smaller the number, the harder
    assert left(prune(dls, record, keep=.25, by='el2n')) == list(range(10))
    assert left(prune(dls, record, keep=.25, by='aum')) == list(range(10))
    assert left(prune(dls, record, keep=.25)) == list(range(10))
    assert left(prune(dls, record, drop=.25)) == list(range(10, 40))
    assert left(prune(dls, record, drop=.75, by='el2n')) == list(range(30, 40))

def test_a_share_of_each_class(ranked):
    kept = np.array(left(prune(*ranked, keep=.5, balanced=True)))
    assert [sum(kept % C == c) for c in range(C)] == [7, 6, 6]       # of 14, 13 and 13
    for c in range(C): assert kept[kept % C == c].max() < 21

def test_equal_scores_are_not_taken_in_order():
    data = Points(60)
    data.y = torch.arange(60) // 20                   # sorted by class
    dls = DataLoaders(TfmdDL(data, bs=8, shuffle=True, num_workers=0), TfmdDL(data, bs=8, num_workers=0))
    learn = learner([XentRecorder()])
    learn.dls = dls
    learn.fit(1)
    record = learn.xent_recorder.record
    record.score = lambda by='margin_loss', *_: np.ones(60) if not isinstance(by, dynamics.Label) else (np.arange(60) // 20).astype(float)
    kept = np.array(left(prune(dls, record, keep=.5)))
    assert all(3 < (kept // 20 == c).sum() < 17 for c in range(3))
    assert left(prune(dls, record, keep=.5)) == kept.tolist()

@pytest.fixture
def told():
    "What an act warns of."
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        def said():
            messages = [str(o.message) for o in got if str(o.message).split(':')[0] in ('prune', 'reweight', 'relabel')]
            assert all(Path(o.filename).name == 'test_acts.py' for o in got if str(o.message) in messages)
            got.clear()
            return messages
        yield said

def test_items_that_were_never_seen_stay(told):
    dls = of(TfmdDL(Farther(N, skip=[1, 30]), bs=4, num_workers=0))
    record = record_of(dls)
    told()
    assert left(prune(dls, record, keep=.5, by='el2n')) == [*range(20), 30]
    assert told() == ["prune: 2 of 40 training items have no score, and stay; 19 are dropped, which are not among the first 0.5 of 38 items with the score 'el2n'"]
    dropped = prune(dls, record, drop=.5)
    assert left(dropped) == [1, *range(20, 40)]
    assert told() == ["prune: 2 of 40 training items have no score, and stay; 19 are dropped, which are among the first 0.5 of 38 items with the score 'suspicion'"]
    assert left(prune(dls, record, n_drop=3)) == [1, *range(4, 40)]
    assert 'among the first 3 of 38' in told()[0]
    prune(dls, record, keep=[1, 2])                   # items that are named need no score
    assert all('no score' not in o for o in told())
    dls.loaders[0] = dls.train.new(shuffle=True)
    reweight(dls, record)
    assert told() == ['reweight: 2 of 40 training items have no score, and the weight of one whose label is surely right']

def test_a_class_without_items_is_told(ranked):
    with pytest.warns(UserWarning, match='prune: no training item of class 1, 2 is left'): prune(*ranked, keep=[0, 3, 6])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        prune(*ranked, keep=[0, 1, 2])

def test_frames_masks_and_functions(ranked):
    dls, record = ranked
    issues = pd.DataFrame({'item': [9, 4, 2], 'is_issue': [True, False, True]})
    assert left(prune(dls, record, drop=issues)) == [i for i in range(N) if i not in (2, 9)]
    assert left(prune(dls, record, keep=np.arange(N) < 5)) == left(prune(dls, record, keep=torch.arange(N) < 5)) == left(prune(dls, record, keep=range(5))) == list(range(5))
    assert left(prune(dls, record, keep=lambda df: df['targ'] == 0)) == list(range(0, N, 3))
    assert left(prune(dls, record, drop=lambda df: df.nlargest(3, 'score'))) == list(range(3, N))
    assert not items_named([], record).any()

@pytest.mark.parametrize('kw, error, words', [
    (dict(), ValueError, 'give one of'), (dict(keep=.5, drop=.1), ValueError, 'give one of'),
    (dict(keep=1.5), ValueError, 'the share is 1.5'),
    (dict(keep=0.), ValueError, 'no training item would be left'),
    (dict(keep=[N]), IndexError, 'item 40 does not exist'), (dict(keep=[-1]), IndexError, 'item -1 does not exist'),
    (dict(keep=1), TypeError,
     'keep is 1, expected a share such as 0.7 or 1.0, or the items; a number of items is `n_keep=1`'),
    (dict(drop=0), TypeError, 'a number of items is `n_drop=0`'),
    (dict(n_drop=.5), TypeError, r'n_drop is 0\.5, expected a whole number of items; .* is `drop=`'),
    (dict(n_keep=[1]), TypeError, r'n_keep is \[1\]'), (dict(n_drop=True), TypeError, 'n_drop is True'),
    (dict(n_drop=41), ValueError, 'the number is 41, expected 0 to 40'),
    (dict(n_keep=-1), ValueError, 'the number is -1'), (dict(n_keep=4, balanced=True), ValueError, 'needs a share'),
    (dict(n_keep=4, drop=.5), ValueError, 'got drop, n_keep'),
    (dict(keep=True), TypeError, 'items are named by'),
    (dict(keep=np.ones(3, dtype=bool)), ValueError, r'shape \[3\]'),
    (dict(keep=pd.DataFrame({'name': ['a']})), KeyError, 'no column `item`'),
    (dict(keep=pd.DataFrame({'item': [1, None]})), TypeError, 'got nan'),
    (dict(keep=np.ones(3, dtype=bool)), ValueError, r'shape \[3\], expected \[40\]'),
    (dict(keep=[.5, .7]), TypeError, 'expected whole numbers'),
    (dict(keep=pd.Series([True] * N)), TypeError, 'does not say which items'),
    (dict(keep=[1], balanced=True), ValueError, 'needs a share'),
    (dict(keep=.5, by='beauty'), KeyError, "no score is called 'beauty'")])
def test_prune_refuses(ranked, kw, error, words):
    with pytest.raises(error, match=words): prune(*ranked, **kw)

@pytest.mark.parametrize('weights, error, words', [
    (np.ones(3), ValueError, r'shape \[3\], expected \[40\]'), (-np.ones(N), ValueError, 'not negative'),
    (np.zeros(N), ValueError, 'not all zero'),
    (np.full(N, np.nan), ValueError, 'finite'),
    (pd.DataFrame({'item': [1]}), KeyError, 'no column `weight` or `p_wrong`'),
    (pd.Series(np.ones(N)), TypeError, 'a Series does not say which items its weights are for'),
    ({1: .5}, TypeError, 'a dict does not say'), (pd.DataFrame({'item': [-1], 'weight': [.5]}), IndexError,
            'item -1 does not exist'),
    (pd.DataFrame({'item': [N], 'p_wrong': [.5]}), IndexError, 'item 40'),
    (pd.DataFrame({'item': [1, 1], 'weight': [.5, 1]}), ValueError, 'item 1 is named twice'),
    (pd.DataFrame({'item': [1], 'p_wrong': [1.5]}), ValueError, 'not negative'),
    (pd.DataFrame({'item': [1], 'weight': [np.nan]}), ValueError, 'finite')])
def test_reweight_refuses(ranked, weights, error, words):
    with pytest.raises(error, match=words): reweight(*ranked, weights)

@pytest.mark.parametrize('issues, error, words', [
    ({1: 3}, ValueError, 'item 1 cannot get this label: 3 is no class; expected one of 0, 1, 2'),
    ({1: 'a'}, ValueError, "'a' is no class"), ({1: 1.5}, ValueError, '1.5 is no class'),
    ({-1: 1}, IndexError, 'item -1 does not exist'), ({'a': 1}, TypeError, "expected whole numbers, got 'a'"),
    ({1.5: 1}, TypeError, 'got 1.5'), ({'1': 0, 1: 1}, ValueError, 'item 1 is named twice'),
    (pd.DataFrame({'item': [1], 'new': [0], 'is_issue': [None]}), ValueError,
     'the column `is_issue` must be true or false in each row: a missing value'),
    (pd.DataFrame({'new': [1]}), KeyError, 'no column `item`'),
    ({N: 1}, IndexError, 'item 40 does not exist'),
    (pd.DataFrame({'item': [1]}), KeyError, 'no column `new` or `likely`'),
    (pd.DataFrame({'item': [1, 1], 'new': [0, 1]}), ValueError, 'item 1 is named twice')])
def test_relabel_refuses(ranked, issues, error, words):
    with pytest.raises(error, match=words): relabel(*ranked, issues)

def test_relabel_by_a_frame(ranked):
    dls, record = ranked
    issues = record.top(5).assign(is_issue=[True, True, False, True, True], p_wrong=[.9, .8, .7, .6, .5])
    issues.loc[1, 'likely'] = None                    # never predicted: nothing is known
    issues.loc[3, 'likely'] = issues.loc[3, 'targ']
    audit = relabel(dls, record, issues).xent_changes
    assert audit['item'].tolist() == [0, 1, 3, 4] and audit['p_wrong'].tolist() == [.9, .8, .6, .5]
    assert (audit['old'] == audit['new']).tolist() == [False, True, True, False]
    assert audit['why'].tolist() == ['the class that the model believes', 'no label is given: kept', 'has this label already: kept', 'the class that the model believes']
    assert list(audit) == CHANGES

def test_nothing_to_relabel(ranked):
    dls, record = ranked
    with pytest.warns(UserWarning, match='relabel: no label is changed; 0 items are named'): same = relabel(dls, record, record.top(5).assign(is_issue=False))
    assert len(same.xent_changes) == 0 and contents(same.train.dataset) == contents(dls.train.dataset)


# -- the same items?

def test_other_items_are_refused():
    record = record_of(DLS['Datasets']())
    other = Datasets(FILES, [[Logits()], [Label(), Categorize()]], splits=[list(range(N)), [N]]).dataloaders(bs=4, num_workers=0)
    for act in (lambda d: prune(d, record, keep=.5), lambda d: reweight(d, record), lambda d: relabel(d, record, {0: 'a'})):
        with pytest.raises(ValueError, match="not those of the record: 40 of 40 items differ, the first is item 0: name '79.png' then and '0.png' now"): act(other)

def test_fewer_items_are_refused():
    with pytest.raises(ValueError, match='40 items then, 30 now'): prune(of(TfmdDL(Coded(30), bs=4, num_workers=0)), record_of(DLS['plain']()), keep=.5)

def test_items_without_names_are_known_by_their_labels():
    class Shifted(Coded):
        def __getitem__(self, i): return coded(int(i) + 1)
    record = record_of(DLS['plain']())
    with pytest.raises(ValueError, match='40 of 40 items that were looked at have other labels, the first is item 0, class 0 then and 1 now'): check_items(of(TfmdDL(Shifted(N), bs=4, num_workers=0)), record)

def test_other_classes_are_refused():
    dls = DLS['plain']()
    dls.vocab = list('abc')
    record = record_of(dls)
    other = DLS['plain']()
    other.vocab = list('bac')
    with pytest.raises(ValueError, match="class 0 was 'a' and is 'b'"): prune(other, record, keep=.5)

def test_key_fn():
    dls = DLS['Datasets']()
    key = lambda p: f'photo {p.stem}'
    learn = quiet(Learner(dls, Through(), loss_func=XentLossFlat(), cbs=XentRecorder(key_fn=key), lr=.1))
    learn.fit(1)
    record = learn.xent_recorder.record
    with pytest.raises(ValueError, match='the `key_fn` of the recorder'): prune(dls, record, keep=.5)
    assert len(prune(dls, record, keep=.5, key_fn=key).train_ds) == 20

def test_looking_at_items_leaves_no_trace():
    "Reading an item may draw random numbers, as an augmentation does."
    class Noisy(Coded):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + 0 * torch.rand(1) + 0 * np.random.rand(), y
    dls = of(TfmdDL(Noisy(N), bs=4, shuffle=True, num_workers=0))
    record = record_of(dls, 1)
    before = rng_state()
    check_items(dls, record)
    after = rng_state()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


# -- loaders that cannot be copied

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return map(Coded(N).__getitem__, range(N))

def test_loaders_are_refused():
    dls = DLS['plain']()
    record = record_of(dls)
    with pytest.raises(ValueError, match='reads 30 of 40 items'): prune(of(TfmdDL(Coded(N), n=30, bs=4, num_workers=0)), record, keep=.5)
    with pytest.raises(TypeError, match='a stream has no items to choose from'): prune(DataLoaders(torch.utils.data.DataLoader(Stream()), dls.valid), record, keep=.5)
    own = torch.utils.data.DataLoader(Coded(N), batch_size=4, sampler=torch.utils.data.WeightedRandomSampler([1.] * N, N))
    with pytest.raises(TypeError, match='WeightedRandomSampler.*has its own choice of items'): prune(DataLoaders(own, dls.valid), record, keep=.5)
    with pytest.raises(TypeError, match='is a list, expected'): prune(DataLoaders([1], dls.valid), record, keep=.5)
    wrapped = TfmdDL(Coded(N), bs=4, num_workers=0)
    wrapped.dl = dls.valid
    with pytest.raises(TypeError, match='before the training starts'): prune(of(wrapped), record, keep=.5)
    with pytest.raises(ValueError, match='make it with shuffle=True'): reweight(of(TfmdDL(Coded(N), bs=4, num_workers=0)), record)
    with pytest.raises(TypeError, match='SortedDL, which orders its items in its own way'): reweight(DLS['SortedDL'](), record)

def test_masks_cannot_be_relabelled():
    class Masks(Coded):
        def __getitem__(self, i): return coded(i)[0], torch.zeros(4, dtype=torch.long)
    dls = DLS['plain']()
    record = record_of(dls)
    with pytest.raises(TypeError, match='item 3 has no single class as its label, but tensor'): relabel(of(TfmdDL(Masks(N), bs=4, num_workers=0)), record, {3: 1})


# -- one act after the other

@pytest.mark.parametrize('kind', ['Datasets', 'plain', 'table'])
def test_twice(kind):
    "Pruned, trained, and pruned again: the source is still that of the first."
    dls = DLS[kind]()
    own = numbers(dls)
    once = prune(dls, record_of(dls), keep=range(5, 25))
    twice = prune(once, record_of(once), keep=[0, 19])
    np.testing.assert_array_equal(numbers(twice), own[[5, 24]])
    if kind != 'table': np.testing.assert_array_equal(item_source(twice.train.dataset), [5, 24] if kind == 'plain' else [SPLITS[0][5], SPLITS[0][24]])
    relabelled = relabel(once, record_of(once), {19: int((own[24] + 1) % C) if kind != 'Datasets' else 'abc'[(own[24] + 1) % C]})
    assert contents(relabelled.train.dataset)[19][-1] == (own[24] + 1) % C

def test_pruned_loaders_can_be_copied_and_predicted():
    dls = DLS['plain']()
    pruned = prune(dls, record_of(dls), keep=.5)
    copy.deepcopy(pruned)
    learn = quiet(Learner(pruned, Through(), loss_func=XentLossFlat()))
    assert len(learn.get_preds(ds_idx=0)[0]) == 20

def test_vocab_and_decoding_survive():
    dls = DLS['unsplit']()
    record = record_of(dls)
    pruned, relabelled = prune(dls, record, keep=.5), relabel(dls, record, {0: 'b'})
    for o in (pruned, relabelled): assert (o.vocab, o.n_inp, o.train_ds.decode(o.train_ds[0])[1]) == (dls.vocab, 1, 'abc'[int(o.train_ds[0][1])])

def test_subsets_have_names_and_sources():
    dsets = Datasets(FILES, [[Logits()], [Label(), Categorize()]], splits=SPLITS)
    sub = torch.utils.data.Subset(torch.utils.data.Subset(dsets.train, [3, 1, 2]), [2, 0])
    assert items_frame(sub)['source'].tolist() == [SPLITS[0][2], SPLITS[0][3]] and item_names(sub) == [str(FILES[SPLITS[0][i]]) for i in (2, 3)]
    assert item_names(torch.utils.data.Subset(Coded(9), [4])) is None
    assert item_names(sub, lambda p: f'photo {p.stem}')[0] == f'photo {FILES[SPLITS[0][2]].stem}'


# -- what was done, in one table

@pytest.mark.parametrize('kind', DLS)
def test_all_acts_give_the_same_kind_of_result(kind):
    set_seed(0)
    dls = DLS[kind]()
    record, own = record_of(dls), numbers(dls)
    items, seen = record.items(), ~np.isnan(record.score(dynamics.Label()))
    does = dict(drop=lambda d: prune(d, record, n_drop=3), relabel=lambda d: relabel(d, record, {2: int((own[2] + 1) % C), 5: int((own[5] + 2) % C)}), reweight=lambda d: reweight(d, record, np.arange(N) + 1.))
    if kind in ('PartialDL', 'SortedDL', 'TfmdLists'): does.pop('reweight')    # loaders in an order of their own, or none
    for what, act in does.items():
        new = act(dls)
        df = new.xent_changes
        assert type(new) is type(dls) and list(df) == CHANGES and set(df['what']) == {what} and 'xent_changes' not in vars(dls)
        pd.testing.assert_frame_equal(df[['item', 'name', 'source']], items.iloc[df['item']].reset_index(drop=True), check_dtype=False)
        assert df['old'].tolist() == [record._class_name(c) if what == 'relabel' or seen[i] else None for i, c in zip(df['item'], own[df['item']] % C)] and df['why'].notna().all()
    df = does['drop'](dls).xent_changes
    assert len(df) == 3 and (df['weight'] == 0).all() and df['new'].tolist() == [None] * 3
    np.testing.assert_array_equal(df['score'], record.score(RANK_BY)[df['item']])
    df = does['relabel'](dls).xent_changes
    assert df['item'].tolist() == [2, 5] and df['new'].tolist() == [record._class_name((own[i] + k) % C) for i, k in ((2, 1), (5, 2))] and df['weight'].isna().all()
    if 'reweight' in does:
        df = does['reweight'](dls).xent_changes
        w = (np.arange(N) + 1.) * (np.arange(N) + 1. if kind == 'WeightedDL' else 1)
        np.testing.assert_allclose(df['weight'], w / w.mean())

def test_one_act_after_another(ranked):
    dls, record = ranked
    first = relabel(dls, record, {0: 1, 3: 1})
    both = prune(reweight(first, record), record, drop=[0])
    assert both.xent_changes['what'].tolist() == ['relabel'] * 2 + ['reweight'] * N + ['drop'] and len(first.xent_changes) == 2
    assert both.xent_changes.dtypes.equals(first.xent_changes.dtypes)
    assert int(both.train_ds[2][1]) == 1 and len(both.train.wgts) == N - 1
    copy.deepcopy(both)

def test_the_table_is_an_order_that_can_be_given_again(ranked, tmp_path):
    "Saved, read, and handed to `relabel`: the same labels."
    dls, record = ranked
    first = relabel(dls, record, record.top(6))
    first.xent_changes.to_csv(tmp_path / 'done.csv', index=False)
    again = relabel(dls, record, pd.read_csv(tmp_path / 'done.csv'))
    assert contents(again.train.dataset) == contents(first.train.dataset)
    pd.testing.assert_frame_equal(again.xent_changes, first.xent_changes)


# -- nothing is done quietly

class Own(torch.nn.Module):
    "A loss of one's own, which has no loss of a row."
    def forward(self, z, y): return torch.nn.functional.cross_entropy(z, y).sqrt()

@pytest.mark.filterwarnings('ignore:XentRecorder')
def test_a_score_that_no_item_has_is_an_error():
    dls = of(TfmdDL(Farther(N), bs=4, shuffle=True, num_workers=0))
    record = record_of(dls, loss=Own())
    words = r"no item of 'train' has the score '{}': the record has nothing in `{}`.*; it has the scores margin_loss, el2n, aum"
    for by, hint in (('loss', '.*use one such as `XentLossFlat`'), ('grad_norm', '.*use one such as'), ('last_loss', ''), ('grand', ".*XentRecorder.head='auto'.")):
        for kw in (dict(drop=.2), dict(keep=.5), dict(n_drop=3), dict(n_keep=3), dict(drop=lambda df: df['score'] > 0)):
            with pytest.raises(ValueError, match=words.format(by, by.replace('last_', '')) if not hint else f"score '{by}'.*{hint}"): prune(dls, record, by=by, **kw)
    with pytest.raises(ValueError, match="no item of 'train' has the score 'Odd'"): prune(dls, record, drop=.2, by=Odd('grand'))
    record.score = lambda by=None, *_: np.full(N, np.nan)
    with pytest.raises(ValueError, match="no item of 'train' has the score 'suspicion'"): reweight(dls, record)

class Odd(dynamics.MeanColumn):
    @property
    def key(self): return 'odd'

@pytest.mark.parametrize('kw, words', [
    (dict(drop=.01), "all 40 training items stay: none is among the first 0.01 of 40 items with the score 'suspicion'"), (dict(drop=0.), 'none is among the first 0.0 of 40 items'),
    (dict(n_drop=0), 'none is among the first 0 of 40 items'),
    (dict(keep=1.), 'all are among the first 1.0 of 40 items'), (dict(keep=.99), 'all are among the first 0.99'),
    (dict(n_keep=40), 'all are among'),
    (dict(drop=[]), 'none is named by `drop`'), (dict(keep=range(N)), 'all are named by `keep`'),
    (dict(drop=np.zeros(N, dtype=bool)), 'none is named'),
    (dict(drop=pd.DataFrame({'item': [1], 'is_issue': [False]})), 'none is named'),
    (dict(drop=lambda df: df[df['score'] > 1e9]), 'none is named'),
    (dict(drop=.02, balanced=True), 'none is among the first 0.02 of 40')])
def test_pruning_nothing_is_told(ranked, told, kw, words):
    assert left(prune(*ranked, **kw)) == list(range(N))
    message, = told()
    assert message.startswith('prune: all 40 training items stay: ') and words in message

def test_classes_too_small_for_their_share_are_told(told):
    class Skewed(Farther):
        def __getitem__(self, i): return super().__getitem__(i)[0], torch.tensor(0 if i < 30 else 1 if i < 37 else 2)
    dls = of(TfmdDL(Skewed(N), bs=4, shuffle=True, num_workers=0))
    record = record_of(dls)
    told()
    assert len(left(prune(dls, record, drop=.15, balanced=True))) == N - 4 - 1
    assert told() == ['prune: no item of class 2 is dropped: the share of so few comes to none']

@pytest.mark.parametrize('weights', [np.ones(N), np.full(N, 3), pd.DataFrame({'item': range(N), 'weight': 2.}),
                                     pd.DataFrame({'item': [3, 5], 'p_wrong': [np.nan, 0]}),
                                     pd.DataFrame({'item': [], 'weight': []})],
                         ids=['ones', 'threes', 'frame', 'never seen', 'empty'])
def test_weights_that_change_nothing_are_told(ranked, told, weights):
    reweight(*ranked, weights)
    assert told() == ['reweight: no item is drawn more often or less often than before']
    by_class = np.array([1., 2., 3.])[np.arange(N) % C]
    reweight(*ranked, by_class)
    assert told() == []
    reweight(*ranked, by_class, balanced=True)        # within its class each is as heavy as the others
    assert told() == ['reweight: no item is drawn more often or less often than before']

@pytest.mark.parametrize('issues, words', [
    ({}, '0 items are named, of which 0 are given none'), ({1: 1, 2: 2}, '2 items are named, of which 0'),
    ({1: None, 2: 2}, '2 items are named, of which 1 are given none'),
    (pd.DataFrame({'item': [3], 'likely': [None]}), 'of which 1'),
    (pd.DataFrame({'item': [3], 'new': [np.nan]}), 'of which 1')])
def test_relabelling_nothing_is_told(ranked, told, issues, words):
    assert contents(relabel(*ranked, issues).train_ds) == contents(ranked[0].train_ds)
    message, = told()
    assert words in message


# -- classes are names, through every file

VOCABS = {'1 to 12': [str(i) for i in range(1, 13)], 'numbers': list(range(1, 13)), 'words': list('abcdefghijkl'), 'zeros': [f'{i:03}' for i in range(1, 13)], 'numbers, from an old record': list(range(1, 13))}

class Many:
    "Items of twelve classes."
    n_inp = 1
    def __init__(self, n=48): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        if not 0 <= i < self.n: raise IndexError(i)
        return torch.nn.functional.one_hot(torch.tensor((i * 5 + 3) % 12), 12).float() * (1 + i / 10), torch.tensor(i % 12)

@pytest.fixture(scope='module', params=VOCABS)
def twelve(request):
    vocab, dls = VOCABS[request.param], DataLoaders(*(TfmdDL(Many(), bs=8, shuffle=True, num_workers=0) for _ in range(2)))
    dls.vocab = vocab
    record = record_of(dls, 2)
    if 'old' in request.param: record.meta['vocab'] = [str(o) for o in vocab]
    return dls, record, vocab

FILES_OF = {
    'frame': lambda df, p: df,
    'csv': lambda df, p: (df.to_csv(p, index=False), pd.read_csv(p))[1],
    'csv as text': lambda df, p: (df.to_csv(p, index=False), pd.read_csv(p, dtype=str))[1],
    'json': lambda df, p: (df.to_json(p), pd.read_json(p))[1],
    'json lines': lambda df, p: (df.to_json(p, orient='records', lines=True),
                                 pd.read_json(p, orient='records', lines=True))[1],
    'parquet': lambda df, p: (df.to_parquet(p), pd.read_parquet(p))[1],
    'floats': lambda df, p: df.assign(likely=[float(o) if str(o).isdigit() else o for o in df['likely']]),
    'dict of json': lambda df, p: json.loads(json.dumps({str(k): str(v) for k, v in zip(df['item'], df['likely'])}))}

@pytest.mark.parametrize('road', FILES_OF)
@pytest.mark.parametrize('hole', [False, True])
def test_a_review_comes_back(twelve, road, hole, tmp_path):
    dls, record, vocab = twelve
    found = record.top(30)[['item', 'likely', 'targ']].assign(is_issue=True)
    if hole and road != 'dict of json': found.loc[3, 'likely'] = None
    back = FILES_OF[road](found, tmp_path / 'review')
    audit = relabel(dls, record, back).xent_changes
    want = [a if b is None or b != b else b for a, b in zip(found['targ'], found['likely'])]
    assert audit['new'].tolist() == [type(record.meta['vocab'][0])(o) for o in want] and audit['old'].tolist() == found['targ'].tolist()

def test_flags_come_back_as_text(twelve, tmp_path):
    "A column of true and false that was read as text is no column of true."
    dls, record, _ = twelve
    found = record.top(4).assign(is_issue=[True, False, False, True])
    for kind in ('str', 'upper', 'int', 'float'):
        flags = found['is_issue'].astype(str).str.upper() if kind == 'upper' else found['is_issue'].astype(kind)
        back = found.assign(is_issue=flags)
        assert len(relabel(dls, record, back).xent_changes) == 2 and len(prune(dls, record, drop=back).train_ds) == 46

def test_a_number_that_is_a_name_and_a_place(twelve):
    dls, record, vocab = twelve
    if vocab[0] == 'a': assert relabel(dls, record, {0: 2}).xent_changes['new'].tolist() == ['c']
    else:
        with pytest.raises(ValueError, match="item 0 cannot get this label: 2 may be two classes: the one called '?0*2'?, or the one at place 2, called '?0*3'?; write its name as text"): relabel(dls, record, {0: 2})
        for o in ('2', '2 ', '002', '2.0'): assert int(relabel(dls, record, {0: o}).train_ds[0][1]) == 1
        assert int(relabel(dls, record, {0: 12}).train_ds[0][1]) == 11        # no place 12

def test_a_class_that_a_file_has_lost():
    dls = DLS['plain']()
    dls.vocab = ['NA', 'b', 'c']
    record = record_of(dls)
    back = pd.DataFrame({'item': [1, 2], 'likely': [np.nan, 'b']})
    with pytest.raises(ValueError, match="item 1 cannot get this label: .*pandas reads the class 'NA' as missing"): relabel(dls, record, back)
    assert relabel(dls, record, {1: None, 2: 'b'}).xent_changes['new'].tolist() == ['b', 'b']

def test_labels_are_named_without_a_vocab(ranked):
    for o in (1, '1', 1., np.int8(1), torch.tensor(1)): assert int(relabel(*ranked, {0: o}).train_ds[0][1]) == 1


# -- labels are replaced, not rebuilt

Sample = namedtuple('Sample', 'x y')
@dataclass
class Data:
    x: object
    y: object

ITEMS = {'tuple': lambda x, y: (x, y), 'list': lambda x, y: [x, y], 'namedtuple': Sample, 'dict': lambda x, y: {'input_ids': x, 'labels': y}, 'dataclass': Data}
KINDS = {
    'tensor': torch.tensor, 'int8': lambda c: torch.tensor(c, dtype=torch.int8),
    'column': lambda c: torch.tensor([c]), 'array': np.array, 'array column': lambda c: np.array([c]),
    'np.int64': np.int64,
    'np.uint8': np.uint8, 'int': int, 'text': lambda c: 'abc'[c], 'TensorCategory': TensorCategory,
    'Category': lambda c: Category('abc'[c])}

class Kinds(Coded):
    "Items of any container with labels of any kind."
    def __init__(self, n, item, kind):
        super().__init__(n)
        self.item, self.kind = item, kind
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return ITEMS[self.item](x, KINDS[self.kind](int(y)))

def pair(item):
    "Input and class of an item."
    x, y = (item['input_ids'], item['labels']) if isinstance(item, dict) else (item.x, item.y) if isinstance(item, (Data, Sample)) else item
    return x, torch.tensor('abc'.index(y) if isinstance(y, str) else int(np.asarray(y).reshape(())))

def stack(items):
    xs, ys = zip(*map(pair, items))
    return torch.stack(xs), torch.stack(ys)

def loaders_of(item, kind, loader):
    if loader == 'torch': dls = [torch.utils.data.DataLoader(Kinds(N, item, kind), batch_size=4, shuffle=True, collate_fn=stack) for _ in range(2)]
    else: dls = [TfmdDL(Kinds(N, item, kind), bs=4, shuffle=True, num_workers=0, create_batch=stack) for _ in range(2)]
    dls = DataLoaders(*dls)
    dls.vocab = list('abc')
    return dls

@pytest.mark.grid
@pytest.mark.parametrize('loader', ['torch', 'fastai'])
@pytest.mark.parametrize('item', ITEMS)
@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_label(item, kind, loader):
    dls = loaders_of(item, kind, 'torch' if item == 'namedtuple' else loader)    # fastai cannot make a batch of namedtuples
    record, before = record_of(dls, 2), [str(dls.train_ds[i]) for i in range(N)]
    key = {'dict': 'labels', 'dataclass': 'y'}.get(item)
    new = {3: 'b', 4: 'c', 8: 'a'}
    if key is not None:
        names = 'input_ids, labels' if item == 'dict' else 'x, y'
        with pytest.raises(TypeError, match=f"have {names}; say which is the label, such as `key='{key}'`"): relabel(dls, record, new)
        with pytest.raises(KeyError, match=f"no 'target'; they have {names}"): relabel(dls, record, new, key='target')
    relabelled = relabel(dls, record, new, key=key)
    assert [int(pair(relabelled.train_ds[i])[1]) for i in range(N)] == ['abc'.index(new[i]) if i in new else i % C for i in range(N)]
    for i in new:
        was, now = dls.train_ds[i], relabelled.train_ds[i]
        y_was, y_now = ((o['labels'] if item == 'dict' else o.y if item == 'dataclass' else o[1]) for o in (was, now))
        assert type(was) is type(now) and label_kind(y_was) == label_kind(y_now) and torch.equal(pair(was)[0], pair(now)[0])
    assert [str(dls.train_ds[i]) for i in range(N)] == before
    again = record_of(relabelled, 1)
    assert again.score(dynamics.Label()).tolist() == ['abc'.index(new[i]) if i in new else i % C for i in range(N)]
    assert len(prune(dls, record, n_drop=5).train_ds) == N - 5    # needs no label
    weighted = reweight(dls, record, np.arange(N) + 1.)
    assert next(iter(weighted.train))[0].shape == (4, C)

def test_parts_that_a_collate_function_leaves_out():
    "The label is the first part that is no input, by what the batches have."
    class Weighted:
        def __len__(self): return N
        def __getitem__(self, i): return *coded(int(i)), torch.tensor(7)
    def two(items): return torch.stack([o[0] for o in items]), torch.stack([o[1] for o in items])
    dls = DataLoaders(*(TfmdDL(Weighted(), bs=4, shuffle=True, num_workers=0, create_batch=two) for _ in range(2)))
    record = record_of(dls, 1)
    x, y, w = relabel(dls, record, {0: 2}).train_ds[0]
    assert (int(y), int(w)) == (2, 7)

def test_labels_that_a_collate_function_changes():
    "Classes are counted from 1 in the dataset, from 0 in the loss: what the dataset calls 2 is class 1."
    class From1(Coded):
        items = [f'{i}.png' for i in range(N)]
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x, y + 1
    def less(items): return torch.stack([x for x, _ in items]), torch.stack([y - 1 for _, y in items])
    dls = DataLoaders(*(TfmdDL(From1(N), bs=4, shuffle=True, num_workers=0, create_batch=less) for _ in range(2)))
    record = record_of(dls, 1)
    with pytest.raises((ValueError, TypeError), match='have the label . in the dataset: something after it changes labels|no single class'): relabel(dls, record, {0: 2})
    class Swapped(Coded):
        items = From1.items
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x, 2 - y
    def back(items): return torch.stack([x for x, _ in items]), torch.stack([2 - y for _, y in items])
    dls = DataLoaders(*(TfmdDL(Swapped(N), bs=4, shuffle=True, num_workers=0, create_batch=back) for _ in range(2)))
    record = record_of(dls, 1)
    for new in ({0: 0}, {0: 1}):                      # item 0 was trained as class 0, and is 2 in the dataset
        with pytest.raises(ValueError, match='something after it changes labels'): relabel(dls, record, new)

def test_labels_that_were_corrected_since():
    "A few labels of named items may be others now: they count as they are."
    class Files(Coded):
        items, fixed = [f'{i}.png' for i in range(N)], {}
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x, torch.tensor(self.fixed.get(i, int(y)))
    dls = of(TfmdDL(Files(N), bs=4, shuffle=True, num_workers=0))
    record = record_of(dls, 1)
    Files.fixed = {0: 2, 4: 0}
    audit = relabel(dls, record, {0: 2, 3: 1}).xent_changes
    assert audit['old'].tolist() == [2, 0] and audit['why'].tolist() == ['has this label already: kept', 'given']

def test_a_container_that_does_not_come_back_is_refused():
    class Proud(tuple):
        "Says of every second part that it is the first."
        def __new__(cls, parts): return super().__new__(cls, (list(parts)[0], torch.tensor(0)))
    class Proudly(Coded):
        items = [f'{i}.png' for i in range(N)]
        def __getitem__(self, i): return Proud(super().__getitem__(i))
    dls = DataLoaders(*(torch.utils.data.DataLoader(Proudly(N), batch_size=4, shuffle=True, collate_fn=stack) for _ in range(2)))
    record = record_of(dls, 1)
    with pytest.raises(TypeError, match='item 5 was read back as .*Proud.*expected class 1 .*cannot be relabelled here'): relabel(dls, record, {5: 1})

def test_a_column_too_narrow_is_refused():
    table = tab_dls()
    record = record_of(table)
    record.meta.update(vocab=None, classes=300)
    table.train.dataset.items['label'] = table.train.dataset.items['label'].astype('int8')
    with pytest.raises(TypeError, match='cannot hold class 200'): relabel(table, record, {0: 200})

def test_items_that_are_read_in_batches(told):
    "As of a dataset of time series: the loader asks for several items at once."
    class Series(Coded):
        def __init__(self, n):
            super().__init__(n)
            self.x, self.y = coded(torch.arange(n))
        def __getitem__(self, i): return self.x[i], self.y[i]
    class AtOnce(TfmdDL):
        def __init__(self, *args, weights=None, **kw):
            self.weights = weights
            super().__init__(*args, **kw)
        def do_item(self, s): return s
        def create_batch(self, b): return self.dataset[list(b)]
        def new(self, dataset=None, cls=None, **kw): return super().new(dataset, cls, **{'weights': self.weights, **kw})
    def make(ds, **kw): return AtOnce(ds, bs=4, shuffle=True, num_workers=0, **kw)
    for weights in (None, np.ones(N) / N):
        dls = DataLoaders(make(Series(N), weights=weights), make(Series(8)))
        record = record_of(dls, 2)
        relabelled = relabel(dls, record, {0: 1, 7: 2})
        rows = [(int(y), *x.tolist()) for xb, yb in relabelled.train for x, y in zip(xb, yb)]
        want = [({0: 1, 7: 2}.get(i, i % C), *coded(i)[0].tolist()) for i in range(N)]
        assert sorted(rows) == sorted(want)
        pruned = prune(relabelled, record, keep=[0, 7, 9])
        assert sorted(y for _, yb in pruned.train for y in yb.tolist()) == [0, 1, 2] and (weights is None or len(pruned.train.weights) == 3)
    dls.train.sampler = [1, 2, 3]
    with pytest.raises(TypeError, match='AtOnce with a list, which has its own choice of items'): prune(dls, record, keep=[1])

def test_attributes_of_the_dataset_are_not_those_of_the_loader():
    "A dataset may have `wgts`, `res` or `partial_n` of its own."
    class Busy(Coded): wgts, res, sort_func, partial_n, weights = 'mine', 'mine', 'mine', 'mine', 'mine'
    dls = of(TfmdDL(Busy(N), bs=4, shuffle=True, num_workers=0))
    record = record_of(dls, 1)
    assert len(prune(dls, record, n_keep=7).train_ds) == 7 and len(reweight(dls, record, np.arange(N)).train.wgts) == N

def test_a_record_made_by_hand_need_not_say_its_classes(ranked):
    dls, record = ranked
    hand = XentWriter()
    hand.set_items('train', record.items(), 'mark')
    for e in range(2):
        rows = record.to_df('train', e)
        hand.write(0, e, 'train', {o: rows[o].to_numpy() for o in ('item', 'targ', 'pred', 'margin')})
    hand = hand.record
    assert hand.meta['classes'] is None
    assert left(prune(dls, hand, n_drop=2)) == list(range(2, N)) and int(relabel(dls, hand, {0: 2}).train_ds[0][1]) == 2
    with pytest.raises(ValueError, match='3 is no class; expected one of 0, 1, 2'): relabel(dls, hand, {0: 3})

def test_acts_need_no_recorder():
    for module in (acts, chosen, datasets, classes): assert 'recorder import' not in Path(module.__file__).read_text(encoding='utf-8')


# -- as a person makes them: a DataBlock, a table

class Third:
    "The label of item i, one of `names`."
    def __init__(self, names): self.names = names
    def __call__(self, i): return self.names[i % len(self.names)]
class Margins:
    def __call__(self, i): return coded(int(i))[0]
class First(Through):
    "The first of the logits, as many as there are classes."
    def __init__(self, c):
        super().__init__()
        self.c = c
    def forward(self, *xs): return super().forward(*xs)[:, :self.c]

def block(names):
    dblock = DataBlock((TransformBlock, CategoryBlock), get_items=lambda n: list(range(n)), get_x=Margins(),
                       get_y=Third(names), splitter=IndexSplitter(range(N, N + 8)))
    return dblock.dataloaders(N + 8, bs=4, num_workers=0)

def rows(names):
    df = pd.concat([frame()] * 2)[:N + 8].assign(label=[names[i % len(names)] for i in range(N + 8)])
    table = TabularPandas(df, cont_names=[f'x{k}' for k in range(C)], y_names='label', y_block=CategoryBlock(),
                          splits=(list(range(N)), list(range(N, N + 8))))
    return table.dataloaders(bs=4, num_workers=0)

NAMES = [[10, 20, 700], [1, 2, 3], ['1', '2', '3'], ['01', '02', '10'], [True, False], ['x', 'y', 'z'], [1.5, 2.5, 3.]]

@pytest.mark.parametrize('names', NAMES, ids=str)
@pytest.mark.parametrize('make', [block, rows])
def test_from_labels_to_a_review_and_back(make, names, tmp_path):
    "Labels of every type keep their type in the record, and come back from a file as those they were."
    set_seed(0)
    dls, epochs = make(names), 2 if make is block else 8     # a table's loader of fastai draws with repeats
    record = record_of(dls, epochs, model=First(len(names)))
    own = [o if isinstance(o, (int, str)) else str(o) for o in names]
    was = record.top(N)
    assert was['targ'].tolist() == [own[i % len(own)] for i in was['item']]
    assert set(record.meta['vocab']) == set(own) and {type(o) for o in record.meta['vocab']} == {type(own[0])}
    issues = was[:6][['item']].assign(new=[own[(i + 1) % len(own)] for i in was[:6]['item']])
    issues.to_csv(tmp_path / 'review.csv', index=False)
    relabelled = relabel(dls, record, pd.read_csv(tmp_path / 'review.csv'))
    assert relabelled.xent_changes['new'].tolist() == issues['new'].tolist()
    now = record_of(relabelled, epochs, model=First(len(names))).top(N).set_index('item')['targ']
    assert now[issues['item']].tolist() == issues['new'].tolist()
    assert (now.sort_index() != pd.Series([own[i % len(own)] for i in range(N)])).sum() == 6


# -- frames of other items

def test_a_frame_of_another_split_is_refused(tmp_path):
    "Its numbers are other items in train. What a file made of a right frame is right."
    dls = of(TfmdDL(Coded(N), bs=4, shuffle=True, num_workers=0))
    record = record_of(dls)
    acts = dict(prune=lambda f: prune(dls, record, drop=f), relabel=lambda f: relabel(dls, record, f),
                reweight=lambda f: reweight(dls, record, f.assign(weight=.5)))
    valid = record.top(4, split='valid')
    for act in acts.values():
        with pytest.raises(ValueError, match="items of 'valid', and only those of 'train'"): act(valid)
        with pytest.raises(ValueError, match="items of 'valid', and only those of 'train'"): act(valid.assign(split='valid'))
    with pytest.raises(ValueError, match="items of 'valid'"): prune(dls, record, drop=record.to_df('valid', -1))
    train = record.top(4)
    for act in acts.values():
        assert len(act(train).xent_changes) >= 1
        train.to_csv(tmp_path/'t.csv', index=False)
        assert len(act(pd.read_csv(tmp_path/'t.csv')).xent_changes) >= 1
        other = [o for o in record.vocab or range(record._n_classes)]
        wrong = train.assign(targ=[next(c for c in other if str(c) != str(t)) for t in train['targ']])
        wrong.attrs = {}
        with pytest.raises(ValueError, match="the frame's `targ` of item"): act(wrong)
    assert len(prune(dls, record, drop=record.to_df('train', -1).head(3)).xent_changes) == 3
