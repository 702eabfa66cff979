"""How often does the verdict of `label_issues` hold? Its own answer on the rows that `trainings.py` has kept, beside the truth.

`chosen_on` says on which trainings the constants were chosen; the tables are of the others, and of those beside them.
A training is handed over as a record of arrays: what `label_issues` reads of a record, and nothing else."""
import os
import sys
import tempfile
import warnings
from collections import namedtuple
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

import fastai_xent.label_issues as _page  # noqa: E402
from fastai_xent.issues import LabelDoubt, plateau  # noqa: E402

try: from cleanlab.filter import find_label_issues
except ImportError: find_label_issues = None

CACHE = Path(os.environ.get('XENT_CACHE', f'{tempfile.gettempdir()}/xent_trainings'))
Segment = namedtuple('Segment', 'split k n found executor')
Column = namedtuple('Column', 'v')
Columns = namedtuple('Columns', 'columns')
Column.to_numpy = lambda self: self.v


class Kept:
    "A training whose rows were kept, as a record."
    splits = ['train', 'valid']
    def __init__(self, path):
        self.name, self.regime, self.kind, share, seed = path.stem.rsplit('-', 4)
        self.share, self.seed = float(share), int(seed)
        with np.load(path) as f: self.a = {k: f[k] for k in f.files}
        folds = path.with_suffix('.folds.npy')
        self.folds = np.load(folds) if folds.exists() else None
        self.n_classes, self._cache, self._epochs = int(self.a['c']), self, self
        self.y = dict(train=self.a['y'], valid=self.a['yv'])
        self.wrong, self.known = self.a['y'] != self.a['truth'], {}
    def rows(self, split, e):
        m, p, pred = (self.a[f'{split[0]}_{o}'][e] for o in ('margin', 'p_targ', 'pred'))
        at = np.flatnonzero(~np.isnan(m))
        return dict(item=at, margin=m[at], p_targ=p[at], pred=pred[at], targ=self.y[split][at], lam=np.full(len(at), np.nan), occurrence=np.zeros(len(at)))
    def _segment(self, split, k=-1, executor=None):
        return Segment(split, 0, len(self.y[split]), {(0, split, e): None for e in range(len(self.a[f'{split[0]}_margin']))}, None)
    def states(self, reducers, seg): return [self.state(o, seg) for o in reducers]
    def state(self, reducer, seg):
        if (reducer.key, seg.split) in self.known: return self.known[reducer.key, seg.split]
        state = self.known[reducer.key, seg.split] = reducer.init(seg.n)
        for _, _, e in seg.found:
            t = self.rows(seg.split, e)
            reducer.update(state, t['item'], np.ones(len(t['item'])), **{o: t[o] for o in reducer.columns})
        return state
    def values(self, reducers, seg): return [np.array(o.finalize(self.state(o, seg)), dtype=float) for o in reducers]
    def read(self, found, columns):
        (_, split, e), = found
        t = self.rows(split, e)
        return Columns([Column(t[o]) for o in columns])
    def items(self, split, k): return pd.DataFrame(dict(item=np.arange(len(self.y[split])), name=np.arange(len(self.y[split]))))
    def _class_names(self, c): return pd.Series(c)
    def _told_ledger(self, split): return ''

    def look(self):
        "State of `LabelDoubt` after the eval pass at the end."
        m, p, pred = (self.a[f'e_{o}'][0] for o in ('margin', 'p_targ', 'pred'))
        state = LabelDoubt().init(len(m))
        LabelDoubt().update(state, np.arange(len(m)), np.ones(len(m)), margin=m, p_targ=p, pred=pred, targ=self.y['train'])
        return state
    def rankings(self) -> dict: # large: suspect
        "Scores of the same rows, and of five more trainings where there are any."
        m, r, s = self.a['t_margin'].astype(float), LabelDoubt(), self.state(LabelDoubt(), self._segment('train'))
        eval_p, nats = self.a['e_p_targ'][0].astype(float), np.where(np.isnan(m), np.nan, np.logaddexp(0, -np.nan_to_num(m)))
        found = {'label_doubt': r.finalize(s), 'with a look': r.finalize(r.with_look(s, self.look())), 'without pairs': r.mean(s, 'doubt'),
                 'margin_loss': np.nanmean(nats, 0), 'EL2N, mean': self.a['t_el2n'], 'grand': self.a['t_grand'], 'aum': -np.nanmean(m, 0), 'top losses': -np.log(np.maximum(eval_p, 1e-37))}
        if self.folds is not None: found['five-fold'] = -self.folds[np.arange(len(self.folds)), self.y['train']]
        return found
    def cleanlab(self, **kw) -> np.ndarray: # Boolean, `n`
        "What cleanlab flags, with its own cuts."
        return find_label_issues(self.y['train'], self.folds.astype(np.float64), n_jobs=1, **kw)


def chosen_on(r) -> bool: return r.seed == 0 and r.name in ('digits', 'table', 'TREC-6', 'cancer', 'Fashion')

