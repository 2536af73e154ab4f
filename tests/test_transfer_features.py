"""Training on features that are kept: the same weights to the last bit as training on images, or a refusal."""
import copy

import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import ItemTransform
from fastai.learner import Learner
from fastai.optimizer import Adam
from torch import nn

from medxfer_nb.models.colorize import ColorizedNet
from medxfer_nb.transfer.features import FeatureError, feature_loaders, frozen_features, head_of, on_features
from medxfer_nb.transfer.freeze import Fix
from medxfer_nb.transfer.stages import SeedEpochs, fit_stage, masked_bce, stage_learner


def network(seed=0) -> ColorizedNet:
    "Small, with BatchNorm whose statistics are not those of the data, and dropout in front of the head."
    torch.manual_seed(seed)
    T = nn.Conv2d(1, 3, 3, padding=1)
    E = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    E[1].running_mean += torch.rand(8)
    return ColorizedNet(T, E, nn.Sequential(nn.Dropout(0.), nn.Linear(8, 2)))


class Items(list): n_inp = 1


class Noise(ItemTransform):
    "Augmentation that says nothing of itself."
    split_idx = 0
    def encodes(self, b): return b[0] + 0.3*torch.randn_like(b[0]), b[1]


def items(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return Items((torch.randn(1, 12, 12, generator=generator), torch.randint(0, 2, (2,), generator=generator).float()) for _ in range(n))


def loaders(n=24, noise=False, **kwargs) -> DataLoaders:
    train = TfmdDL(items(n, 1), bs=8, shuffle=True, after_batch=[Noise()] if noise else [], **kwargs)
    train.dataset.split_idx = 0  # as fastai marks a training set
    return DataLoaders(train, TfmdDL(items(10, 2), bs=8), device='cpu')


def learner(model, **kwargs) -> Learner: return stage_learner(loaders(**kwargs), model, 'last_layer')


def test_features_are_those_of_evaluation_mode():
    model, dls = network().train(), loaders()
    before = copy.deepcopy(model.state_dict())
    z, y = frozen_features(model, dls.valid, 'C')
    x = torch.stack([item[0] for item in dls.valid.dataset])
    with torch.no_grad(): expected = copy.deepcopy(model.E).eval()(model.T(x))
    torch.testing.assert_close(z, expected)
    assert torch.equal(y, torch.stack([item[1] for item in dls.valid.dataset]))
    assert model.training and model.E.training and all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    inner, _ = frozen_features(model, dls.valid, 'C.1')
    assert torch.equal(inner, z)


def test_a_last_layer_on_features_is_the_same_to_the_last_bit():
    results = []
    for features in (False, True):
        model = network()
        learn = learner(model)
        if features:
            with on_features(learn): stage = fit_stage(learn, 9, 3, lr=0.1, seed=5)
        else: stage = fit_stage(learn, 9, 3, lr=0.1, seed=5)
        results.append((model.state_dict(), stage.history))
    (a, history), (b, other) = results
    assert all(torch.equal(a[name], b[name]) for name in a) and history == other
    assert not torch.equal(a['C.1.weight'], network().state_dict()['C.1.weight'])


def test_a_plain_learner_and_more_than_one_fit():
    states = []
    for features in (False, True):
        model = network()
        learn = Learner(loaders(), model, masked_bce, Adam, cbs=[Fix(['T', 'E']), SeedEpochs(3)], wd=0.1)
        with learn.no_bar(), learn.no_logging():
            if features:
                for _ in range(2):
                    with on_features(learn): learn.fit(2, 0.01)
            else:
                for _ in range(2): learn.fit(2, 0.01, reset_opt=True)
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))


def test_a_partial_batch_changes_the_result_by_rounding_only():
    found = []
    for features in (False, True):
        learn = learner(model := network(), n=22, drop_last=True)
        if features:
            with on_features(learn): fit_stage(learn, 4, 2, lr=0.1)
        else: fit_stage(learn, 4, 2, lr=0.1)
        found.append(model.C[1].weight)
    torch.testing.assert_close(*found)


def test_the_learner_comes_back_even_after_an_error():
    learn = learner(network())
    before = learn.model, learn.dls, learn.splitter, list(learn.cbs)
    with pytest.raises(KeyError, match='inside'):
        with on_features(learn):
            assert learn.model is before[0].C and next(iter(learn.dls.train))[0].shape == (8, 8)
            raise KeyError('inside')
    assert (learn.model, learn.dls, learn.splitter) == before[:3] and {type(cb) for cb in learn.cbs} == {type(cb) for cb in before[3]}


def test_no_random_number_is_used_up():
    dls, model = loaders(), network()
    torch.manual_seed(9)
    state, place = torch.get_rng_state(), dls.train.rng.getstate()
    kept = feature_loaders(dls, model, 'C')
    assert torch.equal(torch.get_rng_state(), state) and dls.train.rng.getstate() == place
    assert all(torch.equal(y, target) for (_, y), (_, target) in zip(list(dls.train), list(kept.train)))


@pytest.mark.parametrize('wrong, message', [
    (lambda: learner(network(), noise=True), 'something in front of the head is random'),
    (lambda: stage_learner(loaders(), network(), 'last_layer', bn_stats='update'), "bn_stats='update'"),
    (lambda: stage_learner(loaders(), network(), 'last_layer', bn_stats='train'), "bn_stats='train'"),
    (lambda: stage_learner(loaders(), network(), 'color_module'), 'T.weight, T.bias would train too'),
    (lambda: Learner(loaders(), network(), masked_bce), 'would train too')])
def test_what_is_not_the_same_in_each_epoch_is_refused(wrong, message):
    learn = wrong()
    model = learn.model
    with pytest.raises(FeatureError, match=message):
        with on_features(learn): pass
    assert learn.model is model


def test_rare_and_weak_augmentation_is_refused():
    for change in (lambda x: x + 1e-3*torch.randn_like(x), lambda x: x.flip(-1) if torch.rand(()) < .05 else x):
        learn = learner(network())
        items = learn.dls.train.dataset
        learn.dls.train.dataset = type('Augmented', (), {'n_inp': 1, '__len__': lambda s: len(items), '__getitem__': lambda s, i: (change(items[i][0]), items[i][1])})()
        torch.manual_seed(0)
        with pytest.raises(FeatureError, match='random'): feature_loaders(learn.dls, learn.model, 'C')


def test_what_comes_after_the_head_is_not_lost():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.C = nn.Flatten(), nn.LazyLinear(2)
        def forward(self, x): return 10*self.C(self.body(x))
    learn = learner(network())
    net = Scaled()
    net(next(iter(learn.dls.valid))[0])
    with pytest.raises(FeatureError, match='after its Linear'): feature_loaders(learn.dls, net, 'C')


def test_heads_that_are_none():
    model, dls = network(), loaders()
    with pytest.raises(FeatureError, match='no part .head.*T, E, C'): head_of(model, 'head')
    with pytest.raises(FeatureError, match='Linear is no part of the ColorizedNet'): head_of(model, nn.Linear(2, 2))
    shared = nn.Linear(12, 12)
    with pytest.raises(FeatureError, match='calls its Linear 6 times for 3 batches'): frozen_features(nn.Sequential(shared, shared), dls.train, shared)
    with pytest.raises(FeatureError, match='no batches'): frozen_features(model, [], 'C')
