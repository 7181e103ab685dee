"""Whether an artifact can run on the device that it is for: its memory, and the operators of its runtime."""

from __future__ import annotations

from pathlib import Path

from edgekit.backends import Backend
from edgekit.errors import UnsupportedOpError
from edgekit.target import DeviceSpec, Target

MIB = 2**20


def check(target: Target, backend: Backend, folder: Path) -> None:
    """Raise UnsupportedOpError for an artifact in `folder` that no device of the target can run."""
    if target.device is None:
        return
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    memory = target.device.memory_bytes
    if memory is not None and size > memory:
        raise UnsupportedOpError(
            f"the weights alone are {size / MIB:.0f} MB, a {target.name} has {memory / MIB:.0f} MB of memory",
            "use int8, or a smaller model",
        )
    check_runtime(target.device, backend, folder)


def check_runtime(device: DeviceSpec, backend: Backend, folder: Path) -> None:
    """Raise UnsupportedOpError for an artifact that the runtime which the profile names cannot open."""
    told = device.runtime(backend.NAME)
    lacking = backend.lacks(folder, *told) if told is not None else []
    if told is not None and lacking:
        raise UnsupportedOpError(
            f"{' '.join(told)} lacks {', '.join(lacking)}",
            f"leave these operators in float with --keep-float, or use a system that runs {backend.WHEELS[0]}",
        )
