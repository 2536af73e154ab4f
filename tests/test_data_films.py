"Virtual films against independent implementations, and under faults"
import os, signal, subprocess, sys, time
from dataclasses import replace
import numpy as np, pytest, torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from medxfer_nb.data.cases import OBSERVATIONS
from medxfer_nb.data.films import (COHORTS, LUNGS, Scene, _rotation, draw_films, film_frame, load_anatomy, make_scene, project,
                                   render, sample, virtual_films)

CHEST = COHORTS['virtual-chest']

@pytest.fixture(scope='module')
def anatomy(): return load_anatomy()

def test_sample_is_scipys_linear_interpolation(anatomy):
    at = torch.rand(6, 5, 4, 3, generator=torch.Generator().manual_seed(0)) * anatomy.extent * .9 + anatomy.extent * .05
    index = (at / torch.tensor(anatomy.spacing) - .5).reshape(-1, 3).numpy().T
    expected = ndimage.map_coordinates(anatomy.hu.numpy(), index, order=1)
    np.testing.assert_allclose(sample(anatomy.hu, at, anatomy.extent).flatten(), expected, atol=.5)

def test_rotation_is_scipys():
    reverse = np.eye(3)[::-1] # ours is in the order z, y, x
    expected = Rotation.from_euler('ZYX', (-4, 2, -3), degrees=True).as_matrix()
    np.testing.assert_allclose(_rotation((4., 2., 3.)), reverse @ expected @ reverse, atol=1e-6)

@pytest.mark.parametrize('cohort', COHORTS)
def test_table(cohort):
    c, n = COHORTS[cohort], 4000
    frames = {split: film_frame(draw_films(c, split, n)) for split in ('train', 'valid', 'test', 'calibrate')}
    patients = [set(f['patient']) for f in frames.values()]
    assert len(set.union(*patients)) == sum(map(len, patients))
    assert frames['train'].iloc[:100].equals(film_frame(draw_films(c, 'train', 100)))
    for split, f in frames.items():
        present = (f[[f'severity_{l}' for l in c.labels]] > 0).mean()
        np.testing.assert_allclose(present, c.prevalence, atol=.04)
        assert (f[list(c.labels)] == -1).any(axis=None) == (split == 'train' and c.uncertain > 0)
        assert f.groupby('patient').size().between(1, 3).all()

def test_films_of_a_patient_are_alike_but_not_equal(anatomy):
    films = [replace(f, severity=(0.,) * 5, view='PA') for f in draw_films(CHEST, 'test', 60)]
    pair = next((a, b) for a, b in zip(films, films[1:]) if a.patient == b.patient)
    other = next(f for f in films if f.patient not in (pair[0].patient,))
    a, b, o = (project(make_scene(f, anatomy, 48).hu, 5., .3).flatten() for f in (*pair, other))
    same, different = (torch.corrcoef(torch.stack([a, x]))[0, 1] for x in (b, o))
    assert not torch.equal(a, b) and same > different

@pytest.mark.parametrize('label', OBSERVATIONS)
def test_findings_only_add_density_and_stay_in_the_chest(anatomy, label):
    film = replace(draw_films(CHEST, 'test', 1)[0], severity=(0.,) * 5, view='PA')
    plain = make_scene(film, anatomy, 48)
    found = make_scene(replace(film, severity=tuple(.8 * (l == label) for l in OBSERVATIONS)), anatomy, 48)
    before = Scene(anatomy, found.at).hu # atelectasis moves the diaphragm first
    added = found.hu - before
    assert added.min() >= -1e-3 and added.sum() > 0
    assert added[found.inside(*LUNGS) == 0].abs().max() < 1e-3
    assert torch.equal(plain.at, found.at) == (label != 'Atelectasis')

def test_size_changes_the_resolution_alone(anatomy):
    film = draw_films(CHEST, 'test', 1)[0]
    small, large = render(film, 48, anatomy).astype(float), render(film, 96, anatomy).astype(float)
    assert np.corrcoef(small.ravel(), large.reshape(48, 2, 48, 2).mean((1, 3)).ravel())[0, 1] > .99

SCRIPT = "import sys; from medxfer_nb.data.films import virtual_films as v; c = v('virtual-chest', 'test', int(sys.argv[1]), 96, cache=sys.argv[2]); print(c.fingerprint())"

def start(folder, n=12, **env):
    return subprocess.Popen([sys.executable, '-u', '-c', SCRIPT, str(n), str(folder)], stdout=subprocess.PIPE, text=True, env=dict(os.environ, **env))

def test_killed_render_leaves_nothing_half_written(tmp_path, anatomy):
    p = start(tmp_path)
    assert p.stdout.readline().startswith('rendering')
    while not list(tmp_path.glob('*.part.npy')): time.sleep(.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not [f for f in tmp_path.glob('*.npy') if '.part' not in f.name]
    cases = virtual_films('virtual-chest', 'test', 12, 96, cache=tmp_path)
    assert not list(tmp_path.glob('*.part*')) and cases.pixels.std() > 0

def test_two_processes_render_once_whatever_their_threads(tmp_path, anatomy):
    both = [start(tmp_path, OMP_NUM_THREADS=t) for t in '12']
    lines = [p.communicate()[0].splitlines() for p in both]
    assert sum(l.startswith('rendering') for ls in lines for l in ls) == 1
    assert lines[0][-1] == lines[1][-1]
    other = tmp_path/'other'
    assert virtual_films('virtual-chest', 'test', 12, 96, cache=other).fingerprint() == lines[0][-1]

@pytest.mark.parametrize('harm', ['flip', 'truncate', 'no card', 'broken card'])
def test_damaged_pool_is_rendered_again(tmp_path, harm):
    first = virtual_films('virtual-bone', 'test', 3, 32, cache=tmp_path)
    before, file = first.fingerprint(), next(tmp_path.glob('*.npy'))
    data = bytearray(file.read_bytes())
    data[-100] ^= 64
    {'flip': lambda: file.write_bytes(data), 'truncate': lambda: file.write_bytes(data[:500]),
     'no card': file.with_suffix('.json').unlink, 'broken card': lambda: file.with_suffix('.json').write_text('{')}[harm]()
    said = []
    assert virtual_films('virtual-bone', 'test', 3, 32, cache=tmp_path, progress=said.append).fingerprint() == before
    assert len(said) == 1
    assert virtual_films('virtual-bone', 'test', 3, 32, cache=tmp_path, progress=said.append).fingerprint() == before
    assert len(said) == 1

def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr('medxfer_nb.data.films.render', lambda *a: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError): virtual_films('virtual-bone', 'test', 2, 32, cache=tmp_path)
    assert not list(tmp_path.glob('*.npy')) and not list(tmp_path.glob('*.json'))
