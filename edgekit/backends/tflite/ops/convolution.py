"""Conv: CONV_2D, DEPTHWISE_CONV_2D, CONV_3D; one spatial axis is two with the first of size 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, channels_last
from edgekit.backends.tflite.graph import Array, Quant, Tensor
from edgekit.backends.tflite.ops.dense import bias_tensor
from edgekit.backends.tflite.ops.windows import Window, cropped, padded, window
from edgekit.backends.tflite.values import Node, Refused


def _conv(e: Emitter, n: Node) -> None:
    x, weight, out = n.require(0), n.require(1), n.outputs[0]
    data = weight.data
    if data is None:
        raise Refused("its weights are computed", "LiteRT's convolutions need constant weights")
    if weight.quant is not None and not weight.quant.per_tensor and weight.quant.axis != 0:
        raise Refused("its weights are quantized along another axis", "quantize per output channel")
    bias = n.input(2)
    if bias is not None and bias.data is None:
        raise Refused("its bias is computed", "make it constant")
    rank = x.rank - 2
    if rank not in (1, 2, 3):
        raise Refused(f"it has {rank} spatial axes", "LiteRT convolves 1 to 3")
    w = window(n, data.shape[2:], x.shape[2:])
    layout = channels_last(x.rank)
    tensor = e.tensor(x, layout)
    if rank == 1:
        tensor, data, w = _two_axes(e, tensor, data, w)
    tensor, w = cropped(e, tensor, w)
    padding = w.padding(tensor.shape[1:-1])
    if padding is None:
        tensor, padding = padded(e, tensor, w), "VALID"
    group = n.int("group", 1)
    values = None if bias is None else bias.data
    scale = None if bias is None else bias.quant
    parts = _parts(e, n, tensor, data, weight.quant, values, scale, group)
    made = [_one(e, n, t, k, b, w, padding, depthwise) for t, k, b, depthwise in parts]
    shape = (*made[0].shape[:-1], sum(m.shape[-1] for m in made))
    joined = made[0] if len(made) == 1 else e.op(
        "CONCATENATION", made, shape, quant=out.quant, axis=len(shape) - 1, fusedActivationFunction="NONE"
    )  # fmt: skip
    if rank == 1:
        joined = e.reshape(joined, (joined.shape[0], *joined.shape[2:]), name=out.name)
    joined.name = out.name
    e.define(out, joined, layout)


def _two_axes(e: Emitter, x: Tensor, data: Array, w: Window) -> tuple[Tensor, Array, Window]:
    x = e.reshape(x, (x.shape[0], 1, *x.shape[1:]))
    wide = Window((1, *w.kernel), (1, *w.strides), (1, *w.dilations), (0, *w.begin), (0, *w.end))
    return x, data[:, :, None], wide


_Part = tuple[Tensor, Tensor, Tensor, bool]


def _parts(
    e: Emitter,
    n: Node,
    x: Tensor,
    data: Array,
    quant: Quant | None,
    bias: Array | None,
    bias_quant: Quant | None,
    group: int,
) -> list[_Part]:
    """(input, weights, bias, whether depthwise) of each LiteRT convolution that the node needs; usually one."""
    inputs, outputs = x.shape[-1], data.shape[0]
    name = n.require(1).name
    if group == inputs and group > 1 and data.ndim == 4:
        kernel = e.constant(np.ascontiguousarray(data[:, 0].transpose(1, 2, 0)[None]), name, _on(quant, 3))
        return [(x, kernel, bias_tensor(e, n, x, kernel, outputs, bias, bias_quant), True)]
    if data.ndim == 5:
        if group != 1:
            raise Refused("a grouped convolution over 3 axes", "LiteRT has none")
        kernel = e.constant(np.ascontiguousarray(data.transpose(2, 3, 4, 1, 0)), name, _on(quant, 4))
        return [(x, kernel, bias_tensor(e, n, x, kernel, outputs, bias, bias_quant), False)]
    # a LiteRT convolution whose weights are narrower than its input is grouped
    kernel = e.constant(np.ascontiguousarray(data.transpose(0, 2, 3, 1)), name, _on(quant, 0))
    return [(x, kernel, bias_tensor(e, n, x, kernel, outputs, bias, bias_quant), False)]


def _on(quant: Quant | None, axis: int) -> Quant | None:
    return None if quant is None else quant.on(axis)


def _one(
    e: Emitter, n: Node, x: Tensor, kernel: Tensor, bias: Tensor, w: Window, padding: str, depthwise: bool
) -> Tensor:
    out = n.outputs[0]
    sizes = [
        -(-size // s) if padding == "SAME" else (size - (k - 1) * d - 1) // s + 1
        for size, k, s, d in zip(x.shape[1:-1], w.kernel, w.strides, w.dilations, strict=True)
    ]
    channels = kernel.shape[-1] if depthwise or (kernel.data is not None and kernel.data.ndim == 5) else kernel.shape[0]
    common: dict[str, Any] = {"padding": padding, "fusedActivationFunction": n.activation}
    common |= {"strideH": w.strides[-2], "strideW": w.strides[-1]}
    common |= {"dilationHFactor": w.dilations[-2], "dilationWFactor": w.dilations[-1]}
    code = "CONV_2D"
    if len(sizes) == 3:
        code = "CONV_3D"
        common |= {"strideD": w.strides[0], "dilationDFactor": w.dilations[0]}
    elif depthwise:
        code = "DEPTHWISE_CONV_2D"
        common |= {"depthMultiplier": channels // x.shape[-1]}
    return e.op(code, [x, kernel, bias], (x.shape[0], *sizes, channels), quant=out.quant, dtype=out.dtype, **common)


LOWERINGS = {"Conv": _conv}
