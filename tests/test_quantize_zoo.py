"""Quantization of real trained models: accuracy and agreement with float in QDQ arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import model as M
from edgekit.dataset import open_dataset
from edgekit.passes.fold import Fold
from edgekit.passes.quantize import QuantizeInt8
from edgekit.preprocessing import Preprocessing
from edgekit.sources import load
from tests.quantize_graphs import Array

SIGNED = Preprocessing(scale=1 / 127.5, mean=(1.0,), std=(1.0,))  # to [-1, 1], what the MobileNetV2 was trained on
UNIT = Preprocessing(scale=1 / 255)


def run(session: M.FloatSession, data: Any) -> tuple[Array, Array]:
    outputs, labels = [], []
    for batch in data.batches(50):
        outputs.append(next(iter(session.run(batch.inputs).values())))
        labels.append(batch.labels)
    return np.concatenate(outputs), np.concatenate(labels)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize(
    ("file", "calibration", "test", "how"),
    [
        ("mobilenet_v2_cifar.onnx", "cifar10_calib.npz", "cifar10_test.npz", SIGNED),
        ("mlp_784_mnist.onnx", "mnist_calib.npz", "mnist_test.npz", UNIT),
        ("lstm_mnist_rows.onnx", "mnist_calib.npz", "mnist_test.npz", UNIT),
    ],
)
def test_within_a_point_of_float(
    zoo: Path, bits: Any, file: str, calibration: str, test: str, how: Preprocessing
) -> None:
    model = Fold()(load(zoo / "models" / file).model, None)
    sig = M.signature(model)
    samples = open_dataset(zoo / "data" / calibration, preprocessing=how).bind(sig).take(256)
    data = open_dataset(zoo / "data" / test, preprocessing=how).bind(sig)
    written = QuantizeInt8(weight_bits=bits)(model, samples)
    wanted, labels = run(M.FloatSession(model), data)
    got, _ = run(M.FloatSession(written, optimize=False), data)
    accuracy, int8_accuracy = (float((o.argmax(-1) == labels).mean()) for o in (wanted, got))
    assert accuracy > 0.7
    assert int8_accuracy >= accuracy - 0.01
    assert (wanted.argmax(-1) == got.argmax(-1)).mean() >= 0.97


@pytest.mark.slow
def test_causal_transformer_keeps_its_mask(zoo: Path) -> None:
    """Quantizing the mask addition would cost bits per character: 5.5 instead of 2.5."""
    model = Fold()(load(zoo / "models" / "gpt_char_tinyshakespeare.onnx").model, None)
    tokens = np.load(zoo / "data" / "tinyshakespeare_tokens.npz")
    (spec,) = M.signature(model).inputs
    train = tokens["train"][: 64 * 40].reshape(-1, 64).astype(spec.dtype)
    held = tokens["val"][: 64 * 20 + 1]
    x, y = held[:-1].reshape(-1, 64).astype(spec.dtype), held[1:].reshape(-1, 64)

    from tests.quantize_graphs import Samples

    written = QuantizeInt8()(model, Samples({spec.name: train}))  # type: ignore[arg-type]

    def bits_per_character(session: M.FloatSession) -> float:
        logits = next(iter(session.run({spec.name: x}).values())).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return float(-np.take_along_axis(log_p, y[..., None], axis=-1).mean() / np.log(2))

    wanted = bits_per_character(M.FloatSession(model))
    assert wanted < 3
    assert bits_per_character(M.FloatSession(written, optimize=False)) < wanted + 0.05
