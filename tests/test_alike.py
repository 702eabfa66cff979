"What a report shows of features: leakage, labels that contradict each other, items like no other."
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from fastcore.xml import to_xml
from runs import put
from test_report import NASTY, browser, visit, written  # noqa: F401 fixtures

import fastai_xent.alike as alike
from fastai_xent.alike import alike_html
from fastai_xent.report import report
from fastai_xent.writer import XentWriter

def run(names=None, n=60, leaks=((7, 4), (9, 6)), torn=((20, 21),), training=False, vocab=('cat', 'dog'), k=30):
    "Random features; of each of `leaks` valid has a copy, each of `torn` is twice in train with two labels; item 50 is far from all."
    rng, writer = np.random.default_rng(0), XentWriter()
    x = dict(train=rng.normal(size=(n, k)) + 3, valid=rng.normal(size=(30, k)) + 3)
    for a, b in leaks: x['valid'][b] = x['train'][a]
    for a, b in torn: x['train'][b] = x['train'][a]
    x['train'][50] *= -1
    for split, rows in x.items():
        m = len(rows)
        called = names if split == 'train' and names else [f'{split} {i}' for i in range(m)]
        writer.set_items(split, pd.DataFrame(dict(item=range(m), name=called, source=range(m))), split, vocab=list(vocab))
        put(writer, 0, 0, split, dict(item=np.arange(m), pred=np.arange(m) % 2, targ=np.arange(m) % 2),
            features=(np.arange(m), rows, dict(every=0, of=k, training=training and split == 'train')))
    return writer.record

def parts(text):
    "The figure captions below each heading."
    blocks = re.split('<h3>', text)[1:]
    return {o.split('</h3>')[0]: re.findall(r'</b> (\w+ \d+)</figcaption>', o) for o in blocks}

def test_each_kind_in_its_place():
    text = to_xml(alike_html(run()), indent=False)
    got = parts(text)
    assert {*got['In train and in valid']} == {'train 7', 'valid 4', 'train 9', 'valid 6'}
    assert 'with a near-duplicate in train: 2.' in text and 'different labels: 3.' in text      # 7 and 4, 9 and 6 have two labels
    assert {'train 20', 'train 21'} <= {*got['With different labels']} and got['Like no other'][0] == 'train 50'

def test_nothing_alike():
    text = to_xml(alike_html(run(leaks=(), torn=())), indent=False)
    assert 'No item of valid has a near-duplicate in train.' in text and 'All near-duplicates have the same label.' in text

def test_many_groups_are_cut_and_that_is_said():
    text = to_xml(alike_html(run(leaks=[(i, i) for i in range(20)])), indent=False)
    assert text.count('class="group"') == 13 and 'The first 12 are shown; all are in <code>record.duplicates()</code>.' in text
    big = to_xml(alike_html(run(torn=[(20, i) for i in range(21, 40)], leaks=())), indent=False)
    assert len({*parts(big)['With different labels']} & {f'train {i}' for i in range(20, 40)}) == 4

def test_what_cannot_be_compared_is_said(monkeypatch):
    assert 'were taken while it trained' in to_xml(alike_html(run(training=True)))
    monkeypatch.setattr(alike, '_MOST', 50)
    assert '90 items are too many to compare for this page' in to_xml(alike_html(run()))

def test_nothing_of_the_record_is_markup():
    n = len(NASTY)
    text = to_xml(alike_html(run(names=NASTY + [f'i{i}' for i in range(60 - n)], leaks=[(i, i) for i in range(12)],
                                 vocab=['<img src=x onerror=window.hit=1>', '</script>'])), indent=False)
    assert '<img' not in text and '<script' not in text and '</script>' not in text

def test_features_of_two_epochs_are_refused_in_words():
    record = run()
    record._epochs.place.remove('_features/valid/fit-0-epoch-000-part-0.pq')
    assert 'no features of' in to_xml(alike_html(record))

@pytest.mark.parametrize('width', [390, 1200])
def test_in_a_browser(visit, tmp_path, width):  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        page = visit(report(run(names=[*NASTY, *(f'a rather long question number {i} ?' for i in range(60 - len(NASTY)))]), tmp_path / 'a.html'), viewport=dict(width=width, height=800))
    section = page.get_by_role('region', name='Alike, and like no other')
    assert section.get_by_role('group').count() >= 3 and section.get_by_role('heading').count() == 4
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.get_by_role('link', name='Alike').click()
    assert page.url.endswith('#alike') and page.evaluate('window.hit') is None

def test_a_record_without_features_has_no_such_part(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        text = report(written(list('abcdefghij')), tmp_path / 'a.html').read_text(encoding='utf-8')
    assert 'id="alike"' not in text and 'href="#alike"' not in text
