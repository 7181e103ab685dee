"""Equalize: channels of two layers in turn get weights of one range, the same function computed from rounder numbers.

Cross-layer equalization (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
section 4.1, eq. 8 to 11). r1 is the largest |weight| that makes a channel, r2 the largest that reads it, each as a
share of its layer's largest, the precision of eq. 8. Scaling the channel by sqrt(r2 / r1) makes them equal, which is
where the precisions' product is largest; a factor that all channels have in common changes no precision. Where several
layers make or read a channel (residual additions, branches) the largest share counts. Layers lie on both sides of a
channel, so all factors are found together, round by round, until they stay.

Beyond Relu this crosses what `channels` follows: pools, concatenations, gates. HardSwish is not homogeneous, which the
paper does not cover: channels behind it keep their scale, and so do those behind any other such function.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import bounds
from edgekit.passes import fold_graph as G
from edgekit.passes.absorb import absorbed
from edgekit.passes.apply_plan import prepared
from edgekit.passes.calibrate import channel_ranges
from edgekit.passes.channels import Channels, End, input_channels, trace
from edgekit.passes.rescale import over_taps, rescaled

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]

ROUNDS = 50  # each at least halves what is left where layers form a chain
SETTLED = 1e-3  # of a factor: far below what moves an integer


@dataclass(frozen=True)
class Equalize:
    """The pass `equalize`: the same float function, weights that few bits hold better.

    Without data channels behind a Clip (Relu6) keep their scale. With data one may grow as far as the largest value
    seen stays below the bound; that it never gets there on other data is assumed.
    absorb: with data also moves high biases on into the next layer (section 4.1.3, see `absorb`), which keeps the
    function wherever a channel stays above the lowest value seen of it, and makes activations rounder, not weights.
    """

    absorb: bool = True

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model:
        """A rescaled copy."""
        model = prepared(model)
        seen = None if data is None else data.bind(M.signature(model))
        out = rescaled(model, self.factors(model, seen))
        return absorbed(out, seen) if self.absorb and seen is not None else out

    def factors(self, model: ir.Model, data: Dataset | None) -> dict[str, tuple[float, ...]]:
        """value -> what to multiply its channels with; empty if nothing changes. model: prepared; data: bound."""
        found = trace(model)
        clips = {end.value.name or "": end.axis for end in found.clips}
        seen = channel_ranges(model, data, clips) if clips and data is not None else {}
        factors = np.ones(found.count())
        bounds.even_out(found, factors)
        bounds.hold(found, seen)
        _hold_shared(found)
        _balance(found, factors, bounds.limits(found, seen))
        if bool((np.abs(np.log(factors)) <= SETTLED).all()):
            return {}
        return {e.value.name or "": tuple(factors[found.roots(e.labels)].tolist()) for e in found.ends()}


def _hold_shared(found: Channels) -> None:
    """Weights that several nodes read stay as they are: each node would need a copy of its own."""
    for end in (*found.producers, *found.consumers):
        weight = end.node.inputs[1]
        if weight is not None and len(weight.uses()) > 1:
            for label in end.labels:
                found.hold(int(label))


@dataclass
class _Layer:
    """One node's weights: the largest between an output and an input channel, (outputs, inputs).

    makes, reads: the roots of its output and input channels; None where they have none.
    """

    peaks: Array
    makes: Array | None = None
    reads: Array | None = None

    def shares(self, factors: Array) -> tuple[Array, Array]:
        """Of each output and each input channel: its largest weight under these factors, over the layer's largest."""
        made = 1.0 if self.makes is None else factors[self.makes][:, None]
        read = 1.0 if self.reads is None else factors[self.reads][None, :]
        weights = self.peaks * made / read
        top = max(float(weights.max(initial=0.0)), 1e-300)
        return weights.max(axis=1, initial=0.0) / top, weights.max(axis=0, initial=0.0) / top


def _layers(found: Channels) -> Iterable[_Layer]:
    layers: dict[str, _Layer] = {}

    def at(end: End) -> _Layer:
        name = end.node.name or ""
        if name not in layers:
            layers[name] = _Layer(_peaks(end.node))
        return layers[name]

    for end in found.producers:
        at(end).makes = found.roots(end.labels)
    for end in found.consumers:
        at(end).reads = found.roots(end.labels)
    return layers.values()


def _peaks(node: ir.Node) -> Array:
    weight = G.array(node.inputs[1])
    assert weight is not None  # the trace has looked
    if node.op_type == "LayerNormalization":
        return np.abs(weight.astype(np.float64))[:, None]
    return over_taps(node, weight, input_channels(node, weight), lambda w: np.abs(w).max(axis=2, initial=0.0))


def _balance(found: Channels, factors: Array, room: Array) -> None:
    """Edits the factors of free roots that have weights on both sides."""
    roots = found.roots(np.arange(found.count()))
    free = found.free(roots) & (roots == np.arange(found.count()))
    layers = list(_layers(found))
    for _ in range(ROUNDS):
        r1, r2 = np.zeros(len(roots)), np.zeros(len(roots))
        for layer in layers:
            outputs, inputs = layer.shares(factors)
            if layer.makes is not None:
                np.maximum.at(r1, layer.makes, outputs)
            if layer.reads is not None:
                np.maximum.at(r2, layer.reads, inputs)
        alive = free & (r1 > 0) & (r2 > 0)
        wanted = factors[alive] * np.sqrt(r2[alive] / r1[alive])
        wanted = np.clip(np.minimum(wanted, room[alive]), 1 / bounds.MOST, bounds.MOST)
        moved = np.abs(np.log(wanted / factors[alive])).max(initial=0.0)
        factors[alive] = wanted
        if moved <= SETTLED:
            break
