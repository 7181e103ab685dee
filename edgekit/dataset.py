"""A dataset: labelled samples with a declared preprocessing and a content digest, streamed in file order.

Forms: .npz, .npy, a folder of images, .csv, .parquet, `module:function`. Memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit import transform
from edgekit.binding import InputBinding, LabelRule, class_labels, deliver, label_rule, match_inputs, output_classes
from edgekit.errors import DatasetError, LabelError, NonFiniteError, ShapeError
from edgekit.preprocessing import Preprocessing, find_file
from edgekit.readers import Array, Chunk, Reader, reading
from edgekit.readers.arrays import ArrayReader, MemoryColumn, WindowReader, check_lengths, file_column, open_arrays
from edgekit.readers.functions import SPEC, open_function
from edgekit.readers.images import ImageReader, open_images
from edgekit.readers.random import RandomReader
from edgekit.readers.tables import open_table

if TYPE_CHECKING:
    from edgekit.model import Signature, Tensors

__all__ = [
    "Batch",
    "Dataset",
    "Preprocessing",
    "check_labels",
    "declared_preprocessing",
    "open_dataset",
    "overlap",
    "random_dataset",
    "shared_ids",
]

_ID_BYTES = 8  # of sha256: two of a million different samples share an id with a probability of 3e-8
_SCAN = 64  # samples at a time where only their contents are looked at
_SUFFIXES = (".npz", ".npy", ".csv", ".parquet")


@dataclass(frozen=True)
class Batch:
    """inputs: preprocessed, in the model's dtypes once bound, batch first. index: int64, places in the data.

    labels: int64 class numbers (n,) or (n, tokens), float32 targets, or None.
    """

    inputs: Tensors
    labels: Array | None
    index: Array


@dataclass(frozen=True, eq=False)
class Dataset:
    """Streams the same samples at every call; immutable."""

    name: str
    preprocessing: Preprocessing
    _reader: Reader
    _bound: tuple[InputBinding, ...] = ()
    _rule: LabelRule = "as stored"
    _takes: tuple[tuple[int, int, bool], ...] = ()  # (samples, seed, whether the others are meant)
    _stored: Reader | None = field(default=None, repr=False)  # the reader before a model asked for gray or RGB

    @property
    def samples(self) -> int:
        have = self._reader.samples
        for n, _, others in self._takes:
            have = max(0, have - n) if others else min(have, n)
        return have

    @property
    def labelled(self) -> bool:
        return self._reader.labelled

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order where the data name them, else empty."""
        return self._reader.classes

    def pixel_inputs(self) -> tuple[str, ...]:
        """Of bound data: the model's inputs whose raw samples are images of 8-bit pixels."""
        if not self._bound:
            return ()
        raw = next(self._reader.chunks(1, self._selection, self._keys)).inputs
        first = {b.spec.name: np.asarray(raw[b.key][0]) for b in self._bound}
        return tuple(name for name, sample in first.items() if sample.dtype == np.uint8 and sample.ndim >= 2)

    def batches(self, size: int) -> Iterator[Batch]:
        """Up to `size` samples at a time (only the last batch is shorter), in file order.

        Raises ShapeError, NonFiniteError naming the sample, ImageError naming the file, DatasetError, LabelError.
        """
        for chunk in self._reader.chunks(size, self._selection, self._keys):
            for key, raw in chunk.inputs.items():
                _check_finite(raw, key, chunk.index)
            if self._bound:
                inputs = {b.spec.name: deliver(b, chunk.inputs[b.key], self.preprocessing) for b in self._bound}
            else:
                inputs = {k: self.preprocessing.apply(v) for k, v in chunk.inputs.items()}
            yield Batch(inputs, self._labels(chunk), chunk.index)

    def take(self, n: int, seed: int = 0) -> Dataset:
        """A random subset of n samples, the same for the same seed; all of them if there are no more than n."""
        if n < 1:
            raise DatasetError(f"{n} samples asked of data '{self.name}'", "ask for at least one")
        return replace(self, _takes=(*self._takes, (n, seed, False))) if n < self.samples else self

    def rest(self, n: int, seed: int = 0) -> Dataset:
        """The samples that `take` leaves with the same arguments; perhaps none."""
        return replace(self, _takes=(*self._takes, (n, seed, True)))

    def bind(self, sig: Signature) -> Dataset:
        """The dataset in the model's input names, dtypes and shapes, and labels as class numbers where it classifies.

        A stream of tokens becomes windows of the model's length. Raises ShapeError or DatasetError where nothing fits.
        """
        stored = self._stored or self._reader
        bound = match_inputs(self.name, stored.named, stored.keys, sig)
        stored = _windows(stored, bound)
        reader = _with_channels(stored, bound, self.preprocessing)
        fit = replace(self, _reader=reader, _bound=bound, _stored=stored, _rule="as stored")
        next(fit._first().batches(1))
        if not reader.labelled:
            return fit
        first = next(reader.chunks(_SCAN, np.arange(min(_SCAN, reader.samples)), ()))
        return fit if first.labels is None else replace(fit, _rule=label_rule(first.labels, sig))

    def with_preprocessing(self, preprocessing: Preprocessing) -> Dataset:
        """The same samples, preprocessed otherwise; still bound."""
        changed = replace(self, preprocessing=preprocessing)
        if self._bound and self._stored is not None:
            changed = replace(changed, _reader=_with_channels(self._stored, self._bound, preprocessing))
        return changed

    def class_names(self, sig: Signature) -> tuple[str, ...]:
        """Names of the model's classes; numbers where the labels are class numbers without names; else empty."""
        count = output_classes(sig)
        if self.classes or not self.labelled or not count or count < 2 or len(sig.outputs[0].shape) != 2:
            return self.classes
        _, first = next(iter(self.labels(1)))
        return tuple(map(str, range(count))) if first.dtype.kind == "i" and first.ndim == 1 else ()

    @property
    def takes_floats(self) -> bool:
        """True if every input of the model that it is bound to is floating point."""
        return all(np.issubdtype(np.dtype(b.spec.dtype), np.floating) for b in self._bound)

    def raw_shapes(self) -> list[tuple[int, ...]]:
        """Shape of the first raw sample, for each input."""
        first = next(self._reader.chunks(1, np.zeros(1, np.int64), self._keys))
        return [tuple(v[0].shape) for v in first.inputs.values()]

    def raw(self, how: Preprocessing) -> Iterator[Array]:
        """The first input's samples in their own dtype, a few at a time, after the places of `how` and nothing else."""
        for chunk in self._reader.chunks(_SCAN, self._selection, self._keys[:1]):
            yield how.places(chunk.inputs[self._keys[0]])

    def labels(self, size: int = 1024) -> Iterator[tuple[Array, Array]]:
        """(index, labels) of up to `size` samples at a time, without decoding the samples. Nothing if unlabelled."""
        if self.labelled:
            for chunk in self._reader.chunks(size, self._selection, ()):
                labels = self._labels(chunk)
                if labels is not None:
                    yield chunk.index, labels

    def sample_ids(self) -> list[str]:
        """A hash of each sample's raw content, in order: 16 hex digits.

        The same values have the same id in any form (.npz, .png, .csv), dtype, memory order and preprocessing.
        """
        ids = self._contents[0]
        return [ids[i : i + _ID_BYTES].hex() for i in range(0, len(ids), _ID_BYTES)]

    @property
    def digest(self) -> str:
        """sha256 of samples, labels and preprocessing; the path and the form of the file do not count."""
        return self._contents[1]

    @property
    def _keys(self) -> tuple[str, ...]:
        """The raw inputs that are read."""
        return tuple(dict.fromkeys(b.key for b in self._bound)) or self._reader.keys

    @cached_property
    def _contents(self) -> tuple[bytes, str]:
        """(ids in one string of bytes, digest) in one pass."""
        reader = self._stored or self._reader
        keys = tuple(sorted(self._keys))
        whole, ids = hashlib.sha256(repr(self.preprocessing).encode()), bytearray()
        for chunk in reader.chunks(_SCAN, self._selection, keys):
            for key, raw in chunk.inputs.items():
                _check_finite(raw, key, chunk.index)
            for at in range(len(chunk.index)):
                one = hashlib.sha256()
                for key in keys:
                    one.update((key.encode() + b"\0" if len(keys) > 1 else b"") + _canonical(chunk.inputs[key][at]))
                ids += one.digest()[:_ID_BYTES]
                whole.update(one.digest())
                whole.update(b"" if chunk.labels is None else b"y" + _canonical(chunk.labels[at]))
        return bytes(ids), whole.hexdigest()

    @cached_property
    def _selection(self) -> Array | None:
        """Sorted positions of the samples taken, None for all. Replayed here, for bind may change what a sample is."""
        chosen: Array | None = None
        for n, seed, others in self._takes:
            have = self._reader.samples if chosen is None else len(chosen)
            picked = np.arange(have)
            if n < have:
                picked = np.sort(np.random.default_rng(seed).choice(have, n, replace=False)).astype(np.int64)
            if others:
                picked = np.setdiff1d(np.arange(have), picked)
            if len(picked) < have:
                chosen = picked if chosen is None else chosen[picked]
        return chosen

    def _labels(self, chunk: Chunk) -> Array | None:
        return None if chunk.labels is None else class_labels(chunk.labels, self._rule, chunk.index)

    def _first(self) -> Dataset:
        """The first sample of the data alone, to see whether it fits."""
        first = replace(self, _takes=())
        first.__dict__["_selection"] = np.zeros(1, np.int64)
        return first


