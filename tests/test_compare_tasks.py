"""Tasks: one interface for films, slices and volumes, against second libraries and by invariants."""
import json

import numpy as np
import pandas as pd
import pytest, torch
from scipy import ndimage
from scipy.spatial.distance import cdist
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch.nn import functional as F

from medxfer_nb.compare import tasks as ct
from medxfer_nb.compare.pool import Pool
from medxfer_nb.compare.scores import brier_scores, hd95, log_losses, mask_scores, pooled_dice
from medxfer_nb.compare.sources import SourceError, parse_source, save_source
from medxfer_nb.data.brain import Brains
from medxfer_nb.data.cases import Cases
from medxfer_nb.data.slices import Slices
from medxfer_nb.models.colorize import colorized_net, evaluating, load_backbone
from medxfer_nb.models.unet import unet
from medxfer_nb.models.unet3d import is_shared, shared_parameters, unet3d
from medxfer_nb.transfer.freeze import Fix
from medxfer_nb.transfer.stages import KeepBest, SeedEpochs, StopOnNaN

KINDS = ('films', 'classes', 'slices', 'volumes')
NET = dict(films='resnet10t', classes='resnet10t', slices='resnet10t', volumes='unet3d-4x3')


def pool_of(kind, n=8, weights=None, size=32):
    rng, patients = np.random.default_rng(1), np.arange(n)//2
    def made(kind, data, cases, labels, spacing=np.nan, regions={}, **more):
        w = np.ones(n) if weights is None else np.asarray(weights, float)
        return Pool(kind, data, cases, patients, labels, w, np.full(n, ''), np.tile(np.atleast_1d(spacing), (n, 1))*np.ones((1, 3)), regions, **more)
    if kind in ('films', 'classes'):
        labels = ('a', 'b', 'c') if kind == 'classes' else ('f', 'g')
        y = np.eye(3)[np.arange(n) % 3] if kind == 'classes' else rng.integers(0, 2, (n, 2)).astype(float)
        frame = pd.DataFrame(dict(patient=[f'p{p}' for p in patients], study='s') | {l: y[:, i] for i, l in enumerate(labels)})
        return made('films', Cases('t', frame, labels, rng.integers(0, 256, (n, size, size), dtype=np.uint8)), np.arange(n), labels, exclusive=kind == 'classes')
    if kind == 'slices': # 1, 2, 3, 1, ... slices per case
        cases = np.repeat(np.arange(n), np.arange(n) % 3 + 1)
        masks = np.zeros((len(cases), size, size), np.uint8)
        for i in range(len(cases)): masks[i, 4:10 + i % 5, 6:20], masks[i, 22:28, 22:28] = 1, 2*(i % 2)
        z = np.concatenate([np.arange(c) for c in np.bincount(cases)])
        data = Slices((rng.random(masks.shape)*.4 + .3*masks).astype(np.float16), masks, cases, z, patients, np.ones((n, 3), int), np.ones((n, 3)), ('background', 'organ', 'lesion'))
        return made('slices', data, cases, ('organ', 'lesion'), (2., .5, .5), {'organ': (1,), 'lesion': (2,)})
    labels = np.zeros((n, 12, 12, 12), np.uint8)
    for i in range(n): labels[i, 2:7, 2:7, 2:6 + i % 3], labels[i, 8:11, 8:11, 8:11] = 1, 2
    images = (rng.random((n, 2, 12, 12, 12))*.4 + .3*labels[:, None]).astype(np.float16)
    return made('volumes', Brains(images, labels, patients, (1., 1., 1.), ('channel 1', 'channel 2')), np.arange(n), ('core', 'rim'), (1., 2., 2.), {'core': (1,), 'rim': (2,)})


def task_of(kind, **how): return ct.task_for(pool_of(kind), NET[kind], **dict(precision='fp32') | how)


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sources')
    torch.manual_seed(9)
    flat, volume = load_backbone('resnet10t'), unet3d(2, 5, base=4, depth=3, seed=9)
    for m in flat.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.uniform_(-.1, .1)
    ones = {k: torch.rand_like(v) for k, v in shared_parameters(volume).items()}
    flat = parse_source(save_source({f'module.{k}': v for k, v in flat.state_dict().items()}, folder/'flat.safetensors', 'resnet10t'))
    return dict.fromkeys(('films', 'classes', 'slices'), flat) | dict(volumes=parse_source(save_source(volume.state_dict(), folder/'deep.safetensors', 'unet3d-4x3', ones)))


