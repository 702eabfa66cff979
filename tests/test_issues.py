"Scores for wrong labels, the noise rate and its probabilities: properties, planted noise through the real recorder, agreement with the original packages."
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle  # noqa: F401
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.torch_core import set_seed
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from fastai_xent.all import LabelDoubt, XentLossFlat, XentRecorder
from fastai_xent.dynamics import get_score
from fastai_xent.writer import XentWriter
from fastai_xent.issues import epoch_weight, gap_confidence, gap_sums, noise_rate, p_wrong, plateau
from helpers import quiet


# -- rows

@given(st.integers(2, 6), st.integers(0, 2**32 - 1), st.sampled_from([.1, 1., 10., 100.]))
def test_gap_and_confidence_from_margin_and_p_alone(c, seed, scale):
    rng = np.random.default_rng(seed)
    z, y, i = rng.normal(0, scale, (20, c)), rng.integers(0, c, 20), np.arange(20)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    others, rest = z.copy(), p.copy()
    others[i, y], rest[i, y] = -np.inf, -1
    gap, confidence = gap_confidence((z[i, y] - others.max(1)).astype(np.float32), p[i, y].astype(np.float32))
    told = p[i, y] > 1e-37                             # float32 has nothing between this and 0
    np.testing.assert_allclose(gap[told], (rest.max(1) - p[i, y])[told], atol=1e-4)
    np.testing.assert_allclose(confidence[told], p.max(1)[told], atol=1e-4)
    assert (gap[~told] == 1).all()

def test_far_margins_have_no_overflow():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        gap, confidence = gap_confidence(np.float32([-1e4, -150, -90, 150, np.nan]), np.float32([0, 0, 8e-40, 1, .5]))
    np.testing.assert_allclose(gap, [1, 1, 1, -1, np.nan])
    np.testing.assert_allclose(confidence, [1, 1, 1, 1, np.nan])


# -- LabelDoubt against a plain loop

@st.composite
def streams(draw):
    "Epochs of rows: items missing, repeated, mixed, padded and without a label."
    n, rng = draw(st.integers(1, 6)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    epochs = []
    for _ in range(draw(st.integers(0, 5))):
        item = np.sort(rng.integers(0, n, rng.integers(0, 2 * n + 1)))
        z = rng.normal(0, 2, (len(item), 3))
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        e = dict(item=item, weight=rng.choice([1., 1., .75, 0.], len(item)), margin=z[:, 0] - z[:, 1:].max(1), p_targ=p[:, 0], pred=z.argmax(1).astype(float), targ=np.zeros(len(item)))
        empty = rng.random(len(item)) < .1
        for o in ('margin', 'p_targ', 'pred'): e[o][empty] = np.nan
        epochs.append(e)
    return n, epochs

def run(n, epochs):
    state = LabelDoubt().init(n)
    for e in epochs: LabelDoubt().update(state, e['item'], e['weight'], **{o: e[o] for o in LabelDoubt.columns})
    return state

def plain(n, epochs):
    "Scores and rivals, a row at a time."
    total, weight, rival, votes = np.zeros(n), np.zeros(n), np.full(n, -1), np.zeros(n)
    for e in epochs:
        rows = [(i, w, m, p, int(k)) for i, w, m, p, k in zip(*(e[o] for o in ('item', 'weight', 'margin', 'p_targ', 'pred'))) if w > 0 and not np.isnan(m)]
        if not rows: continue
        gaps = [p * np.exp(-m) - p for _, _, m, p, _ in rows]
        mean = sum(r[1] * g for r, g in zip(rows, gaps)) / sum(r[1] for r in rows)
        var = sum(r[1] * (g - mean)**2 for r, g in zip(rows, gaps)) / sum(r[1] for r in rows)
        undecided = 1 - sum(r[1] * g * g for r, g in zip(rows, gaps)) / sum(r[1] for r in rows)
        for (i, w, m, p, k), g in zip(rows, gaps):
            w = w * (var * (var + .05 / (.05 + undecided)) + 1e-12)
            total[i] += w * np.log1p(np.exp(-m)) * (1 + g) / 2
            weight[i] += w
            if g <= 0: continue
            if rival[i] == k: votes[i] += w * g
            elif votes[i] >= w * g: votes[i] -= w * g
            else: rival[i], votes[i] = k, w * g - votes[i]
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan), rival

@given(streams())
def test_label_doubt_is_the_plain_loop(stream):
    n, epochs = stream
    state = run(n, epochs)
    score, rival = plain(n, epochs)
    np.testing.assert_allclose(LabelDoubt().finalize(state), score, rtol=1e-4)
    np.testing.assert_array_equal(state['rival'], rival)

