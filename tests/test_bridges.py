"Kept probabilities against what the model gave, and each bridge against the package it leads to, where that is installed."
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import duckdb
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastai.callback.core import CancelEpochException, Callback
from fastai.callback.data import WeightedDL
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import SkipItemException
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from fastai.torch_core import set_seed
from fastai_xent import bridges
from fastai_xent.demo import digits
from fastai_xent.dynamics import SCORES
from fastai_xent.linear import head_in_loss
from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder, _by_row, _most_bytes, _Probs
from fastai_xent.rows import RowBuffer
from fastai_xent.store import XentRecord
from helpers import Net, Points, ended, learner, quiet, same_bits, warned
from torch import nn

torch.set_num_threads(1)
HALF = dict(rtol=2.**-11, atol=2.**-24)                # what rounding to half precision may change

class Gave(Callback):
    "The model's probabilities of each row in float64, in order of arrival, with the item that the input names."
    order = 39
    def before_fit(self): self.passes = getattr(self, 'passes', [])
    def before_train(self): self.passes.append(('train', []))
    def before_validate(self):
        if not self.learn.lock.locked(): self.passes.append(('valid', []))
    def after_loss(self):
        if not self.learn.lock.locked():
            self.passes[-1][1].append((self.learn.xb[0][:, -1].round().long().numpy().copy(), self.learn.pred.detach().double().softmax(1).numpy()))

    def probs(self, split, epoch, n, c=3):
        "n c; of an item that came twice the last row, nan for one that did not come."
        want = np.full((n, c), np.nan)
        for item, p in [o for s, o in self.passes if s == split][epoch]:
            for i, row in zip(item, p): want[i] = row
        return want

class Skipping(Points):
    "Points of which two cannot be read."
    n_inp = 1
    def __getitem__(self, i):
        if int(i) in (1, 5): raise SkipItemException
        return super().__getitem__(i)

def fit(learn, epochs=2, said=0):
    with warned() as messages: learn.fit(epochs)
    assert len(messages) == said, messages
    return messages


# -- the right probabilities on the right item

LOADERS = {
    'shuffled': lambda: learner(),
    'workers': lambda: learner(workers=2),
    'skips': lambda: learner(train=Skipping()),
    'skips, workers': lambda: learner(train=Skipping(), workers=2),
    'one batch': lambda: learner(bs=100),
    'a last batch of one': lambda: learner(bs=2, n=6),
    "fastai's loss": lambda: learner(loss_func=CrossEntropyLossFlat()),
    'focal': lambda: learner(loss_func=FocalLossFlat()),
    'ignored label': lambda: learner(loss_func=XentLossFlat(ignore_index=1)),
}

@pytest.mark.parametrize('where', ['memory', 'disk', 'bucket'])
@pytest.mark.parametrize('name', LOADERS)
def test_probs(name, where, tmp_path):
    "Each epoch and split, against the model's own in float64."
    path = {'memory': None, 'disk': tmp_path / 'my rün [1]', 'bucket': f'memory://probs/{name}'}[where]
    learn, saw = LOADERS[name](), Gave()
    learn.add_cbs([saw, XentRecorder(path, keep_probs=True, overwrite=path is not None)])
    fit(learn, 3)
    record = learn.xent_recorder.record if path is None else XentRecord(path)
    for split, dl in zip(('train', 'valid'), learn.dls.loaders):
        for epoch in range(3):
            got = record.probs(split, epoch)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, saw.probs(split, epoch, len(dl.dataset)), **HALF)
        np.testing.assert_array_equal(record.probs(split), record.probs(split, 2))

@pytest.mark.parametrize('seed', range(3))
def test_of_repeated_items_the_last_row_counts(seed):
    "A weighted loader deals some items out several times, and others never."
    set_seed(seed)
    saw, rec = Gave(), XentRecorder(keep_probs=True)
    learn = learner([saw, rec])
    learn.dls = DataLoaders(WeightedDL(Points(), bs=8, wgts=np.r_[np.zeros(3), np.full(3, 9.), np.ones(30)], shuffle=True, num_workers=0), learn.dls.valid)
    fit(learn)
    for epoch in (0, 1):
        want = saw.probs('train', epoch, 36)
        assert np.isnan(want[:3]).all()
        np.testing.assert_allclose(rec.record.probs('train', epoch), want, **HALF)
    assert rec.record.to_df('train')['occurrence'].max() > 0

