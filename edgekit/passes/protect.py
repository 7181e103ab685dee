"""Keeps an accuracy budget: leaves the fewest and cheapest layers in float until it holds on samples not chosen by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.budget import Measure, lost
from edgekit.errors import BudgetError
from edgekit.passes.apply_plan import apply_plan, prepared
from edgekit.passes.blame import Blame, blame
from edgekit.passes.decide import weight_of
from edgekit.passes.judge import Judge, Score
from edgekit.passes.plan import QuantizationPlan
from edgekit.passes.quantize import QuantizeInt8
from edgekit.report.progress import Progress, silent
from edgekit.scheme import EQUAL_SCALES

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]

LEAST = 64  # samples left over from calibration that are worth judging by; fewer, and calibration gives some up
MOST = 2000  # samples to judge by
DROPS = 4  # protected layers that are tried to be given back
RUNS = 30  # of each of two models, in turns, to time what protection costs


@dataclass(frozen=True)
class Kept:
    """How a plan stands to its budget.

    lost, error: in the unit of `measure`, and its standard error; on `samples` that nothing was chosen by.
    unprotected: what was lost without protection. protected: node -> why. slower: time of the model here, over that
    without protection (None if nothing is protected). larger_bytes: of weights that stay float32.
    """

    budget: float
    measure: Measure
    lost: float
    error: float
    samples: int
    unprotected: float
    protected: Mapping[str, str]
    slower: float | None = None
    larger_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def words(self) -> str:
        figures = f"{self.lost:.2%} ± {self.error:.2%} of {self.measure} on {self.samples} samples"
        if self.error > self.budget > 0:
            # the error falls with the square root
            enough = int(np.ceil(self.samples * (self.error / self.budget) ** 2))
            figures += f" (too few to tell {self.budget:.2%}: some {enough} would)"
        if not self.protected:
            return f"within the budget of {self.budget:.2%}: loses {figures}"
        names = ", ".join(f"'{n}'" for n in list(self.protected)[:4])
        more = f" and {len(self.protected) - 4} more" if len(self.protected) > 4 else ""
        cost = "" if self.slower is None else f", {self.slower:.2f}× the time"
        return (
            f"within the budget of {self.budget:.2%}: loses {figures} (unprotected {self.unprotected:.2%}) with {names}"
            f"{more} in float, which costs {self.larger_bytes / 1000:.0f} kB{cost}"
        )


def protect(
    step: QuantizeInt8,
    model: ir.Model,
    data: Dataset,
    rest: Dataset,
    budget: float,
    progress: Progress = silent,
    encode: Callable[[ir.Model], ir.Model] = lambda model: model,
) -> tuple[QuantizationPlan, Kept]:
    """A plan that loses at most `budget`. data: to calibrate with; rest: other samples of the same kind, perhaps none.

    encode: writes a QDQ model as the runtime's kernels like it best, for timing.
    Raises BudgetError when no int8 layer is left before the budget holds.
    """
    model = prepared(model)
    if rest.samples < LEAST:
        keep = max(1, data.samples * 2 // 3)
        data, rest = data.take(keep, step.seed), data.rest(keep, step.seed)
    half = rest.samples // 2
    if rest.samples < 2:
        raise BudgetError(
            f"{data.samples + rest.samples} samples are too few to tell what is lost", "pass --data with a hundred"
        )
    chooser = Judge(model, rest.take(half, step.seed), frozenset(), step.batch_size, most=MOST)
    confirmer = Judge(model, rest.rest(half, step.seed), frozenset(), step.batch_size, most=MOST)
    search = step.search(model, data, progress)
    plan = search.run()
    written = apply_plan(model, plan)
    score = confirmer.score(written)
    unprotected, _ = _lost(score)
    if unprotected <= budget and _lost(chooser.score(written))[0] <= budget:
        return plan, _kept(budget, score, confirmer, unprotected, {})
    order = _order(model, plan, blame(model, plan, data, progress))
    tries: dict[tuple[int, ...], tuple[QuantizationPlan, dict[str, str]]] = {}

    def attempt(entries: Sequence[int]) -> tuple[QuantizationPlan, dict[str, str]]:
        key = tuple(entries)
        if key not in tries:
            chosen: dict[str, str] = {}
            for names, why in (order[i] for i in key):
                chosen.update({n: why for n in names if n not in chosen})
            progress(f"protect {len(chosen)} layers", 0, 0)
            made = search.again(tuple(chosen))
            tries[key] = replace(made, float_nodes={**made.float_nodes, **chosen}, scores=plan.scores), chosen
        return tries[key]

    def holds(entries: Sequence[int]) -> bool:
        return _lost(chooser.score(apply_plan(model, attempt(entries)[0])))[0] <= budget

    count = 1
    while count < len(order) and not holds(range(count)):
        count = min(len(order), 2 * count)
    count = _fewest(count, lambda n: holds(range(n)))
    entries = _needed(range(count), holds)
    more = 1  # chosen by other samples, it may miss by a hair: a little more first
    while _lost(score := confirmer.score(apply_plan(model, attempt(entries)[0])))[0] > budget and count < len(order):
        count, more = min(len(order), count + more), 2 * more
        entries = range(count)
    tried, chosen = attempt(entries)
    if _lost(score)[0] > budget:
        raise BudgetError(
            f"int8 cannot keep within {budget:.2%}: {_lost(score)[0]:.2%} lost with {len(chosen)} layers in float",
            "allow more with --max-accuracy-drop, or ship float32",
        )
    if not any(n in tried.weights for n in plan.weights):
        raise BudgetError(
            f"int8 cannot keep within {budget:.2%}: no layer of weights is left in int8",
            "allow more with --max-accuracy-drop, or ship float32",
        )
    kept = _kept(budget, score, confirmer, unprotected, chosen)
    larger = 3 * sum(array.size for n in model.graph if n.name in chosen and (array := _weight(n)) is not None)
    slower = _time_ratio(encode(apply_plan(model, plan)), encode(apply_plan(model, tried)), confirmer.inputs[0])
    return tried, replace(kept, slower=slower, larger_bytes=int(larger))


def _weight(node: ir.Node) -> Array | None:
    value = weight_of(node)
    return None if value is None else M.constant(value)


def _fewest(count: int, holds: Callable[[int], bool]) -> int:
    """The least number that holds, between half of `count` and it."""
    low, high = count // 2, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _needed(entries: Sequence[int], holds: Callable[[Sequence[int]], bool]) -> Sequence[int]:
    """Without those of the first few that the later ones made unnecessary."""
    kept = list(entries)
    for entry in list(entries)[: min(DROPS, len(entries) - 1)]:
        fewer = [e for e in kept if e != entry]
        if holds(fewer):
            kept = fewer
    return kept


def _lost(score: Score) -> tuple[float, Measure]:
    return lost(score.drop, score.agreement, score.sqnr_db)


def _kept(budget: float, score: Score, judge: Judge, unprotected: float, protected: Mapping[str, str]) -> Kept:
    value, measure = _lost(score)
    samples = judge.samples
    share = 1 - (score.agreement if score.agreement is not None else 1.0)
    error = float(np.sqrt(max(share, 1 / samples) / samples)) if measure != "SQNR" else 0.0
    return Kept(budget, measure, value, error / (4 if measure == "agreement" else 1), samples, unprotected, protected)


# --- which first ---------------------------------------------------------------------------------------
def _order(model: ir.Model, plan: QuantizationPlan, rows: Sequence[Blame]) -> list[tuple[tuple[str, ...], str]]:
    """Sets of nodes to leave in float, the most damage for the least measured time of a float kernel first."""
    nodes = {n.name or "": n for n in model.graph}
    times = _times(model)
    whole = max(sum(times.values()), 1e-12)
    out: list[tuple[float, tuple[str, ...], str]] = []
    for row in rows:
        names = _protecting(row, nodes, plan)
        if not names or row.damage <= 0:
            continue
        cost = _coarse(sum(times.get(n, 0.0) for n in names) / whole)
        why = f"protected: {row.damage:.0%} of the int8 error" + (f" ({row.cause})" if row.cause else "")
        out.append((row.damage / (0.02 + cost), names, why))
    out.sort(key=lambda entry: -entry[0])
    rest = [((n,), "protected: all that is left") for n in plan.quantized]
    order, taken = [], set[str]()
    for names, why in [*((names, why) for _, names, why in out), *rest]:
        if not taken.issuperset(names):  # a layer's weights and its result may both have damage
            order.append((names, why))
            taken.update(names)
    return order


def _coarse(share: float) -> float:
    """To a power of 2: a clock's noise seldom decides which layer goes first."""
    return float(2.0 ** np.round(np.log2(max(share, 1e-4))))


