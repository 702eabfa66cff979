"XentSampler: unbiased, exact about which row is which, and no trace where it does nothing."
import math
import pickle
import warnings
from itertools import combinations

import fastai.callback.schedule  # noqa: F401 `fit_one_cycle`, `lr_find`
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelEpochException, CancelTrainException
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from helpers import Coded, Points, Saw, decoded, ended, learner, quiet, same_bits, state, through_learner, wrong_rows
from hypothesis import given
from hypothesis import strategies as st
from test_taps import LOADERS
from torch import nn

from fastai_xent.linear import head_in_loss
from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder
from fastai_xent.sampler import XentSampler, n_skipped, thin


def said_by(got): return [str(o.message) for o in got if 'XentSampler' in str(o.message)]

@pytest.fixture
def said():
    "What the sampler says in a test."
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        yield lambda: said_by(got)


# -- the draw

@given(easy=st.lists(st.booleans(), min_size=1, max_size=200), r=st.floats(0, .99),
       bs=st.sampled_from([None, 1, 2, 3, 8, 64]), drop_last=st.booleans(), seed=st.integers(0, 99))
def test_thin(easy, r, bs, drop_last, seed):
    easy = np.array(easy)
    if bs is None: drop_last = False                  # fastai forbids it
    keep, w = thin(easy, r, np.random.default_rng(seed), bs, drop_last)
    k, m, n = (~keep).sum(), easy.sum(), len(easy)
    assert keep[~easy].all() and k <= r * m
    assert m == 0 or (m - k) * w == pytest.approx(m)  # the weights of the easy rows add up to their number
    if k and bs and bs > 1: assert n - k >= bs if drop_last else (n - k) % bs != 1
    if not k: assert w == 1

def test_every_draw_is_as_likely():
    rng, easy = np.random.default_rng(0), np.array([True, False, True, True, True])
    seen = {}
    for _ in range(6000):
        kept = tuple(np.flatnonzero(thin(easy, .5, rng)[0]))
        seen[kept] = seen.get(kept, 0) + 1
    assert set(seen) == {tuple(sorted((1, *o))) for o in combinations([0, 2, 3, 4], 2)}
    assert max(abs(o - 1000) for o in seen.values()) < 5 * math.sqrt(6000 * 1 / 6 * 5 / 6)

def test_skips_as_many_as_it_can(): assert [n_skipped(m, 100, .5) for m in (0, 1, 2, 3, 99)] == [0, 0, 1, 1, 49]


# -- without bias

class Sums(Callback):
    "The sum over each epoch of the gradient of the rows' losses."
    order = 50
    def __init__(self): self.epochs, self.rows = [], []
    def before_train(self):
        self.epochs.append(0)
        self.rows.append(0)
    def before_step(self):
        self.epochs[-1] = self.epochs[-1] + self.learn.model.weight.grad.clone() * len(self.y)
        self.rows[-1] += len(self.y)

def frozen(cbs, loss_func=None, n=40, bs=14):
    "A linear model that does not learn, and the gradient over all its rows."
    data = Points(n)
    data.x = data.x[:, :4]
    data.x[:30] *= 3                                  # some are easy
    torch.manual_seed(3)
    model = nn.Linear(4, 3, bias=False)
    loss_func = loss_func or XentLossFlat()
    dls = DataLoaders(TfmdDL(data, bs=bs, shuffle=True, num_workers=0), TfmdDL(data, n=2, bs=2, num_workers=0))
    learn = quiet(Learner(dls, model, loss_func=loss_func, opt_func=SGD, lr=0., cbs=cbs))
    full, = torch.autograd.grad(F.cross_entropy(model(data.x), data.y, reduction='sum', label_smoothing=getattr(loss_func.func, 'label_smoothing', 0.) if hasattr(loss_func, 'func') else 0.), model.weight)
    return learn, full

