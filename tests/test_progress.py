"""Ctrl-C during a long command, and in the hands of libraries; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from edgekit.report.progress import progress_bar

SCRIPT = """
import contextlib, os, signal
from edgekit.report.progress import progress_bar

before = signal.getsignal(signal.SIGINT)
begun = []
try:
    with progress_bar(enabled=True) as progress:
        for step in range({steps}):
            progress(str(step), 0, 0)
            begun.append(step)
            with contextlib.suppress(KeyboardInterrupt):  # as a library with a bare except does
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
    begun.append("end")
except KeyboardInterrupt:
    begun.append("interrupted")
print(*begun, signal.getsignal(signal.SIGINT) is before)
"""


@pytest.mark.parametrize("steps", [1, 3])
def test_an_interrupt_that_a_library_swallows_is_heeded(steps: int) -> None:
    """At the next step; at the end, if it was the last."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(steps=steps)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["0", "interrupted", "True"], done.stderr


def test_other_threads_may_show_progress(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with progress_bar(enabled=True) as progress:
            progress("there", 0, 0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "there" in capsys.readouterr().err
