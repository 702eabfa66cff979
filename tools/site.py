"""Build the site into _docs.

nbdev prepares the notebooks and smalldocs lays out the pages, in pure Python, where nbdev asks for Quarto.
The steps between them are what smalldocs does not do as Quarto does: see each function.
Any warning or broken link fails the build.
"""
import json, os, re, shutil, sys, warnings
from pathlib import Path

if sys.version_info < (3, 11): sys.exit('the site needs Python 3.11 or later, since smalldocs does')

import links, maths, smalldocs.site, yaml
from nbdev.config import get_config, nbpath2html
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from readme import directives, prose
from smalldocs.check import scan

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = '_quarto.yml', 'nbdev.yml', 'sidebar.yml'

_output_file = re.compile(r'^output-file:.*\n?', re.M)
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


def name_markdown(site):
    "Name the markdown copy of a page as Quarto and the modules' docstrings do: losses.html.md."
    copies = list(site.rglob('*.llms.md'))
    for fn in [*copies, site/'llms.txt']: write(fn, fn.read_text(encoding='utf-8').replace('.llms.md', '.html.md'))
    for fn in copies: fn.rename(fn.with_name(fn.name.replace('.llms.md', '.html.md')))


def build():
    "Build the site; the number of its pages and what is wrong with it."
    cfg = get_config(ROOT)
    refresh_quarto_yml()
    proc, wrong = processed()
    rename(proc)
    drop_formats(proc)
    wrong += unread(proc)
    shutil.rmtree(proc/cfg.doc_path.name, ignore_errors=True)
    made = smalldocs.site.build(proc, quiet=True)
    maths.draw(made.out)
    localise(made.out, cfg.doc_url.rstrip('/'))
    name_markdown(made.out)
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
