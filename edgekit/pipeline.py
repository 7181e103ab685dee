"""The straight line as functions: load, convert, bench, report, inspect; the command line and the Python API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekit import artifact, backends
from edgekit.errors import (
    ArtifactError,
    ConversionMismatchError,
    MissingExtraError,
    NoCalibrationDataError,
    PrecisionError,
    UnknownTargetError,
    UnsupportedOpError,
    UsageError,
)
from edgekit.report.progress import Progress, silent
from edgekit.target import PRECISIONS, CandidateSpec, Target, load_target

if TYPE_CHECKING:
    from edgekit.dataset import Dataset
    from edgekit.model import Signature
    from edgekit.preprocessing import Preprocessing
    from edgekit.sources import Source
    from edgekit.stages import Conversion

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
    io: "int8" gives int8 artifacts integer inputs and outputs, where the format has them (tflite).
    input_layout: axis order of image inputs; "keep" leaves the model's own.
    precisions: only these; float32 is always made beside them, as the baseline that `bench` compares with.
    Returns a JSON-ready summary; writes `out/<target>/<backend>-<precision>/`.
    """
    from edgekit.stages import Conversion

    work = _plan_work([load_target(name, targets_dir) for name in _as_list(targets)], precisions)
    wants_int8 = any(w.candidate.precision == "int8" and not w.skipped for w in work)
    if wants_int8 and data is None and not random_calibration:
        raise NoCalibrationDataError(
            "int8 needs calibration data",
            "pass --data FILE (a few hundred samples), or --precision float32, or --random-calibration",
        )
    if random_calibration and data is not None:
        raise UsageError("--random-calibration and --data exclude each other", "leave one of them out")
    dataset = _open(data, preprocessing, label_column, labels)
    root = artifact.open_build(Path(out))
    job = Conversion(
        root=root,
        model=Path(model),
        dataset=dataset,
        samples=samples,
        calibration=calibration,
        keep_float=tuple(keep_float),
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
    job.probe()
    rows = [_make(job, item, _weight_bits(item.target, work, weight_bits)) for item in work]
    if all(r["status"] == "not run" for r in rows):
        raise UnsupportedOpError("; ".join(f"{r['candidate']}: {r['why']}" for r in rows), "no candidate could be made")
    if all(r["status"] in ("not run", "invalid") for r in rows):
        wrong = [f"{r['candidate']}: {', '.join(r['parity']['reasons'])}" for r in rows if r["status"] == "invalid"]
        raise ConversionMismatchError("no artifact is right: " + "; ".join(wrong), "please report this model")
    job.retire_others()
    return {"schema": CONVERT_SCHEMA, "build": str(root), **job.summary(), "artifacts": rows}


def _make(job: Conversion, item: _Work, bits: int) -> dict[str, Any]:
    """The row of one candidate: made, reused, invalid (proved wrong, kept for inspection, never shipped) or not run."""
    row: dict[str, Any] = {"target": item.target.name, "candidate": item.candidate.id}
    if item.skipped:
        return {**row, "status": "not run", "why": item.skipped}
    try:
        return {**row, **job.candidate(item.target, item.candidate, bits)}
    except UnsupportedOpError as error:
        job.retire(item.target.name, item.candidate.id)
        return {**row, "status": "not run", "why": error.what}


def _as_list(names: Sequence[str] | str) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _plan_work(targets: Sequence[Target], precisions: Sequence[str]) -> list[_Work]:
    """Which candidates to make, before anything slow: unknown precisions and missing runtimes show here."""
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
        keep = {*precisions, "float32"} if precisions else offered
        for candidate in target.candidates:
            if candidate.precision in keep:
                install = backends.get(candidate.backend).missing()
                why = f"needs {candidate.backend}: {install}" if install else ""
                work.append(_Work(target, candidate, why))
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


def _open(
    data: str | Path | Dataset | None,
    preprocessing: Preprocessing | None,
    label_column: str | None,
    labels: Path | None,
) -> Dataset | None:
    if data is None:
        return None
    from edgekit.dataset import Dataset, open_dataset

    if isinstance(data, Dataset):
        return data
    return open_dataset(data, preprocessing=preprocessing, label_column=label_column, labels=labels)


def bench(
    build: Path | str,
    targets: Sequence[str] = (),
    *,
    data: str | Path | Dataset | None = None,
    samples: int | None = None,
    quick: bool = False,
    threads: Sequence[str | int] = (),
    batch: int = 1,
    profile: bool = False,
    max_accuracy_drop: float = 0.01,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    label_column: str | None = None,
    labels: Path | None = None,
    targets_dir: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure every artifact of a build side by side and decide what to ship.

    data: test data; without it latency, size and memory are measured and quality is absent, with the reason.
    samples: judge quality on at most that many; threads: counts or "all", instead of the profile's.
    Returns the bench document (schema 1) and appends the raw measurements to `build/results.jsonl`.
    """
    from edgekit.bench.results import RESULTS_FILE
    from edgekit.bench.run import new_run_id, run_bench
    from edgekit.model import Signature

    root = artifact.check_build(Path(build))
    manifests = _manifests(root, _as_list(targets))
    recorded = next(iter(manifests.values())).preprocessing
    dataset = _open(data, preprocessing or _recorded(data, recorded), label_column, labels)
    if dataset is not None:
        _check_labels(dataset, Signature.from_json(next(iter(manifests.values())).signature))
    warnings = _data_warnings(dataset, manifests, progress)
    documents, run_id = [], new_run_id()
    for name in dict.fromkeys(m.target for m in manifests.values()):
        documents.append(
            run_bench(
                [_entry(path, m) for path, m in manifests.items() if m.target == name],
                dataset,
                threads=_threads(threads) or _profile_threads(name, targets_dir),
                quick=quick,
                profile=profile,
                max_accuracy_drop=max_accuracy_drop,
                seed=seed,
                progress=progress,
                sample_limit=samples,
                batch=batch,
                results_path=root / RESULTS_FILE,
                warnings=warnings,
                run_id=run_id,
            )
        )
    return _merged(documents)


def report(build: Path | str, *, out: Path | str | None = None, kind: str | None = None) -> str:
    """The newest measurements of a build as text, markdown or JSON; written to `out` if given. Measures nothing."""
    from edgekit.report import render

    root = artifact.check_build(Path(build))
    text = render.render(latest_document(root), kind or render.kind_of(out))
    if out is not None:
        with artifact.disk_errors(Path(out)):
            artifact.write_text(Path(out), text)
    return text


def latest_document(root: Path) -> dict[str, Any]:
    """The bench document of the newest measurements of each target in `results.jsonl`."""
    from edgekit.bench.document import document
    from edgekit.bench.results import RESULTS_FILE, latest, read

    path = root / RESULTS_FILE
    if not path.is_file():
        raise ArtifactError(f"nothing was measured in '{root}' yet", f"run `edgekit bench {root}`")
    notes: list[str] = []
    measured = read(path, notes.append)
    by_target = {name: [m for m in measured if m.target == name] for name in dict.fromkeys(m.target for m in measured)}
    merged = _merged([document(latest(lines)) for lines in by_target.values()])
    return {**merged, "warnings": [*merged["warnings"], *notes, *_outdated(root, merged)]}


def _outdated(root: Path, document: Mapping[str, Any]) -> list[str]:
    """Which measured artifacts are no longer what stands in the build."""
    now = {path: artifact.read_manifest(path, verify=False).sha256 for path in artifact.artifacts(root)}
    stale = set()
    for row in document["artifacts"]:
        where = root / row["target"] / f"{row['backend']}-{row['precision']}"
        if now.get(where) != row["sha256"]:
            stale.add(f"{row['target']}/{where.name}")
    told = ", ".join(sorted(stale))
    return [f"measured before they were made again or removed: {told}; run `edgekit bench {root}`"] if stale else []


def _manifests(root: Path, targets: Sequence[str]) -> dict[Path, artifact.Manifest]:
    """Artifact folder -> manifest, hashes checked, in the order of the profiles' candidates."""
    found = {path: artifact.read_manifest(path) for path in artifact.artifacts(root)}
    for name in targets:
        if not any(m.target == name for m in found.values()):
            made = ", ".join(sorted({m.target for m in found.values()})) or "nothing"
            raise ArtifactError(
                f"build '{root}' has no target '{name}' (it has {made})", f"run `edgekit convert -t {name}`"
            )
    if not found:
        raise ArtifactError(f"build '{root}' holds no artifact", "run `edgekit convert MODEL` first")
    if len({m.source["sha256"] for m in found.values()}) > 1:
        raise ArtifactError(f"build '{root}' holds artifacts of different models", "convert again")
    order = {name: i for i, name in enumerate(backends.BACKENDS)}
    ranked = sorted(found.items(), key=lambda p: (p[1].target, PRECISIONS.index(p[1].precision), order[p[1].backend]))
    return {path: m for path, m in ranked if not targets or m.target in targets}


def _entry(path: Path, manifest: artifact.Manifest) -> Any:
    from edgekit.bench.entry import Entry
    from edgekit.model import Signature

    backend = backends.get(manifest.backend)
    parity = None if manifest.parity is None else dict(manifest.parity)
    problems = tuple((parity or {}).get("reasons", ()))
    install = backend.missing()
    if install:
        problems = (*problems, f"not run: needs {manifest.backend}: {install}")
    elif _proved_elsewhere(manifest) and backend.saturates():
        problems = (*problems, "proved on a CPU whose int8 kernels do not saturate, as this one's do: convert it here")
    return Entry(
        target=manifest.target,
        backend=manifest.backend,
        precision=manifest.precision,
        path=path,
        runner=backend.RUNNER,
        sha256=manifest.sha256,
        size_bytes=manifest.size_bytes,
        signature=Signature.from_json(manifest.signature),
        parity=parity,
        problems=problems,
        notes=manifest.notes,
    )


def _proved_elsewhere(manifest: artifact.Manifest) -> bool:
    """An int8 artifact with full-range weights whose proof holds where u8×s8 products are exact."""
    bits = (manifest.quantization or {}).get("weight_bits")
    return bits == 8 and (manifest.parity or {}).get("saturates") is False


def _threads(given: Sequence[str | int]) -> tuple[int | Any, ...]:
    """Counts as asked for, none above what this machine has: more threads than cores measure the scheduler."""
    import os

    out: list[int | str] = []
    most = os.cpu_count() or 1
    for value in given:
        if value == "all":
            out.append("all")
        elif str(value).isdecimal() and 1 <= int(value) <= most:
            out.append(int(value))
        else:
            raise UsageError(f"--threads {value}", f'give a number from 1 to {most} (the cores here) or "all"')
    return tuple(out)


def _profile_threads(name: str, targets_dir: Path | None) -> tuple[int | Any, ...]:
    """The profile's thread counts; a target whose profile is gone is measured with the default ones."""
    try:
        return load_target(name, targets_dir).threads
    except UnknownTargetError:
        return (1, "all")


def _recorded(data: Any, recorded: Mapping[str, Any] | None) -> Preprocessing | None:
    """The preprocessing that convert recorded, unless the data come with a declaration of their own."""
    if recorded is None or not isinstance(data, str | Path):
        return None
    from edgekit.preprocessing import Preprocessing, find_file

    if find_file(Path(str(data).partition("#")[0])) is not None:
        return None
    return Preprocessing.from_json(recorded)


def _check_labels(dataset: Dataset, sig: Signature) -> None:
    """Class labels must be of the model's classes, and of more than one. Raises LabelError."""
    from edgekit.binding import output_classes
    from edgekit.dataset import check_labels

    classes = output_classes(sig)
    if not dataset.labelled or classes is None or classes < 2 or len(sig.outputs[0].shape) != 2:
        return
    bound = dataset.bind(sig)
    _, first = next(iter(bound.labels()))
    if first.dtype.kind == "i" and first.ndim == 1:
        check_labels(bound, classes)


def _data_warnings(
    dataset: Dataset | None, manifests: Mapping[Path, artifact.Manifest], progress: Progress
) -> list[str]:
    """What a reader must know of the data before trusting a figure."""
    from edgekit.model import Signature

    out = []
    first = next(iter(manifests.values()))
    sig = Signature.from_json(first.signature)
    calibration = next((m.calibration for m in manifests.values() if m.calibration), None)
    if calibration and calibration["random"]:
        out.append("int8 was calibrated on random inputs: its accuracy says little about real calibration data")
    if dataset is None:
        return out
    progress("compare calibration and test data", 0, 0)
    if calibration:
        shared = len(set(calibration["sample_ids"]) & set(dataset.bind(sig).sample_ids()))
        if shared:
            out.append(f"{shared} of the {dataset.samples} test samples were also used for calibration")
    if first.preprocessing is not None and first.preprocessing != dataset.preprocessing.to_json():
        out.append(
            f"the test data are prepared differently ({dataset.preprocessing.describe()}) from the calibration data"
        )
    told = _probe(dataset, manifests, progress)
    return [*out, told] if told else out


def _probe(dataset: Dataset, manifests: Mapping[Path, artifact.Manifest], progress: Progress) -> str | None:
    """Whether a simple change of the preprocessing raises the float artifact's accuracy strongly, and which."""
    from edgekit import verify
    from edgekit.binding import output_classes
    from edgekit.model import Signature, batch_of
    from edgekit.probe import probe

    found = next(((p, m) for p, m in manifests.items() if m.precision == "float32"), None)
    if found is None or not dataset.labelled or backends.get(found[1].backend).missing():
        return None
    path, manifest = found
    sig = Signature.from_json(manifest.signature)
    classes = output_classes(sig)
    if classes is None:
        return None
    progress("probe the preprocessing", 0, 0)
    with verify.opened(backends.get(manifest.backend), path) as worker:
        told = probe(worker.infer, dataset.bind(sig), classes, batch=batch_of(sig) or verify.BATCH)
    return None if told is None else told.message()


def _merged(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One document for several targets, measured one after the other on the same machine: their warnings together."""
    merged = dict(documents[-1])
    machine = [w for d in documents for w in d["machine"].get("warnings") or ()]
    merged["machine"] = {**merged["machine"], "before": documents[0]["machine"].get("before")}
    merged["machine"]["warnings"] = list(dict.fromkeys(machine))
    merged["warnings"] = list(dict.fromkeys(w for d in documents for w in d["warnings"]))
    merged["artifacts"] = [row for d in documents for row in d["artifacts"]]
    merged["verdict"] = {name: v for d in documents for name, v in d["verdict"].items()}
    return merged


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
