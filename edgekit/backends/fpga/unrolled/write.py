"""Writes an unrolled network as one Verilog module with the streams of docs/fpga.md: a whole inference in each beat.

The operations are those of da4ml's intermediate form: an integer multiple of a step each, here one signed wire each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import log2
from pathlib import Path
from typing import Any

from edgekit.backends.fpga.unrolled.trace import Unrolled, width
from edgekit.errors import UnsupportedOpError

DESIGN_SCHEMA = 1  # history: 1, first
TOP = "edgekit_unrolled"
# Between the beat that comes in and the one that goes out: the registers of the output buffer.
BUFFER_CYCLES = 1

_MASK = 0xFFFFFFFF
_INTEGER_BITS = 32  # of a plain number in Verilog


def write(unrolled: Unrolled, folder: Path) -> tuple[Path, ...]:
    """The Verilog and design.json."""
    folder.mkdir(parents=True, exist_ok=True)
    about = describe(unrolled)
    return (
        _file(folder / f"{TOP}.v", verilog(unrolled)),
        _file(folder / "design.json", json.dumps(about, indent=1) + "\n"),
    )


def describe(unrolled: Unrolled) -> dict[str, Any]:
    """What a simulation or a report has to know; cycles: from the beat in to the beat out, both included."""
    net = unrolled.net
    target = net.tensors[net.output]
    values, bits = _word(unrolled)
    return {
        "schema": DESIGN_SCHEMA,
        "architecture": "unrolled",
        "top": TOP,
        "verilog": [f"{TOP}.v"],
        "memories": [],
        "q": values,
        "word_bits": values * bits,
        "activation_bits": bits,
        "input_shape": [net.input.size],
        "output_shape": [target.size],
        "input_pixel_words": 1,
        "output_pixel_words": 1,
        "input_words": 1,
        "output_words": 1,
        "step_number_bits": 0,
        "steps": [],
        "stages": len(unrolled.stages),
        "cycles": cycles(unrolled),
        "interval": 1,
        "macs": sum(net.macs(layer) for layer in net.layers),
        "adder_bits": unrolled.cost,
        "register_bits": unrolled.register_bits,
    }


def cycles(unrolled: Unrolled) -> int:
    """Latency without stalls: the cycle of the beat, one for each stage, the output buffer."""
    return 1 + len(unrolled.stages) + BUFFER_CYCLES


def _word(unrolled: Unrolled) -> tuple[int, int]:
    """Values of a word and bits of each: both streams have the same words."""
    net = unrolled.net
    target = net.tensors[net.output]
    return max(net.input.size, target.size), max(net.input.bits, target.bits)


def _file(path: Path, text: str) -> Path:
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)
    return path


# --- Verilog -------------------------------------------------------------------------------------------------
def verilog(unrolled: Unrolled) -> str:
    values, bits = _word(unrolled)
    lines: list[str] = []
    moves: list[str] = []
    given = [f"in_data[{i * bits} +: {width(q)}]" for i, q in enumerate(unrolled.stages[0].inp_qint)]
    for number, stage in enumerate(unrolled.stages):
        lines.append(f"// stage {number}")
        for index, interval in enumerate(stage.inp_qint):
            if width(interval):
                lines.append(f"reg [{width(interval) - 1}:0] r{number}_{index};")
                moves.append(f"r{number}_{index} <= {given[index]};")
        lines += _operations(stage, number)
        given = [f"v{number}_{i}[{width(q) - 1}:0]" for i, q in zip(stage.out_idxs, stage.out_qint, strict=True)]
    outputs = unrolled.net.tensors[unrolled.net.output].size
    lines += _results(unrolled.stages[-1], len(unrolled.stages) - 1, bits)
    named = [f"y{i}" for i in range(outputs)]
    padding = [f"{{{(values - outputs) * bits}{{1'b0}}}}"] if values > outputs else []
    return _MODULE.format(
        top=TOP,
        word=values * bits - 1,
        result=outputs * bits - 1,
        last=len(unrolled.stages) - 1,
        lines="\n    ".join(lines),
        moves="\n            ".join(moves),
        results=", ".join(reversed(named)),
        padded=", ".join([*padding, "head"]),
    )


def _operations(stage: Any, number: int) -> Iterator[str]:
    """One wire for each operation of a stage: v<stage>_<index>, signed and wide enough for all its values."""
    for index, op in enumerate(stage.ops):
        bits = _signed_width(op.qint)
        if bits > _INTEGER_BITS:
            raise UnsupportedOpError(f"an addition needs {bits} bits", "fewer bits for weights or inputs, or mac-array")
        yield f"wire signed [{bits - 1}:0] v{number}_{index} = {_expression(stage.ops, number, op)};"


def _results(stage: Any, number: int, bits: int) -> Iterator[str]:
    """The network's outputs, signed words of `bits` bits."""
    for place, index in enumerate(stage.out_idxs):
        value = "0"
        if index >= 0:
            left = stage.out_shifts[place] - _fraction(stage.ops[index].qint)
            value = f"{'0 - ' if stage.out_negs[place] else ''}{_shifted(f'v{number}_{index}', left)}"
        yield f"wire signed [{bits - 1}:0] y{place} = {value};"


