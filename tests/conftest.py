"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# FPGA tools in WebAssembly are compiled once for each cache folder, which takes minutes: keep to the developer's.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_WASM_CACHE = os.environ.get("YOWASP_CACHE_DIR") or str(_CACHE / "YoWASP")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own profiles in ~/.config/edgekit must not decide a test."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("YOWASP_CACHE_DIR", _WASM_CACHE)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of real trained models; tests that need it skip without."""
    folder = os.environ.get("EDGEKIT_ZOO")
    if not folder:
        pytest.skip("EDGEKIT_ZOO is not set: no real models")
    return Path(folder)
