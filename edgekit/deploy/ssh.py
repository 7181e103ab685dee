"""A device through the system's ssh: its configuration, agent, known_hosts and ProxyJump hold as they are.

Every call is one ssh command that brings the agent along on its standard input (`on_device/agent.py`): nothing has to
be installed on the device before. One connection is shared by all of them (ControlMaster) where the system can.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, Self, cast

from edgekit.errors import (
    BundleError,
    BusyDeviceError,
    DeviceDiskError,
    DeviceError,
    EdgekitError,
    HostError,
    HostKeyError,
    LoginError,
    MissingExtraError,
    SelfTestError,
    SignatureError,
    UsageError,
)
from edgekit.report.progress import Progress, silent

MIN_PYTHON = (3, 9)  # what the travelling files are written for; Debian 11
CONNECT_S = 20
_ALIVE_S, _ALIVE_COUNT = 15, 4  # a connection that says nothing for a minute is dead
_SILENT_S = 1200.0  # a self-test on a slow device says nothing for minutes
_LONGEST_SOCKET = 90  # bytes of a control path; sockets allow 104 on some systems, and ssh adds a few
# Runs the modules that come on standard input, a JSON line of [name, bytes] first; the last one serves.
_BOOTSTRAP = """import sys,json,types
v=sys.version_info
if v<{least}:
    print(json.dumps({{"ok":False,"kind":"python","error":"the device's Python is %d.%d"%v[:2]}}))
    sys.exit(1)
s=sys.stdin.buffer
for n,k in json.loads(s.readline().decode()):
    m=types.ModuleType(n)
    sys.modules[n]=m
    exec(compile(s.read(k),n+".py","exec"),m.__dict__)
sys.exit(m.serve(s))"""
_KINDS: Mapping[str, type[EdgekitError]] = {
    "bundle": BundleError,
    "busy": BusyDeviceError,
    "connection": HostError,
    "disk": DeviceDiskError,
    "selftest": SelfTestError,
    "signature": SignatureError,
}


class Host:
    """One device. A context manager; used from one thread at a time.

    name: what ssh calls it: user@name, or a Host of its configuration. config: an ssh configuration file instead of the
    user's. folder: where things go on the device, instead of ~/.local/share/edgekit. python: the command there.
    trips: ssh commands so far.
    """

    def __init__(
        self, name: str, *, config: Path | None = None, folder: str | None = None, python: str = "python3"
    ) -> None:
        if not name or name.startswith("-") or any(c.isspace() for c in name):
            raise UsageError(f"--host '{name}'", "give user@name, or a Host of your ssh configuration")
        if config is not None and not config.is_file():
            raise UsageError(f"--ssh-config {config}: no such file", "give an ssh configuration file")
        self.name, self.folder, self.python = name, folder, python
        self.trips = 0
        self._config = config
        self._socket = self._sockets()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the shared connection."""
        if self._socket is None:
            return
        if (self._socket / "s").exists():
            command = [*self._options(), "-O", "exit", "--", self.name]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    timeout=CONNECT_S, check=False,
                )  # fmt: skip
        shutil.rmtree(self._socket, ignore_errors=True)
        self._socket = None

    def command(self, remote: str) -> list[str]:
        """The local command line that runs `remote` in the device's shell."""
        self.trips += 1
        return [*self._options(), "--", self.name, remote]

    def call(
        self, request: Mapping[str, Any], payload: Iterable[bytes] = (), progress: Progress = silent
    ) -> dict[str, Any]:
        """One request to the agent; what follows it as `payload` is streamed. Returns its reply.

        Raises what the agent refuses as the error of its kind, and HostError, HostKeyError or LoginError where the
        device is not reached.
        """
        told = dict(request) if self.folder is None else {**request, "folder": self.folder}
        command = self.command(f"exec {shlex.quote(self.python)} -I -c {shlex.quote(bootstrap())}")
        with tempfile.TemporaryFile() as stderr:
            process = _started(command, stderr)
            replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
            threading.Thread(target=_listen, args=(cast(IO[bytes], process.stdout), replies), daemon=True).start()
            try:
                _feed(process, [*_sources(), json.dumps(told).encode() + b"\n"], payload, replies, progress)
                reply = self._reply(replies, progress)
                code = process.wait(timeout=_ALIVE_S * _ALIVE_COUNT)
            except subprocess.TimeoutExpired:
                code = 0
            finally:
                _end(process)
            if reply is None:
                raise self._broken(code, _tail(stderr))
        if not reply.get("ok"):
            raise self._refused(reply)
        return reply

    def _reply(self, replies: queue.SimpleQueue[dict[str, Any] | None], progress: Progress) -> dict[str, Any] | None:
        """The last message, or None where the connection ended before it."""
        while True:
            try:
                message = replies.get(timeout=_SILENT_S)
            except queue.Empty:
                raise HostError(f"{self.name} says nothing for {_SILENT_S:.0f} s", "try again") from None
            if message is None or "ok" in message:
                return message
            _tell(message, progress)

    def _options(self) -> list[str]:
        ssh = shutil.which("ssh")
        if ssh is None:
            raise MissingExtraError("there is no ssh on this machine", "install OpenSSH's client")
        out = [ssh, "-T", *(["-F", str(self._config)] if self._config else [])]
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",  # a key is never accepted here, whatever the configuration says
            "ConnectTimeout": str(CONNECT_S),
            "ServerAliveInterval": str(_ALIVE_S),
            "ServerAliveCountMax": str(_ALIVE_COUNT),
        }
        if self._socket is not None:
            options |= {"ControlMaster": "auto", "ControlPath": str(self._socket / "s"), "ControlPersist": "60"}
        for name, value in options.items():
            out += ["-o", f"{name}={value}"]
        return out

    @staticmethod
    def _sockets() -> Path | None:
        """A private folder for the shared connection's socket; None where the system has none."""
        if os.name != "posix":
            return None
        folder = Path(tempfile.mkdtemp(prefix="edgekit-"))
        if len(os.fsencode(folder)) > _LONGEST_SOCKET:
            folder.rmdir()
            return None
        return folder

    def _refused(self, reply: Mapping[str, Any]) -> EdgekitError:
        what, remedy = f"{self.name}: {reply.get('error')}", str(reply.get("remedy") or "")
        if reply.get("kind") == "python":
            what += f", {'.'.join(map(str, MIN_PYTHON))} is needed"
            remedy = "name another with --python, or upgrade the device's system"
        return _KINDS.get(str(reply.get("kind")), DeviceError)(what, remedy)

    def _broken(self, code: int, said: str) -> EdgekitError:
        """Why there was no reply: ssh's own failure, no Python, or a connection that broke."""
        if code == 127 or (re.search(r"not found|No such file", said) and self.python in said):
            return DeviceError(
                f"{self.name}: there is no '{self.python}' on the device", "install Python 3, or name it with --python"
            )
        if code in (1, 2):  # it would have answered
            last = ([line.strip() for line in said.splitlines() if line.strip()] or [f"status {code}"])[-1]
            least = ".".join(map(str, MIN_PYTHON))
            return DeviceError(
                f"{self.name}: its '{self.python}' does not run edgekit's agent ({last[:200]})",
                f"Python {least} or later is needed: name it with --python",
            )
        return unreachable(self.name, said)


