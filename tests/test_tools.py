"What tools/ does: the README, the site's maths and links, the measures of the house, journeys, mutants."
import ast, json, re, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import links, maths, measure, mutants, pytest, readme

@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A clone of a project whose site and repository have addresses."
    cfg = SimpleNamespace(doc_url='https://docs.example/lib', git_url='https://git.example/me/lib', branch='main')
    monkeypatch.setattr(readme, 'get_config', lambda root: cfg)
    for o in ('nbs/01_losses.ipynb', 'nbs/explain/why.ipynb', 'nbs/index.ipynb', 'nbs/images/x.png', 'CONTRIBUTING.md'):
        (tmp_path/o).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/o).touch()
    return tmp_path


@pytest.mark.parametrize('text, want', [
    ('[a](01_losses.ipynb#x)', '[a](nbs/01_losses.ipynb)'),
    ('[a](explain/why.ipynb)', '[a](nbs/explain/why.ipynb)'),
    ('[`A`](https://docs.example/lib/losses.html#a)', '[`A`](nbs/01_losses.ipynb)'),
    ('[a](https://docs.example/lib/explain/why.html)', '[a](nbs/explain/why.ipynb)'),
    ('[a](https://git.example/me/lib/blob/main/CONTRIBUTING.md#git)', '[a](CONTRIBUTING.md#git)'),
    ('[a](https://docs.example/library)', '[a](https://docs.example/library)'),
    ('[a](https://pytorch.org)', '[a](https://pytorch.org)'),
    ('[a](#further-on)', '[a](#further-on)'),
    ('![a](images/x.png)', '![a](nbs/images/x.png)'),
    ('![a](https://pytorch.org/x.png)', '![a](https://pytorch.org/x.png)'),
    ('[![a](images/x.png)](01_losses.ipynb)', '[![a](nbs/images/x.png)](nbs/01_losses.ipynb)'),
])
def test_relink(clone, text, want): assert readme.relink(text, clone) == want


@pytest.mark.parametrize('target', ['02_gone.ipynb', 'images/gone.png', 'https://git.example/me/lib/blob/main/GONE.md'])
def test_dead_link_is_refused(clone, target):
    with pytest.raises(ValueError, match='leads nowhere: .*(gone|GONE)'): readme.relink(f'[a]({target})', clone)


def test_page_without_notebook_is_refused(clone):
    with pytest.raises(ValueError, match='leads nowhere: .*gone.html'): readme.relink('[a](https://docs.example/lib/gone.html)', clone)


def test_code_keeps_its_text(clone):
    code = '```python\n[a](01_losses.ipynb)\n```'
    assert readme.prose(f'[a](01_losses.ipynb)\n\n{code}\n', lambda o: readme.relink(o, clone)) == f'[a](nbs/01_losses.ipynb)\n\n{code}\n'


def test_callout_becomes_alert():
    text = 'before\n\n::: {.callout-tip title="One"}\n\n```\n::: in code\n```\n:::\n\nafter'
    assert readme.undiv(text) == 'before\n\n> [!TIP]\n> **One**\n>\n> ```\n> ::: in code\n> ```\n\nafter'


def test_open_callout_is_refused():
    with pytest.raises(ValueError, match='not closed'): readme.undiv('::: {.callout-note}\nno end')


@pytest.mark.parametrize('output, why', [
    (dict(output_type='display_data', data={'image/png': 'x', 'text/plain': '<Figure>'}), 'nbs/images/'),
    (dict(output_type='error', ename='KeyError'), 'KeyError'),
])
def test_output_is_refused(output, why, tmp_path):
    with pytest.raises(ValueError, match=why): readme.shown(output, tmp_path)


def wrong(site, body, css=''):
    "What the checker says of a site with the page `body` and another."
    (site/'a.html').write_text(f'<style>{css}</style>{body}')
    (site/'b.html').write_text('<h1 id="top">b</h1>')
    return links.check(site)


@pytest.mark.parametrize('body', [
    '<a href="b.html#top">', '<a href="./b.html">', '<a href="/b.html">', '<a href="https://pytorch.org">', '<a href="#x"><i id="x">',
    '<link rel="canonical" href="https://pytorch.org">', '<img src="data:image/png;base64,AA">'])
def test_good_link(tmp_path, body): assert wrong(tmp_path, body) == []


