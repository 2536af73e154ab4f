"The figures of a comparison: what is drawn is what was computed, readable without colours and without names."
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from compare_fakes import fake_results
from medxfer_nb.compare import figures as fig_lib
from medxfer_nb.compare.figures import (TONES, alt_text, arm_styles, case_view, chosen, crossing_texts, patient_gains, plot_bland_altman, plot_choices, plot_cost,
                                        plot_failures, plot_folds, plot_forest, plot_learning, plot_mixing, plot_reliability, plot_waterfall, table_row, worst_cases)
from medxfer_nb.compare.judge import judge
from medxfer_nb.compare.pool import Pool
from medxfer_nb.data.brain import Brains
from medxfer_nb.data.cases import Cases
from medxfer_nb.data.slices import Slices

matplotlib.use('Agg')
ARMS = ('scratch', 'full@a', 'linear_probe@a', 'l2sp@a')
EFFECTS = {'full@a': .06, 'linear_probe@a': -.08, 'l2sp@a': .12}


@pytest.fixture(scope='module')
def dice(): return fake_results('segmentation', arms=ARMS, effects=EFFECTS, seeds=5, interaction_sd=.02, cases_per_patient=2, portions=(.5, 1.), gains={a: [.1, 0] for a in ARMS[1:]})


@pytest.fixture(scope='module')
def auc(): return fake_results(arms=ARMS, effects=EFFECTS, n_patients=60, labels=('Effusion', 'Edema'), seeds=2, cases_per_patient=2)


@pytest.fixture(scope='module')
def verdict(dice): return judge(dice)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def bars(ax):
    "Intervals of a forest plot from the top: (low, high) of the horizontal lines with two ends"
    lines = [l for l in ax.lines if l.get_marker() == 'None' and len(l.get_xdata()) == 2 and l.get_ydata()[0] == l.get_ydata()[1]]
    return {l.get_ydata()[0]: tuple(l.get_xdata()) for l in lines}


def test_the_forest_shows_what_the_judge_found(dice, verdict):
    fig = plot_forest(dice, verdict, 'scratch')
    ax, table = fig.axes[0], verdict.against('scratch').sort_values('difference', ascending=False)
    assert [t.get_text() for t in ax.get_yticklabels()] == [dice.titles[a] for a in table.index]
    assert [bars(ax)[y] for y in range(len(table))] == [tuple(row) for row in table[['low', 'high']].to_numpy()]
    markers = {l.get_ydata()[0]: l for l in ax.lines if l.get_markersize() == 6.5}
    for y, row in enumerate(table.itertuples()):
        assert markers[y].get_xdata()[0] == row.difference
        filled = to_rgb(markers[y].get_markerfacecolor()) != (1, 1, 1)
        assert filled == bool(row.claim) and (markers[y].get_marker() == 'D') == (row.claim < 0)
        repeats = next(l for l in ax.lines if l.get_markersize() == 2.8 and l.get_ydata()[0] == y + .29)
        np.testing.assert_allclose(np.mean(repeats.get_xdata()), row.difference)
    assert table.claim.tolist() == [1, 1, -1] and to_rgb(markers[2].get_markerfacecolor()) == to_rgb(TONES['worse'])
    with pytest.raises(ValueError, match='choose among full, scratch'): plot_forest(dice, verdict, 'wise_ft')
    by_name = plot_forest(dice, verdict, 'l2sp@a') # any arm may be the reference
    assert [bars(by_name.axes[0])[y] for y in range(3)] == [verdict.compare(a, 'l2sp@a').interval for a in ('full@a', 'scratch', 'linear_probe@a')]


def test_an_interval_off_zero_without_a_claim_is_coloured_but_hollow(dice, verdict):
    from dataclasses import replace
    pairs = verdict.table.copy()
    pairs['claim_scratch'] = 0.
    fig = plot_forest(dice, replace(verdict, table=pairs), 'scratch')
    markers = [l for l in fig.axes[0].lines if l.get_markersize() == 6.5]
    assert all(l.get_markerfacecolor() == 'white' for l in markers) and {l.get_markeredgecolor() for l in markers} == {TONES['better'], TONES['worse']}
    assert 'not told apart' in alt_text(fig) and ', better' not in alt_text(fig)


