"""Runs a written design in a simulator: Verilator, Icarus Verilog or yosys' CXXRTL, with the same vectors and gaps.

A design is a folder with Verilog, contents of memories and a `design.json`: top, verilog, memories (names of files),
word_bits, activation_bits, q (values of a word), input_shape, output_shape, input_words, output_words (of an
inference), input_pixel_words, output_pixel_words (of one position, channels innermost), step_number_bits (0: none) and
steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.backends.fpga.simulators import HARNESS, LOG, SIMULATORS, Found, Job, Tool
from edgekit.errors import ArtifactError, ConversionMismatchError, MissingExtraError, ShapeError, WorkerError

Array = np.ndarray[Any, Any]

RUN_SECONDS = 3600.0


@dataclass(frozen=True, eq=False)
class Result:
    """outputs: int8 (n, *output shape). cycles: int64 (n,), from an inference's first word in to its last word out.

    step_cycles: int64 (n, steps + 2): loading, each step of design.json, sending. log: of the build and the run.
    """

    tool: Tool
    version: str
    outputs: Array
    cycles: Array
    step_cycles: Array
    log: Path


def simulate(
    design: Path,
    x: Array,
    tool: Tool,
    stalls: int | None = None,
    cache: Path | None = None,
    seconds: float = RUN_SECONDS,
) -> Result:
    """x: integers (n, *input shape). stalls: seed of random gaps on both streams. cache: folder of compiled simulators.

    Raises MissingExtraError without the tool, ArtifactError for a folder that is no design, WorkerError for a tool
    that fails or takes longer than `seconds`, ShapeError for other inputs.
    """
    about = _description(design)
    if tuple(x.shape[1:]) != tuple(about["input_shape"]) or not len(x) or not np.issubdtype(x.dtype, np.integer):
        raise ShapeError(
            f"input of shape {x.shape}, {x.dtype}; the design takes integers (n, {about['input_shape']})",
            "quantize samples with `IntegerNet.quantized`",
        )
    if stalls is not None and not 0 < stalls < 1 << 31:
        raise ShapeError(f"a seed of {stalls}", "give one from 1 to 2^31 - 1")
    simulator, job = SIMULATORS[tool], _job(about)
    found = simulator.find()
    built = _built(tool, found, job, design, cache or default_cache())
    with tempfile.TemporaryDirectory(prefix="edgekit-sim-") as scratch:
        folder = Path(scratch)
        for name in job.memories:
            shutil.copy(design / name, folder / name)
        log = built / f"run-{os.getpid()}.txt"
        try:
            words = simulator.run(found, job, built, folder, packed(x, about), len(x), stalls or 0, seconds)
        finally:
            if (folder / LOG).is_file():
                shutil.copy(folder / LOG, log)
        counted = _cycles(tool, folder / "cycles.txt", len(x))
    if len(words) != len(x) * job.output_words:
        raise WorkerError(f"{tool} gave {len(words)} output words for {len(x)} inferences", f"see {log}")
    return Result(tool, found.version, unpacked(words, len(x), about), counted[:, 0], counted[:, 1:], log)


def simulate_in(design: Path, x: Array, tools: Sequence[Tool], stalls: int | None = None) -> dict[Tool, Result]:
    """The same vectors in several simulators. Raises ConversionMismatchError where they disagree."""
    results = {tool: simulate(design, x, tool, stalls) for tool in tools}
    first = results[tools[0]]
    for tool, result in results.items():
        for what in ("outputs", "cycles", "step_cycles"):
            if not np.array_equal(getattr(first, what), getattr(result, what)):
                raise ConversionMismatchError(
                    f"{tools[0]} and {tool} disagree in the {what.replace('_', ' ')} of '{design}'",
                    f"keep the folder and report it; logs: {first.log}, {result.log}",
                )
    return results


def available(tool: Tool) -> bool:
    """Whether the tool and what it needs are installed."""
    try:
        SIMULATORS[tool].find()
    except MissingExtraError:
        return False
    return True


def default_cache() -> Path:
    """Folder of compiled simulators: edgekit/fpga in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "edgekit" / "fpga"


