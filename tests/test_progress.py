"""Ctrl-C during a long command, and in the hands of libraries."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from edgekit.report.progress import progress_bar


def swallowed() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


def command(*, steps: int) -> list[int]:
    """The steps that were begun; Ctrl-C comes in the first."""
    begun: list[int] = []
    with contextlib.suppress(KeyboardInterrupt), progress_bar(enabled=True) as progress:
        for step in range(steps):
            progress(str(step), 0, 0)
            begun.append(step)
            if step == 0:
                swallowed()
        begun.append(-1)
    return begun


def test_an_interrupt_that_a_library_swallows_is_heeded_at_the_next_step() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert command(steps=3) == [0]
    assert signal.getsignal(signal.SIGINT) is before


def test_one_in_the_last_step_is_heeded_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt):
        _one_step()


def _one_step() -> None:
    with progress_bar(enabled=True):
        swallowed()


def test_other_threads_may_show_progress(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with progress_bar(enabled=True) as progress:
            progress("there", 0, 0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "there" in capsys.readouterr().err
