"""Colour modules, encoders and cards against closed forms, other networks and damaged files."""
import copy, random

import pytest, timm, torch
from torch import nn
from torch.nn import functional as F

from medxfer_nb.models import colorize as cz, precision as pr

COLOUR = ('deconv', 'pixelshuffle', 'coloru')

def count(module): return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('name, n', [('deconv', 596_611), ('pixelshuffle', 599_440), ('coloru', 192_659), ('affine', 6), ('none', 0), ('weight_sum', 0)])
def test_parameter_counts(name, n): assert count(cz.new_colorizer(name)) == n


@pytest.mark.parametrize('name', [n for n in cz.COLORIZERS if n != 'weight_sum'])
@pytest.mark.parametrize('channels, size', [(1, (8, 8)), (1, (72, 40)), (4, (32, 104))])
def test_any_size_divisible_by_8(name, channels, size):
    T = cz.new_colorizer(name, channels).eval()
    with torch.no_grad(): assert T(torch.randn(2, channels, *size)).shape == (2, 3, *size)
    for bad in [(2, channels, size[0] + 4, size[1]), (2, channels + 1, *size), (channels, *size), (2, channels, 0, 8)]:
        with pytest.raises(ValueError, match='divisible by 8'): T(torch.zeros(bad))


def reference(name, T, x):
    "The three modules written out with functions, from Section III.B, reading the weights in order."
    w = iter(T.state_dict().items())
    def layer():
        values = []
        for key, v in w:
            values.append(v)
            if key.endswith('num_batches_tracked') or key == 'upsample.weight': break
            if key.endswith('bias') and v.ndim == 1 and values[0].ndim == 4: break
        return values
    lrelu = lambda x: F.leaky_relu(x, 0.01)
    conv = lambda x, s=1, p=0: F.conv2d(x, *layer(), stride=s, padding=p)
    def bn(x):
        scale, shift, mean, var, _ = layer()
        c = lambda v: v[None, :, None, None]
        return (x - c(mean)) / torch.sqrt(c(var) + 1e-5) * c(scale) + c(shift)
    if name == 'coloru':
        down = lambda x: bn(lrelu(conv(lrelu(conv(x, 1, 1)), 2, 1)))
        deconv = lambda x: lrelu(F.conv_transpose2d(x, *layer(), stride=2, padding=1))
        up = lambda x: bn(lrelu(conv(lrelu(conv(deconv(x), 1, 1)), 1, 1)))
        a = down(x); b = down(a); c = down(b)
        d = torch.cat([b, up(c)], 1)
        e = torch.cat([a, up(d)], 1)
        return conv(lrelu(conv(deconv(e), 1, 1)))
    x = F.max_pool2d(lrelu(bn(conv(x, 2, 2))), 3, 2, 1)
    for _ in range(8): x = x + lrelu(bn(conv(lrelu(bn(conv(x, 1, 1))), 1, 1)))
    if name == 'deconv': return F.conv_transpose2d(conv(x), layer()[0], stride=4, padding=2, groups=3)
    x = bn(conv(x))
    B, _, h, width = x.shape
    x = x.view(B, 3, 4, 4, h, width).permute(0, 1, 4, 2, 5, 3).reshape(B, 3, 4 * h, 4 * width)
    return F.avg_pool2d(F.pad(x, (1, 0, 1, 0), mode='replicate'), 2, 1)


@pytest.mark.parametrize('name', COLOUR)
def test_forward_against_functions(name):
    torch.manual_seed(0)
    T = cz.new_colorizer(name)
    T(torch.randn(4, 1, 32, 32)) # running statistics that are not 0 and 1
    T, x = T.eval().double(), torch.randn(2, 1, 32, 48).double()
    with torch.no_grad(): torch.testing.assert_close(T(x), reference(name, T, x), rtol=1e-9, atol=1e-9)


def test_pixelshuffle_starts_without_checkerboard():
    T = cz.PixelShuffle().train()
    with torch.no_grad(): subpixels = T.to_subpixels(T.body(torch.randn(2, 1, 16, 16))).view(2, 3, 16, 4, 4)
    assert torch.equal(subpixels, subpixels[:, :, :1].expand_as(subpixels))


