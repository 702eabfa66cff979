"""How much better do two runs find wrong labels than one? The same items and labels, trained again from another seed.

The first run of each training is one of `trainings.py`; all lie in XENT_CACHE, and those that are there are not made again."""
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from trainings import KINDS, data, file_of, one
from verdict import Kept, asked, average_precision, claims

from fastai_xent.records import _Together

SETS = 'digits', 'table', 'TREC-6', 'cancer', 'Fashion'


def settings():
    "A fifth of the labels is wrong."
    for regime in ('fits', 'memorises'):
        for kind in KINDS:
            for name in SETS:
                if name == 'cancer' and kind == 'pair': continue # two classes: sym is pair
                if data(name) is not None: yield name, regime, kind, .2, 0

def train(n):
    torch.set_num_threads(1)
    for o in settings():
        start, new = time.perf_counter(), [run for run in range(n) if not file_of(*o, run).exists()]
        for run in new: one(*o, run)
        if new: print(f"{o}: {len(new)} runs, {time.perf_counter() - start:.0f} s", flush=True)

def kept(o, run):
    r = Kept(file_of(*o, run))
    r.n_epochs = len(r.a['t_margin'])
    return r

def measured(o, n) -> dict:
    runs = {str(run): kept(o, run) for run in range(n)}
    wrong = runs['0'].wrong
    together = asked(_Together(SimpleNamespace(records=runs, splits=['train', 'valid'])))
    found = {'one': [asked(r) for r in runs.values()], 'together': [together]}
    score = lambda issues: issues.sort_values('item')['score'].to_numpy()
    out = {f'ap {k}': np.mean([average_precision(score(i), wrong) for i in v]) for k, v in found.items()}
    for k, v in found.items():
        for c in ('rate_holds', 'rate_width', 'precision_holds', 'precision_width'): out[f'{c} {k}'] = np.nanmean([claims(i, wrong)[c] for i in v])
    return dict(set=o[0], regime=o[1], kind=o[2], **out)

def main(n=2):
    train(n)
    df = pd.DataFrame([measured(o, n) for o in settings()])
    print(f"\nAverage precision of one run (the mean over {n}) and of {n} together; 20 % wrong; the gain ± its standard error.\n")
    print("| trainings | number | one | together | gain | better in |\n" + "|---" * 6 + "|")
    for title, d in [('all', df), *df.groupby('kind', sort=False), *df.groupby('set', sort=False), *df.groupby('regime', sort=False)]:
        gain = d['ap together'] - d['ap one']
        print(f"| {title} | {len(d)} | {d['ap one'].mean():.3f} | {d['ap together'].mean():.3f} | {gain.mean():+.3f} ± {gain.std() / len(d)**.5:.3f} | {(gain > 0).sum()} |")
    print("\nThe bounds, in %: how often they hold the truth, and how wide they are.\n\n| | rate holds | width | precision holds | width |\n" + "|---" * 5 + "|")
    for k in ('one', 'together'): print(f"| {k} | " + " | ".join(f"{100 * df[f'{c} {k}'].mean():.1f}" for c in ('rate_holds', 'rate_width', 'precision_holds', 'precision_width')) + " |")


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
