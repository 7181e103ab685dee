"""The table of lowerings: ONNX operator -> function that writes it with an Emitter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgekit.backends.tflite.emitter import Emitter
from edgekit.backends.tflite.ops import (
    attention,
    compare,
    convolution,
    dense,
    einsum,
    elementwise,
    indices,
    moves,
    normalize,
    pool,
    quantization,
    recurrent,
    reduce,
    resize,
    transpose_convolution,
    unary,
)
from edgekit.backends.tflite.values import Node

Lowering = Callable[[Emitter, Node], None]

LOWERINGS: Mapping[str, Lowering] = {
    **attention.LOWERINGS,
    **compare.LOWERINGS,
    **convolution.LOWERINGS,
    **dense.LOWERINGS,
    **einsum.LOWERINGS,
    **elementwise.LOWERINGS,
    **indices.LOWERINGS,
    **moves.LOWERINGS,
    **normalize.LOWERINGS,
    **pool.LOWERINGS,
    **quantization.LOWERINGS,
    **recurrent.LOWERINGS,
    **reduce.LOWERINGS,
    **resize.LOWERINGS,
    **transpose_convolution.LOWERINGS,
    **unary.LOWERINGS,
}
