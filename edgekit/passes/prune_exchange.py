"""Improves an allocation by what repaired models really suffer: one family gets narrower, another wider.

Curves take families one by one; cut together they suffer more or less. The exchanges that the curves like best are
tried out, and kept where the output is nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from edgekit.passes.prune_allocate import Choice, Cost

Array = np.ndarray[Any, Any]
TRIES = 16
MARGIN = 0.02  # a gain below this share is left: so few samples cannot tell


def exchanged(
    start: Sequence[int],
    choices: Sequence[Choice],
    cost: Cost,
    budget: float,
    damage: Callable[[Sequence[int]], float],
    tries: int = TRIES,
) -> list[int]:
    """Units that each family keeps, within the budget. damage: of the repaired model, asked for at most `tries`."""
    now, seen = list(start), {tuple(start)}
    best = damage(now)
    left = tries - 1
    while left > 0:
        moves = sorted(_moves(now, choices, cost, budget), key=lambda m: m[0])
        fresh = next((m for _, m in moves if tuple(m) not in seen), None)
        if fresh is None:
            break
        seen.add(tuple(fresh))
        left -= 1
        got = damage(fresh)
        if got < best * (1 - MARGIN):
            best, now = got, fresh
    return now


def _moves(
    now: Sequence[int], choices: Sequence[Choice], cost: Cost, budget: float
) -> Iterator[tuple[float, list[int]]]:
    """(what the curves expect to be added, widths): one family wider by a step or two, perhaps another narrower."""
    for gaining, choice in enumerate(choices):
        for width in sorted(w for w in choice.widths if w > now[gaining])[:2]:
            wider = [*now[:gaining], width, *now[gaining + 1 :]]
            if cost(_shares(wider, choices)) <= budget:
                yield _expected(wider, now, choices), wider
                continue
            for losing, other in enumerate(choices):
                narrower = next(
                    (
                        trial
                        for w in sorted((w for w in other.widths if w < now[losing]), reverse=True)
                        if losing != gaining
                        and cost(_shares(trial := [*wider[:losing], w, *wider[losing + 1 :]], choices)) <= budget
                    ),
                    None,
                )
                if narrower is not None:
                    yield _expected(narrower, now, choices), narrower


def _shares(widths: Sequence[int], choices: Sequence[Choice]) -> Array:
    return np.array([w / len(c.family.units) for w, c in zip(widths, choices, strict=True)])


def _expected(widths: Sequence[int], now: Sequence[int], choices: Sequence[Choice]) -> float:
    return sum(
        c.curve.at(len(c.family.units) - w) - c.curve.at(len(c.family.units) - n)
        for w, n, c in zip(widths, now, choices, strict=True)
        if w != n
    )
