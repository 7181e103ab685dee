"""Judges the outputs of one candidate, batch by batch, against the labels and against the float model's outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from edgekit.bench.metrics import (
    Array,
    Binary,
    Classification,
    Figures,
    Regression,
    TokenPrediction,
    are_probabilities,
    check_labels,
    predictions,
)
from edgekit.errors import LabelError
from edgekit.model import Tensors

FLIPS_LISTED = 100
_FLOAT_SUM = 1e-3  # a float32 or float16 softmax sums to 1 within this
Task = Literal["classes", "class numbers", "binary", "regression", "tokens", "unknown scores", "unknown"]


def task_of(output: Array, labels: Array | None) -> Task:
    """What the first output of the float model means, from its values and the labels'; both canonical.

    Without labels, rows of several floats are scores of classes only if they are distributions; else they may be logits
    or any other values: "unknown scores". One float per sample, and images, stay "unknown".
    """
    numbers = output.dtype.kind in "iu"
    if labels is None:
        if numbers:
            return "class numbers"
        if output.ndim not in (2, 3):
            return "unknown"
        if not are_probabilities(output, _FLOAT_SUM):
            return "unknown scores"
        return "classes" if output.ndim == 2 else "tokens"
    whole = labels.dtype.kind in "iub"
    if whole and labels.ndim == 1 and output.ndim == 2:
        return "classes"
    if whole and labels.ndim == 1 and output.ndim == 1:
        if numbers:
            return "class numbers"
        return "binary" if np.isin(labels, (0, 1)).all() else "regression"
    if whole and output.ndim == 3 and labels.shape == output.shape[:2]:
        return "tokens"
    if labels.shape == output.shape:
        return "regression"
    raise LabelError(
        f"labels of shape {list(labels.shape)} ({labels.dtype.name}) do not fit the model's output of shape "
        f"{list(output.shape)}",
        "give one class number or one target value per output of each sample",
    )


def canonical_output(output: Array) -> Array:
    """float (n, 1, 1, C) and the like become (n, C), one value per sample (n,); other shapes are kept."""
    wide = [size for size in output.shape[1:] if size != 1]
    if len(wide) <= 1:
        output = output.reshape((len(output), *wide))
    return output.astype(np.float32) if output.dtype == np.float16 else output


def canonical_labels(labels: Array, output: Array) -> Array:
    """Class numbers as int64 (n,): from (n, 1), from whole floats, and from one-hot rows; targets stay as they are."""
    wide = [size for size in labels.shape[1:] if size != 1]
    if len(wide) <= 1:
        labels = labels.reshape((len(labels), *wide))
    if output.ndim == 2 and labels.shape == output.shape and _one_hot(labels):
        return np.asarray(labels.argmax(axis=1).astype(np.int64))
    if labels.dtype.kind == "f" and labels.ndim == 1 and output.ndim == 2 and (labels == np.rint(labels)).all():
        return labels.astype(np.int64)
    return labels.astype(np.int64) if labels.dtype.kind in "iub" else labels


def _one_hot(labels: Array) -> bool:
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all())


@dataclass
class Distance:
    """How far outputs are from the float model's: SQNR and the largest error, over every float output."""

    _signal: dict[str, float] = field(default_factory=dict)
    _noise: dict[str, float] = field(default_factory=dict)
    _largest: float = 0.0

    def update(self, outputs: Tensors, reference: Tensors) -> None:
        for name, expected in reference.items():
            if name not in outputs or expected.dtype.kind != "f":
                continue
            truth = expected.astype(np.float64)
            with np.errstate(invalid="ignore"):  # Inf − Inf; left out below
                error = outputs[name].astype(np.float64) - expected
            known = np.isfinite(truth) & np.isfinite(error)
            truth, error = truth[known], error[known]
            self._signal[name] = self._signal.get(name, 0.0) + float((truth**2).sum())
            self._noise[name] = self._noise.get(name, 0.0) + float((error**2).sum())
            self._largest = max(self._largest, float(np.abs(error).max(initial=0.0)))

    def result(self) -> tuple[Figures, list[str]]:
        """sqnr_db: of the worst output, 10·log10(Σ float² / Σ difference²)."""
        figures: Figures = {"sqnr_db": None, "max_abs_err": self._largest if self._signal else None}
        if not self._signal:
            return figures, ["sqnr_db needs a float output"]
        if all(n == 0 for n in self._noise.values()):
            return figures, ["sqnr_db is infinite: the outputs equal the float model's"]
        values = [_decibel(self._signal[n], self._noise[n]) for n in self._signal if self._noise[n] > 0]
        known = [v for v in values if v is not None]
        if len(known) < len(values):
            return figures, ["sqnr_db: the float model's output is zero everywhere"]
        figures["sqnr_db"] = min(known)
        return figures, []


def _decibel(signal: float, noise: float) -> float | None:
    return 10 * float(np.log10(signal / noise)) if signal > 0 else None


