"""A report of deaths and other faults: `kill -9` at random instants of a fit and of `compact`, full and forbidden places, torn and foreign files.

python benchmarks/faults.py [--kills 200]
"""
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))

import numpy as np
import pandas as pd
import torch
from helpers import learner

from fastai_xent.recorder import XentRecorder
from fastai_xent.epochs import Compact
from fastai_xent.record import XentRecord
from fastai_xent.writer import XentWriter

torch.set_num_threads(1)
ITEMS, EPOCHS = 600, 4

def fit(path, resume=False):
    "Two fits of two epochs, or one epoch more."
    learn = learner([XentRecorder(path, resume=resume)], n=ITEMS, bs=50)
    learn.fit(1 if resume else 2)
    if not resume: learn.fit(2)

def fork(do, *args, delay=None, **kw) -> tuple: # How it ended (a signal's number, 0, or −1), and after how many seconds
    "Run in a process of its own, and kill that after `delay` seconds."
    sys.stdout.flush()
    pid, start = os.fork(), time.perf_counter()
    if pid == 0:
        code = 1
        try: do(*args, **kw); code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)), time.perf_counter() - start

def same(record, want) -> str:
    "Nothing, or how the epochs of `record` differ from those of a run that lived."
    if not set(record.epochs) <= set(want.epochs): return 'there are epochs that were not trained'
    if sorted(record.epochs, key=lambda k: (k[2], k[1])) != sorted(want.epochs, key=lambda k: (k[2], k[1]))[:len(record.epochs)]: return 'an epoch is missing before the last one'
    for k in record.epochs:
        if not record.to_df(k[1], k[2]).equals(want.to_df(k[1], k[2])): return f'epoch {k} has other rows'
    for split in record.meta['splits']:
        kept, anew = record.scores(split), fresh(record).scores(split)
        if not kept.equals(anew): return f'the running scores of {split} are not those of its epochs'
        record.top(split=split), record.item(0, split), repr(record)
    return ''

def fresh(record):
    "The same epochs in memory, without states."
    writer = XentWriter()
    for split, d in record.meta['splits'].items():
        for start, k in d['starts']: writer.set_items(split, record.items(split, k), d['segments'][k]['fingerprint'], record.vocab, start, record._n_classes)
    for fit, split, epoch in record.epochs:
        df = record.to_df(split, epoch).drop(columns=['fit', 'epoch', 'split'])
        padding = (df.pop('occurrence') < 0).to_numpy()
        none = dict(pred=-1, targ=-100, partner=-1, n_pos=None, step=None)
        cols = {o: None if v.isna().all() and o not in ('pred', 'targ') else v.to_numpy(np.float64, na_value=none.get(o) if none.get(o) is not None else np.nan) for o, v in df.items()}
        writer.write(fit, epoch, split, {**cols, 'padding': padding}, fold=False)
    return writer.record

def kills(where: Path, n: int) -> str:
    "Kill fits at random instants; look at what is left; go on with it."
    fit(None)                                         # what is imported at first use is imported before anything is forked, so that most kills hit a fit at work
    fork(fit, where / 'warm')
    took = min(fork(fit, where / f'whole{i}')[1] for i in range(3))
    want, rng, count, left = XentRecord(where / 'whole0'), random.Random(0), Counter(), Counter()
    while count['killed'] < n:
        path = where / f'run {count["tried"]} ü'
        count['tried'] += 1
        if fork(fit, path, delay=rng.uniform(0, 1.05 * took))[0] != signal.SIGKILL:
            shutil.rmtree(path)
            continue
        count['killed'] += 1
        before = []
        if (path / '_record.json').exists():
            record = XentRecord(path)
            before = record.epochs
            bad = same(record, want)
            if bad: raise SystemExit(f'kill {count["killed"]}: {bad}; see {path}')
            count['unfinished files'] += sum(1 for o in path.rglob('*.tmp'))
        elif path.exists() and [*path.rglob('*.parquet')]: raise SystemExit(f'{path} has epochs and no _record.json')
        left[len(before)] += 1
        if fork(fit, path, resume=True)[0] != 0: raise SystemExit(f'{path} could not be resumed')
        after = XentRecord(path)
        new = [k for k in after.epochs if k not in before]
        if not set(before) <= set(after.epochs) or [k[1] for k in new] != ['train', 'valid']: raise SystemExit(f'{path} did not go on: {before}, {after.epochs}')
        for k in before: assert after.to_df(k[1], k[2]).equals(want.to_df(k[1], k[2]))
        shutil.rmtree(path)
    return (f"{count['killed']} fits killed in {count['tried']} tries, at instants spread over {took:.2f} s. Finished passes left (of {2 * EPOCHS}): "
            + ', '.join(f'{k}: {v}' for k, v in sorted(left.items())) + f". Every one readable, with the rows and scores of a run that lived; all {count['killed']} went on. "
            f"Unfinished files left under names that no reader looks for: {count['unfinished files']}")

