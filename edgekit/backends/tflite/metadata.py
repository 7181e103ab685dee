"""TFLite metadata: what a .tflite says about itself to people and to code generators, written and read.

Format: metadata_schema.fbs of tensorflow/tflite-support (file identifier M001), held by the model's metadata entry
`TFLITE_METADATA`; files it names, such as labels, follow the model as an uncompressed ZIP.
https://www.tensorflow.org/lite/models/convert/metadata
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgekit.errors import ModelFileError

ENTRY = "TFLITE_METADATA"

ColorSpace = Literal["UNKNOWN", "RGB", "GRAYSCALE"]
Floats = tuple[float, ...]

_COLOR_SPACES: tuple[ColorSpace, ...] = ("UNKNOWN", "RGB", "GRAYSCALE")  # enum ColorSpaceType; it has no BGR
_FEATURE, _IMAGE = 1, 2  # members of union ContentProperties
_NORMALIZATION = 1  # member of union ProcessUnitOptions
_AXIS_LABELS, _VALUE_LABELS = 2, 3  # enum AssociatedFileType
# The highest version among the members in use (metadata_version.cc); all of those below are of 1.0.0.
_MIN_PARSER_VERSION = "1.0.0"
_MODEL_IDENTIFIER, _IDENTIFIER = b"TFL3", b"M001"
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a ZIP can hold: the same files make the same bytes

# Fields of each table in the schema's order, which is their id; a union takes two, its member and its value.
_TABLES: dict[str, tuple[str, ...]] = {
    "ModelMetadata": (
        "name", "description", "version", "subgraph_metadata", "author", "license", "associated_files",
        "min_parser_version",
    ),
    "SubGraphMetadata": ("name", "description", "input_tensor_metadata", "output_tensor_metadata"),
    "TensorMetadata": (
        "name", "description", "dimension_names", "content", "process_units", "stats", "associated_files",
    ),
    "Content": ("content_properties_type", "content_properties"),
    "FeatureProperties": (),
    "ImageProperties": ("color_space",),
    "ProcessUnit": ("options_type", "options"),
    "NormalizationOptions": ("mean", "std"),
    "Stats": ("max", "min"),
    "AssociatedFile": ("name", "description", "type"),
    # schema.fbs of LiteRT: the way from a model to its metadata
    "Model": ("version", "operator_codes", "subgraphs", "description", "buffers", "metadata_buffer", "metadata"),
    "Metadata": ("name", "buffer"),
    "Buffer": ("data", "offset", "size"),
}  # fmt: skip


@dataclass(frozen=True)
class TensorDescription:
    """One input or output.

    image: its color space if it is one.   labels_file: the packed file that names the places of its last axis.
    mean, std: one number, or one per channel: the tensor holds (x - mean) / std of the raw x (pixels: 0 to 255).
    minimum, maximum: of the tensor's real values, one number or one per channel.
    """

    name: str
    text: str = ""
    image: ColorSpace | None = None
    mean: Floats = ()
    std: Floats = ()
    labels_file: str | None = None
    minimum: Floats = ()
    maximum: Floats = ()


@dataclass(frozen=True)
class Description:
    """Inputs and outputs in the order of the .tflite's first subgraph."""

    name: str
    description: str
    version: str
    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]


# --- writing ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Byte:
    """A value that stands in the table itself: an enum or the member of a union."""

    value: int


def model_metadata(description: Description) -> bytes:
    """The metadata flatbuffer; the same bytes for the same description."""
    import flatbuffers

    b = flatbuffers.Builder(1024)
    subgraph = _table(b, "SubGraphMetadata", {
        "input_tensor_metadata": _vector(b, [_tensor(b, t) for t in description.inputs]),
        "output_tensor_metadata": _vector(b, [_tensor(b, t) for t in description.outputs]),
    })  # fmt: skip
    root = _table(b, "ModelMetadata", {
        "name": _text(b, description.name),
        "description": _text(b, description.description),
        "version": _text(b, description.version),
        "subgraph_metadata": _vector(b, [subgraph]),
        "min_parser_version": _text(b, _MIN_PARSER_VERSION),
    })  # fmt: skip
    b.Finish(root, _IDENTIFIER)
    return bytes(b.Output())


