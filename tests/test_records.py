"Several records side by side: which belong together, means and agreement over runs, against plain loops and scipy."
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai_xent.demo import digits
from fastai_xent.dynamics import get_score
from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder
from fastai_xent.records import XentRecords
from fastai_xent.record import XentRecord
from fastai_xent.writer import XentWriter
from helpers import quiet
from runs import put
from scipy.stats import spearmanr
from torch import nn

torch.set_num_threads(1)
N = 12

def items_of(n=N, names=True, order=None):
    "Items, with names or without."
    at = np.arange(n) if order is None else np.asarray(order)
    return pd.DataFrame({'item': np.arange(n), 'name': [f'{i}.png' for i in at] if names else None, 'source': at if names else None})

def record_of(margin, path=None, items=None, mark='mark', vocab=None, targ=None, pred=None, split='train', start=0):
    "A record with a row for each margin that is not nan: epochs × items."
    margin = np.atleast_2d(np.asarray(margin, dtype=float))
    n = margin.shape[1]
    writer = path if isinstance(path, XentWriter) else XentWriter(path)
    writer.set_items(split, items_of(n) if items is None else items, mark, vocab, start)
    targ = np.zeros(n, dtype=int) if targ is None else np.asarray(targ)
    for e, m in enumerate(margin):
        seen = np.flatnonzero(~np.isnan(m))
        p = 1 / (1 + np.exp(-m[seen]))
        won = (m[seen] <= 0).astype(int) if pred is None else np.asarray(pred)[seen]
        put(writer, 0, start + e, split, dict(item=seen, margin=m[seen], p_targ=p, el2n=2**.5 * (1 - p), loss=-np.log(p), pred=won, targ=targ[seen]))
    writer.close()
    return writer.record

def random_runs(seed, runs=4, epochs=3, n=N):
    "Records whose margins are drawn; each run misses some items in all epochs, and others in one."
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n)
    res = {}
    for r in range(runs):
        m = shared + rng.normal(size=(epochs, n))
        m[:, rng.integers(0, n, seed % 3)] = np.nan
        m[0, rng.integers(0, n, 2)] = np.nan
        res[f'run{r}'] = record_of(m)
    return XentRecords(res)


# -- which records belong together

def test_names(tmp_path):
    "Directories give their names; those that share one are told apart by their paths; records in memory are counted."
    paths = [tmp_path / o for o in ('a/seed0', 'a/seed1', 'b/seed0')]
    for k, o in enumerate(paths): record_of([[1., 2.]], o)
    assert list(XentRecords(paths[:2]).records) == ['seed0', 'seed1']
    assert list(XentRecords([paths[1], XentRecord(paths[0])]).records) == ['seed1', 'seed0']
    assert list(XentRecords(paths).records) == [str(o) for o in paths]
    assert list(XentRecords([record_of([[1., 2.]]), record_of([[1., 2.]])]).records) == ['0', '1']
    runs = XentRecords({'first': paths[2], 'second': record_of([[1., 2.]])})
    assert list(runs.records) == ['first', 'second'] and len(runs) == 2 and runs['first'].path == paths[2]
    with pytest.raises(ValueError, match='expected at least one record, got none'): XentRecords([])

def test_a_record_comes_once(tmp_path, monkeypatch):
    "Whatever its path is spelt like, on disk, on another file system or in memory; a copy is another record."
    monkeypatch.chdir(tmp_path)
    one, url = tmp_path / 'runs' / 'a', 'memory://once/a'
    (tmp_path / 'link').symlink_to(tmp_path / 'runs')
    memory, disk = record_of([[1., 2.]]), record_of([[1., 2.]], one)
    record_of([[1., 2.]], XentWriter(url, overwrite=True))
    same = [(one, one), (one, str(one)), (one, 'runs/a'), ('runs/a', './runs/../runs/a/'), (one, tmp_path / 'link' / 'a'), (disk, one),
            (disk, XentRecord(one)), (disk, disk), (memory, memory), (url, url), (url, 'memory:///once/a'), (one, f'file://{one}')]
    for a, b in same:
        for both in ([a, b], dict(first=a, second=b), [record_of([[1., 2.]]), a, b]):
            with pytest.raises(ValueError, match="the same record comes twice, as '.*' and '.*'; expected a record of each run"): XentRecords(both)
    assert len(XentRecords([memory, pickle.loads(pickle.dumps(memory)), disk, url])) == 4
    with pytest.raises(ValueError, match=r'two records have one name \(1, 1\); give a dict'): XentRecords({1: memory, '1': disk})

