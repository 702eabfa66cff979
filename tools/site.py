"""Build the site into _docs.

nbdev prepares the notebooks and smalldocs lays out the pages, in pure Python, where nbdev asks for Quarto.
The steps between them are what smalldocs does not do as Quarto does: see each function.
Any warning or broken link fails the build.
"""
import json, os, re, shutil, sys, warnings
from pathlib import Path

if sys.version_info < (3, 11): sys.exit('the site needs Python 3.11 or later, since smalldocs does')

import links, maths, smalldocs.site, yaml
from fastai.callback.core import event
from nbdev.config import get_config, nbpath2html
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from readme import directives, prose
from smalldocs.check import scan

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = '_quarto.yml', 'nbdev.yml', 'sidebar.yml'

EVENTS = {o for o in vars(event) if o[0] != '_'}  # fastai calls these methods of a callback, a reader never does
RANKS = dict(Reference=1, Internals=2)  # what stands elsewhere in the sidebar comes first in a search

_documents = re.compile(r'^show_doc\((?:[\w.]+\.)?(\w+)', re.M)
_font = re.compile(r'@import\s+url\(["\']?https://fonts[^)]*\)\s*;?')
_output_file = re.compile(r'^output-file:.*\n?', re.M)
_no_matches = 'includeMatches: false,'  # an option of Fuse, in smalldocs' script
_bare_align = re.compile(r'^\s*\\begin\{align\*?\}|^\s*\$\$\s*\{#', re.M)


def processed():
    "The folder of notebooks ready to be laid out, and what nbdev warned of."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        proc = proc_nbs(force=True, n_workers=0)  # torch is imported once, not once a worker
    return proc, [str(o.message) for o in caught if Path(o.filename).parent.name == 'nbdev']


def read(fn): return json.loads(fn.read_text(encoding='utf-8'))


def write(fn, text): fn.write_text(text, encoding='utf-8')


def renames(proc):
    "Each notebook's name, and the name that nbdev gives its page: 00_numerics.ipynb, numerics.ipynb."
    names = {o.name: nbpath2html(o).with_suffix('.ipynb').name for o in proc.rglob('*.ipynb')}
    return {a: b for a, b in names.items() if a != b}


def renamed(text, names):
    "`text` with each notebook by its new name, as a source or as a page."
    for a, b in names.items():
        for ext in ('.ipynb', '.html'): text = re.sub(rf'(?<![\w-]){re.escape(Path(a).stem + ext)}', Path(b).stem + ext, text)
    return text


