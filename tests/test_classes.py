"A class is its name: it comes back from every file, or is refused, and is never another class."
import io
import json
import unicodedata

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import CategoryMap
from fastai.learner import Learner
from fastai.torch_core import TensorCategory
from helpers import Coded, Through, quiet
from hypothesis import example, given
from hypothesis import strategies as st
from pandas._libs.parsers import STR_NA_VALUES

from fastai_xent.classes import class_index, is_missing, read_as_missing, vocab_difference
from fastai_xent.items import class_names
from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder
from fastai_xent.record import XentRecord
from fastai_xent.writer import XentWriter


# -- names through files

def review(labels): return pd.DataFrame({'item': range(len(labels)), 'label': labels})
def csv(labels, **kw): return pd.read_csv(io.StringIO(review(labels).to_csv(index=False)), **kw)['label'].tolist()
def json_frame(labels): return pd.read_json(io.StringIO(review(labels).to_json(orient='records')))['label'].tolist()
def as_float(o):
    try: return float(o)
    except ValueError: return o

ROADS = {
    'none': list,
    'csv': csv,
    'csv as text': lambda o: csv(o, dtype=str),
    'csv with a hole': lambda o: csv([*o, None])[:-1],
    'csv without NA': lambda o: csv(o, keep_default_na=False),
    'json': lambda o: json.loads(json.dumps(o)),
    'json frame': json_frame,
    'parquet': lambda o: pd.read_parquet(parquet(o))['label'].tolist(),
    'object of NumPy': lambda o: [np.asarray(v)[()] for v in o],
    'Excel, numbers as floats': lambda o: [as_float(v) if isinstance(v, int) and not isinstance(v, bool) else v
                                           for v in o],
    'a spreadsheet that guesses': lambda o: [as_float(v) if isinstance(v, str) else v for v in o],
    'spaces around': lambda o: [f' {v}\t' if isinstance(v, str) else v for v in o],
    'spaces cut off': lambda o: [v.strip() if isinstance(v, str) else v for v in o],
    'other accents': lambda o: [unicodedata.normalize('NFD', v) if isinstance(v, str) else v for v in o],
    'all capitals of true': lambda o: [v.upper() if isinstance(v, str) and v.lower() in ('true', 'false') else v
                                       for v in o]}

def parquet(labels):
    f = io.BytesIO()
    review(labels).to_parquet(f)
    return f

VOCABS = {
    'words': ['cat', 'dog', 'café', 'ﬁn', 'Cat'],
    '1 to 12': [str(i) for i in range(1, 13)],
    'numbers 1 to 12': list(range(1, 13)),
    'numbers with gaps': [3, 10, 700],
    'negative': [-1, 0, 1],
    'digits': list(range(10)),
    'zeros before': ['007', '012', '100'],
    'booleans': [False, True],
    'booleans, turned': [True, False],
    'true and false': ['false', 'true', 'unsure'],
    'decimals': ['0.5', '1.0', '1.25'],
    'long numbers': ['9007199254740993', '12345678901234567890'],
    'one': ['1']}
BACK = [(v, r) for v in VOCABS for r in ROADS]

@pytest.mark.parametrize('vocab, road', BACK)
def test_names_come_back(vocab, road):
    names = VOCABS[vocab]
    labels = ROADS[road](names)
    assert [class_index(names, o, is_name=True) for o in labels] == list(range(len(names)))

ODD = ['1', '01', '1.0', '1e0', '+1', '10', '1e1', '2', '02', ' 2', '2 ', '-0', '0', '0.0', 'True', 'true', 'TRUE', 'False', 'nan', 'None', 'NA', '', 'null', 'inf', 'Infinity',
       'a', ' a', 'a ', 'é', 'e\u0301', 'ﬁ', 'fi', '1_0', '１', '0x1', '1,5', '1.5', '1.50', '.5', '0.5', '1e400',
       '9007199254740993', '9007199254740992', '1.1', '1.10', '2020-01-01', '\u00a01']
