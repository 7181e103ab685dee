"""Runs an IntegerNet in numpy, exactly: the reference that simulated hardware has to equal bit for bit.

Sums of products are computed by floating-point matrix products, in float32 while every partial sum stays below 2^24
and in float64 otherwise, where integers up to 2^53 are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgekit.backends.fpga.net import MAX_BITS, IntegerNet, Layer
from edgekit.errors import ShapeError

Array = np.ndarray[Any, Any]

_FLOAT32_EXACT = 2**24
_BATCH = 64  # samples at once: some MB of patches for images of 32 × 32


def run(net: IntegerNet, x: Array) -> dict[str, Array]:
    """Every tensor, int8 (n, *shape), of integers x (n, *input.shape). Raises ShapeError, also for what is no input."""
    if x.shape[1:] != net.input.shape or not np.issubdtype(x.dtype, np.integer):
        raise ShapeError(
            f"input of shape {x.shape[1:]}, {x.dtype}; the network takes integers {net.input.shape}",
            "quantize samples with `IntegerNet.quantized`",
        )
    low, high = net.input.limits
    if x.size and (x.min() < low or x.max() > high):
        raise ShapeError(f"input from {x.min()} to {x.max()}, the network takes {low} to {high}", "saturate it")
    values = {net.input.name: x.astype(np.int8)}
    for layer in net.layers:
        values[layer.output] = _layer(net, layer, [values[name] for name in layer.inputs])
    return values


def outputs(net: IntegerNet, x: Array) -> Array:
    """Only the network's output, int8 (n, *shape), in batches."""
    parts = [run(net, x[at : at + _BATCH])[net.output] for at in range(0, max(1, len(x)), _BATCH)]
    return np.concatenate(parts)


def requantized(acc: Array, shift: Array | int, low: int, high: int) -> Array:
    """int64 sums -> int8: shifted to the right, rounded half up, or to the left; then saturated to [low, high]."""
    shift = np.asarray(shift, np.int64)
    right, left = np.maximum(shift, 0), np.maximum(-shift, 0)
    rounded = (acc + np.where(right > 0, np.int64(1) << np.maximum(right - 1, 0), 0)) >> right
    # bounded first, so that a shift to the left stays in 64 bits: what is beyond saturates all the same
    bounded = np.clip(rounded, -(1 << MAX_BITS), 1 << MAX_BITS) << left
    return np.asarray(np.clip(bounded, low, high).astype(np.int8))


def _layer(net: IntegerNet, layer: Layer, given: list[Array]) -> Array:
    target = net.tensors[layer.output]
    n = len(given[0])
    if layer.kind == "concat":
        parts = [requantized(_maps(x), s, layer.low, layer.high) for x, s in zip(given, layer.shift, strict=True)]
        return np.asarray(np.concatenate(parts, axis=3).reshape(n, *target.shape))
    shift = np.array(layer.shift if len(layer.shift) > 1 else layer.shift[0])
    return requantized(_sums(net, layer, given), shift, layer.low, layer.high).reshape(n, *target.shape)


def _maps(x: Array) -> Array:
    """int64 (n, h, w, c)."""
    return x.astype(np.int64).reshape(len(x), 1, 1, -1) if x.ndim == 2 else x.astype(np.int64)


def _sums(net: IntegerNet, layer: Layer, given: list[Array]) -> Array:
    """int64 (n, h, w, c), exact."""
    if layer.kind == "add":
        (a, b), (left, right) = (_maps(x) for x in given), layer.input_shifts
        return (a << left) + (b << right)
    x = given[0]
    if layer.weights is not None and layer.bias is not None:
        largest = max(abs(v) for v in _product_limits(net, layer))
        kind: Any = np.float32 if largest < _FLOAT32_EXACT else np.float64
        return np.asarray(_products(net, layer, x, kind).astype(np.int64) + layer.bias)
    if layer.kind == "maxpool":
        low = net.tensors[layer.inputs[0]].limits[0]
        return np.asarray(np.maximum.reduce([w for _, _, w in _windows(net, layer, _maps(x), low)]))
    return np.asarray(sum(w for _, _, w in _windows(net, layer, _maps(x), 0)) * np.int64(layer.multiplier))


def _product_limits(net: IntegerNet, layer: Layer) -> tuple[int, int]:
    """No partial sum of products, in whatever order, is beyond these."""
    low, high = net.tensors[layer.inputs[0]].limits
    assert layer.weights is not None
    most = int(np.abs(layer.weights.astype(np.int64)).reshape(len(layer.weights), -1).sum(axis=1).max())
    return most * low, most * high


def _products(net: IntegerNet, layer: Layer, x: Array, kind: Any) -> Array:
    weights = layer.weights
    assert weights is not None
    if layer.kind == "dense":
        return np.asarray((x.reshape(len(x), -1).astype(kind) @ weights.T.astype(kind))[:, None, None, :])
    maps = (x.reshape(len(x), 1, 1, -1) if x.ndim == 2 else x).astype(kind)
    if layer.kind == "depthwise":
        taps = weights.transpose(1, 2, 0).astype(kind)
        return np.asarray(sum(w * taps[i, j] for i, j, w in _windows(net, layer, maps, 0)))
    matrices = weights.transpose(1, 2, 3, 0).astype(kind)
    return np.asarray(sum(w @ matrices[i, j] for i, j, w in _windows(net, layer, maps, 0)))


def _windows(net: IntegerNet, layer: Layer, maps: Array, fill: int) -> Iterator[tuple[int, int, Array]]:
    """(row, column, input values under that tap of the kernel for every window)."""
    top, left, bottom, right = layer.pads
    height, width, _ = net.tensors[layer.output].hwc
    padded = np.pad(maps, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    (rows, columns), (down, across) = layer.kernel, layer.strides
    for i in range(rows):
        for j in range(columns):
            yield i, j, padded[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * across + 1 : across]
