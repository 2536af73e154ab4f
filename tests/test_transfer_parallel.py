"""Two processes on the CPU, started by torchrun, against one: training, L2-SP, Fisher information, T-IMM, and planted faults."""
import os, random, signal, subprocess, sys, tempfile
from pathlib import Path

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from torch import nn
from torch.nn import functional as F

from medxfer_nb.models.unet import WeightedCrossEntropy
from medxfer_nb.transfer.fisher import fisher, load_fisher
from medxfer_nb.transfer.freeze import Fix
from medxfer_nb.transfer.l2sp import L2SP
from medxfer_nb.transfer.merge import conv_layers
from medxfer_nb.transfer.parallel import (DataParallel, RankError, all_reduce_, broadcast_, data_parallel, fisher_over_ranks, gathered, join_ranks, launch,
                                          leave_ranks, on_all_ranks, rank, same_on_ranks, world_size)
from medxfer_nb.transfer.stages import masked_bce
from medxfer_nb.transfer.timm import AdaptiveMerge, fit_until

RNG = torch.Generator().manual_seed(3)
Y = torch.randint(3, (45,), generator=RNG)
X = torch.randn(45, 1, 5, 5, 5, generator=RNG).double() + Y[:, None, None, None, None]
KNOWN = torch.where(torch.rand(45, 3, generator=RNG) < 0.4, torch.nan, F.one_hot(Y, 3)).double() # some labels are unknown
ITEMS = list(zip(X, Y))
FOLDER = Path(os.environ.get('RANKS_FOLDER', '.')) # of the two processes


def convnet(seed=0, bn=False) -> nn.Sequential:
    "An encoder and a head in double precision."
    torch.manual_seed(seed)
    norm = nn.BatchNorm3d(4) if bn else nn.GroupNorm(2, 4)
    encoder = nn.Sequential(nn.Conv3d(1, 4, 3), norm, nn.ReLU(), nn.Conv3d(4, 4, 2), nn.Flatten())
    net = nn.Sequential()
    net.add_module('encoder', encoder)
    net.add_module('head', nn.Linear(32, 3))
    return net.double()


class Stream:
    "An endless stream of batches cut into epochs, made whole."
    def __init__(self, y, bs, steps, seed=0): self.y, self.bs, self.steps, self.rng = y, bs, steps, random.Random(seed)
    def __len__(self): return self.steps
    def __iter__(self):
        for _ in range(self.steps):
            rows = self.rng.sample(range(29), self.bs)
            yield X[rows], self.y[rows]


class Batches(list): "Batches in memory."


def learner(model, train=None, y=Y, loss=F.cross_entropy, cbs=None) -> Learner:
    if train is None: # 29 cases by 7: four batches, and one with a single case
        train = DataLoader(ITEMS[:29], bs=7, shuffle=True)
        train.rng = random.Random(rank()) # another order on rank 1: that of rank 0 counts
    valid = Batches([(X[29:38], y[29:38]), (X[38:], y[38:])]) # 9 and 7
    learn = Learner(DataLoaders(train, valid), model, loss_func=loss, opt_func=Adam, wd=0., cbs=cbs)
    learn.remove_cb(learn.recorder) # its smooth loss is in float32
    return learn


class Losses(Callback):
    order = 80
    def __init__(self): self.train, self.valid, self.outputs = [], [], []
    def after_batch(self):
        (self.train if self.training else self.valid).append(float(self.learn.loss.detach()))
        if not self.training: self.outputs.append(self.pred.detach())


def fit(learn, epochs=2, **options) -> dict:
    losses = Losses()
    with learn.no_bar(), learn.no_logging(), data_parallel(learn, **options): learn.fit(epochs, 0.01, cbs=losses)
    return dict(weights=learn.model.state_dict(), train=losses.train, valid=losses.valid, outputs=torch.cat(losses.outputs))


def l2sp_fit(form, cls=L2SP, **options):
    pull = cls(0.2 if form != 'proximal' else 2., form=form, beta=0.01)
    found = fit(learner(convnet(rank()), cbs=[pull, *options.pop('cbs', [])]), **options) # other weights on rank 1: those of rank 0 count
    return found | dict(anchor=pull.anchor, distance=pull.distance(), history=pull.history, state=pull.state_dict())


