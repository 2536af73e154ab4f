"Gray pixels from real DICOM, PNG and JPEG files, against values computed by hand or by a second library"
import subprocess, sys, warnings

import numpy as np, pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_windowing
from pydicom.uid import (ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit,
                         JPEGLossless, JPEGLSLossless, MPEG2MPML, RLELossless, generate_uid)

from medxfer_nb.data.cases import CaseError
from medxfer_nb.data.pixels import PixelError, read_pixels


def dicom(path, pixels, bits, syntax=ExplicitVRLittleEndian, fragment=None, **elements):
    "Write `pixels` as a DICOM file; `fragment` holds ready-made compressed data"
    ds, order = Dataset(), '>' if syntax == ExplicitVRBigEndian else '<'
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName = '1.2.840.10008.5.1.4.1.1.1', generate_uid(), 'Doe^Jane'
    ds.Rows, ds.Columns, ds.SamplesPerPixel = *pixels.shape, 1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = (8 if bits == 8 else 16), bits, bits - 1
    ds.PixelRepresentation, ds.PhotometricInterpretation = int(pixels.min() < 0), 'MONOCHROME2'
    for k, v in elements.items(): setattr(ds, k, v)
    ds.PixelData = encapsulate([fragment]) if fragment else pixels.astype(f'{order}{"iu"[int(pixels.min() >= 0)]}{ds.BitsAllocated//8}').tobytes()
    ds['PixelData'].VR = 'OB' if bits == 8 or fragment else 'OW'
    ds['PixelData'].is_undefined_length = bool(fragment)
    ds.save_as(path, enforce_file_format=True)
    return path


def lut(first, entries, bits):
    "An item of a look-up table sequence"
    item = Dataset()
    item.add_new('LUTDescriptor', 'SS' if first < 0 else 'US', [len(entries) % 2**16, first, bits])
    item.add_new('LUTData', 'OW', np.asarray(entries, '<u2').tobytes())
    return item


def values(low, high, shape=(24, 31)): return np.random.default_rng(0).integers(low, high, shape, endpoint=True)

def near(read, expected): # rounding may differ by one step where the exact value lies half-way
    assert read.dtype == np.uint8 and read.shape == np.shape(expected)
    assert np.abs(read - np.asarray(expected, float)).max() <= .51


@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
def test_bits_and_photometric(tmp_path, bits, syntax):
    x = values(0, 2**bits - 1)
    near(read_pixels(dicom(tmp_path/'a', x, bits, syntax)), x / (2**bits - 1) * 255)
    near(read_pixels(dicom(tmp_path/'b', x, bits, syntax, PhotometricInterpretation='MONOCHROME1')), 255 - x / (2**bits - 1) * 255)

def test_signed(tmp_path):
    for bits, low, high in ((12, -2048, 2047), (8, -128, 127), (16, -1024, 3071)):
        x = values(low, high)
        expected = (x - x.min()) / (x.max() - x.min()) * 255
        near(read_pixels(dicom(tmp_path/'a', x, bits)), expected)
        near(read_pixels(dicom(tmp_path/'b', x, bits, PhotometricInterpretation='MONOCHROME1')), 255 - expected)
        near(read_pixels(dicom(tmp_path/'c', x, bits, RescaleSlope=-2, RescaleIntercept=7)), 255 - expected)
    near(read_pixels(dicom(tmp_path/'d', np.full((4, 6), -5), 12)), np.zeros((4, 6)))

@pytest.mark.parametrize('stored', [8, 10, 12, 14, 16])
def test_fewer_bits_than_the_file_holds(tmp_path, stored):
    x = values(0, 2**stored - 1)
    x[0, 0] = 2**stored - 1
    expected = x / (2**stored - 1) * 255
    Image.fromarray(x.astype(np.uint16)).save(tmp_path/'a.png')
    path = dicom(tmp_path/'a', x, 16)
    assert np.array_equal(read_pixels(path), read_pixels(tmp_path/'a.png'))
    near(read_pixels(path), expected)
    near(read_pixels(dicom(tmp_path/'b', x, 16, PhotometricInterpretation='MONOCHROME1')), 255 - expected)
    near(read_pixels(dicom(tmp_path/'c', x, 16, RescaleSlope=.5, RescaleIntercept=-9)), expected)
    near(read_pixels(dicom(tmp_path/'d', x, 16, ModalityLUTSequence=[lut(0, np.arange(2**16), 16)])), expected)
    near(read_pixels(dicom(tmp_path/'e', x, 16, WindowCenter=2**15, WindowWidth=2**16)), x / 65535 * 255) # a window is a window