@pytest.mark.parametrize('body, why', [
    ('<a href="c.html">', 'leads nowhere: c.html'),
    ('<img src="x.png">', 'leads nowhere: x.png'),
    ('<a href="b.html#bottom">', 'no such anchor: b.html#bottom'),
    ('<a href="../b.html">', 'leads out of the site: ../b.html'),
    ('<script src="https://cdn.example/x.js"></script>', 'loads https://cdn.example/x.js'),
    ('<link rel="stylesheet" href="//cdn.example/x.css">', 'loads //cdn.example/x.css'),
    ('<i style="background: url(y.png)">', 'leads nowhere: y.png')])
def test_bad_link(tmp_path, body, why): assert wrong(tmp_path, body) == [f'a.html {why}']


def test_css_is_checked(tmp_path):
    assert wrong(tmp_path, '', '@import "https://cdn.example/f.css"; /* url(note.png) */') == ['a.html loads https://cdn.example/f.css']
    (tmp_path/'s.css').write_text('@font-face { src: url("f.woff2") }')
    assert 's.css leads nowhere: f.woff2' in links.check(tmp_path)


# -- maths

def drawn(tex, kind='inline'): return maths.mathml([(kind, tex)])[kind, tex]


def test_maths_becomes_mathml():
    assert '<mfrac><mn>1</mn><mn>2</mn></mfrac>' in drawn(r'\frac12')
    assert drawn('x', 'display').startswith('<math display="block"')


def test_each_formula_gets_its_own():
    formulas = [('inline', 'a'), ('display', 'b\n+ c'), ('inline', r'\text{d}')]
    assert [maths.plain(maths.ElementTree.fromstring(o)) for o in maths.mathml(formulas).values()] == ['a', 'b+c', 'd']


def test_unread_formula_is_refused():
    with pytest.raises(ValueError, match='nosuch'): maths.mathml([('inline', 'x'), ('inline', r'\nosuch y')])


@pytest.mark.parametrize('tex, spaces', [
    (r'p\ln p', 2), (r'\tfrac12\ln 2', 2), (r'(1 - p)\ln p', 2), (r'2\,\ln p', 2), (r'\ln p', 1), (r'-\ln p', 1), (r'\ln(1 + t)', 0), (r'a = \ln p', 1)])
def test_function_is_set_apart(tex, spaces): assert drawn(tex).count(maths.THIN) == spaces


@pytest.mark.parametrize('tex, want', [
    (r'\sqrt{2}\,(1 - p)', '√2 (1−p)'), (r'\frac{\partial\ell}{\partial z} = p - y', '(∂ℓ)/(∂z)=p−y'), ('e^{-m}', 'e^(−m)'), (r'\sum_{i=1}^n x_i', '∑_(i=1)^nx_i')])
def test_maths_in_words(tex, want): assert maths.plain(maths.ElementTree.fromstring(drawn(tex))) == want


def test_site_draws_its_maths(tmp_path):
    (tmp_path/'sub').mkdir()
    page = tmp_path/'sub'/'a.html'
    page.write_text('<script src="https://cdn.example/katex.min.js" defer></script><p><span class="math inline">\\(a &lt; b^2\\)</span>')
    (tmp_path/'search.json').write_text(json.dumps([dict(text='so a < b^2 holds')]))
    maths.draw(tmp_path)
    assert links.check(tmp_path) == []
    assert '<mo>&lt;</mo>' in page.read_text() and '\\(' not in page.read_text()
    assert json.loads((tmp_path/'search.json').read_text()) == [dict(text='so a<b^2 holds')]


# -- measures

A = """\
import torch
# a comment of more than a hundred and forty characters is no code, so it does not make the widest line of the module wider than it is, said twice over

class A:
    def __init__(self): self._a()

    def _a(self):
        return b._b(self)

    def _lone(self): pass

def public(): return _c()
def _c(): return public
"""
B = f"""\
def _b(o): return map(_c, o)

def _c(o):
    def inner():
        return {'x' * 119}

    return inner()
"""


def notebook(*cells): return json.dumps(dict(cells=[dict(cell_type='code', source=o) for o in cells]))


