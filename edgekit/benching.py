"""Measures builds and published files, and reports what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import artifact, backends
from edgekit.arguments import names, open_data, recorded, thread_counts
from edgekit.errors import ArtifactError, UnknownTargetError, UsageError
from edgekit.report.progress import Progress, silent
from edgekit.target import PRECISIONS, candidate_id, load_target

if TYPE_CHECKING:
    from edgekit.bench.entry import Entry
    from edgekit.bench.host import BenchHost
    from edgekit.dataset import Dataset
    from edgekit.model import Signature
    from edgekit.preprocessing import Preprocessing


FILE_TARGET = "file"
BESIDE = "for comparison, not part of this build"


def bench(
    build: Path | str,
    targets: Sequence[str] = (),
    *,
    beside: Sequence[Path | str] = (),
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
    hosts: Sequence[str] = (),
    ssh_config: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure every artifact of a build side by side and decide what to ship.

    build: the folder, or a .tflite of any origin. beside: .tflite files to measure in the same run, for comparison.
    data: test data; without it latency, size and memory are measured and quality is absent, with the reason.
    samples: judge quality on at most that many; threads: counts or "all", instead of the profile's.
    hosts: machines to measure on instead of this one, all at the same time, as ssh calls them (user@name); ssh_config:
    an ssh configuration instead of the user's. A host that fails is named under "failed" and the others go on; its
    error is raised where all failed.
    Returns the bench document (schema 1) and appends the raw measurements to `build/results.jsonl`.
    """
    from edgekit import candidates
    from edgekit.bench.document import merged
    from edgekit.bench.host import THIS_MACHINE
    from edgekit.bench.run import new_run_id, run_bench

    _check_hosts(hosts, ssh_config, build, beside)
    subject = _subject(Path(build), names(targets), [Path(p) for p in beside], targets_dir, here=not hosts)
    dataset = open_data(data, preprocessing or recorded(data, subject.preprocessing), label_column, labels)
    if dataset is not None:
        _check_labels(dataset, subject.signature)
    elif not subject.manifests:
        candidates.check_sizes(next(iter(subject.entries.values()))[0])
    warnings = _data_warnings(dataset, subject, progress)
    counts, run_id = thread_counts(threads, here=not hosts), new_run_id()

    def measure(
        name: str, host: BenchHost = THIS_MACHINE, progress: Progress = progress, untimed: str | None = None
    ) -> dict[str, Any]:
        return run_bench(
            subject.entries[name],
            dataset,
            threads=counts or _profile_threads(name, targets_dir),
            quick=quick,
            profile=profile,
            max_accuracy_drop=max_accuracy_drop,
            seed=seed,
            progress=progress,
            sample_limit=samples,
            batch=batch,
            results_path=subject.results,
            warnings=warnings,
            run_id=run_id,
            host=host,
            untimed=untimed,
        )

    if not hosts:
        return merged([measure(name, untimed=_why_untimed(name, targets_dir)) for name in subject.entries])
    return _on_hosts(Path(build), subject, names(hosts), ssh_config, targets_dir, measure, progress)


