"""Every tutorial runs from its first cell to its last, from a folder of its own, and ends in a picture."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import papermill
import pytest

from medxfer_nb.repro.cluster import cluster_from_yaml

FOLDER = Path(__file__).resolve().parents[1]/'nbs'/'tutorials'
TUTORIALS = {p.stem: p for p in sorted(FOLDER.glob('*.ipynb'))}
SMALL = dict(out='results', films=40, test_films=60, patients=4, subjects=4, test=4, repeats=2, steps=4, chains=2, lams=[0, .1])  # A tutorial gets those that it has


def pictures(nb) -> list: return [o for cell in nb['cells'] for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
    "Name -> the folder the tutorial ran in, run once."
    folders = {}
    def run(name):
        if name in folders: return folders[name]
        folders[name] = folder = tmp_path_factory.mktemp(name)
        for path in FOLDER.iterdir():
            if path.is_file() and path.suffix != '.ipynb': shutil.copy(path, folder)  # What lies beside it
        known = papermill.inspect_notebook(TUTORIALS[name])
        with pytest.MonkeyPatch.context() as m:  # Pictures are shown, whatever backend the tests themselves draw with
            m.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
            papermill.execute_notebook(TUTORIALS[name], folder/f'{name}.ipynb', {k: v for k, v in SMALL.items() if k in known}, cwd=folder,
                                       kernel_name='python3', progress_bar=False, log_output=False)
        return folder
    return run


@pytest.mark.parametrize('name', TUTORIALS)
def test_tutorial_runs(name, executed):
    folder = executed(name)
    text = TUTORIALS[name].read_text(encoding='utf-8')
    assert pictures(json.loads((folder/f'{name}.ipynb').read_text(encoding='utf-8'))) and pictures(json.loads(text)), 'executed and stored: both show a picture'
    assert {p.name for p in folder.iterdir()} <= {f'{name}.ipynb', 'results'} | {p.name for p in FOLDER.iterdir()}, 'all that it writes is below `out`'
    if 'compare_strategies(' in text: assert list((folder/'results').rglob('report.html'))


def test_a_program_runs_without_the_library(executed):
    "With torch alone."
    program, = (executed('compare')/'results').rglob('program.pt2')
    code = "import sys; sys.modules['medxfer_nb'] = None; import torch; print(torch.export.load(sys.argv[1]).module()(torch.rand(2, 1, 64, 64)).shape)"
    said = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(program)], capture_output=True, text=True)
    assert said.returncode == 0 and 'torch.Size([2, 1])' in said.stdout, said.stderr


def test_the_example_for_slurm_is_what_it_says():
    pytest.importorskip('dask_jobqueue')
    spec = cluster_from_yaml(FOLDER/'slurm.yaml')
    script = spec.job_script()
    assert (spec.kind, spec.adapt, spec.gpus) == ('slurm', (0, 100), 1)
    for line in ('#SBATCH -p gpu', '#SBATCH --cpus-per-task=8', '#SBATCH -t 02:00:00', '#SBATCH --gres=gpu:1'): assert line in script.splitlines()
    assert all(words in script for words in ('source ~/medxfer/bin/activate\npython -m distributed.cli.dask_worker', 'CORES=8,GPU=1', '--lifetime 6660s'))  # At least five minutes before the end, at most 240 s more or less
