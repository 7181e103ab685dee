"""The grids that activations are rounded to: LiteRT's asymmetric int8 and symmetric int16, an FPGA's powers of two.

An FPGA rounds by shifting: scales are powers of two, symmetric around 0 over the full range of two's complement. A step
may be twice as coarse as it need be, or the largest values saturate; which is better shows at the outputs of the layers
that read the tensor, so that the estimators here are the range that holds everything and its half, quarter and eighth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from edgekit.passes.calibrate import Function, squared_error
from edgekit.passes.decide import Decision
from edgekit.passes.plan import MIN_SCALE, Activation, Bits, Method, activation, integer_range

Array = np.ndarray[Any, Any]


class Grids(Protocol):
    """How ranges become integers. estimators: of ranges, to choose from."""

    @property
    def estimators(self) -> tuple[Method, ...]: ...

    def activation(self, names: Iterable[str], low: float, high: float, method: Method) -> Activation:
        """Parameters of values that share them."""

    def error(self, counts: Array, centres: Array, how: Activation, through: Function | None) -> float:
        """Mean squared error on a histogram, or of a function of it."""


@dataclass(frozen=True)
class LiteRT:
    bits: Bits = 8
    estimators: tuple[Method, ...] = ("minmax", "wide", "wider", "average", "percentile", "mse", "kl")

    def activation(self, names: Iterable[str], low: float, high: float, method: Method) -> Activation:
        return activation(low, high, method, self.bits)

    def error(self, counts: Array, centres: Array, how: Activation, through: Function | None) -> float:
        return float(squared_error(counts, centres, how.low, how.high, through))


@dataclass(frozen=True)
class PowerOfTwo:
    """bits: of tensors that `widths` does not name; values that share a grid have the widest one's."""

    bits: Bits = 8
    widths: Mapping[str, Bits] = field(default_factory=dict)
    estimators: tuple[Method, ...] = ("minmax", "half", "quarter", "eighth")

    def activation(self, names: Iterable[str], low: float, high: float, method: Method) -> Activation:
        widths: list[Bits] = [self.widths[n] for n in names if n in self.widths]
        return power_of_two(low, high, method, max(widths, default=self.bits))

    def error(self, counts: Array, centres: Array, how: Activation, through: Function | None) -> float:
        rounded = np.clip(np.rint(centres / how.scale), *integer_range(how.bits)) * how.scale
        error = rounded - centres if through is None else through(rounded) - through(centres)
        return float(np.average(np.square(error), weights=counts))


def power_of_two(low: float, high: float, method: Method, bits: Bits) -> Activation:
    """The finest grid whose ends [low, high] rounds to at most; a tensor that is always 0 gets [0, 1]."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if low == high:
        high = 1.0
    lowest, highest = integer_range(bits)
    exponent = finest(max(high / (highest + 0.5), low / (lowest - 0.5)))
    return Activation(max(2.0**exponent, MIN_SCALE), 0, low, high, method, bits)


def finest(step: float) -> int:
    """The exponent of the smallest power of two that is not below."""
    mantissa, exponent = math.frexp(step)
    return exponent - 1 if mantissa == 0.5 else exponent


OUTPUT_BITS: Bits = 8  # of the model's outputs: they cost no multiplier, and classes differ by little


def widths_of(model: ir.Model, decision: Decision, asked: Mapping[str, tuple[int, int]]) -> dict[str, Bits]:
    """Bits of activations by value, for `PowerOfTwo`. asked: (weight bits, activation bits) by node or model input.

    A Relu or Clip has those of the layer that it is fused into; what is only moved or pooled has its source's.
    """
    made = {v.name or "": node for node in model.graph for v in node.outputs}
    out: dict[str, Bits] = {}
    for name in decision.activations:
        node = made.get(name)
        keys = [name] if node is None else [node.name or "", decision.fused.get(node.name or "", "")]
        found = next((asked[k][1] for k in keys if k in asked), None)
        if found is None and name in decision.outputs:
            found = OUTPUT_BITS
        if found is not None:
            out[name] = found  # type: ignore[assignment]
    return out


# --- weights -----------------------------------------------------------------------------------------------
# Steps finer than what holds every weight: of 2 and 3 bits, clipping the largest to a quarter still pays.
FINER = 3
# A channel of weights 2^-8 of the layer's largest has all 8 bits; with more its sums would need longer shifts.
SPREAD = 8


def weight_scales(weight: Array, axis: int, bits: int, least: Array | float, *, per_channel: bool = True) -> Array:
    """float32 powers of two, one per channel of `axis`: those that leave the least squared error, not below `least`."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)
    if not per_channel:
        rows = rows.reshape(1, -1)
    lowest, highest = integer_range(bits)
    needed = np.maximum(rows.max(axis=1, initial=0) / (highest + 0.5), rows.min(axis=1, initial=0) / (lowest - 0.5))
    largest = finest(float(needed.max())) if needed.any() else -SPREAD  # without weights it only adds its bias
    exponents = np.array([max(finest(float(n)) if n > 0 else largest, largest - SPREAD) for n in needed])
    tried = np.ldexp(1.0, exponents - np.arange(FINER + 1)[:, None])[:, :, None]
    error = np.square(np.clip(np.rint(rows / tried), lowest, highest) * tried - rows).sum(axis=2)
    best = np.ldexp(1.0, exponents - error.argmin(axis=0))
    out = np.broadcast_to(best, weight.shape[axis]).astype(np.float64)
    floor = np.broadcast_to(np.asarray(least, np.float64), out.shape)
    raised = [max(s, 2.0 ** finest(float(f))) if f > 0 else s for s, f in zip(out, floor, strict=True)]
    return np.array(raised, np.float32)
