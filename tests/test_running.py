"The running scores: the same bits however they came about, never believed when they are torn, stale or somebody else's; and what `compact` may not change."
import io
import json
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from helpers import learner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import RUN, fill, frame, rows, runs

from fastai_xent import store
from fastai_xent.dynamics import SCORES, Confidence, Mean, MeanColumn, Reducer, register_score
from fastai_xent.recorder import XentRecorder
from fastai_xent.running import NoStates, States
from fastai_xent.store import XentRecord, shorten

def answers(record) -> dict:
    "Every score of every split and segment, as bytes."
    return {(by, split, k): record.score(by, split, k).tobytes() for by in SCORES for split, d in record.meta['splits'].items() for k in range(len(d['segments']))}

@pytest.fixture
def registered():
    "What a test registers is forgotten."
    before = dict(SCORES)
    yield
    SCORES.clear()
    SCORES.update(before)


# -- the same bits

def mixed(cols, seed):
    "The rows with shares of mixing and padding."
    rng, n = np.random.default_rng(seed), len(cols['item'])
    return {**cols, 'lam': np.where(rng.random(n) < .3, np.nan, rng.integers(1, 5, n) / 4), 'partner': rng.integers(0, 3, n), 'padding': rng.random(n) < .1}

@settings(max_examples=12, deadline=None)
@given(runs(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.booleans())
def test_the_same_bits_however_they_are_folded(run, small, group, large, mix):
    "After every epoch or at once, in chunks and row groups of any size, in one file or many, on a disk, on a store or in memory."
    n, epochs, vocab = run
    if mix: epochs = [(f, e, s, mixed(cols, e)) for f, e, s, cols in epochs]
    with tempfile.TemporaryDirectory() as where, pytest.MonkeyPatch.context() as m:
        real, tables = store.fold, store._tables
        memory = fill(XentRecord.new(), (n, epochs, vocab))
        want = answers(memory)
        m.setattr(store, 'fold', partial(real, chunk=small))
        m.setattr(store, '_tables', partial(tables, rows=group))
        live = XentRecord.new(Path(where) / 'r')
        for split in n: live.set_items(split, frame(n[split], split + ' {}'), f'hash of {split}', vocab)
        for f, e, s, cols in epochs:
            live.add(f, e, s, cols)
            live.update_scores(s)
        assert answers(live) == answers(XentRecord(live.path)) == want
        m.setattr(store, 'fold', partial(real, chunk=large))
        assert answers(XentRecord(live.path)) == want
        shutil.rmtree(live.path / 'running')
        assert answers(XentRecord(live.path)) == want
        live.compact()
        shutil.rmtree(live.path / 'running')
        assert answers(XentRecord(live.path)) == want
        assert answers(fill(XentRecord.new(f'memory://{Path(where).name}'), (n, epochs, vocab))) == want

def test_ranks_give_the_same_bits_as_one(tmp_path):
    whole = [rows(np.random.default_rng(e).permutation(30), seed=e) for e in range(3)]
    one, many = (XentRecord.new(tmp_path / o) for o in ('one', 'many'))
    for r in (one, many): r.set_items('train', frame(30), 'f')
    for e, cols in enumerate(whole):
        one.add(0, e, 'train', cols)
        for rank in range(12): many.add(0, e, 'train', {k: v[rank::12] for k, v in cols.items()}, rank)
    assert answers(one) == answers(many)
    before = many.to_df()
    many.compact()
    assert answers(one) == answers(XentRecord(many.path))
    pd.testing.assert_frame_equal(many.to_df()[['epoch', 'item', 'loss']], one.to_df()[['epoch', 'item', 'loss']])
    pd.testing.assert_frame_equal(many.to_df(), before)

def test_answers_do_not_look_at_the_epochs(tmp_path, monkeypatch):
    record = fill(XentRecord.new(tmp_path / 'r'), RUN)
    want = record.top(3), record.scores()
    def never(*_, **__): raise AssertionError('an epoch was read')
    monkeypatch.setattr(store, '_read_items', never)
    monkeypatch.setattr(XentRecord, '_read', never)
    for a, b in zip(want, (XentRecord(tmp_path / 'r').top(3), XentRecord(tmp_path / 'r').scores())): pd.testing.assert_frame_equal(a, b)

def test_a_fit_leaves_its_scores(tmp_path, monkeypatch):
    "They are there when the fit is over, without a question, and of every split."
    learn = learner([XentRecorder(tmp_path / 'r', eval_every=1)], n=20)
    learn.fit(2)
    want = {s: XentRecord(tmp_path / 'r').scores(s) for s in ('train', 'valid', 'train_eval')}
    monkeypatch.setattr(store, '_read_items', None)
    for s in want: pd.testing.assert_frame_equal(XentRecord(tmp_path / 'r').scores(s), want[s])


# -- never believed

def altered_bytes(data: bytes):
    "The file torn at some lengths, and with a byte changed at some places."
    for size in (0, 4, len(data) // 2, len(data) - 1): yield data[:size]
    for at in np.random.default_rng(0).integers(0, len(data), 150):
        b = bytearray(data)
        b[at] ^= 1 << (at % 8)
        yield bytes(b)

def test_torn_states_are_never_believed(tmp_path):
    record = fill(XentRecord.new(tmp_path / 'r'), RUN)
    want = answers(record)
    file = tmp_path / 'r/running/train-0.parquet'
    good, noticed = file.read_bytes(), 0
    true = {k: {o: v.tobytes() for o, v in States(file)[k].items()} for k in States(file).arrays}
    for bad in altered_bytes(good):
        try:
            s = States(io.BytesIO(bad))
            assert s.marks == States(file).marks and {k: {o: v.tobytes() for o, v in s[k].items()} for k in s.arrays} == true
        except NoStates: noticed += 1
    assert noticed > 100
    for bad in [*altered_bytes(good)][::12]:
        file.write_bytes(bad)
        assert answers(XentRecord(tmp_path / 'r')) == want
        file.write_bytes(bad)
        again = XentRecord(tmp_path / 'r')
        again.add(1, 3, 'train', rows([0, 5], seed=3))
        again.update_scores()
        got = again.score('loss')
        shutil.rmtree(tmp_path / 'r/running')
        np.testing.assert_array_equal(XentRecord(tmp_path / 'r').score('loss'), got)
        shutil.rmtree(tmp_path / 'r/epochs/fit=1/split=train/epoch=3')

def test_foreign_and_stale_states_are_never_believed(tmp_path):
    record = fill(XentRecord.new(tmp_path / 'r'), RUN)
    other = fill(XentRecord.new(tmp_path / 'other'), ({'train': 6, 'valid': 3}, [(0, e, s, rows([0, 1, 2], seed=50 + e)) for e in range(3) for s in ('train', 'valid')], None))
    want = answers(record), answers(other)
    for foreign in ((tmp_path / 'other/running/train-0.parquet').read_bytes(), (tmp_path / 'r/running/valid-0.parquet').read_bytes(), b'', b'mine', (tmp_path / 'r/items/train-0.parquet').read_bytes()):
        (tmp_path / 'r/running/train-0.parquet').write_bytes(foreign)
        assert answers(XentRecord(tmp_path / 'r')) == want[0]
    old = (tmp_path / 'r/running/train-0.parquet').read_bytes()
    for replaced in (2, 0):                                  # the last epoch is replaced, then the first, by rows of the same size
        record.add(int(replaced == 2), replaced, 'train', rows([3, 0, 5, 1, 1], seed=90 + replaced))
        fresh = fill(XentRecord.new(), RUN)
        for e in (2, 0):
            if e >= replaced: fresh.add(int(e == 2), e, 'train', rows([3, 0, 5, 1, 1], seed=90 + e))
        assert answers(XentRecord(tmp_path / 'r')) == answers(fresh)
        (tmp_path / 'r/running/train-0.parquet').write_bytes(old)
        assert answers(XentRecord(tmp_path / 'r')) == answers(fresh)
    shutil.rmtree(tmp_path / 'r/epochs/fit=0/split=train/epoch=1')
    assert XentRecord(tmp_path / 'r').score('loss').tobytes() != answers(fresh)['loss', 'train', 0]

def test_what_a_dead_process_left_is_removed(tmp_path):
    record = fill(XentRecord.new(tmp_path / 'r'), RUN)
    (tmp_path / 'r/running').mkdir()
    left, mine, live = (tmp_path / f'r/running/{o}' for o in ('.train-0.parquet.999999999-7.tmp', '.valid-0.parquet.999999999.tmp', '.train-0.parquet.1-7.tmp'))
    for o in (left, mine, live): o.write_bytes(b'torn')
    record.top()
    assert not left.exists() and mine.exists() and live.exists()

def test_where_nothing_can_be_written_the_answers_are_the_same(tmp_path, monkeypatch):
    record = fill(XentRecord.new(tmp_path / 'r'), RUN)
    want = answers(record)
    shutil.rmtree(tmp_path / 'r/running')
    def refuse(self, *_, **__): raise PermissionError(13, 'Read-only file system')
    monkeypatch.setattr(store._Place, 'write', refuse)
    reader = XentRecord(tmp_path / 'r')
    assert answers(reader) == want and not (tmp_path / 'r/running').exists()
    monkeypatch.setattr(store, '_read_items', None)
    assert answers(reader) == want                                 # kept in memory, not folded twice


# -- scores of one's own

class Worst(Reducer):
    columns, largest_first = ('margin',), False
    def init(self, n): return dict(worst=np.full(n, np.inf))
    def update(self, state, item, weight, margin): np.fmin.at(state['worst'], item[weight > 0], margin[weight > 0])
    def finalize(self, state): return np.where(np.isinf(state['worst']), np.nan, state['worst'])

def test_a_registered_score(tmp_path, registered):
    "Of epochs before and after it was registered; beside the others; by its name."
    path = tmp_path / 'r'
    record = fill(XentRecord.new(path), RUN)
    record.scores()
    register_score('worst', Worst())
    assert 'Worst' not in States(path / 'running/train-0.parquet').arrays
    def want(): return XentRecord(path).to_df('train').astype({'margin': float}).groupby('item')['margin'].min().reindex(range(6)).to_numpy()
    np.testing.assert_array_equal(record.score('worst'), want())
    assert 'Worst' in States(path / 'running/train-0.parquet').arrays
    record.add(1, 3, 'train', rows([0, 1, 2], seed=77))
    record.update_scores()
    np.testing.assert_array_equal(record.scores()['worst'], want())
    assert record.top(1, 'worst')['item'][0] == np.nanargmin(want())
    np.testing.assert_array_equal(record.score(Worst()), want())

@contextmanager
def told():
    "All that is warned of in the body."
    said = []
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        yield said
    said += [str(o.message) for o in got if 'Xent' in str(o.message)]

def test_a_score_that_fails_leaves_the_others(tmp_path, registered):
    class Fails(Mean):
        columns = ('margin',)
        def value(self, margin): raise ZeroDivisionError('mine')
    class Matrix(Worst):
        key = 'matrix'
        def init(self, n): return dict(worst=np.zeros((n, 2)))
    want = fill(XentRecord.new(), RUN).scores()
    register_score('fails', Fails())
    register_score('matrix', Matrix())
    register_score('column', MeanColumn('fame'))
    for path in (None, tmp_path / 'r'):
        record = fill(XentRecord.new(path), RUN)
        with told() as said: got = record.scores()
        assert sorted('mine' in o for o in said) == [False, True] and 'one number an item' in ''.join(said), said
        pd.testing.assert_frame_equal(got, want)
        with told() as said: record.scores()
        assert not said
        with pytest.raises(Exception, match="'Fails"): record.score('fails')
        with pytest.raises(KeyError, match="reads the column 'fame', expected some of item, loss"): record.score('column')
    learn = learner([XentRecorder(tmp_path / 'fit')], n=20)
    with told() as said: learn.fit(2)
    assert XentRecord(tmp_path / 'fit').n_epochs == 2 and any('mine' in o for o in said) and not any('stopped' in o for o in said), said

def test_a_state_of_another_shape_is_computed_anew(tmp_path, registered):
    "A reducer was changed: its key is the same, its arrays are not."
    register_score('worst', Worst())
    record = fill(XentRecord.new(tmp_path / 'r'), RUN)
    record.score('worst')
    class Other(Worst):
        key = 'Worst'
        def init(self, n): return dict(best=np.full(n, -np.inf))
        def update(self, state, item, weight, margin): np.fmax.at(state['best'], item[weight > 0], margin[weight > 0])
        def finalize(self, state): return np.where(np.isinf(state['best']), np.nan, state['best'])
    register_score('worst', Other())
    np.testing.assert_array_equal(record.score('worst'), record.to_df('train').astype({'margin': float}).groupby('item')['margin'].max().reindex(range(6)))

def test_registering_refuses(registered):
    with pytest.raises(TypeError, match="'a' is a str, expected an instance of a Reducer"): register_score('a', 'b')
    class Squares(Confidence):
        def update(self, state, item, weight, p_targ): super().update(state, item, weight, p_targ**2)
    with pytest.raises(ValueError, match='not folded alike'): register_score('squares', Squares())
    class Power(Mean):
        columns = ('margin',)
        def __init__(self, power): self.power = power
        def value(self, margin): return margin**self.power
    register_score('two', Power(2))
    register_score('three', Power(3))
    assert len({SCORES[o].key for o in ('two', 'three')}) == 2 and all(SCORES[o].key.isidentifier() for o in ('two', 'three'))

def test_one_item_and_no_items(tmp_path):
    for n in (1, 0):
        record = XentRecord.new(tmp_path / str(n))
        record.set_items('train', frame(n), 'f')
        record.add(0, 0, 'train', rows(range(n)))
        assert len(record.scores()) == n and len(record.top()) <= n
        record.compact()
        assert len(record.to_df()) == n and len(record.scores()) == n


# -- few digits

@settings(max_examples=200)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.integers(1, 23))
def test_shorten(xs, digits):
    x = np.array(xs, dtype=np.float32)
    got = shorten(x, digits)
    assert got.dtype == np.float32 and (shorten(got, digits).tobytes() == got.tobytes())
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(x))
    normal = np.isfinite(x) & (np.abs(x) >= np.finfo(np.float32).tiny)
    a, b = x[normal].astype(float), got[normal].astype(float)
    top = np.abs(a) > (2 - 2.**-digits) * 2.**127                # rounding up would be infinite
    assert (np.abs(b - a)[~top] <= 2.**-(digits + 1) * np.abs(a)[~top]).all() and (np.abs(b - a) <= 2.**-digits * np.abs(a)).all()
    m, e = np.frexp(a)
    np.testing.assert_array_equal(b[~top], np.ldexp(np.rint(m * 2.**(digits + 1)) / 2.**(digits + 1), e)[~top])

