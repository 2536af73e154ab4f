"Slices of CT volumes: pre-processing against PIL and closed forms, the cache under faults, the loaders inside fastai"
import threading
from dataclasses import replace

import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.torch_core import TensorImageBW
from PIL import Image

from medxfer_nb.data.ct import CLASSES, CTCase, CTError, Grid, Volume
from medxfer_nb.data.slices import (SliceLoader, Slices, SliceSet, make_slices, resize_slices, slice_eval_loader, slice_loaders,
                                    window_to_unit)

def volume(seed, depth=6, shape=(20, 24)):
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1100, 400, (depth, *shape)).astype('float32')
    mask = np.zeros(hu.shape, 'uint8')
    mask[1:-1, 5:15, 6:16] = 1
    mask[2:4, 8:11, 8:12] = 2
    return Volume(hu, mask, Grid.plain(hu.shape, (5, .8, .7)))

def cases(n=4, **kwargs): return [CTCase(f'case {i}', f'Doe-{i//2}', lambda i=i: volume(i, 6 + i, **kwargs), key=f'{i} {kwargs}') for i in range(n)]

def slices(n=12, size=16, v=3):
    rng = np.random.default_rng(0)
    at = np.arange(n) * v // n
    return Slices(rng.random((n, size, size)).astype('float16'), rng.integers(0, 3, (n, size, size)).astype('uint8'), at, np.arange(n),
                  np.array([0, 1, 0])[:v], np.full((v, 3), size), np.ones((v, 3)))

def make(c, size=16, cache=None, **kwargs): return make_slices(c, size, cache, progress=kwargs.pop('progress', lambda _: None), **kwargs)

def refuses(call, *words):
    with pytest.raises(CTError) as e: call()
    for w in words: assert str(w) in str(e.value), e.value


# ---- pre-processing

def test_window():
    hu = np.linspace(-3000, 3000, 1001)
    unit = window_to_unit(hu)
    np.testing.assert_allclose(unit, np.clip((hu + 1000) / 1000, 0, 1), atol=1e-6)
    assert unit.dtype == np.float32 and unit.min() == 0 and unit.max() == 1
    np.testing.assert_allclose(window_to_unit(hu.astype('int16'), -1250, 250), np.clip((hu.astype('int16') + 1250) / 1500, 0, 1), atol=1e-6)
    refuses(lambda: window_to_unit(hu, 0, -1000), 'from low to high')

@pytest.mark.parametrize('shape', [(20, 24), (24, 24), (31, 17)])
@pytest.mark.parametrize('size', [7, 16, 24, 53])
def test_resize(shape, size):
    image = np.random.default_rng(0).random((3, *shape), dtype='float32')
    pil = [np.array(Image.fromarray(a).resize((size, size), Image.Resampling.BILINEAR)) for a in image]
    np.testing.assert_allclose(resize_slices(image, size), pil, atol=1e-5)
    mask = np.random.default_rng(0).integers(0, 200, (3, *shape)).astype('uint8')
    out = resize_slices(mask, size, 'nearest')
    rows, cols = (np.floor((np.arange(size) + .5) * n / size).astype(int) for n in shape)
    assert out.dtype == np.uint8 and np.array_equal(out, mask[:, rows][:, :, cols])
    assert not np.shares_memory(out, mask)

def test_resize_errors():
    refuses(lambda: resize_slices(np.zeros((3, 4, 4)), 8, 'cubic'), "not 'cubic'")
    refuses(lambda: resize_slices(np.zeros((4, 4)), 8), '(4, 4)')
    refuses(lambda: resize_slices(np.zeros((3, 4, 4)), 0), 'size 0')


# ---- Slices

