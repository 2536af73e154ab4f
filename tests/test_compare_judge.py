"Judging against SciPy, scikit-learn, statsmodels, the house's own tests, brute force and planted truth."
from dataclasses import replace
import numpy as np, pandas as pd, pytest
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from statsmodels.stats.multitest import multipletests

from compare_fakes import fake_results
from medxfer_nb.compare.judge import (FoldAUC, JudgeError, TRAINED_ONLY, adjust, bland_altman, compare_arms, crossing, delong_table, ece, estimate, judge,
                                      reliability, score_of, surface, trained_tests)
from medxfer_nb.compare.power import anova_parts
from medxfer_nb.compare.results import per_patient, repeat_scores
from medxfer_nb.evaluate.paired import two_level_mean
from medxfer_nb.evaluate.stats import delong, two_level_bootstrap

A, B = 'full@a', 'scratch'

@pytest.fixture
def rng(): return np.random.default_rng(3)

@pytest.fixture(scope='module')
def films(): return fake_results(n_patients=40, effects={A: .1, 'l2sp@a': .1}, seeds=3, cases_per_patient=2, labels=('mass', 'nodule'))

@pytest.fixture(scope='module')
def lesions(): return fake_results('segmentation', n_patients=30, effects={A: .05}, seeds=3, cases_per_patient=2)

# --- AUC within folds

def by_hand(y, s, folds, weights):
    "Share of pairs won within folds, pair by pair."
    won = pairs = 0
    for i in np.flatnonzero(y == 1):
        for j in np.flatnonzero((y == 0) & (folds == folds[i])):
            w = weights[i]*weights[j]
            pairs, won = pairs + w, won + w*((s[i] > s[j]) + .5*(s[i] == s[j]))
    return won/pairs if pairs else np.nan

def test_fold_auc_is_the_share_of_pairs_won(rng):
    y, s, folds = rng.integers(0, 2, (40, 2)).astype(float), rng.normal(size=(40, 2)).round(1), rng.integers(0, 4, 40)
    y[rng.random(y.shape) < .2] = np.nan
    weights = rng.integers(0, 3, (5, 40))
    weights[-1] = 0
    expected = [[by_hand(y[:, c], s[:, c], folds, w) for c in range(2)] for w in weights]
    np.testing.assert_allclose(FoldAUC(y, s, folds)(weights), expected, atol=1e-12)

def test_one_fold_is_the_auc(rng):
    y, s = rng.integers(0, 2, (50, 1)).astype(float), rng.normal(size=(50, 1))
    assert FoldAUC(y, s, np.zeros(50, int))(np.ones((1, 50)))[0, 0] == pytest.approx(roc_auc_score(y, s))

# --- over repeats and patients

def test_auc_moves_as_patients_copied_out(films):
    "The covariance over patients is that of resampling patients the slow way, in other random draws."
    e, rng, slow = estimate(films, n=1500), np.random.default_rng(9), []
    np.testing.assert_allclose(e.per_seed[A], repeat_scores(films, A))
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(films.patients == p) for p in rng.integers(0, 40, 40)])
        slow.append([np.mean([by_hand(films.targets[rows, c], films.outputs[A][s, rows, c], films.folds[s, rows], np.ones(len(rows))) for c in range(2)]) for s in range(1)])
    assert np.std(e.moves[A][:, 0], ddof=1) == pytest.approx(np.nanstd(slow, ddof=1), rel=.15)

def test_dice_is_the_two_level_mean(lesions):
    d = per_patient(lesions, A, 'dice') - per_patient(lesions, B, 'dice')
    ours, house = compare_arms(estimate(lesions), A, B), two_level_mean(d)
    assert (ours.estimate, *ours.interval, *ours.per_seed) == pytest.approx((house.estimate, *house.interval, *house.per_seed))
    parts, closed = ours.parts, anova_parts(d)
    assert (parts.seed, parts.patient, parts.rest) == pytest.approx((closed.seed, closed.patient, closed.rest))
    assert compare_arms(estimate(lesions), B, A).estimate == -ours.estimate

