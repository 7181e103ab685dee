"""The demo: convert, verify and measure a small real model that travels with edgekit. Needs no TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekit import pipeline
from edgekit.errors import ArtifactError
from edgekit.report.progress import Progress, silent

TARGET = "cpu"


def examples_dir() -> Path:
    """The examples inside the installed package, or beside it in a source checkout."""
    packaged = Path(__file__).parent / "_examples"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "examples"


def digits(file: str) -> Path:
    """A file of examples/digits. Raises ArtifactError if the installation is incomplete."""
    path = examples_dir() / "digits" / file
    if not path.is_file():
        raise ArtifactError(f"the demo's file '{path}' is missing", "install edgekit again")
    return path


def run_demo(
    model: str = "mlp", out: Path | str = "edgekit-demo", *, quick: bool = True, progress: Progress = silent
) -> dict[str, Any]:
    """Convert `model` ("mlp" or "cnn") for this CPU and measure every candidate; returns the bench document.

    out: the build folder; artifacts already there are reused, measurements are taken anew.
    """
    pipeline.convert(
        digits(f"digits_{model}.onnx"), targets=[TARGET], data=digits("digits_calib.npz"), out=out, progress=progress
    )
    return pipeline.bench(out, targets=[TARGET], data=digits("digits_test.npz"), quick=quick, progress=progress)
