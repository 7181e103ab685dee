"""Observes a float model's activations over a dataset, in memory that does not grow with it; turns them into ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import NoCalibrationDataError, NonFiniteError
from edgekit.passes.plan import integer_range

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]
Function = Callable[[Array], Array]

# 8 bins per int8 level: the error of taking a bin's centre is 1/64 of a quantization step's variance.
BINS = 2048
# Fetched activations held at once. Bounds the memory of big models; small ones fit many samples.
FETCH_BYTES = 128 * 2**20
# Values of one tensor and batch that enter its histogram; the extremes are always exact. Half a million of 256 samples:
# 50 of them are beyond PERCENTILE.
HISTOGRAM_VALUES = 2**16
# Both tails together; 99.99 is the customary percentile (NVIDIA, "8-bit inference with TensorRT", 2017).
PERCENTILE = 99.99
# Shares of the extremes that a clipping range is looked for among, down to 0.3: steps of 5 %.
CLIPPINGS = 15
# Squares of it, and sums of them, are far below float32's largest.
LARGE = 1e12
# A few values say little of the largest to come: the mean of a feature map over an image has one value an image.
HEADROOM = {"wide": 1.15, "wider": 1.4}
# The steps that a power of two can be finer by; what is beyond saturates.
SHARES = {"half": 0.5, "quarter": 0.25, "eighth": 0.125}
# Samples held back, and four parts of the others: a range of three is tried on the fourth.
FOLDS = 5


@dataclass
class Observed:
    """One tensor over the dataset, by fold: 0 are the samples held back to judge with, the others choose ranges.

    lows, highs: extremes. averages: sums of the batches' extremes, of `parts` batches. counts: histograms.
    sums: per channel (axis 1) over folds 1 and up, of `rows` values each; kept for tensors that weights multiply.
    through: the bounded function that all readers apply; errors where it is flat count for nothing.
    """

    lows: Array = field(default_factory=lambda: np.full(FOLDS, np.inf))
    highs: Array = field(default_factory=lambda: np.full(FOLDS, -np.inf))
    averages: Array = field(default_factory=lambda: np.zeros((FOLDS, 2)))
    parts: Array = field(default_factory=lambda: np.zeros(FOLDS))
    counts: Array = field(default_factory=lambda: np.zeros((FOLDS, BINS)))
    sums: Array | float = 0.0
    rows: int = 0
    through: Function | None = None

    @property
    def low(self) -> float:
        return float(self.lows.min())

    @property
    def high(self) -> float:
        return float(self.highs.max())

    @property
    def centres(self) -> Array:
        """Of the histograms' bins."""
        edges = np.linspace(self.low, self.high, BINS + 1)
        return np.asarray((edges[:-1] + edges[1:]) / 2)

    def extend(self, values: Array, fold: int | Array, channels: bool = False) -> None:
        """fold: of all values, or of each row of them; a row in fold -1 is not looked at."""
        folds = np.atleast_1d(fold)
        rows = values.reshape(len(folds), -1)
        lows, highs = rows.min(axis=1), rows.max(axis=1)
        for number in np.unique(folds[folds >= 0]):
            own = folds == number
            low, high = float(lows[own].min()), float(highs[own].max())
            self.lows[number] = np.minimum(self.lows[number], low)  # which NaN passes through
            self.highs[number] = np.maximum(self.highs[number], high)
            self.averages[number] += low, high
            self.parts[number] += 1
        if channels and values.ndim > 1 and (folds > 0).any():
            chosen = values if len(folds) == 1 else values[folds > 0]
            # float32 over one sample's positions, float64 over the samples
            sums = chosen.sum(axis=tuple(range(2, values.ndim))) if values.ndim > 2 else chosen
            self.sums = self.sums + sums.sum(axis=0, dtype=np.float64)
            self.rows += chosen.size // chosen.shape[1]

    def count(self, values: Array, fold: int | Array) -> None:
        folds = np.atleast_1d(fold)
        low, high = self.low, self.high
        if not high > low:
            return
        flat = values.reshape(-1)
        # an odd stride visits every channel and column over time instead of aliasing with a power-of-two layout
        stride = flat.size // HISTOGRAM_VALUES | 1
        own = folds[np.arange(0, flat.size, stride) // max(1, flat.size // len(folds))]
        bins = ((flat[::stride] - np.float32(low)) * np.float32(BINS / (high - low))).astype(np.int32)
        bins = np.clip(bins, 0, BINS - 1) + BINS * own
        self.counts += np.bincount(bins[own >= 0], minlength=FOLDS * BINS).reshape(FOLDS, BINS)

    def range(self, method: str, everything: bool = True, without: int = 0) -> tuple[float, float]:
        """(low, high) by method; over all samples, or without fold 0, or without another one too."""
        folds = [f for f in range(FOLDS) if np.isfinite(self.lows[f]) and (everything or f not in (0, without))]
        if not folds:  # too few samples to leave any out
            folds = [f for f in range(FOLDS) if np.isfinite(self.lows[f])] or [0]
        low, high = float(self.lows[folds].min()), float(self.highs[folds].max())
        if not high > low:
            return low, high
        if method in HEADROOM:
            return low * HEADROOM[method], high * HEADROOM[method]
        if method in SHARES:
            return low * SHARES[method], high * SHARES[method]
        if method == "average":
            mean = self.averages[folds].sum(axis=0) / self.parts[folds].sum()
            return max(low, min(float(mean[0]), 0.0)), min(high, max(float(mean[1]), 0.0))
        counts = self.counts[folds].sum(axis=0)
        if method == "minmax" or counts.sum() == 0:
            return low, high
        edges = np.linspace(self.low, self.high, BINS + 1)
        if method == "percentile":
            return _percentile(counts, edges, low, high)
        if method == "kl":
            return _least_divergence(counts, edges, low, high)
        return _least_error(counts, self.centres, low, high, self.through)


def _percentile(counts: Array, edges: Array, low: float, high: float) -> tuple[float, float]:
    share = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    tail = (1 - PERCENTILE / 100) / 2
    cut_low, cut_high = float(np.interp(tail, share, edges)), float(np.interp(1 - tail, share, edges))
    # a cut within two bins of the extreme is the histogram's own resolution (a bound such as Relu6's 6), not a tail
    near = 2 * (edges[1] - edges[0])
    cut_low, cut_high = (low if cut_low - low < near else cut_low), (high if high - cut_high < near else cut_high)
    # a side that touches 0 (after Relu) has no tail to cut
    return (low if low >= 0 else max(low, min(cut_low, 0.0))), (high if high <= 0 else min(high, max(cut_high, 0.0)))


def _least_divergence(counts: Array, edges: Array, low: float, high: float) -> tuple[float, float]:
    """The clipping range whose 256 levels tell the least divergent story (NVIDIA 2017); both ends shrink together.

    What is clipped counts for the outermost bins, as it does once quantized.
    """
    total = counts.sum()
    centres = (edges[:-1] + edges[1:]) / 2
    low, high = min(low, 0.0), max(high, 0.0)
    best = (np.inf, low, high)
    for f in np.linspace(1.0, 0.3, CLIPPINGS):
        inside = (centres >= low * f) & (centres <= high * f)
        if not inside.any():
            break
        kept = counts[inside].astype(np.float64)
        below = counts[centres < low * f].sum()
        above = counts[centres > high * f].sum()
        wanted = kept.copy()
        wanted[0], wanted[-1] = wanted[0] + below, wanted[-1] + above
        level = np.rint((centres[inside] - low * f) * 255 / max((high - low) * f, 1e-30)).astype(np.int64)
        used = kept > 0
        share = np.bincount(level, weights=kept, minlength=256) / np.maximum(
            np.bincount(level, weights=used, minlength=256), 1
        )
        told = np.where(used, share[level], 0.0)
        told = told / max(told.sum(), 1e-30)
        wanted = wanted / total
        where = wanted > 0
        divergence = float((wanted[where] * np.log(wanted[where] / np.maximum(told[where], 1e-12))).sum())
        best = min(best, (divergence, low * f, high * f))
    return best[1], best[2]


def _least_error(
    counts: Array, centres: Array, low: float, high: float, through: Function | None = None
) -> tuple[float, float]:
    """The clipping range with the least mean squared int8 error over the histogram (Banner et al. 2019, searched)."""
    used = counts > 0
    counts, centres = counts[used], centres[used]
    low, high = min(low, 0.0), max(high, 0.0)
    # what a bounded function flattens may be clipped however far it reaches
    shares = np.linspace(1.0, 0.3, 2 * CLIPPINGS) if through is None else np.geomspace(1.0, 0.02, 4 * CLIPPINGS)

    def least(lows: Array, highs: Array) -> tuple[float, float]:
        at = int(np.argmin(squared_error(counts, centres, lows, highs, through)))
        return float(lows[at]), float(highs[at])

    at_low, at_high = least(low * shares, high * shares)
    if low < 0 < high:
        # the range found comes first, so that it stays where nothing is better
        lows, highs = np.append(at_low, low * shares), np.append(at_high, high * shares)
        at_low, _ = least(lows, np.full(len(lows), at_high))
        _, at_high = least(np.full(len(highs), at_low), highs)
    return at_low, at_high


def squared_error(
    counts: Array, centres: Array, low: Array | float, high: Array | float, through: Function | None = None
) -> Array:
    """Mean squared error of int8 with each range [low, high] on a histogram, or of a function of it; float64."""
    lowest, highest = integer_range(8)
    scale = np.maximum(np.subtract(high, low), 1e-30)[..., None] / (highest - lowest)
    zero = np.rint(lowest - np.asarray(low)[..., None] / scale)
    rounded = np.rint(centres / scale)
    np.clip(rounded, lowest - zero, highest - zero, out=rounded)
    rounded *= scale
    error = rounded - centres if through is None else through(rounded) - through(centres)
    return np.asarray(np.square(error) @ (counts / counts.sum()))


def bounded(node: ir.Node) -> Function | None:
    """The operator as a function if it is flat far from 0, on one side at least, else None."""
    if node.op_type == "Tanh":
        return np.tanh
    if node.op_type == "Sigmoid":
        return lambda x: np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))))
    if node.op_type == "HardSigmoid":
        slope = float(node.attributes.get_float("alpha", 0.2) or 0.0)
        offset = float(node.attributes.get_float("beta", 0.5) or 0.0)
        return lambda x: np.clip(slope * x + offset, 0.0, 1.0)
    if node.op_type == "HardSwish":
        return lambda x: x * np.clip(x / 6 + 0.5, 0.0, 1.0)
    return None


