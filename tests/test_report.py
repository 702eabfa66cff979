"The report in a browser: opened from disk, and used with mouse, keyboard and CSV. Skipped where there is no Chromium."
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.torch_core import set_seed
from helpers import Net, Points, learner, quiet
from PIL import Image

from fastai_xent.all import XentLossFlat, XentRecorder, XentWriter, prune, relabel
from fastai_xent.report import report, score_codes, xent_report

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which('chromium')
FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()
NASTY = ['<img src=x onerror="window.hit=1">', '</script><script>window.hit=1</script>', '"double" \'single\' `tick`',
         '=HYPERLINK("x")', 'a,b;c\td', 'two\nlines', 'carriage\rreturn', 'ünï©ödé 漢字 🦊 \u202egnp', 'İstanbul', 'y' * 5000, '',
         ' space ', 'nul\0byte', '&lt;b&gt;&amp;', '${1}{{2}}', '\ufeffbom', '__proto__', 'NA', '007', '<!--', ']]>', '"><b>x',
         "javascript:window.hit=1", '\u2028line', '-1', '1e5', 'ﬀ ligature']

pytestmark = pytest.mark.filterwarnings('ignore:.*is hard to tell.*')


# -- records

def written(names, epochs=4, wrong=12, vocab=('cat', 'dog', 'fox'), path=None, valid=30, seed=0):
    "A record of items with these names; the labels of the first `wrong` of train are another class's."
    set_seed(seed)
    n, c = len(names), len(vocab)
    writer = XentWriter(path, items=dict(train=list(names), valid=[f'v{i}' for i in range(valid)]), vocab=list(vocab))
    for epoch in range(epochs):
        for split, m in (('train', n), ('valid', valid)):
            true = torch.arange(m) % c
            y = torch.where(torch.arange(m) < wrong, (true + 1) % c, true) if split == 'train' else true
            pred = 1.5 * (1 + epoch) * F.one_hot(true, c) + torch.randn(m, c)
            writer.add(split=split, epoch=epoch, item=torch.arange(m), pred=pred, targ=y)
    writer.close()
    return writer.record

@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    "A record of 200 items, and its report."
    folder = tmp_path_factory.mktemp('plain')
    record = written([f'pics/Item-{i:03d}.png' for i in range(200)], path=folder/'run')
    return record, report(record, folder/'report.html')


# -- a browser

@pytest.fixture(scope='module')
def browser():
    if CHROMIUM is None: pytest.skip('no chromium here: the report is not tried in a browser')
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: the report is not tried in a browser')
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()

@pytest.fixture
def visit(browser):
    "Open a file; at the end nothing may have been said on the console, and nothing asked of a network."
    said, asked, contexts = [], [], []
    def visit(path, **kw):
        context = browser.new_context(**{'viewport': dict(width=1200, height=900), 'accept_downloads': True, **kw})
        contexts.append(context)
        page = context.new_page()
        page.on('console', lambda m: said.append(m.text))
        page.on('pageerror', lambda e: said.append(str(e)))
        page.on('dialog', lambda d: (said.append(d.message), d.dismiss()))
        context.on('request', lambda r: asked.append(r.url))
        page.goto(path.absolute().as_uri())
        if kw.get('java_script_enabled', True): page.wait_for_selector('html[data-ready]', state='attached')
        return page
    yield visit
    hits = [o.evaluate('window.hit') for c in contexts if c.pages for o in c.pages]
    for c in contexts: c.close()
    assert not said and not any(hits)
    assert {re.match(r'\w+:', o)[0] for o in asked} <= {'file:', 'data:', 'blob:'}
    assert len([o for o in asked if o.startswith('file:')]) == len(contexts)

def choice(page, name): return page.get_by_role('combobox', name=name, exact=True)

def status(page): return page.inner_text('#status')
def shown(page): return page.locator('#items button.open').all_inner_texts()
def settled(page, n, of=200): page.locator('#status', has_text=re.compile(f'^{n:,} of {of:,} items')).wait_for()

def downloaded(page, path):
    "The rows of the CSV that the button gives, as pandas reads them."
    with page.expect_download() as d: page.get_by_role('button', name='Download as CSV').click()
    d.value.save_as(path)
    return pd.read_csv(path)

def numbers(page, path): return set(downloaded(page, path)['item'])

def opened(page):
    dialog = page.get_by_role('dialog', name='One item')
    dialog.wait_for()
    return dialog