def test_gains_per_patient_by_hand(dice, auc, verdict):
    for results, name, sign in ((dice, 'dice', 1), (auc, 'log_loss', -1)):
        gains = patient_gains(results, 'l2sp@a', 'full@a')
        for p in (0, 7, 39):
            rows = np.flatnonzero(results.patients == p)
            by_hand = np.mean([[results.scores['l2sp@a'][name][s, v] - results.scores['full@a'][name][s, v] for v in rows] for s in range(results.n_seeds)])
            np.testing.assert_allclose(gains[p + 1], sign*by_hand)
    np.testing.assert_allclose(patient_gains(dice, 'l2sp@a', 'full@a').mean(), verdict.compare('l2sp@a', 'full@a').estimate)
    drawn = [b.get_height() for b in plot_waterfall(dice, 'l2sp@a', 'full@a').axes[0].patches]
    assert drawn == sorted(drawn, reverse=True) and len(drawn) == dice.n_patients
    np.testing.assert_allclose(sum(drawn)/len(drawn), patient_gains(dice, 'l2sp@a', 'full@a').mean())


def test_untested_patients_have_no_bar():
    results = fake_results(n_patients=20, seeds=2)
    out = np.flatnonzero(results.patients < 5)
    results.folds[:, out] = -1
    for arm in results.arms:
        results.outputs[arm][:, out] = np.nan
        for values in results.scores[arm].values(): values[:, out] = np.nan
    assert patient_gains(results, 'l2sp@a', 'full@a').index.tolist() == list(range(6, 21))
    assert min(worst_cases(results, 'l2sp@a', 40)) == 5 and len(worst_cases(results, 'l2sp@a', 40)) == 15


def test_worst_cases_by_hand(dice, auc):
    means = {v: np.mean([dice.scores['full@a']['dice'][s, v] for s in range(5)]) for v in range(dice.n_cases)}
    assert worst_cases(dice, 'full@a', 4) == sorted(means, key=means.get)[:4]
    losses = {v: np.mean([auc.scores['full@a']['log_loss'][s, v] for s in range(2)]) for v in range(auc.n_cases)}
    assert worst_cases(auc, 'full@a', 4) == sorted(losses, key=losses.get, reverse=True)[:4]


@pytest.mark.parametrize('k', [2, 3, 5, 10])
def test_every_part_is_tested_once_and_never_trains_at_that_time(k):
    ax = plot_folds(k).axes[0]
    colours = {part: to_rgb(c) for part, (c, _, _) in fig_lib._PARTS.items()}
    drawn = {part: [(round(p.get_y() + p.get_height()/2), p.get_x(), p.get_width()) for p in ax.patches if p.get_facecolor()[:3] == c] for part, c in colours.items()}
    assert [(y, round(x*k, 9), round(w*k, 9)) for y, x, w in drawn['test']] == [(r, r, 1) for r in range(k)]
    for (_, x, w), (_, v, u) in zip(drawn['test'], drawn['validation']):
        assert v >= x + w - 1e-9 or v + u <= x + 1e-9, 'who chooses is not who is tested'
        assert v >= -1e-9 and v + u <= 1 + 1e-9
        np.testing.assert_allclose(u, .25*(1 - w))


def pools():
    "One case of each kind, with two structures."
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 8, 8), np.uint8)
    masks[0, 1:3, 1:3], masks[1, 2:6, 2:6], masks[1, 6, 6], masks[2, 4, 4] = 1, 1, 2, 2
    shared = dict(patients=np.zeros(1, int), labels=('core', 'rim'), weights=np.ones(1), split=np.array(['']), spacings=np.ones((1, 3)), regions={'core': (1,), 'rim': (2,)})
    slices = Slices(rng.random((3, 8, 8)).astype('float16'), masks, np.zeros(3, int), np.arange(3), np.zeros(1, int), np.full((1, 3), 8), np.ones((1, 3)), ('background', 'core', 'rim'))
    brains = Brains(rng.random((1, 2, 3, 8, 8)).astype('float16'), masks[None], np.zeros(1, int), (1., 1., 1.), ('channel 1', 'channel 2'))
    return masks, Pool('slices', slices, np.zeros(3, int), **shared), Pool('volumes', brains, np.zeros(1, int), **shared)


