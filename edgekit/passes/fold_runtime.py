"""ONNX Runtime's basic offline optimisation, kept to standard operators and to names that do not depend on the run."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir

from edgekit import model as M

_WORTH = 4  # Transposes from which on pushing them is tried: the one at an NHWC input and its like stay
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


def simplify(model: ir.Model) -> ir.Model:
    """Constants folded and no-ops removed; the model itself where `simplified` has nothing better."""
    better = simplified(M.to_proto(model))
    return model if better is None else M.from_proto(better)


def simplified(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """Constants folded and no-ops removed, in standard operators, with the frame (inputs, outputs, versions) as it was.

    None if ONNX Runtime cannot take the model (over 2 GiB, no kernel for an operator or type) or takes it apart.
    """
    smaller = _optimized(proto, _NOT_BY_RUNTIME)
    # what has no kernel here, float16 above all, comes back in pieces: an operator that became more frequent tells
    if smaller is None or _operators(smaller.graph) - _operators(proto.graph):
        return None
    return _with_frame(smaller, proto)


def without_transposes(model: ir.Model) -> ir.Model:
    """Transposes pushed through elementwise operators and reductions until they meet and cancel.

    ONNX Runtime's own pass, taken only where it leaves fewer of them and more of nothing: a Keras MobileNetV3 comes
    with 102, since hard-swish reads its input twice and tf2onnx stops there. Names that it makes up are replaced.
    """
    proto = M.to_proto(model)
    if sum(n.op_type == "Transpose" for n in proto.graph.node) < _WORTH or any(
        a.HasField("g") or a.graphs for n in proto.graph.node for a in n.attribute
    ):
        return model
    moved = _optimized(proto, tuple(n for n in _NOT_BY_RUNTIME if n != "TransposeOptimizer"))
    if moved is None:
        return model
    before, after = _operators(proto.graph), _operators(moved.graph)
    key = ("", "Transpose")
    if after[key] > before[key] - 2 or after - before:
        return model
    return M.from_proto(_renamed(_with_frame(moved, proto), proto))


def _renamed(model: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Names that the original does not have, replaced by the operator and a number, in graph order."""
    known = {o for n in original.graph.node for o in n.output} | {t.name for t in original.graph.initializer}
    known |= {v.name for v in (*original.graph.input, *original.graph.output)}
    nodes = {n.name for n in original.graph.node}
    new: dict[str, str] = {}
    for index, node in enumerate(model.graph.node):
        if node.name not in nodes:
            node.name = f"{node.op_type}_moved_{index}"
        for slot, name in enumerate((*node.input, *node.output)):
            if name and name not in known and name not in new:
                new[name] = f"{node.op_type}_moved_{index}_{slot}"
    for node in model.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for named in (*model.graph.initializer, *model.graph.value_info):
        named.name = new.get(named.name, named.name)
    tensors = sorted(model.graph.initializer, key=lambda t: t.name)
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(tensors)
    model.graph.ClearField("value_info")
    return model


def _optimized(proto: onnx.ModelProto, disabled: tuple[str, ...]) -> onnx.ModelProto | None:
    """What ONNX Runtime makes of the model at its basic level; None if it cannot take it."""
    import onnxruntime as ort

    if proto.ByteSize() >= M.PROTOBUF_LIMIT:
        return None
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
                disabled_optimizers=list(disabled),
            )
        except Exception:  # ONNX Runtime's exceptions share no base; the backend will name the operator
            return None
        return onnx.load(path)


def _operators(graph: onnx.GraphProto) -> Counter[tuple[str, str]]:
    """How often each operator occurs, sub-graphs included."""
    found = Counter((n.domain, n.op_type) for n in graph.node)
    for attribute in (a for n in graph.node for a in n.attribute):
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            found += _operators(inner)
    return found


def _with_frame(inner: onnx.ModelProto, frame: onnx.ModelProto) -> onnx.ModelProto:
    """The graph of one model with the versions, inputs, outputs and notes of the other."""
    out = onnx.ModelProto()
    out.CopyFrom(frame)
    for part in ("node", "initializer", "sparse_initializer", "value_info"):
        out.graph.ClearField(part)
        getattr(out.graph, part).extend(getattr(inner.graph, part))
    return out
