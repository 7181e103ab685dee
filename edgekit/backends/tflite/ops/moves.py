"""Operators that move elements and compute nothing: in the layout that exists, wherever that is possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.graph import Layout, Tensor
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.values import Node, Refused, Value

_BATCH = 1_000_003  # stands for the batch where sizes are matched: a prime that no size is a multiple of
_Group = tuple[tuple[int, ...], tuple[int, ...]]  # input axes, output axes with as many elements


def same_scale(*values: Value) -> None:
    """Refused unless all are float or all share one scale."""
    first = values[0].quant
    if any((v.quant is None) != (first is None) or (first is not None and not first.same(v.quant)) for v in values[1:]):
        raise Refused("its scale differs between input and output", "quantize anew with edgekit")


def _identity(e: Emitter, n: Node) -> None:
    """Dropout, too: it drops nothing unless it is told to train."""
    training = n.const(2)
    if training is not None and training.any():
        raise Refused("it is in training mode", "export the model for inference")
    if len(n.outputs) > 1 and n.outputs[1].name:
        if n.outputs[1].dynamic:
            raise Refused("its mask is used", "export the model for inference")
        e.define(n.outputs[1], e.constant(np.ones(n.outputs[1].shape, np.bool_)))
    x, out = n.require(0), n.outputs[0]
    same_scale(x, out)
    e.rename(out, x, identity(x.rank))


def _transpose(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    same_scale(x, out)
    e.rename(out, x, n.ints("perm", tuple(reversed(range(x.rank)))))


# --- reshape -------------------------------------------------------------------------------------------------
def _reshape(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    same_scale(x, out)
    if len(out.dynamic) > 1:
        raise Refused("two of its axes grow with the batch", "fix the batch: --shape INPUT=1,...")
    groups = _groups(x, out)
    for layout in e.layouts(x) or [identity(x.rank)]:
        wanted = None if groups is None else _carried(x, out, groups, layout)
        if wanted is not None:
            return _as(e, x, out, layout, wanted)
    if _flattens(e, x, out):
        return
    layout = identity(x.rank) if groups is None else _contiguous(x, groups, existing(e, x))
    wanted = identity(out.rank) if groups is None else _carried(x, out, groups, layout)
    _as(e, x, out, layout, wanted or identity(out.rank))


def _as(e: Emitter, x: Value, out: Value, layout: Layout, wanted: Layout) -> None:
    shape = tuple(out.shape[a] for a in wanted)
    dynamic = {k for k, a in enumerate(wanted) if a in out.dynamic}
    e.define(out, e.reshape(e.tensor(x, layout), shape, dynamic, out.name), wanted)


def _sized(value: Value) -> list[int]:
    return [size * _BATCH if a in value.dynamic else size for a, size in enumerate(value.shape)]


def _groups(x: Value, out: Value) -> list[_Group] | None:
    """The smallest runs of input and output axes that hold the same elements; None if sizes do not tell."""
    before, after = _sized(x), _sized(out)
    if 0 in before or int(np.prod(before, dtype=object)) != int(np.prod(after, dtype=object)):
        return None
    left = [(a, s) for a, s in enumerate(before) if s != 1]
    right = [(a, s) for a, s in enumerate(after) if s != 1]
    groups: list[_Group] = []
    while left:
        (a, p), (b, q) = left.pop(0), right.pop(0)
        mine, theirs = [a], [b]
        while p != q:
            if p < q:
                a, size = left.pop(0)
                mine.append(a)
                p *= size
            else:
                b, size = right.pop(0)
                theirs.append(b)
                q *= size
        groups.append((tuple(mine), tuple(theirs)))
    return groups


def _carried(x: Value, out: Value, groups: Sequence[_Group], layout: Layout) -> Layout | None:
    """The layout that the output has if the input in `layout` is reshaped as it lies; None if that mixes elements."""
    order = [a for a in layout if any(a in g[0] for g in groups)]
    wanted: list[int] = []
    while order:
        mine, theirs = next(g for g in groups if order[0] in g[0])
        if tuple(order[: len(mine)]) != mine:
            return None
        order = order[len(mine) :]
        wanted += theirs
    return _with_ones(wanted, out.rank)


def _with_ones(wanted: Sequence[int], rank: int) -> Layout:
    """Axes of size 1 join where they do least harm: in ONNX's order, or before the axis that they stand before in it.

    So a channels-last tensor stays one, and an axis that is then repeated lies where it will be merged.
    """
    if list(wanted) == sorted(wanted):
        return identity(rank)
    out = list(wanted)
    for axis in reversed(range(rank)):
        if axis not in out:
            out.insert(out.index(axis + 1) if axis + 1 in out else len(out) - 1, axis)
    return tuple(out)


def _contiguous(x: Value, groups: Sequence[_Group], layout: Layout) -> Layout:
    """`layout` with the axes of each group brought together in order, at the place of its last one in memory.

    The group of the batch stays first: heads that become part of a batched product's batch, say.
    """
    place = {a: k for k, a in enumerate(layout)}
    ordered = sorted(groups, key=lambda g: -1 if g[0][0] == 0 else max(place[a] for a in g[0]))
    large = [a for g in ordered for a in g[0]]
    return (*(a for a in layout if a not in large), *large)


def _flattens(e: Emitter, x: Value, out: Value) -> bool:
    """(batch, features) of a channels-last tensor, read by dense layers only: they permute their weights instead."""
    readers = e.readers(out)
    if out.rank != 2 or x.rank < 3 or out.shape[0] != x.shape[0] or x.data is not None:
        return False
    layout = existing(e, x)
    dense = all(
        r.op in ("Gemm", "MatMul") and r.input(0) is out and r.require(1).data is not None and not r.int("transA", 0)
        and r.require(1).rank == 2 for r in readers
    )  # fmt: skip
    if not readers or not dense or layout[0] != 0 or e.returned(out):
        return False
    order = np.arange(out.shape[1]).reshape(x.shape[1:]).transpose([a - 1 for a in layout[1:]]).reshape(-1)
    tensor = e.reshape(e.tensor(x, layout), out.shape, out.dynamic, out.name)
    e.shuffle(out, tensor, order)
    return True


# --- joining and cutting -------------------------------------------------------------------------------------
def _concat(e: Emitter, n: Node) -> None:
    out = n.outputs[0]
    values = [v for v in n.inputs if v is not None and 0 not in v.shape]
    if not values:
        raise Refused("it joins nothing")
    same_scale(out, *values)
    axis = n.int("axis", 0) % out.rank
    if (
        any(axis in v.dynamic for v in values)
        and len(values) > 1
        and out.shape[axis] != sum(v.shape[axis] for v in values)
    ):
        raise Refused("it joins along the batch", "fix the batch: --shape INPUT=1,...")
    layout, tensors = e.aligned(values, out.rank)
    if len(tensors) == 1:
        return e.define(out, tensors[0], layout)
    e.emit(out, "CONCATENATION", tensors, layout, axis=layout.index(axis), fusedActivationFunction="NONE")


def _split(e: Emitter, n: Node) -> None:
    x = n.require(0)
    same_scale(x, *n.outputs)
    axis = n.int("axis", 0) % x.rank
    if axis in x.dynamic:
        raise Refused("it splits the batch", "fix the batch: --shape INPUT=1,...")
    layout = existing(e, x)
    tensor, where = e.tensor(x, layout), layout.index(axis)
    start = 0
    for out in n.outputs:
        if out.name:
            begin = [0] * x.rank
            begin[where] = start
            _cut(e, tensor, out, layout, begin)
        start += out.shape[axis] if out.name else _unnamed_size(n)
    return


def _unnamed_size(n: Node) -> int:
    raise Refused("a part of it has no name", "name all outputs of the Split")


def _cut(e: Emitter, x: Tensor, out: Value, layout: Layout, begin: Sequence[int]) -> None:
    """SLICE of x from `begin`, all of an axis that grows with the batch."""
    made = e.blank(out, layout)
    if 0 in made.shape and not made.dynamic:
        return e.define(out, e.constant(np.zeros(made.shape, made.dtype), quant=made.quant), layout)
    if made.shape == x.shape and not any(begin):
        return e.define(out, x, layout)
    sizes = [-1 if k in made.dynamic else s for k, s in enumerate(made.shape)]
    parameters = [e.constant(np.array(v, np.int32)) for v in (begin, sizes)]
    e.emit(out, "SLICE", [x, *parameters], layout)


def _slice(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    same_scale(x, out)
    starts, ends = _ints(n, 1), _ints(n, 2)
    axes = _ints(n, 3) if n.input(3) is not None else list(range(len(starts)))
    steps = _ints(n, 4) if n.input(4) is not None else [1] * len(starts)
    begin, finish, stride = [0] * x.rank, list(x.shape), [1] * x.rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= x.rank
        size = x.shape[axis]
        if axis in x.dynamic:
            if start == 0 and end >= 2**31 - 1 and step == 1:
                continue
            raise Refused("it cuts the batch", "fix the batch: --shape INPUT=1,...")
        begin[axis], finish[axis], stride[axis] = _bounds(start, end, step, size)
    if 0 in out.shape:
        raise Refused("its result is empty")
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    if all(s == 1 for s in stride):
        return _cut(e, tensor, out, layout, [begin[a] for a in layout])
    _strided(e, tensor, out, layout, [[v[a] for a in layout] for v in (begin, finish, stride)])


def _strided(e: Emitter, x: Tensor, out: Value, layout: Layout, bounds: list[list[int]]) -> None:
    """Masks stand for "from the first" and "to the last", which is how a negative stride reaches element 0."""
    begin, finish, stride = bounds
    begin_mask = sum(1 << k for k in range(len(layout)) if k in x.dynamic)
    end_mask = sum(1 << k for k in range(len(layout)) if k in x.dynamic or (stride[k] < 0 and finish[k] < 0))
    parameters = [e.constant(np.array(v, np.int32)) for v in (begin, [max(f, 0) for f in finish], stride)]
    e.emit(
        out, "STRIDED_SLICE", [x, *parameters], layout, beginMask=begin_mask, endMask=end_mask, ellipsisMask=0,
        newAxisMask=0, shrinkAxisMask=0, offset=False,
    )  # fmt: skip


def _bounds(start: int, end: int, step: int, size: int) -> tuple[int, int, int]:
    """ONNX's clamping: the first element, one past the last (-1 for "past element 0"), and the step."""
    start = start + size if start < 0 else start
    end = end + size if end < 0 else end
    if step > 0:
        return min(max(start, 0), size), min(max(end, 0), size), step
    return min(max(start, 0), size - 1), min(max(end, -1), size - 1), step


