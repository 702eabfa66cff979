"""Trainings with planted noise of four kinds, whose rows are kept for `verdict.py`: a second or two each.

Their rows lie in XENT_CACHE (default: xent_trainings among the temporary files), a file each; those that are there are not made again.
`trainings.py folds` makes the five more trainings, on four fifths each, of those that are there: a rival's probabilities.

Noise: `sym`, any other class; `pair`, the next class; `class`, each class with a rate and likely targets of its own; `confusable`, drawn
from the softened predictions of a weak model of other items, so that it sits on hard items, as human mistakes do.
Data: `XENT_DATA` (default ../shared/data), and Debian's package dataset-fashion-mnist; what is missing is skipped."""
import os
import sys
import tempfile
import time
import warnings
import zlib
from functools import cache
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore', category=FutureWarning)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from noise import adult, bag, confused, digits, fashion, mlp, mnist, mnist_wrong, trec, weak_logits  # noqa: E402
from overhead import cnn  # noqa: E402
from sklearn.datasets import load_breast_cancer, load_wine, make_classification  # noqa: E402
from torch import nn  # noqa: E402

CACHE = Path(os.environ.get('XENT_CACHE', f'{tempfile.gettempdir()}/xent_trainings'))


# -- data: inputs and classes, or None where something is missing

def scaled(x): return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)

def cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return scaled(x), y

def wine():
    x, y = load_wine(return_X_y=True)
    return scaled(x), y

def table():
    "Seven unequal classes that overlap, as in a table of land cover."
    x, y = make_classification(4000, 24, n_informative=10, n_redundant=6, n_classes=7, n_clusters_per_class=2, class_sep=1.6, flip_y=0,
                               weights=[.25, .2, .15, .15, .1, .1, .05], random_state=0)
    return scaled(x), y

class Shifted(nn.Module):
    "Images moved by up to `by` pixels while the model trains."
    def __init__(self, model, by):
        super().__init__()
        self.model, self.by = model, by
    def forward(self, x):
        if self.training:
            x = torch.cat([o.roll(torch.randint(-self.by, self.by + 1, (2,)).tolist(), (-2, -1)) for o in x.chunk(16)])
        return self.model(x)

def dense(x, c, width, depth): return mlp(x[0].numel(), width, c, depth)

#        data, batch size, regime → (model, epochs); `short` has 2, 3 or 4 epochs
SETS = {'digits': (digits, 64, dict(short=(lambda x, c: dense(x, c, 64, 1), None), fits=(lambda x, c: dense(x, c, 64, 1), 12),
                                    memorises=(lambda x, c: dense(x, c, 256, 2), 25))),
        'table': (table, 128, dict(short=(lambda x, c: dense(x, c, 64, 1), None), fits=(lambda x, c: dense(x, c, 96, 1), 10),
                                   memorises=(lambda x, c: dense(x, c, 256, 2), 20))),
        'TREC-6': (trec, 64, dict(short=(lambda x, c: bag(x, c, 16), None), fits=(lambda x, c: bag(x, c, 32), 4), memorises=(lambda x, c: bag(x, c, 48), 12))),
        'cancer': (cancer, 32, dict(short=(lambda x, c: dense(x, c, 32, 1), None), fits=(lambda x, c: dense(x, c, 32, 1), 10),
                                    memorises=(lambda x, c: dense(x, c, 128, 2), 40))),
        'Fashion': (lambda: fashion(3000), 64, dict(short=(lambda x, c: cnn(), None), fits=(lambda x, c: cnn(), 6), memorises=(lambda x, c: dense(x, c, 192, 2), 15),
                                                     augmented=(lambda x, c: Shifted(cnn(), 2), 6))),
        'Adult': (lambda: adult(5000), 128, dict(short=(lambda x, c: dense(x, c, 32, 1), None), fits=(lambda x, c: dense(x, c, 64, 1), 6),
                                                 memorises=(lambda x, c: dense(x, c, 192, 2), 15))),
        'TREC-50': (lambda: trec('fine'), 64, dict(short=(lambda x, c: bag(x, c, 32), None), fits=(lambda x, c: bag(x, c, 48), 6), memorises=(lambda x, c: bag(x, c, 64), 15)))}
KINDS = ('sym', 'confusable', 'pair', 'class')

@cache
def data(name): return SETS[name][0]()


# -- noise

