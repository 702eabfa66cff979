"The running scores: the same bits however they came about, never believed when they are torn, stale or somebody else's."
import io
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import learner
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import RUN, altered_bytes, answers, fill, frame, put, rows, runs, update_scores

from fastai_xent import cache, epochs, parquet, writer
from fastai_xent.dynamics import SCORES, Confidence, Mean, MeanColumn, Reducer, register_score
from fastai_xent.files import Place
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.running import NoStates, States
from fastai_xent.writer import XentWriter

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
        real, tables = cache.fold, parquet.row_tables
        memory = fill(None, (n, epochs, vocab))
        want = answers(memory)
        m.setattr(cache, 'fold', partial(real, chunk=small))
        m.setattr(writer, 'row_tables', partial(tables, rows=group))
        live = XentWriter(Path(where) / 'r')
        for split in n: live.set_items(split, frame(n[split], split + ' {}'), f'hash of {split}', vocab)
        for f, e, s, cols in epochs:
            put(live, f, e, s, cols)
            update_scores(live.record, s)
        assert answers(live.record) == answers(XentRecord(live.path)) == want
        m.setattr(cache, 'fold', partial(real, chunk=large))
        assert answers(XentRecord(live.path)) == want
        shutil.rmtree(live.path / '_running')
        assert answers(XentRecord(live.path)) == want
        live.close()
        live.record.compact()
        shutil.rmtree(live.path / '_running')
        assert answers(XentRecord(live.path)) == want
        assert answers(fill(f'memory://{Path(where).name}', (n, epochs, vocab))) == want

def test_ranks_give_the_same_bits_as_one(tmp_path):
    whole = [rows(np.random.default_rng(e).permutation(30), seed=e) for e in range(3)]
    one, many = (XentWriter(tmp_path / o) for o in ('one', 'many'))
    for r in (one, many): r.set_items('train', frame(30), 'f')
    for e, cols in enumerate(whole):
        put(one, 0, e, 'train', cols)
        for rank in range(12): put(many, 0, e, 'train', {k: v[rank::12] for k, v in cols.items()}, rank=rank)
    for w in (one, many): w.close()
    one, many = one.record, many.record
    assert answers(one) == answers(many)
    before = many.to_df()
    many.compact()
    assert answers(one) == answers(XentRecord(many.path))
    pd.testing.assert_frame_equal(many.to_df()[['epoch', 'item', 'loss']], one.to_df()[['epoch', 'item', 'loss']])
    pd.testing.assert_frame_equal(many.to_df(), before)

def test_answers_do_not_look_at_the_epochs(tmp_path, monkeypatch):
    record = fill(tmp_path / 'r', RUN)
    want = record.top(3), record.scores()
    def never(*_, **__): raise AssertionError('an epoch was read')
    monkeypatch.setattr(epochs, 'read_items', never)
    monkeypatch.setattr(epochs.Epochs, 'scan', never)
    for a, b in zip(want, (XentRecord(tmp_path / 'r').top(3), XentRecord(tmp_path / 'r').scores())): pd.testing.assert_frame_equal(a, b)

def test_a_fit_leaves_its_scores(tmp_path, monkeypatch):
    "They are there when the fit is over, without a question, and of every split."
    learn = learner([XentRecorder(tmp_path / 'r', eval_every=1)], n=20)
    learn.fit(2)
    want = {s: XentRecord(tmp_path / 'r').scores(s) for s in ('train', 'valid', 'train_eval')}
    read, read_items = [], epochs.read_items
    def counted(*args, **kw):
        read.append(args)
        return read_items(*args, **kw)
    monkeypatch.setattr(epochs, 'read_items', counted)
    for s, most in dict(valid=0, train_eval=0, train=2).items():  # the last of several looks counts in train's label_doubt, by its sums and its rows
        pd.testing.assert_frame_equal(XentRecord(tmp_path / 'r').scores(s), want[s])
        assert len(read) <= most


