"""What convert reuses, what it makes anew, and what it retires."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import model as M
from edgekit import pipeline
from edgekit.errors import ArtifactError, ConversionMismatchError, UsageError

from .models import MODELS

ONLY = 'schema = 1\ndescription = "one"\ncandidates = [\n{}]\n'
ROW = '{{ backend = "onnxruntime", precision = "{}" }},\n'


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "one.toml").write_text(ONLY.format(ROW.format("float32") + ROW.format("int8")), encoding="utf-8")
    return tmp_path


def convert(here: Path, model: str, data: str | None, **options: Any) -> dict[str, str]:
    """Candidate -> status."""
    done = pipeline.convert(
        here / model, ["one"], targets_dir=here, data=None if data is None else here / data, out=here / "b", **options
    )
    return {row["candidate"]: row["status"] for row in done["artifacts"]}


def save(here: Path, name: str, model: str) -> None:
    M.save(MODELS[model](), here / f"{name}.onnx")


def test_a_repeat_reuses_and_changed_data_do_not(here: Path) -> None:
    """The second input alone is changed: it counts, though it is not the first array of the file."""
    save(here, "m", "two_inputs_two_outputs")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 6)).astype(np.float32), rng.normal(size=(40, 4)).astype(np.float32)
    np.savez(here / "d.npz", x=np.zeros((40, 3), np.float32), a=a, b=b)
    assert convert(here, "m.onnx", "d.npz") == {"onnxruntime-float32": "made", "onnxruntime-int8": "made"}
    assert convert(here, "m.onnx", "d.npz") == {"onnxruntime-float32": "reused", "onnxruntime-int8": "reused"}
    np.savez(here / "d.npz", x=np.zeros((40, 3), np.float32), a=a, b=b * 50)
    assert convert(here, "m.onnx", "d.npz")["onnxruntime-int8"] == "made"


def test_a_damaged_cache_is_made_anew(here: Path) -> None:
    save(here, "m", "mlp")
    np.savez(here / "d.npz", x=np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32))
    convert(here, "m.onnx", "d.npz")
    for path in (here / "b" / ".cache").glob("*/*"):
        path.write_bytes(b"{")
    for manifest in (here / "b").glob("one/*/manifest.json"):
        manifest.write_bytes(b"[")
    assert set(convert(here, "m.onnx", "d.npz").values()) == {"made"}


def test_another_model_in_the_same_build_retires_the_first_ones_artifacts(here: Path) -> None:
    save(here, "m", "mlp")
    save(here, "n", "conv1d")
    rng = np.random.default_rng(0)
    np.savez(here / "m.npz", x=rng.normal(size=(40, 12)).astype(np.float32))
    convert(here, "m.onnx", "m.npz")
    assert convert(here, "n.onnx", None, precisions=["float32"]) == {"onnxruntime-float32": "made"}
    assert [p.parent.name for p in (here / "b").glob("one/*/manifest.json")] == ["onnxruntime-float32"]


def test_bench_refuses_a_build_of_two_models(here: Path) -> None:
    save(here, "m", "mlp")
    save(here, "n", "conv1d")
    convert(here, "m.onnx", None, precisions=["float32"])
    pipeline.convert(here / "n.onnx", ["one"], targets_dir=here, precisions=["float32"], out=here / "other")
    (here / "other" / "one").rename(here / "b" / "two")
    with pytest.raises(ArtifactError, match="different models"):
        pipeline.bench(here / "b")


def test_the_same_file_for_calibration_and_test_is_told_for_several_inputs(here: Path) -> None:
    save(here, "m", "two_inputs_two_outputs")
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(40, 6)).astype(np.float32), "b": rng.normal(size=(40, 4)).astype(np.float32)}
    np.savez(here / "d.npz", x=np.zeros((40, 3), np.float32), **arrays)
    convert(here, "m.onnx", "d.npz")
    document = pipeline.bench(here / "b", data=here / "d.npz", quick=True, threads=[1])
    assert any("40 of the 40 test samples" in w for w in document["warnings"])


def test_a_fixed_batch_larger_than_the_data_is_still_compared(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean-up that ruins the weights must be seen, whatever the batch."""
    w = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 3])],
        [numpy_helper.from_array(w, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), here / "m.onnx")
    np.savez(here / "d.npz", x=np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32))

    def ruin(self: object, model: Any, data: object) -> Any:
        bad = M.clone(model)
        weight = next(iter(bad.graph.initializers.values()))
        weight.const_value = ir.tensor(weight.const_value.numpy() * 7, name=weight.name)
        return bad

    monkeypatch.setattr("edgekit.passes.fold.Fold.__call__", ruin)
    with pytest.raises(ConversionMismatchError, match="cleaning up"):
        convert(here, "m.onnx", "d.npz")


