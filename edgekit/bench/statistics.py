"""Summaries of raw samples: percentiles that the sample supports, bootstrap ratios, stability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Rounds = Sequence[np.ndarray[Any, Any]]

P99_SAMPLES = 1000  # ten samples lie beyond the 99th percentile; DESIGN "Measuring"
P90_SAMPLES = 20  # two samples lie beyond the 90th
_BOOTSTRAP = 1000
_THINNED = 4000  # samples a resample looks at; beyond it a median moves by less than the rounds do
# Otsu's split explains .64 of a normal's variance and .75 of a uniform's; two separate modes explain nearly all.
_BIMODAL_EXPLAINED = 0.85
_BIMODAL_SHARE = 0.1
_BIMODAL_GAP = 1.15
_DRIFT = 0.05
_NOISE = 0.2


@dataclass(frozen=True)
class Summary:
    """Seconds. p90 and p99 are None when the sample is too small; `reasons` says so, `notes` judges stability."""

    p50: float
    p90: float | None
    p99: float | None
    mean: float
    samples: int
    reasons: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def summarize(rounds: Rounds) -> Summary:
    """rounds: nanoseconds, one array per round, at least one sample in all."""
    samples = np.concatenate([np.asarray(r, np.float64) for r in rounds]) * 1e-9
    count = len(samples)
    reasons = []
    p90 = p99 = None
    if count >= P90_SAMPLES:
        p90 = float(np.percentile(samples, 90))
    else:
        reasons.append(f"p90 needs {P90_SAMPLES} samples, there are {count}")
    if count >= P99_SAMPLES:
        p99 = float(np.percentile(samples, 99))
    else:
        reasons.append(f"p99 needs {P99_SAMPLES} samples, there are {count}")
    p50, mean = float(np.median(samples)), float(samples.mean())
    return Summary(p50, p90, p99, mean, count, tuple(reasons), tuple(stability(rounds)))


def ratio_of_medians(a: Rounds, b: Rounds, seed: int = 0) -> Ratio:
    """median(a) / median(b) with a paired block bootstrap over rounds.

    Round i of both was taken in the same cycle, so what slowed the machine then slowed both; samples inside a round
    are not independent, so whole rounds are drawn (Kunsch 1989, with cycles as blocks).
    """
    if a is b:
        return Ratio(1.0, 1.0, 1.0)
    value = float(np.median(np.concatenate(list(a))) / np.median(np.concatenate(list(b))))
    cycles = min(len(a), len(b))
    thin_a, thin_b = _thin(a[:cycles]), _thin(b[:cycles])
    rng = np.random.default_rng(seed)
    draws = np.empty(_BOOTSTRAP)
    for i in range(_BOOTSTRAP):
        chosen = rng.integers(0, cycles, cycles)
        draws[i] = np.median(np.concatenate([thin_a[c] for c in chosen])) / np.median(
            np.concatenate([thin_b[c] for c in chosen])
        )
    low, high = (float(q) for q in np.percentile(draws, [2.5, 97.5]))
    return Ratio(value, min(low, value), max(high, value))


def _thin(rounds: Rounds) -> list[np.ndarray[Any, Any]]:
    """Every k-th sample of each sorted round: the same distribution, fewer values; at least one a round."""
    step = max(1, -(-sum(len(r) for r in rounds) // _THINNED))
    return [np.sort(r)[min(step // 2, (len(r) - 1) // 2) :: step] for r in rounds]


def stability(rounds: Rounds) -> list[str]:
    """What a reader should know before trusting the series; empty when it was steady."""
    samples = np.concatenate([np.asarray(r, np.float64) for r in rounds])
    notes = []
    if len(samples) >= P90_SAMPLES:
        low, mid, high = np.percentile(samples, [25, 50, 75])
        if (high - low) / mid > _NOISE:
            notes.append(f"noisy: the middle half of the runs spans {100 * (high - low) / mid:.0f} % of the median")
    modes = _modes(samples)
    if modes is not None:
        notes.append(f"two speeds: around {modes[0] * 1e-6:.3g} ms and {modes[1] * 1e-6:.3g} ms")
    drift = _drift(rounds)
    if drift is not None:
        notes.append(f"drift: the last third ran {100 * drift:+.0f} % against the first")
    return notes


def _modes(samples: np.ndarray[Any, Any]) -> tuple[float, float] | None:
    """The centres of two well separated modes, or None (Otsu 1979 on the samples without their extremes)."""
    if len(samples) < 50:
        return None
    ordered = np.sort(samples)
    cut = len(ordered) // 50
    ordered = ordered[cut : len(ordered) - cut]
    total = float(ordered.var())
    if total == 0:
        return None
    count = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)
    below = sums[:-1] / count
    above = (sums[-1] - sums[:-1]) / (len(ordered) - count)
    share = count / len(ordered)
    between = share * (1 - share) * (above - below) ** 2 / total
    best = int(np.argmax(between))
    separate = between[best] > _BIMODAL_EXPLAINED and above[best] > _BIMODAL_GAP * below[best]
    if not separate or not _BIMODAL_SHARE < share[best] < 1 - _BIMODAL_SHARE:
        return None
    return float(below[best]), float(above[best])


def _drift(rounds: Rounds) -> float | None:
    """Relative change of the median from the first third of the rounds to the last, if it is a trend, else None."""
    third = len(rounds) // 3
    if third < 3:
        return None
    medians = np.array([np.median(r) for r in rounds])
    first, last = medians[:third], medians[-third:]
    change = float(np.median(last) / np.median(first) - 1)
    apart = first.max() < last.min() or last.max() < first.min()
    return change if apart and abs(change) > _DRIFT else None
