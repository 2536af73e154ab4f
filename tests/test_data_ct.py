"CT volumes: every orientation, the publishers' layouts, DICOM series and splits, against nibabel and values worked out by hand"
import json, shutil, warnings
from itertools import permutations, product

import nibabel as nib, numpy as np, pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLosslessSV1, generate_uid

from medxfer_nb.data.cases import CaseError
from medxfer_nb.data.ct import (AIR, CLASSES, MEDSEG_LABELS, WINDOWS, ZENODO_LABELS, ZENODO_SCANS, CTCase, CTError, Grid, Volume, load_case,
                                merge_labels, read_covid, read_decathlon, read_dicom_series, read_medseg, read_nifti, read_volume,
                                read_zenodo, restore_window, save_nifti, split_cases, to_hu, upside_down)

SIZE, SPACING = (5, 6, 7), (2.5, .8, .7) # (Z,Y,X), mm
CODES = [''.join(c) for axes in permutations(('LR', 'PA', 'SI')) for c in product(*axes)] # all 48


def ct(seed=0, size=SIZE): # HU with air and bone
    hu = np.random.default_rng(seed).integers(-1000, 1200, size)
    hu.flat[:2] = -1024, 1500
    return hu.astype('int16')

def labels(seed=0, high=3, size=SIZE): return np.random.default_rng(seed).integers(0, high, size, endpoint=True).astype('uint8')

def turned(codes, size=SIZE, spacing=SPACING, oblique=0., origin=(11., -7., 3.)):
    "Affine of a volume that is stored along `codes`, and how to store it: (array in house axes) -> array"
    X, Y, Z = size[::-1]
    house = np.diag([-spacing[2], -spacing[1], spacing[0], 1.])
    c, s = np.cos(oblique), np.sin(oblique)
    house = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]]) @ house
    house[:3, 3] = origin
    turn = ornt_transform(axcodes2ornt('LPS'), axcodes2ornt(codes))
    return house @ inv_ornt_aff(turn, (X, Y, Z)), lambda a: nib.apply_orientation(a.T, turn)

def put(path, array, codes='LPS', oblique=0., **kwargs):
    "Write an array in house axes as a file with other axes"
    affine, store = turned(codes, array.shape, oblique=oblique, **kwargs)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(store(array), affine), path)
    return path

def refuses(call, *words):
    with pytest.raises(CTError) as e: call()
    for w in words: assert str(w) in str(e.value), e.value
    return str(e.value)


# ---- grids and NIfTI

@pytest.mark.parametrize('codes', CODES)
@pytest.mark.parametrize('oblique', [0., .3])
def test_every_orientation(tmp_path, codes, oblique):
    hu = ct()
    path = put(tmp_path/'a.nii.gz', hu, codes, oblique)
    array, grid = read_nifti(path)
    assert np.array_equal(array, hu) and array.dtype == np.int16 and array.flags.c_contiguous
    np.testing.assert_allclose(grid.spacing, SPACING, rtol=1e-5)
    assert grid.size == SIZE and ''.join(nib.aff2axcodes(grid.normalised)) == 'LPS'
    canonical = nib.as_closest_canonical(nib.load(path)) # right, anterior, superior
    assert np.array_equal(array, np.asarray(canonical.dataobj)[::-1, ::-1].T)
    mask = nib.load(save_nifti(hu > 0, grid, tmp_path/'mask.nii.gz'))
    scan = nib.load(path)
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(scan.dataobj) > 0)
    assert np.array_equal(mask.affine, scan.affine) and nib.aff2axcodes(mask.affine) == nib.aff2axcodes(scan.affine)
    assert np.array_equal(read_nifti(tmp_path/'mask.nii.gz')[0], hu > 0)

def test_world_positions_survive():
    "A voxel of the normalised array lies where the stored voxel lies"
    for codes in CODES[::5]:
        affine, store = turned(codes, oblique=.2)
        grid = Grid(store(ct()).shape, affine)
        numbers = np.arange(np.prod(SIZE)).reshape(SIZE)
        for z, y, x in [(0, 0, 0), (4, 5, 6), (2, 0, 3)]:
            stored = np.argwhere(store(numbers) == numbers[z, y, x])[0]
            np.testing.assert_allclose(grid.normalised @ [x, y, z, 1], affine @ [*stored, 1], atol=1e-9)

def test_plain_grid():
    grid = Grid.plain(SIZE, SPACING, (1, 2, 3))
    a = ct()
    assert grid.size == SIZE and grid.spacing == SPACING and nib.aff2axcodes(grid.affine) == ('L', 'P', 'S')
    assert np.array_equal(grid.normalise(a.T), a) and np.array_equal(grid.restore(a), a.T)
    np.testing.assert_allclose(grid.normalised @ [1, 1, 1, 1], [1 - .7, 2 - .8, 3 + 2.5, 1])

@pytest.mark.parametrize('codes', [(1, 0), (0, 1), (1, 1), (3, 4)])
@pytest.mark.parametrize('kind', [nib.Nifti1Image, nib.Nifti2Image])
def test_form_codes_and_format_survive(tmp_path, codes, kind):
    affine, store = turned('PSR', oblique=.2)
    image = kind(store(ct()), affine)
    image.set_qform(affine, codes[0]); image.set_sform(affine, codes[1])
    nib.save(image, tmp_path/'a.nii')
    array, grid = read_nifti(tmp_path/'a.nii')
    back = nib.load(save_nifti(labels(), grid, tmp_path/'b.nii'))
    assert type(back) is kind and (int(back.header['qform_code']), int(back.header['sform_code'])) == codes
    np.testing.assert_array_equal(back.affine, nib.load(tmp_path/'a.nii').affine)
    for k in ('pixdim', 'xyzt_units', 'quatern_b', 'srow_x'): np.testing.assert_array_equal(back.header[k], nib.load(tmp_path/'a.nii').header[k])

