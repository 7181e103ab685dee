"""Golden inputs: what they are, what is answered to them, and how near another processor's answer must be."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from edgekit import artifact, backends
from edgekit.backends import onnxruntime as ort_backend
from edgekit.backends import openvino as ov_backend
from edgekit.backends.tflite.lowering import lower
from edgekit.backends.tflite.writer import write
from edgekit.dataset import random_dataset
from edgekit.deploy import golden
from edgekit.errors import BundleError
from edgekit.model import signature
from edgekit.passes.fold import Fold
from edgekit.passes.quantize import QuantizeInt8
from edgekit.passes.roundings import leave_out
from edgekit.target import DeviceSpec
from tests.deploy_build import DIGITS, build
from tests.models import MODELS
from tests.tflite_files import Op, Values, pack
from tests.tflite_interpreter import run

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
ARM = DeviceSpec("aarch64")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("golden") / "build")


def made(root: Path, candidate: str, target: str = "linux-arm64", **options: object) -> golden.Golden:
    folder = root / target / candidate
    return golden.make(root, folder, artifact.read_manifest(folder), ARM, **options)  # type: ignore[arg-type]


def test_the_outputs_are_those_of_the_runtime_itself(root: Path) -> None:
    told = made(root, "onnxruntime-float32")
    session = ort.InferenceSession(str(root / "linux-arm64" / "onnxruntime-float32" / "model.onnx"))
    (name,) = told.outputs
    np.testing.assert_allclose(told.outputs[name], session.run([name], told.inputs)[0], rtol=1e-6)
    exact = made(root, "tflite-int8")
    direct = run((root / "linux-arm64" / "tflite-int8" / "model.tflite").read_bytes(), exact.inputs)
    np.testing.assert_array_equal(exact.outputs[name], direct[name])
    assert exact.peak_rss_bytes is None or exact.peak_rss_bytes > 10 * 2**20  # an interpreter and numpy, at least


def test_made_up_inputs_fill_the_calibrated_range(root: Path) -> None:
    (value,) = made(root, "tflite-float32").inputs.values()
    quantized = artifact.read_manifest(root / "linux-arm64" / "tflite-int8").quantization
    assert quantized is not None
    told = quantized["activations"]["image"]
    assert told["low"] <= value.min() < told["low"] + 0.05 * (told["high"] - told["low"])
    assert told["high"] >= value.max() > told["high"] - 0.05 * (told["high"] - told["low"])
    np.testing.assert_array_equal(value, next(iter(made(root, "onnxruntime-int8").inputs.values())))


def test_real_samples_are_prepared_as_the_models_data_were(root: Path) -> None:
    (value,) = made(root, "tflite-int8", data=str(DIGITS / "digits_test.npz")).inputs.values()
    with np.load(DIGITS / "digits_test.npz") as stored:
        samples = stored["x"].reshape(len(stored["x"]), -1).astype(np.float32) / 255
    for row in value:
        assert np.abs(samples - row).max(axis=1).min() < 1e-6


def test_the_arrays_are_numpys_own_and_the_same_bytes_each_time(root: Path) -> None:
    told = made(root, "tflite-int8")
    assert told.npz() == made(root, "tflite-int8").npz()
    with np.load(io.BytesIO(told.npz()), allow_pickle=False) as stored:
        assert sorted(stored.files) == sorted(["in.image", *(f"out.{name}" for name in told.outputs)])
        np.testing.assert_array_equal(stored["in.image"], told.inputs["image"])


def test_how_near_depends_on_what_computes_alike_elsewhere(root: Path) -> None:
    assert made(root, "onnxruntime-float32").tolerance == {"kind": "relative", "value": 1e-4}
    # sums of integers, then a softmax in float
    assert made(root, "tflite-int8").tolerance == {"kind": "relative", "value": golden.TAIL_TOLERANCE}
    assert made(root, "onnxruntime-int8").tolerance == {"kind": "relative", "value": golden.LEAST_FLIPS}
    # another runtime than the one that answers here
    old = DeviceSpec("armv7l", runtimes={"tflite": "tflite-runtime==2.14.0"})
    folder = root / "linux-armv7" / "tflite-int8"
    manifest = artifact.read_manifest(folder)
    outputs = {"y": np.array([[-2.0, 1.0]], np.float32)}
    tflite = backends.get("tflite")
    assert golden.tolerance(tflite, folder, manifest, outputs, old)["value"] == golden.LEAST_FLIPS
    # where flipped roundings are known to move the outputs by a tenth of the largest
    far = replace(manifest, parity={**(manifest.parity or {}), "end_to_end_max_abs": 0.2})
    assert golden.tolerance(tflite, folder, far, outputs, old)["value"] == pytest.approx(0.3)


@pytest.mark.parametrize(("name", "expected"), [("mlp", "bits"), ("cnn_nchw", "sums")])
def test_integers_from_end_to_end_are_found_in_the_file(name: str, expected: str, tmp_path: Path) -> None:
    """What was measured between x86 and arm64: equal bits of the first, of the second within float rounding."""
    model = Fold()(MODELS[name](), None)
    quantized = QuantizeInt8()(model, random_dataset(signature(model), 16, 0))
    if expected == "bits":
        lowered = lower(quantized, "int8")
    else:
        lowered = lower(leave_out(quantized, backends.get("tflite").unneeded(quantized)))
    assert not lowered.refusals
    (tmp_path / "model.tflite").write_bytes(bytes(write([lowered.graph], "test")))
    assert backends.get("tflite").repeats(tmp_path) == expected


def test_float_that_is_quantized_again_may_flip(tmp_path: Path) -> None:
    scaled = {"scales": (0.1,), "zeros": (0,)}
    tensors = [
        Values("x", (1, 4), "INT8", **scaled),  # type: ignore[arg-type]
        Values("f", (1, 4)),
        Values("e", (1, 4)),
        Values("y", (1, 4), "INT8", **scaled),  # type: ignore[arg-type]
    ]
    ops = [Op("DEQUANTIZE", ["x"], ["f"], 2), Op("EXP", ["f"], ["e"]), Op("QUANTIZE", ["e"], ["y"])]
    (tmp_path / "model.tflite").write_bytes(pack(tensors, ops, ["x"], ["y"]))
    assert backends.get("tflite").repeats(tmp_path) == "flips"


def test_a_cpu_that_saturates_answers_in_exact_arithmetic(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "linux-arm64" / "onnxruntime-int8"
    natural = made(root, "onnxruntime-int8")
    monkeypatch.setattr(ort_backend, "saturates", lambda: True)
    assert golden._environment(ort_backend, artifact.read_manifest(folder)) == ort_backend.EXACT  # type: ignore[arg-type]
    exact = made(root, "onnxruntime-int8")
    (name,) = natural.outputs
    bound = exact.tolerance["value"] * np.abs(natural.outputs[name]).max()
    assert np.abs(exact.outputs[name] - natural.outputs[name]).max() <= bound
    manifest = replace(artifact.read_manifest(folder), backend="openvino")
    monkeypatch.setattr(ov_backend, "saturates", lambda: True)
    with pytest.raises(BundleError, match="saturate"):
        golden._environment(ov_backend, manifest)  # type: ignore[arg-type]
