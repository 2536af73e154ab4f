"""Merging three 3-D U-Nets of 8.3 M parameters against copying what is read and written.

Mode-IMM reads the parameters and the Fisher information of three networks and writes one: the copy moves the same six
sets of tensors, five into memory that exists and one, as the result, into new memory. The merge may take twice as long,
checks included. The peer is Eq. 2 as it is usually written: a Python loop over the state dict, whole tensors at a time.
All in turns that rotate; a ratio is the median of the turns' ratios to the copy.

    python benchmarks/merge.py [--turns 15] [--sources 3] [--base 16]
"""
import argparse, statistics, sys, time

import torch

from medxfer_nb.models.unet3d import unet3d
from medxfer_nb.transfer.merge import mean_imm, mode_imm

LIMIT = 2.


def state_dict_loop(sources, fishers) -> dict:
    "The peer."
    merged = {}
    for name in sources[0]:
        above, below = 0, 0
        for theta, fisher in zip(sources, fishers):
            above = above + fisher[name] * theta[name] / len(sources)
            below = below + fisher[name] / len(sources)
        merged[name] = above / below
    return merged


def copying(sources, fishers):
    "Memory traffic of the merge without its arithmetic."
    space = {name: torch.empty_like(t) for name, t in sources[0].items()}
    def run():
        for given in (*sources[1:], *fishers):
            for name, t in given.items(): space[name].copy_(t)
        return {name: t.clone() for name, t in sources[0].items()}
    return run


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(turns=15, sources=3, base=16).items(): parser.add_argument(f'--{name}', type=int, default=default)
    a = parser.parse_args()
    start = {name: p.detach() for name, p in unet3d(4, 3, base=a.base, seed=0).named_parameters()}
    torch.manual_seed(0)
    sources = [{name: p + 0.01 * torch.randn_like(p) for name, p in start.items()} for _ in range(a.sources)]
    fishers = [{name: torch.rand_like(p) + 1e-6 for name, p in start.items()} for _ in range(a.sources)]
    runs = {'copy': copying(sources, fishers), 'mode-IMM': lambda: mode_imm(sources, fishers), 'mode-IMM, trusted': lambda: mode_imm(sources, fishers, ancestry='trust'),
            'mean-IMM': lambda: mean_imm(sources), 'state dict loop': lambda: state_dict_loop(sources, fishers)}
    print(f'{a.sources} networks of {sum(p.numel() for p in start.values())/1e6:.1f} M parameters, {torch.get_num_threads()} threads')
    merged, peer = runs['mode-IMM'](), runs['state dict loop']()
    for name in merged: torch.testing.assert_close(merged[name], peer[name], rtol=1e-4, atol=1e-5)
    names, turns = list(runs), []
    for turn in range(a.turns + 1):
        order = names[turn % len(names):] + names[:turn % len(names)]
        turns.append({name: seconds(runs[name]) for name in order})
    turns = turns[1:] # the first one warms up
    ratios = {name: statistics.median(t[name] / t['copy'] for t in turns) for name in names}
    for name in names: print(f'{name:18s} {1000 * statistics.median(t[name] for t in turns):8.1f} ms   ratio {ratios[name]:.2f}')
    print(f'mode-IMM over copy {ratios["mode-IMM"]:.2f} (at most {LIMIT}); over the loop {ratios["mode-IMM"] / ratios["state dict loop"]:.2f}')
    return ratios['mode-IMM'] <= LIMIT


if __name__ == '__main__': sys.exit(not main())
