"""`medxfer compare` and `medxfer predict`: what they pass on, what they refuse, and the whole way from a table to a mask of answers."""
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_compare_handover import NET, squares
from typer.testing import CliRunner

from medxfer_nb.cli import app
from medxfer_nb.compare import handover, study
from medxfer_nb.compare.design import DesignError
from medxfer_nb.compare.runs import CompareRun
from medxfer_nb.compare.sources import save_source
from medxfer_nb.models.colorize import load_backbone
from medxfer_nb.repro.jobs import Job, Ticket
from medxfer_nb.repro.store import Store

pytestmark = pytest.mark.filterwarnings('ignore')


def run(*args):
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result

@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch): monkeypatch.delenv('MEDXFER_SCHEDULER', raising=False)


@pytest.fixture
def asked(monkeypatch):
    "What the command asks of the library, which does nothing"
    calls = {}
    def compare(**arguments):
        calls['compare'] = arguments
        return SimpleNamespace(inspection=SimpleNamespace(warnings=['row 3 and row 7: the same image']), folder=arguments['out'],
                               results=None if arguments['dry_run'] else SimpleNamespace(failures=['soup@a fold 1 of 2: no memory']))
    monkeypatch.setattr(study, 'compare_strategies', compare)
    monkeypatch.setattr(handover, 'hand_over', lambda made, **arguments: calls.update(hand_over=made))
    return calls


def test_options_reach_the_library(asked, tmp_path):
    (tmp_path/'cases.csv').write_text('path,patient,mask\n')
    result = run('compare', '--data', tmp_path/'cases.csv', '--task', 'segmentation', '--source', 'imagenet:lite0', '--source', 'b.safetensors', '--strategy', 'full', '--strategy', 'l2sp',
                 '--budget', '2h', '--out', tmp_path/'out', '--labels', 'core=4,whole=1+4', '--dimension', 2, '--size', 96, '--jobs', 3, '--seed', 7)
    assert result.exit_code == 0, result.output
    given = asked['compare']
    assert given.pop('progress') and given == dict(cases=tmp_path/'cases.csv', task='segmentation', sources=('imagenet:lite0', 'b.safetensors'), strategies=['full', 'l2sp'], budget='2h',
        out=tmp_path/'out', labels=dict(core=(4,), whole=(1, 4)), dimension=2, size=96, jobs=3, seed=7, dry_run=False, cluster=None)
    assert 'hand_over' in asked and 'row 3 and row 7' in result.output and 'no memory' in result.output and 'medxfer predict' in result.output


def test_nothing_given_means_virtual_patients(asked):
    assert run('compare').exit_code == 0
    given = asked['compare']
    assert (given['cases'], given['task'], given['sources'], given['strategies'], given['labels'], given['budget']) == (None, None, (), None, None, '20min')


@pytest.mark.parametrize('typed, where', [([], 'tcp://head:8786'), (['--jobs', '3'], None)])
def test_an_exported_scheduler_is_for_commands_that_say_nothing_else(asked, monkeypatch, typed, where):
    monkeypatch.setenv('MEDXFER_SCHEDULER', 'tcp://head:8786')
    assert run('compare', *typed).exit_code == 0 and asked['compare']['cluster'] == where


@pytest.mark.parametrize('option', ['--dry-run', '--no-model'])
def test_no_model_is_trained_unasked(asked, option):
    assert run('compare', option).exit_code == 0 and 'hand_over' not in asked


@pytest.mark.parametrize('args, told', [
    (['--data', 'nothing.csv'], 'no file'), (['--data', '.'], 'no file'), (['--task', 'detection'], 'choose classification, segmentation'), (['--strategy', 'magic'], 'choose scratch'),
    (['--budget', 'soon'], '--budget'), (['--dimension', '4'], 'choose 2'), (['--jobs', '0'], '--jobs'), (['--size', '3'], '--size'), (['--labels', 'a=b'], '--labels')])
def test_wrong_arguments_are_refused_before_anything_is_read(asked, args, told):
    result = run('compare', *args)
    assert result.exit_code == 2 and told in result.output and not asked and 'Traceback' not in result.output


def test_errors_of_the_library_are_a_line(monkeypatch):
    def fails(**arguments): raise DesignError('even the least takes 3 min: give more time')
    monkeypatch.setattr(study, 'compare_strategies', fails)
    result = run('compare')
    assert result.exit_code == 1 and result.output.strip() == 'error: even the least takes 3 min: give more time'


def test_an_interruption_says_that_nothing_is_lost(monkeypatch):
    def stopped(**arguments): raise KeyboardInterrupt
    monkeypatch.setattr(study, 'compare_strategies', stopped)
    result = run('compare')
    assert result.exit_code == 130 and 'the same command goes on' in result.output


def test_help_is_there_at_once():
    "Nothing heavy is imported for it"
    code = ("import sys; from typer.testing import CliRunner; from medxfer_nb.cli import app; r = CliRunner().invoke(app, ['compare', '--help']); assert r.exit_code == 0 and '--budget' in r.output;"
            "r = CliRunner().invoke(app, ['predict', '--help']); assert 'INPUT' in r.output; assert not {'torch', 'pandas', 'fastai'} & set(sys.modules)")
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


@pytest.mark.parametrize('command', ['compare', 'predict'])
def test_every_help_has_an_example(command):
    assert f'Example: medxfer {command}' in ' '.join(run(command, '--help').output.split())


