"What recording costs, counted instead of timed: calls of Python and C, operations of torch, what is imported."
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.torch_core import set_seed
from helpers import quiet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder

ROOT, BATCHES, EPOCHS = Path(__file__).parent.parent, 10, 3


def learner(*cbs, loss_func=None):
    "Ten batches of 64 rows and 10 classes an epoch, and two of valid."
    set_seed(0)
    items = list(zip(torch.randn(64 * BATCHES, 5), torch.randint(0, 10, (64 * BATCHES,))))
    dls = DataLoaders(TfmdDL(items, bs=64, shuffle=True, num_workers=0), TfmdDL(items[:128], bs=64, num_workers=0))
    return quiet(Learner(dls, nn.Linear(5, 10), loss_func=loss_func or XentLossFlat(), cbs=list(cbs)))

class Counted(XentRecorder):
    "Counts the calls, of Python and of C, that an event takes here."
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.calls, self.events = Counter(), Counter()

    def __call__(self, event):
        n = 0
        def count(frame, kind, arg):
            nonlocal n
            n += kind in ('call', 'c_call')
        sys.setprofile(count)
        try: super().__call__(event)
        finally: sys.setprofile(None)
        self.calls[event] += n
        self.events[event] += 1

IN_BATCH = ('before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch')

@pytest.mark.parametrize('loss_func, most', [(XentLossFlat, 100), (lambda: XentLossFlat(label_smoothing=.1), 100), (CrossEntropyLossFlat, 135),
                                             (LabelSmoothingCrossEntropyFlat, 140)], ids=['ours', 'smooth', 'stock', 'stock, smooth'])
def test_calls_of_a_batch(loss_func, most):
    "Of all its events together, and with what is done for many batches at once."
    recorder = Counted()
    learner(XentRecorder(), loss_func=loss_func()).fit(1)            # a process makes a kernel once
    learner(recorder, loss_func=loss_func()).fit(EPOCHS)
    a_batch = sum(recorder.calls[o] for o in IN_BATCH) / recorder.events['after_loss']
    assert a_batch <= most

def test_calls_of_a_pass():
    "What is done before and after the batches of an epoch, train and valid; the first epoch has more to do."
    recorder = Counted()
    learn = learner(recorder)
    learn.fit(1)
    recorder.calls.clear()
    learn.fit(EPOCHS)
    ends = sum(n for o, n in recorder.calls.items() if o not in IN_BATCH and not o.endswith('_fit'))
    assert ends / EPOCHS <= 2600

class Operations(TorchDispatchMode):
    "Counts the operations that torch does."
    def __init__(self):
        super().__init__()
        self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('loss_func, most', [(XentLossFlat, 24), (lambda: XentLossFlat(torch.ones(10)), 36), (CrossEntropyLossFlat, 25),
                                             (LabelSmoothingCrossEntropyFlat, 27), (FocalLossFlat, 28)], ids=['ours', 'weights', 'stock', 'stock, smooth', 'focal'])
def test_operations_of_a_batch(loss_func, most):
    "With recorder less without, a batch."
    n = []
    for cbs in ([], [XentRecorder()]):
        learn = learner(*cbs, loss_func=loss_func())
        with Operations() as seen: learn.fit(EPOCHS)
        n.append(seen.n)
    assert (n[1] - n[0]) / (EPOCHS * (BATCHES + 2)) <= most

def test_operations_of_a_mixed_batch():
    "Its statistics are computed for many batches at once, as those of others."
    n = []
    for cbs in ([MixUp()], [MixUp(), XentRecorder()]):
        learn = learner(*cbs)
        with Operations() as seen: learn.fit(EPOCHS)
        n.append(seen.n)
    assert (n[1] - n[0]) / (EPOCHS * (BATCHES + 2)) <= 40

def test_no_compiler_before_the_first_batch():
    code = "import test_cost, sys; learn = test_cost.learner(test_cost.XentRecorder()); assert not {'numba', 'llvmlite'} & {*sys.modules}; learn.fit(1); assert 'llvmlite' in sys.modules"
    subprocess.run([sys.executable, '-c', code], cwd=ROOT / 'tests', check=True)
