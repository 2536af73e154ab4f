"""Sources: every way to name weights, prefixes and misfits, identities that follow the file."""
import json

import pytest, torch
from torch import nn

from medxfer_nb.compare import sources as cs
from medxfer_nb.data.assets import ASSETS, fetch
from medxfer_nb.models.colorize import evaluating, load_backbone
from medxfer_nb.models.hydra import hydra
from medxfer_nb.models.unet3d import shared_parameters, unet3d
from medxfer_nb.transfer.fisher import Fisher, save_fisher


@pytest.fixture(scope='module')
def net(): return load_backbone('resnet10t')


@pytest.fixture
def file(tmp_path, net): return cs.save_source(net.state_dict(), tmp_path/'knee.safetensors', 'resnet10t', trained_on='knees', licence='CC0')


# Names of architectures

@pytest.mark.parametrize('name,options', [('unet3d', (8, 5)), ('unet3d-16', (16, 5)), ('unet3d-4x3', (4, 3)), ('unet3d-8x4', (8, 4))])
def test_unet3d_names_go_both_ways(name, options):
    assert tuple(cs.unet3d_options(name).values()) == options
    assert cs.unet3d_options(cs.unet3d_name(*options)) == cs.unet3d_options(name)


@pytest.mark.parametrize('name', ['unet3', 'unet3d-', 'unet3dx4', 'xunet3d', 'resnet18'])
def test_other_names_are_no_unet3d(name): assert cs.unet3d_options(name) is None


@pytest.mark.parametrize('base,depth', [(2, 2), (4, 5), (8, 5)])
@pytest.mark.parametrize('prefix', ['', 'module.', 'net.model.'])
def test_unet3d_is_recognised_under_any_prefix(base, depth, prefix):
    state = {prefix + k: v for k, v in unet3d(3, 2, base=base, depth=depth).state_dict().items()}
    assert cs.unet3d_options(cs.recognised(state)) == dict(base=base, depth=depth)


# Parsing

def test_imagenet_by_short_and_long_name():
    a, b = cs.parse_source('imagenet:lite0'), cs.parse_source('imagenet:tf_efficientnet_lite0')
    assert a == b and a.name == 'lite0' and a.path is None
    assert a.identity == ASSETS['efficientnet-lite0'].member_sha256[:16]
    assert cs.parse_source('imagenet:resnet18').identity != cs.parse_source('imagenet:resnet34').identity


def test_imagenet_weights_are_those_of_the_house():
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = load_backbone('tf_efficientnet_lite0', cs.parse_source('imagenet:lite0').weights())
    house = load_backbone('tf_efficientnet_lite0', fetch('efficientnet-lite0'))
    with evaluating(ours), evaluating(house): assert torch.equal(ours(x), house(x))


def test_the_original_port_of_lite_can_be_given_as_a_file():
    source = cs.parse_source(f'tf_efficientnet_lite0:{fetch("efficientnet-lite0")}')
    found = cs.match_body('lite', source.weights(), load_backbone('tf_efficientnet_lite0').state_dict())
    assert torch.equal(found['conv_stem.weight'], cs.parse_source('imagenet:lite0').weights()['conv_stem.weight'])


def test_no_network_is_said_with_the_way_out(monkeypatch):
    def offline(*args, **kwargs): raise ConnectionError('no route')
    monkeypatch.setattr(cs, 'load_backbone', offline)
    cs.imagenet_state.cache_clear()
    with pytest.raises(cs.SourceError, match='resnet18:FILE.safetensors'): cs.parse_source('imagenet:resnet18').weights()


def test_file_with_card_without_card_and_with_architecture_in_front(file, net, tmp_path):
    source = cs.parse_source(file)
    assert (source.name, source.architecture, source.card['trained_on'], source.fisher) == ('knee', 'resnet10t', 'knees', None)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in source.weights().items())
    file.with_suffix('.json').unlink()
    assert cs.parse_source(str(file)).architecture == 'resnet10t'
    torch.save({'state_dict': net.state_dict(), 'optimizer': {'lr': 1.}}, tmp_path/'old.pth')
    assert cs.parse_source(f'resnet10t:{tmp_path}/old.pth').weights().keys() == net.state_dict().keys()
    with pytest.raises(cs.SourceError, match='ARCHITECTURE:old.pth'): cs.parse_source(tmp_path/'old.pth')
    with pytest.raises(cs.SourceError, match='said to be resnet18'): cs.parse_source(f'resnet18:{file}')


