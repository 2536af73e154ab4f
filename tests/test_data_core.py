"Cases, splits and batches against independent implementations, on disk and in memory, and on real films"
import os, random
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.vision.augment import Resize
from fastai.vision.core import PILImageBW
from PIL import Image
from scipy.stats import chisquare
from medxfer_nb.data.batches import crop_resize, endless_order, eval_loader, film_loaders, pixel_stats
from medxfer_nb.data.cases import CaseError, Cases
from medxfer_nb.data.splits import SplitError, balanced_rounding, check_disjoint, draw_subset, split_patients

LABELS = ('Edema', 'Cardiomegaly')
NIH = Path(os.environ.get('MEDXFER_NIH64', Path(__file__).parents[2]/'shared/data/nih64'))

def make_cases(n=24, size=(32,32), seed=0, name='films'):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({'patient': [f'secret-{i//2}' for i in range(n)], 'study': [str(i%2) for i in range(n)]})
    for label in LABELS: frame[label] = rng.integers(0, 2, n).astype(float)
    return Cases(name, frame, LABELS, rng.integers(0, 256, (n, *size), dtype=np.uint8))

@pytest.fixture
def cases(): return make_cases()

def on_disk(cases, folder):
    for i in range(len(cases)): Image.fromarray(cases.image(i)).save(folder/f'{i}.png')
    return Cases(cases.name, cases.frame.assign(path=[f'{i}.png' for i in range(len(cases))]), LABELS, root=folder)

# cases
@pytest.mark.parametrize('change, message', [
    (dict(patient=None), 'non-empty strings'), (dict(patient=' '), 'non-empty strings'), (dict(study=np.nan), 'non-empty strings'),
    (dict(Edema=.5), 'out of range'), (dict(Edema=np.inf), 'out of range'), (dict(Edema='1'), 'astype'), (dict(Edema=1), 'astype')])
def test_bad_tables_are_refused(cases, change, message):
    with pytest.raises(CaseError, match=message): Cases('x', cases.frame.assign(**change), LABELS, cases.pixels)

def test_identifiers_are_not_shown(cases):
    assert 'secret' not in repr(cases) + cases._repr_html_() + cases.fingerprint()

def test_one_wrong_row_is_named_by_number(cases):
    bad = cases.frame.copy(); bad.loc[7, 'Edema'] = 3.
    with pytest.raises(CaseError, match=r'1 row \(first: 7\)'): Cases('x', bad, LABELS, cases.pixels)

def test_targets_are_a_copy(cases):
    cases.targets[:] = 9
    assert cases.targets.max() <= 1

def test_files_and_array_are_the_same_films(cases, tmp_path):
    files = on_disk(cases, tmp_path)
    for i in (0, 5, 23): np.testing.assert_array_equal(files.image(i), cases.image(i))
    before = files.fingerprint()
    (tmp_path/'3.png').write_bytes((tmp_path/'3.png').read_bytes() + b'x')
    assert files.fingerprint() != before

@pytest.mark.parametrize('image, message', [(np.zeros((4,4,3)), 'not \\(H,W\\)'), (np.full((4,4), 2.), 'outside'), (np.full((4,4), np.nan), 'outside'), (np.zeros((4,4), int), 'outside')])
def test_what_a_reader_returns_is_checked(cases, tmp_path, image, message):
    files = Cases('x', cases.frame.assign(path='a.png'), LABELS, root=tmp_path, read=lambda path: image)
    with pytest.raises(CaseError, match=message): files.image(0)

def test_sixteen_bit_files_are_not_squeezed_in_silence(cases, tmp_path):
    Image.fromarray(np.full((4,4), 40_000, dtype=np.uint16)).save(tmp_path/'deep.png')
    with pytest.raises(CaseError, match='deep.png'): Cases('x', cases.frame.assign(path='deep.png'), LABELS, root=tmp_path).image(0)

# splits
@pytest.mark.parametrize('seed', range(20))
def test_each_row_once_and_no_patient_twice(seed):
    patients = np.random.default_rng(seed).integers(0, 50, 300)
    parts = split_patients(patients, {'train': .6, 'valid': .2, 'test': .2}, seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(300))
    check_disjoint({k: patients[v] for k,v in parts.items()})

def test_split_shares_and_seeds():
    patients = np.arange(1000)
    a,b = (split_patients(patients, {'train': .7, 'test': .3}, seed) for seed in (0, 1))
    assert len(a['train']) == len(b['train']) == 700 and set(a['train']) != set(b['train'])
    np.testing.assert_array_equal(a['test'], split_patients(patients, {'train': .7, 'test': .3}, 0)['test'])

def test_overlap_is_reported_without_names(cases):
    with pytest.raises(SplitError) as e: check_disjoint({'train': cases.subset(range(10)), 'test': cases.subset(range(9, 24))})
    assert "1 patient is both in 'train' (first rows 8, 9)" in str(e.value) and 'secret' not in str(e.value)

