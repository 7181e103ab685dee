"""One module per form that data come in; each reader streams raw samples in file order.

A reader is immutable and re-iterable, holds no samples, and never runs code from a data file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgekit.errors import DatasetError

Array = np.ndarray[Any, Any]

LABEL_KEYS = ("y", "labels", "label")
NAME_KEYS = ("classes", "class_names", "vocab")
"""Arrays of text that name the classes or the tokens, in their order."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive wanted samples, raw.

    inputs: by name, (n, ...) each; a list of n arrays when images differ in size. Empty when only labels are asked.
    labels: (n, ...) or None.   index: int64 (n,), positions in the file.
    """

    inputs: Mapping[str, Array | list[Array]]
    labels: Array | None
    index: Array


class Reader(Protocol):
    """What a form of data offers."""

    @property
    def samples(self) -> int: ...

    @property
    def labelled(self) -> bool: ...

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the inputs that make a sample, unless a model asks for others by name."""
        ...

    @property
    def named(self) -> tuple[str, ...]:
        """Every input that can be asked for by name; `keys` among them."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order where the data name them, else empty."""
        ...

    def chunks(self, size: int, wanted: Array | None, keys: tuple[str, ...]) -> Iterator[Chunk]:
        """Up to `size` samples at a time, in file order.

        wanted: sorted int64 positions, None for all.   keys: the inputs to read; none reads the labels alone.
        """
        ...


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong inside the standard readers into one DatasetError that names the file."""
    import zipfile
    import zlib

    try:
        yield
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DatasetError(f"cannot read data '{path}': {reason}", "check the file, or write it again") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile: unknown compression, encrypted
        raise DatasetError(f"cannot read data '{path}': {error}", "write it with numpy.savez_compressed") from error


def groups(samples: int, wanted: Array | None, size: int) -> Iterator[Array]:
    """The wanted positions, `size` at a time; int64 each."""
    total = samples if wanted is None else len(wanted)
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield np.arange(start, stop, dtype=np.int64) if wanted is None else wanted[start:stop]


def runs(index: Array) -> Iterator[tuple[int, int]]:
    """(start, stop) of each stretch of consecutive positions; index: sorted, not empty."""
    cuts = np.flatnonzero(np.diff(index) != 1) + 1
    for part in np.split(index, cuts):
        yield int(part[0]), int(part[-1]) + 1


def batch_samples(
    rows: Iterator[tuple[Mapping[str, Array], Array | None]], size: int, wanted: Array | None
) -> Iterator[Chunk]:
    """Chunks out of a stream of single samples, for forms that can only be read one after another."""
    follow = None if wanted is None else iter(wanted.tolist())
    target = None if follow is None else next(follow, None)
    held: list[tuple[int, Mapping[str, Array], Array | None]] = []
    for position, (inputs, label) in enumerate(rows):
        if follow is not None:
            if target is None:
                break
            if position != target:
                continue
            target = next(follow, None)
        held.append((position, inputs, label))
        if len(held) == size:
            yield _chunk(held)
            held = []
    if held:
        yield _chunk(held)


def _chunk(held: list[tuple[int, Mapping[str, Array], Array | None]]) -> Chunk:
    inputs: dict[str, Array | list[Array]] = {}
    for key in held[0][1]:
        column = [row[1][key] for row in held]
        same = all(c.shape == column[0].shape for c in column)
        inputs[key] = np.stack(column) if same else column
    labels = [row[2] for row in held]
    stacked = None if labels[0] is None else np.stack([np.asarray(v) for v in labels])
    return Chunk(inputs, stacked, np.array([row[0] for row in held], np.int64))
