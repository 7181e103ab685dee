"""What a user should know of a graph that is right but not at its best: slow operators, sums that could overflow."""

from __future__ import annotations

from collections import Counter

import numpy as np

from edgekit.backends.tflite.graph import Graph, Operator
from edgekit.backends.tflite.rules import RULES, XNNPACK_FACTOR, XNNPACK_SCALE_RATIO

_SUMS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0, "TRANSPOSE_CONV": 0}
_INPUT = {"TRANSPOSE_CONV": 2}
_MOST = 2**31
# operators that XNNPACK takes only where their scales are not too far apart
_BOUNDED = frozenset({"ADD", "SUB", "MUL", "QUANTIZE", "LEAKY_RELU"})
# of no cost, whoever runs them
FREE = frozenset({"RESHAPE", "QUANTIZE", "DEQUANTIZE", "SHAPE", "EXPAND_DIMS", "SQUEEZE"})


def remarks(graph: Graph) -> list[str]:
    """One line each; empty for a graph that runs whole in XNNPACK's kernels."""
    slow = Counter(o.code for o in graph.operators if o.code not in FREE and not delegated(o))
    out = []
    if slow and any(o.outputs[0].kind in ("qint8", "qint16") for o in graph.operators):
        told = ", ".join(f"{count} {code}" for code, count in slow.most_common())
        out.append(f"run by LiteRT's own kernels, not XNNPACK's: {told}")
    wrapping = [o.source for o in graph.operators if overflows(o)]
    if wrapping:
        told = ", ".join(f"'{name}'" for name in wrapping[:3])
        out.append(f"sums of {len(wrapping)} layer(s) could leave int32 on some input and wrap: {told}")
    return out


def delegated(operator: Operator) -> bool:
    """Whether the XNNPACK delegate takes the operator, by type and by the ratio of its scales."""
    rule = RULES[operator.code]
    decides = operator.inputs[rule.decides]
    if decides is None or decides.kind not in rule.xnnpack or _left_over(operator):
        return False
    out = operator.outputs[0]
    if decides.quant is None or out.quant is None or operator.code not in _BOUNDED:
        return True
    low, high = XNNPACK_SCALE_RATIO
    if operator.code in ("QUANTIZE", "LEAKY_RELU"):
        ratio = decides.quant.scale / out.quant.scale
        slopes = [1.0, abs(operator.options["alpha"])] if operator.code == "LEAKY_RELU" else [1.0]
        return all(XNNPACK_FACTOR[0] <= ratio * slope < XNNPACK_FACTOR[1] for slope in slopes)
    scales = [t.quant.scale for t in operator.inputs if t is not None and t.quant is not None]
    ratios = [np.prod(scales) / out.quant.scale] if operator.code == "MUL" else [s / out.quant.scale for s in scales]
    return all(low <= r < high for r in ratios)


def _left_over(operator: Operator) -> bool:
    """Forms that XNNPACK leaves, seen in ai-edge-litert 2.3: slices "to the end", int8 weights of float depthwise."""
    if operator.code == "SLICE":
        sizes = operator.inputs[2]
        return sizes is None or sizes.data is None or bool((sizes.data < 0).any())
    weight = operator.inputs[1] if operator.code == "DEPTHWISE_CONV_2D" else None
    return weight is not None and weight.kind == "qint8" and operator.outputs[0].kind == "float32"


def overflows(operator: Operator) -> bool:
    """Whether some int8 input makes the int32 sum of a channel wrap: Σ|w|·255 + |bias| reaches 2^31."""
    axis = _SUMS.get(operator.code)
    if axis is None:
        return False
    x = operator.inputs[_INPUT.get(operator.code, 0)]
    weight = operator.inputs[1]
    if x is None or weight is None or weight.data is None or x.kind != "qint8":
        return False
    rest = tuple(a for a in range(weight.data.ndim) if a != axis)
    reach = np.abs(weight.data.astype(np.int64)).sum(axis=rest) * 255
    index = _INPUT.get(operator.code, 0) + (2 if operator.code != "TRANSPOSE_CONV" else 1)
    bias = operator.inputs[index] if len(operator.inputs) > index else None
    if bias is not None and bias.data is not None:
        reach = reach + np.abs(bias.data.astype(np.int64))
    return bool((reach >= _MOST).any())
