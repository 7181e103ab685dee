"""OpenVINO on the CPU: float32, int8, and float16, int8 or int4 weights, as OpenVINO IR."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib.metadata import version as _installed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgekit import model as M
from edgekit.backends import About, Repeats
from edgekit.backends.encoding import with_uint8_activations
from edgekit.backends.saturation import PAIRS, SATURATED_BELOW, probe_operands
from edgekit.backends.whole_groups import with_whole_groups
from edgekit.errors import DiskError, UnsupportedOpError
from edgekit.passes import fold_graph as G
from edgekit.passes.decide import clip_bounds
from edgekit.passes.quantize_weights import QuantizeWeights
from edgekit.passes.roundings import PRODUCTS, idle

NAME = "openvino"
PRECISIONS = ("float32", "float16", "int8", "int8-weights", "int4-weights")
RUNNER = Path(__file__).parent / "runners" / "openvino.py"
WHEELS = ("openvino", "numpy")
KERNELS: Mapping[str, Mapping[str, str]] = {}
PAIR_SUMS = True
EXACT: Mapping[str, str] | None = None


def missing() -> str | None:
    return None if find_spec("openvino") else "pip install 'edgekit[openvino]'"


def version() -> str:
    return _installed("openvino")


def lacks(folder: Path, package: str, version: str) -> list[str]:
    """Nothing is known to be lacking in any."""
    return []


def repeats(folder: Path) -> Repeats:
    """Not known to do more."""
    return "flips"


def refuses(model: ir.Model) -> list[str]:
    """OpenVINO's own verdict: the model is read and compiled, at batch 1 if it cannot be read with any batch."""
    import openvino as ov

    try:
        _read(ov.Core(), model)
    except UnsupportedOpError as error:
        return [error.what]
    return []


