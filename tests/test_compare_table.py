"The table of cases: every fault named by row, pools against brute force, no identifier in what is stored"
import json, os, shutil

import nibabel as nib, numpy as np, pandas as pd, pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medxfer_nb.compare.table import (MIN_PATIENTS, CaseTable, Pool, TableError, content_hash, hashed, load_pool, pool_kind, pool_of, prepare,
                                      preprocess_image, preprocess_volume, read_mask, read_raw, read_table, salt, virtual_table)
from medxfer_nb.data.cases import CaseError
from medxfer_nb.data.ct import Grid, save_nifti

quiet = lambda line: None
NAMES = [f'Doe^{n}' for n in ('Anna', 'Bert', 'Carl', 'Dora', 'Emil', 'Fred', 'Gina', 'Hugo')]


def refuses(call, *words, row=None):
    "The error names all of these, and the row"
    with pytest.raises(TableError) as e: call()
    for w in words: assert str(w) in str(e.value), str(e.value)
    if row is not None: assert f'row {row}:' in str(e.value), str(e.value)
    assert not any(n in str(e.value) for n in NAMES), 'a message names a patient'
    return e.value

def dicom(path, pixels, **elements):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.SOPClassUID, ds.SOPInstanceUID = ExplicitVRLittleEndian, '1.2.840.10008.5.1.4.1.1.4', generate_uid()
    ds.PatientName, ds.PatientID, ds.Modality, ds.SeriesInstanceUID = 'Doe^Jane', '4711', 'MR', '1.2.3'
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *pixels.shape, 1, 'MONOCHROME2'
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    for k, v in elements.items(): setattr(ds, k, v)
    ds.PixelData = pixels.astype('<u2').tobytes()
    ds['PixelData'].VR = 'OW'
    ds.save_as(path, enforce_file_format=True)
    return path

def films(folder, n=8, size=(40, 50), **columns):
    "PNG files and the rows of a table of them"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(n): Image.fromarray(rng.integers(0, 256, size, 'uint8')).save(folder/f'{i}.png')
    return pd.DataFrame(dict(path=[f'{i}.png' for i in range(n)], patient=(NAMES * n)[:n], label=[i % 2 for i in range(n)], **columns))

def masked(folder, n=7, size=(40, 50)):
    "PNG files with PNG masks"
    rows = films(folder, n, size).drop(columns='label').assign(mask=[f'm{i}.png' for i in range(n)])
    for i in range(n):
        m = np.zeros(size, 'uint8')
        m[5:20 + i, 8:30] = 255
        Image.fromarray(m).save(folder/f'm{i}.png')
    return rows

def scans(folder, n=7, shape=(6, 20, 24), spacing=(5., 1., 2.), values=(1,), hu=False, dtype='float32'):
    "NIfTI volumes with masks"
    folder.mkdir(parents=True, exist_ok=True)
    rng, grid = np.random.default_rng(1), Grid.plain(shape, spacing)
    for i in range(n):
        image = rng.uniform(-1000, 900, shape) if hu else rng.uniform(0, 500, shape)
        mask = np.zeros(shape, 'uint8')
        for k, v in enumerate(values): mask[1 + k, 4:12, 6 + i:14 + i] = v
        save_nifti(image.astype(dtype), grid, folder/f'v{i}.nii.gz')
        save_nifti(mask, grid, folder/f'm{i}.nii.gz')
    return pd.DataFrame(dict(path=[f'v{i}.nii.gz' for i in range(n)], mask=[f'm{i}.nii.gz' for i in range(n)], patient=(NAMES * n)[:n]))

def csv(rows, path):
    rows.to_csv(path, index=False)
    return path


# ---- the table

def test_csv_and_frame_give_the_same_table(tmp_path):
    rows = films(tmp_path, weight=1.)
    a, b = read_table(csv(rows, tmp_path/'cases.csv')), read_table(rows, root=tmp_path)
    pd.testing.assert_frame_equal(a.frame, b.frame)
    assert (a.labels, a.exclusive, a.task, len(a)) == (('label',), False, 'classification', 8)
    assert np.array_equal(a.targets[:, 0], np.arange(8) % 2) and np.array_equal(a.patients, np.arange(8))
    assert a.frame['row'].tolist() == list(range(2, 10)) and a.where(3) == 'row 5'

def test_delimiters_blank_lines_and_byte_order_mark(tmp_path):
    rows = films(tmp_path)
    lines = rows.to_csv(index=False, sep=';').splitlines()
    lines.insert(3, '')
    (tmp_path/'a.csv').write_text('\r\n'.join(lines), encoding='utf-8-sig')
    table = read_table(tmp_path/'a.csv')
    assert table.frame['row'].tolist() == [2, 3, 5, 6, 7, 8, 9, 10]
    (tmp_path/'b.csv').write_text(rows.to_csv(index=False, sep='\t').replace('path', 'Path').replace('label', 'LABEL'))
    assert len(read_table(tmp_path/'b.csv')) == 8

