"A record for other tools, each against the package it leads to, where that is installed."
import json
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai_xent import export
from fastai_xent.demo import digits
from fastai_xent.dynamics import SCORES
from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder
from fastai_xent.writer import XentWriter
from helpers import learner, quiet, warned
from runs import put
from torch import nn

torch.set_num_threads(1)
HALF = dict(rtol=2.**-11, atol=2.**-24)

def fit(learn, epochs=2, said=0):
    with warned() as messages: learn.fit(epochs)
    assert len(messages) == said, messages
    return messages


# -- export

def small(path=None, vocab=('cat', 'dog')):
    "Four items in two epochs: one learned, one never, one forgotten, one not seen."
    writer = XentWriter(path)
    writer.set_items('train', pd.DataFrame({'item': range(4), 'name': ['a,"b".png', 'ü ñ.png', 'c.png', 'd.png'], 'source': [3, 1, 2, 0]}), 'mark', vocab)
    for e, m in enumerate(([1., -1., 2.], [1/3, -2., -1e-20])):
        m = np.array(m)
        put(writer, 0, e, 'train', dict(item=np.arange(3), margin=m, loss=np.logaddexp(0, -m), p_targ=1 / (1 + np.exp(-m)), el2n=2**.5 / (1 + np.exp(m)),
                                       pred=np.where(m > 0, [0, 1, 0], [1, 0, 1]), targ=np.array([0, 1, 0])))
    return writer.record

def read(file):
    if file.endswith('.csv'): return pd.read_csv(file, **{} if pd.__version__ >= '3' else dict(float_precision='round_trip'))     # pandas 2 reads faster, and not exactly
    if file.endswith('.parquet'): return pd.read_parquet(file)
    return pd.DataFrame([json.loads(line) for line in Path(file).read_text().splitlines()])

@pytest.mark.parametrize('vocab', [('cat', 'dog'), None], ids=['names', 'numbers'])
@pytest.mark.parametrize('ending', ['csv', 'parquet', 'jsonl'])
def test_export(ending, vocab, tmp_path):
    "Each score as `score` gives it, to the last bit; an item that was not seen has none."
    record, file = small(vocab=vocab), str(tmp_path / f'scores of mine.{ending}')
    assert record.to_file(file) == file
    got = read(file)
    assert list(got) == ['item', 'name', 'source', 'targ', 'likely', *(o for o in SCORES if o != 'suspicion' and not np.isnan(record.score(o)).all())] and 'forgetting' in got and 'grand' not in got
    assert got['item'].tolist() == [0, 1, 2, 3] and got['name'].tolist() == record.items()['name'].tolist() and got['source'].tolist() == [3, 1, 2, 0]
    cat, dog = vocab or (0, 1)
    assert [None if pd.isna(o) else o for o in got['targ']] == [cat, dog, cat, None] and [None if pd.isna(o) else o for o in got['likely']] == [cat, cat, cat, None]
    for by in list(got)[5:]:
        want = record.score(by)
        if ending == 'jsonl': want = np.where(np.isinf(want), np.nan, want)
        np.testing.assert_array_equal(got[by].astype(float), want)
    assert record.score('forgetting').tolist()[:3] == [0, np.inf, 1] and np.isnan(record.score('forgetting')[3])

def test_export_some(tmp_path):
    got = read(small().to_file(str(tmp_path / 's.csv'), by='aum'))
    assert list(got) == ['item', 'name', 'source', 'targ', 'likely', 'aum']
    with pytest.raises(KeyError, match="no score is called 'beauty'"): small().to_file(tmp_path / 's.csv', by=['beauty'])
    with pytest.raises(KeyError, match="no split 'test'"): small().to_file(tmp_path / 's.csv', split='test')

