"""inspect: multiply-accumulates and memory against figures worked out by hand or published, never against our own."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import backends
from edgekit.demo import digits
from edgekit.errors import ShapeError
from edgekit.inspection import inspect, tensor_shapes

F = TensorProto.FLOAT


def build(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
    types: dict[str, int] | None = None,
) -> ir.Model:
    types = types or {}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, types.get(n, F), s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, types.get(n, F), s) for n, s in outputs.items()],
        [numpy_helper.from_array(v, n) for n, v in (weights or {}).items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


def test_dense_layer_by_hand() -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    found = inspect(build([node], {"x": ["n", 7]}, {"y": ["n", 3]}, {"w": zeros(3, 7), "b": zeros(3)}))
    assert found["macs"] == 7 * 3
    assert found["parameters"] == 7 * 3 + 3
    assert found["weight_bytes"] == 4 * (7 * 3 + 3)
    assert found["activation_peak_bytes"] == 4 * (7 + 3)
    assert found["ops"] == {"Gemm": 1}
    assert found["opset"] == 21
    assert found["signature"]["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["n", 7]}]
    assert found["reasons"] == []


def test_gemm_transposed_counts_the_inner_size() -> None:
    node = helper.make_node("Gemm", ["a", "w"], ["y"], transA=1)
    found = inspect(build([node], {"a": [5, 2]}, {"y": [2, 3]}, {"w": zeros(5, 3)}))
    assert found["macs"] == 2 * 5 * 3


@pytest.mark.parametrize(
    ("channels", "out", "group", "kernel", "stride", "expected"),
    [
        (3, 8, 1, 3, 1, 8 * 6 * 6 * 3 * 9),
        (8, 8, 8, 3, 1, 8 * 6 * 6 * 9),  # depthwise
        (8, 16, 2, 1, 1, 16 * 8 * 8 * 4),  # grouped, pointwise
        (3, 8, 1, 3, 2, 8 * 3 * 3 * 3 * 9),
    ],
)
def test_convolutions_by_hand(channels: int, out: int, group: int, kernel: int, stride: int, expected: int) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=group, strides=[stride, stride])
    weights = {"w": zeros(out, channels // group, kernel, kernel)}
    found = inspect(build([node], {"x": ["n", channels, 8, 8]}, {"y": None}, weights))  # type: ignore[dict-item]
    assert found["macs"] == expected


def test_transposed_convolution_by_hand() -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    found = inspect(build([node], {"x": ["n", 4, 5, 5]}, {"y": ["n", 6, 10, 10]}, {"w": zeros(4, 6, 2, 2)}))
    assert found["macs"] == 4 * 5 * 5 * 6 * 2 * 2


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_recurrent_by_hand(op: str, gates: int) -> None:
    steps, size, hidden = 9, 5, 6
    node = helper.make_node(op, ["x", "w", "r"], ["y"], hidden_size=hidden)
    weights = {"w": zeros(1, gates * hidden, size), "r": zeros(1, gates * hidden, hidden)}
    found = inspect(build([node], {"x": [steps, 1, size]}, {"y": [steps, 1, 1, hidden]}, weights))
    assert found["macs"] == steps * gates * hidden * (size + hidden)


@pytest.mark.parametrize(
    ("equation", "left", "right", "expected"),
    [
        ("ij,jk->ik", (2, 3), (3, 4), 2 * 3 * 4),
        ("bhqd,bhkd->bhqk", (1, 2, 5, 8), (1, 2, 5, 8), 2 * 5 * 5 * 8),
        ("...i,ij->...j", (2, 3, 4), (4, 5), 2 * 3 * 4 * 5),
    ],
)
def test_einsum_by_hand(equation: str, left: tuple[int, ...], right: tuple[int, ...], expected: int) -> None:
    assert expected == _multiplications(equation, left, right)
    node = helper.make_node("Einsum", ["a", "b"], ["y"], equation=equation)
    found = inspect(build([node], {"a": list(left)}, {"y": None}, {"b": zeros(*right)}))  # type: ignore[dict-item]
    assert found["macs"] == expected


def _multiplications(equation: str, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """With all ones every output element is the number of products summed into it."""
    return int(np.einsum(equation, np.ones(left), np.ones(right)).sum())


def test_a_skip_connection_keeps_its_tensor_alive() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),  # x 100, a 100
        helper.make_node("ReduceSum", ["a", "axes"], ["b"], name="small", keepdims=1),  # a 100, b 1
        helper.make_node("Add", ["a", "b"], ["y"], name="join"),  # a 100, b 1, y 100
    ]
    found = inspect(build(nodes, {"x": ["n", 100]}, {"y": ["n", 100]}, {"axes": np.array([1])}))
    assert found["activation_peak_bytes"] == 4 * (100 + 1 + 100)
    assert found["activation_peak_at"] == "join"
    assert found["macs"] == 0
    assert found["parameters"] == 0  # axes are no parameters


def test_a_reshape_takes_no_memory_of_its_own() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    found = inspect(build(nodes, {"x": ["n", 4, 6]}, {"y": ["n", 24]}, {"shape": np.array([-1, 24])}))
    assert found["activation_peak_bytes"] == 4 * (24 + 24)


def test_integer_tensors_count_their_own_bytes() -> None:
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    weights = {"s": np.float32(0.1).reshape(()), "z": np.int8(0).reshape(())}
    found = inspect(build([node], {"x": ["n", 10]}, {"y": ["n", 10]}, weights, {"y": TensorProto.INT8}))
    assert found["activation_peak_bytes"] == 10 * 4 + 10 * 1
    assert found["parameters"] == 0  # a scale and a zero point are none


def test_quantized_weights_are_parameters_of_one_byte() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = {"q": np.ones((4, 3), np.int8), "s": np.ones(4, np.float32), "z": np.zeros(4, np.int8)}
    found = inspect(build(nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, weights))
    assert found["parameters"] == 12
    assert found["weight_bytes"] == 12 + 16 + 4
    assert found["macs"] == 12


def test_shapes_that_inference_cannot_know_are_observed() -> None:
    """The sizes of a Resize computed from the data's own shape through arithmetic that inference does not follow."""
    nodes = [
        helper.make_node("NonZero", ["ones"], ["at"]),  # (1, 6): known only by running
        helper.make_node("Shape", ["at"], ["sizes"]),
        helper.make_node("ConstantOfShape", ["sizes"], ["made"]),
        helper.make_node("ReduceSum", ["made"], ["total"], keepdims=0),
        helper.make_node("Add", ["x", "total"], ["y"]),
    ]
    model = build(nodes, {"x": ["n", 2]}, {"y": ["n", 2]}, {"ones": np.ones(6, np.float32)})
    assert tensor_shapes(model)["made"] == (1, 6)
    assert inspect(model)["activation_peak_bytes"] is not None


