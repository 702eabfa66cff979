"""Records of earlier formats open, are right, go on, and keep their layout.

`data/format-1.zip` and `data/format-2.zip` were written by the package of their time (commits 6d3b4f6^ and b40407f): the run `RUN`;
the second was asked for its scores and compacted, and then got one epoch more."""
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from runs import RUN, everything, fill, put, rows, same_answers

from helpers import learner

import fastai_xent.record as record_module
from fastai_xent.epochs import _OLD, FORMAT
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.records import XentRecords
from fastai_xent.writer import XentWriter

DATA = Path(__file__).parent / 'data'
N, EPOCHS, VOCAB = RUN
RUNS = {1: RUN, 2: (N, [*EPOCHS, (1, 3, 'train', rows([4, 2], seed=3))], VOCAB)}
EACH = pytest.mark.parametrize('k', RUNS)
OLD = {'record.json', 'items', 'epochs', 'compact', 'running', 'maps', 'probs', '.lock'}

@pytest.fixture
def old(k, tmp_path):
    with zipfile.ZipFile(DATA / f'format-{k}.zip') as z: z.extractall(tmp_path / 'r')
    assert json.loads((tmp_path / 'r/record.json').read_text())['format'] == k
    return tmp_path / 'r'

def names(path) -> set: return {o.name for o in path.iterdir()}

@EACH
def test_it_opens_and_is_right(k, old):
    same_answers(everything(XentRecord(old)), everything(fill(None, RUNS[k])))
    assert names(old) <= OLD

@EACH
def test_nothing_can_be_written(k, old, monkeypatch):
    "An archive is read as it is."
    from fastai_xent.files import Place
    want = everything(fill(None, RUNS[k]))
    def refuse(self, *_, **__): raise PermissionError(13, 'Read-only file system')
    monkeypatch.setattr(Place, 'write', refuse)
    before = {p: p.read_bytes() for p in old.rglob('*') if p.is_file()}
    same_answers(everything(XentRecord(old)), want)
    assert {p: p.read_bytes() for p in old.rglob('*') if p.is_file()} == before

@EACH
def test_it_goes_on_and_is_compacted(k, old):
    writer, fresh = XentWriter(old, resume=True), XentWriter()
    fill(fresh, RUNS[k])
    more = rows([5, 0, 2], seed=77, ignored=0)
    for w in (writer, fresh): put(w, 2, 4, 'train', more)
    writer.close()
    assert (old / 'epochs/fit=2/split=train/epoch=4/part-0.parquet').exists()
    same_answers(everything(XentRecord(old)), everything(fresh.record))
    XentRecord(old).compact()
    same_answers(everything(XentRecord(old)), everything(fresh.record))
    assert names(old) <= OLD and not [*(old / 'epochs').rglob('*.parquet')] and len([*(old / 'compact').rglob('*.parquet')]) == 2
    for w in (writer, fresh): put(w, 2, 5, 'valid', rows([1], seed=5, ignored=0))
    writer.close()
    same_answers(everything(XentRecord(old)), everything(fresh.record))

@EACH
def test_a_fit_goes_on_with_it(k, old):
    "With items of its own in a new list, in the old layout; the old rows stay."
    before = XentRecord(old).to_df()
    writer = XentWriter(old, resume=True)
    writer.set_items('train', pd.DataFrame(dict(item=np.arange(4), name=[7, 9, 11, 13], source=None)), 'numbers', epoch=4)
    put(writer, 2, 4, 'train', rows([3, 1], ignored=0))
    writer.close()
    record = XentRecord(old)
    assert record.items()['name'].tolist() == [7, 9, 11, 13] and len(record.top(9)) == 2 and names(old) <= OLD
    pd.testing.assert_frame_equal(record.to_df()[record.to_df()['epoch'] < 4], before)
    names_ = record.sql('select distinct name from items order by 1')['name'].tolist()
    assert '7' in names_ and 'train 0' in names_                # numbers beside texts

@EACH
def test_it_is_replaced_by_a_record_of_today(k, old):
    (old / 'notes.txt').write_text('mine')
    fill(old, RUN, overwrite=True)
    assert names(old) == {'_record.json', '_items', 'rows', '.lock', 'notes.txt'} and XentRecord(old).meta['format'] == FORMAT == 3

def test_beside_a_record_of_today(tmp_path):
    for k in RUNS:
        with zipfile.ZipFile(DATA / f'format-{k}.zip') as z: z.extractall(tmp_path / str(k))
    fill(tmp_path / '3', RUN)
    assert XentRecords(tmp_path / '*').scores()['1'].equals(XentRecords(tmp_path / '*').scores()['3'])

def test_a_learner_goes_on_in_the_old_layout(tmp_path, monkeypatch):
    path = tmp_path / 'r'
    with monkeypatch.context() as m:
        m.setattr(record_module, 'layout_of', lambda place: _OLD)
        learner([XentRecorder(path, precision='full')], n=20).fit(2)
    want = XentRecord(path).to_df()
    assert names(path) <= OLD
    learner([XentRecorder(path, resume=True)], n=20).fit(1)
    new = XentRecord(path)
    assert new.n_epochs == 3 and new.meta['precision'] == 'full' and names(path) <= OLD
    pd.testing.assert_frame_equal(new.to_df().query('epoch < 2'), want)
    new.compact()
    pd.testing.assert_frame_equal(new.to_df().query('epoch < 2'), want)
