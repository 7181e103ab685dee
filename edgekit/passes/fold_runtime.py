"""ONNX Runtime's basic offline optimisation, kept to standard operators and to names that do not depend on the run."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir

from edgekit import model as M

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
                disabled_optimizers=list(_NOT_BY_RUNTIME),
            )
        except Exception:  # ONNX Runtime's exceptions share no base; the backend will name the operator
            return None
        smaller = onnx.load(path)
    # what has no kernel here, float16 above all, comes back in pieces: an operator that became more frequent tells
    if _operators(smaller.graph) - _operators(proto.graph):
        return None
    return _with_frame(smaller, proto)


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
