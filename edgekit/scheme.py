"""The one quantized form as data: the rules of the LiteRT int8 specification, which every runtime accepts; an FPGA's.

The quantizer decides by these tables and the LiteRT lowering checks by them, so that what one writes the other takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

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
# metadata of a node whose Relu or Clip the saturation of its rounding has taken over: "low high"
BOUNDS = "edgekit.bounds"
# (scale, zero point) of the output that kernels write whatever the tensor says
FIXED_OUTPUT: Mapping[str, tuple[float, int]] = {
    "Softmax": (1 / 256, -128),
    "Sigmoid": (1 / 256, -128),
    "Tanh": (1 / 128, 0),
}

# int16 activations, symmetric, on int8 weights: LiteRT's 16x8 scheme
INTEGER_16 = frozenset(
    {"Conv", "Gemm", "MatMul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "Softmax", "ReduceMean"}
    | {"GlobalAveragePool", "Concat", "Max", "Min", "MaxPool", "GlobalMaxPool", "AveragePool", "Pad", "Reshape"}
    | {"Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Resize", "ReduceMax", "ReduceMin"}
    | BINARY
)
FIXED_OUTPUT_16: Mapping[str, tuple[float, int]] = dict.fromkeys(("Softmax", "Sigmoid", "Tanh"), (1 / 32768, 0))


# of an FPGA: symmetric, full range, power-of-two scales; 2 to 8 bits of weights and activations
INTEGER_FPGA = frozenset(
    {"Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "GlobalMaxPool", "AveragePool", "GlobalAveragePool"}
    | {"ReduceMean", "Concat", "Pad", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}
)

# which may end a model for it: the host computes them, where anybody asks for probabilities
HOST = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})

Scheme = Literal["litert", "fpga"]


def integer(bits: int, scheme: Scheme = "litert") -> frozenset[str]:
    """Operators with a form on activations of so many bits."""
    if scheme == "fpga":
        return INTEGER_FPGA
    return INTEGER if bits == 8 else INTEGER_16


def fixed_output(bits: int) -> Mapping[str, tuple[float, int]]:
    return FIXED_OUTPUT if bits == 8 else FIXED_OUTPUT_16
