"""T-IMM: ratios, merged networks and their gradients, hand-over, convergence, and runs that are interrupted."""
import copy, pickle, random, warnings

import numpy as np
import pytest, torch
from fastai.callback import progress # no_bar
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from medxfer_nb.models.precision import BF16_LAST, FP32_LAST
from medxfer_nb.models.unet3d import is_shared, soft_dice_loss, transferable, unet3d
from medxfer_nb.transfer import timm as tm
from medxfer_nb.transfer.merge import GRANULARITIES, MergeError, conv_layers, load_merged, mean_imm, mode_imm, units

EVERY = 4 # steps between validations


def convnet(seed=0, labels=3, dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2), nn.GroupNorm(1, 5), nn.ReLU(), nn.ConvTranspose2d(5, 4, 2),
                        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, labels))
    return net.to(dtype)


def kin(net, n=2, size=0.1):
    "Sources of one ancestry, the first of them `net` itself, and Fisher information with zeros here and there."
    rng = torch.Generator().manual_seed(7)
    def rand(v): return torch.rand(v.shape, generator=rng).to(v.dtype)
    params, start = dict(net.named_parameters()), state(net)
    sources = [start | {k: v.detach() + t * size * (rand(v) - 0.5) for k, v in params.items()} for t in range(n)]
    return sources, [{k: rand(v)**4 * (rand(v) > 0.2) for k, v in params.items()} for _ in range(n)]


class Stream:
    "An endless stream of batches cut into epochs."
    def __init__(self, x, y, bs=8, steps=EVERY): self.x, self.y, self.bs, self.steps, self.rng = x, y, bs, steps, random.Random(0)
    def __len__(self): return self.steps
    def __iter__(self):
        for _ in range(self.steps):
            rows = self.rng.sample(range(len(self.x)), self.bs)
            yield self.x[rows], self.y[rows]


class Batches(list): pass


def learner(net, x=None, y=None, loss=F.cross_entropy, wd=0.) -> Learner:
    if x is None:
        rng = torch.Generator().manual_seed(1)
        y = torch.randint(3, (48,), generator=rng)
        x = torch.randn(48, 1, 9, 9, generator=rng) + y[:, None, None, None]
    return Learner(DataLoaders(Stream(x[:32], y[:32]), Batches([(x[32:], y[32:])])), net, loss_func=loss, opt_func=Adam, wd=wd)


def accuracy(logits, targets): return float((logits.argmax(1) == targets).mean())


def state(net): return {k: v.clone() for k, v in net.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def naive(merge: tm.AdaptiveMerge, x):
    "Eq. 2 and the ratios as printed, all left to autograd."
    alphas = dict(zip(merge.widths, (merge.delta.sigmoid() / merge.delta.sigmoid().sum(0)).split(list(merge.widths.values()), 1)))
    params = {}
    for name, t in zip(merge.names, merge.tensors):
        alpha = alphas[merge.unit_of[name]].reshape(len(t.theta), -1, *[1] * (t.theta.ndim - 2))
        weight = alpha * t.share
        params[name] = (weight * t.theta).sum(0) / weight.sum(0)
    return functional_call(merge.net, params, x)


# Ratios

def test_ratios_are_those_of_the_paper():
    torch.manual_seed(0)
    delta = 5 * torch.randn(4, 100)
    precise = delta.double().sigmoid()
    alpha = tm.mixing_ratios(delta)
    torch.testing.assert_close(alpha.double(), precise / precise.sum(0), atol=1e-6, rtol=1e-5)
    assert (alpha >= 0).all() and (alpha.sum(0) - 1).abs().max() < 1e-6


@pytest.mark.parametrize('value', [-1e4, -200., 0., 200., 1e4])
def test_ratios_at_the_ends_of_the_range(value):
    delta = torch.full((3, 1), value, requires_grad=True)
    torch.testing.assert_close(tm.mixing_ratios(delta), torch.full((3, 1), 1/3))
    far = torch.tensor([[value], [0.], [-value]], requires_grad=True)
    alpha = tm.mixing_ratios(far)
    gradient, = torch.autograd.grad(alpha[0].sum(), far)
    assert alpha.isfinite().all() and gradient.isfinite().all() and abs(alpha.sum() - 1) < 1e-6


# The merged network

@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('scale', ['printed', 'tensor'])
@pytest.mark.parametrize('n', [1, 2, 5])
def test_adaption_starts_at_imm(n, scale, granularity):
    sources, fishers = kin(convnet(), n)
    merge = tm.AdaptiveMerge(convnet(3), sources, fishers, conv_layers, granularity, scale)
    expected = mode_imm(sources, fishers, scale=scale, names=merge.names)
    for name, tensor in merge.merged().items(): torch.testing.assert_close(tensor, expected[name])
    uniform = tm.AdaptiveMerge(convnet(3), sources, shared=conv_layers, granularity=granularity)
    for name, tensor in uniform.merged().items(): torch.testing.assert_close(tensor, mean_imm(sources, names=merge.names)[name])
    assert set(merge.ratios()) == set(units({k: dict(convnet().named_parameters())[k] for k in merge.names}, granularity).values())


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_gradient_of_delta(granularity):
    sources, fishers = kin(convnet(dtype=torch.float64), 3)
    fishers = [{k: v + 0.01 for k, v in f.items()} for f in fishers] # as printed, 0/0 is NaN
    merge = tm.AdaptiveMerge(convnet(3, dtype=torch.float64), sources, fishers, conv_layers, granularity).eval()
    torch.manual_seed(2)
    nn.init.normal_(merge.delta)
    x = torch.randn(4, 1, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(merge(x), naive(merge, x))
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), merge.delta)[0] for f in (merge, lambda x: naive(merge, x)))
    torch.testing.assert_close(ours, theirs)
    names = dict(merge.named_parameters())
    def loss(delta): return functional_call(merge, {**names, 'delta': delta}, x).square().sum()
    assert torch.autograd.gradcheck(loss, merge.delta.detach().requires_grad_(), fast_mode=True)