def drag(page, *points):
    "Drag over the map; points are shares of its width and height."
    page.locator('#map').scroll_into_view_if_needed()
    box = page.locator('#map').bounding_box()
    at = [(box['x'] + x * box['width'], box['y'] + y * box['height']) for x, y in points]
    page.mouse.move(*at[0])
    page.mouse.down()
    for o in at[1:]: page.mouse.move(*o, steps=3)
    page.mouse.up()
    page.locator('#brush polygon').wait_for(state='attached')


def test_opens_from_disk(plain, visit):
    page = visit(plain[1])
    assert status(page) == '200 of 200 items'
    assert 'All 200 items of train are drawn' in page.inner_text('#drawn')
    for o in ('Summary', 'Every item', 'Losses', 'Confusion', 'Scores'): assert page.get_by_role('heading', name=o, exact=True).is_visible()

def test_summary_agrees_with_the_record(plain, visit):
    record, path = plain
    text, a = visit(path).inner_text('section[aria-labelledby=summary]'), record.label_issues().attrs
    assert a['verdict'].replace('`', '') in ' '.join(text.split()) and f"{a['n_issues']} flagged" in text

def test_without_script(plain, visit):
    page = visit(plain[1], java_script_enabled=False)
    assert page.get_by_role('heading', name='Summary').is_visible() and page.locator('svg.chart').first.is_visible()

def test_first_items_are_the_most_suspect(plain, visit):
    record, path = plain
    page, issues = visit(path), record.label_issues()
    assert shown(page) == [o.removeprefix('pics/') for o in issues['name'][:25]]
    page.get_by_label('flagged only').check()
    settled(page, issues['is_issue'].sum())

def test_brush_gives_the_items_in_it(plain, visit, tmp_path):
    record, path = plain
    page, s = visit(path), record.scores()
    drag(page, (.1, .2), (.6, .6))
    lo, hi, low, high = (float(page.input_value(f'#{o}')) for o in ('x-min', 'x-max', 'y-min', 'y-max'))
    near = lambda v, lo, hi, e: (v >= lo - e) & (v <= hi + e)
    inside = {e: set(s['item'][near(s['variability'], lo, hi, e) & near(s['confidence'], low, high, e)]) for e in (.003, -.003)}
    got = numbers(page, tmp_path/'a.csv')
    assert inside[-.003] <= got <= inside[.003] and 0 < len(got) < 200
    assert status(page) == f'{len(got)} of 200 items' and 'Grey: not chosen' in page.inner_text('#drawn')
    page.get_by_role('button', name='All items').click()
    settled(page, 200)

def test_lasso_gives_the_items_in_it(plain, visit, tmp_path):
    record, path = plain
    page, s = visit(path), record.scores()
    page.get_by_label('a lasso').check()
    drag(page, (.05, .02), (.98, .02), (.05, .95))        # above the diagonal
    got, box = numbers(page, tmp_path/'a.csv'), page.locator('#map').bounding_box()
    x0, x1, y0, y1 = 46, box['width'] - 10, 22, box['height'] - 34
    ends = .5 if s['variability'].max() <= .5 else 1
    px = (x0 + (x1 - x0) * s['variability'] / ends) / box['width']
    py = (y1 - (y1 - y0) * s['confidence']) / box['height']
    side = (px - .05) / .93 + (py - .02) / .93            # below 1: inside
    assert set(s['item'][(side < .97) & (px > .06)]) <= got <= set(s['item'][side < 1.03]) and 0 < len(got) < 200

def test_click_and_hover_show_an_item(plain, visit):
    record, path = plain
    page, s = visit(path), record.scores()
    page.locator('#map').scroll_into_view_if_needed()
    box, i = page.locator('#map').bounding_box(), int(s['variability'].idxmax())
    ends = .5 if s['variability'].max() <= .5 else 1
    x = box['x'] + 46 + (box['width'] - 56) * s['variability'][i] / ends
    y = box['y'] + box['height'] - 34 - (box['height'] - 56) * s['confidence'][i]
    page.mouse.move(x, y)
    page.locator('#tip').get_by_text(f'Item-{i:03d}.png').wait_for()
    page.mouse.down()
    page.mouse.up()
    dialog = opened(page)
    assert f'pics/Item-{i:03d}.png' in dialog.inner_text()
    cells = dialog.locator('tbody tr').all_inner_texts()
    want = record.item(i)
    assert [int(o.split('\t')[0]) for o in cells] == want['epoch'].tolist()
    np.testing.assert_allclose([float(o.split('\t')[1]) for o in cells], want['p_targ'], atol=.006)
    assert [o.split('\t')[2] for o in cells] == [record._class_name(o) for o in want['pred']]