def steps(task, pool, net, n=2, lr=1e-3, seed=0, cbs=(), groups=None, bs=2):
    rows = np.arange(4), np.arange(4, 8)
    dls = task.loaders(pool, *rows, bs=bs, steps_per_epoch=n, seed=seed)
    learn, keep = task.learner(net, dls, task.loss(pool, rows[0]), groups), KeepBest(task.metric(pool))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, lr, cbs=[SeedEpochs(seed), keep, StopOnNaN(), *cbs])
    return keep


# Networks

@pytest.mark.parametrize('kind', KINDS)
def test_fresh_parts_depend_on_the_seed_alone(kind, sources):
    task, before = task_of(kind), torch.get_rng_state()
    nets = dict(scratch=task.network(seed=3), source=task.network(sources[kind], 3))
    torch.manual_seed(77)
    nets |= dict(again=task.network(sources[kind], 3), other=task.network(sources[kind], 4))
    torch.set_rng_state(before)
    body = set(task.wanted(nets['scratch']))
    for name, a in nets['scratch'].state_dict().items():
        same = [torch.equal(a, nets[k].state_dict()[name]) for k in ('source', 'again', 'other')]
        if name not in body: assert same[:2] == [True, True], name
        assert torch.equal(nets['source'].state_dict()[name], nets['again'].state_dict()[name])
    heads = [[p.detach() for m in task.fresh_modules(nets[k]) for p in m.parameters() if p.ndim > 1] for k in ('source', 'other')]
    assert not any(torch.equal(a, b) for a, b in zip(*heads))


