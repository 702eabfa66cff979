"The cleaner: its Python side by messages and traits, and all of it by keyboard in a real JupyterLab."
import asyncio
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fastai_xent.acts import prune, relabel
from fastai_xent.cleaner import XentCleaner, _widget_class
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.reviews import Reviews
from helpers import learner, rng_state
from test_reviews import VOCAB, record_of
from test_show import folder, images, loaders, masks, people, tables, Table, fit_recorded  # noqa: F401 fixtures

pytest.importorskip('anywidget', reason="the cleaner needs anywidget: pip install 'fastai_xent[widgets]'")
N = 30
TARG = [i % 3 for i in range(N)]
PRED = [(i + (i % 5 < 3)) % 3 for i in range(N)]      # three in five have another likely class


@pytest.fixture
def record(tmp_path): return record_of(tmp_path/'run', None, TARG, splits=('train', 'valid'), pred=PRED)

@pytest.fixture
def dls():
    res = loaders(torch.as_tensor(images(N)), TARG)
    res.vocab = VOCAB
    return res

@pytest.fixture
def cleaner(record, dls): return XentCleaner(record, dls, n=10, per_page=4, who='ann', by='loss')

def press(cleaner, do, **kw):
    "As the page sends it."
    cleaner.widget._handle_custom_msg(dict(do=do, number='page-1', **kw), [])
    json.dumps([cleaner.widget.cards, cleaner.widget.chosen, cleaner.widget.state], allow_nan=False)
    return cleaner.widget.state

def shown(cleaner) -> list: return [o['item'] for o in cleaner.widget.cards]
def marks(cleaner) -> dict: return {int(k): o['text'] for k, o in cleaner.widget.chosen.items()}
def told(cleaner) -> list: return cleaner.decisions[['item', 'decision', 'label']].values.tolist()


# -- what is shown

def test_the_suspects_come_largest_first_a_page_at_a_time(cleaner, record):
    assert shown(cleaner) == record.top(4, 'loss')['item'].tolist() == [0, 1, 2, 3]
    assert cleaner.widget.state['pages'] == 3 and cleaner.widget.state['n'] == 10
    press(cleaner, 'page', page=2)
    assert shown(cleaner) == [8, 9]

@pytest.mark.parametrize('by', ['el2n', 'aum', 'loss'])
def test_any_score_orders_them(record, dls, by):
    c = XentCleaner(record, dls, by=by, per_page=7)
    assert shown(c) == record.top(7, by)['item'].tolist()
    assert [o['score'] for o in c.widget.cards] == [f'{o:.3g}' for o in record.top(7, by)['score']]

def test_a_card_says_given_and_likely(cleaner):
    a, b = cleaner.widget.cards[0], cleaner.widget.cards[3]
    assert (a['given'], a['likely'], a['p_given']) == ('cat', 'dog', '10%')
    assert (b['given'], b['likely']) == ('cat', '')

def test_only_the_page_is_read_and_then_the_next(cleaner, dls):
    assert dls[0].dataset.read == [0, 1, 2, 3] and not dls[1].dataset.read
    press(cleaner, 'ahead')
    assert dls[0].dataset.read == [0, 1, 2, 3, 4, 5, 6, 7] and shown(cleaner) == [0, 1, 2, 3]
    press(cleaner, 'page', page=1)
    press(cleaner, 'page', page=0)
    assert dls[0].dataset.read == [0, 1, 2, 3, 4, 5, 6, 7]

def test_no_model_runs_and_nothing_is_changed(tmp_path):
    learn = learner(seed=1)
    learn.add_cb(XentRecorder(tmp_path/'run'))
    learn.fit(2)
    record = learn.xent_recorder.record
    rows, labels = record.to_df(), [int(y) for _, y in learn.dls.train_ds]
    learn.model.forward = lambda *_: pytest.fail('the model was run')
    state = rng_state()
    c = XentCleaner(learn, n=6)
    press(c, 'decide', items=shown(c), decision='drop')
    now = rng_state()
    assert torch.equal(now[0], state[0]) and now[1:] == state[1:]
    pd.testing.assert_frame_equal(XentRecord(tmp_path/'run').to_df(), rows)
    assert [int(y) for _, y in learn.dls.train_ds] == labels and len(c.decisions) == 6

