"""LiteRT's two interfaces on the same files: CompiledModel's p50 over Interpreter's, in turns in one process.

    python benchmarks/litert_compiled_model.py FILE.tflite ...

One thread, XNNPACK, inputs bound before and outputs left where they are: what each costs to call once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.cpu_options import CpuOptions
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.options import Options

ROUNDS, SECONDS = 21, 0.2


def interpreter(path: str) -> Callable[[], object]:
    made = Interpreter(model_path=path, num_threads=1)
    made.allocate_tensors()
    for detail in made.get_input_details():
        made.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
    return made.invoke


def compiled(path: str) -> Callable[[], object]:
    options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=1))
    made = CompiledModel.from_file(path, options=options)
    inputs, outputs = made.create_input_buffers(0), made.create_output_buffers(0)
    details = Interpreter(model_path=path).get_input_details()
    for buffer, detail in zip(inputs, details, strict=True):
        buffer.write(np.zeros(detail["shape"], detail["dtype"]))
    return lambda: made.run_by_index(0, inputs, outputs)


def median(call: Callable[[], object]) -> float:
    """Of the calls that fit SECONDS, in seconds."""
    times = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    print(f"{'file':<50} {'Interpreter ms':>14} {'CompiledModel ms':>16} {'ratio':>6}")
    for path in sys.argv[1:]:
        ways = [interpreter(path), compiled(path)]
        rounds = np.array([[median(way) for way in ways] for _ in range(ROUNDS)])[1:]
        first, second = np.median(rounds, axis=0) * 1e3
        ratio = float(np.median(rounds[:, 1] / rounds[:, 0]))
        print(f"{path[-50:]:<50} {first:>14.4f} {second:>16.4f} {ratio:>6.3f}", flush=True)


if __name__ == "__main__":
    main()
