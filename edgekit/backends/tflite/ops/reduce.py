"""Reductions along axes, their extremes' places, and running sums: in the layout that exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgekit.backends.tflite.emitter import Emitter
from edgekit.backends.tflite.graph import Layout, Tensor
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.ops.moves import same_scale
from edgekit.backends.tflite.values import Node, Refused, Value

_FIX_BATCH = "fix the batch: --shape INPUT=1,..."
_NONE = "NONE"


def _axes(n: Node, x: Value) -> list[int]:
    if n.op.startswith("Global"):
        return list(range(2, x.rank))
    given = n.const(1)
    axes = [int(a) % max(x.rank, 1) for a in given.reshape(-1)] if given is not None else list(n.ints("axes"))
    axes = [a % max(x.rank, 1) for a in axes]
    if axes or n.int("noop_with_empty_axes", 0):
        return axes
    return list(range(x.rank))


def _without(layout: Layout, axes: Sequence[int]) -> Layout:
    """The layout of what is left once `axes` are gone."""
    rest = [a for a in layout if a not in axes]
    return tuple(sorted(rest).index(a) for a in rest)


def _reduce(code: str) -> Callable[[Emitter, Node], None]:
    def run(e: Emitter, n: Node) -> None:
        x, out = n.require(0), n.outputs[0]
        if code in ("REDUCE_MAX", "REDUCE_MIN"):
            same_scale(x, out)
        axes, layout = _axes(n, x), existing(e, x)
        _write(e, n, code, e.tensor(x, layout), x, axes, layout)

    return run


def _write(e: Emitter, n: Node, code: str, tensor: Tensor, x: Value, axes: Sequence[int], layout: Layout) -> None:
    """The reduction of `tensor`, which holds a value of x's shape in `layout`, as the node's result."""
    out = n.outputs[0]
    if not axes:
        return e.define(out, tensor, layout)
    keep = n.op.startswith("Global") or bool(n.int("keepdims", 1))
    where = e.constant(np.array(sorted(layout.index(a) for a in axes), np.int32))
    wanted = layout if keep else _without(layout, axes)
    e.emit(out, code, [tensor, where], wanted, keepDims=keep)


def _after(before: str, code: str, then: str = "") -> Callable[[Emitter, Node], None]:
    """A reduction of `before`(x), and an operator on its result."""

    def run(e: Emitter, n: Node) -> None:
        x, out = n.require(0), n.outputs[0]
        axes, layout = _axes(n, x), existing(e, x)
        tensor = e.tensor(x, layout)
        if before == "SQUARE" and x.dtype != np.float32:
            tensor = e.op("MUL", [tensor, tensor], tensor.shape, dynamic=tensor.dynamic, fusedActivationFunction=_NONE)
        elif before:
            tensor = e.op(before, [tensor], tensor.shape, dynamic=tensor.dynamic)
        if not then:
            return _write(e, n, code, tensor, x, axes, layout)
        inner = Value(f"{out.name}/reduced", out.dtype, out.shape, out.dynamic)
        _write(e, Node(n.op, n.name, n.inputs, [inner], n.attributes), code, tensor, x, axes, layout)
        wanted = e.layouts(inner)[0]
        e.emit(out, then, [e.tensor(inner, wanted)], wanted)

    return run


def _log_sum_exp(e: Emitter, n: Node) -> None:
    """log Σ exp(x − max) + max, which no large x overflows."""
    x, out = n.require(0), n.outputs[0]
    axes, layout = _axes(n, x), existing(e, x)
    tensor = e.tensor(x, layout)
    if not axes:
        return e.define(out, tensor, layout)
    where = e.constant(np.array(sorted(layout.index(a) for a in axes), np.int32))
    shape = tuple(1 if a in axes else x.shape[a] for a in layout)
    dynamic = {k for k, a in enumerate(layout) if a in x.dynamic and a not in axes}
    top = e.op("REDUCE_MAX", [tensor, where], shape, dynamic=dynamic, keepDims=True)
    less = e.op("SUB", [tensor, top], tensor.shape, dynamic=tensor.dynamic, fusedActivationFunction=_NONE)
    powers = e.op("EXP", [less], tensor.shape, dynamic=tensor.dynamic)
    logs = e.op("LOG", [e.op("SUM", [powers, where], shape, dynamic=dynamic, keepDims=True)], shape, dynamic=dynamic)
    whole = e.op("ADD", [logs, top], shape, dynamic=dynamic, fusedActivationFunction=_NONE)
    if n.int("keepdims", 1):
        return e.define(out, whole, layout)
    wanted = _without(layout, axes)
    e.define(
        out,
        e.reshape(whole, [out.shape[a] for a in wanted], {k for k, a in enumerate(wanted) if a in out.dynamic}),
        wanted,
    )


def _arg(code: str) -> Callable[[Emitter, Node], None]:
    def run(e: Emitter, n: Node) -> None:
        x, out = n.require(0), n.outputs[0]
        if n.int("select_last_index", 0):
            raise Refused("it wants the last of equal places", "LiteRT gives the first")
        axis, layout = n.int("axis", 0) % x.rank, existing(e, x)
        if axis in x.dynamic:
            raise Refused("it searches along the batch", _FIX_BATCH)
        where = e.constant(np.array(layout.index(axis), np.int32))
        rest = _without(layout, [axis])
        shape = [x.shape[a] for a in layout if a != axis]
        dynamic = {k for k, a in enumerate(a for a in layout if a != axis) if a in x.dynamic}
        made = e.op(code, [e.tensor(x, layout), where], shape, dtype=np.int64, dynamic=dynamic, outputType="INT64")
        if not n.int("keepdims", 1):
            return e.define(out, made, rest)
        grown = {k for k, a in enumerate(layout) if a in out.dynamic}
        e.define(out, e.reshape(made, [out.shape[a] for a in layout], grown), layout)

    return run


def _top_k(e: Emitter, n: Node) -> None:
    """LiteRT's finds the largest along the last axis, sorted, earlier places first; a negation finds the smallest."""
    x, k = n.require(0), n.const(1)
    assert k is not None
    axis = n.int("axis", -1) % x.rank
    if axis in x.dynamic:
        raise Refused("it searches along the batch", _FIX_BATCH)
    if not n.int("largest", 1) and x.dtype != np.float32:
        raise Refused("the smallest of integers", "negate the input and take the largest")
    values, places = n.outputs[0], n.outputs[1] if len(n.outputs) > 1 else None
    if values.quant is not None:
        same_scale(x, values)
    layout = (*(a for a in existing(e, x) if a != axis), axis)
    tensor = e.tensor(x, layout)
    negated = not n.int("largest", 1)
    if negated:
        tensor = e.op("NEG", [tensor], tensor.shape, dynamic=tensor.dynamic)
    count = e.constant(np.array(int(k.reshape(-1)[0]), np.int32))
    best = e.blank(values, layout) if values.name else None
    if best is None:
        raise Refused("its values have no name", "name both outputs")
    index = Tensor(f"{n.name}/places", np.dtype(np.int32), best.shape, best.dynamic)
    e.write("TOPK_V2", [tensor, count], [best, index])
    if negated:
        best = e.op("NEG", [best], best.shape, dynamic=best.dynamic, name=values.name)
    e.define(values, best, layout)
    if places is not None and places.name:
        e.emit(places, "CAST", [index], layout, inDataType="INT32", outDataType="INT64")


