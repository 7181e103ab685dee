"""Writes a quantization plan into a float model as QuantizeLinear and DequantizeLinear nodes: no data, no decisions."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import ArtifactError, UnsupportedOpError
from edgekit.passes.decide import FLOAT, clip_bounds, data_inputs, weight_of
from edgekit.passes.plan import Activation, QuantizationPlan, Weight, integer_range
from edgekit.passes.rescale import rescaled
from edgekit.scheme import BOUNDS, WEIGHTED

Array = np.ndarray[Any, Any]
# how integers of so many bits are stored
STORED: dict[int, np.dtype[Any]] = {**dict.fromkeys(range(2, 9), np.dtype(np.int8)), 16: np.dtype(np.int16)}


def prepared(model: ir.Model) -> ir.Model:
    """A copy with named nodes and typed values. Raises UnsupportedOpError if it is quantized already."""
    proto = M.to_proto(model)
    taken: set[str] = set()
    for index, node in enumerate(proto.graph.node):
        if node.op_type in {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"}:
            raise UnsupportedOpError(
                f"the model is already quantized ({node.op_type} node '{node.name}')",
                "give the float model it was made from",
            )
        name = node.name or f"{node.op_type}_{index}"
        while name in taken:
            name = f"{name}_{index}"
        node.name = name
        taken.add(name)
    # where inference fails, types that were there stay; nodes beside untyped values are left float, with that reason
    with suppress(onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return M.from_proto(proto)


def apply_plan(model: ir.Model, plan: QuantizationPlan) -> ir.Model:
    """The QDQ model: inputs and outputs keep name and float32 dtype, quantized nodes read DequantizeLinear outputs.

    Uses the plan and the model's weights only. Raises ArtifactError if the plan is for another model.
    """
    model = prepared(model) if not plan.factors else rescaled(prepared(model), plan.factors)
    nodes = {node.name: node for node in model.graph}
    for name in [*plan.quantized, *plan.weights, *plan.fused]:
        if name not in nodes:
            raise ArtifactError(f"the quantization plan names a node '{name}' that the model lacks", "plan it again")
    for name, fate in sorted(plan.fused.items()):
        if fate == "removed":
            _absorb(model.graph, nodes[name])
    writer = _Writer(model, plan)
    for name, weight in sorted(plan.weights.items()):  # before the activations: it reads the names of the inputs
        writer.weigh(nodes[name], weight)
    for name, parameters in sorted(plan.activations.items()):  # a plan read from JSON may come in any order
        writer.activate(name, parameters)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del model.graph.initializers[name]
    for node in list(model.graph):
        if node.op_type == "Constant" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            model.graph.remove(node, safe=True)
    return model


def _absorb(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a Relu or Clip: its producer's output takes its place and its name, and the producer notes its bounds."""
    before, after = node.inputs[0], node.outputs[0]
    bounds, producer = clip_bounds(node), None if before is None else before.producer()
    if before is None or bounds is None or producer is None:
        return
    producer.metadata_props[BOUNDS] = f"{bounds[0]!r} {bounds[1]!r}"
    name = after.name
    for position, output in enumerate(graph.outputs):
        if output is after:
            graph.outputs[position] = before
    after.replace_all_uses_with(before)
    graph.remove(node, safe=True)
    after.name = None
    before.name = name


