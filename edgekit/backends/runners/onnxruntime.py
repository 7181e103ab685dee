"""Opens an ONNX Runtime artifact in a worker. Standard library, numpy and onnxruntime only: it travels to devices."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

MODEL_FILE = "model.onnx"
KERNELS = "EDGEKIT_ORT_KERNELS"  # "float" for arithmetic without integer kernels


def version() -> str:
    return str(ort.__version__)


class Session:
    """A loaded model. Inputs and outputs are dicts of arrays by tensor name."""

    def __init__(self, folder: str, threads: int, profile: bool) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        # A pool that is told to stop spinning between runs leaves the cores to whoever is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if os.environ.get(KERNELS) == "float":  # QDQ as it is written: no integer kernel, nothing saturates
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if profile:
            options.enable_profiling = True
            self._profile_dir = tempfile.mkdtemp(prefix="edgekit-profile-")
            options.profile_file_prefix = os.path.join(self._profile_dir, "ort")
        # Bytes, not a path: a path with characters outside the locale's code page fails on some builds.
        # External data cannot be resolved from bytes, so a model that has some is opened by path.
        path = os.path.join(folder, MODEL_FILE)
        source: Any = path
        if not any(name.endswith(".data") for name in os.listdir(folder)):
            with open(path, "rb") as file:
                source = file.read()
        self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.inputs: list[str] = [i.name for i in self._session.get_inputs()]
        self.outputs: list[str] = [o.name for o in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        values = self._session.run(self.outputs, {n: inputs[n] for n in self.inputs})
        return dict(zip(self.outputs, values))

    def bind(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Callable[[], Any]:
        """The call that is timed: one inference on these inputs, results fetched to numpy."""
        session, names = self._session, self.outputs
        feeds = {n: np.ascontiguousarray(inputs[n]) for n in self.inputs}
        return lambda: session.run(names, feeds)

    def layers(self) -> list[dict[str, Any]]:
        """Seconds per node, summed over the calls so far. Ends profiling, so call it once."""
        path = self._session.end_profiling()
        with open(path, encoding="utf-8") as file:
            events = json.load(file)
        os.unlink(path)
        os.rmdir(self._profile_dir)
        rows: dict[str, dict[str, Any]] = {}
        for event in events:
            if event.get("cat") != "Node" or not event.get("name", "").endswith("_kernel_time"):
                continue
            name = event["name"].removesuffix("_kernel_time")
            row = rows.setdefault(
                name, {"name": name, "op": event.get("args", {}).get("op_name", ""), "seconds": 0.0, "calls": 0}
            )
            row["seconds"] += event["dur"] * 1e-6
            row["calls"] += 1
        return list(rows.values())


def open_session(folder: str, threads: int, batch: int = 0, profile: bool = False) -> Session:
    """threads: intra-op threads, >= 1. batch: ignored, ONNX Runtime takes any batch the model allows."""
    return Session(folder, threads, profile)
