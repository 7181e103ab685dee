"""Small .tflite files packed by the object API that comes with ai-edge-litert: independent of edgekit's own writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Values:
    """A tensor. data: of a constant. scales: one, or one per slice of `axis`. dtype: a name of TensorType."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "FLOAT32"
    data: np.ndarray | bytes | None = None
    scales: tuple[float, ...] = ()
    zeros: tuple[int, ...] = ()
    axis: int = 0
    signature: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Op:
    """code: of BuiltinOperator, or a custom operator's name. inputs, outputs: names of tensors; "" is none."""

    code: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    version: int = 1
    table: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def pack(
    tensors: Sequence[Values],
    operators: Sequence[Op],
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    names: tuple[Mapping[str, str], Mapping[str, str]] | None = None,
    description: str = "",
    metadata: Mapping[str, bytes] | None = None,
) -> bytes:
    """names: of the signature: ({input name: tensor}, {output name: tensor})."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.description = 3, description
    model.buffers = [schema.BufferT()]
    place = {tensor.name: index for index, tensor in enumerate(tensors)}
    graph.tensors = [_tensor(schema, model, tensor) for tensor in tensors]
    graph.inputs, graph.outputs = [place[n] for n in inputs], [place[n] for n in outputs]
    model.operatorCodes, graph.operators = [], []
    for operator in operators:
        model.operatorCodes.append(_code(schema, operator))
        graph.operators.append(_operator(schema, operator, place, len(model.operatorCodes) - 1))
    graph.name, model.subgraphs = "main", [graph]
    if names is not None:
        model.signatureDefs = [_signature(schema, names, place)]
    model.metadata = []
    for name, content in (metadata or {}).items():
        entry = schema.MetadataT()
        entry.name, entry.buffer = name, _buffer(schema, model, np.frombuffer(content, np.uint8))
        model.metadata.append(entry)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _buffer(schema: Any, model: Any, data: np.ndarray) -> int:
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(data.tobytes(), np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _tensor(schema: Any, model: Any, tensor: Values) -> Any:
    out = schema.TensorT()
    out.name, out.shape, out.type = tensor.name, list(tensor.shape), getattr(schema.TensorType, tensor.dtype)
    out.shapeSignature = None if tensor.signature is None else list(tensor.signature)
    data = np.frombuffer(tensor.data, np.uint8) if isinstance(tensor.data, bytes) else tensor.data
    out.buffer = 0 if data is None else _buffer(schema, model, data)
    if tensor.scales:
        q = schema.QuantizationParametersT()
        q.scale = list(tensor.scales)
        q.zeroPoint = list(tensor.zeros or (0,) * len(tensor.scales))
        q.quantizedDimension = tensor.axis
        out.quantization = q
    return out


def _code(schema: Any, operator: Op) -> Any:
    code = schema.OperatorCodeT()
    number = getattr(schema.BuiltinOperator, operator.code, None)
    if number is None:
        number, code.customCode = schema.BuiltinOperator.CUSTOM, operator.code
    code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), operator.version
    return code


def _operator(schema: Any, operator: Op, place: Mapping[str, int], code: int) -> Any:
    out = schema.OperatorT()
    out.opcodeIndex = code
    out.inputs = [place[n] if n else -1 for n in operator.inputs]
    out.outputs = [place[n] for n in operator.outputs]
    if operator.table:
        out.builtinOptionsType = getattr(schema.BuiltinOptions, operator.table)
        out.builtinOptions = getattr(schema, operator.table + "T")()
        for key, value in operator.options.items():
            assert hasattr(out.builtinOptions, key), key
            setattr(out.builtinOptions, key, value)
    return out


def _signature(schema: Any, names: tuple[Mapping[str, str], Mapping[str, str]], place: Mapping[str, int]) -> Any:
    out = schema.SignatureDefT()
    out.signatureKey, out.subgraphIndex = "serving_default", 0
    parts = []
    for part in names:
        maps = []
        for name, tensor in part.items():
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = name, place[tensor]
            maps.append(entry)
        parts.append(maps)
    out.inputs, out.outputs = parts
    return out


def dense(weights: np.ndarray, bias: np.ndarray, *, names: tuple[str, str] = ("x", "y"), batch: int = -1) -> bytes:
    """softmax(x · weights.T + bias): weights float32 (classes, features); an open batch unless it is given."""
    classes, features = weights.shape
    here = max(batch, 1)
    tensors = [
        Values("in", (here, features), signature=(batch, features)),
        Values("w", weights.shape, data=weights.astype(np.float32)),
        Values("b", bias.shape, data=bias.astype(np.float32)),
        Values("scores", (here, classes), signature=(batch, classes)),
        Values("out", (here, classes), signature=(batch, classes)),
    ]
    operators = [
        Op("FULLY_CONNECTED", ["in", "w", "b"], ["scores"], 1, "FullyConnectedOptions"),
        Op("SOFTMAX", ["scores"], ["out"], 1, "SoftmaxOptions", {"beta": 1.0}),
    ]
    return pack(tensors, operators, ["in"], ["out"], names=({names[0]: "in"}, {names[1]: "out"}))


def int8_dense(weights: np.ndarray, bias: np.ndarray, scale_in: float, scale_out: float, ends: str = "INT8") -> bytes:
    """The same without softmax in int8, weights per channel; ends: type of the input and output, INT8 or FLOAT32."""
    scales = np.abs(weights).max(axis=1) / 127
    q = np.rint(weights / scales[:, None]).astype(np.int8)
    b = np.rint(bias / (scales * scale_in)).astype(np.int32)
    classes, features = weights.shape
    tensors = [
        Values("qx", (1, features), "INT8", scales=(scale_in,), zeros=(0,)),
        Values("w", q.shape, "INT8", q, tuple(scales.tolist())),
        Values("b", b.shape, "INT32", b, tuple((scales * scale_in).tolist())),
        Values("qy", (1, classes), "INT8", scales=(scale_out,), zeros=(0,)),
    ]
    operators = [Op("FULLY_CONNECTED", ["qx", "w", "b"], ["qy"], 4, "FullyConnectedOptions")]
    if ends == "INT8":
        return pack(tensors, operators, ["qx"], ["qy"], names=({"x": "qx"}, {"y": "qy"}))
    tensors += [Values("fx", (1, features)), Values("fy", (1, classes))]
    operators = [Op("QUANTIZE", ["fx"], ["qx"]), *operators, Op("DEQUANTIZE", ["qy"], ["fy"], 2)]
    return pack(tensors, operators, ["fx"], ["fy"], names=({"x": "fx"}, {"y": "fy"}))
