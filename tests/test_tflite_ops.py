"""Single operators behind a convolution, so in channels-last memory, and over their range: LiteRT against others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgekit import model as M
from edgekit.backends.tflite.lowering import lower
from edgekit.backends.tflite.writer import write
from tests.tflite_interpreter import run

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")

Array = np.ndarray[Any, Any]
SHAPE = (3, 4, 5)  # channels, rows, columns, all different
BOUND = 1e-5  # of the largest value: float32 in a few operators


def behind_a_convolution(op: str, inputs: Sequence[Any], outputs: int, batch: Any, **attributes: Any) -> ir.Model:
    """x -> Conv 1×1 -> op(…, inputs), of which None is the convolution's result and an array a constant."""
    mix = np.random.default_rng(0).normal(size=(SHAPE[0], SHAPE[0], 1, 1)).astype(np.float32)
    weights = [numpy_helper.from_array(mix, "mix")]
    names = []
    for index, value in enumerate(inputs):
        if value is not None and value is not ...:
            weights.append(numpy_helper.from_array(np.asarray(value), f"w{index}"))
        names.append("v" if value is None else "" if value is ... else f"w{index}")
    results = [f"y{i}" for i in range(outputs)]
    nodes = [helper.make_node("Conv", ["x", "mix"], ["v"]), helper.make_node(op, names, results, **attributes)]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, *SHAPE])
    types = [onnx.TensorProto.UNDEFINED] * outputs
    ends = [helper.make_tensor_value_info(r, t, None) for r, t in zip(results, types, strict=True)]
    graph = helper.make_graph(nodes, "one", [x], ends, weights)
    for value in graph.output:
        value.ClearField("type")
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


REDUCTIONS = ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp"]
UNARY = [
    "Abs",
    "Neg",
    "Exp",
    "Sin",
    "Cos",
    "Tan",
    "Sinh",
    "Cosh",
    "Atan",
    "Asinh",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Erf",
    "Gelu",
    "Softplus",
    "Softsign",
    "Mish",
    "Selu",
    "Celu",
    "ThresholdedRelu",
    "Reciprocal",
    "IsNaN",
]
PICKED = np.random.default_rng(1)
CASES: list[tuple[str, str, list[Any], int, dict[str, Any]]] = [
    *(
        (f"Reduce{op} {axes} keep {keep}", f"Reduce{op}", [None, ints(*axes)], 1, {"keepdims": keep})
        for op in REDUCTIONS
        for axes in ((1,), (-1,), (2, 3), (1, -1))
        for keep in (0, 1)
    ),
    *(
        (
            f"{op} {axis} keep {keep} last {last}",
            op,
            [None],
            1,
            {"axis": axis, "keepdims": keep, "select_last_index": last},
        )
        for op in ("ArgMax", "ArgMin")
        for axis in (1, 2, -1)
        for keep in (0, 1)
        for last in (0, 1)
    ),
    *(
        (f"TopK {axis} {most}", "TopK", [None, ints(2)], 2, {"axis": axis, "largest": most})
        for axis in (1, 3)
        for most in (0, 1)
    ),
    *(
        (f"CumSum {axis} {options}", "CumSum", [None, np.array(axis, np.int64)], 1, options)
        for axis in (1, 2, -1)
        for options in ({}, {"exclusive": 1}, {"reverse": 1})
    ),
    *(
        (f"Gather {axis} of rank {index.ndim}", "Gather", [None, index], 1, {"axis": axis})
        for axis in (1, 2, -1)
        for index in (np.array(-2, np.int64), ints(2, 0, -1), ints(0, 1, -3, 2).reshape(2, 2))
    ),
    *((f"Hardmax {axis}", "Hardmax", [None], 1, {"axis": axis}) for axis in (1, 2, -1)),
    *((f"Trilu {up}", "Trilu", [None, np.array(1, np.int64)], 1, {"upper": up}) for up in (0, 1)),
    *((f"Compress {a}", "Compress", [None, np.arange(n) % 2 == 0], 1, {"axis": a}) for a, n in ((1, 3), (3, 5))),
    *((op, op, [None], 1, {}) for op in ("GlobalAveragePool", "GlobalMaxPool")),
    *(
        (f"{op} by channel", op, [None, PICKED.normal(size=(3, 1, 1)).astype(np.float32)], 1, {})
        for op in ("Less", "GreaterOrEqual", "Equal")
    ),
    ("Mod fmod", "Mod", [None, PICKED.normal(size=(3, 1, 1)).astype(np.float32)], 1, {"fmod": 1}),
    ("Where", "Where", [PICKED.normal(size=(4, 1)) > 0, None, PICKED.normal(size=(3, 1, 5)).astype(np.float32)], 1, {}),
    *((f"Cast {to}", "Cast", [None], 1, {"to": int(to)}) for to in (onnx.TensorProto.INT32, onnx.TensorProto.BOOL)),
    *((op, op, [None], 1, {}) for op in UNARY),
]


