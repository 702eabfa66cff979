"Code for vectors: each operation against numpy, numbers of memory that belong to others, loops and branches."
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastai_xent.vectors import Code, Numbers, Value, build, larger, smaller, sqrt, where

FLOATS, INTS = (np.float32, np.float64), (np.int32, np.int64)

def address(x): return x.ctypes.data

def run(f, *xs, to, lanes=8):
    "`f` of the vectors `xs`, as numbers of the type `to`; each is filled up to `lanes` numbers."
    code = Code('f', *(f'x{i}' for i in range(len(xs))), 'out')
    values = [Numbers(code[f'x{i}'], x.dtype.type).get(0, lanes) for i, x in enumerate(xs)]
    Numbers(code['out'], to).put(f(*values), 0)
    g = build(code)
    out = np.zeros(lanes, to)
    g(*map(address, xs), address(out))
    return out

def some(dtype, seed=0, n=8):
    rng = np.random.default_rng(seed)
    return rng.normal(size=n).astype(dtype) if dtype in FLOATS else rng.integers(-50, 50, n).astype(dtype)

@pytest.mark.parametrize('dtype', FLOATS + INTS)
@pytest.mark.parametrize('op', ['add', 'sub', 'mul'])
def test_arithmetic(op, dtype):
    f, a, b = getattr(operator, op), some(dtype), some(dtype, 1)
    np.testing.assert_array_equal(run(f, a, b, to=dtype), f(a, b))
    np.testing.assert_array_equal(run(lambda a: f(a, 3), a, to=dtype), f(a, dtype(3)))
    np.testing.assert_array_equal(run(lambda a: f(3, a), a, to=dtype), f(dtype(3), a))

@pytest.mark.parametrize('dtype', FLOATS)
def test_arithmetic_of_floats(dtype):
    a, b = some(dtype), some(dtype, 1)
    np.testing.assert_array_equal(run(operator.truediv, a, b, to=dtype), a / b)
    np.testing.assert_array_equal(run(lambda a: 1 / a, a, to=dtype), 1 / a)
    np.testing.assert_array_equal(run(operator.neg, a, to=dtype), -a)
    np.testing.assert_array_equal(run(sqrt, abs(a), to=dtype), np.sqrt(abs(a)))
    odd = np.array([np.nan, np.inf, -np.inf, 0, -0., 1, 2, 3], dtype)
    for f in (larger, smaller): np.testing.assert_array_equal(run(f, odd, b, to=dtype), f(odd, b))

