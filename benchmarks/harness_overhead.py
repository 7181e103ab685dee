"""How far p50 from edgekit's schedule lies from a bare loop over the same runtime call. Target: within 3 %.

    python benchmarks/harness_overhead.py [MODEL.onnx] [--seconds 3] [--repeats 5]

Without MODEL: mobilenet_v2_cifar.onnx of $EDGEKIT_ZOO, or else a generated convolution net. For ONNX Runtime and
OpenVINO, one thread, batch 1. Bench and bare loop run in fresh processes and take turns, in two ways:

  alone    the bare loop runs for all its seconds without a pause, as a user would write it, between two benches;
           the figure is the median over the repeats. Shows all costs: worker, rounds, cold caches after a turn.
  turns    the bare loop is one more worker of the schedule. Shows the cost of the worker's own code, with an interval.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgekit import backends
from edgekit import model as M
from edgekit.bench.client import Worker, local_command, thread_environment
from edgekit.bench.schedule import FULL, run
from edgekit.bench.statistics import ratio_of_medians

# What a user would write: no edgekit code. Reads a number of seconds a line, answers with the samples in ns.
BARE = {
    "onnxruntime": """
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.inter_op_num_threads = 1
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
def call():
    session.run(None, feeds)
""",
    "openvino": """
import openvino as ov
core = ov.Core()
network = core.read_model(model)
network.reshape({n: list(v.shape) for n, v in feeds.items()})
config = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
config["INFERENCE_PRECISION_HINT"] = "f32"
request = core.compile_model(network, "CPU", config).create_infer_request()
for name, value in feeds.items():
    request.set_tensor(name, ov.Tensor(value))
def call():
    request.infer()
""",
}
LOOP = """
import sys, time
import numpy as np
model, feeds = sys.argv[1], dict(np.load(sys.argv[2]))
{setup}
call()
print("ready", flush=True)
for line in sys.stdin:
    samples, end = [], time.perf_counter_ns() + int(float(line) * 1e9)
    while time.perf_counter_ns() < end:
        start = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - start)
    print(" ".join(map(str, samples)), flush=True)
"""


@dataclass
class BareLoop:
    """A bare loop in a process of its own, in the role of a worker."""

    label: str
    process: subprocess.Popen[str]

    def round(self, seconds: float, runs: int, settle_s: float) -> np.ndarray:
        if settle_s:
            self._ask(settle_s)
        return self._ask(seconds)

    def warmup(self, runs: int, seconds: float, limit_s: float) -> tuple[int, float]:
        return len(self._ask(seconds)), seconds

    def _ask(self, seconds: float) -> np.ndarray:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return np.array(self.process.stdout.readline().split(), np.int64)


@contextmanager
def bare_loop(backend: str, model_file: Path, feeds: Path) -> Iterator[BareLoop]:
    code = LOOP.format(setup=BARE[backend])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(model_file), str(feeds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=thread_environment(1),
    )
    try:
        if process.stdout.readline().strip() != "ready":
            raise SystemExit(f"the bare loop of {backend} did not start")
        yield BareLoop(f"{backend} bare", process)
    finally:
        process.kill()
        process.wait()


def generated_model() -> ir.Model:
    """Four 3×3 convolutions of 32 channels on 32×32: about 30 million MACs."""
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, value, channels = [], [], "x", 3
    for i in range(4):
        w = rng.standard_normal((32, channels, 3, 3)).astype(np.float32) / 10
        weights.append(numpy_helper.from_array(w, f"w{i}"))
        nodes.append(helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        value, channels = f"r{i}", 32
    spec = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "generated", [spec("x", 1, [1, 3, 32, 32])], [spec(value, 1, [1, 32, 32, 32])], weights
    )
    return M.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def load_model(path: Path | None) -> tuple[str, ir.Model]:
    zoo = os.environ.get("EDGEKIT_ZOO")
    if path is None and zoo:
        path = Path(zoo) / "models" / "mobilenet_v2_cifar.onnx"
    if path is None:
        return "generated", generated_model()
    return path.stem, ir.load(path)


def measure(names: list[str], cases: dict[str, tuple[list[str], Path]], feeds: dict, file: Path, seconds: float):
    """Per backend: (p50 of the bench alone, p50 of the bare loop alone, ratio in turns)."""
    pace = replace(FULL, seconds=seconds, runs=50)
    env = thread_environment(1)
    found = {}
    with ExitStack() as stack:
        workers = []
        for name in names:
            worker = stack.enter_context(Worker(cases[name][0], name, env=env))
            worker.load()
            worker.first(feeds)
            workers.append(worker)
        loops = [stack.enter_context(bare_loop(n, cases[n][1], file)) for n in names]
        benched = run(workers, pace)
        alone = [loop.round(seconds, 0, 0.5) for loop in loops]
        mixed = run([*workers, *loops], pace)
        for i, name in enumerate(names):
            bench_p50 = float(np.median(np.concatenate(benched[i].rounds)))
            turns = ratio_of_medians(mixed[i].rounds, mixed[len(names) + i].rounds)
            found[name] = (bench_p50, float(np.median(alone[i])), turns)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    title, model = load_model(options.model)
    feeds = M.seeded_inputs(M.signature(model), 1)
    names = [n for n in BARE if backends.get(n).missing() is None]
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "feeds.npz"
        np.savez(file, **feeds)
        cases = {}
        for name in names:
            backend, folder = backends.get(name), Path(temporary) / name
            folder.mkdir()
            backend.lower(model, "float32", folder)
            lowered = next(p for p in sorted(folder.iterdir()) if p.suffix in (".onnx", ".xml"))
            cases[name] = (local_command(backend.RUNNER, folder, 1, 1), lowered)
        repeats = [measure(names, cases, feeds, file, options.seconds) for _ in range(options.repeats)]
    print(f"{title}, 1 thread, {options.repeats} repeats of {options.seconds:g} s")
    print(f"{'runtime':<12} {'bench p50':>10} {'bare p50':>10} {'alone':>7} {'turns':>7}  95 %")
    worst = 0.0
    for name in names:
        rows = [r[name] for r in repeats]
        alone = float(np.median([bench / bare for bench, bare, _ in rows]))
        turn = sorted((t for _, _, t in rows), key=lambda t: t.value)[len(rows) // 2]
        bench_us, bare_us = (float(np.median([r[k] for r in rows])) / 1e3 for k in (0, 1))
        print(
            f"{name:<12} {bench_us:>7.1f} µs {bare_us:>7.1f} µs {alone:>7.3f} {turn.value:>7.3f}"
            f"  [{turn.low:.3f}, {turn.high:.3f}]"
        )
        worst = max(worst, abs(alone - 1))
    print(f"largest deviation alone: {100 * worst:.1f} % (target: 3 %)")
    return 0 if worst <= 0.03 else 1


if __name__ == "__main__":
    sys.exit(main())
