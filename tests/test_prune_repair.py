"""The repair of single layers, against numpy's least squares, and on rows that nothing was fitted to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.passes import regression as L
from edgekit.passes.coupling_trace import trace
from edgekit.passes.prune_channels import prepared_for_pruning
from edgekit.passes.prune_readings import of_nodes, states
from edgekit.passes.prune_repair import repair
from edgekit.passes.prune_solve import Rows, solve
from edgekit.passes.surgery import cut
from tests.prune_nets import bottlenecks, lost, mixed, outputs, perceptron
from tests.quantize_graphs import Array, graph, node, normal


def layer(weight: Array, bias: Array | None) -> L.Layer:
    gemm = graph([node("Gemm", ["x", "w"], ["y"], name="it")], {"x": ["n", len(weight)]},
                 {"y": ["n", weight.shape[1]]}, {"w": weight}).graph[0]  # fmt: skip
    found = L.layer(gemm, weight, bias)
    assert found is not None
    return found


def rows(x: Array, y: Array, held: int) -> Rows:
    return Rows(x[None].astype(np.float32), y[None].astype(np.float32), held)


@pytest.mark.parametrize("biased", [True, False])
def test_many_clean_rows_give_least_squares(biased: bool) -> None:
    x = normal(2000, 7, seed=1) + 3
    y = np.tanh(x @ normal(7, 4, seed=2, scale=0.2)) + 5
    start = layer(normal(7, 4, seed=3), normal(4, seed=4) if biased else None)
    solved = solve(start, rows(x, y, 1600))
    full = np.concatenate([x, np.ones((2000, 1))], axis=1).astype(np.float64) if biased else x.astype(np.float64)
    wanted = np.linalg.lstsq(full, y.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose((start.weight + solved.change)[0], wanted[:7], atol=3e-3)
    if biased:
        assert start.bias is not None
        np.testing.assert_allclose((start.bias + solved.shift)[0], wanted[7], atol=3e-2)


@pytest.mark.parametrize("seed", range(4))
def test_few_noisy_rows_never_make_it_worse_on_the_held(seed: int) -> None:
    x = normal(60, 40, seed=seed)
    weight = normal(40, 3, seed=9)
    y = x @ weight + normal(60, 3, seed=seed + 50, scale=4.0)
    start = layer(weight, None)
    solved = solve(start, rows(x, y, 48))
    assert solved.gain <= 1
    free = np.linalg.lstsq(x[:48], y[:48], rcond=None)[0]
    plain, wild = (float(np.square(x[48:] @ w - y[48:]).mean()) for w in (weight, free))
    assert solved.gain * plain < wild


def test_behind_a_relu_only_what_it_lets_through_counts() -> None:
    x = normal(3000, 6, seed=1)
    right = x @ normal(6, 4, seed=2)
    exact = np.where(right > 0, right, 5 * right - 3)
    start = layer(normal(6, 4, seed=3), np.zeros(4, np.float32))

    def left(bounds: tuple[float, float]) -> float:
        solved = solve(start, rows(x, exact, 2400), bounds)
        got = x @ (start.weight + solved.change)[0] + solved.shift[0]
        return float(np.square(np.maximum(got, 0) - np.maximum(exact, 0)).mean())

    assert left((0.0, np.inf)) < 0.2 * left((-np.inf, np.inf))


def pruned(model: Any, gone: dict[str, list[int]]) -> tuple[Any, Any, Any, Array]:
    model = prepared_for_pruning(model)
    coupling = trace(model)
    families = {f.name: f for f in coupling.families()}
    keep = coupling.without(int(families[name].units[i]) for name, units in gone.items() for i in units)
    return model, cut(model, coupling, keep), coupling, keep


def mended(model: Any, gone: dict[str, list[int]], x: Array) -> tuple[Any, Any, Any, dict[str, float]]:
    """(float model, cut, cut and repaired, gains). x: batches of 32 along axis 0."""
    model, plain, coupling, keep = pruned(model, gone)
    after = cut(model, coupling, keep)
    gains = repair(model, after, coupling, keep, [{"x": x[i : i + 32]} for i in range(0, len(x), 32)])
    return model, plain, after, gains


def test_a_channel_that_others_make_up_is_not_missed() -> None:
    """Hidden channel 5 is 2·h₁ − h₃ + ½ before an activation that is linear where the data lie."""
    x = np.abs(normal(256, 4, seed=1))
    w1, b1 = np.abs(normal(4, 6, seed=2)), np.full(6, 9, np.float32)
    w1[:, 5], b1[5] = 2 * w1[:, 1] - w1[:, 3], 2 * b1[1] - b1[3] + 0.5
    model = graph(
        [
            node("Gemm", ["x", "w1", "b1"], ["a"], name="first"), node("Relu", ["a"], ["p"], name="relu"),
            node("Gemm", ["p", "w2", "b2"], ["y"], name="last"),
        ],
        {"x": ["n", 4]}, {"y": ["n", 3]}, {"w1": w1, "b1": b1, "w2": normal(6, 3, seed=3), "b2": normal(3, seed=4)},
    )  # fmt: skip
    model, plain, after, _ = mended(model, {"first": [5]}, x)
    test = np.abs(normal(100, 4, seed=9))
    assert lost(model, plain, test) > 0.1
    assert lost(model, after, test) < 1e-6


@pytest.mark.parametrize("case", ["perceptron", "bottlenecks"])
def test_repair_brings_the_output_nearer(case: str) -> None:
    model = perceptron() if case == "perceptron" else bottlenecks()
    shape = (12,) if case == "perceptron" else (4, 8, 8)
    gone = {
        "perceptron": {"first": list(range(8)), "second": list(range(8))},
        "bottlenecks": {"expand1": list(range(16)), "expand2": list(range(8)), "stem": [0, 1]},
    }[case]
    model, plain, after, gains = mended(model, gone, mixed(256, *shape))
    test = mixed(128, *shape, seed=5)
    assert lost(model, after, test) < 0.3 * lost(model, plain, test)
    assert all(gain <= 1 for gain in gains.values())


def test_nothing_is_changed_where_nothing_is_missing() -> None:
    _, plain, after, gains = mended(bottlenecks(), {}, mixed(64, 4, 8, 8))
    assert all(gain == 1 for gain in gains.values())
    x = mixed(16, 4, 8, 8, seed=3)
    np.testing.assert_array_equal(outputs(after, x), outputs(plain, x))


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_states_of_a_recurrent_layer_come_nearer(op: str) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    low = np.random.default_rng(3).normal(size=(16, 5)) @ np.random.default_rng(4).normal(size=(5, 6))  # alike units
    w = {
        "w": np.tile(low, (gates, 1))[None].astype(np.float32) * 0.2,
        "r": normal(1, gates * 16, 16, seed=2, scale=0.2), "b": normal(1, gates * 32, seed=5, scale=0.2),
        "wd": normal(16, 4, seed=6), "bd": normal(4, seed=7), "one": np.array([1]),
    }  # fmt: skip
    model = graph(
        [
            node("Transpose", ["x"], ["t"], name="turn", perm=[1, 0, 2]),
            node(op, ["t", "w", "r", "b"], ["", "h"], name="it", hidden_size=16),
            node("Squeeze", ["h", "zero"], ["s"], name="flat"),
            node("Gemm", ["s", "wd", "bd"], ["y"], name="last"),
        ],
        {"x": ["n", 9, 6]}, {"y": ["n", 4]}, {**w, "zero": np.array([0])},
    )  # fmt: skip
    x = normal(256, 9, 6, seed=8)
    model, plain, after, gains = mended(model, {"it": [0, 3, 7, 9, 12, 15]}, x)
    test = normal(128, 9, 6, seed=18)
    assert gains["it"] < 0.8
    assert lost(model, after, test) < 0.6 * lost(model, plain, test)
    left = [i for i in range(16) if i not in (0, 3, 7, 9, 12, 15)]
    steps = test.transpose(1, 0, 2)
    wanted = states(next(n for n in model.graph if n.name == "it"), steps)[..., left]
    errors = [
        float(np.square(states(next(n for n in m.graph if n.name == "it"), steps) - wanted).mean())
        for m in (after, plain)
    ]
    assert errors[0] < errors[1]


def test_a_transposed_convolution_is_fitted() -> None:
    w = {
        "w0": normal(8, 4, 1, 1, seed=1), "b0": normal(8, seed=2),
        "w1": normal(8, 3, 4, 4, seed=3, scale=0.3), "b1": normal(3, seed=4),
    }  # fmt: skip
    model = graph(
        [
            node("Conv", ["x", "w0", "b0"], ["a"], name="make"), node("Tanh", ["a"], ["p"], name="tanh"),
            node("ConvTranspose", ["p", "w1", "b1"], ["y"], name="up", strides=[2, 2], pads=[1, 1, 1, 1]),
        ],
        {"x": ["n", 4, 6, 6]}, {"y": ["n", 3, 12, 12]}, w,
    )  # fmt: skip
    assert len(of_nodes(model, ["up"])) == 1
    model, plain, after, _ = mended(model, {"make": [0, 1]}, mixed(128, 4, 6, 6))
    test = mixed(64, 4, 6, 6, seed=2)
    assert lost(model, after, test) < 0.5 * lost(model, plain, test)
