"Brains: the publishers' layouts, ranks against scipy and brute force, boxes and resampling, splits, the cache under faults, loaders inside fastai"
import json, math
from dataclasses import replace
from itertools import product

import nibabel as nib, numpy as np, pandas as pd, pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from PIL import Image
from scipy import ndimage

from medxfer_nb.data.brain import (CLASSES14, FREESURFER, PORTIONS, REGIONS, TUMOUR_MODALITIES, UNCLASSED, BrainCase, BrainError, BrainLoader, Brains,
                                   BrainSet, brain_eval_loader, brain_loaders, load_brain, parcellate, portion_counts, rank_normalise,
                                   read_brain_decathlon, read_brats, read_hcp, region_masks, regions_to_labels, split_brats, split_hcp)
from medxfer_nb.data.brain_prep import (common_foreground, crop, fit_box, make_brains, n4, prepare, read_scores, resize_labels, resize_volume,
                                        uncrop, write_submission)
from medxfer_nb.data.ct import Grid, read_nifti, save_nifti
from medxfer_nb.transfer.stages import seed_epoch

SIZE, SPACING = (9, 10, 11), (1.5, 1., .8) # (Z,Y,X), mm
GRID = Grid.plain(SIZE, SPACING)

def image(seed=0, size=SIZE, margin=2): # whole numbers, background 0
    out, rng = np.zeros(size, 'int16'), np.random.default_rng(seed)
    inside = tuple(slice(margin, n - margin) for n in size)
    out[inside] = rng.integers(1, 50, out[inside].shape)
    return out

def tumour(seed=0, size=SIZE): return np.random.default_rng(seed).choice([0, 1, 2, 4], size).astype('uint8')

def put(path, array, grid=GRID):
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_nifti(array, grid, path)

def refuses(call, *words):
    with pytest.raises(BrainError) as e: call()
    for w in words: assert str(w) in str(e.value), e.value
    return str(e.value)

def brains(n=5, size=(8, 9, 10), m=2, **kwargs):
    rng = np.random.default_rng(0)
    return Brains(rng.random((n, m, *size)).astype('float16'), rng.integers(0, 15, (n, *size)).astype('uint8'), np.arange(n), (1., 1., 1.),
                  ('T1', 'T2', 'FLAIR')[:m], **kwargs)


# ---- classes and regions

def test_freesurfer_table():
    table = {1: '8 47', 3: '10 49', 4: '18 54 31 63', 5: '11 50', 6: '13 52', 7: '24', 8: '7 46', 9: '2 41 77 251 252 253 254 255', 10: '17 53',
             11: '4 5 14 15 43 44', 12: '12 51', 13: '28 60', 14: '16'} # data set paper, apart from the cortex
    for c, ids in table.items(): assert {i for i, k in FREESURFER.items() if k == c} == set(map(int, ids.split()))
    assert {i for i, k in FREESURFER.items() if k == 2} == {3, 42, 26, 58} | {h + i for h in (1000, 2000) for i in range(36)}
    assert CLASSES14[1] == 'cerebellum gray matter' and CLASSES14[14] == 'brainstem' and list(CLASSES14) == list(range(1, 15))

@pytest.mark.parametrize('dtype', ['uint16', 'int32', 'int64', 'float32'])
def test_parcellate(dtype):
    ids = np.random.default_rng(0).choice([0, *FREESURFER, *UNCLASSED], (7, 8, 9)).astype(dtype)
    out = parcellate(ids)
    assert out.dtype == np.uint8 and np.array_equal(out, np.vectorize(lambda i: FREESURFER.get(int(i), 0))(ids))
    assert parcellate(np.zeros((2, 0, 3), dtype)).shape == (2, 0, 3)

def test_parcellate_refuses():
    for i in (-3, 9, 1036, 2036, 3001, 11101, 70000): refuses(lambda: parcellate(np.array([2, i]), 'x.mgz'), 'x.mgz', i, 'wmparc')
    refuses(lambda: parcellate([1.5]), 'no whole numbers'); refuses(lambda: parcellate([np.nan]), 'no whole numbers')

def test_regions_by_set_algebra():
    assert REGIONS['tumour'] == {'ET': (4,), 'TC': (1, 4), 'WT': (1, 2, 4)}
    assert {**REGIONS['labels 1:7'], **REGIONS['labels 8:14']} == REGIONS['labels 1:14'] == {name: (c,) for c, name in CLASSES14.items()}
    labels = tumour(size=(2, 3, *SIZE))
    masks = region_masks(labels, REGIONS['tumour'])
    assert masks.shape == (2, 3, 3, *SIZE) and masks.dtype == bool
    for k, values in enumerate(REGIONS['tumour'].values()): assert np.array_equal(masks[:, :, k], sum(labels == v for v in values) > 0)
    t = region_masks(torch.from_numpy(labels), REGIONS['tumour'])
    assert t.dtype == torch.bool and np.array_equal(t.numpy(), masks)
    assert np.array_equal(regions_to_labels(masks), labels)
    assert (~masks[:, :, 0] | masks[:, :, 1]).all() and (~masks[:, :, 1] | masks[:, :, 2]).all()

def test_regions_to_labels_nests():
    for et, tc, wt in product([False, True], repeat=3):
        want = 0 if not wt else 2 if not tc else 4 if et else 1
        assert regions_to_labels(np.array([et, tc, wt]).reshape(3, 1, 1, 1)).item() == want
    refuses(lambda: regions_to_labels(np.zeros((3, 2, 2, 2))), 'ET, TC, WT'); refuses(lambda: regions_to_labels(np.zeros((2, 2, 2, 2), bool)), 'ET, TC, WT')
    refuses(lambda: region_masks(tumour(), {}), 'no regions')


