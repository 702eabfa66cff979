"pandas, polars, pyarrow and DuckDB read a record's own directory without us: each row exactly once. And SQL with frames of one's own."
import shutil

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
from runs import RUN, fill, frame, put, rows

from fastai_xent.files import Place
from fastai_xent.record import XentRecord
from fastai_xent.writer import XentWriter


def by_polars(path):
    polars = pytest.importorskip('polars')
    return pd.DataFrame(polars.read_parquet(f'{path}/**/*.parquet').to_dict(as_series=False))

def by_spark(path):
    sql = pytest.importorskip('pyspark.sql', reason='install `pyspark` and Java to try Spark')
    spark = sql.SparkSession.builder.master('local[1]').config('spark.ui.enabled', 'false').getOrCreate()
    spark.catalog.clearCache()
    return pd.DataFrame([o.asDict() for o in spark.read.parquet(f'{path}/rows/*').collect()])

READERS = {
    'pandas': pd.read_parquet,
    'pandas, as text': lambda path: pd.read_parquet(str(path)),
    'polars': by_polars,
    'spark': by_spark,
    'duckdb': lambda path: duckdb.sql(f"select * from '{path}/**/*.parquet'").df(),
    'pyarrow': lambda path: ds.dataset(path).to_table().to_pandas(),
}

class Death(BaseException): pass

def plain(path): fill(path, RUN)

def compacted(path): fill(path, RUN).compact()

def mixed(path):
    "Some epochs in one file, new ones single."
    compacted(path)
    writer = XentWriter(path, resume=True)
    for s in ('train', 'valid'): put(writer, 2, 3, s, rows([0, 2, 1], seed=3))
    writer.close()

def train_eval(path):
    plain(path)
    writer = XentWriter(path, resume=True)
    writer.set_items('train_eval', frame(6, 'train {}'), 'hash of train')
    put(writer, 0, 0, 'train_eval', rows(range(6), seed=50))
    writer.close()

def parts(path):
    "As the four processes of a distributed training write them."
    writer = XentWriter(path)
    writer.set_items('train', frame(30), 'f')
    for e in range(2):
        cols = rows(np.random.default_rng(e).permutation(30), seed=e)
        for rank in range(4): put(writer, 0, e, 'train', {k: v[rank::4] for k, v in cols.items()}, rank=rank)
    writer.close()

def asked(path):
    "Running scores, maps and probabilities lie beside the rows."
    writer = XentWriter(path)
    fill(writer, RUN)
    put(writer, 1, 3, 'train', rows([0, 1]), maps={0: dict(loss=np.ones(3), pred=np.ones(3))}, probs=(np.array([0, 1]), np.full((2, 4), .25)))
    writer.close()
    XentRecord(path).scores()

def dying(path):
    "A process that died while it wrote."
    plain(path)
    for o in ('rows/train/.fit-2-epoch-003-part-0.parquet.4711-1.tmp', '_items/.train-1.pq.4711.tmp', '._record.json.4711.tmp'): (path / o).write_bytes(b'PAR1')

KINDS = [plain, compacted, mixed, train_eval, parts, asked, dying]

def same(df, record):
    own = record.to_df()
    cols = list(own)
    assert sorted(df) == sorted(cols)
    tidy = lambda d: d[cols].astype({'split': str}).astype({o: float for o in cols if o != 'split'}).sort_values(['epoch', 'split', 'item', 'occurrence', 'loss'], kind='stable', ignore_index=True)
    pd.testing.assert_frame_equal(tidy(df), tidy(own))

@pytest.mark.parametrize('make', KINDS)
@pytest.mark.parametrize('how', READERS)
def test_each_row_once(how, make, tmp_path):
    make(tmp_path / 'r')
    same(READERS[how](tmp_path / 'r'), XentRecord(tmp_path / 'r'))

@pytest.mark.parametrize('k', range(6))
def test_a_death_while_it_was_compacted(k, tmp_path, monkeypatch):
    "Rows lie there twice until somebody opens the record; then once, for everyone."
    record, calls, real = fill(tmp_path / 'r', RUN), [], Place.remove
    want = record.to_df()
    def deadly(self, name):
        calls.append(name)
        if len(calls) > k: raise Death
        real(self, name)
    with monkeypatch.context() as m:
        m.setattr(Place, 'remove', deadly)
        with pytest.raises(Death): record.compact()
    pd.testing.assert_frame_equal(XentRecord(tmp_path / 'r').to_df(), want)
    for how in READERS: same(READERS[how](tmp_path / 'r'), record)

def test_a_reader_tidies_nothing_while_a_fit_writes(tmp_path):
    "What somebody else is about to compact or to write stays."
    writer = XentWriter(tmp_path / 'r')
    fill(writer, RUN)
    shutil.copytree(tmp_path / 'r/rows', tmp_path / 'rows')
    writer.record.compact()
    shutil.copytree(tmp_path / 'rows', tmp_path / 'r/rows', dirs_exist_ok=True)
    put(writer, 1, 3, 'train', rows([0]))
    XentRecord(tmp_path / 'r')
    assert (tmp_path / 'r/rows/train/fit-0-epoch-000-part-0.parquet').exists()
    writer.close()
    XentRecord(tmp_path / 'r')
    assert not (tmp_path / 'r/rows/train/fit-0-epoch-000-part-0.parquet').exists()
    assert len(pd.read_parquet(tmp_path / 'r')) == 25


