"""Keras in: tiny models built by a real Keras in another process; results compared with that Keras by `load`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

from edgekit import errors, sources
from edgekit import model as M


@cache
def _python() -> str | None:
    python = os.environ.get("EDGEKIT_KERAS_PYTHON") or sys.executable
    probe = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('tensorflow', 'keras', 'tf2onnx'))))"
    return python if subprocess.run([python, "-c", probe], check=False).returncode == 0 else None


@pytest.fixture
def keras_python() -> str:
    python = _python()
    if python is None:
        pytest.skip("tensorflow, keras and tf2onnx are not installed (set EDGEKIT_KERAS_PYTHON to a Python with them)")
    return python


_BUILD = """
import sys, keras
from keras import layers as L
def two():
    a, b = keras.Input((6,), name="a"), keras.Input((4,), name="b")
    h = L.Concatenate()([L.Dense(5, activation="relu")(a), L.Dense(3)(b)])
    return keras.Model([a, b], [L.Dense(2, name="left")(h), L.Dense(3, name="right")(h)])
def cnn():
    return keras.Sequential([keras.Input((9, 7, 3)), L.Conv2D(5, 3, padding="same"), L.BatchNormalization(),
        L.Permute((3, 1, 2)), L.Activation(lambda x: x) if 0 else L.ReLU(), L.Flatten(), L.Dense(4)])
def gelu(): return keras.Sequential([keras.Input((6,)), L.Dense(8), L.Activation("gelu"), L.Dense(2)])
def lstm(): return keras.Sequential([keras.Input((5, 3)), L.LSTM(4), L.Dense(2)])
def lam(): return keras.Sequential([keras.Input((3,)), L.Lambda(lambda x: x * 2, name="double")])
def sizes(): return keras.Sequential([keras.Input((None, None, 3), name="image"), L.Conv2D(2, 3),
                                      L.GlobalAveragePooling2D()])
model = globals()[sys.argv[1]]()
model.export(sys.argv[2]) if sys.argv[2].endswith("_saved") else model.save(sys.argv[2])
"""


def _build(python: str, kind: str, path: Path) -> Path:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([python, "-c", _BUILD, kind, str(path)], check=True, capture_output=True, env=environment)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("two", ".keras"), ("cnn", ".keras"), ("cnn", ".h5"), ("gelu", ".keras"), ("lstm", ".keras"), ("cnn", "_saved")],
)
def test_conversion_is_exact(keras_python: str, tmp_path: Path, kind: str, suffix: str) -> None:
    found = sources.load(_build(keras_python, kind, tmp_path / f"m{suffix}"))
    sig = M.signature(found.model)
    assert found.record["max_rel_error"] <= 1e-4
    assert all(s.shape[0] == "batch" for s in (*sig.inputs, *sig.outputs))
    assert not any(set(s.name) & set(":/") for s in sig.inputs)
    if kind == "two":
        assert [(s.name, s.shape) for s in sig.inputs] == [("a", ("batch", 6)), ("b", ("batch", 4))]
        assert [s.shape[1] for s in sig.outputs] == [2, 3]


@pytest.mark.slow
def test_unknown_sizes_are_asked_for_and_taken(keras_python: str, tmp_path: Path) -> None:
    path = _build(keras_python, "sizes", tmp_path / "m.keras")
    with pytest.raises(errors.ShapeError, match="--shape image="):
        sources.load(path)
    found = sources.load(path, shapes={"image": (-1, 8, 6, 3)})
    assert M.signature(found.model).inputs[0].shape == ("batch", 8, 6, 3)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_lambda_is_refused_by_name(keras_python: str, tmp_path: Path, suffix: str) -> None:
    path = _build(keras_python, "lam", tmp_path / f"m{suffix}")
    with pytest.raises(errors.UnsafeModelError, match="double"):
        sources.load(path)


def _archive(path: Path, config: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.8.0"}))
        archive.writestr("model.weights.h5", b"")
    return path


def test_lambda_is_refused_without_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_KERAS_PYTHON", str(tmp_path / "must-not-run"))
    layer = {"class_name": "Lambda", "config": {"name": "evil", "function": {"class_name": "__lambda__"}}}
    path = _archive(tmp_path / "m.keras", {"class_name": "Sequential", "config": {"layers": [layer]}})
    with pytest.raises(errors.UnsafeModelError, match="evil"):
        sources.load(path)


def test_truncated_archive_and_foreign_zip(tmp_path: Path) -> None:
    whole = _archive(tmp_path / "m.keras", {"class_name": "Sequential", "config": {}}).read_bytes()
    (tmp_path / "cut.keras").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "zip.keras", "w") as archive:
        archive.writestr("readme.txt", "no model")
    for name in ("cut", "zip"):
        with pytest.raises(errors.ModelFileError, match=name):
            sources.load(tmp_path / f"{name}.keras")


def test_missing_interpreter_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_KERAS_PYTHON", str(tmp_path / "no-python"))
    path = _archive(tmp_path / "m.keras", {"class_name": "Sequential", "config": {}})
    with pytest.raises(errors.MissingExtraError, match="no-python"):
        sources.load(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mlperf_tiny/resnet8.h5",
        "mlperf_tiny/vww_96.h5",
        "mlperf_tiny/kws_saved_model",
        "mobilenet_v2_cifar.keras",
        "mlp_784_mnist.keras",
        "gpt_char_tinyshakespeare.keras",
        "lstm_mnist_rows.keras",
        "dcgan_mnist_generator.keras",
    ],
)
def test_real_models(keras_python: str, zoo: Path, name: str) -> None:
    found = sources.load(zoo / "models" / name)
    assert found.record["max_rel_error"] <= 1e-4
    assert M.batch_of(M.signature(found.model)) is None
