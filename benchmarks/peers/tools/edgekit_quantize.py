"""edgekit's search alone, without the proofs of `edgekit convert`: python edgekit_quantize.py FOLDER OUT "auto".

VARIANT "auto", or "auto, max drop 0.005": within that budget, on the samples of validation.npz. Writes what ONNX
Runtime gets.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from edgekit import model as M
from edgekit.backends import onnxruntime as backend
from edgekit.backends.encoding import with_uint8_activations
from edgekit.dataset import open_dataset
from edgekit.passes.apply_plan import apply_plan
from edgekit.passes.fold import Fold
from edgekit.passes.protect import protect
from edgekit.passes.quantize import QuantizeInt8
from edgekit.passes.roundings import leave_out
from edgekit.sources import load


def main() -> None:
    folder, out, variant = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    model = Fold()(load(folder / "model.onnx").model, None)
    data, others = (open_dataset(folder / file).bind(M.signature(model)) for file in ("calib.npz", "validation.npz"))
    step = QuantizeInt8(weight_bits=7 if backend.saturates() else 8)
    _, _, drop = variant.partition("max drop ")
    told = {}
    if drop:
        plan, kept = protect(step, model, data, others, float(drop), encode=with_uint8_activations)
        told = {"verdict": kept.words()}
    else:
        plan = step.plan(model, data)
    written = apply_plan(model, plan)
    backend.lower(leave_out(written, backend.unneeded(written)), "int8", out)
    versions = {name: version(name) for name in ("edgekit", "onnxruntime", "numpy")}
    print(json.dumps({"versions": versions, "files": ["model.onnx"], **told}))


main()
