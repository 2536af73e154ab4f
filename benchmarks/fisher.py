"""Fisher information over 16 cases, against one batched forward and backward pass over them.

The backends and the plain pass (the same likelihood, gradients of all weights of the batch) take the same cases. For a
small 3-D U-Net the one that `auto` chooses may take at most twice as long; how the three do on another network is shown
with a ResNet18 on films. The peer is the loop over the cases.

    python benchmarks/fisher.py [--turns 7] [--cases 16] [--size 32] [--base 8] [--likelihood soft_dice] [--bf16]
"""
import sys

import timm
import torch

from medxfer_nb.models.precision import BF16_LAST
from medxfer_nb.models.unet3d import unet3d
from medxfer_nb.transfer.fisher import BACKENDS, FisherError, fisher, get_likelihood
from turns import Race, main

CHOSEN = 'as auto chooses'
NAMES = {name: f'{name} over the cases' if name == 'loop' else name for name in BACKENDS}


def plain(net, x, y, likelihood):
    "One forward and backward pass in evaluation mode."
    net.zero_grad()
    (-sum(get_likelihood(likelihood).log_p(z, t) for z, t in zip(net.eval()(x).unbind(), y))).backward()


def backends(net, x, y, likelihood) -> dict:
    "The plain pass, and the backends that apply."
    chosen = fisher(net, [(x[:4], y[:4])], likelihood).backend
    tasks = {'forward and backward': lambda: plain(net, x, y, likelihood), CHOSEN: lambda: fisher(net, [(x, y)], likelihood, backend=chosen)}
    for name in BACKENDS:
        try: fisher(net, [(x[:2], y[:2])], likelihood, backend=name)
        except FisherError: continue
        tasks[NAMES[name]] = lambda name=name: fisher(net, [(x, y)], likelihood, backend=name)
    return tasks


def small_unet(a) -> Race:
    net, x = unet3d(2, 7, base=a.base, seed=0), torch.rand(a.cases, 2, a.size, a.size, a.size).to(a.device)
    y = (torch.rand(a.cases, 7, a.size, a.size, a.size) < 0.1).float().to(a.device)
    if a.bf16: net, net.mode = net.to(memory_format=torch.channels_last_3d), BF16_LAST
    return Race('Fisher, small 3-D U-Net', backends(net.to(a.device), x, y, a.likelihood), {CHOSEN: 2.}, f'base {a.base}, {a.cases} cases of {a.size}^3, {"bf16" if a.bf16 else "fp32"}')


def resnet18(a) -> Race:
    net = timm.create_model('resnet18', in_chans=1, num_classes=5).to(a.device)
    x, y = torch.rand(a.cases, 1, a.film, a.film).to(a.device), torch.randint(0, 2, (a.cases, 5)).float().to(a.device)
    return Race('Fisher, ResNet18', backends(net, x, y, 'sigmoid'), {}, f'{a.cases} films of {a.film} px, fp32')


if __name__ == '__main__':
    sys.exit(not main(__doc__, [small_unet, resnet18], tiny=dict(cases=2, size=32, base=2, film=32),
                      cases=16, size=32, base=8, likelihood='soft_dice', bf16=False, film=96))
