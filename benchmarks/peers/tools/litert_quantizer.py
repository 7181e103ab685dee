"""AI Edge Quantizer's static int8 recipe on a float .tflite: python litert_quantizer.py FOLDER OUT VARIANT.

FOLDER/float/model.tflite is what tflite_converter.py writes as "float32".
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe
from samples import calibration


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    source = folder / "float" / "model.tflite"
    (signature, runner), *_ = _signatures(source)
    kinds = {name: detail["dtype"] for name, detail in runner.get_input_details().items()}
    rows = [{name: feeds[name].astype(kind) for name, kind in kinds.items()} for feeds in calibration(folder)]
    tool = quantizer.Quantizer(str(source), recipe.static_wi8_ai8())
    found = tool.calibrate({signature: rows}, num_threads=1)
    tool.quantize(found).export_model(str(out / "model.tflite"), overwrite=True)
    versions = {name: version(name) for name in ("ai-edge-quantizer", "ai-edge-litert")}
    print("\n" + json.dumps({"versions": versions, "files": ["model.tflite"]}))


def _signatures(file: Path) -> list[tuple[str, object]]:
    interpreter = Interpreter(model_path=str(file))
    return [(name, interpreter.get_signature_runner(name)) for name in interpreter.get_signature_list()]


main()
