"""The grid of a weight matrix: a scale, and where it pays a zero point, per output channel or per group of its inputs.

The scale that reaches the largest weight is not the one with the least error: clipping a few weights buys a finer grid
for all others. Shrunken ranges are tried and the least squared error wins, as in GPTQ's code and in OMSE (Choukroun et
al. 2019, "Low-bit Quantization of Neural Networks for Efficient Inference"). Each input's error counts by the mean
square of what it is multiplied with, where that is known (the diagonal of the layer's Gram matrix).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# shares of the full range that are tried: of a GPT and an MLP none below .75 won at 4 bits in groups of 32, none below
# .975 at 8 bits per channel (benchmarks/weight_only.py)
SHRINK = tuple(float(r) for r in np.linspace(1.0, 0.7, 13))
_SLAB = 2**21  # elements looked at together
_SMALLEST = float(np.finfo(np.float32).tiny)  # a subnormal scale is 0 where kernels flush


@dataclass(frozen=True)
class Grid:
    """weight[k, n] ≈ (q[k, n] - zero[k // block, n]) · scale[k // block, n], q an integer in [low, high].

    scale: float32 (groups, outputs), > 0. zero: int8 (groups, outputs), or None for 0 everywhere.
    """

    scale: Array
    zero: Array | None
    block: int
    low: int
    high: int

    def scales(self, inputs: int) -> Array:
        """float64 (inputs, outputs)."""
        return _spread(self.scale.astype(np.float64), self.block, inputs)

    def zeros(self, inputs: int) -> Array:
        """float64 (inputs, outputs)."""
        zero = np.zeros(self.scale.shape) if self.zero is None else self.zero.astype(np.float64)
        return _spread(zero, self.block, inputs)

    def nearest(self, weight: Array) -> Array:
        """float64 of integers in [low, high], shaped like weight (inputs, outputs); ties to even."""
        inputs = len(weight)
        return np.asarray(np.clip(np.rint(weight / self.scales(inputs)) + self.zeros(inputs), self.low, self.high))

    def real(self, q: Array) -> Array:
        """float64 (inputs, outputs): what the integers stand for."""
        return np.asarray((q - self.zeros(len(q))) * self.scales(len(q)))


def limits(bits: int) -> tuple[int, int]:
    """4 bits: all 16 values, each counts. More: symmetric, as the one quantized form stores weights."""
    return (-8, 7) if bits == 4 else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def search(weight: Array, importance: Array | None, bits: int, block: int, *, asymmetric: bool) -> Grid:
    """The grid of least error. weight: float64 (inputs, outputs). importance: (inputs,), of each input's error.

    block: inputs that share a scale; the last group may be shorter.
    """
    inputs, outputs = weight.shape
    groups = -(-inputs // block)
    counts = np.zeros(groups * block)
    counts[:inputs] = 1.0 if importance is None else importance
    padded = np.zeros((groups * block, outputs))
    padded[:inputs] = weight
    low, high = limits(bits)
    scale, zero = np.empty((groups, outputs), np.float32), np.empty((groups, outputs), np.int8)
    for at in range(0, outputs, step := max(1, _SLAB // (groups * block))):
        part = padded[:, at : at + step].reshape(groups, block, -1)
        scale[:, at : at + step], zero[:, at : at + step] = _best(
            part, counts.reshape(groups, block, 1), low, high, asymmetric
        )
    return Grid(scale, zero if asymmetric else None, block, low, high)


def _best(part: Array, counts: Array, low: int, high: int, asymmetric: bool) -> tuple[Array, Array]:
    """part: (groups, block, outputs). Scale and zero point of each group and output."""
    most, least = part.max(axis=1), part.min(axis=1)
    if asymmetric:
        least, most = np.minimum(least, 0.0), np.maximum(most, 0.0)
        full = (most - least) / (high - low)
    else:
        full = np.maximum(most, -least) / high
    best = np.full(full.shape, np.inf)
    scale, zero = np.ones(full.shape), np.zeros(full.shape)
    for share in SHRINK:
        tried = np.where(full > 0, np.maximum(full * share, _SMALLEST), 1.0).astype(np.float32).astype(np.float64)
        offset = np.clip(np.rint(low - share * least / tried), low, high) if asymmetric else np.zeros_like(tried)
        q = np.clip(np.rint(part / tried[:, None]) + offset[:, None], low, high)
        error = (counts * ((q - offset[:, None]) * tried[:, None] - part) ** 2).sum(axis=1)
        better = error < best
        best, scale, zero = (
            np.where(better, error, best),
            np.where(better, tried, scale),
            np.where(better, offset, zero),
        )
    return scale, zero


def _spread(rows: Array, block: int, inputs: int) -> Array:
    return np.asarray(np.repeat(rows, block, axis=0)[:inputs])
