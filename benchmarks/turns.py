"""What all benchmarks share: alternatives in turns, ratios within a turn, the memory of each alone, one row for each.

A benchmark is a list of functions that build a `Race` from the command line. The alternatives of a race run in turns
whose order rotates, so that a slow moment of the machine meets all of them; a ratio is the median over the turns of
seconds / seconds of the plain alternative in the same turn. Memory is the peak resident set (on a GPU: the peak of what
PyTorch has allocated) of a process that builds the race and then runs one alternative, twice, and nothing else.
"""
import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch
from fastai.callback.core import Callback

from medxfer_nb.repro.store import git_state, hardware, versions

LEAST_TURNS = 7
SLACK = 1.02  # measured peaks of one program differ by so much


@dataclass
class Race:
    "Alternatives that do the same work; the first is the plain one, which the others are divided by."
    what: str  # The row's title
    tasks: dict[str, Callable]  # Name -> task; one that returns a float says itself how many seconds counted
    goals: dict[str, float] = field(default_factory=dict)  # Name -> the largest ratio allowed; the others are there to compare
    setting: str = ''  # Network, sizes, precision
    lean: bool = False  # May those with a goal take no more memory than the plain one?


@dataclass(frozen=True)
class Row:
    what: str
    name: str
    ratio: float  # Median over the turns
    low: float  # Quartiles
    high: float
    goal: float | None
    beside: str
    seconds: float  # Medians
    beside_seconds: float
    peak_mib: float | None
    beside_peak_mib: float | None
    lean: bool
    turns: int
    setting: str
    device: str

    @property
    def met(self) -> bool | None:  # None: no goal
        if self.goal is None: return None
        return self.ratio <= self.goal and not (self.lean and self.peak_mib and self.peak_mib > SLACK*self.beside_peak_mib)


class Batches(list):
    "Batches in memory, as a fastai loader takes them."


class Stopwatch(Callback):
    "Seconds per training step of the last epoch; validation and the log after it left out."
    order = -100
    def before_train(self): self.start = self.now()
    def after_train(self): self.seconds = (self.now() - self.start)/len(self.dls.train)
    def now(self) -> float:
        if torch.cuda.is_initialized(): torch.cuda.synchronize()
        return time.perf_counter()


def epoch_seconds(learn, lr: float) -> float:
    "Seconds per step of one more epoch of a learner that has a `Stopwatch`."
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr)
    return learn.stopwatch.seconds


def in_turns(tasks: dict[str, Callable], turns: int, clock: Callable = time.perf_counter, wait: Callable = lambda: None) -> dict[str, list[float]]:
    "Seconds of each task in each turn; a first turn warms up and is left out."
    names, times = list(tasks), {name: [] for name in tasks}
    for turn in range(turns + 1):
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            wait()
            start, own = clock(), tasks[name]()
            wait()
            if turn: times[name].append(own if isinstance(own, float) else clock() - start)
    return times


def quartiles(ours: Sequence[float], plain: Sequence[float]) -> tuple[float, float, float]:
    "Of the ratios within the turns: the first, the median, the third."
    ratios = [a/b for a, b in zip(ours, plain, strict=True)]
    return tuple(statistics.quantiles(ratios, n=4, method='inclusive')) if len(ratios) > 1 else (ratios[0],)*3


def rows_of(race: Race, times: dict[str, list[float]], device: str, peaks: dict[str, float]) -> list[Row]:
    plain, rows = next(iter(race.tasks)), []
    for name, seconds in times.items():
        if name == plain: continue
        low, ratio, high = quartiles(seconds, times[plain])
        rows.append(Row(race.what, name, ratio, low, high, race.goals.get(name), plain, statistics.median(seconds), statistics.median(times[plain]),
                        peaks.get(name), peaks.get(plain), race.lean, len(seconds), race.setting, device))
    return rows


def _reset_peak():
    "Forget what building took, where the system can."
    try: Path('/proc/self/clear_refs').write_text('5')
    except OSError: pass
    if torch.cuda.is_initialized(): torch.cuda.reset_peak_memory_stats()


def _peak_mib() -> float:
    if torch.cuda.is_initialized(): return torch.cuda.max_memory_allocated()/2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10)


