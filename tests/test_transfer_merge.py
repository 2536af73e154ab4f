"""Merging against the printed formula in double precision, brute force and finite differences; limits, faults, the report, digits."""
import copy, math

import numpy as np
import pandas as pd
import pytest, torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import medxfer_nb.transfer.merge as merge_module
from medxfer_nb.models.unet3d import shared_parameters
from medxfer_nb.transfer.fisher import chosen_parameters
from medxfer_nb.transfer.merge import (GRANULARITIES, MergeError, all_layers, check_ancestry, check_ratios, conv_layers, fisher_shares, kernel_cosines,
                                       layers_but_norms, layers_of, load_merged, mean_imm, mergeable, mix, mode_imm, partition, soup, spread, task_arithmetic, units)
from medxfer_nb.transfer.merge_report import _warn, barrier, distances, lent, merge_report, norm_misfit, path_loss, plot_ratios, ratio_table, signal, weights_kept


class Net(nn.Module):
    "2-D and transposed convolutions, BatchNorm, GroupNorm, a scalar parameter and a head."
    def __init__(self, seed=0, width=12):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.GroupNorm(2, width),
                                  nn.ReLU(), nn.ConvTranspose2d(width, 6, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head, self.gain = nn.Linear(24, 3), nn.Parameter(torch.tensor(1.5))
    def forward(self, x): return self.gain * self.head(self.body(x))


def child(net, seed, step=0.05):
    torch.manual_seed(seed)
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters(): p.add_(step * torch.randn_like(p))
        for b in net.buffers(): b.add_(1)
    return net


def family(T) -> list: return [child(Net(), 10 + t) for t in range(T)]


def rand_fishers(T, net=None, zeros=0.2) -> list:
    torch.manual_seed(99)
    return [{n: torch.rand_like(p)**3 * (torch.rand_like(p) > zeros) for n, p in (net or Net()).named_parameters()} for _ in range(T)]


def brute(thetas, fishers, alphas):
    "Eq. 2 entry by entry, in Python."
    out = np.empty(thetas[0].shape)
    for i in np.ndindex(*out.shape):
        w = [float(a) * float(f[i]) for a, f in zip(alphas, fishers)]
        if sum(w) == 0: w = [float(a) for a in alphas]
        out[i] = sum(x * float(t[i]) for x, t in zip(w, thetas)) / sum(w)
    return out


def params(net): return {n: p.detach() for n, p in net.named_parameters()}


def assert_same(a, b, exact=True):
    assert list(a) == list(b)
    for n in a: torch.testing.assert_close(a[n], b[n], **dict(rtol=0, atol=0) if exact else {}, msg=lambda m, n=n: f'{n}: {m}')


# What is merged

def test_partition_covers_every_parameter_once():
    net = Net()
    for shared in (all_layers, conv_layers, layers_but_norms, lambda n, m: n.startswith('body') and isinstance(m, nn.Conv2d), lambda n, m: False):
        P, S = partition(net, shared)
        assert sorted(P + S) == sorted(params(net)) and not set(P) & set(S)
        assert [n for names in layers_of(net, shared).values() for n in names if n in P] == P or set(P) == {n for names in layers_of(net, shared).values() for n in names}
    assert partition(net, conv_layers)[0] == [f'body.{i}.{k}' for i in (0, 3, 6) for k in ('weight', 'bias')]
    assert layers_of(net)[''] == ['gain']


def test_tied_parameters_are_merged_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    assert partition(net)[0] == ['0.weight', '0.bias', '2.bias'] == mergeable(net)
    merged = mean_imm([net, copy.deepcopy(net)])
    assert torch.equal(load_merged(copy.deepcopy(net), merged)[2].weight, net[0].weight)


def test_buffers_are_never_merged_unasked():
    sources = family(2)
    for given in (sources, [s.state_dict() for s in sources]):
        assert set(soup(given)) == set(params(sources[0]))
        assert set(task_arithmetic(given[0], given)) == set(params(sources[0]))
    net = load_merged(Net(3), soup(sources))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), Net(3).buffers()))


