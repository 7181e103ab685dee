"""The quantize-weights stage: of the model as it is, equalized or smoothed, whichever leaves the smaller error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import Pass, judge
from edgekit.passes import fold_graph as G
from edgekit.passes.apply_plan import prepared
from edgekit.passes.calibrate import held_back
from edgekit.passes.equalize import Equalize
from edgekit.passes.quantize_weights import QuantizeWeights
from edgekit.passes.smooth import Smooth

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Told = dict[str, dict[str, Any]]

PLAIN, EQUALIZED, SMOOTHED = "as it is", "equalized", "smoothed"


def starts(*, rounds: bool, data: bool) -> dict[str, Pass]:
    """What may be done to a model before its weights are quantized, by name.

    rounds: whether activations are rounded as they come, with one range for a tensor: then what makes activations
    rounder counts as well. data: whether there are calibration data.
    """
    out: dict[str, Pass] = {EQUALIZED: Equalize(absorb=rounds)}
    if rounds and data:
        out[SMOOTHED] = Smooth()
    return out


@dataclass(frozen=True)
class Tried:
    """One way: the float model that it begins with, that with quantized weights, what was done to each weight."""

    start: ir.Model
    quantized: ir.Model
    layers: Told


def chosen(
    model: ir.Model,
    plain: Tried,
    step: QuantizeWeights,
    ways: Mapping[str, Pass],
    data: Dataset | None,
    samples: Dataset,
    *,
    rounds: bool,
) -> tuple[Tried, dict[str, Any]]:
    """(the best, its record: which it is and what each leaves).

    plain: of `model` as it is. ways: what else to begin with. data: the user's. samples: to judge on, those or made up
    ones; where weights are fitted to them, those that they are not fitted to.
    """
    made = {PLAIN: plain}
    for name, way in ways.items():
        start = _begun(model, way, data)
        if start is not None:
            made[name] = tried(start, step, data)
    best, figures = PLAIN, {}
    if len(made) > 1:
        fitted = any(row["rounding"] == "reconstruct" for one in made.values() for row in one.layers.values())
        held = held_back(samples.samples, step.seed) if fitted else frozenset()
        judging = judge.Judge(model, samples, held, step.batch_size)
        scores = {n: judging.score(as_it_runs(t.quantized) if rounds else t.quantized) for n, t in made.items()}
        figures = {name: score.sqnr_db for name, score in scores.items()}
        # a label or two of a few samples says less than the error that they all have
        best = judge.best({name: replace(score, agreement=None) for name, score in scores.items()})
    return made[best], {"equalized": best == EQUALIZED, "smoothed": best == SMOOTHED, "sqnr_db": figures}


def told(weights: Mapping[str, Any]) -> list[str]:
    """What a user should know of it: why this artifact is nearer to the model than its bits would have it."""
    first = next((name for name in (EQUALIZED, SMOOTHED) if weights[name]), None)
    if first is None:
        return []
    figures = weights["sqnr_db"]
    return [f"{first} before its weights were rounded: {figures[first]:.1f} dB, as it is {figures[PLAIN]:.1f} dB"]


def _begun(model: ir.Model, way: Pass, data: Dataset | None) -> ir.Model | None:
    """None if the pass changes nothing, or gives nodes that shared a weight one each."""
    before, after = prepared(model), way(model, data)
    if set(before.graph.initializers) == set(after.graph.initializers) or _stored(after) > _stored(before):
        return None
    return after


def _stored(model: ir.Model) -> int:
    """Elements of all weights."""
    arrays = (v.const_value for v in model.graph.initializers.values())
    return sum(a.size for a in arrays if a is not None and len(a.shape) > 1)


def tried(start: ir.Model, step: QuantizeWeights, data: Dataset | None) -> Tried:
    names = {node.name for node in start.graph}  # bounds that became one took a Relu with them
    step = replace(step, keep_float=tuple(n for n in step.keep_float if n in names))
    return Tried(start, *step.quantized(start, data))


def as_it_runs(model: ir.Model) -> ir.Model:
    """A copy whose products round what they read to 8 bits, one range for all of a tensor in a call.

    Finer than that (a range per row or group) is what some kernels do; which start is best hardly hangs on it, for
    where they do, weights of 4 bits leave the larger error by far.
    """
    model = M.clone(model)
    rounded: dict[str, ir.Value] = {}
    for node in list(model.graph):
        value = node.inputs[0] if G.is_op(node, "MatMul", "Gemm", "LSTM") else None
        weight = node.inputs[1].producer() if value is not None and node.inputs[1] is not None else None
        if value is None or not G.is_op(weight, "DequantizeLinear"):
            continue
        name = value.name or ""
        if name not in rounded:
            quantize = ir.node("DynamicQuantizeLinear", [value], num_outputs=3, name=f"{name}/rounded")
            restore = ir.node("DequantizeLinear", list(quantize.outputs), name=f"{name}/restored")
            model.graph.insert_before(node, [quantize, restore])
            rounded[name] = restore.outputs[0]
        node.replace_input_with(0, rounded[name])
    return model
