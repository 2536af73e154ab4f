"""Results of a comparison: scores within folds, patients and their cases, what does not fit together, the way to the disk and back."""
import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from compare_fakes import fake_results
from medxfer_nb.compare.results import CURVES, Results, ResultsError, by_patient, fold_auc, load_results, per_patient, repeat_scores


@pytest.mark.parametrize('seed', range(5))
def test_fold_auc_is_the_share_of_pairs_in_the_right_order(seed):
    rng = np.random.default_rng(seed)
    y, p, folds = rng.choice([0., 1, np.nan], (60, 3), p=[.5, .4, .1]), rng.integers(0, 8, (60, 3))/7, rng.integers(-1, 4, 60)
    y[folds == 1, 2] = 1  # A fold without negatives
    for c, found in enumerate(fold_auc(y, p, folds)):
        pairs = [np.sign(p[i, c] - p[j, c])/2 + .5 for i, j in product(range(60), repeat=2) if folds[i] == folds[j] >= 0 and y[i, c] == 1 and y[j, c] == 0]
        assert found == pytest.approx(np.mean(pairs), abs=1e-12)


def test_one_fold_is_the_ordinary_auc():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, (50, 1)).astype(float), rng.random((50, 1))
    assert fold_auc(y, p, np.zeros(50, int))[0] == pytest.approx(roc_auc_score(y[:, 0], p[:, 0]))


def test_a_shift_of_one_network_changes_nothing():
    results = fake_results(effects={'full@a': .1})
    before = repeat_scores(results, 'full@a')
    p = results.outputs['full@a']
    p[results.folds == 2] = p[results.folds == 2]*.1  # The network of a fold is less sure, in the same order
    np.testing.assert_allclose(repeat_scores(results, 'full@a'), before)
    assert abs(roc_auc_score(results.targets[:, 0], p[0, :, 0]) - before[0]) > .02


def test_a_given_split_scores_those_who_were_tested():
    results, tested = fake_results('segmentation', folds=1, cases_per_patient=2), np.arange(80) < 30
    for values in [results.folds, *results.scores['scratch'].values()]: values[:, ~tested] = -1 if values is results.folds else np.nan
    for s, score in enumerate(repeat_scores(results, 'scratch')):
        frame = pd.Series(results.scores['scratch']['dice'][s][tested]).groupby(results.patients[tested]).mean()
        assert score == pytest.approx(frame.mean())


def test_cases_of_a_patient_count_once():
    values, patients = np.array([[1., 3, 5, np.nan], [np.nan, 2, np.nan, np.nan]]), np.array([7, 7, 2, 9])
    frame = pd.DataFrame(values.T).groupby(patients).mean().T  # pandas skips NaN too
    np.testing.assert_array_equal(by_patient(values, patients), frame.to_numpy())


@pytest.mark.parametrize('task', ['classification', 'segmentation'])
def test_save_and_load(tmp_path, task):
    results = replace(fake_results(task, cases_per_patient=2, portions=(.5, 1.), arms=('scratch', 'timm@a+b'), failures=['x: y'], left_out={'IMM': 'why'}), examples={4: np.arange(6, dtype=np.uint8).reshape(2, 3)})
    again = load_results(results.save(tmp_path/'deep'/'down'))
    for name in ('task', 'metric', 'labels', 'exclusive', 'arms', 'titles', 'seeds', 'failures', 'left_out', 'provenance'): assert getattr(again, name) == getattr(results, name)
    for name in ('costs', 'curves', 'notes', 'ratios'): pd.testing.assert_frame_equal(getattr(again, name), getattr(results, name), check_index_type=False, check_column_type=False)
    for arm in results.arms:
        for name, values in results.scores[arm].items(): np.testing.assert_array_equal(again.scores[arm][name], values)
        if task == 'classification': np.testing.assert_array_equal(again.outputs[arm], results.outputs[arm])
    np.testing.assert_array_equal(again.examples[4], results.examples[4])
    np.testing.assert_array_equal(repeat_scores(again, 'scratch'), repeat_scores(results, 'scratch'))


def test_what_is_damaged_or_missing(tmp_path):
    results = fake_results(n_patients=10, seeds=2, folds=2)
    folder = results.save(tmp_path/'results')
    (folder/'results.npz').write_bytes((folder/'results.npz').read_bytes()[:100])
    for where in (folder, tmp_path/'nowhere'):
        with pytest.raises(ResultsError, match='run the comparison again'): load_results(where)


@pytest.mark.parametrize('change, message', [
    (dict(metric='dice'), 'not judged by'), (dict(folds=np.zeros((3, 39), int)), '40 cases'), (dict(seeds=(1, 2)), '2 seeds for 3 repeats'),
    (dict(targets=np.zeros((40, 2))), 'targets are'), (dict(arms=('scratch', 'other')), 'other has no scores'), (dict(scores={a: dict(log_loss=np.zeros(40)) for a in ('scratch', 'full@a', 'l2sp@a')}), 'log_loss of scratch')])
def test_what_does_not_fit(change, message):
    with pytest.raises(ResultsError, match=message): replace(fake_results(), **change)


def test_fakes_do_what_they_say():
    big = fake_results(n_patients=4000, effects={'full@a': .1}, seed_sd=0., folds=1)
    assert repeat_scores(big, 'scratch') == pytest.approx([.75]*3, abs=.02) and repeat_scores(big, 'full@a') == pytest.approx([.85]*3, abs=.02)
    p, y = big.outputs['full@a'].ravel(), np.tile(big.targets, (3, 1, 1)).ravel()
    for low in np.arange(0, 1, .2): assert y[(p >= low) & (p < low + .2)].mean() == pytest.approx(p[(p >= low) & (p < low + .2)].mean(), abs=.06)  # Calibrated
    dice = fake_results('segmentation', n_patients=400, effects={'full@a': .05}, patient_sd=.08)
    a, b = (per_patient(dice, arm, 'dice') for arm in ('full@a', 'scratch'))
    assert (a - b).mean() == pytest.approx(.05, abs=.02) and spearmanr(a[0], b[0]).statistic > .7
    assert list(fake_results(portions=(.5, 1.)).curves) == list(CURVES)


def test_nothing_stored_but_numbers_and_names(tmp_path):
    folder = fake_results(n_patients=10, seeds=2, folds=2).save(tmp_path)
    plain = json.loads((folder/'results.json').read_text())
    assert set(plain) <= {f for f in Results.__dataclass_fields__}
    with np.load(folder/'results.npz', allow_pickle=False) as arrays: assert all(a.dtype.kind in 'fiu' for a in arrays.values())
