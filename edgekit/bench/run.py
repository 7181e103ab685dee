"""Measures candidates on one machine: parity and quality first, then latency side by side; returns the document."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekit.bench import machine, results
from edgekit.bench.client import Loaded, Worker
from edgekit.bench.document import document
from edgekit.bench.entry import Entry
from edgekit.bench.host import THIS_MACHINE, BenchHost, Golden
from edgekit.bench.quality import Meter
from edgekit.bench.results import Measurement
from edgekit.bench.schedule import FULL, QUICK, Pace, Progress, Series
from edgekit.bench.schedule import run as take_turns
from edgekit.errors import ArtifactError, UsageError, WorkerError
from edgekit.model import Signature, Tensors, batch_of, seeded_inputs

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

QUALITY_BATCH = 32  # samples per message where the model's batch is free: enough to hide the pipe, small in memory
_PROFILE_RUNS = 20
_PROFILE_S = 1.0


@dataclass(frozen=True)
class _Judged:
    """Quality of one entry; `problems` make it invalid."""

    figures: dict[str, Any]
    reasons: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Timed:
    """Latency of one entry at one number of threads; `error` is why there are no samples."""

    entry: Entry
    threads: int
    batch: int
    series: Series
    figures: dict[str, Any]


def run_bench(
    entries: Sequence[Entry],
    dataset: Dataset | None,
    *,
    threads: Sequence[int | Literal["all"]] = (1, "all"),
    quick: bool = False,
    profile: bool = False,
    max_accuracy_drop: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
    sample_limit: int | None = None,
    batch: int = 1,
    results_path: Path | None = None,
    pace: Pace | None = None,
    warnings: Sequence[str] = (),
    run_id: str | None = None,
    reference: str | None = None,
    host: BenchHost = THIS_MACHINE,
    untimed: str | None = None,
) -> dict[str, Any]:
    """Measure every entry and return the bench document (bench.document); append to `results_path` if given.

    host: the machine that runs the artifacts. untimed: why a time there is no latency of the target: none is measured.
    threads: thread counts to time with; "all" is every physical core that a process there may use.
    sample_limit: judge quality on that many samples, a seeded choice. batch: samples per timed inference, where the
    model leaves it free. progress(stage, done, total). warnings: what limits the trust in the data, kept with every
    measurement. run_id: of `new_run_id`, where several calls belong to one run. reference: id of the entry that outputs
    and times are compared with, instead of the float32 ones. Raises ArtifactError without entries, LabelError for
    labels that do not fit, UsageError for more threads than the machine has, and what a host that is lost raises. A
    candidate that fails is a row with `valid` false and its reasons, the others go on.
    """
    if not entries:
        raise ArtifactError("there is nothing to measure", "run `edgekit convert` first")
    report = progress or (lambda stage, done, total: None)
    pace = pace or (QUICK if quick else FULL)
    run_id = run_id or new_run_id()
    facts, before = host.facts(), host.state()
    counts = _thread_counts(threads, facts, host.name)
    settings = {**asdict(pace), "seed": seed, "threads": counts}
    settings |= {"max_accuracy_drop": max_accuracy_drop, "warnings": list(warnings)}
    settings |= {} if reference is None else {"reference": reference}
    doubts = machine.warnings_before(facts, before)
    if facts["emulated"]:
        untimed = f"{facts['emulated']} emulates this CPU, a time here is no latency"
    found: list[Measurement] = []
    for target in dict.fromkeys(e.target for e in entries):
        own = [e for e in entries if e.target == target]
        data = None if dataset is None else dataset.bind(own[0].signature)
        if data is not None and sample_limit is not None:
            data = data.take(sample_limit, seed)
        judged = _judge(host, own, data, facts["cores_usable"], report, reference)
        usable = [e for e in own if not (e.problems or judged[e.id].problems)]
        timed = [] if untimed else _time(host, usable, data, counts, batch, pace, seed, report)
        layers = _profile(host, usable, data, batch, report) if profile and not untimed else {}
        after = host.state()
        state: dict[str, Any] = {"facts": facts, "before": before, "after": after}
        state["warnings"] = doubts + machine.warnings_after(before, after)
        part = [replace(m, host=host.name) for m in _measurements(own, judged, timed, layers, counts, untimed)]
        part = _distrusted(part, machine.newly_throttled(before, after))
        taken = datetime.now(UTC).isoformat(timespec="seconds")
        name = None if data is None else _describe(data)
        part = [replace(m, run=run_id, taken=taken, machine=state, settings=settings, dataset=name) for m in part]
        if results_path is not None:
            results.append(results_path, part)
        found += part
        before = after
    return document(found)


def new_run_id() -> str:
    """The time in UTC and a random part."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


