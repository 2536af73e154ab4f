"Faults planted in small data sets, and what `inspect` says about them"
import json

import nibabel as nib, numpy as np, pandas as pd, pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from scipy import ndimage
from scipy.stats import binom

from medxfer_nb.compare.design import outer_folds
from medxfer_nb.compare.files import TableError
from medxfer_nb.compare.inspect import InspectionError, NEAR, equal_pairs, inspect, linked, linked_patients, load_inspection, near_pairs, other_share, separates
from medxfer_nb.compare.survey import LEVELS, nameless, perceptual_hash, survey
from medxfer_nb.compare.table import read_table
from medxfer_nb.data.ct import Grid, save_nifti
from medxfer_nb.evaluate.metrics import auc


def blob(seed, shape=(48, 48)):
    x = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3, mode='wrap')
    return np.rint(np.clip(127 + x / x.std() * 45, 0, 255)).astype(np.uint8)

def dicom(path, pixels, **elements):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName = '1.2.840.10008.5.1.4.1.1.1', generate_uid(), 'Doe^Jane'
    ds.Rows, ds.Columns, ds.SamplesPerPixel = *pixels.shape, 1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PhotometricInterpretation = 16, 12, 11, 0, 'MONOCHROME2'
    for k, v in elements.items(): setattr(ds, k, v)
    ds.PixelData = (pixels.astype('<u2') * 16).tobytes()
    ds['PixelData'].VR = 'OW'
    ds.save_as(path, enforce_file_format=True)