@functools.cache
def saturates() -> bool:
    """Runs a 1×1 convolution of the largest u8 by the largest s8 values through the plugin's int8 kernel."""
    import openvino as ov

    x, w = probe_operands()
    h = onnx.helper
    depth = w.shape[0]
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        h.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        h.make_node("DequantizeLinear", ["w", "sw", "zw"], ["dw"], axis=0),
        h.make_node("Conv", ["d", "dw"], ["y"]),
    ]
    weights = np.ascontiguousarray(w.T)[:, :, None, None]
    array = onnx.numpy_helper.from_array
    graph = h.make_graph(
        nodes,
        "saturation_probe",
        [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, depth, 4, 4))],
        [h.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, w.shape[1], 4, 4))],
        [
            array(np.float32(1), "s"),
            array(np.uint8(0), "z"),
            array(weights, "w"),
            array(np.ones(w.shape[1], np.float32), "sw"),
            array(np.zeros(w.shape[1], np.int8), "zw"),
        ],
    )
    proto = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    core = ov.Core()
    compiled = core.compile_model(
        core.read_model(proto.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    y = compiled({"x": np.full((1, depth, 4, 4), x[0, 0], np.float32)})[0]
    return bool(np.any(y < SATURATED_BELOW * PAIRS))


def unrounded(model: ir.Model) -> list[str]:
    """The convolution results that OpenVINO adds to a residual inside the convolution's kernel, before rounding.

    Its CPU plugin fuses Add into the first convolution that feeds it when nothing else reads that convolution; found by
    comparing with the reference (ResNet8: 97.8 % of the labels as the reference, 99.4 % without these three roundings).
    """
    found = []
    for add in (n for n in model.graph if n.op_type == "Add"):
        for value in add.inputs:
            name = _sole_convolution(value)
            if name is not None:
                found.append(name)
                break
    return found


def _sole_convolution(value: ir.Value | None) -> str | None:
    """The quantized tensor behind a DequantizeLinear if it is a convolution's result with no other reader."""
    dequantize = value.producer() if value is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.inputs[0] is None:
        return None
    quantized = dequantize.inputs[0]
    quantize = quantized.producer()
    if quantize is None or quantize.op_type != "QuantizeLinear" or len(quantized.uses()) != 1:
        return None
    source = quantize.inputs[0].producer() if quantize.inputs[0] is not None else None
    return quantized.name if source is not None and source.op_type == "Conv" else None


def unneeded(model: ir.Model) -> list[str]:
    """Products and convolutions: every int8 kernel of its CPU plugin can give float32."""
    return idle(model, PRODUCTS | {"Conv", "ConvTranspose"})


def weight_pass(precision: str) -> QuantizeWeights | None:
    return {"int8-weights": QuantizeWeights(bits=8), "int4-weights": QuantizeWeights(bits=4)}.get(precision)


def rounds_activations(model: ir.Model, precision: str) -> bool:
    """Never: `lower` forbids it in the file."""
    return False


def lower(model: ir.Model, precision: str, folder: Path, about: About | None = None) -> list[str]:
    """Write model.xml and model.bin. float16 halves the weights on disk; arithmetic stays float32.

    int8 and int4 weights stay integers in the file, and in memory wherever the CPU plugin multiplies by them compressed
    (Constant, Convert, Subtract, Multiply, which is how it reads DequantizeLinear); it decides that layer by layer.
    """
    import openvino as ov

    core = ov.Core()
    if precision == "int8":
        model = with_uint8_activations(model)
        _keep_bounds(model)
    compressed = weight_pass(precision) is not None
    read, notes = _read(core, with_whole_groups(model) if compressed else model)
    _simplify(read)
    if compressed:  # else CPUs with VNNI round the activations of such layers to int8, which is another precision
        read.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    try:
        ov.save_model(read, str(folder / "model.xml"), compress_to_fp16=precision == "float16")
    except RuntimeError as error:
        if "iostream" not in str(error):  # how its C++ stream reports a failed write; the cause is lost
            raise
        raise DiskError(f"OpenVINO cannot write into '{folder}'", "free some space or choose another --out") from error
    return notes


def _keep_bounds(model: ir.Model) -> None:
    """A Relu6 of dequantized values that float operators read becomes Relu and Min; in place.

    OpenVINO moves a Clamp before the dequantization and rounds its bounds to integers there: 6 became 6.03 of a tensor
    in steps of 0.073, and the depthwise convolution behind it was 2 LSB off. (Of Max and Min it makes a Clamp again.)
    """
    for node in [n for n in model.graph if n.op_type == "Clip"]:
        value = node.inputs[0]
        producer = value.producer() if value is not None else None
        quantizes = all(user.op_type == "QuantizeLinear" for user, _ in node.outputs[0].uses())
        if value is None or producer is None or producer.op_type != "DequantizeLinear" or quantizes:
            continue
        bounds = clip_bounds(node)
        if bounds is None or bounds[0] != 0.0 or np.isinf(bounds[1]):
            continue
        positive = ir.node("Relu", [value], name=f"{node.name}/low")
        output = positive.outputs[0]
        output.name, output.type, output.shape = f"{node.name}/low", value.type, value.shape
        model.graph.insert_before(node, positive)
        G.become(node, "Min", [output, node.inputs[2]])


def _read(core: Any, model: ir.Model) -> tuple[Any, list[str]]:
    """The model as an ov.Model that compiles, with its batch left open if OpenVINO can."""
    sig = M.signature(model)
    attempts = [(model, "")]
    if M.batch_of(sig) is None:
        attempts.append(
            (M.with_batch(model, 1), "OpenVINO takes this model only with a fixed batch: written for batch 1")
        )
    failure: Exception | None = None
    for attempt, note in attempts:
        try:
            read = core.read_model(M.to_bytes(attempt))
            _keep_names(read, sig)
            core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            return read, [note] if note else []
        except RuntimeError as error:
            failure = failure or error
    assert failure is not None
    raise UnsupportedOpError(
        f"OpenVINO cannot take this model: {_first_reason(failure, model)}", "leave this backend out"
    ) from failure


def _simplify(read: Any) -> None:
    """OpenVINO's own graph clean-up, as its convert_model runs it: QDQ pairs become one FakeQuantize each.

    Halves an int8 IR (MobileNetV2 for CIFAR-10: 784 -> 424 kB). The module is not public API: without it the file is
    only larger.
    """
    try:
        from openvino._offline_transformations import apply_moc_transformations
    except ImportError:
        return
    apply_moc_transformations(read, cf=False)


def _keep_names(read: Any, sig: M.Signature) -> None:
    """Each input and output keeps exactly the model's tensor name, so that outputs are found by name after a reload."""
    for ports, specs in ((read.inputs, sig.inputs), (read.outputs, sig.outputs)):
        for port, spec in zip(ports, specs, strict=True):
            port.get_tensor().set_names({spec.name})


def _first_reason(error: Exception, model: ir.Model) -> str:
    """What OpenVINO's many lines say is wrong: the operators without a rule, or the node that failed, else a line."""
    text = str(error)
    if unknown := re.search(r"No conversion rule found for operations: (.+)", text):
        operators = [re.sub(r"-\d+$", "", name.strip()) for name in unknown[1].split(",")]
        return "; ".join(_where(operator, model) for operator in operators)
    if node := re.search(r"ONNX node '<Node\(([^)]*)\): ([^>]*)>'", text):
        return f"it fails at operator {node[1]}, node '{node[2]}'"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not re.match(r"^(Exception from|Check |FrontEnd|\[ NOT|src/|While )", line)]
    return (told or lines or [type(error).__name__])[0][:200]


def _where(operator: str, model: ir.Model) -> str:
    """The operator with the first node that uses it."""
    name = operator.rpartition(".")[2]
    at = next((n.name for n in model.graph if n.op_type == name), None)
    return f"no rule for operator {operator}" + (f", node '{at}'" if at else "")