def rename_cells(nb, names):
    "Links in the prose follow the renaming; directives of the prose go, and `output-file`, which smalldocs does not read."
    for c in nb['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] == 'markdown': c['source'] = prose(directives.sub('', src), lambda o: renamed(o, names))
        elif c['cell_type'] == 'raw': c['source'] = _output_file.sub('', src)


def rename(proc):
    "Name each notebook as its page, since smalldocs names the page as the notebook."
    names = renames(proc)
    for fn in list(proc.rglob('*.ipynb')):
        nb = read(fn)
        rename_cells(nb, names)
        fn.unlink()
        write(fn.with_name(names.get(fn.name, fn.name)), json.dumps(nb, ensure_ascii=False, indent=1))
    for o in SETTINGS: write(proc/o, renamed((proc/o).read_text(encoding='utf-8'), names))


def is_said(cell):
    "Is this cell for a reader? Events of a callback and methods with underscores are documented in the prose, if at all."
    m = _documents.search(''.join(cell['source'])) if cell['cell_type'] == 'code' else None
    return not m or not (m[1] in EVENTS or m[1].startswith('_'))


def drop_events(proc):
    "No heading for what is never called by hand."
    for fn in proc.rglob('*.ipynb'):
        nb = read(fn)
        nb['cells'] = [o for o in nb['cells'] if is_said(o)]
        write(fn, json.dumps(nb, ensure_ascii=False, indent=1))


def drop_formats(proc):
    "smalldocs writes no second format for a page to link to, and leaves the maths to tools/maths.py."
    for name in ('nbdev.yml', '_quarto.yml'):
        cfg = yaml.safe_load((proc/name).read_text(encoding='utf-8'))
        cfg.pop('format-links', None)
        cfg.get('format', {}).get('html', {}).pop('html-math-method', None)
        write(proc/name, yaml.dump(cfg, sort_keys=False))


def unread(proc):
    "Syntax in the prose that Quarto reads and smalldocs does not."
    for fn in sorted(proc.rglob('*.ipynb')):
        for c in read(fn)['cells']:
            if c['cell_type'] != 'markdown': continue
            src = ''.join(c['source'])
            yield from (f'{fn.name}: {msg}: {src.splitlines()[n - 1]}' for n, msg in scan(src))
            if m := _bare_align.search(src): yield f'{fn.name}: write $$\\begin{{aligned}}…\\end{{aligned}}$$ for {m[0].strip()}'


def nearest(page, anchor):
    "The anchor itself, that of its class, or none: nbdev links every name of a module, and a page documents only some."
    known = [o for o in (anchor, anchor.split('.')[0]) if o in page.anchors]
    return f'#{known[0]}' if known else ''


def localise(site, url):
    "Links to our own symbols stay within the site, wherever it is served or opened."
    pages = {fn.relative_to(site).as_posix(): fn.read_text(encoding='utf-8') for fn in site.rglob('*.html')}
    parsed = {name: links.Page(text) for name, text in pages.items()}
    own = re.compile(rf'(<a\b[^>]*\bhref="){re.escape(url)}/([^"#]*)#?([^"]*)')
    for name, text in pages.items():
        up = '../' * name.count('/')
        write(site/name, own.sub(lambda m: f'{m[1]}{up}{m[2]}{nearest(parsed[m[2]], m[3])}', text))


def drop_fonts(site):
    "A theme's font comes from another host; the reader's own will do."
    for fn in (site/'site_libs').rglob('*.css'): write(fn, _font.sub('', fn.read_text(encoding='utf-8')))


def name_markdown(site):
    "Name the markdown copy of a page as Quarto and the modules' docstrings do: losses.html.md."
    copies = list(site.rglob('*.llms.md'))
    for fn in [*copies, site/'llms.txt']: write(fn, fn.read_text(encoding='utf-8').replace('.llms.md', '.html.md'))
    for fn in copies: fn.rename(fn.with_name(fn.name.replace('.llms.md', '.html.md')))


def sections(proc):
    "The pages of the sidebar in its order: section, notebook."
    side = yaml.safe_load((proc/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    for o in side:
        if 'section' in o: yield from ((o['section'], page) for page in o['contents'])
        else: yield o['text'], o['href']


def told(nb):
    "Title and description of a processed notebook."
    front = next(yaml.safe_load(''.join(c['source']).strip('- \n')) for c in nb['cells'] if c['cell_type'] == 'raw')
    return front['title'], front.get('description', '')


def write_llms(site, proc, url):
    "`llms.txt`: the pages in the order of the sidebar, with what each is about."
    title, about = told(read(proc/'index.ipynb'))
    lines, last = [f'# {title}', '', f'> {about}'], None
    for section, page in sections(proc):
        if section != last: lines += ['', f'## {section}', '']
        name, text = told(read(proc/page))
        lines.append(f"- [{name}]({url}/{page.replace('.ipynb', '.html.md')}): {text}")
        last = section
    write(site/'llms.txt', '\n'.join(lines) + '\n')


def rank_search(site, proc):
    "Guides before the reference, and that before internals: a little, so that a page's own name still finds it."
    ranks = {page.replace('.ipynb', '.html'): RANKS.get(section, 0) for section, page in sections(proc)}
    index = read(site/'search.json')
    for o in index: o['rank'] = ranks[o['href'].partition('#')[0]]
    write(site/'search.json', json.dumps(sorted(index, key=lambda o: o['rank']), ensure_ascii=False))
    scripts = [o for o in site.rglob('*.js') if _no_matches in o.read_text(encoding='utf-8')]
    if len(scripts) != 1: raise ValueError(f'expected one script that searches, found {len(scripts)}')
    text = scripts[0].read_text(encoding='utf-8')
    write(scripts[0], text.replace(_no_matches, f'{_no_matches} sortFn: (a, b) => a.score + index[a.idx].rank / 20 - b.score - index[b.idx].rank / 20,'))


def build():
    "Build the site; the number of its pages and what is wrong with it."
    cfg = get_config(ROOT)
    refresh_quarto_yml()
    proc, wrong = processed()
    drop_events(proc)
    rename(proc)
    drop_formats(proc)
    wrong += unread(proc)
    shutil.rmtree(proc/cfg.doc_path.name, ignore_errors=True)
    made = smalldocs.site.build(proc, quiet=True)
    maths.draw(made.out)
    localise(made.out, cfg.doc_url.rstrip('/'))
    drop_fonts(made.out)
    name_markdown(made.out)
    write_llms(made.out, proc, cfg.doc_url.rstrip('/'))
    rank_search(made.out, proc)
    wrong += made.warnings + links.check(made.out)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.copytree(made.out, cfg.doc_path)
    return len(made.pages), wrong


def main():
    "Build, and report."
    os.chdir(ROOT)  # nbdev looks for its settings from here
    n, wrong = build()
    if wrong: sys.exit('\n'.join([*wrong, f'_docs: {n} pages, {len(wrong)} things wrong']))
    print(f'_docs: {n} pages, every link leads somewhere')


if __name__ == '__main__': main()
