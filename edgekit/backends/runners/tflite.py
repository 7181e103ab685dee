"""Opens a LiteRT artifact in a worker. Standard library, numpy and the runtime only: it travels to devices.

The runtime is ai-edge-litert, or tflite-runtime where that is what is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

try:
    from ai_edge_litert import interpreter as litert

    PACKAGE = "ai-edge-litert"
except ImportError:
    from tflite_runtime import interpreter as litert

    PACKAGE = "tflite-runtime"

MODEL_FILE = "model.tflite"
# Which kernels run: XNNPACK where it takes an operator ("default"), LiteRT's optimized ones, or its reference ones.
KERNELS = {"default": "AUTO", "builtin": "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "reference": "BUILTIN_REF"}
_KERNELS_VARIABLE = "EDGEKIT_TFLITE_KERNELS"

Tensors = dict[str, np.ndarray[Any, Any]]


def version() -> str:
    from importlib.metadata import version as installed

    return f"{installed(PACKAGE)}" if PACKAGE == "ai-edge-litert" else f"{PACKAGE} {installed(PACKAGE)}"


class Session:
    """A loaded model. Inputs and outputs are dicts of arrays by the name that the file's signature gives them.

    A tensor that the file stores as integers with a scale takes and gives real numbers as float32 here.
    """

    def __init__(self, folder: str, threads: int, kernels: str) -> None:
        path = os.path.join(folder, MODEL_FILE) if os.path.isdir(folder) else folder  # a published file stands alone
        with open(path, "rb") as file:
            content = file.read()
        resolver = getattr(litert.OpResolverType, KERNELS[kernels])
        self._interpreter = litert.Interpreter(
            model_content=content, num_threads=threads, experimental_op_resolver_type=resolver
        )
        self._inputs, self._outputs = _named(self._interpreter)
        self.inputs, self.outputs = list(self._inputs), list(self._outputs)
        self._open = {n for n, d in self._inputs.items() if -1 in list(d["shape_signature"])}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._interpreter.allocate_tensors()

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Tensors:
        """Any number of samples; a file for a fixed batch gets them in turn."""
        fixed = 0 if self._open else _common_batch([*self._inputs.values(), *self._outputs.values()])
        samples = len(inputs[self.inputs[0]]) if fixed and np.ndim(inputs[self.inputs[0]]) else fixed
        if not fixed or samples == fixed or samples % fixed:
            return self._infer(inputs)
        parts = [self._infer({n: inputs[n][i : i + fixed] for n in self.inputs}) for i in range(0, samples, fixed)]
        return {n: np.concatenate([p[n] for p in parts]) for n in self.outputs}

    def _infer(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Tensors:
        self._set(inputs)
        self._interpreter.invoke()
        return {n: _real(self._interpreter.get_tensor(d["index"]), d) for n, d in self._outputs.items()}

    def bind(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Callable[[], Any]:
        """The call that is timed: inputs copied in, one inference, outputs copied out.

        What integers a file takes are made before it; ONNX Runtime's call hands out arrays too, so does this one.
        """
        self._set(inputs)
        interpreter = self._interpreter
        fill, invoke, read = interpreter.set_tensor, interpreter.invoke, interpreter.get_tensor
        stored = [(d["index"], _stored(inputs[n], d)) for n, d in self._inputs.items()]
        wanted = [d["index"] for d in self._outputs.values()]

        def call() -> Any:
            for index, value in stored:
                fill(index, value)
            invoke()
            return [read(index) for index in wanted]

        return call

    def _set(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> None:
        shapes = {n: tuple(np.shape(inputs[n])) for n in self.inputs}
        if shapes != self._shapes:
            for name, detail in self._inputs.items():
                if shapes[name] != tuple(self._interpreter.get_tensor(detail["index"]).shape):
                    self._interpreter.resize_tensor_input(detail["index"], shapes[name], strict=name in self._open)
            self._interpreter.allocate_tensors()
            self._shapes = shapes
        for name, detail in self._inputs.items():
            self._interpreter.set_tensor(detail["index"], _stored(inputs[name], detail))

    def layers(self) -> list[dict[str, Any]]:
        """Raises: the runtime's Python package hands out no times per operator."""
        raise RuntimeError(f"{PACKAGE} gives no times per operator to Python")


def _named(interpreter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Details of inputs and outputs by signature name; by tensor name in a file without signatures."""
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    if len(interpreter.get_signature_list()) != 1:
        return {d["name"]: d for d in inputs}, {d["name"]: d for d in outputs}
    runner = interpreter.get_signature_runner()
    found = runner.get_input_details(), runner.get_output_details()
    details = {d["index"]: d for d in (*inputs, *outputs)}
    return tuple({n: details.get(d["index"], d) for n, d in part.items()} for part in found)  # type: ignore[return-value]


def _scale(detail: Mapping[str, Any]) -> tuple[float, int] | None:
    parameters = detail["quantization_parameters"]
    if np.dtype(detail["dtype"]).kind not in "iu" or len(parameters["scales"]) != 1:
        return None
    return float(parameters["scales"][0]), int(parameters["zero_points"][0])


def _stored(value: np.ndarray[Any, Any], detail: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """What the tensor holds for real numbers: rounded half to even, saturated; anything else as it is."""
    scale, dtype = _scale(detail), np.dtype(detail["dtype"])
    if scale is None or value.dtype.kind != "f":
        return np.ascontiguousarray(value)
    info = np.iinfo(dtype)
    steps = np.rint(value.astype(np.float32) / np.float32(scale[0])) + scale[1]
    stored: np.ndarray[Any, Any] = np.clip(steps, info.min, info.max).astype(dtype)
    return stored


def _real(value: np.ndarray[Any, Any], detail: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    scale = _scale(detail)
    if scale is None:
        return value
    return ((value.astype(np.float32) - np.float32(scale[1])) * np.float32(scale[0])).astype(np.float32)


def _common_batch(details: list[Any]) -> int:
    """The batch that all inputs and outputs are fixed to, or 0."""
    sizes = {int(d["shape"][0]) if len(d["shape"]) else 0 for d in details}
    return sizes.pop() if len(sizes) == 1 else 0


def open_session(folder: str, threads: int, batch: int = 0, profile: bool = False) -> Session:
    """threads: >= 1. batch: ignored, an open batch takes any. EDGEKIT_TFLITE_KERNELS: a key of KERNELS."""
    return Session(folder, threads, os.environ.get(_KERNELS_VARIABLE, "default"))
