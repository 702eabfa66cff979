"""Which score finds wrong labels, and does `label_issues` mean what it says? Planted noise, real trainings, the package's own recorder.

Each training has a part of its labels replaced: by any other class (sym), by the next (pair), or as a weak model of other items
would have them (confusable, which sits on hard items, as human mistakes do), in train and in valid; MNIST's checked test images
have a dozen errors of their own. `short` ends after 3 epochs, where `fits` goes on.
All scores are computed from the same rows. Rivals: fastai's top losses (the loss of an un-augmented pass at the end), the
package aum on the same logits, and cleanlab's self-confidence and its own cuts from five more trainings on four fifths each (at
20 %, where the model does not memorise).
`--quick` runs scikit-learn's digits alone, with one seed. Data: `XENT_DATA` (default ../shared/data), and Debian's package
dataset-fashion-mnist."""
import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from datetime import date
from dataclasses import replace as replaced
from functools import cache

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore', category=FutureWarning)

import fastai  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from fastai.callback.core import Callback  # noqa: E402
from fastai.callback.schedule import fit_one_cycle  # noqa: E402, F401
from fastai.data.core import DataLoaders, TfmdDL  # noqa: E402
from fastai.learner import Learner  # noqa: E402
from fastai.torch_core import set_seed  # noqa: E402
from overhead import DATA, FASHION, cnn, idx  # noqa: E402
from scipy.stats import rankdata  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.naive_bayes import MultinomialNB  # noqa: E402
from torch import nn  # noqa: E402

from fastai_xent.all import LabelDoubt, XentLossFlat, XentRecorder  # noqa: E402

try: from aum import AUMCalculator
except ImportError: AUMCalculator = None
try:
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_self_confidence_for_each_label
except ImportError: find_label_issues = get_self_confidence_for_each_label = None


# -- data: inputs and classes, or None where something is missing

def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 8 - 1, dtype=torch.float32), y

def fashion(n=5000):
    if not FASHION.exists(): return print("skipped: Fashion-MNIST, Debian's package dataset-fashion-mnist is not installed")
    x, y = (idx(FASHION / f'train-{o}-ubyte.gz')[:n] for o in ('images-idx3', 'labels-idx1'))
    return torch.tensor(x[:, None] / 255., dtype=torch.float32), y.astype(np.int64)

def trec(column='coarse'):
    "Words and pairs of words that occur at least twice, by number."
    if not (DATA / 'trec.csv').exists(): return print(f"skipped: {DATA / 'trec.csv'} is missing")
    df = pd.read_csv(DATA / 'trec.csv').query("split == 'train'")
    words = [o.lower().split() for o in df['text']]
    tokens = [o + [f'{a} {b}' for a, b in zip(['^', *o], o)] for o in words]
    counts = pd.Series([t for o in tokens for t in o]).value_counts()
    number = {t: i + 1 for i, t in enumerate(counts.index[counts >= 2])}
    x = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
    for row, o in zip(x, tokens):
        ids = [number[t] for t in o if t in number]
        row[:len(ids)] = torch.tensor(ids)
    return x, df[column].astype('category').cat.codes.to_numpy().astype(np.int64)

def adult(n=6000):
    path = DATA / 'adult_30k.csv.gz'
    if not path.exists(): return print(f"skipped: {path} is missing")
    df = pd.read_csv(path).sample(n, random_state=0)
    x, y = df.iloc[:, :-1], df.iloc[:, -1].astype('category').cat.codes.to_numpy().astype(np.int64)
    numbers = x.select_dtypes('number')
    x = pd.concat([(numbers - numbers.mean()) / numbers.std(), pd.get_dummies(x.drop(columns=numbers.columns))], axis=1)
    return torch.tensor(x.to_numpy(np.float32)), y

