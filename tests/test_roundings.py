"""Roundings that no reader needs: which are found, and what is left of the model without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from edgekit import model as M
from edgekit.passes.apply_plan import apply_plan, prepared
from edgekit.passes.quantize import QuantizeInt8
from edgekit.passes.roundings import PRODUCTS, idle, leave_out, small_tail
from edgekit.scheme import BOUNDS
from tests.quantize_graphs import Array, Samples, graph, node, normal, types
from tests.random_graphs import networks

F = np.float32
PLAIN = QuantizeInt8(calibration="minmax", rounding="nearest", bias_correction="off", smooth="off")
ALL = PRODUCTS | {"Conv"}


def written(nodes: list[Any], x: Array, outputs: dict[str, Any], weights: dict[str, Array]) -> Any:
    model = graph(nodes, {"x": ["n", *x.shape[1:]]}, outputs, weights)
    return PLAIN(model, Samples({"x": x}))  # type: ignore[arg-type]


def run(model: Any, x: Array, fetch: list[str] | None = None) -> M.Tensors:
    return M.FloatSession(model, fetch=fetch or [], optimize=False, threads=1).run({"x": x})


def sources(model: Any, names: list[str]) -> set[str]:
    """Nodes whose results these quantized tensors hold."""
    made = {n.outputs[0].name: n for n in model.graph}
    return {made[n].inputs[0].producer().name for n in names}


X = normal(24, 12, seed=9)
DENSE = {"w": normal(12, 8), "b": normal(8), "v": normal(8, 5)}


def test_the_last_product_is_not_rounded() -> None:
    nodes = [
        node("Gemm", ["x", "w", "b"], ["h"], name="one"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("Gemm", ["r", "v"], ["y"], name="two"),
    ]
    model = written(nodes, X, {"y": ["n", 5]}, DENSE)
    names = idle(model, PRODUCTS)
    assert sources(model, names) == {"two"}
    other = leave_out(model, names)
    assert types(other).count("QuantizeLinear") == types(model).count("QuantizeLinear") - 1
    made = {o.name: n for n in other.graph for o in n.outputs}
    assert made["y"].op_type == "Gemm"
    exact = run(other, X)["y"]
    step = float(M.constant(model.graph.initializers["y_scale"]))  # type: ignore[arg-type]
    assert np.abs(run(model, X)["y"] - exact).max() <= 0.51 * step + 1e-6
    assert len(np.unique(exact)) > 100


def test_nothing_is_idle_where_integers_are_read() -> None:
    nodes = [node("Gemm", ["x", "w"], ["h"], name="one"), node("Gemm", ["h", "v"], ["g"], name="two"),
             node("MatMul", ["g", "u"], ["y"], name="three")]  # fmt: skip
    model = written(nodes, X, {"y": ["n", 3]}, {**DENSE, "u": normal(5, 3)})
    assert sources(model, idle(model, PRODUCTS)) == {"three"}


@pytest.mark.parametrize("op", ["Softmax", "Sigmoid", "Tanh", "Relu"])
def test_cheap_operators_at_the_end_stay_float_too(op: str) -> None:
    nodes = [
        node("Gemm", ["x", "w"], ["h"], name="one"),
        node("Gemm", ["h", "v"], ["g"], name="two"),
        node(op, ["g"], ["y"], name="end"),
    ]
    model = written(nodes, X, {"y": ["n", 5]}, DENSE)
    other = leave_out(model, idle(model, PRODUCTS))
    wanted, got = run(model, X)["y"], run(other, X)["y"]
    assert np.abs(wanted - got).max() <= 0.15 * np.abs(wanted).max()  # logits in steps of 1/255
    made = {o.name: n.op_type for n in other.graph for o in n.outputs}
    assert made["y"] in (op, "Clip")
    assert len(np.unique(got)) > len(np.unique(wanted))


def test_a_relu_that_saturation_stood_for_comes_back() -> None:
    """The last layer's Relu6 was removed, for its int8 range ends there; without rounding nothing would bound it."""
    nodes = [
        node("Gemm", ["x", "w"], ["h"], name="one"),
        node("Gemm", ["h", "v"], ["g"], name="two"),
        node("Clip", ["g", "lo", "hi"], ["y"], name="relu6"),
    ]
    weights = {**DENSE, "lo": np.array(0, F), "hi": np.array(6, F)}
    model = written(nodes, X, {"y": ["n", 5]}, weights)
    assert "Clip" not in types(model)
    other = leave_out(model, idle(model, PRODUCTS))
    assert types(other).count("Clip") == 1
    got = run(other, X)["y"]
    assert got.min() == 0
    assert got.max() == 6
    assert all(BOUNDS not in n.metadata_props for n in other.graph)
    assert any(BOUNDS in n.metadata_props for n in model.graph)  # the model itself is as it was


