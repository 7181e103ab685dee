"""Opens an OpenVINO IR artifact in a worker. Standard library, numpy and openvino only: it travels to devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import openvino as ov

MODEL_FILE = "model.xml"


def version() -> str:
    return str(ov.__version__).split("-")[0]


class Session:
    """A compiled model. Inputs and outputs are dicts of arrays by tensor name."""

    def __init__(self, folder: str, threads: int, batch: int, profile: bool) -> None:
        core = ov.Core()
        model = core.read_model(os.path.join(folder, MODEL_FILE))
        if batch and any(i.partial_shape.rank.get_length() and i.partial_shape[0].is_dynamic for i in model.inputs):
            # A fixed batch lets the plugin choose its static kernels; that is how a device would run it.
            shapes = {}
            for port in model.inputs:
                shape = port.partial_shape
                if shape[0].is_dynamic:
                    shape[0] = batch
                shapes[port.get_any_name()] = shape
            model.reshape(shapes)
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # Without it a CPU with bfloat16 would run "float32" in bfloat16 and call it float32.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERF_COUNT": profile,
        }
        self._compiled = _compile(core, model, config)
        self._request = self._compiled.create_infer_request()
        self.inputs: list[str] = [i.get_any_name() for i in model.inputs]
        self._ports = [o.get_any_name() for o in model.outputs]
        self._fixed = _common_batch(model)
        self._layers: dict[str, dict[str, Any]] = {}
        self._profile = profile

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Any number of samples; a model compiled for fewer at once gets them in turn."""
        samples = len(inputs[self.inputs[0]]) if self._fixed else 0
        if not self._fixed or samples == self._fixed or samples % self._fixed:
            return self._infer(inputs)
        parts = [
            self._infer({n: inputs[n][i : i + self._fixed] for n in self.inputs})
            for i in range(0, samples, self._fixed)
        ]
        return {n: np.concatenate([p[n] for p in parts]) for n in self._ports}

    def _infer(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        self._request.infer({n: inputs[n] for n in self.inputs})
        return {n: self._request.get_output_tensor(i).data.copy() for i, n in enumerate(self._ports)}

    def bind(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Callable[[], Any]:
        """The call that is timed: one inference on these inputs, results left in the request's output tensors."""
        request = self._request
        for name in self.inputs:
            request.set_tensor(name, ov.Tensor(np.ascontiguousarray(inputs[name])))
        if not self._profile:
            return request.infer  # type: ignore[no-any-return]

        def profiled() -> None:
            request.infer()
            self._collect()

        return profiled

    def _collect(self) -> None:
        for info in self._request.get_profiling_info():
            if info.status != info.Status.EXECUTED:
                continue
            row = self._layers.setdefault(
                info.node_name,
                {"name": info.node_name, "op": f"{info.node_type} ({info.exec_type})", "seconds": 0.0, "calls": 0},
            )
            row["seconds"] += info.real_time.total_seconds()
            row["calls"] += 1

    def layers(self) -> list[dict[str, Any]]:
        """Seconds per node, summed over the profiled calls so far."""
        return list(self._layers.values())


def _compile(core: Any, model: Any, config: dict[str, Any]) -> Any:
    """Compile; without OpenVINO's code generator for elementwise chains where that runs out of registers.

    Seen in 2026.4 on int8 dense nets at batch 1: "Not enough gp registers in the pool".
    """
    try:
        return core.compile_model(model, "CPU", config)
    except RuntimeError as error:
        if "registers" not in str(error):
            raise
        return core.compile_model(model, "CPU", {**config, "SNIPPETS_MODE": "DISABLE"})


def _common_batch(model: Any) -> int:
    """The batch that all inputs and outputs are fixed to, or 0."""
    sizes = set()
    for port in (*model.inputs, *model.outputs):
        shape = port.partial_shape
        if shape.rank.is_dynamic or not shape.rank.get_length() or shape[0].is_dynamic:
            return 0
        sizes.add(shape[0].get_length())
    return int(sizes.pop()) if len(sizes) == 1 else 0


def open_session(folder: str, threads: int, batch: int = 0, profile: bool = False) -> Session:
    """threads: inference threads, >= 1. batch: the batch to compile for; 0 keeps the model's own (dynamic) batch."""
    return Session(folder, threads, batch, profile)