# ---- ranks

@pytest.mark.parametrize('dtype', ['int16', 'float32', 'float64'])
def test_ranks_by_counting(dtype):
    x = image(3).astype(dtype)
    inside = x != 0
    v = x[inside]
    want = [((v < a).sum() + ((v == a).sum() + 1) / 2) / len(v) for a in v]
    out = rank_normalise(x)
    np.testing.assert_allclose(out[inside], want, rtol=1e-6)
    assert (out[~inside] == 0).all() and out.dtype == np.float32 and 0 < out[inside].min() and out.max() <= 1

def test_ranks_are_invariant():
    x = np.where(image() > 0, np.random.default_rng(0).random(SIZE) + .01, 0)
    for f in (np.log, np.exp, np.cbrt, lambda a: 1e-6*a - 4, lambda a: 3*a**3 + 2):
        mapped = np.zeros(SIZE)
        mapped[x > 0] = f(x[x > 0])
        assert np.array_equal(rank_normalise(mapped), rank_normalise(x))
    n = np.count_nonzero(x)
    assert np.allclose(np.sort(rank_normalise(x)[x > 0]), np.arange(1, n + 1) / n)
    again = rank_normalise(x)
    assert np.array_equal(rank_normalise(again), again) # ranks of ranks
    both = np.stack([x, -x])
    np.testing.assert_allclose(rank_normalise(both)[1][x > 0], 1 + 1/n - again[x > 0], atol=1e-6) # one modality does not see the other

def test_ranks_at_the_edge():
    assert rank_normalise(np.zeros((2, 2, 2))).sum() == 0
    assert rank_normalise(np.full((2, 2, 2), 7.)).tolist() == np.full((2, 2, 2), 9/16).tolist()
    refuses(lambda: rank_normalise(np.array([1, np.inf])), 'no numbers')
    assert (rank_normalise(np.arange(1, 2_000_001).reshape(1, 1000, 2000)).astype('float16') > 0).all() # survives half precision


# ---- the publishers' layouts

def brats(root, names=('HGG/Brats18_B_1_1', 'LGG/Brats18_A_3_1'), seg=True, parts=('t1', 't1ce', 't2', 'flair')):
    for i, name in enumerate(names):
        stem = name.split('/')[-1]
        for k, part in enumerate(parts): put(root/name/f'{stem}_{part}.nii.gz', image(10*i + k))
        if seg: put(root/name/f'{stem}_seg.nii.gz', tumour(i))
    return root

def test_read_brats(tmp_path):
    (tmp_path/'survival_data.csv').write_text('x')
    cases = read_brats(brats(tmp_path))
    assert [c.subject for c in cases] == ['Brats18_A_3_1', 'Brats18_B_1_1'] and [c.patient for c in cases] == ['Brats18_A_3', 'Brats18_B_1']
    x, y, grid = cases[1].load()
    assert np.array_equal(x, np.stack([image(k) for k in range(4)])) and x.dtype == np.float32 and np.array_equal(y, tumour(0)) and grid.fits(GRID)
    assert cases[0].modalities == TUMOUR_MODALITIES == ('T1', 'T1c', 'T2', 'FLAIR') and cases[0].n4
    assert not any('Brats18' in str(c) or 'Brats18' in c.name for c in cases)
    assert len({c.fingerprint() for c in cases}) == 2 and read_brats(tmp_path)[0].fingerprint() == cases[0].fingerprint()
    assert len(read_brats(tmp_path/'HGG')) == 1

@pytest.mark.parametrize('name, patient', [
    ('Brats17_TCIA_101_1', 'Brats17_TCIA_101'), ('Brats18_2013_2_1', 'Brats18_2013_2'), ('BraTS19_CBICA_AAB_12', 'BraTS19_CBICA_AAB'), ('Virtual_train001_1', 'Virtual_train001'),
    *((n, n) for n in ('BraTS20_Training_001', 'BraTS20_Validation_001', 'BraTS2021_00000', 'BraTS-GLI-00005-100', 'Brats18_2013_2', 'subject_7'))])
def test_who_a_scan_belongs_to(tmp_path, name, patient):
    case, = read_brats(brats(tmp_path, (name,)))
    assert (case.subject, case.patient) == (name, patient)

def test_read_brats_other_axes(tmp_path):
    x = image()
    for part in ('t1', 't1ce', 't2', 'flair'):
        p = tmp_path/'S'/f'S_{part}.nii'
        p.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(x.T[::-1, :, ::-1], np.diag([1., -1, -1, 1])), p)
    case, = read_brats(tmp_path)
    got, labels, grid = case.load()
    assert np.array_equal(got[0], x) and labels is None # RPI file, LPS array

def test_read_brats_names_what_is_missing(tmp_path):
    refuses(lambda: read_brats(tmp_path), 'no BraTS subjects', 'NAME_t1ce.nii.gz'); refuses(lambda: read_brats(tmp_path/'x'), 'no such folder')
    root = brats(tmp_path)
    (root/'HGG/Brats18_B_1_1/Brats18_B_1_1_t2.nii.gz').unlink()
    refuses(lambda: read_brats(root), '1 of 2', 'Brats18_B_1_1: no t2')
    brats(tmp_path, names=('HGG/Brats18_B_1_1',), seg=False)
    (root/'HGG/Brats18_B_1_1/Brats18_B_1_1_seg.nii.gz').unlink()
    refuses(lambda: read_brats(root), 'no seg')
    brats(tmp_path, names=('HGG/Brats18_A_3_1',))
    brats(tmp_path, names=('HGG/Brats18_B_1_1',))
    refuses(lambda: read_brats(root), 'Brats18_A_3_1 in several folders')

