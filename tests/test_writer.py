"The writer under faults: a full disk, a place that cannot be, strangers in the directory, and death at any instant."
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Truth, at_most, ended, learner, same_bits, same_rows, warned
from runs import RUN, expected, fill, put, rows, same_frame

import fastai_xent
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.writer import RecordReplaced, XentWriter

@pytest.fixture(autouse=True)
def guard():
    with at_most(900): yield


# -- what lies there already

NAMES = ['plain', 'with space', 'rün 日本', '[1]', 'a*b?', "it's", 'say "so"', 'a=b', 'epoch=3', '100%', '%20', '#1', 'a::b', '~', '$HOME', 'semi;colon', '.hidden', '_private', 'a,b', '{x}', 'back\\slash']

@pytest.mark.parametrize('name', NAMES)
def test_names_of_directories(name, tmp_path):
    path = tmp_path / name / 'r'
    record = fill(path, RUN)
    assert (path / '_record.json').is_file() and sorted(o.name for o in tmp_path.iterdir()) == [name]
    for o in (record, XentRecord(path), XentRecord(str(path))):
        same_frame(o.to_df(), expected(RUN))
        assert len(o.item(1)) == 6 and len(o.top(3)) and o.sql('select count(*) n from record').n[0] == 24
        assert name in repr(o)
    XentWriter(path, overwrite=True)
    assert not (path / '_record.json').exists()
    same = learner([XentRecorder(path)], n=20)
    same.fit(1)
    assert XentRecord(path).n_epochs == 1

def test_without_record_json(tmp_path):
    path = tmp_path / 'r'
    fill(path, RUN)
    before = {p: p.read_bytes() for p in path.rglob('*') if p.is_file() and p.name != '_record.json'}
    (path / '_record.json').unlink()
    with pytest.raises(FileNotFoundError, match='not a record'): XentRecord(path)
    for kw in ({}, dict(resume=True)):
        with pytest.raises(FileExistsError): XentRecorder(path, **kw)
    assert {p: p.read_bytes() for p in path.rglob('*') if p.is_file()} == before

def test_strangers_in_the_directory(tmp_path):
    "Torn files of a dead process and files of other people are passed over, and survive."
    path = tmp_path / 'r'
    record = fill(path, RUN)
    strange = ['notes.txt', 'rows/README', 'rows/.DS_Store', 'rows/train/.DS_Store', 'rows/train/.fit-0-epoch-000-part-0.parquet.99.tmp', 'rows/train/.fit-0-epoch-009-part-0.parquet.99.tmp',
               'rows/train/thumbs.db', 'rows/train/fit-x-epoch-000-part-0.parquet', '_items/.train-0.pq.99.tmp', '._record.json.99.tmp', 'picture.parquet']
    for o in strange:
        (path / o).parent.mkdir(parents=True, exist_ok=True)
        (path / o).write_bytes(b'PAR1 and then nothing')
    for o in (record, XentRecord(path)):
        same_frame(o.to_df(), expected(RUN))
        assert o.n_epochs == 3 and len(o.top(2)) == 2 and o.sql('select count(*) n from record').n[0] == 24
    rec = XentRecorder(path, resume=True)
    assert rec.record.n_epochs == 3
    XentWriter(path, overwrite=True)
    assert (path / 'notes.txt').exists() and (path / 'picture.parquet').exists() and not (path / 'rows').exists()


# -- a disk that will not

def failing(k, real, ex):
    "`real`, which raises from its call number `k` on."
    calls, said = [], ex.args
    def f(*args, **kw):
        calls.append(args)
        if len(calls) > k: raise type(ex)(*said)      # a new one each time: fastai writes into those that pass it
        return real(*args, **kw)
    return f, calls

@pytest.mark.parametrize('what', ['replace', 'fsync'])
@pytest.mark.parametrize('k', [0, 1, 2, 5, 7])
def test_disk_full(k, what, tmp_path, monkeypatch):
    "The training does not notice; it is told; what is there is whole; and when there is room again it goes on."
    plain = learner(n=20)
    plain.fit(3)
    ended(plain)
    path, truth = tmp_path / 'r', Truth()
    rec = XentRecorder(path, precision='full')
    learn = learner([truth, rec], n=20)
    with warned() as said, monkeypatch.context() as m:
        f, calls = failing(k, getattr(os, what), OSError(28, 'No space left on device'))
        m.setattr(os, what, f)
        learn.fit(3)
        ended(learn)
    assert len(calls) > k
    assert 1 <= len(said) <= 3 and all('No space left' in o for o in said), said     # rows, or running scores and then rows
    same_bits(plain.end, learn.end)
    assert not [p for p in tmp_path.rglob('*.tmp')]
    try: check_whole(XentRecord(path), truth)
    except FileNotFoundError as e: assert 'not a record' in str(e)
    with warned() as said: learn.fit(1)
    assert not said, said
    check_whole(XentRecord(path), truth)
    last = XentRecord(path)._n_fits - 1
    assert [k for k in XentRecord(path).epochs if k[0] == last] == [(last, s, XentRecord(path).n_epochs - 1) for s in ('train', 'valid')]

