"""From observed values to a range: the estimators, and the choice among them by the error at the layer's output.

min-max; a moving average of the batches' extremes (Jacob et al. 2018, section 3); a percentile (NVIDIA 2017, "8-bit
inference with TensorRT"); least squared error (Banner et al. 2019, ACIQ, searched instead of fitted); least
Kullback-Leibler divergence (NVIDIA 2017). Which is best differs from tensor to tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import regression as L
from edgekit.passes.apply_plan import folded, quantize
from edgekit.passes.calibrate import FOLDS, Observed, fetched, squared_error
from edgekit.passes.decide import Decision, data_inputs, weight_of
from edgekit.passes.plan import Activation, Method, activation

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]

ESTIMATORS: tuple[Method, ...] = ("minmax", "wide", "wider", "average", "percentile", "mse", "kl")
BATCH = 32
ROWS = 256  # of each layer, batch and fold that the error at the outputs is measured on


def by_output(
    model: ir.Model, decision: Decision, seen: Mapping[str, Observed], data: Dataset, held: frozenset[int], seed: int
) -> dict[str, Method]:
    """The estimator of each value with the least error at the outputs of the layers that read its group.

    By cross-validation: the ranges of three folds are tried on the fourth, so that what clips new data shows. Values
    that no layer of constant weights reads are judged by their own error, from their histograms.
    """
    groups = _groups(decision)
    layers = _layers(model, decision)
    folds = range(1 if held else 0, FOLDS)
    errors = {n: dict.fromkeys(ESTIMATORS, 0.0) for n in decision.activations}
    tried = {
        (group[0], fold): {m: _parameters([seen[n] for n in group], m, fold) for m in ESTIMATORS}
        for group in dict.fromkeys(groups.values())
        for fold in folds
    }
    for name in decision.activations:
        if name not in layers or None in layers[name]:
            for fold in folds:
                _add(errors[name], tried[groups[name][0], fold], partial(_own, seen[name], fold), 1.0)
    rng = np.random.default_rng(seed)
    read = [n for n in decision.activations if any(layers.get(n, ()))]
    share = len(folds) / max(1, data.samples)
    for name, array, fold in fetched(model, data, read, BATCH, held) if read else ():
        for layer in layers[name] if fold in folds and array.ndim > 1 else ():
            if layer is not None:
                rows = L.inputs(layer, array, L.choose_input(layer, array, ROWS, rng))
                weight = layer.weight.astype(np.float32)
                power = _power(rows @ weight)
                how = tried[groups[name][0], fold]
                _add(errors[name], how, partial(_moved, rows, weight, power), share * len(array))
    out: dict[str, Method] = {}
    for name in decision.activations:
        total = {m: sum(errors[n][m] for n in groups[name]) for m in ESTIMATORS}
        out[name] = min(ESTIMATORS, key=lambda m: (total[m], ESTIMATORS.index(m)))
    return out


def _add(
    errors: dict[Method, float], tried: Mapping[Method, Activation], measure: Callable[[Activation], float], by: float
) -> None:
    """Each estimator's error; the same range is measured once."""
    measured: dict[tuple[float, float], float] = {}
    for method, how in tried.items():
        if (how.low, how.high) not in measured:
            measured[how.low, how.high] = measure(how)
        errors[method] += by * measured[how.low, how.high]


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


def _layers(model: ir.Model, decision: Decision) -> dict[str, list[L.Layer | None]]:
    """value -> the quantized layers of constant weights that read it as data; None for one that is no regression."""
    chosen = set(decision.quantized)
    out: dict[str, list[L.Layer | None]] = {}
    for node in model.graph:
        if node.name in chosen and weight_of(node) is not None:
            for position in data_inputs(node):
                value = node.inputs[position]
                if value is not None and value.name:
                    out.setdefault(value.name, []).append(L.layer(node, folded(node)[0], None))
    return out


def _moved(rows: Array, weight: Array, power: float, how: Activation) -> float:
    """Squared error over `power` at a layer's output, of rounding its inputs. rows: float32 (groups, rows, inputs)."""
    rounded = (quantize(rows, how).astype(np.float32) - np.float32(how.zero_point)) * np.float32(how.scale)
    return float(np.square((rounded - rows) @ weight, dtype=np.float64).sum()) / power


def _own(seen: Observed, fold: int, how: Activation) -> float:
    """Squared error over squared signal of the value itself in one fold, behind a bounded function if one reads it."""
    counts = seen.counts[fold]
    used = counts > 0
    if not used.any():
        return 0.0
    counts, centres = counts[used], seen.centres[used]
    signal = centres if seen.through is None else seen.through(centres)
    power = max(float(np.average(signal**2, weights=counts)), 1e-30)
    return squared_error(counts, centres, how.low, how.high, seen.through) / power


def _power(values: Array) -> float:
    return max(float(np.square(values, dtype=np.float64).sum()), 1e-30)
