"The command line: what it says, what it refuses, what it does once and not again."
import logging
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from medxfer_nb.cli import Drawings, _heed_interrupts, app, default_jobs, needed_assets
from medxfer_nb.data.assets import ASSETS
from medxfer_nb.repro import brain_scales, lesion_scales, scales
from medxfer_nb.repro.jobs import load_or_run, plan
from medxfer_nb.repro.store import Store

PARAMETERS = """scale: str = 'demo'          # smoke, demo, study or paper
data_root: str = ''          # folder with the publishers' data sets
seeds: list[int] = [0, 1, 2] # one run per seed
store: str = 'store'         # where runs are kept"""
TABLE = """from medxfer_nb.repro.store import Store
print(len(Store(store).keys()), 'runs, seeds', seeds, scale)"""
COMMANDS = [[], ['reproduce'], ['runs'], ['assets'], ['assets', 'list'], ['assets', 'fetch'], ['assets', 'verify'], ['report']]


def run(*args):
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def papers(folder, **cells):
    "A paper with one small notebook per table or figure"
    (folder / 'colorization').mkdir(parents=True, exist_ok=True)
    for name, cell in cells.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f'# {name}\n\n> A claim.'),
            nbformat.v4.new_code_cell(PARAMETERS, metadata=dict(tags=['parameters'])), nbformat.v4.new_code_cell(cell)],
            metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')))
        nbformat.write(notebook, folder / 'colorization' / f'{name}.ipynb')
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A user's folder"
    monkeypatch.chdir(tmp_path)
    for name in ('MEDXFER_STORE', 'MEDXFER_SCHEDULER'): monkeypatch.delenv(name, raising=False)
    papers(tmp_path / 'papers', tab1_strategies=TABLE, fig5_labels='print(7)')
    return tmp_path


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
def test_every_help_has_an_example(command):
    result = run(*command, '--help')
    assert result.exit_code == 0 and f"Example: medxfer {' '.join(command)}" in ' '.join(result.output.split())


def test_help_is_there_at_once():
    heavy = 'import sys, medxfer_nb.cli; print([m for m in ("torch", "pandas", "fastai", "papermill", "matplotlib") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', heavy], capture_output=True, text=True, check=True).stdout.strip() == '[]'


@pytest.mark.parametrize('args, valid', [
    (['reproduce', 'colourisation'], 'choose colorization'), (['reproduce', '--scale', 'tiny'], 'choose smoke, demo, study, paper'),
    (['reproduce', '--only', 'tab9'], 'tab1_strategies'), (['reproduce', '--only', 'tab1,tab'], 'tab1_strategies'), (['reproduce', '--seeds', '0,x'], '--seeds 0,1,2'),
    (['reproduce', '--seeds', '1,1'], 'twice'), (['reproduce', '--jobs', '-1'], '1 or more'), (['reproduce', '--jobs', '0'], '1 or more'), (['reproduce', '--scale', 'paper'], 'needs --data-root'),
    (['reproduce', '--data-root', 'nowhere'], 'not a folder'), (['reproduce', '--notebooks', 'nowhere'], 'give --notebooks'),
    (['reproduce', '--scheduler', 'tcp://head:8786', '--jobs', '2'], '--jobs is for this machine'), (['reproduce', '--cluster', 'none.yaml'], 'none.yaml: cannot be read'),
    (['reproduce', '--scheduler', 'tcp://head:8786', '--cluster', 'none.yaml'], 'exclude each other'), (['compare', '--scheduler', 'tcp://head:8786', '--jobs', '2'], '--jobs is for this machine'),
    (['runs', '--prune', 'old'], 'choose stale, damaged, unfinished, all'), (['assets', 'fetch', 'chest'], 'choose chest-ct,'), (['report', '--scale', 'big'], 'choose smoke'),
    (['report', '--out', 'nowhere'], 'medxfer reproduce')])
