"""The items themselves: the right one or a refusal, drawn as its kind is drawn, without a trace."""
import random
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders, Datasets, TfmdDL, TfmdLists
from fastai.data.transforms import Categorize, IntToFloatTensor, ToTensor
from fastai.learner import Learner
from fastai.tabular.core import Categorify, FillMissing, Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.vision.augment import FlipItem, Resize, aug_transforms
from fastai.vision.core import PILImage, PILMask
from fasttransform import Transform
from PIL import Image
from torch import nn, tensor

from fastai_xent.acts import prune, relabel
from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder
from fastai_xent.show import draw_items, items_table, read_item, show_history, show_items, show_top, with_probs
from helpers import quiet, rng_state
from test_views import record_of


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')

def images(n=6, size=8, seed=0): return np.random.default_rng(seed).integers(0, 255, (n, 3, size, size)).astype(np.float32) / 255

class Pairs:
    "Items and labels; counts what is read."
    def __init__(self, x, y): self.x, self.y, self.read = x, y, []
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        self.read.append(i)
        return self.x[i], tensor(int(self.y[i]))

def loaders(x, y=None):
    y = [0] * len(x) if y is None else y
    dl = lambda: TfmdDL(Pairs(x, y), bs=4, num_workers=0)
    return DataLoaders(dl(), dl())

def plain_loaders(x): return DataLoaders(*(torch.utils.data.DataLoader(Pairs(x, [0] * len(x)), batch_size=2) for _ in range(2)))

def record(n=6, **kw): return record_of([dict(p_targ=np.linspace(.1, .9, n))], n=n, **kw)

def drawn(fig): return [ax.images[0].get_array() for ax in fig.axes if ax.images]


# -- the right item, or a refusal

@pytest.mark.parametrize('loader', ['fastai', 'torch'])
def test_the_items_that_top_names_are_drawn_and_no_others_read(loader):
    x = torch.as_tensor(images())
    dls = loaders(x)
    if loader == 'torch': dls = plain_loaders(x)
    r = record()
    fig = draw_items(r, r.top(3), dls)
    assert dls[0].dataset.read == r.top(3)['item'].tolist() == [0, 1, 2] and not dls[1].dataset.read
    for got, want in zip(drawn(fig), x): np.testing.assert_allclose(got, want.movedim(0, -1))

@pytest.mark.parametrize('split, at', [('train', 0), ('train_eval', 0), ('valid', 1)])
def test_each_split_has_its_dataset(split, at):
    dls, r = loaders(torch.as_tensor(images())), record(split=split)
    draw_items(r, r.top(2, split=split), dls, split)
    assert [bool(o.dataset.read) for o in dls.loaders] == [at == 0, at == 1]

def test_a_split_without_a_loader():
    r = record(split='mine')
    with pytest.raises(KeyError, match="split 'mine' has no loader"): show_top(r, loaders(torch.as_tensor(images())), split='mine')

def test_another_number_of_items_is_refused():
    with pytest.raises(ValueError, match='6 items in the record and 5 in these'): show_top(record(), loaders(torch.as_tensor(images(5))))

def test_items_without_names_are_told_apart_by_their_labels():
    x, r = torch.as_tensor(images()), record()
    show_top(r, loaders(x, [0] * 6), 2)
    with pytest.raises(ValueError, match="item 1 has the label 'cat' in the record and 'dog' in these"): show_top(r, loaders(x, [0, 1, 0, 0, 0, 0]), 2)

@pytest.fixture
def folder(tmp_path):
    "Pictures a.png … f.png, a class a parity; the datasets turn them over, always, while they train."
    files = [tmp_path / f'{o}.png' for o in 'abcdef']
    for f, x in zip(files, images()): Image.fromarray((x * 255).astype(np.uint8).transpose(1, 2, 0)).save(f)
    return files

class Over(Transform):
    "Turn over the items of train."
    split_idx = 0
    def encodes(self, x: PILImage): return PILImage(x.transpose(Image.Transpose.FLIP_TOP_BOTTOM))

