"""L2-SP against bare PyTorch loops, closed forms and autograd; mixed precision, accumulation, schedules, resuming, faults."""
import copy, math, pickle
from functools import partial

import pytest, torch
from fastai.callback import progress # no_bar
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import CancelStepException, Learner
from fastai.optimizer import SGD, Adam, OptimWrapper
from torch import nn
from torch.nn import functional as F

from medxfer_nb.transfer.freeze import Fix
from medxfer_nb.transfer.l2sp import FORMS, L2SP, AnchorError, max_stable_lr, select


class Batches(list):
    "Batches in memory."
    device = torch.device('cpu')


class Net(nn.Module):
    "Convolutions, BatchNorm and GroupNorm, a layer that nothing uses, and a decoder."
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.encoder.add_module('unused', nn.ModuleDict({'layer': nn.Linear(2, 2)}))
        self.decoder = nn.Linear(16, 3)
    def forward(self, x):
        for name, layer in self.encoder.named_children():
            if name != 'unused': x = layer(x)
        return self.decoder(x)


torch.manual_seed(9)
X, Y = torch.randn(64, 1, 8, 8), torch.randint(0, 3, (64,))
BATCHES = Batches((X[i:i+8], Y[i:i+8]) for i in range(0, 64, 8))
SOURCE = Net(1).state_dict()
BATCHES64, SOURCE64 = Batches((x.double(), y) for x, y in BATCHES), Net(1).double().state_dict()


def groups(m): return [list(m.encoder.parameters()), list(m.decoder.parameters())]


def single(loss): return lambda pred, y: loss(pred, y).float() # fastai's recorder takes no double precision


def learner(*cbs, opt=SGD, wd=0., model=None, batches=BATCHES, splitter=groups) -> Learner:
    return Learner(DataLoaders(batches, Batches(batches[:1])), model or Net(), single(F.cross_entropy), opt, splitter=splitter, wd=wd, cbs=list(cbs))


def fit(learn, epochs=2, lr=0.05, **kwargs) -> Learner:
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr, **kwargs)
    return learn


def state(model) -> dict: return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same(a, b, exact=False, **tolerance):
    for k, v in a.items():
        if exact: assert torch.equal(v, b[k]), k
        else: torch.testing.assert_close(v, b[k], **tolerance)


# Forms, against bare loops

TORCH = {'sgd': lambda ps: torch.optim.SGD(ps, lr=1.), 'momentum': lambda ps: torch.optim.SGD(ps, lr=1., momentum=0.9),
         'adam': lambda ps: torch.optim.Adam(ps, lr=1., betas=(0.9, 0.99), eps=1e-5)}
FASTAI = {'sgd': SGD, 'momentum': partial(SGD, mom=0.9), 'adam': Adam,
          'wrapped': partial(OptimWrapper, opt=partial(torch.optim.Adam, betas=(0.9, 0.99), eps=1e-5))}

def bare(opt, form, lam, lrs, epochs=2) -> dict:
    "Eq. 2 without fastai: the encoder is pulled to SOURCE, each group has its learning rate."
    model = Net().double() # a gradient that is zero but for rounding, as a bias before BatchNorm has, is not small to Adam
    optimiser = TORCH[opt]([{'params': g, 'lr': lr} for g, lr in zip(groups(model), lrs)])
    for x, y in [b for _ in range(epochs) for b in BATCHES64]:
        loss = F.cross_entropy(model(x), y)
        if form != 'proximal': loss = loss + lam * sum((p - SOURCE64[n]).pow(2).sum() for n, p in model.named_parameters() if n.startswith('encoder.'))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if form == 'proximal':
            with torch.no_grad():
                for n, p in model.encoder.named_parameters(): p.copy_((p + 2 * lrs[0] * lam * SOURCE64[f'encoder.{n}']) / (1 + 2 * lrs[0] * lam))
    return state(model)

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('opt', FASTAI)
def test_forms_against_a_bare_loop(opt, form):
    learn = fit(learner(L2SP(1.5, SOURCE64, form=form), opt=FASTAI[opt], model=Net().double(), batches=BATCHES64), lr=[0.02, 0.05])
    assert_same(bare('adam' if opt == 'wrapped' else opt, form, 1.5, [0.02, 0.05]), state(learn.model), atol=1e-9, rtol=1e-9)

