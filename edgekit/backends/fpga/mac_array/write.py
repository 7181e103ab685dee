"""Writes a design: Verilog of the engine, the module with this network's sizes and memories, contents, description."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.backends.fpga.mac_array.cycles import inference_cycles, step_cycles
from edgekit.backends.fpga.mac_array.program import PROGRAM_WORD, Program, encoded_shifts

Array = np.ndarray[Any, Any]

DESIGN_SCHEMA = 1  # history: 1, first
TOP = "edgekit_mac_array"
RTL = ("memory", "counter", "sequencer", "lanes", "requantize", "engine")


def write(program: Program, folder: Path) -> tuple[Path, ...]:
    """Files of the design, in the order in which tools read them: *.v, then the memories' *.hex, design.json."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in RTL:
        text = resources.files(__package__).joinpath("rtl", f"mac_array_{name}.v").read_text(encoding="utf-8")
        written.append(_file(folder / f"mac_array_{name}.v", text))
    written.append(_file(folder / f"{TOP}.v", _top(program)))
    for name, (width, contents) in _memories(program).items():
        digits = -(-width // 4)
        written.append(_file(folder / f"{name}.hex", "".join(f"{value:0{digits}x}\n" for value in contents)))
    written.append(_file(folder / "design.json", json.dumps(describe(program), indent=1) + "\n"))
    return tuple(written)


def describe(program: Program) -> dict[str, Any]:
    """What a simulation or a report has to know of a design; cycles are those of the model, without stalls."""
    net, config = program.net, program.config
    target = net.tensors[net.output]
    return {
        "schema": DESIGN_SCHEMA,
        "architecture": "mac-array",
        "top": TOP,
        "verilog": [f"mac_array_{name}.v" for name in RTL] + [f"{TOP}.v"],
        "memories": [f"{name}.hex" for name in _memories(program)],
        "p": config.p,
        "q": config.q,
        "word_bits": config.q * program.widths.activation,
        "activation_bits": program.widths.activation,
        "input_shape": list(net.input.shape),
        "output_shape": list(target.shape),
        "input_pixel_words": program.places.pitch[net.input.name],
        "output_pixel_words": program.places.pitch[net.output],
        "input_words": program.input_words,
        "output_words": program.output_words,
        "step_number_bits": program.widths.step_number,
        "steps": [
            {"layer": s.layer, "kind": s.kind, "macs": s.macs, "cycles": step_cycles(program, s)} for s in program.steps
        ],
        "cycles": inference_cycles(program),
        "feature_words": program.places.size,
        "weight_words": len(program.weights),
        "bias_words": len(program.biases),
    }


def _file(path: Path, text: str) -> Path:
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)
    return path


# --- memories ------------------------------------------------------------------------------------------------
def _memories(program: Program) -> dict[str, tuple[int, list[int]]]:
    """Width in bits and words of each read-only memory."""
    w, config = program.widths, program.config
    shifts = encoded_shifts(program)
    biases = [
        _joined(
            [(int(b) & ((1 << w.bias) - 1)) | (int(s) << w.bias) for b, s in zip(brow, srow, strict=True)],
            w.bias + w.shift,
        )
        for brow, srow in zip(program.biases, shifts, strict=True)
    ]
    mask = (1 << w.weight) - 1
    weights = [_joined([int(v) & mask for v in word.reshape(-1)], w.weight) for word in program.weights]
    return {
        "weights": (config.lanes * w.weight, weights),
        "biases": (config.q * (w.bias + w.shift), biases),
        "program": (PROGRAM_WORD, program.program_words()),
    }


def _joined(values: list[int], width: int) -> int:
    """The first value in the lowest bits."""
    joined = 0
    for value in reversed(values):
        joined = (joined << width) | value
    return joined