def datasets(files, **kw):
    dss = Datasets(files * 2, [[PILImage.create, Over()], [lambda f: 'even' if ord(f.stem) % 2 else 'odd', Categorize()]],
                   splits=[list(range(6)), list(range(6, 12))])
    return dss.dataloaders(bs=3, num_workers=0, after_item=[FlipItem(p=1.), ToTensor()], device='cpu', **kw)

def fit_recorded(dls, model, axis=-1, **kw) -> XentRecorder:
    "The recorder of a short fit."
    recorder = XentRecorder(**kw)
    learn = quiet(Learner(dls, model, loss_func=XentLossFlat(axis=axis), lr=.01, cbs=recorder))
    learn.fit(2)
    return recorder

def recorded(dls, **kw):
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    net(dls.one_batch()[0].float())
    return fit_recorded(dls, FloatFirst(net), **kw)

class FloatFirst(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x.float() / 255)

def test_items_are_read_without_augmentation(folder):
    dls = datasets(folder)
    r = recorded(dls).record
    top = r.top(6)
    for got, i in zip(drawn(draw_items(r, top, dls)), top['item']):
        np.testing.assert_array_equal(got, np.asarray(Image.open(folder[i])))
    assert dls.train.dataset.split_idx == 0 and dls.train.after_item.split_idx == 0
    turned = dls.train.after_item(dls.train.dataset[0])[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(turned, np.asarray(Image.open(folder[0]))[::-1, ::-1])

def test_switches_are_put_back_after_an_error(folder):
    dls = datasets(folder)
    next(iter(dls.train))
    folder[2].unlink()
    with pytest.raises(FileNotFoundError): read_item(dls.train, 2)
    assert dls.train.dataset.split_idx == 0 and dls.train.after_item.split_idx == 0

def test_a_tfmd_list_is_read_as_valid_too(folder):
    tl = TfmdLists(folder, [PILImage.create, Over()], split_idx=0)
    dl = TfmdDL(tl, bs=2, num_workers=0)
    np.testing.assert_array_equal(np.asarray(read_item(dl, 0).inputs[0]), np.asarray(Image.open(folder[0])))
    assert tl.tfms.split_idx == 0

def test_random_states_are_left_alone():
    class Rolls(Pairs):
        def __getitem__(self, i):
            random.random(), np.random.rand(), torch.rand(1)
            return super().__getitem__(i)
    x, r = torch.as_tensor(images()), record()
    dl = TfmdDL(Rolls(x, [0] * 6), bs=2, num_workers=0)
    before = rng_state()
    show_top(r, DataLoaders(dl, dl), 3)
    after = rng_state()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]

def test_items_called_otherwise_are_refused(folder):
    r = recorded(datasets(folder)).record
    other = datasets(folder[1:] + folder[:1])
    with pytest.raises(ValueError, match="item . of 'train' is '.*png' in the record and '.*png' in these DataLoaders"): show_top(r, other, 2)

def test_a_key_fn_names_the_items(folder):
    dls, key = datasets(folder), lambda f: f.stem.upper()
    r = recorded(dls, key_fn=key).record
    show_top(r, dls, 2, key_fn=key)
    with pytest.raises(ValueError, match='the `key_fn` of the recorder'): show_top(r, dls, 2)

def test_what_the_acts_give_can_be_shown(folder):
    dls = datasets(folder)
    r = recorded(dls).record
    shown = relabel(dls, r, {0: 'odd'})
    draw_items(r, r.top(6), shown)                        # the same names: another label is no other item
    less = prune(dls, r, drop=[1, 3])
    with pytest.raises(ValueError, match='6 items in the record and 4'): show_top(r, less)
    again = recorded(less).record
    top = again.top(4)
    for got, i in zip(drawn(draw_items(again, top, less)), top['item']):
        np.testing.assert_array_equal(got, np.asarray(Image.open(less.train_ds.items[i])))


# -- kinds of items

