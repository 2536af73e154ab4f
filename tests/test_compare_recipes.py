"""Recipes of `compare`: what each trains and leaves alone, from which weights, for how many steps."""
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from sklearn.linear_model import LogisticRegression

from medxfer_nb.compare.recipes import (RECIPES, Arm, Recipe, RecipeError, Trial, TrialResult, adapt, arms_for, candidates, get_recipe, kin, logistic_head, recipe,
                                        recipe_code, run_trial, split_steps, unrelated)
from medxfer_nb.compare.sources import parse_source, save_source
from medxfer_nb.compare.table import Pool
from medxfer_nb.compare.tasks import task_for
from medxfer_nb.data.brain import Brains
from medxfer_nb.data.cases import Cases
from medxfer_nb.data.slices import Slices
from medxfer_nb.transfer.merge import units
from medxfer_nb.transfer.stages import TrainingDiverged, masked_bce

NET, NET3D = 'test_efficientnet', 'unet3d-2x3'
TRAIN, VALID = np.arange(12), np.arange(12, 20)

def blobs(shape, n=20, seed=0):
    "Noise with a bright square in every other image, and where it is."
    rng = np.random.default_rng(seed)
    images, masks = rng.random((n, *shape)).astype('float32')*.4, np.zeros((n, *shape), 'uint8')
    for i in range(0, n, 2): masks[(i, *(slice(s//4, s//4 + 4 + i % 4) for s in shape))] = 1
    return images + .5*masks, masks

def common(n, labels, **more): return dict(patients=np.arange(n)//2, labels=labels, weights=np.ones(n), split=np.array(['']*n), spacings=np.full((n, 3), 1.), **more)

def film_pool(weights=None):
    images, masks = blobs((32, 32))
    there = masks.any((1, 2)).astype('float32')
    patients = [f'p{i//2}' for i in range(20)]
    frame = pd.DataFrame(dict(patient=patients, study=patients, blob=there, other=np.roll(there, 3)))
    told = common(20, ('blob', 'other')) | ({} if weights is None else dict(weights=weights))
    return Pool('films', Cases('blobs', frame, ('blob', 'other'), (images*255).clip(0, 255).astype('uint8')), np.arange(20), **told)

def slice_pool():
    images, masks = blobs((32, 32))
    n = np.arange(20)
    data = Slices(images.astype('float16'), masks, n, n*0, n//2, np.tile([1, 32, 32], (20, 1)), np.ones((20, 3)), ('background', 'blob'), 'blobs')
    return Pool('slices', data, n, **common(20, ('blob',), regions={'blob': (1,)}))

def volume_pool():
    images, masks = blobs((12, 12, 12))
    data = Brains(images[:, None].astype('float16'), masks, np.arange(20)//2, (1., 1., 1.), ('channel 1',), 'blobs')
    return Pool('volumes', data, np.arange(20), **common(20, ('blob',), regions={'blob': (1,)}))

POOLS = {'films': film_pool, 'slices': slice_pool, 'volumes': volume_pool}

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "For each kind: task, pool, and three sources: a, its kin b, and the unrelated c."
    folder, made = tmp_path_factory.mktemp('sources'), {}
    torch.manual_seed(0)
    for kind, pool in POOLS.items():
        pool, name = pool(), NET3D if kind == 'volumes' else NET
        task = task_for(pool, name, precision='fp32')
        if kind == 'slices': # one encoder serves both
            made[kind] = task, pool, made['films'][2]
            continue
        state, other = (task.network(seed=s).state_dict() for s in (5, 6))
        state = {k: v + .01*torch.randn_like(v) if v.is_floating_point() and k.endswith('running_mean') else v for k, v in state.items()}
        near = {k: v + .05*v.std()*torch.randn_like(v) if v.ndim > 1 else v for k, v in state.items()}
        body = task.body_names(task.network(seed=0))
        fishers = [{k: torch.rand_like(state[k]) + .1 for k in body} for _ in range(2)]
        for letter, weights, fisher in (('a', state, fishers[0]), ('b', near, fishers[1]), ('c', other, None)):
            save_source(weights, folder/f'{kind[0]}{letter}.safetensors', name, fisher)
        made[kind] = task, pool, tuple(parse_source(folder/f'{kind[0]}{letter}.safetensors') for letter in 'abc')
    return made

def trial(world, kind='films', sources=1, hyper=None, steps=4, every=2, **more):
    task, pool, found = world[kind]
    given = found[:sources] if isinstance(sources, int) else tuple(found['abc'.index(s)] for s in sources)
    return Trial(task, pool, TRAIN, VALID, given, dict(lr=1e-2) | (hyper or {}), steps, every, bs=4, name='test', **more)

def states_equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def trained(name, *args, **kw): return run_trial(name, trial(*args, **kw)).net.state_dict()

# ---------------------------------------------------------------- trials
def test_steps_are_dealt_out(world):
    t = trial(world, steps=200, every=10)
    for shares in ((), (.25,), (.5,), (1/8,)*3, (.9, .9)):
        parts = split_steps(t, *shares)
        assert sum(parts) == 200 and len(parts) == len(shares) + 1 and all(p > 0 and p % 10 == 0 for p in parts)
    assert split_steps(t, .25) == [50, 150]
    with pytest.raises(RecipeError, match='give 30 steps, not 20'): split_steps(trial(world, steps=20, every=10), .2, .2)

def test_no_more_steps_than_given(world):
    t = trial(world)
    net = t.network(t.sources[0])
    t.fit(net, 2)
    with pytest.raises(RecipeError, match='4 steps, but 2 of 4 are left'): t.fit(net, 4)
    t.fit(net)
    with pytest.raises(RecipeError, match='are left|positive multiple'): t.fit(net)
    assert t.taken == 4 and [h['iteration'] for h in t.history] == [2, 4]
    with pytest.raises(RecipeError, match='multiple of validate_every'): trial(world, steps=5)

class Recorded(Callback):
    "The sums of all training batches."
    def __init__(self): self.batches = []
    def before_batch(self):
        if self.training: self.batches.append(float(self.x.double().sum()))

@pytest.mark.parametrize('kind', POOLS)
def test_phases_see_the_same_batches(world, kind):
    one, two = Recorded(), Recorded()
    a, b = trial(world, kind, steps=3, every=1), trial(world, kind, steps=3, every=1)
    a.fit(a.network(), callbacks=[one])
    net = b.network(b.sources[0])
    for steps in (1, 2): b.fit(net, steps, callbacks=[two], frozen=b.task.body_modules(net) if steps == 1 else ())
    assert one.batches == two.batches and len(set(one.batches)) == 3

def test_of_equal_validations_the_lowest_loss_counts(world, tmp_path):
    def fit(loss, scores, **more):
        t = trial(world, steps=4, every=1, **more)
        t.metric, given = lambda *_: scores[len(seen)], iter(loss) # `cached_property`: of this trial alone
        class Seen(Callback):
            order = 62 # after `KeepBest`
            def after_validate(self):
                seen.append({n: v.clone() for n, v in self.model.state_dict().items()})
                self.learn.keep_best.history[-1]['valid_loss'] = next(given)
        seen, net = [], t.network()
        t.fit(net, callbacks=[Seen()])
        return next(i for i, state in enumerate(seen) if states_equal(state, net.state_dict())), t
    assert fit([.7, .6, .5, .6], [.5]*4)[0] == 2 and fit([.5, .6, .7, .6], [.5]*4)[0] == 0
    kept, t = fit([.4, .6, .5, .1], [.5, .8, .8, .7]) # the score comes first
    assert kept == 2 and t.score == .8

@pytest.mark.parametrize('kind', POOLS)
def test_every_recipe_runs(world, kind):
    tried = dict(slices=('decoder_only', 'color_affine', 'weight_sum', 'timm')).get(kind, set(RECIPES) - {'color_deconv', 'color_pixelshuffle', 'l2sp_proximal', 'l2sp_loss'}) # the colour modules differ in T only; L2-SP has tests of its own
    for r in [RECIPES[name] for name in tried if kind in RECIPES[name].kinds]:
        t = trial(world, kind, sources=2, hyper=r.grid[0], steps=2, every=1)
        result = run_trial(r, t)
        assert result.steps == (0 if r.name == 'linear_probe' else 2), r.name
        assert result.steps == len(result.history) and np.isfinite(result.score), r.name
        assert all(isinstance(v, float | np.ndarray) for v in result.notes.values()), r.name
        assert all(p.requires_grad for p in result.net.parameters()) and not result.net.training, r.name
        assert result.score == pytest.approx(t.validate(result.net), abs=1e-5), r.name

def test_a_killed_trial_goes_on(world, tmp_path):
    class Kill(Callback):
        order = 80
        def after_epoch(self): raise KeyboardInterrupt
    def fit(t, kill=False):
        net = t.network(t.sources[0])
        t.fit(net, 2, frozen=t.task.body_modules(net))
        t.fit(net, callbacks=[Kill()]*kill)
        return t.result(net)
    with pytest.raises(KeyboardInterrupt): fit(trial(world, steps=6, folder=tmp_path), kill=True)
    again, whole = fit(trial(world, steps=6, folder=tmp_path)), fit(trial(world, steps=6))
    assert states_equal(again.net.state_dict(), whole.net.state_dict()) and again.history == whole.history
    assert again.trained_parameters == whole.trained_parameters

# ---------------------------------------------------------------- single recipes
def test_scratch_ignores_sources(world):
    alone = trained('scratch', world, sources=0, steps=2)
    assert all(states_equal(alone, trained('scratch', world, sources=s, steps=2)) for s in 'ac')

def test_fresh_parts_start_alike(world):
    task, _, (a, b, _) = world['films']
    heads = [task.network(s, seed=3).C.weight for s in (None, a, b)]
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[1], heads[2])

@pytest.mark.parametrize('form', ['l2sp', 'l2sp_proximal', 'l2sp_loss'])
def test_l2sp_without_penalty_is_full(world, form):
    assert states_equal(trained(form, world, hyper=dict(lam=0.), steps=2), trained('full', world, steps=2))

@pytest.mark.parametrize('kind', POOLS)
def test_l2sp_holds_the_body(world, kind):
    far, near = (run_trial('l2sp_proximal', trial(world, kind, hyper=dict(lam=lam), steps=2)) for lam in (.1, 1e6))
    assert near.notes['l2sp_distance'] < 1e-3 < far.notes['l2sp_distance']
    task, _, sources = world[kind]
    start, names = task.body_state(far.net, sources[0]), task.body_names(far.net)
    distance = sum(float((p.detach() - start[n]).double().square().sum()) for n, p in far.net.named_parameters() if n in names)**.5
    assert far.notes['l2sp_distance'] == pytest.approx(distance, rel=1e-5)
    assert far.history[-1]['distance'] > 0 and far.history[-1]['penalty'] == pytest.approx(.1*far.history[-1]['distance']**2, rel=1e-4)

@pytest.mark.parametrize('kind', ['films', 'volumes'])
def test_wise_ft_at_its_ends(world, kind):
    assert states_equal(trained('wise_ft', world, kind, hyper=dict(alpha=1.), steps=2), trained('full', world, kind, steps=2))
    net = run_trial('wise_ft', trial(world, kind, hyper=dict(alpha=[0.]), steps=2)).net
    task, _, sources = world[kind]
    start = task.body_state(net, sources[0])
    for name, p in net.named_parameters():
        if name in task.body_names(net): assert torch.equal(p, start[name])

def test_wise_ft_takes_the_best_point(world):
    result = run_trial('wise_ft', trial(world, hyper=dict(alpha=[.5, 1., 0.])))
    scores, alphas = result.notes['alpha_scores'], result.notes['alphas']
    assert alphas.tolist() == [1., .5, 0.] and result.score == scores.max() and result.notes['alpha'] == alphas[scores.argmax()]

def test_interpolated_norms_are_measured_anew(world):
    t = trial(world, hyper=dict(alpha=[.5]))
    net = run_trial('wise_ft', t).net
    first = net.E.bn1
    seen, hook = [], first.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    t.refresh_norms(net) # once more: the same
    means = torch.stack([x.mean((0, 2, 3)) for x in seen[-2:]]).mean(0) # 2 batches are an epoch
    hook.remove()
    torch.testing.assert_close(first.running_mean, means.detach())

def test_linear_probe_leaves_the_body(world):
    task, _, sources = world['films']
    result = run_trial('linear_probe', trial(world, hyper=dict(decay=.1)))
    start = task.network(sources[0], 0).state_dict()
    now = result.net.state_dict()
    assert all(torch.equal(now[k], start[k]) for k in now if not k.startswith('C.')) and not torch.equal(now['C.weight'], start['C.weight'])
    assert result.trained_parameters == sum(p.numel() for p in result.net.C.parameters()) and result.steps == 0

def test_logistic_head_is_sklearns(world):
    rng = np.random.default_rng(0)
    z = rng.normal(3, 2, (60, 7)).astype('float32')
    y = (z[:, 0] - z[:, 1] + rng.normal(0, 1, 60) > 0).astype('float32')
    weight, bias = logistic_head(torch.tensor(z), torch.tensor(y)[:, None], lambda a, b: torch.nn.functional.binary_cross_entropy_with_logits(a, b), 1, decay=.05)
    standard = (z - z.mean(0))/z.std(0)
    theirs = LogisticRegression(C=1/(60*.05), tol=1e-8, max_iter=10_000).fit(standard, y) # |W|^2/2 + C * sum of losses
    np.testing.assert_allclose((z @ weight.numpy().T + bias.numpy())[:, 0], theirs.decision_function(standard), atol=2e-3)

def test_a_constant_feature_says_nothing():
    z, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0., 1.]*10)[:, None]
    weight, bias = logistic_head(torch.cat([z, torch.full((20, 1), 7.)], 1), y, masked_bce, 1)
    alone, other = logistic_head(z, y, masked_bce, 1)
    assert weight[0, 3] == 0
    torch.testing.assert_close((weight[:, :3], bias), (alone, other))

def test_a_weight_counts_as_copies(world):
    task, _, sources = world['films']
    heads = []
    for weights, rows in ((np.r_[3., np.ones(19)], TRAIN), (None, np.r_[0, 0, TRAIN])):
        heads.append(run_trial('linear_probe', Trial(task, film_pool(weights), rows, VALID, sources[:1], dict(decay=.1), 4, 2)).net.C.weight)
    torch.testing.assert_close(*heads, atol=1e-4, rtol=1e-3)

def test_unknown_labels_are_left_out():
    z, y = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0., 1.]*15)
    y[20:] = float('nan')
    fits = [logistic_head(z - z[:20].mean(0), y[:, None], masked_bce, 1, 0.5), logistic_head(z[:20] - z[:20].mean(0), y[:20, None], masked_bce, 1, 0.5)]
    assert torch.isfinite(fits[0][0]).all() and torch.sign(fits[0][0]).equal(torch.sign(fits[1][0]))

@pytest.mark.parametrize('kind', ['slices', 'volumes'])
def test_decoder_only_leaves_the_body(world, kind):
    task, _, sources = world[kind]
    net = run_trial('decoder_only', trial(world, kind)).net
    start, now = task.body_state(net, sources[0]), net.state_dict()
    assert all(torch.equal(now[k], v) for k, v in start.items())
    fresh = task.network(sources[0], 0).state_dict()
    assert any(not torch.equal(now[k], fresh[k]) for k in now if k not in start)

def test_gradual_unfreezes_from_the_head(world):
    task, _, sources = world['films']
    moved, t = [], trial(world, steps=4, every=1)
    start = {n: p.detach().clone() for n, p in task.network(sources[0], 0).named_parameters()}
    class Moved(Callback):
        order = 90
        def after_fit(self):
            groups = task.groups(self.model, 3)
            name = {p: n for n, p in self.model.named_parameters()}
            norms = {p for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
            moved.append([any(not torch.equal(p, start[name[p]]) for p in g if p not in norms) for g in groups])
    fit = t.fit
    t.fit = lambda *a, **k: fit(*a, callbacks=[Moved()], **k)
    run_trial('gradual', t)
    assert moved == [[False, False, False, True], [False, False, True, True], [False, True, True, True], [True]*4]
    assert [h['phase'] for h in t.history] == [f'{k} of 4 groups' for k in range(1, 5)]

def test_gradual_rates(world):
    t, seen = trial(world, steps=2), []
    fit = t.fit
    t.fit = lambda net, steps, lrs, **k: (seen.append(lrs), fit(net, steps, lrs=lrs, **k))
    t.steps, t.validate_every = 4, 2
    run_trial('gradual', t)
    assert seen[0] == pytest.approx([1e-2/2.6, 1e-2]) # one group of the body for two validations

def test_what_rested_may_train_again(world):
    t = trial(world)
    net = t.network()
    t.fit(net, 2, groups=t.task.groups(net, 1), freeze_to=1)
    assert all(p.requires_grad for p in net.parameters())
    assert t.trained.keys() < dict(net.named_parameters()).keys() and 'C.weight' in t.trained and 'E.conv_stem.weight' not in t.trained

def test_lp_ft(world):
    t = trial(world, 'slices', steps=4, every=1)
    run_trial('lp_ft', t)
    assert [h['phase'] for h in t.history] == ['decoder', 'training', 'training', 'training'] and [h['iteration'] for h in t.history] == [1, 2, 3, 4]
    films = trial(world, hyper=dict(decay=.1))
    probe = run_trial('linear_probe', trial(world, hyper=dict(decay=.1))).net
    seen, fit = [], films.fit
    films.fit = lambda net, **k: (seen.append({n: v.clone() for n, v in net.state_dict().items()}), fit(net, **k))
    run_trial('lp_ft', films)
    assert states_equal(seen[0], probe.state_dict()) # fine-tuning starts from the probe

# ---------------------------------------------------------------- merging
def test_imm_of_one_source_twice_is_full(world):
    full = trained('full', world, 'volumes', sources='a', steps=2)
    assert all(states_equal(trained(name, world, 'volumes', sources='aa', steps=2), full) for name in ('imm', 'soup'))

@pytest.mark.parametrize('kind', POOLS)
def test_merged_starts(world, kind):
    k = kin(trial(world, kind, sources=2))
    starts = {}
    for name in ('imm', 'soup'):
        t = trial(world, kind, sources=2)
        t.fit = lambda net, **_: starts.setdefault(name, {n: v.clone() for n, v in net.state_dict().items()})
        run_trial(name, t)
    for n in k.names:
        a, b, fa, fb = (x[n].double() for x in (*k.states, *k.fishers))
        fa, fb = fa/fa.mean(), fb/fb.mean()
        torch.testing.assert_close(starts['soup'][n].double(), (a + b)/2, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(starts['imm'][n].double(), (fa*a + fb*b)/(fa + fb), atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(starts['imm'][n], starts['soup'][n]) for n in k.names)

@pytest.mark.parametrize('kind', ['films', 'volumes'])
def test_timm_adapts_the_ratios(world, kind):
    t = trial(world, kind, sources=2, hyper=dict(ratio_lr=.5))
    k = kin(t)
    ratios = adapt(t, k, 2)
    unit_of, params = units(dict(k.net.named_parameters()), 'layer', net=k.net), dict(k.net.named_parameters())
    assert ratios.keys() == {unit_of[n] for n in k.names}
    for n in k.names:
        alpha = ratios[unit_of[n]].double()
        assert alpha.sum() == pytest.approx(1, abs=1e-6)
        (a, b), (fa, fb) = ([x[n].double() for x in group] for group in (k.states, k.fishers))
        fa, fb = alpha[0]*fa/fa.mean(), alpha[1]*fb/fb.mean()
        torch.testing.assert_close(params[n].detach().double(), (fa*a + fb*b)/(fa + fb), atol=1e-5, rtol=1e-4)
    assert any(abs(float(r[0]) - .5) > .01 for r in ratios.values()) and t.taken == 2
    assert all(p.requires_grad for p in k.net.parameters())

def test_timm_notes(world):
    told = []
    result = run_trial('timm', trial(world, 'volumes', sources=2, hyper=dict(ratio_lr=.05), steps=4, every=1, progress=told.append))
    assert told == pytest.approx(np.arange(1, 5)/4) # through all phases
    found = {k: v for k, v in result.notes.items() if k.startswith('ratio_')}
    assert found and all(v.shape == (2,) and v.sum() == pytest.approx(1, abs=1e-5) for v in found.values()) and result.notes['fisher'] == 1.
    assert [h['phase'] for h in result.history] == ['adaption'] + ['fine-tuning']*3 and result.history[-1]['iteration'] == result.steps == 4
    assert all(0 <= h['valid_metric'] <= 1 for h in result.history) # the Dice in both phases

# ---------------------------------------------------------------- colours
def test_colour_stages(world):
    task, _, sources = world['films']
    states, t = [], trial(world)
    fit = t.fit
    def spy(net, *a, **k):
        states.append({n: v.clone() for n, v in net.state_dict().items()})
        fit(net, *a, **k)
        states.append({n: v.clone() for n, v in net.state_dict().items()})
    t.fit = spy
    run_trial('color_affine', t)
    start, first, restart, end = states
    part = lambda state, p: {k: v for k, v in state.items() if k.startswith(p)}
    assert states_equal(part(start, 'E.'), part(first, 'E.')) and not states_equal(part(start, 'E.'), part(end, 'E.'))
    assert not states_equal(part(start, 'T.'), part(first, 'T.')) and states_equal(part(first, 'T.'), part(restart, 'T.'))
    assert not states_equal(part(start, 'C.'), part(first, 'C.')) and states_equal(part(start, 'C.'), part(restart, 'C.')) # the head starts anew

# ---------------------------------------------------------------- the register, and arms
def test_register():
    @recipe('half_frozen', 'Half frozen', grid=candidates(lr=(1e-3, 1e-2)))
    def half_frozen(trial):
        "Half of the body rests."
        return trial.result(trial.network(trial.sources[0]))
    try:
        assert isinstance(half_frozen, Recipe) and RECIPES['half_frozen'] is half_frozen and half_frozen.summary == 'Half of the body rests.'
        assert list(RECIPES)[:3] == ['scratch', 'full', 'half_frozen'] # what the user adds is important to the user
        code = recipe_code(half_frozen)
        assert len(code) == 12 and code == recipe_code(half_frozen)
        again = recipe('half_frozen', 'Half frozen', grid=candidates(lr=(1e-3,)))(half_frozen.fit)
        assert recipe_code(again) != code # another grid is another recipe
        assert recipe_code(get_recipe('full')) == ''
    finally: RECIPES.pop('half_frozen')
    with pytest.raises(RecipeError, match='choose another name'): recipe('full', 'Mine')(half_frozen.fit)
    for wrong in (dict(needs='two'), dict(grid=()), dict(grid=(1,)), dict(grid=(dict(lr=torch.ones(1)),)), dict(kinds=('meshes',))):
        with pytest.raises(RecipeError): recipe('mine', 'Mine', **wrong)(half_frozen.fit)
    with pytest.raises(RecipeError, match='there are: scratch'): get_recipe('fulll')
    assert 'mine' not in RECIPES

def test_recipes_that_break_the_rules(world):
    wrong = {'forgot': lambda t: t.network(), 'broken': lambda t: t.result(poisoned(t.network())),
             'greedy': lambda t: TrialResult(t.network(), [], {}, 0, t.steps + 1, 0.)}
    for name, match in dict(forgot='return trial.result', broken='NaN or infinite', greedy='not 4 at most').items():
        with pytest.raises(TrainingDiverged if name == 'broken' else RecipeError, match=match): run_trial(Recipe(name, name, wrong[name], needs='none'), trial(world))
    with pytest.raises(RecipeError, match='no source was given'): run_trial('full', trial(world, sources=0))

def poisoned(net):
    with torch.no_grad(): next(net.parameters()).fill_(float('nan'))
    return net

def test_library_recipes_are_complete():
    for r in RECIPES.values():
        assert len(r.grid) == 3 and r.summary and (r.reference or r.name == 'scratch'), r.name # all are tuned alike

def test_arms(world):
    a, b, c = world['films'][2]
    arms, left = arms_for(['scratch', 'full', 'timm'], [a, b])
    assert [arm.name for arm in arms] == ['scratch', 'full@fa', 'full@fb', 'timm@fa+fb'] and not left
    assert arms[1].title == 'Full fine-tuning from fa' and arms[0].title == 'From scratch'
    assert Arm('timm', ('x', 'y')).title == 'T-IMM from x and y'
    arms, left = arms_for(None, [a])
    assert 'timm' not in {arm.recipe for arm in arms} and 'two sources' in left['T-IMM'] and 'not for films' in left['Decoder only (frozen body)']
    assert 'l2sp_loss' not in {arm.recipe for arm in arms}
    arms, left = arms_for(None, [])
    assert [arm.name for arm in arms] == ['scratch'] and left['Full fine-tuning'] == 'no source was given'

def test_what_cannot_be_merged(world):
    a, b, c = world['films'][2]
    v = world['volumes'][2]
    assert 'no common ancestor' in unrelated([a, c]) and 'fa and fc' in unrelated([a, c]) and unrelated([a, b]) == ''
    assert 'fa and fc' in arms_for(['timm'], [a, b, c])[1]['T-IMM']
    assert 'different architectures' in unrelated([a, v[0]])
    arms, left = arms_for(['timm', 'full'], [a, v[0]], 'volumes')
    assert [arm.name for arm in arms] == ['full@va'] and '2-D network' in left['Full fine-tuning from fa'] and 'two sources' in left['T-IMM']

def test_names_of_files_may_differ(world, tmp_path):
    a, b, _ = world['films'][2] # of whole networks: E.conv_stem.weight
    bare = {k.removeprefix('E.'): v for k, v in b.weights().items() if k.startswith('E.')}
    save_source(bare, tmp_path/'bare.safetensors', NET)
    assert unrelated([a, parse_source(tmp_path/'bare.safetensors')]) == ''

def test_soup_and_imm_are_the_same_without_fisher(world, tmp_path):
    a, b, _ = world['volumes'][2]
    for s in (a, b): save_source(s.weights(), tmp_path/f'{s.name}.safetensors', NET3D)
    bare = [parse_source(tmp_path/f'{s.name}.safetensors') for s in (a, b)]
    assert [arm.recipe for arm in arms_for(['imm', 'soup'], [a, b], 'volumes')[0]] == ['imm', 'soup']
    arms, left = arms_for(['imm', 'soup'], bare, 'volumes')
    assert [arm.recipe for arm in arms] == ['imm'] and 'the same as IMM' in left['Soup of the sources']
    assert [arm.recipe for arm in arms_for(['soup'], bare, 'volumes')[0]] == ['soup']
