"""How much the model's output suffers when one family of channels loses some: measured on samples, for each family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_graph as G
from edgekit.passes.coupling import Coupling, Family
from edgekit.passes.judge import Judge
from edgekit.passes.prune_grams import layer_of
from edgekit.passes.prune_importance import Order
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
    nodes = {n.name: n for n in pruned.graph}
    for name, (weight, bias) in found.weights[stop].items():
        node = nodes[name]
        site = next(s for s in coupling.sites if s.node == name and s.position == 1 and s.role == "in")
        layer = layer_of(node)
        if layer is None:
            continue
        taps = weight.shape[1] // len(site.labels)
        rows = np.repeat(keep[site.labels], taps)
        fitted = layer.restored(weight[:, rows].astype(np.float64)).astype(np.float32)
        G.set_constant(node, 1, f"{name}/fitted", fitted)
        if len(node.inputs) > 2 and (old := G.array(node.inputs[2])) is not None and old.size == bias.size:
            G.set_constant(node, 2, f"{name}/shifted", old + bias.reshape(old.shape).astype(np.float32))
    session = M.FloatSession(pruned, fetch=judge.names)
    return damage(judge, [session.run(i) for i in judge.inputs[:inputs]])


def _between(errors: Array, at: Array, measured: Array) -> Array:
    """Piecewise linear in the error; beyond the last measurement in proportion."""
    out = np.interp(errors, at, measured)
    beyond = errors > at[-1]
    if at[-1] > 0:
        out[beyond] = measured[-1] * errors[beyond] / at[-1]
    return np.asarray(np.maximum.accumulate(out))
