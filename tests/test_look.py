"`eval_every` sees what the Learner sees, and nothing is left of it."
import collections
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelValidException
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import rnn_cbs
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import set_seed
from helpers import CpuAutocast, Net, Points, learner, quiet, same_bits, state, warned
from torch import nn

from fastai_xent.cache import StateCache
from fastai_xent.issues import LabelDoubt
from fastai_xent.look import _attributes_kept, in_order
from fastai_xent.losses import XentLossFlat
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder


# -- the same numbers as the Learner's

class Far(Points):
    "Inputs that only a callback brings near zero."
    def __getitem__(self, i): return self.x[i] * 50 + 100, self.y[i]
class Near(Callback):
    def before_batch(self): self.learn.xb = ((self.xb[0] - 100) / 50,)

class Sharp(Callback):
    "Another output than the model's."
    def after_pred(self): self.learn.pred = self.pred * 3

class OtherLabels(Callback):
    "Other targets than the loader's."
    def before_batch(self): self.learn.yb = ((self.yb[0] + 1) % 3,)

class Recurrent(nn.Module):
    "Gives a tuple, as fastai's text models do, and goes on from where the batch before has left it until it is reset."
    def __init__(self):
        super().__init__()
        self.rnn, self.out, self.hidden = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3), None
    def reset(self): self.hidden = None
    def forward(self, x):
        h = self.hidden[:, :len(x)] if self.hidden is not None and self.hidden.shape[1] >= len(x) else None
        out, h = self.rnn(x[:, None, :4], None if h is None else h.contiguous())
        self.hidden = h.detach()
        return self.out(out[:, -1]), out, out

class AsDict(Points):
    n_inp = 1
    def __getitem__(self, i): return dict(x=self.x[i], y=self.y[i])
class DictLearner(Learner):
    "Takes batches apart by name."
    def _split(self, b): self.xb, self.yb = (b['x'],), (b['y'],)

class Drawn(Points):
    def __init__(self, n=36, **kw):
        super().__init__(n, **kw)
        self.x = self.x.view(n, 1, 1, 5).repeat(1, 3, 2, 1)
class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, (1, 2)), nn.Linear(4, 3)
    def forward(self, x): return self.out(self.conv(x[..., :4]).relu().mean((2, 3)))

def dicts(cbs):
    set_seed(0)
    dls = DataLoaders(*(torch.utils.data.DataLoader(AsDict(n), batch_size=8, shuffle=True) for n in (36, 18)))
    return quiet(DictLearner(dls, Net(), loss_func=XentLossFlat(), lr=.05, cbs=cbs))

def of(model=Net, data=Points, more=list, loss=XentLossFlat):
    def make(cbs):
        set_seed(0)
        return learner([*cbs, *more()], loss(), model=model(), train=data(), valid=data(18, seed=1))
    return make
SEEN = {
    'plain': of(), 'dropout': of(lambda: Net(dropout=.5)), 'inputs': of(data=Far, more=lambda: [Near()]), 'outputs': of(more=lambda: [Sharp()]),
    'targets': of(more=lambda: [OtherLabels()]), 'autocast': of(more=lambda: [CpuAutocast(amp_mode='bf16')]),
    'text': of(Recurrent, more=rnn_cbs), 'text, regularised': of(Recurrent, more=lambda: rnn_cbs(alpha=2., beta=1.)), 'dicts': dicts,
    'channels last': of(Flat, Drawn, lambda: [ChannelsLast()]), 'weights': of(loss=lambda: XentLossFlat(weight=torch.tensor([1., 2., .5]))),
    'all': of(lambda: Net(dropout=.5), Far, lambda: [Near(), Sharp(), MixUp(), GradientAccumulation(20), CpuAutocast(amp_mode='bf16')]),
}

@pytest.mark.parametrize('name', SEEN)
def test_the_loss_is_the_learner_s_own(name):
    "The rows' losses are those of `get_preds` on the same items; the training is the same to the bit."
    rec = XentRecorder(eval_every=1)
    learn = SEEN[name]([rec])
    with warned() as said: learn.fit(2)
    assert not said, said
    end = copy.deepcopy(state(learn))
    got = rec.record.to_df('train_eval', 1)
    want = learn.get_preds(dl=in_order(learn.dls.train), with_loss=True, reorder=False)[2]
    assert got['item'].tolist() == list(range(36))
    np.testing.assert_allclose(got['loss'].astype(float), want.float(), rtol=2e-4, atol=1e-6)
    plain = SEEN[name]([XentRecorder()])
    plain.fit(2)
    same_bits(end, state(plain))