def test_cases_that_contradict_themselves(tmp_path):
    a = put(tmp_path/'a.nii.gz', image())
    for b, words in ((put(tmp_path/'b.nii.gz', image(size=(9, 10, 12)), Grid.plain((9, 10, 12), SPACING)), ['(9, 10, 12) voxels']),
                     (put(tmp_path/'c.nii.gz', image(), Grid.plain(SIZE, SPACING, (0, 3, 0))), ['does not lie on', '3 mm apart']),
                     (put(tmp_path/'d.nii.gz', 0*image()), ['d.nii.gz: all voxels are 0']),
                     (put(tmp_path/'e.nii.gz', image() + 1), ['e.nii.gz', '100%', 'strip the skull']),
                     (put(tmp_path/'f.nii.gz', np.where(image() == 7, np.nan, image())), ['f.nii.gz', 'no numbers'])):
        refuses(lambda: load_brain((a, b)), *words)
        if b.name in 'b.nii.gz c.nii.gz': refuses(lambda: load_brain((a,), b), *words)
    (tmp_path/'g.nii.gz').write_bytes(a.read_bytes()[:60])
    refuses(lambda: load_brain((a, tmp_path/'g.nii.gz')), 'g.nii.gz', 'cannot read')
    refuses(lambda: load_brain((a,), put(tmp_path/'h.nii.gz', 5000 + image())), 'h.nii.gz', 'aparc+aseg')
    (tmp_path/'i.mgz').write_bytes(b'no')
    refuses(lambda: load_brain((a,), tmp_path/'i.mgz'), 'i.mgz', 'cannot read as a FreeSurfer volume')

ABOUT = dict(modality={'0': 'FLAIR', '1': 'T1w', '2': 't1gd', '3': 'T2w'}, labels={'0': 'background', '1': 'edema', '2': 'non-enhancing tumor', '3': 'enhancing tumour'},
             training=[dict(image='./imagesTr/BRATS_001.nii.gz', label='./labelsTr/BRATS_001.nii.gz')], test=[])

def decathlon(root, about=ABOUT, code=(0, 2, 1, 3)):
    folder = root/'Task01_BrainTumour'
    for d in ('imagesTr', 'labelsTr'): (folder/d).mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.stack([GRID.restore(image(k)) for k in range(4)], -1), GRID.affine), folder/'imagesTr/BRATS_001.nii.gz')
    raw = np.zeros(5, 'uint8')
    raw[[0, 1, 2, 4]] = code
    put(folder/'labelsTr/BRATS_001.nii.gz', raw[tumour()])
    (folder/'dataset.json').write_text(json.dumps(about))
    return folder

def test_read_brain_decathlon(tmp_path):
    folder = decathlon(tmp_path)
    for root in (tmp_path, folder):
        case, = read_brain_decathlon(root)
        x, y, grid = case.load()
        assert np.array_equal(x, np.stack([image(k) for k in (1, 2, 3, 0)])) # T1, T1c, T2, FLAIR
        assert np.array_equal(y, tumour()) and grid.fits(GRID) and case.modalities == TUMOUR_MODALITIES
    other = {**ABOUT, 'modality': {'3': 'FLAIR', '2': 'T1w', '1': 't1gd', '0': 'T2w'},
             'labels': {'0': 'background', '3': 'edema', '1': 'non-enhancing tumour', '2': 'enhancing tumor'}}
    decathlon(tmp_path, other, (0, 1, 3, 2))
    x, y, _ = read_brain_decathlon(folder)[0].load() # dataset.json decides
    assert np.array_equal(x, np.stack([image(k) for k in (2, 1, 0, 3)])) and np.array_equal(y, tumour())

def test_read_brain_decathlon_errors(tmp_path):
    refuses(lambda: read_brain_decathlon(tmp_path), 'no dataset.json')
    folder = decathlon(tmp_path)
    for about in ({**ABOUT, 'modality': {'0': 'CT'}}, {k: v for k, v in ABOUT.items() if k != 'labels'}, [1], {**ABOUT, 'labels': {'0': 'background', '1': 'liver'}}):
        decathlon(tmp_path, about)
        refuses(lambda: read_brain_decathlon(folder), 'not that of Task01')
    decathlon(tmp_path, {**ABOUT, 'training': [dict(image='../../x.nii.gz', label='./labelsTr/BRATS_001.nii.gz')]})
    refuses(lambda: read_brain_decathlon(folder), 'outside the task')
    decathlon(tmp_path, {**ABOUT, 'training': [dict(image='./imagesTr/BRATS_002.nii.gz', label='./labelsTr/BRATS_001.nii.gz')]})
    refuses(lambda: read_brain_decathlon(folder), '1 of the files', 'BRATS_002')
    decathlon(tmp_path)
    put(folder/'imagesTr/BRATS_001.nii.gz', image())
    refuses(read_brain_decathlon(folder)[0].load, '4 images in one 4-D file')