def test_no_free_text_is_carried_over(tmp_path):
    affine, store = turned('LPS')
    image = nib.Nifti1Image(store(ct()), affine)
    image.header['descrip'], image.header['db_name'], image.header['cal_max'] = b'Doe^Jane', b'Doe', 300
    image.header.extensions.append(nib.nifti1.Nifti1Extension('comment', b'Doe^Jane'))
    nib.save(image, tmp_path/'a.nii')
    save_nifti(labels(), read_nifti(tmp_path/'a.nii')[1], tmp_path/'b.nii')
    back = nib.load(tmp_path/'b.nii').header
    assert b'Doe' not in (tmp_path/'b.nii').read_bytes() and not back.extensions and back['cal_max'] == 0

def test_scaled_big_endian_and_trailing_axes(tmp_path):
    affine, store = turned('LPS')
    image = nib.Nifti1Image(store(ct()), affine)
    image.header.set_slope_inter(2, -10)
    nib.save(image, tmp_path/'scaled.nii')
    array, _ = read_nifti(tmp_path/'scaled.nii')
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, np.asarray(nib.load(tmp_path/'scaled.nii').dataobj).T)
    big = nib.Nifti1Image(store(ct()).astype('>i2'), affine, nib.Nifti1Header(endianness='>'), dtype='>i2')
    nib.save(big, tmp_path/'big.nii')
    array, _ = read_nifti(tmp_path/'big.nii')
    assert array.dtype == np.int16 and array.dtype.isnative and np.array_equal(array, ct())
    nib.save(nib.Nifti1Image(store(ct())[..., None], affine), tmp_path/'four.nii')
    array, grid = read_nifti(tmp_path/'four.nii')
    assert np.array_equal(array, ct())
    assert nib.load(save_nifti(array, grid, tmp_path/'three.nii')).shape == SIZE[::-1]

def test_types_of_saved_files(tmp_path):
    grid = Grid.plain(SIZE, SPACING)
    for values, want in ((np.ones(SIZE, bool), 'uint8'), (labels().astype('int64'), 'uint8'), (ct().astype('int64'), 'int16'),
                         (ct().astype('int64') * 100, 'int32'), (ct().astype('float64') / 3, 'float32')):
        back = nib.load(save_nifti(values, grid, tmp_path/'a.nii.gz'))
        assert back.get_data_dtype() == want
        np.testing.assert_allclose(np.asarray(back.dataobj).T, values, rtol=1e-6)
    refuses(lambda: save_nifti(np.full(SIZE, 2**40), grid, tmp_path/'a.nii'), 'do not fit into 32 bits')
    refuses(lambda: save_nifti(np.ones(SIZE, complex), grid, tmp_path/'a.nii'), 'complex128 cannot be saved')
    refuses(lambda: save_nifti(labels()[1:], grid, tmp_path/'a.nii'), (4, 6, 7), SIZE)
    refuses(lambda: save_nifti(labels(), grid, tmp_path/'a.png'), 'must end in .nii')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.nii.gz']

@pytest.mark.filterwarnings('ignore:.*qform and sform')
def test_headers_that_lie_are_refused(tmp_path):
    affine, store = turned('LPS')
    path = tmp_path/'scan.nii'
    def write(change):
        image = nib.Nifti1Image(store(ct()), affine)
        image.set_qform(affine, 1)
        nib.save(image, path)
        header = nib.Nifti1Header.from_fileobj(open(path, 'rb'), check=False)
        change(header)
        path.write_bytes(header.binaryblock + path.read_bytes()[348:])
    def zero(h): h['pixdim'][2] = 0
    def nowhere(h): h['qform_code'] = h['sform_code'] = 0
    def flat(h): h['srow_y'] = [0, 0, 0, 5]; h['srow_x'] = [0, 0, 0, 5]
    def plane(h): h['srow_x'] = h['srow_y'] = [1, 1, 0, 0]
    def nan(h): h['srow_x'] = np.nan
    def metres(h): h.set_xyzt_units('meter')
    for change, words in ((zero, 'spacing 0'), (nowhere, 'neither qform nor sform'), (flat, 'spacing 0 along axis'), (plane, 'lie in one plane'),
                          (nan, 'not finite'), (metres, 'units of meter')):
        write(change)
        refuses(lambda: read_nifti(path), path, words)

def test_forms_that_disagree(tmp_path):
    affine, store = turned('LPS')
    def write(shift):
        image = nib.Nifti1Image(store(ct()), affine)
        image.set_sform(affine, 1); image.set_qform(affine + shift * np.eye(4, k=3), 1)
        nib.save(image, tmp_path/'a.nii')
    write(2.)
    with pytest.warns(UserWarning, match='a.nii: qform and sform are up to 2 mm apart; the sform is used'): _, grid = read_nifti(tmp_path/'a.nii')
    np.testing.assert_allclose(grid.affine, affine, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        write(.3)
        read_nifti(tmp_path/'a.nii')

def test_spacing_of_sheared_grids():
    "Planes 2 mm apart, each moved by half of that, however the array is stored: the product is the volume of a voxel"
    sheared = np.array([[-.7, 0, 0, 0], [0, -.8, 1, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    for codes in CODES:
        turn = ornt_transform(axcodes2ornt('LPS'), axcodes2ornt(codes))
        spacing = Grid(nib.apply_orientation(ct().T, turn).shape, sheared @ inv_ornt_aff(turn, SIZE[::-1])).spacing
        np.testing.assert_allclose(spacing, (2, .8, .7))
        np.testing.assert_allclose(np.prod(spacing), abs(np.linalg.det(sheared)))

def test_files_that_are_no_volume(tmp_path):
    affine, store = turned('LPS')
    nib.save(nib.Nifti1Image(np.stack([store(ct())] * 2, -1), affine), tmp_path/'four.nii')
    refuses(lambda: read_nifti(tmp_path/'four.nii'), 'four.nii', '4-D image', 'one 3-D volume')
    nib.save(nib.Nifti1Image(ct()[0], np.eye(4)), tmp_path/'two.nii')
    refuses(lambda: read_nifti(tmp_path/'two.nii'), '2-D image')
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), [('R', 'u1'), ('G', 'u1'), ('B', 'u1')]), np.eye(4)), tmp_path/'rgb.nii')
    refuses(lambda: read_nifti(tmp_path/'rgb.nii'), 'one number a voxel')
    nib.save(nib.MGHImage(np.zeros((3, 3, 3), 'float32'), np.eye(4)), tmp_path/'a.mgz')
    refuses(lambda: read_nifti(tmp_path/'a.mgz'), 'a.mgz', 'only NIfTI')
    refuses(lambda: read_nifti(tmp_path/'none.nii'), 'none.nii', 'cannot read')
    (tmp_path/'text.nii').write_text('no')
    refuses(lambda: read_nifti(tmp_path/'text.nii'), 'text.nii', 'cannot read')
    whole = put(tmp_path/'whole.nii.gz', ct()).read_bytes()
    (tmp_path/'cut.nii.gz').write_bytes(whole[:-60])
    refuses(lambda: read_nifti(tmp_path/'cut.nii.gz'), 'cut.nii.gz', 'cannot read')
    refuses(lambda: Grid((2, 3), np.eye(4)), 'three axes')
    refuses(lambda: Grid.plain(SIZE, SPACING).normalise(ct()), 'not on a grid')


