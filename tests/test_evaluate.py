"Metrics, statistics and figures against scikit-learn, SciPy, statsmodels, brute force and simulated truth."
import itertools
import numpy as np, pandas as pd, pytest
import matplotlib
from scipy import stats
from sklearn.metrics import roc_auc_score
from statsmodels.stats.multitest import multipletests

matplotlib.use('Agg')
from medxfer_nb.evaluate import plots
from medxfer_nb.evaluate.metrics import UndefinedAUC, WeightedAUC, auc, auc_table, mean_auc, per_study
from medxfer_nb.evaluate.stats import (Guard, benjamini_hochberg, cluster_bootstrap, delong, exact_floor, paired_t, paired_t_range,
                                       sign_flip, two_level_bootstrap)

def scored(rng, patients=120, labels=3, seeds=1, films=(1, 2, 3), masked=.1, seed_sd=0.):
    "Targets, patient names and per seed the scores of two exchangeable models, with effects of patient, film and seed."
    codes = np.repeat(np.arange(patients), rng.choice(films, patients))
    y = (rng.random((patients, labels)) < .3)[codes].astype(float)
    habit = rng.normal(0, .4, (2, patients, labels))[:, codes]
    pairs = [tuple((1 + rng.normal(0, seed_sd))*y + h + rng.normal(0, .5, (patients, labels))[codes] + rng.normal(0, .7, y.shape)
                   for h in habit) for _ in range(seeds)]
    y[rng.random(y.shape) < masked] = np.nan
    return y, np.array([f'p{c}' for c in codes]), pairs

@pytest.fixture
def rng(): return np.random.default_rng(7)

@pytest.mark.parametrize('digits', [0, 1, 8])
def test_auc_is_the_share_of_pairs_won(rng, digits):
    y, s = rng.integers(0, 2, 80), rng.normal(size=80).round(digits)
    gap = s[y == 1][:, None] - s[y == 0]
    assert auc(y, s) == pytest.approx(((gap > 0) + .5*(gap == 0)).mean())
    assert auc(y, s) == pytest.approx(roc_auc_score(y, s))

def test_undefined_is_named_never_averaged(rng):
    y, s = np.eye(4)[:, :2], rng.normal(size=(4, 2))
    y[:, 1] = 1
    assert auc_table(y, s, ['Edema', 'Mass']).note.tolist() == ['', 'no negatives']
    assert np.isnan(auc(y[:, 1], s[:, 1]))
    with pytest.raises(UndefinedAUC, match='Mass has no negatives'): mean_auc(y, s, ['Edema', 'Mass'])
    assert mean_auc(y, s, ['Edema', 'Mass'], over=['Edema']) == auc(y[:, 0], s[:, 0])
    with pytest.raises(ValueError, match="the labels are"): mean_auc(y, s, ['Edema', 'Mass'], over=['Oedema'])

@pytest.mark.parametrize('y, s, says', [([1, -1], [0., 1], 'policy'), ([1, 0], [0., np.nan], 'diverged'), ([1, 0], [[0.], [1]], 'one shape')])
def test_bad_arrays_are_refused(y, s, says):
    with pytest.raises(ValueError, match=says): auc(y, s)

def test_weighted_auc_equals_films_copied_out(rng):
    y, _, [(s, _)] = scored(rng)
    s = s.round(1) # ties
    draws = rng.integers(0, len(y), (100, len(y)))
    weights = np.stack([np.bincount(d, minlength=len(y)) for d in draws])
    copied = [[auc(y[d, c], s[d, c]) for c in range(3)] for d in draws]
    np.testing.assert_allclose(WeightedAUC(y, s)(weights, block=7), copied, atol=1e-12)

def test_per_study_pools_scores_and_flags_conflicts():
    films = pd.DataFrame({'study': list('bbaac'), 'y': [1, 0, 0, np.nan, np.nan], 's': [.2, .6, .1, .3, .9]})
    study = per_study(films.y, films.s, films.study)
    assert study.studies.tolist() == ['b', 'a', 'c'] and study.films.tolist() == [2, 2, 1]
    np.testing.assert_array_equal(study.targets, [1, 0, np.nan])
    np.testing.assert_allclose(study.scores, [.4, .2, .9])
    assert study.conflicts.tolist() == [True, False, False] and '1 of 3' in study.note
    np.testing.assert_allclose(per_study(films.y, films.s, films.study, 'max').scores, [.6, .3, .9])

def test_paired_t_and_false_discovery_rate(rng):
    a, b = rng.normal(size=(2, 6))
    ours, scipys = paired_t(a, b), stats.ttest_rel(a, b)
    assert (ours.t, ours.p) == pytest.approx((scipys.statistic, scipys.pvalue))
    assert ours.interval == pytest.approx(tuple(scipys.confidence_interval()))
    p = rng.random(30)**3
    np.testing.assert_allclose(benjamini_hochberg(p), multipletests(p, method='fdr_bh')[1])
    with pytest.raises(ValueError, match='finite'): paired_t([1, np.nan], [0, 0])

