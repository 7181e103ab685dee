"""Makes bundles: everything that a device needs to run artifacts of a build. The form is in ADR 0009.

The same build, device and wheels give the same bytes.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit import __version__, artifact, backends, fitting
from edgekit.bench import client, machine
from edgekit.dataset import Dataset
from edgekit.deploy import golden, wheels
from edgekit.deploy.bundle_file import (
    BUNDLE_SCHEMA,
    MANIFEST,
    SIGNATURE,
    Bundle,
    Source,
    digest,
    is_bundle,
    open_bundle,
    part,
    size,
)
from edgekit.deploy.units import units
from edgekit.deploy.wheels import DeviceFacts
from edgekit.errors import ArtifactError, BundleError, DeviceError
from edgekit.report.progress import Progress, silent
from edgekit.target import Target

__all__ = [
    "MANIFEST",
    "PACKAGES",
    "SIGNATURE",
    "TRAVELLING",
    "Bundle",
    "check_fits",
    "is_bundle",
    "make",
    "name_of",
    "open_bundle",
]

PACKAGES = ("numpy", "PIL")  # import names of which a device may have to have its own
ON_DEVICE = Path(__file__).parent / "on_device"
# what travels besides the artifact: name in the bundle -> file
TRAVELLING: Mapping[str, Path] = {
    **{name: ON_DEVICE / name for name in ("agent.py", "answers.py", "inputs.py", "run.py", "selftest.py")},
    "transform.py": ON_DEVICE.parent.parent / "transform.py",
    "worker.py": client.WORKER_FILE,
    "machine.py": Path(machine.__file__),
}
_RUN = """#!/bin/sh
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd -P) || exit 2
[ -f "$here/environment" ] || python3 "$here/agent.py" prepare "$here" >&2 || exit 2
exec "$(cat "$here/environment")/bin/python" "$here/run.py" "$@"
"""


@dataclass
class _Packing:
    """What is put together. entries: of the manifest, by candidate. notes: for the user."""

    sources: dict[str, Source] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    memory_bytes: int = 0


def make(
    root: Path,
    target: Target,
    candidates: Sequence[str],
    device: DeviceFacts,
    *,
    online: bool = False,
    service: bool = False,
    data: str | Path | Dataset | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Bundle:
    """A bundle of artifacts of the build `root`; the first is what `run` runs.

    One that needs more memory than the device has is left out, with a note, where there are others.
    online: without wheels, the device fetches them. service: with systemd user units. data: for the golden inputs.
    Raises ArtifactError, BundleError, WheelError, and DeviceError for a device that cannot run it.
    """
    if not candidates:
        raise BundleError("no candidate was named", "name one at least")
    called = name or name_of(root)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", called):
        raise BundleError(f"'{called}' is no name for a bundle", "letters, digits, '_', '-', '+' and '.'")
    folders = {candidate: root / target.name / candidate for candidate in candidates}
    manifests = {candidate: _read(folder, target) for candidate, folder in folders.items()}
    packing = _Packing()
    for candidate, folder in folders.items():
        progress(f"golden inputs of {candidate}", 0, 0)
        run = golden.make(root, folder, manifests[candidate], target.device, data, seed)
        _pack(packing, folder, manifests[candidate], run, device)
    if not packing.entries:
        raise DeviceError("; ".join(packing.notes), "use int8, or a smaller model")
    packed = [manifests[candidate] for candidate in packing.entries]
    used = list(dict.fromkeys(m.backend for m in packed))
    chosen = wheels.choose(
        used, device, target.device, images=takes_images(packed[0].signature), online=online, progress=progress
    )
    packing.sources.update({f"runners/{n}.py": backends.get(n).RUNNER.read_bytes() for n in used})
    packing.sources.update({file: path.read_bytes() for file, path in TRAVELLING.items()})
    packing.sources["run"] = _RUN.encode()
    if service:
        packing.sources.update({f"service/{file}": text.encode() for file, text in units(called).items()})
    packing.sources.update({_file(wheel): part(wheel.path) for wheel in chosen.wheels})
    cores = device.cores or (target.device.cores if target.device is not None else None)
    manifest = {
        "name": called,
        "target": target.name,
        "threads": cores or 1,
        **_of_model(packed[0]),
        **_of_packing(packing, chosen, device),
        "runtimes": {n: chosen.versions[n] for n in used},
    }
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    return Bundle(text.encode(), packing.sources, notes=(*packing.notes, *chosen.notes), manifest=manifest)


def _read(folder: Path, target: Target) -> artifact.Manifest:
    """An artifact that may be shipped: whole, not proved wrong, and one that the runtime there can open."""
    if not (folder / artifact.MANIFEST).is_file():
        there = sorted(p.name for p in folder.parent.glob("*") if (p / artifact.MANIFEST).is_file())
        among = f" (there are {', '.join(there)})" if there else ""
        raise ArtifactError(f"no artifact '{folder}'{among}", "convert the model first")
    manifest = artifact.read_manifest(folder)
    reasons = (manifest.parity or {}).get("reasons") or ()
    if reasons:
        raise BundleError(f"{manifest.id} was proved wrong when it was made: {'; '.join(reasons)}", "ship another one")
    if target.device is not None:
        fitting.check_runtime(target.device, backends.get(manifest.backend), folder)
    return manifest


def _pack(
    packing: _Packing, folder: Path, manifest: artifact.Manifest, run: golden.Golden, device: DeviceFacts
) -> None:
    """Add an artifact and its golden inputs, or a note why it is left out."""
    have, needed = device.memory_bytes, run.peak_rss_bytes
    if have is not None and needed is not None and needed > have:
        sizes = f"{needed / fitting.MIB:.0f} MB of memory (measured here), the device has {have / fitting.MIB:.0f} MB"
        packing.notes.append(f"{device.host}: {manifest.id} takes {sizes}")
        return
    entry: dict[str, Any] = {
        "backend": manifest.backend,
        "precision": manifest.precision,
        "variant": manifest.variant,
        "folder": f"artifacts/{manifest.id}",
        "runner": f"runners/{manifest.backend}.py",
        "sha256": manifest.sha256,
        "golden": f"golden/{manifest.id}.npz",
        "tolerance": run.tolerance,
    }
    packing.entries[manifest.id] = entry
    packing.memory_bytes = max(packing.memory_bytes, manifest.size_bytes)
    packing.sources[entry["golden"]] = run.npz()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        packing.sources[f"{entry['folder']}/{path.relative_to(folder).as_posix()}"] = part(path)


def _of_model(first: artifact.Manifest) -> dict[str, Any]:
    """The part of the manifest that tells what goes in and comes out."""
    return {
        "inputs": list(first.signature["inputs"]),
        "outputs": list(first.signature["outputs"]),
        "preprocessing": first.preprocessing,
        "labels": list(first.labels),
    }


def _of_packing(packing: _Packing, chosen: wheels.Chosen, device: DeviceFacts) -> dict[str, Any]:
    """The part of the manifest that tells what is inside and what it needs."""
    listed: list[dict[str, Any]] = [
        {
            "file": _file(wheel),
            "name": wheel.name,
            "version": wheel.version,
            "sha256": wheel.sha256,
            "unpacked_bytes": _unpacked(wheel.path),
        }
        for wheel in chosen.wheels
    ]
    files: dict[str, dict[str, Any]] = {
        name: {"sha256": digest(s), "size_bytes": size(s)} for name, s in packing.sources.items()
    }
    stored = sum(f["size_bytes"] for f in files.values())
    return {
        "schema": BUNDLE_SCHEMA,
        "kind": "bundle",
        "edgekit": __version__,
        "ship": next(iter(packing.entries)),
        "candidates": packing.entries,
        "requires": {
            "arch": device.arch,
            "bits": device.bits,
            "python": device.python,
            "glibc": chosen.glibc,
            # at least; what a run takes was measured, which is not the same twice, and was looked at
            "memory_bytes": packing.memory_bytes,
            "disk_bytes": stored + sum(w["unpacked_bytes"] for w in listed),
            "device_packages": dict(chosen.system_packages),
        },
        "wheels": listed,
        "online": list(chosen.requirements),
        "files": files,
    }


def _file(wheel: wheels.Wheel) -> str:
    return f"wheels/{wheel.path.name}"


def _unpacked(wheel: Path) -> int:
    with zipfile.ZipFile(wheel) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def name_of(root: Path | str) -> str:
    """What a build's bundles are called: as the model's file."""
    for folder in artifact.artifacts(Path(root)):
        file = Path(str(artifact.read_manifest(folder, verify=False).source.get("file") or "model")).stem
        return re.sub(r"[^A-Za-z0-9_.+-]+", "-", file).strip("-.+") or "model"
    raise ArtifactError(f"build '{root}' holds no artifact", "run `edgekit convert MODEL` first")


def takes_images(signature: Mapping[str, Any]) -> bool:
    """Whether the only input is of pixels, by its shape: (n, h, w, c) or (n, c, h, w) with 1, 3 or 4 channels."""
    inputs = signature["inputs"]
    shape = inputs[0]["shape"]
    return len(inputs) == 1 and len(shape) == 4 and bool({shape[1], shape[3]} & {1, 3, 4})


def check_fits(manifest: Mapping[str, Any], device: DeviceFacts) -> None:
    """Raise BundleError where a bundle that was made before is for another device."""
    wanted = manifest["requires"]
    remedy = "make a bundle for this device"
    for key, what in (("arch", ""), ("python", "Python ")):
        have = getattr(device, key)
        if wanted[key] != have:
            raise BundleError(f"{device.host}: the bundle is for {what}{wanted[key]}, it has {what}{have}", remedy)
    needed = wanted["glibc"]
    if needed is not None and (device.glibc is None or wheels.numbers(device.glibc) < wheels.numbers(needed)):
        told = f"glibc {device.glibc}" if device.glibc else "another C library"
        raise BundleError(f"{device.host}: the bundle needs glibc {needed}, it has {told}", remedy)
    if wanted["memory_bytes"] and device.memory_bytes and wanted["memory_bytes"] > device.memory_bytes:
        sizes = (
            f"{wanted['memory_bytes'] / fitting.MIB:.0f} MB of memory, it has {device.memory_bytes / fitting.MIB:.0f}"
        )
        raise BundleError(f"{device.host}: the bundle needs {sizes} MB", "use int8, or a smaller model")
    wheels.check_system_packages(device, wanted.get("device_packages") or {})
