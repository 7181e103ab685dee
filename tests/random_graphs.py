"""Random float graphs of the operators that a factor may cross, and of those that must stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit import model as M

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]  # without the batch


@dataclass
class Builder:
    """A graph that grows at its end. values: name -> shape behind the batch axis."""

    draw: st.DrawFn
    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    values: dict[str, Shape] = field(default_factory=dict)
    at: str = "x"

    @property
    def shape(self) -> Shape:
        return self.values[self.at]

    def fresh(self, stem: str) -> str:
        return f"{stem}{len(self.nodes)}_{len(self.weights)}"

    def weight(self, *shape: int, scale: float = 0.5) -> str:
        """A new constant, or one of the same shape that is there already."""
        same = [n for n, a in self.weights.items() if a.shape == shape and a.dtype == np.float32 and n.startswith("w")]
        if same and self.draw(st.booleans()):
            return same[0]
        name = self.fresh("w")
        rng = np.random.default_rng(self.seed + len(self.weights))
        self.weights[name] = (rng.normal(size=shape) * scale).astype(np.float32)
        return name

    def constant(self, array: Any, dtype: Any = np.int64) -> str:
        name = self.fresh("k")
        self.weights[name] = np.asarray(array, dtype)
        return name

    def add(self, op: str, inputs: list[str], shape: Shape, **attributes: Any) -> str:
        out = self.fresh("v")
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"{op}_{out}", **attributes))
        self.values[out], self.at = shape, out
        return out

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def others(self, fits: Callable[[Shape], bool]) -> list[str]:
        return [n for n, s in self.values.items() if len(s) == len(self.shape) and fits(s)]

    def model(self, outputs: list[str], input_shape: Shape) -> Any:
        infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", *self.values[n]]) for n in outputs]
        proto = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *input_shape])],
            infos,
            [numpy_helper.from_array(a, n) for n, a in self.weights.items()],
        )
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return M.from_proto(model)


# --- one operator each ------------------------------------------------------------------------------------
def _conv(b: Builder) -> None:
    if len(b.shape) < 2:
        return
    channels, *size = b.shape
    group = b.pick(*{1, channels, 2 if channels % 2 == 0 else 1})
    made = group * b.pick(1, 2) if group > 1 else b.pick(3, 4)
    inputs = [b.at, b.weight(made, channels // group, *[3] * len(size))]
    if b.draw(st.booleans()):
        inputs.append(b.weight(made))
    b.add("Conv", inputs, (made, *size), group=group, pads=[1] * (2 * len(size)), kernel_shape=[3] * len(size))


def _conv_transpose(b: Builder) -> None:
    if len(b.shape) < 2:
        return
    channels, *size = b.shape
    group = b.pick(1, 2 if channels % 2 == 0 else 1)
    inputs = [b.at, b.weight(channels, 2, *[3] * len(size))]
    if b.draw(st.booleans()):
        inputs.append(b.weight(2 * group))
    b.add("ConvTranspose", inputs, (2 * group, *size), group=group, pads=[1] * (2 * len(size)))


def _gemm(b: Builder) -> None:
    if len(b.shape) > 1:
        _flatten(b)
    (features,), made, transposed = b.shape, b.pick(3, 6), b.pick(0, 1)
    inputs = [b.at, b.weight(*((made, features) if transposed else (features, made)))]
    if b.draw(st.booleans()):
        inputs.append(b.weight(*b.pick((made,), (1, made), (1,), ())))
    numbers = b.pick({}, {}, {"alpha": 0.5}, {"beta": 2.0})
    b.add("Gemm", inputs, (made,), transB=transposed, **numbers)


def _matmul(b: Builder) -> None:
    made = b.pick(3, 6)
    b.add("MatMul", [b.at, b.weight(b.shape[-1], made)], (*b.shape[:-1], made))


def _unary(b: Builder) -> None:
    op = b.pick("Relu", "Relu", "LeakyRelu", "Identity", "Abs", "Neg", "HardSwish", "Sigmoid", "Tanh", "Dropout")
    b.add(op, [b.at], b.shape)


def _prelu(b: Builder) -> None:
    slopes = b.pick((1,), (b.shape[0], *[1] * (len(b.shape) - 1)), (b.shape[-1],))
    b.add("PRelu", [b.at, b.weight(*slopes)], b.shape)


def _clip(b: Builder) -> None:
    low, high = b.pick((0.0, 6.0), (0.0, 1.0), (0.0, None), (-1.0, 1.0), (None, 1.0), (0.5, None))
    inputs = [b.at, "" if low is None else b.constant(low, np.float32)]
    b.add("Clip", inputs + ([b.constant(high, np.float32)] if high is not None else []), b.shape)


def _with_constant(b: Builder) -> None:
    rank = len(b.shape)
    shape = b.pick((), (1,), b.shape, (b.shape[0], *[1] * (rank - 1)), (1, b.shape[0], *[1] * (rank - 1)), b.shape[-1:])
    operands = [b.at, b.weight(*shape)]
    b.add(b.pick("Add", "Add", "Sub", "Mul", "Min", "Max"), b.pick(operands, operands[::-1]), b.shape)


def _with_value(b: Builder) -> None:
    def fits(shape: Shape) -> bool:
        return all(m in (n, 1) for n, m in zip(b.shape, shape, strict=True))

    operands = [b.at, b.pick(*b.others(fits))]
    b.add(b.pick("Add", "Add", "Add", "Sub", "Mul", "Max"), b.pick(operands, operands[::-1]), b.shape)


def _gate(b: Builder) -> None:
    """Squeeze and excite, its gate perhaps through a reshape."""
    if len(b.shape) != 3:
        return
    carried, (channels, height, width) = b.at, b.shape
    b.add("GlobalAveragePool", [carried], (channels, 1, 1))
    b.add("Conv", [b.at, b.weight(2, channels, 1, 1), b.weight(2)], (2, 1, 1))
    b.add("Relu", [b.at], (2, 1, 1))
    b.add("Conv", [b.at, b.weight(channels, 2, 1, 1)], (channels, 1, 1))
    b.add(b.pick("Sigmoid", "HardSigmoid", "Tanh"), [b.at], (channels, 1, 1))
    if b.draw(st.booleans()):
        b.add("Squeeze", [b.at, b.constant([2, 3])], (channels,))
        b.add("Reshape", [b.at, b.constant([-1, channels, 1, 1])], (channels, 1, 1))
    operands = [carried, b.at]
    b.add("Mul", b.pick(operands, operands[::-1]), (channels, height, width))


def _concat(b: Builder) -> None:
    axis = b.draw(st.integers(0, len(b.shape) - 1))

    def fits(shape: Shape) -> bool:
        return all(n == m for i, (n, m) in enumerate(zip(b.shape, shape, strict=True)) if i != axis)

    other = b.pick(*b.others(fits))
    shape = list(b.shape)
    shape[axis] += b.values[other][axis]
    if int(np.prod(shape)) <= 600:
        b.add("Concat", [b.at, other], tuple(shape), axis=b.pick(axis + 1, axis - len(b.shape)))


def _pad(b: Builder) -> None:
    rank = len(b.shape)
    axis = b.draw(st.integers(0, rank - 1))
    begin, end = b.pick((1, 0), (1, 1), (1, -1) if b.shape[axis] > 1 else (1, 1), (0, 0))
    pads = [0] * (2 * rank + 2)
    pads[axis + 1], pads[axis + 2 + rank] = begin, end
    mode = b.pick("constant", "constant", "edge")
    inputs = [b.at, b.constant(pads)]
    if mode == "constant" and b.draw(st.booleans()):
        inputs.append(b.constant(b.pick(0.0, 1.0), np.float32))
    shape = tuple(n + (begin + end if i == axis else 0) for i, n in enumerate(b.shape))
    b.add("Pad", inputs, shape, mode=mode)


def _pool(b: Builder) -> None:
    if len(b.shape) < 2:
        return
    channels, *size = b.shape
    op = b.pick("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")
    if op.startswith("Global"):
        b.add(op, [b.at], (channels, *[1] * len(size)))
    else:
        b.add(op, [b.at], b.shape, kernel_shape=[3] * len(size), pads=[1] * (2 * len(size)))


def _resize(b: Builder) -> None:
    if len(b.shape) != 3 or int(np.prod(b.shape)) > 150:
        return
    channels, height, width = b.shape
    way = b.pick({"mode": "nearest"}, {"mode": "linear"}, {"mode": "cubic"}, {"mode": "linear", "outside": 1.0})
    outside = way.pop("outside", None)
    if outside is None:
        inputs = [b.at, "", b.constant([1, 1, 2, 2], np.float32)]
    else:
        roi = b.constant([0, 0, -0.5, -0.5, 1, 1, 1.5, 1.5], np.float32)
        inputs = [b.at, roi, b.constant([1, 1, 2, 2], np.float32)]
        way |= {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": outside}
    b.add("Resize", inputs, (channels, 2 * height, 2 * width), **way)


def _transpose(b: Builder) -> None:
    order = b.draw(st.permutations(range(len(b.shape))))
    b.add("Transpose", [b.at], tuple(b.shape[i] for i in order), perm=[0, *(i + 1 for i in order)])


def _reshape(b: Builder) -> None:
    first, *rest = b.shape
    shape = b.pick(
        (int(np.prod(b.shape)),),
        (first, int(np.prod(rest))),
        (int(np.prod(b.shape[:-1])), b.shape[-1]),
        (*b.shape, 1),
        (1, *b.shape),
        b.shape[::-1],
        (first, *rest),
    )
    if len(shape) <= 4:
        b.add("Reshape", [b.at, b.constant([-1, *shape])], shape)


def _flatten(b: Builder) -> None:
    b.add("Flatten", [b.at], (int(np.prod(b.shape)),), axis=1)


def _squeeze(b: Builder) -> None:
    if b.shape[0] == 1 and len(b.shape) > 1:
        b.add("Squeeze", [b.at, b.constant([1])], b.shape[1:])
    elif len(b.shape) < 4:
        axis = b.draw(st.integers(1, len(b.shape) + 1))
        b.add("Unsqueeze", [b.at, b.constant([axis])], (*b.shape[: axis - 1], 1, *b.shape[axis - 1 :]))


def _normalize(b: Builder) -> None:
    inputs = [b.at, b.weight(b.shape[-1])] + ([b.weight(b.shape[-1])] if b.draw(st.booleans()) else [])
    b.add("LayerNormalization", inputs, b.shape, axis=-1)


def _branch(b: Builder) -> None:
    """An If whose branches read a value from outside, the node before it or an older one."""
    read = b.pick(*(n for n in b.values if b.values[n] == b.shape))
    name = b.fresh("g")

    def body(op: str) -> onnx.GraphProto:
        out = f"{name}_{op.lower()}"
        made = helper.make_node(op, [read], [out], name=f"{name}_{op}_node")
        return helper.make_graph([made], out, [], [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)])

    condition = b.constant(b.draw(st.booleans()), np.bool_)
    b.add("If", [condition], b.shape, then_branch=body("Sigmoid"), else_branch=body("Exp"))
    b.add("Tanh", [b.at], b.shape)  # stays tame


OPERATORS: dict[str, Callable[[Builder], None]] = {
    f.__name__.lstrip("_"): f
    for f in (
        _conv, _conv_transpose, _gemm, _matmul, _unary, _prelu, _clip, _with_constant, _with_value, _gate, _concat,
        _pad, _pool, _resize, _transpose, _reshape, _squeeze, _normalize, _branch,
    )
}  # fmt: skip
_COMMON = ("conv", "conv", "matmul", "unary", "unary", "transpose")
INPUT: Shape = (4, 5, 3)


@st.composite
def networks(draw: st.DrawFn, most: int = 9) -> tuple[Any, Array]:
    """(model, x): x float32 (3, 4, 5, 3); a conv first and a conv or a product last, so that there are factors."""
    b = Builder(draw, draw(st.integers(0, 10**6)))
    b.values["x"] = INPUT
    _conv(b)
    for kind in draw(st.lists(st.sampled_from((*OPERATORS, *_COMMON)), min_size=1, max_size=most)):
        if int(np.prod(b.shape)) <= 1500:
            OPERATORS[kind](b)
    (_conv if len(b.shape) > 1 and draw(st.booleans()) else _matmul)(b)
    outputs = [b.at]
    inner = [n for n in b.values if n not in ("x", b.at)]
    if inner and draw(st.integers(0, 3)) == 0:
        outputs.append(draw(st.sampled_from(inner)))
    return b.model(outputs, INPUT), np.random.default_rng(b.seed).normal(size=(3, *INPUT)).astype(np.float32)
