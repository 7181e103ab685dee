"""The pruning stage: what was asked for into a plan, the pruned model, its record, and a verdict on unseen samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from edgekit.errors import ArtifactError, BudgetError, CollapsedError, DatasetError, UnsupportedOpError, UsageError
from edgekit.passes import prune_plan_file
from edgekit.passes.judge import Judge, Score
from edgekit.passes.prune_plan import PruningPlan, frozen
from edgekit.passes.prune_weights import Pattern, PruneWeights, compressed, sparsity
from edgekit.prune_latency import Stopwatch, Timed, share_for
from edgekit.quantizing import digest
from edgekit.report.progress import Progress

if TYPE_CHECKING:
    from edgekit.dataset import Dataset
    from edgekit.passes.prune_channels import PruneChannels

SAMPLES = 512  # more help little: 2,000 gain under half a point on MobileNetV2
CHOOSERS, LEAST = 128, 16
WATCHERS = 48  # of those for fitting and choosing: enough to see that distillation overfits
SENSIBLE = 128  # fewer samples cost 2 to 5 points
JUDGES = 512
COLLAPSED = 0.6  # share of equal classes below which nothing of the model is left to ship
COLLAPSED_DB = 3.0
# (agreement with the float model on samples that nothing was chosen by, points of accuracy that were lost): measured
# with MobileNetV2, ResNet8 and an MLP, benchmarks/pruning
LOSSES = ((0.60, 16.0), (0.70, 13.0), (0.83, 5.2), (0.87, 3.9), (0.925, 1.9), (0.96, 0.45), (0.98, 0.2), (1.0, 0.0))
# shares of the multiply-accumulates that `auto` tries, while the budget on accuracy holds
LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
Kind = Literal["macs", "parameters", "auto", "latency", "zeros", "plan", "weights"]


@dataclass(frozen=True)
class Request:
    """kind: what the number is a share of, or another way to say it. plan, sha256: of a file.

    share: to keep, or of kind "latency" how many times faster. pattern: of kind "weights".
    """

    kind: Kind
    share: float | None = None
    plan: PruningPlan | None = None
    sha256: str = ""
    pattern: Pattern | None = None

    def to_json(self) -> dict[str, Any]:
        told = None if self.pattern is None else str(self.pattern)
        return {
            "kind": self.kind,
            "share": self.share,
            "pattern": told,
            "plan": None if self.plan is None else self.plan.to_json(),
        }


def request(text: str) -> Request:
    """`0.5`, `macs=0.5`, `parameters=0.5`, `weights=0.5`, `2:4`, `auto`, `zeros`, or a pruning.toml.

    Raises UsageError, ArtifactError.
    """
    if text in ("auto", "zeros"):
        return Request(text)  # type: ignore[arg-type]
    if text.endswith(".toml"):
        plan, sha256 = prune_plan_file.read(Path(text))
        return Request("plan", None, plan, sha256)
    if (pattern := _pattern(text)) is not None:
        return Request("weights", pattern.share, pattern=pattern)
    kind, _, number = text.rpartition("=")
    kind = {"": "macs", "params": "parameters", "size": "parameters"}.get(kind, kind)
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if kind not in ("macs", "parameters", "weights") or not 0 < share < 1:
        raise UsageError(
            f"--prune {text}",
            "give the share of the multiply-accumulates to keep (0.5), parameters=0.5, weights=0.5, 2:4, auto, zeros, "
            "or a pruning.toml",
        )
    if kind == "weights":
        return Request("weights", share, pattern=Pattern(share))
    return Request(kind, share)  # type: ignore[arg-type]


def _pattern(text: str) -> Pattern | None:
    """`2:4` is 2 weights of every 4 that stay."""
    keep, colon, of = text.partition(":")
    if not colon or not (keep.isdigit() and of.isdigit()):
        return None
    if not 0 < int(keep) < int(of) <= 64:
        raise UsageError(f"--prune {text}", "give how many weights of every how many stay, for example 2:4")
    return Pattern(int(keep), int(of))


def latency(text: str) -> Request:
    """`2x` or `1.5`. Raises UsageError."""
    try:
        factor = float(text.removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not 1 < factor < 1000:
        raise UsageError(f"--prune-latency {text}", "say how many times faster, for example 2x")
    return Request("latency", factor)


@dataclass(frozen=True)
class Samples:
    """fit: what layers are fitted on to choose. choose: what channels are chosen by. judge: what neither has seen.

    learn, watch: the first two divided anew once channels are chosen: what layers are fitted on at last, and what tells
    whether training them goes too far.
    """

    fit: Dataset
    choose: Dataset
    learn: Dataset
    watch: Dataset
    judge: Dataset


def samples(data: Dataset, seed: int) -> Samples:
    """Splits bound data. Raises DatasetError if there are too few."""
    count = data.samples
    if count < LEAST:
        raise DatasetError(
            f"{count} samples are too few to prune with", f"give {SENSIBLE} or more, better {SAMPLES * 2}"
        )
    fit = min(SAMPLES, int(0.6 * count))
    choose = min(CHOOSERS, int(0.2 * count))
    seen = data.take(fit + choose, seed)
    judge = data.rest(fit + choose, seed)
    watch = min(WATCHERS, choose // 2)
    return Samples(
        seen.take(fit, seed), seen.rest(fit, seed), seen.rest(watch, seed), seen.take(watch, seed),
        judge.take(JUDGES, seed),
    )  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """The pruned model against the float one on unseen samples. drop: accuracy lost, where there are labels."""

    samples: int
    sqnr_db: float
    agreement: float | None
    drop: float | None

    @property
    def expected(self) -> float | None:
        """Points of accuracy that this agreement tells of."""
        if self.agreement is None:
            return None
        return float(np.interp(self.agreement, [a for a, _ in LOSSES], [p for _, p in LOSSES]))

    @property
    def collapsed(self) -> bool:
        return self.sqnr_db < COLLAPSED_DB if self.agreement is None else self.agreement < COLLAPSED

    def loss(self) -> float | None:
        """The share of accuracy that is lost, or to be expected to be; None without classes."""
        if self.drop is not None:
            return self.drop
        return None if self.expected is None else self.expected / 100

    def words(self) -> str:
        if self.agreement is None:
            return f"{self.sqnr_db:.1f} dB from the float model on {self.samples} unseen samples"
        told = f"agrees with the float model on {100 * self.agreement:.1f} % of {self.samples} unseen samples"
        if self.drop is not None:
            return f"{told}; accuracy {-100 * self.drop:+.1f} points".replace("-", "−")
        return f"{told}; without labels, expect to lose about {self.expected:.1f} points"

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples, "sqnr_db": self.sqnr_db, "agreement": self.agreement, "accuracy_drop": self.drop,
            "expected_points_lost": self.expected, "words": self.words(),
        }  # fmt: skip


def verdict(model: ir.Model, pruned: ir.Model, data: Dataset) -> Verdict:
    from edgekit.passes.apply_plan import prepared

    judge = Judge(prepared(model), data, frozenset(), 64, most=JUDGES)
    score: Score = judge.score(pruned)
    return Verdict(judge.samples, score.sqnr_db, score.agreement, score.drop)


def pruned(
    model: ir.Model,
    asked: Request,
    step: PruneChannels,
    data: Dataset,
    drop: float | None,
    stopwatch: Stopwatch | None,
    distill_s: float | None,
    progress: Progress,
) -> tuple[ir.Model, dict[str, Any], PruningPlan | None]:
    """(pruned model, {"pruning": its record, "told"}, plan). drop: accuracy that pruning may lose; None: whatever.

    distill_s: seconds for which the float model teaches what is left, on the samples that layers are fitted on at last.

    model: float, folded. data: bound. Raises CollapsedError, BudgetError, DatasetError, UnsupportedOpError.
    """
    if asked.kind == "zeros":
        return *_zeros(model), None
    split = samples(data, step.seed)
    if asked.pattern is not None:
        return *_weights(model, asked.pattern, split, step.seed, drop, progress), None
    plan: PruningPlan
    timed: Timed | None = None
    if asked.kind == "auto":
        made, plan, found = _ladder(model, step, split, 0.01 if drop is None else drop, progress)
    else:
        if asked.plan is not None:
            _check(asked, model)
            plan = asked.plan
        elif asked.kind == "latency" and stopwatch is not None:
            measured = step.measured(model, split.fit, split.choose, progress)
            timed = share_for(asked.share or 1.0, step, measured, stopwatch, progress)
            plan = replace(step, budget=timed.share, measure="macs").decide(measured)
        else:
            step = replace(step, budget=asked.share or 0.5, measure=asked.kind)  # type: ignore[arg-type]
            plan = step.plan(model, split.fit, split.choose, progress)
            _reached(plan)
        made, _ = step.apply(model, plan, split.learn, progress)
        progress("judge the pruned model", 0, 0)
        found = verdict(model, made, split.judge)
    taught = None
    if distill_s is not None:
        made, taught = _distilled(model, made, split, distill_s, step.seed, progress)
        taught["before"], found = found.to_json(), verdict(model, made, split.judge)
    _refuse(found, drop)
    record = _record(plan, found, split, timed)
    if taught is not None:
        record["pruning"]["distilled"] = taught
        record["told"].insert(1, f"distilled for {taught['seconds']:.0f} s; before, it {taught['before']['words']}")
    return made, record, plan


def _distilled(
    model: ir.Model, made: ir.Model, split: Samples, seconds: float, seed: int, progress: Progress
) -> tuple[ir.Model, dict[str, Any]]:
    from edgekit.passes.prune_channels import prepared_for_pruning
    from edgekit.recover import distill

    return distill(prepared_for_pruning(model), made, split.learn, split.watch, seconds, seed, progress)


def _reached(plan: PruningPlan) -> None:
    """Raise BudgetError where even the narrowest widths leave more than was asked for."""
    left, what = (plan.macs, "multiply-accumulates") if plan.measure == "macs" else (plan.parameters, "parameters")
    if left > plan.budget * 1.001:
        stays = f"; what stays whole: {'; '.join(frozen(plan.families)[:3])}" if frozen(plan.families) else ""
        raise BudgetError(
            f"pruning cannot leave {plan.budget:.0%} of the {what}: cut as far as it goes, {left:.0%} are left{stays}",
            "ask for less",
        )


def _refuse(found: Verdict, drop: float | None) -> None:
    """Raise CollapsedError for what is no model any more, BudgetError for what loses more than it may."""
    if found.collapsed:
        raise CollapsedError(
            f"the pruned model has collapsed: it {found.words()}",
            "keep more (a larger --prune), give more samples, or let it recover with --distill 5m",
        )
    if drop is not None and (lost := found.loss()) is not None and lost > drop:
        raise BudgetError(
            f"pruning alone loses {100 * lost:.1f} points, more than the {100 * drop:.1f} allowed",
            "keep more (a larger --prune), or --prune auto",
        )


def _weights(
    model: ir.Model, pattern: Pattern, split: Samples, seed: int, drop: float | None, progress: Progress
) -> tuple[ir.Model, dict[str, Any]]:
    """Zeros in the weights: smaller once compressed, and no faster here."""
    made, layers = PruneWeights(pattern, seed=seed).apply(model, split.fit, progress)
    progress("judge the pruned model", 0, 0)
    found = verdict(model, made, split.judge)
    _refuse(found, drop)
    zeros, (before, after) = sparsity(layers, made), compressed([model, made])
    told = [
        f"{pattern}: {zeros:.0%} of the weights of {len(layers)} layers are zero, {after / before:.2f}× the size when "
        f"deflated; {found.words()}; CPU runtimes multiply zeros as fast as other numbers, so no speed is claimed"
    ]
    record = {
        "kind": "weights",
        "pattern": str(pattern),
        "zeros": zeros,
        "deflated_bytes": [before, after],
        "layers": layers,
        "verdict": found.to_json(),
        **_seen(split, found),
    }
    return made, {"pruning": record, "told": told + _few(split)}


def _seen(split: Samples, found: Verdict) -> dict[str, Any]:
    return {
        "samples": {"fit": split.fit.samples, "choose": split.choose.samples, "judge": found.samples},
        "sample_ids": split.fit.sample_ids() + split.choose.sample_ids(),
    }


def _few(split: Samples) -> list[str]:
    if split.fit.samples >= SENSIBLE:
        return []
    return [f"pruned on {split.fit.samples} samples only: give {2 * SENSIBLE} or more, better {2 * SAMPLES}"]


def _check(asked: Request, model: ir.Model) -> None:
    if asked.sha256 != digest(model):
        raise ArtifactError("the pruning plan is for another model, or for another clean-up of this one", "prune again")


def _ladder(
    model: ir.Model, step: PruneChannels, split: Samples, drop: float, progress: Progress
) -> tuple[ir.Model, PruningPlan, Verdict]:
    """The least that keeps within the budget, step by step down."""
    best: tuple[ir.Model, PruningPlan, Verdict] | None = None
    measured = step.measured(model, split.fit, split.choose, progress)
    for share in LADDER:
        tried = replace(step, budget=share, measure="macs")
        plan = tried.decide(measured)
        made, _ = tried.apply(model, plan, split.learn, progress)
        found = verdict(model, made, split.judge)
        lost = found.loss()
        over = found.sqnr_db < -10 * np.log10(max(drop, 1e-9)) if lost is None else lost > drop
        if over or found.collapsed:
            break
        best = made, plan, found
    if best is None:
        raise BudgetError(
            f"with {LADDER[0]:.0%} of its multiply-accumulates it loses more than the {100 * drop:.1f} points allowed",
            "allow more with --max-accuracy-drop, or leave --prune out",
        )
    return best


def _record(plan: PruningPlan, found: Verdict, split: Samples, timed: Timed | None) -> dict[str, Any]:
    told = [
        f"pruned to {plan.macs:.0%} of the multiply-accumulates and {plan.parameters:.0%} of the parameters; "
        f"{found.words()}"
    ]
    if timed is not None:
        told.append(timed.words())
    told += _few(split)
    stays = frozen(plan.families)
    record = {
        "kind": "channels",
        "macs_kept": plan.macs,
        "parameters_kept": plan.parameters,
        "plan": plan.to_json(),
        "verdict": found.to_json(),
        "timed": None if timed is None else timed.to_json(),
        "frozen": stays,
        **_seen(split, found),
    }
    return {"pruning": record, "told": told}


def _zeros(model: ir.Model) -> tuple[ir.Model, dict[str, Any]]:
    """Exact: channels of zeros go, nothing is fitted."""
    from edgekit.inspection import inspect
    from edgekit.passes.prune_zeros import prune_zeros

    made, record = prune_zeros(model)
    if not record["removed"]:
        raise UnsupportedOpError(
            "no channel of this model is zero",
            "--prune zeros shrinks models that were masked; --prune 0.5 prunes this one",
        )
    shares = {}
    before, after = (inspect(m, backends_too=False) for m in (model, made))
    for key in ("macs", "parameters"):
        if before[key] and after[key] is not None:
            shares[f"{key}_kept"] = after[key] / before[key]
    return made, {"pruning": {"kind": "zeros", **shares, **record}, "told": [record["words"]]}