def test_zero_fisher_keeps_the_gradient_of_the_mean():
    sources, _ = kin(convnet(), 2)
    nothing = [{k: torch.zeros_like(v) for k, v in s.items()} for s in sources]
    x, grads = torch.randn(4, 1, 9, 9), []
    for fishers in (nothing, None):
        merge = tm.AdaptiveMerge(convnet(3), sources, fishers, conv_layers).eval()
        grads.append(torch.autograd.grad(merge(x).sum(), merge.delta)[0])
    torch.testing.assert_close(*grads)
    assert grads[0].abs().min() > 0


def test_what_a_state_dict_holds():
    sources, fishers = kin(convnet())
    merge = tm.AdaptiveMerge(convnet(3), sources, fishers, conv_layers)
    expected = {'delta', *(f'net.{k}' for k in convnet().state_dict() if k not in merge.names)}
    assert set(merge.state_dict()) == expected and {'net.1.running_mean', 'net.1.num_batches_tracked'} < expected
    nn.init.normal_(merge.delta), nn.init.normal_(merge.net[9].weight)
    nested = nn.ModuleDict(dict(a=tm.AdaptiveMerge(convnet(4), sources, fishers, conv_layers)))
    nested.load_state_dict({f'a.{k}': v for k, v in merge.state_dict().items()})
    x = torch.randn(4, 1, 9, 9)
    for other in (nested['a'], copy.deepcopy(merge), pickle.loads(pickle.dumps(merge))):
        assert torch.equal(other.eval()(x), merge.eval()(x))
        assert set(other.state_dict()) == expected
    with pytest.raises(RuntimeError, match='net.9.bias'): merge.load_state_dict({k: v for k, v in merge.state_dict().items() if k != 'net.9.bias'})


def test_what_does_not_fit_is_refused():
    sources, fishers = kin(convnet())
    def merge(sources=sources, fishers=fishers, net=None, shared=conv_layers, **options): return tm.AdaptiveMerge(net or convnet(3), sources, fishers, shared, **options)
    wide = {**sources[0], '0.weight': torch.zeros(6, 2, 3, 3)}
    for message, call in {'0.weight': lambda: merge([wide, wide]), 'give one source': lambda: merge([], []), 'need as many': lambda: merge(fishers=fishers[:1]),
                          'NaN or infinite': lambda: merge([sources[0], {**sources[1], '0.bias': sources[1]['0.bias'] / 0}]), 'negative': lambda: merge(fishers=[fishers[0], {k: -v for k, v in fishers[1].items()}]),
                          '9.weight': lambda: merge(net=convnet(labels=4), shared=lambda name, m: True), 'covers no layer': lambda: merge(shared=lambda name, m: False), 'granularity': lambda: merge(granularity='filter'),
                          'scale': lambda: merge(scale='mean'), 'ancestry': lambda: merge(ancestry='yes'), "'9.weight'": lambda: merge(names=['0.weight', '9.weight'])}.items():
        with pytest.raises(MergeError, match=message): call()
    big = lambda seed: (torch.manual_seed(seed), nn.Linear(40, 40))[1]
    with pytest.raises(MergeError, match='ancestry'): tm.AdaptiveMerge(big(0), [big(1), big(2)])
    tm.AdaptiveMerge(big(0), [big(1), big(2)], ancestry='trust')


