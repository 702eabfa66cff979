"""What the first epoch of a fresh process costs: `python benchmarks/cold.py [turns]`.

Every figure is a process of its own: 2,000 rows, 10 classes, batches of 64, one epoch, with `XentLossFlat` and a recorder on a disk
("ours"), or with `CrossEntropyLossFlat` alone ("plain"). They take turns, with a compiler's cache that is empty each time and with one
that is filled. CPU seconds of the whole process, all threads, count beside those of the clock, since neighbours disturb them less.
"Large" is a training that the compiled kernel is for, 1,000 classes in batches of 256: its compiler is in the first figure and its
import in the second."""
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
    print(json.dumps(dict(imports=laps[0], epoch=laps[1], compiler='numba' in sys.modules)))


def run(kind, who, cache):
    "What a fresh process says."
    with tempfile.TemporaryDirectory() as where:
        env = {**os.environ, 'NUMBA_CACHE_DIR': cache or f'{where}/numba', 'OMP_NUM_THREADS': '1'}
        cmd = [sys.executable, __file__, '--child', kind, who, f'{where}/run']
        return json.loads(subprocess.run(cmd, env=env, check=True, capture_output=True, text=True).stdout)


def main(turns=5):
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| first epoch of a process | compiler's cache | plain, s (CPU) | ours, s (CPU) | more, s (CPU) | goal | import of ours, s (CPU) | "
          "imports a compiler |\n|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as warm:
            run(kind, 'ours', warm)
            for cache in (None, warm):
                got = {who: [] for who in ('plain', 'ours')}
                for _ in range(turns):
                    for who, o in got.items(): o.append(run(kind, who, cache))
                def mid(who, what, k): return statistics.median(o[what][k] for o in got[who])
                def both(f): return f"{f(0):.2f} ({f(1):.2f})"
                c, bs = KINDS[kind]
                more = both(lambda k: mid('ours', 'epoch', k) - mid('plain', 'epoch', k))
                print(f"| {c} classes, batches of {bs} | {'filled' if cache else 'empty'} | {both(lambda k: mid('plain', 'epoch', k))} | "
                      f"{both(lambda k: mid('ours', 'epoch', k))} | {more} | {'≤ 0.3' if kind == 'small' else ''} | "
                      f"{both(lambda k: mid('ours', 'imports', k))} | {'yes' if got['ours'][0]['compiler'] else 'no'} |", flush=True)


if __name__ == '__main__':
    if '--child' in sys.argv: child(*sys.argv[2:])
    else: main(*map(int, sys.argv[1:]))
