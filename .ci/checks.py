"""Every check of the project, in the order in which they fail fastest. `make test` runs this."""
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# One thread per process (two processes run side by side) and no warnings that carry machine paths into outputs.
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'MPLBACKEND': 'agg', 'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}'}
WORKERS = str(min(4, os.cpu_count() or 1))


def run(*cmd: str) -> None: subprocess.run([str(c) for c in cmd], cwd=ROOT, env=ENV, check=True)


def tree() -> str:
    "What git sees of the working tree: equal before and after a step that must change nothing."
    seen = b''.join(subprocess.run(['git', *a], cwd=ROOT, capture_output=True, check=True).stdout for a in (['status', '--porcelain'], ['diff']))
    return hashlib.sha256(seen).hexdigest()


def unchanged(what: str, *steps: tuple[str, ...]) -> None:
    before = tree()
    for step in steps: run(*step)
    if tree() != before:
        run('git', '--no-pager', 'diff', '--stat')
        sys.exit(f'{what} changed files (see above): run `make docs`, `nbdev_export` and `nbdev_clean`, look at the difference and commit it')


def main() -> None:
    steps = {
        'export and clean change nothing': lambda: unchanged('nbdev_export or nbdev_clean', (BIN/'nbdev_export',), (BIN/'nbdev_clean',)),
        'site and README': lambda: unchanged('the site build', (sys.executable, '.ci/build_site.py')),
        'notebooks': lambda: [run(BIN/'nbdev_test', '--path', f'nbs/{d}', '--n_workers', WORKERS) for d in ('api', 'explanations', 'index.ipynb')],
        'pytest': lambda: run(sys.executable, '-m', 'pytest', '-q', 'tests'),
        'newest fastai and fastcore': lambda: run(sys.executable, '.ci/newest.py'),
    }
    for name, step in steps.items():
        print(f'\n== {name}', flush=True)
        start = time.perf_counter()
        try: step()
        except subprocess.CalledProcessError as e: sys.exit(f'{name}: failed with exit code {e.returncode} after {time.perf_counter()-start:.0f} s')
        print(f'== {name}: passed in {time.perf_counter()-start:.0f} s', flush=True)


if __name__ == '__main__': main()
