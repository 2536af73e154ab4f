"""A step of T-IMM's adaption against a plain training step of the 3-D U-Net.

One network on the same batch: forward, backward and a step of Adam; in the plain step all parameters train. Adaption
may take at most 1.15 times as long. The peer is the usual way to write it: Eq. 2 tensor by tensor in differentiable
operations, so that autograd keeps their graph.

    python benchmarks/adaption.py [--turns 9] [--size 64] [--batch 2] [--base 16] [--sources 2] [--precision bf16]
"""
import sys

import torch

from medxfer_nb.models.unet3d import choose_unet3d_mode, is_shared, soft_dice_loss, unet3d
from medxfer_nb.transfer.timm import AdaptiveMerge
from turns import Race, main


class ThroughAutograd(AdaptiveMerge):
    "The peer: the same ratios and tensors, without an analytic gradient."
    def merged(self) -> dict:
        alphas, merged = self.ratios(), {}
        for name, t in zip(self.names, self.tensors):
            weights = [a*share for a, share in zip(alphas[self.unit_of[name]], t.share)]
            merged[name] = (sum(w*theta for w, theta in zip(weights, t.theta))/sum(weights)).permute(t.back)
        return merged


def step(model, x, y):
    "A training step as a function without arguments."
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-6)
    def run():
        model.train()
        opt.zero_grad()
        soft_dice_loss(model(x), y).backward()
        opt.step()
    return run


def adaption_step(a) -> Race:
    x = torch.rand(a.batch, 4, *[a.size]*3).to(a.device)
    y = torch.randint(0, 2, (a.batch, 3, *[a.size]*3)).float().to(a.device)
    def net(): return choose_unet3d_mode(unet3d(4, 3, base=a.base, seed=0).to(a.device), tuple(x.shape), a.precision)
    start = {name: p.detach().cpu() for name, p in net().named_parameters()}
    sources = [{name: p + 0.01*torch.randn_like(p) for name, p in start.items()} for _ in range(a.sources)]
    fishers = [{name: torch.rand_like(p) + 1e-6 for name, p in start.items()} for _ in range(a.sources)]
    models = {'plain step': net(), 'adaption step': AdaptiveMerge(net(), sources, fishers, is_shared), 'through autograd': ThroughAutograd(net(), sources, fishers, is_shared)}
    torch.testing.assert_close(models['adaption step'].merged(), models['through autograd'].merged(), rtol=1e-4, atol=1e-5)
    setting = f'{a.sources} sources of {sum(map(torch.Tensor.numel, start.values()))/1e6:.1f} M parameters, {a.size}^3 voxels, batch {a.batch}, {a.precision}'
    return Race('T-IMM adaption step', {name: step(model, x, y) for name, model in models.items()}, {'adaption step': 1.15}, setting)


if __name__ == '__main__':
    sys.exit(not main(__doc__, [adaption_step], tiny=dict(size=32, batch=1, base=2), size=64, batch=2, base=16, sources=2, precision='bf16'))