@pytest.mark.parametrize('text,says', [('imagenet:nonsense', 'no architecture'), ('imagenet:unet3d', 'give a file'), ('lite0', 'imagenet:lite0'), ('resnet18', 'imagenet:resnet18'),
                                       ('nowhere.safetensors', 'no file'), ('weights.onnx', 'ends with'), ('', 'a source is imagenet:NAME'), ('imagenet:', 'no architecture')])
def test_what_cannot_be_understood_says_what_to_write(text, says):
    with pytest.raises(cs.SourceError, match=says): cs.parse_source(text)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path/'module.pth')
    with pytest.raises(cs.SourceError, match='pickled module'): cs.parse_source(f'resnet10t:{tmp_path}/module.pth')


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_damaged_and_empty_files(tmp_path, net, suffix):
    path = tmp_path/f'x{suffix}'
    path.write_bytes(b'\x00'*100)
    with pytest.raises(cs.SourceError, match='cannot read weights'): cs.parse_source(f'resnet10t:{path}')
    torch.save({'epoch': 3}, tmp_path/'none.pth')
    with pytest.raises(cs.SourceError, match='no tensors'): cs.parse_source(f'resnet10t:{tmp_path}/none.pth')


def test_truncated_file(file):
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(cs.SourceError, match='cannot read weights'): cs.parse_source(file)


@pytest.mark.parametrize('card', ['{', '[1]', '\xe4'])
def test_damaged_card(file, card):
    file.with_suffix('.json').write_bytes(card.encode('latin-1'))
    with pytest.raises(cs.SourceError, match='knee.json.*(repair|move)'): cs.parse_source(file)

def test_a_list_is_no_state_dict(tmp_path):
    torch.save([torch.zeros(2)], tmp_path/'a.pth')
    with pytest.raises(cs.SourceError, match='state_dict'): cs.parse_source(f'resnet10t:{tmp_path}/a.pth')

def test_numbered_names_stay_apart(tmp_path, net):
    "'a', 'a' and 'a-2' are three sources"
    files = []
    for i, name in enumerate(('x/a', 'y/a', 'z/a-2')):
        files.append(cs.save_source({k: v + i for k, v in net.state_dict().items()}, tmp_path/f'{name}.safetensors', 'resnet10t'))
    assert len({s.name for s in cs.parse_sources(files)}) == 3

def test_half_precision_is_widened(tmp_path, net):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, tmp_path/'half.pth')
    weights = cs.parse_source(f'resnet10t:{tmp_path}/half.pth').weights()
    assert {v.dtype for v in weights.values()} == {torch.float32, torch.int64}


# Identity

def test_identity_follows_weights_and_fisher_information(file, net):
    first = cs.parse_source(file)
    assert cs.parse_source(file).identity == first.identity and len(first.identity) == 16
    values = {k: torch.ones_like(p) for k, p in net.named_parameters()}
    save_fisher(Fisher(values, 4, 'sigmoid', 'true'), file.with_name('knee.fisher.safetensors'))
    second = cs.parse_source(file)
    assert second.identity != first.identity and second.fisher_values().keys() == values.keys()
    save_fisher(Fisher({k: v*2 for k, v in values.items()}, 4, 'sigmoid', 'true'), second.fisher)
    with pytest.raises(cs.SourceError, match='has changed'): second.fisher_values()
    second.fisher.unlink()
    with pytest.raises(cs.SourceError, match='no file'): second.weights()


def test_rewritten_weights_are_refused_and_leave_no_old_fisher_behind(file, net):
    cs.save_source(net.state_dict(), file, 'resnet10t', {k: torch.ones_like(p) for k, p in net.named_parameters()})
    source = cs.parse_source(file)
    cs.save_source({k: v*2 for k, v in net.state_dict().items()}, file, 'resnet10t')
    assert cs.parse_source(file).fisher is None
    with pytest.raises(cs.SourceError, match='no file|has changed'): source.weights()


def test_fisher_information_in_the_same_file(tmp_path):
    net = unet3d(2, 1, base=2, depth=2)
    state = dict(net.state_dict()) | {f'fisher.{k}': torch.ones_like(v) for k, v in shared_parameters(net).items()} | {f'adapted.{k}': v for k, v in shared_parameters(net).items()}
    source = cs.parse_source(cs.save_source(state, tmp_path/'m1.safetensors', 'unet3d-2x2'))
    assert source.fisher == source.path
    assert source.weights().keys() == net.state_dict().keys()
    assert source.fisher_values().keys() == shared_parameters(net).keys()


# Lists

