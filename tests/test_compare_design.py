"Folds against brute force, the ladder against its own arithmetic, and what the folds' callers must not be able to get wrong."
import re, time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.model_selection import GroupKFold

from medxfer_nb.compare.design import (RUNGS, Cost, Design, DesignError, choose_design, feasible_folds, fold_rows, inner_split, label_strata,
                                       fixed_design, outer_folds, parse_duration, portions, probe, wished_steps)


def cases(n, labels=2, seed=0, most=5, prevalence=.35):
    "(V,) patients in no particular order, (V,C) labels with unknown ones"
    rng = np.random.default_rng(seed)
    patients = rng.permutation(np.repeat(rng.permutation(1000)[:n], rng.integers(1, most + 1, n)))
    risk = dict(zip(np.unique(patients), rng.random((n, labels)) < prevalence))
    targets = np.stack([risk[p] for p in patients]).astype(float)
    targets[rng.random(targets.shape) < .05] = np.nan
    return patients, targets


@pytest.mark.parametrize('n,labels,k,seed', [(264, 5, 5, 0), (40, 1, 5, 1), (24, 2, 3, 2), (60, 3, 4, 3), (40, 2, 2, 7)])
def test_outer_folds_partition_patients(n, labels, k, seed):
    patients, targets = cases(n, labels, seed)
    folds = outer_folds(patients, targets, k, seed)
    assert sorted(set(folds)) == list(range(k))
    for p in set(patients): assert len(set(folds[patients == p])) == 1
    for f in range(k):
        for rows in fold_rows(folds, f):
            for column in targets[rows].T: assert {0., 1.} <= set(column[~np.isnan(column)])
    sizes = np.bincount(folds)
    assert sizes.max() - sizes.min() <= max(10, .3*len(patients)/k)


def test_folds_depend_on_the_seed_alone():
    patients, targets = cases(50)
    a = outer_folds(patients, targets, 3, 5)
    np.random.seed(1)
    assert (outer_folds(patients, targets, 3, 5) == a).all()
    partitions = {tuple(outer_folds(patients, targets, 3, s)) for s in range(6)}
    assert len(partitions) == 6


def test_stratified_folds_are_more_even_than_plain_ones():
    "Against scikit-learn's GroupKFold with shuffled groups, which knows nothing of labels"
    spread = lambda folds, t: np.std([np.nanmean(t[folds == f], 0) for f in range(4)], 0).mean()
    ours, plain = [], []
    for seed in range(15):
        patients, targets = cases(48, 2, seed)
        ours.append(spread(outer_folds(patients, targets, 4, seed), targets))
        folds = np.empty(len(patients), int)
        for f, (_, rows) in enumerate(GroupKFold(4, shuffle=True, random_state=seed).split(patients, groups=patients)): folds[rows] = f
        plain.append(spread(folds, targets))
    assert np.mean(ours) < .7*np.mean(plain)


def test_exclusive_classes_reach_every_fold():
    rng = np.random.default_rng(0)
    targets = np.eye(4)[rng.permutation(np.repeat(range(4), [40, 20, 12, 6]))]
    folds = outer_folds(np.arange(len(targets)), targets, 5)
    counts = np.stack([targets[folds == f].sum(0) for f in range(5)])
    assert (counts >= 1).all() and (counts.max(0) - counts.min(0) <= 2).all()


def test_rare_label():
    targets = np.zeros((30, 2)); targets[::2, 0] = 1; targets[:2, 1] = 1
    patients = np.arange(30)
    assert feasible_folds(patients, targets, 5, seeds=(0, 1, 2)) == 2
    with pytest.raises(DesignError, match="2 patients with label 'rare'.*fewer folds"): outer_folds(patients, targets, 3, labels=('common', 'rare'))
    with pytest.raises(DesignError, match='1 patients'): feasible_folds(patients, np.eye(30)[:, :1])
    one = np.repeat([0., 1.], 15)[:, None]
    with pytest.raises(DesignError, match='1 patients with'): feasible_folds(np.where(one[:, 0] == 1, 99, patients), one) # all positives are one patient's