# -- no trace

class Notes(Callback):
    "Keeps notes in every way, and hears everything."
    order = 20
    def __init__(self): self.n, self.seen, self.by, self.kinds = 0, [], {}, set()
    def before_batch(self):
        self.n += 1
        self.seen.append(self.learn.iter)
        self.by[self.learn.iter] = self.n
        self.kinds.add(self.learn.training)
    def after_batch(self): self.seen.append(-1)
    def before_validate(self): self.seen.append('v')
class Averages(Callback):
    "Puts batch norm into train mode, also in validation: it goes on averaging."
    def before_batch(self): self.learn.model.body[1].train()

def trained(tmp_path, **kw):
    "A fit with much that has a state, and what it leaves."
    set_seed(0)
    notes = Notes()
    cbs = [XentRecorder(**kw), notes, Averages(), MixUp(), GradientAccumulation(20), SaveModelCallback(fname='best'),
           EarlyStoppingCallback(patience=3), ParamScheduler({'lr': SchedCos(.05, .01)})]
    learn = learner(cbs, model=Net(dropout=.3), path=tmp_path, model_dir='m')
    learn.fit(3)
    own = {k: v for k, v in vars(learn.gradient_accumulation).items() if k != 'learn'}
    return state(learn), vars(notes)['seen'], notes.n, notes.by, notes.kinds, learn.save_model.best, str(own), learn.training, learn.iter

def test_nothing_is_left_of_it(tmp_path, capsys):
    plain, looked = trained(tmp_path / 'a'), trained(tmp_path / 'b', eval_every=1)
    same_bits(plain[0], looked[0])
    assert plain[1:] == looked[1:]

def test_nothing_is_left_in_a_recurrent_model():
    "The state of a text model that nobody resets."
    class Next(Callback):
        order = 41
        def before_fit(self): self.states = []
        def after_epoch(self): self.states.append(self.learn.model.hidden.clone())
    class Last(Callback):
        def after_pred(self): self.learn.pred = self.pred[0]
    def run(**kw):
        set_seed(0)
        learn = learner([XentRecorder(**kw), Last(), nxt := Next()], model=Recurrent())
        learn.fit(2)
        return state(learn), nxt.states
    same_bits(run(), run(eval_every=1))

def test_nothing_is_left_in_a_loss():
    "A loss that counts its calls counts those of the training."
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.losses = 0, []
        def forward(self, pred, targ):
            self.calls += 1
            self.losses.append(F.cross_entropy(pred, targ))
            return self.losses[-1] / self.calls
    def run(**kw):
        learn = learner([XentRecorder(**kw)], Counting())
        with warned(): learn.fit(2)
        return state(learn), learn.loss_func.calls, len(learn.loss_func.losses)
    same_bits(run(), run(eval_every=1))

class Meter:
    def __init__(self): self.n, self.last = 0, collections.deque(maxlen=3)
    def add(self, x): self.n, _ = self.n + 1, self.last.append(x)

def _by(own, count):
    "A model whose outputs depend on how often it was called, as it keeps that itself."
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.own = own()
        def forward(self, x): return super().forward(x) * (1 + .01 * (count(self.own) % 7))
    return Model
def added(t): return t.add_(1).sum().item()
def bumped(a):
    a[0] += 1
    return a[0]
def nested(d):
    d['a']['n'] += 1
    return d['a']['n']
def newest(q):
    q.append(q[-1] + 1)
    return q[-1]
def metered(m):
    m.add(m.n)
    return m.n + sum(m.last)
COUNTING = {'tensor': (lambda: torch.zeros(2), added), 'array': (lambda: np.zeros(1), bumped), 'deque': (lambda: collections.deque([0], 3), newest),
            'nested': (lambda: {'a': {'n': 0}}, nested), 'tensors in a list': (lambda: [torch.zeros(1)], lambda x: added(x[0])), 'object': (Meter, metered)}

