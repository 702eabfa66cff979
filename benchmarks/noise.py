"""Which score finds wrong labels, and does `label_issues` mean what it says? Planted noise, real trainings, the package's own recorder.

Each training has a part of its labels replaced: by any other class (sym) or by the next (pair), in train and in valid.
All scores are computed from the same rows. Rivals: fastai's top losses (the loss of an un-augmented pass at the end), the
package aum on the same logits, and cleanlab's self-confidence from five more trainings on four fifths each (at 20 %, where the
model does not memorise).
`--quick` runs scikit-learn's digits alone, with one seed. Data: `XENT_DATA` (default ../shared/data), and Debian's package
dataset-fashion-mnist."""
import argparse
import os
import platform
import sys
import tempfile
import time
import warnings
from datetime import date
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
from torch import nn  # noqa: E402

from fastai_xent.all import XentLossFlat, XentRecorder  # noqa: E402

try: from aum import AUMCalculator
except ImportError: AUMCalculator = None
try: from cleanlab.rank import get_self_confidence_for_each_label
except ImportError: get_self_confidence_for_each_label = None


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


# -- one training

def replace(y, c, kind, share, rng):
    y, k = y.copy(), rng.permutation(len(y))[:round(share * len(y))]
    y[k] = (y[k] + (1 if kind == 'pair' else rng.integers(1, c, len(k)))) % c
    return y

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
    "cleanlab's self-confidence: the label's probability, of a model that was not trained on the item."
    p, fold = np.zeros((len(y), c)), np.random.default_rng(seed).integers(0, 5, len(y))
    for k in range(5):
        a, b = fold != k, fold == k
        learn = train(x[a], y[a], x[b], y[b], model, epochs, bs, seed)
        learn.model.eval()
        with torch.no_grad(): p[b] = learn.model.model(x[b]).softmax(1).numpy()
    return -(get_self_confidence_for_each_label(y, p) if get_self_confidence_for_each_label else p[np.arange(len(y)), y])

@cache
def data(name): return SETS[name][0]()