@given(streams(), st.data())
def test_a_look_is_an_epoch_of_four_times_its_weight(stream, data):
    n, epochs = stream
    if not epochs: return
    *before, look = epochs
    at = np.unique(look['item'], return_index=True)[1]                        # a look sees each item once
    look = {k: v[at] for k, v in look.items()}
    got, want = LabelDoubt().with_look(run(n, before), run(n, [look])), run(n, [*before, dict(look, weight=4 * look['weight'])])
    for k in set(want) - {'label', 'rival'}: np.testing.assert_allclose(got[k], want[k], rtol=1e-4, atol=1e-12)
    sure = got['votes'] > 1e-9                                                # of two that tie either may stay
    np.testing.assert_array_equal(got['rival'][sure], want['rival'][sure])

@given(streams(), st.integers(0, 2**32 - 1))
def test_the_order_of_items_does_not_matter(stream, seed):
    n, epochs = stream
    new = np.random.default_rng(seed).permutation(n)
    moved = [dict(e, item=new[e['item']]) for e in epochs]
    for e in moved:
        order = np.argsort(e['item'], kind='stable')
        e.update({k: v[order] for k, v in e.items()})
    np.testing.assert_allclose(LabelDoubt().finalize(run(n, moved))[new], LabelDoubt().finalize(run(n, epochs)), rtol=1e-4)

def test_a_run_without_spread_has_a_plain_mean():
    e = dict(item=np.array([0]), weight=np.ones(1), margin=np.array([-2.]), p_targ=np.array([.1]), pred=np.array([1.]), targ=np.zeros(1))
    np.testing.assert_allclose(LabelDoubt().finalize(run(2, [e, e])), [np.log1p(np.exp(2)) * (1 + .1 * np.exp(2) - .1) / 2, np.nan], rtol=1e-5)

def test_epochs_by_heart_and_epochs_of_ignorance_count_little():
    unknowing, doubting, by_heart = (epoch_weight(gap_sums(np.array(o), np.ones(4))) for o in ([0., .01, 0, 0], [-.9, -.8, -.9, .9], [-1, -1, -.99, -1]))
    assert doubting > 1000 * max(unknowing, by_heart)
    assert epoch_weight(gap_sums(np.zeros(0), np.zeros(0))) == 0


def test_of_few_wrong_labels_the_decided_epochs_say_most():
    "An undecided first epoch doubts hard items, nine later ones the five wrong labels in a thousand."
    rng, n = np.random.default_rng(0), 1000
    wrong = np.arange(n) < 5
    def epoch(margin): return dict(item=np.arange(n), weight=np.ones(n), margin=margin, p_targ=1 / (1 + np.exp(-margin)), pred=(margin < 0).astype(float), targ=np.zeros(n))
    epochs = [epoch(rng.normal(0, 1, n))] + [epoch(np.where(wrong, -3, 4) + rng.normal(0, 1, n)) for _ in range(9)]
    first, *later = (epoch_weight(gap_sums(gap_confidence(e['margin'], e['p_targ'])[0], e['weight'])) for e in epochs)
    assert sum(later) > first
    assert set(np.argsort(-LabelDoubt().finalize(run(n, epochs)))[:5]) == set(range(5))


# -- probabilities

scores = st.lists(st.floats(0, 50) | st.just(np.nan), min_size=1, max_size=60).map(np.array)

@given(scores, st.floats(0, .95))
def test_probabilities(score, rate):
    p = p_wrong(score, rate)
    known = ~np.isnan(score)
    np.testing.assert_array_equal(np.isnan(p), ~known)
    assert ((p[known] >= 0) & (p[known] <= 1)).all()
    order = np.argsort(score[known], kind='stable')
    assert (np.diff(p[known][order]) >= -1e-12).all(), 'a larger score has a smaller probability'
    if known.any(): np.testing.assert_allclose(p[known].mean(), rate, atol=1e-3)

@given(scores, st.floats(.01, .9), st.integers(0, 2**32 - 1))
def test_probabilities_do_not_depend_on_the_order(score, rate, seed):
    order = np.random.default_rng(seed).permutation(len(score))
    np.testing.assert_allclose(p_wrong(score[order], rate), p_wrong(score, rate)[order], atol=1e-6)

@pytest.mark.parametrize('rate', [-.1, 1., 20, np.nan])
def test_no_share(rate):
    with pytest.raises(ValueError, match='expected a share'): p_wrong(np.ones(3), rate)


