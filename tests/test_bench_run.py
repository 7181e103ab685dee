"""The bench as a whole: real ONNX Runtime artifacts in real workers, and candidates that fail in every way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgekit.bench import client, machine, results
from edgekit.bench import run as bench
from edgekit.bench.document import document
from edgekit.bench.entry import Entry
from edgekit.bench.run import run_bench
from edgekit.bench.schedule import QUICK
from edgekit.dataset import Dataset, open_dataset
from edgekit.errors import ArtifactError, LabelError, WorkerError
from edgekit.model import Signature, TensorSpec

RUNNERS = Path(bench.__file__).parent.parent / "backends" / "runners"
NUMPY_RUNNER = Path(__file__).with_name("numpy_runner.py")
PACE = replace(QUICK, seconds=0.1, round_s=0.02, warmup_s=0.01)
CLASSES, FEATURES = 3, 8

ROW_KEYS = {
    "target", "backend", "precision", "path", "sha256", "size_bytes", "valid", "reasons", "latency_s", "load_s",
    "first_inference_s", "peak_rss_bytes", "threads", "quality", "parity",
}  # fmt: skip
LATENCY_KEYS = {"p50", "p90", "p99", "mean", "samples", "ratio_to_float", "ratio_ci95"}


@pytest.fixture
def x() -> np.ndarray:
    """Three clouds of points, float32 (75, 8)."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.standard_normal((CLASSES, FEATURES))
    return np.asarray(centres[np.arange(75) % CLASSES] + rng.standard_normal((75, FEATURES)), np.float32)


@pytest.fixture
def y() -> np.ndarray:
    return np.arange(75) % CLASSES


@pytest.fixture
def data(tmp_path: Path, x: np.ndarray, y: np.ndarray) -> Dataset:
    np.savez(tmp_path / "blobs.npz", x=x, y=y)
    return open_dataset(tmp_path / "blobs.npz")


def weights() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((FEATURES, CLASSES)).astype(np.float32)


def classifier(folder: Path, w: np.ndarray, batch: int | str = "n") -> Entry:
    """softmax(x·w) as an artifact of ONNX Runtime."""
    folder.mkdir(parents=True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Softmax", ["z"], ["y"], axis=-1)],
        "classifier",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, FEATURES])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    sig = Signature((TensorSpec("x", "float32", (batch, FEATURES)),), (TensorSpec("y", "float32", (batch, CLASSES)),))
    backend, _, precision = folder.name.partition("-")
    size = (folder / "model.onnx").stat().st_size
    runner = RUNNERS / "onnxruntime.py"
    return Entry(folder.parent.name, backend, precision, folder, runner, "0" * 64, size, sig)


def renamed(entry: Entry, folder: Path) -> Entry:
    """The same artifact with its output called otherwise."""
    folder.mkdir(parents=True)
    model = onnx.load(entry.path / "model.onnx")
    model.graph.output[0].name = model.graph.node[-1].output[0] = "other"
    onnx.save(model, folder / "model.onnx")
    backend, _, precision = folder.name.partition("-")
    return replace(entry, path=folder, backend=backend, precision=precision)


def scripted(folder: Path, like: Entry, **behaviour: Any) -> Entry:
    """An artifact of the numpy runner, which fails as it is told."""
    folder.mkdir(parents=True)
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    backend, _, precision = folder.name.partition("-")
    return replace(like, path=folder, runner=NUMPY_RUNNER, backend=backend, precision=precision)


