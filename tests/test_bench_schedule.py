"""Turns: order, how many, when to stop, and what a failing worker does to the others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from edgekit.bench.schedule import FULL, QUICK, Pace, Series, enough, run
from edgekit.errors import WorkerError

PACE = replace(FULL, rest_s=0.0)


@dataclass
class Scripted:
    """A worker whose runs last as long as it is told; its clock is its own, so a test takes no time."""

    label: str
    run_s: float
    log: list[str]
    fails_in_round: int = -1
    rounds: int = 0
    settled: list[float] = field(default_factory=list)
    warm: tuple[int, float, float] | None = None

    def warmup(self, runs: int, seconds: float, limit_s: float) -> tuple[int, float]:
        if self.fails_in_round == -2:
            raise WorkerError(f"{self.label}: broke in warm-up")
        self.warm = (runs, seconds, limit_s)
        return runs, seconds

    def round(self, seconds: float, runs: int, settle_s: float) -> np.ndarray:
        self.log.append(self.label)
        self.settled.append(settle_s)
        if self.rounds == self.fails_in_round:
            raise WorkerError(f"{self.label}: broke")
        self.rounds += 1
        count = max(1, int(np.ceil(seconds / self.run_s - 1e-9)))
        return np.full(count, int(self.run_s * 1e9), np.int64)


def test_everyone_gets_enough_and_the_same_number_of_turns() -> None:
    log: list[str] = []
    workers = [Scripted("a", 0.001, log), Scripted("b", 0.15, log), Scripted("c", 0.02, log)]
    series = run(workers, PACE, seed=1)
    assert len({len(s.rounds) for s in series}) == 1
    for s in series:
        assert s.runs >= 50
        assert s.seconds >= 5.0
        assert s.error is None
    assert {w.warm for w in workers} == {(10, 1.0, 10.0)}


def test_one_turn_each_a_cycle_in_a_seeded_changing_order() -> None:
    def order(seed: int) -> list[str]:
        log: list[str] = []
        run([Scripted(n, 0.01, log) for n in "abc"], PACE, seed)
        return log

    log = order(3)
    cycles = [tuple(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert all(sorted(c) == ["a", "b", "c"] for c in cycles)
    assert len(set(cycles)) > 1
    assert order(3) == log
    assert order(4) != log


def test_a_slow_model_stops_at_its_limit() -> None:
    (series,) = run([Scripted("slow", 4.0, [])], PACE)
    assert series.seconds >= PACE.limit_s
    assert PACE.floor_runs <= series.runs < PACE.runs
    (series,) = run([Scripted("slower", 30.0, [])], PACE)
    assert series.runs == PACE.floor_runs


def test_quick_asks_for_less_and_says_so() -> None:
    (series,) = run([Scripted("a", 0.01, [])], replace(QUICK, rest_s=0))
    assert series.runs >= 20
    assert 0.5 <= series.seconds < 5
    assert QUICK.quick
    assert not FULL.quick


def test_a_worker_that_fails_leaves_and_the_others_finish() -> None:
    log: list[str] = []
    good, bad, never = Scripted("g", 0.01, log), Scripted("b", 0.01, log, 2), Scripted("n", 0.01, log, -2)
    series = run([good, bad, never], PACE)
    assert series[0].error is None
    assert enough(series[0], PACE)
    assert series[1].error == "b: broke"
    assert len(series[1].rounds) == 2
    assert series[2] == Series((), "n: broke in warm-up")


def test_all_fail_and_none_at_all() -> None:
    assert run([], PACE) == []
    assert [s.error for s in run([Scripted("b", 0.01, [], 0)], PACE)] == ["b: broke"]


def test_settling_is_for_fast_models() -> None:
    fast, slow = Scripted("f", 0.001, []), Scripted("s", 0.2, [])
    run([fast, slow], PACE)
    assert set(fast.settled) == {PACE.settle_s}
    assert set(slow.settled[1:]) == {0.0}


def test_progress_rises_to_one() -> None:
    seen: list[tuple[str, float, float]] = []
    run([Scripted("a", 0.01, [])], PACE, progress=lambda *a: seen.append(a))
    measured = [d / t for stage, d, t in seen if stage == "measure"]
    assert measured == sorted(measured)
    assert measured[-1] == 1.0


@pytest.mark.parametrize(
    ("runs", "seconds", "done"), [(49, 9.0, False), (50, 4.9, False), (50, 5.0, True), (9, 99, False)]
)
def test_enough(runs: int, seconds: float, done: bool) -> None:
    series = Series((np.full(runs, int(seconds * 1e9 / runs) + 1, np.int64),))
    assert enough(series, Pace()) is done
