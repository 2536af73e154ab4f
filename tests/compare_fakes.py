"""Results of comparisons that never happened, with known effects and known spread: for tests of what judges and reports them."""
import numpy as np, pandas as pd
from scipy.special import expit, logit
from scipy.stats import norm

from medxfer_nb.compare.results import COSTS, CURVES, NOTES, RATIOS, Results, repeat_scores

ARMS = ('scratch', 'full@a', 'l2sp@a')

def _folds(patients, seeds, k, rng):
    "(S, V) another deal of the patients to k folds in every repeat"
    n = patients.max() + 1
    return np.stack([(rng.permutation(n) % k)[patients] for _ in range(seeds)]) if k > 1 else np.zeros((seeds, len(patients)), int)

def _segmentation(patients, arms, effects, base, sds, seeds, rng):
    "Dice = base + effect + patient + seed of the arm + arm x patient + residual, per patient; cases share it"
    n, scores = patients.max() + 1, {}
    of_patient, ml = rng.normal(0, sds['patient'], n), rng.lognormal(3, .6, len(patients))
    for arm in arms:
        mean = base + effects[arm] + of_patient + rng.normal(0, sds['interaction'], n)
        dice = (mean + rng.normal(0, sds['seed'], (seeds, 1)) + rng.normal(0, sds['noise'], (seeds, n)))[:, patients].clip(0, 1)
        predicted = ml*np.exp(rng.normal(0, .2, dice.shape)*(1.2 - dice))
        hd95 = np.where(dice > 0, 40*(1 - dice), np.nan)
        scores[arm] = dict(dice=dice, dice_lesion=dice, hd95=hd95, ml=np.broadcast_to(ml, dice.shape).copy(), predicted_ml=predicted)
    return None, {}, scores

def _classification(patients, arms, effects, base, sds, seeds, labels, exclusive, prevalence, rng):
    "Calibrated binormal scores: AUC = base + effect + seed of the arm; the patient's part of the latent score is shared by all arms"
    V, C = len(patients), len(labels)
    if exclusive and C > 1: targets = np.eye(C)[rng.permutation(patients.max() + 1) % C][patients]
    else: # The stated share of patients, at least two of each class
        n = patients.max() + 1
        targets = np.stack([(rng.permutation(n) < np.clip(round(prevalence*n), 2, n - 2)) for _ in labels], 1)[patients].astype(float)
    shared, outputs, scores = rng.normal(size=(V, C)), {}, {}
    for arm in arms:
        reach = (base + effects[arm] + rng.normal(0, sds['seed'], (seeds, 1, 1))).clip(.02, .98)
        d, part = 2**.5*norm.ppf(reach), sds['shared']
        own = rng.normal(size=(V, C))*sds['own']**.5 + rng.normal(size=(seeds, V, C))*(1 - sds['own'])**.5 # Of the arm; of each training
        x = d*targets + part**.5*shared + (1 - part)**.5*own
        p = expit(d*x - d**2/2 + logit(targets.mean(0))).clip(1e-6, 1 - 1e-6)
        if exclusive and C > 1: p = p/p.sum(-1, keepdims=True)
        outputs[arm] = p
        log_loss = -np.log(np.where(targets == 1, p, 1 - p)).mean(-1)
        scores[arm] = dict(log_loss=log_loss, brier=((p - targets)**2).mean(-1))
    return targets, outputs, scores

def _costs(arms):
    rows = [[60. + 10*i, 900., .02, 4e6, 1e3 if arm.startswith('linear') else 4e6, 12] for i, arm in enumerate(arms)]
    return pd.DataFrame(rows, list(arms), COSTS).astype(dict(parameters=int, trained_parameters=int, runs=int))

def _curves(results, gains, portions, rng):
    "Scores fall off with less data; the gain of an arm over the first shrinks or grows as `gains[arm]` says per portion"
    rows, n = [], results.n_patients
    for arm in results.arms:
        full = repeat_scores(results, arm)
        for j, portion in enumerate(portions):
            drop = .08*np.log2(1/portion) - gains.get(arm, [0.]*len(portions))[j]
            rows += [[arm, portion, int(round(portion*n*.75)), s, float(v)] for s, v in zip(results.seeds, full - drop + rng.normal(0, .005, len(full))*(portion < 1))]
    return pd.DataFrame(rows, columns=CURVES)

def fake_results(
    task='classification',     # or 'segmentation'
    n_patients=40,
    arms=ARMS,
    effects=None,              # Arm -> what it adds to `base`, in AUC or Dice; missing: 0
    seed_sd=.01,               # Of the score of an arm, between repeats
    patient_sd=.1,             # Dice, between patients, the same for all arms
    seeds=3,                   # Repeats
    folds=4,                   # Per repeat; 1: a given test set
    base=.75,                  # Score of an arm without effect
    noise_sd=.03,              # Dice: residual of arm x repeat x patient
    interaction_sd=0.,         # Dice: how patients differ in what an arm does for them, beyond its effect
    shared=.6,                 # Classification: share of the latent variance that all arms have in common (the patient)
    own=0.,                    # Classification: share of the rest that belongs to arm and patient, not to the single training
    labels=None,               # Default ('finding',) or ('lesion',)
    exclusive=False,
    prevalence=.4,
    cases_per_patient=1,
    portions=(),               # Of the training patients: fills `curves`
    gains=None,                # Arm -> what it adds to the score at each of `portions`
    failures=(), left_out=None,
    seed=0,                    # Of everything random
) -> Results:
    "Results with effects and spread as told."
    rng = np.random.default_rng(seed)
    effects = {arm: (effects or {}).get(arm, 0.) for arm in arms}
    patients = np.repeat(np.arange(n_patients), cases_per_patient)
    labels = tuple(labels or (('finding',) if task == 'classification' else ('lesion',)))
    sds = dict(seed=seed_sd, patient=patient_sd, noise=noise_sd, interaction=interaction_sd, shared=shared, own=own)
    where = _folds(patients, seeds, folds, rng)
    if task == 'segmentation': targets, outputs, scores = _segmentation(patients, arms, effects, base, sds, seeds, rng)
    else: targets, outputs, scores = _classification(patients, arms, effects, base, sds, seeds, labels, exclusive, prevalence, rng)
    notes = pd.DataFrame([[arm, s, f, 'lr 0.001', base] for arm in arms for s in range(seeds) for f in range(folds)], columns=NOTES)
    merged = [arm for arm in arms if '+' in arm]
    ratios = pd.DataFrame([[arm, s, f, f'layer {u}', source, r] for arm in merged for s in range(seeds) for f in range(folds) for u in range(4)
                           for source, r in zip(arm.split('@')[1].split('+'), rng.dirichlet([4, 4]))], columns=RATIOS)
    results = Results(task=task, metric='auc' if task == 'classification' else 'dice', labels=labels, exclusive=exclusive, arms=tuple(arms),
        titles={arm: arm.replace('@', ' of ') for arm in arms}, patients=patients, targets=targets, folds=where, outputs=outputs, scores=scores,
        costs=_costs(arms), notes=notes, ratios=ratios, failures=list(failures), left_out=dict(left_out or {}),
        provenance=dict(commit='0'*40, dirty=False, versions=dict(python='3.11'), hardware=dict(cpu='none', cores=2, gpu=None), date='2026-01-01',
                        design=f'{len(arms)} arms x {seeds} repeats x {folds} folds', data='0'*16))
    if portions: object.__setattr__(results, 'curves', _curves(results, gains or {}, portions, rng))
    return results