@pytest.fixture
def entries(tmp_path: Path) -> list[Entry]:
    build = tmp_path / "build" / "cpu"
    w = weights()
    parity = {"per_op_max_lsb": 1, "fraction_equal": 0.999, "label_agreement": 1.0, "units": []}
    exact = classifier(build / "onnxruntime-float32", w)
    rounded = classifier(build / "onnxruntime-int8", (np.round(w * 16) / 16).astype(np.float32))
    return [exact, replace(rounded, parity=parity)]


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_the_document_holds_what_was_measured(
    entries: list[Entry], tmp_path: Path, data: Dataset, x: np.ndarray, y: np.ndarray
) -> None:
    path = tmp_path / "build" / "results.jsonl"
    stages: list[str] = []
    doc = run_bench(
        entries, data, threads=(1, "all"), pace=PACE, results_path=path, progress=lambda s, d, t: stages.append(s),
        max_accuracy_drop=0.03, warnings=["a warning"], run_id="run-1",
    )  # fmt: skip
    json.dumps(doc, allow_nan=False)
    counts = sorted({1, machine.physical_cores()})
    assert doc["schema"] == 1
    assert doc["dataset"]["digest"] == data.digest
    assert doc["settings"]["quick"] is True
    assert [(r["backend"], r["precision"], r["threads"]) for r in doc["artifacts"]] == [
        ("onnxruntime", p, t) for p in ("float32", "int8") for t in counts
    ]
    for row in doc["artifacts"]:
        assert set(row) >= ROW_KEYS
        assert set(row["latency_s"]) >= LATENCY_KEYS
        assert row["valid"]
        assert row["latency_s"]["samples"] >= 20
        assert (
            row["latency_s"]["ratio_ci95"][0] <= row["latency_s"]["ratio_to_float"] <= row["latency_s"]["ratio_ci95"][1]
        )
        assert row["first_inference_s"] > 0
        assert row["load_s"] > 0
    floats = [r for r in doc["artifacts"] if r["precision"] == "float32"]
    assert all(r["latency_s"]["ratio_to_float"] == 1.0 for r in floats)
    assert any(r["latency_s"]["ratio_to_best_float"] == 1.0 for r in floats)
    expected = [softmax(x @ w) for w in (weights(), np.round(weights() * 16) / 16)]
    for row, outputs in ((floats[0], expected[0]), (doc["artifacts"][-1], expected[1])):
        assert row["quality"]["accuracy"] == pytest.approx((outputs.argmax(1) == y).mean())
        assert row["quality"]["agreement_with_float"] == pytest.approx(
            (outputs.argmax(1) == expected[0].argmax(1)).mean()
        )
    noise = ((expected[1] - expected[0]) ** 2).sum()
    assert doc["artifacts"][-1]["quality"]["sqnr_db"] == pytest.approx(
        10 * np.log10((expected[0] ** 2).sum() / noise), abs=0.01
    )
    parity = doc["artifacts"][-1]["parity"]
    assert {k: v for k, v in parity.items() if v is not None} == {
        "per_op_max_lsb": 1,
        "fraction_equal": 0.999,
        "label_agreement": 1.0,
    }
    assert "parity: not recorded in the manifest" in floats[0]["reasons"]
    assert doc["verdict"]["cpu"]["ship"] in ("onnxruntime-float32", "onnxruntime-int8")
    assert {"quality cpu", "load cpu", "warm up cpu", "measure cpu"} <= set(stages)
    kept = results.read(path)
    assert document(kept) == doc  # a report needs nothing but the file
    assert (doc["run"], doc["warnings"], doc["settings"]["max_accuracy_drop"]) == ("run-1", ["a warning"], 0.03)
    assert "warnings" not in doc["settings"]
    assert sum(len(r) for m in kept for r in m.samples) == sum(r["latency_s"]["samples"] for r in doc["artifacts"])


def test_absent_figures_have_reasons(entries: list[Entry]) -> None:
    doc = run_bench(entries, None, threads=(1,), pace=PACE)
    for row in doc["artifacts"]:
        assert row["quality"] is None
        assert "quality: no data were given" in row["reasons"]
        if row["latency_s"]["p99"] is None:
            assert any(r.startswith("p99") for r in row["reasons"])
    assert doc["dataset"] is None
    assert doc["verdict"]["cpu"]["ship"] == "onnxruntime-float32"  # what was not compared does not ship


def test_candidates_that_fail_are_rows_with_reasons_and_the_rest_goes_on(
    entries: list[Entry], tmp_path: Path, data: Dataset
) -> None:
    build = tmp_path / "build" / "cpu"
    failing = [
        scripted(build / "loads-int8", entries[0], fail="load"),
        scripted(build / "runs-int8", entries[0], fail="run"),
        scripted(build / "dies-int8", entries[0], fail="die"),
        scripted(build / "nan-int8", entries[0], nan=True, output="y", columns=CLASSES),
        scripted(build / "wide-int8", entries[0], output="y"),
        renamed(entries[0], build / "renames-int8"),
        replace(entries[1], backend="parity", problems=("parity: 3 LSB at conv_1",)),
    ]
    doc = run_bench([*failing, *entries], data, threads=(1,), pace=PACE)
    rows = {r["backend"]: r for r in doc["artifacts"] if r["precision"] == "int8"}
    said = {"loads": "no such operator", "runs": "bad shape", "dies": "kernel aborted", "nan": "NaN", "parity": "3 LSB"}
    said["wide"] = "output 'y' has shape [32, 8], float's has [32, 3]"
    said["renames"] = "output 'y' is missing"
    for name, word in said.items():
        assert not rows[name]["valid"]
        assert word in rows[name]["reasons"][0]
        assert rows[name]["latency_s"]["p50"] is None
        assert not any("no data were given" in r for r in rows[name]["reasons"])
        assert word in doc["verdict"]["cpu"]["why"]
    assert rows["onnxruntime"]["valid"]
    assert rows["onnxruntime"]["latency_s"]["p50"] > 0


def test_without_data_a_failure_is_found_while_timing(entries: list[Entry], tmp_path: Path) -> None:
    bad = scripted(tmp_path / "build" / "cpu" / "dies-int8", entries[0], fail="die")
    doc = run_bench([entries[0], bad], None, threads=(1,), pace=PACE)
    assert [r["valid"] for r in doc["artifacts"]] == [True, False]
    assert "kernel aborted" in doc["artifacts"][1]["reasons"][0]
    assert "quality: no data were given" in doc["artifacts"][0]["reasons"]
    assert "quality: not judged, as the candidate is invalid" in doc["artifacts"][1]["reasons"]


