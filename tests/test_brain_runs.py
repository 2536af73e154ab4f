"""What a run of the T-IMM paper promises: what starts share, what a source hands on, both protocols, resuming, the path on real layouts."""
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from medxfer_nb.data.subjects import write_brats_folder, write_hcp_folder
from medxfer_nb.models.unet3d import is_shared, shared_parameters
from medxfer_nb.repro import brains
from medxfer_nb.repro.brain_results import Gathered, forgetting_slices, from_leaderboard, patients_frame, plot_forgetting, source_table, submission_folder, submit
from medxfer_nb.repro.brain_scales import ALL_HCP, ITEMS, SCALES, item_runs, make_run
from medxfer_nb.repro.jobs import Context, load_or_run, perform, plan
from medxfer_nb.repro.store import ConfigError, Store

pytestmark = pytest.mark.filterwarnings('ignore')


def smoke(start, portion='8%', **changes): return make_run(SCALES['smoke'], start, portion, **changes)

def trained(store, *runs, **options): return load_or_run(runs, store, progress=None, strict=True, **options)


@pytest.fixture(scope='module')
def store(tmp_path_factory): return Store(tmp_path_factory.mktemp('store'))


@pytest.fixture(scope='module')
def sources(store): return trained(store, *brains.parents(smoke('imm')))


def test_all_starts_of_a_seed_share_all_but_P(store, sources):
    data = brains.read_sets(smoke('none'))
    begun = {}
    for start in ('none', 'm1', 'imm'):
        run = smoke(start)
        net = brains.begin(run, data.train)
        if start != 'none': brains.load_shared(net, brains.start_P(run, net, sources[:1] if start == 'm1' else sources))
        begun[start] = net.state_dict()
    P = {k for k in shared_parameters(net, is_shared) if not k.startswith('encoder.0.conv_in')}
    for name, p in begun['none'].items():
        for start in ('m1', 'imm'): assert torch.equal(p, begun[start][name]) == (name not in P), (start, name)
    other = brains.begin(smoke('none', seed=1), data.train).state_dict()
    assert all(not torch.equal(p, other[k]) for k, p in begun['none'].items() if k.endswith('weight') and 'norm' not in k)


def test_imm_starts_from_Eq_2(store, sources):
    run, (a, b) = smoke('imm'), sources
    P = brains.start_P(run, brains.begin(run, brains.read_sets(run).train), sources)
    for name, merged in P.items():
        F, G = (brains.fisher_of(s)[name].double() for s in (a, b))
        t, u = (brains.weights_of(s)[name].double() for s in (a, b))
        by_hand = torch.where(F + G > 0, (F*t + G*u)/(F + G).clamp(min=1e-300), (t + u)/2)
        assert torch.allclose(merged.double(), by_hand, rtol=1e-4, atol=1e-6), name


def test_fisher_of_an_adapted_first_convolution_keeps_its_size(sources):
    run, kernel = smoke('imm', first_conv='adapt'), 'encoder.0.conv_in.conv.weight'
    net = brains.begin(run, brains.read_sets(run).train)
    theta, F = brains.weights_of(sources[0]), brains.fisher_of(sources[0])
    assert torch.allclose(brains.carried(net, theta, run)[kernel], theta[kernel].mean(1, keepdim=True).expand(-1, 4, -1, -1, -1)/2)
    assert torch.allclose(brains.carried(net, F, run, fisher=True)[kernel], F[kernel].mean(1, keepdim=True).expand(-1, 4, -1, -1, -1))


def test_m2_starts_as_m1(tmp_path, store, sources, monkeypatch):
    class Begun(Exception): pass
    def fit(learn, *args, **options): raise Begun(learn.model)
    monkeypatch.setattr(brains, 'fit_until', fit)
    first, run = sources[0], sources[1].config
    with pytest.raises(Begun) as begun: brains.train(run, Context((first,), tmp_path, store, None, run.seed, print))
    net, = begun.value.args
    source, P = brains.weights_of(first), set(shared_parameters(net, is_shared))
    for name, p in net.state_dict().items(): assert torch.equal(p, source[name])  # S too (Section 4.3)
    assert P == set(brains.fisher_of(first)) and len(P) == 54


def test_fisher_of_a_source_is_the_mean_of_squared_gradients(sources):
    source = sources[0]
    net, data = brains.trained_net(source), brains.read_sets(source.config).train
    name = 'decoder.0.up.conv.weight'
    total = 0.
    for x, y in brains.brain_eval_loader(data, source.config.regions, bs=1, device='cpu'):
        net.zero_grad()
        logits = net(x)
        (-torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction='sum')).backward()
        total = total + dict(net.named_parameters())[name].grad.double()**2
    found = brains.fisher_of(source)[name]
    assert torch.allclose(found.double(), total/len(data), rtol=2e-3, atol=1e-5*float(total.max()))


