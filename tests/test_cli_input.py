"""Values that make no sense, through the command line: refused in one line before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_cli_errors import here, no_artifacts, refused, run

__all__ = ["here"]  # the fixture: a folder with a good model and good data

INT8 = ("convert", "m.onnx", "--data", "d.npz")
FLOAT = (*INT8, "--precision", "float32")


def test_seeds_count_from_zero(here: Path) -> None:
    refused_by_click(run(*INT8, "--seed", "-1", cwd=here), "--seed")
    refused_by_click(run("bench", "build", "--seed", "-1", cwd=here), "--seed")
    assert no_artifacts(here)


def refused_by_click(done: object, *words: str) -> None:
    """click prints the usage above its line, which begins with a capital."""
    stderr = done.stderr  # type: ignore[attr-defined]
    assert done.returncode == 2, stderr  # type: ignore[attr-defined]
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr.strip().splitlines()[-1], stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--scale", v) for v in ("0", "nan", "1/1e400", "1e-60", "1e39", "1/0")] + [("--std", "0"), ("--mean", "inf")],
)
def test_a_preprocessing_that_erases_the_data(here: Path, option: str, value: str) -> None:
    refused(run(*INT8, option, value, cwd=here), 20, option[2:], "give ")
    assert no_artifacts(here)


@pytest.mark.parametrize("value", ["x=0,6", "x=-3,6", "x=1,0", "x=", "0,6"])
def test_sizes_start_at_one(here: Path, value: str) -> None:
    refused_by_click(run(*INT8, "--shape", value, cwd=here), "--shape")
    refused_by_click(run("inspect", "m.onnx", "--shape", value, cwd=here), "--shape")


def test_a_size_beyond_any_index(here: Path) -> None:
    refused(run(*INT8, "--shape", f"x={10**30},6", cwd=here), 12, "--shape x", "leave one open")


def test_a_profile_that_no_backend_can_serve(here: Path) -> None:
    for text, word in (
        ('[{ backend = "onnxruntime", precision = "float16" }]', "it offers float32, int8"),
        ("[1]", "give { backend"),
    ):
        (here / "mine.toml").write_text(f'schema = 1\ndescription = "mine"\ncandidates = {text}\n')
        refused(run(*INT8, "-t", "mine", "--targets", ".", cwd=here), 31, "mine.toml", word)
    refused(run("targets", "--targets", ".", cwd=here), 31, "mine.toml", word)  # the last one: listing parses only


def test_damaged_manifests_and_reports_that_cannot_be_written(here: Path) -> None:
    assert run(*FLOAT, cwd=here).returncode == 0
    assert run("bench", "build", "--quick", cwd=here).returncode == 0
    refused(run("report", "build", "-o", "missing/x.md", cwd=here), 51, "missing/x.md", "make the folder")
    refused(run("report", "build", "-o", "m.onnx/x.md", cwd=here), 51, "is a file")
    for kind in ((), ("--format", "md")):
        (here / "folder.md").mkdir(exist_ok=True)
        for folder in (".", "folder.md"):
            done = run("report", "build", "-o", folder, *kind, cwd=here)
            refused(done, 51 if kind else 2, "folder")
    manifest = next((here / "build").glob("cpu/*/manifest.json"))
    good = json.loads(manifest.read_text())
    for bad in ([], 5, {**good, "backend": "tensorrt"}, {**good, "signature": {}}, {**good, "files": []}):
        manifest.write_text(json.dumps(bad))
        refused(run("bench", "build", "--quick", cwd=here), 52, "manifest.json", "convert again")
    assert run(*FLOAT, cwd=here).returncode == 0  # and that repairs it
    assert json.loads(manifest.read_text()) == good
