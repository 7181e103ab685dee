"""Elementwise operators, softmax and reductions on exact values, in float64.

Only reached when an operand is exact (quantized, or computed from quantized values); float32 tensors take ONNX's own
reference implementation (fallback.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from edgekit.backends.reference.values import Array, Real, Value, real

Kernel = Callable[[ir.Node, list[Value]], list[Value]]


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))  # no overflow for any x


def _unary(function: Callable[[Array], Array]) -> Kernel:
    return lambda node, inputs: [Real(function(real(inputs[0])))]


def _variadic(function: Callable[[Array, Array], Array]) -> Kernel:
    def run(node: ir.Node, inputs: list[Value]) -> list[Value]:
        out = real(inputs[0])
        for other in inputs[1:]:
            out = function(out, real(other))
        return [Real(out)]

    return run


def _clip(node: ir.Node, inputs: list[Value]) -> list[Value]:
    low, high = ([*inputs[1:], None, None])[:2]
    x = real(inputs[0])
    x = x if low is None else np.maximum(x, real(low))
    return [Real(x if high is None else np.minimum(x, real(high)))]


def _leaky_relu(node: ir.Node, inputs: list[Value]) -> list[Value]:
    x = real(inputs[0])
    return [Real(np.where(x < 0, x * node.attributes.get_float("alpha", 0.01), x))]


def _prelu(node: ir.Node, inputs: list[Value]) -> list[Value]:
    x = real(inputs[0])
    return [Real(np.where(x < 0, x * real(inputs[1]), x))]


def _elu(node: ir.Node, inputs: list[Value]) -> list[Value]:
    x = real(inputs[0])
    return [Real(np.where(x < 0, node.attributes.get_float("alpha", 1.0) * np.expm1(np.minimum(x, 0)), x))]


def _hard_sigmoid(node: ir.Node, inputs: list[Value]) -> list[Value]:
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    return [Real(np.clip(alpha * real(inputs[0]) + beta, 0.0, 1.0))]


def _softmax(node: ir.Node, inputs: list[Value]) -> list[Value]:
    axis = node.attributes.get_int("axis", -1)
    x = real(inputs[0])
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return [Real(e / e.sum(axis=axis, keepdims=True))]


def _log_softmax(node: ir.Node, inputs: list[Value]) -> list[Value]:
    axis = node.attributes.get_int("axis", -1)
    x = real(inputs[0])
    x = x - x.max(axis=axis, keepdims=True)
    return [Real(x - np.log(np.exp(x).sum(axis=axis, keepdims=True)))]


def _batch_norm(node: ir.Node, inputs: list[Value]) -> list[Value]:
    x = real(inputs[0])
    scale, shift, mean, var = (real(v).reshape(1, -1, *(1,) * (x.ndim - 2)) for v in inputs[1:5])
    return [Real((x - mean) / np.sqrt(var + node.attributes.get_float("epsilon", 1e-5)) * scale + shift)]


def _reduce(function: Callable[..., Array]) -> Kernel:
    def run(node: ir.Node, inputs: list[Value]) -> list[Value]:
        x = real(inputs[0])
        given = inputs[1] if len(inputs) > 1 else None
        axes = tuple(int(a) for a in given) if isinstance(given, np.ndarray) else ()
        if not axes and node.attributes.get_int("noop_with_empty_axes", False):
            return [Real(x)]
        keep = bool(node.attributes.get_int("keepdims", 1))
        return [Real(np.asarray(function(x, axis=axes or None, keepdims=keep)))]

    return run


ELEMENTWISE: Mapping[str, Kernel] = {
    "Relu": _unary(lambda x: np.maximum(x, 0.0)),
    "Sigmoid": _unary(_sigmoid),
    "Tanh": _unary(np.tanh),
    "HardSwish": _unary(lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0)),
    "Softplus": _unary(lambda x: np.logaddexp(0.0, x)),
    "Softsign": _unary(lambda x: x / (1.0 + np.abs(x))),
    "Mish": _unary(lambda x: x * np.tanh(np.logaddexp(0.0, x))),
    "Abs": _unary(np.abs),
    "Neg": _unary(np.negative),
    "Exp": _unary(np.exp),
    "Clip": _clip,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Elu": _elu,
    "HardSigmoid": _hard_sigmoid,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "BatchNormalization": _batch_norm,
    "Add": _variadic(np.add),
    "Sub": _variadic(np.subtract),
    "Mul": _variadic(np.multiply),
    "Div": _variadic(np.divide),
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    "Sum": _variadic(np.add),
    "ReduceMean": _reduce(np.mean),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
}
