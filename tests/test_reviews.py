"Decisions beside the record: none is lost, each is about the right item, and they order what comes next."
import json
import os
import subprocess
import sys
import uuid

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from fastai_xent.record import XentRecord
from fastai_xent.reviews import COLUMNS, Reviews, learnt_order, learnt_pairs, standing
from fastai_xent.writer import XentWriter

VOCAB = ['cat', 'dog', 'fox']
NAMES = [f'{o}.png' for o in 'abcdef']
LABELS = [0, 1, 2, 0, 1, 2]


def record_of(path=None, names=NAMES, targ=LABELS, vocab=VOCAB, splits=('train',), pred=None, **kw) -> XentRecord:
    "A record of one epoch whose items have these names, labels and predictions; the first has the largest loss."
    writer, n = XentWriter(path, **kw), len(targ)
    items = pd.DataFrame(dict(item=range(n), name=names, source=pd.NA))
    for split in splits:
        writer.set_items(split, items, f'{n} {names}', vocab)
        p, targ, pred = np.linspace(.1, .9, n).astype(np.float32), np.array(targ), np.array(targ if pred is None else pred)
        margin = np.where(pred == targ, 10, -10) * p
        writer.write(0, 0, split, dict(item=np.arange(n), loss=-np.log(p), grad_norm=p, el2n=p, p_targ=p, margin=margin, targ=targ, pred=pred))
    writer.close()
    return writer.record

def told(reviews) -> list: return reviews.decisions[['item', 'decision', 'label']].values.tolist()


# -- kept

@pytest.fixture(params=['disk', 'memory', 'store'])
def path(request, tmp_path): return dict(disk=tmp_path/'run', memory=None, store=f'memory://{uuid.uuid4().hex}')[request.param]

def test_decisions_are_read_again_from_any_place(path):
    record = record_of(path)
    a = Reviews(record, 'ann')
    a.decide([0], 'keep')
    a.decide([1, 2], 'relabel', ['fox', 'cat'])
    a.decide([3], 'drop')
    a.decide([4], 'unsure')
    again = Reviews(record if path is None else XentRecord(path))
    pd.testing.assert_frame_equal(again.decisions, a.decisions)
    assert told(again) == [[0, 'keep', 'cat'], [1, 'relabel', 'fox'], [2, 'relabel', 'cat'], [3, 'drop', None], [4, 'unsure', None]]
    df = again.decisions
    assert list(df) == COLUMNS and df['name'].tolist() == NAMES[:5] and df['given'].tolist() == ['cat', 'dog', 'fox', 'cat', 'dog']
    assert {*df['who']} == {'ann'} and str(df['when'].dt.tz) == 'UTC'

def test_the_directory_is_read_as_before(tmp_path):
    record_of(tmp_path/'run')
    before = pd.read_parquet(tmp_path/'run')
    Reviews(XentRecord(tmp_path/'run')).decide([0], 'keep')
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path/'run'), before)
    pd.testing.assert_frame_equal(XentRecord(tmp_path/'run').to_df(), record_of(tmp_path/'other').to_df())

def test_nobody_decided_yet():
    df = Reviews(record_of()).decisions
    assert list(df) == COLUMNS and df.empty and df['item'].dtype == np.int64 and str(df['when'].dt.tz) == 'UTC'

DIE = """
import os, sys
from fastai_xent.record import XentRecord
from fastai_xent.reviews import Reviews

def die(who, item):
    r = Reviews(XentRecord(sys.argv[1]), who)
    r.decide([0], 'drop')
    r.decide([item], 'keep')
    os._exit(9)

for k, who in enumerate('abc'):
    if not os.fork(): die(who, k + 1)
assert [os.waitstatus_to_exitcode(os.wait()[1]) for _ in 'abc'] == [9] * 3
"""

@pytest.mark.skipif(os.name != 'posix', reason='no fork')
def test_processes_that_die_lose_nothing(tmp_path):
    "Three at the same time, each killed right after its last decision."
    record_of(tmp_path/'run')
    subprocess.run([sys.executable, '-W', 'ignore', '-c', DIE, str(tmp_path/'run')], check=True)
    df = Reviews(XentRecord(tmp_path/'run')).decisions
    assert df['item'].tolist() == [0, 1, 2, 3] and df['decision'].tolist() == ['drop', 'keep', 'keep', 'keep']
    assert df['who'].tolist()[1:] == ['a', 'b', 'c']

