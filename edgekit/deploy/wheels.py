"""Chooses and fetches the wheels that a device's Python needs: by pip, on this machine, into a cache by content.

pip's own configuration says from where. A choice is kept: the same device gets the same wheels again, without the
network, until the cache is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, Protocol

from edgekit import artifact, backends
from edgekit.errors import DeviceError, WheelError
from edgekit.report.progress import Progress, silent
from edgekit.target import DeviceSpec

INDEX_SCHEMA = 1  # 1: first
PILLOW = "pillow"
# distribution -> import name, where they differ
MODULES: Mapping[str, str] = {PILLOW: "PIL"}
_OLDEST_GLIBC, _NEWEST_GLIBC = 17, 60  # minor numbers of 2.x: manylinux2014, and more than there is
_PYTHONS = tuple(f"3.{minor}" for minor in range(9, 16))  # that a remedy may name
_PIP_TIMEOUT_S = 900.0
_LOCK = threading.Lock()  # of the cache: devices are served at the same time
_NETWORK = re.compile(
    r"Retrying \(|Could not fetch URL|ConnectionError|Max retries|Connection (?:refused|reset|broken)"
)
_SYSTEMS = {"armv7l": "a 64-bit system runs more of them; for this one convert with -t linux-armv7"}


class DeviceFacts(Protocol):
    """What must be known of a device. arch, bits: of its Python. machine: of its kernel. glibc: None: another one."""

    @property
    def host(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def machine(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def python(self) -> str: ...
    @property
    def glibc(self) -> str | None: ...
    @property
    def cores(self) -> int | None: ...
    @property
    def memory_bytes(self) -> int | None: ...
    @property
    def packages(self) -> Mapping[str, str | None]: ...


@dataclass(frozen=True)
class Described:
    """A device that is described, not looked at; packages: {} where nothing is known of them."""

    arch: str
    python: str
    glibc: str | None
    host: str = "the device"
    cores: int | None = None
    memory_bytes: int | None = None
    packages: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def machine(self) -> str:
        return self.arch

    @property
    def bits(self) -> int:
        return 32 if self.arch == "armv7l" else 64


@dataclass(frozen=True)
class Wheel:
    """A wheel in the cache. glibc: "2.28", the oldest that it runs with, or None for one without machine code."""

    path: Path
    name: str
    version: str
    sha256: str
    size_bytes: int

    def told(self, usual: str) -> str:
        """The version, with the package's name where it is not the usual one."""
        return self.version if self.name == usual else f"{self.name} {self.version}"

    @property
    def glibc(self) -> str | None:
        tags = self.path.name.removesuffix(".whl").rsplit("-", 1)[1].split(".")
        known = [found for tag in tags if (found := _glibc_of(tag)) is not None]
        return ".".join(map(str, min(known))) if known else None


@dataclass(frozen=True)
class Chosen:
    """wheels: in order of names. versions: of the runtime, by backend. requirements: for a device that fetches wheels.

    system_packages: import name -> versions that the device's own Python must have. notes: for the user.
    """

    wheels: tuple[Wheel, ...]
    versions: Mapping[str, str]
    system_packages: Mapping[str, str]
    requirements: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def glibc(self) -> str | None:
        """The oldest that all of them run with."""
        known = [numbers(wheel.glibc) for wheel in self.wheels if wheel.glibc is not None]
        return ".".join(map(str, max(known))) if known else None


def choose(
    names: Sequence[str],
    device: DeviceFacts,
    spec: DeviceSpec | None = None,
    *,
    images: bool = False,
    online: bool = False,
    progress: Progress = silent,
) -> Chosen:
    """The wheels for the backends called `names` on a device. images: with pillow, where there is a wheel of it.
    online: the device fetches them itself, and what it shall fetch is all that is chosen.

    Of each package the version that is installed here, else the newest with a wheel for that Python. Raises WheelError
    where there is none, DeviceError where the device lacks what it must have itself.
    """
    _check_device(device)
    system = dict(spec.system_packages) if spec is not None else {}
    check_system_packages(device, system)
    packages = _packages(names, spec, system)
    notes: list[str] = []
    if images and system:  # where wheels are not to be had
        notes.append(f"to run on image files, on {device.host}: sudo apt install python3-pil")
    elif images:
        packages.append((PILLOW, None))
    if online:
        asked = {package: _newest(package, exact) for package, exact in packages}
        versions = {name: asked[_runtime(name, spec)] for name in names}
        return Chosen((), versions, system, tuple(sorted(asked.values())), tuple(notes))
    found: dict[str, Wheel] = {}
    for package, exact in packages:
        progress(f"fetch {package} for Python {device.python} on {device.arch}", 0, 0)
        with _LOCK:
            wheel = _fetched(package, exact, device)
        found[package] = wheel
        here = _installed(package)
        if exact is None and here is not None and here != wheel.version:
            told = f"{package} {wheel.version} on {device.host}, {here} here"
            notes.append(f"{told}: that has no wheel for its Python {device.python}")
    return Chosen(
        wheels=tuple(found[name] for name in sorted(found)),
        versions={name: found[_runtime(name, spec)].told(backends.get(name).WHEELS[0]) for name in names},
        system_packages=system,
        notes=tuple(notes),
    )