@pytest.mark.parametrize('name', ['scores.xlsx', 'scores', 'scores.CSV.gz', 'csv'])
def test_export_refuses_other_endings(name, tmp_path):
    with pytest.raises(ValueError, match=r"expected one of \.csv, \.parquet, \.jsonl"): small().to_file(tmp_path / name)
    assert not list(tmp_path.iterdir())

def test_export_is_all_or_nothing(tmp_path, monkeypatch):
    "If writing fails, the old file stays, and no other."
    file = tmp_path / 's.parquet'
    small().to_file(file, by='aum')
    before = file.read_bytes()
    def half(table, f, **kw):
        f.write(b'PAR1')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(export.pq, 'write_table', half)
    with pytest.raises(OSError, match='No space left'): small().to_file(file)
    assert [o.name for o in tmp_path.iterdir()] == ['s.parquet'] and file.read_bytes() == before

def test_export_elsewhere(tmp_path, monkeypatch):
    small().to_file('memory://exports/s.csv', by='aum')
    with fsspec.open('memory://exports/s.csv') as f: assert pd.read_csv(f)['aum'].notna().sum() == 3
    monkeypatch.chdir(tmp_path)
    small().to_file('here.csv', by='aum')
    assert Path('here.csv').exists()


# -- cleanlab

def labelled(p, targ, seen=None, split='train', **kw):
    "A record of probabilities, epochs × items × classes; None in `seen` marks what was not."
    p = np.asarray(p, dtype=float)
    n = p.shape[1]
    writer = XentWriter()
    writer.set_items(split, pd.DataFrame({'item': range(n), 'name': [f'{i}.png' for i in range(n)], 'source': range(n)}), 'mark')
    for e, rows in enumerate(p):
        at = np.flatnonzero(~np.isnan(rows[:, 0]))
        y = np.broadcast_to(targ, (len(p), n))[e]
        put(writer, 0, e, split, dict(item=at, p_targ=rows[at, y[at]], pred=rows[at].argmax(1), targ=y[at], **kw), probs=(at, rows[at]))
    return writer

def test_to_cleanlab():
    "Labels and probabilities, row by row; rows add up to 1, and gaps are named."
    rng = np.random.default_rng(0)
    p, targ = rng.dirichlet(np.ones(4), (3, 6)), rng.integers(0, 4, 6)
    p[2, 4] = p[1, 1] = np.nan
    record = labelled(p, targ).record
    labels, got = record.to_cleanlab('train', 0)
    assert labels.tolist() == targ.tolist()
    np.testing.assert_allclose(got, p[0], rtol=2e-3)
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-6)
    labels, got = record.to_cleanlab('train', None)
    np.testing.assert_allclose(got, np.nanmean(p, 0), atol=1e-3)
    assert labels.tolist() == targ.tolist()
    with pytest.raises(ValueError, match=r'1 of 6 items have no probabilities or no label in epoch 2 of .train., the first is item 4; .*`items=') as e: record.to_cleanlab()
    items = eval(str(e.value).split('`items=')[1].split('`')[0], dict(np=np, record=record))    # what the message says
    labels, got = record.to_cleanlab(items=items)
    assert items.tolist() == [0, 1, 2, 3, 5] and labels.tolist() == targ[items].tolist()
    np.testing.assert_allclose(got, p[2, items], rtol=2e-3)

def test_an_item_without_label_is_a_gap():
    writer = labelled(np.full((1, 3, 2), .5), [0, 1, 0])
    put(writer, 0, 0, 'train', dict(item=np.arange(3), pred=np.array([0, 1, -1]), targ=np.array([0, 1, -100])))
    with pytest.raises(ValueError, match='1 of 3 items have .* no label in epoch 0 of .train., the first is item 2'): writer.record.to_cleanlab()

@pytest.fixture(scope='module')
def run():
    "Ten epochs on the demo's digits, of which one label in ten is wrong, with all probabilities."
    train, valid = digits()
    dls = DataLoaders(TfmdDL(train, bs=64, shuffle=True, drop_last=True, num_workers=0), TfmdDL(valid, bs=256, num_workers=0))
    set_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    learn = quiet(Learner(dls, model, loss_func=XentLossFlat(), lr=1e-2, cbs=XentRecorder(keep_probs=True)))
    learn.fit(10)
    return learn

