"""Measures two artifacts or files against each other in one run and says whether the second is worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import artifact
from edgekit.arguments import open_data, recorded, thread_counts
from edgekit.errors import MissingExtraError, ModelFileError, NoCalibrationDataError, UsageError, WorkerError
from edgekit.report.progress import Progress, silent

if TYPE_CHECKING:
    from edgekit.bench.entry import Entry
    from edgekit.dataset import Dataset
    from edgekit.preprocessing import Preprocessing

COMPARE_SCHEMA = 1  # 1: first
A, B = "A", "B"
_TARGET = "compare"
_SEEDED_SAMPLES = 64  # where no data are given: enough to see that outputs differ
_SCORES = ("accuracy", "r2", "perplexity", "mae")  # of the bench's quality; the first that both have is compared


def compare(
    a: Path | str,
    b: Path | str,
    *,
    data: str | Path | Dataset | None = None,
    samples: int | None = None,
    quick: bool = False,
    threads: Sequence[str | int] = (1,),
    max_accuracy_drop: float | None = None,
    max_slowdown: float | None = None,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    label_column: str | None = None,
    labels: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare `b` with `a`; each a .tflite file or an artifact folder of a build.

    data: test data; without it outputs are compared on seeded random inputs.
    max_accuracy_drop: how much of its accuracy (or R²) `b` may lose, 0 to 1; without labels, the agreement or SQNR that
    goes with it, as in `bench`. max_slowdown: how many times the time of `a` it may take; exceeded where the whole 95 %
    interval lies above it.
    Returns {schema, a, b, size_ratio, latency [{threads, ratio, ci95}], score, score_difference, agreement, sqnr_db,
    max_difference, limits, regressions, dataset, settings, machine, warnings}; ratios are b over a. `regressions` is
    empty, or says what exceeds a limit. Raises WorkerError if one of the two does not run.
    """
    from edgekit import candidates
    from edgekit.bench.run import run_bench
    from edgekit.dataset import random_dataset

    if max_accuracy_drop is not None and data is None:
        raise NoCalibrationDataError("--max-accuracy-drop judges outputs and no data were given", "pass --data FILE")
    first, how, one_target = _open(Path(a), A)
    second, other_how, other_target = _open(Path(b), B)
    elsewhere = next(filter(None, (candidates.elsewhere(target) for target in (one_target, other_target))), None)
    if elsewhere is not None and max_slowdown is not None:
        raise UsageError(f"--max-slowdown cannot be judged: {elsewhere}", "leave it out")
    second, warnings = _stand_in(second, first), [*_warnings(first), *_warnings(second)]
    warnings += [f"no times were measured: {elsewhere}"] if elsewhere is not None else []
    dataset = open_data(data, preprocessing or recorded(data, how or other_how), label_column, labels)
    if dataset is None:
        candidates.check_sizes(first)
        dataset = random_dataset(first.signature, _SEEDED_SAMPLES, seed)
        warnings.append("no data: outputs were compared on random inputs, which says little about real ones")
    document = run_bench(
        [replace(first, problems=()), replace(second, problems=())],
        dataset,
        threads=thread_counts(threads),
        quick=quick,
        seed=seed,
        progress=progress,
        sample_limit=samples,
        warnings=warnings,
        reference=A,
        untimed=elsewhere,
    )
    limits = {"max_accuracy_drop": max_accuracy_drop, "max_slowdown": max_slowdown}
    return _document(document, limits, labelled=data is not None)


def _open(path: Path, label: str) -> tuple[Entry, Preprocessing | None, str]:
    """(entry, the preprocessing that it records, the target that it was made for or "")."""
    from edgekit import candidates
    from edgekit.preprocessing import Preprocessing
    from edgekit.sources import tflite

    if path.is_dir() and (path / artifact.MANIFEST).is_file():
        manifest = artifact.read_manifest(path)
        entry = candidates.of_artifact(path, manifest)
        missing = [p for p in entry.problems if p.startswith("not run: ")]
        if missing:
            raise MissingExtraError(f"'{path}': {missing[0]}", "install it, or compare others")
        told = manifest.preprocessing
        how = None if told is None else Preprocessing.from_json(told)
        return replace(entry, target=_TARGET, label=label), how, entry.target
    if path.is_dir():
        inside = next((p for p in artifact.artifacts(path)), None) if (path / ".edgekit").is_file() else None
        raise UsageError(
            f"folder '{path}' is no artifact", f"name one, such as {inside}" if inside else "check the path"
        )
    if not path.exists():
        raise ModelFileError(f"no artifact or file '{path}'", "check the path")
    if not tflite.is_tflite(path):
        raise UsageError(
            f"cannot compare '{path}'", "give a .tflite, or an artifact folder such as build/cpu/tflite-int8"
        )
    model = tflite.read(path)
    return candidates.of_file(model, label, _TARGET), candidates.told_preprocessing(model), ""


