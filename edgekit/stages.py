"""The stages of a conversion, each reused from `.cache/` when nothing that decides its content has changed."""

from __future__ import annotations

import functools
import json
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from edgekit import __version__, artifact, backends, fitting, weight_stages
from edgekit import model as M
from edgekit.errors import (
    ArtifactError,
    ConversionMismatchError,
    NonFiniteError,
    ShapeError,
    UsageError,
)
from edgekit.passes.roundings import leave_out
from edgekit.report.progress import Progress
from edgekit.target import STATIC, WEIGHTS, CandidateSpec, Target

if TYPE_CHECKING:
    from edgekit.dataset import Dataset
    from edgekit.passes.plan_file import PlanFile
    from edgekit.passes.quantize import QuantizeInt8
    from edgekit.prune_latency import Stopwatch
    from edgekit.pruning import Request

FOLD_BOUND = 1e-4  # of the largest output: float32 rounding through a deep network; the issue's own bound
FOLD_SAMPLES = 32
VERIFY_SAMPLES, VERIFY_LEAST = 256, 32  # label agreement in steps of 0.4 points, and of 3
VERIFY_MACS = 4 * 10**9  # 256 samples up to 15 M multiply-accumulates each: ResNet8, MobileNetV2 for CIFAR
_ONNX, _RECORD, _SHA256 = "model.onnx", "record.json", "model_sha256"


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
    io: Literal["float32", "int8"] = "float32"
    input_layout: Literal["keep", "NHWC", "NCHW"] = "keep"
    search_time: float | None = None
    max_accuracy_drop: float | None = None
    plan: PlanFile | None = None
    prune: Request | None = None
    channel_multiple: int = 8
    distill_s: float | None = None
    timing: tuple[str, ...] = ()  # backends to time float models in
    warnings: list[str] = field(default_factory=list)
    _quantized: dict[tuple[int, int], tuple[ir.Model, dict[str, Any], str]] = field(default_factory=dict)

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
            "input_layout": self.input_layout,
            "tools": _tools(),
            "keras": sources.keras_tools(),
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
            return self._turned(loaded.model), record

        return self.stage("import", identity, make)

    def _turned(self, model: ir.Model) -> ir.Model:
        from edgekit.passes.input_layout import InputLayout

        return model if self.input_layout == "keep" else InputLayout(self.input_layout)(model, None)

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

    @property
    def known_samples(self) -> Dataset | None:
        """The calibration samples, if they are the user's or made-up ones were asked for."""
        return self.calibration_set if self.dataset is not None or self.random_calibration else None

    @cached_property
    def folded(self) -> tuple[ir.Model, dict[str, Any], str]:
        """(cleaned-up float model, record of its difference from the import, key)."""
        from edgekit.passes.fold import Fold

        model, _, key = self.source
        identity = {"step": "fold", "parent": key, "pass": repr(Fold()), "data": self.data_digest()}

        def make() -> tuple[ir.Model, dict[str, Any]]:
            better = Fold()(model, None)
            return better, {"max_rel_error": self._difference(model, better), "bound": FOLD_BOUND}

        return self.stage("clean up", identity, make)

    @cached_property
    def pruned(self) -> tuple[ir.Model, dict[str, Any], str]:
        """(smaller float model, {"pruning", "told", "calibration" if data were used}, key)."""
        from edgekit import pruning
        from edgekit.passes import prune_plan_file
        from edgekit.passes.prune_channels import PruneChannels
        from edgekit.quantizing import digest

        model, _, parent = self.folded
        asked = self.prune
        if asked is None:
            return self.folded
        step = PruneChannels(multiple=self.channel_multiple, seed=self.seed)
        identity = {
            "step": "prune",
            "parent": parent,
            "asked": asked.to_json(),
            "pass": repr(step),
            "data": self.data_digest(),
            "budget": self.max_accuracy_drop,
            "distill": self.distill_s,
            "timing": list(self.timing) if asked.kind == "latency" else [],
        }

        def make() -> tuple[ir.Model, dict[str, Any]]:
            made, record, plan = pruning.pruned(
                model,
                asked,
                step,
                self.bound,
                self.max_accuracy_drop,
                self._stopwatch,
                self.distill_s,
                self.progress,
            )
            if plan is not None:
                prune_plan_file.write(self.root / prune_plan_file.FILE, plan, digest(model))
            return made, record

        return self.stage("prune", identity, make)

    def quantized(self, weight_bits: int, activation_bits: int = 8) -> tuple[ir.Model, dict[str, Any], str]:
        """(QDQ model, {"plan", "calibration"}, key)."""
        bits = (weight_bits, activation_bits)
        if bits not in self._quantized:
            from edgekit import quantizing
            from edgekit.passes.quantize import QuantizeInt8

            model, _, parent = self.pruned
            step = QuantizeInt8(
                weight_bits=weight_bits,  # type: ignore[arg-type]
                activation_bits=activation_bits,  # type: ignore[arg-type]
                calibration=self.calibration,  # type: ignore[arg-type]
                keep_float=self.keep_float,
                search_time=self.search_time,
                integer_softmax=self.io == "int8",
                seed=self.seed,
            )
            told = self.plan
            if told is not None:
                step = quantizing.overridden(step, told, model)
            identity = {
                "step": "quantize",
                "parent": parent,
                "pass": repr(step),
                "data": self.data_digest(),
                "budget": self._remaining_drop,
                "plan": None
                if told is None or told.plan is None
                else artifact.digest_json(json.loads(told.plan.to_json())),
            }

            def make() -> tuple[ir.Model, dict[str, Any]]:
                return self._quantize(model, step)

            title = f"quantize to int{activation_bits}, {weight_bits}-bit weights"
            self._quantized[bits] = self.stage(title, identity, make)
        return self._quantized[bits]

    def _quantize(self, model: ir.Model, step: QuantizeInt8) -> tuple[ir.Model, dict[str, Any]]:
        from edgekit import quantizing

        if self.plan is not None and self.plan.plan is not None and not self.plan.overrides:
            return quantizing.repeated(model, self.plan.plan)
        samples = quantizing.Samples(self.calibration_set, self.bound.rest(self.samples, self.seed))
        plan, record = quantizing.plan(model, step, samples, self._remaining_drop, self.progress)
        quantizing.write(self.root, plan, model)
        return quantizing.applied(model, plan), {**record, "calibration": self.calibration_record()}

    @property
    def _stopwatch(self) -> Stopwatch | None:
        """Of the first target, whose latency is what was asked for."""
        from edgekit.prune_latency import Stopwatch

        timing = [backends.get(name) for name in self.timing]
        return Stopwatch(timing, self._about, self.seed) if timing else None

    @property
    def _remaining_drop(self) -> float | None:
        """What int8 may lose of the accuracy that may be lost, after pruning."""
        if self.max_accuracy_drop is None or self.prune is None:
            return self.max_accuracy_drop
        lost = self.pruned[1]["pruning"].get("verdict", {}).get("accuracy_drop") or 0.0
        return max(0.0, self.max_accuracy_drop - max(0.0, lost))

    def suits(self, spec: CandidateSpec) -> bool:
        """Whether a candidate is made of this model without being asked for.

        A model of products has most of its weights and most of its arithmetic there: of a CNN with one large dense
        layer only the first is true.
        """
        if spec.for_models == "all":
            return True
        from edgekit.inspection import product_macs
        from edgekit.passes.quantize_weights import product_share

        if product_share(self.folded[0]) <= 0.5:
            return False
        macs = product_macs(self._inspected["layers"])
        return macs is None or macs > 0.5

    @cached_property
    def _inspected(self) -> dict[str, Any]:
        from edgekit.inspection import inspect

        return inspect(self.folded[0], backends_too=False)

    # --- artifacts ---------------------------------------------------------------------------------
    def candidate(self, target: Target, spec: CandidateSpec, weight_bits: int) -> dict[str, Any]:
        """Make, verify and store one artifact, or find it done. Returns its row for the summary."""
        from edgekit import verify

        backend = backends.get(spec.backend)
        if spec.precision in STATIC:
            # no kernel of 16-bit activations saturates
            wide = spec.precision == "int8x16"
            model, record, parent = self.quantized(8, 16) if wide else self.quantized(weight_bits)
            if self.io == "float32":
                model = leave_out(model, backend.unneeded(model))
        elif (step := backend.weight_pass(spec.precision)) is not None:
            model, record, parent = weight_stages.weighed(self, step, backend, spec.precision)
        elif spec.precision in WEIGHTS:
            model, record, parent = weight_stages.begun(self, backend, spec.precision)
        else:
            model, record, parent = self.pruned if spec.variant else self.folded
        identity = artifact.digest_json(
            {
                "step": "lower",
                "parent": parent,
                "candidate": spec.id,
                "target": target.name,
                "runtime": backend.version(),
                "data": self.data_digest(),
                "io": self.io,
                "labels": list(self._about.labels),
                # the encoding is chosen for, and the proof holds on, this kind of CPU
                "machine": platform.machine(),
                "device": None if target.device is None else [target.device.arch, dict(target.device.runtimes)],
                "saturates": backend.saturates(),
                "code": _code(),
            }
        )
        final = self.root / target.name / spec.id
        manifest = _current(final, identity)
        if manifest is None:
            with artifact.staged(self.root, final) as folder:
                self.progress(f"lower {target.name}/{spec.id}", 0, 0)
                about = replace(self._about, machine="" if target.device is None else target.device.arch)
                notes = backend.lower(model, spec.precision, folder, about)
                if target.device is not None:
                    fitting.check(target, backend, folder)
                self.progress(f"verify {target.name}/{spec.id}", 0, 0)
                parity = self._verify(backend, folder, model, spec, target)
                notes += [
                    *verify.notes(backend.NAME, parity),
                    *_left_float(record.get("plan")),
                    *_blamed(record.get("plan")),
                    *record.get("told", ()),
                    *(self.pruned[1].get("told", ()) if spec.variant and record is not self.pruned[1] else ()),
                ]
                manifest = self._manifest(target, spec, identity, parent, record, parity, notes)
                manifest = artifact.write_manifest(folder, manifest)
            status = "made"
        else:
            status = "reused"
        if not (manifest.parity or {}).get("ok", True):
            status = "invalid"
        return {
            "status": status,
            "path": str(final),
            "size_bytes": manifest.size_bytes,
            "parity": manifest.parity,
            "notes": list(manifest.notes),
        }

    @cached_property
    def _about(self) -> backends.About:
        return backends.About(
            name=self.model.stem,
            description=f"{self.model.name}, by edgekit {__version__}",
            labels=self.dataset.classes if self.dataset is not None else (),
            preprocessing=self.dataset.preprocessing if self.dataset is not None else None,
            images=self.bound.pixel_inputs() if self.dataset is not None else (),
            io=self.io,
        )

    def _verify(
        self, backend: backends.Backend, folder: Path, model: ir.Model, spec: CandidateSpec, target: Target
    ) -> dict[str, Any]:
        from edgekit import verify

        data = self.bound.take(self._verify_samples, self.seed)
        original = self.pruned[0] if spec.variant else self.source[0]
        if spec.precision in STATIC:
            return verify.quantized(
                backend,
                folder,
                model,
                data,
                spec.precision,
                original=self.pruned[0],
                exact_device=target.weight_bits == 8,
                machine="" if target.device is None else target.device.arch,
            )
        if backend.weight_pass(spec.precision) is not None:
            return verify.weights(backend, folder, model, original, data, spec.precision)
        return verify.floating(backend, folder, original, data, spec.precision)

    @cached_property
    def _verify_samples(self) -> int:
        """As many as keep the reference's exact arithmetic to a minute: fewer for a model with more to multiply."""
        macs = self._inspected["macs"] or VERIFY_MACS // VERIFY_LEAST
        return max(VERIFY_LEAST, min(VERIFY_SAMPLES, VERIFY_MACS // max(1, macs)))

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
            quantization=record.get("plan") or record.get("weights"),
            pruning=self.pruned[1]["pruning"] if spec.variant else None,
            parity=parity,
            tools={**_tools(), spec.backend: backends.get(spec.backend).version()},
            notes=tuple(notes),
            labels=self.bound.class_names(M.signature(model)) if self.dataset is not None else (),
            pixels=self._about.images,
        )

    def check_names(self) -> None:
        """Import and clean up the model.

        Raises UsageError for a `keep_float` that names no node, ShapeError for inputs of different fixed batches.
        """
        import difflib

        first = {s.name: s.shape[0] for s in M.signature(self.source[0]).inputs if s.shape and not s.dynamic_batch}
        if len(set(first.values())) > 1:
            told = ", ".join(f"'{name}' {size}" for name, size in first.items())
            raise ShapeError(
                f"the first size of each input is its batch, and here they differ: {told}",
                "move the batch to axis 0 of every input, or keep the state inside the model",
            )
        known = [n.name or "" for n in self.folded[0].graph]
        for name in self.keep_float:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else "`edgekit inspect --layers` lists them"
                raise UsageError(f"--keep-float: no node '{name}' in the cleaned-up model", hint)

    def emit_keras(self) -> dict[str, Any]:
        """Write the pruned model as a .keras of standard layers. Raises UnsupportedOpError, MissingExtraError."""
        from edgekit.sources.keras_writer import write_keras

        path = self.root / "pruned.keras"
        data = self.bound.take(32, self.seed) if self.dataset is not None else None

        def told(stage: str) -> None:
            self.progress(stage, 0, 0)

        record = write_keras(self.pruned[0], path, told, data=data, like=self.folded[0])
        return {"path": str(path), **record}

    def retire(self, target: str, candidate: str) -> None:
        """Remove an artifact that this run could not make: what stands there belongs to an earlier one."""
        shutil.rmtree(self.root / target / candidate, ignore_errors=True)

    def retire_others(self) -> None:
        """Remove artifacts of another model from the build: measured beside this one they would be compared with it."""
        for folder in artifact.artifacts(self.root):
            try:
                same = artifact.read_manifest(folder, verify=False).source["sha256"] == self.source[1]["sha256"]
            except ArtifactError:
                same = False
            if not same:
                self.warnings.append(f"removed {folder}: made from another model")
                shutil.rmtree(folder, ignore_errors=True)

    def summary(self) -> dict[str, Any]:
        """What the user should read besides the artifacts."""
        return {"source": self.source[1], "fold": self.folded[1], "warnings": self.warnings}

    # --- parts -------------------------------------------------------------------------------------
    def stage(
        self, title: str, identity: Mapping[str, Any], make: Callable[[], tuple[ir.Model, dict[str, Any]]]
    ) -> tuple[ir.Model, dict[str, Any], str]:
        """Load a stage from the cache or make it; a stage appears under its key only when it is whole."""
        key = artifact.digest_json({**identity, "code": _code()})
        folder = self.root / ".cache" / key
        record = _read_record(folder)
        if record is not None and record.pop(_SHA256, None) == _digest(folder / _ONNX):
            return ir.load(folder / _ONNX), record, key
        self.progress(title, 0, 0)
        model, record = make()
        with artifact.staged(self.root, folder) as staging:
            M.save(model, staging / _ONNX)
            kept = {**record, _SHA256: _digest(staging / _ONNX)}
            (staging / _RECORD).write_text(json.dumps(kept, allow_nan=False), encoding="utf-8")
        return model, record, key

    def _remembered(self, identity: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A stage that is a record and no model."""
        folder = self.root / ".cache" / artifact.digest_json({**identity, "code": _code()})
        record = _read_record(folder)
        if record is None:
            self.progress("probe the preprocessing", 0, 0)
            record = make()
            with artifact.staged(self.root, folder) as staging:
                (staging / _RECORD).write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
        return record

    def data_digest(self) -> str:
        """What the data add to the identity of a stage that reads them."""
        if self.dataset is None:
            return f"random-{self.samples}-{self.seed}" if self.random_calibration else "seeded"
        # of the data as the model takes them: what it does not read does not count, and what it reads does
        return f"{self.bound.digest}-{self.samples}-{self.seed}"

    def calibration_record(self) -> dict[str, Any]:
        """Which samples a stage was fitted on, for a manifest."""
        chosen = self.calibration_set
        return {
            "dataset": chosen.name,
            "digest": self.bound.digest,
            "samples": chosen.samples,
            "seed": self.seed,
            "random": self.random_calibration,
            "sample_ids": chosen.sample_ids(),
        }

    def probe(self) -> None:
        """The probe of the preprocessing, once: a wrong scale ruins everything after it."""
        if self.dataset is None:
            return
        from edgekit.probe import probe_model

        identity = {"step": "probe", "parent": self.source[2], "data": self.data_digest()}
        told = self._remembered(identity, lambda: {"told": probe_model(self.source[0], self.bound)})["told"]
        if told:
            self.warnings.append(told)

    def _difference(self, before: ir.Model, after: ir.Model) -> float:
        """Largest difference of any output relative to the largest value of that output; refuses above FOLD_BOUND."""
        from edgekit import verify

        left, right = M.FloatSession(before, optimize=False), M.FloatSession(after, optimize=False)
        worst = 0.0
        for inputs in verify.batches(self.bound.take(FOLD_SAMPLES, self.seed), before):
            reference, got = left.run(inputs), right.run(inputs)
            for name, value in reference.items():
                if np.issubdtype(value.dtype, np.floating) and np.isnan(value).any():
                    raise NonFiniteError(
                        f"output '{name}' of the float model is NaN on these data", "check the data's scale"
                    )
                worst = max(worst, M.difference(value, got[name]))
        if worst > FOLD_BOUND:
            raise ConversionMismatchError(
                f"cleaning up the graph changed its result by {worst:.1e} (bound {FOLD_BOUND:.0e})",
                "please report this model",
            )
        return worst


def _left_float(plan: Mapping[str, Any] | None) -> list[str]:
    """How much of an int8 artifact is not int8, with the commonest reasons; empty when all of it is."""
    if plan is None or not plan["float_nodes"]:
        return []
    reasons = Counter(plan["float_nodes"].values()).most_common(3)
    told = "; ".join(f"{count}: {reason}" for reason, count in reasons)
    whole = len(plan["float_nodes"]) + len(plan["quantized"])
    return [f"{len(plan['float_nodes'])} of {whole} operators stay float ({told})"]


def _blamed(plan: Mapping[str, Any] | None) -> list[str]:
    """The layers that most of the int8 error comes from."""
    from edgekit.inspection_quantization import worst

    told = worst(plan["blame"]) if plan is not None else ""
    return [told] if told else []


def _current(final: Path, identity: str) -> artifact.Manifest | None:
    """The artifact's manifest if it is whole and has this identity."""
    if not (final / artifact.MANIFEST).is_file():
        return None
    try:
        manifest = artifact.read_manifest(final)
    except ArtifactError:
        return None  # damaged or of an older schema: made anew
    return manifest if manifest.identity == identity else None


def _read_record(folder: Path) -> dict[str, Any] | None:
    """A cached stage's record; None if there is none or it is damaged, so that the stage is made anew."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _digest(path: Path) -> str:
    return artifact.digest_file(path) if path.is_file() else ""


@functools.cache
def _code() -> str:
    """Digest of edgekit's own source: another version of a stage is another stage, released or not."""
    home = Path(__file__).parent
    return artifact.digest_json({str(p.relative_to(home)): artifact.digest_file(p) for p in sorted(home.rglob("*.py"))})


def _tools() -> dict[str, str]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("onnx", "onnx-ir", "numpy")}
    return {"edgekit": __version__, "onnxruntime": M.runtime_version(), **packages}
