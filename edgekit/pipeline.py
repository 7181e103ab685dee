"""The straight line as functions: load, convert, bench, compare, report, inspect; for the command line and Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekit import artifact, backends
from edgekit.arguments import names, open_data
from edgekit.benching import bench, latest_document, report
from edgekit.compare import compare
from edgekit.errors import (
    BudgetError,
    ConversionMismatchError,
    MissingExtraError,
    NoCalibrationDataError,
    PrecisionError,
    UnsupportedOpError,
    UsageError,
)
from edgekit.report.progress import Progress, silent
from edgekit.target import PRECISIONS, PRUNED, STATIC, CandidateSpec, Target, load_target

if TYPE_CHECKING:
    from edgekit.dataset import Dataset
    from edgekit.preprocessing import Preprocessing
    from edgekit.pruning import Request
    from edgekit.sources import Source
    from edgekit.stages import Conversion

__all__ = ["bench", "compare", "convert", "inspect", "latest_document", "load", "report"]

CONVERT_SCHEMA = 1  # 1: first


@dataclass(frozen=True)
class _Work:
    """One artifact to make: a candidate of a target, or why it is not made."""

    target: Target
    candidate: CandidateSpec
    skipped: str = ""


def load(
    path: Path | str,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    trust: bool = False,
    data: Dataset | None = None,
    progress: Progress = silent,
) -> Source:
    """Read a Keras or ONNX model and check the result against the original. Raises ModelFileError and its kin."""
    from edgekit import sources

    return sources.load(
        Path(path), shapes=shapes or {}, trust=trust, data=data, progress=lambda stage: progress(stage, 0, 0)
    )


def convert(
    model: Path | str,
    targets: Sequence[str] = ("cpu",),
    *,
    data: str | Path | Dataset | None = None,
    out: Path | str = "build",
    precisions: Sequence[str] = (),
    samples: int = 256,
    calibration: str = "auto",
    weight_bits: str | int = "auto",
    keep_float: Sequence[str] = (),
    plan: Path | str | None = None,
    prune: str | None = None,
    prune_latency: str | None = None,
    distill: float | None = None,
    emit_keras: bool = False,
    search_time: float | None = None,
    max_accuracy_drop: float | None = None,
    random_calibration: bool = False,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    trust: bool = False,
    io: Literal["float32", "int8"] = "float32",
    input_layout: Literal["keep", "NHWC", "NCHW"] = "keep",
    preprocessing: Preprocessing | None = None,
    label_column: str | None = None,
    labels: Path | None = None,
    targets_dir: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Make and verify an artifact for every candidate of every target.

    model: path of a .keras, .h5, SavedModel folder or .onnx.
    data: calibration data (see `edgekit.open_dataset`); needed for int8 unless `random_calibration`.
    plan: a plan.toml to apply, or to take overrides from; applied unchanged it needs no data.
    prune: the share of the multiply-accumulates to keep ("0.5"), "parameters=0.5", "auto", "zeros" or a pruning.toml:
    channels are removed. prune_latency: "2x": as many as make the first target's fastest float runtime so much faster,
    measured here. distill: seconds for which the float model then teaches the smaller one, without labels.
    emit_keras: the smaller model as `out/pruned.keras` as well, to train it further. Every candidate is made of the
    smaller model, float32 of the model as it came stays beside them.
    search_time: seconds after which no further way to quantize is tried. max_accuracy_drop: layers stay float until
    int8 loses no more, on samples that nothing was chosen by; where that fails int8 is not made.
    io: "int8" gives int8 artifacts integer inputs and outputs, where the format has them (tflite).
    input_layout: axis order of image inputs; "keep" leaves the model's own.
    precisions: only these; float32 is always made beside them, as the baseline that `bench` compares with.
    Returns a JSON-ready summary; writes `out/<target>/<backend>-<precision>/`.
    """
    from edgekit.passes.plan_file import read as read_plan
    from edgekit.pruning import latency
    from edgekit.pruning import request as read_request
    from edgekit.stages import Conversion

    if prune is not None and prune_latency is not None:
        raise UsageError("--prune and --prune-latency exclude each other", "leave one of them out")
    asked = None if prune is None else read_request(prune)
    if prune_latency is not None:
        asked = latency(prune_latency)
    _check_pruning(asked, distill, emit_keras)
    goals = [load_target(name, targets_dir) for name in names(targets)]
    if prune_latency is not None:
        _check_timed_here(goals[0])
    work = _plan_work(goals, precisions, pruned=asked is not None)
    wants_int8 = any(w.candidate.precision in STATIC and not w.skipped for w in work)
    told = None if plan is None else read_plan(Path(plan))
    whole = told is not None and told.plan is not None and not told.overrides
    if wants_int8 and data is None and not random_calibration and not whole:
        raise NoCalibrationDataError(
            "int8 needs calibration data",
            "pass --data FILE (a few hundred samples), or --precision float32, or --random-calibration",
        )
    if asked is not None and asked.kind != "zeros" and data is None:
        raise NoCalibrationDataError(
            "pruning fits what it leaves to data", "pass --data FILE (512 samples are good; labels are not needed)"
        )
    if random_calibration and data is not None:
        raise UsageError("--random-calibration and --data exclude each other", "leave one of them out")
    dataset = open_data(data, preprocessing, label_column, labels)
    root = artifact.open_build(Path(out))
    job = Conversion(
        root=root,
        model=Path(model),
        dataset=dataset,
        samples=samples,
        calibration=calibration,
        keep_float=tuple(keep_float),
        plan=told,
        search_time=search_time,
        max_accuracy_drop=max_accuracy_drop,
        prune=asked,
        channel_multiple=max(w.target.channel_multiple for w in work),
        timing=_float_backends(work),
        distill_s=distill,
        random_calibration=random_calibration,
        seed=seed,
        shapes=dict(shapes or {}),
        trust=trust,
        io=io,
        input_layout=input_layout,
        progress=progress,
    )
    try:
        job.check_names()  # reads the model: what is wrong with it is said once, not for each candidate
    except BaseException:
        artifact.remove_if_empty(root)
        raise
    work = [w for w in work if precisions or job.suits(w.candidate)]
    job.probe()
    _ = job.pruned  # what is wrong with it is said once as well
    rows = [_make(job, item, _weight_bits(item.target, work, weight_bits)) for item in work]
    if all(r["status"] == "not run" for r in rows):
        raise UnsupportedOpError("; ".join(f"{r['candidate']}: {r['why']}" for r in rows), "no candidate could be made")
    if all(r["status"] in ("not run", "invalid") for r in rows):
        wrong = [f"{r['candidate']}: {', '.join(r['parity']['reasons'])}" for r in rows if r["status"] == "invalid"]
        raise ConversionMismatchError("no artifact is right: " + "; ".join(wrong), "please report this model")
    job.retire_others()
    written = {"keras": job.emit_keras()} if emit_keras else {}
    return {"schema": CONVERT_SCHEMA, "build": str(root), **job.summary(), **written, "artifacts": rows}


