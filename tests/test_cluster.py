"""A sweep on a real cluster, one scheduler and four workers as processes on loopback, in which whatever can end is killed: nothing is lost, nothing
finished is done twice, and the numbers are those of one run after the other."""
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal, NamedTuple

import pytest
from sklearn.datasets import load_digits

from medxfer_nb.repro import cluster as module
from medxfer_nb.repro.cluster import ClusterError, ClusterSpec, Dask, Errand, cluster_from_yaml, pack_record, receive_record
from medxfer_nb.repro.jobs import Experiment, Processes, Ticket, load_or_run, plan, register
from medxfer_nb.repro.store import Result, RunConfig, Store, digest, load_tensors, save_tensors

HERE, PATIENCE = Path(__file__).parent, 240  # Seconds, on a machine with other things to do


# The experiment: gradient descent on digits, a source and a target stage. What happens is noted in a folder; runs wait where a test wants them to

@dataclass(frozen=True, kw_only=True)
class ToyRun(RunConfig):
    paper: ClassVar[str] = 'toy'
    case: str  # The test
    stage: Literal['source', 'target'] = 'target'
    transfer: bool = True
    fault: Literal['', 'error', 'kill'] = ''
    megabytes: int = 0  # Of weights


def train(config, context):
    import torch  # Whoever only plans need not wait for it
    note(config, 'begin')
    note(config, f"gpu-{os.environ.get('CUDA_VISIBLE_DEVICES', 'none')}")
    if config.fault == 'error': raise FloatingPointError('loss is NaN at step 3')
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x, y = x[y < 5 if config.stage == 'source' else y >= 5].float()[:200] / 16, y[y < 5 if config.stage == 'source' else y >= 5][:200] % 5
    w = context.parents[0].weights()['w'] if context.parents else torch.randn(64, 5) / 8
    first, path = 0, context.folder / 'checkpoint.safetensors'
    if saved := load_tensors(path): w, first = saved[0]['w'], saved[1]['step']
    for step in range(first, 20):
        note(config, 'step')
        w = w - .5 * x.T @ ((x @ w).softmax(1) - torch.eye(5)[y]) / len(x)
        if step == 9:
            save_tensors(path, dict(w=w), dict(step=10))
            context.progress(.5)
            gate(config)
    more = dict(ballast=torch.zeros(config.megabytes, 2**18)) if config.megabytes else {}
    note(config, 'end')
    return Result(dict(accuracy=((x @ w).argmax(1) == y).float().mean().item(), norm=w.norm().item()), dict(w=w) | more)


def toys(): return Path(os.environ['TOYS'])
def note(config, what):
    with open(toys() / 'notes.txt', 'a') as f: f.write(f"{config.case} {what} {config.config_key} {os.environ.get('TOY_WORKER', '-')} {os.getpid()}\n")


class Note(NamedTuple):
    case: str
    what: str
    key: str
    worker: str
    pid: str