# Eq. 2

@pytest.mark.parametrize('T', (1, 2, 5))
@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_mode_imm_is_the_formula(T, granularity, monkeypatch):
    monkeypatch.setattr(merge_module, 'BLOCK', 50) # several blocks
    sources, fishers = family(T), rand_fishers(T)
    unit_of, tensors = units(Net(), granularity), params(sources[0])
    generator = torch.Generator().manual_seed(T)
    ratios = {}
    for name, unit in unit_of.items():
        shape = (T, *tensors[name].shape[:1]) if granularity == 'channel' else (T,)
        ratios.setdefault(unit, torch.rand(shape, generator=generator, dtype=torch.double).softmax(0))
    merged = mode_imm(sources, fishers, ratios, granularity)
    for name, unit in unit_of.items():
        alpha = spread(ratios[unit], tensors[name].ndim)
        alpha = alpha.reshape(*alpha.shape, *[1] * (tensors[name].ndim + 1 - alpha.ndim)).expand(T, *tensors[name].shape)
        thetas, fs = [params(s)[name].double() for s in sources], [f[name].double() for f in fishers]
        total = sum(a * f for a, f in zip(alpha, fs))
        ours = torch.where(total > 0, sum(a * f * t for a, f, t in zip(alpha, fs, thetas)) / total, sum(a * t for a, t in zip(alpha, thetas)))
        torch.testing.assert_close(merged[name].double(), ours, rtol=1e-5, atol=1e-6)


def test_mode_imm_entry_by_entry():
    sources, fishers, ratios = family(3), rand_fishers(3), [0.2, 0.5, 0.3]
    merged = mode_imm(sources, fishers, ratios)
    for name in ('gain', 'body.0.weight', 'head.bias'):
        expected = brute([params(s)[name] for s in sources], [f[name] for f in fishers], ratios)
        np.testing.assert_allclose(merged[name], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize('T', (1, 2, 5))
@pytest.mark.parametrize('scale', ('printed', 'tensor'))
def test_limits(T, scale):
    sources, fishers = family(T), rand_fishers(T)
    torch.manual_seed(T)
    ratios = torch.rand(T).softmax(0)
    merged = mode_imm(sources, fishers, ratios, scale=scale)
    assert_same(mode_imm(sources[:1] * T, fishers, ratios, scale=scale), params(sources[0]))
    for t in range(T):
        one = [float(i == t) for i in range(T)]
        assert_same(mode_imm(sources, fishers, one, scale=scale), params(sources[t]))
        assert_same(mean_imm(sources, one), params(sources[t]))
    assert_same(mode_imm(sources, fishers[:1] * T, ratios, scale=scale), mean_imm(sources, ratios), exact=False)
    order = torch.randperm(T).tolist()
    assert_same(mode_imm([sources[i] for i in order], [fishers[i] for i in order], ratios[order], scale=scale), merged, exact=False)
    for factor in (2.**-60, 2.**60): # exact
        assert_same(mode_imm(sources, [{n: factor * f for n, f in F_t.items()} for F_t in fishers], ratios, scale=scale), merged, exact=scale == 'printed')


def test_only_scale_tensor_ignores_the_scale_of_a_source():
    sources, fishers = family(2), rand_fishers(2)
    louder = [fishers[0], {n: 1000 * f for n, f in fishers[1].items()}]
    assert_same(mode_imm(sources, fishers, scale='tensor'), mode_imm(sources, louder, scale='tensor'), exact=False)
    weight = [mode_imm(sources, f)['head.weight'] for f in (fishers, louder)]
    second = params(sources[1])['head.weight']
    assert (weight[1] - second).norm() < 0.6 * (weight[0] - second).norm()


def test_scale_tensor_in_closed_form():
    torch.manual_seed(0)
    theta, fs = torch.randn(3, 5, 4), torch.rand(3, 5, 4).double()
    w = [a * f / f.sum() for a, f in zip((0.2, 0.3, 0.5), fs)] # alpha F / sum of F over the tensor
    expected = sum(x * t for x, t in zip(w, theta.double())) / sum(w)
    merged = mode_imm([{'w': t} for t in theta], [{'w': f} for f in fs], [0.2, 0.3, 0.5], scale='tensor')['w']
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)


