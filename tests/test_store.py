"The record: what goes in comes out, in memory as on disk, and whatever happens to the process that writes it."
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from helpers import COLUMNS, FLOATS, Truth, at_most, ended, learner, same_bits, same_rows, warned
from hypothesis import given, settings
from hypothesis import strategies as st

import fastai_xent
from fastai_xent import store
from fastai_xent.dynamics import SCORES, MeanColumn, Reducer
from fastai_xent.recorder import XentRecorder
from fastai_xent.store import XentRecord

@pytest.fixture(autouse=True)
def guard():
    with at_most(300): yield


# -- what goes in

def frame(n, name='item {}.png'):
    return pd.DataFrame({'item': np.arange(n), 'name': [name.format(i) for i in range(n)], 'source': pd.Series([n - i for i in range(n)], dtype='Int64')})

def rows(items, seed=0, ignored=.2, c=4) -> dict:
    "Rows of these items in the given order; some of them ignored. The floats have few digits, so that a disk gives them back as they are."
    rng, n = np.random.default_rng(seed), len(items)
    cols = {'item': np.asarray(items, dtype=np.int64), **{o: (rng.integers(-511, 512, n) / 128).astype(np.float32) for o in FLOATS}, 'pred': rng.integers(0, c, n), 'targ': rng.integers(0, c, n)}
    out = rng.random(n) < ignored
    for o in FLOATS: cols[o][out] = np.nan
    cols['pred'][out], cols['targ'][out] = -1, -100
    return cols

@st.composite
def runs(draw):
    "Items of each split, and rows of some epochs: repeats, gaps, empty epochs, a train epoch without its valid."
    n = {'train': draw(st.integers(1, 12)), 'valid': draw(st.integers(1, 5))}
    epochs, fit = [], 0
    for e in range(draw(st.integers(1, 4))):
        fit += draw(st.booleans()) and e > 0
        for split in ('train', 'valid'):
            if split == 'valid' and draw(st.booleans()): continue
            items = draw(st.lists(st.integers(0, n[split] - 1), max_size=15))
            epochs.append((int(fit), e, split, rows(items, seed=draw(st.integers(0, 99)), ignored=draw(st.sampled_from([0, .3, 1])))))
    return n, epochs, draw(st.sampled_from([None, ['a', 'b', 'c', 'ü']]))

def fill(record, run):
    n, epochs, vocab = run
    for split in ('train', 'valid'): record.set_items(split, frame(n[split], split + ' {}'), f'hash of {split}', vocab)
    for fit, epoch, split, cols in epochs: record.add(fit, epoch, split, cols)
    return record

def expected(run, split=None) -> pd.DataFrame:
    "What pandas alone would have made of it."
    parts = [pd.DataFrame({**cols, 'fit': fit, 'epoch': epoch, 'split': s}).sort_values('item', kind='stable') for fit, epoch, s, cols in run[1] if split in (None, s)]
    df = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)
    return df.sort_values(['epoch', 'split'], kind='stable', ignore_index=True)[COLUMNS]

def same_frame(df, want) -> None:
    assert list(df.columns[:len(COLUMNS)]) == COLUMNS and len(df) == len(want)
    ignored = want['pred'] == -1
    for o in COLUMNS:
        if o == 'split':
            assert df[o].astype(str).tolist() == want[o].tolist()
            continue
        got, exp = df[o].to_numpy(dtype=np.float64, na_value=np.nan), want[o].to_numpy(dtype=np.float64)
        np.testing.assert_array_equal(got, np.where(ignored, np.nan, exp) if o in (*FLOATS, 'pred', 'targ') else exp, err_msg=o)

def everywhere(run, where):
    "The same run in memory, in a directory, opened from the directory, and on an object store."
    url = f'memory://{Path(where).name}'
    made = [fill(XentRecord.new(o), run) for o in (None, Path(where) / 'r', url)]
    return [*made, XentRecord(Path(where) / 'r'), pickle.loads(pickle.dumps(made[1])), XentRecord(url)]

