"Stacking, post-processing and scores against brute force, SciPy and MONAI."
import os, subprocess, sys
import matplotlib
import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.vision.core import TensorImage
from monai.metrics import ConfusionMatrixMetric, DiceMetric
from scipy import ndimage

matplotlib.use('Agg')
from medxfer_nb.evaluate import volumes
from medxfer_nb.evaluate.volumes import (Overlap, ball_closing, ball_opening, lung_region, overlap, overlay, plot_overlays, postprocess,
                                         stack_volume, volume_scores, without_islands)

@pytest.fixture
def rng(): return np.random.default_rng(5)

def softmax(rng, *shape): return torch.softmax(torch.from_numpy(rng.normal(0, 2, shape)).float(), 1)

# --- stacking

@pytest.mark.parametrize('form', [torch.Tensor.numpy, torch.Tensor.half, torch.Tensor.bfloat16, TensorImage])
@pytest.mark.parametrize('size', [(5, 17, 23), (5, 8, 40), (5, 16, 12)])
def test_stack_is_the_whole_volume_enlarged_at_once(rng, form, size):
    p = softmax(rng, 5, 4, 16, 12)
    stacked = stack_volume([form(p[:2]), form(p[2:])], size, keep=3)
    exact = torch.from_numpy(np.asarray(form(p))) if form is torch.Tensor.numpy else form(p).float().as_subclass(torch.Tensor)
    whole = F.interpolate(exact, size[1:], mode='bilinear')
    assert stacked.labels.dtype == np.uint8 and (stacked.labels == whole.argmax(1).numpy()).all()
    np.testing.assert_allclose(stacked.probability, whole[:, 3], atol=1e-3)
    assert stack_volume([p], size).probability is None

def test_stack_asks_for_a_slice_when_it_needs_one(rng):
    p, given = softmax(rng, 6, 2, 4, 4), []
    def batches():
        for k in range(6):
            given.append(k)
            yield p[k:k+1]
    with pytest.raises(ValueError, match='more slices than the 3'): stack_volume(batches(), (3, 4, 4))
    assert given == [0, 1, 2, 3]

def test_stack_refuses_what_is_not_a_volume_of_probabilities(rng):
    p = softmax(rng, 3, 2, 4, 4)
    for wrong in (p.log(), p*2, p.where(p > p.min(), torch.nan)):
        with pytest.raises(ValueError, match='softmax'): stack_volume([wrong], (3, 4, 4))
    with pytest.raises(ValueError, match='2 slices for the 3'): stack_volume([p[:2]], (3, 4, 4))
    with pytest.raises(ValueError, match='0 slices'): stack_volume([], (3, 4, 4))
    with pytest.raises(ValueError, match='slices, classes'): stack_volume(p, (3, 4, 4))

