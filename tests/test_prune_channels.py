"""The pass as a whole, on small networks: budgets, widths, what stays, and that repair and order are worth it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from edgekit import model as M
from edgekit.errors import NonFiniteError, UnsupportedOpError
from edgekit.inspection import inspect
from edgekit.passes.coupling_trace import trace
from edgekit.passes.prune_channels import PruneChannels, prepared_for_pruning
from edgekit.passes.prune_exchange import exchanged
from edgekit.passes.prune_plan import PruningPlan
from edgekit.passes.surgery import cut
from tests.prune_nets import bottlenecks, lost, mixed, outputs, perceptron
from tests.quantize_graphs import Array, Samples, graph, node, normal
from tests.test_prune_allocate import choice

NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "perceptron": (perceptron, (12,)),
    "bottlenecks": (bottlenecks, (4, 8, 8)),
}


@cache
def made(net: str, budget: float = 0.5, **options: Any) -> tuple[Any, PruningPlan, Any, Array]:
    """(float model, plan, pruned model, test samples)."""
    model, shape = NETS[net][0](), NETS[net][1]
    data, held = Samples({"x": mixed(192, *shape)}), Samples({"x": mixed(64, *shape, seed=1)})
    step = PruneChannels(budget, **options)
    plan = step.plan(model, data, held)  # type: ignore[arg-type]
    pruned, _ = step.apply(model, plan, data)  # type: ignore[arg-type]
    return model, plan, pruned, mixed(128, *shape, seed=2)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("measure", ["macs", "parameters"])
def test_the_budget_is_met_and_counted_right(net: str, measure: str) -> None:
    model, plan, pruned, _ = made(net, 0.5, measure=measure)
    before, after = inspect(model, backends_too=False), inspect(pruned, backends_too=False)
    assert M.signature(pruned) == M.signature(model)
    share = getattr(plan, measure)
    assert 0.35 < share <= 0.5
    assert plan.macs == pytest.approx(after["macs"] / before["macs"], abs=1e-6)
    assert plan.parameters == pytest.approx(after["parameters"] / before["parameters"], abs=0.02)
    assert PruningPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("net", NETS)
def test_the_same_seed_gives_the_same_model(net: str) -> None:
    one, two = made(net, 0.5), made.__wrapped__(net, 0.5)
    assert one[1] == two[1]
    assert M.to_bytes(one[2]) == M.to_bytes(two[2])


@pytest.mark.parametrize("net", NETS)
def test_far_better_than_magnitude_without_repair(net: str) -> None:
    model, plan, pruned, test = made(net, 0.5)
    _, other, _, _ = made(net, 0.5, importance="magnitude")
    ready = prepared_for_pruning(model)
    coupling = trace(ready)
    plain = cut(ready, coupling, other.kept(coupling))
    assert other.macs <= 0.5
    assert lost(model, pruned, test) < 0.3 * lost(model, plain, test)
    assert plan.macs > 0.35


@pytest.mark.parametrize("multiple", [4, 8])
def test_widths_are_what_kernels_like(multiple: int) -> None:
    _, plan, pruned, _ = made("bottlenecks", 0.5, **({} if multiple == 8 else {"multiple": multiple}))
    for family in plan.families:
        least = multiple if family.units > 4 * multiple else multiple // 2
        assert family.frozen or family.keep == family.units or family.keep % min(least, 4) == 0
    convs = {n.name: n for n in pruned.graph if n.op_type == "Conv"}
    assert {n: int(convs[n].inputs[1].shape[0]) % 4 for n in ("expand1", "expand2", "stem")} == dict.fromkeys(
        ("expand1", "expand2", "stem"), 0
    )


def test_what_is_kept_by_name_stays_and_frozen_families_are_told() -> None:
    model, plan, pruned, _ = made("perceptron", 0.6, keep=("first",))
    rows = {f.name: f for f in plan.families}
    assert (rows["first"].keep, rows["first"].frozen) == (24, "asked for")
    assert "output" in rows["last"].frozen
    assert rows["second"].keep < 24
    np.testing.assert_array_equal(outputs(pruned, mixed(8, 12), "a"), outputs(model, mixed(8, 12), "a"))


def test_channels_that_no_layer_can_be_fitted_for_stay() -> None:
    w = {"w0": normal(8, 4, 1, 1), "b0": normal(8), "w1": normal(8, 3, 3, 3)}
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["a"], name="make"),
        node("Relu", ["a"], ["p"], name="relu"),
        node("ConvTranspose", ["p", "w1"], ["y"], name="up", output_shape=[7, 7]),
    ]
    model = graph(nodes, {"x": ["n", 4, 5, 5]}, {"y": ["n", 3, 7, 7]}, w)
    data = Samples({"x": normal(64, 4, 5, 5)})
    with pytest.raises(UnsupportedOpError, match="no layer that reads these channels can be fitted"):
        PruneChannels(0.5).plan(model, data, data)  # type: ignore[arg-type]


def test_weights_that_are_no_numbers_are_told_in_one_line() -> None:
    model = perceptron()
    weight = np.array(model.graph.initializers["w1"].const_value.numpy())
    weight[0, 0] = np.nan
    import onnx_ir as ir

    model.graph.initializers["w1"].const_value = ir.tensor(weight, name="w1")
    data = Samples({"x": normal(64, 12)})
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        PruneChannels(0.5).plan(model, data, data)  # type: ignore[arg-type]


def test_exchanges_are_kept_only_where_the_model_gains() -> None:
    """The curves say that all families are alike; repaired models say that the first is worth more."""
    line = np.arange(8) * 1.0
    choices = [choice(8, line, tuple(range(8, 0, -1)), 8 * i) for i in range(3)]
    asked: list[tuple[int, ...]] = []

    def suffered(widths: Any) -> float:
        asked.append(tuple(widths))
        return float((8 - widths[0]) ** 2 + 10)

    def cost(share: Array) -> float:
        return float(share.sum())

    got = exchanged([5, 5, 5], choices, cost, 15 / 8, suffered, 30)  # type: ignore[arg-type]
    assert got[0] == 8
    assert all(sum(widths) <= 15 for widths in asked)
    assert len(asked) == len(set(asked)) <= 30
    assert exchanged([5, 5, 5], choices, cost, 15 / 8, lambda _: 1.0, 5) == [5, 5, 5]  # type: ignore[arg-type]