def test_sources_and_fishers_stay_untouched():
    sources, fishers = family(3), rand_fishers(3)
    before = copy.deepcopy([s.state_dict() for s in sources]), copy.deepcopy(fishers)
    for scale in ('printed', 'tensor'):
        merged = mode_imm(sources, fishers, scale=scale)
        for v in merged.values(): v.mul_(0) # and share no memory with the result
    merged = mode_imm(sources[:1], fishers[:1])
    for v in merged.values(): v.mul_(0)
    for now, was in zip([s.state_dict() for s in sources] + fishers, before[0] + before[1]): assert_same(now, was)


# Extreme Fisher information

@pytest.mark.parametrize('size', (1e-44, 1e-38, 1e-20, 1., 1e20, 3e38))
def test_shares_at_the_ends_of_float32(size):
    top = torch.tensor(size)
    fs = [{'w': (top * torch.tensor([1., 0., 1., 0.]))}, {'w': (top * torch.tensor([1., 1., 0., 0.]))}]
    for scale in ('printed', 'tensor'):
        share = fisher_shares(fs, scale)['w']
        torch.testing.assert_close(share, torch.tensor([[0.5, 0., 1., 0.5], [0.5, 1., 0., 0.5]]))
        merged = mode_imm([{'w': torch.tensor([1., 1., 1., 1.])}, {'w': torch.tensor([3., 3., 3., 3.])}], fs, [0.25, 0.75], scale=scale)['w']
        torch.testing.assert_close(merged, torch.tensor([2.5, 3., 1., 2.5]))


def test_tiny_beside_huge():
    share = fisher_shares([{'w': torch.tensor([1e-38, 3e38])}, {'w': torch.tensor([3e38, 1e-38])}])['w']
    assert share.isfinite().all() and torch.equal(share, torch.tensor([[0., 1.], [1., 0.]]))


def test_no_ratio_meets_no_fisher():
    theta, share = torch.randn(3, 7), torch.tensor([0., 0., 1.])[:, None].expand(3, 7)
    for alpha in ([0.3, 0.7, 0.], [1., 0., 0.], [0., 1., 0.]):
        alpha = torch.tensor(alpha, requires_grad=True)
        merged = mix(theta, share, alpha)
        torch.testing.assert_close(merged, (alpha[:, None] * theta).sum(0))
        torch.testing.assert_close(torch.autograd.grad(merged.sum(), alpha)[0], (theta - merged).sum(1))
    nearly = torch.tensor([0.5, 0.5, 1e-40], requires_grad=True)
    assert torch.autograd.grad(mix(theta, share, nearly).sum(), nearly)[0].isfinite().all()
    torch.testing.assert_close(mix(theta, share, nearly), theta[2])


# The derivative

@pytest.mark.parametrize('T', (1, 2, 5))
@pytest.mark.parametrize('per_channel', (False, True))
@pytest.mark.parametrize('block', (2**17, 5))
def test_gradient(T, per_channel, block, monkeypatch):
    monkeypatch.setattr(merge_module, 'BLOCK', block)
    torch.manual_seed(T)
    theta, f = torch.randn(T, 4, 3, 2, dtype=torch.double), torch.rand(T, 4, 3, 2, dtype=torch.double)
    f[:, 0, 0], f[0, 1] = 0, 0
    share = fisher_shares([{'w': x} for x in f])['w']
    alpha = torch.rand((T, 4, 1, 1) if per_channel else (T,), dtype=torch.double, requires_grad=True)
    weight = torch.randn(4, 3, 2, dtype=torch.double)
    def naive(theta, share, alpha):
        a = alpha if per_channel else alpha[:, None, None, None]
        return (a * share * theta).sum(0) / (a * share).sum(0)
    ours, expected = (torch.autograd.grad((f(theta, share, alpha) * weight).sum(), alpha)[0] for f in (mix, naive))
    torch.testing.assert_close(ours, expected)
    assert torch.autograd.gradcheck(lambda t, a: mix(t, share, a), (theta.requires_grad_(), alpha))


