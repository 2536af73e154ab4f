"""Segmenting whole volumes, against MONAI's sliding windows: as fast, and no more memory.

`predict_volume` with windows calls MONAI's `sliding_window_inference` itself: the first race says that what is around it
costs nothing. The second segments a CT slice by slice at the paper's size: a stream that keeps one slice's probabilities,
against MONAI's `SliceInferer`, which keeps those of the whole volume. "As fast" allows for 5 % of the clock's noise.

    python benchmarks/volume.py [--size 96] [--window 48] [--slices 24] [--pixels 384] [--backbone densenet121]

With `--ct` the whole chest CT instead, once: it may take 2 GiB above the model, reading included.
"""
import resource
import sys
import time

import numpy as np
import torch

from medxfer_nb.data.assets import fetch
from medxfer_nb.data.ct import read_volume
from medxfer_nb.data.slices import resize_slices, window_to_unit
from medxfer_nb.evaluate.volumes import postprocess, stack_volume
from medxfer_nb.models.colorize import evaluating
from medxfer_nb.models.precision import BF16_LAST
from medxfer_nb.models.unet import predict_slices, unet
from medxfer_nb.models.unet3d import predict_volume, unet3d
from turns import Race, main

AS_FAST, BATCH, LIMIT = 1.05, 4, 2.  # ratio; windows or slices at once; GiB above the model


def windows(a) -> Race:
    from monai.inferers import sliding_window_inference
    net = unet3d(4, 3, base=a.base, seed=0).to(a.device).to(memory_format=torch.channels_last_3d)
    net.mode, x, roi = BF16_LAST, torch.rand(4, a.size, a.size, a.size), (a.window,)*3
    def peer():
        with evaluating(net): return sliding_window_inference(x[None], roi, BATCH, net, 0.5, mode='gaussian', sw_device=a.device, device='cpu').sigmoid()[0]
    tasks = {"MONAI's sliding_window_inference": peer, 'predict_volume': lambda: predict_volume(net, x, roi, batch=BATCH)}
    return Race('3-D volume, windows', tasks, {'predict_volume': AS_FAST}, f'3-D U-Net, base {a.base}, {a.size}^3 voxels, windows of {a.window}^3, bf16', lean=True)


def slices(a) -> Race:
    from monai.inferers import SliceInferer
    net, x = unet(a.backbone, 3).to(a.device).eval(), torch.rand(a.slices, a.pixels, a.pixels)
    inferer = SliceInferer(spatial_dim=0, roi_size=(a.pixels, a.pixels), sw_batch_size=BATCH, sw_device=a.device, device='cpu')
    def peer():
        with evaluating(net): return inferer(x[None, None], net).softmax(1)[0].argmax(0).byte().numpy()
    def ours(): return stack_volume(predict_slices(net, (x[i:i + BATCH, None] for i in range(0, len(x), BATCH))), tuple(x.shape)).labels
    tasks = {"MONAI's SliceInferer": peer, 'predict_slices': ours}
    return Race('CT, slice by slice', tasks, {'predict_slices': AS_FAST}, f'U-Net on {a.backbone}, {a.slices} slices of {a.pixels} px', lean=True)


def peak() -> float:  # GiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20


def whole_ct(size: int = 384) -> bool:
    "Reading, segmenting and post-processing the chest CT."
    net = unet('densenet121', 3).eval()
    before = peak()
    volume = read_volume(fetch('chest-ct'))
    pixels, start = resize_slices(window_to_unit(volume.image), size), time.perf_counter()
    batches = (torch.from_numpy(pixels[i:i + BATCH])[:, None] for i in range(0, len(pixels), BATCH))
    labels = postprocess(stack_volume(predict_slices(net, batches), volume.image.shape).labels, volume.spacing)
    seconds, above, whole = time.perf_counter() - start, peak() - before, 3*4*np.prod(volume.image.shape)/2**30
    print(f'{"x".join(map(str, labels.shape[::-1]))} voxels, DenseNet121 at {size} px: {seconds:.0f} s on {torch.get_num_threads()} threads; '
          f'peak {above:.2f} GiB above the model (at most {LIMIT}; the float32 probabilities alone would take {whole:.2f})')
    return above < LIMIT


if __name__ == '__main__':
    if sys.argv[1:] == ['--ct']: sys.exit(not whole_ct())
    sys.exit(not main(__doc__, [windows, slices], tiny=dict(size=32, window=24, base=2, slices=2, pixels=32, backbone='resnet18'),
                      size=96, window=48, base=8, slices=24, pixels=384, backbone='densenet121'))
