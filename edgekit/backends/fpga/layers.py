"""Operators that compute, as layers of an IntegerNet: their weights, windows and sums, before they are rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.backends.fpga.grid import CONVERT, bits_of, refuse, stored
from edgekit.backends.fpga.kernels import dilated, flat_pads, ungrouped
from edgekit.backends.fpga.net import AVERAGE_BITS, MAX_SHIFT, Kind, Layer, Tensor, windows
from edgekit.backends.fpga.views import Pending, View, canonical
from edgekit.passes import fold_graph as G
from edgekit.windows import window

if TYPE_CHECKING:
    from edgekit.backends.fpga.lower import Lowering

Array = np.ndarray[Any, Any]

EVEN = "windows that fit without it: ceil_mode = 0"


# --- layers of weights -------------------------------------------------------------------------------
def _weights(node: ir.Node, axis: int) -> tuple[Array, tuple[int, ...]]:
    """Integers, output channels first, and exponents, one or one per channel."""
    found = stored(node.inputs[1])
    if found is None:
        constant = M.constant(node.inputs[1]) is not None
        raise refuse(node, "its weights are float" if constant else "its weights are computed", CONVERT)
    channels = found.integers.shape[axis]
    if len(found.grid.exponents) not in (1, channels) or (
        len(found.grid.exponents) > 1 and found.grid.axis % found.integers.ndim != axis
    ):
        raise refuse(node, "its weights have scales along another axis than the output's", CONVERT)
    if found.grid.bits > 8:
        raise refuse(node, "its weights have more than 8 bits", CONVERT)
    return np.moveaxis(found.integers, axis, 0), found.grid.exponents


def _bias(node: ir.Node, channels: int, exponents: tuple[int, ...]) -> Array:
    """int64 (channels,) at the exponents of the sums."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(channels, np.int64)
    found, real = stored(value), M.constant(value)
    if found is not None:  # exact in float64: 32 bits times a power of two
        real = np.ldexp(found.integers.ravel().astype(np.float64), -np.array(found.grid.exponents))
    if real is None:
        raise refuse(node, "its bias is computed", "give it as a constant")
    scaled = np.ldexp(np.resize(real.astype(np.float64).ravel(), channels), np.array(exponents))
    if np.abs(scaled).max(initial=0) >= 2**31:
        raise refuse(node, "its bias leaves 32 bits", "coarser weights or inputs")
    return np.asarray(np.floor(scaled + 0.5).astype(np.int64))


def _product(node: ir.Node, base: Layer, weights: Array, own: tuple[int, ...], source: Tensor) -> Layer:
    bits = bits_of(int(weights.min()), int(weights.max()))
    exponents = own if len(own) > 1 else own * len(weights)
    sums = tuple(source.exponent + e for e in exponents)
    return replace(
        base,
        name=node.name or "",
        inputs=(source.name,),
        weights=np.ascontiguousarray(weights.astype(np.int8)),
        weight_bits=bits,
        weight_exponents=exponents,
        bias=_bias(node, len(weights), sums),
    )


def _conv(low: Lowering, node: ir.Node) -> Pending:
    view = low.view(node)
    source, rank = low.whole_map(node, view)
    weights, exponents = _weights(node, 0)
    if weights.ndim != rank + 2:
        raise refuse(node, f"{weights.ndim - 2} spatial axes", "at most two")
    found = window(node, weights.shape[2:], source.hwc[2 - rank : 2])
    weights = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])  # (cout, cin, kh, kw)
    weights = dilated(weights, (1,) * (2 - rank) + found.dilations)
    groups, channels = int(node.attributes.get_int("group", 1) or 1), source.hwc[2]
    depthwise = groups == channels == len(weights) and groups > 1
    if groups > 1 and not depthwise:
        weights = ungrouped(weights, groups)
        low.notes.append(f"Conv '{node.name}' of {groups} groups is one of all channels with zeros")
    pads, strides = flat_pads(node, found.begins, found.ends, view.pads), (1,) * (2 - rank) + found.strides
    shaped = Layer("depthwise" if depthwise else "conv", "", (), "", 0, 1, (0,), kernel=weights.shape[2:],
                   strides=(strides[0], strides[1]), pads=pads)  # fmt: skip
    ordered = weights[:, 0] if depthwise else weights.transpose(0, 2, 3, 1)
    return _map_of(_product(node, shaped, ordered, exponents, source), source, rank, len(weights))