def films(folder, n=24, per=1, sick=lambda p: p % 2, write=None):
    "n patients with films, as files and a data frame"
    rows = []
    for i in range(n * per):
        name = f'f{i}.png'
        if write: name = write(folder, i) or name
        if not (folder/name).exists(): Image.fromarray(blob(i)).save(folder/name)
        rows.append(dict(path=name, patient=f'Muster-{i//per}', lesion=int(sick(i//per))))
    return pd.DataFrame(rows)

def volumes(folder, n=12):
    "n patients with a volume and a mask each"
    for i in range(n):
        x = np.stack([blob(100*i + z, (32, 32)) for z in range(8)]).astype(np.int16)
        mask = np.zeros(x.shape, np.uint8); mask[2:5, 8:16, 8:16] = 1
        for name, a in (('scan', x), ('mask', mask)): save_nifti(a, Grid.plain(a.shape, (2., 1., 1.)), folder/f'{name}{i}.nii.gz')
    return pd.DataFrame([dict(path=f'scan{i}.nii.gz', mask=f'mask{i}.nii.gz', patient=f'Muster-{i}') for i in range(n)])

def of(found, check, level=None): return [f for f in found.findings if f.check == check and level in (None, f.level)]


# pieces against brute force, closed forms, a second library

def test_near_pairs_brute_force():
    rng = np.random.default_rng(1)
    bits, groups = rng.random((523, 255)) < .5, rng.integers(0, 200, 523) # more than two blocks
    bits[400:500] = bits[:100] ^ (rng.random((100, 255)) < .09) # on both sides of the threshold
    brute = [[i, j] for i in range(523) for j in range(i + 1, 523) if groups[i] != groups[j] and (bits[i] ^ bits[j]).sum() <= NEAR]
    assert 10 < len(brute) < 100 and near_pairs(bits, groups).tolist() == brute

def test_equal_pairs_link_all_patients_of_an_image():
    rng = np.random.default_rng(2)
    digests, groups = [bytes([d]) for d in rng.integers(0, 60, 120)], np.unique(rng.integers(0, 50, 120), return_inverse=True)[1]
    pairs = equal_pairs(digests, groups)
    assert all(digests[i] == digests[j] and i < j for i, j in pairs)
    joined = linked(groups, pairs)
    for d in set(digests): assert len({joined[i] for i in range(120) if digests[i] == d}) == 1

def test_linked_is_transitive():
    patients = np.array([0, 1, 2, 3, 4, 0])
    assert linked(patients, np.array([[0, 1], [2, 3], [5, 2]])).tolist() == [0, 0, 0, 0, 1, 0]

def test_hash_ignores_brightness_and_size():
    for seed in range(20):
        a = blob(seed, (64, 64))
        for b in (np.clip(a*.7 + 30, 0, 255).astype(np.uint8), np.asarray(Image.fromarray(a).resize((50, 60), Image.BILINEAR))):
            assert (perceptual_hash(a) ^ perceptual_hash(b)).sum() <= NEAR

def test_separates_area():
    rng = np.random.default_rng(3)
    y = rng.random(40) < .5
    x = pd.DataFrame(dict(a=y*3. + rng.normal(size=40), b=rng.integers(0, 3, 40) - 6.*y))
    found = separates(x, y)
    assert set(found) == {'a', 'b'}
    for k in 'ab': assert found[k] == pytest.approx(max(auc(y.astype(float), x[k]), 1 - auc(y.astype(float), x[k])))

def test_separates_by_chance():
    "Twenty scores without meaning: a false alarm in at most 5 % of the data sets, however few the patients"
    rng, alarms, n = np.random.default_rng(4), 0, 200
    for _ in range(n):
        y = rng.permutation(12) < 5
        alarms += bool(separates(pd.DataFrame(rng.normal(size=(12, 20))), y))
    assert alarms <= binom.ppf(.999, n, .05)

def test_other_share_leaves_oneself_out():
    words, y = np.array(list('aabbbc')), np.array([1, 0, 1, 1, 0, 1], bool)
    brute = [np.mean([y[j] for j in range(6) if j != i and words[j] == words[i]] or [.5]) for i in range(6)]
    assert other_share(words, y) == pytest.approx(brute)


# whole data sets

def test_nothing_to_find(tmp_path):
    found = inspect(read_table(films(tmp_path, per=2), root=tmp_path))
    assert found.ok and not found.warnings and len(found.notes) == 2
    assert len(np.unique(found.groups)) == found.n_patients == 24 and found.n_cases == 48
    found.raise_errors()

def test_volumes_without_fault(tmp_path):
    found = inspect(read_table(volumes(tmp_path), root=tmp_path))
    assert found.ok and {f.check for f in found.warnings} == {'patients'} # 12 are few

def test_order_of_rows_does_not_matter(tmp_path):
    frame = films(tmp_path)
    for i, j in ((3, 8), (4, 9)): (tmp_path/f'f{j}.png').write_bytes((tmp_path/f'f{i}.png').read_bytes())
    (tmp_path/'f12.png').write_bytes(b'broken')
    order = np.random.default_rng(5).permutation(24)
    a, b = inspect(read_table(frame, root=tmp_path)), inspect(read_table(frame.iloc[order], root=tmp_path))
    back = dict(zip(range(2, 26), order + 2)) # row in the shuffled table -> row in the other
    key = lambda f, rows: (f.level, f.check, f.what.split(' (')[0], tuple(sorted(rows)))
    assert {key(f, f.rows) for f in a.findings} == {key(f, [back[r] for r in f.rows]) for f in b.findings}
    assert len(np.unique(a.groups)) == len(np.unique(b.groups)) == 22

def test_duplicated_patients(tmp_path):
    "The same films under other names: as they are, with other labels, on the other side of a split, and saved as JPEG"
    frame = films(tmp_path, n=40)
    for i, j in ((2, 4), (6, 7)): Image.open(tmp_path/f'f{i}.png').save(tmp_path/f'f{j}.png', compress_level=1) # other bytes, same pixels
    Image.open(tmp_path/'f10.png').save(tmp_path/'f12.jpg', quality=70)
    frame.loc[12, 'path'] = 'f12.jpg'
    found = inspect(read_table(frame, root=tmp_path))
    assert {(f.level, f.rows) for f in of(found, 'duplicates')} == {('warning', (4, 6)), ('error', (8, 9)), ('warning', (12, 14))}
    assert all(found.groups[i] == found.groups[j] for i, j in ((2, 4), (6, 7), (10, 12))) and len(np.unique(found.groups)) == 37
    with pytest.raises(InspectionError, match='rows 8, 9: identical images of different patients, with different labels.*one name in the column patient'):
        found.raise_errors()
    split = frame.assign(split=np.where(np.arange(40) < 3, 'test', 'train'))
    split.loc[[38, 39], 'split'] = 'test'
    split.loc[:, 'lesion'] = split['lesion'].where(split.index != 7, 0)
    split.loc[split.index == 0, 'lesion'] = 1
    assert ('error', (4, 6)) in {(f.level, f.rows) for f in of(inspect(read_table(split, root=tmp_path)), 'duplicates')}

def test_images_that_all_look_alike(tmp_path):
    "Near-duplicates that would join everyone join no one; identical ones still do"
    def write(folder, i): Image.fromarray(np.clip(blob(0) + np.random.default_rng(i).normal(0, 2, (48, 48)), 0, 255).astype(np.uint8)).save(folder/f'f{i}.png')
    frame = films(tmp_path, write=write)
    (tmp_path/'f5.png').write_bytes((tmp_path/'f3.png').read_bytes())
    s = survey(read_table(frame, root=tmp_path))
    groups = linked_patients(s)
    assert len(np.unique(groups)) == 23 and groups[3] == groups[5]

def test_own_copies_only_warn(tmp_path):
    frame = films(tmp_path, per=2)
    (tmp_path/'f1.png').write_bytes((tmp_path/'f0.png').read_bytes())
    found = inspect(read_table(frame, root=tmp_path))
    assert found.ok and [f.rows for f in of(found, 'duplicates')] == [(2, 3)] and len(np.unique(found.groups)) == 24

def test_patient_on_two_sides(tmp_path):
    frame = films(tmp_path, per=2).assign(split=['train', 'test'] + ['train']*26 + ['test']*20)
    found = inspect(read_table(frame, root=tmp_path))
    assert [f.rows for f in of(found, 'patients', 'error')] == [(2, 3)]
    assert inspect(read_table(frame.assign(split=['train']*28 + ['test']*20), root=tmp_path)).ok

@pytest.mark.parametrize('leak', ['size', 'format', 'scanner', 'mark', 'identifier', 'folder'])
def test_leaks(tmp_path, leak):
    "Classes that tell themselves by anything but the image"
    (tmp_path/'sick').mkdir()
    def write(folder, i):
        image, sick, name = Image.fromarray(blob(i)), i % 2, f'f{i}.png'
        if leak == 'size' and sick: image = image.resize((60, 48))
        if leak == 'format' and sick: name = f'f{i}.jpg'
        if leak == 'folder' and sick: name = f'sick/f{i}.png'
        if leak == 'mark' and sick: image.paste(255, (2, 40, 8, 46))
        if leak != 'scanner': image.save(folder/name)
        else: dicom(folder/(name := f'f{i}.dcm'), blob(i), Manufacturer=('A', 'B')[sick], PatientID=f'x{i}')
        return name
    frame = films(tmp_path, write=write)
    if leak == 'identifier': frame['patient'] = np.where(frame['lesion'] == 1, 'tumour', 'healthy') + frame['patient']
    found = inspect(read_table(frame, root=tmp_path))
    words = dict(size='width (1.00)', format='file format (1.00)', scanner='scanner (1.00)', mark='lower left', identifier='patient identifier (1.00)', folder='folder (1.00)')
    assert any(words[leak] in f.what for f in of(found, 'shortcuts', 'warning')), found.table.to_string()
    assert not inspect(read_table(frame.assign(lesion=[0, 0, 1, 1]*6), root=tmp_path)).of('error')

def test_one_person_under_two_names(tmp_path):
    "PatientID of the headers against the column patient; a placeholder that half of them share says nothing"
    def write(folder, i):
        dicom(folder/f'f{i}.dcm', blob(i), PatientID='ANONYMOUS' if i >= 12 else f'id{i - (i == 5)}') # 4 and 5 are one person
        return f'f{i}.dcm'
    found = inspect(read_table(films(tmp_path, write=write), root=tmp_path))
    assert [f.rows for f in of(found, 'patients', 'warning')] == [(6, 7)]
    assert found.groups[4] == found.groups[5] and len(np.unique(found.groups)) == 23

def test_one_person_on_two_sides(tmp_path):
    "An error, as no fold can mend a given split"
    def write(folder, i):
        dicom(folder/f'f{i}.dcm', blob(i), PatientID=f'id{i - (i == 12)}') # 11 and 12 are one person
        return f'f{i}.dcm'
    frame = films(tmp_path, write=write).assign(split=['train']*12 + ['test']*12)
    found = inspect(read_table(frame, root=tmp_path))
    assert [(f.rows, 'two sides' in f.what) for f in of(found, 'patients', 'error')] == [((13, 14), True)]

def test_likely_copies_leave_a_given_split_alone(tmp_path):
    "Nearly identical films, and names alike, across the split: told, and not joined, which the split would contradict; within a side they are"
    frame = films(tmp_path).assign(split=['train']*12 + ['test']*12)
    for i, j in ((1, 13), (2, 4)): Image.open(tmp_path/f'f{i}.png').resize((80, 80)).save(tmp_path/f'f{j}.png')
    frame.loc[[6, 18, 7, 9], 'patient'] = ['Q-1', 'q001', 'Q2', 'q 2']
    found = inspect(read_table(frame, root=tmp_path))
    assert found.ok and {f.rows for f in of(found, 'duplicates', 'warning')} == {(3, 15), (4, 6)} and {f.rows for f in of(found, 'patients', 'warning')} == {(8, 20), (9, 11)}
    assert outer_folds(found.groups, split=frame['split']).tolist() == [-1]*12 + [0]*12
    assert len(np.unique(found.groups)) == 22 and found.groups[2] == found.groups[4] and found.groups[7] == found.groups[9]

def test_names_written_differently(tmp_path):
    frame = films(tmp_path)
    frame.loc[:5, 'patient'] = ['P-007', 'p7', 'A1-1', 'A11', 'Z²', 'z 2'] # the second and the third pair differ
    found = inspect(read_table(frame, root=tmp_path))
    assert [f.rows for f in of(found, 'patients', 'warning')] == [(2, 3)] and len(np.unique(found.groups)) == 23

def test_blank_pictures_are_no_copies_but_whole_copies_are(tmp_path):
    "The middle slice of a volume may be empty; a constant channel does not hide that two volumes are the same"
    frame, grid = volumes(tmp_path), Grid.plain((8, 32, 32), (2., 1., 1.))
    for i in (0, 1, 2):
        x = np.stack([blob(100*i + z, (32, 32)) for z in range(8)]).astype(np.int16)
        x[4] = x.min()
        save_nifti(x, grid, tmp_path/f'scan{i}.nii.gz')
    for i in (5, 6):
        x = nib.load(tmp_path/'scan5.nii.gz')
        nib.save(nib.Nifti1Image(np.stack([np.asarray(x.dataobj), np.zeros(x.shape, np.int16)], -1), x.affine), tmp_path/f'two{i}.nii.gz')
    assert not of(inspect(read_table(frame, root=tmp_path)), 'duplicates')
    frame.loc[[5, 6], 'path'] = ['two5.nii.gz', 'two6.nii.gz']
    assert [f.rows for f in of(inspect(read_table(frame, root=tmp_path)), 'duplicates')] == [(7, 8)]

def test_facts_hold_no_patient(tmp_path):
    dicom(tmp_path/'a.dcm', blob(0), PatientID='Muster4711')
    frame = films(tmp_path).assign(path=lambda f: ['a.dcm', *f['path'][1:]])
    assert 'Muster' not in repr(survey(read_table(frame, root=tmp_path)).facts)

def test_no_name_leaves_the_table(tmp_path):
    "Not in what is shown, raised or stored, even if readers name files"
    def write(folder, i):
        dicom(folder/f'Muster_Max_{i}.dcm', blob(i), PatientID=f'Muster{i}')
        return f'Muster_Max_{i}.dcm'
    frame = films(tmp_path, write=write)
    data = (tmp_path/'Muster_Max_3.dcm').read_bytes()
    (tmp_path/'Muster_Max_3.dcm').write_bytes(data[:len(data) - 900])
    (tmp_path/'Muster_Max_4.dcm').write_bytes((tmp_path/'Muster_Max_5.dcm').read_bytes())
    found = inspect(read_table(frame, root=tmp_path), tmp_path/'results')
    with pytest.raises(InspectionError) as e: found.raise_errors()
    text = ''.join([str(e.value), repr(found), found._repr_html_(), *[p.read_text() for p in (tmp_path/'results').iterdir()]])
    assert 'row 5' in str(e.value) and 'Muster' not in text and str(tmp_path) not in text and '.dcm' not in text
    again = load_inspection(tmp_path/'results')
    assert again.findings == found.findings and (again.groups == found.groups).all() and again.counts.equals(found.counts)
    assert {f['level'] for f in json.loads((tmp_path/'results'/'inspection.json').read_text())['findings']} <= set(LEVELS)

def test_series(tmp_path):
    "A gap in a DICOM series: the row, the reason, and no name of a slice"
    def series(i, drop=()):
        folder, uid = tmp_path/f's{i}', generate_uid()
        folder.mkdir()
        for z in range(6):
            if z in drop: continue
            dicom(folder/f'Muster{i}_{z}.dcm', blob(10*i + z, (32, 32)), Modality='MR', SeriesInstanceUID=uid, ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                  ImagePositionPatient=[0, 0, 2.*z], PixelSpacing=[1, 1], PatientID=f'id{i}')
        mask = np.zeros((6 - len(drop), 32, 32), np.uint8); mask[2, 8:20, 8:20] = 1
        save_nifti(mask, Grid.plain(mask.shape, (2., 1., 1.), ), tmp_path/f'm{i}.nii.gz')
    for i in range(8): series(i, (3,) if i == 5 else ())
    frame = pd.DataFrame([dict(path=f's{i}', mask=f'm{i}.nii.gz', patient=i) for i in range(8)])
    found = inspect(read_table(frame, root=tmp_path))
    unreadable = of(found, 'unreadable')
    assert [f.rows for f in unreadable] == [(7,)] and 'missing between a slice and a slice' in unreadable[0].what and 'Muster' not in str(unreadable)

def test_nameless():
    assert nameless('a/b.png: damaged', 'a/b.png') == 'damaged'
    assert nameless('something else', 'a/b.png') == 'something else'


# bad input: the row and the remedy, before any training

def cut(path, keep): path.write_bytes(path.read_bytes()[:keep])

def test_truncated_dicom(tmp_path):
    def write(folder, i):
        dicom(folder/f'f{i}.dcm', blob(i), PatientID=f'x{i}')
        return f'f{i}.dcm'
    frame = films(tmp_path, write=write)
    cut(tmp_path/'f3.dcm', 3000); cut(tmp_path/'f4.dcm', 90)
    found = inspect(read_table(frame, root=tmp_path))
    assert {f.rows for f in of(found, 'unreadable', 'error')} == {(5,), (6,)}
    with pytest.raises(InspectionError, match=r'2 errors, nothing was trained\n.*row 5: .*or remove the row'): found.raise_errors()

def test_faulty_volumes(tmp_path):
    frame, grid = volumes(tmp_path), Grid.plain((8, 32, 32), (2., 1., 1.))
    nan = np.ones((8, 32, 32), np.float32); nan[0, 0, :5] = np.nan
    save_nifti(nan, grid, tmp_path/'scan1.nii.gz')
    save_nifti(np.zeros((8, 32, 30), np.uint8), Grid.plain((8, 32, 30), (2., 1., 1.)), tmp_path/'mask2.nii.gz')
    save_nifti(np.full((8, 32, 32), 7, np.int16), grid, tmp_path/'scan3.nii.gz')
    save_nifti(np.zeros((8, 32, 32), np.uint8), grid, tmp_path/'mask4.nii.gz')
    save_nifti(np.ones((8, 32, 32), np.uint8), grid, tmp_path/'mask5.nii.gz')
    cut(tmp_path/'scan6.nii.gz', 500)
    save_nifti(np.stack([blob(z, (32, 32)) for z in range(8)]).astype(np.int16), Grid.plain((8, 32, 32), (20., 1., 1.)), tmp_path/'scan7.nii.gz')
    save_nifti(np.eye(32, dtype=np.uint8)[None].repeat(8, 0), Grid.plain((8, 32, 32), (20., 1., 1.)), tmp_path/'mask7.nii.gz')
    frame.loc[8, 'mask'] = frame.loc[8, 'path']
    found = inspect(read_table(frame, root=tmp_path, labels='lesion'))
    levels = {f.rows[0]: f.level for f in found.findings if len(f.rows) == 1}
    assert levels == {3: 'error', 4: 'error', 5: 'error', 6: 'note', 7: 'warning', 8: 'error', 9: 'warning', 10: 'error'}, found.table.to_string()
    assert all(f.remedy for f in found.errors)

def test_hounsfield_mixture_and_channels(tmp_path):
    frame, grid = volumes(tmp_path), Grid.plain((8, 32, 32), (2., 1., 1.))
    for i in (2, 3): save_nifti(np.stack([blob(i*9 + z, (32, 32)) for z in range(8)]).astype(np.int16) * 8 - 1000, grid, tmp_path/f'scan{i}.nii.gz')
    found = inspect(read_table(frame, root=tmp_path))
    assert [f.rows for f in of(found, 'intensities')] == [(4, 5)] and 'Hounsfield' in of(found, 'intensities')[0].what

def test_too_few_of_a_class(tmp_path):
    found = inspect(read_table(films(tmp_path, sick=lambda p: p == 3), root=tmp_path))
    assert len(of(found, 'classes', 'error')) == 1 and "'lesion' = yes: 1 patient with 1 case" in of(found, 'classes', 'error')[0].what
    three = films(tmp_path).drop(columns='lesion').assign(label=['a', 'b', 'c', 'b']*6)
    found = inspect(read_table(three, root=tmp_path))
    assert {(c['label'], c['patients']) for c in found.counts.to_dict('records')} == {('a', 6), ('b', 12), ('c', 6)}
    assert len(of(found, 'classes', 'warning')) == 2
    split = films(tmp_path, sick=lambda p: p < 12 and p % 2).assign(split=['train']*12 + ['test']*12)
    with pytest.raises(TableError, match='lesion'): inspect(read_table(split, root=tmp_path)).raise_errors()

def test_faults_of_the_table_come_first(tmp_path):
    "Empty, missing file, one class only, three patients: told when the table is read, by row"
    frame = films(tmp_path)
    (tmp_path/'empty.csv').write_text('')
    for source, words in ((tmp_path/'empty.csv', 'empty'), (frame.replace('f3.png', 'gone.png'), 'row 5'), (frame.assign(lesion=1), 'one class'), (frame[:3], '3 patients')):
        with pytest.raises(TableError, match=words): inspect(read_table(source, root=tmp_path)).raise_errors()

def test_a_file_that_vanishes(tmp_path):
    table = read_table(films(tmp_path), root=tmp_path)
    (tmp_path/'f2.png').unlink()
    assert of(inspect(table), 'unreadable')[0].rows == (4,)

def test_nothing_can_be_read(tmp_path):
    table = read_table(films(tmp_path), root=tmp_path)
    for p in tmp_path.glob('*.png'): p.write_bytes(b'\x89PNG')
    found = inspect(table)
    assert not found.ok and len(found.errors[0].rows) == 24

def test_progress_and_threads(tmp_path):
    lines, table = [], read_table(films(tmp_path), root=tmp_path)
    a, b = survey(table, jobs=1, progress=lines.append), survey(table, jobs=5)
    assert lines and lines[-1].endswith('of 24 cases')
    assert [f.digest for f in a.facts] == [f.digest for f in b.facts]

def test_what_readers_warn_of(tmp_path):
    "A header with two places for the volume: a warning with the row, and without the name of the file"
    frame = volumes(tmp_path)
    image = nib.load(tmp_path/'scan3.nii.gz')
    header, moved = image.header.copy(), image.affine.copy()
    moved[:3, 3] += 50
    header.set_qform(moved, 1); header.set_sform(image.affine, 1)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, header), tmp_path/'scan3.nii.gz')
    found = of(inspect(read_table(frame, root=tmp_path)), 'header')
    assert [(f.level, f.rows) for f in found] == [('warning', (5,))] and 'qform and sform' in found[0].what and 'scan3' not in found[0].what
