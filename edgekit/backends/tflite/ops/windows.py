"""Padding of sliding windows: what is LiteRT's SAME or VALID, and what needs a PAD of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.backends.tflite.emitter import Emitter
from edgekit.backends.tflite.graph import Tensor
from edgekit.backends.tflite.values import Node, Refused


@dataclass(frozen=True)
class Window:
    """A sliding window over the spatial axes. begin, end: padding; ends may be extended by ceil_mode."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    def padding(self, sizes: Sequence[int]) -> str | None:
        """'VALID', 'SAME', or None if it is neither, for an input of these spatial sizes."""
        if not any(self.begin) and not any(self.end):
            return "VALID"
        for size, k, s, d, begin, end in zip(
            sizes, self.kernel, self.strides, self.dilations, self.begin, self.end, strict=True
        ):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            if (begin, end) != (total // 2, total - total // 2):
                return None
        return "SAME"


def window(n: Node, kernel: Sequence[int], sizes: Sequence[int]) -> Window:
    """Of a Conv or pool node over spatial `sizes`."""
    rank = len(kernel)
    strides = n.ints("strides", (1,) * rank)
    dilations = n.ints("dilations", (1,) * rank)
    auto = n.str("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
        ]
        low = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in totals]
        return Window(
            tuple(kernel), strides, dilations, tuple(low), tuple(t - x for t, x in zip(totals, low, strict=True))
        )
    pads = n.ints("pads", (0,) * 2 * rank) if auto != "VALID" else (0,) * 2 * rank
    begin, end = pads[:rank], list(pads[rank:])
    if n.int("ceil_mode", 0):
        for a in range(rank):
            span = sizes[a] + begin[a] + end[a] - ((kernel[a] - 1) * dilations[a] + 1)
            steps = -(-span // strides[a])
            if steps * strides[a] >= sizes[a] + begin[a]:  # a window may not start in the padding behind the data
                steps -= 1
            end[a] += max(0, steps * strides[a] - span)
    return Window(tuple(kernel), strides, dilations, tuple(begin), tuple(end))


def cropped(e: Emitter, x: Tensor, w: Window) -> tuple[Tensor, Window]:
    """Negative padding is a crop: `x` (batch, spatial..., channels) without it, and the window without it."""
    if min((*w.begin, *w.end), default=0) >= 0:
        return x, w
    cut = [max(0, -b) for b in w.begin]
    size = [s - c - max(0, -t) for s, c, t in zip(x.shape[1:-1], cut, w.end, strict=True)]
    if min(size) <= 0:
        raise Refused("its padding crops the whole input")
    shape = (x.shape[0], *size, x.shape[-1])
    begin = e.constant(np.array([0, *cut, 0], np.int32))
    length = e.constant(np.array([-1, *size, -1], np.int32))
    out = e.op("SLICE", [x, begin, length], shape, quant=x.quant)
    positive = Window(
        w.kernel, w.strides, w.dilations, tuple(max(0, b) for b in w.begin), tuple(max(0, t) for t in w.end)
    )
    return out, positive


def padded(e: Emitter, x: Tensor, w: Window, value: float | None = None) -> Tensor:
    """`x` (batch, spatial..., channels) with its padding written out: zeros, or `value` (as stored)."""
    pairs = [(0, 0), *zip(w.begin, w.end, strict=True), (0, 0)]
    shape = [size + a + b for size, (a, b) in zip(x.shape, pairs, strict=True)]
    amounts = e.constant(np.array(pairs, np.int32))
    if value is None:
        return e.op("PAD", [x, amounts], shape, quant=x.quant)
    filler = (
        e.constant(np.array(value, x.dtype), quant=x.quant)
        if x.quant is not None
        else e.constant(np.array(value, x.dtype))
    )
    return e.op("PADV2", [x, amounts, filler], shape, quant=x.quant)
