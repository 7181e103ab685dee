"""Pads products whose last group of weights is short, for a runtime that takes only whole groups."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_graph as G


def with_whole_groups(model: ir.Model) -> ir.Model:
    """A copy in which the inputs of such products get zeros on their last axis, and the weights as many rows more.

    Results are unchanged: what is added is multiplied by 0. Scales and zero points are those of the last group.
    """
    model = M.clone(model)
    graph = model.graph
    for real in [n for n in graph if G.is_op(n, "DequantizeLinear") and G.integer(n, "block_size", 0)]:
        stored, scale = G.array(real.inputs[0]), G.array(real.inputs[1])
        if stored is None or scale is None:
            continue
        missing = len(scale) * G.integer(real, "block_size", 0) - len(stored)
        if not missing:
            continue
        name = real.outputs[0].name or ""
        more = np.concatenate([stored, np.zeros((missing, stored.shape[1]), stored.dtype)])
        real.replace_input_with(0, G.new_constant(graph, f"{name}_whole", more))
        real.outputs[0].shape = ir.Shape(more.shape)
        pads = G.new_constant(graph, f"{name}_pads", np.array([0, missing], np.int64))
        last = G.new_constant(graph, f"{name}_axes", np.array([-1], np.int64))
        for node, _ in list(real.outputs[0].uses()):
            pad = ir.node("Pad", [node.inputs[0], pads, None, last], name=f"{node.name}_padded")
            pad.outputs[0].name = f"{node.name}_padded"
            graph.insert_before(node, pad)
            node.replace_input_with(0, pad.outputs[0])
    return model
