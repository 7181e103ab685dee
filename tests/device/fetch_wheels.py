"""Fetches the wheels that device tests install: python fetch_wheels.py FOLDER. Tests themselves use no network.

FOLDER: where prepare.py put its systems; the wheels go to FOLDER/cache, in the form of edgekit's own cache.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgekit.deploy import wheels
from edgekit.errors import EdgekitError
from edgekit.target import load_target

BOOKWORM, BULLSEYE = ("3.11", "2.36"), ("3.9", "2.31")  # Python and glibc of the systems that prepare.py makes
WANTED = (
    ("x86_64", "tflite", ("tflite",), BOOKWORM),
    ("x86_64", "cpu", ("onnxruntime",), BULLSEYE),
    ("aarch64", "linux-arm64", ("tflite", "onnxruntime"), BOOKWORM),
    ("armv7l", "linux-armv7", ("tflite",), BOOKWORM),
)


def main(folder: Path) -> int:
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    for arch, target, backends, (python, glibc) in WANTED:
        device = wheels.Described(arch, python, glibc, packages={"numpy": "1.24.2"})
        try:
            wheels.choose(backends, device, load_target(target).device, images=arch != "armv7l")
        except EdgekitError as error:
            print(f"no wheels for {arch}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
