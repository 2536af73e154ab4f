"""Damaged files, 2,000 of them: each ends in an error of ours that names the file, or in a right result; in no crash, no hang, no wrong silence.

What cannot be seen: a flipped bit in the voxels of an uncompressed NIfTI or DICOM file, or in a cell of a table. There 'right' means the same shape and possible values."""
import faulthandler, gzip, resource, struct, sys, time, warnings
import nibabel as nib, numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.datadict import dictionary_VR
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, generate_uid

from medxfer_nb.compare.files import read_mask, read_raw
from medxfer_nb.compare.table import TableError, read_table
from medxfer_nb.data.brain import load_brain
from medxfer_nb.data.cases import CaseError, read_gray
from medxfer_nb.data.ct import FARTHEST, SPACINGS, CTError, read_dicom_series, read_nifti, read_volume
from medxfer_nb.data.pixels import PixelError, read_pixels
from medxfer_nb.data.xray import read_chexpert

TYPED = CaseError # of which PixelError, CTError, BrainError and TableError are kinds
INPUTS = dict(png=500, dicom=500, series=150, nifti=500, csv=350)
SECONDS, MEGABYTES = 2, 400
counted, refused = dict.fromkeys(INPUTS, 0), dict.fromkeys(INPUTS, 0)

rng = np.random.default_rng(0)
FILM = rng.integers(0, 256, (12, 10), dtype=np.uint8)
HU = rng.integers(-1000, 1200, (6, 7, 8), dtype=np.int16)