# --- Verilog of one network ----------------------------------------------------------------------------------
def _top(program: Program) -> str:
    w, config = program.widths, program.config
    memories = _memories(program)
    program_address = max(1, (len(memories["program"][1]) - 1).bit_length())
    parameters = {
        "P": config.p,
        "Q": config.q,
        "LEVELS": config.levels,
        **{
            name.upper(): getattr(w, name)
            for name in (
                *("activation", "weight", "slice", "accumulator", "bias", "shift", "left", "multiplier"),
                *("multiplicand", "wide", "drain", "idle", "count", "coordinate", "feature_address"),
                *("weight_address", "bias_address", "step_number"),
            )
        },
        "SELECT": config.banks.bit_length() - 1,
        "BANKS": config.banks,
        "BANK_WORDS": program.bank_words,
        "PROGRAM_ADDRESS": program_address,
        "STEP_WORDS": program.step_words,
        "BY_CHANNEL": int(any(s.by_channel for s in program.steps)),
        "MAXIMUM": int(any(s.maximum for s in program.steps)),
        "INPUT_BASE": program.places.base[program.net.input.name],
        "INPUT_WORDS": program.input_words,
        "OUTPUT_WORDS": program.output_words,
    }
    word = config.q * w.activation
    roms = {
        "weights": _rom("weight", "weights", *_shape(memories["weights"])),
        "biases": _rom("bias", "biases", *_shape(memories["biases"])),
        "program": _rom("program", "program", *_shape(memories["program"])),
    }
    settings = ",\n        ".join(f".{name}({value})" for name, value in parameters.items())
    registers, at = [], 0
    for name, width in program.fields:
        registers.append(f"        .{name}(step[{at + width - 1}:{at}])")
        at += width
    step_bits = program.step_words * PROGRAM_WORD
    return f"""// Made by edgekit: a {config.p} x {config.q} array of multiply-accumulate lanes for one network.
module {TOP} (
    input wire clk,
    input wire reset,
    input wire in_valid,
    output wire in_ready,
    input wire [{word - 1}:0] in_data,
    input wire in_last,
    output wire out_valid,
    input wire out_ready,
    output wire [{word - 1}:0] out_data,
    output wire out_last,
    output wire misaligned,
    output wire [{w.step_number - 1}:0] step_number
);
    wire [{w.weight_address - 1}:0] weight_address;
    wire [{w.bias_address - 1}:0] bias_address;
    wire [{program_address - 1}:0] program_address;
    wire program_shift;
{roms["weights"]}{roms["biases"]}{roms["program"]}
    // registers of the running step: the first program word ends up in the lowest bits
    reg [{step_bits - 1}:0] step;
    always @(posedge clk) if (program_shift) step <= {_shifted(step_bits)};

    mac_array_engine #(
        {settings}
    ) engine (
        .clk(clk), .reset(reset),
        .in_valid(in_valid), .in_ready(in_ready), .in_data(in_data), .in_last(in_last),
        .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data), .out_last(out_last),
        .misaligned(misaligned), .step_number(step_number),
        .weight_address(weight_address), .weight_data(weight_data),
        .bias_address(bias_address), .bias_data(bias_data),
        .program_address(program_address), .program_shift(program_shift),
{",".join(chr(10) + r for r in registers).lstrip(chr(10))}
    );
endmodule
"""


def _shape(memory: tuple[int, list[int]]) -> tuple[int, int]:
    return memory[0], len(memory[1])


def _shifted(step_bits: int) -> str:
    if step_bits == PROGRAM_WORD:
        return "program_data"
    return f"{{program_data, step[{step_bits - 1}:{PROGRAM_WORD}]}}"


def _rom(name: str, file: str, width: int, depth: int) -> str:
    """A read-only memory whose read is registered, so that it becomes block RAM."""
    return f"""
    reg [{width - 1}:0] {name}_words [0:{depth - 1}];
    reg [{width - 1}:0] {name}_data;
    initial $readmemh("{file}.hex", {name}_words);
    always @(posedge clk) {name}_data <= {name}_words[{name}_address];
"""
