"""A transformer as PyTorch exports it: sizes read from shapes, masks, layer norms and Gelu in pieces, a free batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from edgekit import model as M
from edgekit.backends.reference import Reference
from edgekit.backends.tflite.lowering import lower
from edgekit.backends.tflite.writer import write
from edgekit.dataset import random_dataset
from edgekit.passes.fold import Fold
from edgekit.passes.quantize import QuantizeInt8
from tests.models import attention
from tests.tflite_interpreter import run
from tests.tflite_single import BOUND, Array, build, difference, litert, normal, onnxruntime, operators

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")

STEPS, WIDTH, HEADS, WORDS = 12, 32, 4, 40
LOWEST = np.float32(-3.4028235e38)


class Graph:
    """Nodes written one after the other; `weight` and `op` return names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Any] = {}

    def weight(self, *shape: int) -> str:
        return self.constant(0.2 * normal(len(self.weights), *shape))

    def constant(self, array: Any) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = np.asarray(array)
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.several(kind, 1, *inputs, **attributes)[0]

    def several(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=names[0], **attributes))
        return names

    def normed(self, x: str) -> str:
        last = self.constant(np.array([-1]))
        d = self.op("Sub", x, self.op("ReduceMean", x, last, keepdims=1))
        variance = self.op("ReduceMean", self.op("Pow", d, self.constant(np.float32(2))), last, keepdims=1)
        s = self.op("Sqrt", self.op("Add", variance, self.constant(np.float32(1e-5))))
        return self.op("Add", self.op("Mul", self.op("Div", d, s), self.weight(WIDTH)), self.weight(WIDTH))

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        return self.op("Add", self.weight(outputs), self.op("MatMul", x, self.weight(inputs, outputs)))

    def size(self, x: str, axis: int) -> str:
        one = self.op("Gather", self.op("Shape", x), self.constant(np.array(axis)), axis=0)
        return self.op("Unsqueeze", one, self.constant(np.array([0])))

    def heads(self, x: str) -> str:
        parts = [self.constant(np.array([n])) for n in (HEADS, WIDTH // HEADS)]
        sizes = self.op("Concat", self.size(x, 0), self.size(x, 1), *parts, axis=0)
        return self.op("Transpose", self.op("Reshape", x, sizes), perm=[0, 2, 1, 3])

    def attention(self, x: str, mask: str) -> str:
        thirds = self.constant(np.array([WIDTH] * 3))
        parts = self.several("Split", 3, self.linear(x, WIDTH, 3 * WIDTH), thirds, axis=2)
        q, k, v = (self.heads(p) for p in parts)
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.op("Div", scores, self.constant(np.float32((WIDTH // HEADS) ** 0.5)))
        triangle = self.constant(np.tril(np.ones((1, 1, STEPS, STEPS), bool)))
        scores = self.op("Add", self.op("Where", triangle, scores, self.constant(LOWEST)), mask)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        whole = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        sizes = self.op("Concat", self.size(whole, 0), self.size(whole, 1), self.constant(np.array([WIDTH])), axis=0)
        return self.linear(self.op("Reshape", whole, sizes), WIDTH, WIDTH)

    def gelu(self, x: str) -> str:
        erf = self.op("Erf", self.op("Div", x, self.constant(np.float32(2**0.5))))
        product = self.op("Mul", x, self.op("Add", erf, self.constant(np.float32(1))))
        return self.op("Mul", product, self.constant(np.float32(0.5)))


def transformer(batch: Any) -> onnx.ModelProto:
    g = Graph()
    steps = g.op("Gather", g.op("Shape", "ids"), g.constant(np.array(1)), axis=0)
    places = g.op("Range", g.constant(np.array(0)), steps, g.constant(np.array(1)))
    x = g.op("Add", g.op("Gather", g.weight(WORDS, WIDTH), "ids"), g.op("Gather", g.weight(STEPS, WIDTH), places))
    real = g.op("Cast", g.op("Unsqueeze", "mask", g.constant(np.array([1, 2]))), to=onnx.TensorProto.FLOAT)
    mask = g.op("Mul", g.op("Sub", g.constant(np.float32(1)), real), g.constant(LOWEST))
    for _ in range(2):
        x = g.op("Add", x, g.attention(g.normed(x), mask))
        inner = g.gelu(g.linear(g.normed(x), WIDTH, 4 * WIDTH))
        x = g.op("Add", x, g.linear(inner, 4 * WIDTH, WIDTH))
    x = g.normed(x)
    words = g.op("MatMul", x, g.weight(WIDTH, WORDS))
    first = g.op("Gather", x, g.constant(np.array(0)), axis=1)
    pooled = g.op("Tanh", g.op("Gemm", first, g.weight(WIDTH, WIDTH), g.weight(WIDTH), transB=1))
    inputs = {"ids": (np.int64, [batch, STEPS]), "mask": (np.int64, [batch, STEPS])}
    return build(g.nodes, inputs, [words, pooled], g.weights, opset=21)


def feeds() -> dict[str, Array]:
    ids = np.random.default_rng(0).integers(0, WORDS, (3, STEPS))
    return {"ids": ids, "mask": np.array([[1] * (STEPS - i) + [0] * i for i in range(3)])}


@pytest.mark.parametrize("batch", ["batch", 3])
@pytest.mark.parametrize("folded", [False, True])
def test_as_onnx_runtime(batch: Any, folded: bool) -> None:
    model = transformer(batch)
    ready = M.to_proto(Fold()(ir.from_proto(model), None)) if folded else model
    assert difference(litert(ready, feeds()), onnxruntime(model, feeds())) <= BOUND


def test_folded_it_has_the_operators_that_litert_has() -> None:
    codes = operators(M.to_proto(Fold()(ir.from_proto(transformer("batch")), None)))
    assert codes.count("GELU") == 2
    assert codes.count("RSQRT") == 5
    assert codes.count("FULLY_CONNECTED") == 10
    assert codes.count("TRANSPOSE") == 8  # heads out and in again: query, key, value and result of two layers
    assert codes.count("BATCH_MATMUL") == 4


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5), (1,), ()])
def test_a_row_behind_a_matrix_product_is_its_bias(shape: tuple[int, ...], first: bool) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["b", "m"] if first else ["m", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    weights = {"w": normal(0, 4, 5), "b": np.asarray(normal(1, *shape))}
    model = build(nodes, {"x": (np.float32, ["batch", 3, 4])}, ["y"], weights)
    given = {"x": normal(2, 2, 3, 4)}
    assert operators(model) == ["FULLY_CONNECTED"]
    assert difference(litert(model, given), onnxruntime(model, given)) <= BOUND


@pytest.mark.parametrize("shape", [(3, 5), (3, 1), (2, 1, 1, 5)])
def test_an_addend_that_is_no_row_stays(shape: tuple[int, ...]) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
    model = build(nodes, {"x": (np.float32, [2, 3, 4])}, ["y"], {"w": normal(0, 4, 5), "b": normal(1, *shape)})
    given = {"x": normal(2, 2, 3, 4)}
    assert "ADD" in operators(model)
    assert difference(litert(model, given), onnxruntime(model, given)) <= BOUND


@pytest.mark.parametrize("io", ["float32", "int8"])
def test_the_core_of_an_int8_attention_is_float_unless_integers_are_asked_for(io: str) -> None:
    model = Fold()(attention(), None)
    data = random_dataset(M.signature(model), 32)
    quantized = QuantizeInt8()(model, data)
    result = lower(quantized, io)
    assert not result.refusals
    kinds = {(o.code, o.inputs[0].kind) for o in result.graph.operators if o.inputs[0] is not None}
    core = {kind for code, kind in kinds if code in ("BATCH_MATMUL", "SOFTMAX")}
    assert core == {"float32"} if io == "float32" else "qint8" in core
    if io == "float32":
        inputs = next(data.batches(32)).inputs
        got = run(bytes(write([result.graph], "test")), inputs)
        for name, want in Reference(quantized).run(inputs).items():
            step = float(np.abs(want).max()) / 127
            assert np.abs(got[name] - want).max() <= 1.01 * step


@pytest.mark.parametrize("batch", ["n", 2])
def test_slices_that_make_up_the_whole_are_one_split_where_the_batch_is_open(batch: Any) -> None:
    def model(parts: list[tuple[int, int]]) -> onnx.ModelProto:
        weights = {f"{k}{i}": np.array([v]) for i, (s, e) in enumerate(parts) for k, v in {"s": s, "e": e}.items()}
        nodes = [helper.make_node("Slice", ["x", f"s{i}", f"e{i}", "axis"], [f"y{i}"]) for i in range(len(parts))]
        outputs = [f"y{i}" for i in range(len(parts))]
        return build(nodes, {"x": (np.float32, (batch, 6, 4))}, outputs, {**weights, "axis": np.array([1])})

    given = {"x": normal(0, 2, 6, 4)}
    for parts, whole in (
        ([(4, 6), (0, 2), (2, 4)], True),
        ([(0, 3), (3, 6)], True),
        ([(0, 2), (2, 6)], False),
        ([(0, 3), (2, 5)], False),
        ([(0, 2), (2, 4)], False),
    ):
        net = model(parts)
        assert (operators(net) == ["SPLIT"]) == (whole and batch == "n"), parts
        assert difference(litert(net, given), onnxruntime(net, given)) == 0


def test_a_session_that_ran_one_sample_is_right_for_many(tmp_path: Path) -> None:
    """XNNPACK keeps sizes of before when an interpreter is resized: each shape gets an interpreter of its own."""
    from edgekit.backends.runners.tflite import open_session

    model = Fold()(attention(), None)
    data = random_dataset(M.signature(model), 64, 0)
    graph = lower(QuantizeInt8(rounding="nearest")(model, data)).graph
    (tmp_path / "model.tflite").write_bytes(write([graph], "attention"))
    (batch,) = data.batches(64)
    grown, whole = open_session(str(tmp_path), 1), open_session(str(tmp_path), 1)
    single = [grown.run({k: v[i : i + 1] for k, v in batch.inputs.items()}) for i in range(64)]
    for name, value in grown.run(batch.inputs).items():
        np.testing.assert_array_equal(value, whole.run(batch.inputs)[name])
        np.testing.assert_array_equal(value, np.concatenate([s[name] for s in single]))
