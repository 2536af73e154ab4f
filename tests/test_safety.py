"Files from strangers: nothing in them is run, nothing that they claim is believed before it is checked, nothing leads out of its folder"
import ast, gzip, hashlib, json, os, pickle, re, resource, stat, struct, subprocess, sys, tracemalloc, warnings, zipfile, zlib
from contextlib import contextmanager
from pathlib import Path

import medxfer_nb, nbformat, nibabel as nib, numpy as np, pytest, torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, generate_uid
from safetensors.torch import save_file

from medxfer_nb.compare import handover, results
from medxfer_nb.compare.files import read_mask, read_raw
from medxfer_nb.compare.handover import HandoverError, load_model
from medxfer_nb.compare.inspect import load_inspection
from medxfer_nb.compare.pool import Pool, load_pool
from medxfer_nb.compare.sources import SourceError, match_body, parse_source, read_sources, read_state
from medxfer_nb.compare.table import TableError, read_table
from medxfer_nb.data import assets, pixels
from medxfer_nb.data.assets import ASSETS, Asset, AssetError, fetch, verify
from medxfer_nb.data.brain import BrainError, load_brain, read_brain_decathlon
from medxfer_nb.data.brain_prep import read_scores
from medxfer_nb.data.cases import CaseError, Cases, read_gray
from medxfer_nb.data.ct import CTError, Grid, read_decathlon, read_dicom_series, read_nifti, save_nifti
from medxfer_nb.data.pixels import PixelError, read_pixels
from medxfer_nb.data.xray import read_chexpert
from medxfer_nb.models.colorize import load_colorizer, read_weights
from medxfer_nb.repro import notebooks
from medxfer_nb.repro.notebooks import ParameterError, check_parameters
from medxfer_nb.repro.store import Store, digest, file_hash, load_tensors, pack_array, save_tensors, unpack_array
from medxfer_nb.transfer.fisher import FisherError, load_fisher
from medxfer_nb.transfer.stages import read_checkpoint

FILM = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)


# The source: no way to run what a file says
BANNED = {'pickle.load', 'pickle.loads', 'pickle.Unpickler', 'joblib.load', 'dill.load', 'marshal.loads', 'shelve.open', 'yaml.load', 'yaml.unsafe_load', 'yaml.full_load', 'pd.read_pickle', 'os.system', 'eval', 'exec'}

OWN = {('parallel.py', 'pickle.loads')} # what a process that this one started says through their pipe; no file

def called(node):
    "The dotted name of what a call calls"
    parts, f = [], node.func
    while isinstance(f, ast.Attribute): parts, f = [f.attr, *parts], f.value
    return '.'.join([f.id, *parts]) if isinstance(f, ast.Name) else ''

def test_the_source_has_no_way_to_run_a_file():
    found = []
    for path in sorted(Path(medxfer_nb.__file__).parent.rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Call): continue
            name, told = called(node), {k.arg: getattr(k.value, 'value', k.value) for k in node.keywords}
            if (path.name, name) in OWN: continue
            if name in BANNED or name == 'torch.load' and told.get('weights_only') is not True or told.get('allow_pickle') is True or told.get('shell') is True or told.get('weights_only') is False:
                found.append(f'{path.name} line {node.lineno}: {ast.unparse(node)}')
    assert not found


# Planted pickles
class Evil:
    "Makes a folder when it is unpickled"
    def __init__(self, marker): self.marker = str(marker)
    def __reduce__(self): return os.mkdir, (self.marker,)

@pytest.fixture
def marker(tmp_path):
    "Where a pickle that ran leaves its trace; each test ends with a look at it"
    path = tmp_path/'it-ran'
    yield path
    assert not path.exists()

def forms(marker): # Kind of file -> write(path)
    def numpy(path):
        with open(path, 'wb') as f: np.save(f, np.array([Evil(marker)], object), allow_pickle=True)
    def zipped(path):
        with open(path, 'wb') as f: np.savez(f, cases=np.array([Evil(marker)], object), allow_pickle=True)
    return dict(pickle=lambda p: p.write_bytes(pickle.dumps(Evil(marker))), torch=lambda p: torch.save(Evil(marker), p), numpy=numpy, npz=zipped,
                state=lambda p: torch.save({'state_dict': {'weight': torch.ones(1), 'x': Evil(marker)}}, p), old=lambda p: torch.save(Evil(marker), p, _use_new_zipfile_serialization=False))

def test_the_pickles_do_run_where_they_are_loaded(tmp_path):
    for kind, load in dict(pickle=lambda p: pickle.loads(p.read_bytes()), torch=lambda p: torch.load(p, weights_only=False), old=lambda p: torch.load(p, weights_only=False), numpy=lambda p: np.load(p, allow_pickle=True)).items():
        forms(tmp_path/kind)[kind](tmp_path/f'{kind}.file')
        load(tmp_path/f'{kind}.file')
        assert (tmp_path/kind).is_dir()

