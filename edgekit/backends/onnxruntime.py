"""ONNX Runtime on the CPU: float32 and int8 ONNX files, int8 and int4 weights, int8 as activations come."""

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
from edgekit.backends import About, Repeats, ort_weights
from edgekit.backends.encoding import with_uint8_activations
from edgekit.backends.saturation import PAIRS, SATURATED_BELOW, probe_operands
from edgekit.errors import UnsupportedOpError
from edgekit.passes.quantize_weights import QuantizeWeights, product_share
from edgekit.passes.roundings import PRODUCTS, idle

NAME = "onnxruntime"
PRECISIONS = ("float32", "int8", "int8-dynamic", "int8-weights", "int4-weights")
RUNNER = Path(__file__).parent / "runners" / "onnxruntime.py"
WHEELS = ("onnxruntime", "numpy")
KERNELS: Mapping[str, Mapping[str, str]] = {}
PAIR_SUMS = True
EXACT: Mapping[str, str] | None = {
    "EDGEKIT_ORT_KERNELS": "float"
}  # QuantizeLinear and DequantizeLinear as they are written, float32 between them
_X86 = ("x86_64", "AMD64", "i686", "i386")


def missing() -> str | None:
    return None if find_spec("onnxruntime") else "pip install onnxruntime"


def version() -> str:
    try:
        return _installed("onnxruntime")
    except PackageNotFoundError:
        return _installed("onnxruntime-gpu")


def lacks(folder: Path, package: str, version: str) -> list[str]:
    """Nothing: every version with wheels for Python 3.9 and later reads opset 21 (1.18 and later)."""
    return []


def repeats(folder: Path) -> Repeats:
    """On Arm (1.32) a few sums round the other way: 2 of the 131,072 of ResNet8's second convolution."""
    return "flips"


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
    """Products: MatMulIntegerToFloat and QGemm give float32. Convolutions do not. Transposed ones are always float."""
    return idle(model, PRODUCTS, frozenset({"ConvTranspose"}))


def weight_pass(precision: str) -> QuantizeWeights | None:
    """Dynamic int8 multiplies u8 activations by s8 weights: 7 bits where that saturates."""
    if precision == "int8-dynamic":
        return QuantizeWeights(bits=7 if saturates() else 8)
    return {"int8-weights": QuantizeWeights(bits=8), "int4-weights": QuantizeWeights(bits=4)}.get(precision)


def rounds_activations(model: ir.Model, precision: str) -> bool:
    """Always as int8-dynamic; of 4-bit weights where few rows are multiplied at once, see `ort_weights`."""
    return precision == "int8-dynamic" or (precision == "int4-weights" and ort_weights.rounds_activations(model))


def lower(model: ir.Model, precision: str, folder: Path, about: About | None = None) -> list[str]:
    """Write model.onnx; int8 activations become uint8 for x86, where those kernels are up to 4× faster.

    Source of that figure: MobileNetV3-small 6.3 ms with int8, 1.5 ms with uint8 activations (AVX2, one thread).
    On Arm the s8×s8 kernels are the fast ones and the model is written as it is. Raises UnsupportedOpError for
    int8-dynamic of a model that mostly convolves: its kernels for that are slow, and ranges per call too coarse.
    """
    if precision == "int8-dynamic" and product_share(model) < 0.5:
        raise UnsupportedOpError(
            "int8-dynamic is for models of matrix products; most weights of this one are in convolutions", "use int8"
        )
    if precision == "int8-dynamic":
        model = ort_weights.dynamic(model)
    elif precision in ("int8-weights", "int4-weights"):
        model = ort_weights.weight_only(model)
    if precision == "int8":
        machine = (about.machine if about is not None else "") or platform.machine()
        model = with_uint8_activations(model) if machine in _X86 else M.clone(model)
        _shield_float_layers(model)
    M.save(model, folder / "model.onnx")
    return []


def _shield_float_layers(model: ir.Model) -> None:
    """Keep layers that the plan left in float in float; in place.

    Between a DequantizeLinear and a QuantizeLinear ONNX Runtime quantizes a layer's float weights by itself, to the
    nearest of one scale per tensor (WeightBiasQuantization, microsoft/onnxruntime#22969): 11 LSB off on ResNet8. A Sum
    of one operand in between costs a copy and hides the pattern.
    """
    for node in list(model.graph):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or M.constant(node.inputs[1]) is None:
            continue
        value = node.inputs[0]
        producer = value.producer() if value is not None else None
        if value is None or producer is None or producer.op_type != "DequantizeLinear":
            continue
        copy = ir.node("Sum", [value], name=f"{node.name}/float")
        output = copy.outputs[0]
        output.name, output.type, output.shape = f"{node.name}/float", value.type, value.shape
        model.graph.insert_before(node, copy)
        node.replace_input_with(0, output)
