"""A training step with L2-SP against a plain one: a U-Net on DenseNet121, the penalty on its encoder.

Equal copies of one network train on the same batches in memory. `grad` and `proximal` may take at most 1.02 times as
long. The peer is the usual way to write it: a Python loop over the parameters in the loss. Memory: the anchor is one
copy of the encoder, no more.

    python benchmarks/l2sp.py [--turns 15] [--steps 2] [--size 384] [--batch 2] [--backbone densenet121]
"""
import copy
import sys

import torch
from fastai.callback import progress  # no_bar
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam

from medxfer_nb.models.precision import BF16_LAST, set_modes
from medxfer_nb.models.unet import split_encoder_decoder, unet, weighted_cross_entropy
from medxfer_nb.transfer.l2sp import L2SP
from turns import Batches, Race, Stopwatch, epoch_seconds, main

LAM = 8.


class LoopInTheLoss(Callback):
    "The peer."
    run_valid = False
    def before_fit(self): self.start = {name: p.detach().clone() for name, p in self.model.encoder.named_parameters()}
    def after_loss(self):
        penalty = 0
        for name, p in self.model.encoder.named_parameters(): penalty = penalty + ((p - self.start[name])**2).sum()
        self.learn.loss_grad = self.loss_grad + LAM*penalty


def learner(model, batches, *cbs) -> Learner:
    return Learner(DataLoaders(batches, Batches(batches[:1])), copy.deepcopy(model), weighted_cross_entropy([0.4, 1., 8.]), Adam,
                   splitter=split_encoder_decoder, wd=0., cbs=[Stopwatch(), *cbs])


def anchor_share(learn) -> float:  # Bytes that the callback keeps / bytes of the encoder
    kept = {t.data_ptr(): t.nbytes for held in vars(learn.l2sp).values() if isinstance(held, dict) for t in held.values()}
    return sum(kept.values())/sum(p.nbytes for p in learn.model.encoder.parameters())


def l2sp_step(a) -> Race:
    model = set_modes(unet(a.backbone, 3).to(a.device), dict(encoder=BF16_LAST, decoder=BF16_LAST))
    batches = Batches((torch.rand(a.batch, 1, a.size, a.size).to(a.device), torch.randint(0, 3, (a.batch, a.size, a.size)).to(a.device)) for _ in range(a.steps))
    def task(*cbs):
        learn = []  # made when it first runs, so that in a process of its own no other network is there
        def run():
            if not learn: learn.append(learner(model, batches, *cbs))
            seconds = epoch_seconds(learn[0], 1e-5)
            assert not hasattr(learn[0], 'l2sp') or anchor_share(learn[0]) <= 1, 'the anchor takes more memory than the encoder'
            return seconds
        return run
    tasks = {'plain step': task(), **{form: task(L2SP(LAM, form=form)) for form in ('grad', 'proximal', 'loss')}, 'loop in the loss': task(LoopInTheLoss())}
    return Race('L2-SP step', tasks, dict(grad=1.02, proximal=1.02), f'U-Net on {a.backbone}, {a.size} px, batch {a.batch}, bf16')


if __name__ == '__main__':
    sys.exit(not main(__doc__, [l2sp_step], tiny=dict(steps=1, size=32, backbone='resnet18'), steps=2, size=384, batch=2, backbone='densenet121'))