@pytest.mark.parametrize('start', ['none', 'timm'])
def test_matched_means_the_same_number_of_steps(store, start):
    run = smoke(start, protocol='matched')
    record, = trained(store, run)
    steps = {p: record.metrics.get(f'{p}_steps', 0) for p in ('adaption', 'fine_tuning')}
    assert sum(steps.values()) == run.steps == record.history[-1]['iteration'] and bool(steps['adaption']) == (start == 'timm')
    assert record.metrics['fine_tuning_epochs'] == steps['fine_tuning']*run.batch/len(brains.read_sets(run).train)


def test_same_seed_same_result_and_an_interrupted_run_goes_on(tmp_path, store, sources):
    run = smoke('timm', steps=8)
    whole, = trained(store, run)
    class Stop(BaseException): pass  # As a keyboard interrupt: fastai wraps exceptions
    job, = plan([run], store).wanted
    def progress(fraction, note=''):
        if progress.calls == 7: raise Stop
        progress.calls += 1
    progress.calls = 0
    again = Store(tmp_path/'store')
    shutil.copytree(store.root/'runs', again.root/'runs', ignore=shutil.ignore_patterns(job.key), dirs_exist_ok=True)
    with pytest.raises(Stop): perform(job, again, progress=progress)
    assert list(again.folder('staging', job.key).glob('stage.pth*'))
    record = perform(job, again)
    assert record.metrics == whole.metrics and [h['iteration'] for h in record.history] == [2, 4, 6, 8, 10]
    assert all(np.array_equal(v, record.predictions()[k]) for k, v in whole.predictions().items())
    assert all(torch.equal(v, record.weights()[k]) for k, v in whole.weights().items())


def test_what_is_remembered_can_be_drawn_from_the_store(store, sources):
    runs = trained(store, smoke('timm'), smoke('imm'))
    g = Gathered('fig3_forgetting', SCALES['smoke'], runs, [])
    image, labels = forgetting_slices(g, store=str(store.root))
    assert list(labels) == ['Model 2', 'IMM', 'T-IMM', 'truth'] and all(v.shape == image.shape == (20, 20) and v.max() <= 14 for v in labels.values())
    assert len(np.unique(labels['truth'])) > 5 and len(plot_forgetting(image, labels).axes) == 4
    imm, timm = (r.predictions() for r in (runs[1], runs[0]))
    assert np.allclose(imm['remembers_m1_m1'], sources[0].predictions()['dice']) and np.allclose(imm['remembers_m2_m2'], sources[1].predictions()['dice'])
    assert {k for k in timm if k.startswith('remembers')} == {'remembers_timm_m1', 'remembers_timm_m2'}
    assert list(source_table(g, str(store.root)).index) == ['Model 1', 'Model 2']


def test_source_networks_do_not_depend_on_the_target():
    run = smoke('timm')
    others = [replace(run, **c) for c in (dict(seed=5), dict(protocol='matched', adapt_steps=2), dict(granularity='channel'), dict(fisher_scale='tensor'), dict(ratio_lr=.3), dict(portion='4%'),
                                          dict(portion='100%', n_online=2), dict(first_conv='adapt'))]
    assert all(brains.parents(o) == brains.parents(run) for o in others)
    for c in (dict(likelihood='soft_dice'), dict(augment=False)): assert brains.parents(replace(run, **c)) != brains.parents(run)
    assert {p.seed for p in brains.parents(run)} == {brains.SOURCE_SEED}


def test_augmentation_can_be_left_out():
    run = smoke('none')
    data = brains.read_sets(run)
    assert [brains.learner(r, brains.begin(r, data.train), data).dls.train.augment for r in (run, replace(run, augment=False))] == [True, False]
    assert not any(p.augment for p in brains.parents(smoke('imm', augment=False)))


def test_what_is_not_transferred_is_told_and_recorded(tmp_path, store, sources):
    told, run = [], smoke('m1')
    result = brains.train(run, Context(tuple(sources[:1]), tmp_path, store, None, run.seed, lambda fraction, note='': told.append(note)))
    assert result.metrics['left_out'] == 'encoder.0.conv_in.conv' and 'not transferred: encoder.0.conv_in.conv' in told
    assert 'left_out' not in trained(store, smoke('none'))[0].metrics


