"The record: what goes in comes out, in memory as on disk; scores as pandas would compute them; what is refused."
import json
import pickle
import re
import shutil
import tempfile
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import at_most
from hypothesis import given, settings
from runs import RUN, expected, fill, frame, put, rows, runs, same_frame

from fastai_xent.dynamics import SCORES, MeanColumn, Reducer
from fastai_xent.epochs import FORMAT
from fastai_xent.record import XentRecord, _first
from fastai_xent.recorder import XentRecorder
from fastai_xent.writer import XentWriter

@pytest.fixture(autouse=True)
def guard():
    with at_most(300): yield


# -- what goes in

def everywhere(run, where):
    "The same run in memory, in a directory, opened from the directory, and on an object store."
    url = f'memory://{Path(where).name}'
    made = [fill(o, run) for o in (None, Path(where) / 'r', url)]
    return [*made, XentRecord(Path(where) / 'r'), pickle.loads(pickle.dumps(made[1])), XentRecord(url)]

@settings(max_examples=3)
@given(runs())
def test_what_goes_in_comes_out(run): comes_out(run)

@pytest.mark.slow
@settings(max_examples=12)
@given(runs())
def test_what_goes_in_comes_out_of_many(run): comes_out(run)

def comes_out(run):
    with tempfile.TemporaryDirectory() as where:
        n, epochs, vocab = run
        records = everywhere(run, where)
        for record in records:
            same_frame(record.to_df(), expected(run))
            assert record.epochs == sorted([(f, s, e) for f, e, s, _ in epochs], key=lambda k: (k[2], k[1]))
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
    record = fill(None, run)
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
                assert r.likely in {r.targ, *map(name, mine['pred'])}

@pytest.mark.parametrize('by', SCORES)
def test_every_score_is_at_hand(by):
    run = ({'train': 6, 'valid': 1}, [(0, e, 'train', rows([2, 0, 1, 3, 3], seed=e, ignored=.2)) for e in range(4)], None)
    got = fill(None, run).score(by)
    assert got.dtype == np.float64 and len(got) == 6 and np.isnan(got[4:]).all()
    assert np.isnan(got).all() == (by in ('entropy', 'grand', 'worst'))

def test_a_score_of_one_s_own():
    class Last(Reducer):
        columns = ('loss', 'targ')
        def init(self, n): return dict(v=np.full(n, np.nan))
        def update(self, state, item, loss, targ, **_): state['v'][item] = loss
        def finalize(self, state): return state['v']
    run = ({'train': 4, 'valid': 1}, [(0, e, 'train', rows([2, 0, 1], seed=e, ignored=0)) for e in range(3)], None)
    record = fill(None, run)
    got = record.score(Last())
    np.testing.assert_array_equal(got, expected(run).query('epoch == 2').set_index('item')['loss'].reindex(range(4)).astype(float))
    assert record.top(9, Last())['item'].tolist() == np.argsort(-got[:3]).tolist()
    np.testing.assert_array_equal(record.score(MeanColumn('loss')), record.score('loss'))

def test_mixed_and_padding_rows_count_by_their_share():
    cols = rows([0, 0, 1, 2], ignored=0)
    cols.update(lam=np.array([.25, 1., np.nan, .5]), partner=np.array([1, 0, -1, 0]), padding=np.array([False, False, False, True]))
    for path in (None, tempfile.mkdtemp()):
        writer = XentWriter(path)
        writer.set_items('train', frame(3), 'f')
        put(writer, 0, 0, 'train', cols)
        record = writer.record
        loss = cols['loss'].astype(float)
        np.testing.assert_allclose(record.score('loss'), [(.25 * loss[0] + loss[1]) / 1.25, loss[2], np.nan])


def test_repr():
    assert 'nothing recorded yet' in repr(XentWriter().record)
    text = repr(fill(None, RUN))
    for word in ('in memory', '2 fits', 'train: 6 items, 3 epochs (0 to 2)', 'valid: 3 items', '4 classes: a, b, c, d'): assert word in text
    n = XentWriter()
    n.set_items('train', frame(1234567), 'f')
    assert '1,234,567 items' in repr(n.record)

def test_other_items_are_another_segment(tmp_path):
    for path in (None, tmp_path / 'r'):
        writer = XentWriter(path)
        record = fill(writer, RUN)
        writer.set_items('train', frame(4, 'other {}'), 'another hash', epoch=3)
        put(writer, 1, 3, 'train', rows([0, 1, 2, 3], ignored=0))
        writer.set_items('train', frame(6, 'train {}'), 'hash of train', epoch=4)    # the first items come back
        put(writer, 1, 4, 'train', rows([0, 1], seed=4, ignored=0))
        for o in [record] if path is None else [record, XentRecord(path)]:
            assert o.items('train')['name'][0] == 'train 0' and o.items('train', segment=1)['name'][0] == 'other 0'
            assert o.item(0)['epoch'].tolist() == [0, 1, 2, 4] and o.item(0, segment=1)['epoch'].tolist() == [3]
            assert len(o.score('loss')) == 6 and len(o.score('loss', segment=1)) == 4
            with pytest.raises(IndexError): o.item(4, segment=1)
            with pytest.raises(IndexError): o.item(0, segment=2)

