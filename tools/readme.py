"""Write README.md from nbs/index.ipynb.

`nbdev-readme` needs Quarto, which pip cannot install; this writer needs nbdev alone.
`--check` writes nothing: it shows how README.md differs from what would be written, and exits 1 if it does.
"""
import argparse, difflib, os, re, sys
from pathlib import Path

from nbdev.config import get_config, nbpath2html
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parent.parent
ALERTS = dict(note='NOTE', tip='TIP', important='IMPORTANT', warning='WARNING', caution='CAUTION')

_fence = re.compile(r'(^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\2[`~]*[ \t]*$)', re.M | re.S)
directives = re.compile(r'\A(?:#\|.*\n?)+')
_style = re.compile(r'<style.*?</style>\s*', re.S)
_link = re.compile(r'(!?)(\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^()\s]+)((?:\s+"[^"]*")?)\)')
_div = re.compile(r'^(:{3,})[ \t]*(\{[^}\n]*\}|[\w-]+)?[ \t]*$')
_callout = re.compile(r'\.callout-(\w+)')
_title = re.compile(r'title="([^"]*)"')


def prose(text, f):
    "`text` with `f` applied to what stands outside its fenced code."
    parts = _fence.split(text)  # prose, fence, marker, prose, ...
    return ''.join(f(parts[i]) + (parts[i + 1] if i + 1 < len(parts) else '') for i in range(0, len(parts), 3))


def pages(root):
    "The notebook of each page of the site, from the top of the tree: losses.html, nbs/01_losses.ipynb."
    nbs = sorted((root/'nbs').rglob('*.ipynb'))
    return {nbpath2html(o.relative_to(root/'nbs')).as_posix(): o.relative_to(root).as_posix() for o in nbs}


def in_clone(target, root):
    "Where a link of nbs/index.ipynb leads in a clone of the tree at `root`: pages of the site and files on GitHub are files there."
    cfg = get_config(root)
    site, hub = cfg.doc_url.rstrip('/') + '/', f'{cfg.git_url}/blob/{cfg.branch}/'
    if target.startswith(site):
        page = target.removeprefix(site).partition('#')[0] or 'index.html'
        target = pages(root).get(page, page)
    elif target.startswith(hub): target = target.removeprefix(hub)
    elif re.match(r'\w+:|#', target): return target
    else: target = os.path.normpath(f'nbs/{target}').partition('#')[0]
    if not (root/target.partition('#')[0]).exists(): raise ValueError(f'a link of nbs/index.ipynb leads nowhere: {target}')
    return target


def relink(text, root):
    "Links lead to files of the tree at `root`."
    def _one(m):
        bang, label, target, title = m.groups()
        return f'{bang}{relink(label, root)}({in_clone(target, root)}{title})'
    return _link.sub(_one, text)


def quote(lines, kind, attrs):
    "The lines of a callout as a GitHub alert."
    title = _title.search(attrs)
    head = [f'[!{ALERTS[kind]}]'] + ([f'**{title[1]}**', ''] if title else [])
    body = '\n'.join(lines).strip('\n').split('\n')
    return [f'> {o}'.rstrip() for o in head + body]


def undiv(text):
    "Callouts become GitHub alerts; the marks of any other fenced div go."
    stack, out, fence = [], [], None
    for line in text.split('\n'):
        mark = re.match(r' {0,3}(`{3,}|~{3,})', line)
        if mark and fence is None: fence = mark[1]
        elif mark and mark[1].startswith(fence): fence = None
        div = _div.match(line) if fence is None else None
        if not div: out.append(line)
        elif div[2]: stack, out = stack + [(div[2], out)], []
        else:
            attrs, outer = stack.pop()
            kind = _callout.search(attrs)
            out = outer + (quote(out, kind[1], attrs) if kind else out)
    if stack: raise ValueError(f'a fenced div is not closed: {stack[-1][0]}')
    return '\n'.join(out)


def joined(o):
    "Notebook text, which is a string or a list of lines."
    return o if isinstance(o, str) else ''.join(o)


def fenced(text, lang=''): return f'```{lang}\n{text.rstrip()}\n```'


def shown(output, root):
    "One output of a code cell as markdown."
    if output['output_type'] == 'error': raise ValueError(f"an error is stored as output: {output['ename']}")
    if output['output_type'] == 'stream': return fenced(joined(output['text']))
    data = output['data']
    if any(k.startswith('image/') for k in data):
        raise ValueError('a picture is stored as output; save it under nbs/images/ and show it with ![what it shows](images/x.png)')
    if 'text/markdown' in data: return prose(joined(data['text/markdown']), lambda o: relink(o, root)).strip()
    if 'text/html' in data: return _style.sub('', joined(data['text/html'])).strip()
    return fenced(joined(data['text/plain']))


def code_cell(cell, root):
    "The parts of a code cell that its directives leave to be seen."
    says = {k: str(v).lower() for k, v in cell.directives_.items()}
    if says.get('include') == 'false': return []
    src = directives.sub('', cell.source).strip()
    code = [] if says.get('echo') == 'false' or not src else [fenced(src, 'python')]
    seen = [] if says.get('output') == 'false' else [shown(o, root) for o in cell.get('outputs', [])]
    return code + seen


def md_cell(cell, root):
    "A markdown cell as GitHub reads it."
    return [undiv(prose(directives.sub('', cell.source), lambda o: relink(o, root))).strip()]


def header(fm):
    "The title and the `>` line, which nbdev took for front matter."
    return [f"# {fm['title']}"] + ([f"> {fm['description']}"] if fm.get('description') else [])


def readme(fn=ROOT/'nbs'/'index.ipynb'):
    "The text of README.md for the notebook `fn`."
    proc = NBProcessor(fn, procs=FilterDefaults().procs(), rm_directives=False)
    proc.process()
    parts = header(proc.nb.frontmatter_)
    for cell in proc.nb.cells:
        if cell.cell_type == 'markdown': parts += md_cell(cell, ROOT)
        elif cell.cell_type == 'code': parts += code_cell(cell, ROOT)
    return '\n\n'.join(o for o in parts if o) + '\n'


def diff(old, new): return ''.join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), 'README.md', 'nbs/index.ipynb'))


def main(argv=None):
    "Write README.md, or say how it is out of step."
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--check', action='store_true', help='write nothing; exit 1 with a diff if README.md is out of step')
    check = ap.parse_args(argv).check
    os.chdir(ROOT)  # nbdev looks for its settings from here
    new, dest = readme(), ROOT/'README.md'
    if not check: return dest.write_text(new, encoding='utf-8') and 0
    changed = diff(dest.read_text(encoding='utf-8'), new)
    sys.stdout.write(changed)
    return int(bool(changed))


if __name__ == '__main__': sys.exit(main())
