"""Streams in another basis: nothing changes until directions go, and then as little as a singular value says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.passes.coupling_trace import trace
from edgekit.passes.prune_basis import DAMPING, basis, linear, rewritten
from edgekit.passes.prune_channels import PruneChannels, prepared_for_pruning
from edgekit.passes.prune_grams import moments
from edgekit.passes.prune_readings import of_nodes
from tests import models
from tests.prune_nets import bottlenecks, lost, mixed, outputs, perceptron
from tests.quantize_graphs import Samples, graph, node, normal


def able(model: Any) -> list[str]:
    model = prepared_for_pruning(model)
    coupling = trace(model)
    return [f.name for f in linear(model, coupling, [f for f in coupling.families() if not f.frozen])]


def test_which_streams_are_linear() -> None:
    assert able(bottlenecks()) == ["stem"]
    assert able(perceptron()) == []


CHAINS = {
    "alone": ([], True),
    "moved": ([("Transpose", ["h"], {"perm": [0, 2, 3, 1]}), ("Transpose", [""], {"perm": [0, 3, 1, 2]})], True),
    "averaged": ([("AveragePool", ["h"], {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]})], True),
    "largest": ([("MaxPool", ["h"], {"kernel_shape": [2, 2]})], False),
    "scaled": ([("Mul", ["h", "each"], {})], False),
    "shifted by one number": ([("Add", ["h", "one"], {})], False),
    "shifted by channel": ([("Add", ["h", "each"], {})], False),
    "squared": ([("Mul", ["h", "h"], {})], False),
    "doubled": ([("Add", ["h", "h"], {})], True),
    "depthwise": ([("Conv", ["h", "deep"], {"group": 8})], False),
    "activated": ([("Relu", ["h"], {})], False),
    "normalized": ([("LpNormalization", ["h"], {"axis": 1})], False),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_what_may_stand_on_a_linear_stream(kind: str) -> None:
    chain, expected = CHAINS[kind]
    nodes, at = [node("Conv", ["x", "w0", "b0"], ["h"], name="make")], "h"
    for i, (op, given, attributes) in enumerate(chain):
        nodes.append(node(op, [v or at for v in given], [f"v{i}"], name=f"n{i}", **attributes))
        at = f"v{i}"
    nodes += [node("Conv", [at, "w1"], ["z"], name="read"), node("GlobalAveragePool", ["z"], ["y"], name="pool")]
    w = {
        "w0": normal(8, 4, 1, 1), "b0": normal(8), "w1": normal(5, 8, 1, 1), "deep": normal(8, 1, 1, 1),
        "each": normal(8, 1, 1), "one": normal(1),
    }  # fmt: skip
    model = graph(nodes, {"x": ["n", 4, 4, 4]}, {"y": ["n", 5, 1, 1]}, w)
    assert ("make" in able(model)) is expected


@pytest.mark.parametrize("make", [bottlenecks, models.mobile_nhwc, models.cnn_nchw])
def test_a_new_basis_changes_nothing(make: Any) -> None:
    model = prepared_for_pruning(make())
    coupling = trace(model)
    families = linear(model, coupling, [f for f in coupling.families() if not f.frozen])
    rng = np.random.default_rng(0)
    transforms = {f.name: (f, rng.normal(size=(len(f.units),) * 2) + 3 * np.eye(len(f.units))) for f in families}
    name = model.graph.inputs[0].name
    shape = [d if isinstance(d, int) else 3 for d in model.graph.inputs[0].shape]
    x = normal(*shape, seed=3)

    def run(m: Any) -> Any:
        from edgekit import model as M

        session = M.FloatSession(m, threads=1)
        return session.run({name: x})[session.names[0]]

    wanted = run(model)
    np.testing.assert_allclose(run(rewritten(model, coupling, transforms)), wanted, atol=1e-4 * np.abs(wanted).max())


def test_the_first_directions_lose_what_the_singular_values_say() -> None:
    w = {"w0": normal(9, 6, seed=1), "b0": normal(9, seed=2), "w1": normal(9, 4, seed=3), "b1": normal(4, seed=4)}
    nodes = [node("Gemm", ["x", "w0", "b0"], ["h"], name="make"), node("Gemm", ["h", "w1", "b1"], ["y"], name="read")]
    w["w0"], x = normal(6, 9, seed=1), normal(500, 6, seed=5)
    model = prepared_for_pruning(graph(nodes, {"x": ["n", 6]}, {"y": ["n", 4]}, w))
    coupling = trace(model)
    family = coupling.families()[0]
    found = moments(model, of_nodes(model, ["read"]), Samples({"x": x}))  # type: ignore[arg-type]
    transform = basis(coupling, family, found)
    assert transform is not None
    hidden = outputs(model, x, "h").astype(np.float64)
    hidden -= hidden.mean(axis=0)
    singular = np.linalg.svd(hidden @ w["w1"], compute_uv=False)
    back = np.linalg.inv(transform)
    for kept in (1, 2, 3):
        got = hidden @ transform[:kept].T @ back[:, :kept].T @ w["w1"]
        error = np.square(got - hidden @ w["w1"]).sum()
        assert error <= np.square(singular[kept:]).sum() + 20 * DAMPING * np.square(singular).sum()


def test_a_stream_of_low_rank_is_cut_to_it() -> None:
    """A stream of 16 channels that are all mixtures of 4: cutting 12 directions costs next to nothing."""
    model = bottlenecks()
    rank = normal(16, 4, seed=30)
    for name in ("w0", "wp1", "wp2"):
        array = model.graph.initializers[name].const_value.numpy()
        flat = array.reshape(16, -1)
        replace(model, name, (rank @ (np.linalg.pinv(rank) @ flat)).reshape(array.shape))
    for name in ("b0", "bp1", "bp2"):
        replace(model, name, rank @ (np.linalg.pinv(rank) @ model.graph.initializers[name].const_value.numpy()))
    x, test = mixed(128, 4, 8, 8), mixed(64, 4, 8, 8, seed=9)
    families = trace(prepared_for_pruning(model)).families()
    step = PruneChannels(0.6, keep=tuple(f.name for f in families if f.name != "stem"))
    data = Samples({"x": x})
    plan = step.plan(model, data, data)  # type: ignore[arg-type]
    assert {f.name: f.keep for f in plan.families}["stem"] <= 8
    pruned, _ = step.apply(model, plan, data)  # type: ignore[arg-type]
    assert lost(model, pruned, test) < 1e-4


def replace(model: Any, name: str, array: Any) -> None:
    import onnx_ir as ir

    model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)
