"""How much better do several runs find wrong labels than one? The same items and labels, trained again with other seeds.

The first run of each training is one of `trainings.py`; all lie in XENT_CACHE, and those that are there are not made again."""
import sys
import time

import numpy as np
import torch
from trainings import KINDS, data, file_of, one

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
        ys = []
        for run in range(n):
            with np.load(file_of(*o, run)) as f: ys.append(f['y'])
        assert all((y == ys[0]).all() for y in ys), f'{o}: other labels'


if __name__ == '__main__': train(int((sys.argv[1:] or [3])[0]))
