"""The stages of a conversion that quantize weights only: tried, judged, and kept like its other stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgekit import backends
from edgekit.errors import UnsupportedOpError

if TYPE_CHECKING:
    from edgekit.dataset import Dataset
    from edgekit.passes.quantize_weights import QuantizeWeights
    from edgekit.stages import Conversion

Stage = tuple[ir.Model, dict[str, Any], str]
"""(model, its record, key)."""


def weighed(conversion: Conversion, step: QuantizeWeights, backend: backends.Backend, precision: str) -> Stage:
    """(model with quantized weights, {"weights", "calibration" if there are data}, key).

    Of the model as it is, equalized, or smoothed where activations are rounded: which leaves the smallest error.
    """
    from edgekit import weighing

    step = replace(step, keep_float=conversion.keep_float, seed=conversion.seed)
    data, model = conversion.known_samples, conversion.pruned[0]
    plain, told, parent = _plain(conversion, step, data)
    rounds = backend.rounds_activations(plain, precision)
    ways = weighing.starts(rounds=rounds, data=data is not None)
    identity = {"step": "choose weights", "parent": parent, "ways": repr(ways), "rounds": rounds}

    def make() -> tuple[ir.Model, dict[str, Any]]:
        first = weighing.Tried(model, plain, told["layers"])
        best, figures = weighing.chosen(model, first, step, ways, data, conversion.calibration_set, rounds=rounds)
        weights = {"weight_bits": step.bits, **figures, "layers": best.layers}
        notes = [*_wider(best.layers), *weighing.told(figures)]
        return best.quantized, _record(conversion, weights, notes, data)

    return conversion.stage(f"try weights of {step.bits} bits", identity, make)


def begun(conversion: Conversion, backend: backends.Backend, precision: str) -> Stage:
    """(float model whose weights the backend will quantize, {"weights", "calibration" if there are data}, key).

    As `weighed`; which is best is judged by 8-bit weights, a scale per channel, which is what backends do.
    """
    from edgekit import weighing
    from edgekit.passes.quantize_weights import QuantizeWeights

    model, _, parent = conversion.pruned
    data = conversion.known_samples
    rounds = backend.rounds_activations(model, precision)
    ways, step = weighing.starts(rounds=rounds, data=data is not None), QuantizeWeights(seed=conversion.seed)
    identity = {
        "step": "begin weights",
        "parent": parent,
        "ways": repr(ways),
        "rounds": rounds,
        "pass": repr(step),
        "data": conversion.data_digest(),
    }

    def make() -> tuple[ir.Model, dict[str, Any]]:
        first = weighing.tried(model, step, data)
        best, figures = weighing.chosen(model, first, step, ways, data, conversion.calibration_set, rounds=rounds)
        return best.start, _record(conversion, figures, weighing.told(figures), data)

    return conversion.stage("try ways to begin", identity, make)


def _plain(conversion: Conversion, step: QuantizeWeights, data: Dataset | None) -> Stage:
    """(the model as it is with quantized weights, {"layers"}, key)."""
    model, _, parent = conversion.pruned
    identity = {"step": "quantize weights", "parent": parent, "pass": repr(step), "data": conversion.data_digest()}

    def make() -> tuple[ir.Model, dict[str, Any]]:
        made, told = step.quantized(model, data)
        if not any(layer["bits"] == step.bits for layer in told.values()):
            raise UnsupportedOpError(f"no weights of this model can have {step.bits} bits", "leave this precision out")
        return made, {"layers": told}

    return conversion.stage(f"quantize weights to {step.bits} bits", identity, make)


def _record(conversion: Conversion, weights: dict[str, Any], notes: list[str], data: Dataset | None) -> dict[str, Any]:
    record = {"weights": weights, "told": notes}
    return record if data is None else {**record, "calibration": conversion.calibration_record()}


def _wider(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many weights have more bits than the fewest; empty when all have the same."""
    counts = Counter(layer["bits"] for layer in layers.values())
    told = ", ".join(f"{counts[bits]} have {bits} bits" for bits in sorted(counts))
    return [f"of {len(layers)} weights {told}"] if len(counts) > 1 else []
