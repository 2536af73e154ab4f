"""Freezing bit by bit, the strategies, and stages that are interrupted, damaged or diverge."""
import copy, random
from functools import partial

import numpy as np
import pandas as pd, pytest, torch
from fastai.callback import progress # no_bar
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from medxfer_nb.data.batches import film_loaders
from medxfer_nb.data.cases import Cases
from medxfer_nb.models.colorize import COLORIZERS, ColorizedNet, new_colorizer, split_TEC
from medxfer_nb.transfer import stages as st
from medxfer_nb.transfer.freeze import Fix

EVERY = 4 # batches an epoch


def net(module='coloru', labels=2) -> ColorizedNet:
    torch.manual_seed(0)
    E = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8),
                      nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(32))
    return ColorizedNet(new_colorizer(module), E, nn.Linear(32, labels))


def loaders(n=EVERY * 8, missing=0.2) -> DataLoaders:
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 1, 16, 16, generator=rng), torch.rand(n, 2, generator=rng).round()
    x += 2 * y[:, :1, None, None] # the first label is easy
    masked = torch.where(torch.rand(n, 2, generator=rng) < missing, torch.nan, y)
    return DataLoaders.from_dsets(list(zip(x, masked)), list(zip(x, y)), bs=8, num_workers=0, device=torch.device('cpu'))


def auc(scores, targets): return roc_auc_score(targets, scores)


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b): return all(torch.equal(v, b[k]) for k, v in a.items())


def quiet_fit(learn, epochs=1, lr=0.1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr, **kwargs)


# Freezing

OPTIMISERS = {'sgd': partial(SGD, mom=0.9), 'adamw': Adam}

@pytest.mark.parametrize('opt', OPTIMISERS)
@pytest.mark.parametrize('bn_stats, moving', [('fixed', set()),
    ('update', {f'E.{i}.{s}' for i in (1, 8) for s in ('running_mean', 'running_var', 'num_batches_tracked')})])
def test_fixed_parts_stay_bit_for_bit(opt, bn_stats, moving):
    learn = Learner(loaders(missing=0), net(), F.binary_cross_entropy_with_logits, OPTIMISERS[opt], splitter=split_TEC, wd=0.1)
    quiet_fit(learn) # leaves gradients, momentum and decay behind
    before = state(learn.model)
    quiet_fit(learn, cbs=Fix('E', bn_stats))
    changed = {k for k, v in state(learn.model).items() if not torch.equal(v, before[k])}
    assert {k for k in changed if k[0] == 'E'} == moving
    assert {k for k in before if k[0] in 'TC'} == {k for k in changed if k[0] in 'TC'}
    assert all(p.requires_grad for p in learn.model.parameters())
    quiet_fit(learn)
    assert not same({k: v for k, v in before.items() if k[0] == 'E'}, state(learn.model))


def test_train_is_what_fastai_freezes():
    "bn_stats='train' moves the same tensors as fastai's own `freeze`, which holds GroupNorm."
    def moved(fix):
        learn = Learner(loaders(missing=0), net(), F.binary_cross_entropy_with_logits, SGD, splitter=lambda m: [list(m.E.parameters()), [*m.T.parameters(), *m.C.parameters()]])
        if not fix: learn.freeze()
        before = state(learn.model)
        quiet_fit(learn, cbs=Fix('E', 'train') if fix else None)
        return {k for k, v in state(learn.model).items() if not torch.equal(v, before[k])}
    assert moved(True) == moved(False)


# Strategies and the loss

PARTS = {'baseline': 'C', 'baseline_all': 'EC', 'color_module': 'TC', 'all': 'TEC', 'last_layer': 'C'}

@pytest.mark.parametrize('name', PARTS)
def test_strategies_train_what_they_say(name):
    parent = state(net()) if st.STRATEGIES[name].parents else None
    model = st.begin_stage(net(), name, seed=3, parent=parent)
    before = state(model)
    st.fit_stage(st.stage_learner(loaders(), model, name), 2 * EVERY, EVERY, lr=0.05)
    assert {k[0] for k, v in state(model).items() if not torch.equal(v, before[k])} == set(PARTS[name])


def test_a_stage_starts_from_its_parent():
    parent = {k: v + 1 for k, v in net().state_dict().items()}
    model = st.begin_stage(net(), 'last_layer', seed=0, parent=parent)
    assert all(torch.equal(v, parent[k]) for k, v in model.state_dict().items() if k[0] in 'TE')
    assert not torch.equal(model.C.weight, parent['C.weight'])
    with pytest.raises(ValueError, match='give `parent`'): st.begin_stage(net(), 'all', 0)
    with pytest.raises(ValueError, match='takes no `parent`'): st.begin_stage(net(), 'baseline', 0, parent)
    with pytest.raises(ValueError, match='there are: baseline'): st.stage_learner(loaders(), net(), 'freeze')


