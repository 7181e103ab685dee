"""Progress on standard error: a bar in a terminal, one plain line per stage elsewhere."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

Progress = Callable[[str, float, float], None]
"""(stage, done, total); total 0 means unknown. Called often; must be cheap.

A stage "HOST: what" belongs to one of several that are at work at the same time.
"""

_PLAIN_EVERY_S = 10.0


def silent(stage: str, done: float, total: float) -> None:
    """The progress of whoever does not want any."""


@contextlib.contextmanager
def progress_bar(*, enabled: bool) -> Iterator[Progress]:
    """A progress callback for the duration of a command."""
    if not enabled:
        yield silent
        return
    with _heeded() as heed, _rich_bar() if sys.stderr.isatty() else contextlib.nullcontext(_plain_lines()) as bar:

        def show(stage: str, done: float, total: float) -> None:
            heed()
            bar(stage, done, total)

        yield show
        heed()


@contextlib.contextmanager
def _heeded() -> Iterator[Callable[[], None]]:
    """A call that raises KeyboardInterrupt again if Ctrl-C came and a library swallowed it, as bare excepts do."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def heed() -> None:
        if came:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield heed
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _rich_bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        running: dict[str, tuple[str, TaskID]] = {}  # of each host its stage; "" for who is alone

        def show(stage: str, done: float, total: float) -> None:
            who, _, what = stage.rpartition(": ")
            if running.get(who, ("",))[0] != what:
                for other in [w for w in running if w == who or not (w and who)]:
                    bar.remove_task(running.pop(other)[1])
                running[who] = what, bar.add_task(stage, total=total or None)
            bar.update(running[who][1], completed=done, total=total or None)

        yield show


def _plain_lines() -> Progress:
    told: dict[str, tuple[str, float]] = {}  # of each host its stage and when that was told; "" for who is alone

    def show(stage: str, done: float, total: float) -> None:
        now = time.monotonic()
        who, _, what = stage.rpartition(": ")
        last, when = told.get(who, ("", 0.0))
        if what == last and now - when < _PLAIN_EVERY_S:
            return
        share = f" {100 * done / total:.0f}%" if total and done else ""
        print(f"{stage}{share}", file=sys.stderr, flush=True)
        told[who] = what, now

    return show
