"""Elements by their place: gathers, scatters, one-hot, and tensors made of sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.graph import Tensor
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.ops.moves import same_scale
from edgekit.backends.tflite.ops.unary import cast
from edgekit.backends.tflite.values import Node, Refused, Value

_FIX_BATCH = "fix the batch: --shape INPUT=1,..."


def _places(e: Emitter, value: Value, size: int | None) -> Tensor:
    """Indices as LiteRT wants them: int32 or int64, none negative. size: what negative ones count back from."""
    if value.data is not None:
        data = value.data.astype(np.int64)
        if size is not None:
            data = np.where(data < 0, data + size, data)
            if data.size and (data.min() < 0 or data.max() >= size):
                raise Refused("a constant index is out of range")
        return e.constant(data.astype(np.int32), value.name)
    tensor = e.tensor(value)
    if tensor.dtype not in (np.int32, np.int64):
        tensor = cast(e, tensor, np.int32)
    if size is None:
        return tensor
    negative = e.op(
        "LESS", [tensor, e.constant(np.array(0, tensor.dtype))], tensor.shape, dtype=np.bool_, dynamic=tensor.dynamic
    )
    length = e.constant(np.array(size, tensor.dtype))
    moved = e.op("ADD", [tensor, length], tensor.shape, dynamic=tensor.dynamic, fusedActivationFunction="NONE")
    return e.op("SELECT_V2", [negative, moved, tensor], tensor.shape, dtype=tensor.dtype, dynamic=tensor.dynamic)


def _gather(e: Emitter, n: Node) -> None:
    x, index, out = n.require(0), n.require(1), n.outputs[0]
    same_scale(x, out)
    axis = n.int("axis", 0) % x.rank
    if axis in x.dynamic:
        raise Refused("it looks up along the batch", _FIX_BATCH)
    if x.data is None and index.rank <= 1:
        layout = existing(e, x)
    else:
        layout = identity(x.rank)
    where = layout.index(axis)
    if index.data is not None and index.rank == 0:
        return _one(e, x, out, layout, axis, int(index.data))
    places = _places(e, index, x.shape[axis])
    if layout == identity(x.rank):
        e.emit(out, "GATHER", [e.tensor(x), places], axis=axis, batchDims=0)
        return
    wanted = layout if index.rank == 1 else _dropped(layout, axis)
    e.emit(out, "GATHER", [e.tensor(x, layout), places], wanted, axis=where, batchDims=0)


def _dropped(layout: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(a - (a > axis) for a in layout if a != axis)


def _one(e: Emitter, x: Value, out: Value, layout: tuple[int, ...], axis: int, place: int) -> None:
    """One slice along an axis, which then goes."""
    place = place + x.shape[axis] if place < 0 else place
    begin = [place if a == axis else 0 for a in layout]
    shape = [1 if a == axis else x.shape[a] for a in layout]
    sizes = [-1 if a in x.dynamic else s for a, s in zip(layout, shape, strict=True)]
    dynamic = [k for k, a in enumerate(layout) if a in x.dynamic]
    parameters = [e.constant(np.array(v, np.int32)) for v in (begin, sizes)]
    cut = e.op("SLICE", [e.tensor(x, layout), *parameters], shape, quant=x.quant, dynamic=dynamic)
    wanted = _dropped(layout, axis)
    grown = [k for k, a in enumerate(wanted) if a in out.dynamic]
    e.define(out, e.reshape(cut, [out.shape[a] for a in wanted], grown, out.name), wanted)


def _gather_nd(e: Emitter, n: Node) -> None:
    x, index = n.require(0), n.require(1)
    if n.int("batch_dims", 0):
        raise Refused("batch_dims", "LiteRT's GATHER_ND has none")
    if 0 in x.dynamic and x.data is None:
        raise Refused("it looks up along the batch", _FIX_BATCH)
    same_scale(x, n.outputs[0])
    if index.data is not None:
        sizes = np.array(x.shape[: index.shape[-1]])
        data = np.where(index.data < 0, index.data + sizes, index.data)
        places = e.constant(data.astype(np.int32))
    else:
        places = e.tensor(index)
        if index.dtype not in (np.int32, np.int64):
            raise Refused(f"indices of type {index.dtype}", "use int32 or int64")
        raise Refused("computed indices, which may be negative", "LiteRT reads no negative index: make them constant")
    e.emit(n.outputs[0], "GATHER_ND", [e.tensor(x), places])


def _scatter_nd(e: Emitter, n: Node) -> None:
    """Constant places only: the data where nothing is written, the updates elsewhere."""
    x, index, updates, out = n.require(0), n.require(1), n.require(2), n.outputs[0]
    if n.str("reduction", "none") != "none":
        raise Refused("it combines what it writes with what is there", "LiteRT's SCATTER_ND only adds to zeros")
    if index.data is None or out.dynamic or x.quant is not None:
        raise Refused("its places are computed, or grow with the batch", "make the indices constant")
    sizes = np.array(out.shape[: index.shape[-1]])
    data = np.where(index.data < 0, index.data + sizes, index.data).astype(np.int32)
    flat = data.reshape(-1, data.shape[-1])
    if len(np.unique(flat, axis=0)) != len(flat):
        raise Refused("it writes one place twice")
    mask = np.zeros(out.shape, bool)
    mask[tuple(flat.T)] = True
    shape = e.constant(np.array(out.shape, np.int32))
    written = e.op("SCATTER_ND", [e.constant(data), e.tensor(updates), shape], out.shape, dtype=out.dtype)
    e.emit(out, "SELECT_V2", [e.constant(mask), written, e.tensor(x)])


def _one_hot(e: Emitter, n: Node) -> None:
    index, depth, values, out = n.require(0), n.const(1), n.const(2), n.outputs[0]
    assert depth is not None
    assert values is not None
    size = int(depth.reshape(-1)[0])
    axis = n.int("axis", -1) % out.rank
    if index.dtype not in (np.int32, np.int64):
        raise Refused(f"indices of type {index.dtype}", "use int32 or int64")
    places = _places(e, index, None)
    if index.data is None:  # ONNX counts negative places back from the depth
        low = e.op(
            "LESS",
            [places, e.constant(np.array(0, places.dtype))],
            places.shape,
            dtype=np.bool_,
            dynamic=places.dynamic,
        )
        more = e.op("ADD", [places, e.constant(np.array(size, places.dtype))], places.shape, dynamic=places.dynamic,
                    fusedActivationFunction="NONE")  # fmt: skip
        places = e.op("SELECT_V2", [low, more, places], places.shape, dtype=places.dtype, dynamic=places.dynamic)
    else:
        places = e.constant(np.where(index.data < 0, index.data + size, index.data).astype(np.int32))
    off, on = (e.constant(np.array(v, out.dtype)) for v in values.reshape(-1))
    e.emit(
        out,
        "ONE_HOT",
        [places, e.constant(np.array(size, np.int32)), on, off],
        axis=axis if axis != out.rank - 1 else -1,
    )


def _trilu(e: Emitter, n: Node) -> None:
    """A constant mask multiplies what stays by choosing between it and zero."""
    x, out = n.require(0), n.outputs[0]
    k = n.const(1)
    shift = 0 if k is None else int(k.reshape(-1)[0])
    ones = np.ones(x.shape[-2:], bool)
    mask = np.triu(ones, shift) if n.int("upper", 1) else np.tril(ones, shift)
    if {x.rank - 1, x.rank - 2} & x.dynamic:
        raise Refused("its matrices grow with the batch", _FIX_BATCH)
    if x.dtype.name not in ("float32", "int32", "int64", "bool"):
        raise Refused(f"it is {x.dtype}", "cast to float32")
    zero = e.constant(np.zeros((1,) * x.rank, x.dtype))
    e.emit(out, "SELECT_V2", [e.constant(mask.reshape((1,) * (x.rank - 2) + mask.shape)), e.tensor(x), zero])


def _shape(e: Emitter, n: Node) -> None:
    """Only reached where a size depends on the batch."""
    x, out = n.require(0), n.outputs[0]
    start, end = n.int("start", 0), n.int("end", x.rank)
    sizes = e.op("SHAPE", [e.tensor(x)], (x.rank,), dtype=np.int64, dynamic=(), outType="INT64")
    first, last, _ = slice(start, end).indices(x.rank)
    if (first, last) == (0, x.rank):
        return e.define(out, sizes)
    parameters = [e.constant(np.array([v], np.int32)) for v in (first, last - first)]
    e.emit(out, "SLICE", [sizes, *parameters])


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    "Gather": _gather,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "OneHot": _one_hot,
    "Trilu": _trilu,
    "Shape": _shape,
}
