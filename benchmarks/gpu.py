"""Training throughput at the papers' sizes, against what the device could do at most.

Images or volumes per second of forward, backward and optimiser step, for each network and precision; the floating-point
operations of a step are counted by PyTorch, the bytes it has to move at least by what each layer reads and writes. The
roof is what the device was measured to do: a large matrix product, and a copy of a large tensor; a step of `i` operations
per byte can do at most min(product, i x copy) operations per second. Feeding: the share of the time in which the device
is busy, when batches come from films on disk rather than from memory.

    python benchmarks/gpu.py [--steps 20] [--csv benchmarks/throughput.csv]      needs a CUDA device
    python benchmarks/gpu.py --device cpu --tiny                                 does it run?
"""
import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from medxfer_nb.data.batches import film_loaders
from medxfer_nb.data.cases import OBSERVATIONS, Cases
from medxfer_nb.models.colorize import colorized_net
from medxfer_nb.models.precision import BF16_LAST, FP32_LAST, Mode, set_modes
from medxfer_nb.models.unet import unet
from medxfer_nb.models.unet3d import choose_unet3d_mode, soft_dice_loss, unet3d
from medxfer_nb.transfer.stages import masked_bce
from turns import in_turns, machine, quartiles

COLOURS = ('none', 'deconv', 'pixelshuffle', 'coloru')


@dataclass(frozen=True)
class Load:
    "A network at a paper's size."
    name: str
    unit: str  # What is counted: 'images' or 'volumes'
    shape: tuple  # Of a batch
    build: Callable  # Mode -> network
    target: Callable  # -> what the loss takes
    loss: Callable


def films(backbone: str, colour: str, size: int, batch: int) -> Load:
    def build(mode): return set_modes(colorized_net(colour, backbone, 5), dict(T=mode, E=mode))
    return Load(f'{backbone}, {colour}', 'images', (batch, 1, size, size), build, lambda: torch.randint(0, 2, (batch, 5)).float(), masked_bce)


def slices(backbone: str, size: int, batch: int) -> Load:
    def build(mode): return set_modes(unet(backbone, 3), dict(encoder=mode, decoder=mode))
    return Load(f'U-Net, {backbone}', 'images', (batch, 1, size, size), build, lambda: torch.randint(0, 3, (batch, size, size)), F.cross_entropy)


def volumes(shape: tuple, base: int) -> Load:
    def build(mode): return choose_unet3d_mode(unet3d(4, 3, base=base, seed=0), (1, 4, *shape), mode.dtype)
    return Load(f'3-D U-Net, base {base}', 'volumes', (1, 4, *shape), build, lambda: torch.randint(0, 2, (1, 3, *shape)).float(), soft_dice_loss)


def loads(tiny: bool) -> list[Load]:
    if tiny: return [films('resnet18', 'pixelshuffle', 32, 2), slices('resnet18', 32, 2), volumes((32, 32, 32), 2)]
    return [films(b, c, 320, 64) for b in ('resnet18', 'densenet121') for c in COLOURS] + [slices('densenet121', 384, 8), volumes((160, 208, 160), 16)]


def wait(device: str):
    if device == 'cuda': torch.cuda.synchronize()


def seconds_of(run: Callable, device: str, repeats: int, warm_up: int = 3) -> list[float]:
    "Of each call after the first few."
    times = []
    for i in range(repeats + warm_up):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        if i >= warm_up: times.append(time.perf_counter() - start)
    return times


def roof(device: str, dtype: torch.dtype, tiny: bool) -> tuple[float, float]:  # Operations per second, bytes per second
    "What a matrix product and a copy are measured to do."
    n, size = (256, 2**20) if tiny else (8192, 2**28)
    a, b, c = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(3))
    given, to = (torch.ones(size, device=device) for _ in range(2))
    product = min(seconds_of(lambda: torch.mm(a, b, out=c), device, 7))
    return 2*n**3/product, 2*given.nbytes/min(seconds_of(lambda: to.copy_(given), device, 7))


def stepper(load: Load, mode: Mode, device: str) -> tuple[nn.Module, Callable]:
    "The network, and a training step on a batch."
    torch.manual_seed(0)
    net = load.build(mode).to(device).train()
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    def step(x, y):
        load.loss(net(x), y).backward()
        optimiser.step()
        optimiser.zero_grad()
    return net, step