def test_what_is_kept_on_disk(tmp_path):
    rng = np.random.default_rng(0)
    cols = dict(item=np.arange(2000), pred=rng.integers(0, 4, 2000), targ=rng.integers(0, 4, 2000), step=np.arange(2000) // 64,
                **{o: np.exp(rng.normal(0, 4, 2000)).astype(np.float32) for o in ('loss', 'grad_norm', 'el2n', 'p_targ', 'margin', 'entropy', 'grand')})
    for path, how in ((None, {}), (tmp_path / 'full', dict(precision='full')), (tmp_path / 'short', {})):
        record = XentRecord.new(path, **how)
        record.set_items('train', frame(2000), 'f')
        record.add(0, 0, 'train', cols)
        df = record.to_df()
        for o in ('item', 'pred', 'targ', 'step'): np.testing.assert_array_equal(df[o], cols[o])
        for o in ('loss', 'grad_norm', 'el2n', 'p_targ', 'margin', 'entropy', 'grand'):
            error = np.abs(df[o].to_numpy(float) / cols[o].astype(float) - 1).max()
            assert 2.**-10 < error <= 2.**-9 if path == tmp_path / 'short' else error == 0
    with pytest.raises(ValueError, match="precision is 'half', expected 'short' or 'full'"): XentRecord.new(precision='half')

