"""Einsum: sums, then a BATCH_MATMUL or a FULLY_CONNECTED for each pair of operands."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.graph import Tensor
from edgekit.backends.tflite.values import Node, Refused, Value

_MOST_BATCH_AXES = 3  # BATCH_MATMUL takes tensors of up to five axes
_ELLIPSIS = string.digits  # labels of the axes that "..." stands for, last one "9"


@dataclass(frozen=True)
class _Term:
    """An operand. labels: a letter per axis of the value, in ONNX's order."""

    value: Value
    labels: str

    def size(self, label: str) -> int:
        return self.value.shape[self.labels.index(label)]

    def grows(self, label: str) -> bool:
        return label in self.labels and self.labels.index(label) in self.value.dynamic

    def tensor(self, e: Emitter, order: str) -> Tensor:
        """The operand with its axes in this order in memory."""
        return e.tensor(self.value, tuple(self.labels.index(c) for c in order))

    def exists(self, e: Emitter, order: str) -> bool:
        return tuple(self.labels.index(c) for c in order) in e.layouts(self.value)


def _einsum(e: Emitter, n: Node) -> None:
    values = [v for v in n.inputs if v is not None]
    if any(v.dtype != np.float32 for v in values):
        raise Refused(f"Einsum of {values[0].dtype}", "cast to float32")
    inputs, output = _parsed(n.str("equation", ""), [v.rank for v in values])
    terms = [_Term(v, labels) for v, labels in zip(values, inputs, strict=True)]
    _check_sizes(terms)
    while len(terms) > 1:
        first, second, *rest = terms
        wanted = set(output).union(*(t.labels for t in rest))
        terms = [_contracted(e, n, first, second, wanted, output), *rest]
    last = _summed(e, n, terms[0], set(output))
    perm = tuple(last.labels.index(c) for c in output)
    e.rename(n.outputs[0], last.value, perm)


