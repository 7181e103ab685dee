"""An environment of its own for each tool, made from a requirements file when it is first needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements")


class InstallError(Exception):
    """A tool's packages could not be installed; says what pip said last."""


def python_of(name: str, folder: Path, requirements: Path = REQUIREMENTS) -> str:
    """The interpreter of environment `name` below `folder`. "own": the one that runs this. Raises InstallError.

    requirements: the folder that has NAME.txt.
    """
    if name == "own":
        return sys.executable
    if name == "keras" and (given := os.environ.get("EDGEKIT_KERAS_PYTHON")):
        return given
    home, wanted = folder / name, requirements / f"{name}.txt"
    python, stamp = home / "bin" / "python", home / ".installed"
    if stamp.is_file() and stamp.read_bytes() == wanted.read_bytes():
        return str(python)
    print(f"installing {name} into {home}", flush=True)
    _run([sys.executable, "-m", "venv", str(home)])
    _run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(wanted)])
    stamp.write_bytes(wanted.read_bytes())
    return str(python)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"pip ends with {done.returncode}"]
        raise InstallError(next((line for line in reversed(lines) if "ERROR" in line), lines[-1])[:200])
