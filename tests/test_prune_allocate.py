"""How many channels each family keeps, against every possible choice."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgekit.passes.coupling import Family, Meter
from edgekit.passes.coupling_trace import trace
from edgekit.passes.prune_allocate import Choice, Cost, allocate, kept, widths
from edgekit.passes.prune_channels import prepared_for_pruning, sizes
from edgekit.passes.prune_damage import Curve
from edgekit.passes.prune_importance import Order
from tests.prune_nets import bottlenecks
from tests.quantize_graphs import Array


def choice(units: int, damages: Array, options: tuple[int, ...], first: int = 0) -> Choice:
    """damages: by units removed."""
    labels = np.arange(first, first + units)
    return Choice(Family(str(first), labels, ""), Order(labels, damages, {}), Curve(np.arange(units), damages), options)


@pytest.mark.parametrize(
    ("units", "positions", "multiple", "expected"),
    [
        (40, 1, 8, (40, 32, 24, 16, 8)),
        (42, 1, 8, (42, 40, 32, 24, 16, 8)),
        (32, 1, 8, (32, 28, 24, 20, 16, 12, 8, 4)),
        (16, 1, 8, (16, 12, 8, 4)),
        (8, 1, 8, (8, 6, 4, 2)),
        (3, 1, 8, (3, 2, 1)),
        (4, 16, 8, (4, 3, 2, 1)),
        (10, 4, 8, (10, 8, 6, 4, 2)),
        (12, 4, 8, (12, 10, 8, 6, 4, 2)),
        (6, 1, 1, (6, 5, 4, 3, 2, 1)),
    ],
)
def test_widths_are_multiples(units: int, positions: int, multiple: int, expected: tuple[int, ...]) -> None:
    assert widths(units, positions, multiple) == expected


@pytest.mark.parametrize("seed", range(6))
def test_convex_curves_are_shared_out_as_well_as_can_be(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(1, 5, 3)
    choices = [
        choice(8, np.concatenate([[0.0], np.cumsum(np.sort(rng.exponential(1, 7)))]), tuple(range(8, 0, -1)), 8 * i)
        for i in range(3)
    ]

    def cost(share: Array) -> float:
        return float(8 * weights @ share)

    budget = 0.55 * cost(np.ones(3))
    got = allocate(choices, cost, budget)  # type: ignore[arg-type]

    def damage(widths: Any) -> float:
        return sum(c.curve.at(8 - w) for c, w in zip(choices, widths, strict=True))

    allowed = [w for w in itertools.product(range(1, 9), repeat=3) if cost(np.array(w) / 8) <= budget]
    assert tuple(got) in allowed
    step = max(float(np.diff(c.curve.damages).max()) for c in choices)
    assert damage(got) <= min(map(damage, allowed)) + step  # greedy: at most one step from the best


def test_a_cliff_after_a_flat_part_is_not_taken_for_its_mean() -> None:
    flat = np.array([0, 0.01, 0.02, 0.03, 5.0, 10.0, 15.0, 20.0])
    slope = np.arange(8) * 0.5
    got = allocate(
        [choice(8, flat, tuple(range(8, 0, -1))), choice(8, slope, tuple(range(8, 0, -1)), 8)],
        lambda share: float(share.sum()),  # type: ignore[arg-type]
        2 - 3 / 8,
    )
    assert got == [5, 8]


def test_a_budget_out_of_reach_takes_all_there_is() -> None:
    got = allocate([choice(8, np.arange(8.0), (8, 4, 2))], lambda share: float(share.sum()), 0.01)  # type: ignore[arg-type]
    assert got == [2]


def test_what_the_last_step_saved_too_much_is_given_back() -> None:
    steep, even = np.arange(8) * 0.1, np.arange(8) * 1.0
    choices = [choice(8, steep, (8, 2)), choice(8, even, tuple(range(8, 0, -1)), 8)]
    got = allocate(choices, lambda share: float(share.sum()), 1.4)  # type: ignore[arg-type]
    assert got == [2, 8]


@pytest.mark.parametrize("seed", range(3))
def test_cost_is_what_the_meter_counts(seed: int) -> None:
    model = prepared_for_pruning(bottlenecks())
    coupling = trace(model)
    families = [f for f in coupling.families() if not f.frozen]
    cost = Cost(coupling, families, [(w.macs, w.factors) for w in coupling.works])
    rng = np.random.default_rng(seed)
    widths = [int(rng.integers(1, len(f.units) + 1)) for f in families]
    choices = [SimpleNamespace(family=f, order=Order(rng.permutation(f.units), np.zeros(1), {})) for f in families]
    keep = kept(coupling, choices, widths)  # type: ignore[arg-type]
    share = np.array([w / len(f.units) for w, f in zip(widths, families, strict=True)])
    assert cost(share) == pytest.approx(Meter(coupling, sizes(model)).macs(keep))
