"""Fits raw samples to a model's inputs: by name, shape and type, and labels to its output."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekit.errors import DatasetError, LabelError, NonFiniteError, ShapeError
from edgekit.preprocessing import Preprocessing

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
    spec = bound.spec
    floats = np.issubdtype(_dtype(spec), np.floating)
    first = raw[0]
    spatial = first.ndim == 2 or (first.ndim == 3 and (first.shape[-1] in (1, 3, 4) or first.shape[0] in (1, 3, 4)))
    if bound.alone and not floats and how.numeric:
        raise ShapeError(
            f"model input '{spec.name}' takes {spec.dtype}, so scale, mean and std cannot be applied",
            "drop --scale, --mean and --std",
        )
    if floats and (bound.alone or spatial):
        x = how.apply(raw) if how.numeric else how.places(raw)
    elif how.geometric and (bound.alone or spatial):
        x = how.places(raw)
    else:
        x = Preprocessing().places(raw)
    return _cast(_reshape(x, spec, how), spec)


def _reshape(x: Array, spec: TensorSpec, how: Preprocessing) -> Array:
    have, want = x.shape[1:], spec.shape[1:]
    if len(have) == len(want) and all(not isinstance(w, int) or w == h for h, w in zip(have, want, strict=True)):
        return x
    known = [w for w in want if isinstance(w, int)]
    if len(known) == len(want) and int(np.prod(known)) == int(np.prod(have)):
        squeezed = [h for h in have if h != 1] == [w for w in known if w != 1]
        if len(want) == 1 or len(have) == 1 or squeezed:
            return x.reshape(len(x), *known)
    raise ShapeError(
        f"samples have shape {_show(have)}, model input '{spec.name}' takes {_show(want)}", _hint(have, want, how)
    )


def _hint(have: tuple[int, ...], want: tuple[int | str, ...], how: Preprocessing) -> str:
    """What a user can do about two shapes that do not fit."""
    if len(have) == 3 and len(want) == 3:
        if want[0] == have[2] and want[0] in (1, 3, 4):
            sizes = "" if want[1:] == have[:2] else f" --resize {want[1]}x{want[2]}"
            return f"pass --layout NCHW{sizes}"
        if want[2] == have[0] and want[2] in (1, 3, 4):
            sizes = "" if want[:2] == have[1:] else f" --resize {want[0]}x{want[1]}"
            return f"pass --layout NHWC{sizes}"
        if want[2] == have[2] and want[2] in (1, 3, 4):
            return f"pass --resize {want[0]}x{want[1]}"
        if want[0] == have[0] and want[0] in (1, 3, 4):
            return f"pass --resize {want[1]}x{want[2]}"
    if len(have) == 1 and len(want) == 1 and isinstance(want[0], int) and have[0] == want[0] + 1:
        return "if one column is the label, name it with --label-column"
    if len(have) in (2, 3) and len(want) == 1 and how.resize is None:
        return f"pass --resize so that {' x '.join(map(str, have))} becomes {want[0]} values"
    return "give data of the model's shape"


def _show(shape: Sequence[int | str]) -> str:
    return "(n" + "".join(f", {s}" for s in shape) + ")"


def _dtype(spec: TensorSpec) -> np.dtype[Any]:
    try:
        return np.dtype(spec.dtype)
    except TypeError as error:
        raise ShapeError(
            f"model input '{spec.name}' takes {spec.dtype}, which no data file holds", "give it float32 inputs"
        ) from error


def _cast(x: Array, spec: TensorSpec) -> Array:
    dtype = _dtype(spec)
    if x.dtype == dtype:
        return x
    if np.issubdtype(dtype, np.floating):
        with np.errstate(over="ignore"):
            out = x.astype(dtype)
        if dtype.itemsize < x.dtype.itemsize and not np.isfinite(out).all():
            raise NonFiniteError(f"a value of the data is too large for {dtype}", "scale the data with --scale")
        return out
    low, high = (0, 1) if dtype == np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    whole = x.dtype.kind in "biu" or bool((x == np.rint(x)).all())
    if not whole or x.min() < low or x.max() > high:
        raise ShapeError(
            f"model input '{spec.name}' takes {dtype}, the data are {x.dtype} from {x.min():g} to {x.max():g}",
            "give whole numbers in its range",
        )
    return x.astype(dtype)


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