# ---- HU and labels

def test_windows():
    gray = np.arange(256).reshape(1, 16, 16)
    with pytest.warns(UserWarning, match=r"x.nii: values from 0 to 255 are not HU: mapped back through the 'lung' window"): hu = to_hu(gray, path='x.nii')
    np.testing.assert_allclose(hu, -1250 + gray * 1500 / 255, atol=1e-3)
    assert hu.dtype == np.float32
    np.testing.assert_allclose(restore_window(gray, (-1000, 400)), -1000 + gray * 1400 / 255, atol=1e-3)
    with pytest.warns(UserWarning, match='a window'): np.testing.assert_allclose(to_hu(gray, (-1000, 400)), restore_window(gray, (-1000, 400)))
    WINDOWS['mine'] = (-900., 100.)
    try: assert restore_window(gray, 'mine').min() == -900
    finally: del WINDOWS['mine']
    refuses(lambda: restore_window(gray, 'none'), "no window 'none'", 'lung')
    refuses(lambda: restore_window(gray, (5, 5)), 'from low to high')

@pytest.mark.filterwarnings('error')
def test_ranges():
    for hu in (ct(), ct().clip(-1000, 0), ct().astype('float64') * 2): assert np.array_equal(to_hu(hu), hu.astype('float32'))
    for wrong in (ct() / 1500, (ct() + 1024.), np.zeros(SIZE), np.full(SIZE, 1.), ct() * 10, ct().clip(-200, 300), np.where(ct() > 0, np.nan, ct()),
                  np.where(ct() > 0, np.inf, ct()), ct().clip(0, 256), labels(), ct().clip(0, 100),
                  ct().clip(0, 127), ct().clip(100, 255), ct().clip(-1024, -1)):
        refuses(lambda: to_hu(wrong, path='case.nii'), 'case.nii: values from', 'rescale slope and intercept')

def test_labels():
    mask = labels(high=3)
    for t in ('uint8', 'int16', 'int64', 'float32', 'float64'):
        merged = merge_labels(mask.astype(t), ZENODO_LABELS)
        assert merged.dtype == np.uint8 and np.array_equal(merged, np.array([0, 1, 1, 2])[mask])
    assert np.array_equal(merge_labels(mask, {0: 2, 1: 0, 2: 0, 3: 1}), np.array([2, 0, 0, 1])[mask])
    odd = mask.astype('int16'); odd[0, 0, :3] = 7, 7, -2
    refuses(lambda: merge_labels(odd, ZENODO_LABELS, 'm.nii'), 'm.nii: unknown labels -2 (1 voxels), 7 (2 voxels); known are 0, 1, 2, 3', 'pass a mapping')
    for bad in (.5, np.nan, np.inf):
        soft = mask.astype('float32'); soft[0, 0, 0] = bad
        refuses(lambda: merge_labels(soft, ZENODO_LABELS, 'm.nii'), 'm.nii', f'{bad:g}', 'interpolated')
    refuses(lambda: merge_labels(np.arange(24).reshape(2, 3, 4), {1: 1}), 'and 14 more')


# ---- one case

def test_lesion_wins_and_axes_may_differ(tmp_path):
    lung, lesion = labels(1, 2), labels(2, 1)
    scan = put(tmp_path/'ct.nii.gz', ct(), 'RAS')
    masks = ((put(tmp_path/'lung.nii.gz', lung, 'LPS'), {1: 1, 2: 1}), (put(tmp_path/'lesion.nii.gz', lesion, 'SLP'), {1: 2}))
    v = load_case(scan, masks)
    assert np.array_equal(v.mask, np.where(lesion, 2, lung > 0)) and np.array_equal(v.image, ct().astype('float32'))
    assert v.image.dtype == np.float32 and v.mask.dtype == np.uint8 and v.spacing == v.grid.spacing
    assert load_case(scan, ()).mask is None

def test_masks_that_do_not_fit(tmp_path):
    scan, mask = put(tmp_path/'ct.nii', ct(), 'RAS'), tmp_path/'mask.nii'
    load = lambda: load_case(scan, ((mask, {1: 1, 2: 2, 3: 1}),))
    put(mask, labels()[1:], 'RAS');                              refuses(load, mask, scan, '(4, 6, 7)', 'another scan')
    put(mask, labels(), 'RAS', origin=(11., -7., 4.));           refuses(load, mask, scan, 'corners are up to 1 mm', 'resample')
    put(mask, labels(), 'RAS', spacing=(2.5, .8, .9));           refuses(load, mask, 'corners are up to')
    put(mask, labels(), 'RAS', oblique=.2);                      refuses(load, mask, 'corners are up to')
    put(mask, labels(), 'RAS', origin=(11.01, -7., 3.));         assert load().mask.any() # rounding
    put(mask, labels(high=5), 'RAS');                            refuses(load, mask, 'unknown labels 4')
    refuses(lambda: Volume(ct(), labels()[1:], Grid.plain(SIZE, SPACING)), (4, 6, 7))

