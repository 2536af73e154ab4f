"""The 3-D U-Net against a forward pass written out, MONAI's loss, closed forms; what transfers; volumes by windows."""
import copy, math, pickle, warnings

import numpy as np
import pytest, torch
from fastai.vision.core import TensorImage, TensorMask
from monai.losses import DiceLoss
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from medxfer_nb.models import unet3d as u3
from medxfer_nb.models.precision import BF16_LAST, FP32, FP32_LAST


def small(in_channels=2, n_classes=3, base=2, depth=3, seed=0, **kwargs):
    return u3.unet3d(in_channels, n_classes, base=base, depth=depth, seed=seed, **kwargs)


def randomised(net, seed=0):
    "Norms, biases and all away from their start."
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters(): p.add_(0.3 * torch.randn(p.shape, generator=rng))
    return net


# The network

def block(state, name, x, stride=1, slope=0.01):
    w = state[f'{name}.conv.weight']
    x = F.conv3d(x, w, state[f'{name}.conv.bias'], stride, w.shape[-1] // 2)
    mean, var = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), correction=0, keepdim=True)
    scale, shift = (state[f'{name}.norm.{k}'][:, None, None, None] for k in ('weight', 'bias'))
    x = (x - mean) / torch.sqrt(var + 1e-5) * scale + shift
    return torch.maximum(x, slope * x)


def doubled(x, size):
    for axis, n in enumerate(size, 2): x = x.repeat_interleave(2, axis).narrow(axis, 0, n)
    return x


def forward(state, x, depth, slope=0.01):
    "Isensee 2017 from its description, without dropout."
    skips = []
    for i in range(depth):
        x = block(state, f'encoder.{i}.conv_in', x, 2 if i else 1, slope)
        x = x + block(state, f'encoder.{i}.context.2', block(state, f'encoder.{i}.context.0', x, slope=slope), slope=slope)
        skips.append(x)
    total = 0
    for i in reversed(range(depth - 1)):
        x = block(state, f'decoder.{i}.up', doubled(x, skips[i].shape[2:]), slope=slope)
        x = block(state, f'decoder.{i}.localise.0', torch.cat([skips[i], x], 1), slope=slope)
        x = block(state, f'decoder.{i}.localise.1', x, slope=slope)
        if i < 3:
            total = total + F.conv3d(x, state[f'heads.{i}.weight'], state[f'heads.{i}.bias'])
            if i: total = doubled(total, skips[i - 1].shape[2:])
    return total


@pytest.mark.parametrize('depth, size, slope', [(2, (5, 3, 4), 0.01), (3, (12, 9, 7), 0.3), (4, (16, 11, 9), 0.01), (5, (17, 20, 33), 0.01), (5, (32, 32, 32), 0.01)])
def test_forward_as_described(depth, size, slope):
    net, x = randomised(small(depth=depth, slope=slope)).eval().double(), torch.randn(2, 2, *size, dtype=torch.double)
    with torch.no_grad():
        expected = forward(net.state_dict(), x, depth, slope)
        torch.testing.assert_close(net.segment(x), expected, rtol=1e-9, atol=1e-9)
        logits = net.float()(x.float())
    assert logits.dtype == torch.float32 and logits.shape == (2, 3, *size)
    torch.testing.assert_close(logits, expected.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('channels, labels, total', [(2, 7, 8_269_157), (4, 3, 8_269_561)])
def test_size_of_the_paper(channels, labels, total):
    net = u3.UNet3D(channels, labels)
    assert sum(p.numel() for p in net.parameters()) == total
    kinds = [type(m) for m in net.modules()]
    assert kinds.count(nn.Conv3d) == 30 and kinds.count(nn.InstanceNorm3d) == 27 and kinds.count(nn.Dropout3d) == 5
    assert all(m.bias is not None for m in net.modules() if isinstance(m, (nn.Conv3d, nn.InstanceNorm3d)))
    assert [l.conv_in.conv.out_channels for l in net.encoder.values()] == [16, 32, 64, 128, 256]
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout3d)] == [0.3] * 5


def test_every_parameter_learns_and_dropout_drops_channels():
    net, x = small(depth=5), torch.rand(1, 2, 32, 32, 32)
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(p.grad.any() for k, p in net.named_parameters() if 'conv.bias' not in k) # norms remove those
    kept = []
    net.encoder['0'].context[1].register_forward_hook(lambda m, i, y: kept.append((y == 0).flatten(2).all(2)))
    for _ in range(20): net(torch.rand(4, 2, 32, 32, 32)[..., :17, :17, :17])
    assert 0.2 < torch.cat(kept).float().mean() < 0.4