def _stand_in(entry: Entry, first: Entry) -> Entry:
    from edgekit import candidates

    return entry if entry.signature == first.signature else candidates.fitted(entry, first.signature)


def _warnings(entry: Entry) -> list[str]:
    return [f"{entry.label} did not pass its verification: {problem}" for problem in entry.problems]


# --- what came out ------------------------------------------------------------------------------------


def _document(found: Mapping[str, Any], limits: Mapping[str, float | None], *, labelled: bool) -> dict[str, Any]:
    """found: a bench document whose reference is A."""
    rows = {label: [r for r in found["artifacts"] if r["label"] == label] for label in (A, B)}
    for label in (A, B):
        broken = next((r for r in rows[label] if not r["valid"]), None)
        if broken is not None:
            told, where = broken["reasons"][0], f"{label} ('{broken['path']}')"
            if broken["latency_s"]["samples"]:  # it ran, but its times are not to be trusted
                raise WorkerError(f"{where} could not be measured: {told}", "compare again")
            raise WorkerError(f"{where} does not run: {told}", "compare others")
    one, two = rows[A][0], rows[B][0]
    score, difference = _score(one["quality"] or {}, two["quality"] or {})
    quality = two["quality"] or {}
    latency = [
        {"threads": r["threads"], "ratio": r["latency_s"]["ratio_to_float"], "ci95": r["latency_s"]["ratio_ci95"]}
        for r in rows[B]
    ]
    settings = {k: v for k, v in found["settings"].items() if k not in ("max_accuracy_drop", "reference")}
    return {
        "schema": COMPARE_SCHEMA,
        "a": _side(rows[A]),
        "b": _side(rows[B]),
        "size_ratio": two["size_bytes"] / one["size_bytes"],
        "latency": latency,
        "score": score,
        "score_difference": difference,
        "agreement": quality.get("agreement_with_float"),
        "sqnr_db": quality.get("sqnr_db"),
        "max_difference": quality.get("max_abs_err"),
        "limits": dict(limits),
        "regressions": _regressions(one, two, latency, limits),
        "dataset": found["dataset"] if labelled else None,
        "settings": settings,
        "machine": found["machine"],
        "warnings": found["warnings"],
    }


def _side(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One artifact: what it is, its time for each number of threads, its quality."""
    kept = ("path", "backend", "precision", "size_bytes", "sha256", "runtime_version", "load_s", "peak_rss_bytes")
    shown = ("p50", "p90", "p99", "mean", "samples", "throughput_per_s")
    times = [{"threads": r["threads"], **{k: r["latency_s"][k] for k in shown}} for r in rows]
    notes = list(dict.fromkeys(n for r in rows for n in r["notes"]))
    scores = {k: v for k, v in (rows[0]["quality"] or {}).items() if k in ("task", "samples", *_SCORES)}
    return {**{k: rows[0][k] for k in kept}, "latency_s": times, "quality": scores, "notes": notes}


def _score(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """(name of the first figure that both have, b's minus a's)."""
    for name in _SCORES:
        if one.get(name) is not None and two.get(name) is not None:
            return name, two[name] - one[name]
    return None, None


def _regressions(
    one: Mapping[str, Any],
    two: Mapping[str, Any],
    latency: Sequence[Mapping[str, Any]],
    limits: Mapping[str, float | None],
) -> list[str]:
    """What of B exceeds a limit."""
    from edgekit.bench.verdict import quality_problem

    out = []
    budget, most = limits["max_accuracy_drop"], limits["max_slowdown"]
    problem = None if budget is None else quality_problem(two, one, budget, than=A)
    if problem is not None:
        out.append(f"{B} {problem}")
    for row in latency:
        if most is not None and row["ci95"] is not None and row["ci95"][0] > most:
            low, high = row["ci95"]
            told = f"{row['ratio']:.2f}× the time of {A} [{low:.2f}, {high:.2f}] on {row['threads']} thread(s)"
            out.append(f"{B} takes {told}, more than {most:g}×")
    return out
