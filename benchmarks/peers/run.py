"""edgekit and its peers on the same models with the same samples, each in an environment of its own; writes RESULTS.md.

    EDGEKIT_ZOO=FOLDER python benchmarks/peers/run.py [--models A,B] [--tools C,D] [--skip E,F] [--extra FOLDER]

What was done before is kept below --work and not done again, unless --again; RESULTS.md always has all that is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import models
import table
from environments import InstallError, python_of
from models import Case
from process import run
from toolbox import SCRIPTS, TOOLS, Tool

HERE = Path(__file__).parent
EVALUATE = HERE / "evaluate.py"
EVALUATE_S = 900.0  # seconds that judging one file may take
SCHEMA = 1  # 1: first


def quantize(tool: Tool, variant: str, case: Case, out: Path, envs: Path, timeout_s: float) -> dict[str, Any]:
    """Run one tool with one setting and judge what it wrote. JSON-ready."""
    record: dict[str, Any] = {"tool": tool.name, "variant": variant, "model": case.name, "error": "", "files": []}
    if why := tool.lacks(case):
        return {**record, "error": f"not run: {why}"}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        python = python_of(tool.environment, envs)
        if tool.float_tflite and (why := float_tflite(case, envs, timeout_s)):
            return {**record, "error": f"TFLiteConverter gives no float file: {why}"}
    except InstallError as error:
        return {**record, "error": f"not installed: {error}"}
    command = [python, str(SCRIPTS / tool.script), str(case.folder), str(out), variant]
    done = run(command, timeout_s, out / "tool.log", out, environment())
    record |= {
        "error": done.error,
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "peak_rss_bytes": done.peak_rss_bytes,
    }
    if done.error:
        return record
    told = json.loads(done.stdout.splitlines()[-1])
    record |= {"versions": told["versions"]}
    record["files"] = [judge(case, out / file) for file in told["files"]]
    record["files"] += [{"file": file, "error": why} for file, why in told.get("missing", {}).items()]
    return record


def judge(case: Case, file: Path) -> dict[str, Any]:
    result = file.with_suffix(".quality.json")
    command = [sys.executable, str(EVALUATE), str(case.folder), str(file), str(result)]
    done = run(command, EVALUATE_S, file.with_suffix(".log"), file.parent)
    if done.error:
        return {"file": file.name, "error": f"it does not run: {done.error}"}
    return {"file": file.name, "error": "", **json.loads(result.read_text(encoding="utf-8"))}


def float_tflite(case: Case, envs: Path, timeout_s: float) -> str:
    """TFLiteConverter's float file beside the model, for the tool that starts from it; why there is none, or ""."""
    out = case.folder / "float"
    if (out / "model.tflite").is_file():
        return ""
    out.mkdir(exist_ok=True)
    command = [python_of("keras", envs), str(SCRIPTS / "tflite_converter.py"), str(case.folder), str(out), "float32"]
    return run(command, timeout_s, out / "tool.log", out, environment()).error


def environment() -> dict[str, str]:
    """The same for every tool: one thread for what OpenMP and BLAS run, no GPU, no chatter, bytecode kept as usual."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, **quiet}


def _key(case: Case, samples: int) -> str:
    """What a kept result must have been made from."""
    digest = hashlib.sha256(f"{SCHEMA} {samples}".encode())
    for file in ("model.onnx", "calib.npz", "test.npz"):
        digest.update((case.folder / file).read_bytes())
    return digest.hexdigest()


def without(tools: list[Tool], skipped: list[str]) -> list[Tool]:
    """The tools without the settings that have one of these words in their name; tools without settings left out."""
    kept = [replace(t, variants=tuple(v for v in t.variants if not any(w in v for w in skipped))) for t in tools]
    return [tool for tool in kept if tool.variants]


def compare(case: Case, tools: list[Tool], work: Path, envs: Path, samples: int, timeout_s: float, again: bool) -> None:
    """Every tool with every setting on one model; what is known already is left."""
    key = _key(case, samples)
    for tool in tools:
        for variant in tool.variants:
            name = f"{tool.name}--{variant}".replace(": ", "-").replace(", ", "-").replace(" ", "_")
            kept = work / "results" / case.name / f"{name}.json"
            if kept.is_file() and not again and json.loads(kept.read_text(encoding="utf-8"))["key"] == key:
                continue
            print(f"{case.name}: {tool.name}, {variant}", flush=True)
            record = quantize(tool, variant, case, work / "files" / case.name / name, envs, timeout_s)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"key": key, "samples": samples, **record}, indent=1), encoding="utf-8")
            print(f"    {record['error'] or table.short(record)}", flush=True)


def _chosen(given: str | None, known: list[str], kind: str) -> list[str]:
    names = [name for name in given.split(",") if name] if given else known
    if unknown := [name for name in names if name not in known]:
        raise click.ClickException(f"no {kind} '{unknown[0]}': one of {', '.join(known) or 'none; set EDGEKIT_ZOO'}")
    return names


@click.command()
@click.option("--models", "wanted", help="Only these, separated by commas.")
@click.option("--tools", "asked", help=f"Only these: {', '.join(TOOLS)}.")
@click.option(
    "--skip", "skipped", default="", help="Settings with one of these words, separated by commas, aren't run."
)
@click.option("--samples", default=256, show_default=True, type=click.IntRange(1), help="Calibration samples.")
@click.option("--extra", type=click.Path(exists=True, file_okay=False, path_type=Path), envvar="EDGEKIT_EXTRA_MODELS")
@click.option("--envs", default=HERE / ".envs", type=click.Path(path_type=Path), help="Environments of the tools.")
@click.option("--work", default=HERE / ".work", type=click.Path(path_type=Path), help="Models, files and results.")
@click.option("--out", default=HERE / "RESULTS.md", type=click.Path(path_type=Path))
@click.option(
    "--timeout", "timeout_s", default=300.0, show_default=True, help="CPU seconds that a tool may take on a model."
)
@click.option("--again", is_flag=True, help="Do again what was done before.")
def main(
    wanted: str | None,
    asked: str | None,
    skipped: str,
    samples: int,
    extra: Path | None,
    envs: Path,
    work: Path,
    out: Path,
    timeout_s: float,
    again: bool,
) -> None:
    there = models.available(extra)
    names = _chosen(wanted, list(there), "model")
    tools = [TOOLS[name] for name in _chosen(asked, list(TOOLS), "tool")]
    tools = without(tools, [word for word in skipped.split(",") if word])
    envs, work = envs.resolve(), work.resolve()
    for name in names:
        case = models.prepare(name, there[name], work / "models", samples)
        compare(case, tools, work, envs, samples, timeout_s, again)
    order = [f"{tool.name}: {variant}" for tool in TOOLS.values() for variant in tool.variants]
    out.write_text(table.written(work, order), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
