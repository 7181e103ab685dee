"""What a device is, as its agent tells it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekit.deploy.ssh import Host
from edgekit.errors import DeviceDiskError, DeviceError

# A device this far from our time: signatures and logs are wrong, and something is. Devices without a battery start in
# the past until they have asked a time server.
MAX_SKEW_S = 300.0


@dataclass(frozen=True)
class Device:
    """host: its name. arch: of its Python ("aarch64"; "armv7l" also with a 64-bit kernel, `machine`).

    python: "3.11". glibc: None where it has another C library. memory_bytes: all of it. disk_free_bytes: where things
    go, `folder`. packages: import name -> version in its own Python, or None. skew_s: its clock minus ours.
    slots: what is installed (agent.slots). intact: the asked slot's current version, if every byte is as it came.
    store: sha256 of wheels that are there. signers: whether it takes signed bundles only.
    """

    host: str
    arch: str
    machine: str
    bits: int
    python: str
    implementation: str
    glibc: str | None
    cores: int | None
    memory_bytes: int | None
    disk_free_bytes: int
    writable: bool
    folder: str
    venv: bool
    skew_s: float
    signers: bool
    packages: Mapping[str, str | None] = field(default_factory=dict)
    slots: Mapping[str, Any] = field(default_factory=dict)
    intact: str | None = None
    store: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def emulated(self) -> str | None:
        told = self.facts.get("emulated")
        return None if told is None else str(told)

    def to_json(self) -> dict[str, Any]:
        """What a reader wants to know of it."""
        keys = ("arch", "machine", "bits", "python", "glibc", "cores", "memory_bytes", "disk_free_bytes", "emulated")
        return {"cpu": self.facts.get("cpu"), **{key: getattr(self, key) for key in keys}}


def probe(host: Host, slot: str | None = None, packages: Sequence[str] = ()) -> Device:
    """Look at a device: one ssh command. packages: import names whose versions there are wanted."""
    before = time.time()
    reply = host.call({"cmd": "probe", "slot": slot, "packages": list(packages)})
    told = reply["device"]
    keys = ("arch", "machine", "bits", "python", "implementation", "glibc", "cores", "memory_bytes", "venv", "packages")
    return Device(
        host=host.name,
        **{key: told[key] for key in keys},
        disk_free_bytes=reply["disk_free_bytes"],
        writable=reply["writable"],
        folder=reply["folder"],
        skew_s=reply["now"] - (before + time.time()) / 2,
        signers=reply["signers"],
        slots=reply["slots"],
        intact=reply["intact"],
        store=frozenset(reply["store"]),
        facts=reply["facts"],
    )


def check(device: Device, *, needed_bytes: int = 0, ignore_clock: bool = False) -> None:
    """Raise what keeps anything from being installed there."""
    if device.implementation != "CPython":
        raise DeviceError(f"{device.host}: its Python is {device.implementation}", "wheels need CPython: --python")
    if not device.venv:
        raise DeviceError(
            f"{device.host}: its Python has no venv module", "on the device: sudo apt install python3-venv"
        )
    if not device.writable:
        raise DeviceDiskError(f"{device.host}: cannot write '{device.folder}'", "choose another with --folder")
    if device.disk_free_bytes < needed_bytes:
        raise DeviceDiskError(
            f"{device.host}: {needed_bytes / 1e6:.0f} MB are needed, '{device.folder}' has "
            f"{device.disk_free_bytes / 1e6:.0f} MB free",
            "free some space, or choose another with --folder",
        )
    if abs(device.skew_s) > MAX_SKEW_S and not ignore_clock:
        ahead = "ahead of" if device.skew_s > 0 else "behind"
        raise DeviceError(
            f"{device.host}: its clock is {_span(abs(device.skew_s))} {ahead} this machine's",
            "on the device: sudo timedatectl set-ntp true; or pass --ignore-clock",
        )


def _span(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"
