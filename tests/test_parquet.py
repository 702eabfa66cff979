"Rows in a file: sorted, null where a number does not apply, few digits, encodings that others read."
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import FLOATS, learner
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import RUN, fill, frame, put

from fastai_xent.parquet import ALL, read_items, row_tables, shorten, write_rows
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.writer import XentWriter


def test_nulls_and_order_in_files(tmp_path):
    fill(tmp_path / 'r', RUN)
    files = sorted((tmp_path / 'r' / 'rows').rglob('*.parquet'))
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
    json.loads((tmp_path / 'r' / '_record.json').read_text())

def test_encodings_that_older_readers_know(tmp_path):
    "Whole numbers in BYTE_STREAM_SPLIT are Parquet of 2024; DuckDB 1.5 refuses them."
    r = fill(tmp_path / 'r', RUN)
    r.scores()
    r.compact()
    files = [f for o in ('*.parquet', '*.pq') for f in (tmp_path / 'r').rglob(o)]
    assert {f.relative_to(tmp_path / 'r').parts[0] for f in files} == {'rows', '_items', '_running'}
    for f in files:
        m = pq.read_metadata(f)
        for g in range(m.num_row_groups):
            columns = [m.row_group(g).column(j) for j in range(m.num_columns)]
            assert [c.path_in_schema for c in columns if 'BYTE_STREAM_SPLIT' in c.encodings and c.physical_type not in ('FLOAT', 'DOUBLE')] == []

def test_a_column_that_begins_with_nothing(tmp_path):
    "The first rows decide how a column is compressed, not what it may hold."
    cols = dict(item=np.arange(6), lam=np.array([np.nan] * 4 + [.25, .5]), partner=np.array([-1] * 4 + [0, 1]), pred=np.ones(6, int), targ=np.ones(6, int))
    with open(tmp_path / 'x', 'wb') as f: write_rows(f, row_tables(cols, (0, 'train', 0), rows=2))
    t = read_items(tmp_path / 'x', 0, 6, ['lam', 'item', 'partner', 'grand'])
    assert t.schema.equals(pa.schema([ALL.field(o) for o in ('lam', 'item', 'partner', 'grand')]))
    assert t.to_pydict() == dict(lam=[None] * 4 + [.25, .5], item=[*range(6)], partner=[None] * 4 + [0, 1], grand=[None] * 6)

def test_nothing_is_read_of_a_column_that_holds_nothing(tmp_path, monkeypatch):
    "Nor of one that an older file does not have."
    asked, read = [], pq.ParquetFile.read_row_groups
    monkeypatch.setattr(pq.ParquetFile, 'read_row_groups', lambda *a, columns, **kw: asked.append(columns) or read(*a, columns=columns, **kw))
    cols = dict(item=np.arange(6), pred=np.ones(6, int), targ=np.ones(6, int))
    with open(tmp_path / 'x', 'wb') as f: write_rows(f, row_tables(cols, (0, 'train', 0)))
    pq.write_table(pa.table({'item': pa.array(range(6), pa.int32()), 'targ': pa.array([1] * 6, pa.int32())}), tmp_path / 'older')
    for name in ('x', 'older'):
        t = read_items(tmp_path / name, 2, 4, ['item', 'worst', 'targ', 'loss'])
        assert t.to_pydict() == dict(item=[2, 3], worst=[None] * 2, targ=[1, 1], loss=[None] * 2)
        assert t.schema.equals(pa.schema([ALL.field(o) for o in t.column_names]))
    assert asked == [['item', 'targ']] * 2

def test_no_rows_are_read_as_none(tmp_path):
    with open(tmp_path / 'x', 'wb') as f: write_rows(f, [])
    assert read_items(tmp_path / 'x', 0, 9, ['item', 'loss', 'split']).to_pydict() == dict(item=[], loss=[], split=[])

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
        writer = XentWriter(path, **how)
        writer.set_items('train', frame(2000), 'f')
        put(writer, 0, 0, 'train', cols)
        record = writer.record
        df = record.to_df()
        for o in ('item', 'pred', 'targ', 'step'): np.testing.assert_array_equal(df[o], cols[o])
        for o in ('loss', 'grad_norm', 'el2n', 'p_targ', 'margin', 'entropy', 'grand'):
            error = np.abs(df[o].to_numpy(float) / cols[o].astype(float) - 1).max()
            assert 2.**-10 < error <= 2.**-9 if path == tmp_path / 'short' else error == 0
    with pytest.raises(ValueError, match="precision is 'half', expected 'short' or 'full'"): XentWriter(precision='half')

def test_precision_is_the_record_s(tmp_path):
    learn = learner([XentRecorder(tmp_path / 'r', precision='full')], n=20)
    learn.fit(1)
    assert XentRecord(tmp_path / 'r').meta['precision'] == 'full'
    again = learner([XentRecorder(tmp_path / 'r', resume=True)], n=20)
    again.fit(1)
    loss = XentRecord(tmp_path / 'r').to_df('train', -1)['loss'].to_numpy()
    assert (loss != shorten(loss, 8)).any()
