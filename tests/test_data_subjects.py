"Virtual brains: template, warps, tumours, images, files, and the cache under faults"
from dataclasses import replace
import numpy as np, pytest, torch
from scipy import ndimage
from scipy.interpolate import BSpline
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from medxfer_nb.data import subjects
from medxfer_nb.data.assets import fetch
from medxfer_nb.data.brain import TUMOUR_MODALITIES, BrainError, parcellate, rank_normalise, read_brats, read_hcp
from medxfer_nb.data.ct import read_nifti
from medxfer_nb.data.subjects import (CEREBRAL_WHITE, FLUID, FRAME, PURPOSES, SUBJECT_COHORTS, TISSUES, TUMOUR, BrainScene, Subject, acquire, arrival,
                                      draw_tumour, grow, load_atlas, paint, push_aside, render_subject, subject_points, tumour_sites,
                                      virtual_brain_case, virtual_brains, widen_ventricles, write_brats_folder, write_hcp_folder)

HCP, TUMOURS = SUBJECT_COHORTS.values()
STILL = replace(HCP, elastic=(0., 0.), scale=(1., 0.), aged=(0., 0.))

def dice(a, b): return 2 * (a & b).sum() / (a.sum() + b.sum())

@pytest.fixture(scope='module')
def rendered():
    "Four subjects with tumours at 32 voxels: images, labels, ids"
    return [render_subject(Subject(TUMOURS, 'calibrate', i), 32) for i in range(4)]

def grown(i, n=48, **changes):
    "Scene and tumour of a subject"
    s = Subject(replace(TUMOURS, **changes), 'train', i)
    t = draw_tumour(s)
    scene = BrainScene(push_aside(subject_points(s, n), t))
    grow(scene, t, s.seed('growth'))
    return scene, t

def test_template_keeps_the_labels_and_adds_fluid_alone():
    stored, ids = read_nifti(fetch('freesurfer-labels'))[0], load_atlas().ids.int().numpy()
    own = ids[tuple(slice(8, 8 + n) for n in stored.shape)]
    np.testing.assert_array_equal(own[stored > 0], stored[stored > 0])
    assert set(np.unique(ids[np.pad(stored, [(8, m - n - 8) for n, m in zip(stored.shape, ids.shape)]) == 0])) == {0, 24}
    holes = ndimage.binary_fill_holes(ids > 0) & (ids == 0)
    assert holes.sum() < 100 and .15e6 < (ids == 24).sum() < .4e6 and all(n % 4 == 0 for n in ids.shape)

def test_fields_are_splines():
    scene, knots = BrainScene(subject_points(Subject(HCP, 'test', 0), 40)), 9
    c = np.random.default_rng(3).standard_normal((knots,) * 3)
    basis = BSpline.design_matrix((np.arange(40) + .5) / 40 * (knots - 3), np.arange(-3, knots + 1), 3).toarray()
    expected = 3 * np.einsum('zi,yj,xk,ijk->zyx', basis, basis, basis, c)[scene.inside.numpy()]
    np.testing.assert_allclose(scene.field(np.random.default_rng(3), knots).numpy(), expected, atol=1e-4)

def test_every_structure_has_one_tissue():
    members = [i for ids, *_ in TISSUES.values() for i in ids]
    assert len(members) == len(set(members)) and set(np.unique(load_atlas().ids.int())) - {0} <= set(members)
    assert all(len(row) == 1 + len(TUMOUR_MODALITIES) for row in (*TISSUES.values(), *TUMOUR.values()))

def test_unwarped_subject_is_the_template(monkeypatch):
    monkeypatch.setattr(subjects, '_rotation', lambda degrees: torch.eye(3))
    s, a = Subject(STILL, 'test', 0), load_atlas()
    at = subject_points(s, 44)
    shift = s.seed('body')
    shift.normal(0, (3, 3, 6))
    offset = a.centre.numpy() + shift.normal(0, 2, 3) - FRAME / 2
    expected = np.stack(np.meshgrid(*[(np.arange(44) + .5) * FRAME / 44] * 3, indexing='ij'), -1) + offset
    np.testing.assert_allclose(at.numpy(), expected, atol=1e-3)
    index = np.floor(expected).astype(int)
    inside = ((index >= 0) & (index < a.ids.shape)).all(-1)
    ids = np.where(inside, a.ids.numpy()[tuple(np.moveaxis(np.where(inside[..., None], index, 0), -1, 0))], 0)
    scene = BrainScene(at)
    np.testing.assert_array_equal(scene.spread(scene.ids).numpy(), ids)

