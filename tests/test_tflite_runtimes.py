"""The same files in older and smaller runtimes: tflite-runtime 2.14, and TFLM for microcontrollers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgekit import model as M
from edgekit.backends.tflite.lowering import lower
from edgekit.backends.tflite.weights import shrink
from edgekit.backends.tflite.writer import write
from edgekit.dataset import random_dataset
from edgekit.model import Tensors
from edgekit.passes.fold import Fold
from edgekit.passes.quantize import QuantizeInt8
from tests.models import MODELS
from tests.tflite_interpreter import run

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
CHILD = Path(__file__).with_name("tflite_runtime_child.py")
PYTHONS = {"tflite-runtime": "EDGEKIT_TFLITE_RUNTIME_PYTHON", "tflm": "EDGEKIT_TFLM_PYTHON"}
FLOAT_BOUND = 1e-5
WIDE_BOUND = 3e-4


def variants(name: str) -> dict[str, tuple[bytes, Tensors]]:
    """A model's float32, float16, int8, int8x16 and int8-I/O files, each with inputs of one sample as it takes them."""
    model = Fold()(MODELS[name](), None)
    batch = M.batch_of(M.signature(model)) or 1
    feeds = M.seeded_inputs(M.signature(model), batch)
    quantized = QuantizeInt8()(model, random_dataset(M.signature(model), 16, 0))
    wide = QuantizeInt8(activation_bits=16)(model, random_dataset(M.signature(model), 16, 0))
    out = {}
    for kind in ("float32", "float16", "int8", "int8x16"):
        graph = lower({"int8": quantized, "int8x16": wide}.get(kind, model)).graph
        if kind == "float16":
            shrink(graph, "float16")
        out[f"{name}-{kind}"] = (bytes(write([graph], "test")), feeds)
    integers = lower(quantized, "int8")
    if not integers.refusals:
        rng = np.random.default_rng(0)
        taken = {n: rng.integers(-128, 128, v.shape).astype(np.int8) for n, v in feeds.items()}
        out[f"{name}-int8-io"] = (bytes(write([integers.graph], "test")), taken)
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtimes")
    for name in MODELS:
        for kind, (data, feeds) in variants(name).items():
            (folder / f"{kind}.tflite").write_bytes(data)
            np.savez(folder / f"{kind}.in.npz", **feeds)
    return folder


def run_there(runtime: str, folder: Path) -> None:
    """Every NAME.tflite of the folder on NAME.in.npz; skips where the runtime is not there."""
    python = os.environ.get(PYTHONS[runtime])
    if not python:
        pytest.skip(f"needs {PYTHONS[runtime]}: a Python with {runtime}")
    subprocess.run([python, str(CHILD), runtime, str(folder)], check=True, capture_output=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", PYTHONS)
def test_files_run_there_as_on_the_reference_kernels(runtime: str, files: Path) -> None:
    for old in (*files.glob("*.out.npz"), *files.glob("*.error.txt")):
        old.unlink()
    run_there(runtime, files)
    failed = {f.name.partition(".")[0]: f.read_text(encoding="utf-8") for f in files.glob("*.error.txt")}
    if runtime == "tflite-runtime":
        assert not failed
    compared = 0
    for result in sorted(files.glob("*.out.npz")):
        name = result.name.removesuffix(".out.npz")
        with np.load(files / f"{name}.in.npz") as stored:
            feeds = {key: stored[key] for key in stored.files}
        want = run((files / f"{name}.tflite").read_bytes(), feeds, kernels="BUILTIN_REF")
        with np.load(result) as stored:
            got = {key: stored[key] for key in stored.files}
        # TFLM numbers its outputs, and gives the first
        pairs = [(next(iter(want.values())), got["0"])] if runtime == "tflm" else [(want[k], got[k]) for k in want]
        for expected, value in pairs:
            close(expected, value, name, runtime)
        compared += 1
    assert compared >= len(MODELS) * 2, failed


def close(want: np.ndarray, got: np.ndarray, name: str, runtime: str) -> None:
    """TFLM is the reference in int8 but for dense layers, which it rounds twice as tflite-runtime's own does: one step
    of a sum, which a softmax behind it makes two of (seen: 1 of 14 logits of `cnn_nchw`, everything before it equal).

    In 16 bits a step is a 32768th, and a few of them may differ.
    """
    assert got.shape == want.shape
    if "int8" not in name:
        assert M.difference(want, got) <= FLOAT_BOUND, name
    elif "int8x16" in name:
        assert M.difference(want, got) <= WIDE_BOUND, name
    elif want.dtype == np.int8:
        assert np.abs(want.astype(int) - got.astype(int)).max() <= (2 if runtime == "tflm" else 4), name
    else:
        assert M.difference(want, got) <= (2 / 256 if runtime == "tflm" else 0.03), name
