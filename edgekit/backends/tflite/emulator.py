"""Computes a lowered int8 graph as LiteRT would, bit by bit, without the device.

Two families of kernels round differently. "xnnpack": sums times a float32 factor, rounded half to even; what LiteRT's
default delegate runs on any CPU. "reference": gemmlowp fixed point, rounded twice; LiteRT's reference kernels,
microcontrollers (TFLM), and runtimes that delegate no int8. Both were compared with the kernels themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np

from edgekit.backends.tflite import fixed_point
from edgekit.backends.tflite.check import delegated
from edgekit.backends.tflite.graph import Array, Graph, Operator, Quant, Tensor
from edgekit.errors import UnsupportedOpError
from edgekit.model import Tensors

Family = Literal["xnnpack", "reference"]
Values = dict[Tensor, Array]


class Emulator:
    """graph: lowered from a QDQ model. approximate: (operator, source node) computed in float64 and rounded once.

    Those are within 1 LSB of the kernel instead of equal to it: softmax and float islands, mostly.
    """

    def __init__(self, graph: Graph, family: Family) -> None:
        self._graph, self.family = graph, family
        self.approximate = tuple((o.code, o.source) for o in graph.operators if not exact(o, family))

    def run(self, inputs: Tensors, keep: Iterable[str] = ()) -> Tensors:
        """inputs: by signature name, the dtype that the file takes. Returns the outputs, and tensors named in `keep`.

        Raises UnsupportedOpError for an operator without an emulation.
        """
        values: Values = {tensor: np.asarray(inputs[name]) for name, tensor in self._graph.inputs}
        for operator in self._graph.operators:
            for tensor in operator.inputs:
                if tensor is not None and tensor.data is not None:
                    values[tensor] = tensor.data
            for tensor, result in zip(operator.outputs, compute(operator, values, self.family), strict=True):
                values[tensor] = result
        wanted = set(keep)
        named = {t.name: v for t, v in values.items() if t.name in wanted}
        return {**named, **{name: values[tensor] for name, tensor in self._graph.outputs}}


def exact(operator: Operator, family: Family) -> bool:
    """Whether the emulation of this operator equals the family's kernel in every bit."""
    moves = operator.code in ("RESHAPE", "SLICE", "TRANSPOSE", "CONCATENATION", "PAD", "PADV2", "GATHER", "DEQUANTIZE")
    return moves or (operator.outputs[0].kind == "qint8" and operator.code in _EXACT)


# compared with the kernels on a million values each: tests/test_tflite_emulator.py
_EXACT = frozenset(
    {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "SUB", "MUL", "MEAN", "MAX_POOL_2D", "AVERAGE_POOL_2D"}
    | {"QUANTIZE", "LEAKY_RELU", "LOGISTIC", "TANH", "MAXIMUM", "MINIMUM"}
)


def compute(operator: Operator, values: Mapping[Tensor, Array], family: Family) -> list[Array]:
    """The results of one operator on stored integers (or plain numbers), as `family` computes it."""
    kernel = _KERNELS.get(operator.code)
    if operator.outputs[0].kind == "qint8" and not delegated(operator):
        family = "reference"  # XNNPACK leaves it to LiteRT's own kernel
    if kernel is None:
        raise UnsupportedOpError(f"the emulator has no {operator.code} ('{operator.source}')", "run it in LiteRT")
    return [kernel(operator, [None if t is None else values[t] for t in operator.inputs], family)]


_Inputs = list[Array | None]
_Kernel = Callable[[Operator, _Inputs, Family], Array]


def _array(values: _Inputs, index: int) -> Array:
    found = values[index]
    assert found is not None
    return found


def _quant(tensor: Tensor | None) -> Quant:
    assert tensor is not None
    assert tensor.quant is not None
    return tensor.quant


def _saturated(steps: Array, operator: Operator) -> Array:
    """Stored integers from steps counted from the zero point, within the fused activation's range."""
    out = operator.outputs[0]
    quant, info = _quant(out), np.iinfo(out.dtype)
    low, high = info.min, info.max
    activation = operator.options.get("fusedActivationFunction", "NONE")
    bounds = {"RELU": (0.0, None), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0)}.get(activation, (None, None))
    if bounds[0] is not None:
        low = max(low, _stored(bounds[0], quant))
    if bounds[1] is not None:
        high = min(high, _stored(bounds[1], quant))
    result: Array = np.clip(steps + quant.zero, low, high).astype(out.dtype)
    return result


def _stored(value: float, quant: Quant) -> int:
    return int(quant.zero + np.floor(np.float32(value) / np.float32(quant.scale) + np.float32(0.5)))


