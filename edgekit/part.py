"""An FPGA part and the board it is on: the `[part]` table of a target file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgekit.errors import TargetFileError

Family = Literal["ecp5", "xilinx", "ice40", "gowin"]

KBIT_OF_A_BLOCK = 18  # the size in which block RAMs are counted when parts are compared
_BALL = re.compile(r"[A-Z]{1,2}\d{1,2}")


@dataclass(frozen=True)
class Board:
    """How a design gets its clock and speaks with a host: pins are balls of the package.

    receive, transmit: of a serial line at `baud`, seen from the FPGA. bank: the I/O standard of these pins.
    """

    name: str
    clock_pin: str
    clock_hz: int
    receive: str
    transmit: str
    baud: int
    bank: str


@dataclass(frozen=True)
class Part:
    """What a part has. device, package, speed: as the place-and-route tool calls them, "" where it does not ask.

    lut, ff: lookup tables and flip-flops. dsp: multipliers of 18 × 18 bits or of the family's size. ram_blocks: of
    ram_kbit each. routed: whether an open tool places and routes this family here, or only maps it to its primitives.
    """

    name: str
    family: Family
    device: str
    package: str
    speed: str
    lut: int
    ff: int
    dsp: int
    ram_blocks: int
    ram_kbit: int
    board: Board | None = None

    @property
    def routed(self) -> bool:
        return self.family == "ecp5"

    @property
    def block_rams(self) -> int:
        """Block RAM in blocks of 18 kbit."""
        return self.ram_blocks * self.ram_kbit // KBIT_OF_A_BLOCK


_PART_KEYS = ("name", "family", "lut", "ff", "dsp", "ram_blocks", "ram_kbit")
_PART_TEXTS = ("device", "package", "speed")
_BOARD_KEYS = ("name", "clock_pin", "clock_hz", "receive", "transmit", "baud", "bank")


def read_part(path: Path, row: Any) -> Part:
    """The table of a target file `path`. Raises TargetFileError for unknown or missing keys and for other values."""
    table = _table(path, "part", row, (*_PART_KEYS, *_PART_TEXTS, "board"), _PART_KEYS)
    if table["family"] not in get_args(Family):
        raise TargetFileError(
            f"target file '{path}': family = {table['family']!r}", "one of " + ", ".join(get_args(Family))
        )
    if table["family"] == "ecp5" and not all(table.get(key) for key in _PART_TEXTS):
        raise TargetFileError(f"target file '{path}': [part] of ECP5 lacks device, package or speed", "add them")
    return Part(
        name=_text(path, "name", table["name"]),
        family=table["family"],
        **{key: _text(path, key, table[key]) if key in table else "" for key in _PART_TEXTS},
        lut=_count(path, "lut", table["lut"], 1),
        ff=_count(path, "ff", table["ff"], 1),
        dsp=_count(path, "dsp", table["dsp"], 0),
        ram_blocks=_count(path, "ram_blocks", table["ram_blocks"], 0),
        ram_kbit=_count(path, "ram_kbit", table["ram_kbit"], 1),
        board=_board(path, table["board"]) if "board" in table else None,
    )


def _board(path: Path, row: Any) -> Board:
    table = _table(path, "part.board", row, _BOARD_KEYS, _BOARD_KEYS)
    for key in ("clock_pin", "receive", "transmit"):
        if not isinstance(table[key], str) or not _BALL.fullmatch(table[key]):
            raise TargetFileError(f"target file '{path}': {key} = {table[key]!r}", 'give a ball such as "G2"')
    return Board(
        name=_text(path, "name", table["name"]),
        clock_pin=table["clock_pin"],
        clock_hz=_count(path, "clock_hz", table["clock_hz"], 1),
        receive=table["receive"],
        transmit=table["transmit"],
        baud=_count(path, "baud", table["baud"], 1),
        bank=_text(path, "bank", table["bank"]),
    )


def _table(path: Path, name: str, row: Any, known: tuple[str, ...], required: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise TargetFileError(f"target file '{path}': {name} = {row!r}", f"give a table [{name}]")
    for key in row:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"perhaps you meant '{near[0]}'" if near else "known keys: " + ", ".join(known)
            raise TargetFileError(f"target file '{path}' has an unknown key '{key}' in [{name}]", hint)
    for key in required:
        if key not in row:
            raise TargetFileError(f"target file '{path}' lacks the key '{key}' in [{name}]", "add it")
    return row


def _text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w][\w .+/()-]*", value):
        raise TargetFileError(f"target file '{path}': {key} = {value!r}", "give a short text")
    return value


def _count(path: Path, key: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TargetFileError(f"target file '{path}': {key} = {value!r}", f"give a number from {least}")
    return value
