"""`medxfer compare` and `medxfer predict`: what they pass on, what they refuse, and the whole way from a table to a mask of answers."""
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
from test_compare_handover import NET, squares
from typer.testing import CliRunner

from medxfer_nb.cli import app
from medxfer_nb.compare import handover, study
from medxfer_nb.compare.design import DesignError
from medxfer_nb.compare.sources import save_source
from medxfer_nb.models.colorize import load_backbone

pytestmark = pytest.mark.filterwarnings('ignore')


def run(*args):
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result

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


def test_from_a_table_to_answers(monkeypatch, tmp_path):
    "A bad row is named before anything is trained; then compare, and predict with one file that is damaged"
    squares(tmp_path)
    rows = pd.DataFrame(dict(path=[f'{i}.png' for i in range(24)], patient=[f'p{i//2}' for i in range(24)], bright=[i//2 % 2 for i in range(24)]))
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