def _parsed(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Labels of each input and of the output, "..." written out."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    if len(parts) != len(ranks):
        raise Refused(f"its equation names {len(parts)} operands, not {len(ranks)}", "correct the equation")
    spare = [r - len(p.replace("...", "")) for p, r in zip(parts, ranks, strict=True)]
    inputs = [p.replace("...", _ellipsis(s)) for p, s in zip(parts, spare, strict=True)]
    widest = _ellipsis(max((s for p, s in zip(parts, spare, strict=True) if "..." in p), default=0))
    if arrow:
        output = right.replace("...", widest)
    else:
        letters = "".join(p.replace("...", "") for p in parts)
        output = widest + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if any(len(set(p)) != len(p) for p in (*inputs, output)):
        raise Refused("an operand with the same label twice", "take the diagonal before")
    if any(len(p) != r for p, r in zip(inputs, ranks, strict=True)):
        raise Refused("its equation does not fit its operands' ranks", "correct the equation")
    return inputs, output


def _ellipsis(count: int) -> str:
    return _ELLIPSIS[len(_ELLIPSIS) - count :] if count > 0 else ""


def _check_sizes(terms: Iterable[_Term]) -> None:
    sizes: dict[str, tuple[int, bool]] = {}
    for term in terms:
        for label in term.labels:
            size = (term.size(label), term.grows(label))
            if sizes.setdefault(label, size) != size:
                raise Refused(f"axis {label} has two sizes", "Expand the operand first")


# --- one step ------------------------------------------------------------------------------------------------
def _summed(e: Emitter, n: Node, term: _Term, wanted: set[str]) -> _Term:
    """The term summed over the axes that nobody wants."""
    gone = [k for k, c in enumerate(term.labels) if c not in wanted]
    if not gone:
        return term
    layout = (e.layouts(term.value) or [identity(term.value.rank)])[0]
    where = e.constant(np.array(sorted(layout.index(a) for a in gone), np.int32))
    labels = "".join(c for c in term.labels if c in wanted)
    out = _value(n, labels, [term])
    left = [term.labels[a] for a in layout if a not in gone]
    e.emit(out, "SUM", [e.tensor(term.value, layout), where], tuple(labels.index(c) for c in left), keepDims=False)
    return _Term(out, labels)


def _contracted(e: Emitter, n: Node, a: _Term, b: _Term, wanted: set[str], output: str) -> _Term:
    """The product of two terms, summed over what neither the output nor a later operand has."""
    a = _summed(e, n, a, wanted | set(b.labels))
    b = _summed(e, n, b, wanted | set(a.labels))
    if a.value.data is not None:
        a, b = b, a
    shared = [c for c in a.labels if c in b.labels]
    batch = sorted((c for c in shared if c in wanted), key=lambda c: (output + c).index(c))
    inner = "".join(c for c in shared if c not in wanted)
    rows, columns = ("".join(c for c in t.labels if c not in shared) for t in (a, b))
    labels = "".join(batch) + rows + columns
    out = _value(n, labels, [a, b])
    if not inner:
        _multiplied(e, a, b, labels, out)
    elif b.value.data is not None and not batch:
        _dense(e, a, b, (rows, columns, inner), out)
    else:
        _batched(e, a, b, ("".join(batch), rows, columns, inner), out)
    return _Term(out, labels)


def _value(n: Node, labels: str, terms: Sequence[_Term]) -> Value:
    owners = [next(t for t in terms if c in t.labels) for c in labels]
    shape = tuple(t.size(c) for t, c in zip(owners, labels, strict=True))
    dynamic = frozenset(k for k, (t, c) in enumerate(zip(owners, labels, strict=True)) if t.grows(c))
    return Value(n.outputs[0].name, np.dtype(np.float32), shape, dynamic)


def _multiplied(e: Emitter, a: _Term, b: _Term, labels: str, out: Value) -> None:
    tensors = []
    for term in (a, b):
        tensor = term.tensor(e, "".join(c for c in labels if c in term.labels))
        shape = [term.size(c) if c in term.labels else 1 for c in labels]
        tensors.append(e.reshape(tensor, shape, {k for k, c in enumerate(labels) if term.grows(c)}))
    e.emit(out, "MUL", tensors, fusedActivationFunction="NONE")


def _dense(e: Emitter, a: _Term, b: _Term, groups: tuple[str, str, str], out: Value) -> None:
    """By a constant matrix."""
    rows, columns, inner = groups
    assert b.value.data is not None
    weight = b.value.data.transpose([b.labels.index(c) for c in columns + inner])
    weight = np.ascontiguousarray(weight.reshape(_product(b, columns), _product(b, inner)))
    x = _grouped(e, a, [rows, inner])
    kernel = e.constant(weight, b.value.name)
    bias = e.constant(np.zeros(len(weight), np.float32))
    y = e.op(
        "FULLY_CONNECTED", [x, kernel, bias], (x.shape[0], len(weight)), dynamic=x.dynamic,
        fusedActivationFunction="NONE", keepNumDims=False, weightsFormat="DEFAULT",
    )  # fmt: skip
    e.define(out, e.reshape(y, out.shape, out.dynamic, out.name))


def _batched(e: Emitter, a: _Term, b: _Term, groups: tuple[str, str, str, str], out: Value) -> None:
    batch, rows, columns, inner = groups
    if any(a.grows(c) or b.grows(c) for c in inner):
        raise Refused("it sums over the batch", "fix the batch: --shape INPUT=1,...")
    outer = [batch] if len(batch) > _MOST_BATCH_AXES else list(batch)
    turned = not b.exists(e, batch + inner + columns) and b.exists(e, batch + columns + inner)
    left = _grouped(e, a, [*outer, rows, inner])
    right = _grouped(e, b, [*outer, columns, inner] if turned else [*outer, inner, columns])
    shape = (*left.shape[:-1], right.shape[-2 if turned else -1])
    last = len(shape) - 1
    dynamic = {k for k in left.dynamic if k < last} | ({last} if any(b.grows(c) for c in columns) else set())
    y = e.op("BATCH_MATMUL", [left, right], shape, dynamic=dynamic, adjX=False, adjY=turned)
    e.define(out, e.reshape(y, out.shape, out.dynamic, out.name))


def _grouped(e: Emitter, term: _Term, groups: Sequence[str]) -> Tensor:
    """The operand with each group of axes as one."""
    tensor = term.tensor(e, "".join(groups))
    dynamic = {k for k, g in enumerate(groups) if any(term.grows(c) for c in g)}
    return e.reshape(tensor, [_product(term, g) for g in groups], dynamic)


def _product(term: _Term, labels: str) -> int:
    return int(np.prod([term.size(c) for c in labels], dtype=np.int64))


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {"Einsum": _einsum}
