"""In which numbers a .tflite computes, told from the types of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from edgekit.sources.tflite import NO_TENSOR, Model, Operator, Subgraph, Tensor, main
from edgekit.target import Precision

Form = Literal["int8", "uint8", "int16x8", "dynamic", "int8 weights", "float16 weights", "float16", "float32"]

# operator -> index of the weights that a kernel multiplies with
WEIGHTS: Mapping[str, int] = {
    "CONV_2D": 1,
    "DEPTHWISE_CONV_2D": 1,
    "FULLY_CONNECTED": 1,
    "TRANSPOSE_CONV": 1,
    "CONV_3D": 1,
    "CONV_3D_TRANSPOSE": 1,
    "BATCH_MATMUL": 1,
}
_INTEGER: tuple[Form, ...] = ("int8", "uint8", "int16x8")
# They change the numbers' form and compute nothing.
_CONVERTING = frozenset({"QUANTIZE", "DEQUANTIZE", "FAKE_QUANT", "DENSIFY"})
_KINDS: Mapping[str, Form] = {"qint16": "int16x8", "quint8": "uint8", "qint8": "int8", "qint4": "int8"}
_ID: Mapping[Form, Precision] = {
    "int8": "int8",
    "uint8": "int8",
    "int16x8": "int8x16",
    "dynamic": "int8-dynamic",
    "int8 weights": "int8-weights",
    "float16 weights": "float16",
    "float16": "float16",
    "float32": "float32",
}


@dataclass(frozen=True)
class Numbers:
    """id: the precision of edgekit's that is nearest; float32 only for a file without anything smaller.

    words: the same for a person. forms: operators by the numbers they compute in. layout: of the quantized weights,
    "" if there are none.
    """

    id: Precision
    words: str
    forms: Mapping[str, int]
    layout: str


def numbers(model: Model) -> Numbers:
    """Every operator that computes with numbers of the model counts, in all subgraphs; index arithmetic does not."""
    found: list[tuple[str, Form]] = []
    for graph in model.subgraphs:
        expanded = _dequantized(graph)
        for operator in graph.operators:
            form = _form(operator, graph, expanded)
            if form is not None:
                found.append((operator.name, form))
    forms = Counter(form for _, form in found)
    return Numbers(_identity(forms), _words(model, found, forms), dict(forms.most_common()), _layout(model))


def weights(operator: Operator, graph: Subgraph) -> Tensor | None:
    """The constant that a convolution or a product multiplies with, before it is dequantized; None if it has none."""
    index = WEIGHTS.get(operator.name)
    if index is None or index >= len(operator.inputs) or operator.inputs[index] == NO_TENSOR:
        return None
    place = operator.inputs[index]
    tensor = graph.tensors[_dequantized(graph).get(place, place)]
    return tensor if tensor.constant else None


def _dequantized(graph: Subgraph) -> dict[int, int]:
    """Tensor that a DEQUANTIZE or DENSIFY makes of a constant -> that constant."""
    return {
        o.outputs[0]: o.inputs[0]
        for o in graph.operators
        if o.name in ("DEQUANTIZE", "DENSIFY") and o.outputs and o.inputs and graph.tensors[o.inputs[0]].constant
    }


def _form(operator: Operator, graph: Subgraph, expanded: Mapping[int, int]) -> Form | None:
    """None for an operator that computes with no numbers of the model."""
    if operator.name in _CONVERTING:
        return None
    places = [i for i in (*operator.inputs, *operator.outputs) if i != NO_TENSOR]
    moving = {graph.tensors[i].kind for i in places if not graph.tensors[i].constant and i not in expanded}
    if not any(k.startswith(("float", "bfloat")) for k in moving):
        return next((form for kind, form in _KINDS.items() if kind in moving), None)
    constants = [graph.tensors[i] for i in operator.inputs if i != NO_TENSOR and graph.tensors[i].constant]
    if any(t.kind in _KINDS for t in constants):
        return "dynamic"
    stored = {graph.tensors[expanded[i]].kind for i in operator.inputs if i in expanded}
    if stored & set(_KINDS):
        return "int8 weights"
    if "float16" in stored:
        return "float16 weights"
    return "float16" if "float16" in moving else "float32"


def _identity(forms: Mapping[Form, int]) -> Precision:
    """The smallest numbers that any operator computes in; the most frequent integers."""
    integers = [form for form in forms if form in _INTEGER]
    if integers:
        return _ID[max(integers, key=lambda form: forms[form])]
    return next((_ID[form] for form in _ID if form in forms), "float32")


def _words(model: Model, found: list[tuple[str, Form]], forms: Mapping[Form, int]) -> str:
    integer = sum(forms.get(form, 0) for form in _INTEGER)
    if not integer:
        return _float_words(forms)
    told = {"int8": "int8", "uint8": "uint8 (the older quantization)", "int16x8": "int16 activations and int8 weights"}
    kinds = " and ".join(told[form] for form in _INTEGER if form in forms)
    if integer == len(found):
        return f"full {kinds}, {_ends(model)}"
    left = Counter(name for name, form in found if form not in _INTEGER)
    return f"mixed: {integer} of {len(found)} operators in {kinds}; float: {counted(left)}; {_ends(model)}"


def _float_words(forms: Mapping[Form, int]) -> str:
    parts = []
    for form, words in (
        ("dynamic", "dynamic range: int8 weights, activations quantized as it runs"),
        ("int8 weights", "int8 weights, dequantized to float32"),
        ("float16 weights", "float16 weights, float32 arithmetic"),
        ("float16", "float16"),
    ):
        if form in forms:
            parts.append(f"{words} ({forms[form]} operator{'s' if forms[form] > 1 else ''})")  # type: ignore[index]
    return "; ".join(parts) or "float32"


def _ends(model: Model) -> str:
    """'int8 inputs and outputs', 'int8 inputs, float32 outputs'."""
    graph = main(model)
    sides = [
        "/".join(dict.fromkeys(graph.tensors[i].dtype for i in part)) or "no" for part in (graph.inputs, graph.outputs)
    ]
    return f"{sides[0]} inputs and outputs" if sides[0] == sides[1] else f"{sides[0]} inputs, {sides[1]} outputs"


def counted(names: Mapping[str, int]) -> str:
    """'SOFTMAX, ADD ×3', the most frequent first."""
    ordered = sorted(names.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in ordered)


def _layout(model: Model) -> str:
    stored = [t for g in model.subgraphs for o in g.operators if (t := weights(o, g)) is not None]
    quantized = [t for t in stored if t.kind.startswith("q")]
    if not quantized:
        return ""
    ways = Counter(_way(t) for t in quantized)
    if len(ways) == 1 and len(quantized) == len(stored):
        return f"weights {next(iter(ways))}"
    return "weights " + _shares([*ways.items(), ("not quantized", len(stored) - len(quantized))], len(stored))


def _shares(ways: Iterable[tuple[str, int]], total: int) -> str:
    return ", ".join(f"{way} in {count} of {total} layers" for way, count in ways if count)


def _way(tensor: Tensor) -> str:
    quantization = tensor.quantization
    assert quantization is not None
    bits = tensor.dtype.lstrip("uint")
    width = "" if bits == "8" else f" in {bits} bits"
    if quantization.block:
        return f"per block of {quantization.block}{width}"
    return ("per tensor" if quantization.per_tensor else "per channel") + width
