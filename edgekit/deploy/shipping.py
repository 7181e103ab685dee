"""Brings an artifact to devices and puts it in use there; goes back to the one before; looks at what is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import artifact
from edgekit.bench import several
from edgekit.bench.machine import architecture
from edgekit.choosing import ELSEWHERE, choose, target_of
from edgekit.deploy import bundle as bundles
from edgekit.deploy import device as devices
from edgekit.deploy.bundle import Bundle
from edgekit.deploy.device import Device
from edgekit.deploy.ssh import Host
from edgekit.deploy.wheels import Described, DeviceFacts
from edgekit.errors import BundleError, DeviceError, UsageError
from edgekit.report.progress import Progress, silent
from edgekit.target import Target, load_target

DEPLOY_SCHEMA = 1  # 1: first
KEEP = 2  # versions before the one in use that stay on a device
DEVICE_PYTHON, DEVICE_GLIBC = "3.11", "2.36"  # of a device that nobody looked at: Debian 12, Raspberry Pi OS of 2023


@dataclass(frozen=True)
class Where:
    """How devices are reached. hosts: as ssh calls them. folder, python: there, instead of the usual ones."""

    hosts: tuple[str, ...]
    config: Path | None = None
    folder: str | None = None
    python: str = "python3"

    def open(self, name: str) -> Host:
        return Host(name, config=self.config, folder=self.folder, python=self.python)


@dataclass(frozen=True)
class Cargo:
    """What is to be shipped: a bundle that exists, or what makes one for a device that was looked at."""

    name: str
    target: Target | None
    candidate: Callable[[str | None], tuple[str, str]]
    """host, or None -> (candidate id, why this one)."""
    make: Callable[[str, DeviceFacts], Bundle]
    """(candidate id, device) -> the bundle."""


@dataclass(frozen=True)
class Asked:
    """What a bundle shall be: see `deploy`."""

    candidate: str | None
    name: str | None
    online: bool
    service: bool
    data: str | None
    sign: Path | None
    verify: Path | None

    def checked(self, made: Bundle) -> Bundle:
        """With the signature that was asked for, after the one that it had to have."""
        if self.verify is not None:
            made.verify(self.verify)
        return made if self.sign is None else made.signed(self.sign)


def command(
    build: Path | None,
    target: str | None,
    hosts: Sequence[str],
    *,
    ssh_config: Path | None,
    folder: str | None,
    python: str,
    rollback: bool,
    remove: bool,
    listing: bool,
    bundle: Path | None,
    wheels: bool,
    device_python: str | None,
    name: str | None,
    progress: Progress = silent,
    **given: Any,
) -> dict[str, Any]:
    """What `edgekit deploy` was asked for. Raises UsageError for options that contradict each other."""
    asked = [word for word, on in (("--rollback", rollback), ("--remove", remove), ("--list", listing)) if on]
    if len(asked) + (bundle is not None) > 1:
        raise UsageError(" and ".join([*asked, *(["--bundle"] if bundle else [])]), "ask for one at a time")
    where = Where(tuple(hosts), ssh_config, folder, python)
    if bundle is None and not hosts:
        raise UsageError("no device is named", "give --host user@name, or --bundle FILE.tar to only write the bundle")
    if listing:
        return show(where, progress)
    if asked:
        return (rollback_to_last if rollback else take_away)(name or _called(build), where, progress)
    if build is None:
        raise UsageError("no BUILD is named", "edgekit deploy BUILD --host user@name")
    if bundle is not None:
        return write(
            build, target, bundle, where, python=device_python, online=not wheels, name=name, progress=progress, **given
        )
    return deploy(build, target, where, online=not wheels, name=name, progress=progress, **given)


def deploy(
    build: Path | str,
    target: str | None,
    where: Where,
    *,
    candidate: str | None = None,
    keep: int = KEEP,
    online: bool = False,
    service: bool = False,
    sign: Path | None = None,
    verify: Path | None = None,
    data: str | None = None,
    name: str | None = None,
    ignore_clock: bool = False,
    targets_dir: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Install an artifact of a build, or a bundle that was made before, on one or several devices.

    candidate: which; without it the one that measured best there, else elsewhere, else the usual one for such devices.
    keep: versions before this one that stay. online: the device fetches its wheels itself. service: with a systemd user
    unit. sign, verify: ssh keys. data: samples for the self-test, instead of seeded ones.
    Returns {"schema", "name", "target", "hosts": [{"host", "status", ...}]}; a device that failed has status "failed"
    with its error, the others go on. Raises the error where all failed.
    """
    if not where.hosts:
        raise UsageError("no device is named", "give --host user@name")
    asked = Asked(candidate, name, online, service, data, sign, verify)
    cargo = _cargo(Path(build), target, targets_dir, asked, progress)

    def one(host: Host, tell: Progress) -> dict[str, Any]:
        device = devices.probe(host, cargo.name, bundles.PACKAGES)
        check_target(cargo.target, device)
        devices.check(device, ignore_clock=ignore_clock)
        chosen, why = cargo.candidate(host.name)
        made = cargo.make(chosen, device)
        row = install(host, device, made, cargo.name, keep, tell)
        return {**row, "candidate": chosen, "why": why, "bundle": made.to_json(), "device": device.to_json()}

    rows = _each(where, one, progress)
    goal = cargo.target.name if cargo.target is not None else None
    return {"schema": DEPLOY_SCHEMA, "name": cargo.name, "target": goal, "hosts": rows}


