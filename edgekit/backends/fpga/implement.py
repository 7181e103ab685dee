"""Implements a written design on a part: yosys maps it, nextpnr places and routes it, ecppack makes the bitstream.

Every figure has a label: *estimated* (mapped to the family's cells, not placed), *placed* or *routed*. A design for a
part with a board gets a serial port (pins/serial.v), one for a part without gets streams of bytes at its pins; what
they take is counted.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from edgekit.backends.fpga import tools
from edgekit.backends.fpga.cells import COUNTED, Counts, counted
from edgekit.errors import ArtifactError, FitError, ToolError
from edgekit.part import Part

Label = Literal["estimated", "placed", "routed"]

IMPLEMENTATION_SCHEMA = 1  # history: 1, first
RECORD = "implementation.json"
BITSTREAM = "design.bit"
DEFAULT_SECONDS = 3600.0
# What timing-driven placement aims at. Above what these designs reach, so that it does not stop early.
DEFAULT_CLOCK_HZ = 200_000_000
DEFAULT_SEED = 1

_NETLIST, _CONFIG, _REPORT, _CONSTRAINTS = "netlist.json", "design.config", "report.json", "board.lpf"
_SYNTHESIS: Mapping[str, str] = {
    "ecp5": "synth_ecp5 -top {top} -json netlist.json",
    "xilinx": "synth_xilinx -family xc7 -flatten -top {top}",
    "ice40": "synth_ice40 -device u -dsp -top {top}",
    "gowin": "synth_gowin -top {top}",
}
# What nextpnr says when something is not on the part or finds no place.
_NO_ROOM = re.compile(
    r"(unable to (?:find (?:a |legal )?placement|place)|no (?:more )?(?:BELs|bels) (?:remaining|left)|"
    r"exceed.* available|not enough)",
    re.IGNORECASE,
)
_MAX_FREQUENCY = re.compile(r"Max frequency for clock\s+'[^']*':\s*([\d.]+) MHz")
_UTILISED = re.compile(r"Info:\s+(\w+):\s+(\d+)/\s*(\d+)\s+\d+%")


@dataclass(frozen=True)
class Amount:
    """used of total. label: how well it is known."""

    used: int
    total: int
    label: Label


@dataclass(frozen=True)
class Implementation:
    """What was reached. fmax_hz: None where nothing was placed; only a routed one gives a latency.

    reached: the last step that ended. stopped: why it is not the last of all, in words; "" if it is. pins: of the top
    module. seconds: of each step that ran.
    """

    part: str
    pins: Literal["serial", "bytes", "none"]
    utilisation: Mapping[str, Amount]
    fmax_hz: float | None
    fmax_label: Label | None
    reached: Literal["nothing", "synthesis", "placement", "routing", "bitstream"]
    stopped: str
    seconds: Mapping[str, float]
    versions: tuple[str, ...]
    seed: int
    bitstream: str | None

    def latency_s(self, cycles: int) -> float | None:
        """Of so many clock cycles; None without a routed clock."""
        return cycles / self.fmax_hz if self.fmax_hz and self.fmax_label == "routed" else None

    def inferences_per_s(self, interval: int) -> float | None:
        """With one inference every `interval` cycles; None without a routed clock."""
        return self.fmax_hz / interval if self.fmax_hz and self.fmax_label == "routed" else None

    def to_json(self) -> str:
        return json.dumps({"schema": IMPLEMENTATION_SCHEMA, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> Implementation:
        """Of a folder that `implement` wrote. Raises ArtifactError."""
        try:
            data = json.loads((path / RECORD).read_text(encoding="utf-8"))
            if data.pop("schema") != IMPLEMENTATION_SCHEMA:
                raise ArtifactError(f"'{path / RECORD}' is of another schema", "implement the design again")
            amounts = {k: Amount(**v) for k, v in data.pop("utilisation").items()}
            return Implementation(utilisation=amounts, versions=tuple(data.pop("versions")), **data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"'{path / RECORD}' is missing or damaged ({error})", "implement again") from error


def implement(
    design: Path,
    part: Part,
    folder: Path,
    seconds: float = DEFAULT_SECONDS,
    progress: tools.Progress | None = None,
    clock_hz: int = DEFAULT_CLOCK_HZ,
    seed: int = DEFAULT_SEED,
) -> Implementation:
    """Writes logs, implementation.json and, for a board, design.bit into `folder`.

    seconds: for all tools together; what was reached by then is what is returned. Raises MissingExtraError for a tool
    that is not installed, FitError for a design that the part has no room for, ToolError for a tool that fails.
    """
    about = _about(design)
    yosys = tools.find("yosys")
    router = [tools.find("nextpnr-ecp5"), tools.find("ecppack")] if part.routed else []
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RECORD, BITSTREAM):
        (folder / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".work-") as scratch:
        work = _Work(Path(scratch), folder, part, about, time.monotonic() + seconds, progress, seed, clock_hz)
        work.copy(design)
        done = work.synthesize(yosys)
        if part.routed and done.reached == "synthesis":
            done = work.route(router[0], done)
            if done.reached == "routing":
                done = work.pack(router[1], done)
    staged = folder / f".{RECORD}.new"
    staged.write_text(done.to_json(), encoding="utf-8")
    staged.replace(folder / RECORD)
    return done


def _about(design: Path) -> dict[str, Any]:
    try:
        about = json.loads((design / "design.json").read_text(encoding="utf-8"))
        return dict(about)
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"'{design}' is no FPGA design ({error})", "write it with `edgekit convert`") from error


def check_fit(part: Part, used: Mapping[str, int], told: str) -> None:
    """Raises FitError with every count that is beyond the part's. told: where the counts are from."""
    totals = _totals(part)
    beyond = [k for k, total in totals.items() if used.get(k, 0) > total]
    if beyond:
        needs = ", ".join(f"{used[k]:,} {COUNTED[k]}" for k in beyond)
        has = ", ".join(f"{totals[k]:,}" for k in beyond)
        raise FitError(f"the design needs {needs} ({told}), {part.name} has {has}", REMEDY)


