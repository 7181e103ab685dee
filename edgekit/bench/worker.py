"""Measures one artifact in a process of its own, on any host, commanded over stdin and stdout.

Standard library, numpy and the runner only: this file and a runner are all that a device needs.

    python worker.py --runner RUNNER.py --folder ARTIFACT --threads N [--batch B] [--profile]

Wire, both ways: one line of JSON, then the raw bytes of each tensor that its "tensors" list names as
[name, numpy dtype string, shape], C order. A request has "cmd"; a reply has "ok": true, or "ok": false and "error": one
line. Whatever the runtime prints to its standard output goes to standard error, so it cannot corrupt the wire.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import signal
import sys
import time
from typing import Any, BinaryIO

WIRE_SCHEMA = 1  # 1: first
_HEADER_LIMIT = 1 << 24  # bytes of one line; a longer one is not ours


class Wire:
    """One end of the connection: messages are (JSON object, {name: array}).

    What a login shell prints before the first message is passed over.
    """

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink
        self._begun = False

    def receive(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The next message, or None when the other side has closed."""
        import numpy as np

        line = self._source.readline(_HEADER_LIMIT)
        while line and not self._begun and not line.startswith(b"{"):
            line = self._source.readline(_HEADER_LIMIT)
        if not line:
            return None
        self._begun = True
        header: dict[str, Any] = json.loads(line)
        tensors = {}
        for name, dtype_text, shape in header.pop("tensors", ()):
            dtype = np.dtype(dtype_text)
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            data = bytearray(size)
            view, filled = memoryview(data), 0
            while filled < size:
                got = self._source.readinto(view[filled:])  # type: ignore[attr-defined]
                if not got:
                    raise EOFError("the connection closed inside a tensor")
                filled += got
            tensors[name] = np.frombuffer(data, dtype).reshape(shape)
        return header, tensors

    def send(self, header: dict[str, Any], tensors: dict[str, Any] | None = None) -> None:
        import numpy as np

        listed, blocks = [], []
        for name, value in (tensors or {}).items():
            array = np.asarray(value, order="C")
            if array.dtype.kind not in "biuf":  # bfloat16 and its like have no portable numpy name
                array = np.ascontiguousarray(array.astype(np.float32))
            listed.append([name, array.dtype.str, list(array.shape)])
            blocks.append(array)
        if listed:
            header = {**header, "tensors": listed}
        self._sink.write(json.dumps(header, separators=(",", ":")).encode() + b"\n")
        for array in blocks:
            self._sink.write(array.tobytes())
        self._sink.flush()


class Commands:
    """Every command is a method `do_<name>(header, tensors) -> (reply, tensors)`."""

    def __init__(self, runner: str, folder: str, threads: int, batch: int, profile: bool) -> None:
        self._runner_path = runner
        self._options = (folder, threads, batch, profile)
        self._session: Any = None
        self._call: Any = None

    def do_load(self, header: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """import_s: importing the runtime; load_s: reading and compiling the model."""
        start = time.perf_counter_ns()
        runner = _load_file("edgekit_runner", self._runner_path)
        imported = time.perf_counter_ns()
        self._session = runner.open_session(*self._options)
        loaded = time.perf_counter_ns()
        reply = {"import_s": (imported - start) * 1e-9, "load_s": (loaded - imported) * 1e-9}
        return {**reply, "version": str(runner.version()), "schema": WIRE_SCHEMA}, {}

    def do_first(self, header: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first inference, timed alone; its inputs are bound for the rounds that follow."""
        start = time.perf_counter_ns()
        outputs = self._opened().run(tensors)
        first_s = (time.perf_counter_ns() - start) * 1e-9
        self._call = self._session.bind(tensors)
        return {"first_inference_s": first_s}, outputs

    def do_infer(self, header: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, self._opened().run(tensors)

    def do_warmup(self, header: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """At least `runs` and `seconds`, but no longer than `limit_s`."""
        runs, seconds, limit = header["runs"], header["seconds"], header["limit_s"]
        call, done, start = self._bound(), 0, time.perf_counter()
        while True:
            call()
            done += 1
            elapsed = time.perf_counter() - start
            if (done >= runs and elapsed >= seconds) or elapsed >= limit:
                return {"runs": done, "seconds": elapsed}, {}

    def do_round(self, header: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Time single runs for `seconds`, at most `runs`, at least one; `settle_s` of runs before it are not recorded.

        Returns the tensor "ns": int64 (n,), one duration a run.
        """
        import numpy as np

        call, clock = self._bound(), time.perf_counter_ns
        settle, budget, runs = (int(header[k]) for k in ("settle_ns", "budget_ns", "runs"))
        durations: list[int] = []
        note = durations.append
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            end = clock() + settle
            while clock() < end:  # the caches still hold another worker's data
                call()
            end = clock() + budget
            while True:
                start = clock()
                call()
                stop = clock()
                note(stop - start)
                if stop >= end or len(durations) >= runs:
                    break
        finally:
            if collecting:
                gc.enable()
        return {}, {"ns": np.array(durations, np.int64)}

    def do_layers(self, header: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"layers": self._opened().layers()}, {}

    def do_rss(self, header: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"peak_rss_bytes": peak_rss_bytes()}, {}

    def _opened(self) -> Any:
        if self._session is None:
            raise RuntimeError("the artifact is not loaded: send load first")
        return self._session

    def _bound(self) -> Any:
        if self._call is None:
            raise RuntimeError("no inputs to run on: send first before it")
        return self._call


def peak_rss_bytes() -> int | None:
    """The highest resident memory of this process so far, or None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # bytes on macOS, KiB elsewhere


def _load_file(name: str, path: str) -> Any:
    """Import a file by path, under a name that shadows no runtime's (a runner may be called onnxruntime.py)."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"'{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def one_line(error: BaseException) -> str:
    """'Kind: first line of the message that says something', shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO begins with where in its source it failed
    lines = [line for line in lines if not line.startswith(("Exception from", "Check "))] or lines
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."


def serve(wire: Wire, commands: Commands) -> int:
    """Answer until `exit` or until the other side closes; a command that fails is answered, not fatal."""
    while (message := wire.receive()) is not None:
        header, tensors = message
        command = str(header.get("cmd"))
        if command == "exit":
            wire.send({"ok": True})
            return 0
        try:
            method = getattr(commands, f"do_{command}", None)
            if method is None:
                raise ValueError(f"no command '{command}'")
            reply, arrays = method(header, tensors)
        except Exception as error:  # whatever a runtime throws is reported to the host
            wire.send({"ok": False, "error": one_line(error)})
            continue
        wire.send({"ok": True, **reply}, arrays)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="edgekit measuring worker")
    parser.add_argument("--runner", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    # The host decides when to stop: on Ctrl-C in a terminal it gets the signal too, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    here = os.path.dirname(os.path.abspath(__file__))
    # A script's folder leads sys.path: modules beside this file would shadow the standard library's (statistics).
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.curdir) != here]
    source, sink = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    with os.fdopen(source, "rb") as reader, os.fdopen(sink, "wb") as writer:
        commands = Commands(options.runner, options.folder, options.threads, options.batch, options.profile)
        return serve(Wire(reader, writer), commands)


if __name__ == "__main__":
    try:
        code = main()
    except (BrokenPipeError, EOFError):  # the host is gone
        code = 0
    sys.stderr.flush()
    # Runtimes' thread pools sometimes hang or crash while the interpreter is torn down; everything is sent by now.
    os._exit(code)
