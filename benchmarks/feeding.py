"""Is the data feeding ever the bottleneck?

An epoch on cached films, CT slices or brains (memory-mapped as the readers and the virtual patients cache them, batches
assembled and augmented) against an epoch of the same training steps on one repeated batch: at most 5 % more.

    python benchmarks/feeding.py [--steps 12] [--films 64] [--slices 96] [--brains 48]
"""
import atexit
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medxfer_nb.data.batches import film_loaders
from medxfer_nb.data.brain import REGIONS, Brains, brain_loaders
from medxfer_nb.data.cases import OBSERVATIONS, Cases
from medxfer_nb.data.slices import Slices, slice_loaders
from medxfer_nb.models.colorize import colorized_net
from medxfer_nb.models.precision import BF16_LAST, FP32_LAST, set_modes
from medxfer_nb.models.unet import unet, weighted_cross_entropy
from medxfer_nb.models.unet3d import choose_unet3d_mode, soft_dice_loss, unet3d
from medxfer_nb.transfer.stages import masked_bce
from turns import Race, main

LIMIT = {'cached': 1.05}


def cached(array: np.ndarray) -> np.ndarray:
    "On disk, and mapped into memory."
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    np.save(Path(folder)/'cache.npy', array)
    return np.load(Path(folder)/'cache.npy', mmap_mode='r')


def fed(what: str, train, model, loss, setting: str) -> Race:
    "The race between a loader and one of its batches."
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    batch = train.one_batch()
    def epoch(batches):
        model.train()
        for x, y in batches:
            loss(model(x), y).backward()
            optimiser.step()
            optimiser.zero_grad()
    return Race(f'feeding, {what}', {'one repeated batch': lambda: epoch([batch]*len(train)), 'cached': lambda: epoch(train)}, LIMIT, setting)


def films(a) -> Race:
    rng, n = np.random.default_rng(0), 1000
    labels = pd.DataFrame(rng.integers(0, 2, (n, 5)).astype(float), columns=OBSERVATIONS)
    cases = Cases('films', labels.assign(patient=[str(i) for i in range(n)], study='1'), pixels=cached(rng.integers(0, 256, (n, a.films, a.films), dtype=np.uint8)))
    model = set_modes(colorized_net('none', 'tf_efficientnet_lite0', 5).to(a.device), {'E': FP32_LAST})
    loader = film_loaders(cases, cases, a.films, bs=16, steps_per_epoch=a.steps, device=a.device).train
    return fed('films', loader, model, masked_bce, f'EfficientNet-Lite0, {a.films} px, batch 16')


def slices(a) -> Race:
    rng, n = np.random.default_rng(0), 60
    planes = cached(np.stack([rng.random((n, a.slices, a.slices)), rng.integers(0, 3, (n, a.slices, a.slices))], 1).astype(np.float16))  # as the virtual patients' CT is kept
    given = Slices(planes[:, 0], planes[:, 1].astype(np.uint8), np.zeros(n, int), np.arange(n), np.zeros(1, int), np.array([[n, a.slices, a.slices]]), np.ones((1, 3)))
    model = set_modes(unet('resnet18', 3).to(a.device), dict(encoder=BF16_LAST, decoder=BF16_LAST))
    loader = slice_loaders(given, given, bs=8, steps_per_epoch=a.steps, device=a.device).train
    return fed('CT slices', loader, model, weighted_cross_entropy([0.4, 1., 8.]), f'U-Net on ResNet18, {a.slices} px, batch 8, bf16')


def brains(a) -> Race:
    rng, n, side = np.random.default_rng(0), 12, (a.brains,)*3
    records = np.empty(n, np.dtype([('images', np.float16, (4, *side)), ('labels', np.uint8, side)], align=True))  # as the readers keep them
    records['images'], records['labels'] = rng.random((n, 4, *side)), rng.integers(0, 5, (n, *side))
    kept = cached(records)
    given = Brains(kept['images'], kept['labels'], np.arange(n), (1., 1., 1.), ('t1', 't1c', 't2', 'flair'))
    regions = REGIONS['tumour']
    model = choose_unet3d_mode(unet3d(4, len(regions), base=a.base, seed=0).to(a.device), (2, 4, *side), 'bf16')
    loader = brain_loaders(given, given, regions, bs=2, steps_per_epoch=a.steps, mirror=True, device=a.device).train
    return fed('3-D brains', loader, model, soft_dice_loss, f'3-D U-Net, base {a.base}, {a.brains}^3 voxels, batch 2, bf16')


if __name__ == '__main__':
    sys.exit(not main(__doc__, [films, slices, brains], tiny=dict(steps=1, films=32, slices=32, brains=24, base=2), steps=12, films=64, slices=96, brains=48, base=8))
