"""Kernels and pads of ONNX convolutions in the forms that an IntegerNet has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.backends.fpga.grid import refuse
from edgekit.backends.fpga.net import ACCUMULATOR_BITS, MAX_SHIFT, Layer
from edgekit.backends.fpga.views import Pads

Array = np.ndarray[Any, Any]


def flat_pads(node: ir.Node, begins: tuple[int, ...], ends: tuple[int, ...], more: Pads) -> Pads:
    """(top, left, bottom, right) of one or two spatial axes, and a Pad's before it."""
    if min((*begins, *ends)) < 0:
        raise refuse(node, "negative padding", "crop before it")
    (top, left), (bottom, right) = ((0,) * (2 - len(side)) + side for side in (begins, ends))
    return top + more[0], left + more[1], bottom + more[2], right + more[3]


def dilated(weights: Array, dilations: tuple[int, ...]) -> Array:
    """(cout, cin, kh, kw) with zeros between the taps."""
    if all(d == 1 for d in dilations):
        return weights
    size = [(n - 1) * d + 1 for n, d in zip(weights.shape[2:], dilations, strict=True)]
    out = np.zeros((*weights.shape[:2], *size), weights.dtype)
    out[:, :, :: dilations[0], :: dilations[1]] = weights
    return out


def ungrouped(weights: Array, groups: int) -> Array:
    """A grouped kernel (cout, cin / groups, kh, kw) over all input channels."""
    each, own = len(weights) // groups, weights.shape[1]
    out = np.zeros((len(weights), own * groups, *weights.shape[2:]), weights.dtype)
    for g in range(groups):
        out[g * each : (g + 1) * each, g * own : (g + 1) * own] = weights[g * each : (g + 1) * each]
    return out


def muted(layer: Layer, shift: tuple[int, ...]) -> tuple[Layer, tuple[int, ...]]:
    """The layer and its shifts, one per channel, without the weights of channels that are shifted away.

    A sum of 32 bits, half of 2^s added, is below 2^s for s > 31: what is left of it is 0.
    """
    if layer.weights is None or layer.bias is None:
        return layer, shift
    weights, bias = layer.weights.copy(), layer.bias.copy()
    most = np.abs(weights.astype(np.int64)).reshape(len(weights), -1).sum(axis=1) * 128 + np.abs(bias)
    gone = (np.array(shift) > MAX_SHIFT) & (most < 2 ** (ACCUMULATOR_BITS - 1))
    weights[gone], bias[gone] = 0, 0
    kept = tuple(MAX_SHIFT if away else s for away, s in zip(gone, shift, strict=True))
    exponents = tuple(e + k - s for e, k, s in zip(layer.weight_exponents, kept, shift, strict=True))
    return replace(layer, weights=weights, bias=bias, weight_exponents=exponents), kept
