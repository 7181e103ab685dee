"""Parts of a quantization plan from what was observed: ranges, weight scales, bias corrections, what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import NonFiniteError
from edgekit.passes.apply_plan import folded, quantize_weight
from edgekit.passes.calibrate import Observed
from edgekit.passes.decide import HUGE, Decision, clip_bounds, weight_axis, weight_of
from edgekit.passes.grids import Grids
from edgekit.passes.plan import Activation, Fate, Method, QuantizationPlan

Array = np.ndarray[Any, Any]
# Operands of an addition further apart than this share no int8 scale: the smaller would vanish (masks, -1e9 offsets).
MASK_RATIO = 1e4
SOFTMAX_RATIO = 8.0  # 32 of 256 levels are left for the smaller: masks of -10000 on scores of 10 are common (BERT)
# |bias| and the sum of products each get half of int32.
HALF_RANGE = 2.0**30


def weight_scales(
    weight: Array, axis: int, limit: int, input_scale: float, bias: Array | None, *, wraps: bool = True
) -> Array:
    """float32 scale per channel of `axis`: max |w| / limit, raised where bias or sum would leave int32.

    bias: one value per output channel; more of them than channels (grouped ConvTranspose) share scales in turn.
    wraps: whether sums are of 32 bits; the bias always is.
    """
    rows = np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64))
    largest, total = rows.max(axis=1, initial=0.0), rows.sum(axis=1)
    scales = np.maximum(largest / limit, total * 255 / HALF_RANGE if wraps else 0.0)
    if bias is not None:
        offset = np.abs(bias).reshape(-1, len(scales)).max(axis=0)
        # a channel without weights only adds its bias: 20 bits of it are plenty
        scales = np.maximum(scales, offset / (input_scale * np.where(largest > 0, HALF_RANGE, 2.0**20)))
    # input scale times weight scale must stay a normal float32
    scales = np.maximum(scales, 2.0**-120 / input_scale)
    scales[(largest == 0) & (scales <= 2.0**-119 / input_scale)] = 1.0
    rounded: Array = scales.astype(np.float32)
    return rounded


def least_scales(bias: Array | None, input_scale: float, channels: int) -> Array:
    """Below which the bias, or the products' scale, would leave its range; one per channel."""
    offset = 0.0 if bias is None else np.abs(bias).reshape(-1, channels).max(axis=0) / HALF_RANGE
    return np.asarray(np.broadcast_to(np.maximum(offset, 2.0**-120) / input_scale, (channels,)))


def multiplied(model: ir.Model) -> frozenset[str]:
    """Inputs of the nodes whose bias can be corrected: channels on axis 1."""
    nodes = [n for n in model.graph if n.op_type in {"Conv", "Gemm"} and n.inputs and n.inputs[0] is not None]
    return frozenset(n.inputs[0].name or "" for n in nodes if n.inputs[0] is not None)