def test_precision_is_the_record_s(tmp_path):
    learn = learner([XentRecorder(tmp_path / 'r', precision='full')], n=20)
    learn.fit(1)
    assert XentRecord(tmp_path / 'r').meta['precision'] == 'full'
    again = learner([XentRecorder(tmp_path / 'r', resume=True)], n=20)
    again.fit(1)
    loss = XentRecord(tmp_path / 'r').to_df('train', -1)['loss'].to_numpy()
    assert (loss != shorten(loss, 8)).any()


# -- other formats

def test_an_older_format_opens_and_goes_on(tmp_path):
    "Format 1 had one row group, its own encodings, no running scores, and full precision."
    path = tmp_path / 'r'
    learner([XentRecorder(path, precision='full')], n=20).fit(2)
    want = XentRecord(path)
    df, scores = want.to_df(), want.scores()
    shutil.rmtree(path / 'running')
    for f in (path / 'epochs').rglob('*.parquet'): pq.write_table(pq.read_table(f, partitioning=None).replace_schema_metadata(), f, compression='zstd', use_dictionary=['pred', 'targ', 'occurrence'])
    meta = json.loads((path / 'record.json').read_text())
    for o in ('precision', 'cost'): del meta[o]
    (path / 'record.json').write_text(json.dumps({**meta, 'format': 1}))
    old = XentRecord(path)
    pd.testing.assert_frame_equal(old.to_df(), df)
    pd.testing.assert_frame_equal(old.scores(), scores)
    learner([XentRecorder(path, resume=True)], n=20).fit(1)
    new = XentRecord(path)
    assert new.n_epochs == 3 and json.loads((path / 'record.json').read_text())['format'] == store.FORMAT == 2 and new.meta['precision'] == 'full'
    pd.testing.assert_frame_equal(new.to_df().query('epoch < 2'), df)
    new.compact()
    pd.testing.assert_frame_equal(new.to_df().query('epoch < 2'), df)


