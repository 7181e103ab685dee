"""Equalization: the same function, weights of two layers in turn brought to one range, high biases moved on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit import model as M
from edgekit.errors import NonFiniteError
from edgekit.passes.absorb import absorbed
from edgekit.passes.apply_plan import prepared
from edgekit.passes.equalize import Equalize
from tests.quantize_graphs import Array, Samples, graph, node, normal, sqnr_db, types
from tests.random_graphs import networks

F = np.float32
ROUNDING = 1e-5  # float32 through some ten layers


def run(model: Any, x: Array, *names: str) -> M.Tensors:
    return M.FloatSession(model, fetch=names, optimize=False, threads=1).run({"x": x})


def same(model: Any, other: Any, x: Array) -> None:
    wanted, got = run(model, x), run(other, x)
    for name in wanted:
        assert M.difference(wanted[name], got[name]) <= ROUNDING


def constant(model: Any, layer: str, position: int = 1) -> Array:
    (at,) = [n for n in model.graph if n.name == layer]
    array = M.constant(at.inputs[position])
    assert array is not None
    return array


# --- the function -------------------------------------------------------------------------------------------
@given(networks(), st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_function_stays(network: tuple[Any, Array], with_data: bool) -> None:
    """Without data on any input; with data, where bounds and biases were looked at, on those."""
    model, x = network
    model = prepared(model)
    if not all(np.isfinite(v).all() for v in run(model, x).values()):
        return
    before = M.to_bytes(model)
    data = Samples({"x": x}) if with_data else None
    other = Equalize()(model, data)  # type: ignore[arg-type]
    assert M.to_bytes(model) == before
    assert M.to_bytes(Equalize()(model, data)) == M.to_bytes(other)  # type: ignore[arg-type]
    same(model, other, x if with_data else 3 * x[::-1])


def series(*middle: Any, **weights: Array) -> Any:
    """x (n, 3, 8, 8) through conv a, a depthwise conv d, conv b and a residual to a dense layer; scales far apart."""
    spread = 10.0 ** np.random.default_rng(5).uniform(-1.5, 1.5, (2, 8)).astype(F)
    nodes = [
        node("Conv", ["x", "wa", "ba"], ["a"], name="first", pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["ra"], name="relu_a"),
        node("Conv", ["ra", "wd", "bd"], ["d"], name="depthwise", pads=[1, 1, 1, 1], group=8),
        *(middle or [node("LeakyRelu", ["d"], ["rd"], name="leaky", alpha=0.2)]),
        node("Conv", ["rd", "wb"], ["b"], name="back"),
        node("Add", ["b", "ra"], ["sum"], name="residual"),
        node("MaxPool", ["sum"], ["p"], name="pool", kernel_shape=[4, 4], strides=[4, 4]),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("Gemm", ["f", "v", "c"], ["y"], name="last", transB=1),
    ]
    arrays = {
        "wa": normal(8, 3, 3, 3) * spread[0].reshape(8, 1, 1, 1), "ba": normal(8, seed=1) * spread[0],
        "wd": normal(8, 1, 3, 3, seed=2) * (spread[1] / spread[0]).reshape(8, 1, 1, 1),
        "bd": normal(8, seed=3) * spread[1],
        "wb": normal(8, 8, 1, 1, seed=4) / spread[1].reshape(1, 8, 1, 1) * spread[0].reshape(8, 1, 1, 1),
        "v": normal(5, 32, seed=5) / np.repeat(spread[0], 4), "c": normal(5, seed=6), **weights,
    }  # fmt: skip
    return prepared(graph(nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 5]}, arrays))


def test_depthwise_residual_leaky_relu_and_features() -> None:
    model = series()
    other = Equalize()(model, None)
    same(model, other, normal(9, 3, 8, 8, seed=7))
    assert types(other) == types(model)
    # each channel's share of what makes it equals its share of what reads it, whichever layer has the larger
    shares = {name: _shares(constant(other, name)) for name in ("first", "depthwise", "back", "last")}
    np.testing.assert_allclose(shares["depthwise"][0], shares["back"][1], rtol=0.01)
    makes = np.maximum(shares["first"][0], shares["back"][0])
    reads = np.maximum(shares["depthwise"][0], shares["last"][1].reshape(8, 4).max(axis=1))
    np.testing.assert_allclose(makes, reads, rtol=0.01)


def _shares(weight: Array) -> tuple[Array, Array]:
    """Largest |w| of each output and of each input channel of a Conv or a transB Gemm, over the largest of all."""
    flat = np.abs(weight).reshape(*weight.shape[:2], -1).max(axis=2)
    return flat.max(axis=1) / flat.max(), flat.max(axis=0) / flat.max()


def test_two_layers_meet_where_the_paper_says() -> None:
    """Eq. 9 to 11: s = sqrt(r1 · r2) / r2 divides the first layer's rows, up to a factor that all have in common."""
    nodes = [
        node("Gemm", ["x", "w1", "b1"], ["a"], name="one", transB=1),
        node("Relu", ["a"], ["r"], name="relu"),
        node("Gemm", ["r", "w2"], ["y"], name="two", transB=1),
    ]
    spread = np.geomspace(1e-2, 1e2, 6).astype(F)
    w1, b1, w2 = normal(6, 4) * spread[:, None], normal(6, seed=1) * spread, normal(3, 6, seed=2)
    model = prepared(graph(nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, {"w1": w1, "b1": b1, "w2": w2}))
    other = Equalize()(model, None)
    r1, r2 = np.abs(w1).max(axis=1), np.abs(w2).max(axis=0)
    s = np.sqrt(r1 * r2) / r2
    got = constant(other, "one")
    common = np.abs(got).max() / np.abs(w1 / s[:, None]).max()
    np.testing.assert_allclose(got, common * w1 / s[:, None], rtol=2e-3)
    np.testing.assert_allclose(constant(other, "one", 2), common * b1 / s, rtol=2e-3)
    np.testing.assert_allclose(constant(other, "two"), w2 * s / common, rtol=2e-3)
    made, read = np.abs(got).max(axis=1), np.abs(constant(other, "two")).max(axis=0)
    np.testing.assert_allclose(made / made.max(), read / read.max(), rtol=2e-3)


