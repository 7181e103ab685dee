"""Lowers models to a runtime and times them in turns, one thread, batch 1."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import backends
from edgekit import model as M
from edgekit.backends import About
from edgekit.bench import schedule
from edgekit.dataset import random_dataset
from edgekit.passes.quantize import QuantizeInt8
from edgekit.verify import opened

RUNTIMES = ("onnxruntime", "openvino", "tflite")
CALIBRATION = 16  # random samples: ranges do not change the time
Rounds = list[np.ndarray[Any, Any]]


def quantized(model: ir.Model, seed: int) -> ir.Model:
    """int8 by the quickest settings: the numbers are meaningless, the operators are those of any int8 model."""
    step = QuantizeInt8(calibration="minmax", rounding="nearest", bias_correction="off", smooth="off", seed=seed)
    return step(model, random_dataset(M.signature(model), CALIBRATION, seed))


def rounds(models: Mapping[str, tuple[str, ir.Model]], runtime: str, seconds: float, seed: int) -> dict[str, Rounds]:
    """Nanoseconds of each of `models`, name -> (precision, model), that all take their turns in one schedule."""
    backend = backends.get(runtime)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder, contextlib.ExitStack() as stack:
        workers = []
        for index, (precision, model) in enumerate(models.values()):
            path = Path(folder) / str(index)
            path.mkdir()
            backend.lower(model, precision, path, About())
            worker = stack.enter_context(opened(backend, path, batch=1))
            worker.first(M.seeded_inputs(M.signature(model), 1, seed))
            workers.append(worker)
        series = schedule.run(workers, replace(schedule.QUICK, seconds=seconds, runs=50), seed)
    if failed := [s.error for s in series if s.error]:
        raise RuntimeError(f"{runtime}: {failed[0]}")
    return {name: [np.asarray(r, np.float64) for r in s.rounds] for name, s in zip(models, series, strict=True)}


def machine_words() -> str:
    """For a page's head: the processor and what else it had to do."""
    import os
    import re

    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"model name\s*:\s*(.+)", text)
    load = os.getloadavg()[0]
    return f"{found[1] if found else 'unknown processor'}, {os.cpu_count()} cores, load {load:.1f}"