def test_empty_columns_of_a_spreadsheet(tmp_path):
    rows = films(tmp_path)
    (tmp_path/'a.csv').write_text('\n'.join(line + ',,' for line in rows.to_csv(index=False).splitlines()))
    pd.testing.assert_frame_equal(read_table(tmp_path/'a.csv').frame, read_table(rows, root=tmp_path).frame)
    (tmp_path/'b.csv').write_text((tmp_path/'a.csv').read_text().replace('1,,', '1,x,y'))
    refuses(lambda: read_table(tmp_path/'b.csv'), 'column without a name stands twice')

def test_empty_and_unreadable_tables(tmp_path):
    for content, words in ((b'', 'empty'), (b'\n \n', 'empty'), (b'path,patient,label\n', 'no rows'), (b'path,patient,label\n\n,,\n', 'no rows'),
                           (b'path,patient\n\n1,2,3,4\n', 'row 3: 4 cells'), ('path,patient,label\na,b,\u00e4'.encode('latin-1'), 'UTF-8')):
        (tmp_path/'bad.csv').write_bytes(content)
        refuses(lambda: read_table(tmp_path/'bad.csv'), words)
    refuses(lambda: read_table(tmp_path/'none.csv'), 'is the path right')
    refuses(lambda: read_table(tmp_path/'cases.xlsx'), 'save it as CSV')
    rows = films(tmp_path)
    refuses(lambda: read_table(rows.drop(columns='patient'), root=tmp_path), "no column 'patient'")
    refuses(lambda: read_table(rows.drop(columns='label'), root=tmp_path), 'nothing to learn')
    refuses(lambda: read_table(rows, 'segmentation', root=tmp_path), "no column 'mask'")
    refuses(lambda: read_table(rows, 'diagnosis', root=tmp_path), 'classification')
    refuses(lambda: read_table(rows, labels=['Edema'], root=tmp_path), "no column 'Edema'")

def test_every_fault_of_a_row_is_told(tmp_path):
    rows = films(tmp_path, weight='1', split='').astype(str).drop(columns='label').assign(Edema=['0', '1'] * 4)
    cell = lambda i, **new: rows.assign(**{k: [v if j == i else old for j, old in enumerate(rows[k])] for k, v in new.items()})
    read = lambda r: lambda: read_table(r, root=tmp_path)
    refuses(read(cell(3, path='gone.png')), 'gone.png', 'correct it', row=5)
    refuses(read(cell(3, path='')), 'no path', row=5)
    refuses(read(cell(0, patient=' ')), 'no patient', row=2)
    refuses(read(cell(7, Edema='2')), "Edema is '2'", 'write 1 or 0', row=9)
    refuses(read(cell(7, Edema='')), 'no label is known', row=9)
    for w in ('0', '-1', 'nan?', 'inf'): refuses(read(cell(2, weight=w)), 'weight', 'positive', row=4)
    refuses(read(cell(2, split='valid')), 'train or test', row=4)
    refuses(read(cell(2, split='train')), 'other rows have one', row=2)
    refuses(read(cell(4, path='2.png')), 'same path as row 4', row=6)
    all_bad = cell(3, path='gone.png', weight='-1', Edema='x')
    error = refuses(read(all_bad), '3 faults')
    assert str(error).count('row 5:') == 3 and error.row == 5
    many = rows.assign(path='gone.png')
    assert 'and' in str(refuses(read(many), 'more')) and str(refuses(read(many))).count('\n') == 11

@pytest.mark.parametrize('n', [1, 3, MIN_PATIENTS - 1])
def test_few_patients(tmp_path, n):
    rows = films(tmp_path, 8).assign(patient=[NAMES[i % n] for i in range(8)])
    refuses(lambda: read_table(rows, root=tmp_path), f'{n} patient', f'at least {MIN_PATIENTS}', 'add cases')

def test_one_class_only(tmp_path):
    rows = films(tmp_path)
    for label in (1, 'tumour'): refuses(lambda: read_table(rows.assign(label=label), root=tmp_path), 'one class only', 'rows 2 to 9')
    several = rows.drop(columns='label').assign(Edema=[0, 1] * 4, Nodule=0)
    refuses(lambda: read_table(several, root=tmp_path), "'Nodule'", 'leave the label out')
    assert read_table(several, labels=['Edema'], root=tmp_path).labels == ('Edema',)
    split = rows.assign(split=['train', 'test'] * 4) # all of class 1 are to test
    refuses(lambda: read_table(split, root=tmp_path), 'one class only', 'of the train rows')

