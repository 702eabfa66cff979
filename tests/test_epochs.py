"Which file holds which epoch: what `compact` may not change, older formats, strangers in the directory."
import os

import pandas as pd
import pytest
from helpers import learner
from runs import RUN, everything, fill, frame, put, rows, same_answers, update_scores

from fastai_xent import epochs
from fastai_xent.files import Place
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.writer import XentWriter


SEGMENTS = [(2, 4, 'another hash', [0, 1, 2, 3]), (3, 6, 'hash of train', [0, 5])]
def two_segments(writer):
    fill(writer, RUN)
    for e, n, mark, items in SEGMENTS:
        writer.set_items('train', frame(n, mark + ' {}'), mark, epoch=e + 1)
        put(writer, 1, e + 1, 'train', rows(items, seed=e))
    writer.close()
    return writer.record

def one_segment(writer): return fill(writer, RUN)

@pytest.mark.parametrize('path, make', [
    ('r', one_segment), ('with [brackets] & spaces', one_segment), ('memory://compact/r', two_segments),
    *(pytest.param(*o, marks=pytest.mark.slow) for o in
      [('r', two_segments), ('with [brackets] & spaces', two_segments), ('memory://compact/r', one_segment)])])
def test_compact_changes_no_answer(path, make, tmp_path, monkeypatch):
    path = path if '://' in path else tmp_path / path
    writer = XentWriter(path, overwrite=True)
    record = make(writer)
    want = everything(record)
    monkeypatch.setattr(epochs, 'GROUP', 2)
    record.compact()
    names = ['rows/train/compact-1.parquet', 'rows/valid/compact-1.parquet']
    assert record._place.files('rows') == names
    for r in (record, XentRecord(path)): same_answers(everything(r), want)
    record.compact()
    assert record._place.files('rows') == names
    if '://' not in str(path):
        assert len(pd.read_parquet(path / 'rows')) == len(record.to_df())
    more = rows([1, 2, 0], seed=8)
    last = record.n_epochs
    put(writer, 1, last, 'train', more)
    update_scores(record)
    other = XentWriter()
    fresh = make(other)
    put(other, 1, last, 'train', more)
    same_answers(everything(XentRecord(path)), everything(fresh))
    with pytest.raises(ValueError, match='what was compacted is not replaced'): put(writer, 0, 0, 'train', more)
    writer.close()
    record.compact()
    assert record._place.files('rows') == ['rows/train/compact-2.parquet', 'rows/valid/compact-1.parquet']
    same_answers(everything(XentRecord(path)), everything(fresh))

class Death(BaseException): pass

@pytest.mark.parametrize('what', ['replace', 'fsync', 'remove'])
@pytest.mark.parametrize('k', [0, 1, 2, *(pytest.param(k, marks=pytest.mark.slow) for k in range(3, 8))])
def test_compact_survives_a_death(what, k, tmp_path, monkeypatch):
    "At any rename, flush or removal: all answers stay, and another call completes it."
    record = fill(tmp_path / 'r', RUN)
    want, calls = everything(record), []
    def deadly(real):
        def f(*args, **kw):
            calls.append(1)
            if len(calls) > k: raise Death
            return real(*args, **kw)
        return f
    with monkeypatch.context() as m:
        owner, name = (Place, 'remove') if what == 'remove' else (os, what)
        m.setattr(owner, name, deadly(getattr(owner, name)))
        try: record.compact()
        except Death: pass
    same_answers(everything(XentRecord(tmp_path / 'r')), want)
    again = XentRecord(tmp_path / 'r')
    again.compact()
    same_answers(everything(again), want)
    assert again._place.files('rows') == ['rows/train/compact-1.parquet', 'rows/valid/compact-1.parquet']

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
    XentWriter(tmp_path / 'r', overwrite=True)
    XentWriter(tmp_path / 'r')                                     # the lock alone is nobody's
