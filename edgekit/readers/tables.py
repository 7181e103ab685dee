"""Tables as data: .csv and .parquet, one sample a row, numeric columns in order as features, streamed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import DatasetError, LabelError, MissingExtraError
from edgekit.readers import LABEL_KEYS, Array, Chunk, batch_samples, reading

_MAX_CLASSES = 10_000  # more different texts than this are names or remarks, not classes
_PARQUET_ROWS = 256

Row = tuple[Array, Any]


@dataclass(frozen=True)
class TableReader:
    """rows: starts over at each call; gives (features float64 (f,), label or None) in file order."""

    rows: Callable[[], Iterator[Row]]
    samples: int
    labelled: bool
    classes: tuple[str, ...] = ()
    label_dtype: str = "int64"

    @property
    def keys(self) -> tuple[str, ...]:
        return ("x",)

    @property
    def named(self) -> tuple[str, ...]:
        return self.keys

    def chunks(self, size: int, wanted: Array | None, keys: tuple[str, ...]) -> Iterator[Chunk]:
        number = {name: i for i, name in enumerate(self.classes)}

        def rows() -> Iterator[tuple[dict[str, Array], Array | None]]:
            for features, label in self.rows():
                value = None if label is None else np.asarray(number.get(label, label), self.label_dtype)
                yield {k: features for k in keys}, value

        return batch_samples(rows(), size, wanted)


def open_table(path: Path, label_column: str | None, names: tuple[str, ...] | None = None) -> TableReader:
    """The reader of a .csv or .parquet.

    label_column: its name; without it `y`, `labels` or `label` where there is one. Text labels become the position of
    their name in `names`, or among the sorted names. Raises DatasetError naming file, row and column; LabelError.
    """
    opened = _Csv(path, label_column) if path.suffix.lower() == ".csv" else _Parquet(path, label_column)
    samples, texts, whole = 0, set[str](), True
    for _, label in opened.rows():
        samples += 1
        if isinstance(label, str):
            texts.add(label)
            if len(texts) > _MAX_CLASSES:
                raise LabelError(
                    f"column '{opened.label}' of '{path}' has over {_MAX_CLASSES} different texts",
                    "name the column of classes with --label-column",
                )
        elif label is not None:
            whole = whole and float(label).is_integer()
    if not samples:
        raise DatasetError(f"data '{path}' hold no samples", "give at least one row")
    classes = tuple(sorted(texts))
    if names is not None and texts:
        unknown = sorted(texts - set(names))
        if unknown:
            raise LabelError(f"label '{unknown[0]}' of '{path}' is not in the list of labels", "add it to the list")
        classes = names
    dtype = "int64" if classes or whole else "float64"
    return TableReader(opened.rows, samples, opened.label is not None, classes, dtype)


class _Csv:
    """A .csv with a header line; comma, semicolon or tab."""

    def __init__(self, path: Path, label_column: str | None) -> None:
        self.path = path
        with reading(path), path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
        self._delimiter = max(",;\t", key=first.count)
        header = next(self._lines(), (0, []))[1]
        _check_header(path, header)
        self.label = _label_column(path, header, label_column)
        self._label_at = None if self.label is None else header.index(self.label)
        self._header = header
        self._text = self._label_at is not None and self._has_text()

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        with reading(self.path), self.path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=self._delimiter)
            try:
                for line in lines:
                    if line:
                        yield lines.line_num, line
            except csv.Error as error:
                raise DatasetError(f"'{self.path}', line {lines.line_num}: {error}", "write the table again") from error

    def _has_text(self) -> bool:
        """True if any label is no number: then all of them are names."""
        at = self._label_at or 0
        lines = self._lines()
        next(lines, None)
        return any(at < len(line) and line[at].strip() and _as_float(line[at]) is None for _, line in lines)

    def rows(self) -> Iterator[Row]:
        lines = self._lines()
        next(lines, None)
        for number, line in lines:
            if len(line) != len(self._header):
                raise DatasetError(
                    f"'{self.path}', line {number} has {len(line)} cells, the header {len(self._header)}",
                    "write the table again",
                )
            label: Any = None
            if self._label_at is not None:
                text = line.pop(self._label_at).strip()
                label = text if self._text else _as_float(text)
                if text == "":
                    raise LabelError(f"'{self.path}', line {number} has no label", "fill or remove the row")
            yield self._features(line, number), label

    def _features(self, cells: list[str], number: int) -> Array:
        try:
            return np.array([float(c) for c in cells], np.float64)
        except ValueError:
            at = next(i for i, c in enumerate(cells) if _as_float(c) is None)
            names = [h for i, h in enumerate(self._header) if i != self._label_at]
            raise DatasetError(
                f"'{self.path}', line {number}, column '{names[at]}': {cells[at]!r} is no number",
                "give numbers; name the label's column with --label-column",
            ) from None


class _Parquet:
    """A .parquet of plain columns, read a few hundred rows at a time."""

    def __init__(self, path: Path, label_column: str | None) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtraError("reading .parquet needs pyarrow", "pip install 'edgekit[tables]'") from error
        self.path = path
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"cannot read data '{path}': {_line(error)}", "write it again") from error
        header = list(schema.names)
        self.label = _label_column(path, header, label_column)
        self._features = [h for h in header if h != self.label and not h.startswith("__index_level_")]
        for name in self._features:
            kind = schema.field(name).type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
                raise DatasetError(
                    f"column '{name}' of '{path}' is of type {kind}",
                    "give numeric columns; name the label's column with --label-column",
                )
        if not self._features:
            raise DatasetError(f"data '{path}' have no feature columns", "give numeric columns beside the label")

    def rows(self) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [*self._features, *([] if self.label is None else [self.label])]
        try:
            # No pre-buffering and no threads: either reads far ahead, and memory grows with the file.
            with pq.ParquetFile(self.path, pre_buffer=False, memory_map=False) as file:
                done = 0
                for batch in file.iter_batches(_PARQUET_ROWS, columns=columns, use_threads=False):
                    yield from self._block(batch, done)
                    done += batch.num_rows
        except pa.ArrowException as error:
            raise DatasetError(f"cannot read data '{self.path}': {_line(error)}", "write it again") from error

    def _block(self, batch: Any, start: int) -> Iterator[Row]:
        for name in batch.schema.names:
            if batch.column(name).null_count:
                row = start + batch.column(name).is_null().to_pylist().index(True)
                raise DatasetError(f"'{self.path}', row {row}, column '{name}' is empty", "fill or remove the row")
        features = np.stack(
            [np.asarray(batch.column(n).to_numpy(zero_copy_only=False), np.float64) for n in self._features], axis=1
        )
        labels = [None] * len(features) if self.label is None else batch.column(self.label).to_pylist()
        yield from zip(features, labels, strict=True)


def _check_header(path: Path, header: Sequence[str]) -> None:
    if not header:
        raise DatasetError(f"data '{path}' are empty", "give a header line and at least one row")
    numbers = all(_as_float(h) is not None for h in header)
    if numbers and list(header) != [str(i) for i in range(len(header))]:
        raise DatasetError(f"the first line of '{path}' looks like data", "put a line with the columns' names first")
    for i, name in enumerate(header):
        if not name.strip():
            raise DatasetError(
                f"column {i + 1} of '{path}' has no name", "name it, or drop it (pandas: to_csv(…, index=False))"
            )
        if name in header[:i]:
            raise DatasetError(f"'{path}' has two columns '{name}'", "rename one")


def _label_column(path: Path, header: Sequence[str], asked: str | None) -> str | None:
    if asked is not None and asked not in header:
        shown = ", ".join(header[:12]) + (", …" if len(header) > 12 else "")
        raise DatasetError(f"data '{path}' have no column '{asked}'", f"--label-column must be one of: {shown}")
    label = asked or next((k for k in LABEL_KEYS if k in header), None)
    if label is not None and len(header) == 1:
        raise DatasetError(f"data '{path}' have no feature columns", "give numeric columns beside the label")
    return label


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
