"""In-memory model helpers: signature, files, fixed batch, and running a model in float.

A *model* everywhere in edgekit is an `onnx_ir.Model`, opset >= 21, with named, shaped inputs and outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.errors import ShapeError

MIN_OPSET = 21  # int8 QDQ with every type the scheme needs; DESIGN "The one quantized form"
PROTOBUF_LIMIT = 2**31 - 1  # bytes one protobuf message may hold

Tensors = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `shape` holds ints, or a str for a symbolic size; dim 0 is the batch if symbolic."""

    name: str
    dtype: str  # numpy name: "float32", "int32", ...
    shape: tuple[int | str, ...]

    @property
    def dynamic_batch(self) -> bool:
        return bool(self.shape) and isinstance(self.shape[0], str)

    def concrete(self, batch: int) -> tuple[int, ...]:
        """The shape with the batch filled in. Raises ShapeError if another size is unknown."""
        out: list[int] = []
        for axis, size in enumerate(self.shape):
            if isinstance(size, int):
                out.append(size)
            elif axis == 0:
                out.append(batch)
            else:
                raise ShapeError(
                    f"size {axis} of tensor '{self.name}' is unknown ({size})",
                    f"pass --shape {self.name}=" + ",".join(str(s) for s in self.shape) + " with numbers",
                )
        return tuple(out)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TensorSpec:
        return TensorSpec(data["name"], data["dtype"], tuple(data["shape"]))


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a model, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        return {"inputs": [s.to_json() for s in self.inputs], "outputs": [s.to_json() for s in self.outputs]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Signature:
        return Signature(
            tuple(TensorSpec.from_json(s) for s in data["inputs"]),
            tuple(TensorSpec.from_json(s) for s in data["outputs"]),
        )


def signature(model: ir.Model) -> Signature:
    """The model's inputs (initializers excluded) and outputs."""
    given = set(model.graph.initializers)
    return Signature(
        tuple(_spec(v) for v in model.graph.inputs if v.name not in given),
        tuple(_spec(v) for v in model.graph.outputs),
    )


def _spec(value: ir.Value) -> TensorSpec:
    dtype = value.dtype.numpy().name if value.dtype is not None else "float32"
    shape: list[int | str] = []
    for axis, size in enumerate(value.shape or ()):
        shape.append(size if isinstance(size, int) else (size.value or f"unknown_{axis}"))
    return TensorSpec(value.name or "", dtype, tuple(shape))


def batch_of(sig: Signature) -> int | None:
    """The fixed batch size that the model demands, or None when the batch is dynamic in every input."""
    fixed = {s.shape[0] for s in sig.inputs if s.shape and not s.dynamic_batch}
    return int(min(fixed)) if fixed else None


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as an onnx.ModelProto."""
    proto: onnx.ModelProto = ir.to_proto(model)
    return proto


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    model: ir.Model = ir.from_proto(proto)
    return model


def to_bytes(model: ir.Model) -> bytes:
    data: bytes = to_proto(model).SerializeToString(deterministic=True)
    return data


def clone(model: ir.Model) -> ir.Model:
    """A copy that shares no mutable state with `model` (weights are immutable and may be shared)."""
    return from_proto(to_proto(model))


def save(model: ir.Model, path: Path) -> None:
    """Write a .onnx file; weights go to `<name>.data` beside it when one protobuf message cannot hold them."""
    proto = to_proto(model)
    large = proto.ByteSize() >= PROTOBUF_LIMIT
    onnx.save_model(
        proto,
        str(path),
        save_as_external_data=large,
        location=f"{path.name}.data" if large else None,
        size_threshold=1024,
    )


def with_batch(model: ir.Model, batch: int) -> ir.Model:
    """A copy whose symbolic batch is a fixed number, all shapes inferred anew."""
    proto = to_proto(model)
    given = {i.name for i in proto.graph.initializer}
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in given and dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = batch
    for value in proto.graph.output:  # left to inference, which may know more once the batch is fixed
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    proto.graph.ClearField("value_info")
    return from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def opset(model: ir.Model) -> int:
    return model.opset_imports.get("", 1)


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The value as an array if it is an initializer or the output of a Constant node, else None."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def difference(want: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """Largest |want - got| / max |want|; infinite for another shape, integer or bool, and for NaN or Inf misplaced."""
    if want.shape != got.shape:
        return float("inf")
    if not np.issubdtype(want.dtype, np.floating):
        return 0.0 if np.array_equal(want, got) else float("inf")
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)) or not np.array_equal(want[~finite], got[~finite], equal_nan=True):
        return float("inf")
    scale = float(np.abs(want[finite]).max(initial=0)) or 1.0
    return float(np.abs(want[finite].astype(np.float64) - got[finite]).max(initial=0)) / scale


def runtime_version() -> str:
    """Version of the ONNX Runtime that computes the float results."""
    import onnxruntime as ort

    return str(ort.__version__)


def runtime_message(error: BaseException) -> str:
    """ONNX Runtime's message in one line, without its code prefix and source location."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return re.sub(r"/\S+/onnxruntime/\S+ ", "", text)


class FloatSession:
    """Runs a model with ONNX Runtime on this CPU: the float results that everything else is compared with.

    fetch: names of intermediate values to return besides the outputs.
    optimize: False runs the graph as it is written, node by node.
    """

    def __init__(self, model: ir.Model, fetch: Iterable[str] = (), *, optimize: bool = True, threads: int = 0) -> None:
        import onnxruntime as ort

        proto = to_proto(model)
        present = {o.name for o in proto.graph.output}
        self.names: list[str] = [o.name for o in proto.graph.output]
        for name in fetch:
            if name not in present:
                proto.graph.output.append(onnx.ValueInfoProto(name=name))
                present.add(name)
                self.names.append(name)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        # else the threads wait for the next run in a loop: a quarter of a search's CPU seconds, for nothing
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Tensors:
        """inputs: one array per graph input, batch first. Returns every output (and fetched value) by name."""
        return dict(zip(self.names, self._session.run(self.names, dict(inputs)), strict=True))


def seeded_inputs(sig: Signature, batch: int, seed: int = 0, high: int = 2) -> Tensors:
    """Inputs that fit a signature: uniform [0, 1) floats, integers in [0, high). Same seed, same arrays."""
    rng = np.random.default_rng(seed)
    out: Tensors = {}
    for spec in sig.inputs:
        shape = spec.concrete(batch)
        if np.issubdtype(np.dtype(spec.dtype), np.floating):
            out[spec.name] = rng.random(shape).astype(spec.dtype)
        elif spec.dtype == "bool":
            out[spec.name] = rng.random(shape) < 0.5
        else:
            out[spec.name] = rng.integers(0, high, shape).astype(spec.dtype)
    return out
