"""edgekit's pruning and onnxsim's on the same models with the same samples; writes RESULTS.md.

    EDGEKIT_ZOO=FOLDER python benchmarks/pruning/run.py [--models A,B] [--extra FOLDER] [--distill 5m]

What was done before is kept below --work and not done again, unless --again; RESULTS.md always has all that is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import page
from cases import BUDGETS, DATA, DISTILL, EDGEKIT, INT8, PEER, Job, jobs

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "peers"))
import models  # noqa: E402 - benchmarks/peers is on the path from here
from environments import InstallError, python_of  # noqa: E402
from models import Case  # noqa: E402
from process import run  # noqa: E402

from edgekit import model as M  # noqa: E402
from edgekit import pipeline  # noqa: E402
from edgekit.inspection import inspect  # noqa: E402
from edgekit.passes.fold import Fold  # noqa: E402

TOOLS = {EDGEKIT: "edgekit_prune.py", PEER: "onnxsim_prune.py"}
JUDGE_S = 1800.0  # CPU seconds that judging all files of a job may take
SHARE_STEP = 0.005  # what onnxsim must leave is rounded up to this share, so that little changes do not do it again
SCHEMA = 1  # 1: first


def complete(case: Case, samples: int) -> None:
    """float.onnx beside the model: what edgekit makes of it before it prunes, and what shares are shares of.

    labelled.npz: the samples with labels, where there are any. all.npz: all that there are, without.
    """
    M.save(Fold()(pipeline.load(case.model).model, None), case.folder / "float.onnx")
    arrays = dict(np.load(case.folder / "validation.npz"))
    np.savez(case.folder / "labelled.npz", allow_pickle=False, **{k: v[:samples] for k, v in arrays.items()})
    np.savez(case.folder / "all.npz", allow_pickle=False, **{k: v for k, v in arrays.items() if k != models.LABELS})


def order(job: Job, case: Case, work: Path, distill_s: float) -> dict[str, Any]:
    """What the tool is told to do. Raises LookupError where what it builds on is not there."""
    told: dict[str, Any] = {"kind": job.kind, "data": DATA[job.variant]}
    if job.kind == "weights":
        return {**told, "pattern": job.budget}
    if job.variant in (INT8, DISTILL):
        student = files_of(work, Job(job.model, job.kind, job.budget, EDGEKIT)) / "model.onnx"
        if not student.is_file():
            raise LookupError("what it starts from was not made")
        rest = {"int8": True} if job.variant == INT8 else {"distill_s": distill_s}
        return {**told, "student": str(student), **rest}
    if job.tool == EDGEKIT:
        return {**told, "share": job.share}
    own = _kept(work, Job(job.model, job.kind, job.budget, EDGEKIT))
    share = job.share if own is None or own["error"] else own["files"][0]["macs"] / own["files"][0]["float_macs"]
    whole = inspect(ir.load(case.folder / "float.onnx"), backends_too=False)["macs"]
    return {**told, "macs": int(math.ceil(share / SHARE_STEP) * SHARE_STEP * whole)}


def files_of(work: Path, job: Job) -> Path:
    return work / "files" / job.model / job.name


def result_of(work: Path, job: Job) -> Path:
    return work / "results" / job.model / f"{job.name}.json"


def _kept(work: Path, job: Job) -> dict[str, Any] | None:
    file = result_of(work, job)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def do(job: Job, case: Case, told: dict[str, Any], work: Path, envs: Path, timeout_s: float) -> dict[str, Any]:
    """Run the tool in a process of its own and judge what it wrote. JSON-ready."""
    record: dict[str, Any] = {"tool": job.tool, "variant": job.variant, "model": job.model, "files": []}
    out = files_of(work, job)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "job.json").write_text(json.dumps(told), encoding="utf-8")
    try:
        environment = "own" if job.tool == EDGEKIT else job.tool
        python = python_of(environment, envs, HERE / "requirements")
    except InstallError as error:
        return {**record, "error": f"not installed: {error}"}
    script = HERE / "tools" / TOOLS[job.tool]
    command = [python, str(script), str(case.folder), str(out), str(out / "job.json")]
    done = run(command, timeout_s + told.get("distill_s", 0), out / "tool.log", out, _environment())
    record |= {
        "error": done.error,
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "peak_rss_bytes": done.peak_rss_bytes,
        "load": os.getloadavg()[0],
    }
    if done.error:
        return record
    found = json.loads(done.stdout.splitlines()[-1])
    record |= {"versions": found["versions"], "told": found["told"]}
    judged = judge(case, [out / f["file"] for f in found["files"] if "file" in f], out)
    record["files"] = [{**f, **judged.get(f.get("file", ""), {})} for f in found["files"]]
    return record


def judge(case: Case, files: list[Path], out: Path) -> dict[str, Any]:
    result = out / "quality.json"
    command = [sys.executable, str(HERE / "judge.py"), str(case.folder), str(result), *(str(f) for f in files)]
    done = run(command, JUDGE_S, out / "judge.log", out, _environment())
    if done.error:
        return {file.name: {"error": f"it can't be judged: {done.error}"} for file in files}
    return dict(json.loads(result.read_text(encoding="utf-8")))


def _environment() -> dict[str, str]:
    """The same for both: one thread, no GPU, no chatter; edgekit for onnxsim's script to count with."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return {**os.environ, **quiet, "PYTHONPATH": str(HERE.parents[1])}