def _protecting(row: Blame, nodes: Mapping[str, ir.Node], plan: QuantizationPlan) -> tuple[str, ...]:
    """The node itself for its weights; for its result also whoever would need that in int8."""
    chosen = set(plan.quantized)
    node = nodes.get(row.node)
    names = [row.node] if node is not None else []
    if node is None or row.weight < row.alone / 2:
        read = [v for n in nodes.values() for v in n.inputs if v is not None and v.name == row.node]
        waiting = list(node.outputs) if node is not None else read[:1]
        while waiting:
            for user, _ in waiting.pop().uses():
                if user.name in chosen and user.name not in names:
                    names.append(user.name)
                    if user.op_type in EQUAL_SCALES or user.name in plan.fused:
                        waiting += list(user.outputs)
    return tuple(n for n in names if n in chosen)


def _times(model: ir.Model) -> dict[str, float]:
    """Seconds per node of the float model, the least of a few runs on made-up inputs in ONNX Runtime's profile."""
    import json
    import tempfile
    from pathlib import Path

    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="edgekit-times-") as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "times")
        # node by node: a fused name is none of the model's
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(M.to_bytes(model), options, providers=["CPUExecutionProvider"])
        inputs = M.seeded_inputs(M.signature(model), M.batch_of(M.signature(model)) or 1)
        for _ in range(5):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, float] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            key = name.removesuffix("_kernel_time")
            times[key] = min(times.get(key, np.inf), event["dur"] * 1e-6)
    return times


def _time_ratio(before: ir.Model, after: ir.Model, inputs: Mapping[str, Array]) -> float:
    """Median time of `after` over that of `before`, one sample, one thread, in turns."""
    from edgekit.passes.roundings import PRODUCTS, idle, leave_out

    one = dict(inputs) if M.batch_of(M.signature(before)) is not None else {k: v[:1] for k, v in inputs.items()}
    sessions = [M.FloatSession(leave_out(m, idle(m, PRODUCTS)), threads=1) for m in (before, after)]
    spent: list[list[float]] = [[], []]
    for _ in range(RUNS):
        for session, times in zip(sessions, spent, strict=True):
            start = time.perf_counter()
            session.run(one)
            times.append(time.perf_counter() - start)
    return float(np.median(spent[1]) / np.median(spent[0]))
