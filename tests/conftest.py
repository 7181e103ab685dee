"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own profiles in ~/.config/edgekit must not decide a test."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of real trained models; tests that need it skip without."""
    folder = os.environ.get("EDGEKIT_ZOO")
    if not folder:
        pytest.skip("EDGEKIT_ZOO is not set: no real models")
    return Path(folder)