# --- feeding the model -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Feed:
    """Inputs of one run; the first `rows` rows are samples, from number `first` on, later ones repeat them."""

    inputs: M.Tensors
    first: int
    rows: int
    labels: Array | None = None


def feeds(sig: M.Signature, data: Dataset, batch_size: int) -> Iterator[Feed]:
    """The bound dataset in file order, in the model's own batch size if that is fixed. NonFiniteError on NaN or Inf."""
    fixed = M.batch_of(sig)
    first = 0
    for batch in data.batches(fixed or batch_size):
        inputs = {spec.name: np.asarray(batch.inputs[spec.name]) for spec in sig.inputs}
        rows = len(next(iter(inputs.values())))
        for name, array in inputs.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise NonFiniteError(
                    f"NaN or Inf in input '{name}' of calibration samples {first} to {first + rows - 1}",
                    "clean the data",
                )
        if fixed is not None and rows < fixed:
            # repeating real samples leaves the extremes exact
            inputs = {name: np.resize(array, (fixed, *array.shape[1:])) for name, array in inputs.items()}
        labels = batch.labels
        if fixed is not None and labels is not None and rows < fixed:
            labels = np.resize(labels, (fixed, *labels.shape[1:]))
        yield Feed(inputs, first, rows, labels)
        first += rows
    if first == 0:
        raise NoCalibrationDataError("the calibration data hold no samples", "pass --data with some")