def test_plain_pictures_open_no_viewer(monkeypatch):
    "A PIL image has a method `show` that starts a program."
    monkeypatch.setattr(Image.Image, 'show', lambda *_, **__: pytest.fail('a viewer was opened'))
    ims = [Image.fromarray((o * 255).astype(np.uint8).transpose(1, 2, 0)) for o in images()]
    r = record()
    for got, want in zip(drawn(draw_items(r, r.top(2), plain_loaders(ims))), ims):
        np.testing.assert_array_equal(got, np.asarray(want))

GREY, COLOUR = (8, 8), (8, 8, 3)

@pytest.mark.parametrize('shape, drawn_as', [(GREY, GREY), ((1, 8, 8), GREY), ((8, 8, 1), GREY),
                                             ((3, 8, 8), COLOUR), (COLOUR, COLOUR), ((4, 8, 8), (8, 8, 4))])
@pytest.mark.parametrize('kind', [torch.as_tensor, np.asarray], ids=['tensor', 'array'])
def test_what_has_the_shape_of_a_picture_is_one(shape, drawn_as, kind):
    x = np.random.default_rng(0).normal(0, 2, (6, *shape)).astype(np.float32)
    got = drawn(draw_items(record(), record().top(1), loaders([kind(o) for o in x])))[0]
    assert got.shape == drawn_as
    if len(drawn_as) == 3: assert got.min() == 0 and got.max() == 1     # colours out of range would be cut off

@pytest.mark.parametrize('shape, lines', [((50,), 1), ((2, 50), 2)])
def test_what_is_long_and_narrow_is_drawn_as_lines(shape, lines):
    x = torch.randn(6, *shape)
    ax = draw_items(record(), record().top(1), loaders(x)).axes[0]
    np.testing.assert_allclose(np.stack([o.get_ydata() for o in ax.lines]), x[0].view(lines, -1))

@pytest.mark.parametrize('x', [dict(ids=[1, 2]), torch.zeros(2, 3, 4, 5), 3, None], ids=['dict', 'four axes', 'number', 'nothing'])
def test_anything_else_is_described(x):
    ax = draw_items(record(), record().top(1), loaders([x] * 6)).axes[0]
    assert str(x)[:10] in ax.texts[0].get_text()

def test_two_inputs_are_both_drawn():
    class Twins(Pairs):
        n_inp = 2
        def __getitem__(self, i): return self.x[i], Line(self.x[i][0, 0]), tensor(0)
    class Line:
        def __init__(self, v): self.v = v
        def show(self, ctx=None): return ctx.plot(self.v)
    dl = TfmdDL(Twins(torch.as_tensor(images()), [0] * 6), bs=2, num_workers=0)
    ax = draw_items(record(), record().top(1), DataLoaders(dl, dl)).axes[0]
    assert len(ax.images) == 1 and len(ax.lines) == 1

def test_items_that_are_no_pair():
    class Bare(Pairs):
        def __getitem__(self, i): return self.x[i]
    dl = TfmdDL(Bare(torch.as_tensor(images()), [0] * 6), bs=2, num_workers=0)
    assert drawn(draw_items(record(), record().top(1), DataLoaders(dl, dl)))[0].shape == (8, 8, 3)

@pytest.fixture(scope='module')
def people():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(age=rng.integers(20, 80, 40).astype(float), town=rng.choice(['Ulm', '<b>Rom'], 40),
                           tall=rng.choice(['yes', 'no'], 40)), index=range(100, 140))
    df.loc[[103, 110], 'age'] = np.nan
    return df

def tables(df):
    return TabularDataLoaders.from_df(df, y_names='tall', cat_names=['town'], cont_names=['age'], bs=10,
                                      procs=[Categorify, FillMissing, Normalize], valid_idx=list(range(0, 40, 4)))

class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)
    def forward(self, cat, cont): return self.net(torch.cat([cat.float(), cont], 1))