def test_bad_arguments_name_the_valid_ones(home, args, valid):
    more = ['--notebooks', 'papers'] if args[0] == 'reproduce' and '--notebooks' not in args else []
    result = run(*args, *more)
    assert result.exit_code == 2 and valid in result.output and 'Traceback' not in result.output and len(result.output.strip().splitlines()) == 1
    assert sorted(p.name for p in home.iterdir()) == ['papers']


def test_a_notebook_with_other_parameters_is_refused_before_training(home):
    path = home / 'papers/colorization/tab1_strategies.ipynb'
    path.write_text(path.read_text().replace('seeds: list', 'numbers: list'))
    result = run('reproduce', '--scale', 'smoke', '--notebooks', 'papers')
    assert result.exit_code == 2 and 'there is no parameter seeds' in result.output and not (home / 'results').exists()


def test_dry_run_shows_the_plan_and_leaves_nothing(home, monkeypatch):
    monkeypatch.setenv('MEDXFER_CACHE', str(home / 'cache'))
    result = run('reproduce', '--scale', 'smoke', '--dry-run', '--notebooks', 'papers', '--seeds', '0,1')
    words = ' '.join(result.output.split())
    assert result.exit_code == 0 and 'tab1_strategies 12 0 12' in words and '12 different runs: 0 stored, 12 to train, about' in words
    assert 'to fetch: chest-ct (35 MB)' in words and '2 of 2 notebooks to execute' in words
    assert sorted(p.name for p in home.iterdir()) == ['papers']


def test_each_paper_fetches_its_own_anatomy(home, monkeypatch):
    monkeypatch.setenv('MEDXFER_CACHE', str(home / 'cache'))
    def needed(module, item): return needed_assets(plan(module.item_runs(item, module.scale_named('demo')), Store(home / 'store')))
    assert needed(brain_scales, 'fig5_ratios') == ['freesurfer-labels']
    assert needed(lesion_scales, 'fig1_lambda') == ['chest-ct', 'chest-ct-labels', 'efficientnet-lite0']


@pytest.fixture
def quick(home, monkeypatch):
    "Two runs that really train, without films: an experiment of digits in the place of the paper's"
    import test_repro_jobs as digits
    monkeypatch.setattr(scales, 'item_runs', lambda item, scale, seeds: [digits.DigitRun(seed=s, transfer=False, steps=20, lr=LR.get(s, .5)) for s in seeds or (0, 1)] if item[:3] == 'tab' else [])
    monkeypatch.setattr('medxfer_nb.cli.needed_assets', lambda plan: [])
    return home


LR = {}
REPRODUCE = ['reproduce', '--scale', 'smoke', '--notebooks', 'papers', '--data-root', '.', '--seeds', '0,1']


def test_a_second_call_executes_nothing_until_something_changes(quick):
    first = run(*REPRODUCE)
    assert first.exit_code == 0, first.output
    assert 'run 2 of 2' in first.output and first.output.rstrip().endswith('report: results/smoke/report.html')
    page = (quick / 'results/smoke/report.html').read_text()
    assert 'A claim.' in page and '2 of 2' in page
    executed = quick / 'results/smoke/colorization/tab1_strategies.ipynb'
    assert '2 runs, seeds [0, 1] smoke' in executed.read_text()
    before = {p: p.stat().st_mtime_ns for p in executed.parent.iterdir()}
    second = run(*REPRODUCE)
    assert second.exit_code == 0 and '0 of 2 notebooks to execute' in second.output and 'run 1' not in second.output
    assert {p: p.stat().st_mtime_ns for p in executed.parent.iterdir()} == before
    assert '1 of 1 notebooks to execute' in run(*REPRODUCE, '--seeds', '0', '--only', 'tab1', '--dry-run').output
    papers(quick / 'papers', fig5_labels='print(8)')
    assert '1 of 2 notebooks to execute' in run(*REPRODUCE, '--dry-run').output
    (executed.parent / 'tab1_strategies.provenance.json').unlink()
    assert '2 of 2 notebooks to execute' in run(*REPRODUCE, '--dry-run').output
    (quick / 'results/smoke/report.html').unlink()
    assert 'report: results/smoke/report.html' in run('report', '--scale', 'smoke').output and (quick / 'results/smoke/report.html').exists()


