"""Graph clean-up: the same numbers from fewer nodes.

Constants, no-ops and dead nodes go by ONNX Runtime's basic offline optimisation and by onnx_ir's passes; our own rules
do what both leave: batch norm and per-channel factors into weights (`fold_affine`), data movement (`fold_moves`), sizes
(`fold_shapes`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from edgekit import model as M
from edgekit.passes import fold_affine, fold_moves, fold_shapes

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

_ROUNDS = 8  # each round undoes at least one node, so this is met only by a bug; real models need two or three
# Switched off in ONNX Runtime: what our rules do with stable names, what gives each constant a name that depends on the
# run, what quantization needs apart, and what duplicates nodes.
_NOT_BY_RUNTIME = (
    "ConstantSharing",
    "MatMulAddFusion",
    "GatherSliceToSplitFusion",
    "GatherToSliceFusion",
    "TransposeOptimizer",
    "ConvAddFusion",
    "ConvMulFusion",
    "ConvBNFusion",
    "MatMul_BatchNormalization_Fusion",
    "Pad_Fusion",
    "QDQPropagationTransformer",
    "EnsureUniqueDQForNodeUnit",
    "WeightBiasQuantization",
    "ClipQuantRewrite",
    "ReluQuantRewrite",
)
_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"})
_RANDOM = frozenset({"Bernoulli", "Dropout"})  # onnx_ir's CSE would merge two draws


@dataclass(frozen=True)
class Fold:
    """The pass `fold`: float32 results within rounding (about 1e-6 relative), same inputs and outputs, idempotent.

    A model that holds QuantizeLinear or DequantizeLinear keeps all of it: only dead nodes go. A batch norm that no
    weighted operator precedes becomes Mul and Add; apart from that the model never gains a node.
    """

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model:
        """A cleaned copy; `data` is not looked at."""
        out = M.clone(model)
        common.InlinePass()(out)
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
        return out


def _content(model: ir.Model) -> bytes | int:
    """What two rounds are compared by."""
    proto = M.to_proto(model)
    if proto.ByteSize() >= M.PROTOBUF_LIMIT:  # cannot be serialised: rules only remove nodes, so their number tells
        return len(proto.graph.node)
    return bytes(proto.SerializeToString(deterministic=True))


def _round(model: ir.Model) -> ir.Model:
    model = _by_runtime(model)
    _tidy(model, merge=True)
    fold_shapes.annotate(model)
    while fold_affine.fold(model.graph) or fold_moves.fold(model.graph):
        common.RemoveUnusedNodesPass()(model)
        fold_shapes.annotate(model)
    _tidy(model, merge=True)
    return model


def _tidy(model: ir.Model, *, merge: bool) -> None:
    """Dead nodes out, constants to initializers, names, order, types and shapes; in place.

    merge: equal nodes and equal weights become one.
    """
    training = [n for n in _all(model) if n.op_type == "BatchNormalization" and "training_mode" in n.attributes]
    flags = [(n, n.attributes["training_mode"]) for n in training]
    random = any(n.op_type in _RANDOM for n in _all(model))
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        *([common.DeduplicateInitializersPass(size_limit=2**31)] if merge else []),
        *([common.CommonSubexpressionEliminationPass()] if merge and not random else []),
        common.RemoveUnusedNodesPass(),
    ):
        step(model)
    for node, flag in flags:
        if flag.value:  # onnx_ir drops it when the statistics are unused, which changes the result
            node.attributes["training_mode"] = flag
    model.graph.sort()
    _name(model)
    _order_initializers(model.graph)
    fold_shapes.annotate(model)


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


def _by_runtime(model: ir.Model) -> ir.Model:
    """ONNX Runtime's basic level, offline: constant folding and no-ops, in standard operators.

    The model as it is if ONNX Runtime cannot take it (over 2 GiB, no kernel for an operator or type) or made it larger.
    """
    import onnxruntime as ort

    proto = M.to_proto(model)
    if proto.ByteSize() >= M.PROTOBUF_LIMIT:
        return model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "basic.onnx"
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            ort.InferenceSession(
                proto.SerializeToString(deterministic=True),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(_NOT_BY_RUNTIME),
            )
        except Exception:  # ONNX Runtime's exceptions share no base; the backend will name the operator
            return model
        smaller = onnx.load(path)
    domains = {n.domain for n in smaller.graph.node}
    if not domains <= {n.domain for n in proto.graph.node} or len(smaller.graph.node) > len(proto.graph.node):
        return model
    return M.from_proto(_with_frame(smaller, proto))


def _with_frame(inner: onnx.ModelProto, frame: onnx.ModelProto) -> onnx.ModelProto:
    """The graph of one model with the versions, inputs, outputs and notes of the other."""
    out = onnx.ModelProto()
    out.CopyFrom(frame)
    for part in ("node", "initializer", "sparse_initializer", "value_info"):
        out.graph.ClearField(part)
        getattr(out.graph, part).extend(getattr(inner.graph, part))
    return out
