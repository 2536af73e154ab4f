"""Fisher information against statsmodels, closed forms and brute force; backends against each other; streams, files, faults."""
import copy, itertools, math

import numpy as np
import pytest, torch
import statsmodels.api as sm
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from medxfer_nb.models.precision import BF16_LAST
from medxfer_nb.models.unet3d import is_shared, soft_dice, unet3d
from medxfer_nb.transfer.fisher import (BACKENDS, IGNORED, LABELS, Fisher, FisherError, Likelihood, agree, draw_masks, fisher,
                                        load_fisher, save_fisher)


def rows(x, y, size): return list(zip(x.split(size), y.split(size)))


def close(found, expected, rtol=1e-4, atol=1e-9):
    assert list(found) == list(expected)
    for name, value in expected.items(): torch.testing.assert_close(found[name].double(), value.double(), rtol=rtol, atol=atol, msg=lambda m: f'{name}: {m}')


def brute_force(model, x, y, log_p): # one case at a time, nothing shared with the library
    model, sums = copy.deepcopy(model).eval().requires_grad_(), {}
    for i in range(len(x)):
        model.zero_grad()
        log_p(model(x[i:i + 1])[0], y[i]).backward()
        for name, p in model.named_parameters(): sums[name] = sums.get(name, 0) + (p.grad.double()**2 if p.grad is not None else torch.zeros_like(p))
    return {name: s / len(x) for name, s in sums.items()}


def bernoulli(z, y): return (y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).sum()


# known answers

@pytest.mark.parametrize('backend', BACKENDS)
def test_logistic_regression_is_that_of_statsmodels(backend):
    rng = np.random.default_rng(0)
    x, theta = rng.normal(size=(400, 4)), np.array([0.5, -1., 0.2, 2.])
    y = (rng.random(400) < 1 / (1 + np.exp(-x @ theta))).astype(float)
    neuron = nn.Linear(4, 1, bias=False).double()
    neuron.weight.data = torch.tensor(theta)[None]
    scores = sm.Logit(y, x).score_obs(theta)
    found = fisher(neuron, rows(torch.tensor(x), torch.tensor(y)[:, None], 37), 'sigmoid', backend=backend)
    np.testing.assert_allclose(found.values['weight'][0], (scores**2).mean(0), rtol=1e-5)
    drawn = [fisher(neuron, torch.tensor(x).split(100), 'sigmoid', labels='model', backend='hooks', seed=s).values['weight'][0] for s in range(60)]
    np.testing.assert_allclose(torch.stack(drawn).mean(0), -np.diag(sm.Logit(y, x).hessian(theta)) / 400, rtol=0.04)


@pytest.mark.parametrize('backend', BACKENDS)
def test_softmax_regression_is_that_of_statsmodels(backend):
    rng = np.random.default_rng(1)
    x, y, theta = rng.normal(size=(300, 3)), rng.integers(0, 3, 300), rng.normal(size=(3, 2))
    layer = nn.Linear(3, 3, bias=False).double()
    layer.weight.data = torch.tensor(np.vstack([np.zeros(3), theta.T])) # the first class is statsmodels' reference
    scores = sm.MNLogit(y, x).score_obs(theta).reshape(300, 2, 3)
    found = fisher(layer, rows(torch.tensor(x), torch.tensor(y), 64), 'softmax', backend=backend).values['weight']
    np.testing.assert_allclose(found[1:], (scores**2).mean(0), rtol=1e-5)


def test_softmax_with_labels_of_the_model_in_expectation():
    torch.manual_seed(0)
    x, layer = torch.randn(5, 3), nn.Linear(3, 4)
    p = layer(x).softmax(1).detach()
    drawn = fisher(layer, [x.repeat(8000, 1)], 'softmax', labels='model', backend='hooks').values # 8000 draws per case
    close(drawn, dict(weight=torch.einsum('nc,ni->ci', p * (1 - p), x**2) / 5, bias=(p * (1 - p)).mean(0)), rtol=0.05)


def test_least_squares_by_a_function():
    torch.manual_seed(0)
    x, y, layer = torch.randn(9, 3), torch.randn(9, 2), nn.Linear(3, 2)
    def gaussian(mean, target): return -((mean - target)**2).sum() / 2
    residual = (y - layer(x)).detach()
    for backend in BACKENDS:
        found = fisher(layer, rows(x, y, 4), gaussian, backend=backend)
        close(found.values, dict(weight=torch.einsum('no,ni->oi', residual**2, x**2) / 9, bias=(residual**2).mean(0)))
        assert (found.likelihood, found.n_cases, found.labels, found.backend) == ('gaussian', 9, 'true', backend)


