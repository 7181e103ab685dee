"""Runs .tflite files in the interpreter's own runtime, tflite-runtime or TFLM; numpy and that runtime only.

    python tflite_runtime_child.py tflite-runtime|tflm FOLDER

For each FOLDER/NAME.tflite reads NAME.in.npz and writes NAME.out.npz, or NAME.error.txt with what the runtime said.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np


def by_tflite_runtime(data: bytes, feeds: dict[str, Any]) -> dict[str, Any]:
    from tflite_runtime.interpreter import Interpreter  # type: ignore[import-not-found]

    interpreter = Interpreter(model_content=data, num_threads=1)
    return dict(interpreter.get_signature_runner()(**feeds))


def by_tflm(data: bytes, feeds: dict[str, Any]) -> dict[str, Any]:
    """Inputs and outputs go by number."""
    from tflite_micro.python.tflite_micro import runtime  # type: ignore[import-not-found]

    interpreter = runtime.Interpreter.from_bytes(data, arena_size=4_000_000)
    for index, value in enumerate(feeds.values()):
        interpreter.set_input(value, index)
    interpreter.invoke()
    return {"0": interpreter.get_output(0)}


def main() -> None:
    run = {"tflite-runtime": by_tflite_runtime, "tflm": by_tflm}[sys.argv[1]]
    for file in sorted(Path(sys.argv[2]).glob("*.tflite")):
        name = file.stem
        with np.load(file.with_name(f"{name}.in.npz")) as stored:
            feeds = {key: stored[key] for key in stored.files}
        try:
            np.savez(file.with_name(f"{name}.out.npz"), **run(file.read_bytes(), feeds))
        except Exception as error:  # whatever the runtime throws is what the test is about
            file.with_name(f"{name}.error.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


if __name__ == "__main__":
    main()
