"Small runs: their items and rows, written into a record, and what pandas alone would make of them."
import numpy as np
import pandas as pd
from helpers import COLUMNS, FLOATS
from hypothesis import strategies as st

from fastai_xent.dynamics import SCORES
from fastai_xent.writer import XentWriter


def frame(n, name='item {}.png'):
    "Items with names and sources."
    source = pd.Series([n - i for i in range(n)], dtype='Int64')
    return pd.DataFrame({'item': np.arange(n), 'name': [name.format(i) for i in range(n)], 'source': source})

def rows(items, seed=0, ignored=.2, c=4) -> dict:
    "Rows of these items in the given order; some of them ignored. The floats have few digits, so that a disk gives them back as they are."
    rng, n = np.random.default_rng(seed), len(items)
    cols = {'item': np.asarray(items, dtype=np.int64), **{o: (rng.integers(-511, 512, n) / 128).astype(np.float32) for o in FLOATS},
            'pred': rng.integers(0, c, n), 'targ': rng.integers(0, c, n)}
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

def put(writer, *what, **kw):
    "Write rows at once, without their scores."
    writer.write(*what, fold=False, **kw)
    writer.wait()

def update_scores(record, *splits):
    "Bring the running scores up to date, as a writer does in the background."
    for split in splits or record.splits: record._cache.update(record._segment(split))

def fill(to, run, **kw):
    "The record of a run, written by a writer, or to a path."
    n, epochs, vocab = run
    writer = to if isinstance(to, XentWriter) else XentWriter(to, **kw)
    for split in ('train', 'valid'): writer.set_items(split, frame(n[split], split + ' {}'), f'hash of {split}', vocab)
    for fit, epoch, split, cols in epochs: put(writer, fit, epoch, split, cols)
    writer.close()
    return writer.record

def expected(run, split=None) -> pd.DataFrame:
    "What pandas alone would have made of it."
    parts = [pd.DataFrame({**cols, 'fit': fit, 'epoch': epoch, 'split': s}).sort_values('item', kind='stable')
             for fit, epoch, s, cols in run[1] if split in (None, s)]
    df = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)
    return df.sort_values(['epoch', 'split'], kind='stable', ignore_index=True)[COLUMNS]

def same_frame(df, want) -> None:
    "Assert that a frame of rows is what pandas made of them."
    assert list(df.columns[:len(COLUMNS)]) == COLUMNS and len(df) == len(want)
    ignored = want['pred'] == -1
    for o in COLUMNS:
        if o == 'split':
            assert df[o].astype(str).tolist() == want[o].tolist()
            continue
        got, exp = df[o].to_numpy(dtype=np.float64, na_value=np.nan), want[o].to_numpy(dtype=np.float64)
        np.testing.assert_array_equal(got, np.where(ignored, np.nan, exp) if o in (*FLOATS, 'pred', 'targ') else exp, err_msg=o)

RUN = ({'train': 6, 'valid': 3}, [(f, e, s, rows([3, 0, 5, 1, 1], seed=e) if s == 'train' else rows([2, 0, 1], seed=9 + e))
                                  for f, e in ((0, 0), (0, 1), (1, 2)) for s in ('train', 'valid')], list('abcd'))

def altered_bytes(data: bytes):
    "The file torn at some lengths, and with a byte changed at some places."
    for size in (0, 4, len(data) // 2, len(data) - 1): yield data[:size]
    for at in np.random.default_rng(0).integers(0, len(data), 150):
        b = bytearray(data)
        b[at] ^= 1 << (at % 8)
        yield bytes(b)

def answers(record) -> dict:
    "Every score of every split and segment, as bytes."
    return {(by, split, k): record.score(by, split, k).tobytes() for by in SCORES for split, d in record.meta['splits'].items() for k in range(len(d['segments']))}

def everything(record) -> list:
    "Answers to all questions."
    q = 'select fit, epoch, split, item, name, loss, pred, targ, occurrence from record join items using (split, item) order by all'
    res = [record.to_df(), record.epochs, record.sql(q), answers(record)]
    for split, d in record.meta['splits'].items():
        res += [record.to_df(split, -1), record.items(split), record.top(3, split=split), record.scores(split), record.seen(split)]
        res += [record.item(i, split) for i in range(d['segments'][record._list(split)]['n'])]
    return res

def same_answers(a, b) -> None:
    "Assert that two lists of answers are one."
    assert len(a) == len(b)
    for x, y in zip(a, b):
        if isinstance(x, pd.DataFrame): pd.testing.assert_frame_equal(x, y)
        else: assert x == y
