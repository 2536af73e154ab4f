"""What a run of a comparison promises: the outer fold is touched once, arms share all but the strategy, a killed run goes on, failures stay local."""
import shutil
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from medxfer_nb.compare import runs as library
from medxfer_nb.compare.design import Design
from medxfer_nb.compare.pool import Pool
from medxfer_nb.compare.recipes import arms_for
from medxfer_nb.compare.results import ResultsError, repeat_scores
from medxfer_nb.compare.runs import (CompareRun, Tried, best_of, blinded, chance, divide, final_run, gather, masks_of, named_sources, permuted, read_pool,
                                     run_all, runs_for, trained_net, work_of, write_study)
from medxfer_nb.compare.sources import parse_sources, save_source
from medxfer_nb.compare.trials import RECIPES, recipe
from medxfer_nb.data.brain import Brains
from medxfer_nb.data.cases import Cases
from medxfer_nb.data.slices import Slices
from medxfer_nb.evaluate.volumes import overlap
from medxfer_nb.models.colorize import load_backbone
from medxfer_nb.repro.jobs import RunFailed, Runs, load_or_run, plan
from medxfer_nb.repro.store import ConfigError, Store
from medxfer_nb.transfer.stages import TrainingDiverged

pytestmark = pytest.mark.filterwarnings('ignore')
NET = 'test_efficientnet'  # The smallest that timm has


def films(n_patients=24, per_patient=2, size=32, seed=0, split=None, targets=None, pixels=None):
    rng, patients = np.random.default_rng(seed), np.repeat(np.arange(n_patients), per_patient)
    ill = np.repeat(rng.permutation(n_patients) % 2, per_patient)
    drawn = rng.normal(100, 20, (len(patients), size, size))
    drawn[:, 8:24, 8:24] += 60*ill[:, None, None]
    drawn = drawn.clip(0, 255).astype(np.uint8) if pixels is None else pixels
    frame = pd.DataFrame(dict(patient=[f'p{p}' for p in patients], study=[f's{i}' for i in range(len(patients))], bright=(ill if targets is None else targets).astype('float32')))
    V = len(patients)
    return Pool('films', Cases('squares', frame, ('bright',), drawn), np.arange(V), patients, ('bright',), np.ones(V), np.full(V, '') if split is None else split, np.full((V, 3), np.nan), name='squares')

def slices(n=8, z=2, size=32):
    rng, masks, v = np.random.default_rng(0), np.zeros((n*z, size, size), np.uint8), np.repeat(np.arange(n), z)
    for i in range(n*z): masks[i, 4:16, 4 + i % 5:14] = 1
    data = Slices((rng.random(masks.shape)*.3 + .6*masks).astype(np.float16), masks, v, np.tile(np.arange(z), n), np.arange(n), np.tile([z, size, size], (n, 1)), np.full((n, 3), 2.), ('background', 'lesion'))
    return Pool('slices', data, v, np.arange(n), ('lesion',), np.ones(n), np.full(n, ''), np.full((n, 3), 2.), {'lesion': (1,)})

def volumes(n=8, size=18):
    rng, labels = np.random.default_rng(0), np.zeros((n, size, size, size), np.uint8)
    for i in range(n): labels[i, 3:9, 3:9, 3 + i % 3:9], labels[i, 10:14, 10:14, 10:14] = 1, 2
    data = Brains((rng.random((n, 2, size, size, size))*.3 + .35*labels[:, None]).astype(np.float16), labels, np.arange(n), (1., 1., 1.), ('channel 1', 'channel 2'))
    return Pool('volumes', data, np.arange(n), np.arange(n), ('1', '2'), np.ones(n), np.full(n, ''), np.ones((n, 3)), {'1': (1,), '2': (2,)})

def run(arm='scratch', sources=(), **changes):
    same = dict(kind='films', architecture=NET, size=32, bs=8, steps=2, validate_every=1, folds=3, fold=0, precision='fp32')
    return CompareRun(arm=arm, sources=tuple(f'{s.name} {s.identity}' for s in sources), **same | changes)

