"""Do the tests notice a mistake? Make small mistakes in the modules, one at a time, and see which ones no test notices.

`python tools/mutants.py --modules losses rows --n 50 --seed 1`
Each mutant is a copy of this tree with one expression changed.
One that survives shows a missing test, or a change that makes no difference.
First the tests run once, to see which lines each passes and how long it takes. Then a mutant meets only
those that pass its statement: its module's own, then the others, the quickest first, up to the first that fails.
Tests marked `slow` are left out.
Left alone: annotations, decorators, texts, and what stands in f-strings.
"""
import argparse, ast, bisect, copy, importlib, itertools, json
import os, random, resource, shutil, signal, subprocess, sys, tempfile, threading, time
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

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
            if ast.unparse(old) == ast.unparse(new): continue  # `return None`
            now = spliced(source, old, new)
            yield Mutant(module, old.lineno, ast.unparse(old), ast.unparse(new), now)


def head(node):
    "The first and last line of a statement without the statements in it."
    body = getattr(node, 'body', None)
    return (node.lineno, max(node.lineno, body[0].lineno - 1)) if body else (node.lineno, node.end_lineno)


def lines_of(text, line):
    """The lines whose tests a change on `line` concerns: the statement's.
    Of what is done on import, a function's head concerns all who call it, and anything else the whole module."""
    around = [o for o in ast.walk(ast.parse(text)) if isinstance(o, ast.stmt) and o.lineno <= line <= o.end_lineno]
    inner, functions = around[-1], [o for o in around if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef))]
    if not functions: return set(range(1, len(text.splitlines()) + 1))
    first, last = (inner.lineno, inner.end_lineno) if inner is functions[-1] else head(inner)
    return {line, *range(first, last + 1)}


class Plugin:
    "For pytest: it knows the mark `slow`, which another tree may not have."
    def pytest_configure(self, config): config.addinivalue_line('markers', 'slow: left out here')


class Lines(Plugin):
    """For pytest: which lines of our modules each test passes, and how long it takes.
    What a fixture of several tests does counts for each of them. What other processes do is not seen."""
    def __init__(self, tree, modules, to):
        self.modules, self.to = {str(tree/'fastai_xent'/f'{o}.py'): o for o in modules}, to
        self.tests, self.failed, self.lines = [], [], defaultdict(list)  # line → numbers of tests
        self.passed, self.shared = set(), {}  # since a test or fixture began; by fixtures of several tests

    def call(self, frame, event, arg): return self.line if frame.f_code.co_filename in self.modules else None

    def line(self, frame, event, arg):
        self.passed.add((self.modules[frame.f_code.co_filename], frame.f_lineno))
        return self.line

    @contextmanager
    def noted(self):
        "Yields a function that says processor seconds and lines so far."
        before, self.passed, start = self.passed, set(), time.process_time()
        for o in sys, threading: o.settrace(self.call)
        try: yield lambda: (time.process_time() - start, self.passed)
        finally: self.passed = before | self.passed

    def of_fixtures(self, item):
        "Seconds and lines of each fixture that `item` shares and that has been set up."
        defs = {o for each in item._fixtureinfo.name2fixturedefs.values() for o in each}
        return [self.shared[o] for o in defs if o in self.shared]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        ready = self.of_fixtures(item)
        with self.noted() as so_far:
            result = yield
            seconds, passed = so_far()
        for o in sys, threading: o.settrace(None)
        for o in passed.union(*(lines for _, lines in self.of_fixtures(item))): self.lines[o].append(len(self.tests))
        self.tests.append((item.nodeid, seconds + sum(t for t, _ in ready)))
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        with self.noted() as so_far:
            result = yield
            if fixturedef.scope != 'function': self.shared[fixturedef] = so_far()
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed: self.failed.append(report.nodeid)

    def pytest_sessionfinish(self):
        lines = {f'{module}:{line}': o for (module, line), o in self.lines.items()}
        self.to.write_text(json.dumps(dict(tests=self.tests, failed=self.failed, lines=lines)))