@pytest.mark.parametrize('loss_func', [XentLossFlat, CrossEntropyLossFlat, lambda: XentLossFlat(label_smoothing=.1)])
def test_expected_gradient_is_the_full_one(loss_func):
    sums = Sums()
    learn, full = frozen([XentSampler(anneal=0), sums], loss_func())
    learn.fit(200)
    torch.testing.assert_close(sums.epochs[0], full, rtol=1e-4, atol=1e-4)     # the first epoch has all rows
    assert set(sums.rows[1:]) != {40} and max(sums.rows[1:]) < 40
    draws = torch.stack(sums.epochs[1:])
    error, bound = (draws.mean(0) - full).abs(), 4.5 * draws.std(0) / math.sqrt(len(draws)) + 1e-4
    assert (error < bound).all()

def test_without_weights_it_would_be_biased(monkeypatch):
    "The test above can fail."
    sums = Sums()
    learn, full = frozen([XentSampler(anneal=0), sums])
    monkeypatch.setattr(XentSampler, 'after_pred', lambda self: None)
    learn.fit(200)
    draws = torch.stack(sums.epochs[1:])
    assert ((draws.mean(0) - full).abs() > 10 * draws.std(0) / math.sqrt(len(draws))).any()

class ByHand(Callback):
    "Each step's gradient against that of mean(wᵢ ℓᵢ), with the weights known from the items."
    order = 34                                        # before the sampler hooks
    def __init__(self, loss): self.loss, self.steps, self.weighed = loss, 0, 0
    def after_pred(self):
        if not self.training: return
        tap = self.learn.xent_sampler._tap
        item = self.x[:, -1].round().long().numpy()
        w = torch.as_tensor(np.where(tap.easy[item], tap.scale, 1.), dtype=torch.float32)
        z = self.pred.detach().clone().requires_grad_()
        self.want, = torch.autograd.grad((w.view(-1, *[1] * (z.ndim - 2)) * self.loss(z, self.y)).sum() / self.loss(z, self.y).numel(), z)
        self.learn.pred.retain_grad()
        self.kept, self.weighed = self.learn.pred, self.weighed + int((w != 1).sum())
    def before_step(self):
        torch.testing.assert_close(self.kept.grad, self.want, rtol=1e-5, atol=1e-8)
        self.steps += 1

class Strip(nn.Module):
    "Predictions for 6 positions an item."
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 18)
    def forward(self, x): return self.f(x[:, :4]).view(-1, 3, 6)

class Strips(Points):
    def __getitem__(self, i): return self.x[i], self.y[i].repeat(6)

@pytest.mark.parametrize('loss_func, rows, kw', [
    (XentLossFlat(), lambda z, y: F.cross_entropy(z, y, reduction='none'), {}),
    (CrossEntropyLossFlat(), lambda z, y: F.cross_entropy(z, y, reduction='none'), {}),
    (nn.CrossEntropyLoss(label_smoothing=.2), lambda z, y: F.cross_entropy(z, y, reduction='none',
            label_smoothing=.2), {}),
    (XentLossFlat(axis=1), lambda z, y: F.cross_entropy(z, y, reduction='none'),
     dict(model=Strip(), train=Strips(36), valid=Strips(9)))], ids=['ours', 'fastai', 'torch', 'dense'])
@pytest.mark.parametrize('workers', [0, 2])
def test_each_step_by_hand(loss_func, rows, kw, workers):
    hand = ByHand(rows)
    learn = learner([hand, XentSampler(anneal=0)], loss_func, workers=workers, **kw)
    learn.fit(4)
    assert hand.weighed > 10 and hand.steps < 4 * 5

def test_gradient_accumulation_adds_weighted_gradients():
    learn, full = frozen([XentSampler(anneal=0), GradientAccumulation(10**6)])
    learn.fit(200)                                    # 10**6 rows are never reached: there is no step, and the gradients add up
    got = learn.model.weight.grad * 10**6 / 200
    assert learn.xent_sampler.saved > .2
    assert (got - full).norm() < .05 * full.norm()


# -- steps, schedules, bars

class Follows(Callback):
    "Do the numbers of an epoch agree with each other?"
    order = 70
    def __init__(self): self.epochs = []
    def before_train(self): self.n = 0
    def after_batch(self):
        if self.training: self.n += 1
    def after_train(self):
        self.epochs.append(self.n)
        assert self.n == self.learn.n_iter
        assert abs(self.learn.pct_train - (self.epoch + 1) / self.n_epoch) < 1e-6

