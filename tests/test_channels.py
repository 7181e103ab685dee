"""Labels of channels: what may be rescaled together, and what must not be rescaled at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from edgekit.passes.apply_plan import prepared
from edgekit.passes.channels import Channels, trace
from tests.quantize_graphs import Array, graph, node, normal

F = np.float32


def between(*nodes: Any, shape: tuple[Any, ...] = (4, 6, 6), outputs: Any = None, **weights: Array) -> Any:
    """Conv x -> a, the nodes from a to z, and a 1x1 Conv z -> y. shape: of z without the batch; int64 for k*."""
    made = [
        node("Conv", ["x", "w0", "b0"], ["a"], name="first"),
        *nodes,
        node("Conv", ["z", "w1"], ["y"], name="last"),
    ]
    return prepared(
        graph(
            made,
            {"x": ["n", 2, 6, 6]},
            {"y": ["n", 3, *shape[1:]], **(outputs or {})},
            {"w0": normal(4, 2, 1, 1), "b0": normal(4), "w1": normal(3, shape[0], 1, 1), **weights},
        )
    )


def free(found: Channels, name: str) -> list[bool]:
    """Whether each channel of a value may be scaled; empty for a value without labels."""
    known = found._on.get(name)
    return [] if known is None else found.free(known[1]).tolist()


def whole(found: Channels, name: str) -> bool:
    return bool(free(found, name)) and all(free(found, name))


CROSSED: dict[str, tuple[list[Any], dict[str, Array]]] = {
    "relu": ([node("Relu", ["a"], ["z"])], {}),
    "leaky": ([node("LeakyRelu", ["a"], ["z"], alpha=0.1)], {}),
    "prelu": ([node("PRelu", ["a", "s"], ["z"])], {"s": normal(4, 1, 1)}),
    "abs": ([node("Abs", ["a"], ["z"])], {}),
    "neg": ([node("Neg", ["a"], ["z"])], {}),
    "max pool": ([node("MaxPool", ["a"], ["z"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])], {}),
    "mean pool": ([node("AveragePool", ["a"], ["z"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])], {}),
    "offset": ([node("Add", ["a", "c"], ["z"])], {"c": normal(4, 1, 1)}),
    "offset first": ([node("Sub", ["c", "a"], ["z"])], {"c": normal(1, 4, 6, 6)}),
    "factor": ([node("Mul", ["a", "c"], ["z"])], {"c": normal(4, 1, 1)}),
    "number": ([node("Mul", ["a", "c"], ["z"])], {"c": np.array(3, F)}),
    "bound": ([node("Min", ["a", "c"], ["z"])], {"c": normal(4, 1, 1)}),
    "upper clip": ([node("Clip", ["a", "lo", "hi"], ["z"])], {"lo": np.array(0, F), "hi": np.array(6, F)}),
    "there and back": (
        [node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]), node("Transpose", ["t"], ["z"], perm=[0, 3, 1, 2])],
        {},
    ),
    "shortcut": ([node("Relu", ["a"], ["r"]), node("Add", ["a", "r"], ["z"])], {}),
    "gate": (
        [
            node("GlobalAveragePool", ["x"], ["g"]),
            node("Conv", ["g", "wg"], ["h"], name="gating"),
            node("Sigmoid", ["h"], ["s"]),
            node("Mul", ["s", "a"], ["z"]),
        ],
        {"wg": normal(4, 2, 1, 1)},
    ),
}


@pytest.mark.parametrize("name", CROSSED)
def test_factors_cross(name: str) -> None:
    nodes, weights = CROSSED[name]
    found = trace(between(*nodes, **weights))
    assert whole(found, "a")
    assert found.roots(found._on["a"][1]).tolist() == found.roots(found._on["z"][1]).tolist()
    ends = {e.node.name for e in found.consumers}
    assert "last" in ends


STOPPED: dict[str, tuple[list[Any], dict[str, Array]]] = {
    **{op.lower(): ([node(op, ["a"], ["z"])], {}) for op in ("HardSwish", "Sigmoid", "Tanh", "Exp", "Erf", "Softplus")},
    "low clip": ([node("Clip", ["a", "lo"], ["z"])], {"lo": np.array(-1, F)}),
    "high clip": ([node("Clip", ["a", "", "hi"], ["z"])], {"hi": np.array(6, F)}),
    "number": ([node("Add", ["a", "c"], ["z"])], {"c": np.array(3, F)}),
    "row": ([node("Add", ["a", "c"], ["z"])], {"c": normal(6)}),
    "swish": ([node("Sigmoid", ["a"], ["s"]), node("Mul", ["a", "s"], ["z"])], {}),
    "square": ([node("Mul", ["a", "a"], ["z"])], {}),
    "ratio": ([node("Abs", ["a"], ["s"]), node("Div", ["a", "s"], ["z"])], {}),
    "fill": (
        [node("Pad", ["a", "k", "one"], ["z"])],
        {"k": np.array([0, 0, 0, 1, 0, 0, 0, -1]), "one": np.array(1, F)},
    ),
    "shift": ([node("Pad", ["a", "k"], ["z"])], {"k": np.array([0, 1, 0, 0, 0, -1, 0, 0])}),
    "softmax": ([node("Softmax", ["a"], ["z"], axis=1)], {}),
    "mean": ([node("ReduceMean", ["a", "k"], ["m"], keepdims=1), node("Sub", ["a", "m"], ["z"])], {"k": np.array([1])}),
}


@pytest.mark.parametrize("name", STOPPED)
def test_factors_stop(name: str) -> None:
    nodes, weights = STOPPED[name]
    found = trace(between(*nodes, **weights))
    assert free(found, "a") == [False] * 4


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_a_pool_over_the_channels_mixes_them(op: str) -> None:
    """Behind a Transpose the labels run on the last axis, which a pool of rank 4 slides over."""
    pool = node(op, ["t"], ["p"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    found = trace(
        between(
            node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]), pool, node("Transpose", ["p"], ["z"], perm=[0, 3, 1, 2])
        )
    )
    assert free(found, "a") == [False] * 4


def test_resize_keeps_channels_unless_it_fills_in_a_number_of_its_own() -> None:
    sizes = {"k": np.array([1, 1, 2, 2], F), "roi": np.array([0, 0, -0.5, -0.5, 1, 1, 1.5, 1.5], F)}
    plain = node("Resize", ["a", "", "k"], ["z"], mode="linear")
    assert whole(trace(between(plain, shape=(4, 12, 12), k=sizes["k"])), "a")
    crop = node(
        "Resize", ["a", "roi", "k"], ["z"], mode="linear", coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=2.0,
    )  # fmt: skip
    assert not any(free(trace(between(crop, shape=(4, 12, 12), **sizes)), "a"))


def test_an_operator_of_another_domain_is_not_understood() -> None:
    model = prepared(between(node("Relu", ["a"], ["z"], name="it")))
    next(n for n in model.graph if n.name == "it").domain = "com.example"
    assert free(trace(model), "a") == [False] * 4


def test_outputs_are_frozen_and_so_is_what_they_are_tied_to() -> None:
    found = trace(between(node("Relu", ["a"], ["z"]), outputs={"a": ["n", 4, 6, 6]}))
    assert free(found, "z") == [False] * 4
    assert free(found, "y") == [False] * 3


def test_a_value_read_by_two_layers_has_one_factor_and_two_readers() -> None:
    found = trace(
        between(
            node("Relu", ["a"], ["r"]),
            node("Conv", ["r", "v"], ["p"], name="left"),
            node("Conv", ["r", "v"], ["q"], name="right"),
            node("Add", ["p", "q"], ["z"]),
            v=normal(4, 4, 1, 1),
        )
    )
    assert whole(found, "r")
    assert {e.node.name for e in found.consumers} == {"left", "right", "last"}
    assert found.roots(found._on["p"][1]).tolist() == found.roots(found._on["q"][1]).tolist()


def test_concat_of_channels_keeps_labels_apart_and_of_rows_joins_them() -> None:
    second = node("Conv", ["x", "v"], ["b"], name="second")
    apart = trace(between(second, node("Concat", ["a", "b"], ["z"], axis=-3), shape=(8, 6, 6), v=normal(4, 2, 1, 1)))
    assert whole(apart, "z")
    assert len(set(apart.roots(apart._on["z"][1]).tolist())) == 8
    joined = trace(between(second, node("Concat", ["a", "b"], ["z"], axis=2), shape=(4, 12, 6), v=normal(4, 2, 1, 1)))
    assert joined.roots(joined._on["a"][1]).tolist() == joined.roots(joined._on["b"][1]).tolist()
    half = trace(
        between(
            second,
            node("Sigmoid", ["b"], ["s"]),
            node("Concat", ["a", "s"], ["z"], axis=1),
            shape=(8, 6, 6),
            v=normal(4, 2, 1, 1),
        )
    )
    assert free(half, "a") == [False] * 4


def test_features_of_a_flattened_map_carry_the_label_of_their_channel() -> None:
    model = prepared(
        graph(
            [
                node("Conv", ["x", "w"], ["a"], name="conv"),
                node("Flatten", ["a"], ["f"]),
                node("Gemm", ["f", "d"], ["y"], name="dense"),
            ],
            {"x": ["n", 2, 3, 3]},
            {"y": ["n", 5]},
            {"w": normal(4, 2, 1, 1), "d": normal(36, 5)},
        )
    )
    found = trace(model)
    labels = found._on["a"][1]
    assert found._on["f"][1].tolist() == np.repeat(labels, 9).tolist()
    assert whole(found, "f")


@pytest.mark.parametrize("op", ["If", "Loop"])
def test_what_an_inner_graph_reads_is_frozen(op: str) -> None:
    made = helper.make_node("Relu", ["a"], ["inner"])
    info = helper.make_tensor_value_info
    if op == "If":
        body = helper.make_graph([made], "body", [], [info("inner", TensorProto.FLOAT, None)])
        call = node("If", ["yes"], ["z"], name="call", then_branch=body, else_branch=body)
        weights = {"yes": np.array(True)}
    else:
        body = helper.make_graph(
            [made, helper.make_node("Identity", ["go"], ["on"])],
            "body",
            [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("c", TensorProto.FLOAT, None)],
            [info("on", TensorProto.BOOL, []), info("inner", TensorProto.FLOAT, None)],
        )
        call = node("Loop", ["three", "yes", "other"], ["z"], name="call", body=body)
        weights = {"yes": np.array(True), "three": np.array(3)}
    nodes = [node("Relu", ["a"], ["other"], name="other"), call]
    found = trace(between(*nodes, **weights))
    assert free(found, "a") == [False] * 4


@pytest.mark.parametrize(("attributes", "whole_input"), [({}, True), ({"alpha": 0.5}, False), ({"beta": 0.5}, True)])
def test_a_scaled_product_is_left_alone(attributes: dict[str, float], whole_input: bool) -> None:
    model = prepared(
        graph(
            [
                node("Gemm", ["x", "w"], ["a"], name="one"),
                node("Gemm", ["a", "v", "b"], ["y"], name="two", transB=1, **attributes),
            ],
            {"x": ["n", 3]},
            {"y": ["n", 5]},
            {"w": normal(3, 4), "v": normal(5, 4), "b": normal(5)},
        )
    )
    assert whole(trace(model), "a") is whole_input


def test_weights_that_a_caller_may_give_are_no_constants() -> None:
    model = prepared(between(node("Relu", ["a"], ["z"])))
    model.graph.inputs.append(model.graph.initializers["w1"])
    assert free(trace(model), "z") == [False] * 4
