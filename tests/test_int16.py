"""int16 activations on int8 weights: every operator of the scheme against the exact reference, and what stays float."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit import model as M
from edgekit.backends.reference import Reference
from edgekit.backends.tflite.lowering import Lowered, lower
from edgekit.backends.tflite.writer import write
from edgekit.passes.plan import QuantizationPlan
from edgekit.passes.quantize import QuantizeInt8
from edgekit.scheme import INTEGER_16
from tests.models import attention, mobile_nhwc
from tests.quantize_graphs import Samples, node, normal
from tests.test_tflite_runtimes import PYTHONS, WIDE_BOUND, run_there
from tests.tflite_interpreter import run
from tests.tflite_single import build

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")

IMAGE, ROWS = (3, 6, 8), (10,)


def net(nodes: list[onnx.NodeProto], shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Any]) -> ir.Model:
    """Float inputs of these sizes behind an open batch; the output is "y"."""
    inputs = {name: (np.float32, ("n", *shape)) for name, shape in shapes.items()}
    last = shapes["x"][-1]
    constants = {"factor": normal(last, last, seed=9), **weights}
    return M.from_proto(build(nodes, inputs, ["y"], constants, opset=21))


def one(op: str, shape: tuple[int, ...] = ROWS, weights: Mapping[str, Any] = {}, **attributes: Any) -> ir.Model:
    """x behind a MatMul, so that it is quantized, and the weights in order into one operator."""
    operator = node(op, ["m", *weights], ["y"], name="it", **attributes)
    return net(
        [node("MatMul", ["x", "factor"], ["m"]), operator], {"x": shape}, {k: v for k, v in weights.items() if k}
    )


def two(op: str, x: tuple[int, ...] = ROWS, z: tuple[int, ...] = ROWS, **attributes: Any) -> ir.Model:
    nodes = [node("MatMul", ["x", "factor"], ["m"]), node(op, ["m", "z"], ["y"], name="it", **attributes)]
    return net(nodes, {"x": x, "z": z}, {})


def split() -> ir.Model:
    nodes = [node("MatMul", ["x", "factor"], ["m"]), node("Split", ["m"], ["a", "b"], name="it", axis=1, num_outputs=2)]
    return net([*nodes, node("Mul", ["a", "b"], ["y"])], {"x": ROWS}, {})


def resize(mode: str, coordinates: str) -> ir.Model:
    more = {"nearest_mode": "floor"} if mode == "nearest" else {}
    nodes = [node("MatMul", ["x", "factor"], ["m"])]
    nodes.append(node("Resize", ["m", "", "s"], ["y"], mode=mode, coordinate_transformation_mode=coordinates, **more))
    return net(nodes, {"x": IMAGE}, {"s": np.array([1, 1, 2, 2], np.float32)})


def i64(*values: int) -> Any:
    return np.array(values, np.int64)


CASES: dict[str, Any] = {
    "Conv": lambda: one("Conv", IMAGE, {"w": normal(5, 3, 3, 3), "b": normal(5)}, pads=[1, 1, 1, 1], strides=[2, 2]),
    "Conv/depthwise": lambda: one("Conv", IMAGE, {"w": normal(3, 1, 3, 3), "b": normal(3)}, group=3),
    "Gemm": lambda: one("Gemm", ROWS, {"w": normal(7, 10), "b": normal(7)}, transB=1),
    "MatMul": lambda: one("MatMul", ROWS, {"w": normal(10, 7)}),
    "MatMul/computed": lambda: two("MatMul", (4, 10), (10, 5)),
    "Relu": lambda: one("Relu"),
    "Clip": lambda: one("Clip", ROWS, {"low": np.float32(0), "high": np.float32(6)}),
    "Clip/odd": lambda: one("Clip", ROWS, {"low": np.float32(-0.5), "high": np.float32(1.25)}),
    "LeakyRelu": lambda: one("LeakyRelu", alpha=0.2),
    "Sigmoid": lambda: one("Sigmoid"),
    "Tanh": lambda: one("Tanh"),
    "Softmax": lambda: one("Softmax"),
    "ReduceMean": lambda: one("ReduceMean", IMAGE, {"axes": i64(2, 3)}, keepdims=0),
    "GlobalAveragePool": lambda: one("GlobalAveragePool", IMAGE),
    "GlobalMaxPool": lambda: one("GlobalMaxPool", IMAGE),
    "MaxPool": lambda: one("MaxPool", IMAGE, kernel_shape=[2, 2], strides=[2, 2]),
    "MaxPool/padded": lambda: one("MaxPool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
    "AveragePool": lambda: one("AveragePool", IMAGE, kernel_shape=[2, 2], strides=[2, 2]),
    "Concat": lambda: two("Concat", ROWS, (6,), axis=1),
    "Max": lambda: two("Max"),
    "Min": lambda: two("Min"),
    "Add": lambda: two("Add"),
    "Sub": lambda: two("Sub"),
    "Mul": lambda: two("Mul"),
    "Pad": lambda: one("Pad", IMAGE, {"pads": i64(0, 0, 1, 2, 0, 0, 0, 1)}),
    "Reshape": lambda: one("Reshape", IMAGE, {"shape": i64(0, 18, 8)}),
    "Flatten": lambda: one("Flatten", IMAGE),
    "Transpose": lambda: one("Transpose", (4, 6), perm=[0, 2, 1]),
    "Squeeze": lambda: one("Squeeze", (1, 6), {"axes": i64(1)}),
    "Unsqueeze": lambda: one("Unsqueeze", ROWS, {"axes": i64(1)}),
    "Slice": lambda: one("Slice", IMAGE, {"s": i64(1), "e": i64(6), "a": i64(3), "t": i64(2)}),
    "Split": split,
    "Gather": lambda: one("Gather", ROWS, {"i": i64(3, 1)}, axis=1),
    "Resize": lambda: resize("linear", "half_pixel"),
    "Resize/nearest": lambda: resize("nearest", "asymmetric"),
    "ReduceMax": lambda: one("ReduceMax", IMAGE, {"axes": i64(2)}),
    "ReduceMin": lambda: one("ReduceMin", IMAGE, {"axes": i64(1)}),
}


def samples(model: ir.Model, count: int = 32) -> Samples:
    sig = M.signature(model)
    return Samples({s.name: normal(count, *s.shape[1:], seed=i) for i, s in enumerate(sig.inputs)})  # type: ignore[arg-type]


def quantized(model: ir.Model) -> tuple[ir.Model, Samples]:
    data = samples(model)
    return QuantizeInt8(activation_bits=16)(model, data), data  # type: ignore[arg-type]


def written(model: ir.Model, io: str = "float32") -> tuple[Lowered, bytes]:
    result = lower(model, io)
    assert not result.refusals, [str(r) for r in result.refusals]
    return result, bytes(write([result.graph], "test"))


def test_every_operator_of_the_scheme_is_tried() -> None:
    assert {name.partition("/")[0] for name in CASES} == set(INTEGER_16)


# LSB of 16 bits that LiteRT's kernels are off: tables of 512 entries for the exponential and the logistic function
ISLANDS = {"Clip/odd"}  # clipped to another scale: a comparison in float
LOOSE = {"Softmax": 8, "Sigmoid": 4, "Tanh": 4}


@pytest.mark.parametrize("kernels", ["AUTO", "BUILTIN_REF"])
@pytest.mark.parametrize("name", CASES)
def test_an_operator_equals_the_reference_within_a_step(name: str, kernels: str) -> None:
    model = CASES[name]()
    qdq, data = quantized(model)
    result, content = written(qdq)
    assert result.islands == (["it"] if name in ISLANDS else [])
    kinds = {t.kind for o in result.graph.operators for t in (*o.inputs, *o.outputs) if t is not None}
    assert "qint16" in kinds
    output = qdq.graph.outputs[0].name or ""
    scale = float(result.graph.outputs[0][1].quant.scale) if result.graph.outputs[0][1].quant else _scale(qdq, output)
    want, got = Reference(qdq).run(data.inputs)[output], run(content, data.inputs, kernels=kernels)[output]
    off = np.abs(np.rint((got.astype(np.float64) - want) / scale))
    assert off.max() <= LOOSE.get(name.partition("/")[0], 1)


def _scale(model: ir.Model, output: str) -> float:
    value = next(v for v in model.graph.outputs if v.name == output)
    producer = value.producer()
    assert producer is not None
    assert producer.op_type == "DequantizeLinear"
    return float(M.constant(producer.inputs[1]))  # type: ignore[arg-type]


# what TFLM has no 16-bit kernel for
NOT_IN_TFLM = {"GlobalMaxPool", "ReduceMax", "ReduceMin", "Gather", "Resize"}


@pytest.mark.slow
@pytest.mark.parametrize("runtime", PYTHONS)
def test_older_and_smaller_runtimes_compute_the_same(runtime: str, tmp_path: Path) -> None:
    wanted = {}
    for number, (name, make) in enumerate(CASES.items()):
        qdq, data = quantized(make())
        feeds = {k: v[:1] for k, v in data.inputs.items()}
        (tmp_path / f"{number}.tflite").write_bytes(written(qdq)[1])
        np.savez(tmp_path / f"{number}.in.npz", **feeds)
        wanted[name] = Reference(qdq).run(feeds)["y"]
    run_there(runtime, tmp_path)
    failed = set()
    for number, (name, want) in enumerate(wanted.items()):
        if (tmp_path / f"{number}.error.txt").exists():
            failed.add(name)
            continue
        with np.load(tmp_path / f"{number}.out.npz") as stored:
            got = stored[stored.files[0]]
        assert M.difference(want, got) <= WIDE_BOUND, name
    assert failed == (NOT_IN_TFLM if runtime == "tflm" else set())


def test_a_rounding_that_int8_cannot_do_survives() -> None:
    """The reason to use it: 256 times finer activations on the same weights."""
    model = mobile_nhwc()
    data = samples(model)
    wanted = M.FloatSession(model, optimize=False).run(data.inputs)["y"]
    errors = []
    for bits in (8, 16):
        qdq = QuantizeInt8(activation_bits=bits)(model, data)  # type: ignore[arg-type]
        errors.append(float(np.abs(Reference(qdq).run(data.inputs)["y"] - wanted).max()))
    assert errors[1] < errors[0] / 2, errors


def test_integers_in_and_out() -> None:
    qdq, data = quantized(mobile_nhwc())
    result, content = written(qdq, "int8")
    (_, x), (_, y) = result.graph.inputs[0], result.graph.outputs[0]
    assert (x.kind, y.kind) == ("qint16", "qint16")
    assert x.quant is not None
    assert y.quant is not None
    stored = np.clip(np.rint(data.inputs["x"] / np.float32(x.quant.scale)), -32768, 32767).astype(np.int16)
    got = run(content, {"x": stored})["y"]
    assert got.dtype == np.int16
    assert M.difference(Reference(qdq).run(data.inputs)["y"], got * np.float32(y.quant.scale)) < WIDE_BOUND


def test_what_has_no_form_in_16_bits_stays_float_and_is_named() -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("HardSwish", ["c"], ["h"], name="swish")]
    nodes.append(node("Conv", ["h", "v"], ["y"]))
    model = net(nodes, {"x": IMAGE}, {"w": normal(4, 3, 1, 1), "v": normal(2, 4, 1, 1)})
    plan = QuantizeInt8(activation_bits=16).plan(model, samples(model))  # type: ignore[arg-type]
    assert plan.float_nodes == {"swish": "HardSwish has no integer form of 16 bits"}
    qdq, data = quantized(model)
    result, content = written(qdq)
    assert result.islands == ["swish"]
    assert M.difference(Reference(qdq).run(data.inputs)["y"], run(content, data.inputs)["y"]) < WIDE_BOUND


def test_a_plan_of_16_bits_survives_json() -> None:
    model = attention()
    plan = QuantizeInt8(activation_bits=16).plan(model, samples(model))  # type: ignore[arg-type]
    assert QuantizationPlan.from_json(plan.to_json()) == plan
    assert plan.activation_bits == 16
    assert all(a.bits == 16 and a.zero_point == 0 for a in plan.activations.values())