@pytest.mark.parametrize('kind', KINDS)
def test_network_leaves_the_global_random_state(kind, sources):
    before = torch.get_rng_state()
    task_of(kind).network(sources[kind], 5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize('kind', KINDS)
def test_the_body_is_the_source_to_the_bit(kind, sources):
    task, weights = task_of(kind), sources[kind].weights()
    net = task.network(sources[kind], 1)
    state = task.body_state(net, sources[kind])
    assert state.keys() == task.wanted(net).keys() and set(task.body_names(net)) <= state.keys()
    for name, v in state.items():
        bare = name if kind == 'volumes' else f'module.{name.partition(".")[2]}'
        assert torch.equal(v, weights[bare]) and torch.equal(net.state_dict()[name], v)
    if kind == 'volumes': assert set(state) == {n for n, m in net.named_parameters() if is_shared(n.rpartition('.')[0], net.get_submodule(n.rpartition('.')[0]))}
    else: assert any('running_mean' in k for k in state)


def test_scratch_bodies_differ_by_seed():
    task = task_of('films')
    assert not torch.equal(task.network(seed=1).E.conv1[0].weight, task.network(seed=2).E.conv1[0].weight)


def test_summed_first_weights_are_those_of_the_house(sources):
    task, x = task_of('films'), torch.randn(2, 1, 32, 32)
    net = task.network(sources['films'], 1, T='weight_sum')
    plain = task.network(sources['films'], 1)
    expected = colorized_net('weight_sum', 'resnet10t', 2, pretrained={k.removeprefix('module.'): v for k, v in sources['films'].weights().items()})
    assert torch.allclose(net.E.conv1[0].weight, expected.E.conv1[0].weight, atol=1e-6)
    with evaluating(net), evaluating(plain): assert torch.allclose(net(x), plain(x), atol=1e-4)


@pytest.mark.parametrize('kind', ('films', 'slices'))
def test_colour_modules_are_fresh_and_come_last(kind, sources):
    task = task_of(kind)
    net = task.network(sources[kind], 1, T='coloru')
    assert torch.equal(next(net.T.parameters()), next(task.network(seed=1, T='coloru').T.parameters()))
    assert {id(p) for p in net.T.parameters()} <= {id(p) for p in task.groups(net)[-1]}
    assert net.made_as == dict(architecture='resnet10t', T='coloru')


def test_sources_that_do_not_go_with_the_data(sources):
    for kind, source in (('films', 'volumes'), ('slices', 'volumes'), ('volumes', 'films')):
        with pytest.raises(ct.TaskError, match=f'is no network for {kind}'): task_of(kind).network(sources[source])
    with pytest.raises(ct.TaskError, match="no colour module 'affine' for volumes"): task_of('volumes').network(T='affine')
    with pytest.raises(ct.TaskError, match="no colour module 'red'"): task_of('films').network(T='red')


def test_a_source_of_a_wrongly_named_architecture_is_refused(sources, tmp_path):
    source = parse_source(save_source(load_backbone('resnet14t').state_dict(), tmp_path/'x.safetensors', 'resnet10t'))
    with pytest.raises(SourceError, match='left over'): task_of('films').network(source)


def test_body_fisher(sources):
    task, net = task_of('volumes'), task_of('volumes').network()
    assert task.body_fisher(net, sources['volumes']).keys() == shared_parameters(net).keys()
    assert task_of('films').body_fisher(task_of('films').network(), sources['films']) is None


def test_body_fisher_of_films_has_the_networks_names(tmp_path):
    encoder, task = load_backbone('resnet10t'), task_of('films')
    source = parse_source(save_source(encoder.state_dict(), tmp_path/'f.safetensors', 'resnet10t', {k: torch.rand_like(p) for k, p in encoder.named_parameters()}))
    net = task.network(source)
    assert list(task.body_fisher(net, source)) == task.body_names(net)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n', (1, 2, 3, 5))
def test_groups_are_a_partition_in_order(kind, n):
    task = task_of(kind)
    net = task.network()
    groups, place = task.groups(net, n), {id(p): i for i, p in enumerate(net.parameters())}
    assert len(groups) == n + 1 and all(groups)
    assert sorted(place[id(p)] for g in groups for p in g) == list(range(len(place)))
    body = [place[id(p)] for g in groups[:-1] for p in g]
    assert body == sorted(body) and {id(p) for g in groups[:-1] for p in g} == {id(dict(net.named_parameters())[k]) for k in task.body_names(net)}
    assert {id(p) for p in groups[-1]} == {id(p) for m in task.fresh_modules(net) for p in m.parameters()}
    assert {id(p) for g in groups[:-1] for p in g} == {id(p) for m in task.body_modules(net) for p in m.parameters()}


def test_too_many_groups():
    with pytest.raises(ct.TaskError, match='cannot be cut into 500'): task_of('films').groups(task_of('films').network(), 500)


# Batches

@pytest.mark.parametrize('kind', KINDS)
def test_two_arms_of_one_seed_see_the_same_batches(kind):
    pool, task = pool_of(kind), task_of(kind)
    def batches(seed):
        dls = task.loaders(pool, np.arange(4), np.arange(4, 8), bs=2, steps_per_epoch=3, seed=seed)
        return [torch.as_tensor(t) for b in dls.train for t in b]
    a, b, c = batches(1), batches(1), batches(2)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not all(torch.equal(x, y) for x, y in zip(a, c))


@pytest.mark.parametrize('kind', KINDS)
def test_inputs_are_what_the_loaders_give(kind):
    pool, task = pool_of(kind), task_of(kind)
    rows = np.array([5, 2])
    items = pool.items(rows)
    arrays = pool.data.images if kind == 'volumes' else pool.data.pixels
    given = torch.cat([torch.Tensor(b[0].cpu()) for b in task.eval_loader(pool, rows, bs=2)])
    assert torch.allclose(given, task.inputs(arrays[items]), atol=1e-6)


def test_patients_stay_apart_and_nothing_is_empty():
    task, pool = task_of('films'), pool_of('films')
    with pytest.raises(ct.TaskError, match='1 patients are both'): task.loaders(pool, [0, 1, 2], [3, 4, 5])
    with pytest.raises(ct.TaskError, match='0 cases to train on, 2 to validate on'): task.loaders(pool, [], [3, 4])


def test_weights_act_in_training_only():
    pool, task = pool_of('films', weights=[1, 4, 1, 1, 9, 1, 1, 1]), task_of('films')
    dls = task.loaders(pool, np.arange(4), np.arange(4, 8), bs=2)
    assert (len(dls.train.dataset), len(dls.valid.dataset)) == (7, 4)


def test_class_weights_are_of_the_training_slices_and_bear_a_missing_class():
    pool, task = pool_of('slices'), task_of('slices')
    counts = np.bincount(np.asarray(pool.data.masks[pool.items([1, 2])]).ravel(), minlength=3)
    assert torch.allclose(task.loss(pool, [1, 2]).weight, torch.tensor(counts.sum()/3/counts).float())
    assert task.loss(pool, [0]).weight.isfinite().all() # no lesion in the first case


# Losses, scores, choice

def test_losses_and_scores_of_findings_against_scikit_learn():
    rng = np.random.default_rng(0)
    p, y = rng.random((50, 3)), rng.integers(0, 2, (50, 3)).astype(float)
    for c in range(3):
        assert np.isclose(log_losses(p[:, [c]], y[:, [c]]).mean(), log_loss(y[:, c], p[:, c]))
        assert np.isclose(brier_scores(p[:, [c]], y[:, [c]]).mean(), brier_score_loss(y[:, c], p[:, c]))
    assert np.allclose(log_losses(p, y), np.mean([log_losses(p[:, [c]], y[:, [c]]) for c in range(3)], 0))
    q = p/p.sum(1, keepdims=True)
    k = rng.integers(0, 3, 50)
    assert np.isclose(log_losses(q, np.eye(3)[k], True).mean(), log_loss(k, q, labels=[0, 1, 2]))
    assert np.isclose(brier_scores(q, np.eye(3)[k], True).mean(), ((q - np.eye(3)[k])**2).sum(1).mean())


def test_certain_errors_cost_a_bounded_loss():
    loss = log_losses(np.array([[0.], [1.]]), np.array([[1.], [0.]]))
    assert np.allclose(loss, -np.log(1e-7), rtol=1e-3)


def test_cross_entropy_leaves_unknown_cases_out():
    logits, k = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 2, 1, 0, 2])
    y = torch.eye(3)[k]
    y[[1, 4]] = float('nan')
    loss = ct.masked_cross_entropy(logits, y)
    assert torch.allclose(loss, F.cross_entropy(logits[[0, 2, 3, 5]], k[[0, 2, 3, 5]]))
    loss.backward()
    assert logits.grad.isfinite().all() and not logits.grad[[1, 4]].any()
    assert ct.masked_cross_entropy(logits, y*float('nan')) == 0
    with pytest.raises(ValueError, match='differ in shape'): ct.masked_cross_entropy(logits, y[:, :2])


