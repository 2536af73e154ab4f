"""Cross-validation for lambda: against a plain loop over folds, on slices, with the learner left as it was."""
import copy, math
from functools import partial

import numpy as np, pytest, torch
from fastai.callback import progress # no_bar
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam
from torch import nn
from torch.nn import functional as F

from medxfer_nb.data.slices import Slices, slice_loaders
from medxfer_nb.transfer.l2sp import L2SP
from medxfer_nb.transfer.l2sp_find import LamCurve, fold_loaders, patient_folds
from medxfer_nb.transfer.stages import SeedEpochs

torch.manual_seed(0)
ROWS = list(zip(torch.randn(40, 6), torch.randn(40)))
PATIENTS = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 5)) # not in order


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 1)
    def forward(self, x): return self.decoder(self.encoder(x).tanh())[:, 0]


def learner(*cbs) -> Learner:
    dls = DataLoaders.from_dsets(ROWS, ROWS[:4], bs=10, num_workers=0, device=torch.device('cpu'))
    return Learner(dls, Net(), F.mse_loss, partial(SGD, mom=0.9), lr=0.05, wd=0., cbs=list(cbs))


@pytest.mark.parametrize('sizes, k', [([1] * 9, 3), ([10, 1, 1, 1, 1], 2), ([3, 5, 2, 8, 1, 1, 4], 4)])
def test_folds_hold_whole_patients(sizes, k):
    patients = np.random.default_rng(1).permutation(np.repeat([f'p{i}' for i in range(len(sizes))], sizes))
    folds = patient_folds(patients, k)
    assert set(folds) == set(range(k)) and all(len(set(folds[patients == p])) == 1 for p in set(patients))
    rows = np.bincount(folds)
    assert rows.max() - rows.min() <= max(sizes)
    assert np.array_equal(folds, patient_folds(patients, k))
    for bad in (1, len(sizes) + 1):
        with pytest.raises(ValueError, match='at least 2 folds'): patient_folds(patients, bad)


def test_scores_against_a_plain_loop():
    "lambda = 0 without the finder: train on the other patients, score each held-out one."
    curve = learner().l2sp_find(PATIENTS, (0., 5.), k=2, epochs=3, seed=4)
    folds = patient_folds(PATIENTS, 2, 4)
    for fold in range(2):
        learn = learner()
        train = learn.dls.train.new(dataset=[ROWS[i] for i in np.flatnonzero(folds != fold)])
        learn.dls = DataLoaders(train, train, device=torch.device('cpu'))
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, cbs=SeedEpochs(4))
        learn.model.eval()
        for patient in np.unique(PATIENTS[folds == fold]):
            x, y = (torch.stack(part) for part in zip(*(ROWS[i] for i in np.flatnonzero(PATIENTS == patient))))
            position = list(dict.fromkeys(PATIENTS.tolist())).index(patient)
            with torch.no_grad(): assert curve.scores[position, 0] == pytest.approx(-F.mse_loss(learn.model(x), y).item(), rel=1e-5)
            assert curve.folds[position] == fold
    assert np.isfinite(curve.scores).all() and not np.allclose(curve.scores[:, 0], curve.scores[:, 1])