@pytest.mark.parametrize('function', ['LINEAR', 'LINEAR_EXACT', 'SIGMOID'])
@pytest.mark.parametrize('slope,intercept', [(1, 0), (2.5, -1000), (-1, 4095)])
def test_rescale_and_window(tmp_path, function, slope, intercept):
    x, c, w = values(0, 4095), 900., 1500.
    path = dicom(tmp_path/'a', x, 12, RescaleSlope=slope, RescaleIntercept=intercept, WindowCenter=[c, 1], WindowWidth=[w, 2], VOILUTFunction=function)
    y = x * slope + intercept
    by_hand = {'LINEAR': np.clip((y - (c - .5)) / (w - 1) + .5, 0, 1), 'LINEAR_EXACT': np.clip((y - c) / w + .5, 0, 1), 'SIGMOID': 1 / (1 + np.exp(-4*(y - c)/w))}
    near(read_pixels(path), by_hand[function] * 255)
    ds = dcmread(path)
    low, high = sorted((intercept, 4095*slope + intercept))
    theirs = (apply_windowing(y.astype(float), ds) - low) / (high - low)
    near(read_pixels(path), (theirs if slope > 0 else 1 - theirs) * 255) # pydicom turns the shades round for a negative slope

def test_window_edges(tmp_path):
    x = np.arange(256).reshape(16, 16)
    near(read_pixels(dicom(tmp_path/'a', x, 8, WindowCenter=100, WindowWidth=1)), np.where(x > 99.5, 255, 0))
    near(read_pixels(dicom(tmp_path/'b', x, 8, WindowCenter='', WindowWidth='')), x) # present but empty
    with pytest.raises(PixelError, match='c: .*LINEAR window cannot be 0 wide'): read_pixels(dicom(tmp_path/'c', x, 8, WindowCenter=100, WindowWidth=0))
    with pytest.raises(PixelError, match='d: .*unknown window function CUBIC'): read_pixels(dicom(tmp_path/'d', x, 8, WindowCenter=9, WindowWidth=9, VOILUTFunction='CUBIC'))
    with pytest.raises(PixelError, match='e: .*RescaleSlope'): read_pixels(dicom(tmp_path/'e', x, 8, RescaleSlope=0, RescaleIntercept=5))

def test_voi_lut(tmp_path):
    x, curve = values(0, 4095), (np.linspace(0, 1, 3000)**2 * 255).astype(int)
    expected = curve[np.clip(x - 500, 0, 2999)]
    near(read_pixels(dicom(tmp_path/'a', x, 12, VOILUTSequence=[lut(500, curve, 8)], WindowCenter=1, WindowWidth=2)), expected) # goes before the window
    near(read_pixels(dicom(tmp_path/'b', x, 12, VOILUTSequence=[lut(500, curve * 16, 12)], PhotometricInterpretation='MONOCHROME1')), 255 - expected * 16 / 4095 * 255)

def test_voi_lut_after_rescale(tmp_path):
    x, curve = values(0, 4095), np.arange(4096)[::-1]
    item = lut(-1000, curve, 12)
    path = dicom(tmp_path/'a', x, 12, RescaleSlope=1, RescaleIntercept=-1000, VOILUTSequence=[item])
    near(read_pixels(path), (4095 - x) / 4095 * 255) # x - 1000 is entry x, though -1000 is stored as 64536

def test_modality_lut(tmp_path):
    x, to_density = values(0, 1023), np.round(np.sqrt(np.arange(1024)) * 32).astype(int)
    y = to_density[x]
    near(read_pixels(dicom(tmp_path/'a', x, 10, ModalityLUTSequence=[lut(0, to_density, 10)])), y / 1023 * 255)
    path = dicom(tmp_path/'b', x, 10, ModalityLUTSequence=[lut(0, to_density, 10)], WindowCenter=500, WindowWidth=301)
    near(read_pixels(path), np.clip((y - 499.5) / 300 + .5, 0, 1) * 255)