def bootstrap() -> str:
    return _BOOTSTRAP.format(least=MIN_PYTHON)


def unreachable(name: str, said: str) -> EdgekitError:
    """What ssh wrote, as one of our errors."""
    text = said.strip()
    last = text.splitlines()[-1].strip() if text else "it ended without a word"
    host = name.rpartition("@")[2]
    if "HOST IDENTIFICATION HAS CHANGED" in text:
        return HostKeyError(
            f"{name}: its host key is not the one that is known",
            f"if you set it up anew: ssh-keygen -R {host}, then connect once by hand; else somebody may be in between",
        )
    if "Host key verification failed" in text or re.search(r"No \S+ host key is known", text):
        return HostKeyError(
            f"{name}: its host key is not known", f"connect once by hand and compare the fingerprint: ssh {name}"
        )
    if re.search(r"Permission denied|Too many authentication failures", text):
        return LoginError(f"{name}: it does not let you in with your keys", f"ssh-copy-id {name}, or start your agent")
    if "Could not resolve hostname" in text:
        return HostError(f"{name}: no host of that name", "check the name, or give its address")
    if "Connection refused" in text:
        return HostError(f"{name}: no ssh server answers there", "start it on the device: sudo systemctl start ssh")
    if re.search(r"timed out|No route to host|unreachable|Host is down", text):
        return HostError(f"{name}: it cannot be reached ({last})", "is it on, and in the same network?")
    if re.search(r"Bad configuration option|bad configuration|Bad owner or permissions", text):
        return UsageError(f"ssh does not take its configuration: {last}", "mend it")
    return HostError(f"{name}: the connection broke ({last})", "nothing was changed; run it again")


def _sources() -> list[bytes]:
    """The modules that travel: their names and sizes in a line, then their texts."""
    package = files("edgekit")
    modules = {
        "edgekit_machine": package / "bench" / "machine.py",
        "edgekit_agent": package / "deploy" / "on_device" / "agent.py",
    }
    texts = {name: file.read_bytes() for name, file in modules.items()}
    return [json.dumps([[n, len(t)] for n, t in texts.items()]).encode() + b"\n", *texts.values()]


def _started(command: Sequence[str], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    # Standard error is a file: the connection that is kept open would hold a pipe open with it.
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)
    except OSError as error:
        raise HostError(f"cannot start ssh: {error}", "install OpenSSH's client") from error


def _listen(source: IO[bytes], replies: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Every line of JSON; what a login shell prints besides is passed over. None at the end."""
    with contextlib.suppress(OSError, ValueError):
        for line in source:
            if line.startswith(b"{"):
                with contextlib.suppress(ValueError):
                    replies.put(json.loads(line))
    replies.put(None)


def _feed(
    process: subprocess.Popen[bytes],
    head: Iterable[bytes],
    payload: Iterable[bytes],
    replies: queue.SimpleQueue[dict[str, Any] | None],
    progress: Progress,
) -> None:
    """Write everything; a device that has heard enough closes, and its reply says why."""
    stdin = cast(IO[bytes], process.stdin)
    waiting: list[dict[str, Any] | None] = []
    with contextlib.suppress(OSError):
        for part in (head, payload):
            for block in part:
                stdin.write(block)
                while not replies.empty():
                    message = replies.get()
                    if message is None or "ok" in message:
                        waiting.append(message)
                    else:
                        _tell(message, progress)
        stdin.flush()
    with contextlib.suppress(OSError):
        stdin.close()
    for message in waiting:
        replies.put(message)


def _tell(message: Mapping[str, Any], progress: Progress) -> None:
    if "progress" in message:
        stage, done, total = message["progress"]
        progress(stage, done, total)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Our own child; the agent sees its input end and clears up."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        if process.poll() is None:
            process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _tail(stderr: IO[bytes]) -> str:
    end = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, end - 8192))
    return stderr.read().decode(errors="replace")
