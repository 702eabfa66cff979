"""Draw the maths of a built site without a script: each formula becomes MathML, which browsers draw by themselves.

pandoc, which comes with pypandoc-binary, converts them all at once; a formula that it cannot read is an error.
"""
import html, json, re
from pathlib import Path
from xml.etree import ElementTree

import pypandoc

_formula = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)  # as smalldocs writes it
_loader = re.compile(r'<(?:link|script)\b[^>]*\bkatex\b[^>]*>(?:</script>)?')
_applied = re.compile(r'((?:form="postfix">[^<]*)?</m\w+>)?<mrow>(<mi[^>]*>\w+</mi><mo>(?:&#8289;|⁡)</mo>)</mrow>(<mo)?')
THIN = '<mspace width="0.167em"></mspace>'
MARKS = dict(msub='_', munder='_', msup='^', msubsup='_^', munderover='_^')


def spaced(mathml):
    "`mathml` with a thin space around a function's name, as TeX sets it: −p ln p, but ln(1 + t)."
    def _one(m):
        before, name, after = m.groups()
        operand = before and before not in ('</mo>', '</mspace>')
        return f"{before or ''}<mrow>{THIN if operand else ''}{name}{'' if after else THIN}</mrow>{after or ''}"
    return _applied.sub(_one, mathml.replace('<mi>−</mi>', '<mo form="prefix">−</mo>'))


def mathml(formulas):
    "The MathML of each of `formulas`, pairs of (inline or display, TeX)."
    formulas = list(formulas)
    marks = [f'${tex}$' if kind == 'inline' else f'$${tex}$$' for kind, tex in formulas]
    text = pypandoc.convert_text('\n\n'.join(marks), 'html', format='markdown', extra_args=['--mathml', '--wrap=preserve'])
    found = re.findall(r'<p>(.*?)</p>', text, re.S)
    unread = [tex for (_, tex), o in zip(formulas, found) if not re.fullmatch(r'\s*<math.*</math>\s*', o, re.S)]
    if unread or len(found) != len(formulas): raise ValueError(f'pandoc cannot read these formulas: {unread}')
    return {f: spaced(o.strip()) for f, o in zip(formulas, found)}


def grouped(text): return text if len(text) < 2 else f'({text})'


def plain(node):
    "What a reader would type for the node of a formula, for the search: ∂ℓ/∂z=p−y."
    tag, parts = node.tag.split('}')[-1], [plain(o) for o in node if not o.tag.endswith('annotation')]
    if tag == 'mfrac': return '/'.join(grouped(o) for o in parts)
    if tag == 'msqrt': return '√' + grouped(''.join(parts))
    if tag == 'mspace': return ' '
    if tag in MARKS: return parts[0] + ''.join(m + grouped(o) for m, o in zip(MARKS[tag], parts[1:]))
    return (node.text or '').replace('\u2061', '') + ''.join(parts)


def key(m): return m[1], html.unescape(m[2]).strip()


def search_text(text, words):
    "`text` of the search index with its TeX, longest first, in words."
    for tex, o in words: text = text.replace(tex, o)
    return text


def draw(site):
    "Turn the maths of every page under `site` into MathML, and of its search index into text."
    site = Path(site)
    pages = {fn: fn.read_text(encoding='utf-8') for fn in site.rglob('*.html')}
    drawn = mathml(sorted({key(m) for text in pages.values() for m in _formula.finditer(text)}))
    for fn, text in pages.items():
        text = _formula.sub(lambda m: f'<span class="math {m[1]}">{drawn[key(m)]}</span>', text)
        fn.write_text(_loader.sub('', text), encoding='utf-8')
    tex = {t: plain(ElementTree.fromstring(o)) for (_, t), o in drawn.items() if re.search(r'[\\^_]', t)}
    words = sorted(tex.items(), key=lambda o: -len(o[0]))
    index = json.loads((site/'search.json').read_text(encoding='utf-8'))
    for o in index: o['text'] = search_text(o['text'], words)
    (site/'search.json').write_text(json.dumps(index, ensure_ascii=False), encoding='utf-8')