def test_gradient_of_the_mean_is_the_distance_to_it():
    theta, alpha = torch.randn(3, 6, 5), torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    merged = mix(theta, None, alpha)
    torch.testing.assert_close(torch.autograd.grad(merged.sum(), alpha)[0], (theta - merged).sum((1, 2)))
    torch.testing.assert_close(merged, (alpha[:, None, None] * theta).sum(0))


def test_mix_works_under_autocast_and_keeps_no_inside():
    theta, alpha = torch.randn(2, 8, 8), torch.full((2,), 0.5, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16): merged = mix(theta, None, alpha)
    assert merged.dtype == torch.float32 and type(merged.grad_fn).__name__ == '_MixBackward'
    merged.sum().backward()
    assert alpha.grad.isfinite().all()


def test_torch_func():
    theta, share, alpha = torch.randn(2, 8, 3), torch.rand(2, 8, 3), torch.tensor([0.3, 0.7], requires_grad=True)
    expected, = torch.autograd.grad(mix(theta, share, alpha).square().sum(), alpha)
    torch.testing.assert_close(grad(lambda a: mix(theta, share, a).square().sum())(alpha.detach()), expected)


# Other precisions, layouts, sizes

@pytest.mark.parametrize('dtype', (torch.float64, torch.bfloat16, torch.float16))
def test_precision_of_the_sources_is_kept(dtype):
    sources, fishers = [{n: v.to(dtype) for n, v in params(s).items()} for s in family(3)], rand_fishers(3)
    merged = mode_imm(sources, fishers, [0.5, 0.25, 0.25])
    expected = mode_imm([{n: v.double() for n, v in s.items()} for s in sources], fishers, [0.5, 0.25, 0.25])
    for n in merged:
        assert merged[n].dtype == dtype
        torch.testing.assert_close(merged[n].double(), expected[n], rtol=torch.finfo(dtype).eps * 2 + 1e-6, atol=1e-5)
    assert_same(mode_imm(sources, fishers, [0., 1., 0.]), sources[1])


def test_any_memory_layout_and_empty_tensors():
    sources, fishers = family(2), rand_fishers(2)
    last = [copy.deepcopy(s).to(memory_format=torch.channels_last) for s in sources]
    assert_same(mode_imm(last, fishers), mode_imm(sources, fishers), exact=False)
    empty = mode_imm([{'w': torch.empty(0, 3)}] * 2, [{'w': torch.empty(0, 3)}] * 2, granularity='channel')
    assert empty['w'].shape == (0, 3)
    theta = torch.randn(5, 4, 2).permute(2, 0, 1).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(mix(theta, None, torch.tensor([0.3, 0.7])).sum(), theta)[0], torch.tensor([0.3, 0.7])[:, None, None].expand(2, 5, 4))


# Faults

def test_unfit_sources_are_listed():
    sources = [s.state_dict() for s in family(2)]
    sources[1]['head.weight'] = torch.zeros(3, 7)
    sources[1]['body.0.weight'] = sources[1]['body.0.weight'].double()
    del sources[1]['head.bias']
    with pytest.raises(MergeError) as e: mean_imm(sources)
    assert set(e.value.problems) == {'shape', 'dtype', 'missing'}
    assert e.value.problems['shape'] == ['head.weight in 1: (3, 7) for (3, 24)']
    assert set(mean_imm(sources, names=['body.3.weight', 'body.3.bias'])) == {'body.3.weight', 'body.3.bias'}
    with pytest.raises(MergeError, match='not floating: body.1.num_batches_tracked'): mean_imm(sources, names=['body.1.num_batches_tracked'])


