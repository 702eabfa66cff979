"""What acting on a record is worth: `python benchmarks/acts.py`, or `--quick` on scikit-learn's digits, in about a minute.

1. Wrong labels, planted in train and valid: accuracy on clean test images after dropping, down-weighting or relabelling the suspects, against training on all and
   against dropping as many at random. `planted` drops just the wrong labels, which nobody can in practice.
2. Clean data: the share of examples that is kept by EL2N, the hard ones or the easy ones, against as many at random, with little data
   and with more. All take the same number of steps.
3. `XentSampler`: steps, CPU seconds and accuracy with and without it.

Each figure is the mean over seeds (data, noise and weights all differ) ± the standard deviation; differences are of pairs with the same
seed. One thread, its CPU time. Data: Fashion-MNIST from Debian's package dataset-fashion-mnist."""
import argparse
import os
import platform
import sys
import time
import warnings
from datetime import date

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore', category=FutureWarning)

import fastai  # noqa: E402
import fastai.callback.schedule  # noqa: E402,F401 `fit_one_cycle`
import numpy as np  # noqa: E402
import torch  # noqa: E402
from fastai.data.core import DataLoaders, TfmdDL  # noqa: E402
from fastai.learner import Learner  # noqa: E402
from fastai.torch_core import set_seed  # noqa: E402
from overhead import FASHION, Rows, cnn, idx  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

from fastai_xent.all import XentLossFlat, XentRecorder, XentSampler, prune, relabel, reweight  # noqa: E402
from fastai_xent.demo import small_cnn  # noqa: E402

SEEDS = range(3)


# -- data and trainings

def fashion():
    "Images and labels: a pool to draw training items from, and the test set."
    def part(name, kind): return idx(FASHION / f'{name}-{kind}-idx{3 if kind == "images" else 1}-ubyte.gz')
    x, y, tx, ty = (part(n, k) for n in ('train', 't10k') for k in ('images', 'labels'))
    return *(torch.tensor(o[:, None] / 255., dtype=torch.float32) for o in (x, tx)), torch.tensor(y.astype(np.int64)), torch.tensor(ty.astype(np.int64))

def scikit_digits():
    data = load_digits()
    x, y = torch.tensor(data.images[:, None] / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order[400:]], x[order[:400]], y[order[400:]], y[order[:400]]