def trained(store, study, *configs, **options): return load_or_run(configs, store, data_root=study, progress=None, **dict(strict=True) | options)

def same_weights(a, b):
    a, b = a.weights(), b.weights()
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sources')
    torch.manual_seed(1)
    return parse_sources([save_source(load_backbone(NET).state_dict(), folder/'base.safetensors', NET)])

@pytest.fixture(scope='module')
def study(tmp_path_factory, sources): return write_study(tmp_path_factory.mktemp('study'), films(), sources)

@pytest.fixture(scope='module')
def store(tmp_path_factory): return Store(tmp_path_factory.mktemp('store'))

@pytest.fixture
def own():
    "Recipes of this test alone"
    before = dict(RECIPES)
    yield
    RECIPES.clear(); RECIPES.update(before)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('portion', [1., .5])
def test_no_patient_is_on_two_sides_and_each_is_tested_once(seed, portion):
    pool, seen = films(), []
    for fold in range(3):
        d = divide(run(seed=seed, fold=fold, portion=portion), pool)
        groups = [set(pool.patients[rows]) for rows in (d.fit, d.valid, d.test)]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
        assert len(set().union(*groups)) == (24 if portion == 1 else len(groups[2]) + 8)
        for rows in (d.fit, d.valid, d.test): assert len(np.unique(pool.targets[rows])) == 2
        other = divide(run('full', seed=seed, fold=fold, portion=portion), pool)
        assert all((getattr(d, n) == getattr(other, n)).all() for n in ('fit', 'valid', 'test'))  # The arm does not matter
        seen.append(d.test)
    assert sorted(np.concatenate(seen)) == list(range(48))


def test_a_given_split_is_the_only_outer_fold():
    split = np.where(np.arange(48) < 16, 'test', 'train')
    d = divide(run(folds=1, fold=0), films(split=split))
    assert (d.test == np.arange(16)).all() and sorted([*d.fit, *d.valid]) == list(range(16, 48))


@pytest.mark.parametrize('make', [films, slices, volumes])
def test_a_recipe_sees_no_label_of_the_outer_fold(make):
    pool, rows = make(), np.array([1, 4])
    blind = blinded(pool, rows)
    if pool.kind == 'films':
        assert np.isnan(blind.targets[rows]).all() and (np.delete(blind.targets, rows, 0) == np.delete(pool.targets, rows, 0)).all()
    else:
        before, after = (p.data.masks if p.kind == 'slices' else p.data.labels for p in (pool, blind))
        hidden = np.isin(pool.cases, rows)
        assert before[hidden].any() and not after[hidden].any() and (after[~hidden] == before[~hidden]).all()
    assert blind.fingerprint() != pool.fingerprint()


def test_outer_labels_and_images_change_nothing_that_is_trained(tmp_path, sources):
    split = np.where(np.arange(48) < 16, 'test', 'train')
    plain = films(split=split)
    targets, pixels = plain.targets[:, 0].copy(), plain.data.pixels.copy()
    targets[:16] = 1 - targets[:16]
    pixels[:16] = 255 - pixels[:16]
    config, records = run('full', sources, folds=1), []
    for i, pool in enumerate([plain, films(split=split, targets=targets), films(split=split, pixels=pixels)]):
        records += trained(tmp_path/'store', write_study(tmp_path/f'study{i}', pool, sources), config)
    assert len({r.key for r in records}) == 3
    assert same_weights(records[0], records[1]) and same_weights(records[0], records[2])
    a, b, c = (r.predictions() for r in records)
    assert (a['outputs'] == b['outputs']).all() and not (a['score_log_loss'] == b['score_log_loss']).any() and (a['outputs'] != c['outputs']).any()
    assert a['rows'].tolist() == list(range(16))