@pytest.mark.parametrize('i', [0, 7, 99, 199])
def test_every_item_is_found(plain, visit, i):
    page = visit(plain[1])
    for query in (f'Item-{i:03d}', f'ITEM-{i:03d}.png', f'#{i}'):
        page.get_by_label('Name or number').fill(query)
        settled(page, 1)
        assert shown(page) == [f'Item-{i:03d}.png']
    page.get_by_label('Name or number').fill('no such thing')
    settled(page, 0)
    assert page.get_by_role('button', name='Download as CSV').is_disabled()

def test_filters(plain, visit, tmp_path):
    record, path = plain
    page, s, d = visit(path), record.scores(), record.label_issues().sort_values('item', ignore_index=True)
    choice(page, 'Label').select_option(label='dog')
    assert numbers(page, tmp_path/'a.csv') == set(d['item'][d['targ'] == 'dog'])
    choice(page, 'Likely class').select_option(label='cat')
    assert numbers(page, tmp_path/'b.csv') == set(d['item'][(d['targ'] == 'dog') & (d['likely'] == 'cat')])
    page.get_by_role('button', name='All items').click()
    page.locator('#by').select_option('el2n')
    page.fill('#by-min', '.5')
    page.fill('#by-max', '1.2')
    page.keyboard.press('Tab')
    got = numbers(page, tmp_path/'c.csv')
    assert set(s['item'][s['el2n'].between(.503, 1.195)]) <= got <= set(s['item'][s['el2n'].between(.497, 1.205)]) and got
    page.get_by_role('button', name='All items').click()
    choice(page, 'Split').select_option('valid')
    settled(page, 30, 30)
    assert set(downloaded(page, tmp_path/'d.csv')['name']) == {f'v{i}' for i in range(30)}

@pytest.mark.parametrize('by', ['el2n', 'aum', 'forgetting', 'label_doubt'])
def test_sort(plain, visit, tmp_path, by):
    record, path = plain
    page, s = visit(path), record.scores()[by]
    choice(page, 'Sort by').select_option(by)
    down = downloaded(page, tmp_path/'a.csv')
    page.get_by_role('button', name='largest first').click()
    assert page.locator('th[aria-sort=ascending]').inner_text() == by
    up = downloaded(page, tmp_path/'b.csv')
    for d, sign in ((down, -1), (up, 1)):
        v = np.nan_to_num(d[by].to_numpy(float), posinf=1e9)
        assert sorted(d['item']) == list(range(200)) and (np.diff(sign * v) >= 0).all()
        np.testing.assert_allclose(d[by], s[d['item']], rtol=3e-3, atol=1e-3)

def test_pages(plain, visit):
    record, path = plain
    page, want = visit(path), [o.removeprefix('pics/') for o in record.label_issues()['name']]
    got = shown(page)
    while page.get_by_role('button', name='Next').is_enabled():
        page.get_by_role('button', name='Next').click()
        got += shown(page)
    assert sorted(got) == sorted(want) and len(got) == 200

# -- to prune and relabel

def acted_on(tmp_path, names=None, vocab=None, seed=0):
    "A training whose first four labels are wrong, its record, and the report."
    set_seed(seed)
    train, valid = Points(60), Points(30, seed=1)
    train.y[:4] = (train.y[:4] + 1) % 3
    if names is not None: train.items = names
    dls = DataLoaders(TfmdDL(train, bs=10, shuffle=True, num_workers=0), TfmdDL(valid, bs=10, num_workers=0))
    if vocab is not None: dls.vocab = vocab
    learn = quiet(Learner(dls, Net(), loss_func=XentLossFlat(), lr=.05, cbs=XentRecorder()))
    learn.fit(4)
    record = learn.xent_recorder.record
    return dls, record, report(record, tmp_path/'report.html', dls)