def _runtime(backend: str, spec: DeviceSpec | None) -> str:
    """The package that the backend's runtime comes in, there."""
    told = spec.runtime(backend) if spec is not None else None
    return backends.get(backend).WHEELS[0] if told is None else told[0]


def _newest(package: str, exact: str | None) -> str:
    """What the device shall ask for: the version here, or the newest before it that has a wheel for its Python."""
    here = _installed(package)
    return f"{package}=={exact}" if exact else f"{package}<={here}" if here else package


def _packages(names: Sequence[str], spec: DeviceSpec | None, system: Mapping[str, str]) -> list[tuple[str, str | None]]:
    """(package, the version that the profile names or None), no package twice, none that the device has itself."""
    wanted: dict[str, str | None] = {}
    for name in names:
        runtime, *others = backends.get(name).WHEELS
        package, version = (spec.runtime(name) if spec is not None else None) or (runtime, None)
        wanted[package] = version
        for other in others:
            if MODULES.get(other, other) not in system:
                wanted.setdefault(other, None)
    return list(wanted.items())


# --- what a device must be -------------------------------------------------------------------------
def _check_device(device: DeviceFacts) -> None:
    if device.glibc is None:
        raise DeviceError(
            f"{device.host}: its C library is not glibc (musl, as in Alpine?), which the runtimes' wheels need",
            "use a system with glibc: Raspberry Pi OS, Debian, Ubuntu, Fedora",
        )


def check_system_packages(device: DeviceFacts, wanted: Mapping[str, str]) -> None:
    """Where the device was looked at, it must have what no wheel exists for."""
    for name, text in wanted.items():
        if name not in device.packages:
            continue
        have = device.packages[name]
        debian = {"PIL": "pil"}.get(name, name)
        remedy = f"on the device: sudo apt install python3-{debian}"
        if not have:
            raise DeviceError(f"{device.host}: its Python has no {name}, and there is no wheel of it", remedy)
        if not meets(have, text):
            raise DeviceError(f"{device.host}: its Python has {name} {have}, {text} is needed", remedy)


def numbers(version: Any) -> tuple[int, ...]:
    """(2, 28) of "2.28"; of three numbers at most."""
    return tuple(int(n) for n in re.findall(r"\d+", str(version))[:3])


def meets(version: str, text: str) -> bool:
    """Whether a version is in a range such as ">=1.23,<2"."""
    have = numbers(version)
    for part in text.split(","):
        bound = numbers(part)
        if part.startswith(">=") and have < bound:
            return False
        if part.startswith("<") and have >= bound:
            return False
    return True


def _installed(package: str) -> str | None:
    try:
        return installed(package)
    except PackageNotFoundError:
        return None


