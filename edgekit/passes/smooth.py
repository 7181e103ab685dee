"""Smooth: moves the spread of activation channels into the weights that read them (Xiao et al. 2023, SmoothQuant).

One int8 scale serves a whole tensor, so a channel of small range is rounded coarsely beside one of large range. Scaling
channel j by s_j = max|x_j|^-a · max|w_j|^(1-a) and its weights by 1 / s_j changes nothing in float. The strength a is
chosen for each set of coupled tensors by the rounding noise to be expected at the outputs of the layers that read them.
Unlike the paper this crosses Relu, pools and residual additions as well as layer normalization, as cross-layer
equalization does (Nagel et al. 2019): with weights of one scale per output channel, activations are what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import NoCalibrationDataError
from edgekit.passes import bounds
from edgekit.passes import fold_graph as G
from edgekit.passes.apply_plan import prepared
from edgekit.passes.calibrate import ChannelRange, channel_ranges
from edgekit.passes.channels import Channels, End, trace
from edgekit.passes.rescale import over_taps, rescaled

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]

STRENGTHS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Smooth:
    """The pass `smooth`: the same float function (a Clip's bound is assumed not to be reached by channels that never
    do on the data), activations that int8 holds better.

    strength: 0 to 1, how much of a channel's range moves into the weights; None chooses, none included.
    """

    strength: float | None = None
    seed: int = 0

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model:
        """A rescaled copy. Raises NoCalibrationDataError without data."""
        if data is None:
            raise NoCalibrationDataError("smoothing needs calibration data", "pass --data FILE")
        model = prepared(model)
        return rescaled(model, self.factors(model, data.bind(M.signature(model))))

    def factors(self, model: ir.Model, data: Dataset) -> dict[str, tuple[float, ...]]:
        """value -> what to multiply its channels with; empty if nothing is gained. model: prepared; data: bound."""
        found = trace(model)
        axes = {e.value.name or "": e.axis for e in (*found.producers, *found.consumers, *found.clips)}
        axes.update({e.node.outputs[0].name or "": _result_axis(e) for e in found.consumers})
        seen = channel_ranges(model, data, axes)
        factors = np.ones(found.count())
        bounds.even_out(found, factors)
        bounds.hold(found, seen)
        room = bounds.limits(found, seen)
        for members in _sets(found):
            _choose(found, members, seen, factors, room, self.strength)
        if bool((factors == 1).all()):
            return {}
        return {e.value.name or "": tuple(factors[found.roots(e.labels)].tolist()) for e in found.ends()}


def _result_axis(end: End) -> int:
    return len(end.node.outputs[0].shape or ()) - 1 if end.node.op_type in {"Gemm", "MatMul"} else 1


def _sets(found: Channels) -> list[list[End]]:
    """Consumers whose inputs share labels, each set to be scaled at once; frozen ones left out."""
    home: dict[int, int] = {}
    sets: dict[int, list[End]] = {}
    for number, end in enumerate(found.consumers):
        roots = set(found.roots(end.labels).tolist())
        joined = {home[r] for r in roots if r in home}
        sets[number] = [end, *(e for j in joined for e in sets.pop(j))]
        for e in sets[number]:
            home.update(dict.fromkeys(found.roots(e.labels).tolist(), number))
    return [s for s in sets.values() if any(found.free(e.labels).any() for e in s)]


def _choose(
    found: Channels,
    members: list[End],
    seen: dict[str, ChannelRange],
    factors: Array,
    room: Array,
    strength: float | None,
) -> None:
    roots = np.unique(np.concatenate([found.roots(e.labels) for e in members]))
    free = found.free(roots)
    position = {int(r): i for i, r in enumerate(roots)}
    layers = [_Reader.of(found, e, seen, position) for e in members]
    spans, weights = np.zeros(len(roots)), np.zeros(len(roots))
    for layer in layers:
        np.maximum.at(spans, layer.index, layer.span / max(layer.span.max(), 1e-30))
        np.maximum.at(weights, layer.index, layer.reach)
    limits = room[roots]
    active = free & (spans > 0)
    best, least = np.ones(len(roots)), sum(layer.noise(np.ones(len(roots))) for layer in layers)
    for a in STRENGTHS if strength is None else (strength,):
        trial = _factors(spans, weights, active, limits, a)
        noise = sum(layer.noise(trial) for layer in layers)
        if noise < least or strength is not None:
            best, least = trial, noise
    factors[roots[active]] = best[active]


def _factors(spans: Array, weights: Array, active: Array, limits: Array, a: float) -> Array:
    out = np.ones(len(spans))
    reach = np.maximum(weights, 1e-3 * weights.max(initial=0.0))
    raw = spans[active] ** -a
    bounded = bool(np.isfinite(limits).any())
    if reach.any() and not bounded:
        raw = raw * reach[active] ** (1 - a)
    if not len(raw):
        return out
    if not bounded and not (~active & (spans > 0)).any():
        raw = raw / np.exp(np.log(raw).mean())  # ranges stay where they were on the whole
    out[active] = np.clip(np.minimum(raw, limits[active]), 1 / bounds.MOST, bounds.MOST)
    # powers of two would be exact; float32 rounds each product once, which is as good as nothing
    return out


@dataclass(frozen=True)
class _Reader:
    """What a consumer adds to the noise. index: of its input channels among the set's roots.

    span, low, high, power: of each input channel. squares, peaks: Σ and max over taps, (outputs, inputs).
    result: E[y²].
    """

    index: Array
    span: Array
    low: Array
    high: Array
    power: Array
    squares: Array
    peaks: Array
    taps: int
    result: Array

    @staticmethod
    def of(found: Channels, end: End, seen: dict[str, ChannelRange], position: dict[int, int]) -> _Reader:
        weight = G.array(end.node.inputs[1])
        assert weight is not None
        squares, peaks, taps = _by_channels(end.node, weight, len(end.labels))
        stats, result = seen[end.value.name or ""], seen[end.node.outputs[0].name or ""]
        index = np.array([position[int(r)] for r in found.roots(end.labels)])
        return _Reader(
            index, stats.span, stats.low, stats.high, stats.power, squares, peaks, taps, np.maximum(result.power, 1e-30)
        )

    @property
    def reach(self) -> Array:
        """How large each input channel's weights are beside their rows' largest."""
        rows = np.maximum(self.peaks.max(axis=1, keepdims=True), 1e-30)
        return np.asarray((self.peaks / rows).max(axis=0))

    def noise(self, factors: Array) -> float:
        """Mean over outputs of (expected squared rounding error) / E[y²], of 8-bit inputs and weights."""
        f = factors[self.index]
        top, bottom = np.where(self.high > 0, self.span, 0.0), np.where(self.low < 0, self.span, 0.0)
        step = ((top * f).max() + (bottom * f).max()) / 255
        from_inputs = step**2 / 12 * (self.squares / f**2).sum(axis=1)
        rows = (self.peaks / f).max(axis=1) / 127
        reads = self.peaks > 0
        from_weights = rows**2 / 12 * self.taps * (reads * (self.power * f**2)).sum(axis=1)
        return float(((from_inputs + from_weights) / self.result).mean())


def _by_channels(node: ir.Node, weight: Array, channels: int) -> tuple[Array, Array, int]:
    """(Σ w², max |w|) over taps as (outputs, input channels), 0 beyond the group, and the number of taps."""
    taps = int(np.prod(weight.shape[2:], dtype=np.int64))
    squares = over_taps(node, weight, channels, lambda w: (w**2).sum(axis=2))
    return squares, over_taps(node, weight, channels, lambda w: np.abs(w).max(axis=2)), taps
