"The house rules: notebooks run, are clean, and agree with the modules and README.md; modules import downwards only; lines, cells and modules are small."
import ast, contextlib, gc, os, re, shutil, signal, subprocess, sys, warnings
from configparser import ConfigParser
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt, measure, pytest, readme, yaml
from conftest import covering, pairs
from fastcore.nbio import mk_cell, new_nb, write_nb
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.test import test_nb as run_nb  # under another name, or pytest collects it

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT/'nbs', ROOT/'fastai_xent'
NOTEBOOKS = sorted(o for o in NBS.rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(NBS).parts))
ORDER = [o.stem.split('_', 1)[1] for o in NOTEBOOKS if re.match(r'\d\d[a-z]*_', o.name)]  # 00_numerics.ipynb writes numerics.py, 04a_rows.ipynb rows.py
MODULES = sorted(o for o in LIB.glob('*.py') if not o.name.startswith('_'))


def name(path): return path.relative_to(ROOT).as_posix()


# -- notebooks run

@contextlib.contextmanager
def undone():
    "Undo what running a notebook leaves behind in the process."
    handler = signal.getsignal(signal.SIGINT)
    try: yield
    finally:
        signal.signal(signal.SIGINT, handler)
        plt.close('all')


def run(nb):
    "Whether every cell of `nb` ran, in the notebook's own folder; the traceback goes to stderr."
    with undone(): return run_nb(nb, profile=False)[0]


def write_notebook(path, *sources):
    "Write a notebook of code cells."
    write_nb(new_nb([mk_cell(o) for o in sources]), path)
    return path


SLOW = {'several_gpus',  # it starts `torchrun`; `test_distributed` trains on two ranks without it
        'texts', 'noisy_labels'}  # seven and nineteen trainings; `08a_show` trains on texts, `07_acts` and `clean` act on what was found


@pytest.mark.parametrize('nb', [pytest.param(o, marks=[pytest.mark.slow] * (o.stem in SLOW)) for o in NOTEBOOKS], ids=name)
def test_notebook_runs(nb): assert run(nb), f'{name(nb)}: see the traceback under "Captured stderr"'


def test_failing_cell_is_noticed(tmp_path):
    assert run(write_notebook(tmp_path/'good.ipynb', 'assert 1 + 1 == 2'))
    assert not run(write_notebook(tmp_path/'bad.ipynb', 'x = 1', 'assert x == 2', 'x = 2'))


# -- few cases of a grid

def grid(**values):
    "Cases as pytest has them: all of these values' combinations."
    return [SimpleNamespace(callspec=SimpleNamespace(params=dict(zip(values, o)))) for o in product(*values.values())]


def test_few_cases_meet_in_all_pairs():
    cases = grid(a='pqr', b='stuv', c=[False, True], d=[False, True])
    few = covering(cases)
    every, met = (set().union(*map(pairs, o)) for o in (cases, few))
    assert met == every and len(every) == 12 + 6 + 6 + 8 + 8 + 4
    assert 12 <= len(few) < 20 < len(cases)
    for o in few: assert set().union(*(pairs(p) for p in few if p is not o)) < every, 'this one is needless'


def test_a_grid_of_two_values_keeps_all():
    cases = grid(a='pqr', b='st')
    assert covering(cases) == cases


# -- notebooks, modules and README.md agree

@contextlib.contextmanager
def folder(path):
    "Work in `path`, then come back."
    old = os.getcwd()
    os.chdir(path)
    try: yield path
    finally: os.chdir(old)


