"""What the recorder costs: an epoch of a Learner with it and without it, and what people do instead.

Fits with and without take turns in a drawn order, in one process, on one thread; the figures are ratios of medians. "off / off" is the same fit
twice: what differs there is the machine.
`--instructions` counts instead, which no neighbour disturbs: the instructions of 200 training batches in two epochs, with their passes over
valid, the writer's thread and what is done once a fit, by valgrind's callgrind, which sees nothing of the start. The model is one layer,
so that a name takes a minute or two: the recorder's work does not depend on the model, and is compared with what that of the first table
takes (`cnn`, half an hour). The garbage collector is off meanwhile, since its turns depend on chance.
Data: `XENT_DATA` (default ../shared/data); Fashion-MNIST from Debian's package dataset-fashion-mnist, MNIST's test set in its place."""
import gc
import gzip
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore', category=FutureWarning)

import fastai  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from fastai.data.core import DataLoaders, TfmdDL  # noqa: E402
from fastai.learner import Learner  # noqa: E402
from fastai.torch_core import set_seed  # noqa: E402
from torch import nn  # noqa: E402

from fastai_xent.all import XentLossFlat, XentRecorder  # noqa: E402

DATA = Path(os.environ.get('XENT_DATA', '../shared/data'))
FASHION = Path('/usr/share/datasets/fashion-mnist')


class Rows:
    "Tensors, an item a row."
    def __init__(self, *ts): self.ts = ts
    def __len__(self): return len(self.ts[0])
    def __getitem__(self, i): return tuple(t[i] for t in self.ts)


def idx(path):
    "The array in one of Fashion-MNIST's files."
    raw = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(raw[4 + 4 * i:8 + 4 * i], 'big') for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def images(n=10_000):
    "Name, items and classes of the first `n` images, or None."
    if FASHION.exists():
        x, y, name = idx(FASHION / 'train-images-idx3-ubyte.gz')[:n], idx(FASHION / 'train-labels-idx1-ubyte.gz')[:n], 'Fashion-MNIST'
    elif (DATA / 'mnist_t10k.npz').exists():
        with np.load(DATA / 'mnist_t10k.npz') as f: x, y, name = f['x'][:n], f['y'][:n], 'MNIST test set'
    else: return print(f"skipped: neither dataset-fashion-mnist is installed nor is mnist_t10k.npz in {DATA}")
    return name, Rows(torch.tensor(x[:, None] / 255., dtype=torch.float32), torch.tensor(y.astype(np.int64)))


def table():
    "Name and items of the census table, or None."
    path = DATA / 'adult_30k.csv.gz'
    if not path.exists(): return print(f"skipped: {path} is missing")
    df = pd.read_csv(path)
    y, x = df.iloc[:, -1].astype('category').cat.codes, df.iloc[:, :-1]
    x = pd.concat([pd.to_numeric(x[o]) if pd.api.types.is_numeric_dtype(x[o]) else x[o].astype('category').cat.codes for o in x], axis=1)
    x = ((x - x.mean()) / x.std().replace(0, 1)).to_numpy(np.float32)
    return 'Adult census', Rows(torch.tensor(x), torch.tensor(y.to_numpy(np.int64)))


