"A writer in a loop of one's own: the rows of the recorder on the same batches, and each mistake refused."
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from helpers import Net, Points, learner, warned
from torch import nn

from fastai_xent.losses import XentLossFlat
from fastai_xent.loop import Pass, items_of
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.writer import XentWriter

class Hand(Callback):
    "Gives a writer what the recorder sees."
    order = 39
    def __init__(self, writer): self.writer = writer
    def after_loss(self):
        split = 'train' if self.learn.training else 'valid'
        self.writer.add(split=split, epoch=self.learn.epoch, item=self.learn.xb[0][:, -1].round().long(), pred=self.learn.pred, targ=self.learn.yb[0])

LOSSES = {
    'ours': lambda: XentLossFlat(), 'torch': lambda: nn.CrossEntropyLoss(), 'weights': lambda: nn.CrossEntropyLoss(weight=torch.tensor([1., 3., .5])),
    'smoothing': lambda: nn.CrossEntropyLoss(label_smoothing=.1), 'ignored': lambda: XentLossFlat(ignore_index=1), 'multi-margin': lambda: nn.MultiMarginLoss(),
}

@pytest.mark.parametrize('on_disk', [False, True])
@pytest.mark.parametrize('loss', LOSSES)
def test_equal_rows(loss, on_disk, tmp_path):
    "Of recorder and writer, column by column, bit by bit."
    lf, path = LOSSES[loss](), tmp_path / 'loop' if on_disk else None
    writer = XentWriter(path, items=dict(train=36, valid=18), loss_func=lf)
    rec = XentRecorder(tmp_path / 'recorder' if on_disk else None)
    learn = learner([Hand(writer), rec], loss_func=lf)
    with warned() as said: learn.fit(3)
    writer.close()
    assert not said
    pd.testing.assert_frame_equal(writer.record.to_df(), rec.record.to_df())
    for split in ('train', 'valid'):
        pd.testing.assert_frame_equal(writer.record.scores(split), rec.record.scores(split))
    assert writer.record._n_classes == 3

def give(writer, item, epoch=0, split='train', c=2, **kw):
    n = len(item)
    writer.add(**{**dict(split=split, epoch=epoch, item=item, pred=torch.zeros(n, c), targ=torch.zeros(n, dtype=torch.long)), **kw})

def test_names_and_frames():
    frame = pd.DataFrame(dict(name=['x', 'y'], source=[5, 3], other=[0, 0]))
    for items, names, source in (
            (['a', 'b'], ['a', 'b'], [None] * 2), (np.array(['a', 'b']), ['a', 'b'], [None] * 2), (pd.Series([10, 20]), [10, 20], [None] * 2), (2, [None] * 2, [None] * 2),
            (frame, ['x', 'y'], [5, 3]), (frame.drop(columns=['name', 'source']).set_index(pd.Index([7, 9])), [7, 9], [None] * 2), (Points(2), [None] * 2, [None] * 2)):
        got = items_of(items)
        assert [None if pd.isna(o) else o for o in got['name']] == names and [None if pd.isna(o) else o for o in got['source']] == source
        writer = XentWriter(items=items)
        give(writer, [1, 0])
        writer.close()
        assert [None if pd.isna(o) else o for o in writer.record.items()['name']] == names
    for bad in (None, 2.5, {1, 2}):
        with pytest.raises(TypeError, match='expected their number, their names, a data frame or a dataset'): items_of(bad)

def test_passes_are_closed_by_the_next_one():
    writer = XentWriter(items=dict(train=3, valid=2), vocab=['cat', 'dog'])
    for e in range(2):
        give(writer, [2, 0], e), give(writer, [1], e)
        give(writer, [0, 1], e, 'valid')
    assert writer.record.epochs == [(0, 'train', 0), (0, 'valid', 0), (0, 'train', 1)]
    writer.close()
    assert len(writer.record.epochs) == 4 and writer.record.vocab == ['cat', 'dog']
    assert writer.record.to_df('train')['step'].tolist() == [0, 1, 0, 2, 3, 2]
    with pytest.raises(ValueError, match="epoch 1 of 'train' is recorded already; the next free number is 2"): give(writer, [0], 1)

def test_resumed(tmp_path):
    with XentWriter(tmp_path / 'r', items=2) as w: give(w, [0, 1])
    with XentWriter(tmp_path / 'r', items=2, resume=True) as w:
        with pytest.raises(ValueError, match='next free number is 1'): give(w, [0, 1])
        give(w, [0, 1], 1)
    assert XentRecord(tmp_path / 'r').epochs == [(0, 'train', 0), (1, 'train', 1)] and len(XentRecord(tmp_path / 'r').item(0)) == 2
    with XentWriter(tmp_path / 'r', items=['a', 'b'], resume=True) as w: give(w, [0, 1], 2)
    assert len(XentRecord(tmp_path / 'r').item(0)) == 1       # other items: a list of their own

