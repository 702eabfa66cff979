"""Check a built site: every link leads somewhere, and no page needs another host to be shown.

`python tools/links.py FOLDER` prints what is wrong, and exits 1 if anything is.
"""
import re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHOWN = {('script', 'src'), ('img', 'src'), ('iframe', 'src'), ('source', 'src'), ('video', 'src'), ('audio', 'src'), ('embed', 'src'), ('object', 'data')}
LINKS = SHOWN | {('a', 'href'), ('link', 'href')}
LOADED = {'stylesheet', 'icon', 'preload', 'modulepreload', 'manifest'}  # what a <link> makes the browser load

_css_url = re.compile(r'url\(\s*["\']?([^"\')]+)["\']?\s*\)|@import\s+["\']([^"\']+)["\']')
_css_note = re.compile(r'/\*.*?\*/', re.S)


class Page(HTMLParser):
    "The anchors of a page, its links as (address, whether the browser loads it), and its styles."

    def __init__(self, html):
        super().__init__()
        self.anchors, self.links, self.css, self.in_style = set(), [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        self.anchors |= {d[k] for k in ('id', 'name') if d.get(k)}
        self.in_style = tag == 'style'
        if d.get('style'): self.css.append(d['style'])
        loads = bool(LOADED & set((d.get('rel') or '').split())) if tag == 'link' else True
        self.links += [(d[k], loads and tag != 'a') for t, k in LINKS if t == tag and d.get(k)]

    def handle_endtag(self, tag): self.in_style = False

    def handle_data(self, data):
        if self.in_style: self.css.append(data)


def css_links(text): return [a or b for a, b in _css_url.findall(_css_note.sub('', text))]


def is_external(url): return bool(urlsplit(url).scheme or urlsplit(url).netloc)


def target(root, src, path):
    "The file that `path`, written in `src`, leads to."
    dest = root/path.lstrip('/') if path.startswith('/') else src.parent/path
    return (dest/'index.html' if dest.is_dir() else dest).resolve()


def problem(root, pages, src, url, loads):
    "What is wrong with one link, or None."
    if url.startswith(('data:', 'mailto:', 'javascript:')): return
    if is_external(url): return f'loads {url}' if loads else None
    u = urlsplit(url)
    dest = target(root, src, unquote(u.path)) if u.path else src.resolve()
    if not dest.is_relative_to(root.resolve()): return f'leads out of the site: {url}'
    if not dest.is_file(): return f'leads nowhere: {url}'
    if u.fragment and dest in pages and unquote(u.fragment) not in pages[dest].anchors: return f'no such anchor: {url}'


def check(root):
    "What is wrong with the site in the folder `root`, a line each."
    root = Path(root)
    pages = {o.resolve(): Page(o.read_text(encoding='utf-8')) for o in sorted(root.rglob('*.html'))}
    found = [(f, url, loads) for f, p in pages.items() for url, loads in p.links]
    found += [(f, url, True) for f, p in pages.items() for css in p.css for url in css_links(css)]
    found += [(f.resolve(), url, True) for f in sorted(root.rglob('*.css')) for url in css_links(f.read_text(encoding='utf-8'))]
    said = ((f, problem(root, pages, f, url, loads)) for f, url, loads in found)
    return list(dict.fromkeys(f'{f.relative_to(root.resolve()).as_posix()} {o}' for f, o in said if o))


if __name__ == '__main__':
    wrong = check(sys.argv[1])
    print('\n'.join(wrong) or 'every link leads somewhere')
    sys.exit(bool(wrong))