@pytest.mark.filterwarnings('ignore:prune.')
@pytest.mark.parametrize('vocab', [None, ['cat', 'dog', 'fox'], ['<b>cat</b>', '"dog", or\n\'hound\'', '漢 🦊'], ['3', '1', '2']], ids=['none', 'plain', 'nasty', 'digits'])
def test_selection_goes_into_prune_and_relabel(visit, tmp_path, vocab):
    dls, record, path = acted_on(tmp_path, vocab=vocab)
    page = visit(path)
    page.get_by_label('Name or number').fill('#3')
    settled(page, 1, 60)
    assert downloaded(page, tmp_path/'one.csv')['item'].tolist() == [3]
    page.get_by_label('Name or number').fill('')
    settled(page, 60, 60)
    drag(page, (.05, .5), (.98, .98))
    csv = downloaded(page, tmp_path/'some.csv')
    assert 0 < len(csv) < 60
    dropped = prune(dls, record, drop=csv).xent_changes
    assert set(dropped['item']) == set(csv['item'])
    issues = record.label_issues().set_index('item')
    differ = [i for i in csv['item'] if issues.loc[i, 'likely'] != issues.loc[i, 'targ']]
    assert differ
    new = relabel(dls, record, csv)
    for i in csv['item']: assert record._class_name(int(new.train_ds[i][1])) == issues.loc[i, 'likely']
    for i in set(range(60)) - set(csv['item']): assert int(new.train_ds[i][1]) == int(dls.train_ds[i][1])

def test_items_of_valid_are_not_taken_for_those_of_train(visit, tmp_path):
    dls, record, path = acted_on(tmp_path)
    page = visit(path)
    choice(page, 'Split').select_option('valid')
    settled(page, 30, 30)
    csv = downloaded(page, tmp_path/'valid.csv')
    for act in (lambda: prune(dls, record, drop=csv[:3]), lambda: relabel(dls, record, csv)):
        with pytest.raises(ValueError, match="items of 'valid', and only those of 'train'"): act()


# -- texts

def test_nasty_names_are_text(visit, tmp_path):
    record = written(NASTY, vocab=['<img src=x onerror=window.hit=1>', '</script>', '__proto__'], wrong=5)
    page = visit(report(record, tmp_path/'<b>&"report.html', title='</title><script>window.hit=1</script>'))
    names = [o or f'item {i}' for i, o in enumerate(NASTY)]
    page.locator('#sort').select_option('=item')
    page.get_by_role('button', name='largest first').click()
    got, seen = page.locator('#items button.open .clip'), []
    for j in range(2):
        seen += got.evaluate_all('all => all.map(o => o.textContent)')
        if not j: page.get_by_role('button', name='Next').click()
    assert seen == [o.replace('\0', '\ufffd') for o in names]
    assert page.title() == '</title><script>window.hit=1</script>' and page.locator('main img').count() == 0
    for i, o in enumerate(names):
        if '\n' in o or '\r' in o or not NASTY[i].strip(): continue
        page.get_by_label('Name or number').fill(o.replace('\0', '\ufffd')[:300])
        page.locator('#items button.open .clip').filter(has_text=re.compile(re.escape(o.replace('\0', '\ufffd')[:40].strip()))).first.wait_for()
    page.get_by_role('button', name='All items').click()
    with page.expect_download() as d: page.get_by_role('button', name='Download as CSV').click()
    d.value.save_as(tmp_path/'a.csv')
    csv = pd.read_csv(tmp_path/'a.csv', dtype={'name': str}, keep_default_na=False).sort_values('item')
    assert csv['name'].tolist() == [o.replace('\0', '\ufffd') for o in NASTY]
    assert set(csv['targ']) == set(record.vocab)
    page.locator('#items button.open').first.click()
    opened(page)

def test_nothing_of_the_record_is_markup(tmp_path):
    "Not even where no script runs."
    record = written(NASTY, vocab=['<img src=x onerror=window.hit=1>', '</script>', '<i>'], wrong=9)
    text = report(record, tmp_path/'a.html', title='<i>title</i>').read_text(encoding='utf-8')
    assert '<img' not in text and '<i>' not in text and 'onerror=window' not in re.sub('&lt;.*?&gt;', '', text)
    assert text.count('</script>') == text.count('<script')