def test_given_split_is_respected():
    patients, targets = cases(20)
    split = np.where(np.isin(patients, np.unique(patients)[:5]), 'test', 'train').astype(object)
    folds = outer_folds(patients, targets, 5, seed=3, split=split)
    assert ((folds == 0) == (split == 'test')).all() and set(folds) == {0, -1}
    train, test = fold_rows(folds, 0)
    assert (split[train] == 'train').all() and (split[test] == 'test').all()
    assert set(outer_folds(patients, targets, 5, split=np.full(len(patients), ''))) == set(range(5)) # no split was given
    many = next(p for p in patients[split == 'test'] if (patients == p).sum() > 1)
    split[np.flatnonzero(patients == many)[0]] = 'train'
    with pytest.raises(DesignError, match='1 patients are on both sides'): outer_folds(patients, targets, split=split)
    with pytest.raises(DesignError, match='both kinds'): outer_folds(patients, targets, split=['train']*len(patients))


def test_fold_rows():
    folds = np.array([0, 1, 1, -1])
    train, test = fold_rows(folds, 1)
    assert train.tolist() == [0, 3] and test.tolist() == [1, 2]
    assert fold_rows(folds, -1)[0].tolist() == [0, 1, 2, 3] and len(fold_rows(folds, -1)[1]) == 0
    with pytest.raises(DesignError): fold_rows(folds, 2)