# Hand-over

@pytest.mark.parametrize('mode', [None, FP32_LAST, BF16_LAST])
def test_outputs_are_equal_before_and_after_the_hand_over(mode):
    net = unet3d(2, 3, base=4, depth=3, seed=3)
    if mode: net.mode, _ = mode, net.to(memory_format=torch.channels_last_3d)
    sources, fishers = kin(unet3d(2, 3, base=4, depth=3, seed=0))
    merge = tm.AdaptiveMerge(net, sources, fishers, is_shared, ancestry='trust').eval()
    specific = {k: v.clone() for k, v in net.state_dict().items() if k not in merge.names}
    nn.init.normal_(merge.delta)
    x = torch.randn(2, 2, 9, 8, 10)
    with torch.no_grad(): before = merge(x)
    assert merge.hand_over() is net
    assert torch.equal(net(x), before)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in specific.items())
    params = dict(net.named_parameters())
    assert all(p.is_leaf and p.requires_grad and p._base is None for p in params.values())
    assert len({p.untyped_storage().data_ptr() for p in params.values()}) == len(params) # none shares memory with another
    held = {t.untyped_storage().data_ptr() for m in merge.tensors for t in (m.theta, m.share)}
    assert not held & {p.untyped_storage().data_ptr() for p in params.values()}


@pytest.mark.parametrize('mode', [None, BF16_LAST])
def test_adaption_of_a_unet_with_other_channels(mode):
    "The first convolution has no source: it is S, and trains."
    sources, _ = kin(unet3d(2, 7, base=4, depth=3, seed=0))
    net = unet3d(4, 3, base=4, depth=3, seed=3)
    if mode: net.mode, _ = mode, net.to(memory_format=torch.channels_last_3d)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        given = [transferable(net, s)[0] for s in sources]
    merge = tm.AdaptiveMerge(net, given, shared=is_shared, names=list(given[0]))
    first = 'encoder.0.conv_in.conv.weight'
    assert first not in merge.names and len(merge.widths) == len({n.rpartition('.')[0] for n in merge.names})
    x, y = torch.randn(16, 4, 8, 8, 8), (torch.rand(16, 3, 8, 8, 8) > 0.7).float()
    before = state(net)
    learn = learner(net, torch.cat([x] * 3), torch.cat([y] * 3), soft_dice_loss)
    with tm.adapting(learn, merge): result = tm.fit_until(learn, EVERY, EVERY, [0.1, 0.01])
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    biases = {k for k in before if k.endswith('conv.bias')} # norms take them out again: their gradient is rounding
    assert moved | biases >= {k for k in before if k not in merge.names} and not moved & set(merge.names)
    assert np.isfinite(result.history[0]['train_loss']) and merge.delta.dtype == torch.float32 and merge.delta.abs().max() > 0


# Convergence

@pytest.mark.parametrize('halve_after, min_gain, relative', [(1, 0., False), (3, 0.02, False), (4, 0.1, True)])
def test_halving_is_that_of_pytorch(halve_after, min_gain, relative):
    rng = np.random.default_rng(0)
    scores = (np.cumsum(rng.normal(0.01, 0.05, 80)) + 1).tolist()
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, 'max', 0.5, halve_after - 1, min_gain, 'rel' if relative else 'abs', eps=0.)
    for i, score in enumerate(scores):
        plateau.step(score)
        waits = tm.stalls(scores[:i + 1], min_gain, relative)
        assert optimiser.param_groups[0]['lr'] == 0.5**sum(n > 0 and n % halve_after == 0 for n in waits)


def scripted(scores):
    values = iter(scores)
    return lambda logits, targets: next(values)