# --- the design ----------------------------------------------------------------------------------------------
def _description(design: Path) -> dict[str, Any]:
    try:
        about = json.loads((design / "design.json").read_text(encoding="utf-8"))
        _job(about)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"'{design}' is no FPGA design ({type(error).__name__}: {error})", "write it with `edgekit convert`"
        ) from error
    return dict(about)


def _job(about: Mapping[str, Any]) -> Job:
    steps = int(about["step_number_bits"])
    return Job(
        top=str(about["top"]),
        verilog=tuple(about["verilog"]),
        memories=tuple(about["memories"]),
        word_bits=int(about["word_bits"]),
        input_words=int(about["input_words"]),
        output_words=int(about["output_words"]),
        output_pixel_words=int(about["output_pixel_words"]),
        output_pixel_used=-(-int(about["output_shape"][-1]) // int(about["q"])),
        step_bits=steps,
        step_values=len(about["steps"]) + 2 if steps else 1,
    )


def _built(tool: Tool, found: Found, job: Job, design: Path, cache: Path) -> Path:
    """The folder of the compiled design: from the cache, or made beside its place and then renamed."""
    memories = job.memories if SIMULATORS[tool].contents else ()
    digest = hashlib.sha256(f"{tool} {found} {job}".encode())
    try:
        for name in (*job.verilog, *memories):
            digest.update(name.encode() + (design / name).read_bytes())
    except OSError as error:
        raise ArtifactError(f"'{design}' lacks '{name}'", "write the design again") from error
    texts = {name: resources.files(__package__).joinpath("harness", name).read_text("utf-8") for name in HARNESS}
    digest.update(repr(texts).encode())
    built = cache / f"{tool}-{digest.hexdigest()[:24]}"
    if (built / "done").is_file():
        return built
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as scratch:
        folder = Path(scratch) / "built"
        folder.mkdir()
        for name in (*job.verilog, *job.memories):
            shutil.copy(design / name, folder / name)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        try:
            SIMULATORS[tool].build(found, job, folder)
        except WorkerError:
            if (folder / LOG).is_file():
                shutil.copy(folder / LOG, cache / f"{built.name}-failed.txt")
            raise
        (folder / "done").write_text(found.version + "\n", encoding="utf-8")
        shutil.rmtree(built, ignore_errors=True)
        folder.replace(built)
    return built


def _cycles(tool: Tool, path: Path, n: int) -> Array:
    """int64 (n, 1 + steps). Raises WorkerError for what the harness found wrong."""
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    wrong = [line for line in lines if line.startswith("error")]
    if wrong or len(lines) != n:
        told = wrong[0] if wrong else f"it ended after {len(lines)} of {n} inferences"
        raise WorkerError(f"the design failed in {tool}: {told}", "report it with the design")
    return np.array([[int(v) for v in line.split()] for line in lines], np.int64)


# --- words on the streams ------------------------------------------------------------------------------------
def packed(x: Array, about: Mapping[str, Any]) -> Array:
    """Integers (n, ...) -> uint32 (n · words, chunks): q values of activation_bits a word, 0 where channels end."""
    rows, bits, q = x.reshape(-1, x.shape[-1]), int(about["activation_bits"]), int(about["q"])
    pixel = q * int(about["input_pixel_words"])
    values = np.pad(rows, ((0, 0), (0, pixel - rows.shape[1]))).astype(np.int64).reshape(-1, q)
    stream = ((values[:, :, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(len(values), q * bits)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<u4")


def unpacked(words: Array, n: int, about: Mapping[str, Any]) -> Array:
    """uint32 (n · words, chunks) -> int8 (n, *output shape)."""
    bits, q, shape = int(about["activation_bits"]), int(about["q"]), tuple(about["output_shape"])
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")[:, : q * bits]
    values = (stream.reshape(len(words), q, bits).astype(np.int64) << np.arange(bits)).sum(axis=2)
    values = np.where(values >> (bits - 1), values - (1 << bits), values).astype(np.int8)
    pixels = values.reshape(-1, q * int(about["output_pixel_words"]))
    return np.asarray(pixels[:, : shape[-1]].reshape(n, *shape))