@pytest.mark.parametrize('n', [4, 10, 40, 200])
def test_inner_split(n):
    patients, targets = cases(n, seed=n)
    train = np.random.default_rng(n).permutation(len(patients))[:int(.8*len(patients))]
    train = np.flatnonzero(np.isin(patients, patients[train[:max(3, len(train)//2)]]))
    for seed in range(3):
        fit, valid = inner_split(train, patients, targets, seed)
        assert sorted([*fit, *valid]) == sorted(train) and len(fit) and len(valid)
        assert not set(patients[fit]) & set(patients[valid])
        if n >= 40:
            assert .1 < len(valid)/len(train) < .4
            for rows in (fit, valid):
                for c in targets[rows].T: assert {0., 1.} <= set(c[~np.isnan(c)])
    assert len({tuple(inner_split(train, patients, targets, s)[1]) for s in range(8)}) > 1


def test_inner_split_keeps_the_rare_label_for_fitting():
    targets = np.zeros((20, 1)); targets[3] = 1 # one positive patient: it must be fitted on, and cannot be in both parts
    fit, valid = inner_split(np.arange(20), np.arange(20), targets)
    assert 3 in fit


@pytest.mark.parametrize('seed', range(4))
def test_portions_are_nested_and_keep_the_mix(seed):
    patients, targets = cases(80, 2, seed)
    rows = np.flatnonzero(patients != patients[0])
    parts = [portions(rows, patients, targets, f, seed) for f in (.2, .25, .5, .9, 1.)]
    for small, large in zip(parts, parts[1:]): assert set(small) <= set(large)
    for f, part in zip((.2, .25, .5, .9, 1.), parts):
        chosen = set(patients[part])
        assert len(chosen) == int(np.ceil(f*79 - 1e-9))
        assert set(part) == set(np.flatnonzero(np.isin(patients, list(chosen)))) & set(rows) # whole patients
    assert abs(np.nanmean(targets[parts[2]], 0) - np.nanmean(targets[rows], 0)).max() < .12
    assert set(portions(rows, patients, targets, .5, seed + 1)) != set(parts[2])


def test_portion_too_small():
    targets = np.zeros((20, 1)); targets[:2] = 1
    with pytest.raises(DesignError, match='take more'): [portions(np.arange(20), np.arange(20), targets, .1, s) for s in range(9)]
    with pytest.raises(DesignError): portions(np.arange(4), np.arange(4), None, 0)


def test_strata_ignore_nothing_but_rare_combinations():
    patients, targets = cases(300, 3, 4)
    strata = label_strata(targets, patients, 1)
    combos = np.unique(targets == 1, axis=0, return_inverse=True)[1].reshape(-1)
    assert len(set(zip(strata, combos))) == len(set(combos)) == len(set(strata))


@pytest.mark.parametrize('text,seconds', [('1.5h', 5400), ('2 hrs 3 mins', 7380), ('1H30', 5400), (.5, .5), ('10sec', 10), ('2days', 172800)])
def test_durations(text, seconds): assert parse_duration(text) == seconds

@pytest.mark.parametrize('text', ['', 'h', '1:30', '20 minutes or so', 'nan', None, True, -1, float('inf'), '0s'])
def test_bad_durations(text):
    with pytest.raises(DesignError): parse_duration(text)


class Slow:
    "Stands for a task: its network predicts nothing, its scores take their time"
    def predict(self, net, pool, rows): return np.full((len(rows), 1), .5)
    def scores(self, pool, rows, predictions): time.sleep(.004*len(rows)); return {}


def test_probe_measures_what_it_costs():
    "Recipes whose cost is known: they sleep. One takes no steps, one fails, one has the architecture of another"
    from medxfer_nb.compare import recipes
    def sleeper(step, fixed):
        def fit(trial):
            time.sleep(fixed)
            for i in range(trial.steps if step else 0): time.sleep(step); trial.progress((i + 1)/trial.steps)
            trial.taken = trial.steps if step else 0
            calls.append(trial.sources)
            return trial.result(torch.nn.Linear(1, 1))
        return fit
    def broken(trial): raise RuntimeError('no such layer')
    calls, made = [], [recipes.recipe(f'sleep_{n}', n, needs=needs, grid=({},), default=False)(fit) for n, needs, fit in
                       [('a', 'none', sleeper(.02, .1)), ('b', 'one', sleeper(0, .2)), ('c', 'none', broken)]]
    try:
        sources = {n: SimpleNamespace(name=n, architecture='net') for n in ('x', 'y')}
        arms = [recipes.Arm('sleep_a'), recipes.Arm('sleep_b', ('x',)), recipes.Arm('sleep_b', ('y',)), recipes.Arm('sleep_c')]
        patients, targets = cases(30, 1)
        pool = SimpleNamespace(kind='films', patients=patients, targets=targets, labels=('l',), split=np.full(len(patients), ''), cases=np.arange(len(patients)))
        cost, failed = probe(pool, arms, sources, lambda architecture: Slow(), progress=lambda line: None)
    finally:
        for r in made: del recipes.RECIPES[r.name]
    assert .02 <= cost.step['sleep_a'] < .04 and .05 <= cost.fixed['sleep_a'] < .4 # A busy machine wakes late, never early
    assert cost.step['sleep_b@x'] == cost.step['sleep_b@y'] == 0 and .2 <= cost.fixed['sleep_b@x'] < .5
    assert 1 <= cost.evaluation/(.004*len(patients)) < 2 and cost.alone == set(cost.step)
    assert failed == {'sleep_c': 'RuntimeError: no such layer'}
    assert len(calls) == 3 # a twice, to warm up; b once for both sources


def test_probe_without_any_strategy_that_works():
    from medxfer_nb.compare import recipes
    pool = SimpleNamespace(kind='films', patients=np.arange(12), targets=np.eye(2)[np.arange(12) % 2], labels=('l', 'm'), split=np.full(12, ''), cases=np.arange(12))
    def task(architecture): raise ValueError('unknown network')
    with pytest.raises(DesignError, match='no strategy works: scratch: ValueError: unknown network'): probe(pool, [recipes.Arm('scratch')], {}, task)


ARMS = ('scratch', 'full@a', 'linear_probe@a', 'lp_ft@a', 'gradual@a', 'l2sp@a', 'wise_ft@a', 'soup@a+b')
COST = Cost({a: .1 + .02*i for i, a in enumerate(ARMS)}, {a: 1. + i for i, a in enumerate(ARMS)}, 3.)
DATA = dict(n_patients=100, n_items=500, jobs=2, spent=30., portion_arms=ARMS[:2])


def by_hand(d):
    "Seconds of a design, run by run"
    total, longest = 0., 0. # Two processes share the runs, and in the end one waits for the other
    for seed in d.seeds:
        for fold in range(d.folds):
            for arms, portion in [(d.arms, 1.)] + [(d.portion_arms, p) for p in d.portions]:
                for a in arms:
                    train = 1 - 1/d.folds
                    t = 1.5 + d.trials*(COST.fixed[a] + d.steps*COST.step[a] + (d.steps//d.validate_every)*3*train*.25) + 3*(1 - train)
                    total, longest = total + t, max(longest, t)
    return total/d.jobs + 12 + longest/2


@pytest.mark.parametrize('budget', ['15min', '20min', '45min', '2h', '9h', '3d'])
def test_design_fits_and_wastes_little(budget):
    room = .8*parse_duration(budget) - 90
    d = choose_design(ARMS, COST, parse_duration(budget), **DATA)
    assert by_hand(d) == pytest.approx(d.seconds, rel=1e-6) and d.seconds <= room
    wish = wished_steps(500*(1 - 1/d.folds)*.75, 16)
    more = d.steps + 3*d.validate_every
    assert more > wish or COST.study(replace(d, steps=more)) > .9*room or d.seconds > .8*room
    assert set(d.left_out) == set(ARMS) - set(d.arms) and d.arms == ARMS[:len(d.arms)]


def test_more_budget_never_gives_less():
    order = lambda d: (d.repeats, d.folds, d.trials, len(d.arms), len(d.portions))
    designs = [choose_design(ARMS, COST, b, **DATA) for b in np.geomspace(700, 300_000, 40)]
    for a, b in zip(designs, designs[1:]): assert all(x <= y for x, y in zip(order(a), order(b)))


def test_the_least_budget_that_is_named_is_enough():
    with pytest.raises(DesignError) as e: choose_design(ARMS, COST, 100., **DATA)
    said = re.search(r'need at least (.+?)\. ', str(e.value))[1]
    d = choose_design(ARMS, COST, parse_duration(said), **DATA)
    assert d.arms == ARMS[:3] and d.trials == 1


def test_given_split_and_wanted_arms():
    d = choose_design(ARMS, COST, 1500., max_folds=1, core=len(ARMS), **DATA)
    assert d.folds == 1 and d.arms == ARMS and not d.left_out and 'given split' in d.describe()
    assert not any('folds' in text for text in d.given_up)


def test_no_room_for_a_portion_that_the_data_do_not_carry():
    d = choose_design(ARMS, COST, 3e5, fractions=(.5,), **DATA)
    assert d.portions == (.5,) and d.given_up == ()
    assert choose_design(ARMS, COST, 3e5, **DATA | dict(portion_arms=())).portions == ()


def test_ladder_only_goes_down():
    for a, b in zip(RUNGS, RUNGS[1:]):
        assert b.folds <= a.folds and b.repeats <= a.repeats and b.trials <= a.trials and set(b.portions) <= set(a.portions) and b.least <= a.least


def test_design_survives_json():
    import json
    d = choose_design(ARMS, COST, 1200., **DATA)
    assert Design.from_dict(json.loads(json.dumps(d.as_dict()))) == d and hash(d) == hash(replace(d))


def test_runs_that_cannot_be_side_by_side():
    "A recipe of the user's own runs in this process: its seconds are not shared"
    d = fixed_design(ARMS[:2], dict(folds=2, repeats=3, steps=50), kind='films', size=32, jobs=4)
    alone = replace(COST, alone=frozenset(ARMS[1:2]))
    each = [6*COST.run(a, d) for a in ARMS[:2]]
    assert COST.study(d) - alone.study(d) == pytest.approx(each[1]/4 - each[1])
    assert replace(COST, alone=frozenset(ARMS)).study(replace(d, jobs=1)) == pytest.approx(sum(each))


def test_fixed_design():
    d = fixed_design(ARMS[:2], dict(folds=4, repeats=2, steps=1003, portions=[.5]), ARMS[:1], 5, kind='volumes', size=32, seed=2)
    assert (d.folds, d.repeats, d.trials, d.steps, d.validate_every, d.portions, d.portion_arms, d.seeds) == (4, 2, 1, 1000, 100, (.5,), ARMS[:1], (200, 201))
    assert fixed_design(ARMS, {}, max_folds=1, kind='films', size=32).folds == 1 # a given split
    for wrong, what in [(dict(folds=6), 'carry 5'), (dict(repeats=0), 'positive'), (dict(lr=1), 'can be fixed')]:
        with pytest.raises(DesignError, match=what): fixed_design(ARMS, wrong, kind='films', size=32)