@pytest.mark.grid
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize('kind', [o for o in LOADERS if o != 'prebatched'])
def test_loaders(kind, shuffle, drop_last, workers, said):
    "Rows, weights and losses are those of their items, beside a recorder; and the numbers of iterations are right."
    train = LOADERS[kind](50, [], bs=4, shuffle=shuffle, drop_last=drop_last, num_workers=workers)
    full = len(train)
    sampler, saw, follows, recorder = XentSampler(anneal=.25), Saw(), Follows(), XentRecorder()
    learn = through_learner(train, LOADERS['table'](9, [], bs=4, num_workers=0) if kind == 'table' else None)
    learn.add_cbs([recorder, sampler, saw, follows])
    learn.fit(4)
    assert not said()
    assert follows.epochs[0] == follows.epochs[-1] == full and max(follows.epochs[1:3]) < full
    df, seen = recorder.record.to_df('train'), [o for s, o in saw.seen() if s == 'train']
    assert not wrong_rows(df).any()
    for e, items in enumerate(seen): np.testing.assert_array_equal(df[df['epoch'] == e]['item'], np.sort(items))
    assert sampler.n_rows == len(df)
    last = df.drop_duplicates('item', keep='last')
    np.testing.assert_array_equal(sampler.losses[last['item']], last['loss'])
    assert np.isnan(np.delete(sampler.losses, last['item'])).all()

def test_every_item_is_seen_again_and_again():
    saw = Saw()
    learn = through_learner(TfmdDL(Coded(60), bs=8, shuffle=True, num_workers=0), cbs=[XentSampler(anneal=.2), saw])
    learn.fit(20)
    seen = [set(o.tolist()) for s, o in saw.seen() if s == 'train']
    assert all(len(o) == 60 for o in [seen[0], *seen[-4:]])          # first, and the last fifth
    assert all(len(o) < 60 for o in seen[1:-4])
    assert set.union(*seen[1:-4]) == set(range(60))

@pytest.mark.parametrize('anneal, n, complete', [(.125, 16, 2), (.125, 10, 2), (.1, 10, 1), (0, 5, 0), (1, 5, 5),
        (.3, 10, 3)])
def test_annealing(anneal, n, complete):
    follows = Follows()
    learn = through_learner(TfmdDL(Coded(60), bs=4, shuffle=True, num_workers=0), cbs=[XentSampler(anneal=anneal), follows])
    learn.fit(n)
    assert [o == 15 for o in follows.epochs] == [e == 0 or e >= n - complete for e in range(n)]

def test_one_cycle_ends_with_the_last_step():
    follows = Follows()
    learn = learner([XentSampler(), follows])
    learn.fit_one_cycle(8)
    assert len(learn.recorder.lrs) == sum(follows.epochs) < 8 * 5 and learn.recorder.lrs[-1] < 1e-3

def test_progress_bar_has_the_length_of_the_epoch():
    class Bars(Callback):
        order = 61
        totals = []
        def before_train(self): self.totals.append((self.learn.progress.pbar.total, len(self.learn.dl)))
    Bars.totals = []
    learn = learner([XentSampler(anneal=0), Bars()])
    learn.add_cb(ProgressCallback())
    learn.fit(3)
    assert all(a == b for a, b in Bars.totals) and Bars.totals[1][0] < Bars.totals[0][0]

def test_no_batch_of_one_row():
    "Batch normalization fails on a single row."
    for n in range(30, 46):
        if n % 8 != 1: learner([XentSampler(anneal=0)], n=n).fit(6)


# -- no trace

def dropping(cbs, **kw):
    learn = learner(cbs, **kw)
    learn.model.body[3].p = .2
    return learn

def run(cbs, epochs=3, **kw):
    learn = dropping(cbs, **kw)
    learn.fit_one_cycle(epochs)
    return state(ended(learn))

@pytest.mark.parametrize('make', [None, lambda: WeightedDL(Points(), bs=8, shuffle=True, num_workers=0,
        wgts=np.arange(36) % 5 + .1),
                                  lambda: PartialDL(Points(), bs=8, shuffle=True, num_workers=0, partial_n=30)],
                                  ids=['plain', 'weighted', 'partial'])
