"""Reductions along axes: sums, extremes, norms, places of extremes, running sums."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.graph import Layout, Tensor
from edgekit.backends.tflite.ops.arithmetic import cast, compute, finish
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.ops.moves import same_scale
from edgekit.backends.tflite.values import Node, Refused, Value

_CODES = {"ReduceMean": "MEAN", "ReduceSum": "SUM", "ReduceProd": "REDUCE_PROD"}
_CODES |= {"ReduceMax": "REDUCE_MAX", "ReduceMin": "REDUCE_MIN"}
_BOOLEAN = {"ReduceMax": "REDUCE_ANY", "ReduceMin": "REDUCE_ALL"}
_BATCH = "fix the batch: --shape INPUT=1,..."


def _axes(n: Node, x: Value) -> tuple[int, ...]:
    """The reduced axes; () if nothing is reduced."""
    given = n.const(1)
    if given is None or given.size == 0:
        return () if n.int("noop_with_empty_axes", 0) else tuple(range(x.rank))
    return tuple(sorted({int(a) % x.rank for a in given.reshape(-1)}))


def _reduced(
    e: Emitter, code: str, x: Tensor, layout: Layout, axes: tuple[int, ...], keep: bool, out: Value | None = None
) -> tuple[Tensor, Layout]:
    """x reduced along logical `axes`, and the layout of what is left. out: whose quantization the result has."""
    where = sorted(layout.index(a) for a in axes)
    rest = [a for a in layout if a not in axes]
    left = layout if keep else tuple(sorted(rest).index(a) for a in rest)
    sizes = [(1 if k in where else s, k in x.dynamic and k not in where) for k, s in enumerate(x.shape)]
    sizes = [s for k, s in enumerate(sizes) if keep or k not in where]
    quant = None if out is None else out.quant
    grown = [k for k, (_, grows) in enumerate(sizes) if grows]
    inputs = [x, e.constant(np.array(where, np.int32))]
    made = e.op(code, inputs, [s for s, _ in sizes], quant=quant, dynamic=grown, keepDims=keep)
    return made, left


def _plain(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    if n.op in ("ReduceMax", "ReduceMin"):
        same_scale(x, out)
    axes = _axes(n, x)
    if not axes:
        same_scale(x, out)
        return e.rename(out, x, identity(x.rank))
    layout = existing(e, x)
    code = _BOOLEAN[n.op] if x.dtype == np.bool_ and n.op in _BOOLEAN else _CODES[n.op]
    made, left = _reduced(e, code, e.tensor(x, layout), layout, axes, bool(n.int("keepdims", 1)), out)
    finish(e, out, made, left)


def _norm(e: Emitter, n: Node) -> None:
    """ReduceL1, ReduceL2, ReduceSumSquare and ReduceLogSum: a function of the sum of a function."""
    x, out = n.require(0), n.outputs[0]
    axes = _axes(n, x)
    if not axes and x.rank:
        raise Refused("it reduces along no axis", "replace it by what it does to each element")
    if n.op in ("ReduceL2", "ReduceLogSum") and x.dtype.kind != "f":
        raise Refused(f"{n.op} of {x.dtype}", "cast it to float32 in the model")
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    if n.op == "ReduceL1":
        tensor = magnitude(e, tensor)
    elif n.op != "ReduceLogSum":
        tensor = compute(e, "MUL", tensor, tensor)
    total, left = _reduced(e, "SUM", tensor, layout, axes, bool(n.int("keepdims", 1)))
    last = {"ReduceL2": "SQRT", "ReduceLogSum": "LOG"}.get(n.op)
    finish(e, out, total if last is None else compute(e, last, total), left)


def magnitude(e: Emitter, x: Tensor) -> Tensor:
    """|x|; LiteRT's ABS takes no int64."""
    if x.dtype != np.int64:
        return compute(e, "ABS", x)
    return compute(e, "MAXIMUM", x, compute(e, "NEG", x))


def _log_sum_exp(e: Emitter, n: Node) -> None:
    """m + log Σ exp(x - m) with m the largest element, held finite so that infinities do not cancel."""
    x, out = n.require(0), n.outputs[0]
    axes = _axes(n, x)
    if not axes and x.rank:
        raise Refused("it reduces along no axis", "replace it by what it does to each element")
    layout = existing(e, x)
    tensor = e.tensor(x, layout)
    largest, _ = _reduced(e, "REDUCE_MAX", tensor, layout, axes, True)
    limit = float(np.finfo(np.float32).max)
    largest = compute(e, "MINIMUM", compute(e, "MAXIMUM", largest, -limit), limit)
    powers = compute(e, "EXP", compute(e, "SUB", tensor, largest))
    total, left = _reduced(e, "SUM", powers, layout, axes, True)
    result = compute(e, "ADD", compute(e, "LOG", total), largest)
    if not n.int("keepdims", 1):
        rest = [a for a in layout if a not in axes]
        left = tuple(sorted(rest).index(a) for a in rest)
        kept = [k for k, a in enumerate(layout) if a not in axes]
        grows = [i for i, k in enumerate(kept) if k in result.dynamic]
        result = e.reshape(result, [result.shape[k] for k in kept], grows)
    finish(e, out, result, left)