def test_wildcards(tmp_path):
    "On disk and on any file system that fsspec knows, sorted; what is no record is named."
    for k in (2, 0, 1): record_of([[1., k]], tmp_path / 'my rüns [1]' / f'seed{k}')
    (tmp_path / 'my rüns [1]' / 'notes.txt').write_text('not a record')
    found = XentRecords(tmp_path / 'my r*' / 'seed*')
    assert list(found.records) == ['seed0', 'seed1', 'seed2']
    assert [r.to_df()['margin'][1] for r in found.records.values()] == [0, 1, 2]
    with pytest.warns(UserWarning, match='skipped, as no record is there: .*notes.txt'): found = XentRecords(tmp_path / 'my r*' / '*')
    assert list(found.records) == ['seed0', 'seed1', 'seed2']
    with pytest.raises(FileNotFoundError, match='no record matches .*; in a list, a path is taken as it is'): XentRecords(tmp_path / 'my rüns [1]' / 'seed0')
    assert len(XentRecords([tmp_path / 'my rüns [1]' / 'seed0'])) == 1
    for k in (0, 1): record_of([[1., k]], XentWriter(f'memory://many/seed{k}', overwrite=True))
    found = XentRecords('memory://many/seed*')
    assert list(found.records) == ['seed0', 'seed1'] and [r.to_df()['margin'][1] for r in found.records.values()] == [0, 1]

OTHERS = {
    'name': (dict(items=items_of().assign(name=lambda d: d['name'].where(d['item'] != 7, 'x.png')), mark='other'), "1 of 12 items differ, the first is item 7: name '7.png' and 'x.png'"),
    'order': (dict(items=items_of(order=np.r_[0, 2, 1, 3:12]), mark='other'), "2 of 12 items differ, the first is item 1: name '1.png' and '2.png'"),
    'source': (dict(items=items_of().assign(source=lambda d: d['source'] + (d['item'] > 9)), mark='other'), '2 of 12 items differ, the first is item 10: source 10 and 11'),
    'names and none': (dict(items=items_of(names=False), mark='other'), "12 of 12 items differ, the first is item 0: name '0.png' and none"),
    'classes': (dict(vocab=['cat', 'fox']), r"have other classes: \['cat', 'dog'\] and \['cat', 'fox'\]"),
}

@pytest.mark.parametrize('name', OTHERS)
def test_other_items_are_refused(name):
    kw, why = OTHERS[name]
    one = record_of(np.ones(N), vocab=['cat', 'dog'])
    assert len(XentRecords([one, record_of(np.zeros(N), vocab=['cat', 'dog'])])) == 2
    with pytest.raises(ValueError, match=f"{'' if name == 'classes' else 'is not of the same items: '}.*{why}"): XentRecords([one, record_of(np.zeros(N), **kw)])

def test_other_numbers_of_items_are_refused():
    with pytest.raises(ValueError, match="'train' of runs 'a' and 'b' is not of the same items: 12 items and 11 items"): XentRecords(dict(a=record_of(np.ones(12)), b=record_of(np.ones(11))))

def test_a_shared_split_that_differs():
    "All splits that all runs have must be of the same items; one that a run lacks is left out."
    writers = [XentWriter() for _ in range(3)]
    a, b, c = (record_of(np.ones(N), o) for o in writers)
    record_of(np.ones(5), writers[0], split='valid')
    assert XentRecords([a, b]).splits == ['train']
    record_of(np.ones(5), writers[1], split='valid')
    assert XentRecords([a, b]).splits == ['train', 'valid'] and XentRecords([a, b, c]).splits == ['train']
    record_of(np.ones(6), writers[2], split='valid')
    with pytest.raises(ValueError, match="'valid' of runs '0' and '2'"): XentRecords([a, b, c])
    with pytest.raises(KeyError, match="not all runs have the split 'test'; all have: train, valid"): XentRecords([a, b]).mean(split='test')

def test_items_without_names():
    "They are told apart by the labels that both runs know."
    targ = np.arange(N) % 3
    kw = dict(items=items_of(names=False))
    one = record_of(np.ones(N), targ=targ, **kw)
    unseen = np.ones(N)
    unseen[4] = np.nan
    other = targ.copy()
    other[4] = 2
    assert len(XentRecords([one, record_of(unseen, targ=other, **kw)])) == 2        # its label of item 4 is not known
    with pytest.raises(ValueError, match='the items have no names, and 1 of 12 have other labels, the first is item 4: 1 and 2'): XentRecords([one, record_of(np.ones(N), targ=other, **kw)])

