"What fastai's interpretation says, from the record: the same numbers where fastai is right, the right ones where it is not."
import tracemalloc

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize, ToTensor
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.core import PILImage
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn, tensor

from fastai_xent.interpretation import XentInterpretation
from fastai_xent.losses import XentLossFlat
from fastai_xent.record import XentRecord
from fastai_xent.recorder import XentRecorder
from fastai_xent.writer import XentWriter
from helpers import quiet
from test_views import record_of

DIGITS = load_digits()
NAMES = 'zero one two three four five six seven eight nine'.split()


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')

def tensors(n=240) -> DataLoaders:
    "Digits as tensors; an item is its index in scikit-learn's set."
    x = tensor(DIGITS.images[:n]).float() / 16
    dss = Datasets(list(range(n)), [[x.__getitem__], [lambda i: NAMES[DIGITS.target[i]], Categorize()]],
                   splits=[list(range(150)), list(range(150, n))])
    return dss.dataloaders(bs=16, num_workers=0, device='cpu')

def pictures(folder, n=120) -> DataLoaders:
    "Digits as files, of which the items are the paths."
    files = [folder / f'{NAMES[c]}_{i}.png' for i, c in enumerate(DIGITS.target[:n])]
    for f, x in zip(files, DIGITS.images): Image.fromarray((x * 15.9).astype('uint8')).save(f)
    dss = Datasets(files, [[PILImage.create], [lambda f: f.stem.split('_')[0], Categorize()]],
                   splits=[list(range(80)), list(range(80, n))])
    return dss.dataloaders(bs=16, num_workers=0, after_item=[ToTensor()], device='cpu')

class Net(nn.Module):
    "Sees what it is given as numbers up to one; may be forbidden to be called."
    def __init__(self, n, c=10):
        super().__init__()
        self.head, self.closed = nn.Linear(n, c), False
    def forward(self, x):
        assert not self.closed, 'the model was called'
        x = x.float().flatten(1)
        return self.head(x / 255 if x.max() > 1 else x)

def fitted(dls, n, loss=None, epochs=2, **kw) -> Learner:
    set_seed(1)
    cbs = XentRecorder(precision='full', **kw)
    learn = quiet(Learner(dls, Net(n), loss_func=loss or XentLossFlat(), lr=.02, cbs=cbs))
    learn.fit(epochs)
    return learn

LOSSES = dict(plain=XentLossFlat, smoothed=lambda: XentLossFlat(label_smoothing=.2),
              weighted=lambda: XentLossFlat(weight=torch.linspace(.5, 2, 10)))

@pytest.fixture(scope='module', params=[*LOSSES, 'pictures'])
def learn(request, tmp_path_factory):
    if request.param == 'pictures': return fitted(pictures(tmp_path_factory.mktemp('digits')), 192)
    return fitted(tensors(), 64, LOSSES[request.param]())


# -- equal to fastai's

def test_all_numbers_are_fastais(learn, capsys):
    theirs = ClassificationInterpretation.from_learner(learn)
    learn.model.closed = True
    try: ours = XentInterpretation.from_learner(learn)
    finally: learn.model.closed = False
    torch.testing.assert_close(ours.losses, theirs.losses)
    for k, largest in ((9, True), (5, False), (None, True)):
        (a, i), (b, j) = (o.top_losses(k, largest) for o in (ours, theirs))
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(i, j.as_subclass(type(i)))
    assert list(ours.top_losses(4, items=True)[2]) == list(theirs.top_losses(4, items=True)[2])
    np.testing.assert_array_equal(ours.confusion_matrix(), theirs.confusion_matrix())
    for least in (1, 2, 99): assert ours.most_confused(least) == theirs.most_confused(least)
    assert ours.most_confused() and ours.vocab == list(theirs.vocab)
    said = []
    for o in (ours, theirs):
        o.print_classification_report()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and 'macro avg' in said[0]