def test_padding_is_left_to_its_own_rank():
    "Rows that only fill up a batch are not of this rank."
    rows = torch.arange(12.).view(4, 3).square()
    kept = _Probs(rows, 1)                             # it grows
    kept.add(rows[:3])
    kept.add(rows[3:])
    item, p = _by_row(kept, dict(item=np.array([4, 2, 0, 4]), padding=np.array([False, False, False, True])))
    assert item.tolist() == [4, 2, 0]
    np.testing.assert_allclose(p, rows[:3].double().softmax(1), **HALF)
    with pytest.raises(RuntimeError, match='4 rows of probabilities for 3 rows'): _by_row(kept, dict(item=np.arange(3), padding=None))

@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_of_logits(dtype):
    z = (torch.randn(50, 7) * 20).to(dtype)
    kept = _Probs(z, 50)
    kept.add(z)
    np.testing.assert_allclose(kept.kept.double(), z.double().softmax(1), **HALF)

def test_ranks_are_joined(tmp_path):
    "Two parts of one epoch, in one array."
    record = XentRecord.new(tmp_path / 'r')
    record.set_items('train', pd.DataFrame({'item': range(5), 'name': list('abcde'), 'source': range(5)}), 'mark')
    p = np.random.default_rng(0).dirichlet(np.ones(4), 4)
    record.add_probs(0, 0, 'train', np.array([3, 0]), p[:2], rank=0)
    record.add_probs(0, 0, 'train', np.array([1, 2]), p[2:], rank=1)
    got = record.probs()
    np.testing.assert_allclose(got[[3, 0, 1, 2]], p, **HALF)
    assert np.isnan(got[4]).all()

def test_a_cancelled_pass_is_kept_as_far_as_it_went():
    class Stop(Callback):
        order = 45
        def after_loss(self):
            if self.learn.training and self.learn.iter == 2: raise CancelEpochException
    saw, rec = Gave(), XentRecorder(keep_probs=True)
    learn = learner([saw, rec, Stop()])
    fit(learn, 1)
    want = saw.probs('train', 0, 36)
    assert 0 < np.isnan(want[:, 0]).sum() < 36
    np.testing.assert_allclose(rec.record.probs('train'), want, **HALF)

def test_a_batch_that_comes_twice_is_taken_once():
    class Again(Callback):
        "Asks the recorder to look at each batch once more."
        order = 41
        def after_loss(self): self.learn.xent_recorder('after_loss')
    saw, rec = Gave(), XentRecorder(keep_probs=True)
    fit(learner([saw, rec, Again()]), 1)
    assert len(rec.record.to_df('train')) == 36
    np.testing.assert_allclose(rec.record.probs('train'), saw.probs('train', 0, 36), **HALF)

def test_mixed_rows_are_the_models():
    "Of a mixed row the model's probabilities, under its own item; cleanlab and data maps get none of them."
    rec, seen = XentRecorder(keep_probs=True, eval_every=1), []
    class Look(Callback):
        order = 39
        def after_loss(self):
            if self.learn.training: seen.append(self.learn.pred.detach().double().softmax(1).numpy())
    learn = learner([MixUp(), Look(), rec])
    fit(learn, 1)
    record = rec.record
    got, want = record.probs('train'), np.concatenate(seen)
    own = got[~np.isnan(got[:, 0])]
    np.testing.assert_allclose(own[np.lexsort(own.T)], want[np.lexsort(want.astype(np.float16).T)], rtol=2e-3, atol=1e-6)
    df = record.to_df('train', 0)
    np.testing.assert_allclose(got[df['item'], df['targ'].astype(int)], df['p_targ'].astype(float), atol=1e-3)
    for bad in (lambda: record.to_cleanlab('train'), lambda: record.to_cleanlab('train', None), lambda: record.to_cartography('nowhere')):
        with pytest.raises(ValueError, match=r"epoch 0 of 'train' has mixed rows .* use 'valid', or .*eval_every"): bad()
    assert not Path('nowhere').exists()
    labels, p = record.to_cleanlab('train_eval')
    assert labels.tolist() == Points().y.tolist()
    with torch.no_grad(): z = learn.model.eval()(Points().x)
    np.testing.assert_allclose(p, z.double().softmax(1), atol=1e-3)