def held_back(samples: int, seed: int, limit: int = 96) -> frozenset[int]:
    """Positions of the samples that judge: a fifth of them, at most `limit`; none of fewer than 10."""
    if samples < 10:
        return frozenset()
    rng = np.random.default_rng(seed)
    return frozenset(int(i) for i in rng.choice(samples, size=min(limit, samples // 5), replace=False))


def folds_of(feed: Feed, held: frozenset[int]) -> Array:
    """The fold of each row: 0 if it judges, the others in turn in 1 and up, -1 where samples repeat."""
    out = np.full(len(next(iter(feed.inputs.values()))), -1)
    out[: feed.rows] = [0 if (at := feed.first + i) in held else 1 + at % (FOLDS - 1) for i in range(feed.rows)]
    return out


# --- observing -------------------------------------------------------------------------------------------
def observe(
    model: ir.Model,
    data: Dataset,
    values: Sequence[str],
    *,
    batch_size: int,
    held: frozenset[int],
    means: frozenset[str] = frozenset(),
) -> dict[str, Observed]:
    """Exact extremes of each named value over all samples, and channel sums of those in `means`.

    Raises NonFiniteError naming the tensor that holds NaN.
    """
    seen = {name: Observed() for name in values}
    for name, array, folds in fetched_rows(model, data, values, batch_size, held):
        if array.size:
            seen[name].extend(array, folds, name in means)
            if np.isnan(seen[name].lows).any():
                raise NonFiniteError(
                    f"NaN in tensor '{name}' during calibration",
                    "run the float model on this data and repair what makes NaN",
                )
    return seen


def fill_histograms(
    model: ir.Model,
    data: Dataset,
    seen: Mapping[str, Observed],
    *,
    batch_size: int,
    held: frozenset[int],
    reader: Callable[[str, Array, Array], None] | None = None,
) -> None:
    """Second reading: histograms between the extremes that `observe` found. reader: gets every array and its folds."""
    for name, array, folds in fetched_rows(model, data, list(seen), batch_size, held):
        if array.size:
            seen[name].count(array, folds)
            if reader is not None:
                reader(name, array, folds)


def fetched(
    model: ir.Model, data: Dataset, values: Sequence[str], batch_size: int, held: frozenset[int]
) -> Iterator[tuple[str, Array, int]]:
    """(name, values, fold), batch by batch, graph inputs included; within FETCH_BYTES."""
    for name, array, folds in fetched_rows(model, data, values, batch_size, held):
        if len(folds) == 1:
            if folds[0] >= 0:
                yield name, array, int(folds[0])
            continue
        for number in range(FOLDS):
            part = folds == number
            if part.any():
                yield name, array[part], number


def fetched_rows(
    model: ir.Model, data: Dataset, values: Sequence[str], batch_size: int, held: frozenset[int]
) -> Iterator[tuple[str, Array, Array]]:
    """(name, values, folds), as `fetched`, with the fold of each row; [1] for a value whose first axis is no batch."""
    sig = M.signature(model)
    given = {spec.name for spec in sig.inputs}
    inner = [v for v in values if v not in given]
    chunks, rows = _chunks(model, data, sig, inner, batch_size)
    for position, chunk in enumerate(chunks):
        session = M.FloatSession(model, fetch=chunk)
        wanted = set(chunk)
        for feed in feeds(sig, data, rows):
            folds = folds_of(feed, held)
            arrays = {k: v for k, v in session.run(feed.inputs).items() if k in wanted}
            if position == 0:
                arrays.update({k: v for k, v in feed.inputs.items() if k in values})
            for name, array in arrays.items():
                yield name, array, folds if array.ndim and len(array) == len(folds) else np.ones(1, folds.dtype)


def _chunks(
    model: ir.Model, data: Dataset, sig: M.Signature, values: list[str], batch_size: int
) -> tuple[list[list[str]], int]:
    """Values to fetch together and the batch size, so that one run returns at most FETCH_BYTES (or one tensor)."""
    if not values:
        return [[]], batch_size
    feed = next(iter(feeds(sig, data, 1)))
    rows = len(next(iter(feed.inputs.values())))
    sizes = {k: v.nbytes / rows for k, v in M.FloatSession(model, fetch=values).run(feed.inputs).items() if k in values}
    batch = M.batch_of(sig) or int(np.clip(FETCH_BYTES // max(sum(sizes.values()), 1), 1, batch_size))
    chunks: list[list[str]] = [[]]
    filled = 0.0
    for name in values:
        if chunks[-1] and filled + sizes[name] * batch > FETCH_BYTES:
            chunks.append([])
            filled = 0.0
        chunks[-1].append(name)
        filled += sizes[name] * batch
    return chunks, batch


def check_finite(seen: Mapping[str, Observed], names: Iterable[str]) -> None:
    """Raises NonFiniteError if a value that is to be quantized was infinite."""
    for name in names:
        if name in seen and not (np.isfinite(seen[name].low) and np.isfinite(seen[name].high)):
            raise NonFiniteError(
                f"Inf in tensor '{name}' during calibration", "keep its nodes in float, or repair the data"
            )


# --- per channel -----------------------------------------------------------------------------------------
@dataclass
class ChannelRange:
    """Extremes and mean square of each channel of one tensor, float64; of the extremes, each quarter's own.

    lows, highs: (QUARTERS, channels).
    """

    lows: Array
    highs: Array
    squares: Array
    rows: int

    @property
    def low(self) -> Array:
        return np.asarray(self.lows.min(axis=0))

    @property
    def high(self) -> Array:
        return np.asarray(self.highs.max(axis=0))

    @property
    def power(self) -> Array:
        return np.asarray(self.squares / max(1, self.rows))

    @property
    def span(self) -> Array:
        """The largest magnitude to expect of each channel; at most the tensor's own.

        A channel whose quarters of the data differ has a heavy tail, or hardly ever wakes: what was seen of it is
        raised by the factor by which the quarters differ.
        """
        quarters = np.maximum(np.abs(self.lows), np.abs(self.highs))
        quarters = quarters[np.isfinite(quarters).all(axis=1)]
        largest = quarters.max(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = np.where(largest > 0, largest * (largest / quarters.min(axis=0)), 0.0)
        return np.asarray(np.minimum(expected, largest.max(initial=0.0)))


QUARTERS = 4


def channel_ranges(
    model: ir.Model, data: Dataset, axes: Mapping[str, int], batch_size: int = 32
) -> dict[str, ChannelRange]:
    """axes: value -> its channel axis. Raises NonFiniteError naming a tensor that holds NaN or Inf."""
    seen: dict[str, ChannelRange] = {}
    size = max(1, min(batch_size, -(-data.samples // QUARTERS)))
    for name, array, folds in fetched_rows(model, data, list(axes), size, frozenset()):
        if not array.size:
            continue
        low, high, square = _of_channels(array, axes[name], len(folds))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise NonFiniteError(
                f"NaN or Inf in tensor '{name}' during calibration", "run the float model on this data and repair it"
            )
        channels = array.shape[axes[name]]
        if name not in seen:
            shape = (QUARTERS, channels)
            seen[name] = ChannelRange(np.full(shape, np.inf), np.full(shape, -np.inf), np.zeros(channels), 0)
        found = seen[name]
        for quarter in range(QUARTERS):
            own = folds == quarter + 1
            if own.any():
                found.lows[quarter] = np.minimum(found.lows[quarter], low[own].min(axis=0))
                found.highs[quarter] = np.maximum(found.highs[quarter], high[own].max(axis=0))
        found.squares += square[folds > 0].sum(axis=0, dtype=np.float64)
        found.rows += array.size // channels * int((folds > 0).sum()) // len(folds)
    return seen


def _of_channels(array: Array, axis: int, rows: int) -> tuple[Array, Array, Array]:
    """(lowest, highest, sum of squares) of each channel of each row, (rows, channels); rows: 1, or the first axis."""
    axis %= array.ndim
    channels = array.shape[axis]
    if rows == 1 or axis == 0:
        array, rows, axis = np.moveaxis(array, axis, 0)[None], 1, 1
    flat: Array = array.reshape(rows, math.prod(array.shape[1:axis]), channels, -1)
    if flat.shape[1] == 1:  # contiguous, which numpy reduces fastest
        flat = flat.reshape(rows * channels, -1)
        lows, highs, terms = flat.min(axis=1), flat.max(axis=1), "ra,ra->r"
    else:
        lows, highs, terms = flat.min(axis=(1, 3)), flat.max(axis=(1, 3)), "nbca,nbca->nc"
    low, high = lows.astype(np.float64).reshape(rows, channels), highs.astype(np.float64).reshape(rows, channels)
    wide = max(float(high.max()), -float(low.min())) > LARGE
    squares = np.einsum(terms, flat, flat, dtype=np.float64 if wide or flat.dtype == np.float16 else None)
    return low, high, squares.reshape(rows, channels)
