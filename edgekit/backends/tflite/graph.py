"""What a .tflite file holds, before it is bytes: tensors, operators and graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# Physical axis k of a tensor holds logical axis layout[k]: NCHW values stored as NHWC have layout (0, 2, 3, 1).
Layout = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Quant:
    """real = scale · (stored − zero point). scales: float32 (1,) or one per slice of `axis`; zeros: int64, as many."""

    scales: Array
    zeros: Array
    axis: int = 0

    @property
    def per_tensor(self) -> bool:
        return len(self.scales) == 1

    @property
    def scale(self) -> float:
        """Of a per-tensor quantization."""
        return float(self.scales[0])

    @property
    def zero(self) -> int:
        """Of a per-tensor quantization."""
        return int(self.zeros[0])

    def same(self, other: Quant | None) -> bool:
        """Whether the same integers mean the same numbers."""
        return (
            other is not None
            and np.array_equal(self.scales, other.scales)
            and np.array_equal(self.zeros, other.zeros)
            and (self.per_tensor or self.axis == other.axis)
        )

    def on(self, axis: int) -> Quant:
        """The same numbers along another axis."""
        return Quant(self.scales, self.zeros, axis)


def per_tensor(scale: float, zero: int) -> Quant:
    return Quant(np.array([scale], np.float32), np.array([zero], np.int64))


@dataclass(eq=False)
class Tensor:
    """A tensor of the file. shape: at batch 1; dynamic: axes whose size grows with the batch. data: of a constant."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    dynamic: frozenset[int] = frozenset()
    quant: Quant | None = None
    data: Array | None = None

    @property
    def kind(self) -> str:
        """The type by which rules are looked up: 'float32', 'int64', and 'qint8' for int8 with a scale."""
        return f"q{self.dtype.name}" if self.quant is not None and self.dtype.kind in "iu" else self.dtype.name


@dataclass(eq=False)
class Operator:
    """One operator. code: a name of the schema's BuiltinOperator. options: fields of its options table."""

    code: str
    inputs: list[Tensor | None]
    outputs: list[Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""  # the ONNX node it was made for


@dataclass(eq=False)
class Graph:
    """A subgraph with one signature. inputs and outputs: (name in the signature, tensor)."""

    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    name: str = "main"
    signature: str = "serving_default"
