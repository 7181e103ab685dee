"""The main job on real models: convert, verify and measure each one; judge each claim by name. Exit 1 if one fails.

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
from collections import Counter
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

IMPORT_BOUND = 1e-4  # of the largest output; the bound that the import itself enforces
MAX_LSB = 1
MAX_DROP_POINTS = 1.0
TFLITE_BOUND = 1e-5  # of the largest output, float32 against ONNX Runtime on the imported model
MAX_APART_POINTS = 0.3  # of two runtimes on the same integers
MIN_LABELS = {"onnxruntime": 0.99, "openvino": 0.98, "tflite": 0.99}  # against the integer reference
HOLDS, EXPLAINED, UNCHECKED, FAILS = "holds", "EXPLAINED", "not checked", "FAILS"


@dataclass(frozen=True)
class Claim:
    """One promise and what was found; status: HOLDS, EXPLAINED (missed, for the known cause of ADR 0004), ... FAILS."""

    name: str
    status: str
    told: str


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


def claims(result: dict[str, Any]) -> list[Claim]:
    """Everything that is promised for one model, each judged by itself; what was not measured does not hold."""
    document = result["document"]
    rows = document["artifacts"]
    floats = [r for r in rows if r["precision"] == "float32"]
    invalid = sorted({f"{_id(r)} x{r['threads']}: {'; '.join(r['reasons'])}" for r in rows if not r["valid"]})
    out = [
        _at_most("import, largest relative error", result["converted"]["source"].get("max_rel_error"), IMPORT_BOUND),
        Claim("all rows valid", FAILS if invalid or not rows else HOLDS, "; ".join(invalid) or f"{len(rows)} rows"),
    ]
    seen = set()
    for row in rows:
        if row["precision"] == "int8" and _id(row) not in seen:
            seen.add(_id(row))
            out += _int8_claims(row, floats, result["case"])
    out += _tflite_claims(rows)
    if not seen:
        out.append(Claim("int8", FAILS, "no int8 artifact was made"))
    for target, verdict in document["verdict"].items():
        out.append(_shipped([r for r in rows if r["target"] == target], target, verdict))
    return out


def _int8_claims(row: dict[str, Any], floats: list[dict[str, Any]], case: Case) -> list[Claim]:
    name, parity, quality = _id(row), row["parity"] or {}, row["quality"] or {}
    out = [_at_most(f"{name}: per operator, LSB", parity.get("per_op_max_lsb"), MAX_LSB)]
    accuracy, before = (q.get("accuracy") for q in (quality, next((r["quality"] or {} for r in floats), {})))
    if accuracy is None or before is None:
        out.append(Claim(f"{name}: accuracy drop", UNCHECKED, "the test data have no labels"))
    else:
        out.append(_at_most(f"{name}: accuracy drop, points", 100 * (before - accuracy), MAX_DROP_POINTS))
    agreement = quality.get("agreement_with_float")
    holds = agreement is not None and agreement >= case.min_agreement
    told = f"{_percent(agreement)}, bar {_percent(case.min_agreement)}"
    out.append(Claim(f"{name}: agreement with float", HOLDS if holds else FAILS, told))
    return [*out, _labels(row["backend"], f"{name}: labels", parity)]


def _tflite_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """LiteRT's float file against the import, and its int8 accuracy beside ONNX Runtime's on the same integers."""
    found = {_id(r): r for r in reversed(rows)}
    if "tflite-float32" not in found:
        return []
    parity = found["tflite-float32"]["parity"] or {}
    out = [_at_most("tflite-float32: largest relative error", parity.get("max_rel_error"), TFLITE_BOUND)]
    pair = [(found[i]["quality"] or {}).get("accuracy") for i in ("tflite-int8", "onnxruntime-int8") if i in found]
    if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
        apart = 100 * abs(pair[0] - pair[1])
        out.append(_at_most("tflite-int8: accuracy apart from the same integers', points", apart, MAX_APART_POINTS))
    return out


def _labels(backend: str, name: str, parity: dict[str, Any]) -> Claim:
    """Against the integer reference; explained when a reference that leaves out the same roundings meets the bar."""
    bar, labels, same = MIN_LABELS[backend], parity.get("label_agreement"), parity.get("label_agreement_unrounded")
    if labels is None:
        return Claim(name, FAILS, "not measured")
    if labels >= bar:
        return Claim(name, HOLDS, f"{_percent(labels)} ≥ {_percent(bar, 0)}")
    told = f"{_percent(labels)} < {_percent(bar, 0)}"
    if same is None or same < bar:
        return Claim(name, FAILS, told if same is None else f"{told}, and {_percent(same)} without the same roundings")
    why = f"explained by unrounded residuals, {_percent(same)} when the reference does the same"
    return Claim(name, EXPLAINED, f"{told}: {why}")


def _shipped(rows: list[dict[str, Any]], target: str, verdict: dict[str, Any]) -> Claim:
    """What ships is no slower than the fastest float32, over all runtimes and thread counts."""
    name = f"{target}: shipped p50"
    timed = [(r, p50) for r in rows if (p50 := _p50(r)) is not None]
    own = [p50 for r, p50 in timed if (_id(r), r["threads"]) == (verdict["ship"], verdict["threads"])]
    floats = [p50 for r, p50 in timed if r["precision"] == "float32" and r["valid"]]
    if not own or not floats:
        return Claim(name, FAILS, f"nothing to compare: {verdict['why']}")
    told = f"{verdict['ship']} {_ms(own[0])}, best float32 {_ms(min(floats))}"
    return Claim(name, HOLDS if own[0] <= min(floats) else FAILS, told)


def _at_most(name: str, value: float | None, bound: float) -> Claim:
    if value is None:
        return Claim(name, FAILS, "not measured")
    # the last digits of a difference of two accuracies are float rounding
    return Claim(name, HOLDS if value <= bound * (1 + 1e-9) else FAILS, f"{value:.3g}, at most {bound:g}")


def show(result: dict[str, Any]) -> list[Claim]:
    """Print one model's numbers and, one by one, its claims."""
    print(f"\n== {result['name']}: converted in {result['convert_s']:.1f} s")
    for row in result["document"]["artifacts"]:
        quality, latency = row["quality"] or {}, row["latency_s"] or {}
        ratio, interval = latency.get("ratio_to_float"), latency.get("ratio_ci95")
        told = "-" if ratio is None or interval is None else f"{ratio:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
        print(
            f"{_id(row):<20} x{row['threads']} p50 {_ms(latency.get('p50'))} ratio {told} "
            f"acc {_percent(quality.get('accuracy'))} agree {_percent(quality.get('agreement_with_float'))}"
        )
    for target, verdict in result["document"]["verdict"].items():
        print(f"{target}: {verdict['why']}")
    found = claims(result)
    for claim in found:
        print(f"{claim.status:<11} {claim.name}: {claim.told}")
    return found


def _id(row: dict[str, Any]) -> str:
    return f"{row['backend']}-{row['precision']}"


def _p50(row: dict[str, Any]) -> float | None:
    return (row["latency_s"] or {}).get("p50")


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


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
    found: list[Claim] = []
    for name in names or CASES:
        result = run(name, Path(zoo), folder, quick=not full)
        found += show(result)
        (folder / f"{name}.json").write_text(json.dumps(result["document"], indent=1), encoding="utf-8")
    counts = Counter(claim.status for claim in found)
    print("\n" + ", ".join(f"{counts[status]} {status}" for status in (HOLDS, EXPLAINED, UNCHECKED, FAILS)))
    print(f"edgekit {edgekit.__version__}; builds and documents in {folder}")
    sys.exit(1 if counts[FAILS] else 0)


if __name__ == "__main__":
    main()
