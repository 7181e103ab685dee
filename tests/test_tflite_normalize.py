"""Normalizations over axes, against ONNX Runtime or ONNX's own definition; with and without a free batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from tests.tflite_single import BOUND, build, difference, litert, lowered, normal, onnxruntime, operators, reference

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")

SIZES = (4, 6, 5, 3)
CASES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [  # operator, shapes of scale and bias, attributes
    *(("LayerNormalization", SIZES[axis:], {"axis": axis}) for axis in (1, 2, 3, -1)),
    ("LayerNormalization", (3,), {"epsilon": 0.1}),
    ("RMSNormalization", (5, 3), {"axis": 2}),
    ("RMSNormalization", (3,), {"epsilon": 0.1}),
    ("InstanceNormalization", (6,), {}),
    ("InstanceNormalization", (6,), {"epsilon": 0.1}),
    *(("GroupNormalization", (6,), {"num_groups": groups}) for groups in (1, 2, 6)),
    *(("MeanVarianceNormalization", (), {"axes": axes}) for axes in ([2, 3], [1], [-1], [0, 2, 3])),
    *(("LpNormalization", (), {"p": p, "axis": axis}) for p in (1, 2) for axis in (1, -1)),
    *(("LRN", (), {"size": size, "alpha": 0.2, "beta": 0.6, "bias": 2.0}) for size in (1, 3, 5)),
]


@pytest.mark.parametrize("behind_a_convolution", [False, True])
@pytest.mark.parametrize("batch", ["batch", 4])
@pytest.mark.parametrize(("op", "shape", "attributes"), CASES, ids=str)
def test_as_defined(
    op: str, shape: tuple[int, ...], attributes: dict[str, Any], batch: Any, behind_a_convolution: bool
) -> None:
    weights = {"mix": normal(9, 6, 6, 1, 1)}
    names = ["scale", "bias"][: 1 if op == "RMSNormalization" else 2] if shape else []
    weights |= {name: normal(seed, *shape) for seed, name in enumerate(names)}
    nodes = [helper.make_node(op, ["v", *names], ["y"], **attributes)]
    nodes.insert(0, helper.make_node(*(("Conv", ["x", "mix"]) if behind_a_convolution else ("Identity", ["x"])), ["v"]))
    model = build(nodes, {"x": (np.float32, [batch, *SIZES[1:]])}, ["y"], weights)
    feeds = {"x": normal(5, *SIZES)}
    other = reference if op in ("RMSNormalization", "GroupNormalization") else onnxruntime
    assert difference(litert(model, feeds), other(model, feeds)) <= BOUND


def test_small_deviations_keep_the_definition_of_mean_variance_normalization() -> None:
    """ONNX adds its 1e-9 to the deviation, not to the variance: at a deviation of 1e-5 that is 5e-5 against 1e-4."""
    model = build(
        [helper.make_node("MeanVarianceNormalization", ["x"], ["y"], axes=[1])], {"x": (np.float32, [2, 6])}, ["y"], {}
    )
    x = (normal(0, 2, 6) * 1e-5).astype(np.float32)
    deviation = x.astype(np.float64).std(1, keepdims=True)
    wanted = (x - x.astype(np.float64).mean(1, keepdims=True)) / (deviation + 1e-9)
    assert difference(litert(model, {"x": x}), {"y": wanted}) <= BOUND


def test_a_layer_norm_over_channels_last_moves_nothing() -> None:
    """As ConvNeXt has it: Conv, to channels-last, LayerNormalization, back, Conv."""
    nodes = [
        helper.make_node("Transpose", ["image"], ["x"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["x", "mix"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 3, 1]),
        helper.make_node("LayerNormalization", ["b", "scale"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["d", "mix"], ["e"]),
        helper.make_node("Transpose", ["e"], ["y"], perm=[0, 2, 3, 1]),
    ]
    weights = {"mix": normal(1, 6, 6, 1, 1), "scale": normal(2, 6)}
    model = build(nodes, {"image": (np.float32, ["batch", 5, 4, 6])}, ["y"], weights)
    feeds = {"image": normal(3, 2, 5, 4, 6)}
    assert "TRANSPOSE" not in operators(model)
    assert difference(litert(model, feeds), onnxruntime(model, feeds)) <= BOUND


def test_an_even_window_is_refused() -> None:
    model = build([helper.make_node("LRN", ["x"], ["y"], size=4)], {"x": (np.float32, [1, 6, 5, 3])}, ["y"], {})
    assert "even" in str(lowered(model).refusals[0])
