"""The benchmarks run, and what they share measures what it says: planted ratios, planted memory, goals that are missed."""
import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent/'benchmarks'
ROWS = {'fastai_step': 3, 'l2sp': 4, 'adaption': 2, 'fisher': 5, 'merge': 4, 'probe': 2, 'volume': 2, 'feeding': 3, 'precision': 2}


@pytest.fixture(autouse=True)
def path(monkeypatch): monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def turns(): return importlib.import_module('turns')


def call(monkeypatch, name, *options) -> int:
    "Run a benchmark as its command line does, in this process."
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, options)])
    with pytest.raises(SystemExit) as e: runpy.run_path(str(BENCHMARKS/f'{name}.py'), run_name='__main__')
    return int(e.value.code or 0)


class Clock:
    "Time that passes when told to."
    now = 0.
    def __call__(self): return self.now
    def task(self, *seconds):
        "Takes these seconds, call after call."
        left = list(seconds)
        def run(): self.now += left.pop(0) if len(left) > 1 else left[0]
        return run


def test_a_planted_ratio_is_found_and_a_slow_turn_does_not_count(turns):
    clock = Clock()
    tasks = {'plain': clock.task(9., 1., 1., 5., 1.), 'ours': clock.task(50., 3., 3., 15., 3.), 'other': clock.task(2., 2., 2., 2., 2., 60., 2.)}
    times = turns.in_turns(tasks, 7, clock=clock)
    assert {len(t) for t in times.values()} == {7} and times['plain'][:3] == [1., 1., 5.]  # the first, cold turn is left out
    assert turns.quartiles(times['ours'], times['plain']) == (3., 3., 3.)
    assert turns.quartiles(times['other'], times['plain'])[1] == 2.


def test_the_order_rotates_and_every_alternative_runs_in_every_turn(turns):
    seen = []
    turns.in_turns({name: lambda name=name: seen.append(name) for name in 'abc'}, 3)
    assert ''.join(seen) == 'abc' 'bca' 'cab' 'abc'


def test_the_median_of_ratios_is_not_the_ratio_of_medians(turns):
    plain, ours = [1., 2., 4., 8., 16.], [2., 4., 8., 16., 1.]
    assert turns.quartiles(ours, plain)[1] == np.median([b/a for a, b in zip(plain, ours)]) == 2. != np.median(ours)/np.median(plain)


def test_goals_rows_and_the_file_of_rows(turns, tmp_path, capsys):
    def race(a): return turns.Race('adding', {'plain': lambda: 2., 'ours': lambda: 3., 'a peer': lambda: 8.}, {'ours': a.goal}, 'numbers')
    file = tmp_path/'rows.json'
    assert turns.main('doc', [race], ['--json', str(file), '--no-memory', '--goal', '1.6'], goal=1.4)
    assert not turns.main('doc', [race], ['--json', str(file), '--no-memory'], goal=1.4)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r['name'], r['ratio'], r['goal'], r['met'], r['beside'], r['turns']) for r in rows] == [
        ('ours', 1.5, 1.6, True, 'plain', 9), ('a peer', 4., None, None, 'plain', 9), ('ours', 1.5, 1.4, False, 'plain', 9), ('a peer', 4., None, None, 'plain', 9)]
    assert rows[0]['cpu'] and rows[0]['cores'] >= 1 and rows[0]['versions']['torch'] and rows[0]['date']
    assert capsys.readouterr().out.count('MISSED') == 1


def test_memory_is_that_of_the_alternative_alone(turns):
    def race(a):
        def take(megabytes): return lambda: np.ones(megabytes*2**17).sum() * 0.
        return turns.Race('memory', {'little': take(1), 'much': take(200)}, {'much': 1e9}, lean=True)
    peaks = turns.peaks_of(race, SimpleNamespace(device='cpu'))
    assert 180 < peaks['much'] - peaks['little'] < 260
    row, = turns.rows_of(race(None), {'little': [1.], 'much': [1.]}, 'cpu', peaks)
    assert row.met is False  # as fast, but it takes more memory
    def broken(a): return turns.Race('broken', {'plain': lambda: sys.exit(3)})
    with pytest.raises(SystemExit, match='broken: an alternative ended without a result'): turns.peaks_of(broken, SimpleNamespace(device='cpu'))


@pytest.mark.parametrize('name', ROWS)
def test_each_benchmark_runs(name, monkeypatch, tmp_path):
    assert call(monkeypatch, name, '--tiny', '--no-memory', '--json', tmp_path/'rows.json') in (0, 1)  # nothing follows from one turn
    rows = [json.loads(line) for line in (tmp_path/'rows.json').read_text().splitlines()]
    assert len(rows) >= ROWS[name] and all(r['turns'] == 1 and r['ratio'] > 0 for r in rows)
    assert name in ('precision',) or any(r['goal'] for r in rows)


def test_the_table_keeps_rows_of_other_machines_and_replaces_its_own(monkeypatch, tmp_path):
    bench = importlib.import_module('bench')
    row = dict(what='merge', name='mode-IMM', device='cpu', cpu='X', gpu=None, cores=2, threads=2, ratio=1.23456, turns=9, versions=dict(medxfer_nb='0.1', torch='2'))
    bench.write(tmp_path/'r.csv', [row, row | dict(cpu='Y')])
    bench.write(tmp_path/'r.csv', [row | dict(ratio=1.1), row | dict(name='too few', turns=3)])
    table = pd.read_csv(tmp_path/'r.csv')
    assert sorted(zip(table['cpu'], table['ratio'])) == [('X', 1.1), ('Y', 1.2346)] and set(table['torch']) == {2}


def test_the_gpu_table_runs_on_a_cpu_and_is_skipped_without_a_device(monkeypatch, tmp_path, capsys):
    import torch
    gpu = importlib.import_module('gpu')
    assert gpu.main(['--device', 'cpu', '--tiny', '--csv', str(tmp_path/'t.csv')]) == 0
    table = pd.read_csv(tmp_path/'t.csv')
    assert len(table) == 3 and (table[['per_second', 'gflop', 'tflops', 'roof_tflops']] > 0).all().all()
    linear = torch.nn.Linear(64, 32, bias=False)
    assert gpu.traffic(linear, torch.ones(8, 64), 4) == 3*4*(8*64 + 64*32 + 8*32)
    if torch.cuda.is_available(): return
    assert gpu.main([]) == 0
    assert 'no CUDA device here' in capsys.readouterr().out
