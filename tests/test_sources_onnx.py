"""ONNX in: every opset from 9 on against ONNX Runtime on the original file; external data; sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import errors, sources
from edgekit import model as M

IMAGE = {"x": ["N", 4, 6, 6]}


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    opset: int,
    inputs: dict[str, list[int | str]] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    ir_version: int | None = None,
) -> Path:
    """A model whose outputs are the values named y…"""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (inputs or IMAGE).items()],
        [],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version or (4 if opset < 13 else 8)
    )
    made = {v.name: v for v in onnx.shape_inference.infer_shapes(_asking(proto)).graph.output}
    del proto.graph.output[:]
    sizes = next(iter((inputs or IMAGE).values()))
    for name, value in made.items():  # inference is silent about functions and about IR 3: there y is like x
        known = value.type.tensor_type.HasField("shape")
        proto.graph.output.append(value if known else helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
    onnx.save(proto, path)
    return path


def _asking(proto: onnx.ModelProto) -> onnx.ModelProto:
    for node in proto.graph.node:
        proto.graph.output.extend(onnx.ValueInfoProto(name=o) for o in node.output if o.startswith("y"))
    return proto


def original(path: Path, inputs: M.Tensors) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def check(path: Path, **options: object) -> sources.Source:
    """Loads and compares on inputs of this test's own, negative too, at a batch that `load` did not try."""
    found = sources.load(path, **options)  # type: ignore[arg-type]
    assert M.opset(found.model) >= M.MIN_OPSET
    sig = M.signature(found.model)
    rng = np.random.default_rng(7)
    inputs = {s.name: rng.normal(size=s.concrete(5)).astype(s.dtype) for s in sig.inputs}
    got = M.FloatSession(found.model, optimize=False).run(inputs)
    for spec, want in zip(sig.outputs, original(path, inputs), strict=True):
        np.testing.assert_allclose(got[spec.name], want, rtol=1e-4, atol=1e-5)
        assert len(spec.shape) == want.ndim
    return found


def node(op: str, inputs: list[str], outputs: list[str] | None = None, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs or ["y"], **attributes)


