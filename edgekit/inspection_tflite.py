"""What a .tflite is made of and what it costs, in the same form as `inspection.inspect` tells it of an ONNX model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from edgekit import backends
from edgekit.backends.tflite import check
from edgekit.backends.tflite import graph as written
from edgekit.backends.tflite.rules import RULES
from edgekit.inspection import INSPECT_SCHEMA, Layer, Step, peak
from edgekit.inspection_precision import counted, numbers
from edgekit.sources.tflite import NO_TENSOR, Model, Operator, Subgraph, Tensor, ends, main, numpy_dtype, signature
from edgekit.sources.tflite_versions import oldest_runtime

BACKEND = "tflite"
# Custom operators whose kernels come with the LiteRT interpreter: tensorflow/lite/kernels/register.cc
_OWN_CUSTOM = frozenset({"NumericVerify", "Mfcc", "AudioSpectrogram", "TFLite_Detection_PostProcess"})
_MOST_READ = 4  # inputs that the checks look at
_VIEWS = frozenset({"RESHAPE", "SQUEEZE", "EXPAND_DIMS"})
# They multiply and accumulate, in a way that is not counted here.
_UNCOUNTED = frozenset({
    "LSTM", "RNN", "SVDF", "UNIDIRECTIONAL_SEQUENCE_RNN", "BIDIRECTIONAL_SEQUENCE_RNN", "BIDIRECTIONAL_SEQUENCE_LSTM",
    "STABLEHLO_DOT_GENERAL", "STABLEHLO_CONVOLUTION",
})  # fmt: skip


def inspect(model: Model) -> dict[str, Any]:
    """Describe a .tflite; JSON-ready. The keys of `inspection.inspect` (opset is None), and besides:

    format, size_bytes, description, versions {operator: [versions]}, precision {id, words, operators, layout},
    kernels {operator: count of those that XNNPACK does not run}, notes, min_runtime (the oldest TFLite that has all
    operators in their versions), min_runtime_metadata (what the file says), metadata (names of entries), signatures
    (their keys).
    """
    graph = main(model)
    seen: set[int] = set()
    rows = [_layer(o, graph, seen) for o in graph.operators]
    constants = {t.start: t.size_bytes for g in model.subgraphs for t in g.tensors if t.constant}
    most, at = activation_peak(graph)
    operators = [o for g in model.subgraphs for o in g.operators]
    names = Counter(o.name for o in operators)
    told = numbers(model)
    oldest, unlisted = oldest_runtime((o.name, o.version) for o in operators)
    return {
        "schema": INSPECT_SCHEMA,
        "format": "tflite",
        "size_bytes": model.size_bytes,
        "description": model.description,
        "signature": _signature(model),
        "opset": None,
        "nodes": len(operators),
        "ops": dict(sorted(names.items(), key=lambda item: (-item[1], item[0]))),
        "versions": {n: sorted({o.version for o in operators if o.name == n}) for n in sorted(names)},
        "precision": {"id": told.id, "words": told.words, "operators": told.forms, "layout": told.layout},
        "kernels": own_kernels(model),
        "notes": _notes(model),
        "min_runtime": oldest,
        "min_runtime_metadata": model.min_runtime or None,
        "metadata": sorted(model.metadata),
        "signatures": [s.key for s in model.signatures],
        "parameters": sum(r.parameters for r in rows),
        "weight_bytes": sum(constants.values()),
        "macs": None if any(r.macs is None for r in rows) else sum(r.macs or 0 for r in rows),
        "activation_peak_bytes": most,
        "activation_peak_at": at if most is not None else None,
        "layers": [asdict(r) for r in rows],
        "backends": {BACKEND: _verdict(model)},
        "reasons": [*_reasons(model, graph, rows, None if most is not None else at), *_newer(unlisted)],
    }


def _signature(model: Model) -> dict[str, Any]:
    """With the types that the file stores and, for integers that mean numbers, scale and zero point."""
    told = signature(model, stored=True).to_json()
    for side, tensors in zip(("inputs", "outputs"), ends(model), strict=True):
        for spec, (_, tensor) in zip(told[side], tensors, strict=True):
            q = tensor.quantization
            if q is not None and q.per_tensor and tensor.kind.startswith("q"):
                spec["quantization"] = {"scale": q.scales[0], "zero_point": q.zero_points[0]}
    return told


def _verdict(model: Model) -> dict[str, Any]:
    """Whether LiteRT has kernels for all operators; it is not run here."""
    install = backends.get(BACKEND).missing()
    refused = []
    for name in sorted({o.name for g in model.subgraphs for o in g.operators if o.custom} - _OWN_CUSTOM):
        needs = "the kernels of TensorFlow" if name.startswith("Flex") else "a kernel of its own"
        refused.append(f"custom operator '{name}' needs {needs}")
    if install:
        return {"takes": None, "refuses": refused, "missing": install}
    return {"takes": not refused, "refuses": refused, "missing": None}


def _newer(unlisted: Sequence[str]) -> list[str]:
    """Why the oldest runtime is unknown."""
    return [f"oldest runtime: {', '.join(unlisted)}: custom, or newer than TFLite 2.13"] if unlisted else []


def _reasons(model: Model, graph: Subgraph, rows: list[Layer], unknown: str | None) -> list[str]:
    """Why figures are missing, and what they leave out."""
    out = [f"MACs: those of {r.op} (at '{r.name}') are not counted" for r in rows if r.macs is None]
    custom = Counter(o.name for o in graph.operators if o.custom)
    if custom:
        out.append(f"MACs: those of custom operators are not counted: {counted(custom)}")
    if len(model.subgraphs) > 1:
        out.append(
            f"layers, MACs and activations are those of graph '{graph.name}', the first of {len(model.subgraphs)}"
        )
    if unknown is not None:
        out.append(f"activation memory: the size of '{unknown}' is unknown")
    samples = {t.shape[0] for _, t in ends(model)[0] if len(t.shape) > 1 and t.shape_signature[0] != -1}
    if len(samples) == 1 and samples != {1}:
        out.append(f"the figures are for the {samples.pop()} samples that the file takes at once")
    if any(-1 in t.shape_signature[1:] for t in graph.tensors):
        out.append("sizes that the file leaves open are counted as it states them")
    return out


# --- layers -------------------------------------------------------------------------------------------


def _layer(operator: Operator, graph: Subgraph, seen: set[int]) -> Layer:
    """seen: starts of the constants that earlier layers were charged with."""
    own = {}
    for tensor in (graph.tensors[i] for i in operator.inputs if i != NO_TENSOR):
        if tensor.start is not None and tensor.start not in seen:
            own[tensor.start] = tensor
    seen.update(own)
    out = graph.tensors[operator.outputs[0]] if operator.outputs else None
    return Layer(
        name=_name(operator, graph),
        op=operator.name,
        shape=out.shape if out is not None else None,
        macs=macs(operator, graph),
        parameters=sum(t.elements for t in own.values() if _learned(t)),
        weight_bytes=sum(t.size_bytes for t in own.values()),
    )


def _name(operator: Operator, graph: Subgraph) -> str:
    """Operators have none: that of what they make."""
    return graph.tensors[operator.outputs[0]].name if operator.outputs else operator.name


def _learned(tensor: Tensor) -> bool:
    """Floats or integers with a scale; shapes, axes and single numbers are not learned."""
    return tensor.kind.startswith(("q", "float", "bfloat")) and tensor.elements > 1


def macs(operator: Operator, graph: Subgraph) -> int | None:
    """Multiply-accumulates of one operator: 0 if it has none, None if they are not counted here.

    Padding is counted as if it were data, as the published figures of the MLPerf Tiny models do.
    """
    if operator.name in _UNCOUNTED:
        return None
    count = _MACS.get(operator.name)
    if count is None:
        return 0
    shapes = [graph.tensors[i].shape if i != NO_TENSOR else () for i in operator.inputs]
    try:
        return count(operator, shapes, graph.tensors[operator.outputs[0]].shape)
    except IndexError:  # fewer inputs or axes than the operator has
        return None


Shapes = list[tuple[int, ...]]


def _batch_matmul(operator: Operator, shapes: Shapes, out: tuple[int, ...]) -> int:
    return math.prod(out) * shapes[0][-2 if operator.options.get("adjX") else -1]


def _lstm(operator: Operator, shapes: Shapes, out: tuple[int, ...]) -> int:
    """x (steps, batch, inputs) or (batch, steps, inputs); weights of 4 gates from the input, 4 from the state."""
    projection = math.prod(shapes[16]) if shapes[16] else 0
    return math.prod(shapes[0][:2]) * (sum(math.prod(s) for s in shapes[1:9] if s) + projection)


_MACS: Mapping[str, Callable[[Operator, Shapes, tuple[int, ...]], int]] = {
    "CONV_2D": lambda o, s, out: math.prod(out) * math.prod(s[1][1:]),  # weights (out, h, w, in / groups)
    "DEPTHWISE_CONV_2D": lambda o, s, out: math.prod(out) * s[1][1] * s[1][2],  # (1, h, w, out)
    "FULLY_CONNECTED": lambda o, s, out: math.prod(out) * s[1][-1],  # (out, in)
    "TRANSPOSE_CONV": lambda o, s, out: math.prod(s[2]) * math.prod(s[1][:3]),  # (out, h, w, in), x is the third
    "CONV_3D": lambda o, s, out: math.prod(out) * math.prod(s[1][:4]),  # (d, h, w, in, out)
    "CONV_3D_TRANSPOSE": lambda o, s, out: math.prod(s[2]) * math.prod(s[1][:4]),  # (d, h, w, out, in)
    "BATCH_MATMUL": _batch_matmul,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _lstm,
}


def activation_peak(graph: Subgraph) -> tuple[int | None, str]:
    """`inspection.peak` of a graph in the file's order; (None, tensor) if that tensor's size is unknown."""

    def computed(indices: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i for i in indices if i != NO_TENSOR and not graph.tensors[i].constant)

    steps = []
    for o in graph.operators:
        reads, writes = computed(o.inputs), computed(o.outputs)
        steps.append(
            Step(_name(o, graph), reads, writes, o.name in _VIEWS and reads[:1] == o.inputs[:1] and bool(writes))
        )
    sizes = {i: t.nbytes for i, t in enumerate(graph.tensors) if t.nbytes is not None}
    states = [i for i, t in enumerate(graph.tensors) if t.variable]
    most, at = peak(steps, computed((*graph.inputs, *states)), computed((*graph.outputs, *states)), sizes)
    return most, graph.tensors[at].name if isinstance(at, int) else str(at)


# --- kernels ------------------------------------------------------------------------------------------


def own_kernels(model: Model) -> dict[str, int]:
    """Operators that XNNPACK does not take in the numbers they compute in: LiteRT's own, slower kernels run them."""
    found = Counter(o.name for g in model.subgraphs for o in g.operators if not _taken(o, g, model))
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _taken(operator: Operator, graph: Subgraph, model: Model) -> bool:
    """By XNNPACK, or at no cost by whoever runs it."""
    if operator.name in check.FREE:
        return True
    seen = _written(operator, graph, model)
    return operator.name in RULES and bool(seen.outputs) and check.delegated(seen)


