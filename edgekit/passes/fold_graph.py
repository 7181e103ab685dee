"""Small edits that every folding rule shares: constants, single uses, bypassing a node, new initializers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M

Array = np.ndarray[Any, Any]
Dims = tuple[int | str, ...]


def array(value: ir.Value | None) -> Array | None:
    """The constant behind a value; None if it is computed, or an initializer that a caller may override as an input."""
    if value is None or value.is_graph_input():
        return None
    return M.constant(value)


def dims(value: ir.Value | None) -> Dims | None:
    """The sizes of a value, ints or symbols; None if the rank or any size is unknown."""
    if value is None or value.shape is None:
        return None
    out = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return None if None in out else tuple(d for d in out if d is not None)


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def sole_producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node of one of these kinds that computes the value, if nobody else looks at it."""
    if value is None or value.is_graph_output() or len(tuple(value.uses())) != 1:
        return None
    node = value.producer()
    return node if is_op(node, *op_types) else None


def number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.value)


def integers(node: ir.Node, name: str) -> tuple[int, ...] | None:
    attribute = node.attributes.get(name)
    return None if attribute is None else tuple(int(i) for i in attribute.value)


def text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else str(attribute.value)


def graph_of(node: ir.Node) -> ir.Graph:
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"node '{node.name}' is not in a graph")
    return graph


def free_name(graph: ir.Graph, name: str) -> str:
    """The name, with a number if it is taken by any value of the graph."""
    taken = set(graph.initializers) | {v.name for v in graph.inputs} | {o.name for n in graph for o in n.outputs}
    unique, count = name, 0
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    return unique


def new_constant(graph: ir.Graph, name: str, data: Array) -> ir.Value:
    """A new initializer of a free name."""
    unique = free_name(graph, name)
    tensor = ir.tensor(np.asarray(data, order="C"), name=unique)
    value = ir.Value(name=unique, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def set_constant(node: ir.Node, index: int, name: str, data: Array) -> None:
    """Give a node a constant of its own; the one it had goes if nobody else reads it: its name is free again."""
    old = node.inputs[index] if index < len(node.inputs) else None
    set_input(node, index, None)
    graph = graph_of(node)
    if old is not None and not old.uses() and not old.is_graph_output() and not old.is_graph_input():
        graph.initializers.pop(old.name or "", None)
    set_input(node, index, new_constant(graph, name, data))


def become(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], **attributes: int | float | str | Sequence[int]
) -> None:
    """Turn a node into another operator in place: same name, same first output."""
    node.op_type = op_type
    node.attributes.clear()
    for name, setting in attributes.items():
        node.attributes[name] = ir.convenience.convert_attribute(name, setting)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def bypass(node: ir.Node, value: ir.Value) -> None:
    """Take a one-output node out of the graph: whoever read its output reads `value`. An Identity if that cannot be."""
    output = node.outputs[0]
    if output.is_graph_output():
        if value.producer() is None or value.is_graph_output() or graph_of(node) is not value.graph:
            if not is_op(node, "Identity"):
                become(node, "Identity", [value])
            return
        ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
        name, output.name = output.name, None
        value.name, value.shape, value.type = name, output.shape, output.type
    else:
        ir.convenience.replace_all_uses_with(output, value)
    graph_of(node).remove(node, safe=True)
