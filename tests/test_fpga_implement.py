"""Implementing designs: figures and their labels, what does not fit, time limits; a small design routed for real."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.backends.fpga import implement, tools
from edgekit.backends.fpga.cells import counted
from edgekit.errors import ArtifactError, FitError, ToolError
from edgekit.part import Board, Part
from tests.fpga_dense import dense_net
from tests.fpga_tools import first_on_path, put

BOARD = Board("ULX3S", "G2", 25_000_000, "M1", "L4", 115_200, "LVCMOS33")
PART = Part("LFE5U-25F", "ecp5", "25k", "CABGA381", "6", 24288, 24288, 28, 56, 18, BOARD)
YOSYS = """if [ "$1" = -V ]; then echo Yosys 0.70; exit; fi
cat > counts.json <<'END'
{"design": {"num_cells_by_type": {"LUT4": LUTS, "CCU2C": 10, "TRELLIS_FF": 50, "MULT18X18D": 4, "DP16KD": 3}}}
END
echo '{}' > netlist.json"""
PLACED = """if [ "$1" = --version ]; then echo nextpnr-ecp5 0.11; exit; fi
echo 'Info: 	        TRELLIS_COMB:     130/  24288     0%'
echo 'Info: 	          TRELLIS_FF:      51/  24288     0%'
echo "Warning: Max frequency for clock 'clk': 81.50 MHz (FAIL at 200.00 MHz)" """
ROUTED = (
    PLACED
    + """
echo "Warning: Max frequency for clock 'clk': 70.25 MHz (FAIL at 200.00 MHz)"
echo '{"fmax": {"clk": {"achieved": 70.25, "constraint": 200}}}' > report.json"""
)
PACK = """if [ "$1" = --version ]; then echo ecppack 1.4; exit; fi
echo bits > design.bit"""


def design(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    about = {
        "top": "engine",
        "verilog": ["engine.v"],
        "memories": [],
        "q": 4,
        "word_bits": 32,
        "activation_bits": 8,
        "output_shape": [10],
        "output_pixel_words": 3,
        "input_words": 16,
    }
    (folder / "design.json").write_text(json.dumps(about), encoding="utf-8")
    (folder / "engine.v").write_text("// nothing\n", encoding="utf-8")
    return folder


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tools that stands first on the PATH."""
    put(tmp_path / "bin", "yosys", YOSYS.replace("LUTS", "100"))
    put(tmp_path / "bin", "nextpnr-ecp5", ROUTED)
    put(tmp_path / "bin", "ecppack", PACK)
    first_on_path(tmp_path / "bin", monkeypatch)
    return tmp_path / "bin"


def test_every_figure_has_its_label(fakes: Path, tmp_path: Path) -> None:
    done = implement.implement(design(tmp_path / "d"), PART, tmp_path / "out", 60.0)
    assert done.reached == "bitstream"
    assert (tmp_path / "out" / "design.bit").read_text("utf-8") == "bits\n"
    assert done.utilisation["lut"] == implement.Amount(130, 24288, "placed")
    assert (done.fmax_hz, done.fmax_label) == (70.25e6, "routed")
    assert done.latency_s(1405) == pytest.approx(20e-6)
    assert done.inferences_per_s(2) == pytest.approx(35.125e6)
    assert done.versions == ("yosys 0.70", "nextpnr-ecp5 0.11", "ecppack 1.4")
    assert implement.Implementation.load(tmp_path / "out") == done
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("synthesis.log", "route.log", "pack.log", "board.lpf", "implementation.json", "design.bit"),
    }


def test_a_routing_that_is_ended_leaves_the_placed_clock_and_no_latency(fakes: Path, tmp_path: Path) -> None:
    put(fakes, "nextpnr-ecp5", PLACED + "\nsleep 60")
    done = implement.implement(design(tmp_path / "d"), PART, tmp_path / "out", 3.0)
    assert done.reached == "placement"
    assert (done.fmax_hz, done.fmax_label) == (81.5e6, "placed")
    assert done.utilisation["lut"] == implement.Amount(130, 24288, "placed")
    assert done.latency_s(1000) is None
    assert done.inferences_per_s(1) is None
    assert re.fullmatch(r"place and route was ended by the time limit after \d+ s: route.log", done.stopped)
    assert implement.Implementation.load(tmp_path / "out") == done


def test_a_synthesis_that_is_ended_leaves_its_log(fakes: Path, tmp_path: Path) -> None:
    put(fakes, "yosys", 'if [ "$1" = -V ]; then echo Yosys 0.70; exit; fi\nsleep 60')
    done = implement.implement(design(tmp_path / "d"), PART, tmp_path / "out", 1.0)
    assert (done.reached, done.utilisation, done.fmax_hz) == ("nothing", {}, None)
    assert "synthesis was ended" in done.stopped