@pytest.mark.parametrize('fractions', [{}, {'a': .5}, {'a': 1.2, 'b': -.2}, {'a': np.nan}])
def test_bad_fractions(fractions):
    with pytest.raises(SplitError): split_patients(range(100), fractions, 0)

def correlated_targets(n=5000):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(n,5)) + rng.normal(size=(n,1))
    t = (x > np.quantile(x, [.85,.88,.93,.76,.6], axis=0).diagonal()).astype(float)
    t[rng.random(t.shape) < .08] = -1
    t[rng.random(t.shape) < .05] = np.nan
    return t

def value_counts(t): return np.stack([(t == v).sum(0) for v in (1,0,-1)] + [np.isnan(t).sum(0)])

@pytest.mark.parametrize('n', [50, 224, 1000])
def test_proportions_are_kept_far_better_than_at_random(n):
    t = correlated_targets()
    off = lambda rows: np.abs(value_counts(t[rows]) - n/len(t)*value_counts(t)).max()
    ours = [off(draw_subset(t, n, draw=d, min_per_class=0)) for d in range(20)]
    rng = np.random.default_rng(0)
    assert max(ours) <= 3 and np.mean(ours) < np.mean([off(rng.choice(len(t), n, replace=False)) for _ in range(20)]) / 2

def test_every_case_is_equally_likely():
    t = correlated_targets(120)
    drawn = np.bincount(np.concatenate([draw_subset(t, 30, draw=d, min_per_class=0) for d in range(800)]), minlength=120)
    assert drawn.sum() == 30*800 and chisquare(drawn).pvalue > 1e-3

def test_rounding_keeps_what_can_be_kept():
    rng = np.random.default_rng(0)
    for _ in range(50):
        pi, a = rng.random(60), np.stack([np.ones(60), *rng.integers(0, 2, (4,60))])
        pi *= 20/pi.sum()
        got = balanced_rounding(pi, a, rng)
        assert set(got) <= {0,1} and got.sum() == 20 and np.abs(a @ got - a @ pi).max() < 4

def test_min_per_class_holds_or_is_refused():
    t = correlated_targets()
    chosen = t[draw_subset(t, 100, min_per_class=5)]
    assert (chosen == 1).sum(0).min() >= 5 and (chosen == 0).sum(0).min() >= 5
    with pytest.raises(SplitError, match='take at least'): draw_subset(t, 30)
    t[:,0] = 0
    with pytest.raises(SplitError, match='leave the label out'): draw_subset(t, 100)
    for n in (0, 1.5, -3, 6000, 1e-9, float('nan')):
        with pytest.raises(SplitError, match='cannot draw'): draw_subset(t, n)

# batches
def test_middle_crop_is_fastais():
    image = make_cases(1, (90,70)).image(0)
    theirs = Resize(48)(PILImageBW.create(image), split_idx=1)
    np.testing.assert_array_equal(crop_resize(image, 48), np.asarray(theirs))

def test_crop_positions():
    image = np.arange(60, dtype=np.uint8).reshape(10, 6)
    np.testing.assert_array_equal(crop_resize(image, 6, 0), image[:6])
    np.testing.assert_array_equal(crop_resize(image.T, 6, 1), image.T[:,4:])

def test_stream_is_permutations_end_to_end():
    whole = endless_order(7, 0, 70, seed=4)
    assert all(sorted(whole[i:i+7]) == list(range(7)) for i in range(0, 70, 7))
    np.testing.assert_array_equal(endless_order(7, 13, 31, seed=4), whole[13:44])
    assert not np.array_equal(whole, endless_order(7, 0, 70, seed=5))

def batches(dl): return [x for x,y in dl]
def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x,y in zip(a, b))

def test_files_workers_and_memory_give_the_same_batches(tmp_path):
    cases = make_cases(size=(40,32))
    files = on_disk(cases, tmp_path)
    kw = dict(size=24, bs=8, steps_per_epoch=4, device='cpu')
    want = batches(film_loaders(cases, cases, **kw).train)
    assert same(want, batches(film_loaders(files, files, **kw).train))
    assert same(want, batches(film_loaders(files, files, workers=2, **kw).train))

def test_resume_and_broken_epochs(cases):
    fresh = lambda seed=0: film_loaders(cases, cases, 32, bs=8, steps_per_epoch=3, seed=seed, device='cpu').train
    dl = fresh()
    epochs = [batches(dl) for _ in range(3)]
    resumed = fresh(); resumed.epoch = 2
    assert same(batches(resumed), epochs[2]) and not same(epochs[0], epochs[1])
    broken = fresh(); broken.one_batch(); next(iter(broken))
    assert same(batches(broken), epochs[0])
    assert not same(batches(fresh(seed=1)), epochs[0])