READERS = { # file name -> reader, what it raises
    'a.pth': (read_weights, ValueError), 'b.pt': (read_state, SourceError), 'c.safetensors': (read_weights, ValueError), 'd.safetensors': (read_state, SourceError), 'e.pth': (lambda p: parse_source(f'densenet121:{p}'), SourceError),
    'f.safetensors': (load_fisher, FisherError), 'g.pth': (lambda p: load_colorizer(p, 'deconv'), ValueError), 'h.json': (read_sources, SourceError), 'i.nii': (read_nifti, CTError), 'j.nii.gz': (read_nifti, CTError),
    'k.png': (read_pixels, PixelError), 'l.png': (read_gray, CaseError), 'm.png': (read_mask, PixelError), 'n.dcm': (read_pixels, PixelError), 'o.csv': (read_table, TableError), 'p.csv': (read_scores, BrainError),
    'q.mgz': (lambda p: load_brain((image(p.parent),), p), BrainError), 'r.nii.gz': (lambda p: load_brain((p,), order=(0, 1)), BrainError), 's.nii': (read_raw, CTError)}

def image(folder):
    data = np.zeros((4, 4, 4), np.float32)
    data[1, 1] = 5
    return save_nifti(data, Grid.plain(data.shape, (1., 1., 1.)), folder/'image.nii')

@pytest.mark.parametrize('name', READERS)
def test_no_reader_unpickles(tmp_path, marker, name):
    read, error = READERS[name]
    for kind, write in forms(marker).items():
        write(tmp_path/name)
        with warnings.catch_warnings(), pytest.raises(error) as e:
            warnings.simplefilter('ignore')
            read(tmp_path/name)
        assert name in str(e.value) and 'weights_only' not in str(e.value), (kind, e.value) # PyTorch's own text advises to run the file

def test_folders_of_files_do_not_unpickle(tmp_path, marker):
    for kind, write in forms(marker).items():
        folder = tmp_path/kind
        folder.mkdir()
        for name in ('card.json', 'pool.json', 'inspection.json', 'results.json', 'results.npz', 'train.csv', 'dataset.json'): write(folder/name)
        for read, error in ((load_model, HandoverError), (load_pool, TableError), (load_inspection, TableError), (results.load_results, results.ResultsError),
                            (lambda p: read_decathlon(p.parent, p.name), CTError), (lambda p: read_dicom_series(p), CTError)):
            with pytest.raises(error): read(folder)
        write(folder/'checkpoint.safetensors')
        assert load_tensors(folder/'checkpoint.safetensors') is None

def test_a_checkpoint_does_not_unpickle(tmp_path, marker):
    for kind in ('torch', 'old', 'state', 'pickle'):
        forms(marker)[kind](tmp_path/'x')
        content = (tmp_path/'x').read_bytes()
        (tmp_path/'checkpoint').write_bytes(hashlib.sha256(content).hexdigest().encode() + content) # the checksum fits
        with pytest.warns(UserWarning, match='starts over'): assert read_checkpoint(tmp_path/'checkpoint', dict(stage=1)) is None

@pytest.mark.parametrize('text', ['[]', 'null', '3', '{}', '"x"', '{"arms": 3}', '{"findings": 3}', '{"findings": [{}], "training": [3]}', '[' * 100_000])
def test_json_that_says_something_else(tmp_path, text):
    np.savez(tmp_path/'results.npz', x=np.ones(1))
    for name, read, error in (('results.json', results.load_results, results.ResultsError), ('inspection.json', load_inspection, TableError), ('card.json', load_model, HandoverError), ('pool.json', load_pool, TableError),
                              ('dataset.json', lambda p: read_decathlon(p.parent, p.name), CTError), ('dataset.json', read_brain_decathlon, BrainError), ('sources.json', lambda p: read_sources(p/'sources.json'), SourceError)):
        (tmp_path/name).write_text(text)
        if (name, text) != ('sources.json', '[]') and (name, text) != ('sources.json', '{}'):
            with pytest.raises(error): read(tmp_path)

def film_pool(folder):
    n = 6
    cases = Cases('films', frame(n), ('sick',), np.repeat(FILM[None, :10], n, 0))
    return Pool('films', cases, np.arange(n), np.arange(n), ('sick',), np.ones(n), np.array([''] * n), np.full((n, 3), np.nan), preprocessing=dict(kind='films')).save(folder)

def frame(n):
    import pandas as pd
    return pd.DataFrame(dict(patient=[f'p{i}' for i in range(n)], study='s', sick=np.arange(n, dtype='float32') % 2))

@pytest.mark.parametrize('part', ['pixels', 'tables'])
def test_a_pool_does_not_unpickle(tmp_path, marker, part):
    load_pool(film_pool(tmp_path/'pool'))
    file = next((tmp_path/'pool').glob(f'{part}-*'))
    for kind, write in forms(marker).items():
        file.unlink()
        write(file)
        with pytest.raises(TableError, match='damaged pool'): load_pool(tmp_path/'pool')

