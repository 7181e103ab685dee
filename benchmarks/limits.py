"""The limits that edgekit promises, measured on this machine; exit 1 when one is missed.

    python benchmarks/limits.py            # start-up time and calibration memory
    EDGEKIT_ZOO=path python benchmarks/limits.py   # also the time that converting resnet8 adds to importing Keras

Start-up: median of 20 runs of `edgekit --help`, warm cache; promised under 0.150 s.
Memory: peak resident memory of the process that converts a small CNN to int8 (target cpu: import, calibration, lowering
and proof; the runtimes' workers are processes of their own) with 10,000 calibration samples against 500; at most 1.1×.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STARTUP_MS, MEMORY_RATIO, CONVERT_S = 150, 1.1, 20

CONVERT = """
import sys
from pathlib import Path
from edgekit import pipeline
model, data, samples, out = sys.argv[1:]
pipeline.convert(model, ["cpu"], data=data, samples=int(samples), out=out, precisions=["int8"])
status = Path("/proc/self/status").read_text()
print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")))
"""


def startup() -> bool:
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "edgekit", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    median_ms = statistics.median(seconds) * 1e3
    return judged(median_ms < STARTUP_MS, f"edgekit --help: median {median_ms:.0f} ms (promised < {STARTUP_MS})")


def judged(kept: bool, told: str) -> bool:
    print(f"{'holds' if kept else 'MISSED'}: {told}")
    return kept


def small_cnn(path: Path) -> None:
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["g"]),
            helper.make_node("Flatten", ["g"], ["f"]),
            helper.make_node("Gemm", ["f", "d"], ["y"]),
        ],
        "cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [
            numpy_helper.from_array(rng.normal(size=(16, 3, 3, 3)).astype(np.float32), "w"),
            numpy_helper.from_array(rng.normal(size=(16, 10)).astype(np.float32), "d"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def conversion_memory(folder: Path) -> bool:
    small_cnn(folder / "cnn.onnx")
    peaks = {}
    for samples in (500, 10_000):
        data = folder / f"{samples}.npz"
        np.savez(data, x=np.random.default_rng(1).random((samples, 3, 32, 32), np.float32))
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                CONVERT,
                str(folder / "cnn.onnx"),
                str(data),
                str(samples),
                str(folder / f"b{samples}"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[samples] = int(done.stdout.split()[-1]) / 1024
    ratio = peaks[10_000] / peaks[500]
    return judged(
        ratio <= MEMORY_RATIO,
        f"peak of converting to int8: 500 samples {peaks[500]:.0f} MiB, 10,000 {peaks[10_000]:.0f} MiB: "
        f"{ratio:.3f}× (promised ≤ {MEMORY_RATIO})",
    )


def keras_import(zoo: Path, folder: Path) -> bool:
    python = os.environ.get("EDGEKIT_KERAS_PYTHON", sys.executable)
    began = time.perf_counter()
    done = subprocess.run([python, "-c", "import tensorflow, keras, tf2onnx"], capture_output=True, check=False)
    if done.returncode:
        print("not run: convert resnet8.h5, needs TensorFlow: pip install 'edgekit[keras]'")
        return True
    keras_s = time.perf_counter() - began
    began = time.perf_counter()
    model, data = zoo / "models/mlperf_tiny/resnet8.h5", zoo / "data/cifar10_calib.npz"
    command = [sys.executable, "-m", "edgekit", "convert", str(model), "--data", str(data), "-o", str(folder / "b")]
    subprocess.run([*command, "--samples", "256"], capture_output=True, check=True)
    total_s = time.perf_counter() - began
    return judged(
        total_s - keras_s < CONVERT_S,
        f"convert resnet8.h5, 256 samples: {total_s:.1f} s, of which importing Keras {keras_s:.1f} s: "
        f"adds {total_s - keras_s:.1f} s (promised < {CONVERT_S})",
    )


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="edgekit-limits-") as name:
        kept = [startup(), conversion_memory(Path(name))]
        if os.environ.get("EDGEKIT_ZOO"):
            kept.append(keras_import(Path(os.environ["EDGEKIT_ZOO"]), Path(name)))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
