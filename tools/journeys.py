"""Print the files and functions of ours that three journeys pass, as they run: `python tools/journeys.py`.

A batch's loss: from `loss_func(pred, targ)` to the Parquet file of its epoch, without the scores that follow.
A question: `record.top(20)` of a record that was just opened. A new score: `register_score`.
Nested functions belong to the function around them.
"""
import sys, tempfile, threading
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from torch import nn

import fastai_xent
from fastai_xent.all import Mean, XentLossFlat, XentRecord, XentRecorder, register_score

HOME = Path(fastai_xent.__file__).parent
journeys, now = {}, None  # name → pairs of file and function; the name of the running journey

def note(frame, event, arg):
    code = frame.f_code
    if now is None or event != 'call' or '<' in code.co_qualname or Path(code.co_filename).parent != HOME: return
    journeys.setdefault(now, {})[Path(code.co_filename).stem, code.co_qualname] = None

class TraceEpoch(Callback):
    "Traces the second training pass, when kernels are compiled and the loss is known."
    order, run_valid = 60, False  # after the recorder
    def after_pred(self):
        if self.epoch: begin("a batch's loss")
    def after_train(self):
        self.xent_recorder.record  # waits for the thread
        begin(None)

def begin(name): globals()['now'] = name

def travel(folder):
    "Fill `journeys`."
    for o in (threading, sys): o.setprofile(note)
    items = [(torch.randn(5), i % 3) for i in range(64)]
    dls = DataLoaders(*(TfmdDL(items, bs=64, num_workers=0) for _ in range(2)))
    learn = Learner(dls, nn.Linear(5, 3), loss_func=XentLossFlat(), cbs=[XentRecorder(folder), TraceEpoch()])
    learn.xent_recorder._writer._keep_scores = lambda split: None  # that is another journey
    with learn.no_logging(): learn.fit(2)
    XentRecord(folder).top(20)  # brings the running scores up to date
    record = XentRecord(folder)
    begin('record.top(20)')
    record.top(20)
    begin('a new score')
    register_score('mine', type('Mine', (Mean,), dict(columns=('loss',)))())
    sys.setprofile(None)

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as d: travel(f'{d}/run')
    for name, seen in journeys.items():
        print(f"{name}: {len({o for o, _ in seen})} files, {len(seen)} functions")
        for file in dict.fromkeys(o for o, _ in seen):
            print(f"    {file}: {', '.join(f for o, f in seen if o == file)}")