def test_a_pool_stays_in_its_folder(tmp_path):
    film_pool(tmp_path/'pool')
    card = json.loads((tmp_path/'pool'/'pool.json').read_text())
    for outside in ('../secret.npy', '/etc/passwd'):
        (tmp_path/'pool'/'pool.json').write_text(json.dumps(card | dict(files=card['files'] | dict(pixels=outside))))
        with pytest.raises(TableError, match='outside'): load_pool(tmp_path/'pool')
    for text in ('[]', 'null', '3', '[' * 100_000, '{"version": 1}'):
        (tmp_path/'pool'/'pool.json').write_text(text)
        with pytest.raises(TableError): load_pool(tmp_path/'pool')


# A store that was copied from somebody
def planted_run(root, key='a' * 24, **changes):
    "A run whose manifest fits all its files, whatever they hold"
    folder = root/'runs'/key
    folder.mkdir(parents=True, exist_ok=True)
    for name in ('model.safetensors', 'predictions.safetensors', 'history.json'):
        if not (folder/name).exists(): save_file({'x': torch.ones(2)}, folder/name) if name.endswith('s') else (folder/name).write_text('[]')
    files = {p.name: dict(size=p.stat().st_size, sha256=file_hash(p)) for p in folder.iterdir() if p.name != 'manifest.json'}
    manifest = dict(key=key, paper='x', config={}, config_key='c', metrics={}, files=files) | changes
    (folder/'manifest.json').write_text(json.dumps(manifest | dict(sha256=digest(manifest, 64))))
    return folder

def test_a_store_does_not_unpickle(tmp_path, marker):
    assert Store(tmp_path).get(planted_run(tmp_path).name) is not None
    for i, (kind, write) in enumerate(forms(marker).items()):
        for j, name in enumerate(('model.safetensors', 'predictions.safetensors', 'manifest.json')):
            key = f'{i}{j}'.ljust(24, '0')
            folder = tmp_path/'runs'/key
            folder.mkdir()
            if name != 'manifest.json': write(folder/name)
            planted_run(tmp_path, key)
            if name == 'manifest.json': write(folder/name)
            assert Store(tmp_path).get(key) is None and not folder.exists(), (kind, name) # set aside

@pytest.mark.parametrize('changes', [dict(files=None), dict(files={'x': 3}), dict(files={'x': {}}), dict(files={'../../secret': dict(size=1, sha256='0')}), dict(metrics=[]), dict(paper=3), dict(config=None)])
def test_a_store_believes_no_manifest(tmp_path, changes):
    (tmp_path/'secret').write_text('x')
    key = planted_run(tmp_path, **changes).name
    assert all(isinstance(r.manifest['files'], dict) for r in Store(tmp_path).records())
    assert Store(tmp_path).prunable('stale') is not None and Store(tmp_path).get(key) is None

def test_packed_arrays():
    packed = pack_array(np.arange(6.).reshape(2, 3))
    assert np.array_equal(unpack_array(packed), np.arange(6.).reshape(2, 3))
    bomb = packed | dict(data=pack_array(np.zeros(50_000_000, np.uint8))['data'])
    for wrong in (packed | dict(dtype='|O8'), packed | dict(dtype='V8'), packed | dict(shape=[2, 4]), packed | dict(shape=[10**12, 10**12]), bomb):
        with little_memory(20), pytest.raises((ValueError, TypeError)): unpack_array(wrong)


# safetensors
def crafted(header, data=b'', length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(header) if length is None else length) + header + data

def entry(dtype='F32', shape=(2,), offsets=(0, 8)): return dict(dtype=dtype, shape=shape, data_offsets=offsets)

WRONG = {'absurd header length': crafted({}, length=2**63), 'huge header': crafted({}, length=2**31), 'no JSON': crafted(b'{"x": '), 'no object': crafted([1]), 'deep': crafted(b'{"x":' + b'[' * 50_000), 'truncated': crafted({'x': entry()}, bytes(7)), 'empty': b'', 'seven bytes': bytes(7),
         'overlapping': crafted({'x': entry(), 'y': entry(offsets=(4, 12))}, bytes(12)), 'out of range': crafted({'x': entry(offsets=(0, 800))}, bytes(8)), 'backwards': crafted({'x': entry(offsets=(8, 0))}, bytes(8)),
         'a hole': crafted({'x': entry(), 'y': entry(offsets=(16, 24))}, bytes(24)), 'unknown type': crafted({'x': entry('PYOBJ')}, bytes(8)), 'overflow': crafted({'x': entry(shape=(2**62, 2**62))}, bytes(8)), 'terabytes': crafted({'x': entry(shape=(2**40,))}, bytes(8)),
         'negative': crafted({'x': entry(shape=(-2,))}, bytes(8)), 'more': crafted({'x': entry()}, bytes(800)), 'twice': crafted(b'{"x": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "x": 3}', bytes(8))}

@contextmanager
def little_memory(megabytes=50):
    "Neither Python's memory nor that of the process grows much"
    rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = rss()
    tracemalloc.start()
    try: yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < megabytes << 20 and rss() - before < (megabytes + 100) << 10

