"""A model that is handed over: the same outputs wherever it runs, masks where the file has its voxels, nothing of a patient in it."""
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_compare_table import NAMES, dicom, scans

from medxfer_nb.compare import handover
from medxfer_nb.compare.design import Design
from medxfer_nb.compare.handover import (ATOL, HandoverError, find_inputs, hand_over, intensities, load_model, native_masks, predict, stored_run,
                                         write_model)
from medxfer_nb.compare.judge import judge
from medxfer_nb.compare.recipes import arms_for
from medxfer_nb.compare.recommend import recommend
from medxfer_nb.compare.runs import gather, run_all, runs_for, trained_net, write_study
from medxfer_nb.compare.sources import parse_sources, save_source
from medxfer_nb.compare.table import prepare, read_table
from medxfer_nb.compare.tasks import task_for
from medxfer_nb.data.ct import Grid, read_nifti, save_nifti
from medxfer_nb.models.colorize import load_backbone
from medxfer_nb.repro.store import Store

pytestmark = pytest.mark.filterwarnings('ignore')
quiet, NET = (lambda line: None), 'test_efficientnet'  # The smallest that timm has


def squares(folder, n=24):
    "PNG files of 12 patients, half of them with a bright square"
    rng, rows = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        image = rng.normal(90, 20, (36, 44))
        image[8:28, 8:36] += 70*(i//2 % 2)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder/f'{i}.png')
        rows.append(dict(path=f'{i}.png', patient=f'Doe^{i//2}', bright=i//2 % 2))
    return read_table(pd.DataFrame(rows), root=folder)

def shaken(net, seed=0, by=.2):
    "An untrained network whose outputs differ from place to place"
    with torch.no_grad():
        for i, p in enumerate(net.parameters()): p.add_(by*torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)))
    return net.eval()

@pytest.fixture(scope='module', params=['films', 'slices', 'volumes'])
def made(request, tmp_path_factory):
    "Pool, task, network and model of each kind"
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    table = squares(root) if kind == 'films' else read_table(scans(root, n=6, shape=(16, 32, 32) if kind == 'slices' else (16, 16, 16), values=(1, 2)), root=root)
    pool = prepare(table, root/'pool', 16 if kind == 'volumes' else 32, 2 if kind == 'slices' else 3, quiet)
    task = task_for(pool, 'unet3d-4x3' if kind == 'volumes' else NET, 'fp32')
    net = shaken(task.network(seed=0), by=0. if kind == 'films' else .2)
    if kind == 'films': net.C.weight.data.mul_(300)  # that outputs differ from film to film
    return SimpleNamespace(kind=kind, table=table, pool=pool, task=task, net=net, folder=write_model(root/'model', task, net, pool, quiet), root=root)


def test_weights_program_and_network_say_the_same(made):
    rows = np.arange(5)
    raw = made.pool.data.images[rows] if made.kind == 'volumes' else made.pool.data.pixels[rows]
    with torch.no_grad(): own = made.task.outputs(made.net(made.task.inputs(raw))).numpy()
    for use in ('weights', 'program'):
        model = load_model(made.folder, use)
        np.testing.assert_allclose(model(intensities(made.pool, rows)), own, atol=ATOL)
        np.testing.assert_allclose(model(intensities(made.pool, rows[:1])), own[:1], atol=ATOL)
    assert own.std() > 100*ATOL  # not all alike


def test_nothing_of_patients_or_of_this_machine_is_handed_over(made):
    "Neither names, nor pixels as the example of the program, nor paths"
    with zipfile.ZipFile(made.folder/'program.pt2') as z: parts = {n: z.read(n) for n in z.namelist()}
    content = b''.join(parts.values()) + (made.folder/'card.json').read_bytes() + (made.folder/'weights.safetensors').read_bytes()
    for name in NAMES: assert name.encode() not in content
    for path in (made.root, Path(handover.__file__).parent, Path(torch.__file__).parent): assert str(path).encode() not in content
    pixels = intensities(made.pool, [0])
    assert pixels.tobytes() not in content and pixels[0, 0].tobytes() not in content


@pytest.mark.parametrize('made', ['films'], indirect=True)
def test_a_program_needs_no_library(made):
    x = intensities(made.pool, np.arange(3))
    np.save(made.root/'x.npy', x)
    code = ("import sys, numpy as np, torch; m = torch.export.load('model/program.pt2').module(); y = m(torch.from_numpy(np.load('x.npy')));"
            "assert 'medxfer_nb' not in sys.modules; np.save('y.npy', y.detach().numpy())")
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=made.root, check=True)
    np.testing.assert_allclose(np.load(made.root/'y.npy'), load_model(made.folder)(x), atol=ATOL)


