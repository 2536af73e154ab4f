"Virtual CT volumes: anatomy, lesions, tasks, and the cache under faults"
import os, signal, subprocess, sys, time
from dataclasses import replace
import nibabel as nib, numpy as np, pytest, torch
from scipy import ndimage
from medxfer_nb.data.ct import CTError, read_nifti, save_nifti
from medxfer_nb.data.films import LUNGS, SPLITS, load_anatomy
from medxfer_nb.data.slices import window_to_unit
from medxfer_nb.data.volumes import (CT_COHORTS, LESION, PURPOSES, SOURCE_TASKS, TASKS, AxialScene, CTPatient, axial_points, axial_scene, closeness,
                                     healthy_ct, lesion_sites, lung_position, lung_slices, pleural_depth, render_ct, task_classes, task_masks,
                                     virtual_case, virtual_ct)

COVID, ORGANS = CT_COHORTS.values()

@pytest.fixture(scope='module')
def anatomy(): return healthy_ct(4)

@pytest.fixture(scope='module')
def scans(anatomy):
    "Patient, HU and structures of twelve patients"
    return [(p, *render_ct(p, 96, anatomy)) for p in (CTPatient(COVID, 'calibrate', i) for i in range(12))]

def dice(a, b): return 2 * (a & b).sum() / (a.sum() + b.sum())

def test_unwarped_patient_is_a_straight_cut_through_the_ct(anatomy, monkeypatch):
    still = replace(COVID, elastic=0., scale=0., thickness=5.)
    monkeypatch.setattr('medxfer_nb.data.volumes._rotation', lambda degrees: torch.eye(3))
    at = axial_points(CTPatient(still, 'train', 1), anatomy, 40)
    for axis, other in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        assert at[..., axis].std(other).max() < 1e-2           # a straight grid
    index = (at / torch.tensor(anatomy.spacing) - .5)[20:22].reshape(-1, 3).numpy().T
    scene = AxialScene(anatomy, at[20:22], CTPatient(still, 'train', 1), range(20, 22))
    expected = ndimage.map_coordinates(anatomy.hu.numpy(), index, order=1, mode='mirror')
    inside = np.all((index > 0) & (index < np.array(anatomy.hu.shape)[:, None] - 1), 0)
    np.testing.assert_allclose(scene.hu.numpy().ravel()[inside], expected[inside], atol=1.)

def test_the_mass_is_gone_and_nothing_else_changed(anatomy):
    whole, place = load_anatomy(4), np.indices(anatomy.hu.shape).T + .5
    apart = np.linalg.norm(place * anatomy.spacing - (226, 101, 223), axis=-1).T
    lobe, changed = anatomy.mask(11).numpy() > 0, ((whole.hu - anatomy.hu).abs() > 1).numpy()
    assert whole.hu.numpy()[lobe & (apart < 8)].mean() > -100 and anatomy.hu.numpy()[lobe & (apart < 12)].max() < -690
    assert not (changed & (~lobe | (apart > 32))).any() and torch.equal(whole.labels, anatomy.labels)

def test_pleural_depth_is_the_distance_to_the_outside(anatomy):
    lung = ndimage.binary_closing(anatomy.mask(*LUNGS).numpy() > 0, iterations=4)
    outside = (np.argwhere(~lung) + .5) * anatomy.spacing
    for at in np.argwhere(lung)[::40000]:
        brute = np.sqrt((((at + .5) * anatomy.spacing - outside)**2).sum(1).min())
        assert pleural_depth()[tuple(at)] == pytest.approx(brute, abs=.01)

def test_closeness_by_hand(anatomy):
    scene = axial_scene(CTPatient(COVID, 'test', 0), anatomy, 48)
    foci = [(scene.place[100], 12., 0.), (scene.place[5000], 30., 2.)]
    each = []
    for centre, radius, flat in foci:
        deeper = flat * (scene.depth - lung_position(centre[None])[0]).clamp(min=0).numpy()
        each.append(-np.sqrt(((scene.place - centre).numpy()**2).sum(1) + deeper**2) / radius)
    np.testing.assert_allclose(closeness(scene, foci).numpy(), np.maximum(*each), atol=1e-4)

