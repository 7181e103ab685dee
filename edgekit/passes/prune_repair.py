"""Repairs what pruning leaves, layer by layer in graph order: each layer is fitted to what the float layer gave.

A layer of the pruned model sees the inputs that the pruned and repaired layers before it give, x̂, and is asked for the
kept channels of the float layer's result: W = W₀ + (x̂ᵀx̂ + λI)⁻¹ x̂ᵀ(y − x̂W₀), centred, so that the bias is fitted too, λ
by the error on samples held back (ridge towards the old weights, as in ThiNet, Luo et al. 2017, and channel
reconstruction, He et al. 2017, and with the pruned inputs of the layers before). A layer whose result is added to
another is asked for what makes the sum right. Before a Relu or Clip only what it lets through counts (the nonlinear
reconstruction of Zhang et al. 2015, by majorization: where the float result is cut off, any result beyond is right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_graph as G
from edgekit.passes import regression as L
from edgekit.passes.blas import single_threaded
from edgekit.passes.coupling import Coupling
from edgekit.passes.lockstep import Meeting, walk
from edgekit.passes.prune_grams import layer_of
from edgekit.report.progress import Progress, silent

Array = np.ndarray[Any, Any]
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal of x̂ᵀx̂
ROWS, ROWS_PER_FEATURE = (4096, 65536), 64  # of all samples together
ROUNDS = int(__import__("os").environ.get("ROUNDS", "3"))
HELD = 5  # one batch in so many judges


@single_threaded
def repair(
    model: ir.Model,
    pruned: ir.Model,
    coupling: Coupling,
    keep: Array,
    batches: Sequence[M.Tensors],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, float]:
    """Fit the layers of `pruned` in place; per node its error on held-back rows as a share of that before.

    model: `ready`, what `pruned` was cut from. batches: inputs by name.
    """
    rng = np.random.default_rng(seed)
    gains = {}
    total = len(list(model.graph))
    for done, meeting in enumerate(walk(model, pruned, batches)):
        progress("repair what is left", done, total)
        gain = _fit(meeting, coupling, keep, rng)
        if gain is not None:
            gains[meeting.node.name or ""] = gain
    return gains


def _fit(meeting: Meeting, coupling: Coupling, keep: Array, rng: np.random.Generator) -> float | None:
    twin = meeting.twin
    layer = layer_of(twin)
    if layer is None or twin.inputs[0] is None:
        return None
    given, wanted = meeting.written[twin.inputs[0].name or ""], _wanted(meeting, coupling, keep)
    if given[0].ndim < 2 or len(given) < 2:
        return None
    rows = _rows(layer, given, wanted, rng)
    solved = _solve(layer, rows, _range(meeting.node))
    _write(twin, layer, solved.change, solved.shift)
    return solved.gain


@dataclass(frozen=True)
class _Rows:
    """x (groups, rows, features), y (groups, rows, outputs), both float32; held, fit: the rows that judge, and the others."""

    x: Array
    y: Array
    held: slice
    fit: slice


def _rows(layer: L.Layer, given: Sequence[Array], wanted: Sequence[Array], rng: np.random.Generator) -> _Rows:
    features = layer.weight.shape[1]
    most = int(np.clip(ROWS_PER_FEATURE * features, *ROWS))
    samples = sum(len(x) for x in given)
    xs, ys = [], []
    for x, y in zip(given, wanted, strict=True):
        chosen = L.choose(layer.node, y, max(1, most * len(x) // samples), rng)
        xs.append(L.inputs(layer, x, chosen))
        ys.append(L.outputs(layer, y, chosen))
    x, y = np.concatenate(xs, axis=1), np.concatenate(ys, axis=1)
    at = x.shape[1] - x.shape[1] // HELD
    return _Rows(x, y, slice(at, None), slice(0, at))


@dataclass(frozen=True)
class _Solved:
    change: Array
    shift: Array
    gain: float


def _solve(layer: L.Layer, rows: _Rows, bounds: tuple[float, float]) -> _Solved:
    problem = _Problem(layer, rows, bounds)
    best, ridge = problem.nothing(), RIDGES[0]
    plain = best.gain
    if not plain > 0:
        return replace(best, gain=1.0)
    rest = problem.y - problem.start[:, rows.fit]
    for tried in RIDGES:
        found = problem.solved(tried, rest)
        if found.gain < best.gain:
            best, ridge = found, tried
    now = best
    for _ in range(ROUNDS if np.isfinite(bounds).any() else 0):
        now = problem.solved(ridge, problem.goal(now) - problem.start[:, rows.fit])
        best = min(best, now, key=lambda s: s.gain)
    return replace(best, gain=best.gain / plain)


class _Problem:
    """The regression of one layer. `gain` of what it solves: mean squared error behind the activation, held back."""

    def __init__(self, layer: L.Layer, rows: _Rows, bounds: tuple[float, float]) -> None:
        self.layer, self.rows, self.bounds = layer, rows, bounds
        self.free = layer.bias is not None
        self.start = rows.x @ layer.weight.astype(np.float32)
        if layer.bias is not None:
            self.start += layer.bias[:, None, :].astype(np.float32)
        self.x, self.y = rows.x[:, rows.fit], rows.y[:, rows.fit]
        self.mean = self.x.mean(axis=1, keepdims=True) if self.free else np.zeros_like(self.x[:, :1])
        self.mean = self.mean.astype(np.float64)
        count = self.x.shape[1]
        self.gram = (self.x.swapaxes(1, 2) @ self.x).astype(np.float64) / count - self.mean.swapaxes(1, 2) @ self.mean
        self.scale = np.trace(self.gram, axis1=1, axis2=2)[:, None, None] / self.gram.shape[1] + 1e-12
        self.inverses: dict[float, Array] = {}

    def nothing(self) -> _Solved:
        change, shift = np.zeros_like(self.layer.weight), np.zeros_like(self.layer.weight[:, 0])
        return _Solved(change, shift, self.error(change, shift))

    def solved(self, ridge: float, rest: Array) -> _Solved:
        """rest: what x·change + shift should be on the fitted rows."""
        if ridge not in self.inverses:
            eye = np.eye(self.gram.shape[1])
            self.inverses[ridge] = np.linalg.inv(self.gram + ridge * self.scale * eye)
        mean = (rest.mean(axis=1, keepdims=True) if self.free else np.zeros_like(rest[:, :1])).astype(np.float64)
        slope = (self.x.swapaxes(1, 2) @ rest).astype(np.float64) / self.x.shape[1]
        change = self.inverses[ridge] @ (slope - self.mean.swapaxes(1, 2) @ mean)
        shift = (mean - self.mean @ change)[:, 0]
        return _Solved(change, shift, self.error(change, shift))

    def result(self, change: Array, shift: Array, part: slice) -> Array:
        """What the layer gives with these changes."""
        own = self.rows.x[:, part] @ change.astype(np.float32)
        return np.asarray(self.start[:, part] + own + shift[:, None].astype(np.float32))

    def error(self, change: Array, shift: Array) -> float:
        got, wanted = self.result(change, shift, self.rows.held), self.rows.y[:, self.rows.held]
        return float(np.square(np.clip(got, *self.bounds) - np.clip(wanted, *self.bounds), dtype=np.float64).mean())

    def goal(self, now: _Solved) -> Array:
        """What to ask for next: where the activation is flat anything beyond its bound is right."""
        got, (low, high) = self.result(now.change, now.shift, self.rows.fit), self.bounds
        below, above = np.minimum(got, low), np.maximum(got, high)
        return np.where(self.y <= low, below, np.where(self.y >= high, above, self.y))


def _range(node: ir.Node) -> tuple[float, float]:
    """Where what follows the node's result is not flat: (0, inf) before a Relu."""
    value = node.outputs[0]
    for _ in range(2):
        uses = tuple(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            break
        reader = uses[0].node
        if G.is_op(reader, "Relu"):
            return 0.0, np.inf
        if G.is_op(reader, "Clip"):
            low, high = (G.array(v) for v in [*reader.inputs[1:], None, None][:2])
            return (-np.inf if low is None else float(low)), (np.inf if high is None else float(high))
        if not (G.is_op(reader, "Add") and _summand(value) is not None):
            break
        value = reader.outputs[0]
    return -np.inf, np.inf


def _wanted(meeting: Meeting, coupling: Coupling, keep: Array) -> list[Array]:
    """What the layer should give, batch by batch: the float result's kept channels, and what another summand lacks."""
    value, twin = meeting.node.outputs[0], meeting.twin.outputs[0]
    exact = _kept(meeting.exact[value.name or ""], coupling, value, keep)
    other = _summand(value)
    name = other.name or "" if other is not None else ""
    if other is None or name not in meeting.exact or name not in meeting.written or len(tuple(twin.uses())) != 1:
        return exact
    there, here = _kept(meeting.exact[name], coupling, other, keep), meeting.written[name]
    return [e + (a - b) if a.shape == b.shape == e.shape else e for e, a, b in zip(exact, there, here, strict=True)]


def _summand(value: ir.Value) -> ir.Value | None:
    """The other operand where the value's only reader adds it to one of the same shape."""
    uses = tuple(value.uses())
    if len(uses) != 1 or not G.is_op(uses[0].node, "Add") or value.is_graph_output():
        return None
    return uses[0].node.inputs[1 - uses[0].idx]


def _kept(parts: Sequence[Array], coupling: Coupling, value: ir.Value, keep: Array) -> list[Array]:
    for axis, labels in coupling.axes(value).items():
        kept = keep[labels]
        if not kept.all() and parts[0].shape[axis] == len(kept):
            parts = [np.compress(kept, p, axis=axis) for p in parts]
    return list(parts)


def _write(node: ir.Node, layer: L.Layer, change: Array, moved: Array) -> None:
    G.set_constant(node, 1, f"{node.name}/weight", layer.restored(layer.weight + change).astype(np.float32))
    bias = G.array(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        shape = bias.shape if bias.size == moved.size else (moved.size,)
        G.set_constant(
            node, 2, f"{node.name}/bias", (bias.reshape(-1) + moved.reshape(-1)).reshape(shape).astype(np.float32)
        )
