"Variance parts against closed forms and simulation; the claim rule under the null, and with planted differences at the planned power."
from dataclasses import replace
import numpy as np, pytest
from scipy import stats

from compare_fakes import fake_results
from medxfer_nb.compare import power as module
from medxfer_nb.compare.judge import JudgeError, adjust, compare_arms, estimate, simulate_null
from medxfer_nb.compare.power import Parts, anova_parts, detectable, mixed_parts, patient_values, plan_more, power, variance_parts
from medxfer_nb.compare.results import ResultsError
from medxfer_nb.evaluate.paired import two_level_mean

@pytest.fixture
def rng(): return np.random.default_rng(5)

def crossed(rng, parts, seeds, patients, mean=0.):
    draw = lambda v, *shape: rng.normal(0, v**.5, shape)
    return mean + draw(parts.seed, seeds, 1) + draw(parts.patient, 1, patients) + draw(parts.rest, seeds, patients)

def three(parts): return np.array([parts.seed, parts.patient, parts.rest])

# --- variance parts

@pytest.mark.parametrize('truth', [Parts(.01, .04, .02), Parts(.0, .04, .02), Parts(.02, 0., .02)])
def test_closed_form_is_unbiased(rng, truth):
    found = [three(anova_parts(crossed(rng, truth, 6, 25))) for _ in range(300)]
    assert np.mean(found, 0) == pytest.approx(three(truth), abs=.0025) # a part at zero is a little above: it is never negative
    assert truth.sd(6, 25)**2 == pytest.approx(np.var([crossed(rng, truth, 6, 25).mean() for _ in range(4000)]), rel=.1)

@pytest.mark.parametrize('shape', [(3, 20), (5, 12), (8, 40)])
def test_mixed_model_is_the_closed_form_on_balanced_data(rng, shape):
    d = crossed(rng, Parts(4e-4, 9e-4, 4e-4), *shape, mean=.03)
    mixed = mixed_parts(d)
    assert mixed.note == 'mixed model' and three(mixed) == pytest.approx(three(anova_parts(d)), rel=2e-3)
    assert three(mixed_parts(d*1000)) == pytest.approx(three(mixed)*1e6, rel=1e-3) # of any size

def test_parts_below_zero_go_to_the_rest(rng):
    "The restricted likelihood on its edge is that of the one-way layout."
    for _ in range(40):
        d = crossed(rng, Parts(0., .01, .02), 3, 12)
        if anova_parts(d).seed == 0: break
    found, within = mixed_parts(d), ((d - d.mean(0))**2).sum()/(2*12)
    assert found.note.endswith('seed is at zero') and three(found) == pytest.approx([0, d.mean(0).var(ddof=1) - within/3, within], rel=2e-3)

def test_a_failure_of_the_mixed_model_is_told(rng, monkeypatch):
    d = crossed(rng, Parts(4e-4, 9e-4, 4e-4), 3, 10)
    def broken(d, effects): raise np.linalg.LinAlgError
    monkeypatch.setattr(module, '_fit_mixed', broken)
    assert 'failed' in mixed_parts(d).note and three(mixed_parts(d)) == pytest.approx(three(anova_parts(d)))
    monkeypatch.undo()
    class Lost: converged, vcomp, scale = False, np.ones(2), 1.
    monkeypatch.setattr(module, '_fit_mixed', lambda d, effects: Lost)
    assert 'did not converge' in mixed_parts(d).note
    monkeypatch.undo()
    assert mixed_parts(np.array([[1., -1], [-1, 1]])).note == 'mixed model, seed and patient are at zero'
    assert 'too many' in mixed_parts(crossed(rng, Parts(1, 1, 1), 10, 400)).note
    for wrong in (d[:1], d[0], np.full((3, 4), np.nan)):
        with pytest.raises(ValueError, match='more repeats|finish'): mixed_parts(wrong)