def notes(case, what): return [Note(*l.split()) for l in (toys() / 'notes.txt').read_text().splitlines() if l.startswith(f'{case} {what} ')]
def is_gone(note):
    "Ended, also where nobody reaps orphans"
    try: return Path(f'/proc/{note.pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except OSError: return True


def gate(config):
    "Wait if the test has shut this gate, or that of this worker"
    if config.fault == 'kill' and not (toys() / f'{config.case}.killed').exists():
        (toys() / f'{config.case}.killed').touch()
        os.kill(os.getpid(), signal.SIGKILL)
    names = (config.case, f"{config.case}-{os.environ.get('TOY_WORKER')}")
    if not any((toys() / f'{n}.shut').exists() for n in names): return
    note(config, 'gate')
    while any((toys() / f'{n}.shut').exists() for n in names): time.sleep(.02)


def parents(config): return [ToyRun(case=config.case, stage='source', seed=config.seed)] if config.stage == 'target' and config.transfer else []
def data_hash(config, data_root): return (Path(data_root) / 'cases.json').read_text() if data_root else ''
def travel(data_root): return {'cases.json': data_root / 'cases.json', 'sub/more.json': b'[]'}


EXPERIMENT = Experiment(config=ToyRun, train=train, parents=parents, data_hash=data_hash, travel=travel)
register('toy', 'test_cluster:EXPERIMENT')


def wanted(case, seeds=3): return [ToyRun(case=case, seed=s, transfer=t) for s in range(seeds) for t in (True, False)]


def sweep(case, store, address):
    "What another process does"
    load_or_run(wanted(case), store, executor=Dask(store, address=address))


# The cluster

class Cluster:
    def __init__(self, root):
        self.root, self.processes = root, {}
        os.environ['TOYS'] = str(root)
        (root / 'notes.txt').touch()
        self.scheduler = self.run('scheduler', ['distributed.cli.dask_scheduler', '--host', '127.0.0.1', '--port', '0', '--no-dashboard', '--scheduler-file', root / 'scheduler.json'])
        wait_for(lambda: (root / 'scheduler.json').exists() and (root / 'scheduler.json').read_text().endswith('}'))
        self.address = json.loads((root / 'scheduler.json').read_text())['address']
        self.complete(4)

    def run(self, name, args, **env):
        path = [*env.pop('first', []), str(HERE), str(HERE.parent), *sys.path]
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, path)), TOY_WORKER=name, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore') | env
        log = open(self.root / f'{name}.log', 'ab')
        return subprocess.Popen([sys.executable, '-m', *map(str, args)], env=env, cwd=self.root, stdout=log, stderr=log, start_new_session=True)

    def worker(self, name, *more, **env):
        args = ['distributed.cli.dask_worker', self.address, '--nthreads', 1, '--resources', 'CORES=1', '--no-nanny', '--name', name, '--no-dashboard', '--local-directory', self.root / 'scratch', *more]
        self.processes[name] = self.run(name, args, **env)

    def complete(self, n):
        "At least so many workers; a new one has to import everything again"
        for i in range(4):
            if len(self.processes) < n and f'w{i}' not in self.processes: self.worker(f'w{i}')
        wait_for(lambda: set(self.there()) >= set(self.processes))
        return self

    def there(self):
        "Names of the workers, and their addresses"
        from distributed import Client
        with Client(self.address, set_as_default=False) as client: return {w['name']: a for a, w in client.scheduler_info()['workers'].items()}

    def stop(self, name, sig=signal.SIGKILL):
        process = self.processes.pop(name)
        process.send_signal(sig)
        return process

    def close(self):
        for process in [self.scheduler, *self.processes.values()]:
            process.kill()
            process.wait()


def wait_for(condition, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.02)


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    found = Cluster(tmp_path_factory.mktemp('cluster'))
    try: yield found
    finally: found.close()


@pytest.fixture
def case(request, cluster):
    "The name of the test, a store, and a gate"
    name = request.node.name
    made = SimpleNamespace(name=name, store=Store(cluster.root / name), workers=cluster.processes, address=cluster.complete(1).address, shut=cluster.root / f'{name}.shut', lines=[])
    yield made
    made.shut.unlink(missing_ok=True)


class Sweep(threading.Thread):
    "`load_or_run` in the background"
    def __init__(self, configs, case, **options):
        super().__init__(daemon=True)
        self.configs, self.case, self.options, self.error = configs, case, options, None
        self.start()

    def run(self):
        try:
            with Dask(self.case.store, address=self.case.address, say=self.case.lines.append, **self.options) as executor:
                self.runs = load_or_run(self.configs, self.case.store, executor=executor, data_root=self.options.get('data_root'), progress=None)
        except Exception as e: self.error = e

    def result(self):
        self.join(PATIENCE)
        assert not self.is_alive()
        if self.error: raise self.error
        return self.runs