def mnist():
    "MNIST's test images with the labels they have, and what five people each thought of the hundred most suspect."
    if not (DATA / 'mnist_t10k.npz').exists(): return print(f"skipped: {DATA / 'mnist_t10k.npz'} is missing")
    with np.load(DATA / 'mnist_t10k.npz') as f: x, y = f['x'], f['y']
    return torch.tensor(x[:, None] / 255., dtype=torch.float32), y.astype(np.int64)

def mnist_wrong() -> np.ndarray: # Places of the images for whose label fewer than three of five people voted
    votes = json.loads((DATA / 'mnist_label_errors.json').read_text())
    return np.array([o['id'] for o in votes if o['mturk']['given'] < 3])


# -- models

def mlp(n_in, hidden, c, depth):
    layers = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(n_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        n_in = hidden
    return nn.Sequential(*layers, nn.Linear(n_in, c))

def bag(x, c, width): return nn.Sequential(nn.EmbeddingBag(int(x.max()) + 1, width, mode='sum', padding_idx=0), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(.2), nn.Linear(width, c))

#       data, regime → model, epochs, batch size
SETS = {'digits': (digits, dict(fits=(lambda x, c: mlp(64, 64, c, 1), 15, 64), memorises=(lambda x, c: mlp(64, 256, c, 2), 30, 64))),
        'Fashion-MNIST': (fashion, dict(fits=(lambda x, c: cnn(), 8, 64), memorises=(lambda x, c: mlp(784, 256, c, 2), 20, 128))),
        'TREC': (trec, dict(fits=(lambda x, c: bag(x, c, 32), 4, 64), memorises=(lambda x, c: bag(x, c, 64), 15, 64))),
        'Adult': (adult, dict(fits=(lambda x, c: mlp(x.shape[1], 64, c, 1), 8, 128), memorises=(lambda x, c: mlp(x.shape[1], 256, c, 2), 20, 128)))}
for _, regimes in SETS.values(): regimes['short'] = regimes['fits'][0], 3, regimes['fits'][2]
SETS['MNIST'] = mnist, dict(fits=(lambda x, c: cnn(), 4, 64))

class Rows:
    "Inputs, the number of each item, and labels."
    n_inp = 2
    def __init__(self, *ts): self.ts = ts
    def __len__(self): return len(self.ts[0])
    def __getitem__(self, i): return tuple(t[i] for t in self.ts)

class First(nn.Module):
    "A model that does not look at the item's number."
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x, i): return self.model(x)

class Aum(Callback):
    "The package aum, fed as its authors say."
    order = 45
    def before_fit(self): self.calc = AUMCalculator(tempfile.gettempdir())
    def after_loss(self):
        if self.training: self.calc.update(self.pred.detach(), self.y, self.xb[1].tolist())


# -- noise

def features(x):
    "What the weak model looks at: numbers as they are, words by their presence."
    if x.dtype != torch.long: return x.flatten(1).numpy()
    seen = np.zeros((len(x), int(x.max()) + 1), dtype=np.float32)
    np.put_along_axis(seen, x.numpy(), 1, 1)
    return seen[:, 1:]

def weak_logits(x, y, other, c):
    "What a weak model of the items `other` makes of all items: naive Bayes of words, logistic regression of numbers."
    f = features(x)
    model = MultinomialNB() if x.dtype == torch.long else LogisticRegression(C=.1, max_iter=200)
    model.fit(f[other], y[other])
    z = np.full((len(y), c), -8.)
    z[:, model.classes_] = np.log(model.predict_proba(f) + 1e-6)
    return z

def confused(z, y, share, rng):
    "Labels drawn from softened predictions, in which the true class is raised until `share` of the labels are wrong."
    def p(raise_by):
        a = z / 1.5
        a[np.arange(len(y)), y] += raise_by
        a = np.exp(a - a.max(1, keepdims=True))
        return a / a.sum(1, keepdims=True)
    lo, hi = -30., 30.
    for _ in range(60):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if 1 - p(mid)[np.arange(len(y)), y].mean() > share else (lo, mid)
    return (p(lo).cumsum(1) > rng.random((len(y), 1))).argmax(1)

