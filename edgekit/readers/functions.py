"""A Python function as data: `module:function`, called once for every pass over the samples."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import DatasetError, EdgekitError
from edgekit.readers import LABEL_KEYS, Array, Chunk, Reader, batch_samples
from edgekit.readers.arrays import ArrayReader, MemoryColumn, check_lengths

SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

Sample = tuple[dict[str, Array], Array | None]


@dataclass(frozen=True)
class FunctionReader:
    """Samples that a function yields; calling it again must yield the same ones."""

    spec: str
    function: Callable[[], Iterable[Any]]
    samples: int
    labelled: bool
    keys: tuple[str, ...]
    classes: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        return self.keys

    def chunks(self, size: int, wanted: Array | None, keys: tuple[str, ...]) -> Iterator[Chunk]:
        def rows() -> Iterator[Sample]:
            count = 0
            for inputs, label in _samples(self.spec, self.function):
                if count == self.samples or tuple(inputs) != self.keys or (label is not None) != self.labelled:
                    raise self._changed(count)
                count += 1
                yield {k: inputs[k] for k in keys}, label
            if count != self.samples:
                raise self._changed(count)

        return batch_samples(rows(), size, wanted)

    def _changed(self, count: int) -> DatasetError:
        return DatasetError(
            f"'{self.spec}' yields other samples than before (it had {self.samples}, differs at {count})",
            "let every call yield the same samples: fix its seed, return a new iterator",
        )


def open_function(spec: str, label_key: str | None) -> Reader:
    """The reader of `module:function`; the module is looked for in the working directory first.

    The function takes no arguments and yields samples: x, (x, y), or a dict of inputs by the model's names with the
    label under `label_key` (y, labels or label). It may instead return the arrays at once: (x, y) or such a dict, with
    samples along axis 0. Raises DatasetError with the function's own error and line.
    """
    module, _, name = spec.partition(":")
    with _guard(spec):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise DatasetError(f"module '{module}' has no function '{name}'", "check the name after the colon")
    with _guard(spec):
        made = function()
    if isinstance(made, tuple | dict | np.ndarray):
        return _arrays(spec, made, label_key)

    def calls() -> Iterable[Any]:
        with _guard(spec):
            again: Iterable[Any] = function()
        return (_split(spec, sample, label_key) for sample in again)

    samples, first = 0, None
    for sample in _samples(spec, lambda: (_split(spec, s, label_key) for s in made)):
        first = first or sample
        samples += 1
    if first is None:
        raise DatasetError(f"'{spec}' yields no samples", "let it yield (x, y)")
    return FunctionReader(spec, calls, samples, first[1] is not None, tuple(first[0]))


def _arrays(spec: str, made: Any, label_key: str | None) -> ArrayReader:
    inputs, labels = _split(spec, made, label_key)
    if any(not a.shape for a in inputs.values()) or (labels is not None and not labels.shape):
        raise DatasetError(f"'{spec}' returns one sample", "return arrays with samples along axis 0, or yield samples")
    if len({len(a) for a in inputs.values()}) > 1:
        raise DatasetError(f"'{spec}' returns inputs that differ in length", "return as many samples of each")
    columns = {k: MemoryColumn(a) for k, a in inputs.items()}
    return check_lengths(ArrayReader(columns, None if labels is None else MemoryColumn(labels)), spec)


def _samples(spec: str, function: Callable[[], Iterable[Any]]) -> Iterator[Sample]:
    with _guard(spec):
        iterator = iter(function())
    while True:
        with _guard(spec):
            try:
                sample = next(iterator)
            except StopIteration:
                return
        yield sample


def _split(spec: str, sample: Any, label_key: str | None) -> Sample:
    """Inputs by name, and the label, of what a user's function gives."""
    if isinstance(sample, Mapping):
        key = label_key or next((k for k in LABEL_KEYS if k in sample), None)
        inputs = {str(k): _array(spec, v) for k, v in sample.items() if k != key}
        label = None if key is None or key not in sample else _array(spec, sample[key])
        if inputs:
            return inputs, label
    elif isinstance(sample, tuple) and len(sample) == 2:
        return {"x": _array(spec, sample[0])}, None if sample[1] is None else _array(spec, sample[1])
    elif not isinstance(sample, tuple):
        return {"x": _array(spec, sample)}, None
    raise DatasetError(
        f"'{spec}' gives a {type(sample).__name__} that is no sample", "give x, (x, y) or a dict of inputs"
    )


def _array(spec: str, value: Any) -> Array:
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise DatasetError(f"'{spec}' gives a value of type {type(value).__name__}", "give numeric numpy arrays")
    return array


class _guard:
    """Turns an exception of the user's code into one line that names where it was raised."""

    def __init__(self, spec: str) -> None:
        self._spec = spec

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, EdgekitError):
            frame = traceback.extract_tb(trace)[-1]
            raise DatasetError(
                f"'{self._spec}' failed: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})",
                "fix the function, or check that it can be imported from here",
            ) from error
