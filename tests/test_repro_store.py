"What a store refuses, finds out and recovers from."
import json, math, os, pickle, subprocess, sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from medxfer_nb.repro.store import (ConfigError, Result, RunConfig, Store, code_fingerprint, damage, digest, file_hash, load_tensors,
                                    publish, published_run, published_runs, run_key, save_tensors, source_closure)


@dataclass(frozen=True, kw_only=True)
class TumourRun(RunConfig):
    paper: ClassVar[str] = 'tumours'
    penalty: float = 1.
    columns: tuple[int, ...] = (0, 1)
    note: str | None = None


CODE = dict(module='medxfer_nb.repro.store', hash='none')


def fit(config):
    "A real classifier on real patients (Wisconsin breast cancer)"
    x, y = load_breast_cancer(return_X_y=True)
    model = LogisticRegression(C=config.penalty, random_state=config.seed).fit(x[:300, config.columns], y[:300])
    scores = model.predict_proba(x[300:, config.columns])[:, 1:].astype(np.float32)
    targets = y[300:, None].astype(np.float32)
    return Result(dict(auc=roc_auc_score(targets, scores), auc_rare=math.nan, per_class={'benign': 1}), dict(coef=torch.tensor(model.coef_)),
                  dict(scores=scores, targets=targets, patients=np.arange(len(y) - 300), studies=np.arange(len(y) - 300)),
                  [dict(step=i, loss=1 / (i + 1)) for i in range(200)])


def stored(store, config):
    key = run_key(config, 'data', 'code')
    with store.running(key): return store.put(key, config, fit(config), code=CODE, data_hash='data', parents=[], threads=1, wall_s=.5)


@pytest.fixture
def store(tmp_path): return Store(tmp_path / 'store')


def test_round_trip(store):
    config, expected = TumourRun(penalty=.1), fit(TumourRun(penalty=.1))
    stored(store, config)
    record = Store(store.root).get(run_key(config, 'data', 'code'), config)
    assert record.metrics['auc'] == expected.metrics['auc'] and math.isnan(record.metrics['auc_rare'])
    assert record.history == expected.history and record.config == config
    for name, a in expected.predictions.items(): np.testing.assert_array_equal(record.predictions()[name], a)
    assert torch.equal(record.weights()['coef'], expected.state['coef'])
    (record.folder / 'model.safetensors').write_bytes(b'cut')
    with pytest.raises(ConfigError, match='gone or damaged: ask for the run again'): record.weights()


def test_manifest_holds_provenance_and_no_paths(store):
    manifest = stored(store, TumourRun()).manifest
    assert {'git', 'versions', 'seed', 'hardware', 'threads', 'data_hash', 'code', 'parents', 'wall_s', 'files', 'config', 'metrics'} <= set(manifest)
    text = json.dumps(manifest)
    assert not any(p in text for p in (str(store.root), str(Path.home()), os.getcwd(), os.uname().nodename) if len(p) > 5)  # Not '/', nor a host called 'c'
    for name, f in manifest['files'].items(): assert f['sha256'] == file_hash(store.root / 'runs' / manifest['key'] / name)