@pytest.mark.parametrize('opt', [SGD, Adam])
def test_the_order_of_magnitude_of_lambda(opt):
    "A wrong factor would not hide: lambda and 2 lambda differ by far more than the tolerance."
    a, b = (fit(learner(L2SP(lam, SOURCE), opt=opt)).l2sp.distance() for lam in (0.5, 1.))
    assert a > 1.05 * b

@pytest.mark.parametrize('form', FORMS)
def test_zero_is_plain_training_bit_for_bit(form):
    plain = fit(learner(opt=partial(SGD, mom=0.9), wd=0.1))
    learn = fit(learner(L2SP(0., SOURCE, form=form), opt=partial(SGD, mom=0.9), wd=0.1))
    assert_same(state(plain.model), state(learn.model), exact=True)
    assert learn.model.encoder.unused.layer.weight.grad is None and learn.l2sp.distance() > 0 and learn.l2sp.penalty() == 0

@pytest.mark.parametrize('opt', ['sgd', 'momentum', 'adam'])
def test_infinity_is_frozen_bit_for_bit(opt):
    class Rest(Callback):
        order = -5
        def before_train(self): self.model.encoder.eval()
    frozen = fit(learner(Fix('encoder'), opt=FASTAI[opt]))
    for lam, exact in ((math.inf, True), (1e8, False)):
        learn = fit(learner(L2SP(lam, form='proximal'), Rest(), opt=FASTAI[opt]))
        assert_same(state(frozen.model), state(learn.model), exact=exact, atol=1e-5, rtol=1e-4)
    assert fit(learner(L2SP(math.inf, form='proximal', depth={'encoder.0': 0.}), opt=FASTAI[opt])).l2sp.distance(True)['encoder.0'] > 0


# Mixed precision, accumulation, clipping

class CpuAmp(MixedPrecision):
    "fastai's mixed precision with a gradient scaler that works on a CPU."
    name = 'mixed_precision'
    def __init__(self, scale=2.**12):
        super().__init__()
        self.scale = scale
    def before_fit(self):
        self.autocast, self.learn.scaler, self.scales = torch.autocast('cpu', torch.bfloat16), torch.amp.GradScaler('cpu', init_scale=self.scale, growth_interval=3), []

@pytest.mark.parametrize('extra', [(), (GradientAccumulation, 24), (GradientClip, 0.5)])
@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('opt', ['momentum', 'adam'])
def test_grad_equals_loss(opt, amp, extra):
    def run(form):
        cbs = [L2SP(3., SOURCE, form=form, beta=0.01)] + ([CpuAmp()] if amp else []) + ([extra[0](extra[1])] if extra else [])
        return state(fit(learner(*cbs, opt=FASTAI[opt]), lr=0.02).model)
    assert_same(run('loss'), run('grad'), atol=1e-4, rtol=1e-3)