def test_the_outer_fold_is_predicted_once_after_the_choice(tmp_path, study, sources, monkeypatch):
    asked, at, real = [], divide(run(), films()), library.task_for
    def watched(*args, **options):
        task = real(*args, **options)
        predict = task.predict
        object.__setattr__(task, 'predict', lambda net, pool, rows: asked.append(np.asarray(rows)) or predict(net, pool, rows))
        return task
    monkeypatch.setattr(library, 'task_for', watched)
    monkeypatch.setattr(library, 'best_of', lambda tried, choose=best_of: asked.append('choice') or choose(tried))
    trained(tmp_path, study, run('full', sources, trials=3))
    assert [type(a) for a in asked] == [np.ndarray]*3 + [str, np.ndarray]
    assert all((a == at.valid).all() for a in asked[:3]) and (asked[4] == at.test).all()


def test_the_best_candidate_is_chosen_and_is_what_is_stored(store, study, sources):
    tuned, = trained(store, study, run('full', sources, trials=3))
    alone = [trained(store, study, run('full', sources, trials=1))[0]]
    inner = list(tuned.metrics['inner_scores'].values())
    assert len(inner) == 3 and tuned.metrics['inner'] == inner[tuned.metrics['candidate']] == max(inner)
    assert alone[0].metrics['inner'] == inner[0]  # A candidate does not depend on how many there are
    assert {h['candidate'] for h in tuned.history} == {0, 1, 2} and tuned.metrics['hyper'].startswith('lr ')
    work = work_of(tuned.config, study)
    task, pool, net = trained_net(tuned, study)
    assert (task.predict(net, pool, work.division.test) == tuned.predictions()['outputs']).all()
    assert (tuned.predictions()['fit_rows'] == work.division.fit).all()


def test_a_killed_run_goes_on_and_ends_alike(tmp_path, study, sources, monkeypatch):
    config, calls, real = run('full', sources, trials=2), [], library.run_trial
    whole, = trained(tmp_path/'one', study, config)
    def killed(recipe, trial):
        calls.append(trial.hyper)
        if len(calls) == 2:
            real(recipe, trial)  # Leaves checkpoints of its own behind
            raise KeyboardInterrupt
        return real(recipe, trial)
    monkeypatch.setattr(library, 'run_trial', killed)
    with pytest.raises(KeyboardInterrupt): trained(tmp_path/'two', study, config)
    assert len(calls) == 2 and not Store(tmp_path/'two').keys()
    again, = trained(tmp_path/'two', study, config)
    assert len(calls) == 3  # The first candidate was kept
    assert again.key == whole.key and same_weights(again, whole)
    assert all((again.predictions()[k] == v).all() for k, v in whole.predictions().items())
    timeless = lambda r: {k: v for k, v in r.metrics.items() if k != 'seconds'}
    assert timeless(again) == timeless(whole) and again.history == whole.history


def test_a_damaged_candidate_is_trained_again(tmp_path, store, study, monkeypatch):
    config, real = run(), library.best_of
    def stop(tried): raise KeyboardInterrupt
    monkeypatch.setattr(library, 'best_of', stop)
    with pytest.raises(KeyboardInterrupt): trained(tmp_path, study, config)
    monkeypatch.setattr(library, 'best_of', real)
    kept, = tmp_path.glob('staging/*/candidate0.safetensors')
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    record, = trained(tmp_path, study, config)
    assert same_weights(record, trained(store, study, config)[0])


