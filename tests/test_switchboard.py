"""Roundings one at a time: all off is the float model, all on is the quantized one, and one on is that one alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit import model as M
from edgekit.passes.apply_plan import apply_plan, folded, prepared, quantize, quantize_weight
from edgekit.passes.fold import Fold
from edgekit.passes.plan import QuantizationPlan
from edgekit.passes.quantize import QuantizeInt8
from edgekit.passes.roundings import PRODUCTS, idle, leave_out
from edgekit.passes.switchboard import Switchboard
from tests.models import MODELS
from tests.quantize_graphs import Array, Samples, graph, node, normal
from tests.random_graphs import networks

F = np.float32
ROUNDING = 1e-6  # the same float operators, perhaps another memory layout
FLIPPED = 0.02  # of the range: a float32 tie may round the other way, and one int8 step is 0.004 of it


def float_run(model: Any, inputs: dict[str, Array]) -> M.Tensors:
    return M.FloatSession(model, optimize=False, threads=1).run(inputs)


def quantized_run(model: Any, plan: QuantizationPlan, inputs: dict[str, Array]) -> M.Tensors:
    """The plan as the judge runs it: with roundings left out that no kernel does."""
    written = apply_plan(model, plan)
    return float_run(leave_out(written, idle(written, PRODUCTS)), inputs)


def board_of(model: Any, plan: QuantizationPlan) -> Switchboard:
    return Switchboard(model, plan, [v.name or "" for v in model.graph.outputs])


def check_ends(model: Any, plan: QuantizationPlan, inputs: dict[str, Array]) -> None:
    board = board_of(model, plan)
    nothing, everything = board.run(inputs, []), board.run(inputs, set(board.parts))
    wanted, got = float_run(model, inputs), quantized_run(model, plan, inputs)
    for name in wanted:
        # factors, if there are any, round each product once
        assert M.difference(wanted[name], nothing[name]) <= (1e-5 if plan.factors else ROUNDING)
        assert everything[name].shape == got[name].shape
        scale = max(float(np.abs(got[name]).max()), 1e-30)
        assert float(np.abs(everything[name] - got[name]).max()) <= FLIPPED * scale
        # a tie that flips early moves several values of a small output: one int8 step on the mean
        assert float(np.abs(everything[name] - got[name]).mean()) <= 4e-3 * scale


@pytest.mark.parametrize(("bits", "rounding"), [(8, "reconstruct"), (7, "nearest")])
@pytest.mark.parametrize("name", MODELS)
def test_ends_on_every_kind_of_model(name: str, bits: Any, rounding: Any) -> None:
    model = prepared(Fold()(MODELS[name](), None))
    rng = np.random.default_rng(0)
    sizes = {s.name: s.concrete(2) for s in M.signature(model).inputs}
    inputs = {k: rng.normal(size=v).astype(F) for k, v in sizes.items()}
    many = {k: rng.normal(size=(24, *v[1:])).astype(F) for k, v in sizes.items()}
    step = QuantizeInt8(weight_bits=bits, calibration="minmax", rounding=rounding)
    check_ends(model, step.plan(model, Samples(many)), inputs)  # type: ignore[arg-type]


@given(networks(6), st.sampled_from(["off", "on"]))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_ends_on_random_graphs(network: tuple[Any, Array], smooth: Any) -> None:
    model, x = network
    model = prepared(model)
    if not all(np.isfinite(v).all() for v in float_run(model, {"x": x}).values()):
        return
    step = QuantizeInt8(calibration="minmax", rounding="nearest", bias_correction="off", smooth=smooth)
    check_ends(model, step.plan(model, Samples({"x": x})), {"x": x})  # type: ignore[arg-type]


# --- one alone -------------------------------------------------------------------------------------------
def net() -> Any:
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["r"], name="relu"),
        node("MaxPool", ["r"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "v"], ["c"], name="point"),
        node("Add", ["c", "p"], ["s"], name="add"),
        node("GlobalAveragePool", ["s"], ["g"], name="mean"),
        node("Flatten", ["g"], ["f"], name="flat"),
        node("Gemm", ["f", "d", "e"], ["y"], name="dense"),
    ]
    weights = {"w": normal(4, 3, 3, 3), "b": normal(4), "v": normal(4, 4, 1, 1), "d": normal(4, 5), "e": normal(5)}
    return prepared(graph(nodes, {"x": ["n", 3, 6, 6]}, {"y": ["n", 5]}, weights))


X = normal(8, 3, 6, 6, seed=4)


def plan_of(model: Any) -> QuantizationPlan:
    step = QuantizeInt8(calibration="minmax", rounding="nearest", bias_correction="off", smooth="off")
    return step.plan(model, Samples({"x": normal(32, 3, 6, 6, seed=3)}))  # type: ignore[arg-type]


def by_hand(model: Any, plan: QuantizationPlan, part: tuple[str, str]) -> Array:
    """The float model with one rounding done in numpy: of a node's weights, or of what it gives to the next node."""
    model = prepared(model)
    unit, kind = part
    nodes = {n.name: n for n in model.graph}
    if kind == "weight":
        array, bias = folded(nodes[unit])
        how = plan.weights[unit]
        scales = np.array(how.scales, F).reshape([-1 if a == how.axis else 1 for a in range(array.ndim)])
        initializers = model.graph.initializers
        initializers[nodes[unit].inputs[1].name].const_value = _tensor(quantize_weight(array, how) * scales)
        if bias is not None:
            products = F(plan.activations[nodes[unit].inputs[0].name].scale) * np.array(how.scales, F)
            value = (np.rint(bias / products.astype(np.float64)) * products).astype(F)
            initializers[nodes[unit].inputs[2].name].const_value = _tensor(value)
        return float_run(model, {"x": X})["y"]
    # the value that carries the rounding: behind a fused Relu
    behind = {"conv": "r", "x": "x", "point": "c", "add": "s", "mean": "g", "flat": "f"}[unit]
    how = plan.activations[behind]
    names = [v.name for n in model.graph for v in n.outputs]
    values = {"x": X, **M.FloatSession(model, fetch=names, optimize=False).run({"x": X})}
    given = ((quantize(values[behind], how).astype(F) - how.zero_point) * F(how.scale)).astype(F)
    proto = M.to_proto(model)
    kept, known = [], {behind}
    for one in proto.graph.node:  # what follows the value, fed with it rounded
        if any(i in known for i in one.input):
            kept.append(one)
            known.update(one.output)
    fed = {i for one in kept for i in one.input} & set(values) - (known - {behind})
    sub = graph(
        kept,
        {n: values[n].shape for n in sorted(fed)},
        {"y": [8, 5]},
        {i: M.constant(v) for i, v in model.graph.initializers.items() if any(i in k.input for k in kept)},  # type: ignore[misc]
    )
    return float_run(sub, {**{n: values[n] for n in fed}, behind: given})["y"]


