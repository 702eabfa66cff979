"""Print the measures of the house, this tree's or also those of a commit: `python tools/measure.py [REV]`.

Functions: lines from `def` to the end, nested ones too.
Width: lines of the modules that hold code, so neither blank lines nor lines that are all comment.
Chain: the longest row of functions whose names start with `_`, each calling the next or handing it on.
    A name is its own module's function if that has one, else any module's; a cycle is cut.
    Share: private functions among all but `__dunder__` ones.
Files: lines of the modules, without what nbdev writes for itself (`_modidx.py`).
Lessons: the share that checks something of the code cells that export nothing and do more than import or show.
Cells: lines of the export cells, directives too.
"""
import argparse, ast, json, re, subprocess, sys, tarfile, tempfile
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef
_export = re.compile(r'^#\|\s*(?:export|exports|exporti|default_exp)\b', re.M)
_directive = re.compile(r'^#\|.*\n?', re.M)
_check = re.compile(r'\bassert\b|\bassert_\w+\(|\btest_\w+\(|\bexpect_fail\b|\braises\b')


def p90(xs): return sorted(xs)[int(.9 * (len(xs) - 1))]


def lines(fn): return fn.read_text(encoding='utf-8').splitlines()


def share(part, whole): return f'{100 * len(part) / max(len(whole), 1):.0f} %'


def over(widths, limit): return f'{100 * sum(o > limit for o in widths) / max(len(widths), 1):.1f} %'


def modules(root): return [o for o in sorted((root/'fastai_xent').glob('*.py')) if o.name != '_modidx.py']


def functions(tree): return [o for o in ast.walk(tree) if isinstance(o, FUNCTION)]


def length(f): return f.end_lineno - f.lineno + 1


def is_private(name): return name.startswith('_') and not name.endswith('__')


def called(f):
    "The names that `f` calls, or hands on to be called."
    nodes = [o for o in ast.walk(f) if isinstance(o, (ast.Name, ast.Attribute))]
    return {o.id if isinstance(o, ast.Name) else o.attr for o in nodes}


def private_calls(trees):
    "The private functions, as (number of the tree, name), that each private function of `trees` calls."
    funcs = [(i, f) for i, t in enumerate(trees) for f in functions(t) if is_private(f.name)]
    homes, calls = defaultdict(set), defaultdict(set)
    for i, f in funcs: homes[f.name].add(i)
    for i, f in funcs:
        for name in called(f) & homes.keys():
            calls[i, f.name] |= {(j, name) for j in ({i} & homes[name] or homes[name])} - {(i, f.name)}
    return calls


def chain(calls):
    "The longest row of names, each calling the next."
    best = {}
    def _from(name, above):
        if name in best: return best[name]
        rows = [_from(o, above | {name}) for o in sorted(calls.get(name, set()) - above)]
        best[name] = [name, *max(rows, key=len, default=[])]
        return best[name]
    return max((_from(o, {o}) for o in sorted(calls)), key=len, default=[])


def code_cells(root):
    "The source of every code cell of the notebooks."
    for fn in sorted((root/'nbs').rglob('*.ipynb')):
        if any(o[0] in '._' for o in fn.relative_to(root/'nbs').parts): continue
        for c in json.loads(fn.read_text(encoding='utf-8'))['cells']:
            if c['cell_type'] == 'code': yield fn.stem, ''.join(c['source'])


def is_export(src): return bool(_export.search(src))


def works(src):
    "Whether a cell does more than import or show the documentation."
    src = _directive.sub('', src).strip()
    return not all(re.match(r'(from|import|show_doc|%|\s|#|$|\))', o) for o in src.splitlines())


def code_lines(texts): return [o for o in texts if o.strip() and not o.lstrip().startswith('#')]


def measures(root):
    "The measures of the tree at `root`, by name."
    files = modules(root)
    trees = [ast.parse(o.read_text(encoding='utf-8')) for o in files]
    funcs = [f for t in trees for f in functions(t)]
    lengths, sizes = [length(f) for f in funcs], [len(lines(o)) for o in files]
    widths = [len(o) for fn in files for o in code_lines(lines(fn))]
    row = chain(private_calls(trees))
    cells = list(code_cells(root))
    exports = sorted((len(s.strip().splitlines()), nb) for nb, s in cells if is_export(s))[::-1]
    lessons = [s for _, s in cells if not is_export(s) and works(s)]
    tests = sum(len(lines(o)) for o in (root/'tests').glob('*.py'))
    private = [f for f in funcs if is_private(f.name)]
    named = [f for f in funcs if not f.name.startswith('__')]
    checked = [o for o in lessons if _check.search(o)]
    return {
        'function lines, median / p90 / max': f'{median(lengths):.0f} / {p90(lengths)} / {max(lengths)}',
        'line width p90; lines > 140; > 120': f'{p90(widths)}; {over(widths, 140)}; {over(widths, 120)}',
        'widest line': f'{max(widths)}',
        'longest chain of private calls; private share': f'{len(row)}; {share(private, named)}',
        'the chain': ' → '.join(f'{files[i].stem}.{o}' for i, o in row),
        'file lines, median / max': f'{median(sizes):.0f} / {max(sizes)}',
        'non-export cells that assert': share(checked, lessons),
        'largest export cells': ', '.join(f'{n} ({nb})' for n, nb in exports[:3]),
        'test lines / library lines': f'{tests / sum(sizes):.1f}',
    }


def measured(rev):
    "The measures of the commit `rev`."
    git = ['git', 'archive', rev, 'fastai_xent', 'nbs', 'tests']
    tar = subprocess.run(git, cwd=ROOT, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as d:
        tarfile.open(fileobj=BytesIO(tar)).extractall(d, filter='data')
        return measures(Path(d))


def table(columns):
    "A markdown table of measures, a column for each tree."
    names = list(next(iter(columns.values())))
    rows = [['', *columns], ['---'] * (1 + len(columns)), *([o, *(c[o] for c in columns.values())] for o in names)]
    return '\n'.join(f"| {' | '.join(o)} |" for o in rows)


def main(argv=None):
    "Print the table."
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('rev', nargs='?', help='a commit to compare with')
    rev = ap.parse_args(argv).rev
    print(table(({rev: measured(rev)} if rev else {}) | {'here': measures(ROOT)}))


if __name__ == '__main__': sys.exit(main())
