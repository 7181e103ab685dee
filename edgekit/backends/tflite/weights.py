"""Smaller weights for a float graph: float16, int8 that is dequantized once, or int8 that kernels compute with.

Every constant matrix or kernel of a convolution or dense layer shrinks; biases and other constants stay float32.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from edgekit.backends.tflite.graph import Array, Graph, Operator, Quant, Tensor

Way = Literal["float16", "int8-weights", "int8-dynamic"]

# operator -> (index of its weights, axis of the output channels)
_WEIGHTED = {
    "CONV_2D": (1, 0),
    "DEPTHWISE_CONV_2D": (1, 3),
    "FULLY_CONNECTED": (1, 0),
    "TRANSPOSE_CONV": (1, 0),
    "CONV_3D": (1, 4),
}
# LiteRT computes these with int8 weights and float32 activations, which it quantizes per row as it goes
_DYNAMIC = frozenset({"CONV_2D", "FULLY_CONNECTED"})
_LEAST = 1024  # elements: below this the scales and the extra operator cost more than is saved
_LARGEST = {"float16": 65504.0}


def shrink(graph: Graph, way: Way) -> list[str]:
    """In place. Returns a note per layer that stays float32 against expectation."""
    made: dict[Tensor, Tensor] = {}
    operators: list[Operator] = []
    notes: list[str] = []
    for operator in graph.operators:
        index, axis = _WEIGHTED.get(operator.code, (0, 0))
        weight = operator.inputs[index] if operator.code in _WEIGHTED else None
        if weight is None or weight.data is None or weight.dtype != np.float32 or weight.data.size < _LEAST:
            operators.append(operator)
            continue
        if way == "float16" and float(np.abs(weight.data).max(initial=0)) > _LARGEST[way]:
            notes.append(f"{operator.source}: weights beyond float16's largest number stay float32")
            operators.append(operator)
            continue
        dynamic = way == "int8-dynamic" and operator.code in _DYNAMIC
        if weight not in made:
            made[weight], extra = _smaller(weight, way, axis, operator, dynamic)
            operators += extra
        operator.inputs[index] = made[weight]
        if dynamic and operator.code == "FULLY_CONNECTED":
            operator.options = {**operator.options, "asymmetricQuantizeInputs": False}
        operators.append(operator)
    graph.operators[:] = operators
    return notes


def _smaller(weight: Tensor, way: Way, axis: int, operator: Operator, dynamic: bool) -> tuple[Tensor, list[Operator]]:
    """(what the operator reads, the DEQUANTIZE before it if there is one)."""
    assert weight.data is not None
    if way == "float16":
        data, quant = weight.data.astype(np.float16), None
    else:
        data, quant = quantized(weight.data, axis)
    stored = Tensor(weight.name, data.dtype, weight.shape, frozenset(), quant, data)
    if dynamic:
        return stored, []
    real = Tensor(f"{weight.name}/float32", weight.dtype, weight.shape)
    return real, [Operator("DEQUANTIZE", [stored], [real], {}, operator.source)]


def quantized(weight: Array, axis: int) -> tuple[Array, Quant]:
    """int8 in [-127, 127] and a scale per slice of `axis`: symmetric min-max, ties to even."""
    rest = tuple(a for a in range(weight.ndim) if a != axis)
    largest = np.abs(weight).max(axis=rest, initial=0)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
    data = np.clip(np.rint(weight / scales.reshape(shape)), -127, 127).astype(np.int8)
    return data, Quant(scales, np.zeros(len(scales), np.int64), axis)
