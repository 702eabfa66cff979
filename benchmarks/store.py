"""Bytes, seconds and memory of a record, against DuckDB over plain Parquet files and against dense NumPy arrays.

python benchmarks/store.py                        20,000 items × 9 epochs, a minute or two, without the memory of a fit
python benchmarks/store.py --full [--folder DIR]  1,281,167 items × 90 epochs, half an hour and some 12 GB in a temporary folder, two thirds of them the rivals'
python benchmarks/store.py --pool                 10,000,000 items × 10 epochs, by this process and by a pool of two: five minutes of CPU and 2 GB
"""
import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fastai_xent.record import XentRecord

N, EPOCHS, CLASSES, BS = 1_281_167, 90, 1000, 256
COLUMNS = ('loss', 'grad_norm', 'el2n', 'p_targ', 'margin', 'pred', 'targ', 'step', 'entropy')

def simulated(n: int, e: int, epochs: int, c: int = CLASSES) -> dict:
    "Rows of epoch `e` as a training might give them, items in folders of classes: from a quarter to nine tenths predicted right."
    fixed, rng, t = np.random.default_rng(0), np.random.default_rng(1 + e), .05 + .6 * (e + .5) / epochs
    targ, hard, likely = np.sort(fixed.integers(0, c, n)).astype(np.int32), fixed.normal(0, 2, n), fixed.integers(0, c, (c, 8))
    margin = (-2 + 8 * t - hard + rng.normal(0, 1.5, n)).astype(np.float32)
    rest = np.exp(rng.normal(-.3, .5, n))                                  # the other classes' weight beside the strongest
    loss = np.log1p(np.exp(-margin) * (1 + rest)).astype(np.float32)
    p, q = np.exp(-loss), -np.expm1(-loss.astype(float))
    el2n = (q * np.sqrt(1 + (1 + rest)**-1.5)).astype(np.float32)
    entropy = (loss * p + q * (np.log1p(rest) + .5 * rng.gamma(2, 1, n))).astype(np.float32)
    other = np.where(rng.random(n) < .7, likely[targ, np.minimum(rng.geometric(.4, n) - 1, 7)], rng.integers(0, c, n))
    order, step = rng.permutation(n), np.empty(n, dtype=np.int32)
    step[order] = e * -(-n // BS) + np.arange(n) // BS
    cols = dict(item=np.arange(n), loss=loss, grad_norm=el2n, el2n=el2n, p_targ=p.astype(np.float32), margin=margin, pred=np.where(margin < 0, other, targ).astype(np.int32),
                targ=targ, step=step, entropy=entropy)
    return {k: v[order] for k, v in cols.items()}

def size(path: Path) -> int: return sum(o.stat().st_size for o in Path(path).rglob('*') if o.is_file())

# -- each of these runs in a process of its own

def named(n): # A list of items as ImageNet's
    return pd.DataFrame({'item': np.arange(n), 'name': [f'n{i // 1300:08d}/n{i // 1300:08d}_{i * 7919 % 99991}.JPEG' for i in range(n)],
                         'source': pd.Series(np.arange(n), dtype='Int64')})

def write(folder, n, epochs):
    "The record, the plain files and the arrays, epoch by epoch."
    from fastai_xent.writer import XentWriter              # not above: a pool's workers read this file, and need no torch
    shutil.rmtree(folder / 'record', ignore_errors=True)
    writer, took = XentWriter(folder / 'record'), dict(rows=[], states=[], plain=[])
    def rows(e, cols):
        writer.write(0, e, 'train', dict(cols), fold=False)
        writer.wait()
    def states(): writer.record._cache.update(writer.record._segment('train'))
    writer.set_items('train', named(n), 'f')
    (folder / 'plain').mkdir(exist_ok=True)
    for e in range(epochs):
        cols = simulated(n, e, epochs)
        for what, do in (('rows', lambda: rows(e, cols)), ('states', states),
                         ('plain', lambda: pq.write_table(pa.table({**cols, 'epoch': np.full(n, e, np.int32)}), folder / f'plain/{e}.parquet'))):
            start = time.process_time()
            do()
            took[what].append(time.process_time() - start)
        at = np.argsort(cols['item'])
        for o in COLUMNS:
            path = folder / f'{o}.npy'
            out = np.lib.format.open_memmap(path, 'r+' if e else 'w+', None if e else cols[o].dtype, None if e else (epochs, n))
            out[e] = cols[o][at]
            del out
    writer.close()
    per = [size_of(o) for o in sorted((folder / 'record/rows').rglob('*.parquet'))]
    return dict(took={k: np.median(v) for k, v in took.items()}, epoch=np.mean(per), largest=max(per), states=size(folder / 'record/_running'), plain=size(folder / 'plain') / epochs,
                dense=sum(size_of(folder / f'{o}.npy') for o in COLUMNS) / epochs)

def size_of(path): return path.stat().st_size

def timed(ask, repeats=5):
    "Seconds of the first call, and the median of further ones; seconds of all cores for one."
    took, cpu = [], []
    for _ in range(repeats + 1):
        start, busy = time.perf_counter(), time.process_time()
        res = ask()
        took.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    return dict(first=took[0], again=float(np.median(took[1:])), cpu=float(np.median(cpu[1:])), said=repr(res)[:2000])

SQL = 'select targ, avg(loss) loss, avg(p_targ) p, sum((pred = targ)::int) n from {} group by targ order by targ'
def opening(folder, n, epochs): return timed(lambda: XentRecord(folder / 'record'))
def top(folder, n, epochs):
    record = XentRecord(folder / 'record')
    return timed(lambda: record.top(100))
def item(folder, n, epochs):
    record, i = XentRecord(folder / 'record'), iter(np.random.default_rng(0).integers(0, n, 99))
    return timed(lambda: record.item(int(next(i))))
def sql(folder, n, epochs):
    record = XentRecord(folder / 'record')
    return timed(lambda: record.sql(SQL.format('record')), repeats=2)
def scores(folder, n, epochs):
    record = XentRecord(folder / 'record')
    return timed(lambda: record.scores(), repeats=1)
def recompute(folder, n, epochs):
    shutil.rmtree(folder / 'record/_running')
    record = XentRecord(folder / 'record')
    return dict(timed(lambda: record.top(100), repeats=1), cpu_all=time.process_time())
def compact(folder, n, epochs):
    shutil.rmtree(folder / 'compact', ignore_errors=True)
    shutil.copytree(folder / 'record', folder / 'compact')
    record = XentRecord(folder / 'compact')
    start, old = time.perf_counter(), record.item(5)
    record.compact()
    took = time.perf_counter() - start
    pd.testing.assert_frame_equal(record.item(5), old)
    return dict(first=took, cpu=time.process_time(), size=size(folder / 'compact/rows'), item=timed(lambda: record.item(n // 3)), top=timed(lambda: record.top(100)), sql=timed(lambda: record.sql(SQL.format('record')), repeats=1))

def plain(folder): return f"'{folder}/plain/*.parquet'"
def duckdb_top(folder, n, epochs):
    q = f'select item, avg(ln(1 + exp(-margin::double))) s from {plain(folder)} group by item order by s desc limit 100'
    return timed(lambda: duckdb.sql(q).df(), repeats=2)
def duckdb_item(folder, n, epochs): return timed(lambda: duckdb.sql(f'select * from {plain(folder)} where item = {n // 3} order by epoch').df())
def duckdb_sql(folder, n, epochs): return timed(lambda: duckdb.sql(SQL.format(plain(folder))).df(), repeats=2)
def numpy_top(folder, n, epochs):
    def ask():
        s = np.logaddexp(0, -np.load(folder / 'margin.npy').astype(np.float64)).mean(0)
        return np.argsort(-s)[:100]
    return timed(ask, repeats=1)
def numpy_item(folder, n, epochs): return timed(lambda: pd.DataFrame({o: np.load(folder / f'{o}.npy', mmap_mode='r')[:, n // 3] for o in COLUMNS}))
def numpy_sql(folder, n, epochs):
    def ask():
        a = {o: np.load(folder / f'{o}.npy', mmap_mode='r') for o in COLUMNS}
        res = np.zeros((4, CLASSES))
        for e in range(epochs):
            for j, v in enumerate((a['loss'][e], a['p_targ'][e], a['pred'][e] == a['targ'][e], np.ones(n))): res[j] += np.bincount(a['targ'][e], v, minlength=CLASSES)
        return res[:2] / res[3]
    return timed(ask, repeats=1)

def write_rows(folder, n, epochs):
    "The record alone. All its epochs have the same rows: making them up takes longer than all the rest."
    from fastai_xent.writer import XentWriter
    took, cols = [], simulated(n, epochs // 2, epochs)
    with XentWriter(folder / 'record', overwrite=True) as writer:
        writer.set_items('train', named(n), 'f')
        for e in range(epochs):
            start = time.process_time()
            writer.write(0, e, 'train', dict(cols), fold=False)
            writer.wait()
            took.append(time.process_time() - start)
    return dict(took=np.median(took), epoch=size(folder / 'record/rows') / epochs)

def by_pool(folder, n, epochs, workers):
    "The first score: seconds, CPU seconds of this process and of its workers, a checksum of the states."
    shutil.rmtree(folder / 'record/_running', ignore_errors=True)
    record = XentRecord(folder / 'record')
    start, busy = time.perf_counter(), time.process_time()
    with ProcessPoolExecutor(workers, get_context('spawn')) if workers else nullcontext() as pool: record.score(executor=pool)
    took, busy, kids = time.perf_counter() - start, time.process_time() - busy, resource.getrusage(resource.RUSAGE_CHILDREN)
    states = (folder / 'record/_running/train-0.pq').read_bytes()
    return dict(took=took, cpu=busy, kids=kids.ru_utime + kids.ru_stime, states=len(states), crc=zlib.crc32(states), load=os.getloadavg()[0])
def pool_0(folder, n, epochs): return by_pool(folder, n, epochs, 0)
def pool_2(folder, n, epochs): return by_pool(folder, n, epochs, 2)
def issues(folder, n, epochs):
    record, busy = XentRecord(folder / 'record'), time.process_time()
    n = len(record.label_issues(noise_rate=.1))            # once: nothing of it is kept
    return dict(cpu=time.process_time() - busy, n=n)

def training(folder, n, epochs, record, fits):
    "A Learner whose dataset and model need next to nothing, for `fits` epochs."
    import fastai.callback.progress  # noqa: F401  no_bar
    import torch
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    from fastai_xent.all import XentLossFlat, XentRecorder
    torch.set_num_threads(1)
    class Items(torch.utils.data.Dataset):
        def __len__(self): return n
        def __getitem__(self, i): return i
    def collate(b):
        b = torch.tensor(b)
        return (b % 17).float()[:, None] / 17, b % 10
    dl = torch.utils.data.DataLoader(Items(), batch_size=1024, shuffle=True, collate_fn=collate)
    valid = torch.utils.data.DataLoader(torch.utils.data.Subset(Items(), range(1000)), batch_size=1000, collate_fn=collate)
    cbs = [XentRecorder(folder / f'fit-{fits}', overwrite=True)] if record else []
    learn = Learner(DataLoaders(dl, valid, device='cpu'), torch.nn.Linear(1, 10), loss_func=XentLossFlat(), cbs=cbs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with learn.no_bar(), learn.no_logging(): learn.fit(fits)
    return dict(before=before * 1024, said=repr(cbs[0].record) if cbs else '')
def train_off(folder, n, epochs): return training(folder, n, epochs, False, 1)
def train_1(folder, n, epochs): return training(folder, n, epochs, True, 1)
def train_4(folder, n, epochs): return training(folder, n, epochs, True, 4)

# -- the table

def child(name, a, items=None) -> dict:
    res = subprocess.run([sys.executable, __file__, '--child', name, '--folder', str(a.folder), '--items', str(items or a.items), '--epochs', str(a.epochs)], capture_output=True, text=True)
    if res.returncode: raise SystemExit(f'{name} failed:\n{res.stderr[-3000:]}')
    return json.loads(res.stdout.split('RESULT')[1])

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--full', action='store_true', help=f'{N:,} items, {EPOCHS} epochs')
    p.add_argument('--pool', action='store_true', help='10,000,000 items, 10 epochs, by a pool of processes')
    p.add_argument('--items', type=int)
    p.add_argument('--epochs', type=int)
    p.add_argument('--folder', type=Path)
    p.add_argument('--keep', action='store_true', help='use what an earlier run with --folder has written')
    p.add_argument('--child')
    a = p.parse_args()
    if a.pool: a.items, a.epochs = a.items or 10**7, a.epochs or 10
    a.items, a.epochs = a.items or (N if a.full else 20_000), a.epochs or (EPOCHS if a.full else 9)
    if a.child:
        res = globals()[a.child](a.folder, a.items, a.epochs)
        print('RESULT' + json.dumps({**res, 'rss': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}, default=float))
        return
    with tempfile.TemporaryDirectory() as tmp:
        a.folder = a.folder or Path(tmp)
        a.folder.mkdir(parents=True, exist_ok=True)
        pool_table(a) if a.pool else table(a)

def pool_table(a):
    print(f'\n## A record of {a.items:,} items × {a.epochs} epochs\n')
    w = child('write_rows', a)
    print(f"An epoch: {w['epoch'] / 1e6:,.1f} MB, written in {w['took']:.1f} CPU s; largest memory of that process {w['rss'] / 1e6:,.0f} MB.\n")
    print('| first score | seconds | CPU s of this process | of its workers | memory of this process | load |\n|---|---|---|---|---|---|', flush=True)
    found = {}
    for name, who in (('pool_0', 'this process'), ('pool_2', 'a pool of two')):
        r = found[name] = child(name, a)
        print(f"| {who} | {r['took']:.1f} | {r['cpu']:.1f} | {r['kids']:.1f} | {r['rss'] / 1e6:,.0f} MB | {r['load']:.0f} |", flush=True)
    same = found['pool_0']['crc'] == found['pool_2']['crc']
    print(f"\nThe states: {r['states'] / 1e6:,.0f} MB, {'the same bytes' if same else 'NOT THE SAME BYTES'}.")
    r = child('issues', a)
    print(f"`label_issues(noise_rate=.1)` then: {r['cpu']:.1f} CPU s, {r['rss'] / 1e6:,.0f} MB.")

def table(a):
    n, mb = a.items, lambda b: f'{b / 1e6:,.1f} MB'
    s = lambda r: f"{r['again']:.3f} s (first {r['first']:.3f}, CPU {r['cpu']:.3f})"
    rss = lambda r: f"{r['rss'] / 1e6:,.0f} MB"
    print(f'\n## A record of {n:,} items × {a.epochs} epochs\n')
    kept = a.folder / 'written.json'
    w = json.loads(kept.read_text()) if a.keep and kept.exists() else child('write', a)
    kept.write_text(json.dumps(w))
    print('| what | fastai_xent | plain Parquet, DuckDB | dense NumPy | goal |\n|---|---|---|---|---|', flush=True)
    print(f"| an epoch on disk, mean (largest) | {mb(w['epoch'])} ({mb(w['largest'])}) | {mb(w['plain'])} | {mb(w['dense'])} | ≤ 15 MB |")
    print(f"| running states of all scores, an item | {w['states'] / n:.0f} bytes | – | – | |")
    print(f"| CPU seconds an epoch: rows, states | {w['took']['rows']:.2f} s + {w['took']['states']:.2f} s | {w['took']['plain']:.2f} s | – | |", flush=True)
    print(f"| open a run | {s(child('opening', a))} | – | – | ≤ 0.1 s |", flush=True)
    for what, name, goal in (('the 100 largest margin losses', 'top', '≤ 0.5 s'), ("one item's history", 'item', '≤ 0.2 s'), ('four aggregates of all rows by class', 'sql', '≤ 10 s')):
        rs = [child(o + name, a) for o in ('', 'duckdb_', 'numpy_')]
        print(f"| {what} | {' | '.join(s(r) + ', ' + rss(r) for r in rs)} | {goal} |", flush=True)
    r = child('scores', a)
    print(f"| `scores()`, a frame of all items | {s(r)}, {rss(r)} | – | – | |", flush=True)
    r = child('recompute', a)
    print(f"| all states from all epochs | {r['first']:.1f} s (CPU {r['cpu_all']:.1f}), {rss(r)} | – | – | |", flush=True)
    r = child('compact', a)
    print(f"| `compact()` | {r['first']:.1f} s (CPU {r['cpu']:.1f}), {rss(r)}, {mb(r['size'] / a.epochs)} an epoch | – | – | |")
    print(f"| then: top, item, aggregates | {s(r['top'])}, {s(r['item'])}, {s(r['sql'])} | – | – | |", flush=True)
    if n < 500_000: print('| peak memory of a fit with the recorder | skipped: so few items are lost beside what the libraries take; give `--full` | – | – | ≤ 64 bytes an item |')
    else:
        more = {}
        for m in (n, n // 2):                             # the difference of two sizes is free of what the libraries take
            off = child('train_off', a, m)['rss']
            more[m] = {k: child(f'train_{k}', a, m)['rss'] - off for k in (1, 4)}
        an_item = [(more[n][k] - more[n // 2][k]) / (n - n // 2) for k in (1, 4)]
        print(f"| peak memory of a fit with the recorder, less without, for each item more: 1 epoch, 4 epochs | {an_item[0]:.0f}, {an_item[1]:.0f} bytes; besides {mb(more[n][4] - n * an_item[1])} | – | – | ≤ 64 bytes |")
    cpu = next((o.split(':')[1].strip() for o in Path('/proc/cpuinfo').read_text().splitlines() if o.startswith('model name')), platform.processor()) if Path('/proc/cpuinfo').exists() else platform.processor()
    print(f"\nMedian of repeats in one process (its first call, and seconds of all cores together), files in the page cache, largest memory of that process. {cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"pyarrow {pa.__version__}, DuckDB {duckdb.__version__}, NumPy {np.__version__}, pandas {pd.__version__}.")

if __name__ == '__main__': main()