def test_failures_are_told_and_the_others_go_on(quick, monkeypatch):
    monkeypatch.setitem(LR, 1, 1e30)  # Diverges
    papers(quick / 'papers', fig5_labels='1/0', fig4_colours='print(9)')
    result = run(*REPRODUCE)
    assert result.exit_code == 1
    assert 'NaN at step' in result.output and 'store/logs/' in result.output and 'ZeroDivisionError' in result.output and 'tab1_strategies: not drawn' in result.output
    page = (quick / 'results/smoke/report.html').read_text()
    assert 'What failed' in page and 'NaN at step' in page and 'ZeroDivisionError' in page and 'fig4_colours' in page
    assert len(Store(quick / 'results/store').keys()) == 1
    again = run(*REPRODUCE, '--dry-run').output
    assert '1 to train' in again and '2 of 3 notebooks to execute' in again  # What failed is tried again, what went well is not


def test_runs_are_trained_where_a_scheduler_says(quick, monkeypatch):
    "And what is stored needs no scheduler"
    from distributed import LocalCluster
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, protocol='tcp://', dashboard_address=None) as cluster: address = train_and_draw(cluster.scheduler_address)
    monkeypatch.setenv('MEDXFER_SCHEDULER', address)
    assert '0 of 2 notebooks to execute' in run(*REPRODUCE).output
    lost = run(*REPRODUCE, '--seeds', '2')
    assert lost.exit_code == 1 and lost.output.rstrip().endswith('and workers with `dask worker ADDRESS --nthreads 1`') and f'no scheduler answers at {address}' in lost.output


def test_what_is_typed_counts_more_than_an_exported_scheduler(home, monkeypatch):
    "An exported address is for commands that say nothing else"
    monkeypatch.setenv('MEDXFER_SCHEDULER', 'tcp://head:8786')
    (home / 'local.yaml').write_text('kind: local\nworkers: 1')
    dry = ['reproduce', '--scale', 'smoke', '--notebooks', 'papers', '--dry-run']
    for typed in (['--jobs', '2'], ['--cluster', 'local.yaml']):
        result = run(*dry, *typed)
        assert result.exit_code == 0 and f'MEDXFER_SCHEDULER=tcp://head:8786 is left aside: {typed[0]} was given' in result.output
    assert run(*dry).exit_code == 0 and 'left aside' not in run(*dry).output
    assert run(*dry, '--scheduler', 'tcp://head:8786', '--jobs', '2').exit_code == 2  # Typed, too


def test_the_log_of_dask_stays_off_the_screen():
    "In a process of its own: importing it sets the level anew"
    code = "from medxfer_nb.cli import _hush; _hush(); import distributed, logging; print(logging.getLogger('distributed').level)"
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout.strip() == str(logging.CRITICAL)


def train_and_draw(address):
    done = run(*REPRODUCE, '--scheduler', address)
    assert done.exit_code == 0 and 'run 2 of 2' in done.output and done.output.rstrip().endswith('report: results/smoke/report.html'), done.output
    return address


def test_an_earlier_section_does_not_pass_for_one_that_could_not_be_drawn(quick, monkeypatch):
    assert run(*REPRODUCE, '--only', 'tab1').exit_code == 0
    folder = quick / 'results/smoke/colorization'
    (folder / 'tab1_strategies.claims.json').write_text('[]')
    monkeypatch.setitem(LR, 1, 1e30)  # Another run than the stored one, and it diverges
    assert run(*REPRODUCE, '--only', 'tab1').exit_code == 1
    page = (quick / 'results/smoke/report.html').read_text()
    assert list(folder.iterdir()) == [] and 'A claim.' not in page and 'NaN at step' in page