def test_a_large_scan_streams(tmp_path):
    code = '''
import numpy as np, resource, torch
from medxfer_nb.evaluate.volumes import postprocess, stack_volume
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
batch = torch.softmax(torch.randn(2, 3, 12, 12), 1)
batch = torch.nn.functional.interpolate(batch, (384, 384), mode='bilinear')
start = peak()
stacked = stack_volume((batch[:133 - k] for k in range(0, 133, 2)), (133, 512, 512), keep=2)
middle = peak()
postprocess(stacked.labels, (2.5, .7, .7))
print(middle - start, peak() - start)'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    stacking, both = map(float, out.stdout.split())
    assert stacking < 200 and both < 1000, out.stdout # MB; the probabilities alone would be 418

# --- morphology

@pytest.mark.parametrize('spacing, radius', [((4., 1.5, 1.), 5.), ((2.5, .7, .7), 2.1), ((1., 1., 1.), 3.), ((5., 2., 3.), 1.9), ((.6, 2.1, .9), 2.7)])
def test_balls_in_mm(rng, spacing, radius):
    reach = [int(radius/s + 1e-9) + 1 for s in spacing]
    grid = np.meshgrid(*(np.arange(-r, r + 1)*s for r, s in zip(reach, spacing)), indexing='ij')
    ball = sum(g**2 for g in grid) <= radius**2 + 1e-9
    mask = ndimage.gaussian_filter(rng.normal(size=(14, 24, 26)), 1.5) > 0 # reaches every face of the volume
    margin = [(2*r, 2*r) for r in reach]
    inner = tuple(slice(m, -m) for m, _ in margin)
    for ours, theirs in ((ball_opening, ndimage.binary_opening), (ball_closing, ndimage.binary_closing)):
        before = mask.copy()
        assert (ours(mask, spacing, radius) == theirs(np.pad(mask, margin), ball)[inner]).all()
        assert (mask == before).all()
        assert (ours(ours(mask, spacing, radius), spacing, radius) == ours(mask, spacing, radius)).all()
        assert not ours(np.zeros_like(mask), spacing, radius).any() and (ours(mask, spacing, 0) == mask).all()

def test_islands_are_measured_in_mm3(rng):
    mask = rng.random((9, 20, 20)) < .06
    pieces, n = ndimage.label(mask, np.ones((3, 3, 3)))
    expected = np.zeros_like(mask)
    for k in range(1, n + 1):
        if (pieces == k).sum()*2*.5*3 >= 7: expected |= pieces == k
    assert (without_islands(mask, (2, .5, 3), 7) == expected).all()
    assert (without_islands(mask, (2, .5, 3), 0) == mask).all() and not without_islands(mask*False, (1, 1, 1), 1).any()

# --- post-processing

SPACING = (3., 1.5, 1.5)

def ellipsoid(shape, centre, radii):
    return sum(((i - c)/r)**2 for i, c, r in zip(np.ogrid[tuple(map(slice, shape))], centre, radii)) <= 1

def chest():
    "Two lungs, and lesions by name: which must stay and which must go."
    shape = (24, 64, 80)
    lung = ellipsoid(shape, (12, 32, 20), (10, 24, 14)) | ellipsoid(shape, (12, 32, 60), (10, 24, 14))
    lesions = dict(inside=ellipsoid(shape, (12, 30, 20), (3, 5, 5)), peripheral=ellipsoid(shape, (10, 34, 70), (4, 8, 6)),
                   heart=ellipsoid(shape, (12, 32, 40), (3, 4, 4)), wall=ellipsoid(shape, (20, 58, 76), (2, 3, 3)), speck=ellipsoid(shape, (12, 44, 60), (.5, .9, .9)))
    labels = lung.astype(np.uint8)
    for m in lesions.values(): labels[m] = 2
    halo = ellipsoid(shape, (12, 20, 58), (3.5, 6, 6)) # a lesion in a gap of the predicted lung, touching nothing
    lesions['in a gap'] = ellipsoid(shape, (12, 20, 58), (2, 3, 3))
    labels[halo] = 0
    labels[lesions['in a gap']] = 2
    return labels, lesions

def test_lesions_stay_in_and_at_the_predicted_lungs_only():
    labels, lesions = chest()
    before = labels.copy()
    out = postprocess(labels, SPACING, lung_closing_mm=6)
    kept = {name: (out[m] == 2).mean() for name, m in lesions.items()}
    assert min(kept[k] for k in ('inside', 'peripheral', 'in a gap')) > .9, kept
    assert [kept[k] for k in ('heart', 'wall', 'speck')] == [0, 0, 0]
    assert (out[lesions['speck']] == 1).all() and (out[lesions['heart']] == 0).all() # to lung inside, to background outside
    assert (labels == before).all() and out.dtype == labels.dtype
    assert (postprocess(out, SPACING, lung_closing_mm=6) == out).mean() > .999

@pytest.mark.parametrize('seed', range(4))
def test_invariants_on_any_prediction(seed):
    rng = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(rng.normal(size=(12, 40, 40)), (1, 2, 2)) + b for b in (.02, .03, 0)])
    labels = fields.argmax(0).astype(np.int64)
    out = postprocess(labels, SPACING)
    region = lung_region(labels == 1, ball_opening(labels == 2, SPACING, 1.), SPACING)
    assert not ((out == 2) & (labels != 2)).any() and not ((out > 0) & ~region).any()
    assert not ((postprocess(out, SPACING) == 2) & (out != 2)).any()
    for axis in range(3): assert (postprocess(np.flip(labels, axis), SPACING) == np.flip(out, axis)).all() # no axis has a direction
    assert (postprocess(np.pad(labels, 5), SPACING)[5:-5, 5:-5, 5:-5] == out).all() # nor does background around matter
    turned = postprocess(labels.transpose(0, 2, 1), SPACING) # the plane has equal spacings
    assert (turned == out.transpose(0, 2, 1)).all()

def test_postprocessing_options_and_errors():
    labels, lesions = chest()
    off = postprocess(labels, SPACING, opening_mm=0, lung_closing_mm=0, min_lesion_mm3=0)
    assert (off[lesions['speck']] == 2).all() and not (off[lesions['heart']] == 2).any()
    other = np.array([0, 4, 9])[labels]
    assert (postprocess(other, SPACING, lung_label=4, lesion_label=9) == np.array([0, 4, 9])[postprocess(labels, SPACING)]).all()
    fine, coarse = (postprocess(labels, s, opening_mm=0, min_lesion_mm3=500, lung_closing_mm=0) for s in ((.3, .15, .15), (3., 1.5, 1.5)))
    assert not (fine == 2).any() and (coarse == 2).any() # sizes are in mm
    assert not postprocess(np.zeros((3, 4, 5), int), SPACING).any() and not postprocess(np.full((3, 4, 5), 2), SPACING).any()
    with pytest.raises(ValueError, match=r'labels \[3\].*merge'): postprocess(labels + (labels == 2), SPACING)
    with pytest.raises(ValueError, match='whole numbers'): postprocess(labels.astype(float), SPACING)
    with pytest.raises(ValueError, match='whole numbers'): postprocess(labels[0], SPACING)
    for s in ((0, 1, 1), (1, 1), (1, np.nan, 1)):
        with pytest.raises(ValueError, match='spacing'): postprocess(labels, s)

def test_small_pieces_of_lung_are_no_lungs():
    labels, _ = chest()
    labels[2:4, 2:5, 2:5] = 1 # gas in the bowel
    labels[2, 3, 3] = 2
    out = postprocess(labels, SPACING, opening_mm=0, min_lesion_mm3=0)
    assert not out[:6, :6, :6].any()
    assert out[2, 3, 3] == 0 and postprocess(labels, SPACING, opening_mm=0, min_lesion_mm3=0, min_lung_share=0)[2, 3, 3] == 2

# --- scores

def one_hot(labels): return F.one_hot(torch.from_numpy(labels).long(), 3).permute(3, 0, 1, 2)[None]

def test_scores_agree_with_monai(rng):
    pred, truth = rng.integers(0, 3, (2, 6, 9, 8))
    pred[pred == 2], truth[truth == 1] = 0, 0 # class 2 is not predicted, class 1 is not there
    cases = [(pred, truth), (truth, truth), (rng.integers(0, 3, (6, 9, 8)), rng.integers(0, 3, (6, 9, 8))), (truth*0, truth*0)]
    for p, t in cases:
        dice = DiceMetric(include_background=True, ignore_empty=False)(one_hot(p), one_hot(t))[0]
        for label in range(3): assert overlap(p, t, label).dice == pytest.approx(float(dice[label]))
    p, t = cases[2]
    metric = ConfusionMatrixMetric(include_background=True, metric_name=('precision', 'sensitivity'))
    metric(one_hot(p), one_hot(t))
    precision, recall = (m.squeeze() for m in metric.aggregate())
    o = overlap(p, t, 2)
    assert metric.get_buffer()[0, 2, :1].item() == o.tp
    assert 0 < o.precision < 1 and o.precision == pytest.approx(o.tp/(p == 2).sum()) and o.recall == pytest.approx(o.tp/(t == 2).sum())

def test_one_convention_for_empty_masks():
    empty, full = np.zeros((2, 2), int), np.full((2, 2), 2)
    for pred, truth, value in ((empty, empty, 1), (full, empty, 0), (empty, full, 0), (full, full, 1)):
        o = overlap(pred, truth)
        assert (o.dice, o.precision, o.recall) == (value,)*3
    notes = [volume_scores(p[None], t[None], (1, 1, 1)).note['infection'] for p, t in ((empty, empty), (full, empty), (empty, full), (full, full))]
    assert notes == ['in neither', 'none in truth', 'none predicted', '']
    assert Overlap(1, 2, 3) + Overlap(4, 5, 6) == Overlap(5, 7, 9)

def test_classes_may_be_merged_and_masks_boolean(rng):
    pred, truth = rng.integers(0, 3, (2, 5, 6, 7))
    assert overlap(pred, truth, (1, 2)) == overlap(pred > 0, truth > 0, 1)
    table = volume_scores(pred, truth, (2., 1., .5), {'any': (1, 2), 'lesion': 2})
    assert table.truth_ml['any'] == pytest.approx((truth > 0).sum()/1000) and table.predicted_ml['lesion'] == pytest.approx((pred == 2).sum()/1000)
    with pytest.raises(ValueError, match='not of one shape'): overlap(pred, truth[1:])
    with pytest.raises(ValueError, match='most probable'): overlap(pred.astype(float), truth)

# --- figures

def test_overlay_colours_and_gray(rng):
    image, pred, truth = rng.random((6, 7)), rng.random((6, 7)) > .5, rng.random((6, 7)) > .5
    rgb = overlay(image, pred, truth, alpha=1)
    for kind, mask in dict(TP=pred & truth, FP=pred & ~truth, FN=~pred & truth).items():
        np.testing.assert_allclose(rgb[mask], np.tile(matplotlib.colors.to_rgb(volumes.OVERLAY_COLOURS[kind]), (mask.sum(), 1)))
    np.testing.assert_allclose(rgb[~pred & ~truth], image[~pred & ~truth][:, None].repeat(3, 1))
    np.testing.assert_allclose(overlay(np.array([[-3000., -500., 900.]]), [[0]*3], [[0]*3], window=(-1000, 0))[0, :, 0], [0, .5, 1])
    with pytest.raises(ValueError, match='not of one shape'): overlay(image[1:], pred, truth)

def test_overlays_figure(rng):
    images, truth = rng.random((2, 8, 10)), rng.random((2, 8, 10)) > .5
    fig = plot_overlays(images, truth, {'λ = 0': truth, 'λ = 8': ~truth}, names=['a', 'b'], aspect=1.5)
    assert len(fig.axes) == 6 and [a.get_title() for a in fig.axes[:3]] == ['CT slice', 'λ = 0', 'λ = 8']
    assert [a.get_xlabel() for a in fig.axes[1:3]] == ['Dice 1.00', 'Dice 0.00']
    matplotlib.pyplot.close(fig)