def test_the_learner_stays_as_it_was():
    own = L2SP(3.)
    learn = learner(own)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    before, dls, opt = copy.deepcopy(learn.model.state_dict()), learn.dls, learn.opt
    rng, history = torch.get_rng_state(), copy.deepcopy(own.history)
    a = learn.l2sp_find(PATIENTS, (0., 1.), k=2, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert learn.dls is dls and learn.opt is opt and torch.equal(rng, torch.get_rng_state()) and own in learn.cbs and own.history == history
    assert np.array_equal(a.scores, learn.l2sp_find(PATIENTS, (0., 1.), k=2, epochs=1).scores) # the same again
    assert np.array_equal(a.scores[:, 1], learn.l2sp_find(PATIENTS, (1.,), k=2, epochs=1).scores[:, 0]) # whatever ran before


def test_every_lambda_starts_from_the_anchor():
    starts = []
    class Watch(Callback):
        order = 20
        def before_train(self): starts.append((torch.cat([p.detach().flatten() for p in self.model.parameters()]), copy.deepcopy(self.learn.l2sp.anchor)))
    learn = learner(Watch())
    learn.l2sp_find(PATIENTS, (0., 1., 8.), k=2, epochs=1)
    assert len(starts) == 6 and all(torch.equal(s, starts[0][0]) for s, _ in starts)
    assert all(torch.equal(a, learn.model.get_parameter(n)) for _, anchor in starts for n, a in anchor.items())


def test_slices_and_a_metric():
    rng, n = np.random.default_rng(0), 12
    pixels = rng.random((n, 16, 16)).astype('float16')
    volume = np.repeat(np.arange(4), 3)
    slices = Slices(pixels, (pixels > 0.5).astype('uint8'), volume, np.tile(np.arange(3), 4), np.arange(4), np.tile([3, 16, 16], (4, 1)), np.ones((4, 3)), ('background', 'bright'))
    torch.manual_seed(0)
    model = nn.ModuleDict({'encoder': nn.Conv2d(1, 4, 1), 'decoder': nn.Conv2d(4, 2, 1)})
    class Segment(nn.Module):
        def __init__(self): super().__init__(); self.encoder, self.decoder = model['encoder'], model['decoder']
        def forward(self, x): return self.decoder(self.encoder(x.as_subclass(torch.Tensor)).relu())
    learn = Learner(slice_loaders(slices, slices.subset(np.arange(3)), bs=4, seed=0, device=torch.device('cpu')), Segment(), nn.CrossEntropyLoss(), Adam, wd=0.)
    seen = []
    def accuracy(pred, target):
        seen.append(pred.shape)
        return (pred.argmax(1) == target).mean()
    curve = learn.l2sp_find(lams=(0., 1.), k=2, epochs=2, lr=0.05, metric=accuracy)
    assert curve.scores.shape == (4, 2) and set(seen) == {(3, 2, 16, 16)} and len(seen) == 8 and ((curve.scores >= 0) & (curve.scores <= 1)).all()


def test_the_statement():
    scores = np.array([[1., 2., 2., np.nan], [3., 4., 5., 1.], [5., 6., 6., 2.]])
    curve = LamCurve((0., 1., 4., 50.), scores, np.array([0, 1, 1]))
    table = curve.table
    behind = scores[:, 2] - scores[:, 1] # 0, 1, 0
    assert curve.suggestion == 4. and table.behind[1] == pytest.approx(1 / 3) and table.behind_se[1] == pytest.approx(behind.std(ddof=1) / math.sqrt(3))
    assert curve.within == (1., 4.) and table.diverged.tolist() == [False, False, False, True]
    assert 'Diverged: 50' in str(curve) and 'within one standard error of it: 1;' in str(curve) and '3 patients in 2 folds' in str(curve)
    with pytest.raises(ValueError, match='every training diverged'): LamCurve((1.,), np.full((3, 1), np.nan), np.arange(3)).table


def test_loaders_that_cannot_work():
    with pytest.raises(ValueError, match='39 patients for 40 rows'): learner().l2sp_find(PATIENTS[:-1])
    dls = DataLoaders.from_dsets(ROWS, ROWS[:4], bs=32, num_workers=0)
    with pytest.raises(ValueError, match='20 rows to train on make no batch of 32'): fold_loaders(dls, np.arange(20), np.arange(20, 40))
    dropping = lambda train, valid: DataLoaders(learner().dls.train, learner().dls.train)
    with pytest.raises(ValueError, match='the validation loader gave 40 rows'): learner().l2sp_find(PATIENTS, (0.,), k=2, epochs=1, loaders=dropping)
