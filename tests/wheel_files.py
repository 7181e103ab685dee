"""Tiny wheels for a folder that pip takes them from: real names and tags, nothing of use inside."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest


def wheel(folder: Path, name: str, version: str, tags: str) -> Path:
    """tags: "cp311-cp311-manylinux_2_28_aarch64"."""
    folder.mkdir(parents=True, exist_ok=True)
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    path = folder / f"{module}-{version}-{tags}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}.py", f"VERSION = {version!r}\n" * 100)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tags}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def only_from(monkeypatch: pytest.MonkeyPatch, folder: Path, cache: Path) -> None:
    """pip finds wheels in `folder` and nowhere else; what it finds is kept in `cache`."""
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