@pytest.mark.parametrize('what', WRONG)
def test_safetensors_headers(tmp_path, what):
    path = tmp_path/'wrong.safetensors'
    path.write_bytes(WRONG[what])
    for read, error in ((read_weights, ValueError), (read_state, SourceError), (load_fisher, FisherError), (lambda p: parse_source(f'densenet121:{p}'), SourceError)):
        with little_memory(), pytest.raises(error, match='wrong.safetensors'): read(path)
    with little_memory(): assert load_tensors(path) is None

def test_numbers_that_are_none(tmp_path):
    for value in (float('nan'), float('inf')):
        save_file({'x': torch.tensor([1., value])}, tmp_path/'x.safetensors')
        with pytest.raises(SourceError, match='not finite'): match_body('x', read_state(tmp_path/'x.safetensors'), {'x': torch.zeros(2)})

def test_a_small_file_of_a_large_tensor(tmp_path):
    torch.save({'x': torch.ones(1, dtype=torch.float16).expand(10**6, 10**6)}, tmp_path/'wide.pth') # its strides are 0
    torch.save({'x': torch.sparse_coo_tensor([[0]], [1.], (10**12,))}, tmp_path/'sparse.pth')
    torch.save([torch.ones(2)], tmp_path/'list.pth')
    with zipfile.ZipFile(tmp_path/'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('bomb/data.pkl', bytes(10**7))
    for name in ('wide', 'sparse', 'list', 'bomb'):
        with little_memory(), pytest.raises(SourceError, match=f'{name}.pth'): read_state(tmp_path/f'{name}.pth')

def test_tensors_of_another_sort(tmp_path):
    save_file({'x': torch.ones(2)}, tmp_path/'plain.safetensors') # no checksum of ours
    assert load_tensors(tmp_path/'plain.safetensors') is None
    save_tensors(tmp_path/'own.safetensors', {'x': torch.ones(2)}, dict(step=3))
    assert load_tensors(tmp_path/'own.safetensors')[1] == dict(step=3)


# Wheels
@pytest.fixture
def wheel(tmp_path, monkeypatch):
    "Publish an archive as the wheel of an asset"
    monkeypatch.setenv('MEDXFER_CACHE', str(tmp_path/'cache'))
    def publish(write, member='*/file.bin'):
        path = tmp_path/'x-1-py3-none-any.whl'
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z: write(z)
        asset = Asset('x', 'x', '1', member, file_hash(path), '', .01, '', '')
        monkeypatch.setitem(ASSETS, 'x', asset)
        monkeypatch.setattr(assets, '_pip_download', lambda asset, work: path)
        return path
    return publish

def link(z):
    info = zipfile.ZipInfo('x/file.bin')
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    z.writestr(info, '/etc/passwd')

@pytest.mark.parametrize('write, why', [(lambda z: z.writestr('../x/file.bin', 'x'), 'unsafe path'), (lambda z: z.writestr('/x/file.bin', 'x'), 'unsafe path'), (lambda z: z.writestr('x/..\\../file.bin', 'x'), 'unsafe path'),
                                        (link, 'is a link'), (lambda z: z.writestr('x/file.bin', bytes(3_000_000)), 'claims 3,000,000 bytes')])
def test_members_of_wheels(tmp_path, monkeypatch, wheel, write, why):
    monkeypatch.setattr(assets, 'MAX_MEMBER', 2_000_000)
    wheel(write)
    with pytest.raises(AssetError, match=why): fetch('x', say=lambda line: None)
    assert not [p for p in (tmp_path/'cache').rglob('*') if p.name in ('file.bin', 'card.json')]

def test_a_wheel_that_lies_about_its_size(tmp_path, wheel):
    path = wheel(lambda z: z.writestr('x/file.bin', bytes(3_000_000)))
    content = path.read_bytes().replace(struct.pack('<I', 3_000_000), struct.pack('<I', 30)) # inflates to more than it says
    path.write_bytes(content)
    ASSETS['x'] = Asset('x', 'x', '1', '*/file.bin', file_hash(path), '', .01, '', '')
    with pytest.raises(AssetError, match='cannot be unpacked'): fetch('x', say=lambda line: None)

def test_the_cache_leads_nowhere_else(tmp_path, wheel):
    wheel(lambda z: z.writestr('x/file.bin', b'right'))
    card = fetch('x', say=lambda line: None).parent/'card.json'
    (tmp_path/'secret').write_text('right')
    for name in ('../../../secret', str(tmp_path/'secret'), 'other.bin', None, 3):
        card.write_text(json.dumps(json.loads(card.read_text()) | dict(file=name)))
        with pytest.raises(AssetError): verify('x')
        assert fetch('x', say=lambda line: None).read_bytes() == b'right' and 'cache' in str(fetch('x'))
    for text in ('[]', 'null', '{}', '[' * 100_000):
        card.write_text(text)
        assert fetch('x', say=lambda line: None).name == 'file.bin'


# Sizes
def dicom(path, syntax=ExplicitVRLittleEndian, frame=None, **elements):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.Modality = syntax, CTImageStorage, generate_uid(), '1.2', 'CT'
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 12, 10, 1, 'MONOCHROME2'
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleSlope, ds.RescaleIntercept = 16, 16, 15, 0, 1, 0
    ds.PixelSpacing, ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 1], [1, 0, 0, 0, 1, 0], [0, 0, 0]
    ds.PixelData = encapsulate([frame]) if frame else FILM.astype('<u2').tobytes()
    for k, v in elements.items(): setattr(ds, k, v)
    ds['PixelData'].VR = 'OB' if frame else 'OW'
    ds['PixelData'].is_undefined_length = bool(frame)
    ds.save_as(path, enforce_file_format=True)
    return path