def test_pictures_are_those_of_the_items(cleaner, dls):
    for card in cleaner.widget.cards:
        kind, data = card['picture'].split(';base64,')
        got = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB').resize((8, 8), Image.Resampling.BOX))
        want = dls[0].dataset.x[card['item']].movedim(0, -1).numpy() * 255
        assert kind in ('data:image/png', 'data:image/jpeg') and np.abs(got - want).mean() < 12

def test_rows_of_tables(people):  # noqa: F811
    dls = tables(people)
    c = XentCleaner(fit_recorded(dls, Table()).record, dls)
    for card in c.widget.cards: assert dict(card['row'])['town'] == people.loc[int(card['name']), 'town']

def test_texts_and_pictures_from_a_record_alone(folder):  # noqa: F811
    names = [str(folder[0]), '<img src=x onerror=alert(1)>', 'a text ' * 200]
    c = XentCleaner(record_of(None, names, [0, 1, 2]))
    a, b, long = sorted(c.widget.cards, key=lambda o: o['item'])
    assert a['picture'].startswith('data:image/') and b['text'] == b['name'] == names[1] and len(long['text']) < 1000

def test_masks_have_no_single_label(folder):  # noqa: F811
    dls, r = masks(folder, [], maps=range(6))
    c = XentCleaner(r, dls, by='loss')
    assert c.widget.state['classes'] == [] and c.widget.cards[0]['given'] == '' and 'picture' in c.widget.cards[0]
    first = shown(c)
    press(c, 'decide', items=first[:1], decision='drop')
    press(c, 'decide', items=first[1:2], decision='keep')
    assert sorted(told(c)) == sorted([[first[0], 'drop', None], [first[1], 'keep', None]])
    assert 'no other likely label' in press(c, 'decide', items=first[2:3], decision='likely')['said']

def test_an_item_that_cannot_be_read_says_so(record, dls):
    class Broken(type(dls[0].dataset)):
        def __getitem__(self, i):
            if i == 2: raise OSError('torn file')
            return super().__getitem__(i)
    dls[0].dataset.__class__ = Broken
    c = XentCleaner(record, dls, per_page=4, by='loss')
    assert 'OSError: torn file' in c.widget.cards[2]['text'] and 'picture' in c.widget.cards[1]

def test_other_items_are_refused(record):
    with pytest.raises(ValueError, match='30 items in the record and 6 in these'): XentCleaner(record, loaders(torch.as_tensor(images(6))))

def test_a_score_that_nobody_has(record, dls):
    with pytest.raises(ValueError, match="no item of 'train' has the score 'grand'"): XentCleaner(record, dls, by='grand')

def test_something_else_is_refused():
    with pytest.raises(TypeError, match='got a Learner, expected an XentRecord, or a Learner that was trained'): XentCleaner(learner())

def test_without_anywidget_it_says_what_to_install(record, monkeypatch):
    _widget_class.cache_clear()
    monkeypatch.setitem(sys.modules, 'anywidget', None)
    with pytest.raises(ImportError, match=r"pip install 'fastai_xent\[widgets\]'"): XentCleaner(record)
    monkeypatch.undo()
    _widget_class.cache_clear()


# -- decide

def test_each_choice(cleaner):
    press(cleaner, 'decide', items=[0], decision='likely')
    press(cleaner, 'decide', items=[1], decision='drop')
    press(cleaner, 'decide', items=[2], decision='relabel', label=1)
    press(cleaner, 'decide', items=[3], decision='keep')
    press(cleaner, 'page', page=1)
    s = press(cleaner, 'decide', items=[4], decision='unsure')
    assert told(cleaner) == [[0, 'relabel', 'dog'], [1, 'drop', None], [2, 'relabel', 'dog'], [3, 'keep', 'cat'], [4, 'unsure', None]]
    assert s['done'] == 5 and '5 decided, 25 left in train' in s['counted'] and s['answered'] == 'page-1'
    assert marks(cleaner) == {4: 'unsure'}
    press(cleaner, 'page', page=0)
    assert marks(cleaner) == {0: '→ dog', 1: 'drop', 2: '→ dog', 3: 'keep'}

def test_several_at_once_each_with_its_own_likely_label(cleaner):
    s = press(cleaner, 'decide', items=[0, 1, 2, 3], decision='likely')
    assert told(cleaner) == [[0, 'relabel', 'dog'], [1, 'relabel', 'fox'], [2, 'relabel', 'cat']]
    assert s['said'] == '3 items given their likely labels. 1 item has no other likely label: undecided.'
    assert press(cleaner, 'undo')['said'] == 'Undone: item 0, item 1, item 2.' and not told(cleaner)