def compact_kills(where: Path, n: int) -> str:
    fork(fit, where / 'old')
    want, killed, states = XentRecord(where / 'old'), 0, Counter()
    rows, scores = want.to_df(), want.scores()
    shutil.copytree(where / 'old', where / 'try')
    took, rng = fork(lambda: XentRecord(where / 'try').compact())[1], random.Random(1)
    while killed < n:
        shutil.rmtree(where / 'try')
        shutil.copytree(where / 'old', where / 'try')
        if fork(lambda: XentRecord(where / 'try').compact(), delay=rng.uniform(0, took))[0] != signal.SIGKILL: continue
        killed += 1
        record = XentRecord(where / 'try')
        states[sum(isinstance(o, Compact) for o in record._found().values())] += 1
        assert record.to_df().equals(rows) and record.scores().equals(scores)
        record.compact()
        assert XentRecord(where / 'try').to_df().equals(rows) and not record._epochs.parts()
    return f"{n} calls of compact() killed; passes that were compact then: {', '.join(f'{k}: {v}' for k, v in sorted(states.items()))}. All answers stayed, and another call completed each"

def told(do) -> list:
    "What a fit says."
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        do()
    return [str(o.message) for o in got if 'Xent' in str(o.message)]

def told_by(path, prepare) -> str:
    "In a process of its own: prepare, train three epochs on `path`; the weights must be those of a training alone. What was said, in short."
    r, w = os.pipe()
    def do():
        plain = learner([], n=ITEMS, bs=50)
        plain.fit(3)
        prepare()
        try: recorder = XentRecorder(path)
        except OSError as e:                              # found before anything is trained
            os.write(w, f'refused at construction: {e}'.encode()[:4000])
            return
        learn = learner([recorder], n=ITEMS, bs=50)
        said = told(lambda: learn.fit(3))
        assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), learn.model.parameters())), 'other weights'
        words = [o.strip().splitlines()[-1] for o in said]
        os.write(w, '; '.join(words)[:4000].encode())
    code = fork(do)[0]
    os.close(w)
    said = os.read(r, 5000).decode()
    os.close(r)
    assert code == 0, f'the training ended with {code}'
    return said

def whole(path) -> str:
    "How many passes can be read, with all their rows."
    try: record = XentRecord(path)
    except FileNotFoundError: return 'nothing was finished'
    for k in record.epochs: assert len(record.to_df(k[1], k[2])) in (ITEMS, ITEMS // 2)
    for split in record.meta['splits']: record.scores(split)
    return f'{len(record.epochs)} of 6 passes are there, whole'

def limited(kb):
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kb * 1024, kb * 1024))

def nobody(): os.setgid(65534), os.setuid(65534)

def mounted(place: Path, options: str):
    place.mkdir()
    return subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(place)], capture_output=True).returncode == 0