def test_fingerprint(tmp_path):
    a, b = put(tmp_path/'a.nii', ct()), put(tmp_path/'b.nii', ct(1))
    case = lambda *files, key='': CTCase('x', 'p', None, files, key).fingerprint()
    assert case(a) == case(shutil.copy(a, tmp_path/'c.nii')) and len({case(a), case(b), case(a, b), case(b, a), case(a, key='k'), case(key='k')}) == 6
    refuses(lambda: case(), 'neither files nor a key')
    assert 'Doe' not in repr(CTCase('Zenodo 01', 'Doe', None))


def test_header_with_front_and_back_exchanged(tmp_path):
    "A phantom with a spine: warned about, put right, saved on the axes of its file"
    hu = np.full((20, 40, 50), -1000, 'int16')
    hu[:, 8:34, 5:45], hu[:, 26:33, 20:30] = 30, 700
    lesion = np.zeros(hu.shape, 'uint8'); lesion[3:6, 10:14, 8:12] = 1
    assert not upside_down(hu) and upside_down(hu[:, ::-1]) and not upside_down(hu[:2]) and not upside_down(hu[:2, ::-1])
    for codes in ('RAS', 'SLP', 'PIR'):
        scan, mask = put(tmp_path/'ct.nii', hu[:, ::-1], codes), put(tmp_path/'mask.nii', lesion[:, ::-1], codes)
        with pytest.warns(UserWarning, match='ct.nii: bone lies in front'): v = load_case(scan, ((mask, {1: 2}),))
        assert np.array_equal(v.image, hu[:, ::-1])
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            v = load_case(scan, ((mask, {1: 2}),), flipped=True)
            assert np.array_equal(read_volume(scan, flipped=True).image, hu)
        assert np.array_equal(v.image, hu) and np.array_equal(v.mask, lesion * 2) and v.image.flags.c_contiguous and v.mask.flags.c_contiguous
        back = nib.load(save_nifti(v.mask == 2, v.grid, tmp_path/'back.nii'))
        assert np.array_equal(np.asarray(back.dataobj), np.asarray(nib.load(mask).dataobj)) and np.array_equal(back.affine, nib.load(scan).affine)

def test_zenodo_flipped_by_name(tmp_path):
    root = zenodo(tmp_path, ['coronacases_001', 'radiopaedia_10_85902_1'])
    plain, turned_ = quiet(read_zenodo, root), quiet(read_zenodo, root, flipped=('radiopaedia_*',))
    a, b = ([quiet(c.load) for c in cases] for cases in (plain, turned_))
    assert np.array_equal(a[0].image, b[0].image) and np.array_equal(a[1].image, b[1].image[:, ::-1]) and np.array_equal(a[1].mask, b[1].mask[:, ::-1])
    assert quiet(read_zenodo, root, flipped='radiopaedia_*')[1].fingerprint() == turned_[1].fingerprint() # one pattern
    refuses(lambda: quiet(read_zenodo, root, flipped=('radiopaedia_*', 'radiopedia_*')), "flipped: 'radiopedia_*' matches no scan", '.nii.gz')
    refuses(lambda: quiet(read_covid, medseg(root), flipped='radio'), "'radio' matches no scan")
    assert plain[0].fingerprint() == turned_[0].fingerprint() and plain[1].fingerprint() != turned_[1].fingerprint()


# ---- publishers' layouts

def window(hu): return np.rint((np.clip(hu, -1250, 250) + 1250) * (255 / 1500)).astype('uint8')

def zenodo(root, names=ZENODO_SCANS, folders=('COVID-19-CT-Seg_20cases', 'Lung_Mask', 'Infection_Mask', 'Lung_and_Infection_Mask'), spell=lambda n: n, suffix='.nii.gz'):
    for i, n in enumerate(names):
        hu, whole = ct(i), labels(i)
        arrays = window(hu) if n.startswith('radio') else hu, np.where(whole < 3, whole, 0).astype('uint8'), (whole == 3).astype('uint8'), whole
        for k, (folder, array) in enumerate(zip(folders, arrays)):
            if folder: put(root/folder/f'{n if k else spell(n)}{suffix}', array, CODES[i])
    return root

def medseg(root, n=9):
    for i in range(1, n + 1):
        lesion = labels(i)
        put(root/f'rp_im/{i}.nii.gz', ct(i), 'LAS'); put(root/f'rp_msk/{i}.nii.gz', lesion, 'LAS')
        put(root/f'rp_lung_msk/{i}.nii.gz', labels(i + 50, 1), 'LAS')
    return root