@pytest.fixture(scope='module')
def reference(cluster, tmp_path_factory):
    "The numbers of one run after the other, in this process: they depend on the seed alone"
    runs = load_or_run(wanted('reference'), tmp_path_factory.mktemp('reference') / 'store', progress=None, strict=True)
    return {(r.config.seed, r.config.transfer): r.metrics for r in runs}


def same(runs, reference): return len(runs) == 6 and not runs.failures and all(r.metrics == reference[r.config.seed, r.config.transfer] for r in runs)
def once(case, n=9): return Counter(n.key for n in notes(case.name, 'end')).most_common(1)[0][1] == 1 and len(notes(case.name, 'end')) == n


# What may happen; what ends workers comes last, so that they need not be started again

def test_four_workers_get_the_same_numbers(case, reference):
    "Sources before what starts from them, everything once, in processes of their own, with progress"
    case.shut.touch()
    sweep = Sweep(wanted(case.name), case)
    wait_for(lambda: len(notes(case.name, 'gate')) == len(case.workers))
    assert {n.worker for n in notes(case.name, 'gate')} == {'w0', 'w1', 'w2', 'w3'}
    case.shut.unlink()
    assert same(sweep.result(), reference) and once(case) and case.lines == []
    assert not list((case.store.root / 'locks').glob('*.token')) and not list((case.store.root / 'staging').iterdir())
    assert same(Sweep(wanted(case.name), case).result(), reference) and once(case)


def test_a_straggler_keeps_one_run(cluster, case, reference):
    slow = cluster.root / f'{case.name}-w3.shut'
    slow.touch()
    sweep = Sweep(wanted(case.name), case)
    wait_for(lambda: len(notes(case.name, 'end')) >= 7 and len(notes(case.name, 'gate')) == 1)  # A source that waits keeps back what starts from it
    held, = notes(case.name, 'gate')
    below = {c.config_key for c in wanted(case.name) if held.key in [p.config_key for p in parents(c)]}
    wait_for(lambda: len(notes(case.name, 'end')) == 8 - len(below))
    slow.unlink()
    assert same(sweep.result(), reference) and once(case)


def test_a_worker_with_other_code_is_refused(cluster, case, reference, tmp_path):
    text = Path(__file__).read_text()
    (tmp_path / 'test_cluster.py').write_text(text.replace('range(first, 20)', 'range(first, 21)'))
    cluster.worker('other', first=[str(tmp_path)])
    wait_for(lambda: 'other' in cluster.there())
    try:
        runs = Sweep(wanted(case.name), case).result()
        assert same(runs, reference) and once(case) and all(n.worker != 'other' for n in notes(case.name, 'begin'))
        assert len(case.lines) == 1 and case.lines[0].startswith('worker other at tcp://') and 'its code of test_cluster is another' in case.lines[0]
    finally: cluster.stop('other').wait()


def test_a_worker_of_another_python_is_sent_nothing(cluster, case, reference, monkeypatch):
    "It could not even read that"
    asked, here, other = Dask._pythons, '%d.%d' % sys.version_info[:2], cluster.there()['w0']
    with Dask(case.store, address=case.address) as d: assert d.slots() == 4 and d._pythons(set(d.workers)) == dict.fromkeys(d.workers, here)
    monkeypatch.setattr(Dask, '_pythons', lambda self, new: asked(self, new) | {a: '3.2' for a in new if a == other})
    assert same(Sweep(wanted(case.name), case).result(), reference) and once(case) and all(n.worker != 'w0' for n in notes(case.name, 'begin'))
    assert case.lines == [f'worker w0 at {other} is refused: it has python 3.2, this client has {here}: install the same version on both']


