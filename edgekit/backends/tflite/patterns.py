"""Pairs of nodes that LiteRT takes as one, or in another order of channels than ONNX has them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from edgekit.backends.tflite.graph import Array, Quant
from edgekit.backends.tflite.prepare import Prepared
from edgekit.backends.tflite.values import Node, Value


def arrange(prepared: Prepared) -> Prepared:
    """In place."""
    writer = {id(v): n for n in prepared.nodes for v in n.outputs}
    read = Counter(id(v) for n in prepared.nodes for v in n.inputs) + Counter(id(v) for _, v in prepared.outputs)
    alone = {key: node for key, node in writer.items() if read[key] == 1}
    for node in prepared.nodes:
        if node.op == "DepthToSpace" and node.str("mode", "DCR") == "CRD":
            _shuffled(node, alone.get(id(node.require(0))))
    merged = {id(n) for n in prepared.nodes if n.op == "Add" and _biased(n, alone)}
    prepared.nodes = [n for n in prepared.nodes if id(n) not in merged]
    return prepared


def _biased(add: Node, alone: dict[int, Node]) -> bool:
    """A MatMul by a constant matrix takes in the constant row that is added to its result, of whatever rank."""
    if len(add.inputs) != 2:
        return False
    for value, row in (add.inputs, add.inputs[::-1]):
        product = alone.get(id(value))
        if value is None or row is None or product is None or product.op != "MatMul" or product.activation != "NONE":
            continue
        x, weight, out = product.require(0), product.require(1), add.outputs[0]
        plain = all(v.quant is None and v.dtype == np.float32 for v in (x, weight, value, row, out))
        flat = row.data is not None and not row.dynamic and row.data.size in (1, out.shape[-1] if out.shape else 0)
        ends = row.rank == 0 or row.data is None or row.shape[-1] == row.data.size
        if (
            plain
            and flat
            and ends
            and weight.data is not None
            and weight.rank == 2
            and x.rank >= 2
            and value.shape == out.shape
        ):
            product.op, product.inputs, product.outputs = "Gemm", [x, weight, row], add.outputs
            product.activation = add.activation
            return True
    return False


def _shuffled(node: Node, conv: Node | None) -> None:
    """A convolution before a DepthToSpace in CRD order (PixelShuffle) makes its channels in DCR order."""
    if conv is None or conv.op != "Conv" or not _constant(conv):
        return
    channels = node.require(0).shape[1]
    depth = channels // node.int("blocksize", 1) ** 2
    order = np.arange(channels).reshape(depth, -1).T.reshape(-1)
    conv.inputs = [conv.inputs[0], *(_ordered(v, order) for v in conv.inputs[1:])]
    node.extra["mode"] = "DCR"


def _constant(conv: Node) -> bool:
    """Whether weights and bias may be reordered: constants, and no groups that outputs belong to."""
    return conv.int("group", 1) == 1 and all(v is None or v.data is not None for v in conv.inputs[1:])


def _ordered(value: Value | None, order: Array) -> Value | None:
    """The constant with its first axis in this order, and its scales if there is one for each."""
    if value is None or value.data is None:
        return value
    quant = value.quant
    if quant is not None and not quant.per_tensor and quant.axis == 0:
        quant = Quant(quant.scales[order], quant.zeros[order], 0)
    return replace(value, data=value.data[order], quant=quant)