def test_a_given_test_set_is_the_two_level_bootstrap():
    r = fake_results(n_patients=300, folds=1, effects={A: .05}, seeds=4)
    ours = compare_arms(estimate(r, n=800), A, B)
    house = two_level_bootstrap(r.targets, list(zip(r.outputs[A], r.outputs[B])), r.patients, n=800)
    assert ours.per_seed == pytest.approx(house.per_seed) and (ours.parts.patient/300)**.5 == pytest.approx(house.patients_sd)
    assert ours.interval == pytest.approx(house.interval, abs=.001) # Student's factor of 119 patients
    assert ours.interval[0] <= house.interval[0] and ours.interval[1] >= house.interval[1]

@pytest.mark.parametrize('task', ['classification', 'segmentation'])
def test_p_is_where_the_interval_touches_zero(task):
    for seed in range(4):
        e = estimate(fake_results(task, effects={A: .04}, seeds=4, seed=seed), n=300)
        p = compare_arms(e, A, B).p
        interval = compare_arms(e, A, B, level=1 - p).interval
        assert min(map(abs, interval)) < 1e-4 and (compare_arms(e, A, B).direction != 0) == (p < .05)

def test_p_without_a_patients_part_is_the_t_test(rng):
    dice = rng.uniform(.5, .9, 30) + rng.normal(0, .02, (5, 1)) + .0*rng.normal(size=(5, 30))
    r = fake_results('segmentation', n_patients=30, seeds=5, arms=(A, B))
    r = replace(r, scores={A: dict(dice=dice + .02), B: dict(dice=np.broadcast_to(dice.mean(0), dice.shape))})
    c = compare_arms(estimate(r), A, B)
    assert c.p == pytest.approx(stats.ttest_1samp(c.per_seed, 0).pvalue, rel=1e-4)

def test_one_repeat_covers_these_networks_only(lesions):
    one = replace(lesions, folds=lesions.folds[:1], seeds=(0,), scores={a: {n: v[:1] for n, v in s.items()} for a, s in lesions.scores.items()})
    c = compare_arms(estimate(one), A, B)
    d = per_patient(one, A, 'dice')[0] - per_patient(one, B, 'dice')[0]
    assert c.covers == TRAINED_ONLY and c.p == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=1e-4)
    assert c.interval == pytest.approx(tuple(stats.ttest_1samp(d, 0).confidence_interval(.95)))
    j = judge(one)
    assert not j.pairs.claim.any() and not j.negative and 'One repeat' in j.guard[0]
    single = fake_results(seeds=1, effects={A: .2})
    assert not judge(single, n=200).pairs.claim.any()

def test_scores_stay_between_0_and_1():
    low, high = score_of(estimate(fake_results(n_patients=12, base=.95), n=200), A).interval
    assert 0 <= low < high <= 1

def test_cases_that_were_never_tested_do_not_count(lesions):
    folds, scores = lesions.folds.copy(), {a: {n: v.copy() for n, v in s.items()} for a, s in lesions.scores.items()}
    gone = lesions.patients < 10 # a given split: training cases
    folds[:, gone] = -1
    for s in scores.values():
        for v in s.values(): v[:, gone] = np.nan
    part = replace(lesions, folds=folds, scores=scores)
    assert judge(part).n_patients == 20
    assert judge(part).table['mean'][A] == pytest.approx(lesions.scores[A]['dice'][:, ~gone].mean())
    films = fake_results(n_patients=40)
    folds = np.where(films.patients < 10, -1, films.folds)
    outputs = {a: np.where((folds < 0)[..., None], np.nan, o) for a, o in films.outputs.items()}
    scores = {a: {n: np.where(folds < 0, np.nan, v) for n, v in s.items()} for a, s in films.scores.items()}
    judged = judge(replace(films, folds=folds, outputs=outputs, scores=scores), n=200)
    assert judged.n_patients == 30 and np.isfinite(judged.table['mean']).all()

def test_rare_labels_are_left_out_and_named():
    r = fake_results(n_patients=40, labels=('common', 'rare'))
    targets = r.targets.copy()
    targets[:, 1] = 0
    targets[:3, 1] = 1
    r = replace(r, targets=targets)
    j = judge(r, n=200)
    assert 'rare (3)' in j.notes[0] and 'common' not in j.notes[0]
    assert set(delong_table(r, A, B).label) == {'common'}
    with pytest.raises(JudgeError, match='two tested patients of each class'): judge(replace(r, targets=np.zeros_like(targets)))

# --- these networks

