"""Turns what users name, artifact folders and .tflite files, into entries to measure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekit import artifact, backends
from edgekit.bench.entry import Entry, fit
from edgekit.errors import ShapeError, UnknownTargetError
from edgekit.model import Signature
from edgekit.target import load_target

if TYPE_CHECKING:
    from edgekit.preprocessing import Preprocessing
    from edgekit.sources.tflite import Model

# what a worker's wire carries
_MEASURABLE = frozenset(
    ["bool", "float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))]
)
_EXACTLY = "judged with exact arithmetic: this CPU's int8 kernels saturate, the target's do not"
FILE_BACKEND = "tflite"  # whose runner opens published files


def of_artifact(
    path: Path, manifest: artifact.Manifest, *, here: bool = True, targets_dir: Path | None = None
) -> Entry:
    """An artifact of a build. here: it is to run on this machine, which must be able to."""
    backend = backends.get(manifest.backend)
    parity = None if manifest.parity is None else dict(manifest.parity)
    problems = tuple((parity or {}).get("reasons", ()))
    install = backend.missing() if here else None
    if install:
        problems = (*problems, f"not run: needs {manifest.backend}: {install}")
    saturated = here and not install and _proved_elsewhere(manifest) and backend.saturates()
    exact = backend.EXACT if saturated and elsewhere(manifest.target, targets_dir) is not None else None
    if saturated and exact is None:
        problems = (
            *problems,
            "made for CPUs whose int8 kernels do not saturate, as this one's do: convert it for this CPU",
        )
    return Entry(
        target=manifest.target,
        backend=manifest.backend,
        precision=manifest.precision,
        variant=manifest.variant,
        pruning=_claims(manifest.pruning),
        path=path,
        runner=backend.RUNNER,
        sha256=manifest.sha256,
        size_bytes=manifest.size_bytes,
        signature=Signature.from_json(manifest.signature),
        parity=parity,
        problems=problems,
        notes=(*manifest.notes, *((_EXACTLY,) if exact else ())),
        environment=exact or {},
    )


def _claims(pruning: Mapping[str, Any] | None) -> dict[str, float] | None:
    if pruning is None:
        return None
    return {key: float(pruning[key]) for key in ("macs_kept", "parameters_kept") if pruning.get(key) is not None}


def _proved_elsewhere(manifest: artifact.Manifest) -> bool:
    """An int8 artifact with full-range weights whose proof holds where u8×s8 products are exact."""
    bits = (manifest.quantization or {}).get("weight_bits")
    return bits == 8 and (manifest.parity or {}).get("saturates") is False


def of_file(model: Model, label: str, target: str, role: str = "") -> Entry:
    """A .tflite of any origin, as it is. role: what it is measured for, if that needs saying."""
    from edgekit.inspection_precision import numbers
    from edgekit.sources.tflite import signature

    told, sig = numbers(model), signature(model)
    for spec in (*sig.inputs, *sig.outputs):
        if spec.dtype not in _MEASURABLE:
            raise ShapeError(f"'{model.path}': tensor '{spec.name}' is {spec.dtype}", "only numbers can be measured")
    return Entry(
        target=target,
        backend=FILE_BACKEND,
        precision=told.id,
        path=model.path,
        runner=backends.get(FILE_BACKEND).RUNNER,
        sha256=artifact.digest_file(model.path),
        size_bytes=model.size_bytes,
        signature=sig,
        notes=(f"{role}: {told.words}" if role else told.words,),
        label=label,
    )


def fitted(entry: Entry, wanted: Signature) -> Entry:
    """The same entry, fed and read as a model of signature `wanted`. Raises ShapeError if it cannot be."""
    from dataclasses import replace

    how = fit(entry.signature, wanted, entry.label or str(entry.path))
    return replace(entry, signature=wanted, fit=how)


def elsewhere(target: str, targets_dir: Path | None = None) -> str | None:
    """Why a time measured on this machine is none of the target's; None where it is one."""
    from edgekit.bench import machine

    try:
        device = load_target(target, targets_dir).device
    except UnknownTargetError:  # its profile is gone
        return None
    here = machine.architecture()
    if device is None or device.arch == here:
        return None
    return f"this machine is {here}, the target is {device.arch}"


def check_sizes(entry: Entry) -> None:
    """Raise ShapeError if inputs cannot be made up because a size other than the batch is open."""
    for spec in entry.signature.inputs:
        open_axes = [axis for axis, size in enumerate(spec.shape) if axis and isinstance(size, str)]
        if open_axes:
            what = f"size {open_axes[0]} of input '{spec.name}' of '{entry.path}' is open"
            raise ShapeError(what, "pass --data, whose samples have one")


def labels(paths: list[Path]) -> list[str]:
    """A short name of each file, no two alike: its name, or its path where several have that name."""
    return [p.name if [q.name for q in paths].count(p.name) == 1 else str(p) for p in paths]


def told_labels(model: Model) -> list[str]:
    """The names of the classes that a file brings along, one a line in the file that its metadata name; else none."""
    import io
    import zipfile

    from edgekit.backends.tflite.metadata import read_metadata

    told = read_metadata(cast(bytes, model.content))
    name = next((o.labels_file for o in told.outputs if o.labels_file), None) if told is not None else None
    if name is None:
        return []
    try:
        with zipfile.ZipFile(io.BytesIO(cast(bytes, model.content))) as packed:
            return packed.read(name).decode("utf-8").splitlines()
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError):
        return []


def told_preprocessing(model: Model) -> Preprocessing | None:
    """The normalization that a file's metadata declare for its only input, if it changes anything."""
    from edgekit.backends.tflite.metadata import read_metadata
    from edgekit.preprocessing import Preprocessing

    told = read_metadata(cast(bytes, model.content))  # a map is sliced like bytes
    if told is None or len(told.inputs) != 1:
        return None
    mean, std = told.inputs[0].mean, told.inputs[0].std
    if not mean or not std or (set(mean) == {0.0} and set(std) == {1.0}):
        return None
    return Preprocessing(mean=mean, std=std)