def test_the_penalty_is_not_scaled():
    "Only the loss sees the scaler: under autocast with scale 1 and 4096 the same training."
    for form in FORMS:
        a, b = (state(fit(learner(L2SP(3., SOURCE, form=form), CpuAmp(scale)), lr=0.02).model) for scale in (1., 4096.))
        assert_same(a, b, atol=1e-4, rtol=1e-3)

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('n_acc', [16, 20, 24]) # 20: more than enough is accumulated
def test_once_per_step_under_accumulation(form, n_acc):
    k, model = -(-n_acc // 8), Net()
    fit(learner(L2SP(2., SOURCE, form=form), GradientAccumulation(n_acc), model=model), epochs=3)
    reference, i = Net(), 0
    optimiser = torch.optim.SGD(reference.parameters(), lr=0.05)
    for x, y in [b for _ in range(3) for b in BATCHES]:
        (F.cross_entropy(reference(x), y) * 8 / n_acc).backward()
        i += 1
        if i % k: continue
        if form != 'proximal': (2 * sum((p - SOURCE[n]).pow(2).sum() for n, p in reference.named_parameters() if n.startswith('encoder.'))).backward()
        optimiser.step(); optimiser.zero_grad()
        if form == 'proximal':
            with torch.no_grad():
                for n, p in reference.encoder.named_parameters(): p.copy_((p + 0.2 * SOURCE[f'encoder.{n}']) / 1.2)
    assert_same(state(reference), state(model), atol=2e-5, rtol=1e-4)

def test_accumulation_across_fits():
    "What waits at the end of a fit already holds the penalty; it is not added again."
    def run(form):
        learn = learner(L2SP(2., SOURCE, form=form), GradientAccumulation(24))
        fit(learn, 1); fit(learn, 1)
        return state(learn.model)
    assert_same(run('loss'), run('grad'), atol=2e-5, rtol=1e-4)

@pytest.mark.parametrize('form', FORMS)
def test_skipped_steps_move_nothing(form):
    class Overflow(Callback):
        order = 5
        def after_loss(self):
            if self.iter % 2: self.learn.loss_grad = self.loss_grad * math.inf
    class Watch(Callback):
        order = 90
        def before_batch(self): self.before = [p.detach().clone() for p in self.model.parameters()]
        def after_batch(self):
            if self.training: moved.append(any(not torch.equal(a, b) for a, b in zip(self.before, self.model.parameters())))
    moved = []
    fit(learner(L2SP(1., SOURCE, form=form), CpuAmp(1.), Overflow(), Watch()), epochs=1)
    assert moved == [True, False] * 4

@pytest.mark.parametrize('order', [0, 50])
def test_a_step_that_another_callback_cancels(order):
    class Never(Callback):
        def before_step(self): raise CancelStepException()
    Never.order = order
    for form in FORMS:
        learn = learner(L2SP(1., SOURCE, form=form), Never())
        before = [p.detach().clone() for p in learn.model.parameters()]
        fit(learn, 1)
        assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))

def test_the_penalty_is_clipped_with_the_rest():
    norms = []
    class Norm(Callback):
        order = 12
        def before_step(self): norms.append(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm().item())
    for form in ('loss', 'grad'): fit(learner(L2SP(50., SOURCE, form=form), GradientClip(1.), Norm()), epochs=1, lr=1e-3)
    assert max(norms) < 1.0001 and min(norms) > 0.99

@pytest.mark.parametrize('form', FORMS)
def test_recorded_losses_are_the_data_s(form):
    learn = learner(L2SP(1e3, SOURCE, form=form))
    fit(learn, epochs=1, lr=0.)
    with torch.no_grad(): expected = [F.cross_entropy(Net().train()(x), y).item() for x, y in BATCHES]
    assert learn.recorder.losses[0].item() == pytest.approx(expected[0], rel=1e-4)
    assert learn.l2sp.history[0]['penalty'] == pytest.approx(1e3 * learn.l2sp.distance()**2, rel=1e-5)


# Schedules and parameter groups

def test_proximal_follows_each_group_s_schedule():
    "No gradient at all: only the proximal steps move the weights."
    lrs, seen = {'lr': lambda pct: [0.1 * pct, 0.3 * (1 - pct)]}, []
    class Scheduler(ParamScheduler):
        def before_batch(self): self._update_val(self.pct_train); seen.append([h['lr'] for h in self.opt.hypers])
    model = Net()
    learn = Learner(DataLoaders(BATCHES, BATCHES[:1]), model, lambda pred, y: 0 * pred.sum(), SGD, splitter=lambda m: [list(m.encoder[0].parameters()), list(m.encoder[3].parameters())],
                    wd=0., cbs=[L2SP(2., SOURCE, form='proximal', depth={'encoder.3.bias': 3.})])
    start = state(model)
    fit(learn, 2, lr=1., cbs=Scheduler(lrs))
    for name, group, factor in (('encoder.0.weight', 0, 1), ('encoder.3.weight', 1, 1), ('encoder.3.bias', 1, 3)):
        shrunk = math.prod(1 / (1 + 2 * row[group] * 2 * factor) for row in seen[:16])
        torch.testing.assert_close(model.get_parameter(name).detach(), SOURCE[name] + shrunk * (start[name] - SOURCE[name]))
    assert torch.equal(model.encoder[1].weight, start['encoder.1.weight']) # no group trains it

