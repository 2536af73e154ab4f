"""What importing the library takes beyond fastai: CPU seconds of fresh processes, in turns.

    python benchmarks/imports.py [--turns 9]

The goal is a difference, not a ratio: less than 0.3 s for `medxfer_nb` itself, and for readers, networks,
strategies and metrics together.
Every module at once is there to compare: nobody imports them all. CPU seconds do not count what other programs do.
"""
import pkgutil
import statistics
import subprocess
import sys
from functools import partial

from turns import Race, append, arguments, in_turns, rows_of, show

import medxfer_nb

LIMIT = 0.3  # CPU seconds beyond fastai
USUAL = [f'medxfer_nb.{name}' for name in ('data.xray', 'data.ct', 'models.colorize', 'models.unet', 'transfer.stages', 'transfer.l2sp', 'evaluate.metrics', 'evaluate.stats')]
EVERY = [m.name for m in pkgutil.walk_packages(medxfer_nb.__path__, 'medxfer_nb.') if not m.name.endswith('_modidx')]
CHILD = 'import sys, time, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(time.process_time())'


def cpu_seconds(*modules: str) -> float:
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', CHILD, *modules], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def imports(a) -> Race:
    fastai = partial(cpu_seconds, 'fastai.vision.all')
    tasks = {'fastai alone': [], 'and medxfer_nb': ['medxfer_nb'], 'and readers to metrics': USUAL, 'and every module': EVERY}
    return Race('imports, CPU seconds', {name: partial(fastai, *more) for name, more in tasks.items()}, setting='fresh processes, files in the cache')


def main() -> bool:
    a = arguments(__doc__, None, {}, {})
    race = imports(a)
    times = in_turns(race.tasks, a.turns)
    rows = rows_of(race, times, a.device, {})
    show(rows)
    plain, *others = times
    beyond = {name: statistics.median(t - f for t, f in zip(times[name], times[plain])) for name in others}
    for name, seconds in beyond.items(): print(f'{name}: {seconds:+.3f} s beyond fastai' + (f' (limit {LIMIT} s)' if 'every' not in name else ''))
    if a.json: append(a.json, rows)
    return all(seconds < LIMIT for name, seconds in beyond.items() if 'every' not in name)


if __name__ == '__main__': sys.exit(not main())