# -- compact

def everything(record) -> list:
    "Answers to all questions."
    res = [record.to_df(), record.keys, record.sql('select fit, epoch, split, item, name, loss, pred, targ, occurrence from record join items using (split, item) order by all'), answers(record)]
    for split, d in record.meta['splits'].items():
        res += [record.to_df(split, -1), record.items(split), record.top(3, split=split), record.scores(split), record.seen(split)]
        res += [record.item(i, split) for i in range(d['segments'][record._segment(split)]['n'])]
    return res

def same_answers(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        if isinstance(x, pd.DataFrame): pd.testing.assert_frame_equal(x, y)
        else: assert x == y

SEGMENTS = [(2, 4, 'another hash', [0, 1, 2, 3]), (3, 6, 'hash of train', [0, 5])]
def two_segments(record):
    fill(record, RUN)
    for e, n, mark, items in SEGMENTS:
        record.set_items('train', frame(n, mark + ' {}'), mark, epoch=e + 1)
        record.add(1, e + 1, 'train', rows(items, seed=e))
    return record

@pytest.mark.parametrize('make', [lambda r: fill(r, RUN), two_segments])
@pytest.mark.parametrize('path', ['r', 'with [brackets] & spaces', 'memory://compact/r'])
def test_compact_changes_no_answer(path, make, tmp_path, monkeypatch):
    path = path if '://' in path else tmp_path / path
    record = make(XentRecord.new(path, overwrite=True))
    want = everything(record)
    monkeypatch.setattr(store, '_GROUP', 2)
    record.compact()
    names = record._place.files('epochs'), record._place.files('compact')
    assert names == ([], ['compact/split=train/part-1.parquet', 'compact/split=valid/part-1.parquet'])
    for r in (record, XentRecord(path)): same_answers(everything(r), want)
    record.compact()
    assert record._place.files('compact') == names[1]
    if '://' not in str(path):
        assert not (path / 'epochs/fit=0').exists()
        assert len(pd.read_parquet(path / 'compact')) == len(record.to_df())
    more = rows([1, 2, 0], seed=8)
    last = record.n_epochs
    record.add(1, last, 'train', more)
    record.update_scores()
    fresh = make(XentRecord.new())
    fresh.add(1, last, 'train', more)
    same_answers(everything(XentRecord(path)), everything(fresh))
    with pytest.raises(ValueError, match='what was compacted is not replaced'): record.add(0, 0, 'train', more)
    record.compact()
    assert record._place.files('compact') == ['compact/split=train/part-2.parquet', 'compact/split=valid/part-1.parquet'] and not record._place.files('epochs')
    same_answers(everything(XentRecord(path)), everything(fresh))

class Death(BaseException): pass

@pytest.mark.parametrize('what', ['replace', 'fsync', 'remove'])
@pytest.mark.parametrize('k', range(8))
def test_compact_survives_a_death(what, k, tmp_path, monkeypatch):
    "At any rename, flush or removal: all answers stay, and another call completes it."
    record = fill(XentRecord.new(tmp_path / 'r'), RUN)
    want, calls = everything(record), []
    def deadly(real):
        def f(*args, **kw):
            calls.append(1)
            if len(calls) > k: raise Death
            return real(*args, **kw)
        return f
    with monkeypatch.context() as m:
        owner, name = (store._Place, 'remove') if what == 'remove' else (store.os, what)
        m.setattr(owner, name, deadly(getattr(owner, name)))
        try: record.compact()
        except Death: pass
    same_answers(everything(XentRecord(tmp_path / 'r')), want)
    again = XentRecord(tmp_path / 'r')
    again.compact()
    same_answers(everything(again), want)
    assert not again._place.files('epochs') and len(again._place.files('compact')) == 2

def test_compact_is_refused_while_a_fit_writes(tmp_path):
    from fastai.callback.core import Callback
    class Try(Callback):
        order = 90
        def after_epoch(self):
            record = self.learn.xent_recorder.record
            with pytest.raises(RuntimeError, match='a fit writes to .* now'): record.compact()
            with pytest.raises(RuntimeError, match='a fit writes to .* now'): XentRecord(record.path).compact()
    learn = learner([XentRecorder(tmp_path / 'r'), Try()], n=20)
    learn.fit(2)
    record = learn.xent_recorder.record
    want = everything(record)
    record.compact()
    same_answers(everything(record), want)
    learn.remove_cb(Try)
    learn.fit(1)                                                       # and it goes on
    assert XentRecord(tmp_path / 'r').n_epochs == 3 and len(XentRecord(tmp_path / 'r').item(0)) == 3
    resumed = learner([XentRecorder(tmp_path / 'r', resume=True)], n=20)
    resumed.fit(1)
    assert XentRecord(tmp_path / 'r').n_epochs == 4
    XentRecord.new(tmp_path / 'r', overwrite=True)
    XentRecord.new(tmp_path / 'r')                                     # the lock alone is nobody's
