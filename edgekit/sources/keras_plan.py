"""What a Keras model is built of: layers with weights, functions, and values as Keras sees them, axes in another order.

A value of the graph is a `View` of a Keras tensor: which of the tensor's axes make up each axis of the value. So
Transpose, Squeeze, Flatten and most Reshapes cost nothing; convolutions find their channels last, as TensorFlow wants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.errors import UnsupportedOpError

Array = np.ndarray[Any, Any]
# Stands for the free batch among sizes: a prime larger than any axis, so that its multiples are batches, joined or not.
FREE = 1_000_003


@dataclass(frozen=True)
class Weight:
    """A weight of a layer and where in the graph it is from.

    values: as Keras holds it. name: the initializer; index: for each value its flat position there, of the same shape;
    initializer[index] = (values - offset) / scale. No name: it is from nowhere (a bias that the graph has not).
    """

    values: Array
    name: str = ""
    index: Array | None = None
    scale: float = 1.0
    offset: Array | None = None

    def moved(self, move: Callable[[Array], Array]) -> Weight:
        """The same weight with its axes moved: transposed, reshaped, sliced."""
        return Weight(
            move(self.values),
            self.name,
            None if self.index is None else move(self.index),
            self.scale,
            None if self.offset is None else move(self.offset),
        )

    def scaled(self, scale: float) -> Weight:
        return Weight((self.values * scale).astype(self.values.dtype), self.name, self.index, self.scale * scale)


def weight(name: str, values: Array) -> Weight:
    """An initializer as it is."""
    return Weight(values, name, np.arange(values.size).reshape(values.shape))


@dataclass(frozen=True)
class Ref:
    """A Keras tensor by its name in the plan."""

    name: str


@dataclass
class Step:
    """One call. layer: a class of keras.layers with its config, or else function: of keras.ops with its arguments.

    inner: for Bidirectional, the class and config of what it wraps. takes: the piece of a list result that is wanted.
    arguments: Refs, arrays and plain values, or lists of them.
    """

    output: str
    layer: str = ""
    function: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    inner: str = ""
    arguments: list[Any] = field(default_factory=list)
    keywords: dict[str, Any] = field(default_factory=dict)
    weights: list[Weight] = field(default_factory=list)
    takes: int | None = None


@dataclass(frozen=True)
class View:
    """dims: sizes of the Keras tensor `ref`, FREE for the batch. groups: for each axis of the value, the tensor's axes
    that make it up, the slowest first; none for an axis of size 1. Tensor axes that no group names have size 1.
    """

    ref: str
    dims: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(product(self.dims[i] for i in g) for g in self.groups)

    def padded(self, rank: int) -> View:
        """With axes of size 1 in front."""
        return View(self.ref, self.dims, ((),) * (rank - len(self.groups)) + self.groups)

    def single(self, axis: int) -> int | None:
        """The one tensor axis that is this axis of the value, if it is one."""
        group = self.groups[axis]
        return group[0] if len(group) == 1 else None

    def regrouped(self, shape: Sequence[int]) -> View | None:
        """The value reshaped, if that only joins or separates axes of the tensor."""
        atoms = [i for g in self.groups for i in g if self.dims[i] != 1 or i == 0]
        groups: list[tuple[int, ...]] = []
        at = 0
        for size in shape:
            start, have = at, 1
            while at < len(atoms) and (have < size or (size == 1 and start == at and self.dims[atoms[at]] == 1)):
                have *= self.dims[atoms[at]]
                at += 1
            if have != size:
                return None
            groups.append(tuple(atoms[start:at]))
        if any(self.dims[i] != 1 for i in atoms[at:]):
            return None
        return View(self.ref, self.dims, tuple(groups))


def view(ref: str, dims: Sequence[int]) -> View:
    """A value whose axes are the tensor's."""
    return View(ref, tuple(dims), tuple((i,) for i in range(len(dims))))


