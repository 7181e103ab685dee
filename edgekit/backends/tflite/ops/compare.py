"""Comparisons, logic and selection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgekit.backends.tflite.emitter import Emitter
from edgekit.backends.tflite.ops.arithmetic import compute, finish
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.values import Node, Refused


def _compared(code: str) -> Callable[[Emitter, Node], None]:
    def run(e: Emitter, n: Node) -> None:
        out = n.outputs[0]
        layout, tensors = e.aligned([n.require(0), n.require(1)], out.rank)
        e.emit(out, code, tensors, layout)

    return run


def _not(e: Emitter, n: Node) -> None:
    x = n.require(0)
    layout = existing(e, x)
    e.emit(n.outputs[0], "LOGICAL_NOT", [e.tensor(x, layout)], layout)


def _where(e: Emitter, n: Node) -> None:
    out = n.outputs[0]
    layout, tensors = e.aligned([n.require(0), n.require(1), n.require(2)], out.rank)
    e.emit(out, "SELECT_V2", tensors, layout)


def _is_nan(e: Emitter, n: Node) -> None:
    x = n.require(0)
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    e.emit(n.outputs[0], "NOT_EQUAL", [tensor, tensor], layout)


def _is_inf(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    negative, positive = n.int("detect_negative", 1), n.int("detect_positive", 1)
    if not negative and not positive:
        raise Refused("it looks for no infinity", "replace it by a constant")
    if negative and positive:
        tensor = compute(e, "ABS", tensor)
    finish(e, out, compute(e, "EQUAL", tensor, np.inf if positive else -np.inf), layout)


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    "Equal": _compared("EQUAL"),
    "Less": _compared("LESS"),
    "LessOrEqual": _compared("LESS_EQUAL"),
    "Greater": _compared("GREATER"),
    "GreaterOrEqual": _compared("GREATER_EQUAL"),
    "And": _compared("LOGICAL_AND"),
    "Or": _compared("LOGICAL_OR"),
    "Xor": _compared("NOT_EQUAL"),
    "Not": _not,
    "Where": _where,
    "IsNaN": _is_nan,
    "IsInf": _is_inf,
}
