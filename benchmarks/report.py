"""Bytes and seconds of a report, the page opened by Debian's chromium from disk.

python benchmarks/report.py [--folder DIR]   Fashion-MNIST: 60,000 + 10,000 items, 8 epochs, one label in ten planted wrong
python benchmarks/report.py --full           1,281,167 synthetic items × 10 epochs too, some minutes

Data: Fashion-MNIST from Debian's package dataset-fashion-mnist."""
import argparse
import gzip
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import fastai.callback.progress  # noqa: F401 no_bar
import fastai.callback.schedule  # noqa: F401 fit_one_cycle
import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn

from fastai_xent.all import XentLossFlat, XentRecord, XentRecorder, XentWriter
from fastai_xent.report import report

sys.path.insert(0, str(Path(__file__).parent))
from store import N, simulated  # noqa: E402

FASHION = Path('/usr/share/datasets/fashion-mnist')
NAMES = ['T-shirt', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Boot']

class Pictures:
    "Pictures in memory, called by the files that hold them too."
    def __init__(self, kind, folder, noise=0.):
        read = lambda o, skip: np.frombuffer(gzip.open(FASHION / f'{kind}-{o}-ubyte.gz').read(), np.uint8)[skip:]
        x, self.true = read('images-idx3', 16).reshape(-1, 28, 28), read('labels-idx1', 8).astype(np.int64)
        self.x, self.y, rng = torch.tensor(x)[:, None] / 255., self.true.copy(), np.random.default_rng(0)
        flip = rng.random(len(x)) < noise
        self.y[flip] = (self.y[flip] + rng.integers(1, 10, flip.sum())) % 10
        self.items = [folder / kind / NAMES[y] / f'{i:05d}.png' for i, y in enumerate(self.y)]
        for o in {f.parent for f in self.items}: o.mkdir(parents=True, exist_ok=True)
        for f, o in zip(self.items, x):
            if not f.exists(): Image.fromarray(o).save(f)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], torch.tensor(self.y[i])

def fashion(folder, epochs=8):
    "A record of a small training, made once."
    path = folder / 'fashion'
    if (path / '_record.json').exists(): return path
    set_seed(0)
    train, valid = Pictures('train', folder / 'pictures', .1), Pictures('t10k', folder / 'pictures')
    dls = DataLoaders(TfmdDL(train, bs=256, shuffle=True, num_workers=0), TfmdDL(valid, bs=512, num_workers=0))
    dls.vocab = NAMES
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    learn = Learner(dls, model, loss_func=XentLossFlat(), metrics=accuracy, cbs=XentRecorder(path, overwrite=True))
    with learn.no_bar(): learn.fit_one_cycle(epochs, 3e-3)
    return path

def large(folder, n=N, epochs=10):
    "A record with as many items as ImageNet's train, and names like theirs."
    path = folder / f'large-{n}'
    if (path / '_record.json').exists(): return path
    rng = np.random.default_rng(0)
    with XentWriter(path) as writer:
        for split, m in (('train', n), ('valid', 50_000)):
            name = [f'n{i * 1000 // m:08d}/n{i * 1000 // m:08d}_{k}.JPEG' for i, k in enumerate(rng.integers(0, 99999, m))]
            items = pd.DataFrame(dict(item=np.arange(m), name=name, source=pd.Series(np.arange(m), dtype='Int64')))
            writer.set_items(split, items, f'f{m}', vocab=[f'n{c:08d}' for c in range(1000)])
            for e in range(epochs): writer.write(0, e, split, simulated(m, e, epochs), fold=False)
    return path

# -- in a browser

FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()
WATCH = """async () => {
    let begin
    for (const o of ['pointerup', 'input']) addEventListener(o, () => begin = performance.now(), true)
    new MutationObserver(() => requestAnimationFrame(() => setTimeout(() => window.took = performance.now() - begin)))
        .observe(document.getElementById('status'), {childList: true, characterData: true, subtree: true})
}"""

def took(page, do) -> float: # Seconds from the event until the frame with the answer is drawn
    page.evaluate('window.took = null')
    do()
    while page.evaluate('window.took') is None: time.sleep(.01)
    return page.evaluate('window.took') / 1000

def brush(page, k):
    page.locator('#map').scroll_into_view_if_needed()
    b = page.locator('#map').bounding_box()
    at = lambda x, y: (b['x'] + x * b['width'], b['y'] + y * b['height'])
    page.mouse.move(*at(.1, .5 + .01 * k))
    page.mouse.down()
    page.mouse.move(*at(.6, .9), steps=5)
    page.mouse.up()

def in_browser(path, items, repeats=5) -> dict:
    "Seconds until the page is painted, can be used, has answered a brush and a search; the median of some visits."
    from playwright.sync_api import sync_playwright
    res = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path='/usr/bin/chromium', args=FLAGS)
        for k in range(repeats):
            page, start = browser.new_page(viewport=dict(width=1200, height=900)), time.perf_counter()
            page.set_default_timeout(300_000)
            page.goto(path.absolute().as_uri())
            page.wait_for_selector('html[data-ready]', state='attached')
            r = dict(usable=time.perf_counter() - start)
            r['paint'] = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
            page.evaluate(WATCH)
            r['brush'] = np.median([took(page, lambda: brush(page, j)) for j in range(5)])
            page.click('#clear')
            i = int(items['item'].iloc[len(items) * (k + 1) // (repeats + 2)])
            r['search'] = took(page, lambda: page.fill('#search', str(items['name'].iloc[i])))
            assert page.inner_text('#status').split()[0] == '1', page.inner_text('#status')
            res.append(r)
            page.close()
    return pd.DataFrame(res).median().to_dict()

def row(name, run, out):
    record, start = XentRecord(run), time.perf_counter()
    path = report(record, out)
    wrote = time.perf_counter() - start
    r = in_browser(path, record.items())
    n = sum(len(record.items(o)) for o in record.splits)
    print(f"| {name} | {n:,} | {path.stat().st_size / 1e6:.1f} MB | {wrote:.0f} s | {r['paint']:.2f} s | {r['usable']:.2f} s | "
          f"{1000 * r['brush']:.0f} ms | {1000 * r['search']:.0f} ms |", flush=True)

def main(folder, full):
    if not FASHION.exists(): return print("skipped: Debian's package dataset-fashion-mnist is not installed")
    print('| record | items | file | written in | first paint | usable | brush | search |\n|---|---|---|---|---|---|---|---|')
    row('Fashion-MNIST', fashion(folder), folder / 'fashion.html')
    if full: row("ImageNet's size, synthetic", large(folder), folder / 'large.html')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--folder', type=Path, help='keep the records and the reports there')
    p.add_argument('--full', action='store_true', help=f'{N:,} items too')
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp: main(a.folder or Path(tmp), a.full)