def _ints(n: Node, index: int) -> list[int]:
    array = n.const(index)
    if array is None:
        raise Refused(f"it has no input {index}")
    return [int(i) for i in array.reshape(-1)]


# --- growing -------------------------------------------------------------------------------------------------
def _pad(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    same_scale(x, out)
    amounts = _ints(n, 1)
    axes = [a % x.rank for a in _ints(n, 3)] if n.input(3) is not None else list(range(x.rank))
    pairs = np.zeros((x.rank, 2), np.int64)
    for i, axis in enumerate(axes):
        pairs[axis] = amounts[i], amounts[i + len(axes)]
    if any(pairs[a].any() for a in x.dynamic):
        raise Refused("it pads the batch", "fix the batch: --shape INPUT=1,...")
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    if pairs.min(initial=0) < 0:
        tensor = _crop(e, tensor, np.array([pairs[a] for a in layout]))
        pairs = np.maximum(pairs, 0)
    if not pairs.any():
        return e.define(out, tensor, layout)
    spec = e.constant(np.array([pairs[a] for a in layout], np.int32))
    mode = n.str("mode", "constant")
    if mode == "reflect":
        if any(pairs[a].max() >= x.shape[a] for a in range(x.rank)):
            raise Refused("it reflects more than the tensor holds")
        e.emit(out, "MIRROR_PAD", [tensor, spec], layout, mode="REFLECT")
        return
    if mode != "constant":
        raise Refused(f"padding mode '{mode}'", "LiteRT pads with a constant or by reflection")
    filler = n.const(2)
    value = 0.0 if filler is None else filler.reshape(-1)[0]
    if value == 0:
        e.emit(out, "PAD", [tensor, spec], layout)
        return
    if x.quant is not None:
        info = np.iinfo(x.dtype)
        value = np.clip(np.rint(float(value) / x.quant.scale) + x.quant.zero, info.min, info.max)
    e.emit(out, "PADV2", [tensor, spec, e.constant(np.array(value, x.dtype), quant=x.quant)], layout)


def _crop(e: Emitter, x: Tensor, pairs: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
    begin = np.maximum(-pairs[:, 0], 0)
    size = np.array(x.shape) - begin - np.maximum(-pairs[:, 1], 0)
    if size.min() <= 0:
        raise Refused("its padding crops the whole input")
    lengths = np.array([-1 if k in x.dynamic else s for k, s in enumerate(size)], np.int32)
    parameters = [e.constant(begin.astype(np.int32)), e.constant(lengths)]
    return e.op("SLICE", [x, *parameters], tuple(int(s) for s in size), quant=x.quant, dynamic=x.dynamic)


def _expand(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    same_scale(x, out)
    if x.shape == out.shape and x.dynamic == out.dynamic:
        return e.rename(out, x, identity(out.rank))
    grows = {a for a in out.dynamic if a - (out.rank - x.rank) not in x.dynamic}
    if grows:
        raise Refused("it repeats a tensor once per sample", "fix the batch: --shape INPUT=1,...")
    if not out.dynamic and out.rank <= 8:
        tensor = e.tensor(x)
        e.emit(out, "BROADCAST_TO", [tensor, e.constant(np.array(out.shape, np.int32))])
        return
    if x.quant is not None or x.dtype.kind not in "fi":
        raise Refused("it broadcasts a tensor whose batch is open", "fix the batch: --shape INPUT=1,...")
    zeros = e.constant(np.zeros([1 if a in out.dynamic else s for a, s in enumerate(out.shape)], x.dtype))
    e.emit(out, "ADD", [e.widened(x, identity(out.rank)), zeros], fusedActivationFunction="NONE")


def _tile(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    same_scale(x, out)
    repeats = _ints(n, 1)
    if any(repeats[a] != 1 for a in x.dynamic):
        raise Refused("it repeats the batch", "fix the batch: --shape INPUT=1,...")
    layout = existing(e, x)
    e.emit(out, "TILE", [e.tensor(x, layout), e.constant(np.array([repeats[a] for a in layout], np.int32))], layout)


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    "Identity": _identity,
    "Dropout": _identity,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
}
