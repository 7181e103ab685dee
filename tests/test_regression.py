"""Layers as rows of inputs and outputs: y = x W + b, whatever the layer, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgekit import model as M
from edgekit.passes import regression as L
from edgekit.passes.apply_plan import folded, prepared
from edgekit.windows import pad_spatial, window
from tests.quantize_graphs import Array, graph, node, normal


def layer_of(op: str, x: Array, weights: dict[str, Array], **attributes: Any) -> tuple[L.Layer | None, Array]:
    """(the layer, what ONNX Runtime makes of x)."""
    out = ["n", *[f"d{i}" for i in range(x.ndim - 1)]]
    model = prepared(
        graph(
            [node(op, ["x", *weights], ["y"], name="it", **attributes)], {"x": ["n", *x.shape[1:]]}, {"y": out}, weights
        )
    )
    (it,) = model.graph
    return L.layer(it, *folded(it)), M.FloatSession(model, optimize=False, threads=1).run({"x": x})["y"]


def check(layer: L.Layer | None, x: Array, y: Array, rows: int, seed: int = 0) -> L.Rows:
    assert layer is not None
    chosen = L.choose(layer.node, y, rows, np.random.default_rng(seed))
    again = L.choose_input(layer, x, rows, np.random.default_rng(seed))
    np.testing.assert_array_equal(chosen.samples, again.samples)
    np.testing.assert_array_equal(chosen.picks, again.picks)
    left, right = L.inputs(layer, x, chosen), L.outputs(layer, y, chosen)
    groups, inputs, outputs = layer.weight.shape
    assert left.shape == (groups, chosen.picks.size, inputs)
    assert right.shape == (groups, chosen.picks.size, outputs)
    bias = 0.0 if layer.bias is None else layer.bias[:, None, :]
    np.testing.assert_allclose(left @ layer.weight + bias, right, atol=2e-5 * max(1.0, float(np.abs(right).max())))
    return chosen


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    each = st.integers(1, 3)

    def axes(most: int = 3, least: int = 1) -> list[int]:
        return draw(st.lists(st.integers(least, most), min_size=rank, max_size=rank))

    attributes: dict[str, Any] = {"group": groups, "strides": axes(), "dilations": axes(2)}
    pads = draw(st.sampled_from(["none", "given", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if pads == "given":
        attributes["pads"] = axes(2, 0) + axes(2, 0)
    elif pads != "none":
        attributes["auto_pad"] = pads
        if pads != "VALID":
            attributes["dilations"] = [1] * rank
    kernel = axes()
    shape = (groups * draw(each), 4 // groups, *kernel)
    return {"attributes": attributes, "weight": shape, "size": axes(9, 5), "bias": draw(st.booleans())}


@given(convolutions(), st.integers(0, 10**6), st.sampled_from([1, 5, 40, 10**6]))
@settings(max_examples=80, deadline=None)
def test_convolutions(case: dict[str, Any], seed: int, rows: int) -> None:
    x = normal(3, 4, *case["size"], seed=seed)
    weights = {"w": normal(*case["weight"], seed=seed + 1)}
    if case["bias"]:
        weights["b"] = normal(case["weight"][0], seed=seed + 2)
    layer, y = layer_of("Conv", x, weights, kernel_shape=list(case["weight"][2:]), **case["attributes"])
    assume(y.size)
    check(layer, x, y, rows, seed)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("numbers", [{}, {"alpha": 0.5, "beta": 2.0}, {"beta": 0.0}])
@pytest.mark.parametrize("bias", [None, (4,), (1, 4), (1,), ()])
def test_dense_layers(transposed: int, numbers: dict[str, float], bias: tuple[int, ...] | None) -> None:
    weights = {"w": normal(*((4, 6) if transposed else (6, 4)))}
    if bias is not None:
        weights["b"] = normal(*bias, seed=1)
    x = normal(20, 6, seed=2)
    layer, y = layer_of("Gemm", x, weights, transB=transposed, **numbers)
    check(layer, x, y, 8)
    check(layer, x, y, 1000)


@pytest.mark.parametrize("shape", [(20, 6), (5, 7, 6), (3, 2, 7, 6)])
def test_products(shape: tuple[int, ...]) -> None:
    x = normal(*shape, seed=2)
    layer, y = layer_of("MatMul", x, {"w": normal(6, 4)})
    for rows in (1, 8, 1000):
        check(layer, x, y, rows)


@pytest.mark.parametrize(
    ("op", "weight", "shape"),
    [("ConvTranspose", (4, 3, 2, 2), (2, 4, 5, 5)), ("MatMul", (2, 6, 4), (3, 2, 5, 6))],
)
def test_what_is_no_such_layer(op: str, weight: tuple[int, ...], shape: tuple[int, ...]) -> None:
    layer, _ = layer_of(op, normal(*shape), {"w": normal(*weight)})
    assert layer is None


@pytest.mark.parametrize(
    ("op", "weight", "attributes"),
    [
        ("Conv", (6, 2, 3, 2), {"group": 2}),
        ("Conv", (4, 1, 3, 3), {"group": 4}),
        ("Gemm", (4, 5), {}),
        ("Gemm", (5, 4), {"transB": 1}),
        ("MatMul", (4, 5), {}),
    ],
)
def test_weights_come_back_in_their_own_layout(op: str, weight: tuple[int, ...], attributes: dict[str, int]) -> None:
    array = normal(*weight)
    layer, _ = layer_of(op, normal(2, 4, 5, 5) if op == "Conv" else normal(2, 4), {"w": array}, **attributes)
    assert layer is not None
    np.testing.assert_array_equal(layer.restored(layer.weight).astype(np.float32), array)
    outputs = weight[0] if op == "Conv" or attributes.get("transB") else weight[1]
    # one number per output channel meets that channel's column
    numbered = layer.along(np.arange(1, outputs + 1)) * np.ones_like(layer.weight)
    back = layer.restored(numbered)
    axis = 0 if back.shape[0] == outputs and op != "MatMul" and not (op == "Gemm" and not attributes) else 1
    for channel in range(outputs):
        assert (np.take(back, channel, axis=axis) == channel + 1).all()


def test_rows_are_chosen_from_every_sample_alike() -> None:
    x = normal(6, 4, 8, 8)
    layer, y = layer_of("Conv", x, {"w": normal(3, 4, 3, 3)})
    rows = check(layer, x, y, 60)
    assert rows.samples.tolist() == list(range(6))
    assert rows.picks.shape == (6, 10)
    assert all(len(set(p)) == 10 for p in rows.picks.tolist())
    few = check(layer, x, y, 4)
    assert few.picks.shape == (4, 1)
    assert few.samples.tolist() == sorted(set(few.samples.tolist()))
    every = check(layer, x, y, 10**9)
    assert every.picks.shape == (6, 36)


# --- windows ---------------------------------------------------------------------------------------------
@given(convolutions())
@settings(max_examples=40, deadline=None)
def test_every_tap_meets_what_the_kernel_meets(case: dict[str, Any]) -> None:
    """A convolution summed tap by tap from `taps` is the runtime's."""
    kernel, size = tuple(case["weight"][2:]), tuple(case["size"])
    x, w = normal(2, 1, *size), normal(1, 1, *kernel)
    attributes = {**case["attributes"], "group": 1}
    layer, y = layer_of("Conv", x, {"w": w}, kernel_shape=list(kernel), **attributes)
    assume(y.size)
    assert layer is not None
    win = window(layer.node, kernel, size)
    assert win.out(size) == y.shape[2:]
    padded = pad_spatial(x, win.begins, win.ends)
    total = sum(w[(0, 0, *tap)] * padded[(slice(None), slice(None), *where)] for tap, where in win.taps(y.shape[2:]))
    np.testing.assert_allclose(total, y, atol=1e-4)


def test_negative_padding_crops() -> None:
    x = np.arange(20, dtype=np.float32).reshape(1, 1, 4, 5)
    np.testing.assert_array_equal(pad_spatial(x, (-1, 0), (0, -2)), x[:, :, 1:, :3])
    np.testing.assert_array_equal(
        pad_spatial(x, (-1, 1), (1, 0)), np.pad(x[:, :, 1:], ((0, 0), (0, 0), (0, 1), (1, 0)))
    )
    assert pad_spatial(x, (0, 0), (0, 0)) is x