def cases_in(folder):
    "24 images of 12 patients, as a table"
    squares(folder)
    return pd.DataFrame(dict(path=[f'{i}.png' for i in range(24)], patient=[f'p{i//2}' for i in range(24)], bright=[i//2 % 2 for i in range(24)]))


@pytest.fixture
def scheduler():
    "A Dask scheduler with two workers, threads of this process; runs have processes of their own"
    from distributed import LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, protocol='tcp://', dashboard_address=None) as cluster: yield cluster.scheduler_address


@pytest.mark.parametrize('shared', [None, False], ids=['shared store', 'records travel'])
def test_a_comparison_on_a_cluster_is_that_of_one_machine(monkeypatch, tmp_path, scheduler, shared):
    "The study and the source travel where no folder is shared; the same runs, the same numbers"
    cases_in(tmp_path).to_csv(tmp_path/'cases.csv', index=False)
    weights = save_source(load_backbone(NET).state_dict(), tmp_path/'tiny.safetensors', NET)
    monkeypatch.setattr(study, 'compare_strategies', partial(study.compare_strategies, plan=dict(folds=2, repeats=1, trials=1, steps=5, bs=8), notebook=False))
    made, on_cluster = [], study.OnCluster
    monkeypatch.setattr(study, 'OnCluster', lambda *args, **kwargs: made.append(on_cluster(*args, shared=shared, **kwargs)) or made[-1])
    common = ['--data', tmp_path/'cases.csv', '--source', weights, '--strategy', 'scratch', '--strategy', 'full', '--size', 32, '--no-model']
    there, here = run('compare', *common, '--out', tmp_path/'there', '--scheduler', scheduler), run('compare', *common, '--out', tmp_path/'here', '--jobs', 1)
    assert there.exit_code == here.exit_code == 0, there.output + here.output
    assert 'the budget runs on while trainings wait for workers' in there.output and (tmp_path/'there/report.html').is_file()
    found, expected = ({r.key: r for r in Store(tmp_path/out/'store').records()} for out in ('there', 'here'))
    assert len(found) == 4 and found.keys() == expected.keys() and [e.count for e in made] == [4]  # Jobs sent
    for key in found:
        a, b = found[key].predictions(), expected[key].predictions()
        assert a.keys() == b.keys() and all(np.allclose(a[k], b[k], rtol=1e-4, atol=1e-5) for k in a)


def test_a_budget_ends_also_where_no_worker_comes(tmp_path):
    "What Dask has but no worker has begun is taken back when its time is over; the first repeat is waited for"
    from distributed import LocalCluster
    def ticket(seed):
        config = CompareRun(arm='scratch', kind='films', architecture=NET, size=32, bs=2, steps=2, validate_every=1, folds=2, fold=0, seed=seed)
        return Ticket(Job(config, f'key{seed}', (), '', dict(module='medxfer_nb.compare.runs', hash=''), 1.), ())
    left, tickets = [100.], [ticket(0), ticket(1), ticket(2)]
    def watch(running):
        left.append(left.pop() - 200)
        assert left[0] > -10_000, 'it waits for ever'
    with LocalCluster(n_workers=0, processes=False, protocol='tcp://', dashboard_address=None) as cluster, \
         study.OnCluster(tmp_path/'store', None, cluster, left=lambda: left[0], first=0, say=lambda line: None) as executor:
        ends = executor.gather(tickets, watch)
        assert [(o.job.config.seed, o.status, o.message) for o in (next(ends), next(ends))] == [(s, 'skipped', study.NO_TIME) for s in (2, 1)]
        assert tickets[0].outcome is None
        ends.close()


def test_from_a_table_to_answers(monkeypatch, tmp_path):
    "A bad row is named before anything is trained; then compare, and predict with one file that is damaged"
    rows = cases_in(tmp_path)
    rows.assign(path=rows.path.replace('3.png', '33.png')).to_csv(tmp_path/'wrong.csv', index=False)
    rows.to_csv(tmp_path/'cases.csv', index=False)
    weights = save_source(load_backbone(NET).state_dict(), tmp_path/'tiny.safetensors', NET)
    tiny = partial(study.compare_strategies, plan=dict(folds=2, repeats=2, trials=1, steps=2, bs=8), notebook=False)
    monkeypatch.setattr(study, 'compare_strategies', tiny)
    common = ['--source', weights, '--strategy', 'scratch', '--strategy', 'full', '--size', 32, '--jobs', 1, '--out', tmp_path/'out']
    result = run('compare', '--data', tmp_path/'wrong.csv', *common)
    assert result.exit_code == 1 and 'row 5' in result.output and '33.png' in result.output and not (tmp_path/'out/store').exists()
    result = run('compare', '--data', tmp_path/'cases.csv', *common)
    assert result.exit_code == 0, result.output
    assert (tmp_path/'out/report.html').is_file() and (tmp_path/'out/model/card.json').is_file()
    (tmp_path/'cut.png').write_bytes(b'\x89PNG')
    for more in ([], ['--program']):
        result = run('predict', tmp_path/'out/model', tmp_path/'0.png', tmp_path/'cut.png', tmp_path/'2.png', '--out', tmp_path/'answers', *more)
        assert result.exit_code == 1 and 'cut.png' in result.output and '2 of 3 done' in result.output
        assert pd.read_csv(tmp_path/'answers/predictions.csv').bright.notna().tolist() == [True, False, True]
    result = run('predict', tmp_path/'out', tmp_path/'0.png')
    assert result.exit_code == 1 and 'no model there' in result.output
