"""Artifacts on disk: nothing half-made, hashes checked, schemas refused, other people's folders left alone."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from edgekit import artifact
from edgekit.errors import ArtifactError, DiskError, OutputExistsError


def manifest() -> artifact.Manifest:
    tensors = {
        k: [{"name": n, "dtype": "float32", "shape": ["batch", 4]}] for k, n in (("inputs", "x"), ("outputs", "y"))
    }
    return artifact.Manifest("cpu", "onnxruntime", "int8", "id", tensors, {"file": "m.onnx"})


def make(root: Path) -> Path:
    final = root / "cpu" / "onnxruntime-int8"
    with artifact.staged(root, final) as folder:
        (folder / "model.onnx").write_bytes(b"weights")
        artifact.write_manifest(folder, manifest())
    return final


def test_round_trip_and_changed_file(tmp_path: Path) -> None:
    root = artifact.open_build(tmp_path / "bäu 日本")
    final = make(root)
    read = artifact.read_manifest(final)
    assert read.files["model.onnx"]["size_bytes"] == 7
    assert artifact.artifacts(root) == [final]
    (final / "model.onnx").write_bytes(b"weightz")
    with pytest.raises(ArtifactError, match="changed after it was written"):
        artifact.read_manifest(final)


def test_two_runs_write_the_same_manifest(tmp_path: Path) -> None:
    texts = [(make(artifact.open_build(tmp_path / n)) / "manifest.json").read_bytes() for n in "ab"]
    assert texts[0] == texts[1]


def test_a_failure_leaves_the_previous_artifact(tmp_path: Path) -> None:
    root = artifact.open_build(tmp_path / "b")
    final = make(root)
    with pytest.raises(KeyboardInterrupt), artifact.staged(root, final) as folder:  # noqa: PT012
        (folder / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt
    assert artifact.read_manifest(final).files["model.onnx"]["size_bytes"] == 7
    assert not list(root.glob(".staging-*"))


def test_a_killed_runs_leftovers_are_cleared(tmp_path: Path) -> None:
    root = artifact.open_build(tmp_path / "b")
    (root / ".staging-999999999-x").mkdir()  # no process has this id
    artifact.open_build(root)
    assert not list(root.glob(".staging-*"))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    root = artifact.open_build(tmp_path / "b")
    with pytest.raises(DiskError, match="free some space"), artifact.staged(root, root / "cpu" / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(root.glob(".staging-*"))
    assert not (root / "cpu").exists()


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="not empty"):
        artifact.open_build(tmp_path)
    with pytest.raises(OutputExistsError, match="is a file"):
        artifact.open_build(tmp_path / "thesis.txt")
    with pytest.raises(ArtifactError, match="not an edgekit build"):
        artifact.artifacts(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"schema": 99}', "[]"])
def test_a_damaged_or_future_marker(tmp_path: Path, content: str) -> None:
    root = artifact.open_build(tmp_path / "b")
    (root / ".edgekit").write_text(content)
    with pytest.raises(ArtifactError):
        artifact.check_build(root)


def test_a_future_manifest_is_refused(tmp_path: Path) -> None:
    final = make(artifact.open_build(tmp_path / "b"))
    data = json.loads((final / "manifest.json").read_text())
    (final / "manifest.json").write_text(json.dumps({**data, "schema": 99}))
    with pytest.raises(ArtifactError, match="schema 99"):
        artifact.read_manifest(final)


def test_a_manifest_from_before_there_were_labels_is_read(tmp_path: Path) -> None:
    final = make(artifact.open_build(tmp_path / "b"))
    data = json.loads((final / "manifest.json").read_text())
    older = {k: v for k, v in data.items() if k not in ("labels", "pixels")} | {"schema": 2}
    (final / "manifest.json").write_text(json.dumps(older))
    assert artifact.read_manifest(final).labels == ()
    (final / "manifest.json").write_text(json.dumps({**older, "schema": 3}))
    with pytest.raises(ArtifactError, match="lacks 'labels'"):
        artifact.read_manifest(final)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"target": None}, "target = null"),
        ({"backend": "tensorrt"}, 'backend = "tensorrt"'),
        ({"backend": []}, "backend"),
        ({"precision": "int7"}, "int7"),
        ({"signature": {}}, "signature"),
        ({"signature": {"inputs": [], "outputs": []}}, "signature"),
        ({"signature": {"inputs": [{"name": "x"}], "outputs": [1]}}, "signature"),
        ({"files": []}, "files"),
        ({"files": {"model.onnx": {"sha256": "00"}}}, "files"),
        ({"parents": "abc"}, "parents"),
        ({"notes": 5}, "notes"),
        ({"labels": [1]}, "labels"),
        ({"parity": []}, "parity"),
        ({"parity": {"reasons": None}}, "parity"),
        ({"calibration": {"random": False}}, "calibration"),
        ({"tools": {"onnx": 1}}, "tools"),
        ({"source": "m.onnx"}, "source"),
    ],
)
def test_a_manifest_with_a_field_of_the_wrong_kind(tmp_path: Path, change: dict[str, object], told: str) -> None:
    final = make(artifact.open_build(tmp_path / "b"))
    data = json.loads((final / "manifest.json").read_text())
    (final / "manifest.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(ArtifactError, match=told) as error:
        artifact.read_manifest(final)
    assert "convert again" in error.value.remedy


@pytest.mark.parametrize("content", [b"[]", b"5", b"null", b'"text"', b"{", b"\xff\xfe", b""])
def test_a_manifest_that_is_no_table(tmp_path: Path, content: bytes) -> None:
    final = make(artifact.open_build(tmp_path / "b"))
    (final / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="convert again"):
        artifact.read_manifest(final)


def test_a_path_that_cannot_be_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, remedy in (
        (tmp_path / "gone" / "x.md", "make the folder"),
        (tmp_path / "file" / "x.md", "is a file"),
        (tmp_path, "it is a folder"),
    ):
        with pytest.raises(DiskError, match=remedy), artifact.disk_errors(path):
            artifact.write_text(path, "text")
    with pytest.raises(DiskError, match="is a file"):
        artifact.open_build(tmp_path / "file" / "build")


def test_a_missing_file_inside_a_stage_is_a_bug_and_not_a_disk_error(tmp_path: Path) -> None:
    root = artifact.open_build(tmp_path / "b")
    with pytest.raises(FileNotFoundError), artifact.staged(root, root / "cpu" / "x") as folder:
        (folder / "gone").read_bytes()