def test_the_captions_say_the_probability_of_the_label(tmp_path):
    "fastai's caption has that of the prediction alone (its issue 3591)."
    learn = fitted(pictures(tmp_path), 192)
    p, targ = learn.get_preds(dl=learn.dls.valid)
    ours, vocab = XentInterpretation.from_learner(learn), learn.dls.vocab
    losses, idx = ours.top_losses(4)
    learn.model.closed = True
    ours.plot_top_losses(4)
    axs = plt.gcf().axes
    for ax, i, loss in zip(axs, idx.tolist(), losses.tolist()):
        t, best = int(targ[i]), int(p[i].argmax())
        want = f"{vocab[t]} ({p[i, t]:.0%})" + ('' if t == best else f" → {vocab[best]} ({p[i, best]:.0%})")
        assert ' '.join(ax.get_title().split()) == f"{want} loss {loss:.3g}"
        shown = ax.images[0].get_array()
        np.testing.assert_array_equal(shown, np.asarray(PILImage.create(learn.dls.valid_ds.items[i])))
    assert plt.gcf().get_suptitle() == 'valid, epoch 1: the 4 largest of 40 losses'

def test_ranks_may_be_chosen(learn):
    ours = XentInterpretation.from_learner(learn)
    worst = ours.top_losses()[1].tolist()
    for k in ([0, 3], range(2, 4)):
        ours.plot_top_losses(k, ncols=2)
        assert len(plt.gcf().axes) == 2
        assert ours._table(k, True)['item'].tolist() == [worst[o] for o in k]

@pytest.mark.parametrize('given, rows, cols', [(dict(ncols=5), 1, 5), (dict(nrows=5), 5, 1), (dict(nrows=2), 2, 3), ({}, 2, 3)])
def test_pictures_lie_as_asked(learn, given, rows, cols):
    XentInterpretation.from_learner(learn).plot_top_losses(5, figsize=(7, 3), **given)
    fig = plt.gcf()
    assert fig.axes[0].get_gridspec().get_geometry() == (rows, cols) and fig.get_size_inches().tolist() == [7, 3]


# -- more than fastai's

