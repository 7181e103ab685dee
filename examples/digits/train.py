"""Train the two digit classifiers of this folder and write everything that is committed beside this script.

    python -m venv .venv-keras
    .venv-keras/bin/pip install -c .ci/constraints.txt tensorflow keras tf2onnx scikit-learn
    .venv-keras/bin/python examples/digits/train.py

Data: scikit-learn's handwritten digits (1797 images, 8×8, values 0..16), enlarged to 28×28 by bilinear interpolation.
Models: an MLP 784-256-128-10 and a small CNN, both with ReLU, cross-entropy and Adam; input float32 in [0, 1].
The test images are set aside first and are used once, for the accuracy that `training.json` records: the number of
epochs is fixed in this file, and no choice in it was made by looking at the test images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import onnx
import onnxruntime
import sklearn
import tensorflow as tf
import tf2onnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HERE = Path(__file__).parent
SEED = 20  # of the split, of the initial weights, of the order of the batches and of the augmentation
TEST_SAMPLES = 450
CALIBRATION_SAMPLES = 500
BATCH = 32
EPOCHS = {"mlp": 60, "cnn": 60}
LEARNING_RATE = 1e-3

Array = np.ndarray[Any, Any]


def enlarge(images: Array, size: int = 28) -> Array:
    """Bilinear, half-pixel centres. images: float (n, 8, 8) in [0, 16]. Returns uint8 (n, size, size) in [0, 255]."""
    old = images.shape[1]
    where = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    low = np.minimum(where.astype(int), old - 2)
    weight = np.zeros((size, old))
    weight[np.arange(size), low] = 1 - (where - low)
    weight[np.arange(size), low + 1] = where - low
    big = np.einsum("ij,njk,lk->nil", weight, images, weight)
    return np.rint(big * (255 / 16)).astype(np.uint8)


def split() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(train x, train y), (test x, test y): stratified by class, without a single image in both."""
    digits = load_digits()
    x, y = enlarge(digits.images), digits.target.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=TEST_SAMPLES, stratify=y, random_state=SEED)
    seen = {hashlib.sha256(image.tobytes()).digest() for image in train_x}
    if any(hashlib.sha256(image.tobytes()).digest() in seen for image in test_x):
        raise SystemExit("an image is in both parts: remove the duplicate")
    return (train_x, train_y), (test_x, test_y)


def mlp() -> keras.Model:
    image = keras.Input((784,), name="image")
    h = keras.layers.Dense(256, activation="relu", name="dense_1")(image)
    h = keras.layers.Dropout(0.2, name="dropout_1")(h)
    h = keras.layers.Dense(128, activation="relu", name="dense_2")(h)
    h = keras.layers.Dropout(0.2, name="dropout_2")(h)
    return keras.Model(image, keras.layers.Dense(10, activation="softmax", name="probabilities")(h), name="digits_mlp")


def cnn() -> keras.Model:
    """conv 3×3/2, then three depthwise-separable blocks, then global average pooling: 28×28 -> 14×14 -> 7×7."""

    def unit(h: Any, layer: Any, name: str) -> Any:
        h = layer(h)
        h = keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(h)
        return keras.layers.ReLU(name=f"{name}_relu")(h)

    conv, depthwise = keras.layers.Conv2D, keras.layers.DepthwiseConv2D
    image = keras.Input((28, 28, 1), name="image")
    h = unit(image, conv(16, 3, 2, padding="same", use_bias=False, name="stem"), "stem")
    for n, (channels, stride) in enumerate([(32, 2), (64, 1), (64, 1)], start=1):
        h = unit(h, depthwise(3, stride, padding="same", use_bias=False, name=f"depthwise_{n}"), f"depthwise_{n}")
        h = unit(h, conv(channels, 1, use_bias=False, name=f"pointwise_{n}"), f"pointwise_{n}")
    h = keras.layers.GlobalAveragePooling2D(name="pool")(h)
    return keras.Model(image, keras.layers.Dense(10, activation="softmax", name="probabilities")(h), name="digits_cnn")