# -- the noise rate

@pytest.mark.parametrize('c', [2, 4, 20])
@pytest.mark.parametrize('rho', [0., .05, .1, .2, .4])
def test_plateau_of_a_calibrated_model(c, rho):
    "The model is right as often as it says; a share of the labels is wrong."
    rng, n = np.random.default_rng(0), 5000
    sure = 1 / c + (1 - 1 / c) * rng.beta(2, .5, n)
    right, wrong = rng.random(n) < sure, rng.random(n) < rho
    differs = np.where(right, wrong, ~wrong | (rng.random(n) < (c - 2) / (c - 1)))    # two errors meet in the same class by chance
    rate, sd = plateau(sure, differs, c)
    assert abs(rate - rho) < .03 and sd < .03

def test_plateau_of_nothing():
    assert np.isnan(plateau(np.array([]), np.array([]), 3)).all()
    assert np.isnan(plateau(np.array([np.nan]), np.array([False]), 3)).all()

def test_an_excess_of_train_over_valid_is_added_once_the_model_knows_something():
    valid = {0: (.3, .3, .3), 1: (.0, .8, .7), 2: (.0, .9, .8)}
    early = {0: (.5, .3, .3), 1: (.6, .4, .5), 2: (.2, .7, .8)}
    assert noise_rate((0., .01), early, valid)[0] == pytest.approx(.2)                # epoch 1 follows one that knew little
    assert noise_rate((0., .01), {2: (.02, .9, .8)}, valid) == (0., .01, 0.)
    assert noise_rate((0., .01), {2: (.2, .7, .5)}, valid) == (0., .01, 0.)           # train was distorted
    assert noise_rate((.3, .01), {2: (.9, .1, .8)}, valid)[0] == .5
    assert noise_rate((.1, .01)) == (.1, .01, 0.)


# -- planted noise on digits, through the real recorder

class Rows:
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i], self.y[i]

def digits(share, kind='sym', seed=0, valid_share=None, epochs=12, width=64, cbs=()):
    "A small training on digits with wrong labels. The learner, and which of train's labels are wrong."
    x, truth = load_digits(return_X_y=True)
    x, rng = torch.tensor(x / 8 - 1, dtype=torch.float32), np.random.default_rng(seed)
    order = rng.permutation(len(truth))
    parts, wrong, sets = (order[360:], order[:360]), [], []
    for part, s in zip(parts, (share, share if valid_share is None else valid_share)):
        y, k = truth[part].copy(), rng.permutation(len(part))[:round(s * len(part))]
        y[k] = (y[k] + (1 if kind == 'pair' else rng.integers(1, 10, len(k)))) % 10
        wrong.append(y != truth[part])
        sets.append(Rows(x[part], torch.tensor(y)))
    set_seed(seed)
    model = nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))
    dls = DataLoaders(TfmdDL(sets[0], bs=64, shuffle=True, drop_last=True, num_workers=0), TfmdDL(sets[1], bs=360, num_workers=0))
    learn = quiet(Learner(dls, model, loss_func=XentLossFlat(), cbs=[XentRecorder(), *cbs]))
    learn.fit_one_cycle(epochs, 5e-3)
    return learn, wrong[0], truth[parts[0]]

@pytest.mark.parametrize('share, kind', [(.05, 'sym'), (.1, 'pair'), (.2, 'sym'), (.2, 'pair'), (.4, 'sym')])
def test_planted_noise(share, kind):
    learn, wrong, truth = digits(share, kind)
    issues = learn.xent_recorder.record.label_issues()
    found = issues.attrs
    assert abs(found['noise_rate'] - share) < .06 and found['noise_rate_low'] <= wrong.mean() <= found['noise_rate_high'] < share + .15
    flagged = issues[issues['is_issue']]
    right = wrong[flagged['item']]
    assert abs(found['expected_wrong'] - right.sum()) / len(wrong) < .05              # the count
    assert found['precision_low'] <= right.mean() <= found['precision_high']
    assert right.mean() > .85 and right.sum() > .3 * wrong.sum()
    bold = learn.xent_recorder.record.label_issues(cautious=False)
    bold = bold[bold['is_issue']]
    assert len(bold) > len(flagged) and wrong[bold['item']].sum() > .5 * wrong.sum() and wrong[bold['item']].mean() > .8
    assert (flagged['likely'].to_numpy()[right].astype(int) == truth[flagged['item']][right]).mean() > .9