def test_warps_do_not_fold_and_brains_fit_the_frame():
    for c in (HCP, TUMOURS):
        for i in range(4):
            at = subject_points(Subject(c, c.splits[0], i), 44)
            d = torch.stack([torch.diff(at, dim=k)[:43, :43, :43] for k in range(3)], -1)
            assert torch.det(d).min() > 0
            inside = BrainScene(at).inside
            shell = inside.clone()
            shell[1:-1, 1:-1, 1:-1] = False
            assert shell.sum() < .01 * inside.sum() and .9e6 < inside.sum() * (FRAME / 44)**3 < 1.7e6

def test_arrival_is_the_shortest_path_of_dijkstra(monkeypatch):
    slow = torch.from_numpy(np.random.default_rng(0).choice([1., 3., 15.], (7, 8, 6)).astype(np.float32))
    monkeypatch.setattr(subjects, '_slowness', lambda: slow)
    site = (14., 18., 10.)                                   # the middle of cube (3,4,2)
    place, cost = np.argwhere(np.ones(slow.shape)), slow.numpy().ravel()
    step = np.linalg.norm(place[:, None] - place, axis=-1)
    a, b = np.nonzero((step > 0) & (step < 1.8))
    graph = coo_array((2 * step[a, b] * (cost[a] + cost[b]), (a, b)), shape=(len(place),) * 2).tocsr()
    apart = np.linalg.norm(4 * place + 2 - np.array(site), axis=1)
    start = np.flatnonzero(apart < 8)
    brute = (dijkstra(graph, indices=start) + (apart[start] * cost[start])[:, None]).min(0)
    np.testing.assert_allclose(arrival((site,)).numpy().ravel(), brute, rtol=1e-5)

def test_arrival_follows_white_matter():
    site = tuple(tumour_sites()[1000].tolist())
    time, ids = arrival((site,)), load_atlas().ids
    at = torch.stack(torch.meshgrid(*(4 * torch.arange(n) + 2. for n in time.shape), indexing='ij'), -1)
    apart = (at - torch.tensor(site)).norm(dim=-1)
    middle, ring = ids[2::4, 2::4, 2::4].numpy(), ((apart > 30) & (apart < 50)).numpy()
    means = [float((time / apart)[ring & np.isin(middle, k)].mean()) for k in (CEREBRAL_WHITE, (*range(1000, 1036), *range(2000, 2036)), FLUID)]
    assert (time >= .9 * apart - 1e-3).all() and 1 <= means[0] < means[1] < means[2]
    both = arrival((site, tuple(tumour_sites()[2000].tolist())))
    assert (both <= time).all()

def test_tumours_have_the_volumes_that_were_drawn():
    for i in range(6):
        scene, t = grown(i)
        cm3 = [np.isin(scene.tumour, k).sum() * scene.mm3 / 1000 for k in ((1, 2, 4), (1, 4), (4,))]
        wanted = t.volume, t.volume * t.core, t.volume * t.core * t.rim
        np.testing.assert_allclose(cm3, wanted, atol=3 * scene.mm3 / 1000 + .002 * t.volume)
        assert not scene.tumour[torch.from_numpy(np.isin(scene.ids, FLUID))].any()
        assert set(scene.parts) == {'edema', 'enhancing rim', 'necrosis'} if t.rim else {'edema', 'non-enhancing core'}
        assert all(w.min() >= 0 and w.max() <= 1 for w in scene.parts.values())

def test_edema_runs_along_white_matter_and_the_rim_surrounds_the_core():
    inside, around, white, gray = [], [], 0, 0
    for i in range(8):
        scene, t = grown(i)
        if not t.rim: continue
        cube = scene.spread(scene.tumour).numpy()
        depth = ndimage.distance_transform_edt(np.isin(cube, (1, 4)))
        inside.append(depth[cube == 1].mean())
        around.append(depth[cube == 4].mean())
        site = torch.tensor(t.sites)
        near = torch.stack([(scene.place - s).norm(dim=1) for s in site]).amin(0) < 45
        is_white = torch.from_numpy(np.isin(scene.ids, CEREBRAL_WHITE))
        is_gray = torch.from_numpy(parcellate(scene.ids.numpy()) == 2)
        white += float((scene.tumour == 2)[near & is_white].float().mean())
        gray += float((scene.tumour == 2)[near & is_gray].float().mean())
    assert np.mean(inside) > 1.3 * np.mean(around) and white > 1.5 * gray