def test_once_is_enough() -> None:
    model = Equalize()(series(), None)
    for factors in Equalize().factors(model, None).values():
        np.testing.assert_allclose(factors, 1, rtol=0.02)


def test_one_scale_per_tensor_loses_less_of_the_weights() -> None:
    """Rounded in numpy to 8 bits with one scale for each whole weight."""
    model, x = series(), normal(16, 3, 8, 8, seed=7)
    wanted = run(model, x)["y"]
    before, after = (sqnr_db(wanted, run(_rounded(m), x)["y"]) for m in (model, Equalize()(model, None)))
    assert after > before + 6


def _rounded(model: Any) -> Any:
    model = M.clone(model)
    for at in model.graph:
        if at.op_type in {"Conv", "Gemm"}:
            value, w = at.inputs[1], M.constant(at.inputs[1])
            assert value is not None
            assert w is not None
            step = np.abs(w).max() / 127
            value.const_value = ir.tensor((np.rint(w / step) * step).astype(F), name=value.name)
    return model


# --- what holds channels ------------------------------------------------------------------------------------
def bounded(op: str = "Clip", **more: Array) -> Any:
    """Four channels that reach 0.05, 2, 5.9 and 30, behind a bounded function."""
    inputs = ["a", "lo", "hi"] if op == "Clip" else ["a"]
    nodes = [
        node("Gemm", ["x", "w"], ["a"], name="first"),
        node(op, inputs, ["z"], name="bound"),
        node("Gemm", ["z", "v"], ["y"], name="last"),
    ]
    given = {"w": np.diag(np.array([0.05, 2, 5.9, 30], F)), "v": normal(4, 3), **more}
    given |= {"lo": np.array(0, F), "hi": np.array(6, F)} if op == "Clip" else {}
    return prepared(graph(nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, given))


def some(rows: int = 64) -> Array:
    x = np.random.default_rng(0).random((rows, 4)).astype(F)
    x[::8] = 1
    return x


@pytest.mark.parametrize("op", ["Clip", "HardSwish", "Sigmoid"])
def test_without_data_nothing_crosses_a_bounded_function(op: str) -> None:
    assert Equalize().factors(bounded(op), None) == {}


