"""Resize by every combination of its attributes, and blocks of pixels for channels, against ONNX Runtime."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.tflite_single import (
    BOUND,
    Array,
    build,
    difference,
    litert,
    lowered,
    normal,
    onnxruntime,
    operators,
    reference,
)

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")

COORDINATES = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric")
NEAREST = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
SCALES = (0.5, 0.6, 0.75, 1.25, 1.5, 2.0, 2.25, 3.0)


def model_of(
    batch: Any, sizes: list[int], wanted: list[int], scales: list[float], **attributes: Any
) -> onnx.ModelProto:
    """Sizes if `scales` is empty."""
    if scales:
        weights: dict[str, Any] = {"s": np.array([1, 1, *scales], np.float32)}
        node = helper.make_node("Resize", ["x", "", "s"], ["y"], **attributes)
    else:
        weights = {"z": np.array(wanted, np.int64)}
        axes = list(range(2, 2 + len(sizes)))
        node = helper.make_node("Resize", ["x", "", "", "z"], ["y"], axes=axes, **attributes)
    return build([node], {"x": (np.float32, [batch, 3, *sizes])}, ["y"], weights)


def cases(mode: str, ranks: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Each coordinate transformation, and for `nearest` each rounding, with seeded sizes and scales."""
    rng, out = random.Random(mode), []
    for coordinates, rounding, rank in itertools.product(COORDINATES, NEAREST if mode == "nearest" else ("",), ranks):
        if (mode, coordinates) == ("nearest", "half_pixel_symmetric"):
            continue  # ONNX Runtime's float32 noise decides its ties: see below
        for _ in range(repeats):
            sizes = [rng.randint(2, 7) for _ in range(rank)]
            given = [rng.choice(SCALES) for _ in range(rank)] if rng.random() < 0.5 else []
            wanted = [rng.randint(1, 13) for _ in range(rank)]
            news = [int(s * f) for s, f in zip(sizes, given, strict=False)]
            if given and any(n in (0, s) for n, s in zip(news, sizes, strict=True)):
                given = []
            if given and coordinates == "align_corners":  # refused unless the scale fits: a test of its own
                given = [float(rng.choice((2, 3))) for _ in range(rank)]
            case: dict[str, Any] = {
                "batch": rng.choice(("batch", 2)),
                "sizes": sizes,
                "wanted": wanted,
                "scales": given,
            }
            case |= {"mode": mode, "coordinate_transformation_mode": coordinates}
            case |= {"nearest_mode": rounding} if rounding else {"antialias": int(rng.random() < 0.3)}
            if mode == "cubic":
                case |= {"cubic_coeff_a": rng.choice((-0.5, -0.75)), "exclude_outside": int(rng.random() < 0.3)}
            out.append(case)
    return out


def feed(model: onnx.ModelProto) -> dict[str, Array]:
    return {"x": normal(0, *(d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim))}


@pytest.mark.parametrize(
    "case", cases("nearest", (1, 2, 3), 2) + cases("linear", (1, 2, 3), 4) + cases("cubic", (2,), 6), ids=str
)
def test_as_onnx_runtime(case: dict[str, Any]) -> None:
    model = model_of(**case)
    feeds = feed(model)
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) <= BOUND


