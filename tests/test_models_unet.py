"""U-Net and HydraNet against functions written out, hooks, hand-made losses and plain loops; weights that do not fit."""
import copy, pickle
from functools import partial
from itertools import cycle

import pytest, timm, torch
from fastai.callback import progress # no_bar
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam
from fastai.vision.core import TensorImageBW, TensorMask
from torch import nn
from torch.nn import functional as F

from medxfer_nb.models import hydra as hy, unet as un
from medxfer_nb.models.colorize import load_backbone, read_weights
from medxfer_nb.models.precision import BF16_LAST, FP32, FP32_LAST, set_modes
from medxfer_nb.transfer.stages import reset_part, seed_epoch, untouched

BACKBONES = ('tf_efficientnet_lite0', 'densenet121', 'resnet18', 'convnext_atto')
NARROW = (32, 16, 16, 8, 8)
CPU = torch.device('cpu')


def small(name='resnet18', n_classes=3, **kwargs):
    torch.manual_seed(0)
    return un.unet(name, n_classes, decoder_channels=NARROW, **kwargs)


def batches(n, bs=2, size=32, classes=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [(torch.rand(bs, 1, size, size, generator=rng), torch.randint(0, classes, (bs, size, size), generator=rng)) for _ in range(n)]


# The U-Net

@pytest.mark.parametrize('name', BACKBONES)
def test_encoder_is_the_timm_network(name):
    model, plain = small(name), timm.create_model(name, num_classes=0)
    assert list(model.encoder.state_dict()) == list(plain.state_dict())
    classifier = timm.create_model(name) # a whole classifier's weights fit too
    again = small(name, pretrained=classifier.state_dict())
    assert all(torch.equal(v, classifier.state_dict()[k]) for k, v in again.encoder.state_dict().items())


@pytest.mark.parametrize('name', BACKBONES)
def test_maps_are_the_ones_that_timm_describes(name):
    "Against hooks on the modules in `feature_info`, and its channels and reductions."
    model, seen = small(name).eval(), {}
    info = [i for i in model.encoder.feature_info if i['reduction'] > 1]
    for i in info: model.encoder.get_submodule(i['module']).register_forward_hook(lambda m, x, y, at=i['module']: seen.__setitem__(at, y.clone()))
    with torch.no_grad(): maps = model.encode(torch.rand(2, 1, 64, 96))
    assert len(maps) == len(info)
    for m, i in zip(maps, info):
        assert torch.equal(m, seen[i['module']])
        assert m.shape == (2, i['num_chs'], 64 // i['reduction'], 96 // i['reduction'])


@pytest.mark.parametrize('name', BACKBONES)
def test_any_size_and_gradients(name):
    "Backward fails if a skip was changed in place; only layers behind the last map get no gradient."
    model = small(name)
    for size in [(64, 64), (65, 31), (7, 90)]:
        model.zero_grad()
        logits = model(torch.rand(2, 1, *size))
        assert logits.shape == (2, 3, *size) and logits.dtype == torch.float32
        logits.square().mean().backward()
        unused = [k for k, p in model.named_parameters() if p.grad is None]
        assert all(k.startswith(('encoder.conv_head', 'encoder.bn2', 'encoder.head')) for k in unused), unused


@pytest.mark.parametrize('size', [(40, 64), (63, 33), (32, 31)])
def test_padding_repeats_the_border(size):
    model, x = small().eval(), torch.rand(1, 1, *size)
    rows, columns = (torch.arange(-(-s // 32) * 32).clamp(max=s - 1) for s in size)
    with torch.no_grad(): torch.testing.assert_close(model(x), model(x[:, :, rows][..., columns])[..., :size[0], :size[1]], rtol=0, atol=1e-6)


def by_hand(model, maps):
    "Decoder and head written out with functions, reading the weights in order (Section II.A)."
    weights = iter({k: v for k, v in model.state_dict().items() if k.startswith(('decoder.', 'head.')) and not k.endswith('num_batches_tracked')}.values())
    take = lambda n: [next(weights) for _ in range(n)]
    def conv(x):
        x = F.conv2d(x, *take(1), padding=1)
        scale, shift, mean, var = (v[:, None, None] for v in take(4))
        return F.relu((x - mean) / (var + 1e-5).sqrt() * scale + shift)
    sizes = {m.shape[-1]: m for m in maps[:-1]}
    x = maps[-1]
    for _ in model.decoder.blocks:
        x = F.conv_transpose2d(x, *take(2), stride=2)
        if x.shape[-1] in sizes: x = torch.cat([x, sizes[x.shape[-1]]], 1)
        x = conv(conv(x))
    return F.conv2d(x, *take(2))


@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto', 'vgg11']) # five levels, no fine ones, one at full resolution
def test_forward_against_functions(name):
    model = small(name)
    model(torch.rand(4, 1, 64, 64)) # running statistics that are not 0 and 1
    model, x = model.eval(), torch.rand(2, 1, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(model(x), by_hand(model, model.encode(x)), rtol=1e-4, atol=1e-5)


def test_transformer_has_one_level():
    model = un.unet('vit_tiny_patch16_224', 2, img_size=64).eval()
    assert [l.halvings for l in un.feature_levels(model.encoder)] == [4] and len(model.decoder.blocks) == 4
    with torch.no_grad(): assert model(torch.rand(1, 1, 60, 64)).shape == (1, 2, 60, 64)


def test_valid_convolutions_are_resized():
    "Inception's maps are no exact halves of each other."
    model = small('inception_v3').eval()
    with torch.no_grad(): assert model(torch.rand(1, 1, 99, 128)).shape == (1, 3, 99, 128)


@pytest.mark.parametrize('colour', ['none', 'weight_sum', 'affine', 'pixelshuffle', 'coloru'])
def test_colour_modules_and_groups(colour):
    model = small(colour=colour)
    groups = un.split_encoder_decoder(model)
    names = {id(p): k for k, p in model.named_parameters()}
    assert [{names[id(p)].split('.')[0] for p in g} for g in groups] == [{'encoder'} | ({'T'} if colour not in ('none', 'weight_sum') else set()), {'decoder', 'head'}]
    assert sorted(id(p) for g in groups for p in g) == sorted(names)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 3, 32, 32)


def test_weight_sum_equals_replicate():
    a, b = small(colour='none').eval(), small(colour='weight_sum').eval()
    b.decoder.load_state_dict(a.decoder.state_dict()); b.head.load_state_dict(a.head.state_dict())
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(a(x), b(x), rtol=1e-4, atol=1e-4)


def test_bad_input():
    model = small()
    for shape in [(1, 32, 32), (2, 3, 32, 32), (2, 1, 0, 32)]:
        with pytest.raises(ValueError, match='takes \\(B, 1, H, W\\)'): model(torch.zeros(shape))
    with pytest.raises(ValueError, match='2 classes or more'): small(n_classes=1)
    with pytest.raises(ValueError, match='give 5 decoder_channels'): un.unet('resnet18', 2, decoder_channels=(16, 8))
    with pytest.raises(ValueError, match='timm has no architecture'): small('resnet81')
    with pytest.raises(ValueError, match='no colour module'): small(colour='sepia')


def test_decoder_starts_anew():
    model, other = small(), small()
    for m in (model, other): reset_part(nn.ModuleList([m.decoder, m.head]), 7)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items() if k.startswith(('decoder', 'head')))
    assert not torch.equal(model.head.weight, small().head.weight)


def test_fastai_types_do_not_spread():
    model = small()
    assert type(model(TensorImageBW(torch.rand(2, 1, 32, 32)))) is torch.Tensor


# Loss and prediction

def test_class_weights_and_loss():
    counts = torch.tensor([7000, 250, 31])
    w = un.class_weights(counts)
    torch.testing.assert_close(w, torch.tensor([7281 / (3 * n) for n in counts.tolist()]))
    logits, masks = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randint(0, 3, (2, 6, 5))
    loss = un.weighted_cross_entropy(w)(logits, TensorMask(masks.byte()))
    assert type(loss) is torch.Tensor
    total = norm = 0.
    for b in range(2): # by hand, pixel by pixel
        for i in range(6):
            for j in range(5):
                c = int(masks[b, i, j])
                total += -float(w[c]) * float(logits[b, :, i, j].detach().log_softmax(0)[c]); norm += float(w[c])
    assert abs(loss.item() - total / norm) < 1e-5
    assert loss == nn.CrossEntropyLoss(weight=w)(logits, masks)
    assert pickle.loads(pickle.dumps(un.weighted_cross_entropy(w)))(logits, masks) == loss


@pytest.mark.parametrize('counts, message', [([5, 0], 'no pixel of class 1'), ([5], '2 classes'), ([5, -1], '2 classes'), ([[1, 2]], '2 classes'), ([1, float('nan')], '2 classes')])
def test_bad_counts(counts, message):
    with pytest.raises(ValueError, match=message): un.class_weights(counts)


def test_predictions_stream():
    model, asked = small(), []
    model.encoder.eval()
    def feed():
        for i in range(3): asked.append(i); yield torch.rand(2, 1, 20, 20), 'mask'
    stream = un.predict_slices(model, feed())
    p = next(stream)
    assert asked == [0] and torch.is_grad_enabled() and model.training and not model.encoder.training
    torch.testing.assert_close(p.sum(1), torch.ones(2, 20, 20))
    assert sum(1 for _ in stream) == 2 and p.device == CPU


# Precision

@pytest.mark.parametrize('name', ['resnet18', 'tf_efficientnet_lite0'])
def test_modes_change_speed_only(name):
    model, x = small(name), torch.rand(2, 1, 40, 32)
    model(x)
    model.eval()
    with torch.no_grad(): exact = model(x)
    for encoder in (FP32_LAST, BF16_LAST):
        for decoder in (FP32_LAST, BF16_LAST):
            set_modes(model, {'encoder': encoder, 'decoder': decoder})
            logits = model(x)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, exact, rtol=0.1, atol=0.1 if BF16_LAST in (encoder, decoder) else 1e-4)
            logits.sum().backward()
    assert all(p.dtype == torch.float32 == p.grad.dtype for p in model.decoder.parameters())


def test_choose_modes_leaves_the_model_alone(tmp_path):
    model = hy.hydra('resnet18', {'a': 2, 'b': 3}, colour='affine', decoder_channels=NARROW)
    before = copy.deepcopy(model.state_dict())
    un.choose_unet_modes(model, (2, 1, 32, 32), 'auto', tmp_path / 'modes.json')
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    chosen = dict(model.modes)
    assert un.choose_unet_modes(model, (2, 1, 32, 32), 'auto', tmp_path / 'modes.json').modes == chosen # remembered
    assert un.choose_unet_modes(model, (2, 1, 32, 32), 'bf16').modes == {'T': BF16_LAST, 'encoder': BF16_LAST, 'decoder': BF16_LAST, 'head': FP32}


# HydraNet

def net():
    torch.manual_seed(0)
    return hy.hydra('test_resnet', {'organs': 4, 'bones': 2, 'vessels': 3}, decoder_channels=NARROW, zero_init_last=False)


def test_one_decoder_per_task():
    h, x = net(), torch.rand(2, 1, 33, 40)
    for i, (task, n) in enumerate({'organs': 4, 'bones': 2, 'vessels': 3}.items()):
        h.zero_grad()
        logits = h(x, task)
        assert logits.shape == (2, n, 33, 40)
        logits.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in h.encoder.parameters())
        for k in range(3):
            own = [p.grad is not None and bool(p.grad.any()) for p in h.head[k].parameters()]
            assert own == [k == i] * 2
            assert any(p.grad is not None for p in h.decoder[k].parameters()) == (k == i)
    for same in (1, torch.tensor(1)):
        h.eval()
        with torch.no_grad(): assert torch.equal(h(x, same), h(x, 'bones'))
    for bad in ('Bones', 3, -1):
        with pytest.raises(ValueError, match='no task'): h(x, bad)


def test_a_task_of_a_hydra_is_a_unet():
    h = net().eval()
    one = small('test_resnet', 2).eval()
    hy.load_encoder(one, h)
    one.decoder.load_state_dict(h.decoder[1].state_dict()); one.head.load_state_dict(h.head[1].state_dict())
    x = torch.rand(2, 1, 48, 32)
    with torch.no_grad(): assert torch.equal(one(x), h(x, 'bones'))


def test_turns_are_fixed_and_continue():
    class Stream: # its batches are a function of the epoch, like the loaders of this library
        def __init__(self, name, n): self.name, self.n, self.epoch = name, n, 0
        def __len__(self): return self.n
        def __iter__(self):
            e = self.epoch
            for i in range(self.n): yield (self.name, e, i), i
            self.epoch += 1
    alternating = hy.AlternatingLoader({'a': Stream('a', 4), 'b': Stream('b', 2), 'c': Stream('c', 3)})
    assert len(alternating) == 12
    first, second = list(alternating), list(alternating)
    assert [b[1] for b in first + second] == [t for t, _ in zip(cycle('abc'), range(24))] == [b[3] for b in first + second]
    seen = {t: [b[0][1:] for b in first + second if b[1] == t] for t in 'abc'}
    assert seen['a'] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert seen['b'] == [(e, i) for e in range(4) for i in range(2)] # two passes an epoch
    assert seen['c'] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0)]
    alternating.epoch = 1
    assert list(alternating) == second # a resumed run gets the same batches
    once = hy.AlternatingLoader({'a': Stream('a', 2), 'b': Stream('b', 3)}, endless=False)
    assert [b[1] for b in once] == ['a', 'b', 'a', 'b', 'b'] and len(once) == 5