def test_an_unknown_size_is_asked_for_by_name() -> None:
    model = build([helper.make_node("Relu", ["x"], ["y"])], {"x": ["n", "length"]}, {"y": ["n", "length"]})
    with pytest.raises(ShapeError, match=r"--shape x="):
        inspect(model)


def test_every_backend_gives_a_verdict_and_an_unknown_operator_is_refused() -> None:
    graph = helper.make_graph(
        [helper.make_node("Frobnicate", ["x"], ["y"], domain="org.example")],
        "g",
        [helper.make_tensor_value_info("x", F, ["n", 2])],
        [helper.make_tensor_value_info("y", F, ["n", 2])],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("org.example", 1)]
    found = inspect(ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10)))
    assert set(found["backends"]) == set(backends.BACKENDS)
    assert found["ops"] == {"org.example::Frobnicate": 1}
    for name, verdict in found["backends"].items():
        if backends.get(name).missing() is None:
            assert verdict["takes"] is False
            assert verdict["refuses"]


def test_inspect_leaves_the_model_as_it_was() -> None:
    model = ir.load(digits("digits_cnn.onnx"))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    inspect(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_the_example_mlp_by_hand() -> None:
    found = inspect(ir.load(digits("digits_mlp.onnx")))
    assert found["macs"] == 784 * 256 + 256 * 128 + 128 * 10
    assert found["parameters"] == found["macs"] + 256 + 128 + 10
    assert found["activation_peak_bytes"] == 4 * (784 + 256)
    assert sum(row["macs"] for row in found["layers"]) == found["macs"]


def test_the_example_cnn_by_hand() -> None:
    stem = 14 * 14 * 16 * 9
    blocks = 7 * 7 * (16 * 9 + 16 * 32) + 7 * 7 * (32 * 9 + 32 * 64) + 7 * 7 * (64 * 9 + 64 * 64)
    assert inspect(ir.load(digits("digits_cnn.onnx")))["macs"] == stem + blocks + 64 * 10


# Millions of MACs as published for MLPerf Tiny (Banbury et al. 2021); the figures are rounded, hence 2 %.
@pytest.mark.slow
@pytest.mark.parametrize(("file", "millions"), [("resnet8.h5", 12.5), ("vww_96.h5", 7.5), ("kws_saved_model", 2.7)])
def test_published_macs(file: str, millions: float, zoo: Path) -> None:
    if not os.environ.get("EDGEKIT_KERAS_PYTHON"):
        pytest.importorskip("tensorflow", reason="needs [keras] or EDGEKIT_KERAS_PYTHON")
    from edgekit import pipeline

    found = pipeline.inspect(zoo / "models" / "mlperf_tiny" / file)
    assert math.isclose(found["macs"], millions * 1e6, rel_tol=0.02)
