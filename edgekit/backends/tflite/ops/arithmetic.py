"""Arithmetic on tensors of one layout, for operators that LiteRT has only as a formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.graph import Layout, Tensor
from edgekit.backends.tflite.values import Value

Operand = Tensor | float
_FUSE = frozenset({"ADD", "SUB", "MUL", "DIV"})  # these have a field for an activation
_COMPARE = frozenset({"EQUAL", "NOT_EQUAL", "LESS", "LESS_EQUAL", "GREATER", "GREATER_EQUAL"})


def compute(e: Emitter, code: str, *operands: Operand, **options: Any) -> Tensor:
    """An operator with broadcasting; numbers take the type of the first tensor that is no condition."""
    tensors = [t for t in operands if isinstance(t, Tensor)]
    typed = tensors[1:] if code == "SELECT_V2" else tensors
    inputs = [t if isinstance(t, Tensor) else e.constant(np.array(t, typed[0].dtype)) for t in operands]
    shape = np.broadcast_shapes(*(t.shape for t in inputs))
    dynamic = {len(shape) - len(t.shape) + k for t in tensors for k in t.dynamic}
    if code in _FUSE:
        options["fusedActivationFunction"] = "NONE"
    dtype = np.bool_ if code in _COMPARE else typed[0].dtype
    return e.op(code, inputs, shape, dtype=dtype, dynamic=dynamic, **options)


def cast(e: Emitter, x: Tensor, dtype: Any) -> Tensor:
    """x in another type: towards zero from float, modulo 2^n between integers, whether it is not zero for bool."""
    wanted = np.dtype(dtype)
    if x.dtype == wanted:
        return x
    if x.data is not None:
        return e.constant(x.data.astype(wanted), x.name)
    types = {"inDataType": x.dtype.name.upper(), "outDataType": wanted.name.upper()}
    return e.op("CAST", [x], x.shape, dtype=wanted, dynamic=x.dynamic, **types)


def finish(e: Emitter, out: Value, tensor: Tensor, layout: Layout | None = None) -> None:
    """`tensor`, made for this alone, holds `out`."""
    made = any(tensor in operator.outputs for operator in e.graph.operators[-1:])
    if made:
        tensor.name = out.name
    e.define(out, tensor, identity(out.rank) if layout is None else layout)


# benchmarks/fit_log1p.py: atanh(s) = s · P(s²) for s ≤ 1/3, within 2.2e-7 of exact in float32
_ATANH_P = (1.0, 0.333331608, 0.200122976, 0.139825789, 0.140788892)


def log1p(e: Emitter, y: Tensor, *, bounded: bool = False) -> Tensor:
    """log(1 + y), y ≥ 0, to the last places also for small y. bounded: y ≤ 1.

    Below 1 it is 2·atanh(y / (2 + y)): XNNPACK's LOG is off by 1.2e-7 near 1, which is all of a small result.
    """
    ratio = compute(e, "DIV", y, compute(e, "ADD", y, 2.0))
    below = compute(e, "MUL", compute(e, "ADD", ratio, ratio), polynomial(e, compute(e, "MUL", ratio, ratio), _ATANH_P))
    if bounded:
        return below
    above = compute(e, "LOG", compute(e, "ADD", y, 1.0))
    return compute(e, "SELECT_V2", compute(e, "LESS", y, 1.0), below, above)


def polynomial(e: Emitter, x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Lowest power first; Horner's scheme."""
    total = compute(e, "ADD", compute(e, "MUL", x, coefficients[-1]), coefficients[-2])
    for c in coefficients[-3::-1]:
        total = compute(e, "ADD", compute(e, "MUL", total, x), c)
    return total
