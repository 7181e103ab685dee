"""Looks at processes and ports of this machine. Linux only."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def children(process: int) -> Iterator[int]:
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            yield from (int(word) for word in task.read_text().split())


def descendants(process: int) -> Iterator[int]:
    for child in list(children(process)):
        yield from descendants(child)
        yield child


def program(process: int) -> str | None:
    """Of the program, also under QEMU; None when there is no such process any more."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return None