def test_unlabelled_data_give_agreement(entries: list[Entry], tmp_path: Path, x: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", x)
    doc = run_bench(entries, open_dataset(tmp_path / "x.npy"), threads=(1,), pace=PACE)
    quality = doc["artifacts"][1]["quality"]
    assert quality["accuracy"] is None
    assert quality["agreement_with_float"] > 0.8
    assert "accuracy needs labels" in doc["artifacts"][1]["reasons"]


def test_labels_that_do_not_fit_stop_the_bench(
    entries: list[Entry], tmp_path: Path, x: np.ndarray, y: np.ndarray
) -> None:
    y = y.copy()
    y[40] = 3
    np.savez(tmp_path / "bad.npz", x=x, y=y)
    path = tmp_path / "results.jsonl"
    with pytest.raises(LabelError, match="3"):
        run_bench(entries, open_dataset(tmp_path / "bad.npz"), pace=PACE, results_path=path)
    assert not path.exists()


def test_a_fixed_batch_is_kept_and_padding_is_not_counted(
    tmp_path: Path, data: Dataset, x: np.ndarray, y: np.ndarray
) -> None:
    entry = classifier(tmp_path / "build" / "cpu" / "onnxruntime-float32", weights(), batch=16)
    doc = run_bench([entry], data, threads=(1,), pace=PACE)  # 75 samples: 4 batches of 16 and one of 11
    (row,) = doc["artifacts"]
    assert row["batch"] == 16
    assert row["quality"]["samples"] == 75
    assert row["quality"]["accuracy"] == pytest.approx(((x @ weights()).argmax(1) == y).mean())


def test_profile_adds_layers(entries: list[Entry]) -> None:
    doc = run_bench(entries[:1], None, threads=(1,), pace=PACE, profile=True)
    ops = {layer["op"] for layer in doc["artifacts"][0]["layers"]}
    assert {"MatMul", "Softmax"} <= ops


def test_a_profile_that_fails_leaves_its_reason(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> Any:
        raise WorkerError("the runtime has no profiler", "update it")

    monkeypatch.setattr(client.Worker, "layers", refuse)
    (row,) = run_bench(entries[:1], None, threads=(1,), pace=PACE, profile=True)["artifacts"]
    assert row["valid"]
    assert row["layers"] is None
    assert "layers: the runtime has no profiler" in row["reasons"]


def test_without_float_int8_is_not_shipped(entries: list[Entry], data: Dataset) -> None:
    doc = run_bench(entries[1:], data, threads=(1,), pace=PACE)
    assert doc["verdict"]["cpu"]["ship"] is None
    assert any("need a float32 candidate" in r for r in doc["artifacts"][0]["reasons"])


def test_sample_limit_and_batch(entries: list[Entry], data: Dataset) -> None:
    doc = run_bench(entries, data, threads=(1,), pace=PACE, sample_limit=20, batch=4)
    assert doc["dataset"]["samples"] == 20
    assert doc["artifacts"][0]["quality"]["samples"] == 20
    assert doc["artifacts"][0]["batch"] == 4


def test_targets_are_judged_apart(entries: list[Entry], tmp_path: Path) -> None:
    other = [replace(e, target="openvino") for e in entries]
    doc = run_bench([*entries, *other], None, threads=(1,), pace=PACE)
    assert set(doc["verdict"]) == {"cpu", "openvino"}
    assert len(doc["artifacts"]) == 4


def test_an_emulated_time_is_no_latency(entries: list[Entry], data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "emulation", lambda: "qemu-aarch64")
    doc = run_bench(entries, data, threads=(1,), pace=PACE)
    for row in doc["artifacts"]:
        assert row["valid"]
        assert row["latency_s"]["p50"] is None
        assert any("qemu-aarch64" in r for r in row["reasons"])
        assert row["quality"]["accuracy"] is not None
    assert doc["verdict"]["cpu"]["ship"] is None
    assert any("emulated" in w for w in doc["machine"]["warnings"])


def test_nothing_to_measure() -> None:
    with pytest.raises(ArtifactError, match="nothing to measure"):
        run_bench([], None)


def test_an_interrupt_leaves_no_worker_and_no_line(entries: list[Entry], tmp_path: Path) -> None:
    pids: list[int] = []
    real = client.Worker.__enter__

    def entered(self: Any) -> Any:
        worker = real(self)
        pids.append(worker._process.pid)
        return worker

    def interrupt(stage: str, done: float, total: float) -> None:
        if stage.startswith("measure"):
            raise KeyboardInterrupt

    path = tmp_path / "results.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.Worker, "__enter__", entered)
        with pytest.raises(KeyboardInterrupt):
            run_bench(entries, None, threads=(1,), pace=PACE, results_path=path, progress=interrupt)
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not path.exists()
