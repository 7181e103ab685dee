"""Attention and RotaryEmbedding of ONNX 23 and later, in the operators that LiteRT has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.graph import Array, Layout, Tensor
from edgekit.backends.tflite.ops.elementwise import existing
from edgekit.backends.tflite.values import Node, Refused, Value

_PLAIN: dict[str, Any] = {"fusedActivationFunction": "NONE"}
_BY_HEAD: Layout = (0, 2, 1, 3)  # (batch, heads, steps, size) stored as (batch, steps, heads, size)
_FLOAT32 = 1  # onnx.TensorProto.FLOAT


def _attention(e: Emitter, n: Node) -> None:
    _check(n)
    x, others = n.require(0), n.int("kv_num_heads", 0)
    query = _heads(e, x, n.int("q_num_heads", 0))
    key, value = (_with_past(e, n, i, others) for i in (1, 2))
    scores = _scores(e, n, query, key)
    bias = _bias(e, n, query.shape[2], key.shape[2])
    masked = scores if bias is None else _two(e, "ADD", scores, bias)
    weights = e.op("SOFTMAX", [masked], masked.shape, dynamic=masked.dynamic, beta=1.0)
    if bias is not None:
        weights = _without_blind(e, weights, bias)
    given = _named(n, 3)
    if given is not None:
        e.define(given, weights if n.int("qk_matmul_output_mode", 0) else scores)
    rows = _shared(query, key)
    flat = e.reshape(weights, (*rows, key.shape[2]), query.dynamic)
    made = e.op("BATCH_MATMUL", [flat, e.tensor(value)], (*rows, value.shape[3]), dynamic=query.dynamic)
    result = Value(n.outputs[0].name, x.dtype, (*query.shape[:3], value.shape[3]), query.dynamic)
    e.define(result, e.reshape(made, result.shape, result.dynamic))
    _result(e, n, result, x.rank)


def _shared(query: Value, key: Value) -> tuple[int, int, int]:
    """Heads that share keys are further rows of one product: (batch, heads of keys, rows)."""
    return query.shape[0], key.shape[1], query.shape[1] // key.shape[1] * query.shape[2]


def _scores(e: Emitter, n: Node, query: Value, key: Value) -> Tensor:
    """(batch, heads, steps, keys)"""
    size, keys, rows = query.shape[3], key.shape[2], _shared(query, key)
    scale = n.float("scale", 0.0) or float(1 / np.sqrt(size))
    scaled = _two(e, "MUL", e.tensor(query), e.constant(np.float32(scale)))
    left = e.reshape(scaled, (*rows, size), query.dynamic)
    product = e.op("BATCH_MATMUL", [left, e.tensor(key)], (*rows, keys), dynamic=query.dynamic, adjY=True)
    scores = e.reshape(product, (*query.shape[:3], keys), query.dynamic)
    cap = n.float("softcap", 0.0)
    if not cap:
        return scores
    scores = _two(e, "MUL", scores, e.constant(np.float32(1 / cap)))
    scores = e.op("TANH", [scores], scores.shape, dynamic=scores.dynamic)
    return _two(e, "MUL", scores, e.constant(np.float32(cap)))


def _result(e: Emitter, n: Node, result: Value, rank: int) -> None:
    out = n.outputs[0]
    if rank == 4:
        return e.rename(out, result, identity(4))
    e.define(out, e.reshape(e.tensor(result, _BY_HEAD), out.shape, out.dynamic, out.name))


def _check(n: Node) -> None:
    x = n.require(0)
    if x.dtype != np.float32:
        raise Refused(f"attention of {x.dtype}", "cast to float32")
    if n.input(6) is not None:
        raise Refused("nonpad_kv_seqlen", "give the mask as attn_mask")
    if n.int("softmax_precision", _FLOAT32) != _FLOAT32:
        raise Refused("a softmax in another precision", "leave softmax_precision out")
    if _named(n, 3) is not None and (n.int("qk_matmul_output_mode", 0) in (1, 2) or n.float("softcap", 0.0)):
        raise Refused("its fourth result", "ask for the scores or the weights, without softcap")
    if x.dynamic - {0}:
        raise Refused("its number of steps is open", "fix it: --shape INPUT=...")


def _named(n: Node, index: int) -> Value | None:
    return n.outputs[index] if len(n.outputs) > index and n.outputs[index].name else None


def _two(e: Emitter, code: str, a: Tensor, b: Tensor) -> Tensor:
    return e.op(code, [a, b], a.shape, dynamic=a.dynamic, **_PLAIN)


def _heads(e: Emitter, x: Value, count: int) -> Value:
    """(batch, heads, steps, size) of (batch, steps, heads · size)."""
    if x.rank == 4:
        return x
    if x.rank != 3 or count < 1:
        raise Refused("its operands have neither four axes nor a number of heads")
    batch, steps, width = x.shape
    out = Value(f"{x.name}/heads", x.dtype, (batch, count, steps, width // count), x.dynamic)
    if x.data is not None:
        out.data = x.data.reshape(batch, steps, count, -1).transpose(_BY_HEAD)
    else:
        e.define(out, e.reshape(e.tensor(x), (batch, steps, count, width // count), x.dynamic), _BY_HEAD)
    return out


def _with_past(e: Emitter, n: Node, index: int, heads: int) -> Value:
    """Keys or values, behind those of the cache; they are a result too."""
    now, past, present = _heads(e, n.require(index), heads), n.input(index + 3), _named(n, index)
    whole = now
    if past is not None:
        shape = (*now.shape[:2], past.shape[2] + now.shape[2], now.shape[3])
        whole = Value(f"{now.name}/all", now.dtype, shape, now.dynamic)
        e.emit(whole, "CONCATENATION", [e.tensor(past), e.tensor(now)], axis=2, **_PLAIN)
    if present is not None:
        e.rename(present, whole, identity(4))
    return whole


# --- masks ---------------------------------------------------------------------------------------------------
def _bias(e: Emitter, n: Node, steps: int, keys: int) -> Tensor | None:
    """What is added to the scores: the given mask, and −∞ where a query may not look."""
    fixed, given = _triangle(n, steps, keys), n.input(3)
    if given is None:
        return None if fixed is None else e.constant(fixed)
    missing = keys - given.shape[-1]
    pairs = [(0, 0)] * (given.rank - 1) + [(0, missing)]
    if given.data is not None:
        real = np.where(given.data, 0.0, -np.inf) if given.data.dtype == np.bool_ else given.data
        real = np.pad(real, pairs, constant_values=-np.inf)
        return e.constant(np.ascontiguousarray(real if fixed is None else real + fixed, np.float32))
    mask = e.tensor(given)
    if given.dtype == np.bool_:
        zero, never = (e.constant(np.full((1,) * given.rank, v, np.float32)) for v in (0, -np.inf))
        mask = e.op("SELECT_V2", [mask, zero, never], mask.shape, dynamic=mask.dynamic, dtype=np.float32)
    if missing:
        amounts, never = e.constant(np.array(pairs, np.int32)), e.constant(np.float32(-np.inf))
        mask = e.op("PADV2", [mask, amounts, never], (*mask.shape[:-1], keys), dynamic=mask.dynamic)
    if fixed is None:
        return mask
    shape = np.broadcast_shapes(mask.shape, fixed.shape)
    grown = {k + len(shape) - given.rank for k in mask.dynamic}
    return e.op("ADD", [mask, e.constant(fixed)], shape, dynamic=grown, **_PLAIN)


def _triangle(n: Node, steps: int, keys: int) -> Array | None:
    """(steps, keys): 0 where is_causal and the window let a query look, −∞ elsewhere; None without either."""
    left, right = n.int("left_window_size", -1), n.int("right_window_size", -1)
    past = n.input(4)
    ahead = np.arange(keys) - np.arange(steps)[:, None] - (0 if past is None else past.shape[2])
    allowed = np.ones((steps, keys), np.bool_)
    if n.int("is_causal", 0):
        allowed &= ahead <= 0
    if left >= 0:
        allowed &= -ahead <= left
    if right >= 0:
        allowed &= ahead <= right
    return None if allowed.all() else np.where(allowed, 0.0, -np.inf).astype(np.float32)


def _last(x: Tensor) -> int:
    return len(x.shape) - 1


def _without_blind(e: Emitter, weights: Tensor, bias: Tensor) -> Tensor:
    """Rows that may look at nothing are zero: a softmax of −∞ alone is not a number."""
    small, shift = (*bias.shape[:-1], 1), 4 - len(bias.shape)
    if bias.data is not None:
        rows = np.isneginf(bias.data).all(-1, keepdims=True)
        if not rows.any():
            return weights
        blind = e.constant(rows)
    else:
        where, never = e.constant(np.array([_last(bias)], np.int32)), e.constant(np.float32(-np.inf))
        most = e.op("REDUCE_MAX", [bias, where], small, dynamic=bias.dynamic, keepDims=True)
        blind = e.op("EQUAL", [most, never], small, dynamic=bias.dynamic, dtype=np.bool_)
    blind = e.reshape(blind, (*(1,) * shift, *small), {k + shift for k in blind.dynamic})
    zeros = e.constant(np.zeros((1, 1, 1, 1), np.float32))
    return e.op("SELECT_V2", [blind, zeros, weights], weights.shape, dynamic=weights.dynamic, dtype=np.float32)


# --- rotary embedding ----------------------------------------------------------------------------------------
def _rotary(e: Emitter, n: Node) -> None:
    x, out = n.require(0), n.outputs[0]
    heads = _heads(e, x, n.int("num_heads", 0))
    layout = existing(e, heads)
    if layout not in (identity(4), _BY_HEAD):
        layout = identity(4)
    tensor = e.tensor(heads, layout)
    width = n.int("rotary_embedding_dim", 0) or heads.shape[3]
    cos, sin = (_angles(e, n, i, layout) for i in (1, 2))
    turn = _paired if n.int("interleaved", 0) else _halved
    parts = [turn(e, _columns(e, tensor, 0, width), cos, sin)]
    if width < heads.shape[3]:
        parts.append(_columns(e, tensor, width, heads.shape[3] - width))
    made = parts[0] if len(parts) == 1 else _joined(e, parts)
    result = Value(out.name, x.dtype, heads.shape, heads.dynamic)
    e.define(result, made, layout)
    _result(e, n, result, x.rank)


def _angles(e: Emitter, n: Node, index: int, layout: Layout) -> Tensor:
    """A row per step, broadcast over heads: cosines or sines, picked by the positions if they are given."""
    cache, positions = n.require(index), n.input(3)
    between = layout.index(1)  # where the heads lie
    if positions is None:
        tensor, shape, dynamic = e.tensor(cache), list(cache.shape), set(cache.dynamic)
    elif positions.data is not None and cache.data is not None:
        data = cache.data[positions.data]
        tensor, shape, dynamic = e.constant(np.ascontiguousarray(data)), list(data.shape), set()
    else:
        shape, dynamic = [*positions.shape, cache.shape[-1]], set(positions.dynamic)
        inputs = [e.tensor(cache), e.tensor(positions)]
        tensor = e.op("GATHER", inputs, shape, dynamic=dynamic, axis=0, batchDims=0)
    shape.insert(between, 1)
    return e.reshape(tensor, shape, {k + (k >= between) for k in dynamic})


def _columns(e: Emitter, x: Tensor, start: int, count: int) -> Tensor:
    """Part of the last axis."""
    if count == x.shape[-1]:
        return x
    shape = (*x.shape[:-1], count)
    begin, size = [0] * _last(x) + [start], [-1] * _last(x) + [count]
    parameters = [e.constant(np.array(v, np.int32)) for v in (begin, size)]
    return e.op("SLICE", [x, *parameters], shape, dynamic=x.dynamic)


def _joined(e: Emitter, parts: Sequence[Tensor]) -> Tensor:
    shape = (*parts[0].shape[:-1], sum(p.shape[-1] for p in parts))
    return e.op("CONCATENATION", parts, shape, dynamic=parts[0].dynamic, axis=len(shape) - 1, **_PLAIN)


def _turned(e: Emitter, a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The points (a, b) turned by their angles."""
    real = _two(e, "SUB", _two(e, "MUL", a, cos), _two(e, "MUL", b, sin))
    return real, _two(e, "ADD", _two(e, "MUL", a, sin), _two(e, "MUL", b, cos))


def _halved(e: Emitter, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return _joined(e, _turned(e, _columns(e, x, 0, half), _columns(e, x, half, half), cos, sin))


def _paired(e: Emitter, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each two neighbours are one point."""
    pairs = e.reshape(x, (*x.shape[:-1], x.shape[-1] // 2, 2), x.dynamic)
    wide = [_wide(e, t) for t in (cos, sin)]
    made = _joined(e, _turned(e, _columns(e, pairs, 0, 1), _columns(e, pairs, 1, 1), *wide))
    return e.reshape(made, x.shape, x.dynamic)


def _wide(e: Emitter, x: Tensor) -> Tensor:
    return e.reshape(x, (*x.shape, 1), x.dynamic)


LOWERINGS: dict[str, Callable[[Emitter, Node], None]] = {"Attention": _attention, "RotaryEmbedding": _rotary}