@pytest.mark.parametrize('made', ['films'], indirect=True)
def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch, made):
    right, other = handover.exported, shaken(made.task.network(seed=5), 9, .02)
    monkeypatch.setattr(handover, 'exported', lambda module, shape: right(handover.Probabilities(other, made.task).eval(), shape))
    folder = write_model(tmp_path/'m', made.task, made.net, made.pool, quiet)
    assert not (folder/'program.pt2').exists() and 'differ by' in json.loads((folder/'card.json').read_text())['program']['reason']
    with pytest.raises(HandoverError, match='use the weights'): load_model(folder, 'program')
    def fails(*args): raise RuntimeError(f'cannot trace {tmp_path}')
    monkeypatch.setattr(handover, 'exported', fails)
    card = json.loads((write_model(folder, made.task, made.net, made.pool, quiet)/'card.json').read_text())
    assert 'RuntimeError' in card['program']['reason'] and str(tmp_path) not in json.dumps(card)
    load_model(folder)


def test_files_give_what_the_pool_gives(made, tmp_path):
    "Read anew, preprocessed from the card, and where sizes agree the very masks that were scored"
    rows, t = np.arange(3), made.table
    expected, found = made.task.predict(made.net, made.pool, rows), predict(made.folder, [t.path(i) for i in rows], tmp_path, progress=None)
    assert not found.failures and (pd.read_csv(tmp_path/'predictions.csv').status == 'ok').all()
    if made.kind == 'films': return np.testing.assert_allclose(found.table.bright, expected[:, 0], atol=1e-6)
    for row, masks, name in zip(rows, expected, found.table['mask']):
        numbers, grid = read_nifti(tmp_path/name)
        for value, mask in enumerate(masks, 1):
            if made.kind == 'slices': assert np.array_equal(numbers == value, mask)
            else: assert not ((numbers == value) & ~mask).any()
        assert np.array_equal(numbers > 0, masks.any(0))  # volumes: of two structures that claim a voxel one is written
        assert found.table['1 (ml)'][row] == pytest.approx((numbers == 1).sum()*np.prod(grid.spacing)/1000)


@pytest.mark.parametrize('made', ['slices', 'volumes'], indirect=True)
def test_masks_lie_on_the_file_whatever_its_axes(made, tmp_path):
    "The same volume, stored with other axes and signs: the same mask in the house's axes, the file's own affine"
    image = np.random.default_rng(3).uniform(0, 500, (18, 30, 26)).astype('float32')
    first = Grid.plain(image.shape, (3., 1., 2.), (10., 20., 30.))
    turned = Grid((30, 18, 26), first.normalised @ np.array([[0, 0, -1, 25], [1, 0, 0, 0], [0, -1, 0, 17], [0, 0, 0, 1.]]))
    for name, grid in (('a', first), ('b', turned)): save_nifti(image, grid, tmp_path/f'{name}.nii.gz')
    found = predict(made.folder, tmp_path, tmp_path/'out', progress=None)
    masks = {n: read_nifti(tmp_path/f'out/{n}_predicted.nii.gz')[0] for n in 'ab'}
    assert np.array_equal(masks['a'], masks['b']) and masks['a'].any() and masks['a'].shape == image.shape
    for n in 'ab':
        file, mask = nib.load(tmp_path/f'{n}.nii.gz'), nib.load(tmp_path/f'out/{n}_predicted.nii.gz')
        assert file.shape == mask.shape and np.allclose(file.affine, mask.affine) and mask.get_data_dtype() == np.uint8
    again = predict(made.folder, tmp_path, tmp_path/'out', progress=None)  # the masks of before are no volumes
    assert again.table.file.tolist() == found.table.file.tolist() and len(found.table) == 2


