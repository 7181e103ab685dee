"""Reconstruction of each kind of layer: nearer to the float layer on samples that it never saw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgekit import model as M
from edgekit.passes import reconstruct as R
from edgekit.passes.apply_plan import apply_plan, prepared
from edgekit.passes.plan import QuantizationPlan
from edgekit.passes.quantize import QuantizeInt8
from edgekit.passes.reconstruct import affordable, reconstruct
from tests.quantize_graphs import Array, Samples, graph, node, normal

NEAREST = QuantizeInt8(calibration="minmax", rounding="nearest", bias_correction="off", smooth="off")
F = np.float32


def mixed(*shape: int, seed: int, rank: int = 3) -> Array:
    """Samples whose channels (axis 1; the last of fewer than four axes) are mixtures of few signals and some noise."""
    rng = np.random.default_rng(seed)
    axis = 1 if len(shape) > 3 else len(shape) - 1
    basis = np.random.default_rng(99).normal(size=(rank, shape[axis]))
    signals = rng.normal(size=(*[n for i, n in enumerate(shape) if i != axis], rank))
    x = np.abs(signals @ basis) + 0.1 * rng.normal(size=(*signals.shape[:-1], shape[axis]))
    return np.ascontiguousarray(np.moveaxis(x, -1, axis).astype(F))


def coarse(model: Any, x: Array, bits: int = 4) -> QuantizationPlan:
    """A plan with scales so wide that `bits` are left of the weights: their rounding is what is lost."""
    plan = NEAREST.plan(model, Samples({"x": x}))  # type: ignore[arg-type]
    wide = 2.0 ** (8 - bits)
    return replace(
        plan,
        weights={n: replace(w, scales=tuple(s * wide for s in w.scales)) for n, w in plan.weights.items()},
    )


def outputs(model: Any, x: Array) -> Array:
    return M.FloatSession(model, optimize=False, threads=1).run({"x": x})["y"]


def lost(model: Any, plan: QuantizationPlan, x: Array) -> float:
    """Squared error at the output over the signal."""
    wanted, got = outputs(model, x).astype(np.float64), outputs(apply_plan(model, plan), x)
    return float(((got - wanted) ** 2).sum() / (wanted**2).sum())


CONV = {
    "conv": ({"pads": [1, 1, 1, 1]}, (8, 12, 3, 3)),
    "pointwise": ({}, (8, 12, 1, 1)),
    "depthwise": ({"group": 12, "pads": [1, 1, 1, 1]}, (12, 1, 3, 3)),
    "grouped": ({"group": 3, "pads": [1, 1, 1, 1]}, (6, 4, 3, 3)),
    "strided": ({"strides": [2, 2], "pads": [1, 1, 1, 1]}, (8, 12, 3, 3)),
    "dilated": ({"dilations": [2, 2]}, (8, 12, 3, 3)),
    "padded": ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (8, 12, 3, 3)),
}
DENSE: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "gemm": ("Gemm", {}, (24, 8), ()),
    "transposed gemm": ("Gemm", {"transB": 1, "alpha": 0.5, "beta": 2.0}, (8, 24), ()),
    "product": ("MatMul", {}, (24, 8), ()),
    "product of sequences": ("MatMul", {}, (24, 8), (5,)),
}


def layer(name: str, *, bias: bool) -> tuple[Any, tuple[int, ...]]:
    """(a model of one layer, the shape of a sample)."""
    if name in CONV:
        attributes, weight = CONV[name]
        op, sample, channels = "Conv", (12, 8, 8), weight[0]
    else:
        op, attributes, weight, middle = DENSE[name]
        sample, channels = (*middle, 24), 8
    weights = {"w": normal(*weight)} | ({"b": normal(channels, seed=1)} if bias and op != "MatMul" else {})
    out = ["n", *[f"d{i}" for i in range(len(sample))]]
    made = [node(op, ["x", *weights], ["y"], name="it", **attributes)]
    return prepared(graph(made, {"x": ["n", *sample]}, {"y": out}, weights)), sample


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [*CONV, *DENSE])
def test_less_is_lost_on_other_samples(name: str, bias: bool) -> None:
    model, sample = layer(name, bias=bias)
    x, held = mixed(64, *sample, seed=1), mixed(64, *sample, seed=2)
    plan = coarse(model, x)
    better, gains = reconstruct(model, plan, [{"x": x[:32]}, {"x": x[32:]}])
    before, after = lost(model, plan, held), lost(model, better, held)
    assert after <= before
    if name != "depthwise" and name != "pointwise":
        assert after < 0.6 * before
    if gains:
        assert gains["it"] < 1
    weights = np.frombuffer(better.weights["it"].integers, np.int8)
    assert np.abs(weights.astype(int)).max(initial=0) <= better.weights["it"].limit
    assert better.weights["it"].scales == plan.weights["it"].scales


def test_the_gain_that_is_told_is_the_gain_on_samples_not_fitted_on() -> None:
    model, sample = layer("gemm", bias=True)
    x, held = mixed(400, *sample, seed=1), mixed(4000, *sample, seed=2)
    plan = coarse(model, x)
    better, gains = reconstruct(model, plan, [{"x": x}])
    # of the layer's result before its own rounding, which is the same for both
    assert gains["it"] == pytest.approx(lost(model, better, held) / lost(model, plan, held), rel=0.5)


def chain(depth: int = 4) -> Any:
    made, weights, at = [], {}, "x"
    for i in range(depth):
        last = i == depth - 1
        out = 4 if last else 8
        weights |= {f"w{i}": normal(out, 8, 3, 3, seed=i, scale=0.17), f"b{i}": normal(out, seed=9 + i)}
        made.append(node("Conv", [at, f"w{i}", f"b{i}"], ["y" if last else f"a{i}"], name=f"c{i}", pads=[1, 1, 1, 1]))
        if not last:
            made.append(node("Relu", [f"a{i}"], [f"r{i}"], name=f"relu{i}"))
        at = f"r{i}"
    return prepared(graph(made, {"x": ["n", 8, 6, 6]}, {"y": ["n", 4, 6, 6]}, weights))


def test_later_layers_make_up_for_earlier_ones() -> None:
    """All four layers together lose less than with each rounded as if those before it were exact."""
    model, x, held = chain(), mixed(64, 8, 6, 6, seed=1), mixed(64, 8, 6, 6, seed=2)
    plan = coarse(model, x)
    better, gains = reconstruct(model, plan, [{"x": x}])
    assert set(gains) == {"c0", "c1", "c2", "c3"}
    before, after = lost(model, plan, held), lost(model, better, held)
    assert after < 0.5 * before
    first_only = replace(
        plan,
        weights={**plan.weights, "c0": better.weights["c0"]},
        bias_shifts={n: s for n, s in better.bias_shifts.items() if n == "c0"},
    )
    assert after < lost(model, first_only, held)


def test_a_mean_error_goes_into_the_bias() -> None:
    """Inputs of one sign and weights all rounded down: what is lost is a constant."""
    model = prepared(
        graph(
            [node("Gemm", ["x", "w", "b"], ["y"], name="it")],
            {"x": ["n", 6]},
            {"y": ["n", 3]},
            {"w": np.vstack([np.full((1, 3), 1, F), np.full((5, 3), 0.49 / 7, F)]), "b": np.zeros(3, F)},
        )
    )
    x = (5 + 0.01 * normal(200, 6, seed=3)).astype(F)
    plan = coarse(model, x)
    better, _ = reconstruct(model, plan, [{"x": x}])
    assert lost(model, better, x) < 0.3 * lost(model, plan, x)  # the rest is the rounding of x and y


def test_repeats_itself_and_edits_nothing() -> None:
    model, x = chain(2), mixed(48, 8, 6, 6, seed=1)
    plan, before = coarse(model, x), M.to_bytes(model)
    one, two = (reconstruct(model, plan, [{"x": x}], seed=5) for _ in range(2))
    assert one == two
    assert M.to_bytes(model) == before
    assert plan.bias_shifts == {}


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5])
def test_few_samples(samples: int) -> None:
    """Fewer than four leave everything as it is: none of them could judge."""
    model, x = chain(2), mixed(samples, 8, 6, 6, seed=1)
    plan = coarse(model, x)
    better, gains = reconstruct(model, plan, [{"x": x}])
    if samples < R.HELD:
        assert better == plan
    assert all(g < 1 for g in gains.values())


FLAT = (16, 8, 6, 6)


@pytest.mark.parametrize("x", [np.zeros(FLAT, F), np.full(FLAT, 0.3, F), normal(*FLAT) * F(1e30)])
def test_data_that_say_little(x: Array) -> None:
    model = chain(2)
    plan = coarse(model, x)
    better, _ = reconstruct(model, plan, [{"x": x}])
    got = outputs(apply_plan(model, better), x)
    assert np.isfinite(got).all()
    assert lost(model, better, x) <= lost(model, plan, x) * 1.001


def test_a_shared_weight_is_rounded_for_each_reader() -> None:
    nodes = [node("Gemm", ["x", "w"], ["h"], name="one"), node("Gemm", ["h", "w"], ["y"], name="two")]
    model = prepared(graph(nodes, {"x": ["n", 12]}, {"y": ["n", 12]}, {"w": normal(12, 12)}))
    x, held = mixed(128, 12, seed=1), mixed(128, 12, seed=2)
    plan = coarse(model, x)
    better, _ = reconstruct(model, plan, [{"x": x}])
    assert better.weights["one"].integers != better.weights["two"].integers
    assert lost(model, better, held) < lost(model, plan, held)


# --- how many samples ------------------------------------------------------------------------------------
def test_as_many_samples_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = chain(2), Samples({"x": normal(100, 8, 6, 6)})
    count = lambda: sum(len(b["x"]) for b in affordable(model, data, frozenset()))  # noqa: E731
    assert count() == 100
    per_sample = 2 * 8 * 6 * 6 * 4
    monkeypatch.setattr(R, "LIVE_BYTES", 3 * per_sample * 40)
    assert count() == 40
    monkeypatch.setattr(R, "LIVE_BYTES", 1)
    assert count() == 1


def test_held_samples_are_left_out() -> None:
    x = normal(50, 8, 6, 6)
    batches = affordable(chain(2), Samples({"x": x}), frozenset({0, 7, 49}))
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in batches]), np.delete(x, [0, 7, 49], axis=0))