def _map_of(layer: Layer, source: Tensor, rank: int, channels: int) -> Pending:
    """What a layer of windows gives."""
    height, width = windows(layer, source)
    order = canonical(channels, height, width)
    sums = tuple(source.exponent + e for e in layer.weight_exponents) if layer.weights is not None else ()
    return Pending(layer, (height, width, channels), sums, order[:, 0] if rank == 1 else order)


def _dense(low: Lowering, node: ir.Node) -> Pending:
    view = low.view(node)
    gemm = node.op_type == "Gemm"
    factors = [float(node.attributes.get_float(name, 1.0) or 0.0) for name in ("alpha", "beta")]
    if gemm and (G.integer(node, "transA", 0) or factors != [1.0, 1.0]):
        raise refuse(node, "it transposes its input or scales its sums", CONVERT)
    found = stored(node.inputs[1])
    if found is not None and found.integers.ndim != 2:
        raise refuse(node, f"its weights have {found.integers.ndim} axes", "a matrix")
    weights, exponents = _weights(node, 0 if gemm and G.integer(node, "transB", 0) else 1)
    order = low.in_memory(view)
    source = low.tensors[view.tensor]
    if any(view.pads) or order.size != weights.shape[1] or order.size != source.size:
        raise refuse(node, f"it multiplies rows of {order.shape}, not one vector", "flatten before it")
    columns = np.empty_like(weights)
    columns[:, order.ravel()] = weights
    plain = Layer("dense", "", (), "", 0, 1, (0,))
    layer = _product(node, plain, columns, exponents, source)
    sums = tuple(source.exponent + e for e in layer.weight_exponents)
    positions = np.arange(len(weights)).reshape(*order.shape[:-1], len(weights))
    return Pending(layer, (len(weights),), sums, positions)


# --- the others --------------------------------------------------------------------------------------
def _pool(low: Lowering, node: ir.Node) -> Pending:
    view = low.view(node)
    source, rank = low.whole_map(node, view)
    kind: Kind = "maxpool" if node.op_type == "MaxPool" else "avgpool"
    found = window(node, tuple(node.attributes.get_ints("kernel_shape", ()) or ()), source.hwc[2 - rank : 2])
    pads = flat_pads(node, found.begins, found.ends, (0, 0, 0, 0))
    if any(d != 1 for d in found.dilations) or (len(node.outputs) > 1 and node.outputs[1].uses()):
        raise refuse(node, "its windows have gaps, or its indices are used", "a pool without them")
    if any(view.pads) and kind == "maxpool":
        raise refuse(node, "zeros before it could win", "let the pool pad")
    if kind == "avgpool" and any(pads) and not node.attributes.get_int("count_include_pad", 0):
        raise refuse(node, "its average at the border is over fewer positions", "count_include_pad = 1, or no padding")
    kernel, strides = (1,) * (2 - rank) + found.kernel, (1,) * (2 - rank) + found.strides
    total = tuple(a + b for a, b in zip(pads, view.pads, strict=True))
    layer = Layer(kind, node.name or "", (source.name,), "", 0, 1, (0,), kernel=(kernel[0], kernel[1]),
                  strides=(strides[0], strides[1]), pads=total)  # type: ignore[arg-type]  # fmt: skip
    sizes = [n + total[a] + total[a + 2] - layer.kernel[a] for a, n in enumerate(source.hwc[:2])]
    if node.attributes.get_int("ceil_mode", 0) and any(n % s for n, s in zip(sizes, layer.strides, strict=True)):
        raise refuse(node, "its last windows reach beyond the border (ceil_mode)", EVEN)
    return _pooled(layer, source, rank)