def test_lungs_are_covered_and_the_source_reaches_the_abdomen(anatomy):
    for cohort in (COVID, ORGANS):
        for i in range(6):
            p = CTPatient(cohort, 'train', i)
            _, structures = render_ct(p, 48, anatomy)
            lung = np.isin(structures, (*LUNGS, LESION)).sum((1, 2))
            assert lung[-1] > 0 and (lung[0] > 0) == (cohort.below == 0)
            assert len(lung) == len(lung_slices(p, anatomy)) and 22 <= len(lung) <= (36 if cohort is COVID else 48)

def test_masks_fit(scans):
    for p, hu, structures in scans:
        lesion, lung = structures == LESION, np.isin(structures, (*LUNGS, LESION))
        assert hu.shape == structures.shape and hu.dtype == np.float32 and structures.dtype == np.uint8
        assert lesion.sum() / lung.sum() == pytest.approx(p.share, abs=1e-3)
        assert np.median(hu[lesion]) - np.median(hu[lung & ~lesion]) > 80
        ring = ndimage.binary_dilation(lesion, iterations=2) & lung & ~ndimage.binary_dilation(lesion)
        assert np.median(hu[ring]) < np.median(hu[lesion])

def test_lesions_lie_under_the_pleura_at_the_base_and_the_back():
    points, weights = lesion_sites()
    assert weights.sum() == pytest.approx(1) and (weights > 0).all()
    depth, base, back = (v.numpy() for v in lung_position(points))
    assert np.average(depth, weights=weights) < .7 * depth.mean()
    assert np.average(base, weights=weights) > base.mean() + .04 and np.average(back, weights=weights) > back.mean() + .04

def test_lesions_and_bodies_have_seeds_of_their_own(anatomy):
    p = CTPatient(COVID, 'valid', 3)
    hu, structures = render_ct(p, 48, anatomy)
    harder = replace(p, cohort=replace(COVID, ground_glass=-750.))
    hu2, structures2 = render_ct(harder, 48, anatomy)
    sound, organs = render_ct(replace(p, cohort=replace(COVID, share=(0., 0.))), 48, anatomy)
    np.testing.assert_array_equal(structures, structures2)                  # difficulty leaves the masks alone
    assert hu2[structures == LESION].mean() < hu[structures == LESION].mean() - 40
    np.testing.assert_array_equal(structures[structures != LESION], organs[structures != LESION])
    assert np.isin(organs[structures == LESION], LUNGS).all() and LESION not in organs

def test_mimics_are_not_lesions(anatomy):
    p = CTPatient(replace(COVID, share=(0., 0.)), 'valid', 3)
    clean = replace(p, cohort=replace(p.cohort, mimics=0.))
    (with_, structures), (without, structures2) = (render_ct(q, 48, anatomy) for q in (p, clean))
    np.testing.assert_array_equal(structures, structures2)
    changed = with_ != without
    assert changed.any() and not changed[~ndimage.binary_dilation(np.isin(structures, LUNGS), iterations=6)].any()

def test_splits_share_no_patient(anatomy):
    hu = {s: render_ct(CTPatient(COVID, s, 0), 48, anatomy)[1] for s in SPLITS}
    for a in SPLITS:
        for b in SPLITS:
            n = min(len(hu[a]), len(hu[b]))
            assert a == b or (hu[a][:n] != hu[b][:n]).mean() > .02
    codes = [CTPatient(c, s, i).code for c in CT_COHORTS.values() for s in SPLITS for i in (0, 1, 999_999)]
    assert len(set(codes)) == len(codes)

def test_every_patient_split_cohort_and_purpose_draws_for_itself():
    draws = [CTPatient(c, s, i).seed(p).random() for c in CT_COHORTS.values() for s in SPLITS for i in range(5) for p in PURPOSES]
    assert len(set(draws)) == len(draws) == 2 * len(SPLITS) * 5 * len(PURPOSES)

@pytest.mark.parametrize('field', ['knots', 'elastic', 'scale', 'texture', 'grain', 'noise'])
def test_source_is_another_hospital(field): assert getattr(ORGANS, field) != getattr(COVID, field)

