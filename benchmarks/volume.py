"""Segmenting a whole CT: the memory and time of streaming its slices, with the paper's network at the paper's size, beside keeping all probabilities."""
import resource, time

import numpy as np, torch

from medxfer_nb.data.assets import fetch
from medxfer_nb.data.ct import read_volume
from medxfer_nb.data.slices import resize_slices, window_to_unit
from medxfer_nb.evaluate.volumes import postprocess, stack_volume
from medxfer_nb.models.unet import predict_slices, unet

SIZE, BATCH, LIMIT = 384, 4, 2.  # px, slices at once, GiB above the model


def peak() -> float:  # GiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20


def segment(net, pixels, shape, spacing):
    batches = (torch.from_numpy(pixels[i:i + BATCH])[:, None] for i in range(0, len(pixels), BATCH))
    return postprocess(stack_volume(predict_slices(net, batches), shape).labels, spacing)


if __name__ == '__main__':
    net = unet('densenet121', 3).eval()
    before = peak()
    volume = read_volume(fetch('chest-ct'))
    pixels = resize_slices(window_to_unit(volume.image), SIZE)
    start = time.perf_counter()
    labels = segment(net, pixels, volume.image.shape, volume.spacing)
    seconds, above = time.perf_counter() - start, peak() - before
    whole = 3*4*np.prod(volume.image.shape)/2**30
    print(f'{"x".join(map(str, labels.shape[::-1]))} voxels, DenseNet121 at {SIZE} px: {seconds:.0f} s on {torch.get_num_threads()} threads; '
          f'peak {above:.2f} GiB above the model, reading included (its float32 probabilities alone would take {whole:.2f} GiB)')
    assert above < LIMIT, f'more than {LIMIT} GiB'
