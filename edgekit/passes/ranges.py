"""From observed values to a range: the estimators, and the choice among them by the error at the layer's output.

min-max; a moving average of the batches' extremes (Jacob et al. 2018, section 3); a percentile (NVIDIA 2017, "8-bit
inference with TensorRT"); least squared error (Banner et al. 2019, ACIQ, searched instead of fitted); least
Kullback-Leibler divergence (NVIDIA 2017). Which is best differs from tensor to tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import regression as L
from edgekit.passes.apply_plan import folded, quantize
from edgekit.passes.calibrate import Observed, fetched
from edgekit.passes.decide import Decision, data_inputs, weight_of
from edgekit.passes.plan import Activation, Method, activation

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]

ESTIMATORS: tuple[Method, ...] = ("minmax", "wide", "wider", "average", "percentile", "mse", "kl")
BATCH = 32
ROWS = 512  # of each layer, batch and fold that the error at the outputs is measured on


def by_output(
    model: ir.Model, decision: Decision, seen: Mapping[str, Observed], data: Dataset, held: frozenset[int], seed: int
) -> dict[str, Method]:
    """The estimator of each value with the least error at the outputs of the layers that read its group.

    By cross-validation: the ranges of three folds are tried on the fourth, so that what clips new data shows. Values
    that no layer of constant weights reads are judged by their own error.
    """
    groups = _groups(decision)
    readers = _readers(model, decision)
    rng = np.random.default_rng(seed)
    errors: dict[str, dict[Method, float]] = {n: dict.fromkeys(ESTIMATORS, 0.0) for n in decision.activations}
    tried: dict[tuple[str, int], dict[Method, Activation]] = {}
    for name, array, fold in fetched(model, data, list(decision.activations), BATCH, held):
        if not fold and held:
            continue
        group = groups[name]
        if (group[0], fold) not in tried:
            tried[group[0], fold] = {m: _parameters([seen[n] for n in group], m, fold) for m in ESTIMATORS}
        measured: dict[tuple[float, float], float] = {}
        nodes = readers.get(name, ()) if array.ndim > 1 else ()
        layers = [(node, L.layer(node, folded(node)[0], None)) for node in nodes]
        rows = [None if layer is None else L.choose_input(layer, array, ROWS, rng) for _, layer in layers]
        for method, how in tried[group[0], fold].items():
            if (how.low, how.high) not in measured:
                measured[how.low, how.high] = _error(array, how, [layer for _, layer in layers], rows)
            errors[name][method] += measured[how.low, how.high] * (len(array) if array.ndim else 1)
    out: dict[str, Method] = {}
    for name in decision.activations:
        total = {m: sum(errors[n][m] for n in groups[name]) for m in ESTIMATORS}
        out[name] = min(ESTIMATORS, key=lambda m: (total[m], ESTIMATORS.index(m)))
    return out


def _groups(decision: Decision) -> dict[str, tuple[str, ...]]:
    """value -> the values that share its scale, itself included."""
    out: dict[str, tuple[str, ...]] = {n: (n,) for n in decision.activations}
    for group in decision.groups:
        members = tuple(n for n in group if n in out)
        out.update(dict.fromkeys(members, members))
    return out


def _parameters(group: Sequence[Observed], method: Method, without: int) -> Activation:
    """What the estimator gives from the other folds, for values that share a scale."""
    ranges = [o.range(method, everything=False, without=without) for o in group]
    return activation(min(r[0] for r in ranges), max(r[1] for r in ranges), method)


def _readers(model: ir.Model, decision: Decision) -> dict[str, list[ir.Node]]:
    """value -> the quantized nodes of constant weights that read it as data."""
    chosen = set(decision.quantized)
    out: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.name in chosen and weight_of(node) is not None:
            for position in data_inputs(node):
                value = node.inputs[position]
                if value is not None and value.name:
                    out.setdefault(value.name, []).append(node)
    return out


def _error(array: Array, how: Activation, layers: Sequence[L.Layer | None], rows: Sequence[L.Rows | None]) -> float:
    """Squared error over squared signal at the readers' outputs, summed; of the value itself without readers."""
    rounded = (quantize(array, how).astype(np.float32) - np.float32(how.zero_point)) * np.float32(how.scale)
    total = 0.0
    for layer, chosen in zip(layers, rows, strict=True):
        if layer is None or chosen is None:
            total += _relative(rounded - array, array)
            continue
        weight = layer.weight.astype(np.float32)
        exact = L.inputs(layer, array, chosen) @ weight
        total += _relative(L.inputs(layer, rounded, chosen) @ weight - exact, exact)
    return total if layers else _relative(rounded - array, array)


def _relative(error: Array, signal: Array) -> float:
    return float(np.square(error, dtype=np.float64).sum() / max(np.square(signal, dtype=np.float64).sum(), 1e-30))