def test_choice_by_auc_of_what_is_defined():
    rng, metric = np.random.default_rng(0), task_of('films').metric()
    s, y = rng.normal(size=(40, 2)), rng.integers(0, 2, (40, 2)).astype(float)
    assert np.isclose(metric(s, y), roc_auc_score(y, s))
    y[:10, 0] = np.nan
    assert np.isclose(metric(s, y), np.mean([roc_auc_score(y[10:, 0], s[10:, 0]), roc_auc_score(y[:, 1], s[:, 1])]))
    y[:, 1] = 1
    assert np.isclose(metric(s, y), roc_auc_score(y[10:, 0], s[10:, 0]))
    y[:, 0] = 0
    assert np.isclose(metric(s, y), -log_losses(1/(1 + np.exp(-s)), y).mean(), rtol=1e-5)
    assert metric(s + np.array([1., 0]), y) < metric(s, y) # finding 0 is nowhere: higher scores are worse
    assert np.isnan(metric(np.full((4, 2), np.nan), y[:4]))


def test_choice_among_exclusive_classes_is_one_against_the_rest():
    rng, metric = np.random.default_rng(0), task_of('classes').metric()
    s, k = rng.normal(size=(60, 3)), rng.integers(0, 3, 60)
    softmax = np.exp(s)/np.exp(s).sum(1, keepdims=True)
    assert np.isclose(metric(s, np.eye(3)[k]), roc_auc_score(k, softmax, multi_class='ovr', average='macro'))
    assert np.isclose(metric(s + rng.normal(size=(60, 1))*9, np.eye(3)[k]), metric(s, np.eye(3)[k])) # a shift of all logits says nothing


def test_pooled_dice_by_counting():
    rng = np.random.default_rng(0)
    p, t = rng.random((2, 5, 3, 4, 8, 8)) > .6
    t[:, 1] = False
    expected = np.mean([2*(p[:, c] & t[:, c]).sum()/(p[:, c].sum() + t[:, c].sum()) for c in (0, 2)])
    assert np.isclose(pooled_dice(p, t), expected)


def test_choice_of_masks_by_hand():
    for kind in ('slices', 'volumes'):
        task, pool = task_of(kind), pool_of(kind)
        x = task.inputs((pool.data.pixels if kind == 'slices' else pool.data.images)[:3])
        net = task.network()
        with evaluating(net): logits = net(x)
        truth = np.asarray(pool.data.masks[:3]) if kind == 'slices' else np.stack([pool.data.labels[:3] == c for c in (1, 2)], 1).astype(np.float32)
        predicted = task.masks(task.outputs(logits).numpy())
        t = np.stack([truth == c for c in (1, 2)], 1) if kind == 'slices' else truth > 0
        assert np.isclose(task.metric()(logits.numpy(), truth), pooled_dice(predicted, t))