def test_a_write_that_fails_decides_nothing(tmp_path, monkeypatch):
    r = Reviews(record_of(tmp_path/'run'))
    def full(*_, **kw): raise OSError('no space left')
    with monkeypatch.context() as m:
        m.setattr(type(r.place), 'write', full)
        with pytest.raises(OSError, match='no space'): r.decide([0], 'keep')
    assert r.decisions.empty
    r.decide([1], 'keep')
    assert told(Reviews(XentRecord(tmp_path/'run'))) == [[1, 'keep', 'dog']]

def test_many_actions_are_kept_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr('fastai_xent.reviews._FULL', 3)
    r = Reviews(record_of(tmp_path/'run'))
    for k in range(8): r.decide([k % 6], ['keep', 'drop'][k // 6])
    assert len(list((tmp_path/'run'/'_reviews').iterdir())) == 3
    assert Reviews(XentRecord(tmp_path/'run')).decisions['decision'].tolist() == ['drop', 'drop', 'keep', 'keep', 'keep', 'keep']

def test_a_run_that_is_overwritten_keeps_them(tmp_path):
    "So do a run that died after it, and another order of the items; a directory of decisions alone is no stranger."
    Reviews(record_of(tmp_path/'run')).decide([0, 5], 'relabel', 'dog')
    XentWriter(tmp_path/'run', overwrite=True)
    order = [5, 3, 0, 1, 2, 4]
    record = record_of(tmp_path/'run', [NAMES[i] for i in order], [LABELS[i] for i in order], overwrite=True)
    assert told(Reviews(record)) == [[0, 'relabel', 'dog'], [2, 'relabel', 'dog']]


# -- undone

def test_undo_takes_back_whole_actions_back_to_the_first():
    r = Reviews(record_of())
    r.decide([0, 1], 'keep')
    r.decide([1, 2], 'drop')
    assert r.undo()['item'].tolist() == [1, 2] and told(r) == [[0, 'keep', 'cat'], [1, 'keep', 'dog']]
    r.decide([3], 'unsure')
    assert r.undo()['item'].tolist() == [3] and r.undo()['decision'].tolist() == ['keep', 'keep']
    assert r.decisions.empty and r.undo().empty and list(r.undo()) == COLUMNS

def test_undo_goes_on_after_a_restart_and_touches_nobody_elses(tmp_path):
    record_of(tmp_path/'run')
    mine, other = Reviews(XentRecord(tmp_path/'run'), 'ann'), Reviews(XentRecord(tmp_path/'run'), 'bob')
    mine.decide([0], 'keep')
    other.decide([1], 'keep')
    later = Reviews(XentRecord(tmp_path/'run'), 'ann')
    assert later.undo()['item'].tolist() == [0] and later.undo().empty
    assert told(Reviews(XentRecord(tmp_path/'run'))) == [[1, 'keep', 'dog']]

def test_two_kernels_of_one_person_undo_each_its_own_first(tmp_path):
    record_of(tmp_path/'run')
    a, b = (Reviews(XentRecord(tmp_path/'run'), 'ann') for _ in range(2))
    a.decide([0], 'keep')
    b.decide([1], 'keep')
    a.refresh()
    assert a.undo()['item'].tolist() == [0]

def test_a_clock_that_goes_wrong_changes_no_order(tmp_path):
    record_of(tmp_path/'run')
    r = Reviews(XentRecord(tmp_path/'run'))
    r.decide([0], 'drop')
    file, = (tmp_path/'run'/'_reviews').iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), 'when': '2999-01-01T00:00:00.000000+00:00'}) + '\n')
    later = Reviews(XentRecord(tmp_path/'run'))
    later.decide([0], 'keep')
    assert told(later) == [[0, 'keep', 'cat']] == told(Reviews(XentRecord(tmp_path/'run')))