text_vocabs = st.lists(st.sampled_from(ODD) | st.text(alphabet='01.eE+- aé', max_size=4), min_size=1, max_size=8, unique=True)
int_vocabs = st.lists(st.integers(-3, 14) | st.integers(2**53 - 2, 2**53 + 2), min_size=1, max_size=8, unique=True)
LOSES = {'spaces cut off', 'other accents', 'all capitals of true'} # Text that is another name now cannot be told from that name

@given(names=text_vocabs | int_vocabs | st.permutations([True, False]),
       road=st.sampled_from(sorted(set(ROADS) - LOSES)))
@example(['07', '7'], 'csv').via('zeros')
@example(['1.1', '1.10'], 'csv').via('decimals')
@example(['None', 'a'], 'csv').via('missing')
@example(['1', 'nan'], 'csv').via('missing')
@example([2**53, 2**53 + 1], 'csv with a hole').via('floats')
def test_never_another_class(names, road):
    "Whatever the file did to the names: the class is the one that went in, or it is refused."
    names = list(names)
    for k, value in enumerate(ROADS[road](names)):
        try: found = class_index(names, value, is_name=True)
        except ValueError: continue
        assert found == k, f"{names[k]!r} became {value!r}, and that was taken for {names[found]!r}"

@given(names=text_vocabs | int_vocabs, at=st.integers(0, 9),
       kind=st.sampled_from([int, float, np.int64, np.float32, np.uint8, torch.tensor, TensorCategory, np.array]))
def test_a_number_has_one_meaning(names, at, kind):
    "A name and another's place: refused. A name alone, or a place alone among names that are no numbers: taken."
    value = kind(at)
    named = [k for k, o in enumerate(names) if as_float(o) == at]
    place = [at] * (at < len(names))
    try: found = class_index(names, value)
    except ValueError: found = None
    if len(named) == 1 and place in ([], named): assert found == named[0]
    elif named: assert found is None
    elif found is not None: assert [found] == place and all(isinstance(as_float(o), str) for o in names)


# -- what is refused, and how

@pytest.mark.parametrize('vocab, value, words', [
    ('1 to 12', 2, "2 may be two classes: the one called '2', or the one at place 2, called '3'; write its name as text, '2' or '3'"),
    ('numbers 1 to 12', 2,
     "2 may be two classes: the one called 2, or the one at place 2, called 3; write its name as text, '2' or '3'"),
    ('1 to 12', 2., r"2\.0 may be two classes"), ('1 to 12', torch.tensor(2), '2 may be two classes'),
    ('1 to 12', 0, '0 is no class; expected one of 1, 2, .*, 10, …'),
    ('booleans, turned', 1, '1 may be two classes: the one called True, or the one at place 1, called False'),
    ('words', 'dgo', "'dgo' is no class; expected one of cat, dog, café, ﬁn, Cat"),
    ('words', '1', "'1' is no class"), ('words', 5, '5 is no class'), ('words', -1, '-1 is no class'),
    ('words', 1.5, r'1\.5 is no class'), ('words', True, 'True is no class'),
    ('words', None, 'a missing value is no class$'), ('words', np.nan, 'a missing value is no class$'),
    ('words', pd.NA, 'a missing value is no class$'), ('words', ['cat'], 'is no class'),
    ('words', np.inf, 'inf is no class'), ('digits', 10, '10 is no class'), ('digits', True, 'True is no class'),
    ('zeros before', 1, '1 is no class')])
def test_refusals(vocab, value, words):
    with pytest.raises(ValueError, match=words): class_index(VOCABS[vocab], value)

def test_two_names_that_read_alike():
    with pytest.raises(ValueError, match="7 may be 2 classes: those called '7' and '07'"): class_index(['7', '07', '8'], 7, is_name=True)
    assert class_index(['7', '07', '8'], '07') == 1
    with pytest.raises(ValueError, match="'a' may be 2 classes"): class_index(['a', 'b', 'a'], 'a')