@pytest.mark.parametrize('opt', [SGD, partial(SGD, mom=0.9)])
def test_one_cycle(opt):
    def run(form):
        learn = learner(L2SP(2., SOURCE, form=form), opt=opt)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, slice(0.01, 0.05))
        return state(learn.model)
    assert_same(run('loss'), run('grad'), atol=2e-5, rtol=1e-4)


# Meaning and stability

class Linear(nn.Module):
    def __init__(self, d=5):
        super().__init__()
        self.encoder = nn.Linear(d, 1, bias=False)
    def forward(self, x): return self.encoder(x)[:, 0]

def test_posterior_of_a_linear_gaussian_model():
    "Prior variance 1 / (2 lambda) per summed loss; N lambda for a mean; the bias of a draw from the prior checks the closed form itself."
    torch.manual_seed(0)
    N, sigma, lam = 30, 0.7, 3.
    A, center = torch.randn(N, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    b = A @ (center + torch.randn(5, dtype=torch.float64)) + sigma * torch.randn(N, dtype=torch.float64)
    def closed(tau2): # conditional mean of a joint Gaussian: an independent route
        K = tau2 * A @ A.T + sigma**2 * torch.eye(N, dtype=torch.float64)
        return center + tau2 * A.T @ torch.linalg.solve(K, b - A @ center)
    def ours(lam, form, reduce, lr, mom=0.):
        learn = Learner(DataLoaders(Batches([(A, b)] * 500), Batches([(A, b)])), Linear().double(), single(lambda p, y: reduce((p - y)**2) / (2 * sigma**2)),
                        partial(SGD, mom=mom), wd=0., cbs=L2SP(lam, {'weight': center[None]}, form=form))
        return fit(learn, 1, lr).model.encoder.weight.detach()[0]
    for form in FORMS:
        torch.testing.assert_close(ours(lam, form, torch.sum, 2e-3), closed(1 / (2 * lam)), atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(ours(lam, form, torch.mean, 6e-2), closed(1 / (2 * N * lam)), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(ours(lam, 'proximal', torch.sum, 1e-3, 0.9), closed(1 / (2 * 0.1 * lam)), atol=1e-8, rtol=1e-8)

@pytest.mark.parametrize('mom', [0., 0.5, 0.9])
@pytest.mark.parametrize('curvature', [0., 2.])
def test_stability_bounds(mom, curvature):
    "A weight under loss h/2 w^2 and the penalty: just inside the bound it converges, just outside it does not."
    def gap(form, lr, lam, steps=150):
        class Point(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.float64))])
            def forward(self, x): return self.encoder[0]
        learn = Learner(DataLoaders(Batches([(X[:1], Y[:1])] * steps), Batches()), Point(), single(lambda w, y: curvature / 2 * (w**2).sum()), partial(SGD, mom=mom), wd=0.,
                        cbs=L2SP(lam, {'0': torch.zeros(1, dtype=torch.float64)}, form=form))
        return abs(fit(learn, 1, lr).model.encoder[0].item())
    lam = 4.
    bound = max_stable_lr(lam, mom, curvature)
    assert bound == pytest.approx(2 * (1 + mom) / (2 * lam + curvature))
    for form in ('loss', 'grad'): assert gap(form, 0.97 * bound, lam) < 0.1 and gap(form, 1.03 * bound, lam) > 10
    for wild in (1.03, 1e3, 1e8): assert gap('proximal', min(bound, max_stable_lr(0, mom, curvature) / 2), wild * lam) < 1e-3


# Scope

CASES = {'module': dict(scope='encoder'), 'layer': dict(scope='encoder.0'), 'pattern': dict(scope='encoder.*.weight'), 'everything': dict(scope='*'),
         'group': dict(scope=0), 'predicate': dict(scope=lambda name: 'bias' in name), 'list': dict(scope=['encoder.0', 'decoder']),
         'norms': dict(norms=False), 'biases': dict(biases=False), 'neither': dict(norms=False, biases=False)}