def one(name, regime, kind, share, seed, folds, clean_valid=False):
    "The scores of one training (large: suspect), its wrong labels and its `label_issues`."
    x, truth = data(name)
    make, epochs, bs = SETS[name][1][regime]
    c, rng = int(truth.max()) + 1, np.random.default_rng(seed)
    model = lambda: make(x, c)
    order = rng.permutation(len(truth))
    v, t = order[:len(order) // 5], order[len(order) // 5:]
    y, yv = replace(truth[t], c, kind, share, rng), replace(truth[v], c, kind, 0 if clean_valid else share, rng)
    check = AUMCalculator is not None and seed == 0
    learn = train(x[t], y, x[v], yv, model, epochs, bs, seed, [XentRecorder(eval_every=epochs), *([Aum()] if check else [])])
    record = learn.xent_recorder.record
    if check:
        theirs = np.array([learn.aum.calc.sums[i] / learn.aum.calc.counts[i] if i in learn.aum.calc.counts else np.nan for i in range(len(y))])
        np.testing.assert_allclose(record.score('aum'), theirs, rtol=1e-4, atol=1e-4)
    end = record.score('margin_loss', 'train_eval')
    scores = {'label_doubt': record.score('label_doubt'), 'margin_loss (A)': record.score('margin_loss'), 'A + ½ of an eval pass (C)': record.score('margin_loss') + .5 * end,
              'mean loss': record.score('loss'), 'EL2N, mean': record.score('el2n'), 'aum': -record.score('aum'), 'top losses': record.score('loss', 'train_eval')}
    if folds: scores['five-fold'] = five_fold(x[t], y, model, c, epochs, bs, seed)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        issues = record.label_issues(cautious=False)
    return scores, y != truth[t], issues


# -- measures

def auroc(s, w): return (rankdata(s)[w].sum() - w.sum() * (w.sum() + 1) / 2) / (w.sum() * (~w).sum())
def hits(s, w): return w[np.argsort(-s, kind='stable')]
def average_precision(s, w): return (np.cumsum(hits(s, w)) / np.arange(1, len(w) + 1))[hits(s, w)].mean()
def precision_at_k(s, w): return hits(s, w)[:w.sum()].mean()
MEASURES = {'average precision': average_precision, 'AUROC': auroc, 'precision at k': precision_at_k}

def found(issues, wrong) -> dict:
    "What `label_issues` says, and what is true."
    flagged = issues[issues['is_issue']]
    right = wrong[flagged['item'].to_numpy()]
    return dict(rate=wrong.mean(), estimate=issues.attrs['noise_rate'], flagged=len(flagged) / len(wrong), claimed=flagged['p_wrong'].mean(), precision=right.mean() if len(right) else np.nan,
                claimed_wrong=issues.attrs['expected_wrong'] / len(wrong), found_wrong=right.sum() / len(wrong), recall=right.sum() / max(wrong.sum(), 1))


# -- tables

def spread(by_seed, digits=3): return f"{by_seed.mean():.{digits}f} ± {by_seed.std(ddof=0):.{digits}f}"

def summary(df):
    "A score a row; the mean over sets and shares, and the spread of the seeds' means."
    df = df[df['score'] != 'five-fold']
    groups = {f'{r}, {k}': (df['regime'] == r) & (df['kind'] == k) for r in ('fits', 'memorises') for k in ('sym', 'pair')} | {'all': df['seed'] >= 0}
    for measure in MEASURES:
        print(f"\n{measure}, mean over the data sets and 10, 20, 40 %, ± standard deviation of the seeds' means:\n\n| score | " + " | ".join(groups) + " |\n" + "|---" * (1 + len(groups)) + "|")
        for score in df['score'].unique():
            print(f"| {score} | " + " | ".join(spread(df[g & (df['score'] == score)].groupby('seed')[measure].mean()) for g in groups.values()) + " |")

def against_folds(df):
    "Where five more trainings were made: the mean over sets."
    df = df[(df['regime'] == 'fits') & (df['planted'] == .2)]
    print("\nWith five-fold, at 20 % in the regime that fits, mean over the data sets:\n\n| score | " + " | ".join(f'{m}, {k}' for k in ('sym', 'pair') for m in MEASURES) + " |\n" + "|---" * 7 + "|")
    for score in df['score'].unique():
        print(f"| {score} | " + " | ".join(spread(df[(df['kind'] == k) & (df['score'] == score)].groupby('seed')[m].mean()) for k in ('sym', 'pair') for m in MEASURES) + " |")

def details(df, measure='average precision'):
    print(f"\n{measure} of each setting, mean over seeds:\n")
    t = df.pivot_table(index=['set', 'regime', 'kind', 'planted'], columns='score', values=measure, sort=False)
    print("| set | regime | noise | " + " | ".join(t.columns) + " |\n" + "|---" * (3 + len(t.columns)) + "|")
    for (s, r, k, p), row in t.iterrows(): print(f"| {s} | {r} | {k} {p:.0%} | " + " | ".join('–' if np.isnan(o) else f'**{o:.3f}**' if o >= row.max() - 5e-4 else f'{o:.3f}' for o in row) + " |")

def calibration(df):
    print("\n`label_issues()`, mean over seeds, all in %. Within 5: in how many trainings the claim is at most five points from the truth.\n")
    print("| set | regime | valid | noise | estimated rate | flagged | claimed precision | true precision | claimed wrong labels | found wrong labels | recall |\n" + "|---" * 11 + "|")
    for (s, r, v, k, p), g in df.groupby(['set', 'regime', 'valid', 'kind', 'planted'], sort=False):
        pc = lambda o: '–' if g[o].isna().all() else f'{100 * g[o].mean():.1f}'
        print(f"| {s} | {r} | {v} | {k + ' ' if p else ''}{p:.0%} | {100 * g['estimate'].mean():.1f} ± {100 * g['estimate'].std(ddof=0):.1f} | " + " | ".join(map(pc, ('flagged', 'claimed', 'precision', 'claimed_wrong', 'found_wrong', 'recall'))) + " |")
    near = lambda d, a, b: f"{((d[a] - d[b]).abs() <= .05).sum()} of {d[[a, b]].notna().all(axis=1).sum()}"
    print("\n| within 5 points | noise rate | wrong labels among the flagged, share of all items | precision |\n|---|---|---|---|")
    for title, d in (('clean', df[df['planted'] == 0]), ('5 to 20 %', df[df['planted'].between(.01, .3)]), ('40 %', df[df['planted'] == .4])):
        print(f"| {title} | {near(d, 'estimate', 'rate')} | {near(d, 'claimed_wrong', 'found_wrong')} | {'–' if title == 'clean' else near(d, 'claimed', 'precision')} |")


def settings(quick, seeds):
    "(set, regime, kind, planted, seed, five-fold?, clean valid?), so ordered that a run that is stopped has something of everything."
    names = [o for o in (['digits'] if quick else SETS) if data(o) is not None]
    for seed in range(seeds):
        for kind, share in [(k, p) for p in (.2, .1, .4) for k in ('sym', 'pair')] + [('sym', 0.), ('sym', .05)]:
            for name in names:
                for regime in ('fits', 'memorises'): yield name, regime, kind, share, seed, regime == 'fits' and share == .2, False
        if seed == 0: yield from ((name, regime, 'sym', .2, seed, False, True) for name in names for regime in ('fits', 'memorises'))

def main(quick=False, seeds=3):
    torch.set_num_threads(1)
    start, ranks, claims, ended = time.perf_counter(), [], [], ''
    try:
        for name, regime, kind, share, seed, folds, clean_valid in settings(quick, 1 if quick else seeds):
            scores, wrong, issues = one(name, regime, kind, share, seed, folds, clean_valid)
            what = dict(set=name, regime=regime, kind=kind, planted=share, seed=seed)
            claims.append(dict(what, valid='clean' if clean_valid else 'same', **found(issues, wrong)))
            if share >= .1 and not clean_valid: ranks += [dict(what, score=k, **{m: f(s, wrong) for m, f in MEASURES.items()}) for k, s in scores.items()]
            print(f"{time.perf_counter() - start:6.0f} s  {name}, {regime}, {kind} {share:.0%}, seed {seed}", file=sys.stderr, flush=True)
    except KeyboardInterrupt: ended = '; stopped by hand'
    ranks, claims = (pd.DataFrame(o).sort_values(['set', 'regime', 'planted', 'kind'], kind='stable') for o in (ranks, claims))
    cpu = next((o.split(':')[1].strip() for o in open('/proc/cpuinfo') if o.startswith('model name')), platform.processor()) if sys.platform == 'linux' else platform.processor()
    print(f"{cpu}, {os.cpu_count()} cores, one thread; Python {platform.python_version()}, torch {torch.__version__}, fastai {fastai.__version__}; {date.today()}; {len(claims)} trainings, {time.perf_counter() - start:.0f} s ({time.process_time():.0f} s of CPU){ended}")
    if AUMCalculator is None: print("\nskipped: the package aum is not installed, so its figures are those of our own reducer, unchecked")
    summary(ranks)
    against_folds(ranks)
    details(ranks)
    calibration(claims)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='digits alone, one seed: about a minute')
    parser.add_argument('--seeds', type=int, default=3)
    main(**vars(parser.parse_args()))
