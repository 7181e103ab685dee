"""gemmlowp's fixed-point arithmetic, as LiteRT's reference kernels use it: a 31-bit factor and two roundings.

Sources: tensorflow/lite/kernels/internal/{common.h, quantization_util.cc}, gemmlowp/fixedpoint/fixedpoint.h.
"""

from __future__ import annotations

import math

import numpy as np

from edgekit.backends.tflite.graph import Array

_ADD_SHIFT = 20  # bits that int8 ADD and SUB are shifted left by before they are scaled


def factor(real: float) -> tuple[int, int]:
    """(31-bit integer, exponent): real = integer · 2^(exponent − 31). QuantizeMultiplier."""
    if real == 0:
        return 0, 0
    mantissa, exponent = math.frexp(real)
    integer = math.floor(mantissa * 2**31 + 0.5)
    if integer == 2**31:
        integer, exponent = integer // 2, exponent + 1
    return (0, 0) if exponent < -31 else (integer, exponent)


def multiplied(acc: Array, factors: Array) -> Array:
    """int64 sums times real factors (one, or one per last axis): MultiplyByQuantizedMultiplier with double rounding."""
    pairs = [factor(float(f)) for f in np.atleast_1d(factors)]
    integers, exponents = (np.array(part, np.int64) for part in zip(*pairs, strict=True))
    return scaled(acc, integers, exponents)


def scaled(acc: Array, integers: Array, exponents: Array) -> Array:
    """acc · integers · 2^(exponents − 31)."""
    left, right = np.maximum(exponents, 0), np.maximum(-exponents, 0)
    return divided_by_power(high_product(acc.astype(np.int64) << left, integers), right)


def rounded_once(acc: Array, factors: Array) -> Array:
    """The same product with one rounding, halves away from zero: what LiteRT 2's FULLY_CONNECTED does."""
    pairs = [factor(float(f)) for f in np.atleast_1d(factors)]
    integers, exponents = (np.array(part, np.int64) for part in zip(*pairs, strict=True))
    product, bits = acc.astype(np.int64) * integers, 31 - exponents
    size = (np.abs(product) + (np.int64(1) << (bits - 1))) >> bits
    result: Array = np.where(product < 0, -size, size)
    return result


def high_product(a: Array, b: Array) -> Array:
    """SaturatingRoundingDoublingHighMul: the upper 32 bits of 2ab, halves away from zero in its own way."""
    product = a * b
    nudged = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    quotient = np.abs(nudged) >> 31  # C++ divides towards zero
    result: Array = np.where(nudged < 0, -quotient, quotient)
    return result


def divided_by_power(x: Array, exponent: Array) -> Array:
    """RoundingDivideByPOT: x / 2^exponent, halves away from zero."""
    mask = (np.int64(1) << exponent) - 1
    rest = x & mask
    threshold = (mask >> 1) + (x < 0)
    result: Array = (x >> exponent) + (rest > threshold)
    return result


def averaged(total: Array, count: int, real: float) -> Array:
    """Sums of `count` integers times real / count: the count goes into the 31-bit factor. QuantizedMeanOrSum."""
    integer, exponent = factor(real)
    shift = min(count.bit_length() - 1, 32, 31 + exponent)
    integer, exponent = (integer << shift) // count, exponent - shift
    return scaled(total, np.array(integer), np.array(exponent))


def added(a: Array, b: Array, first: float, second: float, out: float, sign: int) -> Array:
    """int8 ADD and SUB: both operands on twice the larger scale with 20 more bits, then scaled once more."""
    twice = 2.0 * max(first, second)
    left = multiplied(a << _ADD_SHIFT, np.asarray(first / twice))
    right = multiplied(b << _ADD_SHIFT, np.asarray(second / twice))
    return multiplied(left + sign * right, np.asarray(twice / ((1 << _ADD_SHIFT) * out)))