class Task:
    "Images, a network, and how long to train."
    def __init__(self, name, data, model, lr): (self.x, self.tx, self.y, self.ty), self.name, self.model, self.lr = data, name, model, lr

    def loaders(self, n, seed, noise=0.):
        "Loaders over `n` items of the pool, with wrong labels planted, and which these are."
        rng = np.random.default_rng(seed)
        order = torch.from_numpy(rng.permutation(len(self.y)))
        def noisy(at):
            y, flip = self.y[at].clone(), torch.from_numpy(rng.choice(len(at), round(noise * len(at)), replace=False))
            y[flip] = (y[flip] + torch.from_numpy(rng.integers(1, 10, len(flip)))) % 10
            return Rows(self.x[at], y)
        at, valid = order[:n], order[n:n + n // 5]        # the validation labels are as wrong as the others
        train = noisy(at)
        return DataLoaders(TfmdDL(train, bs=64, shuffle=True, num_workers=0), TfmdDL(noisy(valid), bs=256, num_workers=0)), (train.ts[1] != self.y[at]).numpy()

    def train(self, dls, epochs, seed, *cbs):
        "Accuracy on the test set in percent, CPU seconds, the Learner."
        set_seed(seed)
        learn = Learner(dls, self.model(), loss_func=XentLossFlat(), cbs=list(cbs))
        with learn.no_bar(), learn.no_logging():
            start = time.thread_time()
            learn.fit_one_cycle(epochs, self.lr)
            took = time.thread_time() - start
        model = learn.model.eval()
        with torch.no_grad(): right = torch.cat([model(o).argmax(1) for o in self.tx.split(1000)]) == self.ty
        return 100 * right.float().mean().item(), took, learn

def mean_sd(v, digits=2):
    v = np.asarray(v, dtype=float)
    return f"{v.mean():.{digits}f} ± {v.std(ddof=1):.{digits}f}" if len(v) > 1 else f"{v.mean():.{digits}f}"

def versus(a, b):
    d = np.asarray(a) - np.asarray(b)
    return f"{d.mean():+.2f} ± {d.std(ddof=1):.2f}"


# -- the three tables

def noisy(task, n, epochs, noises):
    print(f"\n### Wrong labels: {task.name}, {n:,} items, {epochs} epochs, accuracy on clean test images, %\n")
    print("| noise | flagged | precision | recall | all | drop flagged | drop as many at random | reweight by 1 − p_wrong | relabel flagged | planted dropped | flagged − all | flagged − random |\n|" + "---|" * 12)
    for noise in noises:
        got = {k: [] for k in ('share', 'precision', 'recall', 'all', 'drop', 'random', 'reweight', 'relabel', 'planted')}
        for seed in SEEDS:
            dls, wrong = task.loaders(n, seed, noise)
            acc, _, learn = task.train(dls, epochs, seed, XentRecorder())
            record = learn.xent_recorder.record
            issues = record.label_issues(cautious=False)
            mask = np.zeros(n, dtype=bool)
            mask[issues.loc[issues['is_issue'].astype(bool), 'item']] = True
            chance = np.random.default_rng(seed).choice(n, mask.sum(), replace=False)
            others = dict(drop=prune(dls, record, drop=issues), random=prune(dls, record, drop=chance), reweight=reweight(dls, record, issues),
                          relabel=relabel(dls, record, issues), planted=prune(dls, record, drop=wrong))
            for k, v in dict(share=100 * mask.mean(), precision=100 * wrong[mask].mean(), recall=100 * mask[wrong].mean(), all=acc).items(): got[k].append(v)
            for k, o in others.items(): got[k].append(task.train(o, round(epochs * n / len(o.train_ds)), seed)[0])     # as many steps
        cells = [mean_sd(got[k], 1) for k in ('share', 'precision', 'recall', 'all', 'drop', 'random', 'reweight', 'relabel', 'planted')]
        print(f"| {noise:.0%} | {' | '.join(cells)} | {versus(got['drop'], got['all'])} | {versus(got['drop'], got['random'])} |", flush=True)

def clean(task, sizes, epochs, shares):
    print(f"\n### Clean labels, pruned by the mean EL2N of a first training: {task.name}, accuracy on test images, %\n")
    print("| items | epochs | kept | all | the hard ones | the easy ones | at random | hard − random | easy − random |\n|" + "---|" * 9)
    for n, e in zip(sizes, epochs):
        runs = []
        for seed in SEEDS:
            dls, _ = task.loaders(n, seed)
            acc, _, learn = task.train(dls, e, seed, XentRecorder())
            runs.append((seed, dls, acc, learn.xent_recorder.record))
        for share in shares:
            got = {k: [] for k in ('hard', 'easy', 'random')}
            for seed, dls, _, record in runs:
                chance = np.random.default_rng(seed).choice(n, round(share * n), replace=False)
                for k, o in dict(hard=prune(dls, record, keep=share, by='el2n'), easy=prune(dls, record, drop=1 - share, by='el2n'), random=prune(dls, record, keep=chance)).items():
                    got[k].append(task.train(o, round(e / share), seed)[0])
            print(f"| {n:,} | {e} | {share:.0%} | {mean_sd([o[2] for o in runs])} | {' | '.join(mean_sd(v) for v in got.values())} | {versus(got['hard'], got['random'])} "
                  f"| {versus(got['easy'], got['random'])} |", flush=True)

def fewer_steps(task, n, epochs, rs):
    print(f"\n### XentSampler: {task.name}, {n:,} items, {epochs} epochs\n")
    print("| | steps | CPU seconds | fewer steps | less time | accuracy, % | − all rows |\n|" + "---|" * 7)
    got = {}
    for r in (None, *rs):
        for seed in SEEDS:
            dls, _ = task.loaders(n, seed)
            acc, took, learn = task.train(dls, epochs, seed, *([] if r is None else [XentSampler(r)]))
            got.setdefault(r, []).append((len(learn.recorder.losses), took, acc))
    got = {k: np.array(v) for k, v in got.items()}
    for r, v in got.items():
        fewer = '– | –' if r is None else ' | '.join(f"{1 - o:.1%}" for o in (v / got[None]).mean(0)[:2])
        print(f"| {'all rows' if r is None else f'r = {r}'} | {mean_sd(v[:, 0], 0)} | {mean_sd(v[:, 1], 1)} | {fewer} | {mean_sd(v[:, 2])} | {'–' if r is None else versus(v[:, 2], got[None][:, 2])} |", flush=True)

def main(quick, only):
    torch.set_num_threads(1)
    cpu = next((o.split(':')[1].strip() for o in open('/proc/cpuinfo') if o.startswith('model name')), platform.processor()) if sys.platform == 'linux' else platform.processor()
    print(f"{cpu}, {os.cpu_count()} cores, one thread; Python {platform.python_version()}, torch {torch.__version__}, fastai {fastai.__version__}; {date.today()}; {len(SEEDS)} seeds")
    if not quick and not FASHION.exists(): return print("skipped: dataset-fashion-mnist is not installed; `--quick` runs on digits")
    task = Task('digits', scikit_digits(), small_cnn, 1e-2) if quick else Task('Fashion-MNIST', fashion(), cnn, 1e-2)
    jobs = dict(sampler=lambda: fewer_steps(task, *((1_397, 12, [.5]) if quick else (10_000, 16, [.5, .7]))),
                noise=lambda: noisy(task, *((1_000, 6, [.2, .4]) if quick else (5_000, 8, [.2, .4]))),
                clean=lambda: clean(task, *(([1_000], [6], [.5]) if quick else ([5_000, 1_000], [8, 15], [.7]))))
    for name, job in jobs.items():
        if only in (None, name): job()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--only', choices=['sampler', 'noise', 'clean'])
    args = parser.parse_args()
    main(args.quick, args.only)