REMEDY = "a larger part, mac-array, fewer bits or pruning"


def _totals(part: Part) -> dict[str, int]:
    return {"lut": part.lut, "ff": part.ff, "dsp": part.dsp, "ram": part.ram_blocks}


@dataclass(frozen=True)
class _Work:
    """One implementation in its scratch folder."""

    scratch: Path
    folder: Path
    part: Part
    about: Mapping[str, Any]
    deadline: float
    progress: tools.Progress | None
    seed: int
    clock_hz: int

    @property
    def pins(self) -> Literal["serial", "bytes", "none"]:
        if self.part.board is not None:
            return "serial"
        return "bytes" if self.part.routed else "none"

    @property
    def top(self) -> str:
        return {"serial": "edgekit_serial", "bytes": "edgekit_bytes", "none": str(self.about["top"])}[self.pins]

    def copy(self, design: Path) -> None:
        try:
            for name in (*self.about["verilog"], *self.about["memories"]):
                shutil.copy(design / name, self.scratch / name)
        except (OSError, KeyError) as error:
            raise ArtifactError(f"'{design}' is no whole FPGA design ({error})", "write the design again") from error
        for name in PIN_FILES:
            text = resources.files(__package__).joinpath("pins", name).read_text("utf-8")
            (self.scratch / name).write_text(text, encoding="utf-8")

    def run(self, tool: tools.FoundTool, arguments: list[str], log: str) -> tools.Ran:
        left = max(0.0, self.deadline - time.monotonic())
        return tools.run(tool, arguments, self.scratch, self.folder / log, left, self.progress)

    def synthesize(self, yosys: tools.FoundTool) -> Implementation:
        (self.scratch / "synthesis.ys").write_text("\n".join(self._script()) + "\n", encoding="utf-8")
        ran = self.run(yosys, ["-s", "synthesis.ys"], "synthesis.log")
        empty = Implementation(
            part=self.part.name,
            pins=self.pins,
            utilisation={},
            fmax_hz=None,
            fmax_label=None,
            reached="nothing",
            stopped=_late("synthesis", ran),
            seconds={"synthesis": ran.seconds},
            versions=(tools.version(yosys),),
            seed=self.seed,
            bitstream=None,
        )
        if ran.code is None:
            return empty
        counts = counted(self.part.family, json.loads((self.scratch / "counts.json").read_text(encoding="utf-8")))
        check_fit(self.part, counts, "mapped by yosys")
        return replace(empty, utilisation=self._amounts(counts, "estimated"), reached="synthesis", stopped="")

    def _script(self) -> list[str]:
        files = [f"read_verilog {' '.join(self.about['verilog'])}"]
        if self.pins != "none":
            files.append(f"read_verilog -DDESIGN={self.about['top']} {' '.join(PIN_FILES)}")
            files += [f"chparam -set {k} {v} {self.top}" for k, v in pin_parameters(self.about, self.part).items()]
        return [*files, _SYNTHESIS[self.part.family].format(top=self.top), "tee -q -o counts.json stat -json"]

    def _amounts(self, counts: Counts, label: Label) -> dict[str, Amount]:
        totals = _totals(self.part)
        return {k: Amount(v, totals[k], label) for k, v in counts.items()}

    def route(self, nextpnr: tools.FoundTool, before: Implementation) -> Implementation:
        arguments = [
            *(f"--{self.part.device}", "--package", self.part.package, "--speed", self.part.speed),
            *("--json", _NETLIST, "--textcfg", _CONFIG, "--report", _REPORT, "--seed", str(self.seed)),
            *("--freq", f"{self.clock_hz / 1e6:g}", "--timing-allow-fail"),
        ]
        if self.part.board is not None:
            (self.scratch / _CONSTRAINTS).write_text(constraints(self.part), encoding="utf-8")
            shutil.copy(self.scratch / _CONSTRAINTS, self.folder / _CONSTRAINTS)
            arguments += ["--lpf", _CONSTRAINTS]
        log = self.folder / "route.log"
        try:
            ran = self.run(nextpnr, arguments, log.name)
        except ToolError as error:
            if _NO_ROOM.search(error.what):
                raise FitError(f"{self.part.name}: {error.what}", REMEDY) from error
            raise
        told = log.read_text(encoding="utf-8", errors="replace")
        return self._routed(before, ran, told, tools.version(nextpnr))

    def _routed(self, before: Implementation, ran: tools.Ran, told: str, version: str) -> Implementation:
        """What the log says; a run that was ended has the clock after placement, if it came so far."""
        placed = {name: int(used) for name, used, _ in _UTILISED.findall(told)}
        clocks = [float(mhz) * 1e6 for mhz in _MAX_FREQUENCY.findall(told)]
        utilisation = dict(before.utilisation)
        if placed and clocks:
            utilisation = self._amounts(counted("nextpnr-ecp5", placed), "placed")
        fmax: float | None = clocks[0] if clocks else None
        if ran.code is not None:
            report = json.loads((self.scratch / _REPORT).read_text(encoding="utf-8"))
            fmax = min((float(c["achieved"]) * 1e6 for c in report["fmax"].values()), default=None)
        ended = ran.code is not None
        return replace(
            before,
            utilisation=utilisation,
            fmax_hz=fmax,
            fmax_label=None if fmax is None else "routed" if ended else "placed",
            reached="routing" if ended else "placement" if clocks else "synthesis",
            stopped=_late("place and route", ran),
            seconds={**before.seconds, "place and route": ran.seconds},
            versions=(*before.versions, version),
        )

    def pack(self, ecppack: tools.FoundTool, before: Implementation) -> Implementation:
        if self.part.board is None:
            return replace(before, stopped="no bitstream: the target names no board, so no pin is where it belongs")
        ran = self.run(ecppack, ["--compress", "--input", _CONFIG, "--bit", BITSTREAM], "pack.log")
        if ran.code is None:
            return replace(before, stopped=_late("packing", ran))
        (self.scratch / BITSTREAM).replace(self.folder / BITSTREAM)
        return replace(
            before,
            reached="bitstream",
            seconds={**before.seconds, "packing": ran.seconds},
            versions=(*before.versions, tools.version(ecppack)),
            bitstream=BITSTREAM,
        )


