"""ONNX files: read safely, checked node by node, brought to the opset that edgekit works in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import external_data_helper, numpy_helper, shape_inference

from edgekit import model as M
from edgekit.errors import ModelFileError, NonFiniteError, ShapeError, UnsafeModelError, UnsupportedOpError
from edgekit.sources.upgrade import to_working_opset

OLDEST_OPSET = 9
BATCH = "batch"
LARGEST_SIZE = 2**31 - 1  # what 32-bit indices reach; ONNX itself stores int64
_STANDARD = ("", "ai.onnx")
# where an infinite constant is a mask or a bound and not a broken weight
_TAKES_INFINITY = {
    "Add",
    "Where",
    "Max",
    "Min",
    "Clip",
    "Constant",
    "Expand",
    "Mul",
    "Concat",
    "Pad",
    "Cast",
    "If",
    "Loop",
}


def read(path: Path) -> onnx.ModelProto:
    """The model with its external data loaded. Raises ModelFileError, UnsafeModelError and what `check` raises."""
    proto = _parse(path)
    for tensor in _external(proto):
        external_data_helper.load_external_data_for_tensor(tensor, str(path.parent.resolve()))
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
    check(proto, path)
    return proto


def _parse(path: Path) -> onnx.ModelProto:
    """Parse and check where external data point, without reading them."""
    from google.protobuf.message import DecodeError

    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, ValueError) as error:
        raise ModelFileError(
            f"'{path}' is not an ONNX model, or it is truncated or corrupt", "export it again"
        ) from error
    except OSError as error:
        raise ModelFileError(f"cannot read '{path}': {error.strerror}", "check its permissions") from error
    if not proto.graph.output or not proto.opset_import:
        raise ModelFileError(f"'{path}' is not an ONNX model, or it is truncated (no outputs)", "export it again")
    stored = {t.name for t in proto.graph.initializer}
    if all(v.name in stored for v in proto.graph.input):
        raise ModelFileError(f"'{path}' has no inputs", "export the model again with its inputs")
    home = path.parent.resolve()
    for tensor in _external(proto):
        location = {e.key: e.value for e in tensor.external_data}.get("location", "")
        target = (home / location).resolve()
        if not location or Path(location).is_absolute() or not target.is_relative_to(home):
            raise UnsafeModelError(
                f"weight '{tensor.name}' of '{path.name}' lies outside the model's folder: '{location}'",
                "put its data beside the model",
            )
        if not target.is_file():
            raise ModelFileError(f"'{path.name}' needs its weight file '{location}'", "copy it beside the model")
    return proto


def external_files(path: Path) -> list[Path]:
    """Files beside the model that hold its weights, sorted."""
    names = {e.value for t in _external(_parse(path)) for e in t.external_data if e.key == "location"}
    return sorted(path.parent / n for n in names)


def _external(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    return (t for t in _tensors(proto.graph) if t.data_location == onnx.TensorProto.EXTERNAL)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every graph inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor: initializers and attributes, inner graphs included."""
    for inner in _graphs(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def opset(proto: onnx.ModelProto) -> int:
    """Version of the standard operator set that the model imports."""
    return max((o.version for o in proto.opset_import if o.domain in _STANDARD), default=0)


def check(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse what edgekit cannot take, naming it: versions, operators, value types, broken structure, NaN weights."""
    version, newest = opset(proto), onnx.defs.onnx_opset_version()
    if version < OLDEST_OPSET:
        raise UnsupportedOpError(
            f"'{path.name}' has opset {version}", f"edgekit reads opset {OLDEST_OPSET} and up; export again"
        )
    if version > newest:
        raise UnsupportedOpError(
            f"'{path.name}' has opset {version}", f"the installed onnx knows up to {newest}; pip install -U onnx"
        )
    local = {(f.domain, f.name) for f in proto.functions}
    for graph in _graphs(proto.graph):
        for node in graph.node:
            if (node.domain, node.op_type) not in local:
                _check_operator(node, version)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.WhichOneof("value") not in ("tensor_type", None):
            raise UnsupportedOpError(
                f"'{value.name}' is a {str(value.type.WhichOneof('value')).removesuffix('_type')}, not a tensor",
                "export the model without it (for scikit-learn: zipmap=False)",
            )
    # the checker calls the first GroupNormalization deprecated; exporters wrote it, and `upgrade` rewrites it
    old_group_norm = version < 21 and any(n.op_type == "GroupNormalization" for n in proto.graph.node)
    try:
        if proto.ByteSize() < M.PROTOBUF_LIMIT and not old_group_norm:
            onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ModelFileError(
            f"'{path.name}' is not a valid ONNX model: {str(error).splitlines()[0]}", "export it again"
        ) from error
    _check_weights(proto)


def _check_operator(node: onnx.NodeProto, version: int) -> None:
    at = f"node '{node.name}'" if node.name else f"the node that makes '{next(iter(node.output), '?')}'"
    if node.domain not in _STANDARD:
        raise UnsupportedOpError(
            f"operator {node.domain}.{node.op_type} ({at}) is not a standard ONNX operator",
            "export with standard operators",
        )
    if not onnx.defs.has(node.op_type, version, ""):
        raise UnsupportedOpError(f"operator {node.op_type} ({at}) does not exist in opset {version}", "export it again")


def _check_weights(proto: onnx.ModelProto) -> None:
    """NaN nowhere; infinity only where a mask or a bound would hold it."""
    readers: dict[str, set[str]] = {}
    for graph in _graphs(proto.graph):
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, set()).add(node.op_type)
    for tensor in _tensors(proto.graph):
        if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16):
            continue
        array = numpy_helper.to_array(tensor)
        if np.isnan(array).any():
            raise NonFiniteError(f"weight '{tensor.name}' holds NaN", "train or export the model again")
        if np.isinf(array).any() and not _is_mask(array, readers.get(tensor.name, set())):
            raise NonFiniteError(f"weight '{tensor.name}' holds infinity", "train or export the model again")


def _is_mask(array: np.ndarray[Any, Any], readers: set[str]) -> bool:
    """Infinity masks or bounds if no weighted operator reads it; what is added or multiplied is otherwise 0 or 1."""
    if readers & {"Add", "Mul"} and not np.isin(array[np.isfinite(array)], (0, 1)).all():
        return False
    return readers <= _TAKES_INFINITY


# --- to the opset edgekit works in -----------------------------------------------------------------
def upgrade(proto: onnx.ModelProto, shapes: dict[str, tuple[int, ...]], path: Path) -> onnx.ModelProto:
    """A copy with every size but the batch known, local functions inlined, and opset >= 21."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _drop_initializer_inputs(model)
    _fix_shapes(model, shapes)
    if opset(model) < M.MIN_OPSET:
        model = _converted(model, path)
    model.ir_version = max(model.ir_version, 10)  # the first that knows opset 21
    for unused in [o for o in model.opset_import if o.domain not in _STANDARD]:
        model.opset_import.remove(unused)
    return _inferred(model, path)


def _drop_initializer_inputs(model: onnx.ModelProto) -> None:
    """Before IR version 4 every weight had to be listed as an input too."""
    stored = {t.name for t in model.graph.initializer}
    for value in [v for v in model.graph.input if v.name in stored]:
        model.graph.input.remove(value)


def _fix_shapes(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> None:
    """Apply --shape; ask for whatever else is unknown; call the free batch "batch"."""
    names = [v.name for v in model.graph.input]
    for name in shapes:
        if name not in names:
            raise ShapeError(
                f"--shape names an input '{name}' that the model does not have", "its inputs: " + ", ".join(names)
            )
    for value in model.graph.input:
        tensor = value.type.tensor_type
        given = shapes.get(value.name)
        if not tensor.HasField("shape") and given is None:
            raise ShapeError(
                f"the shape of input '{value.name}' is unknown", f"pass --shape {value.name}=SIZE,SIZE,..."
            )
        if given is not None:
            _apply_shape(value.name, tensor, given)
        for axis, dim in enumerate(tensor.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                continue
            if axis == 0:
                dim.Clear()
                dim.dim_param = BATCH
            else:
                known = [
                    str(d.dim_value) if d.dim_value > 0 else ("?" if i else "1") for i, d in enumerate(tensor.shape.dim)
                ]
                raise ShapeError(
                    f"size {axis} of input '{value.name}' is unknown ({dim.dim_param or 'unnamed'})",
                    f"pass --shape {value.name}={','.join(known)} with a number for each ?",
                )


def _apply_shape(name: str, tensor: Any, given: tuple[int, ...]) -> None:
    dims = tensor.shape.dim
    for size in given:
        if size != -1 and not 1 <= size <= LARGEST_SIZE:
            raise ShapeError(f"--shape {name} has a size of {size}", "give sizes from 1, or ? to leave one open")
    if tensor.HasField("shape") and len(dims) != len(given):
        raise ShapeError(f"--shape {name} has {len(given)} sizes, the input has {len(dims)}", "give one for each axis")
    for axis, size in enumerate(given):
        if tensor.HasField("shape") and axis < len(dims) and dims[axis].dim_value > 0:
            if size not in (-1, dims[axis].dim_value):
                raise ShapeError(
                    f"--shape {name} sets size {axis} to {size}, the model says {dims[axis].dim_value}",
                    "it cannot be changed",
                )
            continue
        dim = dims[axis] if axis < len(dims) else dims.add()
        if size > 0:
            dim.Clear()
            dim.dim_value = size


def _converted(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The onnx package's own version converter."""
    model.graph.ClearField("value_info")  # stale shapes make its adapters fail
    version = opset(model)
    for extra in [o for o in model.opset_import if o.domain not in _STANDARD]:
        model.opset_import.remove(extra)
    try:
        return to_working_opset(model, version)
    except Exception as error:
        text = " ".join(str(error).split())
        raise UnsupportedOpError(
            f"'{path.name}' cannot be brought from opset {version} to {M.MIN_OPSET}: {text[:160]}",
            f"export it with opset {M.MIN_OPSET}",
        ) from error


def _inferred(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Types and shapes of all values, from the inputs on; an output's stated size is kept where inference has none."""
    model.graph.ClearField("value_info")
    stated = {v.name: onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in model.graph.output}
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:
        raise ModelFileError(f"'{path.name}': {' '.join(str(error).split())[:160]}", "export it again") from error
    for value in inferred.graph.output:
        if not value.type.tensor_type.HasField("shape"):
            value.CopyFrom(stated[value.name])
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if axis == 0 and dim.dim_value == 0:
                    dim.Clear()
                    dim.dim_param = BATCH
    return inferred


def with_batch_name(proto: onnx.ModelProto, model: ir.Model) -> onnx.ModelProto:
    """A copy whose outputs say what running at two batch sizes shows: fixed sizes, and the batch as "batch"."""
    sig = M.signature(model)
    sizes = (M.batch_of(sig),) if M.batch_of(sig) else (2, 3)
    session = M.FloatSession(model, optimize=False)
    high = index_limit(model)
    seen = [session.run(M.seeded_inputs(sig, size or 1, high=high)) for size in sizes]
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    for value in out.graph.output:
        shapes = [run[value.name].shape for run in seen]
        dims = value.type.tensor_type.shape.dim
        del dims[:]
        for axis, size in enumerate(shapes[0]):
            if len(shapes) == 2 and shapes[1][axis] != size:
                dims.add().dim_param = BATCH if (size, shapes[1][axis]) == sizes else f"{BATCH}_{axis}"
            else:
                dims.add().dim_value = size
    return out


def index_limit(model: ir.Model) -> int:
    """The largest number of rows that integer inputs may index: that of the smallest table they reach, else 2."""
    limits = []
    for value in model.graph.inputs:
        seen, queue = set(), [value]
        while queue:
            current = queue.pop()
            for node, index in current.uses():
                table = M.constant(node.inputs[0]) if node.op_type == "Gather" and index == 1 else None
                if table is not None and table.ndim:
                    limits.append(int(table.shape[0]))
                elif (
                    node.op_type in ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Transpose")
                    and node not in seen
                ):
                    seen.add(node)
                    queue.extend(node.outputs)
    return min(limits, default=2)