def test_a_second_thought(cleaner):
    press(cleaner, 'decide', items=[0], decision='drop')
    press(cleaner, 'decide', items=[0], decision='keep')
    assert marks(cleaner) == {0: 'keep'}
    press(cleaner, 'undo')
    assert marks(cleaner) == {0: 'drop'}

def test_undo_goes_back_to_the_item(cleaner):
    press(cleaner, 'decide', items=[1], decision='drop')
    press(cleaner, 'page', page=2)
    s = press(cleaner, 'undo')
    assert s['page'] == 0 and s['cursor'] == 1 and not marks(cleaner)
    assert press(cleaner, 'undo')['said'] == 'There is nothing to undo.'

def test_choices_survive_class_split_page_and_kernel(cleaner, record, dls, tmp_path):
    press(cleaner, 'decide', items=[0], decision='keep')
    press(cleaner, 'show', split='train', label=1, kind='todo')
    assert [TARG[i] for i in shown(cleaner)] == [1] * 4
    press(cleaner, 'decide', items=[1], decision='drop')
    press(cleaner, 'show', split='valid', label=-1, kind='todo')
    assert not marks(cleaner)
    press(cleaner, 'decide', items=[5 if 5 in shown(cleaner) else shown(cleaner)[0]], decision='unsure')
    press(cleaner, 'show', split='train', label=1, kind='todo')
    assert marks(cleaner) == {1: 'drop'}
    press(cleaner, 'show', split='train', label=-1, kind='todo')
    assert marks(cleaner) == {0: 'keep', 1: 'drop'}
    later = XentCleaner(XentRecord(tmp_path/'run'), dls, n=10, per_page=4, by='loss')
    assert {0, 1}.isdisjoint(later.items) and len(later.decisions) == 3
    press(later, 'show', split='train', label=-1, kind='done')
    assert shown(later) == [1, 0] and marks(later) == {1: 'drop (ann)', 0: 'keep (ann)'}

def test_two_hundred_items_and_the_next_ones_by_what_was_learnt(tmp_path):
    "Cats called dogs are always wrong, foxes called cats never; each is a third of the suspects."
    targ = [i % 3 for i in range(600)]
    pred = [(i + 1) % 3 for i in range(600)]
    c = XentCleaner(record_of(tmp_path/'run', [f'{i}.txt' for i in range(600)], targ, pred=pred), n=200, per_page=25, by='loss')
    assert c.items.tolist() == [*range(200)]
    for page in range(8):
        press(c, 'page', page=page)
        for kind, decision in ((0, 'likely'), (1, 'unsure'), (2, 'keep')):
            press(c, 'decide', items=[i for i in shown(c) if targ[i] == kind], decision=decision)
    assert c.widget.state['done'] == 200 and len(c.decisions) == 200
    s = press(c, 'more')
    assert s['n'] == 200 and {*c.items}.isdisjoint(range(200))
    kinds = [targ[i] for i in c.items]
    assert kinds[:30].count(0) > 15 and kinds[:30].count(2) == 0 and kinds.count(0) > kinds.count(2)
    assert c.learnt[['given', 'likely', 'reviewed', 'wrong']].values.tolist() == [['cat', 'dog', 67, 67], ['fox', 'cat', 66, 0]]

def test_nothing_is_left(record, dls):
    c = XentCleaner(record, dls, n=40, per_page=40, by='loss')
    press(c, 'decide', items=shown(c), decision='keep')
    s = press(c, 'more')
    assert s['n'] == 0 and s['pages'] == 0 and not c.widget.cards and 'Nothing is left' in s['none']
    assert press(c, 'decide', items=[], decision='drop')['done'] == 0 and len(c.decisions) == 30
    assert repr(c) == "XentCleaner: 30 of 30 items of 'train' decided"

def test_items_that_are_not_on_the_list_are_not_decided(cleaner):
    press(cleaner, 'decide', items=[29, 1000, '0'], decision='drop')
    assert not told(cleaner)

@pytest.mark.parametrize('message', [dict(do='shutdown'), dict(do='decide', items=[0], decision='explode'), dict(do='page'),
                                     dict(do='decide', items=[0], decision='relabel', label=9), dict(do='show', split='test'),
                                     dict(do='decide', items=[0], decision='relabel'), dict(do='show', split='train', label=7)], ids=str)
