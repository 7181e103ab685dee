"""Saturating u8×s8 kernels: real ones, by telling oneDNN (inside OpenVINO) to use no instruction newer than AVX2.

On a CPU without VNNI nothing needs to be told. The integers are right or wrong on the same machine by one variable.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgekit import model as M

from .models import MODELS

pytest.importorskip("openvino", reason="needs openvino: pip install 'edgekit[openvino]'")
if platform.machine() not in ("x86_64", "AMD64"):
    pytest.skip("needs an x86 CPU: others have no saturating kernels", allow_module_level=True)

PROBE = "from edgekit import backends; print(backends.get('openvino').saturates())"
AVX2 = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}


def test_the_probe_sees_a_kernel_that_saturates() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], env=AVX2, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.fixture
def model_and_data(tmp_path: Path) -> Path:
    """Weights at the end of their range and inputs at theirs, so that pairs of products do not fit in int16."""
    model = M.clone(MODELS["mlp"]())
    M.save(model, tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    x = rng.random((64, 12)).astype(np.float32)
    x[:, :8] = 1.0
    np.savez(tmp_path / "d.npz", x=x)
    return tmp_path


def convert(folder: Path, bits: str) -> dict[str, object]:
    arguments = [
        "convert",
        "m.onnx",
        "-t",
        "openvino",
        "--data",
        "d.npz",
        "-o",
        f"b{bits}",
        "--weight-bits",
        bits,
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", *arguments], cwd=folder, env=AVX2, capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout)["artifacts"]
    return next(r for r in rows if r["candidate"] == "openvino-int8")


def test_auto_chooses_seven_bits_and_the_artifact_is_right(model_and_data: Path) -> None:
    parity = convert(model_and_data, "auto")["parity"]
    manifest = json.loads((model_and_data / "bauto/openvino/openvino-int8/manifest.json").read_text(encoding="utf-8"))
    assert manifest["quantization"]["weight_bits"] == 7
    assert parity["ok"]  # type: ignore[index]
    assert parity["per_op_max_lsb"] <= 1  # type: ignore[index]


def test_a_proof_from_another_kind_of_cpu_is_not_trusted(model_and_data: Path) -> None:
    """Converted where products are exact, benched where they saturate."""
    if (
        subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.strip()
        == "True"
    ):
        pytest.skip("this CPU saturates by itself: nothing exact to move from")
    edgekit = [sys.executable, "-m", "edgekit"]
    made = [*edgekit, "convert", "m.onnx", "-t", "openvino", "--data", "d.npz", "-o", "moved"]
    subprocess.run(made, cwd=model_and_data, capture_output=True, check=True)
    bench = [*edgekit, "bench", "moved", "--data", "d.npz", "--quick", "--threads", "1", "--json"]
    done = subprocess.run(bench, cwd=model_and_data, env=AVX2, capture_output=True, text=True, check=True)
    row = next(r for r in json.loads(done.stdout)["artifacts"] if r["precision"] == "int8")
    assert not row["valid"]
    assert "convert it for this CPU" in row["reasons"][0]


def test_eight_bits_on_a_saturating_kernel_are_caught_and_never_called_valid(model_and_data: Path) -> None:
    row = convert(model_and_data, "8")
    assert row["status"] == "invalid"
    parity = row["parity"]
    assert not parity["ok"]  # type: ignore[index]
    assert parity["per_op_max_lsb"] > 1  # type: ignore[index]
    assert "LSB off the reference" in parity["reasons"][0]  # type: ignore[index]


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_for_a_cpu_that_sums_exactly_both_kinds_are_told(model_and_data: Path, backend: str) -> None:
    """8-bit weights made here for a CPU elsewhere: its accuracy is the reference's, this CPU's is measured."""
    if backend == "onnxruntime":
        from edgekit.backends import onnxruntime

        if not onnxruntime.saturates():
            pytest.skip("ONNX Runtime's kernels do not saturate on this CPU, and cannot be told to")
    (model_and_data / "exact.toml").write_text(
        f"""schema = 1
description = "a CPU with VNNI"
weight_bits = 8
candidates = [
    {{ backend = "{backend}", precision = "float32" }}, {{ backend = "{backend}", precision = "int8" }}
]
""",
        encoding="utf-8",
    )
    command = ["convert", "m.onnx", "-t", "exact", "--targets", ".", "--data", "d.npz", "-o", "exact", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", *command],
        cwd=model_and_data, env=AVX2, capture_output=True, text=True, check=True,
    )  # fmt: skip
    row = next(r for r in json.loads(done.stdout)["artifacts"] if r["candidate"] == f"{backend}-int8")
    assert row["status"] == "made"
    parity = row["parity"]
    if backend == "openvino":
        assert parity["per_op_max_lsb"] is None
        assert any("saturate on this CPU" in why for _, why in parity["skipped"])
    else:
        assert parity["per_op_max_lsb"] <= 1
    exact, pairs = parity["arithmetic"]
    assert exact["how"] == "simulated by the integer reference"
    assert pairs["how"] == "measured here"
    assert exact["sqnr_db"] > pairs["sqnr_db"] + 3
