"""The tools of the comparison: a table of what runs, in which environment, with which settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models import Case

SCRIPTS = Path(__file__).with_name("tools")


@dataclass(frozen=True)
class Tool:
    """One tool. variants: its settings, each a run of its own. lacks(case): why it can't be run on a model, or "".

    script: called with FOLDER OUT VARIANT; writes files below OUT and ends with a line of JSON:
    {"versions": {package: version}, "files": [paths below OUT], "missing": {file: why}}.
    float_tflite: it starts from FOLDER/float/model.tflite.
    """

    name: str
    environment: str
    script: str
    variants: tuple[str, ...]
    lacks: Callable[[Case], str] = lambda case: ""
    float_tflite: bool = False


def _needs_keras(case: Case) -> str:
    return "" if case.keras else "there is no Keras model"


def _needs_labels(case: Case) -> str:
    import numpy as np

    labelled = "y" in np.load(case.folder / "validation.npz").files
    return "" if case.task == "classification" and labelled else "it needs classes and labelled samples"


_NNCF = (
    "default",
    "mixed",
    "full bias correction",
    "minmax",
    "minmax, full bias correction",
    "minmax, full bias correction, 7 bits",
)

TOOLS = {
    tool.name: tool
    for tool in (
        Tool("edgekit", "own", "edgekit_convert.py", ("default", "8-bit weights")),
        Tool(
            "onnxruntime",
            "onnxruntime",
            "static_onnxruntime.py",
            (
                "default",
                "per channel, minmax",
                "per channel, minmax, 7 bits",
                "per channel, entropy, 7 bits",
                "per channel, percentile, 7 bits",
                "per channel, minmax, products only",
                "per channel, minmax, products only, 7 bits",
                "per channel, minmax, products only, float outputs",
                "per channel, minmax, products only, float outputs, 7 bits",
            ),
        ),
        Tool("nncf-onnx", "nncf", "static_nncf.py", tuple(f"onnx: {v}" for v in _NNCF)),
        Tool("nncf-openvino", "nncf", "static_nncf.py", tuple(f"openvino: {v}" for v in _NNCF)),
        Tool("nncf-accuracy", "nncf", "static_nncf.py", ("openvino: accuracy control",), _needs_labels),
        Tool("ai-edge-quantizer", "ai-edge-quantizer", "litert_quantizer.py", ("static int8",), _needs_keras, True),
        Tool("tflite-converter", "keras", "tflite_converter.py", ("int8",), _needs_keras),
        Tool("neural-compressor", "neural-compressor", "static_neural_compressor.py", ("default", "QDQ")),
    )
}