def noisy(y, c, kind, share, rng, z=None):
    if not share: return y.copy()
    if kind == 'confusable': return confused(z, y, share, rng)
    n = len(y)
    if kind in ('sym', 'pair'):
        y, k = y.copy(), rng.permutation(n)[:round(share * n)]
        y[k] = (y[k] + (1 if kind == 'pair' else rng.integers(1, c, len(k)))) % c
        return y
    rates = rng.uniform(0, 2, c)
    rates *= share / rates[y].mean()
    to = rng.dirichlet(np.full(c, .4), c) + 1e-9
    to[np.arange(c), np.arange(c)] = 0
    to = (to / to.sum(1, keepdims=True)).cumsum(1)
    drawn = (to[y] > rng.random((n, 1))).argmax(1)
    return np.where(rng.random(n) < np.minimum(rates[y], .9), drawn, y)


# -- one training

def columns(z, y, h=None):
    "What the loss says of each row, in numpy; `grand` if the last layer's input is given."
    i, p, others = torch.arange(len(y)), z.softmax(1), z.clone()
    others[i, y] = -torch.inf
    p_targ = p[i, y]
    el2n = (p.pow(2).sum(1) - 2 * p_targ + 1).clamp(min=0).sqrt()
    out = dict(margin=z[i, y] - others.max(1).values, p_targ=p_targ, pred=z.argmax(1), el2n=el2n)
    if h is not None: out['grand'] = el2n * (1 + h.pow(2).sum(1)).sqrt()
    return {k: v.numpy() for k, v in out.items()}

def last_layer(model):
    "All but the last layer, and the last layer."
    inner = model.model if isinstance(model, Shifted) else model
    body = inner[:-1]
    return (Shifted(body, model.by) if isinstance(model, Shifted) else body), inner[-1]

@torch.no_grad()
def looked_at(model, x, y):
    model.eval()
    z = torch.cat([model(o) for o in x.split(1000)])
    model.train()
    return columns(z, y)