def test_one_half_counts_as_found(monkeypatch):
    run = smoke('none')
    test = brains.read_sets(run).test.subset([0])
    monkeypatch.setattr(brains, 'predict_volume', lambda net, image, window: torch.full((3, *image.shape[1:]), .5))
    found = brains.score(None, test, run.regions)
    assert found['predicted_ml_ET'] == pytest.approx(np.prod(test.shape)*np.prod(test.spacing)/1000)


@pytest.mark.parametrize('changes, left_out, tensors', [(dict(first_conv='adapt'), 'nothing', 54), (dict(norms='shared'), 'encoder.0.conv_in.conv', 106), (dict(granularity='channel'), 'encoder.0.conv_in.conv', 52)])
def test_options_of_what_is_transferred(tmp_path, changes, left_out, tensors):
    record, = trained(Store(tmp_path), smoke('timm', **changes))
    assert record.metrics['left_out'] == left_out and len(brains.adapted_of(record)) == tensors and np.isfinite(record.predictions()['dice']).all()
    assert all(np.allclose(v.sum(0), 1, atol=1e-5) for k, v in record.predictions().items() if k.startswith('ratio'))
    assert any(v.ndim == 2 for k, v in record.predictions().items() if k.startswith('ratio')) == ('granularity' in changes)


def test_table_1():
    paper = SCALES['study']
    def counts(start, portion):
        pools = brains.virtual_pools(make_run(paper, start, portion))
        return {name: (split, n) for name, (_, split, n, _) in pools.items()}
    assert counts('none', '4%') == counts('none', '8%') == dict(train=('train', 20), test=('test', 40))
    assert counts('none', '100%') == dict(train=('train', 215), valid=('test', 40), test=('online', 66))
    m1, m2 = brains.parents(make_run(paper, 'imm', '8%'))
    assert [n for *_, n, _ in brains.virtual_pools(m1).values()] == [23, 12] and set(brains.virtual_pools(m2)) == {'task 2', 'test'}
    every, = brains.parents(make_run(paper, 'all 1:7', '8%'))
    assert set(brains.virtual_pools(every)) == {'task 1', 'task 2', 'test'} and len(every.regions) == 7


def test_small_portions_are_nested_and_disjoint_from_what_tests_them():
    sets = {p: brains.read_sets(smoke('none', p, total=51)) for p in ('4%', '8%')}
    def hashes(b): return {b.subset([i]).images.tobytes() for i in range(len(b))}
    small, large = sets['4%'], sets['8%']
    assert [len(small.train), len(small.valid), len(large.train), len(large.valid)] == [1, 1, 3, 1]
    assert hashes(small.train) < hashes(large.train) and hashes(small.valid) <= hashes(large.valid)
    assert not hashes(large.train) & hashes(large.valid) and not (hashes(large.train) | hashes(large.valid)) & hashes(large.test)


@pytest.mark.parametrize('changes, words', [
    (dict(start='none'), 'adapt_steps'), (dict(adapt_steps=0), 'adapt_steps'), (dict(portion=''), 'portion'), (dict(steps=3), 'multiple'), (dict(size=16), '17'), (dict(patch=8), '17'),
    (dict(source_steps=0), 'source_steps'), (dict(portion='100%', n_online=0), 'n_online'), (dict(dataset='virtual-hcp', start='m1'), 'portion'),
    (dict(dataset='hcp', portion='', adapt_steps=0), 'source network'), (dict(protocol='matched', steps=2), 'include the adaption'), (dict(lr=0.), 'positive'), (dict(total=0), 'total'), (dict(seed=brains.SOURCE_SEED), 'source networks')])
def test_wrong_configurations_say_what_to_change(changes, words):
    with pytest.raises(ConfigError, match=words): replace(smoke('timm'), **changes)


def test_presets_and_items():
    paper = SCALES['paper']
    runs = item_runs('tab2_transfer', paper, (0,))
    assert len(runs) == 2*18 and {r.start for r in runs if r.portion == '8%'} >= set(ALL_HCP)
    assert {(r.base, r.batch, r.lr, r.patience, r.halve_after, r.size, r.patch, r.norms, r.granularity, r.fisher_scale) for r in runs} == {(16, 1, 5e-4, 50, 10, 0, 0, 'own', 'layer', 'printed')}
    for scale in SCALES.values():
        for item in ITEMS: assert set(item_runs(item, scale)) <= set(item_runs('tab2_transfer', scale))
    with pytest.raises(ValueError, match='--data-root'): brains.data_hash(runs[0], None)


