"A study from its table to its answer, as small as it can be; what stops it, what it keeps, and what it does when time runs out."
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medxfer_nb.compare import study as module
from medxfer_nb.compare.design import Cost, Design, DesignError
from medxfer_nb.compare.recipes import RECIPES, recipe
from medxfer_nb.compare.study import NO_TIME, Clock, SideBySide, carried, carried_out, compare_strategies, default_size, joined, own_architecture
from medxfer_nb.compare.table import read_table
from medxfer_nb.repro.jobs import Outcome


def write_films(folder, patients=12, each=2, size=32, seed=0, split=None):
    "PNG files with a bright spot where the label is 1, and their table"
    rng, rows = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for p in range(patients):
        for k in range(each):
            pixels = rng.integers(60, 160, (size, size)).astype(np.uint8)
            if p % 2: pixels[8:20, 8:20] = 230
            Image.fromarray(pixels).save(folder/f'{p}-{k}.png')
            rows.append(dict(path=f'{p}-{k}.png', patient=f'Mrs {p}', spot=p % 2) | (dict(split=split(p)) if split else {}))
    pd.DataFrame(rows).to_csv(folder/'cases.csv', index=False)
    return folder/'cases.csv'


@pytest.fixture
def quick():
    "A strategy without training: of the user's own, as in a notebook cell"
    def fit(trial): return trial.result(trial.network(trial.sources[0]))
    made = recipe('untrained', 'Untrained', grid=({},), default=False)(fit)
    yield made
    del RECIPES[made.name]


SMALL = dict(plan=dict(folds=2, repeats=2, steps=5, bs=4), jobs=1, notebook=False)


def test_a_study_from_table_to_report(tmp_path, quick, monkeypatch):
    csv, lines = write_films(tmp_path/'films'), []
    ask = dict(strategies=['linear_probe', quick], out=tmp_path/'out', progress=lines.append, **SMALL)
    made = compare_strategies(csv, **ask)
    assert list(made.table().index) == ['linear_probe@lite0', 'untrained@lite0'] and made.results.n_seeds == 2
    assert made.design.n_runs == 8 == len(list(made.store.records())) and made.report.is_file()
    assert (made.results.folds >= 0).all() # every case is tested in every repeat
    assert made.recommendation.choice in made.design.arms and 'repr' not in made._repr_html_()
    assert made.seconds > 0 and any('Nested' in l or 'outer folds' in l for l in lines)

    keys = {r.key: (made.store.root/'runs'/r.key/'manifest.json').stat().st_mtime_ns for r in made.store.records()}
    monkeypatch.setattr('medxfer_nb.compare.report.write_comparison', lambda *args, **kwargs: None) # It was seen once
    again = compare_strategies(csv, **ask) # all is there: nothing is trained
    assert keys == {r.key: (made.store.root/'runs'/r.key/'manifest.json').stat().st_mtime_ns for r in again.store.records()}
    pd.testing.assert_frame_equal(made.table(), again.table())

    for file in (tmp_path/'out').rglob('*'): # No identifier and no file name of a case leaves the table
        if file.is_file():
            content = file.read_bytes()
            assert b'Mrs ' not in content and b'11-0.png' not in content, file


def test_dry_run_trains_nothing(tmp_path, quick):
    made = compare_strategies(write_films(tmp_path/'films'), strategies=['scratch', quick], out=tmp_path/'out', dry_run=True, progress=None, **SMALL)
    assert made.judgement is None and not list(made.store.records()) and '2 outer folds, 2 repeats' in repr(made) and '8 trainings' in made._repr_html_()
    with pytest.raises(DesignError, match='dry run'): made.plot()
    with pytest.raises(DesignError, match='dry run'): made.table()


def test_given_split(tmp_path, quick, monkeypatch):
    monkeypatch.setattr('medxfer_nb.compare.report.write_comparison', lambda *args, **kwargs: None)
    csv = write_films(tmp_path/'films', patients=16, split=lambda p: 'test' if p >= 10 else 'train')
    made = compare_strategies(csv, strategies=['linear_probe', quick], out=tmp_path/'out', progress=None, **SMALL | dict(plan=dict(repeats=2, steps=5, bs=4)))
    assert made.design.folds == 1 and made.design.n_runs == 4
    assert ((made.results.folds == 0) == (np.arange(32) >= 20)).all()


@pytest.mark.parametrize('table,message', [
    ('', 'empty|no rows|no columns|no cases'),
    ('path,patient\n0-0.png,a\n', 'label'),
    ('path,patient,spot\n' + ''.join(f'{p}-0.png,{p},{p % 2}\n' for p in range(3)), '6'),
    ('path,patient,spot\n' + ''.join(f'{p}-0.png,{p},1\n' for p in range(12)), 'class|both|only'),
    ('path,patient,spot\n' + ''.join(f'{p}-9.png,{p},{p % 2}\n' for p in range(12)), 'row 2')])
