"The kernels for CPUs: layouts, precision, extremes, threads, and what happens without a compiler."
import gc
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fastai_xent import cpu_kernels, losses, vectors
from fastai_xent.backward import FusedLoss
from fastai_xent.cpu_kernels import fused_pass
from fastai_xent.losses import XentLoss
from fastai_xent.numerics import XentStats, xent_grad, xent_stats
from fastai_xent.batch import Batch
from fastai_xent.rows import RowBuffer
from fastai_xent.smoothing import fused_stats

ROOT = Path(__file__).parent.parent

inf, nan = float('inf'), float('nan')

def problem(shape, axis=1, dtype=torch.float32, scale=3., seed=0, ignore=-100):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=g, dtype=torch.float64).mul(scale).to(dtype)
    y = torch.randint(0, shape[axis], [s for i, s in enumerate(shape) if i != axis % len(shape)], generator=g)
    return z, y.masked_fill(torch.rand(y.shape, generator=g) < .2, ignore)

SHAPES = {'rows': ((37, 11), 1), 'one row': ((1, 5), 1), 'one class': ((9, 1), 1), 'two classes': ((300, 2), 1), 'wide': ((3, 5000), 1), 'no rows': ((0, 4), 1), 'bare': ((6,), 0),
          'mask': ((2, 5, 9, 13), 1), 'classes last': ((2, 9, 13, 5), 3), 'classes first': ((5, 70), 0), 'few positions': ((4, 6, 3), 1), 'long': ((2, 3, 1100), 1),
          'many classes in a mask': ((1, 700, 6, 6), 1), 'no positions': ((2, 3, 0), 1)}
VIEWS = {'plain': lambda z: z, 'reversed strides': lambda z: z.permute(*range(z.ndim)[::-1]).contiguous().permute(*range(z.ndim)[::-1]),
         'every other': lambda z: z.repeat_interleave(2, z.ndim - 1)[..., ::2]}

