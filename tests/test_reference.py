"""The reference executor against Python integers and fractions, ONNX's own evaluator, and ONNX's node test cases."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.reference import ReferenceEvaluator

from edgekit.backends.reference import _ANY_OPERAND, Reference, execute
from edgekit.backends.reference.elementwise import ELEMENTWISE
from edgekit.backends.reference.movement import MOVES
from edgekit.backends.reference.values import Real, real
from edgekit.errors import ConversionMismatchError, NonFiniteError, ShapeError
from edgekit.model import from_proto

F32 = np.float32


class Graph:
    """Builds a QDQ model line by line."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: tuple[int | str, ...], dtype: int = TensorProto.INT8) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op: str, inputs: list[str], out: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"{op}_{out}", **attributes))
        return out

    def dq(self, x: str, scale: object, zero: np.ndarray, axis: int | None = None) -> str:
        names = [x, self.const(f"{x}_s{len(self.weights)}", np.asarray(scale, F32))]
        names.append(self.const(f"{x}_z{len(self.weights)}", zero))
        return self.node(
            "DequantizeLinear", names, f"{x}_dq{len(self.nodes)}", **({} if axis is None else {"axis": axis})
        )

    def q(self, x: str, out: str, scale: float, zero: int) -> str:
        names = [x, self.const(f"{out}_s", np.asarray(scale, F32)), self.const(f"{out}_z", np.asarray(zero, np.int8))]
        return self.node("QuantizeLinear", names, out)

    def proto(self, outputs: dict[str, int]) -> onnx.ModelProto:
        outs = [helper.make_tensor_value_info(n, t, None) for n, t in outputs.items()]
        graph = helper.make_graph(self.nodes, "g", self.inputs, outs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def rounded(value: Fraction, scale: float, zero: int) -> int:
    """Exactly what QuantizeLinear to int8 is, in rationals; Python's round() goes to even."""
    return max(-128, min(127, round(value / Fraction(float(F32(scale)))) + zero))


def conv_by_loops(x, w, bias, zx, strides, pads, dilations, group):
    """Accumulators of a convolution in Python integers, (n, m, *out)."""
    n, _, *size = x.shape
    m, per, *kernel = w.shape
    rank = len(size)
    out = [
        (size[a] + pads[a] + pads[a + rank] - (kernel[a] - 1) * dilations[a] - 1) // strides[a] + 1 for a in range(rank)
    ]
    acc = np.empty((n, m, *out), object)
    for b, o, *at in itertools.product(range(n), range(m), *map(range, out)):
        total = int(bias[o])
        for i, *tap in itertools.product(range(per), *map(range, kernel)):
            where = [at[a] * strides[a] + tap[a] * dilations[a] - pads[a] for a in range(rank)]
            if all(0 <= p < s for p, s in zip(where, size, strict=True)):
                channel = (o // (m // group)) * per + i
                total += (int(x[(b, channel, *where)]) - zx) * int(w[(o, i, *tap)])
        acc[(b, o, *at)] = total
    return acc


@st.composite
def conv_cases(draw):
    rank = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 1, 2, 3]))
    sides = [draw(st.integers(1, 5 if rank < 3 else 3)) for _ in range(rank)]
    kernel = [draw(st.integers(1, 3 if rank < 3 else 2)) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
    strides = [draw(st.integers(1, 3)) for _ in range(rank)]
    pads = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    for a in range(rank):
        sides[a] = max(sides[a], (kernel[a] - 1) * dilations[a] + 1 - pads[a] - pads[a + rank])
    per, mult = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    seed, zx, zy = draw(st.integers(0, 2**31)), draw(st.integers(-128, 127)), draw(st.integers(-128, 127))
    return group, per, mult, sides, kernel, dilations, strides, pads, seed, zx, zy


@settings(max_examples=80, deadline=None)
@given(conv_cases())
def test_conv_equals_python_integers(case):
    group, per, mult, sides, kernel, dilations, strides, pads, seed, zx, zy = case
    rng = np.random.default_rng(seed)
    m = group * mult
    x = rng.integers(-128, 128, (2, group * per, *sides), np.int8)
    w = rng.integers(-127, 128, (m, per, *kernel), np.int8)
    bias = rng.integers(-(2**14), 2**14, m, np.int32)
    sx, sw, sy = F32(rng.uniform(0.001, 0.1)), rng.uniform(0.001, 0.1, m).astype(F32), F32(rng.uniform(0.05, 2))
    g = Graph()
    xd = g.dq(g.input("x", x.shape), sx, np.asarray(zx, np.int8))
    wd = g.dq(g.const("w", w), sw, np.zeros(m, np.int8), 0)
    bd = g.dq(g.const("b", bias), sx * sw, np.zeros(m, np.int32), 0)
    y = g.node("Conv", [xd, wd, bd], "y", strides=strides, pads=pads, dilations=dilations, group=group)
    g.q(y, "yq", sy, zy)
    got = execute(from_proto(g.proto({"yq": TensorProto.INT8})), {"x": x})["yq"]
    acc = conv_by_loops(x, w, bias, zx, strides, pads, dilations, group)
    want = np.empty(acc.shape, np.int8)
    for at in np.ndindex(acc.shape):
        want[at] = rounded(Fraction(acc[at]) * Fraction(float(sx)) * Fraction(float(sw[at[1]])), sy, zy)
    np.testing.assert_array_equal(got, want)


@settings(max_examples=60, deadline=None)
@given(
    st.booleans(), st.booleans(), st.sampled_from(["none", "int32", "float", "matrix"]),
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31),
    st.sampled_from([1.0, 0.5]), st.booleans(),
)  # fmt: skip
def test_gemm_equals_fractions(flip_a, flip_b, kind, n, k, m, seed, alpha, per_channel):
    rng = np.random.default_rng(seed)
    a, w = rng.integers(-128, 128, (n, k), np.int8), rng.integers(-127, 128, (k, m), np.int8)
    za, zy = int(rng.integers(-128, 128)), int(rng.integers(-128, 128))
    sa, sy = F32(rng.uniform(0.001, 0.1)), F32(rng.uniform(0.05, 2))
    sw = rng.uniform(0.001, 0.1, m).astype(F32) if per_channel else np.full(m, rng.uniform(0.001, 0.1), F32)
    g = Graph()
    ad = g.dq(g.input("a", (k, n) if flip_a else (n, k)), sa, np.asarray(za, np.int8))
    stored = g.const("w", w.T.copy() if flip_b else w)
    zeros = np.zeros(m if per_channel else (), np.int8)
    wd = g.dq(stored, sw if per_channel else sw[0], zeros, (0 if flip_b else 1) if per_channel else None)
    names, extra = [ad, wd], [[Fraction(0)] * m for _ in range(n)]
    if kind == "int32":
        b = rng.integers(-5000, 5000, m, np.int32)
        scale = (sa * sw).astype(F32)
        names.append(g.dq(g.const("b", b), scale, np.zeros(m, np.int32), 0))
        # a bias in accumulator units is added to the accumulator, otherwise it is a real number
        unit = (
            [Fraction(float(sa)) * Fraction(float(s)) for s in sw]
            if alpha == 1
            else [Fraction(float(s)) for s in scale]
        )
        extra = [[int(b[j]) * unit[j] for j in range(m)] for _ in range(n)]
    elif kind in ("float", "matrix"):
        b = rng.standard_normal((n, m) if kind == "matrix" else m).astype(F32)
        names.append(g.const("b", b))
        extra = [[Fraction(float(v)) for v in row] for row in np.broadcast_to(b, (n, m))]
    g.q(g.node("Gemm", names, "y", transA=int(flip_a), transB=int(flip_b), alpha=alpha), "yq", sy, zy)
    got = execute(from_proto(g.proto({"yq": TensorProto.INT8})), {"a": a.T.copy() if flip_a else a})["yq"]
    for i, j in np.ndindex(n, m):
        acc = sum((int(a[i, t]) - za) * int(w[t, j]) for t in range(k))
        value = acc * Fraction(float(sa)) * Fraction(float(sw[j])) * Fraction(alpha) + extra[i][j]
        assert got[i, j] == rounded(value, sy, zy)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2), st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3),
    st.integers(0, 1), st.integers(0, 1), st.integers(0, 2**31), st.booleans(),
)  # fmt: skip
def test_conv_transpose_equals_evaluator(rank, group, kernel, dilation, stride, pad, extra, seed, per_channel):
    """Power-of-two scales: float32 arithmetic of ONNX's evaluator is exact, so the integers must be equal."""
    rng = np.random.default_rng(seed)
    pad = min(pad, (kernel - 1) * dilation // 2)
    extra = min(extra, max(stride, dilation) - 1)
    x = rng.integers(-128, 128, (2, 2 * group, *[3] * rank), np.int8)
    w = rng.integers(-127, 128, (2 * group, 2, *[kernel] * rank), np.int8)
    g = Graph()
    xd = g.dq(g.input("x", x.shape), 2.0**-4, np.asarray(-7, np.int8))
    scale = 2.0 ** rng.integers(-8, -4, 2) if per_channel else np.asarray(2.0**-6)
    wd = g.dq(g.const("w", w), scale, np.zeros(scale.shape, np.int8), 1 if per_channel else None)
    y = g.node("ConvTranspose", [xd, wd], "y", group=group, strides=[stride] * rank, dilations=[dilation] * rank,
               pads=[pad] * (2 * rank), output_padding=[extra] * rank)  # fmt: skip
    g.q(y, "yq", 0.25, 3)
    proto = g.proto({"yq": TensorProto.INT8})
    if per_channel or group > 1 or pad or extra or dilation > 1:
        want = transpose_by_loops(x, w, scale, stride, dilation, pad, extra, group)
    else:
        want = ReferenceEvaluator(proto).run(None, {"x": x})[0]
    np.testing.assert_array_equal(execute(from_proto(proto), {"x": x})["yq"], want)


def transpose_by_loops(x, w, scale, stride, dilation, pad, extra, group):
    """The same by scattering; ONNX's evaluator does not do every combination."""
    n, c, *size = x.shape
    per, rank, kernel = w.shape[1], len(size), w.shape[2:]
    full = [(s - 1) * stride + (k - 1) * dilation + 1 - 2 * pad + extra for s, k in zip(size, kernel, strict=True)]
    acc = np.zeros((n, per * group, *full), np.int64)
    for b, i, o, *rest in itertools.product(range(n), range(c), range(per), *map(range, size), *map(range, kernel)):
        at, tap = rest[:rank], rest[rank:]
        where = [p * stride + t * dilation - pad for p, t in zip(at, tap, strict=True)]
        if all(0 <= p < f for p, f in zip(where, full, strict=True)):
            acc[(b, (i // (c // group)) * per + o, *where)] += (int(x[(b, i, *at)]) + 7) * int(w[(i, o, *tap)])
    channel = np.broadcast_to(np.asarray(scale), (per,))[np.arange(per * group) % per].reshape(-1, *[1] * rank)
    return np.clip(np.rint(acc * 2.0**-4 * channel / 0.25) + 3, -128, 127).astype(np.int8)


def small_net() -> tuple[onnx.ModelProto, np.ndarray]:
    """Conv, Relu, pools, Pad, Concat, Add, Mul, Clip, Gemm with power-of-two scales: exact in float32 too."""
    rng = np.random.default_rng(3)
    g, z = Graph(), lambda v: np.asarray(v, np.int8)
    x = g.q(g.input("x", ("n", 4, 9, 9), TensorProto.FLOAT), "xq", 2.0**-5, 4)
    w = g.const("w1", rng.integers(-127, 128, (6, 4, 3, 3), np.int8))
    wd = g.dq(w, 2.0 ** rng.integers(-9, -5, 6), np.zeros(6, np.int8), 0)
    c = g.node("Relu", [g.node("Conv", [g.dq(x, 2.0**-5, z(4)), wd], "c", pads=[1, 1, 1, 1])], "r")
    c = g.q(c, "cq", 2.0**-3, -128)
    p = g.q(
        g.node("MaxPool", [g.dq(c, 2.0**-3, z(-128))], "p", kernel_shape=[3, 3], strides=[2, 2]), "pq", 2.0**-3, -128
    )
    a = g.node("AveragePool", [g.dq(c, 2.0**-3, z(-128))], "a", kernel_shape=[2, 2], strides=[2, 2])
    a = g.q(a, "aq", 2.0**-3, -128)
    cat = g.node("Concat", [g.dq(p, 2.0**-3, z(-128)), g.dq(a, 2.0**-3, z(-128))], "cat", axis=1)
    cat = g.q(cat, "catq", 2.0**-3, -128)
    pads = g.const("pads", np.array([0, 0, 1, 0, 0, 0, 0, 1]))
    pad = g.q(g.node("Pad", [g.dq(cat, 2.0**-3, z(-128)), pads], "pad"), "padq", 2.0**-3, -128)
    square = g.node("Mul", [g.dq(pad, 2.0**-3, z(-128)), g.dq(pad, 2.0**-3, z(-128))], "sq")
    square = g.q(g.node("Clip", [square, g.const("lo", F32(0.5)), g.const("hi", F32(60))], "cl"), "sqq", 2.0**-2, -128)
    add = g.node("Sub", [g.dq(square, 2.0**-2, z(-128)), g.dq(pad, 2.0**-3, z(-128))], "sub")
    add = g.q(add, "subq", 2.0**-1, -20)
    flat = g.node("Flatten", [g.dq(add, 2.0**-1, z(-20))], "flat")
    flat = g.q(flat, "flatq", 2.0**-1, -20)
    k = 12 * 25
    wd = g.dq(
        g.const("w2", rng.integers(-127, 128, (5, k), np.int8)),
        2.0 ** rng.integers(-11, -8, 5),
        np.zeros(5, np.int8),
        0,
    )
    y = g.q(g.node("Gemm", [g.dq(flat, 2.0**-1, z(-20)), wd], "y", transB=1), "yq", 2.0, 1)
    g.node("DequantizeLinear", [y, "yq_s", "yq_z"], "out")
    return g.proto({"out": TensorProto.FLOAT}), rng.standard_normal((5, 4, 9, 9)).astype(F32)


def test_whole_net_equals_evaluator_in_every_tensor():
    proto, x = small_net()
    tensors = [n.output[0] for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    got = execute(from_proto(proto), {"x": x}, tensors)
    want_proto = onnx.ModelProto()
    want_proto.CopyFrom(proto)
    for name in tensors:
        want_proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT8, None))
    want = ReferenceEvaluator(want_proto).run(None, {"x": x})
    assert got["out"].dtype == np.float32
    np.testing.assert_array_equal(got["out"], want[0])
    for name, array in zip(tensors, want[1:], strict=True):
        assert got[name].dtype == np.int8
        assert len(np.unique(array)) > 5, name  # not a comparison of constants
        np.testing.assert_array_equal(got[name], array, err_msg=name)


# --- ONNX's node cases --------------------------------------------------------------------------------
CASES = {c.name: c for c in collect_testcases(None) if len(c.model.graph.node) == 1}
FOUR_DIGITS = {"test_averagepool_2d_ceil_last_window_starts_on_pad"}  # the case prints its expected values so


def of(ops: set[str]) -> list[str]:
    return sorted(
        name
        for name, c in CASES.items()
        if c.model.graph.node[0].op_type in ops
        and c.model.graph.node[0].domain == ""
        and c.model.opset_import[0].version >= onnx.defs.get_schema(c.model.graph.node[0].op_type, 21).since_version
        and len(c.model.graph.node[0].output) == 1
        and all(i.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.INT64) for i in c.model.graph.input)
    )


@pytest.mark.parametrize("name", of(set(_ANY_OPERAND) | set(ELEMENTWISE) | MOVES | {"Concat", "Pad", "Resize"}))
def test_operator_equals_onnx_node_case_on_exact_values(name):
    """Every float operand is given as an exact value, so that this package's own kernels answer."""
    if name == "test_resize_downsample_scales_cubic_align_corners":
        pytest.skip("cubic goes to ONNX Runtime, which aligns the corners of the rounded output size")
    case = CASES[name]
    model = from_proto(case.model)
    node = next(iter(model.graph))
    for arrays, expected in case.data_sets:
        given = [Real(np.asarray(a, np.float64)) if a.dtype == np.float32 else a for a in map(np.asarray, arrays)]
        by_name = dict(zip([i.name for i in case.model.graph.input], given, strict=True))
        if node.op_type in MOVES | {"Resize"}:  # the first is data, the others parameters
            by_name = {
                k: (np.asarray(real(v), F32) if i and isinstance(v, Real) else v)
                for i, (k, v) in enumerate(by_name.items())
            }
        operands = [None if v is None else by_name[v.name] for v in node.inputs]
        got = Reference(model)._compute(node, operands, {})
        bound = 1e-4 if name in FOUR_DIGITS else 2e-6
        np.testing.assert_allclose(real(got[0]), expected[0], rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize(
    "name", sorted(n for n in CASES if n.startswith(("test_quantizelinear", "test_dequantizelinear")))
)
def test_quantize_and_dequantize_equal_onnx_node_cases(name):
    case = CASES[name]
    types = {i.type.tensor_type.elem_type for i in (*case.model.graph.input, *case.model.graph.output)}
    simple = {TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16}
    if not types <= simple or "blocked" in name:
        pytest.skip("a type outside the quantized form")
    for arrays, expected in case.data_sets:
        inputs = dict(zip([i.name for i in case.model.graph.input], map(np.asarray, arrays), strict=True))
        got = execute(from_proto(case.model), inputs)
        np.testing.assert_array_equal(got[case.model.graph.output[0].name], expected[0])


@pytest.mark.parametrize("name", sorted(n for n in CASES if n.startswith(("test_qlinearconv", "test_qlinearmatmul"))))
def test_qlinear_node_cases_as_qdq(name):
    """QLinearConv and QLinearMatMul written as DequantizeLinear, operator, QuantizeLinear."""
    case = CASES[name]
    names = [i.name for i in case.model.graph.input]
    given = dict(zip(names, map(np.asarray, case.data_sets[0][0]), strict=True))
    if any(a.dtype == np.float16 for a in given.values()):
        pytest.skip("float16 scales are outside the quantized form")
    a, sa, za, b, sb, zb, sy, zy = (given[n] for n in names[:8])
    op = case.model.graph.node[0]
    g = Graph()
    ad = g.dq(g.input("a", a.shape, helper.np_dtype_to_tensor_dtype(a.dtype)), sa.reshape(()), za.reshape(()))
    bd = g.dq(
        g.const("b", b),
        sb if sb.size > 1 else sb.reshape(()),
        zb if sb.size > 1 else zb.reshape(()),
        0 if sb.size > 1 else None,
    )
    g.nodes.append(helper.make_node(op.op_type.removeprefix("QLinear"), [ad, bd], ["y"]))
    g.nodes[-1].attribute.extend(op.attribute)
    names = ["y", g.const("ys", sy.reshape(())), g.const("yz", zy.reshape(()))]
    g.node("QuantizeLinear", names, "yq")
    got = execute(from_proto(g.proto({"yq": helper.np_dtype_to_tensor_dtype(zy.dtype)})), {"a": a})["yq"]
    np.testing.assert_array_equal(got, case.data_sets[0][1][0])


# --- the cases that break ---------------------------------------------------------------------------
def gemm_model(bias: int = 0) -> onnx.ModelProto:
    g = Graph()
    x = g.dq(g.input("x", ("n", 4)), 0.1, np.asarray(0, np.int8))
    w = g.dq(g.const("w", np.full((4, 1), 127, np.int8)), 0.1, np.asarray(0, np.int8))
    b = g.dq(g.const("b", np.array([bias], np.int32)), F32(0.1) * F32(0.1), np.asarray(0, np.int32))
    g.q(g.node("Gemm", [x, w, b], "y"), "yq", 1.0, 0)
    return g.proto({"yq": TensorProto.INT8})


def test_a_wrapping_accumulator_is_refused_by_name():
    x = np.full((1, 4), 127, np.int8)
    execute(from_proto(gemm_model(2**31 - 1 - 4 * 127 * 127)), {"x": x})
    with pytest.raises(ConversionMismatchError, match=r"Gemm_y.*2147483648"):
        execute(from_proto(gemm_model(2**31 - 4 * 127 * 127)), {"x": x})


def test_inputs_are_checked():
    model = from_proto(gemm_model())
    for bad in ({}, {"x": np.zeros((1, 4), F32)}, {"x": np.zeros((1, 5), np.int8)}, {"x": np.zeros(4, np.int8)}):
        with pytest.raises(ShapeError):
            execute(model, bad)
    with pytest.raises(ShapeError, match="nothing"):
        execute(model, {"x": np.zeros((1, 4), np.int8)}, ["nothing"])


def test_nan_is_refused_and_infinity_saturates():
    g = Graph()
    g.q(g.input("x", ("n",), TensorProto.FLOAT), "q", 1.0, 5)
    model = from_proto(g.proto({"q": TensorProto.INT8}))
    np.testing.assert_array_equal(
        execute(model, {"x": np.array([np.inf, -np.inf, 2.5, 3.5], F32)})["q"], [127, -128, 7, 9]
    )
    with pytest.raises(NonFiniteError, match="QuantizeLinear_q"):
        execute(model, {"x": np.array([np.nan], F32)})


def test_a_float_island_is_float32():
    """LayerNormalization, Erf and Reciprocal have no exact kernel: ONNX's own float32 results come back."""
    g = Graph()
    xd = g.dq(g.input("x", (2, 8)), 0.037, np.asarray(3, np.int8))
    y = g.node("LayerNormalization", [xd, g.const("g", np.linspace(1, 2, 8, dtype=F32))], "ln")
    y = g.node("Reciprocal", [g.node("Erf", [y], "erf")], "out")
    proto = g.proto({"out": TensorProto.FLOAT})
    x = np.random.default_rng(0).integers(-128, 128, (2, 8), np.int8)
    got = execute(from_proto(proto), {"x": x})["out"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, ReferenceEvaluator(proto).run(None, {"x": x})[0], rtol=1e-5)


def test_resize_nearest_keeps_the_integers():
    g = Graph()
    xd = g.dq(g.input("x", (1, 2, 2, 3)), 0.3, np.asarray(7, np.int8))
    names = [xd, "", g.const("scales", np.array([1, 1, 2, 2], F32))]
    g.q(g.node("Resize", names, "r", mode="nearest"), "rq", 0.3, 7)
    x = np.arange(12, dtype=np.int8).reshape(1, 2, 2, 3)
    got = execute(from_proto(g.proto({"rq": TensorProto.INT8})), {"x": x})["rq"]
    np.testing.assert_array_equal(got, x.repeat(2, 2).repeat(2, 3))


def test_a_loop_reads_outer_values():
    body = helper.make_graph(
        [helper.make_node("Add", ["v", "step"], ["w"]), helper.make_node("Identity", ["c"], ["c2"])],
        "body",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in
         [("i", TensorProto.INT64, ()), ("c", TensorProto.BOOL, ()), ("v", TensorProto.FLOAT, None)]],
        [helper.make_tensor_value_info("c2", TensorProto.BOOL, ()),
         helper.make_tensor_value_info("w", TensorProto.FLOAT, None)],
    )  # fmt: skip
    g = Graph()
    x = g.dq(g.input("x", (3,)), 0.5, np.asarray(0, np.int8))
    step = g.node("Mul", [x, x], "step")
    assert step == "step"
    g.node("Loop", [g.const("trips", np.asarray(3)), g.const("go", np.asarray(True)), x], "out", body=body)
    got = execute(from_proto(g.proto({"out": TensorProto.FLOAT})), {"x": np.array([2, 4, -2], np.int8)})["out"]
    np.testing.assert_array_equal(got, [4.0, 14.0, 2.0])


def test_what_a_loop_collects_is_stacked():
    """As the standard says, and ONNX Runtime does; onnx's own evaluator appends it along axis 0."""
    body = helper.make_graph(
        [helper.make_node("Add", ["v", "v"], ["w"]), helper.make_node("Identity", ["c"], ["c2"]),
         helper.make_node("Identity", ["w"], ["row"])],
        "body",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in
         [("i", TensorProto.INT64, ()), ("c", TensorProto.BOOL, ()), ("v", TensorProto.FLOAT, (2, 3))]],
        [helper.make_tensor_value_info("c2", TensorProto.BOOL, ()),
         helper.make_tensor_value_info("w", TensorProto.FLOAT, (2, 3)),
         helper.make_tensor_value_info("row", TensorProto.FLOAT, (2, 3))],
    )  # fmt: skip
    g = Graph()
    x = g.dq(g.input("x", (2, 3)), 0.5, np.asarray(0, np.int8))
    operands = [g.const("trips", np.asarray(4)), g.const("go", np.asarray(True)), x]
    g.nodes.append(helper.make_node("Loop", operands, ["last", "rows"], body=body))
    model = from_proto(g.proto({"rows": TensorProto.FLOAT}))
    given = np.arange(6, dtype=np.int8).reshape(2, 3)
    got = execute(model, {"x": given})["rows"]
    np.testing.assert_array_equal(got, np.stack([given * 0.5 * 2**k for k in range(1, 5)]))
