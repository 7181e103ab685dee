"""The order in which channels go, against refits by numpy of every possible choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.passes.coupling_trace import trace
from edgekit.passes.prune_channels import prepared_for_pruning
from edgekit.passes.prune_grams import Moments, moments
from edgekit.passes.prune_importance import DAMPING, order
from edgekit.passes.prune_readings import of_nodes
from tests.prune_nets import mixed, outputs, perceptron
from tests.quantize_graphs import Array, Samples, graph, node, normal


def refitted(h: Array, weight: Array, left: list[int]) -> tuple[float, Array]:
    """(squared error, weights) of x W by some of x alone. h: xᵀx, damped, of centred x."""
    fitted = np.zeros_like(weight)
    fitted[left] = np.linalg.solve(h[np.ix_(left, left)], h[left] @ weight)
    rest = weight - fitted
    return float(np.einsum("io,ij,jo->", rest, h, rest)), fitted


def damped(x: Array) -> Array:
    h = np.cov(x.T, bias=True)
    return np.asarray(h + DAMPING * np.trace(h) / len(h) * np.eye(len(h)))


def found_for(model: Any, x: Array, names: list[str]) -> dict[str, Moments]:
    return moments(model, of_nodes(model, names), Samples({"x": x}))  # type: ignore[arg-type]


def test_each_step_takes_what_a_refit_misses_least() -> None:
    model, x = prepared_for_pruning(perceptron(10)), mixed(300, 12)
    coupling = trace(model)
    family = next(f for f in coupling.families() if f.name == "first")
    got = order(coupling, family, found_for(model, x, ["second"]), [3, 7])
    hidden = outputs(model, x, "p").astype(np.float64)
    h = damped(hidden)
    weight = of_nodes(model, ["second"])[0].layer.weight[0]
    power = float((weight * (np.cov(hidden.T, bias=True) @ weight)).sum())
    left, gone, errors = list(range(10)), [], [0.0]
    while len(left) > 1:
        tried = [refitted(h, weight, [u for u in left if u != out])[0] for out in left]
        gone.append(left.pop(int(np.argmin(tried))))
        errors.append(min(tried) / power)
    np.testing.assert_array_equal(np.searchsorted(family.units, got.units)[:9], gone)
    np.testing.assert_allclose(got.errors, errors, rtol=1e-6)
    for stop in (3, 7):
        fitted, shift = got.weights[stop]["second:1"]
        _, wanted = refitted(h, weight, [u for u in range(10) if u not in gone[:stop]])
        np.testing.assert_allclose(fitted[0], wanted, atol=1e-6)  # float32 products
        np.testing.assert_allclose(shift[0], hidden.mean(axis=0) @ (weight - wanted), atol=1e-5)


def test_two_layers_that_read_a_family_count_alike_whatever_their_scale() -> None:
    def orders(scale: float) -> Array:
        w = {"w0": normal(12, 8, seed=1), "wa": normal(8, 3, seed=2), "wb": scale * normal(8, 3, seed=3)}
        nodes = [
            node("Gemm", ["x", "w0"], ["h"], name="make"),
            node("Relu", ["h"], ["p"], name="relu"),
            node("Gemm", ["p", "wa"], ["y"], name="a"),
            node("Gemm", ["p", "wb"], ["z"], name="b"),
        ]
        model = prepared_for_pruning(graph(nodes, {"x": ["n", 12]}, {"y": ["n", 3], "z": ["n", 3]}, w))
        coupling = trace(model)
        family = next(f for f in coupling.families() if f.name == "make")
        return order(coupling, family, found_for(model, mixed(200, 12), ["a", "b"]), []).units

    np.testing.assert_array_equal(orders(np.float32(1)), orders(np.float32(64)))


@pytest.mark.parametrize("how", ["magnitude", "activation"])
def test_simple_orders_are_by_norm(how: str) -> None:
    model, x = prepared_for_pruning(perceptron(10)), mixed(300, 12)
    coupling = trace(model)
    family = next(f for f in coupling.families() if f.name == "first")
    got = order(coupling, family, found_for(model, x, ["second"]), [], how)  # type: ignore[arg-type]
    norms = np.square(of_nodes(model, ["second"])[0].layer.weight[0]).sum(axis=1)
    if how == "activation":
        norms = norms * outputs(model, x, "p").astype(np.float64).var(axis=0)
    np.testing.assert_array_equal(np.searchsorted(family.units, got.units), np.argsort(norms))


def test_a_copy_goes_first_and_costs_little() -> None:
    model = perceptron(10)
    weight, bias = (constant(model, name) for name in ("w1", "b1"))
    weight[:, 4], bias[4] = 2 * weight[:, 7], 2 * bias[7]
    model = perceptron_with(model, weight, bias)
    coupling = trace(model)
    family = next(f for f in coupling.families() if f.name == "first")
    got = order(coupling, family, found_for(model, mixed(300, 12, rank=12), ["second"]), [1])
    assert int(np.searchsorted(family.units, got.units[0])) in (4, 7)
    assert got.errors[1] < 0.3 * (got.errors[2] - got.errors[1])  # what damping makes of nothing


def constant(model: Any, name: str) -> Array:
    return np.array(model.graph.initializers[name].const_value.numpy())


def perceptron_with(model: Any, weight: Array, bias: Array) -> Any:
    import onnx_ir as ir

    for name, array in (("w1", weight), ("b1", bias)):
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return prepared_for_pruning(model)