def hcp(root):
    ids = np.random.default_rng(0).choice([0, *FREESURFER], SIZE).astype('int32')
    for name, array in (('T1w_acpc_dc_restore_brain', image(0)), ('T2w_acpc_dc_restore_brain', image(1)), ('aparc+aseg', ids)): put(root/'100307'/'T1w'/f'{name}.nii.gz', array)
    for name, array in (('T1w_brain', image(0)), ('T2w', image(1))): put(root/'anna'/f'{name}.nii.gz', array)
    nib.save(nib.MGHImage(GRID.restore(ids), GRID.affine), root/'anna'/'aparc+aseg.mgz')
    (root/'docs').mkdir()
    return ids

def test_read_hcp(tmp_path):
    ids = hcp(tmp_path)
    cases = read_hcp(tmp_path)
    assert [c.subject for c in cases] == ['100307', 'anna'] and [c.name for c in cases] == ['HCP 001', 'HCP 002'] and not cases[0].n4
    for case in cases:
        x, y, grid = case.load()
        assert np.array_equal(x, [image(0), image(1)]) and np.array_equal(y, parcellate(ids)) and grid.fits(GRID) and case.modalities == ('T1', 'T2')
    (tmp_path/'anna/T2w.nii.gz').unlink()
    refuses(lambda: read_hcp(tmp_path), 'anna: no T2', '1 of 2')
    put(tmp_path/'anna/T2w_a.nii.gz', image()), put(tmp_path/'anna/T2w_b.nii.gz', image())
    refuses(lambda: read_hcp(tmp_path), 'T2w_a.nii.gz and T2w_b.nii.gz')
    refuses(lambda: read_hcp(tmp_path/'docs'), 'no subjects', 'aparc+aseg'); refuses(lambda: read_hcp(tmp_path/'x'), 'no such folder')

def test_missing_key():
    with pytest.raises(ValueError, match='neither files nor a key'): BrainCase('x', 'y', None).fingerprint()


# ---- splits

def test_table1():
    assert [portion_counts(p) for p in PORTIONS] == [(8, 2), (16, 4), (215, 40)]
    assert [portion_counts(p, 100) for p in PORTIONS] == [(3, 1), (6, 2), (84, 16)]
    for total in range(3, 500):
        (t4, v4), (t8, v8), (t, v) = (portion_counts(p, total) for p in PORTIONS)
        assert t4 <= t8 and v4 <= v8 and t8 + v8 <= t and t + v == total and min(t4, v4) >= 1
    refuses(lambda: portion_counts('5%'), '4%, 8%, 100%'); refuses(lambda: portion_counts('4%', 2), 'too few')

@pytest.mark.parametrize('n, total', [(285, 255), (255, 255), (484, 255), (100, 100), (12, 12)])
def test_split_brats(n, total):
    s = split_brats(n)
    assert len(s['chosen']) == total and sorted([*s['chosen'], *s['left out']]) == list(range(n)) # reported
    for p in PORTIONS: assert tuple(len(s[p][k]) for k in ('train', 'valid')) == portion_counts(p, total)
    sets = {(p, k): set(s[p][k].tolist()) for p in PORTIONS for k in ('train', 'valid')}
    assert np.array_equal(s['100%']['valid'], s['test']) and sets['100%', 'train'] | set(s['test']) == set(s['chosen'])
    assert sets['4%', 'train'] <= sets['8%', 'train'] and sets['4%', 'valid'] <= sets['8%', 'valid']
    assert sets['8%', 'train'] | sets['8%', 'valid'] <= sets['100%', 'train'] and not sets['8%', 'train'] & sets['8%', 'valid']
    again, other = split_brats(n), split_brats(n, seed=1)
    assert np.array_equal(s['test'], again['test']) and not np.array_equal(s['test'], other['test'])

def test_splits_keep_patients_together():
    cases = [BrainCase(f'c{i}', f'p{i % 70}', None) for i in range(150)]
    who = np.array([c.patient for c in cases])
    s = split_brats(cases, total=60)
    groups = [set(who[s[k]]) for k in ('test', 'left out')] + [set(who[s['100%']['train']])]
    assert [len(g) for g in groups] == [portion_counts('100%', 60)[1], 10, portion_counts('100%', 60)[0]] and len(set.union(*groups)) == 70
    for p in ('4%', '8%'): assert not set(who[s[p]['train']]) & set(who[s[p]['valid']])
    h = split_hcp(cases[:100])
    assert not set(who[h['task 1']['train']]) & set(who[h['task 2']['train']]) and not set(who[h['test']]) & set(who[h['all']['train']])
    refuses(lambda: split_brats(10, total=11), 'there are 10'); refuses(lambda: split_hcp(4), 'too few')

def test_split_hcp():
    s = split_hcp()
    assert [len(s[t][k]) for t in ('task 1', 'task 2', 'all') for k in ('train', 'valid')] == [18, 5, 18, 5, 36, 10] and len(s['test']) == 12
    assert sorted([*s['all']['train'], *s['all']['valid'], *s['test']]) == list(range(58))
    for n in (5, 12, 30): assert sorted([*split_hcp(n)['all']['train'], *split_hcp(n)['all']['valid'], *split_hcp(n)['test']]) == list(range(n))


# ---- bias field, boxes, resampling

def test_n4_removes_a_known_field():
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, 32)]*3, indexing='ij')
    brain, white = (np.hypot(np.hypot(z, y), x) < .95), np.hypot(np.hypot(z, y), x) < .6
    true = np.where(white, 100, 60) * brain + rng.normal(0, 1, brain.shape) * brain
    field = np.exp(.4*x + .2*y*z)
    for scale in (1, 1000):
        out = n4(scale * true * field, shrink=2)
        assert (out[~brain] == 0).all() and out.dtype == np.float32 and np.std(np.log(out[white])) < .3 * np.std(np.log((true*field)[white]))
    left = n4(true * field, white, shrink=2) # another mask, the same voxels corrected
    assert np.std(np.log(left[white])) < .3 * np.std(np.log((true*field)[white])) and (left[brain] > 0).all()
    refuses(lambda: n4(true, shrink=9), 'lower it'); refuses(lambda: n4(0*true), 'empty'); refuses(lambda: n4(true, brain[1:]), 'of its shape')