def cnn():
    layers = [nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((1, 16), (16, 32), (32, 64))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp(n_in): return nn.Sequential(nn.Linear(n_in, 200), nn.ReLU(), nn.BatchNorm1d(200), nn.Linear(200, 100), nn.ReLU(), nn.BatchNorm1d(100), nn.Linear(100, 2))


def learner(items, make, bs, cbs=()):
    set_seed(0)
    dls = DataLoaders(TfmdDL(items, bs=bs, shuffle=True, num_workers=0), TfmdDL(Rows(*(t[:1000] for t in items.ts)), bs=bs, num_workers=0))
    return Learner(dls, make(), loss_func=XentLossFlat(), cbs=list(cbs))


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def compare(items, model, bs, turns, epochs):
    "Seconds of an epoch: off, off once more (how much the machine wavers), on, and off with `get_preds` on train after it. Their order is drawn anew in each turn."
    with tempfile.TemporaryDirectory() as where:
        recorder = XentRecorder(f'{where}/run')
        learns = dict(off=learner(items, model, bs), again=learner(items, model, bs), on=learner(items, model, bs, [recorder]), get_preds=learner(items, model, bs))
        took, rng = {k: [] for k in learns}, np.random.default_rng(0)
        for learn in learns.values():
            learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
            learn.logger = lambda *_: None
        def run(name, learn):
            if name != 'get_preds': return learn.fit(epochs)
            for _ in range(epochs):
                learn.fit(1)
                learn.get_preds(ds_idx=0, with_loss=True)
        for turn in range(turns + 1):
            for name in rng.permutation(list(learns)):
                t = seconds(lambda: run(name, learns[name]))
                if turn: took[name].append(t / epochs)         # the first turn warms up
        assert all(torch.equal(a, b) for a, b in zip(learns['off'].model.parameters(), learns['on'].model.parameters())), 'the recorder changed the training'
        return {k: np.array(v) for k, v in took.items()}, recorder.seconds / recorder.fit_seconds


def main(turns=11):
    torch.set_num_threads(1)
    cpu = next((o.split(':')[1].strip() for o in open('/proc/cpuinfo') if o.startswith('model name')), platform.processor()) if sys.platform == 'linux' else platform.processor()
    print(f"{cpu}, {os.cpu_count()} cores, one thread; Python {platform.python_version()}, torch {torch.__version__}, fastai {fastai.__version__}; {date.today()}\n")
    print("| epoch of | bs | epochs a fit | off, s | on / off, median (quartiles of the turns) | off / off | goal | recorder's own clock | get_preds on train / off |\n|---|---|---|---|---|---|---|---|---|")
    for found, make, bs, epochs, goal in ((images(), lambda items: cnn, 64, 4, '≤ 1.01'), (table(), lambda items: lambda: mlp(items.ts[0].shape[1]), 1024, 10, '≤ 1.02')):
        if found is None: continue
        name, items = found
        took, share = compare(items, make(items), bs, turns, epochs)
        def ratio(a, b='off'): return f"{np.median(took[a]) / np.median(took[b]):.3f} ({' – '.join(f'{o:.3f}' for o in np.quantile(took[a] / took[b], [.25, .75]))})"
        print(f"| {name}, {len(items):,} items | {bs} | {epochs} | {np.median(took['off']):.2f} | {ratio('on')} | {ratio('again')} | {goal} | {share:.1%} | {ratio('get_preds')} |", flush=True)
    print("\nWeights with and without the recorder were equal to the bit.")


# -- instructions

COUNTED = {'off': None, 'on': {}, "head='auto'": dict(head='auto'), 'keep_probs': dict(keep_probs=True), 'cnn': None}
CNN = 15.336e9  # instructions of the same two epochs of `cnn` without a recorder, 28 November 2026: `--instructions cnn` counts them anew

def layer(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

def callgrind(*command):
    "Tell the callgrind that runs this process what to do."
    subprocess.run(['callgrind_control', *command, str(os.getpid())], check=True, capture_output=True)

def counted_fits(names):
    "In a process of callgrind's: for each name a fit of one epoch that is not counted, and one of two that is."
    torch.set_num_threads(1)
    _, items = images(6400)
    with tempfile.TemporaryDirectory() as where:
        for i, name in enumerate(names):
            kw = COUNTED[name]
            make = cnn if name == 'cnn' else layer
            learn = learner(items, make, 64, [] if kw is None else [XentRecorder(f'{where}/{i}', **kw)])
            learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
            learn.logger = lambda *_: None
            learn.fit(1)
            gc.collect(), gc.freeze(), gc.disable()
            callgrind('--instr=on')
            callgrind('--zero')
            learn.fit(2)
            callgrind(f'--dump={i}')
            callgrind('--instr=off')
            gc.enable()

def instructions(names):
    "A table of instructions of all threads, what is done once a fit included."
    if shutil.which('valgrind') is None: return print("skipped: valgrind is not installed (Debian: apt install valgrind)")
    with tempfile.TemporaryDirectory() as where:
        cmd = ['valgrind', '--tool=callgrind', '--instr-atstart=no', f'--callgrind-out-file={where}/out', sys.executable, __file__, '--counted', *names]
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONHASHSEED': '0'}
        subprocess.run(cmd, check=True, capture_output=True, env=env)
        texts = [Path(where, f'out.{i + 1}').read_text() for i in range(len(names))]
    found = [int(re.search(r'^totals: (\d+)', o, re.M)[1]) for o in texts]
    off = found[names.index('off')] if 'off' in names else found[0]
    print(f"| 200 batches of 64, Fashion-MNIST or MNIST | instructions, 10⁶ | more than without | of {CNN / 1e6:,.0f} | goal |\n|---|---|---|---|---|")
    for name, n in zip(names, found):
        print(f"| {name} | {n / 1e6:,.1f} | {(n - off) / 1e6:,.1f} | {(n - off) / CNN:.2%} | {'≤ 1 %' if name == 'on' else ''} |", flush=True)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--counted']: counted_fits(sys.argv[2:])
    elif sys.argv[1:2] == ['--instructions']: instructions(sys.argv[2:] or list(COUNTED)[:-1])
    else: main(*map(int, sys.argv[1:]))
