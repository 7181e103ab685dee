"""What LiteRT takes, as data: operators, their options table, types, versions, and what XNNPACK runs in int8.

Types are `Tensor.kind`s of an operator's deciding input: "qint8" is int8 with a scale. Versions are those of
tensorflow/lite/tools/versioning/op_version.cc; an operator with a type that its row lacks is never written, because
some kernels abort the process instead of refusing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgekit.scheme import INTEGER


@dataclass(frozen=True)
class Rule:
    """options: table of the schema that holds the operator's options, "" for none. versions: type -> lowest version.

    xnnpack: types in which the XNNPACK delegate takes it. decides: index of the input whose type counts.
    """

    options: str
    versions: Mapping[str, int]
    xnnpack: frozenset[str] = field(default_factory=frozenset)
    decides: int = 0


def _types(text: str) -> dict[str, int]:
    """'float32 int32:2' -> {"float32": 1, "int32": 2}"""
    pairs = (item.partition(":") for item in text.split())
    return {name: int(number or 1) for name, _, number in pairs}


def _rule(options: str, versions: str, xnnpack: str = "", decides: int = 0) -> Rule:
    return Rule(options, _types(versions), frozenset(xnnpack.split()), decides)


RULES: Mapping[str, Rule] = {
    # sums of products
    "CONV_2D": _rule("Conv2DOptions", "float32 qint8:3 qint16:4", "float32 qint8"),
    "DEPTHWISE_CONV_2D": _rule("DepthwiseConv2DOptions", "float32 qint8:3 qint16:5", "float32 qint8"),
    "FULLY_CONNECTED": _rule("FullyConnectedOptions", "float32 qint8:4 qint16:7", "float32 qint8"),
    "TRANSPOSE_CONV": _rule("TransposeConvOptions", "float32:3 qint8:3 qint16:3", "float32 qint8", decides=2),
    "CONV_3D": _rule("Conv3DOptions", "float32"),
    "CONV_3D_TRANSPOSE": _rule("Conv3DOptions", "float32", decides=2),
    "BATCH_MATMUL": _rule("BatchMatMulOptions", "float32 qint8:2 qint16:3", "float32"),
    # pools
    "MAX_POOL_2D": _rule("Pool2DOptions", "float32 qint8:2 qint16:3", "float32 qint8"),
    "AVERAGE_POOL_2D": _rule("Pool2DOptions", "float32 qint8:2 qint16:3", "float32"),
    "L2_NORMALIZATION": _rule("L2NormOptions", "float32"),
    "LOCAL_RESPONSE_NORMALIZATION": _rule("LocalResponseNormalizationOptions", "float32"),
    # elementwise
    "ADD": _rule("AddOptions", "float32 qint8:2 qint16:3 int32 int64:4", "float32 qint8"),
    "SUB": _rule("SubOptions", "float32 qint8:2 qint16:5 int32 int64:4", "float32 qint8"),
    "MUL": _rule("MulOptions", "float32 qint8:2 qint16:4 int32 int64:4", "float32 qint8"),
    "DIV": _rule("DivOptions", "float32 int32", "float32"),
    "MAXIMUM": _rule("MaximumMinimumOptions", "float32 qint8:2 qint16:4 int32 int64:3", "float32"),
    "MINIMUM": _rule("MaximumMinimumOptions", "float32 qint8:2 qint16:4 int32 int64:3", "float32"),
    "POW": _rule("PowOptions", "float32 int32"),
    "SQUARED_DIFFERENCE": _rule("SquaredDifferenceOptions", "float32 qint8:2 int32", "float32"),
    "FLOOR_DIV": _rule("FloorDivOptions", "float32:2 int32"),
    "FLOOR_MOD": _rule("FloorModOptions", "float32 int32 int64"),
    "RELU": _rule("", "float32 qint8:2 qint16:3", "float32"),
    "RELU6": _rule("", "float32 qint8:2 qint16:3", "float32"),
    "RELU_N1_TO_1": _rule("", "float32 qint8", "float32"),
    "RELU_0_TO_1": _rule("", "float32 qint8", "float32"),
    "LEAKY_RELU": _rule("LeakyReluOptions", "float32 qint8:2 qint16:2", "float32 qint8"),
    "PRELU": _rule("", "float32 qint8", "float32"),
    "ELU": _rule("", "float32 qint8", "float32 qint8"),
    "GELU": _rule("GeluOptions", "float32 qint8:2", "float32"),
    "HARD_SWISH": _rule("HardSwishOptions", "float32 qint8", "float32"),
    "LOGISTIC": _rule("", "float32 qint8:2 qint16:3", "float32 qint8"),
    "TANH": _rule("", "float32 qint8:2 qint16:3", "float32 qint8"),
    "SOFTMAX": _rule("SoftmaxOptions", "float32 qint8:2 qint16:3", "float32"),
    "LOG_SOFTMAX": _rule("LogSoftmaxOptions", "float32 qint8:2"),
    "ABS": _rule("AbsOptions", "float32 int32:5 qint8:2", "float32"),
    "NEG": _rule("NegOptions", "float32 int32 int64", "float32"),
    "EXP": _rule("ExpOptions", "float32 qint8:2", "float32"),
    "LOG": _rule("", "float32", "float32"),
    "SQRT": _rule("", "float32", "float32"),
    "RSQRT": _rule("", "float32 qint8:2", "float32"),
    "SQUARE": _rule("SquareOptions", "float32", "float32"),
    "SIN": _rule("", "float32", "float32"),
    "COS": _rule("CosOptions", "float32", "float32"),
    "ATAN2": _rule("ATan2Options", "float32"),
    "SIGN": _rule("SignOptions", "float32", "float32"),
    "FLOOR": _rule("", "float32", "float32"),
    "CEIL": _rule("", "float32", "float32"),
    "ROUND": _rule("", "float32", "float32"),
    # comparisons and logic
    "EQUAL": _rule("EqualOptions", "float32 int32 int64 bool:2"),
    "NOT_EQUAL": _rule("NotEqualOptions", "float32 int32 int64 bool:2"),
    "LESS": _rule("LessOptions", "float32 int32 int64"),
    "LESS_EQUAL": _rule("LessEqualOptions", "float32 int32 int64"),
    "GREATER": _rule("GreaterOptions", "float32 int32 int64"),
    "GREATER_EQUAL": _rule("GreaterEqualOptions", "float32 int32 int64"),
    "LOGICAL_AND": _rule("LogicalAndOptions", "bool"),
    "LOGICAL_OR": _rule("LogicalOrOptions", "bool"),
    "LOGICAL_NOT": _rule("LogicalNotOptions", "bool"),
    "SELECT_V2": _rule("SelectV2Options", "float32 qint8 int8 int16 int32 int64 bool uint8", decides=1),
    # moves
    "RESHAPE": _rule(
        "ReshapeOptions",
        "float32 qint8 qint16 int8 int16 int32 int64 bool uint8 float16 uint16 uint32 float64",
        "float32 qint8",
    ),
    "TRANSPOSE": _rule(
        "TransposeOptions",
        "float32 qint8:2 qint16:4 int8:2 int16:4 int32 int64 bool uint8 float16 uint32",
        "float32 qint8",
    ),
    "CONCATENATION": _rule("ConcatenationOptions", "float32 qint8:2 qint16:3 int32 int64 bool:3", "float32 qint8"),
    "PAD": _rule("PadOptions", "float32 qint8:2 qint16:3 int32 int64 bool:3", "float32 qint8"),
    "PADV2": _rule("PadV2Options", "float32 qint8:2 qint16:3 int32 int64"),
    "MIRROR_PAD": _rule("MirrorPadOptions", "float32 qint8:2 qint16:3 int32 int64"),
    "SLICE": _rule("SliceOptions", "float32 qint8:2 qint16:4 int32 int64 bool", "float32 qint8"),
    "STRIDED_SLICE": _rule("StridedSliceOptions", "float32 qint8:2 qint16:4 int32 int64 bool:3"),
    "SPLIT": _rule("SplitOptions", "float32 qint8:2 qint16:4 int32", "float32 qint8", decides=1),
    "SPLIT_V": _rule("SplitVOptions", "float32 qint8:2 qint16:2 int32 int64"),
    "GATHER": _rule("GatherOptions", "float32 qint8:2 qint16:4 int32 int64 bool:3"),
    "GATHER_ND": _rule("GatherNdOptions", "float32 qint8 int32 int64 bool:5"),
    "SCATTER_ND": _rule("ScatterNdOptions", "float32 int8 int32 int64 bool uint8", decides=1),
    "TILE": _rule("TileOptions", "float32 qint8:2 int32 int64 bool"),
    "BROADCAST_TO": _rule("BroadcastToOptions", "float32:2 int32:2 int64:2 qint8:3 bool:2"),
    "EXPAND_DIMS": _rule("ExpandDimsOptions", "float32 qint8 qint16 int32 int64 bool"),
    "SQUEEZE": _rule("SqueezeOptions", "float32 qint8 qint16 int32 int64"),
    "PACK": _rule("PackOptions", "float32 qint8:2 int32 int64"),
    "UNPACK": _rule("UnpackOptions", "float32 qint8:2 int32 int64"),
    "REVERSE_SEQUENCE": _rule("ReverseSequenceOptions", "float32 int16 int32 int64 uint8"),
    "REVERSE_V2": _rule("ReverseV2Options", "float32 qint8:3 int32 int64 bool:2"),
    "DEPTH_TO_SPACE": _rule("DepthToSpaceOptions", "float32 qint8 int32 int64", "float32 qint8"),
    "SPACE_TO_DEPTH": _rule("SpaceToDepthOptions", "float32 qint8:2 int32 int64"),
    "RESIZE_BILINEAR": _rule("ResizeBilinearOptions", "float32:3 qint8:3 qint16:4", "float32 qint8"),
    "RESIZE_NEAREST_NEIGHBOR": _rule("ResizeNearestNeighborOptions", "float32:3 qint8:3 qint16:4"),
    "CUMSUM": _rule("CumsumOptions", "float32 int32 int64"),
    "FILL": _rule("FillOptions", "float32 int32 int64 bool qint8:2", decides=1),
    "RANGE": _rule("RangeOptions", "float32 int32 int64:2"),
    "SHAPE": _rule("ShapeOptions", "float32 qint8 int32 int64 bool"),
    "CAST": _rule("CastOptions", "float32 int32 int64 bool uint8 int16 uint32:2 int8:3 uint16:4 float16:5 float64:5"),
    "ONE_HOT": _rule("OneHotOptions", "int32 int64"),
    # reductions
    "MEAN": _rule("ReducerOptions", "float32 qint8:2 qint16:3 int32 int64", "float32 qint8"),
    "SUM": _rule("ReducerOptions", "float32 qint8:2 int32 int64", "float32"),
    "REDUCE_PROD": _rule("ReducerOptions", "float32 int32 int64"),
    "REDUCE_MAX": _rule("ReducerOptions", "float32 qint8:2 qint16:3 int32 int64"),
    "REDUCE_MIN": _rule("ReducerOptions", "float32 qint8:2 qint16:3 int32 int64"),
    "REDUCE_ANY": _rule("ReducerOptions", "bool"),
    "REDUCE_ALL": _rule("ReducerOptions", "bool"),
    "ARG_MAX": _rule("ArgMaxOptions", "float32 qint8:2 int32"),
    "ARG_MIN": _rule("ArgMinOptions", "float32 qint8:2 int32"),
    "TOPK_V2": _rule("TopKV2Options", "float32 qint8:2 int32 int64"),
    # recurrence
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _rule("UnidirectionalSequenceLSTMOptions", "float32"),
    # types
    "QUANTIZE": _rule("QuantizeOptions", "float32 qint8:2 qint16:3", "float32 qint8"),
    "DEQUANTIZE": _rule("DequantizeOptions", "qint8:2 qint16:3 float16:3", "qint8"),
}

# ONNX operators with an int8 form in LiteRT; all others are computed in float between DEQUANTIZE and QUANTIZE
INT8_FORM = INTEGER | {"PRelu", "Gelu", "QuantizeLinear", "ArgMax", "ArgMin"}
# ONNX operators that LiteRT has no counterpart of: (why, what the user can do)
_FLOAT_MODEL = (
    "it is quantized in a form that LiteRT does not have",
    "give edgekit the float model: it quantizes itself",
)
_FIXED_GRAPH = ("it decides at run time what is computed", "export the model with a fixed structure")
_RANDOM = ("it draws random numbers", "export the model for inference")
_NUMBERS = ("LiteRT holds tensors of numbers only", "do it outside of the model")
_DATA = ("the shape of its result depends on the data", "do it after the model, outside of it")
NO_FORM: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"), _FLOAT_MODEL),
    "DynamicQuantizeLinear": _FLOAT_MODEL,
    **dict.fromkeys(("If", "Loop", "Scan"), _FIXED_GRAPH),
    **dict.fromkeys(("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"), _RANDOM),
    **dict.fromkeys(("Bernoulli", "Multinomial"), _RANDOM),
    **dict.fromkeys(("StringConcat", "StringSplit", "StringNormalizer", "RegexFullMatch", "TfIdfVectorizer"), _NUMBERS),
    **dict.fromkeys(("SequenceAt", "SequenceMap", "OptionalGetElement", "ImageDecoder"), _NUMBERS),
    **dict.fromkeys(("NonZero", "NonMaxSuppression", "Unique"), _DATA),
}
# XNNPACK's int8 ADD, SUB and MUL refuse input/output scale ratios outside [2^-10, 2^8): xnnpack_delegate.cc
XNNPACK_SCALE_RATIO = (2.0**-10, 2.0**8)
# and its factors of one tensor (QUANTIZE from int8, LEAKY_RELU) lie in [2^-8, 2^7)
XNNPACK_FACTOR = (2.0**-8, 2.0**7)