def test_no_exact_p_is_below_the_floor(rng):
    assert [exact_floor(3), exact_floor(5)] == [.25, .0625]
    for n in (3, 5, 8):
        a, b = rng.normal(size=(2, n))
        flips = [abs(np.dot(s, a - b)) for s in itertools.product([1, -1], repeat=n)]
        assert sign_flip(a, b).p == pytest.approx(np.mean(np.array(flips) >= abs((a - b).sum()) - 1e-12))
        assert sign_flip(a + 10, b).p == exact_floor(n)
    assert str(Guard(.04, 3)) == 'p=0.04 (t-test, n=3; an exact test on 3 pairs cannot go below 0.25)'
    assert '0.25' in str(paired_t([.8, .81, .83], [.7, .75, .74]))

@pytest.mark.parametrize('ddof', [0, 1])
def test_printed_means_bound_the_p_value(rng, ddof):
    for _ in range(200):
        a, b = rng.normal([[70], [68]], rng.uniform(.1, 2, (2, 1)), (2, 3))
        printed = np.round([a.mean(), a.std(ddof=ddof), b.mean(), b.std(ddof=ddof)], 1)
        low, high = paired_t_range(*printed, n=3, ddof=ddof)
        assert low - 1e-12 <= paired_t(a, b).p <= high + 1e-12

def test_delong_against_all_pairs(rng):
    y, _, [(a, b)] = scored(rng, labels=1, masked=0)
    y, a, b = y[:, 0], a[:, 0].round(1), b[:, 0].round(1)
    def placements(s):
        wins = (s[y == 1][:, None] > s[y == 0]) + .5*(s[y == 1][:, None] == s[y == 0])
        return wins.mean(1), wins.mean(0)
    (va, wa), (vb, wb) = placements(a), placements(b)
    covariance = np.cov(np.stack([va, vb]))/len(va) + np.cov(np.stack([wa, wb]))/len(wa)
    se = np.sqrt([1, -1] @ covariance @ [1, -1])
    ours = delong(y, a, b)
    assert ours.p == pytest.approx(2*stats.norm.sf(abs(va.mean() - vb.mean())/se))
    assert np.diff(ours.interval)[0] == pytest.approx(2*stats.norm.ppf(.975)*se)
    assert delong(y, a, a).p == 1

def test_delong_and_bootstrap_agree_and_clusters_widen(rng):
    y, patients, [(a, b)] = scored(rng, 300, labels=1, films=(4,), masked=0)
    clustered, boot = delong(y[:, 0], a[:, 0], b[:, 0], patients), cluster_bootstrap(y, a, b, patients, n=4000)
    assert np.diff(clustered.interval) == pytest.approx(np.diff(boot.interval), rel=.1)
    assert np.diff(clustered.interval) > 1.2*np.diff(delong(y[:, 0], a[:, 0], b[:, 0]).interval)
    assert 'these trained models only' in str(boot) and 'these trained models only' in str(clustered)

def test_bootstrap_moves_patients_whole(rng):
    y, patients, [(a, b)] = scored(rng, 60, masked=0)
    copies = 3 # every film three times: more films, no more evidence
    once = cluster_bootstrap(y, a, b, patients, n=500)
    thrice = cluster_bootstrap(*(np.tile(v, (copies, 1)) for v in (y, a, b)), np.tile(patients, copies), n=500)
    assert thrice.interval == pytest.approx(once.interval) and thrice.n_films == copies*once.n_films
    assert once == cluster_bootstrap(y, a, b, patients, n=500)
    rare = np.zeros_like(y[:, 0]); rare[patients == 'p0'] = 1
    with pytest.raises(UndefinedAUC, match='resamplings lack a class'): cluster_bootstrap(rare, a[:, 0], b[:, 0], patients, n=200)

def test_two_levels(rng):
    y, patients, pairs = scored(rng, 80, seeds=3, seed_sd=.3)
    result = two_level_bootstrap(y, pairs, patients, n=500)
    assert result.per_seed == pytest.approx([mean_auc(y, a) - mean_auc(y, b) for a, b in pairs])
    assert result.estimate == pytest.approx(np.mean(result.per_seed))
    assert (result.n_seeds, result.n_patients) == (3, 80) and '0.25' in result.caveat and 'other seeds' in str(result)
    half, (low, high) = stats.t.ppf(.975, 2)*stats.sem(result.per_seed), result.interval
    assert high - low >= 2*half - 1e-12 # patients can only add to what the seeds leave open
    same = two_level_bootstrap(y, [pairs[0]]*3, patients, n=500) # no spread between seeds: patients alone
    one = cluster_bootstrap(y, *pairs[0], patients, n=500)
    assert np.diff(same.interval) == pytest.approx(np.diff(one.interval), rel=.2)
    with pytest.raises(ValueError, match='cluster_bootstrap'): two_level_bootstrap(y, pairs[:1], patients)