def test_the_last_segment_counts():
    "A run whose dataset has changed is compared by what it has now."
    writer = XentWriter()
    a, b = record_of(np.full(N, 3.)), record_of(np.full((5, N), -1.), writer, items=items_of(order=np.arange(N)[::-1]), mark='before')
    with pytest.raises(ValueError): XentRecords([a, b])
    record_of(np.full(N, 5.), writer, start=5)
    runs = XentRecords([a, b])
    assert (runs.mean('aum') == 4).all() and runs.top(1, 'aum')['likely'].tolist() == [0]
    writer = XentWriter()
    back = record_of(np.full((3, N), 5.), writer)      # these items, others, and these again
    record_of(np.full((9, N), -5.), writer, items=items_of(order=np.arange(N)[::-1]), mark='between', start=3)
    record_of(np.full((2, N), -1.), writer, start=12)
    assert XentRecords([back]).top(1, 'aum')['likely'].tolist() == back.top(1, 'aum')['likely'].tolist() == [0]


# -- folds

def folds_of(margin, k=3, names=True, **kw):
    "Records of a cross-validation: each fold has every k-th item in valid, the others in train, in an order of its own."
    n, rng, res = margin.shape[-1], np.random.default_rng(1), {}
    for f in range(k):
        out, into = rng.permutation(np.arange(f, n, k)), rng.permutation(np.setdiff1d(np.arange(n), np.arange(f, n, k)))
        writer = XentWriter()
        for split, at in (('train', into), ('valid', out)):
            items = pd.DataFrame({'item': range(len(at)), 'name': [f'{i}.png' for i in at] if names else None, 'source': at})
            record_of(margin[f][at], writer, items, mark=f'{split}{f}', split=split, targ=at % 2, **kw)
        res[f'fold{f}'] = writer.record
    return res

@pytest.mark.parametrize('on', ['name', 'source'])
def test_folds(on):
    "Every item once in valid, and k − 1 times in train, each score on its own item."
    margin = np.random.default_rng(0).normal(size=(3, N))
    folds = folds_of(margin, vocab=['cat', 'dog'])
    with pytest.raises(ValueError, match="say with `on='name'` or `on='source'`"): XentRecords(folds)
    runs = XentRecords(folds, on=on)
    key = (lambda i: f'{i}.png') if on == 'name' else int
    for split in ('train', 'valid'):
        s = runs.scores('aum', split)
        assert s.index.name == on and sorted(s.index) == sorted(map(key, range(N)))
        for i in range(N):
            for f in range(3):
                is_in = (i % 3 == f) == (split == 'valid')
                np.testing.assert_allclose(s.loc[key(i), f'fold{f}'], margin[f, i] if is_in else np.nan, rtol=1e-6)
    own = np.array([margin[i % 3, i] for i in range(N)])
    np.testing.assert_allclose(runs.mean('aum', 'valid').loc[[key(i) for i in range(N)]], own, rtol=1e-6)
    top = runs.top(N, 'aum', 'valid')
    assert top['name'].tolist() == [f'{i}.png' for i in own.argsort()] and top['runs'].eq(1).all() and 'item' not in top
    assert top['targ'].tolist() == [['cat', 'dog'][i % 2] for i in own.argsort()]
    assert top['likely'].tolist() == [['cat', 'dog'][i % 2] if own[i] > 0 else 'dog' for i in own.argsort()]  # the label, unless held against it
    assert runs.top(2, 'aum')['runs'].eq(2).all() and len(runs.to_df('valid')) == N
    assert repr(runs).splitlines()[1:] == ['  train: 12 items; epochs 1, 1, 1', '  valid: 12 items; epochs 1, 1, 1']