def test_size_and_thickness_change_the_resolution_alone(anatomy):
    p = CTPatient(COVID, 'calibrate', 1)
    small, large = (render_ct(p, s, anatomy) for s in (64, 128))
    lungs = [np.isin(s, (*LUNGS, LESION)) for _, s in (small, large)]
    assert dice(lungs[0].repeat(2, 1).repeat(2, 2), lungs[1]) > .95
    assert dice((small[1] == LESION).repeat(2, 1).repeat(2, 2), large[1] == LESION) > .8
    thin = CTPatient(replace(COVID, thickness=COVID.thickness / 2), 'calibrate', 1)
    _, structures = render_ct(thin, 64, anatomy)
    volume = lambda s, patient: np.isin(s, (*LUNGS, LESION)).sum() * np.prod(patient.spacing(64))
    assert volume(structures, thin) == pytest.approx(volume(small[1], p), rel=.03)

def test_fine_anatomy_is_the_same_patient(anatomy):
    p = CTPatient(COVID, 'calibrate', 1)
    coarse, fine = render_ct(p, 96, anatomy)[1] == LESION, render_ct(p, 96, healthy_ct(2))[1] == LESION
    assert dice(coarse, fine) > .85

def test_source_tasks(anatomy, tmp_path):
    used = {i for t in SOURCE_TASKS.values() for ids in t.values() for i in ids}
    assert LESION not in used and used <= set(range(1, 119))
    said = []
    first = virtual_ct('virtual-organs', 'train', 2, 48, cache=tmp_path, progress=said.append)
    assert first.class_names == task_classes('lobes') and len(said) == 1
    for task in SOURCE_TASKS:
        s = virtual_ct('virtual-organs', 'train', 2, 48, cache=tmp_path, progress=said.append, task=task)
        np.testing.assert_array_equal(s.pixels, first.pixels)
        assert s.class_counts().all() and s.n_classes == len(TASKS[task]) + 1 and len(said) == 1
    _, structures = render_ct(CTPatient(ORGANS, 'train', 0), 48, anatomy)
    np.testing.assert_array_equal(s.masks[:len(structures)], task_masks(structures, task))

def test_slices(anatomy, tmp_path):
    s = virtual_ct('virtual-covid', 'test', 3, 48, cache=tmp_path)
    p = CTPatient(COVID, 'test', 1)
    hu, structures = render_ct(p, 48, anatomy)
    rows = np.flatnonzero(s.volume == 1)
    np.testing.assert_array_equal(s.pixels[rows], window_to_unit(hu, -1000, 0).astype(np.float16))
    np.testing.assert_array_equal(s.masks[rows], np.select([structures == LESION, np.isin(structures, LUNGS)], [2, 1], 0))
    np.testing.assert_array_equal(s.z[rows], np.arange(len(hu)))
    assert tuple(s.shapes[1]) == hu.shape and s.patients[1] == p.code
    np.testing.assert_allclose(s.spacings[1], p.spacing(48))
    more = virtual_ct('virtual-covid', 'test', 4, 48, cache=tmp_path)
    np.testing.assert_array_equal(more.pixels[:len(s)], s.pixels)
    np.testing.assert_array_equal(more.masks[:len(s)], s.masks)

def test_case_to_file_and_back(tmp_path):
    case = virtual_case('virtual-covid', 'test', 1, size=48, thickness=7.)
    v = case.load()
    image, mask = (save_nifti(a, v.grid, tmp_path/f'{n}.nii.gz') for n, a in (('image', v.image), ('mask', v.mask)))
    array, grid = read_nifti(image)
    np.testing.assert_allclose(array, v.image, atol=1e-3)
    np.testing.assert_allclose(grid.spacing, v.spacing, rtol=1e-5)
    ras = nib.as_closest_canonical(nib.load(mask))           # voxels right, front, head
    np.testing.assert_array_equal(np.asarray(ras.dataobj), v.mask[:, ::-1, ::-1].transpose(2, 1, 0))
    assert case.fingerprint() == virtual_case('virtual-covid', 'test', 1, size=48, thickness=7.).fingerprint()
    assert case.fingerprint() != virtual_case('virtual-covid', 'test', 1, size=48).fingerprint()