@pytest.mark.parametrize('sampler', [lambda: XentSampler(r=0), lambda: XentSampler(anneal=1)],
                         ids=['r=0', 'anneal=1'])
@pytest.mark.parametrize('workers', [0, 2])
def test_training_on_all_is_the_same_to_the_bit(make, sampler, workers):
    def go(cbs):
        learn = dropping(cbs, workers=workers)
        if make is not None:
            set_seed(0)
            learn.dls.loaders[0] = make()
        learn.fit(3)
        return state(ended(learn))
    same_bits(go([]), go([sampler()]))

def test_recorder_beside_it_changes_nothing():
    a, b, c = run([XentSampler()]), run([XentSampler(), XentRecorder()]), run([XentRecorder(), XentSampler()])
    same_bits(a, b)
    same_bits(a, c)

def test_recorder_agrees_with_the_loss_in_every_batch(said):
    learn = learner([XentSampler(anneal=0), XentRecorder(check=True)])
    learn.fit(4)
    assert learn.xent_recorder.record.n_epochs == 4 and len(learn.xent_recorder.record.to_df('train')) < 4 * 36

def test_same_seed_same_draws(): same_bits(run([XentSampler()], epochs=6), run([XentSampler()], epochs=6))

def test_the_loader_is_left_alone():
    learn = learner([XentSampler(anneal=0)])
    dl = learn.dls.train
    before = {k: v for k, v in vars(dl).items() if k not in ('rng', '_DataLoader__idxs')}
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch == 2 and self.iter == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(4, cbs=Stop())
    assert learn.dls.train is dl
    assert {k: vars(dl)[k] for k in before} == before and not {'get_idxs', 'create_batches', 'do_item'} & set(vars(dl))
    assert sum(len(y) for _, y in dl) == 36
    learn.remove_cbs(Stop)
    learn.fit(3)
    assert learn.xent_sampler.saved > 0

@pytest.mark.parametrize('stop', [CancelTrainException, CancelEpochException])
def test_cancelled_passes(stop, said):
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.iter == 2 and self.epoch % 2: raise stop
    recorder = XentRecorder()
    learn = learner([XentSampler(anneal=0), recorder, Stop()])
    learn.fit(6)
    assert not said() and (learn.xent_sampler.losses < 10).all()

def test_lr_find_is_not_thinned():
    learn = learner([XentSampler(anneal=0)])
    learn.fit(2)
    known = learn.xent_sampler.losses.copy()
    with learn.no_bar() if hasattr(learn, 'no_bar') else warnings.catch_warnings(): learn.lr_find(num_it=12, show_plot=False, suggest_funcs=())
    np.testing.assert_array_equal(known, learn.xent_sampler.losses)

def test_validation_in_between(said):
    class Looks(Callback):
        def after_epoch(self):
            if not self.learn.lock.locked(): self.learn.get_preds(ds_idx=0)
    learn = learner([XentSampler(anneal=0)], valid=Points(18, seed=1))
    learn.fit(2)
    learn.validate()
    preds, _ = learn.get_preds(ds_idx=0)
    assert len(preds) == 36
    learn.fit(2)
    assert not said()

def test_another_dataset_starts_anew():
    learn = learner([XentSampler(anneal=0)])
    learn.fit(2)
    learn.dls = learner(n=50).dls
    follows = Follows()
    learn.add_cb(follows)
    learn.fit(2)
    assert follows.epochs[0] == 7 > follows.epochs[1] and len(learn.xent_sampler.losses) == 50

def test_pickle_holds_no_data(tmp_path):
    learn = learner([XentSampler(.3, anneal=.5)])
    learn.fit(2)
    sampler = pickle.loads(pickle.dumps(learn)).xent_sampler
    assert (sampler.r, sampler.anneal, sampler.losses, sampler._dataset) == (.3, .5, None, None)


# -- items that cannot be read