def test_parts_of_an_arm():
    r = fake_results('segmentation', n_patients=60, seeds=8, seed_sd=.02, patient_sd=.1, interaction_sd=.03, noise_sd=.03)
    own, paired = variance_parts(r, 'full@a'), variance_parts(r, 'full@a', 'scratch')
    assert own.patient**.5 == pytest.approx(.1, rel=.3) and paired.patient**.5 == pytest.approx(2**.5*.03, rel=.4) and paired.rest**.5 == pytest.approx(2**.5*.03, rel=.1)
    assert three(paired) == pytest.approx(three(anova_parts(patient_values(r, 'full@a') - patient_values(r, 'scratch'))), rel=1e-2)
    films = fake_results(n_patients=30)
    np.testing.assert_array_equal(patient_values(films, 'full@a'), -films.scores['full@a']['log_loss'])
    with pytest.raises(ResultsError, match='at least two'): patient_values(replace(films, scores={a: dict(log_loss=np.full((3, 30), np.nan)) for a in films.arms}), 'scratch')
    with pytest.raises(ValueError): Parts(-1, 0, 0)
    with pytest.raises(ValueError): Parts(0, 0, np.nan)

# --- power

@pytest.mark.parametrize('parts', [Parts(.0004, .0025, .0025), Parts(0., .01, .0025), Parts(.0009, 0., .01)])
@pytest.mark.parametrize('seeds, patients', [(2, 15), (3, 40), (6, 12)])
def test_power_is_what_simulation_finds(rng, parts, seeds, patients):
    difference = detectable(parts, patients, seeds, target=.7)
    found = np.mean([two_level_mean(crossed(rng, parts, seeds, patients, difference)).direction > 0 for _ in range(500)])
    assert found == pytest.approx(.7, abs=3*(.21/500)**.5)
    assert power(parts, difference, patients, seeds) == pytest.approx(.7, abs=2e-3)

def test_power_in_limits():
    "With endless patients only Student's t over repeats is left; its power has a closed form."
    parts, s, d = Parts(.01, .01, .01), 5, .15
    nc, t = d/(.01/s)**.5, stats.t.ppf(.975, s - 1)
    assert power(parts, d, 10**7, s) == pytest.approx(stats.nct.sf(t, s - 1, nc), abs=3e-3)
    assert power(Parts(0, .01, 0), .03, 50, 40) == pytest.approx(stats.nct.sf(stats.t.ppf(.975, 49), 49, .03/(.01/50)**.5), abs=3e-3) # and of patients alone
    assert power(parts, .5, 20, 1) == 0 and detectable(parts, 20, 1) == np.inf and power(Parts(0, 0, 0), .1, 9, 2) == 1
    assert power(parts, .1, 20, 5, comparisons=3) == power(parts, .1, 20, 5, level=1 - .05/3) < power(parts, .1, 20, 5)
    assert power(parts, .1, 20, 5) == power(parts, -.1, 20, 5) and power(replace(parts, share=.2), .1, 20, 5) < power(parts, .1, 20, 5)
    for wrong in ((1, 3), (20, 0)):
        with pytest.raises(ValueError): power(parts, .1, *wrong)

def test_plan_is_the_least_that_is_enough():
    parts = Parts(.0004, .0025, .0025)
    plan = plan_more(parts, .03, 40, 3)
    assert plan.n_seeds['as it is'] == 3 and plan.power['as it is'] == power(parts, .03, 40, 3) < .8
    s, p = int(plan.n_seeds['more repeats']), plan.n_patients['more patients']
    assert power(parts, .03, 40, s - 1) < .8 <= power(parts, .03, 40, s) and plan.more_seeds['more repeats'] == s - 3
    assert np.isnan(p) and plan.note['more patients'] == 'no number of patients is enough' # repeats hide it
    few = plan_more(Parts(1e-5, .0025, .0025), .02, 40, 5)
    p = int(few.n_patients['more patients'])
    assert power(Parts(1e-5, .0025, .0025), .02, p - 1, 5) < .8 <= power(Parts(1e-5, .0025, .0025), .02, p, 5)
    assert plan_more(parts, .2, 40, 5).more_seeds['more repeats'] == 0
    with pytest.raises(ValueError, match='never found'): plan_more(parts, 0., 40, 3)

