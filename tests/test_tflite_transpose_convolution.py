"""ConvTranspose as a convolution and a DEPTH_TO_SPACE, against ONNX Runtime and against exact integers."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.tflite_single import BOUND, Array, build, difference, litert, lowered, normal, onnxruntime, operators

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")


def model_of(rank: int, batch: Any, kernel: list[int], group: int, bias: bool, **attributes: Any) -> onnx.ModelProto:
    inputs, outputs = 2 * group, 3
    weights = {"w": normal(1, inputs, outputs, *kernel)}
    if bias:
        weights["b"] = normal(2, outputs * group)
    node = helper.make_node("ConvTranspose", ["x", "w", *(["b"] if bias else [])], ["y"], group=group, **attributes)
    return build([node], {"x": (np.float32, [batch, inputs, *(4, 5, 3)[:rank]])}, ["y"], weights)


def feed(model: onnx.ModelProto) -> dict[str, Array]:
    sizes = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
    return {"x": normal(0, *sizes)}


def cases() -> list[dict[str, Any]]:
    """Every value of every attribute at least once, in seeded mixtures."""
    rng, out = random.Random(0), []
    for rank, stride, size in itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 3, 4, 5)):
        uneven = rng.random() < 0.3
        strides = [rng.choice((1, 2, 3)) if uneven else stride for _ in range(rank)]
        case: dict[str, Any] = {"rank": rank, "strides": strides, "bias": rng.random() < 0.6}
        case["kernel"] = [rng.choice((1, 2, 3, 4)) if uneven else size for _ in range(rank)]
        case["batch"] = rng.choice(("batch", 2))
        case["group"] = 1 if rank == 3 else rng.choice((1, 1, 2, 3))
        case["dilations"] = [rng.choice((1, 1, 2)) for _ in range(rank)]
        case["output_padding"] = [rng.randrange(s) for s in strides]
        way = rng.choice(("pads", "pads", "pads", "VALID", "NOTSET"))
        if way == "pads":
            spans = [(k - 1) * d for k, d in zip(case["kernel"], case["dilations"], strict=True)]
            case["pads"] = [rng.randint(0, min(2, span)) for _ in range(2) for span in spans]
        else:
            case["auto_pad"] = way
        out.append(case)
    return out


@pytest.mark.parametrize("case", cases(), ids=str)
def test_as_onnx_runtime(case: dict[str, Any]) -> None:
    model = model_of(**case)
    feeds = feed(model)
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) <= BOUND


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (5, 2), (3, 3), (4, 1), (3, 1)])
def test_padding_to_the_same_size(auto_pad: str, kernel: int, stride: int) -> None:
    model = model_of(2, "batch", [kernel] * 2, 1, True, auto_pad=auto_pad, strides=[stride] * 2)
    feeds = feed(model)
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) <= BOUND


@pytest.mark.parametrize("shape", [[8, 10], [7, 9], [9, 11], [10, 12]])
def test_a_given_output_shape(shape: list[int]) -> None:
    model = model_of(2, 2, [3, 3], 1, True, strides=[2, 2], output_shape=shape)
    feeds = feed(model)
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) <= BOUND


@pytest.mark.parametrize(("kernel", "stride", "pads"), [(2, 2, 0), (3, 2, 1), (4, 2, 1), (3, 1, 1), (5, 3, 1)])
def test_no_transpose_between_convolutions(kernel: int, stride: int, pads: int) -> None:
    up = helper.make_node("ConvTranspose", ["v", "w"], ["u"], strides=[stride] * 2, pads=[pads] * 4)
    nodes = [helper.make_node("Conv", ["x", "mix"], ["v"]), up, helper.make_node("Conv", ["u", "mix"], ["y"])]
    weights = {"mix": normal(3, 4, 4, 1, 1), "w": normal(4, 4, 4, kernel, kernel)}
    channels_last = [helper.make_node("Transpose", ["image"], ["x"], perm=[0, 3, 1, 2]), *nodes]
    back = helper.make_node("Transpose", ["y"], ["out"], perm=[0, 2, 3, 1])
    model = build([*channels_last, back], {"image": (np.float32, ["batch", 6, 7, 4])}, ["out"], weights)
    assert "TRANSPOSE" not in operators(model)
    feeds = {"image": normal(5, 3, 6, 7, 4)}
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) <= BOUND


def scattered(x: Array, weight: Array, stride: int, group: int) -> Array:
    """ConvTranspose by its definition, without padding: each input adds a scaled kernel to the output."""
    batch, inputs, rows, columns = x.shape
    outputs, kernel = weight.shape[1], weight.shape[2]
    out = np.zeros((batch, group * outputs, (rows - 1) * stride + kernel, (columns - 1) * stride + kernel))
    for g, a, b in itertools.product(range(group), range(kernel), range(kernel)):
        part = slice(g * inputs // group, (g + 1) * inputs // group)
        seen = out[:, g * outputs : (g + 1) * outputs, a::stride, b::stride][:, :, :rows, :columns]
        seen += np.einsum("nihw,io->nohw", x[:, part], weight[part, :, a, b])
    return out


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (4, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("kernels", ["AUTO", "BUILTIN_REF"])
def test_int8_with_a_scale_per_output_channel_is_within_one_step(
    kernel: int, stride: int, group: int, kernels: str
) -> None:
    """Against float64 on the integers: group 1 has a scale per output channel, as ONNX stores it on axis 1."""
    rng = np.random.default_rng(0)
    inputs, outputs = 4, 3
    weight = rng.integers(-127, 128, (inputs, outputs, kernel, kernel)).astype(np.int8)
    scales = rng.uniform(0.005, 0.02, outputs).astype(np.float32)
    bias = rng.integers(-4000, 4000, outputs * group).astype(np.int32)
    x_scale, x_zero, y_scale, y_zero = np.float32(0.031), np.int8(-7), np.float32(0.27), np.int8(5)
    bias_scale = np.tile(x_scale * scales, group)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xr"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wr"], axis=1),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["br"], axis=0),
        helper.make_node("ConvTranspose", ["xr", "wr", "br"], ["v"], strides=[stride] * 2, group=group, pads=[1] * 4),
        helper.make_node("QuantizeLinear", ["v", "ys", "yz"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]
    constants: dict[str, Any] = {
        "xs": x_scale, "xz": x_zero, "w": weight, "ws": scales, "wz": np.zeros(outputs, np.int8), "b": bias,
        "bs": bias_scale, "ys": y_scale, "yz": y_zero,
    }  # fmt: skip
    model = build(nodes, {"x": (np.float32, ["batch", inputs, 5, 6])}, ["y"], constants)
    stored = rng.integers(-128, 128, (2, inputs, 5, 6))
    feeds = {"x": ((stored - int(x_zero)) * x_scale).astype(np.float32)}
    got = litert(model, feeds, kernels)["y"] / y_scale + y_zero
    numbers = weight * scales.astype(np.float64)[:, None, None]
    exact = scattered((stored - int(x_zero)) * np.float64(x_scale), numbers, stride, group)[:, :, 1:-1, 1:-1]
    exact += (bias * bias_scale.astype(np.float64))[:, None, None]
    wanted = np.clip(np.rint(exact / y_scale) + y_zero, -128, 127)
    assert np.abs(got - wanted).max() <= 1
    assert not lowered(model).islands


def test_refusals_name_what_is_missing() -> None:
    grouped = model_of(3, 2, [2, 2, 2], 2, False, strides=[2, 2, 2])
    computed = build(
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"])],
        {"x": (np.float32, [1, 2, 4, 4]), "w": (np.float32, [2, 3, 2, 2])}, ["y"], {},
    )  # fmt: skip
    for model, told in ((grouped, "grouped"), (computed, "computed")):
        assert told in str(lowered(model).refusals[0])
