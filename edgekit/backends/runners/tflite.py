"""Opens a LiteRT artifact in a worker. Standard library, numpy and the runtime only: it travels to devices.

The runtime is ai-edge-litert, or tflite-runtime where that is what is installed.
"""

from __future__ import annotations

import ctypes
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

    def __init__(self, folder: str, threads: int, profile: bool, kernels: str) -> None:
        if kernels not in KERNELS:
            raise ValueError(f"no kernels '{kernels}'; there are {', '.join(KERNELS)}")
        path = os.path.join(folder, MODEL_FILE) if os.path.isdir(folder) else folder  # a published file stands alone
        with open(path, "rb") as file:
            self._content = file.read()
        self._threads, self._resolver = threads, getattr(litert.OpResolverType, KERNELS[kernels])
        self._interpreter = self._fresh()
        self._inputs, self._outputs = _named(self._interpreter)
        self.inputs, self.outputs = list(self._inputs), list(self._outputs)
        self._open = {n for n, d in self._inputs.items() if -1 in list(d["shape_signature"])}
        self._written = {n: tuple(int(v) for v in d["shape"]) for n, d in self._inputs.items()}
        self._shapes = dict(self._written)  # of the interpreter now
        self._interpreter.allocate_tensors()
        self._allocated = True
        self._profiled: Profiled | None = None
        if profile:
            # Its own copy of the model: LiteRT's Interpreter hands out no times, its compiled model does.
            self._profiled = Profiled(path, threads, kernels)

    def _fresh(self) -> Any:
        return litert.Interpreter(
            model_content=self._content, num_threads=self._threads, experimental_op_resolver_type=self._resolver
        )

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
        if self._profiled is not None:
            feeds = {n: _stored(inputs[n], d) for n, d in self._inputs.items()}
            self._profiled.bind(feeds, self._open)
            return self._profiled.call
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
            if self._allocated:
                # XNNPACK (LiteRT 2.3) keeps sizes from before: a small ViT in int8 that was allocated for one sample
                # and then resized to 64 gave 48 of them wrong.
                self._interpreter, self._allocated = self._fresh(), False
                self._shapes = dict(self._written)
            before, self._shapes = self._shapes, {}  # nothing is known of them if this fails
            for name, detail in self._inputs.items():
                if shapes[name] != before.get(name):
                    self._interpreter.resize_tensor_input(detail["index"], shapes[name], strict=name in self._open)
            self._shapes = shapes
        if not self._allocated:
            self._interpreter.allocate_tensors()
            self._allocated = True
        for name, detail in self._inputs.items():
            self._interpreter.set_tensor(detail["index"], _stored(inputs[name], detail))

    def layers(self) -> list[dict[str, Any]]:
        """Seconds per operator, summed over the profiled calls so far; see Profiled."""
        if self._profiled is None:
            raise RuntimeError("opened without profiling")
        return self._profiled.layers()