def write(
    build: Path | str,
    target: str | None,
    out: Path,
    where: Where,
    *,
    python: str | None = None,
    candidate: str | None = None,
    online: bool = False,
    service: bool = False,
    sign: Path | None = None,
    verify: Path | None = None,
    data: str | None = None,
    name: str | None = None,
    targets_dir: Path | None = None,
    progress: Progress = silent,
    **_: Any,
) -> dict[str, Any]:
    """Only write the bundle: a .tar, or a folder. For the device that is named, else for one as the target says.

    python: the device's, where none is asked. Returns {"schema", "name", "target", "path", "bundle", "hosts": []}.
    """
    if len(where.hosts) > 1:
        raise UsageError("--bundle for several devices", "write one for each: they may need other wheels")
    asked = Asked(candidate, name, online, service, data, sign, verify)
    cargo = _cargo(Path(build), target, targets_dir, asked, progress)
    device: DeviceFacts
    if where.hosts:
        with where.open(where.hosts[0]) as host:
            device = devices.probe(host, cargo.name, bundles.PACKAGES)
        check_target(cargo.target, device)
    else:
        device = _described(cargo.target, python)
    chosen, why = cargo.candidate(where.hosts[0] if where.hosts else None)
    made = cargo.make(chosen, device)
    made.write(out)
    goal = cargo.target.name if cargo.target is not None else None
    told = {"candidate": chosen, "why": why, "path": str(out), "bundle": made.to_json()}
    return {"schema": DEPLOY_SCHEMA, "name": cargo.name, "target": goal, **told, "hosts": []}


def _described(target: Target | None, python: str | None) -> Described:
    """A device as the target's profile has it; without one, as this machine."""
    if python is not None and not re.fullmatch(r"3\.\d+", python):
        raise UsageError(f"--device-python {python}", "give major and minor, such as 3.11")
    spec = target.device if target is not None else None
    arch = spec.arch if spec is not None else architecture()
    return Described(arch, python or DEVICE_PYTHON, DEVICE_GLIBC, memory_bytes=spec.memory_bytes if spec else None)


def install(
    host: Host, device: Device, made: Bundle, slot: str, keep: int, progress: Progress, *, test: bool = True
) -> dict[str, Any]:
    """Upload what is not there, test it there, put it in use. Nothing is sent where it is in use already.

    test: False for what is tested later, one artifact at a time, by whoever measures it.
    """
    digest, before = made.digest, (device.slots.get(slot) or {}).get("current")
    if device.intact == digest:
        installed = device.slots[slot]
        folder = f"{device.folder}/slots/{slot}/{digest}"
        return {
            "status": "already there", "digest": digest, "before": before, "folder": folder,
            "environment": installed["environment"], "uploaded_bytes": 0, "trips": host.trips,
        }  # fmt: skip
    there = digest in (device.slots.get(slot) or {}).get("versions", ()) and device.intact is not None
    request = {"cmd": "install", "slot": slot, "digest": digest, "keep": keep, "test": test}
    if there:
        try:
            reply = host.call({**request, "empty": True}, (), progress)
            return _installed(reply, 0, host)
        except BundleError:  # altered on the device: send it whole
            pass
    devices.check(device, needed_bytes=made.disk_bytes(device.store), ignore_clock=True)
    counted = _Counted(made.tar_stream(device.store))
    return _installed(host.call(request, counted, progress), counted.bytes, host)


def _installed(reply: Mapping[str, Any], sent: int, host: Host) -> dict[str, Any]:
    keys = ("digest", "before", "folder", "environment")
    return {"status": "installed", **{k: reply[k] for k in keys}, "uploaded_bytes": sent, "trips": host.trips}


