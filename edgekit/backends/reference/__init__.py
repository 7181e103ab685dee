"""Executes a QDQ model in numpy with exact integer arithmetic: what every backend is compared with.

docs/reference.md states the arithmetic. In one line: DequantizeLinear costs nothing, sums of products are integers,
everything between them and the next QuantizeLinear is float64, and only QuantizeLinear rounds.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from edgekit.backends.reference import linear, movement, pool, rounding
from edgekit.backends.reference.elementwise import ELEMENTWISE
from edgekit.backends.reference.fallback import Runner, captured, runner
from edgekit.backends.reference.values import Array, Value, is_exact, plain
from edgekit.errors import ShapeError
from edgekit.model import Tensors, signature

__all__ = ["Reference", "execute"]

# sums of products and pools: exact on quantized operands, and the same code in float64 for float32 ones
_ANY_OPERAND = {
    "Conv": linear.conv,
    "ConvTranspose": linear.conv_transpose,
    "Gemm": linear.gemm,
    "MatMul": linear.matmul,
    "MaxPool": pool.max_pool,
    "AveragePool": pool.average_pool,
    "GlobalAveragePool": pool.global_average_pool,
    "GlobalMaxPool": pool.global_max_pool,
}
_DTYPES_OF_LINEAR = (np.dtype(np.float32), np.dtype(np.float64))


def execute(model: ir.Model, inputs: Tensors, keep: Iterable[str] = ()) -> Tensors:
    """Run `model` once: see Reference.run."""
    return Reference(model).run(inputs, keep)


class Reference:
    """A model ready to be executed; keeps the per-node work (constants, one-node evaluators) between runs."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._opsets = dict(model.opset_imports)
        self._constants: dict[str, Value] = {
            name: value.const_value.numpy()
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        }
        self._runners: dict[ir.Node, Runner] = {}
        self._inputs = signature(model).inputs

    def run(self, inputs: Tensors, keep: Iterable[str] = ()) -> Tensors:
        """inputs: one array per graph input, batch first. Returns the graph outputs, and the values named in `keep`.

        The output of a QuantizeLinear comes as its stored integers; every other value in its declared float dtype.
        Raises ShapeError for a missing input or an unknown name in `keep`, UnsupportedOpError,
        NonFiniteError for NaN at a QuantizeLinear, and ConversionMismatchError when an int32 accumulator would wrap.
        """
        self._check(inputs)
        values: dict[str, Value] = {**self._constants, **inputs}
        outputs = [v.name or "" for v in self._model.graph.outputs]
        wanted = dict.fromkeys([*outputs, *keep])
        remaining = self._reads()
        for node in self._model.graph:
            operands = [None if v is None else values[v.name or ""] for v in node.inputs]
            with np.errstate(all="ignore"):  # what matters is refused where it is quantized
                results = self._compute(node, operands, values)
            for value, result in zip(node.outputs, results, strict=False):
                if value.name:
                    values[value.name] = result
            for name in (v.name for v in node.inputs if v is not None and v.name in remaining):
                assert name is not None
                remaining[name] -= 1
                if remaining[name] == 0 and name not in wanted:
                    del values[name]
        unknown = [name for name in wanted if name not in values]
        if unknown:
            raise ShapeError(f"the model has no value '{unknown[0]}'", "name a value of the graph")
        return {name: plain(values[name]) for name in wanted}

    def _check(self, inputs: Tensors) -> None:
        for spec in self._inputs:
            if spec.name not in inputs:
                raise ShapeError(f"no array for the model's input '{spec.name}'", "pass every input by name")
            given = inputs[spec.name]
            if given.dtype.name != spec.dtype:
                raise ShapeError(f"input '{spec.name}' is {given.dtype}", f"pass {spec.dtype}")
            fits = given.ndim == len(spec.shape) and all(
                isinstance(want, str) or want == got for want, got in zip(spec.shape, given.shape, strict=True)
            )
            if spec.shape and not fits:
                raise ShapeError(f"input '{spec.name}' has shape {given.shape}", f"the model takes {spec.shape}")

    def _reads(self) -> dict[str, int]:
        """How often each computed value is read, so that memory is given back; what subgraphs read stays."""
        reads: dict[str, int] = {}
        inside: set[str] = set()
        for node in self._model.graph:
            inside.update(captured(node))
            for value in node.inputs:
                if value is not None and value.name and value.name not in self._constants:
                    reads[value.name] = reads.get(value.name, 0) + 1
        return {name: count for name, count in reads.items() if name not in inside}

    def _compute(self, node: ir.Node, inputs: list[Value], values: dict[str, Value]) -> list[Value]:
        op = node.op_type if node.domain in ("", "ai.onnx") else ""
        if op == "QuantizeLinear":
            return [rounding.quantize(node, inputs)]
        if op == "DequantizeLinear":
            return [rounding.dequantize(node, inputs)]
        exact = any(is_exact(v) for v in inputs)
        if op in _ANY_OPERAND and len(node.outputs) == 1 and (exact or _floats(inputs)):
            return _ANY_OPERAND[op](node, inputs)
        if exact or op == "Resize":
            found = movement.resize(node, inputs) if op == "Resize" else self._exact(op, node, inputs)
            if found is not None:
                return found
        outside: list[Value] = [values[name] for name in captured(node)]
        arrays = [None if v is None else plain(v) for v in [*inputs, *outside]]
        return list(self._runner(node)(arrays))

    def _exact(self, op: str, node: ir.Node, inputs: list[Value]) -> list[Value] | None:
        if any(isinstance(v, np.ndarray) and v.dtype == np.float64 for v in inputs):
            return None  # a double tensor belongs to a float island
        if op in ELEMENTWISE and len(node.outputs) == 1 and self._constant_or_exact(node, inputs):
            return ELEMENTWISE[op](node, inputs)
        if op in movement.MOVES and is_exact(inputs[0]):
            return movement.move(node, inputs, self._runner(node))
        if op == "Concat" and self._constant_or_exact(node, inputs):
            return movement.concat(node, inputs)
        if op == "Pad" and is_exact(inputs[0]):
            return movement.pad(node, inputs, self._runner(node))
        return None

    def _constant_or_exact(self, node: ir.Node, inputs: list[Value]) -> bool:
        """Computed float32 operands pull an operator into their float island."""
        return all(
            v is None or is_exact(v) or name.name in self._constants or _is_constant(name)
            for name, v in zip((n or ir.val("") for n in node.inputs), inputs, strict=True)
        )

    def _runner(self, node: ir.Node) -> Runner:
        if node not in self._runners:
            self._runners[node] = runner(node, self._opsets)
        return self._runners[node]


def _floats(inputs: list[Value]) -> bool:
    first: Array | Value = inputs[0]
    return isinstance(first, np.ndarray) and first.dtype in _DTYPES_OF_LINEAR


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"
