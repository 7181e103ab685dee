"""Raw samples out of what a user gives a model: an image, a table, arrays, text, or one line of a stream.

Standard library and numpy, Python 3.9: this file travels to devices with `run.py`. `Model` is what is known of a model.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

if __package__:  # a part of edgekit, on the host
    from edgekit import transform
else:  # beside it, in a bundle
    import transform  # type: ignore[import-not-found, no-redef]

LABEL_KEYS = ("y", "labels", "label")
_TOKENS = ("int32", "int64")  # what token numbers come as

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]


class RunError(Exception):
    """An input that cannot be answered: what, and the remedy. kind: a TransformError's, else "input"."""

    def __init__(self, what: str, remedy: str = "", kind: str = "input") -> None:
        super().__init__(f"{what} — {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy
        self.kind = kind


@dataclass
class Model:
    """A loaded model and what is known of it.

    infer: arrays by input name, batch first, to arrays by output name. inputs, outputs: {"name", "dtype", "shape"}.
    how: the declared preprocessing. labels: names of the classes or tokens. pixels: inputs whose samples were images
    when it was converted.
    """

    name: str
    infer: Callable[[Tensors], Tensors]
    inputs: Sequence[Mapping[str, Any]]
    outputs: Sequence[Mapping[str, Any]]
    how: Mapping[str, Any]
    labels: Sequence[str] = ()
    pixels: Sequence[str] = ()

    @property
    def batch(self) -> int:
        """The batch that the model is fixed to, else 1: sizes that change cost LiteRT a new interpreter."""
        fixed = [s["shape"][0] for s in self.inputs if s["shape"] and isinstance(s["shape"][0], int)]
        return min(fixed) if fixed else 1

    @property
    def takes_tokens(self) -> bool:
        return len(self.inputs) == 1 and len(self.inputs[0]["shape"]) == 2 and self.inputs[0]["dtype"] in _TOKENS


@dataclass
class Given:
    """Raw samples by input name. counted: the first axis counts samples; None where the model must tell.

    last: of token models, the place of the last token that was given. image: it came from an image file.
    """

    arrays: Tensors
    counted: bool | None = True
    last: int | None = None
    image: bool = False
    notes: tuple[str, ...] = ()


def read(path: str, model: Model) -> Given:
    """A file of any form. Raises RunError or TransformError."""
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        raise RunError(f"'{path}' is a folder", "give one file, or a list of files on --stdin")
    if not os.path.isfile(path):
        raise RunError(f"no file '{path}'", "check the path")
    if suffix in transform.IMAGE_SUFFIXES:
        spec = _only(model, path)
        wanted = transform.channels(spec["shape"], model.how.get("layout"))
        return Given({spec["name"]: transform.decode(path, wanted)[None]}, image=True)
    if suffix in (".npz", ".npy"):
        return Given(_stored(path, model), counted=None)
    if suffix not in (".csv", ".txt"):
        known = ", ".join(sorted(transform.IMAGE_SUFFIXES))
        raise RunError(f"'{path}' is of no known form", f"give .npz, .npy, .csv, .txt or an image ({known})")
    with _reading(path), open(path, encoding="utf-8-sig", newline="") as file:
        text = file.read()
    if suffix == ".txt" and model.takes_tokens:
        return tokens(text[:-1] if text.endswith("\n") else text, model)
    return rows(text, model, path)


def of_line(line: str, model: Model) -> Given:
    """One line of a stream: the path of a file, a row of numbers, or text for a model that takes tokens."""
    if not line.strip():
        raise RunError("an empty line", "give a path, a row of numbers" + (" or text" if model.takes_tokens else ""))
    if os.path.isfile(line):
        return read(line, model)
    if model.takes_tokens:
        return tokens(line, model)
    cells = _cells(line)
    if cells and all(_number(c) is not None for c in cells):
        return rows(line, model, "the line")
    raise RunError(f"no file '{line}'", "give the path of a file, or a row of numbers")


def rows(text: str, model: Model, where: str) -> Given:
    """A table, one sample a row, with or without a line of names; a column called as labels are is left out."""
    spec = _only(model, where)
    delimiter = _delimiter(text.split("\n", 1)[0])
    try:
        lines = list(csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=delimiter == " "))
    except csv.Error as error:
        raise RunError(f"{where}: {error}", "write the table again") from error
    table = [(i, [c.strip() for c in cells]) for i, cells in enumerate(lines, 1) if any(c.strip() for c in cells)]
    left_out = -1
    if table and _is_header(table[0][1], len(table)):
        left_out = next((table[0][1].index(k) for k in LABEL_KEYS if k in table[0][1]), -1)
        table = table[1:]
    if not table:
        raise RunError(f"{where} holds no row of numbers", "give at least one")
    samples = []
    for number, cells in table:
        values = [_number(c) for at, c in enumerate(cells) if at != left_out]
        if None in values:
            wrong = next(c for at, c in enumerate(cells) if at != left_out and _number(c) is None)
            raise RunError(f"{where}, line {number}: {wrong!r} is no number", "give numbers")
        if len(cells) != len(table[0][1]):
            what = f"{where}, line {number} has {len(cells)} cells, the first {len(table[0][1])}"
            raise RunError(what, "write the table again")
        samples.append(np.array(values, np.float64))
    return Given({spec["name"]: np.stack(samples)})


