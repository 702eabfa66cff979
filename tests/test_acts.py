"Acts on a record: the right items, through every kind of dataset and loader, and nothing changed in place."
import copy
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.core import DataLoaders, Datasets, TfmdDL, TfmdLists
from fastai.data.transforms import Categorize, ToTensor
from fastai.learner import Learner
from fastai.tabular.core import TabDataLoader, TabularPandas
from fastai.data.block import CategoryBlock
from fastai.text.data import SortedDL
from fastai.torch_core import set_seed
from helpers import C, MIDDLE, Coded, Points, Through, coded, learner, quiet, rng_state, wrong_rows

from fastai_xent.acts import check_items, items_named, prune, relabel, reweight
from fastai_xent import dynamics
from fastai_xent.items import item_names, item_source, items_frame
from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder

N = 40
pytestmark = pytest.mark.filterwarnings('ignore:prune leaves no training item')  # with so few items; one test asks for it


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
    'Datasets': lambda: Datasets(FILES, [[Logits()], [Label(), Categorize()]], splits=SPLITS).dataloaders(bs=4, after_item=ToTensor, num_workers=0, drop_last=False),
    'TfmdLists': lambda: TfmdLists(FILES, [Pair()], splits=SPLITS).dataloaders(bs=4, num_workers=0, drop_last=False),
    'unsplit': lambda: of(TfmdDL(Datasets(FILES[:N], [[Logits()], [Label(), Categorize()]]), bs=4, shuffle=True, num_workers=0, after_item=ToTensor())),
    'plain': lambda: of(TfmdDL(Coded(N), bs=4, shuffle=True, num_workers=0)),
    'workers': lambda: of(TfmdDL(Coded(N), bs=4, shuffle=True, num_workers=2)),
    'Subset': lambda: of(TfmdDL(torch.utils.data.Subset(Coded(2 * N), range(N)), bs=4, shuffle=True, num_workers=0)),
    'WeightedDL': lambda: of(WeightedDL(Coded(N), wgts=np.arange(N) + 1., bs=4, shuffle=True, num_workers=0)),
    'PartialDL': lambda: of(PartialDL(Coded(N), partial_n=30, bs=4, shuffle=True, num_workers=0)),
    'SortedDL': lambda: of(SortedDL(Coded(N), res=[i * 7919 % 101 for i in range(N)], bs=4, shuffle=True, num_workers=0)),
    'torch': lambda: DataLoaders(torch.utils.data.DataLoader(Coded(N), batch_size=4, shuffle=True), torch.utils.data.DataLoader(Coded(7), batch_size=4)),
    'table': tab_dls}

def record_of(dls, epochs=3):
    learn = quiet(Learner(dls, Through(), loss_func=XentLossFlat(), cbs=XentRecorder(), lr=.1))
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
    relabelled, audit = relabel(dls, record, new)
    after = contents(relabelled.train.dataset)
    for i in range(N):
        label = after[i][-1]
        assert label == new.get(i, own[i] % C) and after[i][:-1] == before[i][:-1]
    assert contents(dls.train.dataset) == before and relabelled.valid is dls.valid
    assert audit['item'].tolist() == list(new)
    named = [record.class_name(c) for c in (own[list(new)] % C)]
    assert audit['old'].tolist() == named and audit['new'].tolist() == [record.class_name(c) for c in new.values()]
    assert audit['why'].tolist() == ['the given label is the likely one: kept' if own[i] % C == c else 'given' for i, c in new.items()]
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
    plain, balanced = reweight(dls, record).train.wgts, reweight(dls, record, balanced=True).train.wgts
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
    assert left(prune(dls, record, keep=1.)) == left(prune(dls, record, drop=0.)) == list(range(40))

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

def test_items_that_were_never_seen_stay():
    dls = of(TfmdDL(Farther(N, skip=[1, 30]), bs=4, num_workers=0))
    record = record_of(dls)
    assert left(prune(dls, record, keep=.5, by='el2n')) == [*range(20), 30]
    assert left(prune(dls, record, drop=.5)) == [1, *range(20, 40)]

def test_a_class_without_items_is_told(ranked):
    with pytest.warns(UserWarning, match='no training item of class 1, 2'): prune(*ranked, keep=[0, 3, 6])
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
    (dict(), ValueError, 'give one of'), (dict(keep=.5, drop=.1), ValueError, 'give one of'), (dict(keep=1.5), ValueError, 'the share is 1.5'),
    (dict(keep=0.), ValueError, 'no training item would be left'), (dict(keep=[N]), IndexError, 'item 40 does not exist'), (dict(keep=[-1]), IndexError, 'item -1 does not exist'),
    (dict(keep=1), TypeError, 'a share is a float'), (dict(drop=0), TypeError, 'a share is a float'), (dict(keep=np.ones(3, dtype=bool)), ValueError, r'shape \[3\], expected \[40\]'), (dict(keep=[.5, .7]), TypeError, 'expected whole numbers'),
    (dict(keep=pd.Series([True] * N)), TypeError, 'does not say which items'), (dict(keep=[1], balanced=True), ValueError, 'needs a share'),
    (dict(keep=.5, by='beauty'), KeyError, "no score is called 'beauty'")])