def _thread_counts(threads: Sequence[int | Literal["all"]], facts: dict[str, Any], name: str) -> list[int]:
    """More threads than cores would measure the scheduler."""
    most = facts["cores_logical"] or 1
    for count in threads:
        if count != "all" and count > most:
            where = name or "this machine"
            raise UsageError(f"--threads {count}: {where} has {most} cores", f'give 1 to {most}, or "all"')
    return sorted({facts["cores_usable"] if t == "all" else int(t) for t in threads})


def _describe(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "digest": dataset.digest,
        "samples": dataset.samples,
        "labelled": dataset.labelled,
        "preprocessing": dataset.preprocessing.to_json(),
    }


# --- quality ---------------------------------------------------------------------------------------
def _judge(
    host: BenchHost,
    entries: Sequence[Entry],
    data: Dataset | None,
    threads: int,
    report: Progress,
    reference: str | None,
) -> dict[str, _Judged]:
    """Quality of each entry by id, of those whose golden answers are right. The first reference that works is what
    outputs are compared with."""
    references = _references(entries, reference)
    order = sorted((e for e in entries if not e.problems), key=lambda e: e.id not in references)
    if data is None:
        order = [e for e in order if host.golden(e) is not None]
    with contextlib.ExitStack() as stack:
        opened: dict[str, tuple[Entry, Worker, Meter]] = {}
        failed: dict[str, str] = {}
        for done, entry in enumerate(order):
            if host.name:
                report(f"parity {entry.target}", done, len(order))
            size = batch_of(entry.signature) or QUALITY_BATCH
            worker = host.worker(entry, threads, size)
            try:
                stack.enter_context(worker).load()
                why = _unlike_golden(worker, host.golden(entry), size)
            except WorkerError as error:
                why = error.what
            if why is None:
                opened[entry.id] = (entry, worker, Meter())
            else:
                failed[entry.id] = why
        if data is None:
            return {e.id: _Judged({}, (), (failed[e.id],) if e.id in failed else ()) for e in entries}
        for done, part in _batches(data, entries[0].signature):
            _judge_batch(part, opened, failed, references)
            report(f"quality {entries[0].target}", done, data.samples)
        judged = {e.id: _Judged({}, (), ()) for e in entries}
        for key, (_, _, meter) in opened.items():
            figures, reasons, problems = meter.result()
            judged[key] = _Judged(figures, tuple(reasons), tuple(problems))
        return {**judged, **{key: _Judged({}, (), (why,)) for key, why in failed.items()}}


def _unlike_golden(worker: Worker, golden: Golden | None, size: int) -> str | None:
    """How the answers to golden inputs, repeated to a batch of `size`, are not what they must be; None if they are."""
    if golden is None:
        return None
    count = len(next(iter(golden.inputs.values())))
    outputs = worker.infer({name: _fill(value, size) for name, value in golden.inputs.items()})
    return golden.difference({name: value[:count] for name, value in outputs.items()})


def _references(entries: Sequence[Entry], reference: str | None) -> set[str]:
    """Ids: the one that was named, else the build's float32 entries, else float32 files beside it."""
    if reference is not None:
        return {reference}
    floats = [e for e in entries if e.precision == "float32" and not e.variant]
    return {e.id for e in floats if not e.label} or {e.id for e in floats}


@dataclass(frozen=True)
class _Part:
    """One padded batch: `count` samples are real."""

    inputs: Tensors
    labels: np.ndarray[Any, Any] | None
    index: np.ndarray[Any, Any]
    count: int


