"""doctor: what it says is what is there, and the commands it gives are real."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from edgekit import backends, doctor


@pytest.fixture(autouse=True)
def _no_other_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEKIT_KERAS_PYTHON", raising=False)


def package(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(p for p in found["packages"] if p["name"] == name)


def test_versions_are_the_installed_ones() -> None:
    found = doctor.examine()
    for name in ("numpy", "onnx", "onnx-ir", "onnxruntime", "click", "rich"):
        assert package(found, name)["version"] == version(name)
        assert package(found, name)["ok"]
    json.dumps(found, allow_nan=False)


def test_what_the_extras_brought_is_found_by_its_module() -> None:
    found = doctor.examine()
    for name in ("ai-edge-litert", "openvino", "pillow", "pyarrow"):
        with contextlib.suppress(PackageNotFoundError):
            assert package(found, name)["version"] == version(name)
            assert package(found, name)["ok"]


def test_saturation_is_what_each_runtime_shows_here() -> None:
    found = doctor.examine()
    assert set(found["saturates"]) == set(backends.BACKENDS)
    for name, saturates in found["saturates"].items():
        backend = backends.get(name)
        assert saturates == (None if backend.missing() else backend.saturates())


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda n, *a: None if n in modules else real(n, *a))


def test_a_missing_extra_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "PIL")
    found = doctor.examine()
    assert package(found, "pillow") == {
        "name": "pillow", "extra": "images", "version": None, "ok": False, "purpose": "image folders, --resize",
    }  # fmt: skip
    advice = next(a for a in found["advice"] if "pillow" in a["why"])
    words = shlex.split(advice["command"])
    assert words[1:4] == ["-m", "pip", "install"]
    assert Path(words[0]).resolve() == Path(sys.executable).resolve()
    assert words[-1].endswith("[images]")


def test_nothing_is_advised_for_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    advice = doctor.examine()["advice"]
    assert not [a for a in advice if "numpy" in a["why"] or "onnxruntime" in a["why"]]


def test_a_version_below_the_floor_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda n: "1.26.4" if n == "numpy" else real(n))
    found = doctor.examine()
    assert package(found, "numpy")["ok"] is False
    assert "too old" in package(found, "numpy")["purpose"]
    assert any("numpy" in a["why"] for a in found["advice"])


def test_another_interpreter_for_keras_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide(monkeypatch, "keras", "tensorflow", "tf2onnx")
    assert any("[keras]" in a["command"] for a in doctor.examine()["advice"])
    monkeypatch.setenv("EDGEKIT_KERAS_PYTHON", str(tmp_path / "nowhere"))
    advice = doctor.examine()["advice"]
    assert not any("[keras]" in a["command"] for a in advice)
    assert any("EDGEKIT_KERAS_PYTHON" in a["why"] for a in advice)
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 2.21.0 3.15.1 1.17.0\n")
    other.chmod(0o755)
    monkeypatch.setenv("EDGEKIT_KERAS_PYTHON", str(other))
    found = doctor.examine()
    assert not [p for p in found["packages"] if p["extra"] == "keras"]  # nothing is missing
    assert any(c["found"].endswith("keras 3.15.1, tf2onnx 1.17.0") for c in found["checks"])


def test_an_unwritable_config_folder_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file where the folder would have to be: refused whoever runs the test."""
    (tmp_path / ".config").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = doctor.examine()
    check = next(c for c in found["checks"] if c["name"] == "own profiles")
    assert check["ok"] is False
    assert any("own profiles" in a["why"] for a in found["advice"])


def test_a_broken_runtime_does_not_break_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(backends.BACKENDS))
    backend = backends.get(name)

    def broken() -> bool:
        raise ImportError("libnowhere.so: cannot open shared object file")

    monkeypatch.setattr(backend, "saturates", broken)
    found = doctor.examine()
    assert found["saturates"][name] is None
    assert any(c["name"] == f"int8 in {name}" and not c["ok"] for c in found["checks"])
