"""Judges one file against the float model, whoever made it: quality on the test samples, and latency, in turns.

    python evaluate.py CASE_FOLDER FILE RESULT.json

Run as a process of its own, since a runtime may abort. FILE: .onnx runs in ONNX Runtime, .xml in OpenVINO, .tflite in
LiteRT; one thread, batches of one. "portable" is the same .onnx file with every graph optimization off: QDQ arithmetic
in float32, as on a CPU whose int8 kernels do not saturate; LiteRT's integers are the same on every CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from runners import Array, Feeds, Run, open_file

LABELS = "y"
_WEIGHTS = {".onnx": (".onnx", ".data"), ".xml": (".xml", ".bin"), ".tflite": (".tflite",)}
RACE_S, ROUND_S, WARM_UP = 4.0, 0.05, 10


@dataclass(frozen=True)
class Quality:
    """score: accuracy (classification) or bits per token (tokens). SQNR: of the worst output.

    sqnr_db: of what goes into a final Softmax; output_sqnr_db: of what comes out, the same where there is none.
    """

    score: float | None
    agreement: float | None
    sqnr_db: float
    output_sqnr_db: float


def outputs(run: Run, test: dict[str, Array]) -> list[Array]:
    """Every output over all test samples, batch first."""
    names = [name for name in test if name != LABELS]
    rows = [run({name: test[name][i : i + 1] for name in names}) for i in range(len(test[names[0]]))]
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]


def reference(folder: Path, test: dict[str, Array]) -> dict[str, list[Array]]:
    """What the float model gives in ONNX Runtime, outputs and logits; computed once and kept beside the model."""
    model = folder / "model.onnx"
    digest = hashlib.sha256(model.read_bytes() + (folder / "test.npz").read_bytes()).hexdigest()
    file = folder / f"reference-{digest[:16]}.npz"
    if not file.is_file():
        found = {"outputs": outputs(open_file(model).run, test)}
        cut = open_file(model, logits=True)
        found["logits"] = outputs(cut.run, test) if cut.ends_in_softmax else found["outputs"]
        named = {f"{kind}{i}": a for kind, arrays in found.items() for i, a in enumerate(arrays)}
        np.savez(file, allow_pickle=False, **named)
    kept = np.load(file)
    count = len(kept.files) // 2
    return {kind: [kept[f"{kind}{i}"] for i in range(count)] for kind in ("outputs", "logits")}


def quality(path: Path, task: str, test: dict[str, Array], truth: dict[str, list[Array]], portable: bool) -> Quality:
    got = outputs(open_file(path, portable=portable).run, test)
    cut = open_file(path, portable=portable, logits=True)
    logits = outputs(cut.run, test) if cut.ends_in_softmax else got
    return judged(task, got, logits, test.get(LABELS), truth)


def judged(
    task: str, got: list[Array], logits: list[Array], labels: Array | None, truth: dict[str, list[Array]]
) -> Quality:
    """The first output is the one that has classes or tokens; NaN where the outputs are."""
    sqnr_db, output_sqnr_db = (
        min(_sqnr_db(own, ref) for own, ref in zip(mine, truth[kind], strict=True))
        for mine, kind in ((logits, "logits"), (got, "outputs"))
    )
    if task == "regression":
        return Quality(None, None, sqnr_db, output_sqnr_db)
    choice = got[0].argmax(-1)
    agreement = float((choice == truth["outputs"][0].argmax(-1)).mean())
    if labels is None:
        return Quality(None, agreement, sqnr_db, output_sqnr_db)
    score = _bits(logits[0], labels) if task == "tokens" else float((choice == labels).mean())
    return Quality(score, agreement, sqnr_db, output_sqnr_db)


def _sqnr_db(own: Array, ref: Array) -> float:
    """10·log10(Σ float² / Σ difference²) over all samples."""
    ref, own = ref.astype(np.float64), own.astype(np.float64).reshape(ref.shape)
    noise = float(((own - ref) ** 2).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10((ref**2).sum() / noise))


def _bits(logits: Array, labels: Array) -> float:
    """Mean of −log2 p(label), softmax over the last axis."""
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    chosen = np.take_along_axis(scores, labels[..., None], -1)[..., 0]
    return float((np.log(np.exp(scores).sum(-1)) - chosen).mean() / np.log(2))


def race(own: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, float]:
    """p50 seconds of both calls, which take turns of 50 ms."""
    calls = (own, other)
    turns = []
    for call in calls:
        for _ in range(WARM_UP):
            call()
        began = time.perf_counter()
        call()
        turns.append(max(1, int(ROUND_S / (time.perf_counter() - began))))
    samples: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + RACE_S
    while time.perf_counter() < end:
        for call, count, kept in zip(calls, turns, samples, strict=True):
            for _ in range(count):
                began = time.perf_counter()
                call()
                kept.append(time.perf_counter() - began)
    return statistics.median(samples[0]), statistics.median(samples[1])


def evaluate(folder: Path, path: Path) -> dict[str, Any]:
    """JSON-ready: quality here and portable, size, and the latency ratio to the float model in ONNX Runtime."""
    task = json.loads((folder / "about.json").read_text(encoding="utf-8"))["task"]
    test = dict(np.load(folder / "test.npz"))
    truth = reference(folder, test)
    here = quality(path, task, test, truth, portable=False)
    portable = None
    if path.suffix == ".onnx":
        portable = quality(path, task, test, truth, portable=True)
    elif path.suffix == ".tflite":
        portable = here
    feeds: Feeds = {name: values[:1] for name, values in test.items() if name != LABELS}
    own, float_model = open_file(path), open_file(folder / "model.onnx")
    p50, float_p50 = race(own.timed(feeds), float_model.timed(feeds))
    kinds = _WEIGHTS[path.suffix]
    return {
        "runtime": own.runtime,
        "here": asdict(here),
        "portable": None if portable is None else asdict(portable),
        "float_score": judged(task, truth["outputs"], truth["logits"], test.get(LABELS), truth).score,
        "size_bytes": sum(f.stat().st_size for f in path.parent.glob(f"{path.stem}.*") if f.suffix in kinds),
        "p50_s": p50,
        "float_p50_s": float_p50,
        "load_per_core": os.getloadavg()[0] / (os.cpu_count() or 1),
        "test_samples": len(next(iter(test.values()))),
    }


if __name__ == "__main__":
    case, file, result = (Path(argument) for argument in sys.argv[1:])
    Path(result).write_text(json.dumps(evaluate(case, file)), encoding="utf-8")
