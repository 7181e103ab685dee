"""What ONNX Runtime makes of weights in few bits, and which clipped ranges win: the figures that decide in edgekit.

Run: python benchmarks/weight_only.py [MODEL.onnx ...]; one thread. Without models only kernels are timed. Each time is
relative to a float32 MatMul of the same size. Read by `backends/ort_weights.py`, `passes/weight_grid.py` and
`passes/quantize_weights.py`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from edgekit import model as M
from edgekit import pipeline
from edgekit.passes import weight_grid
from edgekit.passes.fold import Fold

Array = np.ndarray[Any, Any]
SIZES = ((128, 512), (512, 128), (1024, 1024), (2048, 2048))
ROWS = (1, 4, 16, 64)
SECONDS = 0.3
CONTRIB = "com.microsoft"


def median_time(nodes: list[onnx.NodeProto], weights: dict[str, Array], x: Array, outputs: int) -> float:
    """Seconds per run of a graph x -> y."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "product",
        [info("x", onnx.TensorProto.FLOAT, ["rows", x.shape[1]])],
        [info("y", onnx.TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": x})
    taken, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        session.run(None, {"x": x})
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def variants(inputs: int, outputs: int) -> dict[str, tuple[list[onnx.NodeProto], dict[str, Array]]]:
    """Name -> (nodes, weights) of each way to multiply; the integers are random."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(inputs, outputs)).astype(np.float32)
    scale = (np.abs(w).max(0) / 127).astype(np.float32)
    q = np.rint(w / scale).astype(np.int8)
    node = helper.make_node
    out = {
        "float32": ([node("MatMul", ["x", "w"], ["y"])], {"w": w}),
        "DequantizeLinear": (
            [node("DequantizeLinear", ["q", "s"], ["w"], axis=1), node("MatMul", ["x", "w"], ["y"])],
            {"q": q, "s": scale},
        ),
        "Cast, Mul": (
            [node("Cast", ["q"], ["f"], to=1), node("Mul", ["f", "s"], ["w"]), node("MatMul", ["x", "w"], ["y"])],
            {"q": q, "s": scale},
        ),
        "dynamic": (
            [node("DynamicQuantizeMatMul", ["x", "q", "s"], ["y"], domain=CONTRIB)],
            {"q": q, "s": scale},
        ),
    }
    for bits, level, zeros in ((4, 1, False), (4, 1, True), (4, 4, False), (4, 4, True), (8, 1, False), (8, 4, False)):
        groups = -(-inputs // 32)
        stored = {
            "b": rng.integers(0, 256, (outputs, groups, 4 * bits), dtype=np.uint8),
            "s": rng.uniform(0.01, 0.1, (outputs, groups)).astype(np.float32),
        }
        if zeros:
            stored["z"] = rng.integers(0, 256, (outputs, -(-groups * bits // 8)), dtype=np.uint8)
        how = {"K": inputs, "N": outputs, "bits": bits, "block_size": 32, "accuracy_level": level}
        name = f"{bits} bits, level {level}{', zero points' if zeros else ''}"
        out[name] = ([node("MatMulNBits", ["x", *stored], ["y"], domain=CONTRIB, **how)], stored)
    return out


def kernels() -> None:
    for inputs, outputs in SIZES:
        for rows in ROWS:
            x = np.random.default_rng(1).normal(size=(rows, inputs)).astype(np.float32)
            times = {name: median_time(*v, x, outputs) for name, v in variants(inputs, outputs).items()}
            whole = times.pop("float32")
            told = "  ".join(f"{name} {t / whole:.2f}" for name, t in times.items())
            print(f"{rows} x {inputs} x {outputs}: float32 {1e6 * whole:.0f} us  {told}", flush=True)


def shares(path: Path) -> None:
    """How often each share of the full range wins, by bits, over the model's products."""
    model = Fold()(pipeline.load(path).model, None)
    for bits, block in ((4, 32), (8, 0)):
        won: Counter[float] = Counter()
        for node in model.graph:
            array = M.constant(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") else None
            if array is None or array.ndim != 2 or array.size < 1024:
                continue
            weight = array.astype(np.float64)
            grid = weight_grid.search(weight, None, bits, block or len(weight), asymmetric=False)
            for group in range(len(grid.scale)):
                part = np.abs(weight[group * grid.block : (group + 1) * grid.block]).max(0) / grid.high
                won.update(np.round(grid.scale[group] / np.where(part > 0, part, 1), 3).tolist())
        total = sum(won.values())
        told = "  ".join(f"{share:g}: {count / total:.1%}" for share, count in sorted(won.items()))
        print(f"{path.name}, {bits} bits: {told}")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        shares(Path(argument))
    kernels()
