"Tests over patients and seeds against SciPy, statsmodels, brute force and simulated truth."
import itertools
import matplotlib
import numpy as np, pandas as pd, pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from medxfer_nb.evaluate.paired import floor_note, lambda_table, paired_table, plot_lambda, sign_flip_test, two_level_mean, wilcoxon
from medxfer_nb.evaluate.stats import exact_floor, sign_flip

@pytest.fixture
def rng(): return np.random.default_rng(11)

def runs(lams=(0, 8, np.inf), seeds=2, patients=5, sources=('nat', 'med+nat'), rng=None):
    rng = rng or np.random.default_rng(0)
    return pd.DataFrame([dict(source=s, lam=float(l), seed=k, patient=f'SECRET-{p}', dice=rng.uniform(.6, .8), precision=rng.uniform(.6, .9))
                         for s, l, k, p in itertools.product(sources, lams, range(seeds), range(patients))])

# --- tests over patients

@pytest.mark.parametrize('sides', [1, 2])
def test_sign_flips(rng, sides):
    a, b = rng.normal(.3, 1, (2, 9))
    assert sign_flip_test(a, b, sides) == sign_flip(a, b, sides)
    a, b = rng.normal(.2, 1, 30), np.zeros(30)
    drawn = sign_flip_test(a, b, sides)
    reference = stats.permutation_test((a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type='samples', n_resamples=20_000, vectorized=True,
                                       alternative={1: 'greater', 2: 'two-sided'}[sides], rng=np.random.default_rng(1))
    assert drawn.p == pytest.approx(reference.pvalue, abs=.012)
    assert drawn == sign_flip_test(a, b, sides) and drawn != sign_flip_test(a, b, sides, seed=1) and 'random patterns, seed 0' in str(drawn)
    assert sign_flip_test(np.ones(40), np.zeros(40), draws=999).p == 1/1000 # never zero

@pytest.mark.parametrize('n', [2, 5, 11, 33, 60])
def test_wilcoxon_without_ties(rng, n):
    for alternative, sides in (('two-sided', 2), ('greater', 1)):
        d = rng.normal(.2, 1, n)
        assert wilcoxon(d, np.zeros(n), sides).p == pytest.approx(stats.wilcoxon(d, alternative=alternative, method='exact').pvalue)

@pytest.mark.parametrize('sides', [1, 2])
def test_wilcoxon_with_ties_and_zeros(rng, sides):
    for _ in range(20):
        d = rng.integers(-3, 5, 8)/10
        kept = d[d != 0]
        ranks = stats.rankdata(np.abs(kept))
        flips = np.array(list(itertools.product([1, -1], repeat=len(kept)))) @ ranks
        seen = (np.sign(kept)*ranks).sum()
        expected = (np.abs(flips) >= abs(seen) if sides == 2 else flips >= seen).mean()
        assert wilcoxon(.7 + d, np.full(8, .7), sides).p == pytest.approx(expected) # .7 + .1 - .7 is not quite .1

def test_paired_table(rng):
    a, b = rng.normal(.75, .05, (2, 7))
    t = paired_table(a, b, level=.9)
    reference = stats.ttest_rel(a, b)
    assert t.p['t-test'] == pytest.approx(reference.pvalue) and t.p['Wilcoxon'] == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert tuple(t.loc['t-test', ['low', 'high']]) == pytest.approx(tuple(reference.confidence_interval(.9)))
    assert (t.floor == exact_floor(7)).all() and (t.n == 7).all()
    seeds = np.stack([a, a + .1])
    assert paired_table(seeds, b).difference['t-test'] == pytest.approx((a - b).mean() + .05) # seeds are averaged first
    five = paired_table(np.arange(1, 6)/100 + .7, np.full(5, .7))
    assert five.below_floor.to_dict() == {'t-test': True, 'sign-flip': False, 'Wilcoxon': False} and five.p['sign-flip'] == .0625
    assert paired_table(np.ones(5), np.ones(5)).p[1:].tolist() == [1, 1]
    for wrong in ((a, b[1:]), (np.ones((2, 2, 2)), b), ([.1], [.2]), ([.1, np.nan], [.2, .3])):
        with pytest.raises(ValueError): paired_table(*wrong)

def test_floor_note():
    assert '0.0625, so none can reach 0.05' in floor_note(5) and '0.0312, so 0.05 is within reach' in floor_note(6)

# --- seeds and patients

def crossed(rng, seeds, patients, sd_seed, sd_patient, sd_rest, mean=0.):
    return mean + rng.normal(0, sd_seed, (seeds, 1)) + rng.normal(0, sd_patient, (1, patients)) + rng.normal(0, sd_rest, (seeds, patients))

@pytest.mark.parametrize('seeds, patients', [(3, 5), (5, 5), (2, 8), (5, 20)])
@pytest.mark.parametrize('sds', [(1, 0, .3), (0, 1, .3), (.7, .7, .7), (0, 0, 1)])
def test_false_alarms(seeds, patients, sds):
    rng = np.random.default_rng(1)
    alarms = np.mean([two_level_mean(crossed(rng, seeds, patients, *sds)).direction != 0 for _ in range(1200)])
    assert alarms < .08, alarms

def test_variance_of_the_mean_is_estimated(rng):
    def variance(d, level=.6827): # from the reported parts
        m = two_level_mean(d, level)
        return np.var(m.per_seed, ddof=1)/m.n_seeds + m.patients_sd**2
    estimates = [variance(crossed(rng, 4, 30, .3, 1.2, .4)) for _ in range(800)]
    assert np.mean(estimates) == pytest.approx(.3**2/4 + 1.2**2/30 + .4**2/120, rel=.06)

def test_many_patients_give_the_bootstrap_interval(rng):
    d = crossed(rng, 4, 300, .1, 1, .5)
    drawn = np.stack([d[:, rng.integers(0, 300, 300)].mean(1) for _ in range(6000)])
    c = np.cov(drawn, rowvar=False)
    shared = (c.sum() - np.trace(c))/12
    half = (stats.t.ppf(.975, 3)**2*d.mean(1).var(ddof=1)/4 + stats.norm.ppf(.975)**2*shared)**.5
    interval = two_level_mean(d).interval
    assert (interval[1] - interval[0])/2 == pytest.approx(half, rel=.02)

def test_one_seed_or_one_patient(rng):
    d = crossed(rng, 3, 6, .1, .1, .1)
    for values, alone, words in ((d[0], d[0], 'this one training'), (d[:1], d[0], 'this one training'), (d[:, :1], d[:, 0], 'one patient')):
        m = two_level_mean(values, .9)
        assert m.interval == pytest.approx(tuple(stats.ttest_1samp(alone, 0).confidence_interval(.9))) and words in m.covers
    assert 'Caveat: 3 seeds' in str(two_level_mean(d)) and two_level_mean(crossed(rng, 12, 12, 1, 1, 1)).caveat == ''
    assert two_level_mean(np.full((3, 4), .5)).interval == (.5, .5)
    for wrong in ([[.5]], np.ones((2, 2, 2)), [[.1, np.inf]]):
        with pytest.raises(ValueError): two_level_mean(wrong)

# --- over lambdas

def test_lambda_table():
    frame = runs(lams=(0, .5, 8, np.inf), seeds=3)
    table = lambda_table(frame)
    assert list(zip(table.source, table.lam)) == [(s, l) for s in ('nat', 'med+nat') for l in (0, .5, 8, np.inf)]
    grids = {k: g.pivot(index='seed', columns='patient', values='dice').to_numpy() for k, g in frame.groupby(['source', 'lam'])}
    for row in table.itertuples():
        assert row.mean == pytest.approx(grids[row.source, row.lam].mean())
        if not row.lam: continue
        d = grids[row.source, row.lam] - grids[row.source, 0]
        assert (row.d_low, row.d_high) == pytest.approx(two_level_mean(d).interval)
        assert row.t_p == pytest.approx(stats.ttest_1samp(d.mean(0), 0).pvalue) and row.wilcoxon_p == pytest.approx(stats.wilcoxon(d.mean(0)).pvalue)
        assert row.sign_flip_p >= row.floor == .0625
    for _, mine in table.groupby('source'):
        assert mine[['t_p', 'difference']].isna().iloc[0].all()
        for c in ('t_p', 'sign_flip_p', 'wilcoxon_p'): assert mine[f'{c}_bh'][1:].to_numpy() == pytest.approx(multipletests(mine[c][1:], method='fdr_bh')[1])
    shuffled = lambda_table(frame.sample(frac=1, random_state=0).sort_values('source', kind='stable', ascending=False))
    pd.testing.assert_frame_equal(table, shuffled)

def test_lambda_table_pairs_the_seeds_that_both_have():
    frame = runs(seeds=3)
    fewer = frame[~((frame.lam == 8) & (frame.seed == 2))]
    row = lambda_table(fewer).query("source == 'nat' and lam == 8").iloc[0]
    assert row.n_seeds == 2 and row.difference == pytest.approx(lambda_table(frame[frame.seed < 2]).query("source == 'nat' and lam == 8").difference.item())

def test_lambda_errors_say_what_to_do_and_name_nobody():
    frame = runs()
    wrong = {'finish these runs': frame[1:], 'lacks the columns': frame.drop(columns='seed'), 'several rows': pd.concat([frame, frame[:1]]),
             'no runs at the reference': frame[frame.lam > 0], 'write infinity': frame.replace({'lam': {8.: np.nan}}),
             'not the same patients': frame[~((frame.lam == 8) & (frame.patient == 'SECRET-1'))]}
    for text, table in wrong.items():
        with pytest.raises(ValueError, match=text) as e: lambda_table(table)
        assert 'SECRET' not in str(e.value)

@pytest.mark.parametrize('lams', [(0,), (0, 8), (0, 8, 50), (.5, 16, np.inf), (0, np.inf), (0, .5, 1, 2, 4, 8, 16, 50, np.inf)])
@pytest.mark.parametrize('seeds', [1, 3])
def test_plot_lambda(lams, seeds):
    printed = pd.DataFrame([dict(source='med+nat', lam=8, metric='dice', value=.764), dict(source='unknown', lam=0, metric='dice', value=.1)])
    fig = plot_lambda(runs(lams, seeds, sources=('nat', 'med+nat', 'elsewhere')), published=printed)
    fig.canvas.draw()
    assert [a.get_ylabel() for a in fig.axes] == ['Dice', 'Precision'] and floor_note(5) in fig.texts[0].get_text()
    labels = [t.get_text() for t in fig.axes[0].get_xticklabels()]
    assert labels == [f'{l:g}' if np.isfinite(l) else 'frozen' for l in lams]
    xs = [x for line in fig.axes[0].lines for x in np.atleast_1d(line.get_xdata()) if len(line.get_xdata()) == len(lams)]
    assert np.isfinite(xs).all()
    plt.close(fig)

def test_plot_lambda_differences():
    fig = plot_lambda(runs(), metrics=['dice'], reference=0)
    assert fig.axes[0].get_ylabel() == 'Dice minus that at λ = 0' and [t.get_text() for t in fig.axes[0].get_xticklabels()] == ['0', '8', 'frozen'] # the axis of the scores
    plt.close(fig)
