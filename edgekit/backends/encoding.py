"""Re-encodes a quantized model: the same integers, written the way a runtime's kernels run fastest."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M

# operators whose second input is a weight: u8 activations × s8 weights is what their kernels want
_WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
_SHIFT = 128


def with_uint8_activations(model: ir.Model) -> ir.Model:
    """int8 activations become uint8 with the zero point moved by 128; weights and biases stay as they are.

    Real values are unchanged bit for bit: (q + 128) − (z + 128) = q − z, and [-128, 127] maps onto [0, 255].
    """
    model = M.clone(model)
    graph = model.graph
    # decided before anything changes: moving a QuantizeLinear changes the type that its DequantizeLinear sees
    quantizers = [n for n in graph if n.op_type == "QuantizeLinear" and _quantizes_to_int8(n)]
    readers = [n for n in graph if n.op_type == "DequantizeLinear" and _is_int8(n.inputs[0]) and not _is_weight(n)]
    for node in quantizers:
        _shift_zero_point(graph, node)
        node.attributes.pop("output_dtype", None)
        node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    for node in readers:
        _shift_zero_point(graph, node)
        stored, source = M.constant(node.inputs[0]), node.inputs[0]
        if stored is not None and source is not None:
            shifted = (stored.astype(np.int16) + _SHIFT).astype(np.uint8)
            node.replace_input_with(0, _initializer(graph, f"{source.name}_u8", shifted))
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    return model


def _quantizes_to_int8(node: ir.Node) -> bool:
    if len(node.inputs) > 2:
        return _is_int8(node.inputs[2])
    return bool(node.attributes.get_int("output_dtype", 0) == ir.DataType.INT8.value)


def _is_int8(value: ir.Value | None) -> bool:
    if value is None:
        return False
    array = M.constant(value)
    if array is not None:
        return bool(array.dtype == np.int8)
    if value.dtype is not None:
        return bool(value.dtype == ir.DataType.INT8)
    producer = value.producer()
    return producer is not None and producer.op_type == "QuantizeLinear"


def _is_weight(node: ir.Node) -> bool:
    """A DequantizeLinear of a stored tensor that feeds the weight operand of a matrix product."""
    if M.constant(node.inputs[0]) is None:
        return False
    return any(_WEIGHTED.get(user.op_type) == index for user, index in node.outputs[0].uses())


def _shift_zero_point(graph: ir.Graph, node: ir.Node) -> None:
    old = M.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if old is None:  # an absent zero point is 0
        old = np.zeros((), np.int8)
    if old.dtype != np.int8:
        return  # already moved
    shifted = (old.astype(np.int16) + _SHIFT).astype(np.uint8)
    value = _initializer(graph, f"{node.outputs[0].name}_zero_point_u8", shifted)
    if len(node.inputs) > 2:
        node.replace_input_with(2, value)
    else:
        node.resize_inputs(3)
        node.replace_input_with(2, value)


def _initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
