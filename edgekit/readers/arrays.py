"""Arrays as data: .npz, .npy and arrays in memory, streamed sample by sample without unpickling."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from edgekit.errors import DatasetError
from edgekit.readers import LABEL_KEYS, NAME_KEYS, Array, Chunk, groups, reading, runs

_DISCARD_BYTES = 1 << 16
_KINDS = "biuf"  # numpy dtype kinds that a model can take


class Rows(Protocol):
    """An open column: reads (start, stop) forwards only."""

    def read(self, start: int, stop: int) -> Array: ...

    def close(self) -> None: ...


class Column(Protocol):
    """One array, samples along axis 0."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def open(self) -> Rows: ...


@dataclass(frozen=True)
class MemoryColumn:
    """An array that is in memory already."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.array.dtype
        return dtype

    def open(self) -> Rows:
        return self

    def read(self, start: int, stop: int) -> Array:
        return self.array[start:stop]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class FileColumn:
    """An array in a .npy file, or in a member of a .npz, possibly compressed. The header is all that is kept."""

    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    def open(self) -> Rows:
        stack = ExitStack()
        with reading(self.path):
            stream = _open(stack, self.path, self.member)
            _header(stream, self.path)
        if self.fortran and len(self.shape) > 1:
            return _FortranRows(self, stack, stream)
        return _StreamRows(self, stack, stream)


class _StreamRows:
    """C order: samples lie one after another, so a skip is a read that is thrown away (or a seek)."""

    def __init__(self, column: FileColumn, stack: ExitStack, stream: IO[bytes]) -> None:
        self._column, self._stack, self._stream, self._at = column, stack, stream, 0
        self._row_bytes = column.dtype.itemsize * int(np.prod(column.shape[1:], dtype=np.int64))

    def read(self, start: int, stop: int) -> Array:
        with reading(self._column.path):
            self._skip((start - self._at) * self._row_bytes)
            wanted = (stop - start) * self._row_bytes
            data = self._stream.read(wanted)
        self._at = stop
        if len(data) != wanted:
            raise _truncated(self._column)
        array = np.frombuffer(data, self._column.dtype).reshape(stop - start, *self._column.shape[1:])
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def _skip(self, size: int) -> None:
        if self._column.member is None:
            self._stream.seek(size, 1)
            return
        while size > 0:
            got = len(self._stream.read(min(size, _DISCARD_BYTES)))
            if not got:
                raise _truncated(self._column)
            size -= got

    def close(self) -> None:
        self._stack.close()


class _FortranRows:
    """Fortran order: a sample is spread over the whole array. A compressed one goes to a temporary file first."""

    def __init__(self, column: FileColumn, stack: ExitStack, stream: IO[bytes]) -> None:
        self._column, self._stack, self._file, self._offset = column, stack, stream, 0
        size = column.dtype.itemsize * int(np.prod(column.shape, dtype=np.int64))
        with reading(column.path):
            if column.member is None:
                self._offset = stream.tell()
                have = column.path.stat().st_size - self._offset
            else:
                self._file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
                have = 0
                while data := stream.read(_DISCARD_BYTES):
                    have += self._file.write(data)
                self._file.flush()
        if have < size:
            raise _truncated(column)

    def read(self, start: int, stop: int) -> Array:
        # Plain reads, one per element of a sample: a map would count every page that the kernel maps around as ours.
        c, rows = self._column, stop - start
        elements = int(np.prod(c.shape[1:], dtype=np.int64))
        buffer = np.empty((elements, rows), c.dtype)
        with reading(c.path):
            for element in range(elements):
                self._file.seek(self._offset + (element * c.shape[0] + start) * c.dtype.itemsize)
                buffer[element] = np.frombuffer(self._file.read(rows * c.dtype.itemsize), c.dtype)
        return np.array(buffer.T.reshape((rows, *c.shape[1:]), order="F"), c.dtype.newbyteorder("="), order="C")

    def close(self) -> None:
        self._stack.close()


@dataclass(frozen=True)
class ArrayReader:
    """Columns of equal length.

    main: the input that makes a sample when a file has more arrays than that; None if every column is an input.
    """

    columns: Mapping[str, Column]
    labels: Column | None
    main: str | None = None
    classes: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        return next(iter(self.columns.values())).shape[0]

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.columns) if self.main is None else (self.main,)

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(self.columns)

    def chunks(self, size: int, wanted: Array | None, keys: tuple[str, ...]) -> Iterator[Chunk]:
        with ExitStack() as stack:
            rows = {k: stack.enter_context(closing(self.columns[k].open())) for k in keys}
            labels = None if self.labels is None else stack.enter_context(closing(self.labels.open()))
            for index in groups(self.samples, wanted, size):
                yield Chunk(
                    {k: _take(r, index) for k, r in rows.items()},
                    None if labels is None else _take(labels, index),
                    index,
                )


def open_arrays(path: Path, key: str | None, label_key: str | None) -> ArrayReader:
    """The reader of a .npy or .npz.

    key: the array that is the input (`file.npz#key`); without it `x` is, or every array that is not the label.
    label_key: the array of labels; without it `y`, `labels` or `label` (and `y_test` beside `x_test`).
    Raises DatasetError: pickled, text or structured arrays, nothing in it, lengths that differ, no such key.
    """
    if path.suffix.lower() == ".npy":
        column = file_column(path, None)
        reader = ArrayReader({"x": column}, None)
    else:
        reader = _open_npz(path, key, label_key)
    return check_lengths(reader, str(path))


def _open_npz(path: Path, key: str | None, label_key: str | None) -> ArrayReader:
    with reading(path), zipfile.ZipFile(path) as archive:
        names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    if not names:
        raise DatasetError(f"data '{path}' hold no arrays", "write them with numpy.savez")
    listed = "it has: " + ", ".join(names)
    for asked in (key, label_key):
        if asked is not None and asked not in names:
            raise DatasetError(f"data '{path}' have no array '{asked}'", listed)
    label = label_key or _label_name(names, key)
    labels = None if label is None else file_column(path, label)
    if key is None and "x" in names:
        key = "x"
    if key is not None:
        columns = {key: file_column(path, key)}
        rest = [n for n in names if n not in (key, label)]
    else:
        columns, rest = {}, [n for n in names if n != label]
    usual = bool(columns)
    for name in rest:  # named inputs; what cannot be one (text, other lengths beside x) is left out
        column = _open_header(path, name)
        fits = column.dtype.kind in _KINDS and len(column.shape) > 0
        if fits and (not usual or column.shape[0] == columns[str(key)].shape[0]):
            columns[name] = column
    if not columns:
        raise DatasetError(f"data '{path}' have no numeric array besides the labels", listed)
    if len({c.shape[0] for c in columns.values()}) > 1:
        raise DatasetError(f"arrays of data '{path}' differ in length", f"choose one as '{path.name}#NAME'; {listed}")
    return ArrayReader(columns, labels, key, _names(path, names))


def _names(path: Path, names: list[str]) -> tuple[str, ...]:
    """The names of classes or tokens that a .npz holds, or none."""
    for name in names:
        column = _open_header(path, name) if name in NAME_KEYS else None
        if column is not None and column.dtype.kind == "U" and len(column.shape) == 1 and column.shape[0] > 0:
            with reading(path), np.load(path, allow_pickle=False) as stored:
                return tuple(str(text) for text in stored[name])
    return ()


def _label_name(names: list[str], key: str | None) -> str | None:
    tries = [*LABEL_KEYS]
    if key is not None and key.startswith("x"):
        tries.insert(0, "y" + key[1:])  # x_test and y_test, as in Keras' own files
    return next((t for t in tries if t in names and t != key), None)


def file_column(path: Path, member: str | None) -> FileColumn:
    """A column whose header says that it is numeric and has samples along axis 0. Raises DatasetError otherwise."""
    column = _open_header(path, member)
    name = f"array '{member}' of data '{path}'" if member else f"data '{path}'"
    if column.dtype.kind not in _KINDS:
        raise DatasetError(f"{name} is of type {column.dtype}", "store numbers (numpy integers, floats or booleans)")
    if not column.shape:
        raise DatasetError(f"{name} is a single number", "store an array with samples along axis 0")
    return column


def check_lengths(reader: ArrayReader, name: str) -> ArrayReader:
    """The reader, if it has samples and one label for each. Raises DatasetError otherwise."""
    if reader.samples == 0 or any(0 in c.shape for c in reader.columns.values()):
        raise DatasetError(f"data '{name}' hold no samples", "give at least one")
    if reader.labels is not None and reader.labels.shape[0] != reader.samples:
        raise DatasetError(
            f"data '{name}' have {reader.samples} samples and {reader.labels.shape[0]} labels",
            "give one label for each sample",
        )
    return reader


def _open_header(path: Path, member: str | None) -> FileColumn:
    with reading(path), ExitStack() as stack:
        shape, fortran, dtype = _header(_open(stack, path, member), path)
        if member is None and not (fortran and len(shape) > 1):
            _check_size(path, shape, dtype)
    return FileColumn(path, member, shape, dtype, fortran)


def _check_size(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    need = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if path.stat().st_size < need:
        raise EOFError(f"truncated, its header promises {need} bytes")


def _open(stack: ExitStack, path: Path, member: str | None) -> IO[bytes]:
    if member is None:
        return stack.enter_context(path.open("rb"))
    archive = stack.enter_context(zipfile.ZipFile(path))
    return stack.enter_context(archive.open(member + ".npy"))


def _header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype) of a .npy stream, which is left at the first value. Never unpickles."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        if version not in ((1, 0), (2, 0)):  # 3.0 exists for structured types only
            raise ValueError(f"array format {version[0]}.{version[1]} (structured)")
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise DatasetError(
            f"data '{path}' hold no plain array: {error}", "write it with numpy.save or savez"
        ) from error
    if dtype.hasobject:
        raise DatasetError(
            f"data '{path}' hold pickled objects, which edgekit never loads", "store plain numeric arrays instead"
        )
    if dtype.names is not None:
        raise DatasetError(f"data '{path}' hold a structured array", "store one plain array per input")
    return tuple(int(s) for s in shape), bool(fortran), dtype


def _truncated(column: FileColumn) -> DatasetError:
    return DatasetError(
        f"data '{column.path}' end too early: the header promises shape {column.shape}", "write the file again"
    )


def _take(rows: Rows, index: Array) -> Array:
    parts = [rows.read(start, stop) for start, stop in runs(index)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class WindowReader:
    """Tokens cut into samples of `length` that do not overlap; the labels are, for each, the token that follows."""

    key: str
    column: Column
    length: int
    classes: tuple[str, ...] = ()
    labelled: bool = True

    @property
    def samples(self) -> int:
        return (self.column.shape[0] - 1) // self.length

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def named(self) -> tuple[str, ...]:
        return self.keys

    def chunks(self, size: int, wanted: Array | None, keys: tuple[str, ...]) -> Iterator[Chunk]:
        length = self.length
        with closing(self.column.open()) as rows:
            last: tuple[int, Array] | None = None  # position and value of the token read too far
            for index in groups(self.samples, wanted, size):
                xs, ys = [], []
                for start, stop in runs(index):
                    first = start * length
                    reuse = last is not None and last[0] == first
                    tokens = rows.read(first + reuse, stop * length + 1)
                    if reuse and last is not None:
                        tokens = np.concatenate([last[1], tokens])
                    last = (stop * length, tokens[-1:])
                    xs.append(tokens[:-1].reshape(-1, length))
                    ys.append(tokens[1:].reshape(-1, length))
                yield Chunk({k: np.concatenate(xs) for k in keys}, np.concatenate(ys), index)