def test_voxels_of_a_case_are_added_before_squaring():
    conv, x, y = nn.Conv2d(1, 2, 1), torch.randn(3, 1, 4, 5), torch.randint(0, 2, (3, 4, 5))
    residual = (F.one_hot(y, 2).movedim(-1, 1) - conv(x).softmax(1)).detach()
    expected = dict(weight=((residual * x).sum((2, 3))**2).mean(0)[..., None, None, None], bias=(residual.sum((2, 3))**2).mean(0))
    for backend in BACKENDS: close(fisher(conv, [(x, y)], 'softmax', backend=backend).values, expected)


def test_soft_dice_is_the_log_of_the_mean():
    torch.manual_seed(0)
    conv, x, y = nn.Conv3d(1, 2, 1), torch.randn(2, 1, 3, 3, 3), torch.rand(2, 2, 3, 3, 3).round()
    y[0, 1] = 0 # an empty label
    expected = brute_force(conv, x, y, lambda z, t: soft_dice(z.sigmoid()[None], t[None]).mean().log())
    for backend in BACKENDS: close(fisher(conv, [(x, y)], 'soft_dice', backend=backend).values, expected)


def test_what_is_left_out_adds_nothing():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(6, 4)
    masks = torch.rand(6, 3).round()
    masks[2] = math.nan
    some = fisher(layer, [(x[[0, 1, 3, 4, 5]], masks[[0, 1, 3, 4, 5]])], 'sigmoid', backend='loop').values
    for backend in BACKENDS: close(fisher(layer, [(x, masks)], 'sigmoid', backend=backend).values, {name: v * 5 / 6 for name, v in some.items()})
    classes = torch.tensor([0, 1, IGNORED, 2, 0, 1])
    some = fisher(layer, [(x[classes >= 0], classes[classes >= 0])], 'softmax', backend='loop').values
    for backend in BACKENDS: close(fisher(layer, [(x, classes)], 'softmax', backend=backend).values, {name: v * 5 / 6 for name, v in some.items()})


# per-case gradients of each kind of layer

LAYERS = {
    'linear': (nn.Linear(5, 3), (5,)), 'linear without bias': (nn.Linear(5, 3, bias=False), (5,)), 'linear on tokens': (nn.Linear(5, 3), (4, 2, 5)),
    'conv1d': (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (4, 11)), 'conv1d reflect': (nn.Conv1d(2, 3, 5, padding=2, padding_mode='reflect'), (2, 9)),
    'conv2d': (nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0), (1, 2)), (3, 9, 10)), 'conv2d same': (nn.Conv2d(2, 4, 4, padding='same', dilation=2), (2, 10, 11)),
    'conv2d valid': (nn.Conv2d(2, 4, 3, padding='valid'), (2, 10, 11)), 'depthwise': (nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), (6, 8, 8)),
    'few positions': (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (4, 6, 5)), 'circular': (nn.Conv2d(2, 4, 3, padding=1, padding_mode='circular'), (2, 7, 9)),
    'conv3d': (nn.Conv3d(2, 4, 3, padding=1), (2, 6, 5, 7)), 'conv3d strided': (nn.Conv3d(2, 4, 3, 2, 1), (2, 9, 8, 7)), 'conv3d 1x1x1': (nn.Conv3d(3, 2, 1), (3, 4, 4, 4)),
    'conv3d dilated': (nn.Conv3d(2, 2, 3, 1, 2, 2), (2, 6, 6, 6)), 'conv3d coarse': (nn.Conv3d(4, 4, 3, 1, (1, 1, 1)), (4, 2, 2, 2)),
    'transposed 1d': (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), (4, 8)), 'transposed 2d': (nn.ConvTranspose2d(4, 2, 2, 2), (4, 6, 5)),
    'transposed 3d': (nn.ConvTranspose3d(2, 3, 3, 2, 1, (1, 0, 1), dilation=1), (2, 4, 3, 4)),
    'batch norm': (nn.BatchNorm2d(4), (4, 5, 5)), 'batch norm of features': (nn.BatchNorm1d(4), (4,)),
    'instance norm': (nn.InstanceNorm3d(4, affine=True), (4, 3, 4, 5)), 'instance norm, tracked': (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 5, 5)),
    'group norm': (nn.GroupNorm(2, 6), (6, 7)), 'layer norm': (nn.LayerNorm(5), (3, 5)), 'layer norm of a case': (nn.LayerNorm((3, 5)), (3, 5)), 'layer norm without shift': (nn.LayerNorm(5, bias=False), (2, 3, 5)),
}