def test_cases_do_not_mix():
    net, x = randomised(small()).eval(), torch.rand(3, 2, 12, 12, 12)
    with torch.no_grad(): torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('shape, message', [((1, 2, 4, 12, 12), 'need 5 voxels or more along each axis, not 4x12x12'), ((1, 1, 12, 12, 12), r'takes \(B, 2, Z, Y, X\)'),
                                            ((2, 12, 12, 12), r'takes \(B, 2, Z, Y, X\)'), ((0, 2, 12, 12, 12), r'takes \(B, 2, Z, Y, X\)')])
def test_bad_input(shape, message):
    with pytest.raises(ValueError, match=message): small()(torch.zeros(shape))


@pytest.mark.parametrize('bad', [dict(in_channels=0), dict(n_classes=0), dict(base=0), dict(depth=1)])
def test_bad_networks(bad):
    with pytest.raises(ValueError, match='2 or more levels'): small(**bad)


def test_smallest_size_trains():
    for depth in (2, 3, 4, 5):
        net = small(depth=depth).train()
        net(torch.rand(1, 2, *[net.min_size] * 3)).sum().backward()


def test_fastai_types_do_not_spread():
    net = small()
    assert type(net(TensorImage(torch.rand(1, 2, 8, 8, 8)))) is torch.Tensor
    assert type(u3.soft_dice_loss(torch.zeros(1, 2, 4, 4, 4), TensorMask(torch.ones(1, 2, 4, 4, 4)))) is torch.Tensor
    assert torch.equal(pickle.loads(pickle.dumps(net.eval()))(torch.ones(1, 2, 8, 8, 8)), net(torch.ones(1, 2, 8, 8, 8)))


# The start

def test_xavier():
    net = u3.unet3d(2, 3, base=8, depth=3, seed=5)
    for k, p in net.named_parameters():
        if p.ndim == 5:
            bound = math.sqrt(6 / ((p.shape[0] + p.shape[1]) * p[0, 0].numel()))
            assert p.abs().max() <= bound
            if p.numel() > 2000: assert p.abs().max() > 0.98 * bound and abs(p.var() / (bound**2 / 3) - 1) < 0.1 and abs(p.mean()) < 0.05 * bound, k
        else: assert (p == (1 if k.endswith('norm.weight') else 0)).all(), k


def test_start_depends_on_seed_name_and_shape_only():
    state = torch.get_rng_state()
    torch.manual_seed(1); a = small(seed=3)
    torch.manual_seed(2); b = small(in_channels=4, seed=3)
    c = u3.xavier_(randomised(small(seed=9)), 3)
    for k, v in a.state_dict().items():
        assert torch.equal(v, c.state_dict()[k])
        assert torch.equal(v, b.state_dict()[k]) or k == 'encoder.0.conv_in.conv.weight'
    torch.manual_seed(4); d = small(seed=None)
    torch.manual_seed(4); e = small(seed=None)
    assert all(torch.equal(v, e.state_dict()[k]) for k, v in d.state_dict().items())
    torch.set_rng_state(state)
    u3.xavier_(a, 0)
    assert torch.equal(state, torch.get_rng_state())
    assert len({float(p.detach().flatten()[0]) for p in a.parameters() if p.ndim == 5}) == sum(p.ndim == 5 for p in a.parameters()) # no two alike


def test_xavier_of_any_network():
    net = u3.xavier_(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2)), 0)
    assert net[0].weight.abs().max() <= math.sqrt(6 / 12) and not net[0].bias.any() and (net[1].weight == 1).all()


# P and S

def test_shared_is_all_convolutions_but_the_heads():
    net = u3.UNet3D(2, 7)
    P, more = u3.shared_parameters(net), u3.shared_parameters(net, u3.is_shared_with_norms)
    assert list(P) == [k for k, _ in net.named_parameters() if '.conv.' in k] and len(P) == 54
    assert list(more) == [k for k, _ in net.named_parameters() if not k.startswith('heads')] and len(more) == 108
    assert all(p is dict(net.named_parameters())[k] for k, p in more.items())
    wrapped = nn.ModuleDict({'net': net})
    assert list(u3.shared_parameters(wrapped)) == [f'net.{k}' for k in P]
    assert list(u3.shared_parameters(nn.Conv2d(1, 1, 1))) == ['weight', 'bias']
    assert list(u3.shared_parameters(nn.Sequential(nn.Linear(2, 2)), lambda name, m: isinstance(m, nn.Linear))) == ['0.weight', '0.bias']


