"""Shape of every tensor at batch 1, and which of its axes grow with the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import ShapeError

Shape = tuple[int, ...]
_LARGE = 4096  # elements; shapes and axes that inference reads the values of are far smaller
_BATCHES = (1, 2)  # what differs between these two grows with the batch


@dataclass(frozen=True)
class Shapes:
    """at[i]: shape by tensor name at the i-th batch of `batches`; one entry if the batch is fixed."""

    batches: tuple[int, ...]
    at: tuple[Mapping[str, Shape], ...]

    def of(self, name: str) -> tuple[Shape, frozenset[int]] | None:
        """(shape at the first batch, axes that differ at the second); None if it is unknown or its rank changes."""
        found = [shapes.get(name) for shapes in self.at]
        if any(s is None for s in found) or len({len(s) for s in found if s is not None}) != 1:
            return None
        first, last = found[0] or (), found[-1] or ()
        return first, frozenset(axis for axis, (a, b) in enumerate(zip(first, last, strict=True)) if a != b)


def shapes(model: ir.Model) -> Shapes:
    """Raises ShapeError if a size of an input other than the batch is open."""
    proto = _light(model)
    open_axes = _open_axes(proto)
    if not open_axes:
        return Shapes((0,), (_at(model, proto, open_axes, 1),))
    first, second = (_at(model, proto, open_axes, batch) for batch in _BATCHES)
    if not second:  # the graph only works for one sample, whatever its input says
        return Shapes((1,), (first,))
    return Shapes(_BATCHES, (first, second))


def _light(model: ir.Model) -> onnx.ModelProto:
    """The model with its large weights as mere inputs: inference wants only their shapes and copies all it gets."""
    proto = M.to_proto(model)
    large = [t for t in proto.graph.initializer if np.prod(t.dims, dtype=np.int64) > _LARGE]
    for tensor in large:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    kept = [t for t in proto.graph.initializer if np.prod(t.dims, dtype=np.int64) <= _LARGE]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def _open_axes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Axes of each input that hold the batch: those named as some input's first, and unnamed ones."""
    given = {i.name for i in proto.graph.initializer}
    inputs = [v for v in proto.graph.input if v.name not in given]
    first = {v.type.tensor_type.shape.dim[0].dim_param for v in inputs if v.type.tensor_type.shape.dim}
    out = {}
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        axes = [axis for axis, dim in enumerate(dims) if not dim.HasField("dim_value")]
        for axis in axes:
            symbol = dims[axis].dim_param
            if symbol and symbol not in first:
                raise ShapeError(
                    f"size {axis} of input '{value.name}' is unknown ({symbol})",
                    f"pass --shape {value.name}=SIZE,SIZE,... with numbers",
                )
        if axes:
            out[value.name] = tuple(axes)
    return out


def _at(
    model: ir.Model, proto: onnx.ModelProto, open_axes: Mapping[str, tuple[int, ...]], batch: int
) -> dict[str, Shape]:
    """Inferred shapes, and observed ones where inference gives up; empty if the model does not run at this batch."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for value in copy.graph.input:
        for axis in open_axes.get(value.name, ()):
            value.type.tensor_type.shape.dim[axis].dim_value = batch
    copy.graph.ClearField("value_info")
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    known = {t.name: tuple(t.dims) for t in copy.graph.initializer}
    known |= {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in copy.graph.input}
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True, strict_mode=batch != 1).graph
        for value in (*inferred.value_info, *inferred.output):
            dims = value.type.tensor_type.shape.dim
            if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
                known.setdefault(value.name, tuple(d.dim_value for d in dims))
    except onnx.shape_inference.InferenceError:
        if batch != 1:
            return {}
    missing = [name for node in copy.graph.node for name in node.output if name and name not in known]
    if not missing:
        return known
    seen = _observed(_whole(model, open_axes, batch), missing, batch)
    return {} if seen is None and batch != 1 else known | (seen or {})


def _whole(model: ir.Model, open_axes: Mapping[str, tuple[int, ...]], batch: int) -> ir.Model:
    """The model, weights and all, at a fixed batch."""
    proto = M.to_proto(model)
    for value in proto.graph.input:
        for axis in open_axes.get(value.name, ()):
            value.type.tensor_type.shape.dim[axis].dim_value = batch
    proto.graph.ClearField("value_info")
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    return M.from_proto(proto)


def _observed(model: ir.Model, names: list[str], batch: int) -> dict[str, Shape] | None:
    """Shapes of `names` in a run on seeded inputs; None if ONNX Runtime cannot run the model."""
    try:
        outputs = M.FloatSession(model, fetch=names, optimize=False, threads=1).run(
            M.seeded_inputs(M.signature(model), batch)
        )
    except Exception:  # ONNX Runtime's own errors share no base class; what cannot be run stays unknown
        return None
    return {name: tuple(np.shape(outputs[name])) for name in names if hasattr(outputs.get(name), "shape")}
