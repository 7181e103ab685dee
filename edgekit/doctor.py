"""Says what is installed, what this CPU can do, what is missing, and the exact command that gets it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from edgekit import __version__, backends
from edgekit.bench import machine

DOCTOR_SCHEMA = 1  # 1: first

# extra -> what a user gets by it
_EXTRAS = {
    "keras": "read .keras, .h5 and SavedModel",
    "openvino": "OpenVINO candidates",
    "tflite": ".tflite candidates, LiteRT",
    "images": "image folders, --resize",
    "tables": ".parquet",
}
# Import names, where they are not the distribution's.
_MODULES = {"pillow": "PIL"}  # distribution -> module, where that is not the name with underscores
_CORE = ("click", "rich", "numpy", "onnx", "onnx-ir", "onnxruntime", "threadpoolctl")
_KERAS_PYTHON = "EDGEKIT_KERAS_PYTHON"
_PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Package:
    """ok: it can be found and is not older than edgekit asks for. version: None if it is not installed."""

    name: str
    extra: str
    version: str | None
    ok: bool
    purpose: str


def examine() -> dict[str, Any]:
    """JSON-ready: {"schema", "edgekit", "packages": [...], "checks": [{"name", "found", "ok"}], "machine": facts,
    "saturates": {backend: bool or null}, "advice": [{"why", "command"}]}."""
    keras = _keras_python()
    # what another interpreter serves is not missing here
    packages = [p for p in (*_core(), *_optional()) if p.ok or p.extra != "keras" or not (keras[1] and keras[2])]
    facts = machine.facts()
    saturation = _saturation()
    checks, advice = [], _install_advice(packages)
    for name, found, ok, remedy in (_python(), _config(), _scratch(), keras):
        if found:
            checks.append({"name": name, "found": found, "ok": ok})
        if not ok:
            advice.append({"why": f"{name}: {found}", "command": remedy})
    checks += _cpu_checks(facts, saturation)
    return {
        "schema": DOCTOR_SCHEMA,
        "edgekit": __version__,
        "packages": [asdict(p) for p in packages],
        "checks": checks,
        "machine": facts,
        "saturates": saturation,
        "advice": advice,
    }


def _core() -> list[Package]:
    return [_package(name, "", "core") for name in _CORE]


def _optional() -> list[Package]:
    """Every package of every extra, from edgekit's own metadata, so that no list can go stale."""
    found = []
    for extra, purpose in _EXTRAS.items():
        for name in _members(extra):
            if name not in _CORE:
                found.append(_package(name, extra, purpose))
    return found


def _requirements() -> list[str]:
    try:
        return requires("edgekit") or []
    except PackageNotFoundError:  # run from a source tree that is not installed
        return []