AFFINE = [f'encoder.{i}.{s}' for i in (1, 4) for s in ('weight', 'bias')]
PLAIN_BIASES = ['encoder.0.bias', 'encoder.3.bias', 'encoder.unused.layer.bias']

def expected_scope(case) -> set:
    names = [n for n, _ in Net().named_parameters()]
    inside = {'layer': lambda n: n.startswith('encoder.0.'), 'pattern': lambda n: n.startswith('encoder.') and n.endswith('.weight'), 'everything': lambda n: True,
              'predicate': lambda n: 'bias' in n, 'list': lambda n: n.startswith(('encoder.0.', 'decoder.')), 'norms': lambda n: n.startswith('encoder.') and n not in AFFINE,
              'biases': lambda n: n.startswith('encoder.') and n not in PLAIN_BIASES, 'neither': lambda n: n.startswith('encoder.') and n not in AFFINE + PLAIN_BIASES}
    return {n for n in names if inside.get(case, lambda n: n.startswith('encoder.'))(n)}

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('case', CASES)
def test_scope(case, form):
    "Without a gradient from the data exactly the parameters in scope move."
    learn = Learner(DataLoaders(BATCHES, BATCHES[:1]), Net(), lambda pred, y: 0 * pred.sum(), SGD, splitter=groups, wd=0., cbs=L2SP(1., {k: v + 1 for k, v in SOURCE.items()}, form=form, **CASES[case]))
    before = dict(copy.deepcopy(learn.model).named_parameters())
    fit(learn, 1)
    assert {n for n, p in learn.model.named_parameters() if not torch.equal(p, before[n])} == expected_scope(case) == set(learn.l2sp.anchor)

def test_scope_that_finds_nothing():
    for scope, message in (('backbone', 'its parts are: encoder, decoder'), (5, 'there is no parameter group 5: the optimiser has 2'), (2.5, 'selects no parameters')):
        with pytest.raises(ValueError, match=message): fit(learner(L2SP(1., scope=scope)))
    with pytest.raises(ValueError, match='once norms and biases are left out'): fit(learner(L2SP(1., scope='encoder.1', norms=False)))
    assert select(SOURCE, 'encode') == []

@pytest.mark.parametrize('form', FORMS)
def test_depth_fisher_and_beta_against_autograd(form):
    "One step of SGD."
    torch.manual_seed(3)
    fisher = {n: torch.rand_like(p) for n, p in Net().encoder.named_parameters()}
    learn = learner(L2SP(2., SOURCE, form=form, norms=False, beta=0.3, depth={'encoder.0': 0.5, 'encoder.*': 4.}, fisher=fisher), batches=Batches(BATCHES[:1]))
    fit(learn, 1, lr=0.04)
    model = Net()
    params = {n: p for n, p in model.named_parameters() if n not in AFFINE}
    cost = sum(2 * (0.5 if n.startswith('encoder.0') else 4) * (fisher[n[8:]] * (p - SOURCE[n])**2).sum() for n, p in params.items() if n.startswith('encoder'))
    cost = cost + 0.3 * sum((p**2).sum() for n, p in params.items() if n.startswith('decoder'))
    loss = F.cross_entropy(model.train()(X[:8]), Y[:8]) + (cost if form != 'proximal' else 0)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        for (n, p), g in zip(model.named_parameters(), grads):
            if g is not None: p -= 0.04 * g
            if form == 'proximal' and n in params:
                t = 0.08 * (0.3 if n.startswith('decoder') else 2 * (0.5 if n.startswith('encoder.0') else 4) * fisher[n[8:]])
                p.copy_((p + t * (0 if n.startswith('decoder') else SOURCE[n])) / (1 + t))
    assert_same(dict(model.named_parameters()), dict(learn.model.named_parameters()))
    again = state(learn.model)
    cost = sum(2 * (0.5 if n.startswith('encoder.0') else 4) * (fisher[n[8:]] * (again[n] - SOURCE[n])**2).sum() for n in params if n.startswith('encoder'))
    assert learn.l2sp.penalty() == pytest.approx(float(cost + 0.3 * sum((again[n]**2).sum() for n in params if n.startswith('decoder'))), rel=1e-5)

