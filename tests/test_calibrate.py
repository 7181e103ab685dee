"""Streaming calibration against numpy over the whole data at once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import NoCalibrationDataError, NonFiniteError
from edgekit.passes import calibrate
from edgekit.passes.calibrate import BINS, Observed, bounded, channel_ranges, fill_histograms, held_back, observe
from tests.quantize_graphs import Array, Batch, Samples, evaluate, graph, node, normal


def small(batch: int | str = "n") -> Any:
    return graph(
        [
            node("Conv", ["x", "w", "b"], ["a"], name="conv", pads=[1, 1, 1, 1]),
            node("Relu", ["a"], ["r"], name="relu"),
            node("GlobalAveragePool", ["r"], ["y"], name="mean"),
        ],
        {"x": [batch, 2, 6, 6]},
        {"y": [batch, 3, 1, 1]},
        {"w": normal(3, 2, 3, 3), "b": normal(3, seed=1)},
    )


def whole(x: Array) -> dict[str, Array]:
    """Every value for all samples at once, by onnx's reference evaluator."""
    model = graph(
        [
            node("Conv", ["x", "w", "b"], ["a"], name="conv", pads=[1, 1, 1, 1]),
            node("Relu", ["a"], ["r"], name="relu"),
            node("GlobalAveragePool", ["r"], ["y"], name="mean"),
        ],
        {"x": ["n", 2, 6, 6]},
        {"a": ["n", 3, 6, 6], "r": ["n", 3, 6, 6], "y": ["n", 3, 1, 1]},
        {"w": normal(3, 2, 3, 3), "b": normal(3, seed=1)},
    )
    return evaluate(model, {"x": x}) | {"x": x}


@pytest.mark.parametrize("batch", ["n", 1, 4, 16])
@pytest.mark.parametrize("size", [1, 7, 32])
def test_extremes_are_those_of_all_samples_at_once(batch: int | str, size: int) -> None:
    x = normal(10, 2, 6, 6, seed=2)
    seen = observe(small(batch), Samples({"x": x}), ["x", "a", "r", "y"], batch_size=size, held=frozenset({3, 9}))
    for name, values in whole(x).items():
        assert seen[name].low == pytest.approx(float(values.min()), abs=1e-5)
        assert seen[name].high == pytest.approx(float(values.max()), abs=1e-5)
    rest = np.delete(x, [3, 9], axis=0)
    assert seen["x"].range("minmax", everything=False) == (rest.min(), rest.max())


def test_one_tensor_at_a_time_sees_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Samples({"x": normal(40, 2, 6, 6)})
    names = ["x", "a", "r", "y"]
    at_once = observe(small(), data, names, batch_size=8, held=frozenset())
    monkeypatch.setattr(calibrate, "FETCH_BYTES", 1)
    in_pieces = observe(small(), data, names, batch_size=8, held=frozenset())
    for name in names:
        assert in_pieces[name].low == pytest.approx(at_once[name].low, abs=1e-6)
        assert in_pieces[name].high == pytest.approx(at_once[name].high, abs=1e-6)


def test_histogram_counts_every_value_and_holds_some_back() -> None:
    data = Samples({"x": normal(30, 2, 6, 6)})
    held = frozenset(range(5))
    seen = observe(small(), data, ["x", "a"], batch_size=8, held=held)
    fill_histograms(small(), data, seen, batch_size=8, held=held)
    assert seen["x"].counts[0].sum() == 5 * 72
    assert seen["x"].counts[1:].sum() == 25 * 72
    expected, _ = np.histogram(data.inputs["x"], bins=BINS, range=(seen["x"].low, seen["x"].high))
    moved = np.abs(np.cumsum(seen["x"].counts.sum(axis=0)) - np.cumsum(expected))
    assert moved.max() <= 2  # float32 rounding at a bin's edge


