"""What a run of the L2-SP paper promises: where it starts, that an interruption changes nothing, and that its numbers are those of the network it stores."""
import itertools
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from fastai.torch_core import defaults
from torch import nn
from torch.nn import functional as F

from medxfer_nb.data.ct import CLASSES, read_dicom_series, read_nifti
from medxfer_nb.data.slices import Slices
from medxfer_nb.data.volumes import SOURCE_TASKS
from medxfer_nb.evaluate.volumes import postprocess
from medxfer_nb.models.hydra import Hydra
from medxfer_nb.models.precision import BF16_LAST, FP32_LAST, set_modes
from medxfer_nb.repro import lesions
from medxfer_nb.repro.jobs import Context, perform, plan, seeded
from medxfer_nb.repro.lesion_results import find, patients_frame
from medxfer_nb.repro.lesion_scales import LAMBDAS, SCALES, item_runs, make_run
from medxfer_nb.repro.store import Store, published_run
from medxfer_nb.transfer.stages import seed_epoch
from test_data_ct import put, turned, window, write_slice
from test_evaluate_volumes import chest

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    "Decoders of a few channels, so that checkpoints are written at once; the CPU, where sums are the same to the bit"
    monkeypatch.setattr(defaults, 'use_cuda', False)
    for make in ('unet', 'hydra'): monkeypatch.setattr(lesions, make, partial(getattr(lesions, make), decoder_channels=(16, 16, 8, 8, 8)))


def tiny(source='nat', **changes):
    "A run of seconds, without a download"
    return make_run(SCALES['smoke'], source, **dict(backbone='test_resnet', weights='random') | changes)


def trained(run, folder, progress=lambda fraction, note='': None):
    "Train a run in this process, as a job does: a second call continues what a first one left"
    store = Store(folder)
    job, = plan([run], store).todo
    return perform(job, store, progress=progress)


class Begun(Exception): pass


@pytest.fixture
def begun(tmp_path, monkeypatch):
    "(run, parents) -> the learner with which a run would start its first step"
    def stop(learn, *args, **options): raise Begun(learn)
    def begin(run, *parents, data_root=None):
        with monkeypatch.context() as m, seeded(run.seed), pytest.raises(Begun) as e:
            m.setattr(lesions, 'fit_stage', stop)
            lesions.train(run, Context(parents, tmp_path, None, data_root, run.seed, print))
        return e.value.args[0]
    return begin


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# Interrupted and resumed

class PowerCut(Exception): pass

HELD = dict(steps=6, validate_every=2, lam=.5)
RUNS = {'loss': tiny(**HELD, form='loss'), 'grad': tiny(**HELD), 'proximal': tiny(**HELD, form='proximal'),
        'frozen': tiny(**HELD | dict(lam=0.), frozen=True), 'source': lesions.source_run(tiny('med', source_steps=12))}

@pytest.mark.parametrize('name', RUNS)
def test_an_interrupted_run_ends_as_if_nothing_had_happened(tmp_path, monkeypatch, name):
    "Cut off in the middle of the second stretch; each validation is the best so far, so that the last weights count."
    run, told = RUNS[name], []
    def tell(fraction, note=''): told.append(fraction)
    def cut(fraction, note=''):
        if fraction > .45: raise PowerCut('in the middle')
    def from_now_on_better(): monkeypatch.setattr(lesions, 'pooled_dice', lambda logits, masks, count=itertools.count(): next(count))
    from_now_on_better()
    whole = trained(run, tmp_path/'whole', tell)
    steps = len(told)
    from_now_on_better()
    with pytest.raises(PowerCut): trained(run, tmp_path/'cut', cut)
    told.clear()
    again = trained(run, tmp_path/'cut', tell)
    assert len(told) == steps - steps//len(whole.history)  # It went on after the first validation
    assert again.history == whole.history and again.metrics == whole.metrics
    assert same(again.weights(), whole.weights()) and all(np.array_equal(v, whole.predictions()[k]) for k, v in again.predictions().items())
    if name in ('frozen', 'source'): return
    assert [h['iteration'] for h in again.history] == [2, 4, 6] and again.metrics['best_iteration'] == 6
    for h in again.history: assert h['distance'] > 0 and h['penalty'] == pytest.approx(.5*h['distance']**2, rel=1e-4)
    assert again.history[-1]['distance'] == pytest.approx(again.metrics['distance'], rel=1e-6)