@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=12))
def test_what_stands_is_what_a_stack_has(steps):
    "An action, or an undo of one of those before."
    log, stack = [], []
    for k, (kind, which) in enumerate(steps):
        if kind or not stack:
            log.append(dict(id=str(k), when=f'{k:02}'))
            stack.append(log[-1])
        else: log.append(dict(id=str(k), when=f'{k:02}', undo=stack.pop(which % len(stack))['id']))
    assert standing(log[::-1]) == stack


# -- the right item, or none

NOW = dict(fewer=(NAMES[2:], LABELS[2:], [0, 3]), turned=(NAMES[::-1], LABELS[::-1], [0, 3]),
           grown=(['new.png', *NAMES], [0, *LABELS], [3, 6]), numbers=([10, 11, 12, 13, 14, 15], LABELS, []),
           twice=(['c.png', 'c.png', 'f.png'], [2, 2, 2], [2]))

@pytest.mark.parametrize('case', NOW)
def test_other_items_under_the_same_path(tmp_path, case):
    "Items c and f were decided about."
    Reviews(record_of(tmp_path/'run')).decide([2, 5], 'relabel', 'cat')
    names, targ, want = NOW[case]
    r = record_of(tmp_path/'run', names, targ, overwrite=True)
    if len(want) == 2: assert Reviews(r).decisions['item'].tolist() == want
    else:
        with pytest.warns(UserWarning, match='set aside'): assert Reviews(r).decisions['item'].tolist() == want

def test_what_was_set_aside_comes_back(tmp_path):
    Reviews(record_of(tmp_path/'run')).decide([0], 'drop')
    with pytest.warns(UserWarning, match='1 decision is set aside'): Reviews(record_of(tmp_path/'run', NAMES[1:], LABELS[1:], overwrite=True)).decisions
    assert told(Reviews(record_of(tmp_path/'run', overwrite=True))) == [[0, 'drop', None]]

UNNAMED = dict(same=(LABELS, [1, 2]), as_given=([0, 1, 0, 0, 1, 2], [1, 2]), other=([1, 2, 2, 0, 1, 2], []))

@pytest.mark.parametrize('case', UNNAMED)
def test_items_without_names_are_known_by_their_labels(tmp_path, case):
    "Item 1, a dog, was kept; item 2, a fox, was called a cat. The fingerprint cannot tell the lists apart."
    r = Reviews(record_of(tmp_path/'run', None))
    r.decide([1], 'keep')
    r.decide([2], 'relabel', 'cat')
    targ, want = UNNAMED[case]
    now = Reviews(record_of(tmp_path/'run', None, targ, overwrite=True))
    if want: assert now.decisions['item'].tolist() == want
    else:
        with pytest.warns(UserWarning, match='2 decisions are set aside'): assert now.decisions.empty

def test_splits_are_kept_apart(tmp_path):
    r = Reviews(record_of(tmp_path/'run', splits=('train', 'valid')))
    r.decide([0], 'drop')
    r.decide([0], 'keep', split='valid')
    assert r.decisions[['split', 'item', 'decision']].values.tolist() == [['train', 0, 'drop'], ['valid', 0, 'keep']]

def test_names_that_are_numbers_and_classes_without_names(tmp_path):
    r = Reviews(record_of(tmp_path/'run', range(100, 106), vocab=None))
    r.decide([0], 'relabel', 2)
    row = Reviews(XentRecord(tmp_path/'run')).decisions.iloc[0]
    assert (row['name'], row['label'], row['given']) == (100, 2, 0)

NASTY = ['<img src=x onerror=alert(1)>', '"\\\n\u2028', 'Größe 🙂', '']

@pytest.mark.parametrize('name', NASTY, ids=['html', 'escapes', 'unicode', 'empty'])
def test_names_of_any_letters(tmp_path, name):
    r = Reviews(record_of(None, [name, 'b'], [0, 1], vocab=[name + ' class', 'dog']))
    r.decide([0, 1], 'keep')
    r.refresh()
    assert r.decisions['name'].tolist() == [name, 'b']


# -- refused

