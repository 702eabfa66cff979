"The bounds of a verdict, the decisions of a person, the words; planted truth, and one small training whose bounds hold it."
import json
import pickle
import re
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastai_xent.issues import LabelDoubt, pair_lift
from fastai_xent.verdict import Reviewed, Ruler, chances, draw, overclaim, precision_interval, rate_interval, reached, ruler, told
from fastai_xent.writer import XentWriter
from test_issues import digits

shares = st.floats(0, 1)
rulers = st.builds(Ruler, st.floats(0, .6), st.floats(0, .2), shares, shares, st.floats(0, 1.2), st.integers(1, 10**6), st.integers(1, 1000))


# -- bounds

@given(rulers, shares, st.just(0.) | st.floats(.03, .4))
def test_bounds_are_in_order(r, disagreement, excess):
    rate, low, high = rate_interval(r, disagreement, excess)
    assert 0 <= low <= rate <= high <= 1

@given(rulers, st.integers(2, 100))
def test_more_items_never_widen_the_upper_bound(r, times):
    more = Ruler(r.level, r.sd, r.disagreement, r.sure, r.firm, r.n * times, r.n_classes)
    assert rate_interval(more)[2] <= rate_interval(r)[2] + 1e-9

def planted(n, rho, hard, c=5, seed=0):
    "Confidence and gap of a calibrated model; labels go wrong at random, or where it is unsure."
    rng = np.random.default_rng(seed)
    sure = 1 / c + (1 - 1 / c) * rng.beta(3, .5, n)
    truth = np.where(rng.random(n) < sure, 0, rng.integers(1, c, n))               # the model says 0
    at = (1 - sure) / (1 - sure).mean() if hard else np.ones(n)
    label = np.where(rng.random(n) < np.minimum(rho * at, .95), (truth + rng.integers(1, c, n)) % c, truth)
    gap = np.where(label == 0, -1, 1) * sure
    return sure, gap, (label != truth).mean()

@pytest.mark.parametrize('hard', [False, True])
@pytest.mark.parametrize('rho', [0., .05, .1, .2, .4])
def test_bounds_hold_what_was_planted(rho, hard):
    held = []
    for seed in range(10):
        sure, gap, true = planted(2000, rho, hard, seed=seed)
        _, low, high = rate_interval(ruler(sure, gap, 5))
        held.append(low <= true <= high)
        assert high - low < (.45 if hard else .25)
    assert sum(held) >= 9

def test_a_plateau_that_was_not_reached_bounds_nothing_from_below():
    r = Ruler(.4, .03, .6, .35, .9, 1000, 5)
    assert reached(r) == 0 and rate_interval(r)[1] == 0 and rate_interval(r)[2] >= .6

@given(rulers)
def test_of_fewer_classes_the_bounds_of_the_rate_are_wider_and_those_of_the_precision_closer(r):
    two = replace(r, n_classes=2)
    assert rate_interval(two)[2] >= rate_interval(replace(r, n_classes=10))[2] - 1e-9
    assert overclaim(r.disagreement, 2) <= overclaim(r.disagreement, 10)

def test_of_two_classes_a_mistake_may_hide_a_wrong_label():
    "Labels go wrong where the model errs: it agrees with half of the wrong ones."
    n = 1000
    sure, gap = np.full(n, .9), np.where(np.arange(n) < 300, .8, -.8)              # 300 wrong labels are seen, 40 are shared
    assert rate_interval(ruler(sure, gap, 2))[2] >= .34

@given(st.integers(1, 200), shares, st.integers(0, 2**32 - 1))
def test_precision_bounds(n, over, seed):
    low, p, high = np.sort(np.random.default_rng(seed).random((3, n)), axis=0)
    mean, a, b = precision_interval(low, p, high, over)
    assert 0 <= a <= mean <= b <= 1
    assert a <= precision_interval(low, p, high, over / 2)[1] + 1e-9


# -- pairs

