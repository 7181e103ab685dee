"""Range estimators against brute force over the values themselves, and the choice among them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.passes.apply_plan import prepared
from edgekit.passes.calibrate import BINS, FOLDS, Observed, channel_ranges, fill_histograms, held_back, observe
from edgekit.passes.decide import decide
from edgekit.passes.grids import LiteRT
from edgekit.passes.plan import Method, activation
from edgekit.passes.quantize import QuantizeInt8
from edgekit.passes.ranges import Gathered, by_output
from tests.quantize_graphs import Array, Samples, graph, node, normal

F = np.float32


def seen_of(*parts: Array, fold: int = 1) -> Observed:
    """Batches of one fold, read twice as calibration does."""
    seen = Observed()
    for values in parts:
        seen.extend(values, fold)
    for values in parts:
        seen.count(values, fold)
    return seen


def rounded(values: Array, low: float, high: float) -> Array:
    """int8 with this range and back, in float64, from the definition."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = np.rint(-128 - low / scale)
    return (np.clip(np.rint(values / scale) + zero, -128, 127) - zero) * scale


def squared(values: Array, low: float, high: float) -> float:
    return float(((rounded(values, low, high) - values) ** 2).mean())


@st.composite
def tensors(draw: st.DrawFn) -> Array:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    size = draw(st.sampled_from([1, 10, 3000]))
    makers = {
        "normal": lambda: rng.normal(size=size),
        "laplace": lambda: rng.laplace(size=size),
        "uniform": lambda: rng.uniform(-1, 3, size),
        "heavy": lambda: rng.standard_t(2, size),
        "relu": lambda: np.maximum(rng.normal(size=size), 0),
        "constant": lambda: np.full(size, 3.0),
        "two values": lambda: rng.choice([-1.0, 5.0], size),
        "negative": lambda: -np.abs(rng.normal(size=size)) - 1,
    }
    values = makers[draw(st.sampled_from(sorted(makers)))]()
    return (values * draw(st.sampled_from([1.0, 1e-6, 1e6, 1e30, 1e-30]))).astype(F)


@given(tensors(), st.sampled_from(LiteRT().estimators))
@settings(max_examples=150, deadline=None)
def test_a_range_is_finite_ordered_and_no_wider_than_it_may_be(values: Array, method: Method) -> None:
    seen = seen_of(values)
    low, high = seen.range(method)
    assert np.isfinite([low, high]).all()
    assert low <= high
    wider = {"wide": 1.15, "wider": 1.4}.get(method, 1.0)
    bottom, top = min(0.0, float(values.min())), max(0.0, float(values.max()))
    slack = 1e-6 * (top - bottom)
    assert bottom * wider - slack <= low
    assert high <= top * wider + slack
    how = activation(low, high, method)
    assert how.scale > 0
    assert -128 <= how.zero_point <= 127
    assert how.low <= 0 <= how.high


@given(tensors())
@settings(max_examples=80, deadline=None)
def test_least_squares_is_near_the_best_of_a_full_search(values: Array) -> None:
    """Over 12 × 12 clipping ranges, on the values themselves instead of a histogram of them."""
    if len(values) < 3000 or not values.max() > values.min():
        return
    wide = values.astype(np.float64)
    low, high = seen_of(values).range("mse")
    bottom, top = min(0.0, float(wide.min())), max(0.0, float(wide.max()))
    sample = wide[::10]
    tried = [
        (squared(sample, bottom * a, top * b), a, b) for a in np.linspace(0.3, 1, 12) for b in np.linspace(0.3, 1, 12)
    ]
    _, a, b = min(tried)
    least, ours = squared(wide, bottom * a, top * b), squared(wide, low, high)
    assert ours <= squared(wide, bottom, top) * 1.02
    # the search steps by 2 % of the range, the histogram by 1/2048: a heavy tail of few values is its own resolution
    assert ours <= 1.35 * least + 1e-12 * float((wide**2).mean())


def test_percentile_is_the_quantile() -> None:
    values = normal(200_000, seed=1)
    low, high = seen_of(*np.split(values, 10)).range("percentile")
    width = float(values.max() - values.min()) / BINS
    assert low == pytest.approx(float(np.quantile(values, 0.5e-4)), abs=2 * width)
    assert high == pytest.approx(float(np.quantile(values, 1 - 0.5e-4)), abs=2 * width)


def test_a_bound_is_no_tail() -> None:
    """Half of the values at 6 (a Relu6 that saturates) are no outliers."""
    values = np.minimum(np.maximum(normal(20_000, seed=2, scale=5), 0), 6)
    assert seen_of(values).range("percentile") == (0.0, 6.0)


def test_average_is_the_mean_of_the_batches_extremes() -> None:
    parts = [normal(50, seed=i, scale=1 + i) for i in range(5)]
    seen = seen_of(*parts)
    low, high = seen.range("average")
    assert low == pytest.approx(np.mean([p.min() for p in parts]), rel=1e-6)
    assert high == pytest.approx(np.mean([p.max() for p in parts]), rel=1e-6)