def test_the_slice_with_most_errors_is_shown_whatever_the_pool():
    masks, *both = pools()
    for pool in both:
        image, truth, predicted = case_view(pool, 0)
        assert image.shape == (8, 8) and predicted is None
        assert (truth[0] == (masks[1] == 1)).all() and (truth[1] == (masks[1] == 2)).all(), 'without a prediction: the slice with most truth'
        swapped = masks.copy()
        swapped[2] = 1 # the union is nearly right in slice 1; slice 2 is wrong
        for given in (swapped, np.stack([swapped == 1, swapped == 2])): # numbers, or one mask per structure
            _, truth, predicted = case_view(pool, 0, given)
            assert (truth[1] == (masks[2] == 2)).all() and predicted[0].all() and not predicted[1].any()
        _, truth, predicted = case_view(pool, 0, masks) # all right
        assert (truth == predicted).all() and truth.sum() == 17


def test_gallery_says_truth_and_prediction_and_row(auc):
    names = [f'name-{p}' for p in auc.patients]
    films = Cases('films', pd.DataFrame(dict(patient=names, study=names, Effusion=auc.targets[:, 0], Edema=auc.targets[:, 1])),
                  ('Effusion', 'Edema'), np.random.default_rng(0).integers(0, 255, (auc.n_cases, 16, 16)).astype('uint8'))
    pool = Pool('films', films, np.arange(auc.n_cases), auc.patients, films.labels, np.ones(auc.n_cases), np.full(auc.n_cases, ''), np.full((auc.n_cases, 3), np.nan))
    fig = plot_failures(auc, pool, 'full@a', n=4)
    worst = worst_cases(auc, 'full@a', 4)
    assert [ax.get_title(loc='left') for ax in fig.axes[:4]] == [f'row {v + 2}' for v in worst] == [f'row {table_row(v)}' for v in worst]
    p = auc.outputs['full@a'][:, worst[0]].mean(0)
    c = int(np.abs(p - auc.targets[worst[0]]).argmax())
    assert fig.axes[0].get_xlabel() == f'{("Effusion", "Edema")[c]}: {"yes" if auc.targets[worst[0], c] else "no"}\nsaid {p[c]:.0%}'
    text = alt_text(fig) + ''.join(t.get_text() for t in fig.findobj(matplotlib.text.Text))
    assert 'name-' not in text


def test_gallery_of_classes_that_exclude_each_other():
    results = fake_results(labels=('a', 'b', 'c'), exclusive=True, n_patients=30, seeds=2)
    v = worst_cases(results, 'full@a', 1)[0]
    p = results.outputs['full@a'][:, v].mean(0)
    assert fig_lib._said(results, 'full@a', v) == f'is {"abc"[int(results.targets[v].argmax())]}\nsaid {"abc"[int(p.argmax())]}, {p.max():.0%}'


def test_learning_curves_mark_where_transfer_stops(dice, auc):
    gains = {'full@a': [.15, .1, -.06], 'l2sp@a': [.1, .1, .1]}
    results = fake_results('segmentation', n_patients=60, seeds=5, portions=(.25, .5, 1.), gains=gains, effects={'full@a': 0., 'l2sp@a': 0.}, seed_sd=.002)
    results.titles.update({'full@a': 'Full fine-tuning', 'l2sp@a': 'L2-SP', 'scratch': 'From scratch'})
    fig = plot_learning(results)
    dotted = [l.get_xdata()[0] for l in fig.axes[1].lines if l.get_linestyle() == ':']
    sizes = sorted(set(results.curves.n_patients))
    assert len(dotted) == 1 and sizes[1] < dotted[0] < sizes[2]
    full, l2sp = crossing_texts(results)
    assert full.startswith('Full fine-tuning stops being demonstrably better than training from scratch at about') and 'L2-SP still helps' in l2sp
    assert full in alt_text(fig) and '@' not in alt_text(fig)
    with pytest.raises(ValueError, match='no portions'): plot_learning(auc)
    assert crossing_texts(auc) == []


