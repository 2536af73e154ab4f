"""The house rules that a machine can check: who imports whom, clean notebooks, pictures that say what they show, a lock that covers every requirement."""
import ast
import itertools
import json
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

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


def options(cell: dict) -> dict:
    "The `#| key: value` lines at the top of a cell, read as the site reads them: one that is no YAML and all are lost."
    lines = itertools.takewhile(lambda line: line.startswith('#|'), ''.join(cell['source']).split('\n'))
    try: found = yaml.safe_load('\n'.join(line[2:].strip() for line in lines))
    except yaml.YAMLError: found = None
    return found if isinstance(found, dict) else {}


def untold_pictures(nb: dict) -> list[str]:
    "Cells that show a picture on the site and do not say what is on it, by their ids."
    def hidden(cell): return bool(re.search(r'^#\| *(hide|hide_output|include: *false|output: *false)\b', ''.join(cell['source']), re.M))
    untold = []
    for cell in nb['cells']:
        data = [output.get('data', {}) for output in cell.get('outputs', [])]
        bare = any(re.search(r'<img\b(?![^>]*\balt=["\'][^"\'])', ''.join(d.get('text/html', ''))) for d in data)
        drawn = any(kind.startswith('image/') for d in data for kind in d)
        told = options(cell).get('fig-alt')
        if not hidden(cell) and (bare or drawn and not (isinstance(told, str) and len(told) > 20)): untold.append(cell['id'])
    return untold


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_pictures_say_what_they_show(path):
    untold = untold_pictures(json.loads(path.read_text(encoding='utf-8')))
    assert not untold, f'cells {untold} show a picture: begin them with a line  #| fig-alt: "what is to be seen"'


@pytest.mark.parametrize('head, told', [('#| fig-alt: "Dice against lambda: it rises."\n', True), ('#| hide\n', True), ('', False), ('#| fig-alt: ""\n', False), ('#| fig-cap: Dice against lambda.\n', False),
                                        ('#| fig-alt: Dice: against lambda: it rises, and falls.\n', False), ('#| export\n#| fig-alt: "Dice against lambda: it rises."\n', False), ('x = 1\n#| fig-alt: Dice against lambda, it rises.\n', False)])
def test_untold_pictures_are_found(head, told):
    def found(data): return untold_pictures({'cells': [{'cell_type': 'code', 'id': 'one', 'source': (head + 'plt.show()').splitlines(keepends=True), 'outputs': [{'output_type': 'display_data', 'data': data}]}]})
    assert found({'image/png': 'iVBORw0='}) == found({'image/jpeg': '/9j/'}) == ([] if told else ['one'])
    assert found({'text/plain': '1'}) == found({'text/html': ['<img alt="a film" src="x">']}) == []
    assert found({'text/html': ['<p>', '<img src="x">']}) == ([] if 'hide' in head else ['one'])


def untold_names(path: Path) -> list[str]:
    "Exported functions and classes of a module that do not say what they are."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    shown = [a.value for a in tree.body if isinstance(a, ast.Assign) and getattr(a.targets[0], 'id', '') == '__all__']
    names = ast.literal_eval(shown[0]) if shown else []
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names and not ast.get_docstring(n)]


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_have_docstrings_and_functions_are_short(path):
    assert not untold_names(path)
    functions = [n for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [f'{n.name}: {n.end_lineno - n.lineno + 1} lines' for n in functions if n.end_lineno - n.lineno >= 40]


@pytest.fixture
def home(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'.ci'))
    return pytest.importorskip('home')


def test_home_page_shows_what_the_papers_store(home):
    sources = [''.join(c['source']) for c in json.loads(home.HOME.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
    assert [home.home(s) for s in sources] == sources, 'run `python .ci/home.py`'
    assert all(f'<!-- {part}: by .ci/home.py -->' in '\n'.join(sources) for part in home.PARTS)
    assert {p.name: p.read_bytes() for p in home.IMAGES.iterdir()} == {f"{item.split('/')[1]}.png": home.picture(item) for item in home.PICTURES}


def test_home_page_counts_verdicts(home, monkeypatch, tmp_path):
    def table(*rows): return '<table>' + ''.join(f"<tr>{''.join(f'<td>{t}</td>' for t in r)}</tr>" for r in rows) + '</table>'
    verdicts = table(('', 'verdict', 'study verdict'), ('statement', '', ''), ('A &gt; B', 'undecided (demo) · mechanism only', 'same direction (study) · mechanism only'),
                     ('B', 'not run (demo)', 'opposite (study)'), ('C', 'outside the stated range', '–'))
    origin = table(('', 'demo', 'study (committed)'), ('runs', 4, 9), ('seeds', '0, 1', '0, 1, 2'), ('commit', 'abc', 'def'), ('date', '2020-01-01', '2020-01-02'), ('code changed since', 'no', 'yes'))
    code = [dict(cell_type='code', source='', outputs=[dict(data={'text/html': t})]) for t in (verdicts, verdicts, origin)]
    (tmp_path/'p').mkdir()
    (tmp_path/'p/tab1.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='markdown', source='# Table 1: all\n\n> The paper: A is better.'), *code])))
    monkeypatch.setattr(home, 'PAPERS', tmp_path)
    assert home.row('p/tab1') == ('| [Table 1](papers/p/tab1.ipynb) | A is better. | 1 undecided (of 2)<br>2 seeds, abc, 2020-01-01 '
                                  '| 1 same direction, 1 opposite (of 2)<br>3 seeds, def, 2020-01-02, code changed since |')


def test_readme_is_short():
    assert len((ROOT/'README.md').read_text(encoding='utf-8').splitlines()) < 150


def test_lock_pins_every_requirement():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini')
    needed = {re.split(r'[<>=!~]', r)[0].lower() for k in ('requirements', 'dev_requirements') for r in config['DEFAULT'][k].split()}
    lock = {line.split('==')[0].lower() for line in (ROOT/'requirements.lock').read_text().splitlines() if '==' in line}
    assert needed <= lock, f'not pinned: {sorted(needed - lock)}'


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r'\]\((?!https?:|#)([^)#]+)', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert links and not [link for link in links if not (ROOT/link).exists()]
