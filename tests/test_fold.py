"""Clean-up: the same numbers as the ONNX reference evaluator on the unfolded graph, from fewer nodes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.backend.test.case.node import collect_testcases
from onnx.reference import ReferenceEvaluator

from edgekit import model as M
from edgekit.passes.fold import Fold

from .models import MODELS

Arrays = dict[str, np.ndarray]
RNG = np.random.default_rng(11)


def build(text: str, **weights: Any) -> ir.Model:
    """A graph in ONNX's text form; not shape-inferred, as a careless exporter leaves it."""
    graph = parser.parse_graph(text)
    graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return M.from_proto(proto)


def normal(*shape: int, scale: float = 0.5) -> np.ndarray:
    return (RNG.normal(size=shape) * scale).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return (RNG.random(shape) + 0.5).astype(np.float32)


def statistics(channels: int) -> Arrays:
    return {"g": normal(channels), "be": normal(channels), "m": normal(channels), "v": positive(channels)}


def results(model: ir.Model, inputs: Arrays, by_runtime: bool) -> list[np.ndarray]:
    if by_runtime:
        return list(M.FloatSession(model, optimize=False).run(inputs).values())
    return ReferenceEvaluator(M.to_proto(model)).run(None, inputs)  # type: ignore[no-any-return]


def ops(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph)


