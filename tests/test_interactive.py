"Explorers: the slider draws what it says, a merge's ends are its sources, a volume arrives whole and without a name, and a picture stands where nobody is there."
import base64
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from PIL import Image
from torch import nn

from medxfer_nb.evaluate import interactive
from medxfer_nb.evaluate.interactive import explore, explore_colours, explore_overlays, explore_ratios, view_volume
from medxfer_nb.transfer.fisher import fisher
from medxfer_nb.transfer.merge import load_merged, mode_imm

ROOT = Path(__file__).resolve().parent.parent
WIDGET = 'application/vnd.jupyter.widget-view+json'


def bundle(explorer) -> dict: return explorer._repr_mimebundle_()[0]

def pixels(png: bytes | str) -> np.ndarray: return np.asarray(Image.open(io.BytesIO(base64.b64decode(png) if isinstance(png, str) else png)).convert('RGB'))

def bars(fig, height, colour='red'):
    "A picture that tells its choices apart"
    ax = fig.subplots()
    ax.bar([0], [height], color=colour)
    ax.set_ylim(0, 10)


# ---- is anybody there?

CELL = 'from medxfer_nb.evaluate.interactive import explore, is_live; e = explore(lambda fig, x: fig.subplots().plot([x]), {"x": [1, 2]}); print(is_live(), e.widget is not None)'

@pytest.fixture(scope='module')
def kernel():
    manager, client = start_new_kernel(kernel_name='python3')
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_reader_gets_the_widget(kernel):
    "The request of Jupyter Lab, of VS Code, ..."
    pytest.importorskip('ipywidgets')
    said = []
    kernel[1].execute_interactive(CELL, allow_stdin=True, timeout=120, output_hook=lambda m: said.append(m['content'].get('text', '')) if m['msg_type'] == 'stream' else None)
    assert ''.join(said) == 'True True\n'


def test_an_executed_notebook_holds_a_picture_and_no_widget(kernel):
    "The same kernel, asked by nbclient, as papermill, nbconvert and Quarto do"
    nb = new_notebook(cells=[new_code_cell(CELL + '\ne')])
    NotebookClient(nb, km=kernel[0], timeout=120).execute()
    printed, shown = nb.cells[0].outputs
    assert printed.text == 'False False\n' and set(shown.data) == {'image/png', 'text/plain'} and 'widgets' not in nb.metadata
    assert len(np.unique(pixels(shown.data['image/png']))) > 2


