"""What an import may do: no network, no child process, no authoring tools, and nothing heavy that the module may never need."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import medxfer_nb

PACKAGE = Path(medxfer_nb.__file__).parent
MODULES = sorted('.'.join(('medxfer_nb', *p.relative_to(PACKAGE).with_suffix('').parts)).removesuffix('.__init__') for p in PACKAGE.rglob('*.py') if p.name != '_modidx.py')
# Each takes a large part of a second or more: imported inside the functions that use it
HEAVY = ['monai', 'statsmodels.api', 'papermill', 'nbclient', 'dask', 'distributed', 'dask_jobqueue', 'accelerate', 'pip', 'ipywidgets', 'ipyniivue']
ABSENT = ['nbdev', 'execnb', 'IPython', 'ipykernel']  # They are for writing and running notebooks

CHILD = '''
import importlib, json, sys
absent, forbidden, names = json.loads(sys.argv[1])
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in absent: raise ModuleNotFoundError(f'{name} is not installed', name=name)
sys.meta_path.insert(0, Absent())
done = []
def watch(event, args):
    if event in forbidden: done.append([event, str(args)[:200], sys._getframe(1).f_globals.get('__name__')]); raise PermissionError(event)
sys.addaudithook(watch)
for name in names: importlib.import_module(name)
print(json.dumps(dict(loaded=sorted(sys.modules), done=done)))
'''
NETWORK = ['socket.connect', 'socket.sendto', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.gethostbyaddr', 'urllib.Request', 'http.client.connect']


def imported(names, absent=(), forbidden=(), folder=None):
    "Modules loaded, and forbidden events, in a fresh process that imports some modules."
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', CHILD, json.dumps([list(absent), list(forbidden), list(names)])], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def everything(): return imported(MODULES, ABSENT, NETWORK)


def test_no_network_and_no_authoring_tools(everything):
    assert set(MODULES) <= set(everything['loaded']) and everything['done'] == []
    assert not {m.partition('.')[0] for m in everything['loaded']} & set(ABSENT)


def test_nothing_heavy_is_imported_in_advance(everything):
    assert not [m for m in HEAVY if m in everything['loaded']]


def test_the_package_and_its_command_line_are_light():
    "`import medxfer_nb` imports nothing but itself; a command plans before it pays for torch."
    bare = imported(['medxfer_nb'])['loaded']
    assert [m for m in bare if m.startswith('medxfer_nb')] == ['medxfer_nb'] and not {'numpy', 'pandas', 'torch', 'fastai'} & set(bare)
    command = imported(['medxfer_nb.cli'])['loaded']
    assert not [m for m in [*HEAVY, 'torch', 'fastai', 'matplotlib', 'scipy.stats'] if m in command]


def test_the_watch_sees_what_it_forbids(tmp_path):
    (tmp_path/'calls.py').write_text('import socket\nsocket.getaddrinfo("localhost", 80)\n')
    with pytest.raises(AssertionError, match='PermissionError: socket.getaddrinfo'): imported(['calls'], forbidden=NETWORK, folder=tmp_path)
    with pytest.raises(AssertionError, match='nbdev is not installed'): imported(['nbdev'], ABSENT)