def test_adjust(rng):
    p = rng.uniform(0, .2, 12)
    p[[3, 7]] = np.nan
    known = np.isfinite(p)
    for correction, name in (('bh', 'fdr_bh'), ('holm', 'holm')):
        np.testing.assert_allclose(adjust(p, correction)[known], multipletests(p[known], method=name)[1])
        assert np.isnan(adjust(p, correction)[~known]).all()
    assert adjust([], 'holm').shape == (0,)
    with pytest.raises(JudgeError, match="'bh' or 'holm'"): adjust(p, 'sidak')

def test_delong(films):
    one = fake_results(n_patients=80, folds=1, effects={A: .1})
    t = delong_table(one, A, B)
    for s in range(3):
        d = delong(one.targets[:, 0], one.outputs[A][s, :, 0], one.outputs[B][s, :, 0])
        assert tuple(t.loc[s, ['difference', 'low', 'high', 'p']]) == pytest.approx((d.estimate, *d.interval, d.p))
    t = delong_table(films, A, B).set_index(['seed', 'label']).loc[(1, 'nodule')] # folds by hand, clustered
    total, estimate_, variance = 0, 0., 0.
    for fold in range(4):
        k = films.folds[1] == fold
        y, n = films.targets[k, 1], (films.targets[k, 1] == 1).sum()*(films.targets[k, 1] == 0).sum()
        d = delong(y, films.outputs[A][1, k, 1], films.outputs[B][1, k, 1], films.patients[k])
        total, estimate_, variance = total + n, estimate_ + n*d.estimate, variance + (n*(d.interval[1] - d.estimate)/stats.norm.ppf(.975))**2
    assert t.difference == pytest.approx(estimate_/total) and t.p == pytest.approx(2*stats.norm.sf(abs(estimate_)/variance**.5))

def test_delong_is_undefined_where_a_fold_has_one_positive_patient():
    r = fake_results(n_patients=20, folds=4)
    targets = np.zeros_like(r.targets)
    for fold in range(4): targets[np.flatnonzero(r.folds[0] == fold)[:2 if fold else 1]] = 1
    t = delong_table(replace(r, targets=targets), A, B)
    assert np.isnan(t.p[0]) and np.isnan(trained_tests(replace(r, targets=targets), A, B)['delong'])

def test_tests_per_patient(films, lesions):
    for r, name, sign in ((films, 'log_loss', -1), (lesions, 'dice', 1)):
        d = sign*(per_patient(r, A, name) - per_patient(r, B, name)).mean(0)
        found = trained_tests(r, A, B)
        assert found['wilcoxon'] == pytest.approx(stats.wilcoxon(d, method='exact').pvalue)
        flips = stats.permutation_test((d,), lambda x, axis: x.mean(axis), permutation_type='samples', n_resamples=5000, vectorized=True, rng=np.random.default_rng(0))
        assert found['sign_flip'] == pytest.approx(flips.pvalue, abs=.02)
        assert trained_tests(r, A, A)['sign_flip'] == 1 == trained_tests(r, A, A)['wilcoxon']
    per_seed = delong_table(films, A, B).groupby('seed').p.min()*2
    assert trained_tests(films, A, B)['delong'] == pytest.approx(min(per_seed.max(), 1)) and trained_tests(films, A, A)['delong'] == 1
    assert 'delong' not in trained_tests(lesions, A, B)

# --- secondary

@pytest.mark.parametrize('bins', [5, 10])
def test_calibration(films, bins):
    total = []
    for s in range(3):
        for c in range(2):
            y, p, gap = films.targets[:, c], films.outputs[A][s, :, c], 0.
            for b in range(bins):
                k = (p >= b/bins) & (p < (b + 1)/bins)
                if k.any(): gap += k.mean()*abs(y[k].mean() - p[k].mean())
            total.append(gap)
    assert ece(films, A, bins) == pytest.approx(np.mean(total))
    curve = reliability(films, A, bins, label='nodule')
    y, p = np.tile(films.targets[:, 1], 3), films.outputs[A][..., 1].ravel()
    observed, predicted = calibration_curve(y, p, n_bins=bins)
    np.testing.assert_allclose(curve.observed, observed)
    np.testing.assert_allclose(curve.predicted, predicted)
    assert curve.n.sum() == pytest.approx(80) and ((curve.observed_low <= curve.observed) & (curve.observed <= curve.observed_high)).all()
    sure = replace(films, outputs={a: np.broadcast_to(films.targets, o.shape) for a, o in films.outputs.items()})
    assert ece(sure, A) == 0 and reliability(sure, A).predicted.tolist() == [0, 1] # a probability of 1 has a bin
    with pytest.raises(JudgeError, match='no label'): reliability(films, A, label='mas')