def test_another_process_still_writes(tmp_path):
    writer = XentWriter(tmp_path / 'r')
    record = fill(writer, RUN)
    reader = XentRecord(tmp_path / 'r')
    put(writer, 1, 3, 'train', rows([4, 2], ignored=0))
    assert reader.n_epochs == 4 and len(reader.to_df(epoch=-1)) == 2 and len(reader.item(4)) == 1
    np.testing.assert_array_equal(reader.score(), record.score())

def test_nothing_recorded_is_counted_as_nothing():
    record = XentWriter().record
    assert (record.n_epochs, record._n_fits, record.epochs, record.splits) == (0, 0, [], [])

def test_losses_that_do_not_add_up_are_told_of_their_split():
    record = fill(None, RUN)
    record.meta['ledger'] = [[0, 'train', 1, 'a sentence'], [0, 'valid', 2, 'another']]
    told = {o: record._told_ledger(o) for o in ('train', 'valid', 'test', None)}
    assert 'train' in told['train'] and 'valid' not in told['train'] and 'train' not in told['valid'] and not told['test']
    assert 'train' in told[None] and 'valid' in told[None]


# -- refusals

def test_refusals(tmp_path):
    path = tmp_path / 'r'
    record = fill(path, RUN)
    for wrong in (record, fill(None, RUN)):
        for ask in (lambda: wrong.top(split='test'), lambda: wrong.to_df('test'), lambda: wrong.items('test'), lambda: wrong.item(0, 'test'), lambda: wrong.score(split='test')):
            with pytest.raises(KeyError, match="no split 'test'.*train, valid"): ask()
        for i in (-1, 6, 99):
            with pytest.raises(IndexError, match=f"item {i} .*'train'.*0 to 5"): wrong.item(i)
        for e in (7, -4):
            with pytest.raises(KeyError, match=f"no epoch {e}.*last one is 2"): wrong.to_df(epoch=e)
        with pytest.raises(KeyError, match="'fame'.*margin_loss"): wrong.score('fame')
        with pytest.raises(duckdb.Error): wrong.sql('select nothing from nowhere')
    with pytest.raises(KeyError, match='nothing was recorded yet'): XentWriter().record.top()
    with pytest.raises(FileExistsError, match='resume=True.*overwrite=True'): XentWriter(path)
    with pytest.raises(FileNotFoundError, match='no _record.json'): XentRecord(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='no _record.json'): XentRecord(path / 'rows')
    assert not (tmp_path / 'nowhere').exists()

def test_a_newer_format(tmp_path):
    path = tmp_path / 'r'
    fill(path, RUN)
    meta = json.loads((path / '_record.json').read_text())
    (path / '_record.json').write_text(json.dumps({**meta, 'format': FORMAT + 1}))
    for ask in (lambda: XentRecord(path), lambda: XentRecorder(path, resume=True)):
        with pytest.raises(ValueError, match=f'format {FORMAT + 1}.*update fastai_xent'): ask()
    with pytest.raises(FileExistsError): XentWriter(path)
    (path / '_record.json').write_text(json.dumps({**meta, 'unknown': 1}))
    assert XentRecord(path).n_epochs == 3



def test_a_score_that_nobody_has_is_an_error():
    "An empty table would look as if there were nothing to see."
    w = XentWriter(items=range(3))
    w.add(split='train', epoch=0, item=[0, 1, 2], pred=torch.eye(3), targ=torch.tensor([0, 1, 1]))
    w.close()
    record = w.record
    with pytest.raises(ValueError, match="no item of 'train' has the score 'grand'.*head='auto'.*it has the scores"): record.top(3, by='grand')
    assert len(record.top(3)) == 3

QUESTIONS = dict(top=lambda r: r.top(2), to_df=lambda r: r.to_df('train'), item=lambda r: r.item(1), sql=lambda r: r.sql('select avg(loss) from record'))

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('ask', QUESTIONS)
def test_a_torn_file_is_named(ask, packed, tmp_path):
    "Cut off at some places, or empty."
    record = fill(tmp_path/'r', RUN)
    if packed: record.compact()
    shutil.rmtree(tmp_path/'r'/'_running', ignore_errors=True)
    torn = sorted((tmp_path/'r'/'rows'/'train').rglob('*.parquet'))[0]
    data = torn.read_bytes()
    for bad in (data[:50], data[:-20], b''):
        torn.write_bytes(bad)
        with pytest.raises(OSError, match=re.escape(torn.name) + '.*torn or altered'): QUESTIONS[ask](XentRecord(tmp_path/'r'))


# -- lists of items

@pytest.fixture
def two_lists():
    "A record whose train set has other items, fewer, from epoch 3 on."
    writer = XentWriter()
    record = fill(writer, RUN)
    writer.set_items('train', frame(4, 'other {}'), 'another hash', epoch=3)
    put(writer, 1, 3, 'train', rows([0, 1, 2, 3], ignored=0))
    return record