def _alone(build: Callable, a: argparse.Namespace, index: int, answer):
    race = build(a)
    name = list(race.tasks)[index]
    _reset_peak()
    for _ in range(2): race.tasks[name]()
    answer.send((name, len(race.tasks), _peak_mib()))


def peaks_of(build: Callable, a: argparse.Namespace) -> dict[str, float]:  # Name -> MiB
    "Each alternative in a process of its own. To fork before the first computation is cheap and safe: no threads yet; CUDA forbids it."
    context, peaks, index, n = multiprocessing.get_context('spawn' if a.device == 'cuda' else 'fork'), {}, 0, 1
    while index < n:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_alone, args=(build, a, index, theirs))
        child.start()
        theirs.close()
        try: name, n, peaks[name] = ours.recv()
        except EOFError: raise SystemExit(f'{getattr(build, "func", build).__name__}: an alternative ended without a result when it ran alone')
        finally: child.join()
        index += 1
    return peaks


def arguments(doc: str, argv: Sequence[str] | None, tiny: dict, options: dict) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in options.items():
        if isinstance(default, bool): parser.add_argument(f'--{name}', action='store_true')
        else: parser.add_argument(f'--{name}', type=type(default), default=default, metavar=str(default))
    parser.add_argument('--turns', type=int, default=9, help=f'at least {LEAST_TURNS} for the record')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--json', type=Path, metavar='FILE', help='append the rows to it, one JSON object a line')
    parser.add_argument('--no-memory', dest='memory', action='store_false', help='leave the memory of each alternative out')
    parser.add_argument('--tiny', action='store_true', help='the smallest sizes and one turn: does it run?')
    if '--tiny' in (sys.argv[1:] if argv is None else argv): parser.set_defaults(turns=1, **tiny)
    a = parser.parse_args(argv)
    if a.turns < 1: parser.error('--turns is 1 or more')
    if a.device == 'cuda' and not torch.cuda.is_available(): parser.error('there is no CUDA device here: leave --device out')
    return a


def show(rows: Sequence[Row]):
    "A table on the screen."
    print(f'{"what":34s} {"":26s} {"ratio":>7s} {"quartiles":>13s} {"goal":>5s} {"time":>10s} {"peak":>9s}  beside')
    for r in rows:
        goal = '' if r.goal is None else f'{r.goal:g}'
        peak = f'{r.peak_mib:.0f} MiB' if r.peak_mib else ''
        beside = f'{r.beside}, {1000*r.beside_seconds:.1f} ms' + (f', {r.beside_peak_mib:.0f} MiB' if r.beside_peak_mib else '')
        missed = '  MISSED' if r.met is False else ''
        print(f'{r.what[:34]:34s} {r.name[:26]:26s} {r.ratio:7.3f} {f"{r.low:.3f}-{r.high:.3f}":>13s} {goal:>5s} {1000*r.seconds:7.1f} ms {peak:>9s}  {beside}{missed}')


def machine() -> dict:
    "Where, with what and when."
    found, code = hardware(), git_state()
    return dict(cpu=found['cpu'], cores=found['cores'], gpu=found['gpu'], threads=torch.get_num_threads(), versions=versions(),
                commit=f"{(code['commit'] or '')[:12]}{'+' if code['dirty'] else ''}", date=date.today().isoformat())


def append(path: Path, rows: Sequence[Row]):
    at = machine()
    with open(path, 'a', encoding='utf-8') as f:
        for r in rows: f.write(json.dumps(asdict(r) | dict(met=r.met) | at) + '\n')


def main(doc: str, builders: Sequence[Callable], argv: Sequence[str] | None = None, tiny: dict | None = None, **options) -> bool:
    "Run the races of a benchmark; False where a goal is missed. `tiny`: values of the options for `--tiny`."
    a, rows = arguments(doc, argv, tiny or {}, options), []
    peaks = [peaks_of(build, a) if a.memory else {} for build in builders]  # all of them before the first computation here
    wait = torch.cuda.synchronize if a.device == 'cuda' else lambda: None
    for build, peak in zip(builders, peaks):
        torch.manual_seed(0)
        race = build(a)
        rows += rows_of(race, in_turns(race.tasks, a.turns, wait=wait), a.device, peak)
    show(rows)
    if a.json: append(a.json, rows)
    return all(r.met is not False for r in rows)
