"""The path of the L2-SP paper on real data, on small folders in the publishers' layouts: HydraNet, target, 3-D scores, written volumes."""
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from medxfer_nb.cli import app
from medxfer_nb.data.ct import CLASSES, ZENODO_SCANS, read_nifti, save_nifti
from medxfer_nb.data.volumes import virtual_case
from medxfer_nb.repro import lesions
from medxfer_nb.repro.jobs import load_or_run
from medxfer_nb.repro.lesion_scales import SCALES, make_run
from medxfer_nb.repro.store import Store

pytestmark = pytest.mark.filterwarnings('ignore')


def write_case(image, masks: dict, i: int, cohort='virtual-covid', task=None, windowed=False):
    "One virtual patient as files; `masks` maps a path to a function of the labels."
    v = virtual_case(cohort, 'train', i, 48, 40., task).load()
    for path in (image, *masks): path.parent.mkdir(parents=True, exist_ok=True)
    hu = ((v.image.clip(-1250, 250) + 1250)/1500*255).round() if windowed else v.image
    save_nifti(hu.astype(np.float32), v.grid, image)
    for path, of in masks.items(): save_nifti(of(v.mask).astype(np.uint8), v.grid, path)


@pytest.fixture(scope='module')
def data_root(tmp_path_factory):
    "Two cases of Zenodo 3757476, two of MedSeg, one Decathlon task"
    root = tmp_path_factory.mktemp('ct')
    for i, name in enumerate(('coronacases_001', 'radiopaedia_10_85902_1')):
        masks = {'lung_mask': lambda m: m == 1, 'infection_mask': lambda m: m == 2, 'lung_and_infection_mask': lambda m: np.select([m == 2, m == 1], [3, 1])}
        write_case(root/f'ct_scans/{name}.nii.gz', {root/f'{folder}/{name}.nii.gz': of for folder, of in masks.items()}, i, windowed=name.startswith('radio'))
    for i in (1, 2):
        write_case(root/f'rp_im/{i}.nii.gz', {root/f'rp_msk/{i}.nii.gz': lambda m: m == 2, root/f'rp_lung_msk/{i}.nii.gz': lambda m: m > 0}, i + 1)
    task = root/'Task06_Lung'
    for i in range(3): write_case(task/f'imagesTr/lung_{i}.nii.gz', {task/f'labelsTr/lung_{i}.nii.gz': lambda m: m > 0}, i, 'virtual-organs', 'heart and vessels')
    (task/'dataset.json').write_text(json.dumps(dict(name='Lung', modality={'0': 'CT'}, labels={'0': 'background', '1': 'structure'}, numTraining=3, numTest=0, test=[],
        training=[{'image': f'./imagesTr/lung_{i}.nii.gz', 'label': f'./labelsTr/lung_{i}.nii.gz'} for i in range(3)])))
    return root


@pytest.fixture
def run():
    "Med+Nat with a penalty as published, but for the length, the number of volumes and the weights that need a download."
    run = make_run(SCALES['paper'], 'med+nat', lam=8.)
    return replace(run, batch=2, steps=2, validate_every=1, n_train=2, n_valid=1, n_test=1, source_steps=4, source_train=2, weights='random', precision='bf16')


def test_published_settings(run):
    assert (run.size, run.backbone, run.dataset, run.form) == (384, 'densenet121', 'covid-ct', 'grad')
    assert SCALES['paper'].counts == (21, 3, 5) and SCALES['paper'].lams == (0, .5, 1, 2, 4, 8, 16, 50)


def test_slices_of_a_patient_stay_on_one_side(data_root, run):
    cases = lesions.covid_split(run, data_root)
    patients = [{c.patient for c in cases[s]} for s in ('train', 'valid', 'test')]
    assert [len(cases[s]) for s in ('train', 'valid', 'test')] == [2, 1, 1] and not any(a & b for a, b in [patients[:2], patients[1:], patients[::2]])


@pytest.mark.parametrize('split, whole', [('patient', True), ('scan', False)])
def test_series_of_a_patient_are_dealt_out_as_the_run_says(tmp_path, run, split, whole):
    "All 29 names; cases 10 and 29 of Radiopaedia have two series each, which the paper's literal split may part."
    for name in ZENODO_SCANS:
        for folder in ('ct_scans', 'lung_and_infection_mask'): (tmp_path/folder).mkdir(exist_ok=True); (tmp_path/folder/f'{name}.nii.gz').touch()
    for folder in ('rp_im', 'rp_msk', 'rp_lung_msk'):
        (tmp_path/folder).mkdir()
        for i in range(1, 10): (tmp_path/folder/f'{i}.nii.gz').touch()
    parts = lesions.covid_split(replace(run, n_train=21, n_valid=3, n_test=5, split=split), tmp_path)
    assert {k: len(v) for k, v in parts.items()} == dict(train=21, valid=3, test=5)
    sides = {}
    for side, cases in parts.items():
        for c in cases: sides.setdefault(c.patient, []).append(side)
    twice = [s for s in sides.values() if len(s) == 2]
    assert len(twice) == 2 and all(len(set(s)) == 1 for s in twice) == whole


def test_one_command_is_the_whole_figure(tmp_path, data_root, monkeypatch):
    "Three sources, eight penalty weights and the limit, three seeds, two source networks"
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ['reproduce', 'l2sp', '--scale', 'paper', '--data-root', str(data_root), '--dry-run'])
    words = ' '.join(done.output.split())
    assert done.exit_code == 0 and 'fig1_lambda 81 0 83' in words and '81 different runs: 0 stored, 83 to train' in words, done.output
    assert not list(tmp_path.iterdir())


def test_source_and_target_really_train(tmp_path, data_root, run, monkeypatch):
    monkeypatch.setenv('MEDXFER_CACHE', str(tmp_path/'cache'))
    store = Store(tmp_path/'store')
    held, = load_or_run([run], store, data_root=data_root, progress=None, strict=True)
    source, = load_or_run([lesions.source_run(run)], store, data_root=data_root, progress=None, strict=True)
    assert len(store.keys()) == 2 and [h['iteration'] for h in held.history] == [1, 2]
    scores = held.predictions()
    assert all(v.shape == (1,) and np.isfinite(v).all() for v in scores.values()) and 0 <= scores['dice'][0] <= 1 and scores['lesion_ml'][0] > 0
    begun, ended = source.weights(), held.weights()
    assert all(k in ended for k in begun) and 0 < held.metrics['distance'] < 10  # it started from there, and moved


def test_a_segmented_scan_overlays_its_file(tmp_path, data_root, run):
    case = lesions.covid_split(run, data_root)['test'][0]
    net = lesions.begin_target(replace(run, source='nat', source_steps=0, source_train=0))
    written = lesions.segment_file(net, case.files[0], tmp_path/'mask.nii.gz', run.size)
    ours, theirs = nib.load(written), nib.load(case.files[0])
    assert ours.shape == theirs.shape and np.allclose(ours.affine, theirs.affine)
    volume, (labels, grid) = case.load(), read_nifti(written)
    again = lesions.segment(net, next(lesions.real_scans([case], run.size)).pixels, volume.image.shape, volume.spacing)
    assert np.array_equal(labels, again) and grid.fits(volume.grid) and labels.max() < len(CLASSES)


def test_without_the_data_it_says_what_to_fetch(tmp_path, run):
    with pytest.raises(ValueError, match='--data-root'): load_or_run([run], Store(tmp_path), progress=None, strict=True)
