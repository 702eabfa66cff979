"""What the losses cost beside those they replace: `python benchmarks/loss.py`; `--small` measures the small batches alone.

One thread, and its CPU time, so that neighbours on the machine count little. Ours and its rival take turns; a figure is the
median of the ratios of neighbours, with the quartiles.

A large tensor is new memory from the system each time, which costs more than the arithmetic on some machines, and ours needs
less of it. So the large batches are measured again by a child process whose allocator gives nothing back to the system.
"All statistics" means that the seven facts of every row are computed in the same call."""
import datetime
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
import warnings
from itertools import accumulate
from types import SimpleNamespace

warnings.filterwarnings('ignore', category=FutureWarning)

import fastai
import torch
import torch.nn.functional as F
from fastai.losses import CrossEntropyLossFlat
from torch.profiler import ProfilerActivity, profile

from fastai_xent.linear import linear_xent
from fastai_xent.losses import XentLoss, XentLossFlat
from fastai_xent.batch import read_batch
from fastai_xent.rows import RowBuffer

GEN = torch.Generator().manual_seed(0)
KEEPS = dict(MALLOC_TRIM_THRESHOLD_='4294967296', MALLOC_MMAP_THRESHOLD_='4294967296', MALLOC_TOP_PAD_='268435456')  # glibc's allocator keeps its memory
ROWS = 4096  # that the recorder's buffer sees in a small-batch measurement


# -- measuring

def clock(f) -> float:
    start = time.thread_time()                        # of this thread: on a CPU the backward pass is in it too
    f()
    return time.thread_time() - start

def turns(ours, rival, seconds, least=7, most=4000) -> tuple:
    "Seconds of both, measured in turns, whose order alternates."
    for f in (ours, rival): f(), f()
    a, b, end = [], [], time.perf_counter() + seconds
    gc.disable()
    while len(a) < least or (time.perf_counter() < end and len(a) < most):
        if len(a) % 2: b.append(clock(rival)), a.append(clock(ours))
        else: a.append(clock(ours)), b.append(clock(rival))
    gc.enable()
    return a, b

def spread(xs) -> str:
    lo, mid, hi = statistics.quantiles(xs, n=4)
    return f'{mid:.2f} ({lo:.2f} – {hi:.2f})'

def ms(xs) -> str:
    t = statistics.median(xs) * 1e3
    return f'{t:.3f}' if t < 1 else f'{t:.2f}' if t < 100 else f'{t:.0f}'

def compare(what, rival_name, ours, rival, goal='', seconds=3.) -> None:
    "Print a row of the table of times."
    a, b = turns(ours, rival, seconds)
    print(f"| {what} | {rival_name} | {spread([x / y for x, y in zip(a, b)])} | {goal} | {ms(a)} | {ms(b)} | {len(a)} |", flush=True)

def peak(f) -> int:
    "The most bytes that torch's allocator, and numpy's, have given out during a `step`, beyond those before: both peaks, as if they were at the same time."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True): f()        # kernels compile, and the profiler sets up what it needs
    for o in f.leaves: o.grad = None
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f()
    by_numpy = tracemalloc.get_traced_memory()[1]     # and a little by Python itself
    tracemalloc.stop()
    events = sorted((o for o in prof.profiler.kineto_results.events() if o.name() == '[memory]'), key=lambda o: o.start_ns())
    return max(accumulate((o.nbytes() for o in events), initial=0)) + by_numpy

def compare_peaks(what, rival_name, ours, rival, goal='') -> None:
    "Print a row of the table of memory."
    a, b = peak(ours), peak(rival)
    print(f"| {what} | {rival_name} | {a / b:.2f} | {goal} | {a / 2**20:.1f} | {b / 2**20:.1f} |", flush=True)


# -- what is measured

def problem(*shape, axis=1):
    "Logits that look like a trained model's, and their targets."
    z = torch.randn(shape, generator=GEN) * 3
    return z.requires_grad_(), torch.randint(0, shape[axis], [s for i, s in enumerate(shape) if i != axis], generator=GEN)

def step(loss_func, *leaves):
    "A forward and backward pass."
    def f():
        for o in leaves: o.grad = None
        loss_func().backward()
    f.leaves = leaves
    return f

