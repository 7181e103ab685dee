"""What edgekit knows about a model - preprocessing, class names, ranges - as the metadata of its .tflite."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgekit.backends.tflite.metadata import ColorSpace, Description, Floats, TensorDescription
from edgekit.errors import DatasetError, LabelError

if TYPE_CHECKING:
    from edgekit.model import Signature, TensorSpec
    from edgekit.preprocessing import Preprocessing

LABELS_FILE = "labels.txt"


def describe(
    name: str,
    sig: Signature,
    preprocessing: Preprocessing,
    *,
    images: Collection[str] = (),
    labels: Sequence[str] = (),
    ranges: Mapping[str, tuple[float, float]] | None = None,
    text: str = "",
    version: str = "",
) -> Description:
    """What a model's metadata should say.

    sig: of the float model, sizes as in the file: a quantized model has the normalization of its float model.
    images: inputs whose raw samples are pixels of 0 to 255, grayscale or RGB.
    labels: class names; they belong to the first output whose last axis is as long.
    ranges: lowest and highest real value of tensors, where known (after preprocessing).
    Raises DatasetError if float32 cannot hold the normalization.
    """
    known = ranges or {}
    labelled = next((s.name for s in sig.outputs if labels and s.shape and s.shape[-1] == len(labels)), None)
    return Description(
        name,
        text,
        version,
        tuple(_input(s, sig, preprocessing, s.name in images, known.get(s.name)) for s in sig.inputs),
        tuple(_output(s, LABELS_FILE if s.name == labelled else None, known.get(s.name)) for s in sig.outputs),
    )


def _output(spec: TensorSpec, labels_file: str | None, span: tuple[float, float] | None) -> TensorDescription:
    low, high = ((span[0],), (span[1],)) if span is not None else ((), ())
    return TensorDescription(spec.name, labels_file=labels_file, minimum=low, maximum=high)


def _input(
    spec: TensorSpec, sig: Signature, how: Preprocessing, pixels: bool, span: tuple[float, float] | None
) -> TensorDescription:
    meant = pixels or len(sig.inputs) == 1 or _spatial(spec)
    floats = np.issubdtype(np.dtype(spec.dtype), np.floating)
    mean, std = normalization(how) if floats and meant and (pixels or how.numeric) else ((), ())
    low, high = ((span[0],), (span[1],)) if span is not None else _pixel_range(mean, std) if pixels else ((), ())
    told = how.describe()
    return TensorDescription(
        spec.name,
        f"Made from raw samples by: {told}." if meant and told != "none" else "",
        _color_space(spec, how) if pixels else None,
        mean,
        std,
        None,
        low,
        high,
    )


def _spatial(spec: TensorSpec) -> bool:
    """Whether one of several inputs is preprocessed; the rule of `binding.deliver`."""
    sample = spec.shape[1:]
    return len(sample) == 2 or (len(sample) == 3 and (sample[-1] in (1, 3, 4) or sample[0] in (1, 3, 4)))


def _color_space(spec: TensorSpec, how: Preprocessing) -> ColorSpace:
    """By the channel axis; UNKNOWN for BGR, which the schema cannot say, and for more channels."""
    sample = spec.shape[1:]
    channels = 1 if len(sample) == 2 else next((c for c in (*sample[-1:], *sample[:1]) if c in (1, 3)), 0)
    if channels == 1:
        return "GRAYSCALE"
    return "RGB" if channels == 3 and how.channel_order != "BGR" else "UNKNOWN"


def normalization(how: Preprocessing) -> tuple[Floats, Floats]:
    """(mean, std) of (x - mean) / std, as long as each other, from (x * scale - mean) / std.

    TFLite's readers demand equal lengths, and no std of 0. Raises DatasetError if float32 cannot hold them.
    """
    scale = 1.0 if how.scale is None else how.scale
    mean, std = how.mean or (0.0,), how.std or (1.0,)
    count = max(len(mean), len(std))
    means = tuple(m / scale for m in _repeat(mean, count))
    stds = tuple(s / scale for s in _repeat(std, count))
    with np.errstate(over="ignore", under="ignore"):
        fits = np.isfinite(np.array([*means, *stds], np.float32)).all() and np.array(stds, np.float32).all()
    if not fits:
        raise DatasetError(
            f"preprocessing '{how.describe()}' as (x - mean) / std exceeds float32",
            "choose scale, mean, std nearer to 1",
        )
    return means, stds


def _repeat(values: Floats, count: int) -> Floats:
    return values * count if len(values) == 1 else values


def _pixel_range(mean: Floats, std: Floats) -> tuple[Floats, Floats]:
    """Lowest and highest value per channel of what pixels 0 to 255 become."""
    ends = [sorted(((0.0 - m) / s, (255.0 - m) / s)) for m, s in zip(mean or (0.0,), std or (1.0,), strict=True)]
    return tuple(low for low, _ in ends), tuple(high for _, high in ends)


def label_files(description: Description, labels: Sequence[str]) -> dict[str, bytes]:
    """The file of class names that `description` refers to, one a line, UTF-8; empty if it refers to none.

    Raises LabelError for a name that readers would skip or take for several lines: all later ones would shift.
    """
    if all(t.labels_file is None for t in description.outputs):
        return {}
    for place, label in enumerate(labels):
        if not label.strip() or label.splitlines() != [label] or any("\ud800" <= c <= "\udfff" for c in label):
            raise LabelError(
                f"class {place} is named {label!r}, which a labels file cannot hold",
                "pass --labels FILE with one class name a line",
            )
    return {LABELS_FILE: "".join(f"{label}\n" for label in labels).encode()}
