"""The path that users with the real data sets take, on small folders in the publishers' layouts: it really trains."""
from dataclasses import replace
from pathlib import Path

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


def write_film(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).resize((390, 320)).save(path)


@pytest.fixture(scope='module')
def all_three(data_root):
    "Beside it ChestX-ray14 and MURA in their layouts."
    nih, rows, listed = data_root/'ChestX-ray14', [], {}
    for split, n in dict(train=24, test=8).items():
        films = virtual_films('virtual-hospital', split, n, 32)
        for i in range(n):
            patient, name = films.patient_codes[i] + (1_000 if split == 'test' else 1), f'{split}{i:05d}_000.png'
            write_film(films.pixels[i], nih/'images_001'/'images'/name)
            findings = '|'.join(o.replace('Pleural ', '') for o in OBSERVATIONS if films.frame[o][i]) or 'No Finding'
            rows.append({'Image Index': name, 'Finding Labels': findings, 'Follow-up #': i, 'Patient ID': patient, 'View Position': 'PA'})
            listed.setdefault(split, []).append(name)
    pd.DataFrame(rows).to_csv(nih/'Data_Entry_2017_v2020.csv', index=False)
    for split, file in dict(train='train_val_list.txt', test='test_list.txt').items(): (nih/file).write_text('\n'.join(listed[split]))
    for split, n in dict(train=24, valid=8).items():
        films, paths = virtual_films('virtual-bone', split, n, 32), []
        for i in range(n):
            label = int(films.frame.Abnormal[i] != 0)
            paths.append(f'MURA-v1.1/{split}/XR_SHOULDER/patient{i + (1 if split == "train" else 11_185):05d}/study1_{"positive" if label else "negative"}/image1.png')
            write_film(films.pixels[i], data_root/paths[-1])
        (data_root/'MURA-v1.1'/f'{split}_image_paths.csv').write_text('\n'.join(paths) + '\n')
        (data_root/'MURA-v1.1'/f'{split}_labeled_studies.csv').write_text(''.join(f'{Path(p).parent}/,{int("positive" in p)}\n' for p in paths))
    return data_root


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


def test_transfer_to_the_other_two_data_sets(tmp_path, all_three, run):
    "Eq. 3 and the fine-tuned transfer: T learned on the small CheXpert, used on the other two."
    moved = [replace(run, strategy='last_layer', source='color_module', dataset=d, steps=2) for d in ('chestxray14', 'mura')]
    tuned = replace(run, strategy='all', source='all', dataset='chestxray14', steps=2)
    nih, mura, full = load_or_run([*moved, tuned], Store(tmp_path/'store'), data_root=all_three, progress=None, strict=True)
    assert nih.predictions()['scores'].shape == (8, 5) and mura.predictions()['scores'].shape == (8, 1)
    assert 0 <= mura.metrics['auc_Abnormal'] <= 1 and 0 <= mura.metrics['study_auc_Abnormal'] <= 1
    assert nih.metrics['input_mean'] == mura.metrics['input_mean'] == pytest.approx(.5028)  # CheXpert's everywhere (Section IV.B)
    source, = load_or_run([replace(moved[0], strategy='color_module', source='', dataset='chexpert')], Store(tmp_path/'store'), data_root=all_three, progress=None)
    kept, learned = source.weights(), full.weights()
    for record in (nih, mura):  # T is CheXpert's to the bit, and only C is new
        assert all(np.array_equal(v, kept[k]) for k, v in record.weights().items() if k.startswith('T.')) and not any(k.startswith('E.') for k in record.weights())
    assert any(not np.array_equal(v, kept[k]) for k, v in learned.items() if k.startswith('T.')) and any(k.startswith('E.') for k in learned)


def test_missing_data_root_says_what_to_do(tmp_path, run):
    with pytest.raises(ValueError, match='--data-root'): load_or_run([run], Store(tmp_path), progress=None, strict=True)
