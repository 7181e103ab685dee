"""Functions of one tensor: LiteRT's own, and those that a few of its operators make up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgekit.backends.tflite.emitter import Emitter
from edgekit.backends.tflite.graph import Layout, Tensor
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.values import Node, Refused

_Step = Callable[["_Chain", Node], Tensor]


class _Chain:
    """Short names for operators between tensors of one shape."""

    def __init__(self, e: Emitter, x: Tensor) -> None:
        self.e, self.x = e, x

    def __call__(self, code: str, *inputs: Tensor | float, dtype: Any = None, **options: Any) -> Tensor:
        """An operator whose result has the shape of x; numbers become constants of x's type."""
        tensors = [t if isinstance(t, Tensor) else self.e.constant(np.array(t, self.x.dtype)) for t in inputs]
        if code in ("ADD", "SUB", "MUL", "DIV"):
            options.setdefault("fusedActivationFunction", "NONE")
        return self.e.op(code, tensors, self.x.shape, dtype=dtype, dynamic=self.x.dynamic, **options)


def _made(step: _Step) -> Callable[[Emitter, Node], None]:
    """A lowering out of a function of the chain."""

    def run(e: Emitter, n: Node) -> None:
        x, out = n.require(0), n.outputs[0]
        layout = existing(e, x)
        result = step(_Chain(e, e.tensor(x, layout)), n)
        result.name = out.name
        e.define(out, result, layout)

    return run


def _own(code: str, **options: Any) -> Callable[[Emitter, Node], None]:
    def run(e: Emitter, n: Node) -> None:
        x = n.require(0)
        layout: Layout = existing(e, x)
        e.emit(n.outputs[0], code, [e.tensor(x, layout)], layout, **options)

    return run


# LiteRT's Python names of the schema's types
_TYPES = {
    "float32": "FLOAT32", "float16": "FLOAT16", "int8": "INT8", "uint8": "UINT8", "int16": "INT16", "int32": "INT32",
    "int64": "INT64", "bool": "BOOL", "uint32": "UINT32",
}  # fmt: skip
_WRAPS = frozenset({"int8", "uint8", "int16"})


def cast(e: Emitter, tensor: Tensor, dtype: Any) -> Tensor:
    """CAST to another type; the tensor itself if it has it."""
    wanted = np.dtype(dtype)
    if tensor.dtype == wanted:
        return tensor
    if wanted.name not in _TYPES or tensor.dtype.name not in _TYPES:
        raise Refused(f"a cast from {tensor.dtype} to {wanted}", "LiteRT has no such type")
    return e.op(
        "CAST", [tensor], tensor.shape, dtype=wanted, dynamic=tensor.dynamic,
        inDataType=_TYPES[tensor.dtype.name], outDataType=_TYPES[wanted.name],
    )  # fmt: skip