class PerRank(L2SP):
    "Fault: each rank counts the penalty by itself."
    def after_loss(self):
        lam, self.pulls = self.pulls, [type(p)(**{**vars(p), 'lam': p.lam * world_size()}) for p in self.pulls]
        super().after_loss()
        self.pulls = lam


class Unwrapped(Callback):
    "Fault: no gradient is averaged."
    order = 10.3
    def before_fit(self):
        if world_size() > 1: self.learn.ranks.wrapped = self.learn.ranks.bare


def error_of(fn) -> str:
    try: fn()
    except Exception as e: return f'{type(e).__name__}: {e}'
    return ''


def weighted(**options):
    "Class weights: the mean is over weights, and shares of a batch differ in them"
    loss = WeightedCrossEntropy(torch.tensor([.2, 1., 5.], dtype=torch.float64))
    return fit(learner(convnet(), Stream(Y, 8, 3), Y, loss), **options)

def masked(**options):
    return fit(learner(convnet(), Stream(KNOWN, 8, 3), KNOWN, masked_bce), **options)


def frozen():
    "A fixed encoder with BatchNorm, by a recipe that knows nothing of ranks."
    learn = learner(convnet(bn=True), Stream(Y, 7, 2), cbs=Fix('encoder'))
    with data_parallel(learn): result = fit_until(learn, 6, 2, 0.01, metric=lambda p, y: float((p.argmax(1) == y).mean()))
    return dict(weights=learn.model.state_dict(), history=result.history)


def unused():
    "Two heads, of which the network uses one; both are pulled."
    net = convnet()
    net.add_module('other', nn.Linear(32, 3).double())
    net.forward = lambda x: net.head(net.encoder(x))
    return fit(learner(net, cbs=L2SP(0.2, anchor={k: v + 0.1 for k, v in net.named_parameters()}, scope='*')), find_unused=True)


def predictions():
    learn = learner(convnet())
    with learn.no_bar(), data_parallel(learn): preds, targets = learn.get_preds(dl=DataLoader(ITEMS[:10], bs=4), act=nn.Identity())
    return dict(preds=preds, targets=targets)


def metrics():
    model = convnet().float()
    learn = Learner(DataLoaders(Batches([(X[:9].float(), Y[:9])]), Batches([(X[9:14].float(), Y[9:14]), (X[14:15].float(), Y[14:15])])), model,
                    loss_func=F.cross_entropy, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(), data_parallel(learn): learn.fit(2, 0.01)
    return [list(v) for v in learn.recorder.values]


def statistics():
    learn = learner(convnet(bn=True))
    refused = error_of(lambda: DataParallel(sync_bn=True)) if world_size() > 1 else ''
    return fit(learn) | dict(refused=refused, layers=[type(m).__name__ for m in learn.model.modules()])


BACKENDS = ('loop', 'vmap', 'hooks', 'auto')

def measured():
    net, batches = convnet(bn=True), [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:9], Y[8:9])] # 9 cases: 5 and 4
    def of(*args, batches=batches, **options): return vars(fisher_over_ranks(net, batches, 'softmax', *args, **options))
    found = {backend: of(backend=backend) for backend in BACKENDS}
    found['drawn'] = of('model', backend='hooks', seed=5)
    found['seven'] = of(n_cases=7, backend='loop')
    found['single'] = of(batches=[(X[i:i + 1], Y[i:i + 1]) for i in range(5)], backend='loop')
    found['one case'] = of(batches=[(X[:1], Y[:1])], backend='loop') # nothing for rank 1
    own = [(X[rank():9:world_size()], Y[rank():9:world_size()])]
    found['own'] = of('model', batches=own, divided=True, backend='hooks', seed=5)
    found['encoder'] = of(names='encoder', backend='loop', path=FOLDER/f'fisher{world_size()}.safetensors')
    found['there'] = (FOLDER/f'fisher{world_size()}.safetensors').exists() # on every rank
    found['nothing'] = error_of(lambda: of(batches=[]))
    found['nan'] = error_of(lambda: of(batches=[(X[:2] * torch.tensor([1., torch.nan]).view(2, 1, 1, 1, 1).double(), Y[:2])], backend='loop'))
    found['share'] = vars(fisher(net, own, 'softmax', backend='loop')) # what a rank alone would say
    return found


