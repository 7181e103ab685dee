"""Random quantized ONNX models with power-of-two scales, for the lowering to an integer network."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit import model as M

Array = np.ndarray[Any, Any]


class QdqGraph:
    """Grows a graph of float operators between QuantizeLinear and DequantizeLinear nodes.

    values: name -> (float value behind a DequantizeLinear, shape without batch, exponent).
    """

    def __init__(self, shape: tuple[int, ...], seed: int = 0, batch: int | str = "n") -> None:
        self.rng = np.random.default_rng(seed)
        self.shape, self.batch = shape, batch
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.quantizers: dict[str, str] = {}  # float value -> its integers
        self.outputs: list[str] = []

    def constant(self, name: str, array: Array) -> str:
        self.weights[name] = array
        return name

    def op(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{name}_node", **attributes))
        return name

    def grid(self, name: str, exponent: Any, dtype: Any = np.int8, zero: int = 0) -> list[str]:
        scale = np.ldexp(np.float32(1), -np.asarray(exponent)).astype(np.float32)
        return [
            self.constant(f"{name}_scale", scale),
            self.constant(f"{name}_zero", np.full(scale.shape, zero, dtype)),
        ]

    def rounded(self, value: str, exponent: int, dtype: Any = np.int8, zero: int = 0) -> str:
        """Through a quantizer and back."""
        parameters = self.grid(f"{value}_{len(self.nodes)}", exponent, dtype, zero)
        integers = self.op("QuantizeLinear", [value, *parameters])
        self.quantizers[value] = integers
        return self.op("DequantizeLinear", [integers, *parameters])

    def stored(self, name: str, integers: Array, exponent: Any, axis: int = 0) -> str:
        name = f"{name}_{len(self.nodes)}"
        parameters = self.grid(name, exponent, integers.dtype)
        return self.op("DequantizeLinear", [self.constant(name, integers), *parameters], axis=axis)

    def layer(
        self, op: str, x: str, e_x: int, weights: Array, e_w: Any, axis: int, bias: bool = True, **how: Any
    ) -> str:
        """A Conv or Gemm of stored weights and bias."""
        inputs = [x, self.stored("weight", weights, e_w, axis)]
        if bias:
            channels = weights.shape[axis]
            integers = self.rng.integers(-3000, 3000, channels).astype(np.int32)
            inputs.append(self.stored("bias", integers, np.broadcast_to(e_x + np.asarray(e_w), channels)))
        return self.op(op, inputs, **how)

    def model(self, output: str, shape: tuple[int, ...], host: str = "") -> Any:
        last = self.op(host, [output]) if host else output
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [self.batch, *self.shape])]
        outputs = [helper.make_tensor_value_info(last, TensorProto.FLOAT, [self.batch, *shape])]
        arrays = [numpy_helper.from_array(a, n) for n, a in self.weights.items()]
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, arrays)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(proto, full_check=True)
        return M.from_proto(proto)


def integers_of(model: Any, names: list[str], x: Array) -> dict[str, Array]:
    """What the QuantizeLinear nodes give, by onnx's own reference evaluator. names: of their outputs."""
    from onnx.reference import ReferenceEvaluator

    proto = M.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    return dict(zip(names, ReferenceEvaluator(proto).run(None, {"x": x}), strict=True))


