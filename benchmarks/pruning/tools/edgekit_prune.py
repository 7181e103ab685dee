"""edgekit's pruning on a prepared model: python edgekit_prune.py FOLDER OUT JOB.json.

JOB: {"kind": "channels", "share": 0.5} or {"kind": "weights", "pattern": "2:4"}; "data": the file of samples;
{"student": FILE, "distill_s": 300}: what was pruned before learns from the float model;
{"student": FILE, "int8": true}: it is quantized. Writes OUT/model.onnx; the last line is JSON.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgekit import model as M
from edgekit import pipeline, pruning
from edgekit.dataset import Dataset, open_dataset
from edgekit.passes.fold import Fold
from edgekit.passes.prune_channels import PruneChannels, prepared_for_pruning
from edgekit.passes.prune_weights import PruneWeights
from edgekit.passes.quantize import QuantizeInt8

SEED = 0


def made(model: ir.Model, data: Dataset, job: dict[str, Any]) -> tuple[ir.Model, dict[str, Any]]:
    if job.get("int8"):
        return QuantizeInt8(seed=SEED)(ir.load(job["student"]), data), {}
    split = pruning.samples(data, SEED)
    told: dict[str, Any] = {
        "samples": {"fit": split.fit.samples, "choose": split.choose.samples, "judge": split.judge.samples}
    }
    if "student" in job:
        from edgekit.recover import distill

        student, record = distill(
            prepared_for_pruning(model), ir.load(job["student"]), split.learn, split.watch, job["distill_s"], SEED
        )
        told["distilled"] = record
    elif job["kind"] == "channels":
        step = PruneChannels(budget=job["share"], seed=SEED)
        plan = step.plan(model, split.fit, split.choose)
        student, _ = step.apply(model, plan, split.learn)
    else:
        pattern = pruning.request(job["pattern"] if ":" in job["pattern"] else f"weights={job['pattern']}").pattern
        if pattern is None:
            raise SystemExit(f"no pattern of zeros: {job['pattern']}")
        student, _ = PruneWeights(pattern, seed=SEED).apply(model, split.fit)
    told["verdict"] = pruning.verdict(model, student, split.judge).to_json()
    return student, told


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    job = json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))
    model = Fold()(pipeline.load(folder / "model.onnx").model, None)
    data = open_dataset(folder / job["data"]).bind(M.signature(model))
    student, told = made(model, data, job)
    M.save(student, out / "model.onnx")
    versions = {name: version(name) for name in ("edgekit", "onnxruntime", "numpy")}
    print(json.dumps({"versions": versions, "files": [{"file": "model.onnx", "setting": ""}], "told": told}))


main()
