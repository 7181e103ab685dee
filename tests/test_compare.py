"""Published files beside builds: how they are fed, measured and judged, through real LiteRT workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit import pipeline
from edgekit.bench import verdict
from edgekit.bench.entry import Entry, fit
from edgekit.cli import main
from edgekit.compare import compare
from edgekit.errors import (
    MissingExtraError,
    ModelFileError,
    NoCalibrationDataError,
    ShapeError,
    UsageError,
    WorkerError,
)
from edgekit.model import Signature, TensorSpec
from tests.tflite_files import Op, Values, dense, int8_dense, pack

CLASSES, FEATURES, SAMPLES = 3, 8, 90
QUICK: dict[str, Any] = {"quick": True, "threads": ("1",)}


# --- feeding one model what another takes -------------------------------------------------------------


def sig(inputs: dict[str, tuple[Any, ...]], outputs: dict[str, tuple[Any, ...]]) -> Signature:
    return Signature(tuple(_spec(*item) for item in inputs.items()), tuple(_spec(*item) for item in outputs.items()))


def _spec(name: str, shape: tuple[Any, ...]) -> TensorSpec:
    """A shape of float32, or (dtype, sizes...)."""
    typed = shape[0] in ("int32", "int64")
    return TensorSpec(name, shape[0] if typed else "float32", shape[1:] if typed else shape)


def entry(own: Signature, wanted: Signature) -> Entry:
    return Entry("t", "b", "float32", Path("f"), Path("r"), "0", 1, wanted, label="f", fit=fit(own, wanted, "f"))


def test_single_tensors_of_other_names_are_matched() -> None:
    found = entry(sig({"in": ("n", 8)}, {"out": (1, 3)}), sig({"x": ("n", 8)}, {"y": ("n", 3)}))
    x = np.arange(16, dtype=np.float32).reshape(2, 8)
    np.testing.assert_array_equal(found.feed({"x": x})["in"], x)
    np.testing.assert_array_equal(found.named({"out": x[:, :3]})["y"], x[:, :3])


def test_names_decide_where_sizes_do_not() -> None:
    both = {"a": ("n", 8), "b": ("n", 8)}
    found = entry(sig(dict(reversed(both.items())), {"o": ("n", 3)}), sig(both, {"o": ("n", 3)}))
    a, b = np.zeros((1, 8), np.float32), np.ones((1, 8), np.float32)
    fed = found.feed({"a": a, "b": b})
    assert (fed["a"] == 0).all()
    assert (fed["b"] == 1).all()


def test_what_could_be_either_is_refused() -> None:
    one, pair, other = {"x": ("n", 8)}, {"p": ("n", 8), "q": ("n", 8)}, {"a": ("n", 8), "b": ("n", 8)}
    with pytest.raises(ShapeError, match="more than one"):
        fit(sig(pair, one), sig(other, one), "f")
    with pytest.raises(ShapeError, match="more than one"):
        fit(sig(one, pair), sig(one, other), "f")


def test_another_task_is_refused_with_both_shapes() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 32, 32, 3\).*matches none.*\(n, 28, 28, 1\)"):
        fit(sig({"p": (1, 32, 32, 3)}, {"o": ("n", 3)}), sig({"a": ("n", 28, 28, 1)}, {"o": ("n", 3)}), "f")
    with pytest.raises(ShapeError, match="output for 'f'"):
        fit(sig({"x": ("n", 8)}, {"o": ("n", 4)}), sig({"x": ("n", 8)}, {"o": ("n", 3)}), "f")
    with pytest.raises(ShapeError, match="matches none"):  # numbers are no tokens
        fit(sig({"x": ("int32", "n", 8)}, {"o": ("n", 3)}), sig({"x": ("n", 8)}, {"o": ("n", 3)}), "f")


@given(st.integers(1, 3), st.integers(2, 4), st.integers(5, 7), st.booleans())
def test_images_in_the_other_order_are_turned(n: int, c: int, h: int, first: bool) -> None:
    nchw, nhwc = (1, c, h, h + 1), (1, h, h + 1, c)
    own, wanted = (nhwc, nchw) if first else (nchw, nhwc)
    found = entry(sig({"p": own}, {"q": own}), sig({"x": wanted}, {"y": wanted}))
    x = np.random.default_rng(0).random((n, *wanted[1:])).astype(np.float32)
    fed = found.feed({"x": x})["p"]
    assert fed.shape == (n, *own[1:])
    np.testing.assert_array_equal(fed, x.transpose(0, 2, 3, 1) if first else x.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(found.named({"q": fed})["y"], x)


def test_axes_of_one_and_integer_widths_are_adapted() -> None:
    found = entry(sig({"p": (1, 28, 28, 1)}, {"o": (1, 1, 1, 3)}), sig({"x": ("n", 28, 28)}, {"y": ("n", 3)}))
    assert found.feed({"x": np.zeros((2, 28, 28), np.float32)})["p"].shape == (2, 28, 28, 1)
    assert found.named({"o": np.zeros((2, 1, 1, 3), np.float32)})["y"].shape == (2, 3)
    found = entry(sig({"p": ("int32", "n", 8)}, {"o": ("n", 3)}), sig({"x": ("int64", "n", 8)}, {"o": ("n", 3)}))
    assert found.feed({"x": np.zeros((2, 8), np.int64)})["p"].dtype == np.int32


# --- files to measure ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return 2 * np.random.default_rng(1).standard_normal((CLASSES, FEATURES)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: np.ndarray) -> Path:
    """float.tflite; int8.tflite, the same without softmax; wrong.tflite with the first two classes exchanged; data."""
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
    pytest.importorskip("flatbuffers", reason="needs flatbuffers")
    here, bias = tmp_path_factory.mktemp("files"), np.array([0.1, -0.2, 0.3], np.float32)
    (here / "float.tflite").write_bytes(dense(weights, bias))
    (here / "int8.tflite").write_bytes(int8_dense(weights, bias, 4 / 127, 20 / 127))
    (here / "wrong.tflite").write_bytes(dense(weights[[1, 0, 2]], bias[[1, 0, 2]], names=("a", "b"), batch=1))
    x = np.random.default_rng(2).uniform(-4, 4, (SAMPLES, FEATURES)).astype(np.float32)
    np.savez(here / "data.npz", x=x, y=(x @ weights.T + bias).argmax(axis=1))
    np.savez(here / "unlabelled.npz", x=x)
    return here


def predicted(folder: Path, weights: np.ndarray, order: list[int]) -> np.ndarray:
    x = np.load(folder / "data.npz")["x"]
    return np.asarray((x @ weights[order].T + np.array([0.1, -0.2, 0.3], np.float32)[order]).argmax(axis=1))


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_lone_file_is_measured(folder: Path) -> None:
    doc = pipeline.bench(folder / "int8.tflite", data=str(folder / "data.npz"), **QUICK)
    (row,) = doc["artifacts"]
    assert row["valid"], row["reasons"]
    assert (row["label"], row["backend"], row["precision"]) == ("int8.tflite", "tflite", "int8")
    assert row["size_bytes"] == (folder / "int8.tflite").stat().st_size
    assert row["latency_s"]["p50"] > 0
    assert row["quality"]["accuracy"] > 0.9
    assert doc["verdict"]["file"]["ship"] is None
    json.dumps(doc, allow_nan=False)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["data.npz", "unlabelled.npz", "float.tflite", "int8.tflite", "wrong.tflite"]
    )


def test_files_stand_beside_a_build_and_never_ship(folder: Path, weights: np.ndarray, tmp_path: Path) -> None:
    build = tmp_path / "build"
    model = onnx_classifier(tmp_path / "m.onnx", weights)
    pipeline.convert(model, data=str(folder / "data.npz"), out=build, precisions=["float32"])
    beside = [folder / "wrong.tflite", folder / "int8.tflite"]
    doc = pipeline.bench(build, data=str(folder / "data.npz"), beside=beside, **QUICK)
    rows = {r["label"]: r for r in doc["artifacts"] if r["label"]}
    own = [r for r in doc["artifacts"] if not r["label"]]
    assert set(rows) == {"wrong.tflite", "int8.tflite"}
    assert all(r["valid"] and r["target"] == "cpu" for r in (*rows.values(), *own))
    labels = np.load(folder / "data.npz")["y"]
    exchanged = (predicted(folder, weights, [1, 0, 2]) == labels).mean()
    assert rows["wrong.tflite"]["quality"]["accuracy"] == pytest.approx(exchanged)
    assert rows["wrong.tflite"]["quality"]["agreement_with_float"] == pytest.approx(exchanged)
    assert all(r["quality"]["agreement_with_float"] == 1 for r in own)
    assert rows["wrong.tflite"]["latency_s"]["ratio_ci95"] is not None
    assert (
        min(r["latency_s"]["ratio_to_float"] for r in own if r["precision"] == "float32") == 1
    )  # files are no baseline
    assert doc["verdict"]["cpu"]["ship"] in {f"{r['backend']}-{r['precision']}" for r in own}
    assert not any(".tflite" in v["why"] for v in doc["verdict"].values())
    text = pipeline.report(build)
    assert "wrong.tflite: for comparison, not part of this build: float32" in text
    assert pipeline.report(build, kind="md").count("wrong.tflite") >= 2


def test_a_changed_file_makes_a_report_outdated(folder: Path, weights: np.ndarray, tmp_path: Path) -> None:
    build, file = tmp_path / "build", tmp_path / "other.tflite"
    file.write_bytes((folder / "float.tflite").read_bytes())
    pipeline.convert(onnx_classifier(tmp_path / "m.onnx", weights), out=build, precisions=["float32"])
    pipeline.bench(build, beside=[file], **QUICK)
    assert not any("made again" in w for w in pipeline.latest_document(build)["warnings"])
    file.write_bytes((folder / "int8.tflite").read_bytes())
    assert any("other.tflite" in w for w in pipeline.latest_document(build)["warnings"])


def onnx_classifier(path: Path, weights: np.ndarray) -> Path:
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["z"], transB=1),
            helper.make_node("Softmax", ["z"], ["y"], axis=-1),
        ],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.float32([0.1, -0.2, 0.3]), "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_file_that_does_not_run_is_a_row_that_says_why(folder: Path, tmp_path: Path) -> None:
    x, y = Values("x", (1, FEATURES)), Values("y", (1, FEATURES))
    (tmp_path / "custom.tflite").write_bytes(pack([x, y], [Op("MyOwn", ["x"], ["y"])], ["x"], ["y"]))
    (row,) = pipeline.bench(tmp_path / "custom.tflite", **QUICK)["artifacts"]
    assert not row["valid"]
    assert "MyOwn" in row["reasons"][0]
    with pytest.raises(WorkerError, match=r"A \('.*custom.tflite'\) does not run: .*MyOwn"):
        compare(tmp_path / "custom.tflite", tmp_path / "custom.tflite", **QUICK)


def test_verdict_of_rows_beside_a_build() -> None:
    latency = {"p50": 1.0, "ratio_to_best_float": 0.5, "ratio_to_best_float_ci95": [0.5, 0.5]}
    plain = {"valid": True, "reasons": [], "latency_s": latency, "quality": None, "threads": 1, "size_bytes": 1}
    beside = {**plain, "backend": "tflite", "precision": "float32", "label": "f.tflite"}
    own = {**plain, "backend": "onnxruntime", "precision": "float32", "latency_s": {**latency, "p50": 9.0}}
    assert verdict.decide([own, beside], 0.01)["ship"] == "onnxruntime-float32"
    assert verdict.decide([beside], 0.01)["ship"] is None


# --- compare ------------------------------------------------------------------------------------------


def test_compare_measures_what_differs(folder: Path, weights: np.ndarray) -> None:
    doc = compare(folder / "float.tflite", folder / "wrong.tflite", data=str(folder / "data.npz"), **QUICK)
    labels = np.load(folder / "data.npz")["y"]
    exchanged = (predicted(folder, weights, [1, 0, 2]) == labels).mean()
    assert doc["score"] == "accuracy"
    assert doc["a"]["quality"]["accuracy"] == 1
    assert doc["score_difference"] == pytest.approx(exchanged - 1)
    assert doc["agreement"] == pytest.approx(exchanged)
    x = np.load(folder / "data.npz")["x"].astype(np.float64)
    z = x @ weights.T.astype(np.float64) + [0.1, -0.2, 0.3]
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    assert doc["max_difference"] == pytest.approx(np.abs(p - p[:, [1, 0, 2]]).max(), abs=1e-5)
    sizes = [(folder / f"{n}.tflite").stat().st_size for n in ("float", "wrong")]
    assert doc["size_ratio"] == sizes[1] / sizes[0]
    (ratio,) = doc["latency"]
    assert ratio["ci95"][0] <= ratio["ratio"] <= ratio["ci95"][1]
    assert ratio["ratio"] == pytest.approx(doc["b"]["latency_s"][0]["p50"] / doc["a"]["latency_s"][0]["p50"])
    assert doc["regressions"] == []
    json.dumps(doc, allow_nan=False)


def test_a_loss_beyond_the_limit_is_a_regression(folder: Path) -> None:
    data = folder / "data.npz"
    done = cli(
        "compare", folder / "float.tflite", folder / "wrong.tflite", "--data", data, "--quick",
        "--max-accuracy-drop", 0.05,
    )  # fmt: skip
    assert done.exit_code == 1, done.output
    assert "B loses" in done.output
    assert done.output.strip().splitlines()[-1].startswith("error: B loses")
    done = cli(
        "compare", folder / "float.tflite", folder / "int8.tflite", "--data", data, "--quick",
        "--max-accuracy-drop", 0.05,
    )  # fmt: skip
    assert done.exit_code == 0, done.output


def test_json_is_printed_before_the_failure(folder: Path) -> None:
    done = cli(
        "compare", folder / "float.tflite", folder / "wrong.tflite", "--data", folder / "data.npz", "--quick", "--json",
        "--max-accuracy-drop", 0.05,
    )  # fmt: skip
    assert done.exit_code == 1
    assert json.loads(done.stdout)["regressions"]


def test_without_labels_agreement_is_judged(folder: Path) -> None:
    data = str(folder / "unlabelled.npz")
    doc = compare(folder / "float.tflite", folder / "wrong.tflite", data=data, max_accuracy_drop=0.01, **QUICK)
    assert "agrees with A on only" in doc["regressions"][0]


def test_a_slowdown_beyond_the_limit_is_a_regression(folder: Path) -> None:
    """No machine is a million times faster or slower at one file than at the other."""
    files = folder / "float.tflite", folder / "int8.tflite"
    slow = compare(*files, max_slowdown=1e-6, **QUICK)
    assert "more than 1e-06×" in slow["regressions"][0]
    assert any("random inputs" in w for w in slow["warnings"])
    assert slow["dataset"] is None
    assert compare(*files, max_slowdown=1e6, **QUICK)["regressions"] == []


def test_artifact_folders_are_compared(folder: Path, weights: np.ndarray, tmp_path: Path) -> None:
    model = onnx_classifier(tmp_path / "m.onnx", weights)
    result = pipeline.convert(model, data=str(folder / "data.npz"), out=tmp_path / "build", precisions=["float32"])
    made = next(r["path"] for r in result["artifacts"] if r["candidate"] == "onnxruntime-float32")
    doc = compare(made, folder / "float.tflite", data=str(folder / "data.npz"), max_accuracy_drop=0.001, **QUICK)
    assert doc["a"]["backend"] == "onnxruntime"
    assert doc["max_difference"] < 1e-5
    assert doc["agreement"] == 1
    assert doc["regressions"] == []
    with pytest.raises(UsageError, match="is no artifact — name one, such as"):
        compare(tmp_path / "build", folder / "float.tflite")


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path) -> None:
    good = folder / "float.tflite"
    with pytest.raises(ModelFileError, match="no artifact or file"):
        compare(good, tmp_path / "nowhere.tflite")
    with pytest.raises(UsageError, match=r"cannot compare.*data\.npz"):
        compare(good, folder / "data.npz")
    with pytest.raises(UsageError, match="is no artifact"):
        compare(good, tmp_path)
    with pytest.raises(NoCalibrationDataError, match="--data"):
        compare(good, good, max_accuracy_drop=0.1)
    (tmp_path / "t.tflite").write_bytes(good.read_bytes()[:100])
    with pytest.raises(ModelFileError, match="damaged"):
        compare(good, tmp_path / "t.tflite")
    for arguments, code in (
        (("bench", folder / "float.tflite", "-t", "cpu"), 2),
        (("bench", folder / "float.tflite", "--with", folder / "data.npz"), 2),
        (("bench", tmp_path / "nowhere.tflite"), 10),
        (("compare", good, good, "--max-slowdown", "0"), 2),
    ):
        done = cli(*arguments)
        assert done.exit_code == code, done.output


def test_a_runtime_that_is_missing_is_named(
    folder: Path, weights: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.backends import onnxruntime

    model = onnx_classifier(tmp_path / "m.onnx", weights)
    result = pipeline.convert(model, out=tmp_path / "build", precisions=["float32"])
    made = next(r["path"] for r in result["artifacts"] if r["candidate"] == "onnxruntime-float32")
    monkeypatch.setattr(onnxruntime, "missing", lambda: "pip install onnxruntime")
    with pytest.raises(MissingExtraError, match="pip install onnxruntime"):
        compare(made, folder / "float.tflite")


# The published accuracies are of the full test set; on 2,000 images the two are within a point of each other.
@pytest.mark.slow
def test_published_files_beside_each_other(zoo: Path) -> None:
    files = [zoo / "models" / "mlperf_tiny" / f"resnet8_{n}.tflite" for n in ("float", "int8")]
    doc = compare(*files, data=str(zoo / "data" / "cifar10_test.npz"), max_accuracy_drop=0.01, **QUICK)
    assert doc["regressions"] == []
    assert doc["a"]["quality"]["accuracy"] == pytest.approx(0.7548, abs=0.02)
    assert doc["size_ratio"] == files[1].stat().st_size / files[0].stat().st_size


def test_the_preprocessing_in_a_files_metadata_is_used(folder: Path, weights: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
    from edgekit.preprocessing import Preprocessing

    data = np.load(folder / "data.npz")
    np.savez(tmp_path / "raw.npz", x=(data["x"] * 8).astype(np.float32), y=data["y"])
    how = Preprocessing(scale=1 / 8)
    model = onnx_classifier(tmp_path / "m.onnx", weights)
    result = pipeline.convert(
        model, data=str(tmp_path / "raw.npz"), preprocessing=how, out=tmp_path / "build", precisions=["float32"]
    )
    made = next(r["path"] for r in result["artifacts"] if r["candidate"] == "tflite-float32")
    doc = pipeline.bench(Path(made) / "model.tflite", data=str(tmp_path / "raw.npz"), **QUICK)
    assert doc["preprocessing"]["std"] == [8.0]
    (row,) = doc["artifacts"]
    assert row["quality"]["accuracy"] == 1
    plain = {"data": str(tmp_path / "raw.npz"), "preprocessing": Preprocessing(mean=(3.0,)), **QUICK}
    doc = pipeline.bench(Path(made) / "model.tflite", **plain)
    assert any("prepared differently" in w and "metadata" in w for w in doc["warnings"])


def test_inputs_that_cannot_be_made_up_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
    y = Values("y", (1, 1))
    for tensor, words in (
        (Values("x", (1, 1), "STRING"), "tensor 'x' is string"),
        (Values("x", (1, 1), signature=(-1, -1)), "size 1 of input 'x'.*--data"),
    ):
        file = tmp_path / "m.tflite"
        file.write_bytes(pack([tensor, y], [Op("RELU", ["x"], ["y"])], ["x"], ["y"]))
        with pytest.raises(ShapeError, match=words):
            pipeline.bench(file, **QUICK)
        with pytest.raises(ShapeError, match=words):
            compare(file, file, **QUICK)
