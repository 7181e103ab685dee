"""Multiplies channels of values by factors: their producers' parameters times them, their readers' through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import ArtifactError
from edgekit.passes import fold_graph as G
from edgekit.passes.channels import End, trace

Array = np.ndarray[Any, Any]


def rescaled(model: ir.Model, factors: Mapping[str, Sequence[float]]) -> ir.Model:
    """A copy of a prepared model. factors: value -> one per channel of it, > 0; values that are absent keep theirs.

    Raises ArtifactError for factors that do not fit the model.
    """
    out = M.clone(model)
    found = trace(out)
    known = {end.value.name or "": len(end.labels) for end in found.ends()}
    for name, given in factors.items():
        if known.get(name) != len(given):
            raise ArtifactError(f"the plan rescales '{name}', which cannot be", "plan it again")

    def of(end: End) -> Array:
        return np.array(factors.get(end.value.name or "", np.ones(len(end.labels))), np.float64)

    for end in found.producers:
        produce(end.node, of(end))
    for end in found.consumers:
        consume(end.node, of(end))
    for end, position in (*found.offsets, *found.bounds):
        offset(end, position, of(end))
    for end, position in found.bounds:
        _clip(end.node, position)
    return out


def _clip(node: ir.Node, position: int) -> None:
    """A Min of one bound for all channels is a Clip; behind a Relu both are one, which kernels fuse."""
    bound = G.array(node.inputs[position])
    if node.op_type != "Min" or bound is None or not np.allclose(bound, bound.flat[0], rtol=1e-6, atol=0):
        return
    source = node.inputs[1 - position]
    relu = G.sole_producer(source, "Relu")
    low = None
    if relu is not None:
        low, source = G.new_constant(G.graph_of(node), f"{node.name}/low", np.zeros((), bound.dtype)), relu.inputs[0]
    high = G.new_constant(G.graph_of(node), f"{node.name}/high", np.array(bound.flat[0], bound.dtype))
    G.become(node, "Clip", [source, low, high])
    if relu is not None:
        G.graph_of(node).remove(relu, safe=True)


def produce(node: ir.Node, factor: Array) -> None:
    """Scale a node's output channels."""
    if bool((factor == 1).all()):
        return
    if node.op_type == "LayerNormalization":
        for position in (1, 2):
            _set(node, position, lambda a: a * factor)
        return
    axis = output_axis(node)
    _set(node, 1, lambda a: a * along(factor, a.ndim, axis))
    if node.op_type == "Gemm":
        _set(node, 2, lambda a: np.broadcast_to(a, (*a.shape[:-1], len(factor))) * factor)
    else:
        _set(node, 2, lambda a: a * factor)


def consume(node: ir.Node, factor: Array) -> None:
    """Make up for input channels that come scaled by `factor`."""
    if bool((factor == 1).all()):
        return
    _set(node, 1, lambda a: a / by_input(node, a, factor))


def offset(end: End, position: int, factor: Array) -> None:
    if bool((factor == 1).all()):
        return
    rank = len(end.value.shape or ())

    def scaled(a: Array) -> Array:
        axis = end.axis - (rank - a.ndim)
        return a * along(factor, a.ndim, axis)

    _set(end.node, position, scaled)


def output_axis(node: ir.Node) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm" and G.integer(node, "transB", 0):
        return 0
    return 1


def along(values: Array, rank: int, axis: int) -> Array:
    return values.reshape([-1 if a == axis else 1 for a in range(rank)])


def by_input(node: ir.Node, weight: Array, values: Array) -> Array:
    """One number per input channel, shaped to broadcast with the weight."""
    if node.op_type == "Conv":
        groups = G.integer(node, "group", 1)
        group = np.arange(weight.shape[0]) * groups // weight.shape[0]
        columns = group[:, None] * weight.shape[1] + np.arange(weight.shape[1])
        return np.asarray(values[columns].reshape(*columns.shape, *[1] * (weight.ndim - 2)))
    if node.op_type == "Gemm" and G.integer(node, "transB", 0):
        return values[None, :]
    return along(values, weight.ndim, 0)


def _set(node: ir.Node, position: int, change: Any) -> None:
    """Replace a constant by a changed copy of the node's own: others may read the same one."""
    if position >= len(node.inputs) or node.inputs[position] is None:
        return
    old = G.array(node.inputs[position])
    if old is None:
        raise TypeError(f"input {position} of '{node.name}' is not constant")
    new = np.asarray(change(old.astype(np.float64))).astype(old.dtype)
    G.set_constant(node, position, f"{node.name}/{position}_scaled", new)
