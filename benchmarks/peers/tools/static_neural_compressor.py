"""Intel Neural Compressor's static quantization of a prepared ONNX model: python ... FOLDER OUT VARIANT."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from neural_compressor import PostTrainingQuantConfig, quantization
from samples import Feeds, calibration


class Loader:
    """What it takes for a data loader: yields (inputs, label)."""

    batch_size = 1

    def __init__(self, rows: list[Feeds]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[tuple[Feeds, int]]:
        return ((row, 0) for row in self._rows)


def main() -> None:
    folder, out, variant = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    rows = calibration(folder)
    config = PostTrainingQuantConfig(
        approach="static", quant_format="QDQ" if variant == "QDQ" else "default", calibration_sampling_size=len(rows)
    )
    model = quantization.fit(str(folder / "model.onnx"), config, calib_dataloader=Loader(rows))
    if model is None:
        sys.exit("Error: it gives no model and no reason")
    model.save(str(out / "model.onnx"))
    versions = {name: version(name) for name in ("neural-compressor", "onnxruntime", "onnx", "numpy")}
    print("\n" + json.dumps({"versions": versions, "files": ["model.onnx"]}))


main()