def test_full_lut_and_packed_8_bits(tmp_path):
    x = values(0, 65535)
    near(read_pixels(dicom(tmp_path/'a', x, 16, VOILUTSequence=[lut(0, 65535 - np.arange(65536), 16)])), 255 - x / 65535 * 255) # 65536 entries are written as 0
    item = lut(0, [0], 8)
    item.LUTDescriptor, item.LUTData = [256, 0, 8], np.arange(256, dtype=np.uint8)[::-1].tobytes()
    x8 = values(0, 255)
    near(read_pixels(dicom(tmp_path/'b', x8, 8, VOILUTSequence=[item])), 255 - x8)


@pytest.mark.parametrize('syntax', [RLELossless, JPEG2000Lossless])
@pytest.mark.parametrize('bits', [8, 12, 16])
def test_compressed(tmp_path, syntax, bits):
    x = values(0, 2**bits - 1, (64, 80))
    path = dicom(tmp_path/'a', x, bits, PhotometricInterpretation='MONOCHROME1')
    plain, ds = read_pixels(path), dcmread(path)
    ds.compress(syntax)
    ds.save_as(path)
    assert dcmread(path).file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(read_pixels(path), plain)

def test_jpeg_in_dicom(tmp_path):
    x = np.add.outer(np.arange(64), np.arange(64)) * 2
    Image.fromarray(x.astype(np.uint8)).save(tmp_path/'a.jpg', quality=95)
    jpeg = (tmp_path/'a.jpg').read_bytes()
    assert np.abs(read_pixels(dicom(tmp_path/'a', x, 8, JPEGBaseline8Bit, jpeg)).astype(int) - x).max() <= 4

@pytest.mark.parametrize('name,plain', [('MR_small_RLE', 'MR_small'), ('MR_small_jp2klossless', 'MR_small'), ('MR_small_jpeg_ls_lossless', 'MR_small'),
                                        ('MR_small_bigendian', 'MR_small'), ('MR_small_implicit', 'MR_small')])
def test_files_of_other_makers(name, plain):
    files = [get_testdata_file(f'{n}.dcm', download=False) for n in (name, plain)]
    if None in files: pytest.skip('pydicom came without its test files')
    assert np.array_equal(*map(read_pixels, files))

def test_colour_dicom():
    file = get_testdata_file('SC_rgb_small_odd.dcm', download=False)
    if file is None: pytest.skip('pydicom came without its test files')
    near(read_pixels(file), np.array(Image.fromarray(dcmread(file).pixel_array).convert('L')))


MISSING = '''
import sys
for m in ('pylibjpeg', 'libjpeg', 'openjpeg'): sys.modules[m] = None
import importlib.metadata as m
real = m.version
def version(name):
    if 'jpeg' in name: raise m.PackageNotFoundError(name)
    return real(name)
m.version = version
from medxfer_nb.data.pixels import read_pixels
try: read_pixels(sys.argv[1])
except Exception as e: print(type(e).__name__, e)
'''

@pytest.mark.parametrize('syntax,package', [(JPEGLossless, 'pylibjpeg-libjpeg'), (JPEGLSLossless, 'pylibjpeg-libjpeg'), (JPEG2000Lossless, 'pylibjpeg-openjpeg')])
def test_missing_decoder(tmp_path, syntax, package):
    path = dicom(tmp_path/'film.dcm', values(0, 255), 8, syntax, b'\xff\xd8\xff\xd9')
    done = subprocess.run([sys.executable, '-c', MISSING, path], capture_output=True, text=True)
    assert done.stdout.startswith(f'PixelError {path}: ') and f'pip install pylibjpeg {package} (or python-gdcm)' in done.stdout, done.stdout + done.stderr

def test_damage_does_not_ask_for_packages(tmp_path):
    with pytest.raises(PixelError, match='film.dcm: cannot decode') as e: read_pixels(dicom(tmp_path/'film.dcm', values(0, 255), 8, JPEG2000Lossless, b'\xff\x4f\xff\x51 rubbish'))
    assert 'pip install' not in str(e.value)
    with pytest.raises(PixelError, match='film.dcm: .*MPEG2.*not supported'): read_pixels(dicom(tmp_path/'film.dcm', values(0, 255), 8, MPEG2MPML, b'\0\0\1\xb3'))


