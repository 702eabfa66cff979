"""Planted mistakes in masks: which score finds them, at what memory, and does it say where?

CamVid (`camvid_small` of XENT_DATA) at 48 × 64, a small U-Net, 20 epochs; a fifth of the 285 masks gets one mistake: an object left out (dropped), the class of a
region exchanged (swapped), or an object moved by a fifth to two fifths of its size (shifted). The rival is cleanlab.segmentation on the probabilities of five more
trainings, each of which leaves out a fifth; these are kept in XENT_CACHE. A training takes some 40 seconds."""
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np  # noqa: E402
import torch  # noqa: E402
from overhead import DATA  # noqa: E402
from PIL import Image  # noqa: E402
from scipy import ndimage  # noqa: E402
from torch import nn  # noqa: E402

from fastai_xent.writer import XentWriter  # noqa: E402

CACHE = Path(os.environ.get('XENT_CACHE', f'{tempfile.gettempdir()}/xent_trainings'))
H, W, C, VOID = 48, 64, 12, 11
KINDS, THINGS = ('dropped', 'swapped', 'shifted'), (2, 6, 7, 8, 9, 10)


# -- pictures and mistakes

def camvid():
    "Pictures and masks; None if they are not there."
    if not (DATA / 'camvid_small').exists(): return print(f"skipped: {DATA / 'camvid_small'} is missing")
    files = sorted((DATA / 'camvid_small/images').iterdir())
    opened = lambda f, how: np.asarray(Image.open(f).resize((W, H), how))
    x = np.stack([opened(o, Image.BILINEAR) for o in files])
    y = np.stack([opened(DATA / f'camvid_small/labels/{o.stem}.png', Image.NEAREST) for o in files])
    return torch.tensor(x / 255. - .4, dtype=torch.float32).movedim(-1, 1).contiguous() * 4, y.astype(np.int64)

def objects(y, classes, least, most): # Of (class, where)
    out = []
    for c in classes:
        at, k = ndimage.label(y == c)
        sizes = np.bincount(at.ravel(), minlength=k + 1)
        out += [(c, at == j) for j in range(1, k + 1) if least <= sizes[j] <= most]
    return out

def around(y, o):
    "The class around an object."
    ring = ndimage.binary_dilation(o, iterations=2) & ~o & (y != VOID)
    return np.bincount(y[ring], minlength=C).argmax() if ring.any() else None

def plant(y, kind, rng):
    "A mask with a mistake; None if it has no object for it."
    y, classes, least, most = y.copy(), *dict(dropped=(THINGS, 15, 800), swapped=(range(11), 30, 1000), shifted=([1, 2, 4, 5, 6, 7, 8, 9, 10], 40, 1200))[kind]
    found = objects(y, classes, least, most)
    if not found: return None
    c, o = found[rng.integers(len(found))]
    if kind == 'swapped':
        y[o] = rng.choice([k for k in range(11) if k != c])
        return y
    other = around(y, o)
    if other is None: return None
    if kind == 'shifted':
        size, both = np.ptp(np.argwhere(o), 0) + 1, rng.permutation([True, rng.random() < .5])
        by = [int(rng.choice([-1, 1]) * max(2, round(rng.uniform(.2, .4) * s))) if moves else 0 for s, moves in zip(size, both)]
        moved = ndimage.shift(o.astype(np.uint8), by, order=0) > 0
    y[o] = other
    if kind == 'shifted': y[moved & (y != VOID)] = c
    return y

def planted(y, seed, share=.2): # Masks, and the kind of mistake of each, '' if none
    rng, out, kind = np.random.default_rng(seed), y.copy(), np.full(len(y), '', dtype=object)
    for i in rng.permutation(len(y))[:round(share * len(y))]:
        k = KINDS[rng.integers(3)]
        z = plant(y[i], k, rng)
        if z is not None and (z != y[i]).sum() >= 8: out[i], kind[i] = z, k
    return out, kind


# -- the model