def _batches(data: Dataset, sig: Signature) -> Iterator[tuple[int, _Part]]:
    """(samples done so far, part): every part has the same batch size, as compiled models want."""
    size = batch_of(sig) or QUALITY_BATCH
    done = 0
    for part in data.batches(size):
        count = len(part.index)
        inputs = {k: _fill(v, size) for k, v in part.inputs.items()}
        done += count
        yield done, _Part(inputs, part.labels, part.index, count)


def _judge_batch(
    part: _Part, opened: dict[str, tuple[Entry, Worker, Meter]], failed: dict[str, str], references: set[str]
) -> None:
    """Run one batch on every candidate; one that fails is moved from `opened` to `failed`."""
    reference: Tensors | None = None
    for key, (entry, worker, meter) in list(opened.items()):
        try:
            outputs = entry.named(worker.infer(entry.feed(part.inputs)))
        except WorkerError as error:
            failed[key] = error.what
            del opened[key]
            continue
        problem = _unlike(outputs, [spec.name for spec in entry.signature.outputs], reference, part.count)
        if problem is not None:
            failed[key] = problem
            del opened[key]
            continue
        # in the model's order, whatever the runtime's
        outputs = {spec.name: outputs[spec.name][: part.count] for spec in entry.signature.outputs}
        if reference is None and key in references:
            reference = outputs
        meter.update(outputs, reference, part.labels, part.index)


def _unlike(outputs: Tensors, wanted: Sequence[str], reference: Tensors | None, count: int) -> str | None:
    """Why these outputs cannot be the model's: a name is missing, or a shape differs from float's; None if they can."""
    for name in wanted:
        if name not in outputs:
            return f"output '{name}' is missing from the artifact; it has {', '.join(outputs)}"
        shape = outputs[name][:count].shape
        if reference is not None and shape != reference[name].shape:
            return f"output '{name}' has shape {list(shape)}, float's has {list(reference[name].shape)}"
    return None