def naive(z, y):
    "Loss, norm of the gradient, probability of the label and margin of each row, as one writes them by hand."
    p = z.detach().softmax(1)
    norm = (p - F.one_hot(y, z.shape[1])).norm(dim=1)
    top = z.detach().masked_fill(F.one_hot(y, z.shape[1]).bool(), -torch.inf).amax(1)
    return F.cross_entropy(z.detach(), y, reduction='none'), norm, p.gather(1, y[:, None])[:, 0], z.detach().gather(1, y[:, None])[:, 0] - top, z.argmax(1)

class Recorded:
    "A loss whose batches go to a `RowBuffer`, as the recorder's do: a measurement is as many batches as give `ROWS` rows."
    def __init__(self, loss_func, z, y): self.loss_func, self.z, self.y, self.rows, self.i = loss_func, z, y, None, 0
    def __call__(self):
        if self.i % max(1, ROWS // len(self.y)) == 0:
            if self.rows is not None: self.rows.cols()
            self.rows = RowBuffer(ROWS)
        self.z.grad = None
        loss = self.loss_func(self.z, self.y)
        learn = SimpleNamespace(pred=self.z, yb=(self.y,), loss_func=self.loss_func, loss=loss)
        self.rows.add(self.i, read_batch(learn), self.i)
        loss.backward()
        self.i += 1

def many(f, n):
    def g():
        for _ in range(n): f()
    return g

def stock(loss_func, z, y): return step(lambda: loss_func(z, y), z)

WIDE = [(2048, 1000, .6), (512, 32000, .6), (256, 1000, .8)]
SMALL = [(64, 10, .5), (64, 100, .5), (256, 100, .6), (128, 1000, .6)]

HEADER = "| forward + backward of | rival | ours / rival, median (quartiles) | goal | ours, ms | rival, ms | turns |\n|---|---|---|---|---|---|---|"

def large():
    print(HEADER)
    for n, c, goal in WIDE:
        z, y = problem(n, c)
        seconds = 8 if n * c > 1e7 else 4
        compare(f'XentLoss with all statistics, {n}×{c}', 'F.cross_entropy', stock(XentLoss(), z, y), stock(F.cross_entropy, z, y), f'≤ {goal}', seconds)
    z, y = problem(8, 21, 96, 96)
    compare('XentLossFlat(axis=1) with all statistics, masks 8×21×96×96', 'CrossEntropyLossFlat(axis=1)',
            stock(XentLossFlat(axis=1), z, y), stock(CrossEntropyLossFlat(axis=1), z, y), '≤ 0.5', 5)
    compare('the same', 'F.cross_entropy, channels first', stock(XentLossFlat(axis=1), z, y), stock(F.cross_entropy, z, y), '', 4)

def small():
    for n, c, goal in SMALL:
        z, y = problem(n, c)
        k, what = ROWS // n, f'XentLossFlat recorded, {n}×{c}, {ROWS // n} batches'
        compare(what, 'CrossEntropyLossFlat', many(Recorded(XentLossFlat(), z, y), k), many(stock(CrossEntropyLossFlat(), z, y), k), f'≤ {goal}')
        compare(what, 'F.cross_entropy', many(Recorded(XentLossFlat(), z, y), k), many(stock(F.cross_entropy, z, y), k), '≤ 1.3')
    for n, c in [(256, 1000), (2048, 1000)]:
        z, y = problem(n, c)
        k = ROWS // n
        compare(f'XentLossFlat(label_smoothing=.1) recorded, {n}×{c}, {k} batches', 'CrossEntropyLossFlat(label_smoothing=.1)',
                many(Recorded(XentLossFlat(label_smoothing=.1), z, y), k), many(stock(CrossEntropyLossFlat(label_smoothing=.1), z, y), k))
    for n, c in [(256, 100), (256, 1000), (2048, 1000)]:
        z, k = problem(n, c)[0], ROWS // n
        soft = problem(n, c)[0].detach().softmax(1)
        compare(f'XentLossFlat recorded, probabilities, {n}×{c}, {k} batches', 'F.cross_entropy', many(Recorded(XentLossFlat(), z, soft), k), many(stock(F.cross_entropy, z, soft), k))
    z, y = problem(64, 10)
    soft, k = y.new_zeros(64, 10).float().scatter_(1, y[:, None], 1), ROWS // 64
    compare(f'the same with label smoothing, 64×10, {k} batches', 'CrossEntropyLossFlat', many(Recorded(XentLossFlat(label_smoothing=.1), z, y), k),
            many(stock(CrossEntropyLossFlat(label_smoothing=.1), z, y), k))
    compare(f'the same with probabilities, 64×10, {k} batches', 'F.cross_entropy', many(Recorded(XentLossFlat(), z, soft), k), many(stock(F.cross_entropy, z, soft), k))
    for n, c in [(64, 10), (64, 100), (256, 1000), (2048, 1000)]:
        z, y = problem(n, c)
        compare(f'XentLossFlat, nobody listening, {n}×{c}', 'CrossEntropyLossFlat', stock(XentLossFlat(), z, y), stock(CrossEntropyLossFlat(), z, y), '', 3)
    for n, c in [(2048, 1000), (256, 1000)]:
        z, y = problem(n, c)
        compare(f'F.cross_entropy and naive statistics by hand, {n}×{c}', 'F.cross_entropy', step(lambda: naive(z, y) and F.cross_entropy(z, y), z), stock(F.cross_entropy, z, y))

def memory():
    print("\n| peak memory of forward + backward | rival | ours / rival | goal | ours, MiB | rival, MiB |\n|---|---|---|---|---|---|")
    for n, c, _ in WIDE:
        z, y = problem(n, c)
        compare_peaks(f'XentLoss with all statistics, {n}×{c}', 'F.cross_entropy', stock(XentLoss(), z, y), stock(F.cross_entropy, z, y), '≤ 1.0')
    z, y = problem(8, 21, 96, 96)
    compare_peaks('XentLossFlat(axis=1) with all statistics, masks 8×21×96×96', 'CrossEntropyLossFlat(axis=1)', stock(XentLossFlat(axis=1), z, y), stock(CrossEntropyLossFlat(axis=1), z, y), '≤ 1.0')
    compare_peaks('the same', 'F.cross_entropy, channels first', stock(XentLossFlat(axis=1), z, y), stock(F.cross_entropy, z, y), '≤ 1.0')

def linear(n=4096, c=32000, f=256):
    print(f"\n| head and loss, {n}×{c}, f = {f} | rival | time, ours / rival | ours, s | rival, s | peak, ours / rival | ours, MiB | rival, MiB |\n|---|---|---|---|---|---|---|---|")
    h, W = torch.randn(n, f, generator=GEN).requires_grad_(), (torch.randn(c, f, generator=GEN) / 16).requires_grad_()
    b, y = torch.zeros(c, requires_grad=True), torch.randint(0, c, (n,), generator=GEN)
    ours = step(lambda: linear_xent(h, W, y, b, with_stats=True)[0], h, W, b)
    rivals = {'F.cross_entropy(F.linear)': step(lambda: F.cross_entropy(F.linear(h, W, b), y), h, W, b)}
    if hasattr(torch.nn, 'LinearCrossEntropyOptions'):
        options = torch.nn.LinearCrossEntropyOptions()
        rivals['F.linear_cross_entropy, chunked'] = step(lambda: F.linear_cross_entropy(h, W, y, linear_bias=b, options=options), h, W, b)
    fs = {'ours': ours, **rivals}
    took = {k: [] for k in fs}
    for _ in range(3):
        for k, run in fs.items(): took[k].append(clock(run))
    peaks = {k: peak(run) for k, run in fs.items()}
    for k in rivals:
        t = [statistics.median(took[o]) for o in ('ours', k)]
        ratios = [x / y for x, y in zip(took['ours'], took[k])]
        print(f"| linear_xent with all statistics | {k} | {statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f}) | {t[0]:.2f} | {t[1]:.2f} | {peaks['ours'] / peaks[k]:.2f} | {peaks['ours'] / 2**20:.0f} | {peaks[k] / 2**20:.0f} |", flush=True)

def machine() -> str:
    "Where and when."
    cpu = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f: cpu = next((o.split(':')[1].strip() for o in f if o.startswith('model name')), cpu)
    return (f"{cpu}, {os.cpu_count()} cores, one thread used; {platform.system()}; Python {platform.python_version()}, torch {torch.__version__}, "
            f"fastai {fastai.__version__}; {datetime.date.today()}")

def main():
    torch.set_num_threads(1)
    if '--large' in sys.argv: return large()
    print(machine() + '\n')
    if '--small' in sys.argv: return print(HEADER) or small()
    large()
    small()
    print("\nThe large batches where memory is kept, by `" + ' '.join(f'{k}={v}' for k, v in KEEPS.items()) + '`:\n', flush=True)
    subprocess.run([sys.executable, __file__, '--large'], env={**os.environ, **KEEPS}, check=True)
    memory()
    linear()

if __name__ == '__main__': sys.exit(main())
