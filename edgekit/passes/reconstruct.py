"""Weight rounding by layer-wise reconstruction: each layer of integers is fitted to what the float layer gives.

One walk through both models. A layer sees the inputs that the quantized layers before it give, x̂, and is asked for the
float layer's result, y: first the weights that give it best, by least squares with a ridge towards the float weights
(as in Qronos, Zhang et al. 2025, and GPTAQ, Li et al. 2025), then those weights on the grid (`rounding`), and at last
the bias that makes the means equal (empirical bias correction with quantized upstream, Nagel et al. 2019, section 4.2).
A result is kept only where it is better on samples that it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import regression as L
from edgekit.passes.apply_plan import apply_plan, folded, prepared
from edgekit.passes.calibrate import feeds
from edgekit.passes.lockstep import Meeting, live_bytes, walk
from edgekit.passes.plan import QuantizationPlan, Weight
from edgekit.passes.rounding import damped, round_weights

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]

ROWS, ROWS_PER_INPUT, MOST_ROWS = 4096, 8, 32768
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of the Gram matrix' mean diagonal
LIVE_BYTES = 512 * 2**20
BATCH = 32
LARGE = 1e12  # squares of it, summed over MOST_ROWS, are far below float32's 3e38
SPARSE = 0.25  # share of weights that are zero from which they stay zero
HELD = 4  # one sample in so many judges the result of the others


@dataclass(frozen=True)
class Fitted:
    """One layer's result: integers in the weight's own layout, and the bias in full. gain: its error / nearest's."""

    integers: Array
    bias: Array | None
    gain: float


def reconstruct(
    model: ir.Model, plan: QuantizationPlan, batches: Sequence[M.Tensors], seed: int = 0, least: int = ROWS
) -> tuple[QuantizationPlan, dict[str, float]]:
    """The plan with rounded weights and bias shifts, and per node the error left, as a share of rounding to nearest.

    model: the float model that the plan was made for. batches: calibration inputs by name, `affordable` ones.
    least: rows that a layer of few inputs is fitted to; others have more.
    """
    model = prepared(model)
    plan = replace(plan, bias_shifts={})
    written = apply_plan(model, plan)
    rng = np.random.default_rng(seed)
    weights, shifts, gains = dict(plan.weights), dict(plan.bias_shifts), {}
    for meeting in walk(model, written, batches, plan.weights):
        name = meeting.node.name or ""
        if name not in plan.weights:
            continue
        fitted = _fit(meeting, plan.weights[name], rng, least)
        if fitted is None:
            continue
        gains[name] = fitted.gain
        weights[name] = replace(plan.weights[name], integers=fitted.integers.astype(np.int8).tobytes())
        _, bias = folded(meeting.node)
        if bias is not None and fitted.bias is not None:
            shifts[name] = tuple(float(b) for b in fitted.bias - bias)
        _replace(meeting, weights[name], fitted)
    return replace(plan, weights=weights, bias_shifts=shifts), gains


