"""nncf.quantize on a prepared model, as ONNX or OpenVINO: python static_nncf.py FOLDER OUT "onnx: mixed".

"openvino: accuracy control, max drop 0.005" leaves layers in float until no more is lost.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import onnx.version_converter
import openvino as ov
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from openvino.frontend import OpConversionFailure
from samples import Feeds, calibration, validation

VALIDATION = 500  # labelled samples that accuracy control looks at
MAX_DROP = 0.01  # what accuracy control may lose unless it is told
# From 21 on ONNX Runtime 1.32 moves a DequantizeLinear over a Transpose and loses its type: the file doesn't load.
OPSET = 20


def openvino_model(path: Path) -> Any:
    """Batch 1."""
    try:
        model = ov.convert_model(str(path))
    except OpConversionFailure:
        model = ov.convert_model(io.BytesIO(without_empty_unsqueeze(path).SerializeToString()))
    model.reshape({port: [1, *list(port.partial_shape)[1:]] for port in model.inputs})
    return model


def without_empty_unsqueeze(path: Path) -> onnx.ModelProto:
    """An Unsqueeze along no axis changes nothing; OpenVINO 2026.4 takes it for one that adds an axis."""
    model = onnx.load(path)
    empty = {tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [0]}
    for node in model.graph.node:
        if node.op_type == "Unsqueeze" and len(node.input) > 1 and node.input[1] in empty:
            node.op_type = "Identity"
            del node.input[1]
    return model


def onnx_model(path: Path) -> onnx.ModelProto:
    """At opset OPSET, if it is at a later one."""
    model = onnx.load(path)
    later = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) > OPSET
    return onnx.version_converter.convert_version(model, OPSET) if later else model


def score(model: Any, data: Iterable[Any]) -> tuple[float, list[float]]:
    """Accuracy, and per sample whether it is right; `model` is compiled."""
    right = [float(model(feeds)[0].argmax() == label) for feeds, label in data]
    return float(np.mean(right)), right


def advanced(settings: set[str]) -> nncf.AdvancedQuantizationParameters:
    """Its default averages the extremes over the samples, "minmax" takes the largest; "7 bits" is its overflow fix."""
    found = nncf.AdvancedQuantizationParameters()
    if "minmax" in settings:
        found.activations_range_estimator_params = RangeEstimatorParametersSet.MINMAX
    if "7 bits" in settings:
        found.overflow_fix = nncf.OverflowFix.ENABLE
    return found


def quantized(model: Any, rows: list[Feeds], folder: Path, settings: set[str]) -> Any:
    task = json.loads((folder / "about.json").read_text(encoding="utf-8"))["task"]
    data = nncf.Dataset(rows)
    options = {
        "preset": nncf.QuantizationPreset.MIXED if "mixed" in settings else nncf.QuantizationPreset.PERFORMANCE,
        "subset_size": len(rows),
        "fast_bias_correction": "full bias correction" not in settings,
        "model_type": nncf.ModelType.TRANSFORMER if task == "tokens" else None,
        "advanced_parameters": advanced(settings),
    }
    if "accuracy control" not in settings:
        return nncf.quantize(model, data, **options)
    labelled = nncf.Dataset(validation(folder)[:VALIDATION])
    options["advanced_quantization_parameters"] = options.pop("advanced_parameters")
    drop = next((float(s.removeprefix("max drop ")) for s in settings if s.startswith("max drop ")), MAX_DROP)
    return nncf.quantize_with_accuracy_control(model, data, labelled, score, max_drop=drop, **options)


def main() -> None:
    folder, out, variant = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    form, _, rest = variant.partition(": ")
    settings, rows = set(rest.split(", ")), calibration(folder)
    if form == "onnx":
        file = "model.onnx"
        onnx.save(quantized(onnx_model(folder / file), rows, folder, settings), out / file)
    else:
        file = "model.xml"
        ov.save_model(quantized(openvino_model(folder / "model.onnx"), rows, folder, settings), out / file)
    versions = {"nncf": nncf.__version__, "openvino": ov.__version__.split("-")[0], "onnx": onnx.__version__}
    print(json.dumps({"versions": versions, "files": [file]}))


main()