@pytest.mark.parametrize('path', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_no_state_of_a_widget_is_stored(path):
    text = path.read_text(encoding='utf-8')
    assert f'"{WIDGET}": {{' not in text and 'widget-state+json' not in text and 'widgets' not in json.loads(text)['metadata']


def test_without_the_packages_there_is_a_picture_or_a_clear_error(monkeypatch):
    for name in ('ipywidgets', 'ipyniivue'): monkeypatch.setitem(sys.modules, name, None)  # As if it were not installed
    assert set(bundle(explore(bars, {'height': [1, 2]}))) == {'image/png', 'text/plain'}
    with pytest.raises(ImportError, match=re.escape('pip install "medxfer_nb[interactive]"')): explore(bars, {'height': [1, 2]}, live=True)
    with pytest.raises(ImportError, match='ipyniivue.*medxfer_nb'): view_volume(np.zeros((3, 3, 3)), spacing=(1, 1, 1), live=True)
    monkeypatch.setattr(interactive, 'is_live', lambda: True)
    with pytest.warns(UserWarning, match=re.escape('medxfer_nb[interactive]')): e = explore(bars, {'height': [1, 2]})
    assert e.widget is None


# ---- sliders and menus

def test_the_slider_draws_what_it_says():
    pytest.importorskip('ipywidgets')
    seen = []
    def draw(fig, height, colour):
        seen.append((height, colour))
        bars(fig, height, colour)
    e = explore(draw, {'height': [1, 5, 9], 'paint': {'warm': 'red', 'cold': 'blue'}}, live=True)
    assert seen == [(1, 'red'), (5, 'red'), (9, 'red'), (1, 'red')]  # The picture, then what the widget begins with
    image = e.widget.children[-1]
    first = image.value
    e.controls['height'].value = 9
    assert seen[-1] == (9, 'red') and (after := image.value) != first
    e.controls['paint'].value = 'blue'
    assert seen[-1] == (9, 'blue') and image.value != after
    e.controls['height'].index = 0  # As the front end does it
    e.controls['paint'].value = 'red'
    assert image.value == first and len(seen) == 8
    blue = pixels(explore(bars, {'height': [9]}, live=True).widget.children[-1].value)
    assert ((blue[..., 0] > 200) & (blue[..., 2] < 50)).sum() > 4*((pixels(first)[..., 0] > 200) & (pixels(first)[..., 2] < 50)).sum()


def test_a_live_cell_says_both_widget_and_picture():
    pytest.importorskip('ipywidgets')
    data = bundle(explore(bars, {'height': [1, 2]}, live=True))
    assert set(data) == {WIDGET, 'image/png', 'text/plain'} and data[WIDGET]['model_id']


def test_a_picture_has_at_most_six_panels_first_and_last_among_them():
    drawn = []
    e = explore(lambda fig, x, y: drawn.append((x, y)), {'x': range(50), 'y': 'abc'}, start=('x = 7', 'b'))
    assert [x for x, _ in drawn] == [0, 10, 20, 29, 39, 49] and {y for _, y in drawn} == {'b'} and len(e.figure.subfigs) == 6
    explore(lambda fig, *v: drawn.append(v), {'x': range(50), 'y': 'abc'}, sheet=[('x = 3', 'c')])
    assert drawn[6:] == [(3, 'c')]
    with pytest.raises(ValueError, match='nothing to choose'): explore(bars, {})


def test_overlays():
    pytest.importorskip('ipywidgets')
    truth = np.zeros((2, 16, 16), bool)
    truth[:, 4:12, 4:12] = True
    nothing, everything = np.zeros_like(truth), np.ones_like(truth)
    e = explore_overlays(np.full((2, 16, 16), .5), truth, {'λ = 0': nothing, 'λ = 8': truth, 'λ = 50': everything}, live=True)
    def shares():  # Of yellow, green and red among the pixels
        rgb = pixels(e.widget.children[-1].value).astype(int)
        return [np.all(abs(rgb - np.round(255*(.6*np.array(c) + .4*.5))) < 3, -1).sum() > 200 for c in ((.941, .894, .259), (0, .62, .451), (.835, .369, 0))]
    assert shares() == [True, False, False]
    e.controls['network'].value = 'λ = 8'
    assert shares() == [False, True, False]
    e.controls['network'].value = 'λ = 50'
    assert shares() == [False, True, True]
    e.controls['colours'].value = 0.
    assert shares() == [False, False, False]
    with pytest.raises(ValueError, match='not of one shape'): explore_overlays(np.zeros((2, 16, 16)), truth, {'λ = 0': truth[:1]})


def test_colours():
    pytest.importorskip('ipywidgets')
    films, rgb = np.random.default_rng(0).random((2, 12, 12)), np.random.default_rng(1).normal(size=(2, 3, 12, 12))
    e = explore_colours(films, {('coloru', 'all'): rgb, ('none', 'baseline'): np.repeat(films[:, None], 3, 1)}, live=True)
    assert list(e.controls['module']._options_labels) == ['ColorU, All', 'Baseline'] and list(e.controls['film']._options_values) == [1, 2]
    before = e.widget.children[-1].value
    e.controls['module'].value = ('none', 'baseline')
    assert e.widget.children[-1].value != before
    with pytest.raises(ValueError, match='do not fit'): explore_colours(films, {('coloru', 'all'): rgb[:1]})


# ---- merges

def network(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double()
    x, y = torch.randn(20, 1, 8, 8).double(), torch.arange(20) % 3
    return net, fisher(net, [(x, y)], 'softmax', labels='true', backend='vmap')


@pytest.mark.parametrize('n', [2, 3])
def test_the_ends_of_a_merge_are_its_sources(n):
    pytest.importorskip('ipywidgets')
    nets, fishers = zip(*map(network, range(n)))
    x, seen = torch.randn(5, 1, 8, 8).double(), []
    def draw(fig, ratios):
        net = load_merged(network(9)[0], mode_imm(nets, fishers, list(ratios), ancestry='trust'))
        seen.append((ratios, net(x).detach()))
    e = explore_ratios(draw, ['A', 'B', 'C'][:n], live=True)
    assert all(abs(sum(r) - 1) < 1e-12 and len(r) == n for r, _ in seen)
    for i in range(n):
        if n == 2: e.controls['ratio of B'].value = float(i)
        else:
            for k, name in enumerate('ABC'): e.controls[name].value = 1. if k == i else 0.
        ratios, found = seen[-1]
        assert ratios == tuple(float(k == i) for k in range(n)) and torch.equal(found, nets[i](x))
    if n == 3:
        e.controls['C'].value = 0.
        assert seen[-1][0] == (1/3, 1/3, 1/3)  # No weight at all: as IMM
        e.controls['A'].value = e.controls['B'].value = .4
        assert seen[-1][0] == (.5, .5, 0.)
    with pytest.raises(ValueError, match='two or more'): explore_ratios(draw, ['A'])


# ---- volumes

SHAPE, SPACING = (6, 9, 12), (4., 2., 1.)  # (z, y, x), mm

def stored(codes, values):
    "A NIfTI image along other axes, turned a little, of an array in the house's"
    turn = ornt_transform(axcodes2ornt('LPS'), axcodes2ornt(codes))
    c, s = np.cos(.1), np.sin(.1)
    house = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.])
    house[:3, 3] = 30, 40, -50
    return nib.Nifti1Image(nib.apply_orientation(values.T, turn), house @ inv_ornt_aff(turn, SHAPE[::-1]))

