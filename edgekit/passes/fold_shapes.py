"""Types and sizes of every value, with the symbolic batch followed through the graph."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from edgekit import model as M

_PROBES = (1009, 2003)  # two primes no real size is a multiple of: a size that follows them follows the batch
Sizes = Mapping[str, tuple[int | str | None, ...]]


def annotate(model: ir.Model) -> None:
    """Give every value of the main graph its type and shape, in place; inputs and outputs keep theirs.

    A size is an int, the batch symbol, "k*batch", or unknown where ONNX's inference does not know.
    Models over protobuf's 2 GiB keep the shapes they have.
    """
    proto = M.to_proto(model)
    if proto.ByteSize() >= M.PROTOBUF_LIMIT:
        return
    symbols = _batch_symbols(proto)
    base = _inferred(proto, None, ())
    known: Sizes = {name: _sizes(info) for name, info in base.items()}
    if len(symbols) == 1:
        probes = [_inferred(proto, size, symbols) for size in _PROBES]
        known = {n: _follow(known.get(n, ()), [_sizes(p[n]) for p in probes], symbols[0])
                 for n in base if all(n in p for p in probes)}  # fmt: skip
    kept = {*model.graph.inputs, *model.graph.outputs}
    for value in (output for node in model.graph for output in node.outputs if output not in kept):
        info = base.get(value.name) if value.name else None
        if info is None or not info.type.HasField("tensor_type"):
            continue
        value.dtype = ir.DataType(info.type.tensor_type.elem_type)
        if info.name in known and info.type.tensor_type.HasField("shape"):
            value.shape = ir.Shape(known[info.name])


def _batch_symbols(proto: onnx.ModelProto) -> list[str]:
    given = {i.name for i in proto.graph.initializer}
    first = [v.type.tensor_type.shape.dim[0] for v in proto.graph.input
             if v.name not in given and v.type.tensor_type.shape.dim]  # fmt: skip
    return sorted({d.dim_param for d in first if d.dim_param})


def _inferred(
    proto: onnx.ModelProto, batch: int | None, symbols: tuple[str, ...] | list[str]
) -> dict[str, onnx.ValueInfoProto]:
    """Value infos of all node outputs, with the batch fixed to a number or left symbolic."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.ClearField("value_info")
    for value in copy.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if batch is not None and dim.dim_param in symbols:
                dim.dim_value = batch
    for value in copy.graph.output:
        if batch is not None:
            value.type.tensor_type.ClearField("shape")
    try:
        copy = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return {}
    return {v.name: v for v in (*copy.graph.value_info, *copy.graph.output)}


def _sizes(info: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim)


def _follow(
    base: tuple[int | str | None, ...], probes: list[tuple[int | str | None, ...]], symbol: str
) -> tuple[int | str | None, ...]:
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
