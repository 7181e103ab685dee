"""Quality figures in numpy, accumulated batch by batch; each agrees with scikit-learn's (docs/adr/0003).

Scores: float (n, classes); higher is likelier; the first of equal scores wins. What is kept grows by a few bytes a
sample (labels and predictions), and by the scores only where a rank is needed (AUC), up to `SCORES_KEPT` values.
A figure that cannot be given is None and its reason is in the second result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.errors import LabelError

Array = np.ndarray[Any, Any]
Figures = dict[str, Any]

SCORES_KEPT = 20_000_000  # float32 values, 80 MB: 2 million samples of 10 classes
CONFUSION_CLASSES = 100  # a larger matrix is no longer read; the pairs are in the predictions
TOP_K = 5
_LOG_FLOOR = 1e-7  # the smallest probability that a logarithm is taken of; keras.config.epsilon()
_PROBABILITY_SUM = 0.05  # an int8 softmax of many classes sums to 1 only within this


def predictions(scores: Array) -> Array:
    """Class of each row, int64 (n,); NaN never wins unless all are NaN."""
    chosen: Array = np.where(np.isnan(scores), -np.inf, scores).argmax(axis=-1).astype(np.int64)
    return chosen


def are_probabilities(scores: Array, tolerance: float = _PROBABILITY_SUM) -> bool:
    """Whether each row of (…, classes) reads as a distribution: not negative, with a sum of 1 within `tolerance`."""
    if scores.size == 0 or not np.isfinite(scores).all() or scores.min() < 0:
        return False
    return bool(np.abs(scores.sum(axis=-1) - 1).max() <= tolerance)


def log_softmax(logits: Array) -> Array:
    """Along the last axis, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def auc(scores: Array, positive: Array) -> float | None:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counted half. scores (n,); positive bool (n,)."""
    pos = int(positive.sum())
    neg = len(positive) - pos
    if pos == 0 or neg == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((rank[positive].sum() - pos * (pos + 1) / 2) / (pos * neg))


def auc_one_vs_rest(scores: Array, labels: Array) -> tuple[float | None, str | None]:
    """Macro average over classes that have both kinds of samples. scores (n, classes). (value, reason if partial)."""
    values = [auc(scores[:, c], labels == c) for c in range(scores.shape[1])]
    known = [v for v in values if v is not None]
    if not known:
        return None, "auc needs samples of two classes"
    left_out = len(values) - len(known)
    return float(np.mean(known)), f"auc leaves out {left_out} classes without samples" if left_out else None


def class_figures(labels: Array, predicted: Array, classes: int) -> Figures:
    """Accuracy, precision, recall, F1 (macro over classes seen in labels or predictions, and per class), confusion.

    labels, predicted: int (n,) in [0, classes). A ratio with nothing below the line is 0, as scikit-learn's
    zero_division=0. confusion_matrix[i][j]: samples of class i predicted as j; None over CONFUSION_CLASSES.
    """
    right = np.bincount(labels[labels == predicted], minlength=classes)
    support = np.bincount(labels, minlength=classes)
    claimed = np.bincount(predicted, minlength=classes)
    precision = _divide(right, claimed)
    recall = _divide(right, support)
    f1 = _divide(2 * right, support + claimed)
    seen = np.flatnonzero(support + claimed)
    matrix = None
    if classes <= CONFUSION_CLASSES:
        matrix = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes).tolist()
    rows = [
        {"class": int(c), "support": int(support[c]), "precision": float(precision[c])}
        | {"recall": float(recall[c]), "f1": float(f1[c])}
        for c in seen
    ]
    return {
        "accuracy": float(right.sum() / max(1, len(labels))),
        "precision_macro": float(precision[seen].mean()),
        "recall_macro": float(recall[seen].mean()),
        "f1_macro": float(f1[seen].mean()),
        "per_class": rows,
        "confusion_matrix": matrix,
    }


def _divide(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros(len(above)), where=below != 0)


def check_labels(labels: Array, classes: int, index: Array) -> None:
    """labels: ints (n, …); index: positions of the n samples. Raises LabelError for one outside [0, classes)."""
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        where = np.argwhere(wrong)[0]
        raise LabelError(
            f"label {int(labels[tuple(where)])} of sample {int(index[where[0]])} is outside the model's "
            f"{classes} classes (0 to {classes - 1})",
            "check that the labels belong to this model and start at 0",
        )


@dataclass
class Classification:
    """Classes from scores (n, classes), or from class numbers (n,) when a model decides itself (`classes` = 0)."""

    classes: int
    _labels: list[Array] = field(default_factory=list)
    _predicted: list[Array] = field(default_factory=list)
    _scores: list[Array] = field(default_factory=list)
    _kept: int = 0
    _top: int = 0

    def update(self, outputs: Array, labels: Array) -> Array:
        """outputs: float (n, classes) or int (n,); labels: int64 (n,), checked. Returns the predictions, int64 (n,)."""
        if self.classes == 0:
            predicted = outputs.astype(np.int64)
        else:
            predicted = predictions(outputs)
            own = np.take_along_axis(outputs, labels[:, None], axis=1)
            before = np.arange(self.classes)[None, :] < labels[:, None]
            self._top += int((((outputs > own) | ((outputs == own) & before)).sum(axis=1) < TOP_K).sum())
            self._kept += outputs.size
            if self._kept <= SCORES_KEPT:
                self._scores.append(outputs.astype(np.float32))
            else:
                self._scores.clear()
        self._labels.append(labels.astype(np.int32))
        self._predicted.append(predicted.astype(np.int32))
        return predicted

    def result(self) -> tuple[Figures, list[str]]:
        labels = np.concatenate(self._labels).astype(np.int64)
        predicted = np.concatenate(self._predicted).astype(np.int64)
        classes = self.classes or int(max(labels.max(), predicted.max())) + 1
        figures, reasons = class_figures(labels, predicted, classes), []
        figures["top5"] = self._top / len(labels) if self.classes > TOP_K else None
        if figures["top5"] is None:
            reasons.append(f"top5 needs more than {TOP_K} classes")
        if figures["confusion_matrix"] is None:
            reasons.append(f"confusion_matrix is given up to {CONFUSION_CLASSES} classes")
        figures["auc"], reason = self._auc(labels)
        return figures, reasons + ([reason] if reason else [])

    def _auc(self, labels: Array) -> tuple[float | None, str | None]:
        if self.classes == 0:
            return None, "auc needs scores, and the model gives class numbers"
        if not self._scores:
            return None, f"auc keeps at most {SCORES_KEPT} scores"
        scores = np.concatenate(self._scores)
        if not np.isfinite(scores).all():
            return None, "auc needs finite scores"
        if not are_probabilities(scores):
            scores = np.exp(log_softmax(scores))
        if self.classes == 2:
            value = auc(scores[:, 1], labels == 1)
            return value, None if value is not None else "auc needs samples of two classes"
        return auc_one_vs_rest(scores, labels)


@dataclass
class Binary:
    """One score per sample: a probability decided at 0.5 or a logit decided at 0, whichever the float scores are."""

    _labels: list[Array] = field(default_factory=list)
    _scores: list[Array] = field(default_factory=list)
    _float: list[Array] = field(default_factory=list)

    def update(self, scores: Array, labels: Array, reference: Array | None) -> None:
        """scores, reference: float (n,); labels: int (n,) of 0 and 1; reference: the float model's scores."""
        self._scores.append(scores.astype(np.float32))
        self._labels.append(labels.astype(np.int32))
        self._float.append(self._scores[-1] if reference is None else reference.astype(np.float32))

    def decided(self) -> tuple[Array, Array, Array]:
        """(labels, own decisions, the float model's decisions), int64 (n,) each."""
        reference, scores = np.concatenate(self._float), np.concatenate(self._scores)
        probabilities = bool(reference.min() >= 0 and reference.max() <= 1)
        limit = 0.5 if probabilities else 0.0
        labels = np.concatenate(self._labels).astype(np.int64)
        return labels, (scores > limit).astype(np.int64), (reference > limit).astype(np.int64)

    def result(self) -> tuple[Figures, list[str]]:
        labels, own, _ = self.decided()
        figures = class_figures(labels, own, 2)
        scores = np.concatenate(self._scores)
        figures["auc"] = auc(scores, labels == 1) if np.isfinite(scores).all() else None
        figures["top5"] = None
        reasons = [f"top5 needs more than {TOP_K} classes"]
        if figures["auc"] is None:
            reasons.append("auc needs finite scores of two classes")
        return figures, reasons