def test_numbers_voxel_by_voxel():
    "The more probable one of those that reach one half; for slices the most probable class"
    rng = np.random.default_rng(0)
    p = rng.random((1, 3, 4, 5, 6)).astype('float32')
    p[0, 1, 0], p[0, 0, 0] = .5, .5  # a tie goes to the first
    card = dict(kind='volumes', labels=['a', 'b', 'c'], postprocessing=dict(writes='one mask', values=dict(a=1, b=2, c=3)))
    found = native_masks(card, p, (4, 5, 6))
    for at in np.ndindex(4, 5, 6):
        v = p[(0, slice(None), *at)]
        expected = int(v.argmax()) if v.max() >= .5 else None
        assert [k for k, n in enumerate('abc') if found[n][at]] == ([] if expected is None else [expected])
    p = rng.random((7, 3, 4, 4)).astype('float32')  # background and two structures
    found = native_masks(card | dict(kind='slices', labels=['a', 'b'], postprocessing=dict(writes='one mask', values=dict(a=1, b=2))), p, (7, 4, 4))
    assert np.array_equal(found['a'], p.argmax(1) == 1) and np.array_equal(found['b'], p.argmax(1) == 2)


def test_structures_that_overlap_get_a_mask_each(tmp_path):
    rows = scans(tmp_path, n=6, shape=(16, 16, 16), values=(1, 2))
    pool = prepare(read_table(rows, root=tmp_path, labels={'core': 2, 'whole': (1, 2)}), tmp_path/'pool', 16, progress=quiet)
    task = task_for(pool, 'unet3d-4x3', 'fp32')
    net = shaken(task.network(seed=0))
    found = predict(write_model(tmp_path/'model', task, net, pool, quiet), tmp_path/'v0.nii.gz', tmp_path/'out', progress=None)
    for i, label in enumerate(('core', 'whole')):
        assert np.array_equal(read_nifti(tmp_path/'out'/found.table[f'mask {label}'][0])[0] == 1, task.predict(net, pool, [0])[0][i])


def test_dicom_in_and_no_header_out(made, tmp_path):
    if made.kind == 'films':
        for i in range(2): dicom(tmp_path/f'{i}.dcm', np.random.default_rng(i).integers(0, 4000, (30, 40)))
        given = tmp_path
    else:
        for s in ('s', 't'):
            (tmp_path/s).mkdir()
            for i in range(6): dicom(tmp_path/s/f'{9 - i}', np.random.default_rng(i).integers(0, 3000, (20, 24)), ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, 6. * i], PixelSpacing=[1., 1.])
        given = tmp_path
    found = predict(made.folder, given, tmp_path/'out', progress=None)
    assert found.table.status.tolist() == ['ok', 'ok']
    for path in (tmp_path/'out').iterdir():
        content = nib.load(path).to_bytes() if path.suffix == '.gz' else path.read_bytes()
        assert b'Doe' not in content and b'4711' not in content
    if made.kind != 'films': assert read_nifti(tmp_path/'out'/found.table['mask'][0])[0].shape == (6, 20, 24)


