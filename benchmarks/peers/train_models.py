"""Trains small models of many families on real data, for measuring on models that edgekit's methods were not made with.

    EDGEKIT_ZOO=path/to/zoo python benchmarks/peers/train_models.py OUT_DIR [--only NAME ...]

Needs TensorFlow, and edgekit in an environment of its own or the same (--edgekit PYTHON), which writes the ONNX files
and checks them against Keras. Each takes up to four minutes on one core. Writes OUT_DIR/NAME/{model.keras, model.onnx,
calib.npz, test.npz, about.json}; arrays are named as the model's inputs, y is what it should say.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import architectures
import keras
import numpy as np
import real_data
import tensorflow as tf
from real_data import Array, Data, Tensors

SEED = 0
TEACHER = "mobilenet_v2_cifar.keras"  # takes x / 127.5 - 1; gives logits
TEMPERATURE = 2.0  # Hinton et al. 2015, of the distillation
ONNX = (
    "import sys; from pathlib import Path; from edgekit import model as M, pipeline; "
    "Path(sys.argv[2]).write_bytes(M.to_bytes(pipeline.load(sys.argv[1]).model))"
)


@dataclass(frozen=True)
class Recipe:
    """How one model comes about. data: (zoo, generator) -> Data; score: (outputs, y) -> number."""

    task: str
    trained_on: str
    model: Callable[[], keras.Model]
    data: Callable[[Path, np.random.Generator], Data]
    loss: keras.losses.Loss | Callable[..., tf.Tensor]
    epochs: int
    rate: float
    metric: str = "accuracy"


def _accuracy(outputs: Array, y: Array) -> float:
    return float((outputs.argmax(-1) == y).mean())


def _rmse(outputs: Array, y: Array) -> float:
    return float(np.sqrt(np.mean((outputs.astype(np.float64) - y) ** 2)))


METRICS = {"accuracy": _accuracy, "rmse": _rmse}


def _distillation(teacher: tf.Tensor, student: tf.Tensor) -> tf.Tensor:
    return keras.losses.categorical_crossentropy(
        tf.nn.softmax(teacher / TEMPERATURE), student / TEMPERATURE, from_logits=True
    )


@cache
def _distilled(zoo: Path) -> Data:
    """CIFAR-10 with a teacher's logits as labels; the pool is the same for every student."""
    pool, data = real_data.cifar_pool(zoo, 24_000, np.random.default_rng(SEED))
    teacher = keras.models.load_model(zoo / "models" / TEACHER, compile=False)
    told = teacher.predict(pool, batch_size=250, verbose=0)
    return Data({"image": pool}, told, data.calibration, data.calibration_y, data.test, data.test_y)


def _reproduced(zoo: Path, rng: np.random.Generator) -> Data:
    """MNIST whose labels are the images themselves."""
    data = real_data.mnist(zoo, 12_000, rng, "image", (28, 28, 1))
    return Data(
        data.train,
        data.train["image"],
        data.calibration,
        data.calibration["image"],
        data.test,
        data.test["image"],
    )


