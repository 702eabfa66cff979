"""What the first epoch of a fresh process costs: `python benchmarks/cold.py [turns]`.

Every figure is a process of its own: 2,000 rows, 10 classes, batches of 64, one epoch, with `XentLossFlat` and a recorder on a disk
("ours"), or with `CrossEntropyLossFlat` alone ("plain"). They take turns. CPU seconds of the whole process, all threads, count beside
those of the clock, since neighbours disturb them less. "Large" has 1,000 classes in batches of 256. The kernels are made anew in each
process, nothing is kept on the disk."""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

KINDS = {'small': (10, 64), 'large': (1000, 256)}


def child(kind, who, where):
    "One epoch; seconds of the imports beyond fastai's and of the epoch, by the clock and of CPU."
    import warnings
    warnings.filterwarnings('ignore')
    import fastai.callback.all  # noqa: F401 as any script of fastai's has it
    import torch
    from fastai.basics import DataLoaders, Learner, TfmdDL, set_seed
    from fastai.losses import CrossEntropyLossFlat
    from torch import nn
    torch.set_num_threads(1)
    times = [(time.perf_counter(), time.process_time())]
    def lap(): times.append((time.perf_counter(), time.process_time()))
    loss, cbs = CrossEntropyLossFlat, []
    if who == 'ours':
        from fastai_xent.all import XentLossFlat, XentRecorder
        loss = XentLossFlat
    lap()
    (c, bs), n = KINDS[kind], 2000
    set_seed(0)
    x, y = torch.randn(n, 20), torch.randint(0, c, (n,))
    items = list(zip(x, y))
    dls = DataLoaders(TfmdDL(items, bs=bs, shuffle=True, num_workers=0), TfmdDL(items[:400], bs=bs, num_workers=0))
    if who == 'ours': cbs = [XentRecorder(where)]
    learn = Learner(dls, nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, c)), loss_func=loss(), cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    lap()
    laps = [[b - a for a, b in zip(s, t)] for s, t in zip(times, times[1:])]
    print(json.dumps(dict(imports=laps[0], epoch=laps[1])))


def run(kind, who):
    "What a fresh process says."
    with tempfile.TemporaryDirectory() as where:
        cmd = [sys.executable, __file__, '--child', kind, who, f'{where}/run']
        env = {**os.environ, 'OMP_NUM_THREADS': '1'}
        return json.loads(subprocess.run(cmd, env=env, check=True, capture_output=True, text=True).stdout)


def main(turns=5):
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| first epoch of a process | plain, s (CPU) | ours, s (CPU) | more, s (CPU) | goal | import of ours, s (CPU) |\n|---|---|---|---|---|---|")
    for kind, (c, bs) in KINDS.items():
        got = {who: [] for who in ('plain', 'ours')}
        for _ in range(turns):
            for who, o in got.items(): o.append(run(kind, who))
        def mid(who, what, k): return statistics.median(o[what][k] for o in got[who])
        def both(f): return f"{f(0):.2f} ({f(1):.2f})"
        more = both(lambda k: mid('ours', 'epoch', k) - mid('plain', 'epoch', k))
        print(f"| {c} classes, batches of {bs} | {both(lambda k: mid('plain', 'epoch', k))} | {both(lambda k: mid('ours', 'epoch', k))} | "
              f"{more} | ≤ 0.3 | {both(lambda k: mid('ours', 'imports', k))} |", flush=True)


if __name__ == '__main__':
    if '--child' in sys.argv: child(*sys.argv[2:])
    else: main(*map(int, sys.argv[1:]))
