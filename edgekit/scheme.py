"""The one quantized form as data: the rules of the LiteRT int8 specification, which every runtime accepts.

The quantizer decides by these tables and the LiteRT lowering checks by them, so that what one writes the other takes.
"""

from __future__ import annotations

from collections.abc import Mapping

# several inputs that must share one scale
JOINS = frozenset({"Concat", "Max", "Min"})
# operators that hand on stored integers: equal scale and zero point in and out
EQUAL_SCALES = JOINS | frozenset(
    {"MaxPool", "GlobalMaxPool", "AveragePool", "Pad", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}
    | {"Slice", "Split", "Gather", "Expand", "Tile", "Resize", "ReduceMax", "ReduceMin", "DepthToSpace", "SpaceToDepth"}
)
# operators of weights and of two tensors; Relu and Relu6 fuse into both
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
BINARY = frozenset({"Add", "Sub", "Mul"})
UNARY = frozenset(
    {"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "Softmax", "HardSigmoid", "HardSwish"}
    | {"GlobalAveragePool", "ReduceMean"}
)
# every operator with an integer form
INTEGER = WEIGHTED | EQUAL_SCALES | BINARY | UNARY
# (scale, zero point) of the output that kernels write whatever the tensor says
FIXED_OUTPUT: Mapping[str, tuple[float, int]] = {
    "Softmax": (1 / 256, -128),
    "Sigmoid": (1 / 256, -128),
    "Tanh": (1 / 128, 0),
}