def brute_hd95(p, t, spacing):
    def surface(m): return np.argwhere(m & ~ndimage.binary_erosion(m, border_value=0))*spacing
    d = cdist(surface(p), surface(t))
    return max(np.percentile(d.min(1), 95), np.percentile(d.min(0), 95))


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('spacing', [(1., 1., 1.), (4., .7, .9)])
def test_surface_distance_by_brute_force(seed, spacing):
    rng = np.random.default_rng(seed)
    p, t = (ndimage.gaussian_filter(rng.normal(size=(9, 14, 14)), 2) > .02 for _ in range(2)) # touch the border
    assert np.isclose(hd95(p, t, spacing), brute_hd95(p, t, np.array(spacing)), rtol=1e-4)
    assert np.isclose(hd95(p[4:5], t[4:5], spacing), brute_hd95(p[4], t[4], np.array(spacing[1:])), rtol=1e-4) # a slice is a picture


def test_empty_masks():
    none, some = np.zeros((2, 1, 4, 4, 4), bool)
    some[0, 1:3, 1:3, 1:3] = True
    scores = {k: mask_scores(p, t, ['a'], (1., 1., 1.), (1., 1., 1.)) for k, (p, t) in dict(both=(none, none), missed=(none, some), invented=(some, none)).items()}
    assert [s['dice'] for s in scores.values()] == [1, 0, 0]
    assert all(np.isnan(s['hd95']) for s in scores.values())
    assert [(s['ml'], s['predicted_ml']) for s in scores.values()] == [(0, 0), (.008, 0), (0, .008)]


def test_a_missed_structure_leaves_no_distance():
    "A mean over what was found would be better than that of a network that finds both."
    a, b = np.zeros((2, 1, 8, 8), bool)
    a[0, 1:4, 1:4], b[0, 5:7, 5:7] = True, True
    score = lambda p, t: mask_scores(np.stack(p), np.stack(t), ('a', 'b'), (1., 1., 1.), (1., 1., 1.))['hd95']
    assert np.isnan(score((a, b & False), (a, b))) and np.isnan(score((a, b), (a, b & False)))
    assert score((a, b & False), (np.roll(a, 1, -1), b & False)) == 1 # neither there nor predicted: left out


def test_unknown_spacing_gives_pixels_and_no_volume():
    m = np.zeros((1, 1, 8, 8), bool)
    m[..., 2:4, 2:4] = True
    scores = mask_scores(m, np.roll(m, 2, -1), ['a'], (1., 1., 1.), (np.nan,)*3)
    assert scores['hd95'] == 2 and np.isnan(scores['ml'])


# Training and prediction

@pytest.mark.parametrize('kind', KINDS)
def test_prediction_follows_the_rows_and_scores_are_those_of_the_cases(kind, sources):
    task, pool = task_of(kind), pool_of(kind)
    net = task.network(sources[kind], 1)
    rows = np.array([6, 1, 3])
    together = task.predict(net, pool, rows)
    for row, p in zip(rows, together): np.testing.assert_allclose(p, task.predict(net, pool, [row])[0], atol=1e-5)
    assert net.training # as it was
    scores = task.scores(pool, rows, together)
    assert all(v.shape == (3,) for v in scores.values())
    if kind in ('films', 'classes'):
        assert np.allclose(scores['log_loss'], log_losses(together, pool.targets[rows], kind == 'classes'))
        return
    assert [p.shape[1] for p in together] == ([len(pool.items([r])) for r in rows] if kind == 'slices' else [12]*3)
    t, p = task.truth(pool, 3), together[2]
    dice = [2*(a & b).sum()/max((a | b).sum() + (a & b).sum(), 1) if (a | b).any() else 1. for a, b in zip(p, t)]
    assert np.isclose(scores['dice'][2], np.mean(dice)) and np.isclose(scores[f'dice_{pool.labels[0]}'][2], dice[0])
    assert np.isclose(scores['ml'][2], t.any(0).sum()*np.prod(pool.spacings[3])/1000)
    perfect = task.scores(pool, rows, [task.truth(pool, r) for r in rows])
    assert (perfect['dice'] == 1).all() and np.allclose(perfect['hd95'], 0) and np.allclose(perfect['ml'], perfect['predicted_ml'])


@pytest.mark.parametrize('kind', KINDS)
def test_same_seed_same_network_to_the_bit(kind, sources):
    task, pool = task_of(kind), pool_of(kind)
    nets = [task.network(sources[kind], 2) for _ in range(2)]
    kept = [steps(task, pool, net) for net in nets]
    for a, b in zip(*(net.state_dict().values() for net in nets)): assert torch.equal(a, b)
    assert kept[0].history == kept[1].history


