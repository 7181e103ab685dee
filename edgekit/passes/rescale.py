"""Multiplies channels of values by factors: their producers' parameters times them, their readers' through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import ArtifactError
from edgekit.passes import fold_graph as G
from edgekit.passes.channels import Channels, End, trace

Array = np.ndarray[Any, Any]


def rescaled(model: ir.Model, factors: Mapping[str, Sequence[float]]) -> ir.Model:
    """A copy of a prepared model. factors: value -> one per channel of it, > 0; values that are absent keep theirs.

    Raises ArtifactError for factors that do not fit the model.
    """
    out = M.clone(model)
    found = trace(out)
    _check(found, factors)

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


def _check(found: Channels, factors: Mapping[str, Sequence[float]]) -> None:
    """One factor for all that is tied together, none for what may have none."""
    ends = {end.value.name or "": end.labels for end in found.ends()}
    every = np.arange(found.count())
    roots, may = found.roots(every), found.free(every)
    chosen: dict[int, float] = {}
    for name in {**ends, **dict.fromkeys(factors)}:
        labels = ends.get(name, every[:0])
        given = factors.get(name, (1.0,) * len(labels))
        fits = len(given) == len(labels) and name in ends
        if not fits or not all(
            0 < factor < np.inf
            and (factor == 1 or may[label])
            and chosen.setdefault(int(roots[label]), factor) == factor
            for label, factor in zip(labels, given, strict=True)
        ):
            raise ArtifactError(f"the plan rescales '{name}' by factors that it cannot have", "plan it again")


def _clip(node: ir.Node, position: int) -> None:
    """A Min of one bound for all channels is a Clip; behind a Relu both are one, which kernels fuse."""
    bound = G.array(node.inputs[position])
    source = node.inputs[1 - position]
    if node.op_type != "Min" or bound is None or not np.allclose(bound, bound.flat[0], rtol=1e-6, atol=0):
        return
    sizes = G.dims(source) or ()
    if bound.ndim > len(sizes) or any(n not in (1, m) for n, m in zip(bound.shape[::-1], sizes[::-1], strict=False)):
        return  # the bound makes the value larger
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


def over_taps(node: ir.Node, weight: Array, channels: int, reduce: Callable[[Array], Array]) -> Array:
    """A number per (output, input channel) from the weights between them; 0 beyond a convolution's group.

    channels: input channels of the node. reduce: float64 (outputs, inputs, taps) -> (outputs, inputs).
    """
    if node.op_type == "Conv":
        flat = weight.reshape(*weight.shape[:2], -1).astype(np.float64)
        columns = by_input(node, weight, np.arange(channels)).reshape(flat.shape[:2])
        out = np.zeros((len(flat), channels))
        out[np.arange(len(flat))[:, None], columns] = reduce(flat)
        return out
    if node.op_type == "ConvTranspose":
        return reduce(weight.reshape(*weight.shape[:2], -1).swapaxes(0, 1).astype(np.float64))
    return reduce((weight if output_axis(node) == 0 else weight.T).astype(np.float64)[:, :, None])


def _set(node: ir.Node, position: int, change: Any) -> None:
    """Replace a constant by a changed copy of the node's own: others may read the same one."""
    if position >= len(node.inputs) or node.inputs[position] is None:
        return
    old = G.array(node.inputs[position])
    if old is None:
        raise TypeError(f"input {position} of '{node.name}' is not constant")
    new = np.asarray(change(old.astype(np.float64))).astype(old.dtype)
    G.set_constant(node, position, f"{node.name}/{position}_scaled", new)
