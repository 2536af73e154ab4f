"""An epoch of Last Layer on features that were kept, against the same epoch on images.

T and E are frozen, nothing is augmented: both give the same weights. An epoch on features, validation included, may take
at most 5 % of the time. The features themselves, computed once, are a row without a goal.

    python benchmarks/probe.py [--films 128] [--size 96] [--batch 16]
"""
import atexit
import copy
import sys

import numpy as np
import pandas as pd

from medxfer_nb.data.batches import film_loaders
from medxfer_nb.data.cases import OBSERVATIONS, Cases
from medxfer_nb.models.colorize import colorized_net
from medxfer_nb.models.precision import BF16_LAST, FP32_LAST, set_modes
from medxfer_nb.transfer.features import feature_loaders, on_features
from medxfer_nb.transfer.stages import KeepBest, SeedEpochs, StopOnNaN, stage_learner
from turns import Race, main


def films(n: int, size: int, seed: int) -> Cases:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.integers(0, 2, (n, 5)).astype(float), columns=OBSERVATIONS).assign(patient=[f'{seed}.{i}' for i in range(n)], study='1')
    return Cases('films', frame, pixels=rng.integers(0, 256, (n, size, size), dtype=np.uint8))


def last_layer(a) -> Race:
    model = set_modes(colorized_net('pixelshuffle', 'tf_efficientnet_lite0', 5).to(a.device), {'T': BF16_LAST, 'E': FP32_LAST})
    def learner():
        dls = film_loaders(films(a.films, a.size, 0), films(a.films//4, a.size, 1), a.size, bs=a.batch, augment=False, device=a.device)
        return stage_learner(dls, copy.deepcopy(model), 'last_layer')
    def epoch(learn):
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[SeedEpochs(0), StopOnNaN(), KeepBest()])
    on_images, once, kept = learner(), learner(), learner()
    block = on_features(kept)
    block.__enter__()
    atexit.register(block.__exit__, None, None, None)  # until then it lasts
    tasks = {'on images': lambda: epoch(on_images), 'on features': lambda: epoch(kept), 'the features, once': lambda: feature_loaders(once.dls, once.model) and None}
    return Race('Last Layer, an epoch', tasks, {'on features': 0.05}, f'PixelShuffle + EfficientNet-Lite0, {a.films} films of {a.size} px, batch {a.batch}')


if __name__ == '__main__':
    sys.exit(not main(__doc__, [last_layer], tiny=dict(films=8, size=32, batch=4), films=128, size=96, batch=16))