def _fill(array: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """The batch repeated or cut to `size` samples."""
    return array if len(array) == size else array[np.arange(size) % len(array)]


# --- latency ---------------------------------------------------------------------------------------
def _inputs(sig: Signature, data: Dataset | None, batch: int) -> Tensors:
    """What is timed: the first samples of the dataset, or seeded values."""
    if data is None:
        return seeded_inputs(sig, batch)
    part = next(iter(data.batches(batch)))
    return {k: _fill(v, batch) for k, v in part.inputs.items()}


def _time(
    host: BenchHost,
    entries: Sequence[Entry],
    data: Dataset | None,
    counts: Sequence[int],
    batch: int,
    pace: Pace,
    seed: int,
    report: Progress,
) -> list[_Timed]:
    """Every entry at every thread count, all in one schedule: one running, the others waiting."""
    if not entries:
        return []
    size = batch_of(entries[0].signature) or batch
    inputs = _inputs(entries[0].signature, data, size)
    cases = [(entry, count) for entry in entries for count in counts]
    lost: list[_Timed] = []
    target = entries[0].target
    with contextlib.ExitStack() as stack:
        ready: list[tuple[Entry, int, Worker, dict[str, Any]]] = []
        for done, (entry, count) in enumerate(cases):
            report(f"load {target}", done, len(cases))
            worker = host.worker(entry, count, size)
            try:
                loaded = stack.enter_context(worker).load()
                ready.append((entry, count, worker, _figures(loaded, worker.first(entry.feed(inputs))[0])))
            except WorkerError as error:
                lost.append(_Timed(entry, count, size, Series((), error.what), {}))
        turns = take_turns(
            [w for _, _, w, _ in ready], pace, seed, lambda stage, done, total: report(f"{stage} {target}", done, total)
        )
        timed = []
        for (entry, count, worker, figures), series in zip(ready, turns, strict=True):
            if series.error is None:
                figures["peak_rss_bytes"] = worker.peak_rss_bytes()
            timed.append(_Timed(entry, count, size, series, figures))
        return timed + lost


def _figures(loaded: Loaded, first_s: float) -> dict[str, Any]:
    return {
        "import_s": loaded.import_s,
        "load_s": loaded.load_s,
        "first_inference_s": first_s,
        "runtime_version": loaded.version,
    }


@dataclass(frozen=True)
class _Layers:
    """Rows {name, op, seconds, calls} of one entry, or why there are none."""

    rows: list[dict[str, Any]] | None
    error: str | None = None


def _profile(
    host: BenchHost, entries: Sequence[Entry], data: Dataset | None, batch: int, report: Progress
) -> dict[str, _Layers]:
    """Mean seconds per layer and call at one thread, in workers of their own: profiling slows a run down."""
    found: dict[str, _Layers] = {}
    for done, entry in enumerate(entries):
        report(f"profile {entry.target}", done, len(entries))
        size = batch_of(entry.signature) or batch
        try:
            with host.worker(entry, 1, size, profile=True) as worker:
                worker.load()
                worker.first(entry.feed(_inputs(entry.signature, data, size)))
                worker.warmup(_PROFILE_RUNS, 0.0, _PROFILE_S)
                rows = worker.layers()
        except WorkerError as error:  # the timing stands
            found[entry.id] = _Layers(None, error.what)
            continue
        found[entry.id] = _Layers([{**row, "seconds": row["seconds"] / max(1, row["calls"])} for row in rows])
    return found


# --- putting it together ---------------------------------------------------------------------------
def _measurements(
    entries: Sequence[Entry],
    judged: dict[str, _Judged],
    timed: Sequence[_Timed],
    layers: dict[str, _Layers],
    counts: Sequence[int],
    untimed: str | None,
) -> list[Measurement]:
    """All lines of one target, in the order of its candidates."""
    found = []
    by_case = {(t.entry.id, t.threads): t for t in timed}
    for entry in entries:
        quality = judged[entry.id]
        plain = Measurement(
            run="",
            taken="",
            metric="latency",
            target=entry.target,
            backend=entry.backend,
            precision=entry.precision,
            path=str(entry.path),
            sha256=entry.sha256,
            size_bytes=entry.size_bytes,
            parity=entry.parity,
            notes=entry.notes,
            label=entry.label,
            variant=entry.variant,
            pruning=entry.pruning,
        )
        wrong = (*entry.problems, *quality.problems)
        for count in counts:
            found.append(_latency_line(plain, count, by_case.get((entry.id, count)), wrong, untimed))
        if quality.figures:
            verdict = (*quality.problems, *quality.reasons)
            found.append(
                replace(plain, metric="quality", unit="", figures=quality.figures, reasons=verdict, valid=not wrong)
            )
        if entry.id in layers:
            profiled = layers[entry.id]
            reasons = () if profiled.error is None else (f"layers: {profiled.error}",)
            line = replace(plain, metric="layers", unit="s", figures={"layers": profiled.rows}, threads=1)
            found.append(replace(line, reasons=reasons))
    return found


def _latency_line(
    plain: Measurement, threads: int, timed: _Timed | None, wrong: tuple[str, ...], untimed: str | None
) -> Measurement:
    if timed is None:
        why = wrong or ((f"latency: {untimed}",) if untimed else ())
        return replace(plain, threads=threads, valid=not wrong, reasons=why)
    if timed.series.error is not None:
        return replace(plain, threads=threads, batch=timed.batch, valid=False, reasons=(timed.series.error,))
    samples = tuple(tuple(int(v) for v in r) for r in timed.series.rounds)
    return replace(plain, threads=threads, batch=timed.batch, samples=samples, figures=timed.figures)


def _distrusted(measured: Sequence[Measurement], conditions: Sequence[str]) -> list[Measurement]:
    """Times taken while the machine began to be throttled: kept, and marked invalid."""
    if not conditions:
        return list(measured)
    why = f"throttled: {', '.join(conditions)} while measuring; the times are kept and not used, measure again"
    return [
        replace(m, valid=False, reasons=(f"{m.metric}: {why}", *m.reasons)) if m.samples or m.metric == "layers" else m
        for m in measured
    ]
