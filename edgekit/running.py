"""Answers inputs with an artifact, here or on a device, as the `run` program of a bundle does there.

Decoding and preprocessing happen here, the model runs in a worker. `deploy/on_device/run.py` holds what both share.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import artifact, backends, transform
from edgekit.bench.client import Worker, local_command, thread_environment
from edgekit.deploy.on_device import run as program
from edgekit.deploy.on_device.answers import lines
from edgekit.deploy.on_device.inputs import Model, RunError, Tensors, read_labels
from edgekit.errors import (
    ArtifactError,
    BundleError,
    DatasetError,
    DeviceError,
    EdgekitError,
    HostError,
    ImageError,
    MissingExtraError,
    NonFiniteError,
    ShapeError,
    UsageError,
    WorkerError,
)
from edgekit.preprocessing import Preprocessing, transforming

if TYPE_CHECKING:
    from edgekit.deploy.ssh import Host

TOP = program.TOP
_ERRORS: Mapping[str, type[EdgekitError]] = {
    "shape": ShapeError,
    "range": NonFiniteError,
    "image": ImageError,
    "pillow": MissingExtraError,
}
_FETCH_S = 60.0  # for a file of some kilobytes from a device
_SSH_FAILED = 255  # ssh's own exit code for a connection that ended; all others are the remote command's


@dataclass(frozen=True)
class Opened:
    """A model ready to answer. why: why this candidate and no other."""

    model: Model
    why: str


def answers(
    build: Path | str,
    target: str | None = None,
    files: Sequence[Path | str] = (),
    *,
    stream: Iterable[bytes] | None = None,
    say: Callable[[str], None] = print,
    remark: Callable[[str], None] = lambda text: None,
    candidate: str | None = None,
    host: Host | None = None,
    name: str | None = None,
    declared: Path | None = None,
    preprocessing: Mapping[str, str] | None = None,
    labels: Path | None = None,
    top: int = TOP,
    threads: int = 1,
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Answer every file, or every line of `stream` as it comes, with the model loaded once.

    build: a build folder, a bundle or a .tflite. files: images, .csv, .npz, .npy, .txt. say: takes a line of an answer;
    remark: a line about it. host: the device where the artifact is deployed, as `name` if not as the model.
    declared, preprocessing: a TOML and options (transform.OPTIONS, as typed) instead of what the artifact declares.
    labels: names of the classes, one a line, or a .json list. out: where the raw outputs of one file go, .npz.
    Raises DatasetError, ImageError, ShapeError, NonFiniteError for a file that cannot be answered; in a stream its line
    says so. ArtifactError, WorkerError, HostError and its kin.
    """
    if (stream is None) == (not files):
        raise UsageError(
            "nothing to answer" if stream is None else "files and a stream", "give --input FILE or --stdin"
        )
    if out is not None and len(files) != 1:
        raise UsageError(f"--out {out}", "it takes the outputs of one file")
    with opened(build, target, candidate=candidate, host=host, name=name, threads=threads) as ready, _told():
        model = ready.model
        how = model.how if declared is None else Preprocessing.from_toml(declared).to_json()
        with transforming():
            model.how = Preprocessing.from_json(transform.merged(how, preprocessing or {})).to_json()
        model.labels = read_labels(str(labels), model) if labels is not None else model.labels
        remark(f"{model.name}: {ready.why}")
        if stream is not None:
            program.answer_stream(stream, model, top, as_json, say)
        for file in files:
            told, outputs = program.document(str(file), model, top)
            if out is not None:
                program.save(str(out), outputs)
            for text in [json.dumps(told, allow_nan=False)] if as_json else lines(told):
                say(text)
            for note in told["notes"]:
                remark(f"note: {note}")


