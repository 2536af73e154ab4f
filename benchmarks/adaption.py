"""A step of T-IMM's adaption against a plain training step of the 3-D U-Net.

One network on the same batch: forward, backward and a step of Adam, in turns that rotate; a ratio is the median of the
turns' ratios to the plain step, in which all parameters train. Adaption may take at most 1.15 times as long. The peer
is the usual way to write it: Eq. 2 tensor by tensor in differentiable operations, so that autograd keeps their graph.

    python benchmarks/adaption.py [--turns 9] [--size 64] [--batch 2] [--base 16] [--sources 2] [--precision bf16]
"""
import argparse, statistics, sys, time

import torch
from torch.func import functional_call

from medxfer_nb.models.unet3d import choose_unet3d_mode, is_shared, soft_dice_loss, unet3d
from medxfer_nb.transfer.timm import AdaptiveMerge

LIMIT = 1.15


class ThroughAutograd(AdaptiveMerge):
    "The peer: the same ratios and tensors, without an analytic gradient."
    def merged(self) -> dict:
        alphas, merged = self.ratios(), {}
        for name, t in zip(self.names, self.tensors):
            weights = [a * share for a, share in zip(alphas[self.unit_of[name]], t.share)]
            merged[name] = (sum(w * theta for w, theta in zip(weights, t.theta)) / sum(weights)).permute(t.back)
        return merged


def step(model, x, y):
    "A training step as a function without arguments."
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-6)
    model.train()
    def run():
        opt.zero_grad()
        soft_dice_loss(model(x), y).backward()
        opt.step()
    return run


def seconds(run) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(turns=9, size=64, batch=2, base=16, sources=2).items(): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--precision', choices=('bf16', 'fp32'), default='bf16')
    a = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(0)
    x, y = torch.rand(a.batch, 4, *[a.size] * 3, device=device), torch.randint(0, 2, (a.batch, 3, *[a.size] * 3), device=device).float()
    def net(): return choose_unet3d_mode(unet3d(4, 3, base=a.base, seed=0).to(device), tuple(x.shape), a.precision)
    start = {name: p.detach().cpu() for name, p in net().named_parameters()}
    sources = [{name: p + 0.01 * torch.randn_like(p) for name, p in start.items()} for _ in range(a.sources)]
    fishers = [{name: torch.rand_like(p) + 1e-6 for name, p in start.items()} for _ in range(a.sources)]
    models = {'plain': net(), 'adaption': AdaptiveMerge(net(), sources, fishers, is_shared), 'through autograd': ThroughAutograd(net(), sources, fishers, is_shared)}
    torch.testing.assert_close(models['adaption'].merged(), models['through autograd'].merged(), rtol=1e-4, atol=1e-5)
    runs = {name: step(model, x, y) for name, model in models.items()}
    print(f'{a.sources} sources of {sum(map(torch.Tensor.numel, start.values())) / 1e6:.1f} M parameters, {a.size}^3 voxels, batch {a.batch}, {a.precision}, '
          f'{torch.get_num_threads()} threads, {device.type.upper()}')
    names, turns = list(runs), []
    for turn in range(a.turns + 1):
        order = names[turn % len(names):] + names[:turn % len(names)]
        turns.append({name: seconds(runs[name]) for name in order})
    turns = turns[1:] # the first one warms up
    ratios = {name: statistics.median(t[name] / t['plain'] for t in turns) for name in names}
    for name in names: print(f'{name:17s} {1000 * statistics.median(t[name] for t in turns):8.1f} ms   ratio {ratios[name]:.3f}')
    print(f"adaption {ratios['adaption']:.3f} (at most {LIMIT})")
    return ratios['adaption'] <= LIMIT


if __name__ == '__main__': sys.exit(not main())