def _scaled(acc: Array, factors: Array, family: Family) -> Array:
    """Sums times a factor per last axis (or one), as steps. factors: float64, s_in · s_w / s_out."""
    if family == "xnnpack":
        return np.rint(acc.astype(np.float32) * factors.astype(np.float32)).astype(np.int64)
    return fixed_point.multiplied(acc, factors)


def _factors(operator: Operator, data: int, weights: int) -> Array:
    """XNNPACK multiplies and divides in float32, the reference in float64."""
    x, w = _quant(operator.inputs[data]), _quant(operator.inputs[weights])
    return np.asarray(w.scales, np.float64) * np.float64(x.scale) / np.float64(_quant(operator.outputs[0]).scale)


def _single(operator: Operator, data: int, weights: int) -> Array:
    x, w = _quant(operator.inputs[data]), _quant(operator.inputs[weights])
    return (np.float32(x.scale) * w.scales.astype(np.float32)) / np.float32(_quant(operator.outputs[0]).scale)


def _sums(operator: Operator, acc: Array, values: _Inputs, family: Family) -> Array:
    bias = values[2] if len(values) > 2 else None
    if bias is not None:
        acc = acc + bias.astype(np.int64)
    factors = _single(operator, 0, 1) if family == "xnnpack" else _factors(operator, 0, 1)
    if family == "reference" and operator.code == "FULLY_CONNECTED":
        return _saturated(fixed_point.rounded_once(acc, factors), operator)
    return _saturated(_scaled(acc, factors, family), operator)


def _dense(operator: Operator, values: _Inputs, family: Family) -> Array:
    x, w = _array(values, 0), _array(values, 1)
    centred = x.astype(np.float64) - _quant(operator.inputs[0]).zero
    rows = centred.reshape(-1, w.shape[1])
    acc = np.rint(rows @ w.astype(np.float64).T).astype(np.int64)
    shape = (*x.shape[:-1], len(w)) if operator.options.get("keepNumDims") else acc.shape
    return _sums(operator, acc.reshape(shape), values, family)