def test_classes_and_findings(tmp_path):
    rows = films(tmp_path)
    two = read_table(rows.assign(label=['tumour', 'No finding'] * 4), root=tmp_path)
    assert two.labels == ('tumour',) and not two.exclusive and two.targets[:2, 0].tolist() == [1, 0]
    three = read_table(rows.assign(label=[2, 1, 10, 2, 1, 10, 2, 1]), root=tmp_path)
    assert three.labels == ('1', '2', '10') and three.exclusive
    assert np.array_equal(three.targets.argmax(1), [1, 0, 2, 1, 0, 2, 1, 0]) and (three.targets.sum(1) == 1).all()
    multi = read_table(rows.drop(columns='label').assign(A=[1, 0, -1, '', 1, 0, 1, 0], B=[True, False] * 4, sex=[0, 1] * 4, age=range(50, 58)), root=tmp_path)
    assert multi.labels == ('A', 'B')
    np.testing.assert_array_equal(multi.targets[:, 0], [1, 0, np.nan, np.nan, 1, 0, 1, 0])
    assert multi.summary().loc['A', ['positive', 'negative', 'unknown']].tolist() == [3, 3, 2]
    named = read_table(rows.rename(columns={'patient': 'ID'}).assign(sex=[0, 1] * 4), labels='sex', patient='ID', root=tmp_path)
    assert named.labels == ('sex',)
    refuses(lambda: read_table(rows.assign(label=['Tumour', 'tumour', 'no', 'no'] * 2), root=tmp_path), 'also written otherwise')

def test_repr_has_no_names(tmp_path):
    table = read_table(films(tmp_path).assign(split=['train'] * 6 + ['test'] * 2), root=tmp_path)
    for text in (repr(table), table._repr_html_()): assert not any(n in text for n in NAMES)
    assert '8 cases of 8 patients, 6 to train, 2 to test' in repr(table)

def test_sorts_of_files_do_not_mix(tmp_path):
    rows = scans(tmp_path)
    refuses(lambda: read_table(rows.drop(columns='mask').assign(label=[0, 1, 0, 1, 0, 1, 0]), root=tmp_path), 'class labels of volumes', 'masks')
    films(tmp_path)
    refuses(lambda: read_table(rows.assign(path=['0.png', *rows['path'][1:]]), root=tmp_path), 'make a table of each sort')
    masked(tmp_path)
    refuses(lambda: read_table(rows.assign(mask=['m0.png', *rows['mask'][1:]]), root=tmp_path), 'NIfTI', row=2)
    refuses(lambda: read_table(rows.assign(mask=['', *rows['mask'][1:]]), root=tmp_path), 'no mask', row=2)


# ---- structures

def test_structures_from_masks(tmp_path):
    assert read_table(masked(tmp_path/'a'), root=tmp_path/'a').values == ((255,),)
    table = read_table(scans(tmp_path/'b', values=(1, 2, 4)), root=tmp_path/'b')
    assert table.labels == ('1', '2', '4') and table.regions == {'1': (1,), '2': (2,), '4': (3,)}
    brats = read_table(scans(tmp_path/'b', values=(1, 2, 4)), root=tmp_path/'b', labels={'ET': 4, 'TC': (1, 4), 'WT': (1, 2, 4)})
    stored = nib.load(tmp_path/'b/m0.nii.gz').get_fdata()
    mask = brats.read(0).mask
    for name, values in (('ET', [4]), ('TC', [1, 4]), ('WT', [1, 2, 4])):
        assert np.isin(mask, brats.regions[name]).sum() == np.isin(stored, values).sum() > 0
    refuses(lambda: prepare(brats, tmp_path/'p', dimension=2, progress=quiet), 'dimension=3')
    whole = read_table(scans(tmp_path/'b', values=(1, 2, 4)), root=tmp_path/'b', labels={'whole': (1, 2, 4)})
    assert whole.read(0).mask.max() == 1 and pool_kind(whole, 2) == 'slices'
    empty = nib.Nifti1Image(np.zeros((24, 20, 6), 'uint8'), nib.load(tmp_path/'b/m0.nii.gz').affine)
    for i in range(7): nib.save(empty, tmp_path/f'b/m{i}.nii.gz')
    rows = pd.DataFrame(dict(path=[f'v{i}.nii.gz' for i in range(7)], mask=[f'm{i}.nii.gz' for i in range(7)], patient=NAMES[:7]))
    refuses(lambda: read_table(rows, root=tmp_path/'b'), 'every mask is empty')


