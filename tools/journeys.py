"""Print the files and functions of ours that three journeys pass, as they run: `python tools/journeys.py`.

A batch's loss: from the prediction over `loss_func(pred, targ)` to the Parquet file, written by a thread.
A question: `record.top(20)` of a record that was just opened. A new score: `register_score`.
Nested functions and comprehensions belong to the function around them; what numba has compiled is not seen.
"""
import sys, tempfile, threading
from contextlib import contextmanager
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from torch import nn

import fastai_xent
from fastai_xent.all import Mean, XentLossFlat, XentRecord, XentRecorder, register_score

HOME = Path(fastai_xent.__file__).parent
_lists = []  # of (file, function), one for each journey that is under way


def _note(frame, event, arg):
    code = frame.f_code
    if not _lists or event != 'call' or '<' in code.co_qualname or Path(code.co_filename).parent != HOME: return
    _lists[-1].append((Path(code.co_filename).stem, code.co_qualname))


@contextmanager
def traced():
    "Our functions that run meanwhile, in order."
    _lists.append([])
    try: yield _lists[-1]
    finally: _lists.pop()


class TraceEpoch(Callback):
    "Traces the second training pass, when kernels are compiled and the loss is known."
    order, run_valid = 60, False  # after the recorder
    def after_pred(self):
        if not self.epoch: return
        self.trace = traced()
        self.seen = self.trace.__enter__()
    def after_train(self):
        self.xent_recorder.record  # waits for the thread
        if self.epoch: self.trace.__exit__(None, None, None)


def journeys(folder):
    "What each journey passes, by its name."
    threading.setprofile(_note)
    sys.setprofile(_note)
    items = [(torch.randn(5), i % 3) for i in range(64)]
    dls = DataLoaders(*(TfmdDL(items, bs=64, num_workers=0) for _ in range(2)))
    learn = Learner(dls, nn.Linear(5, 3), loss_func=XentLossFlat(), cbs=[XentRecorder(folder), batch := TraceEpoch()])
    with learn.no_logging(): learn.fit(2)
    XentRecord(folder).top(20)  # brings the running scores up to date
    record = XentRecord(folder)
    with traced() as top: record.top(20)
    with traced() as score: register_score('mine', type('Mine', (Mean,), dict(columns=('loss',)))())
    sys.setprofile(None)
    return {"a batch's loss": batch.seen, 'record.top(20)': top, 'a new score': score}


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as d: found = journeys(f'{d}/run')
    for name, seen in found.items():
        print(f"{name}: {len({o for o, _ in seen})} files, {len(set(seen))} functions")
        for file in dict.fromkeys(o for o, _ in seen): print(f"    {file}: {', '.join(dict.fromkeys(f for o, f in seen if o == file))}")