def _cumulative(e: Emitter, n: Node) -> None:
    x, axis = n.require(0), n.const(1)
    assert axis is not None
    layout = existing(e, x)
    where = e.constant(np.array(layout.index(int(axis.reshape(-1)[0]) % x.rank), np.int32))
    flags = {"exclusive": bool(n.int("exclusive", 0)), "reverse": bool(n.int("reverse", 0))}
    e.emit(n.outputs[0], "CUMSUM", [e.tensor(x, layout), where], layout, **flags)


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    "ReduceMean": _reduce("MEAN"),
    "GlobalAveragePool": _reduce("MEAN"),
    "ReduceSum": _reduce("SUM"),
    "ReduceMax": _reduce("REDUCE_MAX"),
    "GlobalMaxPool": _reduce("REDUCE_MAX"),
    "ReduceMin": _reduce("REDUCE_MIN"),
    "ReduceProd": _reduce("REDUCE_PROD"),
    "ReduceL1": _after("ABS", "SUM"),
    "ReduceL2": _after("SQUARE", "SUM", "SQRT"),
    "ReduceSumSquare": _after("SQUARE", "SUM"),
    "ReduceLogSum": _after("", "SUM", "LOG"),
    "ReduceLogSumExp": _log_sum_exp,
    "ArgMax": _arg("ARG_MAX"),
    "ArgMin": _arg("ARG_MIN"),
    "TopK": _top_k,
    "CumSum": _cumulative,
}