def test_resume_and_overwrite(tmp_path):
    "A resumed record goes on; an overwritten one has nothing left of the old probabilities."
    path, saw = tmp_path / 'r', Gave()
    fit(learner([XentRecorder(path, keep_probs=True)]), 2)
    learn = learner([XentRecorder(path, keep_probs=True, resume=True), saw])
    fit(learn, 1)
    np.testing.assert_allclose(XentRecord(path).probs('train', 2), saw.probs('train', 0, 36), **HALF)
    assert list(XentRecord(path)._probs_of('train')) == [0, 1, 2]
    fit(learner([XentRecorder(path, overwrite=True)]), 1)
    assert not (path / 'probs').exists()
    with pytest.raises(KeyError, match='none were kept'): XentRecord(path).probs()

def test_another_dataset():
    "Probabilities belong to the items of their epoch."
    rec, saw = XentRecorder(keep_probs=True), Gave()
    learn = learner([rec, saw])
    fit(learn, 1)
    learn.dls = DataLoaders(TfmdDL(Points(20, seed=3), bs=8, shuffle=True, drop_last=False, num_workers=0), learn.dls.valid)
    fit(learn, 1, said=1)
    assert rec.record.probs('train', 0).shape == (36, 3) and rec.record.probs('train').shape == (20, 3)
    np.testing.assert_allclose(rec.record.probs('train', 1), saw.probs('train', 1, 20), **HALF)
    labels, p = rec.record.to_cleanlab('train', None)  # the mean over the epochs of these items alone
    np.testing.assert_allclose(p, saw.probs('train', 1, 20), atol=1e-3)

def test_pickled():
    rec = pickle.loads(pickle.dumps(XentRecorder(keep_probs=True)))
    learn = learner([rec])
    fit(learn, 1)
    assert rec.record.probs('valid').shape == (18, 3)


# -- the training does not change, and errors of ours end the recording alone

@pytest.mark.parametrize('kw', [dict(), dict(loss_func=CrossEntropyLossFlat), dict(cbs=lambda: [MixUp()])], ids=['plain', "fastai's loss", 'mixup'])
def test_same_training(kw):
    "To the bit, with probabilities kept or not recorded at all."
    def run(*rec):
        set_seed(1)
        learn = learner([*kw.get('cbs', list)(), *rec], kw.get('loss_func', XentLossFlat)(), model=Net(dropout=.5))
        fit(learn, 2)
        return ended(learn)
    same_bits(run().end, run(XentRecorder(keep_probs=True)).end)

@pytest.mark.parametrize('where', ['memory', 'disk'])
def test_a_full_disk(where, tmp_path, monkeypatch):
    "The rows of that epoch were written before; the training goes on; what is told is the error."
    plain = learner()
    plain.fit(2)
    ended(plain)
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    rec = XentRecorder(None if where == 'memory' else tmp_path / 'r', keep_probs=True)
    with monkeypatch.context() as m:
        m.setattr(XentRecord, 'add_probs', full)
        learn = learner([rec])
        said = fit(learn, 2, said=1)
        ended(learn)
    assert 'No space left on device' in said[0]
    same_bits(plain.end, learn.end)
    assert ('train', 0) in {k[1:] for k in rec.record.keys}

def test_no_waiting_for_the_device(monkeypatch):
    "While batches run, none of our code brings a tensor to the host."
    inside, calls = [False], []
    class Window(Callback):
        order = 39
        def before_batch(self): inside[0] = True
        def after_epoch(self): inside[0] = False
    class End(Callback):
        order = 39.5                                   # before the recorder's after_train
        def after_train(self): inside[0] = False
        def after_validate(self): inside[0] = False
    for name in ('cpu', 'item', 'tolist', 'numpy', '__bool__', '__float__', '__int__', '__index__', '__array__'):
        real = getattr(torch.Tensor, name)
        def counted(self, *args, real=real, name=name, **kw):
            if inside[0] and sys._getframe(1).f_code.co_filename.endswith('fastai_xent/recorder.py'): calls.append(name)
            return real(self, *args, **kw)
        monkeypatch.setattr(torch.Tensor, name, counted)
    rec = XentRecorder(keep_probs=True)
    fit(learner([rec, Window(), End()]), 2)
    assert rec.record.probs().shape == (36, 3) and not calls


# -- what is too large, or has no probabilities

