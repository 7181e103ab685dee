"""Normalizations over axes: mean, variance and scale in operators that XNNPACK takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, channels_last
from edgekit.backends.tflite.graph import Array, Layout, Tensor
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.values import Node, Refused

_PLAIN: dict[str, Any] = {"fusedActivationFunction": "NONE"}


def standardized(e: Emitter, x: Tensor, axes: Sequence[int], epsilon: float, *, centre: bool = True) -> Tensor:
    """(x − mean) / √(variance + ε) over the tensor's own `axes`; without `centre`, x / √(mean of squares + ε)."""
    where = e.constant(np.array(sorted(axes), np.int32))
    small = [1 if k in axes else s for k, s in enumerate(x.shape)]
    dynamic = x.dynamic - set(axes)
    same: dict[str, Any] = {"shape": x.shape, "dynamic": x.dynamic}
    if centre:
        mean = e.op("MEAN", [x, where], small, dynamic=dynamic, keepDims=True)
        square = e.op("SQUARED_DIFFERENCE", [x, mean], **same)
        x = e.op("SUB", [x, mean], **same, **_PLAIN)
    else:
        square = e.op("MUL", [x, x], **same, **_PLAIN)
    variance = e.op("MEAN", [square, where], small, dynamic=dynamic, keepDims=True)
    inverse = e.op("ADD", [variance, e.constant(np.float32(epsilon))], small, dynamic=dynamic, **_PLAIN)
    return e.op("MUL", [x, e.op("RSQRT", [inverse], small, dynamic=dynamic)], **same, **_PLAIN)


def _layer(*, centre: bool) -> Callable[[Emitter, Node], None]:
    def run(e: Emitter, n: Node) -> None:
        if any(v.name and e.readers(v) for v in n.outputs[1:]):
            raise Refused("its mean or deviation is used", "export the model for inference")
        x, out = n.require(0), n.outputs[0]
        layout = existing(e, x)
        axes = [layout.index(a) for a in range(n.int("axis", -1) % x.rank, x.rank)]
        y = standardized(e, e.tensor(x, layout), axes, n.float("epsilon", 1e-5), centre=centre)
        rest = [("MUL", n.require(1))] + ([("ADD", b)] if (b := n.input(2)) is not None else [])
        for code, value in rest:
            y = e.op(code, [y, e.widened(value, layout)], y.shape, dynamic=y.dynamic, **_PLAIN)
        y.name = out.name
        e.define(out, y, layout)

    return run


def _instance(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    layout = existing(e, x)
    axes = [layout.index(a) for a in range(2, x.rank)]
    y = standardized(e, e.tensor(x, layout), axes, n.float("epsilon", 1e-5))
    for code, index in (("MUL", 1), ("ADD", 2)):
        y = e.op(code, [y, _per_channel(e, n.const(index), layout)], y.shape, dynamic=y.dynamic, **_PLAIN)
    e.define(out, y, layout)


def _per_channel(e: Emitter, array: Array | None, layout: Layout) -> Tensor:
    assert array is not None
    return e.constant(np.asarray(array, np.float32).reshape([-1 if a == 1 else 1 for a in layout]))


def _group(e: Emitter, n: Node) -> None:
    """Channels in groups: (batch, spatial, groups, channels of a group), whose last and spatial axes are averaged."""
    x, out, groups = n.require(0), n.outputs[0], n.int("num_groups", 1)
    layout = channels_last(x.rank)
    tensor = e.tensor(x, layout)
    spatial = int(np.prod(tensor.shape[1:-1], dtype=np.int64))
    grouped = e.reshape(tensor, (tensor.shape[0], spatial, groups, x.shape[1] // groups))
    y = standardized(e, grouped, (1, 3), n.float("epsilon", 1e-5))
    y = e.reshape(y, tensor.shape)
    for code, index in (("MUL", 1), ("ADD", 2)):
        y = e.op(code, [y, _per_channel(e, n.const(index), layout)], y.shape, dynamic=y.dynamic, **_PLAIN)
    e.define(out, y, layout)


def _mean_variance(e: Emitter, n: Node) -> None:
    """(x − mean) / (√variance + 1e-9), as ONNX defines it."""
    x, out = n.require(0), n.outputs[0]
    layout = existing(e, x)
    axes = [layout.index(a % x.rank) for a in n.ints("axes", (0, 2, 3))]
    tensor = e.tensor(x, layout)
    where = e.constant(np.array(sorted(axes), np.int32))
    small, grows = [1 if k in axes else s for k, s in enumerate(tensor.shape)], tensor.dynamic
    dynamic = grows - set(axes)
    mean = e.op("MEAN", [tensor, where], small, dynamic=dynamic, keepDims=True)
    square = e.op("SQUARED_DIFFERENCE", [tensor, mean], tensor.shape, dynamic=grows)
    variance = e.op("MEAN", [square, where], small, dynamic=dynamic, keepDims=True)
    deviation = e.op("SQRT", [variance], small, dynamic=dynamic)
    divisor = e.op("ADD", [deviation, e.constant(np.float32(1e-9))], small, dynamic=dynamic, **_PLAIN)
    centred = e.op("SUB", [tensor, mean], tensor.shape, dynamic=grows, **_PLAIN)
    e.emit(out, "DIV", [centred, divisor], layout, **_PLAIN)


def _local_response(e: Emitter, n: Node) -> None:
    """x / (bias + alpha/size · sum of squares over `size` channels)^beta; LiteRT's window is as wide on both sides."""
    x, out, size = n.require(0), n.outputs[0], n.int("size", 1)
    if x.rank != 4 or size % 2 == 0:
        raise Refused("an even window, or not four axes", "LiteRT normalizes images over an odd number of channels")
    layout = channels_last(4)
    e.emit(
        out, "LOCAL_RESPONSE_NORMALIZATION", [e.tensor(x, layout)], layout, radius=size // 2, bias=n.float("bias", 1.0),
        alpha=n.float("alpha", 1e-4) / size, beta=n.float("beta", 0.75),
    )  # fmt: skip


def _lp(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    axis, layout = n.int("axis", -1) % x.rank, existing(e, x)
    tensor, where = e.tensor(x, layout), e.constant(np.array([layout.index(axis)], np.int32))
    small = [1 if a == axis else x.shape[a] for a in layout]
    dynamic = tensor.dynamic - {layout.index(axis)}
    if n.int("p", 2) == 1:
        total = e.op("ABS", [tensor], tensor.shape, dynamic=tensor.dynamic)
        norm = e.op("SUM", [total, where], small, dynamic=dynamic, keepDims=True)
    else:
        total = e.op("MUL", [tensor, tensor], tensor.shape, dynamic=tensor.dynamic, **_PLAIN)
        norm = e.op(
            "SQRT", [e.op("SUM", [total, where], small, dynamic=dynamic, keepDims=True)], small, dynamic=dynamic
        )
    tiny = e.op("MAXIMUM", [norm, e.constant(np.float32(np.finfo(np.float32).tiny))], small, dynamic=dynamic)
    e.emit(out, "DIV", [tensor, tiny], layout, **_PLAIN)


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    "LayerNormalization": _layer(centre=True),
    "RMSNormalization": _layer(centre=False),
    "InstanceNormalization": _instance,
    "GroupNormalization": _group,
    "MeanVarianceNormalization": _mean_variance,
    "LpNormalization": _lp,
    "LRN": _local_response,
}