@pytest.mark.parametrize('name', sorted(STR_NA_VALUES))
def test_names_that_pandas_reads_as_missing(name):
    assert read_as_missing(['cat', name]) == [name]
    value = csv(['cat', name])[1]
    assert is_missing(value)
    with pytest.raises(ValueError, match='pandas reads the class .* as missing: read the file with `keep_default_na=False`'): class_index(['cat', name], value)
    assert class_index(['cat', name], csv(['cat', name], keep_default_na=False)[1]) == 1

def test_classes_without_names():
    assert [class_index(range(3), o) for o in (2, '2', 2., np.int8(2), ' 2', '2.0')] == [2] * 6
    for o in (3, -1, '3', 'cat', 1.5):
        with pytest.raises(ValueError, match='expected one of 0, 1, 2'): class_index(range(3), o)


# -- the vocab of a record

class Odd:
    "Something with a text."
    def __str__(self): return 'odd'

@pytest.mark.parametrize('vocab, names', [
    (np.array([3, 1]), [3, 1]), (CategoryMap(pd.Series([2, 1, 2])), [1, 2]), ([True, False], [True, False]),
    (np.array([False, True]), [False, True]), (['b', 'a'], ['b', 'a']),
    (CategoryMap([1, 2], add_na=True), ['#na#', '1', '2']), ([1., 2.5], ['1.0', '2.5']),
    ([Odd(), Odd()], ['odd', 'odd']), ([True, 2], ['True', '2']), ((np.str_('a'), 'b'), ['a', 'b']),
    (pd.Categorical(['x', 'y']).categories, ['x', 'y']), (['a\udce9', 'b'], ['a\\udce9', 'b']),
    ([pd.Timestamp('2020-01-01'), pd.Timestamp('2021-01-01')], ['2020-01-01 00:00:00', '2021-01-01 00:00:00'])])
def test_names_keep_their_type(vocab, names, tmp_path):
    dls = DataLoaders(TfmdDL(Coded(9), bs=3, num_workers=0))
    dls.vocab = vocab
    got = class_names(dls, len(names))
    assert got == names and [type(o) for o in got] == [type(o) for o in names]
    record = XentWriter(tmp_path / 'r')
    record.set_items('train', pd.DataFrame({'item': range(2), 'name': None, 'source': None}), 'mark', got)
    back = XentRecord(tmp_path / 'r')
    assert back.meta['vocab'] == names and [type(o) for o in back.meta['vocab']] == [type(o) for o in names]
    assert [back._class_name(k) for k in range(len(names))] == names
    assert ', '.join(map(str, names)) in repr(back)
    if len(set(map(str, names))) == len(names): assert [class_index(back.meta['vocab'], o, is_name=True) for o in list(vocab)] == list(range(len(names)))

def test_other_names_are_told():
    assert vocab_difference(['1', '2'], [1, 2]) == vocab_difference(None, [1]) == vocab_difference([True], []) == ''
    assert vocab_difference(['a', 'b'], ['a', 'c']) == "class 1 was 'b' and is 'c'"
    assert vocab_difference(['a'], ['a', 'b']) == 'there were 1 classes and are 2'

def test_an_old_record_with_names_as_text_goes_on(tmp_path):
    "Names that are numbers were written as text; the same training can be resumed, and knows its items."
    def fit(vocab, **kw):
        dls = DataLoaders(TfmdDL(Coded(9), bs=3, num_workers=0), TfmdDL(Coded(6), bs=3, num_workers=0))
        dls.vocab = vocab
        learn = quiet(Learner(dls, Through(), loss_func=XentLossFlat(), lr=.1, cbs=XentRecorder(tmp_path / 'r', **kw)))
        learn.fit(1)
        return learn.xent_recorder.record
    fit(['1', '2', '3'])
    record = fit([1, 2, 3], resume=True)
    assert record.n_epochs == 2 and len(record.to_df('train', 1)) == 9
