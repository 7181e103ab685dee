"""edgekit's .tflite files beside TFLiteConverter's of the same Keras models: size, speed, time and memory to lower.

    EDGEKIT_KERAS_PYTHON=/path/to/python EDGEKIT_ZOO=/path/to/zoo python benchmarks/tflite_peers.py [NAME ...]

Claims, by name: float32 within 1e-5 of ONNX Runtime, relative to the largest output, or within what ONNX Runtime's own
optimizations change (deep random networks amplify rounding); files at most 2 % larger (unrolled recurrent layers
excepted); p50 at most 1.03 of the peer's, measured in turns in one run, one thread; no TRANSPOSE; lowering in at most
2 s and in memory of 5 times the model's size (and 16 MB for Python). Prints a table, exits 1 on a broken claim.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

import edgekit
from edgekit import backends
from edgekit import model as M
from edgekit.bench.client import Worker, local_command, thread_environment
from edgekit.bench.schedule import FULL, run
from edgekit.bench.statistics import ratio_of_medians

NETWORKS = ("MobileNet", "MobileNetV2", "MobileNetV3Small", "EfficientNetB0", "ResNet50", "DenseNet121")
ZOO = {
    "mobilenet_v2_cifar": "mobilenet_v2_cifar.keras",
    "mlp_784_mnist": "mlp_784_mnist.keras",
    "resnet8": "mlperf_tiny/resnet8.h5",
    "vww_96": "mlperf_tiny/vww_96.h5",
    "lstm_mnist_rows": "lstm_mnist_rows.keras",
    "dcgan_mnist_generator": "dcgan_mnist_generator.keras",
    "gpt_char": "gpt_char_tinyshakespeare.keras",
}
UNROLLED = frozenset({"lstm_mnist_rows"})  # recurrent layers are written step by step: larger, and faster
ERROR, SIZE, SPEED, SECONDS, MEMORY = 1e-5, 1.02, 1.03, 2.0, 5.0
OVERHEAD = 16 << 20  # bytes: modules imported on the way, which a small model must not be blamed for
KERAS = Path(__file__).with_name("tflite_peers_keras.py")


def peer(folder: Path, name: str, zoo: str | None) -> dict[str, Any]:
    """Sizes and seconds of TFLiteConverter; leaves model and files under folder/name."""
    command = [os.environ["EDGEKIT_KERAS_PYTHON"], str(KERAS), str(folder), name]
    if name in ZOO:
        command.append(str(Path(zoo or "") / "models" / ZOO[name]))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not told and not (folder / name / "data.npz").is_file():
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    found = dict(json.loads(told[-1])) if told else {}
    return {p: found.get(p, {"error": f"it ends with status {done.returncode}"}) for p in ("float32", "int8")}


def lowering(model: Path, folder: Path, precision: str) -> tuple[float, float]:
    """(seconds, peak memory over the model's size) of lowering in a process of its own; imports do not count."""
    code = (
        "import re, sys, time\n"
        "import onnx_ir as ir\n"
        "from pathlib import Path\n"
        "from edgekit.backends import tflite\n"
        "import edgekit.backends.tflite.lowering, edgekit.backends.tflite.writer, ai_edge_litert.schema_py_generated\n"
        "import onnx.reference, edgekit.backends.tflite.describe\n"
        "model = ir.load(sys.argv[1])\n"
        "[v.const_value.numpy().sum() for v in model.graph.initializers.values()]\n"
        "def memory(key): return 1024 * int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = memory('VmRSS')\n"
        "start = time.perf_counter()\n"
        "tflite.lower(model, sys.argv[3], Path(sys.argv[2]))\n"
        "seconds = time.perf_counter() - start\n"
        "print(seconds, memory('VmHWM') - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(folder), precision], capture_output=True, text=True, check=True
    )
    seconds, extra = (float(v) for v in done.stdout.split()[-2:])
    return seconds, max(0.0, extra - OVERHEAD) / model.stat().st_size


def error(model: ir.Model, folder: Path, feeds: M.Tensors) -> tuple[float, float]:
    """Largest difference from ONNX Runtime, unoptimized, over the largest value of each output; and its own spread."""
    with Worker(local_command(backends.get("tflite").RUNNER, folder, 1), "ours", env=thread_environment(1)) as worker:
        worker.load()
        got = worker.infer(feeds)
    want = M.FloatSession(model, optimize=False).run(feeds)
    other = M.FloatSession(model).run(feeds)
    return max(M.difference(want[k], got[k]) for k in want), max(M.difference(want[k], other[k]) for k in want)


def race(ours: Path, theirs: Path, feeds: M.Tensors, seconds: float) -> Any:
    """p50 of ours over p50 of theirs with its 95 % interval, in turns; one thread."""
    runner = backends.get("tflite").RUNNER
    with ExitStack() as stack:
        workers = []
        for folder in (ours, theirs):
            command = local_command(runner, folder, 1, 1)
            worker = stack.enter_context(Worker(command, folder.name, env=thread_environment(1)))
            worker.load()
            inputs = dict(feeds)
            if folder is theirs:  # TFLiteConverter names inputs its own way; there is one
                inputs = {_input(folder): next(iter(feeds.values()))}
            worker.first(inputs)
            workers.append(worker)
        series = run(workers, replace(FULL, seconds=seconds))
    return ratio_of_medians(series[0].rounds, series[1].rounds)


def _input(folder: Path) -> str:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=str(folder / "model.tflite")).get_signature_runner()
    return str(next(iter(runner.get_input_details())))


