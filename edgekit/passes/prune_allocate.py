"""How many channels each family keeps under a budget: the least damage per multiply-accumulate saved goes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.passes.coupling import Coupling, Family
from edgekit.passes.prune_damage import Curve
from edgekit.passes.prune_importance import Order

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Choice:
    """One family's candidates. widths: numbers of units that it may keep, falling, the whole first."""

    family: Family
    order: Order
    curve: Curve
    widths: tuple[int, ...]


def widths(units: int, positions: int, multiple: int) -> tuple[int, ...]:
    """Numbers of units worth keeping, falling from all to the least: those that make a multiple of `multiple` channels.

    Of half of it in a family of at most four such steps, halved again until there are four. positions: channels a unit.
    """
    total, step = units * positions, multiple
    if step > 1 and total <= 4 * step:
        step //= 2
    while step > 1 and total < 4 * step:
        step //= 2
    return (units, *(n for n in range(units - 1, 0, -1) if n * positions % step == 0))


class Cost:
    """A sum of products, each of a number and of the share of some channels that are kept, by the families' shares."""

    def __init__(
        self, coupling: Coupling, families: Sequence[Family], terms: Sequence[tuple[float, tuple[Array, ...]]]
    ):
        """terms: (cost now, the label arrays in proportion to which it falls)."""
        owner = np.full(coupling.count, -1)
        roots = coupling.roots(np.arange(coupling.count))
        for index, family in enumerate(families):
            owner[family.units] = index
        owner = owner[roots]
        rows: list[Array] = []
        self._bases: list[float] = []
        self._terms: list[tuple[float, list[int]]] = []
        for number, factors in terms:
            self._terms.append((number, list(range(len(rows), len(rows) + len(factors)))))
            for labels in factors:
                counts = np.bincount(owner[labels] + 1, minlength=len(families) + 1) / len(labels)
                rows.append(counts[1:])
                self._bases.append(float(counts[0]))
        self._shares = np.array(rows).reshape(len(rows), len(families))

    def __call__(self, kept: Array) -> float:
        """kept: of each family, the share of its units."""
        shares = self._shares @ kept + self._bases
        return float(sum(number * np.prod(shares[at]) for number, at in self._terms))


def allocate(choices: Sequence[Choice], cost: Cost, budget: float) -> list[int]:
    """Units that each family keeps, so that the cost is at most `budget`, or the least that there is.

    Steps of least damage per cost saved, along the lower convex hull of each curve; what a step saves depends on all
    families, so it is asked for anew.
    """
    kept = [len(c.family.units) for c in choices]
    share = np.ones(len(choices))
    now = cost(share)
    while now > budget:
        best: tuple[float, int, int, float] | None = None
        for index, choice in enumerate(choices):
            width = _next(choice, kept[index])
            if width is None:
                continue
            trial = share.copy()
            trial[index] = width / len(choice.family.units)
            after = cost(trial)
            if after >= now:
                continue
            rate = (_damage(choice, width) - _damage(choice, kept[index])) / (now - after)
            if best is None or rate < best[0]:
                best = (rate, index, width, after)
        if best is None:
            break
        _, index, width, now = best
        kept[index] = width
        share[index] = width / len(choices[index].family.units)
    while (wider := _wider(choices, kept, cost, budget)) is not None:
        kept = wider
    return kept


def _wider(choices: Sequence[Choice], kept: list[int], cost: Cost, budget: float) -> list[int] | None:
    """What the last step saved too much, given back where it helps most: one family wider, within the budget."""
    best: tuple[float, list[int]] | None = None
    for index, choice in enumerate(choices):
        for width in choice.widths:
            trial = [*kept[:index], width, *kept[index + 1 :]]
            gain = _damage(choice, kept[index]) - _damage(choice, width)
            if width <= kept[index] or (best is not None and gain <= best[0]):
                continue
            if cost(np.array([w / len(c.family.units) for w, c in zip(trial, choices, strict=True)])) <= budget:
                best = (gain, trial)
    return None if best is None else best[1]


def _damage(choice: Choice, width: int) -> float:
    return choice.curve.at(len(choice.family.units) - width)


def _next(choice: Choice, width: int) -> int | None:
    """The next point of the hull: of the smaller widths, the one of least damage per unit."""
    smaller = [w for w in choice.widths if w < width]
    if not smaller:
        return None
    return min(smaller, key=lambda w: ((_damage(choice, w) - _damage(choice, width)) / (width - w), -w))


def kept(coupling: Coupling, choices: Sequence[Choice], widths: Sequence[int]) -> Array:
    """bool per label."""
    return coupling.without(
        int(u) for c, w in zip(choices, widths, strict=True) for u in c.order.units[: len(c.family.units) - w]
    )