class Watch(Callback):
    def __init__(self): self.seen = []
    def after_step(self):
        if isinstance(self.model, AdaptiveMerge): self.seen.append(torch.cat([a.detach().flatten() for a in self.model.ratios().values()]))


def kin(size=0.1):
    start, rng = convnet(), torch.Generator().manual_seed(7)
    rand = lambda v: torch.rand(v.shape, generator=rng).double()
    states = [{k: v.detach() + t * size * (rand(v) - 0.5) for k, v in start.named_parameters()} for t in range(2)]
    return states, [{k: rand(v)**4 for k, v in start.named_parameters()} for _ in range(2)]


def adapted(size=0.1, checkpoint=None, **options):
    sources, fishers = kin(size)
    learn, watch = learner(convnet(1 + rank()), Stream(Y, 7, 2)), Watch()
    with data_parallel(learn):
        result = learn.fit_timm(sources, fishers, adapt_steps=20, steps=12, lr=0.01, ratio_lr=0.3, adapt_gain=0.1, adapt_patience=2, patience=3, halve_after=1,
                                shared=conv_layers, callbacks=[watch], checkpoint=checkpoint, ancestry='trust', **options)
    return dict(weights=learn.model.state_dict(), ratios=watch.seen, end=result.ratios, adapted=result.adapted,
                adaption=vars(result.adaption), fine=vars(result.fine_tuning))


class OnCPU(DistributedDL):
    "fastai's own loader, whose broadcast wants a GPU."
    def _broadcast(self, t, r): return broadcast_(torch.tensor(t)).tolist()


def plain_ctx(form):
    "fastai's `distrib_ctx` as it is: rank r reads the r-th half of the epoch."
    dl, pull = DataLoader(ITEMS[:12], bs=3), L2SP(0.2, form=form)
    train = OnCPU(dl) if world_size() > 1 else Batches([(X[[*range(i, i + 3), *range(i + 6, i + 9)]], Y[[*range(i, i + 3), *range(i + 6, i + 9)]]) for i in (0, 3)])
    learn = learner(convnet(rank()), train, cbs=pull)
    learn.dls.loaders = learn.dls.loaders[:1] # no validation
    broadcast_(learn.model)
    learn._do_epoch_validate = lambda: None
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, 0.01)
    return dict(weights=learn.model.state_dict(), distance=pull.distance())


