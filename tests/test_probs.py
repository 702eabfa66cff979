"Kept probabilities against what the model gave, and each bridge against the package it leads to, where that is installed."
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import duckdb
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
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from fastai.torch_core import set_seed
from fastai_xent.export import kept_lists
from fastai_xent.linear import head_in_loss
from fastai_xent.losses import XentLossFlat
from fastai_xent.passes import KeptProbs, most_bytes
from fastai_xent.recorder import XentRecorder
from fastai_xent.rows import RowBuffer
from fastai_xent.record import XentRecord
from fastai_xent.writer import XentWriter
from helpers import Net, Points, ended, learner, same_bits, warned
from runs import put
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

def batch(pred): return SimpleNamespace(pred=pred, stats=None, dense=False, n_classes=pred.shape[1], check=lambda: None)

def taken(*preds, room) -> KeptProbs:
    "What is kept of these logits."
    kept, rows = KeptProbs(np.inf, print), RowBuffer(room)
    for i, z in enumerate(preds):
        kept.take(batch(z), i, SimpleNamespace(split='train', rows=rows))
        rows.at.append(i)
    return kept

def test_padding_is_left_to_its_own_rank():
    "Rows that only fill up a batch are not of this rank."
    rows = torch.arange(12.).view(4, 3).square()
    kept = taken(rows[:3], rows[3:], room=1)           # it grows
    item, p = kept.done(dict(item=np.array([4, 2, 0, 4]), padding=np.array([False, False, False, True])))
    assert item.tolist() == [4, 2, 0]
    np.testing.assert_allclose(p, rows[:3].double().softmax(1), **HALF)
    with pytest.raises(RuntimeError, match='4 rows of probabilities for 3 rows'): kept.done(dict(item=np.arange(3), padding=None))

@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_of_logits(dtype):
    z = (torch.randn(50, 7) * 20).to(dtype)
    _, p = taken(z, room=50).done(dict(item=np.arange(50), padding=None))
    np.testing.assert_allclose(p.astype(float), z.double().softmax(1), **HALF)

def test_ranks_are_joined(tmp_path):
    "Two parts of one epoch, in one array."
    writer = XentWriter(tmp_path / 'r')
    writer.set_items('train', pd.DataFrame({'item': range(5), 'name': list('abcde'), 'source': range(5)}), 'mark')
    p = np.random.default_rng(0).dirichlet(np.ones(4), 4)
    put(writer, 0, 0, 'train', dict(item=np.array([3, 0]), pred=np.zeros(2), targ=np.zeros(2)), probs=(np.array([3, 0]), p[:2]), rank=0)
    put(writer, 0, 0, 'train', dict(item=np.array([1, 2]), pred=np.zeros(2), targ=np.zeros(2)), probs=(np.array([1, 2]), p[2:]), rank=1)
    got = writer.record.probs()
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
    assert list(kept_lists(XentRecord(path), 'probs', 'train')) == [0, 1, 2]
    fit(learner([XentRecorder(path, overwrite=True)]), 1)
    assert not (path / '_probs').exists()
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
        m.setattr(XentWriter, '_write_lists', full)
        learn = learner([rec])
        said = fit(learn, 2, said=1)
        ended(learn)
    assert 'No space left on device' in said[0]
    same_bits(plain.end, learn.end)
    assert ('train', 0) in {k[1:] for k in rec.record.epochs}

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
    assert most_bytes(True) == 2e9 and most_bytes(False) == 0 and most_bytes('any size') == np.inf and most_bytes(5) == 5
    said = []
    kept = KeptProbs(most_bytes(True), said.append)
    kept.take(SimpleNamespace(n_classes=1000, stats=None, dense=False, pred=None), 0, SimpleNamespace(split='train', rows=RowBuffer(1281167)))
    assert kept.probs is None and kept.done({}) is None
    assert '1,281,167 rows × 1,000 classes × 2 bytes are 2.56 GB on the device' in said[0] and 'the limit is 2 GB' in said[0] and '`keep_probs=2562334000`' in said[0]

@pytest.mark.parametrize('bad', [0, -1, 'all', None, [1]])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="expected True, False, 'any size' or a number of bytes"): XentRecorder(keep_probs=bad)

class Zeros(Callback):
    "Changes the logits in place, after the loss and before the recorder."
    order = 30
    def after_loss(self):
        with torch.no_grad(): self.pred.detach().mul_(0)

def test_probabilities_of_edited_logits_are_refused():
    "The loss knew others."
    rec = XentRecorder(keep_probs=True)
    with warned() as said: learner([rec, Zeros()]).fit(1)
    assert any('the logits, targets or weights were changed in place after the loss was called' in o for o in said), said
    plain = XentRecorder()
    with warned() as said: learner([plain, Zeros()]).fit(1)
    assert not said and plain.record.to_df('train')['loss'].notna().all()      # what came with the loss is right

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
    want, file = saw.probs('valid', 1, 18), tmp_path / 'r/_probs/valid/fit-0-epoch-001-part-0.pq'
    t = pq.ParquetFile(file).read()
    assert t.schema == pa.schema([('item', pa.int32()), ('probs', pa.list_(pa.float16(), 3))])
    assert t['item'].to_pylist() == list(range(18))
    np.testing.assert_allclose(np.array(t['probs'].to_pylist(), dtype=float), want, **HALF)
    np.testing.assert_allclose(np.stack(pd.read_parquet(file, partitioning=None)['probs']).astype(float), want, **HALF)
    found = duckdb.sql(f"select item, probs from read_parquet('{file}') order by item").fetchall()
    np.testing.assert_allclose([o[1] for o in found], want, **HALF)

def test_size(tmp_path):
    "Two bytes a number, before compression."
    writer = XentWriter(tmp_path / 'r')
    writer.set_items('train', pd.DataFrame({'item': range(20000), 'name': None, 'source': None}), 'mark')
    probs = np.arange(20000), np.random.default_rng(0).dirichlet(np.ones(50), 20000)
    put(writer, 0, 0, 'train', dict(item=np.arange(20000), pred=np.zeros(20000), targ=np.zeros(20000)), probs=probs)
    size = (tmp_path / 'r/_probs/train/fit-0-epoch-000-part-0.pq').stat().st_size
    assert size < 20000 * (50 * 2 + 4)