def _global_pool(e: Emitter, n: Node) -> None:
    """All axes after the channels; MEAN takes any scale in int8."""
    x, out = n.require(0), n.outputs[0]
    code = "MEAN" if n.op == "GlobalAveragePool" else "REDUCE_MAX"
    if code == "REDUCE_MAX":
        same_scale(x, out)
    layout = existing(e, x)
    made, left = _reduced(e, code, e.tensor(x, layout), layout, tuple(range(2, x.rank)), True, out)
    finish(e, out, made, left)


def _global_lp_pool(e: Emitter, n: Node) -> None:
    x, out, p = n.require(0), n.outputs[0], n.int("p", 2)
    layout = existing(e, x)
    powers = compute(e, "POW", compute(e, "ABS", e.tensor(x, layout)), float(p))
    total, left = _reduced(e, "SUM", powers, layout, tuple(range(2, x.rank)), True)
    finish(e, out, compute(e, "POW", total, 1 / p), left)


# --- places --------------------------------------------------------------------------------------------------
def _arg(code: str) -> Callable[[Emitter, Node], None]:
    def run(e: Emitter, n: Node) -> None:
        x, out = n.require(0), n.outputs[0]
        if x.rank == 0:
            raise Refused("its input has no axes")
        axis = n.int("axis", 0) % x.rank
        layout = existing(e, x)
        where, last = layout.index(axis), bool(n.int("select_last_index", 0))
        tensor = e.tensor(x, layout)
        if last:
            if axis in x.dynamic:
                raise Refused("it picks the last of equals along the batch", _BATCH)
            turned = [tensor, e.constant([where])]
            tensor = e.op("REVERSE_V2", turned, tensor.shape, quant=tensor.quant, dynamic=tensor.dynamic)
        rest = [a for a in layout if a != axis]
        shape = [x.shape[a] for a in rest]
        grows = [k for k, a in enumerate(rest) if a in x.dynamic]
        inputs = [tensor, e.constant(np.array(where, np.int32))]
        place = e.op(code, inputs, shape, dtype=np.int64, dynamic=grows, outputType="INT64")
        if last:
            place = compute(e, "SUB", e.constant(np.array(x.shape[axis] - 1, np.int64)), place)
        if n.int("keepdims", 1):
            shape.insert(where, 1)
            grows = [k for k, a in enumerate(layout) if a in x.dynamic and a != axis]
            finish(e, out, e.reshape(place, shape, grows), layout)
        else:
            finish(e, out, place, tuple(sorted(rest).index(a) for a in rest))

    return run


def _top_k(e: Emitter, n: Node) -> None:
    """TOPK_V2 works on the last axis, finds the largest, and puts the first of equals first, as ONNX does."""
    x = n.require(0)
    count = n.const(1)
    assert count is not None
    axis, k = n.int("axis", -1) % max(x.rank, 1), int(count.reshape(-1)[0])
    if axis in x.dynamic:
        raise Refused("it sorts along the batch", _BATCH)
    layout = (*(a for a in existing(e, x) if a != axis), axis)
    tensor = e.tensor(x, layout)
    largest = bool(n.int("largest", 1))
    if not largest:
        tensor = _descending(e, tensor)
    shape = (*tensor.shape[:-1], k)
    values = Tensor(f"{n.name}/values", tensor.dtype, shape, tensor.dynamic)
    places = Tensor(f"{n.name}/places", np.dtype(np.int32), shape, tensor.dynamic)
    e.write("TOPK_V2", [tensor, e.constant(np.array(k, np.int32))], [values, places])
    finish(e, n.outputs[0], values if largest else _descending(e, values), layout)
    if len(n.outputs) > 1 and n.outputs[1].name:
        finish(e, n.outputs[1], cast(e, places, np.int64), layout)


def _descending(e: Emitter, x: Tensor) -> Tensor:
    """The same numbers in the opposite order, without overflow; its own inverse."""
    if x.dtype.kind == "f":
        return compute(e, "NEG", x)
    return compute(e, "SUB", e.constant(np.array(-1, x.dtype)), x)


def _cum_sum(e: Emitter, n: Node) -> None:
    x, axis = n.require(0), n.const(1)
    assert axis is not None
    layout = existing(e, x)
    where = layout.index(int(axis.reshape(-1)[0]) % x.rank)
    inputs = [e.tensor(x, layout), e.constant(np.array(where, np.int32))]
    flags = {"exclusive": bool(n.int("exclusive", 0)), "reverse": bool(n.int("reverse", 0))}
    e.emit(n.outputs[0], "CUMSUM", inputs, layout, **flags)


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {
    **dict.fromkeys(_CODES, _plain),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum"), _norm),
    "ReduceLogSumExp": _log_sum_exp,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "GlobalLpPool": _global_lp_pool,
    "ArgMax": _arg("ARG_MAX"),
    "ArgMin": _arg("ARG_MIN"),
    "TopK": _top_k,
    "CumSum": _cum_sum,
}
