"Readers of CheXpert, ChestX-ray14 and MURA on small folders in the publishers' exact layouts, and on real NIH images where present"
import os, pickle, re, shutil, warnings
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

from medxfer_nb.data.cases import OBSERVATIONS, CaseError
from medxfer_nb.data.xray import (TEST_SETS, apply_policy, check_images, check_patients, read_chestxray14, read_chexpert, read_mura, skipped)

FOURTEEN = ['No Finding', 'Enlarged Cardiomediastinum', 'Cardiomegaly', 'Lung Opacity', 'Lung Lesion', 'Edema', 'Consolidation', 'Pneumonia',
            'Atelectasis', 'Pneumothorax', 'Pleural Effusion', 'Pleural Other', 'Fracture', 'Support Devices']


def film(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40), dtype=np.uint8)).save(path)

def quiet(read, *args, **kw):
    "Call with `skip_bad=True`; give the cases and the text of the warning"
    with warnings.catch_warnings(record=True, action='always') as told: cases = read(*args, skip_bad=True, **kw)
    return cases, ' '.join(str(w.message) for w in told)


# CheXpert

def line(split, patient, study=1, view='frontal', n=1, name='CheXpert-v1.0-small', **labels):
    shown = ','.join(labels.get(l.replace(' ', '_'), '') for l in FOURTEEN)
    return f'{name}/{split}/patient{patient:05d}/study{study}/view{n}_{view}.jpg,Female,68,{view.title()},AP,{shown}'

def write_chexpert(root, split, lines, images=True):
    table = root/lines[0].split('/')[0]/f'{split}.csv'
    for l in lines if images else []: film(root/l.split(',')[0])
    table.write_text('\n'.join([','.join(['Path', 'Sex', 'Age', 'Frontal/Lateral', 'AP/PA', *FOURTEEN]), *lines]) + '\n')
    return table

@pytest.fixture
def chexpert(tmp_path):
    all_unsure = {l.replace(' ', '_'): '-1.0' for l in FOURTEEN}
    write_chexpert(tmp_path, 'train', [line('train', 1, Edema='1.0', Fracture='1.0'), line('train', 2, **all_unsure), line('train', 2, view='lateral', n=2, **all_unsure),
                                       line('train', 2, study=2, Cardiomegaly='0.0', Consolidation='1.0', Pleural_Effusion='1.0'), line('train', 3)])
    write_chexpert(tmp_path, 'valid', [line('valid', 64541, Atelectasis='1.0', Edema='0.0'), line('valid', 64542, Edema='1.0')])
    return tmp_path

@pytest.mark.parametrize('policy,unsure', [('paper', [1, 0, 0, 1, 1]), ('ones', [1]*5), ('zeros', [0]*5), ('ignore', [np.nan]*5), ('keep', [-1]*5), ('U-Ones', [1]*5),
                                           (dict(zip(OBSERVATIONS, ('keep', 'ones', 'ignore', 'zeros', 'ones'))), [-1, 1, np.nan, 0, 1])])
def test_chexpert_policies(chexpert, policy, unsure):
    c = read_chexpert(chexpert, 'train', policy)
    np.testing.assert_array_equal(c.targets, [[0, 0, 0, 1, 0], unsure, unsure, [0, 0, 1, 0, 1], [0]*5])
    assert c.labels == OBSERVATIONS and c.targets.dtype == np.float32

def test_chexpert_groups_pixels_and_parts(chexpert):
    c = read_chexpert(chexpert/'CheXpert-v1.0-small')
    assert c.patient_codes.tolist() == [0, 1, 1, 1, 2] and c.study_codes.tolist() == [0, 1, 1, 2, 3]
    assert c.frame['source'].tolist() == [f'train.csv line {i}' for i in range(2, 7)]
    assert c.frame['view'].tolist() == ['frontal', 'frontal', 'lateral', 'frontal', 'frontal']
    path = chexpert/'CheXpert-v1.0-small/train/patient00002/study1/view2_lateral.jpg'
    assert np.array_equal(c.image(2), np.asarray(Image.open(path)))
    assert [len(read_chexpert(chexpert, views=v)) for v in ('all', 'frontal', 'lateral')] == [5, 4, 1]
    assert read_chexpert(chexpert, TEST_SETS['chexpert'][0]).targets.tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]
    assert read_chexpert(chexpert, policy='zeros', labels=FOURTEEN).targets.sum(0).tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0]
    assert len(pickle.loads(pickle.dumps(c))) == 5

