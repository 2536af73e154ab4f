"""Readers and one colour stage on 1,000 real films of ChestX-ray14 (skipped where the folder is absent)."""
import os
from pathlib import Path

import numpy as np
import pytest

from medxfer_nb.data.assets import fetch
from medxfer_nb.data.batches import eval_loader, film_loaders, pixel_stats
from medxfer_nb.data.splits import check_disjoint, split_patients
from medxfer_nb.data.xray import read_chestxray14
from medxfer_nb.models.colorize import colorized_net
from medxfer_nb.repro.colorization import known_mean, predict
from medxfer_nb.transfer.stages import begin_stage, fit_stage, stage_learner

FOLDER = Path(os.environ.get('MEDXFER_NIH64', Path(__file__).parents[2]/'shared'/'data'/'nih64'))
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason='set MEDXFER_NIH64 to a folder with Data_Entry_2017_v2020.csv and images/')


def test_colour_stage_learns_on_real_films():
    films = read_chestxray14(FOLDER, split=None)
    assert len(films) == 1000 and films.frame.patient.nunique() == 264
    rows = split_patients(films.frame.patient, dict(train=.7, valid=.1, test=.2), seed=0)
    part = {k: films.subset(r) for k, r in rows.items()}
    check_disjoint(part)
    stats = pixel_stats(part['train'])
    net = begin_stage(colorized_net('coloru', 'tf_efficientnet_lite0', 5, pretrained=fetch('efficientnet-lite0')), 'color_module', seed=0)
    encoder = {k: v.clone() for k, v in net.E.state_dict().items()}
    learn = stage_learner(film_loaders(part['train'], part['valid'], 64, stats, bs=16, steps_per_epoch=10), net, 'color_module')
    stage = fit_stage(learn, 30, 10, lr=.02, metric=known_mean)
    assert stage.history[-1]['train_loss'] < stage.history[0]['train_loss']
    assert all((v == encoder[k]).all() for k, v in net.E.state_dict().items())  # fixed to the bit, buffers too
    scores = predict(net, eval_loader(part['test'], 64, stats))
    assert known_mean(scores, part['test'].targets) > .5 and np.isfinite(scores).all()