class Chosen(Plugin):
    "For pytest: these tests alone, in this order."
    def __init__(self, tests): self.place = {o: i for i, o in enumerate(tests)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((o for o in items if o.nodeid in self.place), key=lambda o: self.place[o.nodeid])


HEAVY = ('torch', 'torch.utils.data', 'fastai.vision.all', 'fastai.text.all', 'fastai.tabular.all', 'pandas', 'pyarrow.parquet',
         'duckdb', 'sklearn', 'llvmlite', 'hypothesis', 'pytest', '_pytest.assertion.rewrite')


def warm(names):
    "Import what the tests import and no mutant changes, once: each run is a fork of this process."
    os.environ['OMP_NUM_THREADS'] = '1'  # before torch: a fork keeps no threads
    for o in names:
        try: importlib.import_module(o)
        except ImportError: print(f'{o} is not installed: left to the tests', file=sys.stderr)


def child(tree, args, plugin):
    "In a fork: run tests in `tree`, what they say goes to the file `said.txt` beside it."
    os.setsid()  # so that what the tests start can be killed with them
    out = os.open(tree.parent/'said.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for o in 1, 2: os.dup2(out, o)
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree/'tests')]
    os.environ['PYTHONPATH'] = str(tree)
    rc = 1
    args = ['-q', '-m', 'not slow', '-p', 'no:cacheprovider', '--rootdir', str(tree), *args]
    try: rc = importlib.import_module('pytest').main(args, plugins=[plugin])
    finally: os._exit(int(rc))


def noting(tree, args, modules, to):
    "In a fork: run the tests and write the file `to`, with the lines that they pass. The bytecode stays for later runs."
    child(Path(tree), args, Lines(Path(tree), modules, Path(to)))


def trying(tree, tests):
    "In a fork: run these tests up to the first that fails."
    os.environ['PYTHONDONTWRITEBYTECODE'], sys.dont_write_bytecode = '1', True  # a mutant's is not the module's
    child(Path(tree), ['-x', *dict.fromkeys(o.partition('::')[0] for o in tests)], Chosen(tests))


def forked(limit, job, *args):
    """What a fork of this process says of the tests of a job: passed, failed, or over the limit of processor seconds.
    Who sleeps uses none: ten times as long a time by the clock ends that."""
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        job(*args)
    end = time.monotonic() + 10 * limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done and os.WIFSIGNALED(status): return 'too slow' if os.WTERMSIG(status) == signal.SIGXCPU else 'failed'
        if done: return 'passed' if status == 0 else 'failed'
        time.sleep(.05)
    os.killpg(pid, signal.SIGKILL)  # what the tests started, too
    os.waitpid(pid, 0)
    return 'too slow'


JOBS = dict(noting=noting, trying=trying)


def serve(heavy):
    "Answer each line of stdin, `[limit, job, what it takes…]` as JSON, with a line."
    warm(heavy)
    for line in sys.stdin:
        limit, job, *args = json.loads(line)
        print(forked(limit, JOBS[job], *args), flush=True)


