"A path is tried before anything is trained, a record that was taken away is noticed, stray epochs are named and adopted."
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from runs import RUN, everything, fill, frame, put, rows, same_answers

from fastai_xent.files import Place
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.records import XentRecords
from fastai_xent.writer import RecordReplaced, XentWriter

WAYS = pytest.mark.parametrize('make', [XentWriter, XentRecorder], ids=['writer', 'recorder'])
HOW = pytest.mark.parametrize('kw', [{}, dict(overwrite=True), dict(resume=True)], ids=['new', 'overwrite', 'resume'])

def everything_in(path) -> dict: return {p: p.read_bytes() if p.is_file() else None for p in Path(path).rglob('*')}


# -- tried when it is named

@WAYS
@HOW
@pytest.mark.parametrize('path', ['file', 'file/r', 'file/a/b/c', 'dir/file/r', 'link/r'])
def test_a_file_in_the_way(path, make, kw, tmp_path):
    (tmp_path / 'dir').mkdir()
    for o in ('file', 'dir/file'): (tmp_path / o).write_text('mine')
    (tmp_path / 'link').symlink_to(tmp_path / 'file')
    before = everything_in(tmp_path)
    with pytest.raises(OSError, match='(file|link) is a file, expected a directory'): make(tmp_path / path, **kw)
    assert everything_in(tmp_path) == before

@WAYS
@pytest.mark.parametrize('path', ['/proc/fastai_xent/r', '/proc'])
def test_a_system_s_directory(path, make):
    if not os.path.isdir('/proc/self'): pytest.skip('no /proc')
    with pytest.raises(OSError, match=f'(nothing can be written to {path}|{path} exists and is not a record)'): make(path)

@WAYS
@HOW
@pytest.mark.parametrize('error', [PermissionError(13, 'Permission denied'), OSError(30, 'Read-only file system'), OSError(28, 'No space left on device'),
                                   OSError(122, 'Disk quota exceeded'), OSError(5, 'Input/output error')], ids=lambda o: o.strerror)
@pytest.mark.grid
@pytest.mark.parametrize('half', [False, True])
def test_nothing_can_be_written(make, kw, error, half, tmp_path, monkeypatch):
    "Whoever runs this may write everywhere, so the system's answers are played. A record that is there stays whole."
    if kw: fill(tmp_path / 'a/r', RUN)
    before, real = everything_in(tmp_path), Path.write_bytes
    def refuse(self, data):
        if half: real(self, data[:100])
        raise type(error)(*error.args)
    monkeypatch.setattr(Path, 'write_bytes', refuse)
    with pytest.raises(OSError, match=f'nothing can be written to .*{error.strerror}.*use another path'): make(tmp_path / 'a/r', **kw)
    monkeypatch.undo()
    assert everything_in(tmp_path) == before

@pytest.mark.parametrize('name', ['x' * 300, 'a/' + 'y' * 300 + '/r', 'nul\0'], ids=['long', 'long above', 'nul'])
def test_impossible_names(name, tmp_path):
    with pytest.raises((OSError, ValueError)): XentWriter(tmp_path / name)
    assert not [*tmp_path.iterdir()]

def test_the_trial_leaves_nothing(tmp_path):
    XentWriter(tmp_path / 'a/b/c')
    (tmp_path / 'empty').mkdir()
    XentWriter(tmp_path / 'empty')
    assert [*tmp_path.rglob('*')] == [tmp_path / 'empty']
    XentWriter('memory://trial/r')
    assert not fsspec.filesystem('memory').exists('/trial/r') or not fsspec.filesystem('memory').find('/trial')

@WAYS
def test_a_disk_that_is_really_full(make):
    if not os.path.exists('/dev/full'): pytest.skip('no /dev/full')
    real = Path.write_bytes
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Path, 'write_bytes', lambda self, data: real(Path('/dev/full'), data))
        with pytest.raises(OSError, match='No space left'): make('full/r')
    assert not Path('full').exists()

@WAYS
def test_object_stores(make, monkeypatch):
    "A protocol that nobody knows, one whose package is missing, and a bucket that says no."
    with pytest.raises(ValueError, match='attic://b/r cannot be reached: Protocol not known: attic'): make('attic://b/r')
    fsspec.register_implementation('absent', 'no_such_package.Fs', errtxt='install no_such_package', clobber=True)
    with pytest.raises(ImportError, match='absent://b/r cannot be reached: install no_such_package'): make('absent://b/r')
    from fsspec.implementations.memory import MemoryFileSystem
    class Denied(Exception): pass
    class Closed(MemoryFileSystem):
        protocol = 'closed'
        def pipe_file(self, *_, **__): raise Denied('The specified bucket does not exist')
    fsspec.register_implementation('closed', Closed, clobber=True)
    with pytest.raises(OSError, match='nothing can be written to closed://b/r: The specified bucket does not exist'): make('closed://b/r')