def _tensor(b: Any, t: TensorDescription) -> int:
    if t.image is None:
        member, properties = _Byte(_FEATURE), _table(b, "FeatureProperties", {})
    else:
        color = _Byte(_COLOR_SPACES.index(t.image))
        member, properties = _Byte(_IMAGE), _table(b, "ImageProperties", {"color_space": color})
    stats = {"max": _floats(b, t.maximum), "min": _floats(b, t.minimum)}
    return _table(b, "TensorMetadata", {
        "name": _text(b, t.name),
        "description": _text(b, t.text),
        "content": _table(b, "Content", {"content_properties_type": member, "content_properties": properties}),
        "process_units": _vector(b, [_normalization(b, t)] if t.mean or t.std else []),
        "stats": _table(b, "Stats", stats) if any(stats.values()) else 0,
        "associated_files": _vector(b, [] if t.labels_file is None else [_labels(b, t.labels_file)]),
    })  # fmt: skip


def _normalization(b: Any, t: TensorDescription) -> int:
    options = _table(b, "NormalizationOptions", {"mean": _floats(b, t.mean), "std": _floats(b, t.std)})
    return _table(b, "ProcessUnit", {"options_type": _Byte(_NORMALIZATION), "options": options})


def _labels(b: Any, name: str) -> int:
    told = _text(b, "Names of the classes, one a line, in the order of the last axis.")
    return _table(b, "AssociatedFile", {"name": _text(b, name), "description": told, "type": _Byte(_AXIS_LABELS)})


def _table(b: Any, kind: str, fields: Mapping[str, int | _Byte]) -> int:
    """Offset of the table; a field of offset 0 is left out."""
    names = _TABLES[kind]
    b.StartObject(len(names))
    for name, value in fields.items():
        if isinstance(value, _Byte):
            b.PrependUint8Slot(names.index(name), value.value, 0)
        else:
            b.PrependUOffsetTRelativeSlot(names.index(name), value, 0)
    return int(b.EndObject())


def _text(b: Any, text: str) -> int:
    return int(b.CreateString(text)) if text else 0


def _floats(b: Any, values: Floats) -> int:
    return int(b.CreateNumpyVector(np.asarray(values, np.float32))) if values else 0


def _vector(b: Any, offsets: Sequence[int]) -> int:
    if not offsets:
        return 0
    b.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        b.PrependUOffsetTRelative(offset)
    return int(b.EndVector())


