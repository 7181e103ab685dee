"""The host's end of a measuring worker: start it, command it, end it."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Self, cast

import numpy as np

from edgekit.bench.worker import WIRE_SCHEMA, Wire
from edgekit.errors import WorkerError
from edgekit.model import Tensors

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
WORKER_FILE = Path(__file__).with_name("worker.py")
_EXIT_GRACE_S = 5.0
_SLACK_S = 300.0  # over the time a command was asked to take: a first call may compile, a device may be slow


@dataclass(frozen=True)
class Loaded:
    """import_s: seconds to import the runtime; load_s: to read and compile the model; version: the runtime's."""

    import_s: float
    load_s: float
    version: str


def local_command(runner: Path, folder: Path, threads: int, batch: int = 0, profile: bool = False) -> list[str]:
    """The command line of a worker on this machine. batch: 0 keeps the model's own."""
    command = [sys.executable, str(WORKER_FILE), "--runner", str(runner.resolve()), "--folder", str(folder.resolve())]
    command += ["--threads", str(threads), "--batch", str(batch)]
    return [*command, "--profile"] if profile else command


def thread_environment(threads: int) -> dict[str, str]:
    """This process's environment with the thread counts that libraries read at start."""
    return {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}


class Worker:
    """A worker process; use as a context manager. One request at a time, from one thread.

    command: the worker's command line, here or through ssh. label: what errors call it. ended(status, last line it
    wrote) says how it ended where that is not the worker's doing, else None.
    Every method raises WorkerError when the worker reports a failure, dies, or is silent for `timeout_s`.
    """

    def __init__(
        self,
        command: Sequence[str],
        label: str,
        *,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
        ended: Callable[[int | None, str], str | None] = lambda status, said: None,
    ) -> None:
        self.label = label
        self._command = list(command)
        self._env = None if env is None else dict(env)
        self._timeout_s = timeout_s
        self._ended = ended
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: queue.SimpleQueue[tuple[dict[str, Any], Tensors] | BaseException | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=self._env
            )
        except OSError as error:
            self._stderr.close()
            raise WorkerError(f"{self.label}: cannot start {self._command[0]}: {error}", "check the path") from error
        self._wire = Wire(cast(BinaryIO, self._process.stdout), cast(BinaryIO, self._process.stdin))
        threading.Thread(target=self._listen, args=(self._wire,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(gently=kind is None)

    @property
    def running(self) -> bool:
        """Whether it can be commanded: started, and not found dead or silent since."""
        return self._process is not None

    def load(self) -> Loaded:
        """Import the runtime and open the artifact."""
        reply, _ = self._request("load")
        if reply.get("schema") != WIRE_SCHEMA:
            raise WorkerError(f"{self.label}: the worker speaks schema {reply.get('schema')}", "bundle it again")
        return Loaded(reply["import_s"], reply["load_s"], reply["version"])

    def first(self, inputs: Tensors) -> tuple[float, Tensors]:
        """(seconds of the first inference, its outputs); binds `inputs` for warmup and round."""
        reply, outputs = self._request("first", inputs)
        return float(reply["first_inference_s"]), outputs

    def infer(self, inputs: Tensors) -> Tensors:
        """Outputs by name for one batch."""
        return self._request("infer", inputs)[1]

    def warmup(self, runs: int, seconds: float, limit_s: float) -> tuple[int, float]:
        """Run at least `runs` and `seconds`, not past `limit_s`; returns what was run: (runs, seconds)."""
        reply, _ = self._request("warmup", runs=runs, seconds=seconds, limit_s=limit_s, expect_s=limit_s)
        return int(reply["runs"]), float(reply["seconds"])

    def round(self, seconds: float, runs: int, settle_s: float) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Nanoseconds of each run in one round, int64 (n,): n >= 1, ends after `seconds` or `runs`."""
        _, tensors = self._request(
            "round", budget_ns=int(seconds * 1e9), runs=runs, settle_ns=int(settle_s * 1e9), expect_s=seconds
        )
        return tensors["ns"]

    def layers(self) -> list[dict[str, Any]]:
        """[{name, op, seconds, calls}] of a worker started with profile."""
        return list(self._request("layers")[0]["layers"])

    def peak_rss_bytes(self) -> int | None:
        value = self._request("rss")[0]["peak_rss_bytes"]
        return None if value is None else int(value)

    def _request(
        self, command: str, tensors: Tensors | None = None, *, expect_s: float = 0.0, **fields: float
    ) -> tuple[dict[str, Any], Tensors]:
        if self._process is None:
            raise WorkerError(f"{self.label}: the worker is not running", "start it with `with`")
        try:
            self._wire.send({"cmd": command, **fields}, tensors)
        except OSError:
            raise self._died(command) from None
        timeout = max(self._timeout_s, 0.0) + (expect_s + _SLACK_S if expect_s else 0.0)
        try:
            answer = self._replies.get(timeout=timeout)
        except queue.Empty:
            self._close(gently=False)
            raise WorkerError(
                f"{self.label}: no answer to '{command}' in {timeout:.0f} s; ended", "try a smaller model or batch"
            ) from None
        if answer is None or isinstance(answer, BaseException):
            raise self._died(command)
        reply, outputs = answer
        if not reply.get("ok"):
            raise WorkerError(
                f"{self.label}: {command} failed: {reply.get('error')}", "convert it again, or leave it out"
            )
        return reply, outputs

    def _listen(self, wire: Wire) -> None:
        """Runs in a thread, so that waiting can end: a pipe has no timeout on every system."""
        try:
            while (message := wire.receive()) is not None:
                self._replies.put(message)
            self._replies.put(None)
        except Exception as error:  # a torn message, or the pipe closed under us
            self._replies.put(error)

    def _died(self, command: str) -> WorkerError:
        """What is known of a worker that is gone: its status and the last line it wrote."""
        process = self._process
        code: int | None = None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=_EXIT_GRACE_S)
        last = self._last_line()
        self._close(gently=False)
        foreign = self._ended(code, last)
        if foreign is not None:
            return WorkerError(f"{self.label}: {foreign}", "run it again")
        how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
        said = f": {last}" if last else ""
        return WorkerError(f"{self.label}: the worker died in '{command}' with {how}{said}", "run `edgekit doctor`")

    def _last_line(self) -> str:
        if self._stderr.closed:
            return ""
        end = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, end - 4096))
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:400] if lines else ""

    def _close(self, gently: bool) -> None:
        """End the process (our own child only) and wait for it; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        if gently:
            with contextlib.suppress(OSError):
                self._wire.send({"cmd": "exit"})
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_EXIT_GRACE_S)
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._stderr.close()
