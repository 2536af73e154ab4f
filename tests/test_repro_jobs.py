"Faults of a sweep: kills, broken runs, two processes on one store. The experiment is real: digits, a source and a target stage."
import os, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from medxfer_nb.repro import jobs
from medxfer_nb.repro.jobs import EXPERIMENTS, Experiment, Processes, RunFailed, load_or_run, plan, register
from medxfer_nb.repro.store import ConfigError, Result, RunConfig, Store, load_tensors, save_tensors


@dataclass(frozen=True, kw_only=True)
class DigitRun(RunConfig):
    paper: ClassVar[str] = 'digits'
    stage: Literal['source', 'target'] = 'target'
    transfer: bool = True
    steps: int = 40
    lr: float = .5
    fault: Literal['', 'kill', 'loop'] = ''


def data(stage):
    x, y = load_digits(return_X_y=True)
    keep = (y < 5) == (stage == 'source')
    x, y = torch.tensor(x[keep]).float() / 16, torch.tensor(y[keep]) % 5
    n = 400 if stage == 'source' else 20
    return x[:n], y[:n], x[500:], y[500:]


def train(config, context):
    "Full-batch SGD with momentum; a checkpoint every ten steps; each step is noted below `data_root`"
    if config.fault == 'kill': os.kill(os.getpid(), signal.SIGKILL)
    x, y, x_test, y_test = data(config.stage)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
    if context.parents: net.load_state_dict(context.parents[0].weights())
    optimiser, first, path = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=.9), 0, context.folder / 'checkpoint.safetensors'
    if saved := load_tensors(path):
        tensors, state = saved
        net.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith('n.')})
        for i, p in enumerate(net.parameters()): optimiser.state[p]['momentum_buffer'] = tensors[f'm.{i}']
        first = state['step']
    history = []
    for step in range(first, config.steps):
        note(context, f'step {config.config_key} {step}')
        loss = nn.functional.cross_entropy(net(x), y)
        if not torch.isfinite(loss): raise FloatingPointError(f'loss is NaN at step {step} of {config.label}')
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 9:
            momentum = {f'm.{i}': optimiser.state[p]['momentum_buffer'] for i, p in enumerate(net.parameters())}
            save_tensors(path, {f'n.{k}': v for k, v in net.state_dict().items()} | momentum, dict(step=step + 1))
            context.progress((step + 1) / config.steps, f'loss {loss:.3f}')
    with torch.no_grad(): scores = net(x_test).softmax(1)
    note(context, f'end {config.config_key}')
    return Result(dict(accuracy=(scores.argmax(1) == y_test).float().mean().item(), loss=loss.item()), net.state_dict(), dict(scores=scores.numpy()), history)


def note(context, text):
    with open(context.data_root / 'notes.txt', 'a') as f: f.write(text + '\n')
    time.sleep(float(os.environ.get('DIGITS_PAUSE', 0)))


def parents(config):
    return [DigitRun(stage='source', seed=config.seed)] if config.stage == 'target' and config.transfer else []


EXPERIMENT = Experiment(config=DigitRun, train=train, parents=parents, data_hash=lambda c, r: str(DATA), cost=lambda c: c.steps)
DATA = 1
WANTED = [DigitRun(transfer=t, seed=s) for s in range(4) for t in (False, True)]
register('digits', 'test_repro_jobs:EXPERIMENT')


def sweep(root, n=1):
    "What the other process of a test does"
    load_or_run(WANTED, Store(Path(root) / 'store'), jobs=int(n), data_root=root)


def start(root, *args, pause=.01):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), DIGITS_PAUSE=str(pause), OMP_NUM_THREADS='1')
    # In the background of a script's shell SIGINT is ignored, which a child inherits
    code = f'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import test_repro_jobs as t; t.sweep(*{[str(root), *args]!r})'
    return subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.DEVNULL, start_new_session=True)


def notes(root, kind): return [l for l in (Path(root) / 'notes.txt').read_text().splitlines() if l.startswith(kind)]


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(.02)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "So small a network only waits for its second thread"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "The sweep, undisturbed"
    root = tmp_path_factory.mktemp('reference')
    lines = []
    runs = load_or_run(WANTED, root / 'store', data_root=root, progress=lines.append)
    assert len(lines) == 12 and lines[0].startswith('run 1 of 12 · ') and 'left' in lines[0] and 'left' not in lines[-1]
    return root, runs


def test_second_call_trains_nothing(reference):
    root, runs = reference
    before = len(notes(root, 'step'))
    again = load_or_run(WANTED, root / 'store', data_root=root, progress=pytest.fail)
    assert [r.metrics for r in again] == [r.metrics for r in runs] and len(notes(root, 'step')) == before


