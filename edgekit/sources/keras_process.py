"""The process in which Keras runs: a script in the Python that EDGEKIT_KERAS_PYTHON names, or in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from edgekit import errors
from edgekit.errors import EdgekitError, MissingExtraError, ModelFileError

PYTHON_VARIABLE = "EDGEKIT_KERAS_PYTHON"
_EXIT_GRACE_S = 10.0


class KerasProcess:
    """A process that runs `script` as a context manager; it ends with the block, whatever ends the block.

    It is spoken to in JSON lines. name: of the model, for errors.

    Its stderr goes to a log file, which is kept, and named in the error, only if the process fails unexpectedly.
    """

    def __init__(self, script: Path, name: str) -> None:
        self._script, self._name = script, name
        self._python = os.environ.get(PYTHON_VARIABLE) or sys.executable

    def __enter__(self) -> KerasProcess:
        self._log: IO[bytes] = tempfile.NamedTemporaryFile(prefix="edgekit-keras-", suffix=".log", delete=False)
        try:
            self._process = subprocess.Popen(
                [self._python, str(self._script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=_environment(),
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._close(keep=False)
            raise MissingExtraError(
                f"cannot start Python '{self._python}' for Keras: {error.strerror}",
                f"set {PYTHON_VARIABLE} to a Python that has TensorFlow, or: pip install 'edgekit[keras]'",
            ) from error
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what was still to be written has no reader any more
        self._close(keep=isinstance(error, Crashed))

    def _close(self, *, keep: bool) -> None:
        self._log.close()
        if not keep:
            Path(self._log.name).unlink(missing_ok=True)

    def say(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # it died: reading its answer tells how

    def until(
        self, key: str, progress: Callable[[str], None], hear: Callable[[Mapping[str, Any]], None] | None = None
    ) -> Any:
        """The value of the next answer that has `key`; raises what the process reports. hear: is shown every answer."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if hear is not None:
                hear(message)
            if "stage" in message:
                progress(message["stage"])
            if "error" in message:
                error = message["error"]
                raise as_error(error["kind"], error["what"], error["remedy"])
            if key in message:
                return message[key]
        raise self._crashed()

    def _crashed(self) -> Crashed:
        """The process ended without an answer."""
        try:
            code = self._process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        how = "did not answer" if code is None else f"died by signal {-code}" if code < 0 else f"ended with code {code}"
        lines = [t.strip() for t in Path(self._log.name).read_text("utf-8", "replace").splitlines() if t.strip()]
        last = f": {lines[-1][:200]}" if lines else ""
        return Crashed(f"Keras on '{self._name}' {how}{last}", f"its log is in {self._log.name}")


class Crashed(ModelFileError):
    """The worker failed in a way that nobody foresaw."""

    exit_code = ModelFileError.exit_code


def as_error(kind: str, what: str, remedy: str) -> EdgekitError:
    """The class of edgekit.errors that the worker named."""
    found = getattr(errors, kind)
    error: EdgekitError = found(what, remedy)
    return error


def _environment() -> dict[str, str]:
    """Quiet, on the CPU, with Keras 3 on TensorFlow; tf2onnx walks sets, so the hash seed decides what it writes."""
    given = {k: v for k, v in os.environ.items() if k not in ("TF_USE_LEGACY_KERAS", "PYTHONSTARTUP")}
    fixed = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "tensorflow"}
    return {**given, **fixed, "PYTHONHASHSEED": "0"}