@settings(max_examples=60)
@given(st.integers(2, 5), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_pair_lift_is_the_plain_loop(c, n, seed):
    rng = np.random.default_rng(seed)
    held, label, rival = rng.integers(-1, c, n), rng.integers(0, c, n), rng.integers(-1, c, n)
    confidence = rng.permutation(n) / n
    count = np.zeros((c, c))
    for k in range(c):
        its = sorted(np.flatnonzero(held == k), key=lambda i: -confidence[i])
        for i in its[:max(1, round(.2 * len(its)))]: count[k, label[i]] += label[i] != k
    others = max(len(set(label)) - 1, 1)
    def lift(k, y):
        if k < 0: return 0
        chance = count[k].sum() / others
        return max(np.log((count[k, y] + 2) / (chance + 2)) - 2 / np.sqrt(chance + 2), 0) if count[k, y] else 0
    np.testing.assert_allclose(pair_lift(held, label, confidence, rival), [lift(k, y) for k, y in zip(rival, label)])

def rows_of(truth, label, rng, hard):
    "An epoch of a model that knows the truth, and wavers on `hard` items: then it prefers its neighbour."
    margin = np.where(label == truth, 4., -4.) + rng.normal(0, 1, len(truth))
    margin[hard] = rng.normal(0, 1, hard.sum()) - .5
    rival = np.where(label == truth, (truth + 1) % 5, truth)
    return dict(margin=margin, p_targ=1 / (1 + np.exp(-margin)), pred=np.where(margin < 0, rival, label).astype(float), targ=label)

def doubts(truth, label, hard, rng):
    r = LabelDoubt()
    state = r.init(len(truth))
    for _ in range(3): r.update(state, np.arange(len(truth)), np.ones(len(truth)), **rows_of(truth, label, rng, hard))
    return r, state

def test_pairs_raise_those_of_the_pair_and_nobody_else():
    rng, n = np.random.default_rng(0), 3000
    truth = rng.integers(0, 5, n)
    label = np.where((truth == 1) & (rng.random(n) < .3), 3, truth)
    r, state = doubts(truth, label, np.zeros(n, dtype=bool), rng)
    more = r.finalize(state) - r.mean(state, 'doubt')
    assert (more[label != truth] > .3).all() and abs(more[label == truth]).max() < 1e-6

@pytest.mark.parametrize('seed', range(5))
def test_labels_that_go_wrong_at_random_have_next_to_no_pairs(seed):
    rng, n = np.random.default_rng(seed), 3000
    truth = rng.integers(0, 5, n)
    label = np.where(rng.random(n) < .2, (truth + rng.integers(1, 5, n)) % 5, truth)
    r, state = doubts(truth, label, rng.random(n) < .1, rng)
    assert r.lift(state).max() < .3

def test_scores_of_any_size():
    r, m = LabelDoubt(), np.float32([-1e4, -90, 0, 90, 1e4])
    state = r.init(6)
    r.update(state, np.arange(5), np.ones(5), margin=m, p_targ=np.float32([0, 0, .5, 1, 1]), pred=np.ones(5), targ=np.zeros(5))
    np.testing.assert_allclose(r.finalize(state)[:3], r.mean(state, 'doubt')[:3], rtol=1e-6)
    assert np.isfinite(r.finalize(state)[:5]).all() and np.isnan(r.finalize(state)[5])


# -- what a person adds

@given(st.lists(shares | st.just(np.nan), min_size=1, max_size=80).map(np.array), st.integers(1, 60), st.integers(0, 1000))
def test_draw(p, k, seed):
    at, known = draw(p, p > .5, k, seed), int((~np.isnan(p)).sum())
    assert len(at) == len(set(at)) == min(k, known) and not np.isnan(p[at]).any()
    chance = chances(p, p > .5, k)
    assert chance.sum() == pytest.approx(min(k, known)) and ((0 <= chance) & (chance <= 1 + 1e-9)).all()

def test_draw_keeps_its_chances():
    p = np.random.default_rng(0).beta(.3, 2, 300)
    taken = np.mean([np.isin(np.arange(300), draw(p, p > .3, 40, seed)) for seed in range(3000)], axis=0)
    np.testing.assert_allclose(taken, chances(p, p > .3, 40), atol=.04)

def claimed(seed, shift, slope, n=3000):
    "What a run claims, and what is true."
    rng = np.random.default_rng(seed)
    x = np.sort(rng.normal(-3, 3, n))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    return sigmoid(x), rng.random(n) < sigmoid(shift + slope * x)

@pytest.mark.parametrize('shift, slope', [(0, 1), (2, 1), (-2, 1), (0, .5), (1, 1.5), (-20, 1)])
def test_a_hundred_decisions_tell_rate_and_precision(shift, slope):
    rates, precisions, held = [], [], []
    for seed in range(20):
        p, wrong = claimed(seed, shift, slope)
        seen = draw(p, p >= .5, 50, seed)
        rev = Reviewed(p, seen, wrong[seen])
        more = rev.p()
        more[seen] = np.nan
        seen = np.r_[seen, draw(more, more >= .5, 50, seed)]
        rev = Reviewed(p, seen, wrong[seen])
        issue = rev.p(-3.5) >= .5                         # as `label_issues` flags
        rate, low, high = rev.share(np.ones(len(p), dtype=bool))
        rates.append(abs(rate - wrong.mean()))
        held.append(low <= wrong.mean() <= high)
        if issue.any(): precisions.append(abs(rev.share(issue)[0] - wrong[issue].mean()))
    assert sum(held) >= 18 and np.mean(rates) < .05 and np.mean([0., *precisions]) < .045

@given(st.integers(0, 2**32 - 1), st.integers(0, 60))
def test_decided_items_are_known_and_the_order_stays(seed, k):
    rng = np.random.default_rng(seed)
    p = rng.random(60)
    p[rng.random(60) < .1] = np.nan
    at = rng.permutation(60)[:k]
    wrong = rng.random(k) < .5
    rev = Reviewed(p, at, wrong)
    np.testing.assert_array_equal(rev.p()[at], wrong)
    rest = np.setdiff1d(np.flatnonzero(~np.isnan(p)), at)
    assert np.isnan(rev.p()[np.setdiff1d(np.flatnonzero(np.isnan(p)), at)]).all()
    mean, low, high = rev.share(np.ones(60, dtype=bool))
    assert 0 <= low <= mean <= high <= 1 and len(rest) == (~np.isnan(rev.p())).sum() - k


# -- of a record

@pytest.fixture(scope='module')
def noisy(): return digits(.2, 'pair')

def test_a_training_whose_bounds_hold_the_truth(noisy):
    learn, wrong, _ = noisy
    issues = learn.xent_recorder.record.label_issues()
    found, flagged = issues.attrs, issues[issues['is_issue']]
    assert found['noise_rate_low'] <= wrong.mean() <= found['noise_rate_high'] and found['noise_rate_high'] - found['noise_rate_low'] < .2
    assert found['precision_low'] <= wrong[flagged['item']].mean() <= found['precision_high']

def test_decisions_narrow_it_down(noisy):
    learn, wrong, truth = noisy
    record, seen = learn.xent_recorder.record, []
    issues = first = record.label_issues()
    for _ in range(2):
        ask = issues.to_review(50)
        assert not set(ask['item']) & set(seen) and len(ask) == 50
        seen += ask['item'].tolist()
        decisions = pd.DataFrame(dict(item=seen, split='train', decision=np.where(wrong[seen], 'relabel', 'keep'), label=truth[seen].astype(object)))
        issues = record.label_issues(reviewed=decisions)
    found, flagged = issues.attrs, issues[issues['is_issue']]
    assert abs(found['noise_rate'] - wrong.mean()) < .05 and abs(found['precision'] - wrong[flagged['item']].mean()) < .05
    width = lambda o: o.attrs['noise_rate_high'] - o.attrs['noise_rate_low']
    assert width(issues) < width(first) and '100 were reviewed' in found['verdict']
    by = issues.set_index('item').loc[seen]
    np.testing.assert_array_equal(by['p_wrong'], wrong[seen].astype(float))
    np.testing.assert_array_equal(by['likely'][wrong[seen]], truth[seen][wrong[seen]])

def test_what_a_decision_may_look_like(noisy):
    record, wrong = noisy[0].xent_recorder.record, noisy[1]
    at = np.r_[np.flatnonzero(wrong)[:5], np.flatnonzero(~wrong)[:5]]
    by = lambda **cols: record.label_issues(reviewed=pd.DataFrame(dict(item=at, **cols)))
    flags = by(wrong=wrong[at])
    for other in (by(wrong=wrong[at].astype(int)), by(decision=['drop'] * 5 + ['keep'] * 5), by(decision=['drop'] * 5 + ['relabel'] * 5, label=[None] * 5 + noisy[0].dls.train.dataset.y[at[5:]].tolist())):
        np.testing.assert_allclose(other['p_wrong'], flags['p_wrong'])
    elsewhere = record.label_issues(reviewed=pd.DataFrame(dict(item=[*at, 3], split=['train'] * 10 + ['valid'], wrong=[*wrong[at], True])))
    np.testing.assert_allclose(elsewhere['p_wrong'], flags['p_wrong'])
    with pytest.raises(ValueError, match='nothing is decided'): record.label_issues(reviewed=record.label_issues().to_review(5))
    unsure = by(decision=['unsure'] * 9 + [None])
    assert unsure.attrs['reviewed'] == []
    for kw, error, words in ((dict(), KeyError, "no column 'decision'"), (dict(decision=['yes'] * 10), ValueError, "'yes' is no decision")):
        with pytest.raises(error, match=words): by(**kw)
    for at_, words in (([1, 1], 'each item once'), ([-1, 2], 'each item once'), ([10**6, 2], 'each item once')):
        with pytest.raises(ValueError, match=words): record.label_issues(reviewed=pd.DataFrame(dict(item=at_, wrong=True)))

@pytest.mark.parametrize('as_told', [lambda o: o, lambda o: [str(x) for x in o], lambda o: [int(x) for x in o], lambda o: [str(int(x)) for x in o],
                                     lambda o: [float(x) for x in o], lambda o: pd.array(o, dtype='boolean'), lambda o: [str(x).lower() + ' ' for x in o]])
def test_answers_as_a_file_may_give_them(noisy, as_told):
    record, at = noisy[0].xent_recorder.record, [3, 1, 4, 15, 92, 65]
    told = [bool(o) for o in noisy[1][at]] + [True, False]
    frame = pd.DataFrame(dict(item=[*at, 35, 89], wrong=told))
    want = record.label_issues(reviewed=frame)['p_wrong']
    np.testing.assert_array_equal(record.label_issues(reviewed=frame.assign(wrong=as_told(told)))['p_wrong'], want)

@pytest.mark.parametrize('wrong, came', [([2, 0], '2'), ([.5, 0], '0.5'), ([-1, 1], '-1'), (['yes', 'no'], "'yes'"), (['x', None], "'x'")])
def test_what_is_no_answer_is_refused(noisy, wrong, came):
    with pytest.raises(ValueError, match=f'{came}(.0)? in the column `wrong`.*expected True'):
        noisy[0].xent_recorder.record.label_issues(reviewed=pd.DataFrame(dict(item=[1, 2], wrong=wrong)))

@pytest.mark.parametrize('item', [[1.5, 2], [np.nan, 2], ['a', '2'], [None, 2], [np.inf, 2]])
def test_no_item_is_guessed(noisy, item):
    "Half an item is none."
    with pytest.raises(ValueError, match='must name each item once'):
        noisy[0].xent_recorder.record.label_issues(reviewed=pd.DataFrame(dict(item=item, wrong=[True, False])))

def test_rows_without_an_answer_are_not_right(noisy):
    "Somebody who marks the wrong ones alone is told."
    record = noisy[0].xent_recorder.record
    with pytest.warns(UserWarning, match='1 rows have nothing in `wrong`, and none has False'):
        record.label_issues(reviewed=pd.DataFrame(dict(item=[1, 2], wrong=[True, None])))

def test_a_label_that_a_file_has_made_text_of(noisy):
    "To relabel an item with its own label is to keep it."
    record, targ = noisy[0].xent_recorder.record, noisy[0].dls.train.dataset.y
    by = lambda label: record.label_issues(reviewed=pd.DataFrame(dict(item=[1, 2], decision='relabel', label=label)))['p_wrong']
    np.testing.assert_array_equal(by([str(int(targ[1])), str(int(targ[2]))]), by([int(targ[1]), int(targ[2])]))

def test_the_frame_says_its_verdict_and_stays_a_frame(noisy):
    issues = noisy[0].xent_recorder.record.label_issues()
    verdict = issues.attrs['verdict']
    assert isinstance(issues, pd.DataFrame) and ' '.join(repr(issues).split()).startswith(verdict)
    assert verdict in re.sub('</?code>', '`', issues._repr_html_()) and max(map(len, repr(issues).splitlines())) <= 80
    nameless = type(issues)(issues.assign(name=None, source=pd.NA))
    for shown in (repr(nameless), nameless._repr_html_()): assert 'NA' not in shown and 'p_wrong' in shown and 'source' not in shown
    assert verdict.startswith('Wrong labels among 1,437: about') and 'flagged; of these, between' in verdict
    for other in (issues[issues['is_issue']], issues.head(3), issues.drop(columns='source'), issues.sort_values('item')):
        assert type(other) is pd.DataFrame and verdict not in repr(other)
    again = pickle.loads(pickle.dumps(issues))
    pd.testing.assert_frame_equal(pd.DataFrame(again), pd.DataFrame(issues))
    assert json.loads(json.dumps(issues.attrs)) == issues.attrs

def test_the_words():
    found = dict(noise_rate=.02, noise_rate_low=0., noise_rate_high=.04, precision_low=np.nan, precision_high=np.nan, n_issues=0, reviewed=[], reached=1., excess_over_valid=0., n_valid=5000)
    assert told(found, 100) == 'Wrong labels among 100: about 2.0%, at most 4.0%. None is flagged.'
    for change, words in ((dict(reached=.1), 'train longer'), (dict(n_valid=50), 'Valid is too small'), (dict(excess_over_valid=.1), 'Valid is cleaner than train'),
                          (dict(noise_rate_high=.3), r'review some')):
        assert words in told({**found, **change}, 100) and words not in told(found, 100)

def test_a_short_training_says_so_itself():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        issues = digits(.2, epochs=2, width=8)[0].xent_recorder.record.label_issues()
    assert any('train longer' in str(o.message) for o in said) and 'train longer' in issues.attrs['verdict']
    assert not issues['is_issue'].any() or issues['is_issue'].mean() < .2

def test_valid_says_it_of_itself():
    writer, n, rng = XentWriter(), 300, np.random.default_rng(0)
    writer.set_items('valid', pd.DataFrame(dict(item=np.arange(n), name=np.arange(n), source=np.arange(n))), 'a')
    truth = rng.integers(0, 3, n)
    label = np.where(np.arange(n) < 30, (truth + 1) % 3, truth)
    for e in range(3):
        m = np.where(label == truth, 3., -3.) + rng.normal(0, .5, n)
        p = 1 / (1 + np.exp(-m))
        writer.write(0, e, 'valid', dict(item=np.arange(n), loss=-np.log(p), grad_norm=1 - p, el2n=1 - p, p_targ=p, margin=m, pred=truth, targ=label))
    issues = writer.record.label_issues('valid')
    assert issues.attrs['noise_rate_low'] <= .1 <= issues.attrs['noise_rate_high'] and issues.attrs['n_valid'] == n