@pytest.fixture
def house(tmp_path):
    "A copy of what nbdev reads and writes."
    for o in (NBS, LIB): shutil.copytree(o, tmp_path/o.name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(ROOT/'pyproject.toml', tmp_path)
    return tmp_path


def contents(root): return {o.relative_to(root).as_posix(): o.read_bytes() for o in sorted(root.rglob('*')) if o.is_file()}


def changed(old, new): return sorted(o for o in old.keys() | new.keys() if old.get(o) != new.get(o))


def clean(root):
    "Run nbdev-clean in `root`; what it would only warn of is an error."
    with folder(root), warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.simplefilter('ignore', ResourceWarning)  # it leaves the notebooks to the garbage collector
        nbdev_clean()
        gc.collect()


def test_notebooks_are_clean(house):
    before = contents(house)
    clean(house)
    dirty = changed(before, contents(house))
    assert not dirty, 'run `make prepare`'


def test_unclean_notebook_is_noticed(house):
    nb = write_notebook(house/'nbs'/'dirty.ipynb', '1')
    nb.write_text(nb.read_text().replace('"metadata": {}', '"metadata": {"scrolled": true}', 1))
    before = contents(house)
    clean(house)
    assert 'nbs/dirty.ipynb' in changed(before, contents(house))


def nbdev(root, code):
    "Run `code` in a process of its own, since nbdev remembers the project it saw first."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}  # with it nbdev exports nothing
    subprocess.run([sys.executable, '-c', code], cwd=root, env=env, check=True)