def test_a_run_on_a_gpu_has_the_one_of_its_worker(cluster, case):
    "A worker that sees two is refused. Here is none: what counts is what the run is told to use"
    for name, seen in (('one', '5'), ('two', '0,1')): cluster.worker(name, '--resources', 'CORES=1 GPU=1', CUDA_VISIBLE_DEVICES=seen)
    wait_for(lambda: {'one', 'two'} <= set(cluster.there()))
    try:
        runs = Sweep([ToyRun(case=case.name, seed=s, transfer=False) for s in range(3)], case).result()
        assert len(runs) == 3 and {n.worker for n in notes(case.name, 'begin')} == {'one'} and len(notes(case.name, 'gpu-5')) == 3
        assert len(case.lines) == 1 and case.lines[0].startswith('worker two at tcp://') and 'it sees 2 GPUs, and a run needs one for itself' in case.lines[0]
    finally:
        for name in ('one', 'two'): cluster.stop(name).wait()


def test_what_could_not_be_sent_is_sent_again(case, tmp_path, monkeypatch):
    "No fault of the run"
    (tmp_path / 'cases.json').write_text('[1, 2]')
    send, tries = Dask._send_data, []
    def flaky(self, *args):
        tries.append(args)
        if len(tries) == 1: raise OSError('the network is down')
        return send(self, *args)
    monkeypatch.setattr(Dask, '_send_data', flaky)
    runs = Sweep([ToyRun(case=case.name, transfer=False)], case, shared=False, data_root=tmp_path).result()
    assert len(runs) == 1 and len(tries) == 2 and len(notes(case.name, 'begin')) == 1
    assert len(case.lines) == 1 and 'the network is down; it is tried again' in case.lines[0]


def test_another_library_everywhere_is_an_error_before_training(case, monkeypatch):
    monkeypatch.setattr(module, 'library', lambda: dict(medxfer_nb='99.0'))
    with pytest.raises(ClusterError, match=r'no worker may train.*tcp://.*this client has 99\.0'): Sweep(wanted(case.name), case).result()
    assert notes(case.name, 'begin') == []


def test_records_travel_where_no_store_is_shared(case, reference, tmp_path):
    "And so do the data, where the experiment says that they may"
    (tmp_path / 'cases.json').write_text('[1, 2]')
    runs = Sweep(wanted(case.name), case, shared=False, data_root=tmp_path).result()
    assert same(runs, reference) and once(case) and len(case.store.keys()) == 9
    assert [r.manifest['parents'] for r in runs] == [[p.key for p in j.parents] for j in plan(wanted(case.name), case.store, tmp_path).wanted]
    more = Sweep([ToyRun(case=case.name, seed=0, megabytes=1)], case, shared=False, data_root=tmp_path).result()  # Its source is here, not there
    assert len(more) == 1 and len(notes(case.name, 'end')) == 10


def test_failures_are_told_with_the_worker_and_not_repeated(case):
    bad = [ToyRun(case=case.name, seed=7, transfer=False, fault='error'), ToyRun(case=case.name, seed=7, transfer=False, fault='kill'), ToyRun(case=case.name, seed=8, transfer=False)]
    runs = Sweep(bad, case, shared=False).result()
    assert [r.config.fault for r in runs] == [''] and len(notes(case.name, 'begin')) == 3
    told = {o.job.config.fault: o for o in runs.failures}
    assert 'on worker w' in told['error'].message and 'loss is NaN at step 3' in told['error'].message and 'SIGKILL' in told['kill'].message
    assert 'FloatingPointError' in told['error'].log.read_text()
    again, = Sweep([bad[1]], case).result()  # That one is killed only once
    assert again.config.fault == 'kill'


def test_a_missing_data_root_is_told(case, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], 'EXPERIMENT', Experiment(config=ToyRun, train=train, parents=parents, data_hash=lambda c, r: ''))
    root = tmp_path / 'data'
    runs = Sweep([ToyRun(case=case.name, transfer=False)], case, data_root=root)
    with pytest.raises(ClusterError, match='it has no folder .*data: put the data sets there'): runs.result()


@pytest.fixture
def small_disk(case):
    "A file system of 2 MB for the store"
    case.store.root.mkdir()
    mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', case.store.root], capture_output=True, text=True) if os.geteuid() == 0 else None
    if mount is None or mount.returncode: pytest.skip('a file system can only be mounted by root')
    yield case.store.root
    subprocess.run(['umount', '-l', case.store.root], check=True)


