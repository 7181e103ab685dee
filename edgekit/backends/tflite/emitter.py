"""Writes operators into the file's graph and keeps, for each ONNX value, the layouts in which it is stored.

An ONNX Transpose writes nothing: it says that a value is another one with its axes renamed. A TRANSPOSE appears only
where an operator needs a value in a layout that nobody has made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgekit.backends.tflite.graph import Array, Graph, Layout, Operator, Quant, Tensor
from edgekit.backends.tflite.rules import RULES
from edgekit.backends.tflite.values import Node, Refused, Value


def identity(rank: int) -> Layout:
    return tuple(range(rank))


def channels_last(rank: int) -> Layout:
    """Batch, spatial axes, channels: (0, 2, 3, 1) for rank 4."""
    return (0, *range(2, rank), 1)


class Emitter:
    """What the lowering of an operator writes with. `node` is the ONNX node in work, for names."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.node: Node | None = None
        self._stored: dict[Value, dict[Layout, Tensor]] = {}
        self._renamed: dict[Value, tuple[Value, Layout]] = {}
        self._readers: dict[Value, list[Node]] = {}
        self._returned: set[Value] = set()
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._shuffled: dict[Value, tuple[Tensor, Array]] = {}

    # --- reading values ------------------------------------------------------------------------------
    def layouts(self, value: Value) -> list[Layout]:
        """The layouts in which `value` exists already; empty for a constant, which takes any for free."""
        if value in self._renamed:
            source, perm = self._renamed[value]
            back = [perm.index(a) for a in range(len(perm))]  # logical axis of `value` that is the source's axis a
            return [tuple(back[a] for a in layout) for layout in self.layouts(source)]
        return [] if value.data is not None else list(self._stored.get(value, ()))

    def tensor(self, value: Value, layout: Layout | None = None) -> Tensor:
        """The tensor that holds `value` in `layout` (ONNX's own axis order by default); transposed if need be."""
        layout = identity(value.rank) if layout is None else tuple(layout)
        if value in self._renamed:
            source, perm = self._renamed[value]
            return self.tensor(source, tuple(perm[a] for a in layout))
        stored = self._stored.setdefault(value, {})
        if layout not in stored:
            stored[layout] = self._constant_of(value, layout) if value.data is not None else self._moved(value, layout)
        return stored[layout]

    def real(self, value: Value) -> Value:
        """`value` itself if it is not quantized, else its numbers as float32: a constant, or behind a DEQUANTIZE."""
        if value.quant is None:
            return value
        key = f"{value.name}_real"
        if value.data is not None:
            return Value(key, np.dtype(np.float32), value.shape, value.dynamic, value.real)
        out = Value(key, np.dtype(np.float32), value.shape, value.dynamic)
        layout = (self.layouts(value) or [identity(value.rank)])[0]
        self.emit(out, "DEQUANTIZE", [self.tensor(value, layout)], layout)
        return out

    def readers(self, value: Value) -> list[Node]:
        """The nodes that read `value`."""
        return self._readers.get(value, [])

    def returned(self, value: Value) -> bool:
        """Whether `value` is an output of the graph, which is read as it is."""
        return value in self._returned

    def know(self, nodes: Iterable[Node], outputs: Iterable[Value]) -> None:
        self._returned.update(outputs)
        for node in nodes:
            for value in dict.fromkeys(v for v in node.inputs if v is not None):
                self._readers.setdefault(value, []).append(node)

    # --- writing values ------------------------------------------------------------------------------
    def define(self, value: Value, tensor: Tensor, layout: Layout | None = None) -> None:
        """`tensor` holds `value` in `layout`."""
        self._stored.setdefault(value, {})[identity(value.rank) if layout is None else tuple(layout)] = tensor

    def rename(self, value: Value, source: Value, perm: Layout) -> None:
        """`value` is `source` transposed: its axis j is the source's axis perm[j]. Writes nothing."""
        self._renamed[value] = (source, tuple(perm))

    def emit(
        self, value: Value, code: str, inputs: Sequence[Tensor | None], layout: Layout | None = None, **options: Any
    ) -> Tensor:
        """Write an operator whose only output is `value`, stored in `layout`."""
        layout = identity(value.rank) if layout is None else tuple(layout)
        tensor = self.blank(value, layout)
        self.write(code, inputs, [tensor], **options)
        self.define(value, tensor, layout)
        return tensor

    def blank(self, value: Value, layout: Layout | None = None) -> Tensor:
        """A tensor that an operator may write `value` to in `layout`; not yet defined as it."""
        layout = identity(value.rank) if layout is None else tuple(layout)
        return Tensor(
            value.name,
            value.dtype,
            tuple(value.shape[a] for a in layout),
            frozenset(k for k, a in enumerate(layout) if a in value.dynamic),
            None if value.quant is None else value.quant.on(layout.index(value.quant.axis) if value.rank else 0),
        )

    def shuffle(self, value: Value, tensor: Tensor, order: Array) -> None:
        """`tensor` holds `value` (batch, features) with its features in another order: its k-th is the order[k]-th."""
        self._shuffled[value] = (tensor, order)

    def shuffled(self, value: Value) -> tuple[Tensor, Array] | None:
        """What `shuffle` noted, where nothing holds `value` as it is: a dense layer permutes its weights instead."""
        return self._shuffled.get(value)

    def checkpoint(self) -> Callable[[], None]:
        """A function that takes back whatever is written from here on."""
        mark, renamed, shuffled = len(self.graph.operators), dict(self._renamed), dict(self._shuffled)
        stored = {value: dict(layouts) for value, layouts in self._stored.items()}

        def undo() -> None:
            del self.graph.operators[mark:]
            self._stored, self._renamed, self._shuffled = stored, renamed, shuffled

        return undo

    # --- writing tensors -----------------------------------------------------------------------------
    def op(
        self,
        code: str,
        inputs: Sequence[Tensor | None],
        shape: Sequence[int],
        *,
        dtype: Any = None,
        quant: Quant | None = None,
        dynamic: Iterable[int] | None = None,
        name: str = "",
        **options: Any,
    ) -> Tensor:
        """Write an operator with one intermediate result. dtype: that of the first input unless given.

        dynamic: axes of the result that grow with the batch; by default axis 0 if it does in any input.
        """
        known = [t for t in inputs if t is not None]
        if dynamic is None:
            dynamic = (0,) if shape and any(0 in t.dynamic for t in known) else ()
        label = name or f"{self._name()}/{code.lower()}"
        made = Tensor(label, np.dtype(dtype or known[0].dtype), tuple(shape), frozenset(dynamic), quant)
        self.write(code, inputs, [made], **options)
        return made

    def write(self, code: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], **options: Any) -> Operator:
        """Write an operator. Refused if LiteRT has no kernel for its type."""
        rule = RULES[code]
        decides = inputs[rule.decides]
        kind = "" if decides is None else decides.kind
        if kind not in rule.versions:
            raise Refused(f"LiteRT's {code} takes no {kind}", _REMEDY_TYPE)
        operator = Operator(code, list(inputs), list(outputs), options, self._name())
        self.graph.operators.append(operator)
        return operator

    def constant(self, array: Any, name: str = "", quant: Quant | None = None) -> Tensor:
        """A constant tensor; equal ones are one. Python ints become int32, as LiteRT's parameters are."""
        data = np.asarray(array, None if isinstance(array, np.ndarray | np.generic) else _DEFAULTS[type(_first(array))])
        data = np.ascontiguousarray(data).reshape(data.shape)
        key: tuple[Any, ...] = (id(data), object())
        if quant is None:
            key = (data.dtype.str, data.shape, hashlib.sha256(data.reshape(-1).view(np.uint8).data).digest())
        if key not in self._constants:
            label = name or f"{self._name()}/const"
            self._constants[key] = Tensor(label, data.dtype, data.shape, frozenset(), quant, data)
        return self._constants[key]

    def reshape(
        self, tensor: Tensor, shape: Sequence[int], dynamic: Iterable[int] | None = None, name: str = ""
    ) -> Tensor:
        """`tensor` with another shape; itself if it has that shape. dynamic: as in `op`."""
        if dynamic is None:
            dynamic = (0,) if shape and 0 in tensor.dynamic else ()
        wanted = frozenset(dynamic)
        if tensor.shape == tuple(shape) and tensor.dynamic == wanted:
            return tensor
        if tensor.data is not None:
            return self.constant(tensor.data.reshape(tuple(shape)), tensor.name, tensor.quant)
        sizes = self.sizes(shape, wanted)
        made = Tensor(name or f"{tensor.name}/reshape", tensor.dtype, tuple(shape), wanted, tensor.quant)
        self.write("RESHAPE", [tensor, self.constant(np.array(sizes, np.int32))], [made], newShape=list(sizes))
        return made

    def sizes(self, shape: Sequence[int], dynamic: Iterable[int]) -> tuple[int, ...]:
        """A shape as RESHAPE takes it: -1 for the axis that grows with the batch."""
        axes = frozenset(dynamic)
        if len(axes) > 1:
            raise Refused("two axes of it grow with the batch", "fix the batch: --shape INPUT=1,...")
        return tuple(-1 if a in axes else size for a, size in enumerate(shape))

    def activate(self, tensor: Tensor, activation: str) -> Tensor:
        """`tensor` after an activation of its own, for operators that have none fused."""
        if activation == "NONE":
            return tensor
        return self.op(activation, [tensor], tensor.shape, quant=tensor.quant, dynamic=tensor.dynamic)

    def aligned(self, values: Sequence[Value], rank: int) -> tuple[Layout, list[Tensor]]:
        """One layout for broadcasting operands of up to `rank` axes, and each operand's tensor in it.

        The layout that needs the fewest TRANSPOSEs. An operand of lower rank is seen with leading axes of size 1.
        """
        values = [_row(v, values, rank) for v in values]
        choices: list[Layout] = []
        for value in values:
            if value.rank == rank:
                choices += [c for c in self.layouts(value) if c not in choices]
        choices.append(identity(rank))
        best = min(choices, key=lambda c: sum(self._cost(v, c) for v in values))
        return best, [self.widened(v, best) for v in values]

    def widened(self, value: Value, layout: Layout) -> Tensor:
        """`value` broadcastable in `layout` (of a higher or the same rank)."""
        missing = len(layout) - value.rank
        if missing == 0:
            return self.tensor(value, layout)
        if value.data is not None:
            data = value.data.reshape((1,) * missing + value.shape)
            quant = value.quant
            return self.constant(_squeezed(np.transpose(data, layout)), value.name, quant)
        own = tuple(a - missing for a in layout if a >= missing)
        tensor = self.tensor(value, own)
        if own == tuple(a - missing for a in layout[missing:]) and all(a < missing for a in layout[:missing]):
            return tensor  # LiteRT adds leading axes itself
        where = [k for k, a in enumerate(layout) if a >= missing]
        shape, dynamic = [1] * len(layout), set()
        for position, k in enumerate(where):
            shape[k] = tensor.shape[position]
            if position in tensor.dynamic:
                dynamic.add(k)
        return self.reshape(tensor, shape, dynamic)

    # --- parts ---------------------------------------------------------------------------------------
    def _cost(self, value: Value, layout: Layout) -> int:
        if value.data is not None:
            return 0
        missing = len(layout) - value.rank
        own = tuple(a - missing for a in layout if a >= missing)
        have = self.layouts(value)
        return (
            0
            if own in have or any(_same_order(value.shape, own, h) for h in have)
            else max(1, int(np.prod(value.shape)))
        )

    def _moved(self, value: Value, layout: Layout) -> Tensor:
        """From a layout that exists: a RESHAPE where only axes of size 1 move, else a TRANSPOSE."""
        have = self._stored[value]
        if not have:
            raise Refused(f"'{value.name}' was not computed")
        shape = tuple(value.shape[a] for a in layout)
        dynamic = frozenset(k for k, a in enumerate(layout) if a in value.dynamic)
        for source, tensor in have.items():
            if _same_order(value.shape, source, layout, value.dynamic):
                return self.reshape(tensor, shape, dynamic, value.name)
        source, tensor = next(iter(have.items()))
        perm = [source.index(a) for a in layout]
        if len(perm) > _MOST_AXES:
            return self.reshape(self._merged_move(tensor, perm), shape, dynamic, value.name)
        made = self.blank(value, layout)
        self.write("TRANSPOSE", [tensor, self.constant(np.array(perm, np.int32))], [made])
        return made

    def _merged_move(self, x: Tensor, perm: Sequence[int]) -> Tensor:
        """`x` transposed by `perm`, with axes that stay neighbours as one and those of size 1 left out."""
        moving = [k for k in perm if x.shape[k] != 1 or k in x.dynamic]
        following = dict(zip(sorted(moving), sorted(moving)[1:], strict=False))
        groups: list[list[int]] = []
        for k in moving:
            if groups and following.get(groups[-1][-1]) == k:
                groups[-1].append(k)
            else:
                groups.append([k])
        before = sorted(groups)

        def sizes(order: list[list[int]]) -> tuple[list[int], set[int]]:
            grown = {i for i, g in enumerate(order) if any(k in x.dynamic for k in g)}
            return [int(np.prod([x.shape[k] for k in g])) for g in order], grown

        shape, dynamic = sizes(before)
        merged = self.reshape(x, shape, dynamic)
        order = self.constant(np.array([before.index(g) for g in groups], np.int32))
        shape, dynamic = sizes(groups)
        return self.op("TRANSPOSE", [merged, order], shape, quant=x.quant, dynamic=dynamic)

    def _constant_of(self, value: Value, layout: Layout) -> Tensor:
        assert value.data is not None
        if value.dynamic:
            raise Refused(f"'{value.name}' grows with the batch", "fix the batch: --shape INPUT=1,...")
        quant = None if value.quant is None else value.quant.on(layout.index(value.quant.axis) if value.rank else 0)
        return self.constant(np.transpose(value.data, layout), value.name, quant)

    def _name(self) -> str:
        return "" if self.node is None else self.node.name


