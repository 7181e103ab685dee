"""TensorFlow's converter on a prepared Keras model, full-integer int8: python tflite_converter.py FOLDER OUT VARIANT.

VARIANT "int8", or "float32", which writes what AI Edge Quantizer starts from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras_model import fixed
from samples import Feeds, calibration


def main() -> None:
    folder, out, variant = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    model = fixed(folder)
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    kinds = {port.name: port.dtype for port in model.inputs}

    def rows() -> Iterator[Feeds]:
        for feeds in calibration(folder):
            yield {name: np.asarray(values, kinds[name]) for name, values in feeds.items()}

    if variant == "int8":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = rows
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    (out / "model.tflite").write_bytes(converter.convert())
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
    print("\n" + json.dumps({"versions": versions, "files": ["model.tflite"]}))


main()