def check(
    model: ir.Model, batch: int = 3, extra: int = 0, tolerance: float = 1e-5, by_runtime: bool = False
) -> ir.Model:
    """Fold and hold the result to everything that folding promises; returns it.

    extra: nodes that it may add.
    by_runtime: compare through ONNX Runtime, unoptimized, what the reference evaluator cannot run (onnx 1.23:
    transposed convolutions with groups, negative pads).
    """
    before = M.to_bytes(model)
    out = Fold()(model, None)
    assert M.to_bytes(model) == before
    assert M.to_bytes(Fold()(model, None)) == M.to_bytes(out)
    assert M.to_bytes(Fold()(out, None)) == M.to_bytes(out)
    assert M.signature(out) == M.signature(model)
    onnx.checker.check_model(M.to_proto(out), full_check=True)
    assert len(list(out.graph)) <= len([n for n in model.graph if n.op_type != "Constant"]) + extra
    names = [n.name for n in out.graph]
    assert all(names)
    assert len(set(names)) == len(names)
    assert set(out.opset_imports) <= set(model.opset_imports)
    inputs = M.seeded_inputs(M.signature(model), batch, seed=5)
    inputs = {k: v * 4 - 2 if v.dtype.kind == "f" else v for k, v in inputs.items()}
    want, have = (results(m, inputs, by_runtime) for m in (model, out))
    for a, b in zip(want, have, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        bound = tolerance * max(1.0, float(np.abs(a).max())) if a.dtype.kind == "f" else 0
        np.testing.assert_allclose(b, a, rtol=0, atol=bound)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    out = check(MODELS[name](), batch=2)
    assert not ops(out)["BatchNormalization"]
    for value in (o for n in out.graph for o in n.outputs if o.name):
        assert value.shape is not None, value
        assert all(isinstance(d, int) or d.value == "batch" for d in value.shape), value


# --- batch norm -----------------------------------------------------------------------------------
BEFORE: dict[str, tuple[str, Arrays, int]] = {
    "conv": ("a = Conv(x, w)", {"w": normal(6, 4, 3, 3)}, 6),
    "conv with bias": ("a = Conv(x, w, b)", {"w": normal(6, 4, 3, 3), "b": normal(6)}, 6),
    "depthwise": ("a = Conv<group=4>(x, w)", {"w": normal(8, 1, 3, 3)}, 8),
    "grouped": ("a = Conv<group=2>(x, w)", {"w": normal(6, 2, 3, 3)}, 6),
    "transposed": ("a = ConvTranspose<strides=[2,2]>(x, w)", {"w": normal(4, 5, 3, 3)}, 5),
    "transposed in groups": ("a = ConvTranspose<group=2>(x, w, b)", {"w": normal(4, 3, 2, 2), "b": normal(6)}, 6),
}


@pytest.mark.parametrize("case", BEFORE)
def test_batch_norm_after_a_convolution(case: str) -> None:
    line, weights, channels = BEFORE[case]
    model = build(
        f"net (float[batch,4,7,7] x) => (float[batch,{channels},p,q] y) {{ {line} y = BatchNormalization<epsilon=0.01>(a, g, be, m, v) }}",  # noqa: E501
        **weights, **statistics(channels),
    )  # fmt: skip
    out = check(model, by_runtime="groups" in case)
    assert len(list(out.graph)) == 1


@pytest.mark.parametrize("case", BEFORE)
def test_batch_norm_written_as_arithmetic(case: str) -> None:
    """tf2onnx leaves Mul and Add; a Sub, Div or a factor on the left are the same."""
    line, weights, channels = BEFORE[case]
    shape = (channels, 1, 1)
    model = build(
        f"""net (float[batch,4,7,7] x) => (float[batch,{channels},p,q] y) {{ {line} c = Mul(s, a) d = Sub(c, t)
          e = Div(d, u) f = Sub(o, e) y = Add(f, z) }}""",
        s=normal(1, *shape), t=normal(*shape), u=positive(*shape), o=np.float32(0.7), z=normal(1, 1, 1, 1), **weights,
    )  # fmt: skip
    assert len(list(check(model, by_runtime="groups" in case).graph)) == 1


@pytest.mark.parametrize("line", ["Gemm(x, w, b)", "Gemm<transB=1>(x, wt, b)", "Gemm<alpha=0.5,beta=2.0>(x, w, b)",
                                  "MatMul(x, w)",
                                  "Gemm<beta=0.5>(x, w, b1)", "Gemm(x, w, row)", "Gemm(x, w)"])  # fmt: skip
def test_batch_norm_after_a_dense_layer(line: str) -> None:
    w = normal(5, 7)
    model = build(
        f"net (float[batch,5] x) => (float[batch,7] y) {{ a = {line} y = BatchNormalization(a, g, be, m, v) }}",
        w=w, wt=np.ascontiguousarray(w.T), b=normal(7), b1=normal(1), row=normal(1, 7), **statistics(7),
    )  # fmt: skip
    assert ops(check(model)) == {"Gemm": 1}


def test_batch_norm_alone_is_one_mul_and_one_add() -> None:
    model = build(
        "net (float[batch,4,3,3] x) => (float[batch,4,3,3] y) { r = Relu(x) y = BatchNormalization(r, g, be, m, v) }",
        **statistics(4),
    )
    assert ops(check(model, extra=1)) == {"Relu": 1, "Mul": 1, "Add": 1}


@pytest.mark.parametrize("variance", [0.0, -1.0, -1e-5])
def test_batch_norm_with_a_bad_variance_stays_what_it_is(variance: float) -> None:
    values = statistics(3) | {"v": np.array([1.0, variance, 1.0], np.float32)}
    model = build(
        """net (float[batch,3,4,4] x) => (float[batch,3,4,4] y) { c = Conv(x, w)
          y = BatchNormalization(c, g, be, m, v) }""",
        w=normal(3, 3, 1, 1),
        **values,
    )
    out = Fold()(model, None)
    assert ops(out)["BatchNormalization"] == (0 if variance == 0 else 1)
    if variance == 0:
        check(model, tolerance=1e-4)


def test_batch_norm_in_training_mode_stays() -> None:
    model = build(
        """net (float[4,3,4,4] x) => (float[4,3,4,4] y) { a = Conv(x, w)
          y, m1, v1 = BatchNormalization<training_mode=1>(a, g, be, m, v) }""",
        w=normal(3, 3, 1, 1), **statistics(3),
    )  # fmt: skip
    (node,) = [n for n in Fold()(model, None).graph if n.op_type == "BatchNormalization"]
    assert node.attributes["training_mode"].value == 1


# --- what must not be folded ------------------------------------------------------------------------
def test_a_convolution_that_others_read_keeps_its_numbers() -> None:
    model = build(
        """net (float[batch,3,4,4] x) => (float[batch,3,4,4] y, float[batch,3,4,4] z) {
          a = Conv(x, w) y = BatchNormalization(a, g, be, m, v) z = Relu(a) }""",
        w=normal(3, 3, 1, 1), **statistics(3),
    )  # fmt: skip
    check(model, extra=1)


def test_a_convolution_that_is_an_output_keeps_its_numbers() -> None:
    model = build(
        "net (float[batch,3,4,4] x) => (float[batch,3,4,4] a, float[batch,3,4,4] y) { a = Conv(x, w) y = Mul(a, s) }",
        w=normal(3, 3, 1, 1), s=normal(3, 1, 1),
    )  # fmt: skip
    assert ops(check(model)) == {"Conv": 1, "Mul": 1}


def test_shared_weights_are_scaled_for_one_user_only() -> None:
    model = build(
        """net (float[batch,3,4,4] x) => (float[batch,3,4,4] y) {
          a = Conv(x, w, b) c = Mul(a, s) d = Add(c, t) y = Conv(d, w, b) }""",
        w=normal(3, 3, 1, 1), b=normal(3), s=normal(3, 1, 1), t=normal(3, 1, 1),
    )  # fmt: skip
    assert ops(check(model)) == {"Conv": 2}


def test_weights_that_a_caller_may_replace_stay() -> None:
    """An initializer that is also an input is only a default."""
    model = build(
        "net (float[batch,5] x, float[5,7] w, float[7] s) => (float[batch,7] y) { a = MatMul(x, w) y = Mul(a, s) }",
        w=normal(5, 7), s=normal(7),
    )  # fmt: skip
    assert ops(check(model)) == {"MatMul": 1, "Mul": 1}


@pytest.mark.parametrize("shape", [(4, 4), (1, 4), (4, 1), (3, 4, 4), (2, 3, 1, 1)])
def test_a_constant_that_varies_over_the_image_stays(shape: tuple[int, ...]) -> None:
    model = build(
        "net (float[2,3,4,4] x) => (float[2,3,4,4] y) { a = Conv(x, w) y = Add(a, t) }",
        w=normal(3, 3, 1, 1), t=normal(*shape),
    )  # fmt: skip
    assert ops(check(model, batch=2)) == {"Conv": 1, "Add": 1}


def test_a_constant_that_broadcasts_the_result_stays() -> None:
    model = build(
        "net (float[batch,3,4,4] x) => (float[batch,5,4,4] y) { a = Conv(x, w) y = Mul(a, s) }",
        w=normal(1, 3, 1, 1), s=normal(5, 1, 1),
    )  # fmt: skip
    assert ops(check(model)) == {"Conv": 1, "Mul": 1}
    more = build(
        "net (float[5] x) => (float[1,7] y) { a = MatMul(x, w) y = Mul(a, s) }", w=normal(5, 7), s=normal(1, 7)
    )
    check(more)


def test_an_overflow_in_the_weights_is_not_made() -> None:
    model = build(
        "net (float[batch,3] x) => (float[batch,2] y) { a = MatMul(x, w) y = Mul(a, s) }",
        w=np.full((3, 2), 1e30, np.float32), s=np.float32(1e30),
    )  # fmt: skip
    assert ops(Fold()(model, None)) == {"MatMul": 1, "Mul": 1}


def test_integers_are_never_folded() -> None:
    model = build(
        "net (int32[batch,3] x) => (int32[batch,2] y) { a = MatMul(x, w) y = Add(a, s) }",
        w=np.arange(6, dtype=np.int32).reshape(3, 2), s=np.array([7, 8], np.int32),
    )  # fmt: skip
    assert ops(check(model)) == {"MatMul": 1, "Add": 1}


def test_half_precision_stays_half_precision() -> None:
    """ONNX Runtime computes float16 in float32 on a CPU: it would write casts, and Softmax in pieces, into the file."""
    model = build(
        """net (float16[batch,4] x) => (float16[batch,3] y) { a = MatMul(x, w) b = Mul(a, s) c = Identity(b)
          d = Softmax(c) y = Sqrt(d) }""",
        w=normal(4, 3).astype(np.float16), s=np.float16(3),
    )  # fmt: skip
    assert ops(check(model, tolerance=2e-3)) == {"MatMul": 1, "Mul": 1, "Softmax": 1, "Sqrt": 1}


def test_a_quantized_model_is_left_alone() -> None:
    model = build(
        """net (float[batch,4] x) => (float[batch,3] y) { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
          e = DequantizeLinear(q, s, z) w = DequantizeLinear(wq, s, z) a = MatMul(d, w) b = MatMul(e, w) c = Add(a, b)
          u = Transpose(c) v = Transpose(u) y = Add(v, t) }""",
        s=np.float32(0.1), z=np.int8(0), wq=np.arange(12, dtype=np.int8).reshape(4, 3), t=normal(3),
    )  # fmt: skip
    assert ops(check(model)) == ops(model)


# --- dense layers ---------------------------------------------------------------------------------
def test_matmul_and_add_are_a_gemm_of_more_axes_between_reshapes() -> None:
    flat = build(
        "net (float[batch,5] x) => (float[batch,7] y) { a = MatMul(x, w) y = Add(b, a) }", w=normal(5, 7), b=normal(7)
    )
    assert ops(check(flat)) == {"Gemm": 1}
    deep = build(
        "net (float[batch,4,5] x) => (float[batch,4,7] y) { a = MatMul(x, w) c = Mul(a, s) y = Add(b, c) }",
        w=normal(5, 7), b=normal(7), s=normal(7),
    )  # fmt: skip
    assert ops(check(deep)) == {"Reshape": 2, "Gemm": 1}
    # as Keras writes the projections of an attention: the bias behind a reshape into heads
    heads = build(
        "net (float[batch,4,6] x) => (float[batch,4,2,3] y) { a = MatMul(x, w) c = Reshape(a, s) y = Add(c, b) }",
        w=normal(6, 6), b=normal(2, 3), s=np.array([-1, 4, 2, 3]),
    )  # fmt: skip
    assert ops(check(heads)) == {"Reshape": 2, "Gemm": 1}


def test_what_is_no_bias_stays_an_addition() -> None:
    per_row = build(
        "net (float[batch,4,5] x) => (float[batch,4,7] y) { a = MatMul(x, w) y = Add(a, b) }",
        w=normal(5, 7), b=normal(4, 7),
    )  # fmt: skip
    assert ops(check(per_row)) == {"MatMul": 1, "Add": 1}
    open_sizes = build(
        "net (float[batch,steps,5] x) => (float[batch,steps,7] y) { a = MatMul(x, w) y = Add(a, b) }",
        w=normal(5, 7), b=normal(7),
    )  # fmt: skip
    folded = Fold()(open_sizes, None)
    assert ops(folded) == {"MatMul": 1, "Add": 1}
    vector = build("net (float[5] x) => (float[7] y) { a = MatMul(x, w) y = Add(b, a) }", w=normal(5, 7), b=normal(7))
    assert ops(check(vector)) == {"MatMul": 1, "Add": 1}


# --- data movement --------------------------------------------------------------------------------
def test_transposes_cancel_and_merge() -> None:
    model = build(
        """net (float[batch,2,3,4] x) => (float[batch,2,3,4] y, float[4,3,2,batch] z) {
          a = Transpose<perm=[0,2,3,1]>(x) b = Transpose<perm=[0,3,1,2]>(a) y = Relu(b)
          c = Transpose<perm=[1,0,2,3]>(x) d = Transpose<perm=[1,0,2,3]>(c) z = Transpose(d) }"""
    )
    assert ops(check(model)) == {"Relu": 1, "Transpose": 1}


def test_the_leading_transpose_stays() -> None:
    out = check(MODELS["mobile_nhwc"]())
    first = next(n for n in out.graph if n.op_type == "Transpose")
    assert tuple(first.attributes["perm"].value) == (0, 3, 1, 2)
    assert ops(out)["Transpose"] == 1


def test_reshape_chains_become_their_last_link() -> None:
    model = build(
        """net (float[batch,2,3,4] x) => (float[batch,24] y, float[batch,2,3,4] z, float[batch,8,3] u) {
          a = Reshape(x, s1) b = Unsqueeze(a, ax) c = Squeeze(b, ax) y = Flatten(c)
          d = Reshape(x, s2) z = Reshape(d, s3)
          n = Shape<start=0,end=1>(x) t = Concat<axis=0>(n, rest) u = Reshape(x, t) }""",
        s1=[-1, 6, 4], ax=[1], s2=[-1, 4], s3=[-1, 2, 3, 4], rest=[8, 3],
    )  # fmt: skip
    out = check(model)
    assert ops(out) == {"Reshape": 2, "Identity": 1}
    for node in (n for n in out.graph if n.op_type == "Reshape"):
        target = M.constant(node.inputs[1])
        assert target is not None
        assert target[0] == -1


@pytest.mark.parametrize(("pads", "kind", "fused"), [
    ([0, 0, 1, 2, 0, 0, 0, 1], "zero", True), ([0, 1, 0, 0, 0, 0, 0, 0], "zero", False),
    ([0, 0, 1, 1, 0, 0, 1, 1], "one", False), ([0, 0, -1, 0, 0, 0, 0, 0], "zero", False),
])  # fmt: skip
def test_padding_of_zeros_goes_into_the_convolution(pads: list[int], kind: str, fused: bool) -> None:
    channels = 3 + pads[1]
    model = build(
        "net (float[batch,3,6,6] x) => (float[batch,2,p,q] y) { a = Pad(x, pads, c) y = Conv<pads=[1,0,0,0]>(a, w) }",
        pads=pads, c=np.float32(kind == "one"), w=normal(2, channels, 3, 3),
    )  # fmt: skip
    assert ops(check(model, by_runtime=min(pads) < 0)) == ({"Conv": 1} if fused else {"Pad": 1, "Conv": 1})


def test_padding_over_named_axes_and_reflection() -> None:
    text = "net (float[batch,3,6,6] x) => (float[batch,2,p,q] y) {{ a = Pad{}(x, pads, , ax) y = Conv(a, w) }}"
    weights = {"pads": [1, 2, 0, 1], "ax": [-1, 2], "w": normal(2, 3, 3, 3)}
    assert ops(check(build(text.format(""), **weights))) == {"Conv": 1}
    assert ops(check(build(text.format('<mode="reflect">'), **weights))) == {"Conv": 1, "Pad": 1}


# --- the rest of a graph --------------------------------------------------------------------------
def test_dead_nodes_equal_nodes_and_constants_go() -> None:
    model = build(
        """net (float[batch,4] x) => (float[batch,4] y) { one = Constant<value_float=1.0>() two = Add(one, one)
          dead = Sin(x) a = Exp(x) b = Exp(x) c = Mul(a, two) d = Mul(b, two) e = Add(c, d)
          f = Identity(e) y = Dropout(f) }"""
    )
    out = check(model)
    assert ops(out) == {"Exp": 1, "Mul": 1, "Add": 1}


def test_outputs_that_are_the_same_value_keep_their_names() -> None:
    model = build(
        """net (float[batch,4] x) => (float[batch,4] y, float[batch,4] z, float[batch,4] u, float[batch,4] t) {
          y = Relu(x) z = Identity(y) u = Relu(x) t = Identity(x) }"""
    )
    check(model)


def test_branches_and_loops_survive() -> None:
    model = build(
        """net (float[3,4] x, bool c) => (float[3,4] y) {
          k = Relu(x)
          i = If (c) <then_branch = g1 () => (float[3,4] a) { p = Identity(k) a = Mul(p, w) },
                      else_branch = g2 () => (float[3,4] b) { b = Sub(k, x) }>
          y = Add(i, x) }""",
        w=normal(4),
    )  # fmt: skip
    for flag in (True, False):
        out = Fold()(model, None)
        x = normal(3, 4)
        inputs = {"x": x, "c": np.array(flag)}
        for a, b in zip(*(ReferenceEvaluator(M.to_proto(m)).run(None, inputs) for m in (model, out)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert M.to_bytes(Fold()(out, None)) == M.to_bytes(out)


def test_a_symbolic_batch_keeps_its_name_everywhere() -> None:
    model = build(
        """net (float[N,3,4] x) => (float[N,12] y) { s = Shape(x) n = Gather(s, zero) m = Unsqueeze(n, ax)
          t = Concat<axis=0>(m, rest) r = Reshape(x, t) q = Sin(r) y = Flatten(q) }""",
        zero=np.int64(0), ax=[0], rest=[12],
    )  # fmt: skip
    out = check(model)
    assert ops(out) == {"Reshape": 1, "Sin": 1}
    assert all(str(o.shape) == "[N,12]" for n in out.graph for o in n.outputs)


def test_unnamed_nodes_get_names_and_doubled_ones_their_own() -> None:
    model = build("net (float[batch,4] x) => (float[batch,4] y) { a = Sin(x) b = Exp(a) y = Neg(b) }")
    nodes = list(model.graph)
    nodes[0].name, nodes[1].name, nodes[2].name = "n", "n", None
    names = [n.name for n in check(model).graph]
    assert names == ["n", "n_1", "Neg_y"]


# --- operators written in pieces --------------------------------------------------------------------
GELU = {
    "as the paper": "s = Div(x, r2) e = Erf(s) p = Add(e, one) h = Mul(x, p) y = Mul(h, half)",
    "half first": "s = Mul(ir2, x) e = Erf(s) p = Add(one, e) h = Mul(half, x) y = Mul(h, p)",
    "by its complement": "m = Neg(x) s = Mul(m, ir2) e = Erf(s) p = Sub(one, e) h = Mul(half, x) y = Mul(h, p)",
}
ROOTS = {"r2": np.float32(2**0.5), "ir2": np.float32(0.5**0.5), "one": np.float32(1), "half": np.float32(0.5)}


@pytest.mark.parametrize("case", GELU)
def test_gelu(case: str) -> None:
    model = build(f"net (float[batch,7] x) => (float[batch,7] y) {{ {GELU[case]} }}", **ROOTS)
    assert ops(check(model)) == {"Gelu": 1}


@pytest.mark.parametrize("case", GELU)
@pytest.mark.parametrize("wrong", ["one", "half", "ir2", "r2"])
def test_almost_gelu_is_not_gelu(case: str, wrong: str) -> None:
    weights = ROOTS | {wrong: np.float32(ROOTS[wrong] * 1.001)}
    out = check(build(f"net (float[batch,7] x) => (float[batch,7] y) {{ {GELU[case]} }}", **weights))
    assert ops(out)["Gelu"] == (0 if f" {wrong})" in GELU[case] or f"({wrong}," in GELU[case] else 1)


TANH_GELU = {
    "as the paper": "c = Pow(x, three) k = Mul(cube, c) s = Add(x, k) u = Mul(root, s) t = Tanh(u) "
    "p = Add(one, t) h = Mul(half, x) y = Mul(h, p)",
    "by products": "q = Mul(x, x) c = Mul(q, x) k = Mul(c, cube) s = Add(k, x) u = Mul(s, root) t = Tanh(u) "
    "p = Add(t, one) h = Mul(x, p) y = Mul(h, half)",
    "x outside": "q = Mul(x, x) k = Mul(q, cube) s = Add(k, one) r = Mul(x, root) u = Mul(r, s) t = Tanh(u) "
    "p = Add(t, one) h = Mul(x, half) y = Mul(h, p)",
}
TANH_NUMBERS = {
    "three": np.float32(3), "cube": np.float32(0.044715), "root": np.float32((2 / np.pi) ** 0.5),
    "one": np.float32(1), "half": np.float32(0.5),
}  # fmt: skip


@pytest.mark.parametrize("case", TANH_GELU)
def test_tanh_gelu(case: str) -> None:
    model = build(f"net (float[batch,7] x) => (float[batch,7] y) {{ {TANH_GELU[case]} }}", **TANH_NUMBERS)
    out = check(model)
    assert ops(out) == {"Gelu": 1}
    assert next(iter(out.graph)).attributes.get_string("approximate") == "tanh"


@pytest.mark.parametrize("case", TANH_GELU)
@pytest.mark.parametrize("wrong", ["one", "half", "cube", "root", "three"])
def test_almost_tanh_gelu_is_not_gelu(case: str, wrong: str) -> None:
    weights = TANH_NUMBERS | {wrong: np.float32(TANH_NUMBERS[wrong] * 1.001)}
    out = check(build(f"net (float[batch,7] x) => (float[batch,7] y) {{ {TANH_GELU[case]} }}", **weights))
    assert ops(out)["Gelu"] == (0 if f" {wrong})" in TANH_GELU[case] or f"({wrong}," in TANH_GELU[case] else 1)


def test_gelu_of_another_value_is_not_gelu() -> None:
    text = f"net (float[batch,7] z, float[batch,7] x) => (float[batch,7] y) {{ {GELU['half first']} }}".replace(
        "Mul(half, x)", "Mul(half, z)"
    )
    assert ops(check(build(text, **ROOTS)))["Gelu"] == 0


@pytest.mark.parametrize(("top", "fused"), [(6, True), (5, False)])
@pytest.mark.parametrize("tail", ["h = Mul(x, c) y = Div(h, six)", "h = Mul(c, sixth) y = Mul(h, x)"])
def test_hard_swish(tail: str, top: int, fused: bool) -> None:
    model = build(
        f"net (float[batch,7] x) => (float[batch,7] y) {{ a = Add(x, three) c = Clip(a, zero, top) {tail} }}",
        three=np.float32(3), zero=np.float32(0), six=np.float32(6), sixth=np.float32(1 / 6), top=np.float32(top),
    )  # fmt: skip
    assert (ops(check(model)) == {"HardSwish": 1}) == fused


@pytest.mark.parametrize(("rank", "fused"), [(1, True), (2, True), (3, False)])
def test_hard_swish_of_constants_with_axes(rank: int, fused: bool) -> None:
    """As TensorFlow's graphs have them; one axis more than x has makes another shape."""
    out = "float[batch,7]" if fused else "float[1,batch,7]"
    model = build(
        f"net (float[batch,7] x) => ({out} y) {{ a = Add(x, three) c = Clip(a, zero, six) h = Mul(c, sixth) "
        "y = Mul(x, h) }",
        three=np.full((1,) * rank, 3, np.float32), zero=np.float32(0), six=np.float32(6), sixth=np.float32(1 / 6),
    )  # fmt: skip
    assert (ops(check(model)) == {"HardSwish": 1}) == fused


MEAN = "m = ReduceMean(x, axes) d = Sub(x, m)"
SPREAD = "q = Mul(d, d) v = ReduceMean(q, axes) e = Add(v, eps) s = Sqrt(e)"
LAYER_NORM = {
    "divided": f"{MEAN} {SPREAD} n = Div(d, s) t = Mul(n, g) y = Add(t, b)",
    "power": f"{MEAN} q = Pow(d, two) v = ReduceMean(q, axes) e = Add(eps, v) s = Sqrt(e) "
    "n = Div(d, s) t = Mul(g, n) y = Add(b, t)",
    "pooled": "m = GlobalAveragePool(x) d = Sub(x, m) q = Mul(d, d) v = GlobalAveragePool(q) e = Add(v, eps) "
    "s = Sqrt(e) r = Reciprocal(s) k = Mul(r, g) u = Neg(m) w = Mul(u, k) o = Add(w, b) t = Mul(x, k) y = Add(t, o)",
    "no offset": f"{MEAN} {SPREAD} r = Reciprocal(s) k = Mul(r, g) u = Neg(m) w = Mul(u, k) t = Mul(x, k) "
    "y = Add(t, w)",
    "subtracted": f"{MEAN} {SPREAD} r = Reciprocal(s) k = Mul(r, g) w = Mul(m, k) o = Sub(b, w) t = Mul(x, k) "
    "y = Add(t, o)",
}


@pytest.mark.parametrize("case", LAYER_NORM)
def test_layer_normalization(case: str) -> None:
    weights = {"eps": np.float32(1e-3), "two": np.float32(2), "g": normal(1, 1, 6), "b": normal(6)}
    text = f"net (float[batch,5,6] x) => (float[batch,5,6] y) {{ {LAYER_NORM[case]} }}"
    assert ops(check(build(text, axes=[-1], **weights))) == {"LayerNormalization": 1}
    if "axes" in text:
        assert ops(check(build(text, axes=[1], **weights)))["LayerNormalization"] == 0
        assert ops(check(build(text, axes=[1, 2], **weights)))["LayerNormalization"] == 0


@pytest.mark.parametrize(
    ("perm", "left"), [([1, 2, 0], {"Sin": 1}), ([2, 1, 0], {"Sin": 1, "Reshape": 1, "Transpose": 1})]
)
def test_a_transpose_that_undoes_a_reshape_goes_with_it(perm: list[int], left: dict[str, int]) -> None:
    """(batch, 5, 1) as (1, batch, 5) and back: only the axis of size 1 moves."""
    text = (
        "net (float[batch,5,1] x) => (float[p,q,1] y) {{ r = Reshape(x, to) t = Transpose<perm=[{}]>(r) y = Sin(t) }}"
    )
    model = build(text.format(",".join(map(str, perm))), to=[1, -1, 5])
    assert ops(check(model)) == left


def test_an_expand_that_readers_do_not_need_goes() -> None:
    model = build(
        """net (float[batch,3,4] x) => (float[batch,3,4] y) { s = Shape(x) e = Expand(c, s) n = Not(e) a = Or(n, mask)
          f = Cast<to=1>(a) y = Add(x, f) }""",
        c=np.array([True, False, True, True]), mask=np.eye(4, dtype=bool)[:3],
    )  # fmt: skip
    assert ops(check(model)) == {"Add": 1}


@pytest.mark.parametrize("tail", ["y = Relu(e)", "r = Softmax(e) y = Add(r, x)", "y = Add(e, k)"])
def test_an_expand_that_gives_the_size_stays(tail: str) -> None:
    model = build(
        f"net (float[batch,3,4] x) => (float[batch,3,4] y) {{ s = Shape(x) e = Expand(c, s) {tail} }}",
        c=normal(4), k=normal(3, 4),
    )  # fmt: skip
    assert ops(check(model))["Expand"] == 1


def test_the_bias_behind_a_reshape_joins_the_dense_layer() -> None:
    model = build(
        """net (float[batch,3,4] x) => (float[batch,3,6] y, float[batch,9,2] z) {
          f = Reshape(x, flat) a = MatMul(f, w) r = Reshape(a, full) y = Add(r, b)
          c = MatMul(f, w2) q = Reshape(c, other) z = Add(q, b2) }""",
        flat=[-1, 4], full=[-1, 3, 6], other=[-1, 9, 2], w=normal(4, 6), w2=normal(4, 6), b=normal(6), b2=normal(2),
    )  # fmt: skip
    assert ops(check(model)) == {"Reshape": 3, "Gemm": 1, "MatMul": 1, "Add": 1}


def test_a_recurrent_layer_needs_no_zeros_to_start_from() -> None:
    model = build(
        """net (float[4,batch,3] x) => (float[4,1,batch,2] y) { s = Shape<start=1,end=2>(x) t = Concat<axis=0>(s, two)
          z = Expand(zero, t) h = Unsqueeze(z, first) y = LSTM<hidden_size=2>(x, w, r, , , h, h) }""",
        two=[2], zero=np.float32(0), first=[0], w=normal(1, 8, 3), r=normal(1, 8, 2),
    )  # fmt: skip
    out = Fold()(model, None)
    assert ops(out) == {"LSTM": 1}
    x = {"x": normal(4, 3, 3)}
    want, have = (M.FloatSession(m, optimize=False).run(x)["y"] for m in (model, out))
    np.testing.assert_allclose(have, want, atol=1e-6)


# --- random graphs --------------------------------------------------------------------------------
def _channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[1], *[1] * (len(shape) - 2))


def _conv(r: np.random.Generator, shape: tuple[int, ...]) -> tuple[str, list[np.ndarray], tuple[int, ...]]:
    out = int(r.integers(1, 4))
    weights = [r.normal(size=(out, shape[1], 1, 1)), *([r.normal(size=out)] if r.random() < 0.5 else [])]
    return "Conv", weights, (shape[0], out, *shape[2:])


STEPS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], tuple[str, list[np.ndarray], tuple[int, ...]]]] = {
    "conv": _conv,
    "mul": lambda r, s: ("Mul", [r.normal(size=_channels(s))], s),
    "add": lambda r, s: ("Add", [r.normal(size=_channels(s))], s),
    "sub": lambda r, s: ("Sub", [r.normal(size=())], s),
    "div": lambda r, s: ("Div", [r.random(_channels(s)) + 0.5], s),
    "bn": lambda r, s: ("BatchNormalization", [r.normal(size=s[1]) for _ in range(3)] + [r.random(s[1]) + 0.1], s),
    "relu": lambda r, s: ("Relu", [], s),
    "identity": lambda r, s: ("Identity", [], s),
    "swap": lambda r, s: ("Transpose<perm=[0,1,3,2]>", [], (s[0], s[1], s[3], s[2])),
    "rotate": lambda r, s: ("Transpose<perm=[0,2,3,1]>", [], (s[0], s[2], s[3], s[1])),
    "reshape": lambda r, s: ("Reshape", [np.array([-1, s[2], s[1], s[3]])], (s[0], s[2], s[1], s[3])),
    "squash": lambda r, s: ("Reshape", [np.array([0, 1, s[1] * s[2], s[3]])], (s[0], 1, s[1] * s[2], s[3])),
    "pad": lambda r, s: ("Pad", [np.array([0, 0, 1, 0, 0, 0, 0, 1])], (s[0], s[1], s[2] + 1, s[3] + 1)),
}


