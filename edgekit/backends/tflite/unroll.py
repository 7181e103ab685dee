"""Loops of a known number of steps, written out: LiteRT's WHILE cannot be delegated, and Keras exports GRUs as Loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from edgekit import model as M
from edgekit.backends.reference.fallback import runner
from edgekit.backends.tflite.graph import Array

_MOST_STEPS = 512  # as for recurrent layers
_MOST_NODES = 20_000
_MOST_ELEMENTS = 1 << 16  # of a constant that is computed once per step
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"})


def unroll(model: ir.Model) -> ir.Model:
    """`model` itself if it has no Loop at its top; else a copy, in which a loop that depends on the data stays."""
    if not any(_is_loop(node) for node in model.graph) or M.to_proto(model).ByteSize() >= M.PROTOBUF_LIMIT:
        return model
    out = M.clone(model)
    for node in list(out.graph):
        if _is_loop(node):
            written = _written(node, dict(out.opset_imports))
            if written is not None:
                _replace(out.graph, node, written)
    return M.from_proto(onnx.shape_inference.infer_shapes(M.to_proto(out), data_prop=True))


def _is_loop(node: ir.Node) -> bool:
    return node.op_type == "Loop" and node.domain in ("", "ai.onnx")


@dataclass
class _Written:
    """nodes: of all steps. carried: after the last one. collected: per scan output, its value of each step."""

    carried: list[ir.Value]
    collected: list[list[ir.Value]]
    nodes: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)

    def constant(self, name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        kind = ir.TensorType(tensor.dtype)
        self.constants.append(ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor))
        return self.constants[-1]


def _written(loop: ir.Node, opsets: Mapping[str, int]) -> _Written | None:
    """None if the number of steps depends on the data, or there are too many."""
    body: ir.Graph = loop.attributes["body"].value
    trips, go = (M.constant(loop.inputs[i]) for i in (0, 1))
    if any(loop.inputs[i] is not None and known is None for i, known in ((0, trips), (1, go))) or _unfit(body):
        return None
    most = _MOST_STEPS + 1 if trips is None else int(trips.reshape(-1)[0])
    going = go is None or bool(go.reshape(-1)[0])
    carried = [v for v in loop.inputs[2:] if v is not None]
    out = _Written(carried, [[] for _ in body.outputs[1 + len(carried) :]])
    step = 0
    while going and step < most:
        if step >= _MOST_STEPS or len(out.nodes) > _MOST_NODES:
            return None
        condition = _step(out, loop, body, step, opsets)
        if condition is None:
            return None
        going, step = bool(condition.reshape(-1)[0]), step + 1
    return out if all(out.collected) else None  # an output of no steps has no shape


def _unfit(body: ir.Graph) -> bool:
    """Subgraphs in it, or random numbers."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(node.op_type in _RANDOM or any(a.type in kinds for a in node.attributes.values()) for node in body)


def _step(out: _Written, loop: ir.Node, body: ir.Graph, step: int, opsets: Mapping[str, int]) -> Array | None:
    """Write one step; the condition for the next one, None if it is not known."""
    prefix = f"{loop.name or loop.outputs[0].name}/{step}"
    given = [out.constant(f"{prefix}/step", np.array(step, np.int64)), out.constant(f"{prefix}/go", np.array(True))]
    seen: dict[ir.Value, ir.Value] = dict(zip(body.inputs, [*given, *out.carried], strict=True))
    for name, value in body.initializers.items():
        array = M.constant(value)
        assert array is not None
        seen[value] = out.constant(f"{prefix}/{name}", array)
    for node in body:
        inputs = [None if v is None else seen.get(v, v) for v in node.inputs]
        known = [None if v is None else M.constant(v) for v in inputs]
        names = [f"{prefix}/{o.name}" if o.name else "" for o in node.outputs]
        results = _computed(node, inputs, known, opsets)
        if results is not None:
            made = [out.constant(n, a) for n, a in zip(names, results, strict=False) if n]
            seen.update(zip((o for o in node.outputs if o.name), made, strict=True))
            continue
        values = [ir.Value(name=n) for n in names]
        name = f"{prefix}/{node.name or node.outputs[0].name}"
        out.nodes.append(
            ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=values, name=name)
        )
        seen.update(zip(node.outputs, values, strict=True))
    ends = [seen.get(v, v) for v in body.outputs]
    out.carried = ends[1 : 1 + len(out.carried)]
    for values, value in zip(out.collected, ends[1 + len(out.carried) :], strict=True):
        values.append(value)
    return M.constant(ends[0])


def _computed(
    node: ir.Node, inputs: list[ir.Value | None], known: list[Array | None], opsets: Mapping[str, int]
) -> list[Array] | None:
    """The node's results if it reads small constants only."""
    if any(v is not None and (k is None or k.size > _MOST_ELEMENTS) for v, k in zip(inputs, known, strict=True)):
        return None
    results = [np.asarray(r) for r in runner(node, opsets)(known) if r is not None]
    named = [o for o in node.outputs if o.name]
    return results if len(results) >= len(named) else None


def _replace(graph: ir.Graph, loop: ir.Node, written: _Written) -> None:
    """The written steps in the loop's place; its outputs keep their names."""
    for value in written.constants:
        graph.register_initializer(value)
    nodes = list(written.nodes)
    finals = [*written.carried, *(None for _ in written.collected)]
    for index, (output, final) in enumerate(zip(loop.outputs, finals, strict=True)):
        if not output.name or not (output.uses() or output.is_graph_output()):
            continue
        name, output.name = output.name, f"{output.name}/loop"
        made = ir.Value(name=name, shape=output.shape, type=output.type)
        if final is not None:
            nodes.append(ir.Node("", "Identity", [final], outputs=[made], name=f"{loop.name}/{index}"))
        else:
            nodes += _stacked(loop, written.collected[index - len(written.carried)], made, written, graph)
        ir.convenience.replace_all_uses_with(output, made, replace_graph_outputs=True)
    graph.insert_before(loop, nodes)
    graph.remove(loop, safe=True)


def _stacked(
    loop: ir.Node, values: list[ir.Value], made: ir.Value, written: _Written, graph: ir.Graph
) -> list[ir.Node]:
    """Each step's value as a row of `made`."""
    first = written.constant(f"{made.name}/axis", np.array([0], np.int64))
    graph.register_initializer(first)
    rows = [ir.Value(name=f"{made.name}/{step}") for step in range(len(values))]
    nodes = [
        ir.Node("", "Unsqueeze", [value, first], outputs=[row], name=f"{row.name}/unsqueeze")
        for value, row in zip(values, rows, strict=True)
    ]
    axis = ir.convenience.convert_attribute("axis", 0)
    return [*nodes, ir.Node("", "Concat", rows, [axis], outputs=[made], name=f"{loop.name}/{made.name}")]