@pytest.fixture
def tree(tmp_path):
    "A tiny package: two modules, a notebook, a test."
    lesson = notebook('#| default_exp a', '#| export\nx = 1\ny = 2', 'import torch', 'assert x', '1 + 1', '#| hide\nfrom a import b', 'test_eq(1, 1)')
    texts = {'fastai_xent/__init__.py': '', 'fastai_xent/_modidx.py': 'd = 1\n' * 99, 'fastai_xent/a.py': A, 'fastai_xent/b.py': B}
    for name, text in (texts | {'nbs/00_a.ipynb': lesson, 'tests/test_a.py': 'x = 1\n' * 30}).items():
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(text)
    return tmp_path


def test_measures(tree):
    assert measure.measures(tree) == {
        'function lines, median / p90 / max': '1 / 2 / 5',  # 1 2 1 1 1, 1 5 2
        'line width p90; lines > 140; > 120': '28; 0.0 %; 7.7 %',
        'widest line': '134',
        'longest chain of private calls; private share': '3; 71 %',  # five of seven: public and inner are not
        'the chain': 'a._a → b._b → b._c',
        'file lines, median / max': '7 / 13',
        'non-export cells that assert': '67 %',
        'largest export cells': '3 (00_a), 1 (00_a)',
        'test lines / library lines': '1.5'}


def test_chain_ends_where_it_comes_round():
    calls = dict(a={'b'}, b={'c'}, c={'a', 'd'}, d=set())
    assert measure.chain(calls) == list('abcd')


def test_measure_of_a_commit(tree, monkeypatch, capsys):
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a', '-c', 'core.hooksPath=none']
    for o in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'a']): subprocess.run([*git, *o], cwd=tree, check=True)
    (tree/'fastai_xent'/'b.py').write_text('')
    monkeypatch.setattr(measure, 'ROOT', tree)
    measure.main(['HEAD'])
    assert '| file lines, median / max | 7 / 13 | 0 / 13 |' in capsys.readouterr().out


# -- mutants

@pytest.mark.parametrize('line, want', [
    ('x = a < b', ['x = (a <= b)']),
    ('x = a is not b', ['x = (a is b)']),
    ('é = a + b', ['é = (a - b)']),
    ('x += y', ['x -= y']),
    ('x = a and b', ['x = (a or b)']),
    ('x = not a', ['x = (a)']),
    ('x = 3', ['x = (4)', 'x = (2)']),
    ('x = True', ['x = (False)']),
    ('if a: f()', ['if (not a): f()', 'if (True): f()', 'if a: (None)']),
    ('x = [a for a in b if c]', ['x = [a for a in b if (True)]']),
    ('def f(): return x', ['def f(): return (None)']),
    ('def f(): return None', []),
    ('x = f(a,\n      b)', ['x = (f(a))']),
    ('x = f(a, k=b)', ['x = (f(a))']),
    ('def f(x: 1 < 2) -> 1: "text"', []),
    ('x = f"{a + 1}"', []),
])
def test_mutants(line, want):
    found = [m.text for m in mutants.mutants('m', line)]
    assert found == want
    for o in found: ast.parse(o)


def test_sample_is_seeded():
    lots = [[m.text for m in mutants.sample('x = 1 + 2 * 3 - 4\n', 'b', 4, seed)] for seed in (1, 1, 2)]
    assert lots[0] == lots[1] != lots[2] and len(lots[0]) == 4


TEXT = """\
import torch

def outer(x=3,
          y=4):
    if (x and
            y):
        return [x,
                y]
    def inner(z=5): return z
    return inner

class A:
    k = 6

    def f(self): return self.k
"""

@pytest.mark.parametrize('line, want', [
    (6, {5, 6}),  # a condition without its body
    (8, {7, 8}),  # a statement of two lines
    (9, {9}),
    (3, set(range(3, 11))),  # defaults: all who call the function
    (4, set(range(3, 11))),
    (13, set(range(1, 16))),  # done on import: all who use the module
    (15, {15}),
])
def test_lines_of_a_mutant(line, want): assert mutants.lines_of(TEXT, line) == want


@pytest.fixture
def bare(monkeypatch):
    "Nothing is imported that these tests do not use."
    monkeypatch.setenv('PYTEST_DISABLE_PLUGIN_AUTOLOAD', '1')
    monkeypatch.setattr(mutants, 'HEAVY', ['pytest'])


