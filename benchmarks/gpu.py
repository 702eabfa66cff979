"""The Triton kernel against F.cross_entropy, torch.compile of it and Liger-Kernel's, on the GPU of this machine.

Prints a markdown table. Ours is forward, backward and all statistics; theirs is forward and backward. Times are medians of
interleaved repeats, measured by device events, with the cache emptied before each. `python benchmarks/gpu.py 2048x1000` runs one shape."""
import sys
import time
from datetime import date
from importlib.util import find_spec
from statistics import median, quantiles

import torch
import torch.nn.functional as F

SHAPES = [(64, 10), (256, 1000), (2048, 1000), (512, 32000), (4096, 32000), (8192, 128256), (8, 21, 96, 96), (16, 21, 512, 512)]
DTYPES = [torch.float32, torch.bfloat16]
REPEATS, WARM = 21, 3


# -- what is compared: each takes logits and targets, and leaves a gradient in the logits

def ours(pred, targ):
    from fastai_xent.gpu_kernels import KernelLoss
    KernelLoss.apply(pred, targ, None, -100, 0., 1, 'mean', {'stats': None}).backward()

def eager(pred, targ): F.cross_entropy(pred, targ).backward()

def compiled():
    loss = torch.compile(F.cross_entropy, dynamic=False)
    return lambda pred, targ: loss(pred, targ).backward()

def liger():
    from liger_kernel.transformers.functional import liger_cross_entropy
    return lambda pred, targ: liger_cross_entropy(pred * 1, targ).backward()  # it overwrites its logits with their gradient: `* 1` gives it a copy

def rivals(shape):
    "The names and functions for logits of `shape`."
    yield 'ours', ours
    yield 'eager', eager
    yield 'compile', compiled()
    if find_spec('liger_kernel') and len(shape) == 2: yield 'Liger', liger()


# -- measuring

def events(fn, flush):
    "Milliseconds that the device takes for `fn`, after `flush`."
    flush()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)

def wall(fn, repeats=50):
    "Milliseconds that host and device take for one of many calls of `fn`."
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats): fn()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / repeats

def interleaved(fns, flush):
    "Times of each of `fns`, taking turns."
    for fn in fns.values():
        for _ in range(WARM): fn()
    times = {name: [] for name in fns}
    for _ in range(REPEATS):
        for name, fn in fns.items(): times[name].append(events(fn, flush))
    return times

def peak(fn):
    "Bytes that `fn` takes at its height, beyond what was there."
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    return torch.cuda.max_memory_allocated() - before

def spread(times):
    "Half the distance of the quartiles, in per cent of the median."
    low, _, high = quantiles(times, n=4)
    return 50 * (high - low) / median(times)

def copy_bandwidth(nbytes=2**31):
    "Bytes read and written in a second by a copy."
    a = torch.empty(nbytes, dtype=torch.uint8, device='cuda')
    b = torch.empty_like(a)
    for _ in range(WARM): b.copy_(a)
    return 2 * nbytes / (median(events(lambda: b.copy_(a), lambda: None) for _ in range(REPEATS)) * 1e-3)


# -- a row of the table

def row(shape, dtype, ceiling, flush):
    "Measure all rivals on logits of `shape`."
    from fastai_xent.gpu_kernels import _pass
    gen = torch.Generator('cuda').manual_seed(0)
    pred = torch.randn(shape, generator=gen, device='cuda', dtype=dtype).mul_(3).requires_grad_()
    targ = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=gen, device='cuda')
    def step(fn):
        def run():
            pred.grad = None
            fn(pred, targ)
        return run
    fns = {name: step(fn) for name, fn in rivals(shape)}
    fns['forward'] = lambda: _pass(pred.detach(), targ, None, -100, 0., 1, 'mean', True, True)
    times = interleaved(fns, flush)
    ms = {name: median(t) for name, t in times.items()}
    moved = 2 * pred.nbytes + targ.numel() * (8 + 6 * 4 + 8)   # logits, gradient, targets, row losses, statistics
    rate = moved / (ms['forward'] * 1e-3)
    memory = {name: peak(fns[name]) for name in ('ours', 'eager')}
    waits = {name: wall(fns[name]) for name in ('ours', 'eager')} if pred.numel() < 2**20 else None
    ratio = lambda name: f"{ms['ours'] / ms[name]:.2f}" if name in ms else '–'
    return ['×'.join(map(str, shape)), str(dtype)[6:], f"{ms['ours']:.3f} ± {spread(times['ours']):.0f} %", f"{ms['eager']:.3f} ± {spread(times['eager']):.0f} %",
            ratio('eager'), ratio('compile'), ratio('Liger'), f"{rate / 1e12:.2f}", f"{100 * rate / ceiling:.0f} %",
            f"{memory['ours'] / max(memory['eager'], 1):.2f}", f"{waits['ours'] / waits['eager']:.2f}" if waits else '–']

HEAD = ['logits', 'dtype', 'ours, ms', 'eager, ms', 'ours / eager', '/ compile', '/ Liger', 'forward, TB/s', 'of a copy', 'peak memory, ours / eager', 'host and device, ours / eager']

def line(cells): return '| ' + ' | '.join(cells) + ' |'

def main(only=()):
    if not torch.cuda.is_available(): return print('gpu.py: skipped, since torch sees no CUDA device here')
    import triton
    room = torch.empty(2**28, dtype=torch.uint8, device='cuda')
    ceiling = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {date.today()}; a copy moves {ceiling / 1e12:.2f} TB/s; "
          f"Liger-Kernel {'is there' if find_spec('liger_kernel') else 'is not installed: skipped'}. Medians of {REPEATS}, ± half the quartile distance.\n")
    print(line(HEAD), line(['---'] * len(HEAD)), sep='\n')
    for shape in SHAPES:
        for dtype in DTYPES:
            if only and 'x'.join(map(str, shape)) not in only: continue
            try: print(line(row(shape, dtype, ceiling, room.zero_)), flush=True)
            except torch.OutOfMemoryError: print(line(['×'.join(map(str, shape)), str(dtype)[6:], 'does not fit'] + ['–'] * (len(HEAD) - 3)), flush=True)
            torch.compiler.reset()
            torch.cuda.empty_cache()

if __name__ == '__main__': main(sys.argv[1:])
