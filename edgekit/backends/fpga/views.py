"""Where the elements of a model's values lie in the memory of an integer network.

A model moves data about (Transpose, Reshape, Flatten, …) as its layout wants it; hardware has one order, height, width,
channels. A view keeps for every element of the model's value its position in memory, so that moves cost nothing: they
permute the positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.backends.fpga.grid import refuse
from edgekit.backends.fpga.net import Layer, Tensor

Array = np.ndarray[Any, Any]
Pads = tuple[int, int, int, int]

RESHAPE = "keep the batch as the first dimension, and give the others as numbers"
MOVES = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Pad"})


@dataclass(frozen=True)
class View:
    """A quantized value. order: the shape of the model's value without batch, of positions in memory.

    pads: zeros around it that a Pad asked for, (top, left, bottom, right).
    """

    tensor: str
    order: Array
    pads: Pads = (0, 0, 0, 0)


@dataclass(frozen=True)
class Pending:
    """What an operator gives before it is rounded. layer: but for its output, shift and range.

    shape: of the tensor to come. exponents: of the sums; of a concat's operands. low, high: real bounds, of Relu, Clip.
    """

    layer: Layer
    shape: tuple[int, ...]
    exponents: tuple[int, ...]
    order: Array
    low: float = -np.inf
    high: float = np.inf
    pads: Pads = (0, 0, 0, 0)


def canonical(channels: int, height: int, width: int) -> Array:
    """Positions of (channels, height, width) in memory."""
    return np.arange(height * width * channels).reshape(height, width, channels).transpose(2, 0, 1)


def is_map(order: Array, tensor: Tensor) -> bool:
    """Whether an order of (channels, height, width) is that of the tensor's memory."""
    height, width, channels = tensor.hwc
    return order.shape == (channels, height, width) and np.array_equal(order, canonical(channels, height, width))


def moved(node: ir.Node, value: View | Pending) -> View | Pending:
    """The value after an operator of MOVES. Raises UnsupportedOpError for one that touches the batch."""
    if node.op_type in {"Identity", "Dropout"}:
        return value
    if any(value.pads):
        raise refuse(node, "it moves a padded value", "let the convolution pad")
    if node.op_type == "Pad":
        return replace(value, pads=_pads(node, value.order.ndim))
    return replace(value, order=_moved(node, value.order))


def _moved(node: ir.Node, order: Array) -> Array:
    rank = order.ndim + 1
    if node.op_type == "Transpose":
        axes = tuple(node.attributes.get_ints("perm", ()) or range(rank)[::-1])
        if axes[0] != 0:
            raise refuse(node, "it moves the batch", RESHAPE)
        return order.transpose([a - 1 for a in axes[1:]])
    if node.op_type == "Flatten":
        axis = int(node.attributes.get_int("axis", 1) or 0) % (rank + 1)
        if axis == 0 or order.size != int(np.prod(order.shape[axis - 1 :])):
            raise refuse(node, "it puts data into the batch", RESHAPE)
        return order.reshape(-1)
    if node.op_type == "Reshape":
        return _reshaped(node, order)
    given = _axes(node)
    if given is None and node.op_type == "Squeeze":
        return order.reshape([n for n in order.shape if n != 1])
    if given is None:
        raise refuse(node, "its axes are computed", RESHAPE)
    if node.op_type == "Squeeze":
        where = {a % rank for a in given}
        if 0 in where:
            raise refuse(node, "it removes the batch", RESHAPE)
        return order.reshape([n for a, n in enumerate(order.shape, 1) if a not in where])
    where = {a % (rank + len(given)) for a in given}
    if 0 in where:
        raise refuse(node, "it adds a dimension before the batch", RESHAPE)
    return np.expand_dims(order, [a - 1 for a in sorted(where)])


def _axes(node: ir.Node) -> list[int] | None:
    given = M.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if given is not None:
        return [int(a) for a in given.ravel()]
    return list(node.attributes.get_ints("axes", ()) or ()) or None


def _reshaped(node: ir.Node, order: Array) -> Array:
    target = M.constant(node.inputs[1])
    if target is None:
        raise refuse(node, "its shape is computed", RESHAPE)
    sizes = [int(n) for n in target.ravel()]
    kept = [order.shape[a - 1] if n == 0 and 0 < a <= order.ndim else n for a, n in enumerate(sizes)]
    rest, known = kept[1:], int(np.prod([n for n in kept[1:] if n != -1]))
    fits = order.size % known == 0 if -1 in rest and known else known == order.size
    if not kept or not fits or (-1 in rest and kept[0] == -1):
        raise refuse(node, f"the shape {sizes} of samples of {order.size} numbers", RESHAPE)
    return order.reshape(rest)


def _pads(node: ir.Node, rank: int) -> Pads:
    amounts = M.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    value = M.constant(fill) if fill is not None else np.zeros(1)
    zero = node.attributes.get_string("mode", "constant") == "constant" and value is not None and not np.any(value)
    if amounts is None or not zero or len(node.inputs) > 3 or rank not in (2, 3) or amounts.size != 2 * (rank + 1):
        raise refuse(node, "it pads with something else than zeros", "let the convolution pad with zeros")
    begins, ends = (part.tolist() for part in np.split(amounts.ravel(), 2))
    if any((*begins[:2], *ends[:2])) or min(*begins, *ends) < 0:
        raise refuse(node, "it pads the batch or the channels, or crops", "pad rows and columns only")
    if rank == 2:
        return 0, begins[2], 0, ends[2]
    return begins[2], begins[3], ends[2], ends[3]