@pytest.mark.parametrize('kind', LAYERS)
def test_hooks_and_vmap_on(kind):
    layer, shape = copy.deepcopy(LAYERS[kind][0]).double(), LAYERS[kind][1]
    torch.manual_seed(0)
    for p in layer.parameters(): nn.init.normal_(p)
    for name, b in layer.named_buffers():
        if b.is_floating_point(): b.copy_(torch.rand_like(b) + 0.5)
    model = nn.Sequential(nn.Identity(), layer, nn.Tanh()).eval()
    x = torch.randn(5, *shape, dtype=torch.double)
    y = torch.rand_like(model(x)).round()
    expected = brute_force(model, x, y, bernoulli)
    for backend in BACKENDS: close(fisher(model, rows(x, y, 3), 'sigmoid', backend=backend).values, expected, rtol=1e-5)


class Block(nn.Module):
    "In-place activations, skips, a layer without use, upsampling, concatenation."
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv3d(1, 3, 3, padding=1), nn.InstanceNorm3d(3, affine=True), nn.Conv3d(3, 3, 3, 2, 1)
        self.unused, self.head, self.act, self.skip = nn.Linear(2, 2), nn.Conv3d(6, 2, 1), nn.LeakyReLU(0.1, inplace=True), nn.Conv3d(1, 3, 1)
    def forward(self, x):
        h = self.act(self.norm(self.a(x)))
        up = F.interpolate(self.act(self.b(h)), h.shape[2:])
        return self.head(torch.cat([h + self.skip(x), up], 1))


@pytest.mark.parametrize('labels', LABELS)
def test_backends_and_batch_sizes_agree(labels):
    torch.manual_seed(0)
    model, x, y = Block().double(), torch.randn(7, 1, 6, 6, 6).double(), torch.rand(7, 2, 6, 6, 6).round()
    expected = fisher(model, [(x, y)], 'sigmoid', labels, backend='loop', seed=3)
    if labels == 'true': close(expected.values, brute_force(model, x, y, bernoulli), rtol=1e-6)
    for backend, size in itertools.product(['auto', *BACKENDS], [1, 3, 7]):
        close(fisher(model, rows(x, y, size), 'sigmoid', labels, backend=backend, seed=3).values, expected.values, rtol=1e-5, atol=1e-12)
    if labels == 'model': assert not fisher(model, [(x, y)], 'sigmoid', labels, seed=4).values['head.weight'].equal(expected.values['head.weight'])
    assert not expected.values['unused.weight'].any()


@pytest.mark.parametrize('likelihood', ['soft_dice', 'sigmoid'])
def test_unet3d(likelihood):
    torch.manual_seed(0)
    net, x = unet3d(2, 3, base=4, depth=3, seed=0), torch.rand(4, 2, 9, 12, 10)
    y = (torch.rand(4, 3, 9, 12, 10) < 0.3).float()
    found = {backend: fisher(net, rows(x, y, 3), likelihood, names=is_shared, backend=backend).values for backend in BACKENDS}
    assert len(found['loop']) == 2 * sum(is_shared(name, m) for name, m in net.named_modules())
    for backend in ('vmap', 'hooks'):
        for name, e in found['loop'].items():
            if name.endswith('weight'): torch.testing.assert_close(found[backend][name], e, rtol=2e-3, atol=1e-5 * float(e.max()))
    rule = dict(sigmoid=bernoulli, soft_dice=lambda z, t: soft_dice(z.sigmoid()[None], t[None]).mean().log())[likelihood]
    assert agree(fisher(net, [(x, y)], likelihood, backend='hooks').values, brute_force(net, x, y, rule), 1e-3)