@WAYS
@pytest.mark.parametrize('kw', [{}, dict(overwrite=True), dict(resume=True)], ids=['new', 'overwrite', 'resume'])
@pytest.mark.parametrize('what', ['notes.txt', 'sub/deep/thesis.pdf', 'rows/mine.parquet', 'data.parquet'])
def test_a_folder_that_is_no_record(what, make, kw, tmp_path):
    (tmp_path / what).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / what).write_text('mine')
    before = everything_in(tmp_path)
    with pytest.raises(FileExistsError, match=f'exists and is not a record of fastai_xent: it has {what}. Use a path'): make(tmp_path, **kw)
    assert everything_in(tmp_path) == before

def test_hidden_files_do_not_make_a_folder_somebody_s(tmp_path):
    for o in ('.DS_Store', '.gitkeep', '.ipynb_checkpoints/.x'):
        (tmp_path / o).parent.mkdir(exist_ok=True)
        (tmp_path / o).write_text('')
    fill(tmp_path, RUN)
    assert XentRecord(tmp_path).n_epochs == 3 and (tmp_path / '.DS_Store').exists()

def test_home(tmp_path, monkeypatch):
    "`~` wherever a path is taken."
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    record = fill('~/runs/a', RUN)
    assert record.path == tmp_path / 'runs/a' and XentRecord('~/runs/a').n_epochs == XentRecord(Path('~/runs/a')).n_epochs == 3
    assert list(XentRecords('~/runs/*').records) == list(XentRecords(['~/runs/a']).records) == ['a']
    assert list(XentRecords(Path('~/runs/*')).records) == ['a']
    record.to_file('~/out/scores.csv')
    assert (tmp_path / 'out/scores.csv').exists() and not (tmp_path / '~').exists()
    XentWriter('~/runs/a', overwrite=True)
    assert not (tmp_path / 'runs/a/_record.json').exists()


# -- removed or replaced under a writer

def test_removed_under_a_writer(tmp_path):
    "Before and while it writes; nothing appears in its place."
    path = tmp_path / 'r'
    writer = XentWriter(path)
    fill(writer, RUN)
    shutil.rmtree(path)
    assert not writer.in_step()
    for ask in (lambda: put(writer, 1, 3, 'train', rows([0])), lambda: writer.set_items('test', frame(2), 'other')):
        with pytest.raises(RecordReplaced, match=r'the record at .* was removed since .* nothing more is written'): ask()
    writer.close()
    writer.keep_cost(1., 2.)
    assert not path.exists()

@pytest.mark.parametrize('url', [None, 'memory://replaced/r'])
def test_replaced_under_a_writer(url, tmp_path):
    "The new record is whole, whichever of the two goes on first."
    path = url or tmp_path / 'r'
    old = XentWriter(path, overwrite=True)
    fill(old, RUN)
    new = XentWriter(path, overwrite=True)
    for what in ('removed', 'replaced'):
        with pytest.raises(RecordReplaced, match=what): put(old, 1, 3, 'train', rows([0, 1]))
        with pytest.raises(RecordReplaced, match=what): old.set_items('train', frame(9), 'x')
        if what == 'removed': want = everything(fill(new, RUN))
    old.close()
    same_answers(everything(XentRecord(path)), want)
    assert XentRecord(path).meta['id'] == new.record.meta['id'] and XentRecord(path)._strays() == {}

def test_a_reader_leaves_nothing_where_a_record_was(tmp_path):
    record = fill(tmp_path / 'r', RUN)
    shutil.rmtree(tmp_path / 'r')
    assert np.isnan(record.score()).all()
    assert not (tmp_path / 'r').exists()

def test_a_loop_goes_on_when_its_record_is_gone(tmp_path):
    import torch
    writer = XentWriter(tmp_path / 'r', items=3)
    give = lambda e: writer.add(split='train', epoch=e, item=[0, 1, 2], pred=torch.zeros(3, 2), targ=torch.zeros(3, dtype=torch.long))
    give(0), give(1)
    writer.wait()
    shutil.rmtree(tmp_path / 'r')
    with pytest.warns(UserWarning, match='XentWriter has stopped recording: RecordReplaced.*The training goes on') as said:
        for e in range(2, 6): give(e)
        writer.close()
    assert len([o for o in said if 'Xent' in str(o.message)]) == 1 and not (tmp_path / 'r').exists()


# -- stray epochs

def orphaned(path, items=True):
    "A record whose `_record.json` has vanished, and perhaps its lists of items."
    want = fill(path, RUN).to_df()
    (path / '_record.json').unlink()
    if not items: shutil.rmtree(path / '_items')
    return want