def test_some_do_not_enhance():
    drawn = [draw_tumour(Subject(TUMOURS, 'train', i)) for i in range(300)]
    assert .05 < np.mean([t.rim == 0 for t in drawn]) < .2 and draw_tumour(Subject(HCP, 'task1', 0)) is None
    assert all(TUMOURS.rim[0] <= t.rim <= TUMOURS.rim[1] for t in drawn if t.rim)
    i = next(i for i, t in enumerate(drawn) if t.rim == 0)
    assert set(np.unique(render_subject(Subject(TUMOURS, 'train', i), 32)[1])) == {0, 1, 2}

def test_mass_effect_moves_outwards_near_the_core_alone():
    s = Subject(TUMOURS, 'train', 3)
    t = replace(draw_tumour(s), push=.4)
    at, site = subject_points(s, 48), torch.tensor(t.sites[0])
    moved = push_aside(at, t)
    before, after = (at - site).norm(dim=-1), (moved - site).norm(dim=-1)
    assert (after <= before + 1e-4).all() and (before - after).max() > 2      # the template is looked up nearer to the centre
    assert torch.equal(moved[before > 120], at[before > 120]) and torch.equal(push_aside(at, replace(t, push=0.)), at)
    d = torch.stack([torch.diff(moved, dim=k)[:47, :47, :47] for k in range(3)], -1)
    assert torch.det(d).min() > 0

def test_ventricles_widen_into_white_matter():
    s = Subject(replace(HCP, aged=(5., 5.)), 'test', 1)
    young, old = (BrainScene(subject_points(s, 64)) for _ in range(2))
    widen_ventricles(old, s)
    changed = young.ids != old.ids
    assert np.isin(old.ids[changed], (4, 43)).all() and np.isin(young.ids[changed], CEREBRAL_WHITE).all()
    lateral = [np.isin(v.ids, (4, 43)).sum() for v in (young, old)]
    assert 1.3 * lateral[0] < lateral[1]
    right = old.place[:, 2] < load_atlas().centre[2]
    assert set(old.ids[changed & right].tolist()) == {43} and set(old.ids[changed & ~right].tolist()) == {4}

def test_signals_are_those_of_the_tissues():
    exact = replace(TUMOURS, spread=0., texture=0., mimics=0., visible=(1., 1.))
    s = Subject(exact, 'train', 1)
    scene = BrainScene(subject_points(s, 48))
    t = draw_tumour(s)
    healthy = paint(scene, s)
    for name, (ids, *signal) in TISSUES.items():
        at = torch.from_numpy(np.isin(scene.ids, ids))
        if at.any(): np.testing.assert_allclose(healthy[:, at].mean(1), signal, atol=1e-5)
    grow(scene, t, s.seed('growth'))
    sick, sure = paint(scene, s), {k: w > .99 for k, w in scene.parts.items()}
    np.testing.assert_allclose(sick[:, sure['necrosis']].mean(1), TUMOUR['necrosis'][1:], atol=.02)
    only = sure['edema'] & (scene.parts['enhancing rim'] < .001)
    np.testing.assert_allclose(sick[:, only].mean(1), TUMOUR['edema'][1:], atol=.02)
    far = torch.stack(list(scene.parts.values())).amax(0) < 1e-7
    np.testing.assert_allclose(sick[:, far], healthy[:, far], atol=1e-5)

def test_knobs_of_difficulty_leave_the_labels_alone():
    s = Subject(TUMOURS, 'test', 0)
    _, labels, ids = render_subject(s, 32)
    images, same, _ = render_subject(replace(s, cohort=replace(TUMOURS, visible=(0., 0.), spread=0., texture=0., mimics=0., bias=0., noise=(0., 0.))), 32)
    np.testing.assert_array_equal(labels, same)
    flair, white = images[3], parcellate(ids) == 9
    assert abs(flair[(labels == 2) & white].mean() / flair[(labels == 0) & white].mean() - 1) < .15   # invisible
    seen = render_subject(replace(s, cohort=replace(TUMOURS, visible=(1., 1.))), 32)[0][3]
    assert seen[(labels == 2) & white].mean() > 1.4 * seen[(labels == 0) & white].mean()

def test_rician_noise_and_background():
    s, inside = Subject(replace(HCP, noise=(.1, .1), bias=0.), 'test', 0), torch.zeros(40, 40, 40, dtype=torch.bool)
    inside[5:35, 5:35, 5:35] = True
    for level, mean in ((1., np.sqrt(1 + .01)), (.02, .1 * np.sqrt(np.pi / 2) * 1.01)):   # bright: about sqrt(A²+s²); dark: a Rayleigh mean
        image = acquire(level * inside.float()[None], inside, s, 40)[0]
        assert (image[~inside.numpy()] == 0).all() and (image[inside.numpy()] > 0).all()
        assert image[inside.numpy()].mean() / 1000 == pytest.approx(mean, rel=.02)