@pytest.mark.parametrize('value', (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize('T', (1, 2, 3))
def test_what_is_not_finite_is_named(value, T):
    fishers, scales = rand_fishers(T), ('printed', 'tensor')
    for t in range(T):
        sources = [s.state_dict() for s in family(T)]
        sources[t]['gain'] = torch.tensor(value)
        sources[t]['head.weight'][2, 3] = value
        one = [float(i == 0) for i in range(T)] # also where the ratio is 0
        for call in (lambda: soup(sources), lambda: mean_imm(sources, one), lambda: mode_imm(sources, fishers, one)):
            with pytest.raises(MergeError) as e: call()
            assert e.value.problems == {'NaN or infinite': [f'gain in {t}', f'head.weight in {t}']}
        with pytest.raises(MergeError, match=f'head.weight in {t + 1}'): task_arithmetic(Net(), sources)
        worse = copy.deepcopy(fishers)
        worse[t]['head.bias'][1] = value
        for scale in scales:
            with pytest.raises(MergeError) as e: mode_imm(family(T), worse, one, scale=scale)
            assert e.value.problems == {'NaN or infinite': [f'head.bias in {t}']}


@pytest.mark.parametrize('T', (1, 2))
@pytest.mark.parametrize('broken, kind', [(lambda f: f.neg(), 'negative'), (lambda f: f / 0, 'NaN or infinite'), (lambda f: f.flatten(), 'shape'), (None, 'missing')])
def test_unfit_fishers_are_listed(broken, kind, T):
    fishers, names = rand_fishers(T, zeros=0.), list(params(Net()))
    if broken: fishers[-1]['head.weight'] = broken(fishers[-1]['head.weight'])
    else: del fishers[-1]['head.weight']
    for scale in ('printed', 'tensor'):
        with pytest.raises(MergeError) as e: mode_imm(family(T), fishers, scale=scale, names=names)
        assert list(e.value.problems) == [kind] and e.value.problems[kind][0].startswith(f'head.weight in {T - 1}')


def test_ancestry():
    strangers = [Net(0, 24), Net(1, 24)]
    with pytest.raises(MergeError, match=r'no common ancestry.*0 and 1.*incrementally'): soup(strangers)
    with pytest.raises(MergeError, match='1 and 2'): soup([child(Net(0, 24), 5), child(Net(0, 24), 6), Net(3, 24)])
    assert soup(strangers, ancestry='trust')
    assert soup([child(Net(0, 24), 5), child(Net(0, 24), 6)])
    assert soup(strangers, names=['body.0.weight']) # 216 entries are not judged
    assert kernel_cosines([s.state_dict() for s in strangers], ['head.bias']) is None
    scaled = [{n: 1e30 * v for n, v in params(s).items()} for s in strangers]
    with pytest.raises(MergeError, match='no common ancestry'): check_ancestry(scaled, list(scaled[0]))
    with pytest.raises(MergeError, match="'check' or 'trust'"): soup(strangers, ancestry='maybe')


@pytest.mark.parametrize('ratios, message', [([0.5], 'shape'), ([0.5, 0.6], 'add up to 1'), ([-0.5, 1.5], 'not negative'), ([math.nan, 1.], 'add up'),
                                             ({'head': [0.5, 0.5]}, 'missing'), ([[0.5] * 12] * 2, 'shape')])
def test_bad_ratios(ratios, message):
    with pytest.raises(MergeError, match=message): mean_imm(family(2), ratios)


def test_bad_arguments():
    sources, fishers = family(2), rand_fishers(2)
    for call, message in ((lambda: mode_imm(sources, fishers[:1]), 'need 2'), (lambda: mode_imm([], []), 'nothing to merge'), (lambda: soup([]), 'nothing'),
                          (lambda: mode_imm(sources, fishers, scale='x'), 'printed'), (lambda: mean_imm(sources, granularity='x'), 'granularity'),
                          (lambda: mean_imm(sources, names=[]), 'names'), (lambda: mix(torch.rand(2, 3), torch.rand(2, 4), torch.rand(2)), 'one shape'),
                          (lambda: mix(torch.rand(2, 3), None, torch.rand(2, 4)), 'one shape'), (lambda: load_merged(Net(), {'tail': torch.ones(1)}), 'tail')):
        with pytest.raises(MergeError, match=message): call()


def test_relatives():
    ancestor, sources = Net(), family(3)
    assert_same(soup(sources), {n: torch.stack([params(s)[n] for s in sources]).mean(0) for n in params(ancestor)}, exact=False)
    assert_same(task_arithmetic(ancestor, sources, 1/3), soup(sources), exact=False)
    added = task_arithmetic(ancestor, sources, 0.5)
    for n, p in params(ancestor).items(): torch.testing.assert_close(added[n], p + 0.5 * sum(params(s)[n] - p for s in sources))


# Report

@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_ratio_table_averages_a_layer(granularity):
    net, T = Net(), 2
    unit_of, tensors = units(net, granularity), params(net)
    torch.manual_seed(0)
    ratios = {}
    for name, unit in unit_of.items(): ratios.setdefault(unit, torch.rand((T, *tensors[name].shape[:1]) if granularity == 'channel' else (T,)).softmax(0))
    table = ratio_table(net, ratios, T, granularity)
    whole = {n: spread(ratios[u], tensors[n].ndim) for n, u in unit_of.items()}
    for layer, names in layers_of(net).items():
        entries = torch.cat([a.reshape(*a.shape, *[1] * (tensors[n].ndim + 1 - a.ndim)).expand(T, *tensors[n].shape).reshape(T, -1) for n in names for a in [whole[n]]], 1)
        np.testing.assert_allclose(table.loc[layer], entries.mean(1), rtol=1e-5)
    plot_ratios(table)


def test_path_and_report_leave_the_network_alone():
    net, sources = Net(), family(3)
    net.body[1].eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    x = torch.rand(4, 1, 8, 8)
    def loss(net): return float(sum((p - q).square().sum() for p, q in zip(net.parameters(), sources[0].parameters())))
    report = merge_report(net, sources, soup(sources), [1/3] * 3, loss, inputs=x)
    assert_same(net.state_dict(), before)
    assert [m.training for m in net.modules()] == modes
    path = report.paths['source 0 to source 1'] # squared distance to source 0: quadratic along the path
    np.testing.assert_allclose(path.loss, path.loss.iloc[-1] * path.position**2, rtol=1e-4, atol=1e-6)
    assert barrier(path) == 0 and '<table' in report._repr_html_()
    assert [w.split(' do not')[0] for w in report.warnings] == ['running statistics'] # of a network that never saw data
    assert not merge_report(net, sources, soup(sources), loss=loss).warnings
    gap = math.sqrt(sum(float((params(sources[0])[n] - params(sources[2])[n]).square().sum()) for n in params(net)))
    assert report.distances.loc['source 0', 'source 2'] == pytest.approx(gap, rel=1e-5)
    with pytest.raises(RuntimeError), lent(net, params(sources[0])): raise RuntimeError
    assert_same(net.state_dict(), before)


def test_report_warns():
    net = Net()
    a, b = params(net), {n: -p for n, p in params(net).items()}
    def loss(net): return 1. if net.gain.abs() > 1.4 else 2. # at the ends it is 1.5 and -1.5
    report = merge_report(net, [a, b], soup([a, b], ancestry='trust'), loss=loss, inputs=torch.rand(4, 1, 8, 8))
    text = '\n'.join(report.warnings)
    assert 'no shared basin: from source 0 to source 1' in text and 'weights kept' in text and 'running statistics' in text
    assert 'no shared basin' in '\n'.join(merge_report(net, [a, b], a, loss=lambda net: math.nan).warnings)


def test_norms():
    net = Net().eval()
    x = torch.rand(16, 1, 8, 8)
    assert weights_kept(layers_of(net), [params(net)] * 2, {n: p / 2 for n, p in params(net).items()}) == pytest.approx(dict.fromkeys(layers_of(net), 0.5))
    with torch.no_grad():
        first = net.body[0](x)
        assert signal(net, params(net), x, ['body.0', 'head'])['body.0'] == pytest.approx(float(first.std()), rel=1e-5)
        net.body[1].running_var.copy_(first.var((0, 2, 3), correction=0) / 9)
    assert norm_misfit(net, params(net), x)['body.1'] == pytest.approx(3, rel=1e-4)
    assert distances({'a': params(net), 'b': params(net)}, list(params(net))).to_numpy().max() == 0


# Half precision, parametrised, tied and transposed layers

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16))
@pytest.mark.parametrize('scale', ('printed', 'tensor'))
def test_fisher_information_of_half_precision(dtype, scale):
    torch.manual_seed(0)
    fs = [{'w': (torch.rand(300, 300)**30).to(dtype)} for _ in range(2)]
    fs[0]['w'][0], fs[0]['w'][1] = 1e-7, 6e4 # below and near the ends of float16
    wide, sources = [{'w': f['w'].float()} for f in fs], [{'w': torch.full((300, 300), v)} for v in (1., 2.)]
    assert_same(mode_imm(sources, fs, scale=scale), mode_imm(sources, wide, scale=scale))
    assert_same(fisher_shares(fs, scale), fisher_shares(wide, scale))