def check_whole(record, truth):
    "Each epoch that is there is one that was trained, with all its rows; any may be missing."
    for split in record.meta['splits']: record.items(split), record.score(split=split), record.top(split=split)
    for fit, split, epoch in record.epochs:
        df = record.to_df(split, epoch)
        assert len(df) == (20 if split == 'train' else 10)
        for p in truth.passes:
            if p['split'] != split: continue
            try:
                same_rows(df, p)
                break
            except AssertionError: pass
        else: raise AssertionError(f"{fit, split, epoch} is no epoch that was trained")
    return repr(record)

def test_a_place_that_is_spoiled_later(tmp_path):
    "It could be written to when it was named. The training does not notice, and somebody is told."
    plain = learner(n=20)
    plain.fit(2)
    ended(plain)
    rec = XentRecorder(tmp_path / 'file/r')
    (tmp_path / 'file').write_text('mine')
    learn = learner([rec], n=20)
    with warned() as said: learn.fit(2)
    ended(learn)
    assert len(said) == 1 and 'Traceback' in said[0], said
    same_bits(plain.end, learn.end)


# -- death

SCRIPT = '''
import json, os, random, shutil, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from helpers import learner
from fastai_xent.recorder import XentRecorder

def child(path, at=None, resume=False, ready=None):
    "Train; die at call number `at` of os.replace or os.fsync, if told so: before it, or after it."
    if at is not None:
        what, k, after = at
        real, calls = getattr(os, what), []
        def deadly(*args):
            calls.append(1)
            if len(calls) == k and not after: os.kill(os.getpid(), signal.SIGKILL)
            res = real(*args)
            if len(calls) == k: os.kill(os.getpid(), signal.SIGKILL)
            return res
        setattr(os, what, deadly)
    import warnings
    warnings.simplefilter('error', UserWarning)
    learn = learner([XentRecorder(path, resume=resume)], n=20)
    if ready is not None: os.write(ready, b'x')
    learn.fit(1 if resume else 2)
    if not resume: learn.fit(2)

def fork(*args, delay=None, **kw):
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try: child(*args, **kw, ready=w); code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally: os._exit(code)
    os.close(w)
    start = os.read(r, 1)
    os.close(r)
    t = time.perf_counter()
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), time.perf_counter() - t

where, step, out = sys.argv[2], int(sys.argv[3]), {}
learner([XentRecorder(f'{where}/warm')], n=20).fit(1)    # what is done once a process is done before the forks
out['whole'] = fork(f'{where}/whole')
took = min(fork(f'{where}/whole{k}')[1] for k in range(3))
rng, random_kills = random.Random(0), 0

def die(**kw):
    i = len(out)
    path = f'{where}/{i}'
    ended = fork(path, **kw)[0]
    if os.path.exists(path): shutil.copytree(path, path + '-dead')
    out[str(i)] = (kw, ended, fork(path, resume=True)[0])
    return ended == signal.SIGKILL

places = [('replace', k, False) for k in range(1, 13)] + [('replace', k, True) for k in (1, 2, 3, 5, 8)] + [('fsync', k, False) for k in (1, 3, 7)]
for what, k, after in places[::step]: die(at=(what, k, after))
for _ in range(40):
    random_kills += die(delay=rng.uniform(0, took))
    if random_kills == 16 // step: break
print('RESULT' + json.dumps(out))
'''

@pytest.fixture(scope='module', params=[4, pytest.param(1, marks=pytest.mark.slow)], ids=['some', 'all'])
def deaths(tmp_path_factory, request):
    where = tmp_path_factory.mktemp('deaths')
    (where / 'script.py').write_text(SCRIPT)
    res = subprocess.run([sys.executable, str(where / 'script.py'), str(Path(__file__).parent), str(where), str(request.param)], capture_output=True, text=True, timeout=800,
                         env={**os.environ, 'PYTHONPATH': str(Path(fastai_xent.__file__).parents[1])})
    assert res.returncode == 0, res.stderr[-3000:]
    return where, json.loads(res.stdout.split('RESULT')[1]), res.stderr, request.param

def test_the_deaths_are_real(deaths):
    where, out, _, step = deaths
    assert out['whole'][0] == 0
    killed = [v for k, v in out.items() if k != 'whole' and v[1] == 9]
    assert len([v for v in killed if 'delay' in v[0]]) >= 15 // step and len(killed) >= 30 // step, len(killed)
    left = {len(XentRecord(where / f'{k}-dead').epochs) for k in out if (where / f'{k}-dead' / '_record.json').exists()}
    assert len(left) >= 6 - step, "the kills do not fall into different phases of the run"