def test_a_value_read_by_integers_as_well_is_rounded() -> None:
    nodes = [
        node("Gemm", ["x", "w"], ["h"], name="one"),
        node("Gemm", ["h", "v"], ["y"], name="two"),
        node("Gemm", ["y", "u"], ["z"], name="three"),
    ]
    model = written(nodes, X, {"y": ["n", 5], "z": ["n", 4]}, {**DENSE, "u": normal(5, 4)})
    assert sources(model, idle(model, PRODUCTS)) == {"three"}


def test_only_kernels_that_can_give_float() -> None:
    x = normal(12, 3, 6, 6)
    nodes = [node("Conv", ["x", "w"], ["h"], name="one"), node("Conv", ["h", "v"], ["y"], name="two")]
    weights = {"w": normal(4, 3, 3, 3), "v": normal(2, 4, 1, 1)}
    model = written(nodes, x, {"y": ["n", 2, 4, 4]}, weights)
    assert idle(model, PRODUCTS) == []
    assert sources(model, idle(model, ALL)) == {"two"}


def test_small_tails_only() -> None:
    """The last product holds 40 of 136 weights."""
    nodes = [node("Gemm", ["x", "w", "b"], ["h"], name="one"), node("Gemm", ["h", "v"], ["y"], name="two")]
    model = written(nodes, X, {"y": ["n", 5]}, DENSE)
    assert sources(model, small_tail(model, 0.5)) == {"two"}
    assert small_tail(model, 0.1) == []


def test_leaving_nothing_out_changes_nothing() -> None:
    nodes = [node("Gemm", ["x", "w", "b"], ["h"], name="one"), node("Gemm", ["h", "v"], ["y"], name="two")]
    model = written(nodes, X, {"y": ["n", 5]}, DENSE)
    assert M.to_bytes(leave_out(model, [])) == M.to_bytes(M.clone(model))


def remade(model: Any, x: Array) -> list[tuple[float, float]]:
    """Of each output, for both sets of kernels: the squared errors over its power, with all roundings and without."""
    model = prepared(model)
    exact = run(model, x)
    if not all(np.isfinite(v).all() for v in exact.values()):
        return []
    rounded = apply_plan(model, PLAIN.plan(model, Samples({"x": x})))  # type: ignore[arg-type]
    before, errors = M.to_bytes(rounded), []
    for producers in (PRODUCTS, ALL):
        names = idle(rounded, producers)
        other = leave_out(rounded, names)
        assert M.to_bytes(rounded) == before
        left = {n.outputs[0].name for n in other.graph if n.op_type == "QuantizeLinear"}
        assert left == {n.outputs[0].name for n in rounded.graph if n.op_type == "QuantizeLinear"} - set(names)
        assert [(s.name, s.dtype, len(s.shape)) for s in M.signature(other).outputs] == [
            (s.name, s.dtype, len(s.shape)) for s in M.signature(rounded).outputs
        ]
        plain, got = run(rounded, x), run(other, x)
        for name, value in exact.items() if names else ():
            if value.any():
                errors.append((_share(plain[name] - value, value), _share(got[name] - value, value)))
    return errors


def _share(error: Array, value: Array) -> float:
    return float(np.square(error, dtype=np.float64).sum() / np.square(value, dtype=np.float64).sum())


def test_random_graphs_without_them() -> None:
    """Names and shapes stay in each graph; what comes out is nearer to the float model in the mean over many.

    Not in each: two errors may cancel by chance in the few values of an output. The graphs are always the same ones.
    """
    errors: list[tuple[float, float]] = []

    @given(networks(7))
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    def each(network: tuple[Any, Array]) -> None:
        errors.extend(remade(*network))

    each()
    plain, got = np.array(errors).T
    assert len(plain) > 50
    assert got.mean() < plain.mean()
    # of most graphs, not of the worst alone; in outputs that int8 holds to 60 dB nothing is left to gain
    assert np.log(got + 1e-6).mean() < np.log(plain + 1e-6).mean()