@pytest.mark.parametrize('kept', [0, 100, 131, 200, 700, -1])
def test_truncated_dicom(tmp_path, kept):
    path = dicom(tmp_path/'film.dcm', values(0, 4095), 12)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PixelError, match='film.dcm: ') as e: read_pixels(path)
    assert 'Doe' not in str(e.value)

@pytest.mark.parametrize('elements,why', [(dict(NumberOfFrames=3), '3 frames'), (dict(Rows=65535, Columns=65535), '65535 x 65535'), (dict(Rows=0), '0 x 31'),
                                          (dict(PhotometricInterpretation='PALETTE COLOR'), 'PALETTE COLOR'), (dict(BitsStored=32), '32 bits')])
def test_refused_dicom(tmp_path, elements, why):
    with pytest.raises(PixelError, match=f'film.dcm: .*{why}'): read_pixels(dicom(tmp_path/'film.dcm', values(0, 4095), 12, **elements))

@pytest.mark.parametrize('error,text', [(ValueError(), 'ValueError'), (ValueError(''), 'ValueError'), (RuntimeError('first\nsecond'), 'first'), (ValueError('\n'), 'ValueError')])
@pytest.mark.parametrize('file', ['film.dcm', 'film.png'])
def test_errors_without_text(tmp_path, monkeypatch, error, text, file):
    def fail(*args, **kw): raise error
    x = values(0, 255)
    if file == 'film.dcm': dicom(tmp_path/file, x, 8)
    else: Image.fromarray(x.astype(np.uint8)).save(tmp_path/file)
    monkeypatch.setattr('medxfer_nb.data.pixels.pixel_array', fail)
    monkeypatch.setattr('medxfer_nb.data.pixels.Image.open', fail)
    with pytest.raises(PixelError, match=f'{file}: [a-z ]*: {text}$'): read_pixels(tmp_path/file)

def test_dicom_without_pixels(tmp_path):
    path = dicom(tmp_path/'film.dcm', values(0, 4095), 12)
    ds = dcmread(path)
    del ds.PixelData
    ds.save_as(path)
    with pytest.raises(PixelError, match='film.dcm: .*[Pp]ixel [Dd]ata'): read_pixels(path)
    del ds.Rows, ds.BitsStored
    ds.save_as(path)
    with pytest.raises(PixelError, match='film.dcm: .*no Rows, BitsStored'): read_pixels(path)


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'LA', 'P', '1'])
def test_png_modes(tmp_path, mode):
    rgb = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    im = Image.fromarray(rgb).convert(mode)
    im.save(tmp_path/'a.png')
    r, g, b = np.moveaxis(np.asarray(im.convert('RGB'), float), -1, 0)
    assert np.abs(read_pixels(tmp_path/'a.png') - (.299*r + .587*g + .114*b)).max() <= 1

@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
def test_16_bit_png(tmp_path, bits):
    x = values(0, 2**bits - 1)
    x[0, 0] = 2**bits - 1
    Image.fromarray(x.astype(np.uint16)).save(tmp_path/'a.png')
    near(read_pixels(tmp_path/'a.png'), x / (2**bits - 1) * 255)

@pytest.mark.parametrize('kind', ['png', 'jpg'])
@pytest.mark.parametrize('kept', [0, 2, 20, 300, -40])
def test_truncated_raster(tmp_path, kind, kept):
    path = tmp_path/f'film.{kind}'
    Image.fromarray(values(0, 255, (64, 64)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CaseError, match=f'film.{kind}: '): read_pixels(path)

def test_bomb(tmp_path):
    import struct, zlib
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    (tmp_path/'film.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 12_000, 10_000, 8, 0, 0, 0, 0)) + chunk(b'IEND', b''))
    with warnings.catch_warnings(action='ignore'), pytest.raises(PixelError, match='film.png: claims 10000 x 12000'): read_pixels(tmp_path/'film.png')

def test_content_decides_not_the_name(tmp_path):
    x = values(0, 255)
    assert np.array_equal(read_pixels(dicom(tmp_path/'film.png', x, 8)), x)
    (tmp_path/'notes.dcm').write_text('hello')
    for name, why in (('notes.dcm', 'neither PNG, JPEG nor DICOM'), ('gone.png', 'No such file'), ('', 'directory')):
        with pytest.raises(PixelError, match=why): read_pixels(tmp_path/name)
