"""Runs one command and says how long it took, and how much memory it and its children held at most."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.05  # how often memory is read; shorter peaks than this are missed
WALL = 5  # times the limit in CPU seconds: it waits, or hangs
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = resource.getpagesize()


@dataclass(frozen=True)
class Outcome:
    """error: "" if it worked. cpu_seconds, peak_rss_bytes: its children included."""

    error: str
    stdout: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def run(command: list[str], timeout_s: float, log: Path, folder: Path, env: dict[str, str] | None = None) -> Outcome:
    """In `folder`, where a tool may leave what it likes. Its output goes to `log`, its errors to the same with .err.

    timeout_s: CPU seconds, which a busy machine does not change; past it, or WALL times as long, all of it is killed.
    """
    out, err = log, log.with_suffix(".err")
    began, peak, late = time.perf_counter(), 0, False
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            env=env,
            start_new_session=True,
        )
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            tree = _tree(process.pid)
            peak = max(peak, sum(_rss(pid) for pid in tree))
            wall_s = time.perf_counter() - began
            if not late and (wall_s > WALL * timeout_s or sum(_cpu_seconds(pid) for pid in tree) > timeout_s):
                late = True
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(POLL_S)
    process.returncode = os.waitstatus_to_exitcode(status)  # it is reaped: Popen must not wait for it again
    seconds = time.perf_counter() - began
    told = out.read_text(encoding="utf-8", errors="replace")
    error = ""
    if late:
        error = f"timeout: stopped after {timeout_s:.0f} CPU seconds or {WALL * timeout_s:.0f} s"
    elif process.returncode:
        told_of = err.read_text(encoding="utf-8", errors="replace")
        error = _short(told_of.replace(f"{folder}/", ""), process.returncode)
    return Outcome(error, told, seconds, usage.ru_utime + usage.ru_stime, peak)


def _tree(root: int) -> list[int]:
    """`root` and all that it started, directly or not."""
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                children = Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="ascii")
                queue += [int(child) for child in children.split()]
    return found


def _rss(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0  # it has just ended


def _cpu_seconds(pid: int) -> float:
    """User and system time, those of ended children included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0  # it has just ended
    return sum(int(field) for field in fields[11:15]) / _TICK if len(fields) > 15 else 0.0


def _short(stderr: str, status: int) -> str:
    """The exception's own line, if there is one, else how the process ended."""
    if status < 0:
        return f"it dies with {signal.Signals(-status).name}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Fail|error)\b.*", line)]
    text = (raised or lines or [f"exit status {status}"])[-1]
    return re.sub(r"\s+", " ", text)[:160]