def test_a_full_disk(case, small_disk):
    "The run that does not fit fails and names the disk; the others go on; when there is space, it is made up for"
    configs = [ToyRun(case=case.name, seed=s, transfer=False, megabytes=8*(s == 0)) for s in range(4)]
    runs = Sweep(configs, case).result()
    assert [r.config.seed for r in runs] == [1, 2, 3] and f'the disk of {small_disk} is full' in runs.failures[0].message and 'make space' in runs.failures[0].message
    subprocess.run(['mount', '-o', 'remount,size=64m', small_disk], check=True)
    assert len(Sweep(configs, case).result()) == 4
    assert Counter(n.key for n in notes(case.name, 'end')) == {c.config_key: 1 + (c.seed == 0) for c in configs}


def test_a_killed_worker(cluster, case, reference):
    "Its run goes on elsewhere from the checkpoint; nothing else is done twice"
    case.shut.touch()
    sweep = Sweep(wanted(case.name), case)
    wait_for(lambda: len(notes(case.name, 'gate')) == len(case.workers))
    lost = max(case.workers)
    cluster.stop(lost).wait()
    wait_for(lambda: all(is_gone(n) for n in notes(case.name, 'gate') if n.worker == lost))  # Its job has noticed
    case.shut.unlink()
    assert same(sweep.result(), reference) and once(case)
    assert len(notes(case.name, 'begin')) == 10 and len(notes(case.name, 'step')) == 9*20
    assert len(case.lines) == 1 and 'is lost; it goes on at tcp://' in case.lines[0]


def test_a_worker_whose_time_is_over(cluster, case, reference):
    "What `--lifetime` does: its run goes on elsewhere from the checkpoint, and does not count as one that kills workers"
    from distributed import Client
    leaving = max(cluster.complete(2).processes)
    def leave(dask_worker): dask_worker.loop.add_callback(dask_worker.close_gracefully)
    case.shut.touch()
    sweep = Sweep(wanted(case.name), case, retries=0)
    wait_for(lambda: len(notes(case.name, 'gate')) == len(case.workers))
    with Client(case.address, set_as_default=False) as client: client.run(leave, workers=[cluster.there()[leaving]])
    cluster.processes.pop(leaving).wait(PATIENCE)
    case.shut.unlink()
    assert same(sweep.result(), reference) and once(case) and len(notes(case.name, 'step')) == 9*20


def test_a_killed_client(cluster, case, reference):
    "What was running is stopped; the next client goes on from there"
    case.shut.touch()
    code = f'import test_cluster as t; t.sweep({case.name!r}, {str(case.store.root)!r}, {case.address!r})'
    client = subprocess.Popen([sys.executable, '-c', code], env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(HERE), *sys.path])), stdout=subprocess.DEVNULL)
    wait_for(lambda: len(notes(case.name, 'gate')) == len(case.workers))
    client.kill()
    client.wait()
    sweep = Sweep(wanted(case.name), case)
    wait_for(lambda: len(notes(case.name, 'gate')) == 2*len(case.workers))  # Their locks are free again
    case.shut.unlink()
    assert same(sweep.result(), reference) and once(case) and len(notes(case.name, 'step')) == 9*20


def test_a_run_that_loses_too_many_workers_is_given_up(cluster, case):
    case.shut.touch()
    sweep = Sweep([ToyRun(case=case.name, transfer=False)], case, retries=0)
    wait_for(lambda: notes(case.name, 'gate'))
    cluster.stop(notes(case.name, 'gate')[0].worker).wait()
    failed, = sweep.result().failures
    assert 'lost 1 workers' in failed.message and 'retries=0' in failed.message and failed.job.config.label in sweep.runs.summary()