def test_volumes_and_surfaces(lesions):
    s, v = lesions.scores[A], bland_altman(lesions, A)
    d = s['predicted_ml'] - s['ml']
    sd = np.mean([x.var(ddof=1) for x in d])**.5
    assert (v.bias, v.low, v.high) == pytest.approx((d.mean(), d.mean() - 1.959964*sd, d.mean() + 1.959964*sd))
    assert (v.bias_low, v.bias_high) == pytest.approx(two_level_mean(np.stack([x.reshape(30, 2).mean(1) for x in d])).interval)
    assert len(v.cases) == d.size and v.cases.difference_ml.mean() == pytest.approx(d.mean())
    hd = s['hd95'].copy()
    hd[:, :4] = np.nan # two patients without any
    found = surface(replace(lesions, scores=lesions.scores | {A: s | dict(hd95=hd)}), A)
    expected = hd[:, 4:].reshape(3, 28, 2).mean((0, 2))
    assert (found['median'], found['q25']) == pytest.approx((np.median(expected), np.quantile(expected, .25))) and found['undefined'] == pytest.approx(4/60)
    with pytest.raises(JudgeError, match='no probabilities'): ece(lesions, A)

# --- the judgement

def test_judgement(films):
    j = judge(films, n=400)
    assert j.references == {'full': A, 'scratch': B} and list(j.table.index) == list(films.arms) and len(j.pairs) == 3
    table = j.against('scratch')
    assert list(table.index) == [A, 'l2sp@a'] and {'difference', 'low', 'high', 'p', 'p_adjusted', 'claim', 'sign_flip', 'wilcoxon', 'delong', 'delong_adjusted'} <= set(table)
    c = j.compare(A, B)
    assert (table.difference[A], table.low[A], table.p[A]) == pytest.approx((c.estimate, c.interval[0], c.p))
    assert j.against('full').difference[B] == -table.difference[A]
    np.testing.assert_allclose(j.pairs.p_adjusted, multipletests(j.pairs.p, method='fdr_bh')[1])
    np.testing.assert_allclose(judge(films, n=400, correction='holm').pairs.p_adjusted, multipletests(j.pairs.p, method='holm')[1])
    np.testing.assert_allclose(j.table.ece, [ece(films, a) for a in films.arms])
    assert '<table' in j._repr_html_() and judge(films, n=400).table.equals(j.table) # seeded

@pytest.mark.parametrize('task', ['classification', 'segmentation'])
def test_planted_differences_and_harm(task):
    arms = ('scratch', 'full@a', 'full@b', 'bad@a')
    r = fake_results(task, n_patients=120, arms=arms, effects={'full@a': .1, 'full@b': .1, 'bad@a': -.2}, seeds=5, seed_sd=.005, seed=1)
    j = judge(r, n=200)
    assert [j.claim(a, b) for a, b in (('full@a', 'scratch'), ('scratch', 'full@a'), ('full@a', 'full@b'), ('bad@a', 'full@a'))] == [1, -1, 0, -1]
    for pair in (('full@a', 'full@a'), ('full@a', 'nobody')):
        with pytest.raises(JudgeError, match='no pair here: choose two of'): j.claim(*pair)
    assert j.negative == ('bad@a',) and j.references['full'] == 'full@a' and j.table.claim_scratch['bad@a'] == -1
    assert judge(r, n=200, references=('full@b', 'soup')).references == {'full@b': 'full@b'}

def test_what_cannot_be_judged():
    r = fake_results('segmentation', n_patients=5, folds=2)
    assert any('0.062' in g for g in judge(r).guard)
    alone = judge(fake_results('segmentation', arms=('scratch',)))
    assert not alone.references and alone.best == 'scratch' and not alone.negative
    with pytest.raises(JudgeError, match='no reference'): alone.against('full')
    with pytest.raises(JudgeError, match='run again'): judge(replace(r, arms=()))
    assert judge(fake_results(n_patients=6, folds=2), n=200).n_patients == 6
    assert not any('probab' in c for c in judge(r).table)