@pytest.fixture(scope='module')
def data_root(tmp_path_factory):
    "Three BraTS patients, one of the leaderboard, five subjects like those of the HCP"
    root = tmp_path_factory.mktemp('brains')
    write_brats_folder(root/brains.FOLDERS['brats'], 3, 24)
    write_brats_folder(root/brains.ONLINE, 1, 24, 'online', labelled=False)
    write_hcp_folder(root/brains.FOLDERS['hcp'], 5, 24)
    return root


def test_real_layouts_train_submit_and_read_scores_back(tmp_path, data_root, monkeypatch):
    pytest.importorskip('SimpleITK')
    monkeypatch.setenv('MEDXFER_CACHE', str(tmp_path/'cache'))
    store, changes = Store(tmp_path/'store'), dict(dataset='brats', size=0, total=3, hcp=5, batch=1)
    small, full = smoke('imm', **changes), smoke('none', '100%', **{k: v for k, v in changes.items() if k != 'hcp'} | dict(n_online=1))
    imm, none = trained(store, small, full, data_root=data_root)
    assert imm.predictions()['dice'].shape == (1,) and {'remembers_imm_m1', 'remembers_m2_m2'} <= set(imm.predictions())
    assert (imm.metrics['cases_there'], imm.metrics['cases_chosen'], imm.metrics['cases_left_out'], imm.metrics['choice_seed']) == (3, 3, '', 0)
    assert none.predictions() == {} and 'mean_dice' not in none.metrics and from_leaderboard(full, data_root) == {}
    g = Gathered('tab2_transfer', SCALES['paper'], [imm, none], [], data_root)
    written, = submit(g)
    case, = brains.online_cases(full, data_root)
    image = nib.load(case.files[0])
    assert nib.load(written).shape == image.shape and np.allclose(nib.load(written).affine, image.affine) and written.parent == submission_folder(full, data_root)
    assert set(np.unique(nib.load(written).get_fdata())) <= {0, 1, 2, 4}
    (written.parent/'scores.csv').write_text(f'Label,Dice_ET,Dice_WT,Dice_TC\n{case.subject},0.5,0.7,0.6\nMean,0.5,0.7,0.6\n')
    table = patients_frame([imm, none], data_root).query("portion == '100%'")
    assert table.dice.item() == pytest.approx(.6) and table.dice_ET.item() == .5


def test_shrunk_sets_share_their_voxels(tmp_path, data_root, monkeypatch):
    pytest.importorskip('SimpleITK')
    monkeypatch.setenv('MEDXFER_CACHE', str(tmp_path/'cache'))
    sets = brains.read_sets(smoke('none', '100%', dataset='brats', size=20, total=3, n_online=1), data_root)
    assert sets.test.box == sets.train.box and sets.test.spacing == sets.train.spacing and sets.test.shape == (20, 20, 20)


def test_the_online_set_is_large_enough_and_of_other_patients(tmp_path, data_root):
    run = smoke('none', '100%', dataset='brats', size=0, total=3, n_online=2)
    with pytest.raises(ConfigError, match='Validation holds 1 cases, but this scale wants 2'): brains.online_cases(run, data_root)
    write_brats_folder(tmp_path/brains.FOLDERS['brats'], 4, 24)
    write_brats_folder(tmp_path/brains.ONLINE, 2, 24, labelled=False)
    with pytest.raises(ConfigError, match='2 patients are in .*Validation') as e: brains.online_cases(run, tmp_path)
    assert 'train00' not in str(e.value)
    left = brains.chosen_cases(run, tmp_path)  # The seeded choice of 3 of 4
    kept = {i + 1 for i in brains.split_brats(brains.real_cases('brats', tmp_path), 3, brains.SPLIT_SEED)['chosen']}
    assert (left['cases_there'], left['cases_chosen']) == (4, 3) and {1, 2, 3, 4} - kept == {int(left['cases_left_out'])}
    assert brains.chosen_cases(smoke('none'), None) == {}


def test_what_is_missing_is_said(tmp_path, data_root):
    few = smoke('none', dataset='brats', size=0, total=20, batch=1)
    with pytest.raises(ValueError, match='20 patients'): brains.read_sets(few, data_root)
    source, = brains.parents(smoke('m1', dataset='brats', size=0, hcp=9))
    with pytest.raises(ConfigError, match='holds 5 subjects'): brains.read_sets(source, data_root)
    with pytest.raises(ValueError, match='no such folder'): brains.read_sets(few, tmp_path)