def test_too_large():
    "Said once a split, with the size; all else is recorded."
    rec = XentRecorder(keep_probs=200)
    said = fit(learner([rec]), 2, said=1)
    assert "keeps no probabilities of 'train': 40 rows × 3 classes × 2 bytes are 2.4e-07 GB" in said[0] and 'the limit is 2e-07 GB' in said[0] and "`keep_probs='any size'`" in said[0]
    assert rec.record.probs('valid').shape == (18, 3) and rec.record.n_epochs == 2 and len(rec.record.to_df('train')) == 72
    with pytest.raises(KeyError, match='none were kept'): rec.record.probs('train')

@pytest.mark.parametrize('keep', [True, 'any size', 10**6, 1e6])
def test_limits(keep):
    rec = XentRecorder(keep_probs=keep)
    fit(learner([rec]), 1)
    assert rec.record.probs('train').shape == (36, 3)

def test_the_limit_of_2_gb():
    "Of ImageNet's 1,281,167 rows and 1,000 classes nothing is allocated."
    assert _most_bytes(True) == 2e9 and _most_bytes(False) == 0 and _most_bytes('any size') == np.inf and _most_bytes(5) == 5
    rec = XentRecorder(keep_probs=True)
    with warned() as said:
        rec._now = SimpleNamespace(split='train', rows=RowBuffer(1281167))
        assert rec._room_for_probs(SimpleNamespace(n_classes=1000, stats=None, dense=False, pred=None)) is None
    assert '1,281,167 rows × 1,000 classes × 2 bytes are 2.56 GB on the device' in said[0] and 'the limit is 2 GB' in said[0] and '`keep_probs=2562334000`' in said[0]

@pytest.mark.parametrize('bad', [0, -1, 'all', None, [1]])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="expected True, False, 'any size' or a number of bytes"): XentRecorder(keep_probs=bad)

def test_not_asked():
    rec = XentRecorder()
    fit(learner([rec]), 1)
    with pytest.raises(KeyError, match=r"no probabilities of 'train'; none were kept; ask for them before training, with `XentRecorder\(keep_probs=True\)`"): rec.record.probs()
    with pytest.raises(KeyError, match="no split 'test' in this record; it has train, valid"): rec.record.probs('test')

class Pixels(Points):
    "A label for each of four positions."
    def __getitem__(self, i): return self.x[i], self.y[i].repeat(4)

class PixelNet(Net):
    def forward(self, x): return super().forward(x)[:, :, None].expand(-1, -1, 4) * 1.

def test_dense_targets():
    rec = XentRecorder(keep_probs=True)
    said = fit(learner([rec], XentLossFlat(axis=1), model=PixelNet(), train=Pixels(), valid=Pixels(18)), 1, said=1)
    assert 'keeps no probabilities: these items have a target for each position' in said[0]
    assert rec.record.to_df('train')['n_pos'].eq(4).all()

def test_head_in_loss():
    rec = XentRecorder(keep_probs=True)
    model, loss = head_in_loss(nn.Sequential(nn.Linear(5, 3)))
    said = fit(learner([rec], loss, model=model), 1, said=1)
    assert 'keeps no probabilities: the head is in the loss' in said[0] and rec.record.n_epochs == 1


# -- the file

def test_any_tool_reads_the_file(tmp_path):
    "pyarrow, pandas and DuckDB, without us."
    rec, saw = XentRecorder(tmp_path / 'r', keep_probs=True), Gave()
    fit(learner([rec, saw]), 2)
    want, file = saw.probs('valid', 1, 18), tmp_path / 'r/probs/fit=0/split=valid/epoch=1/part-0.parquet'
    t = pq.ParquetFile(file).read()
    assert t.schema == pa.schema([('item', pa.int32()), ('probs', pa.list_(pa.float16(), 3))])
    assert t['item'].to_pylist() == list(range(18))
    np.testing.assert_allclose(np.array(t['probs'].to_pylist(), dtype=float), want, **HALF)
    np.testing.assert_allclose(np.stack(pd.read_parquet(file, partitioning=None)['probs']).astype(float), want, **HALF)
    found = duckdb.sql(f"select epoch, item, probs from '{tmp_path}/r/probs/**/*.parquet' where split = 'valid' and epoch = 1 order by item").fetchall()
    np.testing.assert_allclose([o[2] for o in found], want, **HALF)

def test_size(tmp_path):
    "Two bytes a number, before compression."
    record = XentRecord.new(tmp_path / 'r')
    record.set_items('train', pd.DataFrame({'item': range(20000), 'name': None, 'source': None}), 'mark')
    record.add_probs(0, 0, 'train', np.arange(20000), np.random.default_rng(0).dirichlet(np.ones(50), 20000))
    size = (tmp_path / 'r/probs/fit=0/split=train/epoch=0/part-0.parquet').stat().st_size
    assert size < 20000 * (50 * 2 + 4)


