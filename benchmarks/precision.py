"""What bf16 autocast and channels-last memory gain: forward and backward of each colour module and encoder.

Candidates are timed in turns (`models.precision.probe`); ratios are fp32 seconds over the candidate's seconds.

    python benchmarks/precision.py [--sizes 64 96] [--threads 1 2] [--batch 16] [--repeats 5]
"""
import argparse

import torch

from medxfer_nb.models.colorize import load_backbone, new_colorizer
from medxfer_nb.models.precision import BF16_LAST, FP32, FP32_LAST, fastest, probe

PARTS = {**{name: (1, lambda name=name: new_colorizer(name)) for name in ('deconv', 'pixelshuffle', 'coloru')},
         **{name: (3, lambda name=name: load_backbone(name)) for name in ('tf_efficientnet_lite0', 'resnet18', 'densenet121')}}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sizes', type=int, nargs='+', default=[64, 96])
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--parts', nargs='+', default=list(PARTS), choices=list(PARTS))
    a = parser.parse_args()
    print(f'{"part":22s} threads size {"fp32":>9s} {"fp32 c.l.":>15s} {"bf16 c.l.":>15s}  fastest')
    for threads in a.threads:
        torch.set_num_threads(threads)
        for name in a.parts:
            channels, build = PARTS[name]
            part = build()
            for size in a.sizes:
                s = probe(part, (a.batch, channels, size, size), repeats=a.repeats)
                cell = lambda mode: f'{1000 * s[mode]:6.0f} ms {s[FP32] / s[mode]:4.2f}x'
                best = fastest(s)
                print(f'{name:22s} {threads:7d} {size:4d} {1000 * s[FP32]:6.0f} ms {cell(FP32_LAST):>15s} {cell(BF16_LAST):>15s}  '
                      f'{best.dtype}{" channels-last" * best.channels_last}', flush=True)