@pytest.mark.parametrize('name', COUNTING)
def test_nothing_is_left_in_what_changes_in_place(name):
    "A state that is not replaced but changed: in a tensor that is no buffer, an array, a deque, a dict in a dict, an object."
    def run(**kw):
        set_seed(0)
        learn = learner([XentRecorder(**kw)], model=_by(*COUNTING[name])())
        learn.fit(3)
        return state(learn)
    same_bits(run(), run(eval_every=1))

def test_nothing_is_left_in_an_optimizer():
    "A callback that lowers the learning rate whenever it hears a batch."
    class Lower(Callback):
        order = 20
        def after_pred(self): self.learn.opt.set_hyper('lr', self.learn.opt.hypers[-1]['lr'] * .9)
    def run(**kw):
        set_seed(0)
        learn = learner([XentRecorder(**kw), Lower()])
        learn.fit(2)
        return state(learn)
    same_bits(run(), run(eval_every=1))

def test_a_tensor_that_is_too_large_is_left_alone():
    "It is not copied: the memory of the training is not ours."
    big, small = torch.zeros(2**23), torch.zeros(3)
    holder = Meter()
    holder.big, holder.small = big, small
    with _attributes_kept([holder]):
        big.add_(1)
        small.add_(1)
    assert big.sum() == 2**23 and small.sum() == 0

def test_reports_do_not_hear_it(tmp_path):
    "The table that fastai shows has the numbers of train and valid."
    def run(**kw):
        learn = learner([XentRecorder(**kw)])
        learn.fit(3)
        return learn.recorder.values, learn.recorder.losses, learn.recorder.metric_names
    a, b = run(), run(eval_every=1)
    assert [list(o) for o in a[0]] == [list(o) for o in b[0]] and a[1] == b[1] and list(a[2]) == list(b[2])


# -- what may go wrong

class InALook(Callback):
    "Raises in the second batch of a look."
    def __init__(self, ex): self.ex = ex
    def before_batch(self):
        if self.learn.lock.locked() and self.learn.iter == 1: raise self.ex()

@pytest.mark.parametrize('ex, word', [(CancelEpochException, 'CancelEpochException'), (CancelFitException, 'CancelFitException'), (lambda: RuntimeError('no such key'), 'no such key')])
def test_a_look_that_fails_ends_alone(ex, word):
    "Told with the reason; the fit and its record go on."
    def run(cbs):
        learn = learner([*cbs, InALook(ex)])
        learn.fit(2)
        return state(learn)
    rec = XentRecorder(eval_every=1)
    with warned() as said: end = run([rec])
    assert len(said) == 1 and "nothing of 'train_eval'" in said[0] and word in said[0], said
    same_bits(end, run([]))
    assert [k.split for k in rec.record.epochs] == ['train', 'valid'] * 2

@pytest.mark.parametrize('ex, n', [(CancelBatchException, 28), (CancelValidException, 8)])
def test_a_look_that_is_cancelled_is_kept_as_far_as_it_went(ex, n):
    rec = XentRecorder(eval_every=1)
    with warned() as said: learner([rec, InALook(ex)]).fit(1)
    assert not said, said
    got = rec.record.to_df('train_eval')
    assert len(got) == n and not got['item'].isin(range(8, 16)).any()
    assert got['targ'].tolist() == Points().y[got['item'].tolist()].tolist()


# -- once, when the fit is over

class Stop(Callback):
    "Ends a fit in an event of an epoch; `order` says before or after the recorder hears of it."
    def __init__(self, event, epoch, order=60): self.event, self.at, self.order = event, epoch, order
    def __call__(self, event):
        if event == self.event and self.learn.epoch == self.at: raise CancelFitException()

def looks(rec): return [k.epoch for k in rec.record.epochs if k.split == 'train_eval']

@pytest.mark.parametrize('cbs, at', [
    ([], [2]), ([Stop('after_epoch', 1)], [1]), ([Stop('after_epoch', 2)], [2]), ([Stop('before_epoch', 1, 30)], [0]),
    ([EarlyStoppingCallback(monitor='valid_loss', min_delta=1e9, patience=1)], [1])], ids=['whole', 'cancelled', 'cancelled in the last', 'before an epoch', 'early stopping'])
