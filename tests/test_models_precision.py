"""What a mode promises: the same network, start and metric, whichever way it computes; a scaler that penalties, clipping and accumulation do not notice."""
import copy
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from scipy.stats import t as student
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from medxfer_nb.models import precision as pr
from medxfer_nb.models.precision import BF16_LAST, FP16_LAST, FP32, FP32_LAST, TF32_LAST, Autocast, CompileGain, Mode, computing
from medxfer_nb.models.unet3d import unet3d
from medxfer_nb.transfer.l2sp import FORMS, L2SP

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
MODES = [FP32, FP32_LAST, BF16_LAST, Mode('fp16')]
SCALE = 2.**12


class Net(nn.Module):
    "Two parts, so that a penalty can have a scope."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
        self.decoder = nn.Sequential(nn.Flatten(), nn.Linear(8*2*2, 10))
    def forward(self, x): return self.decoder(self.encoder(x))


DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.images/16, dtype=torch.float32)[:, None], torch.tensor(DIGITS.target)
START = {k: v + .1 for k, v in Net().state_dict().items() if k.startswith('encoder')}


def learner(*cbs, model=None, n=160, bs=16, shuffle=False):
    rows = list(zip(X, Y))
    dls = DataLoaders(DataLoader(rows[:n], bs=bs, shuffle=shuffle, num_workers=0), DataLoader(rows[1200:], bs=600, num_workers=0), device='cpu')
    return Learner(dls, model or Net(), CrossEntropyLossFlat(), opt_func=SGD, splitter=lambda m: [list(m.encoder.parameters()), list(m.decoder.parameters())] if isinstance(m, Net) else [list(m.parameters())], cbs=cbs)

def fit(learn, epochs=1, lr=.05):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)
    return learn

def close(a, b, atol=2e-4): return all(torch.allclose(v, b[k], atol=atol, rtol=1e-3) for k, v in a.items())
def equal(a, b): return all(torch.equal(v, b[k]) for k, v in a.items())


# One network

@pytest.mark.parametrize('mode', MODES, ids=str)
def test_another_mode_is_the_same_network(mode):
    net = Net().eval()
    exact, state = net(X[:8]), copy.deepcopy(net.state_dict())
    with computing(net, mode):
        y = net(X[:8])
        assert y.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
        assert all(p.dtype == torch.float32 for p in net.parameters())
    assert torch.allclose(y, exact, atol=.02) and torch.equal(y, exact) == (mode == FP32)
    assert equal(state, net.state_dict()) and torch.allclose(net(X[:8]), exact, atol=1e-6)