# --- the cache -------------------------------------------------------------------------------------
def cache() -> Path:
    """Where wheels are kept: edgekit/wheels in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "edgekit" / "wheels"


def _fetched(package: str, exact: str | None, device: DeviceFacts) -> Wheel:
    """From the cache, or by pip. exact: this version only; None: the one that is installed here, else the newest."""
    wanted = exact or _installed(package)
    key = artifact.digest_json([INDEX_SCHEMA, package, wanted, device.arch, device.python, device.glibc])
    known = _remembered(key)
    if known is not None:
        return known
    attempts = [f"{package}=={wanted}"] if wanted is not None else []
    if exact is None:
        attempts.append(package)
    said = ""
    with artifact.disk_errors(cache()):
        cache().mkdir(parents=True, exist_ok=True)
        for requirement in attempts:
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache()) as folder:
                said = _download(requirement, device, Path(folder))
                wheels = list(Path(folder).glob("*.whl"))
                if len(wheels) == 1:
                    return _kept(wheels[0], key)
            if _NETWORK.search(said):
                break
    raise _no_wheel(attempts, device, said)


def _remembered(key: str) -> Wheel | None:
    """The wheel that was chosen before, if its bytes are still what they were."""
    try:
        told = json.loads((cache() / "index" / f"{key}.json").read_text(encoding="utf-8"))
        wheel = _wheel(cache() / told["sha256"] / told["file"], told["sha256"])
        return wheel if artifact.digest_file(wheel.path) == wheel.sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kept(wheel: Path, key: str) -> Wheel:
    """Move a wheel into the cache, then note that it was chosen for `key`."""
    sha256 = artifact.digest_file(wheel)
    place = cache() / sha256 / wheel.name
    place.parent.mkdir(exist_ok=True)
    os.replace(wheel, place)
    index = cache() / "index"
    index.mkdir(exist_ok=True)
    artifact.write_text(index / f"{key}.json", json.dumps({"file": wheel.name, "sha256": sha256}) + "\n")
    return _wheel(place, sha256)


def _wheel(path: Path, sha256: str) -> Wheel:
    name, version = path.name.split("-")[:2]
    return Wheel(path, name.replace("_", "-").lower(), version, sha256, path.stat().st_size)


# --- pip -------------------------------------------------------------------------------------------
def platforms(arch: str, glibc: str) -> list[str]:
    """The platform tags whose wheels run there, newest first (PEP 600)."""
    major, minor = (*numbers(glibc), 0)[:2]
    if major != 2:
        return []
    tags = [f"manylinux_2_{n}_{arch}" for n in range(minor, _OLDEST_GLIBC - 1, -1)]
    return [*tags, *([f"manylinux2014_{arch}"] if minor >= _OLDEST_GLIBC else []), f"linux_{arch}"]


def _glibc_of(tag: str) -> tuple[int, int] | None:
    if tag.startswith("manylinux2014_"):
        return (2, 17)
    found = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    return (int(found[1]), int(found[2])) if found else None


def _for_device(arch: str, python: str, glibc: str) -> list[str]:
    """pip's options that say what the wheels are for."""
    abi = "cp" + python.replace(".", "")
    tags = [word for tag in platforms(arch, glibc) for word in ("--platform", tag)]
    options = ["--only-binary=:all:", "--no-deps", "--python-version", python, "--implementation", "cp"]
    return [*options, "--abi", abi, "--abi", "abi3", "--abi", "none", *tags]


def _download(requirement: str, device: DeviceFacts, folder: Path) -> str:
    """Into `folder`, if pip finds one; returns what pip said."""
    options = _for_device(device.arch, device.python, device.glibc or "")
    return _pip("download", "--no-cache-dir", "--dest", str(folder), *options, requirement)


def _pip(*words: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pip",
        words[0],
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        *words[1:],
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"ConnectionError: pip did not end within {_PIP_TIMEOUT_S:.0f} s"
    said = done.stderr.decode(errors="replace")
    if "No module named pip" in said:
        raise WheelError("this Python has no pip to fetch wheels with", f"run {sys.executable} -m ensurepip")
    return said


def _no_wheel(attempts: Sequence[str], device: DeviceFacts, said: str) -> WheelError:
    """Why there is none, and what would do."""
    asked = attempts[0].replace("==", " ")
    lines = [line.removeprefix("ERROR: ").strip() for line in said.splitlines() if line.startswith("ERROR: ")]
    if _NETWORK.search(said):
        return WheelError(
            f"{asked} could not be fetched: {(lines or ['no connection'])[-1]}",
            "check the network and pip's configuration, or deploy with --online where the device has a network",
        )
    under = f" (32-bit on a {device.machine} kernel)" if device.arch != device.machine else ""
    what = f"{asked} has no wheel for Python {device.python} on {device.arch}{under} with glibc {device.glibc}"
    latest = attempts[-1]
    if _exists(latest, device.arch, device.python, f"2.{_NEWEST_GLIBC}"):
        return WheelError(f"{what}: they need a newer glibc", "upgrade the device's system")
    with ThreadPoolExecutor() as pool:
        known = pool.map(lambda python: _exists(latest, device.arch, python, device.glibc or ""), _PYTHONS)
        pythons = [python for python, there in zip(_PYTHONS, known, strict=True) if there]
    if pythons:
        return WheelError(
            what, f"there are wheels for Python {', '.join(pythons)}: install one there, and give --python"
        )
    return WheelError(what, _SYSTEMS.get(device.arch, "leave this runtime out with --candidate"))


def _exists(requirement: str, arch: str, python: str, glibc: str) -> bool:
    """Whether pip knows a wheel; nothing is downloaded where the index tells enough."""
    with _scratch() as folder:
        report = folder / "report.json"
        options = ["--dry-run", "--ignore-installed", "--target", str(folder / "none"), "--report", str(report)]
        _pip("install", *options, *_for_device(arch, python, glibc), requirement)
        return report.is_file()


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="edgekit-wheels-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
