"""Arithmetic on tensors of one layout, for operators that LiteRT has only as a formula."""

from __future__ import annotations

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


def log1p(e: Emitter, y: Tensor) -> Tensor:
    """log(1 + y) to the last bits also for small y: Kahan's correction of the rounding in 1 + y."""
    u = compute(e, "ADD", y, 1.0)
    rounded = compute(e, "SUB", u, 1.0)
    corrected = compute(e, "MUL", compute(e, "LOG", u), compute(e, "DIV", y, rounded))
    small = compute(e, "SELECT_V2", compute(e, "EQUAL", rounded, 0.0), y, corrected)
    return compute(e, "SELECT_V2", compute(e, "LESS", y, 1.0), small, compute(e, "LOG", u))
