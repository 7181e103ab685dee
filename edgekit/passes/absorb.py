"""High-bias absorption: what a channel never falls below moves from its layer's bias into those of its readers.

Nagel et al. 2019, section 4.1.3. For a Relu whose input stays above c, relu(y - c) = relu(y) - c: the layer before it
gives c less, the layers behind it add W·c to their bias, and the tensor between them has a smaller range. The paper
takes c from batch normalization's statistics; here it is the lowest value that the data showed. The function is the
same wherever each channel stays above its c, and off by W·(c - y) at most where one falls below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_graph as G
from edgekit.passes.calibrate import channel_ranges
from edgekit.passes.channels import Channels, End, trace
from edgekit.passes.rescale import along, over_taps

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]

SHRINKS = 0.95  # of the range before: less is not worth the assumption
# a channel that is c lower going in is c lower coming out
_SHIFTED = frozenset(
    {"Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose"}
    | {"MaxPool", "GlobalMaxPool", "GlobalAveragePool"}
)


@dataclass(frozen=True)
class _Place:
    """A Relu between layers that have a bias.

    source: the value before it, with the node and input that hold its bias. value: behind it. readers: consumers, each
    with the node and input that hold its bias.
    """

    source: End
    bias: tuple[ir.Node, int]
    value: ir.Value
    readers: tuple[tuple[End, tuple[ir.Node, int]], ...]


def absorbed(model: ir.Model, data: Dataset) -> ir.Model:
    """A copy of a prepared model. data: bound to it. Raises NonFiniteError naming a tensor that holds NaN or Inf."""
    out = M.clone(model)
    places = list(_places(out))
    if not places:
        return out
    seen = channel_ranges(out, data, {place.value.name or "": place.source.axis for place in places})
    for place in places:
        ranges = seen[place.value.name or ""]
        lowest = np.maximum(ranges.low, 0.0)
        if (ranges.high - lowest).max(initial=0.0) < SHRINKS * ranges.high.max(initial=0.0):
            _absorb(place, lowest)
    return out


def _absorb(place: _Place, lowest: Array) -> None:
    sign = 1 if place.bias[0].op_type == "Sub" and place.bias[1] == 1 else -1  # y = x - k
    _shift(place.bias, place.source, sign * lowest)
    of = dict(zip(place.source.labels.tolist(), lowest, strict=True))
    for end, bias in place.readers:
        weight = G.array(end.node.inputs[1])
        assert weight is not None  # the trace has looked
        given = np.array([of[int(label)] for label in end.labels])
        more = over_taps(end.node, weight, len(given), lambda w: w.sum(axis=2)) @ given
        sign = -1 if bias[0].op_type == "Sub" else 1
        _shift(bias, None, sign * more)


def _shift(bias: tuple[ir.Node, int], source: End | None, by: Array) -> None:
    """Add one number per channel to a node's constant, or give it one. source: whose channels, if not the last axis."""
    node, position = bias
    old = G.array(node.inputs[position]) if len(node.inputs) > position else None
    if old is None:
        weight = G.array(node.inputs[1])
        assert weight is not None
        G.set_constant(node, position, f"{node.name}/bias", by.astype(weight.dtype))
        return
    if node.op_type in {"Add", "Sub"} and source is not None:
        rank = len(source.value.shape or ())
        by = along(by, old.ndim, source.axis - (rank - old.ndim))
    G.set_constant(node, position, f"{node.name}/{position}_absorbed", (old.astype(np.float64) + by).astype(old.dtype))


# --- where -------------------------------------------------------------------------------------------------
def _places(model: ir.Model) -> Iterator[_Place]:
    found = trace(model)
    offsets = {end.node.name: (end, position) for end, position in found.offsets}
    made = {end.value.name: end for end in (*found.producers, *(end for end, _ in found.offsets))}
    for node in model.graph:
        before = node.inputs[0] if G.is_op(node, "Relu") else None
        source = made.get(before.name) if before is not None else None
        if source is None or len(set(source.labels.tolist())) != len(source.labels):
            continue
        if source.value.is_graph_output() or len(source.value.uses()) != 1:
            continue
        maker = source.node
        bias = (maker, offsets[maker.name][1]) if maker.name in offsets else _own_bias(maker, needed=True)
        readers = None if bias is None else _readers(model.graph, node.outputs[0], found, offsets)
        if bias is not None and readers:
            yield _Place(source, bias, node.outputs[0], tuple(readers))


def _own_bias(node: ir.Node, *, needed: bool) -> tuple[ir.Node, int] | None:
    """Where the node's bias is, or could be."""
    if node.op_type == "MatMul" or G.number(node, "beta", 1.0) != 1.0:
        return None
    given = node.inputs[2] if len(node.inputs) > 2 else None
    if given is None:
        return None if needed else (node, 2)
    return (node, 2) if G.array(given) is not None else None


def _readers(
    graph: ir.Graph, value: ir.Value, found: Channels, offsets: dict[str | None, tuple[End, int]]
) -> list[tuple[End, tuple[ir.Node, int]]] | None:
    """The layers that read the value, perhaps pooled or reshaped; None if anything else reads it."""
    consumers = {end.node.name: end for end in found.consumers}
    out: list[tuple[End, tuple[ir.Node, int]]] = []
    waiting = [value]
    while waiting:
        at = waiting.pop()
        if at.is_graph_output() or not at.uses():
            return None
        for node, position in at.uses():
            if node.graph is not graph or position != 0:
                return None
            if G.is_op(node, *_SHIFTED) and not any(other.uses() for other in node.outputs[1:]):
                waiting.append(node.outputs[0])
                continue
            end = consumers.get(node.name)
            bias = None if end is None or end.value is not at else _bias_of(node, offsets)
            if end is None or bias is None:
                return None
            out.append((end, bias))
    return out


def _bias_of(node: ir.Node, offsets: dict[str | None, tuple[End, int]]) -> tuple[ir.Node, int] | None:
    """Where to make up for what a layer reads less; None if a border would get too much or there is no bias."""
    if node.op_type == "Conv":
        padded = any(G.integers(node, "pads") or ()) or G.text(node, "auto_pad", "NOTSET") not in {"NOTSET", "VALID"}
        return None if padded else _own_bias(node, needed=False)
    if node.op_type == "Gemm":
        return _own_bias(node, needed=False)
    if node.op_type != "MatMul":
        return None
    result = node.outputs[0]
    if result.is_graph_output() or len(result.uses()) != 1:
        return None
    reader = next(iter(result.uses())).node
    end, position = offsets.get(reader.name, (None, 0))
    late = end is not None and end.axis == len(result.shape or ()) - 1
    return (reader, position) if late and not (reader.op_type == "Sub" and position == 0) else None
