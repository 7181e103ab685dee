"""Second moments of what layers read, gathered over a dataset in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G
from edgekit.passes import regression as L
from edgekit.passes.blas import single_threaded
from edgekit.passes.calibrate import fetched

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]
# Rows per dataset that a layer's moments are taken from: positions of images, each image its own.
ROWS = 65536
GRAM_BYTES = 512 * 2**20
BATCH = 32


@dataclass
class Moments:
    """Of a layer's inputs x, rows by features, per group: n, sum x, sum x xᵀ (float64)."""

    layer: L.Layer
    rows: int = 0
    total: Array = field(default_factory=lambda: np.zeros(0))
    squares: Array = field(default_factory=lambda: np.zeros(0))

    def extend(self, x: Array) -> None:
        """x: (groups, rows, features)."""
        if not self.rows:
            groups, _, features = x.shape
            self.total, self.squares = np.zeros((groups, features)), np.zeros((groups, features, features))
        self.rows += x.shape[1]
        self.total += x.sum(axis=1, dtype=np.float64)
        self.squares += x.swapaxes(1, 2) @ x

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


def moments(model: ir.Model, nodes: Sequence[str], data: Dataset, seed: int = 0) -> Iterator[tuple[str, Moments]]:
    """Of each named node's input over the dataset, as many nodes at a time as GRAM_BYTES hold. model: prepared."""
    by_name = {n.name or "": n for n in model.graph}
    layers = {name: layer for name in nodes if (layer := layer_of(by_name[name])) is not None}
    for part in _parts(layers):
        yield from _gather(model, part, data, seed).items()


def _parts(layers: Mapping[str, L.Layer]) -> Iterator[dict[str, L.Layer]]:
    part: dict[str, L.Layer] = {}
    size = 0
    for name, layer in layers.items():
        groups, features, _ = layer.weight.shape
        need = groups * features**2 * 8
        if part and size + need > GRAM_BYTES:
            yield part
            part, size = {}, 0
        part[name], size = layer, size + need
    if part:
        yield part


@single_threaded
def _gather(model: ir.Model, layers: Mapping[str, L.Layer], data: Dataset, seed: int) -> dict[str, Moments]:
    rng = np.random.default_rng(seed)
    found = {name: Moments(layer) for name, layer in layers.items()}
    readers: dict[str, list[str]] = {}
    for name, layer in layers.items():
        readers.setdefault(layer.node.inputs[0].name or "", []).append(name)  # type: ignore[union-attr]
    for value, array, _ in fetched(model, data, list(readers), BATCH, frozenset()):
        for name in readers[value]:
            layer = layers[name]
            each = max(1, ROWS * len(array) // max(1, data.samples))
            rows = L.choose_input(layer, array, each, rng)
            found[name].extend(L.inputs(layer, array, rows))
    return found
