"""Last-layer TracIn from a record, beside captum's at the checkpoints, and beside what leaving items out really does.

Digits, an MLP of 256 hidden units: wider than a sketch. Of each valid item the train items are ranked by what they did to its loss:
  record     (p − y)·(p′ − y′)·(h·h′ + 1), summed over the recorded epochs, each with its learning rate: train rows as they were trained;
  checkpoint the same from the model's weights after each epoch, in eval mode, exact; captum's TracInCPFast, if it is installed, must agree;
  similarity cosine of h and h′ after the last epoch, with the sign of "same label".
First their rank correlation. Then the linear datamodeling score (Park et al. 2023): the model is trained anew on random halves of train, and
the sum of an item's influences over each half is compared with the margin it really has there: Spearman over the halves, mean over valid."""
import os
import sys
import warnings

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore', category=FutureWarning)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from fastai.callback.core import Callback  # noqa: E402
import fastai.callback.schedule  # noqa: E402, F401  gives `fit_one_cycle`
from fastai.data.core import DataLoaders, TfmdDL  # noqa: E402
from fastai.learner import Learner  # noqa: E402
from fastai.torch_core import set_seed  # noqa: E402
from scipy.stats import rankdata  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from torch import nn  # noqa: E402

from fastai_xent.all import XentLossFlat, XentRecorder  # noqa: E402

N, EPOCHS, BS = 1200, 8, 64


class Rows:
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i], self.y[i]


class Checkpoints(Callback):
    "The weights after each epoch, and the mean learning rate in it."
    order = 60
    def before_fit(self): self.kept, self.lrs = [], []
    def before_train(self): self.own = []
    def after_batch(self):
        if self.training: self.own.append(self.opt.hypers[-1]['lr'])
    def after_epoch(self):
        self.kept.append({k: v.clone() for k, v in self.model.state_dict().items()})
        self.lrs.append(float(np.mean(self.own)))


def model(norm): return nn.Sequential(nn.Linear(64, 256), *([nn.BatchNorm1d(256)] if norm else []), nn.ReLU(), nn.Linear(256, 10))


def data(noise, seed=0):
    "Digits, with a share of wrong labels in train."
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    at = rng.permutation(len(y))
    x, y = torch.tensor(x[at] / 8 - 1, dtype=torch.float32), torch.tensor(y[at])
    wrong = rng.permutation(N)[:round(noise * N)]
    y[wrong] = (y[wrong] + torch.tensor(rng.integers(1, 10, len(wrong)))) % 10
    return x[:N], y[:N], x[N:], y[N:]


def fit(x, y, xv, yv, norm, seed, cbs=()):
    set_seed(seed)
    dls = DataLoaders(TfmdDL(Rows(x, y), bs=BS, shuffle=True, num_workers=0), TfmdDL(Rows(xv, yv), bs=1000, num_workers=0))
    learn = Learner(dls, model(norm), loss_func=XentLossFlat(), cbs=list(cbs))
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    with learn.no_logging(): learn.fit_one_cycle(EPOCHS, 5e-3)
    return learn


def of_epoch(h, p, y, hv, pv, yv):
    "How each train item changed the loss of each valid item, `v n`, by a step of 1."
    g, gv = F.one_hot(y, 10) - p, F.one_hot(yv, 10) - pv
    return (gv @ g.T) * (hv @ h.T + 1)


def recorded(record, y, yv, lrs):
    t = lambda x: torch.tensor(np.asarray(x), dtype=torch.float64).nan_to_num(0)
    def part(e): return of_epoch(t(record.features('train', e)), t(record.probs('train', e)), y, t(record.features('valid', e)), t(record.probs('valid', e)), yv)
    return sum(lr * part(e) for e, lr in enumerate(lrs))


def checkpointed(m, kept, lrs, x, y, xv, yv):
    res = 0
    for state, lr in zip(kept, lrs):
        m.load_state_dict(state)
        m.eval()
        with torch.no_grad(): h, hv = m[:-1](x), m[:-1](xv)
        with torch.no_grad(): res = res + lr * of_epoch(h.double(), m[-1](h).double().softmax(1), y, hv.double(), m[-1](hv).double().softmax(1), yv)
    return res, h.double(), hv.double()


def by_captum(m, kept, lrs, x, y, xv, yv):
    "The same by captum, or None."
    try: from captum.influence import TracInCPFast
    except ImportError: return None
    def load(net, path):
        i = int(path)
        net.load_state_dict(kept[i])
        net.eval()
        return lrs[i]
    tracer = TracInCPFast(m, m[-1], Rows(x, y), [str(i) for i in range(len(kept))], load, loss_fn=nn.CrossEntropyLoss(reduction='sum'), batch_size=N)
    return tracer.influence((xv, yv)).double()


def spearman(a, b):
    "The rank correlation of each row of `a` with that of `b`, mean and 5 % quantile."
    r = [np.corrcoef(rankdata(u), rankdata(v))[0, 1] for u, v in zip(np.asarray(a), np.asarray(b))]
    return f'{np.nanmean(r):.3f} (worst twentieth {np.nanquantile(r, .05):.3f})'


def lds(ways, halves, margins):
    out = {}
    for name, tau in ways.items():
        said = np.asarray(tau) @ halves.T                     # v m
        r = [np.corrcoef(rankdata(a), rankdata(b))[0, 1] for a, b in zip(said, margins)]
        out[name] = np.nanmean(r), np.nanstd(r) / np.sqrt(len(r))
    return out


def run(noise, norm, times, seed=0):
    x, y, xv, yv = data(noise)
    saw, rec = Checkpoints(), XentRecorder(features='every', keep_probs=True)
    learn = fit(x, y, xv, yv, norm, seed, [saw, rec])
    acc = (learn.model.eval()(xv).argmax(1) == yv).float().mean().item()
    own = recorded(rec.record, y, yv, saw.lrs)
    exact, h, hv = checkpointed(learn.model, saw.kept, saw.lrs, x, y, xv, yv)
    theirs = by_captum(learn.model, saw.kept, saw.lrs, x, y, xv, yv)
    if theirs is not None: print('captum and the exact product: largest difference, of the largest', ((theirs - exact).abs().max() / exact.abs().max()).item())
    same = (yv[:, None] == y[None]) * 2. - 1
    alike = F.normalize(hv, dim=1) @ F.normalize(h, dim=1).T * same
    print(f'noise {noise}, batch norm {norm}: accuracy {acc:.3f}; record and checkpoints: Spearman', spearman(own, exact), flush=True)
    rng, halves, margins = np.random.default_rng(1), [], []
    for k in range(times):
        at = rng.permutation(N)[:N // 2]
        m = fit(x[at], y[at], xv, yv, norm, 100 + k).model.eval()
        with torch.no_grad(): z = m(xv)
        own_z = z.gather(1, yv[:, None])[:, 0]
        margins.append((own_z - z.scatter(1, yv[:, None], -1e9).logsumexp(1)).numpy())
        halves.append(np.isin(np.arange(N), at) * 1.)
    ways = dict(record=own, checkpoints=exact, similarity=alike, random=torch.randn(alike.shape))
    for name, (r, se) in lds(ways, np.array(halves), np.array(margins).T).items(): print(f'  LDS {name:12s} {r:.3f} ± {se:.3f}', flush=True)


if __name__ == '__main__':
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    for noise in (0., .1):
        for norm in (False, True): run(noise, norm, times)
