"""Do the tests notice a mistake? Make small mistakes in the modules, one at a time, and see which ones no test notices.

`python tools/mutants.py --modules losses rows --n 100 --seed 1 --tests tests/test_losses.py tests/test_rows.py`
Each mutant is a copy of this tree with one expression changed. A row that survives is a missing test, or a change that makes no difference.
Left alone: annotations, decorators, texts, and what stands in f-strings.
"""
import argparse, ast, copy, importlib, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = '.git', '.venv', '_docs', '_proc', 'runs', '__pycache__', '.*_cache', '.hypothesis', 'benchmarks'

COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
              ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
UNTOUCHED = ast.JoinedStr, ast.Import, ast.ImportFrom


class Mutant(NamedTuple):
    "One changed module."
    module: str  # its name
    line: int
    was: str
    now: str
    text: str  # the whole module


def changed(node, **kw):
    "A copy of `node` with other fields."
    node = copy.copy(node)
    for k, v in kw.items(): setattr(node, k, v)
    return node


def without(xs, i): return xs[:i] + xs[i + 1:]


def of_number(o):
    "Others than the constant `o`."
    if isinstance(o, bool): return [not o]
    return [o + 1, o - 1] if isinstance(o, (int, float)) else []


def of_call(node):
    "Calls that lack one argument: a keyword, or the last by position of several."
    fewer = [changed(node, keywords=without(node.keywords, i)) for i in range(len(node.keywords))]
    return fewer + ([changed(node, args=node.args[:-1])] if len(node.args) > 1 else [])


def others(node):
    "Pairs of a node under (or at) `node` and what could stand there by mistake."
    if isinstance(node, ast.Compare) and len(node.ops) == 1: return [(node, changed(node, ops=[COMPARE[type(node.ops[0])]()]))]
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC: return [(node, changed(node, op=ARITHMETIC[type(node.op)]()))]
    if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        return [(node, changed(node, op=ARITHMETIC[type(node.op)]()))]
    if isinstance(node, ast.BoolOp): return [(node, changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And()))]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)): return [(node, node.operand)]
    if isinstance(node, ast.Constant): return [(node, ast.Constant(o)) for o in of_number(node.value)]
    if isinstance(node, (ast.If, ast.IfExp)):
        return [(node.test, ast.UnaryOp(ast.Not(), node.test)), (node.test, ast.Constant(True))]
    if isinstance(node, ast.comprehension): return [(o, ast.Constant(True)) for o in node.ifs]
    if isinstance(node, ast.Return) and node.value is not None: return [(node.value, ast.Constant(None))]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call): return [(node.value, ast.Constant(None))]
    if isinstance(node, ast.Call): return [(node, o) for o in of_call(node)]
    return []


def nodes(node):
    "The nodes of a tree that a mistake can be made in."
    if isinstance(node, UNTOUCHED): return
    yield node
    for field, value in ast.iter_fields(node):
        if field in ('annotation', 'returns', 'decorator_list'): continue
        for o in value if isinstance(value, list) else [value]:
            if isinstance(o, ast.AST): yield from nodes(o)


def spliced(source, old, new):
    "`source` (bytes) with the text of node `new` where node `old` stands."
    starts = [0]
    for o in source.splitlines(keepends=True): starts.append(starts[-1] + len(o))
    a, b = (starts[line - 1] + col for line, col in ((old.lineno, old.col_offset), (old.end_lineno, old.end_col_offset)))
    text = ast.unparse(new)
    return (source[:a] + (text if isinstance(new, ast.stmt) else f'({text})').encode() + source[b:]).decode()


def mutants(module, text):
    "Every mutant of a module's text."
    source = text.encode()
    for node in nodes(ast.parse(text)):
        for old, new in others(node):
            now = spliced(source, old, new)
            yield Mutant(module, old.lineno, ast.unparse(old), ast.unparse(new), now)


HEAVY = ('torch', 'torch.utils.data', 'fastai.vision.all', 'fastai.text.all', 'fastai.tabular.all', 'pandas', 'pyarrow.parquet',
         'duckdb', 'sklearn', 'hypothesis', 'pytest', '_pytest.assertion.rewrite')


def warm(names):
    "Import what the tests import and no mutant changes, once: each run is a fork of this process."
    os.environ['OMP_NUM_THREADS'] = '1'  # before torch: a fork keeps no threads
    for o in names:
        try: importlib.import_module(o)
        except ImportError: print(f'{o} is not installed: left to the tests', file=sys.stderr)