class _Writer:
    """Inserts the nodes of one plan into one model."""

    def __init__(self, model: ir.Model, plan: QuantizationPlan) -> None:
        self.graph = model.graph
        self.plan = plan
        removed = {name for name, fate in plan.fused.items() if fate == "removed"}
        self.quantized = set(plan.quantized) - removed
        self.values: dict[str, ir.Value] = {v.name: v for v in self.graph.inputs if v.name}
        self.values.update({k: v for k, v in self.graph.initializers.items()})
        self.values.update({v.name: v for n in self.graph for v in n.outputs if v.name})
        self.node_names = {n.name for n in self.graph}

    # --- naming ---
    def fresh(self, name: str) -> str:
        new, count = name, 1
        while new in self.values or new in self.node_names:
            count += 1
            new = f"{name}_{count}"
        return new

    def initializer(self, name: str, array: Array) -> ir.Value:
        name = self.fresh(name)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        self.values[name] = value
        return value

    def node(
        self, op: str, inputs: list[ir.Value], name: str, like: ir.Value, dtype: ir.DataType, **axis: int
    ) -> ir.Node:
        name = self.fresh(name)
        output = ir.Value(name=name, shape=like.shape, type=ir.TensorType(dtype))
        self.values[name] = output
        self.node_names.add(name)
        return ir.node(op, inputs, dict(axis), outputs=[output], name=name)

    # --- activations ---
    def activate(self, name: str, parameters: Activation) -> None:
        if name not in self.values:
            raise ArtifactError(f"the quantization plan names a tensor '{name}' that the model lacks", "plan it again")
        value = self.values[name]
        scale = self.initializer(f"{name}_scale", np.array(parameters.scale, np.float32))
        zero = self.initializer(f"{name}_zero_point", np.array(parameters.zero_point, STORED[parameters.bits]))
        array = M.constant(value)
        if array is not None:
            stored = self.initializer(f"{name}_quantized", quantize(array, parameters))
            self._connect(value, [stored, scale, zero], [], only_integer=True)
            return
        producer = value.producer()
        from_integers = producer is not None and producer.name in self.quantized
        dtype = ir.DataType.from_numpy(STORED[parameters.bits])
        narrow = self._narrowed(value, parameters) if parameters.bits < 8 else None
        source = value if narrow is None else narrow.outputs[0]
        quantizer = self.node("QuantizeLinear", [source, scale, zero], f"{name}_quantized", value, dtype)
        added = [quantizer] if narrow is None else [narrow, quantizer]
        if producer is None:
            self.graph.insert_before(self.graph[0], added)
        else:
            self.graph.insert_after(producer, added)
        self._connect(value, [quantizer.outputs[0], scale, zero], added, only_integer=not from_integers)
        if from_integers and value.is_graph_output():
            self._as_output(value, [quantizer.outputs[0], scale, zero], quantizer)

    def _narrowed(self, value: ir.Value, parameters: Activation) -> ir.Node:
        """A Clip to the range of fewer bits than integers are stored in."""
        name = f"{value.name}_clipped"
        ends = [np.array(end, np.float32) for end in parameters.limits]
        bounds = [self.initializer(f"{name}_{side}", end) for side, end in zip(("low", "high"), ends, strict=True)]
        return self.node("Clip", [value, *bounds], name, value, FLOAT)

    def _connect(self, value: ir.Value, inputs: list[ir.Value], added: list[ir.Node], *, only_integer: bool) -> None:
        """Give each reader a DequantizeLinear of its own, so that runtimes can fuse it into the reader.

        added: the nodes that round the value.
        """
        for user, position in list(value.uses()):
            if user in added:
                continue
            integer = user.name in self.quantized and user.graph is self.graph and position in data_inputs(user)
            if only_integer and not integer:
                continue
            reader = self.node("DequantizeLinear", inputs, f"{value.name}_dequantized", value, FLOAT)
            if user.graph is self.graph:
                self.graph.insert_before(user, reader)
            elif added:
                self.graph.insert_after(added[-1], reader)
            user.replace_input_with(position, reader.outputs[0])

    def _as_output(self, value: ir.Value, inputs: list[ir.Value], quantizer: ir.Node) -> None:
        reader = self.node("DequantizeLinear", inputs, f"{value.name}_dequantized", value, FLOAT)
        self.graph.insert_after(quantizer, reader)
        name = value.name or ""
        value.name = self.fresh(f"{name}_real")
        self.values[value.name] = value
        reader.outputs[0].name = name
        for position, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[position] = reader.outputs[0]

    # --- weights ---
    def weigh(self, node: ir.Node, plan: Weight) -> None:
        weight = weight_of(node)
        if weight is None or weight.name != plan.value:
            raise ArtifactError(f"the quantization plan gives node '{node.name}' another weight", "plan it again")
        array, bias = folded(node)
        scales = np.array(plan.scales, np.float32)
        stored = quantize_weight(array, plan)
        self._constant(node, 1, f"{plan.value}", stored, scales, weight, plan.axis)
        if bias is not None:
            bias = bias + np.array(self.plan.bias_shifts.get(node.name or "", 0.0))
            source = self.plan.activations[(node.inputs[0].name or "") if node.inputs[0] is not None else ""]
            products = np.float32(source.scale) * np.resize(scales, bias.shape)
            integers = np.clip(np.rint(bias / products.astype(np.float64)), -(2**31) + 1, 2**31 - 1).astype(np.int32)
            self._constant(node, 2, f"{node.name}_bias", integers, products, None, 0)
        for name in ("alpha", "beta"):
            node.attributes.pop(name, None)

    def _constant(
        self, node: ir.Node, position: int, name: str, array: Array, scales: Array, like: ir.Value | None, axis: int
    ) -> None:
        stored = self.initializer(f"{name}_quantized", array)
        inputs = [stored, self.initializer(f"{name}_scale", scales)]
        inputs.append(self.initializer(f"{name}_zero_point", np.zeros(scales.shape, array.dtype)))
        reader = self.node("DequantizeLinear", inputs, f"{name}_dequantized", like or stored, FLOAT, axis=axis)
        self.graph.insert_before(node, reader)
        node.replace_input_with(position, reader.outputs[0])


def quantize_weight(array: Array, plan: Weight) -> Array:
    """float32 weight -> int8 of the same shape within the plan's bits: the plan's own integers, else ties to even."""
    if plan.integers:
        return np.frombuffer(plan.integers, np.int8).reshape(array.shape)
    shape = [1] * array.ndim
    shape[plan.axis] = -1
    scales = np.array(plan.scales, np.float32).reshape(shape)
    stored: Array = np.clip(np.rint(array / scales), plan.lowest, plan.limit).astype(np.int8)
    return stored


def quantize(array: Array, parameters: Activation) -> Array:
    """float array -> integers by the plan's parameters, in the arithmetic of QuantizeLinear (float32, ties to even)."""
    q = np.rint(array.astype(np.float32) / np.float32(parameters.scale)) + parameters.zero_point
    stored: Array = np.clip(q, *integer_range(parameters.bits)).astype(STORED[parameters.bits])
    return stored


def folded(node: ir.Node) -> tuple[Array, Array | None]:
    """Weight (float32) and bias (float64, one value per output channel) of a node, Gemm's alpha and beta applied."""
    weight = M.constant(node.inputs[1])
    if weight is None or node.op_type not in WEIGHTED:
        raise ArtifactError(f"node '{node.name}' has no constant weight", "plan it again")
    bias = M.constant(node.inputs[2]) if len(node.inputs) > 2 and node.op_type != "MatMul" else None
    weight = weight.astype(np.float32)
    if bias is not None:
        bias = bias.astype(np.float64).reshape(-1)
    if node.op_type == "Gemm":
        weight = weight * np.float32(node.attributes.get_float("alpha", 1.0))
        if bias is not None:
            outputs = weight.shape[0 if node.attributes.get_int("transB", 0) else 1]
            bias = np.resize(bias * float(node.attributes.get_float("beta", 1.0) or 0.0), outputs)
    return weight, bias
