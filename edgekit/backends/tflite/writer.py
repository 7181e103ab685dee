"""The file's graph -> bytes of a .tflite, by the schema that comes with ai-edge-litert."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.backends.tflite.graph import Array, Graph, Operator, Quant, Tensor
from edgekit.backends.tflite.rules import RULES
from edgekit.errors import UnsupportedOpError

_ALIGNMENT = 16  # LiteRT maps weights in place; XNNPACK wants them aligned
_LIMIT = 2**31 - 2**20  # a flatbuffer's offsets are 31 bits
_SCHEMA_VERSION = 3
_LAST_OLD_CODE = 127  # operator codes above this do not fit the field that old runtimes read


def write(graphs: Sequence[Graph], description: str, metadata: Mapping[str, bytes] = {}) -> bytearray:
    """The bytes of a .tflite file. Raises UnsupportedOpError if it would exceed 2 GB."""
    total = sum(t.data.nbytes for g in graphs for t in _tensors(g) if t.data is not None)
    if total >= _LIMIT:
        raise UnsupportedOpError(
            f"the weights are {total / 1e9:.1f} GB; a .tflite holds at most 2 GB",
            "use --precision int8 or another backend",
        )
    return pack(_Writer(graphs, description, metadata).model, total)


def _tensors(graph: Graph) -> Iterator[Tensor]:
    """Every tensor once: inputs, then as operators use them, then outputs."""
    seen: dict[Tensor, None] = {}
    for _, tensor in graph.inputs:
        seen.setdefault(tensor)
    for operator in graph.operators:
        for found in (*operator.inputs, *operator.outputs):
            if found is not None:
                seen.setdefault(found)
    for _, tensor in graph.outputs:
        seen.setdefault(tensor)
    return iter(seen)


def aligned(schema: Any, data: Array | None) -> Any:
    """A buffer whose bytes start at a multiple of 16; the generated Pack gives 4. data: None or empty for none."""

    class Buffer(schema.BufferT):  # type: ignore[misc]
        def Pack(self, builder: Any) -> Any:
            if data is None or data.size == 0:
                return super().Pack(builder)
            raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
            builder.StartVector(1, len(raw), _ALIGNMENT)
            builder.head = builder.head - len(raw)
            builder.Bytes[builder.head : builder.head + len(raw)] = raw
            vector = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, vector)
            return schema.BufferEnd(builder)

    return Buffer()


def pack(model: Any, size: int) -> bytearray:
    """The bytes of a ModelT. size: of its buffers, which decides how much memory is taken at once."""
    import flatbuffers

    builder = flatbuffers.Builder(size + size // 64 + 65536)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    out: bytearray = builder.Bytes
    del out[: builder.head]  # in place: Output() would copy all weights
    return out


class _Writer:
    def __init__(self, graphs: Sequence[Graph], description: str, metadata: Mapping[str, bytes]) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self.model = schema.ModelT()
        self.model.version = _SCHEMA_VERSION
        self.model.description = description
        self.model.buffers = [aligned(schema, None)]  # buffer 0 is empty by convention
        self.model.operatorCodes, self.model.subgraphs, self.model.signatureDefs = [], [], []
        self.codes: dict[tuple[int, int], int] = {}
        self.stored: dict[bytes, int] = {}
        for index, graph in enumerate(graphs):
            self._subgraph(graph, index)
        self.model.metadata = [self._metadata(name, data) for name, data in metadata.items()]

    def _store(self, data: Array) -> int:
        """Index of the buffer that holds these bytes; equal ones are one."""
        raw = np.ascontiguousarray(data.astype(np.uint8) if data.dtype == np.bool_ else data)
        key = hashlib.sha256(raw.reshape(-1).view(np.uint8).data).digest()
        if key not in self.stored:
            self.stored[key] = len(self.model.buffers)
            self.model.buffers.append(aligned(self.schema, raw.reshape(-1)))
        return self.stored[key]

    def _metadata(self, name: str, data: bytes) -> Any:
        entry = self.schema.MetadataT()
        entry.name, entry.buffer = name, self._store(np.frombuffer(data, np.uint8))
        return entry

    # --- graphs --------------------------------------------------------------------------------------
    def _subgraph(self, graph: Graph, index: int) -> None:
        tensors = list(_tensors(graph))
        number = {tensor: i for i, tensor in enumerate(tensors)}
        names = _unique([t.name or f"t{i}" for i, t in enumerate(tensors)])
        subgraph = self.schema.SubGraphT()
        subgraph.name = graph.name
        subgraph.tensors = [self._tensor(t, name) for t, name in zip(tensors, names, strict=True)]
        subgraph.inputs = [number[t] for _, t in graph.inputs]
        subgraph.outputs = [number[t] for _, t in graph.outputs]
        subgraph.operators = [self._operator(o, number) for o in graph.operators]
        self.model.subgraphs.append(subgraph)
        signature = self.schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = graph.signature, index
        signature.inputs = [self._named(name, number[t]) for name, t in graph.inputs]
        signature.outputs = [self._named(name, number[t]) for name, t in graph.outputs]
        self.model.signatureDefs.append(signature)

    def _named(self, name: str, index: int) -> Any:
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, index
        return entry

    def _tensor(self, tensor: Tensor, name: str) -> Any:
        out = self.schema.TensorT()
        out.name = name
        out.shape = list(tensor.shape)
        out.type = getattr(self.schema.TensorType, _TYPES[tensor.dtype.name])
        out.buffer = 0 if tensor.data is None else self._store(tensor.data)
        if tensor.data is not None and tensor.data.size == 0:
            out.buffer = len(self.model.buffers)  # a constant without elements still needs a buffer of its own
            self.model.buffers.append(aligned(self.schema, None))
        out.hasRank = True
        if tensor.dynamic:
            out.shapeSignature = [-1 if a in tensor.dynamic else size for a, size in enumerate(tensor.shape)]
        if tensor.quant is not None:
            out.quantization = self._quantization(tensor.quant)
        return out

    def _quantization(self, quant: Quant) -> Any:
        out = self.schema.QuantizationParametersT()
        out.scale = quant.scales.astype(np.float32)
        out.zeroPoint = quant.zeros.astype(np.int64)
        out.quantizedDimension = 0 if quant.per_tensor else quant.axis
        return out

    def _operator(self, operator: Operator, number: Mapping[Tensor, int]) -> Any:
        out = self.schema.OperatorT()
        out.opcodeIndex = self._code(operator)
        out.inputs = [-1 if t is None else number[t] for t in operator.inputs]
        out.outputs = [number[t] for t in operator.outputs]
        table = RULES[operator.code].options
        if table:
            out.builtinOptionsType = getattr(self.schema.BuiltinOptions, table)
            out.builtinOptions = self._options(table, operator.options)
        return out

    def _options(self, table: str, fields: Mapping[str, Any]) -> Any:
        options = getattr(self.schema, f"{table}T")()
        for name, value in fields.items():
            if not hasattr(options, name):
                raise AttributeError(f"{table} has no field {name}")
            setattr(options, name, self._enum(name, value))
        return options

    def _enum(self, name: str, value: Any) -> Any:
        """Names of the schema's enumerations become their numbers."""
        if not isinstance(value, str):
            return value
        return getattr(getattr(self.schema, _ENUMS[name]), value)

    def _code(self, operator: Operator) -> int:
        number = getattr(self.schema.BuiltinOperator, operator.code)
        version = version_of(operator)
        if (number, version) not in self.codes:
            entry = self.schema.OperatorCodeT()
            entry.builtinCode = number
            entry.deprecatedBuiltinCode = min(number, _LAST_OLD_CODE)
            entry.version = version
            self.codes[number, version] = len(self.model.operatorCodes)
            self.model.operatorCodes.append(entry)
        return self.codes[number, version]


