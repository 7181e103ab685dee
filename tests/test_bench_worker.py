"""The worker process: its wire, its errors, its end."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit.bench.client import WORKER_FILE, Worker, local_command, thread_environment
from edgekit.bench.worker import Wire, one_line
from edgekit.errors import WorkerError

RUNNER = Path(__file__).with_name("numpy_runner.py")
X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


def worker(folder: Path, timeout_s: float = 60.0, **behaviour: Any) -> Worker:
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    return Worker(local_command(RUNNER, folder, 1, 4), "numpy-float32", env=thread_environment(1), timeout_s=timeout_s)


def pid_of(w: Worker) -> int:
    assert w._process is not None
    return w._process.pid


def gone(pid: int | None) -> bool:
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@given(
    array=hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.uint8, np.int64, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    )
)
def test_the_wire_keeps_every_array(array: np.ndarray) -> None:
    stream = io.BytesIO()
    Wire(stream, stream).send({"cmd": "infer"}, {"a": array, "ü b": array[..., ::-1] if array.ndim else array})
    stream.seek(0)
    message = Wire(stream, stream).receive()
    assert message is not None
    header, tensors = message
    assert header == {"cmd": "infer"}
    assert tensors["a"].dtype == array.dtype
    np.testing.assert_array_equal(tensors["a"], array)
    np.testing.assert_array_equal(tensors["ü b"], array[..., ::-1] if array.ndim else array)


def test_a_torn_tensor_is_an_error_not_a_short_array() -> None:
    stream = io.BytesIO()
    Wire(stream, stream).send({}, X)
    with pytest.raises(EOFError):
        Wire(io.BytesIO(stream.getvalue()[:-3]), stream).receive()
    assert Wire(io.BytesIO(b""), stream).receive() is None


def test_a_whole_conversation(tmp_path: Path) -> None:
    with worker(tmp_path, scale=3.0) as w:
        loaded = w.load()
        assert loaded.version == "numpy " + np.__version__
        assert loaded.load_s > 0
        assert loaded.import_s > 0
        seconds, outputs = w.first(X)
        assert seconds > 0
        np.testing.assert_array_equal(outputs["x_out"], X["x"] * 3)
        runs, elapsed = w.warmup(7, 0.0, 5.0)
        assert runs >= 7
        assert elapsed > 0
        samples = w.round(60.0, 5, 0.0)
        assert samples.dtype == np.int64
        assert samples.shape == (5,)
        assert (samples > 0).all()
        assert len(w.round(0.0, 1000, 0.0)) == 1
        assert w.layers()[0]["calls"] == 1 + runs + 5 + 1
        peak = w.peak_rss_bytes()
        assert peak is None or peak > 1 << 20
        pid = pid_of(w)
    assert gone(pid)


def test_what_the_runtime_prints_does_not_reach_the_wire(tmp_path: Path) -> None:
    with worker(tmp_path, shout=True) as w:
        w.load()
        for _ in range(3):
            np.testing.assert_array_equal(w.infer(X)["x_out"], X["x"] * 2)


def test_large_tensors_do_not_block(tmp_path: Path) -> None:
    big = {"x": np.ones((64, 1 << 17), np.float32)}
    with worker(tmp_path) as w:
        w.load()
        np.testing.assert_array_equal(w.infer(big)["x_out"], big["x"] * 2)


@pytest.mark.parametrize(("fail", "step"), [("load", "load"), ("run", "infer")])
def test_a_failure_is_one_line_and_the_worker_lives(tmp_path: Path, fail: str, step: str) -> None:
    with worker(tmp_path, fail=fail) as w:
        if step == "infer":
            w.load()
        with pytest.raises(
            WorkerError, match=r"numpy-float32: .* failed: (RuntimeError: no such operator|ValueError)"
        ) as e:
            w.load() if step == "load" else w.infer(X)
        assert "\n" not in str(e.value)
        assert w.peak_rss_bytes() is None or True  # still answers


def test_commands_out_of_order_are_refused(tmp_path: Path) -> None:
    with worker(tmp_path) as w:
        with pytest.raises(WorkerError, match="send load first"):
            w.infer(X)
        w.load()
        with pytest.raises(WorkerError, match="send first"):
            w.round(0.1, 1, 0.0)


def test_a_crash_names_the_signal_and_the_last_line(tmp_path: Path) -> None:
    with worker(tmp_path, fail="die") as w:
        w.load()
        with pytest.raises(WorkerError, match=r"died in 'infer' with signal 6: fatal: kernel aborted"):
            w.infer(X)
        with pytest.raises(WorkerError, match="not running"):
            w.infer(X)


def test_a_hung_worker_is_ended(tmp_path: Path) -> None:
    with worker(tmp_path, timeout_s=2.0, fail="hang") as w:
        w.load()
        pid = pid_of(w)
        with pytest.raises(WorkerError, match="no answer to 'infer' in 2 s"):
            w.infer(X)
        assert gone(pid)


def test_a_missing_runner_says_so(tmp_path: Path) -> None:
    command = local_command(tmp_path / "none.py", tmp_path, 1)
    with Worker(command, "nothing") as w, pytest.raises(WorkerError, match="FileNotFoundError"):
        w.load()


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="cannot start"), Worker([str(tmp_path / "no-python")], "x"):
        pass


def test_an_exception_in_the_host_ends_the_worker(tmp_path: Path) -> None:
    pids = []

    def interrupted() -> None:
        with worker(tmp_path, fail="hang") as w:
            w.load()
            pids.append(pid_of(w))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(pids[0])


@pytest.mark.skipif(sys.platform == "win32", reason="signals of a terminal")
def test_the_worker_leaves_ctrl_c_to_the_host_and_ends_with_it(tmp_path: Path) -> None:
    (tmp_path / "behaviour.json").write_text("{}")
    process = subprocess.Popen(
        local_command(RUNNER, tmp_path, 1), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    wire = Wire(process.stdout, process.stdin)  # type: ignore[arg-type]
    wire.send({"cmd": "load"})
    assert wire.receive()[0]["ok"]  # type: ignore[index]
    process.send_signal(signal.SIGINT)
    wire.send({"cmd": "rss"})
    assert wire.receive()[0]["ok"]  # type: ignore[index]
    process.stdin.close()  # the host is gone
    assert process.wait(timeout=20) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stdout.close()
    process.stderr.close()


def test_the_workers_folder_shadows_no_module_of_the_standard_library(tmp_path: Path) -> None:
    """bench/ has a statistics.py; a runtime that imports the standard one must get that."""
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import statistics\nassert 'edgekit' not in statistics.__file__, statistics.__file__\n"
        + RUNNER.read_text(encoding="utf-8")
    )
    (tmp_path / "behaviour.json").write_text("{}")
    with Worker(local_command(runner, tmp_path, 1), "shadow") as w:
        w.load()


def test_the_worker_needs_nothing_of_edgekit(tmp_path: Path) -> None:
    """worker.py is copied to devices alone."""
    (tmp_path / "worker.py").write_bytes(WORKER_FILE.read_bytes())
    (tmp_path / "behaviour.json").write_text("{}")
    blocker = "import sys; sys.modules['edgekit'] = None; sys.argv.pop(0); import runpy; "
    blocker += "runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [str(tmp_path / "worker.py"), "--runner", str(RUNNER), "--folder", str(tmp_path), "--threads", "1"]
    with Worker([sys.executable, "-c", blocker, *words], "alone") as w:
        w.load()
        np.testing.assert_array_equal(w.infer(X)["x_out"], X["x"] * 2)


def test_the_garbage_collector_runs_between_rounds_only(tmp_path: Path) -> None:
    runner = tmp_path / "runner.py"
    runner.write_text(
        RUNNER.read_text(encoding="utf-8").replace(
            "    def layers(self):", "    def layers(self):\n        import gc\n        return [gc.isenabled()]\n"
        )
    )
    (tmp_path / "behaviour.json").write_text("{}")
    with Worker(local_command(runner, tmp_path, 1), "gc") as w:
        w.load()
        w.first(X)
        w.round(0.0, 3, 0.0)
        assert w.layers() == [True]


def test_long_messages_become_one_line() -> None:
    assert one_line(ValueError("\n  a  \nb")) == "ValueError: a"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == 400


def test_idle_workers_use_no_processor_time(tmp_path: Path) -> None:
    """Several wait while one is measured."""
    with worker(tmp_path) as w:
        w.load()
        w.first(X)
        w.round(0.05, 10**6, 0.0)
        status = Path(f"/proc/{pid_of(w)}/schedstat")
        if not status.exists():
            pytest.skip("no /proc/PID/schedstat here")
        time.sleep(0.05)
        before = status.read_text().split()[0]
        time.sleep(0.2)
        assert status.read_text().split()[0] == before  # it did not run at all


@pytest.mark.skipif(os.name != "posix", reason="a login shell")
def test_what_a_login_shell_prints_first_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "behaviour.json").write_text("{}")
    command = "echo 'Welcome to this machine'; echo; exec " + shlex.join(local_command(RUNNER, tmp_path, 1))
    x = np.arange(4, dtype=np.float32)
    with Worker(["sh", "-c", command], "chatty") as w:
        w.load()
        np.testing.assert_array_equal(w.infer({"a": x})["a_out"], 2 * x)


def test_who_started_it_may_know_how_it_ended() -> None:
    seen: list[tuple[int | None, str]] = []

    def ended(status: int | None, said: str) -> str | None:
        seen.append((status, said))
        return "the connection to pi@one was lost" if status == 255 else None

    for status, told in ((255, "t: the connection to pi@one was lost"), (3, "status 3: gone")):
        script = f"import sys; sys.stderr.write('gone\\n'); sys.exit({status})"
        with Worker([sys.executable, "-c", script], "t", ended=ended) as w, pytest.raises(WorkerError, match=told):
            w.load()
    assert seen == [(255, "gone"), (3, "gone")]
