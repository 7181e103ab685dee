"""A model of a few ONNX nodes, and how far LiteRT's result of its lowering is from another implementation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from edgekit.backends.tflite.lowering import Lowered, lower
from edgekit.backends.tflite.writer import write
from edgekit.model import Tensors
from tests.tflite_interpreter import run

Array = np.ndarray[Any, Any]
Sizes = Sequence[int | str | None]
BOUND = 1e-5  # of the largest value: float32 in a few operators


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[Any, Sizes]],
    outputs: Sequence[str],
    weights: Mapping[str, Any],
    opset: int = 23,
) -> onnx.ModelProto:
    """inputs: name -> (dtype, sizes), a size a number, a symbol, or None if it is open and has no name."""
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(np.dtype(d)), list(s))
        for n, (d, s) in inputs.items()
    ]
    graph = helper.make_graph(
        list(nodes), "small", given, [helper.make_empty_tensor_value_info(o) for o in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    return onnx.shape_inference.infer_shapes(model)


def lowered(model: onnx.ModelProto) -> Lowered:
    return lower(ir.from_proto(model))


def litert(model: onnx.ModelProto, feeds: Tensors, kernels: str = "AUTO") -> Tensors:
    result = lowered(model)
    assert not result.refusals, [str(r) for r in result.refusals]
    return run(bytes(write([result.graph], "test")), feeds, kernels=kernels)


def operators(model: onnx.ModelProto) -> list[str]:
    return [o.code for o in lowered(model).graph.operators]


def onnxruntime(model: onnx.ModelProto, feeds: Tensors) -> Tensors:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, dict(feeds)), strict=True))


def reference(model: onnx.ModelProto, feeds: Tensors) -> Tensors:
    """ONNX's own implementation, in Python."""
    from onnx.reference import ReferenceEvaluator

    results = ReferenceEvaluator(model).run(None, dict(feeds))
    return dict(zip((o.name for o in model.graph.output), results, strict=True))


def difference(got: Tensors, wanted: Tensors) -> float:
    """Largest |a − b| / max |b| over the outputs; infinite for another shape."""
    worst = 0.0
    assert set(got) == set(wanted)
    for name, want in wanted.items():
        if got[name].shape != want.shape or np.isnan(got[name]).any():
            return float("inf")
        scale = max(float(np.abs(want).max(initial=0)), 1e-9)
        worst = max(worst, float(np.abs(got[name].astype(np.float64) - want).max(initial=0)) / scale)
    return worst


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
