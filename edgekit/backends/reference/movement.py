"""Operators that move elements without arithmetic: integers stay integers, with the scale they had."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.backends.reference.fallback import Runner, runner
from edgekit.backends.reference.values import Array, Quantized, Real, Value, int_range, is_exact, plain, real

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


def resize(node: ir.Node, inputs: list[Value]) -> list[Value] | None:
    """Nearest and linear, axis by axis; None for what is not separable this way.

    A ramp 0, 1, 2, … resized by ONNX's own reference gives the input position of every output: its index for nearest,
    index and fraction for linear.
    """
    get = node.attributes.get_string
    mode = get("mode", "nearest")
    special = node.attributes.get_int("antialias", 0) or get("keep_aspect_ratio_policy", "stretch") != "stretch"
    crops = get("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    x = inputs[0]
    known = is_exact(x) or (isinstance(x, np.ndarray) and x.dtype == np.float32)
    if mode not in ("nearest", "linear") or special or crops or not known:
        return None
    stored = isinstance(x, Quantized) and x.axis is None and mode == "nearest"
    data = x.q if isinstance(x, Quantized) and stored else real(x)
    for axis, at in _positions(node, inputs, data.shape).items():
        if mode == "nearest":
            data = np.take(data, np.rint(at).astype(int), axis)
        else:
            data = _interpolate(data, axis, at)
    if isinstance(x, Quantized) and stored:
        return [Quantized(data, x.scale, x.zero)]
    return [Real(data) if is_exact(x) else data.astype(np.float32)]


def _positions(node: ir.Node, inputs: list[Value], shape: tuple[int, ...]) -> dict[int, Array]:
    """For every resized axis: where along the input each output index looks."""
    axes = [a % len(shape) for a in node.attributes.get_ints("axes", ()) or range(len(shape))]
    sizes = inputs[3] if len(inputs) > 3 else None
    given = plain(sizes if sizes is not None else inputs[2])
    attributes = {k: v for k, v in node.attributes.items() if k != "axes"}
    which = "sizes" if sizes is not None else "scales"
    names = ["ramp", "", which] if which == "scales" else ["ramp", "", "", which]
    values = [ir.val(name) if name else None for name in names]
    along = ir.Node("", "Resize", values, attributes.values(), outputs=[ir.val("out")], name=node.name)
    run = runner(along, {"": 21}, slow=True)
    found: dict[int, Array] = {}
    for axis, amount in zip(axes, given, strict=True):
        if amount == (1 if which == "scales" else shape[axis]):
            continue
        ramp = np.arange(shape[axis], dtype=np.float32)
        operands = [ramp if n == "ramp" else np.asarray([amount], given.dtype) if n else None for n in names]
        found[axis] = run(operands)[0].astype(np.float64)
    return found


def _interpolate(x: Array, axis: int, at: Array) -> Array:
    low = np.clip(np.floor(at).astype(int), 0, x.shape[axis] - 1)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    fraction = (at - low).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    mixed: Array = np.take(x, low, axis) * (1.0 - fraction) + np.take(x, high, axis) * fraction
    return mixed
