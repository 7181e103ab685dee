"""MaxPool and AveragePool over one or two spatial axes."""

from __future__ import annotations

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, channels_last
from edgekit.backends.tflite.graph import Array, Tensor
from edgekit.backends.tflite.ops.windows import Window, padded, window
from edgekit.backends.tflite.values import Node, Refused


def _prepared(e: Emitter, n: Node) -> tuple[Tensor, Window]:
    x = n.require(0)
    rank = x.rank - 2
    if rank not in (1, 2):
        raise Refused(f"it pools {rank} spatial axes", "LiteRT pools 1 or 2")
    if len(n.outputs) > 1 and n.outputs[1].name:
        raise Refused("its indices are used", "LiteRT's pools have no second output")
    w = window(n, n.ints("kernel_shape"), x.shape[2:])
    if any(d != 1 for d in w.dilations):
        raise Refused("a dilated pool", "LiteRT has none")
    if min((*w.begin, *w.end)) < 0:
        raise Refused("negative padding", "crop with a Slice")
    tensor = e.tensor(x, channels_last(x.rank))
    if rank == 1:
        tensor = e.reshape(tensor, (tensor.shape[0], 1, *tensor.shape[1:]))
        w = Window((1, *w.kernel), (1, *w.strides), (1, *w.dilations), (0, *w.begin), (0, *w.end))
    return tensor, w


def _pool(e: Emitter, n: Node, code: str, x: Tensor, w: Window, padding: str) -> Tensor:
    out = n.outputs[0]
    if x.quant is not None and not x.quant.same(out.quant):
        raise Refused("its scale differs between input and output", "quantize anew with edgekit")
    sizes = [
        -(-size // s) if padding == "SAME" else (size - k) // s + 1
        for size, k, s in zip(x.shape[1:-1], w.kernel, w.strides, strict=True)
    ]
    return e.op(
        code, [x], (x.shape[0], *sizes, x.shape[-1]), quant=out.quant, padding=padding, strideH=w.strides[0],
        strideW=w.strides[1], filterHeight=w.kernel[0], filterWidth=w.kernel[1], fusedActivationFunction=n.activation,
    )  # fmt: skip


def _define(e: Emitter, n: Node, y: Tensor) -> None:
    out = n.outputs[0]
    if out.rank == 3:
        y = e.reshape(y, (y.shape[0], *y.shape[2:]))
    y.name = out.name
    e.define(out, y, channels_last(out.rank))


def _max_pool(e: Emitter, n: Node) -> None:
    x, w = _prepared(e, n)
    padding = w.padding(x.shape[1:-1])
    if padding is None:
        x, padding = _padded_for_max(e, n, x, w), "VALID"
    _define(e, n, _pool(e, n, "MAX_POOL_2D", x, w, padding))


def _padded_for_max(e: Emitter, n: Node, x: Tensor, w: Window) -> Tensor:
    """Padding that never wins: zeros where nothing is below (XNNPACK takes PAD, not PADV2), else the lowest value."""
    if x.quant is not None:
        lowest = int(np.iinfo(x.dtype).min)
        return padded(e, x, w, None if x.quant.zero == lowest else lowest)
    writer = next((o for o in reversed(e.graph.operators) if x in o.outputs), None)
    positive = writer is not None and (
        writer.options.get("fusedActivationFunction") in ("RELU", "RELU6") or writer.code in ("RELU", "RELU6")
    )
    return padded(e, x, w, None if positive else float(np.finfo(np.float32).min))


def _average_pool(e: Emitter, n: Node) -> None:
    x, w = _prepared(e, n)
    counted = bool(n.int("count_include_pad", 0))
    declared = n.ints("pads", (0,) * len(w.begin) * 2)
    padding = w.padding(x.shape[1:-1])
    if x.quant is not None and padding == "VALID" and w.kernel == x.shape[1:-1] and n.activation == "NONE":
        # XNNPACK takes an int8 MEAN and no int8 AVERAGE_POOL_2D
        quant = n.outputs[0].quant
        axes = e.constant(np.array([1, 2], np.int32))
        mean = e.op("MEAN", [x, axes], (x.shape[0], 1, 1, x.shape[-1]), quant=quant, keepDims=True)
        return _define(e, n, mean)
    if padding == "VALID" or (padding == "SAME" and not counted):
        return _define(e, n, _pool(e, n, "AVERAGE_POOL_2D", x, w, padding))
    grown = n.int("ceil_mode", 0) and tuple(w.end[-(len(declared) // 2) :]) != tuple(declared[len(declared) // 2 :])
    if counted and not grown:
        return _define(e, n, _pool(e, n, "AVERAGE_POOL_2D", padded(e, x, w), w, "VALID"))
    if x.quant is not None:
        raise Refused("padding that it does not count, other than SAME", "keep this node float")
    ends = declared[len(declared) // 2 :] if n.str("auto_pad", "NOTSET") == "NOTSET" else w.end
    y = _pool(e, n, "AVERAGE_POOL_2D", padded(e, x, w), w, "VALID")
    factors = _correction(x.shape[1:-1], w, counted, tuple(ends))
    _define(e, n, e.op("MUL", [y, e.constant(factors[None, :, :, None])], y.shape, fusedActivationFunction="NONE"))


def _correction(sizes: tuple[int, ...], w: Window, counted: bool, ends: tuple[int, ...]) -> Array:
    """Window size over the number of elements that count, per output position. ends: the padding that was declared."""
    axes = []
    ends = (0,) * (len(sizes) - len(ends)) + ends
    for size, k, s, begin, end, own in zip(sizes, w.kernel, w.strides, w.begin, w.end, ends, strict=True):
        line = np.zeros(begin + size + end)
        line[begin : begin + size] = 1
        if counted:
            line[: begin + size + own] = 1
        axes.append(np.array([line[i : i + k].sum() for i in range(0, len(line) - k + 1, s)]))
    counts = axes[0][:, None] * axes[1][None, :]
    factors: Array = (np.prod(w.kernel) / counts).astype(np.float32)
    return factors


LOWERINGS = {"MaxPool": _max_pool, "AveragePool": _average_pool}
