"""Operators computed by others: ONNX's own reference implementation, or one ONNX Runtime node where that is slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.backends.reference.values import Array
from edgekit.errors import UnsupportedOpError

# python loops over elements or time steps in onnx.reference: minutes where a runtime takes milliseconds
SLOW_IN_PYTHON = {"LSTM", "GRU", "RNN", "Resize", "Upsample", "NonMaxSuppression", "RoiAlign", "GridSample", "Einsum"}
# onnx 1.23's reference appends a Loop's scan outputs along axis 0 where the standard stacks them
ELSEWHERE = SLOW_IN_PYTHON | {"Loop", "Scan"}

Runner = Callable[[list[Array | None]], list[Array]]


def runner(node: ir.Node, opsets: Mapping[str, int], *, slow: bool = False) -> Runner:
    """A function from the node's inputs (explicit, then captured by its subgraphs) to its outputs.

    slow: ONNX's reference even for the operators that it loops over in Python; for tensors of a few elements.
    """
    if node.domain not in ("", "ai.onnx") or (node.op_type in ELSEWHERE and not slow):
        return _onnxruntime(node, opsets)
    return _onnx_reference(node, opsets)


def captured(node: ir.Node) -> list[str]:
    """Names that the node's subgraphs (If, Loop, Scan) read from outside."""
    names: dict[str, None] = {}

    def visit(graph: ir.Graph, known: set[str]) -> None:
        inside = known | {v.name or "" for v in graph.inputs} | set(graph.initializers)
        for inner in graph:
            for value in inner.inputs:
                if value is not None and value.name not in inside:
                    names.setdefault(value.name or "")
            for sub in _subgraphs(inner):
                visit(sub, inside)
            inside |= {v.name or "" for v in inner.outputs}
        for value in graph.outputs:
            if value.name not in inside:
                names.setdefault(value.name or "")

    for graph in _subgraphs(node):
        visit(graph, set())
    return list(names)


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.value)
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.value)
    return found


def _model(node: ir.Node, opsets: Mapping[str, int]) -> onnx.ModelProto:
    """The node alone; its inputs and outputs keep their names, types are left open."""
    proto = ir.to_proto(node)
    names = dict.fromkeys([n for n in proto.input if n] + captured(node))
    graph = onnx.GraphProto(name="one", node=[proto])
    graph.input.extend(onnx.ValueInfoProto(name=n) for n in names)
    graph.output.extend(onnx.ValueInfoProto(name=n) for n in proto.output if n)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def _feeds(model: onnx.ModelProto, node: ir.Node, values: list[Array | None]) -> dict[str, Array]:
    names = [v.name if v is not None else None for v in node.inputs] + captured(node)
    return {n: v for n, v in zip(names, values, strict=True) if n and v is not None}


def _in_order(node: ir.Node, outputs: list[Any]) -> list[Array]:
    """Outputs placed at the node's positions, None where the node names none; numpy scalars become arrays."""
    rest = iter([np.asarray(o) if isinstance(o, np.generic) else o for o in outputs])
    return [next(rest) if v.name else None for v in node.outputs]  # type: ignore[misc]


def _onnx_reference(node: ir.Node, opsets: Mapping[str, int]) -> Runner:
    from onnx.reference import ReferenceEvaluator

    model = _model(node, opsets)
    try:
        evaluator = ReferenceEvaluator(model)
    except Exception:  # it raises bare exceptions of several kinds for operators that it lacks
        return _onnxruntime(node, opsets)
    return lambda values: _in_order(node, evaluator.run(None, _feeds(model, node, values)))


def _onnxruntime(node: ir.Node, opsets: Mapping[str, int]) -> Runner:
    """One-node session, opened when the input types are seen first."""
    import onnxruntime as ort

    sessions: dict[tuple[tuple[str, str, int, bytes], ...], Any] = {}

    def run(values: list[Array | None]) -> list[Array]:
        model = _model(node, opsets)
        feeds = _feeds(model, node, values)
        # shape inference of Resize reads its parameters: they must be weights
        fixed = {k: feeds.pop(k) for k in [n for n in list(feeds)[1:] if node.op_type in ("Resize", "Upsample")]}
        key = tuple((n, str(v.dtype), v.ndim, b"") for n, v in feeds.items())
        key += tuple((n, str(v.dtype), v.ndim, v.tobytes()) for n, v in fixed.items())
        if key not in sessions:
            del model.graph.input[:]
            for name, value in feeds.items():
                code = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
                model.graph.input.append(onnx.helper.make_tensor_value_info(name, code, [None] * value.ndim))
            model.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in fixed.items())
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = 1
            try:
                sessions[key] = ort.InferenceSession(
                    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime's exceptions share no public base class
                raise UnsupportedOpError(
                    f"the reference cannot run {node.op_type} '{node.name}': {str(error).splitlines()[0]}",
                    "replace the operator",
                ) from error
        return _in_order(node, sessions[key].run(None, feeds))

    return run