def _tensor(array: Array) -> Any:
    return ir.tensor(np.asarray(array, F, order="C"))


PARTS = [
    ("x", "activation"), ("conv", "activation"), ("point", "activation"), ("add", "activation"), ("mean", "activation"),
    ("conv", "weight"), ("point", "weight"), ("dense", "weight"),
]  # fmt: skip


def test_the_parts_are_every_rounding_of_the_plan() -> None:
    """A pool and a Flatten hand integers on; the logits of a last product are not rounded."""
    model = net()
    board = board_of(model, plan_of(model))
    assert set(board.parts) == set(PARTS)
    assert set(board.units) == {"x", "conv", "point", "add", "mean", "dense"}


@pytest.mark.parametrize("part", PARTS)
def test_one_part_alone_is_that_rounding_alone(part: tuple[str, str]) -> None:
    model = net()
    plan = plan_of(model)
    got = board_of(model, plan).run({"x": X}, [part])["y"]
    wanted, exact = by_hand(model, plan, part), float_run(model, {"x": X})["y"]
    moved = float(np.abs(wanted - exact).max())
    assert moved > 0
    assert float(np.abs(got - wanted).max()) <= 0.02 * moved + 1e-6 * float(np.abs(exact).max())


def test_errors_of_single_parts_add_up_to_the_whole() -> None:
    """To the first order, which int8 is near: the sum of what each alone does is what all do together."""
    model = net()
    board = board_of(model, plan_of(model))
    exact = board.run({"x": X}, [])["y"]
    alone = sum(board.run({"x": X}, [part])["y"] - exact for part in board.parts)
    together = board.run({"x": X}, board.parts)["y"] - exact
    assert float(np.abs(alone - together).max()) <= 0.25 * float(np.abs(together).max())


def test_reconstructed_integers_and_shifted_biases_count_as_the_weights() -> None:
    model = net()
    plan = plan_of(model)
    weight = plan.weights["point"]
    array, _ = folded(next(n for n in model.graph if n.name == "point"))
    other = np.clip(quantize_weight(array, weight).astype(int) + 1, -127, 127).astype(np.int8)
    changed = replace(
        plan,
        weights={**plan.weights, "point": replace(weight, integers=other.tobytes())},
        bias_shifts={"dense": (1.0, 0.0, 0.0, 0.0, 0.0)},
    )
    before, after = board_of(model, plan), board_of(model, changed)
    assert before.parts.keys() == after.parts.keys()
    exact = before.run({"x": X}, [])["y"]
    np.testing.assert_array_equal(after.run({"x": X}, [])["y"], exact)
    np.testing.assert_allclose(
        (after.run({"x": X}, [("dense", "weight")])["y"] - before.run({"x": X}, [("dense", "weight")])["y"])[:, 0],
        1.0,
        atol=0.01,
    )
    moved = after.run({"x": X}, [("point", "weight")])["y"] - before.run({"x": X}, [("point", "weight")])["y"]
    assert np.abs(moved).max() > 0


def test_a_value_inside_is_returned_if_asked_for() -> None:
    model = net()
    board = Switchboard(model, plan_of(model), ["y", "s"])
    got = board.run({"x": X}, [])
    assert list(got) == ["y", "s"]
    wanted = M.FloatSession(model, fetch=["s"], optimize=False).run({"x": X})["s"]
    assert M.difference(wanted, got["s"]) <= ROUNDING


def test_an_inner_value_that_is_an_output() -> None:
    nodes = [
        node("Gemm", ["x", "w"], ["h"], name="one"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("Gemm", ["r", "v"], ["y"], name="two"),
    ]
    model = prepared(
        graph(nodes, {"x": ["n", 6]}, {"y": ["n", 3], "r": ["n", 4]}, {"w": normal(6, 4), "v": normal(4, 3)})
    )
    x = normal(20, 6)
    plan = QuantizeInt8(rounding="nearest").plan(model, Samples({"x": x}))  # type: ignore[arg-type]
    check_ends(model, plan, {"x": x})
