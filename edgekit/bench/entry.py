"""What is measured: an artifact of a build, or a file beside it that is fed what the build is fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import ShapeError
from edgekit.model import Signature, Tensors, TensorSpec
from edgekit.target import candidate_id

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Link:
    """One tensor of two models: `there` transposed by `axes`, in the shape and type of `here`."""

    here: TensorSpec
    there: TensorSpec
    axes: tuple[int, ...]

    def carry(self, value: Array, dtype: str | None = None) -> Array:
        """value: (n, ...) of `there`; returns (n, ...) of `here`."""
        moved = value.transpose(self.axes) if self.axes != tuple(range(value.ndim)) else value
        sizes = [size for size in self.here.shape[1:] if isinstance(size, int)]
        if len(sizes) == len(self.here.shape) - 1 and moved.ndim and moved.shape[1:] != tuple(sizes):
            moved = moved.reshape(len(moved), *sizes)
        return moved if dtype is None else np.ascontiguousarray(moved, dtype)


@dataclass(frozen=True)
class Fit:
    """How a file stands in for another model: its inputs from the other's, the other's outputs from its own."""

    inputs: tuple[Link, ...]
    outputs: tuple[Link, ...]


@dataclass(frozen=True)
class Entry:
    """One artifact to measure.

    path: its folder or file. runner: the backend's runner file. sha256, size_bytes: of the artifact's files.
    parity: the manifest's record, or None. problems: why its manifest says it is wrong (parity failed): not timed.
    notes: what its manifest says a reader must know.
    label: what a file is called that is measured for comparison and is no part of a build, else "".
    variant: "pruned", or "". pruning: what its manifest claims: shares of macs_kept and parameters_kept.
    fit: where its own inputs and outputs are not those of `signature`.
    environment: of a worker on this machine, where that computes what the target does, at any speed.
    """

    target: str
    backend: str
    precision: str
    path: Path
    runner: Path
    sha256: str
    size_bytes: int
    signature: Signature
    parity: dict[str, Any] | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    label: str = ""
    variant: str = ""
    pruning: dict[str, float] | None = None
    fit: Fit | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.label or candidate_id(self.backend, self.precision, self.variant)

    def feed(self, inputs: Tensors) -> Tensors:
        """Arrays of `signature` as the artifact takes them."""
        if self.fit is None:
            return inputs
        return {link.here.name: link.carry(inputs[link.there.name], link.here.dtype) for link in self.fit.inputs}

    def named(self, outputs: Tensors) -> Tensors:
        """The artifact's outputs as those of `signature`; what it lacks is left out."""
        if self.fit is None:
            return outputs
        links = [link for link in self.fit.outputs if link.there.name in outputs]
        return {link.here.name: link.carry(outputs[link.there.name]) for link in links}


def fit(own: Signature, wanted: Signature, name: str) -> Fit:
    """How a model of signature `own`, called `name`, takes the samples of `wanted` and gives its outputs.

    Tensors are matched by name, else by their sizes, where only one fits; image axes may be in the other order.
    Raises ShapeError where a tensor has no match or several.
    """
    return Fit(
        _links(own.inputs, wanted.inputs, f"input of '{name}'"),
        _links(wanted.outputs, own.outputs, f"output for '{name}'"),
    )


def _links(here: Sequence[TensorSpec], there: Sequence[TensorSpec], what: str) -> tuple[Link, ...]:
    free = {spec.name: spec for spec in there}
    found: dict[str, Link] = {}
    for spec in here:
        axes = _axes(spec, free[spec.name]) if spec.name in free else None
        if axes is not None:
            found[spec.name] = Link(spec, free.pop(spec.name), axes)
    for spec in here:
        if spec.name in found:
            continue
        fitting = [(other, axes) for other in free.values() if (axes := _axes(spec, other)) is not None]
        alike = sum(1 for s in here if s.name not in found and _axes(s, spec) is not None)
        if len(fitting) != 1 or alike != 1:
            raise ShapeError(
                f"{what} '{spec.name}' {_show(spec)} matches {_several(fitting, free)}",
                "compare files of the same task, whose tensors have the same names or different sizes",
            )
        other, axes = fitting[0]
        found[spec.name] = Link(spec, free.pop(other.name), axes)
    return tuple(found[spec.name] for spec in here)


def _several(fitting: Sequence[tuple[TensorSpec, tuple[int, ...]]], free: Mapping[str, TensorSpec]) -> str:
    if fitting:
        return "more than one: " + ", ".join(f"'{spec.name}'" for spec, _ in fitting)
    return "none of " + (", ".join(f"'{s.name}' {_show(s)}" for s in free.values()) or "what is left")


def _show(spec: TensorSpec) -> str:
    return f"{spec.dtype} ({', '.join(map(str, spec.shape))})"


def _axes(here: TensorSpec, there: TensorSpec) -> tuple[int, ...] | None:
    """The transposition after which `there` has the sizes of `here`, the first aside; None if there is none."""
    if np.dtype(here.dtype).kind in "iub" and np.dtype(there.dtype).kind == "f":
        return None
    count = len(there.shape)
    plain = tuple(range(count))
    orders = [plain]
    if count >= 3:
        orders += [(0, *plain[2:], 1), (0, count - 1, *plain[1:-1])]  # channels last, channels first
    return next((o for o in orders if _same_sizes(here.shape[1:], [there.shape[a] for a in o][1:])), None)


def _same_sizes(a: Sequence[int | str], b: Sequence[int | str]) -> bool:
    """Equal but for sizes that are open, or for axes of one element."""
    if len(a) == len(b) and all(x == y or isinstance(x, str) or isinstance(y, str) for x, y in zip(a, b, strict=True)):
        return True
    known = [[size for size in part if size != 1] for part in (a, b)]
    return known[0] == known[1] and all(isinstance(size, int) for size in known[0])