def test_images_and_labels(rendered):
    for images, labels, ids in rendered:
        assert images.shape == (4, 32, 32, 32) and images.dtype == np.float32 and labels.dtype == np.uint8 and ids.dtype == np.int32
        brain = images[0] > 0
        assert all(((m > 0) == brain).all() for m in images) and np.isfinite(images).all() and .15 < brain.mean() < .4
        assert set(np.unique(labels)) <= {0, 1, 2, 4} and (labels == 2).any() and (labels[~brain] > 0).mean() < .01
        assert ndimage.binary_fill_holes(brain).sum() - brain.sum() < 5

def test_classes_are_a_majority_and_ids_belong_to_them():
    s = Subject(HCP, 'task2', 4)
    _, classes, ids = render_subject(s, 32)
    scene = BrainScene(subject_points(s, 96))
    widen_ventricles(scene, s)
    fine = parcellate(scene.spread(scene.ids).numpy()).reshape(32, 3, 32, 3, 32, 3).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 27)
    brute = np.array([np.bincount(v, minlength=15).argmax() for v in fine]).reshape(classes.shape)
    np.testing.assert_array_equal(classes, brute)
    np.testing.assert_array_equal(parcellate(ids), classes)
    assert len(np.unique(ids)) > 60 and set(np.unique(classes)) == set(range(15))

def test_regions_of_a_coarse_tumour_are_nested_halves():
    s = Subject(TUMOURS, 'train', 2)
    _, labels, _ = render_subject(s, 32)
    t = draw_tumour(s)
    scene = BrainScene(push_aside(subject_points(s, 96), t))
    widen_ventricles(scene, s)
    grow(scene, t, s.seed('growth'))
    fine = scene.spread(scene.tumour).numpy().reshape(32, 3, 32, 3, 32, 3)
    for region in ((4,), (1, 4), (1, 2, 4)):
        np.testing.assert_array_equal(np.isin(labels, region), np.isin(fine, region).mean((1, 3, 5)) >= .5)

def test_size_changes_the_resolution_alone():
    s = Subject(TUMOURS, 'calibrate', 2)
    (_, small, _), (_, large, _) = (render_subject(s, n) for n in (24, 48))
    assert dice((small > 0).repeat(2, 0).repeat(2, 1).repeat(2, 2), large > 0) > .8

def test_tumour_and_warp_have_seeds_of_their_own():
    s, other = Subject(TUMOURS, 'test', 1), replace(TUMOURS, volume=(0., 0.))
    _, labels, ids = render_subject(s, 32)
    _, classes, healthy = render_subject(replace(s, cohort=replace(TUMOURS, core=(.9, .9), volume=(40., 41.))), 32)
    assert dice(parcellate(ids) == 9, parcellate(healthy) == 9) > .9       # the same anatomy but for the mass effect
    assert torch.equal(subject_points(s, 16), subject_points(replace(s, cohort=other), 16))
    first = [draw_tumour(Subject(TUMOURS, k, 0)).volume for k in TUMOURS.splits]
    assert len(set(first)) == len(first)

def test_every_subject_and_purpose_draws_for_itself():
    everyone = [Subject(c, s, i) for c in (HCP, TUMOURS) for s in c.splits for i in range(5)]
    draws = [s.seed(p).random() for s in everyone for p in PURPOSES]
    assert len(set(draws)) == len(draws) and len({s.code for s in everyone}) == len(everyone)

def test_pool(tmp_path, rendered):
    said = []
    b = virtual_brains('virtual-tumours', 'calibrate', 2, 32, cache=tmp_path, progress=said.append)
    assert len(b) == 2 and b.modalities == TUMOUR_MODALITIES and b.spacing == (5.5,) * 3 and len(said) == 1
    for i in range(2):
        np.testing.assert_array_equal(b.images[i], rank_normalise(rendered[i][0]).astype(np.float16))
        np.testing.assert_array_equal(b.labels[i], rendered[i][1])
        assert b.patients[i] == Subject(TUMOURS, 'calibrate', i).code and b.images[i].max() == 1
    assert isinstance(b.images.base, np.memmap) or isinstance(b.images, np.memmap)
    more = virtual_brains('virtual-tumours', 'calibrate', 3, 32, cache=tmp_path)
    np.testing.assert_array_equal(more.images[:2], b.images)
    virtual_brains('virtual-tumours', 'calibrate', 2, 32, cache=tmp_path, progress=said.append)
    assert len(said) == 1

