"""What cannot run on a device is refused while it is made, with the numbers or the operators."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekit import backends, fitting, pipeline
from edgekit import model as M
from edgekit.backends import About
from edgekit.errors import UnsupportedOpError
from edgekit.target import Target, load_target
from tests.tflite_files import Op, Values, pack

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
CHILD = Path(__file__).with_name("tflite_runtime_child.py")


def board(megabytes: int) -> Target:
    target = load_target("raspberry-pi-zero-2w")
    assert target.device is not None
    return replace(target, device=replace(target.device, memory_bytes=megabytes * 2**20))


def test_weights_that_memory_cannot_hold_are_refused_with_both_sizes(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(bytes(3 * 2**20))
    with pytest.raises(UnsupportedOpError, match="weights alone are 3 MB, a raspberry-pi-zero-2w has 2 MB"):
        fitting.check(board(2), backends.get("tflite"), tmp_path)
    fitting.check(board(4), backends.get("tflite"), tmp_path)


def test_convert_goes_on_with_what_fits(tmp_path: Path) -> None:
    """Float weights of 1.2 MB, 0.3 MB in int8, on a board of 1 MB."""
    weights = np.random.default_rng(0).normal(size=(550, 550)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 550])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 550])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    (tmp_path / "tiny.toml").write_text(
        'schema = 1\ndescription = "a tiny board"\nweight_bits = 8\n'
        'candidates = [{ backend = "tflite", precision = "float32" }, { backend = "tflite", precision = "int8" }]\n'
        '[device]\narch = "aarch64"\nmemory = "1 MB"\n',
        encoding="utf-8",
    )
    told = pipeline.convert(
        tmp_path / "m.onnx",
        ("tiny",),
        out=tmp_path / "build",
        random_calibration=True,
        samples=16,
        search_time=0.1,
        targets_dir=tmp_path,
    )
    rows = {row["candidate"]: row for row in told["artifacts"]}
    assert rows["tflite-float32"]["status"] == "not run"
    assert "1 MB of memory" in rows["tflite-float32"]["why"]
    assert not (tmp_path / "build" / "tiny" / "tflite-float32").exists()
    assert rows["tflite-int8"]["status"] == "made"


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A folder with a file that gathers truth values, as TFLite does since a version after 2.14."""
    tensors = [
        Values("x", (2, 4), "BOOL"),
        Values("i", (1, 1), "INT32", np.array([[1]], np.int32)),
        Values("y", (1, 4), "BOOL"),
    ]
    data = pack(tensors, [Op("GATHER_ND", ["x", "i"], ["y"], 5)], ["x"], ["y"], names=({"x": "x"}, {"y": "y"}))
    (tmp_path / "model.tflite").write_bytes(data)
    return tmp_path


def test_an_operator_that_an_old_runtime_lacks_is_named(newer: Path) -> None:
    with pytest.raises(UnsupportedOpError, match=r"tflite-runtime 2\.14\.0 lacks GATHER_ND version 5") as caught:
        fitting.check(load_target("linux-armv7"), backends.get("tflite"), newer)
    assert "--keep-float" in caught.value.remedy
    fitting.check(load_target("linux-arm64"), backends.get("tflite"), newer)
    assert backends.get("tflite").lacks(newer, "tflite-runtime", "2.14.0") == ["GATHER_ND version 5"]


def test_that_runtime_refuses_the_file_indeed(newer: Path) -> None:
    python = os.environ.get("EDGEKIT_TFLITE_RUNTIME_PYTHON")
    if not python:
        pytest.skip("needs EDGEKIT_TFLITE_RUNTIME_PYTHON: a Python with tflite-runtime")
    np.savez(newer / "model.in.npz", x=np.ones((2, 4), np.bool_))
    subprocess.run([python, str(CHILD), "tflite-runtime", str(newer)], check=True, capture_output=True, timeout=120)
    assert "GATHER_ND" in (newer / "model.error.txt").read_text(encoding="utf-8")


def test_activations_are_written_for_the_devices_processor(tmp_path: Path) -> None:
    """uint8 is what x86 kernels want, int8 what Arm's do."""
    from edgekit.dataset import random_dataset
    from edgekit.passes.fold import Fold
    from edgekit.passes.quantize import QuantizeInt8
    from tests.models import MODELS

    model = Fold()(MODELS["mlp"](), None)
    quantized = QuantizeInt8(weight_bits=8)(model, random_dataset(M.signature(model), 16, 0))
    kinds = {}
    for machine in ("x86_64", "aarch64"):
        backends.get("onnxruntime").lower(quantized, "int8", tmp_path, About(machine=machine))
        written = onnx.load(tmp_path / "model.onnx")
        zeros = {t.name: t.data_type for t in written.graph.initializer}
        points = [n.input[2] for n in written.graph.node if n.op_type == "QuantizeLinear"]
        kinds[machine] = {TensorProto.DataType.Name(zeros[name]) for name in points}
    assert kinds == {"x86_64": {"UINT8"}, "aarch64": {"INT8"}}
