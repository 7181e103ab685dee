"""The demo, as a user runs it: real models, real data, every installed runtime; and the example's files behind it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from edgekit import backends
from edgekit.demo import TARGET, digits, examples_dir, run_demo
from edgekit.errors import ArtifactError
from edgekit.target import load_target

TRAINING = Path(__file__).parent.parent / "examples" / "digits" / "training.json"
ACCURACY = json.loads(TRAINING.read_text(encoding="utf-8"))


def test_calibration_and_test_images_are_different_ones() -> None:
    calibration, test = np.load(digits("digits_calib.npz")), np.load(digits("digits_test.npz"))
    for data, count in ((calibration, 500), (test, 450)):
        assert data["x"].shape == (count, 28, 28)
        assert (data["x"].dtype, data["y"].dtype) == (np.uint8, np.int64)
        assert set(data["y"]) == set(range(10))
    seen = {hashlib.sha256(image.tobytes()).digest() for image in calibration["x"]}
    assert not [image for image in test["x"] if hashlib.sha256(image.tobytes()).digest() in seen]


def test_the_images_are_scikit_learns_enlarged() -> None:
    """Every test image, averaged back to 8×8, is one of the originals: nearest to it by far, and of the same class."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    originals, classes = load_digits(return_X_y=True)
    data = np.load(digits("digits_test.npz"))
    where = np.clip(np.rint((np.arange(8) + 0.5) * 28 / 8 - 0.5).astype(int), 0, 27)
    small = data["x"][:, where][:, :, where].reshape(len(data["x"]), 64) * (16 / 255)
    distance = (small**2).sum(1)[:, None] - 2 * small @ originals.T + (originals**2).sum(1)[None]
    nearest = distance.argmin(1)
    assert (classes[nearest] == data["y"]).all()
    assert len(set(nearest)) == len(nearest)


def test_a_missing_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="install edgekit again"):
        digits("digits_transformer.onnx")
    assert examples_dir().is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_the_demo_measures_every_installed_candidate(model: str, tmp_path: Path) -> None:
    document = run_demo(model, tmp_path / "demo", quick=True)
    rows = document["artifacts"]
    kinds = ("all", "products") if model == "mlp" else ("all",)
    offered = [c for c in load_target(TARGET).candidates if not c.on_request and c.for_models in kinds]
    expected = {c.id for c in offered if backends.get(c.backend).missing() is None}
    assert {f"{r['backend']}-{r['precision']}" for r in rows} == expected
    for row in rows:
        assert row["valid"], row["reasons"]
        assert row["latency_s"]["p50"] > 0
        assert row["parity"]["label_agreement"] >= 0.98
        accuracy = row["quality"]["accuracy"]
        if row["precision"] == "float32":  # one image is 0.0022; float kernels may round one over a boundary
            assert accuracy == pytest.approx(ACCURACY[model]["accuracy"]["test"], abs=0.003)
        else:
            assert accuracy >= ACCURACY[model]["accuracy"]["test"] - 0.01
            assert row["parity"].get("per_op_max_lsb") in (None, 0, 1)
    assert document["dataset"]["samples"] == 450
    assert document["verdict"][TARGET]["ship"] in expected
