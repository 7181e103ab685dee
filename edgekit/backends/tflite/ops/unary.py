"""Functions of one tensor, element by element, and powers, remainders and casts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.graph import Layout, Tensor
from edgekit.backends.tflite.ops.arithmetic import cast, compute, finish, log1p, polynomial
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.ops.reduce import magnitude
from edgekit.backends.tflite.values import Node, Refused, Value

Formula = Callable[[Emitter, Tensor, Node], Tensor]

# benchmarks/fit_erf.py: erf(x) = x · P(x²) / Q(x²), within 3.5e-7 of exact in float32
_ERF_LIMIT = 3.92
_ERF_P = (1.12837915, 0.190407406, 0.052748852, 0.00376565819, 0.000284883777, 2.05008168e-06)
_ERF_Q = (1.0, 0.502076911, 0.114109504, 0.0149692995, 0.00116254572, 3.80917123e-05)
_MISH_ONE = 20.0  # tanh(softplus(20)) is 1 - 8e-18


def _in_layout(formula: Formula) -> Callable[[Emitter, Node], None]:
    """A lowering that applies `formula` in whatever layout the input has."""

    def run(e: Emitter, n: Node) -> None:
        x = n.require(0)
        layout = existing(e, x)
        finish(e, n.outputs[0], formula(e, e.tensor(x, layout), n), layout)

    return run


def _one(code: str) -> Formula:
    return lambda e, x, n: compute(e, code, x)


def _abs(e: Emitter, n: Node) -> None:
    x = n.require(0)
    if x.dtype.kind == "u":
        return e.rename(n.outputs[0], x, identity(x.rank))
    _in_layout(lambda e, t, n: magnitude(e, t))(e, n)


def _reciprocal(e: Emitter, x: Tensor, n: Node) -> Tensor:
    return _over(e, 1.0, x)


def _over(e: Emitter, number: float, x: Tensor) -> Tensor:
    return compute(e, "DIV", e.constant(np.array(number, x.dtype)), x)


def _sign(e: Emitter, x: Tensor, n: Node) -> Tensor:
    if x.dtype.kind == "f":
        return compute(e, "SIGN", x)
    above, below = (cast(e, compute(e, code, x, 0), x.dtype) for code in ("GREATER", "LESS"))
    return compute(e, "SUB", above, below)


# --- trigonometry --------------------------------------------------------------------------------------------
def _tan(e: Emitter, x: Tensor, n: Node) -> Tensor:
    return compute(e, "DIV", compute(e, "SIN", x), compute(e, "COS", x))


def _cosh(e: Emitter, x: Tensor, n: Node | None = None) -> Tensor:
    """h²/2 + 1/(2h²) with h = exp(|x|/2), which overflows only where the result does."""
    h = compute(e, "EXP", compute(e, "MUL", compute(e, "ABS", x), 0.5))
    half = compute(e, "MUL", h, 0.5)
    return compute(e, "ADD", compute(e, "MUL", half, h), compute(e, "DIV", _over(e, 0.5, h), h))


def _sinh(e: Emitter, x: Tensor, n: Node) -> Tensor:
    """tanh · cosh: a difference of powers would cancel near 0."""
    return compute(e, "MUL", compute(e, "TANH", x), _cosh(e, x))


def _other_side(e: Emitter, x: Tensor) -> Tensor:
    """sqrt(1 - x²), as a product that keeps its digits near 1."""
    product = compute(e, "MUL", _from_one(e, x), compute(e, "ADD", x, 1.0))
    return compute(e, "SQRT", product)


def _from_one(e: Emitter, x: Tensor) -> Tensor:
    return compute(e, "SUB", e.constant(np.array(1, x.dtype)), x)


def _asin(e: Emitter, x: Tensor, n: Node) -> Tensor:
    return compute(e, "ATAN2", x, _other_side(e, x))


def _acos(e: Emitter, x: Tensor, n: Node) -> Tensor:
    return compute(e, "ATAN2", _other_side(e, x), x)


def _atan(e: Emitter, x: Tensor, n: Node) -> Tensor:
    ones = compute(e, "ADD", compute(e, "MUL", x, 0.0), 1.0)  # ATAN2 broadcasts nothing
    at_infinity = compute(e, "MUL", compute(e, "SIGN", x), math.pi / 2)
    finite = compute(e, "LESS", compute(e, "ABS", x), math.inf)
    return compute(e, "SELECT_V2", finite, compute(e, "ATAN2", x, ones), at_infinity)


def _asinh(e: Emitter, x: Tensor, n: Node) -> Tensor:
    """log1p(|x| + |x| · |x|/(1 + sqrt(1 + x²))); the last factor is 1 long before x² overflows."""
    size = compute(e, "ABS", x)
    bounded = compute(e, "MINIMUM", size, 1e9)
    root = compute(e, "SQRT", compute(e, "ADD", compute(e, "MUL", bounded, bounded), 1.0))
    factor = compute(e, "DIV", bounded, compute(e, "ADD", root, 1.0))
    result = log1p(e, compute(e, "ADD", size, compute(e, "MUL", size, factor)))
    return compute(e, "MUL", compute(e, "SIGN", x), result)


def _acosh(e: Emitter, x: Tensor, n: Node) -> Tensor:
    """log1p(t + sqrt(t) · sqrt(t + 2)) with t = x - 1."""
    t = compute(e, "SUB", x, 1.0)
    roots = compute(e, "MUL", compute(e, "SQRT", t), compute(e, "SQRT", compute(e, "ADD", t, 2.0)))
    return log1p(e, compute(e, "ADD", t, roots))


def _atanh(e: Emitter, x: Tensor, n: Node) -> Tensor:
    size = compute(e, "ABS", x)
    ratio = compute(e, "DIV", compute(e, "MUL", size, 2.0), _from_one(e, size))
    half = compute(e, "MUL", log1p(e, ratio), 0.5)
    return compute(e, "MUL", compute(e, "SIGN", x), half)


def _erf(e: Emitter, x: Tensor, n: Node) -> Tensor:
    x = compute(e, "MINIMUM", compute(e, "MAXIMUM", x, -_ERF_LIMIT), _ERF_LIMIT)
    square = compute(e, "MUL", x, x)
    above, below = polynomial(e, square, _ERF_P), polynomial(e, square, _ERF_Q)
    return compute(e, "DIV", compute(e, "MUL", x, above), below)


# --- activations ---------------------------------------------------------------------------------------------
def _gelu(e: Emitter, n: Node) -> None:
    x, layout = n.require(0), existing(e, n.require(0))
    approximate = n.str("approximate", "none") == "tanh"
    e.emit(n.outputs[0], "GELU", [e.tensor(x, layout)], layout, approximate=approximate)


def _softplus(e: Emitter, x: Tensor, n: Node) -> Tensor:
    """max(x, 0) + log1p(exp(-|x|)): no overflow."""
    tail = log1p(e, compute(e, "EXP", compute(e, "NEG", compute(e, "ABS", x))), bounded=True)
    return compute(e, "ADD", compute(e, "RELU", x), tail)


def _softsign(e: Emitter, x: Tensor, n: Node) -> Tensor:
    return compute(e, "DIV", x, compute(e, "ADD", compute(e, "ABS", x), 1.0))


def _mish(e: Emitter, x: Tensor, n: Node) -> Tensor:
    """x · w(w + 2) / (w(w + 2) + 2) with w = exp(x): tanh and log written out, nothing cancels."""
    w = compute(e, "EXP", compute(e, "MINIMUM", x, _MISH_ONE))
    above = compute(e, "MUL", w, compute(e, "ADD", w, 2.0))
    return compute(e, "MUL", x, compute(e, "DIV", above, compute(e, "ADD", above, 2.0)))


def _scaled_elu(e: Emitter, x: Tensor, slope: float, alpha: float, width: float) -> Tensor:
    """slope · x above 0, alpha · (exp(x / width) - 1) below."""
    above = compute(e, "RELU", x)
    above = above if slope == 1 else compute(e, "MUL", above, slope)
    below = compute(e, "MINIMUM", x, 0.0)
    below = compute(e, "ELU", below if width == 1 else compute(e, "MUL", below, 1 / width))
    return compute(e, "ADD", above, below if alpha == 1 else compute(e, "MUL", below, alpha))


def _selu(e: Emitter, x: Tensor, n: Node) -> Tensor:
    alpha, gamma = n.float("alpha", 1.6732632423543772), n.float("gamma", 1.0507009873554805)
    return _scaled_elu(e, x, gamma, gamma * alpha, 1)


def _celu(e: Emitter, x: Tensor, n: Node) -> Tensor:
    alpha = n.float("alpha", 1.0)
    if alpha <= 0:
        raise Refused(f"its alpha is {alpha:g}", "use a positive one")
    return _scaled_elu(e, x, 1, alpha, alpha)


def _thresholded(e: Emitter, x: Tensor, n: Node) -> Tensor:
    alpha = n.float("alpha", 1.0)
    if alpha == 0:
        return compute(e, "RELU", x)
    return compute(e, "SELECT_V2", compute(e, "GREATER", x, alpha), x, 0)


def _shrink(e: Emitter, x: Tensor, n: Node) -> Tensor:
    bias, limit = n.float("bias", 0.0), n.float("lambd", 0.5)
    if x.dtype.kind != "f":
        raise Refused(f"Shrink of {x.dtype}", "cast it to float32 in the model")
    below = compute(e, "SELECT_V2", compute(e, "LESS", x, -limit), compute(e, "ADD", x, bias), 0)
    return compute(e, "SELECT_V2", compute(e, "GREATER", x, limit), compute(e, "SUB", x, bias), below)


def _swish(e: Emitter, x: Tensor, n: Node) -> Tensor:
    alpha = n.float("alpha", 1.0)
    inner = x if alpha == 1 else compute(e, "MUL", x, alpha)
    return compute(e, "MUL", x, compute(e, "LOGISTIC", inner))


def _hardmax(e: Emitter, n: Node) -> None:
    """1 at the first largest element along the axis."""
    x, out = n.require(0), n.outputs[0]
    axis = n.int("axis", -1) % max(x.rank, 1)
    layout: Layout = (*(a for a in existing(e, x) if a != axis), axis)
    tensor = e.tensor(x, layout)
    if axis in x.dynamic:
        raise Refused("it works along the batch", "fix the batch: --shape INPUT=1,...")
    place = e.op(
        "ARG_MAX", [tensor, e.constant(np.array(x.rank - 1, np.int32))], tensor.shape[:-1], dtype=np.int32,
        dynamic=tensor.dynamic, outputType="INT32",
    )  # fmt: skip
    on, off = (e.constant(np.array(v, out.dtype)) for v in (1, 0))
    e.emit(out, "ONE_HOT", [place, e.constant(np.array(x.shape[axis], np.int32)), on, off], layout, axis=-1)


# --- powers and remainders -----------------------------------------------------------------------------------
def _pow(e: Emitter, n: Node) -> None:
    base, exponent, out = n.require(0), n.require(1), n.outputs[0]
    layout, (x, power) = e.aligned([base, exponent], out.rank)
    if base.dtype.kind == "f":
        number = float(power.data.reshape(-1)[0]) if power.data is not None and power.data.size == 1 else None
        if number in _POWERS and base.shape == out.shape:
            return finish(e, out, _POWERS[number](e, x), layout)
        return finish(e, out, compute(e, "POW", x, cast(e, power, x.dtype)), layout)
    if power.data is None or not np.equal(np.mod(power.data, 1), 0).all() or power.data.min(initial=0) < 0:
        raise Refused(
            "an integer to a power that is computed, negative or no integer", "cast it to float32 in the model"
        )
    if base.dtype == np.int64 and power.data.size == 1:
        return finish(e, out, _repeated(e, x, int(power.data.reshape(-1)[0]), out), layout)
    finish(e, out, compute(e, "POW", x, cast(e, power, x.dtype)), layout)


# common constant exponents, in operators that XNNPACK takes
_POWERS: dict[float | None, Callable[[Emitter, Tensor], Tensor]] = {
    2.0: lambda e, x: compute(e, "MUL", x, x),
    3.0: lambda e, x: compute(e, "MUL", compute(e, "MUL", x, x), x),
    0.5: lambda e, x: compute(e, "SQRT", x),
    -0.5: lambda e, x: _over(e, 1.0, compute(e, "SQRT", x)),
    -1.0: lambda e, x: _over(e, 1.0, x),
}


def _repeated(e: Emitter, x: Tensor, times: int, out: Value) -> Tensor:
    """x^times by squaring, modulo 2^64 as ONNX's."""
    if times == 0 or times > 64 or len(x.shape) != out.rank:
        raise Refused(f"int64 to the power of {times}", "cast it to float32 in the model")
    result, square = None, x
    while times:
        if times & 1:
            result = square if result is None else compute(e, "MUL", result, square)
        times >>= 1
        square = compute(e, "MUL", square, square) if times else square
    assert result is not None
    return result