def open_dataset(
    spec: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    label_column: str | None = None,
    labels: Path | None = None,
) -> Dataset:
    """Open data of any form.

    spec: a path, `file.npz#array`, or `module:function`.
    preprocessing: what the samples need; without it, that of the TOML beside the data if there is one.
    label_column: column of a table, or array of a .npz, that holds the labels.
    labels: for arrays a .npy or a text file with one label a line; for class folders, tables and arrays that have
    class numbers a text file with one class name a line, in label order.
    Raises DatasetError, LabelError, MissingExtraError.
    """
    how = declared_preprocessing(spec) if preprocessing is None else preprocessing
    if not Path(spec).exists() and isinstance(spec, str) and SPEC.fullmatch(spec):
        reader = open_function(spec, label_column)
        return Dataset(spec, how, reader if labels is None else _with_labels(reader, labels, spec))
    path, key = _split(spec)
    name = path.resolve().name + (f"#{key}" if key else "")
    return Dataset(name, how, _open(path, key, label_column, labels))


def declared_preprocessing(spec: str | Path) -> Preprocessing:
    """What the TOML beside the data says (see `preprocessing.find_file`), or nothing: flags start from it."""
    if not Path(spec).exists() and SPEC.fullmatch(str(spec)):
        return Preprocessing()
    path, _ = _split(spec)
    file = find_file(path) if path.exists() else None
    return Preprocessing() if file is None else Preprocessing.from_toml(file)