def test_what_does_not_fit_is_refused_before_it_is_placed(fakes: Path, tmp_path: Path) -> None:
    put(fakes, "yosys", YOSYS.replace("LUTS", "61000"))
    put(fakes, "nextpnr-ecp5", 'if [ "$1" = --version ]; then echo 0.11; exit; fi\ntouch ran; exit 1')
    with pytest.raises(FitError, match=r"needs 61,020 LUT \(mapped by yosys\), LFE5U-25F has 24,288 — .*mac-array"):
        implement.implement(design(tmp_path / "d"), PART, tmp_path / "out", 60.0)
    assert not (tmp_path / "out" / "route.log").exists()


def test_a_placer_without_room_is_a_fit_error(fakes: Path, tmp_path: Path) -> None:
    put(fakes, "nextpnr-ecp5", "echo 'ERROR: Unable to find legal placement for all cells'; exit 1")
    with pytest.raises(FitError, match="LFE5U-25F: nextpnr-ecp5 ended with code 1: ERROR: Unable to find legal"):
        implement.implement(design(tmp_path / "d"), PART, tmp_path / "out", 60.0)


def test_a_crash_names_the_log_and_leaves_no_record(fakes: Path, tmp_path: Path) -> None:
    put(fakes, "nextpnr-ecp5", "echo 'terminate called after bad_alloc'; exit 134")
    with pytest.raises(ToolError, match=r"code 134: terminate called after bad_alloc — its log is .*route\.log"):
        implement.implement(design(tmp_path / "d"), PART, tmp_path / "out", 60.0)
    with pytest.raises(ArtifactError, match="missing or damaged"):
        implement.Implementation.load(tmp_path / "out")


def test_without_a_board_there_is_no_bitstream(fakes: Path, tmp_path: Path) -> None:
    done = implement.implement(design(tmp_path / "d"), replace(PART, board=None), tmp_path / "out", 60.0)
    assert (done.reached, done.pins, done.bitstream) == ("routing", "bytes", None)
    assert "names no board" in done.stopped


def test_other_families_are_only_mapped(fakes: Path, tmp_path: Path) -> None:
    put(fakes, "yosys", YOSYS.replace('"LUT4": LUTS', '"LUT6": 7, "FDRE": 9, "RAMB18E1": 3'))
    part = Part("XC7A35T", "xilinx", "", "", "", 20800, 41600, 90, 50, 36)
    done = implement.implement(design(tmp_path / "d"), part, tmp_path / "out", 60.0)
    assert (done.reached, done.pins, done.fmax_hz, done.stopped) == ("synthesis", "none", None, "")
    assert {k: (a.used, a.label) for k, a in done.utilisation.items()} == {
        "lut": (7, "estimated"),
        "ff": (9, "estimated"),
        "dsp": (0, "estimated"),
        "ram": (2, "estimated"),
    }


def test_cells_are_counted_as_the_family_builds_them() -> None:
    cells = {"LUT4": 10, "CCU2C": 3, "PFUMX": 2, "TRELLIS_DPR16X4": 1, "TRELLIS_FF": 4, "$scopeinfo": 9}
    assert counted("ecp5", cells) == {"lut": 22, "ff": 4, "dsp": 0, "ram": 0}
    assert counted("ice40", {"SB_LUT4": 5, "SB_CARRY": 4, "SB_DFFESR": 2, "SB_MAC16": 1})["ff"] == 2
    assert counted("gowin", {"LUT3": 1, "ALU": 2, "DFFRE": 1, "SDPB": 2, "pROM": 1}) == {
        "lut": 3,
        "ff": 1,
        "dsp": 0,
        "ram": 3,
    }


def test_what_is_no_design_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no FPGA design"):
        implement.implement(tmp_path, PART, tmp_path / "out", 60.0)


# LFE5U-25F: Project Trellis' device table; the bitstream carries it
IDCODE_25F = bytes.fromhex("41111043")


def test_a_small_design_is_routed(tmp_path: Path) -> None:
    pytest.importorskip("da4ml", reason="da4ml of the extra 'fpga'")
    for name in ("yosys", "nextpnr-ecp5", "ecppack"):
        if not tools.available(name):
            pytest.skip(f"{name} is not installed")
    from edgekit.backends.fpga.unrolled import trace, write

    write.write(trace.unroll(dense_net((4, 3, 2), 4, 1)), tmp_path / "d")
    told: list[str] = []
    done = implement.implement(tmp_path / "d", PART, tmp_path / "out", 400.0, told.append)
    assert done.reached == "bitstream", done.stopped
    assert any("nextpnr-ecp5: Routing" in line for line in told)
    assert done.fmax_label == "routed"
    assert done.fmax_hz is not None
    log = (tmp_path / "out" / "route.log").read_text("utf-8")
    assert f"{done.fmax_hz / 1e6:.2f} MHz" in log
    assert re.search(rf"TRELLIS_COMB:\s+{done.utilisation['lut'].used}/", log)
    assert IDCODE_25F in (tmp_path / "out" / "design.bit").read_bytes()