def append_files(tflite: bytes | bytearray, files: Mapping[str, bytes]) -> bytes | bytearray:
    """The model followed by an uncompressed ZIP of `files`: one file that both runtimes and ZIP readers open.

    Places in the ZIP count from the start of the whole file, as tflite-support's MetadataPopulator writes them.
    """
    if not files:
        return tflite
    whole = io.BytesIO()
    whole.write(tflite)
    with zipfile.ZipFile(whole, "a", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            member = zipfile.ZipInfo(name, _ZIP_EPOCH)
            member.create_system, member.external_attr = 3, 0o644 << 16  # the same bytes on every system
            archive.writestr(member, files[name])
    return whole.getvalue()


# --- reading ---------------------------------------------------------------------------------------
def read_metadata(tflite: bytes) -> Description | None:
    """The metadata of a .tflite of any origin, None if it has none; what Description does not hold is passed over.

    Raises ModelFileError for something else than a .tflite and for damaged metadata.
    """
    if tflite[4:8] != _MODEL_IDENTIFIER:
        raise ModelFileError("the file is no .tflite: its identifier is missing", "check the path")
    try:
        data = _embedded(tflite)
        return None if data is None else _description(data)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise ModelFileError(
            "the TFLite metadata is damaged", "write the .tflite again, or take its metadata out"
        ) from error


def _embedded(tflite: bytes) -> bytes | None:
    model = _root(tflite, "Model")
    for entry in model.children("metadata", "Metadata"):
        if entry.text("name") == ENTRY:
            buffer = list(model.children("buffers", "Buffer"))[entry.number("buffer", "<I")]
            start, size = buffer.number("offset", "<Q"), buffer.number("size", "<Q")
            return tflite[start : start + size] if start > 1 else buffer.raw("data", 1)  # files over 2 GB keep it apart
    return None


def _description(data: bytes) -> Description:
    if data[4:8] != _IDENTIFIER:
        raise ModelFileError(f"TFLite metadata of identifier {data[4:8]!r}", f"only {_IDENTIFIER.decode()} is known")
    root = _root(data, "ModelMetadata")
    graph = next(root.children("subgraph_metadata", "SubGraphMetadata"), None)
    return Description(
        root.text("name"),
        root.text("description"),
        root.text("version"),
        tuple(_read_tensor(t) for t in graph.children("input_tensor_metadata", "TensorMetadata")) if graph else (),
        tuple(_read_tensor(t) for t in graph.children("output_tensor_metadata", "TensorMetadata")) if graph else (),
    )


def _read_tensor(t: _Table) -> TensorDescription:
    content, stats = t.child("content", "Content"), t.child("stats", "Stats")
    image = None
    if content is not None and content.number("content_properties_type", "<B") == _IMAGE:
        properties = content.child("content_properties", "ImageProperties")
        image = _COLOR_SPACES[properties.number("color_space", "<B") if properties else 0]
    units = (
        u.child("options", "NormalizationOptions")
        for u in t.children("process_units", "ProcessUnit")
        if u.number("options_type", "<B") == _NORMALIZATION
    )
    normal = next(units, None)
    files = t.children("associated_files", "AssociatedFile")
    return TensorDescription(
        t.text("name"),
        t.text("description"),
        image,
        normal.floats("mean") if normal else (),
        normal.floats("std") if normal else (),
        next((f.text("name") for f in files if f.number("type", "<B") in (_AXIS_LABELS, _VALUE_LABELS)), None),
        stats.floats("min") if stats else (),
        stats.floats("max") if stats else (),
    )


def _root(data: bytes, kind: str) -> _Table:
    return _Table(data, _read("<I", data, 0), kind)


def _read(form: str, data: bytes, at: int) -> int:
    if at < 0:  # struct would count from the end
        raise struct.error(f"offset {at} is before the file")
    return int(struct.unpack_from(form, data, at)[0])


@dataclass(frozen=True)
class _Table:
    """A table of a flatbuffer at a position; reading outside of `data` raises struct.error."""

    data: bytes
    position: int
    kind: str

    def _place(self, name: str) -> int | None:
        """Position of a field's value, None where it is left out."""
        vtable = self.position - _read("<i", self.data, self.position)
        slot = 4 + 2 * _TABLES[self.kind].index(name)
        if slot >= _read("<H", self.data, vtable):
            return None
        offset = _read("<H", self.data, vtable + slot)
        return self.position + offset if offset else None

    def _target(self, name: str) -> int | None:
        place = self._place(name)
        return None if place is None else place + _read("<I", self.data, place)

    def number(self, name: str, form: str) -> int:
        place = self._place(name)
        return 0 if place is None else _read(form, self.data, place)

    def raw(self, name: str, width: int) -> bytes:
        """The bytes of a vector whose elements have `width` bytes."""
        target = self._target(name)
        if target is None:
            return b""
        size = _read("<I", self.data, target) * width
        if target + 4 + size > len(self.data):
            raise struct.error(f"{name} ends after the file")
        return self.data[target + 4 : target + 4 + size]

    def text(self, name: str) -> str:
        return self.raw(name, 1).decode()

    def floats(self, name: str) -> Floats:
        return tuple(np.frombuffer(self.raw(name, 4), "<f4").tolist())

    def child(self, name: str, kind: str) -> _Table | None:
        target = self._target(name)
        return None if target is None else _Table(self.data, target, kind)

    def children(self, name: str, kind: str) -> Iterator[_Table]:
        start = self._target(name)
        for i in range(len(self.raw(name, 4)) // 4):
            place = (start or 0) + 4 + 4 * i
            yield _Table(self.data, place + _read("<I", self.data, place), kind)