def test_names_are_unique_and_lists_survive_json(tmp_path, net):
    paths = []
    for i, folder in enumerate('abc'):
        (tmp_path/folder).mkdir()
        paths.append(cs.save_source({k: v + i if v.is_floating_point() else v for k, v in net.state_dict().items()}, tmp_path/folder/'my brain, v1+.safetensors', 'resnet10t'))
    sources = cs.parse_sources(paths)
    assert [s.name for s in sources] == ['my-brain-v1', 'my-brain-v1-2', 'my-brain-v1-3']
    cs.write_sources(sources, tmp_path/'sources.json')
    again = cs.read_sources(tmp_path/'sources.json')
    assert again == sources and again[0].card == sources[0].card
    assert torch.equal(again[2].weights()['conv1.0.weight'], sources[2].weights()['conv1.0.weight'])
    with pytest.raises(cs.SourceError, match='given twice'): cs.parse_sources([paths[0], paths[0]])


def test_to_file_copies_weights_fisher_and_card(file, net, tmp_path):
    cs.save_source(net.state_dict(), file, 'resnet10t', {k: torch.ones_like(p) for k, p in net.named_parameters()}, licence='CC0')
    copy = cs.parse_source(cs.parse_source(file).to_file(tmp_path/'copy'/'knee.safetensors'))
    assert copy.card['licence'] == 'CC0' and copy.architecture == 'resnet10t'
    assert all(torch.equal(a, b) for a, b in zip(copy.weights().values(), cs.parse_source(file).weights().values()))
    assert copy.fisher_values().keys() == dict(net.named_parameters()).keys()
    with pytest.raises(cs.SourceError, match='no architecture'): cs.save_source({}, tmp_path/'x.safetensors', 'nonet')
    with pytest.raises(cs.SourceError, match='stored as .safetensors'): cs.save_source({}, tmp_path/'x.pth', 'resnet18')


# Matching

@pytest.mark.parametrize('prefix', ['', 'module.', 'E.', 'encoder.', 'model.', 'module.model.encoder.', 'student.backbone.'])
def test_prefixes(net, prefix):
    body = net.state_dict()
    state = {prefix + k: v for k, v in body.items()} | {'decoder.0.weight': torch.zeros(3), 'C.weight': torch.zeros(2, 512)}
    assert cs.body_prefix(body, state) == prefix
    found = cs.match_body('s', state, body)
    assert found.keys() == body.keys() and all(torch.equal(found[k], body[k]) for k in body)


def test_encoder_of_a_hydra_goes_into_its_backbone(net):
    source = hydra('resnet10t', {'lobes': 3, 'body': 2})
    found = cs.match_body('hydra', source.state_dict(), net.state_dict())
    assert torch.equal(found['conv1.0.weight'], source.encoder.conv1[0].weight)


def test_problems_are_all_listed(net):
    body = net.state_dict()
    broken = {k: v.clone() for k, v in body.items() if k != 'conv1.3.weight'}
    broken['layer1.0.extra.weight'] = torch.zeros(4)
    broken['layer2.0.conv1.weight'] = torch.zeros(3, 3)
    broken['layer3.0.conv1.weight'][0] = float('inf')
    with pytest.raises(cs.SourceError) as e: cs.match_body('mine', broken, body)
    assert all(text in str(e.value) for text in ('source mine', '4 problems', 'missing conv1.3.weight', 'left over layer1.0.extra.weight', 'layer2.0.conv1.weight is (3, 3)', 'layer3.0.conv1.weight is not finite'))


def test_only_the_first_kernel_may_take_other_channels(net):
    body = net.state_dict()
    first, later = 'conv1.0.weight', 'layer2.0.conv1.weight'
    gray = body | {first: body[first].sum(1, keepdim=True)}
    assert torch.allclose(cs.match_body('gray', gray, body)[first], body[first].sum(1, keepdim=True).expand(-1, 3, -1, -1)/3, atol=1e-6)
    assert torch.allclose(cs.match_body('gray', body, gray)[first], gray[first], atol=1e-5) # and the other way: the sum
    ones = {k: torch.ones_like(v) for k, v in gray.items() if v.is_floating_point() and 'running' not in k}
    wanted = {k: body[k] for k in ones}
    assert torch.equal(cs.match_body('fisher', ones, wanted, body, fisher=True)[first], torch.ones_like(body[first])) # Fisher information is not rescaled
    with pytest.raises(cs.SourceError, match=later): cs.match_body('wide', body | {later: torch.cat([body[later]]*2, 1)}, body)


def test_sources_json_holds_no_weights(file, tmp_path):
    cs.write_sources([cs.parse_source(file)], tmp_path/'s.json')
    assert json.loads((tmp_path/'s.json').read_text())[0].keys() == {'name', 'architecture', 'path', 'fisher', 'identity', 'card'}
