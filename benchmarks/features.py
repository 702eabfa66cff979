"""Planted near-duplicates in a record's features: how many `duplicates` finds, and what else it takes for one.

Fashion-MNIST: copies moved by a pixel or two, with noise (standard deviation 10 of 255), or through JPEG (quality 60).
TREC: questions with a word replaced, a typo (two letters swapped), in capitals, or with other punctuation.
Both are features of an eval pass (`eval_every`), and beside them those of training. What is found beyond the planted is judged by words in common
(TREC: a pair that shares 60 % of its words is one), and drawn to a file (Fashion-MNIST).
  features.py [rows of Fashion-MNIST] [picture.png]
  features.py cost EPOCHS on|off    for `perf stat -e instructions:u`: fits of 10,000 images; an epoch is the difference of two lengths
Data: `XENT_DATA` (default ../shared/data), and Debian's package dataset-fashion-mnist."""
import io
import os
import re
import sys
import warnings

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')

import fastai.callback.schedule  # noqa: E402, F401 `fit_one_cycle`
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from fastai.data.core import DataLoaders, TfmdDL  # noqa: E402
from fastai.learner import Learner  # noqa: E402
from fastai.torch_core import set_seed  # noqa: E402
from noise import bag  # noqa: E402
from overhead import DATA, FASHION, Rows, cnn, idx, images  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from fastai_xent.all import XentLossFlat, XentRecorder  # noqa: E402


# -- copies

def moved(im, by, rng):
    steps = [(a, b) for a in range(-by, by + 1) for b in range(-by, by + 1) if max(abs(a), abs(b)) == by]
    a, b = steps[rng.integers(len(steps))]
    padded = np.pad(im, by)
    return padded[by - a:by - a + 28, by - b:by - b + 28]

def through_jpeg(im):
    Image.fromarray(im).save(f := io.BytesIO(), 'JPEG', quality=60)
    return np.array(Image.open(f))

IMAGES = {'moved by 1': lambda im, rng: moved(im, 1, rng), 'moved by 2': lambda im, rng: moved(im, 2, rng),
          'noise': lambda im, rng: np.clip(im + rng.normal(0, 10, im.shape), 0, 255).astype(np.uint8), 'JPEG': lambda im, rng: through_jpeg(im)}

def other_word(t, rng, vocab):
    w = t.split()
    w[rng.choice([i for i, o in enumerate(w) if o.isalpha()])] = rng.choice(vocab)
    return ' '.join(w)

def typo(t, rng, vocab):
    w = t.split()
    i = max(range(len(w)), key=lambda i: len(w[i]))
    j = rng.integers(len(w[i]) - 1)
    w[i] = w[i][:j] + w[i][j + 1] + w[i][j] + w[i][j + 2:]
    return ' '.join(w)

TEXTS = {'a word': other_word, 'a typo': typo, 'capitals': lambda t, rng, v: t.upper(), 'punctuation': lambda t, rng, v: re.sub(r'[^\w\s]', '', t).strip() + ' !'}


# -- runs

def recorded(x, y, model, epochs, bs):
    set_seed(0)
    rec = XentRecorder(features=True, eval_every=epochs)
    dls = DataLoaders(TfmdDL(Rows(x, y), bs=bs, shuffle=True, num_workers=0), TfmdDL(Rows(x[:1000], y[:1000]), bs=1000, num_workers=0))
    learn = Learner(dls, model(), loss_func=XentLossFlat(), cbs=rec)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    with learn.no_logging(): learn.fit_one_cycle(epochs, 5e-3)
    return rec.record

def told(record, split, src, kind, alike=None):
    "Recall by kind; of the pairs within groups, how many are not planted."
    found = record.duplicates(split)
    group, n = found.set_index('item')['group'], record.meta['splits'][split]['segments'][-1]['n']
    copies = range(n - len(src), n)
    hit = np.array([a in group.index and b in group.index and group[a] == group[b] for a, b in zip(src, copies)])
    print(f"  {split}: found {', '.join(f'{k} {hit[kind == k].mean():.3f}' for k in dict.fromkeys(kind))}; all {hit.mean():.3f}; "
          f"{found['group'].nunique():,} groups of {len(found):,} items, dimension {found.attrs['dimension']:.1f}, closeness to {found.attrs['threshold']:.2f}")
    planted = {*src, *copies}
    rest = found[~found.groupby('group')['item'].transform(lambda g: any(i in planted for i in g))]
    pairs = [tuple(g[:2]) for _, g in rest.groupby('group')['item']]
    if alike: print(f"  besides {len(pairs)} groups without a planted item, of which {np.mean([alike(*p) for p in pairs]):.1%} share 60 % of their words")
    return pairs

