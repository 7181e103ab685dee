"""Masked channels go, and the function stays: what is known of values, constants in biases, whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import parser

from edgekit import model as M
from edgekit import pipeline
from edgekit.inspection import inspect
from edgekit.passes import fold_graph as G
from edgekit.passes import surgery
from edgekit.passes.coupling_trace import trace
from edgekit.passes.fold import Fold
from edgekit.passes.known_values import known_values
from edgekit.passes.prune_zeros import PruneZeros, prune_zeros
from tests import coupling_graphs as C
from tests.quantize_graphs import Array, graph, node, normal

PATIENT = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def shrinks(model: Any, inputs: dict[str, Array]) -> dict[str, list[int]]:
    """What went; the function must stay."""
    small, record = prune_zeros(model)
    surgery.check(small)
    assert M.signature(small) == M.signature(model)
    got = C.run(small, inputs)
    for name, value in C.run(model, inputs).items():
        assert M.difference(value, got[name]) <= C.CLOSE, name
    return dict(record["removed"])


def masked(model: Any, rng: np.random.Generator, *, unread: bool) -> Any:
    """Some units of each family, never all, get weights of 0: what reads them, or what makes them, biases or not."""
    out = surgery.ready(model)
    found = trace(out)
    nodes = {n.name: n for n in out.graph}
    keep, bias = C.chosen(found, rng), rng.random() < 0.5
    for site in found.sites:
        zero = ~keep[site.labels]
        if not zero.any() or (site.role == "in") != unread or (site.role == "along" and not bias):
            continue
        array = np.array(G.array(nodes[site.node].inputs[site.position]))
        np.moveaxis(array, site.axis, 0)[zero] = 0
        G.set_constant(nodes[site.node], site.position, f"{site.node}/masked", array)
    return out


# --- random graphs --------------------------------------------------------------------------------------------------
@PATIENT
@given(C.networks(), st.integers(0, 99), st.booleans())
def test_masked_channels_go_and_the_function_stays(network: tuple[Any, int], seed: int, unread: bool) -> None:
    model = masked(network[0], np.random.default_rng(seed), unread=unread)
    shrinks(model, C.sample(network[1]))


@PATIENT
@given(C.networks(), st.integers(0, 99))
def test_all_that_nothing_reads_goes(network: tuple[Any, int], seed: int) -> None:
    """Of every family as many units at least as were masked: where no product sums over them."""
    ready = surgery.ready(network[0])
    found = trace(ready)
    keep = C.chosen(found, np.random.default_rng(seed))
    removed = prune_zeros(masked(network[0], np.random.default_rng(seed), unread=True))[1]["removed"]
    assume(not any(n.op_type == "MatMul" and G.array(n.inputs[1]) is None for n in ready.graph))
    for family in found.families():
        wanted = int((~keep[family.units]).sum()) if not family.frozen else 0
        assert wanted <= removed.get(family.name, [0])[0]


@PATIENT
@given(C.networks(most=4), st.integers(0, 9))
def test_what_is_known_is_what_comes_out(network: tuple[Any, int], seed: int) -> None:
    model = masked(network[0], np.random.default_rng(seed), unread=False)
    known = known_values(model)
    inputs = {name: x[:1] if M.batch_of(M.signature(model)) is None else x for name, x in C.sample(network[1]).items()}
    values = M.FloatSession(model, list(known), optimize=False, threads=1).run(inputs)
    for name, found in known.items():
        assert values[name].shape == found.value.shape
        np.testing.assert_allclose(values[name][~found.unknown], found.value[~found.unknown], rtol=1e-5, atol=1e-6)


# --- chains as Keras makes them -------------------------------------------------------------------------------------
def block(rng: np.random.Generator, dead: dict[str, list[int]], *, padded: bool = False) -> Any:
    """conv, bn, relu6, depthwise, bn, relu6, conv, bn, mean, dense; dead: filters of zeros, of each convolution."""
    pads = "[1,1,1,1]" if padded else "[0,0,0,0]"
    proto = parser.parse_graph(
        f"""g (float[n,3,9,9] x) => (float[n,4] y) {{
          a = Conv(x, wa)  na = BatchNormalization(a, ga, ba, ma, va)  ra = Clip(na, lo, hi)
          b = Conv<group=8,kernel_shape=[3,3],pads={pads}>(ra, wb)
          nb = BatchNormalization(b, gb, bb, mb, vb)  rb = Clip(nb, lo, hi)
          c = Conv(rb, wc)  nc = BatchNormalization(c, gc, bc, mc, vc)
          p = GlobalAveragePool(nc)  f = Flatten(p)  y = Gemm(f, wy, by) }}"""
    )
    arrays = {
        "wa": rng.normal(size=(8, 3, 1, 1)), "wb": rng.normal(size=(8, 1, 3, 3)), "wc": rng.normal(size=(6, 8, 1, 1)),
        "wy": rng.normal(size=(6, 4)), "by": rng.normal(size=4), "lo": np.zeros(()), "hi": np.full((), 6.0),
    }  # fmt: skip
    for layer, size in (("a", 8), ("b", 8), ("c", 6)):
        arrays |= {f"{k}{layer}": rng.normal(size=size) for k in "gbm"} | {f"v{layer}": rng.uniform(0.5, 2, size)}
        arrays[f"w{layer}"][dead.get(layer, [])] = 0
    proto.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items())
    for made in proto.node:
        made.name = made.output[0]
    return M.from_proto(onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10))


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_filters_of_zeros_before_batch_norm(folded: bool, seed: int) -> None:
    """What batch norm makes of 0 is a constant: through relu6, a valid depthwise convolution, and into a bias."""
    model = block(np.random.default_rng(seed), {"a": [1, 2], "c": [0, 5]})
    removed = shrinks(Fold()(model, None) if folded else model, M.seeded_inputs(M.signature(model), 2))
    assert removed == {"a": [2, 8], "c": [2, 6]}


def test_only_zero_passes_a_padded_convolution() -> None:
    rng = np.random.default_rng(0)
    model = Fold()(block(rng, {"a": [1, 2]}, padded=True), None)
    conv = next(n for n in model.graph if n.name == "a")
    made = np.array(G.array(conv.inputs[2]))
    made[1], made[2] = -0.5, 0.5  # behind relu6: 0, and 0.5 with a border of zeros
    G.set_constant(conv, 2, "bias", made)
    assert shrinks(model, M.seeded_inputs(M.signature(model), 2)) == {"a": [1, 8]}


def test_a_masked_channel_takes_those_that_only_it_reads() -> None:
    """Two layers back, in one call; and a layer that only reads itself."""
    model = graph(
        [node("Conv", ["x", "wa"], ["a"], name="a"), node("Conv", ["a", "wb"], ["b"], name="b"),
         node("Add", ["a", "b"], ["s"]), node("Conv", ["s", "wc"], ["c"], name="c"),
         node("Conv", ["c", "wy"], ["y"], name="y")],
        {"x": ["n", 2, 3, 3]}, {"y": ["n", 2, 3, 3]},
        {"wa": normal(4, 2, 1, 1), "wb": np.eye(4, dtype=np.float32)[:, :, None, None], "wc": normal(5, 4, 1, 1),
         "wy": normal(2, 5, 1, 1)},
    )  # fmt: skip
    weights = {v.name: np.array(v.const_value.numpy()) for v in model.graph.initializers.values()}
    weights["wy"][:, [3, 4]] = 0
    weights["wc"][:3, 2] = 0  # channel 2 is read by 3 and 4 only, and by itself
    nodes = {n.name: n for n in model.graph}
    G.set_constant(nodes["y"], 1, "wy", weights["wy"])
    G.set_constant(nodes["c"], 1, "wc", weights["wc"])
    removed = shrinks(model, M.seeded_inputs(M.signature(model), 2))
    assert removed == {"a": [1, 4], "c": [2, 5]}


def test_a_constant_behind_a_product_without_a_bias() -> None:
    """Into the Add that follows, or one of its own."""
    model = graph(
        [node("MatMul", ["x", "wa"], ["a"], name="a"), node("Add", ["a", "ba"], ["s"]), node("Relu", ["s"], ["r"]),
         node("MatMul", ["r", "wb"], ["b"], name="b"), node("Add", ["b", "bb"], ["t"]), node("Relu", ["t"], ["u"]),
         node("MatMul", ["r", "wc"], ["c"], name="c"), node("Mul", ["c", "u"], ["v"]), node("Tanh", ["c"], ["w"]),
         node("Add", ["v", "w"], ["z"]), node("MatMul", ["z", "wy"], ["y"], name="y")],
        {"x": ["n", 5, 4]}, {"y": ["n", 5, 2]},
        {"wa": normal(4, 6) * np.array([1, 0, 1, 1, 0, 1], np.float32), "ba": np.arange(-2, 4, dtype=np.float32),
         "wb": normal(6, 3), "bb": normal(3), "wc": normal(6, 3), "wy": normal(3, 2)},
    )  # fmt: skip
    small, record = prune_zeros(model)
    assert shrinks(model, M.seeded_inputs(M.signature(model), 2)) == {"a": [2, 6]}
    assert record["absorbed"] == 1  # relu(-1) is 0
    assert "2 of 6 channels of 1 layers" in record["words"]
    assert [n.op_type for n in small.graph].count("Add") == 4


def test_a_product_that_is_an_output_keeps_its_constant() -> None:
    """There is nowhere to add it."""
    weights = normal(4, 3)
    weights[:, 1] = 0
    model = graph(
        [node("Gemm", ["x", "wa", "ba"], ["a"], name="a"), node("MatMul", ["a", "wb"], ["y"], name="y")],
        {"x": ["n", 4]}, {"y": ["n", 2]}, {"wa": weights, "ba": normal(3), "wb": normal(3, 2)},
    )  # fmt: skip
    assert shrinks(model, M.seeded_inputs(M.signature(model), 2)) == {}


def test_hidden_units_of_zeros() -> None:
    arrays = {"w": normal(2, 24, 3), "r": normal(2, 24, 6), "b": normal(2, 48), "wy": normal(12, 2)}
    for name in ("w", "r"):
        arrays[name].reshape(2, 4, 6, -1)[:, :, [1, 4]] = 0
    arrays["b"].reshape(2, 8, 6)[:, :, [1, 4]] = 0
    model = graph(
        [node("Transpose", ["x"], ["s"], perm=[1, 0, 2]),
         node("LSTM", ["s", "w", "r", "b"], ["", "h"], name="l", hidden_size=6, direction="bidirectional"),
         node("Transpose", ["h"], ["t"], perm=[1, 0, 2]), node("Reshape", ["t", "to"], ["f"]),
         node("MatMul", ["f", "wy"], ["y"], name="y")],
        {"x": ["n", 5, 3]}, {"y": ["n", 2]}, {**arrays, "to": np.array([-1, 12])},
    )  # fmt: skip
    assert shrinks(model, {"x": normal(4, 5, 3)}) == {"l": [2, 6]}


def test_one_unit_of_a_family_stays() -> None:
    model = block(np.random.default_rng(0), {"a": list(range(8)), "b": list(range(8)), "c": list(range(6))})
    assert shrinks(model, M.seeded_inputs(M.signature(model), 2)) == {"a": [7, 8], "c": [5, 6]}


def test_a_model_without_masks_is_the_same_bytes() -> None:
    model = block(np.random.default_rng(0), {})
    small, record = prune_zeros(model)
    assert M.to_bytes(small) == M.to_bytes(M.clone(model))
    assert record == {"removed": {}, "absorbed": 0, "words": record["words"]}
    assert "no channel is masked" in record["words"]


# --- a real one -----------------------------------------------------------------------------------------------------
def test_a_masked_mobilenet_shrinks(zoo: Path) -> None:
    """Every third filter of the pointwise convolutions and of their depthwise ones, of zeros, and half of the betas."""
    model = Fold()(pipeline.load(zoo / "models" / "mobilenet_v2_cifar.onnx").model, None)
    rng = np.random.default_rng(0)
    for made in model.graph:
        if made.op_type != "Conv":
            continue
        weight, bias = np.array(G.array(made.inputs[1])), np.array(G.array(made.inputs[2]))
        dead = np.arange(0, len(weight), 3)
        weight[dead] = 0
        bias[dead] = np.where(rng.random(len(dead)) < 0.5, 0, bias[dead])
        G.set_constant(made, 1, f"{made.name}/w", weight)
        G.set_constant(made, 2, f"{made.name}/b", bias)
    inputs = {name: x * 255 for name, x in M.seeded_inputs(M.signature(model), 2).items()}
    removed = shrinks(model, inputs)
    assert len(removed) > 10
    before, after = (inspect(m, backends_too=False)["macs"] for m in (model, PruneZeros()(model, None)))
    assert after < 0.7 * before