def test_planted_auc_is_found_at_the_planned_power():
    "Parts from studies of many repeats; then studies of the planned size, through the judge's own rule."
    def study(seeds, seed): return compare_arms(estimate(fake_results(n_patients=100, folds=2, arms=('scratch', 'full@a'), effects={'full@a': .1}, seed_sd=.02, own=.5, seeds=seeds, seed=seed), n=150), 'full@a', 'scratch')
    large, planned = [study(10, 900 + i) for i in range(10)], [study(4, i) for i in range(100)]
    parts = Parts(*np.mean([three(c.parts) for c in large], 0), share=large[0].parts.share)
    expected = power(parts, np.mean([c.estimate for c in large + planned]), 100, 4)
    found = np.mean([c.direction > 0 for c in planned])
    assert .3 < expected < .95 and found == pytest.approx(expected, abs=.13) # two standard errors of 100 studies are .1

# --- under the null

@pytest.mark.parametrize('task, patients', [('classification', 40), ('segmentation', 40), ('segmentation', 8)])
@pytest.mark.parametrize('seeds', [2, 3, 5])
def test_the_same_strategy_twice(task, patients, seeds):
    stored = fake_results(task, n_patients=40, seeds=5, arms=('full@a',), seed_sd=.02)
    null = simulate_null(stored, n_seeds=seeds, n_patients=patients, n=80)
    assert null.studies == 200 and null.claims <= 16, str(null)

@pytest.mark.parametrize('made', [dict(seed_sd=0., interaction_sd=0.), dict(seed_sd=.02, interaction_sd=0.), dict(seed_sd=0., interaction_sd=.05), dict(seed_sd=.02, interaction_sd=.05)])
@pytest.mark.parametrize('seeds, patients', [(2, 20), (3, 6), (3, 40)])
def test_strategies_that_are_equal_on_average(made, seeds, patients):
    "Also where patients differ in what a strategy does for them."
    def claims(seed): return compare_arms(estimate(fake_results('segmentation', n_patients=patients, folds=2, seeds=seeds, seed=seed, arms=('full@a', 'scratch'), **made)), 'full@a', 'scratch').direction != 0
    assert sum(map(claims, range(200))) <= 16

@pytest.mark.parametrize('own, seeds, patients', [(0., 2, 20), (.9, 3, 24)])
def test_equal_strategies_by_auc(own, seeds, patients):
    def claims(seed): return compare_arms(estimate(fake_results(n_patients=patients, folds=2, seeds=seeds, seed=seed, arms=('full@a', 'scratch'), own=own, shared=.3), n=150), 'full@a', 'scratch').direction != 0
    assert sum(map(claims, range(200))) <= 16

@pytest.mark.parametrize('correction', ['bh', 'holm'])
def test_a_family_of_equal_strategies(correction):
    "Any claim among all pairs of five."
    arms = ('scratch', 'full@a', 'l2sp@a', 'soup@a', 'lp_ft@a')
    def claims(seed):
        e = estimate(fake_results('segmentation', arms=arms, n_patients=20, seeds=3, seed_sd=.02, interaction_sd=.02, seed=seed))
        p = [compare_arms(e, a, b).p for i, a in enumerate(arms) for b in arms[:i]]
        return (adjust(p, correction) <= .05).any()
    assert sum(map(claims, range(100))) <= 10

def test_null_of_stored_results(rng):
    stored = fake_results('segmentation', seeds=4, arms=('full@a',))
    a, b = simulate_null(stored, studies=20), simulate_null(stored, studies=20)
    assert (a.p == b.p).all() and a.n_seeds == 4 and a.n_patients == 40 and 'claim a difference' in str(a)
    with pytest.raises(JudgeError, match='at least two'): simulate_null(fake_results(seeds=1))
