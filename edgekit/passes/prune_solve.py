"""One layer fitted to rows: least squares with a ridge towards the weights that it has, behind its activation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgekit.passes import regression as L

Array = np.ndarray[Any, Any]
RIDGES = tuple(10.0 ** (k / 2) for k in range(-12, 2))  # of the mean diagonal of x̂ᵀx̂
ROUNDS = 3  # of majorization; 10 or 30 change less than another choice of samples does
FREE = (-np.inf, np.inf)
EXACT = 1e-10  # of the results' power: an error of two orders of adding up


@dataclass(frozen=True)
class Rows:
    """x: (groups, rows, features), y: (groups, rows, outputs), float32. held: rows from here on judge."""

    x: Array
    y: Array
    held: int


@dataclass(frozen=True)
class Solved:
    """change: to add to the weights. shift: to add to the bias. gain: error held back, as a share of that before."""

    change: Array
    shift: Array
    gain: float


def solve(layer: L.Layer, rows: Rows, bounds: tuple[float, float] = FREE) -> Solved:
    """The ridge, and how many rounds for the activation, are chosen by the held rows; then all rows are fitted.

    bounds: where what follows is not flat: (0, inf) before a Relu.
    """
    problem = _Problem(layer, rows, bounds, rows.held)
    best = problem.nothing()
    plain = best.gain
    if not plain > EXACT * float(np.square(rows.y[:, rows.held :], dtype=np.float64).mean()):
        return replace(best, gain=1.0)
    ridge, rounds = None, 0
    for tried in RIDGES:
        found = problem.solved(tried)
        if found.gain < best.gain:
            best, ridge = found, tried
    if ridge is None:
        return replace(best, gain=1.0)
    now = best
    for count in range(1, ROUNDS + 1 if np.isfinite(bounds).any() else 1):
        now = problem.solved(ridge, now)
        if now.gain < best.gain:
            best, rounds = now, count
    whole = _Problem(layer, rows, bounds, rows.x.shape[1])
    last = whole.solved(ridge)
    for _ in range(rounds):
        last = whole.solved(ridge, last)
    return replace(last, gain=best.gain / plain)


class _Problem:
    """The regression of one layer on its first `count` rows. `gain` of what it solves: squared error on the held."""

    def __init__(self, layer: L.Layer, rows: Rows, bounds: tuple[float, float], count: int) -> None:
        self.layer, self.bounds, self.count = layer, bounds, count
        self.rows = rows
        self.free = layer.bias is not None
        self.start = rows.x @ layer.weight.astype(np.float32)
        if layer.bias is not None:
            self.start += layer.bias[:, None, :].astype(np.float32)
        self.x, self.y = rows.x[:, :count], rows.y[:, :count]
        self.mean = self.x.mean(axis=1, keepdims=True, dtype=np.float64) if self.free else np.zeros((len(rows.x), 1, 1))
        gram = (self.x.swapaxes(1, 2) @ self.x).astype(np.float64) / count
        gram -= self.mean.swapaxes(1, 2) @ self.mean
        self.scale = np.trace(gram, axis1=1, axis2=2)[:, None] / gram.shape[1] + 1e-12
        values, self.vectors = np.linalg.eigh(gram)
        self.values = np.maximum(values, 0)

    def nothing(self) -> Solved:
        change, shift = np.zeros_like(self.layer.weight), np.zeros_like(self.layer.weight[:, 0])
        return Solved(change, shift, self.error(change, shift))

    def solved(self, ridge: float, after: Solved | None = None) -> Solved:
        """after: what was solved before; where the activation is flat, what that gives is as good as what is wanted."""
        rest = (self.y if after is None else self._goal(after)) - self.start[:, : self.count]
        mean = rest.mean(axis=1, keepdims=True, dtype=np.float64) if self.free else np.zeros((len(rest), 1, 1))
        slope = (self.x.swapaxes(1, 2) @ rest).astype(np.float64) / self.count - self.mean.swapaxes(1, 2) @ mean
        inverse = 1 / (self.values + ridge * self.scale)
        change = self.vectors @ (inverse[:, :, None] * (self.vectors.swapaxes(1, 2) @ slope))
        shift = (mean - self.mean @ change)[:, 0] if self.free else np.zeros_like(change[:, 0])
        return Solved(change, shift, self.error(change, shift))

    def result(self, change: Array, shift: Array, part: slice) -> Array:
        """What the layer gives with these changes."""
        own = self.rows.x[:, part] @ change.astype(np.float32)
        return np.asarray(self.start[:, part] + own + shift[:, None].astype(np.float32))

    def error(self, change: Array, shift: Array) -> float:
        part = slice(self.rows.held, None)
        got, wanted = self.result(change, shift, part), self.rows.y[:, part]
        return float(np.square(np.clip(got, *self.bounds) - np.clip(wanted, *self.bounds), dtype=np.float64).mean())

    def _goal(self, now: Solved) -> Array:
        """What to ask for next: where the activation is flat anything beyond its bound is right."""
        got, (low, high) = self.result(now.change, now.shift, slice(0, self.count)), self.bounds
        below, above = np.minimum(got, low), np.maximum(got, high)
        return np.where(self.y <= low, below, np.where(self.y >= high, above, self.y))