def test_slices_tables_and_subsets():
    s = slices()
    assert (len(s), s.size, s.n_classes, s.class_names) == (12, 16, 3, CLASSES)
    assert s.patient_codes.tolist() == [0]*4 + [1]*4 + [0]*4
    assert np.array_equal(s.class_counts(), [(s.masks == c).sum() for c in range(3)]) and s.class_counts().dtype == np.int64
    part = s.subset(s.patient_codes == 0)
    assert np.array_equal(part.pixels, s.pixels[[0, 1, 2, 3, 8, 9, 10, 11]]) and np.array_equal(part.patients, s.patients) and set(part.volume) == {0, 2}
    assert np.array_equal(s.subset([5, 2, -1]).z, [5, 2, 11]) and np.array_equal(s.subset(slice(2, 9, 3)).z, [2, 5, 8])
    assert np.shares_memory(s.subset(range(3, 7)).pixels, s.pixels) and not np.shares_memory(s.subset([3, 5]).pixels, s.pixels)
    for nothing in ([], np.zeros(12, bool), np.array([], int), slice(3, 3)):
        empty = s.subset(nothing)
        assert len(empty) == 0 and empty.class_counts().tolist() == [0, 0, 0]
    assert s.subset([1], 'one').name == 'one' and 'Doe' not in repr(s)

def test_slices_fingerprint():
    s = slices()
    same = replace(s, patients=s.patients + 7, name='other')
    assert s.fingerprint() == same.fingerprint()
    changed = [replace(s, pixels=s.pixels[::-1]), replace(s, masks=s.masks[::-1]), replace(s, z=s.z + 1), replace(s, volume=s.volume[::-1]),
               replace(s, patients=np.array([0, 1, 2])), replace(s, shapes=s.shapes + 1), replace(s, spacings=s.spacings * 2), replace(s, class_names=('a', 'b', 'c'))]
    assert len({s.fingerprint(), *(c.fingerprint() for c in changed)}) == 9

def test_slices_that_contradict_themselves():
    s = slices()
    refuses(lambda: replace(s, pixels=s.pixels.astype('float32')), '(N,S,S) float16')
    refuses(lambda: replace(s, pixels=s.pixels[:, :8]), '(N,S,S) float16')
    refuses(lambda: replace(s, masks=s.masks.astype('int64')), 'uint8 like the pixels')
    refuses(lambda: replace(s, masks=s.masks[1:]), 'uint8 like the pixels')
    refuses(lambda: replace(s, masks=s.masks + 1), 'label 3', '3 classes')
    refuses(lambda: replace(s, volume=s.volume + 1), '0..2')
    refuses(lambda: replace(s, z=s.z[1:], shapes=s.shapes[1:]), 'wrong length of z, shapes')


# ---- the cache

@pytest.mark.parametrize('size', [16, 15, 40])
def test_make_slices(tmp_path, size):
    c = cases()
    s = make(c, size, tmp_path)
    volumes = [x.load() for x in c]
    np.testing.assert_array_equal(s.pixels, np.concatenate([resize_slices(window_to_unit(v.image), size) for v in volumes]).astype('float16'))
    np.testing.assert_array_equal(s.masks, np.concatenate([resize_slices(v.mask, size, 'nearest') for v in volumes]))
    assert s.patients.tolist() == [0, 0, 1, 1] and s.shapes.tolist() == [[6 + i, 20, 24] for i in range(4)]
    np.testing.assert_allclose(s.spacings, [[5, .8, .7]] * 4)
    assert np.array_equal(s.volume, np.repeat(range(4), [6, 7, 8, 9])) and np.array_equal(s.z, np.concatenate([np.arange(6 + i) for i in range(4)]))
    assert isinstance(s.pixels.base, np.memmap) or isinstance(s.pixels, np.memmap)
    x, y = next(iter(slice_eval_loader(s, 4, device='cpu')))
    assert np.array_equal(x[:, 0].numpy(), s.pixels[:4].astype('float32')) and np.array_equal(y.numpy(), s.masks[:4])
    assert not any('Doe' in p.name or b'Doe' in p.read_bytes() for p in tmp_path.iterdir())

def test_cache_is_used_and_keyed(tmp_path):
    said = []
    make(cases(), 16, tmp_path, progress=said.append)
    make(cases(), 16, tmp_path, progress=said.append)
    assert len(said) == 1
    other = cases()
    other[1] = replace(other[1], key='another')
    for change in (dict(c=other), dict(size=18), dict(keep='labelled'), dict(window=(-1000, 400)), dict(window=(-900, 0)), dict(class_names=(*CLASSES, 'more')), dict(c=cases()[::-1])):
        make(**{**dict(c=cases(), size=16, cache=tmp_path, progress=said.append), **change})
    assert len(said) == 8
    make(cases(), 16, tmp_path, window=[-1000, 0], progress=said.append) # the published one
    same = [replace(c, patient=f'other name {i//2}') for i, c in enumerate(cases())]
    assert make(same, 16, tmp_path, progress=said.append).patients.tolist() == [0, 0, 1, 1] and len(said) == 8
    assert make([replace(c, patient='one') for c in same], 16, tmp_path, progress=said.append).patients.tolist() == [0] * 4 and len(said) == 8

