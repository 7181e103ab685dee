"""Repairs what pruning leaves, layer by layer in graph order: each layer is fitted to what the float layer gave.

A layer of the pruned model sees the inputs that the pruned and repaired layers before it give, x̂, and is asked for the
kept channels of the float layer's result: W = W₀ + (x̂ᵀx̂ + λI)⁻¹ x̂ᵀ(y − x̂W₀), centred, so that the bias is fitted too, λ
by the error on samples held back (ridge towards the old weights, as in ThiNet, Luo et al. 2017, and channel
reconstruction, He et al. 2017, and with the pruned inputs of the layers before). A layer whose result is added to
another is asked for what makes the sum right. Before a Relu or Clip only what it lets through counts (the nonlinear
reconstruction of Zhang et al. 2015, by majorization: where the float result is cut off, any result beyond is right).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_graph as G
from edgekit.passes.blas import single_threaded
from edgekit.passes.coupling import Coupling
from edgekit.passes.lockstep import Meeting, walk
from edgekit.passes.prune_readings import Reading, readings
from edgekit.passes.prune_recurrent import refit
from edgekit.passes.prune_solve import Rows, solve
from edgekit.report.progress import Progress, silent

Array = np.ndarray[Any, Any]
# Rows of all samples together: 64 a feature instead of 256 leave 4 % more error (KL, MobileNetV2 at 30 %).
ROWS, ROWS_PER_FEATURE = (16384, 262144), 256
ROW_BYTES = 192 * 2**20  # of the rows of one layer, inputs and results
HELD = 5  # one batch in so many judges


@single_threaded
def repair(
    model: ir.Model,
    pruned: ir.Model,
    coupling: Coupling,
    keep: Array,
    batches: Sequence[M.Tensors],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, float]:
    """Fit the layers of `pruned` in place; per node its error on held-back rows as a share of that before.

    model: `ready`, what `pruned` was cut from. batches: inputs by name.
    """
    rng = np.random.default_rng(seed)
    gains = {}
    total = len(list(model.graph))
    for done, meeting in enumerate(walk(model, pruned, batches)):
        progress("repair what is left", done, total)
        gain = _fit(meeting, coupling, keep, rng)
        if gain is not None:
            gains[meeting.node.name or ""] = gain
    return gains


def _fit(meeting: Meeting, coupling: Coupling, keep: Array, rng: np.random.Generator) -> float | None:
    twin = meeting.twin
    found = readings(twin)
    if not found or twin.inputs[0] is None:
        return None
    given = meeting.written[twin.inputs[0].name or ""]
    if found[0].recurrent:
        return refit(meeting.node, twin, coupling, keep, meeting.exact[meeting.node.inputs[0].name or ""], given, rng)  # type: ignore[union-attr]
    if given[0].ndim < 2 or len(given) < 2:
        return None
    reading = found[0]
    rows = _rows(reading, given, _wanted(meeting, coupling, keep), rng)
    solved = solve(reading.layer, rows, _range(meeting.node))
    reading.write(reading.layer.weight + solved.change, solved.shift)
    return solved.gain


def _rows(reading: Reading, given: Sequence[Array], wanted: Sequence[Array], rng: np.random.Generator) -> Rows:
    groups, features, outputs = reading.layer.weight.shape
    most = int(np.clip(ROWS_PER_FEATURE * features, *ROWS))
    most = min(most, ROW_BYTES // (4 * groups * (features + 3 * outputs)))
    samples = sum(len(x) for x in given)
    pairs = [reading.pairs(x, y, max(1, most * len(x) // samples), rng) for x, y in zip(given, wanted, strict=True)]
    x, y = (np.concatenate([pair[side] for pair in pairs], axis=1) for side in (0, 1))
    return Rows(x, y, x.shape[1] - x.shape[1] // HELD)


def _range(node: ir.Node) -> tuple[float, float]:
    """Where what follows the node's result is not flat: (0, inf) before a Relu."""
    value = node.outputs[0]
    for _ in range(2):
        uses = tuple(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            break
        reader = uses[0].node
        if G.is_op(reader, "Relu"):
            return 0.0, np.inf
        if G.is_op(reader, "Clip"):
            low, high = (G.array(v) for v in [*reader.inputs[1:], None, None][:2])
            return (-np.inf if low is None else float(low)), (np.inf if high is None else float(high))
        if not (G.is_op(reader, "Add") and _summand(value) is not None):
            break
        value = reader.outputs[0]
    return -np.inf, np.inf


def _wanted(meeting: Meeting, coupling: Coupling, keep: Array) -> list[Array]:
    """What the layer should give, batch by batch: the float result's kept channels, and what another summand lacks."""
    value, twin = meeting.node.outputs[0], meeting.twin.outputs[0]
    exact = _kept(meeting.exact[value.name or ""], coupling, value, keep)
    other = _summand(value)
    name = other.name or "" if other is not None else ""
    if other is None or name not in meeting.exact or name not in meeting.written or len(tuple(twin.uses())) != 1:
        return exact
    there, here = _kept(meeting.exact[name], coupling, other, keep), meeting.written[name]
    return [e + (a - b) if a.shape == b.shape == e.shape else e for e, a, b in zip(exact, there, here, strict=True)]


def _summand(value: ir.Value) -> ir.Value | None:
    """The other operand where the value's only reader adds it to one of the same shape."""
    uses = tuple(value.uses())
    if len(uses) != 1 or not G.is_op(uses[0].node, "Add") or value.is_graph_output():
        return None
    return uses[0].node.inputs[1 - uses[0].idx]


def _kept(parts: Sequence[Array], coupling: Coupling, value: ir.Value, keep: Array) -> list[Array]:
    for axis, labels in coupling.axes(value).items():
        kept = keep[labels]
        if not kept.all() and parts[0].shape[axis] == len(kept):
            parts = [np.compress(kept, p, axis=axis) for p in parts]
    return list(parts)
