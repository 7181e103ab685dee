"""Operators on types that LiteRT's kernels do not take: computed in a wider type and cast back, which is exact.

Sums, products and differences of integers modulo 2^n are those of wider integers, cut off; comparisons, extremes and
moves keep the value; a float32 result rounded to float16 once is what ONNX asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.ops.arithmetic import cast
from edgekit.backends.tflite.values import Node, Refused, Value

WIDER: Mapping[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(narrow): np.dtype(wide)
    for narrow, wide in (
        ("float16", "float32"),
        ("int8", "int32"),
        ("uint8", "int32"),
        ("int16", "int32"),
        ("uint16", "int32"),
        ("uint32", "int64"),
    )
}
# their result depends on the type itself: its range, its rounding or its bits
_TYPED = frozenset({"Cast", "CastLike", "BitCast", "QuantizeLinear", "DequantizeLinear", "Resize", "AveragePool"})


def lower_in_some_type(e: Emitter, node: Node, lowering: Callable[[Emitter, Node], None]) -> None:
    """The node as it is, or else in a wider type. Raises the first refusal if both are refused."""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    if node.op in _TYPED or not any(v.dtype in WIDER for v in values):
        return lowering(e, node)
    undo = e.checkpoint()
    try:
        lowering(e, node)
    except Refused as refused:
        undo()
        try:
            _widened(e, node, lowering)
        except Refused:
            undo()
            raise refused from None


def _widened(e: Emitter, node: Node, lowering: Callable[[Emitter, Node], None]) -> None:
    twins: dict[Value, Value] = {}
    for value in node.inputs:
        if value is not None and value.dtype in WIDER and value not in twins:
            twins[value] = _input(e, value)
    for value in node.outputs:
        if value.dtype in WIDER:
            twins[value] = Value(f"{value.name}_wide", WIDER[value.dtype], value.shape, value.dynamic)
    inputs = [None if v is None else twins.get(v, v) for v in node.inputs]
    outputs = [twins.get(v, v) for v in node.outputs]
    lowering(e, Node(node.op, node.name, inputs, outputs, node.attributes, node.activation, node.extra))
    for value in node.outputs:
        if value.name and value in twins:
            _narrowed(e, twins[value], value)


def _input(e: Emitter, value: Value) -> Value:
    """`value` in the wider type, in a layout that it has."""
    wide = Value(f"{value.name}_wide", WIDER[value.dtype], value.shape, value.dynamic)
    if value.data is not None:
        wide.data = value.data.astype(wide.dtype)
        return wide
    layout = (e.layouts(value) or [identity(value.rank)])[0]
    e.define(wide, cast(e, e.tensor(value, layout), wide.dtype), layout)
    return wide


def _narrowed(e: Emitter, wide: Value, value: Value) -> None:
    if not e.layouts(wide):
        return  # an optional output that nobody wants
    layout = e.layouts(wide)[0]
    tensor = cast(e, e.tensor(wide, layout), value.dtype)
    tensor.name = value.name
    e.define(value, tensor, layout)