def test_batches_and_global_generators_leave_each_other_alone(cases):
    fresh = lambda: film_loaders(cases, cases, 32, bs=8, steps_per_epoch=2, device='cpu').train
    want, noisy = batches(fresh()), []
    for x,y in fresh(): noisy.append(x); torch.rand(3), np.random.rand(3), random.random()
    assert same(want, noisy)
    states = [(torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()) for _ in fresh()]
    assert states[0] == states[1]

def test_probability_of_augmentation(cases):
    one = make_cases(1)
    x = torch.cat(batches(film_loaders(one, one, 32, bs=500, steps_per_epoch=4, device='cpu').train))
    still = ((x - batches(eval_loader(one, 32, device='cpu'))[0]).abs().amax((1,2,3)) < 1e-3).float().mean()
    assert abs(still - .25**2) < .02

def test_evaluation_is_in_order_and_untouched(cases):
    dl = eval_loader(cases, 32, stats=(.5,.25), bs=7, device='cpu')
    x,y = (torch.cat(o) for o in zip(*dl))
    np.testing.assert_allclose(x[:,0], (cases.pixels/255 - .5)/.25, atol=1e-5)
    np.testing.assert_array_equal(y, cases.targets)
    assert len(dl) == 4 and same(batches(dl), batches(dl))

def test_train_loader_read_in_order_is_not_augmented(cases):
    dls = film_loaders(cases, cases, 32, bs=8, device='cpu')
    plain = dls.train.new(shuffle=False, drop_last=False)
    assert torch.equal(torch.cat(batches(plain)), torch.cat(batches(dls.valid)))

def test_every_film_is_seen_in_a_pass(cases):
    dls = film_loaders(cases, cases, 32, bs=24, augment=False, device='cpu')
    brightness = lambda dl: sorted(batches(dl)[0].sum((1,2,3)).tolist())
    assert len(dls.train) == 1 and brightness(dls.train) == pytest.approx(brightness(dls.valid))

@pytest.mark.parametrize('kw, message', [(dict(bs=0), 'batch size'), (dict(steps_per_epoch=0), 'steps_per_epoch'), (dict(size=0), 'size')])
def test_bad_arguments(cases, kw, message):
    with pytest.raises(CaseError, match=message): film_loaders(cases, cases, **{'size': 32, **kw})

def test_labels_must_agree(cases):
    other = Cases('x', cases.frame, LABELS[::-1], cases.pixels)
    with pytest.raises(CaseError, match='labels differ'): film_loaders(cases, other, 32)

def test_a_learner_trains_on_them(cases):
    class Count(Callback):
        steps = 0
        def after_batch(self): self.steps += self.training
    masked = cases.frame.copy(); masked.loc[::3,'Edema'] = np.nan
    cases = Cases('masked', masked, LABELS, cases.pixels)
    def loss(pred, y): return torch.nn.functional.binary_cross_entropy_with_logits(pred[~y.isnan()], y[~y.isnan()])
    dls = film_loaders(cases, cases, 32, bs=8, steps_per_epoch=5, device='cpu')
    learn = Learner(dls, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 2)), loss_func=loss, cbs=[count := Count()])
    with learn.no_logging(): learn.fit(3, 1e-3)
    assert count.steps == 15 and np.isfinite(learn.recorder.values).all() and dls.train.epoch == 3
    for dl in (eval_loader(cases, 32, bs=7, device='cpu'), dls.train.new(shuffle=False)):
        np.testing.assert_array_equal(learn.get_preds(dl=dl)[1], cases.targets)

@pytest.mark.skipif(not NIH.exists(), reason='real films not at hand')
def test_real_films():
    table = pd.read_csv(NIH/'Data_Entry_2017_v2020.csv')
    frame = pd.DataFrame({'patient': table['Patient ID'].astype(str), 'study': table['Follow-up #'].astype(str), 'path': 'images/' + table['Image Index'],
                          'Edema': table['Finding Labels'].str.contains('Edema').astype(float)})
    nih = Cases('ChestX-ray14, 64 px', frame, ('Edema',), root=NIH)
    assert len(nih) == 1000 and nih.patient_codes.max() + 1 == 264
    stack = np.stack([nih.image(i) for i in range(1000)])
    mean,std = pixel_stats(nih)
    assert (mean, std) == pytest.approx((stack.mean()/255, stack.std()/255), abs=1e-6)
    parts = split_patients(nih.patient_codes, {'train': .8, 'test': .2}, 0)
    dls = film_loaders(nih.subset(parts['train']), nih.subset(parts['test']), 64, (mean,std), bs=16, steps_per_epoch=2, device='cpu')
    assert [tuple(x.shape) for x,_ in dls.train] == [(16,1,64,64)]*2