def test_cleanlab_finds_planted_errors(run):
    "cleanlab on the mean of the recorded probabilities; the labels it is given are those of the dataset."
    find_label_issues = pytest.importorskip('cleanlab.filter').find_label_issues
    record, ds = run.xent_recorder.record, run.dls.train_ds
    labels, p = record.to_cleanlab('train', None)
    np.testing.assert_array_equal(labels, ds.y)
    found = find_label_issues(labels, p, n_jobs=1)
    assert found.shape == ds.planted.shape and ds.planted[found].mean() > .8 and found[ds.planted].mean() > .6
    first = find_label_issues(labels, p, n_jobs=1, return_indices_ranked_by='self_confidence')[:20]
    assert ds.planted[first].mean() > .9
    found = find_label_issues(*record.to_cleanlab('valid'), n_jobs=1)       # clean labels
    assert found.mean() < .1


# -- data maps

def renamed(record, names):
    "The same record, its items called otherwise."
    t = record._items_table('train', 0).set_column(1, 'name', names)
    record._place.write(record._items_name('train', 0), lambda f: pq.write_table(t, f))
    return record

def maps_of(folder):
    "What dataset cartography computes from its files, by the formulas of Swayamdipta et al. (2020): a dict of guid → gold and probabilities, and the three coordinates."
    items = {}
    files = sorted((Path(folder) / 'training_dynamics').iterdir())
    for e in range(len(files)):
        for line in (Path(folder) / f'training_dynamics/dynamics_epoch_{e}.jsonl').read_text().splitlines():
            row = json.loads(line)
            assert set(row) == {'guid', f'logits_epoch_{e}', 'gold'}
            items.setdefault(row['guid'], (row['gold'], []))[1].append(row[f'logits_epoch_{e}'])
    assert {len(z) for _, z in items.values()} == {len(files)}
    p = {g: torch.tensor(z).softmax(1)[:, y].numpy() for g, (y, z) in items.items()}
    return items, pd.DataFrame({'confidence': {g: o.mean() for g, o in p.items()}, 'variability': {g: o.std() for g, o in p.items()},
                                'correctness': {g: sum(np.argmax(row) == y for row in z) for g, (y, z) in items.items()}})

def test_cartography_of_a_run(run, tmp_path):
    "The map's coordinates are the record's scores, on the items that every epoch has."
    record, ds = run.xent_recorder.record, run.dls.train_ds
    whole = record.seen()['rows'].to_numpy() == 10
    assert 0 < whole.sum() < len(ds)                   # the loader drops its incomplete batch
    with pytest.warns(UserWarning, match=f'{(~whole).sum()} of 1,438 items of .train. were not seen in every epoch and are left out'): record.to_cartography(tmp_path)
    items, found = maps_of(tmp_path)
    assert found.index.tolist() == np.flatnonzero(whole).tolist() and [y for y, _ in items.values()] == ds.y[whole].tolist()
    for by in ('confidence', 'variability'): np.testing.assert_allclose(found[by], record.score(by)[whole], atol=5e-4)
    p = np.sort(np.stack([record.probs('train', e)[whole] for e in range(10)]), axis=-1)
    clear = (p[..., -1] - p[..., -2] > 1e-3).all(0)     # no tie after rounding to half precision
    assert clear.mean() > .9
    np.testing.assert_array_equal(found['correctness'][clear], (record.score('correctness')[whole] * 10).round()[clear])