@pytest.mark.parametrize('workers', [0, 2, 3])
@pytest.mark.parametrize('skip', [[1], [0, 3, 12, 13, 14, 15, 16, 20, 45]])
def test_weights_with_unreadable_items(skip, workers):
    class Weights(Callback):
        order, wrong, weighed = 34, 0, 0
        def after_pred(self):
            if not self.training: return
            tap, item = self.learn.xent_sampler._tap, decoded(self.pred.detach(), self.yb[0])
            w = tap.weights(self.iter, len(item))
            want = np.where(tap.easy[item], tap.scale, 1.)
            self.wrong, self.weighed = self.wrong + int((abs(w - want) > 1e-6).sum()), self.weighed + int((w != 1).sum())
    probe = Weights()
    learn = through_learner(TfmdDL(Coded(50, skip), bs=4, shuffle=True, num_workers=workers), cbs=[XentSampler(anneal=0), probe, XentRecorder()])
    learn.fit(3)
    assert not probe.wrong and probe.weighed > 20
    assert not wrong_rows(learn.xent_recorder.record.to_df('train')).any()


# -- a fit that skips nothing says so

@pytest.mark.parametrize('n, anneal, words', [
    (1, .125, 'it had 1 epoch; the last 1 train on all, and so does the first, in which no loss is known; train longer, or with a smaller `anneal`'), (2, .125, 'it had 2 epochs; the last 1'),
    (4, .7, 'it had 4 epochs; the last 3'), (1, 0, 'it had 1 epoch; the last 0')])
def test_a_fit_too_short_is_told(said, n, anneal, words):
    sampler = XentSampler(anneal=anneal)
    assert trained(learner([sampler]), n) == [5] * n
    assert len(said()) == 1 and said()[0].startswith('XentSampler skipped nothing in this fit: ') and words in said()[0] and sampler.saved == 0

class Same(Points):
    "One point, over and over: all losses are equal."
    def __init__(self, n=36):
        super().__init__(n)
        self.x, self.y = self.x[:1].repeat(n, 1), self.y[:1].repeat(n)

@pytest.mark.parametrize('kw, r', [(dict(train=Same()), .5), (dict(), .01)],
                         ids=['equal losses', 'a share of less than one'])
def test_a_share_of_nothing_is_told(said, kw, r):
    learn = learner([XentSampler(r, anneal=0)], model=Frozen(), **kw)
    assert trained(learn) == [5] * 4
    assert len(said()) == 1 and f'too few examples lay below the mean loss for a share of r={r} to come to one' in said()[0]

class Frozen(nn.Module):
    "The same logits for the same point."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
    def forward(self, x): return x[:, :3] + 0 * self.w

@pytest.mark.parametrize('kw, fits', [(dict(anneal=.125), [4]), (dict(anneal=0), [2]), (dict(r=0), [3, 3]),
                                      (dict(anneal=1), [3]), (dict(anneal=0), [3, 1])])
def test_what_was_asked_for_is_not_told(said, kw, fits):
    "Nothing is said where rows were skipped, or where none should be."
    learn = learner([XentSampler(**kw)])
    for n in fits: learn.fit(n)
    assert not said()

def test_each_fit_counts_for_itself(said):
    learn = learner([XentSampler()])
    learn.fit(4)
    assert not said()
    for _ in range(3): learn.fit(1)                   # in a loop: told once
    assert len(said()) == 1 and 'it had 1 epoch;' in said()[0]
    learn.fit(3)                                      # losses are known from the first
    assert len(said()) == 1


# -- refusals: all rows are trained, and the reason is told once

def trained(learn, epochs=4):
    saw = Follows()
    learn.add_cb(saw)
    learn.fit(epochs)
    return saw.epochs

def test_mixup_is_refused(said):
    assert trained(learner([XentSampler(), MixUp()])) == [5] * 4
    assert len(said()) == 1 and 'missing as a partner' in said()[0]

def test_two_samplers_are_refused(said):
    assert trained(learner([XentSampler(), XentSampler()])) == [5] * 4
    assert len(said()) == 2 and all('one is enough' in o for o in said())

def test_torch_loaders_are_refused(said):
    learn = learner([XentSampler()])
    learn.dls = DataLoaders(torch.utils.data.DataLoader(Points(), batch_size=8), torch.utils.data.DataLoader(Points(9), batch_size=8))
    assert trained(learn) == [5] * 4
    assert len(said()) == 1 and 'wrap the dataset in a `TfmdDL`' in said()[0]