def test_task_arithmetic_of_half_precision():
    start, sources = {'w': torch.zeros(4).half()}, [{'w': torch.full((4,), 6e4).half()}] * 2 # their sum is out of range, a quarter of it is not
    merged = task_arithmetic(start, sources, scale=0.25)['w']
    assert merged.dtype == torch.float16 and torch.equal(merged, torch.full((4,), 3e4).half())


def test_a_merge_out_of_range_is_refused():
    zero, big = {'w': torch.zeros(2).half(), 'v': torch.zeros(1).half()}, {'w': torch.full((2,), 6e4).half(), 'v': torch.ones(1).half()}
    with pytest.raises(MergeError, match=r'in w: .*float16.*wider precision') as e: task_arithmetic(zero, [big, big])
    assert e.value.problems == {'overflow': ['w']}


def test_parameters_under_a_parametrisation_belong_to_the_layer():
    net = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)), nn.Linear(4, 4))
    held = ['0.bias', '0.parametrizations.weight.original0', '0.parametrizations.weight.original1']
    assert partition(net, conv_layers)[0] == held and layers_of(net, conv_layers) == {'0': held}
    assert list(chosen_parameters(net, conv_layers)) == list(shared_parameters(net)) == held
    for granularity in GRANULARITIES: assert units(net, granularity) == units(params(net), granularity)
    assert set(units(net).values()) == {'0', '1'}
    alone = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)) # the network itself is the layer
    assert set(units(params(alone)).values()) == {''} and list(layers_of(alone)) == ['']


