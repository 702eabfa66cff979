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

CACHE = Path(os.environ.get('XENT_CACHE', f'{tempfile.gettempdir()}/xent_trainings'))
Segment = namedtuple('Segment', 'split k n found')
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
        self.n_classes, self._cache, self._epochs = int(self.a['c']), self, self
        self.y = dict(train=self.a['y'], valid=self.a['yv'])
        self.wrong, self.states = self.a['y'] != self.a['truth'], {}
    def rows(self, split, e):
        m, p, pred = (self.a[f'{split[0]}_{o}'][e] for o in ('margin', 'p_targ', 'pred'))
        at = np.flatnonzero(~np.isnan(m))
        return dict(item=at, margin=m[at], p_targ=p[at], pred=pred[at], targ=self.y[split][at], lam=np.full(len(at), np.nan), occurrence=np.zeros(len(at)))
    def _segment(self, split, k=-1):
        return Segment(split, 0, len(self.y[split]), {(0, split, e): None for e in range(len(self.a[f'{split[0]}_margin']))})
    def values(self, _, seg): return [self.y[seg.split]]
    def state(self, reducer, seg):
        if seg.split in self.states: return self.states[seg.split]
        state = self.states[seg.split] = reducer.init(seg.n)
        for _, _, e in seg.found:
            t = self.rows(seg.split, e)
            reducer.update(state, t['item'], np.ones(len(t['item'])), **{o: t[o] for o in reducer.columns})
        return state
    def read(self, found, columns):
        (_, split, e), = found
        t = self.rows(split, e)
        return Columns([Column(t[o]) for o in columns])
    def items(self, split, k): return pd.DataFrame(dict(item=np.arange(len(self.y[split])), name=np.arange(len(self.y[split]))))
    def class_name(self, c): return int(c)
    def _told_ledger(self, split): return ''

    def rankings(self) -> dict: # large: suspect
        "Scores of the same rows."
        m = self.a['t_margin'].astype(float)
        eval_p = self.a['e_p_targ'][0].astype(float)
        return {'label_doubt': LabelDoubt().finalize(s := self.state(LabelDoubt(), self._segment('train'))), 'without pairs': LabelDoubt().mean(s, 'doubt'),
                'margin_loss': np.nanmean(np.logaddexp(0, -m), 0), 'EL2N, mean': self.a['t_el2n'], 'grand': self.a['t_grand'], 'aum': -np.nanmean(m, 0), 'top losses': -np.log(np.maximum(eval_p, 1e-37))}


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
    return {k + end: v for k, v in dict(rate=a['noise_rate'], low=a['noise_rate_low'], high=a['noise_rate_high'], rate_holds=inside(wrong.mean(), 'noise_rate'),
            rate_width=a['noise_rate_high'] - a['noise_rate_low'], flagged=len(flagged) / len(wrong), recall=wrong[flagged].sum() / max(wrong.sum(), 1), precision=a['precision'],
            p_low=a['precision_low'], p_high=a['precision_high'], true=true, precision_holds=inside(true, 'precision'), precision_width=a['precision_high'] - a['precision_low']).items()}

def reviewed(r, issues, rounds, seed=0):
    "The verdict after a person who knows the truth has looked at what was asked for."
    seen = []
    for k, n in enumerate(rounds):
        seen += issues.to_review(n, seed=seed + k)['item'].tolist()
        issues = asked(r, reviewed=pd.DataFrame(dict(item=seen, wrong=r.wrong[seen])))
    return issues

def measured(r) -> dict:
    "All that is measured of one training."
    _page.plateau = remembered(plateau)
    issues = asked(r)
    epochs = len(r.a['t_margin'])
    out = dict(set=r.name, regime=r.regime, kind=r.kind, planted=r.share, seed=r.seed, epochs=epochs, n=len(r.wrong), true_rate=r.wrong.mean(), chosen=chosen_on(r),
               reached=issues.attrs['reached'], verdict=issues.attrs['verdict'], **claims(issues, r.wrong))
    if len(r.wrong) > 1000:
        first = reviewed(r, issues, [50])
        out |= claims(first, r.wrong, '_50') | claims(reviewed(r, issues, [50, 50]), r.wrong, '_100')
    if r.wrong.any(): out |= {'ap ' + k: average_precision(s, r.wrong) for k, s in r.rankings().items()}
    return out


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
    print("\nAfter 50 and after 50 + 50 decisions: in how many trainings (%) are rate and precision within 5 points of the truth?\n")
    print("| trainings | number | rate, before | precision | rate, 50 | precision | rate, 100 | precision | bounds hold (100): rate | precision |\n" + "|---" * 10 + "|")
    d = df[df['rate_50'].notna()].copy()
    for end in ('', '_50', '_100'):
        d['near rate' + end] = ((d['rate' + end] - d['true_rate']).abs() <= .05).astype(float)
        d['near precision' + end] = ((d['precision' + end] - d['true' + end]).abs() <= .05).where(d['true' + end].notna()).astype(float)
    columns = [f'near {o}{end}' for end in ('', '_50', '_100') for o in ('rate', 'precision')] + ['rate_holds_100', 'precision_holds_100']
    for title, g in [('all', d), *d.groupby('set', sort=False), *d.groupby('kind', sort=False)]: print(row(title, g, columns))

def ranking(df):
    names = [c for c in df if c.startswith('ap ')]
    d = df[df[names[0]].notna() & (df['planted'] >= .05)]
    print("\nAverage precision, mean; 5 to 40 % wrong. The difference by pairs, ± its standard error.\n\n| trainings | number | " + " | ".join(c[3:] for c in names) + " | pairs add |\n" + "|---" * (len(names) + 3) + "|")
    for title, g in [('chosen on', d[d['chosen']]), ('all others', d[~d['chosen']]), *d[~d['chosen']].groupby('kind', sort=False), *d[~d['chosen']].groupby('set', sort=False), *d[~d['chosen']].groupby('regime', sort=False)]:
        add = g['ap label_doubt'] - g['ap without pairs']
        print(f"| {title} | {len(g)} | " + " | ".join(f"{g[c].mean():.3f}" for c in names) + f" | {add.mean():+.4f} ± {add.std() / max(len(g), 1)**.5:.4f} |")
    few = df[(df['planted'] < .05) & df[names[0]].notna()]
    print("\nNearly clean:\n\n| training | wrong | " + " | ".join(c[3:] for c in names) + " |\n" + "|---" * (len(names) + 2) + "|")
    for _, r in few.iterrows(): print(f"| {r['set']}, {r['kind']}, seed {r['seed']} | {round(r['true_rate'] * r['n'])} of {r['n']:,} | " + " | ".join(f"{r[c]:.3f}" for c in names) + " |")

def main(pattern='*'):
    paths = sorted(o for o in CACHE.glob(f'{pattern}.npz') if '.part' not in o.name)
    if not paths: return print(f"skipped: no trainings in {CACHE}; `python benchmarks/trainings.py` makes them")
    df = pd.DataFrame([measured(Kept(o)) for o in paths])
    print(f"{len(df)} trainings, {df['chosen'].sum()} of them chosen on")
    for table in (coverage, reviews, ranking): table(df)
    clean = df[df['planted'] == 0]
    print(f"\nClean labels: {100 * clean['flagged'].mean():.2f} % flagged in the mean, {100 * clean['flagged'].max():.2f} % at most, in {len(clean)} trainings.")


if __name__ == '__main__': main(*sys.argv[1:])