@pytest.mark.parametrize("batch", [2, "batch"])
@pytest.mark.parametrize(("name", "op", "inputs", "outputs", "attributes"), CASES, ids=[c[0] for c in CASES])
def test_operator_behind_a_convolution(
    name: str, op: str, inputs: list[Any], outputs: int, attributes: dict[str, Any], batch: Any
) -> None:
    model = behind_a_convolution(op, inputs, outputs, batch, **attributes)
    result = lower(model)
    assert not result.refusals, [str(r) for r in result.refusals]
    data = bytes(write([result.graph], "test"))
    for size in (1, 3) if batch == "batch" else (batch,):
        feeds = {"x": np.random.default_rng(size).normal(size=(size, *SHAPE)).astype(np.float32)}
        want = M.FloatSession(model, optimize=False, threads=1).run(feeds)
        got = run(data, feeds)
        for key, value in want.items():
            assert got[key].dtype == value.dtype
            assert got[key].shape == value.shape
            if value.dtype.kind == "f":
                assert np.abs(got[key] - value).max() <= BOUND * max(1.0, np.abs(value).max())
            else:
                np.testing.assert_array_equal(got[key], value)


# --- functions over their whole range ------------------------------------------------------------------------
ULP = float(np.finfo(np.float32).eps)
EVERYWHERE = np.concatenate([np.linspace(-1, 1, 4001), np.linspace(-30, 30, 4001), np.logspace(-30, 30, 600)])
EVERYWHERE = np.concatenate([EVERYWHERE, -np.logspace(-30, 30, 600)]).astype(np.float32)


def softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def erf(x: Array) -> Array:
    import math

    return np.array([math.erf(v) for v in x])


# (operator, exact in float64, where it is defined, largest relative error in units of float32's last place)
FUNCTIONS: list[tuple[str, Any, Any, float]] = [
    ("Erf", erf, lambda x: x == x, 5),
    ("Sinh", np.sinh, lambda x: np.abs(x) < 88, 20),
    ("Cosh", np.cosh, lambda x: np.abs(x) < 88, 20),
    # XNNPACK's SIN and COS are right to 2e-7 up to 1e4, to 2e-5 at 1e7, and are anything beyond 1e9
    ("Tan", np.tan, lambda x: np.abs(x) < 1.5, 20),
    ("Asin", np.arcsin, lambda x: np.abs(x) <= 1, 10),
    ("Acos", np.arccos, lambda x: np.abs(x) <= 1, 10),
    ("Atan", np.arctan, lambda x: x == x, 10),
    ("Asinh", np.arcsinh, lambda x: x == x, 10),
    ("Acosh", np.arccosh, lambda x: x >= 1, 10),
    ("Atanh", np.arctanh, lambda x: np.abs(x) < 1, 10),
    ("Softplus", softplus, lambda x: x > -80, 30),
    ("Softsign", lambda x: x / (1 + np.abs(x)), lambda x: x == x, 5),
    ("Mish", lambda x: x * np.tanh(softplus(x)), lambda x: x > -40, 30),
    ("Round", np.rint, lambda x: x == x, 0),
    ("Floor", np.floor, lambda x: x == x, 0),
    ("Sign", np.sign, lambda x: x == x, 0),
]


@pytest.mark.parametrize(("op", "exact", "defined", "ulps"), FUNCTIONS, ids=[f[0] for f in FUNCTIONS])
def test_function_is_exact_to_a_few_last_places_everywhere(op: str, exact: Any, defined: Any, ulps: float) -> None:
    x = EVERYWHERE[defined(EVERYWHERE)]
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [len(x)])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [len(x)])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    result = lower(ir.from_proto(model))
    assert not result.refusals
    got = run(bytes(write([result.graph], "test")), {"x": x})["y"].astype(np.float64)
    want = exact(x.astype(np.float64))
    error = np.abs(got - want) / np.maximum(np.abs(want), np.finfo(np.float32).tiny)
    worst = int(np.argmax(error))
    assert error[worst] <= ulps * ULP, f"{op}({x[worst]}) is {got[worst]}, not {want[worst]}"