def _named(interpreter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Details of inputs and outputs by the names of the only signature; else by tensor name, of the first graph."""
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    if len(interpreter.get_signature_list()) != 1:
        return {d["name"]: d for d in inputs}, {d["name"]: d for d in outputs}
    runner = interpreter.get_signature_runner()
    details = {d["index"]: d for d in (*inputs, *outputs)}
    found = []
    for part in (runner.get_input_details(), runner.get_output_details()):
        if any(details.get(d["index"], {}).get("name") != d["name"] for d in part.values()):
            raise ValueError("the file's signature belongs to another graph than its first")
        found.append({n: details[d["index"]] for n, d in part.items()})
    return found[0], found[1]


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


class _Layout(ctypes.Structure):
    """LiteRtLayout of litert/c/litert_layout.h: the rank in 7 bits, then the sizes."""

    _fields_ = [("rank", ctypes.c_uint32), ("sizes", ctypes.c_int32 * 8), ("strides", ctypes.c_uint32 * 8)]


class _TensorType(ctypes.Structure):
    """LiteRtRankedTensorType of litert/c/litert_model_types.h."""

    _fields_ = [("element", ctypes.c_int32), ("layout", _Layout)]


class _Event(ctypes.Structure):
    """ProfiledEventData of litert/c/litert_profiler_event.h. index: of the operator, or of the delegate's own."""

    _fields_ = [
        ("tag", ctypes.c_char_p),
        ("kind", ctypes.c_int32),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("memory", ctypes.c_uint64 * 6),
        ("index", ctypes.c_uint64),
        ("graph", ctypes.c_uint64),
        ("source", ctypes.c_int32),
    ]


_OPERATOR, _DELEGATES_OPERATOR = 2, 8  # kinds of events (tflite/core/api/profiler.h)
_KINDS = {1 << n for n in range(9)}
_CPU, _WRITE = 1, 1  # kLiteRtHwAcceleratorCpu, kLiteRtTensorBufferLockModeWrite
# LiteRT 2.3's compiled model answers "reference" with its optimized kernels: resnet8_int8 takes .6 ms, not 4.8.
_PROFILED_KERNELS = {"default": "delegate", "builtin": "builtin"}


class Profiled:
    """The same file in LiteRT's compiled model with its profiler on, by the C interface of the library in the wheel.

    Times are whole microseconds per operator, rounded down: what LiteRT's profiler notes. Raises RuntimeError where
    this runtime has no such library, or another one than we know.
    """

    def __init__(self, path: str, threads: int, kernels: str) -> None:
        if kernels not in _PROFILED_KERNELS:
            raise RuntimeError(f"LiteRT's profiler does not run the {kernels} kernels")
        self._library = _library()
        self._rows: dict[str, dict[str, Any]] = {}
        self._environment, self._model = ctypes.c_void_p(), ctypes.c_void_p()
        self._compiled, self._profiler = ctypes.c_void_p(), ctypes.c_void_p()
        self._kept: list[Any] = []  # what the library points to
        count, options = ctypes.c_size_t(), ctypes.c_void_p()
        self._do("CreateEnvironment", ctypes.c_int(0), None, ctypes.byref(self._environment))
        self._do("CreateModelFromFile", self._environment, os.fsencode(path), ctypes.byref(self._model))
        self._do("GetNumModelSignatures", self._model, ctypes.byref(count))
        if count.value > 1:
            raise RuntimeError(f"times per operator need a file with one signature; this has {count.value}")
        self._do("CreateOptions", ctypes.byref(options))
        self._do("SetOptionsHardwareAccelerators", options, ctypes.c_int(_CPU))
        self._option(options, "runtime_options_string", "enable_profiling = true")
        self._option(options, "xnnpack", f'num_threads = {threads}\nkernel_mode = "{_PROFILED_KERNELS[kernels]}"')
        self._do("CreateCompiledModel", self._environment, self._model, options, ctypes.byref(self._compiled))
        self._do("CompiledModelGetProfiler", self._compiled, ctypes.byref(self._profiler))

    def _do(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, f"LiteRt{name}")(*arguments)
        if status:
            raise RuntimeError(f"LiteRt{name} answers status {status}: no times per operator")

    def _option(self, options: ctypes.c_void_p, name: str, text: str) -> None:
        """Options are text in TOML under a name; LiteRT reads it while it compiles."""
        payload, entry = ctypes.create_string_buffer(text.encode() + b"\n"), ctypes.c_void_p()
        release = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda pointer: None)
        self._kept += [payload, release]
        self._do("CreateOpaqueOptions", name.encode(), payload, release, ctypes.byref(entry))
        self._do("AddOpaqueOptions", options, entry)

    def bind(self, stored: Mapping[str, np.ndarray[Any, Any]], open_inputs: set[str]) -> None:
        """Make the buffers for these inputs, in the file's types, and for the outputs."""
        ends = {part: self._ends(part) for part in ("Input", "Output")}
        for index, (name, _) in enumerate(ends["Input"]):
            self._resize(index, stored[name].shape, name in open_inputs)
        self._inputs = [self._buffer("Input", i, t, self._input_layout(i)) for i, (_, t) in enumerate(ends["Input"])]
        layouts = (_Layout * max(1, len(ends["Output"])))()
        count, update = ctypes.c_size_t(len(ends["Output"])), ctypes.c_bool(True)
        self._do("GetCompiledModelOutputTensorLayouts", self._compiled, ctypes.c_size_t(0), count, layouts, update)
        self._outputs = [self._buffer("Output", i, t, layouts[i]) for i, (_, t) in enumerate(ends["Output"])]
        self.outputs = {n: (layouts[i], self._outputs[i]) for i, (n, _) in enumerate(ends["Output"])}
        for buffer, (name, _) in zip(self._inputs, ends["Input"]):
            self._fill(buffer, np.ascontiguousarray(stored[name]))

    def _ends(self, part: str) -> list[tuple[str, ctypes.c_void_p]]:
        """(name, tensor) of each input or output, in the signature's order; a file without one gets one of LiteRT's."""
        signature, count = ctypes.c_void_p(), ctypes.c_size_t()
        self._do("GetModelSignature", self._model, ctypes.c_size_t(0), ctypes.byref(signature))
        self._do(f"GetNumSignature{part}s", signature, ctypes.byref(count))
        found = []
        for index in range(count.value):
            name, tensor = ctypes.c_char_p(), ctypes.c_void_p()
            self._do(f"GetSignature{part}Name", signature, ctypes.c_size_t(index), ctypes.byref(name))
            self._do(f"GetSignature{part}TensorByIndex", signature, ctypes.c_size_t(index), ctypes.byref(tensor))
            found.append(((name.value or b"").decode(), tensor))
        return found

    def _input_layout(self, index: int) -> _Layout:
        layout, first = _Layout(), ctypes.c_size_t(0)
        place = ctypes.c_size_t(index)
        self._do("GetCompiledModelInputTensorLayout", self._compiled, first, place, ctypes.byref(layout))
        return layout

    def _resize(self, index: int, shape: tuple[int, ...], is_open: bool) -> None:
        layout = self._input_layout(index)
        if tuple(layout.sizes[: layout.rank & 127]) == shape:
            return
        sizes = (ctypes.c_int * len(shape))(*shape)
        name = "CompiledModelResizeInputTensor" + ("" if is_open else "NonStrict")
        zero, place, rank = ctypes.c_size_t(0), ctypes.c_size_t(index), ctypes.c_size_t(len(shape))
        self._do(name, self._compiled, zero, place, sizes, rank)

    def _buffer(self, part: str, index: int, tensor: ctypes.c_void_p, layout: _Layout) -> ctypes.c_void_p:
        kind, needs, buffer = _TensorType(), ctypes.c_void_p(), ctypes.c_void_p()
        self._do("GetRankedTensorType", tensor, ctypes.byref(kind))
        kind.layout = layout
        zero, place = ctypes.c_size_t(0), ctypes.c_size_t(index)
        self._do(f"GetCompiledModel{part}BufferRequirements", self._compiled, zero, place, ctypes.byref(needs))
        create = "CreateManagedTensorBufferFromRequirements"
        self._do(create, self._environment, ctypes.byref(kind), needs, ctypes.byref(buffer))
        return buffer

    def _size(self, buffer: ctypes.c_void_p) -> int:
        size = ctypes.c_size_t()
        self._do("GetTensorBufferPackedSize", buffer, ctypes.byref(size))
        return size.value

    def _fill(self, buffer: ctypes.c_void_p, value: np.ndarray[Any, Any]) -> None:
        if self._size(buffer) != value.nbytes:
            raise RuntimeError(f"LiteRT wants {self._size(buffer)} bytes of input, not {value.nbytes}")
        memory = ctypes.c_void_p()
        self._do("LockTensorBuffer", buffer, ctypes.byref(memory), ctypes.c_int(_WRITE))
        ctypes.memmove(memory, value.ctypes.data, value.nbytes)
        self._do("UnlockTensorBuffer", buffer)

    def read(self, name: str) -> tuple[tuple[int, ...], bytes]:
        """(shape, bytes as stored) of an output after a call."""
        layout, buffer = self.outputs[name]
        memory, size = ctypes.c_void_p(), self._size(buffer)
        self._do("LockTensorBuffer", buffer, ctypes.byref(memory), ctypes.c_int(0))
        content = ctypes.string_at(memory, size) if size else b""
        self._do("UnlockTensorBuffer", buffer)
        return tuple(layout.sizes[: layout.rank & 127]), content

    def call(self) -> None:
        """One profiled inference."""
        self._do("ResetProfiler", self._profiler)  # which also stops it
        self._do("StartProfiler", self._profiler)
        counts = ctypes.c_size_t(len(self._inputs)), ctypes.c_size_t(len(self._outputs))
        inputs = (ctypes.c_void_p * len(self._inputs))(*[b.value for b in self._inputs])
        outputs = (ctypes.c_void_p * len(self._outputs))(*[b.value for b in self._outputs])
        zero = ctypes.c_size_t(0)
        self._do("RunCompiledModel", self._compiled, zero, counts[0], inputs, counts[1], outputs)
        self._note(self._events())

    def _events(self) -> list[_Event]:
        count = ctypes.c_int()
        self._do("GetNumProfilerEvents", self._profiler, ctypes.byref(count))
        # Room for a larger event than ours; its kinds tell whether it is ours.
        room = (_Event * (2 * count.value))()
        self._do("GetProfilerEvents", self._profiler, count, room)
        events = list(room[: count.value])
        if any(e.kind not in _KINDS for e in events):
            raise RuntimeError(f"{PACKAGE} {version()} writes profiler events of a form that is not known here")
        return events

    def _note(self, events: list[_Event]) -> None:
        """Add one call's events. XNNPACK counts its operators from 0 in each of the parts that it took."""
        parts = 0
        for event in events:
            if event.kind == _OPERATOR and event.graph:
                raise RuntimeError("operators inside loops and branches are counted twice: no times per operator")
            if event.kind == _OPERATOR:
                name, where = f"operator {event.index}", "LiteRT"
            elif event.kind == _DELEGATES_OPERATOR:
                parts += event.index == 0
                name, where = f"part {parts} operator {event.index}", "XNNPACK"
            else:
                continue
            op = f"{event.tag.decode(errors='replace')} ({where})"
            row = self._rows.setdefault(name, {"name": name, "op": op, "seconds": 0.0, "calls": 0})
            row["seconds"] += event.elapsed_us * 1e-6
            row["calls"] += 1

    def layers(self) -> list[dict[str, Any]]:
        return list(self._rows.values())


def _library() -> Any:
    """LiteRT's C library beside its Python package. Raises RuntimeError where there is none that we know."""
    installed = version()
    if PACKAGE != "ai-edge-litert" or not installed.startswith("2."):
        raise RuntimeError(f"{PACKAGE} {installed} gives no times per operator; ai-edge-litert 2 does")
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        raise RuntimeError("times per operator need a 64-bit Python")
    folder = os.path.dirname(os.path.abspath(litert.__file__))
    for name in ("libLiteRt.so", "libLiteRt.dylib"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            library = ctypes.CDLL(path)
            if hasattr(library, "LiteRtCompiledModelGetProfiler"):
                return library
    raise RuntimeError(f"this {PACKAGE} {installed} comes without LiteRT's profiler: no times per operator")


def open_session(folder: str, threads: int, batch: int = 0, profile: bool = False) -> Session:
    """threads: >= 1. batch: ignored, an open batch takes any. EDGEKIT_TFLITE_KERNELS: a key of KERNELS."""
    return Session(folder, threads, profile, os.environ.get(_KERNELS_VARIABLE) or "default")