def test_common_foreground_by_scipy():
    stack = np.zeros((3, 2, 12, 13, 14))
    rng = np.random.default_rng(0)
    for _ in range(4): stack[(rng.integers(3), rng.integers(2), *rng.integers(3, 10, 3))] = rng.normal()
    assert common_foreground(stack) == common_foreground(iter(stack)) == ndimage.find_objects((stack != 0).any((0, 1)).astype(int))[0]

@pytest.mark.parametrize('box', [((2, 7), (3, 9), (1, 11)), ((-3, 8), (-2, 12), (4, 20)), ((0, 9), (0, 10), (0, 11))])
def test_crop_and_back(box):
    x = np.random.default_rng(0).random((2, *SIZE))
    pad = np.pad(x, [(0, 0)] + [(20, 20)]*3)
    want = pad[(slice(None), *(slice(20 + a, 20 + b) for a, b in box))]
    assert np.array_equal(crop(x, box), want)
    kept = np.zeros(SIZE, bool)
    kept[tuple(slice(max(a, 0), b) for a, b in box)] = True
    assert np.array_equal(uncrop(want, box, SIZE), x * kept)
    refuses(lambda: uncrop(want[..., 1:], box, SIZE), 'does not fill'); refuses(lambda: crop(x, ((20, 30),)*3), 'lies outside')

def test_fit_box():
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, extent, spacing, shape = rng.integers(-5, 20, 3), rng.integers(60, 150, 3), rng.uniform(.7, 2, 3), rng.integers(16, 64, 3)
        box = tuple((int(a), int(a + e)) for a, e in zip(start, extent))
        out = fit_box(box, spacing, shape)
        edges = [(b - a) * s / n for (a, b), s, n in zip(out, spacing, shape)]
        assert max(edges) - min(edges) < (spacing / shape).max() and all(c <= a and b <= d for (a, b), (c, d) in zip(box, out))
        assert all(abs((a + b) - (c + d)) <= 1 for (a, b), (c, d) in zip(box, out)) # same middle
        assert any((a, b) == (c, d) for (a, b), (c, d) in zip(box, out))