@settings(max_examples=10)
@given(runs())
def test_what_goes_in_comes_out(run):
    with tempfile.TemporaryDirectory() as where:
        n, epochs, vocab = run
        records = everywhere(run, where)
        for record in records:
            same_frame(record.to_df(), expected(run))
            assert record.keys == sorted([(f, s, e) for f, e, s, _ in epochs], key=lambda k: (k[2], k[1]))
            for split in n:
                same_frame(record.to_df(split), expected(run, split))
                np.testing.assert_array_equal(record.items(split)['name'], [f'{split} {i}' for i in range(n[split])])
                np.testing.assert_array_equal(record.items(split)['source'], n[split] - np.arange(n[split]))
            for fit, epoch, split, cols in epochs: same_frame(record.to_df(split, epoch), expected((n, [(fit, epoch, split, cols)], vocab)))
            for i in range(n['train'])[:4]:
                got, want = record.item(i), expected(run, 'train').query('item == @i')
                assert got['epoch'].tolist() == want['epoch'].tolist() and got['fit'].tolist() == want['fit'].tolist()
                np.testing.assert_array_equal(got['margin'].to_numpy(np.float64), np.where(want['pred'] == -1, np.nan, want['margin'].astype(float)))
            assert record.sql('select count(*) n from record').n[0] == sum(len(o[3]['item']) for o in epochs)
            assert record.sql('select count(*) n from items').n[0] == sum(n.values())
        first = records[0]
        for other in records[1:]:
            pd.testing.assert_frame_equal(other.to_df(), first.to_df())
            for split in n:
                pd.testing.assert_frame_equal(other.items(split), first.items(split))
                for by in ('margin_loss', 'p_targ'):
                    np.testing.assert_array_equal(other.score(by, split), first.score(by, split))
                    pd.testing.assert_frame_equal(other.top(5, by, split), first.top(5, by, split))
            q = 'select fit, epoch, split, item, name, loss, pred, targ from record join items using (split, item) order by all'
            pd.testing.assert_frame_equal(other.sql(q), first.sql(q))
            assert repr(other).splitlines()[1:] == repr(first).splitlines()[1:]

@settings(max_examples=20)
@given(runs())
def test_scores(run):
    "As pandas would compute them; an item that was not seen, or only with ignored targets, has none, and is not in `top`."
    n, epochs, vocab = run
    record = fill(XentRecord.new(), run)
    for split in n:
        df = expected(run, split)
        df = df[df['pred'] >= 0].assign(margin_loss=lambda d: np.log1p(np.exp(-d['margin'].astype(float))))
        for by in ('margin_loss', 'loss', 'grad_norm', 'el2n', 'p_targ', 'margin'):
            want = df[by].astype(float).groupby(df['item'].astype(int)).mean().reindex(range(n[split])).to_numpy()
            got = record.score(by, split)
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
            top = record.top(100, by, split)
            largest = by not in ('p_targ', 'margin')
            assert len(top) == np.isfinite(want).sum() and set(top['item']) == set(np.flatnonzero(np.isfinite(want)))
            assert (np.diff(top['score'].to_numpy(float)) <= 0).all() if largest else (np.diff(top['score'].to_numpy(float)) >= 0).all()
            assert record.top(2, by, split).equals(top.head(2).reset_index(drop=True)) or len(top) < 2
            for r in top.itertuples():
                mine = df[df['item'] == r.item]
                name = (lambda c: vocab[int(c)]) if vocab else int
                assert r.name == f'{split} {r.item}' and r.targ == name(mine['targ'].iloc[-1])
                wrong = mine['pred'][mine['pred'] != mine['targ']]
                counts = wrong.value_counts()
                if 2 * len(wrong) <= len(mine): assert r.likely == r.targ
                elif mine['targ'].nunique() == 1 and 2 * counts.max() > len(wrong): assert r.likely == name(counts.idxmax())
                else: assert r.likely in [name(c) for c in counts.index]

@pytest.mark.parametrize('by', SCORES)
def test_every_score_is_at_hand(by):
    run = ({'train': 6, 'valid': 1}, [(0, e, 'train', rows([2, 0, 1, 3, 3], seed=e, ignored=.2)) for e in range(4)], None)
    got = fill(XentRecord.new(), run).score(by)
    assert got.dtype == np.float64 and len(got) == 6 and np.isnan(got[4:]).all()
    assert np.isnan(got).all() == (by in ('entropy', 'grand'))

