"""Is the data feeding ever the bottleneck?

An epoch on films from a memory-mapped array (augmented, batch assembly included) against an epoch of the same
training steps on one repeated batch: EfficientNet-Lite0, batch 16, 64 px, interleaved. The ratio may be at most 1.05.

    python benchmarks/feeding.py
"""
import sys, tempfile, time
from pathlib import Path
from statistics import median
import numpy as np, pandas as pd, timm, torch
from torch.nn import functional as F
from medxfer_nb.data.batches import film_loaders
from medxfer_nb.data.cases import OBSERVATIONS, Cases

SIZE, BATCH, STEPS, ROUNDS, LIMIT = 64, 16, 12, 15, 1.05

def cached_films(folder, n=1000):
    "`n` films in a memory-mapped array, as data.films caches them"
    rng = np.random.default_rng(0)
    np.save(Path(folder)/'films.npy', rng.integers(0, 256, (n, SIZE, SIZE), dtype=np.uint8))
    labels = pd.DataFrame(rng.integers(0, 2, (n, 5)).astype(float), columns=OBSERVATIONS)
    frame = labels.assign(patient=[str(i) for i in range(n)], study='1')
    return Cases('films', frame, pixels=np.load(Path(folder)/'films.npy', mmap_mode='r'))

def trainer():
    "A training step: forward, backward, optimiser"
    torch.manual_seed(0)
    model = timm.create_model('tf_efficientnet_lite0', num_classes=5).to(memory_format=torch.channels_last).train()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=.9)
    def step(x, y):
        loss = F.binary_cross_entropy_with_logits(model(x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)), y)
        loss.backward()
        sgd.step()
        sgd.zero_grad()
    return step

def seconds(batches, step):
    "Wall time of one epoch"
    start = time.perf_counter()
    for x,y in batches: step(x.as_subclass(torch.Tensor), y)
    return time.perf_counter() - start

def main():
    with tempfile.TemporaryDirectory() as folder:
        cases, step = cached_films(folder), trainer()
        train = film_loaders(cases, cases, SIZE, bs=BATCH, steps_per_epoch=STEPS, device='cpu').train
        batch = train.one_batch()
        seconds([batch]*STEPS, step)
        pairs = [(seconds(train, step), seconds([batch]*STEPS, step)) for _ in range(ROUNDS)]
        feeding = median(seconds(train, lambda x, y: None) for _ in range(5)) / STEPS
    fed,repeated = (median(p) / STEPS for p in zip(*pairs))
    ratio = median(a/b for a,b in pairs)
    print(f'step on cached films {1e3*fed:.1f} ms, on one repeated batch {1e3*repeated:.1f} ms; feeding alone {1e3*feeding:.2f} ms')
    print(f'ratio {ratio:.3f} (at most {LIMIT})')
    return ratio <= LIMIT

if __name__ == '__main__': sys.exit(not main())
