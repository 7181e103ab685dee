"""Operators that move elements without arithmetic: integers stay integers, with the scale they had."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.backends.reference.fallback import Runner
from edgekit.backends.reference.values import Array, Quantized, Real, Value, int_range, is_exact, real

# data comes in by the first input only; everything else is indices, shapes and axes
MOVES = {
    *("Identity", "Dropout", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather"),
    *("GatherElements", "GatherND", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"),
}


def move(node: ir.Node, inputs: list[Value], run: Runner) -> list[Value]:
    """Runs the operator on the integers of a per-tensor quantized value, on the float64 reals of any other."""
    x = inputs[0]
    rest = [v if isinstance(v, np.ndarray) else None for v in inputs[1:]]
    if isinstance(x, Quantized) and x.axis is None:
        return [Quantized(out, x.scale, x.zero) for out in run([x.q, *rest])]
    if isinstance(x, Quantized) and node.op_type == "Transpose":
        perm = list(node.attributes.get_ints("perm", ()) or range(x.q.ndim)[::-1])
        assert x.axis is not None
        return [Quantized(x.q.transpose(perm), x.scale, x.zero, perm.index(x.axis))]
    return [Real(out) for out in run([real(x), *rest])]


def concat(node: ir.Node, inputs: list[Value]) -> list[Value]:
    axis = node.attributes.get_int("axis")
    first = inputs[0]
    if isinstance(first, Quantized) and all(_same_grid(first, v) for v in inputs):
        return [
            Quantized(np.concatenate([v.q for v in inputs if isinstance(v, Quantized)], axis), first.scale, first.zero)
        ]
    return [Real(np.concatenate([real(v) for v in inputs], axis))]


def _same_grid(a: Quantized, b: Value) -> bool:
    return (
        isinstance(b, Quantized)
        and a.axis is None
        and b.axis is None
        and a.q.dtype == b.q.dtype
        and bool(a.scale == b.scale)
        and bool(a.zero == b.zero)
    )


def pad(node: ir.Node, inputs: list[Value], run: Runner) -> list[Value]:
    """A constant fills with the integer that stands for it, if there is one."""
    x = inputs[0]
    rest = [*inputs[1:], *[None] * (4 - len(inputs))][: len(node.inputs) - 1]
    mode = node.attributes.get_string("mode", "constant")
    fill = real(inputs[2]).reshape(()) if len(inputs) > 2 and inputs[2] is not None else np.zeros(())
    if isinstance(x, Quantized) and x.axis is None:
        stored = fill / x.scale + x.zero
        low, high = int_range(x.q.dtype)
        if mode != "constant" or (stored == np.rint(stored) and low <= stored <= high):
            return [Quantized(_pad(x.q, node, rest, stored.astype(x.q.dtype)), x.scale, x.zero)]
    return [Real(_pad(real(x), node, rest, fill))]


def _pad(x: Array, node: ir.Node, rest: list[Value], fill: Array) -> Array:
    pads = np.asarray(rest[0]).astype(int)
    axes = [int(a) for a in np.asarray(rest[2])] if len(rest) > 2 and rest[2] is not None else list(range(x.ndim))
    low, high = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(axes):
        low[axis], high[axis] = int(pads[i]), int(pads[i + len(axes)])
    widths = [(max(0, a), max(0, b)) for a, b in zip(low, high, strict=True)]
    mode = node.attributes.get_string("mode", "constant")
    if mode == "constant":
        out = np.pad(x, widths, constant_values=fill[()])
    else:
        out = np.pad(x, widths, mode=mode)  # type: ignore[call-overload]
    crop = tuple(slice(max(0, -a), n - max(0, -b)) for a, b, n in zip(low, high, out.shape, strict=True))
    result: Array = out[crop]
    return result


def resize(node: ir.Node, inputs: list[Value], run: Runner) -> list[Value] | None:
    """Nearest and linear, axis by axis; None for what is not separable this way.

    A ramp 0, 1, 2, … resized by the operator itself gives the input position of every output: its index for nearest,
    index and fraction for linear.
    """
    mode = node.attributes.get_string("mode", "nearest")
    plain_axes = not any(node.attributes.get_int(key, 0) for key in ("antialias", "exclude_outside"))
    crops = node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    if mode not in ("nearest", "linear") or not plain_axes or crops:
        return None
    x = inputs[0]
    if not (isinstance(x, Quantized) and x.axis is None) and not is_exact(x):
        return None
    data = x.q if isinstance(x, Quantized) else real(x)
    rest = [v if isinstance(v, np.ndarray) else None for v in inputs[1:]]
    positions = [_positions(data.shape, axis, rest, run) for axis in range(data.ndim)]
    if mode == "nearest":
        for axis, at in enumerate(positions):
            data = np.take(data, np.rint(at).astype(int), axis)
        return [Quantized(data, x.scale, x.zero) if isinstance(x, Quantized) else Real(data)]
    out = real(x)
    for axis, at in enumerate(positions):
        if len(at) != out.shape[axis] or not np.array_equal(at, np.arange(len(at))):
            out = _interpolate(out, axis, at)
    return [Real(out)]


def _positions(shape: tuple[int, ...], axis: int, rest: list[Array | None], run: Runner) -> Array:
    """Where along `axis` of the input each output index looks."""
    ramp = np.arange(shape[axis], dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    out = run([np.ascontiguousarray(np.broadcast_to(ramp, shape)), *rest])[0]
    positions: Array = np.moveaxis(out, axis, 0).reshape(out.shape[axis], -1)[:, 0].astype(np.float64)
    return positions


def _interpolate(x: Array, axis: int, at: Array) -> Array:
    low = np.clip(np.floor(at).astype(int), 0, x.shape[axis] - 1)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    fraction = (at - low).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    mixed: Array = np.take(x, low, axis) * (1.0 - fraction) + np.take(x, high, axis) * fraction
    return mixed
