"""What bf16 autocast and channels-last memory gain: forward and backward of each colour module and encoder.

No goal: `models.precision` measures on the machine that trains, and this shows why it has to.

    python benchmarks/precision.py [--size 64] [--batch 16] [--parts deconv,resnet18]
"""
import copy
import sys
from functools import partial

import torch

from medxfer_nb.models.colorize import load_backbone, new_colorizer
from medxfer_nb.models.precision import BF16_LAST, FP32, FP32_LAST, arrange, run_part
from turns import Race, main

PARTS = {**{name: (1, lambda name=name: new_colorizer(name)) for name in ('deconv', 'pixelshuffle', 'coloru')},
         **{name: (3, lambda name=name: load_backbone(name)) for name in ('tf_efficientnet_lite0', 'resnet18', 'densenet121')}}


def modes_of(a, name: str) -> Race:
    channels, build = PARTS[name]
    part, x = build(), torch.zeros(a.batch, channels, a.size, a.size, device=a.device, requires_grad=True)
    def task(mode):
        twin = arrange(copy.deepcopy(part).to(a.device), mode.channels_last)
        def run(): run_part(twin, x, mode).sum().backward()
        return run
    return Race(f'precision, {name}', {str(mode): task(mode) for mode in (FP32, FP32_LAST, BF16_LAST)}, {}, f'{a.size} px, batch {a.batch}, forward and backward')


def builders(argv: list[str]) -> list:
    "One race for each part; which ones is asked for before the rest of the command line is read."
    chosen = argv[argv.index('--parts') + 1].split(',') if '--parts' in argv[:-1] else ['resnet18'] if '--tiny' in argv else list(PARTS)
    return [partial(modes_of, name=name) for name in chosen]


if __name__ == '__main__':
    sys.exit(not main(__doc__, builders(sys.argv), tiny=dict(size=32, batch=2), size=64, batch=16, parts=','.join(PARTS)))