def test_policy_allows_nothing_but_the_page(plain):
    policy = re.search('Content-Security-Policy" content="(.*?)"', plain[1].read_text(encoding='utf-8'))[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and 'unsafe-eval' not in policy and 'http' not in policy


# -- everybody can use it

def test_keyboard(plain, visit, tmp_path):
    page = visit(plain[1])
    page.keyboard.press('Tab')
    assert page.locator(':focus').inner_text() == 'To the items'
    page.keyboard.press('Enter')
    for _ in range(4):
        page.keyboard.press('Tab')
        if page.locator(':focus').get_attribute('id') == 'search': break
    page.keyboard.type('item-01')
    settled(page, 10)
    page.locator('#items th button', has_text='label').first.focus()
    page.keyboard.press('Enter')
    assert page.locator('th[aria-sort]').inner_text() == 'label'
    page.locator('#y-max').fill('.8')                     # a region without a mouse
    page.keyboard.press('Enter')
    assert (downloaded(page, tmp_path/'a.csv')['confidence'] <= .8).all()
    first = page.locator('#items button.open').first
    first.focus()
    page.keyboard.press('Enter')
    opened(page)
    page.keyboard.press('Escape')
    assert not page.get_by_role('dialog').is_visible() and page.locator(':focus').inner_text() == first.inner_text()

def test_everything_has_a_name(plain, visit):
    "As a screen reader finds it."
    page = visit(plain[1])
    unnamed = page.locator('input, select').evaluate_all('all => all.filter(o => !o.labels.length).map(o => o.id)')
    assert not unnamed
    for role in ('main', 'navigation', 'search', 'banner'): assert page.get_by_role(role).count() == 1, role
    assert page.get_by_role('img', name='confidence against variability').is_visible()
    assert page.get_by_role('table', name='The chosen items').is_visible()
    assert page.locator('svg.chart:not([aria-label])').count() == 0 and page.locator('html').get_attribute('lang') == 'en'

@pytest.mark.parametrize('width', [1200, 390])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_widths_and_schemes(visit, tmp_path, width, scheme):
    record = written([f'a-very-long-folder-name/{"x" * 80}-{i:03d}.png' for i in range(60)], vocab=['c' * 70, 'd e ' * 20, 'fox'])
    page = visit(report(record, tmp_path/'a.html'), viewport=dict(width=width, height=800), color_scheme=scheme)
    assert page.locator('html').evaluate('o => o.scrollWidth') <= width
    paper, ink = (page.locator('body').evaluate(f'o => getComputedStyle(o).{k}') for k in ('backgroundColor', 'color'))
    light = lambda o: np.mean([int(v) for v in re.findall(r'\d+', o)[:3]])
    assert (light(paper) > light(ink)) == (scheme == 'light')
    drag(page, (.2, .1), (.9, .9))
    assert page.get_by_role('button', name='Download as CSV').is_visible()


# -- pictures

def test_pictures_from_names_and_from_dls(visit, tmp_path):
    for i in range(30): Image.new('RGB', (200, 100), (8 * i, 50, 90)).save(tmp_path/f'{i}.png')
    (tmp_path/'3.png').write_bytes(b'no picture')
    record = written([tmp_path/f'{i}.png' for i in range(30)])
    page = visit(report(record, tmp_path/'a.html'))
    page.get_by_label('Name or number').fill('#4')
    settled(page, 1, 30)
    assert page.locator('#items img').evaluate('o => o.decode().then(() => [o.naturalWidth, o.naturalHeight])') == [80, 40]
    page.get_by_label('Name or number').fill('#3')
    page.get_by_text('3.png').first.wait_for()
    settled(page, 1, 30)
    assert page.locator('#items img').count() == 0

class Broken(Points):
    def __getitem__(self, i):
        if i == 5 and getattr(self, 'broken', False): raise OSError('cannot read <it>')
        return torch.zeros(1, 9, 9) + i / 40, self.y[i]

def test_an_item_that_cannot_be_read_is_told_and_the_rest_is_there(visit, tmp_path):
    train, valid = Broken(36), Broken(18, seed=1)
    dls = DataLoaders(TfmdDL(train, bs=9, num_workers=0), TfmdDL(valid, bs=9, num_workers=0))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(81, 3))
    learn = quiet(Learner(dls, net, loss_func=XentLossFlat(), lr=.01, cbs=XentRecorder()))
    learn.fit(1)
    train.broken = True
    page = visit(report(learn.xent_recorder.record, tmp_path/'a.html', dls))
    page.get_by_label('Name or number').fill('#5')
    settled(page, 1, 36)
    assert 'cannot read <it>' in page.locator('#items .words').inner_text()
    page.get_by_label('Name or number').fill('#6')
    page.locator('#items img').wait_for()
    assert 'No verdict on the labels of train' in page.inner_text('section[aria-labelledby=summary]')

def test_other_dls_are_refused(tmp_path):
    dls, record, _ = acted_on(tmp_path, names=[f'n{i}' for i in range(60)])
    other = learner(n=60).dls
    other.train.dataset.items = [f'm{i}' for i in range(60)]
    with pytest.raises(ValueError, match='give those of the run'): report(record, tmp_path/'b.html', other)
    assert not (tmp_path/'b.html').exists() and not list(tmp_path.glob('.*part'))