CIFAR = "1500 CIFAR-10 images and 200 photographs, augmented to 24000, with the logits of a MobileNetV2 as labels"
MNIST = "1000 MNIST digits, warped at random"
TEXT = "the first 90 % of tinyshakespeare; tested on the rest"
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RECIPES = {
    "mobilenet_v3": Recipe(
        "classification", CIFAR, architectures.mobilenet_v3, lambda zoo, rng: _distilled(zoo), _distillation, 4, 4e-3
    ),
    "vit": Recipe(
        "classification",
        MNIST,
        architectures.vit,
        lambda zoo, rng: real_data.mnist(zoo, 24_000, rng, "image", (28, 28, 1)),
        SPARSE,
        6,
        1.5e-3,
    ),
    "cnn1d": Recipe(
        "classification",
        MNIST,
        architectures.cnn1d,
        lambda zoo, rng: real_data.mnist(zoo, 24_000, rng, "signal", (784, 1)),
        SPARSE,
        6,
        2e-3,
    ),
    "efficientnet": Recipe(
        "classification", CIFAR, architectures.efficientnet, lambda zoo, rng: _distilled(zoo), _distillation, 4, 4e-3
    ),
    "bert": Recipe(
        "tokens",
        TEXT,
        architectures.bert,
        lambda zoo, rng: real_data.word_ends(zoo, 24_000, rng),
        SPARSE,
        4,
        2e-3,
    ),
    "autoencoder": Recipe(
        "regression", MNIST, architectures.autoencoder, _reproduced, keras.losses.BinaryCrossentropy(), 6, 2e-3, "rmse"
    ),
    "gru": Recipe(
        "classification",
        TEXT,
        architectures.gru,
        lambda zoo, rng: real_data.next_character(zoo, 60_000, rng),
        SPARSE,
        3,
        4e-3,
    ),
    "bilstm": Recipe(
        "classification",
        TEXT,
        architectures.bilstm,
        lambda zoo, rng: real_data.hidden_character(zoo, 60_000, rng),
        SPARSE,
        3,
        4e-3,
    ),
}


def _given(model: keras.Model, x: Tensors) -> Array | list[Array]:
    """The arrays as Keras takes them: in the order of the model's inputs, one by itself."""
    arrays = [x[i.name] for i in model.inputs]
    return arrays if len(arrays) > 1 else arrays[0]


def train(recipe: Recipe, data: Data) -> keras.Model:
    """AdamW with a short warm-up and a cosine; batches of 64."""
    model = recipe.model()
    inputs = _given(model, data.train)
    steps = recipe.epochs * (len(data.train_y) // 64)
    rate = keras.optimizers.schedules.CosineDecay(
        recipe.rate / 10, steps - steps // 20, warmup_target=recipe.rate, warmup_steps=steps // 20
    )
    model.compile(keras.optimizers.AdamW(rate, weight_decay=0.02, clipnorm=1.0), recipe.loss)
    model.fit(inputs, data.train_y, 64, recipe.epochs, verbose=2)
    return model


def write(home: Path, recipe: Recipe, model: keras.Model, data: Data, seconds: float, python: str) -> float:
    """All files of one model; returns its score on the test data."""
    home.mkdir(parents=True, exist_ok=True)
    model.save(home / "model.keras")
    environment = {**os.environ, "EDGEKIT_KERAS_PYTHON": sys.executable}
    subprocess.run([python, "-c", ONNX, home / "model.keras", home / "model.onnx"], check=True, env=environment)
    np.savez_compressed(home / "calib.npz", y=data.calibration_y, **data.calibration)
    np.savez_compressed(home / "test.npz", y=data.test_y, **data.test)
    said = model.predict(_given(model, data.test), batch_size=250, verbose=0)
    score = METRICS[recipe.metric](said, data.test_y)
    about = {
        "task": recipe.task,
        "trained_on": recipe.trained_on,
        "float_score": score,
        "metric": recipe.metric,
        "parameters": model.count_params(),
        "training_cpu_s": round(seconds, 1),
        "seed": SEED,
    }
    (home / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    beside = Path(__file__).parents[2] / ".venv/bin/python"
    parser.add_argument("--edgekit", default=str(beside if beside.exists() else sys.executable))
    chosen = parser.parse_args()
    if not os.environ.get("EDGEKIT_ZOO"):
        sys.exit("not run: set EDGEKIT_ZOO to the folder with models/ and data/")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    for name in chosen.only:
        keras.utils.set_random_seed(SEED)
        began = time.process_time()
        data = RECIPES[name].data(Path(os.environ["EDGEKIT_ZOO"]), np.random.default_rng(SEED))
        model = train(RECIPES[name], data)
        seconds = time.process_time() - began
        score = write(chosen.out / name, RECIPES[name], model, data, seconds, chosen.edgekit)
        told = f"{RECIPES[name].metric} {score:.4f}, {model.count_params()} parameters, {seconds:.0f} s of CPU"
        print(f"{name}: {told}", flush=True)


if __name__ == "__main__":
    main()
