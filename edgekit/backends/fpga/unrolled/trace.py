"""Turns a network of dense layers into a pipeline of additions, shifts and selections, with da4ml.

da4ml (Sun et al. 2025, arXiv:2507.04535) finds sums that outputs share; its trace is exact, so the result computes the
integers of the network. Cost: its estimate of adder bits, one a LUT.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from edgekit.backends.fpga.net import IntegerNet, Layer, half
from edgekit.errors import MissingExtraError, UnsupportedOpError

Array = np.ndarray[Any, Any]

# Adders between two registers: a carry chain and its routing take 2 to 3 ns in an ECP5, and 100 MHz are 10 ns.
ADDERS_A_STAGE = 2
# da4ml's model of the hardware: an adder of any width is one step of delay and costs one LUT a bit.
_ADDER_SIZE, _CARRY_SIZE = 1, -1


@dataclass(frozen=True, eq=False)
class Unrolled:
    """stages: da4ml's `CombLogic`s, registers between them. whole: the same as one. cost: LUTs by da4ml's estimate."""

    net: IntegerNet
    whole: Any
    stages: tuple[Any, ...]
    cost: float

    @property
    def register_bits(self) -> int:
        """Flip-flops between the stages."""
        return sum(sum(width(q) for q in stage.inp_qint) for stage in self.stages)


def check(net: IntegerNet) -> None:
    """Raises UnsupportedOpError unless every layer is dense and reads the one before it."""
    before = net.input.name
    for layer in net.layers:
        if layer.kind != "dense":
            raise UnsupportedOpError(
                f"{layer.kind} '{layer.name}' cannot be unrolled, only dense layers can", "use mac-array"
            )
        if layer.inputs != (before,):
            raise UnsupportedOpError(
                f"dense '{layer.name}' does not read the layer before it", "use mac-array: it takes any graph"
            )
        before = layer.output
    if before != net.output:
        raise UnsupportedOpError(f"the output '{net.output}' is not the last layer's", "use mac-array")


def unroll(net: IntegerNet, adders_a_stage: int = ADDERS_A_STAGE) -> Unrolled:
    """Seconds for a thousand weights, minutes for ten thousand: `estimate.unrolled` first.

    Raises UnsupportedOpError for other layers than dense ones, MissingExtraError without da4ml.
    """
    check(net)
    trace = _da4ml()
    hardware = trace.HWConfig(_ADDER_SIZE, _CARRY_SIZE, -1)
    sizes = np.ones(net.input.size, np.int64)
    inputs = trace.FixedVariableArray.from_kif(sizes, sizes * (net.input.bits - 1), sizes * 0, hwconf=hardware)
    values = inputs
    # its solver prints
    with contextlib.redirect_stdout(io.StringIO()):
        for layer in net.layers:
            values = _dense(values, layer, adders_a_stage)
        whole = trace.comb_trace(inputs, values)
        pipeline = trace.to_pipeline(whole, adders_a_stage, verbose=False)
    return Unrolled(net, whole, tuple(pipeline.solutions), float(whole.cost))


def _da4ml() -> Any:
    try:
        from da4ml import trace
    except ImportError as error:
        raise MissingExtraError("da4ml is not installed", "pip install 'edgekit[fpga]'") from error
    return trace


def _dense(values: Any, layer: Layer, adders_a_stage: int) -> Any:
    """Integers of a layer's output: (sum + rounding offset) · 2^-shift without its fraction, saturated."""
    assert layer.weights is not None
    assert layer.bias is not None
    # the solver works in float32: weights of 8 bits are exact
    sums = np.ravel((values @ layer.weights.T.astype(np.float64))._vars)
    shifts = np.broadcast_to(np.array(layer.shift), len(sums))
    made = [
        _requantized(total, int(bias), int(shift), layer, adders_a_stage)
        for total, bias, shift in zip(sums, layer.bias, shifts, strict=True)
    ]
    return type(values)(np.array(made), values.solver_options, hwconf=values.hwconf)


def _requantized(total: Any, bias: int, shift: int, layer: Layer, adders_a_stage: int) -> Any:
    offset = bias + half(shift)
    moved = total + offset if offset else total
    if moved is not total and moved.opr == "cadd":
        # da4ml takes the addition of a constant for free: it would share a stage with as many adders as any other has
        moved.latency = ceil(total.latency / adders_a_stage) * adders_a_stage + 1
    scaled = moved * 2.0**-shift
    signed, whole_bits, _ = scaled.kif
    whole = scaled.quantize(signed, max(0, whole_bits), 0, "WRAP", "TRN")
    limited = whole.max_of(layer.low) if float(whole.low) < layer.low else whole
    return limited.min_of(layer.high) if float(limited.high) > layer.high else limited


def width(interval: Sequence[float]) -> int:
    """Bits of an integer multiple of the step between two bounds; 0 of what is always 0."""
    low, high, step = interval
    if low == high == 0:
        return 0
    least, most = round(low / step), round(high / step)
    return max((-least - 1 if least < 0 else 0).bit_length(), max(most, 0).bit_length()) + int(least < 0)