@pytest.mark.parametrize('form', FORMS)
def test_frozen_parameters_stay(form):
    for freeze in (lambda learn: learn.model.encoder[0].requires_grad_(False), lambda learn: learn.add_cb(Fix(lambda m: [m.encoder[0]]))):
        learn = learner(L2SP(1., SOURCE, form=form))
        freeze(learn)
        before = state(learn.model)
        fit(learn, 1)
        assert torch.equal(learn.model.encoder[0].weight, before['encoder.0.weight'])
        assert not torch.equal(learn.model.encoder[3].weight, before['encoder.3.weight'])

def test_an_optimiser_without_the_scope():
    with pytest.raises(ValueError, match='the optimiser holds no parameter in scope'): fit(learner(L2SP(1.), splitter=lambda m: list(m.decoder.parameters())))
    fit(learner(L2SP(0.), splitter=lambda m: list(m.decoder.parameters())))


# The anchor

def encoder_state(model): return {k: v for k, v in model.state_dict().items() if k.startswith('encoder.')}

@pytest.mark.parametrize('given', ['module', 'encoder', 'state', 'bare state', 'state with another decoder', 'the model itself'])
def test_sources(given):
    source = Net()
    source.load_state_dict(SOURCE)
    learn = learner(model=source if given == 'the model itself' else None)
    bare = source.encoder.state_dict()
    anchor = {'module': source, 'the model itself': source, 'encoder': source.encoder, 'state': source.state_dict(),
              'bare state': bare | {'classifier.weight': torch.zeros(2)}, 'state with another decoder': encoder_state(source) | {'decoder.weight': torch.zeros(2)}}[given]
    learn.add_cb(L2SP(1., anchor))
    if given != 'the model itself':
        with torch.no_grad():
            for p in source.parameters(): p.add_(1) # after the callback has been made: must not matter
    fit(learn)
    cb = learn.l2sp
    assert set(cb.anchor) == {n for n, _ in Net().named_parameters() if n.startswith('encoder.')}
    for name, a in cb.anchor.items():
        assert torch.equal(a, SOURCE[name]) and not a.requires_grad
        assert a.data_ptr() != learn.model.get_parameter(name).data_ptr()
    kept = {t.data_ptr(): t.nbytes for d in vars(cb).values() if isinstance(d, dict) for t in d.values()}
    assert sum(kept.values()) == sum(p.nbytes for p in learn.model.encoder.parameters()) # one copy, no more

@pytest.mark.parametrize('anchor', ['start', 'source'])
@pytest.mark.parametrize('form, lam', [*((form, 1.5) for form in FORMS), ('proximal', math.inf)])
def test_the_anchor_never_moves(form, lam, anchor):
    "Nor does what it was copied from, nor the Fisher weights; there is one copy of each and no more."
    given, fisher = {n: v.clone() for n, v in SOURCE.items()}, {n: torch.rand_like(p) for n, p in Net().encoder.named_parameters()}
    weights = {n: f.clone() for n, f in fisher.items()}
    learn = learner(L2SP(lam, given if anchor == 'source' else 'start', form=form, fisher=fisher), opt=partial(SGD, mom=0.9), wd=0.1)
    start = SOURCE if anchor == 'source' else state(learn.model)
    for _ in range(2):
        fit(learn)
        assert_same(learn.l2sp.anchor, start, exact=True); assert_same(learn.l2sp.fisher, {f'encoder.{n}': f for n, f in weights.items()}, exact=True)
        kept = {t.data_ptr(): t.nbytes for d in vars(learn.l2sp).values() if isinstance(d, dict) for t in d.values()}
        assert sum(kept.values()) == 2 * sum(p.nbytes for p in learn.model.encoder.parameters())
    assert_same(given, SOURCE, exact=True); assert_same(fisher, weights, exact=True)
    assert (learn.l2sp.distance() > 0) == (lam < math.inf)