# What is stored

@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'mixed'])
def test_a_stored_network_computes_as_it_was_scored(tmp_path, monkeypatch, precision):
    "`mixed`: each part as a probe may choose"
    scored, score, x = [], lesions.score, torch.rand(4, 1, 32, 32)
    monkeypatch.setattr(lesions, 'score', lambda net, scans: scored.append(net) or score(net, scans))
    if precision == 'mixed': monkeypatch.setattr(lesions, 'choose_unet_modes', lambda net, *_: set_modes(net, dict(encoder=FP32_LAST, decoder=BF16_LAST)))
    run = tiny(lam=.001, steps=12, validate_every=12, lr=.01, precision='fp32' if precision == 'mixed' else precision)
    record = trained(run, tmp_path)
    net, before = lesions.trained_net(record), scored[0].eval()
    kept, words = record.predictions(), [record.metrics[f'precision_{part}'] for part in ('encoder', 'decoder')]
    assert words == [f'{w} channels-last' for w in (('fp32', 'bf16') if precision == 'mixed' else (precision,)*2)]
    assert (kept['dice'] > 0).all()  # Else any network would do
    assert {k: v for k, v in score(net, lesions.test_scans(run)).items() if not np.array_equal(v, kept[k])} == {}
    with torch.no_grad():
        assert net.modes == before.modes and torch.equal(net(x), before(x))
        for encoder, decoder in itertools.product((FP32_LAST, BF16_LAST), repeat=2):  # Any other mode is another function
            other = dict(encoder=encoder, decoder=decoder)
            assert torch.equal(set_modes(net, other)(x), before(x)) == all(before.modes[part] == mode for part, mode in other.items())


def test_a_frozen_encoder_keeps_its_weights_alone(tmp_path, begun):
    "Statistics of BatchNorm and the decoder move, as they do for every penalty weight; the class weights are stored."
    run = tiny(frozen=True)
    start, record = begun(run).model, trained(run, tmp_path)
    end, held = record.weights(), {f'encoder.{k}' for k, _ in start.encoder.named_parameters()}
    moved = {k for k, v in start.state_dict().items() if not torch.equal(v, end[k])}
    assert held and not moved & held and record.metrics['distance'] == 0
    assert any(k.startswith('encoder.') and 'running_mean' in k for k in moved) and any(k.startswith('decoder.') for k in moved)
    n = np.bincount(lesions.target_slices(run)[0].masks.ravel())
    assert [record.metrics[f'weight_{c}'] for c in CLASSES] == pytest.approx(n.sum()/(3*n), rel=1e-6)


# Where runs start

def test_three_sources(tmp_path, begun):
    "Nat: ImageNet's encoder. Med: a HydraNet from scratch. Med+Nat: a HydraNet from ImageNet's. Targets take the HydraNet's encoder and nothing else."
    torch.manual_seed(5)
    imagenet = timm.create_model('test_resnet', num_classes=0).state_dict()
    (tmp_path/'weights').mkdir()
    torch.save(imagenet, tmp_path/'weights'/'test_resnet.pth')
    runs = {s: tiny(s, lam=8., weights='imagenet') for s in ('nat', 'med', 'med+nat')}
    nat = begun(runs['nat'], data_root=tmp_path)
    assert same(nat.model.encoder.state_dict(), imagenet)
    for s in ('med', 'med+nat'):
        source = begun(lesions.source_run(runs[s]), data_root=tmp_path).model
        assert isinstance(source, Hydra) and source.tasks == tuple(SOURCE_TASKS) and len(source.decoder) == 4
        assert same(source.encoder.state_dict(), imagenet) == (s == 'med+nat')
        given = {f'encoder.{k}': v + 1 if v.is_floating_point() else v for k, v in imagenet.items()}
        target = begun(runs[s], SimpleNamespace(weights=lambda: given), data_root=tmp_path)
        assert same({f'encoder.{k}': v for k, v in target.model.encoder.state_dict().items()}, given)
        target.l2sp.bind()
        assert target.l2sp.anchor and all(torch.equal(a, given[k]) for k, a in target.l2sp.anchor.items())


