"""What bad model files get: one line, the right class, the thing named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import errors, sources

F = np.float32


def proto(weight: np.ndarray | None = None, op: str = "Add", opset: int = 17, domain: str = "") -> onnx.ModelProto:
    weight = np.ones(4, F) if weight is None else weight
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], name="the_node", domain=domain)],
        "g",
        [value("x", TensorProto.FLOAT, ["N", 4])],
        [value("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def refused(path: Path, kind: type[errors.EdgekitError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        sources.load(path)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def external(path: Path, location: str) -> Path:
    model = proto()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    return path


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", errors.ModelFileError, r"none\.onnx")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("photo.onnx", b"\x89PNG\r\n\x1a\n" + bytes(90)),
        ("empty.onnx", b""),
        ("noise.onnx", bytes(range(255, 0, -1))),
        ("text.onnx", b"this is no model at all"),
        ("photo.keras", b"\xff\xd8\xff\xe0" + bytes(90)),
        ("zip.onnx", b"PK\x03\x04" + bytes(90)),
        ("model.weights", b"anything"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, errors.ModelFileError, name)


def test_onnx_named_keras_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "m.keras").write_bytes(proto().SerializeToString())
    refused(tmp_path / "m.keras", errors.ModelFileError, "ONNX")


def test_folder_without_a_model(tmp_path: Path) -> None:
    refused(tmp_path, errors.ModelFileError, "SavedModel")


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_truncated(tmp_path: Path, part: float) -> None:
    whole = proto().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(whole[: int(len(whole) * part)])
    refused(tmp_path / "m.onnx", errors.ModelFileError, "truncated")


@pytest.mark.parametrize("opset", [8, 99])
def test_opsets_out_of_range(tmp_path: Path, opset: int) -> None:
    (tmp_path / "m.onnx").write_bytes(proto(opset=opset).SerializeToString())
    refused(tmp_path / "m.onnx", errors.EdgekitError, f"opset {opset}")


@pytest.mark.parametrize(("op", "domain"), [("Frobnicate", ""), ("FusedThing", "com.example")])
def test_unknown_operator_is_named_with_its_node(tmp_path: Path, op: str, domain: str) -> None:
    (tmp_path / "m.onnx").write_bytes(proto(op=op, domain=domain).SerializeToString())
    refused(tmp_path / "m.onnx", errors.UnsupportedOpError, f"{op}.*the_node")


def test_sequence_output(tmp_path: Path) -> None:
    model = proto()
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    model.graph.output[0].CopyFrom(helper.make_value_info("y", kind))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "m.onnx", errors.UnsupportedOpError, "sequence")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_weights_are_named(tmp_path: Path, bad: float) -> None:
    (tmp_path / "m.onnx").write_bytes(proto(np.array([1, bad, 2, 3], F)).SerializeToString())
    refused(tmp_path / "m.onnx", errors.NonFiniteError, "'w'")


def test_a_mask_may_hold_minus_infinity(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(proto(np.array([0, -np.inf, 0, 0], F)).SerializeToString())
    assert sources.load(tmp_path / "m.onnx").record["max_rel_error"] <= 1e-4


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "a/../../secret.bin"])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    refused(external(home / "m.onnx", location), errors.UnsafeModelError, "outside")


def test_external_data_through_a_link_outside(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (home / "w.bin").symlink_to(tmp_path / "secret.bin")
    refused(external(home / "m.onnx", "w.bin"), errors.UnsafeModelError, "outside")


def test_external_data_missing_or_short(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "w.bin")
    refused(path, errors.ModelFileError, r"w\.bin")
    (tmp_path / "w.bin").write_bytes(bytes(7))
    refused(path, errors.ModelFileError, "w")


def test_no_inputs(tmp_path: Path) -> None:
    model = proto()
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 4), F), "x"))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "m.onnx", errors.ModelFileError, "inputs")


def test_a_state_beside_the_batch_is_refused_by_its_sizes(tmp_path: Path) -> None:
    from edgekit import pipeline

    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("ReduceSum", ["state"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    inputs = [value("x", TensorProto.FLOAT, [1, 4]), value("state", TensorProto.FLOAT, [2, 1, 3])]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", TensorProto.FLOAT, [1, 4])])
    path = tmp_path / "stateful.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    with pytest.raises(errors.ShapeError, match="'x' 1, 'state' 2"):
        pipeline.convert(path, ["cpu"], precisions=["float32"], out=tmp_path / "b")
    assert not (tmp_path / "b" / "cpu").exists()
