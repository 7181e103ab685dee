"""A small build for devices, and wheels of the names and versions that a bundle of it asks for."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from edgekit import pipeline
from edgekit.deploy.wheels import Described
from tests.wheel_files import wheel

DIGITS = Path(__file__).parent.parent / "examples" / "digits"
ARM64 = Described("aarch64", "3.11", "2.36", cores=4)
ARMV7 = Described("armv7l", "3.11", "2.36", packages={"numpy": "1.24.2"})


def build(folder: Path) -> Path:
    """Artifacts of the digits MLP for arm64 and armv7."""
    data = DIGITS / "digits_calib.npz"
    pipeline.convert(
        DIGITS / "digits_mlp.onnx", ("linux-arm64", "linux-armv7"), data=data, out=folder, samples=32, search_time=0.5
    )
    return folder


def stock(index: Path) -> None:
    """For both devices, in the versions that are installed here."""
    for name in ("ai-edge-litert", "onnxruntime", "numpy"):
        wheel(index, name, version(name), "cp311-cp311-manylinux_2_28_aarch64")
    wheel(index, "tflite-runtime", "2.14.0", "cp311-cp311-manylinux_2_34_armv7l")