def scan(): return np.random.default_rng(0).integers(-1000, 400, SHAPE).astype(np.int16)

def lesion():
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:5, 2:5, 3:8], mask[1, 6:8, 1:3] = 1, 2
    return mask


@pytest.mark.parametrize('codes', ['LPS', 'RAS', 'PIR', 'SAL'])
def test_niivue_gets_the_voxels_and_their_place(tmp_path, codes):
    pytest.importorskip('ipyniivue')
    image, mask = stored(codes, scan()), stored(codes, lesion())
    for name, i in (('scan.nii.gz', image), ('mask.nii.gz', mask)): nib.save(i, tmp_path/name)
    view = view_volume(tmp_path/'scan.nii.gz', tmp_path/'mask.nii.gz', window=(-900, 300), live=True).widget
    for sent, original in zip(view.volumes, (image, mask)):
        got = nib.Nifti1Image.from_bytes(sent.data)
        assert np.array_equal(np.asarray(got.dataobj), np.asarray(original.dataobj))
        np.testing.assert_allclose(got.affine, original.affine, rtol=1e-6, atol=1e-5)
        assert got.header.get_zooms() == pytest.approx(nib.affines.voxel_sizes(original.affine))
    assert (view.volumes[0].cal_min, view.volumes[0].cal_max) == (-900, 300)
    lut = np.array(view.volumes[1].colormap_label.lut).reshape(-1, 4)
    assert len(lut) == 3 and lut[0, 3] == 0 and lut[1:, 3].all() and len(np.unique(lut, axis=0)) == 3  # Background is clear, labels differ


def test_arrays_with_spacing_lie_as_the_house_has_it():
    pytest.importorskip('ipyniivue')
    view = view_volume(scan(), (lesion() > 0).astype(float), SPACING, live=True).widget  # A mask of 0. and 1. is one too
    image, mask = (nib.Nifti1Image.from_bytes(v.data) for v in view.volumes)
    assert nib.aff2axcodes(image.affine) == ('L', 'P', 'S') and image.header.get_zooms() == (1, 2, 4)
    assert np.array_equal(np.asarray(image.dataobj).T, scan()) and np.array_equal(np.asarray(mask.dataobj).T, lesion() > 0)


def test_one_place_gives_one_picture_however_it_is_stored(tmp_path):
    expected = pixels(bundle(view_volume(scan(), lesion(), affine=stored('LPS', scan()).affine))['image/png'])
    for codes in ('RAS', 'PIR'):
        nib.save(stored(codes, scan()), tmp_path/'scan.nii')
        nib.save(stored('LPS', lesion()), tmp_path/'mask.nii')
        for mask in (tmp_path/'mask.nii', lesion()):
            assert np.array_equal(pixels(bundle(view_volume(tmp_path/'scan.nii', mask))['image/png']), expected)