def test_a_score_of_one_s_own():
    class Last(Reducer):
        columns = ('loss', 'targ')
        def init(self, n): return dict(v=np.full(n, np.nan))
        def update(self, state, item, loss, targ, **_): state['v'][item] = loss
        def finalize(self, state): return state['v']
    run = ({'train': 4, 'valid': 1}, [(0, e, 'train', rows([2, 0, 1], seed=e, ignored=0)) for e in range(3)], None)
    record = fill(XentRecord.new(), run)
    got = record.score(Last())
    np.testing.assert_array_equal(got, expected(run).query('epoch == 2').set_index('item')['loss'].reindex(range(4)).astype(float))
    assert record.top(9, Last())['item'].tolist() == np.argsort(-got[:3]).tolist()
    np.testing.assert_array_equal(record.score(MeanColumn('loss')), record.score('loss'))

def test_mixed_and_padding_rows_count_by_their_share():
    cols = rows([0, 0, 1, 2], ignored=0)
    cols.update(lam=np.array([.25, 1., np.nan, .5]), partner=np.array([1, 0, -1, 0]), padding=np.array([False, False, False, True]))
    for path in (None, tempfile.mkdtemp()):
        record = XentRecord.new(path)
        record.set_items('train', frame(3), 'f')
        record.add(0, 0, 'train', cols)
        loss = cols['loss'].astype(float)
        np.testing.assert_allclose(record.score('loss'), [(.25 * loss[0] + loss[1]) / 1.25, loss[2], np.nan])


# -- what lies on the disk

RUN = ({'train': 6, 'valid': 3}, [(f, e, s, rows([3, 0, 5, 1, 1], seed=e) if s == 'train' else rows([2, 0, 1], seed=9 + e)) for f, e in ((0, 0), (0, 1), (1, 2)) for s in ('train', 'valid')], list('abcd'))

NAMES = ['plain', 'with space', 'rün 日本', '[1]', 'a*b?', "it's", 'say "so"', 'a=b', 'epoch=3', '100%', '%20', '#1', 'a::b', '~', '$HOME', 'semi;colon', '.hidden', '_private', 'a,b', '{x}', 'back\\slash']

@pytest.mark.parametrize('name', NAMES)
def test_names_of_directories(name, tmp_path):
    path = tmp_path / name / 'r'
    record = fill(XentRecord.new(path), RUN)
    assert (path / 'record.json').is_file() and sorted(o.name for o in tmp_path.iterdir()) == [name]
    for o in (record, XentRecord(path), XentRecord(str(path))):
        same_frame(o.to_df(), expected(RUN))
        assert len(o.item(1)) == 6 and len(o.top(3)) and o.sql('select count(*) n from record').n[0] == 24
        assert name in repr(o)
    XentRecord.new(path, overwrite=True)
    assert not (path / 'record.json').exists()
    same = learner([XentRecorder(path)], n=20)
    same.fit(1)
    assert XentRecord(path).n_epochs == 1

def test_plain_readers(tmp_path):
    "pandas and DuckDB read it without us, and find the partitions' columns."
    fill(XentRecord.new(tmp_path / 'r'), RUN)
    want = expected(RUN)
    ways = {'pandas': pd.read_parquet(tmp_path / 'r' / 'epochs'),
            'duckdb': duckdb.sql(f"select * from read_parquet('{tmp_path}/r/epochs/*/*/*/*.parquet', hive_partitioning=true)").df()}
    for how, df in ways.items():
        df = df.astype({'epoch': int, 'fit': int, 'split': str}).sort_values(['epoch', 'split', 'item', 'occurrence'], kind='stable', ignore_index=True)
        same_frame(df[COLUMNS], want)
    assert pd.read_parquet(tmp_path / 'r' / 'items')['name'].notna().all()

