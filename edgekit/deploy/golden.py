"""Golden inputs: what an artifact answers on this host, for a device to repeat before anything is trusted there."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import artifact, backends, verify
from edgekit import model as M
from edgekit.arguments import open_data, recorded
from edgekit.backends import Backend
from edgekit.dataset import Dataset
from edgekit.errors import BundleError, EdgekitError
from edgekit.preprocessing import Preprocessing
from edgekit.target import DeviceSpec

SAMPLES = 4  # enough to tell a wrong kernel, few enough for the slowest device
Tolerance = dict[str, Any]
# of each output's largest magnitude. Float sums in another order: 6e-6 measured between x86, arm64 and armv7
FLOAT_TOLERANCE = verify.FLOAT_BOUND["float32"]
# int8 sums that are the same, with float arithmetic behind them: 5e-7 measured between x86 and arm64
TAIL_TOLERANCE = 1e-5
# Where sums near a half may round the other way, as many times what such flips do to the artifact against its reference
# (parity's end_to_end_max_abs), and no less than: 4 % where parity says 3.5 % (tflite-runtime 2.14 on armv7, ResNet8),
# 0.8 % where it says nothing
FLIPS, LEAST_FLIPS = 3.0, 0.02


@dataclass(frozen=True)
class Golden:
    """inputs, outputs: (n, ...) by tensor name, as the artifact takes and gives them. tolerance: see `tolerance`.

    peak_rss_bytes: of the process that ran it here, runtime included; None where the system does not tell.
    """

    inputs: M.Tensors
    outputs: M.Tensors
    tolerance: Tolerance
    peak_rss_bytes: int | None

    def npz(self) -> bytes:
        """ "in.NAME" and "out.NAME" arrays, the same bytes for the same arrays."""
        arrays = {f"in.{k}": v for k, v in self.inputs.items()} | {f"out.{k}": v for k, v in self.outputs.items()}
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for name, value in sorted(arrays.items()):
                stored = io.BytesIO()
                np.lib.format.write_array(stored, np.ascontiguousarray(value), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), stored.getvalue())  # which dates it 1980
        return packed.getvalue()


def make(
    root: Path,
    folder: Path,
    manifest: artifact.Manifest,
    device: DeviceSpec | None,
    data: str | Path | Dataset | None = None,
    seed: int = 0,
) -> Golden:
    """Run the artifact in `folder`, of the build `root`, on a few samples.

    data: where they are taken from; None: made up in the ranges that calibration found in this build. Raises
    BundleError where this machine cannot compute what the device will.
    """
    backend = backends.get(manifest.backend)
    install = backend.missing()
    if install:
        raise BundleError(
            f"{manifest.id} cannot be run here, to test the device by: it needs {manifest.backend}", install
        )
    inputs = _inputs(root, manifest, data, seed)
    with verify.opened(backend, folder, environment=_environment(backend, manifest)) as worker:
        outputs = worker.infer(inputs)
        peak = worker.peak_rss_bytes()
    for name, value in outputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise BundleError(f"{manifest.id}: output '{name}' is NaN or Inf on the golden inputs", "give --data")
    return Golden(inputs, outputs, tolerance(backend, folder, manifest, outputs, device), peak)


def _environment(backend: Backend, manifest: artifact.Manifest) -> Mapping[str, str]:
    """Exact arithmetic where this CPU's kernels saturate and the device's do not."""
    exact_there = manifest.precision == "int8" and (manifest.parity or {}).get("saturates") is False
    if not exact_there or not backend.saturates():
        return {}
    if backend.EXACT is None:
        raise BundleError(
            f"{manifest.id}: this CPU's int8 kernels saturate, the device's do not",
            "make the bundle on a CPU with VNNI",
        )
    return backend.EXACT


# --- inputs ----------------------------------------------------------------------------------------
def _inputs(root: Path, manifest: artifact.Manifest, data: str | Path | Dataset | None, seed: int) -> M.Tensors:
    signature = M.Signature.from_json(manifest.signature)
    fixed = M.batch_of(signature)
    told = None if manifest.preprocessing is None else Preprocessing.from_json(manifest.preprocessing)
    dataset = open_data(data, recorded(data, told), None, None)
    if dataset is None:
        return _seeded(root, signature, told, fixed or SAMPLES, seed)
    part = next(dataset.bind(signature).take(fixed or SAMPLES, seed).batches(fixed or SAMPLES)).inputs
    if fixed is None:
        return part
    repeated = np.arange(fixed) % len(next(iter(part.values())))
    return {name: value[repeated] for name, value in part.items()}


def _seeded(root: Path, signature: M.Signature, how: Preprocessing | None, batch: int, seed: int) -> M.Tensors:
    """Uniform in each input's calibrated range; else 8-bit values as they are preprocessed, else [0, 1)."""
    found = M.seeded_inputs(signature, batch, seed)
    ranges = _ranges(root)
    for name, value in found.items():
        if value.dtype.kind != "f":
            continue
        if name in ranges:
            low, high = ranges[name]
            found[name] = (value * (high - low) + low).astype(value.dtype)
        elif how is not None and how.numeric:
            try:
                found[name] = how.values(np.floor(value * 256)).astype(value.dtype)
            except EdgekitError:  # a mean per channel, of an input that has others
                continue
    return found


def _ranges(root: Path) -> dict[str, tuple[float, float]]:
    """Tensor -> (low, high), of the build's calibrated artifacts."""
    found: dict[str, tuple[float, float]] = {}
    for folder in artifact.artifacts(root):
        told = artifact.read_manifest(folder, verify=False).quantization or {}
        for name, entry in (told.get("activations") or {}).items():
            if isinstance(entry, Mapping) and "low" in entry and "high" in entry:
                found.setdefault(name, (float(entry["low"]), float(entry["high"])))
    return found


# --- how near an answer must be --------------------------------------------------------------------
def tolerance(
    backend: Backend,
    folder: Path,
    manifest: artifact.Manifest,
    outputs: M.Tensors,
    device: DeviceSpec | None,
) -> Tolerance:
    """{"kind": "exact"}, or {"kind": "relative", "value"} of each output's largest magnitude."""
    parity = manifest.parity or {}
    if parity.get("kind") not in ("int8", "int8x16") and "saturates" not in parity:  # float, or float on stored weights
        return {"kind": "relative", "value": FLOAT_TOLERANCE}
    own_kernels = device is None or device.runtime(manifest.backend) is None
    repeats = backend.repeats(folder) if manifest.precision == "int8" and own_kernels else "flips"
    if repeats == "bits":
        return {"kind": "exact"}
    if repeats == "sums":
        return {"kind": "relative", "value": TAIL_TOLERANCE}
    largest = max((float(np.abs(v).max(initial=0)) for v in outputs.values() if v.dtype.kind == "f"), default=0.0)
    flipped = parity.get("end_to_end_max_abs") or 0.0
    return {"kind": "relative", "value": max(LEAST_FLIPS, FLIPS * flipped / largest if largest else 0.0)}