def test_clean_data_has_next_to_no_issues():
    learn, _, _ = digits(0.)
    issues = learn.xent_recorder.record.label_issues()
    assert issues.attrs['noise_rate'] < .01 and not issues['is_issue'].any()

class Distort(Callback):
    "Augmentation that makes train much harder than valid."
    order = 5
    def __init__(self, noise, hide): self.noise, self.hide = noise, hide
    def before_batch(self):
        if not self.training: return
        x = self.xb[0]
        self.learn.xb = ((x + self.noise * torch.randn_like(x)) * (torch.rand_like(x) > self.hide),)

@pytest.mark.parametrize('noise, hide', [(.3, .05), (.6, .2), (1.2, .3)])
def test_augmentation_is_not_taken_for_noise(noise, hide):
    learn, _, _ = digits(0., cbs=[Distort(noise, hide)])
    issues = learn.xent_recorder.record.label_issues()
    assert issues.attrs['noise_rate'] < .03 and issues['is_issue'].mean() < .01

def test_a_clean_valid_does_not_hide_the_noise_of_train():
    learn, wrong, _ = digits(.2, valid_share=0.)
    issues = learn.xent_recorder.record.label_issues()
    assert issues.attrs['excess_over_valid'] > .1 and abs(issues.attrs['noise_rate'] - .2) < .06
    assert learn.xent_recorder.record.label_issues('valid').attrs['noise_rate'] < .01