@pytest.mark.parametrize('module', COLORIZERS)
def test_fresh_parts_depend_on_the_seed_only(module):
    def fresh(seed):
        torch.manual_seed(random.randrange(10**6))
        model = net(module)
        for p in model.T.parameters(): nn.init.normal_(p)
        rng = torch.get_rng_state()
        st.begin_stage(model, 'color_module', seed)
        assert torch.equal(rng, torch.get_rng_state())
        return state(model)
    a, b, c = fresh(0), fresh(0), fresh(1)
    assert same(a, b) and not torch.equal(a['C.weight'], c['C.weight'])
    if module == 'pixelshuffle': # the special initialisation survives
        kernels = a['T.to_subpixels.0.weight'].view(3, 16, 64)
        assert torch.equal(kernels, kernels[:, :1].expand_as(kernels))


def test_masked_bce_against_torch():
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 4, requires_grad=True), torch.rand(50, 4)
    assert torch.isclose(st.masked_bce(logits, targets), F.binary_cross_entropy_with_logits(logits, targets))
    targets[torch.rand(50, 4) < 0.3] = torch.nan
    known = ~targets.isnan()
    ours, = torch.autograd.grad(st.masked_bce(logits, targets), logits)
    theirs, = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits[known], targets[known]), logits)
    torch.testing.assert_close(ours, theirs)
    nothing = st.masked_bce(logits, torch.full_like(targets, torch.nan))
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().sum() == 0
    for bad in (targets[:, :1], -torch.ones_like(targets)):
        with pytest.raises(ValueError): st.masked_bce(logits, bad)


# Stages

def run(tmp=None, steps=6 * EVERY, callbacks=(), strategy='color_module', **options):
    learn = st.stage_learner(loaders(), st.begin_stage(net(), strategy, 0), strategy)
    result = st.fit_stage(learn, steps, EVERY, metric=auc, checkpoint=tmp and tmp/'stage', callbacks=callbacks, **options)
    return result, state(learn.model)


class Stop(Callback):
    "Break off in the middle of an epoch."
    def __init__(self, epoch): self.at = epoch
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (self.at, 2): raise KeyboardInterrupt


def test_same_seed_same_numbers():
    a, weights = run(lr=0.05)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    b, again = run(lr=0.05)
    assert a == b and same(weights, again)
    assert run(lr=0.05, seed=1)[0] != a


def test_resumed_equals_uninterrupted(tmp_path):
    whole, weights = run() # with its own learning-rate finder
    for epoch in (2, 4):
        with pytest.raises(KeyboardInterrupt): run(tmp_path, callbacks=[Stop(epoch)])
    resumed, again = run(tmp_path)
    assert resumed == whole and same(weights, again)
    finished, again = run(tmp_path, callbacks=[Stop(5)]) # nothing left to do
    assert finished == whole and same(weights, again)


@pytest.mark.parametrize('damage', [lambda b: b[:-100], lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:], lambda b: b''])
def test_damaged_checkpoint_is_not_used(damage, tmp_path):
    whole, _ = run(lr=0.05)
    with pytest.raises(KeyboardInterrupt): run(tmp_path, lr=0.05, callbacks=[Stop(3)])
    (tmp_path/'stage').write_bytes(damage((tmp_path/'stage').read_bytes()))
    with pytest.warns(UserWarning, match='damaged'): assert run(tmp_path, lr=0.05)[0] == whole


def test_checkpoint_of_another_stage(tmp_path):
    run(tmp_path, lr=0.05, steps=EVERY)
    with pytest.raises(ValueError, match='another stage'): run(tmp_path, lr=0.05, steps=2 * EVERY)
    assert [p.name for p in tmp_path.iterdir()] == ['stage']


def test_keeps_the_best_validation():
    values = iter([0.5, 0.9, float('nan'), 0.9, 0.1, 0.2])
    kept = []
    class Spy(Callback):
        def after_epoch(self): kept.append(state(self.model))
    learn = st.stage_learner(loaders(), net(), 'baseline_all')
    result = st.fit_stage(learn, 6 * EVERY, EVERY, lr=0.05, metric=lambda s, t: next(values), callbacks=[Spy()])
    assert result.best == result.history[1] and result.best['iteration'] == 2 * EVERY
    assert same(kept[1], state(learn.model)) and not same(kept[5], state(learn.model))
    with pytest.raises(ValueError, match='undefined at every validation'):
        st.fit_stage(learn, EVERY, EVERY, lr=0.05, metric=lambda s, t: float('nan'))


