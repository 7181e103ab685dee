"""The emulator against LiteRT's own kernels: not one int8 value may differ, on XNNPACK and on the reference kernels."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgekit import model as M
from edgekit.backends.tflite.emulator import Emulator, Family
from edgekit.backends.tflite.graph import Graph, Operator, Quant, Tensor, per_tensor
from edgekit.backends.tflite.lowering import lower
from edgekit.backends.tflite.writer import write
from edgekit.dataset import random_dataset
from edgekit.model import Tensors
from edgekit.passes.fold import Fold
from edgekit.passes.quantize import QuantizeInt8
from tests.tflite_graphs import random_model
from tests.tflite_interpreter import run

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")

KERNELS: dict[Family, str] = {"xnnpack": "AUTO", "reference": "BUILTIN_REF"}
REPEATS = 60
Case = tuple[Graph, Tensors]


class Cases:
    """Random operators. Every third has powers of two as scales, where ties are everywhere."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.ties = seed % 3 == 0

    def scale(self, about: float, spread: float = 3.0) -> float:
        value = about * float(self.rng.uniform(1 / spread, spread))
        return float(2.0 ** round(np.log2(value))) if self.ties else float(np.float32(value))

    def grid(self, about: float = 0.05) -> Quant:
        return per_tensor(self.scale(about), int(self.rng.integers(-128, 128)))

    def stored(self, *shape: int) -> Any:
        return self.rng.integers(-128, 128, shape).astype(np.int8)

    def weights(self, x: Quant, shape: tuple[int, ...], axis: int, fan: int) -> tuple[Tensor, Tensor, Quant]:
        """Weights, bias, and a grid of the result that most sums fit."""
        outputs = shape[axis]
        scales = np.array([self.scale(0.01) for _ in range(outputs)], np.float32)
        w = Tensor("w", np.dtype(np.int8), shape, quant=Quant(scales, np.zeros(outputs, np.int64), axis))
        w.data = self.rng.integers(-127, 128, shape).astype(np.int8)
        products = Quant((np.float32(x.scale) * scales).astype(np.float32), np.zeros(outputs, np.int64))
        b = Tensor("b", np.dtype(np.int32), (outputs,), quant=products)
        b.data = self.rng.integers(-20000, 20000, outputs).astype(np.int32)
        return w, b, self.grid(x.scale * float(np.median(scales)) * 60 * fan**0.5)

    def one(self, code: str, inputs: list[Tensor], shape: tuple[int, ...], quant: Quant, **options: Any) -> Graph:
        y = Tensor("y", np.dtype(np.int8), shape, quant=quant)
        given = [(t.name, t) for t in inputs if t.data is None]
        return Graph(given, [("y", y)], [Operator(code, list(inputs), [y], options, "node")])

    def window(self, height: int, width: int, k: int) -> tuple[dict[str, Any], tuple[int, int]]:
        same, stride = bool(self.rng.integers(2)), int(self.rng.choice([1, 2]))
        sizes = [-(-n // stride) if same else (n - k) // stride + 1 for n in (height, width)]
        options = {"padding": "SAME" if same else "VALID", "strideH": stride, "strideW": stride}
        return options, (sizes[0], sizes[1])

    # --- operators -----------------------------------------------------------------------------------
    def conv(self, depthwise: bool = False) -> Case:
        c, k = int(self.rng.integers(1, 9)), int(self.rng.choice([1, 2, 3]))
        outputs = c * int(self.rng.integers(1, 3)) if depthwise else int(self.rng.integers(1, 17))
        height, width = (int(n) for n in self.rng.integers(k, 12, 2))
        options, sizes = self.window(height, width, k)
        grid = self.grid()
        shape, axis, fan = ((1, k, k, outputs), 3, k * k) if depthwise else ((outputs, k, k, c), 0, k * k * c)
        w, b, out = self.weights(grid, shape, axis, fan)
        options |= {"dilationHFactor": 1, "dilationWFactor": 1}
        options["fusedActivationFunction"] = str(self.rng.choice(["NONE", "RELU", "RELU6"]))
        if depthwise:
            options["depthMultiplier"] = outputs // c
        x = Tensor("x", np.dtype(np.int8), (4, height, width, c), quant=grid)
        code = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        return self.one(code, [x, w, b], (4, *sizes, outputs), out, **options), {"x": self.stored(*x.shape)}

    def dense(self) -> Case:
        inputs, outputs = int(self.rng.integers(1, 200)), int(self.rng.integers(1, 40))
        grid = self.grid()
        w, b, out = self.weights(grid, (outputs, inputs), 0, inputs)
        x = Tensor("x", np.dtype(np.int8), (16, inputs), quant=grid)
        options = {"fusedActivationFunction": "NONE", "keepNumDims": False, "weightsFormat": "DEFAULT"}
        return self.one("FULLY_CONNECTED", [x, w, b], (16, outputs), out, **options), {"x": self.stored(16, inputs)}

    def binary(self, code: str) -> Case:
        shape = (8, 7, 6, 5)
        first, second = self.grid(), self.grid()
        about = first.scale * second.scale * 100 if code == "MUL" else max(first.scale, second.scale)
        tensors = [Tensor(n, np.dtype(np.int8), shape, quant=q) for n, q in (("a", first), ("b", second))]
        graph = self.one(code, tensors, shape, self.grid(about), fusedActivationFunction="NONE")
        return graph, {"a": self.stored(*shape), "b": self.stored(*shape)}

    def mean(self) -> Case:
        height, width, c = (int(n) for n in self.rng.integers(1, 9, 3))
        grid = self.grid()
        x = Tensor("x", np.dtype(np.int8), (4, height, width, c), quant=grid)
        axes = Tensor("axes", np.dtype(np.int32), (2,), data=np.array([1, 2], np.int32))
        graph = self.one("MEAN", [x, axes], (4, 1, 1, c), self.grid(grid.scale / 2), keepDims=True)
        return graph, {"x": self.stored(*x.shape)}

    def pool(self, code: str) -> Case:
        k = int(self.rng.choice([2, 3]))
        height, width = (int(n) for n in self.rng.integers(k, 9, 2))
        options, sizes = self.window(height, width, k)
        grid = self.grid()
        x = Tensor("x", np.dtype(np.int8), (2, height, width, 3), quant=grid)
        options |= {"filterHeight": k, "filterWidth": k, "fusedActivationFunction": "NONE"}
        return self.one(code, [x], (2, *sizes, 3), grid, **options), {"x": self.stored(*x.shape)}

    def unary(self, code: str) -> Case:
        grid = self.grid()
        fixed = {"LOGISTIC": per_tensor(1 / 256, -128), "TANH": per_tensor(1 / 128, 0)}
        options = {"alpha": 0.1} if code == "LEAKY_RELU" else {}
        x = Tensor("x", np.dtype(np.int8), (16, 64), quant=grid)
        graph = self.one(code, [x], (16, 64), fixed.get(code, self.grid(grid.scale)), **options)
        return graph, {"x": self.stored(16, 64)}

    def quantize(self) -> Case:
        grid = self.grid()
        x = Tensor("x", np.dtype(np.float32), (64, 64))
        data = self.rng.normal(size=x.shape) * grid.scale * 100
        data[:8] = (self.rng.integers(-300, 300, (8, 64)) + 0.5) * grid.scale
        return self.one("QUANTIZE", [x], x.shape, grid), {"x": data.astype(np.float32)}


OPERATORS: dict[str, Callable[[Cases], Case]] = {
    "CONV_2D": Cases.conv,
    "DEPTHWISE_CONV_2D": lambda c: c.conv(depthwise=True),
    "FULLY_CONNECTED": Cases.dense,
    "ADD": lambda c: c.binary("ADD"),
    "SUB": lambda c: c.binary("SUB"),
    "MUL": lambda c: c.binary("MUL"),
    "MEAN": Cases.mean,
    "MAX_POOL_2D": lambda c: c.pool("MAX_POOL_2D"),
    "AVERAGE_POOL_2D": lambda c: c.pool("AVERAGE_POOL_2D"),
    "LEAKY_RELU": lambda c: c.unary("LEAKY_RELU"),
    "LOGISTIC": lambda c: c.unary("LOGISTIC"),
    "TANH": lambda c: c.unary("TANH"),
    "QUANTIZE": Cases.quantize,
    "QUANTIZE from int8": lambda c: c.unary("QUANTIZE"),
}


@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_equals_its_kernel(name: str, family: Family) -> None:
    for seed in range(REPEATS):
        graph, feeds = OPERATORS[name](Cases(seed))
        got = run(bytes(write([graph], "test")), feeds, kernels=KERNELS[family])["y"]
        np.testing.assert_array_equal(Emulator(graph, family).run(feeds)["y"], got, err_msg=f"seed {seed}")


@pytest.mark.parametrize("family", KERNELS)
def test_whole_graphs_equal_the_runtime(family: Family) -> None:
    """Lowered random graphs of operators that are emulated exactly: the outputs too are equal, bit by bit."""
    compared = 0
    for seed in range(250):
        rng = random.Random(seed)
        model = Fold()(random_model(rng, rng.randrange(1, 10), dynamic=False), None)
        quantized = QuantizeInt8(calibration="minmax")(model, random_dataset(M.signature(model), 8, 0))
        graph = lower(quantized).graph
        if any(o.outputs[0].kind != "qint8" and o.code not in ("DEQUANTIZE", "RESHAPE") for o in graph.operators):
            continue
        if Emulator(graph, family).approximate:
            continue
        feeds = M.seeded_inputs(M.signature(model), 2)
        emulated = Emulator(graph, family).run(feeds)
        got = run(bytes(write([graph], "test")), feeds, kernels=KERNELS[family])
        for key, value in got.items():
            np.testing.assert_array_equal(emulated[key], value, err_msg=f"seed {seed}")
        compared += 1
    assert compared >= 20


def test_what_is_not_exact_is_named() -> None:
    x = Tensor("x", np.dtype(np.int8), (1, 4), quant=per_tensor(0.1, 0))
    y = Tensor("y", np.dtype(np.int8), (1, 4), quant=per_tensor(1 / 256, -128))
    graph = Graph([("x", x)], [("y", y)], [Operator("SOFTMAX", [x], [y], {"beta": 1.0}, "head")])
    assert Emulator(graph, "xnnpack").approximate == (("SOFTMAX", "head"),)