def random_model(seed: int) -> tuple[Any, dict[str, str], tuple[int, ...]]:
    """(model, float value -> its integers, shape of a sample): convolutions, pools, joins, then dense layers."""
    rng = np.random.default_rng(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    channels, height, width = int(rng.integers(1, 5)), int(rng.integers(5, 11)), int(rng.integers(5, 10))
    last = bool(pick(True, False))
    shape = (height, width, channels) if last else (channels, height, width)
    g = QdqGraph(shape, seed, pick("n", 2))
    e = int(rng.integers(4, 7))
    x = "x"
    before = pick(True, False)
    if last and before:  # moved, then quantized; or the other way round
        x = g.op("Transpose", [x], perm=[0, 3, 1, 2])
    x = g.rounded(x, e)
    if last and not before:
        x = g.op("Transpose", [x], perm=[0, 3, 1, 2])
    size = (channels, height, width)

    def activation(value: str) -> tuple[str, int]:
        kind, exponent = pick("", "Relu", "Clip", "narrow"), int(rng.integers(2, 6))
        if kind == "Relu":
            value = g.op("Relu", [value])
        elif kind == "Clip":
            ends = [g.constant(f"end_{len(g.nodes)}_{v}", np.float32(v)) for v in (0, 6)]
            value = g.op("Clip", [value, *ends])
        elif kind == "narrow":
            low, high = np.ldexp(np.float32([-8, 7]), -exponent)
            ends = [g.constant(f"end_{len(g.nodes)}_{i}", v) for i, v in enumerate((low, high))]
            value = g.op("Clip", [value, *ends])
        return g.rounded(value, exponent), exponent

    def convolution(x: str, e: int, size: tuple[int, ...], same: bool = False) -> tuple[str, tuple[int, ...]]:
        depthwise = bool(pick(True, False)) and size[0] > 1
        cout = size[0] if depthwise or same else int(rng.integers(1, 6))
        groups = size[0] if depthwise else 2 if size[0] % 2 == 0 and cout % 2 == 0 and pick(True, False) else 1
        kernel = (
            [3, 3] if same else [int(rng.integers(1, min(4, size[1] + 1))), int(rng.integers(1, min(4, size[2] + 1)))]
        )
        weights = rng.integers(-128, 128, (cout, size[0] // groups, *kernel)).astype(np.int8)
        exponents = rng.integers(7, 10, cout) if pick(True, False) else int(rng.integers(7, 10))
        how: dict[str, Any] = {"group": groups}
        how["pads"] = [1, 1, 1, 1] if same else [int(p) for p in rng.integers(0, 2, 4)]
        if not same:
            how["strides"] = [pick(1, 2), pick(1, 2, 3)]
            if pick(True, False, False) and kernel[0] * 2 <= size[1] and kernel[1] * 2 <= size[2]:
                how["dilations"] = [2, 2]
        extent = [(k - 1) * d + 1 for k, d in zip(kernel, how.get("dilations", (1, 1)), strict=True)]
        pads, strides = how["pads"], how.get("strides", (1, 1))
        sides = [(size[1 + a] + pads[a] + pads[a + 2] - extent[a]) // strides[a] + 1 for a in (0, 1)]
        y = g.layer("Conv", x, e, weights, exponents, 0, bool(pick(True, True, False)), **how)
        return y, (cout, *sides)

    for _ in range(int(rng.integers(1, 4))):
        kind = pick("conv", "conv", "max", "average", "add", "concat", "relu")
        if min(size[1:]) < 2 or kind == "conv":
            y, size = convolution(x, e, size)
            x, e = activation(y)
        elif kind in {"max", "average"}:
            how = {"kernel_shape": [2, pick(1, 2)], "strides": [pick(1, 2), pick(1, 2)]}
            if kind == "average":
                how["kernel_shape"] = [min(3, size[1]), 2]
                how["pads"], how["count_include_pad"] = [1, 0, 0, 1], 1
            else:
                how["pads"] = [1, 0, 0, 0]
            y = g.op("MaxPool" if kind == "max" else "AveragePool", [x], **how)
            k, p, s = how["kernel_shape"], how["pads"], how["strides"]
            size = (size[0], *((size[1 + a] + p[a] + p[a + 2] - k[a]) // s[a] + 1 for a in (0, 1)))
            x = g.rounded(y, e)
        elif kind == "relu":
            x = g.rounded(g.op("Relu", [x]), e)
        else:
            y, _ = convolution(x, e, size, same=True)
            y, other = activation(y)
            if kind == "add":
                x, e = activation(g.op("Add", [x, y]))
            else:
                z, e = g.op("Concat", [x, y], axis=1), min(e, other)
                x, size = g.rounded(z, e), (2 * size[0], *size[1:])
    if pick(True, False):
        y = g.op("GlobalAveragePool", [x]) if pick(True, False) else _mean(g, x)
        x, size = g.rounded(y, e + 1), (size[0], 1, 1)
        e += 1
    if pick(True, False):  # an order of its own before the dense layer
        x = g.op("Transpose", [x], perm=[0, 2, 3, 1])
    count = int(np.prod(size))
    x = g.op("Flatten", [x]) if pick(True, False) else g.op("Reshape", [x, g.constant("flat", np.array([0, count]))])
    for cout in (int(rng.integers(2, 6)), 3):
        transposed = bool(pick(True, False))
        weights = rng.integers(-127, 128, (cout, count) if transposed else (count, cout)).astype(np.int8)
        axis = 0 if transposed else 1
        if not transposed and pick(True, False):
            y = g.layer("MatMul", x, e, weights, 8, axis, bias=False)
        else:
            y = g.layer("Gemm", x, e, weights, rng.integers(7, 10, cout), axis, transB=int(transposed))
        x, e = activation(y)
        count = cout
    return g.model(x, (3,), pick("", "Softmax", "Sigmoid")), g.quantizers, shape


def _mean(g: QdqGraph, x: str) -> str:
    return g.op("ReduceMean", [x, g.constant("axes", np.array([2, 3]))], keepdims=1)
