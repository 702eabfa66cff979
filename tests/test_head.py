"The last layer's share of an example's gradient, against autograd example by example."
import copy

import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from torch import nn
from torch.testing import assert_close

from fastai_xent.head import HeadTap, find_head
from fastai_xent.linear import head_in_loss
from fastai_xent.losses import XentLossFlat
from fastai_xent.numerics import xent_stats
from fastai_xent.recorder import XentRecorder
from helpers import Net, Points, ended, learner, same_bits, warned

N, C = 7, 4
GEN = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 3, 8, 8, generator=GEN), torch.randint(0, C, (N,), generator=GEN)
BODY = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()]

class Named(nn.Module):
    "A model whose order only its `forward` knows."
    def __init__(self, scale=1.): super().__init__(); self.fc, self.body, self.scale = nn.Linear(5, C), nn.Sequential(*copy.deepcopy(BODY)), scale
    def forward(self, x): return self.fc(self.body(x).mean((2, 3))) * self.scale

def models():
    torch.manual_seed(1)
    yield 'mlp', nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(.5), nn.Linear(16, C))
    yield 'no bias', nn.Sequential(nn.Flatten(), nn.Linear(192, C, bias=False))
    yield 'pooled', nn.Sequential(*copy.deepcopy(BODY), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, C))
    yield 'nested', nn.Sequential(nn.Sequential(*copy.deepcopy(BODY)), nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.BatchNorm1d(20), nn.Sequential(nn.Linear(20, C))))
    yield 'named', Named()
MODELS = dict(models())

def by_autograd(pred, y, head, loss=None):
    "The gradient's length in the last layer, an example at a time."
    rows = F.cross_entropy(pred, y, reduction='none') if loss is None else loss
    grads = [torch.autograd.grad(o, list(head.parameters()), retain_graph=True) for o in rows]
    return torch.stack([torch.cat([o.flatten() for o in g]).norm() for g in grads])

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('smoothing', [0., .1])
def test_it_is_the_length_of_the_gradient_in_the_last_layer(name, smoothing):
    model = MODELS[name]
    head = find_head(model)
    tap = HeadTap(head).install()
    pred = model(X)
    grand = xent_stats(pred, Y, label_smoothing=smoothing).grad_norm * tap.factor(pred)
    tap.remove()
    assert_close(grand, by_autograd(pred, Y, head, F.cross_entropy(pred, Y, reduction='none', label_smoothing=smoothing)), rtol=1e-5, atol=1e-7)

def test_after_autocast_too():
    model = MODELS['pooled']
    tap = HeadTap(find_head(model)).install()
    with torch.autocast('cpu', torch.bfloat16): pred = model(X)
    pred = pred.float()                               # as MixedPrecision hands it on
    assert pred.data_ptr() != tap.seen[0][1][0].data_ptr()
    got = xent_stats(pred, Y).grad_norm * tap.factor(pred)
    tap.remove()
    assert_close(got, by_autograd(pred, Y, find_head(model)), rtol=2e-2, atol=0)   # autograd's own is in bfloat16

def test_head_in_loss():
    plain = MODELS['mlp'].eval()
    want = by_autograd(plain(X), Y, find_head(plain))
    model, loss_func = head_in_loss(copy.deepcopy(plain))
    model.train()
    model[3].eval()                                   # no dropout
    tap = HeadTap(find_head(model)).install()
    pred = model(X)
    loss_func(pred, Y)
    assert_close(loss_func.stats.grad_norm * tap.factor(pred), want)
    tap.remove()
    plain.train()

@pytest.mark.parametrize('change', [lambda z: z / 2, lambda z: z + 1, lambda z: z.relu(), lambda z: z.flip(0), lambda z: z.mul_(2), lambda z: z[:, :2], lambda z: z + float('nan')])
def test_logits_that_were_changed_have_no_number(change):
    model = MODELS['mlp']
    tap = HeadTap(find_head(model)).install()
    with torch.no_grad(): pred = change(model(X))
    factor = tap.factor(pred)
    tap.remove()
    out = len(X) * [True] if pred.shape[1] != C else None
    assert factor.shape == (N,) and factor.dtype == torch.float32
    assert factor.isnan().all() if out else factor.isnan().float().mean() > .5

def test_a_layer_called_twice_has_no_number():
    model = MODELS['mlp']
    tap = HeadTap(find_head(model)).install()
    model(X)
    assert tap.factor(model(X)).isnan().all() and not tap.factor(model(X)).isnan().any()
    tap.remove()