def _operators(file: Path) -> list[str]:
    from ai_edge_litert import schema_py_generated as schema

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(file.read_bytes(), 0))
    return [names[model.operatorCodes[o.opcodeIndex].builtinCode] for o in model.subgraphs[0].operators]


def compare(name: str, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """One row per precision."""
    facts = peer(folder, name, os.environ.get("EDGEKIT_ZOO"))
    home = folder / name
    data = edgekit.open_dataset(home / "data.npz")
    start = time.perf_counter()
    known = Path(os.environ.get("EDGEKIT_ZOO", "")) / "models" / ZOO.get(name, "")
    loaded = edgekit.load(known if name in ZOO else home / "model.keras", data=data).model
    imported = time.perf_counter() - start
    from edgekit.passes.fold import Fold
    from edgekit.passes.quantize import QuantizeInt8

    model = Fold()(loaded, None)
    bound = data.bind(M.signature(model))
    feeds = next(bound.batches(1)).inputs
    rows = []
    for precision in ("float32", "int8"):
        if "error" in facts[precision]:
            rows.append({"model": name, "precision": precision, "fails": facts[precision]["error"]})
            continue
        prepared: ir.Model = model if precision == "float32" else QuantizeInt8()(model, bound)
        ours = home / f"ours-{precision}"
        ours.mkdir(exist_ok=True)
        M.save(prepared, home / f"{precision}.onnx")
        took, memory = lowering(home / f"{precision}.onnx", ours, precision)
        file = ours / "model.tflite"
        ratio = race(ours, home / precision, feeds, seconds)
        rows.append(
            {
                "model": name, "precision": precision, "import_s": imported, "lower_s": took, "memory": memory,
                "peer_s": facts[precision]["seconds"], "size": file.stat().st_size / facts[precision]["bytes"],
                "error": error(model, ours, feeds) if precision == "float32" else None, "speed": ratio,
                "transposes": _operators(file).count("TRANSPOSE"),
            }
        )  # fmt: skip
    return rows


def broken(row: dict[str, Any]) -> list[str]:
    """The claims that a row does not hold; speed only where the whole interval is above the bound."""
    out = []
    if row["error"] is not None and row["error"][0] > max(ERROR, row["error"][1]):
        out.append(f"error {row['error'][0]:.1e}")
    if row["size"] > SIZE and row["model"] not in UNROLLED:
        out.append(f"size {row['size']:.3f}")
    if row["speed"].low > SPEED:
        out.append(f"speed {row['speed'].value:.3f}")
    if row["lower_s"] > SECONDS:
        out.append(f"lowering {row['lower_s']:.1f} s")
    if row["memory"] > MEMORY:
        out.append(f"memory {row['memory']:.1f}×")
    if row["transposes"]:
        out.append(f"{row['transposes']} TRANSPOSE")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*NETWORKS, *(ZOO if "EDGEKIT_ZOO" in os.environ else ())])
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    if "EDGEKIT_KERAS_PYTHON" not in os.environ:
        raise SystemExit("needs EDGEKIT_KERAS_PYTHON: a Python with tensorflow, keras and tf2onnx")
    print(
        f"{'model':<20} {'precision':<9} {'error':>8} {'size':>6} {'p50':>6} {'95 %':>14} {'lower s':>8} {'peer s':>7} "
        f"{'memory':>7}"
    )
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.names:
            for row in compare(name, Path(temporary), options.seconds):
                if "fails" in row:
                    print(f"{name:<20} {row['precision']:<9} TFLiteConverter fails: {row['fails']}", flush=True)
                    continue
                wrong = broken(row)
                bad += len(wrong)
                speed = row["speed"]
                told = "" if row["error"] is None else f"{row['error'][0]:.1e}"
                print(
                    f"{name:<20} {row['precision']:<9} {told:>8} {row['size']:>6.3f} {speed.value:>6.3f} "
                    f"[{speed.low:.3f}, {speed.high:.3f}] {row['lower_s']:>8.2f} {row['peer_s']:>7.1f} "
                    f"{row['memory']:>6.1f}× {'; '.join(wrong)}",
                    flush=True,
                )
    print("all claims hold" if not bad else f"{bad} claims broken")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
