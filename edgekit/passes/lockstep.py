"""Runs a float model and its quantized form side by side, node by node, so that each layer can be repaired in turn.

Memory holds the values that later nodes still read, of both models: choose the samples by `live_bytes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgekit import model as M

Array = np.ndarray[Any, Any]
Values = dict[str, list[Array]]

THREADS = 1  # ONNX Runtime makes threads for each session: for some milliseconds of work they cost more than they give


@dataclass
class Meeting:
    """The two forms of one node, before the quantized one runs. Values may be replaced in `written`.

    node, twin: in the float and in the quantized model. exact, written: values of each by name, one array a batch;
    `exact` holds the float node's results already, `written` what the twin reads; both what is read later.
    """

    node: ir.Node
    twin: ir.Node
    exact: Values
    written: Values


def walk(
    model: ir.Model, written: ir.Model, batches: Sequence[M.Tensors], stops: Container[str] | None = None
) -> Iterator[Meeting]:
    """model: prepared. written: its QDQ form by `apply_plan`, whose nodes keep their names. batches: inputs by name.

    Yields each node of `model` that `written` has too, in graph order; of those, only the ones named in `stops` if it
    is given, which is faster: what lies between two of them runs at once.
    """
    exact, other = _World(model, batches), _World(written, batches)
    twins = {n.name for n in written.graph}
    for node in model.graph:
        if node.name in twins and (stops is None or node.name in stops):
            exact.upto(node.name or "")
            exact.run()
            yield Meeting(node, other.upto(node.name or ""), exact.values, other.values)
            exact.forget()


def live_bytes(model: ir.Model, inputs: M.Tensors) -> int:
    """The most bytes that are live at once while the model runs on these inputs, node by node."""
    names = [v.name for n in model.graph for v in n.outputs if v.name]
    values = {**inputs, **M.FloatSession(model, fetch=names, optimize=False, threads=1).run(inputs)}
    left, live, most = _readers(model), set(inputs), 0
    for node in model.graph:
        read, made = {v.name or "" for v in _reads(node)}, {v.name for v in node.outputs if v.name}
        live |= made
        most = max(most, sum(values[name].nbytes for name in live))
        left.subtract(read)
        live -= {name for name in read | made if left[name] <= 0}
    return most


def _readers(model: ir.Model) -> Counter[str]:
    """How many nodes read each value; of an output, one more."""
    found = Counter(v.name or "" for n in model.graph for v in _reads(n))
    found.update(v.name or "" for v in model.graph.outputs)
    return found


class _World:
    """One model's values while it runs, some nodes at a time."""

    def __init__(self, model: ir.Model, batches: Sequence[M.Tensors]) -> None:
        self.values: Values = {name: [b[name] for b in batches] for name in batches[0]}
        self._batches = len(batches)
        self._imports = dict(model.opset_imports)
        self._nodes = list(model.graph)
        self._at = 0
        self._open: list[ir.Node] = []  # to be run next
        self._done: list[str] = []  # names that may be forgotten
        self._left = _readers(model)

    def step(self) -> ir.Node:
        """Let the next node run with the others, and return it."""
        node = self._nodes[self._at]
        self._at += 1
        self._open.append(node)
        return node

    def upto(self, name: str) -> ir.Node:
        """Run every node before the one called `name`, let that one run next, and return it."""
        while self._nodes[self._at].name != name:
            self.step()
        self.run()
        self.forget()
        return self.step()

    def run(self) -> None:
        """Compute what is open, from the values at hand: the results of its last node, and what others read."""
        nodes, self._open = self._open, []
        if not nodes:
            return
        made = [v for n in nodes for v in n.outputs if v.name]
        inside = {v.name or "" for v in made}
        read = {v.name or "": v for n in nodes for v in _reads(n)}
        self._done += [*read, *inside]
        for node in nodes:
            self._left.subtract(v.name or "" for v in _reads(node))
        outside = {k: v for k, v in read.items() if k not in inside}
        given = [k for k in outside if k in self.values]
        constants = {k: c for k, v in outside.items() if k not in self.values and (c := M.constant(v)) is not None}
        last = {v.name for v in nodes[-1].outputs}
        wanted = [v for v in made if self._left[v.name or ""] > 0 or v.name in last]
        feeds = [{name: self.values[name][i] for name in given} for i in range(self._batches)]
        results = _computed(nodes, feeds, constants, wanted, self._imports)
        for position, value in enumerate(wanted):
            self.values[value.name or ""] = [r[position] for r in results]

    def forget(self) -> None:
        """Drop values that nobody reads any more."""
        for name in self._done:
            if self._left[name] <= 0:
                self.values.pop(name, None)
        self._done = []


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


def _computed(
    nodes: Sequence[ir.Node],
    feeds: Sequence[Mapping[str, Array]],
    constants: Mapping[str, Array],
    outputs: Sequence[ir.Value],
    imports: Mapping[str, int],
) -> list[list[Array]]:
    """Nodes in ONNX Runtime, in float arithmetic between their roundings: the results for each batch."""
    import onnxruntime as ort

    h = onnx.helper

    def info(name: str, array: Array) -> onnx.ValueInfoProto:
        return h.make_tensor_value_info(name, h.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)

    graph = h.make_graph(
        [ir.to_proto(node) for node in nodes],
        "nodes",
        [info(k, v) for k, v in feeds[0].items()],
        [onnx.ValueInfoProto(name=v.name) for v in outputs],
        [onnx.numpy_helper.from_array(np.asarray(v, order="C"), k) for k, v in constants.items()],
    )
    opsets = [h.make_opsetid(domain, version) for domain, version in imports.items()]
    proto = h.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # integer kernels differ from CPU to CPU
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [list(session.run([v.name for v in outputs], dict(feed))) for feed in feeds]
