"""Runs a float model and its quantized form side by side, node by node, so that each layer can be repaired in turn.

Memory holds the values that later nodes still read, of both models: choose the samples by `live_bytes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgekit import model as M

Array = np.ndarray[Any, Any]
Values = dict[str, list[Array]]


@dataclass
class Meeting:
    """The two forms of one node, before the quantized one runs. Values may be replaced in `written`.

    node, twin: in the float and in the quantized model. exact, written: values of each by name, one array a batch;
    `exact` holds the float node's results already.
    """

    node: ir.Node
    twin: ir.Node
    exact: Values
    written: Values


def walk(model: ir.Model, written: ir.Model, batches: Sequence[M.Tensors]) -> Iterator[Meeting]:
    """model: prepared. written: its QDQ form by `apply_plan`, whose nodes keep their names. batches: inputs by name.

    Yields each node of `model` that `written` has too, in graph order.
    """
    exact, other = _World(model, batches), _World(written, batches)
    twins = {n.name for n in written.graph}
    for node in model.graph:
        exact.run(node)
        if node.name in twins:
            twin = other.upto(node.name or "")
            yield Meeting(node, twin, exact.values, other.values)
            other.run(twin)
            other.forget(twin)
        exact.forget(node)


def live_bytes(model: ir.Model, inputs: M.Tensors) -> int:
    """The most bytes that are live at once while the model runs on these inputs."""
    world = _World(model, [inputs])
    most = 0
    for node in model.graph:
        world.run(node)
        most = max(most, sum(v.nbytes for parts in world.values.values() for v in parts))
        world.forget(node)
    return most


class _World:
    """One model's values while it runs node by node."""

    def __init__(self, model: ir.Model, batches: Sequence[M.Tensors]) -> None:
        self.values: Values = {name: [b[name] for b in batches] for name in batches[0]}
        self._batches = len(batches)
        self._imports = dict(model.opset_imports)
        self._waiting = list(model.graph)
        self._at = 0
        self._left = Counter(v.name for n in model.graph for v in _reads(n))
        self._left.update(v.name for v in model.graph.outputs)

    def upto(self, name: str) -> ir.Node:
        """Run every node before the one called `name`, and return that."""
        while (node := self._waiting[self._at]).name != name:
            self.run(node)
            self.forget(node)
        return node

    def run(self, node: ir.Node) -> None:
        """Compute the node's results from the values at hand."""
        read = _reads(node)
        given = [v.name or "" for v in read if v.name in self.values]
        constants = {v.name or "": c for v in read if v.name not in self.values and (c := M.constant(v)) is not None}
        outputs = [v for v in node.outputs if v.name]
        feeds = [{name: self.values[name][i] for name in given} for i in range(self._batches)]
        made = _single(node, feeds, constants, outputs, self._imports)
        for position, value in enumerate(outputs):
            self.values[value.name or ""] = [m[position] for m in made]
        if self._at < len(self._waiting) and self._waiting[self._at] is node:
            self._at += 1

    def forget(self, node: ir.Node) -> None:
        """Drop values that nobody reads any more, once the node has read its own."""
        for value in _reads(node):
            self._left[value.name] -= 1
        for value in (*_reads(node), *node.outputs):
            if not self._left[value.name]:
                self.values.pop(value.name or "", None)


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node and the graphs inside it read from outside, each once."""
    own = {v.name: v for v in node.inputs if v is not None and v.name}
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value
            for graph in graphs:
                inside = {v.name for n in ir.traversal.RecursiveGraphIterator(graph) for v in n.outputs}
                inside |= {v.name for v in graph.inputs} | set(graph.initializers)
                for inner in ir.traversal.RecursiveGraphIterator(graph):
                    own.update({v.name: v for v in inner.inputs if v is not None and v.name and v.name not in inside})
    return list(own.values())


def _single(
    node: ir.Node,
    feeds: Sequence[Mapping[str, Array]],
    constants: Mapping[str, Array],
    outputs: list[ir.Value],
    imports: Mapping[str, int],
) -> list[list[Array]]:
    """One node in ONNX Runtime: its results for each batch."""
    import onnxruntime as ort

    h = onnx.helper

    def info(name: str, array: Array) -> onnx.ValueInfoProto:
        return h.make_tensor_value_info(name, h.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)

    graph = h.make_graph(
        [ir.to_proto(node)],
        "node",
        [info(k, v) for k, v in feeds[0].items()],
        [onnx.ValueInfoProto(name=v.name) for v in outputs],
        [onnx.numpy_helper.from_array(np.asarray(v, order="C"), k) for k, v in constants.items()],
    )
    opsets = [h.make_opsetid(domain, version) for domain, version in imports.items()]
    proto = h.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [list(session.run([v.name for v in outputs], dict(feed))) for feed in feeds]
