"""What float32, and a Clip or a Min behind channels, allow their factors to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekit.passes import fold_graph as G
from edgekit.passes.calibrate import ChannelRange
from edgekit.passes.channels import Channels, End

Array = np.ndarray[Any, Any]

MOST = 2.0**20  # no factor beyond this or below its inverse: float32 keeps its precision
_TOUCHES = 0.999  # of a Clip's bound: a channel that comes this near is bounded by it


def even_out(found: Channels, factors: Array) -> None:
    """Bounds that differ from channel to channel, Min(x, vector), become one: a Clip, which kernels fuse.

    factors: of every root, edited. Channels that have such a bound, or a Max, are held.
    """
    for end, position in found.bounds:
        bound = G.array(end.node.inputs[position])
        roots = found.roots(end.labels)
        if bound is None or bound.size != len(roots) or not (bound > 0).all() or not found.free(roots).all():
            continue
        wanted = bound.max() / bound.reshape(-1).astype(np.float64)
        if end.node.op_type == "Min" and len(np.unique(roots)) == len(roots):
            factors[roots] = wanted
    for end, _ in found.bounds:  # whatever the bounds are now, they stay
        for label in end.labels:
            found.hold(int(label))


def hold(found: Channels, seen: Mapping[str, ChannelRange]) -> None:
    """Channels that reach the bound of a Clip keep their scale; all of a Clip that nothing was seen of."""
    for end in found.clips:
        ranges = seen.get(end.value.name or "")
        reaching = slice(None) if ranges is None else ranges.high >= _TOUCHES * bound_of(end)
        for label in end.labels[reaching]:
            found.hold(int(label))


def limits(found: Channels, seen: Mapping[str, ChannelRange]) -> Array:
    """The largest factor of every root with which no channel seen reaches the bound of a Clip; inf without one."""
    out = np.full(found.count(), np.inf)
    for end in found.clips:
        if (ranges := seen.get(end.value.name or "")) is not None:
            np.minimum.at(out, found.roots(end.labels), bound_of(end) / np.maximum(ranges.span, 1e-30))
    return out


def bound_of(clip: End) -> float:
    array = G.array(clip.node.inputs[2])
    return float("inf") if array is None else float(array.reshape(-1)[0])
