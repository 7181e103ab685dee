"""Small networks with channels to take away, and inputs whose channels are mixtures of few signals."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit import model as M
from tests.quantize_graphs import Array, graph, node, normal

F = np.float32


def mixed(*shape: int, seed: int = 0, rank: int = 4, noise: float = 0.1) -> Array:
    """(samples, channels, …): mixtures of `rank` signals, the same for every seed, and some noise."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(7).normal(size=(rank, shape[1]))
    signals = rng.normal(size=(shape[0], *shape[2:], rank))
    x = signals @ basis + noise * rng.normal(size=(shape[0], *shape[2:], shape[1]))
    return np.ascontiguousarray(np.moveaxis(x, -1, 1).astype(F))


def perceptron(hidden: int = 24, seed: int = 1) -> Any:
    """12 -> hidden -> Relu -> hidden -> Relu -> 6."""
    w = {
        "w1": normal(12, hidden, seed=seed, scale=0.4), "b1": normal(hidden, seed=seed + 1, scale=0.3),
        "w2": normal(hidden, hidden, seed=seed + 2, scale=0.3), "b2": normal(hidden, seed=seed + 3, scale=0.3),
        "w3": normal(hidden, 6, seed=seed + 4, scale=0.3), "b3": normal(6, seed=seed + 5),
    }  # fmt: skip
    nodes = [
        node("Gemm", ["x", "w1", "b1"], ["a"], name="first"),
        node("Relu", ["a"], ["p"], name="relu1"),
        node("Gemm", ["p", "w2", "b2"], ["b"], name="second"),
        node("Relu", ["b"], ["q"], name="relu2"),
        node("Gemm", ["q", "w3", "b3"], ["y"], name="last"),
    ]
    return graph(nodes, {"x": ["n", 12]}, {"y": ["n", 6]}, w)


def bottlenecks(stream: int = 16, hidden: int = 32) -> Any:
    """Two inverted residual blocks on a linear stream, as in MobileNetV2: expand, depthwise, project, add; 8x8."""
    w: dict[str, Array] = {"w0": normal(stream, 4, 3, 3, seed=1, scale=0.3), "b0": normal(stream, seed=2, scale=0.1)}
    nodes = [node("Conv", ["x", "w0", "b0"], ["s0"], name="stem", pads=[1, 1, 1, 1])]
    for i in (1, 2):
        w |= {
            f"we{i}": normal(hidden, stream, 1, 1, seed=10 * i, scale=0.3), f"be{i}": normal(hidden, seed=10 * i + 1),
            f"wd{i}": normal(hidden, 1, 3, 3, seed=10 * i + 2, scale=0.3), f"bd{i}": normal(hidden, seed=10 * i + 3),
            f"wp{i}": normal(stream, hidden, 1, 1, seed=10 * i + 4, scale=0.15),
            f"bp{i}": normal(stream, seed=10 * i + 5, scale=0.1),
        }  # fmt: skip
        nodes += [
            node("Conv", [f"s{i - 1}", f"we{i}", f"be{i}"], [f"e{i}"], name=f"expand{i}"),
            node("Clip", [f"e{i}", "zero", "six"], [f"r{i}"], name=f"clip{i}"),
            node("Conv", [f"r{i}", f"wd{i}", f"bd{i}"], [f"d{i}"], name=f"deep{i}", group=hidden, pads=[1, 1, 1, 1]),
            node("Clip", [f"d{i}", "zero", "six"], [f"t{i}"], name=f"clop{i}"),
            node("Conv", [f"t{i}", f"wp{i}", f"bp{i}"], [f"p{i}"], name=f"project{i}"),
            node("Add", [f"s{i - 1}", f"p{i}"], [f"s{i}"], name=f"add{i}"),
        ]
    w |= {"zero": np.array(0, F), "six": np.array(6, F), "wh": normal(10, stream, 1, 1, seed=40, scale=0.4)}
    nodes += [
        node("Conv", ["s2", "wh"], ["h"], name="head"),
        node("GlobalAveragePool", ["h"], ["g"], name="pool"),
        node("Flatten", ["g"], ["y"], name="flat"),
    ]
    return graph(nodes, {"x": ["n", 4, 8, 8]}, {"y": ["n", 10]}, w)


def outputs(model: Any, x: Array, name: str = "y") -> Array:
    return M.FloatSession(model, fetch=[name], threads=1).run({"x": x})[name]


def lost(model: Any, pruned: Any, x: Array) -> float:
    """Squared error of the output over its power."""
    wanted, got = outputs(model, x).astype(np.float64), outputs(pruned, x)
    return float(np.square(got - wanted).sum() / np.square(wanted - wanted.mean(axis=0)).sum())
