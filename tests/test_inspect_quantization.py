"""What `edgekit inspect --quantization` tells of a build."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from edgekit import model as M
from edgekit import pipeline
from edgekit.errors import ArtifactError, EdgekitError, UsageError
from edgekit.inspection_quantization import inspect, worst
from edgekit.report.terminal import print_quantization
from tests.quantize_graphs import graph, node, normal

F = np.float32
ONLY = """schema = 1
description = "one"
candidates = [ { backend = "onnxruntime", precision = "float32" }, { backend = "onnxruntime", precision = "int8" } ]
"""
CULPRIT = "block[1]/[/wide]"  # a name that is markup to whoever takes it for that


def culprit() -> Any:
    """Three dense layers; what the second gives differs ten-thousandfold between channels."""
    ranges = np.geomspace(1, 1e4, 12).astype(F)
    nodes = [
        node("Gemm", ["x", "w0"], ["a"], name="first"),
        node("Gemm", ["a", "w1"], ["h"], name=CULPRIT),
        node("Softplus", ["h"], ["s"], name="softplus"),  # stops the factors that would repair it
        node("Gemm", ["h", "w2"], ["y"], name="last"),
    ]
    weights = {
        "w0": normal(8, 12),
        "w1": normal(12, 12, seed=1) * ranges,
        "w2": normal(12, 5, seed=2) / ranges[:, None],
    }
    return graph(nodes, {"x": ["n", 8]}, {"y": ["n", 5], "s": ["n", 12]}, weights)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("inspected")
    (here / "one.toml").write_text(ONLY, encoding="utf-8")
    M.save(culprit(), here / "m.onnx")
    np.savez(here / "d.npz", x=normal(60, 8, seed=5))
    pipeline.convert(
        here / "m.onnx", ["one"], targets_dir=here, data=here / "d.npz", out=here / "b", weight_bits=7,
        calibration="minmax",
    )  # fmt: skip
    return here


def test_a_plan_is_told_of_with_its_layers(built: Path) -> None:
    told = inspect(built / "b")
    assert told["schema"] == 1
    (plan,) = told["plans"]
    assert plan["artifacts"] == ["one/onnxruntime-int8"]
    assert plan["samples"] == 60
    assert plan["weight_bits"] == 7
    assert plan["method"] in plan["tried"]
    assert plan["warnings"] == []
    damage = [max(r["alone"], r["without"]) for r in plan["layers"]]
    assert damage == sorted(damage, reverse=True)
    # what it gives, and the weights that read it: between them they make up for one another
    assert {r["node"] for r in plan["layers"][:2]} == {CULPRIT, "last"}
    assert all("channel ranges differ" in r["cause"] for r in plan["layers"][:2])
    assert plan["float_nodes"]["softplus"].startswith("Softplus")


def test_one_artifact_alone(built: Path) -> None:
    assert inspect(built / "b" / "one" / "onnxruntime-int8") == inspect(built / "b")


def test_artifacts_of_one_plan_are_told_of_once_and_of_another_apart(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "b", tmp_path / "b")
    folder = tmp_path / "b" / "one" / "onnxruntime-int8"
    twin, other = folder.with_name("openvino-int8"), folder.with_name("tflite-int8")
    for copy, backend, samples in ((twin, "openvino", 60), (other, "tflite", 61)):
        shutil.copytree(folder, copy)
        manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
        manifest["backend"] = backend
        manifest["quantization"]["samples"] = samples
        (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    plans = inspect(tmp_path / "b")["plans"]
    assert [sorted(p["artifacts"]) for p in plans] == [
        ["one/onnxruntime-int8", "one/openvino-int8"],
        ["one/tflite-int8"],
    ]


def test_eight_bits_where_the_kernels_saturate(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "b", tmp_path / "b")
    path = tmp_path / "b" / "one" / "onnxruntime-int8" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["quantization"]["weight_bits"], manifest["parity"]["saturates"] = 8, True
    path.write_text(json.dumps(manifest), encoding="utf-8")
    (plan,) = inspect(tmp_path / "b")["plans"]
    assert plan["warnings"] == ["one/onnxruntime-int8: 8-bit weights saturate in this CPU's u8×s8 kernels"]


def test_nothing_quantized_or_nothing_there(built: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was quantized"):
        inspect(built / "b" / "one" / "onnxruntime-float32")
    with pytest.raises(EdgekitError) as caught:
        inspect(tmp_path / "none")
    assert "none" in str(caught.value)
    shutil.copytree(built / "b", tmp_path / "b")
    (tmp_path / "b" / "one" / "onnxruntime-int8" / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError):
        inspect(tmp_path / "b")


def shown(document: dict[str, Any], **options: Any) -> str:
    out = io.StringIO()
    print_quantization(document, out=Console(file=out, width=160, markup=False, highlight=False), **options)
    return out.getvalue()


def test_the_table_shows_names_as_they_are(built: Path) -> None:
    told = inspect(built / "b")
    text = shown(told)
    assert CULPRIT in text
    assert "channel ranges differ" in text
    assert f"→ {told['plans'][0]['method']}" in text.replace("\n", " ")


def test_the_table_shows_ten_layers_or_all(built: Path) -> None:
    told = inspect(built / "b")
    row = told["plans"][0]["layers"][0]
    told["plans"][0]["layers"] = [{**row, "node": f"layer{i:02}"} for i in range(15)]
    assert "layer09" in shown(told)
    assert "layer10" not in shown(told)
    assert "layer14" in shown(told, layers=True)


def test_the_command_prints_both_forms(built: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edgekit", "inspect", *arguments],
            cwd=built, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    text, document = run("b", "--quantization"), run("b", "--quantization", "--json")
    assert text.returncode == document.returncode == 0, text.stderr + document.stderr
    assert "Shares of the whole int8 error" in text.stdout
    assert CULPRIT in text.stdout
    assert json.loads(document.stdout) == inspect(built / "b")
    wrong = run("m.onnx", "--quantization")
    assert wrong.returncode not in (0, 3)
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in wrong.stderr


# --- in a sentence ---------------------------------------------------------------------------------------
def row(node: str, alone: float, without: float = 0.0, cause: str = "") -> dict[str, Any]:
    return {"node": node, "op": "Conv", "alone": alone, "without": without, "cause": cause}


def test_the_worst_in_a_sentence() -> None:
    told = worst([row("a", 0.5, cause="wide"), row("b", 0.05, 0.3), row("c", 1.7), row("d", 0.2), row("e", 0.01)])
    assert told.endswith("a share of the whole model's: Conv 'a' 50% (wide); Conv 'b' 30%; Conv 'c' 100%")
    assert worst([row("a", 0.09)]) == ""
    assert worst([]) == ""


def test_the_report_has_the_layers_of_what_was_measured(built: Path, tmp_path: Path) -> None:
    """And no more once the artifact is another one."""
    build = tmp_path / "b"
    shutil.copytree(built / "b", build)
    pipeline.bench(build, quick=True, threads=["1"], targets_dir=built)
    text = pipeline.report(build, kind="md")
    assert "### int8 error per layer: onnxruntime-int8" in text
    worst = inspect(build)["plans"][0]["layers"][0]
    assert f"| {worst['op']} | {worst['alone']:.1%} | {worst['without']:+.1%} |" in text
    folder = build / "one" / "onnxruntime-int8"
    told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    told["files"]["model.onnx"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(told), encoding="utf-8")
    assert "int8 error per layer" not in pipeline.report(build, kind="md")
