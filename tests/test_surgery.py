"""Slicing constants and rewriting the numbers that count channels; what a rule that is wrong gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit import model as M
from edgekit.errors import ConversionMismatchError
from edgekit.passes import fold_graph as G
from edgekit.passes import surgery
from edgekit.passes.coupling import Coupling, Site
from edgekit.passes.coupling_trace import trace
from tests import coupling_graphs as C
from tests.quantize_graphs import Array, graph, node, normal


def depthwise() -> Any:
    """A layer, a depthwise one of multiplier 2, and one that reads it; half of the channels through a Slice."""
    return graph(
        [node("Conv", ["x", "wa", "ba"], ["a"], name="a"), node("Conv", ["a", "wb"], ["b"], name="b", group=4),
         node("Slice", ["b", "from", "to", "axis"], ["s"], name="s"), node("Conv", ["s", "wy"], ["y"], name="y")],
        {"x": ["n", 3, 5, 5]}, {"y": ["n", 2, 5, 5]},
        {"wa": normal(4, 3, 1, 1), "ba": normal(4), "wb": normal(8, 1, 1, 1), "wy": normal(2, 7, 1, 1),
         "from": np.array([-8]), "to": np.array([-1]), "axis": np.array([1])},
    )  # fmt: skip


def arrays(model: Any, name: str) -> list[Array]:
    made = next(n for n in model.graph if n.name == name)
    return [np.array(a) for a in (G.array(v) for v in made.inputs) if a is not None]


def parts(model: Any) -> tuple[Any, Coupling]:
    ready = surgery.ready(model)
    return ready, trace(ready)


def test_what_is_left_is_the_old_weights() -> None:
    ready, found = parts(depthwise())
    cut = surgery.cut(ready, found, found.without(found.families()[0].units[[1]]))
    left, pairs = [0, 2, 3], [0, 1, 4, 5, 6, 7]
    for got, want in zip(arrays(cut, "a"), arrays(ready, "a"), strict=True):
        np.testing.assert_array_equal(got, want[left])
    np.testing.assert_array_equal(arrays(cut, "b")[0], arrays(ready, "b")[0][pairs])
    np.testing.assert_array_equal(arrays(cut, "y")[0], arrays(ready, "y")[0][:, pairs[:-1]])
    assert next(n for n in cut.graph if n.name == "b").attributes["group"].value == 3
    assert [a.item() for a in arrays(cut, "s")] == [0, 5, 1]


def test_an_end_counted_from_the_back_is_right_when_only_what_lies_behind_goes() -> None:
    """The last channel is in no slice: all that are stay, though the Slice says 'all but the last'."""
    model = depthwise()
    assert C.check_cut(model, M.seeded_inputs(M.signature(model), 2)) > 0
    _, found = parts(model)
    last = found.on["b"][1][-1:]
    keep = found.everything()
    keep[last] = False
    assert keep[found.on["s"][1]].sum() == 6  # its twin is in the slice, and goes too


def test_nothing_cut_is_the_same_bytes() -> None:
    ready, found = parts(depthwise())
    assert M.to_bytes(surgery.cut(ready, found, found.everything())) == M.to_bytes(ready)


def test_the_model_given_stays_as_it_was() -> None:
    ready, found = parts(depthwise())
    before = M.to_bytes(ready)
    surgery.cut(ready, found, found.without(found.families()[0].units[:2]))
    assert M.to_bytes(ready) == before


def test_a_split_in_equal_parts_gets_sizes_of_its_own() -> None:
    model = graph(
        [node("Conv", ["x", "wa"], ["a"], name="a"), node("Split", ["a"], ["s", "t"], name="p", axis=1, num_outputs=2),
         node("Conv", ["s", "wb"], ["b"], name="b"), node("Conv", ["t", "wc"], ["c"], name="c"),
         node("Add", ["b", "c"], ["y"], name="y")],
        {"x": ["n", 3, 5, 5]}, {"y": ["n", 2, 5, 5]},
        {"wa": normal(6, 3, 1, 1), "wb": normal(2, 3, 1, 1), "wc": normal(2, 3, 1, 1)},
    )  # fmt: skip
    ready, found = parts(model)
    cut = surgery.cut(ready, found, found.without(found.families()[0].units[[0, 1, 5]]))
    assert arrays(cut, "p")[0].tolist() == [1, 2]
    surgery.check(cut)
    assert C.check_cut(model, M.seeded_inputs(M.signature(model), 2)) > 0


def test_a_cut_that_does_not_fit_is_reported() -> None:
    ready, found = parts(depthwise())
    found.sites = [s for s in found.sites if s.node != "y"]
    with pytest.raises(ConversionMismatchError, match="the pruned model does not run"):
        surgery.check(surgery.cut(ready, found, found.without(found.families()[0].units[:1])))


def test_a_site_without_a_constant_is_a_mistake_of_the_rules() -> None:
    ready, found = parts(depthwise())
    labels = found.on["a"][1]
    found.sites.append(Site("b", 0, 1, labels, "in"))
    with pytest.raises(TypeError, match="input 0 of 'b' is computed"):
        surgery.cut(ready, found, found.without(labels[:1]))