def test_history_scores_the_whole_validation_set():
    learn = st.stage_learner(loaders(), net(), 'baseline')
    result = st.fit_stage(learn, EVERY, EVERY, lr=0.05, metric=auc)
    logits, targets = zip(*[(learn.model.eval()(x).detach(), y) for x, y in learn.dls.valid])
    logits, targets = torch.cat(logits), torch.cat(targets)
    assert result.best['valid_metric'] == pytest.approx(auc(logits, targets))
    assert result.best['valid_loss'] == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, targets)), rel=1e-5)


class Poison(Callback):
    "An infinite pixel at one step."
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 2): self.learn.xb = (self.xb[0] + torch.inf,)


def test_divergence_names_run_and_step():
    with pytest.raises(st.TrainingDiverged, match='at step 6 .*seed') as caught: run(lr=0.05, callbacks=[Poison()], config=dict(seed=0))
    assert caught.value.step == 6 and caught.value.config == dict(seed=0) and np.isnan(caught.value.loss)


def test_find_lr_names_run_and_step():
    class Late(Callback):
        def before_batch(self):
            if self.learn.train_iter >= 10: self.learn.xb = (self.xb[0] + torch.inf,)
    learn = st.stage_learner(loaders(), net(), 'color_module')
    learn.add_cb(Late())
    for call in (lambda: st.find_lr(learn, config=dict(seed=7)), lambda: st.fit_stage(learn, EVERY, EVERY, config=dict(seed=7))):
        with pytest.raises(st.TrainingDiverged, match="diverged to nan at step 10 of the learning-rate finder.*'seed': 7") as caught: call()
        assert (caught.value.step, caught.value.config) == (10, dict(seed=7)) and np.isnan(caught.value.loss)


def test_parts_that_cannot_start_anew_are_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((1,), 7.))
    model = net()
    model.C = nn.Sequential(nn.Linear(32, 2), Scale())
    before = state(model.C)
    with pytest.raises(ValueError, match='1 would keep the old weights.*`reset_parameters`'): st.reset_part(model.C, 0)
    assert same(before, state(model.C)) # nothing was reset half-way
    for name in COLORIZERS: st.reset_part(new_colorizer(name), 0)


def test_find_lr_leaves_no_trace():
    learn = st.stage_learner(loaders(), net(), 'color_module')
    for fresh in (True, False):
        if not fresh: quiet_fit(learn)
        learn.model.E.eval()
        before, modes, rng = state(learn.model), [m.training for m in learn.model.modules()], (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        opt, hypers = learn.opt, learn.opt and copy.deepcopy(list(learn.opt.hypers))
        order = learn.dls.train.rng.getstate()
        curve = st.find_lr(learn)
        assert same(before, state(learn.model)) and modes == [m.training for m in learn.model.modules()]
        assert torch.equal(rng[0], torch.get_rng_state()) and rng[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        assert learn.opt is opt and (fresh or list(opt.hypers) == hypers) and learn.dls.train.rng.getstate() == order
        assert len(curve.lrs) == len(curve.losses) and 1e-4 <= curve.choice <= 1
    assert 0.2 <= st.find_lr(learn, bounds=(0.2, 0.3)).choice <= 0.3
    with pytest.raises(ValueError, match='unreliable'): st.find_lr(learn, iterations=30)


def test_bad_sizes():
    learn = st.stage_learner(loaders(), net(), 'baseline')
    for steps, every in ((0, EVERY), (EVERY + 1, EVERY), (EVERY, 0)):
        with pytest.raises(ValueError, match='positive multiple'): st.fit_stage(learn, steps, every, lr=0.05)
    with pytest.raises(ValueError, match='gives 4 batches, validate_every is 5'): st.fit_stage(learn, 10, 5, lr=0.05)
    with pytest.raises(ValueError, match='batch size exceeds'): st.fit_stage(st.stage_learner(loaders(n=6), net(), 'baseline'), 4, 4, lr=0.05)


def test_on_film_loaders(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.integers(0, 2, (20, 2)).astype(float), columns=['a', 'b']).assign(patient=[str(i) for i in range(20)], study='1')
    films = Cases('noise', frame, labels=('a', 'b'), pixels=rng.integers(0, 256, (20, 24, 24), dtype=np.uint8))
    def fit(tmp=None, **kwargs):
        dls = film_loaders(films, films, 16, bs=8, steps_per_epoch=EVERY, device=torch.device('cpu'))
        learn = st.stage_learner(dls, st.begin_stage(net(), 'color_module', 0), 'color_module')
        return st.fit_stage(learn, 4 * EVERY, EVERY, checkpoint=tmp and tmp/'s', **kwargs)
    whole = fit()
    with pytest.raises(KeyboardInterrupt): fit(tmp_path, callbacks=[Stop(2)])
    assert fit(tmp_path) == whole