@dataclass
class Regression:
    """MAE, RMSE and R² over outputs (n, k), each averaged over the k columns as scikit-learn does by default."""

    _count: int = 0
    _absolute: Array = field(default_factory=lambda: np.zeros(0))
    _squared: Array = field(default_factory=lambda: np.zeros(0))
    _mean: Array = field(default_factory=lambda: np.zeros(0))
    _spread: Array = field(default_factory=lambda: np.zeros(0))

    def update(self, outputs: Array, labels: Array) -> None:
        """outputs, labels: (n, k)."""
        truth, error = labels.astype(np.float64), outputs.astype(np.float64) - labels
        if self._count == 0:
            self._absolute, self._squared, self._mean, self._spread = (np.zeros(truth.shape[1]) for _ in range(4))
        self._absolute = self._absolute + np.abs(error).sum(axis=0)
        self._squared = self._squared + (error**2).sum(axis=0)
        # Chan et al. 1979: a sum of squares minus a squared sum would cancel for labels far from zero
        mean, total = truth.mean(axis=0), self._count + len(truth)
        delta = mean - self._mean
        self._spread = self._spread + ((truth - mean) ** 2).sum(axis=0)
        self._spread = self._spread + delta**2 * self._count * len(truth) / total
        self._mean = self._mean + delta * len(truth) / total
        self._count = total

    def result(self) -> tuple[Figures, list[str]]:
        figures: Figures = {
            "mae": float((self._absolute / self._count).mean()),
            "rmse": float(np.sqrt(self._squared / self._count).mean()),
            "r2": None,
        }
        if self._count < 2:
            return figures, ["r2 needs two samples"]
        constant = self._spread == 0
        r2 = 1 - np.divide(self._squared, self._spread, out=np.zeros(len(constant)), where=~constant)
        r2 = np.where(constant, np.where(self._squared == 0, 1.0, 0.0), r2)
        figures["r2"] = float(r2.mean())
        return figures, []