def _signed_width(interval: Sequence[float]) -> int:
    """Bits of the wire: one more than needed where no value is negative."""
    return width(interval) + int(interval[0] >= 0)


def _fraction(interval: Sequence[float]) -> int:
    return -int(log2(interval[2]))


def _shifted(name: str, left: int) -> str:
    if left < 0:
        raise UnsupportedOpError(f"an addition would drop {-left} bits", "use mac-array")
    return f"({name} <<< {left})" if left else name


def _expression(ops: Sequence[Any], number: int, op: Any) -> str:
    """Of the operation's integer: its value in its own steps. Plain numbers are 32 bits wide and signed in Verilog."""
    fraction = _fraction(op.qint)

    def scaled(index: int, more: int = 0) -> str:
        """Another operation's value · 2^more, in the steps of this one."""
        return _shifted(f"v{number}_{index}", fraction - _fraction(ops[index].qint) + more)

    if not width(op.qint):
        return "0"
    match abs(op.opcode):
        case 0 | 1 if op.opcode >= 0:
            return f"{scaled(op.id0)} {'-' if op.opcode else '+'} {scaled(op.id1, op.data)}"
        case 1:  # an input of the stage
            register = f"r{number}_{op.id0}"
            return f"$signed({register})" if op.qint[0] < 0 else f"$signed({{1'b0, {register}}})"
        case 2 | 3:
            return _cut(ops, number, op)
        case 4:
            return f"{scaled(op.id0)} {'-' if op.data < 0 else '+'} {abs(op.data)}"
        case 5:
            return str(int(op.data))
        case 6:  # chosen by the highest bit of a third value
            key, shift = op.data & _MASK, (op.data >> 32) & _MASK
            shift -= (shift >> 31) << 32
            top = width(ops[key].qint) - 1
            other = f"{'0 - ' if op.opcode < 0 else ''}{scaled(op.id1, shift)}"
            return f"v{number}_{key}[{top}] ? {scaled(op.id0)} : {other}"
    raise UnsupportedOpError(
        f"da4ml gave operation {op.opcode}, which is not expected of a dense layer", "use mac-array"
    )


def _cut(ops: Sequence[Any], number: int, op: Any) -> str:
    """ReLU, or only the bits that are kept; both drop low bits."""
    value = f"(0 {'-' if op.opcode < 0 else '+'} v{number}_{op.id0})"
    drop = _fraction(ops[op.id0].qint) - _fraction(op.qint)
    if drop < 0:
        raise UnsupportedOpError(f"a cut would add {-drop} bits", "use mac-array")
    kept = f"({value} >>> {drop})"
    if abs(op.opcode) == 2:
        kept = f"{value} < 0 ? 0 : {kept}"
    # the assignment cuts what is signed; a wire of what is never negative has a bit more
    return kept if op.qint[0] < 0 else f"({kept}) & {(1 << width(op.qint)) - 1}"


_MODULE = """// Made by edgekit: a network of dense layers as a pipeline of adders, one inference in each beat.
module {top} (
    input wire clk,
    input wire reset,
    input wire in_valid,
    output wire in_ready,
    input wire [{word}:0] in_data,
    input wire in_last,
    output wire out_valid,
    input wire out_ready,
    output wire [{word}:0] out_data,
    output wire out_last
);
    // all stages move together; a register, so that no path leads from out_ready through the pipeline
    reg go;
    reg [{last}:0] valid;
    {lines}

    always @(posedge clk) begin
        if (go) begin
            {moves}
        end
    end

    // two results wait here: one that is on offer and one that was on its way when the reader stalled
    reg [{result}:0] head, next;
    reg [1:0] count;
    wire push = go && valid[{last}];
    wire pop = out_valid && out_ready;
    wire [1:0] left = count + (push ? 2'd1 : 2'd0) - (pop ? 2'd1 : 2'd0);
    wire [{result}:0] result = {{{results}}};
    always @(posedge clk) begin
        go <= left < 2;
        count <= left;
        if (go) valid <= (valid << 1) | (in_valid ? 1'b1 : 1'b0);
        if (pop || count == 0) head <= count == 2 ? next : result;
        if (push) next <= result;
        if (reset) begin
            go <= 0;
            count <= 0;
            valid <= 0;
        end
    end
    assign in_ready = go;
    assign out_valid = count != 0;
    assign out_last = out_valid;
    assign out_data = {{{padded}}};
endmodule
"""