def test_structures_that_no_mask_can_hold(tmp_path):
    rows = scans(tmp_path)
    for labels, words in (({'background': 0, 'lesion': 1}, "'background': 0"), ({'lesion': ()}, "'lesion'"), ({'lesion': 'x'}, "'x'"), ({'lesion': 1.5}, '1.5'),
                          (['a', 'a'], 'a name of its own'), ([''], 'a name of its own')):
        refuses(lambda: read_table(rows, root=tmp_path, labels=labels), words)
    assert read_table(rows, root=tmp_path, labels={}).labels == ('lesion',)

@pytest.mark.parametrize('bad', [np.nan, np.inf, .5, -2])
def test_numbers_in_masks_that_are_none(tmp_path, bad):
    "Named by row, as soon as the row is read; never a bare error of a conversion"
    rows = scans(tmp_path)
    mask = np.zeros((6, 20, 24), 'float32')
    mask[2, 3:8, 3:8], mask[0, 0, 0] = 1, bad
    save_nifti(mask, Grid.plain(mask.shape, (5., 1., 2.)), tmp_path/'m2.nii.gz')
    if np.isfinite(bad): refuses(lambda: read_table(rows, root=tmp_path), f'{bad:g}', 'are they masks')
    refuses(lambda: read_table(rows, root=tmp_path, labels='lesion').read(2), f'{bad:g}', 'correct the mask', row=4)
    if not np.isfinite(bad): refuses(lambda: prepare(read_table(rows, root=tmp_path), tmp_path/'p', progress=quiet), f'{bad:g}', row=4)

def test_structures_smaller_than_a_voxel(tmp_path):
    "Told by row; refused where less than two patients keep them; what is left is scored as it is"
    rows = scans(tmp_path, shape=(32, 32, 32))
    dot = np.zeros((32, 32, 32), 'uint8')
    dot[9, 9, 9] = 1
    block = np.zeros((32, 32, 32), 'uint8')
    block[8:16, 8:16, 8:16] = 1
    for i in range(7): save_nifti(dot if i in (1, 4) else block, Grid.plain(dot.shape, (5., 1., 2.)), tmp_path/f'm{i}.nii.gz')
    said = []
    pool = prepare(read_table(rows, root=tmp_path), tmp_path/'p', 16, progress=said.append)
    assert [line for line in said if "'lesion' is smaller than a voxel at 16 px in 2 of the 7 cases that have it (rows 3, 6)" in line]
    assert [i for i in range(7) if not pool.data.labels[i].any()] == [1, 4]
    said.clear()
    prepare(read_table(rows, root=tmp_path), tmp_path/'q', 32, progress=said.append)
    assert len(said) == 1 and 'voxel' not in said[0]
    for i in range(7): save_nifti(dot, Grid.plain(dot.shape, (5., 1., 2.)), tmp_path/f'm{i}.nii.gz')
    refuses(lambda: prepare(read_table(rows, root=tmp_path), tmp_path/'r', 16, progress=quiet), 'in 7 of the 7 cases', 'larger size')
    assert not (tmp_path/'r/pool.json').exists()


# ---- files that cannot be used: `read`, and `prepare` through it

def test_truncated_and_missing_files(tmp_path):
    rows = films(tmp_path)
    dicom(tmp_path/'scan.dcm', np.arange(600).reshape(20, 30))
    whole = (tmp_path/'scan.dcm').read_bytes()
    table = read_table(rows.assign(path=[*rows['path'][:4], 'scan.dcm', *rows['path'][5:]]), root=tmp_path)
    assert prepare(table, tmp_path/'pool', 32, progress=quiet).data.pixels.shape == (8, 32, 32)
    for kept in (200, len(whole) - 100):
        (tmp_path/'scan.dcm').write_bytes(whole[:kept])
        for call in (lambda: table.read(4), lambda: prepare(table, tmp_path/'pool2', progress=quiet)):
            error = refuses(call, 'scan.dcm', 'remove the row', row=6)
            assert (error.kind, error.row) == ('unreadable', 6)
    assert not (tmp_path/'pool2/pool.json').exists()
    (tmp_path/'scan.dcm').write_bytes(b'')
    refuses(lambda: table.read(4), 'empty file', row=6)

def test_volumes_with_nan(tmp_path):
    table = read_table(scans(tmp_path), root=tmp_path)
    array = np.ones((6, 20, 24), 'float32')
    array[2, 3, :4] = np.nan
    array[2, 3, 4] = np.inf
    save_nifti(array, Grid.plain(array.shape, (5., 1., 2.)), tmp_path/'v2.nii.gz')
    for call in (lambda: table.read(2), lambda: prepare(table, tmp_path/'p', progress=quiet)):
        assert refuses(call, '5 of 2,880 voxels', 'repair', row=4).kind == 'numbers'
    (tmp_path/'v2.nii.gz').write_bytes((tmp_path/'v1.nii.gz').read_bytes()[:900])
    assert refuses(lambda: table.read(2), 'v2.nii.gz', row=4).kind == 'unreadable'