def test_volumes_have_a_layout_too():
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(2), nn.Unflatten(2, (18, 12)), nn.Conv2d(4, 4, 3))
    x = torch.randn(2, 1, 8, 8, 8)
    exact = net(x)
    last = pr.arrange(copy.deepcopy(net), True)
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last_3d) and last[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(last(x), exact, atol=1e-5)
    assert equal(dict(pr.arrange(last, False).named_parameters()), dict(net.named_parameters())) and all(p.is_contiguous() for p in last.parameters())

def test_layout_as_torch_has_it():
    ours, torchs = pr.arrange(Net(), True), Net().to(memory_format=torch.channels_last)
    assert [p.stride() for p in ours.parameters()] == [p.stride() for p in torchs.parameters()]

def test_optimiser_and_gradients_survive_a_new_layout():
    def steps(change):
        net = Net()
        opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
        for i in range(4):
            F.cross_entropy(net(X[:32]), Y[:32]).backward()
            if i == 2 and change: pr.arrange(net, True)
            opt.step(); opt.zero_grad()
        return net.state_dict()
    assert close(steps(False), steps(True), 1e-5)

def test_an_error_inside_leaves_nothing_behind():
    net = Net()
    with computing(net, BF16_LAST), pytest.raises(RuntimeError): net(torch.ones(2, 3))
    assert not torch.is_autocast_enabled('cpu') and net._compiled_call_impl is None
    learn = learner(Autocast(BF16_LAST), model=net)
    learn.dls.train.dataset[40:41] = [(torch.ones(3, 3), Y[0])]
    with pytest.raises(RuntimeError), learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu')
    exact = copy.deepcopy(net)(X[:4])
    with computing(net, FP32): torch.testing.assert_close(net(X[:4]), exact, atol=1e-5, rtol=1e-5) # the mode of the broken fit has no say
    assert net._compiled_call_impl is None
    again = learner(learn.autocast, model=net)
    assert fit(again).model._compiled_call_impl is None

def test_copies_and_pickles_are_plain():
    net = Net()
    with computing(net, BF16_LAST): twins = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    exact = net(X[:4])
    for p in net.parameters(): p.data.zero_()
    assert all(torch.equal(twin(X[:4]), exact) for twin in twins)

def test_parts_with_modes_of_their_own_are_not_overruled():
    net = unet3d(1, 2, base=2, depth=2)
    with computing(net, BF16_LAST): assert net(torch.randn(1, 1, 8, 8, 8)).dtype == torch.float32
    net.mode = BF16_LAST
    with pytest.raises(ValueError, match='modes of their own'), computing(net, BF16_LAST): pass

def test_outputs_of_several_tensors():
    class Two(Net):
        def forward(self, x): return dict(logits=super().forward(x), maps=[self.encoder(x)], n=torch.tensor(3))
    net = Two()
    with computing(net, BF16_LAST): out = net(X[:2])
    assert (out['logits'].dtype, out['maps'][0].dtype, out['n'].dtype) == (torch.float32, torch.float32, torch.int64)


# Training

def by_hand(mode, epochs=1, lr=.05, grad=None, clip=None, n=160, bs=16):
    "The loop without fastai: autocast, and torch's own scaler for float16"
    net = pr.arrange(Net(), mode.channels_last)
    opt, scaler = torch.optim.SGD(net.parameters(), lr=lr), torch.amp.GradScaler('cpu', init_scale=SCALE, enabled=mode.dtype == 'fp16')
    for i in [i for _ in range(epochs) for i in range(0, n, bs)]:
        with mode.autocast('cpu'): y = net(X[i:i + bs]).float()
        scaler.scale(F.cross_entropy(y, Y[i:i + bs])).backward()
        scaler.unscale_(opt)
        if grad:
            for name, p in net.named_parameters(): p.grad += grad(name, p.detach())
        if clip: nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(opt); scaler.update(); opt.zero_grad()
    return net.state_dict()

@pytest.mark.parametrize('mode', MODES, ids=str)
def test_a_fit_is_the_loop_that_torch_documents(mode):
    assert close(fit(learner(Autocast(mode, init_scale=SCALE)), 2).model.state_dict(), by_hand(mode, 2), 1e-5)

@pytest.mark.parametrize('mode', [BF16_LAST, Mode('fp16')], ids=str)
def test_penalty_and_clipping_see_unscaled_gradients(mode):
    def pull(name, p): return 2*.5*(p - START[name]) if name in START else 0
    for form in ('grad', 'loss'):
        learn = fit(learner(L2SP(.5, START, form=form), Autocast(mode, init_scale=SCALE), GradientClip(.5)))
        assert close(learn.model.state_dict(), by_hand(mode, grad=pull, clip=.5), 1e-4), form

@pytest.mark.parametrize('form', FORMS)
def test_the_scale_does_not_reach_the_penalty(form):
    one, many = (fit(learner(L2SP(.5, START, form=form), Autocast(Mode('fp16'), init_scale=scale, growth_interval=3))).model.state_dict() for scale in (1., SCALE))
    assert close(one, many)

@pytest.mark.parametrize('form', FORMS)
def test_accumulation_as_with_one_batch(form):
    def run(*cbs, bs): return fit(learner(L2SP(.5, START, form=form), Autocast(FP32), *cbs, bs=bs)).model.state_dict()
    assert close(run(bs=32), run(GradientAccumulation(32), bs=16), 1e-5)

class Burst(Callback):
    "Infinite gradients in one step."
    order = MixedPrecision.order - 1
    def __init__(self, at): self.at = at
    def before_step(self):
        if self.learn.iter == self.at: self.model.encoder[0].weight.grad.fill_(math.inf)

@pytest.mark.parametrize('form', FORMS)
def test_a_step_that_overflows_moves_nothing_and_halves_the_scale(form):
    class Watch(Callback):
        order = 80
        def before_fit(self): self.seen = []
        def before_batch(self): self.before = copy.deepcopy(self.model.state_dict()) if self.training else None
        def after_batch(self):
            if self.training: self.seen.append((equal(self.before, self.model.state_dict()), self.learn.scaler.get_scale()))
    learn = fit(learner(L2SP(.5, START, form=form), Autocast(Mode('fp16'), init_scale=SCALE), Burst(3), Watch()))
    assert [still for still, _ in learn.watch.seen] == [i == 3 for i in range(10)]
    assert [scale for _, scale in learn.watch.seen] == [SCALE]*3 + [SCALE/2]*7

def test_predictions_are_in_the_mode_and_float32():
    learn, seen = fit(learner(Autocast(BF16_LAST))), set()
    learn.model.encoder[0].register_forward_hook(lambda m, args, y: seen.add(y.dtype))
    with learn.no_bar(), learn.no_logging(): y = learn.get_preds()[0]
    assert y.dtype == torch.float32 and seen == {torch.bfloat16}
    assert learn.model._compiled_call_impl is None


# The same metric within noise

def scores(mode, seed):
    "Held-out loss and accuracy of a small network after three epochs of digits."
    set_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    learn = fit(learner(Autocast(mode), model=net, n=900, bs=60, shuffle=True), 3, .2)
    with learn.no_bar(), learn.no_logging(): y, target = learn.get_preds()
    return float(F.cross_entropy(y, target)), float((y.argmax(1) == target).float().mean())

def test_every_mode_ends_at_the_same_metric():
    "Two one-sided t-tests of paired differences (alpha 1%): within the standard deviation over seeds, or half a percentage point of accuracy."
    found = np.array([[scores(mode, seed) for mode in MODES] for seed in range(6)]) # (seeds, modes, metrics)
    noise = np.maximum(found[:, 0].std(0, ddof=1), [0, .005])
    assert (found[:, 0, 1] > .9).all(), 'a network that learns nothing is the same in every mode'
    for mode, differences in zip(MODES[1:], (found[:, 1:] - found[:, :1]).swapaxes(0, 1)):
        mean, error = differences.mean(0), differences.std(0, ddof=1)/6**.5
        assert (abs(mean) + student.ppf(.99, 5)*error < noise).all(), (str(mode), mean, error, noise)


# Compiling

@pytest.mark.skipif(not (shutil.which('c++') or shutil.which('g++')), reason='torch.compile needs a C++ compiler')
def test_compiled_training_is_the_same():
    def trained(mode):
        net = Net()
        opt = torch.optim.SGD(net.parameters(), lr=.05)
        with computing(net, mode):
            for i in range(0, 64, 16):
                F.cross_entropy(net(X[i:i + 16]), Y[i:i + 16]).backward()
                opt.step(); opt.zero_grad()
        assert net._compiled_call_impl is None
        return net.state_dict()
    assert close(trained(Mode('bf16')), trained(Mode('bf16', compile=True)), 5e-3)

def test_from_how_many_steps_compiling_pays():
    for first, eager, compiled in [(72, .28, .2), (5, 1, .5), (.4, 1, .5)]:
        n = CompileGain(first, eager, compiled).steps_to_pay
        spent = lambda n: first + (n - 1)*compiled - n*eager
        assert n == 1 or abs(spent(n)) < 1e-9 and spent(n + 1) < 0 < spent(n - 1)
    assert CompileGain(72, .2, .2).steps_to_pay == CompileGain(math.inf, .2, math.inf).steps_to_pay == math.inf

def test_compiled_only_where_the_steps_make_up_for_it(tmp_path, monkeypatch):
    calls, part, file = [], nn.Conv2d(3, 8, 3), tmp_path/'precision.json'
    monkeypatch.setattr(pr, 'compile_gain', lambda *args: calls.append(args) or CompileGain(10., .2, .1))
    chosen = [pr.choose_mode(part, (2, 3, 8, 8), 'fp32', file, steps=steps) for steps in (0, 50, 99, 100, 5000)]
    assert [mode.compile for mode in chosen] == [False, False, False, True, True] and len(calls) == 1 # measured once, decided by arithmetic
    assert all(mode.channels_last for mode in chosen)

def test_a_compiler_that_fails_is_not_offered(monkeypatch):
    import torch._dynamo
    def broken(self): self._compiled_call_impl = lambda *a: (_ for _ in ()).throw(torch._dynamo.exc.TorchDynamoException('no compiler'))
    monkeypatch.setattr(nn.Module, 'compile', broken)
    with pytest.warns(UserWarning, match='no compiler'): gain = pr.compile_gain(nn.Conv2d(3, 8, 3), (2, 3, 8, 8))
    assert gain.steps_to_pay == math.inf


# Deciding

def test_candidates_of_a_device():
    assert pr.candidates('cpu') == pr.candidates('mps') == pr.candidates('cuda:1') == [FP32, FP32_LAST, BF16_LAST]
    assert pr.candidates('cpu', whole=True) == pr.candidates('cpu')
    assert {TF32_LAST, FP16_LAST} <= set(pr.candidates('cuda', whole=True))

def test_decisions_of_before_are_still_read(tmp_path):
    part, file = nn.Conv2d(3, 8, 3), tmp_path/'precision.json'
    pr._write(file, pr.json.dumps({pr.probe_key(part, (2, 3, 8, 8)): {'dtype': 'bf16', 'channels_last': True, 'seconds': {}}}))
    before = file.read_bytes()
    assert pr.choose_mode(part, (2, 3, 8, 8), cache=file) == BF16_LAST and file.read_bytes() == before

def test_a_part_and_a_whole_network_are_decided_apart(tmp_path, monkeypatch):
    part, file = nn.Conv2d(3, 8, 3), tmp_path/'precision.json'
    monkeypatch.setattr(pr, 'probe', lambda *args, whole=False: {FP32: 2., (FP16_LAST if whole else BF16_LAST): 1.})
    assert [pr.choose_mode(part, (2, 3, 8, 8), cache=file, whole=whole) for whole in (True, False, True)] == [FP16_LAST, BF16_LAST, FP16_LAST]

def test_short_products_have_to_earn_it():
    for short in (BF16_LAST, FP16_LAST, TF32_LAST):
        assert pr.fastest({FP32_LAST: 1., short: .95}) == FP32_LAST and pr.fastest({FP32_LAST: 1., short: .8}) == short


# On a GPU

@needs_cuda
def test_tf32_is_on_inside_and_as_before_outside():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    a = torch.randn(512, 512, device='cuda')
    exact = (a.double() @ a.double()).float()
    errors = {}
    net = nn.Linear(512, 512, bias=False, device='cuda')
    net.weight.data.copy_(a.T)
    for mode in (FP32, TF32_LAST):
        with computing(net, mode): errors[mode] = float((net(a) - exact).abs().max())
    assert errors[FP32] < 1e-3 and (errors[TF32_LAST] > 10*errors[FP32] or torch.cuda.get_device_capability() < (8, 0))
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)

@needs_cuda
@pytest.mark.parametrize('mode', [TF32_LAST, BF16_LAST, FP16_LAST], ids=str)
def test_modes_of_a_gpu_end_at_the_same_loss(mode):
    def end(mode):
        learn = learner(Autocast(mode))
        learn.dls.to('cuda')
        fit(learn, 4)
        with learn.no_bar(), learn.no_logging(): return learn.validate()[0]
    assert abs(end(mode) - end(FP32)) < .05
