"""Smoothing: the same function on the data, and channels whose ranges come nearer to each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit import model as M
from edgekit.errors import NoCalibrationDataError, NonFiniteError
from edgekit.passes.apply_plan import apply_plan, prepared
from edgekit.passes.quantize import QuantizeInt8
from edgekit.passes.smooth import Smooth
from tests.quantize_graphs import Array, Samples, graph, node, normal, sqnr_db
from tests.random_graphs import networks

F = np.float32
ROUNDING = 1e-5  # float32 through some ten layers


def run(model: Any, x: Array, *names: str) -> M.Tensors:
    return M.FloatSession(model, fetch=names, optimize=False, threads=1).run({"x": x})


@given(networks(), st.sampled_from([None, None, 0.0, 0.5, 1.0]))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_function_on_the_data_stays(network: tuple[Any, Array], strength: float | None) -> None:
    model, x = network
    model = prepared(model)
    wanted = run(model, x)
    if not all(np.isfinite(v).all() for v in wanted.values()):
        return
    before = M.to_bytes(model)
    other = Smooth(strength=strength)(model, Samples({"x": x}))
    assert M.to_bytes(model) == before
    assert M.to_bytes(Smooth(strength=strength)(model, Samples({"x": x}))) == M.to_bytes(other)
    got = run(other, x)
    for name in wanted:
        assert M.difference(wanted[name], got[name]) <= ROUNDING


def uneven(*middle: Any, spread: float = 1000.0, **weights: Array) -> Any:
    """x (n, 6) through a dense layer to a, whose channels are up to `spread` apart, to z, to y (n, 5)."""
    ranges = np.geomspace(1, spread, 8).astype(F)
    made = [node("Gemm", ["x", "w", "b"], ["a"], name="first"), *middle, node("Gemm", ["z", "v"], ["y"], name="last")]
    given = {"w": normal(6, 8) * ranges, "b": normal(8, seed=1) * ranges, "v": normal(8, 5, seed=2) / ranges[:, None]}
    return prepared(graph(made, {"x": ["n", 6]}, {"y": ["n", 5]}, {**given, **weights}))


def spread(values: Array) -> float:
    """Largest over smallest of the channels' largest magnitudes."""
    reach = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
    return float(reach.max() / reach.min())


def test_full_strength_makes_all_channels_equal() -> None:
    model, x = uneven(node("Relu", ["a"], ["z"])), normal(64, 6, seed=3)
    other = Smooth(strength=1.0)(model, Samples({"x": x}))
    assert spread(run(model, x, "z")["z"]) > 500
    assert spread(run(other, x, "z")["z"]) < 3  # `span` raises channels whose quarters of the data differ
    assert M.difference(run(model, x)["y"], run(other, x)["y"]) <= ROUNDING


def test_what_it_chooses_loses_less_in_int8() -> None:
    model, x = uneven(node("Relu", ["a"], ["z"])), normal(256, 6, seed=3)
    data = Samples({"x": x})
    plain = QuantizeInt8(calibration="minmax", rounding="nearest", bias_correction="off", smooth="off")
    results = [
        evaluated(apply_plan(m, plain.plan(m, data)), x)
        for m in (model, Smooth()(model, data))  # type: ignore[arg-type]
    ]
    wanted = run(model, x)["y"]
    before, after = (sqnr_db(wanted, got) for got in results)
    assert after > before + 6


def evaluated(model: Any, x: Array) -> Array:
    return M.FloatSession(model, optimize=False, threads=1).run({"x": x})["y"]


def test_nothing_to_gain_is_nothing_changed() -> None:
    """Channels of one range, read by weights of one range: any other scale is worse."""
    model = prepared(
        graph(
            [node("Gemm", ["x", "w"], ["a"], name="first"), node("Gemm", ["a", "v"], ["y"], name="last")],
            {"x": ["n", 4]},
            {"y": ["n", 4]},
            {"w": np.eye(4, dtype=F), "v": np.eye(4, dtype=F)[::-1].copy()},
        )
    )
    corners = np.array([[1, -1, 1, -1], [-1, 1, -1, 1]] * 8, F)
    factors = Smooth().factors(model, Samples({"x": corners}))
    assert all(len(set(v)) == 1 for v in factors.values())