def test_bf16_in_the_network():
    torch.manual_seed(0)
    net, x, y = unet3d(1, 2, base=4, depth=2, seed=0), torch.rand(4, 1, 8, 8, 8), torch.rand(4, 2, 8, 8, 8).round()
    exact = fisher(net, [(x, y)], 'soft_dice', backend='hooks').values
    net.to(memory_format=torch.channels_last_3d).mode = BF16_LAST
    found = {backend: fisher(net, [(x, y)], 'soft_dice', backend=backend).values for backend in ('loop', 'hooks', 'auto')}
    for values in found.values():
        assert all(v.dtype == torch.float32 for v in values.values())
        assert agree(values, found['loop'], 0.02) and agree(values, exact, 0.5) # bf16 itself is that far off in so small a network
    with pytest.raises(FisherError, match="'vmap' cannot take this network"): fisher(net, [(x, y)], 'soft_dice', backend='vmap')


# the network stays as it was

class Counting(nn.Module):
    "A layer that counts its calls, in place and by assignment."
    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))
        self.register_buffer('other', torch.zeros(()))
    def forward(self, x):
        self.calls.add_(1)
        self.other = self.other + 1
        return x


@pytest.mark.parametrize('backend', ['auto', *BACKENDS])
def test_network_is_untouched(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU(True), nn.Flatten(), nn.Linear(48, 2))
    if backend != 'vmap': model.insert(0, Counting())
    conv, bn, out = [m for m in model if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    model.train()
    bn.eval()
    conv.weight.requires_grad_(False)
    out.weight.grad = torch.ones_like(out.weight)
    before, buffers, rng = copy.deepcopy(model.state_dict()), dict(model.named_buffers()), torch.get_rng_state()
    found = fisher(model, [(torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0]))], 'softmax', backend=backend)
    assert found.values[next(name for name, p in model.named_parameters() if p is conv.weight)].any() # frozen, and of interest all the same
    for name, value in model.state_dict().items(): assert value.equal(before[name]), name
    assert all(b is buffers[name] for name, b in model.named_buffers()) and torch.get_rng_state().equal(rng)
    assert model.training and out.training and not bn.training and out.weight.grad.eq(1).all() and conv.weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5 and not any(m._forward_hooks for m in model.modules())


def test_network_is_untouched_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).train()
    model[0].bias.requires_grad_(False)
    def broken(z, target): raise RuntimeError('broken')
    for backend in BACKENDS:
        with pytest.raises((RuntimeError, FisherError), match='broken'): fisher(model, [(torch.rand(2, 2), torch.rand(2, 2))], broken, backend=backend)
    assert model.training and model[0].weight.requires_grad and not model[0].bias.requires_grad and not model[0]._forward_hooks


# where hooks do not apply

class Functional(nn.Module):
    "Uses the weights of a layer without calling it."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
    def forward(self, x): return F.linear(self.a(x).tanh(), self.b.weight)


class Folded(nn.Module):
    "Folds part of a case into the batch."
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
    def forward(self, x): return self.a(x.reshape(-1, 3)).reshape(x.shape)


class Overwritten(nn.Module):
    "Changes the input of a layer afterwards."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
    def forward(self, x):
        h = self.a(x)
        y = self.b(h.detach().clone() if self.training else h)
        return y + h.mul_(2)


class Standardised(nn.Linear):
    def forward(self, x): return F.linear(x, self.weight - self.weight.mean(), self.bias)


def shared():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def twice():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


@pytest.mark.parametrize('make, shape, why', [(twice, (3,), 'more than once'), (shared, (3,), 'shared by several'), (Functional, (3,), 'outside the layer'), (Folded, (2, 3), 'along the first axis'),
                                              (lambda: Standardised(3, 3), (3,), 'has no rule'), (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), (3,), 'has no rule')])
def test_hooks_refuse_and_auto_goes_on(make, shape, why):
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(4, *shape), torch.rand(4, *shape).round()
    with pytest.raises(FisherError, match=why): fisher(model, [(x, y)], 'sigmoid', backend='hooks')
    expected = brute_force(model, x, y, bernoulli)
    for backend in ('loop', 'vmap', 'auto'):
        found = fisher(model, [(x, y)], 'sigmoid', backend=backend)
        close(found.values, expected)
        assert found.backend != 'hooks' and all(type(p) is nn.Parameter for p in model.parameters())


def test_hooks_refuse_an_input_that_is_changed_later():
    with pytest.raises(FisherError, match='changed in place'): fisher(Overwritten(), [(torch.randn(2, 3), torch.rand(2, 3))], 'sigmoid', backend='hooks')