def learner(h=None, cbs=()):
    tasks = {'organs': 4, 'bones': 2, 'vessels': 3}
    loaders = {t: DataLoader([(x[0], y[0]) for x, y in batches(6, 1, classes=n, seed=i)], bs=2 + i) for i, (t, n) in enumerate(tasks.items())}
    dls = DataLoaders(hy.AlternatingLoader(loaders), hy.AlternatingLoader(loaders, endless=False), device=CPU)
    loss = hy.hydra_loss({t: torch.ones(n) for t, n in tasks.items()})
    return Learner(dls, h or net(), loss_func=loss, opt_func=partial(SGD, mom=0.), splitter=un.split_encoder_decoder, wd=0, cbs=list(cbs))


def test_plain_learner_equals_a_plain_loop():
    learn, reference = learner(), net()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.05)
    opt = torch.optim.SGD(reference.parameters(), 0.05)
    reference.train()
    for x, task, y, _ in learn.dls.train:
        opt.zero_grad()
        F.cross_entropy(reference(x, task), y).backward()
        opt.step()
    for (k, v), other in zip(learn.model.state_dict().items(), reference.state_dict().values()):
        torch.testing.assert_close(v, other, rtol=1e-4, atol=1e-5, msg=k)
    assert all(torch.isfinite(torch.tensor(float(v))) for v in learn.recorder.values[0])