def test_a_killed_scheduler(cluster, case, reference):
    "The last test of this cluster. What is finished is stored; the error says what to do"
    first, *rest = wanted(case.name)
    Sweep([first], case).result()
    case.shut.touch()
    sweep = Sweep(wanted(case.name), case)
    wait_for(lambda: len(notes(case.name, 'gate')) == len(case.workers))
    cluster.scheduler.kill()
    with pytest.raises(ClusterError, match='connection to the scheduler at tcp://.* is lost.*repeat the command'): sweep.result()
    case.shut.unlink()
    wait_for(lambda: all(p.poll() is not None for p in cluster.processes.values()))  # Workers end with their scheduler
    with pytest.raises(ClusterError, match='no scheduler answers at tcp://.*dask scheduler'): Dask(case.store, address=case.address).connect()
    runs = load_or_run(wanted(case.name), case.store, progress=None)
    assert same(runs, reference) and once(case)


# Without a cluster

def test_a_file_that_describes_a_cluster(tmp_path):
    path = tmp_path / 'cluster.yaml'
    def read(text):
        path.write_text(text)
        return cluster_from_yaml(path)
    base = 'cores: 8\nmemory: 16GB\nqueue: long\nworkers: 3\njob_script_prologue: [module load python]\n'
    for kind, time_, line in (('slurm', '04:00:00', '#SBATCH -t 04:00:00'), ('pbs', '04:00:00', '#PBS -l walltime=04:00:00'), ('sge', '04:00:00', '#$ -l h_rt=04:00:00'), ('lsf', '04:00', '#BSUB -W 04:00')):
        spec = read(f'kind: {kind}\nwalltime: "{time_}"\n{base}')
        script = spec.job_script().splitlines()
        assert line in script and 'module load python' in script and any('long' in l for l in script) and spec.most == 3
        assert '--nthreads 1 --resources CORES=8 --lifetime 13860s --lifetime-stagger 240s' in script[-1] + script[-2]
    wrong = {'kind': 'kind: cloud', 'memory': 'kind: slurm\nworkers: 1\ncores: 2', 'cores': 'kind: slurm\nworkers: 1\ncores: many', 'walltime': 'kind: slurm\nwalltime: "30:00"\n' + base,
             'adapt': 'kind: pbs\nadapt: 5', 'gpus': 'kind: sge\ngpus: 2', 'workers': 'kind: slurm\ncores: 1\nmemory: 1GB', 'job_script_prologue': 'kind: slurm\njob_script_prologue: module load x', 'queu': 'kind: slurm\nqueu: a'}
    for key, text in wrong.items():
        with pytest.raises(ClusterError, match=f'cluster.yaml: {key}: '): read(text)


def test_without_jobqueue_a_local_cluster_still_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'dask_jobqueue', None)
    (tmp_path / 'a.yaml').write_text('kind: local\nworkers: 2\ngpus: 1\ncores: 2')
    assert cluster_from_yaml(tmp_path / 'a.yaml').worker_arguments()[:4] == ['--nthreads', '1', '--resources', 'CORES=2,GPU=1']
    (tmp_path / 'b.yaml').write_text('kind: slurm\nworkers: 2')
    with pytest.raises(ClusterError, match=r'pip install "medxfer_nb\[cluster\]"'): cluster_from_yaml(tmp_path / 'b.yaml')


def test_local_workers_take_the_gpus_that_this_process_was_given(monkeypatch):
    from distributed import Client
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,GPU-5')
    with ClusterSpec('local', workers=2, gpus=1).open() as cluster, Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=PATIENCE)
        assert sorted(client.run(os.getenv, 'CUDA_VISIBLE_DEVICES').values()) == ['4', 'GPU-5']
    with pytest.raises(ClusterError, match=r'workers: 3 with a GPU each, but 2 GPUs are here \(CUDA_VISIBLE_DEVICES=4,GPU-5\)'): ClusterSpec('local', workers=3, gpus=1).open()


