"""The walk through a float model and its quantized form: the values of whole runs, and no more of them than needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgekit import model as M
from edgekit.passes.apply_plan import apply_plan, prepared
from edgekit.passes.lockstep import live_bytes, walk
from edgekit.passes.plan import QuantizationPlan
from edgekit.passes.quantize import QuantizeInt8
from tests.quantize_graphs import Array, Samples, graph, node, normal
from tests.random_graphs import networks

PLAIN = QuantizeInt8(calibration="minmax", rounding="nearest", bias_correction="off", smooth="off")

# one node alone may be summed in another order than in its model; in the quantized form that may flip an integer, and
# that others behind it, where wrong wiring gives another value altogether
ROUNDING, FLIPPED = 1e-5, 0.05


def planned(model: Any, x: Array) -> tuple[Any, Any, QuantizationPlan]:
    """(prepared, its QDQ form, the plan)."""
    model = prepared(model)
    plan = PLAIN.plan(model, Samples({"x": x}))  # type: ignore[arg-type]
    return model, apply_plan(model, plan), plan


def everything(model: Any, inputs: dict[str, Array]) -> M.Tensors:
    """Every value of one run of the whole model."""
    names = [v.name for n in model.graph for v in n.outputs if v.name]
    return {**inputs, **M.FloatSession(model, fetch=names, optimize=False, threads=1).run(inputs)}


@given(networks(6), st.sampled_from([None, 2, 3]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_values_are_those_of_whole_runs(network: tuple[Any, Array], step: int | None) -> None:
    """At every node, or at each second or third only."""
    model, x = network
    model = prepared(model)
    if not all(np.isfinite(v).all() for v in everything(model, {"x": x}).values()):
        return
    model, written, _ = planned(model, x)
    batches = [{"x": x[:2]}, {"x": x[2:]}]
    exact, other = ([everything(m, b) for b in batches] for m in (model, written))
    names = {n.name for n in written.graph}
    met = []
    stops = None if step is None else {n.name for n in list(model.graph)[::step]}
    for meeting in walk(model, written, batches, stops):
        assert meeting.node.name == meeting.twin.name
        met.append(meeting.node.name)
        for held, wanted, bound in ((meeting.exact, exact, ROUNDING), (meeting.written, other, FLIPPED)):
            for name, parts in held.items():
                for part, whole in zip(parts, wanted, strict=True):
                    assert part.dtype == whole[name].dtype
                    assert M.difference(whole[name].astype(np.float64), part.astype(np.float64)) <= bound
        assert {v.name for v in meeting.node.outputs} <= set(meeting.exact)
        read = {v.name for v in meeting.twin.inputs if v is not None and M.constant(v) is None}
        assert read <= set(meeting.written)
    assert met == [n.name for n in model.graph if n.name in names and (stops is None or n.name in stops)]


def deep(layers: int, width: int = 64) -> Any:
    nodes = [
        node("Gemm", [f"h{i}" if i else "x", "w"], [f"h{i + 1}" if i < layers - 1 else "y"], name=f"g{i}")
        for i in range(layers)
    ]
    return graph(nodes, {"x": ["n", width]}, {"y": ["n", width]}, {"w": normal(width, width, scale=0.1)})


def test_memory_is_that_of_what_is_still_read() -> None:
    """A chain needs two values of each model at a time, however long it is."""
    x = normal(16, 64)
    for layers in (4, 20):
        model, written, _ = planned(deep(layers), x)
        sizes = [
            sum(v.nbytes for held in (m.exact, m.written) for parts in held.values() for v in parts if v.ndim == 2)
            for m in walk(model, written, [{"x": x}])
        ]
        value, weight = x.nbytes, 64 * 64 * 4
        # float: what a node reads and makes; written: what it reads, and its weight
        assert max(sizes[1:]) <= 3 * value + weight


def test_a_result_that_nobody_reads_is_forgotten() -> None:
    nodes = [
        node("TopK", ["x", "k"], ["v", "i"], name="top"),
        node("Relu", ["v"], ["r"], name="relu"),
        node("Gemm", ["r", "w"], ["h"], name="dense"),
        node("Gemm", ["h", "w"], ["y"], name="last"),
    ]
    model = graph(nodes, {"x": ["n", 8]}, {"y": ["n", 4]}, {"k": np.array([4]), "w": normal(4, 4)})
    x = normal(12, 8)
    model, written, _ = planned(model, x)
    for meeting in walk(model, written, [{"x": x}]):
        if meeting.node.name in ("dense", "last"):
            assert "i" not in meeting.exact
            assert "i" not in meeting.written


def test_a_shortcut_is_kept_until_it_is_read() -> None:
    nodes = [
        node("Gemm", ["x", "w"], ["a"], name="one"),
        node("Gemm", ["a", "w"], ["b"], name="two"),
        node("Gemm", ["b", "w"], ["c"], name="three"),
        node("Add", ["a", "c"], ["s"], name="add"),
        node("Gemm", ["s", "w"], ["y"], name="last"),
    ]
    x = normal(12, 4)
    model, written, _ = planned(graph(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, {"w": normal(4, 4)}), x)
    held = {m.node.name: set(m.exact) for m in walk(model, written, [{"x": x}])}
    assert "a" in held["three"]
    assert "a" in held["add"]
    assert "a" not in held["last"]
    assert "x" not in held["two"]


def test_what_is_replaced_is_what_later_nodes_read() -> None:
    nodes = [
        node("Gemm", ["x", "w", "b"], ["h"], name="one"),
        node("Gemm", ["h", "v"], ["y"], name="two"),
    ]
    weights = {"w": normal(4, 5), "b": normal(5), "v": normal(5, 3)}
    x = normal(12, 4)
    model, written, _ = planned(graph(nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, weights), x)
    zero = np.zeros((4, 5), np.float32)
    for meeting in walk(model, written, [{"x": x[:6]}, {"x": x[6:]}]):
        if meeting.node.name == "one":
            name = meeting.twin.inputs[1].name
            meeting.written[name] = [zero, zero]
        else:
            for part in meeting.written[meeting.twin.inputs[0].name]:
                assert (part == part[:1]).all()  # of the bias alone
            assert not (meeting.exact["h"][0] == meeting.exact["h"][0][:1]).all()


@pytest.mark.parametrize("stops", [None, {"one", "three"}])
def test_the_twin_runs_with_the_weights_it_has_after_the_meeting(stops: set[str] | None) -> None:
    """Whoever repairs a model in place writes into it what later nodes shall see."""
    nodes = [
        node("Gemm", ["x", "w"], ["a"], name="one"),
        node("Relu", ["a"], ["r"], name="two"),
        node("Gemm", ["r", "v"], ["y"], name="three"),
    ]
    x = normal(12, 4)
    model = prepared(graph(nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, {"w": normal(4, 5), "v": normal(5, 3)}))
    other = M.clone(model)
    for meeting in walk(model, other, [{"x": x[:6]}, {"x": x[6:]}], stops):
        if meeting.node.name == "one":
            meeting.twin.inputs[1].const_value = ir.tensor(np.full((4, 5), 2, np.float32))
        elif meeting.node.name == "three":
            for part, given in zip(meeting.written["r"], (x[:6], x[6:]), strict=True):
                wanted = np.maximum(given.sum(axis=1, keepdims=True) * 2, 0)
                np.testing.assert_allclose(part, np.tile(wanted, 5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["If", "Loop"])
def test_inner_graphs_read_from_outside(op: str) -> None:
    info = helper.make_tensor_value_info
    made = helper.make_node("Mul", ["h", "two"], ["inner"])
    body = [info("inner", TensorProto.FLOAT, None)]
    if op == "If":
        inner = helper.make_graph([made], "body", [], body)
        call = node("If", ["yes"], ["z"], name="call", then_branch=inner, else_branch=inner)
    else:
        inner = helper.make_graph(
            [helper.make_node("Mul", ["c", "two"], ["t"]), helper.make_node("Add", ["t", "h"], ["inner"]),
             helper.make_node("Identity", ["go"], ["on"])],
            "body",
            [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("c", TensorProto.FLOAT, None)],
            [info("on", TensorProto.BOOL, []), *body],
        )  # fmt: skip
        call = node("Loop", ["three", "yes", "h"], ["z"], name="call", body=inner)
    nodes = [node("Gemm", ["x", "w"], ["h"], name="one"), call, node("Gemm", ["z", "w"], ["y"], name="two")]
    weights = {"w": normal(4, 4), "two": np.array(2, np.float32), "yes": np.array(True), "three": np.array(3)}
    x = normal(12, 4)
    model, written, _ = planned(graph(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, weights), x)
    wanted = everything(model, {"x": x})
    met = []
    for meeting in walk(model, written, [{"x": x}]):
        met.append(meeting.node.name)
        for name, (part,) in meeting.exact.items():
            np.testing.assert_array_equal(part, wanted[name])
    assert met == ["one", "call", "two"]


def test_live_bytes_are_the_most_at_once() -> None:
    x = normal(16, 64)
    one = 16 * 64 * 4
    assert live_bytes(prepared(deep(4)), {"x": x}) == 2 * one
    assert live_bytes(prepared(deep(12)), {"x": x}) == 2 * one
    nodes = [
        node("Relu", ["x"], ["a"], name="a"),
        node("Relu", ["a"], ["b"], name="b"),
        node("Concat", ["x", "a", "b"], ["y"], name="c", axis=1),
    ]
    model = prepared(graph(nodes, {"x": ["n", 64]}, {"y": ["n", 192]}))
    assert live_bytes(model, {"x": x}) == 6 * one
