"""How layers, element-wise operators and reductions couple channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G
from edgekit.passes.coupling import Array, Role, macs, sizes

if TYPE_CHECKING:
    from edgekit.passes.coupling_trace import Tracer

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


# --- weighted ---------------------------------------------------------------------------------------
def conv(t: Tracer, node: ir.Node) -> bool:
    weight, x, y = G.array(node.inputs[1]), node.inputs[0], node.outputs[0]
    if weight is None or not _constant_bias(node, 2):
        return False
    found, groups, outputs = t.found, G.integer(node, "group", 1), int(weight.shape[0])
    role: Role = "out"
    channels = int(weight.shape[1]) * groups
    given = t.reads(x, 1, channels)
    t.only(node, x, (1,))
    work = macs(node)
    if groups == 1:
        made = found.fresh(outputs, node.name or "")
        if given is not None:
            t.site(node, 1, 1, given, "in")
        t.work(node, work, made, given)
    elif groups == channels:  # depthwise: outputs c*m … c*m+m-1 read channel c
        if given is None:
            given = found.fresh(channels, node.name or "")
            found.freeze(given, f"the inputs of '{node.name}' have no channels of their own")
        made, role = np.repeat(given, outputs // channels), "along"
        t.number(node, "group", 0, given)
        t.work(node, work, made)
    else:  # every group keeps as many: position j of all groups goes or stays
        position = np.tile(np.arange(outputs // groups), groups)
        made = found.gather(found.fresh(outputs, node.name or ""), position)[position]
        inside = None
        if given is not None:
            like = np.tile(np.arange(channels // groups), groups)
            inside = found.gather(given, like)
            t.site(node, 1, 1, inside, "in")
        t.work(node, work, made, inside)
    t.site(node, 1, 0, made, role)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        t.site(node, 2, 0, made, "along")
    found.put(y, 1, made)
    return True


def conv_transpose(t: Tracer, node: ir.Node) -> bool:
    weight, x, y = G.array(node.inputs[1]), node.inputs[0], node.outputs[0]
    if weight is None or not _constant_bias(node, 2):
        return False
    found, groups, channels = t.found, G.integer(node, "group", 1), int(weight.shape[0])
    given = t.reads(x, 1, channels)
    t.only(node, x, (1,))
    work = macs(node)
    if groups == 1:
        made = found.fresh(int(weight.shape[1]), node.name or "")
        if given is not None:
            t.site(node, 1, 0, given, "in")
        t.site(node, 1, 1, made, "out")
        t.work(node, work, made, given)
    elif groups == channels and weight.shape[1] == 1 and given is not None:
        made = given
        t.site(node, 1, 0, made, "along")
        t.number(node, "group", 0, made)
        t.work(node, work, made)
    else:
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        t.site(node, 2, 0, made, "along")
    found.put(y, 1, made)
    return True


def _constant_bias(node: ir.Node, position: int) -> bool:
    return len(node.inputs) <= position or node.inputs[position] is None or G.array(node.inputs[position]) is not None


def gemm(t: Tracer, node: ir.Node) -> bool:
    weight, x, y = G.array(node.inputs[1]), node.inputs[0], node.outputs[0]
    if weight is None or not _constant_bias(node, 2) or G.integer(node, "transA", 0):
        return False
    read, write = (1, 0) if G.integer(node, "transB", 0) else (0, 1)
    given = t.reads(x, 1, int(weight.shape[read]))
    t.only(node, x, (1,))
    made = t.found.fresh(int(weight.shape[write]), node.name or "")
    if given is not None:
        t.site(node, 1, read, given, "in")
    t.site(node, 1, write, made, "out")
    bias = G.array(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None and bias.ndim and bias.shape[-1] == len(made):
        t.site(node, 2, bias.ndim - 1, made, "along")
    t.work(node, macs(node), made, given)
    t.found.put(y, 1, made)
    return True


def matmul(t: Tracer, node: ir.Node) -> bool:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    rank, shape = sizes(a), sizes(y)
    if rank is None or shape is None or a is None or b is None:
        return False
    right = G.array(b)
    if right is not None:
        if right.ndim != 2 or G.array(a) is not None or len(rank) < 2:
            return False
        last = len(rank) - 1
        given = t.reads(a, last, int(right.shape[0]))
        others = {axis: labels for axis, labels in t.found.axes(a).items() if axis != last}
        made = t.found.fresh(int(right.shape[1]), node.name or "")
        if given is not None:
            t.site(node, 1, 0, given, "in")
        t.site(node, 1, 1, made, "out")
        t.work(node, macs(node), made, given, *others.values())
        return t.pass_axes(node, {**others, last: made})
    other = sizes(b)
    if G.array(a) is not None or other is None or len(rank) < 2 or len(other) < 2:
        return False
    return _contraction(t, node, rank, other, shape)


def _contraction(t: Tracer, node: ir.Node, left: Sequence[Any], right: Sequence[Any], shape: Sequence[Any]) -> bool:
    """A product of two computed values: attention."""
    found, a, b = t.found, t.found.axes(node.inputs[0]), t.found.axes(node.inputs[1])
    inner = (a.get(len(left) - 1), b.get(len(right) - 2))
    if inner[0] is not None and inner[1] is not None:
        t.together(inner[0], inner[1], node)
    else:
        for labels in inner:
            if labels is not None:
                found.freeze(labels, f"MatMul node '{node.name}' sums over that axis")
    rank = len(shape)
    out = aligned(t, node, [(a, left, len(left) - 2), (b, right, len(right) - 2)], rank - 2)
    if (rows := a.get(len(left) - 2)) is not None:
        out[rank - 2] = rows
    if (columns := b.get(len(right) - 1)) is not None:
        out[rank - 1] = columns
    t.work(node, macs(node), *out.values(), inner[0])
    return t.pass_axes(node, out)


def aligned(
    t: Tracer, node: ir.Node, operands: Sequence[tuple[dict[int, Array], Sequence[Any], int]], rank: int
) -> dict[int, Array]:
    """Labels of the first `rank` axes of a broadcast; operands: (labels, sizes, how many of their axes take part)."""
    out: dict[int, Array] = {}
    for axis in range(rank):
        here: list[Array] = []
        bare = False
        for labels, size, count in operands:
            own = axis - (rank - count)
            if own < 0:
                continue
            if size[own] == 1:
                if own in labels:
                    t.found.freeze(labels[own], "a single channel")
            elif own in labels:
                here.append(labels[own])
            else:
                bare = True
        if not here:
            continue
        for other in here[1:]:
            t.together(here[0], other, node)
        if bare:
            t.found.freeze(here[0], "meets a value whose channels stay")
        out[axis] = here[0]
    return out


def recurrent(t: Tracer, node: ir.Node) -> bool:
    """Hidden units of an LSTM, GRU or RNN; both directions keep the same ones, for `hidden_size` is one number."""
    found, gates = t.found, GATES[node.op_type]
    given = [*node.inputs, *[None] * 8][:8]
    w, r = G.array(given[1]), G.array(given[2])
    if w is None or r is None or G.integer(node, "layout", 0):
        return False
    if any(v is not None and G.array(v) is None for i, v in enumerate(given) if i):
        return False  # lengths or states that are computed
    hidden = int(r.shape[2])
    made = found.fresh(hidden, node.name or "")
    inputs = t.reads(given[0], 2, int(w.shape[2]))
    t.only(node, given[0], (2,))
    if inputs is not None:
        t.site(node, 1, 2, inputs, "in")
    rows = np.tile(made, gates)
    t.site(node, 1, 1, rows, "out")
    t.site(node, 2, 1, rows, "out")
    t.site(node, 2, 2, made, "in")
    if given[3] is not None:
        t.site(node, 3, 1, np.tile(made, 2 * gates), "along")
    for state in (5, 6):
        if given[state] is not None:
            t.site(node, state, 2, made, "along")
    if given[7] is not None:
        t.site(node, 7, 1, np.tile(made, 3), "along")
    t.number(node, "hidden_size", 0, made)
    share = w.size / (w.size + r.size)
    t.work(node, macs(node) * share, made, inputs)
    t.work(node, macs(node) * (1 - share), made, made)
    for position, value in enumerate(node.outputs):
        if value.name:
            found.put(value, 3 if position == 0 else 2, made)
    return True


# --- per channel ------------------------------------------------------------------------------------
def unary(t: Tracer, node: ir.Node) -> bool:
    if _read(node.outputs[1:]):
        return False
    return t.pass_axes(node, t.found.axes(node.inputs[0]))


def _read(values: Sequence[ir.Value]) -> bool:
    return any(v.uses() or v.is_graph_output() for v in values)


def broadcast(t: Tracer, node: ir.Node) -> bool:
    shape = sizes(node.outputs[0])
    operands, constants = [], []
    for position, value in enumerate(node.inputs):
        array = G.array(value)
        if array is not None:
            constants.append((position, array.shape))
            continue
        size = sizes(value)
        if size is None:
            return False
        operands.append((t.found.axes(value), size, len(size)))
    if shape is None:
        return False
    out = aligned(t, node, operands, len(shape))
    for position, dims in constants:
        for axis, labels in out.items():
            own = axis - (len(shape) - len(dims))
            if own >= 0 and dims[own] != 1:
                t.site(node, position, own, labels, "along")
    return t.pass_axes(node, out)


def pool(t: Tracer, node: ir.Node) -> bool:
    if _read(node.outputs[1:]):
        return False
    t.only(node, node.inputs[0], (0, 1))
    return t.pass_axes(node, {k: v for k, v in t.found.axes(node.inputs[0]).items() if k < 2})


def channelwise(t: Tracer, node: ir.Node) -> bool:
    """Batch and instance normalization: parameters per channel, axis 1."""
    if any(G.array(v) is None for v in node.inputs[1:]) or _read(node.outputs[1:]):
        return False
    t.only(node, node.inputs[0], (1,))
    labels = t.found.axes(node.inputs[0]).get(1)
    if labels is None:
        return True
    for position in range(1, len(node.inputs)):
        t.site(node, position, 0, labels, "along")
    return t.pass_axes(node, {1: labels})


def along_axis(t: Tracer, node: ir.Node) -> bool:
    """Softmax and the like: what runs along the axis stays."""
    rank = sizes(node.inputs[0])
    if rank is None or _read(node.outputs[1:]):
        return False
    axis = G.integer(node, "axis", -1) % len(rank)
    onwards = node.op_type in ("LayerNormalization", "RMSNormalization")
    kept = [a for a in range(len(rank)) if (a < axis if onwards else a != axis)]
    t.only(node, node.inputs[0], kept)
    return t.pass_axes(node, {a: labels for a, labels in t.found.axes(node.inputs[0]).items() if a in kept})


def reduce(t: Tracer, node: ir.Node) -> bool:
    x, rank = node.inputs[0], sizes(node.inputs[0])
    axes: Sequence[int] | None = G.integers(node, "axes")
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = G.array(node.inputs[1])
        if array is None:
            return False
        axes = [int(a) for a in array.reshape(-1)]
    if rank is None or (not axes and G.integer(node, "noop_with_empty_axes", 0)):
        return False
    reduced = {a % len(rank) for a in axes} if axes else set(range(len(rank)))
    kept = [a for a in range(len(rank)) if a not in reduced]
    t.only(node, x, kept)
    whole = bool(G.integer(node, "keepdims", 1))
    return t.pass_axes(
        node, {a if whole else kept.index(a): labels for a, labels in t.found.axes(x).items() if a in kept}
    )