def test_window_of_the_slices(tmp_path):
    c = cases(1)
    wide, paper = make(c, 16, tmp_path, window=(-1250, 250)), make(c, 16, tmp_path)
    np.testing.assert_array_equal(wide.pixels, resize_slices(window_to_unit(c[0].load().image, -1250, 250), 16).astype('float16'))
    assert not np.array_equal(wide.pixels, paper.pixels) and np.array_equal(wide.masks, paper.masks) and len(list(tmp_path.glob('*.npy'))) == 2
    refuses(lambda: make(c, 16, tmp_path, window=(0, -1000)), 'from low to high')

def test_labelled_slices_only(tmp_path):
    s = make(cases(2), 16, tmp_path, keep='labelled')
    assert s.z.tolist() == [*range(1, 5), *range(1, 6)] and s.masks.any((1, 2)).all()
    empty = [CTCase('none', 'p', lambda: replace(volume(0), mask=np.zeros((6, 20, 24), 'uint8')), key='empty')]
    refuses(lambda: make(empty, 16, tmp_path, keep='labelled'), 'every mask is empty')
    assert len(make([*empty, *cases(1)], 16, tmp_path, keep='labelled')) == 4

def test_faults_leave_nothing_behind(tmp_path):
    def broken(): raise CTError('scan.nii: damaged')
    bad = [*cases(2), CTCase('bad', 'p', broken, key='bad')]
    refuses(lambda: make(bad, 16, tmp_path), 'scan.nii')
    assert {p.suffix for p in tmp_path.iterdir()} == {'.lock'}
    good = make(cases(), 16, tmp_path)
    file = next(p for p in tmp_path.glob('*.npy'))
    whole = good.fingerprint()
    del good
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-1]), lambda: file.unlink(), lambda: file.with_suffix('.json').unlink(),
                   lambda: file.with_suffix('.json').write_text('{'), lambda: file.write_bytes(b'\1' + file.read_bytes()[1:])):
        damage()
        said = []
        assert make(cases(), 16, tmp_path, progress=said.append).fingerprint() == whole and len(said) == 1

def test_two_at_once_read_once(tmp_path):
    reads = []
    def count(c): return replace(c, load=lambda: (reads.append(c.name), c.load())[1])
    threads = [threading.Thread(target=make, args=([count(c) for c in cases()], 16, tmp_path)) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(reads) == 4

def test_make_slices_errors(tmp_path):
    refuses(lambda: make([], 16, tmp_path), 'no cases')
    refuses(lambda: make(cases(), 0, tmp_path), 'positive number')
    refuses(lambda: make(cases(), 16, tmp_path, keep='lung'), "'labelled'")
    refuses(lambda: make(cases(), 16, tmp_path, class_names=('a', 'b')), 'case 0: label 2', 'class_names')
    refuses(lambda: make([CTCase('x', 'p', lambda: replace(volume(0), mask=None), key='x')], 16, tmp_path), 'x: no mask')
    refuses(lambda: make([CTCase('x', 'p', lambda: volume(0))], 16, tmp_path), 'neither files nor a key')


# ---- loaders

def test_every_slice_once_a_pass():
    s = slices(10)
    dl = SliceLoader(SliceSet(s), 4, shuffle=True, steps=5, seed=3)
    seen = torch.cat([x[:, 0] for x, _ in dl])
    assert len(seen) == 20
    order = [int((s.pixels.astype('float32') == x.numpy()).all((1, 2)).argmax()) for x in seen]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]