def test_stops_halves_and_keeps_the_best():
    scores = [0.1, 0.3, 0.3, 0.2, 0.25, 0.305, 0.2, 0.9, 0.9]
    learn = learner(convnet())
    rates, weights = [], []
    class Spy(Callback):
        def before_train(self): rates.append([h['lr'] for h in self.opt.hypers])
        def after_epoch(self): weights.append(state(self.model))
    result = tm.fit_until(learn, 20 * EVERY, EVERY, 0.01, patience=5, min_gain=0.01, halve_after=2, metric=scripted(scores), callbacks=[Spy()])
    assert result.stopped == 'converged' and len(result.history) == 7 # five without a gain of 0.01 after the second
    assert result.best['valid_metric'] == 0.305 and result.best['iteration'] == 6 * EVERY # a better one all the same
    assert same(state(learn.model), weights[5])
    assert rates == [[0.01]] * 4 + [[0.005]] * 2 + [[0.0025]]
    last = tm.fit_until(learn, 2 * EVERY, EVERY, 0.01, metric=scripted(scores), watch='train', callbacks=[Spy()])
    assert last.best is last.history[-1] and last.stopped == 'max_steps' and same(state(learn.model), weights[-1])


def test_what_cannot_be_trained_until():
    learn = learner(convnet())
    for message, options in {'positive number of validations': dict(patience=0), 'watch is one of': dict(watch='loss'), 'undefined at every': dict(metric=lambda s, t: float('nan'))}.items():
        with pytest.raises(ValueError, match=message): tm.fit_until(learn, EVERY, EVERY, 0.01, **options)
    with pytest.raises(ValueError, match='positive multiple'): tm.fit_until(learn, EVERY + 1, EVERY, 0.01)


class Stop(Callback):
    "Break off in the middle of an epoch, of adaption or not."
    def __init__(self, epoch, adaption=None): self.at, self.adaption = epoch, adaption
    def before_batch(self):
        here = self.adaption is None or self.adaption == isinstance(self.model, tm.AdaptiveMerge)
        if self.training and here and (self.epoch, self.iter) == (self.at, 2): raise KeyboardInterrupt


def test_resumed_equals_uninterrupted(tmp_path):
    def run(path=None, *stops):
        learn = learner(convnet())
        options = dict(patience=6, halve_after=2, metric=accuracy, checkpoint=path)
        return tm.fit_until(learn, 40 * EVERY, EVERY, 0.02, callbacks=list(stops), **options), state(learn.model)
    whole, weights = run()
    assert whole.stopped == 'converged' and whole.history[-1]['lr'] < 0.02
    for epoch in (1, len(whole.history) - 1):
        with pytest.raises(KeyboardInterrupt): run(tmp_path/'file', Stop(epoch))
    for stops in ([], [Stop(len(whole.history))]): # once to the end; nothing left to do
        resumed, again = run(tmp_path/'file', *stops)
        assert resumed == whole and same(weights, again)


# The recipe

def timm(path=None, *stops, net=None, sources=None, fishers=None, wd=0., **options):
    if sources is None: sources, fishers = kin(convnet())
    learn = learner(net or convnet(3), wd=wd)
    options = dict(adapt_steps=5 * EVERY, steps=5 * EVERY, validate_every=EVERY, lr=0.01, ratio_lr=0.1, shared=conv_layers, metric=accuracy, checkpoint=path) | options
    return learn.fit_timm(sources, fishers, callbacks=list(stops), **options), learn.model


@pytest.mark.parametrize('stops', [[Stop(2, True)], [Stop(2, False)], [Stop(0, True), Stop(1, True), Stop(0, False), Stop(4, False)]])
def test_interrupted_in_either_phase(stops, tmp_path):
    whole, net = timm()
    for stop in stops:
        with pytest.raises(KeyboardInterrupt): timm(tmp_path/'file', stop)
    resumed, again = timm(tmp_path/'file')
    assert (resumed.adaption, resumed.fine_tuning) == (whole.adaption, whole.fine_tuning)
    assert same(state(net), state(again)) and same(whole.adapted, resumed.adapted) and same(whole.ratios, resumed.ratios)


def test_a_checkpoint_of_other_sources(tmp_path):
    sources, fishers = kin(convnet())
    timm(tmp_path/'file')
    with pytest.raises(ValueError, match='another stage'): timm(tmp_path/'file', sources=sources[::-1], fishers=fishers)