def test_with_data_a_channel_has_the_room_that_it_leaves() -> None:
    model, x = bounded(), some()
    data: Any = Samples({"x": x})
    factors = np.array(Equalize().factors(model, data)["z"])
    tops = run(model, x, "z")["z"].max(axis=0)
    assert factors[3] == 1  # it touches the bound
    assert factors[0] > 2
    assert (factors[:3] * tops[:3] <= 6).all()
    same(model, Equalize()(model, data), x)
    assert Equalize().factors(bounded("HardSwish"), data) == {}


def test_bounds_of_each_channel_become_one() -> None:
    top = np.array([0.6, 6, 60, 600], F)
    nodes = [
        node("Gemm", ["x", "w"], ["a"], name="first"),
        node("Relu", ["a"], ["r"], name="relu"),
        node("Min", ["r", "top"], ["z"], name="min"),
        node("Gemm", ["z", "v"], ["y"], name="last"),
    ]
    weights = {"w": normal(4, 4) * top, "v": normal(4, 3, seed=1) / top[:, None], "top": top}
    model = prepared(graph(nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, weights))
    other = Equalize()(model, None)
    assert types(other) == ["Gemm", "Clip", "Gemm"]
    same(model, other, normal(64, 4, seed=3))


def test_dead_channels_and_shared_weights_are_left_alone() -> None:
    w, v = normal(6, 6), normal(6, 6, seed=1) / np.geomspace(1, 1e3, 6).astype(F)[:, None]
    w[:, 0], v[3] = 0, 0
    nodes = [
        node("Gemm", ["x", "w"], ["a"], name="one"),
        node("Relu", ["a"], ["r"], name="relu"),
        node("Gemm", ["r", "v"], ["b"], name="two"),
        node("Relu", ["b"], ["s"], name="again"),
        node("Gemm", ["s", "last"], ["y"], name="three"),
    ]
    shapes: Any = ({"x": ["n", 6]}, {"y": ["n", 6]})
    last = normal(6, 6, seed=2)
    factors = Equalize().factors(prepared(graph(nodes, *shapes, {"w": w, "v": v, "last": last})), None)
    assert factors["a"][0] == factors["a"][3] == 1
    assert max(factors["a"]) / min(factors["a"]) > 5
    nodes[-1] = node("Gemm", ["s", "v"], ["y"], name="three")
    assert Equalize().factors(prepared(graph(nodes, *shapes, {"w": w, "v": v})), None) == {}


# --- high biases --------------------------------------------------------------------------------------------
HIGH = np.array([9, 0, 4, 7], F)  # added to channels of about ±1


def lifted(*behind: Any, y: Any = ("n", 5), bias: bool = True, **weights: Array) -> Any:
    """A 1x1 convolution of four channels, three of them far above 0, a Relu, and what reads it."""
    nodes = [
        node("Conv", ["x", "w", "b"] if bias else ["x", "w"], ["a"], name="first"),
        node("Relu", ["a"], ["r"], name="relu"),
        *behind,
    ]
    given = {"w": normal(4, 3, 1, 1) / 8, "b": HIGH, **weights}
    return prepared(graph(nodes, {"x": ["n", 3, 6, 6]}, {"y": list(y)}, given))


def near(rows: int = 40, seed: int = 1) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, 3, 6, 6)).astype(F)