# -- SQL

@pytest.fixture(params=['memory', 'disk', 'odd [disk] *', 'bucket'])
def record(request, tmp_path):
    path = dict(memory=None, disk=tmp_path / 'r', bucket=f'memory://sql/{tmp_path.name}').get(request.param, tmp_path / request.param)
    return fill(path, RUN)

def test_frames_of_ones_own(record):
    "By their names, and no other variable."
    notes = pd.DataFrame(dict(item=[0, 1], note=['dark', 'cut off']))
    got = record.sql("select distinct item, note from record join mine using (item) where split = 'train' order by item", mine=notes)
    assert got['note'].tolist() == ['dark', 'cut off']
    assert record.sql('select count(*) n from a join b using (item)', a=notes, b=notes).n[0] == 2
    for hidden in ('notes', 'record_', 'rows', 'RUN', 'self', 'frames', 'parts'):
        with pytest.raises(duckdb.CatalogException, match=f'{hidden} does not exist'): record.sql(f'select * from {hidden}')
    for taken in ('record', 'items', 'classes', 'Record', 'ITEMS', 'Classes', '_rows_0'):
        with pytest.raises(ValueError, match=f"'{taken}' is a table of the record"): record.sql('select 1', **{taken: notes})
    with pytest.raises(ValueError, match="'a' and 'A' are one name in SQL"): record.sql('select 1', a=notes, A=notes)
    for nothing in ('', ' ', '-- a remark'):
        with pytest.raises(ValueError, match='asks nothing'): record.sql(nothing)

def test_names_in_answers(record):
    label = int(record.to_df('train')['targ'].dropna().iloc[0])
    got = record.sql(f"select item, targ, pred, loss from record where split = 'train' and targ = '{'abcd'[label]}' order by epoch, item, occurrence", names=True)
    plain = record.to_df('train').query(f'targ == {label}')
    assert len(got) == len(plain) > 0 and got['pred'].tolist() == [list('abcd')[int(o)] for o in plain['pred']]
    assert record.sql('select class, name from classes')['name'].tolist() == list('abcd')
    by_class = record.sql('select name, count(*) n from record join classes on targ = class group by name order by name')
    want = record.to_df().groupby('targ').size()
    assert by_class['n'].tolist() == want.tolist() and by_class['name'].tolist() == [list('abcd')[i] for i in want.index]
    df, numbers = record.to_df(names=True), record.to_df()
    pd.testing.assert_frame_equal(df.drop(columns=['name', 'pred', 'targ', 'partner']), numbers.drop(columns=['pred', 'targ', 'partner']))
    assert df['name'].tolist() == [f'{s} {i}' for s, i in zip(numbers['split'], numbers['item'])]
    for o in ('pred', 'targ'): assert [None if pd.isna(v) else v for v in df[o]] == [None if pd.isna(v) else 'abcd'[v] for v in numbers[o]]
    item = record.item('train 3', names=True)
    assert item['pred'].tolist() == [None if pd.isna(v) else 'abcd'[int(v)] for v in record.item(3)['pred']]

def test_an_item_by_its_name(record):
    pd.testing.assert_frame_equal(record.item('train 3'), record.item(3))
    pd.testing.assert_frame_equal(record.item('valid 1', 'valid'), record.item(1, 'valid'))
    with pytest.raises(KeyError, match="no item of 'train' is called 'valid 1', expected one"): record.item('valid 1')

def test_names_that_are_not_alone_and_names_that_are_numbers(tmp_path):
    writer = XentWriter(tmp_path / 'r')
    writer.set_items('train', frame(3).assign(name=['a', 'b', 'a']), 'f')
    writer.set_items('valid', frame(3).assign(name=[30, 10, 20]), 'g')
    put(writer, 0, 0, 'train', {**rows([0, 1, 2], ignored=0), 'lam': np.full(3, .5), 'partner': np.array([1, 2, 0])})
    put(writer, 0, 0, 'valid', rows([2, 0, 1], ignored=0))
    writer.close()
    record = XentRecord(tmp_path / 'r')
    with pytest.raises(KeyError, match="2 items of 'train' are called 'a', expected one: 0, 2; give the index"): record.item('a')
    assert record.items('valid')['name'].dtype == np.int64 and len(record.item('30', 'valid')) == 1
    df = pd.DataFrame(dict(note=['ten', 'twenty', 'thirty']), index=[10, 20, 30])
    assert df.loc[record.top(3, split='valid')['name']]['note'].notna().all()
    assert record.to_df('train', names=True)['partner'].tolist() == ['b', 'a', 'a']
    assert record.item(0, names=True)['partner'].tolist() == ['b'] and record.item(0)['partner'].tolist() == [1]
    assert record.sql('select name from items order by split, item')['name'].tolist() == ['a', 'b', 'a', '30', '10', '20']
    assert record.to_df(names=True)['name'].tolist() == ['a', 'b', 'a', 30, 10, 20]