def test_folds_that_contradict():
    margin = np.ones((3, N))
    assert len(XentRecords(folds_of(margin, names=False), on='source')) == 3
    with pytest.raises(ValueError, match=r"on is 'path', expected 'item', 'name' or 'source'"): XentRecords(folds_of(margin), on='path')
    with pytest.raises(ValueError, match=r"item 0 of 'train' in run 'fold0' has no name"): XentRecords(folds_of(margin, names=False), on='name')
    two = items_of().assign(name=lambda d: d['name'].where(d['item'] != 3, '5.png'))
    with pytest.raises(ValueError, match=r"two items of 'train' in run '1' have the name '5.png'"): XentRecords([record_of(np.ones(N)), record_of(np.ones(N), items=two, mark='two')], on='name')
    with pytest.raises(ValueError, match=r"the item of 'train' with the source 3 has another name in another run"): XentRecords([record_of(np.ones(N)), record_of(np.ones(N), items=two, mark='two')], on='source')
    plain, other = items_of(names=False).assign(source=np.arange(N)), np.zeros(N, dtype=int)
    other[7] = 1
    with pytest.raises(ValueError, match=r"the item of 'train' with the source 7 has another label in another run"): XentRecords([record_of(np.ones(N), items=plain), record_of(np.ones(N), items=plain, targ=other)], on='source')


# -- scores

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('by', ['margin_loss', 'aum', 'el2n', 'correctness', 'forgetting', get_score('last_el2n')], ids=lambda o: o if isinstance(o, str) else type(o).__name__)
def test_means_and_deviations(by, seed):
    "Against plain loops over items and runs; an item that no run has seen has no mean."
    runs = random_runs(seed)
    s = np.stack([r.score(by) for r in runs.records.values()])
    pd.testing.assert_frame_equal(runs.scores(by), pd.DataFrame(dict(zip(runs.records, s))).rename_axis(index='item', columns='run'), check_index_type=False)
    mean, std = runs.mean(by), runs.std(by)
    for i in range(N):
        known = [o for o in s[:, i] if o == o]
        if not known: assert np.isnan(mean[i]) and np.isnan(std[i])
        elif not np.isfinite(known).all(): assert mean[i] == np.inf
        else:
            np.testing.assert_allclose(mean[i], sum(known) / len(known))
            if len(known) < 2: assert np.isnan(std[i])
            else: np.testing.assert_allclose(std[i], (sum((o - sum(known) / len(known))**2 for o in known) / (len(known) - 1))**.5, atol=1e-12)

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('by', ['margin_loss', 'correctness', 'forgetting'])
def test_rank_correlation(by, seed):
    "As scipy has it, on the items that both runs have seen; counts have ties, and what is never learned is infinite."
    runs = random_runs(seed)
    got, s = runs.rank_correlation(by), runs.scores(by)
    assert list(got.index) == list(got.columns) == list(runs.records)
    for a in s:
        for b in s:
            x, y = s.loc[:, [a, b]].dropna().to_numpy().T
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')       # of runs that give all items one score
                want = spearmanr(x, y).statistic
            np.testing.assert_allclose(got.loc[a, b], want, atol=1e-9)

def test_rank_correlation_of_one_score():
    runs = XentRecords([record_of(np.ones(N)), record_of(np.arange(N))])
    assert np.isnan(runs.rank_correlation('aum').loc['0', '1'])

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('by', ['margin_loss', 'aum', 'forgetting'])
@pytest.mark.parametrize('k', [1, 4, 8])
def test_overlap(k, by, seed):
    "The tops are those of `record.top`."
    runs = random_runs(seed)
    tops = {n: set(r.top(k, by)['item']) for n, r in runs.records.items()}
    got = runs.overlap(k, by)
    for a in tops:
        for b in tops: assert got.loc[a, b] == len(tops[a] & tops[b]) / k

def test_overlap_wants_a_k_that_all_have():
    m = np.arange(N, dtype=float)
    runs = XentRecords(dict(a=record_of(m), b=record_of(np.where(m < 5, np.nan, m))))
    assert runs.overlap(7).loc['a', 'b'] == 2 / 7      # a has 0 to 6 first, b 5 to 11
    for k in (0, 8, -1):
        with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 7, the number of items that run 'b' has seen"): runs.overlap(k)
    with pytest.raises(TypeError, match="k is 1.5, expected a number of items"): runs.overlap(1.5)


# -- the items to look at

@pytest.mark.parametrize('by', ['margin_loss', 'aum'])
def test_top(by):
    "By the mean, in the direction of the score; an item that no run has seen is not in it."
    runs = random_runs(5, runs=3)
    mean = runs.mean(by)
    top = runs.top(N, by)
    mean = mean.to_numpy()
    order = sorted((i for i in range(N) if mean[i] == mean[i]), key=lambda i: -mean[i] if by == 'margin_loss' else mean[i])
    assert top['item'].tolist() == order
    np.testing.assert_allclose(top['score'], mean[order])
    np.testing.assert_allclose(top['std'], runs.std(by).to_numpy()[order])
    assert top['runs'].tolist() == [int(runs.scores(by).loc[i].notna().sum()) for i in order]
    assert top['name'].tolist() == [f'{i}.png' for i in order]
    pd.testing.assert_frame_equal(runs.top(3, by), top[:3])