_MOST_AXES = 6  # of a TRANSPOSE in runtimes before LiteRT 2
_REMEDY_TYPE = "cast it to float32 or int32 in the model, or leave the tflite backend out"
_DEFAULTS: dict[type, Any] = {int: np.int32, bool: np.bool_, float: np.float32}


def _first(array: Any) -> Any:
    while isinstance(array, list | tuple):
        if not array:
            return 0
        array = array[0]
    return array


def _row(value: Value, others: Sequence[Value], rank: int) -> Value:
    """A constant that is repeated for each sample needs no repeating beside an operand that has the samples."""
    grows = {a - value.rank for a in value.dynamic}
    if value.data is None or not grows:
        return value
    if any(o.data is None and grows <= {a - o.rank for a in o.dynamic} for o in others):
        return replace(value, dynamic=frozenset())
    return value


def _squeezed(array: Array) -> Array:
    """Without the leading axes of size 1, which broadcasting adds by itself."""
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    return array


def _same_order(shape: tuple[int, ...], first: Layout, second: Layout, dynamic: Iterable[int] = ()) -> bool:
    """Whether both layouts hold the elements in the same order in memory: only axes of size 1 differ in place."""
    large = {a for a, size in enumerate(shape) if size != 1} | set(dynamic)
    return [a for a in first if a in large] == [a for a in second if a in large]