def test_reordering_loaders_are_refused(said):
    class Backwards(TfmdDL):
        def __iter__(self): yield from reversed(list(super().__iter__()))
    learn = learner([XentSampler()])
    learn.dls.loaders[0] = Backwards(Points(), bs=8, num_workers=0)
    assert trained(learn) == [5] * 4
    assert len(said()) == 1 and 'has its own `__iter__`' in said()[0]

def test_distributed_loaders_are_refused(said):
    class Ranked(TfmdDL): pass
    learn = learner([XentSampler()])
    dl = learn.dls.loaders[0] = Ranked(Points(), bs=8, num_workers=0)
    dl.dl = learn.dls.valid
    assert trained(learn) == [5] * 4
    assert len(said()) == 1 and 'distributed' in said()[0]

class Whole:
    "A loss of the whole batch."
    def __call__(self, z, y): return (F.cross_entropy(z, y, reduction='none')**2).mean().sqrt()

def test_losses_without_rows_are_refused(said):
    assert trained(learner([XentSampler()], Whole())) == [5] * 4
    assert len(said()) == 1 and 'cannot be asked of' in said()[0]

def test_head_in_the_loss_is_refused(said):
    learn = learner([XentSampler()])
    learn.model, learn.loss_func = head_in_loss(learn.model)
    assert trained(learn) == [5] * 4
    assert len(said()) == 1 and 'use the plain model' in said()[0]

def test_other_losses_of_fastai_work(said):
    assert max(trained(learner([XentSampler(anneal=0)], FocalLossFlat()))[1:]) < 5
    assert not said()

def test_a_callback_that_removes_rows(said):
    class Shorten(Callback):
        order, run_valid = 5, False
        def before_batch(self): self.learn.xb, self.learn.yb = (self.x[1:],), (self.y[1:],)
    assert trained(learner([XentSampler(), Shorten()])) == [5] * 4
    assert len(said()) == 1 and 'added or removed rows' in said()[0]

def test_loaders_that_read_other_items_than_the_first():
    class Middle(TfmdDL):
        def get_idxs(self): return [i + 20 for i in super().get_idxs()]
    recorder, sampler, follows = XentRecorder(), XentSampler(anneal=0), Follows()
    through_learner(Middle(Coded(60), n=30, bs=4, shuffle=True, num_workers=0), cbs=[recorder, sampler, follows]).fit(4)
    assert max(follows.epochs[1:]) < 8 and np.isfinite(sampler.losses).nonzero()[0].tolist() == list(range(20, 50))
    assert not wrong_rows(recorder.record.to_df('train')).any()

@pytest.mark.parametrize('workers', [0, 2])
def test_an_error_inside_the_loader_does_not_end_the_training(said, workers):
    class Beyond(Points):
        "Has no items by its own account."
        def __len__(self): return 0
    class Shifted(TfmdDL):
        by = 0
        def get_idxs(self): return [i + self.by for i in super().get_idxs()]
    learn = learner([XentSampler(anneal=0)])
    dl = learn.dls.loaders[0] = Shifted(Beyond(40), n=36, bs=8, shuffle=True, num_workers=workers)
    assert trained(learn, 2)[1] < 5
    dl.by = 4                                         # items 36 to 39 are beyond what the loader said it has
    assert trained(learn, 1)[-1] == 5
    assert len(said()) == 1 and 'index 3' in said()[0]

def test_our_own_error_does_not_end_the_training(said, monkeypatch):
    def broken(self): raise RuntimeError('broken')
    monkeypatch.setattr(XentSampler, '_easy', broken)
    assert trained(learner([XentSampler()])) == [5] * 4
    assert len(said()) == 1 and 'broken' in said()[0]

@pytest.mark.parametrize('kw, words', [(dict(r=1), 'r is 1'), (dict(r=-.1), 'r is -0.1'),
                                       (dict(anneal=1.5), 'anneal is 1.5')])
def test_settings_are_checked(kw, words):
    with pytest.raises(ValueError, match=words): XentSampler(**kw)
