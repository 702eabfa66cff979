"Datasets, models, probes and guards that more than one test file uses. Picklable by name, for workers that are spawned."
import copy
import os
import random
import signal
import warnings
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import SkipItemException
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn

from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder

FLOATS = ['loss', 'grad_norm', 'el2n', 'p_targ', 'margin']
COLUMNS = ['fit', 'epoch', 'split', 'item', *FLOATS, 'pred', 'targ']
UNIT = 2.**-17  # a margin is a whole number of these, so that float32 holds it exactly
MIDDLE = 2**19  # the item whose margin is zero
C = 3


class Hang(BaseException):
    "Not an `Exception`: nobody on the way may swallow it."

@contextmanager
def at_most(seconds):
    "Raise `Hang` in a body that does not come back."
    def alarm(*_): raise Hang(f"no end after {seconds} s")
    old = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)

@contextmanager
def little_memory(more=2**31):
    "An endless list ends in a MemoryError: no signal reaches a loop inside C. Where there are no such limits, the body just runs."
    try: import resource
    except ImportError:
        yield
        return
    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() if os.path.exists('/proc/self/statm') else 2**40
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, old[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_AS, old)


# -- items that say who they are

def coded(i) -> tuple:
    "Logits and classes of the items `i`: the class is i % C, and its margin (i − MIDDLE) units."
    i = torch.as_tensor(i, dtype=torch.long)
    y = i % C
    x = torch.zeros(*i.shape, C)
    return x.scatter_(-1, y.unsqueeze(-1), ((i - MIDDLE).double() * UNIT).float().unsqueeze(-1)), y

def decoded(x, y) -> np.ndarray:
    "The items of these logits and classes."
    return (x.gather(1, y.view(-1, 1).long()).squeeze(1).double() / UNIT).round().long().numpy() + MIDDLE

class Coded:
    "`n` items as `coded` makes them; some cannot be read."
    n_inp = 1                                         # as fastai's Datasets have it; otherwise fastai asks item 0, which must not be a skip then
    def __init__(self, n, skip=()): self.n, self.skip = n, frozenset(skip)
    def __len__(self): return self.n
    def __getitem__(self, i):
        i = int(i)
        if not 0 <= i < self.n: raise IndexError(i)
        if i in self.skip: raise SkipItemException
        return coded(i)

class OneRow(Coded):
    "Each item is a batch of one row."
    def __getitem__(self, i): return tuple(o[None] for o in super().__getitem__(i))

class Through(nn.Module):
    "The identity, with a parameter for the optimizer. Of a table's batch it takes the numbers."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
    def forward(self, *xs): return xs[-1] + 0 * self.w

def wrong_rows(df) -> np.ndarray:
    "Which rows of `to_df()` of a pass-through model on `Coded` items do not hold the numbers of their item? Computed from the item alone, in float64."
    item = df['item'].to_numpy().astype(np.int64)
    margin = (item - MIDDLE) * UNIT
    p = 1 / (1 + (C - 1) * np.exp(-margin))
    norm = (1 - p) * np.sqrt(1 + 1 / (C - 1))
    wrong = (df['targ'].to_numpy().astype(np.int64) != item % C) | (df['margin'].to_numpy().astype(np.float64) != margin)
    for col, want in dict(loss=-np.log(p), p_targ=p, el2n=norm, grad_norm=norm).items():
        wrong |= ~np.isclose(df[col].to_numpy().astype(np.float64), want, rtol=2e-5, atol=1e-7)
    won = df['pred'].to_numpy().astype(np.int64) == item % C
    return wrong | ((margin > 0) & ~won) | ((margin < 0) & won)

