"""The plan as data, and the decisions about which nodes become integers."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import ArtifactError
from edgekit.passes.apply_plan import prepared
from edgekit.passes.decide import decide
from edgekit.passes.plan import QuantizationPlan, Weight, activation
from tests.quantize_graphs import graph, node, normal

reals = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(reals, reals)
def test_parameters_hold_the_range_and_an_exact_zero(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    p = activation(low, high, "minmax")
    assert p.scale > 0
    assert np.float32(p.scale) == p.scale
    assert np.float32(p.scale) >= np.finfo(np.float32).tiny
    assert -128 <= p.zero_point <= 127
    bottom, top = p.limits
    assert bottom <= 0 <= top
    # rounding the zero point moves the ends by at most half a step; the other half is float32 rounding of the scale
    assert bottom <= min(low, 0) + 0.51 * p.scale
    assert top >= max(high, 0) - 0.51 * p.scale


def test_relu_range_starts_at_minus_128_and_dead_tensor_has_a_scale() -> None:
    assert activation(0.0, 3.0, "minmax").zero_point == -128
    dead = activation(0.0, 0.0, "minmax")
    assert dead.zero_point == -128
    assert dead.scale > 0


@given(
    st.dictionaries(st.text(min_size=1), st.tuples(reals, reals), max_size=4),
    st.lists(st.floats(2.0**-100, 2.0**30, width=32), min_size=1, max_size=5),
)
def test_json_round_trip_is_exact(ranges: dict[str, tuple[float, float]], scales: list[float]) -> None:
    plan = QuantizationPlan(
        weight_bits=7,
        method="mse",
        quantized=("a", "b"),
        fused={"r": "kept"},
        float_nodes={"l": "LSTM has no integer form"},
        activations={k: activation(min(v), max(v), "mse") for k, v in ranges.items()},
        weights={"a": Weight("w", 0, 7, tuple(scales))},
        groups=(("x", "y"),),
        bias_shifts={"a": tuple(scales)},
        scores={"mse": {"sqnr_db": 31.25, "agreement": 1.0}},
    )
    again = QuantizationPlan.from_json(plan.to_json())
    assert again == plan
    assert again.diff(plan) == []


def test_diff_names_what_differs() -> None:
    one = QuantizationPlan(8, "minmax", ("a",), {}, {}, {"x": activation(0, 1, "minmax")}, {})
    two = dataclasses.replace(one, activations={"x": activation(0, 2, "minmax")}, weight_bits=7)
    lines = one.diff(two)
    assert "weight_bits: 8 -> 7" in lines
    assert "activations.x.high: 1.0 -> 2.0" in lines


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 99}', '{"schema": 1}', '{"schema": 1, "activations": 3}']
)
def test_damaged_plan_is_one_line(text: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        QuantizationPlan.from_json(text)
    assert "\n" not in str(caught.value)


def test_unknown_field_is_refused() -> None:
    plan = QuantizationPlan(8, "minmax", (), {}, {}, {}, {})
    data = json.loads(plan.to_json()) | {"surprise": 1}
    with pytest.raises(ArtifactError):
        QuantizationPlan.from_json(json.dumps(data))


# --- decisions -------------------------------------------------------------------------------------------
def test_elementwise_between_float_nodes_stays_float() -> None:
    model = prepared(
        graph(
            [
                node("Erf", ["x"], ["e"], name="erf"),
                node("Mul", ["e", "e"], ["m"], name="mul"),
                node("Erf", ["m"], ["y"], name="erf2"),
            ],
            {"x": ["n", 4]},
            {"y": ["n", 4]},
        )
    )
    decision = decide(model, {})
    assert decision.quantized == ()
    assert decision.activations == ()
    assert "mul" in decision.float_nodes


def test_moves_that_leave_a_part_of_float_values_stay_float() -> None:
    """A maximum over time has a range of its own, narrower than that of all steps."""
    nodes = [
        node("Erf", ["x"], ["steps"], name="float"),
        node("Transpose", ["steps"], ["turned"], name="turn", perm=[0, 2, 1]),
        node("ReduceMax", ["turned", "axes"], ["top"], name="most", keepdims=0),
        node("MatMul", ["top", "w"], ["y"], name="dense"),
    ]
    constants = {"axes": np.array([2], np.int64), "w": normal(4, 5)}
    decision = decide(prepared(graph(nodes, {"x": ["n", 3, 4]}, {"y": ["n", 5]}, constants)), {})
    assert decision.quantized == ("dense",)
    assert set(decision.activations) == {"top", "y"}
    given = [node("Transpose", ["x"], ["turned"], name="turn", perm=[0, 2, 1]), *nodes[2:]]
    decision = decide(prepared(graph(given, {"x": ["n", 3, 4]}, {"y": ["n", 5]}, constants)), {})
    assert decision.quantized == ("turn", "most", "dense")  # a device may hand over its input as integers


def test_layer_norm_pieces_stay_float_before_a_matmul() -> None:
    model = prepared(
        graph(
            [
                node("ReduceMean", ["x", "axes"], ["mean"], name="mean"),
                node("Sub", ["x", "mean"], ["centred"], name="centre"),
                node("Mul", ["centred", "gamma"], ["scaled"], name="scale"),
                node("MatMul", ["scaled", "w"], ["y"], name="dense"),
            ],
            {"x": ["n", 3, 4]},
            {"y": ["n", 3, 5]},
            {"axes": np.array([-1], np.int64), "gamma": normal(4), "w": normal(4, 5)},
        )
    )
    decision = decide(model, {})
    assert decision.quantized == ("dense",)
    assert set(decision.activations) == {"scaled", "y"}


def test_groups_reach_through_moves_and_joins() -> None:
    model = prepared(
        graph(
            [
                node("Conv", ["x", "w"], ["a"], name="conv"),
                node("Relu", ["a"], ["r"], name="relu"),
                node("MaxPool", ["r"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
                node("Conv", ["x", "v"], ["b"], name="other", strides=[2, 2]),
                node("Concat", ["p", "b"], ["y"], name="join", axis=1),
            ],
            {"x": ["n", 2, 8, 8]},
            {"y": ["n", 7, 4, 4]},
            {"w": normal(3, 2, 1, 1), "v": normal(4, 2, 1, 1)},
        )
    )
    decision = decide(model, {})
    assert decision.groups == (("b", "p", "r", "y"),)
    assert decision.fused == {"relu": "conv"}
    assert "a" not in decision.activations
    assert {"b", "p", "r"} <= decision.outputs


def test_join_of_differently_fixed_scales_stays_float() -> None:
    model = prepared(
        graph(
            [
                node("Gemm", ["x", "w"], ["a"], name="gemm"),
                node("Sigmoid", ["a"], ["s"], name="sigmoid"),
                node("Tanh", ["a"], ["t"], name="tanh"),
                node("Concat", ["s", "t"], ["y"], name="join", axis=1),
            ],
            {"x": ["n", 4]},
            {"y": ["n", 6]},
            {"w": normal(4, 3)},
        )
    )
    decision = decide(model, {})
    assert "scheme fixes" in decision.float_nodes["join"]


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (node("Gemm", ["x", "w"], ["y"], name="it", transA=1), "transposed"),
        (node("Pad", ["x", "pads", "one"], ["y"], name="it"), "something else than 0"),
        (node("Gather", ["w", "pads"], ["y"], name="it"), "constant"),
        (node("MatMul", ["w", "x"], ["y"], name="it"), "not a matrix on the right"),
        (node("Sqrt", ["x"], ["y"], name="it"), "no integer form"),
    ],
)
def test_refused_nodes_say_why(op: object, reason: str) -> None:
    model = prepared(
        graph(
            [op],  # type: ignore[list-item]
            {"x": [4, 4]},
            {"y": ["a", "b"]},
            {"w": normal(4, 4), "pads": np.array([0, 0, 0, 0], np.int64), "one": np.array(1, np.float32)},
        )
    )
    assert reason in decide(model, {}).float_nodes["it"]
