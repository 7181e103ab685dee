"""Models that other tools quantized: lowered exactly where LiteRT can hold their integers, else refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import model as M
from edgekit import parity
from edgekit.backends import tflite
from edgekit.backends.tflite.lowering import lower
from edgekit.backends.tflite.writer import write
from edgekit.errors import UnsupportedOpError
from edgekit.model import Tensors
from edgekit.passes.fold import Fold
from tests.models import MODELS
from tests.tflite_interpreter import run

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
quantization = pytest.importorskip("onnxruntime.quantization", reason="needs onnxruntime's quantizer")


class Samples(quantization.CalibrationDataReader):
    def __init__(self, model: ir.Model) -> None:
        self.left = iter([M.seeded_inputs(M.signature(model), 2, seed) for seed in range(4)])

    def get_next(self) -> Tensors | None:
        return next(self.left, None)


def by_onnxruntime(name: str, folder: Path, **options: Any) -> ir.Model:
    model = Fold()(MODELS[name](), None)
    M.save(model, folder / "float.onnx")
    quantization.quantize_static(
        folder / "float.onnx",
        folder / "int8.onnx",
        Samples(model),
        quant_format=quantization.QuantFormat.QDQ,
        **options,
    )
    return Fold()(ir.load(folder / "int8.onnx"), None)


@pytest.mark.parametrize("name", ["mlp", "cnn_nchw", "mobile_nhwc", "two_inputs_two_outputs"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("activations", ["QUInt8", "QInt8"])
def test_qdq_of_onnxruntime_keeps_its_integers(activations: str, per_channel: bool, name: str, tmp_path: Path) -> None:
    model = by_onnxruntime(
        name,
        tmp_path,
        activation_type=getattr(quantization.QuantType, activations),
        weight_type=quantization.QuantType.QInt8,
        per_channel=per_channel,
    )
    result = lower(model)
    if result.refusals:  # its softmax has a scale that LiteRT's kernel does not write
        assert {r.op for r in result.refusals} <= {"Softmax", "Sigmoid"}
        return
    whole = bytes(write([result.graph], "test"))
    cut: dict[int, bytes] = {}

    def loose(part: ir.Model, feeds: Tensors) -> Tensors:
        if id(part) not in cut:
            cut[id(part)] = bytes(write([lower(part).graph], "test"))
        return run(cut[id(part)], feeds)

    batches = [M.seeded_inputs(M.signature(model), 2, seed) for seed in range(3)]
    record = parity.check(model, loose, lambda feeds: run(whole, feeds), batches)
    assert record.units > 0
    assert (record.per_op_max_lsb or 0) <= 1, record.worst[:3]


def test_weights_with_a_zero_point_are_refused_by_name(tmp_path: Path) -> None:
    unsigned = quantization.QuantType.QUInt8
    model = by_onnxruntime("cnn_nchw", tmp_path, activation_type=unsigned, weight_type=unsigned)
    reasons = tflite.refuses(model)
    assert any("zero point" in r and "Conv" in r for r in reasons), reasons
    with pytest.raises(UnsupportedOpError, match="zero point"):
        tflite.lower(model, "float32", tmp_path)
    assert not (tmp_path / tflite.FILE).exists()


def test_the_operator_form_is_refused_by_name(tmp_path: Path) -> None:
    array = numpy_helper.from_array
    scale, zero = array(np.float32(0.1), "s"), array(np.int8(0), "z")
    graph = helper.make_graph(
        [helper.make_node("QLinearMatMul", ["x", "s", "z", "w", "s", "z", "s", "z"], ["y"], name="product")],
        "q",
        [helper.make_tensor_value_info("x", TensorProto.INT8, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, [1, 3])],
        [scale, zero, array(np.ones((4, 3), np.int8), "w")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    onnx.checker.check_model(ir.to_proto(model))
    (reason,) = tflite.refuses(model)
    assert "QLinearMatMul" in reason
    assert "product" in reason


def test_every_refusal_is_told_at_once(tmp_path: Path) -> None:
    model = MODELS["cnn_nchw"]()
    nodes = [n for n in model.graph if n.op_type == "Relu"]
    for node in nodes:
        node.op_type, node.domain = "Unheard", ""
    assert len(tflite.refuses(model)) >= len(nodes)


def test_more_than_two_gigabytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.backends.tflite import writer

    monkeypatch.setattr(writer, "_LIMIT", 1000)
    with pytest.raises(UnsupportedOpError, match="at most 2 GB"):
        tflite.lower(MODELS["cnn_nchw"](), "float32", tmp_path)
    assert not (tmp_path / tflite.FILE).exists()