@pytest.mark.parametrize('split', ['train', 'valid'])
def test_rows_of_tables_in_their_own_units(people, split):
    dls = tables(people)
    r = fit_recorded(dls, Table()).record
    before = dls.loaders[split == 'valid'].dataset.items.copy()
    t = items_table(r, r.top(30, split=split), dls, split)
    pd.testing.assert_frame_equal(dls.loaders[split == 'valid'].dataset.items, before)
    for row in t.itertuples():
        own = people.loc[int(row.name)]
        assert (row.town, row.targ) == (own['town'], own['tall'])
        if own['age'] == own['age']: assert row.age == pytest.approx(own['age'])
    assert list(t)[0] == 'item' and 'tall' not in t and list(t)[-2:] == ['p_targ', 'p_likely']

def test_a_column_of_the_data_may_be_called_like_ours(people):
    df = people.assign(score=people['age'].fillna(50.)).drop(columns='age')
    dls = TabularDataLoaders.from_df(df, y_names='tall', cat_names=['town'], cont_names=['score'], bs=10,
                                     procs=[Categorify, Normalize], valid_idx=list(range(0, 40, 4)))
    r = fit_recorded(dls, Two()).record
    for row in items_table(r, r.top(5), dls).itertuples(): assert row.score_ == pytest.approx(df.loc[int(row.name), 'score'])

class Two(Table):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

def test_a_table_is_shown_as_one_with_its_text_escaped(people, monkeypatch):
    shown = []
    monkeypatch.setattr('IPython.display.display', lambda o: shown.append(o.data))
    dls = tables(people)
    r = fit_recorded(dls, Table()).record
    assert show_top(r, dls, 30) is None
    assert '&lt;b&gt;Rom' in shown[0] and '<b>' not in shown[0] and not plt.get_fignums()


# -- masks

def masks(folder, after_item, batch_tfms=(), **kw):
    "Pictures whose mask is where they are bright."
    def mask(f): return PILMask.create((np.asarray(Image.open(f))[..., 0] > 128).astype(np.uint8))
    dss = Datasets(folder * 2, [[PILImage.create], [mask]], splits=[list(range(6)), list(range(6, 12))])
    dls = dss.dataloaders(bs=3, num_workers=0, after_item=[*after_item, ToTensor()], after_batch=list(batch_tfms), device='cpu')
    return dls, fit_recorded(dls, FloatFirst(nn.Conv2d(3, 2, 3, padding=1)), axis=1, **kw).record

def test_a_mask_lies_over_its_picture_and_the_map_over_another(folder):
    dls, r = masks(folder, [], maps=range(6))
    top = r.top(2)
    fig = draw_items(r, top, dls)
    assert len(fig.axes) == 4
    for k, i in enumerate(top['item']):
        picture, mask = (o.get_array() for o in fig.axes[2 * k].images)
        np.testing.assert_array_equal(picture, np.asarray(Image.open(folder[i])))
        np.testing.assert_array_equal(mask, picture[..., 0] > 128)
        under, over = fig.axes[2 * k + 1].images
        np.testing.assert_array_equal(under.get_array(), picture)
        m = r.map(int(i))
        np.testing.assert_allclose(over.get_alpha(), .8 * (1 - m['p_targ']), atol=1e-6)
        assert fig.axes[2 * k + 1].get_title() == f"wrong at {(m['margin'] < 0).sum()} of 64 positions"

def test_a_map_of_a_turned_item_stands_alone(folder):
    "Always flipped in train: the numbers belong to other places of the picture."
    dls, r = masks(folder, [FlipItem(p=1.)], maps=range(6))
    for ax in draw_items(r, r.top(3), dls).axes[1::2]: assert len(ax.images) == 1 and '(as augmented)' in ax.get_title()
    for ax in draw_items(r, r.top(3, split='valid'), dls, 'valid').axes[1::2]: assert len(ax.images) == 2

def test_a_map_of_a_cropped_item_stands_alone(folder):
    dls, r = masks(folder, [Resize(6)], maps=range(6))
    for ax in draw_items(r, r.top(3, split='valid'), dls, 'valid').axes[1::2]: assert len(ax.images) == 2