def test_adaption_leaves_sources_and_fishers_alone():
    sources, fishers = kin(convnet())
    before = copy.deepcopy((sources, fishers))
    result, net = timm(sources=sources, fishers=fishers)
    assert all(same(a, b) for given, kept in zip((sources, fishers), before) for a, b in zip(given, kept))
    assert all(a.shape == (2,) and (a >= 0).all() and abs(a.sum() - 1) < 1e-6 for a in result.ratios.values())
    expected = mode_imm(sources, fishers, dict(result.ratios), names=list(result.adapted))
    for name, tensor in result.adapted.items(): torch.testing.assert_close(tensor, expected[name])
    assert all(p.requires_grad for p in net.parameters())
    assert any(not torch.equal(v, net.state_dict()[k]) for k, v in result.adapted.items()) # fine-tuning moved P


def test_adaption_trains_ratios_and_the_rest_only():
    sources, fishers = kin(convnet())
    net = convnet(3)
    before = state(net)
    merge, learn = tm.AdaptiveMerge(net, sources, fishers, conv_layers), learner(net)
    inputs = [t.clone() for m in merge.tensors for t in (m.theta, m.share)]
    with tm.adapting(learn, merge): tm.fit_until(learn, EVERY, EVERY, [0.1, 0.01], callbacks=[tm.KeepRatios()])
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == set(before) - set(merge.names) # BatchNorm's statistics too
    assert merge.delta.abs().min() > 0 and all(torch.equal(a, b) for a, b in zip(inputs, (t for m in merge.tensors for t in (m.theta, m.share))))
    assert learn.model is net and learn.opt is None


def test_one_source():
    sources, fishers = kin(convnet(), 1)
    result, _ = timm(sources=sources, fishers=fishers)
    assert all(torch.equal(a, torch.ones(1)) for a in result.ratios.values())
    assert all(torch.equal(v, sources[0][k]) for k, v in result.adapted.items())


def test_weight_decay_does_not_pull_at_the_ratios():
    source = state(convnet())
    for layers in (True, False): # identical sources: no gradient, so that nothing but decay could move delta
        merge = tm.AdaptiveMerge(convnet(3), [source, source], shared=conv_layers)
        nn.init.constant_(merge.delta, 1.)
        learn = learner(merge.net, wd=0.5)
        with tm.adapting(learn, merge): tm.fit_until(learn, EVERY, EVERY, [0.1, 0.1], callbacks=[tm.KeepRatios()] if layers else [])
        assert torch.equal(merge.delta, torch.ones_like(merge.delta)) == layers


def test_the_useful_source_wins():
    "The target is what source A computes; B is A and much noise. Everything is merged: S is empty."
    torch.manual_seed(0)
    useful = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    noise = copy.deepcopy(useful)
    with torch.no_grad():
        for p in noise.parameters(): p.add_(p.std() * torch.randn_like(p))
        x = torch.randn(48, 6)
        y = useful(x)
    for order in (1, -1):
        learn = learner(copy.deepcopy(noise), x, y, F.mse_loss)
        result = tm.fit_timm(learn, [useful, noise][::order], adapt_steps=25 * EVERY, steps=EVERY, validate_every=EVERY, lr=1e-5, ratio_lr=0.2, adapt_patience=None)
        assert all(a[0 if order == 1 else 1] > 0.8 for a in result.ratios.values()), result.ratios
        assert result.adaption.best['train_loss'] < 0.1 * result.adaption.history[0]['train_loss']


def test_phases_and_their_steps():
    result, _ = timm(adapt_steps=3 * EVERY, steps=8 * EVERY, matched=True, adapt_patience=None)
    assert [r.history[-1]['iteration'] for r in (result.adaption, result.fine_tuning)] == [3 * EVERY, 5 * EVERY]
    result, _ = timm(adapt_steps=20 * EVERY, adapt_gain=10., steps=2 * EVERY) # no loss falls by ten times itself
    assert result.adaption.stopped == 'converged' and len(result.adaption.history) == 4 # the first counts as a gain
    assert result.fine_tuning.history[-1]['iteration'] == 2 * EVERY and set(result.seconds) == {'adaption', 'fine_tuning'}
    with pytest.raises(ValueError, match='none for fine-tuning'): timm(steps=5 * EVERY, matched=True)
    with pytest.raises(TypeError): timm(granulrity='layer')


