"""What edgekit's search takes beside NNCF's accuracy control, on the same models and samples; writes SEARCH-TIME.md.

    EDGEKIT_ZOO=FOLDER EDGEKIT_KERAS_PYTHON=PYTHON python benchmarks/peers/search_time.py [--models A,B] [--rounds 3]

The sides take turns. Each run is a process of its own, measured from its start to its end: imports are in it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import models
import numpy as np
from environments import python_of
from models import Case
from process import Outcome, run
from run import environment, judge
from table import machine_words
from toolbox import SCRIPTS

HERE = Path(__file__).parent
SAMPLES, OTHERS, DROP = 256, 500, 0.005  # calibration, and labelled ones to keep the budget on
TIMEOUT_S = 600.0
LARGE = "mobilenet_v2_96"  # of keras.applications, with random weights: time depends on the shapes
LABELLED = ("mlp_784", "mobilenet_v2_cifar", "resnet8")
LIMITS = {"resnet8": 60.0, LARGE: 180.0}  # seconds on two cores
LIMIT_MB = 2000
HEADER = """# What the search takes

`EDGEKIT_ZOO=FOLDER EDGEKIT_KERAS_PYTHON=PYTHON python benchmarks/peers/search_time.py` writes this page.

{date}, {machine}. {versions}.

{samples} calibration samples; accuracy control and edgekit's budget, both {drop}, look at the same {others} other
samples, which have labels. Whole processes, {rounds} of each in turns (of the whole command one), every figure shown;
one thread for what OpenMP and BLAS run, the runtimes' threads as they come. **CPU s**: user and system time of all
threads and children; other work on the machine raises it where two threads share a core. **s**: from start to end,
which other work raises much: before the runs the load was {low:.1f} to {high:.1f} per core. **peak MB**: resident
memory, what processes share counted for each. Quality is that of the last file, in its runtime, on test samples that
nobody saw, as in [RESULTS.md](RESULTS.md).

- **auto**: edgekit reads the model, searches, and writes the int8 file for ONNX Runtime. **auto, max drop**: within the
  budget.
- **edgekit convert**: the whole command, `-t cpu --precision int8`, which also writes float32 and int8 for three
  runtimes, measures which layers do the damage, and proves every file against the original.
- **accuracy control**: `nncf.quantize_with_accuracy_control` on the OpenVINO model, its other options as they come.
"""


@dataclass(frozen=True)
class Side:
    """One way to int8. words: as the page has it. script: of `tools`, with its variant; "" is the whole command.

    once: not in every round.
    """

    words: str
    environment: str
    script: str = ""
    variant: str = ""
    once: bool = False

    def command(self, case: Case, out: Path, envs: Path) -> list[str]:
        python = python_of(self.environment, envs)
        if self.script:
            return [python, str(SCRIPTS / self.script), str(case.folder), str(out), self.variant]
        told = ["-t", "cpu", "--precision", "int8", "--data", str(case.folder / "calib.npz")]
        return [python, "-m", "edgekit", "convert", str(case.model), *told, "-o", str(out / "build")]


AUTO = Side("edgekit, auto", "own", "edgekit_quantize.py", "auto")
BUDGET = Side(f"edgekit, auto, max drop {DROP}", "own", "edgekit_quantize.py", f"auto, max drop {DROP}")
COMMAND = Side("edgekit convert", "own", once=True)
NNCF = Side(
    f"NNCF, accuracy control, max drop {DROP}",
    "nncf",
    "static_nncf.py",
    f"openvino: accuracy control, max drop {DROP}",
)


@dataclass(frozen=True)
class Measured:
    """All runs of one side on one model, and what the judge says of the last file. load: per core, at each start."""

    side: Side
    runs: tuple[Outcome, ...]
    load: tuple[float, ...]
    quality: dict[str, Any]
    versions: dict[str, str]
    verdict: str

    def cpu_s(self) -> float:
        return statistics.median(r.cpu_seconds for r in self.runs)


def prepared(name: str, work: Path) -> Case:
    """A model with SAMPLES to calibrate with and, in validation.npz, OTHERS that are none of them."""
    if name == LARGE:
        return large(work / LARGE)
    case = models.prepare(name, None, work, SAMPLES)
    known = np.load(case.folder / "validation.npz")
    np.savez(
        case.folder / "validation.npz",
        allow_pickle=False,
        **{k: known[k][SAMPLES : SAMPLES + OTHERS] for k in known.files},
    )
    return case


def large(folder: Path) -> Case:
    """MobileNetV2 at 96×96, and photographs with their mirror images."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "MobileNetV2.keras"
    if not source.is_file():
        python = os.environ.get("EDGEKIT_KERAS_PYTHON", sys.executable)
        script = HERE.parent / "pruning" / "speed_keras.py"
        subprocess.run([python, str(script), str(folder), "96", "MobileNetV2"], check=True)
        import onnx_ir as ir

        from edgekit import pipeline

        ir.save(pipeline.load(source).model, folder / "model.onnx")
    import onnx

    name = onnx.load(folder / "model.onnx", load_external_data=False).graph.input[0].name
    x = np.load(Path(os.environ["EDGEKIT_ZOO"]) / "data" / "imagenet_photos_96.npz")["x"].astype(np.float32)
    x = np.concatenate([x, x[:, :, ::-1]])
    np.savez(folder / "calib.npz", allow_pickle=False, **{name: x[:SAMPLES]})
    for file in ("validation.npz", "test.npz"):
        np.savez(folder / file, allow_pickle=False, **{name: x[SAMPLES:]})
    about = {"task": "regression", "trained_on": "nothing: random weights"}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    return Case(LARGE, folder, "regression", about["trained_on"])


