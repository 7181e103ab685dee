"""Comparisons, logic, and the choice between two tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgekit.backends.tflite.emitter import Emitter
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.values import Node, Refused

_WIDENED = {np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.int16)}


def _binary(code: str) -> Callable[[Emitter, Node], None]:
    def run(e: Emitter, n: Node) -> None:
        out = n.outputs[0]
        layout, (a, b) = e.aligned([n.require(0), n.require(1)], out.rank)
        if a.dtype in _WIDENED:
            a, b = (
                e.op(
                    "CAST",
                    [t],
                    t.shape,
                    dtype=np.int32,
                    dynamic=t.dynamic,
                    inDataType=_name(t.dtype),
                    outDataType="INT32",
                )
                for t in (a, b)
            )
        e.emit(out, code, [a, b], layout)

    return run


def _name(dtype: np.dtype[np.generic]) -> str:
    return dtype.name.upper()


def _xor(e: Emitter, n: Node) -> None:
    out = n.outputs[0]
    layout, (a, b) = e.aligned([n.require(0), n.require(1)], out.rank)
    e.emit(out, "NOT_EQUAL", [a, b], layout)


def _not(e: Emitter, n: Node) -> None:
    x = n.require(0)
    layout = existing(e, x)
    e.emit(n.outputs[0], "LOGICAL_NOT", [e.tensor(x, layout)], layout)


def _where(e: Emitter, n: Node) -> None:
    out = n.outputs[0]
    layout, (condition, a, b) = e.aligned([n.require(0), n.require(1), n.require(2)], out.rank)
    if max(len(t.shape) for t in (condition, a, b)) > 5:
        raise Refused("it chooses between tensors of more than 5 axes", "LiteRT chooses in up to 5")
    e.emit(out, "SELECT_V2", [condition, a, b], layout)


def _is_nan(e: Emitter, n: Node) -> None:
    x = n.require(0)
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    e.emit(n.outputs[0], "NOT_EQUAL", [tensor, tensor], layout)


def _is_inf(e: Emitter, n: Node) -> None:
    x, up, down = n.require(0), n.int("detect_positive", 1), n.int("detect_negative", 1)
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    if not up and not down:
        raise Refused("it looks for no infinity")
    if up and down:
        tensor = e.op("ABS", [tensor], tensor.shape, dynamic=tensor.dynamic)
    limit = np.float32(np.inf if up else -np.inf)
    e.emit(n.outputs[0], "EQUAL", [tensor, e.constant(limit)], layout)


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    "Equal": _binary("EQUAL"),
    "Less": _binary("LESS"),
    "LessOrEqual": _binary("LESS_EQUAL"),
    "Greater": _binary("GREATER"),
    "GreaterOrEqual": _binary("GREATER_EQUAL"),
    "And": _binary("LOGICAL_AND"),
    "Or": _binary("LOGICAL_OR"),
    "Xor": _xor,
    "Not": _not,
    "Where": _where,
    "IsNaN": _is_nan,
    "IsInf": _is_inf,
}