def test_fine_tuning_begins_where_adaption_ended():
    result, net = timm(lr=0.)
    assert same(result.adapted, {k: v for k, v in state(net).items() if k in result.adapted})


# What belongs to a checkpoint, and what is refused before hours of adaption

def test_fine_tuning_belongs_to_its_adaption(tmp_path):
    timm(tmp_path/'file')
    (tmp_path/'file.adaption').unlink()
    with pytest.raises(ValueError, match=r'file\.fine_tuning belongs to another stage'): timm(tmp_path/'file', ratio_lr=0.5)


def test_identity_is_that_of_the_inputs():
    sources, fishers = kin(convnet())
    def name(sources=sources, fishers=fishers, net=None, **options):
        return tm._identity(tm.AdaptiveMerge(net or convnet(3), sources, fishers, conv_layers, **options), sources, fishers)
    last = [{k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in s.items()} for s in sources]
    backwards = [dict(reversed(s.items())) for s in sources]
    assert name() == name(last) == name(backwards) == name(net=convnet(4).to(memory_format=torch.channels_last))
    others = [name(sources[::-1]), name(fishers=fishers[::-1]), name(fishers=None), name(scale='tensor'), name(granularity='tensor'), name(granularity='channel')]
    assert len({name(), *others}) == 7
    threads = torch.get_num_threads()
    wide = nn.Linear(600, 600)
    S, Fs = kin(wide)
    try:
        found = set()
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.add(tm._identity(tm.AdaptiveMerge(wide, S, Fs, scale='tensor'), S, Fs))
    finally: torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize('options, message', [(dict(steps=5 * EVERY + 1), 'positive multiple'), (dict(adapt_steps=EVERY + 1), 'positive multiple'), (dict(patience=0), 'patience is'),
                                              (dict(adapt_patience=0), 'patience is'), (dict(halve_after=0), 'halve_after is'), (dict(matched=True), 'leave none')])
def test_both_phases_are_checked_before_the_first_begins(options, message):
    class Never(Callback):
        def before_batch(self): raise AssertionError('trained')
    net = convnet(3)
    with pytest.raises(ValueError, match=message): timm(None, Never(), net=net, **options)
    assert all(p.requires_grad for p in net.parameters())


def test_an_adaption_that_breaks_off_restores_the_flags():
    net = convnet(3)
    net[0].weight.requires_grad_(False)
    net[9].bias.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    with pytest.raises(KeyboardInterrupt): timm(None, Stop(1, True), net=net)
    assert [p.requires_grad for p in net.parameters()] == flags
    timm(net=net)
    assert net[0].weight.requires_grad and not net[9].bias.requires_grad # P trains after the hand-over, S as before


class Scaled(nn.Module):
    "A convolution with a scalar gain."
    def __init__(self):
        super().__init__()
        self.conv, self.gain = nn.Conv2d(1, 3, 3), nn.Parameter(torch.tensor(2.))
    def forward(self, x): return self.gain * self.conv(x)


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_parameters_without_an_axis(granularity):
    sources, fishers = kin(Scaled())
    merge = tm.AdaptiveMerge(Scaled(), sources, fishers, granularity=granularity)
    nn.init.normal_(merge.delta)
    ratios = {unit: a.detach() for unit, a in merge.ratios().items()}
    assert ratios[merge.unit_of['gain']].shape == (2,)
    expected = mode_imm(sources, fishers, ratios, granularity)
    for name, tensor in merge.merged().items(): torch.testing.assert_close(tensor, expected[name])
    merge(torch.rand(2, 1, 4, 4)).sum().backward()
    assert merge.delta.grad.isfinite().all()


def test_channels_of_a_transposed_convolution_have_ratios_of_their_own():
    net = nn.Sequential(nn.ConvTranspose2d(4, 4, 2))
    sources, fishers = kin(net)
    merge = tm.AdaptiveMerge(net, sources, fishers, granularity='channel')
    nn.init.normal_(merge.delta)
    ratios = {unit: a.detach() for unit, a in merge.ratios().items()}
    assert {unit: tuple(a.shape) for unit, a in ratios.items()} == {'0.weight': (2, 4), '0.bias': (2, 4)}
    for given in (sources, [load_merged(copy.deepcopy(net), s) for s in sources]): # by name and as networks
        expected = mode_imm(given, fishers, ratios, 'channel')
        for name, tensor in merge.merged().items(): torch.testing.assert_close(tensor, expected[name])