@pytest.mark.parametrize('elements, why', [(dict(Rows=65535, Columns=65535), r'65535 x 65535 pixels.*100,000,000'), (dict(Rows=0), '0 x 10 pixels'), (dict(NumberOfFrames=2_000_000_000), '2000000000 frames|several frames'),
                                           (dict(BitsAllocated=65528), 'x.dcm'), (dict(SamplesPerPixel=65535), 'x.dcm'), (dict(Rows=11), 'is the file damaged'), (dict(Rows=9999, Columns=9999), 'x.dcm')])
def test_absurd_dicom(tmp_path, elements, why):
    dicom(tmp_path/'x.dcm', **elements)
    dicom(tmp_path/'y.dcm', ImagePositionPatient=[0, 0, 1], **elements)
    with little_memory(), pytest.raises(PixelError, match=why): read_pixels(tmp_path/'x.dcm')
    with little_memory(), pytest.raises(CTError): read_dicom_series(tmp_path)

SIZ = b'\xff\x4f\xff\x51\0\x29\0\0' + struct.pack('>8I', 60000, 60000, 0, 0, 60000, 60000, 0, 0) + b'\0\1\x0f\1\1'
SOF = b'\xff\xd8\xff\xf7\0\x0b\x10' + struct.pack('>HH', 60000, 60000) + b'\1\1\x11\0\xff\xda' + bytes(40)

@pytest.mark.parametrize('syntax, frame', [(JPEG2000Lossless, SIZ + bytes(100)), (JPEGLSLossless, SOF)])
def test_a_compressed_image_larger_than_its_header(tmp_path, syntax, frame):
    dicom(tmp_path/'x.dcm', syntax, frame)
    with little_memory(), pytest.raises(PixelError, match='compressed image 60000 x 60000'): read_pixels(tmp_path/'x.dcm')

def test_a_deflated_dicom_bomb(tmp_path, monkeypatch):
    dicom(tmp_path/'x.dcm', DeflatedExplicitVRLittleEndian)
    assert np.array_equal(read_pixels(tmp_path/'x.dcm'), read_pixels(dicom(tmp_path/'y.dcm')))
    monkeypatch.setattr(pixels, 'MAX_INFLATED', 2_000_000)
    dicom(tmp_path/'x.dcm', DeflatedExplicitVRLittleEndian, PixelData=bytes(50_000_000))
    assert (tmp_path/'x.dcm').stat().st_size < 100_000
    with little_memory():
        with pytest.raises(PixelError, match='inflates to more than 2,000,000'): read_pixels(tmp_path/'x.dcm')
        with pytest.raises(CTError, match='inflates'): read_dicom_series(tmp_path)

def nifti(path, at=0, value=b'', kind='<i2', tail=b''):
    "A NIfTI file with something else in its header"
    nib.save(nib.Nifti1Image(np.arange(6*7*8, dtype=kind).reshape(6, 7, 8), np.diag([1., 1, 1, 1])), path.with_name('right.nii'))
    whole = bytearray(path.with_name('right.nii').read_bytes() + tail)
    whole[at:at+len(value)] = value
    path.write_bytes(gzip.compress(whole, 1) if path.suffix == '.gz' else whole)
    return path

f4 = lambda *values: struct.pack(f'<{len(values)}f', *values)
i2 = lambda *values: struct.pack(f'<{len(values)}h', *values)
@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
@pytest.mark.parametrize('at, value, why', [(40, i2(3, 32767, 32767, 32767), r'32767 x 32767 x 32767 voxels; up to 1,073,741,824'), (40, i2(3, 1000, 1000, 1000), 'claims 2,000,000,352 bytes'), (40, i2(3, -6, 7, 8), 'claims -6 x 7 x 8'), (40, i2(3, 0, 7, 8), 'claims 0 x'),
                                            (40, i2(0), 'claims no'), (40, i2(9, 6, 7, 8), 'x.nii'), (40, i2(3, 6, 7, 7), 'more voxels than'), (70, i2(12345), 'x.nii'), (70, i2(2), 'x.nii'), (108, f4(1e30), 'from byte 1e'), (108, f4(float('nan')), 'from byte nan'),
                                            (280, f4(float('nan')), 'not finite'), (280, f4(1e30), r'1e\+30'), (280, f4(0, 0, 0, 0), 'spacing 0'), (292, f4(1e30), 'mm away'), (280, f4(1e-30), 'x.nii')])
