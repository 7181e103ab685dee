"""The peer's side of tflite_peers.py, in an interpreter that has TensorFlow: models, data, and TFLiteConverter's files.

    python tflite_peers_keras.py FOLDER NAME [MODEL FILE]

Writes FOLDER/NAME/{model.keras, data.npz, float32/model.tflite, int8/model.tflite}; the last line is JSON.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import numpy as np
import tensorflow as tf

SIZE, SAMPLES = 96, 64


class Depthwise(keras.layers.DepthwiseConv2D):
    """As Keras 2 wrote it into .h5 files, with an argument that Keras 3 does not know."""

    def __init__(self, **config: object) -> None:
        config.pop("groups", None)
        super().__init__(**config)


def built(name: str) -> keras.Model:
    """A network of keras.applications with random weights, its batch norms fitted to noise so that nothing vanishes."""
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(SIZE, SIZE, 3), classes=10)
    noise = np.random.default_rng(0).uniform(0, 255, (32, SIZE, SIZE, 3)).astype(np.float32)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(noise, training=True)
    return model


def converted(model: keras.Model, data: np.ndarray, int8: bool) -> tuple[bytes, float]:
    """TFLiteConverter on the model with its batch fixed to 1: with Keras 3 the one route that is exact."""
    fixed = keras.Input(batch_shape=(1, *model.inputs[0].shape[1:]), dtype=model.inputs[0].dtype)
    converter = tf.lite.TFLiteConverter.from_keras_model(keras.Model(fixed, model(fixed)))
    if int8:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([row[None]] for row in data)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    start = time.perf_counter()
    file = converter.convert()
    return file, time.perf_counter() - start


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 3:
        model = keras.models.load_model(sys.argv[3], custom_objects={"DepthwiseConv2D": Depthwise}, compile=False)
        shape = (SAMPLES, *model.inputs[0].shape[1:])
        rng = np.random.default_rng(1)
        whole = "int" in str(model.inputs[0].dtype)
        data = rng.integers(0, 60, shape).astype(np.int32) if whole else rng.uniform(0, 1, shape).astype(np.float32)
    else:
        model = built(name)
        data = np.random.default_rng(1).uniform(0, 255, (SAMPLES, SIZE, SIZE, 3)).astype(np.float32)
    if len(sys.argv) == 3:
        model.save(home / "model.keras")
    np.savez(home / "data.npz", x=data)
    facts = {}
    for precision in ("float32", "int8"):
        (home / precision).mkdir(exist_ok=True)
        try:
            file, seconds = converted(model, data, precision == "int8")
        except Exception as error:  # whatever it throws: the row says that there is no file
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            facts[precision] = {"error": lines[0][:200]}
        else:
            (home / precision / "model.tflite").write_bytes(file)
            facts[precision] = {"bytes": len(file), "seconds": seconds}
        print(json.dumps(facts), flush=True)  # each time: it may abort at the next


main()