def test_one_bad_file_does_not_stop_the_others(made, tmp_path):
    good, told, suffix = made.table.path(0), [], '.png' if made.kind == 'films' else '.nii.gz'
    (tmp_path/'empty').mkdir()
    (tmp_path/f'cut{suffix}').write_bytes(good.read_bytes()[:150])
    other = tmp_path/('v.nii.gz' if made.kind == 'films' else 'i.png')  # of another sort
    other.write_bytes(b'any')
    found = predict(made.folder, [tmp_path/'gone.png', good, tmp_path/f'cut{suffix}', other, tmp_path/'empty', good], tmp_path/'out', progress=told.append)
    assert (found.table.status == 'ok').sum() == 1 and len(found.failures) == len(told) == 4
    for name in ('gone.png', 'cut', other.name, 'empty'): assert any(name in line for line in told), told
    table = pd.read_csv(tmp_path/'out/predictions.csv')
    assert table.status.value_counts().to_dict() == dict(failed=4, ok=1) and list(table)[:2] == ['file', 'status']


@pytest.mark.parametrize('made', ['slices', 'volumes'], indirect=True)
def test_names_do_not_collide(made, tmp_path):
    for d in ('x', 'y'):
        (tmp_path/d).mkdir()
        (tmp_path/d/'scan.nii.gz').write_bytes(made.table.path(0).read_bytes())
    found = predict(made.folder, [tmp_path/'x', tmp_path/'y'], tmp_path/'x', progress=None)
    assert found.table['mask'].tolist() == ['scan_predicted.nii.gz', 'scan-2_predicted.nii.gz']
    assert (tmp_path/'x/scan.nii.gz').read_bytes() == made.table.path(0).read_bytes()


