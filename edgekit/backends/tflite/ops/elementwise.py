"""Arithmetic between tensors, and the activations that LiteRT has as operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.graph import Array, Layout, Quant, Tensor, per_tensor
from edgekit.backends.tflite.prepare import activation_of
from edgekit.backends.tflite.values import Node, Refused, Value
from edgekit.scheme import fixed_output

_NO_ACTIVATION = frozenset({"MAXIMUM", "MINIMUM"})


def _binary(code: str) -> Callable[[Emitter, Node], None]:
    """Two or more operands, broadcast; operators that compare pass on one of their operands and need one scale."""
    return functools.partial(_fold, code=code)


def _fold(e: Emitter, n: Node, code: str) -> None:
    out = n.outputs[0]
    values = [v for v in n.inputs if v is not None]
    if code in _NO_ACTIVATION and any(v.quant is not None and not v.quant.same(out.quant) for v in values):
        raise Refused("its scale differs between input and output", "quantize anew with edgekit")
    if len(values) == 1:
        return e.rename(out, values[0], identity(out.rank))
    if len(values) > 2 and out.quant is not None and code not in _NO_ACTIVATION:
        raise Refused("more than two quantized operands", "write it as a chain of two")
    layout, tensors = e.aligned(values, out.rank)
    result = tensors[0]
    for index, other in enumerate(tensors[1:], 1):
        last = index == len(tensors) - 1
        options: dict[str, Any] = {}
        if code not in _NO_ACTIVATION:
            options["fusedActivationFunction"] = n.activation if last else "NONE"
        if code in ("ADD", "SUB") and result.kind == "qint16":
            options["potScaleInt16"] = False
        if last:
            tensor = e.blank(out, layout)
            if _fuses(result, code, n.activation):
                e.write(code, [result, other], [tensor], **options)
            else:
                options["fusedActivationFunction"] = "NONE"
                plain = e.op(code, [result, other], tensor.shape, quant=tensor.quant, dynamic=tensor.dynamic, **options)
                e.write(n.activation, [plain], [tensor])
            e.define(out, tensor, layout)
        else:
            shape = np.broadcast_shapes(result.shape, other.shape)
            result = e.op(code, [result, other], shape, **options)


def _mean(e: Emitter, n: Node) -> None:
    """The sum of the operands, divided by their number."""
    out = n.outputs[0]
    values = [v for v in n.inputs if v is not None]
    layout, tensors = e.aligned(values, out.rank)
    total = tensors[0]
    for other in tensors[1:]:
        shape = np.broadcast_shapes(total.shape, other.shape)
        dynamic = {len(shape) - len(t.shape) + k for t in (total, other) for k in t.dynamic}
        total = e.op("ADD", [total, other], shape, dynamic=dynamic, fusedActivationFunction="NONE")
    count = e.constant(np.array(len(values), out.dtype))
    e.emit(out, "DIV", [total, count], layout, fusedActivationFunction="NONE")


def _fuses(x: Tensor, code: str, activation: str) -> bool:
    """LiteRT's integer arithmetic without a scale has no fused activation."""
    return activation == "NONE" or x.dtype == np.float32 or x.quant is not None or code in _NO_ACTIVATION


def _unary(code: str, **options: object) -> Callable[[Emitter, Node], None]:
    def run(e: Emitter, n: Node) -> None:
        x, out = n.require(0), n.outputs[0]
        _check_fixed(n, out)
        layout = existing(e, x)
        e.emit(out, code, [e.tensor(x, layout)], layout, **options)

    return run


def existing(e: Emitter, value: Value) -> Layout:
    """A layout that `value` has already."""
    return (e.layouts(value) or [identity(value.rank)])[0]


def _check_fixed(n: Node, out: Value) -> None:
    """Integer kernels of these write one scale, whatever the tensor says."""
    bits = 8 * out.dtype.itemsize
    wanted = fixed_output(bits).get(n.op)
    if wanted is None or out.quant is None:
        return
    if not np.isclose(out.quant.scale, wanted[0], rtol=1e-6) or out.quant.zero != wanted[1]:
        raise Refused(
            f"LiteRT's int{bits} {n.op} writes scale {wanted[0]:g} and zero point {wanted[1]}",
            "quantize anew with edgekit",
        )


def _hard_sigmoid(e: Emitter, n: Node) -> None:
    """clip(αx + β, 0, 1): in int8 the result's own range does the clipping, so MUL and ADD are all it takes."""
    x, out = n.require(0), n.outputs[0]
    alpha, beta = n.float("alpha", 0.2), n.float("beta", 0.5)
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    if out.quant is None:
        six = e.op("MUL", [tensor, e.constant(np.float32(6 * alpha))], **_like(tensor), fusedActivationFunction="NONE")
        clipped = e.op("ADD", [six, e.constant(np.float32(6 * beta))], **_like(tensor), fusedActivationFunction="RELU6")
        e.emit(out, "MUL", [clipped, e.constant(np.float32(1 / 6))], layout, fusedActivationFunction="NONE")
        return
    _check_unit(out.quant, out.dtype)
    e.define(out, _gate(e, tensor, alpha, beta, out.quant, out.name), layout)


