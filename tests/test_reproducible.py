"""Same lock, same seeds, same thread count: a run of each experiment, trained in two fresh processes, has the same numbers and weights to the bit."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from medxfer_nb.compare.runs import write_study
from medxfer_nb.compare.sources import parse_sources, save_source
from test_compare_runs import NET, films, run as compare_run

CHILD = '''
import hashlib, json, sys
import torch
from medxfer_nb.compare.runs import CompareRun
from medxfer_nb.repro import brain_scales, lesion_scales, scales
from medxfer_nb.repro.jobs import load_or_run
from medxfer_nb.repro.store import Store

store, study, compare = Store(sys.argv[1]), sys.argv[2], CompareRun.from_dict(json.loads(sys.argv[3]))
torch.set_num_threads(1)
runs = [scales.make_run(scales.SCALES['smoke'], 'all', 'coloru'),
        lesion_scales.make_run(lesion_scales.SCALES['smoke'], 'nat', lam=8., backbone='test_resnet', weights='random'),
        brain_scales.make_run(brain_scales.SCALES['smoke'], 'timm', '8%')]
load_or_run(runs, store, progress=None, strict=True)
load_or_run([compare], store, data_root=study, progress=None, strict=True)

def told(tensors):
    h = hashlib.sha256()
    for name in sorted(tensors):
        value = torch.as_tensor(tensors[name]).contiguous()
        h.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode() + value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b'')
    return h.hexdigest(), len(tensors)

print(json.dumps({r.key: dict(paper=r.manifest['paper'], weights=told(r.weights()), predictions=told(r.predictions()),
                              metrics={k: v for k, v in r.metrics.items() if 'seconds' not in k}, history=r.history) for r in store.records()}))
'''


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "What the records of two processes say; the order of hashes, the folder and the process differ"
    root = tmp_path_factory.mktemp('reproducible')
    torch.manual_seed(0)
    sources = parse_sources([save_source(timm.create_model(NET, num_classes=0).state_dict(), root/'base.safetensors', NET)])
    study, config = write_study(root/'study', films(), sources), compare_run('full', sources)
    children = []
    for name, order in (('first', '1'), ('second', '2')):
        (root/name).mkdir()
        args = [sys.executable, '-W', 'ignore', '-c', CHILD, root/name/'store', study, json.dumps(config.as_dict())]
        children.append(subprocess.Popen([str(a) for a in args], cwd=root/name, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                         env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONHASHSEED': order, 'PYTHONPATH': str(Path(__file__).resolve().parents[1])}))
    try: ended = [child.communicate(timeout=900) for child in children]
    finally:
        for child in children: child.kill()
    assert all(child.returncode == 0 for child in children), [err[-3000:] for _, err in ended]
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def test_each_experiment_was_trained(trained):
    assert {r['paper'] for r in trained[0].values()} == {'colorization', 'l2sp', 'timm', 'compare'}
    assert len({r['weights'][0] for r in trained[0].values()}) == len(trained[0]) and all(r['metrics'] and r['weights'][1] for r in trained[0].values())


@pytest.mark.parametrize('what', ['metrics', 'history', 'predictions', 'weights'])
def test_twice_in_a_row_the_same_to_the_bit(trained, what):
    first, second = trained
    assert first.keys() == second.keys(), 'the keys of the store differ'
    assert {k: r[what] for k, r in first.items()} == {k: r[what] for k, r in second.items()}
