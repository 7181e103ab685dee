"""onnxsim's pruning of a prepared model, every setting: python onnxsim_prune.py FOLDER OUT JOB.json.

JOB: {"kind": "channels", "macs": N}: at the sparsity that leaves fewest multiply-accumulates, but N at least;
{"kind": "weights", "pattern": "0.5" or "2:4"}. Starts from FOLDER/float.onnx, the model as edgekit cleans it up: batch
norms in the convolutions and bias in the products, of which onnxsim prunes more than of the exporter's graph.
Writes a file for each setting; the last line is JSON, with the seconds that each took by itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxsim

from edgekit.inspection import inspect

BATCH = 32
HALVINGS, STEP = 10, 1e-3  # of the sparsity: a thousandth is less than a channel of any layer here
SEARCHED = 2  # batches that a sparsity is searched on, where importance takes samples; then it is proved on all
MOST = 0.99
RIDGES = (1e-4, 1e-2)  # of the closed-form finetune: what trusts the samples more, and its default
# Its training of a block, from the input to the output: Adam on the weights of products, the float model teaches. Of
# 300 and 1000 steps at 1e-3, the latter were better on the MLP.
STEPS, RATE, TRAINED_BATCH = 1000, 1e-3, 64
Samples = list[dict[str, Any]]
Prune = Callable[[float], onnx.ModelProto]


def channels(model: onnx.ModelProto, samples: Samples) -> dict[str, Prune]:
    """Setting -> the pruned model by sparsity: importance of weights alone or with activations (Wanda), and pools.

    Heads of attention go by the same share, where it sees any: in fused attention operators.
    """
    found: dict[str, Prune] = {}
    for norm in ("l2", "l1"):
        for pool in (False, True):
            options: dict[str, Any] = {"importance_norm": norm, "global_sparsity": pool}
            name = f"{norm}{', one pool' if pool else ''}"
            found[f"magnitude {name}"] = lambda s, o=options: onnxsim.apply_structured_pruning(model, s, **o)
            found[f"wanda {name}"] = lambda s, o=options: onnxsim.apply_structured_wanda_pruning(
                model, samples, sparsity=s, **o
            )
    if macs(onnxsim.apply_attention_head_pruning(model, 0.5)) < macs(model):
        found["magnitude l2, heads"] = lambda s: onnxsim.apply_attention_head_pruning(
            onnxsim.apply_structured_pruning(model, s), s
        )
    return found


def macs(model: onnx.ModelProto) -> int:
    """Without the shapes that the file tells of, which may be those of before."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    del copy.graph.value_info[:]
    return int(inspect(ir.from_proto(copy), backends_too=False)["macs"])


def sparsity_for(prune: Prune, quick: Prune, least: int) -> float:
    """The largest sparsity that leaves `least` multiply-accumulates. quick: the same by fewer samples."""
    low, high = 0.0, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if macs(quick(middle)) >= least:
            low = middle
        else:
            high = middle
    while low > 0 and macs(prune(low)) < least:
        low = max(0.0, low - STEP)
    return low


def zeros(model: onnx.ModelProto, samples: Samples, pattern: str) -> dict[str, Callable[[], onnx.ModelProto]]:
    keep, colon, of = pattern.partition(":")
    options: dict[str, Any] = {"n": int(keep), "m": int(of)} if colon else {"sparsity": 1 - float(pattern)}
    found: dict[str, Callable[[], onnx.ModelProto]] = {
        "magnitude": lambda: onnxsim.apply_magnitude_pruning(model, **options),
        "wanda": lambda: onnxsim.apply_wanda_pruning(model, samples, **options),
        "sparsegpt": lambda: onnxsim.apply_sparsegpt_pruning(model, samples, **options),
    }
    if not colon:
        pooled = {**options, "global_sparsity": True}
        found["magnitude, one pool"] = lambda: onnxsim.apply_magnitude_pruning(model, **pooled)
        found["wanda, one pool"] = lambda: onnxsim.apply_wanda_pruning(model, samples, **pooled)
    return found


def trained(whole: onnx.ModelProto, pruned: onnx.ModelProto, samples: Samples) -> onnx.ModelProto:
    return onnxsim.apply_block_finetune(
        whole,
        pruned,
        whole.graph.input[0].name,
        whole.graph.output[0].name,
        calibration_data=samples,
        num_iterations=STEPS,
        learning_rate=RATE,
        batch_size=TRAINED_BATCH,
    )


class Writer:
    """Runs a setting, times it, keeps its file."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.files: list[dict[str, Any]] = []

    def keep(self, setting: str, make: Callable[[], onnx.ModelProto], **told: Any) -> onnx.ModelProto | None:
        began, cpu = time.perf_counter(), time.process_time()
        file = f"{len(self.files)}.onnx"
        try:
            model = make()
        except Exception as error:  # whatever a setting throws is what the page shows of it
            self.files.append({"setting": setting, "error": f"{type(error).__name__}: {error}"[:160]})
            return None
        self.files.append(
            {
                "file": file, "setting": setting, "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - cpu, **told,
            }
        )  # fmt: skip
        onnx.save(model, self.out / file)
        return model


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    job = json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))
    simplified, _ = onnxsim.simplify(onnx.load(folder / "float.onnx"))
    arrays = np.load(folder / "calib.npz")
    count = len(arrays[arrays.files[0]])
    samples = [{k: arrays[k][i : i + BATCH] for k in arrays.files} for i in range(0, count, BATCH)]
    writer = Writer(out)
    if job["kind"] == "weights":
        for setting, make in zeros(simplified, samples, job["pattern"]).items():
            writer.keep(setting, make)
    else:
        quick = channels(simplified, samples[:SEARCHED])
        for setting, prune in channels(simplified, samples).items():
            try:
                share = sparsity_for(prune, quick[setting], job["macs"])
            except Exception as error:  # as above
                writer.files.append({"setting": setting, "error": f"{type(error).__name__}: {error}"[:160]})
                continue
            pruned = writer.keep(setting, lambda prune=prune, share=share: prune(share), sparsity=share)
            for ridge in RIDGES if pruned is not None else ():
                finetuned = writer.keep(
                    f"{setting}, finetuned {ridge:g}",
                    lambda pruned=pruned, ridge=ridge: onnxsim.apply_pruning_finetune(
                        simplified, pruned, samples, reg_param=ridge
                    ),
                    sparsity=share,
                )
            if pruned is not None and finetuned is not None:
                writer.keep(
                    f"{setting}, finetuned {ridge:g}, trained",
                    lambda start=finetuned: trained(simplified, start, samples),
                    sparsity=share,
                )
    versions = {name: version(name) for name in ("onnxsim", "onnx", "onnxruntime", "numpy")}
    print(json.dumps({"versions": versions, "files": writer.files, "told": {}}))


main()