@pytest.mark.parametrize("rounding", NEAREST)
@pytest.mark.parametrize(("size", "wanted"), [(6, 2), (3, 13), (7, 12), (5, 4)])
def test_symmetric_nearest_as_the_definition(rounding: str, size: int, wanted: int) -> None:
    attributes = {"coordinate_transformation_mode": "half_pixel_symmetric", "nearest_mode": rounding}
    model = model_of("batch", [size], [wanted], [], mode="nearest", **attributes)
    feeds = feed(model)
    assert difference(litert(model, feeds), reference(model, feeds)) == 0


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("coordinates", ["asymmetric", "half_pixel"])
def test_whole_factors_are_one_operator(factor: int, coordinates: str) -> None:
    rounding = {"asymmetric": "floor", "half_pixel": "round_prefer_floor"}[coordinates]
    attributes = {"coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    nearest = model_of("batch", [4, 5], [], [factor] * 2, mode="nearest", **attributes)
    assert operators(nearest).count("RESIZE_NEAREST_NEIGHBOR") == 1
    assert "GATHER" not in operators(nearest)
    linear = model_of("batch", [4, 5], [], [factor] * 2, mode="linear", coordinate_transformation_mode=coordinates)
    assert operators(linear).count("RESIZE_BILINEAR") == 1
    for model in (nearest, linear):
        assert difference(litert(model, feed(model)), onnxruntime(model, feed(model))) <= BOUND


def test_it_moves_no_axis_behind_a_convolution() -> None:
    for mode, coordinates in (("nearest", "half_pixel"), ("linear", "half_pixel"), ("cubic", "align_corners")):
        nodes = [
            helper.make_node("Transpose", ["image"], ["x"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["x", "mix"], ["v"]),
            helper.make_node("Resize", ["v", "", "", "z"], ["u"], axes=[2, 3], mode=mode,
                             coordinate_transformation_mode=coordinates, nearest_mode="ceil"),
            helper.make_node("Conv", ["u", "mix"], ["w"]),
            helper.make_node("Transpose", ["w"], ["y"], perm=[0, 2, 3, 1]),
        ]  # fmt: skip
        weights = {"mix": normal(1, 3, 3, 1, 1), "z": np.array([9, 7], np.int64)}
        model = build(nodes, {"image": (np.float32, ["batch", 4, 5, 3])}, ["y"], weights)
        feeds = {"image": normal(2, 2, 4, 5, 3)}
        assert "TRANSPOSE" not in operators(model)
        assert difference(litert(model, feeds), onnxruntime(model, feeds)) <= BOUND


def test_refusals() -> None:
    unfit = model_of(2, [5], [], [0.6], mode="linear", coordinate_transformation_mode="align_corners")
    assert not lowered(unfit).refusals  # 3 of 5
    for model, told in (
        (model_of(2, [4], [], [0.6], mode="linear", coordinate_transformation_mode="align_corners"), "scale"),
        (model_of(2, [2], [], [1.3], mode="nearest"), "changes no size"),
    ):
        assert told in str(lowered(model).refusals[0])


# --- blocks of pixels for channels -----------------------------------------------------------------------------
@pytest.mark.parametrize("batch", ["batch", 2])
@pytest.mark.parametrize(("mode", "block"), [("DCR", 2), ("CRD", 2), ("DCR", 3), ("CRD", 3)])
def test_depth_to_space(mode: str, block: int, batch: Any) -> None:
    node = helper.make_node("DepthToSpace", ["x"], ["y"], mode=mode, blocksize=block)
    model = build([node], {"x": (np.float32, [batch, 2 * block**2, 3, 4])}, ["y"], {})
    feeds = {"x": normal(0, 2, 2 * block**2, 3, 4)}
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) == 0


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("group", [1, 2])
def test_a_pixel_shuffle_behind_a_convolution_moves_no_channel(group: int, seen: bool) -> None:
    """The convolution makes its channels in the other order, unless somebody else looks at them."""
    nodes = [
        helper.make_node("Transpose", ["image"], ["x"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["x", "w", "b"], ["a"], group=group),
        helper.make_node("Relu", ["a"], ["v"]),
        helper.make_node("DepthToSpace", ["v"], ["u"], mode="CRD", blocksize=2),
        helper.make_node("Transpose", ["u"], ["y"], perm=[0, 2, 3, 1]),
    ]
    weights = {"w": normal(1, 12, 6 // group, 1, 1), "b": normal(2, 12)}
    outputs = ["y", "v"] if seen else ["y"]
    model = build(nodes, {"image": (np.float32, ["batch", 4, 5, 6])}, outputs, weights)
    assert ("TRANSPOSE" in operators(model)) == (group == 2 or seen)
    feeds = {"image": normal(3, 2, 4, 5, 6)}
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) <= BOUND


@pytest.mark.parametrize("batch", ["batch", 2])
@pytest.mark.parametrize("block", [2, 3])
def test_space_to_depth(block: int, batch: Any) -> None:
    node = helper.make_node("SpaceToDepth", ["x"], ["y"], blocksize=block)
    model = build([node], {"x": (np.float32, [batch, 3, 2 * block, 3 * block])}, ["y"], {})
    feeds = {"x": normal(0, 2, 3, 2 * block, 3 * block)}
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) == 0