STEP = st.tuples(st.sampled_from(sorted(STEPS)), st.booleans(), st.integers(0, 3))  # kind, is an output, steps back


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(STEP, min_size=1, max_size=7), seed=st.integers(0, 1000))
def test_random_chains_with_branches(steps: list[tuple[str, bool, int]], seed: int) -> None:
    """A chain of anything after anything; each value may be an output too, and a step may start from an older value."""
    rng = np.random.default_rng(seed)
    values: list[tuple[str, tuple[int, ...]]] = [("x", (2, 3, 4, 5))]
    nodes, weights, outputs = [], {}, []
    for i, (kind, shown, back) in enumerate(steps):
        source, shape = values[-1 - (back if back < len(values) and rng.random() < 0.3 else 0)]
        op, constants, shape = STEPS[kind](rng, shape)
        names = [f"w{i}_{k}" for k in range(len(constants))]
        weights |= {
            n: c if c.dtype == np.int64 else c.astype(np.float32) for n, c in zip(names, constants, strict=True)
        }
        name, _, attributes = op.partition("<")
        nodes.append(f"v{i} = {name}{'<' + attributes if attributes else ''}({', '.join([source, *names])})")
        values.append((f"v{i}", shape))
        if shown or i == len(steps) - 1:
            outputs.append(f"float[batch,{','.join(map(str, shape[1:]))}] v{i}")
    model = build(f"net (float[batch,3,4,5] x) => ({', '.join(outputs)}) {{ {' '.join(nodes)} }}", **weights)
    check(model, batch=2, extra=sum(kind == "bn" for kind, *_ in steps), tolerance=2e-5)


