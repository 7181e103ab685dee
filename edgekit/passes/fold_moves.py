"""Operators that only move data: transposes, reshapes and pads merged, cancelled or taken into a convolution."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G

_RESHAPING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def fold(graph: ir.Graph) -> bool:
    """One sweep over the graph; True if anything changed."""
    changed = False
    for node in list(graph):
        if node.graph is None or len(node.outputs) != 1:
            continue
        changed = _identity(node) or _transpose(node) or _shape(node) or _reshape(node) or _pad(node) or changed
    return changed


def _identity(node: ir.Node) -> bool:
    """Identity, Dropout outside of training, or the MatMul by ones of a Keras einsum with one operand."""
    training = len(node.inputs) > 2 and node.inputs[2] is not None
    same = G.is_op(node, "Identity", "Dropout") and not training
    if not node.inputs or node.inputs[0] is None or not (same or _multiplies_by_one(node) or _changes_nothing(node)):
        return False
    G.bypass(node, node.inputs[0])
    return node.graph is None


def _multiplies_by_one(node: ir.Node) -> bool:
    ones = G.array(node.inputs[1]) if G.is_op(node, "MatMul") else None
    if ones is None or ones.ndim < 2 or ones.shape[-2:] != (1, 1) or not bool((ones == 1).all()):
        return False
    sizes = G.dims(node.inputs[0])
    return sizes is not None and sizes == G.dims(node.outputs[0])


def _changes_nothing(node: ir.Node) -> bool:
    """An addition of zeros or a product with ones that broadcasts nothing: a Keras Normalization nobody adapted."""
    neutral = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}.get(node.op_type)
    if neutral is None or not G.is_op(node, node.op_type) or len(node.inputs) != 2:
        return False
    constant, sizes = G.array(node.inputs[1]), G.dims(node.inputs[0])
    return constant is not None and bool((constant == neutral).all()) and sizes == G.dims(node.outputs[0]) is not None


def _transpose(node: ir.Node) -> bool:
    """A transpose of a transpose is one transpose; one that changes no order is none, nor one that undoes a reshape."""
    x = node.inputs[0] if G.is_op(node, "Transpose") else None
    if x is None:
        return False
    perm = _perm(node)
    if perm is not None and perm == tuple(range(len(perm))):
        G.bypass(node, x)
        return True
    inner = x.producer()
    if perm is None or inner is None:
        return False
    if G.is_op(inner, *_RESHAPING) and inner.inputs[0] is not None and _keeps_order(perm, G.dims(x)):
        if G.dims(inner.inputs[0]) != G.dims(node.outputs[0]):
            return False
        G.bypass(node, inner.inputs[0])
        return True
    if not G.is_op(inner, "Transpose"):
        return False
    first = _perm(inner)
    if first is None or inner.inputs[0] is None:
        return False
    G.become(node, "Transpose", [inner.inputs[0]], perm=[first[p] for p in perm])
    return True


def _keeps_order(perm: tuple[int, ...], sizes: G.Dims | None) -> bool:
    """Whether only axes of size 1 move."""
    large = [p for p in perm if sizes is None or sizes[p] != 1]
    return sizes is not None and large == sorted(large)


def _perm(node: ir.Node) -> tuple[int, ...] | None:
    """The order of a transpose; reversed when the file does not say."""
    perm = G.integers(node, "perm")
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if perm is None:
        return None if shape is None else tuple(reversed(range(len(shape))))
    return tuple(p % len(perm) for p in perm)


def _shape(node: ir.Node) -> bool:
    """The shape of a value whose sizes are all known is a constant."""
    if not G.is_op(node, "Shape") or node.outputs[0].is_graph_output():
        return False
    sizes = G.dims(node.inputs[0])
    if sizes is None:
        return False
    part = sizes[slice(G.integer(node, "start", 0), G.integer(node, "end", len(sizes)))]
    numbers = [s for s in part if isinstance(s, int)]
    if len(numbers) != len(part):
        return False
    name = f"{node.outputs[0].name}/value"
    G.bypass(node, G.new_constant(G.graph_of(node), name, np.array(numbers, np.int64)))
    return True


def _reshape(node: ir.Node) -> bool:
    """A computed target becomes a constant one, a chain becomes its last link, and one that changes nothing goes."""
    x = node.inputs[0] if G.is_op(node, *_RESHAPING) else None
    to = G.dims(node.outputs[0])
    if x is None or to is None or not _one_unknown(to):
        return False
    inner = x.producer()
    chained = G.is_op(inner, *_RESHAPING) and inner is not None and inner.inputs[0] is not None
    source = inner.inputs[0] if chained and inner is not None else x
    if source is not None and G.dims(source) == to:
        G.bypass(node, source)
        return True
    computed = G.is_op(node, "Reshape") and G.array(node.inputs[1]) is None
    if source is None or not (chained or computed):
        return False
    target = np.array([s if isinstance(s, int) else -1 for s in to], np.int64)
    name = f"{node.name}/shape"
    G.become(node, "Reshape", [source, G.new_constant(G.graph_of(node), name, target)])
    return True


def _one_unknown(sizes: G.Dims) -> bool:
    """Whether a constant target can name these sizes: at most one symbol, and no zero, which would mean "copy"."""
    return sum(isinstance(s, str) for s in sizes) <= 1 and math.prod(s for s in sizes if isinstance(s, int)) > 0


def _pad(node: ir.Node) -> bool:
    """Zeros around the spatial axes become the padding of the convolution that follows."""
    x = node.inputs[0] if G.is_op(node, "Conv") else None
    pad = G.sole_producer(x, "Pad")
    if x is None or pad is None or G.text(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    source, weight = pad.inputs[0], node.inputs[1]
    rank = None if weight is None or weight.shape is None else len(weight.shape)
    before_after = None if rank is None else _zero_pads(pad, rank)
    if source is None or rank is None or before_after is None:
        return False
    before, after = before_after[:rank], before_after[rank:]
    if any(before[:2]) or any(after[:2]) or min(before_after) < 0:
        return False
    own = None if G.text(node, "auto_pad", "NOTSET") == "VALID" else G.integers(node, "pads")
    pads = [a + b for a, b in zip((*before[2:], *after[2:]), own or (0,) * (2 * rank - 4), strict=True)]
    node.attributes.pop("auto_pad", None)
    node.attributes["pads"] = ir.AttrInt64s("pads", pads)
    node.replace_input_with(0, source)
    return True


def _zero_pads(pad: ir.Node, rank: int) -> tuple[int, ...] | None:
    """The pads of a constant Pad with zeros, for all axes: (before..., after...)."""
    if G.text(pad, "mode", "constant") != "constant" or len(pad.inputs) < 2:
        return None
    pads, inputs = G.array(pad.inputs[1]), [*pad.inputs, None, None, None]
    value, axes = inputs[2], inputs[3]
    fill = np.zeros(1) if value is None else G.array(value)
    at = np.arange(rank) if axes is None else G.array(axes)
    if pads is None or fill is None or at is None or bool((fill != 0).any()) or pads.size != 2 * at.size:
        return None
    full = np.zeros((2, rank), np.int64)
    full[:, at % rank] = pads.reshape(2, -1)
    return tuple(int(p) for p in full.reshape(-1))
