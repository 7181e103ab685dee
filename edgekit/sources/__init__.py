"""Where models come from: a file in, a checked float model out.

The format is told by content and must agree with the name. Whatever a converter says, its result is run against the
original and refused if it differs.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from edgekit import model as M
from edgekit.errors import ConversionMismatchError, EdgekitError, ModelFileError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Format = Literal["onnx", "keras", "h5", "savedmodel"]
BOUND = 1e-4  # |difference| / max |original|: float32 rounding through a deep network, no more
CHECK_SAMPLES = 16
_SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".keras": "keras", ".h5": "h5", ".hdf5": "h5"}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A loaded model and how it compares with its file.

    model: float (or already QDQ), opset >= 21, inputs and outputs named and shaped, batch axis "batch" if it is free.
    sha256: of the file; of a folder, of its members' digests.
    record: JSON: opsets, framework versions, max_rel_error, bound, samples, checked_on ("real" or "seeded").
    """

    model: ir.Model
    path: Path
    format: Format
    sha256: str
    record: dict[str, Any]


def load(
    path: Path,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    trust: bool = False,
    data: Dataset | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Source:
    """Read a .keras, .h5, SavedModel folder or .onnx.

    shapes: input name -> full shape for sizes the file leaves open; -1 keeps a size open. trust: let Lambda code run.
    data: real samples to check with; seeded ones otherwise.
    Raises ModelFileError, UnsupportedOpError, ShapeError, ConversionMismatchError, UnsafeModelError, NonFiniteError,
    MissingExtraError.
    """
    from importlib.metadata import version

    from edgekit.sources import onnx as onnx_source

    kind = kind_of(path)
    digest = digest_path(path)
    if kind == "onnx":
        progress("read the ONNX file")
        original = onnx_source.read(path)
        batches: list[M.Tensors] | None = None
        expected: list[M.Tensors] | None = None
        checked_on: str = "seeded"
        versions = {"onnx": version("onnx"), "onnxruntime": M.runtime_version()}
    else:
        from edgekit.sources import keras

        done = keras.convert(path, kind, shapes=shapes or {}, trust=trust, data=data, progress=progress)
        original, batches, expected, versions = done.proto, list(done.inputs), list(done.outputs), done.versions
        checked_on = done.checked_on
        onnx_source.check(original, path)
    upgraded = onnx_source.upgrade(original, dict(shapes or {}), path)
    model = ir.from_proto(upgraded)
    sig = M.signature(model)
    if batches is None:
        progress("check the import against the original")
        batches = list(_real_inputs(sig, data)) if data is not None else []
        checked_on = "real" if batches else "seeded"
        batches = batches or _seeded_inputs(model, sig)
        expected = list(_run_original(original, sig, batches, path))
    assert expected is not None
    error = _largest_difference(model, batches, expected)
    model = ir.from_proto(onnx_source.with_batch_name(upgraded, model))
    record = {
        "opset_from": onnx_source.opset(original),
        "opset_to": M.opset(model),
        "versions": versions,
        "max_rel_error": error,
        "bound": BOUND,
        "samples": sum(len(next(iter(b.values()))) for b in batches),
        "checked_on": checked_on,
    }
    return Source(model, path, kind, digest, record)


def kind_of(path: Path) -> Format:
    """The format of a model file by its name, checked against its first bytes. Raises ModelFileError."""
    if not path.exists():
        raise ModelFileError(f"no model '{path}'", "check the path")
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return "savedmodel"
        raise ModelFileError(f"folder '{path}' is no SavedModel (it has no saved_model.pb)", "pass a model file")
    kind = _SUFFIXES.get(path.suffix.lower())
    if path.suffix.lower() == ".tflite":
        raise ModelFileError(
            f"'{path}' was converted already: it is a runtime's own file",
            "give the model that it was made of; `edgekit inspect`, `bench` and `compare` take the file itself",
        )
    if kind is None:
        known = ", ".join(_SUFFIXES)
        raise ModelFileError(
            f"cannot tell what '{path}' is from its name", f"use one of {known} or a SavedModel folder"
        )
    found = _content(path)
    if found is not None and found != kind:
        raise ModelFileError(f"'{path}' is named {path.suffix} but holds {_NAMES[found]}", "rename it to what it is")
    return kind


_NAMES = {
    "onnx": "an ONNX model",
    "keras": "a zip archive (Keras 3)",
    "h5": "an HDF5 file (Keras 2)",
    "image": "an image",
    "tflite": "a TFLite model",
    "empty": "nothing",
    "lfs": "a Git LFS pointer; run `git lfs pull`",
}


def _content(path: Path) -> str | None:
    """What the first bytes say, or None where they say nothing sure (ONNX has no signature)."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ModelFileError(f"cannot read '{path}': {error.strerror}", "check its permissions") from error
    signs = (
        (b"PK\x03\x04", "keras"),
        (b"\x89HDF\r\n\x1a\n", "h5"),
        (b"\x89PNG", "image"),
        (b"\xff\xd8\xff", "image"),
        (b"version https://git-lfs", "lfs"),
    )
    for sign, kind in signs:
        if head.startswith(sign):
            return kind
    if not head:
        return "empty"
    if head[4:8] == b"TFL3":
        return "tflite"
    # an ONNX file begins with field 1 (ir_version, a varint) of ModelProto, then the producer or the graph
    return "onnx" if head[0] == 0x08 and len(head) > 2 and head[2] in (0x12, 0x3A, 0x42, 0x1A) else None


def keras_tools() -> dict[str, str]:
    """What would read a Keras model: the other interpreter if one is named, else the versions installed here."""
    import os
    from importlib.metadata import PackageNotFoundError, version

    from edgekit.sources.keras import PYTHON_VARIABLE

    if os.environ.get(PYTHON_VARIABLE):
        return {"python": os.environ[PYTHON_VARIABLE]}
    found = {}
    for name in ("tensorflow", "keras", "tf2onnx"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def digest_path(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a folder; of an ONNX file, its external data too."""
    if not path.exists():
        raise ModelFileError(f"no model '{path}'", "check the path")
    total = hashlib.sha256()
    try:
        for member in _members(path):
            total.update(str(member.relative_to(path if path.is_dir() else path.parent)).encode())
            with member.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise ModelFileError(f"cannot read '{path}': {error.strerror}", "check its permissions") from error
    return total.hexdigest()


def _members(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(p for p in path.rglob("*") if p.is_file())
        return
    yield path
    if path.suffix.lower() == ".onnx":
        from edgekit.sources.onnx import external_files

        yield from external_files(path)


def _real_inputs(sig: M.Signature, data: Dataset) -> Iterator[M.Tensors]:
    """The first samples in one batch, and one alone where the batch is free; nothing if a fixed batch is not filled."""
    fixed = M.batch_of(sig)
    part = next(iter(data.bind(sig).take(fixed or CHECK_SAMPLES).batches(fixed or CHECK_SAMPLES)))
    if fixed is None or len(part.index) == fixed:
        yield part.inputs
    if fixed is None and len(part.index) > 1:
        yield {k: v[:1] for k, v in part.inputs.items()}


def _seeded_inputs(model: ir.Model, sig: M.Signature) -> list[M.Tensors]:
    """Two batch sizes where the batch is free."""
    from edgekit.sources.onnx import index_limit

    fixed, high = M.batch_of(sig), index_limit(model)
    return [M.seeded_inputs(sig, size, high=high) for size in ((fixed,) if fixed else (1, 3))]


def _run_original(original: ModelProto, sig: M.Signature, batches: list[M.Tensors], path: Path) -> Iterator[M.Tensors]:
    """The original file's own results in ONNX Runtime, unoptimized, at its own opset."""
    from edgekit.errors import UnsupportedOpError

    try:
        session = M.FloatSession(ir.from_proto(original), optimize=False)
    except Exception as error:
        what = f"'{path.name}': {M.runtime_message(error)}"
        raise UnsupportedOpError(what, "edgekit needs a model that runs") from error
    for inputs in batches:
        try:
            yield session.run(inputs)
        except EdgekitError:
            raise
        except Exception as error:
            raise ShapeError(
                f"'{path.name}' does not run on inputs of its own signature: {M.runtime_message(error)}",
                "fix the size with --shape NAME=...",
            ) from error


def _largest_difference(model: ir.Model, batches: list[M.Tensors], expected: list[M.Tensors]) -> float:
    """Largest |difference| / max |original| over all float outputs; refuses above BOUND and any integer difference."""
    session = M.FloatSession(model, optimize=False)
    worst = 0.0
    for inputs, wanted in zip(batches, expected, strict=True):
        got = session.run(inputs)
        for name, value in wanted.items():
            worst = max(worst, _difference(name, value, got[name]))
    if worst > BOUND:
        raise ConversionMismatchError(
            f"the converted model differs from the original by {worst:.1e} of its largest output (bound {BOUND:.0e})",
            "please report this model",
        )
    return worst


def _difference(name: str, want: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    if want.shape != got.shape:
        raise ConversionMismatchError(
            f"output '{name}' has shape {got.shape}, not {want.shape}", "please report this model"
        )
    if np.issubdtype(want.dtype, np.floating) and np.isnan(want).any():
        raise NonFiniteError(
            f"output '{name}' of the model is NaN on the checked inputs", "check the weights and the data"
        )
    return M.difference(want, got)