def _mod(e: Emitter, n: Node) -> None:
    """FLOOR_MOD has the divisor's sign, as ONNX's integers have; fmod the dividend's."""
    out = n.outputs[0]
    layout, (x, divisor) = e.aligned([n.require(0), n.require(1)], out.rank)
    if divisor.data is not None and not divisor.data.all() and divisor.dtype.kind != "f":
        raise Refused("it divides by zero")
    if not n.int("fmod", 0):
        return finish(e, out, compute(e, "FLOOR_MOD", x, divisor), layout)
    rest = compute(e, "FLOOR_MOD", magnitude(e, x), magnitude(e, divisor))
    finish(e, out, compute(e, "SELECT_V2", compute(e, "LESS", x, 0), compute(e, "NEG", rest), rest), layout)


# --- types ---------------------------------------------------------------------------------------------------
_CASTS = frozenset(
    {"float32", "float16", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "bool"}
)
_NARROW = frozenset({"int8", "uint8", "int16", "uint16"})


def _cast(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    for dtype in (x.dtype, out.dtype):
        if dtype.name not in _CASTS:
            raise Refused(f"LiteRT's CAST takes no {dtype}", "use float32 or int32 in the model")
    if x.dtype == out.dtype:
        return e.rename(out, x, identity(x.rank))
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    if x.dtype.kind == "f" and out.dtype.name in _NARROW:  # beyond the type LiteRT saturates, ONNX Runtime wraps
        tensor = cast(e, tensor, np.int32)
    finish(e, out, cast(e, tensor, out.dtype), layout)


def _bit_not(e: Emitter, x: Tensor, n: Node) -> Tensor:
    if x.dtype.kind != "i":
        raise Refused(f"BitwiseNot of {x.dtype}", "use a signed type")
    return compute(e, "SUB", e.constant(np.array(-1, x.dtype)), x)


_DIRECT = {"Neg": "NEG", "Exp": "EXP", "Log": "LOG", "Sqrt": "SQRT", "Sin": "SIN", "Cos": "COS"}
_DIRECT |= {"Floor": "FLOOR", "Ceil": "CEIL", "Round": "ROUND"}
_FORMULAS: dict[str, Formula] = {
    **{op: _one(code) for op, code in _DIRECT.items()},
    "Reciprocal": _reciprocal,
    "Sign": _sign,
    "Tan": _tan,
    "Sinh": _sinh,
    "Cosh": _cosh,
    "Asin": _asin,
    "Acos": _acos,
    "Atan": _atan,
    "Asinh": _asinh,
    "Acosh": _acosh,
    "Atanh": _atanh,
    "Erf": _erf,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Mish": _mish,
    "Selu": _selu,
    "Celu": _celu,
    "ThresholdedRelu": _thresholded,
    "Shrink": _shrink,
    "Swish": _swish,
    "BitwiseNot": _bit_not,
}
LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    **{op: _in_layout(formula) for op, formula in _FORMULAS.items()},
    "Abs": _abs,
    "Gelu": _gelu,
    "Hardmax": _hardmax,
    "Pow": _pow,
    "Mod": _mod,
    "Cast": _cast,
    "CastLike": _cast,
}