def test_a_report_that_cannot_be_written_does_not_stop_the_rest(tmp_path, monkeypatch):
    def broken(folder): raise OSError('disk is full')
    monkeypatch.setattr('medxfer_nb.repro.report.write_report', broken)
    class Broken:
        item, output = Path('tab1'), tmp_path / 'tab1.ipynb'
        def clear(self): pass
        def draw(self, jobs): raise ValueError('no source')
    said = []
    drawings = Drawings({Broken(): set()}, tmp_path, 1, said.append)
    drawings.finish()
    assert 'no source' in said[0] and 'disk is full' in said[1] and [f['what'] for f in drawings.failures] == ['tab1']


@pytest.mark.parametrize('cores, memory, jobs', [(4, 64, 4), (64, 256, 8), (16, 7, 3), (1, 1, 1)])
def test_runs_at_once_fit_the_machine(monkeypatch, cores, memory, jobs):
    monkeypatch.setattr('medxfer_nb.repro.store.hardware', lambda: dict(cores=cores, memory_gb=memory))
    assert default_jobs('demo') == jobs
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    assert default_jobs('paper') == 1 and default_jobs('study') == jobs


def test_interrupts_work_in_the_background_of_a_script():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _heed_interrupts()
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    finally: signal.signal(signal.SIGINT, before)


def test_runs_are_listed_and_pruned(quick):
    load_or_run(scales.item_runs('tab1', None, (0, 1)), 'results/store', data_root=quick, progress=None)
    shown = run('runs').output
    assert 'seed 1' in shown and 'current' in shown and '2 runs, ' in shown and '0 stale' in shown
    manifest = next((quick / 'results/store/runs').glob('*/manifest.json'))
    manifest.write_text(manifest.read_text().replace('"code":{"hash":"', '"code":{"hash":"0'))
    assert '1 stale' in run('runs').output
    kept = CliRunner().invoke(app, ['runs', '--prune', 'stale'], input='n\n')
    assert '1 stale runs' in kept.output and len(Store(quick / 'results/store').keys()) == 2
    gone = run('runs', '--prune', 'stale', '--yes', '--store', 'results/store')
    assert 'deleted 1' in gone.output and len(Store(quick / 'results/store').keys()) == 1
    assert '0 runs' in run('runs', '--store', 'empty').output and not (quick / 'empty').exists()


def test_store_comes_from_the_environment(quick, monkeypatch):
    monkeypatch.setenv('MEDXFER_STORE', 'elsewhere')
    assert run(*REPRODUCE, '--only', 'tab1', '--dry-run').exit_code == 0 and '0 runs' in run('runs').output
    assert not (quick / 'results').exists()


def test_assets(home, monkeypatch):
    monkeypatch.setenv('MEDXFER_CACHE', str(home / 'cache'))
    listed = run('assets', 'list').output
    assert all(name in listed for name in ASSETS) and 'yes' not in listed
    assert 'holds no assets' in run('assets', 'verify').output
    missing = run('assets', 'verify', 'chest-ct')
    assert missing.exit_code == 1 and 'not in the cache' in missing.output


def test_unexpected_errors_are_one_line(home, monkeypatch):
    monkeypatch.setattr('medxfer_nb.repro.store.Store.records', lambda self: 1/0)
    result = run('runs')
    assert result.exit_code == 1 and result.output.startswith('error: ZeroDivisionError') and '--debug' in result.output
    assert 'Traceback' in run('--debug', 'runs').output


def test_the_command_is_installed(home):
    command = Path(sys.executable).with_name('medxfer')
    result = subprocess.run([command, 'reproduce', 'nothing'], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.strip().endswith('choose colorization, l2sp, timm') and result.stdout == ''