def test_nulls_and_order_in_files(tmp_path):
    fill(XentRecord.new(tmp_path / 'r'), RUN)
    files = sorted((tmp_path / 'r' / 'epochs').rglob('*.parquet'))
    assert len(files) == 6
    seen = 0
    for f in files:
        t = pq.read_table(f, partitioning=None)
        items = t['item'].to_numpy()
        assert (np.diff(items) >= 0).all()
        null = t['pred'].is_null().to_numpy()
        for o in (*FLOATS, 'targ'): assert (t[o].is_null().to_numpy() == null).all()
        assert not any(np.isnan(t[o].drop_null().to_numpy()).any() for o in FLOATS)
        seen += null.sum()
    assert seen
    assert not [p for p in (tmp_path / 'r').rglob('*') if p.name.endswith('.tmp')]
    assert not [p for p in (tmp_path / 'r').rglob('*') if p.suffix in ('.pkl', '.pickle', '.pth')]
    json.loads((tmp_path / 'r' / 'record.json').read_text())

def test_encodings_that_older_readers_know(tmp_path):
    "Whole numbers in BYTE_STREAM_SPLIT are Parquet of 2024; DuckDB 1.5 refuses them."
    fill(r := XentRecord.new(tmp_path / 'r'), RUN)
    r.scores()
    r.compact()
    files = [*(tmp_path / 'r').rglob('*.parquet')]
    assert {f.relative_to(tmp_path / 'r').parts[0] for f in files} == {'compact', 'items', 'running'}
    for f in files:
        m = pq.read_metadata(f)
        for g in range(m.num_row_groups):
            columns = [m.row_group(g).column(j) for j in range(m.num_columns)]
            assert [c.path_in_schema for c in columns if 'BYTE_STREAM_SPLIT' in c.encodings and c.physical_type not in ('FLOAT', 'DOUBLE')] == []

def test_repr():
    assert 'nothing recorded yet' in repr(XentRecord.new())
    text = repr(fill(XentRecord.new(), RUN))
    for word in ('in memory', '2 fits', 'train: 6 items, 3 epochs (0 to 2)', 'valid: 3 items', '4 classes: a, b, c, d', 'margin'): assert word in text
    n = XentRecord.new()
    n.set_items('train', frame(1234567), 'f')
    assert '1,234,567 items' in repr(n)

def test_other_items_are_another_segment(tmp_path):
    for path in (None, tmp_path / 'r'):
        record = fill(XentRecord.new(path), RUN)
        record.set_items('train', frame(4, 'other {}'), 'another hash', epoch=3)
        record.add(1, 3, 'train', rows([0, 1, 2, 3], ignored=0))
        record.set_items('train', frame(6, 'train {}'), 'hash of train', epoch=4)    # the first items come back
        record.add(1, 4, 'train', rows([0, 1], seed=4, ignored=0))
        for o in [record] if path is None else [record, XentRecord(path)]:
            assert o.items('train')['name'][0] == 'train 0' and o.items('train', segment=1)['name'][0] == 'other 0'
            assert o.item(0)['epoch'].tolist() == [0, 1, 2, 4] and o.item(0, segment=1)['epoch'].tolist() == [3]
            assert len(o.score('loss')) == 6 and len(o.score('loss', segment=1)) == 4
            with pytest.raises(IndexError): o.item(4, segment=1)
            with pytest.raises(IndexError): o.item(0, segment=2)

def test_another_process_still_writes(tmp_path):
    record = fill(XentRecord.new(tmp_path / 'r'), RUN)
    reader = XentRecord(tmp_path / 'r')
    record.add(1, 3, 'train', rows([4, 2], ignored=0))
    assert reader.n_epochs == 4 and len(reader.to_df(epoch=-1)) == 2 and len(reader.item(4)) == 1
    np.testing.assert_array_equal(reader.score(), record.score())


# -- refusals