WRONG = [(dict(items=[0], decision='Keep'), ValueError, "'Keep' is no decision, expected one of keep, drop, relabel, unsure"),
         (dict(items=[0], decision='relabel'), ValueError, "'relabel' needs `label=`"),
         (dict(items=[0], decision='keep', label='cat'), ValueError, "the other decisions have none"),
         (dict(items=[0, 1], decision='relabel', label=['cat']), ValueError, "1 labels for 2 items"),
         (dict(items=[0, 1], decision='relabel', label=['dog', 'cow']), ValueError, "'cow' is no class"),
         (dict(items=[6], decision='keep'), IndexError, "item 6 does not exist"),
         (dict(items=[-1], decision='keep'), IndexError, "item -1 does not exist"),
         (dict(items=['a.png'], decision='keep'), TypeError, "expected whole numbers"),
         (dict(items=[0], decision='keep', split='test'), KeyError, "no split 'test'")]

@pytest.mark.parametrize('kw, error, words', WRONG, ids=[o[2][:20] for o in WRONG])
def test_what_is_refused_saves_nothing(tmp_path, kw, error, words):
    r = Reviews(record_of(tmp_path/'run'))
    with pytest.raises(error, match=words): r.decide(**kw)
    assert r.decisions.empty and not (tmp_path/'run'/'_reviews').exists()

def test_to_give_the_label_it_has_is_to_keep_it():
    r = Reviews(record_of())
    r.decide([0, 1], 'relabel', 'cat')
    assert told(r) == [[0, 'keep', 'cat'], [1, 'relabel', 'cat']]


# -- what comes next

def counted(given, likely, wrong): return learnt_pairs(np.array(given), np.array(likely), np.array(wrong, dtype=bool))

def test_shares_by_hand():
    pairs = counted([0, 0, 1], [1, 1, 2], [1, 1, 0])
    np.testing.assert_allclose(pairs['share'], [(2 + 4 * .6) / 6, (0 + 4 * .6) / 5])
    np.testing.assert_allclose(pairs['pull'], pairs['share'] / .6)
    assert pairs[['given', 'likely', 'reviewed', 'wrong']].values.tolist() == [[0, 1, 2, 2], [1, 2, 1, 0]]

def test_one_review_says_little_and_many_say_much():
    pull = lambda n: counted([0] * n + [1] * n, [1] * n + [2] * n, [1] * n + [0] * n).set_index('given')['pull']
    assert 1 < pull(1)[0] < 1.25 and 1.9 < pull(100)[0] < 2 and pull(100)[1] < .1

def test_nothing_learnt_is_the_scores_order():
    score = np.array([1., np.nan, 3, 3, -np.inf, np.inf])
    order = learnt_order(score, np.zeros(6), np.ones(6), counted([], [], []))
    assert order.tolist() == [5, 2, 3, 0, 4]

@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.floats(-5, 5)), max_size=30),
       st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), max_size=30))
def test_each_item_comes_once_and_within_a_pair_the_order_is_the_scores(items, reviewed):
    given, likely, score = (np.array([o[k] for o in items]) for k in range(3))
    pairs = counted(*([o[k] for o in reviewed] for k in range(3)))
    before = pairs.copy()
    order = learnt_order(score.astype(float), given, likely, pairs)
    assert sorted(order) == [*range(len(items))]
    pd.testing.assert_frame_equal(pairs, before)
    for g in range(3):
        for k in range(3):
            mine = [score[i] for i in order if (given[i], likely[i]) == (g, k)]
            assert mine == sorted(mine, reverse=True)

def test_a_pair_found_wrong_comes_earlier():
    "Of two kinds in turn, the one that was always wrong comes first, by what the formula says."
    n = 40
    given, likely, score = np.arange(n) % 2, np.full(n, 2), -np.arange(n, dtype=float)
    pairs = counted([0] * 20 + [1] * 20, [2] * 40, [0] * 20 + [1] * 20)
    order = learnt_order(score, given, likely, pairs)
    pull = pairs.set_index('given')['pull']
    want = sorted(range(n), key=lambda i: (i + 1) / pull[i % 2])
    assert order.tolist() == want and given[order[:15]].mean() > .8