def test_prune_refuses(ranked, kw, error, words):
    with pytest.raises(error, match=words): prune(*ranked, **kw)

@pytest.mark.parametrize('weights, error, words', [
    (np.ones(3), ValueError, r'shape \[3\], expected \[40\]'), (-np.ones(N), ValueError, 'not negative'), (np.zeros(N), ValueError, 'not all zero'),
    (np.full(N, np.nan), ValueError, 'finite'), (pd.DataFrame({'item': [1]}), KeyError, 'no column `weight` or `p_wrong`')])
def test_reweight_refuses(ranked, weights, error, words):
    with pytest.raises(error, match=words): reweight(*ranked, weights)

@pytest.mark.parametrize('issues, error, words', [
    ({1: 3}, ValueError, 'item 1 cannot get the label 3; expected a class from 0 to 2'), ({1: 'a'}, ValueError, "the label 'a'"), ({1: 1.5}, ValueError, 'the label 1.5'),
    ({N: 1}, IndexError, 'item 40 does not exist'), (pd.DataFrame({'item': [1]}), KeyError, 'no column `new` or `likely`'),
    (pd.DataFrame({'item': [1, 1], 'new': [0, 1]}), ValueError, 'item 1 is named twice')])
def test_relabel_refuses(ranked, issues, error, words):
    with pytest.raises(error, match=words): relabel(*ranked, issues)

def test_relabel_by_a_frame(ranked):
    dls, record = ranked
    issues = record.top(5).assign(is_issue=[True, True, False, True, True], p_wrong=[.9, .8, .7, .6, .5])
    issues.loc[1, 'likely'] = None                    # never predicted: nothing is known
    issues.loc[3, 'likely'] = issues.loc[3, 'targ']
    _, audit = relabel(dls, record, issues)
    assert audit['item'].tolist() == [0, 1, 3, 4] and audit['p_wrong'].tolist() == [.9, .8, .6, .5]
    assert (audit['old'] == audit['new']).tolist() == [False, True, True, False]
    assert list(audit) == ['item', 'name', 'source', 'old', 'new', 'p_wrong', 'why']

def test_nothing_to_relabel(ranked):
    dls, record = ranked
    same, audit = relabel(dls, record, record.top(5).assign(is_issue=False))
    assert len(audit) == 0 and contents(same.train.dataset) == contents(dls.train.dataset)


# -- the same items?

def test_other_items_are_refused():
    record = record_of(DLS['Datasets']())
    other = Datasets(FILES, [[Logits()], [Label(), Categorize()]], splits=[list(range(N)), [N]]).dataloaders(bs=4, num_workers=0)
    for act in (lambda d: prune(d, record, keep=.5), lambda d: reweight(d, record), lambda d: relabel(d, record, {0: 'a'})):
        with pytest.raises(ValueError, match="not those of the record: 40 of 40 differ, the first is item 0, '79.png' then and '0.png' now"): act(other)

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
    with pytest.raises(ValueError, match='the classes are b, a, c, … and were a, b, c, …'): prune(other, record, keep=.5)

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
    with pytest.raises(TypeError, match='item 3 has no single class'): relabel(of(TfmdDL(Masks(N), bs=4, num_workers=0)), record, {3: 1})


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
    relabelled, _ = relabel(once, record_of(once), {19: int((own[24] + 1) % C) if kind != 'Datasets' else 'abc'[(own[24] + 1) % C]})
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
    pruned, (relabelled, _) = prune(dls, record, keep=.5), relabel(dls, record, {0: 'b'})
    for o in (pruned, relabelled): assert (o.vocab, o.n_inp, o.train_ds.decode(o.train_ds[0])[1]) == (dls.vocab, 1, 'abc'[int(o.train_ds[0][1])])

def test_subsets_have_names_and_sources():
    dsets = Datasets(FILES, [[Logits()], [Label(), Categorize()]], splits=SPLITS)
    sub = torch.utils.data.Subset(torch.utils.data.Subset(dsets.train, [3, 1, 2]), [2, 0])
    assert items_frame(sub)['source'].tolist() == [SPLITS[0][2], SPLITS[0][3]] and item_names(sub) == [str(FILES[SPLITS[0][i]]) for i in (2, 3)]
    assert item_names(torch.utils.data.Subset(Coded(9), [4])) is None
    assert item_names(sub, lambda p: f'photo {p.stem}')[0] == f'photo {FILES[SPLITS[0][2]].stem}'