TESTS = """\
import pytest, threading
from fastai_xent import b

@pytest.fixture(scope='module')
def shared(): return b.big(4)

def test_one(): assert b.big(4) and not b.big(2)

def test_two(shared): assert shared

def test_three(shared): pass

def test_wrong():
    b.small(1)
    assert False

def test_thread(): threading.Thread(target=b.small, args=[1]).start()

def test_none(): pass

@pytest.mark.slow
def test_slow(): assert b.small(1)
"""

@pytest.fixture
def small(tree, bare):
    "A module of two functions, and tests of them."
    (tree/'fastai_xent'/'b.py').write_text('def big(x): return x > 3\ndef small(x): return x < 3\n')
    (tree/'tests'/'test_a.py').write_text(TESTS)
    return tree


def test_lines_of_tests(small, tmp_path):
    "A fixture of several tests, a thread; what a test that fails passes is known, too."
    with mutants.Runner() as run: found = mutants.noted(run, small, ['tests'], ['b'], tmp_path/'lines.json')
    names = {o: {found['tests'][i][0].partition('::')[2] for i in which} for o, which in found['lines'].items()}
    assert names == {'b:1': {'test_one', 'test_two', 'test_three'}, 'b:2': {'test_wrong', 'test_thread'}}
    assert found['failed'] == ['tests/test_a.py::test_wrong'] and len(found['tests']) == 6


def test_own_tests_first_and_the_quickest_of_each():
    text, own = 'def big(x): return x > 3\n', 'tests/test_b.py::'
    tests = [['a', 2.], [own + 'x', 1.], ['c', .5], ['d', .1], [own + 'y', .6], ['e', .1]]
    found = dict(tests=tests, failed=['e'], lines={'b:1': [0, 1, 2, 4, 5], 'c:1': [3]})
    m = next(mutants.mutants('b', text))
    assert mutants.chosen(found, m, text, 9) == ([tests[i] for i in (4, 1, 2, 0)], 0)
    assert mutants.chosen(found, m, text, 2) == ([tests[i] for i in (4, 1)], 2)


def test_survivor_is_shown(small, capsys):
    mutants.main(['--modules', 'b', '--n', '99', '--root', str(small)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == 'fails without a mutant: tests/test_a.py::test_wrong'
    assert said[1:4] == ['survived: b.py:1  x > 3  →  x >= 3 (3 tests, 0 left out)', 'survived: b.py:1  3  →  2 (3 tests, 0 left out)',
                         'survived: b.py:2  x < 3  →  None (1 tests, 0 left out)']
    assert '| b | 8 | 2 | 0 | 6 |' in said


def test_module_is_put_back(small):
    "The bytes, and the time by which Python knows the bytecode."
    fn = small/'fastai_xent'/'b.py'
    before, seen = (fn.read_bytes(), fn.stat().st_mtime_ns), []
    def run(*args): seen.append(fn.read_text())
    m = next(mutants.mutants('b', before[0].decode()))
    mutants.fate(run, small, m, [['tests/test_a.py::test_one', 0.]])
    assert seen == [m.text] and (fn.read_bytes(), fn.stat().st_mtime_ns) == before


def test_endless_mutant_is_ended(small):
    (small/'tests'/'test_a.py').write_text('def test():\n    while True: pass')
    with mutants.Runner() as run: assert run(1, 'trying', small, ['tests/test_a.py::test']) == 'too slow'


def test_failing_tests_are_refused(small):
    (small/'tests'/'test_a.py').write_text('def test(): assert False')
    with pytest.raises(SystemExit, match='no test passes'): mutants.main(['--modules', 'b', '--root', str(small)])


def test_journeys():
    "In a process of its own: the profiler is the whole process's."
    tool = Path(measure.ROOT)/'tools'/'journeys.py'
    said = subprocess.run([sys.executable, '-W', 'ignore', tool], capture_output=True, text=True, check=True).stdout
    passed = dict(re.findall(r'^(\S.*): (\d+ files, \d+ functions)$', said, re.M))
    assert list(passed) == ["a batch's loss", 'record.top(20)', 'a new score']
    assert passed['a new score'].startswith('1 files') and '    dynamics: register_score' in said
    for file, f in (('losses', 'XentLossFlat.__call__'), ('writer', 'XentWriter._do'), ('parquet', 'write_rows')):
        assert re.search(rf'^    {file}: .*\b{re.escape(f)}\b', said, re.M)
