"""The scores against a plain loop over each item's rows."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastai_xent.cache  # noqa: F401 registers 'label_doubt'
from fastai_xent.dynamics import SCORES, EarlyMean, Mean, Reducer, get_score

FLOATS = ('loss', 'grad_norm', 'el2n', 'p_targ', 'margin', 'entropy', 'grand')

@st.composite
def streams(draw):
    "Epochs of rows in item order: items missing, repeated, mixed, padded and without a label."
    n, seed = draw(st.integers(1, 6)), draw(st.integers(0, 2**32 - 1))
    rng, epochs = np.random.default_rng(seed), []
    for _ in range(draw(st.integers(0, 6))):
        item = np.sort(rng.integers(0, n, rng.integers(0, 2 * n + 1)))
        r = len(item)
        e = dict(item=item, weight=rng.choice([1., 1., 1., .75, .3, 0.], r), **{o: rng.normal(0, 3, r).astype(np.float32) for o in (*FLOATS, 'worst')})
        e['p_targ'] = rng.random(r).astype(np.float32)
        e['pred'], e['targ'] = rng.integers(0, 2, r).astype(float), np.ones(r)
        for o in (*FLOATS, 'worst'): e[o][rng.random(r) < .1] = np.nan
        e['pred'][rng.random(r) < .1] = np.nan
        epochs.append(e)
    return n, epochs

def run(reducer, n, epochs):
    state = reducer.init(n)
    for e in epochs: reducer.update(state, e['item'], e['weight'], **{o: e[o] for o in reducer.columns})
    return reducer.finalize(state)

def history(i, epochs, column):
    "Weight and value of item `i`'s rows, in order."
    rows = [(w, float(v)) for e in epochs for j, w, v in zip(e['item'], e['weight'], e[column]) if j == i]
    return [(w, v) for w, v in rows if not np.isnan(v)]

def mean(rows):
    total = sum(w for w, _ in rows)
    return sum(w * v for w, v in rows) / total if total else np.nan

def by_a_third(rows):
    "Each row moves the value a third of the way; the first is the value."
    value = np.nan
    for w, v in rows:
        if w > 0: value = v if np.isnan(value) else value + (v - value) / 3
    return value

def moment(f):
    def want(i, epochs):
        rows = history(i, epochs, 'p_targ')
        m = mean(rows)
        return f(m, [(w, v) for w, v in rows])
    return want

def event(f):
    def want(i, epochs):
        rows = [p == t for e in epochs for j, w, p, t in zip(e['item'], e['weight'], e['pred'], e['targ']) if j == i and w >= .5 and not np.isnan(p)]
        return f(rows) if rows else np.nan
    return want

def last(column):
    def want(i, epochs):
        rows = [v for w, v in history(i, epochs, column) if w > 0]
        return rows[-1] if rows else np.nan
    return want

def forgotten(right): return sum(a and not b for a, b in zip(right, right[1:]))

def label_doubt(i, epochs):
    "By hand, a row at a time: softplus(−margin)·(1 + gap)/2, an epoch counting by the variance of its gaps, squared where the model is undecided."
    rows = []
    for e in epochs:
        known = [(j, w, float(m), float(p)) for j, w, m, p in zip(e['item'], e['weight'], e['margin'], e['p_targ']) if w > 0 and not np.isnan(m + p)]
        gaps = [min(p * np.exp(-m), 1) - p for _, _, m, p in known]
        total = sum(w for _, w, _, _ in known)
        if not total: continue
        center = sum(w * g for (_, w, _, _), g in zip(known, gaps)) / total
        spread = sum(w * (g - center)**2 for (_, w, _, _), g in zip(known, gaps)) / total
        undecided = 1 - sum(w * g * g for (_, w, _, _), g in zip(known, gaps)) / total
        by = spread * (spread + .05 / (.05 + max(undecided, 0))) + 1e-12
        rows += [(w * by, np.logaddexp(0, -m) * (1 + g) / 2) for (j, w, m, _), g in zip(known, gaps) if j == i]
    return mean(rows)

WANT = {'label_doubt': label_doubt, 'suspicion': label_doubt, **{o: lambda i, es, o=o: mean(history(i, es, o)) for o in ('loss', 'el2n', 'grad_norm', 'entropy', 'grand')},
        'margin_loss': lambda i, es: mean([(w, np.logaddexp(0, -v)) for w, v in history(i, es, 'margin')]),
        'aum': lambda i, es: mean(history(i, es, 'margin')),
        'confidence': moment(lambda m, rows: m),
        'epistemic': moment(lambda m, rows: mean([(w, (v - m)**2) for w, v in rows])),
        'variability': moment(lambda m, rows: mean([(w, (v - m)**2) for w, v in rows])**.5),
        'aleatoric': moment(lambda m, rows: mean([(w, v * (1 - v)) for w, v in rows])),
        'correctness': event(lambda r: sum(r) / len(r)),
        'forgetting': event(lambda r: forgotten(r) if any(r) else np.inf),
        'unforgettable': event(lambda r: float(any(r) and not forgotten(r))),
        'wrong_events': event(lambda r: len(r) - sum(r)),
        'first_learned': event(lambda r: r.index(True) + 1 if any(r) else np.inf),
        'iteration_learned': event(lambda r: max((k + 1 for k, o in enumerate(r) if not o), default=0)),
        'early_el2n': lambda i, es: mean([(w, v) for w, v in history(i, es, 'el2n') if w > 0][:5]),
        'last_el2n': last('el2n'), 'last_loss': last('loss'), 'last_margin': last('margin'), 'worst': lambda i, es: by_a_third(history(i, es, 'worst'))}

def test_every_score_has_a_truth(): assert WANT.keys() == SCORES.keys()

@pytest.mark.parametrize('name', SCORES)
def test_against_a_plain_loop(name):
    @settings(max_examples=60, deadline=None)
    @given(streams())
    def check(stream):
        n, epochs = stream
        got = run(SCORES[name], n, epochs)
        assert got.dtype == np.float64 and got.shape == (n,)
        np.testing.assert_allclose(got, [WANT[name](i, epochs) for i in range(n)], rtol=1e-4 if name in ('label_doubt', 'suspicion') else 1e-6, atol=2e-8 if name in ('variability', 'epistemic', 'aleatoric') else 1e-12)   # these keep float32
    check()

@settings(max_examples=60, deadline=None)
@given(streams())
def test_scores_of_one_key_have_one_state(stream):
    n, epochs = stream
    by_key = {}
    for r in SCORES.values():
        state = r.init(n)
        for e in epochs: r.update(state, e['item'], e['weight'], **{o: e[o] for o in r.columns})
        for k, v in by_key.setdefault((r.key, r.columns), state).items(): np.testing.assert_array_equal(v, state[k])

@settings(max_examples=30, deadline=None)
@given(streams())
def test_finalize_leaves_the_state(stream):
    n, epochs = stream
    for r in SCORES.values():
        state = r.init(n)
        for e in epochs:
            before = {k: v.copy() for k, v in state.items()}
            r.finalize(state)
            for k, v in before.items(): np.testing.assert_array_equal(v, state[k])
            assert all(len(v) == n for v in state.values())
            r.update(state, e['item'], e['weight'], **{o: e[o] for o in r.columns})

def test_a_column_stands_for_its_mean():
    assert get_score('margin') is SCORES['aum'] and get_score('p_targ') is SCORES['confidence']
    mine = EarlyMean('loss', 2)
    assert get_score(mine) is mine

def test_no_warning_about_items_never_seen():
    with np.errstate(all='raise'):
        for name, r in SCORES.items(): assert np.isnan(r.finalize(r.init(3))).all(), name

def test_keys_are_names_of_files():
    for r in SCORES.values(): assert r.key.isidentifier(), r.key
    assert len({r.key for r in SCORES.values()}) < len(SCORES)

def test_the_protocol_is_abstract():
    for call in (lambda: Reducer().init(1), lambda: Reducer().finalize({}), lambda: Mean().value(loss=0)):
        with pytest.raises(NotImplementedError): call()