@dataclass
class TokenPrediction:
    """Perplexity of the label at every position. outputs: (n, positions, vocabulary) logits or probabilities."""

    _nats: float = 0.0
    _tokens: int = 0
    _right: int = 0
    _probabilities: bool | None = None

    def update(self, outputs: Array, labels: Array) -> Array:
        """labels: int (n, positions), checked. Returns the predictions, int64 (n, positions)."""
        if self._probabilities is None:
            self._probabilities = are_probabilities(outputs)
        if self._probabilities:
            logs = np.log(np.maximum(outputs.astype(np.float64), _LOG_FLOOR))
        else:
            logs = log_softmax(outputs)
        predicted = predictions(outputs)
        self._nats -= float(np.take_along_axis(logs, labels[..., None], axis=-1).sum())
        self._tokens += labels.size
        self._right += int((predicted == labels).sum())
        return predicted

    def result(self) -> tuple[Figures, list[str]]:
        nats = self._nats / max(1, self._tokens)
        if not np.isfinite(nats):
            return {"accuracy": None, "perplexity": None, "bits_per_token": None}, ["perplexity needs finite outputs"]
        return {
            "accuracy": self._right / max(1, self._tokens),
            "perplexity": float(np.exp(nats)),
            "bits_per_token": float(nats / np.log(2)),
        }, []
