"""Opens a file in the runtime it is for, with one thread; on request with the logits in the place of probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]
Run = Callable[[Feeds], list[Array]]

# What may stand between a Softmax and the output that a file gives: rescaling, rounding, renaming.
_THROUGH_ONNX = {"QuantizeLinear", "DequantizeLinear", "Identity", "Cast", "Reshape"}
_THROUGH_OPENVINO = {"FakeQuantize", "Convert", "Subtract", "Multiply", "Reshape"}
_THROUGH_TFLITE = {"QUANTIZE", "DEQUANTIZE", "RESHAPE"}


@dataclass(frozen=True)
class Opened:
    """run: feeds of one sample by the float model's input names -> outputs in order. timed: a call to measure."""

    runtime: str
    run: Run
    timed: Callable[[Feeds], Callable[[], Any]]
    ends_in_softmax: bool


def open_file(path: Path, *, portable: bool = False, logits: bool = False) -> Opened:
    """logits: the first output is what goes into the final Softmax, if there is one; float32."""
    return {".onnx": _onnx, ".xml": _openvino, ".tflite": _tflite}[path.suffix](path, portable, logits)


def _onnx(path: Path, portable: bool, logits: bool) -> Opened:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if portable:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source: str | bytes = str(path)
    names, found = None, False
    if logits:
        model = onnx.load(path)
        names = [output.name for output in model.graph.output]
        tensor = _before_softmax(model.graph)
        if tensor is not None:
            found, names[0] = True, tensor
            model.graph.output.append(onnx.ValueInfoProto(name=tensor))
            source = model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    kinds = {i.name: _DTYPES[i.type] for i in session.get_inputs()}

    def cast(feeds: Feeds) -> Feeds:
        return {name: np.ascontiguousarray(feeds[name], kind) for name, kind in kinds.items()}

    def timed(feeds: Feeds) -> Callable[[], Any]:
        ready = cast(feeds)
        return lambda: session.run(names, ready)

    return Opened(f"ONNX Runtime {ort.__version__}", lambda feeds: session.run(names, cast(feeds)), timed, found)


_DTYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


def _before_softmax(graph: onnx.GraphProto) -> str | None:
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(graph.output[0].name)
    while node is not None and node.op_type in _THROUGH_ONNX:
        node = makers.get(node.input[0])
    return node.input[0] if node is not None and node.op_type == "Softmax" else None


def _openvino(path: Path, portable: bool, logits: bool) -> Opened:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    if any(port.partial_shape.is_dynamic for port in model.inputs):
        model.reshape({port: [1, *list(port.partial_shape)[1:]] for port in model.inputs})
    order, found = list(range(len(model.outputs))), False
    if logits:
        node = model.get_results()[0].input_value(0).get_node()
        while node.get_type_name() in _THROUGH_OPENVINO:
            node = node.input_value(0).get_node()
        if node.get_type_name().lower() == "softmax":
            found = True
            model.add_outputs(node.input_value(0))
            order[0] = len(model.outputs) - 1
    config = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    config["INFERENCE_PRECISION_HINT"] = "f32"
    try:
        compiled = core.compile_model(model, "CPU", config)
    except RuntimeError as error:
        # Seen in 2026.4 on int8 dense nets at batch 1: its generator for elementwise chains runs out of registers.
        if "registers" not in str(error):
            raise
        compiled = core.compile_model(model, "CPU", {**config, "SNIPPETS_MODE": "DISABLE"})
    request = compiled.create_infer_request()
    ports = {port.get_any_name(): port.get_element_type().to_dtype() for port in compiled.inputs}

    def ready(feeds: Feeds) -> dict[str, Any]:
        return {name: ov.Tensor(np.ascontiguousarray(feeds[name], kind)) for name, kind in ports.items()}

    def run(feeds: Feeds) -> list[Array]:
        request.infer(ready(feeds))
        return [request.get_output_tensor(i).data.copy() for i in order]

    def timed(feeds: Feeds) -> Callable[[], Any]:
        for name, tensor in ready(feeds).items():
            request.set_tensor(name, tensor)
        return request.infer

    return Opened(f"OpenVINO {ov.__version__.split('-')[0]}", run, timed, found)


def _tflite(path: Path, portable: bool, logits: bool) -> Opened:
    from importlib.metadata import version

    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    graph = model.subgraphs[0]
    names = {i: graph.tensors[i].name.decode() for i in graph.inputs}
    if model.signatureDefs:
        names |= {t.tensorIndex: t.name.decode() for t in model.signatureDefs[0].inputs}
    content, found = path.read_bytes(), False
    if logits and (tensor := _softmax_input(model, schema)) is not None:
        found = True
        content = _with_output(model, tensor, schema)
    interpreter = Interpreter(model_content=content, num_threads=1)
    for detail in interpreter.get_input_details():
        if detail["shape"][0] != 1:
            interpreter.resize_tensor_input(detail["index"], [1, *detail["shape"][1:]])
    interpreter.allocate_tensors()
    given, wanted = interpreter.get_input_details(), interpreter.get_output_details()

    def put(feeds: Feeds) -> None:
        for detail in given:
            name = names[detail["index"]]
            value = feeds[name] if name in feeds else next(iter(feeds.values()))
            interpreter.set_tensor(detail["index"], _given(value, detail))

    def run(feeds: Feeds) -> list[Array]:
        put(feeds)
        interpreter.invoke()
        return [_real(interpreter.get_tensor(d["index"]), d) for d in wanted]

    def timed(feeds: Feeds) -> Callable[[], Any]:
        put(feeds)
        return interpreter.invoke

    return Opened(f"LiteRT {version('ai-edge-litert')}", run, timed, found)


def _given(values: Array, detail: dict[str, Any]) -> Array:
    """Real numbers become the integers that a file with integer inputs asks for."""
    scale, zero = detail["quantization"]
    if not scale:
        return np.ascontiguousarray(values, detail["dtype"])
    bounds = np.iinfo(detail["dtype"])
    whole = np.clip(np.rint(values / np.float32(scale)) + zero, bounds.min, bounds.max)
    return np.ascontiguousarray(whole, detail["dtype"])


def _real(values: Array, detail: dict[str, Any]) -> Array:
    """Integers become what they stand for."""
    scale, zero = detail["quantization"]
    return np.asarray((values.astype(np.float32) - zero) * scale if scale else values, np.float32)


def _softmax_input(model: Any, schema: Any) -> int | None:
    operators = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    graph = model.subgraphs[0]
    makers = {out: op for op in graph.operators for out in op.outputs}
    kinds = {id(op): _operator(operators, model.operatorCodes[op.opcodeIndex]) for op in graph.operators}
    op = makers.get(graph.outputs[0])
    while op is not None and kinds[id(op)] in _THROUGH_TFLITE:
        op = makers.get(op.inputs[0])
    return int(op.inputs[0]) if op is not None and kinds[id(op)] == "SOFTMAX" else None


def _operator(names: dict[int, str], code: Any) -> str:
    """Old files have the number in the narrow field only."""
    return names[max(code.builtinCode, code.deprecatedBuiltinCode)]


def _with_output(model: Any, tensor: int, schema: Any) -> bytes:
    """The file with `tensor` as its first output instead; without signatures, which name the old one."""
    import flatbuffers

    graph = model.subgraphs[0]
    graph.outputs = [tensor, *list(graph.outputs)[1:]]
    model.signatureDefs = []
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