def bias_shifts(model: ir.Model, plan: QuantizationPlan, seen: dict[str, Observed]) -> dict[str, tuple[float, ...]]:
    """Mean error that rounded weights leave per output channel, (W - Wq) E[x] (Nagel et al. 2019, section 4.2)."""
    out: dict[str, tuple[float, ...]] = {}
    for node in model.graph:
        source = node.inputs[0] if node.inputs else None
        found = seen.get(source.name or "") if source is not None else None
        weight = plan.weights.get(node.name or "")
        if weight is None or found is None or node.op_type not in {"Conv", "Gemm"} or not found.rows:
            continue
        array, bias = folded(node)
        if bias is None:
            continue
        scales = np.array(weight.scales).reshape([-1 if a == weight.axis else 1 for a in range(array.ndim)])
        error = np.moveaxis(array - quantize_weight(array, weight) * scales, weight.axis, 0)
        per_input = error.reshape(*error.shape[:2], -1).sum(axis=2)  # [outputs, inputs of the group]
        means = np.asarray(found.sums) / found.rows
        group = np.arange(len(per_input)) * (len(means) // per_input.shape[1]) // len(per_input)
        columns = group[:, None] * per_input.shape[1] + np.arange(per_input.shape[1])
        out[node.name or ""] = tuple(float(s) for s in (per_input * means[columns]).sum(axis=1))
    return out


def check_weights(model: ir.Model) -> None:
    for name, value in model.graph.initializers.items():
        array = M.constant(value)
        if array is not None and np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
            raise NonFiniteError(f"NaN in the weights '{name}'", "repair or retrain the model")
    for node in model.graph:
        for index in (1, 2) if weight_of(node) is not None else ():
            array = M.constant(node.inputs[index]) if len(node.inputs) > index else None
            if array is not None and not np.isfinite(array).all():
                raise NonFiniteError(f"Inf in the weights of node '{node.name}'", "repair or retrain the model")


def unfit(model: ir.Model, decision: Decision, seen: dict[str, Observed]) -> dict[str, str]:
    """Nodes whose observed ranges do not fit int8, with the reason."""
    out: dict[str, str] = {}
    chosen = set(decision.quantized)
    for node in model.graph:
        if node.name not in chosen:
            continue
        if weight_of(node) is not None:
            if told := _mask_in_bias(node, seen):
                out[node.name or ""] = told
            continue
        reads = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
        spans = [s for v in reads if (s := _span(v, seen)) is not None]
        results = [s for v in node.outputs if (s := _span(v, seen)) is not None]
        if any(s > HUGE for s in [*spans, *results]) and node.op_type != "MatMul":
            out[node.name or ""] = "its values are as good as infinite"
        elif node.op_type in {"Add", "Sub"} and len(spans) == 2 and max(spans) > _most(node) * min(spans) > 0:
            out[node.name or ""] = (
                f"its operands are {max(spans):.3g} and {min(spans):.3g} wide: one scale would lose the smaller"
            )
    return {name: reason for name, reason in out.items() if name}


def _most(node: ir.Node) -> float:
    """How much wider one operand may be: little before a Softmax, where the wider is a mask that wipes classes out."""
    readers = [use.node for value in node.outputs for use in value.uses()]
    return SOFTMAX_RATIO if readers and all(r.op_type == "Softmax" for r in readers) else MASK_RATIO


def _mask_in_bias(node: ir.Node, seen: dict[str, Observed]) -> str | None:
    """Why a bias does not fit the products that it is added to: clean-up folds a mask behind a layer into its bias."""
    weight, bias = folded(node)
    source = node.inputs[0]
    span = _span(source, seen) if source is not None else None
    if bias is None or span is None or not bias.size:
        return None
    others = tuple(axis for axis in range(weight.ndim) if axis != weight_axis(node))
    reach = span * float(np.abs(weight).sum(axis=others).max(initial=0))
    largest = float(np.abs(bias).max())
    if not largest > MASK_RATIO * reach > 0:
        return None
    return f"its bias reaches {largest:.3g}, its products at most {reach:.3g}: one scale would lose the products"


def _span(value: ir.Value, seen: dict[str, Observed]) -> float | None:
    array = M.constant(value)
    if array is not None:
        return float(np.abs(array).max()) if array.size else None
    found = seen.get(value.name or "")
    return None if found is None or found.low > found.high else max(abs(found.low), abs(found.high))


def activations(
    model: ir.Model,
    decision: Decision,
    seen: dict[str, Observed],
    method: Method | Mapping[str, Method],
    everything: bool,
    grids: Grids,
    given: Mapping[str, tuple[float, float] | Method] = {},
) -> dict[str, Activation]:
    """Parameters of every value; members of a group share the union of their ranges.

    method: for all values, or of each. given: ranges or methods that were asked for by name.
    """
    ranges: dict[str, tuple[float, float, Method]] = {}
    for name in decision.activations:
        # clipped logits hide in top-1 and ruin everything else
        chosen = method if isinstance(method, str) else method[name]
        way: Method = "minmax" if name in decision.outputs else chosen
        asked = given.get(name)
        if isinstance(asked, tuple):
            ranges[name] = (*asked, "given")
            continue
        way = asked or way
        low, high = seen[name].range(way, everything)
        ranges[name] = (low, high, way) if low <= high else (0.0, 0.0, way)
    operands = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name in decision.constants:
        array = M.constant(operands[name])
        if array is not None:
            ranges[name] = (float(array.min(initial=0)), float(array.max(initial=0)), "constant")
    groups = [g for g in decision.groups if any(n in ranges for n in g)]
    grouped = {n for g in groups for n in g}
    out: dict[str, Activation] = {}
    for group in [*groups, *((n,) for n in ranges if n not in grouped)]:
        members = [ranges[n] for n in group if n in ranges]
        members = [m for m in members if m[2] == "given"] or members
        ways = {m[2] for m in members} - {"constant"} or {"constant"}
        shared = grids.activation(group, min(m[0] for m in members), max(m[1] for m in members), sorted(ways)[0])
        out.update((n, decision.fixed.get(n, shared)) for n in group if n in ranges)
    return {name: out[name] for name in ranges}


def fate(node: ir.Node, activations: dict[str, Activation]) -> Fate:
    """A Relu or Clip is removed when every representable output satisfies it already."""
    bounds = clip_bounds(node)
    parameters = activations[node.outputs[0].name or ""]
    low, high = parameters.limits
    slack = parameters.scale * 1e-3  # float32 rounding of the scale
    return "removed" if bounds and low >= bounds[0] - slack and high <= bounds[1] + slack else "kept"