def test_hooks_refuse_statistics_of_the_batch():
    model, batch = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(3, track_running_stats=False)), (torch.randn(4, 3, 5), torch.rand(4, 3, 5))
    with pytest.raises(FisherError, match='over the cases'): fisher(model, [batch], 'sigmoid', names=['0'], backend='hooks')


def test_two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Bilinear(2, 3, 2)
        def forward(self, x, z): return self.a(x, z)
    x, z, y = torch.randn(4, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    model = Two()
    found = [fisher(model, [(x, z, y)], 'softmax', backend=backend).values for backend in ('loop', 'vmap', 'auto')]
    for f in found[1:]: close(f, found[0])


# streams

def test_a_stream_is_read_no_further_than_needed():
    asked = []
    def endless():
        for i in itertools.count():
            asked.append(i)
            yield torch.full((4, 2), float(i)), torch.zeros(4, dtype=torch.long)
    layer = nn.Linear(2, 3)
    found = fisher(layer, endless(), 'softmax', n_cases=10, backend='hooks')
    assert found.n_cases == 10 and asked == [0, 1, 2]
    x = torch.arange(3.).repeat_interleave(4)[:10, None].expand(10, 2)
    close(found.values, fisher(layer, [(x, torch.zeros(10, dtype=torch.long))], 'softmax', backend='loop').values)
    assert fisher(layer, [(x, torch.zeros(10, dtype=torch.uint8))], 'softmax', n_cases=99).n_cases == 10


def test_range_of_float32():
    "Squares near both ends of float32, and many cases."
    layer = nn.Linear(1, 1, bias=False)
    for scale in (1e-17, 1e17):
        def scaled(z, y): return (z * scale).sum()
        for backend in BACKENDS:
            found = fisher(layer, [(torch.ones(1000, 1), torch.zeros(1000, 1))], scaled, backend=backend).values['weight']
            assert float(found) == pytest.approx(scale**2, rel=1e-5)
    with pytest.raises(FisherError, match='too large for float32'):
        fisher(layer, [(torch.full((2, 1), 1e30), torch.zeros(2, 1))], lambda z, y: z.sum(), backend='hooks')


# files

def test_file(tmp_path):
    layer = nn.Linear(3, 2)
    f = fisher(layer, [torch.randn(6, 3)], 'softmax', labels='model')
    path = tmp_path/'m1.fisher.safetensors'
    for _ in range(2): save_fisher(f, path)
    again = load_fisher(path)
    assert isinstance(again, Fisher) and repr(again) == repr(f) and [p.name for p in tmp_path.iterdir()] == [path.name]
    close(again.values, f.values, rtol=0, atol=0)
    plain = load_file(path)
    assert all(plain[name].equal(v) for name, v in f.values.items())
    data = path.read_bytes()
    for broken in (data[:-3], data[:20], b''):
        path.write_bytes(broken)
        with pytest.raises(FisherError, match='damaged'): load_fisher(path)
    save_file(layer.state_dict(), path)
    with pytest.raises(FisherError, match='no Fisher information'): load_fisher(path)
    save_fisher(Fisher({'weight': -torch.ones(2)}, 1, 'softmax', 'true'), path)
    with pytest.raises(FisherError, match='weight is negative'): load_fisher(path)
    with pytest.raises(FileNotFoundError): load_fisher(tmp_path/'none.safetensors')


# faults

X, MASKS, CLASSES = torch.rand(4, 3), torch.rand(4, 2).round(), torch.tensor([0, 1, 1, 0])

@pytest.mark.parametrize('batches, options, message', [
    ([(X, MASKS)], dict(likelihood='dice'), 'likelihood is one of softmax, sigmoid, soft_dice'),
    ([(X, MASKS)], dict(labels='drawn'), 'labels is one of'), ([(X, MASKS)], dict(backend='jvp'), "backend is 'auto' or one of"),
    ([(X, MASKS)], dict(n_cases=0), 'n_cases'), ([(X, MASKS)], dict(names=['3.weight']), "no parameter '3.weight'"), ([], {}, 'no cases'),
    ([X], {}, 'hold no targets'), ([(X, MASKS[:3])], {}, 'begin with the number of cases'), ([{'x': X}], {}, 'not dict'),
    ([(X, MASKS)], dict(likelihood='softmax'), 'integer classes'), ([(X, CLASSES + 1)], dict(likelihood='softmax'), 'class 2 for 2 logits'),
    ([(X, CLASSES[:, None])], dict(likelihood='softmax'), 'one class per voxel'), ([(X, MASKS[:, :1])], {}, 'one number per logit'),
    ([(X, 2 * MASKS)], {}, 'a target of 2.0'), ([(X, MASKS * math.nan)], dict(likelihood='soft_dice'), 'a target of nan'),
    ([(X * math.inf, MASKS)], dict(backend='loop'), 'NaN, infinite'), ([X], dict(likelihood=bernoulli, labels='model'), 'cannot draw labels')])
def test_faults(batches, options, message):
    with pytest.raises(FisherError, match=message): fisher(nn.Sequential(nn.Linear(3, 2)), batches, **dict(likelihood='sigmoid') | options)


def test_networks_without_one_tensor_of_logits():
    class Pair(nn.Linear):
        def forward(self, x): return super().forward(x), x
    with pytest.raises(FisherError, match='gives tuple'): fisher(Pair(3, 2), [(X, MASKS)], 'sigmoid')
    with pytest.raises(FisherError, match='for 1 cases the network gives'): fisher(nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)), [(X, MASKS)], 'sigmoid')
    class Detached(nn.Linear):
        def forward(self, x): return super().forward(x).detach()
    with pytest.raises(FisherError, match='does not depend'): fisher(Detached(3, 2), [(X, MASKS)], 'sigmoid')