ASK = dict(items=lambda r, **kw: r.items(**kw), score=lambda r, **kw: pd.DataFrame(dict(x=r.score('loss', **kw))), scores=lambda r, **kw: r.scores(**kw),
           item=lambda r, **kw: r.item(1, **kw), top=lambda r, **kw: r.top(2, 'loss', **kw), seen=lambda r, **kw: r.seen(**kw))

@pytest.mark.parametrize('ask', ASK.values(), ids=ASK)
def test_the_last_list_is_meant_unless_another_is_asked_for(ask, two_lists):
    first, last = ask(two_lists, segment=0), ask(two_lists, segment=1)
    pd.testing.assert_frame_equal(ask(two_lists), last)
    assert not first.equals(last)

def test_the_last_list_is_meant_inside_too(two_lists):
    assert two_lists._list('train') == two_lists._segment('train').k == 1
    with pytest.raises(IndexError, match="segment -2 of split 'train' does not exist; it has 2"): two_lists.items(segment=-2)


# -- an item by its name

def test_an_item_is_found_by_its_name_or_refused():
    writer, names = XentWriter(), frame(6)
    names['name'] = ['a', 'b', 'c', 'b', 'b', '7']
    writer.set_items('train', names, 'f')
    put(writer, 0, 0, 'train', rows(range(6), ignored=0))
    record = writer.record
    pd.testing.assert_frame_equal(record.item('c'), record.item(2))
    pd.testing.assert_frame_equal(record.item('7'), record.item(5))
    with pytest.raises(KeyError, match="no item of 'train' is called 'd', expected one"): record.item('d')
    with pytest.raises(KeyError, match="3 items of 'train' are called 'b', expected one: 1, 3, 4; give the index"): record.item('b')


def test_the_scores_of_the_list_asked_for_are_named():
    "Here the first list has no losses, and the last has."
    writer = XentWriter()
    for k, epoch in enumerate((0, 1)):
        writer.set_items('train', frame(4, f'list {k}' + ' {}'), f'hash {k}', epoch=epoch)
        cols = rows(range(4), ignored=0)
        if not k: cols['loss'][:] = cols['grad_norm'][:] = np.nan
        put(writer, 0, epoch, 'train', cols)
    with pytest.raises(ValueError, match="no item of 'train' has the score 'loss'.*it has the scores") as e: writer.record.top(by='loss', segment=0)
    named = str(e.value).partition('it has the scores ')[2].split(', ')
    assert 'el2n' in named and 'loss' not in named
    assert len(writer.record.top(by='loss')) == 4


# -- ranks

def test_the_first_are_those_of_a_whole_sort():
    "With ties, and items without a score."
    x = np.random.default_rng(0).integers(0, 90, 200).astype(float)
    x[::7] = np.nan
    order = [i for i in np.argsort(x, kind='stable') if not np.isnan(x[i])]
    for k in range(202): assert _first(x, k).tolist() == order[:k]
    distinct = np.random.default_rng(1).permutation(500).astype(float)
    for k in range(502): assert _first(distinct, k).tolist() == np.argsort(distinct)[:k].tolist()

def test_scores_come_with_what_each_item_is_and_is_taken_for():
    "And there is no column without a score."
    record = fill(None, RUN)
    scores, top = record.scores(), record.top(6)
    assert list(scores)[:5] == ['item', 'name', 'source', 'targ', 'likely'] and 'grand' not in scores
    pd.testing.assert_frame_equal(scores.loc[top['item'], ['targ', 'likely']].reset_index(drop=True), top[['targ', 'likely']])

def test_the_last_step_is_that_of_the_last_row():
    "Of items that come several times in an epoch."
    writer, n = XentWriter(), 20
    writer.set_items('train', frame(n), 'f')
    for epoch in range(3):
        cols = rows(np.random.default_rng(epoch).permutation(np.repeat(np.arange(n), 2)), ignored=0)
        put(writer, 0, epoch, 'train', {**cols, 'step': np.arange(2 * n, dtype=np.int32) + epoch * 2 * n})
    last = writer.record.to_df('train', -1).groupby('item')['step'].max()
    for packed in False, True:
        if packed: writer.record.compact()
        seen = writer.record.seen()
        assert (seen['rows'] == 6).all() and (seen['last_epoch'] == 2).all()
        assert seen['last_step'].tolist() == last.tolist()


def test_a_map_has_floats_of_32_bits_and_whole_classes():
    writer = XentWriter()
    writer.set_items('train', frame(2), 'f')
    part = dict(loss=np.array([[.5, np.nan]], np.float32), pred=np.array([[3, -1]]))
    put(writer, 0, 0, 'train', rows([0, 1], ignored=0), maps={1: part})
    got = writer.record.map(1)
    assert {o: v.dtype for o, v in got.items()} == dict(loss=np.float32, pred=np.int64)
    for o, v in part.items(): np.testing.assert_array_equal(got[o], v)