# -- never believed

def test_torn_states_are_never_believed(tmp_path):
    record = fill(tmp_path / 'r', RUN)
    want = answers(record)
    file = tmp_path / 'r/_running/train-0.pq'
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
        again = XentWriter(tmp_path / 'r', resume=True)
        put(again, 1, 3, 'train', rows([0, 5], seed=3))
        again.close()
        update_scores(again.record)
        got = again.record.score('loss')
        shutil.rmtree(tmp_path / 'r/_running')
        np.testing.assert_array_equal(XentRecord(tmp_path / 'r').score('loss'), got)
        (tmp_path / 'r/rows/train/fit-1-epoch-003-part-0.parquet').unlink()

@pytest.mark.parametrize('name', [b'"crc"', b'"facts"'])
def test_states_whose_metadata_lost_a_name_are_never_believed(tmp_path, name):
    record = fill(tmp_path / 'r', RUN)
    want, file = answers(record), tmp_path / 'r/_running/train-0.pq'
    bad = file.read_bytes().replace(name, b'"' + b'x' * (len(name) - 2) + b'"')
    assert bad != file.read_bytes()
    with pytest.raises(NoStates): States(io.BytesIO(bad))
    file.write_bytes(bad)
    assert answers(XentRecord(tmp_path / 'r')) == want

def test_foreign_and_stale_states_are_never_believed(tmp_path):
    record = fill(tmp_path / 'r', RUN)
    other = fill(tmp_path / 'other', ({'train': 6, 'valid': 3}, [(0, e, s, rows([0, 1, 2], seed=50 + e)) for e in range(3) for s in ('train', 'valid')], None))
    want = answers(record), answers(other)
    for foreign in ((tmp_path / 'other/_running/train-0.pq').read_bytes(), (tmp_path / 'r/_running/valid-0.pq').read_bytes(), b'', b'mine', (tmp_path / 'r/_items/train-0.pq').read_bytes()):
        (tmp_path / 'r/_running/train-0.pq').write_bytes(foreign)
        assert answers(XentRecord(tmp_path / 'r')) == want[0]
    old = (tmp_path / 'r/_running/train-0.pq').read_bytes()
    for replaced in (2, 0):                                  # the last epoch is replaced, then the first, by rows of the same size
        put(XentWriter(tmp_path / 'r', resume=True), int(replaced == 2), replaced, 'train', rows([3, 0, 5, 1, 1], seed=90 + replaced))
        fresh = XentWriter()
        fill(fresh, RUN)
        for e in (2, 0):
            if e >= replaced: put(fresh, int(e == 2), e, 'train', rows([3, 0, 5, 1, 1], seed=90 + e))
        assert answers(XentRecord(tmp_path / 'r')) == answers(fresh.record)
        (tmp_path / 'r/_running/train-0.pq').write_bytes(old)
        assert answers(XentRecord(tmp_path / 'r')) == answers(fresh.record)
    (tmp_path / 'r/rows/train/fit-0-epoch-001-part-0.parquet').unlink()
    assert XentRecord(tmp_path / 'r').score('loss').tobytes() != answers(fresh.record)['loss', 'train', 0]

def test_what_a_dead_process_left_is_removed(tmp_path):
    record = fill(tmp_path / 'r', RUN)
    (tmp_path / 'r/_running').mkdir()
    left, mine, live = (tmp_path / f'r/_running/{o}' for o in ('.train-0.pq.999999999-7.tmp', '.valid-0.pq.999999999.tmp', '.train-0.pq.1-7.tmp'))
    for o in (left, mine, live): o.write_bytes(b'torn')
    record.top()
    assert not left.exists() and mine.exists() and live.exists()

