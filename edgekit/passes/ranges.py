"""From observed values to a range: the estimators, and the choice among them by the error at the layer's output.

min-max; a moving average of the batches' extremes (Jacob et al. 2018, section 3); a percentile (NVIDIA 2017, "8-bit
inference with TensorRT"); least squared error (Banner et al. 2019, ACIQ, searched instead of fitted); least
Kullback-Leibler divergence (NVIDIA 2017). Which is best differs from tensor to tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import regression as L
from edgekit.passes.apply_plan import folded
from edgekit.passes.calibrate import FOLDS, Observed
from edgekit.passes.decide import Decision, data_inputs, weight_of
from edgekit.passes.grids import Grids
from edgekit.passes.plan import Activation, Method, integer_range

Array = np.ndarray[Any, Any]

# Inputs of a layer, all rows and groups together, that the error at its outputs is measured on: what clipping does to
# one value in ten thousand still shows. Rows: at least and at most.
VALUES, ROWS = 2**18, (512, 8192)
GATHERED_BYTES = 256 * 2**20  # of the rows of all layers


class Gathered:
    """Rows that the layers of constant weights read, some of each sample, to measure errors at their outputs on."""

    def __init__(self, model: ir.Model, decision: Decision, samples: int, held: frozenset[int], seed: int) -> None:
        self.layers = _layers(model, decision)
        self.folds = range(1 if held else 0, FOLDS)
        self._samples = samples
        self._values = min(VALUES, GATHERED_BYTES // 4 // max(1, sum(len(found) for found in self.layers.values())))
        self._rng = np.random.default_rng(seed)
        self._rows: dict[tuple[str, int], list[tuple[Array, Array]]] = {}

    def take(self, name: str, array: Array, folds: Array) -> None:
        """Of a batch of one value. folds: of each sample, -1 for none."""
        if array.ndim < 2:
            return
        batch = len(folds) == len(array)
        own = np.flatnonzero(folds >= self.folds[0]) if batch else np.arange(len(array))
        # what is no batch does not tell of how many samples it is: an eighth of the rows each time, until there are all
        share = len(own) / self._samples if batch else 1 / 8
        for number, layer in enumerate(self.layers.get(name, ())):
            if layer is None or not len(own):
                continue
            groups, inputs, _ = layer.weight.shape
            most = int(np.clip(self._values // (groups * inputs), *ROWS))
            found = self._rows.setdefault((name, number), [])
            if not batch and sum(len(f) for _, f in found) >= most:
                continue
            rows = L.choose_input(layer, array[: len(own)], math.ceil(most * share), self._rng)
            rows = L.Rows(own[rows.samples], rows.picks)
            fold = folds[rows.samples] if batch else np.broadcast_to(folds, rows.samples.shape)
            found.append((L.inputs(layer, array, rows), np.repeat(fold, rows.picks.shape[1])))

    def errors(self, name: str, tried: Mapping[int, Mapping[Method, Activation]]) -> dict[Method, float]:
        """Of each estimator's ranges, by fold: squared error over squared signal, summed over layers and folds.

        The rows of `name` are given up.
        """
        total: dict[Method, float] = dict.fromkeys(next(iter(tried.values())), 0.0)
        for number, layer in enumerate(self.layers.get(name, ())):
            parts = self._rows.pop((name, number), ())
            if layer is None or not parts:
                continue
            rows, folds = (np.concatenate(p, axis=a) for p, a in zip(zip(*parts, strict=True), (1, 0), strict=True))
            weight = layer.weight.astype(np.float32)
            for fold in np.unique(folds):
                own = rows[:, folds == fold]
                share = own.shape[1] / rows.shape[1] * len(self.folds)
                _add(total, tried[int(fold)], partial(_moved, own, weight, _power(own @ weight)), share)
        return total


def by_output(decision: Decision, seen: Mapping[str, Observed], gathered: Gathered, grids: Grids) -> dict[str, Method]:
    """The estimator of each value with the least error at the outputs of the layers that read its group.

    By cross-validation: the ranges of three folds are tried on the fourth, so that what clips new data shows. Values
    that no layer of constant weights reads are judged by their own error, from their histograms.
    """
    groups = _groups(decision)
    errors = {}
    tried = {
        group[0]: {fold: _ranges(grids, group, seen, fold) for fold in gathered.folds}
        for group in dict.fromkeys(groups.values())
    }
    for name in decision.activations:
        layers, how = gathered.layers.get(name, [None]), tried[groups[name][0]]
        errors[name] = gathered.errors(name, how)
        for fold in gathered.folds if None in layers else ():
            _add(errors[name], how[fold], partial(_own, grids, seen[name], fold), 1.0)
    out: dict[str, Method] = {}
    for name in decision.activations:
        total = {m: sum(errors[n][m] for n in groups[name]) for m in grids.estimators}
        out[name] = min(grids.estimators, key=lambda m: (total[m], grids.estimators.index(m)))
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


def _ranges(grids: Grids, group: Sequence[str], seen: Mapping[str, Observed], without: int) -> dict[Method, Activation]:
    """What each estimator gives from the other folds, for values that share a scale."""
    out = {}
    for method in grids.estimators:
        ranges = [seen[n].range(method, everything=False, without=without) for n in group]
        out[method] = grids.activation(group, min(r[0] for r in ranges), max(r[1] for r in ranges), method)
    return out


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
    low, high = integer_range(how.bits)
    error = np.rint(rows / np.float32(how.scale))
    np.clip(error, low - how.zero_point, high - how.zero_point, out=error)
    error *= np.float32(how.scale)
    error -= rows
    return _squares(error @ weight) / power


def _own(grids: Grids, seen: Observed, fold: int, how: Activation) -> float:
    """Squared error over squared signal of the value itself in one fold, behind a bounded function if one reads it."""
    counts = seen.counts[fold]
    used = counts > 0
    if not used.any():
        return 0.0
    counts, centres = counts[used], seen.centres[used]
    signal = centres if seen.through is None else seen.through(centres)
    power = max(float(np.average(signal**2, weights=counts)), 1e-30)
    return grids.error(counts, centres, how, seen.through) / power


def _power(values: Array) -> float:
    return max(_squares(values), 1e-30)


def _squares(values: Array) -> float:
    return float(np.einsum("grm,grm->g", values, values).sum(dtype=np.float64))