def fuzzed(name):
    "Run a test on as many inputs as `INPUTS` says, the same ones each time"
    run = settings(max_examples=INPUTS[name], derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def decorate(f):
        def counting(data):
            counted[name] += 1
            refused[name] += f(data) is None
        return run(given(st.data())(counting))
    return decorate

def outcome(read, path):
    "What a reader makes of a file: its result, or None for an error of ours; both soon, with little memory"
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            found = read(path)
    except TYPED as e:
        assert not isinstance(e.__cause__, (MemoryError, RecursionError)), repr(e.__cause__)
        found = None
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES << 10
    return found

@st.composite
def damaged(draw, whole, header, fields=()):
    "A file cut short, with flipped or swapped bytes, absurd numbers in its header, or something at its end; most of it in the header"
    data = bytearray(whole)
    place = st.one_of(st.integers(0, min(header, len(data)) - 1), st.integers(0, len(data) - 1))
    ways = ['cut', 'flip', 'flips', 'swap', 'append', 'erase', 'insert'] + ['field'] * 3 * bool(fields)
    way = draw(st.sampled_from(ways))
    if way == 'cut': del data[draw(place):]
    if way in ('flip', 'flips'):
        for at in draw(st.lists(place, min_size=1, max_size=1 if way == 'flip' else 12)): data[at] ^= 1 << draw(st.integers(0, 7))
    if way == 'swap':
        at, width, n = draw(place), draw(st.sampled_from([2, 4, 8])), draw(st.integers(1, 40))
        for i in range(at, min(at + n * width, len(data) - width), width): data[i:i+width] = data[i:i+width][::-1]
    if way == 'append': data += draw(st.binary(min_size=1, max_size=3000))
    if way == 'erase':
        at, n = draw(place), draw(st.integers(1, 64))
        data[at:at+n] = draw(st.sampled_from([b'\0', b'\xff', b' '])) * len(data[at:at+n])
    if way == 'insert': data[(at := draw(place)):at] = draw(st.binary(min_size=1, max_size=8))
    if way == 'field':
        at, kind, values = draw(st.sampled_from(fields))
        struct.pack_into(kind, data, at, draw(st.sampled_from(values)))
    return bytes(data)

@pytest.fixture(autouse=True)
def watchdog():
    "A hang ends with the stacks of all threads"
    faulthandler.dump_traceback_later(240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()

@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('fuzz')


# PNG: every part has a checksum, so no damage goes unseen
def png_files(folder):
    values = {'gray': FILM, 'deep': FILM.astype(np.uint16) * 257, 'mask': (FILM > 99).astype(np.uint8), 'colour': np.dstack([FILM] * 3), 'transparent': np.dstack([FILM] * 3 + [np.full_like(FILM, 255)])}
    for name, pixels in values.items(): Image.fromarray(pixels).save(folder/f'{name}.png')
    Image.fromarray(FILM).convert('P').save(folder/'palette.png')
    return {p.name: p.read_bytes() for p in sorted(folder.glob('*.png'))}

def test_png(home):
    (folder := home/'png').mkdir()
    files = png_files(folder)
    readers = {'pixels': read_pixels, 'gray': read_gray, 'mask': lambda p: read_mask(p)[0], 'raw': lambda p: read_raw(p).image}
    right = {(name, r): outcome(read, folder/name) for name in files for r, read in readers.items()}
    sizes = [(at, '>I', (0, 1, 9, 2**16, 2**31 - 1, 2**32 - 1)) for at in (16, 20)] # width and height; their checksum no longer fits
    @fuzzed('png')
    def run(data):
        name, reader = data.draw(st.sampled_from(sorted(files))), data.draw(st.sampled_from(sorted(readers)))
        path = folder/data.draw(st.sampled_from(['x.png', 'x.jpg', 'x']))
        path.write_bytes(data.draw(damaged(files[name], 60, sizes)))
        found = outcome(readers[reader], path)
        assert found is None or np.array_equal(found, right[name, reader])
        return found
    run()


# DICOM
def dicom(path, pixels, syntax=ExplicitVRLittleEndian, position=0., series='1.2.3', **more):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.Modality = CTImageStorage, generate_uid(entropy_srcs=[str(path)]), series, 'CT'
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *pixels.shape, 1, 'MONOCHROME2'
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = '1', '0', '0', '2000'
    ds.PixelSpacing, ds.ImageOrientationPatient, ds.ImagePositionPatient = [.7, .7], [1, 0, 0, 0, 1, 0], [0, 0, position]
    for k, v in more.items(): setattr(ds, k, v)
    ds.PixelData = pixels.astype('>i2' if syntax == ExplicitVRBigEndian else '<i2').tobytes()
    ds['PixelData'].VR = 'OW'
    if syntax == RLELossless: ds.compress(RLELossless)
    ds.save_as(path, enforce_file_format=True)

US = lambda *values: [struct.pack('<H', v) for v in values]
ABSURD = {'Rows': US(0, 1, 65535), 'Columns': US(0, 1, 65535), 'BitsAllocated': US(0, 1, 7, 8, 32, 64, 65535), 'BitsStored': US(0, 1, 17, 65535), 'HighBit': US(0, 65535), 'SamplesPerPixel': US(0, 2, 3, 65535),
          'PixelRepresentation': US(2, 65535), 'NumberOfFrames': [b'0', b'-1', b'2', b'99999999999', b'x'], 'PhotometricInterpretation': [b'', b'RGB', b'PALETTE COLOR', b'x'],
          'RescaleSlope': [b'nan', b'inf', b'0', b'1e400', b'-1e30', b'x'], 'RescaleIntercept': [b'nan', b'1e400', b'1e30', b'x'], 'WindowWidth': [b'0', b'-1', b'nan', b'1e400', b'x'], 'WindowCenter': [b'nan', b'1e30', b'x'],
          'PixelSpacing': [rb'0\0', rb'-1\1', rb'nan\nan', rb'1e30\1e30', b'1', rb'x\y'], 'ImagePositionPatient': [rb'0\0\nan', rb'0\0\1e30', rb'0\0', rb'x\y\z'],
          'ImageOrientationPatient': [rb'0\0\0\0\0\0', rb'1\0\0\1\0\0', rb'nan\0\0\0\1\0', b'1'], 'PixelData': [b'', b'\0\0', bytes(100_000)]}

def element(keyword, value): # As bytes, explicit VR, little endian
    tag, vr = Tag(keyword), dictionary_VR(keyword)[-2:]
    value += b' ' * (len(value) % 2)
    return struct.pack('<HH', tag.group, tag.element) + vr.encode() + (b'\0\0' + struct.pack('<I', len(value)) if vr == 'OW' else struct.pack('<H', len(value))) + value

def replaced(whole, keyword, value):
    "The same DICOM file with another value, which pydicom itself might refuse to write"
    head = element(keyword, b'')[:-2 if dictionary_VR(keyword)[-2:] != 'OW' else -4]
    if (at := whole.find(head)) < 0: return whole.replace(element('Rows', b'')[:6], element(keyword, value) + element('Rows', b'')[:6], 1)
    old = int.from_bytes(whole[at + len(head):][:4 if head.endswith(b'OW\0\0') else 2], 'little') + len(element(keyword, b''))
    return whole[:at] + element(keyword, value) + whole[at + old:]

@st.composite
def damaged_dicom(draw, whole, explicit):
    "Damaged bytes, or a well-formed file that says something absurd"
    if not explicit or draw(st.booleans()): return draw(damaged(whole, len(whole)))
    for keyword in draw(st.lists(st.sampled_from(sorted(ABSURD)), min_size=1, max_size=2, unique=True)): whole = replaced(whole, keyword, draw(st.sampled_from(ABSURD[keyword])))
    return whole

def test_dicom(home):
    (folder := home/'dicom').mkdir()
    syntaxes = dict(explicit=ExplicitVRLittleEndian, implicit=ImplicitVRLittleEndian, big=ExplicitVRBigEndian, rle=RLELossless)
    for name, syntax in syntaxes.items(): dicom(folder/name, HU[0], syntax)
    files = {name: (folder/name).read_bytes() for name in syntaxes}
    for name in files: assert np.array_equal(outcome(read_pixels, folder/name), outcome(read_pixels, folder/'explicit'))
    @fuzzed('dicom')
    def run(data):
        name, path = data.draw(st.sampled_from(['explicit', 'explicit', *files])), folder/data.draw(st.sampled_from(['x', 'x.dcm', 'x.png']))
        path.write_bytes(data.draw(damaged_dicom(files[name], name == 'explicit')))
        raw = outcome(read_raw, path)
        if raw is None: return None
        assert raw.image.shape[2:] == HU[0].shape and raw.image.dtype == np.uint8
        assert all(np.isnan(s) or SPACINGS[0] <= s <= SPACINGS[1] for s in raw.spacing)
        return raw
    run()

def test_series(home):
    (folder := home/'series').mkdir()
    for i, plane in enumerate(HU[:4]): dicom(folder/f'{i}.dcm', plane, position=2.5 * i)
    files = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    right = read_dicom_series(folder)
    @fuzzed('series')
    def run(data):
        for name, whole in files.items(): (folder/name).write_bytes(whole)
        name = data.draw(st.sampled_from(sorted(files)))
        (folder/name).write_bytes(data.draw(damaged_dicom(files[name], True)))
        volume = outcome(data.draw(st.sampled_from([read_volume, lambda p: read_raw(p)])), folder)
        if volume is None: return None
        assert volume.image.shape[-3:] == right.image.shape and np.isfinite(volume.image).all()
        assert np.allclose(volume.spacing, right.spacing, rtol=.05)
        return volume
    run()


# NIfTI
NIFTI_FIELDS = [(0, '<i', (0, 540, -1)), *((40 + 2*i, '<h', (-1, 0, 1, 2, 3, 4, 5, 32767, -32768)) for i in range(5)), (70, '<h', (0, 1, 2, 8, 16, 32, 64, 128, 512, 1280, 1792, -1)), (72, '<h', (0, 1, 8, 32, 64, -1)),
                *((76 + 4*i, '<f', (0., -1., float('nan'), float('inf'), 1e30, 1e-30)) for i in range(4)), (108, '<f', (0., -1., 353., 1e9, 1e30, float('nan'))),
                (112, '<f', (0., 1e-30, 1e30, float('nan'), float('inf'))), (116, '<f', (1e30, float('nan'), float('-inf'))), *((252 + 2*i, '<h', (0, 99, -1)) for i in range(2)),
                *((256 + 4*i, '<f', (5., float('nan'), 1e30)) for i in range(6)), *((280 + 4*i, '<f', (0., float('nan'), float('inf'), 1e30, -1e-30)) for i in range(12)), (344, '<4s', (b'ni1\0', b'\0' * 4, b'n+2\0'))]

def nifti_files(folder):
    affine, stored = np.diag([-.7, -.7, 2.5, 1.]), HU.T
    nib.save(nib.Nifti1Image(stored, affine), folder/'ct.nii')
    nib.save(nib.Nifti1Image(stored.astype(np.float32), affine), folder/'ct.nii.gz')
    nib.save(nib.Nifti2Image(stored, affine), folder/'ct2.nii')
    nib.save(nib.Nifti1Image(stored, affine, nib.Nifti1Header(endianness='>')), folder/'big.nii')
    brain = (np.arange(HU.size * 2).reshape(*stored.shape, 2) % 5 * 100).astype(np.float32)
    nib.save(nib.Nifti1Image(brain, affine), folder/'brain.nii.gz')
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

def nifti_readers(): # Each goes as far as a run would
    def ct(path):
        volume = read_volume(path)
        return volume.image, volume.grid
    def brain(path):
        stack, _, grid = load_brain((path,), order=(0, 1))
        return stack[0], grid
    return dict(ct=ct, brain=brain, mask=read_nifti)

def test_nifti(home):
    (folder := home/'nifti').mkdir()
    files, readers = nifti_files(folder), nifti_readers()
    assert np.array_equal(readers['ct'](folder/'ct.nii')[0], readers['ct'](folder/'ct.nii.gz')[0]) and readers['brain'](folder/'brain.nii.gz')[0].shape == readers['ct'](folder/'big.nii')[0].shape
    right = {name: read_nifti(folder/name)[0] for name in files if name != 'brain.nii.gz'} | {'brain.nii.gz': readers['brain'](folder/'brain.nii.gz')[0]}
    @fuzzed('nifti')
    def run(data):
        name = data.draw(st.sampled_from(sorted(files)))
        whole, zipped = files[name], name.endswith('.gz')
        inside = zipped and data.draw(st.booleans()) # Damage before the compression has a checksum that fits
        whole = gzip.compress(data.draw(damaged(gzip.decompress(whole), 352, NIFTI_FIELDS)), 1) if inside else data.draw(damaged(whole, 60 if zipped else 352, () if zipped else NIFTI_FIELDS))
        path = folder/('x' + data.draw(st.sampled_from([name[name.index('.'):]] * 8 + ['.nii', '.nii.gz', '.png', '.nii.bz2'])))
        path.write_bytes(whole)
        reader = 'brain' if name.startswith('brain') else data.draw(st.sampled_from(['ct', 'mask']))
        found = outcome(readers[reader], path)
        if found is None: return None
        values, grid = found
        if zipped and not inside: assert np.array_equal(values, right[name]) # its checksum would have told
        assert sorted(values.shape) == sorted(right[name].shape) and values.dtype.kind in 'iuf' # the order of the axes follows from the affine
        assert reader == 'mask' or np.isfinite(values).all()
        assert all(SPACINGS[0] * .9 <= s <= SPACINGS[1] * 1.1 for s in grid.spacing) and abs(grid.affine[:3, 3]).max() <= FARTHEST
        return found
    run()


# CSV
def tables(folder):
    "A table of our own and one as CheXpert has it, with their images"
    for i in range(8): Image.fromarray(FILM).save(folder/f'{i}.png')
    own = 'path,patient,label,split,weight\n' + ''.join(f'{i}.png,p{i},{i % 2},{"test" if i > 4 else "train"},1.5\n' for i in range(8))
    names = 'Path,Sex,Age,Frontal/Lateral,AP/PA,Atelectasis,Cardiomegaly,Consolidation,Edema,Pleural Effusion'
    rows = []
    for i in range(1, 6):
        path = f'CheXpert-v1.0-small/train/patient{i:05d}/study1/view1_frontal.jpg'
        (folder/path).parent.mkdir(parents=True)
        Image.fromarray(FILM).save(folder/path)
        rows.append(f'{path},Female,6{i},Frontal,AP,1.0,0.0,-1.0,,{i % 2}.0')
    chexpert = folder/'CheXpert-v1.0-small'/'train.csv'
    return {'own': own.encode(), 'semicolons': own.replace(',', ';').encode('utf-8-sig'), 'chexpert': '\n'.join([names, *rows, '']).encode()}, chexpert

NASTY = [b'"', b'\0', b'\xff\xfe', 'ü'.encode('latin-1'), b',,,,', b'\n\n', b'=1+cmd|x', b'"' * 3, b'label,label', b'nan', b'1e400', b'../', b'x' * 140_000, b'\r', b'\t', '\u2028'.encode(), b'-1', b'2']

def test_csv(home):
    (folder := home/'csv').mkdir()
    files, chexpert = tables(folder)
    def read(name):
        (place := chexpert if name == 'chexpert' else folder/'x.csv').write_bytes(files[name])
        return read_chexpert(folder, 'train') if name == 'chexpert' else read_table(place)
    for name in files: assert len(read(name)) in (5, 8)
    @fuzzed('csv')
    def run(data):
        name = data.draw(st.sampled_from(sorted(files)))
        whole = data.draw(damaged(files[name], 60))
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(files[name])))
            whole = files[name][:at] + data.draw(st.sampled_from(NASTY)) + files[name][at:]
        if data.draw(st.integers(0, 9)) == 0: whole = files[name].decode('utf-8-sig').encode(data.draw(st.sampled_from(['utf-16', 'utf-32', 'utf-7', 'cp500'])))
        place = chexpert if name == 'chexpert' else folder/'x.csv'
        place.write_bytes(whole)
        found = outcome(lambda p: read_chexpert(folder, 'train') if name == 'chexpert' else read_table(p), place)
        if found is None: return None
        assert np.isin(np.nan_to_num(found.targets, nan=9), (0, 1, -1, 9)).all() and found.frame['patient'].str.strip().ne('').all()
        if name == 'chexpert': assert 1 <= len(found) <= 6 and all(found.image(i).shape == FILM.shape for i in range(len(found)))
        else: assert all(found.path(i).exists() for i in range(len(found))) and (found.frame['weight'] > 0).all()
        return found
    run()


def test_two_thousand():
    if not all(counted.values()): pytest.skip('not all readers were tried')
    assert sum(counted.values()) >= 2000, counted
    assert all(20 < refused[name] < counted[name] - 20 for name in INPUTS), (refused, counted) # both ends are reached