def test_what_cannot_be_done_is_told(cleaner, message):
    s = press(cleaner, **message)
    assert s['bad'] and s['said'].startswith('Not done: ') and not told(cleaner)
    s = press(cleaner, 'decide', items=[0], decision='keep')
    assert not s['bad'] and marks(cleaner) == {0: 'keep'}

def test_a_full_disk_marks_nothing(cleaner, monkeypatch):
    def full(*_, **kw): raise OSError('no space left')
    monkeypatch.setattr(type(cleaner.reviews.place), 'write', full)
    s = press(cleaner, 'decide', items=[0], decision='keep')
    assert s['bad'] and 'no space left' in s['said'] and not marks(cleaner)

def test_two_people_see_each_other(cleaner, record, dls):
    other = XentCleaner(record, dls, n=10, per_page=4, who='bob', by='loss')
    press(other, 'decide', items=[0], decision='drop')
    press(cleaner, 'show', split='train', label=-1, kind='todo')
    assert marks(cleaner) == {0: 'drop (bob)'} and press(cleaner, 'undo')['said'] == 'There is nothing to undo.'

def test_an_evaluation_of_train_is_of_train(tmp_path, dls):
    r = record_of(tmp_path/'run', None, TARG, splits=('train', 'train_eval'), pred=PRED)
    c = XentCleaner(r, dls, split='train_eval', per_page=4, by='loss')
    press(c, 'decide', items=[0], decision='drop')
    assert c.decisions['split'].tolist() == ['train'] and marks(c) == {0: 'drop'}


def test_messages_from_another_thread_wait_for_that_of_the_cells(record, dls):
    "JupyterLab hands them to a thread of their own, in the middle of a training step."
    async def cell():
        c = XentCleaner(record, dls, per_page=4, by='loss')
        message = dict(do='decide', items=[0], decision='keep', number='x-1')
        thread = threading.Thread(target=c.widget._handle_custom_msg, args=(message, []))
        thread.start()
        thread.join()
        before = len(c.decisions)
        await asyncio.sleep(0)
        return before, c
    before, c = asyncio.run(cell())
    assert before == 0 and marks(c) == {0: 'keep'}


# -- the decisions go to the data

def acted(decisions, dls, record):
    "The labels of train after both acts."
    res = prune(relabel(dls, record, decisions), record, drop=decisions)
    return [int(y) for _, y in (res.train_ds[i] for i in range(len(res.train_ds)))], res.xent_changes

@pytest.mark.parametrize('file', [False, True], ids=['frame', 'CSV'])
def test_prune_and_relabel_take_them_as_they_are(cleaner, record, dls, file):
    press(cleaner, 'decide', items=[0, 1], decision='likely')
    press(cleaner, 'decide', items=[2], decision='drop')
    press(cleaner, 'decide', items=[3], decision='keep')
    press(cleaner, 'show', split='valid', label=-1, kind='todo')
    press(cleaner, 'decide', items=shown(cleaner), decision='drop')
    df = cleaner.decisions
    if file: df = pd.read_csv(io.StringIO(df.to_csv(index=False)))
    labels, changes = acted(df, dls, record)
    assert labels == [1, 2, *TARG[3:]]
    assert changes[['item', 'what', 'old', 'new']].values.tolist() == [[0, 'relabel', 'cat', 'dog'], [1, 'relabel', 'dog', 'fox'], [2, 'drop', 'fox', None]]
    assert [int(y) for _, y in (dls.train_ds[i] for i in range(N))] == TARG

def test_no_decisions_change_nothing(cleaner, record, dls):
    with pytest.warns(UserWarning): labels, changes = acted(cleaner.decisions, dls, record)
    assert labels == TARG and changes.empty

def test_decisions_say_what_to_drop_not_what_to_keep(cleaner, record, dls):
    press(cleaner, 'decide', items=[0], decision='keep')
    with pytest.raises(ValueError, match='give it as `drop=`'): prune(dls, record, keep=cleaner.decisions)
    with pytest.raises(ValueError, match="has 'yes', expected one of keep, drop, relabel, unsure"):
        prune(dls, record, drop=cleaner.decisions.assign(decision='yes'))


# -- in a real JupyterLab