def bounded(top: float) -> Any:
    """Relu6 behind a layer whose channels reach `top`, next to nothing, and just less than the bound, on a one."""
    clip = node("Clip", ["a", "lo", "hi"], ["z"], name="relu6")
    return prepared(
        graph(
            [node("Gemm", ["x", "w"], ["a"], name="first"), clip, node("Gemm", ["z", "v"], ["y"], name="last")],
            {"x": ["n", 3]},
            {"y": ["n", 3]},
            {
                "w": np.diag(np.array([top, 0.05, 5.9], F)),
                "v": normal(3, 3),
                "lo": np.array(0, F),
                "hi": np.array(6, F),
            },
        )
    )


@pytest.mark.parametrize(("top", "held"), [(7.0, True), (6.0, True), (2.0, False)])
def test_a_channel_that_reaches_its_bound_keeps_its_scale(top: float, held: bool) -> None:
    model, x = bounded(top), np.random.default_rng(0).random((64, 3)).astype(F)
    x[::8] = 1
    data = Samples({"x": x})
    factors = Smooth(strength=1.0).factors(model, data)
    first, second, third = factors["z"]
    assert (first == 1) is held
    assert second > 10  # it has the room
    assert third * 5.9 <= 6
    other = Smooth(strength=1.0)(model, data)
    assert M.difference(run(model, x)["y"], run(other, x)["y"]) <= ROUNDING
    assert run(other, x, "z")["z"].max() <= 6


def test_dead_channels_and_dead_weights_have_factors_that_are_numbers() -> None:
    model = uneven(node("Relu", ["a"], ["z"]))
    w = M.constant(model.graph.initializers["w"])
    v = M.constant(model.graph.initializers["v"])
    assert w is not None
    assert v is not None
    dead_w, dead_v = w.copy(), v.copy()
    dead_w[:, 0], dead_v[3] = 0, 0
    model = uneven(node("Relu", ["a"], ["z"]), w=dead_w, v=dead_v, b=np.zeros(8, F))
    x = normal(64, 6, seed=3)
    for strength in (None, 0.0, 0.5, 1.0):
        for factor in Smooth(strength=strength).factors(model, Samples({"x": x})).values():
            assert np.isfinite(factor).all()
            assert min(factor) > 0
        other = Smooth(strength=strength)(model, Samples({"x": x}))
        assert M.difference(run(model, x)["y"], run(other, x)["y"]) <= ROUNDING


@pytest.mark.parametrize("x", [np.zeros((20, 6), F), np.full((20, 6), 0.5, F), normal(1, 6), normal(3, 6) * F(1e-20)])
def test_data_that_say_little(x: Array) -> None:
    model = uneven(node("Relu", ["a"], ["z"]))
    other = Smooth()(model, Samples({"x": x}))
    assert M.difference(run(model, x)["y"], run(other, x)["y"]) <= ROUNDING


def test_without_data() -> None:
    with pytest.raises(NoCalibrationDataError):
        Smooth()(uneven(node("Relu", ["a"], ["z"])), None)


def test_nan_is_told() -> None:
    model = uneven(node("Sqrt", ["a"], ["s"], name="root"), node("Gemm", ["s", "u"], ["z"], name="u"), u=normal(8, 8))
    with pytest.raises(NonFiniteError, match="NaN or Inf in tensor"):
        Smooth()(model, Samples({"x": normal(16, 6)}))


def test_a_fixed_batch_is_seen_whole() -> None:
    def model(batch: Any) -> Any:
        nodes = [node("Gemm", ["x", "w"], ["a"], name="first"), node("Gemm", ["a", "v"], ["y"], name="last")]
        weights = {"w": normal(6, 8) * np.geomspace(1, 99, 8).astype(F), "v": normal(8, 5, seed=2)}
        return prepared(graph(nodes, {"x": [batch, 6]}, {"y": [batch, 5]}, weights))

    data = Samples({"x": normal(32, 6, seed=4)})
    fixed, free = (Smooth(strength=1.0).factors(model(batch), data) for batch in (4, "n"))
    assert fixed.keys() == free.keys()
    for name in free:
        np.testing.assert_allclose(fixed[name], free[name], rtol=1e-5)