@pytest.mark.parametrize('shared', [u3.is_shared, u3.is_shared_with_norms])
def test_transfer_is_exact(shared):
    source, target = randomised(small(n_classes=7)), small(seed=1)
    before = copy.deepcopy(target.state_dict())
    with warnings.catch_warnings(action='error'): tensors, left_out = u3.transferable(target, source.state_dict(), shared)
    assert not left_out and u3.load_shared(target, tensors) is target
    for k, v in target.state_dict().items():
        assert torch.equal(v, source.state_dict()[k] if k in tensors else before[k])
    with torch.no_grad(): next(iter(u3.shared_parameters(target).values())).add_(1)
    assert torch.equal(next(iter(tensors.values())), next(source.parameters())) # the source is not touched
    assert list(u3.transferable(target, tensors, shared)[0]) == list(tensors) # P alone is enough


def test_other_modalities_are_never_silent():
    source, target = randomised(small()), small(in_channels=4, seed=1)
    with pytest.warns(UserWarning, match='encoder.0.conv_in.conv takes 4 input channels, in the source 2: it is not transferred') as seen:
        tensors, left_out = u3.transferable(target, source.state_dict())
    assert len(seen) == 1 and left_out == ['encoder.0.conv_in.conv.weight', 'encoder.0.conv_in.conv.bias']
    assert set(tensors) | set(left_out) == set(u3.shared_parameters(target)) and not set(tensors) & set(left_out)
    with warnings.catch_warnings(action='error'): adapted, left_out = u3.transferable(target, source.state_dict(), first_conv='adapt')
    assert not left_out and list(adapted) == list(u3.shared_parameters(target))
    u3.load_shared(target, adapted)
    plane = torch.rand(1, 1, 8, 8, 8).expand(-1, 4, -1, -1, -1) # the same plane in all modalities
    torch.testing.assert_close(target.encoder['0'].conv_in.conv(plane), source.encoder['0'].conv_in.conv(plane[:, :2]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'exclude' or 'adapt', not 'drop'"): u3.transferable(target, source.state_dict(), first_conv='drop')


def test_what_does_not_fit_is_listed():
    target = small()
    for source, message in [(small(base=3), 'encoder.0.conv_in.conv.weight is .3, 2, 3, 3, 3., needs .2, 2, 3, 3, 3.'), (small(depth=2), 'encoder.2.conv_in.conv.weight is missing'),
                            (small(depth=4), 'encoder.3.conv_in.conv.weight is not in the network')]:
        with pytest.raises(u3.TransferError, match=message): u3.transferable(target, source.state_dict())
    deep = {k: v for k, v in small(in_channels=4, base=3).state_dict().items()} # other channels and other widths: no exclusion
    with pytest.raises(u3.TransferError, match='encoder.0.conv_in.conv.weight is'): u3.transferable(target, deep)
    second = dict(target.state_dict()); second['encoder.1.conv_in.conv.weight'] = torch.zeros(4, 3, 3, 3, 3) # not the first convolution
    with pytest.raises(u3.TransferError, match='encoder.1.conv_in.conv.weight is'): u3.transferable(target, second, first_conv='adapt')
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(u3.TransferError, match='heads.0.bias is .7,., needs .3,.'): u3.load_shared(target, {'encoder.0.conv_in.conv.bias': torch.ones(2), 'heads.0.bias': torch.ones(7)})
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items()) # all or nothing


# Loss

def test_loss_is_monais():
    logits, targets = torch.randn(3, 4, 6, 5, 7, requires_grad=True), torch.rand(3, 4, 6, 5, 7) > 0.7
    targets[1, 2] = False
    theirs = DiceLoss(sigmoid=True, smooth_nr=1e-5, smooth_dr=1e-5)
    ours = u3.soft_dice_loss(logits, targets)
    torch.testing.assert_close(ours, theirs(logits, targets.float()))
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs(logits, targets.float()), logits)): torch.testing.assert_close(a, b)


