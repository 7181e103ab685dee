"""Random small graphs for the TFLite lowering: layouts, shapes and quantization in combinations nobody writes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

SIZES = (1, 2, 3, 4, 5, 6, 7, 8)


class Builder:
    """Grows a graph of float values (name, shape without the batch) from one input, one random operator at a time."""

    def __init__(self, rng: random.Random, *, dynamic: bool) -> None:
        self.rng = rng
        self.data = np.random.default_rng(rng.randrange(2**32))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        channels, height, width = rng.choice((1, 2, 3, 4, 6)), rng.choice((4, 5, 6, 7, 8)), rng.choice((4, 5, 6, 7))
        self.batch: Any = "batch" if dynamic else 2
        self.input = ("x", (channels, height, width))
        self.value, self.shape = self.input
        self.older = [self.input]

    def const(self, array: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def normal(self, *shape: int) -> str:
        return self.const((self.data.normal(size=shape) / max(1, np.prod(shape[1:])) ** 0.5).astype(np.float32))

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}_{name}", **attributes))
        self.older.append((self.value, self.shape))
        self.value, self.shape = name, shape
        return name

    # --- operators; each returns False where it does not fit -----------------------------------------
    def conv(self) -> bool:
        if len(self.shape) != 3:
            return False
        c, h, w = self.shape
        k, s, d = self.rng.choice((1, 2, 3)), self.rng.choice((1, 1, 2)), self.rng.choice((1, 1, 1, 2))
        pads = [self.rng.choice((0, 1, 2)) for _ in range(4)]
        group = self.rng.choice((1, 1, c))
        out = group * self.rng.choice((1, 2)) if group > 1 else self.rng.choice((1, 2, 3, 4))
        sizes = [(n + pads[i] + pads[i + 2] - (k - 1) * d - 1) // s + 1 for i, n in enumerate((h, w))]
        if min(sizes) < 1:
            return False
        inputs = [self.value, self.normal(out, c // group, k, k)]
        if self.rng.random() < 0.7:
            inputs.append(self.const(self.data.normal(size=out).astype(np.float32)))
        self.node(
            "Conv", inputs, (out, *sizes), kernel_shape=[k, k], strides=[s, s], dilations=[d, d], pads=pads, group=group
        )
        return True

    def pool(self) -> bool:
        if len(self.shape) != 3 or min(self.shape[1:]) < 3:
            return False
        c, h, w = self.shape
        op = self.rng.choice(("MaxPool", "AveragePool"))
        k, s = self.rng.choice((2, 3)), self.rng.choice((1, 2))
        pads = [self.rng.choice((0, 0, 1)) for _ in range(4)] if op == "MaxPool" else [0] * 4
        sizes = [(n + pads[i] + pads[i + 2] - k) // s + 1 for i, n in enumerate((h, w))]
        self.node(op, [self.value], (c, *sizes), kernel_shape=[k, k], strides=[s, s], pads=pads)
        return True

    def activation(self) -> bool:
        op = self.rng.choice(("Relu", "Relu6", "Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "HardSigmoid"))
        if op == "Relu6":
            self.node("Clip", [self.value, self.const(np.float32(0)), self.const(np.float32(6))], self.shape)
        else:
            self.node(op, [self.value], self.shape)
        return True

    def transpose(self) -> bool:
        if not self.shape:
            return False
        order = list(range(len(self.shape)))
        self.rng.shuffle(order)
        self.node("Transpose", [self.value], tuple(self.shape[a] for a in order), perm=[0, *(a + 1 for a in order)])
        return True

    def reshape(self) -> bool:
        total = int(np.prod(self.shape))
        shape: list[int] = []
        rest = total
        for _ in range(self.rng.choice((0, 1, 2))):
            size = self.rng.choice([d for d in range(1, rest + 1) if rest % d == 0])
            shape.append(size)
            rest //= size
        shape.append(rest)
        self.node(
            "Reshape",
            [self.value, self.const(np.array([-1 if self.batch == "batch" else 2, *shape], np.int64))],
            tuple(shape),
        )
        return True

    def split_channels(self) -> bool:
        """The channel shuffle of ShuffleNet."""
        if len(self.shape) != 3 or self.shape[0] % 2:
            return False
        c, h, w = self.shape
        n = -1 if self.batch == "batch" else 2
        self.node("Reshape", [self.value, self.const(np.array([n, 2, c // 2, h, w], np.int64))], (2, c // 2, h, w))
        self.node("Transpose", [self.value], (c // 2, 2, h, w), perm=[0, 2, 1, 3, 4])
        self.node("Reshape", [self.value, self.const(np.array([n, c, h, w], np.int64))], (c, h, w))
        return True

    def add(self) -> bool:
        op = self.rng.choice(("Add", "Mul", "Sub"))
        same = [v for v, s in self.older if s == self.shape]
        if same and self.rng.random() < 0.6:
            other = self.rng.choice(same)
        else:
            keep = [self.rng.random() < 0.5 for _ in self.shape]
            sizes = [n if k else 1 for n, k in zip(self.shape, keep, strict=True)]
            first = self.rng.randrange(len(sizes) + 1)
            other = self.const(self.data.normal(size=sizes[first:]).astype(np.float32))
        pair = [self.value, other]
        if op != "Sub":
            self.rng.shuffle(pair)
        self.node(op, pair, self.shape)
        return True

    def concat(self) -> bool:
        if not self.shape:
            return False
        axis = self.rng.randrange(len(self.shape))
        fits = [
            (v, s)
            for v, s in self.older
            if len(s) == len(self.shape) and s[:axis] + s[axis + 1 :] == self.shape[:axis] + self.shape[axis + 1 :]
        ]
        if not fits:
            return False
        other, sizes = self.rng.choice(fits)
        shape = list(self.shape)
        shape[axis] += sizes[axis]
        self.node("Concat", [self.value, other], tuple(shape), axis=axis + 1)
        return True

    def slice(self) -> bool:
        if not self.shape:
            return False
        axis = self.rng.randrange(len(self.shape))
        size = self.shape[axis]
        if size < 2:
            return False
        start = self.rng.randrange(size - 1)
        end = self.rng.randrange(start + 1, size + 1)
        step = self.rng.choice((1, 1, 2))
        shape = list(self.shape)
        shape[axis] = len(range(start, end, step))
        values = [self.const(np.array([v], np.int64)) for v in (start, end, axis + 1, step)]
        self.node("Slice", [self.value, *values], tuple(shape))
        return True

    def pad(self) -> bool:
        if not self.shape:
            return False
        rank = len(self.shape)
        pads = [self.rng.choice((0, 0, 1, 2)) for _ in range(2 * rank)]
        spec = [0, *pads[:rank], 0, *pads[rank:]]
        shape = tuple(n + pads[i] + pads[i + rank] for i, n in enumerate(self.shape))
        self.node("Pad", [self.value, self.const(np.array(spec, np.int64))], shape)
        return True

    def mean(self) -> bool:
        if len(self.shape) < 2:
            return False
        axes = sorted(self.rng.sample(range(len(self.shape)), self.rng.randrange(1, len(self.shape))))
        keep = self.rng.random() < 0.5
        shape = tuple(1 if i in axes else n for i, n in enumerate(self.shape) if keep or i not in axes)
        self.node(
            "ReduceMean", [self.value, self.const(np.array([a + 1 for a in axes], np.int64))], shape, keepdims=int(keep)
        )
        return True

    def softmax(self) -> bool:
        if not self.shape:
            return False
        self.node("Softmax", [self.value], self.shape, axis=self.rng.randrange(len(self.shape)) + 1)
        return True

    def dense(self) -> bool:
        if not self.shape or self.shape[-1] > 512:
            return False
        out = self.rng.choice((1, 3, 5))
        if len(self.shape) == 1 and self.rng.random() < 0.5:
            inputs = [
                self.value,
                self.normal(out, self.shape[-1]),
                self.const(self.data.normal(size=out).astype(np.float32)),
            ]
            self.node("Gemm", inputs, (out,), transB=1)
        else:
            weights = self.const(self.data.normal(size=(self.shape[-1], out)).astype(np.float32) / 3)
            self.node("MatMul", [self.value, weights], (*self.shape[:-1], out))
        return True

    def head(self) -> bool:
        """A flattened image into a dense layer, as classifiers end."""
        size = int(np.prod(self.shape))
        if len(self.shape) != 3 or size > 512:
            return False
        self.node("Reshape", [self.value, self.const(np.array([-1, size], np.int64))], (size,))
        return self.dense()

    def resize(self) -> bool:
        if len(self.shape) != 3 or max(self.shape[1:]) > 10:
            return False
        c, h, w = self.shape
        scales = self.const(np.array([1, 1, 2, 2], np.float32))
        self.node("Resize", [self.value, "", scales], (c, 2 * h, 2 * w), mode="nearest",
                  coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
        return True

    STEPS = (
        conv, conv, conv, pool, activation, activation, transpose, transpose, reshape, split_channels, add, add, concat,
        slice, pad, mean, softmax, dense, head, resize,
    )  # fmt: skip

    def model(self) -> ir.Model:
        outputs = [(self.value, self.shape)]
        if self.rng.random() < 0.3:
            extra = self.rng.choice(self.older)
            if extra[0] not in ("x", self.value):
                outputs.append(extra)
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [self.batch, *self.input[1]])],
            [helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, [self.batch, *s]) for v, s in outputs],
            self.weights,
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def random_model(rng: random.Random, steps: int, *, dynamic: bool) -> ir.Model:
    """A model of about `steps` operators; at least one."""
    builder = Builder(rng, dynamic=dynamic)
    for _ in range(steps):
        if int(np.prod(builder.shape)) > 4096:
            break
        rng.choice(Builder.STEPS)(builder)
    if not builder.nodes:
        builder.activation()
    return builder.model()
