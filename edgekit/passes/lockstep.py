"""Runs a float model and its quantized form side by side, node by node, so that each layer can be repaired in turn.

Memory holds the values that later nodes still read, of both models: choose the samples by `affordable`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgekit import model as M

Array = np.ndarray[Any, Any]
# Live activations of both models together, in bytes.
LIVE_BYTES = 512 * 2**20


@dataclass
class Meeting:
    """The two forms of one node, before the quantized one runs. Values may be replaced in `written`.

    node, twin: in the float and in the quantized model. exact, written: values by name of each; `exact` holds the
    float node's results already.
    """

    node: ir.Node
    twin: ir.Node
    exact: dict[str, Array]
    written: dict[str, Array]


def walk(model: ir.Model, written: ir.Model, inputs: Mapping[str, Array]) -> Iterator[Meeting]:
    """model: prepared. written: its QDQ form by `apply_plan`, whose nodes keep their names. inputs: batch first.

    Yields each node of `model` that `written` has too, in graph order.
    """
    exact, other = _World(model, inputs), _World(written, inputs)
    twins = {n.name for n in written.graph}
    for node in model.graph:
        exact.run(node)
        if node.name in twins:
            twin = other.upto(node.name or "")
            yield Meeting(node, twin, exact.values, other.values)
            other.run(twin)
        exact.forget(node)


def affordable(model: ir.Model, samples: int, inputs: Mapping[str, Array]) -> int:
    """How many samples LIVE_BYTES allow, at most `samples`; inputs: one sample (or the model's fixed batch)."""
    world = _World(model, inputs)
    most = 0
    for node in model.graph:
        world.run(node)
        most = max(most, sum(v.nbytes for v in world.values.values()))
        world.forget(node)
    rows = len(next(iter(inputs.values())))
    return int(max(1, min(samples, LIVE_BYTES // max(1, 3 * most // rows))))


class _World:
    """One model's values while it runs node by node."""

    def __init__(self, model: ir.Model, inputs: Mapping[str, Array]) -> None:
        self.values: dict[str, Array] = dict(inputs)
        self._version = M.opset(model)
        self._imports = dict(model.opset_imports)
        self._functions = model.functions
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
        feeds = {v.name or "": self._value(v) for v in _reads(node) if M.constant(v) is None or v.name in self.values}
        constants = {v.name or "": c for v in _reads(node) if v.name not in feeds and (c := M.constant(v)) is not None}
        outputs = [v for v in node.outputs if v.name]
        got = _single(node, feeds, constants, outputs, self._imports)
        self.values.update(zip((v.name or "" for v in outputs), got, strict=True))
        if self._at < len(self._waiting) and self._waiting[self._at] is node:
            self._at += 1

    def forget(self, node: ir.Node) -> None:
        """Drop values that nobody reads any more."""
        for value in _reads(node):
            self._left[value.name] -= 1
            if not self._left[value.name]:
                self.values.pop(value.name or "", None)

    def _value(self, value: ir.Value) -> Array:
        return self.values[value.name or ""]


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
    feeds: Mapping[str, Array],
    constants: Mapping[str, Array],
    outputs: list[ir.Value],
    imports: Mapping[str, int],
) -> list[Array]:
    """One node in ONNX Runtime."""
    import onnxruntime as ort

    h = onnx.helper

    def info(name: str, array: Array) -> onnx.ValueInfoProto:
        return h.make_tensor_value_info(name, h.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)

    graph = h.make_graph(
        [ir.to_proto(node)],
        "node",
        [info(k, v) for k, v in feeds.items()],
        [onnx.ValueInfoProto(name=v.name) for v in outputs],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()],
    )
    opsets = [h.make_opsetid(domain, version) for domain, version in imports.items()]
    proto = h.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run([v.name for v in outputs], dict(feeds)))
