"""A quantized model whose roundings can be turned on and off one node at a time: what blame measures with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes.apply_plan import apply_plan, folded, prepared
from edgekit.passes.decide import FLOAT
from edgekit.passes.plan import QuantizationPlan
from edgekit.passes.rescale import rescaled
from edgekit.passes.roundings import PRODUCTS, idle, leave_out
from edgekit.scheme import EQUAL_SCALES, WEIGHTED

Array = np.ndarray[Any, Any]
# hand on integers of one scale but compute new values, which are rounded
_COMPUTES = frozenset({"AveragePool", "Resize"})
_PREFIX = "edgekit_rounds_"


class Switchboard:
    """Runs `model` with any subset of the plan's roundings; the others are left out as if they were float.

    Each rounding belongs to one unit: a weight, its bias and the result of a node to that node, a graph input to
    itself. `parts` tells the two kinds apart: (unit, "weight") and (unit, "activation"). fetch: values to return.
    """

    def __init__(self, model: ir.Model, plan: QuantizationPlan, fetch: Iterable[str]) -> None:
        self.fetch = tuple(fetch)
        # saturation does what a removed Relu did only as long as its rounding is on
        kept = replace(plan, fused=dict.fromkeys(plan.fused, "kept"))
        source, written = rescaled(prepared(model), plan.factors), apply_plan(model, kept)
        self.parts: dict[tuple[str, str], str] = {}
        self._plan = plan
        # those of the plan itself: a Relu that saturation stands for looks like one more operator here
        written = leave_out(written, idle(apply_plan(model, plan), PRODUCTS))
        self._wire(written, {n.name or "": n for n in source.graph})
        self._session = M.FloatSession(written, fetch=self.fetch, optimize=False)

    @property
    def units(self) -> tuple[str, ...]:
        """Every unit, in graph order of its first rounding."""
        return tuple(dict.fromkeys(unit for unit, _ in self.parts))

    def run(self, inputs: Mapping[str, Array], on: Collection[tuple[str, str]]) -> M.Tensors:
        """inputs: by name, batch first. on: parts that round. Returns the fetched values."""
        switches = {name: np.array(part in on) for part, name in self.parts.items()}
        got = self._session.run({**inputs, **switches})
        return {name: got[name] for name in self.fetch}

    # --- wiring ------------------------------------------------------------------------------------
    def _wire(self, written: ir.Model, originals: Mapping[str, ir.Node]) -> None:
        graph = written.graph
        for node in [n for n in graph if n.op_type == "DequantizeLinear"]:
            quantizer = node.inputs[0].producer() if node.inputs[0] is not None else None
            if quantizer is not None:
                exact = quantizer.inputs[0]
                assert exact is not None
                unit = self._owner(exact)
                flag = self._switch(graph, unit, "activation") if unit else None
            else:
                unit, exact = self._constant(graph, node, originals)
                flag = self._switch(graph, unit, "weight")
            self._choose(graph, node, exact, flag)
        for quantizer in [n for n in graph if n.op_type == "QuantizeLinear" and not n.outputs[0].uses()]:
            graph.remove(quantizer, safe=True)

    def _owner(self, value: ir.Value) -> str:
        """The unit that a quantized value's rounding belongs to; empty if it only hands on rounded values."""
        producer = value.producer()
        if producer is None:
            return value.name or ""
        name = producer.name or ""
        if producer.op_type in EQUAL_SCALES - _COMPUTES and all(
            v is None or M.constant(v) is not None or _is_rounded(v) for v in producer.inputs
        ):
            return ""
        return (self._plan.fused.get(name) and _before(producer)) or name

    def _constant(self, graph: ir.Graph, node: ir.Node, originals: Mapping[str, ir.Node]) -> tuple[str, ir.Value]:
        """(unit, the float value) of a dequantized weight, bias or constant operand."""
        user, position = next(iter(node.outputs[0].uses()))
        original = originals[user.name or ""]
        value = original.inputs[position]
        array = M.constant(value)
        if original.op_type in WEIGHTED and (user.name or "") in self._plan.weights and position in (1, 2):
            weight, bias = folded(original)
            array = weight if position == 1 else bias
        assert array is not None
        name = f"{node.outputs[0].name}/exact"
        tensor = ir.tensor(np.asarray(array, np.float32, order="C"), name=name)
        exact = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(FLOAT), const_value=tensor)
        graph.register_initializer(exact)
        return user.name or "", exact

    def _switch(self, graph: ir.Graph, unit: str, kind: str) -> ir.Value:
        if (unit, kind) not in self.parts:
            name = f"{_PREFIX}{len(self.parts)}"
            self.parts[unit, kind] = name
            graph.inputs.append(ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL)))
        return next(v for v in graph.inputs if v.name == self.parts[unit, kind])

    def _choose(self, graph: ir.Graph, node: ir.Node, exact: ir.Value, flag: ir.Value | None) -> None:
        rounded = node.outputs[0]
        if flag is None:
            choice = ir.node("Identity", [exact], name=f"{node.name}/exact")
        else:
            choice = ir.node("Where", [flag, rounded, exact], name=f"{node.name}/choice")
        output = choice.outputs[0]
        output.type, output.shape = ir.TensorType(FLOAT), rounded.shape
        graph.insert_after(node, choice)
        for position, value in enumerate(graph.outputs):
            if value is rounded:
                graph.outputs[position] = output
        for user, position in list(rounded.uses()):
            if user is not choice:
                user.replace_input_with(position, output)
        output.name = f"{rounded.name}/choice"
        if any(value is output for value in graph.outputs):
            output.name, rounded.name = rounded.name, f"{rounded.name}/rounded"


def _is_rounded(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type in {"DequantizeLinear", "Where", "Identity"}


def _before(node: ir.Node) -> str:
    """The name of the node whose result a Relu or Clip bounds."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    return "" if producer is None else producer.name or ""
