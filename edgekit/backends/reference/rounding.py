"""QuantizeLinear and DequantizeLinear: where reals become integers and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.backends.reference.values import Array, Quantized, Real, Value, int_range
from edgekit.errors import NonFiniteError, UnsupportedOpError


def quantize(node: ir.Node, inputs: list[Value]) -> Array:
    """saturate(rint(x / scale) + zero), rint to the even neighbour.

    Exact values are divided in float64. A float32 tensor (a model input, or the end of a float island) is divided in
    float32, which is what ONNX defines for it.
    """
    x, scale = inputs[0], _scale(node, inputs)
    zero = inputs[2] if len(inputs) > 2 else None
    dtype = zero.dtype if isinstance(zero, np.ndarray) else _output_dtype(node)
    if isinstance(x, Quantized | Real):
        steps = x.real()
        divisor = scale.astype(np.float64)
    else:
        assert isinstance(x, np.ndarray)
        divisor = scale
        steps = x.astype(scale.dtype) if np.issubdtype(x.dtype, np.integer) else x
    channels = _channels(node, scale, steps.ndim)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.asarray(np.rint(steps / divisor.reshape(channels)), np.float64)  # numpy makes scalars of rank 0
    if np.isnan(steps).any():
        raise NonFiniteError(f"QuantizeLinear '{node.name}' was given NaN", "check the weights and the input data")
    if isinstance(zero, np.ndarray):
        steps += zero.astype(np.float64).reshape(channels)
    low, high = int_range(dtype)
    out: Array = np.clip(steps, low, high, out=steps).astype(dtype)
    return out


def dequantize(node: ir.Node, inputs: list[Value]) -> Quantized:
    """The integers with their scale and zero point; nothing is computed yet."""
    q, scale = inputs[0], _scale(node, inputs)
    assert isinstance(q, np.ndarray)
    zero = inputs[2] if len(inputs) > 2 else None
    zeros = np.zeros(scale.shape, np.int64) if zero is None else np.asarray(zero).astype(np.int64)
    axis = None
    if scale.size > 1:
        axis = _axis(node, q.ndim)
    else:
        scale, zeros = scale.reshape(()), zeros.reshape(())
    return Quantized(q, scale.astype(np.float64), zeros.reshape(scale.shape), axis)


def _scale(node: ir.Node, inputs: list[Value]) -> Array:
    scale = inputs[1]
    assert isinstance(scale, np.ndarray)
    if scale.dtype != np.float32 or scale.ndim > 1 or node.attributes.get_int("block_size", 0):
        raise UnsupportedOpError(
            f"{node.op_type} '{node.name}' has a {scale.dtype} scale of shape {scale.shape}",
            "the reference takes float32 scales, one per tensor or one per channel",
        )
    return scale


def _channels(node: ir.Node, scale: Array, rank: int) -> tuple[int, ...]:
    if scale.size == 1:
        return (1,) * rank
    shape = [1] * rank
    shape[_axis(node, rank)] = scale.size
    return tuple(shape)


def _axis(node: ir.Node, rank: int) -> int:
    axis: int = node.attributes.get_int("axis", 1)
    return axis % rank


def _output_dtype(node: ir.Node) -> np.dtype[Any]:
    code = node.attributes.get_int("output_dtype", 0) or onnx.TensorProto.UINT8
    dtype: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code))
    return dtype
