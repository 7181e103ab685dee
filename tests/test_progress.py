"""Ctrl-C during a long command, and in the hands of libraries."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from edgekit.report.progress import progress_bar


def test_an_interrupt_that_a_library_swallows_is_heeded_at_the_next_step() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), progress_bar(enabled=True) as progress:
        progress("one", 0, 0)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        progress("two", 0, 0)
        pytest.fail("the next step went on")
    assert signal.getsignal(signal.SIGINT) is before


def test_one_in_the_last_step_is_heeded_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), progress_bar(enabled=True) as progress:
        progress("one", 0, 0)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()


def test_other_threads_may_show_progress(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with progress_bar(enabled=True) as progress:
            progress("there", 0, 0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "there" in capsys.readouterr().err