@pytest.mark.parametrize('seed_sd', [0., .3])
def test_two_level_false_alarms_are_near_nominal(seed_sd):
    "Under the null, with three seeds, 95% intervals miss zero in about 5% of studies: at most 10% of 200 (p < 0.003 otherwise)."
    rng, missed = np.random.default_rng(1), []
    for _ in range(200):
        y, patients, pairs = scored(rng, 60, labels=1, seeds=3, masked=0, seed_sd=seed_sd)
        missed.append(two_level_bootstrap(y, pairs, patients, n=120).direction != 0)
    assert np.mean(missed) <= .1

RECIPES = [('baseline', 'none'), ('color_module', 'pixelshuffle'), ('baseline_all', 'none'), ('last_layer(T:CheXpert E:ImageNet)', 'coloru')]

def runs_table(rng):
    return pd.DataFrame([dict(strategy=s, module=m, backbone='resnet18', n_train=n, draw=d, seed=0, mean_auc=rng.uniform(.6, .9),
                              **{'auc_Edema': rng.uniform(.6, .9), 'auc_Pleural Effusion': rng.uniform(.6, .9)})
                         for s, m in RECIPES for n in (50, 500) for d in range(3)])

def texts_overlap(fig):
    "Pairs of visible texts whose boxes overlap by more than a pixel."
    fig.canvas.draw()
    texts = [t for t in fig.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip()]
    ticks = [l for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
             for l in (tick.label1, tick.label2) if l not in axis.get_ticklabels()]
    boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in texts if t not in ticks]
    return [(a, b) for (a, p), (b, q) in itertools.combinations(boxes, 2) if p.overlaps(q)]

def figures(rng):
    runs = runs_table(rng)
    published = pd.DataFrame([('baseline', 'none', 'densenet121', 'mean_auc', 78.6, .2), ('baseline', 'none', 'densenet121', 'auc_pleural_effusion', 88., np.nan)],
                             columns=['strategy', 'module', 'backbone', 'metric', 'value', 'sd'])
    yield plots.plot_strategies(runs[runs.n_train == 50], published)
    yield plots.plot_observations(runs[runs.n_train == 50], published)
    yield plots.plot_sizes(runs)
    yield plots.plot_curves(pd.DataFrame([dict(strategy=s, module=m, seed=0, iteration=i, train_loss=1/i, valid_loss=1.1/i, valid_metric=i)
                                          for s, m in RECIPES for i in (1, 2, 3)]))
    yield plots.plot_colours(rng.random((2, 16, 16)), {('coloru', 'all'): rng.normal(size=(2, 3, 16, 16))})
    yield plots.plot_label_counts({'all': pd.DataFrame({'positive': [10, 200], 'negative': [300, 100], 'uncertain': [5, 0]}, index=['Edema', 'Pleural Effusion'])})

def test_figures_have_no_overlapping_text(rng):
    for fig in figures(rng):
        plots.footnote(fig, 'virtual patients: mechanisms, not clinical numbers')
        assert texts_overlap(fig) == []
        fig.text(.5, .5, 'one'), fig.text(.5, .5, 'other')
        assert ('one', 'other') in texts_overlap(fig) # the check can fail
        matplotlib.pyplot.close(fig)

def test_saved_figures_depend_on_nothing_but_the_figure(tmp_path):
    saved = [plots.save_figure(next(figures(np.random.default_rng(0))), tmp_path/k/'tab1', dpi=80) for k in 'ab']
    first, second = ({f: p.read_bytes() for f, p in files.items()} for files in saved)
    assert first == second and set(first) == {'svg', 'pdf', 'png'}

def test_published_markers_sit_at_the_published_value(rng):
    fig = next(figures(rng))
    hollow = [l.get_xdata()[0] for l in fig.axes[0].lines if l.get_markerfacecolor() == 'white']
    assert hollow == pytest.approx([.786])

def test_differences_pair_runs_of_one_draw(rng):
    runs = runs_table(rng)
    table = plots.differences_to(runs, 'baseline').set_index(['strategy', 'n_train', 'draw']).difference
    score = runs.set_index(['strategy', 'n_train', 'draw']).mean_auc
    assert table['baseline_all', 500, 2] == pytest.approx(score['baseline_all', 500, 2] - score['baseline', 500, 2])
    with pytest.raises(ValueError, match='select one backbone'): plots.differences_to(pd.concat([runs, runs]), 'baseline')