@pytest.mark.parametrize('name', 'medxfer_nb python torch torchvision fastai timm monai numpy'.split())
def test_another_version_is_told_with_both_numbers(name):
    needed = dict(library=module.library() | {name: '0.1'}, module=__name__, hash='')
    assert module.objection(needed) == f'it has {name} {module.library()[name]}, this client has 0.1: install the same version on both'


def test_nothing_that_travels_leaves_its_folder(tmp_path):
    for name in ('/etc/passwd.json', '../up.json', 'a/../../up.json', r'a\b.json', 'C:/x.json', 'net.pkl', 'net.pth', '.bashrc', 'x.npy/..'):
        with pytest.raises(ClusterError): module.receive_piece(tmp_path / 'in', name, 0, b'x')
    assert list(tmp_path.iterdir()) == []


def test_one_machine_needs_no_dask():
    code = 'import sys, medxfer_nb.repro.cluster, medxfer_nb.repro.jobs; print([m for m in ("distributed", "dask", "torch") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    assert not getattr(Processes, 'elsewhere', False)


@pytest.fixture
def unconnected(tmp_path):
    "A client side that talks to nobody, and what it says"
    said = []
    d = Dask(Store(tmp_path), address='tcp://127.0.0.1:1', say=said.append)
    d.client, d.said, d.again, d.begun, d.handed = SimpleNamespace(scheduler=SimpleNamespace(address='tcp://head:8786')), said, [], defaultdict(list), defaultdict(int)
    return d


def test_that_no_worker_comes_is_said_once(unconnected):
    d, here = unconnected, {'tcp://a:1': dict(threads=1, gpus=0, name='a')}
    d.alone, d.looked = 100., 100. + module.PATIENCE - 1
    d._lonely()
    assert d.said == []  # Not yet
    d.looked += 2
    for _ in range(3): d._lonely()
    assert len(d.said) == 1 and 'no worker at tcp://head:8786' in d.said[0] and 'dask worker tcp://head:8786' in d.said[0]
    d.workers, d.looked = here, d.looked + 1
    d._lonely()
    d.workers, d.gpus, d.looked = here, 1, d.looked + module.PATIENCE + 1  # One without what the runs need is none
    d._lonely()
    assert len(d.said) == 2 and 'with a GPU' in d.said[1] and '--resources GPU=1' in d.said[1]


def test_nothing_is_sent_to_workers_that_are_refused(unconnected):
    d = unconnected
    d.workers = d.refused = {'tcp://a:1': dict(threads=1, gpus=0, name='a')}
    assert list(d._useful([SimpleNamespace(after=(), outcome=None)], {})) == []


@pytest.mark.parametrize('shared', [True, False])
def test_a_run_that_is_handed_back_for_ever(unconnected, shared):
    "With a shared store it goes on from its checkpoint as often as it takes; without one it would begin anew each time"
    d, t = unconnected, Ticket(SimpleNamespace(key='k', config=SimpleNamespace(label='a run')), ())
    def once():
        d.begun['k'].append('tcp://a:1')
        return d._replied(t, dict(status='again', message='its worker is leaving', worker='tcp://a:1', shared=shared))
    outcomes = [once() for _ in range(3)]
    assert outcomes[:2] == [None, None] and len(d.again) == 2 + shared
    assert all('handed back by tcp://a:1 (its worker is leaving)' in line for line in d.said) and ('from its beginning' in d.said[0]) != shared
    if shared: assert outcomes[2] is None
    else: assert outcomes[2].status == 'failed' and 'handed back 3 times' in outcomes[2].message and 'longer walltime' in outcomes[2].message