def _cast(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    if out.dtype == np.bool_ and x.dtype == np.float32:  # LiteRT's would cut 0.5 to 0 first
        e.emit(out, "NOT_EQUAL", [tensor, e.constant(np.float32(0))], layout)
        return
    if x.dtype == np.float32 and out.dtype.name in _WRAPS:
        tensor = cast(e, tensor, np.int32)  # beyond the small type, ONNX leaves the result open
    result = cast(e, tensor, out.dtype)
    e.define(out, result, layout)


def _erf(c: _Chain, n: Node) -> Tensor:
    """From the exact GELU: gelu(y) = y (1 + erf(y/√2)) / 2, so erf(x) = 2·gelu(√2·x) / (√2·x) − 1.

    Near 0, where that divides by next to nothing, 2/√π · (x − x³/3 + x⁵/10); |x| < 0.05 leaves 1e-9.
    """
    root = np.sqrt(2.0)
    scaled = c("MUL", c.x, root)
    small = c("LESS", c("ABS", c.x), 0.05, dtype=np.bool_)
    safe = c(
        "SELECT_V2", small, c.e.constant(np.ones((1,) * max(len(c.x.shape), 1), np.float32)), scaled, dtype=np.float32
    )
    far = c("SUB", c("DIV", c("MUL", c("GELU", safe, approximate=False), 2.0), safe), 1.0)
    square = c("MUL", c.x, c.x)
    inner = c("ADD", c("MUL", c("SUB", c("MUL", square, 0.1), 1 / 3), square), 1.0)
    near = c("MUL", c("MUL", c.x, inner), 2 / np.sqrt(np.pi))
    return c("SELECT_V2", small, near, far, dtype=np.float32)


def _softplus(c: _Chain, n: Node) -> Tensor:
    """max(x, 0) + log(1 + exp(−|x|)): no exponent overflows."""
    tail = c("LOG", c("ADD", c("EXP", c("NEG", c("ABS", c.x))), 1.0))
    return c("ADD", c("RELU", c.x), tail)


def _swish(c: _Chain, n: Node) -> Tensor:
    alpha = n.float("alpha", 1.0)
    return c("MUL", c.x, c("LOGISTIC", c.x if alpha == 1.0 else c("MUL", c.x, alpha)))


def _scaled_elu(alpha: float, gamma: float) -> _Step:
    def step(c: _Chain, n: Node) -> Tensor:
        below = c("MUL", c("SUB", c("EXP", c("MINIMUM", c.x, 0.0)), 1.0), n.float("alpha", alpha))
        whole = c("ADD", c("RELU", c.x), below)
        factor = n.float("gamma", gamma)
        return whole if factor == 1.0 else c("MUL", whole, factor)

    return step


def _celu(c: _Chain, n: Node) -> Tensor:
    alpha = n.float("alpha", 1.0)
    below = c("SUB", c("EXP", c("MUL", c("MINIMUM", c.x, 0.0), 1 / alpha)), 1.0)
    return c("ADD", c("RELU", c.x), c("MUL", below, alpha))


def _thresholded(c: _Chain, n: Node) -> Tensor:
    zero = c.e.constant(np.zeros((1,) * max(len(c.x.shape), 1), np.float32))
    return c("SELECT_V2", c("GREATER", c.x, n.float("alpha", 1.0), dtype=np.bool_), c.x, zero, dtype=np.float32)


def _shrink(c: _Chain, n: Node) -> Tensor:
    bias, limit = n.float("bias", 0.0), n.float("lambd", 0.5)
    zero = c.e.constant(np.zeros((1,) * max(len(c.x.shape), 1), np.float32))
    low = c("SELECT_V2", c("LESS", c.x, -limit, dtype=np.bool_), c("ADD", c.x, bias), zero, dtype=np.float32)
    return c("SELECT_V2", c("GREATER", c.x, limit, dtype=np.bool_), c("SUB", c.x, bias), low, dtype=np.float32)


def _hyperbolic(sign: str) -> _Step:
    def step(c: _Chain, n: Node) -> Tensor:
        return c("MUL", c(sign, c("EXP", c.x), c("EXP", c("NEG", c.x))), 0.5)

    return step


def _gelu(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    layout = existing(e, x)
    e.emit(out, "GELU", [e.tensor(x, layout)], layout, approximate=n.str("approximate", "none") == "tanh")


def _power(e: Emitter, n: Node) -> None:
    """x^y with the common constant exponents in operators that XNNPACK takes."""
    x, y, out = n.require(0), n.require(1), n.outputs[0]
    exponent = float(y.data.reshape(-1)[0]) if y.data is not None and y.data.size == 1 else None
    if x.dtype == np.float32 and exponent in _POWERS and y.rank <= x.rank and x.shape == out.shape:
        return _made(_POWERS[exponent])(e, n)
    if x.dtype != y.dtype:
        raise Refused(f"{x.dtype} to the power of {y.dtype}", "cast both to float32")
    layout, (a, b) = e.aligned([x, y], out.rank)
    e.emit(out, "POW", [a, b], layout)


_POWERS: dict[float, _Step] = {
    2.0: lambda c, n: c("MUL", c.x, c.x),
    3.0: lambda c, n: c("MUL", c("MUL", c.x, c.x), c.x),
    0.5: lambda c, n: c("SQRT", c.x),
    -0.5: lambda c, n: c("RSQRT", c.x),
    -1.0: lambda c, n: c("DIV", 1.0, c.x),
    1.0: lambda c, n: c.x,
}


def _modulo(e: Emitter, n: Node) -> None:
    a, b, out = n.require(0), n.require(1), n.outputs[0]
    if n.int("fmod", 0):
        raise Refused("a remainder with the sign of the dividend", "LiteRT's has the divisor's")
    layout, tensors = e.aligned([a, b], out.rank)
    e.emit(out, "FLOOR_MOD", tensors, layout)


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    "Abs": _own("ABS"),
    "Neg": _own("NEG"),
    "Exp": _own("EXP"),
    "Log": _own("LOG"),
    "Sqrt": _own("SQRT"),
    "Sin": _own("SIN"),
    "Cos": _own("COS"),
    "Floor": _own("FLOOR"),
    "Ceil": _own("CEIL"),
    "Round": _own("ROUND"),
    "Sign": _own("SIGN"),
    "Gelu": _gelu,
    "Cast": _cast,
    "Pow": _power,
    "Mod": _modulo,
    "Reciprocal": _made(lambda c, n: c("DIV", 1.0, c.x)),
    "Tan": _made(lambda c, n: c("DIV", c("SIN", c.x), c("COS", c.x))),
    "Sinh": _made(_hyperbolic("SUB")),
    "Cosh": _made(_hyperbolic("ADD")),
    "Erf": _made(_erf),
    "Softplus": _made(_softplus),
    "Softsign": _made(lambda c, n: c("DIV", c.x, c("ADD", c("ABS", c.x), 1.0))),
    "Mish": _made(lambda c, n: c("MUL", c.x, c("TANH", _softplus(c, n)))),
    "Swish": _made(_swish),
    "Selu": _made(_scaled_elu(1.67326319217681884765625, 1.05070102214813232421875)),
    "Celu": _made(_celu),
    "ThresholdedRelu": _made(_thresholded),
    "Shrink": _made(_shrink),
}
