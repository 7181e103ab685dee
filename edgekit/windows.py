"""Geometry of sliding windows, as ONNX defines it: which input positions an output of a convolution or pool sees."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Window:
    """Geometry of a sliding window, one entry per spatial axis. `ends` may differ from `begins` (SAME padding)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    def extent(self, axis: int) -> int:
        """Input positions that one window spans."""
        return (self.kernel[axis] - 1) * self.dilations[axis] + 1

    def out(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Output size, rounded down."""
        return tuple(
            (n + self.begins[a] + self.ends[a] - self.extent(a)) // self.strides[a] + 1 for a, n in enumerate(size)
        )

    def taps(self, out: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Every kernel position, with the slice of the padded input that it meets for all outputs."""
        for tap in itertools.product(*(range(k) for k in self.kernel)):
            starts = [t * d for t, d in zip(tap, self.dilations, strict=True)]
            yield (
                tap,
                tuple(slice(b, b + (o - 1) * s + 1, s) for b, o, s in zip(starts, out, self.strides, strict=True)),
            )


def window(node: ir.Node, kernel: tuple[int, ...], size: tuple[int, ...]) -> Window:
    """The node's window over an input of spatial `size`, auto_pad resolved."""
    rank = len(kernel)
    strides = tuple(node.attributes.get_ints("strides", ()) or (1,) * rank)
    dilations = tuple(node.attributes.get_ints("dilations", ()) or (1,) * rank)
    pads = list(node.attributes.get_ints("pads", ()) or (0,) * (2 * rank))
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto == "VALID":
        pads = [0] * (2 * rank)
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        for a in range(rank):
            extent = (kernel[a] - 1) * dilations[a] + 1
            total = max(0, (-(-size[a] // strides[a]) - 1) * strides[a] + extent - size[a])
            small, large = total // 2, total - total // 2
            pads[a], pads[a + rank] = (small, large) if auto == "SAME_UPPER" else (large, small)
    return Window(kernel, strides, dilations, tuple(pads[:rank]), tuple(pads[rank:]))


def pad_spatial(x: Array, begins: tuple[int, ...], ends: tuple[int, ...], value: float = 0) -> Array:
    """x of (n, c, *size) padded with `value`; negative amounts crop."""
    if not any(begins) and not any(ends):
        return x
    low, high = [max(0, b) for b in begins], [max(0, e) for e in ends]
    out = np.pad(x, [(0, 0), (0, 0), *zip(low, high, strict=True)], constant_values=value)
    crop = [slice(max(0, -b), n - max(0, -e)) for b, e, n in zip(begins, ends, out.shape[2:], strict=True)]
    return out[(slice(None), slice(None), *crop)]