def test_resize_volume_against_pillow():
    x = np.random.default_rng(0).random((1, 23, 31), dtype='float32')
    for h, w in ((10, 12), (23, 40), (50, 31), (5, 90)):
        pil = np.array(Image.fromarray(x[0]).resize((w, h), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(resize_volume(x, (1, h, w))[0], pil, atol=1e-5)
        np.testing.assert_allclose(resize_volume(x.transpose(1, 0, 2), (h, 1, w))[:, 0], pil, atol=1e-5)
    assert np.array_equal(resize_volume(x, x.shape), x) and not np.shares_memory(resize_volume(x, x.shape), x)
    np.testing.assert_allclose(resize_volume(np.full((2, 7, 8, 9), 3.), (4, 20, 2)), 3, rtol=1e-6)

def test_resize_labels_by_majority():
    labels = np.random.default_rng(0).integers(0, 5, (12, 13, 14)).astype('uint8')
    shape = (5, 8, 20)
    shares = np.stack([resize_volume(labels == c, shape) for c in range(5)])
    np.testing.assert_allclose(shares.sum(0), 1, atol=1e-5)
    assert np.array_equal(resize_labels(labels, shape), shares.argmax(0)) and resize_labels(labels, shape).dtype == np.uint8
    assert np.array_equal(resize_labels(labels, labels.shape), labels)


# ---- brains and their cache

def test_brains():
    b = brains(name='set')
    assert len(b) == 5 and b.shape == (8, 9, 10) and 'set: 5 of 8x9x10' in repr(b)
    assert np.array_equal(b.subset([3, 0]).labels, b.labels[[3, 0]]) and np.array_equal(b.subset(b.patients > 2).images, b.images[3:])
    assert np.shares_memory(b.subset(slice(1, 3)).images, b.images) and len(b.subset([])) == 0 and replace(b, labels=None).subset([1]).labels is None
    changed = [replace(b, images=b.images[::-1]), replace(b, labels=b.labels[::-1]), replace(b, labels=None), replace(b, spacing=(1, 1, 2.)),
               replace(b, modalities=('T1', 'FLAIR')), replace(b, patients=np.array([0, 0, 1, 2, 3])), b.subset([0, 1])]
    assert len({b.fingerprint(), *(c.fingerprint() for c in changed)}) == 8 and replace(b, patients=b.patients + 5, name='x').fingerprint() == b.fingerprint()
    refuses(lambda: replace(b, images=b.images.astype('float32')), 'float16'); refuses(lambda: replace(b, modalities=('T1',)), '(N,1,Z,Y,X)')
    refuses(lambda: replace(b, labels=b.labels.astype('int64')), 'uint8'); refuses(lambda: replace(b, patients=b.patients[1:]), 'patient codes')
    refuses(lambda: replace(b, spacing=(1, 1)), 'three lengths')

def cases(n=4, labelled=True, **kwargs):
    return [BrainCase(f'case {i}', f'Doe-{i//2}', lambda i=i: (np.stack([image(i), image(i + 50)]).astype('float32'), tumour(i) if labelled else None, GRID),
                      key=f'{i} {labelled}', modalities=('T1', 'T2'), subject=f'Brats18_{i}', **kwargs) for i in range(n)]

def make(c, cache, **kwargs): return make_brains(c, cache, progress=kwargs.pop('progress', lambda _: None), **kwargs)

def test_make_brains(tmp_path):
    b = make(cases(), tmp_path, name='made')
    assert b.box == ((2, 7), (2, 8), (2, 9)) and b.shape == (5, 6, 7) and b.patients.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(b.spacing, SPACING)
    cut = tuple(slice(*x) for x in b.box)
    for i in range(4):
        assert np.array_equal(b.images[i], [rank_normalise(image(k)[cut]).astype('float16') for k in (i, i + 50)]) and np.array_equal(b.labels[i], tumour(i)[cut])
    assert isinstance(b.images.base, np.memmap) and not any(b'Doe' in p.read_bytes() or b'Brats18' in p.read_bytes() or 'Doe' in p.name for p in tmp_path.iterdir())
    x, y = next(iter(brain_eval_loader(b, REGIONS['tumour'], 4, device='cpu')))
    assert np.array_equal(x.numpy(), b.images.astype('float32')) and np.array_equal(y.bool().numpy(), region_masks(b.labels, REGIONS['tumour']))

def test_make_brains_at_another_resolution(tmp_path):
    b = make(cases(), tmp_path, shape=(4, 4, 4))
    assert b.images.shape == (4, 2, 4, 4, 4)
    np.testing.assert_allclose(b.spacing, [(z1 - z0) * s / 4 for (z0, z1), s in zip(b.box, SPACING)])
    want, labels = prepare(cases()[2].load()[0], tumour(2), b.box, (4, 4, 4))
    assert np.array_equal(b.images[2], want.astype('float16')) and np.array_equal(b.labels[2], labels)
    online = make(cases(2, False), tmp_path, shape=(4, 4, 4), box=b.box)
    assert online.labels is None and online.box == b.box and online.spacing == b.spacing and np.array_equal(online.images, b.images[:2])

def test_cache_faults(tmp_path):
    said = []
    first = make(cases(), tmp_path, progress=said.append).fingerprint()
    path, = tmp_path.glob('*.npy')
    make(cases(), tmp_path, progress=said.append)
    assert len(said) == 1
    data = bytearray(path.read_bytes()); data[-1] ^= 1
    path.write_bytes(data)
    assert make(cases(), tmp_path, progress=said.append).fingerprint() == first and len(said) == 2
    path.with_suffix('.json').write_text('{')
    assert make(cases(), tmp_path, progress=said.append).fingerprint() == first and len(said) == 3
    for other in (dict(shape=(4, 4, 4)), dict(box=((0, 9), (0, 10), (0, 11)))): make(cases(), tmp_path, **other)
    make(cases(3), tmp_path)
    assert len(list(tmp_path.glob('*.npy'))) == 4
    def broken(): raise OSError('disk')
    with pytest.raises(OSError): make([*cases(2), replace(cases(3)[2], load=broken, key='broken')], tmp_path)
    assert len(list(tmp_path.glob('*.npy'))) == 4 and not list(tmp_path.glob('*part*'))

def test_make_brains_refuses(tmp_path):
    odd = replace(cases(2)[1], load=lambda: (np.ones((2, 3, 3, 3), 'float32'), None, Grid.plain((3, 3, 3), SPACING)), key='odd')
    refuses(lambda: make([], tmp_path), 'no cases'); refuses(lambda: make([cases(1)[0], odd], tmp_path), 'case 1', 'resample all to one grid')
    refuses(lambda: make([cases(1)[0], replace(cases(2)[1], modalities=('T1', 'FLAIR'))], tmp_path), 'different modalities')
    refuses(lambda: make([cases(1)[0], cases(2, False)[1]], tmp_path), 'case 1', 'some have none')
    refuses(lambda: make(cases(2), tmp_path, box=((3, 7),)*3), 'case 0', 'reaches beyond'); refuses(lambda: make(cases(2), tmp_path, shape=(4, 4)), 'shape')

def test_bias_correction_is_chosen_by_the_data(tmp_path, monkeypatch):
    import medxfer_nb.data.brain_prep as prep
    called = []
    monkeypatch.setattr(prep, 'n4', lambda x: called.append(1) or x)
    make(cases(2), tmp_path)
    assert not called
    make(cases(2, n4=True), tmp_path)
    assert len(called) == 4
    make(cases(2, n4=True), tmp_path, bias_correct=False), make(cases(2), tmp_path, bias_correct=True)
    assert len(called) == 4 # the same work is in the cache under the same name


# ---- batches

def test_patches_are_cut_alike():
    b = brains()
    d = BrainSet(b, REGIONS['labels 1:14'], (3, 4, 10))
    x, y = d.batch([4, 0, 2], np.random.default_rng(0).random((3, 3)))
    for i, row in enumerate((4, 0, 2)):
        hits = [(z, v) for z, v in product(range(6), range(6)) if np.array_equal(b.images[row, :, z:z+3, v:v+4], x[i].numpy())]
        assert len(hits) == 1 and np.array_equal(b.labels[row, hits[0][0]:hits[0][0]+3, hits[0][1]:hits[0][1]+4], y[i].numpy())
    refuses(lambda: BrainSet(b, REGIONS['tumour'], (3, 4, 11)), 'does not fit'); refuses(lambda: BrainSet(b, REGIONS['tumour'], (3, 4)), 'does not fit')
    refuses(lambda: BrainSet(b.subset([]), REGIONS['tumour']), 'no subjects'); refuses(lambda: BrainSet(b, {}), 'no regions')

def test_every_place_of_a_patch_is_as_likely():
    b = brains(1, (4, 1, 3), 1)
    b.images[:] = np.arange(12).reshape(4, 1, 3) / 16
    dl = BrainLoader(BrainSet(b, REGIONS['tumour'], (2, 1, 2)), 50, shuffle=True, steps=40, num_workers=0)
    corner = torch.cat([x[:, 0, 0, 0, 0] for x, _ in dl]).mul(16).int().numpy()
    counts = np.bincount(corner, minlength=12).reshape(4, 3)
    assert (counts[3] == 0).all() and (counts[:, 2] == 0).all()
    assert abs(counts[:3, :2] - 2000/6).max() < 5 * math.sqrt(2000/6)

def test_stream_is_seeded_and_endless():
    b = brains()
    make_dls = lambda seed=3: brain_loaders(b.subset(slice(0, 4)), b.subset([4]), REGIONS['labels 1:7'], 3, 4, seed, (4, 4, 4), device='cpu')
    dls = make_dls()
    epochs = [[x for x, _ in dls.train] for _ in range(3)]
    assert all(len(e) == 4 for e in epochs) and dls.train.epoch == 3
    other = make_dls()
    other.train.epoch = 2
    assert all(torch.equal(a, c) for a, c in zip(epochs[2], [x for x, _ in other.train])) and not torch.equal(epochs[0][0], epochs[1][0])
    assert not torch.equal(epochs[0][0], next(iter(make_dls(4).train))[0])
    whole = brain_loaders(b, b, REGIONS['labels 1:7'], 2, 5, device='cpu', augment=False)
    rows = [int((b.images.astype('float32') == i.numpy()).all((1, 2, 3, 4)).argmax()) for x, _ in whole.train for i in x]
    assert sorted(rows[:5]) == sorted(rows[5:]) == list(range(5))
    dls.rng = None
    learn = Learner(make_dls(), torch.nn.Conv3d(2, 7, 1), loss_func=torch.nn.BCEWithLogitsLoss())
    seed_epoch(learn, 5, 2)
    assert learn.dls.train.epoch == 2

def test_augmentation_bends_intensities_only():
    b = brains(3, m=3)
    b.images[:, :, :2] = 0
    b.images[:, :, 2] = 1
    plain, bent = (next(iter(brain_loaders(b, b, REGIONS['labels 1:14'], 3, 1, 0, augment=a, device='cpu').train)) for a in (False, True))
    assert torch.equal(plain[1], bent[1]) and not torch.equal(plain[0], bent[0])
    inside = (plain[0] > 0) & (plain[0] < 1)
    assert torch.equal(bent[0][plain[0] == 0], plain[0][plain[0] == 0]) and torch.equal(bent[0][plain[0] == 1], plain[0][plain[0] == 1])
    gamma = torch.where(inside, bent[0].log() / plain[0].log(), torch.nan)
    seen = [v[~v.isnan()] for v in gamma.flatten(0, 1).flatten(1)]
    assert all(v.std() < 1e-2 for v in seen) and all(.699 <= v.median() <= 1.401 for v in seen) and len({round(v.median().item(), 4) for v in seen}) > 3

def test_mirror_turns_both():
    b = brains(1)
    b.images[:] = b.labels[:, None] / 16
    dl = brain_loaders(b, b, REGIONS['labels 1:14'], 40, 1, mirror=True, device='cpu').train
    x, y = dl.one_batch()
    straight = torch.from_numpy(region_masks(b.labels[0], REGIONS['labels 1:14'])).float()
    turned = [torch.equal(i, straight.flip(-1)) for i in y]
    assert 5 < sum(turned) < 35 and all(t or torch.equal(i, straight) for i, t in zip(y, turned))
    for i, t in zip(x, turned): assert torch.equal((i.flip(-1) if t else i) > 0, torch.from_numpy(b.images[0] > 0))
    assert dl.new().mirror and next(iter(dl.new()))[0].shape == x.shape

def test_loaders_refuse():
    b = brains(name='them')
    refuses(lambda: brain_loaders(b, replace(b, modalities=('T1', 'FLAIR')), REGIONS['tumour']), 'modalities differ')
    refuses(lambda: brain_loaders(replace(b, labels=None), b, REGIONS['tumour']), 'them: no labels')
    refuses(lambda: BrainLoader(BrainSet(b, REGIONS['tumour']), stats=(.5, 1)), '(0, 1)')

def test_a_learner_learns_and_predicts():
    b = brains(6, (8, 8, 8))
    b.images[:, 0] = (b.labels < 8) * b.images[:, 0]
    dls = brain_loaders(b.subset(slice(0, 4)), b.subset([4, 5]), {'first': tuple(range(1, 8)), 'second': tuple(range(8, 15))}, 2, 30, device='cpu')
    learn = Learner(dls, torch.nn.Conv3d(2, 2, 1), loss_func=torch.nn.BCEWithLogitsLoss(), lr=.05)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): before = learn.validate()[0]; learn.fit(2)
    assert learn.validate()[0] < before - .05
    out, y = learn.get_preds(dl=brain_eval_loader(b, dls.train.dataset.regions, 4, device='cpu'))
    assert out.shape == y.shape == (6, 2, 8, 8, 8) and np.array_equal(y[:, 0].bool().numpy(), (b.labels > 0) & (b.labels < 8))
    only, = learn.get_preds(dl=brain_eval_loader(replace(b, labels=None), dls.train.dataset.regions, device='cpu'), with_loss=False)[:1]
    torch.testing.assert_close(only, out, atol=1e-5, rtol=1e-4)


# ---- the leaderboard

@pytest.mark.parametrize('codes', [np.diag([-1., -1, 1, 1]), np.diag([1., 1, 1, 1]), np.array([[0, 2., 0, 5], [-1, 0, 0, 3], [0, 0, -1.5, 1], [0, 0, 0, 1]])])
def test_submission_round_trip(tmp_path, codes):
    stored = np.random.default_rng(0).choice([0, 1, 2, 4], (11, 10, 9)).astype('uint8')
    grid = Grid(stored.shape, codes)
    labels = grid.normalise(stored)
    box = tuple((1, n - 1) for n in grid.size)
    inside = uncrop(crop(labels, box), box, grid.size)
    write_submission(region_masks(crop(labels, box), REGIONS['tumour']), grid, tmp_path/'S.nii.gz', box)
    back = nib.load(tmp_path/'S.nii.gz')
    assert np.array_equal(np.asanyarray(back.dataobj), grid.restore(inside)) and np.allclose(back.affine, codes) and back.get_data_dtype() == np.uint8
    write_submission(.9 * region_masks(labels, REGIONS['tumour']), grid, tmp_path/'S.nii.gz') # probabilities, the whole volume
    assert np.array_equal(np.asanyarray(nib.load(tmp_path/'S.nii.gz').dataobj), stored)

def test_submission_from_a_low_resolution(tmp_path):
    grid = Grid.plain((40, 40, 40), (1, 1, 1))
    z, y, x = np.indices((40, 40, 40)) - 19.5
    r = np.sqrt(z**2 + y**2 + x**2)
    truth = np.select([r < 6, r < 9, r < 14], [4, 1, 2], 0).astype('uint8')
    box = ((-4, 36), (0, 40), (4, 44))
    small = resize_volume(region_masks(crop(truth, box), REGIONS['tumour']), (20, 20, 20))
    back, _ = read_nifti(write_submission(small, grid, tmp_path/'a.nii', box))
    for a, b in zip(region_masks(back, REGIONS['tumour']), region_masks(truth, REGIONS['tumour'])): assert 2 * (a & b).sum() / (a.sum() + b.sum()) > .9
    refuses(lambda: write_submission(9 * small, grid, tmp_path/'b.nii', box), 'sigmoid'); refuses(lambda: write_submission(small[:2], grid, tmp_path/'b.nii', box), '(3,z,y,x)')
    refuses(lambda: write_submission(small + np.nan, grid, tmp_path/'b.nii', box), 'sigmoid')
    assert [p.name for p in tmp_path.iterdir()] == ['a.nii']

def test_read_scores(tmp_path):
    path, c = tmp_path/'s.csv', cases(3)
    head, rows = 'Label,Dice_ET,Dice_WT,Dice_TC,Sensitivity_ET,Hausdorff95_ET', ['Brats18_2,.3,.9,.6,.5,', 'Brats18_0,.1,.7,.4,.5,3', 'Brats18_1.nii.gz,.2,.8,.5,.5,4']
    path.write_text('\n'.join([head, *rows, *(f'{k},.2,.8,.5,.5,3.5' for k in ('Mean', 'StdDev', 'Median', '25quantile', '75quantile'))]))
    s = read_scores(path)
    assert s['Dice_ET'].tolist() == [.3, .1, .2] and s.index.tolist() == [1, 2, 3] and 'Label' not in s and np.isnan(s['Hausdorff95_ET'][1]) and len(s.columns) == 5
    assert read_scores(path, c)['Dice_WT'].tolist() == [.7, .8, .9] and 'Brats18' not in read_scores(path, c).to_string()
    refuses(lambda: read_scores(path, cases(5)), 'no scores of case 3, case 4')
    for bad in ('30', '-.1', 'nan', ''):
        path.write_text('\n'.join([head, rows[0].replace('.3', bad), *rows[1:]])); refuses(lambda: read_scores(path, c), 's.csv', 'Dice_ET of 1 subjects', 'not percent')
        assert len(read_scores(path, c[:2])) == 2 # of what was asked for
    path.write_text('\n'.join([head, rows[0], rows[0]])); refuses(lambda: read_scores(path), '1 subjects are in it twice')
    path.write_text('\n'.join([head, 'a,b,c,d,e,f'])); refuses(lambda: read_scores(path), 's.csv')
    path.write_text('a,b\n1,2'); refuses(lambda: read_scores(path), 'no column Label', 'leaderboard'); refuses(lambda: read_scores(tmp_path/'no.csv'), 'cannot read')

def test_from_files_to_the_leaderboard(tmp_path):
    train = make(read_brats(brats(tmp_path/'train')), tmp_path/'cache', bias_correct=False)
    online_cases = read_brats(brats(tmp_path/'online', ('Brats18_X_1_1',), seg=False))
    online = make(online_cases, tmp_path/'cache', bias_correct=False, box=train.box)
    x, = brain_eval_loader(online, REGIONS['tumour'], device='cpu').one_batch()
    masks = (x[0, :3] > .5).numpy()
    case = online_cases[0]
    labels, _ = read_nifti(write_submission(masks, case.load()[2], tmp_path/f'{case.subject}.nii.gz', online.box))
    assert np.array_equal(crop(labels, online.box), regions_to_labels(masks)) and labels.shape == SIZE