def test_wide_intervals_of_two_repeats_do_not_flatten_the_learning_curves():
    results = fake_results('segmentation', seeds=2, portions=(.5, 1.), gains={'full@a': [.1, .1]}, seed_sd=.05)
    low, high = plot_learning(results).axes[1].get_ylim()
    assert high - low < 1.5


def test_costs_are_written_out_and_gaps_are_told(dice):
    results = fake_results('segmentation', arms=ARMS)
    results.costs.loc['scratch', 'seconds'] = np.nan
    results.costs['memory_mb'] = np.nan # a machine that does not tell
    fig = plot_cost(results)
    assert len(fig.axes) == 3 and 'unknown' in [t.get_text().strip() for t in fig.axes[0].texts]
    assert [t.get_text().strip() for t in fig.axes[2].texts] == ['4M', '4M', '1,000', '4M']
    assert [t.get_text() for t in plot_cost(dice, ['l2sp@a', 'scratch']).axes[0].get_yticklabels()] == [dice.titles['l2sp@a'], dice.titles['scratch']]


def test_choices_add_up_per_strategy(dice):
    results = fake_results('segmentation', arms=ARMS, seeds=5)
    results.notes['hyper'] = np.where(results.notes.seed < 2, 'lam 4', 'lam 0.1')
    table = chosen(results)
    assert table[table.arm == 'full@a'][['hyper', 'share']].values.tolist() == [['lam 0.1', .6], ['lam 4', .4]]
    assert list(dict.fromkeys(table.arm)) == list(ARMS)
    plot_choices(results)
    results.notes['hyper'] = ''
    with pytest.raises(ValueError, match='no settings'): plot_choices(results)
    with pytest.raises(ValueError, match='none of the strategies merges'): plot_mixing(dice)


def test_mixing_ratios_are_means_over_folds():
    results = fake_results('segmentation', arms=('scratch', 'timm@a+b'), seeds=2)
    ax = plot_mixing(results).axes[0]
    mine = results.ratios[(results.ratios.source == 'a')].groupby('unit', sort=False).ratio.mean()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), mine)


def test_each_task_has_its_own_agreement(dice, auc):
    with pytest.raises(ValueError, match='plot_bland_altman'): plot_reliability(dice)
    with pytest.raises(ValueError, match='plot_reliability'): plot_bland_altman(auc, 'full@a')
    ax = plot_bland_altman(dice, 'full@a').axes[0]
    found, drawn = dice.scores['full@a']['predicted_ml'], dice.scores['full@a']['ml']
    cloud = next(l for l in ax.lines if l.get_marker() == 'o')
    np.testing.assert_allclose(sorted(cloud.get_ydata()), sorted((found - drawn).ravel()))
    assert len(plot_reliability(auc).axes) == 4


def test_every_figure_says_what_it_shows(dice, auc, verdict):
    for fig in (plot_folds(5), plot_folds(1), plot_forest(dice, verdict), plot_learning(dice), plot_waterfall(auc, 'l2sp@a', 'full@a'), plot_cost(dice), plot_choices(dice),
                plot_reliability(auc, ['full@a']), plot_bland_altman(dice, 'full@a')):
        assert len(alt_text(fig)) > 40 and '\n' not in alt_text(fig)


# Machado, Oliveira and Fernandes 2009: what full deuteranopia and protanopia leave of linear RGB
BLIND = {'deuteranopia': [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
         'protanopia': [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]]}


@pytest.mark.parametrize('kind', BLIND)
def test_better_worse_and_undecided_differ_for_colour_blind_readers(kind):
    def seen(colour):
        c = np.array(to_rgb(colour))
        linear = np.where(c <= .04045, c/12.92, ((c + .055)/1.055)**2.4)
        return np.clip(np.array(BLIND[kind]) @ linear, 0, 1)**(1/2.2)
    tones = [seen(c) for c in TONES.values()]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(tones) for b in tones[:i]) > .25


def test_strategies_stay_distinct_and_scratch_grey():
    styles = arm_styles([f'r{i}' for i in range(16)] + ['scratch'])
    assert len(set(styles.values())) == 17 and styles['scratch'] == ('#7F7F7F', 'X')