def test_masks_that_do_not_fit(tmp_path):
    a, b = tmp_path/'a', tmp_path/'b'
    table = read_table(masked(a), root=a)
    read = lambda: table.read(3)
    Image.fromarray(np.zeros((40, 49), 'uint8')).save(a/'m3.png')
    error = refuses(read, '40 x 49', '40 x 50', 'correct the mask', row=5)
    assert error.kind == 'mask' and 'row 5:' in str(refuses(lambda: prepare(table, tmp_path/'p', progress=quiet)))
    Image.fromarray(np.full((40, 50), 7, 'uint8')).save(a/'m3.png')
    refuses(read, 'unknown labels 7', 'lesion = 255', row=5)
    Image.fromarray(np.zeros((40, 50), 'uint8')).save(a/'m3.png', format='JPEG')
    refuses(read, 'save it as PNG', row=5)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), 'uint8')).save(a/'m3.png')
    refuses(read, 'in colours', row=5)
    gray = np.zeros((40, 50, 3), 'uint8'); gray[3:9] = 255 # gray, saved in colour
    Image.fromarray(gray).save(a/'m3.png')
    assert table.read(3).mask.sum() == 300
    volumes = read_table(scans(b), root=b)
    save_nifti(np.zeros((6, 20, 23), 'uint8'), Grid.plain((6, 20, 23), (5., 1., 2.)), b/'m3.nii.gz')
    refuses(lambda: volumes.read(3), '6 x 20 x 23', row=5)
    save_nifti(np.zeros((6, 20, 24), 'uint8'), Grid.plain((6, 20, 24), (5., 1., 2.), (30., 0., 0.)), b/'m3.nii.gz')
    refuses(lambda: volumes.read(3), '30 mm beside', row=5)

def test_other_axes_of_a_mask(tmp_path):
    table = read_table(scans(tmp_path), root=tmp_path)
    wanted = table.read(1).mask
    image = nib.load(tmp_path/'m1.nii.gz')
    nib.save(nib.as_closest_canonical(image), tmp_path/'m1.nii.gz') # stored along other axes, at the same place
    assert (nib.load(tmp_path/'m1.nii.gz').affine != image.affine).any()
    assert np.array_equal(table.read(1).mask, wanted)

def test_dicom_series_of_any_modality(tmp_path):
    stack = np.random.default_rng(0).integers(0, 3000, (5, 8, 9))
    (tmp_path/'s').mkdir()
    for i in (3, 0, 4, 1, 2): # 6 mm up with every slice
        dicom(tmp_path/f's/{9 - i}.dcm', stack[i], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[-10, -20, 6. * i], PixelSpacing=[.8, .7], RescaleSlope=2, RescaleIntercept=5)
    raw = read_raw(tmp_path/'s')
    assert np.array_equal(raw.image[0], stack * 2 + 5) and not raw.is_hu
    np.testing.assert_allclose(raw.spacing, (6, .8, .7))
    os.remove(tmp_path/'s/7.dcm')
    with pytest.raises(CaseError, match='1 slice'): read_raw(tmp_path/'s')

def test_pixel_spacing_of_dicom_images(tmp_path):
    for i in range(7): dicom(tmp_path/f'{i}.dcm', np.full((20, 40), i), PixelSpacing=[.5, .25])
    for i in range(7): Image.fromarray(np.eye(20, 40, dtype='uint8')).save(tmp_path/f'm{i}.png')
    rows = pd.DataFrame(dict(path=[f'{i}.dcm' for i in range(7)], mask=[f'm{i}.png' for i in range(7)], patient=NAMES[:7]))
    pool = prepare(read_table(rows, root=tmp_path), tmp_path/'p', 40, progress=quiet)
    assert (pool.kind, pool.unit) == ('slices', 'mm')
    np.testing.assert_allclose(pool.steps, [[1, .25, .25]] * 7)
    png = prepare(read_table(masked(tmp_path/'png'), root=tmp_path/'png'), tmp_path/'q', 40, progress=quiet)
    assert png.unit == 'px' and (png.steps == 1).all() and np.isnan(png.spacings[:, 0]).all()


# ---- pools