def test_exclusive_classes():
    r = fake_results(n_patients=60, labels=('a', 'b', 'c'), exclusive=True, effects={A: .15})
    j = judge(r, n=200)
    assert j.table['mean'][A] == pytest.approx(repeat_scores(r, A).mean()) and j.table['mean'][A] > j.table['mean'][B]

def test_a_pair_has_one_claim_wherever_it_is_told():
    "Corrected among two arms and among all pairs, the same pair would be claimed here and not there."
    arms = ('scratch', 'full@a', 'l2sp@a', 'soup@a', 'lp_ft@a', 'gradual@a')
    for seed in range(4, 8):
        j = judge(fake_results('segmentation', arms=arms, n_patients=25, seeds=3, seed_sd=.012, effects={a: .02 + .003*i for i, a in enumerate(arms[1:])}, interaction_sd=.03, seed=seed))
        for name, arm in j.references.items():
            table, p = j.against(name), j.pairs.set_index(['a', 'b']).p_adjusted
            assert list(table.claim) == [j.claim(a, arm) for a in table.index]
            assert list(table.p_adjusted) == [p.get((a, arm), p.get((arm, a))) for a in table.index]

def test_volumes_that_are_not_known(lesions):
    "Without a spacing there are no volumes; with some, the others do not count."
    def known(rows): return replace(lesions, scores={a: s | {n: np.where(rows, s[n], np.nan) for n in ('ml', 'predicted_ml')} for a, s in lesions.scores.items()})
    nowhere = known(np.zeros(60, bool))
    j = judge(nowhere)
    assert not any('volume' in c for c in j.table) and np.isfinite(j.table['mean']).all()
    with pytest.raises(JudgeError, match='spacing'): bland_altman(nowhere, A)
    half, there = bland_altman(known(lesions.patients < 15), A), lesions.patients < 15
    d = (lesions.scores[A]['predicted_ml'] - lesions.scores[A]['ml'])[:, there]
    assert half.bias == pytest.approx(d.mean()) and half.high - half.bias == pytest.approx(1.959964*np.mean([x.var(ddof=1) for x in d])**.5) and len(half.cases) == d.size

# --- learning curves

def curve(gains, seeds=3, sizes=(10, 20, 40, 80), noise=.002):
    rng = np.random.default_rng(0)
    return pd.DataFrame([dict(arm=arm, portion=n/80, n_patients=n, seed=s, score=.6 + (g if arm == A else 0) + rng.normal(0, noise))
                         for arm in (A, B) for n, g in zip(sizes, gains) for s in range(seeds)])

def test_crossing():
    c = crossing(curve([.1, .1, -.1, -.1], noise=1e-9), A) # half-way on the logarithm
    assert c.n == pytest.approx(200**.5*2, rel=1e-3) and c.even == pytest.approx(c.n, rel=1e-3) and (c.low, c.high) == (20, 40)
    c = crossing(curve([.1, .05, .0, .0], seeds=5), A)
    d = c.table.set_index('n_patients')
    values = curve([.1, .05, .0, .0], seeds=5).pivot_table(index=['n_patients', 'seed'], columns='arm', values='score')
    t = stats.ttest_rel(values.loc[20][A], values.loc[20][B])
    assert (d.low[20], d.high[20]) == pytest.approx(tuple(t.confidence_interval(.95))) and 20 < c.n < 40
    still, never, one = crossing(curve([.1]*4), A), crossing(curve([-.1]*4), A), crossing(curve([.1, 0, 0, 0], seeds=1), A)
    assert still.n is None and still.low == 80 and 'not within the data' in still.text
    assert never.n is None and 'not demonstrably' in never.text and one.n is None and 'one repeat' in one.text
    with pytest.raises(JudgeError, match='no learning curve'): crossing(curve([0]*4), 'soup@a')
    dealt = curve([.1, .05, .0, .0], seeds=5).assign(n_patients=lambda c: c.n_patients + .25*c.seed*(c.portion < 1)) # folds of each repeat have other sizes
    assert crossing(dealt, A).table.repeats.tolist() == [5]*4 and crossing(dealt, A).n == pytest.approx(c.n, rel=.05)
    assert all('repeats on these test patients' in x.text for x in (c, still, never))
    made = fake_results('segmentation', effects={A: .05}, portions=(.25, .5, 1.))
    assert crossing(made.curves, A).table.shape[0] == 3
