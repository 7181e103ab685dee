"""Types and sizes of every value, with the symbolic batch followed through the graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_runtime

# Two batches tell apart all sizes that are linear in the batch. Small, as tensors of them may become constants.
_PROBES = (7, 13)
_SMALL = 1024  # elements; constants that say sizes, axes or repeats have fewer
Sizes = tuple[int | str | None, ...]


def forget(model: ir.Model) -> None:
    """Drop the shapes that a file claims for the values between its inputs and outputs, in place: they may be wrong."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    for value in (output for node in model.graph for output in node.outputs if output not in kept):
        value.shape = None


def annotate(model: ir.Model, *, thorough: bool = False) -> None:
    """Give every value of the main graph its type and shape, in place; inputs keep theirs.

    A size is an int, the batch symbol, "k*batch", or unknown where ONNX's inference does not know; then what is already
    written on the value stays. thorough: let ONNX Runtime compute every shape that follows from the batch.
    Thorough, models over protobuf's 2 GiB keep the shapes they have.
    """
    proto = M.to_proto(model)
    symbols = _batch_symbols(proto)
    if not thorough:
        _lighten(proto)
    if proto.ByteSize() >= M.PROTOBUF_LIMIT:
        return
    base = _inferred(proto, None, symbols)
    known: dict[str, Sizes] = {name: _sizes(info) for name, info in base.items()}
    if len(symbols) == 1:
        probes = [_inferred(proto, size, symbols, thorough=thorough) for size in _PROBES]
        for name in set(known).intersection(*probes):
            known[name] = _follow(known[name], [_sizes(p[name]) for p in probes], symbols[0])
    for value in (output for node in model.graph for output in node.outputs):
        info = base.get(value.name) if value.name else None
        if info is None or not info.type.HasField("tensor_type"):
            continue
        value.dtype = ir.DataType(info.type.tensor_type.elem_type)
        if info.type.tensor_type.HasField("shape") or known[info.name]:
            value.shape = ir.Shape(_merged(known[info.name], value.shape))


def _lighten(proto: onnx.ModelProto) -> None:
    """Turn weights into inputs of their sizes, in place: inference copies them again and again, and reads none."""
    given = {v.name for v in proto.graph.input}
    for tensor in proto.graph.initializer:
        if np.prod(tensor.dims) > _SMALL and tensor.name not in given:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            proto.graph.input.append(value)
    kept = [t for t in proto.graph.initializer if np.prod(t.dims) <= _SMALL or t.name in given]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def _merged(sizes: Sizes, old: ir.Shape | None) -> Sizes:
    """`sizes`, with what is unknown taken from the shape a value has already."""
    if old is None or len(old) != len(sizes):
        return sizes
    before = [d if isinstance(d, int) else d.value for d in old]
    return tuple(b if new is None else new for new, b in zip(sizes, before, strict=True))


def _batch_symbols(proto: onnx.ModelProto) -> list[str]:
    given = {i.name for i in proto.graph.initializer}
    first = [v.type.tensor_type.shape.dim[0] for v in proto.graph.input
             if v.name not in given and v.type.tensor_type.shape.dim]  # fmt: skip
    return sorted({d.dim_param for d in first if d.dim_param})


def _inferred(
    proto: onnx.ModelProto, batch: int | None, symbols: Sequence[str], *, thorough: bool = False
) -> dict[str, onnx.ValueInfoProto]:
    """Value infos of all node outputs, with the batch fixed to a number or left symbolic."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.ClearField("value_info")
    if batch is not None:
        for dim in (d for v in copy.graph.input for d in v.type.tensor_type.shape.dim):
            if dim.dim_param in symbols:
                dim.dim_value = batch
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    if thorough:
        copy = fold_runtime.simplified(copy) or copy
        copy.graph.ClearField("value_info")
    try:
        copy = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return {}
    return {v.name: v for v in (*copy.graph.value_info, *copy.graph.output)}


def _sizes(info: onnx.ValueInfoProto) -> Sizes:
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim)


def _follow(base: Sizes, probes: list[Sizes], symbol: str) -> Sizes:
    if len({len(p) for p in (base, *probes)}) != 1:
        return base
    return tuple(_size(a, b, symbol) for a, b in zip(*probes, strict=True))


def _size(first: int | str | None, second: int | str | None, symbol: str) -> int | str | None:
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    if first == second:
        return first
    factor, rest = divmod(first, _PROBES[0])
    if rest or factor * _PROBES[1] != second:
        return None
    return symbol if factor == 1 else f"{factor}*{symbol}"