def test_a_candidate_that_diverges_costs_itself_only(tmp_path, study, own):
    @recipe('wild', 'Too fast', needs='none', grid=(dict(lr=1.), dict(lr=.5), dict(lr=1e-3)))
    def wild(trial):
        assert np.isnan(trial.pool.targets[divide(run(), films()).test]).all()  # It may read, but there is nothing to read
        if trial.hyper['lr'] == 1.: raise TrainingDiverged('loss is nan at step 3. Run: x', 3, np.nan)
        net = trial.network()
        trial.fit(net, lr=trial.hyper['lr'])
        if trial.hyper['lr'] == .5: torch.nn.init.constant_(net.C.bias, np.inf)
        return trial.result(net)
    code = library.recipe_code(RECIPES['wild'])
    record, = trained(tmp_path, study, run('wild', trials=3, recipe_code=code))
    assert record.metrics['candidate'] == 2 and record.metrics['diverged'] == 2 and np.isnan(record.metrics['inner_scores']['0 lr 1'])
    with pytest.raises(RunFailed, match='none of 1 candidates trained: loss is nan'): trained(tmp_path, study, run('wild', recipe_code=code))


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the peak of a process cannot be taken back')
def test_memory_is_that_of_the_run(tmp_path, study, own):
    @recipe('hungry', 'Hungry', needs='none', grid=({},))
    def hungry(trial):
        np.ones(50_000_000)  # 400 MB
        return trial.result(trial.network())
    code = library.recipe_code(RECIPES['hungry'])
    dear, cheap = trained(tmp_path, study, run('hungry', recipe_code=code), run(fold=1))
    assert dear.manifest['peak_memory_mb'] > cheap.manifest['peak_memory_mb'] + 200


def test_recipes_of_a_notebook_are_keyed_by_their_code(tmp_path, study, own, store):
    def define(factor):
        @recipe('mine', 'Mine', needs='none', grid=(dict(lr=factor),))
        def mine(trial):
            net = trial.network()
            trial.fit(net, lr=trial.hyper['lr'])
            return trial.result(net)
        return library.recipe_code(RECIPES['mine'])
    first, second = define(1e-3), define(2e-3)
    assert first != second and library.recipe_code(RECIPES['scratch']) == ''
    with pytest.raises(RunFailed, match='no longer the one'): trained(tmp_path, study, run('mine', recipe_code=first))
    done = run_all([run('mine', recipe_code=second), run()], tmp_path, study, jobs=1, progress=None)
    assert [r.config.name for r in done] == ['mine', 'scratch'] and not done.failures


def test_keys_follow_the_data_and_the_sources_and_not_their_place(tmp_path, study, sources):
    config = run('full', sources)
    key = lambda folder: plan([config], Store(tmp_path/'store'), folder).todo[0].key
    moved = tmp_path/'moved'
    shutil.copytree(study, moved)
    assert key(moved) == key(study)
    assert key(write_study(tmp_path/'other', films(seed=1), sources)) != key(study)
    torch.manual_seed(2)
    changed = parse_sources([save_source(load_backbone(NET).state_dict(), tmp_path/'base.safetensors', NET)])
    assert run('full', changed).config_key != config.config_key
    with pytest.raises(ConfigError, match='base is not among the sources'): named_sources(run('full', changed), study)
    with pytest.raises(ConfigError, match='give its folder as data_root'): plan([config], Store(tmp_path/'store'))
    with pytest.raises(ConfigError, match='holds no study'): plan([config], Store(tmp_path/'store'), tmp_path)


def test_write_study_replaces_other_cases_only(tmp_path, sources):
    folder = write_study(tmp_path, films(), sources)
    before = (folder/'pool'/'pool.json').stat().st_mtime_ns
    write_study(folder, films(), ())
    assert (folder/'pool'/'pool.json').stat().st_mtime_ns == before
    write_study(folder, films(seed=1), ())
    assert read_pool(folder).fingerprint() == films(seed=1).fingerprint()


@pytest.mark.parametrize('change, message', [(dict(fold=3), 'there are folds 0 to 2'), (dict(validate_every=3), 'not a multiple'), (dict(portion=0.), r'lies in \(0, 1\]'), (dict(bs=0), 'must be positive'),
    (dict(kind='slices', permuted=True), 'where they are masks'), (dict(sources=('a',)), 'name identity')])
def test_what_cannot_be_a_run(change, message):
    with pytest.raises(ConfigError, match=message): replace(run(), **change)