def overlap(a: Dataset, b: Dataset) -> int:
    """How many different samples are in both."""
    return len(shared_ids(a, b))


def shared_ids(a: Dataset, b: Dataset) -> list[str]:
    """Ids of the samples that are in both, in the order of `a`, each once."""
    there = set(b.sample_ids())
    return [i for i in dict.fromkeys(a.sample_ids()) if i in there]


def check_labels(dataset: Dataset, classes: int) -> Array:
    """Samples per class, int64 (classes,), or (2,) for a model with one output.

    Raises LabelError: unlabelled, no class numbers, out of range, one class only, other class folders than outputs.
    """
    if not dataset.labelled:
        raise LabelError(f"data '{dataset.name}' have no labels", "give labels, or name them with --label-column")
    classes = 2 if classes == 1 else classes
    if dataset.classes and len(dataset.classes) != classes:
        raise LabelError(
            f"data '{dataset.name}' have {len(dataset.classes)} classes, the model {classes}",
            "pass --labels FILE with the model's class names, one a line, in its order",
        )
    counts = np.zeros(classes, np.int64)
    for index, labels in dataset.labels():
        if labels.dtype.kind != "i":
            raise LabelError(f"labels of data '{dataset.name}' are {labels.dtype}, not classes", "give class numbers")
        wrong = ((labels < 0) | (labels >= classes)).reshape(len(labels), -1)
        if wrong.any():
            row, column = (int(v) for v in np.argwhere(wrong)[0])
            raise LabelError(
                f"label {labels.reshape(len(labels), -1)[row, column]} of sample {int(index[row])} is outside the "
                f"model's {classes} classes (0 to {classes - 1})",
                "check that the labels belong to this model and start at 0",
            )
        counts += np.bincount(labels.ravel(), minlength=classes)
    if np.count_nonzero(counts) == 1 and dataset.samples > 1:
        raise LabelError(
            f"all {dataset.samples} samples of '{dataset.name}' are of class {int(np.argmax(counts))}",
            "accuracy needs samples of several classes; give more data, or none of the labels",
        )
    return counts


def random_dataset(sig: Signature, samples: int, seed: int = 0) -> Dataset:
    """Samples that fit a signature and mean nothing; the same for the same seed."""
    return Dataset("random inputs", Preprocessing(), RandomReader(sig.inputs, samples, seed)).bind(sig)


def _split(spec: str | Path) -> tuple[Path, str | None]:
    """The path and, after a `#`, the array."""
    path = Path(spec).expanduser()
    if not path.exists() and (found := re.fullmatch(r"(.+\.npz)#(.+)", str(path))):
        return Path(found[1]), found[2]
    return path, None


def _open(path: Path, key: str | None, label_column: str | None, labels: Path | None) -> Reader:
    suffix = path.suffix.lower()
    if not path.exists():
        raise DatasetError(f"no data at '{path}'", "check the path; a Python function is given as module:function")
    if path.is_dir():
        return _open_folder(path, labels)
    if suffix not in _SUFFIXES:
        raise DatasetError(f"data '{path}' are of no known form", f"give {', '.join(_SUFFIXES)} or a folder of images")
    if suffix in (".csv", ".parquet"):
        return open_table(path, label_column, None if labels is None else _lines(labels))
    reader = open_arrays(path, key, label_column)
    return reader if labels is None else _with_labels(reader, labels, str(path))