@pytest.mark.grid
@pytest.mark.parametrize('weighted', [False, 1, 0], ids=['unweighted', 'weighted', 'some negative'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('view', VIEWS)
@pytest.mark.parametrize('shape, axis', SHAPES.values(), ids=SHAPES)
def test_against_double(shape, axis, view, dtype, weighted):
    z, y = problem(shape, axis, dtype)
    w = torch.linspace(weighted - 1, 2, shape[axis]) if weighted is not False else None     # from 0, or from −1
    z = VIEWS[view](z)
    got = fused_pass(z, y, w, -100, axis)
    tol = dict(rtol=2e-6, atol=2e-7) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-14)
    exact, grad = xent_stats(z.double(), y, w, axis=axis), xent_grad(z.double(), y, w, axis=axis)
    for name, a, b in zip(XentStats._fields, got.stats(y.shape), exact):
        assert a.dtype == (dtype if a.is_floating_point() else torch.int64)
        assert_close(a.to(b.dtype), b, equal_nan=True, msg=lambda m: f'{name}: {m}', **tol)
    assert got.grad.shape == z.shape and got.grad.dtype == dtype
    assert_close(got.grad.double(), grad, **tol)

@pytest.mark.parametrize('shape', [(181, 3), (181, 1000), (1, 3, 181)], ids=str)
def test_no_worse_than_torch_along_a_margin(shape):
    "The largest relative error of loss and norm, from confidently wrong to known."
    c, m = shape[1], torch.linspace(-100, 80, 181)
    z = torch.randn(181, c, generator=torch.Generator().manual_seed(0))
    z[:, 0] = m
    if len(shape) == 3: z = z.T[None].contiguous()
    y = torch.zeros([s for i, s in enumerate(shape) if i != 1], dtype=torch.long)
    ours, exact = fused_stats(z, y), xent_stats(z.double(), y)
    rel = lambda a, b: ((a.double() - b) / b).abs().max().item()
    for name in ('loss', 'el2n', 'entropy'): assert rel(getattr(ours, name), getattr(exact, name)) < 1e-5, name
    assert rel(ours.p_targ.view(-1)[30:], exact.p_targ.view(-1)[30:]) < 1e-5      # before, it has fewer digits in float32
    assert rel(ours.loss, exact.loss) <= rel(F.cross_entropy(z, y, reduction='none'), exact.loss)
    assert torch.equal(ours.margin, xent_stats(z, y).margin)

ODD = [[0., 0., 0.], [-inf, 0., 1.], [0., -inf, -inf], [inf, 0., 1.], [0., inf, 1.], [nan, 0., 1.], [0., nan, 1.], [-inf, -inf, -inf], [3e38, -3e38, 0.], [-3e38, 3e38, 0.],
       [2., 2., 1.], [1., 2., 2.], [-0., 0., 0.], [1e-40, 0., 0.], [0., -nan, 1.]]

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('plane', [False, True])
@pytest.mark.parametrize('label', [0, 1, 2])
def test_extremes_are_as_in_numerics(label, plane, dtype):
    z = torch.tensor(ODD, dtype=dtype).repeat(3, 1)
    y = torch.full((len(z),), label)
    at = (lambda t: t.T[None].contiguous()) if plane else lambda t: t
    got = fused_pass(at(z), y[None] if plane else y)
    for name, a, b in zip(XentStats._fields, got.stats(y.shape), xent_stats(z, y)): assert_close(a, b, rtol=1e-5, atol=1e-7, equal_nan=True, msg=lambda m: f'{name}: {m}')
    assert_close(got.grad, at(xent_grad(z, y)), rtol=1e-5, atol=1e-7, equal_nan=True)

def test_entropy_is_that_of_the_prediction():
    z, y = problem((50, 7), dtype=torch.float64, ignore=0)
    p = z.softmax(1)
    want = -(p * p.log()).sum(1)
    assert_close(fused_stats(z, y).entropy, want)
    assert_close(xent_stats(z, y, label_smoothing=.1, weight=torch.rand(7)).entropy, want)

@pytest.mark.parametrize('shape', [(900, 1000), (4, 21, 120, 121)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape):
    z, y = problem(shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = fused_pass(z, y, reduction='mean')
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            many = fused_pass(z, y, reduction='mean')
            assert torch.equal(many.loss, alone.loss) and torch.equal(many.grad, alone.grad) and np.array_equal(many.facts, alone.facts, equal_nan=True)
    finally: torch.set_num_threads(before)

FORK = """
import os, torch
from fastai_xent.losses import XentLoss
torch.set_num_threads(2)
z, y = torch.randn(600, 1000, generator=torch.Generator().manual_seed(0)), torch.arange(600)
loss = XentLoss()(z, y)                    # the pool's threads are there now, and are not in the child
pid = os.fork()
if not pid: os._exit(0 if torch.equal(XentLoss()(z, y), loss) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')
def test_a_forked_process_gets_threads_of_its_own():
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', FORK], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not res.returncode, res.stderr

TWICE = """
import hashlib, sys, torch
from fastai_xent.cpu_kernels import fused_pass
torch.set_num_threads(1)
digest = hashlib.md5()
for shape in ((70, 300), (64, 10), (3, 5000)):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    done = fused_pass(z, torch.arange(shape[0]) % shape[1], reduction='mean')
    for o in (done.grad.numpy(), done.facts): digest.update(o.tobytes())
print(digest.hexdigest())
"""

def test_each_process_gets_the_same_bits():
    first, then = (subprocess.run([sys.executable, '-W', 'ignore', '-c', TWICE], cwd=ROOT, capture_output=True, text=True, timeout=300) for _ in range(2))
    assert not first.returncode, first.stderr
    assert first.stdout == then.stdout

@pytest.fixture
def not_made():
    "Forget the kernels before and after."
    cpu_kernels._kernel.cache_clear()
    yield
    cpu_kernels._kernel.cache_clear()

def test_without_a_compiler_torch_does_the_work_after_one_warning(monkeypatch, not_made):
    z, y = problem((6, 4))
    want = XentLoss()(z, y)
    cpu_kernels._kernel.cache_clear()
    monkeypatch.setitem(sys.modules, 'llvmlite', None)
    monkeypatch.setitem(sys.modules, 'llvmlite.binding', None)
    leaf = z.clone().requires_grad_()
    with pytest.warns(RuntimeWarning, match='llvmlite does not make the loss.*import of llvmlite'): loss = XentLoss()(leaf, y)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loss.backward()
        func = XentLoss()
        func(leaf, y)
        assert_close(func.stats, xent_stats(z, y), equal_nan=True)
        assert_close(fused_stats(z, y), xent_stats(z, y), equal_nan=True)
    assert_close(loss.detach(), want)
    assert_close(leaf.grad, xent_grad(z, y) / (y != -100).sum())

@pytest.mark.parametrize('z, y', [(torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(2, 3, 40), torch.zeros(2, 40).long())], ids=['rows', 'mask'])
def test_wrong_kernels_are_not_used(z, y, monkeypatch, not_made):
    real = cpu_kernels._facts
    def wrong(*known):
        facts, rest, label = real(*known)
        return (facts[0] * 1.01, *facts[1:]), rest, label
    monkeypatch.setattr(cpu_kernels, '_facts', wrong)
    with pytest.warns(RuntimeWarning, match='ArithmeticError: two equal logits give'): assert fused_pass(z, y) is None

def test_who_traces_gets_torch_s_operations():
    z, y = problem((6, 4), ignore=0)
    assert_close(torch.func.grad(lambda z: XentLoss()(z, y))(z), xent_grad(z, y) / 6)
    assert_close(torch.func.vmap(lambda a, b: XentLoss()(a[None], b[None]))(z, y), F.cross_entropy(z, y, reduction='none'))
    assert_close(torch.func.jvp(lambda z: XentLoss(reduction='sum')(z, y), (z,), (torch.ones_like(z),))[1], torch.zeros(()), atol=1e-6, rtol=0)
    assert XentLoss()(z.to('meta'), y.to('meta')).device.type == 'meta'
    ys = torch.stack([y, y.flip(0)])                           # the targets alone
    assert_close(torch.func.vmap(lambda o: XentLoss()(z, o))(ys), torch.stack([F.cross_entropy(z, o) for o in ys]))

def test_an_infinite_factor_does_not_reach_ignored_rows():
    leaf, y = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, -100])
    XentLoss()(leaf, y).backward(torch.tensor(inf))
    assert leaf.grad[0].isinf().all() and not leaf.grad[1].any()

def test_an_infinite_factor_does_not_reach_ignored_rows_of_a_graph_that_is_kept():
    leaf, y = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, -100])
    XentLoss()(leaf, y).backward(torch.tensor(inf), retain_graph=True)
    assert leaf.grad[0].isinf().all() and not leaf.grad[1].any()

@pytest.mark.parametrize('what', ['logits', 'targets', 'weights'])
def test_a_second_derivative_after_an_edit_is_refused(what):
    leaf, y, w = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1]), torch.ones(3)
    logits = leaf * 1
    loss = XentLoss(w)(logits, y)
    want = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    dict(logits=logits, targets=y, weights=w)[what].add_(1)
    assert torch.equal(torch.autograd.grad(loss, leaf, retain_graph=True)[0], want)      # the gradient itself was there before
    with pytest.raises(RuntimeError, match='the logits, targets or weights were changed in place after the loss was called'): torch.autograd.grad(loss, leaf, create_graph=True)

@pytest.mark.parametrize('kw', [{}, dict(label_smoothing=.1)], ids=['plain', 'smooth'])
def test_logits_may_be_edited_before_the_backward_pass(kw):
    "As with torch's loss: its gradient is that of the logits that the loss has seen."
    grads = []
    for loss_func in (XentLoss(**kw), torch.nn.CrossEntropyLoss(**kw)):
        leaf = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        logits = leaf * 2
        loss = loss_func(logits, torch.tensor([0, 1, 2, 3, 0, 1]))
        logits.clamp_(-1, 1)
        with torch.no_grad(): logits.zero_()
        loss.backward()
        grads.append(leaf.grad)
    assert_close(*grads)

def test_a_second_backward_pass_needs_the_graph():
    leaf = torch.zeros(2, 3, requires_grad=True)
    loss = XentLoss()(leaf, torch.tensor([0, 1]))
    loss.backward()
    with pytest.raises(RuntimeError, match='a second time'): loss.backward()

@pytest.fixture
def other_processor(monkeypatch, not_made):
    "Makes kernels for a processor by its name."
    def machine(name, llvm):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        return llvm.Target.from_default_triple().create_target_machine(cpu=name, features='', opt=3)
    return lambda name: monkeypatch.setattr(vectors, '_machine', partial(machine, name))

@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='these are processors of another kind')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('name', ['x86-64', 'haswell'])
def test_other_processors(name, dtype, other_processor):
    "Of 2003 and of 2013: vectors of 16 logits are taken apart, and masks are branches."
    other_processor(name)
    for shape, axis in SHAPES.values():
        z, y = problem(shape, axis, dtype)
        got = fused_pass(z, y, None, -100, axis)
        for a, b in zip(got.stats(y.shape), xent_stats(z, y, axis=axis)): assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert_close(got.grad, xent_grad(z, y, axis=axis), rtol=1e-5, atol=1e-6)

def test_a_target_that_is_no_class_is_named():
    with pytest.raises(IndexError, match=r'targ\[1, 2\] is 5, expected a class from 0 to 4'): fused_pass(torch.zeros(2, 5, 40), torch.zeros(2, 40, dtype=torch.long).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(5)))

def test_rows_keep_extra_columns_and_their_own_copies():
    rows, func = RowBuffer(4), XentLoss()
    z, y = problem((6, 4))
    for i, part in enumerate((slice(0, 4), slice(4, 6))):
        func(z[part], y[part])
        targ = y[part].clone()
        rows.add(i, Batch(z[part], y[part], func, 1), i, extra=dict(grand=torch.arange(2.)) if i else None)
        for o in func.stats: o.zero_()                # somebody edits what he was given
        y[part] = 0
        y[part] = targ
    cols = rows.cols()
    for name, want in zip(XentStats._fields, xent_stats(z, y)): assert_close(torch.tensor(cols[name]).to(want.dtype), want, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert_close(cols['grand'], np.array([nan] * 4 + [0, 1], np.float32), equal_nan=True)
    assert cols['targ'].tolist() == y.tolist() and cols['step'].tolist() == [0] * 4 + [1] * 2

def test_a_loss_of_another_batch_is_not_taken_for_this_one():
    func, (z, y) = XentLoss(), problem((6, 4))
    func(z, y)
    func(z, y.flip(0))                                # the same logits with other targets
    rows = RowBuffer(6)
    rows.add(0, Batch(z, y, func, 1))
    assert_close(torch.tensor(rows.cols()['loss']), xent_stats(z, y).loss, rtol=1e-5, atol=1e-6, equal_nan=True)

def test_half_precision_is_widened():
    z, y = problem((20, 9), dtype=torch.bfloat16)
    leaf = z.clone().requires_grad_()
    func = XentLoss()
    loss = func(leaf, y)
    loss.backward()
    assert loss.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16 and losses._way(z, False) == 'fused'
    assert_close(func.stats, xent_stats(z, y), equal_nan=True, rtol=1e-5, atol=1e-6)


# -- what a hostile reader found

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('c', [2, 9, 17, 20, 33, 37, 100, 2049])
def test_of_equals_the_first_is_predicted(c, dtype):
    "Wherever they stand, and whatever the label is."
    gen = torch.Generator().manual_seed(c)
    z = torch.randint(0, 3, (200, c), generator=gen).to(dtype)
    z[:40], z[40:80, 0], z[40:80, -1] = 0, 5, 5
    y = torch.randint(0, c, (200,), generator=gen)
    assert fused_pass(z, y).ints[0].tolist() == z.argmax(1).tolist()
    plane = z.T[None].contiguous()
    assert fused_pass(plane, y[None]).ints[0].tolist() == z.argmax(1).tolist()

def test_threads_have_ended_when_an_interrupt_comes_through():
    "Else they would write into memory that belongs to others by then."
    done, before = [], torch.get_num_threads()
    def some(first, last):
        if not first: raise KeyboardInterrupt
        time.sleep(.2)
        done.append(first)
    with pytest.raises(KeyboardInterrupt): cpu_kernels._in_threads(some, 4, 4)
    assert sorted(done) == [1, 2, 3] and torch.get_num_threads() == before

AT_THE_END = """
import threading, torch
from fastai_xent.losses import XentLoss
torch.set_num_threads(2)
def train():
    for i in range(60): XentLoss()(torch.zeros(500, 1000), torch.zeros(500).long())
    print('trained')
threading.Thread(target=train).start()
"""

def test_a_thread_that_nobody_waits_for_trains_to_the_end():
    "Python shuts pools of threads down before it waits for such a thread."
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', AT_THE_END], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert res.stdout == 'trained\n', res.stderr

@pytest.mark.parametrize('kw', [{}, dict(label_smoothing=.1)], ids=['plain', 'smooth'])
def test_targets_on_another_device_are_refused_by_torch(kw):
    with pytest.raises((RuntimeError, NotImplementedError)): XentLoss(**kw)(torch.randn(8, 5), torch.zeros(8, dtype=torch.long, device='meta'))

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('kw', [{}, dict(label_smoothing=.1)], ids=['plain', 'smooth'])
def test_one_row_with_its_classes_in_axis_0(kw, reduction):
    leaf = torch.randn(7, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    other, y = leaf.detach().clone().requires_grad_(), torch.tensor([2])
    XentLoss(axis=0, reduction=reduction, **kw)(leaf, y).sum().backward()
    F.cross_entropy(other.T, y, reduction=reduction, **kw).sum().backward()
    assert_close(leaf.grad, other.grad)

def test_smoothing_that_is_set_later_is_looked_at():
    loss_func = XentLoss()
    loss_func.label_smoothing = 1.5
    with pytest.raises(ValueError, match='label_smoothing is 1.5, expected a number from 0 to 1'): loss_func(torch.zeros(2, 3), torch.tensor([0, 1]))

def test_class_weights_that_are_learned_are_torchs():
    z, t, w = torch.randn(5, 3), torch.rand(5, 3).softmax(1), torch.ones(3, requires_grad=True)
    loss_func = XentLoss()
    loss_func.weight = w
    grads = [torch.autograd.grad(f(z, t), w)[0] for f in (loss_func, lambda z, t: F.cross_entropy(z, t, w))]
    assert_close(*grads)

def test_a_traced_loss_knows_other_numbers():
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(lambda z, y: XentLoss()(z, y), (z, y), check_trace=False)
    assert_close(traced(3 * z, y), F.cross_entropy(3 * z, y))

def test_a_loss_that_is_kept_does_not_keep_its_logits():
    leaf = torch.zeros(2, 3, requires_grad=True)
    logits = leaf * 2
    loss_func, loss, seen = XentLoss(), None, weakref.ref(logits)
    loss = loss_func(logits, torch.tensor([0, 1]))
    del logits
    loss.backward()
    loss_func(torch.zeros(2, 3), torch.tensor([0, 1]))        # the loss function remembers its last call alone
    gc.collect()
    assert seen() is None and loss.grad_fn is not None

def test_other_precisions_are_refused():
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(TypeError, match='pred has dtype torch.float16, expected float32 or float64'): fused_pass(z.half(), y)
    with pytest.raises(TypeError, match='targ has dtype torch.int32, expected int64'): fused_pass(z, y.int())

def test_a_pass_is_handed_over_once():
    z, y = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])
    done = fused_pass(z, y, reduction='mean')
    call = y, None, 1, 'mean', done
    FusedLoss.apply(z, call)
    with pytest.raises(RuntimeError, match='has handed it over already'): FusedLoss.apply(z, call)

def test_work_that_waits_although_no_thread_could_be_started_is_done_once(monkeypatch):
    "The pool has put it into its queue before it fails, and a thread that is there already may find it later."
    seen, waiting = [], threading.Event()
    pool = cpu_kernels._pool(3)
    busy = pool.submit(waiting.wait)
    def fails(): raise RuntimeError("can't start new thread")
    monkeypatch.setattr(pool, '_adjust_thread_count', fails)
    cpu_kernels._in_threads(lambda first, last: seen.append(first), 4, 4)
    waiting.set()
    busy.result()
    pool.shutdown()
    cpu_kernels._pools.clear()
    assert sorted(seen) == [0, 1, 2, 3]
