"""Looks for a simple change of the preprocessing that raises accuracy strongly: the commonest mistake with a model.

Every scale is tried with every channel order (and order of flattening), because one mistake hides another. All are
screened on a few samples, the best judged on more. A change is named only when it is worth it and no accident: 10
points or more, and a McNemar test on the same samples; of two that are equally good the simpler is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.binding import output_classes
from edgekit.preprocessing import Layout, Preprocessing

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgekit.dataset import Dataset
    from edgekit.model import Tensors

Array = np.ndarray[Any, Any]

SAMPLES = 200
MIN_GAIN = 0.10  # of accuracy: below it a change is tuning, not a mistake
MAX_CHANCE = 0.01  # of calling noise a gain, over all changes tried together
_SAME = 0.02  # accuracies closer than this are one: the simpler change is named
_MIN_SAMPLES = 20
_SCREEN = 64
_FINALISTS = 4

# Mean and std of ImageNet's training images in [0, 1], RGB: torchvision's published constants.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Keras' "caffe" mode: mean of ImageNet in 0..255, BGR.
_CAFFE = (103.939, 116.779, 123.68)


@dataclass(frozen=True)
class ProbeResult:
    """A preprocessing that does far better than the one declared.

    baseline, accuracy: top-1 before and after, on `samples` samples.   p: of the McNemar test, one-sided.
    flags: what to pass on the command line.   tried: every preprocessing and its accuracy on the first few samples.
    """

    samples: int
    baseline: float
    accuracy: float
    p: float
    preprocessing: Preprocessing
    flags: tuple[str, ...]
    tried: tuple[tuple[str, float], ...]

    def message(self) -> str:
        """One line for a person."""
        return (
            f"preprocessing looks wrong: {' '.join(self.flags)} raises top-1 accuracy from {self.baseline:.1%} to "
            f"{self.accuracy:.1%} on {self.samples} labelled samples"
        )


def probe(
    run: Callable[[Tensors], Mapping[str, Array]],
    dataset: Dataset,
    classes: int,
    *,
    samples: int = SAMPLES,
    batch: int = 32,
    seed: int = 0,
) -> ProbeResult | None:
    """The preprocessing that does far better than the dataset's own, or None.

    run: the model in float, inputs and outputs by name, batch first.   dataset: bound to it.   classes: its outputs.
    batch: samples a run; a short last batch is filled up, so that a fixed batch works.
    None too without labels, with labels that are no single class, or with fewer than 20 samples.
    """
    if not dataset.labelled or dataset.samples < _MIN_SAMPLES:
        return None
    chosen = dataset.take(samples, seed)
    index, labels = next(chosen.labels(chosen.samples))
    if labels.ndim != 1 or labels.dtype.kind != "i":
        return None
    trial = _Trial(run, chosen, classes, batch)
    declared = dataset.preprocessing
    base = trial.right(declared)
    if base.mean() > 1 - MIN_GAIN:
        return None
    screen = _Trial(run, chosen.take(_SCREEN, seed), classes, batch)
    choices = [declared, *_choices(declared, chosen)]
    choices.sort(key=lambda how: len(flags(declared, how)))  # simplest first; the sort is stable
    ranked = sorted(choices, key=screen.accuracy, reverse=True)[:_FINALISTS]
    best = _simplest(choices, {how: trial.accuracy(how) for how in ranked})
    right = trial.right(best)
    p = mcnemar(base, right)
    if right.mean() - base.mean() < MIN_GAIN or p > MAX_CHANCE / len(choices):  # Bonferroni
        return None
    return ProbeResult(
        samples=len(index),
        baseline=float(base.mean()),
        accuracy=float(right.mean()),
        p=p,
        preprocessing=best,
        flags=flags(declared, best),
        tried=tuple((how.describe(), screen.accuracy(how)) for how in choices),
    )


def probe_model(model: ir.Model, dataset: Dataset) -> str | None:
    """`probe` of a float model run by ONNX Runtime: the line to show, or None."""
    from edgekit import model as M

    sig = M.signature(model)
    classes = output_classes(sig)
    if not dataset.labelled or classes is None:
        return None
    session = M.FloatSession(model)
    found = probe(session.run, dataset, classes, batch=M.batch_of(sig) or 32)
    return None if found is None else found.message()


class _Trial:
    """Runs the model on the same samples under one preprocessing after another, remembering each."""

    def __init__(self, run: Callable[[Tensors], Mapping[str, Array]], data: Dataset, classes: int, batch: int) -> None:
        self._run, self._data, self._classes, self._batch = run, data, classes, batch
        self.known: dict[Preprocessing, Array] = {}

    def right(self, how: Preprocessing) -> Array:
        """bool (n,): which samples the model gets right; empty where the preprocessing does not fit the data."""
        from edgekit.errors import EdgekitError

        if how not in self.known:
            try:
                self.known[how] = np.concatenate(list(self._predict(how)))
            except EdgekitError:
                self.known[how] = np.zeros(0, bool)
        return self.known[how]

    def accuracy(self, how: Preprocessing) -> float:
        right = self.right(how)
        return float(right.mean()) if right.size else 0.0

    def _predict(self, how: Preprocessing) -> Iterator[Array]:
        for part in self._data.with_preprocessing(how).batches(self._batch):
            count = len(part.index)
            filled = {k: v[np.arange(self._batch) % count] for k, v in part.inputs.items()}
            outputs = self._run(filled)
            fits = [o for o in outputs.values() if o.ndim == 2 and o.shape[1] == self._classes]
            scores = fits[0] if fits else next(iter(outputs.values())).reshape(self._batch, -1)
            yield _classes(scores)[:count] == part.labels


def _simplest(choices: list[Preprocessing], accuracy: dict[Preprocessing, float]) -> Preprocessing:
    """The first of `choices` that is as good as the best."""
    top = max(accuracy.values())
    return next(c for c in choices if accuracy.get(c, 0.0) >= top - _SAME)


@dataclass(frozen=True)
class _Seen:
    """Of the raw samples: smallest and largest value, mean and std per channel; image: three channels."""

    low: float
    high: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image: bool


def _numbers(declared: Preprocessing, seen: _Seen) -> Iterator[Preprocessing]:
    """Ways to scale raw values, simplest first; each replaces scale, mean and std."""

    def how(scale: float | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Preprocessing:
        return replace(declared, scale=scale, mean=mean, std=std)

    unit = 1.0 if seen.high <= 1.0 else 1 / 255  # brings the raw values to [0, 1]
    yield how(None, None, None)
    if seen.low >= 0 and (seen.high <= 1.0 or 16 < seen.high <= 255):
        yield how(255.0 if unit == 1.0 else unit, None, None)
        yield how(2 * unit, (1.0,), None)
        if seen.image:
            yield how(None if unit == 1.0 else unit, *_IMAGENET)
    if seen.image or len(seen.mean) == 1:
        yield how(None, seen.mean, seen.std)


def _choices(declared: Preprocessing, data: Dataset) -> list[Preprocessing]:
    """Everything that is worth a try, each once, without the declared one."""
    seen = _statistics(data)
    if seen is None:
        return []
    out = []
    for how in (declared, *_numbers(declared, seen)):
        out.append(how)
        if seen.image:
            out += _orders(how)
    if seen.image and 16 < seen.high <= 255:
        out.append(replace(declared, scale=None, mean=_CAFFE, std=None, channel_order="BGR"))
    return [how for how in dict.fromkeys(out) if flags(declared, how)]


def _orders(how: Preprocessing) -> Iterator[Preprocessing]:
    """The other channel order, the other order of flattening, and both."""
    other = replace(how, channel_order=None if how.channel_order == "BGR" else "BGR")
    layout: Layout = "NHWC" if how.layout == "NCHW" else "NCHW"
    yield from (other, replace(how, layout=layout), replace(other, layout=layout))


def _raw_shape(data: Dataset) -> tuple[int, ...]:
    shapes = data.raw_shapes()
    return shapes[0] if len(shapes) == 1 else ()


def _statistics(data: Dataset) -> _Seen | None:
    """What the raw values look like; None where scaling has no meaning (several inputs, integer inputs)."""
    if len(data.raw_shapes()) != 1 or not data.takes_floats:
        return None
    shape = _raw_shape(data)
    image = len(shape) == 3 and 3 in (shape[-1], shape[0])
    plain = replace(Preprocessing(), resize=data.preprocessing.resize, crop=data.preprocessing.crop)
    low, high, count, total, square = math.inf, -math.inf, 0, np.zeros(1), np.zeros(1)
    for x in data.raw(plain):
        channels = x if not image or shape[-1] == 3 else np.moveaxis(x, 1, -1)
        flat = channels.reshape(-1, 3 if image else 1).astype(np.float64)
        low, high = min(low, float(flat.min())), max(high, float(flat.max()))
        count, total, square = count + len(flat), total + flat.sum(0), square + np.square(flat).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(square / count - np.square(mean), 1e-12))
    return _Seen(low, high, _round(mean), _round(std), image)


def _round(values: Array) -> tuple[float, ...]:
    return tuple(float(f"{v:.4g}") for v in values)


def _classes(scores: Array) -> Array:
    """Predicted classes; one score is a probability if all lie in [0, 1], else a logit."""
    if scores.shape[1] > 1:
        return np.asarray(scores.argmax(axis=1))
    level = 0.5 if scores.min() >= 0 and scores.max() <= 1 else 0.0
    return (scores[:, 0] > level).astype(np.int64)


def mcnemar(before: Array, after: Array) -> float:
    """One-sided exact McNemar test that `after` is right more often; before, after: bool (n,) of the same samples."""
    if before.size != after.size:
        return 1.0
    better, worse = int((after & ~before).sum()), int((before & ~after).sum())
    changed = better + worse
    return float(sum(math.comb(changed, k) for k in range(better, changed + 1)) / 2**changed)


def flags(declared: Preprocessing, better: Preprocessing) -> tuple[str, ...]:
    """The command line flags that turn the declared preprocessing into the better one."""
    out: list[str] = []
    if declared.scale != better.scale:
        out += ["--scale", f"{1.0 if better.scale is None else better.scale:.9g}"]
    if declared.mean != better.mean:
        out += ["--mean", ",".join(f"{v:g}" for v in better.mean or (0.0,))]
    if declared.std != better.std:
        out += ["--std", ",".join(f"{v:g}" for v in better.std or (1.0,))]
    if (declared.channel_order == "BGR") != (better.channel_order == "BGR"):
        out += ["--channel-order", better.channel_order or "RGB"]
    if declared.layout != better.layout:
        out += ["--layout", better.layout or "NHWC"]
    return tuple(out)