def test_bad_tables_stop_before_anything_is_made(tmp_path, table, message):
    write_films(tmp_path)
    (tmp_path/'bad.csv').write_text(table)
    with pytest.raises(ValueError, match=message): compare_strategies(tmp_path/'bad.csv', out=tmp_path/'out', progress=None)
    assert not (tmp_path/'out'/'store').exists() and not (tmp_path/'out'/'study').exists()


def test_patients_that_share_an_image_count_as_one(tmp_path):
    csv = write_films(tmp_path/'films')
    for name in ('1-0', '3-0'): # the same film under two names
        Image.open(tmp_path/'films'/'1-0.png').save(tmp_path/'films'/f'{name}.png')
    table = read_table(csv)
    groups = module.inspect(table, progress=None).groups
    together = joined(table, groups)
    assert len(set(together.patients)) == 11 and together.frame['patient'].nunique() == 11
    told = pd.read_csv(module.write_patients(table, groups, tmp_path/'out'))
    assert told.patient.max() == 11 and told['hash'].nunique() == 12 and 'Mrs' not in (tmp_path/'out'/'patients.csv').read_text()
    rows = table.frame['patient'].isin(['Mrs 1', 'Mrs 3']).to_numpy()
    assert len(set(together.patients[rows])) == 1 and not together.frame['patient'].str.contains('Mrs').any()


def test_plan_is_kept_and_belongs_to_its_question(tmp_path, monkeypatch, quick):
    csv, probed = write_films(tmp_path/'films'), []
    def probe(pool, arms, *args, **kwargs):
        probed.append(len(arms))
        return Cost({a.name: .001 for a in arms}, {a.name: .001 for a in arms}, .01), {}
    monkeypatch.setattr(module, 'probe', probe)
    ask = dict(strategies=['scratch', 'linear_probe', quick], out=tmp_path/'out', dry_run=True, progress=None, jobs=1)
    first = compare_strategies(csv, budget='30min', **ask)
    second = compare_strategies(csv, budget='30min', **ask)
    assert first.design == second.design and probed == [3]
    assert compare_strategies(csv, budget='30min', **ask | dict(jobs=3)).design == replace(first.design, jobs=3) and probed == [3] # Processes are no part of the question
    assert compare_strategies(csv, budget='31min', **ask).design.budget == 1860 and probed == [3, 3]
    (tmp_path/'out'/'plan.json').write_text('{"asked":')
    compare_strategies(csv, budget='31min', **ask)
    assert len(probed) == 3 # a damaged plan is made again


def test_a_strategy_that_fails_the_probe_is_left_out(tmp_path, monkeypatch, quick):
    def probe(pool, arms, *args, **kwargs):
        good = [a.name for a in arms if a.recipe != 'untrained']
        return Cost(dict.fromkeys(good, .001), dict.fromkeys(good, .001), .01), {'untrained@lite0': 'ValueError: wrong shape'}
    monkeypatch.setattr(module, 'probe', probe)
    made = compare_strategies(write_films(tmp_path/'films'), strategies=['scratch', 'linear_probe', quick], out=tmp_path/'out', dry_run=True, progress=None, budget='1h')
    assert made.design.arms == ('scratch', 'linear_probe@lite0')
    assert made.design.left_out == {'Untrained from lite0': 'it failed: ValueError: wrong shape'}


def test_one_strategy_that_survives_the_probe_is_no_comparison(tmp_path, monkeypatch):
    "Nothing is trained for hours, only to say that there was nothing to compare with"
    def probe(pool, arms, *args, **kwargs): return Cost({'scratch': .001}, {'scratch': .001}, .01), {a.name: 'SourceError: does not fit' for a in arms[1:]}
    monkeypatch.setattr(module, 'probe', probe)
    with pytest.raises(DesignError, match='only scratch works; linear_probe@lite0 failed: SourceError: does not fit$'):
        compare_strategies(write_films(tmp_path/'films'), strategies=['scratch', 'linear_probe'], out=tmp_path/'out', dry_run=True, progress=None, budget='1h')
    assert not (tmp_path/'out'/'plan.json').exists()


def test_arguments_are_checked_before_images_are_read(tmp_path, monkeypatch):
    def read(*args, **kwargs): raise AssertionError('images were read')
    monkeypatch.setattr(module, 'inspect', read)
    csv, ask = write_films(tmp_path/'films'), dict(out=tmp_path/'out', progress=None)
    with pytest.raises(ValueError, match='no file .*gone.safetensors'): compare_strategies(csv, 'gone.safetensors', **ask) # One source needs no list
    with pytest.raises(DesignError, match='only scratch applies'): compare_strategies(csv, strategies='scratch', **ask)
    with pytest.raises(DesignError, match='seed -1: give 0'): compare_strategies(csv, seed=-1, **ask)


