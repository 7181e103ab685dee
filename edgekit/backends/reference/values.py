"""What a tensor is while the reference runs: stored integers with their scale, an exact real, or plain float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Quantized:
    """The output of a DequantizeLinear: real = (q - zero) * scale.

    q: integers of any width and shape, in their stored dtype.
    scale: float64 holding float32 values; shape () or (q.shape[axis],). zero: int64 of the same shape.
    axis: the channel axis of a per-channel scale, None for one scale.
    """

    q: Array
    scale: Array
    zero: Array
    axis: int | None = None

    def spread(self, values: Array) -> Array:
        """`values` (one per channel, or a scalar) shaped to broadcast against q."""
        if self.axis is None:
            return values
        shape = [1] * self.q.ndim
        shape[self.axis] = -1
        return values.reshape(shape)

    def centred(self, dtype: type[np.floating[Any]] = np.float64) -> Array:
        """q - zero as floats; exact for integers below the dtype's mantissa (2**24 or 2**53)."""
        out = self.q.astype(dtype)
        if np.any(self.zero):
            out -= self.spread(self.zero).astype(dtype)
        return out

    def real(self) -> Array:
        """The value in float64: exact, because q - zero and scale together need less than 53 bits for q of up to 16."""
        out = self.centred()
        out *= self.spread(self.scale)
        return out

    def magnitude(self) -> int:
        """An upper bound of |q - zero| over every value the stored dtype can hold."""
        low, high = int_range(self.q.dtype)
        return max(high - int(np.min(self.zero)), int(np.max(self.zero)) - low)


@dataclass(frozen=True)
class Real:
    """The result of arithmetic on quantized values, not yet rounded: float64."""

    x: Array

    def real(self) -> Array:
        return self.x


Exact = Quantized | Real
Value = Array | Quantized | Real | None  # None is an optional input that is absent


def int_range(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Lowest and highest value of an integer dtype, 4-bit types included."""
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return int(info.min), int(info.max)
    import ml_dtypes

    small = ml_dtypes.iinfo(dtype)
    return int(small.min), int(small.max)


def is_exact(value: Value) -> bool:
    return isinstance(value, Quantized | Real)


def real(value: Value) -> Array:
    """The value in float64."""
    if isinstance(value, Quantized | Real):
        return value.real()
    assert value is not None
    return value.astype(np.float64)


def plain(value: Value) -> Array:
    """The value as ONNX declares it: exact values rounded once to float32, everything else unchanged."""
    if isinstance(value, Quantized | Real):
        return value.real().astype(np.float32)
    assert value is not None
    return value
