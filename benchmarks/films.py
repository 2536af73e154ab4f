"""How fast are virtual films rendered, and how hard are they?

Speed: 1,000 films at 96 px may take three minutes on two cores; measured on a part of them, in processor time, and
beside the bare projection of the unwarped CT.

    python benchmarks/films.py [--films 32] [--size 96]

Difficulty: the AUC of a frozen ImageNet encoder with a logistic head, five folds grouped by patient, on films of the
split `calibrate`, which nothing else uses. This is how the numbers in `COHORTS` were chosen; the notebook of
`medxfer_nb.data.films` shows the result.

    python benchmarks/films.py --calibrate 1000
"""
import sys
import tempfile
import time

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medxfer_nb.data.assets import fetch
from medxfer_nb.data.films import COHORTS, load_anatomy, project, virtual_films
from medxfer_nb.models.colorize import load_backbone
from turns import Race, main

CORES, LIMIT = 2, 180  # 1,000 films at 96 px may take three minutes on two cores


def pooled_features(cases):
    "(N,1280) features of the gray films, copied to three channels"
    encoder = load_backbone('tf_efficientnet_lite0', fetch('efficientnet-lite0')).eval()
    gray = torch.from_numpy(np.array(cases.pixels)).float() / 255
    rgb = ((gray - .5) / .5)[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad(): return torch.cat([encoder(batch) for batch in rgb.split(64)]).numpy()

def frozen_auc(cases):
    "AUC per label: all positives, the severer half of them, the milder half"
    features, rows = pooled_features(cases), {}
    model = make_pipeline(StandardScaler(), LogisticRegression(C=.01, max_iter=500))
    for label, y in zip(cases.labels, cases.targets.T):
        p = cross_val_predict(model, features, y, groups=cases.patient_codes, cv=GroupKFold(5), method='predict_proba')[:, 1]
        severity = cases.frame[f'severity_{label}'].to_numpy()
        severe = severity > np.median(severity[y == 1])
        rows[label] = dict(auc=roc_auc_score(y, p), severe=roc_auc_score(y[(y == 0) | severe], p[(y == 0) | severe]),
                           mild=roc_auc_score(y[~severe], p[~severe]), positive=y.mean())
    return pd.DataFrame(rows).T

def calibrate(n, size=64):
    "Print the difficulty of every cohort"
    for name in COHORTS:
        table = frozen_auc(virtual_films(name, 'calibrate', n, size))
        print(f'{name}: {n:,} films at {size} px, mean AUC {table.auc.mean():.3f}', table.round(3).to_string(), sep='\n', flush=True)

def processor_seconds(work) -> float:
    "Time of all threads together, so that another program beside it does not count."
    start = time.process_time()
    work()
    return time.process_time() - start


def rendering(a) -> Race:
    volume = load_anatomy().hu.permute(0, 2, 1)
    def films():
        with tempfile.TemporaryDirectory() as folder: virtual_films('virtual-chest', 'calibrate', a.films, a.size, cache=folder, progress=lambda line: None)
    def bare():
        for _ in range(a.films): project(volume, 2.8, .3)
    tasks = {'3 minutes for 1,000': lambda: LIMIT*CORES/1000*a.films, 'virtual films': lambda: processor_seconds(films), 'projections of the bare CT': lambda: processor_seconds(bare)}
    return Race('rendering, processor time', tasks, {'virtual films': 1.}, f'{a.films} films of {a.size} px')


if __name__ == '__main__':
    if '--calibrate' in sys.argv: calibrate(int(sys.argv[sys.argv.index('--calibrate') + 1]))
    else: sys.exit(not main(__doc__, [rendering], tiny=dict(films=1, size=32), films=32, size=96))
