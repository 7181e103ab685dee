"""Axes of size 1 that a 1-D convolution was run with: operators behind it keep them, so that they meet its kernel.

Exporters write Conv1D as Unsqueeze, Conv, Squeeze. Its bias and activation then lie behind the Squeeze, where nothing
fuses them. Each Squeeze moves behind the element-wise operator that reads it, until it meets the next Unsqueeze.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G

_UNARY = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Elu", "Selu", "Gelu", "Softplus")
_BINARY = ("Add", "Sub", "Mul", "Div")
_POOLS = ("MaxPool", "AveragePool")
_WINDOW = ("kernel_shape", "strides", "dilations")  # of a pool; all are 1 along an axis of size 1


def fold(graph: ir.Graph) -> bool:
    """One sweep over the graph; True if anything changed."""
    changed = False
    for node in list(graph):
        if node.graph is not None and len(node.outputs) == 1:
            changed = _sink(node) or changed
    return changed


def _sink(node: ir.Node) -> bool:
    """Squeeze, operator -> operator, Squeeze."""
    if not G.is_op(node, *_UNARY, *_BINARY, *_POOLS) or not node.inputs:
        return False
    found = [_squeezed(value) for value in node.inputs]
    axes = next((f[1] for f in found if f is not None), None)
    rank = None if node.outputs[0].shape is None else len(node.outputs[0].shape)
    if axes is None or rank is None:
        return False
    inputs: list[ir.Value | None] = []
    for position, value in enumerate(node.inputs):
        own = found[position]
        if own is not None and own[1] == axes:
            inputs.append(own[0])
        elif G.is_op(node, *_BINARY) and (constant := G.array(value)) is not None and constant.ndim <= rank:
            inputs.append(_widened(node, position, constant, rank, axes))
        elif position and G.is_op(node, *_UNARY):
            inputs.append(value)  # a bound
        else:
            return False
    if G.is_op(node, *_POOLS) and not _pools(node, axes, rank):
        return False
    _swap(node, inputs, axes)
    return True


def _squeezed(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...]] | None:
    """(what a Squeeze that nobody else reads takes its axes from, those axes of it)."""
    squeeze = G.sole_producer(value, "Squeeze")
    source = squeeze.inputs[0] if squeeze is not None else None
    sizes = G.dims(source)
    if squeeze is None or source is None or sizes is None:
        return None
    given = G.array(squeeze.inputs[1]) if len(squeeze.inputs) > 1 and squeeze.inputs[1] is not None else None
    if given is None:
        return None
    axes = tuple(sorted(int(a) % len(sizes) for a in given.reshape(-1)))
    return (source, axes) if all(sizes[a] == 1 for a in axes) else None


def _widened(node: ir.Node, position: int, constant: G.Array, rank: int, axes: tuple[int, ...]) -> ir.Value:
    full = constant.reshape((1,) * (rank - constant.ndim) + constant.shape)
    for axis in axes:
        full = np.expand_dims(full, axis)
    return G.new_constant(G.graph_of(node), f"{node.name}/{position}_widened", full)


def _pools(node: ir.Node, axes: tuple[int, ...], rank: int) -> bool:
    """Give a pool windows of 1 along the axes; False for what is no plain pool of spatial axes."""
    if any(a < 2 for a in axes) or rank < 3 or len(node.inputs) != 1:
        return False
    spatial = [a - 2 for a in axes]
    for name in _WINDOW:
        values = G.integers(node, name)
        if values is not None:
            wide = list(values)
            for axis in spatial:
                wide.insert(axis, 1)
            node.attributes[name] = ir.AttrInt64s(name, wide)
    pads = G.integers(node, "pads")
    if pads is not None:
        begins, ends = list(pads[: rank - 2]), list(pads[rank - 2 :])
        for axis in spatial:
            begins.insert(axis, 0)
            ends.insert(axis, 0)
        node.attributes["pads"] = ir.AttrInt64s("pads", [*begins, *ends])
    return True


def _swap(node: ir.Node, inputs: list[ir.Value | None], axes: tuple[int, ...]) -> None:
    """The operator on unsqueezed inputs, then `node` as the Squeeze of its result."""
    graph, output = G.graph_of(node), node.outputs[0]
    moved = ir.node(node.op_type, inputs, name=node.name)
    moved.attributes.update(node.attributes)
    result = moved.outputs[0]
    sizes = list(G.dims(output) or ())
    for axis in axes:
        sizes.insert(axis, 1)
    result.name, result.type = G.free_name(graph, f"{output.name}/unsqueezed"), output.type
    result.shape = ir.Shape(sizes) if sizes else None
    graph.insert_before(node, moved)
    node.name = f"{node.name}/squeeze"
    squeezed = G.new_constant(graph, f"{node.name}/axes", np.array(axes, np.int64))
    G.become(node, "Squeeze", [result, squeezed])
