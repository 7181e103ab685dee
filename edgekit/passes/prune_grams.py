"""Second moments of what layers read, gathered over a dataset in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G
from edgekit.passes import regression as L
from edgekit.passes.blas import single_threaded
from edgekit.passes.calibrate import fetched
from edgekit.passes.prune_readings import Reading

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]
# Rows per dataset that a layer's moments are taken from: positions of images, each image its own.
ROWS = 65536
GRAM_BYTES = 256 * 2**20  # held at once; as much again is worked on
# Layers with more features are looked at by channel, their taps as so many rows: a 3x3 convolution of 256 channels.
MOST_FEATURES = 2304
BATCH = 32


@dataclass
class Moments:
    """Of what a layer reads, per group: n, sum x, sum x xᵀ (float64).

    taps: positions of a window that are looked at as rows, 1 if they are features.
    """

    reading: Reading
    taps: int = 1
    rows: int = 0
    total: Array = field(default_factory=lambda: np.zeros(0))
    squares: Array = field(default_factory=lambda: np.zeros(0))

    def extend(self, x: Array) -> None:
        """x: (groups, rows, features)."""
        groups, count, size = x.shape
        if self.taps > 1:
            x = x.reshape(groups, count, -1, self.taps).swapaxes(2, 3).reshape(groups, count * self.taps, -1)
        if not self.rows:
            features = size // self.taps
            self.total, self.squares = np.zeros((groups, features)), np.zeros((groups, features, features))
        self.rows += x.shape[1]
        self.total += x.sum(axis=1, dtype=np.float64)
        self.squares += x.swapaxes(1, 2) @ x

    @property
    def weight(self) -> Array:
        """(groups, features, outputs): taps that are rows give outputs of their own."""
        return self.by_channel(self.reading.layer.weight)

    def by_channel(self, weight: Array) -> Array:
        groups, size, outputs = weight.shape
        return weight.reshape(groups, size // self.taps, self.taps * outputs)

    def by_tap(self, weight: Array) -> Array:
        """Back to (groups, channels × taps, outputs)."""
        groups, size, outputs = weight.shape
        return weight.reshape(groups, size * self.taps, outputs // self.taps)

    @property
    def mean(self) -> Array:
        """(groups, features)."""
        return self.total / max(1, self.rows)

    @property
    def covariance(self) -> Array:
        """(groups, features, features)."""
        mean = self.mean
        return np.asarray(self.squares / max(1, self.rows) - mean[:, :, None] * mean[:, None, :])


def layer_of(node: ir.Node) -> L.Layer | None:
    """The node as a regression, if it is one with constant weights."""
    weight = G.array(node.inputs[1]) if len(node.inputs) > 1 else None
    bias = G.array(node.inputs[2]) if len(node.inputs) > 2 else None
    return None if weight is None else L.layer(node, weight, bias)


def taps(reading: Reading) -> int:
    """How many of a window's positions are rows rather than features."""
    size = reading.layer.weight.shape[1]
    return 1 if reading.recurrent or size <= MOST_FEATURES else int(np.prod(reading.layer.shape[2:], dtype=np.int64))


def gram_bytes(reading: Reading) -> int:
    groups, size, _ = reading.layer.weight.shape
    return int(groups * (size // taps(reading)) ** 2 * 8)


@single_threaded
def moments(model: ir.Model, readings: Sequence[Reading], data: Dataset, seed: int = 0) -> dict[str, Moments]:
    """By key, of each reading's input over the dataset. model: prepared, what the readings are of."""
    rng = np.random.default_rng(seed)
    found = {r.key: Moments(r, taps(r)) for r in readings}
    by_value: dict[str, list[str]] = {}
    for reading in readings:
        by_value.setdefault(reading.node.inputs[0].name or "", []).append(reading.key)  # type: ignore[union-attr]
    for value, array, _ in fetched(model, data, list(by_value), BATCH, frozenset()):
        for key in by_value[value]:
            reading = found[key].reading
            samples = array.shape[1] if reading.recurrent else len(array)
            each = max(1, ROWS * samples // max(1, data.samples) // found[key].taps)
            found[key].extend(reading.inputs(array, each, rng))
    return found


def in_parts(needs: Mapping[str, Sequence[Reading]]) -> list[list[str]]:
    """The names, as many at a time as GRAM_BYTES hold of what they need."""
    parts: list[list[str]] = []
    held: dict[str, int] = {}
    for name, readings in needs.items():
        more = {r.key: gram_bytes(r) for r in readings}
        if not parts or sum({**held, **more}.values()) > GRAM_BYTES:
            parts.append([])
            held = {}
        held.update(more)
        parts[-1].append(name)
    return parts