F = np.float32
SCALES = {"s": np.array([1, 1, 2, 2], F)}
CASES: dict[str, tuple[int, list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "upsample nearest": (9, [node("Upsample", ["x", "s"], mode="nearest")], SCALES),
    "upsample linear": (9, [node("Upsample", ["x", "s"], mode="linear")], SCALES),
    "resize 10 linear": (10, [node("Resize", ["x", "s"], mode="linear")], SCALES),
    "resize 10 nearest": (10, [node("Resize", ["x", "s"], mode="nearest")], {"s": np.array([1, 1, 1.5, 0.5], F)}),
    "pad": (9, [node("Pad", ["x"], pads=[0, 0, 1, 1, 0, 0, 2, 0], value=0.5)], {}),
    "clip": (9, [node("Clip", ["x"], min=-0.1, max=0.6)], {}),
    "clip one side": (9, [node("Clip", ["x"], min=0.1)], {}),
    "dropout": (9, [node("Dropout", ["x"], ratio=0.4)], {}),
    "slice": (9, [node("Slice", ["x"], axes=[2, 3], starts=[1, 1], ends=[5, -1])], {}),
    "topk": (9, [node("TopK", ["x"], ["y", "y2"], k=2, axis=3)], {}),
    "squeeze": (9, [node("Unsqueeze", ["x"], ["u"], axes=[0]), node("Squeeze", ["u"], axes=[0])], {}),
    "reduce sum": (11, [node("ReduceSum", ["x"], axes=[2, 3], keepdims=0)], {}),
    "reduce mean": (13, [node("ReduceMean", ["x"], axes=[-1])], {}),
    "softmax over the rest": (9, [node("Softmax", ["x"])], {}),
    "softmax from axis 2": (11, [node("Softmax", ["x"], axis=2)], {}),
    "log softmax over the rest": (12, [node("LogSoftmax", ["x"])], {}),
    "hardmax over the rest": (9, [node("Hardmax", ["x"])], {}),
    "hardmax from axis 2": (12, [node("Hardmax", ["x"], axis=2)], {}),
    "group norm": (
        18,
        [node("GroupNormalization", ["x", "s", "b"], num_groups=2)],
        {"s": np.array([1, 2], F), "b": np.array([3, -1], F)},
    ),
    "batch norm": (
        9,
        [node("BatchNormalization", ["x", "g", "b", "m", "v"])],
        {k: np.array([1, 2, 3, 4], F) for k in "gbmv"},
    ),
    "split": (11, [node("Split", ["x"], ["y", "y2"], axis=1)], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_that_changed_between_opsets(tmp_path: Path, name: str) -> None:
    opset, nodes, weights = CASES[name]
    check(save(tmp_path / "m.onnx", nodes, opset, weights=weights))


@pytest.mark.parametrize("opset", range(9, 25))
def test_every_opset(tmp_path: Path, opset: int) -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Relu", ["c"], ["r"]), node("Flatten", ["r"], ["f"])]
    nodes += [node("Gemm", ["f", "v", "b"], ["g"]), node("Softmax", ["g"], axis=1)]
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(3, 4, 3, 3)).astype(F), "v": rng.normal(size=(48, 5)).astype(F)}
    weights["b"] = rng.normal(size=5).astype(F)
    found = check(save(tmp_path / "m.onnx", nodes, opset, weights=weights))
    assert found.record["opset_from"] == opset
    assert M.signature(found.model).inputs[0].shape == ("batch", 4, 6, 6)
    assert M.signature(found.model).outputs[0].shape == ("batch", 5)


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_recurrent_with_free_batch_on_axis_1(tmp_path: Path, op: str) -> None:
    gates = 4 if op == "LSTM" else 3
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(1, gates * 5, 4)).astype(F), "r": rng.normal(size=(1, gates * 5, 5)).astype(F),
    }  # fmt: skip
    nodes = [node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), node(op, ["t", "w", "r"], ["s", "y"], hidden_size=5)]
    check(save(tmp_path / "m.onnx", nodes, 9, {"x": ["N", 7, 4]}, weights))


def test_weights_listed_as_inputs_are_no_inputs(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Add", ["x", "w"])], 9, {"x": ["N", 3]}, {"w": np.ones(3, F)}, 3)
    proto = onnx.load(path)
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3]))
    onnx.save(proto, path)
    assert [s.name for s in M.signature(check(path).model).inputs] == ["x"]


def test_unknown_sizes_are_asked_for_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"])], 13, {"x": ["N", 3, "h", "w"]})
    with pytest.raises(errors.ShapeError, match="--shape x="):
        sources.load(path)
    found = check(path, shapes={"x": (-1, 3, 8, 9)})
    assert M.signature(found.model).outputs[0].shape == ("batch", 3, 8, 9)


@pytest.mark.parametrize("shape", [(1, 4), (1, 2, 3), (1, 5)])
def test_shapes_that_contradict_the_model(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"])], 13, {"x": ["N", 3]})
    with pytest.raises(errors.ShapeError):
        sources.load(path, shapes={"x": shape})
    with pytest.raises(errors.ShapeError, match="nonsense"):
        sources.load(path, shapes={"nonsense": (1,)})


def test_external_data_are_read_and_part_of_the_digest(tmp_path: Path) -> None:
    weights = {"w": np.random.default_rng(0).normal(size=(30, 40)).astype(F)}
    path = save(tmp_path / "m.onnx", [node("MatMul", ["x", "w"])], 13, {"x": ["N", 30]}, weights)
    onnx.save(
        onnx.load(path),
        path,
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
        all_tensors_to_one_file=True,
    )
    first = check(path).sha256
    data = bytearray((tmp_path / "m.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "m.data").write_bytes(bytes(data))
    assert sources.digest_path(path) != first