def test_own_likelihood_that_draws():
    rule = Likelihood('halved', lambda z, y: bernoulli(z, y) / 2, draw_masks)
    layer = nn.Linear(3, 2)
    close({name: 4 * v for name, v in fisher(layer, [X], rule, labels='model').values.items()}, fisher(layer, [X], 'sigmoid', labels='model').values)


# half precision, layers whose cases are elsewhere, and a lack of memory

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16))
def test_squares_of_half_precision_are_added_in_float32(dtype):
    torch.manual_seed(0)
    layer, x, y = nn.Linear(4, 3), 1e-3 * torch.randn(500, 4), torch.randint(3, (500,))
    expected = fisher(layer, [(x, y)], 'softmax', backend='loop').values
    for backend in BACKENDS:
        found = fisher(copy.deepcopy(layer).to(dtype), [(x.to(dtype), y)], 'softmax', backend=backend).values
        for name, e in expected.items(): assert (found[name] - e).norm() < 0.02 * e.norm(), (backend, name)


class CasesSecond(nn.Module):
    "A layer that sees the cases along its second axis."
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
    def forward(self, x): return self.a(x.transpose(0, 1)).transpose(0, 1)


def test_hooks_are_compared_with_the_loop():
    torch.manual_seed(0)
    model, x, y = CasesSecond(), torch.randn(2, 2, 3), torch.rand(2, 2, 3).round() # as many positions as cases: nothing to see in the shapes
    with pytest.raises(FisherError, match='disagrees with the loop on the first cases, in a:'): fisher(model, [(x, y)], 'sigmoid', backend='hooks')
    assert fisher(model, [(x, y)], 'sigmoid').backend != 'hooks'


def test_auto_goes_on_after_any_error(monkeypatch):
    layer, x, y = nn.Linear(4, 3), torch.randn(16, 4), torch.randint(3, (16,))
    def failing(error, at):
        def squares(model, params, inputs, targets, log_p):
            if len(targets) > at: raise error
            return BACKENDS['loop'](model, params, inputs, targets, log_p)
        return squares
    monkeypatch.setitem(BACKENDS, 'hooks', failing(torch.OutOfMemoryError('CUDA out of memory'), 2)) # in the timed run
    monkeypatch.setitem(BACKENDS, 'vmap', failing(KeyError('a network of its own kind'), 0))
    assert fisher(layer, [(x, y)], 'softmax').backend == 'loop'
    with pytest.raises(FisherError, match="smaller batches, or backend='loop'"): fisher(layer, [(x, y)], 'softmax', backend='hooks')


def test_only_classes_need_the_number_of_logits():
    calls = []
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    layer.register_forward_hook(lambda *_: calls.append(1))
    def count(likelihood, y):
        calls.clear()
        fisher(layer, [(x, y)], likelihood, backend='loop')
        return len(calls)
    assert [count('sigmoid', torch.rand(5, 3).round()), count('softmax', torch.tensor([0, 1, 2, 0, 1]))] == [5, 6]