def test_keys_name_all_that_decides(tmp_path, monkeypatch):
    def keys():
        virtual_ct('virtual-covid', 'valid', 1, 32, cache=tmp_path)
        return virtual_case('virtual-covid', 'valid', 0, size=32).fingerprint(), len(list(tmp_path.glob('*.npy')))
    first, n = keys()
    monkeypatch.setitem(TASKS, 'covid', {'lung': LUNGS[1:], 'infection': (LESION,)})
    other, m = keys()
    assert other != first and n == m == 1                    # masks are made from the cached structures
    for version in ('FILMS_VERSION', 'CT_VERSION'):
        monkeypatch.setattr(f'medxfer_nb.data.volumes.{version}', 99)
        last, m = keys()
        assert last not in (first, other) and m == n + 1
        n, other = m, last

@pytest.mark.parametrize('call, says', [
    (lambda: virtual_ct('virtual-corona', 'train', 1, 48), 'virtual-covid'), (lambda: virtual_ct('virtual-covid', 'training', 1, 48), 'calibrate'),
    (lambda: virtual_ct('virtual-covid', 'train', 0, 48), 'at least 1'), (lambda: virtual_ct('virtual-covid', 'train', 1, 48, task='lobes'), 'covid'),
    (lambda: virtual_case('virtual-covid', 'train', -1), 'at least 0'), (lambda: virtual_case('virtual-covid', 'tests', 0), 'calibrate'),
    (lambda: virtual_case('virtual-covid', 'train', 0, thickness=0.), 'positive')])
def test_errors_say_what_is_allowed(call, says):
    with pytest.raises(ValueError, match=says): call()

SCRIPT = "import sys; from medxfer_nb.data.volumes import virtual_ct as v; c = v('virtual-covid', 'test', 6, 64, cache=sys.argv[1]); print(c.fingerprint())"

def start(folder, **env):
    return subprocess.Popen([sys.executable, '-u', '-c', SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True, env=dict(os.environ, **env))

def test_killed_render_leaves_nothing_half_written(tmp_path, anatomy):
    p = start(tmp_path)
    assert p.stdout.readline().startswith('rendering')
    while not list(tmp_path.glob('*.part.npy')): time.sleep(.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not [f for f in tmp_path.glob('*.npy') if '.part' not in f.name]
    s = virtual_ct('virtual-covid', 'test', 6, 64, cache=tmp_path)
    assert not list(tmp_path.glob('*.part*')) and s.pixels.max() > 0

def test_two_processes_render_once_whatever_their_threads(tmp_path, anatomy):
    both = [start(tmp_path, OMP_NUM_THREADS=t) for t in '12']
    lines = [p.communicate()[0].splitlines() for p in both]
    assert sum(l.startswith('rendering') for ls in lines for l in ls) == 1
    assert lines[0][-1] == lines[1][-1]
    assert virtual_ct('virtual-covid', 'test', 6, 64, cache=tmp_path/'other').fingerprint() == lines[0][-1]

@pytest.mark.parametrize('harm', ['flip', 'truncate', 'no card', 'broken card'])
def test_damaged_pool_is_rendered_again(tmp_path, harm):
    before = virtual_ct('virtual-covid', 'valid', 1, 32, cache=tmp_path).fingerprint()
    file = next(tmp_path.glob('*.npy'))
    data = bytearray(file.read_bytes())
    data[-100] ^= 64
    {'flip': lambda: file.write_bytes(data), 'truncate': lambda: file.write_bytes(data[:500]),
     'no card': file.with_suffix('.json').unlink, 'broken card': lambda: file.with_suffix('.json').write_text('{')}[harm]()
    said = []
    for _ in range(2): assert virtual_ct('virtual-covid', 'valid', 1, 32, cache=tmp_path, progress=said.append).fingerprint() == before
    assert len(said) == 1

def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr('medxfer_nb.data.volumes.render_ct', lambda *a: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError): virtual_ct('virtual-covid', 'valid', 1, 32, cache=tmp_path)
    assert not list(tmp_path.glob('*.npy')) and not list(tmp_path.glob('*.json'))