def test_modules_are_in_step(house):
    before = contents(house)
    for o in (house/'fastai_xent').glob('*.py'):
        if o.name != '__init__.py': o.unlink()
    nbdev(house, 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    stale = changed(before, contents(house))
    assert not stale, 'run `make prepare`, and write no module by hand'


def test_site_settings_are_in_step(house):
    before = contents(house)
    nbdev(house, 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()')
    stale = changed(before, contents(house))
    assert not stale, 'run `make docs`'


def entries(contents):
    "The pages of a sidebar, section by section."
    for o in contents: yield from entries(o['contents']) if 'section' in o else [o['href'] if isinstance(o, dict) else o]


def test_every_page_is_in_the_sidebar():
    "nbs/sidebar.yml is written by hand: guides first, internals last."
    side = yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    pages = [o.relative_to(NBS).as_posix() for o in NOTEBOOKS]
    assert sorted(entries(side)) == sorted(pages), 'give each page one line of nbs/sidebar.yml'


@pytest.mark.skipif(not (NBS/'index.ipynb').exists(), reason='no nbs/index.ipynb yet')
def test_readme_is_in_step(capsys):
    with folder(ROOT): assert readme.main(['--check']) == 0, 'run `make prepare`\n' + capsys.readouterr().out


# -- imports

def imports(path):
    "The dotted names that a module of the package imports, its own package spelt out."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): yield from (o.name for o in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(o for o in ('fastai_xent' if node.level else '', node.module or '') if o)
            yield from (f'{base}.{o.name}' for o in node.names) if base == 'fastai_xent' else [base]


def siblings(path): return {o.split('.')[1] for o in imports(path) if o.startswith('fastai_xent.')}


def packages(path): return {o.split('.')[0] for o in imports(path)}


def rank(module): return ORDER.index(module) if module in ORDER else len(ORDER)  # a module without a number comes last


@pytest.mark.parametrize('path', MODULES, ids=name)
def test_imports_go_down(path):
    up = {o for o in siblings(path) - {'__version__'} if rank(o) >= rank(path.stem)}
    assert not up, f'{path.name} may import only modules of a lower number'


@pytest.mark.parametrize('path', [o for o in MODULES if o.stem == 'numerics'], ids=name)
def test_numerics_needs_torch_alone(path):
    extra = packages(path) - {'torch'} - sys.stdlib_module_names
    assert not extra, 'numerics imports torch and the standard library'


DRAWN = 'drawing', 'views', 'show', 'interpretation', 'cleaner'  # modules that draw


@pytest.mark.parametrize('path', [o for o in MODULES if o.stem not in DRAWN], ids=name)
def test_others_do_not_draw(path): assert 'matplotlib' not in packages(path)


def test_imports_are_read(tmp_path):
    path = tmp_path/'m.py'
    lines = 'import torch.nn as nn', 'from .store import Run', 'from . import views', 'from fastai_xent.items import *', 'def f(): import matplotlib.pyplot'
    path.write_text('\n'.join(lines))
    assert siblings(path) == {'store', 'views', 'items'}
    assert packages(path) == {'torch', 'fastai_xent', 'matplotlib'}


# -- sizes

# What still breaks a rule, by name (an empty list is `set()`). The lists only shrink: one that has been mended must leave its list.
WIDE = set()  # notebooks that export lines of more than 120 characters
LONG_CELLS = set()  # export cells of more than 60 lines: notebook and first definition
LONG_MODULES = set()  # modules of more than 450 lines
UNUSED = set()  # imports that their module does not use
KERNELS = {'00a_gpu_kernels', '00b_cpu_kernels', 'gpu_kernels', 'cpu_kernels'}  # a GPU's and a CPU's kernel in one piece: cells and modules may be long


def export_cells(root): return [(nb, src.strip().splitlines()) for nb, src in measure.code_cells(root) if measure.is_export(src)]


def wide(root): return {nb for nb, src in export_cells(root) if any(len(o) > 120 for o in src)}


def first_def(src): return next((m[1] for o in src if (m := re.match(r'(?:async )?(?:def|class) (\w+)', o))), src[-1])


def long_cells(root): return {f'{nb} {first_def(src)}' for nb, src in export_cells(root) if len(src) > 60 and nb not in KERNELS}


def long_modules(root): return {o.stem for o in measure.modules(root) if len(measure.lines(o)) > 450 and o.stem not in KERNELS}


def unused(path):
    "The imports that a module does not use itself: they are there for what importing them does, or for nothing. fastai's own add to `Learner` that way."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    names = {o.id for o in ast.walk(tree) if isinstance(o, ast.Name)}
    parts = {o.attr for o in ast.walk(tree) if isinstance(o, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
        for o in node.names:
            root, *_, last = (o.asname or o.name).split('.') * 2
            below = '.' in o.name and not o.asname and last in parts  # `import pyarrow.compute` for `pa.compute`
            if root not in names and not below and not o.name.startswith('fastai.'): yield f'{path.stem} {o.name}'


def unused_in(root): return {o for fn in measure.modules(root) if fn.stem not in ('all', '__init__') for o in unused(fn)}


def chained(root):
    "Conditions within conditions, in one expression: `a if x else b if y else c`."
    for nb, src in measure.code_cells(root):
        tree = ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', src, flags=re.M))
        for o in ast.walk(tree):
            if isinstance(o, ast.IfExp) and any(isinstance(c, ast.IfExp) for c in ast.iter_child_nodes(o)): yield f'{nb}: {ast.unparse(o)}'


def test_no_chained_conditions(): assert not list(chained(ROOT)), 'write an `if` for each'


def test_chained_conditions_are_noticed(tmp_path):
    (tmp_path/'nbs').mkdir()
    write_notebook(tmp_path/'nbs'/'01_a.ipynb', 'x = 1 if a else 2 if b else 3', 'y = [1 if a else 2, f(3 if b else 4)]', '%time x', 'z = (1 if b else 2) if a else 3')
    assert list(chained(tmp_path)) == ['01_a: 1 if a else 2 if b else 3', '01_a: (1 if b else 2) if a else 3']


RULES = [(wide, WIDE, 'write lines of at most 120 characters'), (long_cells, LONG_CELLS, 'split export cells of more than 60 lines'),
         (long_modules, LONG_MODULES, 'split modules of more than 450 lines'), (unused_in, UNUSED, 'import what the module uses, and nothing for its side effects')]


@pytest.mark.parametrize('rule, allowed, do', RULES, ids=[o[0].__name__ for o in RULES])
def test_sizes(rule, allowed, do):
    found = rule(ROOT)
    assert found <= allowed, do
    assert allowed <= found, 'these are mended: take them off the list'


def test_sizes_are_noticed(tmp_path):
    for o in ('nbs', 'fastai_xent'): (tmp_path/o).mkdir()
    write_notebook(tmp_path/'nbs'/'01_a.ipynb', '#| export\n' + 'x = 1\n' * 58 + 'def f():\n    pass', f"y = {'1' * 120}")
    write_notebook(tmp_path/'nbs'/'02_b.ipynb', f"#| export\ny = {'1' * 116}", '#| export\n' + 'x = 1\n' * 59)
    write_notebook(tmp_path/'nbs'/'03_c.ipynb', f"#| export\ny = {'1' * 117}")
    (tmp_path/'fastai_xent'/'a.py').write_text('x = 1\n' * 451)
    (tmp_path/'fastai_xent'/'b.py').write_text('x = 1\n' * 450)
    assert wide(tmp_path) == {'03_c'}
    assert long_cells(tmp_path) == {'01_a f'}
    assert long_modules(tmp_path) == {'a'}


def test_unused_imports_are_noticed(tmp_path):
    lines = ['import pyarrow as pa, pyarrow.compute', 'import a.b, c.d, fastai.callback.schedule', 'import e as f', 'from g import h, i as j', 'pa.compute(j, c.k)']
    (tmp_path/'m.py').write_text('\n'.join(lines))
    assert sorted(unused(tmp_path/'m.py')) == ['m a.b', 'm e', 'm h']


# -- files

MACHINE = re.compile(r'(?<![\w.:~/-])/(?:work|root|home|Users|mnt)/\w|(?<![\w.:~-])/tmp/\w|/site-packages[/]')
TEXT = {'.py', '.ipynb', '.md', '.toml', '.ini', '.in', '.yml', '.yaml', '.css', '.txt', '.html', ''}


def kept(git_dir):
    "Every file of the tree that .gitignore leaves, committed or not, whether or not the tree is a checkout."
    git = ['git', f'--git-dir={git_dir}', f'--work-tree={ROOT}']
    subprocess.run([*git, 'init', '--quiet'], cwd=ROOT, check=True)
    out = subprocess.run([*git, 'ls-files', '-z', '--others', '--exclude-standard'], cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT/o for o in out.stdout.split('\0') if o]


def test_no_machine_paths(tmp_path):
    texts = [o for o in kept(tmp_path/'git') if o.suffix in TEXT]
    assert Path(__file__) in texts
    found = [f'{name(o)}: {m[0]}' for o in texts for m in MACHINE.finditer(o.read_text(encoding='utf-8'))]
    assert not found


@pytest.mark.parametrize('top', ['work', 'home', 'tmp'])
def test_machine_paths_are_noticed(top): assert MACHINE.search(f'File "/{top}/a.py"')


def test_citation_agrees():
    "CITATION.cff says again what pyproject.toml and settings.ini say."
    cite = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    project, settings = get_config(ROOT), ConfigParser(delimiters='=')
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    want = dict(title=project.lib_name, abstract=project.description, repository=project.git_url)
    assert dict(title=cite['title'], abstract=cite['abstract'], repository=cite['repository-code']) == want
    assert [cite['authors'][0]['name'], cite['license']] == [settings['DEFAULT'][o] for o in ('author', 'license')]


@pytest.mark.parametrize('path', sorted((ROOT/'.github').rglob('*.yml')), ids=name)
def test_github_files_can_be_read(path):
    read = yaml.safe_load(path.read_text(encoding='utf-8'))
    assert 'name' in read and ('jobs' in read or 'body' in read)


def test_ruff():
    "pyflakes and syntax errors, in the notebooks too."
    res = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--select', 'F,E9', '.'], cwd=ROOT, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr


def test_contributing_lists_every_page():
    text = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    missing = [o.stem for o in NOTEBOOKS if re.match(r'\d\d[a-z]*_', o.name) and f'`{o.stem}`' not in text]
    assert not missing, 'give each page of the house its line in the table of CONTRIBUTING.md'