def test_chexpert_full_resolution(tmp_path):
    write_chexpert(tmp_path, 'train', [line('train', 1, name='CheXpert-v1.0')])
    assert len(read_chexpert(tmp_path)) == len(read_chexpert(tmp_path/'CheXpert-v1.0')) == 1
    (tmp_path/'CheXpert-v1.0').rename(tmp_path/'my copy') # the table still says CheXpert-v1.0/...
    assert read_chexpert(tmp_path/'my copy').image(0).shape == (48, 40)
    write_chexpert(tmp_path, 'train', [line('train', 1, name='CheXpert-v1.0')])
    write_chexpert(tmp_path, 'train', [line('train', 1)])
    with pytest.raises(CaseError, match='several data sets'): read_chexpert(tmp_path)

def damage(path, how):
    data = path.read_bytes()
    if how == 'gone': path.unlink()
    else: path.write_bytes({'empty': b'', 'garbage': b'\0' * len(data), 'cut': data[:len(data)//2], 'text': b'<html>'}[how])

@pytest.mark.parametrize('how', ['gone', 'empty', 'garbage', 'cut', 'text'])
def test_unreadable_image(chexpert, how):
    damage(chexpert/'CheXpert-v1.0-small/train/patient00002/study2/view1_frontal.jpg', how)
    with pytest.raises(CaseError, match=r'train\.csv line 5: .*\(train/patient00002/study2/view1_frontal\.jpg\)'): read_chexpert(chexpert)
    c, told = quiet(read_chexpert, chexpert)
    assert len(c) == 4 and skipped(c)['source'].tolist() == ['train.csv line 5']
    assert 'train.csv line 5' in told and 'skipped 1 of 5' in told and 'patient' not in told

def test_damage_in_the_middle(tmp_path):
    film(tmp_path/'a.png')
    data = bytearray((tmp_path/'a.png').read_bytes())
    data[len(data)//2] ^= 255
    (tmp_path/'a.png').write_bytes(data)
    assert check_images(tmp_path, pd.Series(['a.png']))[0] == ''
    assert 'damaged' in check_images(tmp_path, pd.Series(['a.png']), decode=True)[0]

EXTRA = [(line('train', 9, Edema='2'), "label Edema = '2'"), (line('train', 9, Edema='yes'), 'label Edema = (not a number'), (line('train', 9, Edema='68'), 'label Edema = (not a number from -9 to 9)'), (line('train', 9, Edema='0.5'), "label Edema = '0.5'"),
         (line('train', 9, Edema='nan'), 'label Edema = (not a number from'), (line('train', 1), 'listed twice'), (line('train', 64542), 'also in valid.csv line 3'),
         ('CheXpert-v1.0-small/train/view1_frontal.jpg,F,1,Frontal,AP' + ','*14, 'not of the form'), (line('valid', 9), 'not of the form'),
         (line('train', 9, view='oblique'), "Frontal/Lateral = 'oblique'"), (line('train', 10).rstrip(','), 'the line has 5 fields, not 19'),
         (line('train', 11, Edema='1.0') + ',1.0', 'the line has 20 fields, not 19')]

@pytest.mark.parametrize('bad,why', EXTRA, ids=[why for _, why in EXTRA])
def test_faulty_line(chexpert, bad, why):
    good = (chexpert/'CheXpert-v1.0-small/train.csv').read_text().splitlines()[1:]
    write_chexpert(chexpert, 'train', [*good[:2], bad, *good[2:]] if 'twice' not in why else [*good[:2], bad, good[4]])
    with pytest.raises(CaseError, match=rf'train\.csv line 4: .*{re.escape(why)}'): read_chexpert(chexpert)
    c, told = quiet(read_chexpert, chexpert)
    assert skipped(c)['source'].tolist() == ['train.csv line 4'] and why in skipped(c)['problem'][0]
    assert len(c) == (3 if 'twice' in why else 5) and 'patient' not in told
    assert skipped(c.subset([0]))['source'].tolist() == ['train.csv line 4']

def test_all_faults_at_once(chexpert):
    good = (chexpert/'CheXpert-v1.0-small/train.csv').read_text().splitlines()[1:]
    write_chexpert(chexpert, 'train', good + [l for l, _ in EXTRA])
    with pytest.raises(CaseError, match='train.csv line 7: .*11 more faults'): read_chexpert(chexpert)
    c, _ = quiet(read_chexpert, chexpert)
    assert len(c) == 5 and skipped(c)['source'].tolist() == [f'train.csv line {i}' for i in range(7, 19)]
    write_chexpert(chexpert, 'train', [l for l, _ in EXTRA[:3]])
    with pytest.raises(CaseError, match='no usable rows; train.csv line 2'): quiet(read_chexpert, chexpert)

def test_shared_patient_leaves_training_only(chexpert):
    good = (chexpert/'CheXpert-v1.0-small/train.csv').read_text().splitlines()[1:]
    write_chexpert(chexpert, 'train', [*good, line('train', 64541)])
    with pytest.raises(CaseError, match='valid.csv line 2: this patient is also in train.csv line 7'): read_chexpert(chexpert, 'valid')
    (train, _), (valid, _) = quiet(read_chexpert, chexpert), quiet(read_chexpert, chexpert, 'valid')
    assert (len(train), len(valid)) == (5, 2)
    check_patients(train, valid)
    with pytest.raises(CaseError, match='train.csv line 2: this patient is also in train.csv line 2'): check_patients(train, train)

def test_faulty_tables(chexpert):
    table = chexpert/'CheXpert-v1.0-small/train.csv'
    text = table.read_text()
    for new, why in [(text.replace('Edema', 'Oedema'), 'line 1: missing column Edema'), (text.splitlines()[0] + '\n', 'has no rows'), ('', 'has no rows'),
                     (text + 'a' + ',b'*40 + '\n', 'line 7: the line has 41 fields, not 19'), (text.replace('Female', '"Female'), 'line 2: the line has 2 fields, not 19.*; 4 more faults'), ('Path\n\xff', 'codec')]:
        table.write_text(new, encoding='latin-1')
        with pytest.raises(CaseError, match=f'train.csv.*{why}'): read_chexpert(chexpert)
    table.write_text('\ufeff' + text + '\n\n', encoding='utf-8') # byte order mark, blank lines at the end, as spreadsheets leave them
    assert len(read_chexpert(chexpert)) == 5
    table.unlink()
    with pytest.raises(CaseError, match='no train.csv in'): read_chexpert(chexpert)

def test_quoted_fields_and_windows_lines(chexpert):
    table, before = chexpert/'CheXpert-v1.0-small/train.csv', read_chexpert(chexpert).frame
    table.write_bytes(table.read_bytes().replace(b'Female', b'"Fe,""male"').replace(b'\n', b'\r\n'))
    assert read_chexpert(chexpert).frame.equals(before)

def test_unreadable_later_names_the_line(chexpert):
    c = read_chexpert(chexpert)
    damage(chexpert/'CheXpert-v1.0-small/train/patient00002/study2/view1_frontal.jpg', 'cut')
    with pytest.raises(CaseError, match=r'view1_frontal.jpg: .*\(row 3, train.csv line 5\)'): c.image(3)

def test_arguments_name_the_valid_ones(chexpert):
    for kw, why in [(dict(split='test'), "'train', 'valid'"), (dict(views='side'), "'all', 'frontal', 'lateral'"), (dict(policy='maybe'), "'paper', 'ones'"),
                    (dict(labels=['Fracture']), 'no policy for uncertain Fracture'), (dict(policy={'Edema': 'ones'}), 'Atelectasis'), (dict(labels=['Cough'], policy='ones'), 'missing column Cough')]:
        with pytest.raises(CaseError, match=why): read_chexpert(chexpert, **kw)

def test_apply_policy_leaves_the_rest_alone():
    frame = pd.DataFrame({'patient': ['a', 'b'], 'Edema': [-1, 1], 'Atelectasis': [np.nan, -1]})
    new = apply_policy(frame, 'paper')
    assert frame['Edema'].tolist() == [-1, 1] and new['patient'].tolist() == ['a', 'b'] and new['Edema'].tolist() == [1, 1]
    np.testing.assert_array_equal(new['Atelectasis'], [np.nan, 1])
    assert apply_policy(frame.assign(age=-1), 'paper', ['Edema'])['age'].tolist() == [-1, -1]


# ChestX-ray14

NIH = [('00000001_000.png', 'Cardiomegaly|Effusion', 0, 1), ('00000001_001.png', 'No Finding', 1, 1), ('00000002_000.png', 'Hernia|Infiltration|Pleural_Thickening', 0, 2),
       ('00000003_000.png', 'Atelectasis|Consolidation|Edema', 0, 3), ('00000003_001.png', 'Edema', 1, 3)]
HEADER = 'Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]'

def write_nih(root, rows=NIH, table='Data_Entry_2017_v2020.csv', folder=lambda i: 'images', train=(0, 1, 2), test=(3, 4)):
    for i, r in enumerate(rows): film(root/folder(i)/r[0])
    comma = ',' * ('v2020' not in table) # the first version of the table ends each line with a comma
    (root/table).write_text('\n'.join([HEADER + comma, *(','.join(map(str, r)) + ',57,M,PA,2682,2749,0.143,0.143' + comma for r in rows)]) + '\n')
    for name, which in (('train_val_list.txt', train), ('test_list.txt', test)): (root/name).write_text('\n'.join(rows[i][0] for i in which))
    return root

@pytest.mark.parametrize('table', ['Data_Entry_2017.csv', 'Data_Entry_2017_v2020.csv'])
@pytest.mark.parametrize('folder', [lambda i: 'images', lambda i: f'images_{i+1:03d}/images'], ids=['one folder', 'twelve'])
def test_nih(tmp_path, table, folder):
    root = write_nih(tmp_path, table=table, folder=folder)
    train, test, both = (read_chestxray14(root, s) for s in ('train', TEST_SETS['chestxray14'][0], None))
    assert train.targets.tolist() == [[0, 1, 0, 0, 1], [0]*5, [0]*5] and test.targets.tolist() == [[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]
    assert len(both) == 5 and both.patient_codes.tolist() == [0, 0, 1, 2, 2] and both.study_codes.tolist() == [0, 1, 2, 3, 4]
    assert train.image(2).shape == (48, 40) and set(both.frame['view']) == {'PA'}
    assert read_chestxray14(root, labels=('No Finding', 'Pleural_Thickening', 'Pleural Thickening', 'Effusion')).targets.tolist() == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 1, 0]]
    check_patients(train, test)

def test_nih_newer_table_first(tmp_path):
    write_nih(tmp_path, [(n, 'No Finding', f, p) for n, _, f, p in NIH], 'Data_Entry_2017.csv')
    assert read_chestxray14(write_nih(tmp_path), None).targets.sum() == 6

@pytest.mark.parametrize('change,split,why', [
    (lambda r: (r/'test_list.txt').write_text(f'{NIH[3][0]}\n{NIH[1][0]}'), 'test', r'v2020.csv line 3: this patient is also in train_val_list.txt line 1'),
    (lambda r: (r/'test_list.txt').write_text(f'{NIH[3][0]}\n{NIH[1][0]}'), 'train', r'v2020.csv line 2: this patient is also in test_list.txt line 2'),
    (lambda r: (r/'test_list.txt').write_text(f'{NIH[3][0]}\n\n00000009_000.png'), 'test', r'test_list.txt line 3: this image is not in the label table \(00000009_000.png\)'),
    (lambda r: (r/'test_list.txt').write_text(f'{NIH[3][0]}\n{NIH[3][0]}'), 'test', 'test_list.txt line 2: this image is listed twice'),
    (lambda r: (r/'test_list.txt').unlink(), 'test', 'test_list.txt is missing: .*split=None'),
    (lambda r: (r/'images'/NIH[4][0]).unlink(), 'test', r'v2020.csv line 6: No such file or directory \(00000003_001.png\)'),
    (lambda r: damage(r/'images'/NIH[4][0], 'cut'), 'test', r'v2020.csv line 6: damaged image file.*images/00000003_001.png'),
    (lambda r: write_nih(r, [*NIH[:4], ('00000003_001.png', 'Flu|Edema', 1, 3)]), 'test', 'v2020.csv line 6: unknown finding Flu'),
    (lambda r: write_nih(r, [*NIH[:4], ('00000003_001.png', '', 1, 3)]), 'test', "v2020.csv line 6: unknown finding ''"),
    (lambda r: write_nih(r, [*NIH[:4], ('00000003_001.png', 'No Finding|Edema', 1, 3)]), 'test', "v2020.csv line 6: 'No Finding' beside findings"),
    (lambda r: write_nih(r, [*NIH[:4], ('00000003_001.png', 'Edema', '', 3)]), 'test', 'v2020.csv line 6: the patient or study is blank'),
    (lambda r: write_nih(r, [*NIH[:4], ('00000003_001.png', 'Edema', 1, '')]), 'test', 'v2020.csv line 6: the patient or study is blank'),
    (lambda r: write_nih(r, [*NIH[:4], ('00000003_001.png', 'Edema', 1)]), 'test', 'v2020.csv line 6: the line has 10 fields, not 11'),
    (lambda r: (r/'test_list.txt').write_text(f'{NIH[3][0]}\n{NIH[4][0]},Edema'), 'test', 'test_list.txt line 2: the line has 2 fields, not 1'),
    (lambda r: shutil.rmtree(r/'images'), 'test', "neither a folder 'images'"),
    (lambda r: (r/'Data_Entry_2017_v2020.csv').unlink(), 'test', 'no Data_Entry_2017_v2020.csv or Data_Entry_2017.csv in'),
    (lambda r: (r/'Data_Entry_2017_v2020.csv').write_text('Image Index,Findings\na.png,Edema\n'), 'test', 'line 1: missing column Patient ID, Follow-up #, View Position, Finding Labels')])
def test_nih_faults(tmp_path, change, split, why):
    change(write_nih(tmp_path))
    with pytest.raises(CaseError, match=why): read_chestxray14(tmp_path, split)

def test_nih_skips(tmp_path):
    rows = [*NIH, ('00000004_000.png', 'Flu', 0, 4), ('00000005_000.png', 'Edema', 0, 5)]
    write_nih(tmp_path, rows, train=(0, 1, 2, 5, 6, 4))
    (tmp_path/'images/00000005_000.png').unlink()
    train, told = quiet(read_chestxray14, tmp_path)
    assert len(train) == 3 and skipped(train)['source'].tolist() == [f'Data_Entry_2017_v2020.csv line {i}' for i in (6, 7, 8)] and '0000' not in told
    assert len(quiet(read_chestxray14, tmp_path, 'test')[0]) == 2
    with pytest.raises(CaseError, match="'train', 'test', None"): read_chestxray14(tmp_path, 'valid')
    with pytest.raises(CaseError, match='unknown label .*choose .*Hernia'): read_chestxray14(tmp_path, labels=['Cough'])

def test_real_nih_images():
    root = Path(os.environ.get('MEDXFER_NIH64', Path(__file__).parents[1]/'../shared/data/nih64'))
    if not root.is_dir(): pytest.skip('no real NIH images here (MEDXFER_NIH64)')
    cases = read_chestxray14(root, split=None, decode=True)
    table = pd.read_csv(root/'Data_Entry_2017_v2020.csv')
    findings = table['Finding Labels'].map(lambda s: set(s.replace('Effusion', 'Pleural Effusion').split('|')))
    assert len(cases) == len(table) == 1000 and cases.patient_codes.max() + 1 == table['Patient ID'].nunique() == 264
    assert cases.targets.tolist() == [[float(o in f) for o in OBSERVATIONS] for f in findings]
    for i in (0, 499, 999): assert np.array_equal(cases.image(i), np.asarray(Image.open(root/'images'/table['Image Index'][i]).convert('L')))


# MURA

MURA = {'train': [('SHOULDER', 1, 1, 1, 3), ('SHOULDER', 2, 1, 0, 2), ('SHOULDER', 2, 2, 1, 1), ('HAND', 2, 1, 0, 2)], 'valid': [('SHOULDER', 11185, 1, 0, 2), ('WRIST', 11186, 1, 1, 1)]}

def write_mura(root, studies=MURA):
    for split, rows in studies.items():
        folder = lambda part, patient, study, label: f'MURA-v1.1/{split}/XR_{part}/patient{patient:05d}/study{study}_{"positive" if label else "negative"}/'
        images = [f'{folder(*r[:4])}image{i}.png' for r in rows for i in range(1, r[4] + 1)]
        for i in images: film(root/i)
        (root/f'MURA-v1.1/{split}_image_paths.csv').write_text('\n'.join(images) + '\n')
        (root/f'MURA-v1.1/{split}_labeled_studies.csv').write_text(''.join(f'{folder(*r[:4])},{r[3]}\n' for r in rows))
    return root

def test_mura(tmp_path):
    root = write_mura(tmp_path)
    shoulder = read_mura(root)
    assert shoulder.labels == ('Abnormal',) and shoulder.targets.ravel().tolist() == [1, 1, 1, 0, 0, 1]
    assert shoulder.patient_codes.tolist() == [0, 0, 0, 1, 1, 1] and shoulder.study_codes.tolist() == [0, 0, 0, 1, 1, 2]
    assert shoulder.image(5).shape == (48, 40) and len(read_mura(root/'MURA-v1.1', part='hand')) == 2
    everything = read_mura(root, part='all')
    assert len(everything) == 8 and everything.study_codes.max() == 3 # study 1 of the hand is not study 1 of the shoulder
    assert len(read_mura(root, part=['hand', 'shoulder'])) == 8
    assert read_mura(root, TEST_SETS['mura'][0], 'all').targets.ravel().tolist() == [0, 0, 1]
    with pytest.raises(CaseError, match="unknown part 'knee': choose 'elbow'"): read_mura(root, part='knee')

def edit(name, old, new, count=1): return lambda r: (r/name).write_text((r/name).read_text().replace(old, new, count))

STUDIES, IMAGES, SECOND = 'MURA-v1.1/train_labeled_studies.csv', 'MURA-v1.1/train_image_paths.csv', 'MURA-v1.1/train/XR_SHOULDER/patient00002/study1_negative/'

@pytest.mark.parametrize('change,why,left', [
    (edit(STUDIES, 'negative/,0', 'negative/,3'), r"train_labeled_studies.csv line 2: label '3', allowed are 1 and 0", 4),
    (edit(STUDIES, 'negative/,0', 'negative/,'), "train_labeled_studies.csv line 2: label ''", 4),
    (edit(STUDIES, 'negative/,0', 'negative/,F'), r"train_labeled_studies.csv line 2: label \(not a number from", 4),
    (edit(STUDIES, 'negative/,0', 'negative/'), 'train_labeled_studies.csv line 2: the line has 1 fields, not 2', 4),
    (edit(STUDIES, 'negative/,0', 'negative/,0,0'), 'train_labeled_studies.csv line 2: the line has 3 fields, not 2', 4),
    (edit(IMAGES, f'{SECOND}image2.png', f'{SECOND}image2.png,1'), 'train_image_paths.csv line 5: the line has 2 fields, not 1', 5),
    (edit(STUDIES, 'negative/,0', 'negative/,1'), 'train_labeled_studies.csv line 2: the label contradicts', 4),
    (edit(STUDIES, f'{SECOND},0\n', ''), 'train_image_paths.csv line 4: its study has no usable label in train_labeled_studies.csv', 4),
    (edit(STUDIES, f'{SECOND},0\n', f'{SECOND},0\n{SECOND},0\n'), 'train_labeled_studies.csv line 3: this study is listed twice', 6),
    (edit(IMAGES, f'{SECOND}image1.png\n{SECOND}image2.png\n', ''), 'train_labeled_studies.csv line 2: this study has no images', 4),
    (edit(IMAGES, f'{SECOND}image2.png', f'{SECOND}image1.png'), 'train_image_paths.csv line 5: this image is listed twice', 5),
    (edit(IMAGES, f'{SECOND}image2.png', f'{SECOND}image7.png'), 'train_image_paths.csv line 5: No such file', 5),
    (edit(IMAGES, f'{SECOND}image2.png', 'somewhere/image7.png'), 'train_image_paths.csv line 5: the path is not of the form', 5),
    (edit(STUDIES, SECOND, 'somewhere/'), 'train_labeled_studies.csv line 2: the path is not of the form', 4)])
def test_mura_faults(tmp_path, change, why, left):
    change(write_mura(tmp_path))
    with pytest.raises(CaseError, match=why): read_mura(tmp_path)
    c, told = quiet(read_mura, tmp_path)
    assert len(c) == left and why.split(': ')[0] in set(skipped(c)['source']) and 'patient' not in told

def test_mura_shared_patient(tmp_path):
    write_mura(tmp_path, MURA | {'valid': [('SHOULDER', 2, 1, 0, 2)]})
    with pytest.raises(CaseError, match='train_image_paths.csv line 4: this patient is also in valid_image_paths.csv line 1'): read_mura(tmp_path)
    assert (len(quiet(read_mura, tmp_path)[0]), len(quiet(read_mura, tmp_path, 'valid')[0])) == (3, 2)
