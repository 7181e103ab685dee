"""Which channels of which tensors can only be removed together: the dependency graph of a model's channels.

Every position along a prunable axis of a value has a label; operators join the labels of positions that stand or fall
together (union-find, as the coupled parameters of DepGraph, Fang et al. 2023, but per channel and per axis). What an
operator's rule does not understand freezes the labels that it reads, with a reason: it is never guessed.
`coupling_trace` walks the graph, `coupling_layers` and `coupling_moves` have the rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G

Array = np.ndarray[Any, Any]
Role = Literal["out", "in", "along"]
Pattern = tuple[tuple[int, ...], tuple[int, ...]]


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

    units: a root label each, int64, ascending. name: of the node that makes them.
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
    _births: list[int] = field(default_factory=list)  # how many labels each array was made with
    _names: list[str] = field(default_factory=list)  # of the arrays
    _joined: list[tuple[Array, Array]] = field(default_factory=list)
    _frozen: list[tuple[Array, str]] = field(default_factory=list)
    _count: int = 0
    _known: Array | None = None  # the root of every label, once asked for

    # --- building ----------------------------------------------------------------------------------
    def fresh(self, count: int, name: str) -> Array:
        first = self._count
        self._count += count
        self._births.append(count)
        self._names.append(name)
        self._known = None
        return np.arange(first, self._count)

    def join(self, a: Array, b: Array) -> None:
        """Position by position; raises ValueError for arrays of two sizes."""
        if len(a) != len(b):
            raise ValueError(f"{len(a)} labels cannot be joined with {len(b)}")
        if a is not b:
            self._joined.append((a, b))
            self._known = None

    def gather(self, labels: Array, like: Array) -> Array:
        """One label for each distinct number in `like`, which says for each label what it is joined with."""
        _, firsts, which = np.unique(like, return_index=True, return_inverse=True)
        representative = labels[firsts]
        self.join(representative[which], labels)
        return representative

    def freeze(self, labels: Array, why: str) -> None:
        self._frozen.append((labels, why))

    def freeze_value(self, value: ir.Value | None, why: str) -> None:
        for labels in self.axes(value).values():
            self.freeze(labels, why)

    def axes(self, value: ir.Value | None) -> dict[int, Array]:
        return {} if value is None else self.on.get(value.name or "", {})

    def put(self, value: ir.Value, axis: int, labels: Array) -> None:
        self.on.setdefault(value.name or "", {})[axis] = labels

    # --- asking ------------------------------------------------------------------------------------
    def root(self, label: int) -> int:
        return int(self._all_roots()[label])

    def roots(self, labels: Array) -> Array:
        return self._all_roots()[labels]

    def _all_roots(self) -> Array:
        if self._known is None:
            self._known = components(self._count, self._joined)
        return self._known

    def _kin(self) -> Array:
        """For each label the first of the arrays whose labels are joined with those of its own array."""
        born = np.repeat(np.arange(len(self._births)), self._births)
        return components(len(self._births), [(born[a], born[b]) for a, b in self._joined])[born]

    @property
    def count(self) -> int:
        return self._count

    def families(self) -> list[Family]:
        """All of them, frozen ones too, in the order of the nodes that make them. A family is frozen as a whole."""
        kin, roots = self._kin(), self._all_roots()
        why: dict[int, str] = {}
        for labels, reason in self._frozen:
            for family in np.unique(kin[labels]).tolist():
                why.setdefault(family, reason)
        read = {n for s in self.sites if s.role == "in" for n in np.unique(kin[s.labels]).tolist()}
        units = np.flatnonzero(roots == np.arange(self._count))
        out = []
        for family in np.unique(kin).tolist():
            own = units[kin[units] == family]
            alone = "these channels can only go all together" if len(own) < 2 else ""
            unread = "" if family in read else "no weights read these channels"
            out.append(Family(self._names[family], own, why.get(family, alone or unread)))
        return out

    def everything(self) -> Array:
        """bool per label: keep all."""
        return np.ones(self.count, bool)

    def without(self, units: Iterable[int]) -> Array:
        """bool per label: all but those whose root is one of `units`."""
        gone = np.zeros(self.count, bool)
        gone[np.fromiter(units, np.int64)] = True
        return ~gone[self._all_roots()]

    def emptied(self, keep: Array) -> str:
        """The first value that has no position left along some axis, as a part of a Split may; "" if none."""
        for name, axes in self.on.items():
            if any(len(labels) and not keep[labels].any() for labels in axes.values()):
                return name
        return ""


def components(count: int, pairs: Sequence[tuple[Array, Array]]) -> Array:
    """The smallest member of each number's component: int64 (count,); pairs: arrays of numbers joined one to one.

    Trees are hooked under smaller ones and flattened, all at once, until no pair lies in two (Shiloach & Vishkin 1982).
    """
    root = np.arange(count)
    if not pairs:
        return root
    a, b = (np.concatenate([np.asarray(pair[side]) for pair in pairs]) for side in (0, 1))
    while True:
        one, other = root[a], root[b]
        apart = one != other
        if not apart.any():
            return root
        a, b, one, other = a[apart], b[apart], one[apart], other[apart]
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(above := root[root], root):
            root = above


@dataclass
class Meter:
    """Counts multiply-accumulates and parameters of what is kept, quickly enough to be asked for each step."""

    coupling: Coupling
    sizes: Mapping[str, Sequence[int]]  # "node:position" -> shape of the constant

    def macs(self, keep: Array) -> float:
        counts, labels = self._works
        return float(counts @ labels.shares(keep))

    def parameters(self, keep: Array) -> float:
        counts, labels = self._constants
        return float(counts @ labels.shares(keep))

    @cached_property
    def _works(self) -> tuple[Array, _Products]:
        works = self.coupling.works
        return np.array([w.macs for w in works]), _Products.of([w.factors for w in works])

    @cached_property
    def _constants(self) -> tuple[Array, _Products]:
        axes: dict[str, list[Array]] = {name: [] for name in self.sizes}
        for site in self.coupling.sites:
            axes[f"{site.node}:{site.position}"].append(site.labels)
        counts = np.array([float(np.prod(self.sizes[name])) for name in axes])
        return counts, _Products.of(list(axes.values()))


@dataclass(frozen=True)
class _Products:
    """For each of several things arrays of labels, all in one, where each array starts, and whose it is."""

    count: int
    labels: Array
    starts: Array
    lengths: Array
    owners: Array

    @staticmethod
    def of(things: Sequence[Sequence[Array]]) -> _Products:
        found = [(owner, labels) for owner, arrays in enumerate(things) for labels in arrays if len(labels)]
        lengths = np.array([len(labels) for _, labels in found], np.int64)
        return _Products(
            len(things),
            np.concatenate([np.array([], np.int64), *(labels for _, labels in found)]),
            np.cumsum(lengths) - lengths,
            lengths,
            np.array([owner for owner, _ in found], np.int64),
        )

    def shares(self, keep: Array) -> Array:
        """float64: of each thing the product of the shares of its arrays that are kept."""
        out = np.ones(self.count)
        if len(self.labels):
            kept = np.add.reduceat(keep[self.labels].astype(np.int64), self.starts)
            np.multiply.at(out, self.owners, kept / self.lengths)
        return out


def sizes(value: ir.Value | None) -> list[int | None] | None:
    """Sizes of a value, None for those that are not numbers; None if the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else None for d in value.shape]


def macs(node: ir.Node) -> float:
    """Multiply-accumulates per sample as the graph stands, 0 if the operator has none or a size is unknown."""
    x, weight = sizes(node.inputs[0]) if node.inputs else None, sizes(node.inputs[1]) if len(node.inputs) > 1 else None
    if x is None or weight is None:
        return 0.0
    if node.op_type in ("Conv", "ConvTranspose"):
        return per_sample(node.inputs[0] if node.op_type == "ConvTranspose" else node.outputs[0]) * _product(weight[1:])
    if node.op_type in ("MatMul", "Gemm"):
        last = 0 if node.op_type == "Gemm" and G.integer(node, "transA", 0) else len(x) - 1
        return per_sample(node.outputs[0]) * (x[last] or 1)
    if node.op_type in ("LSTM", "GRU", "RNN"):
        return _product(x[:2]) * (_product(weight) + _product(sizes(node.inputs[2]) or ()))
    return 0.0


def _product(dims: Iterable[int | None]) -> float:
    return float(np.prod([d or 1 for d in dims]))


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
