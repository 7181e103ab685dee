"""The models of the comparison: each becomes a folder with a float ONNX model, calibration and test samples.

NAME/model.onnx, calib.npz (arrays named as the model's inputs, preprocessed), validation.npz (the same and labels `y`,
for tools that want labels), test.npz (inputs, and `y` where there are labels), about.json (task, trained_on), and
model.keras or model.h5 where the model came from Keras.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

Task = Literal["classification", "tokens", "regression"]
Arrays = dict[str, np.ndarray[Any, Any]]
TEST_SAMPLES = 2000
LABELS = "y"
_GIVEN = ("model.onnx", "calib.npz", "test.npz")  # beside about.json, in a folder of --extra
_CONTEXT = 64  # tokens that gpt_char reads at once


@dataclass(frozen=True)
class Case:
    """One prepared model. keras: its Keras file, where it has one."""

    name: str
    folder: Path
    task: Task
    trained_on: str

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def keras(self) -> Path | None:
        return next((f for f in (self.folder / "model.keras", self.folder / "model.h5") if f.is_file()), None)


@dataclass(frozen=True)
class Zoo:
    """A model of EDGEKIT_ZOO. samples: (data folder) -> (calibration, test), each one input `x` and labels `y`."""

    file: str
    keras: str
    task: Task
    trained_on: str
    samples: Callable[[Path], tuple[Arrays, Arrays]]


def _images(name: str, prepare: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[Path], tuple[Arrays, Arrays]]:
    def read(data: Path) -> tuple[Arrays, Arrays]:
        parts = [np.load(data / f"{name}_{part}.npz") for part in ("calib", "test")]
        calib, test = ({"x": prepare(p["x"].astype(np.float32)), LABELS: p["y"]} for p in parts)
        return calib, test

    return read


def _photographs(data: Path) -> tuple[Arrays, Arrays]:
    """Unlabelled: the even ones calibrate, the odd ones test; each part doubled by its mirror images."""
    x = np.load(data / "imagenet_photos_96.npz")["x"].astype(np.float32) / 255
    calib, test = ({"x": np.concatenate([part, part[:, :, ::-1]])} for part in (x[0::2], x[1::2]))
    return calib, test


def _text(data: Path) -> tuple[Arrays, Arrays]:
    """Windows of 64 characters and, as labels, the characters that follow each; no window overlaps another."""
    tokens = np.load(data / "tinyshakespeare_tokens.npz")

    def windows(text: np.ndarray[Any, Any]) -> Arrays:
        count = (len(text) - 1) // _CONTEXT
        ids = text[: count * _CONTEXT].reshape(count, _CONTEXT)
        following = text[1 : count * _CONTEXT + 1].reshape(count, _CONTEXT)
        return {"x": ids.astype(np.int32), LABELS: following.astype(np.int64)}

    train = windows(tokens["train"])
    spread = np.linspace(0, len(train["x"]) - 1, 1000).astype(int)
    return {name: values[spread] for name, values in train.items()}, windows(tokens["val"])


def _noise(data: Path) -> tuple[Arrays, Arrays]:
    rng = np.random.default_rng(0)
    calib, test = ({"x": rng.standard_normal((n, 64)).astype(np.float32)} for n in (1000, 500))
    return calib, test


def _flat(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (x / 255).reshape(len(x), -1)


ZOO = {
    "mobilenet_v2_cifar": Zoo(
        "mobilenet_v2_cifar.onnx",
        "mobilenet_v2_cifar.keras",
        "classification",
        "CIFAR-10",
        _images("cifar10", lambda x: x / 127.5 - 1),
    ),
    "resnet8": Zoo(
        "mlperf_tiny/resnet8.h5",
        "mlperf_tiny/resnet8.h5",
        "classification",
        "CIFAR-10 (MLPerf Tiny)",
        _images("cifar10", lambda x: x),
    ),
    "mlp_784": Zoo("mlp_784_mnist.onnx", "mlp_784_mnist.keras", "classification", "MNIST", _images("mnist", _flat)),
    "gpt_char": Zoo(
        "gpt_char_tinyshakespeare.onnx", "gpt_char_tinyshakespeare.keras", "tokens", "Tiny Shakespeare", _text
    ),
    "lstm_mnist_rows": Zoo(
        "lstm_mnist_rows.onnx",
        "lstm_mnist_rows.keras",
        "classification",
        "MNIST, row by row",
        _images("mnist", lambda x: x / 255),
    ),
    "dcgan": Zoo("dcgan_mnist_generator.onnx", "dcgan_mnist_generator.keras", "regression", "MNIST", _noise),
    "vww_96": Zoo(
        "mlperf_tiny/vww_96.h5",
        "mlperf_tiny/vww_96.h5",
        "classification",
        "Visual Wake Words (MLPerf Tiny)",
        _photographs,
    ),
}


def available(extra: Path | None) -> dict[str, Path | None]:
    """Names of the models there are; for those from `extra` their folder, None for the zoo's."""
    found: dict[str, Path | None] = dict.fromkeys(ZOO) if os.environ.get("EDGEKIT_ZOO") else {}
    if extra is not None:
        complete = [
            f.parent for f in sorted(extra.glob("*/about.json")) if all((f.parent / g).is_file() for g in _GIVEN)
        ]
        found |= {folder.name: folder for folder in complete}
    return found


def prepare(name: str, given: Path | None, work: Path, samples: int) -> Case:
    """The folder of one model below `work`, made anew: with other samples nothing in it would hold."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    calib, test, about = _from_zoo(ZOO[name], folder) if given is None else _from_folder(given, folder)
    _save(folder / "calib.npz", {k: v[:samples] for k, v in calib.items() if k != LABELS})
    _save(folder / "validation.npz", calib)
    _save(folder / "test.npz", {k: v[:TEST_SAMPLES] for k, v in test.items()})
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    return Case(name, folder, about["task"], about.get("trained_on", ""))


def _from_zoo(zoo: Zoo, folder: Path) -> tuple[Arrays, Arrays, dict[str, Any]]:
    root = Path(os.environ["EDGEKIT_ZOO"])
    source, keras = root / "models" / zoo.file, root / "models" / zoo.keras
    model = folder / "model.onnx"
    if not model.is_file():
        _to_onnx(source, model)
    _copy(keras, folder / f"model{keras.suffix}")
    name = onnx.load(model, load_external_data=False).graph.input[0].name
    calib, test = zoo.samples(root / "data")
    renamed = [{name if key == "x" else key: values for key, values in part.items()} for part in (calib, test)]
    return renamed[0], renamed[1], {"task": zoo.task, "trained_on": zoo.trained_on}


def _from_folder(given: Path, folder: Path) -> tuple[Arrays, Arrays, dict[str, Any]]:
    about = json.loads((given / "about.json").read_text(encoding="utf-8"))
    for file in ("model.onnx", "model.onnx.data", "model.keras", "model.h5"):
        if (given / file).is_file():
            _copy(given / file, folder / file)
    parts = [dict(np.load(given / f"{part}.npz")) for part in ("calib", "test")]
    return parts[0], parts[1], about


def _to_onnx(source: Path, target: Path) -> None:
    if source.suffix == ".onnx":
        _copy(source, target)
        return
    import onnx_ir as ir

    from edgekit import pipeline

    ir.save(pipeline.load(source).model, target)


def _save(target: Path, arrays: Arrays) -> None:
    beside = target.with_suffix(".new.npz")
    np.savez(beside, allow_pickle=False, **arrays)
    beside.replace(target)  # another run may be reading it


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)  # the contents only: the zoo's files may be read-only