def test_seeded_resumable_and_workers_agree():
    s = slices()
    def epoch(e, seed=1, **kwargs):
        dl = SliceLoader(SliceSet(s), 4, shuffle=True, steps=3, augment=True, seed=seed, **kwargs)
        dl.epoch = e
        return [torch.stack([x[:, 0], y.float()]) for x, y in dl]
    first = epoch(0)
    for e, kwargs in ((0, {}), (0, dict(num_workers=2))):
        for a, b in zip(first, epoch(e, **kwargs), strict=True): assert torch.equal(a, b)
    assert not torch.equal(first[0], epoch(1)[0]) and not torch.equal(first[0], epoch(0, seed=2)[0])
    torch.manual_seed(5); np.random.seed(5)
    assert torch.equal(first[0], epoch(0)[0]) # global random states play no part

def test_image_and_mask_move_together():
    "A mask that is the image thresholded stays so, away from edges; no class is invented; no mirror image"
    yy, xx = np.mgrid[:64, :64]
    image = ((yy - 20)**2 / 2 + (xx - 40)**2 < 100).astype('float16')
    s = Slices(image[None], image[None].astype('uint8') * 2, np.array([0]), np.array([0]), np.array([0]), np.array([[1, 64, 64]]), np.ones((1, 3)))
    x, y = next(iter(slice_loaders(s, s, bs=64, device='cpu').train))
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and type(y) is torch.Tensor and isinstance(x, TensorImageBW)
    assert set(y.unique().tolist()) <= {0, 2} and x.min() >= 0 and x.max() <= 1
    x = x.as_subclass(torch.Tensor)[:, 0]
    sure = (x < .05) | (x > .95)
    assert ((x > .5) == (y == 2))[sure].float().mean() > .999
    assert (x - torch.from_numpy(image.astype('float32'))).abs().mean((1, 2)).gt(.005).float().mean() > .6 # most are moved
    centre = (y == 2).float().mean((1,)) @ torch.arange(64.) / (y == 2).float().mean((1,)).sum(1)
    assert centre.min() > 32 # what is on the right stays on the right

def test_validation_is_untouched_and_in_order():
    s = slices()
    dls = slice_loaders(s.subset(range(8)), s.subset(range(8, 12)), bs=3, steps_per_epoch=2, device='cpu')
    assert (len(dls.train), len(dls.valid), dls.c, list(dls.vocab)) == (2, 2, 3, list(CLASSES))
    x, y = (torch.cat(t) for t in zip(*dls.valid))
    assert np.array_equal(x[:, 0].numpy(), s.pixels[8:].astype('float32')) and np.array_equal(y.numpy(), s.masks[8:])
    assert np.array_equal(torch.cat([y for _, y in slice_eval_loader(s, 5, device='cpu')]).numpy(), s.masks)
    assert len(next(iter(slice_loaders(s, s, bs=40, device='cpu').train))[1]) == 40 # more than there are

def test_in_a_learner():
    class Net(torch.nn.Module):
        def __init__(self): super().__init__(); self.c = torch.nn.Conv2d(1, 3, 3, padding=1)
        def forward(self, x): return self.c(x.as_subclass(torch.Tensor))
    s = slices()
    dls = slice_loaders(s, s, bs=4, steps_per_epoch=3, device='cpu')
    learn = Learner(dls, Net(), loss_func=F.cross_entropy)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(2)
    assert dls.train.epoch == 2 and np.isfinite(learn.recorder.values[-1]).all()
    probs, targs = learn.get_preds(dl=slice_eval_loader(s, device='cpu'))
    assert probs.shape == (12, 3, 16, 16) and np.array_equal(targs.numpy(), s.masks)
    again = dls.train.new(dls.train.dataset.subset(s.patient_codes == 1))
    assert len(again.dataset) == 4 and again.bs == 4 and len(again) == 3 and again.augment
    x, y = again.one_batch()
    assert x.dtype == torch.float32 and y.dtype == torch.int64

def test_loader_errors():
    s = slices()
    refuses(lambda: SliceSet(s.subset([])), 'no slices')
    refuses(lambda: slice_loaders(s, replace(s, class_names=('a', 'b', 'c'))), 'classes differ')
    refuses(lambda: SliceLoader(SliceSet(s), 4, stats=(.5, .3)), 'stats are (0, 1), not (0.5, 0.3)')
    with pytest.raises(ValueError, match='batch size'): slice_loaders(s, s, bs=0)
    with pytest.raises(ValueError, match='steps_per_epoch'): slice_loaders(s, s, steps_per_epoch=0)