class Meter:
    """Accumulates the quality of one candidate. The float baseline is measured with itself as reference."""

    def __init__(self) -> None:
        self._task: Task | None = None
        self._classification = Classification(0)
        self._binary = Binary()
        self._regression = Regression()
        self._tokens = TokenPrediction()
        self._distance = Distance()
        self._samples = self._labelled = self._compared = self._positions = self._equal = 0
        self._broken = self._fixed = self._flipped = self._wrong_kind = 0
        self._referenced = False
        self._flips: list[int] = []

    def update(self, outputs: Tensors, reference: Tensors | None, labels: Array | None, index: Array) -> None:
        """outputs, reference: by name, batch first, the first output is judged; index: int64 (n,), dataset positions.

        Raises LabelError for labels that do not fit the model.
        """
        self._samples += len(index)
        self._count_non_finite(outputs, reference)
        main = canonical_output(next(iter(outputs.values())))
        expected = None if reference is None else canonical_output(next(iter(reference.values())))
        truth = None if labels is None else canonical_labels(labels, main)
        if self._task is None:
            self._task = task_of(main if expected is None else expected, truth)
            if self._task == "classes":
                self._classification = Classification(main.shape[1])
        if truth is not None:
            self._labelled += len(index)
            self._score(main, expected, truth, index)
        if reference is not None:
            self._referenced = True
            self._distance.update(outputs, reference)
        if expected is not None and self._task in ("classes", "class numbers", "tokens", "unknown scores"):
            self._compare(main, expected, truth, index)

    def result(self) -> tuple[Figures, list[str], list[str]]:
        """(figures, why some are None, why the candidate is invalid)."""
        figures: Figures = {"task": self._task, "samples": self._samples, "samples_labelled": self._labelled}
        reasons: list[str] = []
        if self._labelled:
            own, why = self._label_figures()
            figures, reasons = {**figures, **own}, [*reasons, *why]
        else:
            figures["accuracy"] = None
            reasons.append("accuracy needs labels")
        if self._compared == 0 and self._task == "binary" and self._labelled:
            self._compare_binary()
        figures["agreement_with_float"] = self._equal / self._positions if self._positions else None
        if not self._positions and self._referenced:
            reasons.append(f"agreement_with_float needs class scores, the task is {self._task}")
        figures |= {"flips": self._flipped if self._positions else None, "flip_index": self._flips}
        figures["positions"] = self._positions
        figures |= {"flips_to_wrong": self._broken, "flips_to_right": self._fixed} if self._labelled else {}
        distance, why = self._distance.result()
        if not self._referenced:
            why = ["agreement_with_float and sqnr_db need a float32 candidate that works"]
        broken = [f"NaN or Inf in the outputs of {self._wrong_kind} samples"] if self._wrong_kind else []
        return {**figures, **distance}, [*reasons, *why], broken

    def _label_figures(self) -> tuple[Figures, list[str]]:
        if self._task in ("classes", "class numbers"):
            return self._classification.result()
        if self._task == "binary":
            return self._binary.result()
        return self._tokens.result() if self._task == "tokens" else self._regression.result()

    def _score(self, main: Array, expected: Array | None, truth: Array, index: Array) -> None:
        if self._task == "classes":
            check_labels(truth, main.shape[1], index)
            self._classification.update(main, truth)
        elif self._task == "class numbers":
            check_labels(truth, np.iinfo(np.int32).max, index)
            self._classification.update(main, truth)
        elif self._task == "binary":
            check_labels(truth, 2, index)
            self._binary.update(main, truth, expected)
        elif self._task == "tokens":
            check_labels(truth, main.shape[2], index)
            self._tokens.update(main, truth)
        else:
            self._regression.update(main.reshape(len(main), -1), truth.reshape(len(truth), -1))

    def _compare(self, main: Array, expected: Array, truth: Array | None, index: Array) -> None:
        own, other = (main, expected) if self._task == "class numbers" else (predictions(main), predictions(expected))
        equal = own == other
        self._compared += len(index)
        self._positions += equal.size
        self._equal += int(equal.sum())
        self._note_flips(equal.reshape(len(index), -1).all(axis=1), index)
        if truth is not None:
            self._broken += int(((other == truth) & (own != truth)).sum())
            self._fixed += int(((own == truth) & (other != truth)).sum())

    def _compare_binary(self) -> None:
        labels, own, other = self._binary.decided()
        self._positions, self._equal = len(own), int((own == other).sum())
        self._note_flips(own == other, np.arange(len(own)))
        self._broken = int(((other == labels) & (own != labels)).sum())
        self._fixed = int(((own == labels) & (other != labels)).sum())

    def _note_flips(self, same: Array, index: Array) -> None:
        self._flipped += int((~same).sum())
        room = FLIPS_LISTED - len(self._flips)
        self._flips += [int(i) for i in index[~same][:room]]

    def _count_non_finite(self, outputs: Tensors, reference: Tensors | None) -> None:
        """Samples with a NaN, or an Inf that the float model's output does not have (a mask's −Inf is legitimate)."""
        wrong: Array = np.zeros(0, bool)
        for name, value in outputs.items():
            if value.dtype.kind != "f":
                continue
            bad = ~np.isfinite(value)
            if reference is not None and name in reference:
                bad &= ~(np.isinf(value) & (value == reference[name]))
            rows = bad.reshape(len(value), -1).any(axis=1)
            wrong = np.asarray(rows if not wrong.size else wrong | rows)
        self._wrong_kind += int(wrong.sum())
