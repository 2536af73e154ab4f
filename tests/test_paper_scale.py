"""The path that users with the real data sets take, on small folders in the publishers' layouts: it really trains."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medxfer_nb.data.cases import OBSERVATIONS
from medxfer_nb.data.films import virtual_films
from medxfer_nb.repro import colorization
from medxfer_nb.repro.colorization import ColorRun, read_films
from medxfer_nb.repro.jobs import load_or_run
from medxfer_nb.repro.scales import SCALES, make_run
from medxfer_nb.repro.store import Store

NAMES = ['No Finding', 'Enlarged Cardiomediastinum', 'Lung Opacity', 'Lung Lesion', 'Pneumonia', 'Pneumothorax', 'Pleural Other', 'Fracture', 'Support Devices']


@pytest.fixture(scope='module')
def data_root(tmp_path_factory):
    "CheXpert's layout with virtual films, not square, enlarged to 320 pixels."
    root = tmp_path_factory.mktemp('data')
    for split, n in dict(train=30, valid=8).items():
        films, rows = virtual_films('virtual-chest', split, n, 32), []
        for i in range(n):
            path = f'CheXpert-v1.0-small/{split}/patient{films.patient_codes[i]:05d}{"12"[split == "valid"]}/study{i + 1}/view1_frontal.jpg'
            (root/path).parent.mkdir(parents=True)
            Image.fromarray(np.asarray(films.pixels[i])).resize((390, 320)).save(root/path)
            rows.append({'Path': path, 'Sex': 'Female', 'Age': 60, 'Frontal/Lateral': 'Frontal', 'AP/PA': 'AP'}
                        | dict.fromkeys(NAMES) | {o: films.frame[o][i] or None for o in OBSERVATIONS})
        pd.DataFrame(rows).to_csv(root/f'CheXpert-v1.0-small/{split}.csv', index=False)
    return root


@pytest.fixture
def run() -> ColorRun:
    "Eq. 1 as published, but for the length and the weights that need a download."
    run = make_run(SCALES['paper'], 'color_module', 'pixelshuffle')
    return replace(run, batch=2, steps=6, validate_every=2, lr=.01, weights='random', precision='bf16')


def test_published_settings(run):
    assert (run.size, run.backbone, run.dataset) == (320, 'resnet18', 'chexpert')
    assert {b for s in SCALES.values() if not s.virtual for b in s.backbones} == {'resnet18', 'densenet121'}


def test_patients_stay_on_one_side(data_root, run):
    films = read_films(run, data_root)
    patients = {k: set(c.frame.patient) for k, c in films.items()}
    assert len(films['test']) == 8 and not patients['train'] & patients['valid'] and not (patients['train'] | patients['valid']) & patients['test']
    assert not any((c.targets == -1).any() for c in films.values())  # the paper's policy has settled the uncertain ones


def test_killed_run_resumes_with_the_same_numbers(tmp_path, data_root, run, monkeypatch):
    whole, = load_or_run([run], Store(tmp_path/'whole'), data_root=data_root, progress=None, strict=True)

    class Killed(BaseException): pass
    def kill_after_four_steps(self):
        if self.training and self.learn.train_iter > 4: raise Killed
    with monkeypatch.context() as m:
        m.setattr(colorization.Tell, 'after_batch', kill_after_four_steps)
        with pytest.raises(Killed): load_or_run([run], Store(tmp_path/'killed'), data_root=data_root, progress=None)
    assert list((tmp_path/'killed'/'staging').rglob('stage.pth'))  # what it had is there

    steps = []
    monkeypatch.setattr(colorization.Tell, 'after_batch', lambda self: steps.append(self.learn.train_iter) if self.training else None)
    resumed, = load_or_run([run], Store(tmp_path/'killed'), data_root=data_root, progress=None, strict=True)
    assert len(steps) == 2                                         # only the last stretch was trained again
    assert np.array_equal(resumed.predictions()['scores'], whole.predictions()['scores'])
    assert [h['iteration'] for h in resumed.history] == [2, 4, 6]


def test_missing_data_root_says_what_to_do(tmp_path, run):
    with pytest.raises(ValueError, match='--data-root'): load_or_run([run], Store(tmp_path), progress=None, strict=True)