def test_label_doubt_beats_the_plain_mean_where_the_model_memorises_or_ends_too_soon():
    learn, wrong, _ = digits(.2, 'sym', epochs=3, width=16)
    record = learn.xent_recorder.record
    def ap(s):
        hit = wrong[np.argsort(-s, kind='stable')]
        return (np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean()
    assert ap(record.score(LabelDoubt())) > ap(record.score('margin_loss')) + .02

def test_the_frame():
    learn, _, _ = digits(.1, epochs=4)
    record = learn.xent_recorder.record
    issues = record.label_issues()
    assert list(issues) == ['item', 'name', 'source', 'targ', 'likely', 'score', 'p_wrong', 'is_issue']
    assert sorted(issues['item']) == list(range(len(issues))) and (issues['p_wrong'].diff().dropna() <= 0).all()
    np.testing.assert_allclose(issues.set_index('item')['score'].sort_index(), record.score(LabelDoubt()))
    np.testing.assert_array_equal(issues.set_index('item')['targ'].sort_index().astype(int), learn.dls.train.dataset.y.numpy())
    top = record.top(len(issues)).sort_values('item')
    for o in ('targ', 'likely', 'score'): assert top[o].tolist() == issues.sort_values('item')[o].tolist() # one ranking, one meaning
    assert record.scores()['likely'].tolist() == top['likely'].tolist()
    only = record.label_issues(only_issues=True)
    assert only['is_issue'].all() and len(only) == issues['is_issue'].sum() == only.attrs['n_issues']
    assert record.label_issues(noise_rate=.3)['p_wrong'].mean() == pytest.approx(.3, abs=1e-3)
    assert not record.label_issues(threshold=1.1)['is_issue'].any()

def test_items_that_were_never_seen_are_no_issues():
    x, y = torch.randn(20, 4), torch.arange(20) % 2
    dls = DataLoaders(TfmdDL(Rows(x, y), bs=16, drop_last=True, num_workers=0), TfmdDL(Rows(x, y), bs=20, num_workers=0))
    learn = quiet(Learner(dls, nn.Linear(4, 2), loss_func=XentLossFlat(), cbs=XentRecorder()))
    learn.fit(2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        issues = learn.xent_recorder.record.label_issues(noise_rate=.4)
    unseen = issues[issues['item'] >= 16]
    assert len(unseen) == 4 and unseen['p_wrong'].isna().all() and unseen['score'].isna().all() and not unseen['is_issue'].any()
    assert unseen['targ'].isna().all() and issues['p_wrong'].notna().sum() == 16

def test_masks_have_no_label_to_doubt():
    n, writer = 6, XentWriter()
    writer.set_items('train', pd.DataFrame(dict(item=np.arange(n), name=None, source=np.arange(n))), 'abc')
    for e in range(3):
        cols = dict(item=np.arange(n), pred=-np.ones(n), targ=-np.ones(n), n_pos=np.full(n, 4), **{o: np.linspace(.1, .9, n) for o in ('loss', 'grad_norm', 'el2n', 'p_targ')}, margin=np.linspace(-1, 1, n))
        writer.write(0, e, 'train', cols)
    record = writer.record
    record.meta['classes'] = 3
    assert np.isnan(record.score(LabelDoubt())).all()
    np.testing.assert_array_equal(record.score(), record.score('last_loss'))     # what stands in
    assert record.top(6)['item'].tolist() == [*range(6)][::-1] and not {'suspicion', 'label_doubt'} & {*record.scores()}
    with pytest.raises(ValueError, match='expected one class an item'): record.label_issues()

def test_of_probabilities_the_likeliest_class_is_the_label_that_is_doubted():
    "Targets of which a tenth puts most on another class, learnt by heart."
    x, y = load_digits(return_X_y=True)
    x, y, rng = torch.tensor(x[:640] / 8 - 1, dtype=torch.float32), y[:640], np.random.default_rng(0)
    wrong = rng.random(len(y)) < .1
    label = np.where(wrong, (y + rng.integers(1, 10, len(y))) % 10, y)
    soft = torch.tensor(.3 * rng.dirichlet(np.full(10, .3), len(y)) + .7 * np.eye(10)[label], dtype=torch.float32)
    set_seed(0)
    dls = DataLoaders(*(TfmdDL(Rows(x, soft), bs=64, shuffle=o, num_workers=0) for o in (True, False)))
    model = nn.Sequential(nn.Linear(64, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, 10))
    learn = quiet(Learner(dls, model, loss_func=XentLossFlat(), cbs=XentRecorder()))
    learn.fit_one_cycle(20, 5e-3)
    record = learn.xent_recorder.record
    first = lambda by: wrong[np.argsort(-record.score(by))[:wrong.sum()]].mean()
    np.testing.assert_array_equal(record.score(), record.score('label_doubt'))
    assert first('label_doubt') > .9 and first('label_doubt') >= first('loss') > first('last_loss')

def test_repeated_and_mixed_rows_count_by_their_share():
    e = dict(item=np.array([0, 0, 1]), weight=np.array([.5, 1., 1.]), margin=np.array([-2., 1, 2]), p_targ=np.array([.1, .6, .8]), pred=np.array([1., 0, 0]), targ=np.zeros(3))
    score, _ = plain(2, [e])
    np.testing.assert_allclose(LabelDoubt().finalize(run(2, [e])), score, rtol=1e-5)


# -- the originals

class Logits(Callback):
    "The logits of every training row, with its item."
    order = 45
    def before_fit(self): self.seen = []
    def after_loss(self):
        if not self.training: return
        i = {tuple(r): k for k, r in enumerate(self.dls.train.dataset.x[:, :40].numpy().round(3).tolist())} if not self.seen else self.at
        self.at = i
        self.seen.append((self.epoch, [i[tuple(r)] for r in self.xb[0][:, :40].numpy().round(3).tolist()], self.pred.detach().clone(), self.y.clone()))

@pytest.fixture(scope='module')
def trained():
    learn, _, _ = digits(.1, epochs=4, cbs=[Logits()])
    x = learn.dls.train.dataset.x[:, :40].numpy().round(3)
    assert len(np.unique(x, axis=0)) == len(x), 'items are told apart by their pixels'
    return learn

def test_aum_is_that_of_the_package(trained, tmp_path):
    calc = pytest.importorskip('aum').AUMCalculator(str(tmp_path))
    for _, items, z, y in trained.logits.seen: calc.update(z, y, items)
    ours, theirs = trained.xent_recorder.record.score('aum'), {i: s / calc.counts[i] for i, s in calc.sums.items()}
    np.testing.assert_allclose(ours[list(theirs)], list(theirs.values()), rtol=1e-4, atol=1e-5)
    assert len(theirs) == (~np.isnan(ours)).sum() > 1400
    assert not get_score('aum').largest_first

def test_data_maps_are_those_of_the_paper(trained):
    "Swayamdipta et al. (2020): mean and standard deviation over epochs of the label's probability, and the share of right predictions."
    p, right = {}, {}
    for _, items, z, y in trained.logits.seen:
        q = z.double().softmax(1)
        for i, row, label in zip(items, q, y):
            p.setdefault(i, []).append(row[label].item())
            right.setdefault(i, []).append(float(row.argmax() == label))
    record, at = trained.xent_recorder.record, list(p)
    np.testing.assert_allclose(record.score('confidence')[at], [np.mean(p[i]) for i in at], rtol=1e-4)
    np.testing.assert_allclose(record.score('variability')[at], [np.std(p[i]) for i in at], atol=1e-4)
    np.testing.assert_allclose(record.score('correctness')[at], [np.mean(right[i]) for i in at])
