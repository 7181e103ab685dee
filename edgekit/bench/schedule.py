"""Lets workers take turns in short rounds, one running at a time, so that ratios hold while a machine drifts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from edgekit.errors import WorkerError

Nanoseconds = np.ndarray[Any, np.dtype[np.int64]]
Progress = Callable[[str, float, float], None]


class Turn(Protocol):
    """What the schedule needs of a worker."""

    @property
    def label(self) -> str: ...
    def warmup(self, runs: int, seconds: float, limit_s: float) -> tuple[int, float]: ...
    def round(self, seconds: float, runs: int, settle_s: float) -> Nanoseconds: ...


@dataclass(frozen=True)
class Pace:
    """How long to measure. All seconds; each candidate gets at least `runs` and `seconds`, in rounds of `round_s`.

    limit_s: a model so slow that `runs` would take longer than this stops here, with `floor_runs` at least.
    settle_s: unrecorded runs at the start of a round, while the caches refill.
    rest_s: pause between rounds, for the thread pool of the last one to go to sleep.
    """

    warmup_runs: int = 10
    warmup_s: float = 1.0
    warmup_limit_s: float = 10.0
    runs: int = 50
    seconds: float = 5.0
    round_s: float = 0.2
    limit_s: float = 60.0
    floor_runs: int = 10
    settle_s: float = 0.01
    rest_s: float = 0.005
    quick: bool = False


FULL = Pace()
QUICK = replace(
    FULL,
    warmup_runs=3,
    warmup_s=0.1,
    warmup_limit_s=3.0,
    runs=20,
    seconds=0.5,
    round_s=0.05,
    limit_s=10.0,
    floor_runs=5,
    quick=True,
)


@dataclass(frozen=True)
class Series:
    """The rounds of one worker, in time order; round i of every worker of a schedule belongs to the same cycle.

    error: why the worker stopped early, or None.
    """

    rounds: tuple[Nanoseconds, ...]
    error: str | None = None

    @property
    def runs(self) -> int:
        return sum(len(r) for r in self.rounds)

    @property
    def seconds(self) -> float:
        return float(sum(int(r.sum()) for r in self.rounds)) * 1e-9


def run(workers: Sequence[Turn], pace: Pace, seed: int = 0, progress: Progress | None = None) -> list[Series]:
    """Warm every worker up, then cycle through them in an order shuffled for each cycle until all have enough.

    The workers must have inputs bound. One that fails leaves with its error; the others go on.
    """
    rng = np.random.default_rng(seed)
    report = progress or (lambda stage, done, total: None)
    rounds: list[list[Nanoseconds]] = [[] for _ in workers]
    errors: dict[int, str] = {}
    for index, worker in enumerate(workers):
        report("warm up", index, len(workers))
        try:
            worker.warmup(pace.warmup_runs, pace.warmup_s, pace.warmup_limit_s)
        except WorkerError as error:
            errors[index] = error.what
    active = [i for i in range(len(workers)) if i not in errors]
    while active and not all(enough(Series(tuple(rounds[i])), pace) for i in active):
        for index in rng.permutation(active):
            time.sleep(pace.rest_s)
            try:
                rounds[index].append(workers[index].round(pace.round_s, 1 << 30, _settle_s(rounds[index], pace)))
            except WorkerError as error:
                errors[int(index)] = error.what
        active = [i for i in active if i not in errors]
        if active:
            report("measure", min(_share(Series(tuple(rounds[i])), pace) for i in active), 1.0)
    return [Series(tuple(done), errors.get(i)) for i, done in enumerate(rounds)]


def enough(series: Series, pace: Pace) -> bool:
    """Whether one worker has the runs and seconds that the pace asks for, or has met its limit."""
    if series.runs >= pace.runs and series.seconds >= pace.seconds:
        return True
    return series.runs >= pace.floor_runs and series.seconds >= pace.limit_s


def _share(series: Series, pace: Pace) -> float:
    """0 to 1: how far along a worker is."""
    asked = min(series.runs / pace.runs, series.seconds / pace.seconds)
    bounded = min(series.runs / pace.floor_runs, series.seconds / pace.limit_s)
    return min(1.0, max(asked, bounded))


def _settle_s(rounds: Sequence[Nanoseconds], pace: Pace) -> float:
    """No settling for a model whose single run is long: refilling the caches is a small part of it."""
    if rounds and float(np.median(rounds[-1])) * 1e-9 > 5 * pace.settle_s:
        return 0.0
    return pace.settle_s
