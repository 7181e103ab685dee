"""What a .tflite file holds: subgraphs, tensors, operators, signatures; weights stay in the mapped file."""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import MissingExtraError, ModelFileError
from edgekit.model import Signature, TensorSpec

SUFFIX = ".tflite"
IDENTIFIER = b"TFL3"
NO_TENSOR = -1  # an optional input that is left out

Array = np.ndarray[Any, Any]

_REMEDY = "download or convert it again"
# Bits of an element; the types that are missing have no fixed size.
_BITS = {
    "bool": 8, "int2": 2, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32,
    "uint32": 32, "int64": 64, "uint64": 64, "float8_e4m3fn": 8, "float8_e5m2": 8, "float16": 16, "bfloat16": 16,
    "float32": 32, "float64": 64, "complex64": 64, "complex128": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """real = scale · (stored − zero point): one of each, or one per slice of `axis`.

    block: that many elements along `axis` share a scale that another tensor holds; then there are none here.
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int = 0
    block: int = 0

    @property
    def per_tensor(self) -> bool:
        return len(self.scales) == 1


@dataclass(frozen=True)
class Tensor:
    """shape: as the file was written, usually at batch 1; shape_signature: the same, -1 where a size is open.

    dtype: numpy's name, or the schema's in lower case ("int4", "string"). start, size_bytes: of a constant's data in
    the file; start is None for what is computed. buffer: index; tensors of one buffer share their data.
    """

    name: str
    shape: tuple[int, ...]
    shape_signature: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None
    buffer: int = 0
    start: int | None = None
    size_bytes: int = 0
    variable: bool = False
    sparse: bool = False

    @property
    def constant(self) -> bool:
        return self.start is not None

    @property
    def kind(self) -> str:
        """The type by which kernels are chosen: "float32", "int64", and "qint8" for int8 with a scale."""
        return f"q{self.dtype}" if self.quantization is not None and "int" in self.dtype else self.dtype

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int | None:
        """Memory that its values take; None where the type leaves it open."""
        bits = _BITS.get(self.dtype)
        return None if bits is None else -(-self.elements * bits // 8)


@dataclass(frozen=True)
class Operator:
    """name: of the schema's BuiltinOperator, or a custom operator's own. inputs, outputs: tensors; NO_TENSOR is none.

    options: fields of its options table, enums by name. custom_bytes: size of a custom operator's options.
    """

    name: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    custom: bool = False
    custom_bytes: int = 0
    intermediates: tuple[int, ...] = ()


@dataclass(frozen=True)
class Subgraph:
    name: str
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class SignatureDef:
    """Names that callers use: name -> tensor of the subgraph."""

    key: str
    subgraph: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


@dataclass(frozen=True)
class Model:
    """A whole file. metadata: entry -> bytes. content: the mapped file, sliced without reading the rest."""

    path: Path
    version: int
    description: str
    subgraphs: tuple[Subgraph, ...]
    signatures: tuple[SignatureDef, ...]
    metadata: Mapping[str, int]
    size_bytes: int
    min_runtime: str
    content: mmap.mmap = field(repr=False, compare=False)

    def array(self, tensor: Tensor) -> Array:
        """A constant's values, read-only: a view of the file (int4: unpacked). Raises ModelFileError if it has none."""
        bits = _BITS.get(tensor.dtype, 0)
        if tensor.start is None or tensor.sparse or (bits < 8 and tensor.dtype != "int4"):
            raise ModelFileError(f"tensor '{tensor.name}' ({tensor.dtype}) holds no plain array", "choose another")
        stored = np.dtype(np.uint8) if bits < 8 else numpy_dtype(tensor.dtype)
        flat = np.frombuffer(self.content, stored, tensor.size_bytes // stored.itemsize, tensor.start)
        if bits < 8:
            pairs = np.stack([flat << 4, flat], 1).reshape(-1)[: tensor.elements]  # the low half comes first
            flat = pairs.view(np.int8) >> 4
        return flat.reshape(tensor.shape)


def is_tflite(path: Path) -> bool:
    """Whether a path is meant as a .tflite, by its name."""
    return path.suffix.lower() == SUFFIX


def read(path: Path) -> Model:
    """Open and check a .tflite; only its structure is read. Raises ModelFileError, MissingExtraError."""
    from edgekit.sources.tflite_reader import OUTSIDE, Damaged, Reader

    content = _map(path)
    if content[4:8] != IDENTIFIER:
        pointer = content[:23] == b"version https://git-lfs"
        held = "a Git LFS pointer" if pointer else "something else"
        raise ModelFileError(
            f"'{path}' holds {held}, no TFLite model", "run `git lfs pull`" if pointer else "check the path"
        )
    try:
        from ai_edge_litert import schema_py_generated as schema  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingExtraError("reading a .tflite needs its schema", "pip install 'edgekit[tflite]'") from error
    try:
        return Reader(path, content, schema).model()
    except Damaged as error:
        raise ModelFileError(f"'{path}' is damaged or truncated: {error}", _REMEDY) from error
    except OUTSIDE as error:  # what flatbuffers raises for an offset or a length that leads out of the file
        raise ModelFileError(f"'{path}' is damaged or truncated", _REMEDY) from error


def main(model: Model) -> Subgraph:
    """The graph of the only signature, else the first."""
    return model.subgraphs[model.signatures[0].subgraph if len(model.signatures) == 1 else 0]


def ends(model: Model) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Inputs and outputs of the main graph, in its order, by the names that edgekit's worker uses.

    Those are the names in the only signature, else the tensors' own.
    """
    graph = main(model)
    only = model.signatures[0] if len(model.signatures) == 1 else None
    return (
        _called(graph, graph.inputs, None if only is None else only.inputs),
        _called(graph, graph.outputs, None if only is None else only.outputs),
    )


def signature(model: Model, *, stored: bool = False) -> Signature:
    """stored: False tells the types that the worker takes and gives: float32 for integers with a scale."""
    inputs, outputs = ends(model)
    return Signature(tuple(_spec(n, t, stored) for n, t in inputs), tuple(_spec(n, t, stored) for n, t in outputs))


def _called(graph: Subgraph, indices: tuple[int, ...], table: Mapping[str, int] | None) -> list[tuple[str, Tensor]]:
    if table is None:
        return [(graph.tensors[i].name, graph.tensors[i]) for i in indices]
    place = {index: at for at, index in reversed(list(enumerate(indices)))}
    ordered = sorted(table.items(), key=lambda item: place.get(item[1], len(indices)))
    return [(name, graph.tensors[i]) for name, i in ordered]


def _spec(name: str, tensor: Tensor, stored: bool) -> TensorSpec:
    open_axes = {axis for axis, size in enumerate(tensor.shape_signature) if size == -1}
    sizes: list[int | str] = []
    for axis, size in enumerate(tensor.shape):
        sizes.append(size if axis not in open_axes else ("batch" if axis == 0 else f"unknown_{axis}"))
    quantized = tensor.kind.startswith("q") and tensor.quantization is not None and tensor.quantization.per_tensor
    return TensorSpec(name, "float32" if quantized and not stored else tensor.dtype, tuple(sizes))


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                held = "is empty" if not size else f"holds {size} bytes"
                raise ModelFileError(f"'{path}' {held}: no .tflite", _REMEDY)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise ModelFileError(f"no model '{path}'", "check the path") from error
    except OSError as error:
        what = "it is a folder" if error.errno == errno.EISDIR else error.strerror
        raise ModelFileError(f"cannot read '{path}': {what}", "check the path and its permissions") from error


def numpy_dtype(name: str) -> np.dtype[Any]:
    if name.startswith(("bfloat16", "float8")):
        import ml_dtypes

        name = getattr(ml_dtypes, name)
    return np.dtype(name)