def helpers():
    t = torch.arange(6.).view(2, 3).T # not contiguous
    sums = all_reduce_(t.clone() + rank())
    return dict(sums=sums, most=all_reduce_(torch.tensor(rank()), 'max'), first=broadcast_({'a': torch.full((2,), rank())})['a'], all=gathered(rank()),
                ranks=(rank(), world_size()), apart=error_of(lambda: same_on_ranks({'a': torch.ones(2), 'b': torch.tensor(rank())})),
                layouts=error_of(lambda: same_on_ranks({'a': torch.ones(1 + rank())})),
                failed=error_of(lambda: on_all_ranks(lambda: 1 // (1 - rank()))))


CHECKS = dict(
    helpers=helpers, plain=lambda: fit(learner(convnet(rank()))), accumulated=lambda: l2sp_fit('loss', cbs=[GradientAccumulation(14)]),
    clipped=lambda: l2sp_fit('grad', cbs=[GradientClip(0.1)]), **{form: (lambda form=form: l2sp_fit(form)) for form in ('loss', 'grad', 'proximal')},
    masked=masked, weighted=weighted, frozen=frozen, unused=unused, predictions=predictions, metrics=metrics, statistics=statistics,
    measured=measured, adapted=lambda: adapted(checkpoint=FOLDER/f'timm{world_size()}'), plain_loss=lambda: plain_ctx('loss'), plain_grad=lambda: plain_ctx('grad'))

FAULTS = dict(
    per_rank=lambda: l2sp_fit('loss', PerRank), by_rank=lambda: fit(learner(convnet()), weight=lambda *y: 1), by_case=lambda: masked(weight=len),
    unwrapped=lambda: error_of(lambda: fit(learner(convnet(), cbs=Unwrapped()))),
    other_data=lambda: error_of(lambda: fit(learner(convnet(), Stream(Y, 7, 2, seed=rank())))),
    other_sources=lambda: error_of(lambda: adapted(0.1 + 0.1 * rank())),
    other_length=lambda: error_of(lambda: fit(learner(convnet(), Stream(Y, 7, 2 + rank())))))


def work() -> dict: return {name: check() for name, check in (CHECKS | (FAULTS if world_size() > 1 else {})).items()}


@pytest.fixture(scope='module')
def runs():
    "What rank 0 and rank 1 found, and what one process finds."
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--rdzv-backend=c10d', '--rdzv-endpoint=127.0.0.1:0', __file__]
        env = dict(os.environ, RANKS_FOLDER=folder, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', PYTHONPATH=os.pathsep.join([str(Path(__file__).parent.parent), *sys.path]))
        pair = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try: output, _ = pair.communicate(timeout=900)
        finally:
            try: os.killpg(pair.pid, signal.SIGKILL)
            except ProcessLookupError: pass
        assert pair.returncode == 0, output[-5000:]
        two = [torch.load(Path(folder, f'{r}.pt'), weights_only=True) for r in range(2)]
        global FOLDER
        FOLDER = Path(folder)
        yield *two, work()


def far(a, b) -> float:
    "Largest difference, in parts of the largest number; tensors, numbers, or containers of them."
    if isinstance(a, dict):
        assert list(a) == list(b)
        return max((far(a[k], b[k]) for k in a), default=0.)
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        return max((far(x, y) for x, y in zip(a, b)), default=0.)
    if a is None or isinstance(a, (str, bool)): return 0. if a == b else float('inf')
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) if a.numel() else 0.


SAME = ('plain', 'accumulated', 'clipped', 'loss', 'grad', 'proximal', 'masked', 'weighted', 'frozen', 'unused', 'predictions', 'plain_loss', 'plain_grad')

@pytest.mark.parametrize('name', SAME)
def test_like_one_process(runs, name):
    first, second, alone = (run[name] for run in runs)
    assert far(second, first) == 0 # weights, losses, anchors, scores: the same on both ranks
    assert far(first, alone) < 1e-12


def test_metrics_are_those_of_all_cases(runs):
    assert far(runs[1]['metrics'], runs[0]['metrics']) == 0 and far(runs[0]['metrics'], runs[2]['metrics']) < 1e-5


def test_saved_state_loads_in_one_process(runs):
    state = runs[0]['loss']['state']
    learn = learner(convnet(), cbs=(pull := L2SP(0.2, form='loss')))
    learn.model.load_state_dict(runs[0]['loss']['weights'])
    pull.load_state_dict(state)
    assert pull.distance() == pytest.approx(runs[0]['loss']['distance'], rel=1e-12)


def test_batchnorm_without_synchronisation(runs):
    first, second, alone = (run['statistics'] for run in runs)
    assert far(second['weights'], first['weights']) == 0 # running statistics too
    assert far(second['valid'], first['valid']) == 0 and first['layers'] == alone['layers']
    assert far(first['weights'], alone['weights']) > 1e-6 # each rank normalised by its share, as the notebook says
    assert 'sync_bn works on GPUs only' in first['refused']


@pytest.mark.parametrize('name', [*BACKENDS, 'drawn', 'seven', 'single', 'one case', 'own', 'encoder'])
def test_fisher_is_that_of_all_cases(runs, name):
    first, second, alone = (run['measured'][name] for run in runs)
    assert far(second, first) == 0
    assert first['n_cases'] == alone['n_cases'] == {'seven': 7, 'single': 5, 'one case': 1}.get(name, 9)
    assert far(first['values'], alone['values']) < 1e-6 # float32


def test_fisher_alone_is_the_ordinary_one(runs):
    net = convnet(bn=True)
    expected = fisher(net, [(X[:9], Y[:9])], 'softmax', backend='loop')
    assert far(runs[2]['measured']['loop']['values'], expected.values) < 1e-6
    assert far(runs[0]['measured']['own']['values'], runs[0]['measured']['drawn']['values']) < 1e-6 # cases dealt in advance, the same draws


def test_fisher_is_written_once(runs):
    found = load_fisher(FOLDER/'fisher2.safetensors')
    assert far(found.values, runs[0]['measured']['encoder']['values']) == 0 and all(run['measured']['there'] for run in runs)
    assert 'no cases' in runs[0]['measured']['nothing'] and 'no cases' in runs[1]['measured']['nothing']
    assert 'rank 1 failed' in runs[0]['measured']['nan'] and 'NaN' in runs[1]['measured']['nan'] # nobody waits for the one that failed


def test_timm_like_one_process(runs):
    first, second, alone = (dict(run['adapted']) for run in runs)
    for result in (first, second, alone):
        for phase in ('adaption', 'fine'): result[phase] = {k: v for k, v in result[phase].items() if k != 'seconds'}
    assert far(second, first) == 0 and far(first, alone) < 1e-12
    assert alone['adaption']['stopped'] == 'converged' # a decision of its own, not the end of its steps
    assert (torch.stack(alone['ratios'])[-1] - 0.5).abs().max() > 0.05


def test_checkpoint_of_two_processes_continues_in_one(runs):
    assert sorted(p.name for p in FOLDER.glob('timm2.*')) == ['timm2.adaption', 'timm2.fine_tuning']
    again = adapted(checkpoint=FOLDER/'timm2')
    assert far(again['weights'], runs[0]['adapted']['weights']) == 0
    assert again['fine']['history'] == runs[0]['adapted']['fine']['history']


@pytest.mark.parametrize('fault, check', [('per_rank', 'loss'), ('by_rank', 'plain'), ('by_case', 'masked')])
def test_faults_would_be_seen(runs, fault, check):
    assert far(runs[0][fault]['weights'], runs[2][check]['weights']) > 1e-4 # the tests above ask for 1e-12


def test_faulty_fisher_would_be_seen(runs):
    first, second, alone = (run['measured'] for run in runs)
    averaged = {k: (v + second['share']['values'][k]) / 2 for k, v in first['share']['values'].items()} # of 5 cases and of 4
    assert far(averaged, alone['loop']['values']) > 1e-3 and far(first['share']['values'], alone['loop']['values']) > 1e-3


def test_ranks_that_do_not_go_together(runs):
    for run in runs[:2]:
        assert 'after this epoch the parameters differ between the ranks' in run['unwrapped']
        assert 'draw different batches' in run['other_data']
        assert 'sources or Fisher informations differ' in run['other_sources']
        assert 'would train differently' in run['other_length']


def test_helpers(runs):
    (first, second, alone), base = (run['helpers'] for run in runs), torch.arange(6.).view(2, 3).T
    for found, sums in ((first, 2 * base + 1), (second, 2 * base + 1), (alone, base)): assert torch.equal(found['sums'], sums)
    assert (first['ranks'], second['ranks'], alone['ranks']) == ((0, 2), (1, 2), (0, 1))
    assert int(first['most']) == int(second['most']) == 1 and second['first'].tolist() == [0, 0] and second['all'] == [0, 1]
    assert all('1 of 2: b;' in found['apart'] and 'other names, shapes' in found['layouts'] for found in (first, second))
    assert first['failed'].startswith('RankError: rank 1 failed: ZeroDivisionError') and second['failed'].startswith('ZeroDivisionError')


def one_fails():
    if rank(): raise ValueError('a fault on rank 1')
    all_reduce_(torch.ones(1)) # rank 0 waits


def test_launch_ends_all_when_one_fails():
    with pytest.raises(RankError, match='rank 1 failed(.|\n)*a fault on rank 1'): launch(one_fails, 2, backend='gloo', seconds=200)


if __name__ == '__main__': # what torchrun starts
    join_ranks(minutes=2)
    torch.save(work(), FOLDER/f'{rank()}.pt')
    leave_ranks()
