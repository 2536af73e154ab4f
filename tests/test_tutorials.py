"""Every tutorial runs from its first cell to its last, from a folder of its own, and ends in a picture."""
import json
import subprocess
import sys
from pathlib import Path

import papermill
import pytest

TUTORIALS = sorted((Path(__file__).resolve().parents[1]/'nbs'/'tutorials').glob('*.ipynb'))
SMALL = dict(films=40, repeats=2, steps=4)


def pictures(nb) -> list: return [o for cell in nb['cells'] for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
    "Tutorial -> the folder it ran in, run once."
    folders = {}
    def run(path):
        if path not in folders:
            folders[path] = folder = tmp_path_factory.mktemp(path.stem)
            with pytest.MonkeyPatch.context() as m:  # Pictures are shown, whatever backend the tests themselves draw with
                m.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
                papermill.execute_notebook(path, folder/path.name, dict(SMALL, out='results'), cwd=folder, progress_bar=False, log_output=False)
        return folders[path]
    return run


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs(path, executed):
    folder = executed(path)
    nb = json.loads((folder/path.name).read_text(encoding='utf-8'))
    assert pictures(nb) and pictures(json.loads(path.read_text(encoding='utf-8'))), 'executed and stored: both show a picture'
    assert list((folder/'results').rglob('report.html'))


def test_a_program_runs_without_the_library(executed):
    "With torch alone."
    program, = (executed(TUTORIALS[0])/'results').rglob('program.pt2')
    code = "import sys; sys.modules['medxfer_nb'] = None; import torch; print(torch.export.load(sys.argv[1]).module()(torch.rand(2, 1, 64, 64)).shape)"
    said = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(program)], capture_output=True, text=True)
    assert said.returncode == 0 and 'torch.Size([2, 1])' in said.stdout, said.stderr