def test_a_look_at_the_end(cbs, at):
    "Once, after the last epoch, and the training is the same to the bit."
    def run(rec):
        set_seed(0)
        learn = learner([rec, *copy.deepcopy(cbs)], model=Net(dropout=.3))
        learn.fit(3)
        return state(learn)
    rec = XentRecorder(eval_at_end=True)
    same_bits(run(rec), run(XentRecorder()))
    assert looks(rec) == at

def test_each_fit_ends_with_a_look():
    rec = XentRecorder(eval_at_end=True)
    learn = learner([rec])
    learn.fit(2)
    learn.fit(1)
    assert looks(rec) == [1, 2]
    both = XentRecorder(eval_every=1, eval_at_end=True)
    learner([both]).fit(2)
    assert looks(both) == [0, 1]

def test_the_last_of_several_looks_is_read_once(tmp_path, monkeypatch):
    "And anew when another look has come."
    rec, read = XentRecorder(tmp_path / 'r', eval_every=1), []
    learn = learner([rec])
    learn.fit(2)
    own = StateCache._own
    monkeypatch.setattr(StateCache, '_own', lambda self, r, seg: read.append([k[2] for k in seg.found]) or own(self, r, seg))
    record = XentRecord(tmp_path / 'r')
    first = record.score()
    np.testing.assert_array_equal([record.score(), record.scores()['label_doubt']], [first, first])
    assert read == [[1]]
    learn.fit(1)
    assert not np.array_equal(record.score(), first) and read == [[1], [2]]
    np.testing.assert_array_equal(record.score(), XentRecord(tmp_path / 'r').score())

def joined(record):
    "The doubts by hand: of all epochs of train, and of the last look."
    r, n = LabelDoubt(), len(record.items())
    def folded(split, epochs):
        state = r.init(n)
        for e in epochs:
            d = record.to_df(split, e)
            r.update(state, d['item'].to_numpy(), np.ones(len(d)), **{o: d[o].to_numpy(float) for o in r.columns})
        return state
    last = max(k.epoch for k in record.epochs)
    return r.finalize(r.with_look(folded('train', range(last + 1)), folded('train_eval', [last])))

@pytest.mark.parametrize('kw', [dict(eval_at_end=True), dict(eval_every=1)], ids=str)
def test_the_look_counts_in_the_doubts(tmp_path, kw):
    "In memory, on disk, opened again, compacted, in `top`, `scores` and `label_issues`; and not in other scores."
    rec = XentRecorder(tmp_path / 'r', precision='full', **kw)
    learner([rec]).fit(3)
    want, plain = joined(rec.record), XentRecorder()
    learner([plain]).fit(3)
    for record in (rec.record, XentRecord(tmp_path / 'r')):
        np.testing.assert_allclose(record.score(), want, rtol=1e-5)
        np.testing.assert_allclose(record.scores()['label_doubt'], want, rtol=1e-5)
        np.testing.assert_allclose(record.top(36).sort_values('item')['score'], want, rtol=1e-5)
        with warned(): issues = record.label_issues()
        np.testing.assert_allclose(issues.sort_values('item')['score'], want, rtol=1e-5)
        np.testing.assert_allclose(record.score('margin_loss'), plain.record.score('margin_loss'), rtol=1e-6)
    record.compact()
    np.testing.assert_allclose(XentRecord(tmp_path / 'r').score(), want, rtol=1e-5)
    assert not np.allclose(want, plain.record.score(), rtol=1e-3)

def test_a_look_in_the_middle_does_not_count():
    "A later epoch has said more; and a look at other items says nothing of these."
    rec = XentRecorder(eval_at_end=True)
    learn = learner([rec])
    learn.fit(2)
    rec.eval_at_end = False
    learn.fit(1)
    plain = XentRecorder()
    learn = learner([plain])
    learn.fit(2)
    learn.fit(1)
    np.testing.assert_allclose(rec.record.score(), plain.record.score(), rtol=1e-6)
    record = rec.record
    record.meta['splits']['train_eval']['segments'][0]['fingerprint'] = 'of others'
    assert record._segment('train').look is None
