"""Reads quantizers of an ONNX model as power-of-two grids: exponents, integer ranges, stored constants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.backends.fpga.net import limits
from edgekit.errors import UnsupportedOpError
from edgekit.passes import fold_graph as G

Array = np.ndarray[Any, Any]

CONVERT = "quantize it by the fpga scheme: `edgekit convert` for a target with an FPGA does"
# type of the stored integers -> (bits, what is subtracted for two's complement)
_TYPES = {"int8": (8, 0), "uint8": (8, 128), "int4": (4, 0), "uint4": (4, 8)}


def refuse(node: ir.Node, why: str, remedy: str) -> UnsupportedOpError:
    return UnsupportedOpError(f"{node.op_type} '{node.name}' cannot become integers of an FPGA: {why}", remedy)


@dataclass(frozen=True)
class Grid:
    """exponents: one, or one per channel of `axis`. bits: of the type that integers are stored in."""

    exponents: tuple[int, ...]
    bits: int
    axis: int


@dataclass(frozen=True)
class Stored:
    """A constant: integers · 2^-exponents; int64, in the layout of the model."""

    integers: Array
    grid: Grid


def grid(node: ir.Node) -> Grid:
    """Of a QuantizeLinear or DequantizeLinear. Raises UnsupportedOpError unless it is symmetric, of powers of two."""
    scales = M.constant(node.inputs[1])
    zero = M.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if scales is None or G.integer(node, "block_size", 0):
        raise refuse(node, "its scale is computed, or one per block", CONVERT)
    exponents = []
    for scale in np.atleast_1d(scales).astype(np.float64).ravel():
        mantissa, power = math.frexp(float(scale))
        if mantissa != 0.5:
            raise refuse(node, f"the scale {scale:.9g} is no power of two", CONVERT)
        exponents.append(1 - power)
    named = ir.DataType.UINT8 if zero is None else ir.DataType.from_numpy(zero.dtype)
    if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].dtype is not None:
        named = node.inputs[0].dtype
    kind = named.name.lower()
    if kind == "int32" and node.op_type == "DequantizeLinear" and not np.any(zero if zero is not None else 0):
        return Grid(tuple(exponents), 32, G.integer(node, "axis", 1))
    if kind not in _TYPES:
        raise refuse(node, f"integers of type {kind}", CONVERT)
    bits, offset = _TYPES[kind]
    zeros = np.zeros(1, np.int64) if zero is None else zero.astype(np.int64)
    if np.any(zeros != offset):
        raise refuse(node, f"the zero point {int(zeros.ravel()[0])} of {kind} is not {offset}", CONVERT)
    return Grid(tuple(exponents), bits, G.integer(node, "axis", 1))


def stored(value: ir.Value | None) -> Stored | None:
    """The integers behind a DequantizeLinear of a constant, None for anything else."""
    reader = value.producer() if value is not None else None
    if reader is None or reader.op_type != "DequantizeLinear":
        return None
    array = M.constant(reader.inputs[0])
    if array is None:
        return None
    found = grid(reader)
    kind = reader.inputs[0].dtype.name.lower() if reader.inputs[0].dtype is not None else ""  # type: ignore[union-attr]
    offset = _TYPES[kind][1] if kind in _TYPES else 0
    return Stored(array.astype(np.int64) - offset, found)


def bits_of(low: int, high: int) -> int:
    """The fewest bits, at least 2, whose range holds both."""
    bits = 2
    while not limits(bits)[0] <= low <= high <= limits(bits)[1]:
        bits += 1
    return bits


def nearest(real: float, exponent: int) -> int | None:
    """real · 2^exponent rounded half up; None for an infinity."""
    return math.floor(math.ldexp(real, exponent) + 0.5) if math.isfinite(real) else None
