"""Operators without a lowering, replaced by the function of simpler operators that ONNX defines them as."""

from __future__ import annotations

from collections.abc import Container

import onnx
import onnx.inliner
import onnx_ir as ir

from edgekit import model as M

_ROUNDS = 4  # a function's body may call another function: a loss calls a loss calls a softmax
# their bodies loop, draw random numbers or work on sequences: the operator's own name says better what is refused
_KEPT = frozenset({"Range", "Bernoulli", "SequenceMap", "LinearAttention", "DynamicQuantizeLinear"})


def expand(model: ir.Model, known: Container[str]) -> ir.Model:
    """`model` itself if every operator is `known` or has no definition; else a copy."""
    for _ in range(_ROUNDS):
        wanted = {node.op_type for node in model.graph if _expandable(node, known)}
        if not wanted:
            return model
        proto = M.to_proto(model)
        if proto.ByteSize() >= M.PROTOBUF_LIMIT:
            return model
        names = [("", name) for name in sorted(wanted)]
        try:
            inlined = onnx.inliner.inline_selected_functions(proto, names, inline_schema_functions=True)
        except RuntimeError:  # its own assertion: a body that depends on the type of an input that is left out
            return model
        model = M.from_proto(onnx.shape_inference.infer_shapes(inlined, data_prop=True))
    return model


def _expandable(node: ir.Node, known: Container[str]) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in _KEPT:
        return False
    if node.op_type == "LayerNormalization":  # the lowering makes no statistics
        return any(v.name and (v.uses() or v.is_graph_output()) for v in node.outputs[1:])
    if node.op_type in known or not onnx.defs.has(node.op_type, ""):
        return False
    schema = onnx.defs.get_schema(node.op_type)
    return bool(schema.has_function or schema.has_context_dependent_function)