# -- export

def small(path=None, vocab=('cat', 'dog')):
    "Four items in two epochs: one learned, one never, one forgotten, one not seen."
    record = XentRecord.new(path)
    record.set_items('train', pd.DataFrame({'item': range(4), 'name': ['a,"b".png', 'ü ñ.png', 'c.png', 'd.png'], 'source': [3, 1, 2, 0]}), 'mark', vocab)
    for e, m in enumerate(([1., -1., 2.], [1/3, -2., -1e-20])):
        m = np.array(m)
        record.add(0, e, 'train', dict(item=np.arange(3), margin=m, loss=np.logaddexp(0, -m), p_targ=1 / (1 + np.exp(-m)), el2n=2**.5 / (1 + np.exp(m)),
                                       pred=np.where(m > 0, [0, 1, 0], [1, 0, 1]), targ=np.array([0, 1, 0])))
    return record

def read(file):
    if file.endswith('.csv'): return pd.read_csv(file, **{} if pd.__version__ >= '3' else dict(float_precision='round_trip'))     # pandas 2 reads faster, and not exactly
    if file.endswith('.parquet'): return pd.read_parquet(file)
    return pd.DataFrame([json.loads(line) for line in Path(file).read_text().splitlines()])

@pytest.mark.parametrize('vocab', [('cat', 'dog'), None], ids=['names', 'numbers'])
@pytest.mark.parametrize('ending', ['csv', 'parquet', 'jsonl'])
def test_export(ending, vocab, tmp_path):
    "Each score as `score` gives it, to the last bit; an item that was not seen has none."
    record, file = small(vocab=vocab), str(tmp_path / f'scores of mine.{ending}')
    assert record.export(file) == file
    got = read(file)
    assert list(got) == ['item', 'name', 'source', 'targ', 'likely', *(o for o in SCORES if not np.isnan(record.score(o)).all())] and 'forgetting' in got and 'grand' not in got
    assert got['item'].tolist() == [0, 1, 2, 3] and got['name'].tolist() == record.items()['name'].tolist() and got['source'].tolist() == [3, 1, 2, 0]
    cat, dog = vocab or (0, 1)
    assert [None if pd.isna(o) else o for o in got['targ']] == [cat, dog, cat, None] and [None if pd.isna(o) else o for o in got['likely']] == [cat, cat, cat, None]
    for by in list(got)[5:]:
        want = record.score(by)
        if ending == 'jsonl': want = np.where(np.isinf(want), np.nan, want)
        np.testing.assert_array_equal(got[by].astype(float), want)
    assert record.score('forgetting').tolist()[:3] == [0, np.inf, 1] and np.isnan(record.score('forgetting')[3])

def test_export_some(tmp_path):
    got = read(small().export(str(tmp_path / 's.csv'), by='aum'))
    assert list(got) == ['item', 'name', 'source', 'targ', 'likely', 'aum']
    with pytest.raises(KeyError, match="no score is called 'beauty'"): small().export(tmp_path / 's.csv', by=['beauty'])
    with pytest.raises(KeyError, match="no split 'test'"): small().export(tmp_path / 's.csv', split='test')

@pytest.mark.parametrize('name', ['scores.xlsx', 'scores', 'scores.CSV.gz', 'csv'])
def test_export_refuses_other_endings(name, tmp_path):
    with pytest.raises(ValueError, match=r"expected one of \.csv, \.parquet, \.jsonl"): small().export(tmp_path / name)
    assert not list(tmp_path.iterdir())

def test_export_is_all_or_nothing(tmp_path, monkeypatch):
    "If writing fails, the old file stays, and no other."
    file = tmp_path / 's.parquet'
    small().export(file, by='aum')
    before = file.read_bytes()
    def half(table, f, **kw):
        f.write(b'PAR1')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(bridges.pq, 'write_table', half)
    with pytest.raises(OSError, match='No space left'): small().export(file)
    assert [o.name for o in tmp_path.iterdir()] == ['s.parquet'] and file.read_bytes() == before

def test_export_elsewhere(tmp_path, monkeypatch):
    small().export('memory://exports/s.csv', by='aum')
    with fsspec.open('memory://exports/s.csv') as f: assert pd.read_csv(f)['aum'].notna().sum() == 3
    monkeypatch.chdir(tmp_path)
    small().export('here.csv', by='aum')
    assert Path('here.csv').exists()