def _late(step: str, ran: tools.Ran) -> str:
    return (
        "" if ran.code is not None else f"{step} was ended by the time limit after {ran.seconds:.0f} s: {ran.log.name}"
    )


# --- pins ----------------------------------------------------------------------------------------------------
PIN_FILES = ("bytes.v", "serial.v")


def pin_parameters(about: Mapping[str, Any], part: Part) -> dict[str, int]:
    """Of the module at the pins: bytes of a word of each stream, and a serial line's bit in clock cycles."""
    bits = int(about["activation_bits"])
    channels = (
        min(int(about["q"]), int(about["output_shape"][-1])) if about["output_pixel_words"] == 1 else int(about["q"])
    )
    parameters = {
        "WORD": int(about["word_bits"]),
        "IN_BYTES": -(-int(about["word_bits"]) // 8),
        "OUT_BYTES": -(-channels * bits // 8),
    }
    if part.board is not None:
        parameters["IN_WORDS"] = int(about["input_words"])
        parameters["DIVISOR"] = round(part.board.clock_hz / part.board.baud)
    return parameters


def constraints(part: Part) -> str:
    """Lattice preference file of the three pins of serial.v."""
    board = part.board
    if board is None:
        return ""
    lines = [f"# {board.name}: clock {board.clock_hz / 1e6:g} MHz, serial line of {board.baud} baud"]
    for port, ball in (("clk", board.clock_pin), ("receive", board.receive), ("transmit", board.transmit)):
        lines.append(f'LOCATE COMP "{port}" SITE "{ball}";')
        lines.append(f'IOBUF PORT "{port}" IO_TYPE={board.bank};')
    return "\n".join(lines) + "\n"