def test_refusals(tmp_path):
    path = tmp_path / 'r'
    record = fill(XentRecord.new(path), RUN)
    for wrong in (record, fill(XentRecord.new(), RUN)):
        for ask in (lambda: wrong.top(split='test'), lambda: wrong.to_df('test'), lambda: wrong.items('test'), lambda: wrong.item(0, 'test'), lambda: wrong.score(split='test')):
            with pytest.raises(KeyError, match="no split 'test'.*train, valid"): ask()
        for i in (-1, 6, 99):
            with pytest.raises(IndexError, match=f"item {i} .*'train'.*0 to 5"): wrong.item(i)
        for e in (7, -4):
            with pytest.raises(KeyError, match=f"no epoch {e}.*last one is 2"): wrong.to_df(epoch=e)
        with pytest.raises(KeyError, match="'fame'.*margin_loss"): wrong.score('fame')
        with pytest.raises(duckdb.Error): wrong.sql('select nothing from nowhere')
    with pytest.raises(KeyError, match='nothing was recorded yet'): XentRecord.new().top()
    with pytest.raises(FileExistsError, match='resume=True.*overwrite=True'): XentRecord.new(path)
    with pytest.raises(FileNotFoundError, match='no record.json'): XentRecord(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='no record.json'): XentRecord(path / 'epochs')
    assert not (tmp_path / 'nowhere').exists()

def test_a_newer_format(tmp_path):
    path = tmp_path / 'r'
    fill(XentRecord.new(path), RUN)
    meta = json.loads((path / 'record.json').read_text())
    (path / 'record.json').write_text(json.dumps({**meta, 'format': store.FORMAT + 1}))
    for ask in (lambda: XentRecord(path), lambda: XentRecorder(path, resume=True)):
        with pytest.raises(ValueError, match=f'format {store.FORMAT + 1}.*update fastai_xent'): ask()
    with pytest.raises(FileExistsError): XentRecord.new(path)
    (path / 'record.json').write_text(json.dumps({**meta, 'unknown': 1}))
    assert XentRecord(path).n_epochs == 3

def test_without_record_json(tmp_path):
    path = tmp_path / 'r'
    fill(XentRecord.new(path), RUN)
    before = {p: p.read_bytes() for p in path.rglob('*') if p.is_file() and p.name != 'record.json'}
    (path / 'record.json').unlink()
    with pytest.raises(FileNotFoundError, match='not a record'): XentRecord(path)
    for kw in ({}, dict(resume=True)):
        with pytest.raises(FileExistsError): XentRecorder(path, **kw)
    assert {p: p.read_bytes() for p in path.rglob('*') if p.is_file()} == before

def test_strangers_in_the_directory(tmp_path):
    "Torn files of a dead process and files of other people are passed over, and survive."
    path = tmp_path / 'r'
    record = fill(XentRecord.new(path), RUN)
    strange = ['notes.txt', 'epochs/README', 'epochs/.DS_Store', 'epochs/fit=0/.DS_Store', 'epochs/fit=0/split=train/epoch=0/.part-0.parquet.99.tmp', 'epochs/fit=0/split=train/epoch=9/.part-0.parquet.99.tmp',
               'epochs/fit=0/split=train/epoch=0/thumbs.db', 'epochs/fit=x/split=train/epoch=0/part-0.parquet', 'items/.train-0.parquet.99.tmp', '.record.json.99.tmp', 'picture.parquet']
    for o in strange:
        (path / o).parent.mkdir(parents=True, exist_ok=True)
        (path / o).write_bytes(b'PAR1 and then nothing')
    for o in (record, XentRecord(path)):
        same_frame(o.to_df(), expected(RUN))
        assert o.n_epochs == 3 and len(o.top(2)) == 2 and o.sql('select count(*) n from record').n[0] == 24
    rec = XentRecorder(path, resume=True)
    assert rec.record.n_epochs == 3
    XentRecord.new(path, overwrite=True)
    assert (path / 'notes.txt').exists() and (path / 'picture.parquet').exists() and not (path / 'epochs').exists()


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
    last = XentRecord(path).n_fits - 1
    assert [k for k in XentRecord(path).keys if k[0] == last] == [(last, s, XentRecord(path).n_epochs - 1) for s in ('train', 'valid')]

def check_whole(record, truth):
    "Each epoch that is there is one that was trained, with all its rows; any may be missing."
    for split in record.meta['splits']: record.items(split), record.score(split=split), record.top(split=split)
    for fit, split, epoch in record.keys:
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

