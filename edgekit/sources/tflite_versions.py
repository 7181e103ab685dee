"""The oldest TFLite runtime that has an operator in a version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Operator -> for its versions 1, 2, ...: the minor number of the TensorFlow 2.x runtime that brought it; 0: a 1.x did.
# tensorflow/lite/tools/versioning/runtime_version.cc as of TensorFlow 2.13; version 2 of EXP and RANGE, which it
# lacks, are in tflite-runtime 2.14
_MINORS: Mapping[str, tuple[int, ...]] = {
    "ABS": (0, 4, 5, 6, 12), "ADD": (0, 0, 4, 6), "ADD_N": (0,), "ARG_MAX": (0, 0, 9), "ARG_MIN": (0, 0, 9),
    "ASSIGN_VARIABLE": (6,), "ATAN2": (10,), "AVERAGE_POOL_2D": (0, 0, 3), "BATCH_MATMUL": (3, 3, 4, 5),
    "BATCH_TO_SPACE_ND": (0, 0, 3), "BIDIRECTIONAL_SEQUENCE_LSTM": (0, 0, 0),
    "BIDIRECTIONAL_SEQUENCE_RNN": (0, 0, 3), "BROADCAST_ARGS": (6,), "BROADCAST_TO": (5, 5, 5), "BUCKETIZE": (8,),
    "CALL_ONCE": (5,), "CAST": (0, 7, 8, 9, 12), "CEIL": (0,), "COMPLEX_ABS": (5,), "CONCATENATION": (0, 0, 3),
    "CONV_2D": (0, 0, 0, 3, 4, 9, 11), "CONV_3D": (5,), "CONV_3D_TRANSPOSE": (6,), "COS": (0,), "CUMSUM": (4,),
    "DENSIFY": (2,), "DEPTHWISE_CONV_2D": (0, 0, 0, 2, 3, 3, 11), "DEPTH_TO_SPACE": (1, 5),
    "DEQUANTIZE": (0, 0, 0, 2, 7), "DIV": (0, 3), "DYNAMIC_UPDATE_SLICE": (9,), "ELU": (0,),
    "EMBEDDING_LOOKUP": (0, 0, 0), "EMBEDDING_LOOKUP_SPARSE": (0,), "EQUAL": (0, 0, 3), "EXP": (0, 14),
    "EXPAND_DIMS": (0,), "FAKE_QUANT": (0, 0), "FILL": (0, 3, 5, 12), "FLOOR": (0,), "FLOOR_DIV": (0, 0),
    "FLOOR_MOD": (0,), "FULLY_CONNECTED": (0, 0, 0, 0, 0, 1, 3, 3, 3, 11), "GATHER": (0, 0, 0, 4, 5),
    "GATHER_ND": (0, 3, 5), "GELU": (9, 9), "GREATER": (0, 0), "GREATER_EQUAL": (0, 0), "HARD_SWISH": (0,),
    "HASHTABLE": (5,), "HASHTABLE_FIND": (5,), "HASHTABLE_IMPORT": (5,), "HASHTABLE_LOOKUP": (0,),
    "HASHTABLE_SIZE": (5,), "IF": (0,), "IMAG": (5,), "L2_NORMALIZATION": (0, 0), "L2_POOL_2D": (0,),
    "LEAKY_RELU": (0, 3), "LESS": (0, 0), "LESS_EQUAL": (0, 0), "LOCAL_RESPONSE_NORMALIZATION": (0,), "LOG": (0,),
    "LOGICAL_AND": (0,), "LOGICAL_NOT": (0,), "LOGICAL_OR": (0,), "LOGISTIC": (0, 0, 3), "LOG_SOFTMAX": (0, 0),
    "LSH_PROJECTION": (0,), "LSTM": (0, 0, 0, 3), "MATRIX_DIAG": (0,), "MATRIX_SET_DIAG": (0,),
    "MAXIMUM": (0, 0, 3, 3), "MAX_POOL_2D": (0, 0, 3), "MEAN": (0, 0, 4), "MINIMUM": (0, 0, 3, 3),
    "MIRROR_PAD": (0, 3, 12), "MUL": (0, 0, 0, 3, 6, 11), "MULTINOMIAL": (8,), "NEG": (0,),
    "NON_MAX_SUPPRESSION_V4": (1,), "NON_MAX_SUPPRESSION_V5": (1,), "NOT_EQUAL": (0, 0, 3), "ONE_HOT": (0,),
    "PACK": (0, 0, 3), "PAD": (0, 0, 4, 6), "PADV2": (0, 0, 4, 6), "POW": (0,), "PRELU": (0,),
    "QUANTIZE": (0, 0, 7), "RANDOM_STANDARD_NORMAL": (8,), "RANDOM_UNIFORM": (8,), "RANGE": (0, 14), "RANK": (0,),
    "READ_VARIABLE": (6,), "REAL": (5,), "REDUCE_ALL": (6,), "REDUCE_ANY": (0,), "REDUCE_MAX": (0, 0, 5),
    "REDUCE_MIN": (0, 0, 5), "REDUCE_PROD": (0, 6), "RELU": (0, 1, 5), "RELU6": (0, 0, 5), "RELU_0_TO_1": (10,),
    "RELU_N1_TO_1": (0,), "RESHAPE": (0,), "RESIZE_BILINEAR": (0, 0, 2, 5), "RESIZE_NEAREST_NEIGHBOR": (0, 0, 3, 4),
    "REVERSE_SEQUENCE": (0,), "REVERSE_V2": (0, 2, 5), "RFFT2D": (5,), "RNN": (0, 0, 3), "ROUND": (0,),
    "RSQRT": (0, 5), "SCATTER_ND": (1,), "SEGMENT_SUM": (2,), "SELECT": (0, 0, 12), "SELECT_V2": (2,), "SHAPE": (0,),
    "SIGN": (11, 12), "SIN": (0,), "SKIP_GRAM": (0,), "SLICE": (0, 0, 0, 4, 5), "SOFTMAX": (0, 0, 3),
    "SPACE_TO_BATCH_ND": (0, 0, 3), "SPACE_TO_DEPTH": (0, 0), "SPARSE_TO_DENSE": (0, 0, 0), "SPLIT": (0, 0, 0, 3),
    "SPLIT_V": (0, 3), "SQRT": (0,), "SQUARE": (0,), "SQUARED_DIFFERENCE": (0, 5), "SQUEEZE": (0, 5),
    "STRIDED_SLICE": (0, 0, 1, 2, 5, 6), "SUB": (0, 0, 3, 4, 4), "SUM": (0, 0), "SVDF": (0, 0, 2, 3),
    "TANH": (0, 0, 3), "TILE": (0, 2, 8, 12), "TOPK_V2": (0, 0), "TRANSPOSE": (0, 0, 0, 3, 4, 12),
    "TRANSPOSE_CONV": (0, 2, 3, 13), "UNIDIRECTIONAL_SEQUENCE_LSTM": (0, 0, 3, 12),
    "UNIDIRECTIONAL_SEQUENCE_RNN": (0, 0, 3), "UNIQUE": (0,), "UNPACK": (0, 0, 2, 3), "UNSORTED_SEGMENT_MAX": (10,),
    "UNSORTED_SEGMENT_MIN": (11,), "UNSORTED_SEGMENT_PROD": (10,), "UNSORTED_SEGMENT_SUM": (10,), "VAR_HANDLE": (6,),
    "WHERE": (0, 8), "WHILE": (0,), "ZEROS_LIKE": (0,),
}  # fmt: skip


def oldest_runtime(operators: Iterable[tuple[str, int]]) -> tuple[str | None, list[str]]:
    """(oldest TFLite that runs all of them, those that no list names) of (name, version) pairs.

    "2.3", or "1.15" for a file that a TFLite before 2.0 runs too. None if an operator is in no list: it came later,
    or is custom.
    """
    minors, unknown = [0], []
    for name, version in sorted(set(operators)):
        known = _MINORS.get(name, ())
        if 1 <= version <= len(known):
            minors.append(known[version - 1])
        else:
            unknown.append(f"{name} v{version}")
    return (None if unknown else f"2.{max(minors)}" if max(minors) else "1.15"), unknown
