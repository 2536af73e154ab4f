"Results against SciPy, statsmodels and hand computation, on made-up records."
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score
from statsmodels.stats.multitest import multipletests

from medxfer_nb.data.cases import OBSERVATIONS, Cases
from medxfer_nb.data.splits import draw_subset
from medxfer_nb.repro import results as R
from medxfer_nb.repro.colorization import read_films, score
from medxfer_nb.repro.jobs import Runs
from medxfer_nb.repro.scales import SCALES, item_runs, make_run
from medxfer_nb.repro.store import PublishedRecord, pack_array
from medxfer_nb.repro.targets import published
from test_data_xray import line, write_chexpert

STUDY, PAPER = SCALES['study'], SCALES['paper']

def record(config, quality=.8, films=150, missing=(), rate=.4):
    "A run whose scores know the labels to a degree; `missing` observations have no positives."
    targets = (np.random.default_rng(1).random((films, 5)) < rate).astype(np.float32)
    targets[:, list(missing)] = 0
    rng = np.random.default_rng([config.seed, config.draw, len(config.strategy), len(config.module), config.steps])
    arrays = dict(scores=(quality*targets + rng.normal(size=targets.shape)).astype(np.float32), targets=targets,
                  patients=np.arange(films)//2, studies=np.arange(films)//2)
    metrics = score(SimpleNamespace(targets=targets, labels=OBSERVATIONS, study_codes=arrays['studies']), arrays['scores'])
    manifest = dict(config_key=config.config_key, metrics=dict(sorted(metrics.items())), predictions={k: k for k in arrays}, seed=config.seed,
        history=[dict(iteration=10*i, train_loss=1., valid_loss=1., valid_metric=.5 + .01*i) for i in range(1, 5)],
        git=dict(commit='abcdef0123', dirty=True), started='2020-02-02T00:00:00+00:00', wall_s=30., peak_memory_mb=100, threads=2,
        code=dict(module='medxfer_nb.gone', hash=''), versions=dict(python='3.11'), hardware=dict(cpu='CPU', cores=2, memory_gb=4, gpu=None))
    return PublishedRecord(manifest, config, arrays={k: pack_array(v) for k, v in arrays.items()})

def runs(strategy, module='none', seeds=3, scale=STUDY, quality=.8, changes={}, **options):
    return [record(make_run(scale, strategy, module, seed=s, **changes), quality, **options) for s in range(seeds)]

@pytest.fixture(scope='module')
def pair(): return runs('color_module', 'pixelshuffle', quality=1.1), runs('baseline', quality=.6)

def by_hand(records, column=None):
    def auc(p, c): return roc_auc_score(p['targets'][:, c], p['scores'][:, c])
    return np.array([np.mean([auc(r.predictions(), c) for c in (range(5) if column is None else [column])]) for r in records])

@pytest.mark.parametrize('column', [None, 3])
def test_contrast_by_hand(pair, column):
    a, b = (by_hand(p, column) for p in pair)
    c = R.contrast(*pair, None if column is None else OBSERVATIONS[column])
    np.testing.assert_allclose([c.auc_a, c.auc_b], [a, b])
    assert c.estimate == pytest.approx((a - b).mean()) and c.interval[0] < c.estimate < c.interval[1]
    assert (c.test.t, c.test.p) == pytest.approx(tuple(stats.ttest_rel(a, b)))
    assert c.floor == c.test.guard.floor == .25 and c.n_patients == 75 and c.n_films == 150
    models = c.trained_models()
    assert [m.estimate for m in models.values()] == pytest.approx(list(a - b))
    assert all('these trained models only' in m.covers for m in models.values())

def test_pairs_are_matched_by_seed_and_draw_not_by_order(pair):
    a, b = pair
    shuffled = R.contrast([a[2], a[0], a[1]], b)
    assert shuffled.estimate == R.contrast(a, b).estimate and shuffled.auc_a == R.contrast(a, b).auc_a
    assert R.contrast(a, b[:2]).n == 2 and R.contrast(a[:1], b[1:]).note == 'no seed in common'
    drawn = runs('baseline', seeds=1, changes=dict(n_train=50, draw=1))
    assert R.contrast(a, drawn).note == 'no seed in common'
    with pytest.raises(ValueError, match='share a seed'): R.contrast(a + a[:1], b)
    with pytest.raises(ValueError, match='different test films'): R.contrast(a, runs('baseline', films=100))

def test_what_cannot_be_computed_is_said(pair):
    a, b = pair
    one = R.contrast(a[:1], b[:1])
    assert one.note == '1 seed: no interval' and np.isfinite(one.estimate) and np.isnan(one.interval).all() and one.test is None
    a, b = (runs(s, missing=[3]) for s in ('color_module', 'baseline'))
    assert R.contrast(a, b).note == 'no positives for Edema' and np.isnan(R.contrast(a, b).estimate)
    assert np.isfinite(R.contrast(a, b, 'Atelectasis').estimate)
    assert R.cell(a) == 'undefined: no positives for Edema' and R.cell([]) == 'not run'
    rare = R.contrast(*(runs(s, films=12, rate=.2) for s in ('color_module', 'baseline')))
    assert rare.note and np.isnan(rare.interval).all()
    with pytest.raises(ValueError, match='was not scored'): R.contrast(a, b, 'Oedema')

def test_converged_looks_at_the_last_quarter():
    def run(*auc): return [dict(iteration=100*i, valid_metric=m) for i, m in enumerate(auc, 1)]
    assert R.late_gain(run(.6, .7, .75, .78)) == pytest.approx(.03) and R.converged(run(.6, .7, .75, .78)) is False
    assert R.converged(run(.6, .7, .75, .76)) is True            # exactly 0.01
    assert R.late_gain(run(.6, .8, .75, .7)) == 0                # a fall is no gain
    assert R.converged(run(.6, .7, .8)) is None                  # too few to say
    assert R.converged(run(np.nan, np.nan, np.nan, .7)) is None  # nothing to compare with

def test_matched_is_all_with_half_the_steps():
    for config, name in [(make_run(STUDY, 'all', 'coloru', steps=STUDY.steps//2), 'matched'), (make_run(STUDY, 'all', 'coloru'), 'paper'),
                         (make_run(STUDY, 'baseline', steps=STUDY.steps//2), 'paper')]: assert R.protocol(config) == name
    matched = [c for c in item_runs('tab1_strategies', STUDY) if R.protocol(c) == 'matched']
    assert len(matched) == len(STUDY.modules)*len(STUDY.seeds)
    frame = R.runs_frame([record(matched[0])])
    assert frame.strategy[0] == 'all(matched)' and frame.protocol[0] == 'matched' and frame.n_train[0] == STUDY.n_pool
    g = R.Gathered('tab1_strategies', STUDY, Runs([record(c) for c in matched]), [])
    table = R.result_table(g).reset_index()
    assert (table[table['ours (study)'] != 'not run'].protocol == 'matched').all()

def test_p_values_are_adjusted_over_the_table(pair):
    records = [*pair[0], *pair[1], *runs('baseline_all', quality=1.3), *runs('all', 'pixelshuffle', quality=1.2)]
    rows = R.compare(R.EFFECTS['tab1_strategies'](STUDY), records, STUDY)
    known = [r for r in rows if r.ours]
    assert len(known) == 3 and all(r.claim.verdict == 'not run' for r in rows if not r.ours)
    expected = multipletests([stats.ttest_rel(r.ours.auc_a, r.ours.auc_b).pvalue for r in known], method='fdr_bh')[1]
    np.testing.assert_allclose([r.adjusted for r in known], expected)
    first = rows[0].claim
    assert first.verdict == 'same direction' and first.mechanism_only and first.published.value == 5.
    table = R.comparison_table(rows, rows)
    assert table['published p'].iloc[0] == '0.037' and '0.25 (3 seeds)' in table['exact floor'].iloc[0] and len(table) == len(rows)

def test_what_only_the_study_ran_is_in_the_table():
    effects = {scale: R.EFFECTS['fig6_data_size'](SCALES[scale]) for scale in ('demo', 'study')}
    n = STUDY.sizes[0]
    records = [r for s, q in [('baseline', .5), ('baseline_all', 1.2)] for r in runs(s, quality=q, changes=dict(n_train=n))]
    table = R.comparison_table(R.compare(effects['demo'], [], SCALES['demo']), R.compare(effects['study'], records, STUDY))
    assert len(table) == len(set(effects['demo'] + effects['study'])) and (table['a - b [95%]'] == 'not run').all()
    row = table.loc[f'Baseline All minus Baseline (CheXpert, ResNet18, {n} films)']
    assert row.verdict == 'not run (demo)' and row['study verdict'].startswith('same direction (study)')

def test_one_seed_decides_nothing(pair, tmp_path):
    rows = R.compare(R.EFFECTS['tab1_strategies'](STUDY), pair[0][:1] + pair[1][:1], STUDY)
    assert rows[0].claim.verdict == 'undecided' and '1 seed' in R.findings(rows)
    kept = json.loads(R.save_claims(R.claims_of(rows), tmp_path/'tab1').read_text())
    assert set(kept[0]) == {'about', 'ours', 'published', 'verdict', 'scale', 'words'} and kept[0]['scale'] == 'study' and (tmp_path/'tab1.claims.json').exists()
    assert kept[0]['published'] == '+5.0 (Table I)' and kept[1]['ours'] == '' and 'inf' not in json.dumps(kept)

@pytest.fixture
def quick(monkeypatch): monkeypatch.setattr(R, 'REPLICATES', 200)   # clear effects need no finer bootstrap

def verdicts(records, scale):
    "Of the effects of Table I that these runs can show"
    return [r.claim.verdict for r in R.compare(R.EFFECTS['tab1_strategies'](scale), records, scale) if r.ours]

@pytest.mark.parametrize('qualities, word', [((1.3, .5), 'opposite'), ((.5, 1.3), 'same direction')])
def test_a_small_effect_of_the_wrong_sign_is_no_success_at_paper_scale(quick, qualities, word):
    base, colour = qualities
    records = runs('baseline', scale=PAPER, quality=base, films=400) + runs('color_module', 'pixelshuffle', scale=PAPER, quality=colour, films=400)
    assert verdicts(records, PAPER) == [word]

@pytest.mark.parametrize('scale', [STUDY, PAPER])
@pytest.mark.parametrize('quality, word', [(.9, 'no difference shown, as published'), (.2, 'differs: the paper found no difference'), (3., 'differs: the paper found no difference')])
def test_what_the_paper_calls_not_significant_is_no_direction(quick, scale, quality, word):
    records = runs('baseline_all', scale=scale, quality=.9, films=2_000) + runs('all', 'pixelshuffle', scale=scale, quality=quality, films=2_000)
    assert verdicts(records, scale) == [word]
    few = runs('baseline_all', scale=scale, quality=.9, films=60) + runs('all', 'pixelshuffle', scale=scale, quality=.9, films=60)
    assert verdicts(few, scale) == ['undecided']   # so wide an interval leaves room for an effect
    rows = R.compare(R.EFFECTS['tab1_strategies'](scale), records, scale)
    assert f"1 {R._VERDICTS[word].lower()}" in R.findings(rows) and 'reversed' not in R.findings(rows)

def test_which_differences_the_paper_found():
    def none(item): return [(e.a.strategy, e.b.strategy, e.observation) for e in R.EFFECTS[item](PAPER) if e.no_difference]
    assert [o for *_, o in none('tab2_observations')] == ['Atelectasis', 'Pleural Effusion']   # p = 0.40 and 0.37, level 0.15
    assert none('tab3_datasets') == [('all(T:CheXpert E:ImageNet)', 'all(T:scratch E:ImageNet)', None)]   # 79.4 ± 0.06 and 79.2 ± 0.3, no p-value
    for e in R.EFFECTS['tab1_strategies'](PAPER):
        printed, spread = e.published, e.a.published().sd + e.b.published().sd
        assert e.no_difference == (e.published_p >= .05 if e.p else abs(printed.value) <= spread + 1e-9)

def test_the_very_small_regime_is_judged_where_the_paper_states_it(quick):
    def run(strategy, n, quality, scale=PAPER): return runs(strategy, 'pixelshuffle' if strategy in ('all', 'color_module') else 'none', scale=scale, quality=quality, films=2_000, changes=dict(n_train=n))
    for n, words in [(224, ['outside the stated range']*2), (448, ['no difference shown, as published', 'same direction']), (2_243, ['outside the stated range']*2)]:
        records = run('baseline_all', n, .6) + run('color_module', n, .6) + run('all', n, 1.4) + run('baseline', n, .1)
        rows = R.compare(R.EFFECTS['fig6_data_size'](PAPER), records, PAPER)
        found = {(r.effect.a.strategy, r.effect.b.strategy): r.claim.verdict if r.claim else r.effect.note for r in rows if r.ours}
        assert [found[s, 'baseline_all'] for s in ('color_module', 'all')] == words
        assert found['all', 'baseline'] == 'same direction'   # 'regardless of the dataset size'
    assert not [e for e in R.EFFECTS['fig6_data_size'](STUDY) if e.b.strategy == 'baseline_all' and not e.note]
    assert (R.comparison_table(rows).verdict == 'outside the stated range').sum() == 2*4

def test_runs_that_two_items_need_are_committed_once(quick, monkeypatch):
    monkeypatch.setattr(R, 'published_run', record)
    records = R.committed('controls', 'tab1_strategies')
    assert len({r.config for r in records}) == len(records) < len(R.committed('controls')) + len(R.committed('tab1_strategies'))
    assert all(r.ours.n == len(STUDY.seeds) for r in R.compare(R.EFFECTS['controls'](STUDY), records, STUDY))

def test_the_floor_stands_beside_our_p_value(quick):
    rows = R.compare(R.EFFECTS['tab2_observations'](STUDY), runs('all', 'pixelshuffle') + runs('baseline_all'), STUDY)
    table = R.judged(rows)
    assert set(table['exact floor']) == {'0.25 (3 seeds)'} and list(table).index('exact floor') == list(table).index('ours p adjusted') + 1
    assert set(R.judged(R.compare(R.EFFECTS['tab2_observations'](STUDY), [], STUDY))['exact floor']) == {'–'}

def test_signs_without_numbers_are_judged_by_sign():
    arms = dict(baseline=.5, baseline_all=.9)
    n = PAPER.sizes[0]
    records = [r for s, q in arms.items() for r in runs(s, scale=PAPER, quality=q, films=400, changes=dict(n_train=n))]
    rows = [r for r in R.compare(R.EFFECTS['fig6_data_size'](PAPER), records, PAPER) if r.ours]
    assert [r.claim.words for r in rows] == ['same direction (paper)'] and np.isnan(rows[0].claim.published.value)
    unreadable = next(e for e in R.EFFECTS['tab2_observations'](PAPER) if e.observation == 'Pleural Effusion')
    assert unreadable.said == 'no difference, no number' and R.claim_of(unreadable, None, PAPER).verdict == 'not run' and unreadable.published_p == .37
    affine = R.EFFECTS['controls'](PAPER)[0]
    assert affine.said == 'no number' and R.claim_of(affine, None, PAPER) is None

def test_paper_scale_compares_values():
    records = runs('baseline', scale=PAPER, seeds=2)
    claims = R.value_claims(R.Gathered('tab1_strategies', PAPER, Runs(records), []))
    assert len(claims) == 16 and {c.verdict for c in claims} == {'not run', 'deviates'}
    assert claims[0].estimate == pytest.approx(100*by_hand(records).mean()) and claims[0].published.value == 78.4

def test_every_published_mean_has_its_row():
    for item, dataset in [('tab1_strategies', 'CheXpert'), ('tab3_datasets', 'ChestX-ray14'), ('tab3_datasets', 'MURA-shoulder')]:
        rows = published('colorization').query('dataset == @dataset and metric == "mean_auc"')
        arms = {(a.strategy, a.module, R.PUBLISHED_BACKBONES[a.slot]) for a in R.table_arms(item, PAPER) if R.PLAYED[a.role] == dataset}
        assert arms == set(zip(rows.strategy, rows.module, rows.backbone))

def test_provenance_names_no_machine_and_no_patient():
    tier = R.Tier('study', STUDY, runs('baseline', seeds=2))
    text = R.provenance([tier]).to_string()
    assert 'abcdef0 + changes' in text and '60 s' in text and '/' not in text
    several = replace(tier, suffix='_study', records=tier.records + [replace(r, manifest=r.manifest | dict(git=dict(commit='1234567890', dirty=False))) for r in tier.records])
    assert 'commit abcdef0 + changes' in replace(tier, suffix='_study').footnote and '2 commits' in several.footnote
    assert 'virtual patients' in tier.footnote and 'virtual' not in replace(tier, scale=PAPER).footnote

def test_gathering_without_committed_results_says_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr(R, 'published_run', lambda config: None)
    monkeypatch.setattr(R, 'load_or_run', lambda configs, store, **_: Runs([record(c) for c in configs]))
    g = R.gather('tab1_strategies', 'demo', seeds=[5], store=str(tmp_path))
    assert {r.config.seed for r in g.records} == {5} and g.study == g.compare_study() == [] and [t.name for t in g.tiers] == ['demo']
    table = R.result_table(g)
    assert set(table['study (committed)']) == {'not run'} and table['ours (demo)'].str.contains('DECONV').sum() == 0
    monkeypatch.setattr(R, 'published_run', lambda config: record(config))
    both = R.gather('tab1_strategies', 'demo', seeds=[5], store=str(tmp_path))
    assert [t.name for t in both.tiers] == ['demo', 'study (committed)'] and 'code changed since' in both.tiers[1].footnote
    assert '3 runs' in R.result_table(both)['study (committed)'].iloc[1]

def test_smallest_subset_is_the_one_that_runs_train_on(monkeypatch):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.choice([-1., 0., 1.], (200, 5), p=[.1, .5, .4]).astype('float32'), columns=OBSERVATIONS)
    frame = frame.assign(patient=[f'p{i}' for i in range(200)], study='s')
    pool = Cases('pool', frame, pixels=np.zeros((200, 8, 8), np.uint8))
    monkeypatch.setattr(R, 'virtual_films', lambda *_: pool)
    whole, part = R.label_counts(STUDY).values()
    chosen = draw_subset(frame[list(OBSERVATIONS)].to_numpy(), n=STUDY.sizes[0], draw=0, seed=0)
    assert part.uncertain.tolist() == (frame[list(OBSERVATIONS)].iloc[chosen] == -1).sum().tolist()
    assert whole.sum(axis=1).eq(200).all() and part.sum(axis=1).eq(STUDY.sizes[0]).all()

def test_label_counts_of_a_real_layout_are_those_of_the_runs(tmp_path):
    rng, values = np.random.default_rng(0), ['1.0', '0.0', '-1.0']
    def labels(): return {o.replace(' ', '_'): rng.choice(values, p=[.4, .5, .1]) for o in OBSERVATIONS}
    write_chexpert(tmp_path, 'train', [line('train', i, **labels()) for i in range(1, 121)])
    write_chexpert(tmp_path, 'valid', [line('valid', 64541, **labels())])
    small = replace(PAPER, sizes=(60,))
    whole, part = R.label_counts(small, str(tmp_path)).values()
    run = make_run(small, 'baseline', n_train=60)
    train, subset = read_films(replace(run, n_train=0), tmp_path)['train'], read_films(run, tmp_path)['train']
    ones = np.isin(OBSERVATIONS, ['Atelectasis', 'Edema', 'Pleural Effusion'])   # the paper's policy, Section IV.A
    for raw, settled in [(whole, train), (part, subset)]:
        np.testing.assert_array_equal(raw.positive + ones*raw.uncertain, settled.counts().positive)
        np.testing.assert_array_equal(raw.negative + ~ones*raw.uncertain, settled.counts().negative)