def test_absurd_nifti(tmp_path, suffix, at, value, why):
    assert read_nifti(nifti(tmp_path/f'y{suffix}'))[0].shape == (8, 7, 6)
    path = nifti(tmp_path/f'x{suffix}', at, value)
    for read in (read_nifti, read_raw):
        with little_memory(), pytest.raises(CTError, match=why) as e: read(path)
        assert path.name in str(e.value)

@pytest.mark.parametrize('slope', [float('nan'), float('inf'), 1e38])
def test_a_slope_that_is_no_number(tmp_path, slope):
    read = read_nifti(nifti(tmp_path/'right.nii', 112, f4(slope, 0.)))[0] if np.isnan(slope) else None # the NIfTI readers agree: NaN stands for 'not scaled'
    assert read is None or np.array_equal(np.unique(read), np.arange(336))
    if read is None:
        with pytest.raises(CaseError): load_brain((nifti(tmp_path/'x.nii', 112, f4(slope, 0.)),))

def test_a_gzip_bomb(tmp_path):
    path = nifti(tmp_path/'x.nii.gz', tail=bytes(100_000_000))
    assert path.stat().st_size < 1_000_000
    with little_memory(), pytest.raises(CTError, match='more voxels than'): read_nifti(path)
    (tmp_path/'x.mgz').write_bytes(gzip.compress(struct.pack('>7i', 1, 4, 4, 4, 1, 0, 1) + bytes(100_000_000), 1))
    (tmp_path/'y.mgz').write_bytes(gzip.compress(struct.pack('>7i', 1, 2**30, 2**30, 4, 1, 0, 1) + bytes(1000), 1))
    for name, why in (('x.mgz', 'more than its header'), ('y.mgz', '1073741824 x 1073741824')):
        with little_memory(), pytest.raises(BrainError, match=why): load_brain((image(tmp_path),), tmp_path/name)

def test_a_flipped_bit_under_a_checksum(tmp_path):
    path = nifti(tmp_path/'x.nii.gz')
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]) # the checksum itself: nibabel does not read it
    assert nib.load(path).get_fdata().shape == (6, 7, 8)
    with pytest.raises(CTError, match='CRC'): read_nifti(path)

def png(path, width, height, kind=0, data=zlib.compress(bytes(100))):
    part = lambda name, data: struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + part(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, kind, 0, 0, 0)) + part(b'IDAT', data) + part(b'IEND', b''))
    return path

@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('width, height', [(60_000, 60_000), (10_000, 10_001), (2**31 - 1, 1), (0, 5), (2**32 - 1, 2**32 - 1)])
def test_absurd_png(tmp_path, width, height):
    path = png(tmp_path/'x.png', width, height)
    for read in (read_pixels, read_gray, read_mask, read_raw):
        with little_memory(), pytest.raises(CaseError, match='x.png'): read(path)

def test_sorts_of_png(tmp_path):
    path = tmp_path/'x.png'
    for pixels in (FILM, Image.fromarray(FILM).convert('P'), np.dstack([FILM] * 3), np.dstack([FILM] * 4), FILM.astype(np.uint16) * 257):
        (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path)
        assert np.array_equal(read_pixels(path), FILM)
    Image.fromarray(FILM).save(path, save_all=True, append_images=[Image.fromarray(255 - FILM)])
    with pytest.raises(PixelError, match='2 frames'): read_pixels(path)