def test_penalty_weights_differ_in_nothing_but_the_penalty(begun):
    "The same network, the same batches, the same loss"
    def start(**hold):
        learn = begun(tiny(**hold))
        seed_epoch(learn, 0, 0)
        return learn, learn.model.state_dict(), *learn.dls.train.one_batch()
    learn, net, x, y = start(lam=0.)
    for hold in (dict(lam=8.), dict(lam=50., form='proximal'), dict(frozen=True)):
        other = start(**hold)
        assert same(net, other[1]) and torch.equal(x, other[2]) and torch.equal(y, other[3]) and torch.equal(learn.loss_func.weight, other[0].loss_func.weight)
    other = start(lam=0., seed=1)
    assert not torch.equal(net['head.weight'], other[1]['head.weight']) and not torch.equal(x, other[2])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    assert [h['wd'] for h in learn.opt.hypers] == [0, 0]  # Decay would pull towards zero, whatever the penalty


def test_a_network_is_where_it_will_train_before_its_modes_are_measured(monkeypatch, begun):
    "The device `meta` stands for a GPU."
    asked = []
    monkeypatch.setattr(lesions, 'default_device', lambda: torch.device('meta'))
    monkeypatch.setattr(lesions, 'choose_unet_modes', lambda net, *_: asked.append({p.device.type for p in net.parameters()}))
    for run in (tiny(lam=8.), RUNS['source']):
        learn = begun(run)
        learn.create_opt()
        assert asked.pop() == {p.device.type for group in learn.opt.param_lists for p in group} == {'meta'}


def test_every_lambda_has_one_source_network():
    for scale in SCALES.values():
        runs = item_runs('fig1_lambda', scale)
        assert {lesions.source_run(r) for r in runs} == {None, *(lesions.source_run(make_run(scale, s)) for s in ('med', 'med+nat'))}
        assert all(p.seed not in {r.seed for r in runs} for r in runs for p in lesions.parents(r))
    grid = {(r.source, r.lam, r.frozen) for r in item_runs('fig1_lambda', SCALES['study'])}
    assert grid >= set(itertools.product(('nat', 'med', 'med+nat'), LAMBDAS, [False])) | {(s, 0., True) for s in ('nat', 'med', 'med+nat')}
    assert SCALES['demo'].lams == (0, 8, 50)


# Scores

def test_scores_by_hand(monkeypatch):
    "Two patients whose pixels are their prediction"
    rng, spacing = np.random.default_rng(0), (2., .5, 3.)
    scans = [lesions.Scan(rng.integers(0, 3, (3, 5, 6)), rng.integers(0, 3, (3, 5, 6)), spacing) for _ in range(2)]
    monkeypatch.setattr(lesions, 'segment', lambda net, pixels, shape, mm: pixels if (shape, mm) == ((3, 5, 6), spacing) else None)
    ours = lesions.score(None, iter(scans))
    for i, s in enumerate(scans):
        p, t = (set(map(tuple, np.argwhere(m == 2))) for m in (s.pixels, s.truth))
        lungs = [set(map(tuple, np.argwhere(m > 0))) for m in (s.pixels, s.truth)]
        expected = dict(dice=2*len(p & t)/(len(p) + len(t)), precision=len(p & t)/len(p), recall=len(p & t)/len(t),
                        lung_dice=2*len(lungs[0] & lungs[1])/sum(map(len, lungs)), lesion_ml=len(t)*3/1000)
        assert {k: v[i] for k, v in ours.items()} == pytest.approx(expected)


class Echo(nn.Module):
    "Sees classes in gray: 0, 1/3, 2/3, 1"
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(9.))
    def forward(self, x, task): return self.gain*F.one_hot((3*x[:, 0]).round().long(), 4).permute(0, 3, 1, 2).float()

def test_dice_of_a_source_task_by_hand():
    rng = np.random.default_rng(1)
    seen, truth = rng.integers(0, 4, (2, 5, 8, 8))
    slices = Slices((seen/3).astype('float16'), truth.astype('uint8'), np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 1]), np.array([0, 1]),
                    np.array([[3, 8, 8], [2, 8, 8]]), np.ones((2, 3)), ('background', 'a', 'b', 'c'))
    by_class = [2*((seen == c) & (truth == c)).sum()/((seen == c).sum() + (truth == c).sum()) for c in (1, 2, 3)]
    assert lesions.task_dice(Echo(), 'any', slices) == pytest.approx(np.mean(by_class))


