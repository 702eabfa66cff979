"What a reader is shown: every public name has an example, the README's lines run as they stand, each guide ends with a way on, the site sorts for readers."
import ast, importlib.util, json, re, sys
from pathlib import Path

import measure, numpy as np, pytest, torchvision
from PIL import Image

import fastai_xent.all

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
GUIDES = sorted([*(NBS/'tutorials').glob('*.ipynb'), *(NBS/'explain').glob('*.ipynb')])


# -- examples

def names_in(src):
    "The names that a cell uses; those that it only imports, or writes as text, are none."
    tree = ast.parse(re.sub(r'^\s*[%!].*$', '', src, flags=re.M))
    return {o.id for o in ast.walk(tree) if isinstance(o, ast.Name)} | {o.attr for o in ast.walk(tree) if isinstance(o, ast.Attribute)}


def shown_names(root):
    "The names that examples use: code cells that are not exported."
    return {o for _, src in measure.code_cells(root) if not measure.is_export(src) for o in names_in(src)}


def test_every_public_name_has_an_example():
    missing = {*fastai_xent.all.__all__} - shown_names(ROOT)
    assert not missing, 'show each of these in a cell of a notebook'


def test_import_is_no_example(): assert names_in('from a import b\nc.d(e)') == {'c', 'd', 'e'}


# -- the five lines

LABELS = 'cat', 'dog'


def draw_pets(path):
    "A folder of pictures as the README asks for."
    rng = np.random.default_rng(0)
    for split, n in dict(train=64, valid=4).items():
        for i in range(n):
            folder = path/split/LABELS[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 128, (32, 32, 3)) + 100 * (i % 2)
            Image.fromarray(pixels.astype('uint8')).save(folder/f'{i}.png')


def start_lines(text): return next(o for o in re.findall(r'```python\n(.*?)```', text, re.S) if 'fine_tune' in o)


def smaller(code):
    "The same lines with pictures of a quarter of the width, which are read in a tenth of the time."
    assert 'Resize(128)' in code
    return code.replace('Resize(128)', 'Resize(32)')


@pytest.fixture
def offline(monkeypatch):
    "Weights at random where a network would be asked for trained ones."
    made = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', lambda *args, **kw: made.state_dict())


def test_readme_lines_run(tmp_path, monkeypatch, offline, capsys):
    code = smaller(start_lines((ROOT/'README.md').read_text(encoding='utf-8')))
    monkeypatch.chdir(tmp_path)
    draw_pets(tmp_path/'pets')
    said = {}
    exec(code, said)
    record = said['learn'].xent_recorder.record
    assert (tmp_path/'runs'/'pets').is_dir()
    assert {k: len(record.items(k)) for k in ('train', 'valid')} == dict(train=64, valid=4)
    assert {Path(o).parent.name for o in record.top(9)['name']} <= {*LABELS}


# -- the guides

def last_words(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return ''.join([c for c in cells if c['cell_type'] == 'markdown'][-1]['source'])


@pytest.mark.parametrize('path', GUIDES, ids=lambda o: o.stem)
def test_guide_ends_with_a_way_on(path): assert re.search(r'\]\([^)]*\.ipynb\)', last_words(path)), 'say where to read on'


# -- the site

@pytest.fixture
def site():
    "tools/site.py; Python has a module of that name."
    if sys.version_info < (3, 11): pytest.skip('smalldocs needs Python 3.11')
    spec = importlib.util.spec_from_file_location('xent_site', ROOT/'tools'/'site.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('src, want', [
    ('#| echo: false\nshow_doc(XentRecorder)', True), ('show_doc(XentRecord.top)', True), ('x = 1', True),
    ('#| echo: false\nshow_doc(XentRecorder.__call__)', False), ('show_doc(XentRecorder.after_cancel_epoch)', False), ('show_doc(A._b)', False)])
def test_events_are_no_headings(site, src, want): assert site.is_said(dict(cell_type='code', source=src)) == want


SIDEBAR = """\
website:
  sidebar:
    contents:
      - text: Start
        href: index.ipynb
      - section: Internals
        contents:
          - taps.ipynb
"""


@pytest.fixture
def small(tmp_path):
    "The processed notebooks of two pages, and the site's search."
    (tmp_path/'sidebar.yml').write_text(SIDEBAR)
    for name, title in dict(index='Lib', taps='taps').items():
        front = dict(cell_type='raw', source=f'---\ndescription: about {title}\ntitle: {title}\n---\n')
        (tmp_path/f'{name}.ipynb').write_text(json.dumps(dict(cells=[front])))
    (tmp_path/'search.json').write_text(json.dumps([dict(href='taps.html#a'), dict(href='index.html')]))
    (tmp_path/'s.js').write_text('{ threshold: 0.3, includeMatches: false, }')
    return tmp_path


def test_llms_follows_the_sidebar(site, small):
    site.write_llms(small, small, 'https://docs.example')
    want = '# Lib\n\n> about Lib\n\n## Start\n\n- [Lib](https://docs.example/index.html.md): about Lib\n\n## Internals\n\n- [taps](https://docs.example/taps.html.md): about taps\n'
    assert (small/'llms.txt').read_text() == want


def test_search_puts_guides_first(site, small):
    site.rank_search(small, small)
    assert [(o['href'], o['rank']) for o in json.loads((small/'search.json').read_text())] == [('index.html', 0), ('taps.html#a', 2)]
    assert 'sortFn' in (small/'s.js').read_text()
    (small/'s.js').write_text('')
    with pytest.raises(ValueError, match='found 0'): site.rank_search(small, small)


def test_no_font_from_another_host(site, tmp_path):
    (tmp_path/'site_libs').mkdir()
    css = tmp_path/'site_libs'/'a.css'
    css.write_text('@charset "UTF-8";@import url(https://fonts.example/css2?family=Lato:wght@0,400;0,700&display=swap);:root{--a:1}')
    site.drop_fonts(tmp_path)
    assert css.read_text() == '@charset "UTF-8";:root{--a:1}'