def replace(y, c, kind, share, rng):
    y, k = y.copy(), rng.permutation(len(y))[:round(share * len(y))]
    y[k] = (y[k] + (1 if kind == 'pair' else rng.integers(1, c, len(k)))) % c
    return y


# -- one training

def train(x, y, xv, yv, model, epochs, bs, seed, cbs=()):
    "`model` is called when the seed is set."
    set_seed(seed)
    rows = lambda x, y: Rows(x, torch.arange(len(y)), torch.tensor(y))
    dls = DataLoaders(TfmdDL(rows(x, y), bs=bs, shuffle=True, drop_last=True, num_workers=0), TfmdDL(rows(xv, yv), bs=1000, num_workers=0))
    learn = Learner(dls, First(model()), loss_func=XentLossFlat(), cbs=list(cbs))
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    with learn.no_logging(): learn.fit_one_cycle(epochs, 5e-3)
    return learn

def five_fold(x, y, model, c, epochs, bs, seed):
    "Probabilities of each item by a model that was not trained on it, as cleanlab asks for them."
    p, fold = np.zeros((len(y), c)), np.random.default_rng(seed).integers(0, 5, len(y))
    for k in range(5):
        a, b = fold != k, fold == k
        learn = train(x[a], y[a], x[b], y[b], model, epochs, bs, seed)
        learn.model.eval()
        with torch.no_grad(): p[b] = learn.model.model(x[b]).softmax(1).numpy()
    return p

def self_confidence(y, p): # Large: suspect
    return -(get_self_confidence_for_each_label(y, p) if get_self_confidence_for_each_label else p[np.arange(len(y)), y])

