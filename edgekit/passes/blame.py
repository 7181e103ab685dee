"""Which layers lose the accuracy: measured by rounding one alone, and by rounding all but one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_graph as G
from edgekit.passes.apply_plan import prepared
from edgekit.passes.calibrate import fetched
from edgekit.passes.judge import Judge
from edgekit.passes.plan import Activation, QuantizationPlan
from edgekit.passes.rescale import rescaled
from edgekit.passes.switchboard import Switchboard
from edgekit.report.progress import Progress, silent
from edgekit.scheme import WEIGHTED

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]

SAMPLES, LEAST = 24, 2
VALUES = 2 * 10**9  # activation elements that all runs together may compute: some ten seconds of a laptop's core
NAMED = 12  # rows whose cause is looked for
WIDE_SPREAD = 30.0  # of channel ranges: from here on it is said
ALIVE = 1e-5  # of the largest channel: below this it is dead
OUTLIER = 4.0  # times the range that 99.9 % of the values lie in


@dataclass(frozen=True)
class Blame:
    """One layer's damage, as shares of the whole model's squared output error on the same samples.

    alone: with nothing else rounded. without: what vanishes when only this layer is left in float; negative where its
    error makes up for another's. weight: the part of `alone` that its weights have. cause: in words.
    """

    node: str
    op: str
    alone: float
    without: float
    weight: float
    cause: str = ""

    @property
    def damage(self) -> float:
        return max(self.alone, self.without)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def blame(model: ir.Model, plan: QuantizationPlan, data: Dataset, progress: Progress = silent) -> list[Blame]:
    """Every layer with roundings of its own, the most damaging first. model: float; data: calibration samples."""
    model = prepared(model)
    data = data.bind(M.signature(model))
    judge = Judge(model, data, frozenset(), 8, most=SAMPLES)
    board = Switchboard(model, plan, judge.names)
    samples = _affordable(model, judge.inputs[0], 2 * len(board.units))
    inputs, wanted = _first(judge.inputs, samples), _first(judge.wanted, samples)

    def error(on: set[tuple[str, str]]) -> float:
        total = 0.0
        for feed, exact in zip(inputs, wanted, strict=True):
            got = board.run(feed, on)
            for name in judge.names:
                if np.issubdtype(exact[name].dtype, np.floating):
                    a, b = exact[name].astype(np.float64), got[name].astype(np.float64)
                    total += float(np.square(a - b).sum() / max(np.square(a).sum(), 1e-30))
        return total

    whole = error(set(board.parts))
    scale = max(whole, 1e-30)
    ops = {n.name: n.op_type for n in model.graph}
    rows = []
    for number, unit in enumerate(board.units):
        progress("blame", number, len(board.units))
        own = {p for p in board.parts if p[0] == unit}
        alone, rest = error(own), error(set(board.parts) - own)
        rows.append(Blame(unit, ops.get(unit, "input"), alone / scale, (whole - rest) / scale, 0.0))
    rows.sort(key=lambda row: -row.damage)
    for at, row in enumerate(rows[:NAMED]):
        if (row.node, "weight") in board.parts:
            rows[at] = replace(row, weight=min(row.alone, error({(row.node, "weight")}) / scale))
    return _explained(model, plan, data, rows)


def _affordable(model: ir.Model, inputs: M.Tensors, runs: int) -> int:
    """Samples for so many runs; by the elements computed, not by the clock: the same each time."""
    one = {k: v[:1] for k, v in inputs.items()} if M.batch_of(M.signature(model)) is None else inputs
    rows = len(next(iter(one.values())))
    names = [o.name for n in model.graph for o in n.outputs if o.name]
    elements = sum(v.size for v in M.FloatSession(model, fetch=names, optimize=False).run(one).values()) / rows
    return int(np.clip(VALUES / max(1.0, elements * runs), LEAST, SAMPLES))


def _first(batches: Sequence[M.Tensors], samples: int) -> list[M.Tensors]:
    out: list[M.Tensors] = []
    for batch in batches:
        if samples <= 0:
            break
        rows = len(next(iter(batch.values())))
        whole = all(len(v) == rows for v in batch.values()) and rows > samples
        out.append({k: v[:samples] for k, v in batch.items()} if whole else batch)
        samples -= rows
    return out


# --- causes -------------------------------------------------------------------------------------------
def _explained(model: ir.Model, plan: QuantizationPlan, data: Dataset, rows: list[Blame]) -> list[Blame]:
    """The worst rows with a cause in words."""
    worst = rows[:NAMED]
    scaled = rescaled(model, plan.factors) if plan.factors else model
    nodes = {n.name: n for n in scaled.graph}
    results = {row.node: _result(nodes.get(row.node), row.node, plan) for row in worst}
    wanted = [v for v in results.values() if v]
    parts: dict[str, list[Array]] = {}
    for name, array, _ in fetched(scaled, data.take(min(32, data.samples), 0), wanted, 32, frozenset()):
        parts.setdefault(name, []).append(array)
    seen = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    told = []
    for row in worst:
        node, name = nodes.get(row.node), results[row.node]
        told.append(replace(row, cause=_cause(row, node, plan.activations.get(name), seen.get(name))))
    return told + rows[NAMED:]


def _result(node: ir.Node | None, name: str, plan: QuantizationPlan) -> str:
    """The tensor that the unit rounds, behind a fused activation."""
    if node is None:
        return name if name in plan.activations else ""
    for value in node.outputs:
        for after in [value, *(u.outputs[0] for u, _ in value.uses() if (u.name or "") in plan.fused)]:
            if after.name in plan.activations:
                return after.name or ""
    return ""


def _cause(row: Blame, node: ir.Node | None, how: Activation | None, array: Array | None) -> str:
    parts = []
    if node is not None and row.weight > row.alone / 2:
        parts.append(_weight_cause(node))
    elif how is not None and array is not None and array.size:
        parts.append(_activation_cause(how, array, node))
    if node is None:
        parts.append("the model's input")
    return "; ".join(p for p in parts if p)


def _weight_cause(node: ir.Node) -> str:
    weight = G.array(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type not in WEIGHTED:
        return "its constant operand"
    if weight is None or weight.ndim < 2:
        return "its weights"
    groups = G.integer(node, "group", 1)
    kind = "depthwise" if groups > 1 and weight.shape[1] == 1 else ""
    rows = np.abs(weight).reshape(weight.shape[0], -1)
    spread = _spread(rows.max(axis=1))
    inside = float((rows.max(axis=1) / np.maximum(np.median(rows, axis=1), 1e-30)).max())
    told = [kind, "its weights"]
    if spread > WIDE_SPREAD:
        told.append(f"channel ranges differ {spread:.0f}×")
    if inside > WIDE_SPREAD:
        told.append(f"the largest is {inside:.0f}× the median of its channel")
    return ", ".join(t for t in told if t)


def _activation_cause(how: Activation, array: Array, node: ir.Node | None) -> str:
    low, high = how.limits
    inner = float(np.quantile(np.abs(array), 0.999))
    reach = max(-low, high)
    told = [f"activation range {low:.3g}…{high:.3g}"]
    if inner > 0 and reach > OUTLIER * inner:
        told.append(f"99.9 % within {inner:.3g}")
        channels = np.abs(np.moveaxis(array, 1, 0)).reshape(array.shape[1], -1).max(axis=1) if array.ndim > 1 else None
        if channels is not None and (channels > OUTLIER * inner).sum() == 1:
            told.append(f"one outlier channel ({int(channels.argmax())})")
    elif array.ndim > 1:
        axis = 1 if array.ndim != 3 else 2
        spread = _spread(np.abs(np.moveaxis(array, axis, 0)).reshape(array.shape[axis], -1).max(axis=1))
        if spread > WIDE_SPREAD:
            told.append(f"channel ranges differ {spread:.0f}×")
    return ", ".join(told)


def _spread(ranges: Array) -> float:
    """Largest over smallest of the channels that are not dead, the outermost hundredth left out."""
    alive = ranges[ranges > ALIVE * ranges.max(initial=0.0)]
    return float(np.quantile(alive, 0.99) / np.quantile(alive, 0.01)) if len(alive) > 1 else 1.0