def test_permuted_labels_are_chance_on_the_outer_folds(store, study, sources):
    "The same strategy that learns the true labels; one that takes no steps, so that there can be more repeats"
    pool, how = films(), dict(steps=2, validate_every=1, bs=16, folds=2)
    true = trained(store, study, *(run('linear_probe', sources, fold=f, **how) for f in range(2)))
    mixed = trained(store, study, *(run('linear_probe', sources, fold=f, seed=s, permuted=True, **how) for s in range(3) for f in range(2)))
    found = chance(mixed, pool)
    design = Design('films', ('linear_probe@base',), repeats=1, trials=1, n_patients=24, size=32, **how)
    assert repeat_scores(gather(true, pool, design), 'linear_probe@base')[0] > .85
    assert len(found) == 3 and abs(found.auc.mean() - .5) < .2  # 24 patients, twelve of each: sd of the mean about 0.07
    labels = permuted(pool, 0)
    assert sorted(labels.targets[:, 0]) == sorted(pool.targets[:, 0]) and (labels.targets != pool.targets).any()
    assert (labels.targets[::2] == labels.targets[1::2]).all()  # By patient
    with pytest.raises(ResultsError, match='permuted=True'): chance(true, pool)


def test_a_run_on_all_patients_is_validated_and_not_tested(store, study, sources):
    record, = trained(store, study, final_run(run('full', sources, fold=2, portion=.5, trials=2)))
    assert record.metrics['n_test'] == 0 and record.metrics['n_fit'] + record.metrics['n_valid'] == 24 and np.isfinite(record.metrics['inner'])
    assert 'outputs' not in record.predictions() and record.weights()


@pytest.fixture(scope='module')
def compared(tmp_path_factory, sources):
    "Three arms, one of which fails in the second repeat; a learning curve of one"
    folder, before = tmp_path_factory.mktemp('compared'), dict(RECIPES)
    @recipe('faulty', 'Faulty', needs='none', grid=({},))
    def faulty(trial):
        if trial.seed: raise ZeroDivisionError('division by zero')
        return trial.result(trial.network())
    study = write_study(folder/'study', films(), sources)
    design = Design('films', ('scratch', 'full@base', 'faulty'), folds=2, repeats=2, trials=1, steps=2, validate_every=1, size=32, bs=8, portions=(.5,), portion_arms=('full@base',), n_patients=24)
    arms, left_out = arms_for(['scratch', 'full', 'faulty', 'imm'], sources, 'films')
    configs = runs_for(design, arms, sources, NET, precision='fp32')
    done = run_all(configs, folder/'store', study, progress=None)
    yield design, arms, left_out, configs, done, study
    RECIPES.clear(); RECIPES.update(before)


def test_runs_come_repeat_by_repeat_and_curves_last(compared):
    design, _, _, configs, _, _ = compared
    assert len(configs) == design.n_runs == 2*2*(3 + 1)
    assert [c.seed for c in configs[:12]] == [0]*6 + [1]*6 and [c.portion for c in configs] == [1.]*12 + [.5]*4
    assert [c.name for c in configs[:3]] == list(design.arms) and {c.recipe_code == '' for c in configs if c.arm == 'faulty'} == {False}


def test_a_failure_stays_local_and_is_told(compared):
    design, arms, left_out, configs, done, _ = compared
    assert len(done.failures) == 2 and len(done) == len(configs) - 2
    results = gather(done, films(), design, arms, left_out)
    assert results.arms == ('scratch', 'full@base') and results.seeds == (0, 1)
    assert results.left_out['Faulty'] == 'a run failed (ZeroDivisionError: division by zero)' and 'IMM' in results.left_out
    assert [f.split(':')[0] for f in results.failures] == ['faulty fold 1 of 2 seed 1', 'faulty fold 2 of 2 seed 1']