# From file to file

class Gray(nn.Module):
    "Segments by gray value alone: soft tissue, lung, lesion"
    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.tensor([1., .15, .5])[:, None, None])
    def forward(self, x): return -100*(x - self.values)**2

def test_a_scan_is_segmented_alike_from_every_kind_of_file(tmp_path):
    "NIfTI on two sorts of axes, a DICOM series, and values windowed to 0-255"
    drawn = np.pad(chest()[0], ((0, 0), (8, 8), (0, 0)))  # Slices of 80 x 80: nothing is interpolated
    hu, mm = np.array([40, -850, -500], 'int16')[drawn], (3., 1.5, 1.5)
    (tmp_path/'series').mkdir()
    for z, plane in enumerate(hu): write_slice(tmp_path/'series'/f'{99 - z}', plane, (0, 0, mm[0]*z), PixelSpacing=list(mm[1:]))
    scans = dict(plain=put(tmp_path/'plain.nii.gz', hu, spacing=mm), turned=put(tmp_path/'turned.nii.gz', hu, 'ASR', .2, spacing=mm),
                 series=tmp_path/'series', window=put(tmp_path/'window.nii.gz', window(hu), spacing=mm))
    found = {k: read_nifti(lesions.segment_file(Gray(), scan, tmp_path/f'{k}_mask.nii.gz', 80)) for k, scan in scans.items()}
    labels, _ = found['plain']
    assert (labels == 2).any() and all(np.array_equal(mask, postprocess(drawn, mm)) for mask, _ in found.values())
    assert np.allclose(found['turned'][1].affine, turned('ASR', hu.shape, mm, .2)[0], atol=1e-4)
    assert np.allclose(found['series'][1].affine, read_dicom_series(scans['series']).grid.affine, atol=1e-4)
    other, _ = read_nifti(lesions.segment_file(Gray(), scans['window'], tmp_path/'other.nii.gz', 80, window=(-1000, 2000)))
    assert (labels == other).mean() < .95  # The window can be replaced, and matters


# Claims

def gains(seeds):
    "Scores of six patients in which λ = 8 adds 0.05 for every source, but for a little noise"
    rng = np.random.default_rng(0)
    def drawn(lam): return {metric: .6 + .05*(lam > 0) + .001*rng.normal(size=6) for metric in ('dice', 'precision')}
    return patients_frame(SimpleNamespace(config=tiny(s, lam=lam, seed=k), predictions=partial(drawn, lam)) for s in ('nat', 'med', 'med+nat') for lam in (0., 8.) for k in range(seeds))

def test_on_one_anatomy_a_verdict_is_about_the_mechanism_only():
    for scale in ('demo', 'study'):
        by = {(f.statement.source, f.statement.metric, f.statement.other): f for f in find(gains(3), SCALES[scale])}
        assert all('mechanism only' in f.claim.words for f in by.values())
        assert by['med+nat', 'dice', ''].claim.verdict == 'same direction' and by['nat', 'dice', ''].claim.verdict == 'opposite'
    assert not any('mechanism only' in f.claim.words for f in find(gains(3), SCALES['paper']))
    assert {f.claim.verdict for f in find(gains(1), SCALES['study'])} == {'undecided'}  # One seed knows nothing of others


def test_the_committed_study():
    "Every run of the first seed, with its penalty at each validation; and, fixed before any two were compared, Dice without a penalty lies between 0.5 and 0.8."
    runs = item_runs('fig1_lambda', SCALES['study'], (0,))
    found = [published_run(run) for run in runs]
    assert len(found) == 36 and all(found)
    assert all({'penalty', 'distance'} <= h.keys() for r in found if not r.config.frozen for h in r.history)
    free = {r.config.source: r.predictions()['dice'].mean() for r in found if not r.config.frozen and r.config.lam == 0}
    assert set(free) == {'nat', 'med', 'med+nat'} and all(.5 < dice < .8 for dice in free.values())
