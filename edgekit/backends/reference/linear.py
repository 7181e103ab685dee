"""Conv, ConvTranspose, Gemm and MatMul: sums of products, exact on integers.

Integer operands are multiplied by floating-point BLAS: every partial sum is an integer below the mantissa (2**24 for
float32, 2**53 for float64), which a static bound on the weights proves, so no rounding can happen in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.backends.reference.values import Array, Quantized, Real, Value, is_exact, real
from edgekit.errors import ConversionMismatchError, UnsupportedOpError
from edgekit.windows import Window, pad_spatial, window

INT32_MAX = 2**31 - 1
INT48_MAX = 2**47 - 1  # what LiteRT's requantization of 64-bit sums takes (kernels/internal/common.h)
# |s_bias / (s_x * s_w) - 1| below which a bias counts as given in accumulator units: float32 rounding of a product
BIAS_SCALE_TOLERANCE = 2.0**-20
CHUNK_ELEMENTS = 2**21  # accumulator elements computed at a time: a few MB, so that they stay in the cache

Product = Callable[[Array, Array], Array]  # (x, w) -> sums of products, bilinear


@dataclass(frozen=True)
class Operands:
    """A product to compute. x, w: its operands. w_channel: the axis of w that is an output channel, or None.

    out_channel: the axis of the result that holds those channels. fan_in: sum of |w| per output, at most, or the count
    of products in a sum when w is an activation as well.
    """

    node: ir.Node
    x: Value
    w: Value
    w_channel: int | None
    out_channel: int
    bound: Callable[[Quantized, Quantized], int]


def accumulate(op: Operands, product: Product, bias: Value, factor: float = 1.0, bias_factor: float = 1.0) -> Value:
    """factor * product(x, w) + bias_factor * bias. Exact operands give Real, float32 ones float32 rounded once."""
    x, w = op.x, op.w
    if isinstance(x, Quantized) and isinstance(w, Quantized) and x.axis is None and w.axis in (None, op.w_channel):
        return _integer(op, x, w, product, bias, factor, bias_factor)
    out = product(real(x), real(w)) * factor
    if bias is not None:
        out += _bias(real(bias), out.ndim, op.out_channel) * bias_factor
    return Real(out) if is_exact(x) or is_exact(w) else out.astype(_dtype(x))


def _integer(
    op: Operands, x: Quantized, w: Quantized, product: Product, bias: Value, factor: float, bias_factor: float
) -> Real:
    bound = op.bound(x, w)
    if bound >= 2**53:
        raise UnsupportedOpError(f"{op.node.op_type} '{op.node.name}' may sum up to {bound}", "keep it in float")
    dtype: type[np.floating[Any]] = np.float32 if bound < 2**24 else np.float64
    acc = product(x.centred(dtype), w.centred(dtype)).astype(np.float64, copy=False)
    multiplier = x.scale * w.scale * factor
    counted = isinstance(bias, Quantized) and factor == bias_factor == 1.0 and _same_scale(bias, multiplier)
    if isinstance(bias, Quantized) and counted:
        acc += _bias(bias.centred(), acc.ndim, op.out_channel)
    if acc.size:
        peak = int(max(acc.max(), -acc.min()))
        most, accumulator = (INT48_MAX, "int64") if x.q.dtype == np.int16 else (INT32_MAX, "int32")
        if peak > most:
            told = f"the {accumulator} accumulator of {op.node.op_type} '{op.node.name}' reaches {peak}"
            raise ConversionMismatchError(
                f"{told} and wraps in real kernels",
                "raise its weight scale or keep it in float",
            )
    acc *= _bias(multiplier, acc.ndim, op.out_channel)
    if bias is not None and not counted:
        acc += _bias(real(bias), acc.ndim, op.out_channel) * bias_factor
    return Real(acc)


def _same_scale(bias: Quantized, multiplier: Array) -> bool:
    if bias.scale.ndim and bias.scale.shape != multiplier.shape and multiplier.ndim:
        return False
    return bool(np.all(np.abs(bias.scale - multiplier) <= BIAS_SCALE_TOLERANCE * multiplier))


def _bias(values: Array, rank: int, axis: int) -> Array:
    """One value per channel shaped for the result; a scalar, or a Gemm's C, broadcasts as it is."""
    if values.ndim != 1:
        return values
    shape = [1] * rank
    shape[axis % rank] = -1
    return values.reshape(shape)


