"""The house rules that a machine can check: who imports whom, clean notebooks, a lock that covers every requirement."""
import ast
import json
import re
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT/'medxfer_nb').rglob('*.py'))
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
# Left may import right: data and models know nothing of each other, evaluate knows arrays only, nothing imports upward
MAY = {'data': {'data'}, 'models': {'models'}, 'transfer': {'transfer', 'models'}, 'evaluate': {'evaluate'},
       'repro': {'repro', 'data', 'models', 'transfer', 'evaluate'}, 'compare': {'compare', 'repro', 'data', 'models', 'transfer', 'evaluate'},
       'cli': {'cli', 'compare', 'repro', 'data'}}


def imports(path: Path) -> set[str]:
    "Full names of the modules that a file imports, relative ones resolved."
    package, found = path.relative_to(ROOT).with_suffix('').parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:len(package) - node.level + 1]) + '.' if node.level else ''
            found |= {f'{base}{node.module}'} if node.module else {f'{base}{a.name}' for a in node.names}
    return found


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    named = {m.split('.') [0] for m in imports(path)}
    assert not named & {'nbdev', 'execnb'}, 'the library must work without its authoring tools'
    room = path.relative_to(ROOT/'medxfer_nb').with_suffix('').parts[0]
    used = {m.split('.')[1] for m in imports(path) if m.startswith('medxfer_nb.') and m.count('.')}
    assert room not in MAY or used <= MAY[room]


def test_no_circles():
    graph = {'.'.join(p.relative_to(ROOT).with_suffix('').parts): imports(p) for p in LIBRARY}
    def visit(module, path):
        assert module not in path, ' -> '.join([*path, module])
        for m in graph.get(module, ()): visit(m, [*path, module])
    for module in graph: visit(module, [])


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_notebook_is_clean(path):
    text = path.read_text(encoding='utf-8')
    nb = json.loads(text)
    outputs = json.dumps([c.get('outputs', []) for c in nb['cells']])
    assert len(nb['cells']) <= 60 and len(text) < 300_000
    assert '"output_type": "error"' not in outputs
    assert not re.search(r'(?<![\w.])/(home|root|tmp|work|usr|Users)/', outputs), 'an output shows a path of the machine it ran on'
    assert re.match(r'# .+\n\n> .+', ''.join(nb['cells'][0]['source'])), 'the first cell is a title and a one-line subtitle'


def test_lock_pins_every_requirement():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini')
    needed = {re.split(r'[<>=!~]', r)[0].lower() for k in ('requirements', 'dev_requirements') for r in config['DEFAULT'][k].split()}
    lock = {line.split('==')[0].lower() for line in (ROOT/'requirements.lock').read_text().splitlines() if '==' in line}
    assert needed <= lock, f'not pinned: {sorted(needed - lock)}'


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r'\]\((?!https?:|#)([^)#]+)', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert links and not [link for link in links if not (ROOT/link).exists()]
