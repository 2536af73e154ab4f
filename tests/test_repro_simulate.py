"""The simulated cluster against one that is stepped through second by second, and against the best of all orders."""
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from medxfer_nb.repro.jobs import Job
from medxfer_nb.repro.simulate import Tasks, critical_path, graham_bounds, simulate_sweep, tasks_of
from medxfer_nb.repro.store import ConfigError, RunConfig


@st.composite
def sweeps(draw, most=12):
    "Whole seconds, so that a clock can tick through them"
    n = draw(st.integers(1, most))
    return Tasks([draw(st.integers(1, 9)) for _ in range(n)], [draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else () for i in range(n)])


def ticked(tasks, workers):
    "One second after the other: who is busy, who is ready"
    left, start, clock = list(tasks.seconds), {}, 0
    while any(left):
        busy = [i for i in start if left[i]]
        ready = [i for i in range(len(tasks)) if i not in start and all(not left[p] for p in tasks.parents[i])]
        for i in ready[:workers - len(busy)]: start[i] = clock
        for i in start: left[i] = max(0, left[i] - 1)
        clock += 1
    return clock, [start[i] for i in range(len(tasks))]


@settings(deadline=None, max_examples=200)
@given(sweeps(), st.integers(1, 6))
def test_as_if_a_clock_ticked(tasks, workers):
    done = simulate_sweep(tasks, workers)
    assert (done.makespan, done.start.tolist()) == ticked(tasks, workers)
    for w in range(workers):  # Nobody does two things at once
        mine = sorted((done.start[i], done.end[i]) for i in np.flatnonzero(done.worker == w))
        assert all(a[1] <= b[0] for a, b in zip(mine, mine[1:]))


@settings(deadline=None, max_examples=200)
@given(sweeps(), st.integers(1, 6), st.floats(0, 5))
def test_within_the_bounds_and_exact_at_both_ends(tasks, workers, overhead):
    low, high = graham_bounds(tasks, workers, overhead)
    took = simulate_sweep(tasks, workers, overhead).makespan
    assert low <= took*(1 + 1e-9) and took <= high*(1 + 1e-9) <= (sum(tasks.seconds) + overhead*len(tasks))/workers + critical_path(tasks, overhead) + 1e-6
    assert simulate_sweep(tasks, 1, overhead).makespan == pytest.approx(sum(tasks.seconds) + overhead*len(tasks))
    assert simulate_sweep(tasks, len(tasks), overhead).makespan == pytest.approx(critical_path(tasks, overhead))


@settings(deadline=None, max_examples=20)
@given(sweeps(most=5), st.integers(1, 3))
def test_never_twice_the_best_of_all_orders(tasks, workers):
    best = min(simulate_sweep(reordered(tasks, order), workers).makespan for order in permutations(range(len(tasks)))
               if all(order.index(p) < order.index(i) for i, parents in enumerate(tasks.parents) for p in parents))
    assert simulate_sweep(tasks, workers).makespan <= (2 - 1/workers)*best + 1e-9


def reordered(tasks, order): return Tasks([tasks.seconds[i] for i in order], [[order.index(p) for p in tasks.parents[i]] for i in order])


def test_the_longest_chain_is_found():
    tasks = Tasks([1, 10, 2, 3, 1], [(), (), (0,), (2,), (1,)])
    assert critical_path(tasks) == 11 and critical_path(tasks, overhead=2) == 15
    assert critical_path(Tasks(())) == 0 and simulate_sweep(Tasks(()), 3).makespan == 0


def test_runs_become_tasks():
    "What is measured counts; what is not, is scaled from what was expected"
    def job(i, *parents): return Job(RunConfig(seed=i), f'key{i}', parents, '', {}, cost=i + 1.)
    jobs = [a := job(0), b := job(1, a), job(2, a, b), job(3, job(9))]
    tasks = tasks_of(jobs, {a.config.config_key: 10., b.config.config_key: 60.})
    assert tasks.seconds == (10., 60., 60., 80.) and tasks.parents == ((), (0,), (0, 1), ())


@pytest.mark.parametrize('seconds, parents, says', [((1, -1), (), 'task 1 takes -1'), ((1,), ((), ()), 'one tuple for each'), ((1, 1), ((), (1,)), 'parents come before'), ((1,), ((-1,),), 'waits for task -1')])
def test_nonsense_is_refused(seconds, parents, says):
    with pytest.raises(ConfigError, match=says): Tasks(seconds, parents)