def test_what_a_death_leaves_is_whole(deaths):
    "Each epoch is there with all its rows and the values of a run that lived, or it is not there."
    where, out, *_ = deaths
    want = XentRecord(where / 'whole')
    assert len(want.epochs) == 8
    for k, v in out.items():
        path = where / f'{k}-dead'
        if k == 'whole' or not path.exists(): continue
        try: record = XentRecord(path)
        except FileNotFoundError as e:
            assert 'not a record' in str(e) and not list(path.rglob('*.parquet'))
            continue
        assert set(record.epochs) <= set(want.epochs), (k, v)
        assert record.epochs == want.epochs[:len(record.epochs)] or set(record.epochs) == set(sorted(want.epochs, key=lambda o: (o[2], o[1]))[:len(record.epochs)])
        for key in record.epochs: pd.testing.assert_frame_equal(record.to_df(key[1], key[2]), want.to_df(key[1], key[2]))
        for split in record.meta['splits']:
            pd.testing.assert_frame_equal(record.items(split), want.items(split))
            record.top(split=split), record.score(split=split)
        repr(record), record.sql('select count(*) from record join items using (split, item)')

def test_after_a_death_it_goes_on(deaths):
    where, out, stderr, _ = deaths
    want = XentRecord(where / 'whole')
    for k, v in out.items():
        if k == 'whole': continue
        assert v[2] == 0, (k, v, stderr[-2500:])
        record = XentRecord(where / k)
        dead = XentRecord(where / f'{k}-dead').epochs if (where / f'{k}-dead' / '_record.json').exists() else []
        new = [o for o in record.epochs if o not in dead]
        assert set(dead) <= set(record.epochs) and [o[1] for o in new] == ['train', 'valid'], (k, v)
        assert new[0][2] == new[1][2] == max([o[2] + 1 for o in dead], default=0) and new[0][0] == max([o[0] + 1 for o in dead], default=0)
        for key in dead: pd.testing.assert_frame_equal(record.to_df(key[1], key[2]), want.to_df(key[1], key[2]))
        for key in new:
            got, first = record.to_df(key[1], key[2]), want.to_df(key[1], 0)          # the same seed: the same first epoch
            pd.testing.assert_frame_equal(got.drop(columns=['fit', 'epoch']), first.drop(columns=['fit', 'epoch']))
        assert len(record.score()) == 20 and not np.isnan(record.score()).any()

@pytest.mark.parametrize('epoch', [1., -1, True, np.float32(2), np.int64(-3), torch.tensor(1), None, '1', 2**31], ids=repr)
def test_an_epoch_that_is_no_whole_number(epoch):
    "It is refused when it comes, and nothing of it stays behind."
    writer = XentWriter(items=4)
    batch = dict(split='train', item=torch.arange(4), pred=torch.zeros(4, 3), targ=torch.zeros(4, dtype=torch.long))
    writer.add(epoch=0, **batch)
    with pytest.raises(ValueError, match='expected a whole number, 0 or more'): writer.add(epoch=epoch, **batch)
    for e in (np.int64(1), np.uint8(2), 3): writer.add(epoch=e, **batch)
    writer.close()
    assert writer.record.to_df('train').groupby('epoch').size().to_dict() == {e: 4 for e in range(4)}

@pytest.mark.parametrize('first', [0, 1])
def test_of_a_writer_and_its_copy_the_first_that_writes_goes_on(first, tmp_path):
    writer = XentWriter(fill(tmp_path/'r', RUN).path, resume=True)
    both = [writer, pickle.loads(pickle.dumps(writer))]
    put(both[first], 2, 3, 'train', rows([0, 1]))
    both[first].close()
    with pytest.raises(RecordReplaced, match='the first that writes goes on'): put(both[1 - first], 2, 3, 'train', rows([2, 3]))
    assert XentRecord(tmp_path/'r').to_df('train', 3)['item'].tolist() == [0, 1]


def test_new_items_straight_after_an_epoch():
    "The scores of the list that has ended are not kept up to date under the new one, and nothing is told."
    for _ in range(5):
        writer = XentWriter()
        for epoch, name in enumerate('ab'):
            writer.set_items('valid', pd.DataFrame(dict(item=range(3), name=[f'{name}{i}' for i in range(3)], source=range(3))),
                             fingerprint=name, epoch=epoch)
            if epoch == 0: writer.write(0, 0, 'valid', dict(item=range(3), margin=[3., 1., 2.], pred=[0] * 3, targ=[0] * 3))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            record = writer.record
        assert record.top(1, 'margin_loss', 'valid', segment=0)['name'].tolist() == ['a1']