def trained(x, y, model, epochs, bs, seed, taken=None, after=None):
    "A model, trained as fit_one_cycle trains. `taken` hears of each batch, `after` of each epoch."
    torch.manual_seed(seed)
    y, model, n = torch.tensor(y), model(), len(y)
    body, head = last_layer(model)
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(.9, .99), eps=1e-5, weight_decay=.01)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 5e-3, epochs * (n // bs), pct_start=.25, base_momentum=.85, max_momentum=.95)
    for _ in range(epochs):
        for i in torch.randperm(n)[:n // bs * bs].view(-1, bs):
            h = body(x[i])
            z = head(h)
            if taken: taken(i, z.detach(), y[i], h.detach())
            nn.functional.cross_entropy(z, y[i]).backward()
            opt.step()
            opt.zero_grad()
            sched.step()
        if after: after(model)
    return model

def fit(x, y, xv, yv, model, epochs, bs, seed):
    "Columns of train and valid, epochs × items, and of train in an eval pass at the end."
    fresh = lambda: {k: np.full(len(y), np.nan, dtype=np.float32) for k in ('margin', 'p_targ', 'pred', 'el2n', 'grand')}
    ts, vs = [fresh()], []
    def taken(i, z, y, h):
        for k, v in columns(z, y, h).items(): ts[-1][k][i] = v
    def after(model):
        vs.append(looked_at(model, xv, torch.tensor(yv)))
        ts.append(fresh())
    model = trained(x, y, model, epochs, bs, seed, taken, after)
    stack = lambda es: {k: np.stack([e[k] for e in es]) for k in es[0]}
    return stack(ts[:epochs]), stack(vs), stack([looked_at(model, x, torch.tensor(y))])

def file_of(name, regime, kind, share, seed, run=0) -> Path:
    return (CACHE / f'run-{run}' if run else CACHE) / f'{name}-{regime}-{kind}-{share:g}-{seed}.npz'

def planted(name, regime, kind, share, seed) -> dict:
    "Inputs, labels and truth of train and valid, and how they are trained."
    x, truth = data(name)
    make, epochs = SETS[name][2][regime]
    key = f'{name} {kind} {share} {seed}'
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    epochs = epochs or int(rng.integers(2, 5))
    c, bs, order = int(truth.max()) + 1, SETS[name][1], rng.permutation(len(truth))
    z = None
    if kind == 'confusable':
        a, order = np.split(order, [len(order) // 6])
        z = weak_logits(x, truth, a, c)[order]
    y = noisy(truth[order], c, kind, share, rng, z)
    nv = len(order) // 5
    v, t = order[:nv], order[nv:]
    return dict(x=x[t], y=y[nv:], truth=truth[t], xv=x[v], yv=y[:nv], truth_v=truth[v], c=c, model=lambda: make(x, c), epochs=epochs, bs=bs, seed=seed)

def one(name, regime, kind, share, seed, run=0):
    "Train once and keep the rows; another `run` has the same items and labels."
    o = planted(name, regime, kind, share, seed)
    rows = fit(o['x'], o['y'], o['xv'], o['yv'], o['model'], o['epochs'], o['bs'], seed + 1000 * run)
    keep(file_of(name, regime, kind, share, seed, run), rows, o['y'], o['truth'], o['yv'], o['truth_v'], o['c'])

def folds_of(name, regime, kind, share, seed) -> Path: return file_of(name, regime, kind, share, seed).with_suffix('.folds.npy')

def five_fold(name, regime, kind, share, seed):
    "Train five times on four fifths of train, and keep the probabilities of each item of the rest, as cleanlab asks for them."
    o, path = planted(name, regime, kind, share, seed), folds_of(name, regime, kind, share, seed)
    p, fold = np.zeros((len(o['y']), o['c']), dtype=np.float32), np.random.default_rng(seed).integers(0, 5, len(o['y']))
    for k in range(5):
        a, b = torch.tensor(fold != k), torch.tensor(fold == k)
        model = trained(o['x'][a], o['y'][a.numpy()], o['model'], o['epochs'], o['bs'], seed)
        model.eval()
        with torch.no_grad(): p[fold == k] = torch.cat([model(i) for i in o['x'][b].split(1000)]).softmax(1).numpy()
    np.save(part := path.with_suffix('.part.npy'), p)
    part.replace(path)

def keep(path, rows, y, truth, yv, truth_v, c):
    "Rows and truth in one file; el2n and grand as their means."
    out = dict(y=y, truth=truth, yv=yv, truth_v=truth_v, c=c)
    for a, short in zip(rows, 'tve'):
        for o in ('el2n', 'grand'):
            if short == 't':
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')       # an item that each epoch dropped has no mean
                    a[o] = np.nanmean(a[o], 0)
            else: a.pop(o, None)
        a['pred'] = np.nan_to_num(a['pred'], nan=-1).astype(np.int16)
        out.update({f'{short}_{k}': v for k, v in a.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part.npz')
    np.savez(part, **out)
    part.replace(path)

def checked(seed, epochs=4, regime='fits'):
    "MNIST's checked test images: nearly clean, a dozen errors among 8,500."
    x, y = data('MNIST')
    order = np.random.default_rng(seed).permutation(len(y))
    v, t = order[8500:], order[:8500]
    truth = y.copy()
    truth[mnist_wrong()] = -1
    rows = fit(x[t], y[t], x[v], y[v], cnn, epochs, 64, seed)
    keep(file_of('MNIST', regime, 'natural', 0, seed), rows, y[t], truth[t], y[v], truth[v], 10)

SETS['MNIST'] = (mnist, 64, {})


def settings(seeds):
    "So ordered that a run that is stopped has something of everything."
    names = [o for o in SETS if o != 'MNIST' and data(o) is not None]
    shares = [.2, .4, .1, .05]
    for seed in seeds:
        for j in range(4):
            for i, name in enumerate(names):
                for r, regime in enumerate(SETS[name][2]):
                    if j == 0: yield name, regime, 'sym', 0., seed
                    for k, kind in enumerate(KINDS):
                        if name in ('cancer', 'Adult') and kind == 'pair': continue # two classes: sym is pair
                        yield name, regime, kind, shares[(j + k + i + r) % 4], seed
        for name in ('digits', 'table', 'Fashion', 'TREC-6'):
            if name not in names: continue
            for share in (.004, .01):
                for kind in ('sym', 'confusable'):
                    for regime in ('fits', 'memorises'): yield name, regime, kind, share, seed
        if data('MNIST') is not None: yield 'MNIST', 'fits', 'natural', 0, seed

def train(seeds, folds=False):
    torch.set_num_threads(1)
    start = time.perf_counter()
    for what in settings(seeds):
        if folds and not (what[3] and file_of(*what).exists()): continue
        if (folds_of if folds else file_of)(*what).exists(): continue
        t = time.perf_counter(), time.process_time()
        if folds: five_fold(*what)
        elif what[0] == 'MNIST': checked(what[-1])
        else: one(*what)
        print(f"{time.perf_counter() - start:6.0f} s  {', '.join(map(str, what))}: {time.perf_counter() - t[0]:.1f} s ({time.process_time() - t[1]:.1f})", flush=True)


if __name__ == '__main__':
    seeds = [int(o) for o in sys.argv[1:] if o != 'folds'] or [0, 1]
    train(seeds, 'folds' in sys.argv)