def product(sizes: Any) -> int:
    out = 1
    for size in sizes:
        out *= int(size)
    return out


def sizes(dims: Sequence[int]) -> list[int]:
    """As Keras wants them in a reshape: -1 for what depends on the batch."""
    return [-1 if d % FREE == 0 else int(d) for d in dims]


class Builder:
    """Collects steps; names of layers may come twice until `finished`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._moved: dict[tuple[Any, ...], str] = {}

    def layer(
        self, kind: str, inputs: Any, name: str, *, weights: Sequence[Weight] = (), inner: str = "", **config: Any
    ) -> str:
        """A layer of keras.layers; inputs: the name of a tensor, or several in a list. Returns its output's name."""
        given: Any = Ref(inputs) if isinstance(inputs, str) else [Ref(i) for i in inputs]
        step = Step(self._fresh(), layer=kind, name=name, config=config, inner=inner)
        step.arguments, step.weights = [given], list(weights)
        self.steps.append(step)
        return step.output

    def call(self, function: str, *arguments: Any, takes: int | None = None, **keywords: Any) -> str:
        """A function of keras.ops."""
        step = Step(self._fresh(), function=function, arguments=list(arguments), keywords=keywords, takes=takes)
        self.steps.append(step)
        return step.output

    def finished(self, wanted: Sequence[str], taken: Sequence[str]) -> list[Step]:
        """The steps that these tensors need, each layer with a name of its own and none of those taken."""
        needed, steps = set(wanted), []
        for step in reversed(self.steps):
            if step.output in needed:
                needed |= _refs(step.arguments)
                steps.append(step)
        used = set(taken)
        for step in reversed(steps):
            base = re.sub(r"[^A-Za-z0-9_.\-]+", "_", step.name).strip("_.-") or step.function or step.layer.lower()
            step.name, count = base, 0
            while step.name in used:
                count += 1
                step.name = f"{base}_{count}"
            used.add(step.name)
        return steps[::-1]

    def producer(self, ref: str) -> Step | None:
        return next((s for s in reversed(self.steps) if s.output == ref), None)

    def readers(self, ref: str) -> int:
        return sum(ref in _refs(step.arguments) for step in self.steps)

    def _fresh(self) -> str:
        return f"t{len(self.steps)}"

    # --- the same numbers in another order -------------------------------------------------------------------------
    def permute(self, ref: str, order: Sequence[int]) -> str:
        if list(order) == list(range(len(order))):
            return ref
        return self._once(
            ("permute", ref, *order),
            lambda: (
                self.layer("Permute", ref, "permute", dims=[int(i) for i in order[1:]])
                if order[0] == 0
                else self.call("transpose", Ref(ref), axes=[int(i) for i in order])
            ),
        )

    def reshape(self, ref: str, dims: Sequence[int], to: Sequence[int]) -> str:
        if tuple(dims) == tuple(to):
            return ref

        def make() -> str:
            if to and dims and dims[0] == to[0]:
                if len(to) == 2 and len(dims) > 2:
                    return self.layer("Flatten", ref, "flatten")
                return self.layer("Reshape", ref, "reshape", target_shape=sizes(to[1:]))
            return self.call("reshape", Ref(ref), sizes(to))

        return self._once(("reshape", ref, *to), make)

    def _once(self, key: tuple[Any, ...], make: Callable[[], str]) -> str:
        if key not in self._moved:
            self._moved[key] = make()
        return self._moved[key]

    def ordered(self, given: View, order: Sequence[int], to: Sequence[int]) -> str:
        """A tensor of sizes `to` that holds the tensor's axes in this order; axes left out have size 1."""
        used = [i for i in order if given.dims[i] != 1]
        if used == sorted(used):
            return self.reshape(given.ref, given.dims, to)
        rest = [i for i in range(len(given.dims)) if i not in order]
        full = [*order, *rest]
        return self.reshape(self.permute(given.ref, full), [given.dims[i] for i in full], to)

    def arranged(self, given: View, axes: Sequence[int]) -> str:
        """A tensor whose axes are these of the value; axes of the value left out have size 1."""
        order = [i for a in axes for i in given.groups[a]]
        return self.ordered(given, order, [given.shape[a] for a in axes])

    def plain(self, given: View) -> str:
        """A tensor with the value's own axes."""
        return self.arranged(given, range(len(given.groups)))

    def separate(self, given: View) -> View:
        """The value as a tensor of which each axis is one of the value's or of size 1."""
        if all(len(g) <= 1 for g in given.groups):
            return given
        return view(self.plain(given), given.shape)

    # --- several values side by side -------------------------------------------------------------------------------
    def aligned(self, operands: Sequence[View | Array], shape: Sequence[int]) -> tuple[list[str | Array], View]:
        """Tensors and arrays that broadcast against each other to a value of this shape, and the view of the result.

        The view's ref is empty: whoever combines them fills it in.
        """
        rank = len(shape)
        views = [v.padded(rank) if isinstance(v, View) else v for v in operands]
        found = [v for v in views if isinstance(v, View)]
        leader = next((v for v in found if v.shape == tuple(shape)), None)
        if leader is None or not all(_fits(v, leader) for v in found):
            leader = view("", shape)
        out: list[str | Array] = [
            self._conformed(v, leader) if isinstance(v, View) else _conformed_array(v, leader) for v in views
        ]
        return out, View("", leader.dims, leader.groups)

    def _conformed(self, given: View, leader: View) -> str:
        if given.ref == leader.ref and given.groups == leader.groups:
            return given.ref
        if not _fits(given, leader):
            given = view(self.plain(given), given.shape)
        matches: dict[int, int] = {}
        for mine, theirs in zip(given.groups, leader.groups, strict=True):
            large = _large(mine, given.dims)
            if large:
                matches |= dict(zip(_large(theirs, leader.dims), large, strict=True))
        order = [matches[j] for j in range(len(leader.dims)) if j in matches]
        to = [given.dims[matches[j]] if j in matches else 1 for j in range(len(leader.dims))]
        return self.ordered(given, order, to)


