"""Rescaled channels: another set of weights for the same function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit import model as M
from edgekit.errors import ArtifactError
from edgekit.passes.apply_plan import prepared
from edgekit.passes.channels import trace
from edgekit.passes.rescale import rescaled
from tests.quantize_graphs import Array, graph, node, normal, types
from tests.random_graphs import networks

F = np.float32
# float32 through some ten layers, whose terms grow by the factors and may cancel; powers of two round nothing
ROUNDING, EXACT = 1e-5, 1e-7


def run(model: Any, x: Array) -> M.Tensors:
    """Node by node: no fusion of the runtime may make up for, or add to, a difference."""
    return M.FloatSession(model, optimize=False, threads=1).run({"x": x})


def factors_of(model: Any, draw: Any) -> dict[str, tuple[float, ...]]:
    """A factor from `draw(count)` for every channel that may have one; none behind a Clip, which is not homogeneous."""
    found = trace(model)
    if not found.count():
        return {}
    every = np.arange(found.count())
    factors = np.array(draw(found.count()), np.float64)
    bounded = {int(r) for e in found.clips for r in found.roots(e.labels)}
    held = ~found.free(every) | np.isin(found.roots(every), sorted(bounded))
    factors = np.where(held, 1.0, factors)[found.roots(every)]
    return {e.value.name or "": tuple(factors[e.labels].tolist()) for e in found.ends()}


@given(networks(), st.integers(0, 1000), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_factors_change_nothing(network: tuple[Any, Array], seed: int, exact: bool) -> None:
    model, x = network
    model = prepared(model)
    rng = np.random.default_rng(seed)
    factors = factors_of(model, lambda n: 2.0 ** rng.integers(-4, 5, n) if exact else np.exp(rng.uniform(-2.5, 2.5, n)))
    before = M.to_bytes(model)
    other = rescaled(model, factors)
    assert M.to_bytes(model) == before
    wanted, got = run(model, x), run(other, x)
    for name in wanted:
        assert M.difference(wanted[name], got[name]) <= (EXACT if exact else ROUNDING), types(model)


def chain(*nodes: Any, weights: dict[str, Array], channels: int = 4) -> Any:
    """x (n, 3, 5, 5) through a conv to a, through the nodes to z, and through a conv to y (n, 2, ...)."""
    ends = {"w0": normal(4, 3, 3, 3), "b0": normal(4, seed=1), "w1": normal(2, channels, 1, 1, seed=2)}
    made = [
        node("Conv", ["x", "w0", "b0"], ["a"], name="first", pads=[1, 1, 1, 1]),
        *nodes,
        node("Conv", ["z", "w1"], ["y"], name="last"),
    ]
    return prepared(graph(made, {"x": ["n", 3, 5, 5]}, {"y": ["n", 2, "h", "w"]}, {**ends, **weights}))


LAYERS: dict[str, tuple[list[Any], dict[str, Array], int]] = {
    "grouped": ([node("Conv", ["a", "v"], ["z"], group=2)], {"v": normal(6, 2, 1, 1)}, 6),
    "depthwise": ([node("Conv", ["a", "v", "c"], ["z"], group=4)], {"v": normal(8, 1, 3, 3), "c": normal(8)}, 8),
    "transposed": (
        [node("ConvTranspose", ["a", "v", "c"], ["z"], strides=[2, 2])],
        {"v": normal(4, 5, 2, 2), "c": normal(5)},
        5,
    ),
    "shared": ([node("Conv", ["a", "v"], ["h"]), node("Conv", ["h", "v"], ["z"])], {"v": normal(4, 4, 1, 1)}, 4),
    "bound": ([node("Relu", ["a"], ["r"]), node("Min", ["r", "c"], ["z"])], {"c": np.abs(normal(4, 1, 1)) + 0.1}, 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_takes_a_factor_up(name: str) -> None:
    nodes, weights, channels = LAYERS[name]
    model = chain(*nodes, weights=weights, channels=channels)
    rng = np.random.default_rng(0)
    factors = factors_of(model, lambda n: 2.0 ** rng.integers(1, 5, n))
    assert {f for n in ("a", "z") for f in factors[n]} - {1.0}
    x = normal(3, 3, 5, 5, seed=9)
    wanted, got = run(model, x)["y"], run(rescaled(model, factors), x)["y"]
    assert M.difference(wanted, got) <= EXACT


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5)])
@pytest.mark.parametrize("transposed", [0, 1])
def test_a_bias_of_any_shape(shape: tuple[int, ...], transposed: int) -> None:
    model = prepared(
        graph(
            [
                node("Gemm", ["x", "w", "b"], ["h"], name="one", transB=transposed, beta=0.5),
                node("MatMul", ["h", "v"], ["y"], name="two"),
            ],
            {"x": ["n", 3]},
            {"y": ["n", 2]},
            {"w": normal(*((5, 3) if transposed else (3, 5))), "b": normal(*shape), "v": normal(5, 2)},
        )
    )
    x = normal(4, 3, seed=3)
    other = rescaled(model, {"h": (0.5, 2.0, 4.0, 8.0, 16.0)})
    assert M.difference(run(model, x)["y"], run(other, x)["y"]) <= EXACT
    assert M.difference(run(model, x)["y"], run(rescaled(model, {"h": (1.0, 2.0, 1.0, 1.0, 1.0)}), x)["y"]) <= EXACT


def test_a_normalization_takes_a_factor_up() -> None:
    model = prepared(
        graph(
            [
                node("LayerNormalization", ["x", "s", "b"], ["h"], name="norm"),
                node("MatMul", ["h", "v"], ["y"], name="dense"),
            ],
            {"x": ["n", 7, 4]},
            {"y": ["n", 7, 2]},
            {"s": normal(4), "b": normal(4, seed=1), "v": normal(4, 2)},
        )
    )
    x = normal(4, 7, 4, seed=3)
    assert M.difference(run(model, x)["y"], run(rescaled(model, {"h": (0.5, 2.0, 4.0, 8.0)}), x)["y"]) <= EXACT


def test_equal_bounds_behind_a_relu_become_a_clip() -> None:
    nodes, _, _ = LAYERS["bound"]
    bound = np.array([6, 3, 12, 6], F).reshape(4, 1, 1)
    model = chain(*nodes, weights={"c": bound})
    other = rescaled(model, dict.fromkeys(("a", "z"), (1.0, 2.0, 0.5, 1.0)))
    assert types(other) == ["Conv", "Clip", "Conv"]
    x = normal(3, 3, 5, 5, seed=9, scale=3)
    assert M.difference(run(model, x)["y"], run(other, x)["y"]) <= EXACT


def test_a_bound_that_makes_the_value_larger_is_no_clip() -> None:
    model = chain(
        node("GlobalAveragePool", ["a"], ["g"]),
        node("Min", ["g", "c"], ["z"]),
        weights={"c": np.full((1, 4, 3, 3), 0.1, F)},
    )
    x = normal(3, 3, 5, 5, seed=9)
    other = rescaled(model, {})
    assert run(other, x)["y"].shape == (3, 2, 3, 3)
    assert M.difference(run(model, x)["y"], run(other, x)["y"]) == 0


GOOD = (2.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "factors",
    [
        {"nothing": GOOD},
        {"x": (2.0, 1.0, 1.0)},
        {"a": (2.0, 1.0, 1.0), "z": (2.0, 1.0, 1.0)},
        {"a": (0.0, 1.0, 1.0, 1.0), "z": (0.0, 1.0, 1.0, 1.0)},
        {"a": (-1.0, 1.0, 1.0, 1.0), "z": (-1.0, 1.0, 1.0, 1.0)},
        {"a": (np.nan, 1.0, 1.0, 1.0), "z": (np.nan, 1.0, 1.0, 1.0)},
        {"a": (np.inf, 1.0, 1.0, 1.0), "z": (np.inf, 1.0, 1.0, 1.0)},
        {"a": GOOD},  # and the layer that reads it does not know
        {"a": GOOD, "z": (3.0, 1.0, 1.0, 1.0)},
        {"y": (2.0, 1.0)},
    ],
)
def test_factors_that_do_not_fit_are_refused(factors: dict[str, tuple[float, ...]]) -> None:
    model = chain(node("Relu", ["a"], ["z"]), weights={})
    x = normal(3, 3, 5, 5, seed=9)
    assert M.difference(run(model, x)["y"], run(rescaled(model, {"a": GOOD, "z": GOOD}), x)["y"]) <= EXACT
    with pytest.raises(ArtifactError) as caught:
        rescaled(model, factors)
    assert "\n" not in str(caught.value)