def test_slices_are_in_true_proportions_and_go_through_the_mask():
    e = view_volume(scan(), lesion(), SPACING)
    e.figure.draw_without_rendering()
    depth, height, width = np.multiply(SHAPE, SPACING)
    boxes = [ax.get_window_extent() for ax in e.figure.axes]
    for box, ratio in zip(boxes, (width/height, width/depth, height/depth)): assert box.width/box.height == pytest.approx(ratio, rel=.01)
    assert boxes[0].width == pytest.approx(boxes[1].width, rel=.05) and boxes[1].height == pytest.approx(boxes[2].height, rel=.05)
    axial, coronal, sagittal = (ax.images[0].get_array() for ax in e.figure.axes)
    assert np.array_equal(axial, scan()[1]) and np.array_equal(coronal, scan()[::-1, 6]) and np.array_equal(sagittal, scan()[::-1, :, 1])  # The small label counts as much as the large one
    assert e.figure.axes[0].collections  # The outline


def test_no_identifier_passes(tmp_path, monkeypatch):
    "Neither from the header nor from the file's name; no file is written"
    pytest.importorskip('ipyniivue')
    image = stored('LPS', scan())
    image.header['descrip'], image.header['db_name'], image.header['intent_name'] = b'DOE^JANE^X', b'DOE^JANE^X', b'DOE^JANE^X'
    image.header.extensions.append(nib.nifti1.Nifti1Extension('comment', b'PatientName DOE^JANE^X'))
    nib.save(image, tmp_path/'DOE_JANE_X.nii.gz')
    for name in ('mkstemp', 'mkdtemp', 'NamedTemporaryFile'): monkeypatch.setattr(tempfile, name, lambda *a, **k: pytest.fail('a file'))
    e = view_volume(tmp_path/'DOE_JANE_X.nii.gz', lesion(), live=True)
    said = repr([w.get_state() for w in (*e.widget.volumes, e.widget)]) + repr(bundle(e)) + repr([v.data for v in e.widget.volumes])
    assert 'DOE^JANE' not in said and 'DOE_JANE' not in said and [p.name for p in tmp_path.iterdir()] == ['DOE_JANE_X.nii.gz']
    assert [v.name for v in e.widget.volumes] == ['volume.nii', 'mask.nii']


def test_the_program_of_the_viewer_comes_with_the_package():
    "Nothing is loaded from a content delivery network"
    niivue = pytest.importorskip('ipyniivue')
    program = niivue.NiiVue._esm
    text = program if isinstance(program, str) else Path(str(getattr(program, '_path', program))).read_text(encoding='utf-8')
    assert len(text) > 1_000_000 and not re.search(r'(from|import)\s*\(?\s*["\']https?:', text)


@pytest.mark.parametrize('call, match', [
    (lambda: view_volume(scan()), 'give `spacing`'), (lambda: view_volume(scan()[0], spacing=SPACING), 'three axes'),
    (lambda: view_volume(scan(), lesion()[1:], SPACING), r'\(6, 9, 12\) voxels \(z, y, x\) and the mask \(5, 9, 12\)'),
    (lambda: view_volume(scan(), lesion()/2, SPACING), 'whole numbers'), (lambda: view_volume(scan(), -lesion().astype(int), SPACING), 'whole numbers'),
    (lambda: view_volume(np.full(SHAPE, 2**40), spacing=SPACING), '32 bits')])
def test_what_is_wrong_is_said(call, match):
    with pytest.raises(ValueError, match=match): call()


def test_a_mask_that_lies_elsewhere_is_refused(tmp_path):
    mask = stored('LPS', lesion())
    mask.affine[0, 3] += 3
    nib.save(nib.Nifti1Image(np.asarray(mask.dataobj), mask.affine), tmp_path/'mask.nii')
    nib.save(stored('RAS', scan()), tmp_path/'scan.nii')
    with pytest.raises(ValueError, match='3 mm apart: resample'): view_volume(tmp_path/'scan.nii', tmp_path/'mask.nii')
