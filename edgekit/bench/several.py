"""Does one thing for several hosts at the same time; one that fails does not stop the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from edgekit.errors import EdgekitError
from edgekit.report.progress import Progress

T = TypeVar("T")
_ENDING_S = 10.0  # after Ctrl-C, for a thread to end its workers; their connections end with this process anyway
_LOOK_S = 0.5  # how often to look whether a thread ended: waiting without end would hold Ctrl-C back on Windows


def each(
    names: Sequence[str], one: Callable[[str, Progress], T], progress: Progress
) -> tuple[dict[str, T], dict[str, EdgekitError]]:
    """(what `one` returned, why it failed), each by host in the order given.

    one(host, progress) runs in a thread of its own; its progress names the host. Raises the first host's error where
    all failed, anything but an EdgekitError at once, and passes on Ctrl-C after the threads have ended their workers.
    """
    names = list(dict.fromkeys(names))
    done: dict[str, T] = {}
    failed: dict[str, EdgekitError] = {}
    broken: list[BaseException] = []
    stop, lock = threading.Event(), threading.Lock()

    def work(name: str) -> None:
        def tell(stage: str, share: float, total: float) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            with lock:
                progress(f"{name}: {stage}", share, total)

        try:
            done[name] = one(name, tell)
        except EdgekitError as error:
            failed[name] = error
        except BaseException as error:  # a bug, or Ctrl-C: raised where the command runs
            broken.append(error)

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in names]
    try:
        for thread in threads:
            thread.start()
        while not broken and any(t.is_alive() for t in threads):
            for thread in threads:
                thread.join(_LOOK_S)
    finally:
        stop.set()
        for thread in threads:
            thread.join(_ENDING_S)
    if broken:
        raise broken[0]
    if not done and failed:
        raise failed[next(name for name in names if name in failed)]
    return {n: done[n] for n in names if n in done}, {n: failed[n] for n in names if n in failed}