def fashion(n, picture):
    if not FASHION.exists(): return print("skipped: Debian's package dataset-fashion-mnist is not installed")
    x, y = (idx(FASHION / f'train-{o}-ubyte.gz')[:n] for o in ('images-idx3', 'labels-idx1'))
    rng, each = np.random.default_rng(0), n // 150
    src, kind = rng.permutation(n)[:4 * each], np.repeat(list(IMAGES), each)
    x = np.concatenate([x, [IMAGES[k](x[i], rng) for k, i in zip(kind, src)]])
    y = np.concatenate([y, y[src]]).astype(np.int64)
    print(f'Fashion-MNIST, {n:,} images and {len(src):,} copies', flush=True)
    def wide(): return nn.Sequential(*[nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((1, 32), (32, 64), (64, 128))],
                                     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    record = recorded(torch.tensor(x[:, None] / 255., dtype=torch.float32), torch.tensor(y), wide, 3, 128)
    pairs = told(record, 'train', src, kind)
    print(f'  besides {len(pairs)} groups without a planted item: see the picture')
    if picture: Image.fromarray(np.vstack([np.hstack([np.hstack([x[a], x[b], np.full((28, 6), 128, np.uint8)]) for a, b in row])
                                           for row in np.array(pairs[:len(pairs) // 12 * 12][:144]).reshape(-1, 12, 2)])).save(picture)

def trec():
    if not (DATA / 'trec.csv').exists(): return print(f"skipped: {DATA / 'trec.csv'} is missing")
    df = pd.read_csv(DATA / 'trec.csv').query("split == 'train'")
    texts, y, rng = df['text'].tolist(), df['coarse'].astype('category').cat.codes.to_numpy().astype(np.int64), np.random.default_rng(0)
    vocab = sorted({w for t in texts for w in t.split() if w.isalpha()})
    src, kind = rng.permutation(len(texts))[:400], np.repeat(list(TEXTS), 100)
    texts = texts + [TEXTS[k](texts[i], rng, vocab) for k, i in zip(kind, src)]
    y = np.concatenate([y, y[src]])
    tokens = [o + [f'{a} {b}' for a, b in zip(['^', *o], o)] for o in (t.lower().split() for t in texts)]
    number = {t: i + 1 for i, t in enumerate(dict.fromkeys(t for o in tokens for t in o))}
    x = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
    for row, o in zip(x, tokens): row[:len(o)] = torch.tensor([number[t] for t in o])
    print(f'TREC, {len(df):,} questions and {len(src)} copies', flush=True)
    record = recorded(x, torch.tensor(y), lambda: bag(x, 6, 128), 6, 64)
    words = [{*re.findall(r'\w+', t.lower())} for t in texts]
    told(record, 'train', src, kind, lambda a, b: len(words[a] & words[b]) >= .6 * len(words[a] | words[b]))

def cost(epochs, on):
    _, rows = images()
    set_seed(0)
    dls = DataLoaders(TfmdDL(rows, bs=64, shuffle=True, num_workers=0), TfmdDL(Rows(*(t[:1000] for t in rows.ts)), bs=64, num_workers=0))
    learn = Learner(dls, cnn(), loss_func=XentLossFlat(), cbs=XentRecorder(features=on))
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    with learn.no_logging(): learn.fit(epochs)


if __name__ == '__main__':
    if sys.argv[1:2] == ['cost']: cost(int(sys.argv[2]), sys.argv[3] == 'on')
    else:
        trec()
        fashion(int(sys.argv[1]) if len(sys.argv) > 1 else 60_000, sys.argv[2] if len(sys.argv) > 2 else None)
