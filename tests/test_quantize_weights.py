"""Quantized weights: the portable model against numpy and the ONNX reference, grids and rounding as properties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from edgekit import model as M
from edgekit.dataset import Dataset, open_dataset
from edgekit.errors import NonFiniteError, UnsupportedOpError
from edgekit.passes.quantize_weights import QuantizeWeights, product_share
from edgekit.passes.rounding import error, round_weights
from edgekit.passes.weight_grid import limits, search

from .models import MODELS

Array = np.ndarray[Any, Any]


def build(text: str, **weights: Array) -> ir.Model:
    graph = parser.parse_graph(text)
    graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def calibration(folder: Path, x: Array) -> Dataset:
    np.savez(folder / "calibration.npz", x=x)
    return open_dataset(folder / "calibration.npz")


def by_hand(model: ir.Model) -> dict[str, Array]:
    """Every weight behind a DequantizeLinear of constants, dequantized in numpy: by its output's name."""
    out = {}
    for node in model.graph:
        stored = M.constant(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        if stored is None:
            continue
        scale = M.constant(node.inputs[1])
        zero = M.constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros_like(scale)
        assert scale is not None
        axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
        rows = []
        for at in range(stored.shape[axis]):
            slot = at // block if block else at
            s, z = (scale[slot], zero[slot].astype(np.float64)) if scale.ndim else (scale, 0.0)
            rows.append((np.take(stored, at, axis).astype(np.float64) - z) * s.astype(np.float64))
        out[node.outputs[0].name or ""] = np.stack(rows, axis)
    return out


def run(model: ir.Model, **inputs: Array) -> list[Array]:
    return ReferenceEvaluator(M.to_proto(model)).run(None, inputs)


# --- the portable model --------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [4, 7, 8])
@pytest.mark.parametrize("name", MODELS)
def test_the_result_is_valid_and_runs_on_the_reference(name: str, bits: Any) -> None:
    model = MODELS[name]()
    before = M.to_bytes(model)
    made, told = QuantizeWeights(bits=bits, least=1)(model, None), QuantizeWeights(bits=bits, least=1)
    assert M.to_bytes(model) == before
    onnx.checker.check_model(M.to_proto(made), full_check=True)
    assert M.opset(made) >= 21
    inputs = M.seeded_inputs(M.signature(model), 2)
    layers = told.quantized(model, None)[1]
    assert layers
    for want, got in zip(run(model, **inputs), run(made, **inputs), strict=True):
        assert got.shape == want.shape
        share = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert share < {4: 0.35, 7: 0.06, 8: 0.03}[bits]


@pytest.mark.parametrize("symmetric", ["on", "off"])
def test_a_product_is_what_numpy_makes_of_the_integers(symmetric: Any) -> None:
    w, b, x = normal(70, 9), normal(9, seed=1), normal(5, 70, seed=2)
    model = build("g (float[n,70] x) => (float[n,9] y) { y = Gemm<alpha=0.5,transB=1>(x, w, b) }", w=w.T.copy(), b=b)
    made = QuantizeWeights(bits=4, least=1, symmetric=symmetric)(model, None)
    (weight,) = by_hand(made).values()
    assert weight.shape == (70, 9)  # alpha and transB are in the weights
    np.testing.assert_allclose(run(made, x=x)[0], x @ weight + b, rtol=1e-5, atol=1e-5)
    assert np.linalg.norm(weight - 0.5 * w) < 0.1 * np.linalg.norm(0.5 * w)
    (node,) = [n for n in made.graph if n.op_type == "DequantizeLinear"]
    assert node.attributes.get_int("block_size", 0) == 32
    assert len(node.inputs) == (2 if symmetric == "on" else 3)
    stored = M.constant(node.inputs[0])
    assert stored is not None
    assert stored.dtype.name == "int4"


def test_a_gather_dequantizes_only_what_it_gathered_even_as_an_output() -> None:
    table = normal(40, 16)
    model = build("g (int32[n,3] ids) => (float[n,3,16] y) { y = Gather<axis=0>(t, ids) }", t=table)
    made = QuantizeWeights(least=1)(model, None)
    assert [n.op_type for n in made.graph] == ["Gather", "DequantizeLinear"]
    onnx.checker.check_model(M.to_proto(made), full_check=True)
    ids = np.array([[0, 39, 7]], np.int32)
    (got,) = run(made, ids=ids)
    assert np.abs(got - table[ids]).max() <= np.abs(table).max() / 127  # a step


def test_recurrent_weights_of_both_directions() -> None:
    model = build(
        "g (float[7,n,5] x) => (float[7,2,n,6] y) { y = LSTM<hidden_size=6,direction=\"bidirectional\">(x, w, r) }",
        w=normal(2, 24, 5) / 4, r=normal(2, 24, 6, seed=1) / 4,
    )  # fmt: skip
    made, told = QuantizeWeights(least=1).quantized(model, None)
    assert set(told) == {"w", "r"}
    x = normal(7, 3, 5, seed=2)
    want, got = M.FloatSession(model).run({"x": x})["y"], M.FloatSession(made, optimize=False).run({"x": x})["y"]
    assert np.abs(got - want).max() < 0.01


def test_a_weight_read_twice_is_stored_once_and_in_two_layouts_twice() -> None:
    text = "g (float[n,16] a, float[n,16] b) => (float[n,16] y, float[n,16] z) { y = %s z = %s }"
    w = normal(16, 16)
    same = QuantizeWeights(least=1)(build(text % ("MatMul(a, w)", "Gemm(b, w)"), w=w), None)
    assert [n.op_type for n in same.graph].count("DequantizeLinear") == 1
    turned = QuantizeWeights(least=1)(build(text % ("MatMul(a, w)", "Gemm<transB=1>(b, w)"), w=w), None)
    assert [n.op_type for n in turned.graph].count("DequantizeLinear") == 2
    assert "w" not in turned.graph.initializers
    a, b = normal(2, 16, seed=1), normal(2, 16, seed=2)
    y, z = run(turned, a=a, b=b)
    np.testing.assert_allclose(y, a @ w, atol=0.15)
    np.testing.assert_allclose(z, b @ w.T, atol=0.15)


def test_what_is_left_alone() -> None:
    model = build(
        """g (float[n,16] x) => (float[n,16] y, float[n,16] z) {
          y = MatMul(x, w) h = MatMul(x, small) z = Mul(y, h) }""",
        w=normal(16, 16), small=normal(16, 1),
    )  # fmt: skip
    made, told = QuantizeWeights(least=17).quantized(model, None)
    assert set(told) == {"w"}
    named = next(n for n in model.graph if n.op_type == "MatMul")
    named.name = "first"
    made, told = QuantizeWeights(least=1, keep_float=("first",)).quantized(model, None)
    assert set(told) == {"small"}
    assert "w" in made.graph.initializers
    with pytest.raises(UnsupportedOpError, match="no node 'nowhere'"):
        QuantizeWeights(keep_float=("nowhere",))(model, None)


def test_an_already_quantized_model_and_nan_are_refused() -> None:
    model = MODELS["mlp"]()
    with pytest.raises(UnsupportedOpError, match="already quantized"):
        QuantizeWeights(least=1)(QuantizeWeights(least=1)(model, None), None)
    bad = normal(16, 16)
    bad[3, 4] = np.nan
    with pytest.raises(NonFiniteError, match="NaN in the weights 'w'"):
        QuantizeWeights(least=1)(build("g (float[n,16] x) => (float[n,16] y) { y = MatMul(x, w) }", w=bad), None)


def test_weights_in_constant_nodes() -> None:
    model = build(
        """g (float[n,4] x) => (float[n,2] y) {
          w = Constant<value = float[4,2] {1.0, 2.0, -3.0, 4.0, 5.0, -6.0, 7.0, 8.0}>()  y = MatMul(x, w) }"""
    )
    made = QuantizeWeights(least=1)(model, None)
    assert [n.op_type for n in made.graph] == ["DequantizeLinear", "MatMul"]
    np.testing.assert_allclose(run(made, x=np.eye(4, dtype=np.float32))[0][2], [5, -6], atol=0.04)


def test_the_share_of_products() -> None:
    assert product_share(MODELS["mlp"]()) == 1
    assert product_share(MODELS["recurrent"]()) == 1
    mixed = MODELS["cnn_nchw"]()
    sizes = {n: t.size for n in ("w0", "w1", "w2") if (t := mixed.graph.initializers[n].const_value) is not None}
    assert product_share(mixed) == sizes["w2"] / sum(sizes.values())
    assert product_share(QuantizeWeights(least=1)(mixed, None)) == product_share(mixed)


# --- rounding with data ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("symmetric", ["on", "off"])
def test_with_data_the_layers_output_is_nearer_than_nearest(symmetric: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(12, 96)).astype(np.float32)  # 96 inputs that are 12 sources: strongly correlated

    def sample(count: int) -> Array:
        drawn = rng.normal(size=(count, 12)) @ mix + 0.05 * rng.normal(size=(count, 96))
        return np.asarray(drawn, np.float32)

    w = normal(96, 20)
    model = build("g (float[n,96] x) => (float[n,20] y) { y = MatMul(x, w) }", w=w)
    data, fresh = calibration(tmp_path, sample(300)), sample(200)
    left = {}
    for rounding in ("nearest", "auto"):
        made, told = QuantizeWeights(bits=4, rounding=rounding, symmetric=symmetric).quantized(model, data)  # type: ignore[arg-type]
        assert told["w"]["rounding"] == ("nearest" if rounding == "nearest" else "reconstruct")
        left[rounding] = np.linalg.norm(run(made, x=fresh)[0] - fresh @ w)
    assert left["auto"] < 0.5 * left["nearest"]


@pytest.mark.parametrize("group", [1, 2, 8])
def test_convolutions_are_fitted_where_that_is_asked_for(group: int, tmp_path: Path) -> None:
    """Strides, padding and groups: the result on fresh images is nearer than that of nearest integers."""
    rng = np.random.default_rng(4)
    mix = rng.normal(size=(3, 8))

    def sample(count: int) -> Array:
        """Images whose 8 channels are 3 sources, each smooth: neighbours and channels are strongly correlated."""
        smooth = rng.normal(size=(count, 3, 9, 7)).cumsum(axis=2).cumsum(axis=3) / 5
        drawn = np.einsum("nshw,sc->nchw", smooth, mix)
        return np.asarray(drawn + 0.05 * rng.normal(size=drawn.shape), np.float32)

    model = build(
        f"""g (float[n,8,9,7] x) => (float[n,16,5,4] y) {{
          y = Conv<kernel_shape=[3,3],strides=[2,2],pads=[1,1,1,1],group={group}>(x, w, b) }}""",
        w=normal(16, 8 // group, 3, 3), b=normal(16, seed=1),
    )  # fmt: skip
    data, fresh = calibration(tmp_path, sample(200)), sample(100)
    (wanted,) = run(model, x=fresh)
    left = {}
    for rounding in ("nearest", "auto", "reconstruct"):
        made, told = QuantizeWeights(bits=8, rounding=rounding, least=1).quantized(model, data)  # type: ignore[arg-type]
        assert told["w"]["rounding"] == ("reconstruct" if rounding == "reconstruct" else "nearest")
        (weight,) = by_hand(made).values()
        assert np.abs(weight - normal(16, 8 // group, 3, 3)).max() < 0.2
        left[rounding] = np.linalg.norm(run(made, x=fresh)[0] - wanted)
    assert left["auto"] == left["nearest"]
    assert left["reconstruct"] < 0.7 * left["nearest"]


def test_a_kernel_that_two_nodes_lay_differently_is_fitted_to_both(tmp_path: Path) -> None:
    x = np.cumsum(normal(60, 2, 24), axis=2) / 5
    model = build(
        """g (float[n,2,24] x) => (float[n,3,22] y, float[n,3,7] z) {
          y = Conv<kernel_shape=[3]>(x, w)  z = Conv<kernel_shape=[3],strides=[3],dilations=[2]>(x, w) }""",
        w=normal(3, 2, 3),
    )  # fmt: skip
    left = []
    for rounding in ("nearest", "reconstruct"):
        made, told = QuantizeWeights(rounding=rounding, least=1).quantized(model, calibration(tmp_path, x))  # type: ignore[arg-type]
        assert [n.op_type for n in made.graph].count("DequantizeLinear") == 1
        assert told["w"]["rounding"] == rounding
        left.append(sum(np.linalg.norm(a - b) for a, b in zip(run(made, x=x), run(model, x=x), strict=True)))
    assert left[1] < left[0]


def test_of_too_few_samples_nothing_worse_is_kept(tmp_path: Path) -> None:
    """One sample says next to nothing of 64 inputs; the result is still within a grid step of the weights."""
    w = normal(64, 8)
    model = build("g (float[n,64] x) => (float[n,8] y) { y = MatMul(x, w) }", w=w)
    made = QuantizeWeights(bits=4, least=1)(model, calibration(tmp_path, normal(1, 64)))
    (weight,) = by_hand(made).values()
    assert np.isfinite(weight).all()
    assert np.linalg.norm(weight - w) < 0.3 * np.linalg.norm(w)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rounding_stays_within_uneven_bounds_and_never_loses_to_nearest(data: st.DataObject) -> None:
    inputs, outputs = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    weight, scales = rng.normal(size=(1, inputs, outputs)), rng.uniform(0.05, 1, size=(1, inputs, outputs))
    zero = rng.integers(-8, 8, size=(1, inputs, outputs))
    low, high = -8.0 - zero, 7.0 - zero
    rows = rng.normal(size=(data.draw(st.integers(1, 9)), inputs))
    gram = (rows.T @ rows)[None] / len(rows)
    q = round_weights(weight, gram, scales, (low, high))
    assert ((q >= low) & (q <= high) & (q == np.rint(q))).all()
    nearest = np.clip(np.rint(weight / scales), low, high)
    damped = gram + 0.01 * np.trace(gram[0]) / inputs * np.eye(inputs)
    assert (error(q, weight, damped, scales) <= error(nearest, weight, damped, scales) * (1 + 1e-9) + 1e-12).all()


# --- grids -----------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_grid_is_at_least_as_good_as_min_max_for_any_weights(data: st.DataObject) -> None:
    inputs, outputs = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 4))
    bits, block = data.draw(st.sampled_from([4, 7, 8])), data.draw(st.sampled_from([1, 16, 32, 70]))
    size = data.draw(st.sampled_from([1e-44, 1e-20, 1.0, 1e30, 1e38]))
    elements = st.floats(-1, 1, width=32) | st.just(0.0)
    weight = data.draw(hnp.arrays(np.float32, (inputs, outputs), elements=elements)).astype(np.float64)
    weight = (weight * size).astype(np.float32).astype(np.float64)
    asymmetric = bits == 4 and data.draw(st.booleans())
    grid = search(weight, None, bits, block, asymmetric=asymmetric)
    q = grid.nearest(weight)
    low, high = limits(bits)
    assert grid.scale.shape == (-(-inputs // block), outputs)
    assert (np.isfinite(grid.scale) & (grid.scale > 0)).all()
    assert ((q >= low) & (q <= high) & (q == np.rint(q))).all()
    assert not grid.real(q)[np.broadcast_to(weight == 0, weight.shape)].any()  # 0 stays 0: padding may rely on it
    for group in range(len(grid.scale)):
        rows = slice(group * block, (group + 1) * block)
        part, got = weight[rows], grid.real(q)[rows]
        least, most = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        step = (most - least) / (high - low) if asymmetric else np.maximum(most, -least) / high
        step = np.maximum(step, np.finfo(np.float32).tiny).astype(np.float32).astype(np.float64)
        offset = np.clip(np.rint(low - least / step), low, high) if asymmetric else 0
        plain = (np.clip(np.rint(part / step) + offset, low, high) - offset) * step
        assert (((got - part) ** 2).sum(0) <= ((plain - part) ** 2).sum(0) * (1 + 1e-9)).all()


def test_importance_moves_the_grid_to_what_is_multiplied_most() -> None:
    weight = np.concatenate([np.full((1, 1), 10.0), np.linspace(-1, 1, 31)[:, None]])
    even = search(weight, None, 4, 32, asymmetric=False)
    importance = np.concatenate([[1e-6], np.ones(31)])
    ours = search(weight, importance, 4, 32, asymmetric=False)
    assert ours.scale < even.scale  # the outlier is clipped: hardly anything is multiplied by it


@settings(deadline=None, max_examples=40)
@given(
    inputs=st.integers(1, 80), outputs=st.integers(1, 5), bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, 32, 64]), dead=st.booleans(), size=st.sampled_from([1e-30, 1.0, 1e20]),
)  # fmt: skip
def test_any_size_of_layer(inputs: int, outputs: int, bits: Any, group: Any, dead: bool, size: float) -> None:
    w = (normal(inputs, outputs, seed=inputs) * np.float32(size)).astype(np.float32)
    if dead:
        w[:, 0] = 0
    text = f"g (float[n,{inputs}] x) => (float[n,{outputs}] y) {{ y = MatMul(x, w) }}"
    made = QuantizeWeights(bits=bits, group_size=group, least=1)(build(text, w=w), None)
    onnx.checker.check_model(M.to_proto(made), full_check=True)
    (weight,) = by_hand(made).values()
    assert np.abs(weight - w).max() <= np.abs(w).max() * (0.2 if bits == 4 else 0.02)
    if dead:
        assert not weight[:, 0].any()
    x = normal(3, inputs, seed=1)
    np.testing.assert_allclose(run(made, x=x)[0], x @ weight, rtol=1e-4, atol=1e-5 * float(np.abs(x @ weight).max()))
