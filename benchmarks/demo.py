"""The whole demo of the three papers: `medxfer reproduce` from nothing, then again with everything stored.

From nothing it may take 45 minutes on 2 cores and 12 on 16; again, 90 seconds. What is fetched and rendered once is kept
in the cache of the machine and not counted, unless MEDXFER_CACHE names an empty folder. Hours of work are not repeated:
each is one turn.

    python benchmarks/demo.py [--paper PAPER] [--scale demo] [--json FILE]
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from medxfer_nb.repro.store import hardware
from turns import Row, append, show

MINUTES = {'16 cores': 12, '2 cores': 45}


def reproduce(folder: Path, *options: str) -> tuple[float, float]:
    "Wall seconds of one call, and MiB of the largest of its processes."
    start = time.perf_counter()
    command = [sys.executable, '-c', 'from medxfer_nb.cli import app; app()', 'reproduce', *options, '--store', folder/'store', '--out', folder/'out']
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)  # The call with the processes it started itself, and no earlier one's
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode: sys.exit(f'reproduce {" ".join(options)}: ended with exit code {child.returncode}')
    return time.perf_counter() - start, used.ru_maxrss/2**10


def row(what: str, seconds: float, peak: float, allowed: str, limit: float, setting: str) -> Row:
    ratio = seconds/limit
    return Row('whole demo', what, ratio, ratio, ratio, 1., allowed, seconds, limit, peak, None, False, 1, setting, 'cpu')


def main(argv=None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--paper', default='', help='one of them; all if left out')
    parser.add_argument('--scale', default='demo')
    parser.add_argument('--json', type=Path, metavar='FILE', help='append the rows to it')
    a = parser.parse_args(argv)
    options, cores = [*([a.paper] if a.paper else []), '--scale', a.scale], '16 cores' if hardware()['cores'] >= 16 else '2 cores'
    with tempfile.TemporaryDirectory() as folder: first, again = (reproduce(Path(folder), *options) for _ in range(2))
    setting = f"{a.paper or 'three papers'}, scale {a.scale}, {hardware()['cores']} cores"
    rows = [row('from nothing', *first, f'{MINUTES[cores]} minutes', 60*MINUTES[cores], setting), row('cached', *again, '90 seconds', 90, setting)]
    show(rows)
    if a.json: append(a.json, rows)
    return all(r.met for r in rows)


if __name__ == '__main__': sys.exit(not main())
