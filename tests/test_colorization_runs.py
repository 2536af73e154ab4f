"""What a run of the colorization paper promises: same numbers again, a stop at NaN with its configuration, fixed means buffers too."""
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from medxfer_nb.data.films import virtual_films
from medxfer_nb.models.colorize import colorized_net
from medxfer_nb.repro import colorization
from medxfer_nb.repro.jobs import load_or_run
from medxfer_nb.repro.scales import SCALES, make_run
from medxfer_nb.repro.store import Store


@pytest.fixture
def run(): return make_run(SCALES['smoke'], 'color_module', 'coloru')


def test_same_seed_same_metrics(tmp_path, run):
    once, again = (load_or_run([run], Store(tmp_path/name), progress=None, strict=True)[0] for name in 'ab')
    assert once.metrics == again.metrics and np.array_equal(once.predictions()['scores'], again.predictions()['scores'])
    other, = load_or_run([replace(run, seed=1)], Store(tmp_path/'a'), progress=None, strict=True)
    assert not np.array_equal(other.predictions()['scores'], once.predictions()['scores'])


def test_nan_loss_stops_the_run_with_its_configuration_and_step(tmp_path, run, monkeypatch):
    class Broken(torch.nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): return self.net(x)*torch.nan
    def broken(*args, **kwargs):
        net = colorized_net(*args, **kwargs)
        net.C = torch.nn.Sequential(Broken(net.C))
        return net
    monkeypatch.setattr(colorization, 'colorized_net', broken)
    runs = load_or_run([run], Store(tmp_path), progress=None)
    (failure,) = runs.failures
    text = str(failure) + (failure.log.read_text() if getattr(failure, 'log', None) else '')
    assert not runs and 'step 0' in text and 'coloru' in text


def test_transfer_takes_T_and_E_and_leaves_them_alone(tmp_path, run):
    store = Store(tmp_path)
    source = replace(run, strategy='all')
    moved = replace(run, strategy='last_layer', dataset='virtual-hospital', source='all')
    a, b = load_or_run([source, moved], store, progress=None, strict=True)
    before, after = a.weights(), b.weights()
    shared = [k for k in after if k.startswith(('T.', 'E.'))]
    assert any(k.startswith('E.') for k in shared) and any('running_mean' in k for k in shared)
    assert all(torch.equal(before[k], after[k]) for k in shared)


def test_weights_from_a_file_where_there_is_no_network(tmp_path):
    net = timm.create_model('resnet18', num_classes=0)
    (tmp_path/'weights').mkdir()
    torch.save(net.state_dict(), tmp_path/'weights'/'resnet18.pth')
    found = colorization.imagenet_weights('resnet18', tmp_path)
    E = colorized_net('none', 'resnet18', 5, pretrained=found).E
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in E.state_dict().items())
    assert colorization.imagenet_weights('resnet18', None) is True  # timm's own download


def test_subsets_keep_the_share_of_uncertain_labels(run):
    pool = replace(run, n_pool=200, n_valid=16, n_test=16, n_train=60)
    raw = virtual_films('virtual-chest', 'train', 200, 32)
    for draw in range(3):
        part = colorization.read_films(replace(pool, draw=draw))['train']
        assert len(part) == 60 and not (part.targets == -1).any()
        for label in part.labels:
            expected = (raw.frame[label] == -1).mean()*60
            uncertain = (raw.frame[label].to_numpy()[_rows(raw, part)] == -1).sum()
            assert abs(uncertain - expected) <= 2


def _rows(raw, part):
    "Row numbers in the pool: study identifiers are unique per film in the chest cohorts."
    where = {(p, s): i for i, (p, s) in enumerate(zip(raw.frame.patient, raw.frame.study))}
    return [where[k] for k in zip(part.frame.patient, part.frame.study)]


def test_films_are_rendered_before_the_first_run_starts(run, monkeypatch):
    asked, hospital = [], replace(run, dataset='virtual-hospital')
    monkeypatch.setattr(colorization, 'virtual_films', lambda *pool, **options: asked.append(pool) or virtual_films(*pool))
    colorization.prepare([run, hospital, replace(run, seed=1)], None, print)
    made = set(asked)
    assert len(asked) == len(made) == 6  # three pools each
    asked.clear()
    colorization.read_films(hospital), colorization.input_stats(hospital, None)
    assert len(asked) == 4 and set(asked) <= made  # what a run reads was there
