"""Samples that fit a model's inputs and mean nothing, for when no data are at hand and the user said so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgekit.readers import Array, Chunk, groups

if TYPE_CHECKING:
    from edgekit.model import TensorSpec


@dataclass(frozen=True)
class RandomReader:
    """Uniform [0, 1) floats, integers 0 and 1; each sample from its own seed, so that a subset costs what it holds."""

    specs: tuple[TensorSpec, ...]
    samples: int
    seed: int
    labelled: bool = False
    classes: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.specs)

    @property
    def named(self) -> tuple[str, ...]:
        return self.keys

    def chunks(self, size: int, wanted: Array | None, keys: tuple[str, ...]) -> Iterator[Chunk]:
        for index in groups(self.samples, wanted, size):
            drawn = [self._sample(int(i)) for i in index]
            yield Chunk({k: np.stack([d[k] for d in drawn]) for k in keys}, None, index)

    def _sample(self, position: int) -> dict[str, Array]:
        rng = np.random.default_rng([self.seed, position])
        out: dict[str, Array] = {}
        for spec in self.specs:
            shape = spec.concrete(1)[1:]
            if spec.dtype == "bool" or np.issubdtype(np.dtype(spec.dtype), np.integer):
                out[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype)
            else:
                out[spec.name] = rng.random(shape).astype(spec.dtype)
        return out
