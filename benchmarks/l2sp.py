"""A training step with L2-SP against a plain one: a U-Net on DenseNet121, the penalty on its encoder.

Equal copies of one network train on the same batches in memory, in turns that rotate; a ratio is the median of the
turns' ratios to plain training. `grad` and `proximal` may be at most 1.02. The peer is the usual way to write it: a
Python loop over the parameters in the loss. Memory: the anchor is one copy of the encoder, no more.

    python benchmarks/l2sp.py [--turns 15] [--steps 2] [--size 384] [--batch 2] [--backbone densenet121]
"""
import argparse, copy, statistics, sys, time

import torch
from fastai.callback import progress # no_bar
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam

from medxfer_nb.models.precision import BF16_LAST, set_modes
from medxfer_nb.models.unet import split_encoder_decoder, unet, weighted_cross_entropy
from medxfer_nb.transfer.l2sp import L2SP

LIMIT, LAM = 1.02, 8.


class Batches(list):
    "Batches in memory."


class Stopwatch(Callback):
    "Seconds per training step of an epoch; validation and the log after it left out."
    order = -100
    def before_train(self): self.start = self.now()
    def after_train(self): self.seconds = (self.now() - self.start) / len(self.dls.train)
    def now(self) -> float:
        if torch.cuda.is_available(): torch.cuda.synchronize()
        return time.perf_counter()


class LoopInTheLoss(Callback):
    "The peer."
    run_valid = False
    def before_fit(self): self.start = {name: p.detach().clone() for name, p in self.model.encoder.named_parameters()}
    def after_loss(self):
        penalty = 0
        for name, p in self.model.encoder.named_parameters(): penalty = penalty + ((p - self.start[name])**2).sum()
        self.learn.loss_grad = self.loss_grad + LAM * penalty


def learner(model, batches, *cbs) -> Learner:
    return Learner(DataLoaders(batches, Batches(batches[:1])), copy.deepcopy(model), weighted_cross_entropy([0.4, 1., 8.]), Adam,
                   splitter=split_encoder_decoder, wd=0., cbs=[Stopwatch(), *cbs])


def seconds(learn) -> float:
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-5)
    return learn.stopwatch.seconds


def anchor_share(learn) -> float: # Bytes that the callback keeps / bytes of the encoder
    kept = {t.data_ptr(): t.nbytes for held in vars(learn.l2sp).values() if isinstance(held, dict) for t in held.values()}
    return sum(kept.values()) / sum(p.nbytes for p in learn.model.encoder.parameters())


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(turns=15, steps=2, size=384, batch=2).items(): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--backbone', default='densenet121')
    a = parser.parse_args()
    torch.manual_seed(0)
    model = set_modes(unet(a.backbone, 3), dict(encoder=BF16_LAST, decoder=BF16_LAST))
    batches = Batches((torch.rand(a.batch, 1, a.size, a.size), torch.randint(0, 3, (a.batch, a.size, a.size))) for _ in range(a.steps))
    learners = {'plain': learner(model, batches), **{form: learner(model, batches, L2SP(LAM, form=form)) for form in ('grad', 'proximal', 'loss')},
                'Python loop': learner(model, batches, LoopInTheLoss())}
    print(f'U-Net on {a.backbone}, {a.size} px, batch {a.batch}, {torch.get_num_threads()} threads, {"GPU" if torch.cuda.is_available() else "CPU"}')
    names, turns = list(learners), []
    for turn in range(a.turns + 1):
        order = names[turn % len(names):] + names[:turn % len(names)]
        turns.append({name: seconds(learners[name]) for name in order})
    turns = turns[1:] # the first one warms up
    ratios = {name: statistics.median(t[name] / t['plain'] for t in turns) for name in names}
    for name in names: print(f'{name:12s} {1000 * statistics.median(t[name] for t in turns):8.1f} ms   ratio {ratios[name]:.3f}')
    share, worst = anchor_share(learners['grad']), max(ratios['grad'], ratios['proximal'])
    print(f'worst ratio of grad and proximal {worst:.3f} (at most {LIMIT}); anchor: {share:.3f} x the encoder (at most 1)')
    return worst <= LIMIT and share <= 1


if __name__ == '__main__': sys.exit(not main())