def test_a_map_of_what_a_batch_was_resized_to(folder):
    "Sizes and crops that a batch transform makes are made for the picture, too."
    dls, r = masks(folder, [], maps=range(6), batch_tfms=[IntToFloatTensor, *aug_transforms(size=6)])
    for ax in draw_items(r, r.top(3, split='valid'), dls, 'valid').axes[1::2]:
        assert len(ax.images) == 2 and ax.images[0].get_array().shape == (6, 6, 3)

def test_an_eval_pass_has_the_better_map(folder):
    dls, r = masks(folder, [FlipItem(p=1.)], maps=range(6), eval_every=1)
    for ax in draw_items(r, r.top(3), dls).axes[1::2]: assert len(ax.images) == 2

def test_parts_lie_over_the_picture_of_their_mask(folder):
    dls, r = masks(folder, [])
    top = r.top(2)
    fig = draw_items(r, top, dls)
    assert len(fig.axes) == 4
    for k, i in enumerate(top['item']):
        under, over = fig.axes[2 * k + 1].images
        np.testing.assert_array_equal(under.get_array(), np.asarray(Image.open(folder[i])))
        np.testing.assert_allclose(over.get_alpha(), .8 * r.where(int(i))['doubt'], atol=1e-6)  # 8 × 8 pixels, a part each
        assert fig.axes[2 * k + 1].get_title().startswith(('labelled ', 'least sure at '))

def test_parts_of_a_turned_item_stand_alone(folder):
    dls, r = masks(folder, [FlipItem(p=1.)])
    for ax in draw_items(r, r.top(3), dls).axes[1::2]: assert len(ax.images) == 1 and '(as augmented)' in ax.get_title()
    for ax in draw_items(r, r.top(3, split='valid'), dls, 'valid').axes[1::2]: assert len(ax.images) == 2
    dls, r = masks(folder, [FlipItem(p=1.)], eval_every=1)
    for ax in draw_items(r, r.top(3), dls).axes[1::2]: assert len(ax.images) == 2

def test_masks_without_maps(folder):
    dls, r = masks(folder, [], maps=False)
    fig = draw_items(r, r.top(2), dls)
    assert len(fig.axes) == 2 and fig.axes[0].get_title().startswith('labels (')

def test_some_items_have_maps(folder):
    dls, r = masks(folder, [], maps=[0])
    said = [ax.get_title() for ax in draw_items(r, r.top(6), dls).axes[1::2]]
    assert sum(o.startswith('wrong at') for o in said) == 1 and sum(o.startswith(('labelled', 'least sure')) for o in said) == 5


# -- from the record alone

def named(names):
    r = record_of([dict(p_targ=np.linspace(.1, .9, len(names)))], n=len(names))
    return r, r.top(len(names)).assign(name=names)

def test_names_lead_to_pictures(folder, tmp_path):
    (torn := tmp_path / 'torn.png').write_bytes(b'\x89PNG\r\n')
    (text := tmp_path / 'notes.txt').write_text('no picture')
    r, top = named([str(folder[0]), str(torn), str(tmp_path / 'gone.png'), str(text), 'plain', None])
    fig = draw_items(r, top)
    assert len(drawn(fig)) == 1
    said = [ax.texts[0].get_text().replace('\n', '') for ax in fig.axes[1:6]]
    assert all(Path(str(n)).name[:4] in s for n, s in zip(top['name'][1:5], said)) and said[4] == 'item 5'

def test_names_that_lead_nowhere_make_a_table(monkeypatch):
    shown = []
    monkeypatch.setattr('IPython.display.display', lambda o: shown.append(o.data))
    r, top = named(['a <i>text</i>', 'b'])
    show_items(r, top)
    assert 'a &lt;i&gt;text' in shown[0] and shown[0].count('text&lt;') == 1 and not plt.get_fignums()
    assert list(items_table(r, top))[:2] == ['item', 'name']


