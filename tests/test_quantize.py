"""QuantizeInt8 against integer arithmetic by hand and onnx's own reference evaluator."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import model as M
from edgekit.errors import ArtifactError, NoCalibrationDataError, NonFiniteError, UnsupportedOpError
from edgekit.passes.apply_plan import prepared
from edgekit.passes.draft import weight_scales
from edgekit.passes.judge import class_scores
from edgekit.passes.plan import QuantizationPlan
from edgekit.passes.quantize import QuantizeInt8, apply_plan
from tests.quantize_graphs import Array, Samples, evaluate, graph, node, normal, sqnr_db, types


def quantize_by_hand(x: Array, scale: float, zero: int) -> Array:
    return np.clip(np.rint(x / np.float32(scale)) + zero, -128, 127).astype(np.int64)


def requantize_by_hand(sums: Array, multiplier: Array, zero: int) -> Array:
    return np.clip(np.rint(sums * multiplier) + zero, -128, 127)


def parameters(model: Any, name: str) -> tuple[float, int, Array]:
    """(scale, zero point, int8 values or None) that the written model stores for a value."""
    stored = {k: M.constant(v) for k, v in model.graph.initializers.items()}
    return float(stored[f"{name}_scale"]), int(stored[f"{name}_zero_point"]), stored.get(f"{name}_quantized")  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_with_relu_is_integer_arithmetic(bits: Any, trans: int) -> None:
    w, b, x = normal(20, 6, scale=0.3), normal(6, seed=1), normal(64, 20, seed=2)
    attributes = {"transB": trans, "alpha": 0.5, "beta": 2.0}
    model = graph(
        [node("Gemm", ["x", "w", "b"], ["h"], name="gemm", **attributes), node("Relu", ["h"], ["y"], name="relu")],
        {"x": ["n", 20]},
        {"y": ["n", 6]},
        {"w": w.T.copy() if trans else w, "b": b},
    )
    step = QuantizeInt8(weight_bits=bits, calibration="minmax", rounding="nearest", bias_correction="off", smooth="off")
    written = step(model, Samples({"x": x}))
    assert "Relu" not in types(written)
    got = evaluate(written, {"x": x})["y"]

    limit = 2 ** (bits - 1) - 1
    s_w = (np.abs(w * np.float32(0.5)).max(axis=0) / limit).astype(np.float32)
    q_w = np.rint(w * np.float32(0.5) / s_w).astype(np.int64)
    assert np.abs(q_w).max() == limit
    s_x, z_x, _ = parameters(written, "x")
    s_y, z_y, _ = parameters(written, "y")
    assert z_y == -128
    q_b = np.rint(2.0 * b.astype(np.float64) / (np.float32(s_x) * s_w)).astype(np.int64)
    sums = (quantize_by_hand(x, s_x, z_x) - z_x) @ q_w + q_b
    wanted = requantize_by_hand(sums, s_x * s_w.astype(np.float64) / s_y, z_y)
    seen = np.rint(got / np.float32(s_y)) + z_y
    assert np.abs(seen - wanted).max() <= 1  # a tie in float32
    assert (seen != wanted).mean() < 0.01
    assert sqnr_db(np.maximum(x @ w * 0.5 + 2 * b, 0), got) > 30


@pytest.mark.parametrize(("groups", "rank"), [(1, 1), (1, 2), (2, 2), (4, 2), (1, 3)])
def test_convolutions_of_any_rank_and_grouping(groups: int, rank: int) -> None:
    w = normal(8, 4 // groups, *[3] * rank)
    x = normal(12, 4, *[6] * rank, seed=2)
    model = graph(
        [node("Conv", ["x", "w", "b"], ["h"], name="conv", group=groups), node("Relu", ["h"], ["y"], name="relu")],
        {"x": ["n", 4, *[6] * rank]},
        {"y": ["n", 8, *[4] * rank]},
        {"w": w, "b": normal(8, seed=1)},
    )
    written = QuantizeInt8()(model, Samples({"x": x}))
    assert types(written).count("QuantizeLinear") == 2
    assert sqnr_db(evaluate(model, {"x": x})["y"], evaluate(written, {"x": x})["y"]) > 30
    stored = M.constant(written.graph.initializers["w_quantized"])
    assert stored is not None
    assert stored.dtype == np.int8
    assert np.abs(stored.astype(int)).max(axis=tuple(range(1, stored.ndim))).tolist() == [127] * 8
    bias = M.constant(written.graph.initializers["conv_bias_quantized"])
    assert bias is not None
    assert bias.dtype == np.int32


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups: int) -> None:
    model = graph(
        [node("ConvTranspose", ["x", "w", "b"], ["y"], name="up", group=groups, strides=[2, 2])],
        {"x": ["n", 4, 5, 5]},
        {"y": ["n", "c", "h", "w"]},
        {"w": normal(4, 3, 2, 2), "b": normal(3 * groups, seed=1)},
    )
    x = normal(12, 4, 5, 5, seed=2)
    written = QuantizeInt8()(model, Samples({"x": x}))
    # onnx 1.23's reference evaluator cannot reshape grouped weights: ONNX Runtime, node by node, is the judge
    wanted, got = (M.FloatSession(m, optimize=False).run({"x": x})["y"] for m in (model, written))
    assert sqnr_db(wanted, got) > 30


def residual() -> Any:
    return graph(
        [
            node("Transpose", ["x"], ["t"], name="nchw", perm=[0, 3, 1, 2]),
            node("Conv", ["t", "w", "b"], ["a"], name="conv1", pads=[1, 1, 1, 1]),
            node("Clip", ["a", "zero", "six"], ["r"], name="relu6"),
            node("Conv", ["r", "v", "b"], ["c"], name="conv2", pads=[1, 1, 1, 1]),
            node("Add", ["c", "r"], ["s"], name="add"),
            node("MaxPool", ["s"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
            node("GlobalAveragePool", ["p"], ["g"], name="mean"),
            node("Flatten", ["g"], ["f"], name="flat"),
            node("Gemm", ["f", "d"], ["l"], name="dense"),
            node("Softmax", ["l"], ["y"], name="softmax", axis=-1),
        ],
        {"x": ["n", 8, 8, 3]},
        {"y": ["n", 10], "r": ["n", 4, 8, 8]},
        {
            "w": normal(4, 3, 3, 3),
            "v": normal(4, 4, 3, 3, seed=3),
            "b": normal(4, seed=1),
            "d": normal(4, 10, seed=4),
            "zero": np.array(0, np.float32),
            "six": np.array(6, np.float32),
        },
    )


def test_the_form_of_the_written_graph() -> None:
    """Every rule of the convention, on a residual net whose inner value is an output as well."""
    x = normal(40, 8, 8, 3, seed=5)
    model = residual()
    before = M.to_bytes(model)
    written = QuantizeInt8()(model, Samples({"x": x}))
    assert M.to_bytes(model) == before
    assert M.signature(written) == M.signature(model)
    proto = M.to_proto(written)
    onnx.checker.check_model(proto, full_check=True)
    readers: dict[str, int] = {}
    for n in proto.graph.node:
        for name in n.input:
            readers[name] = readers.get(name, 0) + 1
    made = {o: n for n in proto.graph.node for o in n.output}
    for n in proto.graph.node:
        if n.op_type == "DequantizeLinear" and n.output[0] not in {"y", "r"}:
            assert readers[n.output[0]] == 1
        if n.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            assert made[n.input[0]].op_type == "DequantizeLinear"
            assert readers[n.output[0]] == 1
    # one QuantizeLinear per tensor: x, t, r, c, s, p, g, f, l, y
    assert types(written).count("QuantizeLinear") == 10
    assert "Clip" not in types(written)
    for one, other in (("x", "t"), ("s", "p"), ("g", "f")):
        assert parameters(written, one)[:2] == parameters(written, other)[:2]
    assert parameters(written, "y")[:2] == (1 / 256, -128)
    wanted, got = evaluate(model, {"x": x}), evaluate(written, {"x": x})
    assert sqnr_db(wanted["y"], got["y"]) > 20
    assert sqnr_db(wanted["r"], got["r"]) > 25


def test_plan_is_data_and_deterministic() -> None:
    data = Samples({"x": normal(40, 8, 8, 3, seed=5)})
    plan = QuantizeInt8(seed=3).plan(residual(), data)
    again = QuantizeInt8(seed=3).plan(residual(), data)
    assert plan == again
    shuffled = json.dumps(json.loads(plan.to_json()), sort_keys=True)
    read = QuantizationPlan.from_json(shuffled)
    assert M.to_bytes(apply_plan(residual(), read)) == M.to_bytes(apply_plan(residual(), plan))
    assert {name.split(",")[0] for name in plan.scores} == {"range per tensor", "minmax", "mse"}
    assert plan.activations["y"].method == "fixed"
    # a clip range inside the bounds is what lets the Clip go
    assert plan.fused == {"relu6": "removed"}
    assert any("sqnr_db" in line for line in plan.describe())


def test_plan_for_another_model_is_refused() -> None:
    plan = QuantizeInt8().plan(residual(), Samples({"x": normal(20, 8, 8, 3)}))
    other = graph([node("Relu", ["x"], ["y"], name="relu")], {"x": ["n", 3]}, {"y": ["n", 3]})
    with pytest.raises(ArtifactError, match="that the model lacks"):
        apply_plan(other, plan)


def test_relu_stays_where_its_group_is_wider() -> None:
    """Concat joins a Relu with a signed tensor: -128 is then below 0, and removing the Relu would be wrong."""
    model = graph(
        [
            node("Conv", ["x", "w"], ["a"], name="conv"),
            node("Relu", ["a"], ["r"], name="relu"),
            node("Conv", ["x", "v"], ["b"], name="signed"),
            node("Concat", ["r", "b"], ["y"], name="join", axis=1),
        ],
        {"x": ["n", 2, 4, 4]},
        {"y": ["n", 6, 4, 4]},
        {"w": normal(3, 2, 1, 1), "v": normal(3, 2, 1, 1, seed=1)},
    )
    x = normal(20, 2, 4, 4, seed=2)
    plan = QuantizeInt8().plan(model, Samples({"x": x}))
    assert plan.fused == {"relu": "kept"}
    written = apply_plan(model, plan)
    assert types(written).count("Relu") == 1
    assert evaluate(written, {"x": x})["y"][:, :3].min() == 0
    assert sqnr_db(evaluate(model, {"x": x})["y"], evaluate(written, {"x": x})["y"]) > 30


def test_relu_with_a_second_reader_of_its_input_is_an_operator_of_its_own() -> None:
    model = graph(
        [
            node("Gemm", ["x", "w"], ["a"], name="gemm"),
            node("Relu", ["a"], ["r"], name="relu"),
            node("Add", ["r", "a"], ["y"], name="add"),
        ],
        {"x": ["n", 4]},
        {"y": ["n", 4]},
        {"w": normal(4, 4)},
    )
    x = normal(30, 4, seed=1)
    written = QuantizeInt8()(model, Samples({"x": x}))
    assert types(written).count("Relu") == 1
    assert types(written).count("QuantizeLinear") == 4
    assert sqnr_db(evaluate(model, {"x": x})["y"], evaluate(written, {"x": x})["y"]) > 30


@pytest.mark.parametrize("mask", [-1e9, -2.4e38, -np.inf])
def test_mask_additions_stay_float(mask: float) -> None:
    triangle = np.triu(np.full((4, 4), mask, np.float32), 1)
    triangle[np.isnan(triangle)] = 0
    model = graph(
        [
            node("Transpose", ["x"], ["k"], name="keys", perm=[0, 2, 1]),
            node("MatMul", ["x", "k"], ["scores"], name="scores"),
            node("Add", ["scores", "mask"], ["masked"], name="mask"),
            node("Softmax", ["masked"], ["weights"], name="softmax", axis=-1),
            node("MatMul", ["weights", "x"], ["y"], name="values"),
        ],
        {"x": ["n", 4, 8]},
        {"y": ["n", 4, 8]},
        {"mask": triangle},
    )
    x = normal(30, 4, 8, seed=1, scale=0.5)
    plan = QuantizeInt8().plan(model, Samples({"x": x}))
    assert "mask" in plan.float_nodes
    assert {"scores", "values"} <= set(plan.quantized)
    wanted, got = evaluate(model, {"x": x})["y"], evaluate(apply_plan(model, plan), {"x": x})["y"]
    assert sqnr_db(wanted, got) > 25


def test_recurrent_and_integer_nodes_stay_float_with_reasons() -> None:
    model = graph(
        [
            node("Transpose", ["x"], ["t"], name="time_first", perm=[1, 0, 2]),
            node("LSTM", ["t", "w", "r"], ["", "h"], name="lstm", hidden_size=3),
            node("Squeeze", ["h", "axis"], ["s"], name="last"),
            node("Gemm", ["s", "d"], ["y"], name="dense"),
        ],
        {"x": ["n", 5, 4]},
        {"y": ["n", 2]},
        {"w": normal(1, 12, 4), "r": normal(1, 12, 3), "d": normal(3, 2), "axis": np.array([0], np.int64)},
    )
    plan = QuantizeInt8().plan(model, Samples({"x": normal(20, 5, 4)}))
    assert plan.float_nodes["lstm"] == "LSTM has no integer form"
    assert "dense" in plan.quantized
    assert "time_first" in plan.float_nodes


def test_shared_weights_get_scales_of_their_own_and_originals_stay() -> None:
    model = graph(
        [
            node("Gemm", ["x", "w", "b"], ["a"], name="first"),
            node("Gemm", ["a", "w", "b"], ["c"], name="second"),
            node("Add", ["c", "b"], ["y"], name="add"),
        ],
        {"x": ["n", 4]},
        {"y": ["n", 4]},
        {"w": normal(4, 4), "b": normal(4, seed=1)},
    )
    x = normal(30, 4, seed=2)
    written = QuantizeInt8(calibration="minmax")(model, Samples({"x": x}))
    assert sqnr_db(evaluate(model, {"x": x})["y"], evaluate(written, {"x": x})["y"]) > 30
    assert {"first_bias_quantized", "second_bias_quantized"} <= set(written.graph.initializers)


def test_constant_operand_is_stored_as_int8() -> None:
    model = graph(
        [node("Gemm", ["x", "w"], ["a"], name="gemm"), node("Mul", ["a", "half"], ["y"], name="mul")],
        {"x": ["n", 4]},
        {"y": ["n", 4]},
        {"w": normal(4, 4), "half": np.array(0.5, np.float32)},
    )
    x = normal(30, 4, seed=2)
    written = QuantizeInt8()(model, Samples({"x": x}))
    scale, zero, stored = parameters(written, "half")
    assert stored.dtype == np.int8
    assert (int(stored) - zero) * scale == pytest.approx(0.5, rel=1e-6)
    assert "half" not in written.graph.initializers


def test_value_in_a_subgraph_is_dequantized_outside() -> None:
    branch = onnx.helper.make_graph(
        [node("Exp", ["a"], ["e"], name="inner")],
        "then",
        [],
        [onnx.helper.make_tensor_value_info("e", onnx.TensorProto.FLOAT, ["n", 4])],
    )
    other = onnx.helper.make_graph(
        [node("Neg", ["a"], ["m"], name="inner2")],
        "else",
        [],
        [onnx.helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, ["n", 4])],
    )
    model = graph(
        [
            node("Gemm", ["x", "w"], ["a"], name="gemm"),
            node("If", ["yes"], ["y"], name="if", then_branch=branch, else_branch=other),
        ],
        {"x": ["n", 4]},
        {"y": ["n", 4]},
        {"w": normal(4, 4, scale=0.2), "yes": np.array(True)},
    )
    x = normal(30, 4, seed=2)
    plan = QuantizeInt8().plan(model, Samples({"x": x}))
    assert "if" in plan.float_nodes
    written = apply_plan(model, plan)
    session = M.FloatSession(written, optimize=False)
    assert sqnr_db(M.FloatSession(model).run({"x": x})["y"], session.run({"x": x})["y"]) > 30


def test_several_inputs_outputs_and_a_move_at_the_output() -> None:
    model = graph(
        [
            node("Gemm", ["x", "w"], ["a"], name="gemm"),
            node("Gemm", ["z", "w"], ["b"], name="gemm2"),
            node("Mul", ["a", "b"], ["m"], name="mul"),
            node("Reshape", ["m", "shape"], ["y"], name="reshape"),
        ],
        {"x": ["n", 4], "z": ["n", 4]},
        {"y": ["n", 2, 2], "a": ["n", 4]},
        {"w": normal(4, 4), "shape": np.array([-1, 2, 2], np.int64)},
    )
    data = {"x": normal(30, 4, seed=2), "z": normal(30, 4, seed=3)}
    written = QuantizeInt8()(model, Samples(data))
    wanted, got = evaluate(model, data), evaluate(written, data)
    assert list(got) == ["y", "a"]
    for name in wanted:
        assert sqnr_db(wanted[name], got[name]) > 25


# --- weights ---------------------------------------------------------------------------------------------
@given(
    st.integers(0, 10**6),
    st.floats(2.0**-40, 2.0**20, width=32),
    st.floats(2.0**-60, 2.0**60, width=32),
    st.sampled_from([63, 127]),
)
@settings(max_examples=60, deadline=None)
def test_sums_and_bias_never_leave_int32(seed: int, input_scale: float, bias_size: float, limit: int) -> None:
    weight = normal(6, 50, seed=seed)
    weight[0] = 0
    weight[1] *= np.float32(1e-20)
    bias = normal(6, seed=seed + 1).astype(np.float64) * bias_size
    bias[2] = 0
    scales = weight_scales(weight, 0, limit, input_scale, bias).astype(np.float64)
    assert (scales > 0).all()
    assert np.isfinite(scales).all()
    assert (np.float32(input_scale) * scales.astype(np.float32) >= np.finfo(np.float32).tiny).all()
    integers = np.rint(weight / scales[:, None])
    assert np.abs(integers).max() <= limit
    worst = np.abs(integers).sum(axis=1) * 255 + np.abs(np.rint(bias / (input_scale * scales)))
    assert worst.max() < 2**31


def test_long_sums_are_kept_inside_int32() -> None:
    weight = np.ones((1, 200_000), np.float32)
    scales = weight_scales(weight, 0, 127, 1.0, None)
    assert np.rint(weight / scales).sum() * 255 < 2**31


def test_dead_channel_still_adds_its_bias() -> None:
    w, b = normal(4, 4), np.array([0.5, 100.0, -3.0, 0.0], np.float32)
    w[:, 1] = 0
    w[:, 3] = 0
    model = graph(
        [node("Gemm", ["x", "w", "b"], ["y"], name="gemm")], {"x": ["n", 4]}, {"y": ["n", 4]}, {"w": w, "b": b}
    )
    x = normal(30, 4, seed=2)
    got = evaluate(QuantizeInt8()(model, Samples({"x": x})), {"x": x})["y"]
    assert np.abs(got[:, 1] - 100).max() < 0.5
    assert np.abs(got[:, 3]).max() == 0


def test_bias_correction_removes_the_mean_error_of_each_channel() -> None:
    model = graph(
        [node("Conv", ["x", "w", "b"], ["y"], name="conv", group=2)],
        {"x": ["n", 4, 5, 5]},
        {"y": ["n", 6, 3, 3]},
        {"w": normal(6, 2, 3, 3), "b": normal(6)},
    )
    # channels of very different means: a shift taken from the wrong group's inputs would make it worse
    x = normal(64, 4, 5, 5) + np.array([0, 5, -5, 20], np.float32)[:, None, None]
    plan = QuantizeInt8(weight_bits=7).plan(model, Samples({"x": x}))
    wanted = evaluate(model, {"x": x})["y"]

    def mean_error(shifts: dict[str, tuple[float, ...]]) -> Array:
        written = apply_plan(model, dataclasses.replace(plan, bias_shifts=shifts))
        return np.abs((evaluate(written, {"x": x})["y"] - wanted).mean(axis=(0, 2, 3)))

    assert mean_error(plan.bias_shifts).max() < 0.25 * mean_error({}).max()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_stay_float(dtype: Any) -> None:
    model = graph(
        [node("Gemm", ["x", "w"], ["a"], name="gemm"), node("Relu", ["a"], ["y"], name="relu")],
        {"x": ["n", 4]},
        {"y": ["n", 4]},
        {"w": normal(4, 4)},
    )
    proto = M.to_proto(model)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for value in [*proto.graph.input, *proto.graph.output]:
        value.type.tensor_type.elem_type = kind
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(normal(4, 4).astype(dtype), "w"))
    plan = QuantizeInt8().plan(M.from_proto(proto), Samples({"x": normal(12, 4).astype(dtype)}))
    assert plan.quantized == ()
    assert set(plan.float_nodes) == {"gemm", "relu"}


# --- what bad input gets ----------------------------------------------------------------------------------
def test_quantized_model_is_refused() -> None:
    data = Samples({"x": normal(20, 8, 8, 3)})
    written = QuantizeInt8()(residual(), data)
    with pytest.raises(UnsupportedOpError, match="already quantized"):
        QuantizeInt8()(written, data)


def test_no_data_no_samples_unknown_node() -> None:
    with pytest.raises(NoCalibrationDataError):
        QuantizeInt8()(residual(), None)
    with pytest.raises(NoCalibrationDataError):
        QuantizeInt8()(residual(), Samples({"x": normal(0, 8, 8, 3)}))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedOpError, match="no node 'conv9'"):
        QuantizeInt8(keep_float=("conv9",))(residual(), Samples({"x": normal(20, 8, 8, 3)}))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers(bad: float) -> None:
    w = normal(4, 4)
    w[1, 2] = bad
    model = graph([node("Gemm", ["x", "w"], ["y"], name="gemm")], {"x": ["n", 4]}, {"y": ["n", 4]}, {"w": w})
    with pytest.raises(NonFiniteError, match="weights"):
        QuantizeInt8()(model, Samples({"x": normal(10, 4)}))  # type: ignore[arg-type]


def test_kept_node_is_float_and_the_rest_is_not() -> None:
    plan = QuantizeInt8(keep_float=("conv1",)).plan(residual(), Samples({"x": normal(20, 8, 8, 3)}))
    assert plan.float_nodes["conv1"] == "kept float on request"
    assert {"conv2", "dense"} <= set(plan.quantized)


def test_constant_data_and_a_single_sample() -> None:
    for x in (np.zeros((12, 8, 8, 3), np.float32), normal(1, 8, 8, 3)):
        got = evaluate(QuantizeInt8()(residual(), Samples({"x": x})), {"x": x})["y"]
        assert np.isfinite(got).all()


@pytest.mark.parametrize("batch", [1, 8])
def test_fixed_batch(batch: int) -> None:
    model = M.to_proto(residual())
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    x = normal(21, 8, 8, 3, seed=5)
    plan = QuantizeInt8(calibration="minmax").plan(M.from_proto(model), Samples({"x": x}))
    free = QuantizeInt8(calibration="minmax").plan(residual(), Samples({"x": x}))
    assert plan.activations["x"].low == free.activations["x"].low
    assert plan.activations["r"].high == pytest.approx(free.activations["r"].high, rel=1e-5)


# --- random graphs -----------------------------------------------------------------------------------------
@st.composite
def networks(draw: st.DrawFn) -> tuple[Any, Array]:
    """A chain of random operators on (n, 4, 6, 6), with skips, ending in a dense layer."""
    seed = draw(st.integers(0, 10**6))
    nodes, weights, at, skips = [], {"six": np.array(6, np.float32), "zero": np.array(0, np.float32)}, "x", ["x"]
    for i in range(draw(st.integers(1, 7))):
        kind = draw(
            st.sampled_from(["conv", "depthwise", "relu", "relu6", "add", "mul", "max", "pool", "mean", "act", "pad"])
        )
        out = f"v{i}"
        if kind in {"conv", "depthwise"}:
            weights[f"w{i}"] = normal(4, 4 if kind == "conv" else 1, 3, 3, seed=seed + i, scale=0.4)
            weights[f"b{i}"] = normal(4, seed=seed + 100 + i)
            group = 1 if kind == "conv" else 4
            nodes.append(node("Conv", [at, f"w{i}", f"b{i}"], [out], name=out, pads=[1, 1, 1, 1], group=group))
        elif kind == "relu":
            nodes.append(node("Relu", [at], [out], name=out))
        elif kind == "relu6":
            nodes.append(node("Clip", [at, "zero", "six"], [out], name=out))
        elif kind in {"add", "mul", "max"}:
            other = draw(st.sampled_from(skips))
            nodes.append(node({"add": "Add", "mul": "Mul", "max": "Max"}[kind], [at, other], [out], name=out))
        elif kind in {"pool", "mean"}:
            op = "MaxPool" if kind == "pool" else "AveragePool"
            nodes.append(node(op, [at], [out], name=out, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
        elif kind == "act":
            nodes.append(
                node(draw(st.sampled_from(["Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "Exp"])), [at], [out], name=out)
            )
            if nodes[-1].op_type == "Exp":  # bounded, so that the next layers stay tame
                nodes.append(node("Tanh", [out], [f"{out}t"], name=f"{out}t"))
                out = f"{out}t"
        else:
            weights.setdefault("pads", np.array([0, 0, 0, 0, 0, 0, 0, 0], np.int64))  # type: ignore[arg-type]
            nodes.append(node("Pad", [at, "pads"], [out], name=out))
        at = out
        skips.append(at)
    nodes += [node("Flatten", [at], ["flat"], name="flat"), node("Gemm", ["flat", "dense"], ["y"], name="dense")]
    weights["dense"] = normal(144, 5, seed=seed)
    outputs: dict[str, Any] = {"y": ["n", 5]}
    if at != "x" and draw(st.booleans()):
        outputs[at] = ["n", 4, 6, 6]
    return graph(nodes, {"x": ["n", 4, 6, 6]}, outputs, weights), normal(24, 4, 6, 6, seed=seed)


@given(networks(), st.sampled_from([7, 8]), st.sampled_from(["minmax", "auto"]))
@settings(max_examples=30, deadline=None)
def test_random_networks_stay_close_to_float(network: tuple[Any, Array], bits: Any, calibration: Any) -> None:
    model, x = network
    step = QuantizeInt8(weight_bits=bits, calibration=calibration)
    plan = step.plan(model, Samples({"x": x}))  # type: ignore[arg-type]
    written = apply_plan(model, plan)
    proto = M.to_proto(written)
    onnx.checker.check_model(proto, full_check=True)
    assert M.signature(written) == M.signature(model)
    assert {n.name for n in prepared(model).graph} == set(plan.quantized) | set(plan.float_nodes)
    wanted = M.FloatSession(model).run({"x": x})
    got = evaluate(written, {"x": x})
    for name in wanted:
        assert np.isfinite(got[name]).all()
        assert (
            sqnr_db(wanted[name], got[name]) > 10
        )  # wrong wiring gives less than 3; a product of products may be coarse
    for value, parameters_of in plan.activations.items():
        assert parameters_of.low <= 0 <= parameters_of.high, value
    for group in plan.groups:
        assert (
            len({(plan.activations[n].scale, plan.activations[n].zero_point) for n in group if n in plan.activations})
            == 1
        )


# --- choosing the calibration -----------------------------------------------------------------------------
def linear(*, softmax: bool = False) -> Any:
    """x·w, 6 values a sample, with or without a softmax after it."""
    nodes = [node("MatMul", ["x", "w"], ["z" if softmax else "y"], name="mul")]
    nodes += [node("Softmax", ["z"], ["y"], name="soft", axis=-1)] if softmax else []
    return graph(nodes, {"x": ["n", 8]}, {"y": ["n", 6]}, {"w": normal(8, 6)})


def test_agreement_is_no_score_where_nothing_tells_of_classes() -> None:
    data = Samples({"x": normal(60, 8, seed=1)})
    plan = QuantizeInt8().plan(linear(), data)
    assert all(set(score) == {"sqnr_db"} for score in plan.scores.values())
    assert plan.method in plan.scores
    plan = QuantizeInt8().plan(linear(softmax=True), data)
    assert all(set(score) == {"sqnr_db", "agreement"} for score in plan.scores.values())


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        (normal(5, 6), None, False),
        (np.full((5, 6), 1 / 6, np.float32), None, True),
        (normal(5, 6), np.array([3]), True),
        (normal(5, 6), np.array([0.5], np.float32), False),
        (normal(5, 6), normal(1, 6), False),
    ],
)
def test_classes_are_told_by_distributions_or_labels(values: Array, labels: Array | None, classes: bool) -> None:
    assert class_scores(linear(), [{"y": values}], labels) == (frozenset({"y"}) if classes else frozenset())