def _hard_swish(e: Emitter, n: Node) -> None:
    """x · clip(x/6 + 1/2, 0, 1). XNNPACK has no int8 HARD_SWISH: three delegated operators are twice as fast.

    The gate is exact to half a step of 1/255, so the product is within one step of the exact result.
    """
    x, out = n.require(0), n.outputs[0]
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    if out.quant is None or tensor.dtype != np.int8:
        e.emit(out, "HARD_SWISH", [tensor], layout)
        return
    gate = _gate(e, tensor, 1 / 6, 0.5, per_tensor(1 / 255, -128), f"{out.name}/gate")
    e.emit(out, "MUL", [tensor, gate], layout, fusedActivationFunction="NONE")


def _gate(e: Emitter, x: Tensor, alpha: float, beta: float, quant: Quant, name: str) -> Tensor:
    """αx + β, clipped by the range of `quant`. The product keeps x's integers: its scale is α times x's."""
    assert x.quant is not None
    steps = 127
    factor = e.constant(np.array(steps, np.int8), quant=per_tensor(alpha / steps, 0))
    scaled = per_tensor(x.quant.scale * alpha, x.quant.zero)
    product = e.op("MUL", [x, factor], **{**_like(x), "quant": scaled}, fusedActivationFunction="NONE")
    addend = e.constant(np.array(steps, np.int8), quant=per_tensor(beta / steps, 0))
    return e.op("ADD", [product, addend], **{**_like(x), "quant": quant}, name=name, fusedActivationFunction="NONE")


def _like(x: Tensor) -> dict[str, Any]:
    return {"shape": x.shape, "dynamic": x.dynamic, "quant": x.quant}


def _check_unit(quant: Quant, dtype: np.dtype[Any]) -> None:
    """Refused unless the integers stand for numbers in [0, 1], give or take half a step."""
    info = np.iinfo(dtype)
    low, high = ((q - quant.zero) * quant.scale for q in (info.min, info.max))
    if low < -quant.scale / 2 or high > 1 + quant.scale / 2:
        raise Refused("its result's range is wider than [0, 1]", "quantize anew with edgekit")