def _members(extra: str) -> list[str]:
    """Distribution names of an extra, in the order of pyproject.toml."""
    wanted = re.compile(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""")
    return [re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in _requirements() if wanted.search(text)]


def _floor(name: str) -> tuple[int, ...]:
    """The oldest version that edgekit accepts; () if it does not say."""
    for text in _requirements():
        match = re.match(rf"{re.escape(name)}(?![A-Za-z0-9._-])[^;]*>=\s*([0-9.]+)", text, flags=re.IGNORECASE)
        if match:
            return _numbers(match[1])
    return ()


def _numbers(text: str) -> tuple[int, ...]:
    """(2, 21, 0) of "2.21.0rc1"; pre-releases count as the release, which is enough for a floor."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _package(name: str, extra: str, purpose: str) -> Package:
    """Found by its module, so that onnxruntime-gpu or tensorflow-cpu count; the version is looked for in either."""
    if importlib.util.find_spec(_MODULES.get(name, name.replace("-", "_"))) is None:
        return Package(name, extra, None, False, purpose)
    known = None
    for candidate in (name, f"{name}-gpu", f"{name}-cpu"):
        try:
            metadata(candidate)
            known = version(candidate)
            break
        except PackageNotFoundError:
            continue
    old = known is not None and _numbers(known) < _floor(name)
    return Package(name, extra, known, not old, f"{purpose} (too old)" if old else purpose)


def _install_advice(packages: Iterable[Package]) -> list[dict[str, str]]:
    """One command per extra that is not complete, and one for a damaged core."""
    out = []
    lacking: dict[str, list[str]] = {}
    for package in packages:
        if not package.ok and not (package.extra == "keras" and os.environ.get(_KERAS_PYTHON)):
            lacking.setdefault(package.extra, []).append(package.name)
    for extra, names in lacking.items():
        why = f"to {_EXTRAS[extra]}" if extra == "keras" else f"for {_EXTRAS.get(extra, 'edgekit itself')}"
        out.append({"why": f"{why} ({', '.join(names)})", "command": pip_command(extra)})
    return out


def pip_command(extra: str) -> str:
    """Installs edgekit with an extra into the interpreter that runs it; from the source tree if it runs from one."""
    tree = Path(__file__).parent.parent
    wanted = f"[{extra}]" if extra else ""
    source = f"-e '{_relative(tree)}{wanted}'" if (tree / "pyproject.toml").is_file() else f"'edgekit{wanted}'"
    return f"{shlex.quote(_relative(Path(sys.executable)))} -m pip install {source}"


def _relative(path: Path) -> str:
    """As a person in this folder would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


Check = tuple[str, str, bool, str]  # name, what was found, is it fine, what to do if not


def _python() -> Check:
    found = f"{platform.python_version()} ({platform.machine()}, {platform.system()})"
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return "Python", found, ok, "make an environment with Python 3.11, 3.12 or 3.13"


def _config() -> Check:
    """The folder of a user's own profiles; it need not exist, but it must be possible to make it."""
    folder = Path.home() / ".config" / "edgekit" / "targets"
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    ok = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    found = f"{folder} ({'there' if folder.is_dir() else 'not made yet'}{'' if ok else ', cannot be written'})"
    return "own profiles", found, ok, "use --targets DIR, or make that folder writable"


def _scratch() -> Check:
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"\0")
        return "temporary files", tempfile.gettempdir(), True, ""
    except OSError as error:
        return (
            "temporary files",
            f"cannot be written: {error.strerror}",
            False,
            "set TMPDIR to a folder with free space",
        )


def _keras_python() -> Check:
    """Another interpreter that reads Keras files; empty when none is named."""
    path = os.environ.get(_KERAS_PYTHON)
    remedy = f"unset {_KERAS_PYTHON}, or point it to a Python with tensorflow, keras and tf2onnx"
    if not path:
        return _KERAS_PYTHON, "", True, ""
    script = "from importlib.metadata import version as v; print(*(v(n) for n in ('tensorflow', 'keras', 'tf2onnx')))"
    try:
        done = subprocess.run(
            [path, "-c", script], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _KERAS_PYTHON, f"{path}: {type(error).__name__}", False, remedy
    if done.returncode:
        return _KERAS_PYTHON, f"{path}: lacks tensorflow, keras or tf2onnx", False, remedy
    found = dict(zip(("tensorflow", "keras", "tf2onnx"), done.stdout.split(), strict=True))
    return _KERAS_PYTHON, f"{path}: " + ", ".join(f"{k} {v}" for k, v in found.items()), True, ""


def _saturation() -> dict[str, bool | None]:
    """Measured on this machine, per backend; None where the runtime is not installed or does not run."""
    found: dict[str, bool | None] = {}
    for name in backends.BACKENDS:
        backend = backends.get(name)
        found[name] = None
        if not backend.missing():
            # A runtime that is installed and broken is what a doctor is called for; its own errors share no base class.
            with contextlib.suppress(Exception):
                found[name] = backend.saturates()
    return found


def _cpu_checks(facts: dict[str, Any], saturation: dict[str, bool | None]) -> list[dict[str, Any]]:
    isa = " ".join(facts["isa"]) if facts["isa"] else "unknown"
    rows = [
        {"name": "CPU", "found": facts["cpu"] or "unknown", "ok": True},
        {"name": "instruction sets", "found": isa, "ok": True},
        {"name": "cores", "found": f"{facts['cores_allowed']} usable of {facts['cores_logical']}", "ok": True},
    ]
    if facts["emulated"]:
        rows.append({"name": "emulation", "found": f"{facts['emulated']}: times mean nothing here", "ok": False})
    for name, saturates in saturation.items():
        if saturates is None and not backends.get(name).missing():
            rows.append({"name": f"int8 in {name}", "found": f"the probe failed: is {name} broken?", "ok": False})
        elif saturates is not None:
            told = (
                "u8×s8 products saturate: weights get 7 bits"
                if saturates
                else "u8×s8 products are exact: 8-bit weights"
            )
            rows.append({"name": f"int8 in {name}", "found": told, "ok": True})
    return rows
