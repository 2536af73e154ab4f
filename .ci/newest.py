"""The library on the newest fastai and fastcore, without its authoring tools: import every module, run the tests.

A second environment lies on top of the locked one, so that only what is newer is downloaded (some MB instead of 6 GB):
its own site-packages come first, those of the running interpreter after them. Authoring tools count as not installed.
The library is installed from a copy of the sources as a user has it: not editable, without the dev extra.

    MEDXFER_NEWEST_MINUTES=10   time for the tests (default 4); what is not reached is counted, not failed; 0: skip all
"""
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINUTES = float(os.environ.get('MEDXFER_NEWEST_MINUTES', 4))
NEWEST = ['fastai', 'fastcore']
ABSENT = ['nbdev', 'execnb']
# What looks at the repository, or executes notebooks: that is the locked environment's part.
ELSEWHERE = ['repository', 'repro_notebooks', 'site', 'tutorials', 'smoke']
# First what stands on fastai itself; last what takes minutes and asks little of it.
FIRST = ['models_precision', 'transfer', 'transfer_l2sp', 'models_unet', 'colorization_runs', 'lesion_runs', 'brain_runs', 'compare_tasks', 'compare_recipes', 'compare_runs', 'transfer_timm']
LAST = ['cli', 'compare_cli', 'paper_scale', 'paper_scale_l2sp', 'real_films']


class InTime:
    "Pytest plugin: after the time is up, tests are skipped and counted."
    def __init__(self, minutes: float): self.until, self.left = time.monotonic() + 60*minutes, 0

    def pytest_runtest_setup(self, item):
        import pytest
        if time.monotonic() < self.until: return
        self.left += 1
        pytest.skip('no time left')


def python(folder: Path, *args, **options) -> subprocess.CompletedProcess:
    return subprocess.run([folder/'env'/('Scripts' if os.name == 'nt' else 'bin')/'python', *args], check=True, cwd=folder, **options)


def layered(folder: Path) -> None:
    "An environment with the newest versions in front of the locked ones, and the library in it."
    venv.create(folder/'env', with_pip=True)
    own = Path(python(folder, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', capture_output=True, text=True).stdout.strip())
    (own/'locked.pth').write_text(sysconfig.get_path('purelib') + '\n')
    python(folder, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--upgrade', *NEWEST)
    for name in ABSENT: (own/f'{name}.py').write_text(f'raise ModuleNotFoundError("{name} is no requirement of the library", name="{name}")\n')
    (folder/'source').mkdir()
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', 'medxfer_nb', 'setup.py', 'settings.ini', 'README.md', 'LICENSE'], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split('\n')
    for name in filter(None, files):
        (folder/'source'/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/'source'/name).write_bytes((ROOT/name).read_bytes())
    python(folder, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps', '--no-build-isolation', folder/'source')


def inside() -> None:
    "In the new environment: versions, imports, tests."
    import importlib
    import pkgutil
    from importlib import metadata

    import pytest

    import medxfer_nb
    assert ROOT not in Path(medxfer_nb.__file__).resolve().parents, 'the sources were imported, not what was installed'
    print(', '.join(f'{name} {metadata.version(name)}' for name in [*NEWEST, 'torch', 'medxfer_nb']), flush=True)
    modules = [m.name for m in pkgutil.walk_packages(medxfer_nb.__path__, 'medxfer_nb.')]
    for name in modules: importlib.import_module(name)
    assert not set(ABSENT) & set(sys.modules)
    print(f'{len(modules)} modules imported', flush=True)
    names = sorted(p.stem.removeprefix('test_') for p in (ROOT/'tests').glob('test_*.py'))
    names = FIRST + [n for n in names if n not in FIRST + LAST + ELSEWHERE] + LAST
    in_time = InTime(MINUTES)
    code = pytest.main(['-q', '-p', 'no:cacheprovider', '--tb=short', '--rootdir', str(ROOT/'tests'), *(str(ROOT/'tests'/f'test_{n}.py') for n in names)], plugins=[in_time])
    print(f'newest versions: {in_time.left} tests not reached in {MINUTES:g} minutes', flush=True)
    sys.exit(int(code))


def main() -> None:
    if MINUTES <= 0: return print('skipped: MEDXFER_NEWEST_MINUTES is 0')
    with tempfile.TemporaryDirectory(prefix='medxfer_newest_') as folder:
        start = time.perf_counter()
        layered(Path(folder))
        print(f'environment ready in {time.perf_counter() - start:.0f} s', flush=True)
        # Safe path: neither the repository nor this script's folder may shadow what was installed
        try: python(Path(folder), '-P', Path(__file__).resolve(), '--inside', env=os.environ | {'PYTHONWARNINGS': 'ignore', 'MPLBACKEND': 'agg'})
        except subprocess.CalledProcessError as e: sys.exit(e.returncode)


if __name__ == '__main__': inside() if '--inside' in sys.argv else main()
