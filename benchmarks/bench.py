"""Every benchmark, each in a process of its own, and one table of all; `make bench` runs this.

The rows go into benchmarks/results.csv with the machine, the versions, the commit and the date; rows of another device
stay. Fewer than 7 turns are shown, but not written. Exits with 1 where a goal is missed.

    python benchmarks/bench.py [--only merge l2sp] [--device cuda] [--demo] [--tiny] [--csv FILE]
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from turns import LEAST_TURNS, Row, show

HERE = Path(__file__).resolve().parent
ALL = ('fastai_step', 'l2sp', 'adaption', 'fisher', 'merge', 'probe', 'volume', 'feeding', 'films', 'precision', 'imports')
KEY = ['what', 'name', 'device', 'cpu', 'gpu', 'cores', 'threads']


def run(name: str, options: list[str]) -> tuple[list[dict], int]:
    "Rows of a benchmark, and its exit code."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'rows.json'
        code = subprocess.run([sys.executable, '-W', 'ignore', HERE/f'{name}.py', '--json', path, *options], stdout=subprocess.DEVNULL).returncode
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [], code


def flat(row: dict) -> dict:
    "A row of the table: each version a column, lengths of time and memory rounded."
    row = dict(row)
    for name, version in row.pop('versions').items(): row[name if name != 'medxfer_nb' else 'version'] = version
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def write(path: Path, rows: list[dict]):
    "Put new rows in the place of old ones of the same kind."
    new = pd.DataFrame([flat(r) for r in rows if r['turns'] >= LEAST_TURNS or r['what'] == 'whole demo'])
    if new.empty: return
    both = pd.concat([pd.read_csv(path), new], ignore_index=True) if path.exists() else new
    same = both[KEY].fillna('').astype(str).agg('|'.join, axis=1).duplicated(keep='last')
    both[~same].to_csv(path, index=False)


def main(argv=None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=ALL, default=list(ALL))
    parser.add_argument('--demo', action='store_true', help='the whole demo of the papers too: most of an hour')
    parser.add_argument('--csv', type=Path, default=HERE/'results.csv')
    parser.add_argument('--turns', type=int)
    parser.add_argument('--device', default='cpu')
    for flag in ('--tiny', '--no-memory'): parser.add_argument(flag, action='store_true')
    a = parser.parse_args(argv)
    options = ['--device', a.device, *(['--turns', str(a.turns)] if a.turns else []), *(['--tiny'] if a.tiny else []), *(['--no-memory'] if a.no_memory else [])]
    rows, failed = [], []
    for name in a.only + ['demo']*a.demo:
        print(f'{name} ...', flush=True)
        found, code = run(name, options if name != 'demo' else [])
        rows += found
        if code: failed.append(name)
        if code and not found: print(f'{name} ended with exit code {code} and without a result: run benchmarks/{name}.py to see why')
        if not a.tiny: write(a.csv, found)
    if rows: show([Row(**{k: r[k] for k in Row.__dataclass_fields__}) for r in rows])
    if failed: print(f'goals missed, or no result: {", ".join(failed)}')
    return not failed


if __name__ == '__main__': sys.exit(not main())
