"""A training step of `stage_learner` against the same step in a bare PyTorch loop.

Both loops train equal copies of one network on the same batches in memory; the learner has the callbacks of a real run.
It may take at most 1.05 times as long.

    python benchmarks/fastai_step.py [--turns 15] [--steps 6] [--size 64] [--batch 16]
"""
import copy
import sys

import torch
from fastai.data.core import DataLoaders

from medxfer_nb.models.colorize import colorized_net
from medxfer_nb.models.precision import BF16_LAST, FP32_LAST, set_modes
from medxfer_nb.transfer.stages import KeepBest, StopOnNaN, STRATEGIES, masked_bce, stage_learner
from turns import Batches, Race, Stopwatch, epoch_seconds, main


def bare_epoch(model, optimiser, fixed, batches):
    "The peer, and what a learner is measured by."
    clock = Stopwatch().now
    model.train()
    for part in fixed: getattr(model, part).eval()
    start = clock()
    for x, y in batches:
        loss = masked_bce(model(x), y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return (clock() - start)/len(batches)


def steps_of(a, strategy) -> Race:
    batches = Batches((torch.randn(a.batch, 1, a.size, a.size).to(a.device), torch.randint(0, 2, (a.batch, 5)).float().to(a.device)) for _ in range(a.steps))
    model = set_modes(colorized_net('none' if strategy.name == 'baseline' else 'pixelshuffle', 'tf_efficientnet_lite0', 5).to(a.device), {'T': BF16_LAST, 'E': FP32_LAST})
    bare = copy.deepcopy(model)
    for part in strategy.fixed: getattr(bare, part).requires_grad_(False)
    optimiser = torch.optim.SGD([p for p in bare.parameters() if p.requires_grad], lr=1e-3, momentum=0.9, weight_decay=1e-4)
    learn = stage_learner(DataLoaders(batches, Batches(batches[:1])), model, strategy)
    learn.add_cbs([Stopwatch(), StopOnNaN(), KeepBest()])
    tasks = {'bare loop': lambda: bare_epoch(bare, optimiser, strategy.fixed, batches), 'fastai with our callbacks': lambda: epoch_seconds(learn, 1e-3)}
    return Race(f'fastai step, {strategy.title}', tasks, {'fastai with our callbacks': 1.05}, f'EfficientNet-Lite0, {a.size} px, batch {a.batch}')


def baseline(a) -> Race: return steps_of(a, STRATEGIES['baseline'])
def color_module(a) -> Race: return steps_of(a, STRATEGIES['color_module'])
def everything(a) -> Race: return steps_of(a, STRATEGIES['all'])


if __name__ == '__main__':
    sys.exit(not main(__doc__, [baseline, color_module, everything], tiny=dict(steps=1, size=32, batch=8), steps=6, size=64, batch=16))