@pytest.mark.parametrize('opt', [partial(SGD, mom=0.9), Adam])
def test_decoders_move_in_their_own_steps_only(opt):
    "fastai leaves zero gradients behind, so momentum, weight decay and Adam would go on without `OwnSteps`."
    class Watch(Callback):
        def before_fit(self): self.moved, self.state = [], [copy.deepcopy(d.state_dict()) for d in self.model.decoder]
        def after_step(self):
            state = [copy.deepcopy(d.state_dict()) for d in self.model.decoder]
            self.moved.append([any(not torch.equal(v, was[k]) for k, v in now.items()) for now, was in zip(state, self.state)])
            self.state = state
    turns = [[k == i % 3 for k in range(3)] for i in range(9)]
    for cbs, own in ([[hy.OwnSteps()], True], [[], False]):
        learn = learner(cbs=cbs)
        learn.opt_func, learn.wd, watch = opt, 0.1, Watch()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01, cbs=watch)
        assert (watch.moved == turns) == own


def test_seeded_epochs_repeat_their_batches():
    "A resumed run sees the batches it would have seen, whatever ran before; a try-out leaves no trace."
    learn = learner()
    items = [(torch.full((1, 32, 32), float(i)), torch.zeros(32, 32, dtype=torch.long)) for i in range(6)]
    loaders = {t: DataLoader(items, bs=2 + i, shuffle=True) for i, t in enumerate(learn.model.tasks)}
    loaders['vessels'] = torch.utils.data.DataLoader(items, batch_size=3, shuffle=True) # its order comes from torch's own generator
    learn.dls.train = hy.AlternatingLoader(loaders)
    def epoch(k): seed_epoch(learn, 3, k); return [(task, x[:, 0, 0, 0].tolist()) for x, task, *_ in learn.dls.train]
    first = [epoch(k) for k in range(3)]
    assert [epoch(k) for k in (2, 0)] == [first[2], first[0]] and first[0] != first[1]
    seed_epoch(learn, 3, 1)
    with untouched(learn), learn.no_bar(), learn.no_logging(): learn.fit(2, 0.01)
    assert learn.dls.train.epoch == 1
    torch.manual_seed((3 * 1_000_003 + 1) % 2**32) # the stages seed it anyway
    assert [(task, x[:, 0, 0, 0].tolist()) for x, task, *_ in learn.dls.train] == first[1]