def child(tree, tests, said):
    "In a fork: run `tests` in `tree`, what they say goes to the file `said`."
    os.setsid()  # so that what the tests start can be killed with them
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for o in 1, 2: os.dup2(out, o)
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree/'tests')]
    os.environ |= dict(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE='1')
    sys.dont_write_bytecode = True
    rc = 1
    try: rc = importlib.import_module('pytest').main(['-x', '-q', '-p', 'no:cacheprovider', *tests])
    finally: os._exit(int(rc))


def forked(tree, tests, limit):
    "What a fork of this process says of `tests` in `tree`: passed, failed, or over the time limit (seconds)."
    pid = os.fork()
    if not pid: child(tree, tests, tree.parent/'said.txt')
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return 'passed' if status == 0 else 'failed'
        time.sleep(.05)
    os.killpg(pid, signal.SIGKILL)  # what the tests started, too
    os.waitpid(pid, 0)
    return 'too slow'


def serve(heavy):
    "Answer each line of stdin, `[tree, tests, limit]` as JSON, with a line."
    warm(heavy)
    for line in sys.stdin:
        tree, tests, limit = json.loads(line)
        print(forked(Path(tree), tests, limit), flush=True)


class Runner:
    "A process that has imported what all runs need; `run(tree, tests, limit)` says passed, failed or too slow."
    def __enter__(self):
        cmd = [sys.executable, __file__, '--serve', *HEAVY]
        self.server = subprocess.Popen(cmd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __call__(self, tree, tests, limit):
        print(json.dumps([str(tree), tests, limit]), file=self.server.stdin, flush=True)
        return self.server.stdout.readline().strip()

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()


def fate(run, tree, mutant, tests, limit):
    "What the tests say of a mutant; the module is put back."
    fn = tree/'fastai_xent'/f'{mutant.module}.py'
    before = fn.read_text(encoding='utf-8')
    fn.write_text(mutant.text, encoding='utf-8')
    try: return run(tree, tests, limit)
    finally: fn.write_text(before, encoding='utf-8')


def told(m): return f'{m.module}.py:{m.line}  {m.was}  →  {m.now}'


def table(modules, fates):
    "How many mutants of each module were killed; a mutant that is too slow counts as killed."
    rows = ['| module | mutants | killed | too slow | survived |', '|---|---|---|---|---|']
    for name in [*modules, 'all']:
        n = Counter(o for m, o in fates if name in (m.module, 'all'))
        rows.append(f"| {name} | {n.total()} | {n['failed']} | {n['too slow']} | {n['passed']} |")
    return '\n'.join(rows)


def sample(root, modules, n, seed):
    "`n` mutants of the modules, in the order of the text."
    texts = {o: (root/'fastai_xent'/f'{o}.py').read_text(encoding='utf-8') for o in modules}
    every = [m for o, text in texts.items() for m in mutants(o, text)]
    chosen = sorted(random.Random(seed).sample(range(len(every)), min(n, len(every))))
    return [every[i] for i in chosen]


def main(argv=None):
    "Make the mutants, try them, print the table and the survivors."
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--modules', nargs='+', required=True, help='names of modules: losses rows')
    ap.add_argument('--tests', nargs='+', required=True, help='test files or node ids, as pytest takes them')
    ap.add_argument('--n', type=int, default=50, help='how many mutants')
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--root', type=Path, default=ROOT, help='the tree, if not this one: another commit')
    ap.add_argument('--limit', type=float, help='seconds for each; default: thrice what the tests take now, and 30')
    a = ap.parse_args(argv)
    with tempfile.TemporaryDirectory() as d, Runner() as run:
        tree = Path(d)/'tree'
        shutil.copytree(a.root, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        start = time.monotonic()
        if run(tree, a.tests, 3600) != 'passed': sys.exit('the tests do not pass without a mutant')
        limit = a.limit or 3 * (time.monotonic() - start) + 30
        fates = []
        for m in sample(tree, a.modules, a.n, a.seed):
            fates.append((m, fate(run, tree, m, a.tests, limit)))
            if fates[-1][1] == 'passed': print('survived:', told(m), flush=True)
    print(table(a.modules, fates))


if __name__ == '__main__': serve(sys.argv[2:]) if sys.argv[1:2] == ['--serve'] else main()