@given(st.integers(0, 1000), st.sampled_from([1.0, 10.0, 100.0]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_least_error_range_beats_the_extremes_measured_on_the_values(seed: int, outlier: float, relu: bool) -> None:
    values = normal(20000, seed=seed)
    values[0] = outlier * np.abs(values).max()
    if relu:
        values = np.maximum(values, 0)
    seen = Observed()
    seen.extend(values, fold=1)
    seen.count(values, fold=1)

    def error(low: float, high: float) -> float:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255
        zero = np.rint(-128 - low / scale)
        back = (np.clip(np.rint(values / scale) + zero, -128, 127) - zero) * scale
        return float(((back - values) ** 2).mean())

    low, high = seen.range("mse")
    assert seen.low <= low <= 0 <= high <= seen.high or low >= 0
    # 2048 bins cannot see below their own width: outliers of 100 sigma make them coarse
    assert error(low, high) <= error(seen.low, seen.high) * 1.02
    low, high = seen.range("percentile")
    width = (seen.high - seen.low) / BINS
    assert high == pytest.approx(float(np.quantile(values, 1 - 0.5e-4)), abs=2 * width + 0.5)
    assert seen.range("minmax") == (float(values.min()), float(values.max()))
    assert (low == 0) if relu else (low < 0)


def test_nan_names_the_tensor() -> None:
    model = graph(
        [node("Sqrt", ["x"], ["root"], name="sqrt"), node("Gemm", ["root", "w"], ["y"], name="gemm")],
        {"x": ["n", 2]},
        {"y": ["n", 2]},
        {"w": normal(2, 2)},
    )
    with pytest.raises(NonFiniteError, match="'root'"):
        observe(model, Samples({"x": -np.ones((4, 2), np.float32)}), ["root"], batch_size=2, held=frozenset())


def test_nan_in_the_data_names_input_and_samples() -> None:
    x = normal(10, 2, 6, 6)
    x[5, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="'x' of calibration samples 4 to 5"):
        observe(small(), Samples({"x": x}), ["a"], batch_size=2, held=frozenset())


def test_no_samples() -> None:
    with pytest.raises(NoCalibrationDataError):
        observe(small(), Samples({"x": normal(0, 2, 6, 6)}), ["a"], batch_size=2, held=frozenset())


def test_held_back_is_seeded_and_bounded() -> None:
    assert held_back(9, 0) == frozenset()
    assert held_back(200, 0) == held_back(200, 0) != held_back(200, 1)
    assert len(held_back(50, 0)) == 10
    assert len(held_back(10**6, 0)) == 96


def relu(shape: list[int | str]) -> Any:
    return graph([node("Relu", ["x"], ["y"], name="relu")], {"x": shape}, {"y": shape})


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 7), (12, 5, 4, 3), (12, 2, 5, 3, 4)])
@pytest.mark.parametrize("size", [1, 4, 32])
def test_channels_on_any_axis_are_numpys(shape: tuple[int, ...], size: int) -> None:
    x = normal(*shape, seed=1) * np.linspace(0.01, 100, shape[-1], dtype=np.float32)
    for axis in (*range(1, len(shape)), -1):
        found = channel_ranges(relu(["n", *shape[1:]]), Samples({"x": x}), {"x": axis, "y": axis}, size)
        for name, values in (("x", x), ("y", np.maximum(x, 0))):
            flat = np.moveaxis(values, axis, 0).reshape(shape[axis], -1)
            np.testing.assert_array_equal(found[name].low, flat.min(axis=1))
            np.testing.assert_array_equal(found[name].high, flat.max(axis=1))
            np.testing.assert_allclose(found[name].power, np.square(flat.astype(np.float64)).mean(axis=1), rtol=1e-5)


def test_channels_of_a_value_without_samples() -> None:
    """A table that all samples share: it has no batch axis, and its channels may be on the first."""
    table = normal(3, 4, seed=1)
    model = graph(
        [node("Mul", ["one", "table"], ["t"], name="t"), node("MatMul", ["x", "t"], ["y"], name="y")],
        {"x": ["n", 3], "one": [1]},
        {"y": ["n", 4]},
        {"table": table},
    )
    data = Samples({"x": normal(1, 3), "one": np.ones((1,), np.float32)})
    for axis in (0, 1):
        found = channel_ranges(model, data, {"t": axis})["t"]
        np.testing.assert_array_equal(found.low, table.min(axis=1 - axis))
        np.testing.assert_allclose(found.power, np.square(table).mean(axis=1 - axis), rtol=1e-6)


@pytest.mark.parametrize("axis", [1, 2])
def test_squares_of_large_channels_stay_finite(axis: int) -> None:
    x = normal(6, 3, 4, seed=1) * np.float32(1e25)  # squares are beyond float32
    found = channel_ranges(relu(["n", 3, 4]), Samples({"x": x}), {"x": axis})["x"]
    wanted = np.square(x.astype(np.float64)).mean(axis=(0, 3 - axis))
    np.testing.assert_allclose(found.power, wanted, rtol=1e-6)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_channels_that_are_not_finite_name_the_tensor(axis: int, bad: float) -> None:
    weights = {"w": np.array(bad, np.float32)}
    model = graph([node("Mul", ["x", "w"], ["y"], name="mul")], {"x": ["n", 3, 4]}, {"y": ["n", 3, 4]}, weights)
    with pytest.raises(NonFiniteError, match="'y'"):
        channel_ranges(model, Samples({"x": 1 + np.abs(normal(6, 3, 4))}), {"y": axis})


class Generated(Samples):
    """Samples made when they are asked for: no array of all of them exists."""

    def __init__(self, count: int) -> None:
        super().__init__({"x": np.empty((0, 2, 6, 6), np.float32)})
        self.count = count

    @property
    def samples(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[Batch]:
        for i in range(0, self.count, size):
            rows = min(size, self.count - i)
            yield Batch({"x": normal(rows, 2, 6, 6, seed=i)}, None, np.arange(i, i + rows))


def test_memory_does_not_grow_with_the_samples() -> None:
    def peak(count: int) -> int:
        data = Generated(count)
        tracemalloc.start()
        held = held_back(count, 0)
        seen = observe(small(), data, ["x", "a", "r", "y"], batch_size=32, held=held)
        fill_histograms(small(), data, seen, batch_size=32, held=held)
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return top

    peak(100)
    assert peak(10000) <= 1.1 * peak(500)


def test_what_hard_swish_flattens_is_clipped() -> None:
    """It is 0 below -3: a range that goes on to -20 wastes most of its levels."""
    values = np.random.default_rng(0).uniform(-20, 4, (100, 64)).astype(np.float32)
    seen = Observed()
    seen.extend(values, 1)
    seen.count(values, 1)
    seen.through = bounded(ir.node("HardSwish", [ir.Value(name="x")]))
    low, high = seen.range("mse")

    def lost(low: float, high: float) -> float:
        scale = (high - low) / 255
        zero = np.rint(-128 - low / scale)
        got = (np.clip(np.rint(values / scale) + zero, -128, 127) - zero) * scale
        swish = [x * np.clip(x + 3, 0, 6) / 6 for x in (got, values.astype(np.float64))]
        return float(np.square(swish[0] - swish[1]).mean())

    assert -6 < low < -2
    assert lost(low, high) < lost(float(values.min()), float(values.max())) / 4