def test_only_png_and_jpeg_are_tried(tmp_path):
    "PostScript would be handed to an interpreter"
    for i, text in enumerate((b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n', b'II*\0' + bytes(40), b'GIF89a' + bytes(40), b'P5 3 3 255 ' + bytes(9))):
        (tmp_path/'x.png').write_bytes(text)
        for read in (read_pixels, read_gray, read_mask):
            with pytest.raises(CaseError, match='x.png'): read(tmp_path/'x.png')

def test_windows_that_show_nothing(tmp_path):
    for elements in (dict(WindowCenter='1e30', WindowWidth='10'), dict(WindowCenter='nan', WindowWidth='10'), dict(WindowCenter='10', WindowWidth='nan'), dict(RescaleSlope='nan'), dict(RescaleIntercept='nan'), dict(RescaleSlope='0')):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            dicom(tmp_path/'x.dcm', **elements)
            with pytest.raises(PixelError, match='x.dcm'): read_pixels(tmp_path/'x.dcm')
    for spacing in (['0', '0'], ['-1', '-1'], ['1e30', '1e30'], ['nan', 'nan']):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            dicom(tmp_path/'x.dcm', PixelSpacing=spacing)
            with pytest.raises(PixelError, match='pixels of'): read_raw(tmp_path/'x.dcm')


# Tables
def table(folder, text, encoding='utf-8'):
    for i in range(8): Image.fromarray(FILM).save(folder/f'{i}.png')
    (folder/'x.csv').write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return folder/'x.csv'

ROWS = [f'{i}.png,p{i},{i % 2}' for i in range(8)]
@pytest.mark.parametrize('text, why', [('path,patient,label\n' + ROWS[0] + 'x' * 200_000, 'field larger'), ('path,patient,label\n' + ROWS[0].replace('png', 'p\0ng'), 'row 2'), ('\n'.join(['path,patient,label,label', *(r + ',1' for r in ROWS)]), 'stands twice'),
                                       ('\n'.join(['path,patient,label', *ROWS[:-1], ROWS[-1] + ',9,9']), 'row 9: 5 cells'), ('\n'.join(['path,patient,label', *ROWS[:-1], '7.png']), 'no patient'), ('', 'empty'), (b'\xff\xfe\0\0' + bytes(99), 'not UTF-8'),
                                       ('\n'.join(['path,patient,label', *ROWS]).encode('utf-16'), 'not UTF-8'), ('\n'.join(['path,patient,label', *ROWS[:-1], '../7.png,p7,1']), 'no such file')])
def test_tables_that_are_none(tmp_path, text, why):
    with pytest.raises(TableError, match=why): read_table(table(tmp_path, text))

def test_formulas_stay_text(tmp_path):
    rows = [f'{i}.png,=HYPERLINK("p{i}"),{"=1+1" if i % 2 else "@SUM(A1)"}'.replace('"p', '""p').replace('")', '"")').replace('=H', '"=H').replace(',=', ',=').replace('),', ')",', 1) for i in range(8)]
    found = read_table(table(tmp_path, '\n'.join(['path,patient,label', *rows])))
    assert set(found.labels) <= {'=1+1', '@SUM(A1)'} and found.frame['patient'][3].startswith('=HYPERLINK')

def test_a_column_that_stands_twice_in_a_published_table(tmp_path):
    folder = tmp_path/'CheXpert-v1.0-small'
    folder.mkdir()
    (folder/'train.csv').write_text('Path,Sex,Age,Frontal/Lateral,AP/PA,Atelectasis,Atelectasis,Cardiomegaly,Consolidation,Edema,Pleural Effusion\nx,F,6,Frontal,AP,1,0,1,1,1,1\n')
    with pytest.raises(CaseError, match='Atelectasis stands twice'): read_chexpert(tmp_path, 'train')

def test_names_with_a_zero_in_them(tmp_path):
    with pytest.raises(PixelError): read_pixels(Path('a\0b.png'))


# Parameters of notebooks
NASTY = ['"', "'", '"""', "'''", '\\', '\\"', "\\'; __import__('os').mkdir('it-ran') #", 'a\nb\r\n\tc', '{__import__("os").mkdir("it-ran")}', '{0!r} %s ${x}', 'é 漢 \u202e \U0001f4a5', '\ud800', 'x' * 300_000, '\0', '# %%\nimport os', '', ' ', 'None', 'nan']

def notebook(path):
    cell = nbformat.v4.new_code_cell("text:str = ''\nnumber:float = 0.\nmany:list[str] = ()\ncounts:list[int] = ()\nflag:bool = False\n")
    cell.metadata['tags'] = ['parameters']
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell('import json\nprint(json.dumps([text, many]))')], metadata={'kernelspec': dict(name='python3', display_name='python3', language='python')}), path)
    return path

def arrived(path, given):
    "What the cell that papermill writes makes of parameters"
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    book = parameterize_notebook(load_notebook_node(str(path)), given, kernel_name='python3', language='python')
    source, found = next(c.source for c in book.cells if 'injected-parameters' in c.metadata.tags), {}
    tree = ast.parse(source)
    assert all(isinstance(n, ast.Assign) for n in tree.body) # assignments alone
    exec(compile(tree, 'parameters', 'exec'), found)
    return {k: found[k] for k in given}

def test_parameters_arrive_as_they_were_sent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = notebook(tmp_path/'x.ipynb')
    for value in NASTY:
        for given in (dict(text=value), dict(many=[value, value]), dict(text=value, many=[])):
            checked = check_parameters(path, given)
            assert arrived(path, checked) == given
    for number in (1e308, 5e-324, -0.): assert arrived(path, check_parameters(path, dict(number=number))) == dict(number=number)
    assert arrived(path, check_parameters(path, dict(counts=[2**80, -1], flag=True))) == dict(counts=[2**80, -1], flag=True)
    assert not Path('it-ran').exists()

@pytest.mark.parametrize('name', ['unknown', 'os.environ', 'text = 1; x', '__import__("os")', 'text\n', '', ' text', 'class', 'tеxt', '__builtins__'])
def test_names_of_parameters(tmp_path, name):
    with pytest.raises(ParameterError): check_parameters(notebook(tmp_path/'x.ipynb'), {name: 'x'})

@pytest.mark.parametrize('given', [dict(text=3), dict(text=['x']), dict(number='1'), dict(flag='True'), dict(many='x'), dict(counts=['1']), dict(counts=[[1]]), dict(text={'x': 1}), dict(text=b'x'), dict(many=[None]), dict(number=float('nan')), dict(number=float('inf'))])
def test_values_of_parameters(tmp_path, given):
    with pytest.raises(ParameterError): check_parameters(notebook(tmp_path/'x.ipynb'), given)