def _notes(model: Model) -> list[str]:
    """What a user should know of sums that could leave int32."""
    graph = main(model)
    wide = [_name(o, graph) for o in graph.operators if _overflows(_written(o, graph, model))]
    if not wide:
        return []
    return [f"sums of {len(wide)} layer(s) could leave int32 on some input and wrap: '{wide[0]}'"]


def _overflows(operator: written.Operator) -> bool:
    try:
        return check.overflows(operator)
    except (ValueError, IndexError):  # weights and bias do not fit each other: LiteRT refuses such a file
        return False


def _written(operator: Operator, graph: Subgraph, model: Model) -> written.Operator:
    """In the form that edgekit's own lowering checks; inputs that are left out at the end are None there."""
    inputs = [None if i == NO_TENSOR else _tensor(graph.tensors[i], model) for i in operator.inputs]
    inputs += [None] * (_MOST_READ - len(inputs))
    outputs = [_tensor(graph.tensors[i], model) for i in operator.outputs if i != NO_TENSOR]
    return written.Operator(operator.name, inputs, outputs, operator.options)


def _tensor(tensor: Tensor, model: Model) -> written.Tensor:
    q, quant, dtype = tensor.quantization, None, _dtype(tensor)
    if q is not None and q.scales:
        quant = written.Quant(np.array(q.scales, np.float32), np.array(q.zero_points, np.int64), q.axis)
    plain = tensor.constant and not tensor.sparse and dtype.name == tensor.dtype
    return written.Tensor(tensor.name, dtype, tensor.shape, frozenset(), quant, model.array(tensor) if plain else None)


def _dtype(tensor: Tensor) -> np.dtype[Any]:
    """By which a kernel is chosen: XNNPACK takes the older uint8 quantization where it takes int8."""
    if tensor.kind == "quint8":
        return np.dtype(np.int8)
    try:
        return numpy_dtype(tensor.dtype)
    except TypeError:  # int4, string, resource: no rule names them
        return np.dtype(object)