@pytest.mark.parametrize('kind', KINDS)
def test_a_fixed_body_rests_and_the_fresh_parts_move(kind, sources):
    task, pool = task_of(kind), pool_of(kind)
    net = task.network(sources[kind], 2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    steps(task, pool, net, cbs=[Fix(task.body_modules(net))])
    after, body = net.state_dict(), task.wanted(net).keys()
    assert all(torch.equal(after[k], before[k]) for k in body)
    params = [k for k, _ in net.named_parameters() if k not in body]
    assert sum(not torch.equal(after[k], before[k]) for k in params) > len(params)/2


def test_no_weight_decay():
    task, pool = task_of('films'), pool_of('films')
    net = task.network(seed=1)
    learn = task.learner(net, task.loaders(pool, np.arange(4), np.arange(4, 8), bs=2), task.loss(pool, np.arange(4)))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    assert [h['wd'] for h in learn.opt.hypers] == [0., 0.] and [len(g) for g in learn.opt.param_lists] == [len(g) for g in task.groups(net, 1)]


def test_precision_is_that_of_the_whole_network_whatever_is_frozen(tmp_path):
    task, pool = task_of('films', precision='auto', cache=tmp_path/'p.json'), pool_of('films')
    a, b = task.network(seed=1), task.network(seed=1)
    b.E.requires_grad_(False)
    for net in (a, b): task.set_precision(net, 4)
    assert a.modes == b.modes and len(json.loads((tmp_path/'p.json').read_text())) == 1 # E, once for both
    assert not any(p.requires_grad for p in b.E.parameters()) and all(p.requires_grad for p in b.C.parameters())


@pytest.mark.parametrize('kind,mode', [('films', 'modes'), ('slices', 'modes'), ('volumes', 'mode')])
def test_pinned_precision(kind, mode):
    task = task_of(kind, precision='bf16')
    net = task.set_precision(task.network(), 2)
    found = getattr(net, mode)
    assert 'bf16' in [m.dtype for m in (found.values() if mode == 'modes' else [found])]


# Sizes, cards, costs

@pytest.mark.parametrize('kind,architecture,size,says', [('films', 'vit_tiny_patch16_224', 32, '224 x 224 pixels only'), ('films', 'resnet10t', 36, 'multiple of 8'),
                                                         ('films', 'nonet', 32, 'no architecture'), ('slices', 'unet3d', 32, 'no network for slices'), ('volumes', 'resnet10t', 12, 'no network for volumes')])
def test_what_does_not_go_together(kind, architecture, size, says):
    with pytest.raises(ct.TaskError, match=says): ct.task_for(pool_of(kind, size=size), architecture)


def test_transformer_at_its_own_size():
    task = ct.task_for(pool_of('films', n=2, size=224), 'vit_tiny_patch16_224', precision='fp32')
    assert task.network().C.in_features == 192


@pytest.mark.parametrize('kind', KINDS)
def test_card_and_weights_make_the_same_network(kind, sources):
    task, pool = task_of(kind), pool_of(kind)
    net = task.network(sources[kind], 1, **({} if kind == 'volumes' else dict(T='affine')))
    steps(task, pool, net)
    card = json.loads(json.dumps(ct.task_card(task, net)))
    twin, again = ct.net_from_card(card, net.state_dict()), ct.task_from_card(card)
    assert type(again) is type(task) and ct.task_card(again, twin) == card
    for a, b in zip(task.predict(net, pool, [0, 3]), again.predict(twin, pool, [0, 3])): np.testing.assert_allclose(a, b, atol=1e-5)


def test_costs():
    task = task_of('films')
    net = task.network()
    whole = task.cost(net, pool_of('films'))
    net.E.requires_grad_(False)
    assert task.cost(net)['trainable'] == 512*2 + 2 and whole['parameters'] == whole['trainable'] == sum(p.numel() for p in net.parameters())
    wide = ct.task_for(pool_of('films', size=64), 'resnet10t')
    assert 3.5 < wide.cost(net)['gmacs']/whole['gmacs'] < 4.2 # four times the pixels


def test_statistics_are_those_of_the_architecture():
    assert task_of('slices').stats == (0., 1.)
    assert np.allclose(ct.task_for(pool_of('films'), 'tf_efficientnet_lite0').stats, (.5, .5))
