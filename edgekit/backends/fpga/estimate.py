"""What a design will need of a part, before any tool runs for long, and the refusal of what cannot fit.

The factors are measured: designs of this package mapped by yosys 0.23 and packed by nextpnr 0.11 for ECP5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.backends.fpga.mac_array import fit
from edgekit.backends.fpga.mac_array.cycles import inference_cycles
from edgekit.backends.fpga.mac_array.program import Program
from edgekit.backends.fpga.net import IntegerNet
from edgekit.backends.fpga.unrolled import trace
from edgekit.errors import FitError
from edgekit.part import Part

Array = np.ndarray[Any, Any]

# LUTs of nextpnr over da4ml's adder bits, the streams' registers included: 1.87 and 2.12 for 64-32-16-10 at 6 and 4
# bits. Carry chains and selections cost more than one LUT a bit.
LUT_PER_ADDER_BIT = (1.8, 2.0, 2.2)
# da4ml's adder bits over signed digits of the weights times bits of the input: from 0.71 (8 bits) to 1.28 (2 bits) over
# nine networks; 64-32-16-10 at 8, 6 and 4 bits: 0.71, 0.78, 0.87.
ADDER_BITS_PER_DIGIT = (0.65, 0.85, 1.3)

# mac-array: a line through nine arrays from 4 × 1 to 16 × 8 lanes (1,169 to 7,392 LUT mapped by yosys); the counts lie
# between 0.65 and 1.22 of it, and nextpnr packs 7 % more than yosys maps.
LUT_OF_ARRAY, LUT_PER_LANE = 1370, 52.5
ARRAY_SPREAD = (0.65, 1.07, 1.3)


@dataclass(frozen=True)
class Estimate:
    """low, lut, high: LUTs, the fewest and most that are likely. dsp, ram: 0 where none is used.

    cycles: of one inference, interval: between two; None where only a trace would tell.
    """

    architecture: str
    low: int
    lut: int
    high: int
    dsp: int
    ram: int
    cycles: int | None
    interval: int

    def beyond(self, part: Part) -> dict[str, tuple[int, int]]:
        """What is needed and what the part has, of everything that is surely too much."""
        surely = {"LUT": (self.low, part.lut), "multipliers": (self.dsp, part.dsp)}
        surely["block RAMs"] = (self.ram, part.block_rams)
        told = {"LUT": self.lut, "multipliers": self.dsp, "block RAMs": self.ram}
        return {what: (told[what], has) for what, (needed, has) in surely.items() if needed > has}

    def may_not_fit(self, part: Part) -> bool:
        """Whether the part has fewer LUTs than the most that are likely."""
        return self.high > part.lut


def check(estimate: Estimate, part: Part) -> None:
    """Raises FitError, one line with the numbers, for what surely does not fit."""
    beyond = estimate.beyond(part)
    if beyond:
        needs = ", ".join(f"about {_round(n)} {what}" for what, (n, _) in beyond.items())
        has = ", ".join(_round(n) for _, n in beyond.values())
        raise FitError(f"{estimate.architecture} needs {needs}, {part.name} has {has}", REMEDIES[estimate.architecture])


REMEDIES = {
    "unrolled": "use mac-array, fewer bits or pruning",
    "mac-array": "use fewer lanes, fewer bits, pruning or a larger part",
}


def _round(count: int) -> str:
    """61k of 61,234; small numbers as they are."""
    return f"{round(count / 1000)}k" if count >= 10_000 else str(count)


def unrolled(net: IntegerNet) -> Estimate:
    """From the weights alone, at once. Raises UnsupportedOpError for a network that cannot be unrolled."""
    trace.check(net)
    digits = sum(
        int(_signed_digits(layer.weights).sum()) * net.tensors[layer.inputs[0]].bits
        for layer in net.layers
        if layer.weights is not None
    )
    pairs = zip(ADDER_BITS_PER_DIGIT, LUT_PER_ADDER_BIT, strict=True)
    low, usual, high = (round(digits * adders * luts) for adders, luts in pairs)
    return Estimate("unrolled", low, usual, high, 0, 0, None, 1)


def traced(made: trace.Unrolled, cycles: int) -> Estimate:
    """From a trace, whose adders are known. cycles: of its design."""
    low, usual, high = (round(made.cost * luts) for luts in LUT_PER_ADDER_BIT)
    return Estimate("unrolled", low, usual, high, 0, 0, cycles, 1)


def mac_array(program: Program) -> Estimate:
    """From the size of the array; multipliers, block RAMs and cycles are those of its generator."""
    line = LUT_OF_ARRAY + LUT_PER_LANE * program.config.lanes
    low, usual, high = (round(line * factor) for factor in ARRAY_SPREAD)
    cycles = inference_cycles(program)
    ram = sum(fit.block_rams(program).values())
    return Estimate("mac-array", low, usual, high, fit.multipliers(program), ram, cycles, cycles)


def _signed_digits(weights: Array) -> Array:
    """Digits that are not 0 of each weight in canonical signed form: the powers of two that a product adds up."""
    rest = np.abs(weights.astype(np.int64))
    digits = np.zeros(rest.shape, np.int64)
    while rest.any():
        odd = rest & 1
        digits += odd
        # 3 in the two lowest bits is 4 - 1
        rest = (rest - np.where(odd, 2 - (rest & 3), 0)) >> 1
    return digits