def test_same_seed_same_metrics(reference, tmp_path):
    root, runs = reference
    torch.rand(3)  # The generator's state before a run must not matter, nor the order of runs
    again = load_or_run(WANTED[::-1], tmp_path / 'store', data_root=tmp_path, progress=None)
    assert [r.metrics for r in again[::-1]] == [r.metrics for r in runs]


def test_killed_sweep_ends_with_the_same_numbers(reference, tmp_path):
    process = start(tmp_path)
    wait_for(lambda: len(Store(tmp_path / 'store').keys()) >= 3 and list((tmp_path / 'store/staging').glob('*/checkpoint*')), process)
    process.kill()
    process.wait()
    done = Store(tmp_path / 'store').keys()
    assert 3 <= len(done) < 12
    runs = load_or_run(WANTED, tmp_path / 'store', data_root=tmp_path, progress=None)
    assert [r.metrics for r in runs] == [r.metrics for r in reference[1]]
    assert len(notes(tmp_path, 'end')) == 12  # What was finished was not done again
    assert len(notes(tmp_path, 'step')) < 12 * 40 + 12  # The one in flight went on from its checkpoint: at most ten steps twice
    assert not list((tmp_path / 'store/staging').iterdir())


def test_two_processes_share_the_work(reference, tmp_path):
    both = [start(tmp_path) for _ in range(2)]
    assert [p.wait(timeout=300) for p in both] == [0, 0]
    assert len(notes(tmp_path, 'end')) == 12 and len(notes(tmp_path, 'step')) == 12 * 40
    runs = load_or_run(WANTED, tmp_path / 'store', data_root=tmp_path, progress=pytest.fail)
    assert [r.metrics for r in runs] == [r.metrics for r in reference[1]]


def test_a_damaged_parent_is_trained_again_only_if_needed(tmp_path):
    target, source = DigitRun(seed=7), DigitRun(seed=7, stage='source')
    first, = load_or_run([target], tmp_path / 'store', data_root=tmp_path, progress=None)
    store = Store(tmp_path / 'store')
    weights = store.root / 'runs' / plan([source], store).wanted[0].key / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-8])
    assert plan([target], store).todo == ()
    store.prune('damaged')
    (first.folder / 'predictions.safetensors').write_bytes(b'')
    again, = load_or_run([target], store, data_root=tmp_path, progress=None)
    assert again.metrics == first.metrics and len(notes(tmp_path, 'end')) == 4


@pytest.mark.parametrize('executor', ['serial', 'processes'])
def test_a_failing_run_takes_only_its_descendants(tmp_path, executor, monkeypatch):
    monkeypatch.setattr(jobs, 'EXPERIMENTS', dict(EXPERIMENTS, digits='test_repro_jobs:DIVERGING'))
    store = Store(tmp_path / 'store')
    run = Processes(store, tmp_path, 2) if executor == 'processes' else None
    wanted = [DigitRun(seed=0), DigitRun(seed=1), DigitRun(seed=0, transfer=False)]
    lines = []
    runs = load_or_run(wanted, store, data_root=tmp_path, executor=run, progress=lines.append)
    assert [r.config for r in runs] == wanted[1:] and runs.find(wanted[0]) is None
    assert {(o.job.config.stage, o.status) for o in runs.failures} == {('source', 'failed'), ('target', 'skipped')}
    failed = next(o for o in runs.failures if o.status == 'failed')
    assert 'NaN at step' in failed.message and 'FloatingPointError' in failed.log.read_text() and str(failed.log) in runs.summary()
    assert sum('failed' in l or 'skipped' in l for l in lines) >= 2
    if executor == 'serial':
        with pytest.raises(RunFailed, match='2 runs were not finished'): load_or_run(wanted, store, data_root=tmp_path, progress=None, strict=True)


DIVERGING = Experiment(config=DigitRun, train=train, parents=lambda c: [DigitRun(stage='source', seed=c.seed, lr=1e30 if c.seed == 0 else .5)] if parents(c) else [])


