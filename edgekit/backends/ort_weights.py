"""A model with quantized weights (`QuantizeWeights`) in the operators that ONNX Runtime computes with them fastest.

Layouts and meanings: docs/ContribOperators.md of ONNX Runtime, MatMulNBits, DynamicQuantizeMatMul, DynamicQuantizeLSTM.
The figures that decide are of `benchmarks/weight_only.py`, ONNX Runtime 1.32 on AVX2, one thread, relative to float32:

- 4-bit groups become MatMulNBits. Up to INT8_ROWS rows at once it rounds the activations to int8, a scale per group
  (accuracy_level 4): 0.3 to 1.7 of float's time where float arithmetic on 4-bit weights takes 0.8 to 4. What that adds
  is far below the error of 4-bit weights. For more rows float arithmetic takes 1.1 to 1.3 and is what is asked for.
- MatMulNBits of 8 bits takes 2 to 180 times float's time in float arithmetic. Of DequantizeLinear and MatMul ONNX
  Runtime makes a MatMulNBits that rounds activations to int8, which nobody asked for. So 8-bit weights are written as
  Cast and Mul, which it computes once while it loads: a quarter of the file, float's speed and memory.
- DynamicQuantizeMatMul takes 0.1 to 1 of float's time (one range for all rows of a call), DynamicQuantizeLSTM 0.9.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_graph as G

Array = np.ndarray[Any, Any]

DOMAIN = "com.microsoft"
FLOAT_LEVEL, INT8_LEVEL = 1, 4  # MatMulNBits' accuracy_level: float32, or int8 activations
INT8_ROWS = 16
_LEAST_BLOCK = 16
_ACTIVATIONS = ["Sigmoid", "Tanh", "Tanh"]


def weight_only(model: ir.Model) -> ir.Model:
    """4-bit products computed from their integers, all other weights restored while the model loads."""
    rows = _rows(model)
    model = M.clone(model)
    for real in _stored(model):
        if _bits(real) == 4:
            for node, _ in list(real.outputs[0].uses()):
                _groups(model.graph, real, node, INT8_LEVEL if _few(rows, node) else FLOAT_LEVEL)
        else:
            _thaw(model.graph, real)
    return _finished(model)


def rounds_activations(model: ir.Model) -> bool:
    """Whether any layer of `weight_only` computes with int8 activations."""
    rows = _rows(model)
    return any(_few(rows, node) for real in _stored(model) if _bits(real) == 4 for node, _ in real.outputs[0].uses())


def dynamic(model: ir.Model) -> ir.Model:
    """Products and LSTMs in int8 with activations quantized as they come; other weights restored while loading."""
    model = M.clone(model)
    for real in _stored(model):
        for node, position in list(real.outputs[0].uses()):
            if G.is_op(node, "MatMul", "Gemm") and position == 1:
                _dynamic_product(model.graph, real, node)
            elif G.is_op(node, "LSTM") and position == 1 and _plain_lstm(node):
                _dynamic_lstm(model.graph, node)
        if real.outputs[0].uses():
            _thaw(model.graph, real)
    return _finished(model)


def _stored(model: ir.Model) -> list[ir.Node]:
    """Each DequantizeLinear of a constant."""
    return [n for n in model.graph if G.is_op(n, "DequantizeLinear") and G.array(n.inputs[0]) is not None]


def _bits(real: ir.Node) -> int:
    array = G.array(real.inputs[0])
    return 4 if array is not None and array.dtype.name == "int4" else 8


def _few(rows: dict[str | None, int], node: ir.Node) -> bool:
    return rows.get(node.name, INT8_ROWS + 1) <= INT8_ROWS


def _rows(model: ir.Model) -> dict[str | None, int]:
    """Node -> rows that a product with a constant has for one sample, where that is known."""
    out: dict[str | None, int] = {}
    for node in M.with_batch(model, 1).graph:
        sizes = G.dims(node.inputs[0]) if G.is_op(node, "MatMul", "Gemm") else None
        if sizes is not None and all(isinstance(s, int) for s in sizes[:-1]):
            out[node.name] = int(np.prod([int(s) for s in sizes[:-1]], dtype=np.int64))
    return out


# --- restored while loading --------------------------------------------------------------------------------
def _thaw(graph: ir.Graph, real: ir.Node) -> None:
    """DequantizeLinear, which ONNX Runtime repeats on every run, as Cast and Mul, which it folds."""
    name = real.outputs[0].name or ""
    stored, scale = G.array(real.inputs[0]), G.array(real.inputs[1])
    assert stored is not None
    assert scale is not None
    shape = [1] * stored.ndim
    shape[G.integer(real, "axis", 1)] = scale.size
    number = _node("Cast", [real.inputs[0]], f"{name}_integers", {"to": ir.DataType.FLOAT.value}, "")
    product = _node(
        "Mul", [number.outputs[0], G.new_constant(graph, f"{name}_scale", scale.reshape(shape))], name, {}, ""
    )
    product.outputs[0].type, product.outputs[0].shape = real.outputs[0].type, real.outputs[0].shape
    graph.insert_before(real, [number, product])
    _replace(graph, real, product)


# --- groups of 4 bits --------------------------------------------------------------------------------------
def _groups(graph: ir.Graph, real: ir.Node, node: ir.Node, level: int) -> None:
    q, scale, zero = _grid(real)
    inputs, outputs = q.shape
    groups = len(scale)
    block = max(_LEAST_BLOCK, 1 << (-(-inputs // groups) - 1).bit_length()) if groups == 1 else _block(real)
    name = node.name or ""
    stored = _packed(_columns(q + 8, groups * block, 8)).reshape(outputs, groups, block // 2)
    values = [
        node.inputs[0],
        G.new_constant(graph, f"{name}_packed", stored),
        G.new_constant(graph, f"{name}_scales", np.ascontiguousarray(scale.T)),
    ]
    if zero.any():
        packed = _packed(_columns(zero + 8, groups + groups % 2, 8))
        values.append(G.new_constant(graph, f"{name}_zero_points", packed))
    bias, rest = _bias(graph, node, outputs)
    if bias is not None:
        values += [None] * (5 - len(values)) + [bias]
    how = {"K": inputs, "N": outputs, "bits": 4, "block_size": block, "accuracy_level": level}
    _become(graph, node, _node("MatMulNBits", values, name, how), rest)


def _block(real: ir.Node) -> int:
    return G.integer(real, "block_size", 0)


def _columns(rows: Array, size: int, fill: int) -> Array:
    """(n, outputs) of small integers as uint8 (outputs, size)."""
    out = np.full((rows.shape[1], size), fill, np.uint8)
    out[:, : len(rows)] = rows.T
    return out


def _packed(columns: Array) -> Array:
    """Two 4-bit numbers to a byte, the first in the low half."""
    packed: Array = columns[:, 0::2] | (columns[:, 1::2] << 4)
    return packed


def _grid(real: ir.Node) -> tuple[Array, Array, Array]:
    """Integers (inputs, outputs), scales and zero points (groups, outputs), all wide enough to compute with."""
    q, scale = G.array(real.inputs[0]), G.array(real.inputs[1])
    assert q is not None
    assert scale is not None
    zero = G.array(real.inputs[2]) if len(real.inputs) > 2 else None
    scale = scale.reshape(-1, q.shape[1])
    zeros = np.zeros(scale.shape, np.int16) if zero is None else zero.astype(np.int16).reshape(scale.shape)
    return q.astype(np.int16), scale, zeros


# --- int8 as they come -------------------------------------------------------------------------------------
def _dynamic_product(graph: ir.Graph, real: ir.Node, node: ir.Node) -> None:
    scale = G.array(real.inputs[1])
    assert scale is not None
    bias, rest = _bias(graph, node, scale.size)
    values = [node.inputs[0], real.inputs[0], real.inputs[1]]
    if bias is not None:
        values += [None, bias]
    _become(graph, node, _node("DynamicQuantizeMatMul", values, node.name or "", {}), rest)


def _plain_lstm(node: ir.Node) -> bool:
    """What DynamicQuantizeLSTM can say: both weights quantized, no coupled gates, activations by name only."""
    both = all(_is_stored(node.inputs[i]) for i in (1, 2))
    given = node.attributes.get("activations")
    named = given is None or [str(a) for a in given.value] in (_ACTIVATIONS, 2 * _ACTIVATIONS)
    return both and named and not set(node.attributes) & {"activation_alpha", "activation_beta", "layout"}


def _is_stored(value: ir.Value | None) -> bool:
    real = value.producer() if value is not None else None
    return G.is_op(real, "DequantizeLinear") and real is not None and G.array(real.inputs[0]) is not None


def _dynamic_lstm(graph: ir.Graph, node: ir.Node) -> None:
    """W and R transposed to (directions, inputs, 4·hidden), with scales and zero points (directions, 4·hidden)."""
    name = node.name or ""
    stored, grids = [], []
    for position, letter in ((1, "W"), (2, "R")):
        real = node.inputs[position].producer() if node.inputs[position] is not None else None  # type: ignore[union-attr]
        assert real is not None
        q, scale = G.array(real.inputs[0]), G.array(real.inputs[1])
        assert q is not None
        assert scale is not None
        shape = (len(q), scale.size)
        stored.append(G.new_constant(graph, f"{name}_{letter}", np.ascontiguousarray(q.swapaxes(1, 2))))
        grids += [
            G.new_constant(graph, f"{name}_{letter}_scale", np.broadcast_to(scale, shape).copy()),
            G.new_constant(graph, f"{name}_{letter}_zero_point", np.zeros(shape, np.int8)),
        ]
    others = [node.inputs[i] if len(node.inputs) > i else None for i in range(3, 8)]
    outputs = [ir.Value(name=v.name, shape=v.shape, type=v.type) for v in node.outputs]
    how = list(node.attributes.values())
    new = ir.Node(
        DOMAIN, "DynamicQuantizeLSTM", [node.inputs[0], *stored, *others, *grids], how, outputs=outputs, name=name
    )
    graph.insert_before(node, new)
    _replace(graph, node, new)


# --- graph edits -------------------------------------------------------------------------------------------
def _bias(graph: ir.Graph, node: ir.Node, outputs: int) -> tuple[ir.Value | None, ir.Value | None]:
    """(a bias that the kernel adds, one that must be added after it); Gemm's beta is applied to both."""
    value = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if value is None:
        return None, None
    beta = np.float32(G.number(node, "beta", 1.0))
    array = G.array(value)
    if array is None:
        if beta == 1:
            return None, value
        scaled = _node(
            "Mul", [value, G.new_constant(graph, f"{node.name}_beta", np.array(beta))], f"{node.name}_c", {}, ""
        )
        graph.insert_before(node, scaled)
        return None, scaled.outputs[0]
    array = array * beta
    if array.size in (1, outputs) and (array.ndim < 2 or array.shape[0] == 1):
        return G.new_constant(graph, f"{node.name}_bias", np.resize(array, outputs)), None
    return None, G.new_constant(graph, f"{node.name}_bias", array)


