"""ONNX Runtime on the CPU: float32 and int8 ONNX files."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _installed
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edgekit import model as M
from edgekit.backends import About
from edgekit.backends.encoding import with_uint8_activations
from edgekit.backends.saturation import PAIRS, SATURATED_BELOW, probe_operands
from edgekit.passes.roundings import PRODUCTS, idle

NAME = "onnxruntime"
PRECISIONS = ("float32", "int8")
RUNNER = Path(__file__).parent / "runners" / "onnxruntime.py"
KERNELS: Mapping[str, Mapping[str, str]] = {}
_X86 = ("x86_64", "AMD64", "i686", "i386")


def missing() -> str | None:
    return None if find_spec("onnxruntime") else "pip install onnxruntime"


def version() -> str:
    try:
        return _installed("onnxruntime")
    except PackageNotFoundError:
        return _installed("onnxruntime-gpu")


def refuses(model: ir.Model) -> list[str]:
    """ONNX Runtime's own verdict: it loads the graph without optimizing it."""
    try:
        M.FloatSession(model, optimize=False, threads=1)
    except Exception as error:
        return [M.runtime_message(error)]
    return []


@functools.cache
def saturates() -> bool:
    """Multiplies the largest u8 by the largest s8 values and looks whether int16 pair sums were clipped.

    MatMulInteger goes through the same u8×s8 kernel (MLAS) as QLinearConv and QGemm.
    """
    import onnxruntime as ort

    x, w = probe_operands()
    node = onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph(
        [node],
        "saturation_probe",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, (x.shape[0], w.shape[1]))],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return bool(np.any(y < SATURATED_BELOW * PAIRS))


def unrounded(model: ir.Model) -> list[str]:
    """None: every QLinear kernel rounds its own result."""
    return []


def unneeded(model: ir.Model) -> list[str]:
    """Products: MatMulIntegerToFloat and QGemm give float32. Convolutions do not."""
    return idle(model, PRODUCTS)


def lower(model: ir.Model, precision: str, folder: Path, about: About | None = None) -> list[str]:
    """Write model.onnx; int8 activations become uint8 on x86, where those kernels are up to 4× faster.

    Source of that figure: MobileNetV3-small 6.3 ms with int8, 1.5 ms with uint8 activations (AVX2, one thread).
    On Arm the s8×s8 kernels are the fast ones and the model is written as it is.
    """
    if precision == "int8" and platform.machine() in _X86:
        model = with_uint8_activations(model)
    M.save(model, folder / "model.onnx")
    return []