CONV = node("Conv", ["r", "u"], ["y"], name="conv")
POOLED = [
    node("GlobalAveragePool", ["r"], ["g"], name="pool"),
    node("Flatten", ["g"], ["f"], name="flat"),
    node("Gemm", ["f", "m", "c"], ["y"], name="dense"),
]
READERS: dict[str, tuple[list[Any], Any, dict[str, Array]]] = {
    "conv": ([CONV], ("n", 5, 4, 4), {"u": normal(5, 4, 3, 3, seed=2)}),
    "dense": (POOLED, ("n", 5), {"m": normal(4, 5, seed=2), "c": normal(5, seed=3)}),
    "product": (
        [
            node("Transpose", ["r"], ["t"], name="turn", perm=[0, 2, 3, 1]),
            node("MatMul", ["t", "m"], ["p"], name="product"),
            node("Add", ["c", "p"], ["y"], name="add"),
        ],
        ("n", 6, 6, 5),
        {"m": normal(4, 5, seed=2), "c": normal(5, seed=3)},
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_absorption_is_exact_above_the_lowest_value_seen(name: str) -> None:
    behind, y, weights = READERS[name]
    model, x = lifted(*behind, y=y, **weights), near()
    other = Equalize()(model, Samples({"x": x}))  # type: ignore[arg-type]
    fresh = near(60, seed=9) * 0.5  # within what was seen
    before, after = run(model, fresh, "r")["r"], run(other, fresh, "r")["r"]
    same(model, other, fresh)
    scale = constant(other, "first") / constant(model, "first")
    scale = scale.reshape(4, -1).mean(axis=1)
    moved = constant(model, "first", 2) * scale - constant(other, "first", 2)
    lowest = np.maximum(run(model, x, "r")["r"].min(axis=(0, 2, 3)), 0) * scale
    np.testing.assert_allclose(moved, lowest, rtol=1e-4, atol=1e-5)
    assert (moved[[0, 2, 3]] > 0).all()
    assert moved[1] == pytest.approx(0, abs=1e-6)
    assert after.max() < 0.6 * (before * scale.reshape(4, 1, 1)).max()
    kept = Equalize(absorb=False)(model, Samples({"x": x}))  # type: ignore[arg-type]
    np.testing.assert_allclose(constant(kept, "first", 2), constant(model, "first", 2) * scale, rtol=1e-5)


def test_below_the_lowest_value_the_error_is_what_the_relu_cuts() -> None:
    behind, y, weights = READERS["dense"]
    model = lifted(*behind, y=y, **weights)
    other = Equalize()(model, Samples({"x": near() * F(0.01)}))  # type: ignore[arg-type]
    far = M.difference(run(model, near())["y"], run(other, near())["y"])
    assert ROUNDING < far < 0.1


U = {"u": normal(5, 4, 3, 3, seed=2)}
REFUSED: dict[str, tuple[list[Any], Any, dict[str, Array]]] = {
    "padded": ([node("Conv", ["r", "u"], ["y"], name="conv", pads=[1, 1, 1, 1])], ("n", 5, 6, 6), U),
    "padded by name": ([node("Conv", ["r", "u"], ["y"], name="conv", auto_pad="SAME_UPPER")], ("n", 5, 6, 6), U),
    "another reader": (
        [
            CONV,
            node("Exp", ["r"], ["e"], name="exp"),
            node("Shape", ["e"], ["unread"], name="shape"),
        ],
        ("n", 5, 4, 4),
        U,
    ),
    "no bias behind": (
        [
            node("Transpose", ["r"], ["t"], name="turn", perm=[0, 2, 3, 1]),
            node("MatMul", ["t", "m"], ["y"], name="product"),
        ],
        ("n", 6, 6, 5),
        {"m": normal(4, 5, seed=2)},
    ),
    "no bias before": ([CONV], ("n", 5, 4, 4), U),
    "an output": ([node("Identity", ["r"], ["y"], name="out")], ("n", 4, 6, 6), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_absorption_is_refused(name: str) -> None:
    behind, y, weights = REFUSED[name]
    high = name != "no bias before"
    given = weights if high else {**weights, "w": np.abs(normal(4, 3, 1, 1)) + 1}
    model, x = lifted(*behind, y=y, bias=high, **given), near() + 2
    data: Any = Samples({"x": x})
    assert M.to_bytes(Equalize()(model, data)) == M.to_bytes(Equalize(absorb=False)(model, data))


def test_a_gain_of_next_to_nothing_is_left() -> None:
    """The largest channel reaches down to 0: the tensor's range would stay."""
    behind, y, weights = READERS["dense"]
    wide = normal(4, 3, 1, 1) / 8
    wide[1] *= 200
    model, data = lifted(*behind, y=y, w=wide, **weights), Samples({"x": near()})
    assert M.to_bytes(absorbed(model, data)) == M.to_bytes(model)  # type: ignore[arg-type]
    assert M.to_bytes(absorbed(lifted(*behind, y=y, **weights), data)) != M.to_bytes(model)  # type: ignore[arg-type]


def test_nan_is_told() -> None:
    model = bounded("Clip", w=np.full((4, 4), np.inf, F))
    x = some()
    x[3] = 0  # 0 · inf
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        Equalize()(model, Samples({"x": x}))  # type: ignore[arg-type]