def _relu(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    activation = activation_of(n)
    if out.quant is not None or activation is None or out.dtype != np.float32:
        return _clip(e, n)
    layout = existing(e, x)
    e.emit(out, activation, [e.tensor(x, layout)], layout)


def _clip(e: Emitter, n: Node) -> None:
    """MAXIMUM and MINIMUM with constants; on integers with one scale the bounds are integers too."""
    x, out = n.require(0), n.outputs[0]
    low, high = (np.array(0.0), None) if n.op == "Relu" else (n.const(1), n.const(2))
    if x.quant is not None and not x.quant.same(out.quant):
        kind = activation_of(n)
        if kind == "RELU6" and out.quant is not None and _highest(out) <= 6 + out.quant.scale / 2:
            kind = "RELU"  # the range does the rest, and TFLM's RELU6 forgets to rescale
        if kind is None:
            raise Refused("its scale differs between input and output", "quantize anew with edgekit")
        layout = existing(e, x)
        e.emit(out, kind, [e.tensor(x, layout)], layout)
        return
    layout = existing(e, x)
    bounds = [(code, _stored(b, x)) for code, b in (("MAXIMUM", low), ("MINIMUM", high)) if b is not None]
    bounds = [(code, b) for code, b in bounds if x.quant is None or not _never(code, b, x.dtype)]
    if not bounds:
        return e.rename(out, x, identity(x.rank))
    tensor = e.tensor(x, layout)
    for index, (code, bound) in enumerate(bounds):
        constant = e.constant(bound, quant=x.quant)
        if index == len(bounds) - 1:
            e.emit(out, code, [tensor, constant], layout)
        else:
            tensor = e.op(code, [tensor, constant], tensor.shape, quant=x.quant, dynamic=tensor.dynamic)


def _highest(value: Value) -> float:
    """The largest number that a quantized value can hold."""
    assert value.quant is not None
    return float((np.iinfo(value.dtype).max - value.quant.zero) * value.quant.scale)


def _stored(bound: Array, x: Value) -> Array:
    number = np.asarray(bound).reshape(-1)[0]
    if x.quant is None:
        return np.array(number, x.dtype)
    info = np.iinfo(x.dtype)
    return np.array(np.clip(np.rint(float(number) / x.quant.scale) + x.quant.zero, info.min, info.max), x.dtype)


def _never(code: str, bound: Array, dtype: np.dtype[Any]) -> bool:
    """Whether a stored bound clips no integer."""
    info = np.iinfo(dtype)
    return int(bound) == (info.min if code == "MAXIMUM" else info.max)


def _leaky_relu(e: Emitter, n: Node) -> None:
    x = n.require(0)
    layout = existing(e, x)
    e.emit(n.outputs[0], "LEAKY_RELU", [e.tensor(x, layout)], layout, alpha=n.float("alpha", 0.01))


def _elu(e: Emitter, n: Node) -> None:
    """LiteRT's ELU has alpha 1; another alpha scales what is below zero."""
    x, out, alpha = n.require(0), n.outputs[0], n.float("alpha", 1.0)
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    if alpha == 1.0:
        e.emit(out, "ELU", [tensor], layout)
        return
    same = _like(tensor)
    below = e.op("ELU", [e.op("MINIMUM", [tensor, e.constant(np.float32(0))], **same)], **same)
    scaled = e.op("MUL", [below, e.constant(np.float32(alpha))], **same, fusedActivationFunction="NONE")
    e.emit(out, "ADD", [e.op("RELU", [tensor], **same), scaled], layout, fusedActivationFunction="NONE")


def _prelu(e: Emitter, n: Node) -> None:
    x, slope, out = n.require(0), n.require(1), n.outputs[0]
    if slope.data is None:
        raise Refused("its slopes are computed", "make them constant")
    layout, (tensor, alpha) = e.aligned([x, slope], x.rank)
    if alpha.data is not None and len(alpha.shape) > 1 and alpha.shape[0] == 1:
        alpha = e.constant(alpha.data[0], alpha.name, alpha.quant)
    if len(alpha.shape) < x.rank - 1 and alpha.data is not None:  # XNNPACK and the kernel want [1, .., C]
        alpha = e.constant(
            alpha.data.reshape((1,) * (x.rank - 1 - alpha.data.ndim) + alpha.data.shape), alpha.name, alpha.quant
        )
    e.emit(out, "PRELU", [tensor, alpha], layout)


def _softmax(e: Emitter, n: Node) -> None:
    """LiteRT's works on the last axis in memory."""
    x, out = n.require(0), n.outputs[0]
    _check_fixed(n, out)
    axis = n.int("axis", -1) % max(x.rank, 1)
    if x.rank == 0:
        raise Refused("its input has no axes")
    layout = next((c for c in e.layouts(x) if c[-1] == axis), None)
    if layout is None:
        layout = (*(a for a in existing(e, x) if a != axis), axis)
    options = {"beta": 1.0} if n.op == "Softmax" else {}
    e.emit(out, "SOFTMAX" if n.op == "Softmax" else "LOG_SOFTMAX", [e.tensor(x, layout)], layout, **options)


def _batch_norm(e: Emitter, n: Node) -> None:
    """One factor and one addend per channel."""
    if n.int("training_mode", 0):
        raise Refused("it is in training mode", "export the model for inference")
    x, out = n.require(0), n.outputs[0]
    scale, shift, mean, variance = (np.asarray(n.const(i), np.float64) for i in (1, 2, 3, 4))
    factor = scale / np.sqrt(variance + n.float("epsilon", 1e-5))
    shape = (-1, *(1,) * (x.rank - 2)) if x.rank > 1 else (-1,)
    factors, addends = (_constant(a.reshape(shape), n.name) for a in (factor, shift - mean * factor))
    layout, (tensor, multiplier, addend) = e.aligned([x, factors, addends], x.rank)
    product = e.op("MUL", [tensor, multiplier], tensor.shape, dynamic=tensor.dynamic, fusedActivationFunction="NONE")
    e.emit(out, "ADD", [product, addend], layout, fusedActivationFunction="NONE")


def _constant(array: Array, name: str, quant: Quant | None = None) -> Value:
    data = np.asarray(array, np.float32)
    return Value(f"{name}/const", data.dtype, data.shape, data=data, quant=quant)


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    "Add": _binary("ADD"),
    "Sub": _binary("SUB"),
    "Mul": _binary("MUL"),
    "Div": _binary("DIV"),
    "Sum": _binary("ADD"),
    "Mean": _mean,
    "Max": _binary("MAXIMUM"),
    "Min": _binary("MINIMUM"),
    "Relu": _relu,
    "Clip": _relu,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Elu": _elu,
    "Sigmoid": _unary("LOGISTIC"),
    "Tanh": _unary("TANH"),
    "HardSwish": _hard_swish,
    "HardSigmoid": _hard_sigmoid,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "BatchNormalization": _batch_norm,
}