def test_top_of_one_run_is_its_own():
    run = record_of(np.random.default_rng(0).normal(size=(5, N)), vocab=['cat', 'dog'])
    cols = ['item', 'name', 'source', 'targ', 'likely', 'score']
    pd.testing.assert_frame_equal(XentRecords([run]).top(N)[cols], run.top(N)[cols])

def test_likely_is_what_the_runs_hold_against_the_label():
    "Runs count alike; an item whose label differs has neither label nor likely class."
    a = record_of(np.array([[2., 1, -3]]), pred=[0, 1, 1], targ=[0, 1, 0], vocab=['cat', 'dog'], items=items_of(3))
    b = record_of(np.array([[1., 1, 1]] * 3), pred=[0, 0, 0], targ=[0, 0, 0], vocab=['cat', 'dog'], items=items_of(3))
    top = XentRecords(dict(a=a, b=b)).top(3).sort_values('item')
    assert top['likely'].tolist() == ['cat', None, 'dog']
    assert top['targ'].tolist() == ['cat', None, 'cat']

def test_nothing_was_seen():
    run = record_of(np.full((1, 3), 2.), items=items_of(4)[:3])
    empty = XentWriter()
    empty.set_items('train', items_of(3), 'mark')
    empty = empty.record
    runs = XentRecords([run, empty])
    assert runs.mean('aum').tolist() == [2, 2, 2] and np.isnan(runs.std('aum')).all() and np.isnan(runs.rank_correlation().loc['0', '1'])
    assert len(XentRecords([empty]).top(3)) == 0
    assert repr(XentRecords([XentWriter().record])) == 'XentRecords of 1 run: 0\n  no split that all runs have'

def test_one_frame(tmp_path):
    "Every row of every run, under its run's name."
    runs = random_runs(2)
    df = runs.to_df('train')
    assert list(df['run'].cat.categories) == list(runs.records)
    for name, r in runs.records.items(): pd.testing.assert_frame_equal(df[df['run'] == name].drop(columns='run').reset_index(drop=True), r.to_df('train'))
    assert len(runs.to_df('train', -1)) == sum(len(r.to_df('train', -1)) for r in runs.records.values())

def test_repr():
    runs = XentRecords(dict(a=record_of(np.ones((2, N))), b=record_of(np.ones((3, N)))))
    assert repr(runs) == 'XentRecords of 2 runs: a, b\n  train: 12 items; epochs 2, 3'


# -- real runs

def train(seed, data_seed=42, path=None):
    "Three epochs of a small network on the demo's digits, of which one label in ten is wrong."
    dls = DataLoaders(*(TfmdDL(o, bs=64, shuffle=not i, num_workers=0) for i, o in enumerate(digits(seed=data_seed))))
    set_seed(seed)
    learn = quiet(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), loss_func=XentLossFlat(), lr=.05, cbs=XentRecorder(path)))
    learn.fit(3)
    return learn

def test_digits(tmp_path):
    "Three seeds agree on most items; their mean finds the wrong labels at least as well as the runs do on average."
    learns = [train(seed, path=tmp_path / f'seed{seed}') for seed in range(3)]
    runs, planted = XentRecords(tmp_path / 'seed*'), learns[0].dls.train_ds.planted
    agree = runs.rank_correlation().to_numpy()
    assert (agree[np.triu_indices(3, 1)] > .5).all() and (agree[np.triu_indices(3, 1)] < 1).all()
    k = int(planted.sum())
    def found(score): return planted[np.argsort(-np.nan_to_num(score), kind='stable')[:k]].mean()
    alone = [found(runs.scores()[o]) for o in runs.scores()]
    assert found(runs.mean()) >= np.mean(alone) and found(runs.mean()) > .8
    assert runs.top(20)['runs'].eq(3).all() and planted[runs.top(20)['item']].mean() > .9
    with pytest.raises(ValueError, match='the items have no names, and .* have other labels'): XentRecords([learns[0].xent_recorder.record, train(0, data_seed=1).xent_recorder.record])