def once(case: Case, side: Side, out: Path, envs: Path) -> tuple[Outcome, float]:
    """One run, and the load per core before it."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    done = run(side.command(case, out, envs), TIMEOUT_S, out / "tool.log", out, environment())
    print(
        f"{case.name}: {side.words}: {done.error or f'{done.cpu_seconds:.1f} CPU s, {done.seconds:.1f} s'}", flush=True
    )
    if done.error:
        raise click.ClickException(f"{side.words} on {case.name}: {done.error}; see {out / 'tool.err'}")
    return done, load


def measured(case: Case, rounds: int, work: Path, envs: Path) -> Iterator[Measured]:
    sides = [AUTO, BUDGET, NNCF, COMMAND] if case.name in LABELLED else [AUTO, COMMAND]
    outs = {side: work / "files" / case.name / side.words.replace(", ", "-").replace(" ", "_") for side in sides}
    runs: dict[Side, list[tuple[Outcome, float]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            if not (number and side.once):
                runs[side].append(once(case, side, outs[side], envs))
    for side in sides:
        (outcomes, loads), told = zip(*runs[side], strict=True), {}
        file = outs[side] / "build" / "cpu" / "onnxruntime-int8" / "model.onnx"
        if side.script:
            told = json.loads(outcomes[-1].stdout.splitlines()[-1])
            file = outs[side] / told["files"][0]
        yield Measured(side, outcomes, loads, judge(case, file), told.get("versions", {}), told.get("verdict", ""))


def page(found: dict[str, list[Measured]], rounds: int) -> str:
    loads = [load for rows in found.values() for row in rows for load in row.load]
    versions: dict[str, str] = {"edgekit": version("edgekit")}
    for rows in found.values():
        for row in rows:
            versions |= row.versions
    head = HEADER.format(
        date=date.today().isoformat(),
        machine=machine_words(),
        versions=", ".join(f"{k} {v}" for k, v in versions.items()),
        samples=SAMPLES,
        others=OTHERS,
        drop=DROP,
        rounds=rounds,
        low=min(loads),
        high=max(loads),
    )
    lines = [head, *against_nncf(found), *limits(found)]
    for name, rows in found.items():
        lines += section(name, rows)
    return "\n".join(lines)


def against_nncf(found: dict[str, list[Measured]]) -> list[str]:
    """Who is slower, by the medians of CPU seconds."""
    lines = ["## Beside NNCF with accuracy control", "", "| model | edgekit, auto | within the budget | NNCF | |"]
    lines += ["|---|--:|--:|--:|---|"]
    for name, rows in found.items():
        by = {row.side: row.cpu_s() for row in rows}
        if NNCF in by:
            slow = [words for side, words in ((AUTO, "auto"), (BUDGET, "the budget")) if by[side] > by[NNCF]]
            verdict = f"edgekit is **slower**: {' and '.join(slow)}" if slow else "edgekit is faster"
            lines.append(f"| {name} | {by[AUTO]:.1f} | {by[BUDGET]:.1f} | {by[NNCF]:.1f} | {verdict} |")
    return [*lines, "", "Medians of CPU seconds.", ""]


def limits(found: dict[str, list[Measured]]) -> list[str]:
    """The largest of all runs against what the search may take, and the whole command beside it."""
    lines = ["## Limits", "", "| model | | s | at most | peak MB | at most | |", "|---|---|--:|--:|--:|--:|---|"]
    for name, limit_s in LIMITS.items():
        for row in found.get(name, ()):
            if row.side in (AUTO, COMMAND):
                seconds, peak = max(r.seconds for r in row.runs), max(r.peak_rss_bytes for r in row.runs) / 1e6
                verdict = "holds" if seconds <= limit_s and peak <= LIMIT_MB else "**fails**"
                cells = [
                    name,
                    row.side.words,
                    f"{seconds:.1f}",
                    f"{limit_s:.0f}",
                    f"{peak:.0f}",
                    str(LIMIT_MB),
                    verdict,
                ]
                lines.append(f"| {' | '.join(cells)} |")
    told = (
        f"The largest of all runs. {LARGE} is MobileNetV2 of keras.applications for 96×96 pixels, with random weights:"
    )
    return [*lines, "", told, "time and memory depend on its shapes. Its quality says nothing.", ""]


def section(name: str, rows: Sequence[Measured]) -> list[str]:
    float_score = next((row.quality.get("float_score") for row in rows), None)
    lines = [f"## {name}", ""]
    if float_score is not None:
        lines += [f"Float accuracy {float_score:.4f}.", ""]
    lines += ["| | CPU s | s | peak MB | accuracy | agreement | SQNR dB | kB |", "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        here = row.quality.get("here") or {}
        cells = [
            row.side.words,
            ", ".join(f"{r.cpu_seconds:.1f}" for r in row.runs),
            ", ".join(f"{r.seconds:.1f}" for r in row.runs),
            f"{max(r.peak_rss_bytes for r in row.runs) / 1e6:.0f}",
            *(_share(here.get(key)) for key in ("score", "agreement")),
            f"{here['sqnr_db']:.1f}" if here else row.quality["error"],
            f"{row.quality['size_bytes'] / 1000:.0f}" if here else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{row.side.words}: {row.verdict}." for row in rows if row.verdict), ""]
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


@click.command()
@click.option("--models", "wanted", default=",".join((*LABELLED, LARGE)), show_default=True)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--envs", default=HERE / ".envs", type=click.Path(path_type=Path), help="Environments of the tools.")
@click.option("--work", default=HERE / ".work" / "search-time", type=click.Path(path_type=Path))
@click.option("--out", default=HERE / "SEARCH-TIME.md", type=click.Path(path_type=Path))
def main(wanted: str, rounds: int, envs: Path, work: Path, out: Path) -> None:
    if "EDGEKIT_ZOO" not in os.environ:
        raise click.ClickException("the models are the zoo's: set EDGEKIT_ZOO to its folder")
    names = wanted.split(",")
    if unknown := [name for name in names if name not in (*LABELLED, LARGE)]:
        raise click.ClickException(f"no model '{unknown[0]}': one of {', '.join((*LABELLED, LARGE))}")
    work, envs = work.resolve(), envs.resolve()
    found = {}
    for name in names:
        found[name] = list(measured(prepared(name, work / "models"), rounds, work, envs))
        out.write_text(page(found, rounds), encoding="utf-8")  # of what there is so far
    print(out)


if __name__ == "__main__":
    main()