def _patches(operator: Operator, x: Array, size: tuple[int, int]) -> Array:
    """Windows of x (batch, height, width, channels): (batch, rows, columns, kernel rows, kernel columns, channels)."""
    o = operator.options
    strides, dilations = (o["strideH"], o["strideW"]), (o.get("dilationHFactor", 1), o.get("dilationWFactor", 1))
    pads = [(0, 0), (0, 0)]
    outs = []
    for a in range(2):
        extent, length = (size[a] - 1) * dilations[a] + 1, x.shape[a + 1]
        if o["padding"] == "SAME":
            total = max((-(-length // strides[a]) - 1) * strides[a] + extent - length, 0)
            pads[a] = (total // 2, total - total // 2)
            outs.append(-(-length // strides[a]))
        else:
            outs.append((length - extent) // strides[a] + 1)
    padded = np.pad(x, [(0, 0), *pads, (0, 0)])
    rows = np.arange(outs[0])[:, None] * strides[0] + np.arange(size[0]) * dilations[0]
    columns = np.arange(outs[1])[:, None] * strides[1] + np.arange(size[1]) * dilations[1]
    return padded[:, rows[:, None, :, None], columns[None, :, None, :], :]


def _conv(operator: Operator, values: _Inputs, family: Family) -> Array:
    x, w = _array(values, 0), _array(values, 1)
    centred = x.astype(np.float64) - _quant(operator.inputs[0]).zero
    windows = _patches(operator, centred, w.shape[1:3])
    groups = x.shape[3] // w.shape[3]
    parts = []
    for g in range(groups):
        part = windows[..., g * w.shape[3] : (g + 1) * w.shape[3]]
        kernels = w[g * (len(w) // groups) : (g + 1) * (len(w) // groups)].astype(np.float64)
        parts.append(np.tensordot(part, kernels, axes=([3, 4, 5], [1, 2, 3])))
    return _sums(operator, np.rint(np.concatenate(parts, axis=-1)).astype(np.int64), values, family)


def _depthwise(operator: Operator, values: _Inputs, family: Family) -> Array:
    x, w = _array(values, 0), _array(values, 1)
    centred = x.astype(np.float64) - _quant(operator.inputs[0]).zero
    wide = np.repeat(centred, w.shape[3] // x.shape[3], axis=3)
    windows = _patches(operator, wide, w.shape[1:3])
    acc = np.einsum("nhwijc,ijc->nhwc", windows, w[0].astype(np.float64))
    return _sums(operator, np.rint(acc).astype(np.int64), values, family)


def _sum_of_two(operator: Operator, values: _Inputs, family: Family) -> Array:
    a, b = (_array(values, i).astype(np.int64) for i in (0, 1))
    first, second, out = (_quant(t) for t in (operator.inputs[0], operator.inputs[1], operator.outputs[0]))
    sign = -1 if operator.code == "SUB" else 1
    if family == "reference":
        return _saturated(
            fixed_point.added(a - first.zero, b - second.zero, first.scale, second.scale, out.scale, sign), operator
        )
    # XNNPACK, src/microparams-init.c, qs8 vadd: 21-bit factors, one rounding, halves up
    scales = [np.float32(q.scale) / np.float32(out.scale) for q in (first, second)]
    shift = 20 - (int(np.float32(max(scales)).view(np.uint32) >> 23) - 127)
    factors = [int(np.rint(np.ldexp(np.float64(s), shift))) for s in scales]
    acc = (a - first.zero) * factors[0] + sign * (b - second.zero) * factors[1]
    return _saturated((acc + (1 << (shift - 1))) >> shift, operator)


def _product_of_two(operator: Operator, values: _Inputs, family: Family) -> Array:
    first, second, out = (_quant(t) for t in (operator.inputs[0], operator.inputs[1], operator.outputs[0]))
    acc = (_array(values, 0).astype(np.int64) - first.zero) * (_array(values, 1).astype(np.int64) - second.zero)
    # both families multiply and divide the scales in float32
    factor = np.float32(first.scale) * np.float32(second.scale) / np.float32(out.scale)
    return _saturated(_scaled(acc, np.asarray(factor), family), operator)


def _mean(operator: Operator, values: _Inputs, family: Family) -> Array:
    x, axes = _array(values, 0), tuple(int(a) for a in _array(values, 1).reshape(-1))
    before, out = _quant(operator.inputs[0]), _quant(operator.outputs[0])
    count = int(np.prod([x.shape[a] for a in axes], dtype=np.int64))
    acc = x.astype(np.int64).sum(axis=axes, keepdims=bool(operator.options.get("keepDims"))) - before.zero * count
    if family == "xnnpack":
        # the raw sum in one fused multiply-add with all that is constant, then the even neighbour
        factor = before.scale / out.scale / count
        constant = np.float32(out.zero) - np.float32(before.zero * count) * np.float32(factor)
        total = x.astype(np.int64).sum(axis=axes, keepdims=bool(operator.options.get("keepDims")))
        stored = np.rint(total * factor + np.float64(constant)).astype(np.int64)
        return _saturated(stored - out.zero, operator)
    return _saturated(fixed_point.averaged(acc, count, before.scale / out.scale), operator)


def _max_pool(operator: Operator, values: _Inputs, family: Family) -> Array:
    o = operator.options
    x = _array(values, 0)
    low = np.iinfo(x.dtype).min if x.dtype.kind in "iu" else -np.inf
    windows = _patches(operator, x.astype(np.float64) - low, (o["filterHeight"], o["filterWidth"]))
    best = windows.max(axis=(3, 4)) + low
    return _saturated(best.astype(np.int64) - _quant(operator.outputs[0]).zero, operator)


def _average_pool(operator: Operator, values: _Inputs, family: Family) -> Array:
    """The mean of stored integers, halves away from zero, as both families' builtin kernel has it."""
    o = operator.options
    x, size = _array(values, 0), (o["filterHeight"], o["filterWidth"])
    total = _patches(operator, x.astype(np.float64), size).sum(axis=(3, 4))
    count = _patches(operator, np.ones_like(x, np.float64), size).sum(axis=(3, 4))
    steps = np.trunc(total / count + np.where(total >= 0, 0.5, -0.5)).astype(np.int64)
    return _saturated(steps - _quant(operator.outputs[0]).zero, operator)


def _quantize(operator: Operator, values: _Inputs, family: Family) -> Array:
    x, out = _array(values, 0), _quant(operator.outputs[0])
    source = operator.inputs[0]
    if source is not None and source.quant is not None:
        acc = x.astype(np.int64) - source.quant.zero
        if family == "xnnpack":
            return _saturated(_eight_bits(acc, np.float32(source.quant.scale) / np.float32(out.scale)), operator)
        return _saturated(fixed_point.multiplied(acc, np.asarray(source.quant.scale / out.scale)), operator)
    x = x.astype(np.float32)
    if family == "xnnpack":
        steps = np.rint(x * (np.float32(1) / np.float32(out.scale)))
    else:
        ratio = x / np.float32(out.scale)
        steps = np.trunc(ratio + np.copysign(np.float32(0.5), ratio))
    return _saturated(np.clip(steps, -(2**20), 2**20).astype(np.int64), operator)


def _dequantize(operator: Operator, values: _Inputs, family: Family) -> Array:
    quant = _quant(operator.inputs[0])
    result: Array = (_array(values, 0).astype(np.int32) - quant.zero).astype(np.float32) * np.float32(quant.scale)
    return result


def _table(function: Callable[[Array], Array]) -> _Kernel:
    """A function of one int8 tensor: of every integer, rounded half to even."""

    def run(operator: Operator, values: _Inputs, family: Family) -> Array:
        before, out = _quant(operator.inputs[0]), _quant(operator.outputs[0])
        x = (_array(values, 0).astype(np.float64) - before.zero) * before.scale
        return _saturated(np.rint(function(x) / out.scale).astype(np.int64), operator)

    return run


def _extreme(function: Callable[[Array, Array], Array]) -> _Kernel:
    return lambda operator, values, family: function(_array(values, 0), _array(values, 1))


def _softmax(operator: Operator, values: _Inputs, family: Family) -> Array:
    quant = _quant(operator.inputs[0])
    x = (_array(values, 0).astype(np.float64) - quant.zero) * quant.scale
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    steps = np.rint(powers / powers.sum(axis=-1, keepdims=True) / _quant(operator.outputs[0]).scale)
    return _saturated(steps.astype(np.int64), operator)


def _moved(function: Callable[[Operator, _Inputs], Array]) -> _Kernel:
    return lambda operator, values, family: function(operator, values)


def _pad(operator: Operator, values: _Inputs) -> Array:
    x, pairs = _array(values, 0), _array(values, 1)
    zero = 0 if operator.outputs[0].quant is None else operator.outputs[0].quant.zero
    filler = zero if len(values) < 3 else _array(values, 2).reshape(-1)[0]
    return np.pad(x, [(int(a), int(b)) for a, b in pairs], constant_values=filler)


def _slice(operator: Operator, values: _Inputs) -> Array:
    x, begin, size = (_array(values, i) for i in range(3))
    where = (slice(int(b), None if s == -1 else int(b + s)) for b, s in zip(begin, size, strict=True))
    return x[tuple(where)]


def _eight_bits(acc: Array, real: np.float32) -> Array:
    """XNNPACK's factors of one tensor have 8 bits behind the point: src/microparams-init.c, qs8 vcvt and vlrelu."""
    return (acc * int(np.rint(np.float32(256) * real)) + 128) >> 8


def _leaky_relu(operator: Operator, values: _Inputs, family: Family) -> Array:
    before, out = _quant(operator.inputs[0]), _quant(operator.outputs[0])
    acc = _array(values, 0).astype(np.int64) - before.zero
    alpha = np.float32(operator.options["alpha"])
    if family == "xnnpack":
        ratio = np.float32(before.scale) / np.float32(out.scale)
        return _saturated(np.where(acc >= 0, _eight_bits(acc, ratio), _eight_bits(acc, ratio * alpha)), operator)
    keep = np.float64(before.scale) / out.scale
    leak = np.float64(np.float32(before.scale)) * np.float64(alpha) / out.scale
    parts = (fixed_point.multiplied(acc, np.asarray(f)) for f in (keep, leak))
    return _saturated(np.where(acc >= 0, *parts), operator)


_KERNELS: Mapping[str, _Kernel] = {
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "FULLY_CONNECTED": _dense,
    "ADD": _sum_of_two,
    "SUB": _sum_of_two,
    "MUL": _product_of_two,
    "MEAN": _mean,
    "MAX_POOL_2D": _max_pool,
    "AVERAGE_POOL_2D": _average_pool,
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
    "LOGISTIC": _table(lambda x: 0.5 * (1.0 + np.tanh(0.5 * x))),
    "TANH": _table(np.tanh),
    "LEAKY_RELU": _leaky_relu,
    "SOFTMAX": _softmax,
    "MAXIMUM": _extreme(np.maximum),
    "MINIMUM": _extreme(np.minimum),
    "RESHAPE": _moved(lambda o, values: _array(values, 0).reshape([int(s) for s in _array(values, 1)])),
    "TRANSPOSE": _moved(lambda o, values: np.transpose(_array(values, 0), [int(a) for a in _array(values, 1)])),
    "CONCATENATION": _moved(lambda o, values: np.concatenate([v for v in values if v is not None], o.options["axis"])),
    "GATHER": _moved(lambda o, values: np.take(_array(values, 0), _array(values, 1), o.options["axis"])),
    "PAD": _moved(_pad),
    "PADV2": _moved(_pad),
    "SLICE": _moved(_slice),
}