def test_distances_by_hand():
    learn = fit(learner(L2SP(1.5, SOURCE)))
    by_layer = {}
    for n, p in learn.model.encoder.named_parameters():
        layer = f'encoder.{n}'.rpartition('.')[0]
        by_layer[layer] = by_layer.get(layer, 0.) + ((p - SOURCE[f'encoder.{n}'])**2).sum().item()
    assert learn.l2sp.distance(True) == pytest.approx({layer: math.sqrt(d) for layer, d in by_layer.items()}, rel=1e-5)
    assert len({round(d, 6) for d in by_layer.values()}) == len(by_layer) # none would pass for another
    assert learn.l2sp.history[-1] == dict(epoch=1, distance=learn.l2sp.distance(), penalty=pytest.approx(1.5 * sum(by_layer.values()), rel=1e-5))

def test_anchor_and_fisher_are_where_their_parameters_are():
    "A source from the disk lies on the CPU, half of the encoder elsewhere: the device `meta`, which knows shapes only, stands for a GPU."
    model = Net()
    for i in (3, 4): model.encoder[i].to('meta')
    learn = learner(L2SP(1., SOURCE, fisher={n: torch.ones(p.shape) for n, p in model.encoder.named_parameters()}), model=model)
    learn.l2sp.bind()
    for name, p in model.encoder.named_parameters():
        for t in (learn.l2sp.anchor[f'encoder.{name}'], learn.l2sp.fisher[f'encoder.{name}']): assert (t.device, t.dtype, t.shape) == (p.device, p.dtype, p.shape)
    assert sorted({p.device.type for p in pull.params} for pull in learn.l2sp.pulls) == [{'cpu'}, {'meta'}]
    for pull in learn.l2sp.pulls: # two devices in one operation would be an error
        pull.add_gradient(); pull.shrink(0.1)
        assert all(p.grad.device == p.device == pull.square().device for p in pull.params)

@pytest.mark.parametrize('form', FORMS)
def test_a_model_in_another_precision(form):
    "The start is taken in the precision that trains; a source, and an anchor that is there already, has to have it."
    learn = learner(L2SP(1.5, form=form), batches=BATCHES64)
    learn.model.load_state_dict(SOURCE)
    learn.model.to(torch.float64)
    fit(learn)
    assert {a.dtype for a in learn.l2sp.anchor.values()} == {torch.float64}
    assert_same(learn.l2sp.anchor, {n: v.double() for n, v in SOURCE.items()}, exact=True)
    learn.model.to(torch.float32)
    with pytest.raises(AnchorError, match='encoder.0.weight torch.float64 for torch.float32'): fit(learn)

def test_parameters_of_two_precisions():
    "Each is pulled among its like, as if alone."
    class Mixed(Net):
        def forward(self, x): return self.decoder(self.encoder[0](x).double().mean((2, 3)).repeat(1, 4))
    def run(form):
        learn = learner(L2SP(1.5, form=form, scope='*'), model=Mixed(), splitter=lambda m: [list(m.parameters())])
        learn.model.decoder.double()
        with torch.no_grad(): learn.l2sp.source = {n: p + 1 for n, p in learn.model.named_parameters()}
        return learn, state(fit(learn).model)
    (learn, loss), (_, grad) = run('loss'), run('grad')
    assert {len({p.dtype for p in pull.params}) for pull in learn.l2sp.pulls} == {1} and len(learn.l2sp.pulls) == 2
    assert_same(loss, grad, atol=1e-5, rtol=1e-4)

def test_the_start_is_the_first_training():
    learn = learner(L2SP(1.))
    with learn.no_bar(), learn.no_logging(): learn.validate(); learn.get_preds(dl=learn.dls.valid)
    learn.model.load_state_dict(SOURCE) # the source, loaded after a first look
    fit(learn); fit(learn)
    assert_same(learn.l2sp.anchor, SOURCE, exact=True)
    assert [h['epoch'] for h in learn.l2sp.history] == [0, 1, 0, 1] and learn.l2sp.history[-1]['distance'] == learn.l2sp.distance() > 0

@pytest.mark.parametrize('fault, kind, name', [
    (lambda s: s.pop('0.weight'), 'missing', '0.weight'), (lambda s: s.update({'0.extra': s['0.bias']}), 'not in the network', '0.extra'),
    (lambda s: s.update({'3.weight': s['3.weight'][:2]}), 'shape', '3.weight'), (lambda s: s.update({'1.bias': s['1.bias'].double()}), 'dtype', '1.bias'),
    (lambda s: s.update({'1.bias': s['1.bias'] / 0}), 'NaN or infinite', '1.bias')])