def test_where_nothing_can_be_written_the_answers_are_the_same(tmp_path, monkeypatch):
    record = fill(tmp_path / 'r', RUN)
    want = answers(record)
    shutil.rmtree(tmp_path / 'r/_running')
    def refuse(self, *_, **__): raise PermissionError(13, 'Read-only file system')
    monkeypatch.setattr(Place, 'write', refuse)
    reader = XentRecord(tmp_path / 'r')
    assert answers(reader) == want and not (tmp_path / 'r/_running').exists()
    monkeypatch.setattr(epochs, 'read_items', None)
    assert answers(reader) == want                                 # kept in memory, not folded twice


# -- scores of one's own

class Lowest(Reducer):
    columns, largest_first = ('margin',), False
    def init(self, n): return dict(worst=np.full(n, np.inf))
    def update(self, state, item, weight, margin): np.fmin.at(state['worst'], item[weight > 0], margin[weight > 0])
    def finalize(self, state): return np.where(np.isinf(state['worst']), np.nan, state['worst'])

def test_a_registered_score(tmp_path, registered):
    "Of epochs before and after it was registered; beside the others; by its name."
    path = tmp_path / 'r'
    record = fill(path, RUN)
    record.scores()
    register_score('lowest', Lowest())
    assert 'Lowest' not in States(path / '_running/train-0.pq').arrays
    def want(): return XentRecord(path).to_df('train').astype({'margin': float}).groupby('item')['margin'].min().reindex(range(6)).to_numpy()
    np.testing.assert_array_equal(record.score('lowest'), want())
    assert 'Lowest' in States(path / '_running/train-0.pq').arrays
    put(XentWriter(path, resume=True), 1, 3, 'train', rows([0, 1, 2], seed=77))
    update_scores(record)
    np.testing.assert_array_equal(record.scores()['lowest'], want())
    assert record.top(1, 'lowest')['item'][0] == np.nanargmin(want())
    np.testing.assert_array_equal(record.score(Lowest()), want())

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
    class Matrix(Lowest):
        key = 'matrix'
        def init(self, n): return dict(worst=np.zeros((n, 2)))
    want = fill(None, RUN).scores()
    register_score('fails', Fails())
    register_score('matrix', Matrix())
    register_score('column', MeanColumn('fame'))
    for path in (None, tmp_path / 'r'):
        record = fill(path, RUN)
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
    register_score('lowest', Lowest())
    record = fill(tmp_path / 'r', RUN)
    record.score('lowest')
    class Other(Lowest):
        key = 'Lowest'
        def init(self, n): return dict(best=np.full(n, -np.inf))
        def update(self, state, item, weight, margin): np.fmax.at(state['best'], item[weight > 0], margin[weight > 0])
        def finalize(self, state): return np.where(np.isinf(state['best']), np.nan, state['best'])
    register_score('lowest', Other())
    np.testing.assert_array_equal(record.score('lowest'), record.to_df('train').astype({'margin': float}).groupby('item')['margin'].max().reindex(range(6)))

def test_registering_refuses(registered):
    with pytest.raises(TypeError, match="'a' is a str, expected an instance of a Reducer"): register_score('a', 'b')
    class Squares(Confidence):
        def update(self, state, item, weight, p_targ): super().update(state, item, weight, p_targ**2)
    with pytest.raises(ValueError, match='not computed alike'): register_score('squares', Squares())
    class Power(Mean):
        columns = ('margin',)
        def __init__(self, power): self.power = power
        def value(self, margin): return margin**self.power
    register_score('two', Power(2))
    register_score('three', Power(3))
    assert len({SCORES[o].key for o in ('two', 'three')}) == 2 and all(SCORES[o].key.isidentifier() for o in ('two', 'three'))

def test_one_item_and_no_items(tmp_path):
    for n in (1, 0):
        writer = XentWriter(tmp_path / str(n))
        writer.set_items('train', frame(n), 'f')
        put(writer, 0, 0, 'train', rows(range(n)))
        writer.close()
        record = writer.record
        assert len(record.scores()) == n and len(record.top()) <= n
        record.compact()
        assert len(record.to_df()) == n and len(record.scores()) == n
