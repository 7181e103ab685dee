"""Writes networks of keras.applications with random weights: python speed_keras.py FOLDER SIZE NAME... (TensorFlow)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import numpy as np

SEED = 0


def built(name: str, size: int) -> keras.Model:
    """Batch norms fitted to noise, so that nothing vanishes on the way."""
    keras.utils.set_random_seed(SEED)
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
    noise = np.random.default_rng(SEED).uniform(0, 255, (32, size, size, 3)).astype(np.float32)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(noise, training=True)
    return model


def main() -> None:
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    for name in sys.argv[3:]:
        built(name, size).save(folder / f"{name}.keras")


main()