CHROMIUM = next((o for o in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if o), None)
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()
WAIT = 90_000                                         # ms: a busy machine; each wait ends when its condition holds
NASTY = ['<img src=x onerror=alert(1)>', '"><script>alert(2)</script>', "javascript:alert(3)//'", '<b>fox</b>', '{{7*7}}${alert(4)}']
RUN = """
from fastai_xent.cleaner import XentCleaner
from fastai_xent.record import XentRecord
cleaner = XentCleaner(XentRecord('run'), who='ann', n=20, per_page=6, by='loss')
cleaner
"""

@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab with a notebook of two cells beside a record; all it writes goes to a temporary directory."
    if CHROMIUM is None: pytest.skip('there is no Chromium; install it to test the cleaner in JupyterLab')
    pytest.importorskip('jupyterlab', reason='there is no JupyterLab')
    files = [tmp_path/f'{o}.png' for o in 'ab']
    for f, x in zip(files, images(2)): Image.fromarray((x * 255).astype(np.uint8).transpose(1, 2, 0)).save(f)
    names = [str(f) for f in files] + NASTY + [f'text {i}' for i in range(23)]
    record_of(tmp_path/'nb'/'run', names, TARG, vocab=['<i>cat</i>', NASTY[0], 'fox & co'], pred=PRED)
    cells = [dict(cell_type='code', id=f'c{k}', source=o, metadata={}, outputs=[], execution_count=None) for k, o in enumerate([RUN.strip(), '1 + 1'])]
    kernel = dict(name='python3', display_name='Python 3', language='python')
    (tmp_path/'nb'/'review.ipynb').write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    (config := tmp_path/'config'/'labconfig').mkdir(parents=True)
    (config/'page_config.json').write_text(json.dumps(dict(disabledExtensions={'@jupyterlab/apputils-extension:announcements': True})))
    own = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='runtime', IPYTHONDIR='ipython',
               JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces')
    here = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get('PYTHONPATH')])])
    env = {**os.environ, 'PYTHONPATH': here, **{k: str(tmp_path/o) for k, o in own.items()}}
    options = dict(ip='127.0.0.1', port=0, open_browser=False, allow_root=True, root_dir=tmp_path/'nb')
    command = [sys.executable, '-m', 'jupyterlab', *[f'--ServerApp.{k}={o}' for k, o in options.items()],
               '--IdentityProvider.token=', '--LabApp.expose_app_in_browser=True']
    with open(tmp_path/'log', 'w') as log: server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    try: yield address(server, tmp_path)
    finally:
        server.terminate()
        server.wait(60)

def address(server, root) -> str:
    "Where the server listens, as it says itself."
    for _ in range(WAIT // 100):
        assert server.poll() is None, (root/'log').read_text()
        for f in (root/'runtime').glob('jpserver-*.json'):
            try: return json.loads(f.read_text())['url']
            except ValueError: pass                       # half written
        time.sleep(.1)
    raise AssertionError((root/'log').read_text())

KERNEL = "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"

class Lab:
    "The notebook, as a person has it before them."
    def __init__(self, page): self.page = page
    def wait(self, condition): self.page.wait_for_function(f'() => {condition}', timeout=WAIT)
    def idle(self): self.wait(f"{KERNEL}?.status === 'idle' && {KERNEL}?.connectionStatus === 'connected'")
    def command(self, name): self.page.evaluate(f"void jupyterapp.commands.execute('{name}')")
    def run(self):
        "Run all cells from nothing, and wait for the cleaner's page."
        self.idle()
        self.command('notebook:clear-all-cell-outputs')
        self.wait("!document.querySelector('.xc')")
        self.command('notebook:run-all-cells')
        self.page.wait_for_selector('.xc-card', timeout=WAIT)
        self.idle()
        self.page.focus('.xc-grid')
    def marked(self, want):
        "Wait until the page has these marks."
        marks = "JSON.stringify([...document.querySelectorAll('.xc-card .xc-mark')].map(o => o.textContent))"
        try: self.wait(f'{marks} === JSON.stringify({json.dumps(want)})')
        except Exception as e: raise AssertionError(f'the page has {self.page.evaluate(marks)}, expected {want}') from e
    def press(self, *keys):
        for key in keys: self.page.keyboard.press(key)
    def choose(self, label, value): self.page.get_by_label(label, exact=True).select_option(label=value)
    def texts(self, selector): return self.page.eval_on_selector_all(selector, 'os => os.map(o => o.textContent)')

@pytest.mark.slow
def test_by_keyboard_in_jupyterlab(lab, tmp_path):
    "Decide, change the class, restart the kernel, go on; what is on the disk is what was pressed."
    sync_playwright = pytest.importorskip('playwright.sync_api', reason='there is no playwright').sync_playwright
    wrong = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1200, height=1000))
        page.on('pageerror', lambda e: wrong.append(f'error: {e}'))
        page.on('dialog', lambda d: (wrong.append(f'dialog: {d.message}'), d.dismiss()))
        page.goto(f'{lab}lab/tree/review.ipynb', timeout=WAIT)
        page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=WAIT)
        review(Lab(page), tmp_path)
        browser.close()
    assert not wrong
    df = Reviews(XentRecord(tmp_path/'nb'/'run')).decisions
    assert df[['item', 'decision', 'label']].values.tolist() == [
        [0, 'drop', None], [1, 'drop', None], [2, 'relabel', '<i>cat</i>'], [3, 'keep', '<i>cat</i>'], [4, 'relabel', 'fox & co'],
        [6, 'unsure', None], [7, 'unsure', None], [10, 'drop', None], [13, 'keep', NASTY[0]]]
    assert {*df['who']} == {'ann'}

