"""The [part] table of target files."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edgekit.backends.fpga.implement import constraints
from edgekit.errors import TargetFileError
from edgekit.part import read_part
from edgekit.target import load_target, read_target, target_files

PART = """
name = "LFE5U-25F"
family = "ecp5"
device = "25k"
package = "CABGA381"
speed = "6"
lut = 24288
ff = 24288
dsp = 28
ram_blocks = 56
ram_kbit = 18
"""
BOARD = """
[board]
name = "ULX3S"
clock_pin = "G2"
clock_hz = 25000000
receive = "M1"
transmit = "L4"
baud = 115200
bank = "LVCMOS33"
"""
PATH = Path("mine.toml")


def test_a_part_and_its_board_are_read() -> None:
    part = read_part(PATH, tomllib.loads(PART + BOARD))
    assert (part.name, part.lut, part.block_rams, part.routed) == ("LFE5U-25F", 24288, 56, True)
    assert part.board is not None
    assert part.board.clock_hz == 25_000_000
    assert 'LOCATE COMP "clk" SITE "G2";' in constraints(part)
    assert 'LOCATE COMP "transmit" SITE "L4";' in constraints(part)


def test_blocks_of_another_size_are_counted_in_18_kbit() -> None:
    row = tomllib.loads(PART) | {"family": "xilinx", "ram_blocks": 50, "ram_kbit": 36}
    part = read_part(PATH, row)
    assert part.block_rams == 100
    assert not part.routed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PART.replace('"ecp5"', '"ecp6"'), "family = 'ecp6' — one of ecp5, xilinx, ice40, gowin"),
        (PART.replace("lut = 24288", "lut = 0"), "lut = 0 — give a number from 1"),
        (PART.replace("dsp = 28", "dsp = true"), "dsp = True"),
        (PART.replace("lut =", "luts ="), r"unknown key 'luts' in \[part\] — perhaps you meant 'lut'"),
        (PART.replace("ram_kbit = 18", ""), r"lacks the key 'ram_kbit' in \[part\]"),
        (PART.replace('device = "25k"', ""), "ECP5 lacks device, package or speed"),
        (PART.replace('name = "LFE5U-25F"', 'name = "a; rm"'), "name = 'a; rm'"),
        (PART + BOARD.replace('"G2"', '"2G"'), "clock_pin = '2G' — give a ball"),
        (PART + BOARD.replace("baud = 115200", ""), r"lacks the key 'baud' in \[part.board\]"),
        (PART + "board = 1\n", "part.board = 1"),
    ],
)
def test_what_is_no_part_is_refused(text: str, message: str) -> None:
    with pytest.raises(TargetFileError, match=message):
        read_part(PATH, tomllib.loads(text))


def test_a_target_file_may_have_a_part(tmp_path: Path) -> None:
    text = 'schema = 1\ndescription = "mine"\ncandidates = [{ backend = "onnxruntime", precision = "int8" }]\n'
    (tmp_path / "mine.toml").write_text(text + "[part]" + PART + BOARD.replace("[board]", "[part.board]"), "utf-8")
    target = read_target(tmp_path / "mine.toml")
    assert target.part is not None
    assert target.part.board is not None
    (tmp_path / "bad.toml").write_text(text + "part = 1\n", "utf-8")
    with pytest.raises(TargetFileError, match=r"part = 1 — give a table \[part\]"):
        read_target(tmp_path / "bad.toml")


# LFE5U-12F, -25F, -45F and -85F: multipliers and block RAMs of Lattice FPGA-DS-02012, table 1.1
LATTICE = {"12k": (28, 32), "25k": (28, 56), "45k": (72, 108), "85k": (156, 208)}


@pytest.mark.parametrize("name", sorted(n for n in target_files() if n.startswith("fpga-")))
def test_shipped_parts_have_what_the_data_sheet_says(name: str) -> None:
    part = load_target(name).part
    if part is not None and part.family == "ecp5":
        assert (part.dsp, part.block_rams) == LATTICE[part.device]
        assert part.board is not None
