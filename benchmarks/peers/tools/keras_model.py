"""A Keras model with its batch fixed to 1 and its inputs named as the ONNX model's, for TFLiteConverter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np


class Depthwise(keras.layers.DepthwiseConv2D):  # type: ignore[misc]
    """As Keras 2 wrote it into .h5 files, with an argument that Keras 3 does not know."""

    def __init__(self, **config: Any) -> None:
        config.pop("groups", None)
        super().__init__(**config)


def fixed(folder: Path) -> keras.Model:
    """With Keras 3 the one form that TFLiteConverter gets right."""
    file = next(f for f in (folder / "model.keras", folder / "model.h5") if f.is_file())
    model = keras.models.load_model(file, custom_objects={"DepthwiseConv2D": Depthwise}, compile=False)
    names = np.load(folder / "calib.npz").files
    if len(names) == 1:
        order = dict(zip(names, model.inputs, strict=True))
    else:
        order = {port.name: port for port in model.inputs}
    inputs = {
        name: keras.Input(batch_shape=(1, *port.shape[1:]), dtype=port.dtype, name=name) for name, port in order.items()
    }
    return keras.Model(inputs, model(list(inputs.values())))
