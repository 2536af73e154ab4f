"""Fisher information of a small 3-D U-Net over 16 cases, against one batched forward and backward pass over them.

The backends and the plain pass (the same likelihood, gradients of all weights of the batch) take the same volumes, in
turns that rotate; a ratio is the median of the turns' ratios to the plain pass. `hooks` may be at most 2. The peer is
the per-case loop.

    python benchmarks/fisher.py [--turns 7] [--cases 16] [--size 32] [--base 8] [--likelihood soft_dice] [--bf16] [--gpu]
"""
import argparse, statistics, sys, time

import torch

from medxfer_nb.models.precision import BF16_LAST
from medxfer_nb.models.unet3d import unet3d
from medxfer_nb.transfer.fisher import BACKENDS, FisherError, fisher, get_likelihood

LIMIT = 2.


def plain(net, x, y, likelihood):
    "One forward and backward pass in evaluation mode."
    net.zero_grad()
    (-sum(get_likelihood(likelihood).log_p(z, t) for z, t in zip(net.eval()(x).unbind(), y))).backward()


def seconds(task) -> float:
    if torch.cuda.is_available(): torch.cuda.synchronize()
    start = time.perf_counter()
    task()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(turns=7, cases=16, size=32, base=8).items(): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--likelihood', default='soft_dice')
    parser.add_argument('--bf16', action='store_true', help='the network computes in bf16, channels-last')
    parser.add_argument('--gpu', action='store_true')
    a = parser.parse_args()
    torch.manual_seed(0)
    net, x = unet3d(2, 7, base=a.base, seed=0), torch.rand(a.cases, 2, a.size, a.size, a.size)
    y = (torch.rand(a.cases, 7, a.size, a.size, a.size) < 0.1).float()
    if a.bf16: net, net.mode = net.to(memory_format=torch.channels_last_3d), BF16_LAST
    if a.gpu: net, x, y = net.cuda(), x.cuda(), y.cuda()
    tasks = {'plain': lambda: plain(net, x, y, a.likelihood),
             **{name: lambda name=name: fisher(net, [(x, y)], a.likelihood, backend=name) for name in BACKENDS}}
    print(f'unet3d base {a.base}, {a.cases} cases of {a.size}^3, {"bf16" if a.bf16 else "fp32"}, {torch.get_num_threads()} threads, {"GPU" if a.gpu else "CPU"}')
    for name in list(tasks): # the first turn warms up
        try: tasks[name]()
        except FisherError as e:
            print(f'{name:6s} does not apply: {str(e)[:100]}')
            del tasks[name]
    names, turns = list(tasks), []
    for turn in range(a.turns):
        order = names[turn % len(names):] + names[:turn % len(names)]
        turns.append({name: seconds(tasks[name]) for name in order})
    ratios = {name: statistics.median(t[name] / t['plain'] for t in turns) for name in names}
    for name in names: print(f'{name:6s} {1000 * statistics.median(t[name] for t in turns):8.0f} ms   ratio {ratios[name]:.2f}')
    if 'hooks' not in ratios: return False
    print(f'hooks {ratios["hooks"]:.2f} (at most {LIMIT:g})')
    return ratios['hooks'] <= LIMIT


if __name__ == '__main__': sys.exit(not main())