def tokens(text: str, model: Model) -> Given:
    """Text as token numbers (1, T): by the model's labels where each is one character, else it is numbers."""
    spec = _only(model, "text")
    if model.labels and all(len(label) == 1 for label in model.labels):
        number = {label: i for i, label in enumerate(model.labels)}
        strange = next((c for c in text if c not in number), None)
        if strange is not None:
            raise RunError(f"character {strange!r} is no token of the model", "leave it out")
        found = [number[c] for c in text]
    else:
        try:
            found = [int(t) for t in text.replace(",", " ").split()]
        except ValueError:
            what = "the model's tokens have no names of one character, so text cannot become tokens"
            raise RunError(what, "give token numbers, or name the tokens with --labels FILE") from None
    size = vocabulary(model)
    wrong = next((t for t in found if t < 0 or (size is not None and t >= size)), None)
    if not found or wrong is not None:
        what = "no tokens" if not found else f"token {wrong} is outside the model's {size}"
        raise RunError(what, "give at least one" if not found else f"give 0 to {(size or 1) - 1}")
    length, notes = spec["shape"][1], tuple[str, ...]()
    if isinstance(length, int) and len(found) > length:
        notes = (f"the last {length} of {len(found)} tokens: it takes no more",)
        found = found[-length:]
    return Given({spec["name"]: np.array([found], np.int64)}, last=len(found) - 1, notes=notes)


def read_labels(path: str, model: Model) -> list[str]:
    """Names, one a line; or a .json list, for names that are no line (a space, a line break)."""
    found = _names(path)
    sizes = [s["shape"][-1] if s["shape"] else 1 for s in model.outputs]
    if (
        len(found) not in sizes
        and all(isinstance(size, int) for size in sizes)
        and not (len(found) == 2 and 1 in sizes)
    ):
        told = " and ".join(str(size) for size in sizes)
        raise RunError(f"labels '{path}' name {len(found)} classes, the model has {told}", "give one name for each")
    return found


def _names(path: str) -> list[str]:
    with _reading(path), open(path, encoding="utf-8-sig") as file:
        text = file.read()
    if path.lower().endswith(".json"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise RunError(f"labels '{path}': {error}", "write a list of texts") from error
        if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
            raise RunError(f"labels '{path}' are no list of texts", 'write ["cat", "dog"]')
    else:
        found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise RunError(f"labels '{path}' are empty", "give one a line")
    return found


def _stored(path: str, model: Model) -> Tensors:
    """The arrays of a .npz or .npy that are the model's inputs: by name, or the only one there is."""
    with _reading(path):
        stored = np.load(path, allow_pickle=False)
        arrays = {"x": stored} if isinstance(stored, np.ndarray) else {n: stored[n] for n in stored.files}
    named = {s["name"]: arrays[s["name"]] for s in model.inputs if s["name"] in arrays}
    rest = [n for n in arrays if n not in LABEL_KEYS and arrays[n].dtype.kind in "biuf"]
    if len(model.inputs) == 1 and not named:
        chosen = "x" if "x" in rest else rest[0] if len(rest) == 1 else None
        if chosen is not None:
            named = {model.inputs[0]["name"]: arrays[chosen]}
    for spec in model.inputs:
        if spec["name"] not in named:
            near = difflib.get_close_matches(spec["name"], list(arrays), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            what = f"'{path}' has no array '{spec['name']}' (it has: {', '.join(arrays) or 'none'}){hint}"
            raise RunError(what, f"store it as an array named '{spec['name']}'")
        if named[spec["name"]].dtype.kind not in "biuf":
            raise RunError(f"array '{spec['name']}' of '{path}' is {named[spec['name']].dtype}", "store numbers")
    return named


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        raise RunError(f"cannot read '{path}': {reason}", "check the file, or write it again") from error


def _only(model: Model, what: str) -> Mapping[str, Any]:
    """The model's only input."""
    if len(model.inputs) != 1:
        names = ", ".join(s["name"] for s in model.inputs)
        raise RunError(f"{what} is one input, the model takes {len(model.inputs)}", f"give a .npz with {names}")
    return model.inputs[0]


def vocabulary(model: Model) -> int | None:
    """How many tokens there are, where the labels or an output of one value for each tell."""
    if model.labels:
        return len(model.labels)
    shape = model.outputs[0]["shape"]
    return shape[2] if len(shape) == 3 and isinstance(shape[2], int) else None


def _delimiter(line: str) -> str:
    found = max(",;\t", key=line.count)
    return found if found in line else " "


def _cells(line: str) -> list[str]:
    return [c.strip() for c in line.split(None if _delimiter(line) == " " else _delimiter(line))]


def _is_header(cells: Sequence[str], lines: int) -> bool:
    """A line without a number in it; or, before others, the numbers of the columns, as pandas writes."""
    if all(_number(c) is None for c in cells):
        return True
    return lines > 1 and cells == [str(i) for i in range(len(cells))]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