def test_headroom_is_of_the_extremes() -> None:
    seen = seen_of(np.array([-2.0, 3.0], F))
    assert seen.range("wide") == pytest.approx((-2.3, 3.45))
    assert seen.range("wider") == pytest.approx((-2.8, 4.2))


# --- Kullback-Leibler ------------------------------------------------------------------------------------
def divergence(values: Array, low: float, high: float) -> float:
    """Of the clipped values' histogram from what 256 levels tell of it; levels by the scheme's own rounding."""
    edges = np.linspace(float(values.min()), float(values.max()), BINS + 1)
    clipped = np.clip(values, low, high)
    wanted = np.histogram(clipped, edges)[0].astype(np.float64)
    inside = np.histogram(values[(values >= low) & (values <= high)], edges)[0].astype(np.float64)
    centres = (edges[:-1] + edges[1:]) / 2
    level = np.clip(np.rint((centres - low) / (high - low) * 255), 0, 255)
    told = np.zeros(BINS)
    for number in np.unique(level):
        same = (level == number) & (inside > 0)
        if same.any():
            told[same] = inside[same].mean()
    wanted, told = wanted / wanted.sum(), told / told.sum()
    where = wanted > 0
    return float((wanted[where] * np.log(wanted[where] / np.maximum(told[where], 1e-12))).sum())


@pytest.mark.parametrize("seed", range(4))
def test_divergence_is_near_the_least_of_all_clippings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.laplace(size=50_000).astype(F)
    low, high = seen_of(values).range("kl")
    bottom, top = float(values.min()), float(values.max())
    shares = np.linspace(0.3, 1, 60)
    tried = {s: divergence(values, bottom * s, top * s) for s in shares}
    ours = divergence(values, low, high)
    assert ours <= 1.5 * min(tried.values())
    assert ours <= tried[1.0]


def test_a_far_outlier_is_clipped_and_a_uniform_is_not() -> None:
    values = np.maximum(normal(50_000, seed=3), 0)
    values[0] = 40
    assert seen_of(values).range("kl")[1] < 20
    even = np.linspace(-1, 1, 50_000, dtype=F)
    low, high = seen_of(even).range("kl")
    assert low < -0.95
    assert high > 0.95


# --- folds -----------------------------------------------------------------------------------------------
def test_folds_are_told_apart() -> None:
    seen = Observed()
    for fold in range(FOLDS):
        seen.extend(np.array([-1.0, 1.0], F) * (1 + fold), fold)
    assert seen.range("minmax") == (-5, 5)
    assert seen.range("minmax", everything=False) == (-5, 5)
    assert seen.range("minmax", everything=False, without=4) == (-4, 4)
    held = Observed()
    held.extend(np.array([-9.0, 9.0], F), 0)
    held.extend(np.array([-1.0, 1.0], F), 1)
    assert held.range("minmax", everything=False) == (-1, 1)
    assert held.range("minmax") == (-9, 9)
    assert held.range("minmax", everything=False, without=1) == (-9, 9)  # nothing else is left


def test_every_sample_is_in_the_fold_of_its_number() -> None:
    """With value i in sample i each fold's extremes tell who is in it."""
    model = prepared(graph([node("Relu", ["x"], ["y"], name="r")], {"x": ["n", 1]}, {"y": ["n", 1]}))
    x = np.arange(1, 41, dtype=F).reshape(-1, 1)
    held = held_back(40, 0)
    for batch in (1, 7, 64):
        seen = observe(model, Samples({"x": x}), ["y"], batch_size=batch, held=held)["y"]
        for fold in range(FOLDS):
            own = [i for i in range(40) if (0 if i in held else 1 + i % 4) == fold]
            assert (seen.lows[fold], seen.highs[fold]) == (1 + min(own), 1 + max(own))


def test_channel_means_leave_the_held_samples_out() -> None:
    model = prepared(graph([node("Relu", ["x"], ["y"], name="r")], {"x": ["n", 3, 4]}, {"y": ["n", 3, 4]}))
    x, held = normal(30, 3, 4), frozenset({0, 5})
    seen = observe(model, Samples({"x": x}), ["x"], batch_size=8, held=held, means=frozenset({"x"}))["x"]
    np.testing.assert_allclose(seen.sums / seen.rows, np.delete(x, [0, 5], axis=0).mean(axis=(0, 2)), atol=1e-6)


@pytest.mark.parametrize("samples", [1, 3, 8, 50])
def test_channel_ranges_are_those_of_all_samples_at_once(samples: int) -> None:
    model = prepared(graph([node("Relu", ["x"], ["y"], name="r")], {"x": ["n", 3, 4, 5]}, {"y": ["n", 3, 4, 5]}))
    x = normal(samples, 3, 4, 5, seed=samples) * np.array([1, 10, 100], F).reshape(3, 1, 1)
    found = channel_ranges(model, Samples({"x": x}), {"x": 1, "y": 3})
    np.testing.assert_allclose(found["x"].low, x.min(axis=(0, 2, 3)))
    np.testing.assert_allclose(found["x"].high, x.max(axis=(0, 2, 3)))
    np.testing.assert_allclose(found["x"].power, (x.astype(np.float64) ** 2).mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found["y"].high, np.maximum(x, 0).max(axis=(0, 1, 2)))
    reach = np.abs(x).max(axis=(0, 2, 3))
    assert (found["x"].span >= reach * (1 - 1e-6)).all()
    assert (found["x"].span <= reach.max() * (1 + 1e-6)).all()