def quiet(read, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return read(*args, **kwargs)

@pytest.mark.filterwarnings('error')
def test_zenodo_as_published(tmp_path):
    cases = read_zenodo(zenodo(tmp_path))
    assert len(cases) == 20 and len({c.patient for c in cases}) == 18 and len({c.name for c in cases}) == 20
    assert [c.name for c in cases[:2]] == ['Zenodo 01', 'Zenodo 02']
    v = cases[2].load()
    assert np.array_equal(v.image, ct(2)) and np.array_equal(v.mask, np.array([0, 1, 1, 2])[labels(2)])
    with pytest.warns(UserWarning, match='are not HU'): v = cases[12].load() # radiopaedia_10_85902_1
    np.testing.assert_allclose(v.image, np.clip(ct(12), -1250, 250), atol=3)
    with pytest.warns(UserWarning): v = read_zenodo(tmp_path, (-1000, 400))[12].load()
    assert v.image.max() == 400
    assert cases[12].patient == cases[13].patient and cases[16].patient == cases[17].patient and cases[12].fingerprint() != cases[13].fingerprint()
    assert cases[12].fingerprint() != read_zenodo(tmp_path, (-1000, 400))[12].fingerprint()

def test_zenodo_two_masks_in_place_of_one(tmp_path):
    whole = read_zenodo(zenodo(tmp_path/'a'))
    parts = read_zenodo(zenodo(tmp_path/'b', folders=('ct_scans', 'lung_mask', 'infection_mask', None)))
    for a, b in zip(whole[::7], parts[::7]): assert np.array_equal(quiet(a.load).mask, quiet(b.load).mask)

def test_zenodo_as_on_kaggle(tmp_path):
    def spell(n):
        if n.startswith('radio'): return f"radiopaedia_org_covid-19-pneumonia-{n[12:].replace('_', '_', 1)}-dcm"
        return n.replace('coronacases_', 'coronacases_org_case' if n.endswith(('007', '010')) else 'coronacases_org_')
    zenodo(tmp_path/'archive', folders=('ct_scans', 'lung_mask', 'infection_mask', 'lung_and_infection_mask'), spell=spell, suffix='.nii')
    assert (tmp_path/'archive/ct_scans/radiopaedia_org_covid-19-pneumonia-10_85902_1-dcm.nii').exists()
    assert [c.patient for c in read_zenodo(tmp_path)] == [c.patient for c in read_zenodo(zenodo(tmp_path/'b'))]

def test_zenodo_incomplete(tmp_path):
    refuses(lambda: read_zenodo(tmp_path/'nowhere'), 'nowhere', 'no such folder')
    refuses(lambda: read_zenodo(tmp_path), 'ct_scans or covid-19-ct-seg_20cases', 'lung_mask', 'infection_mask', 'zenodo.org/record/3757476')
    root = zenodo(tmp_path, ['coronacases_001', 'radiopaedia_10_85902_1'])
    with pytest.warns(UserWarning, match='2 cases, 18 of the published 20 are missing: coronacases_002,'): assert len(read_zenodo(root)) == 2
    (root/'Lung_and_Infection_Mask/coronacases_001.nii.gz').rename(root/'away')
    refuses(lambda: quiet(read_zenodo, root), 'no lung_and_infection_mask for coronacases_001.nii.gz', 'unpack')
    (root/'away').rename(root/'Lung_and_Infection_Mask/coronacases_001.nii.gz')
    (root/'COVID-19-CT-Seg_20cases/coronacases_001.nii.gz').rename(root/'away')
    refuses(lambda: quiet(read_zenodo, root), 'no scan for the lung_and_infection_mask', 'coronacases_001.nii.gz')
    put(root/'COVID-19-CT-Seg_20cases/other.nii.gz', ct())
    refuses(lambda: quiet(read_zenodo, root), 'other.nii.gz', 'not a name of record 3757476')
    (root/'COVID-19-CT-Seg_20cases/other.nii.gz').unlink()
    put(root/'COVID-19-CT-Seg_20cases/radiopaedia_10_85902_1.nii', ct())
    refuses(lambda: quiet(read_zenodo, root), 'as .nii and as .nii.gz')

@pytest.mark.filterwarnings('error')
def test_medseg(tmp_path):
    cases = read_medseg(medseg(tmp_path))
    assert [c.name for c in cases] == [f'MedSeg {i}' for i in range(1, 10)] and len({c.patient for c in cases}) == 9
    v, lesion, lung = cases[3].load(), labels(4), labels(54, 1)
    assert np.array_equal(v.image, ct(4)) and np.array_equal(v.mask, np.where(lesion > 0, 2, lung))
    v = read_medseg(tmp_path, {**MEDSEG_LABELS, 3: 0})[3].load()
    assert np.array_equal(v.mask, np.where((lesion == 1) | (lesion == 2), 2, lung))
    refuses(read_medseg(tmp_path, {1: 2, 2: 2})[3].load, '4.nii.gz', 'unknown labels 3')
    shutil.rmtree(tmp_path/'rp_lung_msk')
    refuses(lambda: read_medseg(tmp_path), 'rp_lung_msk.zip', 'medicalsegmentation.com')
    medseg(tmp_path)
    (tmp_path/'rp_msk/2.nii.gz').unlink()
    refuses(lambda: read_medseg(tmp_path), 'no rp_msk for 2.nii.gz')
    for k in ('rp_im', 'rp_lung_msk'): (tmp_path/f'{k}/2.nii.gz').unlink()
    with pytest.warns(UserWarning, match='MedSeg: 8 cases, 1 of the published 9 are missing: 2'): read_medseg(tmp_path)
    put(tmp_path/'rp_im/x.nii.gz', ct())
    refuses(lambda: quiet(read_medseg, tmp_path), 'x.nii.gz', 'named 1.nii.gz to 9.nii.gz')

def test_covid(tmp_path):
    refuses(lambda: read_covid(tmp_path), '20 from Zenodo and 9 from MedSeg', 'zenodo.org', 'rp_im.zip')
    zenodo(tmp_path/'zenodo')
    message = refuses(lambda: read_covid(tmp_path), 'rp_im.zip')
    assert 'zenodo.org' not in message
    medseg(tmp_path/'medseg')
    cases = read_covid(tmp_path)
    assert len(cases) == 29 and len({c.patient for c in cases}) == 27
    assert (quiet(cases[-1].load).mask == 2).sum() > (quiet(read_covid(tmp_path, {1: 2, 2: 2, 3: 0})[-1].load).mask == 2).sum()

def decathlon(root, task='Task09_Spleen', names=('background', 'spleen', 'rest'), **changes):
    for i in (2, 10): put(root/task/f'imagesTr/spleen_{i}.nii.gz', ct(i), 'LAS'); put(root/task/f'labelsTr/spleen_{i}.nii.gz', labels(i, len(names) - 1), 'LAS')
    facts = dict(name='Spleen', modality={'0': 'CT'}, labels={str(i): n for i, n in enumerate(names)}, numTraining=2, numTest=1, test=['./imagesTs/spleen_1.nii.gz'],
                 training=[{'image': f'./imagesTr/spleen_{i}.nii.gz', 'label': f'./labelsTr/spleen_{i}.nii.gz'} for i in (10, 2)])
    (root/task/'dataset.json').write_text(json.dumps({k: v for k, v in {**facts, **changes}.items() if v is not None}))

def test_decathlon(tmp_path):
    decathlon(tmp_path)
    cases, names = read_decathlon(tmp_path, 'Task09_Spleen')
    assert names == ('background', 'spleen', 'rest') and [c.name for c in cases] == ['Task09_Spleen 001', 'Task09_Spleen 002']
    v = cases[0].load()
    assert np.array_equal(v.image, ct(10)) and np.array_equal(v.mask, labels(10, 2)) and cases[0].patient != cases[1].patient
    refuses(lambda: read_decathlon(tmp_path, 'Task03_Liver'), 'Task03_Liver', 'tasks in', 'Task09_Spleen')
    for change, words in ((dict(modality={'0': 'T2', '1': 'ADC'}), ('images of T2, ADC', 'Task06_Lung')), (dict(labels=None), ('no labels',)),
                          (dict(labels={'0': 'a', '2': 'b'}), ('not numbered',)),
                          (dict(training=[dict(image='./imagesTr/none.nii.gz', label='./labelsTr/spleen_2.nii.gz')]), ('none.nii.gz', 'missing')),
                          (dict(training=[dict(image='../../x.nii.gz', label='../../y.nii.gz')]), ('outside the task',))):
        decathlon(tmp_path, **change)
        refuses(lambda: read_decathlon(tmp_path, 'Task09_Spleen'), *words)
    (tmp_path/'Task09_Spleen/dataset.json').write_text('{')
    refuses(lambda: read_decathlon(tmp_path, 'Task09_Spleen'), 'dataset.json: damaged')
    decathlon(tmp_path, names=('background', 'spleen'))
    put(tmp_path/'Task09_Spleen/labelsTr/spleen_2.nii.gz', labels(2, 4), 'LAS')
    refuses(read_decathlon(tmp_path, 'Task09_Spleen')[0][1].load, 'spleen_2.nii.gz', 'unknown labels 2')
    affine, store = turned('LAS')
    nib.save(nib.Nifti1Image(np.stack([store(ct())] * 2, -1), affine), tmp_path/'Task09_Spleen/imagesTr/spleen_2.nii.gz')
    refuses(read_decathlon(tmp_path, 'Task09_Spleen')[0][1].load, 'spleen_2.nii.gz', '4-D')


# ---- splits

def scans(groups): return [CTCase(f'case {i}', g, None) for i, g in enumerate(groups)]

def test_split_is_exact_disjoint_and_seeded():
    cases = scans([*'abcdefghijklmnopq', 'r', 'r', 's', 's', *'tuvwxyzA'])
    seen = set()
    for seed in range(30):
        parts = split_cases(cases, seed=seed)
        assert [len(parts[k]) for k in ('train', 'valid', 'test')] == [21, 3, 5] and list(parts) == ['train', 'valid', 'test']
        assert sorted(c.name for p in parts.values() for c in p) == sorted(c.name for c in cases)
        whose = [{c.patient for c in p} for p in parts.values()]
        assert not (whose[0] & whose[1] | whose[0] & whose[2] | whose[1] & whose[2])
        assert {k: [c.name for c in p] for k, p in parts.items()} == {k: [c.name for c in p] for k, p in split_cases(cases, seed=seed).items()}
        seen.add(tuple(c.name for c in parts['test']))
    assert len(seen) > 25

def test_every_split_has_the_same_chance():
    "All deals of small groups, enumerated, against the frequencies of the draws"
    cases, counts = scans('aabcdd'), (3, 1, 2)
    sizes = dict(a=2, b=1, c=1, d=2)
    valid = [p for p in product(range(3), repeat=4) if all(sum(n for n, k in zip(sizes.values(), p) if k == j) == counts[j] for j in range(3))]
    drawn = {}
    for seed in range(1200):
        parts = split_cases(cases, counts, seed)
        where = {c.patient: k for k, p in enumerate(parts.values()) for c in p}
        drawn[tuple(where[g] for g in sizes)] = drawn.get(tuple(where[g] for g in sizes), 0) + 1
    assert set(drawn) == set(valid)
    expected = 1200 / len(valid)
    assert sum((n - expected)**2 / expected for n in drawn.values()) < 3 * len(valid) + 10

def test_split_errors():
    refuses(lambda: split_cases(scans('aabb'), (1, 1, 2)), 'no way to deal 2 patients', '[2, 2]', "by='scan'")
    assert [len(p) for p in split_cases(scans('aabb'), (1, 1, 2), by='scan').values()] == [1, 1, 2]
    refuses(lambda: split_cases(scans('abcd')), '29 scans are wanted, there are 4')
    refuses(lambda: split_cases(scans('abcd'), (4, 0, 0)), 'three positive numbers')
    refuses(lambda: split_cases(scans('abcd'), (2, 2)), 'three positive numbers')
    refuses(lambda: split_cases(scans('abcd'), (2, 1, 1), by='case'), "not 'case'")


# ---- DICOM

def write_slice(path, hu, place, series='1.2.3', along=(1, 0, 0, 0, 1, 0), drop=(), **elements):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.SOPClassUID, ds.SOPInstanceUID = ExplicitVRLittleEndian, CTImageStorage, generate_uid()
    ds.Modality, ds.SeriesInstanceUID, ds.PatientName, ds.PatientID = 'CT', series, 'Doe^Jane', '4711'
    ds.ImageOrientationPatient, ds.ImagePositionPatient, ds.PixelSpacing = list(along), [round(float(p), 6) for p in place], [.8, .7]
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *hu.shape, 1, 'MONOCHROME2'
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleSlope, ds.RescaleIntercept = 16, 16, 15, 1, 2, -1024
    for k, v in elements.items(): setattr(ds, k, v)
    ds.PixelData = np.rint((hu - int(ds.RescaleIntercept)) / int(ds.RescaleSlope)).astype('<i2').tobytes()
    for k in drop: delattr(ds, k)
    ds.save_as(path, enforce_file_format=True)

def write_series(folder, n=SIZE[0], step=2.5, order=None, along=(1, 0, 0, 0, 1, 0), start=(-10., -20., 30.), **elements):
    "A series whose names say nothing about its order; HU are even, as the slope is 2"
    folder.mkdir(parents=True, exist_ok=True)
    hu = ct(size=(n, *SIZE[1:])) // 2 * 2
    normal = np.cross(along[:3], along[3:])
    for i, name in enumerate(order if order is not None else np.random.default_rng(3).permutation(n)):
        write_slice(folder/f'{name}.dcm', hu[i], np.array(start) + i * step * normal, along=along, **elements)
    return hu

def test_dicom_axial(tmp_path):
    hu = write_series(tmp_path/'s')
    (tmp_path/'s/readme.txt').write_text('no DICOM'); (tmp_path/'s/.hidden').write_text(''); (tmp_path/'s/DICOMDIR').write_text('')
    v = read_dicom_series(tmp_path/'s')
    assert np.array_equal(v.image, hu) and v.image.dtype == np.float32 and v.mask is None
    np.testing.assert_allclose(v.spacing, (2.5, .8, .7))
    np.testing.assert_allclose(v.grid.affine, [[-.7, 0, 0, 10], [0, -.8, 0, 20], [0, 0, 2.5, 30], [0, 0, 0, 1]], atol=1e-9)
    assert np.array_equal(read_volume(tmp_path/'s').image, hu)

@pytest.mark.parametrize('along', [(1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), (-1, 0, 0, 0, -1, 0), (0, 1, 0, 1, 0, 0), (.8, .6, 0, -.6, .8, 0)])
def test_dicom_other_directions(tmp_path, along):
    "Coronal, sagittal, turned, mirrored and oblique series, against the position formula of the standard (PS3.3, C.7.6.2.1.1)"
    hu = write_series(tmp_path/'s', along=along)
    v = read_dicom_series(tmp_path/'s')
    a, normal = np.array(along, float).reshape(2, 3), np.cross(along[:3], along[3:])
    for k, row, col in [(0, 0, 0), (4, 5, 6), (2, 3, 1)]:
        lps = np.array([-10., -20, 30]) + a[0] * .7 * col + a[1] * .8 * row + normal * 2.5 * k
        x, y, z = np.rint(np.linalg.solve(v.grid.normalised, [-lps[0], -lps[1], lps[2], 1])[:3]).astype(int)
        assert v.image[z, y, x] == hu[k, row, col]
    mask = nib.load(save_nifti(v.image > 0, v.grid, tmp_path/'m.nii.gz'))
    assert np.array_equal(read_nifti(tmp_path/'m.nii.gz')[0], v.image > 0)
    np.testing.assert_allclose(mask.affine, v.grid.affine, atol=1e-4)

def test_dicom_tilted_gantry_and_rounded_positions(tmp_path):
    (tmp_path/'s').mkdir()
    for i in range(5): write_slice(tmp_path/f's/{i}', ct()[i], [0, round(.4 * i, 1), round(1.25 * i, 1)])
    with pytest.warns(UserWarning, match=r's: the slices are tilted by 17.\d degrees'): v = read_dicom_series(tmp_path/'s')
    np.testing.assert_allclose(v.grid.affine[:3, 2], [0, -.4, 1.25], atol=.01)
    np.testing.assert_allclose(v.spacing, (v.grid.affine[2, 2], .8, .7)) # between planes, not between first voxels
    np.testing.assert_allclose(np.prod(v.spacing), abs(np.linalg.det(v.grid.affine)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for i in range(5): write_slice(tmp_path/f's/{i}', ct()[i], [0, .02 * i, 1.25 * i]) # 0.9 degrees
        read_dicom_series(tmp_path/'s')

def test_dicom_padding_and_lookup(tmp_path):
    (tmp_path/'s').mkdir()
    hu = np.full((6, 7), 40); hu[0], hu[1] = -5024, -4824 # stored -2000 and -1900
    for limits in (dict(PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1900), dict(PixelPaddingValue=-1900, PixelPaddingRangeLimit=-2000)):
        for i in range(2): write_slice(tmp_path/f's/{i}', hu, [0, 0, i], **limits)
        v = read_dicom_series(tmp_path/'s')
        assert (v.image[:, :2] == AIR).all() and (v.image[:, 2:] == 40).all()
    hu[1] = 42
    for i in range(2): write_slice(tmp_path/f's/{i}', hu, [0, 0, i], PixelPaddingValue=-2000)
    v = read_dicom_series(tmp_path/'s')
    assert (v.image[:, 0] == AIR).all() and (v.image[:, 1] == 42).all() and (v.image[:, 2:] == 40).all()

def test_dicom_values_are_hu(tmp_path):
    s = tmp_path/'s'
    for kind in ('HU', 'HU_MOD', 'US', ''):
        hu = write_series(s, RescaleType=kind)
        assert np.array_equal(read_dicom_series(s).image, hu)
    write_series(s, RescaleType='Z_EFF')
    refuses(lambda: read_dicom_series(s), '.dcm: RescaleType Z_EFF', 'not HU')
    for low, high in ((0, 254), (-200, 300), (0, 1500), (-1000, -2)):
        for i in range(5): write_slice(s/f'{i}.dcm', ct()[i].clip(low, high), [0, 0, i])
        refuses(lambda: read_dicom_series(s), f'{s}: values from {low} to {high} are not HU')

@pytest.mark.parametrize('name', ['1.2.840.113', 'IM0001', 'a.DCM', 'b.ima'])
@pytest.mark.parametrize('content', [b'', b'\0' * 400, b'torn'])
def test_dicom_damaged_files_are_not_skipped(tmp_path, name, content):
    write_series(tmp_path/'s')
    (tmp_path/'s'/name).write_bytes(content)
    refuses(lambda: read_dicom_series(tmp_path/'s'), name)

def test_dicom_damaged_headers(tmp_path):
    s = tmp_path/'s'
    write_series(s, order=range(5))
    one = (s/'2.dcm').read_bytes()
    def element(tag, vr, old, new): # in the file, as pydicom does not write such values
        at = one.index(tag + vr)
        size = int.from_bytes(one[at+6:at+8], 'little')
        assert old in one[at+8:at+8+size]
        (s/'2.dcm').write_bytes(one[:at+6] + len(new).to_bytes(2, 'little') + new + one[at+8+size:])
    for tag, old, name, n in ((b'\x20\x00\x32\x00', b'-10', 'ImagePositionPatient', 3), (b'\x20\x00\x37\x00', b'1', 'ImageOrientationPatient', 6),
                              (b'\x28\x00\x30\x00', b'0.8', 'PixelSpacing', 2)):
        element(tag, b'DS', old, b'1\\2\\3\\4')
        refuses(lambda: read_dicom_series(s), s/'2.dcm', f'{name} is not {n}')
        element(tag, b'DS', old, b'1 ')
        refuses(lambda: read_dicom_series(s), s/'2.dcm', f'{name} is not {n}')
        element(tag, b'DS', old, b'one\\two ')
        refuses(lambda: quiet(read_dicom_series, s), s/'2.dcm')
    element(b'\x28\x00\x30\x00', b'DS', b'0.8', b'0\\.7')
    refuses(lambda: read_dicom_series(s), s/'2.dcm', 'PixelSpacing is not 2 positive numbers')
    (s/'2.dcm').write_bytes(one)
    ds = __import__('pydicom').dcmread(s/'2.dcm')
    del ds.file_meta.TransferSyntaxUID
    ds.save_as(s/'2.dcm', implicit_vr=False, little_endian=True, enforce_file_format=False)
    refuses(lambda: read_dicom_series(s), s/'2.dcm', 'TransferSyntaxUID')

def test_dicom_series_that_are_refused(tmp_path):
    s = tmp_path/'s'
    def case(change, *words):
        shutil.rmtree(s, ignore_errors=True)
        write_series(s, order=range(5))
        change()
        message = refuses(lambda: read_dicom_series(s), *words)
        assert 'Doe' not in message and '4711' not in message and '1.2.3' not in message
    hu = ct()[0]
    case(lambda: (s/'2.dcm').unlink(), s, 'a gap, 1 slice(s) missing between 1.dcm and 3.dcm: 5 mm, elsewhere 2.5 mm')
    case(lambda: write_slice(s/'2.dcm', hu, [-10, -20, 35.6]), 'uneven spacing between 1.dcm and 2.dcm')
    case(lambda: write_slice(s/'9.dcm', hu, [-10, -20, 35]), '9.dcm', 'at the same position as 2.dcm')
    case(lambda: write_slice(s/'2.dcm', hu, [-8, -20, 35]), '2.dcm', 'off the line')
    case(lambda: write_slice(s/'9.dcm', hu, [-10, -20, 42.5], '1.2.4'), s, '2 series of [5, 1] images are mixed, e.g. 0.dcm and 9.dcm', 'folder of its own')
    case(lambda: write_slice(s/'9.dcm', hu[1:], [-10, -20, 42.5]), '9.dcm: another size')
    case(lambda: write_slice(s/'9.dcm', hu, [-10, -20, 42.5], along=(1, 0, 0, 0, 0, -1)), '9.dcm: another orientation', 'scout')
    case(lambda: write_slice(s/'9.dcm', hu, [-10, -20, 42.5], PixelSpacing=[.8, .8]), '9.dcm: another pixel spacing')
    case(lambda: write_slice(s/'9.dcm', hu, [-10, -20, 42.5], Modality='MR'), '9.dcm: modality MR, not CT')
    case(lambda: write_slice(s/'9.dcm', hu, [-10, -20, 42.5], drop=['Modality']), '9.dcm: modality unknown')
    case(lambda: write_slice(s/'9.dcm', hu, [0, 0, 0], drop=['ImagePositionPatient', 'PixelSpacing']), '9.dcm: no ImagePositionPatient, PixelSpacing')
    case(lambda: write_slice(s/'9.dcm', hu, [-10, -20, 42.5], NumberOfFrames=3), '9.dcm', 'several frames')
    case(lambda: write_slice(s/'9.dcm', hu, [-10, -20, 42.5], drop=['RescaleIntercept']), '9.dcm: no RescaleSlope or RescaleIntercept')
    case(lambda: (s/'9.dcm').write_bytes(b'\0' * 400), '9.dcm: not a DICOM file')
    case(lambda: (s/'2.dcm').write_bytes((s/'2.dcm').read_bytes()[:-20]), '2.dcm: cannot decode')
    def squeeze(): # claims a compression that it has not
        ds = __import__('pydicom').dcmread(s/'2.dcm')
        ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        ds.PixelData = __import__('pydicom').encaps.encapsulate([b'no jpeg '])
        ds['PixelData'].is_undefined_length = True
        ds.save_as(s/'2.dcm')
    case(squeeze, '2.dcm: cannot decode')
    case(lambda: [p.unlink() for p in s.glob('[1-4].dcm')], 'one slice only')
    case(lambda: [p.unlink() for p in s.iterdir()], s, 'no DICOM images')
    case(lambda: [write_slice(p, hu, [0, 0, i], along=(1, 0, 0, 1, 0, 0)) for i, p in enumerate(sorted(s.iterdir()))], 'perpendicular')
    refuses(lambda: read_dicom_series(tmp_path/'none'), 'no such folder')

def test_errors_are_case_errors():
    assert issubclass(CTError, CaseError) and issubclass(CTError, ValueError) and CLASSES == ('background', 'lung', 'infection')