class Runner:
    "A process that has imported what all runs need; `run(limit, job, …)` says passed, failed or too slow."
    def __enter__(self):
        cmd = [sys.executable, __file__, '--serve', *HEAVY]
        self.server = subprocess.Popen(cmd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __call__(self, limit, job, *args):
        print(json.dumps([limit, job, *args], default=str), file=self.server.stdin, flush=True)
        return self.server.stdout.readline().strip()

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()


def noted(run, tree, tests, modules, file):
    "What `Lines` writes into `file`, unless that is there; tests that fail without a mutant are named and left out."
    if not file.exists(): run(7200, 'noting', tree, tests, modules, file)
    if not file.exists(): sys.exit((tree.parent/'said.txt').read_text())
    found = json.loads(file.read_text())
    for o in found['failed']: print('fails without a mutant:', o, flush=True)
    if len(found['failed']) >= len(found['tests']): sys.exit('no test passes without a mutant')
    return found


def chosen(found, mutant, text, seconds):
    """Names and seconds of the tests that pass the mutant's line, as many as take so long; how many more there are.
    Those of the module's own file come first, and the quickest of each."""
    numbers = {i for o in lines_of(text, mutant.line) for i in found['lines'].get(f'{mutant.module}:{o}', ())}
    own = f'tests/test_{mutant.module}.py::'
    tests = sorted((o for o in map(found['tests'].__getitem__, numbers) if o[0] not in found['failed']),
                   key=lambda o: (not o[0].startswith(own), o[1], o[0]))
    n = bisect.bisect(list(itertools.accumulate(o[1] for o in tests)), seconds)
    return tests[:n], len(tests) - n


def fate(run, tree, mutant, tests):
    "What the tests say of a mutant; the module is put back, with its time, by which Python knows its bytecode."
    if not tests: return 'passed'
    fn = tree/'fastai_xent'/f'{mutant.module}.py'
    before, stat = fn.read_text(encoding='utf-8'), fn.stat()
    fn.write_text(mutant.text, encoding='utf-8')
    os.utime(fn, (0, 0))
    try: return run(60 + int(2 * sum(t for _, t in tests)), 'trying', tree, [o for o, _ in tests])
    finally:
        fn.write_text(before, encoding='utf-8')
        os.utime(fn, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def told(m): return f'{m.module}.py:{m.line}  {m.was}  →  {m.now}'


def table(modules, fates):
    "How many mutants of each module were killed; a mutant that is too slow counts as killed."
    rows = ['| module | mutants | killed | too slow | survived |', '|---|---|---|---|---|']
    for name in [*modules, 'all']:
        n = Counter(o for m, o in fates if name in (m.module, 'all'))
        rows.append(f"| {name} | {n.total()} | {n['failed']} | {n['too slow']} | {n['passed']} |")
    return '\n'.join(rows)


def sample(text, module, n, seed):
    "`n` mutants of a module, in the order of the text."
    every = list(mutants(module, text))
    return [every[i] for i in sorted(random.Random(seed).sample(range(len(every)), min(n, len(every))))]


def arguments(argv):
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--modules', nargs='+', required=True, help='names of modules: losses rows')
    ap.add_argument('--tests', nargs='+', default=['tests'], help='test files or node ids, as pytest takes them')
    ap.add_argument('--n', type=int, default=50, help='how many mutants of each module')
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--root', type=Path, default=ROOT, help='the tree, if not this one: another commit')
    ap.add_argument('--seconds', type=float, default=20, help='processor seconds that the tests of one mutant may take')
    ap.add_argument('--lines', type=Path, help='file of which tests pass which lines: read if it is there, else written')
    return ap.parse_args(argv)


def main(argv=None):
    "Make the mutants, try them, print the table and the survivors."
    a = arguments(argv)
    with tempfile.TemporaryDirectory() as d, Runner() as run:
        tree = Path(d)/'tree'
        shutil.copytree(a.root, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        found = noted(run, tree, a.tests, a.modules, (a.lines or Path(d)/'lines.json').resolve())
        fates = []
        for module in a.modules:
            text = (tree/'fastai_xent'/f'{module}.py').read_text(encoding='utf-8')
            for m in sample(text, module, a.n, a.seed):
                tests, more = chosen(found, m, text, a.seconds)
                fates.append((m, fate(run, tree, m, tests)))
                if fates[-1][1] != 'passed': continue
                print('survived:', told(m), f'({len(tests)} tests, {more} left out)', flush=True)
    print(table(a.modules, fates))


if __name__ == '__main__': serve(sys.argv[2:]) if sys.argv[1:2] == ['--serve'] else main()