@pytest.mark.parametrize('name', ['model.safetensors', 'predictions.safetensors', 'history.json', 'manifest.json'])
@pytest.mark.parametrize('fault', ['truncate', 'flip', 'delete'])
def test_a_damaged_file_is_found_and_not_used(store, name, fault):
    record = stored(store, TumourRun())
    path = record.folder / name
    data = bytearray(path.read_bytes())
    if fault == 'truncate': path.write_bytes(data[:len(data) // 2])
    elif fault == 'flip':
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else: path.unlink()
    assert store.get(record.key) is None
    assert stored(store, TumourRun()).metrics['auc'] == record.metrics['auc']
    assert store.get(record.key) is not None
    for p in store.prune('damaged'): assert not p.exists()


def test_every_bit_of_the_manifest_counts(store):
    record = stored(store, TumourRun())
    path, rng = record.folder / 'manifest.json', np.random.default_rng(0)
    original = path.read_bytes()
    for at in rng.choice(len(original), 60, replace=False):
        data = bytearray(original)
        data[at] ^= 1 << rng.integers(7)
        path.write_bytes(data)
        assert damage(record.folder), data[max(0, at - 10):at + 10]


def test_a_run_under_another_name_is_not_used(store):
    record = stored(store, TumourRun())
    other = store.folder('runs', run_key(TumourRun(seed=1), 'data', 'code'))
    record.folder.rename(other)
    assert record.key in damage(other) and store.get(other.name) is None


class Malice:
    def __reduce__(self): return os.mkdir, ('unpickled',)


def test_a_pickle_is_never_loaded(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = stored(store, TumourRun())
    path = record.folder / 'model.safetensors'
    torch.save(dict(coef=Malice()), path)
    manifest = json.loads((record.folder / 'manifest.json').read_text())
    manifest['files'][path.name] = dict(size=path.stat().st_size, sha256=file_hash(path))  # The attacker can hash, too
    manifest.pop('sha256')
    (record.folder / 'manifest.json').write_text(json.dumps(manifest | dict(sha256=digest(manifest, 64))))
    assert store.get(record.key) is None
    for content in pickle.dumps(Malice()), b'', b'\xff' * 64:
        (tmp_path / 'checkpoint').write_bytes(content)
        assert load_tensors(tmp_path / 'checkpoint') is None
    assert not Path('unpickled').exists()


def test_a_run_without_manifest_does_not_exist(store):
    record = stored(store, TumourRun())
    (record.folder / 'manifest.json').unlink()
    assert store.keys() == [] and store.get(record.key) is None
    assert stored(store, TumourRun()).key == record.key and store.keys() == [record.key]


def test_checkpoints_keep_types_and_shared_memory(tmp_path):
    base = torch.randn(4, 4)
    tensors = dict(a=base, b=base[:2], half=base.to(torch.bfloat16), n=torch.tensor(3), empty=torch.zeros(0, 3), mask=base > 0, t=base.T)
    save_tensors(tmp_path / 'c', tensors, dict(best=math.nan, step=5))
    loaded, state = load_tensors(tmp_path / 'c')
    assert all(torch.equal(loaded[k], t) and loaded[k].dtype == t.dtype for k, t in tensors.items())
    assert state == dict(best=None, step=5)


def test_identifiers_and_paths_are_refused(store):
    with pytest.raises(ConfigError, match='identifiers'):
        store.put('k', TumourRun(), Result({}, predictions=dict(patients=np.array(['patient00001']))))
    for path in '/data/CheXpert', 'C:\\data':
        with pytest.raises(ConfigError, match='data_root'): TumourRun(note=path)


@pytest.mark.parametrize('values, match', [(dict(penalty='1'), 'number'), (dict(seed=True), 'whole number'), (dict(seed=1.5), 'whole'),
    (dict(columns=3), 'list'), (dict(columns=['a']), 'list'), (dict(sead=1), 'fields are seed, penalty, columns, note'), (dict(penalty=math.inf), 'number')])
def test_configurations_are_strict(values, match):
    with pytest.raises(ConfigError, match=match): TumourRun.from_dict(values)


def test_equal_values_of_other_types_are_the_same_configuration():
    assert TumourRun(penalty=np.float32(.5), columns=[1, 2], seed=np.int64(3)) == TumourRun(penalty=.5, columns=(1, 2), seed=3)
    assert TumourRun(penalty=2).config_key == TumourRun(penalty=2.).config_key


def test_keys_are_the_same_in_every_process():
    code = "from medxfer_nb.repro.store import RunConfig, code_fingerprint; print(RunConfig(seed=3).config_key, code_fingerprint('medxfer_nb.evaluate.stats'))"
    for seed in '1', '2':
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), PYTHONHASHSEED=seed)
        out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout.split()
        assert out == [RunConfig(seed=3).config_key, code_fingerprint('medxfer_nb.evaluate.stats')]


def test_another_default_class_or_paper_is_another_key():
    @dataclass(frozen=True, kw_only=True)
    class Other(TumourRun): pass
    @dataclass(frozen=True, kw_only=True)
    class Third(TumourRun): paper: ClassVar[str] = 'lumps'
    assert len({c().config_key for c in (TumourRun, Other, Third)}) == 3


def test_code_closure_follows_relative_and_inner_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    files = {'house/__init__.py': '', 'house/cellar/__init__.py': '', 'house/cellar/wine.py': 'def pour(): from ..attic import roof; return roof',
             'house/attic.py': 'import house.cellar.wine, numpy\nroof = 1', 'house/door.py': 'from .cellar import wine', 'house/garage.py': 'car = 1'}
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(source)
    assert set(source_closure('house.door')) == {'house.door', 'house.attic', 'house.cellar', 'house.cellar.wine'}
    with pytest.raises(ConfigError, match='no Python source'): code_fingerprint('house.window')


def test_published_results(store, tmp_path):
    configs = [TumourRun(penalty=p, seed=s) for p in (.01, 1.) for s in (0, 1)]
    path = publish([stored(store, c) for c in configs[:2]], tmp_path / 'study' / 'tumours.json')
    publish([stored(store, c) for c in configs[2:]], path)
    other = publish([stored(store, c) for c in configs[::-1]], tmp_path / 'other.json')
    assert path.read_bytes() == other.read_bytes()
    assert len(published_runs('tumours', path)) == 4 and published_runs('no-such-paper') == {}
    record, mine = published_run(configs[2], path), fit(configs[2])
    assert record.metrics['auc'] == mine.metrics['auc'] and record.code_changed
    np.testing.assert_allclose(record.predictions()['scores'], mine.predictions['scores'], rtol=5e-5)
    assert roc_auc_score(record.predictions()['targets'], record.predictions()['scores']) == pytest.approx(mine.metrics['auc'], abs=1e-4)
    assert len(record.history) == 60 and record.history[-1]['step'] == 199
    assert len(json.loads(path.read_text())['arrays']) == 4  # Scores differ by penalty only; targets shared; patients and studies are the same numbers


def test_a_changed_default_finds_no_published_result_but_a_new_option_does(store, tmp_path):
    path = publish([stored(store, TumourRun(seed=1))], tmp_path / 'tumours.json')
    def today(**options):  # The same class after an edit: what is left at its default is not part of the key
        return make_dataclass('TumourRun', [(k, type(v), v) for k, v in options.items()], bases=(TumourRun,), frozen=True, kw_only=True)(seed=1)
    assert today(penalty=2.).config_key == today(smooth=False).config_key == TumourRun(seed=1).config_key
    assert published_run(today(penalty=2.), path) is None
    assert published_run(today(smooth=False), path).metrics == published_run(TumourRun(seed=1), path).metrics


def test_sixty_published_runs_stay_small(store, tmp_path):
    rng, shared = np.random.default_rng(0), dict(targets=np.float32(np.random.default_rng(1).random((500, 5)) < .2), patients=np.arange(500), studies=np.arange(500))
    records = []
    for seed in range(60):
        scores = 1 / (1 + np.exp(-rng.normal(size=(500, 5)))).astype(np.float32)
        config = TumourRun(seed=seed)
        records.append(store.put(run_key(config, '', ''), config, Result(dict(auc=.5), {}, dict(scores=scores) | shared, fit(config).history), code=CODE))
    assert publish(records, tmp_path / 'p.json').stat().st_size < 2_000_000


def test_prune_spares_what_is_in_use(store):
    record = stored(store, TumourRun())
    code = "import sys; from medxfer_nb.repro.store import Store\nwith Store(sys.argv[1]).running(sys.argv[2]): print('held', flush=True); sys.stdin.read()"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    other = subprocess.Popen([sys.executable, '-c', code, store.root, record.key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
    assert other.stdout.readline() == 'held\n'
    assert store.prune('all') == {} and store.keys() == [record.key]
    other.communicate('')
    assert list(store.prune('stale')) == [record.folder] and store.keys() == []


@pytest.mark.parametrize('paper', ['colorization', 'lesions', 'brains'])
def test_no_run_is_keyed_by_what_only_draws_it(paper):
    closure = source_closure(f'medxfer_nb.repro.{paper}')
    assert 'medxfer_nb.evaluate.plots' not in closure and len(closure) > 5