# --- ONNX's own cases -------------------------------------------------------------------------------
def expanded_cases() -> list[Any]:
    """Operators spelled out as graphs by the ONNX project: attention, layer normalization, losses, ...; every sixth."""
    with warnings.catch_warnings():  # the cases' own arrays are made with overflows
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    found = [c for c in cases if c.name.endswith("_expanded") and "bernoulli" not in c.name]
    return [c for c in found if c.model.opset_import[0].version >= 21][::6]


@pytest.mark.parametrize("case", expanded_cases(), ids=lambda c: c.name)
def test_operators_spelled_out_by_onnx(case: Any) -> None:
    model = M.from_proto(case.model)
    inputs = dict(zip((i.name for i in case.model.graph.input), case.data_sets[0][0], strict=True))
    out = Fold()(model, None)
    assert len(list(out.graph)) <= len(list(model.graph))
    assert M.to_bytes(Fold()(out, None)) == M.to_bytes(out)
    try:
        want = results(model, inputs, by_runtime=False)
    except Exception as error:
        pytest.skip(f"the reference evaluator cannot run it: {error}")
    for a, b in zip(want, results(out, inputs, by_runtime=False), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


# --- real models ----------------------------------------------------------------------------------
EXPECTED = {
    "mobilenet_v2_cifar": {"Conv": 28, "Add": 3, "Gemm": 1, "Clip": 19, "Mul": 0, "Transpose": 1},
    "mlp_784_mnist": {"Gemm": 3, "Relu": 2, "Add": 0, "MatMul": 0},
    "dcgan_mnist_generator": {"ConvTranspose": 3, "Gemm": 1, "Mul": 0, "Add": 0},
    "lstm_mnist_rows": {"LSTM": 1, "Gemm": 1, "Expand": 0, "Shape": 0},
    "gpt_char_tinyshakespeare": {"Softmax": 4, "Gelu": 4, "LayerNormalization": 9, "Gemm": 24, "Shape": 0},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_zoo(zoo: Any, name: str) -> None:
    proto = onnx.version_converter.convert_version(onnx.load(zoo / "models" / f"{name}.onnx"), 21)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    model = M.from_proto(proto)
    out = Fold()(model, None)
    assert {op: ops(out)[op] for op in EXPECTED[name]} == EXPECTED[name]
    assert len(list(out.graph)) <= len(list(model.graph))
    inputs = M.seeded_inputs(M.signature(model), 4, high=60)
    want, have = (M.FloatSession(m, optimize=False).run(inputs) for m in (model, out))
    for key in want:
        assert np.abs(want[key] - have[key]).max() <= 1e-5 * np.abs(want[key]).max()
    assert M.to_bytes(Fold()(out, None)) == M.to_bytes(out)


def test_weights_are_float32_tensors_of_the_folded_graph() -> None:
    """Folding computes in float64 and writes the weights' own type."""
    out = check(MODELS["mobile_nhwc"]())
    kinds = {int(v.dtype) for v in out.graph.initializers.values() if v.dtype is not None}
    assert kinds <= {TensorProto.FLOAT, TensorProto.INT64}


def test_transposes_around_a_branching_activation_cancel() -> None:
    """Hard-swish as Keras exports it, between two convolutions in NHWC: the input is read twice."""
    rng = np.random.default_rng(0)
    model = build(
        """g (float[batch,9,9,3] x) => (float[batch,9,9,4] y) {
          a = Transpose<perm=[0,3,1,2]>(x)  b = Conv<kernel_shape=[3,3],pads=[1,1,1,1]>(a, w)
          c = Transpose<perm=[0,2,3,1]>(b)  d = Add(c, three)  e = Clip(d, zero, six)  f = Mul(c, e)
          s = ReduceMean<keepdims=1>(f, axes)  m = Mul(f, s)
          h = Transpose<perm=[0,3,1,2]>(m)  i = Conv<kernel_shape=[1,1]>(h, v)  y = Transpose<perm=[0,2,3,1]>(i) }""",
        w=rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        v=rng.normal(size=(4, 4, 1, 1)).astype(np.float32),
        three=np.float32(3), zero=np.float32(0), six=np.float32(6), axes=np.array([1, 2], np.int64),
    )  # fmt: skip
    folded = Fold()(model, None)
    assert sum(n.op_type == "Transpose" for n in folded.graph) == 2
    assert M.to_bytes(Fold()(model, None)) == M.to_bytes(folded)
    x = {"x": rng.normal(size=(2, 9, 9, 3)).astype(np.float32)}
    (expected,) = ReferenceEvaluator(M.to_proto(model)).run(None, x)
    assert M.difference(expected, M.FloatSession(folded, optimize=False).run(x)["y"]) < 1e-5


@pytest.mark.parametrize(
    ("kernel", "more", "whole"),
    [
        ("4, 4", "", True),
        ("4, 4", ', auto_pad="VALID"', True),
        ("4, 3", "", False),
        ("4, 4", ", pads=[0,0,0,1]", False),
    ],
)
def test_an_average_over_the_whole_image_is_a_global_one(kernel: str, more: str, whole: bool) -> None:
    model = build(
        f"g (float[N, 3, 4, 4] x) => (float[N, 3, a, b] y) {{ y = AveragePool <kernel_shape=[{kernel}]{more}> (x) }}"
    )
    folded = check(model)
    assert ops(folded)["GlobalAveragePool"] == int(whole)


def test_a_size_that_is_known_is_a_constant() -> None:
    model = build(
        """net (float[batch,3,4] x) => (float[batch,3,4] y, int64 n) {
          s = Shape(x) d = Gather(s, last) f = Cast<to=1>(d) r = Sqrt(f) y = Div(x, r) n = Gather(s, first) }""",
        last=np.array(-1), first=np.array(0),
    )  # fmt: skip
    assert ops(check(model)) == {"Shape": 1, "Gather": 1, "Div": 1}


@pytest.mark.parametrize("middle", ["Relu", "Clip", "MaxPool", "AveragePool"])
def test_one_dimensional_convolutions_meet_their_bias_and_activation(middle: str) -> None:
    """As tf2onnx writes Conv1D: the Squeeze and the Unsqueeze between two convolutions go."""
    step = {
        "Relu": "r = Relu (b)",
        "Clip": "r = Clip (b, lo, hi)",
        "MaxPool": "r = MaxPool <kernel_shape=[3], strides=[1], pads=[1, 1]> (b)",
        "AveragePool": "r = AveragePool <kernel_shape=[2], strides=[1], pads=[0, 1], count_include_pad=1> (b)",
    }[middle]
    model = build(
        f"""g (float[n, 2, 9] x) => (float[n, 4, 9] y) {{
            u = Unsqueeze (x, at)
            c = Conv <pads=[0, 1, 0, 1]> (u, w)
            s = Squeeze (c, at)
            b = Add (s, bias)
            {step}
            v = Unsqueeze (r, at)
            d = Conv <pads=[0, 1, 0, 1]> (v, w2)
            t = Squeeze (d, at)
            y = Add (t, t_bias)
        }}""",
        at=np.array([2]), lo=np.float32(0), hi=np.float32(1.5), w=normal(3, 2, 1, 3), w2=normal(4, 3, 1, 3),
        bias=normal(1, 3, 1), t_bias=normal(4, 1),
    )  # fmt: skip
    folded = check(model, by_runtime=middle == "MaxPool")  # onnx 1.23's evaluator pads the other axis of it
    assert ops(folded) == Counter({"Conv": 2, "Unsqueeze": 1, "Squeeze": 1, middle: 1})


def test_a_residual_between_one_dimensional_convolutions_is_added_before_the_squeeze() -> None:
    model = build(
        """g (float[n, 2, 9] x) => (float[n, 2, 9] y) {
            u = Unsqueeze (x, at)
            c = Conv <pads=[0, 1, 0, 1]> (u, w)
            s = Squeeze (c, at)
            r = Relu (s)
            v = Unsqueeze (r, at)
            d = Conv <pads=[0, 1, 0, 1]> (v, w2)
            t = Squeeze (d, at)
            y = Add (t, r)
        }""",
        at=np.array([2]), w=normal(2, 2, 1, 3), w2=normal(2, 2, 1, 3),
    )  # fmt: skip
    assert ops(check(model)) == Counter({"Conv": 2, "Unsqueeze": 1, "Squeeze": 1, "Relu": 1, "Add": 1})
