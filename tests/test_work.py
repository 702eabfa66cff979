"Work that is done once: files opened, directories walked, rows folded; counted, not timed."
from collections import Counter

import pytest
from runs import RUN, fill, frame, put, rows

from fastai_xent import cache, epochs, running
from fastai_xent.files import Place
from fastai_xent.record import XentRecord
from fastai_xent.writer import XentWriter


@pytest.fixture
def counted(monkeypatch):
    "Counts walks over the directory, looks at epochs' ends, openings of rows and folds."
    n = Counter()
    def count(owner, name, what):
        real = getattr(owner, name)
        def f(*args, **kw):
            n[what] += 1
            return real(*args, **kw)
        monkeypatch.setattr(owner, name, f)
    for owner, name, what in ((Place, 'files', 'walks'), (Place, 'stamp', 'stamps'), (epochs, 'read_items', 'reads'), (epochs.Epochs, 'scan', 'scans'),
                              (cache, 'fold', 'folds'), (Place, 'table', 'lists of items'), (running.States, '__init__', 'states')): count(owner, name, what)
    return n

@pytest.fixture
def record(tmp_path):
    record = fill(tmp_path / 'r', RUN)
    record.scores(), record.scores('valid')
    return XentRecord(tmp_path / 'r')

TRAIN = VALID = 3 # epochs in RUN

@pytest.mark.parametrize('ask, want', [
    (lambda r: r.top(3), dict(walks=1, stamps=TRAIN, states=1)),
    (lambda r: r.score('el2n'), dict(walks=1, stamps=TRAIN, states=1)),
    (lambda r: r.scores(), {'walks': 1, 'stamps': TRAIN, 'states': 1, 'lists of items': 1}),
    (lambda r: r.item(3), dict(walks=1, reads=TRAIN)),
    (lambda r: r.sql('select count(*) from record'), dict(walks=1)),
    (lambda r: r.sql('select * from record join items using (split, item)'), {'walks': 1, 'lists of items': 2}),
    (lambda r: r.to_df('train', -1), dict(walks=1, scans=1)),
    (lambda r: r.epochs, dict(walks=1)),
    (lambda r: r.label_issues(noise_rate=.1), {'walks': 1, 'stamps': 2 * TRAIN, 'states': 2, 'lists of items': 1}),
    (lambda r: r.label_issues('valid'), {'walks': 2, 'stamps': 2 * VALID, 'states': 2, 'lists of items': 1}),
    (lambda r: r.label_issues(), {'walks': 2, 'stamps': 2 * TRAIN + VALID, 'states': 3, 'scans': TRAIN + VALID, 'lists of items': 1}),
], ids=['top', 'score', 'scores', 'item', 'sql without items', 'sql with items', 'to_df', 'epochs', 'issues of a known rate',
        'issues of valid', 'issues'])
@pytest.mark.filterwarnings('ignore:Wrong labels among')
def test_a_question(ask, want, record, counted):
    ask(record)
    assert counted == want

def test_an_epoch_is_written_without_a_look_at_the_others(tmp_path, counted):
    "While a writer holds the lock nobody compacts: one look before the first epoch is enough."
    with XentWriter(tmp_path / 'r') as writer:
        writer.set_items('train', frame(5), 'f')
        counted.clear()
        for e in range(4): put(writer, 0, e, 'train', rows(range(5), seed=e))
        assert counted == dict(walks=1)

def test_a_first_question_folds_once(tmp_path, counted):
    "All scores of a split in one fold, each epoch read once."
    record = fill(tmp_path / 'r', RUN)
    counted.clear()
    record.scores()
    assert counted['folds'] == 1 and counted['reads'] <= 2 * TRAIN      # once for what an epoch is as a whole, once for its rows
    counted.clear()
    record.top(), record.scores(), record.score('aum')
    assert counted['folds'] == counted['reads'] == 0

def test_the_verdict_reads_five_columns_once(record, monkeypatch):
    "Of train and of valid, each epoch once; names of classes are looked up once a class, not once an item."
    read, real = [], epochs.Epochs.read
    monkeypatch.setattr(epochs.Epochs, 'read', lambda self, found, columns=None: read.append((*found, *sorted(columns))) or real(self, found, columns))
    named, name = [], XentRecord._class_name
    monkeypatch.setattr(XentRecord, '_class_name', lambda self, c: named.append(c) or name(self, c))
    record.label_issues()
    assert {o[1:] for o in read} == {('lam', 'margin', 'occurrence', 'p_targ', 'targ')} and len(read) == len({*read}) == TRAIN + VALID
    assert len(named) <= 2 * (4 + 1)                       # four classes and none, of the labels and of the likely ones

def test_many_items_are_named_only_where_they_are_shown(tmp_path, counted):
    writer = XentWriter(tmp_path / 'r')
    writer.set_items('train', frame(10000), 'f')
    put(writer, 0, 0, 'train', rows(range(10000)))
    writer.close()
    counted.clear()
    writer.record.top(5)
    assert counted['lists of items'] == 0