@pytest.mark.parametrize('items', [True, False])
def test_epochs_without_a_record(items, tmp_path):
    "They are named, by whoever looks; adopted, all rows are there, and the record goes on."
    want = orphaned(tmp_path / 'r', items)
    with pytest.raises(FileNotFoundError, match=r'not a record.*stray epochs, train 0, 1, 2; valid 0, 1, 2; `XentWriter\(path, resume=True, adopt=True\)`'): XentRecord(tmp_path / 'r')
    for kw in ({}, dict(resume=True), dict(overwrite=True)):
        with pytest.raises(FileExistsError, match=r'stray epochs \(train 0, 1, 2; valid 0, 1, 2\); `resume=True, adopt=True`'): XentWriter(tmp_path / 'r', **kw)
    writer = XentWriter(tmp_path / 'r', resume=True, adopt=True)
    record = XentRecord(tmp_path / 'r')
    pd.testing.assert_frame_equal(record.to_df(), want)
    assert [None if pd.isna(o) else o for o in record.items()['name']] == ([f'train {i}' for i in range(6)] if items else [None] * 6)
    assert len(record.top(3)) == 3 and 'stray' not in repr(record)
    put(writer, 2, 3, 'train', rows([0, 1]))
    writer.close()
    assert XentRecord(tmp_path / 'r').n_epochs == 4 and len(XentRecord(tmp_path / 'r').to_df('train', 3)) == 2

def test_epochs_that_no_list_covers(tmp_path):
    "A split that the record does not know, and epochs before its first: not read, named, their numbers not used again; adopted."
    path = tmp_path / 'r'
    fill(path, RUN)
    other = XentWriter(path, overwrite=True)
    old = fill(tmp_path / 'old', RUN)
    other.set_items('train', frame(6, 'train {}'), 'hash of train', epoch=2)
    put(other, 1, 2, 'train', RUN[1][4][3])
    other.close()
    shutil.copytree(tmp_path / 'old/rows', path / 'rows', dirs_exist_ok=True)
    record = XentRecord(path)
    assert record.epochs == [(1, 'train', 2)] and record.n_epochs == 3 and len(record.to_df()) == 5
    assert record.sql('select count(*) n from record').n[0] == 5 and len(record.item(1)) == 2
    assert 'stray epochs: train 0, 1; valid 0, 1, 2: no list of items covers them, and' in ' '.join(repr(record).split())
    XentWriter(path, resume=True, adopt=True)
    record = XentRecord(path)
    pd.testing.assert_frame_equal(record.to_df(), old.to_df())
    assert 'stray' not in repr(record)

def test_what_is_not_adopted(tmp_path):
    "Where it is not known which items they are of."
    path = tmp_path / 'r'
    writer = XentWriter(path)
    writer.set_items('train', frame(2), 'f', epoch=5)
    writer.close()
    other = XentWriter(tmp_path / 'o')
    other.set_items('train', frame(9), 'f')
    put(other, 0, 0, 'train', rows([0, 7]))
    other.close()
    shutil.copytree(tmp_path / 'o/rows', path / 'rows')
    with pytest.raises(ValueError, match='have an item 7, the list of items has 2'): XentWriter(path, resume=True, adopt=True)
    writer.set_items('train', frame(9), 'g', epoch=6)
    with pytest.raises(ValueError, match="'train' has several lists of items"): XentWriter(path, resume=True, adopt=True)
    with pytest.raises(ValueError, match='give `resume=True` too'): XentWriter(path, adopt=True)
    assert XentRecord(path).epochs == []
    new = XentWriter(tmp_path / 'new', resume=True, adopt=True)          # nothing there: a new record
    fill(new, RUN)
    assert XentRecord(tmp_path / 'new').n_epochs == 3


def test_records_in_memory_share_nothing():
    "fsspec's own memory is one for the whole process: while one record lists its files, another's thread would change it."
    from fsspec.implementations.memory import MemoryFileSystem
    from fastai_xent.files import Place
    before, places = dict(MemoryFileSystem.store), [Place(), Place()]
    for k, p in enumerate(places): p.write(f'a/{k}', lambda f: f.write(b'1'))
    assert [p.files() for p in places] == [['a/0'], ['a/1']]
    assert MemoryFileSystem.store == before

@pytest.mark.skipif(os.name != 'posix', reason="names are text here")
@pytest.mark.parametrize('kind', [str, Path])
def test_a_path_that_is_not_utf8(kind, tmp_path):
    path = kind(os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9'))
    for make in (Place, XentWriter, XentRecord):
        with pytest.raises(ValueError, match='no path in UTF-8.*use another path'): make(path)
    assert not list(tmp_path.iterdir())
    assert XentWriter(tmp_path/'café').path == tmp_path/'café'
