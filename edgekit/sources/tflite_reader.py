"""Walks the flatbuffer of a .tflite with the schema that comes with ai-edge-litert.

A file is untrusted: every offset and index is checked, and the work is bounded by the file's size.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.sources.tflite import NO_TENSOR, Model, Operator, Quantization, SignatureDef, Subgraph, Tensor

OUTSIDE = (struct.error, IndexError, ValueError, TypeError, OverflowError, KeyError, AttributeError)

_MOST_DIMS = 32  # more than any kernel takes
_READS_PER_BYTE = 16  # elements may be shared, so a file may be read more than once; damage would read it for ever
_NAMED_ENUMS = {
    "padding": "Padding",
    "fusedActivationFunction": "ActivationFunctionType",
    "mode": "MirrorPadMode",
    "weightsFormat": "FullyConnectedOptionsWeightsFormat",
    "inDataType": "TensorType",
    "outDataType": "TensorType",
    "outputType": "TensorType",
    "kernelType": "LSTMKernelType",
}


class Damaged(Exception):
    """What is wrong with the file, in a few words."""


@cache
def _names(enum: type) -> dict[int, str]:
    """Value -> name of a generated enum."""
    return {value: name for name, value in vars(enum).items() if not name.startswith("_")}


class Reader:
    """Walks one file. Raises Damaged, or one of OUTSIDE, for anything that is not as it must be."""

    def __init__(self, path: Path, content: mmap.mmap, schema: Any) -> None:
        self._path, self._content, self._schema = path, content, schema
        self._left = _READS_PER_BYTE * len(content)
        self._root = schema.Model.GetRootAs(content)

    def model(self) -> Model:
        root = self._root
        self._buffers = [self._extent(b) for b in self._each(root.BuffersLength(), root.Buffers)]
        self._codes = [self._code(c) for c in self._each(root.OperatorCodesLength(), root.OperatorCodes)]
        graphs = tuple(self._subgraph(g) for g in self._each(root.SubgraphsLength(), root.Subgraphs))
        if not graphs:
            raise Damaged("it has no graph")
        defs = tuple(self._signature(s, graphs) for s in self._each(root.SignatureDefsLength(), root.SignatureDefs))
        entries = {
            self._text(m.Name()): self._at(self._buffers, m.Buffer(), "buffer")
            for m in self._each(root.MetadataLength(), root.Metadata)
        }
        start, size = entries.get("min_runtime_version", (0, 0))
        return Model(
            path=self._path,
            version=root.Version(),
            description=self._text(root.Description()),
            subgraphs=graphs,
            signatures=defs,
            metadata={name: size for name, (_, size) in entries.items()},
            size_bytes=len(self._content),
            min_runtime=self._content[start : start + min(size, 16)].split(b"\0")[0].decode(),
            content=self._content,
        )

    def _spend(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise Damaged("it lists more than it holds")
        return count

    def _each(self, count: int, get: Callable[[int], Any]) -> Iterator[Any]:
        for index in range(self._spend(count)):
            yield get(index)

    def _at(self, table: list[Any], index: int, what: str) -> Any:
        if not 0 <= index < len(table):
            raise Damaged(f"{what} {index} of {len(table)}")
        return table[index]

    def _text(self, value: bytes | None) -> str:
        self._spend(len(value or b""))
        return (value or b"").decode("utf-8", errors="replace")

    def _numbers(self, length: int, values: Any) -> tuple[Any, ...]:
        """A vector of numbers; values: its AsNumpy method."""
        return tuple(values().tolist()) if self._spend(length) else ()

    def _extent(self, buffer: Any) -> tuple[int, int]:
        """(start, bytes) in the file: inside the flatbuffer, or behind it in files over 2 GB."""
        if buffer.Offset() > 1:
            start, size = buffer.Offset(), buffer.Size()
        else:
            place = buffer._tab.Offset(4)  # the generated class gives the bytes, not where they are
            start, size = (buffer._tab.Vector(place), buffer.DataLength()) if place else (0, 0)
        if start < 0 or start + size > len(self._content):
            raise Damaged("it ends inside its weights")
        return start, size

    def _code(self, code: Any) -> tuple[str, int, bool]:
        """(name, version, custom). Codes above 127 stand in the newer of the two fields."""
        number = max(code.DeprecatedBuiltinCode(), code.BuiltinCode())
        name = _names(self._schema.BuiltinOperator).get(number, f"BUILTIN_{number}")
        custom = name == "CUSTOM"
        return (self._text(code.CustomCode()) or "CUSTOM") if custom else name, code.Version(), custom

    def _subgraph(self, graph: Any) -> Subgraph:
        tensors = [self._tensor(t) for t in self._each(graph.TensorsLength(), graph.Tensors)]
        found = Subgraph(
            self._text(graph.Name()),
            tuple(tensors),
            tuple(self._operator(o, tensors) for o in self._each(graph.OperatorsLength(), graph.Operators)),
            self._numbers(graph.InputsLength(), graph.InputsAsNumpy),
            self._numbers(graph.OutputsLength(), graph.OutputsAsNumpy),
        )
        for index in (*found.inputs, *found.outputs):
            self._at(tensors, index, "tensor")
        return found

    def _operator(self, operator: Any, tensors: list[Tensor]) -> Operator:
        name, version, custom = self._at(self._codes, operator.OpcodeIndex(), "operator code")
        inputs = self._numbers(operator.InputsLength(), operator.InputsAsNumpy)
        outputs = self._numbers(operator.OutputsLength(), operator.OutputsAsNumpy)
        between = self._numbers(operator.IntermediatesLength(), operator.IntermediatesAsNumpy)
        for index in (*inputs, *outputs, *between):
            if index != NO_TENSOR:
                self._at(tensors, index, "tensor")
        return Operator(
            name, version, inputs, outputs, self._options(operator), custom, operator.CustomOptionsLength(), between
        )

    def _options(self, operator: Any) -> dict[str, Any]:
        schema = self._schema
        for kind, table, creator in (
            (operator.BuiltinOptionsType(), operator.BuiltinOptions(), schema.BuiltinOptionsCreator),
            (operator.BuiltinOptions2Type(), operator.BuiltinOptions2(), schema.BuiltinOptions2Creator),
        ):
            options = creator(kind, table) if kind and table is not None else None
            if options is not None:
                return {key: self._option(key, value) for key, value in vars(options).items()}
        return {}

    def _option(self, key: str, value: Any) -> Any:
        if isinstance(value, np.ndarray | list):
            self._spend(len(value))
            return tuple(value.tolist() if isinstance(value, np.ndarray) else value)
        if isinstance(value, bytes):
            return self._text(value)
        enum = _NAMED_ENUMS.get(key)
        return _names(getattr(self._schema, enum)).get(value, value) if enum and isinstance(value, int) else value

    def _tensor(self, tensor: Any) -> Tensor:
        shape: tuple[int, ...] = self._numbers(tensor.ShapeLength(), tensor.ShapeAsNumpy)
        declared = self._numbers(tensor.ShapeSignatureLength(), tensor.ShapeSignatureAsNumpy)
        name = self._text(tensor.Name())
        if len(shape) > _MOST_DIMS or any(size < 0 for size in shape):
            raise Damaged(f"tensor '{name[:40]}' has shape {list(shape)[:_MOST_DIMS]}")
        dtype = _names(self._schema.TensorType)[tensor.Type()].lower()
        start, size = self._at(self._buffers, tensor.Buffer(), "buffer")
        found = Tensor(
            name,
            shape,
            declared if len(declared) == len(shape) else shape,
            dtype,
            self._quantization(tensor.Quantization(), shape, name),
            tensor.Buffer(),
            start if size else None,
            size,
            tensor.IsVariable(),
            tensor.Sparsity() is not None,
        )
        if found.constant and not found.sparse and found.nbytes not in (None, size):
            raise Damaged(f"constant '{name[:40]}' has {size} bytes, not {found.nbytes}")
        return found

    def _quantization(self, q: Any, shape: tuple[int, ...], name: str) -> Quantization | None:
        if q is not None and q.DetailsType() == self._schema.QuantizationDetails.BlockwiseQuantization:
            blocks = self._schema.BlockwiseQuantization()
            blocks.Init(q.Details().Bytes, q.Details().Pos)
            return Quantization((), (), q.QuantizedDimension(), blocks.BlockSize())
        if q is None or not q.ScaleLength():
            return None
        scales = self._numbers(q.ScaleLength(), q.ScaleAsNumpy)
        zeros = self._numbers(q.ZeroPointLength(), q.ZeroPointAsNumpy) or (0,) * len(scales)
        axis = q.QuantizedDimension()
        if len(zeros) != len(scales):
            raise Damaged(f"tensor '{name[:40]}' has {len(scales)} scales and {len(zeros)} zero points")
        if len(scales) > 1 and shape and (not 0 <= axis < len(shape) or shape[axis] != len(scales)):
            raise Damaged(f"tensor '{name[:40]}' has {len(scales)} scales on axis {axis} of {list(shape)}")
        return Quantization(scales, zeros, axis)

    def _signature(self, signature: Any, graphs: tuple[Subgraph, ...]) -> SignatureDef:
        index = signature.SubgraphIndex()
        tensors = list(self._at(list(graphs), index, "subgraph").tensors)
        parts = []
        for count, get in (
            (signature.InputsLength(), signature.Inputs),
            (signature.OutputsLength(), signature.Outputs),
        ):
            part = {self._text(m.Name()): m.TensorIndex() for m in self._each(count, get)}
            for place in part.values():
                self._at(tensors, place, "tensor")
            parts.append(part)
        return SignatureDef(self._text(signature.SignatureKey()), index, *parts)
