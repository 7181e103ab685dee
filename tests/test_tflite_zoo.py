"""Real trained models through the TFLite lowering: float, int8 on both families of kernels, and the emulator."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgekit
from edgekit import model as M
from edgekit import parity
from edgekit.backends.tflite.emulator import Emulator
from edgekit.backends.tflite.graph import Graph
from edgekit.backends.tflite.lowering import lower
from edgekit.backends.tflite.writer import write
from edgekit.dataset import Dataset
from edgekit.model import Tensors
from edgekit.passes.fold import Fold
from edgekit.passes.quantize import QuantizeInt8
from edgekit.preprocessing import Preprocessing
from tests.tflite_interpreter import codes, run

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
ZOO = os.environ.get("EDGEKIT_ZOO", "")
pytestmark = [
    pytest.mark.skipif(not ZOO, reason="needs EDGEKIT_ZOO: a folder with real models and data"),
    pytest.mark.slow,
]
SAMPLES = 256
FLOAT_BOUND = 1e-5  # of the largest output: the issue's own bound
MIN_LABELS = 0.99


@dataclass(frozen=True)
class Case:
    """keras: needs an interpreter with TensorFlow. cnn: holds no TRANSPOSE."""

    model: str
    data: str
    scale: str | None = None
    mean: str | None = None
    keras: bool = False
    cnn: bool = True


CASES = {
    "mobilenet_v2": Case("mobilenet_v2_cifar.onnx", "cifar10_test.npz", "1/127.5", "1"),
    "mlp": Case("mlp_784_mnist.onnx", "mnist_test.npz", "1/255"),
    "resnet8": Case("mlperf_tiny/resnet8.h5", "cifar10_test.npz", keras=True),
}
FLOAT_ONLY = {
    "dcgan": Case("dcgan_mnist_generator.onnx", ""),
    "lstm": Case("lstm_mnist_rows.onnx", "", cnn=False),
    "gpt": Case("gpt_char_tinyshakespeare.onnx", "", cnn=False),
}


@cache
def imported(name: str) -> ir.Model:
    case = {**CASES, **FLOAT_ONLY}[name]
    if case.keras and not os.environ.get("EDGEKIT_KERAS_PYTHON"):
        pytest.skip("needs EDGEKIT_KERAS_PYTHON: a Python with TensorFlow")
    return Fold()(edgekit.load(Path(ZOO) / "models" / case.model).model, None)


@cache
def quantized(name: str) -> tuple[ir.Model, Dataset]:
    case, model = CASES[name], imported(name)
    flags = {k: v for k, v in (("scale", case.scale), ("mean", case.mean)) if v is not None}
    path = Path(ZOO) / "data" / case.data
    data = edgekit.open_dataset(path, preprocessing=Preprocessing().merge(**flags)).bind(M.signature(model))
    return QuantizeInt8()(model, data.take(SAMPLES, 1)), data.take(SAMPLES, 0)


def graph_of(model: ir.Model) -> Graph:
    result = lower(model)
    assert not result.refusals, [str(r) for r in result.refusals]
    assert not result.requantized
    return result.graph


@pytest.mark.parametrize("name", [*CASES, *FLOAT_ONLY])
def test_float_files_are_the_original(name: str) -> None:
    model = imported(name)
    data = bytes(write([graph_of(model)], "test"))
    for batch in (1, 3):
        feeds = M.seeded_inputs(M.signature(model), batch, high=30)
        want, got = M.FloatSession(model, optimize=False).run(feeds), run(data, feeds)
        for key, value in want.items():
            assert M.difference(value, got[key]) <= FLOAT_BOUND
    if {**CASES, **FLOAT_ONLY}[name].cnn:
        assert "TRANSPOSE" not in codes(data)


@pytest.mark.parametrize("kernels", ["AUTO", "BUILTIN_REF"])
@pytest.mark.parametrize("name", CASES)
def test_every_int8_operator_is_within_one_step(name: str, kernels: str) -> None:
    model, data = quantized(name)
    whole = bytes(write([graph_of(model)], "test"))
    cut: dict[int, bytes] = {}

    def loose(part: ir.Model, feeds: Tensors) -> Tensors:
        if id(part) not in cut:
            cut[id(part)] = bytes(write([graph_of(part)], "test"))
        return run(cut[id(part)], feeds, kernels=kernels)

    batches = (b.inputs for b in data.batches(32))
    record = parity.check(model, loose, lambda feeds: run(whole, feeds, kernels=kernels), batches)
    assert not record.skipped
    assert record.per_op_max_lsb is not None
    assert record.per_op_max_lsb <= 1, record.worst[:3]
    assert record.label_agreement is not None
    if kernels == "AUTO":
        assert record.label_agreement >= MIN_LABELS


@pytest.mark.parametrize(("family", "kernels"), [("xnnpack", "AUTO"), ("reference", "BUILTIN_REF")])
@pytest.mark.parametrize("name", ["mobilenet_v2", "mlp"])
def test_the_emulator_is_the_runtime(name: str, family: str, kernels: str) -> None:
    model, data = quantized(name)
    graph = graph_of(model)
    emulator = Emulator(graph, family)  # type: ignore[arg-type]
    assert not emulator.approximate
    feeds = next(data.take(16, 0).batches(16)).inputs
    got = run(bytes(write([graph], "test")), feeds, kernels=kernels)
    for key, value in emulator.run(feeds).items():
        np.testing.assert_array_equal(value, got[key])