def test_dice_by_hand():
    p, t = torch.rand(2, 3, 4, 5, 6), torch.rand(2, 3, 4, 5, 6) > 0.5
    d = u3.soft_dice(p, t, smooth=0.5)
    for b in range(2):
        for l in range(3):
            inside = float(p[b, l][t[b, l]].sum())
            assert abs(float(d[b, l]) - (2 * inside + 0.5) / (float(p[b, l].sum()) + int(t[b, l].sum()) + 0.5)) < 1e-6
    assert torch.equal(u3.soft_dice(t, t), torch.ones(2, 3)) and u3.soft_dice(t.byte(), ~t).max() < 1e-6
    assert u3.soft_dice_loss(torch.randn(2, 3, 4, 4, 4, dtype=torch.bfloat16), torch.ones(2, 3, 4, 4, 4)).dtype == torch.float32


@pytest.mark.parametrize('value', [-200., -30., -11.5, 0., 200.])
def test_absent_labels_are_safe(value):
    logits, nothing = torch.full((1, 2, 8, 8, 8), value, requires_grad=True), torch.zeros(1, 2, 8, 8, 8)
    d = u3.soft_dice(logits.sigmoid(), nothing)
    assert (d == 1).all() if value == -200 else (0 <= d).all() and (d < 1).all()
    u3.soft_dice_loss(logits, nothing).backward()
    assert logits.grad.isfinite().all() and logits.grad.min() >= 0 and logits.grad.sum() <= 0.25 # downwards, if at all


def test_loss_refuses_broadcasting():
    for shape in [(1, 2, 4, 4, 4), (2, 1, 4, 4, 4), (2, 2, 4, 4)]:
        with pytest.raises(ValueError, match='have to have one shape'): u3.soft_dice_loss(torch.zeros(2, 2, 4, 4, 4), torch.zeros(shape))


def test_gradients_per_case_by_vmap():
    net, x, t = randomised(small()).eval(), torch.rand(3, 2, 9, 8, 8), torch.rand(3, 3, 9, 8, 8) > 0.5
    params = {k: p.detach() for k, p in net.named_parameters()}
    loss = lambda params, x, t: u3.soft_dice_loss(functional_call(net, params, (x[None],)), t[None])
    per_case = vmap(grad(loss), (None, 0, 0))(params, x, t)
    for i in range(3):
        net.zero_grad()
        u3.soft_dice_loss(net(x[i:i + 1]), t[i:i + 1]).backward()
        for k, p in net.named_parameters(): torch.testing.assert_close(per_case[k][i], p.grad, rtol=1e-3, atol=1e-6)


# Precision

def test_modes_change_speed_only():
    net, x = randomised(small(base=4), 1).eval(), torch.rand(2, 2, 16, 16, 16)
    exact = net(x).detach()
    for precision, tolerance in (('fp32', 1e-5), ('bf16', 0.03)):
        net.zero_grad()
        assert u3.choose_unet3d_mode(net, x.shape, precision) is net and net.mode == {'fp32': FP32_LAST, 'bf16': BF16_LAST}[precision]
        logits = net(x)
        assert logits.dtype == torch.float32
        assert (logits - exact).square().mean().sqrt() < tolerance * exact.std()
        u3.soft_dice_loss(logits, torch.ones(2, 3, 16, 16, 16)).backward()
        assert all(p.dtype == torch.float32 == p.grad.dtype for p in net.parameters())
    assert net.encoder['1'].conv_in.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_choosing_leaves_the_network_alone(tmp_path):
    net = small()
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    u3.choose_unet3d_mode(net, (1, 2, 12, 12, 12), 'auto', tmp_path / 'modes.json')
    assert net.mode in (FP32, FP32_LAST, BF16_LAST) and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters()) and net.training
    again = small()
    assert u3.choose_unet3d_mode(again, (1, 2, 12, 12, 12), 'auto', tmp_path / 'modes.json').mode == net.mode # remembered
    with pytest.raises(ValueError, match='needs a `cache`'): u3.choose_unet3d_mode(net, (1, 2, 12, 12, 12))
    with pytest.raises(ValueError, match="'fp32', 'bf16' or 'auto'"): u3.choose_unet3d_mode(net, (1, 2, 12, 12, 12), 'fp16')


# Volumes

def test_whole_volume_is_the_network():
    net, x = randomised(small()), torch.rand(2, 13, 10, 11)
    p = u3.predict_volume(net, x)
    assert net.training and p.shape == (3, 13, 10, 11) and p.dtype == torch.float32 and not p.requires_grad
    with torch.no_grad(): assert torch.equal(p, net.eval()(x[None]).sigmoid()[0])