def block(i, o):
    half = lambda i: (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(*half(i), *half(o))

class UNet(nn.Module):
    def __init__(self, w=8):
        super().__init__()
        self.d = nn.ModuleList([block(3, w), block(w, 2 * w), block(2 * w, 4 * w), block(4 * w, 8 * w)])
        self.u, self.out = nn.ModuleList([block(12 * w, 4 * w), block(6 * w, 2 * w), block(3 * w, w)]), nn.Conv2d(w, C, 1)
    def forward(self, x):
        skips = []
        for k, b in enumerate(self.d):
            x = b(nn.functional.max_pool2d(x, 2) if k else x)
            skips.append(x)
        skips.pop()
        for b in self.u: x = b(torch.cat([nn.functional.interpolate(x, scale_factor=2, mode='nearest'), skips.pop()], 1))
        return self.out(x)

def fit(x, y, seed, writer=None, epochs=20, bs=8):
    torch.manual_seed(seed)
    model, n, loss_func = UNet(), len(x), nn.CrossEntropyLoss(ignore_index=VOID)
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=.01, betas=(.9, .99), eps=1e-5)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 8e-3, epochs * (n // bs), pct_start=.25)
    for e in range(epochs):
        for i in torch.randperm(n)[:n // bs * bs].view(-1, bs):
            z = model(x[i])
            if writer is not None: writer.add(split='train', epoch=e, item=i, pred=z, targ=y[i])
            loss_func(z, y[i]).backward()
            opt.step()
            opt.zero_grad()
            sched.step()
    return model

@torch.no_grad()
def probs(model, x):
    model.eval()
    return torch.cat([model(o).softmax(1) for o in x.split(32)])

def five_fold(x, y, seed) -> np.ndarray: # Probabilities by models that have not seen the picture
    path = CACHE / f'camvid-{seed}.npy'
    if not path.exists():
        fold, out = np.random.default_rng(seed).permutation(len(x)) % 5, torch.zeros(len(x), C, H, W)
        for k in range(5): out[fold == k] = probs(fit(x[fold != k], y[fold != k], seed + 100 + k), x[fold == k])
        CACHE.mkdir(parents=True, exist_ok=True)
        np.save(path, out.half().numpy())
    p = np.load(path).astype(np.float32)
    return p / p.sum(1, keepdims=True)


# -- scores: large, suspect

def cleanlab(y, p) -> dict:
    from cleanlab.internal.multilabel_scorer import softmin
    from cleanlab.segmentation.filter import find_label_issues
    from cleanlab.segmentation.rank import get_label_quality_scores
    known, own = y != VOID, np.take_along_axis(p, y[:, None], 1)[:, 0].astype(float)
    flagged = find_label_issues(y, p, downsample=1, n_jobs=1, verbose=False, batch_size=100000)
    return {'cleanlab, softmin': -get_label_quality_scores(y, p, verbose=False)[0],
            'cleanlab, softmin without void': -np.array([softmin(o[k][None], axis=1, temperature=.1)[0] for o, k in zip(own, known)]),
            'cleanlab, flagged pixels without void': (flagged & known).mean((1, 2))}

def average_precision(s, w):
    hit = w[np.argsort(-np.nan_to_num(s, nan=-np.inf), kind='stable')]
    return (np.cumsum(hit) / np.arange(1, len(w) + 1))[hit].mean()

def by_kind(s, kind) -> list:
    some = lambda k: (kind == '') | (kind == k)
    return [average_precision(s, kind != ''), *(average_precision(s[some(k)], kind[some(k)] != '') for k in KINDS)]

def hits(record, issues, y, truth, kind) -> tuple:
    "Of the mistakes among the first rows, as many as there are mistakes: in how many does the named part hold a changed position?"
    first = issues[:(kind != '').sum()]
    found = [(y[i] != truth[i])[eval(f'np.s_[{at}]')].any() for i, at in zip(first['item'], first['where']) if kind[i]]
    return sum(found), len(found)

def after_review(record, issues, wrong, n=50) -> str:
    asked = issues.to_review(n)
    asked['wrong'] = wrong[asked['item']]
    after = record.label_issues(reviewed=asked)
    flagged, a = after['item'][after['is_issue']], after.attrs
    return f"{wrong.mean():.2f}: {a['noise_rate']:.2f} ({a['noise_rate_low']:.2f} – {a['noise_rate_high']:.2f}); {len(flagged)} flagged, precision {a['precision']:.2f} " \
           f"({a['precision_low']:.2f} – {a['precision_high']:.2f}), true {wrong[flagged].mean() if len(flagged) else np.nan:.2f}"

def one(x, truth, seed) -> dict:
    y, kind = planted(truth, seed)
    t, wrong = torch.tensor(y), kind != ''
    with XentWriter(items=len(x), loss_func=nn.CrossEntropyLoss(ignore_index=VOID)) as w: fit(x, t, seed, w)
    record, p = w.record, five_fold(x, t, seed)
    issues = record.label_issues()
    ours = {f'`{o}`': record.score(o) for o in ('margin_loss', 'last_loss', 'worst')}
    size = lambda o: sum(record._place.fs.size(record._place.at(f)) for f in record._place.files(o))
    print(f"seed {seed}: {wrong.sum()} mistakes; the named part holds the mistake in %d of %d found; the probabilities take {p.nbytes / 1e6:.1f} MB, "
          "the parts of all epochs {:.2f} MB on disk, those of one pass {:.3f} MB in memory".format(size('_parts') / 1e6, len(x) * (144 + 32) / 1e6) % hits(record, issues, y, truth, kind))
    print(f"after 50 decisions, rate {after_review(record, issues, wrong)}", flush=True)
    return {k: by_kind(s, kind) for k, s in {**ours, **cleanlab(y, p)}.items()}

def main(seeds):
    torch.set_num_threads(1)
    data = camvid()
    if data is None: return
    found = [one(*data, seed) for seed in seeds]
    print(f"\nAverage precision, mean of {len(seeds)} seeds.\n\n| score | all | dropped | swapped | shifted |\n" + "|---" * 5 + "|")
    for k in found[0]: print(f"| {k} | " + " | ".join(f"{v:.3f}" for v in np.mean([o[k] for o in found], 0)) + " |")


if __name__ == '__main__': main([*map(int, sys.argv[1:])] or [0, 1, 2])