def test_a_tied_tensor_is_shared_if_one_of_its_layers_is():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    for path, P in {'0': ['0.weight', '0.bias'], '2': ['0.weight', '2.bias']}.items():
        def only(name, module): return name == path
        assert set(partition(net, only)[0]) == set(chosen_parameters(net, only)) == set(shared_parameters(net, only)) == set(P)
        assert set(layers_of(net, only)) == {path}


@pytest.mark.parametrize('layer', (nn.ConvTranspose2d(4, 4, 2), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.ConvTranspose3d(4, 3, 2)))
def test_channels_of_transposed_convolutions_are_not_tied(layer):
    net = nn.Sequential(layer, nn.Conv2d(4, 4, 3))
    for found in (units(net, 'channel'), units(params(net), 'channel', net=net)):
        assert found == {'0.weight': '0.weight', '0.bias': '0.bias', '1.weight': '1', '1.bias': '1'}


@pytest.mark.parametrize('top, low', [(1., 1e-37), (1e6, 1e-30), (1e30, 1e-30), (3e38, 1e-20)])
def test_zeros_beside_small_and_large_fisher_information(top, low):
    "Against float64: what is added where there is none may not show beside what there is."
    ratios, none = [0.2, 0.3, 0.5], torch.arange(200) < 50
    thetas, fishers = [{'w': torch.randn(200)} for _ in range(3)], [{'w': (torch.rand(200) + 0.1) * low} for _ in range(3)]
    for f in fishers: f['w'][none], f['w'][0] = 0., top
    weights = torch.stack([f['w'].double() for f in fishers])
    weights[:, (weights == 0).all(0)] = 1.
    weights *= torch.tensor(ratios, dtype=torch.double)[:, None]
    expected = (weights * torch.stack([t['w'].double() for t in thetas])).sum(0) / weights.sum(0)
    merged = mode_imm(thetas, fishers, ratios, ancestry='trust')['w']
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_looking_for_gaps_the_merge_is_the_same(monkeypatch):
    "On a GPU no one asks whether a share is zero."
    sources, fishers = family(3), rand_fishers(3)
    theta, share = torch.randn(3, 40), fisher_shares([{'w': torch.rand(40) * (torch.rand(40) > 0.5)} for _ in range(3)])['w']
    def results():
        alpha = torch.tensor([0.6, 0.4, 0.], requires_grad=True)
        return mode_imm(sources, fishers, [0.6, 0.4, 0.]), {'gradient': torch.autograd.grad(mix(theta, share, alpha).square().sum(), alpha)[0]}
    seen = results()
    monkeypatch.setattr(merge_module, '_gaps', lambda total: True)
    for a, b in zip(results(), seen): assert_same(a, b)
    assert mix(theta, share, torch.tensor([math.nan, 0.5, 0.5])).isnan().all() # ratios that have diverged are not hidden


