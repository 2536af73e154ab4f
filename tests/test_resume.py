"""A run that is killed goes on from its last validation, in another process, and ends as if nothing had happened: the same bits, nothing done twice."""
import os
import shutil
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fastai.torch_core import defaults

from medxfer_nb.compare import runs as compare
from medxfer_nb.compare.trials import get_recipe, run_trial
from medxfer_nb.repro import brain_scales, brains, colorization, lesion_scales, lesions, scales
from medxfer_nb.repro.jobs import EXPERIMENTS, Processes, load_or_run, perform, plan
from medxfer_nb.repro.store import Store, hardware
from test_compare_recipes import states_equal, trial, world
from test_compare_runs import films, run as compare_run

pytestmark = pytest.mark.filterwarnings('ignore')


# Every experiment, killed by the system

TINY = dict(backbone='test_resnet', weights='random')  # Without a download
STAGE = dict(steps=6, validate_every=2)
timm_run = brain_scales.make_run(brain_scales.SCALES['smoke'], 'timm', '8%')
RUNS = {  # Name -> the run, and the step in which it is killed
    'colour module, rate by the finder': (scales.make_run(scales.SCALES['smoke'], 'color_module', 'coloru', **TINY | STAGE, lr=0.), 4),
    'encoder shared by source tasks': (lesions.source_run(lesion_scales.make_run(lesion_scales.SCALES['smoke'], 'med', **TINY, source_steps=12)), 8),
    'L2-SP': (lesion_scales.make_run(lesion_scales.SCALES['smoke'], 'nat', **TINY | STAGE, lam=.5), 5),
    'source network of T-IMM': (brains.source_run(timm_run, 'all 1:14'), 3),
    'T-IMM, in adaption': (replace(timm_run, adapt_steps=4), 4),
    'T-IMM, in fine-tuning': (replace(timm_run, seed=1), 5),
    'comparison, first candidate': (compare_run(**STAGE, trials=2), 3),
    'comparison, second candidate': (compare_run(**STAGE, trials=2, seed=1), 10)}
LAST = {run.config_key: step for run, step in RUNS.values()}


def narrow(monkeypatch):
    "Decoders of a few channels, so that checkpoints are written at once"
    for make in ('unet', 'hydra'): monkeypatch.setattr(lesions, make, partial(getattr(lesions, make), decoder_channels=(16, 16, 8, 8, 8)))


def steps_of(context, at_step):
    "A context that calls `at_step(n)` at the end of the n-th optimiser step"
    def progress(fraction, note='', steps=[0]):
        if not note:  # Other calls say something
            steps[0] += 1
            at_step(steps[0])
        context.progress(fraction, note)
    return replace(context, progress=progress)


def dying(experiment):
    "The experiment, with runs that kill their process"
    def train(config, context):
        narrow(pytest.MonkeyPatch())
        def kill(step):
            if step == LAST.get(config.config_key): os.kill(os.getpid(), signal.SIGKILL)
        return experiment.train(config, steps_of(context, kill))
    return replace(experiment, train=train, code=experiment.module)

DYING = [dying_colorization, dying_l2sp, dying_timm, dying_compare] = [dying(m.EXPERIMENT) for m in (colorization, lesions, brains, compare)]


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "On the CPU sums are the same to the bit, on as many threads as the killed processes had"
    before = torch.get_num_threads(), defaults.use_cuda
    torch.set_num_threads(1)
    defaults.use_cuda = False
    with pytest.MonkeyPatch.context() as m:
        narrow(m)
        yield
    torch.set_num_threads(before[0])
    defaults.use_cuda = before[1]


@pytest.fixture(scope='module')
def study(tmp_path_factory): return compare.write_study(tmp_path_factory.mktemp('study'), films(), ())


@pytest.fixture(scope='module')
def store(tmp_path_factory): return Store(tmp_path_factory.mktemp('whole'))


@pytest.fixture(scope='module')
def killed(tmp_path_factory, store, study):
    "A store in which every run was killed in its own process"
    load_or_run(brains.parents(timm_run), store, progress=None, strict=True)
    folder = tmp_path_factory.mktemp('killed')
    shutil.copytree(store.root, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as m:
        for e in DYING: m.setitem(EXPERIMENTS, e.config.paper, f'test_resume:dying_{e.config.paper}')
        processes = Processes(Store(folder), study, hardware()['cores'])  # So that each has one thread
        ended = load_or_run([run for run, _ in RUNS.values()], Store(folder), data_root=study, progress=None, executor=processes)
    assert not list(ended) and len(ended.failures) == len(RUNS)
    assert all('SIGKILL' in o.message for o in ended.failures), ended.summary()
    return Store(folder)


def counted(run, store, study):
    "The record of a run, and how many steps were taken for it"
    job, taken = plan([run], store, study).wanted[0], []
    def progress(fraction, note=''):
        if not note: taken.append(fraction)
    return perform(job, store, study, progress), len(taken)


def facts(record): return {k: v for k, v in record.manifest['metrics'].items() if k != 'seconds'}


@pytest.mark.parametrize('name', RUNS)
def test_a_killed_run_ends_as_if_nothing_had_happened(name, store, killed, study, monkeypatch):
    run, at = RUNS[name]
    whole, steps = counted(run, store, study)
    every = steps//len(whole.history)

    taken = []
    def disk_full(self, *args, **kwargs): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m, pytest.raises(OSError):  # The second try fails at the very end
        m.setattr(Store, 'put', disk_full)
        perform(plan([run], killed, study).wanted[0], killed, study, lambda fraction, note='': note or taken.append(fraction))
    assert len(taken) == steps - (at - 1)//every*every  # From the last validation before the kill

    again, steps = counted(run, killed, study)
    assert steps == 0  # All had been trained
    assert again.key == whole.key and again.history == whole.history and facts(again) == facts(whole)
    assert states_equal(again.weights(), whole.weights())
    assert all(np.array_equal(v, again.predictions()[k], equal_nan=True) for k, v in whole.predictions().items())
    assert not list(killed.root.glob(f'staging/{again.key}'))


# Strategies of a comparison that have phases, or keep something beside their network

CASES = [('films', name) for name in ('lp_ft', 'gradual', 'l2sp', 'wise_ft', 'imm', 'timm', 'color_coloru')] + [('volumes', name) for name in ('decoder_only', 'timm')]

@pytest.mark.parametrize('kind, name', CASES)
def test_a_strategy_goes_on_in_its_phase(world, tmp_path, kind, name):
    def tried(folder, last=None):
        steps = []
        def progress(fraction, note=''):
            steps.append(fraction)
            if len(steps) == last: raise KeyboardInterrupt
        return run_trial(name, trial(world, kind, sources=2, hyper=get_recipe(name).grid[0], steps=4, every=1, folder=folder, progress=progress)), len(steps)
    whole, steps = tried(None)
    for _ in range(2):  # In the second and in the third step
        with pytest.raises(KeyboardInterrupt): tried(tmp_path, 2)
    again, left = tried(tmp_path)
    assert (steps, left) == (4, 2)
    assert states_equal(again.net.state_dict(), whole.net.state_dict()) and again.history == whole.history
    assert again.trained_parameters == whole.trained_parameters and again.score == whole.score
    assert again.notes.keys() == whole.notes.keys() and all(np.array_equal(v, again.notes[k], equal_nan=True) for k, v in whole.notes.items())
