"""Fits raw samples to a model's inputs: by name, shape and type, and labels to its output."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekit import transform
from edgekit.errors import DatasetError, LabelError, NonFiniteError
from edgekit.preprocessing import Preprocessing, transforming

if TYPE_CHECKING:
    from edgekit.model import Signature, TensorSpec

Array = np.ndarray[Any, Any]
LabelRule = Literal["as stored", "one-hot", "whole"]
"""one-hot: rows become class numbers.   whole: floats that are class numbers become integers."""


@dataclass(frozen=True)
class InputBinding:
    """Which raw input feeds which input of the model. alone: the model has no other."""

    spec: TensorSpec
    key: str
    alone: bool


def match_inputs(name: str, named: Sequence[str], usual: Sequence[str], sig: Signature) -> tuple[InputBinding, ...]:
    """One binding per model input: by name, or the one usual input of the data to the one input of the model."""
    alone = len(sig.inputs) == 1
    out = []
    for spec in sig.inputs:
        if spec.name in named:
            key = spec.name
        elif alone and len(usual) == 1:
            key = usual[0]
        else:
            near = difflib.get_close_matches(spec.name, named, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise DatasetError(
                f"data '{name}' have no input '{spec.name}' (they have: {', '.join(named)}){hint}",
                f"store it as an array named '{spec.name}'" + (", or choose one as 'FILE.npz#NAME'" if alone else ""),
            )
        out.append(InputBinding(spec, key, alone))
    return tuple(out)


def deliver(bound: InputBinding, raw: Array | list[Array], how: Preprocessing) -> Array:
    """Raw samples as the model takes them: preprocessed, shape (n, ...) of the model, its dtype.

    Raises ShapeError when they cannot be (both shapes and a hint in it), NonFiniteError for a value out of its range.
    """
    with transforming():
        return transform.deliver(raw, bound.spec.to_json(), how.to_json(), bound.alone)


def output_classes(sig: Signature) -> int | None:
    """Size of the first output's last axis, where it has one besides the batch and it is known."""
    shape = sig.outputs[0].shape if sig.outputs else ()
    return shape[-1] if len(shape) > 1 and isinstance(shape[-1], int) else None


def label_rule(labels: Array, sig: Signature) -> LabelRule:
    """How labels like these first few are meant for this model."""
    labels, classes = squeeze(labels), output_classes(sig)
    if classes is None or classes == 1 or labels.dtype.kind not in "biuf":
        return "as stored"
    if labels.ndim > 1 and labels.shape[-1] == classes and _one_hot(labels).all():
        return "one-hot"
    if labels.ndim == 1 and labels.dtype.kind == "f" and (labels == np.rint(labels)).all():
        return "whole"
    return "as stored"


def class_labels(labels: Array, rule: LabelRule, index: Array) -> Array:
    """Labels as int64 class numbers, or float32 where they are no classes; a trailing axis of 1 is dropped."""
    labels = squeeze(labels)
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        bad = int(np.flatnonzero(~np.isfinite(labels).reshape(len(labels), -1).all(axis=1))[0])
        raise NonFiniteError(f"the label of sample {int(index[bad])} is NaN or Inf", "remove the sample")
    if rule == "one-hot":
        good = _one_hot(labels).reshape(len(labels), -1).all(axis=1)
        if not good.all():
            raise LabelError(
                f"the label of sample {int(index[int(np.argmin(good))])} is not one-hot, as those before it are",
                "give one class per sample",
            )
        return np.asarray(np.argmax(labels, axis=-1), np.int64)
    if labels.dtype.kind in "biu":
        return labels.astype(np.int64)
    if rule == "whole":
        good = labels == np.rint(labels)
        if not good.all():
            bad = int(np.argmin(good))
            raise LabelError(
                f"label {labels[bad]:g} of sample {int(index[bad])} is no class number, as those before it are",
                "give whole numbers",
            )
        return labels.astype(np.int64)
    return labels.astype(np.float32)


def squeeze(labels: Array) -> Array:
    """(n, 1) as (n,), as Keras stores the labels of its own data sets; class numbers of a map without a last axis of 1.

    Real numbers on more axes are what an output of the same shape is compared with.
    """
    while labels.ndim > 1 and labels.shape[-1] == 1 and (labels.ndim == 2 or labels.dtype.kind != "f"):
        labels = labels[..., 0]
    return labels


def _one_hot(labels: Array) -> Array:
    valid: Array = ((labels == 0) | (labels == 1)).all(axis=-1) & (labels.sum(axis=-1, dtype=np.float64) == 1)
    return valid