class _Counted:
    """Blocks as they go by, and how many bytes they were."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self.bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            self.bytes += len(block)
            yield block


def _called(build: Path | None) -> str:
    """What the installation of a build or bundle is called on a device."""
    if build is None:
        raise UsageError("no BUILD is named", "name the build, or what is installed with --name")
    return str(bundles.open_bundle(build).manifest["name"]) if bundles.is_bundle(build) else bundles.name_of(build)


def rollback_to_last(name: str, where: Where, progress: Progress = silent) -> dict[str, Any]:
    """Put the version before the current one in use again, on each device."""

    def one(host: Host, tell: Progress) -> dict[str, Any]:
        reply = host.call({"cmd": "rollback", "slot": name}, (), tell)
        return {"status": "rolled back", **{k: reply[k] for k in ("digest", "before", "folder")}}

    return {"schema": DEPLOY_SCHEMA, "name": name, "target": None, "hosts": _each(where, one, progress)}


def take_away(name: str, where: Where, progress: Progress = silent) -> dict[str, Any]:
    """Take every version of `name` away from each device."""

    def one(host: Host, tell: Progress) -> dict[str, Any]:
        return {"status": "removed", "removed": host.call({"cmd": "remove", "slot": name}, (), tell)["removed"]}

    return {"schema": DEPLOY_SCHEMA, "name": name, "target": None, "hosts": _each(where, one, progress)}


def show(where: Where, progress: Progress = silent) -> dict[str, Any]:
    """What each device is and what is installed there."""

    def one(host: Host, tell: Progress) -> dict[str, Any]:
        device = devices.probe(host)
        return {"status": "looked at", "device": device.to_json(), "slots": dict(device.slots)}

    return {"schema": DEPLOY_SCHEMA, "name": None, "target": None, "hosts": _each(where, one, progress)}


def _each(where: Where, one: Callable[[Host, Progress], dict[str, Any]], progress: Progress) -> list[dict[str, Any]]:
    """`one` for every device at the same time, in rows by host. Raises the first error where none succeeded."""

    def row(name: str, tell: Progress) -> dict[str, Any]:
        with where.open(name) as host:
            return {"host": name, **one(host, tell)}

    done, failed = several.each(where.hosts, row, progress)
    rows = {n: {"host": n, "status": "failed", "error": str(e), "exit_code": e.exit_code} for n, e in failed.items()}
    return [{**done, **rows}[name] for name in dict.fromkeys(where.hosts)]


# --- what is shipped -------------------------------------------------------------------------------
def _cargo(path: Path, target: str | None, targets_dir: Path | None, asked: Asked, progress: Progress) -> Cargo:
    if bundles.is_bundle(path):
        made = bundles.open_bundle(path)
        if target is not None and made.manifest["target"] != target:
            raise BundleError(f"'{path}' is a bundle for {made.manifest['target']}, not {target}", "leave -t out")
        ships = made.manifest["ship"]
        if asked.candidate not in (None, ships):
            raise BundleError(f"'{path}' holds {ships}, not {asked.candidate}", "make a bundle of it")

        def given(chosen: str, device: DeviceFacts) -> Bundle:
            bundles.check_fits(made.manifest, device)
            return asked.checked(made)

        return Cargo(asked.name or made.manifest["name"], None, lambda host: (ships, "what the bundle holds"), given)
    root = artifact.check_build(path)
    goal = load_target(target_of(root, target), targets_dir)

    def fresh(chosen: str, device: DeviceFacts) -> Bundle:
        made = bundles.make(
            root, goal, (chosen,), device, online=asked.online, service=asked.service, data=asked.data,
            name=asked.name, progress=progress,
        )  # fmt: skip
        return asked.checked(made)

    def picked(host: str | None) -> tuple[str, str]:
        return choose(root, goal.name, host or ELSEWHERE, asked.candidate)

    return Cargo(asked.name or bundles.name_of(root), goal, picked, fresh)


def check_target(target: Target | None, device: Device) -> None:
    """The device must be of the target's kind: its processor, and its board where it says which it is."""
    if target is None or target.device is None:
        return
    if target.device.arch == device.arch:
        board = device.facts.get("board")
        if target.device.is_model(board):
            return
        raise DeviceError(
            f"{device.host}: it is a {board}, {target.name} is for {' or '.join(target.device.models)}",
            "convert for that board, or for linux-arm64, which any 64-bit Arm board runs",
        )
    under = f" (a 32-bit Python on {device.machine})" if device.arch != device.machine else ""
    raise DeviceError(
        f"{device.host}: it is {device.arch}{under}, {target.name} is {target.device.arch}",
        "convert for another target, such as "
        + {"armv7l": "linux-armv7", "aarch64": "linux-arm64"}.get(device.arch, "cpu"),
    )
