"""The whole reproduction at smoke scale, as `make reproduce` runs it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medxfer_nb.data.films import virtual_films
from medxfer_nb.repro import brain_scales, lesion_scales, scales

NOTEBOOKS = {folder.name: sorted(p.stem for p in folder.glob('*.ipynb')) for folder in (Path(__file__).resolve().parents[1]/'nbs'/'papers').iterdir()}
DRAWN = {name for names in NOTEBOOKS.values() for name in names} - {'tab_published', 'tab4_retention'}  # These are tables
MEDXFER = Path(sys.executable).with_name('medxfer')


def reproduce(folder: Path) -> str:
    done = subprocess.run([MEDXFER, 'reproduce', '--scale', 'smoke'], cwd=folder, capture_output=True, text=True, timeout=1800,
                          env={k: v for k, v in os.environ.items() if k != 'MEDXFER_STORE'})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('reproduction')
    return folder, reproduce(folder)


def test_every_table_and_figure_has_a_notebook():
    assert NOTEBOOKS == dict(colorization=sorted(set(scales.ITEMS) - {'controls'}), l2sp=sorted(lesion_scales.ITEMS), timm=sorted(brain_scales.ITEMS))


def test_everything_is_drawn(results):
    folder, said = results
    report, = folder.rglob('*.html')
    page = report.read_text(encoding='utf-8')
    assert report.name in said and 'virtual patients' in page
    for name in (name for names in NOTEBOOKS.values() for name in names):
        executed, = folder.rglob(f'{name}.ipynb')
        assert not any(o['output_type'] == 'error' for c in json.loads(executed.read_text())['cells'] for o in c.get('outputs', []))
        assert name in page and (name not in DRAWN or {p.suffix for p in folder.rglob(f'{name}*')} >= {'.png', '.svg'})


def test_nothing_of_the_machine_or_a_patient_is_told(results):
    folder, _ = results
    outputs = [json.dumps([c.get('outputs') for c in json.loads(p.read_text())['cells']]) for p in folder.rglob('*.ipynb')]
    texts = outputs + [p.read_text(encoding='utf-8') for pattern in ('*.html', 'manifest.json') for p in folder.rglob(pattern)]
    patients = set(virtual_films('virtual-chest', 'test', 48, 32).frame.patient)
    places = {p for p in (str(folder), str(Path.home())) if len(p) > 5}  # A home of / is part of every address
    assert len(texts) > len(DRAWN) and not any(name in text for text in texts for name in places | patients)


def test_second_time_nothing_is_done_again(results):
    folder, _ = results
    before = {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.suffix in ('.ipynb', '.safetensors', '.png')}
    reproduce(folder)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.suffix in ('.ipynb', '.safetensors', '.png')}
