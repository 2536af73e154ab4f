"""Merging three 3-D U-Nets of 8.3 M parameters against copying what is read and written.

Mode-IMM reads the parameters and the Fisher information of three networks and writes one: the copy moves the same six
sets of tensors, five into memory that exists and one, as the result, into new memory. The merge may take twice as long,
checks included. The peer is Eq. 2 as it is usually written: a Python loop over the state dict, whole tensors at a time.

    python benchmarks/merge.py [--turns 15] [--sources 3] [--base 16]
"""
import sys

import torch

from medxfer_nb.models.unet3d import unet3d
from medxfer_nb.transfer.merge import mean_imm, mode_imm
from turns import Race, main


def state_dict_loop(sources, fishers) -> dict:
    "The peer."
    merged = {}
    for name in sources[0]:
        above, below = 0, 0
        for theta, fisher in zip(sources, fishers):
            above = above + fisher[name]*theta[name]/len(sources)
            below = below + fisher[name]/len(sources)
        merged[name] = above/below
    return merged


def copying(sources, fishers):
    "Memory traffic of the merge without its arithmetic."
    space = {name: torch.empty_like(t) for name, t in sources[0].items()}
    def run():
        for given in (*sources[1:], *fishers):
            for name, t in given.items(): space[name].copy_(t)
        return {name: t.clone() for name, t in sources[0].items()}
    return run


def merging(a) -> Race:
    start = {name: p.detach().to(a.device) for name, p in unet3d(4, 3, base=a.base, seed=0).named_parameters()}
    sources = [{name: p + 0.01*torch.randn_like(p) for name, p in start.items()} for _ in range(a.sources)]
    fishers = [{name: torch.rand_like(p) + 1e-6 for name, p in start.items()} for _ in range(a.sources)]
    tasks = {'copy': copying(sources, fishers), 'mode-IMM': lambda: mode_imm(sources, fishers), 'mode-IMM, ancestry trusted': lambda: mode_imm(sources, fishers, ancestry='trust'),
             'mean-IMM': lambda: mean_imm(sources), 'loop over the state dict': lambda: state_dict_loop(sources, fishers)}
    dead = {name: torch.rand_like(p) < 0.1 for name, p in start.items()} # as behind units that never fire
    sparse = [{name: f.masked_fill(dead[name], 0.) for name, f in given.items()} for given in fishers]
    tasks['mode-IMM, a tenth of the Fisher 0'] = lambda: mode_imm(sources, sparse)
    merged, peer = tasks['mode-IMM'](), tasks['loop over the state dict']()
    for name in merged: torch.testing.assert_close(merged[name], peer[name], rtol=1e-4, atol=1e-5)
    return Race('merge', tasks, {'mode-IMM': 2.}, f'{a.sources} networks of {sum(p.numel() for p in start.values())/1e6:.1f} M parameters')


if __name__ == '__main__': sys.exit(not main(__doc__, [merging], tiny=dict(base=2), sources=3, base=16))