def _large(group: Sequence[int], dims: Sequence[int]) -> list[int]:
    return [i for i in group if dims[i] != 1]


def _fits(given: View, leader: View) -> bool:
    """True if each axis of the value is made of the same sizes in both, or is broadcast."""
    for mine, theirs in zip(given.groups, leader.groups, strict=True):
        sizes_of_mine = [given.dims[i] for i in _large(mine, given.dims)]
        if sizes_of_mine and sizes_of_mine != [leader.dims[i] for i in _large(theirs, leader.dims)]:
            return False
    return True


def _conformed_array(array: Array, leader: View) -> Array:
    """A constant in the axes of the leader's tensor, without axes of size 1 in front."""
    rank = len(leader.groups)
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    split, order = [], []
    for axis, group in enumerate(leader.groups):
        split += [leader.dims[i] if array.shape[axis] != 1 else 1 for i in group] if group else []
        order += list(group)
    missing = [i for i in range(len(leader.dims)) if i not in order]
    array = array.reshape([*split, *[1] * len(missing)])
    array = array.transpose(np.argsort([*order, *missing]))
    while array.ndim and array.shape[0] == 1:
        array = array[0]
    return np.asarray(array)


def _refs(given: Any) -> set[str]:
    if isinstance(given, Ref):
        return {given.name}
    return {n for item in given for n in _refs(item)} if isinstance(given, (list, tuple)) else set()


def refused(op: str, node: str | None, why: str = "") -> UnsupportedOpError:
    """The error of an operator that has no Keras form."""
    return UnsupportedOpError(
        f"operator {op} of node '{node or ''}' has no Keras form{f': {why}' if why else ''}", "keep the ONNX model"
    )
