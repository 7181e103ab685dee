"""Pools: maxima and means over sliding windows, in float64, where sums of quantized values are exact.

A quantized value (q - zero) * scale needs 33 of float64's 53 bits, so a sum of up to 2**20 of them has no rounding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.backends.reference.values import Array, Quantized, Real, Value, is_exact, real
from edgekit.windows import Window, pad_spatial, window


def max_pool(node: ir.Node, inputs: list[Value]) -> list[Value]:
    """Integers stay integers: the largest real is the largest integer, scales being positive."""
    x = inputs[0]
    if isinstance(x, Quantized) and x.axis is None:
        return [Quantized(_max(node, x.q), x.scale, x.zero)]
    return [_as_given(x, _max(node, real(x)))]


def _max(node: ir.Node, x: Array) -> Array:
    win, out = _window(node, x.shape[2:])
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    padded = pad_spatial(x, win.begins, win.ends, lowest)
    best: Array | None = None
    for _, where in win.taps(out):
        seen = padded[(slice(None), slice(None), *where)]
        best = seen.copy() if best is None else np.maximum(best, seen, out=best)
    assert best is not None
    return best


def average_pool(node: ir.Node, inputs: list[Value]) -> list[Value]:
    x = real(inputs[0])
    size = x.shape[2:]
    win, out = _window(node, size)
    # positions that count: the input, or the input with the declared padding; never what ceil_mode added behind it
    ones = np.ones((1, 1, *size))
    declared = window(node, win.kernel, size)
    if node.attributes.get_int("count_include_pad", 0):
        ones = pad_spatial(ones, declared.begins, declared.ends, 1)
        ones = pad_spatial(ones, (0,) * len(size), tuple(w - d for w, d in zip(win.ends, declared.ends, strict=True)))
    else:
        ones = pad_spatial(ones, win.begins, win.ends)
    padded = pad_spatial(x, win.begins, win.ends)
    total, count = np.zeros((*x.shape[:2], *out)), np.zeros((1, 1, *out))
    for _, where in win.taps(out):
        total += padded[(slice(None), slice(None), *where)]
        count += ones[(slice(None), slice(None), *where)]
    return [_as_given(inputs[0], total / count)]


def global_average_pool(node: ir.Node, inputs: list[Value]) -> list[Value]:
    x = real(inputs[0])
    return [_as_given(inputs[0], x.mean(axis=tuple(range(2, x.ndim)), keepdims=True))]


def global_max_pool(node: ir.Node, inputs: list[Value]) -> list[Value]:
    x = real(inputs[0])
    return [_as_given(inputs[0], x.max(axis=tuple(range(2, x.ndim)), keepdims=True))]


def _window(node: ir.Node, size: tuple[int, ...]) -> tuple[Window, tuple[int, ...]]:
    """The window with `ends` grown so that the outputs of ceil_mode fit; a window may not start in the end padding."""
    win = window(node, tuple(node.attributes.get_ints("kernel_shape")), size)
    out = list(win.out(size))
    ends = list(win.ends)
    if node.attributes.get_int("ceil_mode", 0):
        for a, n in enumerate(size):
            span = n + win.begins[a] + win.ends[a] - win.extent(a)
            out[a] = -(-span // win.strides[a]) + 1
            if (out[a] - 1) * win.strides[a] >= n + win.begins[a]:
                out[a] -= 1
            ends[a] += max(0, (out[a] - 1) * win.strides[a] - span)
    return Window(win.kernel, win.strides, win.dilations, win.begins, tuple(ends)), tuple(out)


def _as_given(source: Value, out: Array) -> Value:
    if is_exact(source):
        return Real(out)
    assert isinstance(source, np.ndarray)
    return out.astype(source.dtype)
