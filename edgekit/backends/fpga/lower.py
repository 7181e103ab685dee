"""From a quantized ONNX model with power-of-two scales to an IntegerNet.

Everything is checked, nothing is decided: what the model rounds, the network rounds, to the same grid. What it cannot
take is refused by operator, node, reason and remedy. The rounding of ties is the only difference (docs/fpga.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.backends.fpga.grid import CONVERT, bits_of, grid, nearest, refuse, stored
from edgekit.backends.fpga.kernels import dilated, flat_pads, ungrouped
from edgekit.backends.fpga.net import AVERAGE_BITS, MAX_SHIFT, IntegerNet, Kind, Layer, Layout, Tensor, limits, windows
from edgekit.backends.fpga.views import MOVES, Pending, View, canonical, is_map, moved
from edgekit.errors import ShapeError, UnsupportedOpError
from edgekit.passes import fold_graph as G
from edgekit.passes.decide import clip_bounds
from edgekit.scheme import HOST
from edgekit.windows import window

Array = np.ndarray[Any, Any]

_INPUT = Layer("maxpool", "", (), "", 0, 1, (0,))  # stands for the host's quantizer
FLOAT = "a float operator: leave it to the host, or train without it"
EVEN = "windows that fit without it: ceil_mode = 0"


def lower(model: ir.Model) -> IntegerNet:
    """Raises UnsupportedOpError (operator, node, reason), ShapeError (sizes unknown)."""
    return _Lowering(model).net()


class _Lowering:
    def __init__(self, model: ir.Model) -> None:
        sig = M.signature(model)
        if len(sig.inputs) != 1 or len(sig.outputs) != 1:
            told = f"{len(sig.inputs)} inputs and {len(sig.outputs)} outputs"
            raise UnsupportedOpError(f"the model has {told}, a stream has one of each", "split the model")
        self.model, self.source = model, sig.inputs[0]
        if self.source.dtype != "float32":
            raise UnsupportedOpError(
                f"input '{self.source.name}' is {self.source.dtype}, not float32", "quantize a model of float inputs"
            )
        shape = self.source.concrete(1)[1:]
        if not shape or 0 in shape:
            raise ShapeError(
                f"input '{self.source.name}' has shape {self.source.shape}", "give it a batch and features"
            )
        self.shape = shape
        self.layout: Layout = "HWC"
        self.memory: Array | None = None  # position in memory of every element of the source, once a layer reads it
        self.input = ""
        self.tensors: dict[str, Tensor] = {}
        self.layers: list[Layer] = []
        self.ranges: dict[str, tuple[int, int]] = {}  # lowest and highest integer of every tensor
        self.host_ops: list[str] = []
        self.notes: list[str] = []
        order = np.arange(int(np.prod(shape))).reshape(shape)
        self.values: dict[str, View | Pending] = {self.source.name: Pending(_INPUT, (order.size,), (0,), order)}

    def net(self) -> IntegerNet:
        for node in self.model.graph:
            self._take(node)
        output = self.model.graph.outputs[0].name or ""
        found = self.values.get(output)
        if not isinstance(found, View):
            raise UnsupportedOpError(f"the output '{output}' is not quantized", CONVERT)
        if not np.array_equal(self._memory(found).ravel(), np.arange(self.tensors[found.tensor].size)):
            raise UnsupportedOpError(
                f"the output '{output}' is not in the order height, width, channels", "end with a vector of results"
            )
        layers = _needed(self.layers, found.tensor)
        names = {self.input, *(name for layer in layers for name in (*layer.inputs, layer.output))}
        tensors = {n: t for n, t in self.tensors.items() if n in names}
        notes = [f"{op} at the end is left to the host: the largest logit is the largest of its results"
                 for op in self.host_ops]  # fmt: skip
        return IntegerNet(
            self.tensors[self.input],
            tensors,
            tuple(layers),
            found.tensor,
            self.source.name,
            self.shape,
            self.layout,
            output,
            tuple(self.host_ops),
            (*self.notes, *notes),
        )

    # --- nodes -------------------------------------------------------------------------------------------
    def _take(self, node: ir.Node) -> None:
        if node.op_type == "Constant" or all(M.constant(v) is not None for v in node.inputs if v is not None):
            return  # constants are read where they are used
        value = node.inputs[0]
        given = self.values.get(value.name or "") if value is not None else None
        if node.op_type in MOVES and given is not None:
            result: View | Pending = moved(node, given)
        elif node.op_type in {"Relu", "Clip"} and given is not None:
            result = self._bounded(node, given)
        elif node.op_type in HOST and isinstance(given, View):
            result = self._left_to_host(node, given)
        elif node.op_type in _OPS:
            result = _OPS[node.op_type](self, node)
        else:
            raise refuse(node, "it has no integer form", FLOAT)
        self.values[node.outputs[0].name or ""] = result

    def _view(self, node: ir.Node, position: int = 0) -> View:
        value = node.inputs[position]
        found = self.values.get(value.name or "") if value is not None else None
        if not isinstance(found, View):
            name = value.name if value is not None else ""
            raise refuse(node, f"its input '{name}' is {'a constant' if found is None else 'float'}", CONVERT)
        return found

    def _left_to_host(self, node: ir.Node, given: View) -> View:
        if not node.outputs[0].is_graph_output():
            raise refuse(node, "only the last operator may be left to the host", FLOAT)
        self.host_ops.append(node.op_type)
        return given

    def _bounded(self, node: ir.Node, given: View | Pending) -> Pending:
        bounds = clip_bounds(node)
        if bounds is None:
            raise refuse(node, "its bounds are computed", "give them as numbers")
        before = self._again(node, given) if isinstance(given, View) else given
        low, high = (float(np.clip(b, *bounds)) for b in (before.low, before.high))
        return replace(before, low=low, high=high)

    def _again(self, node: ir.Node, view: View) -> Pending:
        """A value on its way to another grid or range."""
        if any(view.pads):
            raise refuse(node, "it reads a padded value", "let the convolution pad")
        order = self._memory(view)
        tensor = self.tensors[view.tensor]
        layer = replace(_INPUT, name=node.name or "", inputs=(view.tensor,))
        return Pending(layer, tensor.shape, (tensor.exponent,), order)

    # --- quantizers --------------------------------------------------------------------------------------
    def _quantize(self, node: ir.Node) -> View:
        value = node.inputs[0]
        name = (value.name or "") if value is not None else ""
        given = self.values.get(name)
        if given is None:
            raise refuse(node, f"it rounds a constant '{name}' at run time", "store the integers: " + CONVERT)
        before = self._again(node, given) if isinstance(given, View) else given
        found = grid(node)
        if len(found.exponents) > 1:
            raise refuse(node, "its activations have a scale per channel", CONVERT)
        exponent, (lowest, highest) = found.exponents[0], limits(found.bits)
        ends = (nearest(before.low, exponent), nearest(before.high, exponent))
        low = lowest if ends[0] is None else min(max(ends[0], lowest), highest)
        high = highest if ends[1] is None else min(max(ends[1], lowest), highest)
        if not low < high:
            raise refuse(node, f"only the integer {low} is left of [{before.low:g}, {before.high:g}]", CONVERT)
        return self._finished(node, before, name, exponent, low, high)

    def _finished(self, node: ir.Node, before: Pending, name: str, exponent: int, low: int, high: int) -> View:
        bits = bits_of(low, high)
        if before.layer is _INPUT:
            return self._first(node, before, name, exponent, low, high)
        if self._unchanged(before, exponent, low, high):
            return View(before.layer.inputs[0], before.order, before.pads)
        shift = tuple(e - exponent for e in before.exponents)
        if any(abs(s) > MAX_SHIFT for s in shift):
            far = max(shift, key=abs)
            raise refuse(node, f"it shifts sums by {far} bits, {MAX_SHIFT} at most can be", "rescale the weights")
        name = self._free(name)
        layer = replace(before.layer, output=name, low=low, high=high, shift=shift)
        if len(set(shift)) == 1 and layer.kind != "concat":
            layer = replace(layer, shift=shift[:1], weight_exponents=layer.weight_exponents[:1])
        self.tensors[name] = Tensor(name, before.shape, bits, exponent)
        self.layers.append(layer)
        self.ranges[name] = low, high
        return View(name, before.order, before.pads)

    def _unchanged(self, before: Pending, exponent: int, low: int, high: int) -> bool:
        """Whether it is a tensor's own grid and range, once more: of what a model moves, both ends are rounded."""
        layer = before.layer
        if layer.kind != "maxpool" or layer.kernel != (1, 1) or layer.strides != (1, 1) or any(layer.pads):
            return False
        source, (lowest, highest) = self.tensors[layer.inputs[0]], self.ranges[layer.inputs[0]]
        return source.exponent == exponent and low <= lowest and highest <= high

    def _first(self, node: ir.Node, before: Pending, name: str, exponent: int, low: int, high: int) -> View:
        """The host's quantizer; what it does not bound, a layer does."""
        if self.input:
            raise refuse(node, "the input is quantized twice", CONVERT)
        bits = bits_of(low, high)
        self.input = name = self._free(name)
        self.tensors[name] = Tensor(name, before.shape, bits, exponent)
        self.ranges[name] = limits(bits)
        view = View(name, before.order)
        if (low, high) != limits(bits):
            again = replace(self._again(node, view), low=-np.inf)
            view = self._finished(node, again, f"{name}_bounded", exponent, low, high)
        return replace(view, pads=before.pads)

    def _dequantize(self, node: ir.Node) -> View:
        view = self._view(node)
        found = grid(node)
        tensor = self.tensors[view.tensor]
        if found.exponents != (tensor.exponent,):
            raise refuse(node, f"it reads integers of 2^-{tensor.exponent} as others", CONVERT)
        return view

    def _free(self, name: str) -> str:
        new, count = name, 1
        while new in self.tensors:
            count += 1
            new = f"{name}_{count}"
        return new

    # --- memory ------------------------------------------------------------------------------------------
    def _memory(self, view: View) -> Array:
        """Positions of the view's elements in memory."""
        if view.tensor != self.input:
            return view.order
        if self.memory is None:
            self._lay_out(view.order)
        assert self.memory is not None
        return np.asarray(self.memory[view.order])

    def _lay_out(self, order: Array) -> None:
        """Give the input its memory order: that of the first layer that reads it."""
        shape = order.shape if order.ndim == 3 else (order.shape[0], 1, order.shape[1]) if order.ndim == 2 else None
        count = np.arange(order.size)
        tensor = self.tensors[self.input]
        if shape is None:
            self.memory = count
            return
        channels, height, width = shape
        wanted = order.reshape(shape).transpose(1, 2, 0).ravel()
        if not np.array_equal(wanted, count):
            self.layout = "CHW"
            if not np.array_equal(order.ravel(), count):
                raise UnsupportedOpError(
                    f"input '{self.source.name}' of shape {self.shape} reaches the first layer in no common order",
                    "give it as (height, width, channels) or (channels, height, width)",
                )
        self.memory = np.argsort(wanted)
        self.tensors[self.input] = replace(tensor, shape=(height, width, channels))

    def _map(self, node: ir.Node, view: View) -> tuple[Tensor, int]:
        """The tensor behind a whole feature map (channels, height, width), and the rank of its positions, 1 or 2."""
        order = self._memory(view)
        rank = order.ndim - 1
        order = order[:, None, :] if rank == 1 else order
        tensor = self.tensors[view.tensor]
        if order.ndim != 3 or not is_map(order, tensor):
            raise refuse(
                node,
                f"it reads '{view.tensor}' {tensor.shape} as {view.order.shape}, in another order than that of memory",
                "let layers that move data stand at the input or before a dense layer only",
            )
        return tensor, rank

    # --- layers of weights -------------------------------------------------------------------------------
    def _weights(self, node: ir.Node, axis: int) -> tuple[Array, tuple[int, ...]]:
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

    def _bias(self, node: ir.Node, channels: int, exponents: tuple[int, ...]) -> Array:
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

    def _product(self, node: ir.Node, base: Layer, weights: Array, own: tuple[int, ...], source: Tensor) -> Layer:
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
            bias=self._bias(node, len(weights), sums),
        )

    def _conv(self, node: ir.Node) -> Pending:
        view = self._view(node)
        source, rank = self._map(node, view)
        weights, exponents = self._weights(node, 0)
        if weights.ndim != rank + 2:
            raise refuse(node, f"{weights.ndim - 2} spatial axes", "at most two")
        found = window(node, weights.shape[2:], source.hwc[2 - rank : 2])
        weights = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])  # (cout, cin, kh, kw)
        weights = dilated(weights, (1,) * (2 - rank) + found.dilations)
        groups, channels = int(node.attributes.get_int("group", 1) or 1), source.hwc[2]
        depthwise = groups == channels == len(weights) and groups > 1
        if groups > 1 and not depthwise:
            weights = ungrouped(weights, groups)
            self.notes.append(f"Conv '{node.name}' of {groups} groups is one of all channels with zeros")
        pads, strides = flat_pads(node, found.begins, found.ends, view.pads), (1,) * (2 - rank) + found.strides
        shaped = Layer("depthwise" if depthwise else "conv", "", (), "", 0, 1, (0,), kernel=weights.shape[2:],
                       strides=(strides[0], strides[1]), pads=pads)  # fmt: skip
        ordered = weights[:, 0] if depthwise else weights.transpose(0, 2, 3, 1)
        return self._map_of(self._product(node, shaped, ordered, exponents, source), source, rank, len(weights))

    def _map_of(self, layer: Layer, source: Tensor, rank: int, channels: int) -> Pending:
        """What a layer of windows gives."""
        height, width = windows(layer, source)
        order = canonical(channels, height, width)
        sums = tuple(source.exponent + e for e in layer.weight_exponents) if layer.weights is not None else ()
        return Pending(layer, (height, width, channels), sums, order[:, 0] if rank == 1 else order)

    def _dense(self, node: ir.Node) -> Pending:
        view = self._view(node)
        gemm = node.op_type == "Gemm"
        factors = [float(node.attributes.get_float(name, 1.0) or 0.0) for name in ("alpha", "beta")]
        if gemm and (G.integer(node, "transA", 0) or factors != [1.0, 1.0]):
            raise refuse(node, "it transposes its input or scales its sums", CONVERT)
        found = stored(node.inputs[1])
        if found is not None and found.integers.ndim != 2:
            raise refuse(node, f"its weights have {found.integers.ndim} axes", "a matrix")
        weights, exponents = self._weights(node, 0 if gemm and G.integer(node, "transB", 0) else 1)
        order = self._memory(view)
        source = self.tensors[view.tensor]
        if any(view.pads) or order.size != weights.shape[1] or order.size != source.size:
            raise refuse(node, f"it multiplies rows of {order.shape}, not one vector", "flatten before it")
        columns = np.empty_like(weights)
        columns[:, order.ravel()] = weights
        plain = Layer("dense", "", (), "", 0, 1, (0,))
        layer = self._product(node, plain, columns, exponents, source)
        sums = tuple(source.exponent + e for e in layer.weight_exponents)
        positions = np.arange(len(weights)).reshape(*order.shape[:-1], len(weights))
        return Pending(layer, (len(weights),), sums, positions)

    # --- the others --------------------------------------------------------------------------------------
    def _pool(self, node: ir.Node) -> Pending:
        view = self._view(node)
        source, rank = self._map(node, view)
        kind: Kind = "maxpool" if node.op_type == "MaxPool" else "avgpool"
        found = window(node, tuple(node.attributes.get_ints("kernel_shape", ()) or ()), source.hwc[2 - rank : 2])
        pads = flat_pads(node, found.begins, found.ends, (0, 0, 0, 0))
        if any(d != 1 for d in found.dilations) or (len(node.outputs) > 1 and node.outputs[1].uses()):
            raise refuse(node, "its windows have gaps, or its indices are used", "a pool without them")
        if any(view.pads) and kind == "maxpool":
            raise refuse(node, "zeros before it could win", "let the pool pad")
        if kind == "avgpool" and any(pads) and not node.attributes.get_int("count_include_pad", 0):
            raise refuse(
                node, "its average at the border is over fewer positions", "count_include_pad = 1, or no padding"
            )
        kernel, strides = (1,) * (2 - rank) + found.kernel, (1,) * (2 - rank) + found.strides
        total = tuple(a + b for a, b in zip(pads, view.pads, strict=True))
        layer = Layer(kind, node.name or "", (source.name,), "", 0, 1, (0,), kernel=(kernel[0], kernel[1]),
                      strides=(strides[0], strides[1]), pads=total)  # type: ignore[arg-type]  # fmt: skip
        sizes = [n + total[a] + total[a + 2] - layer.kernel[a] for a, n in enumerate(source.hwc[:2])]
        if node.attributes.get_int("ceil_mode", 0) and any(n % s for n, s in zip(sizes, layer.strides, strict=True)):
            raise refuse(node, "its last windows reach beyond the border (ceil_mode)", EVEN)
        return self._pooled(layer, source, rank)

    def _pooled(self, layer: Layer, source: Tensor, rank: int) -> Pending:
        bits = 0
        if layer.kind == "avgpool":
            count = layer.kernel[0] * layer.kernel[1]
            bits = count.bit_length() - 1
            if count != 1 << bits:
                bits = AVERAGE_BITS
                layer = replace(layer, multiplier=(2 * 2**bits + count) // (2 * count))
        return replace(self._map_of(layer, source, rank, source.hwc[2]), exponents=(source.exponent + bits,))

    def _global(self, node: ir.Node) -> Pending:
        view = self._view(node)
        source, rank = self._map(node, view)
        kind: Kind = "maxpool" if node.op_type == "GlobalMaxPool" else "avgpool"
        if any(view.pads):
            raise refuse(node, "it reads a padded value", "pool before padding")
        return self._pooled(
            Layer(kind, node.name or "", (source.name,), "", 0, 1, (0,), kernel=source.hwc[:2]), source, rank
        )

    def _mean(self, node: ir.Node) -> Pending:
        """ReduceMean over all positions of a map, in whichever layout the model has it."""
        view = self._view(node)
        order = self._memory(view)
        axes = M.constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
        given = axes.ravel().tolist() if axes is not None else list(node.attributes.get_ints("axes", ()) or ())
        over = sorted(a % (order.ndim + 1) - 1 for a in given)
        kept = [a for a in range(order.ndim) if a not in over]
        if len(kept) != 1 or not over or -1 in over or any(view.pads):
            raise refuse(node, f"a mean over axes {given}", "a mean over all rows and columns")
        turned = order.transpose(kept + over)
        source, rank = self._map(node, View(view.tensor, view.order.transpose(kept + over)))
        layer = Layer("avgpool", node.name or "", (source.name,), "", 0, 1, (0,), kernel=source.hwc[:2])
        sizes = [n if a in kept else 1 for a, n in enumerate(order.shape)]
        if not node.attributes.get_int("keepdims", 1):
            sizes = [turned.shape[0]]
        return replace(self._pooled(layer, source, rank), order=np.arange(turned.shape[0]).reshape(sizes))

    def _add(self, node: ir.Node) -> Pending:
        views = [self._view(node, i) for i in (0, 1)]
        orders = [self._memory(v) for v in views]
        sources = [self.tensors[v.tensor] for v in views]
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

    def _concat(self, node: ir.Node) -> Pending:
        views = [self._view(node, i) for i in range(len(node.inputs))]
        sources = [self.tensors[v.tensor] for v in views]
        orders = [self._memory(v) for v in views]
        sources = [self.tensors[v.tensor] for v in views]  # the input may have got its shape just now
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


_OPS: Mapping[str, Callable[[_Lowering, ir.Node], View | Pending]] = {
    "QuantizeLinear": _Lowering._quantize,
    "DequantizeLinear": _Lowering._dequantize,
    "Conv": _Lowering._conv,
    "Gemm": _Lowering._dense,
    "MatMul": _Lowering._dense,
    "MaxPool": _Lowering._pool,
    "AveragePool": _Lowering._pool,
    "GlobalAveragePool": _Lowering._global,
    "GlobalMaxPool": _Lowering._global,
    "ReduceMean": _Lowering._mean,
    "Add": _Lowering._add,
    "Concat": _Lowering._concat,
}


def _needed(layers: Sequence[Layer], output: str) -> list[Layer]:
    """Those that the output depends on."""
    wanted, kept = {output}, []
    for layer in reversed(layers):
        if layer.output in wanted:
            wanted |= set(layer.inputs)
            kept.append(layer)
    return kept[::-1]
