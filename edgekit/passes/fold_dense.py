"""Dense layers over more axes than two, with their bias: MatMul and Add become one Gemm between two Reshapes.

ONNX gives a MatMul no bias. Left apart, a quantized sum is rounded twice, once before its bias and once after; kernels
of every runtime add the bias to the int32 sums.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G

_MOST_UNKNOWN = 1  # sizes that a constant Reshape can leave open


def fold(graph: ir.Graph) -> bool:
    """One sweep over the graph; True if anything changed."""
    changed = False
    for node in list(graph):
        if node.graph is not None and G.is_op(node, "Add") and len(node.inputs) == 2:
            changed = _dense(node) or changed
    return changed


def _dense(node: ir.Node) -> bool:
    """MatMul, perhaps a Reshape of its features, Add of a constant -> Reshape, Gemm, Reshape."""
    constants = [i for i, v in enumerate(node.inputs) if G.array(v) is not None]
    if len(constants) != 1:
        return False
    constant, summed = G.array(node.inputs[constants[0]]), node.inputs[1 - constants[0]]
    reshape = G.sole_producer(summed, "Reshape")
    product = G.sole_producer(reshape.inputs[0] if reshape is not None else summed, "MatMul")
    weight = G.array(product.inputs[1]) if product is not None else None
    if product is None or weight is None or constant is None or weight.ndim != 2 or weight.dtype != constant.dtype:
        return False
    before, after = G.dims(product.outputs[0]), G.dims(node.outputs[0])
    sizes = G.dims(summed)
    if before is None or after is None or len(before) < 3 or after != sizes or not _can_be_named(before, after):
        return False
    bias = _bias(constant, before, after)
    if bias is None:
        return False
    _replace(node, product, bias, after)
    return True


def _can_be_named(*shapes: G.Dims) -> bool:
    """Whether constant targets can give these shapes: no zero, which would mean "copy", and few open sizes."""
    return all(
        sum(isinstance(s, str) for s in sizes) <= _MOST_UNKNOWN
        and math.prod(s for s in sizes if isinstance(s, int)) > 0
        for sizes in shapes
    )


def _bias(constant: G.Array, before: G.Dims, after: G.Dims) -> G.Array | None:
    """The constant as one value per feature, if the features are what the last axes hold and all it varies along."""
    features = before[-1]
    lead = len(before) - 1
    if not isinstance(features, int) or after[:lead] != before[:-1]:
        return None
    inner = tuple(s for s in after[lead:] if isinstance(s, int))
    if len(inner) != len(after) - lead or math.prod(inner) != features or constant.size == 1:
        return None
    outer = constant.shape[: max(0, constant.ndim - len(inner))]
    if any(s != 1 for s in outer):
        return None
    values = constant.reshape(constant.shape[len(outer) :])
    return np.ascontiguousarray(np.broadcast_to(values, inner).reshape(-1))


def _replace(node: ir.Node, product: ir.Node, bias: G.Array, after: G.Dims) -> None:
    graph = G.graph_of(node)
    source, weight = product.inputs[0], product.inputs[1]
    assert source is not None
    assert weight is not None
    rows = np.array([-1, (G.dims(weight) or ())[0]], np.int64)
    flat = ir.node(
        "Reshape", [source, G.new_constant(graph, f"{product.name}/rows", rows)], name=f"{product.name}/rows"
    )
    flat.outputs[0].name = G.free_name(graph, f"{product.outputs[0].name}/rows")
    flat.outputs[0].type = source.type
    offset = G.new_constant(graph, f"{product.name}/bias", bias)
    dense = ir.node("Gemm", [flat.outputs[0], weight, offset], name=product.name)
    dense.outputs[0].name = G.free_name(graph, f"{product.outputs[0].name}/dense")
    dense.outputs[0].type = source.type
    graph.insert_before(node, flat)
    graph.insert_before(node, dense)
    product.name = f"{product.name}/product"  # dead from here on
    target = np.array([s if isinstance(s, int) else -1 for s in after], np.int64)
    name = f"{node.name}/shape"
    G.become(node, "Reshape", [dense.outputs[0], G.new_constant(graph, name, target)])
