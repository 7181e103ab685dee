"""Roundings that nothing needs: of a product that only float operators, or the caller, read.

The one quantized form rounds every result, because LiteRT's kernels do. A kernel that can hand out its sums as float32
(ONNX Runtime's MatMulIntegerToFloat and QGemm, all of OpenVINO's) is as fast without that rounding and nearer to the
float model: of the error of an int8 dense net's logits three quarters are the rounding of the logits themselves.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_graph as G
from edgekit.scheme import BOUNDS, WEIGHTED

# float on the runtimes that leave roundings out, whatever surrounds them
_FLOAT = frozenset({"Softmax", "LogSoftmax", "Gelu", "LayerNormalization", "Erf", "HardSwish"})
PRODUCTS = frozenset({"MatMul", "Gemm"})
# cost next to nothing in any type
_FREE = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})
# cheap in float at the end of a graph, where nothing multiplies any more
_CHEAP = (
    frozenset(
        {"Sigmoid", "Tanh", "HardSigmoid", "Relu", "Clip", "LeakyRelu", "Add", "Sub", "Mul", "Reshape", "Flatten"}
        | {"Squeeze", "Unsqueeze", "Transpose", "Slice", "Concat"}
    )
    | _FLOAT
)


def idle(model: ir.Model, producers: frozenset[str], floats: frozenset[str] = frozenset()) -> list[str]:
    """Quantized tensors of a QDQ model whose rounding can go, for kernels of `producers` that can give float32.

    floats: operators that the runtime has no integer kernels of: what they read and give is better not rounded at all.
    """
    producers = producers | floats
    outputs = {v.name for v in model.graph.outputs}
    found: set[str] = set()
    for node in reversed(list(model.graph)):
        if node.op_type != "QuantizeLinear" or node.inputs[0] is None:
            continue
        source = node.inputs[0].producer()
        if source is None or source.op_type not in producers | _CHEAP:
            continue
        readers = [r for use in node.outputs[0].uses() for r in _readers(use.node)]
        to_output = [d for use in node.outputs[0].uses() if (d := use.node).outputs[0].name in outputs]
        loose = bool(readers or to_output) and all(r.op_type in floats or _floats(r, found) for r in readers)
        if loose and (_gives_float(source, producers) or all(_ends(r, found) for r in readers)):
            found.add(node.outputs[0].name or "")
    return [n.outputs[0].name or "" for n in model.graph if n.outputs[0].name in found]


def _gives_float(node: ir.Node, producers: frozenset[str]) -> bool:
    """A product, perhaps with a Relu or Clip of its own, or what only reshapes one that nobody else reads."""
    while node.op_type in _FREE | {"Relu", "Clip"}:
        value = node.inputs[0]
        before = value.producer() if value is not None else None
        if node.op_type in _FREE:
            rounded = before.inputs[0] if before is not None and before.op_type == "DequantizeLinear" else None
            quantize = rounded.producer() if rounded is not None and len(rounded.uses()) == 1 else None
            exact = quantize.inputs[0] if quantize is not None and quantize.op_type == "QuantizeLinear" else None
            before = exact.producer() if exact is not None else None
        if before is None or before.op_type == "DequantizeLinear":
            return False
        node = before
    return node.op_type in producers


def _bounded(graph: ir.Graph, quantize: ir.Node) -> ir.Value:
    """What is rounded, behind the Relu or Clip that saturation stood for."""
    exact = quantize.inputs[0]
    assert exact is not None
    source = exact.producer()
    bounds = source.metadata_props.pop(BOUNDS, None) if source is not None else None
    if bounds is None:
        return exact
    name = f"{exact.name}_bounded"
    limits = []
    for side, text in zip(("low", "high"), bounds.split(), strict=True):
        finite = np.isfinite(float(text))
        limits.append(G.new_constant(graph, f"{name}_{side}", np.array(text, np.float32)) if finite else None)
    node = ir.node("Clip", [exact, *limits], name=name)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, exact.type, exact.shape
    graph.insert_before(quantize, node)
    return node.outputs[0]


def small_tail(model: ir.Model, share: float) -> list[str]:
    """Those of `idle` after which nothing multiplies any more, of products with at most `share` of all weights."""
    names = idle(model, PRODUCTS)
    total = sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None)
    quantizers = {n.outputs[0].name: n for n in model.graph if n.op_type == "QuantizeLinear"}
    kept, barred = [], False
    for name in reversed(names):
        source = quantizers[name].inputs[0]
        node = source.producer() if source is not None else None
        if node is None or not _leads_out(node):
            continue
        weight = _stored(node)
        if node.op_type in PRODUCTS and (weight is None or weight > share * total):
            barred = True
        kept.append(name)
    return [] if barred else kept[::-1]


def _leads_out(node: ir.Node) -> bool:
    """Whether only cheap operators lie between the node and the outputs."""
    waiting = [use.node for v in node.outputs for use in v.uses()]
    while waiting:
        reader = waiting.pop()
        if reader.op_type not in _CHEAP | {"QuantizeLinear", "DequantizeLinear"}:
            return False
        waiting += [use.node for v in reader.outputs for use in v.uses()]
    return True


def _stored(node: ir.Node) -> int | None:
    """Elements of a product's constant weight."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    reader = value.producer() if value is not None else None
    weight = M.constant(reader.inputs[0]) if reader is not None and reader.op_type == "DequantizeLinear" else None
    return None if weight is None else int(weight.size)


def _readers(dequantize: ir.Node) -> list[ir.Node]:
    return [use.node for use in dequantize.outputs[0].uses()]


def _floats(node: ir.Node, found: set[str]) -> bool:
    """Whether the node computes in float once its input does."""
    return node.op_type in _FLOAT or _ends(node, found) or not _quantizers(node) or _reads_float(node)


def _ends(node: ir.Node, found: set[str]) -> bool:
    """Whether its own result is not rounded either."""
    return node.op_type in _CHEAP and all(q.outputs[0].name in found for q in _quantizers(node))


def _reads_float(node: ir.Node) -> bool:
    """Whether some operand is no integer; of a layer, its weights."""
    if node.op_type in WEIGHTED and len(node.inputs) > 1 and M.constant(node.inputs[1]) is not None:
        return True
    makers = [v.producer() for v in node.inputs if v is not None and M.constant(v) is None]
    return any(maker is None or maker.op_type != "DequantizeLinear" for maker in makers)


def _quantizers(node: ir.Node) -> list[ir.Node]:
    """What rounds its result, or the result of the Relu or Clip that it is fused with."""
    found = []
    for value in node.outputs:
        for use in value.uses():
            if use.node.op_type == "QuantizeLinear":
                found.append(use.node)
            elif use.node.op_type in {"Relu", "Clip"} and len(value.uses()) == 1:
                found += _quantizers(use.node)
    return found


def leave_out(model: ir.Model, names: list[str]) -> ir.Model:
    """A copy in which readers of these quantized tensors get the value before its QuantizeLinear."""
    model = M.clone(model)
    graph = model.graph
    for quantize in [n for n in graph if n.op_type == "QuantizeLinear" and n.outputs[0].name in names]:
        exact = _bounded(graph, quantize)
        for dequantize, _ in list(quantize.outputs[0].uses()):
            value = dequantize.outputs[0]
            for position, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[position] = exact
                    exact.name, value.name = value.name, f"{value.name}_rounded"
                    exact.type, exact.shape = value.type, value.shape
            for reader, index in list(value.uses()):
                reader.replace_input_with(index, exact)
            graph.remove(dequantize, safe=True)
        graph.remove(quantize, safe=True)
    return model
