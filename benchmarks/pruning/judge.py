"""Judges pruned files against the float model, whoever made them: python judge.py CASE_FOLDER RESULT.json FILE...

Quality as benchmarks/peers/evaluate.py has it, in ONNX Runtime, whose graph optimizations are off so that int8 is
computed alike on every CPU. MACs and parameters are counted by edgekit.inspection, as shares of CASE_FOLDER/float.onnx.
"""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.inspection import inspect

sys.path.append(str(Path(__file__).parents[1] / "peers"))
from evaluate import LABELS, judged, reference
from runners import Array, Run, open_file

BATCH = 100


def outputs(run: Run, test: dict[str, Array]) -> list[Array]:
    names = [name for name in test if name != LABELS]
    count = len(test[names[0]])
    rows = [run({name: test[name][i : i + BATCH] for name in names}) for i in range(0, count, BATCH)]
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]


def costs(path: Path) -> dict[str, Any]:
    """macs, parameters, the share of zeros in constants, and bytes of all constants once deflated."""
    proto = onnx.load(path)
    del proto.graph.value_info[:]
    told = inspect(ir.from_proto(proto), backends_too=False)
    read = {name for node in proto.graph.node for name in node.input}
    constants = [onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name in read]
    weights = [a for a in constants if a.ndim > 1]
    zeros = sum(int((a == 0).sum()) for a in weights) / max(1, sum(a.size for a in weights))
    deflated = sum(len(zlib.compress(a.tobytes(), 9)) for a in constants)
    return {"macs": told["macs"], "parameters": told["parameters"], "zeros": zeros, "deflated_bytes": deflated}


@cache
def whole_costs(folder: Path) -> dict[str, Any]:
    return costs(folder / "float.onnx")


def judge(folder: Path, path: Path, test: dict[str, Array], truth: dict[str, list[Array]]) -> dict[str, Any]:
    task = json.loads((folder / "about.json").read_text(encoding="utf-8"))["task"]
    got = outputs(open_file(path, portable=True).run, test)
    cut = open_file(path, portable=True, logits=True)
    logits = outputs(cut.run, test) if cut.ends_in_softmax else got
    whole, labels = whole_costs(folder), test.get(LABELS)
    return {
        **asdict(judged(task, got, logits, labels, truth)),
        **costs(path),
        "float_score": judged(task, truth["outputs"], truth["logits"], labels, truth).score,
        "float_macs": whole["macs"],
        "float_parameters": whole["parameters"],
        "float_deflated_bytes": whole["deflated_bytes"],
    }


def main() -> None:
    folder, result = Path(sys.argv[1]), Path(sys.argv[2])
    test = dict(np.load(folder / "test.npz"))
    truth = reference(folder, test)
    found = {}
    for path in (Path(p) for p in sys.argv[3:]):
        try:
            found[path.name] = judge(folder, path, test, truth)
        except Exception as error:  # a peer's file that does not run is a row that says so
            found[path.name] = {"error": f"it does not run: {error}"[:160]}
    result.write_text(json.dumps(found), encoding="utf-8")


main()