@pytest.mark.parametrize('retries', [0, 2])
def test_what_can_never_be_sent_is_given_up(unconnected, retries):
    d, t, told = unconnected, Ticket(SimpleNamespace(key='k', config=SimpleNamespace(label='a run')), ()), dict(status='undelivered', message='no way', worker='tcp://a:1')
    d.retries = retries
    for i in range(retries):
        assert d._lost(t, 'tcp://a:1') is None and d._replied(t, told) is None and len(d.again) == i + 1
    assert d._lost(t, 'tcp://a:1') is None
    outcome = d._replied(t, told)
    assert outcome.status == 'failed' and outcome.message == f'on worker tcp://a:1: no way (given up after {retries + 1} tries)'
    assert d.said == ['a run: worker tcp://a:1: no way; it is tried again']*retries  # And not that a worker is lost


def test_a_task_that_was_cancelled_with_its_parent_is_no_loss(unconnected):
    from distributed.client import FutureCancelledError
    d, t = unconnected, Ticket(SimpleNamespace(key='k', config=SimpleNamespace(label='a run')), ())
    d.client.status, d.retries = 'running', 0
    for i in range(3): assert d._replied(t, FutureCancelledError('k', 'its parent')) is None and len(d.again) == i + 1
    assert d._lost(t, 'tcp://a:1') is None and d.said == []
    assert d._replied(t, OSError('worker died')).status == 'failed'  # Other errors count


@pytest.fixture
def stored(tmp_path, monkeypatch):
    "A source, trained in another store, and the job of a target that starts from it"
    monkeypatch.setenv('TOYS', str(tmp_path))
    record, = load_or_run([ToyRun(case='stored', stage='source')], tmp_path / 'there', progress=None, strict=True)
    job, = plan([ToyRun(case='stored')], Store(tmp_path / 'here')).wanted
    return SimpleNamespace(record=record, job=job, source=job.parents[0], store=Store(tmp_path / 'here'))


def test_the_others_go_on_while_a_record_is_not_visible_yet(unconnected, stored):
    "A network file system may show for a minute that something is not there"
    d, t, reply = unconnected, Ticket(stored.source, ()), dict(status='done', seconds=1., key=stored.source.key, record=None, worker='tcp://a:1')
    d.store, d.arrivals, d.asked, d.unseen, running = stored.store, queue.SimpleQueue(), [], [], {t: module._Flight('task', None, frozenset())}
    d.arrivals.put(('task', reply))
    start = time.monotonic()
    for _ in range(2): assert d._collect(running) == [] and t in running
    assert time.monotonic() - start < 5
    receive_record(d.store, module._to_spec(stored.source), pack_record(stored.record))
    assert [o.status for o in d._collect(running)] == ['done'] and running == {}
    late = d._stored(stored.job, dict(reply, came=time.monotonic() - module.LATENCY))
    assert late.status == 'failed' and 'mount this folder on all machines under the same path' in late.message and '--store' in late.message


def test_what_a_run_starts_from_comes_with_the_reply(stored):
    "And is not sent a second time"
    errand, asked = Errand.__new__(Errand), []
    def tell(kind, keys, **more):
        asked.extend(keys)
        module.answer('task')
    errand.spec, errand.store, errand.order, errand.task, errand.shared, errand.data_root, errand.tell = module._to_spec(stored.job), stored.store, dict(data_root=None), 'task', False, None, tell
    errand.supply([dict(status='done', key=stored.source.key, record=pack_record(stored.record))])
    assert asked == [stored.job.key] and stored.store.get(stored.source.key).metrics == stored.record.metrics


@pytest.mark.parametrize('change', [dict(config=dict(case='stored', stage='source', seed=1)), dict(parents=['x']), dict(paper='other'), dict(data_hash='x')], ids=str)
def test_a_record_of_something_else_under_the_right_key_is_refused(stored, change):
    files = pack_record(stored.record)
    manifest = json.loads(files['manifest.json']) | change
    manifest.pop('sha256')
    files['manifest.json'] = json.dumps(manifest | dict(sha256=digest(manifest, 64))).encode()
    with pytest.raises(ClusterError, match='did not arrive as it was sent: it (has another configuration, or other parents|was trained on other data)'):
        receive_record(stored.store, module._to_spec(stored.source), files)
    assert stored.store.keys() == []
