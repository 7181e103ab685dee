"""The main job on real models: convert, verify and measure each one, and print the claims beside the numbers.

    EDGEKIT_ZOO=path/to/zoo python benchmarks/zoo.py [--full] [--out FOLDER] [NAME ...]

Keras models need TensorFlow (`pip install 'edgekit[keras]'`, or EDGEKIT_KERAS_PYTHON names an interpreter with it).
Quality is measured on the zoo's whole test sets. Speed is this machine's: compare the ratios, not the milliseconds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import edgekit
from edgekit import pipeline
from edgekit.dataset import open_dataset
from edgekit.preprocessing import Preprocessing
from edgekit.report.progress import progress_bar


@dataclass(frozen=True)
class Case:
    """One model with its data and their preprocessing; min_agreement: the bar for int8 against float."""

    model: str
    calibration: str
    test: str
    scale: str | None
    mean: str | None
    min_agreement: float


CASES = {
    "resnet8": Case("mlperf_tiny/resnet8.h5", "cifar10_calib.npz", "cifar10_test.npz", None, None, 0.94),
    "mobilenet_v2_onnx": Case("mobilenet_v2_cifar.onnx", "cifar10_calib.npz", "cifar10_test.npz", "1/127.5", "1", 0.97),
    "mobilenet_v2_keras": Case(
        "mobilenet_v2_cifar.keras", "cifar10_calib.npz", "cifar10_test.npz", "1/127.5", "1", 0.97
    ),
    "mlp_784": Case("mlp_784_mnist.onnx", "mnist_calib.npz", "mnist_test.npz", "1/255", None, 0.97),
    "vww_96": Case("mlperf_tiny/vww_96.h5", "imagenet_photos_96.npz", "imagenet_photos_96.npz", "1/255", None, 0.97),
}


def split(path: Path, part: str, folder: Path) -> Path:
    """The photographs serve twice: the even ones calibrate, the odd ones test."""
    if path.name != "imagenet_photos_96.npz":
        return path
    x = np.load(path)["x"]
    out = folder / f"photos_{part}.npz"
    np.savez(out, x=x[0::2] if part == "calib" else x[1::2])
    return out


def run(name: str, zoo: Path, out: Path, quick: bool) -> dict[str, Any]:
    case = CASES[name]
    preprocessing = Preprocessing().merge(scale=case.scale, mean=case.mean)
    with progress_bar(enabled=True) as progress:
        began = time.perf_counter()
        converted = pipeline.convert(
            zoo / "models" / case.model,
            data=open_dataset(split(zoo / "data" / case.calibration, "calib", out), preprocessing=preprocessing),
            out=out / name,
            progress=progress,
        )
        seconds = time.perf_counter() - began
        document = pipeline.bench(
            out / name,
            data=open_dataset(split(zoo / "data" / case.test, "test", out), preprocessing=preprocessing),
            quick=quick,
            progress=progress,
        )
    return {"name": name, "convert_s": seconds, "converted": converted, "document": document, "case": case}


def show(result: dict[str, Any]) -> bool:
    """Print one model's claims; True if all hold."""
    good = True
    print(f"\n== {result['name']}: import differs by {result['converted']['source'].get('max_rel_error')}")
    floats = [
        r["quality"]["accuracy"]
        for r in result["document"]["artifacts"]
        if r["precision"] == "float32" and r["quality"].get("accuracy") is not None
    ]
    for row in result["document"]["artifacts"]:
        quality, parity, latency = row["quality"] or {}, row["parity"] or {}, row["latency_s"] or {}
        drop = floats[0] - quality["accuracy"] if floats and quality.get("accuracy") is not None else None
        ratio, interval = latency.get("ratio_to_float"), latency.get("ratio_ci95")
        told = "-" if ratio is None else f"{ratio:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
        print(
            f"{row['backend']}-{row['precision']:<8} x{row['threads']} p50 {_ms(latency.get('p50'))} ratio {told} "
            f"acc {quality.get('accuracy')} agree {quality.get('agreement_with_float')} "
            f"| per-op {parity.get('per_op_max_lsb')} LSB, labels {parity.get('label_agreement')} "
            f"(as this runtime rounds: {parity.get('label_agreement_unrounded')})"
        )
        if row["precision"] == "int8":
            good &= bool(drop is None or drop <= 0.01)
            good &= (quality.get("agreement_with_float") or 0) >= result["case"].min_agreement
            # a runtime that is known to leave roundings out is held to the reference that leaves them out too
            labels = max(parity.get("label_agreement") or 0, parity.get("label_agreement_unrounded") or 0)
            good &= labels >= (0.99 if row["backend"] == "onnxruntime" else 0.98)
    for target, verdict in result["document"]["verdict"].items():
        print(f"{target}: {verdict['ship']}: {verdict['why']}")
    print("holds" if good else "DOES NOT HOLD")
    return good


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f} ms"


@click.command()
@click.argument("names", nargs=-1)
@click.option("--full", is_flag=True, help="The full measuring protocol instead of --quick.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the builds here.")
def main(names: tuple[str, ...], full: bool, out: Path | None) -> None:
    zoo = os.environ.get("EDGEKIT_ZOO")
    if not zoo:
        sys.exit("not run: set EDGEKIT_ZOO to the folder with models/ and data/")
    folder = out or Path(tempfile.mkdtemp(prefix="edgekit-zoo-"))
    folder.mkdir(parents=True, exist_ok=True)
    good = True
    for name in names or CASES:
        result = run(name, Path(zoo), folder, quick=not full)
        good &= show(result)
        (folder / f"{name}.json").write_text(json.dumps(result["document"], indent=1), encoding="utf-8")
    print(f"\nedgekit {edgekit.__version__}; builds and documents in {folder}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
