"""From a quantized ONNX model with power-of-two scales to an IntegerNet.

Everything is checked, nothing is decided: what the model rounds, the network rounds, to the same grid. What it cannot
take is refused by operator, node, reason and remedy. The rounding of ties is the only difference (docs/fpga.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.backends.fpga.grid import CONVERT, bits_of, grid, nearest, refuse
from edgekit.backends.fpga.kernels import muted
from edgekit.backends.fpga.layers import OPS
from edgekit.backends.fpga.net import MAX_SHIFT, IntegerNet, Layer, Layout, Tensor, limits
from edgekit.backends.fpga.views import MOVES, Pending, View, is_map, moved
from edgekit.errors import ShapeError, UnsupportedOpError
from edgekit.passes.decide import clip_bounds
from edgekit.scheme import HOST

Array = np.ndarray[Any, Any]

_INPUT = Layer("maxpool", "", (), "", 0, 1, (0,))  # stands for the host's quantizer
FLOAT = "a float operator: leave it to the host, or train without it"


def lower(model: ir.Model) -> IntegerNet:
    """Raises UnsupportedOpError (operator, node, reason), ShapeError (sizes unknown)."""
    return Lowering(model).net()


class Lowering:
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
        if not np.array_equal(self.in_memory(found).ravel(), np.arange(self.tensors[found.tensor].size)):
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
        elif node.op_type == "QuantizeLinear":
            result = self._quantize(node)
        elif node.op_type == "DequantizeLinear":
            result = self._dequantize(node)
        elif node.op_type in OPS:
            result = OPS[node.op_type](self, node)
        else:
            raise refuse(node, "it has no integer form", FLOAT)
        self.values[node.outputs[0].name or ""] = result

    def view(self, node: ir.Node, position: int = 0) -> View:
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
        order = self.in_memory(view)
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
        done, shift = muted(before.layer, shift) if max(shift) > MAX_SHIFT else (before.layer, shift)
        if any(abs(s) > MAX_SHIFT for s in shift):
            far = max(shift, key=abs)
            raise refuse(node, f"it shifts sums by {far} bits, {MAX_SHIFT} at most can be", "rescale the weights")
        name = self._free(name)
        layer = replace(done, output=name, low=low, high=high, shift=shift)
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
        view = self.view(node)
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
    def in_memory(self, view: View) -> Array:
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

    def whole_map(self, node: ir.Node, view: View) -> tuple[Tensor, int]:
        """The tensor behind a whole feature map (channels, height, width), and the rank of its positions, 1 or 2."""
        order = self.in_memory(view)
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


def _needed(layers: Sequence[Layer], output: str) -> list[Layer]:
    """Those that the output depends on."""
    wanted, kept = {output}, []
    for layer in reversed(layers):
        if layer.output in wanted:
            wanted |= set(layer.inputs)
            kept.append(layer)
    return kept[::-1]
