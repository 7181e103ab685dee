"""Graph clean-up: the same numbers from fewer nodes.

Constants, no-ops and dead nodes go by ONNX Runtime's basic offline optimisation and by onnx_ir's passes; our own rules
do what both leave: batch norm and per-channel factors into weights (`fold_affine`), data movement (`fold_moves`,
`fold_squeeze`), the bias of dense layers (`fold_dense`), sizes (`fold_shapes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes import common

from edgekit import model as M
from edgekit.passes import fold_affine, fold_dense, fold_moves, fold_patterns, fold_runtime, fold_shapes, fold_squeeze

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

_ROUNDS = 8  # each round undoes at least one node, so this is met only by a bug; real models need two or three
_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"})
_RANDOM = frozenset({"Bernoulli", "Dropout"})  # onnx_ir's CSE would merge two draws


@dataclass(frozen=True)
class Fold:
    """The pass `fold`: float32 results within rounding (about 1e-6 relative), same inputs and outputs, idempotent.

    A model that holds QuantizeLinear or DequantizeLinear keeps all of it: only dead nodes go. A batch norm that no
    weighted operator precedes becomes Mul and Add, and a product over more than two axes gains a Reshape with its bias;
    apart from that the model never gains a node.
    """

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model:
        """A cleaned copy; `data` is not looked at."""
        out = M.clone(model)
        common.InlinePass()(out)
        fold_shapes.forget(out)
        quantized = any(n.op_type in _QUANTIZED for n in ir.traversal.RecursiveGraphIterator(out.graph))
        _tidy(out, merge=False)
        before = _content(out)
        for _ in range(_ROUNDS):
            if not quantized:
                out = _round(out)
            after = _content(out)
            if after == before:
                break
            before = after
        for value, declared in zip(out.graph.outputs, model.graph.outputs, strict=True):
            value.shape = (
                None if declared.shape is None else declared.shape.copy()
            )  # more is known now, but the signature is a promise
        return out


def _content(model: ir.Model) -> bytes | int:
    """What two rounds are compared by."""
    proto = M.to_proto(model)
    if proto.ByteSize() >= M.PROTOBUF_LIMIT:  # cannot be serialised: rules only remove nodes, so their number tells
        return len(proto.graph.node)
    return bytes(proto.SerializeToString(deterministic=True))


def _round(model: ir.Model) -> ir.Model:
    model = fold_runtime.without_transposes(fold_runtime.simplify(model))
    _tidy(model, merge=True)
    fold_shapes.annotate(model, thorough=True)
    rules = (fold_moves.fold, fold_squeeze.fold, fold_affine.fold, fold_patterns.fold, fold_dense.fold)
    while any(rule(model.graph) for rule in rules):
        _remove_dead(model)
        fold_shapes.annotate(model)
    _tidy(model, merge=True)
    return model


def _tidy(model: ir.Model, *, merge: bool) -> None:
    """Dead nodes out, constants to initializers, names, order, types and shapes; in place.

    merge: equal nodes and equal weights become one.
    """
    # onnx_ir warns on stderr of each initializer that it may not merge
    free = not any(v.is_initializer() for v in (*model.graph.inputs, *model.graph.outputs))
    random = any(n.op_type in _RANDOM for n in _all(model))
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        *([common.DeduplicateInitializersPass(size_limit=2**31)] if merge and free else []),
        *([common.CommonSubexpressionEliminationPass()] if merge and not random else []),
    ):
        step(model)
    _remove_dead(model)
    model.graph.sort()
    _name(model)
    _order_initializers(model.graph)
    fold_shapes.annotate(model)


def _remove_dead(model: ir.Model) -> None:
    training = [n for n in _all(model) if n.op_type == "BatchNormalization" and "training_mode" in n.attributes]
    flags = [(n, n.attributes["training_mode"]) for n in training]
    common.RemoveUnusedNodesPass()(model)
    for node, flag in flags:
        if flag.value:  # onnx_ir drops it when the statistics are unused, which changes the result
            node.attributes["training_mode"] = flag


def _all(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _name(model: ir.Model) -> None:
    """Every node gets a unique name: its own, or its operator's and first output's."""
    taken: set[str] = set()
    for node in _all(model):
        first = next((o.name for o in node.outputs if o.name), "")
        base = node.name or f"{node.op_type}_{first}"
        name, count = base, 0
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        node.name = name
        taken.add(name)


def _order_initializers(graph: ir.Graph) -> None:
    """Initializers in the order in which nodes read them, so that the same graph is the same bytes."""
    order = [v for n in graph for v in n.inputs if v is not None and v.is_initializer() and v.graph is graph]
    rest = sorted(graph.initializers.values(), key=lambda v: v.name or "")
    values = {v.name: v for v in (*order, *rest) if v.name in graph.initializers}
    graph.initializers.clear()
    for value in values.values():
        graph.register_initializer(value)