def _on_hosts(
    build: Path,
    subject: _Subject,
    hosts: Sequence[str],
    ssh_config: Path | None,
    targets_dir: Path | None,
    measure: Callable[[str, BenchHost, Progress], dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    """The document of every host's targets: those that are for machines of its kind, where any is."""
    from edgekit.bench.document import merged
    from edgekit.bench.several import each
    from edgekit.deploy import remote

    goals = {name: load_target(name, targets_dir) for name in subject.entries}

    def one(host: str, tell: Progress) -> list[dict[str, Any]]:
        with remote.site(host, ssh_config, build) as place:
            fitting = [name for name, goal in goals.items() if place.is_for(goal)] or list(goals)
            found = []
            for name in fitting:
                there = place.prepared(goals[name], subject.entries[name], tell)
                found.append(measure(name, there, tell))
        return found

    done, failed = each(hosts, one, progress)
    document = merged([document for found in done.values() for document in found])
    errors = [{"host": host, "error": str(e), "exit_code": e.exit_code} for host, e in failed.items()]
    return {**document, "failed": errors}


def _why_untimed(target: str, targets_dir: Path | None) -> str | None:
    from edgekit import candidates

    why = candidates.elsewhere(target, targets_dir)
    return None if why is None else f"{why}; give --host user@device"


def _check_hosts(
    hosts: Sequence[str], ssh_config: Path | None, build: Path | str, beside: Sequence[Path | str]
) -> None:
    """What does not go together, before anything slow."""
    if ssh_config is not None and not hosts:
        raise UsageError("--ssh-config is for --host", "name a device with --host, or leave it out")
    if hosts and not Path(build).is_dir():
        raise UsageError(f"--host measures builds, '{build}' is none", "run `edgekit convert MODEL -t TARGET` first")
    if hosts and beside:
        raise UsageError("--with measures on this machine, --host elsewhere", "leave one of them out")


@dataclass(frozen=True)
class _Subject:
    """What is measured. entries: by target. preprocessing: recorded by what is measured. results: file to append to."""

    entries: Mapping[str, list[Entry]]
    signature: Signature
    manifests: Mapping[Path, artifact.Manifest]
    preprocessing: Preprocessing | None
    results: Path | None


def _subject(
    build: Path, targets: Sequence[str], beside: Sequence[Path], targets_dir: Path | None, *, here: bool
) -> _Subject:
    """Everything that can be wrong with what is to be measured shows here. here: it runs on this machine."""
    from edgekit import candidates
    from edgekit.bench.results import RESULTS_FILE
    from edgekit.model import Signature
    from edgekit.preprocessing import Preprocessing
    from edgekit.sources import tflite

    for path in beside:
        if not tflite.is_tflite(path):
            raise UsageError(f"--with {path}", "give a .tflite file")
    if tflite.is_tflite(build) and not build.is_dir():
        if targets:
            raise UsageError(f"'{build}' is a file, it has no target '{targets[0]}'", "leave --target out")
        models = [tflite.read(p) for p in (build, *beside)]
        called = candidates.labels([m.path for m in models])
        files = [candidates.of_file(m, n, FILE_TARGET) for m, n in zip(models, called, strict=True)]
        wanted = files[0].signature
        files = [files[0], *(candidates.fitted(e, wanted) for e in files[1:])]
        return _Subject({FILE_TARGET: files}, wanted, {}, candidates.told_preprocessing(models[0]), None)
    root = artifact.check_build(build)
    manifests = _manifests(root, targets)
    first = next(iter(manifests.values()))
    wanted = Signature.from_json(first.signature)
    models = [tflite.read(p) for p in beside]
    called = candidates.labels([m.path for m in models])
    entries = {}
    for name in dict.fromkeys(m.target for m in manifests.values()):
        of_target = [(path, m) for path, m in manifests.items() if m.target == name]
        own = [candidates.of_artifact(path, m, here=here, targets_dir=targets_dir) for path, m in of_target]
        files = [candidates.of_file(m, label, name, BESIDE) for m, label in zip(models, called, strict=True)]
        entries[name] = [*own, *(candidates.fitted(e, wanted) for e in files)]
    told = None if first.preprocessing is None else Preprocessing.from_json(first.preprocessing)
    return _Subject(entries, wanted, manifests, told, root / RESULTS_FILE)


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
    """The bench document of the newest measurements of each target on each host in `results.jsonl`."""
    from edgekit.bench.document import document, merged
    from edgekit.bench.results import RESULTS_FILE, latest, read

    path = root / RESULTS_FILE
    if not path.is_file():
        raise ArtifactError(f"nothing was measured in '{root}' yet", f"run `edgekit bench {root}`")
    notes: list[str] = []
    measured = read(path, notes.append)
    newest = latest(measured)
    groups = dict.fromkeys((m.target, m.host) for m in newest)
    whole = merged([document([m for m in newest if (m.target, m.host) == group]) for group in groups])
    rows = [{**row, "blame": _blame(root, row)} for row in whole["artifacts"]]
    return {**whole, "artifacts": rows, "warnings": [*whole["warnings"], *notes, *_outdated(root, whole)]}


def ship_of(root: Path, target: str, host: str | None) -> tuple[str, str] | None:
    """(candidate id, why) of the newest verdict on `target`: on that host, else on the others, the newest first.

    None where nothing was measured yet, or no verdict names one.
    """
    from edgekit.bench.document import document
    from edgekit.bench.results import RESULTS_FILE, latest, read

    if not (root / RESULTS_FILE).is_file():
        return None
    newest = [m for m in latest(read(root / RESULTS_FILE)) if m.target == target]
    order = sorted({m.host: m.taken for m in newest}.items(), key=lambda one: one[1], reverse=True)
    for name, _ in sorted(order, key=lambda one: one[0] != host):
        (found,) = document([m for m in newest if m.host == name])["verdict"].values()
        if found["ship"] is not None:
            return found["ship"], f"the best measured on {name or 'this machine'}"
    return None


def _blame(root: Path, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The damage of each layer of an int8 artifact, from its manifest; None where there is none, or another one."""
    folder = _folder(root, row)
    if row.get("label") or not (folder / artifact.MANIFEST).is_file():
        return None
    manifest = artifact.read_manifest(folder, verify=False)
    if manifest.sha256 != row["sha256"]:
        return None
    return list((manifest.quantization or {}).get("blame") or ()) or None


def _folder(root: Path, row: Mapping[str, Any]) -> Path:
    return root / str(row["target"]) / candidate_id(row["backend"], row["precision"], row.get("variant") or "")


def _outdated(root: Path, document: Mapping[str, Any]) -> list[str]:
    """Which measured artifacts and files are no longer what stands there."""
    now = {path: artifact.read_manifest(path, verify=False).sha256 for path in artifact.artifacts(root)}
    stale = set()
    for row in document["artifacts"]:
        if row.get("label"):
            file = Path(row["path"])
            if not file.is_file() or artifact.digest_file(file) != row["sha256"]:
                stale.add(row["label"])
            continue
        where = _folder(root, row)
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
    ranked = sorted(
        found.items(), key=lambda p: (p[1].target, PRECISIONS.index(p[1].precision), p[1].variant, order[p[1].backend])
    )
    return {path: m for path, m in ranked if not targets or m.target in targets}


def _profile_threads(name: str, targets_dir: Path | None) -> tuple[int | Any, ...]:
    """The profile's thread counts; a target whose profile is gone is measured with the default ones."""
    try:
        return load_target(name, targets_dir).threads
    except UnknownTargetError:
        return (1, "all")


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


def _data_warnings(dataset: Dataset | None, subject: _Subject, progress: Progress) -> list[str]:
    """What a reader must know of the data before trusting a figure."""
    out = []
    calibration = next((m.calibration for m in subject.manifests.values() if m.calibration), None)
    if calibration and calibration["random"]:
        out.append("int8 was calibrated on random inputs: its accuracy says little about real calibration data")
    if dataset is None:
        return out
    progress("compare calibration and test data", 0, 0)
    if calibration:
        shared = len(set(calibration["sample_ids"]) & set(dataset.bind(subject.signature).sample_ids()))
        if shared:
            out.append(f"{shared} of the {dataset.samples} test samples were also used for calibration")
    told = subject.preprocessing
    if told is not None and told.to_json() != dataset.preprocessing.to_json():
        than = "the calibration data" if subject.manifests else f"the file's metadata say ({told.describe()})"
        joint = "from" if subject.manifests else "than"
        out.append(f"the test data are prepared differently ({dataset.preprocessing.describe()}) {joint} {than}")
    better = _probe(dataset, subject.manifests, progress)
    return [*out, better] if better else out


def _probe(dataset: Dataset, manifests: Mapping[Path, artifact.Manifest], progress: Progress) -> str | None:
    """Whether a simple change of the preprocessing raises the float artifact's accuracy strongly, and which."""
    from edgekit import verify
    from edgekit.binding import output_classes
    from edgekit.model import Signature, batch_of
    from edgekit.probe import probe

    found = next(((p, m) for p, m in manifests.items() if m.precision == "float32" and not m.variant), None)
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
