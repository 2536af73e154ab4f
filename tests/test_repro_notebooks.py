"Notebooks are refused before they start, run in this interpreter, and fail alone."
import json
import sys

import nbformat
import pytest

from medxfer_nb.repro.notebooks import ParameterError, check_parameters, run_notebooks

PARAMETERS = """scale: str = 'demo'          # smoke, demo, study or paper
data_root: str = ''          # folder with the publishers' data sets
seeds: list[int] = [0, 1, 2] # one run per seed
store: str = 'store'         # where runs are kept"""


def notebook(path, *cells, parameters=PARAMETERS, tags=('parameters',)):
    cells = [nbformat.v4.new_code_cell(parameters, metadata=dict(tags=list(tags)))] + [nbformat.v4.new_code_cell(c) for c in cells]
    kernel = dict(kernelspec=dict(name='python3', language='python', display_name='python3'))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.mark.parametrize('given, match', [(dict(seed=[1]), 'no parameter seed'), (dict(seeds=[]), 'at least one'), (dict(seeds=[-1]), 'from 0 up'),
    (dict(seeds=[True]), 'list'), (dict(scale=1), 'text'), (dict(scale='Demo'), 'smoke, demo, study, paper'), (dict(scale='paper'), 'needs data_root')])
def test_bad_parameters_name_the_valid_ones(tmp_path, given, match):
    paper = notebook(tmp_path / 'tab1.ipynb', "open('ran', 'w')")
    with pytest.raises(ParameterError, match=match) as e: run_notebooks([paper], tmp_path / 'out', given)
    assert all(f'\n  {name}: ' in str(e.value) for name in ('scale', 'data_root', 'seeds', 'store'))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('source, tags, match', [('scale: str = 1', [], 'no cell tagged'), ('scale = 1', ['parameters'], 'annotated None'),
                                                 ('scale: Path = 1', ['parameters'], 'annotated Path')])
def test_notebooks_must_declare_typed_parameters(tmp_path, source, tags, match):
    with pytest.raises(ParameterError, match=match): check_parameters(notebook(tmp_path / 'x.ipynb', parameters=source, tags=tags), {})


def test_the_kernel_is_this_interpreter_and_failures_stay_alone(tmp_path, monkeypatch):
    foreign = tmp_path / 'jupyter' / 'kernels' / 'python3'  # Another python3 on the search path
    foreign.mkdir(parents=True)
    (foreign / 'kernel.json').write_text(json.dumps(dict(argv=['/bin/false', '{connection_file}'], display_name='x', language='python')))
    monkeypatch.setenv('JUPYTER_PATH', str(foreign.parents[1]))
    monkeypatch.setenv('MPLBACKEND', 'agg')  # As on many clusters: figures still become part of the notebook
    papers = [notebook(tmp_path / 'tab1.ipynb', 'import sys, os, warnings; warnings.warn("x"); print(sys.executable, seeds, store, os.getcwd())'),
              notebook(tmp_path / 'tab2.ipynb', 'before = 1', 'assert seeds == [3], "only three"', 'after = 1'),
              notebook(tmp_path / 'tab3.ipynb', 'import os; os._exit(3)')]
    lines = []
    papers.append(notebook(tmp_path / 'fig1.ipynb', 'import matplotlib.pyplot as plt; plt.plot([1, 2]);'))
    one, two, three, figure = run_notebooks(papers, tmp_path / 'out', dict(seeds=(0, 1), store=tmp_path / 'my store'), jobs=3, progress=lines.append)
    outputs = nbformat.read(one.output, 4).cells[-1].outputs
    assert [o.text for o in outputs] == [f"{sys.executable} [0, 1] {tmp_path / 'my store'} {tmp_path / 'out'}\n"] and one.error == ''
    assert two.error.endswith('AssertionError: only three') and 'after' in nbformat.read(two.output, 4).cells[-1].source
    assert 'Kernel' in three.error
    assert any('image/png' in o.get('data', {}) for o in nbformat.read(figure.output, 4).cells[-1].outputs)
    assert len(lines) == 4 and sum('failed' in l for l in lines) == 2
    assert one.provenance['parameters'] == dict(seeds=[0, 1]) and two.provenance['error'] == two.error
    assert str(tmp_path) not in json.dumps(one.provenance)