def test_a_layer_that_is_called_by_name():
    class ByName(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(192, C)
        def forward(self, x): return self.fc(input=x.flatten(1))
    model = ByName()
    tap = HeadTap(find_head(model)).install()
    pred = model(X)
    assert_close(xent_stats(pred, Y).grad_norm * tap.factor(pred), by_autograd(pred, Y, model.fc), rtol=1e-5, atol=1e-7)
    tap.remove()

def test_a_row_at_a_time_and_none():
    model = MODELS['mlp'].eval()
    tap = HeadTap(find_head(model)).install()
    assert tap.factor(model(X[:1])).shape == (1,) and tap.factor(model(X[:0])).shape == (0,)
    tap.remove()
    model.train()

def test_a_tap_that_is_gone_leaves_nothing():
    model = MODELS['mlp']
    tap = HeadTap(find_head(model)).install()
    tap.remove()
    tap.remove()
    model(X)
    assert not tap.seen and not model[-1]._forward_hooks

@pytest.mark.parametrize('model, error, words', [
    (nn.Sequential(nn.Flatten(), nn.Linear(192, C), nn.Softmax(1)), TypeError, 'Softmax, expected nn.Linear'),
    (nn.Sequential(nn.Conv2d(3, C, 8), nn.Flatten()), TypeError, 'Flatten, expected nn.Linear'),
    (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, C))), TypeError, 'computed from others')])
def test_refusals(model, error, words):
    with pytest.raises(error, match=words): find_head(model)

def test_a_head_that_is_named():
    model = MODELS['named']
    assert find_head(model, model.fc) is model.fc and find_head(model) is model.fc
    with pytest.raises(TypeError, match='head is Sequential'): find_head(model, model.body)
    with pytest.raises(ValueError, match='not a layer of this'): find_head(model, nn.Linear(5, C))

def test_a_scale_in_forward_is_noticed():
    model = Named(scale=.5)
    tap = HeadTap(find_head(model)).install()
    assert tap.factor(model(X)).isnan().all()
    tap.remove()


# -- recorded

class InLastLayer(Callback):
    "The truth of each batch, by autograd example by example, before the recorder sees it."
    order = 39
    def __init__(self, head): self.head, self.rows = head, {}
    def after_loss(self):
        learn, split = self.learn, 'train' if self.learn.training else 'valid'
        item = learn.xb[0][:, -1].round().long()
        with torch.enable_grad():
            h = self.seen.clone()
            z = F.linear(h, self.head.weight, self.head.bias)
            want = by_autograd(z, learn.yb[0], self.head)
        for i, g in zip(item.tolist(), want.tolist()): self.rows.setdefault((split, self.epoch), {})[i] = g
    def before_fit(self): self.handle = self.head.register_forward_hook(lambda m, args, out: setattr(self, 'seen', args[0].detach()))
    def after_fit(self): self.handle.remove()

@pytest.mark.parametrize('workers', [0, 2])
def test_a_recorded_run_has_it_for_every_item(workers):
    learn = learner([recorder := XentRecorder(head='auto')], workers=workers)
    truth = InLastLayer(learn.model.body[-1])
    learn.add_cb(truth)
    with warned() as said: learn.fit(2)
    assert not said
    df = recorder.record.to_df()
    for (split, epoch), rows in truth.rows.items():
        got = df[(df['split'] == split) & (df['epoch'] == epoch)].set_index('item')['grand'].to_dict()
        assert got.keys() == rows.keys() and len(rows) == (36 if split == 'train' else 18)
        assert_close(torch.tensor([got[i] for i in sorted(rows)], dtype=torch.float64), torch.tensor([rows[i] for i in sorted(rows)], dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert not np.isnan(recorder.record.score('grand')).any()

def test_mixed_rows_have_that_of_their_mixed_target():
    learn = learner([recorder := XentRecorder(head='auto'), MixUp(.4)])
    learn.fit(1)
    df = recorder.record.to_df('train')
    assert df['lam'].notna().any() and df['grand'].notna().all() and (df['grand'] >= df['grad_norm']).all()

def test_it_does_not_change_the_training():
    a, b = ended(fitted(learner())), ended(fitted(learner([XentRecorder(head='auto')])))
    same_bits(a.end, b.end)
    assert not any(m._forward_hooks for m in b.model.modules())

def fitted(learn):
    learn.fit(2)
    return learn

class Tempered(Net):
    def forward(self, x): return super().forward(x) / 2

def test_what_cannot_be_told_is_said_and_the_rest_recorded():
    for model, words in ((Tempered(), 'no grand for 36 of 36 rows'), (nn.Sequential(Net(), nn.Softplus()), 'records no grand: the last layer of Sequential is Softplus')):
        learn = learner([recorder := XentRecorder(head='auto')], model=model)
        with warned() as said: learn.fit(1)
        assert any(words in o for o in said), said
        df = recorder.record.to_df()
        assert len(df) == 54 and df['grand'].isna().all() and df['loss'].notna().all()

def test_a_dense_batch_has_none():
    class Dense(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(4, 3)
        def forward(self, x): return self.fc(x[:, :4])[:, :, None].expand(-1, -1, 2).contiguous()
    class Two(Points):
        def __getitem__(self, i): return self.x[i], self.y[i].expand(2)
    learn = learner([recorder := XentRecorder(head='auto')], model=Dense(), train=Two(), valid=Two(18), loss_func=XentLossFlat(axis=1))
    with warned() as said: learn.fit(1)
    assert any('no grand' in o for o in said) and recorder.record.to_df()['grand'].isna().all() and recorder.record.to_df()['loss'].notna().all()
