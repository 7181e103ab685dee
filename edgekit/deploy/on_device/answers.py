"""What a model's outputs say: the likeliest classes, the next token, numbers, or the extent of a larger array.

Standard library and numpy, Python 3.9: this file travels to devices with `run.py`. An ANSWER, one for each sample and
output, has a "kind":
"classes", "next token": "unit", "top": [{"index", "label", "score", and "softmax" where the scores of named classes
are no probabilities}]; "position" of the last token. "number": "value". "values": "values". "array": "shape", "dtype",
"min", "max", "mean". A number that is not finite is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_VALUES = 16  # outputs of up to so many values are listed in order where nothing tells that they are classes
_STEP = 1 / 256  # of a softmax in 8 bits: each class may be half of it off
_SOFTMAX_OFF = 1e-3  # of float16
_MOST_OFF = 0.1  # of many classes in 8 bits; sums further from 1 are no probabilities

Array = np.ndarray[Any, Any]


def describe(
    value: Array, labels: Sequence[str], top: int, *, tokens: bool = False, last: int | None = None
) -> dict[str, Any]:
    """The ANSWER of one sample's output, `value`, which has no batch.

    labels: names of classes or tokens; they belong to an output whose last axis is as long.
    tokens: it is of a model that takes tokens; last: the place to read the next one at, else the last.
    """
    value = np.asarray(value)
    named = labels if value.ndim and value.shape[-1] == len(labels) else ()
    if tokens and value.ndim == 2 and value.shape[1] > 1:
        at = len(value) - 1 if last is None else min(last, len(value) - 1)
        return {"kind": "next token", "position": at, **_ranked(value[at], named, top)}
    if value.size == 1:
        number = float(value.reshape(()))
        if len(labels) == 2 and 0 <= number <= 1:
            return {"kind": "classes", **_ranked(np.array([1 - number, number]), labels, top)}
        return {"kind": "number", "value": _plain(number)}
    flat = value.reshape(-1).astype(np.float64)
    if max(value.shape) == value.size:
        names = labels if len(labels) == value.size else ()
        if names or value.size > _VALUES or _unit(flat) == "probability":
            return {"kind": "classes", **_ranked(flat, names, top)}
        return {"kind": "values", "values": [_plain(float(v)) for v in flat]}
    extent = {"min": flat.min(), "max": flat.max(), "mean": flat.mean()}
    told = {key: _plain(float(v)) for key, v in extent.items()}
    return {"kind": "array", "shape": list(value.shape), "dtype": str(value.dtype), **told}


def _ranked(scores: Array, labels: Sequence[str], top: int) -> dict[str, Any]:
    """The `top` highest scores. Equal ones in the order of their classes."""
    scores = scores.astype(np.float64)
    unit = _unit(scores)
    rows: list[dict[str, Any]] = []
    soft = None
    if labels and np.isfinite(scores).all() and not _within_one(scores):
        soft = np.exp(scores - scores.max())
        soft /= soft.sum()
    for index in np.argsort(-scores, kind="stable")[:top].tolist():
        row = {"index": index, "label": labels[index] if labels else None, "score": _plain(float(scores[index]))}
        rows.append(row if soft is None else {**row, "softmax": float(soft[index])})
    return {"unit": unit, "top": rows}


def _unit(scores: Array) -> str:
    """ "probability" where the scores are between 0 and 1 and sum to 1, as far as 8 bits can tell; else "score"."""
    off = max(_SOFTMAX_OFF, min(_MOST_OFF, len(scores) * _STEP / 2))
    return "probability" if _within_one(scores) and abs(float(np.sum(scores)) - 1) <= off else "score"


def _within_one(scores: Array) -> bool:
    return bool(((scores >= 0) & (scores <= 1)).all())


def _plain(number: float) -> float | None:
    return number if np.isfinite(number) else None


# --- printing --------------------------------------------------------------------------------------
def lines(document: Mapping[str, Any]) -> list[str]:
    """A document for a person: a line for each sample and output, and under it the classes that follow."""
    out = []
    answers = document["answers"]
    for at, outputs in enumerate(answers):
        where = document["input"] + (f" [{at}]" if len(answers) > 1 else "")
        for name, told in outputs.items():
            out.append(f"{where}{f', {name}' if len(outputs) > 1 else ''}: {_headline(told)}")
            if len(answers) == 1 and "top" in told:
                width = max(len(_called(row)) for row in told["top"])
                out += [f"  {_called(row).ljust(width)}  {_score(row, told['unit'])}" for row in told["top"][1:]]
    return out


def line(document: Mapping[str, Any]) -> str:
    """A document in one line, for a stream."""
    if "error" in document:
        return f"error: {document['error']}" + (f" — {document['remedy']}" if document["remedy"] else "")
    told = []
    for outputs in document["answers"]:
        for name, one in outputs.items():
            ranked = ", ".join(f"{_called(row)} {_score(row, one['unit'])}" for row in one.get("top", ()))
            told.append((f"{name}: " if len(outputs) > 1 else "") + (ranked or _headline(one)))
    return "; ".join(told)


def _headline(told: Mapping[str, Any]) -> str:
    kind = told["kind"]
    if kind == "classes":
        return f"{_called(told['top'][0])}  {_score(told['top'][0], told['unit'])}"
    if kind == "next token":
        return f"next {_called(told['top'][0])}  {_score(told['top'][0], told['unit'])}"
    if kind == "number":
        return _short(told["value"])
    if kind == "values":
        return " ".join(_short(v) for v in told["values"])
    sizes = " x ".join(str(s) for s in told["shape"])
    ends = f"from {_short(told['min'])} to {_short(told['max'])}, mean {_short(told['mean'])}"
    return f"{told['dtype']} {sizes}, {ends}"


def _called(row: Mapping[str, Any]) -> str:
    label = row["label"]
    if label is None or label == str(row["index"]):
        return f"class {row['index']}"
    return label if label.strip() == label and label.isprintable() and label else repr(label)


def _score(row: Mapping[str, Any], unit: str) -> str:
    if unit == "probability" and row["score"] is not None:
        return f"{row['score']:.3f}"
    soft = f" (softmax {row['softmax']:.3f})" if "softmax" in row else ""
    return f"score {_short(row['score'])}{soft}"


def _short(number: float | None) -> str:
    return "not a number" if number is None else f"{number:.6g}"
