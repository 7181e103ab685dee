"""Per-channel scales and offsets, batch norm above all, folded into the weights and bias of the operator before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))  # in half precision a folded product rounds too coarsely
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_WEIGHTED = (*_CONVOLUTIONS, "Gemm", "MatMul")


@dataclass(frozen=True)
class Affine:
    """y = scale·x + offset; float64, each of size C or 1 along the channel axis."""

    scale: G.Array
    offset: G.Array

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.offset).all())


def fold(graph: ir.Graph) -> bool:
    """One sweep over the graph; True if anything changed."""
    changed = False
    for node in list(graph):
        if node.graph is None:
            continue
        changed = fold_into_producer(node) or fold_into_consumer(node) or split_batch_norm(node) or changed
    return changed


def fold_into_producer(node: ir.Node) -> bool:
    """A batch norm, or an Add/Sub/Mul/Div by a constant, taken into the weighted operator that feeds it alone."""
    source = _variable_input(node)
    producer = G.sole_producer(source, *_WEIGHTED) or _behind_reshape(source)
    if producer is None or source is None:
        return False
    weight = G.array(producer.inputs[1])
    if weight is None or weight.dtype not in _FLOATS:
        return False
    if producer.op_type == "MatMul" and weight.ndim != 2:
        return False
    affine = _affine_after(node, source, producer, _channels(producer, weight))
    if affine is None or not affine.finite or not _apply(producer, weight, affine):
        return False
    G.bypass(node, source)
    return True


def _behind_reshape(value: ir.Value | None) -> ir.Node | None:
    """The dense layer whose result is only reshaped, its last axis kept: Keras flattens what has more axes than two."""
    reshape = G.sole_producer(value, "Reshape")
    before, after = (G.dims(reshape.inputs[0]), G.dims(value)) if reshape is not None else (None, None)
    if reshape is None or not before or not after or before[-1] != after[-1] or not isinstance(after[-1], int):
        return None
    return G.sole_producer(reshape.inputs[0], "Gemm", "MatMul")


def fold_into_consumer(node: ir.Node) -> bool:
    """A factor before a convolution, taken into its weights: the 1/255 of a model that rescales its own input.

    Only factors: what is added would be missing from the convolution's zero padding.
    """
    if not G.is_op(node, "Conv"):
        return False
    weight = G.array(node.inputs[1])
    transpose = G.sole_producer(node.inputs[0], "Transpose")
    scaled = node.inputs[0] if transpose is None else transpose.inputs[0]
    product = G.sole_producer(scaled, "Mul")
    source = None if product is None else _variable_input(product)
    if weight is None or weight.dtype not in _FLOATS or product is None or source is None or scaled is None:
        return False
    order = G.integers(transpose, "perm") if transpose is not None else tuple(range(weight.ndim))
    sizes = G.dims(source)
    if order is None or sizes is None or sizes != G.dims(scaled):
        return False
    constant = next(c for c in map(G.array, product.inputs) if c is not None)
    channels = int(weight.shape[1]) * G.integer(node, "group", 1)
    factor = _per_channel(constant, weight.ndim, order[1], channels)
    if factor is None or not np.isfinite(factor).all():
        return False
    groups = np.arange(weight.shape[0]) * G.integer(node, "group", 1) // weight.shape[0]
    columns = groups[:, None] * weight.shape[1] + np.arange(weight.shape[1])
    along = np.broadcast_to(factor, (channels,))[columns].reshape(*columns.shape, *[1] * (weight.ndim - 2))
    with np.errstate(over="ignore"):
        new_weight = (weight * along).astype(weight.dtype)
    if not np.isfinite(new_weight).all():
        return False
    G.set_constant(node, 1, f"{node.name}/weight", new_weight)
    G.bypass(product, source)
    return True


def split_batch_norm(node: ir.Node) -> bool:
    """A batch norm with no weighted operator before it becomes Mul and Add: the one case where a node is added."""
    x = node.inputs[0] if G.is_op(node, "BatchNormalization") else None
    affine = _batch_norm(node) if x is not None else None
    if x is None or x.shape is None or affine is None or not affine.finite or x.dtype is None:
        return False
    if np.dtype(x.dtype.numpy()) not in _FLOATS:
        return False
    graph, shape = G.graph_of(node), (-1, *[1] * max(len(x.shape) - 2, 0))
    kind = x.dtype.numpy()
    scale = G.new_constant(graph, f"{node.name}/scale", affine.scale.reshape(shape).astype(kind))
    offset = G.new_constant(graph, f"{node.name}/offset", affine.offset.reshape(shape).astype(kind))
    product = ir.node("Mul", [x, scale], name=f"{node.name}/scale")
    product.outputs[0].name = f"{node.outputs[0].name}/scaled"
    product.outputs[0].shape, product.outputs[0].type = x.shape, x.type
    graph.insert_before(node, product)
    G.become(node, "Add", [product.outputs[0], offset])
    return True


def _variable_input(node: ir.Node) -> ir.Value | None:
    """The input that is not a parameter."""
    if G.is_op(node, "BatchNormalization"):
        return node.inputs[0]
    if not G.is_op(node, "Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if G.array(second) is not None:
        return first
    return second if node.op_type in ("Add", "Mul", "Sub") and G.array(first) is not None else None


def _channels(producer: ir.Node, weight: G.Array) -> int:
    if producer.op_type == "ConvTranspose":
        return int(weight.shape[1]) * G.integer(producer, "group", 1)
    if producer.op_type == "Conv" or (producer.op_type == "Gemm" and G.integer(producer, "transB", 0)):
        return int(weight.shape[0])
    return int(weight.shape[1])


def _batch_norm(node: ir.Node) -> Affine | None:
    """Ioffe & Szegedy 2015, algorithm 2: the running statistics as one scale and one offset a channel."""
    if G.integer(node, "training_mode", 0) or len(node.inputs) != 5 or any(o.name for o in node.outputs[1:]):
        return None
    found = [G.array(v) for v in node.inputs[1:]]
    parameters = [a.astype(np.float64) for a in found if a is not None]
    if len(parameters) != 4:
        return None
    gamma, beta, mean, variance = parameters
    epsilon = G.number(node, "epsilon", 1e-5)
    spread = variance + epsilon
    if not bool((spread > epsilon / 2).all()):
        return None  # a negative variance: NaN, infinite or mere rounding, left for the runtime to show
    scale = gamma / np.sqrt(spread)
    return Affine(scale, beta - mean * scale)


def _affine_after(node: ir.Node, source: ir.Value, producer: ir.Node, channels: int) -> Affine | None:
    rank = None if source.shape is None else len(source.shape)
    if producer.op_type == "Gemm" and source is producer.outputs[0]:
        rank = 2
    if producer.op_type in _CONVOLUTIONS:
        weight = G.array(producer.inputs[1])
        rank = None if weight is None else weight.ndim
    axis = 1 if producer.op_type in _CONVOLUTIONS or rank is None else rank - 1
    if node.op_type == "BatchNormalization":
        return _batch_norm(node) if rank is not None and axis == 1 else None
    constants = [a for a in map(G.array, node.inputs) if a is not None]
    values = _per_channel(constants[0], rank, axis, channels) if len(constants) == 1 else None
    if values is None:
        return None
    one, zero = np.ones(1), np.zeros(1)
    if node.op_type == "Add":
        return Affine(one, values)
    if node.op_type == "Sub":
        return Affine(one, -values) if G.array(node.inputs[1]) is not None else Affine(-one, values)
    if node.op_type == "Div":
        return None if bool((values == 0).any()) else Affine(1 / values, zero)
    return Affine(values, zero)


def _per_channel(constant: G.Array, rank: int | None, axis: int, channels: int) -> G.Array | None:
    """The constant as a vector of C or 1, if it varies along the channel axis only and broadcasts nothing."""
    if constant.dtype not in _FLOATS:
        return None
    if constant.ndim == 0:
        return constant.astype(np.float64).reshape(1)
    if rank is None or constant.ndim > rank:
        return None
    sizes = (1,) * (rank - constant.ndim) + constant.shape
    if any(size != 1 for at, size in enumerate(sizes) if at != axis) or sizes[axis] not in (1, channels):
        return None
    return constant.astype(np.float64).reshape(-1)


def _apply(producer: ir.Node, weight: G.Array, affine: Affine) -> bool:
    """Write scale·W and scale·bias + offset into the operator; False, and nothing touched, if it cannot hold them."""
    channels = _channels(producer, weight)
    scale = np.broadcast_to(affine.scale, (channels,))
    bias = _bias(producer, channels)
    needs_bias = bool((affine.offset != 0).any())
    if bias is None or (producer.op_type == "MatMul" and needs_bias and not _becomes_gemm(producer)):
        return False
    with np.errstate(over="ignore"):
        new_weight = (weight * _along(producer, weight, scale)).astype(weight.dtype)
        new_bias = (bias * scale + affine.offset).astype(weight.dtype)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return False
    if bool((scale != 1).any()):
        G.set_constant(producer, 1, f"{producer.name}/weight", new_weight)
    had_bias = len(producer.inputs) > 2 and producer.inputs[2] is not None
    if needs_bias or (had_bias and (bool((scale != 1).any()))):
        if producer.op_type == "MatMul":
            producer.op_type = "Gemm"
        if producer.op_type == "Gemm":
            producer.attributes.pop("beta", None)
        G.set_constant(producer, 2, f"{producer.name}/bias", new_bias)
    return True


def _becomes_gemm(producer: ir.Node) -> bool:
    """MatMul of a matrix may become Gemm, which has a bias; of more axes it may not."""
    x = producer.inputs[0]
    return x is not None and x.shape is not None and len(x.shape) == 2


def _bias(producer: ir.Node, channels: int) -> G.Array | None:
    """The bias as float64 (C,), zeros if absent; None if it is computed or does not lie along the channels."""
    if len(producer.inputs) < 3 or producer.inputs[2] is None:
        return np.zeros(channels)
    constant = G.array(producer.inputs[2])
    values = None if constant is None else _per_channel(constant, 2, 1, channels)
    if values is None:
        return None
    factor = G.number(producer, "beta", 1.0) if producer.op_type == "Gemm" else 1.0
    return np.broadcast_to(values * factor, (channels,))


def _along(producer: ir.Node, weight: G.Array, scale: G.Array) -> G.Array:
    """The scale of each output channel, shaped to multiply the weight."""
    if producer.op_type == "ConvTranspose":  # (C_in, C_out / group, ...): each block of input rows is one group
        groups = G.integer(producer, "group", 1)
        rows = np.repeat(scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
    if producer.op_type == "Conv" or (producer.op_type == "Gemm" and G.integer(producer, "transB", 0)):
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    return scale