def _open_folder(path: Path, labels: Path | None) -> Reader:
    if labels is not None and any(e.is_dir() and not e.name.startswith(".") for e in path.iterdir()):
        return open_images(path, _lines(labels))
    reader = open_images(path)
    return reader if labels is None else _with_labels(reader, labels, str(path))


def _with_labels(reader: Reader, labels: Path, name: str) -> Reader:
    if labels.suffix.lower() == ".npy":
        column: Any = file_column(labels, None)
    else:
        lines = _lines(labels)
        try:
            values = np.array([float(t) for t in lines])
        except ValueError as error:
            if isinstance(reader, ArrayReader) and reader.labelled:
                return replace(reader, classes=lines)
            raise LabelError(f"labels '{labels}' are no numbers", "give one number a line, or a .npy") from error
        column = MemoryColumn(values.astype(np.int64) if (values == np.rint(values)).all() else values)
    if column.shape[0] != reader.samples:
        raise DatasetError(
            f"data '{name}' have {reader.samples} samples and {column.shape[0]} labels",
            "give one label for each sample",
        )
    if isinstance(reader, ArrayReader):
        return check_lengths(replace(reader, labels=column), name)
    if isinstance(reader, ImageReader):
        return replace(reader, targets=column.open().read(0, reader.samples))
    raise DatasetError(f"labels '{labels}' cannot be joined to '{name}'", "let it yield (x, y)")


def _lines(path: Path) -> tuple[str, ...]:
    if path.suffix.lower() in (".npy", ".npz"):
        raise DatasetError(f"labels '{path}' do not name classes", "give a text file, one class name a line")
    with reading(path):
        lines = [t.strip() for t in path.read_text(encoding="utf-8-sig").splitlines()]
    found = tuple(t for t in lines if t)
    if not found:
        raise DatasetError(f"labels '{path}' are empty", "give one a line")
    return found


def _windows(reader: Reader, bound: tuple[InputBinding, ...]) -> Reader:
    """Tokens in one long row, for a model that takes (batch, T) integers: windows of T."""
    if len(bound) != 1 or not isinstance(reader, ArrayReader) or reader.labelled:
        return reader
    spec, column = bound[0].spec, reader.columns[bound[0].key]
    if (
        len(column.shape) != 1
        or column.dtype.kind not in "iu"
        or len(spec.shape) != 2
        or not spec.dtype.startswith("int")
    ):
        return reader
    length = spec.shape[1]
    if isinstance(length, str):
        raise ShapeError(
            f"tokens can be cut only to a known length, size 1 of '{spec.name}' is {length}",
            f"pass --shape {spec.name}=1,LENGTH",
        )
    if column.shape[0] <= length:
        raise DatasetError(f"{column.shape[0]} tokens are less than one window of {length} and its label", "give more")
    return WindowReader(bound[0].key, column, length, reader.classes)


def _with_channels(reader: Reader, bound: tuple[InputBinding, ...], how: Preprocessing) -> Reader:
    """Image files decoded to as many channels as the model takes."""
    if not isinstance(reader, ImageReader) or len(bound) != 1:
        return reader
    return replace(reader, channels=transform.channels(bound[0].spec.shape, how.layout))


def _check_finite(raw: Array | list[Array], key: str, index: Array) -> None:
    for part in (raw,) if isinstance(raw, np.ndarray) else ():
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            bad = ~np.isfinite(part).reshape(len(part), -1).all(axis=1)
            raise NonFiniteError(
                f"sample {int(index[int(np.argmax(bad))])} of input '{key}' has NaN or Inf", "repair or remove it"
            )
    if isinstance(raw, list):
        for at, sample in enumerate(raw):
            _check_finite(sample[None], key, index[at : at + 1])


def _canonical(sample: Array) -> bytes:
    """A sample's values as bytes that do not depend on dtype, byte order or sizes of 1.

    Whole numbers 0 to 255 are bytes, other whole numbers int64, the rest float32.
    """
    if sample.dtype.kind == "f" and not (sample == np.rint(sample)).all():
        return b"f" + np.ascontiguousarray(sample, "<f4").tobytes()
    if sample.dtype == np.uint8 or (sample.size and sample.min() >= 0 and sample.max() <= 255):
        return b"u" + np.ascontiguousarray(sample, np.uint8).tobytes()
    if sample.dtype.kind == "f" and np.abs(sample).max() >= 2.0**53:
        return b"f" + np.ascontiguousarray(sample, "<f4").tobytes()
    return b"i" + np.ascontiguousarray(sample, "<i8").tobytes()
