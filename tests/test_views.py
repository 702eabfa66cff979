"""The numbers behind the pictures, and what is handed to matplotlib."""
import subprocess

import numpy as np
import pandas as pd
import pytest

from fastai_xent import demo, views
from fastai_xent.store import XentRecord


def record_of(epochs, n=2, path=None, split='train', vocab=('cat', 'dog')) -> XentRecord:
    "A record made by hand: a dict of columns an epoch, all from `p_targ`, of two classes and label 0."
    record = XentRecord.new(path)
    record.set_items(split, pd.DataFrame(dict(item=range(n), name=None, source=pd.NA)), 'made by hand', list(vocab))
    for e, cols in enumerate(epochs):
        p = np.asarray(cols['p_targ'], dtype=float)
        made = dict(item=np.arange(len(p)), loss=-np.log(p), grad_norm=2**.5 * (1 - p), el2n=2**.5 * (1 - p),
                    margin=np.log(p / (1 - p)), pred=(p < .5).astype(int), targ=np.zeros(len(p), dtype=int))
        cols = {**made, **{k: np.asarray(v) for k, v in cols.items()}, 'p_targ': p}
        record.add(0, e, split, {k: v.astype(np.float32) if v.dtype == float else v for k, v in cols.items()})
    return record

MIXED = [dict(p_targ=[.2, .3], lam=[np.nan, .9], partner=[1, 0]), dict(p_targ=[.8, .7], lam=[.5, .5], partner=[1, 0])]
PADDED = [dict(p_targ=[.2, .8, .9], item=[0, 1, 0], padding=np.array([False, False, True])), dict(p_targ=[.6, .4])]

@pytest.mark.parametrize('epochs, want', [(MIXED, [.4, (.9 * .3 + .5 * .7) / 1.4]), (PADDED, [.4, .6])], ids=['mixed', 'padded'])
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
