"""The numbers behind the pictures, and what is handed to matplotlib."""
import subprocess

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from fastai_xent import demo, views
from fastai_xent.record import XentRecord
from fastai_xent.writer import XentWriter


def record_of(epochs, n=2, path=None, split='train', vocab=('cat', 'dog')) -> XentRecord:
    "A record made by hand: a dict of columns an epoch, all from `p_targ`, of two classes and label 0."
    writer = XentWriter(path)
    writer.set_items(split, pd.DataFrame(dict(item=range(n), name=None, source=pd.NA)), 'made by hand', list(vocab))
    for e, cols in enumerate(epochs):
        p = np.asarray(cols['p_targ'], dtype=float)
        made = dict(item=np.arange(len(p)), loss=-np.log(p), grad_norm=2**.5 * (1 - p), el2n=2**.5 * (1 - p),
                    margin=np.log(p / (1 - p)), pred=(p < .5).astype(int), targ=np.zeros(len(p), dtype=int))
        cols = {**made, **{k: np.asarray(v) for k, v in cols.items()}, 'p_targ': p}
        writer.write(0, e, split, {k: v.astype(np.float32) if v.dtype == float else v for k, v in cols.items()})
    return writer.record

MIXED = [dict(p_targ=[.2, .3], lam=[np.nan, .9], partner=[1, 0]), dict(p_targ=[.8, .7], lam=[.5, .5], partner=[1, 0])]
PADDED = [dict(p_targ=[.2, .8, .9], item=[0, 1, 0], padding=np.array([False, False, True])), dict(p_targ=[.6, .4])]
KINDS = dict(mixed=(MIXED, [.4, (.9 * .3 + .5 * .7) / 1.4]), padded=(PADDED, [.4, .6]))

@pytest.mark.parametrize('epochs, want', KINDS.values(), ids=KINDS)
def test_the_data_map_weighs_rows_as_the_scores_do(epochs, want):
    record = record_of(epochs)
    m = views.data_map(record)
    np.testing.assert_allclose(m['confidence'], want, rtol=1e-6)
    for o in m[['confidence', 'variability', 'correctness']]: np.testing.assert_array_equal(m[o], record.score(o)[m.index], err_msg=o)

def test_an_item_that_was_never_seen_is_not_on_the_map():
    assert views.data_map(record_of([dict(p_targ=[.5, .6])], n=3)).index.tolist() == [0, 1]

