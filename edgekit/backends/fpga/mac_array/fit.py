"""Chooses the size of the array for a part, or says by how much a network is too big for it."""

from __future__ import annotations

from typing import Protocol

from edgekit.backends.fpga.mac_array.config import Config
from edgekit.backends.fpga.mac_array.cycles import inference_cycles
from edgekit.backends.fpga.mac_array.program import PROGRAM_WORD, Program, compiled
from edgekit.backends.fpga.net import IntegerNet
from edgekit.errors import DeviceError, UnsupportedOpError

# Depth and width that an 18 kbit block can take (Lattice FPGA-TN-02204, DP16KD and PDPW16KD).
BLOCK_SHAPES = ((16384, 1), (8192, 2), (4096, 4), (2048, 9), (1024, 18), (512, 36))
# Words of feature maps wider than 16 values cost more multiplexers than they save cycles.
MOST_Q = 16
# Outputs computed at once: layers of embedded networks seldom have more channels.
MOST_P = 64


class Part(Protocol):
    """What the choice needs to know of an FPGA."""

    @property
    def name(self) -> str: ...

    @property
    def dsp(self) -> int:
        """Multipliers of at least 9 × 9 bits (ECP5: MULT18X18D)."""

    @property
    def block_rams(self) -> int:
        """Blocks of 18 kbit."""


def blocks(depth: int, width: int) -> int:
    """Block RAMs of a memory, all of one shape."""
    return min(-(-depth // d) * -(-width // w) for d, w in BLOCK_SHAPES)


def block_rams(program: Program) -> dict[str, int]:
    """Estimated blocks of each memory."""
    w, config = program.widths, program.config
    return {
        "feature maps": config.banks * blocks(program.bank_words, config.q * w.activation),
        "weights": blocks(len(program.weights), config.lanes * w.weight),
        "biases": blocks(len(program.biases), config.q * (w.bias + w.shift)),
        "program": blocks(program.step_words * (len(program.steps) + 1), PROGRAM_WORD),
    }


def multipliers(program: Program) -> int:
    """Estimated DSP blocks: one a lane, and those of average pools (18 × 18 bits each)."""
    w = program.widths
    averages = -(-w.multiplicand // 18) * -(-(w.multiplier + 1) // 18) * program.config.q if w.multiplier else 0
    return program.config.lanes + averages


def choose(net: IntegerNet, part: Part) -> Program:
    """The program with the fewest cycles whose multipliers and block RAMs the part has; of equals the smallest.

    Raises DeviceError with the numbers if there is none, UnsupportedOpError if no array has a form for a layer.
    """
    best: Program | None = None
    smallest: Program | None = None
    refused: UnsupportedOpError | None = None
    for config in _configs(part.dsp):
        try:
            program = compiled(net, config)
        except UnsupportedOpError as error:
            refused = error
            continue
        if smallest is None or _rams(program) < _rams(smallest):
            smallest = program
        if multipliers(program) > part.dsp or _rams(program) > part.block_rams:
            continue
        if best is None or _rank(program) < _rank(best):
            best = program
    if best is not None:
        return best
    if smallest is None:
        raise refused or DeviceError(f"{part.name} has {part.dsp} multipliers", "choose a larger part")
    parts = ", ".join(f"{what} {count}" for what, count in block_rams(smallest).items())
    raise DeviceError(
        f"the network needs about {_rams(smallest)} block RAMs of 18 kbit ({parts}), {part.name} has {part.block_rams}",
        "choose a larger part, fewer bits for weights, or prune the model",
    )


def _configs(dsp: int) -> list[Config]:
    made = []
    q = 1
    while q <= MOST_Q:
        made += [Config(p, q) for p in range(q, MOST_P + 1, q) if p * q <= dsp]
        q *= 2
    return made


def _rams(program: Program) -> int:
    return sum(block_rams(program).values())


def _rank(program: Program) -> tuple[int, int, int]:
    return inference_cycles(program), program.config.lanes, _rams(program)