def test_a_boolean_output_converts(here: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["g"]), helper.make_node("Greater", ["g", "t"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.BOOL, ["batch", 3])],
        [
            numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), "w"),
            numpy_helper.from_array(np.float32(0.1), "t"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), here / "m.onnx")
    assert convert(here, "m.onnx", None, precisions=["float32"]) == {"onnxruntime-float32": "made"}


def test_options_that_name_nothing_or_contradict(here: Path) -> None:
    save(here, "m", "mlp")
    np.savez(here / "d.npz", x=np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32))
    with pytest.raises(UsageError, match="no node 'nosuch'"):
        convert(here, "m.onnx", "d.npz", keep_float=["nosuch"])
    with pytest.raises(UsageError, match="exclude each other"):
        convert(here, "m.onnx", "d.npz", random_calibration=True)


def test_random_calibration_is_stamped_on_the_bench_document(here: Path) -> None:
    save(here, "m", "mlp")
    convert(here, "m.onnx", None, random_calibration=True)
    document = pipeline.bench(here / "b", quick=True, threads=[1])
    assert any("calibrated on random inputs" in w for w in document["warnings"])


def test_difference_sees_what_a_maximum_hides() -> None:
    want = np.array([1.0, 2.0], np.float32)
    assert M.difference(want, np.array([np.nan, 2.0], np.float32)) == float("inf")
    assert M.difference(want, np.array([[1.0, 2.0]], np.float32)) == float("inf")
    assert M.difference(np.array([1]), np.array([2])) == float("inf")
    assert M.difference(want, np.array([1.0, 2.002], np.float32)) == pytest.approx(0.001, rel=1e-3)
    masked = np.array([-np.inf, 1.0], np.float32)
    assert M.difference(masked, masked) == 0.0


def test_a_mask_that_clean_up_folds_into_a_bias_stays_float(here: Path) -> None:
    """logits + [-1e9, 0, 0]: as one bias it would take the whole int8 range, and every label with it."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(6, 8)), "v": rng.normal(size=(8, 3)), "b": np.zeros(8), "c": np.zeros(3)}
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="first"),
            helper.make_node("Relu", ["h"], ["r"], name="relu"),
            helper.make_node("Gemm", ["r", "v", "c"], ["l"], name="last"),
            helper.make_node("Add", ["l", "mask"], ["y"], name="mask"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [
            *(numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()),
            numpy_helper.from_array(np.array([-1e9, 0, 0], np.float32), "mask"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), here / "m.onnx")
    np.savez(here / "d.npz", x=rng.normal(size=(200, 6)).astype(np.float32))
    convert(here, "m.onnx", "d.npz")
    row = next(
        r
        for r in pipeline.bench(here / "b", data=here / "d.npz", quick=True, threads=[1])["artifacts"]
        if r["precision"] == "int8"
    )
    assert row["quality"]["agreement_with_float"] > 0.95


def test_what_stays_float_is_told_with_the_reason(here: Path) -> None:
    save(here, "m", "recurrent")
    np.savez(here / "d.npz", x=np.random.default_rng(0).normal(size=(40, 7, 5)).astype(np.float32))
    done = pipeline.convert(here / "m.onnx", ["one"], targets_dir=here, data=here / "d.npz", out=here / "b")
    notes = next(r["notes"] for r in done["artifacts"] if r["candidate"] == "onnxruntime-int8")
    assert any("operators stay float" in n and "LSTM" in n for n in notes), notes
