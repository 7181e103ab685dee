"""TFLite metadata: read back by a walker of its own, by ZIP readers and by LiteRT; files of other writers are read."""

from __future__ import annotations

import base64
import io
import random
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.backends.tflite.describe import describe, label_files, normalization
from edgekit.backends.tflite.metadata import (
    ENTRY,
    Description,
    TensorDescription,
    append_files,
    model_metadata,
    read_metadata,
)
from edgekit.errors import DatasetError, LabelError, ModelFileError
from edgekit.model import Signature, TensorSpec
from edgekit.preprocessing import Preprocessing

pytest.importorskip("ai_edge_litert")
pytest.importorskip("flatbuffers")

IMAGE = Signature((TensorSpec("image", "float32", ("n", 4, 4, 3)),), (TensorSpec("scores", "float32", ("n", 3)),))
LABELS = ("Äpfel", "梨", "🍌 ripe")
# Made by tflite-support 0.4.4's generated Python code from metadata_schema.fbs, and accepted by its C++ verifier:
# fields that edgekit does not write, a thresholding unit before the normalization, a readme before the labels.
OFFICIAL = zlib.decompress(
    base64.b85decode(
        "c-mc3p-#h46g}O_R#-)|OiWBvAf}csAaE=-fWRR!&Gy0uv?XoBhT{VeNCXK#fFuM-GCT=ifJ7ikFeKyN_wJU#YfkQcxA&g&-f3F^_Jg3?fR7fMXuyLDh"
        "pIN^pc=4FXcGd$RSCEz+z?i1-|Yk)u9ul-?*LVbc^a!UQLrfY2(IP?vD!K^o(P-7!97jzs*5(XI_uYEz7R|ZG=klKytO4>ZgHh=p!gkdavJ5iN;<`aS=Q"
        "u!Rm$|TY+VI16%Ar#+8$=J8Dv%XPW?1fx#2zhqi?*L>o5GGd3V9jkMZk5MOiL>MMsJlmR+|sFZ;1YxFx(0z6d{@6Q?6Omf?Ob>)`bOpAhus{;=LX^?Py#"
        "NBAA_w;^W$jzd6&xKyFpe^dTJcnv>Ak6Yi2AKT1R6CU9%Ipp4|)byRLiq>M^-sLQ9@y3%qpT940EO96?5wFgMX^~1kirFnQ8%LuA@{P|o%=anAsn1pZ|8"
        "}zJ<MdA97m>+PxB"
    )
)


