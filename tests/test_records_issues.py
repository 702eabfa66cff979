"Wrong labels by several runs."
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from fastai_xent.issues import LabelDoubt
from fastai_xent.records import XentRecords, _alike
from fastai_xent.writer import XentWriter

N, C = 120, 4


def labels(seed=0):
    "A fifth are wrong."
    truth, rng = np.arange(N) % C, np.random.default_rng(seed)
    y, wrong = truth.copy(), rng.permutation(N)[:N // 5]
    y[wrong] = (y[wrong] + rng.integers(1, C, len(wrong))) % C
    return truth, y

def run(seed, y=None, path=None, order=False, epochs=4, valid=True, sharp=1.5):
    "A model that knows the truth, more or less."
    truth, own = labels()
    y, rng = own if y is None else y, np.random.default_rng(seed)
    logits = lambda e: torch.tensor(np.eye(C)[truth] * (e + 1) * sharp + rng.normal(size=(N, C)) * 1.2, dtype=torch.float32)
    names = [f'{i}.png' for i in range(N)]
    with XentWriter(path, items=dict(train=names, valid=N) if valid else names, vocab=list('abcd')) as w:
        for e in range(epochs):
            i = torch.tensor(rng.permutation(N) if order else np.arange(N))
            w.add(split='train', epoch=e, item=i, pred=logits(e)[i], targ=torch.tensor(y)[i])
            if valid: w.add(split='valid', epoch=e, item=torch.arange(N), pred=logits(e), targ=torch.tensor(own))
    return w.record

def average_precision(issues, wrong):
    hit = wrong[issues['item'].to_numpy()]
    return (np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean()


def test_one_run_says_what_its_record_says():
    r = run(0)
    alone, together = r.label_issues(), XentRecords([r]).label_issues()
    pd.testing.assert_frame_equal(pd.DataFrame(alone), pd.DataFrame(together), rtol=1e-5)
    assert together.attrs['verdict'] == alone.attrs['verdict']

def test_a_run_twice_says_what_it_says_once():
    r = run(0)
    alone, twice = r.label_issues(), XentRecords(dict(a=r, b=pickle.loads(pickle.dumps(r)))).label_issues()
    assert alone['item'].tolist() == twice['item'].tolist()
    np.testing.assert_allclose(alone['score'], twice['score'], rtol=1e-5)
    assert alone['likely'].tolist() == twice['likely'].tolist()

def test_the_order_of_runs_does_not_matter():
    a, b = run(0), run(1)
    one, two = (XentRecords(o).label_issues() for o in (dict(a=a, b=b), dict(b=b, a=a)))
    pd.testing.assert_frame_equal(pd.DataFrame(one), pd.DataFrame(two), rtol=1e-5)

def test_two_are_better_than_one():
    truth, y = labels()
    wrong, runs = truth != y, {str(s): run(s, sharp=.5) for s in range(8)}
    alone = np.mean([average_precision(r.label_issues(), wrong) for r in runs.values()])
    pairs = np.mean([average_precision(XentRecords({k: runs[k] for k in (str(s), str(s + 1))}).label_issues(), wrong) for s in range(0, 8, 2)])
    assert pairs > alone + .02

def test_states_add_up_as_those_of_one_long_run():
    "By hand: sums, the label that is known, and votes that cancel."
    zeros = dict(gap=np.zeros(4), confidence=np.ones(4))
    a = dict(zeros, weight=np.array([2., 2, 2, 0]), doubt=np.array([4., 2, 0, 0]), rival=np.array([1, 1, -1, -1]), label=np.array([0, 0, 0, -1]), votes=np.array([3., 1, 0, 0]))
    b = dict(zeros, weight=np.array([1., 1, 1, 1]), doubt=np.array([1., 1, 1, 5]), rival=np.array([1, 2, 3, 2]), label=np.array([0, 0, 0, 3]), votes=np.array([1., 3, 2, 1]))
    got = LabelDoubt().joined(a, b)
    for k, v in dict(weight=[3, 3, 3, 1], doubt=[5, 3, 1, 5], rival=[1, 2, 3, 2], label=[0, 0, 0, 3], votes=[4, 2, 2, 1]).items():
        np.testing.assert_array_equal(got[k], v, err_msg=k)
    assert LabelDoubt().init(3).keys() == got.keys() == _alike(a).keys()

def test_each_run_counts_alike():
    "A run of epochs with ten times the weight says no more than the other."
    a, b = ({k: v * 1. if k == 'weight' else v for k, v in LabelDoubt().init(2).items()} for _ in range(2))
    a.update(weight=np.array([10., 10]), doubt=np.array([10., 20]))
    b.update(weight=np.array([1., 1]), doubt=np.array([3., 2]))
    s = LabelDoubt().joined(_alike(a), _alike(b))
    np.testing.assert_allclose(s['doubt'] / s['weight'], [(1 + 3) / 2, (2 + 2) / 2])
    for o in (a, LabelDoubt().init(2)): assert all(np.isfinite(v).all() for v in _alike(o).values())

def test_decisions_are_taken(tmp_path):
    truth, y = labels()
    runs = XentRecords([run(s, path=tmp_path / f'{s}', order=True) for s in range(2)])
    asked = runs.label_issues().to_review(30)
    asked['wrong'] = (truth != y)[asked['item']]
    after = runs.label_issues(reviewed=asked)
    assert after.attrs['reviewed'] and after.attrs['noise_rate_low'] <= .2 <= after.attrs['noise_rate_high']
    assert (truth != y)[after['item'][after['is_issue']]].mean() > .9

def test_an_item_that_one_run_has_not_seen():
    a, b = run(0), run(1)
    with XentWriter(items=[f'{i}.png' for i in range(N)], vocab=list('abcd')) as w:
        for e in range(2): w.add(split='train', epoch=e, item=torch.arange(5), pred=torch.randn(5, C), targ=torch.tensor(labels()[1][:5]))
    issues = XentRecords([a, b, w.record]).label_issues()
    assert issues['score'].notna().all() and len(issues) == N

def test_without_valid_it_warns_once_and_answers():
    with pytest.warns(UserWarning, match="no rows of 'valid'"): issues = XentRecords([run(s, valid=False) for s in range(2)]).label_issues()
    assert len(issues) == N

def test_runs_with_other_labels_are_refused():
    y = labels()[1].copy()
    y[7] = (y[7] + 1) % C
    with pytest.raises(ValueError, match=r"1 of 120 items of 'train' have other labels in run 'b' than in run 'a', the first is item 7"):
        XentRecords(dict(a=run(0), b=run(1, y))).label_issues()

def test_other_refusals():
    named = {k: run(s, valid=False) for s, k in enumerate('ab')}
    with pytest.raises(ValueError, match="told apart by 'name'.*leave `on` out"): XentRecords(named, on='name').label_issues()
    with pytest.raises(KeyError, match="not all runs have the split 'valid'"): XentRecords(named).label_issues('valid')
    one = {k: run(s, epochs=1, valid=False) for s, k in enumerate('ab')}
    with pytest.raises(ValueError, match='expected at least 2'): XentRecords(dict(a=one['a'])).label_issues()

def test_masks_of_several_runs_are_refused():
    def masks():
        with XentWriter(items=4) as w:
            for e in range(2): w.add(split='train', epoch=e, item=torch.arange(4), pred=torch.randn(4, 3, 8), targ=torch.zeros(4, 8, dtype=torch.long))
        return w.record
    with pytest.raises(ValueError, match='ask each record alone for its masks or sequences'): XentRecords(dict(a=masks(), b=masks())).label_issues()