def test_folders(tmp_path):
    for name in ('b.png', 'sub/a.JPG', 'sub/deep/c.dcm', 'notes.csv', '.hidden.png', 'a_predicted.png', 'LICENSE'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(b'x')
    assert [p.name for p in find_inputs(tmp_path, 'image')[0]] == ['b.png', 'a.JPG', 'c.dcm']
    assert [p.name for p in find_inputs(tmp_path, 'nifti')[0]] == ['deep']  # a series
    assert find_inputs([tmp_path/'b.png', tmp_path/'b.png'], 'image')[0] == [tmp_path/'b.png']


@pytest.mark.parametrize('made', ['films'], indirect=True)
def test_damage_is_told(made, tmp_path):
    folder = write_model(tmp_path/'m', made.task, made.net, made.pool, quiet)
    for name, use in (('weights.safetensors', 'weights'), ('program.pt2', 'program')):
        data = bytearray((folder/name).read_bytes())
        data[-100] ^= 1
        (folder/name).write_bytes(data)
        with pytest.raises(HandoverError, match='damaged.*again'): load_model(folder, use)
    (folder/'card.json').write_text(json.dumps(json.loads((folder/'card.json').read_text()) | dict(format=99)))
    with pytest.raises(HandoverError, match='format 99'): load_model(folder)
    (folder/'card.json').write_text('{')
    with pytest.raises(HandoverError, match='cannot be read'): load_model(folder)
    (tmp_path/'full').mkdir()
    (tmp_path/'full/thesis.txt').write_text('mine')
    with pytest.raises(HandoverError, match='holds other files'): write_model(tmp_path/'full', made.task, made.net, made.pool, quiet)
    assert (tmp_path/'full/thesis.txt').exists()


@pytest.fixture(scope='module')
def comparison(tmp_path_factory):
    "Two strategies, two folds, two repeats; in the same store a run of another design"
    root = tmp_path_factory.mktemp('comparison')
    pool = prepare(squares(root/'files'), root/'prepared', 32, progress=quiet)
    torch.manual_seed(1)
    sources = parse_sources([save_source(load_backbone(NET).state_dict(), root/'base.safetensors', NET, licence='CC0')])
    study, store = write_study(root/'out/study', pool, sources), Store(root/'out/store')
    arms, _ = arms_for(['scratch', 'full'], sources, 'films')
    same = dict(kind='films', arms=tuple(a.name for a in arms), folds=2, trials=1, validate_every=2, size=32, bs=8, seed=0, n_patients=12, jobs=1, budget=60., seconds=1.,
                portions=(), portion_arms=(), left_out={}, given_up=())
    design = Design(repeats=2, steps=4, **same)
    run_all(runs_for(Design(repeats=1, steps=2, **same), arms, sources, NET, 'fp32')[:2], store, study, progress=None)
    results = gather(run_all(runs_for(design, arms, sources, NET, 'fp32'), store, study, progress=None), pool, design, arms)
    results.save(root/'out/results')
    judgement = judge(results)
    return SimpleNamespace(folder=root/'out', results=results, judgement=judgement, recommendation=recommend(results, judgement), store=store, study=study, pool=pool)


def test_the_recommended_strategy_is_trained_on_all_patients_and_handed_over(comparison):
    c, before = comparison, set(comparison.store.keys())
    folder = hand_over(c, progress=None)
    card, arm = json.loads((folder/'card.json').read_text()), c.recommendation.choice
    (new,) = [r for r in c.store.records() if r.key not in before]
    assert (new.manifest['config']['fold'], new.manifest['config']['steps'], new.metrics['n_test']) == (-1, 4, 0)
    assert card['name'] == arm and card['training']['fitted_on'] + card['training']['validated_on'] == 12 == card['training']['patients']
    assert card['scores']['mean'] == pytest.approx(c.judgement.table['mean'][arm]) and card['scores']['low'] == pytest.approx(c.judgement.table['low'][arm])
    task, pool, net = trained_net(new, c.study)
    files = [c.folder.parent/f'files/{i}.png' for i in range(24)]
    for use in ('weights', 'program'):
        np.testing.assert_allclose(predict(folder, files, folder.parent/'answers', use, None).table.bright, task.predict(net, pool, np.arange(24))[:, 0], atol=ATOL)
    assert 'Doe' not in (folder/'card.json').read_text()


def test_a_folder_is_as_good_as_the_object_and_nothing_is_trained_twice(comparison, tmp_path):
    c = comparison
    first = hand_over(c, 'full@base', tmp_path/'a', progress=None)
    before = set(c.store.keys())
    second = hand_over(c.folder, 'full@base', tmp_path/'b', progress=None)
    one, other = (load_file(f/'weights.safetensors') for f in (first, second)) # The order of a file's metadata is left to chance
    assert set(c.store.keys()) == before and list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)
    cards = [json.loads((f/'card.json').read_text()) for f in (first, second)]
    for card in cards: card['program'].pop('sha256', None)
    assert cards[0] == cards[1] and cards[0]['training']['sources'][0]['licence'] == 'CC0'


def test_other_cases_in_the_folder_are_not_mistaken_for_those_that_were_compared(comparison, tmp_path):
    "As a later call with the same folder, perhaps a dry run, leaves them there"
    c = comparison
    shutil.copytree(c.folder, tmp_path/'out')
    assert hand_over(tmp_path/'out', 'scratch', tmp_path/'same', progress=None)
    other = prepare(squares(tmp_path/'files'), tmp_path/'prepared', 64, progress=quiet)
    write_study(tmp_path/'out/study', other, parse_sources([c.folder.parent/'base.safetensors']))
    with pytest.raises(HandoverError, match='other cases, or another size'): hand_over(tmp_path/'out', 'scratch', tmp_path/'model', progress=None)
    assert not (tmp_path/'model').exists()


def test_the_run_behind_the_results_is_found_among_others(comparison, tmp_path):
    c = comparison
    run = stored_run(c.store, c.results, 'scratch')
    assert (run.name, run.steps, run.fold, run.seed) == ('scratch', 4, 0, 0)
    with pytest.raises(HandoverError, match='choose scratch, full@base'): stored_run(c.store, c.results, 'soup')
    with pytest.raises(HandoverError, match='compare again'): stored_run(Store(tmp_path), c.results, 'scratch')
    with pytest.raises(HandoverError, match='dry run'): hand_over(SimpleNamespace(folder=tmp_path, results=None))
