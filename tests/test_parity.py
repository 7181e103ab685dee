"""Parity against backends that are right, wrong, saturating, or cannot be read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit import model as M
from edgekit import parity
from edgekit.backends.reference import Reference, execute
from edgekit.errors import ConversionMismatchError
from edgekit.model import Tensors

F32 = np.float32


def quantized_net(seed: int = 0, *, side: int = 6, channels: int = 4, classes: int = 5) -> ir.Model:
    """conv -> maxpool -> add (with the pool's own input path) -> gemm -> softmax, 7-bit weights, one DQ per consumer.

    7 bits because u8×s8 kernels saturate on x86 without VNNI, and these tests must pass there too.
    """
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def const(name: str, array: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(op: str, inputs: list[str], out: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [out], name=out.removesuffix("_y"), **attributes))
        return out

    def q(x: str, name: str, scale: float, zero: int) -> Callable[[], str]:
        params = [const(f"{name}_s", np.asarray(scale, F32)), const(f"{name}_z", np.asarray(zero, np.int8))]
        node("QuantizeLinear", [x, *params], name)
        count = iter(range(9))
        return lambda: node("DequantizeLinear", [name, *params], f"{name}_dq{next(count)}")

    def weight(name: str, shape: tuple[int, ...], sx: float) -> list[str]:
        scale = rng.uniform(0.002, 0.01, shape[0]).astype(F32)
        zeros, bias = np.zeros(shape[0], np.int8), rng.integers(-500, 500, shape[0], np.int32)
        w = [const(name, rng.integers(-63, 64, shape, np.int8)), const(f"{name}_ws", scale), const(f"{name}_wz", zeros)]
        b = [const(f"{name}_b", bias), const(f"{name}_bs", scale * F32(sx))]
        return [
            node("DequantizeLinear", w, f"{name}_wdq", axis=0),
            node("DequantizeLinear", b, f"{name}_bdq", axis=0),
        ]

    x = q("x", "xq", 0.031, 3)
    c = q(
        node("Conv", [x(), *weight("w1", (channels, 3, 3, 3), 0.031)], "conv_y", pads=[1, 1, 1, 1]), "convq", 0.05, -11
    )
    p = q(node("MaxPool", [c()], "pool_y", kernel_shape=[3, 3], pads=[1, 1, 1, 1]), "poolq", 0.05, -11)
    a = q(node("Add", [c(), p()], "add_y"), "addq", 0.073, -40)
    f = q(node("Flatten", [a()], "flat_y"), "flatq", 0.073, -40)
    g = q(
        node("Gemm", [f(), *weight("w2", (classes, channels * side * side), 0.073)], "gemm_y", transB=1),
        "gemmq",
        0.2,
        5,
    )
    s = q(node("Softmax", [g()], "soft_y"), "softq", 1 / 256, -128)
    node("Identity", [s()], "out")
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 3, side, side))],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ("n", classes))],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto)
    return M.from_proto(proto)


def batches(count: int = 3, size: int = 8, side: int = 6) -> Iterator[Tensors]:
    rng = np.random.default_rng(1)
    for i in range(count):
        n = size - 3 if i == count - 1 else size  # the last one is shorter
        yield {"x": rng.standard_normal((n, 3, side, side)).astype(F32)}


def ort() -> Callable[[ir.Model, Tensors], Tensors]:
    sessions: dict[int, M.FloatSession] = {}

    def run(model: ir.Model, inputs: Tensors) -> Tensors:
        if id(model) not in sessions:
            sessions[id(model)] = M.FloatSession(model, threads=1)
        return sessions[id(model)].run(inputs)

    return run


def whole(model: ir.Model) -> Callable[[Tensors], Tensors]:
    run = ort()
    return lambda inputs: run(model, inputs)


def altered(tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ir.Model, Tensors], Tensors]:
    """The reference itself as a backend, with one output changed."""

    def run(model: ir.Model, inputs: Tensors) -> Tensors:
        out = execute(model, inputs)
        out[f"{tensor}{parity.READ}"] = change(out[f"{tensor}{parity.READ}"])
        return out

    return run


def test_units_are_named_after_their_operator():
    found = {u.writes: u for u in parity.units(quantized_net())}
    assert {w: (u.name, u.op) for w, u in found.items()} == {
        "xq": ("xq", "QuantizeLinear"),
        "convq": ("conv", "Conv"),
        "poolq": ("pool", "MaxPool"),
        "addq": ("add", "Add"),
        "flatq": ("flat", "Flatten"),
        "gemmq": ("gemm", "Gemm"),
        "softq": ("soft", "Softmax"),
    }
    assert found["xq"].reads == ("x",)
    assert set(found["addq"].reads) == {"convq", "poolq"}
    assert found["gemmq"].reads == ("flatq",)


def test_cut_model_is_valid_and_the_original_untouched():
    model = quantized_net()
    before = M.to_bytes(model)
    loose = parity.teacher_forced(model)
    assert M.to_bytes(model) == before
    onnx.checker.check_model(M.to_proto(loose.model), full_check=True)
    assert set(loose.reads.values()) == {"xq", "convq", "poolq", "addq", "flatq", "gemmq", "softq"}
    assert loose.skipped == ()
    # every unit stands alone: between a fed input and a read output lie at most DQ, the operator, Q
    reached = {v.name: parity._unit(v.producer().inputs[0].producer()) for v in loose.model.graph.outputs}
    assert all(unit.nodes <= 1 for unit in reached.values())


@pytest.mark.parametrize("seed", range(6))
def test_onnxruntime_is_within_one_lsb_on_random_nets(seed):
    model = quantized_net(seed, side=5 + seed % 3, channels=1 + seed)
    record = parity.check(model, ort(), whole(model), batches(side=5 + seed % 3))
    assert record.per_op_max_lsb is not None
    assert record.per_op_max_lsb <= 1
    assert record.fraction_equal is not None
    assert record.fraction_equal > 0.99
    assert record.samples == 21
    assert record.units == 7
    assert json.loads(json.dumps(record.to_json()))["samples"] == 21


def test_openvino_is_within_one_lsb():
    ov = pytest.importorskip("openvino")
    compiled = {}

    def run(model: ir.Model, inputs: Tensors) -> Tensors:
        if id(model) not in compiled:
            core = ov.Core()
            read = core.read_model(M.to_bytes(model))
            compiled[id(model)] = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        result = compiled[id(model)](inputs)
        return {output.any_name: result[output] for output in compiled[id(model)].outputs}

    model = quantized_net(4)
    record = parity.check(model, run, lambda inputs: run(model, inputs), batches())
    assert record.per_op_max_lsb is not None
    assert record.per_op_max_lsb <= 1


def test_the_reference_is_equal_to_itself():
    model = quantized_net()
    record = parity.check(model, execute, lambda inputs: execute(model, inputs), batches())
    assert (record.per_op_max_lsb, record.fraction_equal) == (0, 1.0)
    assert (record.label_agreement, record.end_to_end_max_lsb, record.end_to_end_max_abs) == (1.0, 0.0, 0.0)
    assert record.sqnr_db is None


def test_the_end_to_end_sqnr_counts_every_batch():
    model = quantized_net()
    wants, haves = [], []

    def coarse(inputs: Tensors) -> Tensors:
        wants.append(execute(model, inputs)["out"])
        haves.append(wants[-1] + F32(0.01 * len(wants)))
        return {"out": haves[-1]}

    record = parity.check(model, execute, coarse, batches())
    want, have = np.concatenate(wants).astype(np.float64), np.concatenate(haves)
    assert record.sqnr_db == pytest.approx(10 * np.log10((want**2).sum() / ((have - want) ** 2).sum()))
    assert record.to_json()["sqnr_db"] == record.sqnr_db


def test_an_error_on_an_output_of_zeros_is_a_finite_figure():
    whole_model = parity._Whole(quantized_net())
    whole_model.add({"out": np.zeros((2, 5), F32)}, {"out": np.full((2, 5), 0.5, F32)})
    sqnr = whole_model.sqnr_db()
    assert sqnr is not None
    assert -400 < sqnr < -200


@pytest.mark.parametrize(("tensor", "name", "scale"), [("convq", "conv", 0.05), ("addq", "add", 0.073)])
def test_off_by_two_is_caught_and_named(tensor, name, scale):
    model = quantized_net()
    run = altered(tensor, lambda y: y + F32(2 * scale))
    record = parity.check(model, run, whole(model), batches())
    assert record.per_op_max_lsb == 2
    assert (record.worst[0].name, record.worst[0].max_lsb) == (name, 2)
    assert record.worst[1].max_lsb == 0  # nothing cascades into the other units


def test_one_wrong_value_in_many_is_caught():
    def change(y: np.ndarray) -> np.ndarray:
        y = y.copy()
        y.flat[-1] = np.nan
        return y

    model = quantized_net()
    record = parity.check(model, altered("gemmq", change), whole(model), batches())
    assert record.per_op_max_lsb is not None
    assert record.per_op_max_lsb > 1000
    assert record.worst[0].name == "gemm"
    assert record.fraction_equal is not None
    assert record.fraction_equal > 0.99


def test_a_saturating_kernel_is_caught_and_named():
    """What u8×s8 kernels do on x86 without VNNI: products are added in pairs into a saturating int16."""
    model = quantized_net(2)
    # full-range weights and a bright input, as a careless quantizer would leave them
    value = model.graph.initializers["w2"]
    w = np.sign(value.const_value.numpy()).astype(np.int8) * 127
    value.const_value = ir.tensor(w, name="w2")

    def run(loose: ir.Model, inputs: Tensors) -> Tensors:
        read = {v.name: v for v in loose.graph.outputs}[f"gemmq{parity.READ}"]
        quantizer = read.producer().inputs[0].producer()
        out = Reference(loose).run(inputs)
        x = np.rint(inputs[f"flatq{parity.FED}"] / F32(0.073)).astype(np.int64)  # q - z
        u8 = np.clip(x - 40, -128, 127) + 128
        pairs = u8.reshape(len(u8), 1, -1, 2) * w.reshape(1, len(w), -1, 2).astype(np.int64)
        acc = np.clip(pairs.sum(-1), -(2**15), 2**15 - 1).sum(-1) - (128 - 40) * w.sum(1, dtype=np.int64)
        scale = M.constant(loose.graph.initializers["w2_ws"])
        real = (acc + M.constant(loose.graph.initializers["w2_b"])) * (0.073 * scale)
        step, zero = (float(M.constant(v)) for v in quantizer.inputs[1:])
        out[f"gemmq{parity.READ}"] = ((np.clip(np.rint(real / step) + zero, -128, 127) - zero) * step).astype(F32)
        return out

    record = parity.check(model, run, whole(model), batches())
    assert record.worst[0].name == "gemm"
    assert record.worst[0].max_lsb > 1
    assert record.worst[1].max_lsb == 0


def test_labels_are_compared_end_to_end():
    model = quantized_net()

    def turned(inputs: Tensors) -> Tensors:
        out = execute(model, inputs)["out"]
        out[::2] = np.roll(out[::2], 1, axis=-1)
        return {"out": out}

    record = parity.check(model, execute, turned, iter([next(batches())]))
    assert record.label_agreement == 0.5
    assert record.end_to_end_max_lsb is not None
    assert record.end_to_end_max_lsb == pytest.approx(record.end_to_end_max_abs * 256)


def test_a_runtime_that_cannot_be_read_is_recorded():
    def refuse(model: ir.Model, inputs: Tensors) -> Tensors:
        raise parity.Unreadable("takes no such model")

    model = quantized_net()
    record = parity.check(model, refuse, whole(model), batches())
    assert (record.units, record.per_op_max_lsb, record.fraction_equal) == (0, None, None)
    assert ("every operator", "takes no such model") in record.skipped
    assert record.label_agreement is not None  # end to end was still compared


def test_a_runtime_that_needs_a_fixed_batch_gets_one_and_the_short_last_batch_is_left_out():
    seen: list[tuple[bool, int]] = []

    def run(model: ir.Model, inputs: Tensors) -> Tensors:
        batch = M.batch_of(M.signature(model))
        seen.append((batch is not None, len(inputs["x"])))
        if batch is None:
            raise parity.Unreadable("wants all sizes")
        return execute(model, inputs)

    model = quantized_net()
    record = parity.check(model, run, whole(model), batches())
    assert seen == [(False, 8), (True, 8), (True, 8)]
    assert record.per_op_max_lsb == 0
    assert not record.skipped
    assert record.samples == 8 + 8 + 5  # end to end, all of them


def test_other_kernels_of_the_same_file_are_compared_end_to_end():
    model = quantized_net()
    right = whole(model)

    def half(inputs: Tensors) -> Tensors:
        out = dict(right(inputs))
        name, scores = next(iter(out.items()))
        wrong = scores.copy()
        wrong[::2] = np.roll(wrong[::2], 1, axis=-1)  # another class in every other sample
        return {**out, name: wrong}

    def broken(inputs: Tensors) -> Tensors:
        raise parity.Unreadable("aborts")

    elsewhere = {"same": right, "other": half, "broken": broken, "shape": lambda i: {k: v[None] for k, v in i.items()}}
    record = parity.check(model, execute, right, batches(), elsewhere)
    assert record.elsewhere == {"same": record.label_agreement, "other": pytest.approx((4 + 4 + 2) / 21)}


def test_another_shape_is_as_wrong_as_can_be():
    model = quantized_net()
    record = parity.check(model, altered("poolq", lambda y: y[:, None]), whole(model), batches())
    assert record.per_op_max_lsb == parity.WRONG_SHAPE
    assert record.worst[0].name == "pool"
    assert record.worst[0].fraction_equal == 0.0


def test_a_lost_tensor_is_listed_and_the_rest_compared():
    def run(model: ir.Model, inputs: Tensors) -> Tensors:
        out = execute(model, inputs)
        del out[f"poolq{parity.READ}"]
        return out

    model = quantized_net()
    record = parity.check(model, run, whole(model), batches())
    assert record.skipped == (("poolq", "the runtime gave no such tensor"),)
    assert (record.units, record.per_op_max_lsb) == (6, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda y: {"out": y * F32(np.nan)}, "NaN"),
        (lambda y: {"out": y[:, :2]}, "shape"),
        (lambda y: {"other": y}, "missing"),
    ],
)
def test_an_artifact_that_cannot_be_compared_is_refused(change, says):
    model = quantized_net()
    with pytest.raises(ConversionMismatchError, match=says):
        parity.check(model, execute, lambda inputs: change(execute(model, inputs)["out"]), batches())


def test_a_float_tail_is_listed_as_skipped():
    model = quantized_net()
    tail = ir.node("Erf", [model.graph.outputs[0]], name="tail", outputs=[ir.val("tailed", dtype=ir.DataType.FLOAT)])
    model.graph.append(tail)
    model.graph.outputs[:] = [tail.outputs[0]]
    record = parity.check(model, ort(), whole(model), batches())
    assert record.skipped == (("tailed", "no QuantizeLinear after it"),)
    assert record.end_to_end_max_lsb is None
    assert record.per_op_max_lsb is not None


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 255), st.floats(1e-6, 1e3), st.integers(-128, 127))
def test_feeding_reals_gives_back_the_integers(q, scale, zero):
    """float32 (q - z) * s divided by s again lands on q: what the float form of the cut model rests on."""
    grid = parity.Grid(float(F32(scale)), zero, "int8")
    stored = np.asarray([q - 128], np.int8)
    x = grid.real(stored)
    np.testing.assert_array_equal(np.rint(x / F32(scale)) + zero, stored)
    np.testing.assert_array_equal(grid.stored(x), stored)


@pytest.mark.slow
@pytest.mark.skipif("EDGEKIT_ZOO" not in os.environ, reason="EDGEKIT_ZOO is not set")
def test_a_trained_mobilenet_is_within_one_lsb(tmp_path):
    """mobilenet_v2_cifar quantized by ONNX Runtime's own tool: a QDQ model that this package did not write."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    zoo = Path(os.environ["EDGEKIT_ZOO"])
    images = np.load(zoo / "data" / "cifar10_calib.npz")["x"][:48].astype(F32) / F32(255)
    proto = onnx.version_converter.convert_version(onnx.load(zoo / "models" / "mobilenet_v2_cifar.onnx"), 21)
    onnx.save(proto, tmp_path / "float.onnx")
    name = proto.graph.input[0].name

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter([{name: images[i : i + 16]} for i in range(0, 48, 16)])

        def get_next(self) -> Tensors | None:
            return next(self.rows, None)

    quantize_static(
        tmp_path / "float.onnx", tmp_path / "q.onnx", Images(), quant_format=QuantFormat.QDQ, per_channel=True,
        reduce_range=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    model = M.from_proto(onnx.load(tmp_path / "q.onnx"))
    record = parity.check(model, ort(), whole(model), ({name: images[i : i + 16]} for i in range(0, 48, 16)))
    assert record.units > 30
    assert record.per_op_max_lsb is not None
    assert record.per_op_max_lsb <= 1
    assert record.label_agreement is not None
    assert record.label_agreement >= 0.95
