"""Which channels of which tensors can only be removed together: the dependency graph of a model's channels.

Every position along a prunable axis of a value has a label; operators join the labels of positions that stand or fall
together (union-find, as the coupled parameters of DepGraph, Fang et al. 2023, but per channel and per axis). What an
operator's rule does not understand freezes the labels that it reads, with a reason: it is never guessed.
`coupling_trace` walks the graph, `coupling_layers` and `coupling_moves` have the rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]
Role = Literal["out", "in", "along"]


@dataclass(frozen=True)
class Site:
    """One axis of a node's constant, with the label of each position.

    role: "out" for what makes the channels, "in" for weights that read them, "along" for what goes with them.
    """

    node: str
    position: int  # of the constant among the node's inputs
    axis: int
    labels: Array
    role: Role


@dataclass(frozen=True)
class Number:
    """An integer that counts kept labels: an attribute by name, or element `index` of the constant at an input."""

    node: str
    where: str | int
    index: int
    labels: Array


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of a node per sample: `macs` now, in proportion to the labels kept of each array."""

    node: str
    macs: float
    factors: tuple[Array, ...]


@dataclass
class Family:
    """Channels that one decision is about: units of one kind, which the same constants hold.

    units: a root label each. name: of the node that makes them. sizes: for each site, positions per unit.
    """

    name: str
    units: Array
    frozen: str  # why none of them may go, or ""


@dataclass
class Coupling:
    """The labels of a prepared model's values. Positions whose labels have one `root` go together."""

    on: dict[str, dict[int, Array]] = field(default_factory=dict)  # value -> axis -> labels
    sites: list[Site] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    splits: dict[Pattern, int] = field(default_factory=dict)  # how axes were split: pattern -> chosen axis
    _parent: list[int] = field(default_factory=list)
    _born: list[int] = field(default_factory=list)  # label -> the array it was made in
    _names: list[str] = field(default_factory=list)  # of the arrays
    _kin: list[int] = field(default_factory=list)  # union-find over arrays
    _frozen: dict[int, str] = field(default_factory=dict)

    # --- building ----------------------------------------------------------------------------------
    def fresh(self, count: int, name: str) -> Array:
        first, array = len(self._parent), len(self._names)
        self._parent.extend(range(first, first + count))
        self._born.extend([array] * count)
        self._names.append(name)
        self._kin.append(array)
        return np.arange(first, first + count)

    def join(self, a: Array, b: Array) -> None:
        for left, right in zip(a.tolist(), b.tolist(), strict=True):
            one, other = self.root(left), self.root(right)
            if one != other:
                self._parent[max(one, other)] = min(one, other)
                one, other = self._ancestor(self._born[left]), self._ancestor(self._born[right])
                self._kin[max(one, other)] = min(one, other)

    def gather(self, labels: Array, like: Array) -> Array:
        """One label for each distinct number in `like`, which says for each label what it is joined with."""
        firsts = np.unique(like, return_index=True)[1]
        representative = labels[firsts]
        self.join(representative[like], labels)
        return representative

    def freeze(self, labels: Array, why: str) -> None:
        for label in labels.tolist():
            self._frozen.setdefault(label, why)

    def freeze_value(self, value: ir.Value | None, why: str) -> None:
        for labels in self.axes(value).values():
            self.freeze(labels, why)

    def axes(self, value: ir.Value | None) -> dict[int, Array]:
        return {} if value is None else self.on.get(value.name or "", {})

    def put(self, value: ir.Value, axis: int, labels: Array) -> None:
        self.on.setdefault(value.name or "", {})[axis] = labels

    # --- asking ------------------------------------------------------------------------------------
    def root(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def roots(self, labels: Array) -> Array:
        return np.array([self.root(n) for n in np.asarray(labels).tolist()], np.int64)

    def _ancestor(self, array: int) -> int:
        while self._kin[array] != array:
            self._kin[array] = self._kin[self._kin[array]]
            array = self._kin[array]
        return array

    @property
    def count(self) -> int:
        return len(self._parent)

    def families(self) -> list[Family]:
        """All of them, frozen ones too, in the order of the nodes that make them. A family is frozen as a whole."""
        units: dict[int, dict[int, None]] = {}
        for label in range(self.count):
            units.setdefault(self._ancestor(self._born[label]), {}).setdefault(self.root(label))
        why: dict[int, str] = {}
        for label, reason in self._frozen.items():
            why.setdefault(self._ancestor(self._born[label]), reason)
        read = {self._ancestor(self._born[int(n)]) for s in self.sites if s.role == "in" for n in s.labels}
        return [
            Family(
                self._names[kin],
                np.array(sorted(roots), np.int64),
                why.get(kin, "" if kin in read else "no weights read these channels"),
            )
            for kin, roots in sorted(units.items())
        ]

    def everything(self) -> Array:
        """bool per label: keep all."""
        return np.ones(self.count, bool)

    def without(self, units: Iterable[int]) -> Array:
        """bool per label: all but those whose root is one of `units`."""
        gone = np.zeros(self.count, bool)
        gone[list(units)] = True
        return ~gone[self.roots(np.arange(self.count))]


Pattern = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass
class Meter:
    """Counts multiply-accumulates and parameters of what is kept, quickly enough to be asked for each step."""

    coupling: Coupling
    sizes: Mapping[str, Sequence[int]]  # "node:position" -> shape of the constant

    def macs(self, keep: Array) -> float:
        return sum(self._share(w.factors, keep) * w.macs for w in self.coupling.works)

    def parameters(self, keep: Array) -> float:
        axes: dict[str, list[Array]] = {name: [] for name in self.sizes}
        for site in self.coupling.sites:
            axes[f"{site.node}:{site.position}"].append(site.labels)
        return sum(float(np.prod(self.sizes[name])) * self._share(found, keep) for name, found in axes.items())

    @staticmethod
    def _share(factors: Iterable[Array], keep: Array) -> float:
        share = 1.0
        for labels in factors:
            share *= float(keep[labels].mean())
        return share


def sizes(value: ir.Value | None) -> list[int | None] | None:
    """Sizes of a value, None for those that are not numbers; None if the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else None for d in value.shape]


def per_sample(value: ir.Value | None) -> float:
    """Elements at batch 1: a symbolic size is the batch, or a multiple of it (`k*batch`)."""
    total = 1.0
    for size in (value.shape or ()) if value is not None else ():
        if isinstance(size, int):
            total *= size
        elif size.value and "*" in size.value:
            head = size.value.split("*", 1)[0].strip()
            total *= int(head) if head.isdigit() else 1
    return total
