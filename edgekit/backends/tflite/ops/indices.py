"""Elements picked and placed by index, and tensors made from indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.graph import Layout, Tensor
from edgekit.backends.tflite.ops.arithmetic import cast, compute, finish
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.ops.moves import same_scale
from edgekit.backends.tflite.values import Node, Refused, Value

_BATCH = "fix the batch: --shape INPUT=1,..."


def _counted(e: Emitter, indices: Tensor, sizes: int | Sequence[int]) -> Tensor:
    """Indices from the start: ONNX's may be negative, LiteRT's may not. sizes: of the axis, or one per last index."""
    limit = np.array(sizes, indices.dtype)
    if indices.data is not None:
        return e.constant(np.where(indices.data < 0, indices.data + limit, indices.data).astype(indices.dtype))
    moved = compute(e, "ADD", indices, e.constant(limit))
    return compute(e, "SELECT_V2", compute(e, "LESS", indices, 0), moved, indices)


def _from_start(e: Emitter, indices: Tensor, x: Value, axes: Sequence[int], *, one: bool = False) -> Tensor:
    """`_counted` by the sizes of x's axes. one: a single axis, so that the indices have no last axis for it."""
    if any(a in x.dynamic for a in axes):
        if indices.data is None or indices.data.min(initial=0) < 0:
            raise Refused("an index along the batch may be negative", _BATCH)
        return indices
    return _counted(e, indices, x.shape[axes[0]] if one else [x.shape[a] for a in axes])


def _gather(e: Emitter, n: Node) -> None:
    x, indices, out = n.require(0), n.require(1), n.outputs[0]
    same_scale(x, out)
    axis, more = n.int("axis", 0) % x.rank, indices.rank - 1
    layout = existing(e, x)
    where = layout.index(axis)
    if indices.data is not None and indices.rank == 0 and axis not in x.dynamic:
        return _one(e, x, out, layout, axis, int(indices.data) % x.shape[axis])
    places = _from_start(e, e.tensor(indices), x, [axis], one=True)
    moved: list[int] = []
    for a in layout:
        moved += range(axis, axis + indices.rank) if a == axis else [a if a < axis else a + more]
    e.emit(out, "GATHER", [e.tensor(x, layout), places], tuple(moved), axis=where, batchDims=0)


def _one(e: Emitter, x: Value, out: Value, layout: Layout, axis: int, place: int) -> None:
    """One slice along an axis, which then goes: a SLICE, because XNNPACK takes no GATHER."""
    begin = [place if a == axis else 0 for a in layout]
    shape = [1 if a == axis else x.shape[a] for a in layout]
    sizes = [-1 if a in x.dynamic else s for a, s in zip(layout, shape, strict=True)]
    dynamic = [k for k, a in enumerate(layout) if a in x.dynamic]
    cut = e.op(
        "SLICE", [e.tensor(x, layout), e.constant(begin), e.constant(sizes)], shape, quant=x.quant, dynamic=dynamic
    )
    wanted = tuple(a - (a > axis) for a in layout if a != axis)
    grown = [k for k, a in enumerate(wanted) if a in out.dynamic]
    e.define(out, e.reshape(cut, [out.shape[a] for a in wanted], grown, out.name), wanted)


def _gather_elements(e: Emitter, n: Node) -> None:
    """GATHER along the last axis, one row of indices for each row of elements."""
    x, indices, out = n.require(0), n.require(1), n.outputs[0]
    same_scale(x, out)
    axis = n.int("axis", 0) % x.rank
    layout = (*(a for a in range(x.rank) if a != axis), axis)
    tensor = e.tensor(x, layout)
    wanted = tuple(indices.shape[a] if a != axis else x.shape[a] for a in layout)
    if wanted != tensor.shape:
        sizes = [-1 if k in tensor.dynamic else s for k, s in enumerate(wanted)]
        parameters = [e.constant([0] * x.rank), e.constant(sizes)]
        tensor = e.op("SLICE", [tensor, *parameters], wanted, dynamic=tensor.dynamic)
    places = _from_start(e, e.tensor(indices, layout), x, [axis], one=True)
    if x.rank > 1 and places.data is not None and 0 in tensor.dynamic:
        raise Refused("its constant indices are of one sample", _BATCH)
    e.emit(out, "GATHER", [tensor, places], layout, axis=x.rank - 1, batchDims=x.rank - 1)