def model(metadata: bytes | None) -> bytes:
    """y = max(x, 0) of shape (1, 3), packed by the classes that come with ai-edge-litert."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    m, graph, code, op = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT(), schema.OperatorT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.RELU
    code.version = 1
    op.inputs, op.outputs, graph.tensors = [0], [1], []
    for name in ("x", "y"):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, [1, 3], schema.TensorType.FLOAT32, 0
        graph.tensors.append(tensor)
    graph.inputs, graph.outputs, graph.operators = [0], [1], [op]
    m.version, m.operatorCodes, m.subgraphs, m.buffers = 3, [code], [graph], [schema.BufferT()]
    if metadata is not None:
        buffer, entry = schema.BufferT(), schema.MetadataT()
        buffer.data, entry.name, entry.buffer = np.frombuffer(metadata, np.uint8), ENTRY, 1
        m.buffers.append(buffer)
        m.metadata = [entry]
    builder = flatbuffers.Builder(1024)
    builder.Finish(m.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class Walk:
    """A table read through the flatbuffers package, fields by their id in metadata_schema.fbs."""

    def __init__(self, data: bytes, position: int | None = None) -> None:
        from flatbuffers import encode, number_types, table

        self.t = table.Table(
            data, encode.Get(number_types.UOffsetTFlags.packer_type, data, 0) if position is None else position
        )
        self.types = number_types

    def _at(self, field: int) -> int:
        return int(self.t.Offset(4 + 2 * field))

    def text(self, field: int) -> str:
        return str(self.t.String(self._at(field) + self.t.Pos).decode())

    def byte(self, field: int) -> int:
        at = self._at(field)
        return int(self.t.Get(self.types.Uint8Flags, at + self.t.Pos)) if at else 0

    def child(self, field: int) -> Walk:
        return Walk(self.t.Bytes, self.t.Indirect(self._at(field) + self.t.Pos))

    def children(self, field: int) -> list[Walk]:
        at = self._at(field)
        start = self.t.Vector(at) if at else 0
        return [Walk(self.t.Bytes, self.t.Indirect(start + 4 * i)) for i in range(self.t.VectorLen(at) if at else 0)]

    def floats(self, field: int) -> list[float]:
        found: Any = self.t.GetVectorAsNumpy(self.types.Float32Flags, self._at(field))
        return list(found.tolist())


def zipped(tflite: bytes) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(tflite))


# --- the format ------------------------------------------------------------------------------------
def test_every_field_stands_where_the_schema_puts_it() -> None:
    image = TensorDescription("in", "a photo", "GRAYSCALE", (1.5, 2.5), (4.0, 8.0), None, (-1.0,), (3.0, 5.0))
    plain, scores = TensorDescription("age"), TensorDescription("out", labels_file="labels.txt")
    data = model_metadata(Description("net", "what it does", "v7", (image, plain), (scores,)))
    root = Walk(data)
    assert data[4:8] == b"M001"
    assert [root.text(i) for i in (0, 1, 2, 7)] == ["net", "what it does", "v7", "1.0.0"]
    (graph,) = root.children(3)
    first, second = graph.children(2)
    assert (first.text(0), first.text(1), second.text(0)) == ("in", "a photo", "age")
    assert (first.child(3).byte(0), first.child(3).child(1).byte(0)) == (2, 2)  # ImageProperties, GRAYSCALE
    (unit,) = first.children(4)
    assert (unit.byte(0), unit.child(1).floats(0), unit.child(1).floats(1)) == (1, [1.5, 2.5], [4.0, 8.0])
    assert (first.child(5).floats(0), first.child(5).floats(1)) == ([3.0, 5.0], [-1.0])  # max stands before min
    assert (second.child(3).byte(0), second.children(4)) == (1, [])  # FeatureProperties
    (out,) = graph.children(3)
    (file,) = out.children(6)
    assert (file.text(0), file.byte(2)) == ("labels.txt", 2)  # TENSOR_AXIS_LABELS


def test_metadata_of_the_official_tool_is_read() -> None:
    image = TensorDescription(
        "image", "photo", "RGB", (123.5, 116.25, 103.75), (58.5, 57.25, 57.375), None, (-2.0,), (2.25, 2.5, 2.75)
    )
    scores = TensorDescription("scores", labels_file="klassen.txt")
    told = Description("Größe", "two in", "v3", (image, TensorDescription("age", "years")), (scores,))
    assert read_metadata(model(OFFICIAL)) == told


FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=4).map(tuple)
TENSOR = st.builds(
    TensorDescription,
    st.text(max_size=9),
    st.text(max_size=9),
    st.sampled_from([None, "UNKNOWN", "RGB", "GRAYSCALE"]),
    FLOATS,
    FLOATS,
    st.none() | st.text(min_size=1, max_size=9),
    FLOATS,
    FLOATS,
)
TENSORS = st.lists(TENSOR, max_size=3).map(tuple)


@given(st.builds(Description, st.text(max_size=9), st.text(max_size=9), st.text(max_size=9), TENSORS, TENSORS))
def test_what_is_written_is_read_back(told: Description) -> None:
    data = model_metadata(told)
    assert data == model_metadata(told)
    assert read_metadata(model(data)) == told


def test_no_metadata_is_none_and_other_files_are_refused() -> None:
    assert read_metadata(model(None)) is None
    for data in (b"", b"\x08\0\0\0ONNX" * 9):
        with pytest.raises(ModelFileError, match=r"no \.tflite"):
            read_metadata(data)
    with pytest.raises(ModelFileError, match="M002"):
        read_metadata(model(OFFICIAL[:4] + b"M002" + OFFICIAL[8:]))


def test_damaged_files_raise_one_error() -> None:
    """Cut anywhere or with bytes changed: the text says so or something readable comes out, nothing else is raised."""
    whole, draw, refused = model(OFFICIAL), random.Random(0), 0
    damaged = [whole[:n] for n in range(8, len(whole), 7)]
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(4):
            changed[draw.randrange(8, len(whole))] = draw.choice((0, 1, 127, 255, draw.randrange(256)))
        damaged.append(bytes(changed))
    for data in damaged:
        try:
            assert isinstance(read_metadata(data), Description | None)
        except ModelFileError:
            refused += 1
    assert refused > 100


# --- the packed files ------------------------------------------------------------------------------
def test_files_are_readable_by_zip_and_the_model_still_runs(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    told = describe("net", IMAGE, Preprocessing(), images=["image"], labels=LABELS)
    bare = model(model_metadata(told))
    packed = append_files(bare, {**label_files(told, LABELS), "lies mich ä.txt": b"PK\5\6 not the end"})
    path = tmp_path / "model.tflite"
    path.write_bytes(packed)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["labels.txt", "lies mich ä.txt"]
        assert archive.read("labels.txt").decode().split("\n")[:-1] == list(LABELS)
        for member in archive.infolist():
            assert member.compress_type == zipfile.ZIP_STORED
            assert packed[member.header_offset : member.header_offset + 4] == b"PK\3\4"  # places count from the start
    assert packed.startswith(bare)
    assert read_metadata(packed) == told
    x = np.array([[-1, 0, 2]], np.float32)
    for source in ({"model_path": str(path)}, {"model_content": packed}):
        interpreter = Interpreter(**source)
        interpreter.allocate_tensors()
        interpreter.set_tensor(0, x)
        interpreter.invoke()
        np.testing.assert_array_equal(interpreter.get_tensor(1), np.maximum(x, 0))


def test_packing_is_deterministic_and_adds_to_what_is_there() -> None:
    bare = model(None)
    one, two = {"b": b"1", "a": b"2"}, {"a": b"2", "b": b"1"}
    assert append_files(bare, one) == append_files(bare, two)
    assert append_files(bare, {}) == bare
    assert zipped(append_files(append_files(bare, one), {"c": b""})).namelist() == ["a", "b", "c"]


def test_a_thousand_labels() -> None:
    names = tuple(f"Klasse Nº {i}" for i in range(1000))
    sig = Signature(IMAGE.inputs, (TensorSpec("scores", "float32", (1, 1000)),))
    told = describe("net", sig, Preprocessing(), labels=names)
    packed = append_files(model(model_metadata(told)), label_files(told, names))
    assert zipped(packed).read("labels.txt").decode().splitlines() == list(names)


@pytest.mark.parametrize("bad", ["", "  ", "two\nlines", "two\rlines", "end\n", "a\u2028b", "\udc80"])
def test_labels_that_would_shift_the_others_are_refused(bad: str) -> None:
    told = describe("net", IMAGE, Preprocessing(), labels=["a", "b", "c"])
    with pytest.raises(LabelError, match="class 1"):
        label_files(told, ["a", bad, "c"])


# --- what edgekit knows ----------------------------------------------------------------------------
@pytest.mark.parametrize("labels", [(), ("no", "yes")], ids=["none", "two for one score"])
def test_labels_without_an_output_of_their_length_are_left_out(labels: tuple[str, ...]) -> None:
    sig = Signature(IMAGE.inputs, (TensorSpec("score", "float32", (1, 1)),))
    told = describe("net", sig, Preprocessing(), labels=labels)
    assert told.outputs[0].labels_file is None
    assert label_files(told, labels) == {}


def test_labels_go_to_the_output_of_their_length() -> None:
    sig = Signature(
        IMAGE.inputs, tuple(TensorSpec(n, "float32", (1, s)) for n, s in (("box", 4), ("kind", 3), ("k2", 3)))
    )
    told = describe("net", sig, Preprocessing(), labels=LABELS)
    assert [t.labels_file for t in told.outputs] == [None, "labels.txt", None]


NUMBER = st.floats(-300, 300).filter(lambda v: abs(v) > 1e-3)
SOME = st.none() | st.tuples(NUMBER) | st.tuples(NUMBER, NUMBER, NUMBER)


@given(st.none() | st.just(1 / 255) | NUMBER, SOME, SOME)
def test_normalization_says_what_the_preprocessing_does(scale: float | None, mean: Any, std: Any) -> None:
    how = Preprocessing(scale=scale, mean=mean, std=std)
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    means, stds = normalization(how)
    assert len(means) == len(stds)
    ours = (x - np.array(means, np.float32).astype(np.float64)) / np.array(stds, np.float32).astype(np.float64)
    # Every term is rounded to float32 a few times; the sum may cancel, so the bound is relative to its parts.
    parts = (255 + np.abs(means).max()) / np.abs(stds).min()
    np.testing.assert_allclose(ours, how.apply(x), rtol=0, atol=8 * 2.0**-24 * parts)
    told = describe("net", IMAGE, how, images=["image"]).inputs[0]
    everything = how.apply(np.repeat(np.arange(256, dtype=np.uint8), 48).reshape(256, 4, 4, 3)).reshape(-1, 3)
    low, high = np.broadcast_to(told.minimum, 3), np.broadcast_to(told.maximum, 3)
    np.testing.assert_allclose(low, everything.min(axis=0), rtol=0, atol=8 * 2.0**-24 * parts)
    np.testing.assert_allclose(high, everything.max(axis=0), rtol=0, atol=8 * 2.0**-24 * parts)


def test_known_normalizations() -> None:
    imagenet = Preprocessing(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    told = describe("net", IMAGE, imagenet, images=["image"]).inputs[0]
    np.testing.assert_allclose(told.mean, (123.675, 116.28, 103.53))
    np.testing.assert_allclose(told.std, (58.395, 57.12, 57.375))
    assert normalization(Preprocessing()) == ((0.0,), (1.0,))
    assert normalization(Preprocessing(mean=(127.5,), std=(127.5,))) == ((127.5,), (127.5,))


def test_a_normalization_beyond_float32_is_refused() -> None:
    with pytest.raises(DatasetError, match="float32"):
        normalization(Preprocessing(scale=1e-30, mean=(1e30,)))
    with pytest.raises(DatasetError, match="float32"):
        normalization(Preprocessing(scale=1e30, std=(1e-30,)))


@pytest.mark.parametrize(
    ("shape", "order", "color"),
    [
        ((1, 4, 4, 3), None, "RGB"),
        ((1, 3, 4, 4), "RGB", "RGB"),
        ((1, 4, 4, 3), "BGR", "UNKNOWN"),
        ((1, 28, 28, 1), None, "GRAYSCALE"),
        ((1, 28, 28), None, "GRAYSCALE"),
        ((1, 784), None, "UNKNOWN"),
        ((1,), None, "UNKNOWN"),
    ],
)
def test_color_space(shape: tuple[int, ...], order: Any, color: str) -> None:
    sig = Signature((TensorSpec("x", "float32", shape),), IMAGE.outputs)
    how = Preprocessing(channel_order=order)
    told = describe("net", sig, how, images=["x"]).inputs[0]
    assert told.image == color
    assert (told.mean, told.std, told.minimum, told.maximum) == ((0.0,), (1.0,), (0.0,), (255.0,))
    assert ("BGR" in told.text) == (order == "BGR")
    assert describe("net", sig, how).inputs[0].image is None


def test_several_inputs_get_only_what_is_done_to_them() -> None:
    specs = (
        TensorSpec("photo", "float32", (1, 4, 4, 3)),
        TensorSpec("raw", "uint8", (1, 4, 4, 3)),
        TensorSpec("row", "float32", (1, 8)),
    )
    how = Preprocessing(scale=0.5, mean=(1.0,))
    ranges = {"row": (-2.0, 7.0), "scores": (0.0, 1.0)}
    told = describe("net", Signature(specs, IMAGE.outputs), how, images=["photo", "raw"], ranges=ranges)
    photo, raw, row = told.inputs
    assert (photo.mean, photo.std, photo.minimum, photo.maximum) == ((2.0,), (2.0,), (-1.0,), (126.5,))
    assert (raw.mean, raw.std, raw.minimum, raw.maximum) == ((), (), (0.0,), (255.0,))
    assert (row.mean, row.text, row.minimum, row.maximum) == ((), "", (-2.0,), (7.0,))
    assert (told.outputs[0].minimum, told.outputs[0].maximum) == ((0.0,), (1.0,))
    assert read_metadata(model(model_metadata(told))) == told
