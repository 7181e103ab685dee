"""The quantize stage: a step and its overrides into a plan, its record, and the plan's file in the build."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import ArtifactError, UnsupportedOpError
from edgekit.passes import plan_file
from edgekit.passes.apply_plan import apply_plan
from edgekit.passes.plan import QuantizationPlan
from edgekit.passes.plan_file import PlanFile
from edgekit.passes.quantize import REQUESTED, QuantizeInt8, as_planned
from edgekit.report.progress import Progress

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

SENSIBLE = 64  # samples: with fewer, ranges miss what comes (benchmarks/calibration_samples.py)
PROTECTED = "protected"  # how the reason of a layer begins that a budget keeps in float

applied = apply_plan


@dataclass(frozen=True)
class Samples:
    """calibration: what ranges and weights are fitted on. rest: others of the same data, perhaps none."""

    calibration: Dataset
    rest: Dataset


def plan(
    model: ir.Model, step: QuantizeInt8, samples: Samples, budget: float | None, progress: Progress
) -> tuple[QuantizationPlan, dict[str, Any]]:
    """The plan and its record for a manifest. budget: what may be lost, see `passes.protect`; None: whatever is."""
    from edgekit.backends.encoding import with_uint8_activations
    from edgekit.passes.blame import blame
    from edgekit.passes.protect import protect

    told: dict[str, Any] = {"budget": None}
    notes = []
    if budget is None or step.scheme == "fpga":
        chosen = step.plan(model, samples.calibration, progress)
        if budget is not None:
            notes.append(
                "an FPGA keeps no layer in float for a budget's sake: give the layers that lose most more bits"
            )
    else:
        chosen, kept = protect(step, model, samples.calibration, samples.rest, budget, progress, with_uint8_activations)
        told, notes = {"budget": kept.to_json()}, [kept.words()]
    notes += _without_effect(step, chosen)
    if samples.calibration.samples < SENSIBLE:
        count = samples.calibration.samples
        notes.append(f"calibrated on {count} sample{'s' * (count != 1)} only: give {SENSIBLE} or more, better 256")
    found = blame(model, chosen, samples.calibration, progress)
    return chosen, {"plan": {**chosen.record(), "blame": [row.to_json() for row in found], **told}, "told": notes}


def _without_effect(step: QuantizeInt8, chosen: QuantizationPlan) -> list[str]:
    """Overridden tensors that got no such range: they are not quantized, or the scheme fixes their scale."""
    idle = [n for n, _ in step.tensors if n not in chosen.activations or chosen.activations[n].method == "fixed"]
    told = ", ".join(f"'{n}'" for n in idle[:4]) + (f" and {len(idle) - 4} more" if len(idle) > 4 else "")
    return [f"overrides without effect, on tensors that get no range of their own: {told}"] if idle else []


def repeated(model: ir.Model, given: QuantizationPlan) -> tuple[ir.Model, dict[str, Any]]:
    """What a plan from a file makes, without data."""
    record = {"plan": {**given.record(), "blame": [], "budget": None}, "told": ["quantized by a plan that was given"]}
    return apply_plan(model, given), record


def write(root: Path, chosen: QuantizationPlan, model: ir.Model) -> Path:
    """The plan's file in a build: plan.toml, named after its scheme if that is not LiteRT's and its bits if not 8."""
    bits = (chosen.weight_bits, chosen.activation_bits)
    scheme = "" if chosen.scheme == "litert" else f"-{chosen.scheme}"
    path = root / (f"plan{scheme}.toml" if bits == (8, 8) else f"plan{scheme}-w{bits[0]}a{bits[1]}.toml")
    plan_file.write(path, chosen, digest(model), {n.name or "": n.op_type for n in model.graph})
    return path


def digest(model: ir.Model) -> str:
    """Of the cleaned-up float model: what a plan is for."""
    return hashlib.sha256(M.to_bytes(model)).hexdigest()


def overridden(step: QuantizeInt8, told: PlanFile, model: ir.Model) -> QuantizeInt8:
    """The step with a plan's methods and changes. Raises ArtifactError for another model's plan, UsageError."""
    if told.model_sha256 is not None and told.model_sha256 != digest(model):
        raise ArtifactError(
            "the plan is for another model, or for another clean-up of this one",
            "plan it again, or pass a file that has the [override] tables only",
        )
    given = [s.name for s in M.signature(model).inputs]
    layers = plan_file.match(told.overrides.layers, [*(n.name or "" for n in model.graph), *given], "layer")
    values = [v.name or "" for n in model.graph for v in n.outputs] + given
    tensors = plan_file.match(told.overrides.tensors, values, "tensor")
    kept = [n for n, how in layers.items() if how == "float"]
    if told.plan is not None:
        if told.plan.scheme != step.scheme:
            raise UnsupportedOpError(
                f"the plan is of the scheme '{told.plan.scheme}', not '{step.scheme}'", "give it to a target of its own"
            )
        bits = (told.plan.weight_bits, told.plan.activation_bits)
        if bits != (step.weight_bits, step.activation_bits):
            raise UnsupportedOpError(
                f"the plan is for {bits[0]}-bit weights and {bits[1]}-bit activations",
                f"pass --weight-bits {bits[0]}, or another plan",
            )
        step = as_planned(step, told.plan)
        before = [n for n, why in told.plan.float_nodes.items() if why.startswith((PROTECTED, REQUESTED))]
        kept += [n for n in before if layers.get(n) != "int8"]
    bits_of = {
        **dict(step.layer_bits),
        **{n: w for n, how in layers.items() if (w := plan_file.widths(how)) is not None},
    }
    ranges = [(n, c["method"] if "method" in c else (float(c["low"]), float(c["high"]))) for n, c in tensors.items()]
    kept = list(dict.fromkeys((*step.keep_float, *kept)))
    return replace(step, keep_float=tuple(kept), tensors=tuple(ranges), layer_bits=tuple(bits_of.items()))