def test_every_pass_can_be_asked(tmp_path):
    learn = fitted(tensors(), 64, path=tmp_path / 'run')
    learn.fit(2)
    whole = learn.xent_recorder.record.to_df()
    record = XentRecord(tmp_path / 'run')                 # no Learner, no data
    for split in ('train', 'valid'):
        for e in range(4):
            d = whole[(whole['split'] == split) & (whole['epoch'] == e)]
            o = XentInterpretation(record, split=split, epoch=e)
            assert (o.fit, o.epoch) == (e // 2, e) and len(o.rows) == len(d)
            cm = pd.crosstab(d['targ'], d['pred']).reindex(index=range(10), columns=range(10), fill_value=0)
            np.testing.assert_array_equal(o.confusion_matrix(), cm)
            np.testing.assert_allclose(o.top_losses(5)[0], d['loss'].nlargest(5))
    assert [XentInterpretation(record, epoch=e, fit=f).epoch for e, f in ((None, None), (-1, None), (None, 0), (-1, 0), (2, 1))] == [3, 3, 1, 1, 2]
    for e, f in ((4, None), (2, 0), (None, 2), (-2, None)):
        with pytest.raises(KeyError, match=r"it has the epochs 0 \(fit 0\), 1 \(fit 0\), 2 \(fit 1\), 3 \(fit 1\)"): XentInterpretation(record, epoch=e, fit=f)
    with pytest.raises(KeyError, match="no split 'test'"): XentInterpretation(record, split='test')

def test_names_of_ones_own():
    record = record_of([dict(p_targ=[.2, .9, .3])], n=3)
    own = XentInterpretation(record, split='train', vocab=['a', 'b'])
    assert own.most_confused() == [('a', 'b', 2)] and XentInterpretation(record, split='train').most_confused() == [('cat', 'dog', 2)]

def test_a_record_without_names_of_classes():
    record = record_of([dict(p_targ=[.2, .9, .3])], n=3)
    record.meta['vocab'] = None
    o = XentInterpretation(record, split='train')
    assert o.most_confused() == [(0, 1, 2)] and o.confusion_matrix().tolist() == [[1, 2], [0, 0]]
    o.print_classification_report()
    o.plot_confusion_matrix()

def test_one_row():
    o = XentInterpretation(record_of([dict(p_targ=[.2])], n=1), split='train')
    assert o.confusion_matrix().tolist() == [[0, 1], [0, 0]] and o.top_losses()[1].tolist() == [0]
    assert '0 of 1 predicted right' in repr(o)

def test_equal_losses_come_in_the_order_of_items():
    o = XentInterpretation(record_of([dict(p_targ=[.9, .2, .2, .2])], n=4), split='train')
    assert o.top_losses()[1].tolist() == [1, 2, 3, 0] and o.top_losses(largest=False)[1].tolist() == [0, 1, 2, 3]

def test_rows_that_fill_up_a_batch_or_have_no_label_do_not_count():
    rows = dict(p_targ=[.2, .8, .3, .1], item=[0, 1, 2, 0], padding=np.array([False, False, False, True]),
                loss=[1., .2, np.nan, 3.], targ=[0, 0, -100, 0], pred=[1, 0, 1, 1])
    o = XentInterpretation(record_of([rows], n=3), split='train')
    assert o.confusion_matrix().tolist() == [[1, 1], [0, 0]]
    assert o.top_losses()[1].tolist() == [0, 1] and len(o.rows) == 3

def test_an_item_seen_twice_has_two_rows():
    o = XentInterpretation(record_of([dict(p_targ=[.2, .8, .3], item=[0, 1, 0])], n=2), split='train')
    assert o.confusion_matrix().sum() == 3 and sorted(o.top_losses()[1].tolist()) == [0, 0, 1]

@pytest.mark.parametrize('lam', [[.9, .8, .6], [np.nan, .8, np.nan]])
def test_mixed_rows_are_refused(lam):
    o = XentInterpretation(record_of([dict(p_targ=[.2, .8, .3], lam=lam, partner=[1, 2, 0])], n=3), split='train')
    for ask in (o.confusion_matrix, o.most_confused, o.print_classification_report, o.plot_confusion_matrix):
        with pytest.raises(ValueError, match=r'mixed rows \(MixUp or CutMix\).*eval_every=1'): ask()
    assert len(o.top_losses()[0]) == 3 and '3 rows' in repr(o)

def test_masks_are_refused():
    o = XentInterpretation(record_of([dict(p_targ=[.2, .8], n_pos=[9, 9], pred=[-1, -1], targ=[-1, -1])]), split='train')
    with pytest.raises(ValueError, match='a class a position'): o.confusion_matrix()
    assert o.top_losses()[1].tolist() == [0, 1]

def test_a_loss_that_could_not_be_asked():
    o = XentInterpretation(record_of([dict(p_targ=[.2, .8], loss=[np.nan] * 2, grad_norm=[np.nan] * 2)]), split='train')
    with pytest.raises(ValueError, match='has no losses'): o.top_losses()
    assert o.confusion_matrix().sum() == 2

def test_items_that_have_changed_are_not_shown_from_other_data():
    writer = XentWriter()
    for e, name in enumerate(('a', 'b')):
        items = pd.DataFrame(dict(item=range(2), name=[f'{name}{i}' for i in range(2)], source=pd.NA))
        writer.set_items('valid', items, name, ['cat', 'dog'], epoch=e)
        p = np.array([.2, .9], dtype=np.float32)
        writer.write(0, e, 'valid', dict(item=np.arange(2), loss=-np.log(p), grad_norm=p, el2n=p, p_targ=p,
                                         margin=np.log(p / (1 - p)), pred=(p < .5).astype(int), targ=np.zeros(2, int)))
    old = XentInterpretation(writer.record, dls=tensors(), epoch=0)
    with pytest.raises(ValueError, match="in epoch 0 'valid' had other items than at the end"): old.plot_top_losses(2)
    assert XentInterpretation(writer.record, epoch=0)._table(2, True)['name'].tolist() == ['a0', 'a1']

def test_a_learner_without_a_recorder():
    with pytest.raises(ValueError, match='this Learner has no XentRecorder'): XentInterpretation.from_learner(Learner(tensors(), Net(64), loss_func=XentLossFlat()))


# -- many classes

def many(n=2000, c=20_000):
    rng = np.random.default_rng(0)
    p = rng.uniform(.01, .4, n)
    record = record_of([dict(p_targ=p, pred=rng.integers(0, c, n), targ=rng.integers(0, c, n))], n=n, vocab=())
    record.meta.update(vocab=None, classes=c)
    return XentInterpretation(record, split='train')

def test_memory_does_not_grow_with_the_classes():
    "Neither n × c nor c × c, but for the matrix itself."
    o = many()
    tracemalloc.start()
    o.top_losses(), o.most_confused(), repr(o)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 20_000 / 2                       # of a byte for each row and class, half

def test_a_matrix_of_many_classes():
    ax = many(500, 200).plot_confusion_matrix()
    assert not ax.texts and len(ax.get_xticklabels()) <= 41
    ax.figure.canvas.draw()


# -- the picture

def confused(vocab=('cat', 'dog', 'eel')):
    rows = dict(p_targ=[.9, .9, .2, .2, .2], targ=[0, 1, 0, 1, 1], pred=[0, 1, 1, 0, 0])
    return XentInterpretation(record_of([rows], n=5, vocab=vocab), split='train')

def test_what_is_drawn():
    ax = confused().plot_confusion_matrix()
    assert ' '.join(ax.get_title('left').split()) == 'train, epoch 0: 2 of 5 predicted right most often dog taken for cat (2)'
    assert [(o.get_position(), o.get_text()) for o in ax.texts] == [((0, 0), '1'), ((1, 0), '1'), ((0, 1), '2'), ((1, 1), '1')]
    assert [o.get_text() for o in ax.get_yticklabels()] == ['cat', 'dog', 'eel']

def test_shares_of_a_class_without_rows():
    "fastai divides by zero."
    with np.errstate(all='raise'): ax = confused().plot_confusion_matrix(normalize=True, norm_dec=1)
    np.testing.assert_allclose(ax.images[0].get_array().filled(0), [[.5, .5, 0], [2 / 3, 1 / 3, 0], [0, 0, 0]])
    assert [o.get_text() for o in ax.texts] == ['0.5', '0.5', '0.7', '0.3']

def test_the_picture_is_as_asked():
    ax = confused().plot_confusion_matrix(title='mine', cmap='Greens', plot_txt=False, figsize=(3, 2), dpi=50)
    assert (ax.get_title('left'), len(ax.texts), ax.images[0].cmap.name) == ('mine', 0, 'Greens')
    assert ax.figure.get_size_inches().tolist() == [3, 2] and ax.figure.dpi == 50
    own = plt.figure().add_subplot()
    assert confused().plot_confusion_matrix(ax=own) is own

@pytest.mark.parametrize('style', ['default', 'dark_background'])
def test_numbers_stand_out_from_their_cells(style):
    with plt.style.context(style):
        ax = confused().plot_confusion_matrix()
        cells = ax.images[0].to_rgba(ax.images[0].get_array())[..., :3].mean(-1)
    for o in ax.texts:
        x, y = o.get_position()
        assert abs(cells[y, x] - (o.get_color() == 'white')) > .35

def test_names_are_text():
    ax = confused(vocab=('$\\frac', '<b>', 'z' * 99)).plot_confusion_matrix()
    ax.figure.canvas.draw()
    assert max(len(o.get_text()) for o in ax.get_yticklabels()) < 30
