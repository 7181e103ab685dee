"""How much the model's output suffers when one family of channels loses some: measured on samples, for each family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes.coupling import Coupling, Family
from edgekit.passes.judge import Judge
from edgekit.passes.prune_importance import Order
from edgekit.passes.prune_readings import of_nodes
from edgekit.passes.surgery import cut

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Curve:
    """Damage of a family by units removed; counts rise from 0, damages never fall."""

    counts: Array
    damages: Array

    def at(self, removed: int) -> float:
        return float(np.interp(removed, self.counts, self.damages))


def damage(judge: Judge, got: Sequence[M.Tensors]) -> float:
    """Mean KL divergence of classes from the float model's, or the squared error over the power, of the outputs."""
    parts = []
    for name in judge.names:
        a = np.concatenate([w[name] for w in judge.wanted]).astype(np.float64)
        b = np.concatenate([g[name] for g in got]).astype(np.float64)
        if not np.issubdtype(judge.wanted[0][name].dtype, np.floating):
            continue
        if name in judge.classes:
            parts.append(_divergence(a, b))
        else:
            parts.append(float(np.square(a - b).mean() / max(np.square(a).mean(), 1e-30)))
    return float(np.mean(parts)) if parts else 0.0


def _divergence(a: Array, b: Array) -> float:
    shares = bool((a >= 0).all() and (np.abs(a.sum(axis=-1) - 1) <= 1e-3).all())
    p, q = (_log(a), _log(b)) if shares else (_log_softmax(a), _log_softmax(b))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def _log_softmax(x: Array) -> Array:
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def _log(p: Array) -> Array:
    return np.asarray(np.log(np.clip(p, 1e-9, None)))


def curve(model: ir.Model, coupling: Coupling, family: Family, found: Order, judge: Judge, inputs: int) -> Curve:
    """Measured at the stops of the order, in between in proportion to the error of the readers.

    model: `ready`. inputs: how many of the judge's batches to run.
    """
    stops = sorted(found.weights)
    seen = [0.0, *(damage_without(model, coupling, found, stop, judge, inputs) for stop in stops)]
    measured = np.maximum.accumulate(seen)
    errors = np.array([0.0, *(found.errors[min(s, len(found.errors) - 1)] for s in stops)])
    counts = np.arange(len(found.errors))
    return Curve(counts, _between(found.errors, errors, measured))


def damage_without(model: ir.Model, coupling: Coupling, found: Order, stop: int, judge: Judge, inputs: int) -> float:
    """Of the model without the first `stop` units of one family, its readers fitted anew."""
    keep = coupling.without(found.units[:stop])
    pruned = cut(model, coupling, keep)
    names = [key.rpartition(":")[0] for key in found.weights[stop]]
    small = {r.key: r for r in of_nodes(pruned, names)}
    for reading in of_nodes(model, names):
        if reading.key in found.weights[stop]:
            weight, shift = found.weights[stop][reading.key]
            rows, columns = reading.kept(coupling, keep)
            small[reading.key].write(_columns(weight[:, rows], columns), _columns(shift, columns))
    session = M.FloatSession(pruned, fetch=judge.names)
    return damage(judge, [session.run(i) for i in judge.inputs[:inputs]])


def _columns(array: Array, kept: Array) -> Array:
    """array: (groups, …, outputs). kept: bool (groups, outputs), as many of each group."""
    return np.stack([np.compress(k, a, axis=-1) for a, k in zip(array, kept, strict=True)])


def _between(errors: Array, at: Array, measured: Array) -> Array:
    """Piecewise linear in the error; beyond the last measurement in proportion."""
    out = np.interp(errors, at, measured)
    beyond = errors > at[-1]
    if at[-1] > 0:
        out[beyond] = measured[-1] * errors[beyond] / at[-1]
    return np.asarray(np.maximum.accumulate(out))
