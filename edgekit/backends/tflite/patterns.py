"""Pairs of nodes that LiteRT takes in another order of channels than ONNX has them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgekit.backends.tflite.graph import Array, Quant
from edgekit.backends.tflite.prepare import Prepared
from edgekit.backends.tflite.values import Node, Value


def arrange(prepared: Prepared) -> Prepared:
    """In place: a convolution before a DepthToSpace in CRD order (PixelShuffle) makes its channels in DCR order."""
    writer = {id(v): n for n in prepared.nodes for v in n.outputs}
    read: dict[int, int] = {}
    for value in [v for n in prepared.nodes for v in n.inputs] + [v for _, v in prepared.outputs]:
        read[id(value)] = read.get(id(value), 0) + 1
    for node in prepared.nodes:
        if node.op != "DepthToSpace" or node.str("mode", "DCR") != "CRD":
            continue
        before = node.require(0)
        conv = writer.get(id(before))
        if conv is not None and conv.op == "Conv" and read[id(before)] == 1 and _constant(conv):
            depth = before.shape[1] // node.int("blocksize", 1) ** 2
            order = np.arange(before.shape[1]).reshape(depth, -1).T.reshape(-1)
            conv.inputs = [conv.inputs[0], *(_ordered(v, order) for v in conv.inputs[1:])]
            node.extra["mode"] = "DCR"
    return prepared


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