def test_the_demos_command_works_elsewhere(tmp_path):
    where = tmp_path / "a 'run'"
    record_of([dict(p_targ=[.25, .5])], path=where)
    (elsewhere := tmp_path / 'elsewhere').mkdir()
    said = subprocess.run(demo.question(where, 0), shell=True, cwd=elsewhere, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert '0.25' in said.stdout and '0.5 ' not in said.stdout


# -- what is handed to matplotlib

def seen(epochs=3, n=12, seed=0, vocab=('cat', 'dog'), **kw):
    "A record of a run of two classes in which items 0 to 2 have wrong labels; valid has the same rows."
    rng = np.random.default_rng(seed)
    rows = [dict(p_targ=np.r_[rng.uniform(.01, .2, 3), rng.uniform(.6, .99, n - 3)]) for _ in range(epochs)]
    return record_of(rows, n=n, vocab=vocab, **kw)

def numbers(ax) -> str: return ax.get_title('left')

PLOTS = dict(losses=views.plot_losses, data_map=views.plot_data_map, score=views.plot_score,
             history=lambda r, **kw: views.plot_history(r, 0, **kw),
             class_pairs=lambda r, **kw: views.plot_class_pairs(r, r.top(3), **kw),
             class_issues=lambda r, **kw: views.plot_class_issues(r, flagged(r), **kw),
             two_scores=views.plot_two_scores, training_time=views.plot_training_time,
             two_runs=lambda r, **kw: views.plot_two_runs(r, seen(seed=1, vocab=r.meta['vocab']), **kw))

def flagged(record):
    "A frame like that of `label_issues`, without what it warns of."
    top = record.top(100)
    return top.assign(is_issue=top['targ'] != top['likely'])

@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')

@pytest.mark.parametrize('name', PLOTS)
def test_an_axis_goes_in_and_comes_out(name):
    with plt.style.context('dark_background'):
        ax = plt.figure(layout='constrained').add_subplot()
        assert PLOTS[name](seen(), ax=ax) is ax
        assert PLOTS[name](seen()).figure is not ax.figure
        ax.figure.canvas.draw()

@pytest.mark.parametrize('name', PLOTS)
def test_a_title_says_how_many(name):
    "Every plot counts what it draws: items, rows, suspects or labels."
    said = numbers(PLOTS[name](seen()))
    assert any(o in said for o in ('12', '36', '3 suspects', '3 of 3')), said

@pytest.mark.parametrize('name', PLOTS)
def test_names_are_text_and_not_mathematics(name):
    "`$` opens mathematics in matplotlib, which fails if it is not."
    record = seen(vocab=('$\\frac', '<b>$_{'))
    PLOTS[name](record).figure.canvas.draw()

@pytest.mark.parametrize('vocab', [(3, 7), (True, False), None, ('a' * 300, 'b' * 300)], ids=['numbers', 'booleans', 'none', 'long'])
@pytest.mark.parametrize('name', ['history', 'class_pairs', 'class_issues'])
def test_classes_of_any_kind(name, vocab):
    record = seen(vocab=vocab or ())
    record.meta['vocab'] = list(vocab) if vocab else None
    ax = PLOTS[name](record)
    ax.figure.canvas.draw()
    texts = [o.get_text() for o in ax.findobj(plt.Text)]
    assert max(map(len, texts)) < 200
    if vocab is None: assert any('0' in o for o in texts)

def test_many_points_are_drawn_as_a_density():
    few, many = seen(n=40), seen(n=views.DOTS + 1)
    assert len(views.plot_data_map(few).collections[0].get_offsets()) == 40
    cells = views.plot_data_map(many).collections[0]
    assert type(cells).__name__ == 'PolyCollection' and cells.get_array().sum() == views.DOTS + 1
    ax = views.plot_two_scores(many)
    assert ax.collections[0].get_array().sum() == views.DOTS + 1

def test_corners_of_the_data_map():
    "Sure, never believed, and to and fro."
    record = record_of([dict(p_targ=[.99, .01, .9]), dict(p_targ=[.98, .02, .05])], n=3)
    assert views.data_map(record)['corner'].tolist() == ['easy', 'hard', 'ambiguous']
    assert '33% easy, 33% ambiguous, 33% hard' in numbers(views.plot_data_map(record))

def test_marked_items_that_were_never_seen_are_not_circled():
    record = record_of([dict(p_targ=[.5, .6])], n=3)
    ax = views.plot_data_map(record, mark=[1, 2])
    np.testing.assert_allclose(ax.collections[1].get_offsets(), [[0, .6]], rtol=1e-6)
    assert 'circled: 1' in [o.get_text() for o in ax.texts]

def test_losses_leave_out_padding_and_rows_without_a_loss():
    record = record_of([dict(p_targ=[.5, .25, .9], item=[0, 1, 1], padding=np.array([False, False, True])),
                        dict(p_targ=[.5, .25, .9], item=[0, 1, 2], loss=[1., 3., np.nan])], n=3)
    b = views.loss_bands(record)
    np.testing.assert_allclose(b['mean'], [(np.log(2) + np.log(4)) / 2, 2.], rtol=1e-6)
    np.testing.assert_allclose(b.loc[1, ['low', 'median', 'high']].astype(float), np.quantile([1, 3], [.1, .5, .9]), rtol=1e-6)
    assert b['rows'].tolist() == [2, 2]

def test_losses_of_one_epoch_can_be_seen():
    ax = views.plot_losses(record_of([dict(p_targ=[.5, .25])]))
    assert ax.lines[0].get_marker() != 'None' and len(ax.lines[0].get_xdata()) == 1

def test_a_record_without_losses_says_so():
    record = record_of([dict(p_targ=[.5, .25], loss=[np.nan] * 2, grad_norm=[np.nan] * 2)])
    with pytest.raises(ValueError, match='could not be asked'): views.plot_losses(record)

def test_history_of_a_mixed_row():
    "A row that is mostly another item says nothing of this one; a twin in the batch does not either."
    h = views.item_history(record_of([dict(p_targ=[.2, .3], lam=[.4, .9], partner=[1, 0]), dict(p_targ=[.4, .7])]), 0)
    np.testing.assert_allclose(h['p_targ'], [.4], rtol=1e-6)
    np.testing.assert_allclose(h['p_rival'], [.6], rtol=1e-6)
    assert h['targ'].tolist() == ['cat'] and h['pred'].tolist() == ['dog']

def test_history_of_an_item_never_seen():
    with pytest.raises(ValueError, match="item 2 of 'train' was never seen"): views.plot_history(record_of([dict(p_targ=[.5, .6])], n=3), 2)

def test_history_says_what_was_predicted_most():
    record = record_of([dict(p_targ=[p, .5]) for p in (.1, .2, .9, .3)])
    ax = views.plot_history(record, 0)
    assert 'train item 0, labelled cat: predicted dog in 3 of 4 rows' == numbers(ax)
    assert [o.get_text() for o in ax.texts] == ['dog', 'cat', 'dog']

def test_the_cut_is_where_top_ends():
    record = seen(n=30)
    b = views.score_bins(record, 'loss', k=3)
    assert (b['items'].sum(), b['first'].sum()) == (30, 3) and b.attrs['cut'] == record.top(3, 'loss')['score'].iloc[-1]
    assert b.loc[b['first'] > 0, 'high'].min() >= b.attrs['cut']
    small = views.score_bins(record, 'aum', k=3)
    assert small.loc[small['first'] > 0, 'low'].max() <= small.attrs['cut']
    assert 'or less' in numbers(views.plot_score(record, 'aum', 3)) and 'or more' in numbers(views.plot_score(record, 'loss', 3))

def test_infinite_scores_are_counted_and_not_drawn():
    record = seen(n=30)
    ax = views.plot_score(record, 'forgetting', k=2)      # three items were never right
    assert numbers(ax) == '3 of 30 items of train have an infinite forgetting, and are not drawn'
    assert sum(o.get_height() for o in ax.patches[:60]) == 27

def test_a_k_beyond_the_items_is_all_of_them(): assert '12 of 12 items' in numbers(views.plot_score(seen(), k=50))

def test_class_pairs_count_issues_only():
    frame = pd.DataFrame(dict(targ=['a', 'a', 'b', 'c', None], likely=['b', 'b', 'a', 'c', 'a'], is_issue=[True, True, True, True, True]))
    pairs = views.class_pairs(frame)
    assert pairs.values.tolist() == [['a', 'b', 2], ['b', 'a', 1]]
    assert views.class_pairs(frame.assign(is_issue=[False, True, False, True, True])).values.tolist() == [['a', 'b', 1]]
    assert views.class_pairs(frame.drop(columns='is_issue'))['items'].sum() == 3

def test_class_pairs_of_many_classes_draws_the_most_frequent():
    frame = pd.DataFrame([(f'c{i}', f'c{i + 1}') for i in range(0, 60, 2) for _ in range(60 - i)], columns=['targ', 'likely'])
    ax = views.plot_class_pairs(seen(vocab=[f'c{i}' for i in range(60)]), frame, most=4)
    assert [o.get_text() for o in ax.get_yticklabels()] == ['c0', 'c1', 'c2', 'c3']
    assert ax.images[0].get_array().sum() == 60 + 58 and f'{len(frame)} suspects, 118 drawn' in numbers(ax)

def test_no_suspects_at_all():
    ax = views.plot_class_pairs(seen(), seen().top(0))
    assert numbers(ax).replace('\n', ' ') == 'no suspect has a likely class other than its label'
    ax.figure.canvas.draw()

def test_class_issues_are_shares_of_a_class():
    frame = pd.DataFrame(dict(targ=[1, 1, 1, 1, 0, 0, None], is_issue=[True, False, False, False, True, False, True]))
    assert views.class_issues(frame).values.tolist() == [[0, 2, 1, .5], [1, 4, 1, .25]]

def test_a_frame_is_left_as_it_was():
    record = seen()
    frame = flagged(record)
    before = frame.copy(deep=True)
    views.plot_class_pairs(record, frame)
    views.plot_class_issues(record, frame)
    pd.testing.assert_frame_equal(frame, before)

def test_two_scores_draw_finite_numbers_in_item_order():
    record = seen(n=30)
    ax = views.plot_two_scores(record, 'forgetting', 'loss')
    known = np.isfinite(record.score('forgetting'))
    np.testing.assert_allclose(ax.collections[0].get_offsets(), np.stack([record.score('forgetting'), record.score('loss')], 1)[known])
    assert '27 items' in numbers(ax)

def test_two_runs_must_be_of_the_same_items():
    with pytest.raises(ValueError, match='not of the same items'): views.plot_two_runs(seen(n=12), seen(n=13))

def test_two_runs_one_of_which_has_not_seen_all():
    one, two = seen(), record_of([dict(p_targ=[.5, .6, .2], item=[3, 4, 5])], n=12)
    ax = views.plot_two_runs(one, two)
    assert len(ax.collections[0].get_offsets()) == 3 and '3 items' in numbers(ax) and 'of the first 3' in numbers(ax)

def test_training_time_by_hand():
    "Wrong, right and forgotten, wrong again, then right for good; a row that is mostly another item is nobody's time."
    mixed = dict(p_targ=[.7, .1], lam=[np.nan, .1], partner=[1, 0])
    record = record_of([*(dict(p_targ=o) for o in ([.1, .9], [.9, .9], [.2, .9])), mixed, dict(p_targ=[.8, .9])])
    t = views.training_time(record).set_index('item')
    assert t.loc[0].tolist() == [2, 1, 2] and t.loc[1].tolist() == [4, 0, 0]
    assert t.columns.tolist() == ['learned', 'wavering', 'wrong']
    said = numbers(views.plot_training_time(record))
    assert '67% of 9 rows' in said and '0 of 2 items were wrong to the end' in said

def test_the_area_of_training_time_is_its_rows():
    record = seen(n=1000)
    ax = views.plot_training_time(record)
    t = views.training_time(record)
    for drawn, name in zip(ax.collections, ('wrong', 'wavering', 'learned')):
        p = drawn.get_paths()[0].vertices
        area = abs((p[:-1, 0] * p[1:, 1] - p[1:, 0] * p[:-1, 1]).sum()) / 2
        assert area == pytest.approx(100 * t[name].sum() / len(t), rel=1e-6), name

def test_pictures_are_saved(tmp_path):
    for name in ('a.png', 'b.svg'):
        views.save_picture(views.plot_losses(seen()), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    assert not plt.get_fignums()
