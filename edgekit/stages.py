"""The stages of a conversion, each reused from `.cache/` when nothing that decides its content has changed."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import __version__, artifact, backends
from edgekit import model as M
from edgekit.errors import ArtifactError, ConversionMismatchError, NonFiniteError
from edgekit.report.progress import Progress
from edgekit.target import CandidateSpec, Target

if TYPE_CHECKING:
    from edgekit.dataset import Dataset
    from edgekit.passes.plan import QuantizationPlan

FOLD_BOUND = 1e-4  # of the largest output: float32 rounding through a deep network; the issue's own bound
VERIFY_SAMPLES = 256  # label agreement in steps of 0.4 points
_ONNX, _RECORD = "model.onnx", "record.json"


@dataclass
class Conversion:
    """One model on its way to several artifacts; each stage is computed at most once."""

    root: Path
    model: Path
    dataset: Dataset | None
    samples: int
    calibration: str
    keep_float: tuple[str, ...]
    random_calibration: bool
    seed: int
    shapes: Mapping[str, tuple[int, ...]]
    trust: bool
    progress: Progress
    warnings: list[str] = field(default_factory=list)
    _probed: bool = False
    _quantized: dict[int, tuple[ir.Model, dict[str, Any], str]] = field(default_factory=dict)

    # --- stages ------------------------------------------------------------------------------------
    @cached_property
    def source(self) -> tuple[ir.Model, dict[str, Any], str]:
        """(float model as imported, its record, key)."""
        from edgekit import sources

        identity = {
            "step": "source",
            "sha256": sources.digest_path(self.model),
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "trust": self.trust,
            "tools": _tools(),
        }

        def make() -> tuple[ir.Model, dict[str, Any]]:
            loaded = sources.load(
                self.model,
                shapes=self.shapes,
                trust=self.trust,
                data=self.dataset,
                progress=lambda stage: self.progress(stage, 0, 0),
            )
            record = {"file": self.model.name, "format": loaded.format, "sha256": loaded.sha256, **loaded.record}
            return loaded.model, record

        return self._stage("import", identity, make)

    @cached_property
    def bound(self) -> Dataset:
        """The calibration data in the model's own names, types and shapes."""
        sig = M.signature(self.source[0])
        if self.dataset is None:
            from edgekit.dataset import random_dataset

            return random_dataset(sig, self.samples, self.seed)
        return self.dataset.bind(sig)

    @cached_property
    def calibration_set(self) -> Dataset:
        return self.bound.take(self.samples, self.seed)

    @cached_property
    def folded(self) -> tuple[ir.Model, dict[str, Any], str]:
        """(cleaned-up float model, record of its difference from the import, key)."""
        from edgekit.passes.fold import Fold

        model, _, key = self.source
        identity = {"step": "fold", "parent": key, "pass": repr(Fold()), "data": self._data_digest()}

        def make() -> tuple[ir.Model, dict[str, Any]]:
            better = Fold()(model, None)
            return better, {"max_rel_error": self._difference(model, better), "bound": FOLD_BOUND}

        return self._stage("clean up", identity, make)

    def quantized(self, weight_bits: int) -> tuple[ir.Model, dict[str, Any], str]:
        """(QDQ model, {"plan", "calibration"}, key)."""
        if weight_bits not in self._quantized:
            from edgekit.passes.quantize import QuantizeInt8

            model, _, parent = self.folded
            step = QuantizeInt8(
                weight_bits=weight_bits,  # type: ignore[arg-type]
                calibration=self.calibration,  # type: ignore[arg-type]
                keep_float=self.keep_float,
                seed=self.seed,
            )
            identity = {"step": "quantize", "parent": parent, "pass": repr(step), "data": self._data_digest()}

            def make() -> tuple[ir.Model, dict[str, Any]]:
                from edgekit.passes.quantize import apply_plan

                self.progress("calibrate", 0, 0)
                plan: QuantizationPlan = step.plan(model, self.calibration_set)
                return apply_plan(model, plan), {
                    "plan": json.loads(plan.to_json()),
                    "calibration": self._calibration_record(),
                }

            self._quantized[weight_bits] = self._stage(f"quantize to int8, {weight_bits}-bit weights", identity, make)
        return self._quantized[weight_bits]

    # --- artifacts ---------------------------------------------------------------------------------
    def candidate(self, target: Target, spec: CandidateSpec, weight_bits: int) -> dict[str, Any]:
        """Make, verify and store one artifact, or find it done. Returns its row for the summary."""
        from edgekit import verify

        backend = backends.get(spec.backend)
        self._check_values()
        if spec.precision == "int8":
            model, record, parent = self.quantized(weight_bits)
        else:
            model, record, parent = self.folded
        identity = artifact.digest_json(
            {
                "step": "lower",
                "parent": parent,
                "candidate": spec.id,
                "target": target.name,
                "runtime": backend.version(),
                "data": self._data_digest(),
                # the encoding is chosen for, and the proof holds on, this kind of CPU
                "machine": platform.machine(),
                "saturates": backend.saturates(),
                "edgekit": __version__,
            }
        )
        final = self.root / target.name / spec.id
        manifest = _current(final, identity)
        if manifest is None:
            with artifact.staged(self.root, final) as folder:
                self.progress(f"{target.name}: lower {spec.id}", 0, 0)
                notes = backend.lower(model, spec.precision, folder)
                self.progress(f"{target.name}: verify {spec.id}", 0, 0)
                parity = self._verify(backend, folder, model, spec)
                notes = [*notes, *filter(None, [verify.note(backend.NAME, parity)])]
                manifest = self._manifest(target, spec, identity, parent, record, parity, notes)
                manifest = artifact.write_manifest(folder, manifest)
            status = "made"
        else:
            status = "reused"
        return {
            "status": status,
            "path": str(final),
            "size_bytes": manifest.size_bytes,
            "parity": manifest.parity,
            "notes": list(manifest.notes),
        }

    def _verify(self, backend: backends.Backend, folder: Path, model: ir.Model, spec: CandidateSpec) -> dict[str, Any]:
        from edgekit import verify

        data = self.bound.take(VERIFY_SAMPLES, self.seed)
        if spec.precision == "int8":
            return verify.quantized(backend, folder, model, data)
        return verify.floating(backend, folder, self.source[0], data, spec.precision)

    def _manifest(
        self,
        target: Target,
        spec: CandidateSpec,
        identity: str,
        parent: str,
        record: Mapping[str, Any],
        parity: Mapping[str, Any],
        notes: list[str],
    ) -> artifact.Manifest:
        model, source, source_key = self.source
        return artifact.Manifest(
            target=target.name,
            backend=spec.backend,
            precision=spec.precision,
            identity=identity,
            signature=M.signature(model).to_json(),
            source=source,
            parents=(source_key, parent),
            preprocessing=self.dataset.preprocessing.to_json() if self.dataset is not None else None,
            calibration=record.get("calibration"),
            quantization=record.get("plan"),
            parity=parity,
            tools={**_tools(), spec.backend: backends.get(spec.backend).version()},
            notes=tuple(notes),
        )

    def summary(self) -> dict[str, Any]:
        """What the user should read besides the artifacts."""
        return {"source": self.source[1], "fold": self.folded[1], "warnings": self.warnings}

    # --- parts -------------------------------------------------------------------------------------
    def _stage(
        self, title: str, identity: Mapping[str, Any], make: Callable[[], tuple[ir.Model, dict[str, Any]]]
    ) -> tuple[ir.Model, dict[str, Any], str]:
        """Load a stage from the cache or make it; a stage appears under its key only when it is whole."""
        key = artifact.digest_json({**identity, "edgekit": __version__})
        folder = self.root / ".cache" / key
        if (folder / _RECORD).is_file():
            return ir.load(folder / _ONNX), json.loads((folder / _RECORD).read_text(encoding="utf-8")), key
        self.progress(title, 0, 0)
        model, record = make()
        with artifact.staged(self.root, folder) as staging:
            M.save(model, staging / _ONNX)
            (staging / _RECORD).write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
        return model, record, key

    def _remembered(self, identity: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A stage that is a record and no model."""
        folder = self.root / ".cache" / artifact.digest_json({**identity, "edgekit": __version__})
        if not (folder / _RECORD).is_file():
            self.progress("probe the preprocessing", 0, 0)
            record = make()
            with artifact.staged(self.root, folder) as staging:
                (staging / _RECORD).write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
        found: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return found

    def _data_digest(self) -> str:
        if self.dataset is None:
            return f"random-{self.samples}-{self.seed}" if self.random_calibration else "seeded"
        return f"{self.dataset.digest}-{self.samples}-{self.seed}"

    def _calibration_record(self) -> dict[str, Any]:
        chosen = self.calibration_set
        return {
            "dataset": chosen.name,
            "digest": self.bound.digest,
            "samples": chosen.samples,
            "seed": self.seed,
            "random": self.random_calibration,
            "sample_ids": chosen.sample_ids(),
        }

    def _check_values(self) -> None:
        """The probe of the preprocessing, once: a wrong scale ruins everything after it."""
        if self.dataset is None or self._probed:
            return
        self._probed = True
        from edgekit.probe import probe_model

        identity = {"step": "probe", "parent": self.source[2], "data": self._data_digest()}
        told = self._remembered(identity, lambda: {"told": probe_model(self.source[0], self.bound)})["told"]
        if told:
            self.warnings.append(told)

    def _difference(self, before: ir.Model, after: ir.Model) -> float:
        """Largest difference of any output relative to the largest value of that output; refuses above FOLD_BOUND."""
        left, right = M.FloatSession(before, optimize=False), M.FloatSession(after, optimize=False)
        worst = 0.0
        batch = M.batch_of(M.signature(before)) or 8
        for part in self.bound.take(32, self.seed).batches(batch):
            if M.batch_of(M.signature(before)) not in (None, len(part.index)):
                continue
            reference, got = left.run(part.inputs), right.run(part.inputs)
            for name, value in reference.items():
                if not np.issubdtype(value.dtype, np.floating):
                    continue
                if not np.all(np.isfinite(value)):
                    raise NonFiniteError(
                        f"output '{name}' of the float model is NaN or Inf on these data", "check the data's scale"
                    )
                scale = float(np.abs(value).max()) or 1.0
                worst = max(worst, float(np.abs(value - got[name]).max()) / scale)
        if worst > FOLD_BOUND:
            raise ConversionMismatchError(
                f"cleaning up the graph changed its result by {worst:.1e} (bound {FOLD_BOUND:.0e})",
                "please report this model",
            )
        return worst


def _current(final: Path, identity: str) -> artifact.Manifest | None:
    """The artifact's manifest if it is whole and has this identity."""
    if not (final / artifact.MANIFEST).is_file():
        return None
    try:
        manifest = artifact.read_manifest(final)
    except ArtifactError:
        return None  # damaged or of an older schema: made anew
    return manifest if manifest.identity == identity else None


def _tools() -> dict[str, str]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("onnx", "onnx-ir", "numpy")}
    return {"edgekit": __version__, "onnxruntime": M.runtime_version(), **packages}