def test_gather_puts_every_number_in_its_place(compared):
    design, arms, left_out, configs, done, _ = compared
    pool = films()
    results = gather(done, pool, design, arms, left_out)
    for r in done:
        if r.config.portion < 1 or r.config.arm == 'faulty': continue
        found, s = r.predictions(), results.seeds.index(r.config.seed)
        assert (results.folds[s, found['rows']] == r.config.fold).all()
        np.testing.assert_array_equal(results.outputs[r.config.name][s, found['rows']], found['outputs'])
        np.testing.assert_array_equal(results.scores[r.config.name]['brier'][s, found['rows']], found['score_brier'])
        p, y = found['outputs'][:, 0].astype(float), pool.targets[found['rows'], 0]
        np.testing.assert_allclose(found['score_brier'], (p - y)**2, rtol=1e-4, atol=1e-9)
    full = [r for r in done if r.config.name == 'full@base' and r.config.portion == 1]
    assert results.costs.loc['full@base', 'runs'] == 4 and results.costs.loc['full@base', 'seconds'] == np.median([r.metrics['seconds'] for r in full])
    assert results.notes.query('arm == "full@base"').inner.tolist() == [r.metrics['inner'] for r in sorted(full, key=lambda r: (r.config.seed, r.config.fold))]
    curve = results.curves.set_index(['portion', 'seed'])
    assert len(curve) == 4 and set(results.curves.arm) == {'full@base'} and curve.n_patients[.5, 0] == 6 and curve.n_patients[1., 0] == 12
    np.testing.assert_allclose([curve.score[1., s] for s in (0, 1)], repeat_scores(results, 'full@base'))
    assert results.provenance['data'] == pool.fingerprint()[:16] and results.provenance['sources'] == list(full[0].config.sources)


def test_an_unfinished_repeat_is_left_out_for_all(compared):
    design, arms, left_out, configs, done, _ = compared
    some = Runs([r for r in done if not (r.config.seed == 1 and r.config.arm == 'full')])
    results = gather(some, films(), design, arms)
    assert results.seeds == (0,) and results.arms == ('scratch', 'full@base', 'faulty')
    with pytest.raises(ResultsError, match='no repeat is complete'): gather(Runs(done[:1]), films(), design, arms)


def test_child_processes_train_the_same(tmp_path, study, sources, store):
    configs = [run()]
    here, there = trained(store, study, *configs), run_all(configs, tmp_path, study, jobs=2, progress=None)
    assert not there.failures, there.summary()
    for a, b in zip(here, there):
        assert a.key == b.key
        np.testing.assert_allclose(a.predictions()['outputs'], b.predictions()['outputs'], atol=1e-5)


@pytest.mark.parametrize('make, net, bs', [(slices, NET, 4), (volumes, 'unet3d-4', 2)])
def test_segmentation(tmp_path, make, net, bs):
    pool = make()
    study = write_study(tmp_path/'study', pool, ())
    design = Design(pool.kind, ('scratch',), folds=2, repeats=1, trials=1, steps=2, validate_every=1, size=pool.size, bs=bs, n_patients=8)
    done = run_all(runs_for(design, arms_for(['scratch'], (), pool.kind)[0], (), net, precision='fp32'), tmp_path/'store', study, progress=None)
    assert not done.failures, done.summary()
    results, masks = gather(done, pool, design), masks_of(done, study)('scratch', range(8))
    assert results.metric == 'dice' and results.targets is None and set(masks) == set(range(8))
    task = trained_net(done[0], study)[0]
    for case, predicted in masks.items():
        dice = np.mean([overlap(p, t, True).dice for p, t in zip(predicted, task.truth(pool, case))])
        assert results.scores['scratch']['dice'][0, case] == pytest.approx(dice, abs=1e-6)


def test_the_choice():
    tried = [Tried({}, .7, -.6), Tried({}, .8, -.6), Tried({}, .8, -.5), Tried({}, .8, -.5), Tried({}, error='diverged')]
    assert best_of(tried) == 2 and best_of(tried[::-1]) == 1 and best_of([Tried({}, np.nan, -.6), Tried({}, np.nan, -.4)]) == 1
    assert best_of([Tried({}, error='x'), Tried({}, np.nan, -9.)]) == 1
    with pytest.raises(TrainingDiverged, match='none of 1'): best_of(tried[-1:])