@pytest.mark.parametrize('path', ['file/r', '/proc/fastai_xent/r'])
def test_a_place_that_cannot_be(path, tmp_path):
    (tmp_path / 'file').write_text('mine')
    plain = learner(n=20)
    plain.fit(2)
    ended(plain)
    rec = XentRecorder(tmp_path / path)
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

where, out = sys.argv[2], {}
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

for what, k, after in [('replace', k, False) for k in range(1, 13)] + [('replace', k, True) for k in (1, 2, 3, 5, 8)] + [('fsync', k, False) for k in (1, 3, 7)]: die(at=(what, k, after))
for _ in range(40):
    random_kills += die(delay=rng.uniform(0, took))
    if random_kills == 16: break
print('RESULT' + json.dumps(out))
'''

@pytest.fixture(scope='module')
def deaths(tmp_path_factory):
    where = tmp_path_factory.mktemp('deaths')
    (where / 'script.py').write_text(SCRIPT)
    res = subprocess.run([sys.executable, str(where / 'script.py'), str(Path(__file__).parent), str(where)], capture_output=True, text=True, timeout=280,
                         env={**os.environ, 'PYTHONPATH': str(Path(fastai_xent.__file__).parents[1])})
    assert res.returncode == 0, res.stderr[-3000:]
    return where, json.loads(res.stdout.split('RESULT')[1]), res.stderr

def test_the_deaths_are_real(deaths):
    where, out, _ = deaths
    assert out['whole'][0] == 0
    killed = [v for k, v in out.items() if k != 'whole' and v[1] == 9]
    assert len([v for v in killed if 'delay' in v[0]]) >= 15 and len(killed) >= 30, len(killed)
    left = {len(XentRecord(where / f'{k}-dead').keys) for k in out if (where / f'{k}-dead' / 'record.json').exists()}
    assert len(left) >= 5, "the kills do not fall into different phases of the run"

def test_what_a_death_leaves_is_whole(deaths):
    "Each epoch is there with all its rows and the values of a run that lived, or it is not there."
    where, out, _ = deaths
    want = XentRecord(where / 'whole')
    assert len(want.keys) == 8
    for k, v in out.items():
        path = where / f'{k}-dead'
        if k == 'whole' or not path.exists(): continue
        try: record = XentRecord(path)
        except FileNotFoundError as e:
            assert 'not a record' in str(e) and not list(path.rglob('part-*.parquet'))
            continue
        assert set(record.keys) <= set(want.keys), (k, v)
        assert record.keys == want.keys[:len(record.keys)] or set(record.keys) == set(sorted(want.keys, key=lambda o: (o[2], o[1]))[:len(record.keys)])
        for key in record.keys: pd.testing.assert_frame_equal(record.to_df(key[1], key[2]), want.to_df(key[1], key[2]))
        for split in record.meta['splits']:
            pd.testing.assert_frame_equal(record.items(split), want.items(split))
            record.top(split=split), record.score(split=split)
        repr(record), record.sql('select count(*) from record join items using (split, item)')

def test_after_a_death_it_goes_on(deaths):
    where, out, stderr = deaths
    want = XentRecord(where / 'whole')
    for k, v in out.items():
        if k == 'whole': continue
        assert v[2] == 0, (k, v, stderr[-2500:])
        record = XentRecord(where / k)
        dead = XentRecord(where / f'{k}-dead').keys if (where / f'{k}-dead' / 'record.json').exists() else []
        new = [o for o in record.keys if o not in dead]
        assert set(dead) <= set(record.keys) and [o[1] for o in new] == ['train', 'valid'], (k, v)
        assert new[0][2] == new[1][2] == max([o[2] + 1 for o in dead], default=0) and new[0][0] == max([o[0] + 1 for o in dead], default=0)
        for key in dead: pd.testing.assert_frame_equal(record.to_df(key[1], key[2]), want.to_df(key[1], key[2]))
        for key in new:
            got, first = record.to_df(key[1], key[2]), want.to_df(key[1], 0)          # the same seed: the same first epoch
            pd.testing.assert_frame_equal(got.drop(columns=['fit', 'epoch']), first.drop(columns=['fit', 'epoch']))
        assert len(record.score()) == 20 and not np.isnan(record.score()).any()