def _become(graph: ir.Graph, node: ir.Node, new: ir.Node, rest: ir.Value | None) -> None:
    """`new` and, if there is `rest` to add, an Add take the place of `node`."""
    last = new
    graph.insert_before(node, new)
    if rest is not None:
        new.outputs[0].name = f"{node.name}_product"
        last = _node("Add", [new.outputs[0], rest], f"{node.name}_sum", {}, "")
        graph.insert_before(node, last)
    _replace(graph, node, last)


def _node(op: str, inputs: list[ir.Value | None], name: str, how: dict[str, int], domain: str = DOMAIN) -> ir.Node:
    return ir.node(op, inputs, dict(how), domain=domain, outputs=[ir.Value(name=name)], name=name)


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Readers and graph outputs of `old` get the values of `new`, which take over their names."""
    for before, after in zip(old.outputs, new.outputs, strict=True):
        name, before.name = before.name, None
        for position, output in enumerate(graph.outputs):
            if output is before:
                graph.outputs[position] = after
        before.replace_all_uses_with(after)
        after.name, after.type, after.shape = name, before.type, before.shape
    graph.remove(old, safe=True)


def _finished(model: ir.Model) -> ir.Model:
    graph = model.graph
    for node in [n for n in _stored(model) if not n.outputs[0].uses() and not n.outputs[0].is_graph_output()]:
        graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
    if any(n.domain == DOMAIN for n in graph):
        model.opset_imports[DOMAIN] = 1
    return model