def test_films_against_pillow(tmp_path):
    table = read_table(films(tmp_path, size=(64, 96)), root=tmp_path)
    pool = prepare(table, tmp_path/'p', 32, progress=quiet)
    for i in range(8):
        other = np.asarray(Image.open(tmp_path/f'{i}.png').resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(pool.data.pixels[i] - other).max() <= 1
        assert np.array_equal(preprocess_image(tmp_path/f'{i}.png', pool.preprocessing), pool.data.pixels[i])
    assert np.array_equal(pool.targets, table.targets) and np.array_equal(pool.patients, table.patients)
    assert np.isnan(pool.spacings).all() and pool.regions == {} and pool.task == 'classification'

def test_volumes_against_block_means(tmp_path):
    rows = scans(tmp_path, shape=(32, 64, 32), spacing=(2., 1., 3.))
    table = read_table(rows, root=tmp_path)
    pool = prepare(table, tmp_path/'p', 32, progress=quiet)
    x = table.read(4).image[0]
    low, high = np.percentile(x, (.5, 99.5))
    assert pool.data.images.shape == (7, 1, 32, 32, 32) and pool.preprocessing['intensity'] == 'percentiles'
    np.testing.assert_allclose(np.percentile(np.float32(pool.data.images[4, 0]), 50), (np.median(x) - low) / (high - low), atol=.02)
    np.testing.assert_allclose(pool.spacings, [[2, 2, 3]] * 7)
    mask = table.read(4).mask
    lines = mask.reshape(32, 32, 2, 32).mean(2) # 1 of 2 voxels is a tie, which the smaller number wins
    assert np.array_equal(pool.data.labels[4], lines > .5)

def test_slices_of_volumes(tmp_path):
    table = read_table(scans(tmp_path, shape=(6, 32, 32), hu=True, values=(1, 3)), root=tmp_path)
    pool = prepare(table, tmp_path/'p', 32, dimension=2, progress=quiet)
    assert len(pool.data) == 42 and pool.data.class_names == ('background', '1', '3') and pool.preprocessing['intensity'] == 'window'
    raw = table.read(2)
    wanted = (np.clip(raw.image[0], -1000, 400) + 1000) / 1400
    np.testing.assert_allclose(pool.data.pixels[pool.items([2])], wanted, atol=1e-3)
    assert np.array_equal(pool.data.masks[pool.items([2])], np.select([raw.mask == 1, raw.mask == 2], [1, 2], 0))
    assert np.array_equal(pool.data.volume, pool.cases) and np.array_equal(pool.data.z, np.tile(np.arange(6), 7))

def test_scale_does_not_depend_on_the_order(tmp_path):
    scans(tmp_path/'a', hu=True)
    rows = scans(tmp_path/'b')
    shutil.copy(tmp_path/'a/v5.nii.gz', tmp_path/'b/v0.nii.gz') # one in HU
    a = prepare(read_table(rows, root=tmp_path/'b'), tmp_path/'p', 16, progress=quiet)
    b = prepare(read_table(rows[::-1].reset_index(drop=True), root=tmp_path/'b'), tmp_path/'q', 16, progress=quiet)
    assert a.preprocessing == b.preprocessing and a.preprocessing['intensity'] == 'percentiles'
    assert np.array_equal(a.data.images, b.data.images[::-1])
    ct = prepare(read_table(scans(tmp_path/'a', hu=True), root=tmp_path/'a'), tmp_path/'r', 16, progress=quiet)
    with pytest.raises(CaseError, match='not Hounsfield'): preprocess_volume(tmp_path/'b/v3.nii.gz', ct.preprocessing)

def test_channels(tmp_path):
    rows = scans(tmp_path)
    for i in range(7):
        image = nib.load(tmp_path/f'v{i}.nii.gz')
        x = image.get_fdata().astype('float32')
        nib.save(nib.Nifti1Image(np.stack([x, 1000 - x, x**2], -1), image.affine), tmp_path/f'v{i}.nii.gz')
    table = read_table(rows, root=tmp_path)
    pool = prepare(table, tmp_path/'p', 16, progress=quiet)
    assert pool.channels == 3 and pool.data.modalities == ('channel 1', 'channel 2', 'channel 3')
    np.testing.assert_allclose(pool.data.images[:, 0], 1 - np.float32(pool.data.images[:, 1]), atol=2e-3)
    refuses(lambda: prepare(table, tmp_path/'q', 32, dimension=2, progress=quiet), 'dimension=3', row=2)
    nib.save(nib.Nifti1Image(x[..., None], image.affine), tmp_path/'v3.nii.gz')
    refuses(lambda: prepare(table, tmp_path/'q', 16, progress=quiet), '1 channels', row=5)

def test_channels_of_which_not_all_are_in_hounsfield_units(tmp_path):
    "CT and PET in one file: the window of the CT would leave nothing of the PET"
    rows, rng = scans(tmp_path), np.random.default_rng(0)
    for i in range(7):
        affine = nib.load(tmp_path/f'v{i}.nii.gz').affine
        nib.save(nib.Nifti1Image(np.stack([rng.uniform(*ends, (24, 20, 6)).astype('float32') for ends in ((-1000, 900), (0, 20))], -1), affine), tmp_path/f'v{i}.nii.gz')
    pool = prepare(read_table(rows, root=tmp_path), tmp_path/'p', 16, progress=quiet)
    assert pool.preprocessing['intensity'] == 'percentiles' and (np.float32(pool.data.images).std((2, 3, 4)) > .05).all()

def test_items_and_weights_by_brute_force(tmp_path):
    rows = scans(tmp_path).assign(weight=[.5, .5, .7, .8, 1.6, 4, 50])
    pool = prepare(read_table(rows, root=tmp_path), tmp_path/'p', 32, dimension=2, progress=quiet)
    for chosen in ([], [3], [6, 0, 4], range(7)):
        items = [i for c in chosen for i in range(len(pool.data)) if pool.cases[i] == c]
        assert pool.items(chosen).tolist() == items
        times = {0: 1, 1: 1, 2: 1, 3: 2, 4: 3, 5: 8, 6: 10}
        assert sorted(pool.training_items(chosen).tolist()) == sorted(i for i in items for _ in range(times[pool.cases[i]]))

def test_files_are_read_once(tmp_path):
    rows = films(tmp_path/'a')
    first = prepare(read_table(rows, root=tmp_path/'a'), tmp_path/'p', 32, progress=quiet)
    shutil.copytree(tmp_path/'a', tmp_path/'b')
    for i in range(8): os.rename(tmp_path/f'b/{i}.png', tmp_path/f'b/x{i}.png')
    other = rows.assign(path='x' + rows['path'], patient=[f'q{i}' for i in range(8)]) # the same cases under other names
    said = []
    same = prepare(read_table(other, root=tmp_path/'b'), tmp_path/'p', 32, progress=said.append)
    assert not said and same.fingerprint() == first.fingerprint()
    for change in (dict(label=[1, 0] * 4), dict(patient=['a', 'a', *NAMES[2:]]), dict(weight=[2] + [1] * 7), dict(split=['train'] * 6 + ['test'] * 2)):
        said = []
        new = prepare(read_table(rows.assign(**change), root=tmp_path/'a'), tmp_path/'p', 32, progress=said.append)
        assert said and new.fingerprint() != first.fingerprint()
    Image.fromarray(np.zeros((40, 50), 'uint8')).save(tmp_path/'a/3.png')
    new = prepare(read_table(rows, root=tmp_path/'a'), tmp_path/'p', 32, progress=quiet)
    assert new.data.pixels[3].max() == 0 and len(list((tmp_path/'p').glob('*.npy'))) == 1

@pytest.mark.parametrize('kind', ['films', 'slices', 'volumes'])
def test_round_trip_and_damage(tmp_path, kind):
    if kind == 'films': rows, size, dimension = films(tmp_path/'a'), 32, 3
    else: rows, size, dimension = scans(tmp_path/'a', values=(1, 2)), 32, 2 if kind == 'slices' else 3
    pool = prepare(read_table(rows, root=tmp_path/'a'), tmp_path/'p', size, dimension, progress=quiet)
    assert pool.kind == kind
    pool.save(tmp_path/'q')
    again = load_pool(tmp_path/'q')
    assert again.fingerprint() == pool.fingerprint() and again.regions == pool.regions and again.labels == pool.labels
    arrays = sorted((tmp_path/'q').glob('*.npy'))
    assert len(arrays) == (1 if kind == 'films' else 2)
    content = bytearray(arrays[0].read_bytes())
    content[-7] ^= 1
    arrays[0].write_bytes(content)
    refuses(lambda: load_pool(tmp_path/'q'), 'has changed', 'delete')
    arrays[0].write_bytes(content[:300])
    refuses(lambda: load_pool(tmp_path/'q'), 'damaged')
    (tmp_path/'q/pool.json').write_text('{')
    refuses(lambda: load_pool(tmp_path/'q'), 'damaged')
    (tmp_path/'q/pool.json').write_text(json.dumps({'version': 0}))
    refuses(lambda: load_pool(tmp_path/'q'), 'another version')

def test_interrupted_and_damaged_pools_are_made_again(tmp_path, monkeypatch):
    table = read_table(films(tmp_path), root=tmp_path)
    def stop(self, i, read=CaseTable.read):
        if i == 5: raise KeyboardInterrupt
        return read(self, i)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(CaseTable, 'read', stop)
        prepare(table, tmp_path/'p', 32, progress=quiet)
    refuses(lambda: load_pool(tmp_path/'p'), 'no pool in it')
    pool = prepare(table, tmp_path/'p', 32, progress=quiet)
    array = next((tmp_path/'p').glob('pixels-*.npy'))
    array.write_bytes(array.read_bytes()[:-50])
    assert prepare(table, tmp_path/'p', 32, progress=quiet).fingerprint() == pool.fingerprint()

def test_arrays_in_use_survive_a_new_pool(tmp_path):
    "Who has the arrays mapped keeps them when a pool is made again, or is saved to where it came from"
    table = read_table(films(tmp_path), root=tmp_path)
    pool = prepare(table, tmp_path/'p', 32, progress=quiet)
    wanted = np.array(pool.data.pixels)
    (tmp_path/'p/pool.json').unlink()
    def fails(self, i): raise TableError('stop')
    with pytest.MonkeyPatch.context() as m, pytest.raises(TableError):
        m.setattr('medxfer_nb.compare.table._shape_case', lambda *a: fails(*a[:2]))
        prepare(table, tmp_path/'p', 32, progress=quiet)
    assert np.array_equal(pool.data.pixels, wanted)
    own = load_pool(pool.save(tmp_path/'q'))
    (tmp_path/'q/pool.json').unlink()
    assert np.array_equal(load_pool(own.save(tmp_path/'q')).data.pixels, wanted)

def test_no_identifier_in_what_is_stored(tmp_path):
    for kind, rows, root in (('f', films(tmp_path/'Doe^Anna'), tmp_path/'Doe^Anna'), ('v', scans(tmp_path/'Doe^Bert'), tmp_path/'Doe^Bert')):
        pool = prepare(read_table(rows, root=root), tmp_path/kind, 32, progress=quiet)
        stored = b''.join(f.read_bytes() for f in (tmp_path/kind).iterdir())
        for secret in (*NAMES, *rows['path'], 'Doe'): assert secret.encode() not in stored, secret
        assert 'Doe' not in repr(pool)

def test_new_files(tmp_path):
    pool = prepare(read_table(masked(tmp_path), root=tmp_path), tmp_path/'p', 32, progress=quiet)
    new, raw = pool_of(tmp_path/'4.png', pool.preprocessing, pool.labels, pool.regions)
    assert np.array_equal(new.data.pixels, pool.data.pixels[4:5]) and raw.image.shape == (1, 1, 40, 50) and new.data.masks.max() == 0
    refuses(lambda: pool_of(tmp_path/'nothing.nii.gz', pool.preprocessing, pool.labels), 'trained on images')
    with pytest.raises(CaseError, match='nothing.png'): pool_of(tmp_path/'nothing.png', pool.preprocessing, pool.labels)

def test_sizes_and_dimensions(tmp_path):
    table = read_table(films(tmp_path), root=tmp_path)
    for size in (31, 48.5): refuses(lambda: prepare(table, tmp_path/'p', size, progress=quiet), 'size')
    refuses(lambda: prepare(table, tmp_path/'p', dimension=4, progress=quiet), 'dimension')
    refuses(lambda: prepare(read_table(scans(tmp_path/'v'), root=tmp_path/'v'), tmp_path/'p', 8, progress=quiet), 'size')


# ---- secrets and virtual patients

def test_salt(tmp_path):
    one, two = salt(tmp_path/'a'), salt(tmp_path/'b')
    assert len(one) == 16 and one != two and salt(tmp_path/'a') == one
    assert (tmp_path/'a/salt').stat().st_mode & 0o777 == 0o600
    codes = {hashed(n, one) for n in NAMES}
    assert len(codes) == len(NAMES) and all(len(c) == 12 and int(c, 16) >= 0 for c in codes) and not codes & {hashed(n, two) for n in NAMES}
    (tmp_path/'a/salt').write_bytes(b'short')
    refuses(lambda: salt(tmp_path/'a'), 'damaged')

def test_virtual_films(tmp_path):
    table = virtual_table(tmp_path/'v', n=30, labels=('Any finding',), progress=quiet)
    assert len(table) == 30 and table.labels == ('Any finding',) and len(np.unique(table.patients)) < 30
    before = (tmp_path/'v/film0003.png').stat().st_mtime_ns
    assert virtual_table(tmp_path/'v', n=30, labels=('Any finding',), progress=quiet).frame.equals(table.frame)
    assert (tmp_path/'v/film0003.png').stat().st_mtime_ns == before
    refuses(lambda: virtual_table(tmp_path/'w', n=8, labels=('Fracture',), progress=quiet), 'Fracture')
    refuses(lambda: virtual_table(tmp_path/'w', 'detection'), 'detection')
