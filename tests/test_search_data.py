"""The search on data that are not as they should be: a plan that holds, or one line that says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from edgekit.errors import EdgekitError, NoCalibrationDataError, NonFiniteError
from edgekit.passes.calibrate import held_back
from edgekit.passes.quantize import QuantizeInt8
from tests.quantize_graphs import Array, Batch, Samples, graph, node, normal, sqnr_db
from tests.test_search import FAST, F, X, net, run, sound

# weights reconstructed, nothing smoothed
FASTER = QuantizeInt8(calibration="minmax", smooth="off")


@pytest.mark.parametrize("samples", [1, 2, 4, 9, 10])
def test_few_samples(samples: int) -> None:
    x = X[:samples]
    assert bool(held_back(samples, 0)) is (samples >= 10)
    plan = FAST.plan(net(), Samples({"x": x}))  # type: ignore[arg-type]
    assert plan.samples == samples
    assert sqnr_db(run(net(), x), sound(net(), plan, x)) > 15


DATA = {
    "zeros": np.zeros_like(X),
    "one value": np.full_like(X, 0.5),
    "one sample again and again": np.repeat(X[:1], 40, axis=0),
    "negative": -np.abs(X),
    "tiny": X * F(1e-30),
    "subnormal": X * F(1e-41),
    "large": X * F(1e15),
    "one large sample": np.concatenate([X[:-1], X[-1:] * F(1e6)]),
    "one zero channel": X * np.array([1, 0, 1], F).reshape(3, 1, 1),
    "one sample that is not zero": np.concatenate([np.zeros_like(X[:-1]), X[-1:]]),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_say_little(name: str) -> None:
    x = DATA[name]
    plan = FAST.plan(net(), Samples({"x": x}))  # type: ignore[arg-type]
    got = sound(net(), plan, x)
    if name != "one large sample":  # beside it the others are next to nothing: no range holds both
        assert np.abs(got - run(net(), x)).max() < 0.2  # of probabilities


@pytest.mark.parametrize("size", [1e30, 3e37])
def test_huge_values_work_or_are_told_in_one_line(size: float) -> None:
    x = X * F(size)
    told, plan = "", None
    try:
        plan = FASTER.plan(net(), Samples({"x": x}))  # type: ignore[arg-type]
    except EdgekitError as error:
        told = str(error)
    assert "\n" not in told
    if plan is not None:
        sound(net(), plan, x)


def test_dead_channels() -> None:
    w, b = normal(4, 3, 3, 3, scale=0.4), normal(4, seed=1)
    w[2], b[2] = 0, 0
    v = normal(4, 4, 3, 3, seed=2, scale=0.2)
    v[:, 3] = 0  # the second layer does not read channel 3
    model = net(w=w, b=b, v=v)
    plan = FASTER.plan(model, Samples({"x": X}))  # type: ignore[arg-type]
    assert sqnr_db(run(model, X), sound(model, plan, X)) > 20


def test_a_layer_that_never_wakes() -> None:
    """All that the Relu gives is 0; and its layer's weights, read by nobody alive, are rounded all the same."""
    model = net(c=np.full(4, -1e3, F))
    plan = FASTER.plan(model, Samples({"x": X}))  # type: ignore[arg-type]
    assert sqnr_db(run(model, X), sound(model, plan, X)) > 20
    asleep = net(b=np.full(4, -1e3, F))
    plan = FASTER.plan(asleep, Samples({"x": X}))  # type: ignore[arg-type]
    assert np.abs(sound(asleep, plan, X) - run(asleep, X)).max() < 0.05


def test_weights_of_nothing() -> None:
    for name, array in {"w": np.zeros((4, 3, 3, 3), F), "d": np.zeros((4, 5), F)}.items():
        model = net(**{name: array})
        plan = FASTER.plan(model, Samples({"x": X}))  # type: ignore[arg-type]
        assert np.abs(sound(model, plan, X) - run(model, X)).max() < 0.05


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_data_with_nan_name_input_and_samples(bad: float) -> None:
    x = X.copy()
    x[37, 0, 0, 0] = bad
    with pytest.raises(NonFiniteError, match="input 'x' of calibration samples"):
        FASTER.plan(net(), Samples({"x": x}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("op", "x"), [("Sqrt", -np.abs(X)), ("Log", X), ("Reciprocal", np.zeros_like(X))])
def test_activations_that_are_not_finite_are_told_in_one_line(op: str, x: Array) -> None:
    nodes = [
        node(op, ["x"], ["h"], name="bad"),
        node("Conv", ["h", "w"], ["a"], name="conv"),
        node("Relu", ["a"], ["y"], name="relu"),
    ]
    model = graph(nodes, {"x": ["n", 3, 6, 6]}, {"y": ["n", 4, 4, 4]}, {"w": normal(4, 3, 3, 3)})
    with pytest.raises(NonFiniteError) as caught:
        FASTER.plan(model, Samples({"x": x}))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w", "b", "d"])
def test_weights_with_nan_are_named(name: str) -> None:
    shapes = {"w": (4, 3, 3, 3), "b": (4,), "d": (4, 5)}
    array = normal(*shapes[name])
    array.reshape(-1)[0] = np.nan
    with pytest.raises(NonFiniteError, match=f"'{name}'"):
        FASTER.plan(net(**{name: array}), Samples({"x": X}))  # type: ignore[arg-type]


def test_no_data_and_no_samples() -> None:
    with pytest.raises(NoCalibrationDataError):
        FASTER.plan(net(), None)
    with pytest.raises(NoCalibrationDataError):
        FASTER.plan(net(), Samples({"x": X[:0]}))  # type: ignore[arg-type]


class OneClass(Samples):
    """Every sample is of class 3."""

    def batches(self, size: int) -> Iterator[Batch]:
        for batch in super().batches(size):
            yield Batch(batch.inputs, np.full(len(batch.index), 3), batch.index)


def test_a_data_set_of_one_class() -> None:
    plan = FASTER.plan(net(), OneClass({"x": X}))  # type: ignore[arg-type]
    assert plan.scores[plan.method]["accuracy_drop"] <= 0.25
    sound(net(), plan, X)
