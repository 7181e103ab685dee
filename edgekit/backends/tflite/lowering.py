"""ONNX model -> the file's graph, with every refusal of every node collected in one walk."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgekit.backends.tflite.broadcast import narrow
from edgekit.backends.tflite.emitter import Emitter, identity
from edgekit.backends.tflite.expand import expand
from edgekit.backends.tflite.graph import Graph, Quant, Tensor
from edgekit.backends.tflite.ops import LOWERINGS
from edgekit.backends.tflite.patterns import arrange
from edgekit.backends.tflite.peephole import clean
from edgekit.backends.tflite.prepare import Prepared, prepare
from edgekit.backends.tflite.rules import INT8_FORM, NO_FORM
from edgekit.backends.tflite.unroll import unroll
from edgekit.backends.tflite.values import Node, Refused, Value
from edgekit.backends.tflite.wider import lower_in_some_type


@dataclass(frozen=True)
class Refusal:
    """Why one node cannot be lowered."""

    node: str
    op: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.op} '{self.node}': {self.reason} ({self.remedy})"


@dataclass
class Lowered:
    """graph: complete only if `refusals` is empty. islands: nodes computed in float between quantized ones."""

    graph: Graph
    refusals: list[Refusal] = field(default_factory=list)
    islands: list[str] = field(default_factory=list)
    requantized: list[str] = field(default_factory=list)
    fixed_batch: bool = False


def lower(model: ir.Model, io: str = "float32") -> Lowered:
    """model: opset >= 21, float or QDQ. Nothing is written to disk; raises ShapeError for open sizes.

    io: "int8" makes quantized inputs and outputs int8 tensors instead of float32 ones.
    """
    return _Walk(arrange(prepare(expand(unroll(model), LOWERINGS))), io).run()


class _Walk:
    def __init__(self, prepared: Prepared, io: str) -> None:
        self.prepared = prepared
        self.io = io
        self.e = Emitter()
        self.e.know(prepared.nodes, [value for _, value in prepared.outputs])
        self.out = Lowered(self.e.graph, fixed_batch=prepared.fixed_batch)
        self.out.refusals += [Refusal(n, op, r.reason, r.remedy) for n, op, r in prepared.refused]

    def run(self) -> Lowered:
        for name, value in self.prepared.inputs:
            value = self._integer_input(value) if self.io == "int8" else value
            tensor = self.e.blank(value)
            self.e.define(value, tensor)
            self.e.graph.inputs.append((name, tensor))
        for name, op, _ in self.prepared.refused:
            self._poison([o for n in self.prepared.nodes if (n.name, n.op) == (name, op) for o in n.outputs])
        for node in self.prepared.nodes:
            self.e.node = node
            mark = len(self.e.graph.operators)
            try:
                self._node(node)
            except Refused as refused:
                del self.e.graph.operators[mark:]
                self.out.refusals.append(Refusal(node.name, node.op, refused.reason, refused.remedy))
                self._poison(node.outputs)
        self.e.node = None
        if not self.out.refusals:
            self._outputs()
            clean(self.e.graph)
            narrow(self.e.graph)
        return self.out

    def _node(self, node: Node) -> None:
        lowering = LOWERINGS.get(node.op)
        if lowering is None:
            default = (f"LiteRT has no {node.op}", "replace it by simpler operators, or leave the tflite backend out")
            raise Refused(*NO_FORM.get(node.op, default))
        reads = [v for v in node.inputs if v is not None and v.quant is not None]
        writes = [v for v in node.outputs if v.quant is not None]
        if not reads and not writes:
            lower_in_some_type(self.e, node, lowering)
        elif node.op in INT8_FORM and _all_integer(node):
            if self.io == "float32" and self._faster_in_float(node):
                self._island(node)
            else:
                self._integer(node)
        elif node.op == "QuantizeLinear":
            lowering(self.e, node)
        else:
            self._island(node)

    def _faster_in_float(self, node: Node) -> bool:
        """Whether it is the core of an attention or a GELU: XNNPACK's float kernels beat LiteRT's int8 ones there.

        Between the same roundings, so nothing changes but the time: a quarter for a small ViT. Integer inputs and
        outputs tell of a device that may have no float kernels: for that all stays in integers.
        """
        first = node.input(0)
        if first is None or first.dtype != np.int8:
            return False
        if node.op == "Softmax":
            return bool(self.e.readers(node.outputs[0]))  # a classifier's last one is small, and stays
        return node.op == "Gelu" or (node.op == "MatMul" and all(v is not None and v.data is None for v in node.inputs))

    def _integer(self, node: Node) -> None:
        """On integers; in float if the kernel has no such case, unless it has weights: those were meant for int8."""
        if node.op == "QuantizeLinear" and not _same_scale(node):
            self.out.requantized.append(node.name)
        mark = len(self.e.graph.operators)
        try:
            LOWERINGS[node.op](self.e, node)
        except Refused:
            if (
                any(v is not None and v.data is not None and v.rank > 1 for v in node.inputs)
                or node.op == "QuantizeLinear"
            ):
                raise
            del self.e.graph.operators[mark:]
            self._island(node)

    def _island(self, node: Node) -> None:
        """The node in float: quantized inputs behind DEQUANTIZE, quantized outputs behind QUANTIZE."""
        if any(v is not None and v.quant is not None and v.data is None for v in node.inputs):
            self.out.islands.append(node.name)  # else it is float input that is rounded a node later
        outputs = [v if v.quant is None else _float_twin(v) for v in node.outputs]
        inside = Node(
            node.op, node.name, [None if v is None else self.e.real(v) for v in node.inputs], outputs, node.attributes,
            node.activation, node.extra,
        )  # fmt: skip
        LOWERINGS[node.op](self.e, inside)
        for real, wanted in zip(outputs, node.outputs, strict=True):
            if real is not wanted:
                layout = (self.e.layouts(real) or [identity(real.rank)])[0]
                self.e.emit(wanted, "QUANTIZE", [self.e.tensor(real, layout)], layout)

    def _poison(self, values: list[Value]) -> None:
        """Stand-ins for what a refused node would have made, so that the walk goes on and finds the other refusals."""
        for value in values:
            if not self.e.layouts(value):
                self.e.define(value, self.e.blank(value))

    def _outputs(self) -> None:
        taken = {t for _, t in self.e.graph.inputs}
        for name, value in self.prepared.outputs:
            if self.io == "int8" and value.quant is None and value.dtype == np.float32:
                self._no_integers(value)
                continue
            try:
                tensor = self._output(name, value, taken)
            except Refused as refused:
                self.out.refusals.append(Refusal(name, "output", refused.reason, refused.remedy))
                continue
            taken.add(tensor)
            self.e.graph.outputs.append((name, tensor))

    def _output(self, name: str, value: Value, taken: set[Tensor]) -> Tensor:
        """A tensor of its own that holds `value` as the model declares it."""
        integers = self.prepared.integers.get(name)
        if integers is not None:
            tensor = self.e.tensor(value)
            if integers != tensor.dtype:
                tensor = self._unsigned(tensor)
        else:
            tensor = self.e.tensor(value if self.io == "int8" else self.e.real(value))
        return self._copied(tensor) if tensor in taken or tensor.data is not None else tensor

    def _unsigned(self, tensor: Tensor) -> Tensor:
        """int8 as the uint8 that the model has: 128 more of the same steps."""
        quant = tensor.quant
        if quant is None or tensor.dtype != np.int8 or not quant.per_tensor:
            raise Refused("its integers are of a type or of scales that LiteRT cannot return", "quantize to int8")
        moved = Quant(quant.scales, quant.zeros + 128, quant.axis)
        made = self.e.op("QUANTIZE", [tensor], tensor.shape, dtype=np.uint8, quant=moved, dynamic=tensor.dynamic)
        made.name = f"{tensor.name}/unsigned"
        return made

    def _integer_input(self, value: Value) -> Value:
        """What the input's only reader, a QuantizeLinear, makes of it: that is then the input."""
        readers = self.e.readers(value)
        if value.dtype != np.float32:
            return value
        if len(readers) != 1 or readers[0].op != "QuantizeLinear":
            self._no_integers(value)
            return value
        self.prepared.nodes.remove(readers[0])
        return readers[0].outputs[0]

    def _no_integers(self, value: Value) -> None:
        told = "it is computed or read in float, so it cannot be int8"
        self.out.refusals.append(Refusal(value.name, "--io int8", told, "leave --io int8 out"))

    def _copied(self, tensor: Tensor) -> Tensor:
        """A tensor of its own: LiteRT's inputs, constants and outputs may not be one."""
        made = Tensor(f"{tensor.name}/output", tensor.dtype, tensor.shape, tensor.dynamic, tensor.quant)
        sizes = self.e.sizes(tensor.shape, tensor.dynamic)
        self.e.write("RESHAPE", [tensor, self.e.constant(np.array(sizes, np.int32))], [made], newShape=list(sizes))
        return made


def _same_scale(node: Node) -> bool:
    quant = node.require(0).quant
    return quant is not None and quant.same(node.outputs[0].quant)


def _float_twin(value: Value) -> Value:
    return Value(f"{value.name}_unrounded", np.dtype(np.float32), value.shape, value.dynamic)


def _all_integer(node: Node) -> bool:
    """Whether all real-valued operands and results are quantized (parameters such as axes and sizes do not count)."""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    return all(v.quant is not None or v.dtype.kind != "f" or _parameter(node, v) for v in values)


_PARAMETERS = {"Clip": (1, 2), "Pad": (2,), "Resize": (1, 2)}  # real-valued inputs that are no operands


def _parameter(node: Node, value: Value) -> bool:
    return value.data is not None and any(node.input(i) is value for i in _PARAMETERS.get(node.op, ()))