def test_bad_loaders():
    with pytest.raises(ValueError, match='one loader or more'): hy.AlternatingLoader({})
    with pytest.raises(ValueError, match='no batch for b'): hy.AlternatingLoader({'a': [1], 'b': []})
    with pytest.raises(ValueError, match='no loss for task'): hy.hydra_loss({'a': [1., 2.]})(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1), 'b')


# The encoder, to transfer

@pytest.mark.parametrize('name', BACKBONES)
def test_transfer_is_exact_and_a_copy(name, tmp_path):
    h = hy.hydra(name, {'a': 2, 'b': 3}, decoder_channels=NARROW)
    h(torch.rand(2, 1, 64, 64), 'a') # statistics of BatchNorm travel too
    state, target = hy.encoder_state(set_modes(h, {'encoder': FP32_LAST})), small(name)
    assert list(state) == list(load_backbone(name).state_dict()) and all(v.is_contiguous() for v in state.values())
    torch.save(h.state_dict(), tmp_path / 'h.pth')
    for source in (state, h, {f'encoder.{k}': v for k, v in state.items()}, read_weights(tmp_path / 'h.pth')):
        reset_part(target.decoder, 1)
        for p in target.encoder.parameters(): nn.init.constant_(p, 7.)
        decoder = copy.deepcopy(target.decoder.state_dict())
        hy.load_encoder(target, source)
        assert all(torch.equal(v, state[k]) for k, v in target.encoder.state_dict().items())
        assert all(torch.equal(v, decoder[k]) for k, v in target.decoder.state_dict().items())
    with torch.no_grad(): next(h.encoder.parameters()).add_(1)
    assert torch.equal(next(iter(state.values())), next(target.encoder.parameters()))


def test_what_does_not_fit_is_listed():
    state, model = hy.encoder_state(small('resnet34')), small('resnet18')
    with pytest.raises(ValueError, match='left over layer1.2.conv1.weight'): hy.load_encoder(model, state)
    with pytest.raises(ValueError, match='missing conv1.weight'): hy.load_encoder(model, {})
    with pytest.raises(ValueError, match='conv1.weight is \\(64, 3, 7, 7\\), needs \\(64, 1, 7, 7\\)'):
        hy.load_encoder(small(colour='weight_sum'), hy.encoder_state(model))
    with pytest.raises(ValueError, match='left over mix.weight'): hy.load_encoder(model, small(colour='affine'))


def test_the_colour_module_travels_with_a_network():
    source, target = small(colour='affine'), small(colour='affine')
    with torch.no_grad(): source.T.mix.weight.fill_(3.)
    assert torch.equal(hy.load_encoder(target, source).T.mix.weight, source.T.mix.weight)
    with torch.no_grad(): target.T.mix.weight.fill_(5.)
    assert (hy.load_encoder(target, hy.encoder_state(source)).T.mix.weight == 5).all() # an encoder's weights are the encoder's only
