"""Cycles of every step, exactly as the hardware takes them, and how much of the lanes they use."""

from __future__ import annotations

from edgekit.backends.fpga.mac_array.program import Program
from edgekit.backends.fpga.mac_array.steps import Step

# Registers from the cycle that starts a step to its last result in the memory, apart from the adder tree:
# fetching's last cycle and the start 2, loops and address 2, memory and operands 4, product 1, accumulator 1,
# requantizer 9, ending 1; less the cycle in which the first product is issued, counted among the products.
PIPELINE = 17
# The output's words leave every second cycle, after 3 cycles that fetch and start the step that sends them.
SEND_PERIOD = 2
SEND_START = 3


def issue_cycles(step: Step) -> int:
    """Cycles from the first to the last multiply-accumulate."""
    return step.groups * (step.taps + step.idle) - step.idle


def step_cycles(program: Program, step: Step) -> int:
    """Cycles of a step: fetching its registers, its products, emptying the pipeline."""
    return program.step_words + PIPELINE + program.config.levels + issue_cycles(step) + step.words_last


def send_cycles(program: Program) -> int:
    return program.step_words + SEND_START + SEND_PERIOD * program.output_words


def inference_cycles(program: Program) -> int:
    """From the first input word to the last output word, both included, without stalls; the interval too."""
    return program.input_words + sum(step_cycles(program, s) for s in program.steps) + send_cycles(program)


def lane_utilisation(program: Program, step: Step) -> float:
    """Products that the network asks for, per lane and cycle of the step."""
    return step.macs / (program.config.lanes * step_cycles(program, step))


def utilisation(program: Program) -> float:
    """The same over a whole inference, input and output included."""
    return sum(s.macs for s in program.steps) / (program.config.lanes * inference_cycles(program))