def test_a_loss_that_is_not_finite_is_a_barrier():
    for losses in ([math.inf] * 3, [math.nan, 1., 2.], [1., 2., math.nan], [math.inf, 1., 1.], [1., -math.inf, 1.]):
        path = pd.DataFrame(dict(position=[0., 0.5, 1.], loss=losses))
        warning, = _warn(pd.DataFrame(), {'a to b': path}, {})
        assert barrier(path) == math.inf and 'NaN or infinite at' in warning


# The known order on three tasks in a row

PIXELS, DIGITS = (torch.tensor(a) for a in load_digits(return_X_y=True))


def sequence(seed, n_tasks=3):
    "Mean test accuracy over shuffled-pixel tasks: sequential SGD, mean-IMM, mode-IMM; Fisher information by a loop of its own."
    torch.manual_seed(seed)
    fit, test = torch.randperm(len(PIXELS)).split([1200, len(PIXELS) - 1200])
    tasks = [PIXELS[:, torch.randperm(64)].float() / 16 for _ in range(n_tasks)]
    net = nn.Sequential(*[l for n in (64, 100, 100) for l in (nn.Linear(n, 100), nn.ReLU())], nn.Linear(100, 10))
    def log_p(p, x, y): return F.cross_entropy(functional_call(net, p, (x[None],)), y[None])
    states, fishers = [], []
    for x in tasks:
        opt = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        for _ in range(15):
            for batch in fit[torch.randperm(len(fit))].split(32):
                opt.zero_grad()
                F.cross_entropy(net(x[batch]), DIGITS[batch]).backward()
                opt.step()
        states.append(copy.deepcopy(params(net)))
        drawn = torch.distributions.Categorical(logits=net(x[fit]).detach()).sample()
        grads = [vmap(grad(log_p), (None, 0, 0))(states[-1], a, b) for a, b in zip(x[fit].split(200), drawn.split(200))]
        fishers.append({n: sum(g[n].square().sum(0) for g in grads) / len(fit) for n in states[-1]})
    merged = states[-1], mean_imm(states), mode_imm(states, fishers)
    with torch.no_grad():
        return [np.mean([float((load_merged(net, p)(x[test]).argmax(1) == DIGITS[test]).float().mean()) for x in tasks]) for p in merged]


def test_shuffled_digits_have_the_known_order():
    sgd, mean, mode = np.mean([sequence(seed) for seed in range(3)], 0)
    assert mode > mean + 0.02 > sgd + 0.04