def planted(name, kind, share, rng, clean_valid) -> tuple: # Places of train and valid; their labels; the truth
    "Labels, a share of which is wrong; `natural`: as they are."
    x, truth = data(name)
    c, order, z = int(truth.max()) + 1, rng.permutation(len(truth)), None
    if kind == 'confusable':
        other, order = np.split(order, [len(order) // 6])
        z = weak_logits(x, truth, other, c)
    v, t = order[:len(order) // 5], order[len(order) // 5:]
    if kind == 'natural':
        known = truth.copy()
        known[mnist_wrong()] = -1
        return t, v, truth[t], truth[v], known
    new = lambda at, share: confused(z[at], truth[at], share, rng) if z is not None else replace(truth[at], c, kind, share, rng)
    return t, v, new(t, share), new(v, 0 if clean_valid else share), truth

@cache
def data(name): return SETS[name][0]()

def one(name, regime, kind, share, seed, folds, clean_valid=False):
    "The scores of one training (large: suspect), its wrong labels, its `label_issues` and, of five more, what cleanlab flags."
    x, every = data(name)
    make, epochs, bs = SETS[name][1][regime]
    c, rng = int(every.max()) + 1, np.random.default_rng(seed)
    model = lambda: make(x, c)
    t, v, y, yv, truth = planted(name, kind, share, rng, clean_valid)
    check = AUMCalculator is not None and seed == 0
    learn = train(x[t], y, x[v], yv, model, epochs, bs, seed, [XentRecorder(eval_every=epochs), *([Aum()] if check else [])])
    record = learn.xent_recorder.record
    if check:
        theirs = np.array([learn.aum.calc.sums[i] / learn.aum.calc.counts[i] if i in learn.aum.calc.counts else np.nan for i in range(len(y))])
        np.testing.assert_allclose(record.score('aum'), theirs, rtol=1e-4, atol=1e-4)
    doubt, seg = LabelDoubt(), replaced(record._segment('train'), look=None)    # of the same rows as its rivals; with the look at the end
    scores = {'`label_doubt`': doubt.finalize(record._cache.state(doubt, seg)), 'with a look': record.score('label_doubt'), 'margin loss': record.score('margin_loss'),
              'mean loss': record.score('loss'), 'EL2N, mean': record.score('el2n'), 'aum': -record.score('aum'), 'top losses': record.score('loss', 'train_eval')}
    flags = {}
    if folds:
        p = five_fold(x[t], y, model, c, epochs, bs, seed)
        scores['five-fold'] = self_confidence(y, p)
        if find_label_issues: flags = {'cleanlab': find_label_issues(y, p, n_jobs=1), 'cleanlab, both': find_label_issues(y, p, filter_by='both', n_jobs=1)}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        at_rate, cautious = record.label_issues(cautious=False), record.label_issues()
    if folds: flags = {'cautious': flagged(cautious), 'at the rate': flagged(at_rate), **flags}
    return scores, y != truth[t], at_rate, cautious, flags

def flagged(issues) -> np.ndarray: return issues.set_index('item')['is_issue'].sort_index().to_numpy(bool)


# -- measures

def auroc(s, w): return (rankdata(s)[w].sum() - w.sum() * (w.sum() + 1) / 2) / (w.sum() * (~w).sum())
def hits(s, w): return w[np.argsort(-s, kind='stable')]
def average_precision(s, w): return (np.cumsum(hits(s, w)) / np.arange(1, len(w) + 1))[hits(s, w)].mean()
def precision_at_k(s, w): return hits(s, w)[:w.sum()].mean()
MEASURES = {'average precision': average_precision, 'AUROC': auroc, 'precision at k': precision_at_k}

def found(at_rate, cautious, wrong) -> dict:
    "What `label_issues` says, with and without caution, and what is true."
    a, claims = cautious.attrs, dict(rate=wrong.mean(), estimate=cautious.attrs['noise_rate'])
    for name, issues in (('rate', at_rate), ('', cautious)):
        flags = flagged(issues)
        claims |= {f'{name}flagged': flags.mean(), f'{name}precision': wrong[flags].mean() if flags.any() else np.nan, f'{name}recall': wrong[flags].sum() / wrong.sum() if wrong.any() else np.nan}
    inside = lambda v, o: np.nan if np.isnan(v) else float(a[f'{o}_low'] - 1e-9 <= v <= a[f'{o}_high'] + 1e-9)
    return dict(claims, low=a['noise_rate_low'], high=a['noise_rate_high'], precision_low=a['precision_low'], precision_high=a['precision_high'],
                holds=inside(wrong.mean(), 'noise_rate'), precision_holds=inside(claims['precision'], 'precision'))


# -- tables

def spread(by_seed, digits=3): return f"{by_seed.mean():.{digits}f} ± {by_seed.std(ddof=0):.{digits}f}"

def summary(df):
    "A score a row; the mean over sets and shares, and the spread of the seeds' means."
    df = df[df['score'] != 'five-fold']
    groups = {f'{r}, {k}': (df['regime'] == r) & (df['kind'] == k) for r in ('fits', 'memorises') for k in ('sym', 'pair', 'confusable')}
    groups |= {'short': df['regime'] == 'short', 'all': df['seed'] >= 0}
    for measure in MEASURES:
        print(f"\n{measure}, mean over the data sets and 10, 20, 40 %, ± standard deviation of the seeds' means:\n\n| score | " + " | ".join(groups) + " |\n" + "|---" * (1 + len(groups)) + "|")
        for score in df['score'].unique():
            print(f"| {score} | " + " | ".join(spread(df[g & (df['score'] == score)].groupby('seed')[measure].mean()) for g in groups.values()) + " |")

def against_folds(df):
    "Where five more trainings were made: the mean over sets."
    df = df[(df['regime'] == 'fits') & (df['planted'] == .2)]
    print("\nWith five-fold, at 20 % in the regime that fits, mean over the data sets:\n\n| score | " + " | ".join(f'{m}, {k}' for k in ('sym', 'pair', 'confusable') for m in MEASURES) + " |\n" + "|---" * 10 + "|")
    for score in df['score'].unique():
        print(f"| {score} | " + " | ".join(spread(df[(df['kind'] == k) & (df['score'] == score)].groupby('seed')[m].mean()) for k in ('sym', 'pair', 'confusable') for m in MEASURES) + " |")

def cuts(df):
    "What is flagged where five more trainings were made: how many for each wrong label, how many of them are wrong, how many wrong ones are found."
    print("\nFlagged there, mean:\n\n| flagged by | number by wrong labels | precision | recall |\n|---|---|---|---|")
    for how, g in df.groupby('how', sort=False): print(f"| {how} | {g['many'].mean():.2f} | {g['right'].mean():.2f} | {g['got'].mean():.2f} |")

def dozen(ranks, claims):
    "MNIST's checked test images."
    if ranks.empty: return
    print("\nA dozen errors among 8,000 of MNIST's test images, average precision of each seed:\n")
    t = ranks.pivot_table(index='score', columns='seed', values='average precision', sort=False)
    print("| score | mean | " + " | ".join(map(str, t.columns)) + " |\n" + "|---" * (2 + len(t.columns)) + "|")
    for score, row in t.iterrows(): print(f"| {score} | {row.mean():.3f} | " + " | ".join(f'{o:.3f}' for o in row) + " |")
    print(f"\nFlagged: {', '.join(f'{o:.2%}' for o in claims['flagged'])}; the rate, {claims['rate'].mean():.2%}, is at most " + ', '.join(f'{o:.1%}' for o in claims['high']) + '.')

def details(df, measure='average precision'):
    print(f"\n{measure} of each setting, mean over seeds:\n")
    t = df.pivot_table(index=['set', 'regime', 'kind', 'planted'], columns='score', values=measure, sort=False)
    print("| set | regime | noise | " + " | ".join(t.columns) + " |\n" + "|---" * (3 + len(t.columns)) + "|")
    for (s, r, k, p), row in t.iterrows(): print(f"| {s} | {r} | {k} {p:.0%} | " + " | ".join('–' if np.isnan(o) else f'**{o:.3f}**' if o >= row.max() - 5e-4 else f'{o:.3f}' for o in row) + " |")

def calibration(df):
    print("\n`label_issues()`, mean over seeds, all in %; rate and precision with their bounds.\n")
    print("| set | regime | valid | noise | rate | flagged | claimed precision | true precision | recall | at the rate: flagged | true precision | recall |\n" + "|---" * 12 + "|")
    for (s, r, v, k, p), g in df.groupby(['set', 'regime', 'valid', 'kind', 'planted'], sort=False):
        pc = lambda o: '–' if g[o].isna().all() else f'{100 * g[o].mean():.1f}'
        span = lambda a, b: '–' if g[a].isna().all() else f'{pc(a)} to {pc(b)}'
        print(f"| {s} | {r} | {v} | {k + ' ' if p else ''}{p:.0%} | {pc('estimate')} ({span('low', 'high')}) | {pc('flagged')} | {span('precision_low', 'precision_high')} | " + " | ".join(map(pc, ('precision', 'recall', 'rateflagged', 'rateprecision', 'raterecall'))) + " |")
    near = lambda d: f"{((d['estimate'] - d['rate']).abs() <= .05).sum()} of {len(d)}"
    held = lambda d, o: f"{int(d[o].sum())} of {d[o].notna().sum()}"
    print("\n| trainings | rate within its bounds | width | rate within 5 points | precision within its bounds | flagged | precision | recall |\n" + "|---" * 8 + "|")
    groups = [('clean', df['planted'] == 0), ('5 to 20 %', df['planted'].between(.01, .3)), ('40 %', df['planted'] == .4), *((o, df['kind'].eq(o) & (df['planted'] > 0)) for o in ('sym', 'pair', 'confusable')), ('short', df['regime'] == 'short')]
    for title, of in groups:
        d = df[of]
        pc = lambda o: '–' if d[o].isna().all() else f'{100 * d[o].mean():.1f}'
        if len(d): print(f"| {title} | {held(d, 'holds')} | {100 * (d['high'] - d['low']).mean():.1f} | {near(d)} | {held(d, 'precision_holds')} | {pc('flagged')} | {pc('precision')} | {pc('recall')} |")


def settings(quick, seeds):
    "(set, regime, kind, planted, seed, five-fold?, clean valid?), so ordered that a run that is stopped has something of everything."
    names = [o for o in (['digits'] if quick else SETS) if data(o) is not None and o != 'MNIST']
    for seed in range(seeds):
        if not quick and data('MNIST') is not None: yield 'MNIST', 'fits', 'natural', 0., seed, False, False
        for kind, share in [(k, p) for p in (.2, .1, .4) for k in ('sym', 'pair', 'confusable')] + [('sym', 0.), ('sym', .05)]:
            for name in names:
                if kind == 'pair' and data(name)[1].max() == 1: continue    # of two classes, the next is any other
                for regime in ('fits', 'memorises', 'short')[:3 if share in (.1, .2) else 2]: yield name, regime, kind, share, seed, regime == 'fits' and share == .2, False
        if seed == 0: yield from ((name, regime, 'sym', .2, seed, False, True) for name in names for regime in ('fits', 'memorises'))

def main(quick=False, seeds=3):
    torch.set_num_threads(1)
    start, ranks, claims, flags, ended = time.perf_counter(), [], [], [], ''
    try:
        for name, regime, kind, share, seed, folds, clean_valid in settings(quick, 1 if quick else seeds):
            scores, wrong, at_rate, cautious, by = one(name, regime, kind, share, seed, folds, clean_valid)
            what = dict(set=name, regime=regime, kind=kind, planted=share, seed=seed)
            claims.append(dict(what, valid='clean' if clean_valid else 'same', **found(at_rate, cautious, wrong)))
            flags += [dict(what, how=k, many=f.sum() / wrong.sum(), right=wrong[f].mean() if f.any() else np.nan, got=wrong[f].sum() / wrong.sum()) for k, f in by.items()]
            if (share >= .1 or kind == 'natural') and not clean_valid: ranks += [dict(what, score=k, **{m: f(s, wrong) for m, f in MEASURES.items()}) for k, s in scores.items()]
            print(f"{time.perf_counter() - start:6.0f} s  {name}, {regime}, {kind} {share:.0%}, seed {seed}", file=sys.stderr, flush=True)
    except KeyboardInterrupt: ended = '; stopped by hand'
    ranks, claims = (pd.DataFrame(o).sort_values(['set', 'regime', 'planted', 'kind'], kind='stable') for o in (ranks, claims))
    cpu = next((o.split(':')[1].strip() for o in open('/proc/cpuinfo') if o.startswith('model name')), platform.processor()) if sys.platform == 'linux' else platform.processor()
    print(f"{cpu}, {os.cpu_count()} cores, one thread; Python {platform.python_version()}, torch {torch.__version__}, fastai {fastai.__version__}; {date.today()}; {len(claims)} trainings, {time.perf_counter() - start:.0f} s ({time.process_time():.0f} s of CPU){ended}")
    if AUMCalculator is None: print("\nskipped: the package aum is not installed, so its figures are those of our own reducer, unchecked")
    planted, natural = ranks[ranks['set'] != 'MNIST'], claims['set'] == 'MNIST'
    summary(planted)
    against_folds(planted)
    if flags: cuts(pd.DataFrame(flags))
    dozen(ranks[ranks['set'] == 'MNIST'], claims[natural])
    details(planted)
    calibration(claims[~natural])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='digits alone, one seed: two minutes of CPU')
    parser.add_argument('--seeds', type=int, default=3)
    main(**vars(parser.parse_args()))