def review(lab, tmp_path):
    page = lab.page
    lab.run()
    # d d would delete the cell, z undo in the notebook: it must not hear them
    lab.press('d', 'd', 'l', 'k', 'u', 'z')
    lab.marked(['drop', 'drop', '→ <i>cat</i>', 'keep', '', ''])
    assert len(page.query_selector_all('.jp-CodeCell')) == 2 and page.evaluate(f"{KERNEL}.status") is not None
    lab.wait("document.querySelector('.xc-card.xc-cursor')?.getAttribute('aria-posinset') === '5'")   # undo went back there
    lab.press('o')
    page.keyboard.type('FOX')
    lab.press('Enter')
    lab.marked(['drop', 'drop', '→ <i>cat</i>', 'keep', '→ fox & co', ''])
    # names are text
    assert lab.texts('.xc-name bdi')[2:6] == NASTY[:4] and NASTY[0] in ''.join(lab.texts('.xc-labels'))
    assert page.evaluate("document.querySelectorAll('.xc-card script, .xc-card b, .xc-card i, .xc img:not([src^=\"data:image/\"])').length") == 0
    assert page.evaluate("[...document.querySelectorAll('.xc-card img')].every(o => o.complete && o.naturalWidth > 0)")
    assert page.get_attribute('.xc-said', 'aria-live') == 'polite' and 'labelled fox & co' in page.inner_text('.xc-said')
    assert 'decided: drop' in page.get_attribute('.xc-card', 'aria-label')
    # the next page, several at once
    lab.press('PageDown')
    lab.wait("document.querySelector('.xc-card')?.getAttribute('aria-posinset') === '7'")
    lab.press('Shift+ArrowRight', 'u')
    lab.marked(['unsure', 'unsure', '', '', '', ''])
    # another class, and back
    lab.choose('Labelled', NASTY[0])
    lab.wait("[...document.querySelectorAll('.xc-given')].every(o => o.textContent.startsWith('<img'))")
    page.focus('.xc-grid')
    lab.press('End', 'Home', 'd')
    lab.marked(['drop', '', '', '', '', ''])
    lab.choose('Labelled', 'all classes')
    lab.marked(['drop', 'drop', '→ <i>cat</i>', 'keep', '→ fox & co', ''])
    # the kernel dies
    before = page.evaluate(f"{KERNEL}.id")
    page.evaluate(f"{KERNEL}.restart()")
    lab.run()
    assert page.evaluate(f"{KERNEL}.id") == before and '8 decided' in page.inner_text('.xc-count')
    assert not {*lab.texts('.xc-name bdi')} & {NASTY[0], NASTY[1]}       # the list goes on with what is open
    lab.choose('Labelled', NASTY[0])
    lab.wait("[...document.querySelectorAll('.xc-given')].every(o => o.textContent.startsWith('<img'))")
    page.focus('.xc-grid')
    lab.press('k')
    lab.wait("document.querySelector('.xc-count').textContent.includes('9 decided')")
    lab.choose('Show', 'decided')
    lab.marked(['keep', 'drop', 'unsure', '→ fox & co', 'drop'])
    page.screenshot(path=tmp_path/'cleaner.png')