def faults(where: Path):
    "(fault, what was said, what is there)"
    for kb in (4, 14, 24):
        path = where / f'limit {kb}'
        yield f'no file may be larger than {kb} kB', told_by(path, lambda: limited(kb)), whole(path)
    for size in (32, 100):
        place = where / f'disk {size}'
        if mounted(place, f'size={size}k'):
            try: yield f'a disk of {size} kB', told_by(place / 'r', lambda: None), whole(place / 'r')
            finally: subprocess.run(['umount', str(place)])
        else: yield f'a disk of {size} kB', 'skipped: no right to mount', ''
    place = where / 'read-only'
    if mounted(place, 'ro'):
        try: yield 'a read-only file system', told_by(place / 'r', lambda: None), whole(place / 'r')
        finally: subprocess.run(['umount', str(place)])
    else: yield 'a read-only file system', 'skipped: no right to mount', ''
    if os.name == 'posix' and os.getuid() == 0:
        place = where / 'forbidden'
        place.mkdir(mode=0o700)
        os.chmod(where, 0o755)
        yield 'permission denied', told_by(place / 'r', nobody), whole(place / 'r')
    (where / 'file').write_text('mine')
    yield 'a file in the way', told_by(where / 'file/r', lambda: None), ''

    fork(fit, where / 'sick')
    record = XentRecord(where / 'sick')
    rows = record.to_df()
    for name, what in (('_running/train-0.pq', 'torn running scores'), ('rows/train/fit-0-epoch-001-part-0.parquet', 'a torn epoch')):
        path = where / what
        shutil.copytree(where / 'sick', path)
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:len(data) // 2])
        said = told(lambda: fit(path, resume=True))
        after = XentRecord(path)
        others = [k for k in record.epochs if k != (0, 'train', 1) or not name.startswith('rows')]
        for k in others:
            pd.testing.assert_frame_equal(after.to_df(k[1], k[2]).drop(columns='split'), rows[(rows.split == k[1]) & (rows.epoch == k[2])].reset_index(drop=True).drop(columns='split'))
        try: asked = f'{len(after.scores())} items have scores'
        except OSError as e: asked = str(e).replace(str(where), '…')
        yield what, '; '.join(said).replace(str(where), '…') or 'nothing', f'{len(others)} old passes can be read; scores(): {asked}'
    path = where / 'foreign'
    shutil.copytree(where / 'sick', path)
    for o in ('notes.txt', 'rows/part-0.parquet', 'rows/train/copy.parquet', '_running/other.parquet', 'rows/mine/compact.parquet'):
        (path / o).parent.mkdir(parents=True, exist_ok=True)
        (path / o).write_bytes(b'PAR1 and then nothing')
    said = told(lambda: fit(path, resume=True))
    yield 'foreign files', '; '.join(said) or 'nothing', f'{len(XentRecord(path).epochs)} of {2 * EPOCHS + 2} passes, the files are left alone: {(path / "notes.txt").exists()}'
    first, second = XentRecorder(where / 'two'), learner([XentRecorder(where / 'two')], n=ITEMS, bs=50)
    second.fit(1)
    said = told(lambda: learner([first], n=ITEMS, bs=50).fit(1))
    yield 'two recorders that began on one path', '; '.join(said).replace(str(where), '…'), f'{len(XentRecord(where / "two").epochs)} passes of the other one'
    real = time.time
    try:
        time.time = lambda: real() - 1e9
        said = told(lambda: fit(where / 'sick', resume=True))
        for o in (where / 'sick').rglob('*'): os.utime(o, (1, 1))
    finally: time.time = real
    record = XentRecord(where / 'sick')
    pd.testing.assert_frame_equal(record.scores(), fresh(record).scores())
    yield 'a clock that jumps back by thirty years, and files of 1970', '; '.join(said) or 'nothing', f'{len(record.epochs)} passes in the order of training, scores as computed anew'

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--kills', type=int, default=200)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        where = Path(tmp)
        warnings.simplefilter('ignore')
        print('## Deaths\n', flush=True)
        print(kills(where, a.kills), flush=True)
        print('\n' + compact_kills(where, max(1, a.kills // 5)), flush=True)
        print('\n## Other faults\n\nEach training ends, with the weights of a training without a recorder.\n\n| fault | the message ends with | the record |\n|---|---|---|', flush=True)
        for o in faults(where): print('| ' + ' | '.join(x.replace('|', '\\|').replace('\n', ' ').replace(tmp, '…')[:300] for x in o) + ' |', flush=True)

if __name__ == '__main__': main()