@contextlib.contextmanager
def reached(host: str | None, config: Path | None = None) -> Iterator[Host | None]:
    """The device that ssh calls `host`; None for this machine."""
    if host is None:
        yield None
        return
    from edgekit.deploy.ssh import Host

    with Host(host, config=config) as device:
        yield device


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the shared functions refuse, as the error of its cause."""
    try:
        yield
    except RunError as error:
        remedy = "pip install 'edgekit[images]'" if error.kind == "pillow" else error.remedy
        raise _ERRORS.get(error.kind, DatasetError)(error.what, remedy) from error


@contextlib.contextmanager
def opened(
    build: Path | str,
    target: str | None = None,
    *,
    candidate: str | None = None,
    host: Host | None = None,
    name: str | None = None,
    threads: int = 1,
) -> Iterator[Opened]:
    """The artifact, loaded in a worker for as long as the context lasts."""
    path = Path(build)
    if host is not None:
        if candidate is not None:
            raise UsageError("--candidate with --host", "what is deployed there runs; `edgekit deploy` chooses it")
        found = _deployed(host, path, name)
    elif path.is_file() and path.suffix.lower() == ".tar":
        with _unpacked(path) as folder, opened(folder, target, candidate=candidate, threads=threads) as ready:
            yield ready
        return
    elif path.is_file():
        found = _file(path, threads)
    elif not (path / artifact.MANIFEST).is_file():
        found = _of_build(path, target, candidate, threads)
    elif program.is_bundle(str(path)):
        found = _bundle(path, threads)
    else:
        found = _artifact(path, "the artifact", threads)
    with found.worker as worker:
        worker.load()
        found.model.infer = _inferring(worker)
        yield Opened(found.model, found.why)


@dataclass(frozen=True)
class _Found:
    model: Model
    worker: Worker
    why: str


def _inferring(worker: Worker) -> Callable[[Tensors], Tensors]:
    """A failure of the runtime is one of its input; one of the worker itself ends everything."""

    def infer(feeds: Tensors) -> Tensors:
        try:
            return worker.infer(feeds)
        except WorkerError as error:
            if worker.running:
                raise RunError(error.what, "check the input's values") from error
            raise

    return infer


def _of_build(root: Path, target: str | None, candidate: str | None, threads: int) -> _Found:
    from edgekit.choosing import choose, target_of

    artifact.check_build(root)
    goal = target_of(root, target)
    chosen, why = choose(root, goal, "", candidate)
    return _artifact(root / goal / chosen, why, threads)


def _artifact(folder: Path, why: str, threads: int) -> _Found:
    manifest = artifact.read_manifest(folder)
    backend = backends.get(manifest.backend)
    install = backend.missing()
    if install:
        raise MissingExtraError(f"{manifest.id} needs {manifest.backend}", install)
    if not (manifest.parity or {}).get("ok", True):
        why += "; its manifest calls it wrong: " + "; ".join((manifest.parity or {}).get("reasons", ()))
    model = Model(
        manifest.id,
        program.closed,
        manifest.signature["inputs"],
        manifest.signature["outputs"],
        manifest.preprocessing or {},
        manifest.labels,
        manifest.pixels,
    )
    return _Found(model, _local(backend.RUNNER, folder, model, threads), why)


def _file(path: Path, threads: int) -> _Found:
    """A .tflite of any origin, with what its metadata say."""
    from edgekit import candidates
    from edgekit.sources import tflite

    if not tflite.is_tflite(path):
        raise ArtifactError(f"'{path}' is no build, no bundle and no .tflite", "give one of them")
    read = tflite.read(path)
    entry = candidates.of_file(read, path.name, "file")
    told = candidates.told_preprocessing(read)
    signature = entry.signature.to_json()
    how = {} if told is None else told.to_json()
    labels = candidates.told_labels(read)
    model = Model(path.name, program.closed, signature["inputs"], signature["outputs"], how, labels)
    return _Found(model, _local(entry.runner, path, model, threads), entry.notes[0])


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """A bundle in a .tar as a folder, without the device's wheels, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="edgekit-run-") as folder:
        try:
            with tarfile.open(path) as packed:
                wanted = [m for m in packed.getmembers() if not m.name.startswith("wheels/")]
                packed.extractall(folder, wanted, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise BundleError(f"'{path}' cannot be unpacked: {error}", "make it again") from error
        if not program.is_bundle(folder):
            raise BundleError(f"'{path}' is no bundle", "make one with `edgekit deploy --bundle`")
        yield Path(folder)


def _bundle(folder: Path, threads: int) -> _Found:
    """A bundle's folder, with its own runner."""
    model, entry, _ = program.read_bundle(str(folder))
    return _Found(model, _local(folder / entry["runner"], folder / entry["folder"], model, threads), "what it ships")


def _local(runner: Path, folder: Path, model: Model, threads: int) -> Worker:
    command = local_command(runner, folder, threads, model.batch)
    return Worker(command, model.name, env=thread_environment(threads))


def _deployed(host: Host, build: Path, name: str | None) -> _Found:
    """What is in use on a device, in a worker there."""
    from edgekit.deploy.remote import worker_there

    slot = name or _name_of(build)
    reply = host.call({"cmd": "probe"})
    there = reply["slots"].get(slot) or {}
    if there.get("current") is None or "environment" not in there:
        raise DeviceError(
            f"{host.name}: '{slot}' is not deployed there", f"run `edgekit deploy {build} --host {host.name}` first"
        )
    folder = f"{reply['folder']}/slots/{slot}/{there['current']}"
    manifest = _fetched(host, f"{folder}/{artifact.MANIFEST}")
    with _told():
        model, told = program.shipped(manifest, ())
    model.pixels = _fetched(host, f"{folder}/{told['folder']}/{artifact.MANIFEST}").get("pixels", ())
    threads = int(manifest.get("threads") or 1)
    worker = worker_there(
        host,
        folder,
        f"{there['environment']}/bin/python",
        told,
        f"{manifest['ship']} on {host.name}",
        threads,
        model.batch,
    )
    return _Found(model, worker, f"deployed on {host.name} as '{slot}'")


def _name_of(build: Path) -> str:
    """What a build or a bundle is called on devices."""
    from edgekit.deploy.bundle import name_of
    from edgekit.deploy.bundle_file import is_bundle, open_bundle

    return str(open_bundle(build).manifest["name"]) if is_bundle(build) else name_of(build)


def _fetched(host: Host, path: str) -> dict[str, Any]:
    """A JSON file of a device."""
    from edgekit.deploy.ssh import unreachable

    command = host.command(f"exec cat {shlex.quote(path)}")
    with tempfile.TemporaryFile() as stderr:  # no pipe: the shared connection keeps it open
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, timeout=_FETCH_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise HostError(f"{host.name}: no answer in {_FETCH_S:.0f} s", "check the connection") from None
        stderr.seek(0)
        if done.returncode == _SSH_FAILED:
            raise unreachable(host.name, stderr.read().decode(errors="replace"))
    start = done.stdout.find(b"{")  # a login shell may greet first
    try:
        return dict(json.loads(done.stdout[max(start, 0) :]))
    except ValueError as error:
        raise BundleError(f"{host.name}: cannot read '{path}'", "deploy it again") from error