# --- the choice ------------------------------------------------------------------------------------------
def chosen(model: Any, x: Array, seed: int = 0) -> dict[str, Method]:
    model, data = prepared(model), Samples({"x": x})
    decision = decide(model, {})
    held = held_back(len(x), seed)
    seen = observe(model, data, list(decision.activations), batch_size=32, held=held)
    gathered = Gathered(model, decision, len(x), held, seed)
    fill_histograms(model, data, seen, batch_size=32, held=held, reader=gathered.take)
    return by_output(decision, seen, gathered, LiteRT())


def dense(columns: int = 16) -> Any:
    return graph(
        [node("Gemm", ["x", "w"], ["y"], name="it")], {"x": ["n", columns]}, {"y": ["n", 4]}, {"w": normal(columns, 4)}
    )


def test_bounded_inputs_keep_their_extremes_and_outliers_that_do_not_matter_go() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (200, 16)).astype(F)
    w = normal(16, 4)
    w[0] = 0  # what is in column 0 is not read
    deaf = graph([node("Gemm", ["x", "w"], ["y"], name="it")], {"x": ["n", 16]}, {"y": ["n", 4]}, {"w": w})
    wild = x.copy()
    wild[:, 0] = np.random.default_rng(1).standard_t(1, 200) * 20
    assert chosen(deaf, wild)["x"] in ("average", "percentile", "mse", "kl")
    assert chosen(dense(), x)["x"] in ("minmax", "wide", "percentile", "mse", "kl")  # of next to no difference


def test_the_choice_is_a_methods_name_and_repeats_itself() -> None:
    model, x = dense(), normal(60, 16)
    one, two = chosen(model, x, 3), chosen(model, x, 3)
    assert one == two
    assert set(one.values()) <= set(LiteRT().estimators)


def test_what_shares_a_scale_is_chosen_for_together() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="a"),
        node("Conv", ["x", "v"], ["b"], name="b"),
        node("Concat", ["a", "b"], ["c"], name="join", axis=1),
        node("MaxPool", ["c"], ["p"], name="pool", kernel_shape=[2, 2]),
        node("Conv", ["p", "u"], ["y"], name="last"),
    ]
    weights = {"w": normal(3, 2, 1, 1), "v": normal(3, 2, 1, 1, scale=9), "u": normal(2, 6, 1, 1)}
    model = graph(nodes, {"x": ["n", 2, 6, 6]}, {"y": ["n", 2, 5, 5]}, weights)
    x = normal(60, 2, 6, 6)
    methods = chosen(model, x)
    assert len({methods[n] for n in ("a", "b", "c", "p")}) == 1
    plan = QuantizeInt8(calibration="output", rounding="nearest").plan(model, Samples({"x": x}))  # type: ignore[arg-type]
    assert ("a", "b", "c", "p") in plan.groups
    assert len({(plan.activations[n].scale, plan.activations[n].zero_point) for n in ("a", "b", "c", "p")}) == 1


@pytest.mark.parametrize("samples", [1, 2, 9, 10, 11])
def test_few_samples(samples: int) -> None:
    assert set(chosen(dense(), normal(samples, 16)).values()) <= set(LiteRT().estimators)


@pytest.mark.parametrize("op", ["Tanh", "Sigmoid"])
def test_what_a_bounded_function_flattens_is_clipped(op: str) -> None:
    """Sums of up to ±40 before a Tanh: the range that loses least behind it is a few units wide."""
    function = {"Tanh": np.tanh, "Sigmoid": lambda v: 1 / (1 + np.exp(-v))}[op]
    nodes = [node("MatMul", ["x", "w"], ["sum"], name="product"), node(op, ["sum"], ["y"], name="bound")]
    model = graph(nodes, {"x": ["n", 16]}, {"y": ["n", 8]}, {"w": normal(16, 8, scale=3)})
    x = normal(200, 16)
    plan = QuantizeInt8(calibration="output", rounding="nearest", smooth="off").plan(model, Samples({"x": x}))  # type: ignore[arg-type]
    how = plan.activations["sum"]
    sums = (x @ np.asarray(model.graph.initializers["w"].const_value)).astype(np.float64)
    lost = ((function(rounded(sums, how.low, how.high)) - function(sums)) ** 2).mean()
    whole = ((function(rounded(sums, sums.min(), sums.max())) - function(sums)) ** 2).mean()
    assert max(-how.low, how.high) < np.abs(sums).max() / 2
    assert lost < whole / 2