@pytest.mark.parametrize('kind, cases, bs', [('films', 100, 16), ('films', 20, 5), ('volumes', 100, 2), ('slices', 4, 2)])
def test_items_per_step_are_those_of_the_kind(kind, cases, bs):
    pool = SimpleNamespace(**vars(pool_of(np.arange(40), np.arange(40)[:, None] % 2)) | dict(kind=kind, cases=np.arange(cases), size=32, n_patients=40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'strata', lambda pool: pool.targets)
        by_hand = lambda **wanted: module.plan_by_hand(pool, [], {}, Clock(60), 1, 0, wanted).bs
        assert by_hand() == bs and by_hand(bs=7) == 7


def test_nothing_to_compare_and_too_little_time(tmp_path):
    csv = write_films(tmp_path/'films')
    with pytest.raises(DesignError, match='only scratch applies'): compare_strategies(csv, strategies=['scratch'], out=tmp_path/'out', progress=None)
    with pytest.raises(DesignError, match='too short'): compare_strategies(csv, budget='20s', out=tmp_path/'out', progress=None)
    with pytest.raises(ValueError, match='no strategy'): compare_strategies(csv, strategies=['magic', 'scratch'], out=tmp_path/'out', progress=None)
    with pytest.raises(DesignError, match='no span of time'): compare_strategies(csv, budget='soon')
    with pytest.raises(DesignError, match='dimension=2'): module.default_sources('volumes')


def pool_of(patients, targets, split=None):
    patients = np.asarray(patients)
    return SimpleNamespace(kind='films', patients=patients, targets=np.asarray(targets, float), labels=('l',), split=np.asarray(split if split is not None else ['']*len(patients)))


def test_what_the_data_carry():
    many = pool_of(np.arange(60), np.arange(60)[:, None] % 2)
    assert carried(many, range(5)) == (5, (.25, .5))
    assert carried(pool_of(np.arange(20), np.arange(20)[:, None] % 2), range(5)) == (5, ()) # half of 13 patients are 7
    assert carried(pool_of(np.arange(60), np.arange(60)[:, None] < 3), range(5))[0] == 3 # three positive patients
    assert carried(pool_of(np.arange(60), np.arange(60)[:, None] % 2, ['test']*20 + ['train']*40), range(5)) == (1, (.25, .5))


def test_sizes():
    assert [default_size(k, 3600*h) for k, h in [('films', 1), ('slices', 3), ('films', 100), ('volumes', 1), ('volumes', 10)]] == [64, 96, 224, 32, 48]
    assert [default_size('films', 1e6, own) for own in (20, 64, 65, 3000)] == [32, 64, 96, 224] and default_size('volumes', 1e6, 40) == 48


def test_strategies_without_a_source_train_a_network_that_fits():
    flat, deep = (SimpleNamespace(architecture=a, dimension=d) for a, d in [('densenet121', 2), ('unet3d-16', 3)])
    assert [own_architecture(k, (flat, deep)) for k in ('films', 'slices', 'volumes')] == ['densenet121', 'densenet121', 'unet3d-16']
    assert own_architecture('volumes', (flat,)) is None


class FakeStore:
    root = None


def job(seed, portion=1., fold=0, name='scratch'): return SimpleNamespace(config=SimpleNamespace(seed=seed, portion=portion, fold=fold, name=name))


def test_punctuality():
    "The first repeat is begun in any case; others only if the longest run so far would still end in time"
    left = [100.]
    executor = SideBySide(FakeStore(), None, 2, left=lambda: left[0], first=0)
    assert not executor.late(job(1)) # nothing is known yet
    executor.note(Outcome(job(0), 'done', 30.))
    executor.note(Outcome(job(0), 'failed', 500.)) # says nothing about how long a run takes
    assert executor.longest == 30 and not executor.late(job(1))
    left[0] = 29.
    assert executor.late(job(1)) and executor.late(job(0, portion=.5)) and not executor.late(job(0))
    waiting = [SimpleNamespace(job=job(s), outcome=None, after=(), blocked=lambda: None) for s in (1, 2)]
    assert [o.message for o in executor._start(waiting, {})] == [NO_TIME]*2 and not waiting


def test_design_as_carried_out():
    design = Design(kind='films', arms=('a', 'b'), folds=2, repeats=3, trials=1, steps=10, validate_every=2, size=32, bs=4, portions=(.25, .5), portion_arms=('a',))
    class Done(list): failures = []
    done = Done(job(s, fold=f, name=n) for s in (0, 1) for f in (0, 1) for n in ('a', 'b'))
    done += [job(2, fold=0, name='a')] + [job(s, portion=.5, fold=f, name='a') for s in (0, 1) for f in (0, 1)]
    cut = carried_out(design, done, late=7)
    assert (cut.repeats, cut.portions, cut.portion_arms) == (2, (.5,), ('a',)) and '7 of 24 trainings' in cut.given_up[-1]
    assert carried_out(design, done, late=0) is design
    failed = Done([r for r in done if (r.config.seed, r.config.name) != (1, 'b')]) # b failed in the second repeat: it was carried out all the same
    failed.failures = [Outcome(job(1, fold=f, name='b'), 'failed') for f in (0, 1)]
    assert carried_out(design, failed, late=7).repeats == 2


def test_clock():
    clock = Clock(10.)
    time.sleep(.01)
    assert .01 <= clock.spent < 5 and clock.left < 10