def _check_timed_here(target: Target) -> None:
    """A latency can only be had of this machine's kind."""
    from edgekit.bench.machine import architecture

    if target.device is not None and target.device.arch != architecture():
        raise UsageError(
            f"--prune-latency times on this machine ({architecture()}), {target.name} is {target.device.arch}",
            f"use --prune SHARE, then `edgekit bench -t {target.name} --host` tells how much faster it is there",
        )


def _check_pruning(asked: Request | None, distill: float | None, emit_keras: bool) -> None:
    """Raises UsageError for options that need pruning, MissingExtraError before anything slow."""
    if asked is None and (distill is not None or emit_keras):
        raise UsageError("--distill and --emit-keras belong to pruning", "add --prune 0.5")
    if asked is not None and distill is not None and asked.kind in ("zeros", "weights"):
        raise UsageError(
            f"--distill has nothing to teach after --prune {asked.kind}", "prune channels, or leave it out"
        )
    if distill is not None or emit_keras:
        from edgekit.sources import keras_tools

        if not keras_tools():
            raise MissingExtraError(
                f"{'--distill' if distill is not None else '--emit-keras'} needs TensorFlow",
                "pip install 'edgekit[keras]'",
            )


def _float_backends(work: Sequence[_Work]) -> tuple[str, ...]:
    """Installed ones of the first target that make float32."""
    first = [w for w in work if w.target is work[0].target and w.candidate.precision == "float32" and not w.skipped]
    return tuple(dict.fromkeys(w.candidate.backend for w in first))