def test_cartography_names_and_zeros(tmp_path):
    "Names are the guids if each item has its own; a probability of 0 stays below all others."
    p = [[[1, 0, 0], [0, .5, .5], [2.**-20, 1, 0]]] * 2
    record = labelled(p, [0, 1, 0]).record
    assert record.to_cartography(tmp_path / 'ä b') == tmp_path / 'ä b'
    items, found = maps_of(tmp_path / 'ä b')
    assert list(items) == ['0.png', '1.png', '2.png']
    np.testing.assert_allclose(found['confidence'], [1, .5, 2.**-20], rtol=1e-3)
    assert found['correctness'].tolist()[::2] == [2, 0]
    with pytest.raises(FileExistsError, match='training_dynamics has files already'): record.to_cartography(tmp_path / 'ä b')
    same = renamed(labelled(p, [0, 1, 0]).record, pa.array(['x', 'x', 'y']))
    same.to_cartography('memory://maps/a')
    with fsspec.open('memory://maps/a/training_dynamics/dynamics_epoch_1.jsonl') as f: assert [json.loads(o)['guid'] for o in f] == [0, 1, 2]

def test_cartography_refuses():
    p = np.full((2, 3, 2), .5)
    with pytest.raises(ValueError, match='item 2 of .train. has label 0, and in epoch 1 label 1; a data map needs one label'): labelled(p, [[0, 1, 0], [0, 1, 1]]).record.to_cartography('memory://maps/b')
    p[0, :2] = p[1, 1:] = np.nan
    with pytest.raises(ValueError, match='no item of .train. has a label and probabilities in each of the epochs 0, 1'): labelled(p, [0, 1, 0]).record.to_cartography('memory://maps/b')
    with pytest.raises(KeyError, match='none were kept'): small().to_cartography('memory://maps/b')
    assert not fsspec.filesystem('memory').exists('/maps/b')


# -- Spotlight, aum

def test_to_spotlight():
    frame = small().to_spotlight()
    assert list(frame) == ['item', 'path', 'label', 'likely', 'margin_loss', 'el2n', 'aum', 'confidence', 'variability', 'correctness', 'forgetting']
    assert frame['path'].tolist()[1] == 'ü ñ.png' and frame['label'].tolist()[:3] == ['cat', 'dog', 'cat']
    np.testing.assert_array_equal(frame['aum'], small().score('aum'))
    assert small().to_spotlight(paths=[Path(o) for o in 'abcd'], by='aum')['path'].tolist() == list('abcd')
    record = renamed(small(), pa.array([None] * 4, pa.string()))
    with pytest.raises(ValueError, match="the items of 'train' have no names; give `paths`, one an item"): record.to_spotlight()
    record = renamed(small(), pa.array(['a', 'b', 'c' * 200, 'd']))
    with pytest.raises(ValueError, match='the name of item 2 has 200 characters, where a record cuts names off'): record.to_spotlight()

def test_spotlight_shows_it(tmp_path):
    spotlight = pytest.importorskip('renumics.spotlight')
    viewer = spotlight.show(small().to_spotlight(paths=['a.png'] * 4), dtype={'path': spotlight.Image}, no_browser=True, wait=False)
    try: assert len(viewer.df) == 4
    finally: viewer.close()

class Logits(Callback):
    "Gives each batch's logits and labels to aum's calculator."
    order = 39
    def __init__(self, calculator): self.calculator = calculator
    def after_loss(self):
        if self.learn.training: self.calculator.update(self.learn.pred.detach(), self.learn.yb[0], self.learn.xb[0][:, -1].round().long().tolist())

def test_aum(tmp_path):
    "The aum package, fed with the same logits, has the same numbers."
    aum = pytest.importorskip('aum')
    calculator, rec = aum.AUMCalculator(str(tmp_path)), XentRecorder()
    fit(learner([rec, Logits(calculator)]), 4)
    calculator.finalize()
    want = pd.read_csv(tmp_path / 'aum_values.csv').set_index('sample_id')['aum'].sort_index()
    np.testing.assert_allclose(rec.record.score('aum')[want.index], want, rtol=1e-5, atol=1e-6)
    assert len(want) == 36