# -- other records

def test_masks(visit, tmp_path):
    "Items with a label a position: no classes, no verdict, and all else."
    writer = XentWriter(items=20)
    set_seed(0)
    for epoch in range(3): writer.add(split='train', epoch=epoch, item=range(20), pred=torch.randn(20, 3, 4, 4), targ=torch.randint(0, 3, (20, 4, 4)))
    writer.close()
    page = visit(report(writer.record, tmp_path/'a.html'))
    assert status(page) == '20 of 20 items' and 'no rate is stated' in page.inner_text('section[aria-labelledby=summary]')
    page.locator('#items button.open').first.click()
    assert opened(page).locator('tbody tr').count() == 3

def test_one_item_and_one_class(visit, tmp_path):
    writer = XentWriter(items=1)
    for epoch in range(2): writer.add(split='train', epoch=epoch, item=[0], pred=torch.zeros(1, 2), targ=torch.zeros(1, dtype=torch.long))
    writer.close()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        page = visit(report(writer.record, tmp_path/'a.html'))
    assert status(page) == '1 of 1 items'

def test_items_that_were_never_seen(visit, tmp_path):
    writer = XentWriter(items=dict(train=40))
    set_seed(0)
    for epoch in range(2): writer.add(split='train', epoch=epoch, item=range(30), pred=torch.randn(30, 3), targ=torch.arange(30) % 3)
    writer.close()
    page = visit(report(writer.record, tmp_path/'a.html'))
    assert status(page) == '40 of 40 items' and '10 items do not have both scores' in page.inner_text('#drawn')
    page.get_by_label('Name or number').fill('#35')
    settled(page, 1, 40)
    page.locator('#items button.open').click()
    assert 'item 35' in opened(page).inner_text()

def test_without_epochs(tmp_path):
    with pytest.raises(ValueError, match='no epoch yet'): report(XentWriter().record, tmp_path/'a.html')
    with pytest.raises(KeyError, match="no split 'test'"): report(written(range(9)), tmp_path/'a.html', split='test')

def test_what_does_not_fit_is_said(plain, visit, tmp_path):
    record = plain[0]
    page = visit(report(record, tmp_path/'a.html', max_mb=.001))
    assert 'there is no room for' in page.inner_text('section[aria-labelledby=scores]') and 'el2n' not in page.locator('#by option').all_inner_texts()
    assert page.locator('#by option').count() == 5        # any, and four that are always there
    page.get_by_label('Name or number').fill(f"#{record.label_issues()['item'].iloc[-2]}")
    settled(page, 1)
    page.locator('#items button.open').click()
    assert 'The histories of 0 items are on this page' in opened(page).inner_text()

def test_a_dataset_of_the_record_is_not_touched(tmp_path):
    dls, record, path = acted_on(tmp_path)
    before, state = record.to_df(), torch.get_rng_state()
    first = path.read_bytes()
    assert report(record, path, dls).read_bytes() == first
    pd.testing.assert_frame_equal(record.to_df(), before)
    assert torch.equal(torch.get_rng_state(), state)

# -- files and commands

def test_codes_keep_the_order():
    x = np.sort(np.r_[np.random.default_rng(0).normal(0, 1, 5000) ** 5, -np.inf, np.inf, 0])
    assert (np.diff(score_codes(x).astype(int)) >= 0).all() and score_codes(np.array([np.nan]))[0] == 0 < score_codes(x).min()

def test_command(tmp_path, capsys):
    written(range(30), path=tmp_path/'run')
    xent_report(str(tmp_path/'run'), str(tmp_path/'sub'/'out.html'))
    assert (tmp_path/'sub'/'out.html').stat().st_size > 10_000 and 'wrote' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='xent-report: .* is not a record'): xent_report(str(tmp_path/'none'))

def test_package_ships_the_page():
    "A wheel holds what pyproject.toml names."
    text = (ROOT/'pyproject.toml').read_text(encoding='utf-8')
    patterns = re.search(r'package-data\]\nfastai_xent = \[(.*)\]', text)[1]
    kept = {o.name for p in re.findall('"(.*?)"', patterns) for o in (ROOT/'fastai_xent').glob(p)}
    assert kept >= {o.name for o in (ROOT/'fastai_xent'/'page').iterdir()} == {'page.js', 'page.css', 'explore.html'}
    assert 'xent-report = "fastai_xent.report:xent_report"' in text
