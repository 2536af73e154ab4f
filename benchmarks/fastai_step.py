"""A training step of `stage_learner` against the same step in a bare PyTorch loop.

Both loops train equal copies of one network on the same batches in memory, in turns; the ratio is the median of the
turns' ratios. It may be at most 1.05.

    python benchmarks/fastai_step.py [--turns 15] [--steps 6] [--size 64] [--batch 16]
"""
import argparse, copy, statistics, sys, time

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders

from medxfer_nb.models.colorize import colorized_net
from medxfer_nb.models.precision import BF16_LAST, FP32_LAST, set_modes
from medxfer_nb.transfer.stages import KeepBest, StopOnNaN, STRATEGIES, masked_bce, stage_learner

LIMIT = 1.05


class Batches(list):
    "Batches in memory."


class Stopwatch(Callback):
    "Seconds per training step of an epoch, validation left out."
    order = -100
    def before_train(self): self.start = time.perf_counter()
    def after_train(self): self.seconds = (time.perf_counter() - self.start) / len(self.dls.train)


def bare_epoch(model, optimiser, fixed, batches) -> float:
    model.train()
    for part in fixed: getattr(model, part).eval()
    start = time.perf_counter()
    for x, y in batches:
        loss = masked_bce(model(x), y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return (time.perf_counter() - start) / len(batches)


def ratio(strategy, batches, turns) -> tuple[float, float, float]: # Seconds per step ours, bare; ratio
    model = set_modes(colorized_net('none' if strategy.name == 'baseline' else 'pixelshuffle', 'tf_efficientnet_lite0', 5), {'T': BF16_LAST, 'E': FP32_LAST})
    bare, watch = copy.deepcopy(model), Stopwatch()
    for part in strategy.fixed: getattr(bare, part).requires_grad_(False)
    optimiser = torch.optim.SGD([p for p in bare.parameters() if p.requires_grad], lr=1e-3, momentum=0.9, weight_decay=1e-4)
    learn = stage_learner(DataLoaders(batches, Batches(batches[:1])), model, strategy)
    learn.add_cbs([watch, StopOnNaN(), KeepBest()])
    ours, theirs = [], []
    for turn in range(turns + 1):
        theirs.append(bare_epoch(bare, optimiser, strategy.fixed, batches))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        ours.append(watch.seconds)
    pairs = list(zip(ours, theirs))[1:] # the first turn warms up
    return statistics.median(ours[1:]), statistics.median(theirs[1:]), statistics.median(a / b for a, b in pairs)


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(turns=15, steps=6, size=64, batch=16).items(): parser.add_argument(f'--{name}', type=int, default=default)
    a = parser.parse_args()
    torch.manual_seed(0)
    batches = Batches((torch.randn(a.batch, 1, a.size, a.size), torch.randint(0, 2, (a.batch, 5)).float()) for _ in range(a.steps))
    print(f'PixelShuffle (baseline: replicate) + EfficientNet-Lite0, {a.size} px, batch {a.batch}, {torch.get_num_threads()} threads')
    worst = 0
    for name in ('baseline', 'color_module', 'all'):
        ours, theirs, r = ratio(STRATEGIES[name], batches, a.turns)
        worst = max(worst, r)
        print(f'{name:13s} fastai {1000 * ours:7.1f} ms   bare {1000 * theirs:7.1f} ms   ratio {r:.3f}')
    print(f'worst ratio {worst:.3f} (at most {LIMIT})')
    return worst <= LIMIT


if __name__ == '__main__': sys.exit(not main())