def version_of(operator: Operator) -> int:
    """The lowest version of the operator whose kernel takes these tensors."""
    rule = RULES[operator.code]
    decides = operator.inputs[rule.decides]
    assert decides is not None
    version = rule.versions[decides.kind]
    if operator.code == "CAST":  # the only one whose result's type counts too
        return max(version, rule.versions[operator.outputs[0].kind])
    return version


_TYPES = {
    "float32": "FLOAT32", "float16": "FLOAT16", "float64": "FLOAT64", "int8": "INT8", "uint8": "UINT8",
    "int16": "INT16", "uint16": "UINT16", "int32": "INT32", "uint32": "UINT32", "int64": "INT64", "uint64": "UINT64",
    "bool": "BOOL", "complex64": "COMPLEX64",
}  # fmt: skip
_ENUMS = {
    "padding": "Padding",
    "fusedActivationFunction": "ActivationFunctionType",
    "mode": "MirrorPadMode",
    "inDataType": "TensorType",
    "outDataType": "TensorType",
    "outputType": "TensorType",
    "outType": "TensorType",
    "weightsFormat": "FullyConnectedOptionsWeightsFormat",
    "kernelType": "LSTMKernelType",
}


def _unique(names: Sequence[str]) -> list[str]:
    taken: set[str] = set()
    out = []
    for name in names:
        new, count = name, 1
        while new in taken:
            count += 1
            new = f"{name}_{count}"
        taken.add(new)
        out.append(new)
    return out
