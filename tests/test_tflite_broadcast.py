"""Broadcasts over many axes: right in LiteRT, and no abort in tflite-runtime 2.14, whose kernels stop earlier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgekit.backends.tflite.writer import write
from tests.quantize_graphs import node
from tests.test_tflite_runtimes import run_there
from tests.tflite_single import build, difference, litert, lowered, onnxruntime, operators

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
OPERATORS = ["Add", "Sub", "Mul", "Div", "Max", "Pow", "Less", "Equal", "And", "Where", "Mod"]


def alternating(rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of which every other axis is repeated: nothing can be merged."""
    return tuple(2 if i % 2 else 1 for i in range(rank)), tuple(1 if i % 2 else 3 for i in range(rank))


def case(op: str, x: tuple[Any, ...], y: tuple[Any, ...]) -> onnx.ModelProto:
    dtype = bool if op == "And" else np.float32
    shapes = {"x": (dtype, x), "y": (dtype, y)}
    if op == "Where":
        nodes = [node("Greater", ["x", "one"], ["c"]), node("Where", ["c", "x", "y"], ["z"])]
        return build(nodes, shapes, ["z"], {"one": np.float32(1)})
    return build([node(op, ["x", "y"], ["z"], **({"fmod": 1} if op == "Mod" else {}))], shapes, ["z"], {})


def feeds(model: onnx.ModelProto, batch: int = 1) -> dict[str, Any]:
    rng, out = np.random.default_rng(0), {}
    for value in model.graph.input:
        shape = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
        drawn = rng.uniform(0.5, 2, shape)
        boolean = value.type.tensor_type.elem_type == onnx.TensorProto.BOOL
        out[value.name] = drawn > 1 if boolean else drawn.astype(np.float32)
    return out


@pytest.mark.parametrize("rank", [5, 6, 7])
@pytest.mark.parametrize("op", OPERATORS)
def test_axes_that_cannot_be_merged_are_spread(op: str, rank: int) -> None:
    model = case(op, *alternating(rank))
    given = feeds(model)
    assert difference(litert(model, given), onnxruntime(model, given)) < 1e-5


MERGED = [
    ((2, 3, 1, 1, 4, 5), (1, 1, 6, 7, 1, 1)),
    ((2, 1, 3, 1, 4, 5), (2, 1, 3, 1, 1, 1)),  # axes of size 1 on both sides join their neighbours
    ((2, 3, 4, 5, 6), (1,)),
    ((2, 3, 4, 5, 6), (5, 6)),
    ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 4)),
]


@pytest.mark.parametrize(("x", "y"), MERGED)
def test_axes_that_broadcast_alike_become_one(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    model = case("Mul", x, y)
    given = feeds(model)
    assert "BROADCAST_TO" not in operators(model)
    assert max(len(o.outputs[0].shape) for o in lowered(model).graph.operators if o.code == "MUL") <= 4
    assert difference(litert(model, given), onnxruntime(model, given)) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_an_open_batch_stays_open(batch: int) -> None:
    model = case("Mul", ("n", 2, 3, 4, 5), ("n", 1, 1, 4, 5))
    given = feeds(model, batch)
    assert operators(model) == ["RESHAPE", "RESHAPE", "MUL", "RESHAPE"]
    assert difference(litert(model, given), onnxruntime(model, given)) < 1e-5


def test_equal_shapes_are_left_alone() -> None:
    assert operators(case("Mul", (2, 3, 4, 5, 6, 7), (2, 3, 4, 5, 6, 7))) == ["MUL"]


@pytest.mark.slow
def test_tflite_runtime_runs_them(tmp_path: Path) -> None:
    models = {f"{op}{rank}": case(op, *alternating(rank)) for op in OPERATORS for rank in (5, 6, 7)}
    models.update({f"merged{i}": case("Sub", x, y) for i, (x, y) in enumerate(MERGED)})
    for name, model in models.items():
        (tmp_path / f"{name}.tflite").write_bytes(bytes(write([lowered(model).graph], "test")))
        np.savez(tmp_path / f"{name}.in.npz", **feeds(model))
    run_there("tflite-runtime", tmp_path)
    for name, model in models.items():
        with np.load(tmp_path / f"{name}.out.npz") as stored:
            got = {"z": stored["z"]}
        assert difference(got, onnxruntime(model, feeds(model))) < 1e-5, name