def _pooled(layer: Layer, source: Tensor, rank: int) -> Pending:
    bits = 0
    if layer.kind == "avgpool":
        count = layer.kernel[0] * layer.kernel[1]
        bits = count.bit_length() - 1
        if count != 1 << bits:
            bits = AVERAGE_BITS
            layer = replace(layer, multiplier=(2 * 2**bits + count) // (2 * count))
    return replace(_map_of(layer, source, rank, source.hwc[2]), exponents=(source.exponent + bits,))


def _global(low: Lowering, node: ir.Node) -> Pending:
    view = low.view(node)
    source, rank = low.whole_map(node, view)
    kind: Kind = "maxpool" if node.op_type == "GlobalMaxPool" else "avgpool"
    if any(view.pads):
        raise refuse(node, "it reads a padded value", "pool before padding")
    return _pooled(Layer(kind, node.name or "", (source.name,), "", 0, 1, (0,), kernel=source.hwc[:2]), source, rank)


def _mean(low: Lowering, node: ir.Node) -> Pending:
    """ReduceMean over all positions of a map, in whichever layout the model has it."""
    view = low.view(node)
    order = low.in_memory(view)
    axes = M.constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    given = axes.ravel().tolist() if axes is not None else list(node.attributes.get_ints("axes", ()) or ())
    over = sorted(a % (order.ndim + 1) - 1 for a in given)
    kept = [a for a in range(order.ndim) if a not in over]
    if len(kept) != 1 or not over or -1 in over or any(view.pads):
        raise refuse(node, f"a mean over axes {given}", "a mean over all rows and columns")
    turned = order.transpose(kept + over)
    source, rank = low.whole_map(node, View(view.tensor, view.order.transpose(kept + over)))
    layer = Layer("avgpool", node.name or "", (source.name,), "", 0, 1, (0,), kernel=source.hwc[:2])
    sizes = [n if a in kept else 1 for a, n in enumerate(order.shape)]
    if not node.attributes.get_int("keepdims", 1):
        sizes = [turned.shape[0]]
    return replace(_pooled(layer, source, rank), order=np.arange(turned.shape[0]).reshape(sizes))


def _add(low: Lowering, node: ir.Node) -> Pending:
    views = [low.view(node, i) for i in (0, 1)]
    orders = [low.in_memory(v) for v in views]
    sources = [low.tensors[v.tensor] for v in views]
    if (
        sources[0].hwc != sources[1].hwc
        or not np.array_equal(orders[0], orders[1])
        or any((*views[0].pads, *views[1].pads))
    ):
        shapes = " and ".join(str(v.order.shape) for v in views)
        raise refuse(node, f"its operands {shapes} are not of one shape and order", "equal shapes, not broadcast")
    exponents = [s.exponent for s in sources]
    most = max(exponents)
    shifts = tuple(most - e for e in exponents)
    if max(shifts) > MAX_SHIFT:
        raise refuse(node, f"its operands' scales differ by 2^{max(shifts)}", CONVERT)
    layer = Layer("add", node.name or "", (views[0].tensor, views[1].tensor), "", 0, 1, (0,), input_shifts=shifts)
    return Pending(layer, sources[0].shape, (most,), orders[0])


def _concat(low: Lowering, node: ir.Node) -> Pending:
    views = [low.view(node, i) for i in range(len(node.inputs))]
    sources = [low.tensors[v.tensor] for v in views]
    orders = [low.in_memory(v) for v in views]
    sources = [low.tensors[v.tensor] for v in views]  # the input may have got its shape just now
    axis = int(node.attributes.get_int("axis", 0) or 0) % (orders[0].ndim + 1) - 1
    if axis < 0 or len({s.hwc[:2] for s in sources}) > 1 or any(any(v.pads) for v in views):
        raise refuse(node, "it joins something else than channels of equal maps", "channels of maps of one size")
    channels, start, parts = sum(s.hwc[2] for s in sources), 0, []
    for source, order in zip(sources, orders, strict=True):
        own = source.hwc[2]
        parts.append(order // own * channels + start + order % own)
        start += own
    shape = (*sources[0].hwc[:2], channels) if len(sources[0].shape) == 3 else (channels,)
    layer = Layer("concat", node.name or "", tuple(v.tensor for v in views), "", 0, 1, (0,))
    return Pending(layer, shape, tuple(s.exponent for s in sources), np.concatenate(parts, axis=axis))


OPS: Mapping[str, Callable[[Lowering, ir.Node], Pending]] = {
    "Conv": _conv,
    "Gemm": _dense,
    "MatMul": _dense,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global,
    "GlobalMaxPool": _global,
    "ReduceMean": _mean,
    "Add": _add,
    "Concat": _concat,
}