def _fit(meeting: Meeting, plan: Weight, rng: np.random.Generator, least: int) -> Fitted | None:
    array, bias = folded(meeting.node)
    layer = L.layer(meeting.node, array, bias)
    if layer is None:
        return None
    source, target = meeting.twin.inputs[0], meeting.node.outputs[0]
    given = np.concatenate(meeting.written[source.name or ""])  # type: ignore[union-attr]
    wanted = np.concatenate(meeting.exact[target.name or ""])
    if given.ndim < 2 or len(given) < HELD or len(given) != len(wanted):
        return None
    rows = L.choose(meeting.node, wanted, min(MOST_ROWS, max(least, ROWS_PER_INPUT * layer.weight.shape[1])), rng)
    x, y = (_computable(a) for a in (L.inputs(layer, given, rows), L.outputs(layer, wanted, rows)))
    count, each = rows.picks.shape
    at = (count - count // HELD) * each  # the last samples, whole, judge
    scales = layer.along(np.array(plan.scales, np.float64))
    return _solve(layer, plan, scales, (x[:, :at], y[:, :at]), (x[:, at:], y[:, at:]))


def _solve(
    layer: L.Layer, plan: Weight, scales: Array, fit: tuple[Array, Array], held: tuple[Array, Array]
) -> Fitted | None:
    """fit, held: rows of (inputs, results), `_computable`."""
    free = layer.bias is not None
    weight, offset = layer.weight, np.zeros(1) if layer.bias is None else layer.bias[:, None, :]
    # of what the float weights leave: small numbers, whose float32 products are exact enough
    x, rest = fit[0], _rest(fit, weight, offset)
    mean_x, mean = (_mean(x), _mean(rest)) if free else (np.float64(0), np.float64(0))
    centred = x - mean_x.astype(x.dtype)
    gram = (centred.swapaxes(1, 2) @ centred).astype(np.float64) / x.shape[1]
    slope = (centred.swapaxes(1, 2) @ (rest - mean.astype(rest.dtype))).astype(np.float64) / x.shape[1]
    unseen = held[0], _rest(held, weight, offset)

    def bias_of(real: Array) -> Array | None:
        return offset + mean - mean_x @ (real - weight) if free else None

    def left(real: Array, bias: Array | None) -> float:
        """Squared error on the held-back rows."""
        return _energy(_rest(unseen, real - weight, 0.0 if bias is None else bias - offset))

    nearest = np.clip(np.rint(weight / scales), plan.lowest, plan.limit)
    plain = left(nearest * scales, offset if free else None)
    if (weight == 0).mean() >= SPARSE:
        kept = weight != 0  # zeros were put there, and they are what compresses
        tried = [nearest, round_weights(weight, gram, scales, (plan.lowest * kept, plan.limit * kept))]
    else:
        ideal = min((weight + change for change in _ridged(gram, slope)), key=lambda real: left(real, bias_of(real)))
        # which ridge shows before rounding, which is what takes the time
        wishes = np.concatenate([ideal, weight], axis=2)
        both = np.concatenate([scales] * 2, axis=2)
        ends = (np.array(plan.lowest), np.array(plan.limit))
        tried = [nearest, *np.split(round_weights(wishes, gram, both, ends), 2, 2)]
    biases = [bias_of(q * scales) for q in tried]
    errors = [left(q * scales, bias) for q, bias in zip(tried, biases, strict=True)]
    best = int(np.argmin(errors))
    if not errors[best] < plain:
        return None
    q, bias = tried[best], biases[best]
    return Fitted(layer.restored(q), None if bias is None else bias.reshape(-1), errors[best] / max(plain, 1e-300))


def _ridged(gram: Array, slope: Array) -> Iterator[Array]:
    """Least squares with each of RIDGES."""
    mean = np.trace(gram, axis1=1, axis2=2)[:, None, None] / gram.shape[1]
    solid, eye = damped(gram), np.eye(gram.shape[1])
    for ridge in RIDGES:
        yield np.linalg.solve(solid + ridge * mean * eye, slope)


def _rest(rows: tuple[Array, Array], weight: Array, bias: Array | float) -> Array:
    """Results less what the weight makes of the inputs, in their own type."""
    x, y = rows
    out = y - x @ weight.astype(x.dtype)
    out -= np.asarray(bias, out.dtype)
    return np.asarray(out)


def _computable(rows: Array) -> Array:
    """float32, or float64 where squares and their sums would leave its range."""
    largest = max(float(rows.max(initial=0)), -float(rows.min(initial=0)))
    return rows.astype(np.float64) if largest > LARGE else rows


def _mean(rows: Array) -> Array:
    """Over rows, float64 (groups, 1, n)."""
    return np.asarray(rows.mean(axis=1, keepdims=True, dtype=np.float64))


def _energy(values: Array) -> float:
    flat = values.reshape(-1)
    return float(sum(float(np.dot(part, part)) for part in np.array_split(flat, max(1, flat.size // 2**16))))


def _replace(meeting: Meeting, plan: Weight, fitted: Fitted) -> None:
    """Let the quantized model go on with the new weights."""
    shape = [1] * fitted.integers.ndim
    shape[plan.axis] = -1
    weight = (fitted.integers * np.array(plan.scales).reshape(shape)).astype(np.float32)
    _put(meeting, 1, weight)
    if fitted.bias is not None and len(meeting.twin.inputs) > 2:
        _put(meeting, 2, fitted.bias.astype(np.float32))


def _put(meeting: Meeting, position: int, array: Array) -> None:
    value = meeting.twin.inputs[position]
    if value is not None:
        parts = meeting.written[value.name or ""]
        parts[:] = [array] * len(parts)


def affordable(model: ir.Model, data: Dataset, without: frozenset[int]) -> list[M.Tensors]:
    """Batches of samples other than `without`, as many as LIVE_BYTES of both models' live values allow."""
    batches: list[M.Tensors] = []
    room = 0
    for feed in feeds(M.signature(model), data, BATCH):
        rows = [i for i in range(feed.rows) if feed.first + i not in without]
        if not rows:
            continue
        fixed = M.batch_of(M.signature(model)) is not None
        batch = feed.inputs if fixed else {k: v[rows] for k, v in feed.inputs.items()}
        if not batches:
            one = batch if fixed else {k: v[:1] for k, v in batch.items()}
            per_sample = max(1, live_bytes(prepared(model), one)) / len(next(iter(one.values())))
            room = max(1, int(LIVE_BYTES // (3 * per_sample)))
        count = len(next(iter(batch.values())))
        if count > room and (fixed or not room):
            break
        batches.append(batch if count <= room else {k: v[:room] for k, v in batch.items()})
        room -= min(count, room)
        if not room:
            break
    return batches