def test_keys_name_all_that_decides(tmp_path, monkeypatch):
    def made():
        virtual_brains('virtual-hcp', 'test', 1, 16, cache=tmp_path)
        return virtual_brain_case('virtual-hcp', 'test', 0, 16).fingerprint(), len(list(tmp_path.glob('*.npy')))
    fingerprints, n = made()
    fingerprints = {fingerprints}
    for target, value in ((('SUBJECT_VERSION',), 99), (('FILMS_VERSION',), 99), (('SUBJECT_COHORTS', 'virtual-hcp'), replace(HCP, noise=(.1, .2)))):
        if len(target) == 1: monkeypatch.setattr(subjects, target[0], value)
        else: monkeypatch.setitem(SUBJECT_COHORTS, target[1], value)
        fingerprint, n_ = made()
        assert fingerprint not in fingerprints and n_ == n + 1
        fingerprints.add(fingerprint)
        n = n_

def test_files_and_back(tmp_path):
    brats = read_brats(write_brats_folder(tmp_path/'brats', 2, 24))
    online = read_brats(write_brats_folder(tmp_path/'online', 1, 24, split='online', labelled=False))
    hcp = read_hcp(write_hcp_folder(tmp_path/'hcp', 1, 24))
    assert (len(brats), len(online), len(hcp)) == (2, 1, 1) and len({c.patient for c in brats}) == 2
    for cases, where in ((brats, ('virtual-tumours', 'train')), (online, ('virtual-tumours', 'online')), (hcp, ('virtual-hcp', 'task1'))):
        for i, c in enumerate(cases):
            virtual = virtual_brain_case(*where, i, size=24)
            (images, labels, grid), (images_, labels_, grid_) = c.load(), virtual.load()
            assert np.abs(images - images_).max() <= .501 and ((images > 0) == (images_ > 0)).all() and grid.fits(grid_) and c.modalities == virtual.modalities
            if cases is online: assert labels is None
            else: np.testing.assert_array_equal(labels, labels_)

@pytest.mark.parametrize('call, says', [
    (lambda: virtual_brains('virtual-ms', 'train', 1, 32), 'virtual-tumours'), (lambda: virtual_brains('virtual-hcp', 'train', 1, 32), 'task1'),
    (lambda: virtual_brains('virtual-hcp', 'test', 0, 32), 'at least 1'), (lambda: virtual_brains('virtual-hcp', 'test', 1, 8), 'at least 16'),
    (lambda: virtual_brain_case('virtual-hcp', 'test', -1), 'from 0'), (lambda: virtual_brain_case('virtual-tumours', 'task1', 0), 'online')])
def test_errors_say_what_is_allowed(call, says):
    with pytest.raises(BrainError, match=says): call()

def test_threads_change_nothing(tmp_path):
    threads, found = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        try: found.append(virtual_brains('virtual-hcp', 'task2', 2, 16, cache=tmp_path/str(n)).fingerprint())
        finally: torch.set_num_threads(threads)
    assert found[0] == found[1]

@pytest.mark.parametrize('harm', ['flip', 'truncate', 'no card', 'broken card'])
def test_damaged_pool_is_rendered_again(tmp_path, harm):
    before = virtual_brains('virtual-hcp', 'test', 1, 16, cache=tmp_path).fingerprint()
    file = next(tmp_path.glob('*.npy'))
    data = bytearray(file.read_bytes())
    data[-100] ^= 64
    {'flip': lambda: file.write_bytes(data), 'truncate': lambda: file.write_bytes(data[:500]),
     'no card': file.with_suffix('.json').unlink, 'broken card': lambda: file.with_suffix('.json').write_text('{')}[harm]()
    said = []
    for _ in range(2): assert virtual_brains('virtual-hcp', 'test', 1, 16, cache=tmp_path, progress=said.append).fingerprint() == before
    assert len(said) == 1

@pytest.mark.parametrize('fault', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_interrupted_render_leaves_nothing_behind(tmp_path, monkeypatch, fault):
    def second(subject, size):
        if subject.number: raise fault
        return render_subject(subject, size)
    with monkeypatch.context() as m:
        m.setattr(subjects, 'render_subject', second)
        with pytest.raises(type(fault)): virtual_brains('virtual-hcp', 'test', 2, 16, cache=tmp_path)
    assert not list(tmp_path.glob('*.npy')) and not list(tmp_path.glob('*.json'))
    assert len(virtual_brains('virtual-hcp', 'test', 2, 16, cache=tmp_path)) == 2