# -- cleanlab

def labelled(p, targ, seen=None, split='train', **kw):
    "A record of probabilities, epochs × items × classes; None in `seen` marks what was not."
    p = np.asarray(p, dtype=float)
    n = p.shape[1]
    record = XentRecord.new()
    record.set_items(split, pd.DataFrame({'item': range(n), 'name': [f'{i}.png' for i in range(n)], 'source': range(n)}), 'mark')
    for e, rows in enumerate(p):
        at = np.flatnonzero(~np.isnan(rows[:, 0]))
        y = np.broadcast_to(targ, (len(p), n))[e]
        record.add(0, e, split, dict(item=at, p_targ=rows[at, y[at]], pred=rows[at].argmax(1), targ=y[at], **kw))
        record.add_probs(0, e, split, at, rows[at])
    return record

def test_to_cleanlab():
    "Labels and probabilities, row by row; rows add up to 1, and gaps are named."
    rng = np.random.default_rng(0)
    p, targ = rng.dirichlet(np.ones(4), (3, 6)), rng.integers(0, 4, 6)
    p[2, 4] = p[1, 1] = np.nan
    record = labelled(p, targ)
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
    record = labelled(np.full((1, 3, 2), .5), [0, 1, 0])
    record.add(0, 0, 'train', dict(item=np.arange(3), pred=np.array([0, 1, -1]), targ=np.array([0, 1, -100])))
    with pytest.raises(ValueError, match='1 of 3 items have .* no label in epoch 0 of .train., the first is item 2'): record.to_cleanlab()

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
    record = labelled(p, [0, 1, 0])
    assert record.to_cartography(tmp_path / 'ä b') == tmp_path / 'ä b'
    items, found = maps_of(tmp_path / 'ä b')
    assert list(items) == ['0.png', '1.png', '2.png']
    np.testing.assert_allclose(found['confidence'], [1, .5, 2.**-20], rtol=1e-3)
    assert found['correctness'].tolist()[::2] == [2, 0]
    with pytest.raises(FileExistsError, match='training_dynamics has files already'): record.to_cartography(tmp_path / 'ä b')
    same = labelled(p, [0, 1, 0])
    same._items['train', 0] = same._items['train', 0].set_column(1, 'name', pa.array(['x', 'x', 'y']))
    same.to_cartography('memory://maps/a')
    with fsspec.open('memory://maps/a/training_dynamics/dynamics_epoch_1.jsonl') as f: assert [json.loads(o)['guid'] for o in f] == [0, 1, 2]

def test_cartography_refuses():
    p = np.full((2, 3, 2), .5)
    with pytest.raises(ValueError, match='item 2 of .train. has label 0, and in epoch 1 label 1; a data map needs one label'): labelled(p, [[0, 1, 0], [0, 1, 1]]).to_cartography('memory://maps/b')
    p[0, :2] = p[1, 1:] = np.nan
    with pytest.raises(ValueError, match='no item of .train. has a label and probabilities in each of the epochs 0, 1'): labelled(p, [0, 1, 0]).to_cartography('memory://maps/b')
    with pytest.raises(KeyError, match='none were kept'): small().to_cartography('memory://maps/b')
    assert not fsspec.filesystem('memory').exists('/maps/b')


# -- Spotlight, aum

def test_to_spotlight():
    frame = small().to_spotlight()
    assert list(frame) == ['item', 'path', 'label', 'likely', 'margin_loss', 'el2n', 'aum', 'confidence', 'variability', 'correctness', 'forgetting']
    assert frame['path'].tolist()[1] == 'ü ñ.png' and frame['label'].tolist()[:3] == ['cat', 'dog', 'cat']
    np.testing.assert_array_equal(frame['aum'], small().score('aum'))
    assert small().to_spotlight(paths=[Path(o) for o in 'abcd'], by='aum')['path'].tolist() == list('abcd')
    record = small()
    record._items['train', 0] = record._items['train', 0].set_column(1, 'name', pa.array([None] * 4, pa.string()))
    with pytest.raises(ValueError, match="the items of 'train' have no names; give `paths`, one an item"): record.to_spotlight()
    record._items['train', 0] = record._items['train', 0].set_column(1, 'name', pa.array(['a', 'b', 'c' * 200, 'd']))
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