def shifted(x: Array, rng: np.random.Generator) -> Array:
    """Each image of uint8 (n, 28, 28) moved by up to 2 pixels each way, zeros moving in."""
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2)))
    row, column = rng.integers(0, 5, (2, len(x)))
    return np.stack([image[r : r + 28, c : c + 28] for image, r, c in zip(padded, row, column, strict=True)])


def prepared(model: keras.Model, x: Array) -> Array:
    """uint8 (n, 28, 28) -> what the model takes: float32 in [0, 1], (n, 784) or (n, 28, 28, 1)."""
    return (x.astype(np.float32) / 255).reshape(len(x), *model.inputs[0].shape[1:])


def fit(model: keras.Model, epochs: int, x: Array, y: Array) -> None:
    """Cross-entropy, Adam with a learning rate that falls to zero along a cosine; shifts as augmentation."""
    rng = np.random.default_rng(SEED)
    steps = epochs * -(-len(x) // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    for _ in range(epochs):
        model.fit(prepared(model, shifted(x, rng)), y, batch_size=BATCH, epochs=1, verbose=0)


def export(bare: keras.Model, stem: Path, sample: Array) -> float:
    """Write `.keras` and `.onnx` (dynamic batch); returns the largest difference between them.

    bare: never compiled, so that no optimizer state is saved; `save(include_optimizer=False)` does not keep it out.
    """
    bare.save(stem.with_suffix(".keras"))
    signature = [tf.TensorSpec((None, *bare.inputs[0].shape[1:]), tf.float32, name="image")]
    proto, _ = tf2onnx.convert.from_keras(bare, input_signature=signature, opset=18)
    proto.graph.name = stem.name
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, stem.with_suffix(".onnx"))
    session = onnxruntime.InferenceSession(str(stem.with_suffix(".onnx")), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: sample})[0]
    return float(np.abs(got - bare.predict(sample, verbose=0)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: beside this script)")
    parser.add_argument("--model", choices=["mlp", "cnn", "both"], default="both")
    args = parser.parse_args()
    (train_x, train_y), (test_x, test_y) = split()
    chosen = np.random.default_rng(SEED).permutation(len(train_x))[:CALIBRATION_SAMPLES]
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out / "digits_calib.npz", x=train_x[chosen], y=train_y[chosen])
    np.savez_compressed(args.out / "digits_test.npz", x=test_x, y=test_y)

    record_path = args.out / "training.json"
    record: dict[str, Any] = json.loads(record_path.read_text()) if record_path.exists() else {}
    record |= {
        "seed": SEED,
        "samples": {"train": len(train_x), "calibration (of train)": CALIBRATION_SAMPLES, "test": len(test_x)},
        "versions": {m.__name__: m.__version__ for m in (tf, keras, tf2onnx, onnx, sklearn, np)},
    }
    for name, build in (("mlp", mlp), ("cnn", cnn)):
        if args.model not in (name, "both"):
            continue
        keras.utils.set_random_seed(SEED)
        tf.config.experimental.enable_op_determinism()
        model = build()
        fit(model, EPOCHS[name], train_x, train_y)
        accuracy = {
            part: round(float(np.mean(model.predict(prepared(model, x), verbose=0).argmax(1) == y)), 4)
            for part, x, y in (("train", train_x, train_y), ("test", test_x, test_y))
        }
        bare = build()
        bare.set_weights(model.get_weights())
        difference = export(bare, args.out / f"digits_{name}", prepared(model, test_x))
        record[name] = {
            "epochs": EPOCHS[name],
            "parameters": model.count_params(),
            "accuracy": accuracy,
            "onnx_max_abs_difference": difference,
        }
        print(name, json.dumps(record[name]))
    with tempfile.NamedTemporaryFile("w", dir=args.out, delete=False) as handle:
        handle.write(json.dumps(record, indent=2) + "\n")
    Path(handle.name).replace(record_path)
    record_path.chmod(0o644)


if __name__ == "__main__":
    main()
