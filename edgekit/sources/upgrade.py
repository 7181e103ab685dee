"""Brings an ONNX graph to opset 21: the onnx package's converter, and rewrites where it is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgekit.model import MIN_OPSET


def to_working_opset(proto: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """`proto` (edited), of standard operators only, from opset `version` to 21. Raises what the converter raises."""
    proto.ir_version = max(proto.ir_version, 4)  # below 4 the converter looks for weights among the inputs
    _ahead_of_converter(proto, version)
    new = onnx.version_converter.convert_version(onnx.shape_inference.infer_shapes(proto), MIN_OPSET)
    _after_converter(new, version)
    return new


def _ahead_of_converter(proto: onnx.ModelProto, version: int) -> None:
    """Rewrites that the converter lacks or gets wrong: Hardmax over flattened axes, GroupNormalization per group."""
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        if node.op_type == "Hardmax" and version < 13:
            nodes += _hardmax(node)
        elif node.op_type == "GroupNormalization" and version < 21:
            nodes += _group_norm(node, proto.graph)
        else:
            nodes.append(node)
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _after_converter(proto: onnx.ModelProto, version: int) -> None:
    """Until opset 10 Resize counted coordinates from the corner and rounded down; the converter forgets to say so."""
    for node in _all_nodes(proto.graph):
        if node.op_type == "Resize" and version <= 10:
            _set(node, "coordinate_transformation_mode", "asymmetric")
            _set(node, "nearest_mode", "floor")


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_nodes(inner)


def _set(node: onnx.NodeProto, name: str, value: str) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _hardmax(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Before opset 13 Hardmax saw its input as a matrix, split at `axis`."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    x, y = node.input[0], node.output[0]
    return [
        helper.make_node("Shape", [x], [f"{y}/shape"], f"{node.name}/shape"),
        helper.make_node("Flatten", [x], [f"{y}/matrix"], f"{node.name}/matrix", axis=axis),
        helper.make_node("Hardmax", [f"{y}/matrix"], [f"{y}/rows"], node.name, axis=1),
        helper.make_node("Reshape", [f"{y}/rows", f"{y}/shape"], [y], f"{node.name}/restore"),
    ]


def _group_norm(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Before opset 21 scale and bias were per group: that is instance normalisation with a group as the channel."""
    groups = next(a.i for a in node.attribute if a.name == "num_groups")
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    x, scale, bias = node.input
    y = node.output[0]
    graph.initializer.append(numpy_helper.from_array(np.array([0, groups, -1], np.int64), f"{y}/groups"))
    return [
        helper.make_node("Shape", [x], [f"{y}/shape"], f"{node.name}/shape"),
        helper.make_node("Reshape", [x, f"{y}/groups"], [f"{y}/grouped"], f"{node.name}/group"),
        helper.make_node(
            "InstanceNormalization", [f"{y}/grouped", scale, bias], [f"{y}/normal"], node.name, epsilon=epsilon
        ),
        helper.make_node("Reshape", [f"{y}/normal", f"{y}/shape"], [y], f"{node.name}/restore"),
    ]