MISTAKES = {
    'above': (dict(item=[0, 3]), "item 3 is not in 'train', which has items 0 to 2"),
    'below': (dict(item=[0, -1]), "item -1 is not in 'train'"),
    'too few': (dict(item=[0], pred=torch.zeros(2, 2), targ=torch.zeros(2).long()), 'item has 1 indices for 2 rows'),
    'too many': (dict(item=[0, 1], pred=torch.zeros(1, 2), targ=torch.zeros(1).long()), 'item has 2 indices for 1 rows'),
    'fractions': (dict(item=np.array([0., 1.])), 'expected the index of each row'),
    'booleans': (dict(item=torch.tensor([True, False])), 'expected the index of each row'),
    'a column': (dict(item=torch.zeros(2, 1).long()), 'of shape \\[2, 1\\], expected the index'),
    'probabilities of one': (dict(item=[0, 1], targ=torch.zeros(2)), 'expected classes of shape \\[2\\]'),
    'a column of classes': (dict(item=[0, 1], targ=torch.zeros(2, 1).long()), 'expected classes of shape \\[2\\]'),
    'whole logits': (dict(item=[0, 1], pred=torch.zeros(2, 2).long()), 'expected class logits'),
    'no class axis': (dict(item=[0, 1], pred=torch.zeros(2)), 'expected class logits'),
}

@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes(name):
    "Told at once, and what was right before and comes after is recorded."
    kw, why = MISTAKES[name]
    writer = XentWriter(items=3)
    give(writer, [2])
    with pytest.raises(ValueError, match=why): give(writer, **kw)
    give(writer, [0, 1])
    writer.close()
    assert writer.record.to_df()['item'].tolist() == [0, 1, 2]

def test_the_place_in_the_batch_is_no_index():
    writer = XentWriter(items=4)
    give(writer, [0, 1]), give(writer, [0, 1])
    with pytest.raises(ValueError, match=r"item 0 of 'train' comes 2 times in epoch 0: give each row's index in the dataset, not its place in the batch.*repeats=True"): writer.close()
    assert writer.record.epochs == []
    writer = XentWriter(items=4, repeats=True)
    give(writer, [0, 1]), give(writer, [0, 1])
    writer.close()
    assert writer.record.to_df()['occurrence'].tolist() == [0, 1, 0, 1]

def test_what_is_not_known():
    for items in (None, {}, dict(valid=3)):
        with pytest.raises(ValueError, match=r"the items of 'train' are not known: give `items=\{'train': …\}`"): give(XentWriter(items=items), [0])
    writer = XentWriter(items=3)
    give(writer, [0])
    with pytest.raises(ValueError, match='pred has 5 classes, the batches before it 2'): give(writer, [1], c=5)
    with pytest.raises(TypeError, match='pred is a ndarray, expected a tensor'): give(writer, [1], pred=np.zeros((1, 2)))

def test_a_body_that_fails_leaves_whole_passes():
    writer = XentWriter(items=2)
    with pytest.raises(ZeroDivisionError):
        with writer as w:
            give(w, [0, 1]), give(w, [0], 1)
            1 / 0
    assert writer.record.epochs == [(0, 'train', 0)]

def test_a_full_disk_ends_the_recording_alone(tmp_path, monkeypatch):
    from fastai_xent.files import Place
    writer = XentWriter(tmp_path / 'r', items=2)
    give(writer, [0, 1])
    give(writer, [0], 1)
    writer.wait()
    def full(self, *_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Place, 'write', full)
    with pytest.warns(UserWarning, match=r'XentWriter has stopped recording: OSError\(28.*The training goes on') as said:
        for e in (1, 2, 3, 4): give(writer, [1], e)
        writer.close()
    assert len(said) == 1
    assert XentRecord(tmp_path / 'r').epochs == [(0, 'train', 0)]

def test_maps_of_positions():
    "A row an item, whatever the number of positions."
    writer = XentWriter(items=4)
    for i in (0, 2): writer.add(split='train', epoch=0, item=[i, i + 1], pred=torch.randn(2, 3, 4, 5), targ=torch.zeros(2, 4, 5).long())
    writer.close()
    assert writer.record.to_df()['n_pos'].tolist() == [20] * 4

def test_the_loop_s_own_tensors_may_change():
    "Indices, logits and classes are free again once `add` is back."
    now, item, pred, targ = Pass('train', 0, items_of(4)), torch.tensor([0, 1]), torch.tensor([[1., 0.], [0., 3.]]), torch.tensor([0, 1])
    now.add(item, pred, targ)
    item += 2
    pred.zero_()
    targ.zero_()
    now.add(item, pred, targ)
    cols = now.cols()
    assert cols['item'].tolist() == [0, 1, 2, 3] and cols['targ'].tolist() == [0, 1, 0, 0]
    np.testing.assert_allclose(cols['margin'], [1, 3, 0, 0])

def test_no_waiting_for_the_device(monkeypatch):
    "No batch asks a tensor for its numbers, but for indices that are on the host."
    calls = []
    for name in ('cpu', 'item', 'tolist', '__bool__', '__float__', '__int__', '__index__'):
        real = getattr(torch.Tensor, name)
        def counted(self, *args, real=real, name=name, **kw):
            if sys._getframe(1).f_code.co_filename.endswith(('fastai_xent/loop.py', 'fastai_xent/writer.py')): calls.append(name)
            return real(self, *args, **kw)
        monkeypatch.setattr(torch.Tensor, name, counted)
    writer = XentWriter(items=8)
    for i in range(0, 8, 2): give(writer, torch.tensor([i, i + 1]))
    assert not calls
    writer.close()
    assert calls                                       # the probe works: the pass's end brings the indices to the host

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu_without_a_wait():
    writer, model = XentWriter(items=64), Net().cuda()
    x, y = torch.randn(64, 5).cuda(), torch.randint(3, (64,)).cuda()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for i in range(0, 64, 16): writer.add(split='train', epoch=0, item=torch.arange(i, i + 16, device='cuda'), pred=model(x[i:i + 16]), targ=y[i:i + 16])
    finally: torch.cuda.set_sync_debug_mode('default')
    writer.close()
    assert len(writer.record.to_df()) == 64