# -- captions

def test_probabilities_are_of_the_last_row_that_predicts_the_likely_class():
    r = record_of([dict(p_targ=[.2, .9]), dict(p_targ=[.3, .8]), dict(p_targ=[.7, .6])])
    got = with_probs(r, r.top(2)).sort_values('item')
    np.testing.assert_allclose(got[['p_targ', 'p_likely']], [[.3, .7], [.6, .6]], rtol=1e-6)
    assert got['likely'].tolist() == ['dog', 'cat']

def test_probabilities_of_a_frame_whose_likely_class_was_never_predicted():
    r = record_of([dict(p_targ=[.9, .8])])
    got = with_probs(r, r.top(2).assign(likely='dog'))
    assert got[['p_targ', 'p_likely']].isna().all(axis=None)
    fig = draw_items(r, r.top(2).assign(likely='dog'), loaders(torch.as_tensor(images(2))))
    assert fig.axes[0].get_title().startswith('cat → dog\n')

def test_a_frame_of_issues_shows_how_probably_each_is_wrong():
    r = record()
    frame = r.top(2).assign(p_wrong=[.97, .5], is_issue=True)
    assert draw_items(r, frame, loaders(torch.as_tensor(images()))).axes[0].get_title().endswith('wrong: 97%')

NAMES = dict(words='a class of which the name is rather long, as those of ImageNet are ' * 3, letters='x' * 200,
             mathematics='$\\frac', unicode='Größe', empty='')

@pytest.mark.parametrize('name', NAMES.values(), ids=NAMES)
def test_captions_stay_above_their_own_picture(name):
    r = record(vocab=(name, name + '2'))
    fig = draw_items(r, r.top(6), loaders(torch.as_tensor(images())), cols=3)
    fig.canvas.draw()
    slack = 12
    for ax in fig.axes:
        box, own = ax.title.get_window_extent(), ax.get_position().transformed(fig.transFigure)
        assert box.x0 > own.x0 - slack and box.x1 < own.x1 + slack, ax.get_title()
        assert ax.get_title().count('\n') <= 6

@pytest.mark.parametrize('style, ink', [('default', 'black'), ('dark_background', 'white')])
def test_captions_read_on_any_background(style, ink):
    r = record(n=6)
    with plt.style.context(style): fig = draw_items(r, r.top(6), loaders(torch.as_tensor(images())))
    colors = {ax.title.get_color() for ax in fig.axes}
    assert colors == {ink, '#D55E00'}

@pytest.mark.parametrize('k, n_axes', [(0, 1), (1, 1), (2, 2), (5, 6), (99, 6)])
def test_any_number_of_items(k, n_axes):
    r = record()
    assert len(draw_items(r, r.top(k), loaders(torch.as_tensor(images()))).axes) == n_axes

def test_show_top_says_what_it_shows():
    r = record()
    assert show_top(r, loaders(torch.as_tensor(images())), 4, 'el2n') is None
    assert plt.gcf().get_suptitle() == 'train: the first 4 of 6 items by el2n'

def test_show_history_sets_a_picture_beside_it():
    r, x = record(), torch.as_tensor(images())
    show_history(r, 2, loaders(x))
    picture, line = plt.gcf().axes
    np.testing.assert_allclose(picture.images[0].get_array(), x[2].movedim(0, -1))
    assert line.get_title('left').startswith('train item 2, labelled cat')

def test_show_history_of_a_row_of_a_table(people):
    dls = tables(people)
    r = fit_recorded(dls, Table()).record
    show_history(r, int(r.top(1)['item'].iloc[0]), dls)   # fastai draws rows with replacement: some are never seen
    assert 'town' in plt.gcf().axes[0].texts[0].get_text()

def test_no_model_runs(folder):
    dls = datasets(folder)
    recorder = recorded(dls)
    recorder.learn.model.net.forward = lambda *_: pytest.fail('the model was run')
    show_top(recorder.record, dls, 3)
    show_history(recorder.record, 0, dls)