def _dtype(value: Value) -> np.dtype[Any]:
    return value.dtype if isinstance(value, np.ndarray) else np.dtype(np.float32)


def _weight_bound(channel: int) -> Callable[[Quantized, Quantized], int]:
    """max|x - zero| * max over output channels of the sum of |w - zero|."""

    def bound(x: Quantized, w: Quantized) -> int:
        weights = np.abs(w.centred())
        axes = tuple(a for a in range(weights.ndim) if a != channel)
        return int(weights.sum(axis=axes).max(initial=0.0)) * x.magnitude()

    return bound


# --- convolutions ----------------------------------------------------------------------------------
def conv(node: ir.Node, inputs: list[Value]) -> list[Value]:
    x, w = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    group = node.attributes.get_int("group", 1)

    def product(xs: Array, ws: Array) -> Array:
        win = window(node, ws.shape[2:], xs.shape[2:])
        return _in_chunks(
            xs, ws.shape[0] * int(np.prod(win.out(xs.shape[2:]))), lambda part: _conv(part, ws, win, group)
        )

    return [accumulate(Operands(node, x, w, 0, 1, _weight_bound(0)), product, bias)]


def _in_chunks(x: Array, elements: int, compute: Callable[[Array], Array]) -> Array:
    """`compute` over slices of the batch, `elements` being what one sample gives."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements))
    if len(x) <= step:
        return compute(x)
    return np.concatenate([compute(x[i : i + step]) for i in range(0, len(x), step)])


def _conv(x: Array, w: Array, win: Window, group: int) -> Array:
    """x (n, c, *size), w (m, c / group, *kernel) -> (n, m, *out): one matrix product per kernel position."""
    out = win.out(x.shape[2:])
    n, m, per = len(x), w.shape[0], w.shape[1]
    x = pad_spatial(x, win.begins, win.ends)
    weights = w.reshape(group, m // group, per, *w.shape[2:])
    acc = np.zeros((n, group, m // group, int(np.prod(out))), np.result_type(x, w))
    for tap, where in win.taps(out):
        seen = x[(slice(None), slice(None), *where)].reshape(n, group, per, -1)
        tap_weights = weights[_at(tap)]
        acc += tap_weights * seen if per == 1 else np.matmul(tap_weights, seen)
    return acc.reshape(n, m, *out)


def _at(spatial: tuple[Any, ...]) -> tuple[Any, ...]:
    """An index into arrays of three leading axes and the spatial ones."""
    return (slice(None), slice(None), slice(None), *spatial)


def conv_transpose(node: ir.Node, inputs: list[Value]) -> list[Value]:
    x, w = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    group = node.attributes.get_int("group", 1)

    def product(xs: Array, ws: Array) -> Array:
        elements = ws.shape[1] * group * int(np.prod(xs.shape[2:])) * int(np.prod(ws.shape[2:]))
        return _in_chunks(xs, elements, lambda part: _conv_transpose(node, part, ws, group))

    def bound(a: Quantized, b: Quantized) -> int:
        # an output sums over the input channels and, at most, every kernel position
        return int(np.abs(b.centred()).sum(axis=(0, *range(2, b.q.ndim))).max(initial=0.0)) * a.magnitude()

    # with groups one weight channel (axis 1) feeds `group` output channels: its scales then repeat
    if isinstance(w, Quantized) and w.axis == 1 and group > 1:
        w = _spread_groups(w, group)
        return [accumulate(Operands(node, x, w, None, 1, bound), product, bias)]
    return [accumulate(Operands(node, x, w, 1, 1, bound), product, bias)]


def _spread_groups(w: Quantized, group: int) -> Value:
    """Per-channel scales that are all equal collapse to one; others leave the integer path."""
    if np.all(w.scale == w.scale[0]) and np.all(w.zero == w.zero[0]):
        return Quantized(w.q, w.scale[0], w.zero[0])
    return Real(w.real())


def _conv_transpose(node: ir.Node, x: Array, w: Array, group: int) -> Array:
    """x (n, c, *size), w (c, m / group, *kernel) -> (n, m, *out)."""
    n, c, size = len(x), x.shape[1], x.shape[2:]
    per, rank = w.shape[1], w.ndim - 2
    strides = tuple(node.attributes.get_ints("strides", ()) or (1,) * rank)
    dilations = tuple(node.attributes.get_ints("dilations", ()) or (1,) * rank)
    extra = tuple(node.attributes.get_ints("output_padding", ()) or (0,) * rank)
    full = tuple((size[a] - 1) * strides[a] + (w.shape[2 + a] - 1) * dilations[a] + 1 + extra[a] for a in range(rank))
    acc = np.zeros((n, group, per, *full), np.result_type(x, w))
    flat = x.reshape(n, group, c // group, -1)
    weights = np.swapaxes(w.reshape(group, c // group, per, *w.shape[2:]), 1, 2)
    spread = Window(w.shape[2:], strides, dilations, (0,) * rank, (0,) * rank)
    for tap, where in spread.taps(size):
        acc[_at(where)] += np.matmul(weights[_at(tap)], flat).reshape(n, group, per, *size)
    begins, ends = _transpose_pads(node, size, full, strides)
    return pad_spatial(acc.reshape(n, group * per, *full), tuple(-b for b in begins), tuple(-e for e in ends))


def _transpose_pads(
    node: ir.Node, size: tuple[int, ...], full: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How much of the full result is cropped at each end of every spatial axis."""
    rank = len(size)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    shape = tuple(node.attributes.get_ints("output_shape", ()))
    pads = list(node.attributes.get_ints("pads", ()) or (0,) * (2 * rank))
    if not shape and auto not in ("SAME_UPPER", "SAME_LOWER"):
        return tuple(pads[:rank]), tuple(pads[rank:])
    wanted = shape[-rank:] if shape else tuple(n * s for n, s in zip(size, strides, strict=True))
    total = [f - o for f, o in zip(full, wanted, strict=True)]
    first = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total]
    return tuple(first), tuple(t - f for t, f in zip(total, first, strict=True))


# --- matrix products -------------------------------------------------------------------------------
def gemm(node: ir.Node, inputs: list[Value]) -> list[Value]:
    a, b = inputs[0], inputs[1]
    c = inputs[2] if len(inputs) > 2 else None
    flip_a, flip_b = node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0)
    channel = 0 if flip_b else 1

    def product(x: Array, w: Array) -> Array:
        out: Array = np.matmul(x.T if flip_a else x, w.T if flip_b else w)
        return out

    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    return [accumulate(Operands(node, a, b, channel, 1, _weight_bound(channel)), product, c, alpha, beta)]


def matmul(node: ir.Node, inputs: list[Value]) -> list[Value]:
    """The second operand's last axis is the output channel; both may be activations."""
    a, b = inputs[0], inputs[1]
    channel = np.ndim(b.q) - 1 if isinstance(b, Quantized) and b.q.ndim > 1 else None

    def bound(x: Quantized, w: Quantized) -> int:
        terms = w.q.shape[0] if w.q.ndim == 1 else w.q.shape[-2]
        return int(terms) * x.magnitude() * w.magnitude()

    return [accumulate(Operands(node, a, b, channel, -1, bound), np.matmul, None)]