class Saw(Callback):
    "Which items did the model see? Read off the inputs, after all other callbacks have had their way."
    order = 1000
    def before_fit(self): self.passes = []
    def before_train(self): self.passes.append(('train', []))
    def before_validate(self): self.passes.append(('valid', []))
    def after_pred(self): self.passes[-1][1].append(decoded(self.learn.pred.detach(), self.learn.yb[0].view(-1)))

    def seen(self):
        "(split, items in order of arrival) of each pass."
        return [(s, np.concatenate(b) if b else np.empty(0, dtype=np.int64)) for s, b in self.passes]

CHECKED = dict(rows=0, bulk=False)

def through_learner(train, valid=None, cbs=None, **kw):
    "A learner whose model gives back its input."
    dls = DataLoaders(train, valid if valid is not None else TfmdDL(Coded(7), bs=4, num_workers=0))
    return quiet(Learner(dls, Through(), loss_func=XentLossFlat(), cbs=cbs, lr=.1, **kw))

def end_workers(dl):
    "End workers that stay: torch waits 5 s for each if loader and queues are collected together, as in a Learner's cycle."
    if dl._iterator is not None: dl._iterator._shutdown_workers()

def check(train, valid=None, epochs=2, cbs=(), learn=None, said_none=True) -> Learner:
    "Train on `Coded` items, and check every recorded row: against its item's own numbers, and against what the model saw."
    saw, recorder = Saw(), XentRecorder()
    with warned() as said:
        learn = through_learner(train, valid)
        learn.add_cbs([recorder, saw, *cbs])
        learn.fit(epochs)
    assert not said, said
    df = recorder.record.to_df()
    wrong = wrong_rows(df)
    assert not wrong.any(), f"{wrong.sum()} of {len(df)} rows are on the wrong item:\n{df[wrong].head()}"
    groups = {(s, e): g['item'].to_numpy() for (s, e), g in df.groupby(['split', 'epoch'], observed=True)}
    passes = [(s, i // 2, items) for i, (s, items) in enumerate(saw.seen())]
    assert len(passes) == 2 * epochs
    for split, epoch, items in passes:
        np.testing.assert_array_equal(groups.get((split, epoch), []), np.sort(items), err_msg=f"{split}, epoch {epoch}")
    assert sum(len(o[2]) for o in passes) == len(df)
    CHECKED['rows'] += len(df)
    learn.seen = saw.seen()
    return learn


# -- a training whose items can be told apart

class Points:
    "Noisy clusters; the last feature is the item's index, which `Net` does not look at."
    def __init__(self, n=36, c=3, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.y = torch.randint(0, c, (n,), generator=g)
        self.x = torch.cat([torch.randn(n, 4, generator=g) + F.one_hot(self.y, 4), torch.arange(n)[:, None]], 1).float()
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i], self.y[i]

class Net(nn.Module):
    def __init__(self, c=3, dropout=0., out=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, out or c))
    def forward(self, x): return self.body(x[:, :4])

class CpuAutocast(MixedPrecision):
    "fastai's mixed precision with the CPU's autocast."
    def before_fit(self):
        super().before_fit()
        self.autocast, self.learn.scaler = torch.autocast('cpu', torch.bfloat16), torch.amp.GradScaler('cpu', enabled=False)

def halves(model):
    "Two parameter groups, for `fine_tune`."
    return [list(model.body[0].parameters()), list(model.body[1:].parameters())]

def learner(cbs=None, loss_func=None, n=36, bs=8, workers=0, seed=0, model=None, train=None, valid=None, **kw):
    "The same learner each time: seeds, data and model."
    set_seed(seed)
    train, valid = train or Points(n), valid or Points(n // 2, seed=1)
    dls = DataLoaders(TfmdDL(train, bs=bs, shuffle=True, num_workers=workers), TfmdDL(valid, bs=bs, num_workers=0))
    return quiet(Learner(dls, model or Net(), loss_func=loss_func or XentLossFlat(), lr=.05, cbs=cbs, **kw))

def say_nothing(*_): pass

def quiet(learn):
    "Without printing and progress bars."
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    learn.logger = say_nothing
    return learn

class Truth(Callback):
    """Each batch as it was in `after_loss`, just before the recorder sees it, computed with torch's own functions.

    `passes` has one dict a pass: fit, epoch, split, `done` (did the pass end as a pass does?), `rows`."""
    order = 39
    def __init__(self, own_loss=None, ignore_index=-100): self.own_loss, self.ignore_index, self.passes, self.fit, self.now = own_loss, ignore_index, [], -1, None
    def _hears(self): return not (self.learn.lock.locked() or hasattr(self.learn, 'lr_finder') or hasattr(self.learn, 'gather_preds'))
    def before_fit(self):
        if self._hears(): self.fit, self.epoch, self.now = self.fit + 1, -1, None
    def before_epoch(self):                           # fastai's own number goes back to 0 when somebody calls validate()
        if self._hears(): self.epoch += 1
    def _begin(self, split):
        if not self._hears(): return
        self.now = dict(fit=self.fit, epoch=self.epoch, split=split, done=False, rows=[])
        self.passes.append(self.now)
    def before_train(self): self._begin('train')
    def before_validate(self): self._begin('valid')
    def _end(self):
        if self._hears() and self.now is not None: self.now['done'] = True
    def after_train(self): self._end()
    def after_validate(self): self._end()
    def after_loss(self):
        if not self._hears(): return
        z, y = self.learn.pred.detach().clone().as_subclass(torch.Tensor), self.learn.yb[0].clone().as_subclass(torch.Tensor)
        item = self.learn.xb[0][:, -1].round().long()
        self.now['rows'].append(self.rows(z, y, item))
    def rows(self, z, y, item):
        "float64, item by item"
        z = z.double().requires_grad_()
        with torch.enable_grad():
            loss = (self.own_loss or (lambda z, y: F.cross_entropy(z, y, reduction='none')))(z, y)
            grad, = torch.autograd.grad(loss.sum(), z)
        z = z.detach()
        label = y.argmax(1) if y.is_floating_point() else y
        ok = (label >= 0) & (label < z.shape[1]) & (y.is_floating_point() | (label != self.ignore_index))
        l = label.clamp(0, z.shape[1] - 1)
        p, hot = z.softmax(1), F.one_hot(l, z.shape[1])
        other = z.masked_fill(hot.bool(), -torch.inf).amax(1)
        cols = dict(loss=loss.detach(), grad_norm=grad.norm(dim=1), el2n=(p - hot).norm(dim=1), p_targ=p.gather(1, l[:, None])[:, 0],
                    margin=z.gather(1, l[:, None])[:, 0] - other)
        return dict(item=item, **{k: v.masked_fill(~ok, torch.nan) for k, v in cols.items()}, pred=z.argmax(1), targ=label, ok=ok)

def whole(p) -> dict:
    "The rows of one pass of `Truth` as arrays, in the order of items."
    if not p['rows']: return dict(item=np.empty(0, dtype=np.int64))
    cols = {k: torch.cat([r[k] for r in p['rows']]).numpy() for k in p['rows'][0]}
    order = np.argsort(cols['item'], kind='stable')
    return {k: v[order] for k, v in cols.items()}

def same_rows(df, p) -> None:
    "Assert that these recorded rows are those of one pass of `Truth`."
    want = whole(p)
    np.testing.assert_array_equal(df['item'].to_numpy(), want['item'])
    if not len(df): return
    for col in FLOATS:
        np.testing.assert_allclose(df[col].to_numpy().astype(np.float64), np.where(want['ok'], want[col], np.nan), rtol=1e-4, atol=2e-6, err_msg=col)
    for col in ('pred', 'targ'):
        np.testing.assert_array_equal(df[col].isna().to_numpy(), ~want['ok'], err_msg=col)
        np.testing.assert_array_equal(df[col].to_numpy(dtype=np.float64, na_value=np.nan)[want['ok']], want[col][want['ok']].astype(float), err_msg=col)

def check_against_truth(record, passes) -> None:
    """Assert that a record holds the passes of `Truth` and nothing else, and numbers them well.

    A pass that ended as it should and had rows must be there. One that did not may be there if its rows are right."""
    df = record.to_df()
    groups = [(k, g.reset_index(drop=True)) for k, g in df.groupby(['fit', 'epoch', 'split'], observed=True)] if len(df) else []
    for split in ('train', 'valid'):
        recorded = sorted([(e, f, g) for (f, e, s), g in groups if s == split], key=lambda o: o[:2])
        assert len({e for e, _, _ in recorded}) == len(recorded), f"{split}: an epoch number is used twice"
        want = [p for p in passes if p['split'] == split and p['rows']]
        for p in want:
            if recorded and len(recorded[0][2]) == len(whole(p)['item']) and np.array_equal(recorded[0][2]['item'], whole(p)['item']):
                try: same_rows(recorded[0][2], p)
                except AssertionError:
                    if p['done']: raise
                    continue
                e, f, _ = recorded.pop(0)
                assert p.setdefault('as', e) == e
                p['as_fit'] = f
            else: assert not p['done'], f"{split} of fit {p['fit']}, epoch {p['epoch']} was finished and is not in the record, or not as it was"
        assert not recorded, f"{split}: epochs {[o[0] for o in recorded]} of the record hold rows that no pass had"
    kept = [p for p in passes if 'as' in p]
    by_epoch = {}
    for p in kept: by_epoch.setdefault((p['fit'], p['epoch']), set()).add((p['as_fit'], p['as']))
    assert all(len(v) == 1 for v in by_epoch.values()), f"train and valid of one epoch have different numbers: {by_epoch}"
    numbers = [next(iter(by_epoch[k])) for k in sorted(by_epoch)]
    assert [n[1] for n in numbers] == sorted({n[1] for n in numbers}), f"epoch numbers do not go on: {numbers}"
    fits = {}
    for k in by_epoch: fits.setdefault(k[0], set()).add(next(iter(by_epoch[k]))[0])
    assert all(len(v) == 1 for v in fits.values()) and len({next(iter(v)) for v in fits.values()}) == len(fits), f"fit numbers are mixed: {fits}"


# -- the same training?

def rng_state():
    return torch.get_rng_state(), np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()

def ended(learn):
    "Note what a training has left behind, before anything else happens."
    learn.end = copy.deepcopy(state(learn))
    return learn

def state(learn) -> dict:
    "Everything that a training leaves behind, to be compared bit by bit."
    opt, shown = learn.opt.state_dict() if learn.opt is not None else {}, getattr(learn, 'recorder', None)
    return dict(model=learn.model.state_dict(), opt=opt, values=[[float(x) for x in v if x is not None] for v in getattr(shown, 'values', [])],
                losses=getattr(shown, 'losses', []), rng=rng_state())

def same_bits(a, b, at='') -> None:
    "Assert equality down to the last bit, whatever is nested in whatever."
    assert type(a) is type(b), f"{at}: {type(a)} and {type(b)}"
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.detach().nan_to_num(nan=12345.), b.detach().nan_to_num(nan=12345.)), f"{at} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{at}: {a.keys()} and {b.keys()}"
        for k in a: same_bits(a[k], b[k], f'{at}.{k}')
    elif hasattr(a, '__len__') and not isinstance(a, str):
        assert len(a) == len(b), f"{at}: {len(a)} and {len(b)} long"
        for i, (x, y) in enumerate(zip(a, b)): same_bits(x, y, f'{at}[{i}]')
    else: assert a == b or (a != a and b != b), f"{at}: {a} and {b}"

@contextmanager
def warned():
    "The messages of our own warnings in the body."
    said = []
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        yield said
    said += [str(o.message) for o in got if 'XentRecorder' in str(o.message)]