def _gather_nd(e: Emitter, n: Node) -> None:
    x, indices, out = n.require(0), n.require(1), n.outputs[0]
    same_scale(x, out)
    same, depth = n.int("batch_dims", 0), indices.shape[-1]
    places = _from_start(e, e.tensor(indices), x, range(same, same + depth))
    if same:
        if any(a in indices.dynamic for a in range(indices.rank)):
            raise Refused("batch_dims where the batch is open", _BATCH)
        places = _with_coordinates(e, places, indices.shape[:-1], range(same))
    e.emit(out, "GATHER_ND", [e.tensor(x), places])


def _with_coordinates(e: Emitter, places: Tensor, shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    """`places` (*shape, depth) behind the element's own coordinates along `axes`."""
    grid = np.indices(tuple(shape), dtype=places.dtype)
    own = np.stack([grid[a] for a in axes], axis=-1)
    if places.data is not None:
        return e.constant(np.concatenate([own, places.data], axis=-1))
    joined = (*places.shape[:-1], len(axes) + places.shape[-1])
    last = len(joined) - 1
    return e.op("CONCATENATION", [e.constant(own), places], joined, axis=last, fusedActivationFunction="NONE")


# --- placing -------------------------------------------------------------------------------------------------
def _scatter_nd(e: Emitter, n: Node) -> None:
    x, indices, updates = n.require(0), n.require(1), n.require(2)
    places = _from_start(e, e.tensor(indices), x, range(indices.shape[-1]))
    _placed(e, n, places, e.tensor(updates))


def _scatter_elements(e: Emitter, n: Node) -> None:
    """SCATTER_ND, each element at its own coordinates but for one axis."""
    x, indices, updates = n.require(0), n.require(1), n.require(2)
    axis = n.int("axis", 0) % x.rank
    if indices.dynamic:
        raise Refused("it scatters where the batch is open", _BATCH)
    places = _from_start(e, e.tensor(indices), x, [axis], one=True)
    shape = indices.shape
    parts = []
    grid = np.indices(shape, dtype=np.int32)
    for a in range(x.rank):
        part = cast(e, places, np.int32) if a == axis else e.constant(grid[a])
        parts.append(e.reshape(part, (*shape, 1)))
    if all(p.data is not None for p in parts):
        whole = e.constant(np.concatenate([p.data for p in parts if p.data is not None], axis=-1))
    else:
        joined = (*shape, x.rank)
        whole = e.op("CONCATENATION", parts, joined, dtype=np.int32, axis=x.rank, fusedActivationFunction="NONE")
    _placed(e, n, whole, e.tensor(updates))


def _placed(e: Emitter, n: Node, places: Tensor, updates: Tensor) -> None:
    """SCATTER_ND adds to zeros, so a second one marks where the result is not the data's."""
    x, out = n.require(0), n.outputs[0]
    reduction = n.str("reduction", "none")
    if reduction not in ("none", "add"):
        raise Refused(f"it scatters with reduction '{reduction}'", "LiteRT has none and add")
    if x.dynamic:
        raise Refused("it scatters where the batch is open", _BATCH)
    places = cast(e, places, np.int32)
    data, shape = e.tensor(x), e.constant(np.array(x.shape, np.int32))
    scattered = e.op("SCATTER_ND", [places, updates, shape], x.shape)
    scattered.dtype = updates.dtype
    if reduction == "add":
        return finish(e, out, compute(e, "ADD", data, scattered))
    marks = e.constant(np.ones(updates.shape, np.int32))
    count = e.op("SCATTER_ND", [places, marks, shape], x.shape, dtype=np.int32)
    finish(e, out, compute(e, "SELECT_V2", compute(e, "GREATER", count, 0), scattered, data))


# --- made from indices ---------------------------------------------------------------------------------------
def _one_hot(e: Emitter, n: Node) -> None:
    indices, values, out = n.require(0), n.require(2), n.outputs[0]
    given = n.const(1)
    assert given is not None
    depth, axis = int(given.reshape(-1)[0]), n.int("axis", -1) % out.rank
    if out.dtype.name not in ("float32", "int32", "int64", "bool", "int8", "uint8"):
        raise Refused(f"LiteRT's ONE_HOT makes no {out.dtype}", "cast it to float32 or int32 in the model")
    places = e.tensor(indices)
    if places.dtype not in (np.int32, np.int64):
        places = cast(e, places, np.int64)
    places = _counted(e, places, depth)
    off, on = (_element(e, e.tensor(values), k) for k in (0, 1))
    last = -1 if axis == out.rank - 1 else axis
    e.emit(out, "ONE_HOT", [places, e.constant(np.array(depth, np.int32)), on, off], axis=last)


def _element(e: Emitter, x: Tensor, k: int) -> Tensor:
    """The k-th of a vector, as a scalar."""
    if x.data is not None:
        return e.constant(x.data[k])
    return e.op("GATHER", [x, e.constant(np.array(k, np.int32))], (), axis=0, batchDims=0)


def _trilu(e: Emitter, n: Node) -> None:
    """A constant mask; a SELECT, because a product would keep NaN and infinity."""
    x, out = n.require(0), n.outputs[0]
    given = n.const(1)
    k = 0 if given is None else int(given.reshape(-1)[0])
    if x.dynamic & {x.rank - 1, x.rank - 2}:
        raise Refused("it cuts a triangle out of the batch", _BATCH)
    ones = np.ones(x.shape[-2:], np.bool_)
    mask = np.triu(ones, k) if n.int("upper", 1) else np.tril(ones, k)
    tensor = e.tensor(x)
    if x.dtype == np.bool_:
        finish(e, out, compute(e, "LOGICAL_AND", tensor, e.constant(mask)))
    else:
        finish(e, out, compute(e, "SELECT_V2", e.constant(mask), tensor, 0))


def _eye_like(e: Emitter, n: Node) -> None:
    out = n.outputs[0]
    if out.dynamic:
        raise Refused("its result grows with the batch", _BATCH)
    e.define(out, e.constant(np.eye(out.shape[0], out.shape[1], k=n.int("k", 0), dtype=out.dtype)))


def _compress(e: Emitter, n: Node) -> None:
    x, out, condition = n.require(0), n.outputs[0], n.const(1)
    assert condition is not None
    same_scale(x, out)
    kept = np.flatnonzero(condition).astype(np.int32)
    flat = "axis" not in (n.attributes.attributes if n.attributes is not None else {})
    axis, layout = (0, identity(1)) if flat else (n.int("axis", 0) % x.rank, existing(e, x))
    if x.dynamic and (flat or axis in x.dynamic):
        raise Refused("it picks among the batch", _BATCH)
    tensor = e.reshape(e.tensor(x), (int(np.prod(x.shape)),)) if flat else e.tensor(x, layout)
    e.emit(out, "GATHER", [tensor, e.constant(kept)], layout, axis=layout.index(axis), batchDims=0)


def _reverse_sequence(e: Emitter, n: Node) -> None:
    x = n.require(0)
    layout: Layout = existing(e, x)
    time, batch = layout.index(n.int("time_axis", 0) % x.rank), layout.index(n.int("batch_axis", 1) % x.rank)
    inputs = [e.tensor(x, layout), e.tensor(n.require(1))]
    e.emit(n.outputs[0], "REVERSE_SEQUENCE", inputs, layout, seqDim=time, batchDim=batch)


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "OneHot": _one_hot,
    "Trilu": _trilu,
    "EyeLike": _eye_like,
    "Compress": _compress,
    "ReverseSequence": _reverse_sequence,
}