def average_precision(s, w):
    hit = w[np.argsort(-np.nan_to_num(s, nan=-np.inf), kind='stable')]
    return (np.cumsum(hit) / np.arange(1, len(w) + 1))[hit].mean()

def remembered(f):
    "`f` of arrays, which is asked the same several times."
    known = {}
    def asked(*args):
        key = tuple(o.tobytes() if isinstance(o, np.ndarray) else o for o in args)
        if key not in known: known[key] = f(*args)
        return known[key]
    return asked

def asked(r, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return _page.label_issues(r, **kw)

def claims(issues, wrong, end='') -> dict:
    "What is claimed, and does it hold?"
    a, flagged = issues.attrs, issues['item'][issues['is_issue']]
    true = wrong[flagged].mean() if len(flagged) else np.nan
    inside = lambda v, o: np.nan if np.isnan(v) else float(a[f'{o}_low'] - 1e-9 <= v <= a[f'{o}_high'] + 1e-9)
    near = lambda v, o: np.nan if np.isnan(v) else float(abs(a[o] - v) <= .05)
    return {k + end: v for k, v in dict(rate=a['noise_rate'], low=a['noise_rate_low'], high=a['noise_rate_high'], rate_holds=inside(wrong.mean(), 'noise_rate'),
            rate_width=a['noise_rate_high'] - a['noise_rate_low'], flagged=len(flagged) / len(wrong), recall=wrong[flagged].sum() / max(wrong.sum(), 1), precision=a['precision'],
            p_low=a['precision_low'], p_high=a['precision_high'], true=true, near_rate=near(wrong.mean(), 'noise_rate'), near_precision=near(true, 'precision'), precision_holds=inside(true, 'precision'), precision_width=a['precision_high'] - a['precision_low']).items()}

def reviewed(r, issues, seed) -> dict:
    "The claims after a person who knows the truth has looked at 50 items that were asked for, and at 50 more."
    seen, found = [], {}
    for end in ('_50', '_100'):
        seen += issues.to_review(50, seed=seed + len(seen))['item'].tolist()
        issues = asked(r, reviewed=pd.DataFrame(dict(item=seen, wrong=r.wrong[seen])))
        found |= claims(issues, r.wrong, end)
    return found

def measured(r) -> dict:
    "All that is measured of one training."
    _page.plateau = remembered(plateau)
    issues = asked(r)
    epochs = len(r.a['t_margin'])
    out = dict(set=r.name, regime=r.regime, kind=r.kind, planted=r.share, seed=r.seed, epochs=epochs, n=len(r.wrong), true_rate=r.wrong.mean(), chosen=chosen_on(r),
               reached=issues.attrs['reached'], verdict=issues.attrs['verdict'], **claims(issues, r.wrong))
    if len(r.wrong) > 1000: out |= pd.DataFrame([reviewed(r, issues, seed) for seed in range(3)]).mean().to_dict()
    if r.wrong.any(): out |= {'ap ' + k: average_precision(s, r.wrong) for k, s in r.rankings().items()}
    if r.folds is not None and r.wrong.any(): out |= cuts(r, issues)
    return out

def cuts(r, issues) -> dict:
    "How many are flagged and how many of them are wrong: ours, and cleanlab's five-fold, with its own cuts and as many as ours."
    p = issues.set_index('item')['p_wrong'].sort_index().to_numpy()
    flagged = {'cautious': issues.set_index('item')['is_issue'].sort_index().to_numpy(), 'at the rate': p >= .5}
    if find_label_issues is not None: flagged |= {'cleanlab': r.cleanlab(), 'cleanlab, both': r.cleanlab(filter_by='both')}
    k = flagged['at the rate'].sum()
    first = np.zeros(len(p), dtype=bool)
    first[np.argsort(-r.rankings()['five-fold'], kind='stable')[:k]] = True
    flagged['five-fold, as many'] = first
    return {f'{o} {k}': v for k, f in flagged.items() for o, v in dict(many=f.sum() / r.wrong.sum(), right=r.wrong[f].mean() if f.any() else np.nan, got=r.wrong[f].sum() / r.wrong.sum()).items()}


# -- tables

def row(title, d, columns): return f"| {title} | {len(d)} | " + " | ".join('–' if d[c].isna().all() else f"{100 * d[c].mean():.1f}" for c in columns) + " |"

def coverage(df):
    columns = ['rate_holds', 'rate_width', 'precision_holds', 'precision_width', 'flagged', 'recall']
    print("\nHow often the bounds hold, and how wide they are, in %, and the share flagged.\n")
    print("| trainings | number | rate holds | width | precision holds | width | flagged | recall |\n" + "|---" * 8 + "|")
    print(row('chosen on', df[df['chosen']], columns))
    rest = df[~df['chosen']]
    print(row('**all others**', rest, columns))
    for by in ('set', 'kind', 'planted', 'regime'):
        for k, d in rest.groupby(by, sort=False): print(row(f'{by}: {k}', d, columns))
    for k, d in rest[rest['regime'] == 'short'].groupby('epochs'): print(row(f'short, {k} epochs', d, columns))

def reviews(df):
    print("\nAfter 50 and after 50 + 50 decisions: in how many trainings (%), the mean of three draws, are rate and precision within 5 points of the truth?\n")
    print("| trainings | number | rate, before | precision | rate, 50 | precision | rate, 100 | precision | bounds hold (100): rate | precision | recall |\n" + "|---" * 11 + "|")
    d = df[df['rate_50'].notna()]
    columns = [f'near_{o}{end}' for end in ('', '_50', '_100') for o in ('rate', 'precision')] + ['rate_holds_100', 'precision_holds_100', 'recall_100']
    for title, g in [('all', d), ('chosen on', d[d['chosen']]), ('all others', d[~d['chosen']]), *d.groupby('set', sort=False), *d.groupby('kind', sort=False)]: print(row(title, g, columns))

def ranking(df):
    names = [c for c in df if c.startswith('ap ') and c != 'ap five-fold']
    d = df[df[names[0]].notna() & (df['planted'] >= .05)]
    print("\nAverage precision, mean; 5 to 40 % wrong. The differences ± their standard errors: what pairs add, what a look adds, and label_doubt without a look less margin_loss.\n\n| trainings | number | " + " | ".join(c[3:] for c in names) + " | pairs | look | over margin_loss |\n" + "|---" * (len(names) + 5) + "|")
    rest = d[~d['chosen']]
    for title, g in [('chosen on', d[d['chosen']]), ('all others', rest), *rest.groupby('kind', sort=False), *rest.groupby('set', sort=False), *rest.groupby('regime', sort=False)]:
        print(f"| {title} | {len(g)} | " + " | ".join(f"{g[c].mean():.3f}" for c in names) + " | " + " | ".join(less(g, *o) for o in (('label_doubt', 'without pairs'), ('with a look', 'label_doubt'), ('label_doubt', 'margin_loss'))) + " |")
    few = df[(df['planted'] < .05) & df[names[0]].notna()]
    print("\nNearly clean: .4 and 1 %, and MNIST's checked images:\n\n| trainings | number | " + " | ".join(c[3:] for c in names) + " | over margin_loss |\n" + "|---" * (len(names) + 3) + "|")
    for title, g in [('seed 0', few[few['seed'] == 0]), ('other seeds', few[few['seed'] > 0]), *few.groupby('set', sort=False), *few.groupby('regime', sort=False)]:
        print(f"| {title} | {len(g)} | " + " | ".join(f"{g[c].mean():.3f}" for c in names) + f" | {less(g, 'label_doubt', 'margin_loss')} |")

def less(g, a, b):
    d = g[f'ap {a}'] - g[f'ap {b}']
    return f"{d.mean():+.4f} ± {d.std() / max(len(g), 1)**.5:.4f}"

def against_folds(df):
    if 'ap five-fold' not in df: return
    d = df[df['ap five-fold'].notna() & (df['planted'] >= .05)]
    names = ['label_doubt', 'with a look', 'margin_loss', 'five-fold']
    print("\nBeside five more trainings, average precision:\n\n| trainings | number | " + " | ".join(names) + " | label_doubt − five-fold | with a look − five-fold |\n" + "|---" * (len(names) + 4) + "|")
    groups = [('all', d), *d.groupby('kind', sort=False), *d.groupby('set', sort=False), *d.groupby('regime', sort=False)]
    for title, g in groups: print(f"| {title} | {len(g)} | " + " | ".join(f"{g['ap ' + c].mean():.3f}" for c in names) + f" | {less(g, 'label_doubt', 'five-fold')} | {less(g, 'with a look', 'five-fold')} |")
    ways = [c[5:] for c in d if c.startswith('many ')]
    print("\nWhat is flagged there: how many for each wrong label, the share of wrong labels among them, and of the wrong labels that are found.\n\n| flagged by | number by wrong labels | precision | recall |\n|---|---|---|---|")
    for w in ways: print(f"| {w} | {d['many ' + w].mean():.2f} | {d['right ' + w].mean():.2f} | {d['got ' + w].mean():.2f} |")

def main(pattern='*'):
    paths = sorted(o for o in CACHE.glob(f'{pattern}.npz') if '.part' not in o.name)
    if not paths: return print(f"skipped: no trainings in {CACHE}; `python benchmarks/trainings.py` makes them")
    df = pd.DataFrame([measured(Kept(o)) for o in paths])
    print(f"{len(df)} trainings, {df['chosen'].sum()} of them chosen on")
    some = df[(df['planted'] >= .05) | (df['planted'] == 0)]
    for table in (coverage, reviews): table(some)
    for table in (ranking, against_folds): table(df)
    clean = df[(df['planted'] == 0) & (df['true_rate'] == 0)]
    print(f"\nClean labels: {100 * clean['flagged'].mean():.2f} % flagged in the mean, {100 * clean['flagged'].max():.2f} % at most, in {len(clean)} trainings.")


if __name__ == '__main__': main(*sys.argv[1:])