def test_windows_are_blended_right():
    "Two windows along one axis: outside their overlap each has the say, inside it lies between."
    net, x = randomised(small()).eval(), torch.rand(2, 12, 12, 18)
    p = u3.predict_volume(net, x, (12, 12, 12), overlap=0.5)
    left, right = u3.predict_volume(net, x[..., :12]), u3.predict_volume(net, x[..., 6:])
    torch.testing.assert_close(p[..., :6], left[..., :6], rtol=0, atol=1e-5)
    torch.testing.assert_close(p[..., 12:], right[..., 6:], rtol=0, atol=1e-5)
    low, high = torch.minimum(left[..., 6:], right[..., :6]), torch.maximum(left[..., 6:], right[..., :6])
    assert (p[..., 6:12] >= low - 1e-5).all() and (p[..., 6:12] <= high + 1e-5).all()


@pytest.mark.parametrize('window', [(8, 8, 8), (16, 8, 8), (64, 64, 64)])
def test_windows_of_a_voxelwise_network(window):
    net, x = nn.Conv3d(2, 3, 1), torch.rand(2, 13, 9, 20)
    with torch.no_grad(): expected = net(x[None])[0].sigmoid()
    for batch in (1, 4): torch.testing.assert_close(u3.predict_volume(net, x, window, 0.25, batch), expected)


def test_volumes_of_all_kinds(tmp_path):
    net, x = small(), np.random.default_rng(0).random((2, 9, 8, 10)).astype(np.float16)
    file = np.lib.format.open_memmap(tmp_path / 'x.npy', 'w+', np.float16, x.shape); file[:] = x; del file
    with warnings.catch_warnings(action='error'):
        maps = [u3.predict_volume(net, v) for v in (x, np.load(tmp_path / 'x.npy', mmap_mode='r'), torch.tensor(x), TensorImage(torch.tensor(x)))]
    assert all(torch.equal(m, maps[0]) and type(m) is torch.Tensor for m in maps)
    for bad in (x[0], x[None]):
        with pytest.raises(ValueError, match='a volume is'): u3.predict_volume(net, bad)


@pytest.mark.parametrize('shape', [(2, 2, 2), (2, 4, 4), (1, 3, 3), (3, 3, 3)])
def test_kernel_gradients_of_thin_inputs_survive_bf16(shape):
    "PyTorch's own bf16 gradient is wrong where the first axis has two voxels."
    torch.manual_seed(0)
    block, x, up = u3.ConvBlock(64, 64), torch.randn(2, 64, *shape), torch.randn(2, 64, *shape)
    exact = torch.autograd.grad((block(x)*up).sum(), block.conv.weight)[0]
    for _ in range(5):  # Its error depends on what lies in memory
        with torch.autocast('cpu', torch.bfloat16): y = block(x)
        found = torch.autograd.grad((y.float()*up).sum(), block.conv.weight)[0]
        assert (found - exact).norm() < .05*exact.norm()


def test_xavier_leaves_other_layers_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.PReLU(init=0.3), nn.LayerNorm((4, 4)))
    net.gain = nn.Parameter(torch.tensor([2.]))
    nn.init.normal_(net[2].weight)
    u3.xavier_(net, 0)
    assert net[1].weight.item() == pytest.approx(0.3) and net.gain.item() == 2 and (net[2].weight == 1).all() and not net[0].bias.any()


def test_a_fisher_information_is_averaged_and_not_scaled():
    class Information: # as `transfer.fisher.Fisher` holds it
        def __init__(self, values): self.values = values
    source, target = small(in_channels=2), small(in_channels=4)
    values = {k: torch.rand_like(p) for k, p in u3.shared_parameters(source).items()}
    first = 'encoder.0.conv_in.conv.weight'
    for given, flags in ((values, dict(fisher=True)), (Information(values), {})):
        found = u3.transferable(target, given, first_conv='adapt', **flags)[0]
        torch.testing.assert_close(found[first], values[first].mean(1, keepdim=True).expand(-1, 4, -1, -1, -1))
    torch.testing.assert_close(u3.transferable(target, values, first_conv='adapt')[0][first], found[first] / 2)
    assert all(torch.equal(found[k], v) for k, v in values.items() if k != first)