def test_the_order_of_a_notebook_is_as_long_as_it_likes(tmp_path, monkeypatch):
    "An argument of a process may not: 128 kB on Linux"
    monkeypatch.setattr(notebooks.subprocess, 'run', lambda cmd, **kw: subprocess.CompletedProcess(cmd, seen.append((cmd, kw)) or 0, '', ''))
    seen = []
    notebooks._in_process(tmp_path/'x.ipynb', tmp_path/'y.ipynb', dict(text='x' * 300_000), 1)
    cmd, kw = seen[0]
    assert sum(map(len, cmd)) < 1000 and json.loads(kw['input'])['parameters'] == dict(text='x' * 300_000)


# Programs
@pytest.fixture(scope='module')
def program(tmp_path_factory):
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    path = tmp_path_factory.mktemp('program')/'right.pt2'
    torch.export.save(torch.export.export(net, (torch.rand(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},)), path)
    return path

def changed(program, path, change):
    "The same archive with other parts: change(name, content) -> content, or None to leave it out"
    with zipfile.ZipFile(program) as old: parts = {n: old.read(n) for n in old.namelist()}
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in parts.items():
        name = name.partition('/')[2]
        if name.startswith('.data') or name == 'byteorder': continue # the writer adds its own
        content = change(name, content)
        writer.write_record(name, content, len(content))
    for name, content in getattr(change, 'more', {}).items(): writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return path

def test_a_program_that_is_arithmetic_runs(program, tmp_path):
    x = torch.rand(3, 1, 8, 8)
    same = changed(program, tmp_path/'same.pt2', lambda name, content: content)
    assert torch.equal(handover._load_program(program).module()(x), handover._load_program(same).module()(x))

def test_programs_do_not_run_code(program, tmp_path, marker):
    evil = {}
    for kind in ('pickle', 'torch', 'old'):
        forms(marker)[kind](tmp_path/kind)
        evil[kind] = (tmp_path/kind).read_bytes()
    def json_change(part, edit): return lambda name, content: json.dumps(edit(json.loads(content))).encode() if name == part else content
    def target(d): d['graph_module']['graph']['nodes'][0]['target'] = 'torch.os.mkdir'; return d
    def expression(d): return json.loads(re.sub(r"Symbol\('[^)]*\)", f"__import__('os').mkdir('{marker}')", json.dumps(d)))
    def guards(d): d['guards_code'] = [f"__import__('os').mkdir('{marker}')"]; return d
    def pickled(d): next(iter(d['config'].values())).update(use_pickle=True); return d
    def climbing(d): next(iter(d['config'].values())).update(path_name='../sample_inputs/model.pt'); return d
    def large(d): next(iter(d['config'].values()))['tensor_meta']['sizes'] = [{'as_int': 10**12}]; return d
    weights, model = 'data/weights/model_weights_config.json', 'models/model.json'
    changes = {kind: (lambda name, content, evil=evil[kind]: evil if name == 'data/sample_inputs/model.pt' else content) for kind in evil}
    changes |= dict(target=json_change(model, target), expression=json_change(model, expression), guards=json_change(model, guards), pickled=json_change(weights, pickled), climbing=json_change(weights, climbing), large=json_change(weights, large))
    for name, extra in dict(legacy='data/weights/model.pt', object='data/constants/custom_obj_0', opaque='data/constants/opaque_obj_0', library='data/aotinductor/model/evil.so').items():
        changes[name] = lambda name, content: content
        changes[name].more = {extra: evil['torch']}
    for name, change in changes.items():
        path = changed(program, tmp_path/f'{name}.pt2', change)
        with little_memory(), pytest.raises(HandoverError, match='aten operators alone') as e: handover._load_program(path)
        assert 'cannot be read' not in str(e.value) or name in evil, (name, e.value)
    for content in (b'', b'PK', evil['torch'], evil['pickle']):
        (tmp_path/'x.pt2').write_bytes(content)
        with pytest.raises(HandoverError): handover._load_program(tmp_path/'x.pt2')

@pytest.mark.parametrize('card', [[], None, 3, {}, dict(format=1), dict(format=1, kind='films'), dict(format=1, kind='films', architecture='hf_hub:somebody/x', size=[64, 64], preprocessing=dict(size=64)),
                                  dict(format=1, kind='films', architecture='resnet18', size=[10**9, 64], preprocessing=dict(size=64)), dict(format=1, kind='films', architecture='resnet18', size='xx', preprocessing={})])
def test_cards_that_tell_no_network(tmp_path, card):
    (tmp_path/'card.json').write_text(json.dumps(card))
    save_tensors(tmp_path/'weights.safetensors', {'x': torch.ones(1)})
    for use in ('weights', 'program'):
        with pytest.raises(HandoverError): load_model(tmp_path, use)
