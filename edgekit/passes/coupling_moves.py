"""How operators that only move values couple channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G
from edgekit.passes.coupling import Array, Pattern, sizes
from edgekit.passes.coupling_layers import aligned

if TYPE_CHECKING:
    from edgekit.passes.coupling_trace import Tracer


# --- moves ------------------------------------------------------------------------------------------
def transpose(t: Tracer, node: ir.Node) -> bool:
    rank = sizes(node.inputs[0])
    if rank is None:
        return False
    perm = G.integers(node, "perm") or tuple(reversed(range(len(rank))))
    return t.pass_axes(node, {perm.index(a): labels for a, labels in t.found.axes(node.inputs[0]).items()})


def concat(t: Tracer, node: ir.Node) -> bool:
    ranks = [sizes(v) for v in node.inputs]
    first = ranks[0]
    if first is None or any(r is None for r in ranks):
        return False
    axis = G.integer(node, "axis", 0) % len(first)
    others = [({a: labels for a, labels in t.found.axes(v).items() if a != axis}, r or (), len(first))
              for v, r in zip(node.inputs, ranks, strict=True)]  # fmt: skip
    out = aligned(t, node, others, len(first))
    parts = [t.found.axes(v).get(axis) for v in node.inputs]
    if any(p is not None for p in parts):
        full = []
        for part, rank in zip(parts, ranks, strict=True):
            size = (rank or [None] * (axis + 1))[axis]
            if size is None:
                return False
            if part is None:
                part = t.found.fresh(size, node.name or "")
                t.found.freeze(part, f"a part of Concat node '{node.name}' has no channels of its own")
            full.append(part)
        out[axis] = np.concatenate(full)
    return t.pass_axes(node, out)


def split(t: Tracer, node: ir.Node) -> bool:
    rank, given = sizes(node.inputs[0]), t.found.axes(node.inputs[0])
    if rank is None:
        return False
    axis = G.integer(node, "axis", 0) % len(rank)
    parts = G.array(node.inputs[1]) if len(node.inputs) > 1 else None
    labels = given.get(axis)
    if labels is not None and (parts is None or rank[axis] is None):
        return False
    starts = np.concatenate([[0], np.cumsum(parts)]) if parts is not None else None
    for index, value in enumerate(node.outputs):
        for other, found in given.items():
            if other != axis:
                t.found.put(value, other, found)
        if labels is not None and starts is not None:
            own = labels[starts[index] : starts[index + 1]]
            t.found.put(value, axis, own)
            t.number(node, 1, index, own)
    return True


def cut(t: Tracer, node: ir.Node) -> bool:
    rank, given = sizes(node.inputs[0]), t.found.axes(node.inputs[0])
    arrays = [G.array(v) if v is not None else None for v in [*node.inputs[1:], None, None][:4]]
    starts, ends, axes, steps = arrays
    if rank is None or starts is None or ends is None:
        return False
    where = [int(a) % len(rank) for a in axes] if axes is not None else list(range(len(starts)))
    out = dict(given)
    for index, axis in enumerate(where):
        labels = given.get(axis)
        if labels is None:
            continue
        if rank[axis] is None or (steps is not None and int(steps[index]) != 1):
            return False
        first, last, _ = slice(int(starts[index]), int(ends[index])).indices(len(labels))
        out[axis] = labels[first:last]
        t.number(node, 1, index, labels[:first])
        t.number(node, 2, index, labels[:last])
    return t.pass_axes(node, out)


def gather(t: Tracer, node: ir.Node) -> bool:
    table, indices = G.array(node.inputs[0]), sizes(node.inputs[1])
    rank = sizes(node.inputs[0])
    if rank is None or indices is None:
        return False
    axis = G.integer(node, "axis", 0) % len(rank)
    t.found.freeze_value(node.inputs[1], f"Gather node '{node.name}' looks them up")
    out: dict[int, Array] = {}
    if table is not None:  # an embedding: a row of channels for each index
        if axis or table.ndim != 2:
            return False
        made = t.found.fresh(int(table.shape[1]), node.name or "")
        t.site(node, 0, 1, made, "out")
        out[len(indices)] = made
        return t.pass_axes(node, out)
    for own, labels in t.found.axes(node.inputs[0]).items():
        if own == axis:
            t.found.freeze(labels, f"Gather node '{node.name}' picks some")
        else:
            out[own if own < axis else own + len(indices) - 1] = labels
    return t.pass_axes(node, out)


def depth_to_space(t: Tracer, node: ir.Node) -> bool:
    """Every block of output positions keeps the same channels."""
    labels, block = t.found.axes(node.inputs[0]).get(1), G.integer(node, "blocksize", 1) ** 2
    t.only(node, node.inputs[0], (0, 1))
    if labels is None:
        return True
    channels = np.arange(len(labels))
    like = channels // block if G.text(node, "mode", "DCR") == "CRD" else channels % (len(labels) // block)
    return t.pass_axes(node, {1: t.found.gather(labels, like)})


def space_to_depth(t: Tracer, node: ir.Node) -> bool:
    """Every position of a block gets all channels, the position outside."""
    labels = t.found.axes(node.inputs[0]).get(1)
    t.only(node, node.inputs[0], (0, 1))
    return t.pass_axes(node, {} if labels is None else {1: np.tile(labels, G.integer(node, "blocksize", 1) ** 2)})


def pad(t: Tracer, node: ir.Node) -> bool:
    """An axis that grows freezes, and so does one that is shifted."""
    amounts, rank = G.array(node.inputs[1]) if len(node.inputs) > 1 else None, sizes(node.inputs[0])
    axes = G.array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    if amounts is None or rank is None:
        return False
    padded = [int(a) % len(rank) for a in axes] if axes is not None else list(range(len(rank)))
    moved = {a for a, pads in zip(padded, amounts.reshape(2, -1).T, strict=True) if pads.any()}
    t.only(node, node.inputs[0], [a for a in range(len(rank)) if a not in moved])
    return t.pass_axes(node, {a: labels for a, labels in t.found.axes(node.inputs[0]).items() if a not in moved})


def resize(t: Tracer, node: ir.Node) -> bool:
    given, target = t.found.axes(node.inputs[0]), G.array(node.inputs[3]) if len(node.inputs) > 3 else None
    axes, rank = G.integers(node, "axes"), len(sizes(node.inputs[0]) or ())
    scales = G.array(node.inputs[2]) if len(node.inputs) > 2 else None
    if G.text(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return False
    if scales is not None and scales.size:
        scaled = {a % rank for a in axes} if axes is not None else set(range(rank))
        t.only(node, node.inputs[0], [a for a, s in zip(sorted(scaled), scales, strict=True) if s == 1]
               + [a for a in range(rank) if a not in scaled])  # fmt: skip
    if target is not None:
        resized = [a % rank for a in axes] if axes is not None and rank else list(range(len(target)))
        for axis, labels in given.items():
            if axis in resized and int(target[resized.index(axis)]) == len(labels):
                t.number(node, 3, resized.index(axis), labels)
    elif len(node.inputs) > 3 and node.inputs[3] is not None:
        return False
    return t.pass_axes(node, given)


def expand(t: Tracer, node: ir.Node) -> bool:
    target, shape = G.array(node.inputs[1]), sizes(node.outputs[0])
    given, rank = t.found.axes(node.inputs[0]), sizes(node.inputs[0])
    if target is None or shape is None or rank is None:
        return False
    moved = {axis + len(shape) - len(rank): labels for axis, labels in given.items()}
    for axis, labels in moved.items():
        index = axis - (len(shape) - len(target))
        if index >= 0 and int(target[index]) == len(labels) != 1:
            t.number(node, 1, index, labels)
    return t.pass_axes(node, moved)


# --- reshaping --------------------------------------------------------------------------------------
def reshape(t: Tracer, node: ir.Node) -> bool:
    x, y = node.inputs[0], node.outputs[0]
    given = t.found.axes(x)
    if x is None or not given:
        return True
    if x.shape is None or y.shape is None:
        return False
    target = G.array(node.inputs[1]) if node.op_type == "Reshape" else None
    if node.op_type == "Reshape" and (target is None or G.integer(node, "allowzero", 0)):
        return False
    before, after = _known(x), _known(y)
    for ins, outs in _blocks(before, after):
        labelled = [a for a in ins if a in given]
        if labelled and not _block(t, node, given, (ins, outs), (before, after), labelled):
            for axis in labelled:
                t.found.freeze(given[axis], f"{node.op_type} node '{node.name}' mixes axes")
    for axis, labels in t.found.axes(y).items():
        if target is None or int(target[axis]) == -1:
            continue
        if int(target[axis]) == 0 and not (axis in given and given[axis] is labels):
            t.found.freeze(labels, f"Reshape node '{node.name}' copies the size of another axis")
        elif int(target[axis]) != 0:
            t.number(node, 1, axis, labels)
    return True


def _known(value: ir.Value) -> list[int | str]:
    return [d if isinstance(d, int) else str(d.value) for d in value.shape or ()]


def _blocks(before: Sequence[int | str], after: Sequence[int | str]) -> list[tuple[list[int], list[int]]]:
    """Which axes become which: the smallest runs of equal product, from the last axis on; the symbolic rest is one."""
    i, j = len(before), len(after)
    blocks: list[tuple[list[int], list[int]]] = []
    while i or j:
        ins: list[int] = []
        outs: list[int] = []
        left = right = 1
        while True:
            if ins and outs and left == right:
                break
            take_left = (left <= right and i > 0) or j == 0
            at = before[i - 1] if take_left and i else after[j - 1] if j else None
            if at is None or isinstance(at, str):
                ins, outs = [*range(i), *ins], [*range(j), *outs]
                i = j = 0
                break
            if take_left:
                i -= 1
                ins.insert(0, i)
                left *= at
            else:
                j -= 1
                outs.insert(0, j)
                right *= at
        while ins and outs and i and before[i - 1] == 1:
            i -= 1
            ins.insert(0, i)
        while ins and outs and j and after[j - 1] == 1:
            j -= 1
            outs.insert(0, j)
        blocks.append((ins, outs))
    return blocks


def _block(
    t: Tracer,
    node: ir.Node,
    given: dict[int, Array],
    axes: tuple[list[int], list[int]],
    shapes: tuple[Sequence[int | str], Sequence[int | str]],
    labelled: list[int],
) -> bool:
    """Labels through one run of axes: kept, merged (one of them has labels), or split."""
    ins, outs = [[a for a in own if s[a] != 1] for own, s in zip(axes, shapes, strict=True)]
    if len(labelled) > 1:
        return False
    axis = labelled[0]
    labels = given[axis]
    if axis not in ins:  # one channel: it stays one
        t.found.freeze(labels, "a single channel")
        return True
    if any(isinstance(shapes[0][a], str) for a in ins) or any(isinstance(shapes[1][a], str) for a in outs):
        return _beside_batch(t, node, labels, axis, (ins, outs), shapes)
    if len(outs) == 1:
        size = [int(shapes[0][a]) for a in ins]
        flat = np.unravel_index(np.arange(int(np.prod(size))), size)[ins.index(axis)]
        t.found.put(node.outputs[0], outs[0], labels[flat] if len(ins) > 1 else labels)
        return True
    if len(ins) > 1:
        return False
    apart = tuple(int(shapes[1][a]) for a in outs)
    where = np.unravel_index(np.arange(len(labels)), apart)
    for at, like in enumerate(where):  # labels that repeat along the others, as a batch beside them makes them
        own = labels[np.unique(like, return_index=True)[1]]
        if apart[at] < len(labels) and np.array_equal(own[like], labels):
            t.found.put(node.outputs[0], outs[at], own)
            return True
    pattern: Pattern = ((len(labels),), apart)
    chosen = t.found.splits.setdefault(pattern, t.choices.get(pattern, 0))
    t.found.put(node.outputs[0], outs[chosen], t.found.gather(labels, where[chosen]))
    return True


def _beside_batch(
    t: Tracer,
    node: ir.Node,
    labels: Array,
    axis: int,
    axes: tuple[list[int], list[int]],
    shapes: tuple[Sequence[int | str], Sequence[int | str]],
) -> bool:
    """Through a run that holds the batch. Labels on an axis of size k*batch repeat, the batch outside."""
    ins, outs = axes
    last = outs[-1]
    if ins[-1] != axis:
        return False
    whole = len(ins) == 1
    if shapes[1][last] == len(labels):  # (batch, k) or k*batch, into (…, k)
        t.found.put(node.outputs[0], last, labels)
        return True
    if len(outs) == 1 and (shapes[0][axis] == shapes[1][last] if whole else len(ins) == 2):  # (batch, k) into k*batch
        t.found.put(node.outputs[0], last, labels)
        return True
    return False


def squeeze(t: Tracer, node: ir.Node) -> bool:
    x, y = node.inputs[0], node.outputs[0]
    given = t.found.axes(x)
    if x is None or not given:
        return True
    if x.shape is None or y.shape is None:
        return False
    ones = [a for a, d in enumerate(_known(x) if node.op_type == "Squeeze" else _known(y)) if d == 1]
    axes = G.array(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    rank = max(len(x.shape), len(y.shape))
    gone = {int(a) % rank for a in axes.reshape(-1)} if axes is not None else set(ones)
    kept = [a for a in range(rank) if a not in gone]
    if node.op_type == "Squeeze":
        for axis in gone & set(given):
            t.found.freeze(given[axis], "a single channel")
        return t.pass_axes(node, {kept.index(a): labels for a, labels in given.items() if a in kept})
    return t.pass_axes(node, {kept[a]: labels for a, labels in given.items()})


def shape(t: Tracer, node: ir.Node) -> bool:
    """Sizes that are read while the model runs are right after pruning too, but who uses them is not followed."""
    rank = len(sizes(node.inputs[0]) or ())
    first, last, _ = slice(G.integer(node, "start", 0), G.integer(node, "end", rank)).indices(rank)
    return not any(first <= axis < last for axis in t.found.axes(node.inputs[0]))
