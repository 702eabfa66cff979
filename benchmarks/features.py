"""Planted near-duplicates in a record's features: how many `duplicates` finds, and what else it takes for one; planted outliers.

Fashion-MNIST: copies moved by a pixel or two, with noise (standard deviation 10 of 255), or through JPEG (quality 60).
TREC: questions with a word replaced, a typo (two letters swapped), in capitals, or with other punctuation.
Features and inputs of an eval pass (`eval_every`). What is found beyond the planted is judged by itself: TREC, a pair is one if it shares 60 % of its words;
Fashion-MNIST, if at the best move of up to 3 pixels the two differ by less than 25 of 255 (root mean square; planted copies by 9.8 with noise, 12.8 after JPEG,
24 and 58 where a move has cut something off), and drawn to a file.
  features.py [rows of Fashion-MNIST] [seed] [picture.png]
  features.py outliers [seed]
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
from noise import adult, mlp  # noqa: E402
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

def told(record, split, src, kind, alike):
    "Recall by kind, by features alone and with inputs; of the groups without a planted item, how many are near-duplicates by `alike`."
    found = record.duplicates(split)
    group, n = found.set_index('item')['group'], record.meta['splits'][split]['segments'][-1]['n']
    by, copies = found.set_index('item')['by'], range(n - len(src), n)
    hit = np.array([a in group.index and b in group.index and group[a] == group[b] for a, b in zip(src, copies)])
    alone = np.array([h and 'features' in by[b] for h, b in zip(hit, copies)])
    print(f"  found {', '.join(f'{k} {hit[kind == k].mean():.3f} (features {alone[kind == k].mean():.3f})' for k in dict.fromkeys(kind))}; "
          f"all {hit.mean():.3f} ({alone.mean():.3f}); {found['group'].nunique():,} groups of {len(found):,} items")
    print('  ' + ', '.join(f"{k}: {v['pairs']} pairs, dimension {v['dimension']:.1f}, closeness to {v['threshold']:.2f}" for k, v in found.attrs.items()))
    planted = {*src, *copies}
    rest = found[~found.groupby('group')['item'].transform(lambda g: any(i in planted for i in g))]
    pairs = [tuple(g[:2]) for _, g in rest.groupby('group')['item']]
    good = np.array([alike(*p) for p in pairs])
    print(f"  besides {len(pairs)} groups without a planted item, of which {good.mean():.1%} are alike; precision {(hit.sum() + good.sum()) / (hit.sum() + len(good)):.3f}")
    return pairs

def apart(a, b, most=3):
    "The root mean square of the difference of two images, at the best move of up to `most` pixels."
    b = np.pad(b.astype(float), most)
    return min(np.sqrt(np.mean((a - b[i:i + 28, j:j + 28])**2)) for i in range(2 * most + 1) for j in range(2 * most + 1))

def wide():
    return nn.Sequential(*[nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((1, 32), (32, 64), (64, 128))],
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

def scaled(x): return torch.tensor(x[:, None] / 255., dtype=torch.float32)

def fashion(n, seed, picture):
    if not FASHION.exists(): return print("skipped: Debian's package dataset-fashion-mnist is not installed")
    x, y = (idx(FASHION / f'train-{o}-ubyte.gz')[:n] for o in ('images-idx3', 'labels-idx1'))
    rng, each = np.random.default_rng(seed), n // 150
    src, kind = rng.permutation(n)[:4 * each], np.repeat(list(IMAGES), each)
    x = np.concatenate([x, [IMAGES[k](x[i], rng) for k, i in zip(kind, src)]])
    y = np.concatenate([y, y[src]]).astype(np.int64)
    print(f'Fashion-MNIST, {n:,} images and {len(src):,} copies, seed {seed}', flush=True)
    record = recorded(scaled(x), torch.tensor(y), wide, 3, 128)
    pairs = told(record, 'train', src, kind, lambda a, b: apart(x[a], x[b]) < 25)
    if picture: Image.fromarray(np.vstack([np.hstack([np.hstack([x[a], x[b], np.full((28, 6), 128, np.uint8)]) for a, b in row])
                                           for row in np.array(pairs[:len(pairs) // 12 * 12][:144]).reshape(-1, 12, 2)])).save(picture)

class Words(nn.Module):
    "A bag of words and of pairs of neighbouring words; 0 fills up."
    def __init__(self, n, c, width, pairs=2**14):
        super().__init__()
        self.n, self.pairs, self.bag = n, pairs, nn.EmbeddingBag(n + pairs, width, mode='sum', padding_idx=0)
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(.2), nn.Linear(width, c))
    def forward(self, x):
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return self.head(self.bag(torch.cat([x, torch.where(x > 0, (before * 100_003 + x) % self.pairs + self.n, 0)], 1)))

def numbered(texts):
    "The numbers of the words, 0 fills up."
    words = [t.lower().split() for t in texts]
    number = {t: i + 1 for i, t in enumerate(pd.Series([t for o in words for t in o]).value_counts().index)}
    x = torch.zeros(len(words), max(map(len, words)), dtype=torch.long)
    for row, o in zip(x, words): row[:len(o)] = torch.tensor([number[t] for t in o])
    return x

def questions():
    if not (DATA / 'trec.csv').exists(): return print(f"skipped: {DATA / 'trec.csv'} is missing")
    df = pd.read_csv(DATA / 'trec.csv').query("split == 'train'")
    return df['text'].tolist(), df['coarse'].astype('category').cat.codes.to_numpy().astype(np.int64)

def trec(seed):
    if (found := questions()) is None: return
    (texts, y), rng = found, np.random.default_rng(seed)
    vocab = sorted({w for t in texts for w in t.split() if w.isalpha()})
    src, kind = rng.permutation(len(texts))[:400], np.repeat(list(TEXTS), 100)
    print(f'TREC, {len(texts):,} questions and {len(src)} copies, seed {seed}', flush=True)
    texts = texts + [TEXTS[k](texts[i], rng, vocab) for k, i in zip(kind, src)]
    y = np.concatenate([y, y[src]])
    x = numbered(texts)
    record = recorded(x, torch.tensor(y), lambda: Words(int(x.max()) + 1, 6, 128), 6, 64)
    words = [{*re.findall(r'\w+', t.lower())} for t in texts]
    told(record, 'train', src, kind, lambda a, b: len(words[a] & words[b]) >= .6 * len(words[a] | words[b]))


# -- outliers

def rivals(record):
    "How strange each item of train is, to ours and to others, of the same features."
    from cleanlab.outlier import OutOfDistribution
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor
    x, n = record.features(), record.meta['splits']['train']['segments'][-1]['n']
    far = record.outliers(n).set_index('item')['strange'].reindex(range(n)).to_numpy()
    x = x.to_numpy()
    return {'record.outliers': far, 'cleanlab OutOfDistribution': -OutOfDistribution().fit_score(features=x, verbose=False),
            'sklearn LocalOutlierFactor': -LocalOutlierFactor(20).fit(x).negative_outlier_factor_,
            'sklearn IsolationForest': -IsolationForest(random_state=0).fit(x).score_samples(x), 'last_loss': record.score('last_loss')}

def strange(name, x, y, foreign, model, epochs, bs):
    "Who finds the foreign items?"
    from sklearn.metrics import average_precision_score, roc_auc_score
    record = recorded(x, torch.tensor(y), model, epochs, bs)
    print(f'{name}: {foreign.sum()} of {len(x):,} are foreign', flush=True)
    for who, score in rivals(record).items():
        print(f'  {who:28} AUROC {roc_auc_score(foreign, score):.3f}, AP {average_precision_score(foreign, score):.3f}', flush=True)

def outliers(seed):
    rng = np.random.default_rng(seed)
    if FASHION.exists() and (DATA / 'mnist_t10k.npz').exists():
        x, y = (idx(FASHION / f'train-{o}-ubyte.gz')[:6000] for o in ('images-idx3', 'labels-idx1'))
        with np.load(DATA / 'mnist_t10k.npz') as f: digits = f['x'][rng.permutation(10_000)[:120]]
        x, y = np.concatenate([x, digits]), np.concatenate([y, rng.integers(0, 10, 120)]).astype(np.int64)
        strange('Digits among clothes', scaled(x), y, np.arange(len(x)) >= 6000, wide, 4, 64)
    if (found := questions()) is not None:
        texts, y = found
        other = y == 4                                        # questions for a number, with any other label
        keep = np.sort(np.r_[np.flatnonzero(~other), rng.choice(np.flatnonzero(other), 100, replace=False)])
        x, foreign, y = numbered([texts[i] for i in keep]), other[keep], y[keep]
        y[foreign] = rng.integers(0, 4, foreign.sum())
        y[y == 5] = 4
        strange('Questions of a class that is not asked for', x, y, foreign, lambda: Words(int(x.max()) + 1, 5, 128), 6, 64)
    if (found := adult(6000)) is not None:
        x, y = found
        x, foreign = x.clone(), np.zeros(len(x), dtype=bool)
        foreign[rng.permutation(len(x))[:120]] = True
        numbers = [j for j in range(x.shape[1]) if len(x[:, j].unique()) > 10]
        x[np.ix_(foreign, numbers)] = x[np.ix_(foreign, np.roll(numbers, 1))]
        strange('Rows of Adult with columns interchanged', x, y, foreign, lambda: mlp(x.shape[1], 128, 2, 1), 8, 128)

def cost(epochs, on):
    _, rows = images()
    set_seed(0)
    dls = DataLoaders(TfmdDL(rows, bs=64, shuffle=True, num_workers=0), TfmdDL(Rows(*(t[:1000] for t in rows.ts)), bs=64, num_workers=0))
    learn = Learner(dls, cnn(), loss_func=XentLossFlat(), cbs=XentRecorder(features=on))
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    with learn.no_logging(): learn.fit(epochs)


if __name__ == '__main__':
    if sys.argv[1:2] == ['cost']: cost(int(sys.argv[2]), sys.argv[3] == 'on')
    elif sys.argv[1:2] == ['outliers']: outliers(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    else:
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
        trec(seed)
        fashion(int(sys.argv[1]) if len(sys.argv) > 1 else 60_000, seed, sys.argv[3] if len(sys.argv) > 3 else None)
