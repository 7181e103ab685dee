"""onnxruntime.quantization.quantize_static on a prepared model: python static_onnxruntime.py FOLDER OUT VARIANT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from samples import Feeds, calibration

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
PRODUCTS = ["Conv", "ConvTranspose", "MatMul", "Gemm"]


class Reader(CalibrationDataReader):
    def __init__(self, rows: list[Feeds]) -> None:
        self._rows = iter(rows)

    def get_next(self) -> Feeds | None:
        return next(self._rows, None)


def pre_process(source: Path, target: str) -> None:
    """Without symbolic shapes where it can't infer them, as its message advises; a bidirectional LSTM it trips over."""
    try:
        quant_pre_process(str(source), target)
    except Exception:  # it raises nothing more specific; whatever else is wrong is raised again
        quant_pre_process(str(source), target, skip_symbolic_shape=True)


def main() -> None:
    folder, out, variant = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    target = str(out / "model.onnx")
    rows = calibration(folder)
    if variant == "default":
        quantize_static(str(folder / "model.onnx"), target, Reader(rows))
    else:
        # Per channel after quant_pre_process, uint8 activations: what its documentation advises on x86.
        options = set(variant.split(", "))
        prepared = str(out / "prepared.onnx")
        pre_process(folder / "model.onnx", prepared)
        method = next(name for name in METHODS if name in options)
        quantize_static(
            prepared,
            target,
            Reader(rows),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range="7 bits" in options,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=METHODS[method],
            op_types_to_quantize=PRODUCTS if "products only" in options else None,
            extra_options={"OpTypesToExcludeOutputQuantization": PRODUCTS} if "float outputs" in options else None,
        )
    versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__, "numpy": np.__version__}
    print(json.dumps({"versions": versions, "files": ["model.onnx"]}))


main()
