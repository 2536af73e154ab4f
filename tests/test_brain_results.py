"""The tables of the T-IMM paper from records whose content is known: pairing, seeds, missing runs, leaderboard, ratios, order of patients."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from medxfer_nb.repro import brain_results as R
from medxfer_nb.repro.brain_scales import SCALES, item_runs, make_run
from medxfer_nb.repro.jobs import Runs
from medxfer_nb.repro.targets import published

DEMO, STUDY, PAPER = (SCALES[s] for s in ('demo', 'study', 'paper'))
LIFT = {'none': 0., 'm1': .02, 'm2': .05, 'imm': .07, 'timm': .1, 'all 1:14': .03, 'all 1:7': .06, 'all 8:14': .06}
RNG = np.random.default_rng(0)
PATIENTS = .5 + .1*RNG.standard_normal(14)


def record(config, lift=LIFT, patients=PATIENTS, **metrics):
    "A run whose Dice is the patient's, plus what its start adds, plus noise of its own."
    rng = np.random.default_rng([config.seed, *config.start.encode(), *config.portion.encode()])
    dice = patients + lift[config.start] + .005*config.seed + .02*rng.standard_normal(len(patients))
    found = dict(dice=dice, dice_ET=dice - .1, dice_TC=dice, dice_WT=dice + .1, ml_WT=100*patients)
    memory = dict(imm=dict(m1=(.89, 0.), m2=(.01, .89), imm=(.38, .42)), timm=dict(timm=(.5, .39))).get(config.start, {})
    noise = rng if config.start == 'timm' else np.random.default_rng(1)  # P of the others has no seed
    found |= {f'remembers_{s}_{t}': v + .01*noise.standard_normal(12) for s, values in memory.items() for t, v in zip(('m1', 'm2'), values)}
    if config.start == 'timm': found |= {'ratio_encoder.1.conv_in.conv': np.float32([.8, .2]), 'ratio_decoder.0.up.conv': np.float32([[.6, .2], [.4, .8]])}
    stages = ('adaption', 'fine_tuning')[config.start != 'timm':]
    facts = {f'{s}_{k}': v for s in stages for k, v in dict(steps=40, epochs=10., val=.6, stopped='max_steps').items()} | dict(mean_dice=float(dice.mean()))
    manifest = dict(git=dict(commit='a'*40, dirty=False), started='2026-11-22T00:00', seed=config.seed, threads=2, versions={}, hardware=dict(gpu=None, cpu='x', cores=2, memory_gb=8), wall_s=1., peak_memory_mb=1)
    return SimpleNamespace(config=config, predictions=lambda: found, metrics=facts | metrics, history=[dict(iteration=20, train_loss=.5, valid_loss=.5)], manifest=manifest, code_changed=False, published=False)


def records(scale=STUDY, item='tab2_transfer', seeds=(), **options): return [record(c, **options) for c in item_runs(item, scale, seeds)]

def gathered(scale=STUDY, item='tab2_transfer', study=(), **options): return R.Gathered(item, scale, Runs(records(scale, item, **options)), list(study))


@pytest.fixture(scope='module')
def study(): return records()


def test_a_difference_by_hand(study):
    found = {f.statement.about: f for f in R.find(R.patients_frame(study), R.transfer_statements(), STUDY)}
    for other, name in (('none', 'No transfer'), ('all 1:14', 'All HCP, all labels')):
        f = found[f'8%: T-IMM minus {name}']
        def dice(start): return np.array([r.predictions()['dice'] for r in study if (r.config.start, r.config.portion, r.config.protocol) == (start, '8%', 'paper')])
        d = dice('timm') - dice(other)
        assert d.shape == (3, 14) and f.difference.estimate == pytest.approx(d.mean()) and f.difference.n_seeds == 3 and f.difference.n_patients == 14
        assert f.tests.p['t-test'] == pytest.approx(stats.ttest_1samp(d.mean(0), 0).pvalue)
        assert f.claim.verdict == 'same direction' and f.claim.mechanism_only


def test_the_benefit_of_small_sets_is_a_difference_of_differences(study):
    found = R.find(R.patients_frame(study), R.transfer_statements(), STUDY)
    f = next(f for f in found if f.statement.less)
    def gain(p): return np.mean([r.predictions()['dice'].mean()*{'timm': 1, 'none': -1}[r.config.start] for r in study
                                 if r.config.start in ('timm', 'none') and r.config.protocol == 'paper' and r.config.portion == p])*2
    assert f.difference.estimate == pytest.approx(gain('4%') - gain('8%')) and f.statement.published.value == pytest.approx(.18)


def test_every_printed_mean_stands_in_the_table(study):
    table = R.transfer_table(gathered())
    rows = published('timm').query("item == 'brats'")
    shown = [v for p in ('4%', '8%', '100%') for v in table.loc[(p, 'published')] if v != '–']
    assert len(rows) == 18 and sorted(map(float, shown)) == sorted(rows.value.astype(float))
    assert table.loc[('100%', 'study, matched'), 'All HCP, all labels'] == '–'
    dice = [r.metrics['mean_dice'] for r in study if (r.config.start, r.config.portion, r.config.protocol) == ('imm', '4%', 'matched')]
    assert table.loc[('4%', 'study, matched'), 'IMM'] == f'{np.mean(dice):.3f} ± {np.std(dice, ddof=1):.3f}'


def test_p_values_are_adjusted_over_the_table(study):
    found = R.find(R.patients_frame(study), R.transfer_statements(), STUDY)
    p = [f.tests.p['t-test'] for f in found]
    assert np.allclose([f.adjusted for f in found], stats.false_discovery_control(p))


def test_one_seed_decides_nothing():
    found = R.find(R.patients_frame(records(seeds=(0,))), R.transfer_statements(), STUDY)
    assert {f.claim.verdict for f in found} == {'undecided'} and all(f.difference.n_seeds == 1 for f in found)


def test_what_was_not_run_is_said():
    some = [r for r in records(DEMO) if r.config.portion == '4%' and r.config.start != 'm1']
    found = {f.statement.about: f for f in R.find(R.patients_frame(some), R.transfer_statements('matched'), DEMO)}
    assert found['4%: T-IMM minus Model 1 (matched)'].claim.verdict == 'not run' == found['8%: T-IMM minus IMM (matched)'].claim.verdict
    assert found['4%: T-IMM minus No transfer (matched)'].claim.verdict == 'same direction'
    table = R.findings_table(list(found.values()))
    assert 'not run' in table.loc['4%: T-IMM minus Model 1 (matched)', 'ours [95%]'] and 'published p' not in table
    assert {f.claim.verdict for f in R.find(R.patients_frame(()), R.transfer_statements(), DEMO)} == {'not run'}


def test_seeds_that_only_one_start_has_are_left_out(study):
    some = [r for r in study if not (r.config.start == 'none' and r.config.seed == 2)]
    f = R.find(R.patients_frame(some), R.transfer_statements(), STUDY)[0]
    assert f.difference.n_seeds == 2


def test_a_missing_score_is_an_error(study):
    table = R.patients_frame(study)
    one = (table.start == 'none') & (table.portion == '4%') & (table.protocol == 'paper') & (table.seed == 1) & (table.patient == 3)
    for broken in (table[~one], table.assign(dice=table.dice.mask(one))):
        with pytest.raises(ValueError, match='T-IMM minus No transfer: 1 scores'): R.find(broken, R.transfer_statements(), STUDY)


def test_opposite_effects_are_called_so():
    table = R.patients_frame(records(lift=LIFT | {'timm': -.05}))
    assert {f.claim.verdict for f in R.find(table, R.transfer_statements(), STUDY) if f.statement.a == 'timm' and not f.statement.less} == {'opposite'}


def test_what_is_remembered():
    g = gathered(item='tab4_retention')
    found = {f.statement.about: f for f in g.find_memory()}
    for about, f in found.items(): assert (f.claim.verdict, f.difference.n_seeds) == (('same direction', 3) if 'T-IMM' in about else ('undecided', 1)), about
    assert found['labels 1:7 remembered: Model 2 minus Model 1'].statement.published.value == pytest.approx(-.88)
    f = found['labels 1:7 remembered: T-IMM minus IMM']
    assert f.difference.estimate == pytest.approx(.12, abs=.01) and f.statement.published.value == pytest.approx(.12)
    table = R.memory_table(g)
    assert [table.loc[('T-IMM', 'published'), c] for c in table] == ['0.50', '0.39'] and len(table.loc['T-IMM']) == 4 and len(table.loc['IMM']) == 2
    assert float(table.loc[('Model 1', 'study'), 'labels 8:14']) == pytest.approx(0, abs=.01)
    ours = table.drop(index='published', level=1)
    assert {s: ours.loc[s].map(lambda cell: '±' in cell).to_numpy().any() for s in ('Model 1', 'Model 2', 'IMM', 'T-IMM')} == {'Model 1': False, 'Model 2': False, 'IMM': False, 'T-IMM': True}


def test_stages():
    table = R.stages_table(gathered(item='tab3_stages'))
    assert table.loc[('4%', 'published'), 'Fine-tuning: epochs'] == '88' and table.loc[('100%', 'published'), 'Adaption: val-score'] == '0.67'
    assert list(table.loc[('8%', 'study, matched')]) == ['10', '40', '0.60', '0 of 3']*2


def test_the_dot_is_the_best_of_fine_tuning():
    history = [dict(iteration=i, train_loss=1., valid_loss=l, valid_metric=-l, phase=p) for i, l, p in ((20, .1, 'adaption'), (40, .3, 'fine_tuning'), (60, .2, 'fine_tuning'))]
    run = SimpleNamespace(config=make_run(DEMO, 'timm', '4%'), history=history)
    curves = R.curves_frame([run])
    assert curves.valid_metric.isna().tolist() == [True, False, False] and curves.loc[curves.valid_metric.idxmax(), 'iteration'] == 60


def test_training_lengths_and_what_was_left_out():
    runs = [record(c, left_out='x', fine_tuning_stopped='converged' if c.seed else 'max_steps') if c.start != 'none' else record(c) for c in item_runs('tab2_transfer', STUDY)]
    table = R.training_table(R.Gathered('tab2_transfer', STUDY, Runs(runs), []))
    assert list(table.loc[('study, paper', 'T-IMM')]) == ['2 of 3, 80 steps']*3 + ['x'] and list(table.loc[('study, matched', 'No transfer')]) == ['0 of 3, 40 steps']*3 + ['–']
    assert table.loc[('study, paper', 'All HCP, all labels'), '4%'] == '–'


def test_the_choice_of_patients_is_shown_once():
    facts = dict(cases_there=285, cases_chosen=255, choice_seed=0, cases_left_out='3, 9')
    g = R.Gathered('tab2_transfer', PAPER, Runs([record(c, **facts) for c in item_runs('tab2_transfer', PAPER)]), [])
    assert R.choice_table(g).to_dict('records') == [{'data set': 'brats', 'cases there': 285, 'cases chosen': 255, 'choice seed': 0, 'cases left out': '3, 9'}]
    assert R.choice_table(gathered(DEMO)).empty


def test_gains_are_paired_by_seed(study):
    some = [r for r in study if not (r.config.start == 'none' and r.config.seed == 2)]
    gains = R.gains_frame(R.patients_frame(some)).query("portion == '4%' and start == 'none'")
    dice = {(r.config.start, r.config.seed): r.predictions()['dice'] for r in some if (r.config.portion, r.config.protocol) == ('4%', 'paper')}
    assert gains.gain.mean() == pytest.approx(np.mean([dice['timm', s] - dice['none', s] for s in (0, 1)]))


def test_gains_are_sorted_by_the_score_of_timm(study):
    gains = R.gains_frame(R.patients_frame(study))
    assert len(gains) == 3*4*14
    mean = {s: np.mean([r.predictions()['dice'] for r in study if (r.config.start, r.config.portion, r.config.protocol) == (s, '4%', 'paper')], 0) for s in ('timm', 'imm')}
    order = np.argsort(mean['timm'])
    mine = gains.query("portion == '4%' and start == 'imm'")
    assert np.allclose(mine.gain, (mean['timm'] - mean['imm'])[order]) and np.allclose(mine.timm, np.sort(mean['timm']))
    assert len(R.plot_gains(gains).axes) == 3


def test_ratios_of_channels_are_averaged(study):
    ratios = R.ratios_frame(study)
    assert list(ratios.drop_duplicates('layer').unit) == ['encoder.1.conv_in.conv', 'decoder.0.up.conv']
    assert np.allclose(ratios[ratios.source == 'm2'].groupby('unit').ratio.mean()[['encoder.1.conv_in.conv', 'decoder.0.up.conv']], [.2, .6])
    assert len(R.plot_layer_ratios(ratios).axes) == 3


def test_agreement_of_ratios_is_per_portion():
    profiles = {('4%', 0): [.1, .2, .4], ('4%', 1): [.2, .3, .5], ('4%', 2): [.4, .2, .1], ('8%', 0): [.6, .7, .9]}
    rows = [dict(portion=p, protocol='paper', seed=s, layer=i, unit=str(i), source=k, ratio=r if k == 'm2' else 1 - r) for (p, s), v in profiles.items() for i, r in enumerate(v) for k in ('m1', 'm2')]
    table = R.ratios_table(pd.DataFrame(rows))
    by_hand = np.mean([np.corrcoef(profiles['4%', a], profiles['4%', b])[0, 1] for a, b in ((0, 1), (0, 2), (1, 2))])
    assert table.correlation['4%'] == pytest.approx(by_hand, abs=1e-3) and np.isnan(table.correlation['8%'])
    assert list(table.loc['4%', ['smallest', 'median', 'largest', 'seeds']]) == [.1, .2, .5, 3] and table['median']['8%'] == .7


def test_layers_stand_in_the_order_of_the_network():
    from medxfer_nb.models.unet3d import shared_parameters, unet3d
    names = list(dict.fromkeys(k.rpartition('.')[0] for k in shared_parameters(unet3d(2, 7, base=1))))
    rng = np.random.default_rng(0)
    assert sorted(rng.permutation(names), key=R._depth) == names


def test_paper_scale_compares_values():
    rows = published('timm').query("item == 'brats'")
    means = {(r.portion, r.method): float(r.value) for r in rows.itertuples()}
    def exact(config): return record(config, lift=LIFT | {config.start: means[config.portion, R.METHODS.get(config.start, config.start)] - .5}, patients=np.full(40, .5))
    g = R.Gathered('tab2_transfer', PAPER, Runs([exact(c) for c in item_runs('tab2_transfer', PAPER)]), [])
    claims = R.value_claims(g)
    assert len(claims) == 18 and all(c.verdict in ('reproduced', 'within tolerance') for c in claims)
    assert R.value_claims(gathered(DEMO)) == []


def test_scores_of_the_leaderboard_join_by_patient(tmp_path, monkeypatch):
    run = make_run(PAPER, 'timm', '100%')
    cases = [SimpleNamespace(name=f'BraTS {i}', subject=s) for i, s in enumerate(('B', 'A'))]
    monkeypatch.setattr(R, 'online_cases', lambda config, root: cases)
    empty = SimpleNamespace(config=run, predictions=lambda: {'ratio_x': np.ones(2)})
    assert R.patients_frame([empty], tmp_path).empty
    folder = R.submission_folder(run, tmp_path)
    folder.mkdir(parents=True)
    (folder/'scores.csv').write_text('Label,Dice_ET,Dice_WT,Dice_TC\nA,0.1,0.2,0.3\nB,0.4,0.5,0.9\nMean,0.2,0.3,0.4\n')
    table = R.patients_frame([empty], tmp_path)
    assert np.allclose(table.dice, [.6, .2]) and list(table.patient) == [0, 1] and 'A' not in table.to_string()


def test_gathering_puts_committed_results_beside(monkeypatch, tmp_path):
    from medxfer_nb.repro import results
    monkeypatch.setattr(results, 'published_run', record)
    monkeypatch.setattr(results, 'load_or_run', lambda configs, store, **_: Runs([record(c) for c in configs]))
    g = R.gather('tab2_transfer', 'demo', store=str(tmp_path))
    assert [t.name for t in g.tiers] == ['demo', 'study (committed)'] and 'mechanisms' in g.tiers[0].footnote
    assert {i for _, i in R.transfer_table(g).index} == {'published', 'demo, matched', 'study (committed), paper', 'study (committed), matched'}
    table = R.findings_table(g.find('matched'), g.find_study('matched'))
    assert table.loc['100%: T-IMM minus IMM (matched)', 'ours [95%]'] == 'not run' != table.loc['100%: T-IMM minus IMM (matched)', 'study [95%]']
    assert R.regions_table(R.patients_frame(g.records)).loc[('8%', 'T-IMM')].is_monotonic_increasing
