"""Repairs a recurrent layer that lost hidden units or inputs: what its gates get is fitted to what they got.

First with the float layer's states (teacher forcing), then with the states that the fitted layer runs into; what gives
the nearest states on samples held back is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G
from edgekit.passes.coupling import Coupling
from edgekit.passes.prune_readings import Reading, features, readings, states
from edgekit.passes.prune_solve import Rows, solve

Array = np.ndarray[Any, Any]
ROUNDS = 3  # the first with the float layer's states
ROWS = 32768
HELD = 5  # one sample in so many judges


def refit(
    node: ir.Node,
    twin: ir.Node,
    coupling: Coupling,
    keep: Array,
    exact: Sequence[Array],
    given: Sequence[Array],
    rng: np.random.Generator,
) -> float | None:
    """Fit `twin`, what is left of `node`, in place: its error as a share of that before; None without samples to judge.

    exact, given: what the two read, (steps, batch, n) a batch.
    """
    x, cut = np.concatenate(exact, axis=1), np.concatenate(given, axis=1)
    held = x.shape[1] // HELD
    if not held:
        return None
    units = next(keep[s.labels] for s in coupling.sites if s.node == node.name and s.position == 2 and s.axis == 2)
    before = states(node, x)
    wanted = before[..., units]
    plain = _error(states(twin, cut), wanted, held)
    if not plain > 0:
        return 1.0
    best, kept = plain, _weights(twin)
    for count in range(ROUNDS):
        seen = wanted if count == 0 else states(twin, cut)
        for own, reading in zip(readings(node), readings(twin), strict=True):
            _, columns = own.kept(coupling, keep)
            goal = _gates(own, features(own, x, before), columns)
            fitted = solve(reading.layer, _rows(reading, features(reading, cut, seen), goal, x.shape[:2], rng))
            reading.write(reading.layer.weight + fitted.change, fitted.shift)
        error = _error(states(twin, cut), wanted, held)
        if error < best:
            best, kept = error, _weights(twin)
    for position, array in kept.items():
        G.set_constant(twin, position, f"{twin.name}/{position}", array)
    return best / plain


def _gates(reading: Reading, rows: Array, columns: Array) -> Array:
    """What the gates of the units that are left get from these rows of features."""
    layer = reading.layer
    got = rows @ layer.weight.astype(np.float32) + (0 if layer.bias is None else layer.bias[:, None].astype(np.float32))
    return np.stack([np.compress(c, g, axis=-1) for g, c in zip(got, columns, strict=True)])


def _rows(reading: Reading, x: Array, y: Array, size: tuple[int, ...], rng: np.random.Generator) -> Rows:
    """Some of the rows, those of the last samples at the end. size: (steps, samples)."""
    steps, samples = size
    sample = np.tile(np.arange(samples), steps)
    order = np.argsort(sample, kind="stable")
    if len(order) > ROWS:
        order = order[np.sort(rng.choice(len(order), ROWS, replace=False))]
    at = int(np.searchsorted(sample[order], samples - samples // HELD))
    return Rows(x[:, order], y[:, order], at)


def _error(got: Array, wanted: Array, held: int) -> float:
    return float(np.square(got[:, :, -held:] - wanted[:, :, -held:], dtype=np.float64).mean())


def _weights(node: ir.Node) -> dict[int, Array]:
    return {p: a for p in (1, 2, 3) if len(node.inputs) > p and (a := G.array(node.inputs[p])) is not None}