@pytest.mark.parametrize('name', ['resnet18', 'tf_efficientnet_lite0', 'densenet121', 'convnext_atto'])
@pytest.mark.parametrize('channels', [1, 3])
def test_weight_sum_equals_replicate(name, channels):
    torch.manual_seed(0)
    E = timm.create_model(name, num_classes=0).eval().double()
    x = torch.randn(2, channels, 64, 64).double()
    with torch.no_grad():
        expected = E(cz.Replicate(channels)(x))
        got = cz.sum_first_conv(copy.deepcopy(E), channels)(cz.WeightSum(channels)(x))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('name, options', [('resnet18', {}), ('densenet121', {}), ('tf_efficientnet_lite0', {}), ('mobilenetv3_small_050', {}),
                                           ('convnext_atto', {}), ('vit_tiny_patch16_224', dict(img_size=64))])
def test_any_backbone(name, options):
    net = cz.colorized_net('coloru', name, 3, **options)
    net(torch.randn(2, 1, 64, 64)).sum().backward()
    T, E, C = cz.split_TEC(net)
    assert sum(map(len, (T, E, C))) == len(list(net.parameters())) == len({*T, *E, *C})
    assert all(p.grad is not None for p in T + C)


@pytest.mark.parametrize('name', ['nf_resnet26', 'resnetv2_50x1_bit'])
def test_weight_sum_of_standardised_weights(name):
    E = timm.create_model(name, num_classes=0)
    before, rng = {k: v.clone() for k, v in E.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ValueError, match="take the colour module 'none' instead"): cz.sum_first_conv(E)
    assert all(torch.equal(v, before[k]) for k, v in E.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    assert E(torch.zeros(1, 3, 64, 64)).ndim == 2 # still the network it was
    cz.colorized_net('none', name, 2)


def test_measuring_keeps_the_mode_of_each_layer():
    E = timm.create_model('resnet18', num_classes=0)
    E.layer1.eval()
    modes = [m.training for m in E.modules()]
    assert cz.feature_width(E) == 512 and cz.gmacs(E, (3, 64, 64)) > 0
    assert modes == [m.training for m in E.modules()] and len(set(modes)) == 2


def test_weights_of_a_classifier_load_strictly(tmp_path):
    full = timm.create_model('densenet121')
    file = tmp_path/'densenet.pth'
    torch.save({'state_dict': full.state_dict()}, file)
    E = cz.load_backbone('densenet121', file)
    assert all(torch.equal(v, full.state_dict()[k]) for k, v in E.state_dict().items())
    state = full.state_dict()
    state['extra.weight'] = state.pop('features.conv0.weight')
    with pytest.raises(ValueError, match=r'missing features.conv0.weight \(64, 3, 7, 7\); left over extra.weight'): cz.load_backbone('densenet121', state)


def test_no_code_is_unpickled(tmp_path):
    class Payload:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    torch.save({'weight': Payload()}, tmp_path/'evil.pth')
    torch.save(nn.Linear(2, 2), tmp_path/'module.pth')
    (tmp_path/'text.pth').write_text('not weights')
    for file, why in dict(evil='holds a pickled module, not a state dict', module='holds a pickled module, not a state dict', text='is damaged').items():
        with pytest.raises(ValueError, match=f'{file}.pth {why}') as e: cz.read_weights(tmp_path/f'{file}.pth')
        assert 'weights_only' not in str(e.value) and e.value.__suppress_context__
    assert not (tmp_path/'ran').exists()


def test_lite_renaming_inverts():
    model = timm.create_model('tf_efficientnet_lite1')
    back = {v: k for k, v in dict(conv_stem='_conv_stem', bn1='_bn0', conv_head='_conv_head', bn2='_bn1', classifier='_fc').items()}
    places = [(s, b) for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    plain = dict(conv_dw='_depthwise_conv', bn1='_bn1', conv_pw='_project_conv', bn2='_bn2')
    wide = dict(conv_pw='_expand_conv', bn1='_bn0', conv_dw='_depthwise_conv', bn2='_bn1', conv_pwl='_project_conv', bn3='_bn2')
    old, forward = {}, {v: k for k, v in back.items()}
    for key, v in model.state_dict().items():
        head, *rest = key.split('.')
        if head == 'blocks':
            s, b, layer, leaf = int(rest[0]), int(rest[1]), rest[2], rest[3]
            names = wide if hasattr(model.blocks[s][b], 'conv_pwl') else plain
            old[f'_blocks.{places.index((s, b))}.{names[layer]}.{leaf}'] = v
        else: old['.'.join([forward[head], *rest])] = v
    renamed = cz.lite_state_dict(old, model)
    assert renamed.keys() == model.state_dict().keys()
    assert all(renamed[k] is v or torch.equal(renamed[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name', list(cz.COLORIZERS))
def test_save_and_load(name, tmp_path):
    T = cz.new_colorizer(name, 2)
    cz.save_colorizer(T, tmp_path/'sub'/'T', 0.5, 0.25, 'noise', 'CC0')
    again = cz.load_colorizer(tmp_path/'sub'/'T')
    assert type(again) is type(T) and again.in_channels == 2 and (again.card.mean, again.card.std) == (0.5, 0.25)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in T.state_dict().items())


# The layer names of the authors' files
RENAMES = {'deconv': [('body.0.', 'conv1.'), ('body.1.', 'bn1.'), ('to_rgb.', 'conv_last.'), ('upsample.', 'deconv.')],
           'pixelshuffle': [('body.0.', 'conv1.'), ('body.1.', 'bn1.'), ('to_subpixels.', 'pixel_shuffle.conv.')],
           'coloru': [('down', 'dw'), ('.', '.d.')]}

@pytest.mark.parametrize('name', COLOUR)
@pytest.mark.parametrize('prefix', ['', 'deco.'])
def test_released_modules(name, prefix, tmp_path):
    T, state = cz.new_colorizer(name), {}
    for p in T.parameters(): nn.init.normal_(p)
    for key, v in T.state_dict().items():
        for i in range(8): # body.4 is the first block: conv, bn, act, conv, bn, act
            for j, new in {0: 'conv1.0', 1: 'conv1.1', 3: 'conv2.0', 4: 'conv2.1'}.items(): key = key.replace(f'body.{i + 4}.f.{j}.', f'resblocks.{i}.{new}.')
        for a, b in RENAMES[name]: key = key.replace(a, b, 1)
        state[prefix + key] = v
    if prefix: state['pt_model.conv1.weight'] = torch.zeros(64, 3, 7, 7)
    torch.save(state, tmp_path/'released.pth')
    again = cz.load_colorizer(tmp_path/'released.pth', name)
    assert again.card is None and all(torch.equal(v, again.state_dict()[k]) for k, v in T.state_dict().items())
    del state[list(state)[0]]
    torch.save(state, tmp_path/'released.pth')
    with pytest.raises(ValueError, match='weights do not fit'): cz.load_colorizer(tmp_path/'released.pth', name)


@pytest.mark.parametrize('name', COLOUR)
def test_own_weights_without_card(name, tmp_path):
    T = cz.new_colorizer(name)
    for p in T.parameters(): nn.init.normal_(p)
    own = T.state_dict()
    cz.save_colorizer(T, tmp_path/'T', 0.5, 0.25, 'noise', 'CC0')
    (tmp_path/'T.json').unlink()
    shuffled = {k: own[k] for k in random.Random(0).sample(list(own), len(own))}
    torch.save({f'module.deco.{k}': v for k, v in shuffled.items()}, tmp_path/'shuffled.pth')
    for file in ('T', 'T.safetensors', 'shuffled.pth'):
        again = cz.load_colorizer(tmp_path/file, name).state_dict()
        assert all(torch.equal(v, again[k]) for k, v in own.items())
    cz.save_file({f'u.{k}': v for k, v in own.items()}, tmp_path/'foreign.safetensors')
    with pytest.raises(ValueError, match='keep the order.*original .pth'): cz.load_colorizer(tmp_path/'foreign', name)
    foreign = {f'u.{k}': own[k] for k in reversed(own)}
    with pytest.raises(ValueError, match='the order of the layers was lost'): cz.match_layers(foreign, T)


def test_names_with_dots(tmp_path):
    for lr in (0.1, 0.2): cz.save_colorizer(cz.Affine(), tmp_path/f'T-lr{lr}', lr, 0.25, 'noise', 'CC0')
    cz.save_colorizer(cz.Affine(), tmp_path/'T.safetensors', 0.3, 0.25, 'noise', 'CC0')
    assert sorted(p.name for p in tmp_path.iterdir()) == [f'{n}.{s}' for n in ('T-lr0.1', 'T-lr0.2', 'T') for s in ('json', 'safetensors')]
    for name, mean in {'T-lr0.1': 0.1, 'T-lr0.2.json': 0.2, 'T-lr0.2.safetensors': 0.2, 'T': 0.3}.items():
        assert cz.load_colorizer(tmp_path/name).card.mean == mean
    with pytest.raises(ValueError, match='leave .pth away'): cz.save_colorizer(cz.Affine(), tmp_path/'T.pth', 0.3, 0.25, 'noise', 'CC0')


def test_interrupted_save_leaves_the_old_pair(tmp_path, monkeypatch):
    cz.save_colorizer(cz.Affine(), tmp_path/'T', 0.5, 0.25, 'old', 'CC0')
    def full(state, file): file.write_bytes(b'half'); raise OSError('disk full')
    monkeypatch.setattr(cz, 'save_file', full)
    with pytest.raises(OSError): cz.save_colorizer(cz.Affine(), tmp_path/'T', 0.1, 0.25, 'new', 'CC0')
    assert cz.load_colorizer(tmp_path/'T').card.trained_on == 'old'


def test_cards_are_checked(tmp_path):
    good = dict(module='coloru', in_channels=1, mean=0.5, std=0.2, trained_on='noise', licence='CC0')
    for field, bad in dict(module='unet', in_channels=0, mean=float('nan'), std=-1, trained_on=' ', licence=None).items():
        with pytest.raises(ValueError, match='card'): cz.Card(**{**good, field: bad})
    cz.save_colorizer(cz.ColorU(), tmp_path/'T', 0.5, 0.2, 'noise', 'CC0')
    with pytest.raises(ValueError, match='holds a coloru, not a deconv'): cz.load_colorizer(tmp_path/'T', 'deconv')
    with pytest.raises(ValueError, match='card: module'): cz.save_colorizer(nn.Linear(1, 1), tmp_path/'L', 0.5, 0.2, 'noise', 'CC0')


def test_gmacs_by_hand():
    conv = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2), nn.Flatten(), nn.Linear(6 * 16 * 16, 5))
    by_hand = 8 * 2 * 9 * 64 + 8 * 3 * 16 * 64 + 6 * 16 * 16 * 5
    assert cz.gmacs(conv, (4, 8, 8)) == pytest.approx(by_hand / 1e9)
    assert conv.training


def test_parts_keep_their_dtypes():
    net = pr.set_modes(cz.colorized_net('pixelshuffle', 'resnet18', 2), {'T': pr.BF16_LAST, 'E': pr.FP32_LAST})
    seen = {}
    net.T.body[0].register_forward_hook(lambda m, i, o: seen.update(T=o.dtype))
    net.E.conv1.register_forward_hook(lambda m, i, o: seen.update(E=o.dtype, into_E=i[0].dtype))
    assert net(torch.randn(2, 1, 32, 32)).dtype == torch.float32
    assert seen == dict(T=torch.bfloat16, E=torch.float32, into_E=torch.float32)
    twin = copy.deepcopy(net)
    twin.load_state_dict(net.state_dict())
    assert twin.modes == net.modes


def test_precision_is_decided_once(tmp_path, monkeypatch):
    net, file = cz.colorized_net('affine', 'resnet18', 2), tmp_path/'precision.json'
    calls = []
    fake = lambda part, shape, input_grad=True: calls.append(shape) or {pr.FP32: 3.0, pr.FP32_LAST: 2.0, pr.BF16_LAST: 1.0}
    monkeypatch.setattr(pr, 'probe', fake)
    for _ in range(2): assert pr.choose_modes(net, (2, 1, 32, 32), cache=file).modes == {'T': pr.BF16_LAST, 'E': pr.BF16_LAST, 'C': pr.FP32}
    assert calls == [(2, 1, 32, 32), (2, 3, 32, 32)]
    pr.choose_modes(net, (4, 1, 32, 32), cache=file)
    assert len(calls) == 4