@pytest.mark.parametrize('dtype', INTS)
def test_arithmetic_of_whole_numbers(dtype):
    a, b = some(dtype), some(dtype, 1)
    for f in (operator.and_, operator.or_): np.testing.assert_array_equal(run(f, a, b, to=dtype), f(a, b))
    for f in (operator.lshift, operator.rshift): np.testing.assert_array_equal(run(lambda a: f(a, 3), a, to=dtype), f(a, dtype(3)))
    a = abs(a)
    np.testing.assert_array_equal(run(lambda a: a // 7, a, to=dtype), a // 7)
    np.testing.assert_array_equal(run(lambda a: a % 7, a, to=dtype), a % 7)

@pytest.mark.parametrize('dtype', FLOATS + INTS)
@pytest.mark.parametrize('op', ['lt', 'le', 'gt', 'ge', 'eq', 'ne'])
def test_comparisons(op, dtype):
    f, a, b = getattr(operator, op), some(dtype), some(dtype, 1)
    b[:3] = a[:3]
    if dtype in FLOATS: a[3] = np.nan
    np.testing.assert_array_equal(run(lambda a, b: where(f(a, b), a, b), a, b, to=dtype), np.where(f(a, b), a, b))
    assert run(lambda a, b: where(f(a, b).any(), a, b), a, b, to=dtype).tobytes() == (a if f(a, b).any() else b).tobytes()

@pytest.mark.parametrize('to', FLOATS + INTS)
@pytest.mark.parametrize('dtype', FLOATS + INTS)
def test_kinds(dtype, to):
    a = some(dtype)
    if dtype in INTS or to in FLOATS: np.testing.assert_array_equal(run(lambda a: a.astype(to), a, to=to), a.astype(to))
    if np.dtype(dtype).itemsize == np.dtype(to).itemsize: assert run(lambda a: a.view(to), a, to=to).tobytes() == a.tobytes()

@pytest.mark.parametrize('dtype', FLOATS + INTS)
def test_a_fold_takes_halves(dtype):
    a = some(dtype)
    h = a[:4] + a[4:]
    assert run(lambda a: a.fold(operator.add).spread(8), a, to=dtype)[0] == (h[0] + h[2]) + (h[1] + h[3])

@given(st.integers(0, 40), st.integers(0, 7), st.sampled_from(FLOATS + INTS))
@settings(max_examples=40, deadline=None)
def test_a_mask_touches_nothing_else(n, before, dtype):
    code = Code('f', 'a', 'out', 'n')
    a, out = Numbers(code['a'], dtype), Numbers(code['out'], dtype)
    lanes = code.number(range(8), np.int64)
    def step(i):
        there = lanes + i < code['n']
        out.put(a.get(i, 8, there, 7) + 1, i, there)
    code.loop(0, code['n'], 8, step)
    f = build(code)
    x, y = some(dtype, n=before + n + 16), np.full(before + n + 16, 5, dtype)
    f(address(x[before:]), address(y[before:]), n)
    np.testing.assert_array_equal(y[before:before + n], x[before:before + n] + dtype(1))
    assert (y[:before] == 5).all() and (y[before + n:] == 5).all()

def test_what_the_other_lanes_read():
    a = np.arange(8, dtype=np.float32)
    def f(a): return Numbers(a.code['x0'], np.float32).get(0, 8, a < 3, -np.inf)
    np.testing.assert_array_equal(run(f, a, to=np.float32), [0, 1, 2, *[-np.inf] * 5])

def scalar(f, *xs, to=np.int64):
    "`f` of whole numbers."
    code = Code('f', *(f'x{i}' for i in range(len(xs))), 'out')
    Numbers(code['out'], to)[0] = f(code, *(code[f'x{i}'] for i in range(len(xs))))
    out = np.zeros(1, to)
    g = build(code)
    g(*xs, address(out))
    return out[0]

@given(st.integers(-5, 20), st.integers(-5, 20), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_loops(start, stop, step):
    def f(code, a, b): return code.loop(a, b, step, lambda i, s, t: (s + i, t + s), *[code.number(0, np.int64)] * 2)[1]
    s = t = 0
    for i in range(start, stop, step): s, t = s + i, t + s
    assert scalar(f, start, stop) == t

@pytest.mark.parametrize('n', [0, 1, 5])
def test_loops_in_loops_and_branches(n):
    def f(code, n):
        zero = code.number(0, np.int64)
        def inner(i):
            def odd(): return code.loop(0, i, 1, lambda j, s: s + j, zero)[0]
            return code.when(i % 2 == 1, odd, lambda: i * 100)
        return code.loop(0, n, 1, lambda i, s: s + inner(i), zero)[0]
    assert scalar(f, n) == sum(sum(range(i)) if i % 2 else i * 100 for i in range(n))

def test_a_loop_and_a_branch_that_give_nothing():
    out = np.zeros(5, np.int64)
    code = Code('f', 'out')
    to = Numbers(code['out'], np.int64)
    def odd(i): to[i] = i
    assert code.loop(0, 5, 1, lambda i: code.when(i % 2 == 1, lambda: odd(i)) and None) == ()
    f = build(code)
    f(address(out))
    assert out.tolist() == [0, 1, 0, 3, 0]

def test_room():
    def f(code, n):
        room = code.room(64, np.int64)
        code.loop(0, 64, 1, lambda i: room.put(i * n, i))
        return code.loop(0, 64, 1, lambda i, s: s + room[i], code.number(0, np.int64))[0]
    assert scalar(f, 3) == 3 * sum(range(64))

def test_what_a_body_gives_must_fit():
    code = Code('f')
    with pytest.raises(ValueError, match='zip'): code.loop(0, 3, 1, lambda i, s: None, code.number(0, np.int64))

def test_numpy_s_numbers_do_not_take_over():
    code = Code('f')
    x = code.number(1., np.float32)
    for o in (np.float32(2) * x, np.float64(2) + x, 2 - x, x / np.float32(2)): assert isinstance(o, Value) and o.dtype is np.float32

def test_wrong_code_is_an_error():
    code = Code('f', 'x')
    code.line('nonsense')
    with pytest.raises(RuntimeError, match='expected instruction opcode'): build(code)

def test_code_lives_as_long_as_a_function():
    import gc
    import weakref
    f = build(Code('f', 'x'))
    engine = weakref.ref(f.engine)
    gc.collect()
    assert engine() is not None
    f(0)
    del f
    gc.collect()
    assert engine() is None

def test_a_call_has_all_arguments():
    f = build(Code('f', 'x', 'y'))
    with pytest.raises(TypeError, match='expected 2 whole numbers, x, y; 1 came'): f(1)
    with pytest.raises(TypeError): f(1, .5)

def test_what_has_no_meaning_is_refused():
    code = Code('f', 'n')
    i, x = code['n'], code.number(1., np.float32)
    for wrong in (lambda: i * .5, lambda: i / i, lambda: x % x, lambda: x & x, lambda: x + code.number(1., np.float64)):
        with pytest.raises(TypeError): wrong()
    with pytest.raises(KeyError, match="'m' is no argument; these are n"): code['m']
    assert scalar(lambda code, a: -a, 3) == -3
