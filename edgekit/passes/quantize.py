"""QuantizeInt8: calibrates, decides and applies the one quantized form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import NoCalibrationDataError, NonFiniteError, UnsupportedOpError
from edgekit.passes.apply_plan import apply_plan, folded, prepared, quantize_weight
from edgekit.passes.calibrate import Observed, check_finite, feeds, fill_histograms, held_back, observe
from edgekit.passes.decide import HUGE, Decision, candidate_values, clip_bounds, decide, weight_axis, weight_of
from edgekit.passes.plan import Activation, Bits, Fate, Method, QuantizationPlan, Weight, activation

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

__all__ = ["QuantizeInt8", "apply_plan"]

Array = np.ndarray[Any, Any]
# Operands of an addition further apart than this share no int8 scale: the smaller would vanish (masks, -1e9 offsets).
MASK_RATIO = 1e4
# |bias| and the sum of products each get half of int32.
HALF_RANGE = 2.0**30
# Bytes of held-back inputs kept in memory to judge with.
JUDGE_BYTES = 64 * 2**20
CORRECTED = "bias corrected"
# Shares of equal labels on some fifty samples that differ by less tell nothing (two standard deviations at 97 %).
AGREEMENT_NOISE = 0.05
METHODS: tuple[Method, ...] = ("minmax", "mse", "percentile")


@dataclass(frozen=True)
class QuantizeInt8:
    """Static int8: asymmetric per-tensor activations, symmetric per-channel weights, int32 bias (LiteRT's scheme).

    weight_bits: 7 for a CPU whose u8 x s8 kernels saturate, else 8. activation_bits: 16 for symmetric int16 activations
    on the same weights, summed in 64 bits. calibration: "auto" tries the three methods (of 16 bits only "minmax": there
    is nothing to gain by clipping) and takes the one that leaves held-back samples closest to the float model.
    keep_float: names of nodes to leave alone.
    """

    weight_bits: Literal[7, 8] = 8
    activation_bits: Bits = 8
    calibration: Literal["auto", "minmax", "percentile", "mse"] = "auto"
    per_channel: bool = True
    batch_size: int = 32
    keep_float: tuple[str, ...] = ()
    seed: int = 0

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model:
        """The QDQ model; `model` is not edited."""
        return apply_plan(model, self.plan(model, data))

    def plan(self, model: ir.Model, data: Dataset | None) -> QuantizationPlan:
        """Every decision. Raises NoCalibrationDataError, NonFiniteError, UnsupportedOpError (already quantized)."""
        if data is None:
            raise NoCalibrationDataError(
                "int8 needs calibration data", "pass --data FILE with samples like those at run time"
            )
        model = prepared(model)
        _check_weights(model)
        data = data.bind(M.signature(model))  # may change what a sample is: tokens become windows
        forced = self._requested(model)
        held = held_back(data.samples, self.seed)
        seen = observe(
            model,
            data,
            list(candidate_values(model, self.activation_bits)),
            batch_size=self.batch_size,
            held=held,
            means=_multiplied(model),
        )
        decision = decide(model, forced, self.activation_bits)
        while extra := _unfit(model, decision, seen):
            forced |= extra
            decision = decide(model, forced, self.activation_bits)
        check_finite(seen, decision.activations)
        if self.calibration != "minmax" and not (self.calibration == "auto" and self.activation_bits == 16):
            used = {name: seen[name] for name in decision.activations}
            fill_histograms(model, data, used, batch_size=self.batch_size, held=held)
        if self.calibration != "auto":
            return self._assemble(model, decision, seen, self.calibration, data.samples)
        return self._choose(model, decision, seen, data, held)

    def _requested(self, model: ir.Model) -> dict[str, str]:
        names = {node.name for node in model.graph}
        for name in self.keep_float:
            if name not in names:
                raise UnsupportedOpError(f"no node '{name}' to keep in float", "`edgekit inspect` lists the names")
        return {name: "kept float on request" for name in self.keep_float}

    def _choose(
        self, model: ir.Model, decision: Decision, seen: dict[str, Observed], data: Dataset, held: frozenset[int]
    ) -> QuantizationPlan:
        """Try each method with ranges from the other samples, judge on the held-back ones, then range over all."""
        inputs, wanted, labels = _judging(model, data, held, self.batch_size)
        classes = _class_scores(model, wanted, labels)
        scores: dict[str, dict[str, float]] = {}

        def judge(method: Method, corrected: bool) -> str:
            trial = self._assemble(model, decision, seen, method, data.samples, everything=not held)
            name = f"{method}, {CORRECTED}" if corrected else method
            if corrected:
                trial = replace(trial, bias_shifts=_bias_shifts(model, trial, seen))
            scores[name] = _score(apply_plan(model, trial), inputs, wanted, classes)
            return name

        methods = METHODS if self.activation_bits == 8 else METHODS[:1]
        ways = {judge(method, True): (method, True) for method in methods}
        best = _best(scores)
        ways[judge(ways[best][0], False)] = (ways[best][0], False)
        method, corrected = ways[_best(scores)]
        plan = self._assemble(model, decision, seen, method, data.samples, scores=scores)
        return replace(plan, bias_shifts=_bias_shifts(model, plan, seen)) if corrected else plan

    def _assemble(
        self,
        model: ir.Model,
        decision: Decision,
        seen: dict[str, Observed],
        method: Method,
        samples: int,
        *,
        everything: bool = True,
        scores: dict[str, dict[str, float]] | None = None,
    ) -> QuantizationPlan:
        activations = _activations(model, decision, seen, method, everything, self.activation_bits)
        nodes = {node.name: node for node in model.graph}
        weights = {}
        for name in decision.quantized:
            weight = weight_of(nodes[name])
            if weight is not None:
                weights[name] = self._weight(nodes[name], weight.name or "", activations)
        return QuantizationPlan(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            method=method,
            quantized=decision.quantized,
            fused={name: _fate(nodes[name], activations) for name in decision.fused},
            float_nodes=decision.float_nodes,
            activations=activations,
            weights=weights,
            groups=decision.groups,
            scores=scores or {},
            samples=samples,
            seed=self.seed,
        )

    def _weight(self, node: ir.Node, value: str, activations: dict[str, Activation]) -> Weight:
        source = node.inputs[0]
        scale = activations[(source.name or "") if source is not None else ""].scale
        axis = weight_axis(node)
        array, bias = folded(node)
        limit = 2 ** (self.weight_bits - 1) - 1
        scales = weight_scales(array, axis, limit, scale, bias, wraps=self.activation_bits == 8)
        if not self.per_channel:
            scales = np.full_like(scales, scales.max())
        return Weight(value, axis, self.weight_bits, tuple(float(s) for s in scales))


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


def _multiplied(model: ir.Model) -> frozenset[str]:
    """Inputs of the nodes whose bias can be corrected: channels on axis 1."""
    nodes = [n for n in model.graph if n.op_type in {"Conv", "Gemm"} and n.inputs and n.inputs[0] is not None]
    return frozenset(n.inputs[0].name or "" for n in nodes if n.inputs[0] is not None)


def _bias_shifts(model: ir.Model, plan: QuantizationPlan, seen: dict[str, Observed]) -> dict[str, tuple[float, ...]]:
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


def _check_weights(model: ir.Model) -> None:
    for name, value in model.graph.initializers.items():
        array = M.constant(value)
        if array is not None and np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
            raise NonFiniteError(f"NaN in the weights '{name}'", "repair or retrain the model")
    for node in model.graph:
        for index in (1, 2) if weight_of(node) is not None else ():
            array = M.constant(node.inputs[index]) if len(node.inputs) > index else None
            if array is not None and not np.isfinite(array).all():
                raise NonFiniteError(f"Inf in the weights of node '{node.name}'", "repair or retrain the model")


def _unfit(model: ir.Model, decision: Decision, seen: dict[str, Observed]) -> dict[str, str]:
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
        elif node.op_type in {"Add", "Sub"} and len(spans) == 2 and max(spans) > MASK_RATIO * min(spans) > 0:
            out[node.name or ""] = (
                f"its operands are {max(spans):.3g} and {min(spans):.3g} wide: one scale would lose the smaller"
            )
    return {name: reason for name, reason in out.items() if name}


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


def _activations(
    model: ir.Model, decision: Decision, seen: dict[str, Observed], method: Method, everything: bool, bits: Bits
) -> dict[str, Activation]:
    """Parameters of every value; members of a group share the union of their ranges."""
    ranges: dict[str, tuple[float, float, Method]] = {}
    for name in decision.activations:
        # clipped logits hide in top-1 and ruin everything else
        way: Method = "minmax" if name in decision.outputs else method
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
        ways = {m[2] for m in members} - {"constant"} or {"constant"}
        shared = activation(min(m[0] for m in members), max(m[1] for m in members), sorted(ways)[0], bits)
        out.update((n, decision.fixed.get(n, shared)) for n in group if n in ranges)
    return {name: out[name] for name in ranges}


def _fate(node: ir.Node, activations: dict[str, Activation]) -> Fate:
    """A Relu or Clip is removed when every representable output satisfies it already."""
    bounds = clip_bounds(node)
    parameters = activations[node.outputs[0].name or ""]
    low, high = parameters.limits
    slack = parameters.scale * 1e-3  # float32 rounding of the scale
    return "removed" if bounds and low >= bounds[0] - slack and high <= bounds[1] + slack else "kept"


def _best(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The nearest signal among those whose labels agree as well as the best, within noise; of all, without classes."""
    close = max(s.get("agreement", 1.0) for s in scores.values()) - AGREEMENT_NOISE
    return max((n for n in scores if scores[n].get("agreement", 1.0) >= close), key=lambda n: scores[n]["sqnr_db"])


# --- judging -----------------------------------------------------------------------------------------------
def _judging(
    model: ir.Model, data: Dataset, held: frozenset[int], batch_size: int
) -> tuple[list[M.Tensors], list[M.Tensors], Array | None]:
    """Held-back inputs (all samples if none are) within JUDGE_BYTES, the float outputs on them, and some labels."""
    names = _judged(model)
    session = M.FloatSession(model, fetch=names)
    fixed = M.batch_of(M.signature(model))
    inputs: list[M.Tensors] = []
    size = 0
    for feed in feeds(M.signature(model), data, batch_size):
        rows = [i for i in range(feed.rows) if not held or feed.first + i in held]
        if not rows:
            continue
        # a fixed batch is kept whole: its other rows judge as well
        picked = feed.inputs if fixed else {k: v[rows] for k, v in feed.inputs.items()}
        inputs.append(picked)
        size += sum(v.nbytes for v in picked.values())
        if size > JUDGE_BYTES or sum(len(next(iter(i.values()))) for i in inputs) >= 96:
            break
    wanted = [{k: v for k, v in session.run(i).items() if k in names} for i in inputs]
    for outputs in wanted:
        for name, array in outputs.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise NonFiniteError(
                    f"NaN or Inf in output '{name}' of the float model", "run it on this data and repair what makes it"
                )
    return inputs, wanted, next(iter(data.batches(1))).labels if data.labelled else None


def _class_scores(model: ir.Model, wanted: list[M.Tensors], labels: Array | None) -> frozenset[str]:
    """The judged values whose largest entry means a class: a Softmax's inputs, distributions, or what labels say."""
    out = set()
    for value, name in zip(model.graph.outputs, _judged(model), strict=True):
        array = wanted[0][name]
        if not np.issubdtype(array.dtype, np.floating) or array.ndim not in {2, 3} or array.shape[-1] < 2:
            continue
        softmax = name != value.name
        distribution = bool((array >= 0).all() and (np.abs(array.sum(axis=-1) - 1) <= 1e-3).all())
        # class numbers have one axis less than the scores; the first output is the one that labels are for
        first = value is model.graph.outputs[0]
        labelled = first and labels is not None and labels.dtype.kind in "biu" and labels.ndim == array.ndim - 1
        if softmax or distribution or labelled:
            out.add(name)
    return frozenset(out)


def _judged(model: ir.Model) -> list[str]:
    """The outputs; for a Softmax what goes in, for what comes out is ruled by the few samples that are in doubt."""
    names = []
    for value in model.graph.outputs:
        producer = value.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type == "Softmax" else None
        names.append((value if source is None else source).name or "")
    return names


def _score(
    quantized: ir.Model, inputs: list[M.Tensors], wanted: list[M.Tensors], classes: frozenset[str]
) -> dict[str, float]:
    """SQNR in dB (mean over float outputs) and, where there are `classes`, the share of equal ones; QDQ arithmetic."""
    session = M.FloatSession(quantized, fetch=list(wanted[0]), optimize=False)
    got = [session.run(i) for i in inputs]
    ratios, agreements = [], []
    for name in wanted[0]:
        if not np.issubdtype(wanted[0][name].dtype, np.floating):
            continue
        a = np.concatenate([w[name].reshape(-1) for w in wanted]).astype(np.float64)
        b = np.concatenate([g[name].reshape(-1) for g in got]).astype(np.float64)
        ratios.append(10 * np.log10(max(float((a**2).sum()), 1e-30) / max(float(((a - b) ** 2).sum()), 1e-30)))
        if name in classes:
            same = [w[name].argmax(-1) == g[name].argmax(-1) for w, g in zip(wanted, got, strict=True)]
            agreements.append(float(np.concatenate([s.reshape(-1) for s in same]).mean()))
    score = {"sqnr_db": float(np.mean(ratios)) if ratios else 0.0}
    return {**score, "agreement": float(np.mean(agreements))} if agreements else score