@pytest.mark.parametrize('prefix', ['', 'encoder.'])
def test_mismatches_are_listed(fault, kind, name, prefix):
    bare = {k[8:]: v for k, v in SOURCE.items() if k.startswith('encoder.')}
    fault(bare)
    with pytest.raises(AnchorError) as e: fit(learner(L2SP(1., {prefix + k: v for k, v in bare.items()})))
    assert list(e.value.problems) == [kind] and f'encoder.{name}' in str(e.value) and kind in str(e.value)
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)

def test_all_mismatches_at_once():
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False))
    with pytest.raises(AnchorError) as e: fit(learner(L2SP(1., other)))
    assert 'encoder.0.weight (4, 3, 3, 3) for (4, 1, 3, 3)' in str(e.value) and 'encoder.3.bias' in str(e.value) and 'encoder.unused.layer.weight' in str(e.value)
    with pytest.raises(AnchorError, match='fisher does not fit'): fit(learner(L2SP(1., fisher={'0.weight': torch.ones(1)})))
    with pytest.raises(AnchorError, match='negative'): fit(learner(L2SP(1., fisher={n: -torch.ones_like(p) for n, p in Net().encoder.named_parameters()})))

def test_bad_options():
    for options, message in ((dict(lam=-1.), 'lam is a number from 0 up'), (dict(lam=math.nan), 'lam is a number'), (dict(lam=math.inf), "only with form='proximal'"),
                             (dict(lam=1., beta=-1.), 'beta is a number'), (dict(lam=1., form='l2'), 'form is one of'), (dict(lam=1., anchor='source'), 'give a module or a state dict')):
        with pytest.raises(ValueError, match=message): L2SP(**options)

def test_memory_layout_follows_the_parameters():
    model = Net().to(memory_format=torch.channels_last)
    learn = fit(learner(L2SP(1., Net(1), form='proximal'), model=model))
    assert all(a.stride() == model.get_parameter(n).stride() for n, a in learn.l2sp.anchor.items())
    model.to(memory_format=torch.contiguous_format)
    fit(learn)
    assert all(a.is_contiguous() and torch.equal(a, SOURCE[n]) for n, a in learn.l2sp.anchor.items())


# Save, load, resume

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('how', ['state_dict', 'source', 'pickle'])
def test_resume(tmp_path, form, how):
    "Two epochs, a new process, two more epochs: as four at a stretch."
    opt = partial(SGD, mom=0.9)
    def new(anchor='start'):
        learn = learner(L2SP(1., anchor, form=form), opt=opt)
        learn.path = tmp_path
        return learn
    whole = fit(fit(new()), 2)
    first = fit(new())
    first.save('half')
    torch.save(first.l2sp.state_dict(), tmp_path/'anchor')
    second = new(Net() if how == 'source' else 'start')
    second.create_opt()
    second.load('half')
    if how == 'state_dict': second.l2sp.load_state_dict(torch.load(tmp_path/'anchor', weights_only=True))
    if how == 'pickle':
        learn, first.l2sp.learn = first.l2sp.learn, None
        saved = pickle.dumps(first.l2sp)
        second.remove_cb(second.l2sp)
        second.add_cb(pickle.loads(saved))
    fit(second)
    assert_same(state(whole.model), state(second.model), exact=True)
    if how != 'source': assert second.l2sp.history == whole.l2sp.history

def test_a_copied_learner_pulls_its_own_model():
    learn = fit(learner(L2SP(1., SOURCE, form='proximal')), 1)
    twin = copy.deepcopy(learn)
    before = state(learn.model)
    fit(twin, 1)
    assert_same(before, state(learn.model), exact=True)
    assert twin.l2sp.distance() != learn.l2sp.distance()
    assert twin.l2sp.distance() == pytest.approx(math.sqrt(sum(((p - SOURCE[n])**2).sum().item() for n, p in twin.model.named_parameters() if n.startswith('encoder'))), rel=1e-5)