def _make(job: Conversion, item: _Work, bits: int) -> dict[str, Any]:
    """The row of one candidate: made, reused, invalid (proved wrong, kept for inspection, never shipped) or not run."""
    row: dict[str, Any] = {"target": item.target.name, "candidate": item.candidate.id}
    if item.skipped:
        return {**row, "status": "not run", "why": item.skipped}
    try:
        return {**row, **job.candidate(item.target, item.candidate, bits)}
    except (UnsupportedOpError, BudgetError) as error:
        job.retire(item.target.name, item.candidate.id)
        return {**row, "status": "not run", "why": error.what}


def _plan_work(targets: Sequence[Target], precisions: Sequence[str], *, pruned: bool = False) -> list[_Work]:
    """Which candidates to make, before anything slow: unknown precisions and missing runtimes show here.

    pruned: all of the pruned model, and float32 of the model as it came.
    """
    import difflib

    for wanted in precisions:
        if wanted not in PRECISIONS:
            near = difflib.get_close_matches(wanted, PRECISIONS, n=1)
            raise PrecisionError(
                f"no precision '{wanted}'", f"did you mean '{near[0]}'?" if near else "one of " + ", ".join(PRECISIONS)
            )
    work = []
    for target in targets:
        offered = {c.precision for c in target.candidates}
        for wanted in precisions:
            if wanted not in offered:
                raise PrecisionError(
                    f"target '{target.name}' has no {wanted} candidate", "it offers " + ", ".join(sorted(offered))
                )
        for candidate in target.candidates:
            asked = candidate.precision in {*precisions, "float32"} if precisions else not candidate.on_request
            if asked:
                install = backends.get(candidate.backend).missing()
                why = f"needs {candidate.backend}: {install}" if install else ""
                if pruned and candidate.precision == "float32":
                    work.append(_Work(target, candidate, why))
                work.append(_Work(target, replace(candidate, variant=PRUNED if pruned else ""), why))
    if all(w.skipped for w in work):
        names = ", ".join(f"'{t.name}'" for t in targets)
        raise MissingExtraError(f"no runtime of target {names} is installed", work[-1].skipped)
    return work


def _weight_bits(target: Target, work: Sequence[_Work], asked: str | int) -> int:
    """7 where a u8×s8 kernel of any of the target's runtimes saturates, so that all get the same integers; else 8."""
    if str(asked) != "auto":
        return int(asked)
    if target.weight_bits != "auto":
        return target.weight_bits
    used = {
        w.candidate.backend for w in work if w.target is target and not w.skipped and w.candidate.precision == "int8"
    }
    return 7 if any(backends.get(name).saturates() for name in sorted(used)) else 8


def inspect(
    model: Path | str, *, shapes: Mapping[str, tuple[int, ...]] | None = None, trust: bool = False
) -> dict[str, Any]:
    """Signature, operators, parameters, MACs, activation memory, and which backends can take the model."""
    from edgekit.sources import tflite

    if tflite.is_tflite(Path(model)):
        from edgekit.inspection_tflite import inspect as examine_file

        return examine_file(tflite.read(Path(model)))
    from edgekit.inspection import inspect as examine
    from edgekit.passes.fold import Fold

    loaded = load(model, shapes=shapes, trust=trust).model
    return examine(loaded, Fold()(loaded, None))
