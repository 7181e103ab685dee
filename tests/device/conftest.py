"""Devices as fixtures. What cannot run here is skipped, and the reason says what would help."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.device.devices import Device, RealPi, missing

PI_VARIABLE = "EDGEKIT_PI_HOST"  # user@host of a Raspberry Pi: it is `arm64_device` then


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m arm64`, `-m armhf`: what uses a device of that kind."""
    for item in items:
        for arch in ("arm64", "armhf"):
            if f"{arch}_device" in getattr(item, "fixturenames", ()):
                item.add_marker(arch)


@pytest.fixture(scope="session")
def amd64_device() -> Iterator[Device]:
    """This machine's processor, not emulated: the fast one. Shared by all tests: leave nothing broken."""
    with _device("amd64") as device:
        yield device


@pytest.fixture(scope="session")
def arm64_device() -> Iterator[Device | RealPi]:
    """A Raspberry Pi 5 (its instruction set, not its speed), emulated; or a real one. Shared by all tests."""
    if host := os.environ.get(PI_VARIABLE):
        yield RealPi(host)
        return
    with _device("arm64", cpu="cortex-a76") as device:
        yield device


@pytest.fixture(scope="session")
def armhf_device() -> Iterator[Device]:
    """A 32-bit system, emulated, on the least processor that its programs are made for. Shared by all tests."""
    with _device("armhf", cpu="cortex-a7") as device:
        yield device


@pytest.fixture
def make_device() -> Iterator[Callable[..., Device]]:
    """Starts devices of a test's own, which it may break: make_device("amd64", disk_bytes=8 << 20)."""
    with contextlib.ExitStack() as stack:
        yield lambda name, **options: stack.enter_context(_device(name, **options))


def _device(name: str, **options: object) -> Device:
    if reason := missing(name):
        pytest.skip(reason)
    return Device(name, **options)  # type: ignore[arg-type]


@pytest.fixture
def fetched_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels come from where they were fetched before; pip is not asked."""
    cache = Path(os.environ.get("EDGEKIT_DEVICES", "")) / "cache"
    if not cache.is_dir():
        pytest.skip("no wheels for devices: `python tests/device/fetch_wheels.py $EDGEKIT_DEVICES` fetches them")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