def test_a_killed_child_is_named_and_leaves_the_others(tmp_path):
    store = Store(tmp_path / 'store')
    runs = load_or_run([DigitRun(fault='kill', transfer=False), DigitRun(transfer=False)], store, jobs=2, data_root=tmp_path, progress=None)
    assert [r.config.fault for r in runs] == [''] and 'SIGKILL' in runs.failures[0].message
    assert runs[0].manifest['threads'] == max(1, jobs.hardware()['cores'] // 2)


def test_interrupt_and_kill_leave_no_children(tmp_path):
    for sig in signal.SIGINT, signal.SIGKILL:
        root = tmp_path / sig.name
        root.mkdir()
        process = start(root, '2', pause=.5)
        wait_for(lambda: (root / 'notes.txt').exists(), process)
        process.send_signal(sig)
        assert process.wait(timeout=60) != 0
        time.sleep(2)
        before = len(notes(root, 'step'))
        time.sleep(1.2)
        assert len(notes(root, 'step')) == before


def test_the_key_covers_data_but_not_workers(tmp_path, monkeypatch):
    store = Store(tmp_path)
    key = plan([WANTED[1]], store).wanted[0].key
    monkeypatch.setattr(sys.modules[__name__], 'DATA', 2)
    assert plan([WANTED[1]], store).wanted[0].key != key
    monkeypatch.setattr(sys.modules[__name__], 'DATA', 1)
    monkeypatch.setenv('OMP_NUM_THREADS', '7')
    assert plan([WANTED[1]], store, data_root='/elsewhere').wanted[0].key == key


GARDEN = '''
from dataclasses import dataclass
from typing import ClassVar
from medxfer_nb.repro.jobs import Experiment
from medxfer_nb.repro.store import Result, RunConfig
@dataclass(frozen=True, kw_only=True)
class Plant(RunConfig): paper: ClassVar[str] = 'garden'
def train(config, context): return Result(dict(height=1.))
EXPERIMENT = Experiment(config=Plant, train=train)
'''


def test_a_process_that_imported_older_code_is_asked_to_restart(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EXPERIMENTS, 'garden', 'some_garden:EXPERIMENT')
    file, store = tmp_path / 'some_garden.py', tmp_path / 'store'
    file.write_text(GARDEN)
    from some_garden import Plant
    load_or_run([Plant()], store, progress=None, strict=True)
    file.write_text(GARDEN + '# A comment changes nothing')
    load_or_run([Plant(seed=1)], store, progress=None, strict=True)
    file.write_text(GARDEN.replace('1.', '20.'))
    with pytest.raises(ConfigError, match='some_garden changed on disk.*restart the kernel'): load_or_run([Plant()], store, progress=None)
    assert len(Store(store).keys()) == 2
    fresh, = load_or_run([Plant()], store, jobs=2, progress=None, strict=True)  # Processes import what is there now
    assert fresh.metrics == dict(height=20.)
    monkeypatch.delitem(sys.modules, 'some_garden')


def test_bad_requests():
    with pytest.raises(ConfigError, match='colorization'): plan([type('Other', (DigitRun,), dict(paper='no-such'))()], Store('nowhere'))
    with pytest.raises(ConfigError, match='1 or more'): Processes(Store('nowhere'), n=0)
    looped = Experiment(config=DigitRun, train=train, parents=lambda c: [c])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys.modules[__name__], 'EXPERIMENT', looped)
        with pytest.raises(ConfigError, match='ancestor'): plan([DigitRun()], Store('nowhere'))


def test_a_fork_that_cannot_use_the_gpu_starts_afresh(tmp_path):
    "CUDA does not survive a fork: where the fork server has touched it, the job gets an interpreter of its own"
    code = f"""
import io, json, os, sys, types
import test_repro_jobs as t
from pathlib import Path
from medxfer_nb.repro import jobs
store, root = t.Store({str(tmp_path / 'store')!r}), Path({str(tmp_path)!r})
job = jobs.plan([t.DigitRun(transfer=False, steps=10)], store, root).todo[0]
order = dict(parent=0, store=str(store.root), job=jobs._to_spec(job), experiments=jobs.EXPERIMENTS, log=str(root / 'log'), data_root=str(root))
sys.modules['torch'] = types.SimpleNamespace(cuda=types.SimpleNamespace(_is_in_bad_fork=lambda: True))  # Only a fresh interpreter finds the true one
print(os.waitstatus_to_exitcode(os.waitpid(jobs._fork(order, io.StringIO()), 0)[1]), store.get(job.key).key == job.key)
"""
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    assert subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True).stdout.strip() == '0 True'


def test_a_lost_fork_server_is_a_failure_not_a_wait(tmp_path):
    executor, told = Processes(Store(tmp_path / 'store'), tmp_path, 1), []
    def kill(running):
        if executor.server and not told: told.append(executor.server.process.kill())
    p = plan([DigitRun(transfer=False)], executor.store, tmp_path)
    outcome, = executor.gather([executor.submit(p.todo[0])], kill)
    assert outcome.status == 'failed' and 'SIGKILL' in outcome.message and executor.server is None