def key_of(case: Case, told: dict[str, Any]) -> str:
    """What a kept result must have been made from."""
    student = {k: hashlib.sha256(Path(v).read_bytes()).hexdigest() if k == "student" else v for k, v in told.items()}
    digest = hashlib.sha256(f"{SCHEMA} {json.dumps(student, sort_keys=True)}".encode())
    for file in ("model.onnx", told["data"], "test.npz"):
        digest.update((case.folder / file).read_bytes())
    return digest.hexdigest()


def compare(
    case: Case, todo: list[Job], work: Path, envs: Path, distill_s: float, timeout_s: float, again: bool
) -> None:
    for job in todo:
        try:
            told = order(job, case, work, distill_s)
        except LookupError as error:
            print(f"{job.model}: {job.name}: not run: {error}", flush=True)
            continue
        key, kept = key_of(case, told), _kept(work, job)
        if kept is not None and kept["key"] == key and not again:
            continue
        print(f"{job.model}: {job.name}", flush=True)
        record = do(job, case, told, work, envs, timeout_s)
        file = result_of(work, job)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"key": key, "kind": job.kind, "budget": job.budget, **record}
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")
        print(f"    {record['error'] or page.short(record)}", flush=True)


def seconds_of(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text)
    if not match:
        raise click.ClickException(f"--distill {text}: give a time, for example 5m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"]


@click.command()
@click.option("--models", "wanted", help="Only these, separated by commas.")
@click.option("--tools", "asked", default=f"{EDGEKIT},{PEER}", show_default=True, help="Only these.")
@click.option("--budgets", help="Only these shares or patterns, separated by commas.")
@click.option("--distill", help="Also let the float model teach what is left, for so long: 5m.")
@click.option("--skip", default="", help="Variants that aren't run, separated by semicolons.")
@click.option("--samples", default=512, show_default=True, type=click.IntRange(16), help="Samples that each tool gets.")
@click.option("--extra", type=click.Path(exists=True, file_okay=False, path_type=Path), envvar="EDGEKIT_EXTRA_MODELS")
@click.option("--envs", default=HERE / ".envs", type=click.Path(path_type=Path), help="onnxsim's environment.")
@click.option("--work", default=HERE / ".work", type=click.Path(path_type=Path), help="Models, files and results.")
@click.option("--out", default=HERE / "RESULTS.md", type=click.Path(path_type=Path))
@click.option(
    "--timeout", "timeout_s", default=1200.0, show_default=True, help="CPU seconds that a tool may take on a model."
)
@click.option("--again", is_flag=True, help="Do again what was done before.")
def main(
    wanted: str | None,
    asked: str,
    budgets: str | None,
    distill: str | None,
    skip: str,
    samples: int,
    extra: Path | None,
    envs: Path,
    work: Path,
    out: Path,
    timeout_s: float,
    again: bool,
) -> None:
    """See the file's head."""
    there = models.available(extra)
    names = wanted.split(",") if wanted else [name for name in BUDGETS if name in there]
    if unknown := [name for name in names if name not in there]:
        known = ", ".join(there) or "none; set EDGEKIT_ZOO"
        raise click.ClickException(f"no model '{unknown[0]}': one of {known}")
    distill_s, envs, work = seconds_of(distill), envs.resolve(), work.resolve()
    for name in names:
        case = models.prepare(name, there[name], work / "models", samples)
        complete(case, samples)
        todo = [
            job
            for job in jobs(name, distill_s is not None)
            if job.tool in asked.split(",")
            and job.variant not in skip.split(";")
            and (budgets is None or job.budget in budgets.split(","))
        ]
        compare(case, todo, work, envs, distill_s or 0.0, timeout_s, again)
    out.write_text(page.written(work), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