def traffic(net: nn.Module, x: torch.Tensor, width: int) -> float:
    "Bytes that a step moves at least: each layer reads its input and weights and writes its output; going back, twice that."
    moved = []
    def count(layer, inputs, out):
        tensors = [t for t in (*inputs, out) if isinstance(t, torch.Tensor)]
        moved.append(width*(sum(t.numel() for t in tensors) + sum(p.numel() for p in layer.parameters(recurse=False))))
    hooks = [m.register_forward_hook(count) for m in net.modules() if not any(True for _ in m.children())]
    with torch.no_grad(): net(x)
    for h in hooks: h.remove()
    return 3.*sum(moved)


def throughput(load: Load, mode: Mode, device: str, steps: int, roofs: tuple[float, float]) -> dict:
    "A row of the table."
    net, step = stepper(load, mode, device)
    x, y = torch.rand(load.shape, device=device), load.target().to(device)
    with FlopCounterMode(display=False) as counter: step(x, y)
    flops, moved = counter.get_total_flops(), traffic(net, x, 4 if mode.dtype == 'fp32' else 2)
    if device == 'cuda': torch.cuda.reset_peak_memory_stats()
    times = seconds_of(lambda: step(x, y), device, steps)
    rates = sorted(len(x)/t for t in times)
    bound = min(roofs[0], flops/moved*roofs[1])
    return dict(network=load.name, precision=str(mode), batch=len(x), size='x'.join(map(str, load.shape[2:])), unit=load.unit,
                per_second=statistics.median(rates), low=rates[len(rates)//4], high=rates[-1 - len(rates)//4], gflop=flops/len(x)/1e9,
                tflops=flops/statistics.median(times)/1e12, roof_tflops=bound/1e12, of_roof=flops/statistics.median(times)/bound,
                peak_gib=torch.cuda.max_memory_allocated()/2**30 if device == 'cuda' else None)


def busy(load: Load, mode: Mode, device: str, steps: int, workers: int) -> float:
    "Seconds of an epoch on one repeated batch / on films from disk, augmented."
    net, step = stepper(load, mode, device)
    (batch, _, size, _), rng = load.shape, np.random.default_rng(0)
    n = max(4*batch, 16)
    frame = pd.DataFrame(rng.integers(0, 2, (n, 5)).astype(float), columns=OBSERVATIONS).assign(patient=[str(i) for i in range(n)], study='1')
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder)/'films.npy', rng.integers(0, 256, (n, size, size), dtype=np.uint8))
        cases = Cases('films', frame, pixels=np.load(Path(folder)/'films.npy', mmap_mode='r'))
        train = film_loaders(cases, cases, size, bs=batch, steps_per_epoch=steps, workers=workers, device=device).train
        x, y = train.one_batch()
        def repeated():
            for _ in range(steps): step(x, y)
        def fed():
            for x, y in train: step(x, y)
        times = in_turns({'repeated': repeated, 'fed': fed}, 3, wait=lambda: wait(device))
    return 1/quartiles(times['fed'], times['repeated'])[1]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--steps', type=int, default=20, help='timed for each row')
    parser.add_argument('--workers', type=int, default=0, help='processes that read films')
    parser.add_argument('--tiny', action='store_true', help='the smallest sizes')
    parser.add_argument('--csv', type=Path, help='where the table goes')
    a = parser.parse_args(argv)
    if a.device == 'cuda' and not torch.cuda.is_available():
        print('skipped: there is no CUDA device here; `--device cpu --tiny` shows that the code runs')
        return 0
    rows, steps = [], 1 if a.tiny else a.steps
    for mode in (BF16_LAST, FP32_LAST)[:1 if a.tiny else 2]:
        roofs = roof(a.device, torch.bfloat16 if mode is BF16_LAST else torch.float32, a.tiny)
        print(f'{mode}: a matrix product {roofs[0]/1e12:.1f} TFLOP/s, a copy {roofs[1]/1e9:.0f} GB/s', flush=True)
        for load in loads(a.tiny):
            rows.append(throughput(load, mode, a.device, steps, roofs))
            if load.unit == 'images' and not load.name.startswith('U-Net'): rows[-1]['busy'] = busy(load, mode, a.device, steps, a.workers)
    table = pd.DataFrame(rows)
    print(table.round(3).to_string(index=False))
    if a.csv:
        found = machine()
        table.assign(**{k: found[k] for k in ('gpu', 'cpu', 'cores', 'commit', 'date')}, torch=found['versions']['torch']).to_csv(a.csv, index=False)
    return 0


if __name__ == '__main__': sys.exit(main())
