"""The devices that other tests deploy to are what they claim to be, and break the way a real one does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.bench import machine
from tests.device.devices import Device, RealPi

MAKE = Callable[..., Device]
_GONE_S = 10.0


def _text(device: Device | RealPi, command: str) -> str:
    done = device.run(command)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def _says(device: Device, command: str = "true") -> str:
    """What ssh says when it fails."""
    done = device.run(command)
    assert done.returncode == 255
    return done.stderr.decode()


def _facts(device: Device | RealPi) -> dict[str, object]:
    """What edgekit's own program for machines says there."""
    done = device.run("python3 -I -", stdin=Path(machine.__file__).read_bytes())
    assert done.returncode == 0, done.stderr.decode()
    facts: dict[str, object] = json.loads(done.stdout)["facts"]
    return facts


def _processes_of(device: Device) -> set[int]:
    """Everything in the device's process namespace, seen from here."""
    mine = os.readlink(f"/proc/{device.first_process()}/ns/pid")
    found = set()
    for path in Path("/proc").glob("[0-9]*/ns/pid"):
        with contextlib.suppress(OSError):
            if os.readlink(path) == mine:
                found.add(int(path.parts[2]))
    return found


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_amd64_is_a_debian_of_its_own(amd64_device: Device) -> None:
    assert _text(amd64_device, "id -un; id -u; pwd; uname -m").split() == ["pi", "1000", "/home/pi", "x86_64"]
    assert 'VERSION_ID="12"' in _text(amd64_device, "cat /etc/os-release")
    assert _facts(amd64_device)["emulated"] is None


def test_arm64_runs_its_own_programs(arm64_device: Device | RealPi) -> None:
    ask = "import platform, struct; print(platform.machine(), struct.calcsize('P') * 8)"
    assert _text(arm64_device, f'python3 -c "{ask}"').split() == ["aarch64", "64"]
    assert (_facts(arm64_device)["emulated"] is not None) == arm64_device.emulated


def test_armhf_is_32_bit_with_numpy(armhf_device: Device) -> None:
    ask = "import platform, struct, numpy; print(platform.machine(), struct.calcsize('P') * 8, numpy.arange(4).sum())"
    machine_name, bits, total = _text(armhf_device, f'python3 -c "{ask}"').split()
    assert (machine_name, bits, total) == (armhf_device.arch, "32", "6")
    assert _facts(armhf_device)["emulated"] == "qemu-arm"


@pytest.mark.armhf
def test_a_64_bit_kernel_under_32_bit_programs(make_device: MAKE) -> None:
    ask = "import platform, struct; print(platform.machine(), struct.calcsize('P') * 8)"
    device = make_device("armhf", kernel="aarch64")
    assert _text(device, f'python3 -I -c "{ask}"').split() == ["aarch64", "32"]


@pytest.mark.arm64
def test_the_emulated_processor_can_be_chosen(make_device: MAKE) -> None:
    features = [set(_facts(make_device("arm64", cpu=cpu))["isa"]) for cpu in ("cortex-a72", "cortex-a76")]  # type: ignore[call-overload]
    assert "asimddp" in features[1] - features[0]  # the int8 dot product: Raspberry Pi 5, not 4


@pytest.mark.parametrize("name", ["amd64", pytest.param("arm64", marks=pytest.mark.arm64)])
def test_nothing_of_it_outlives_it(make_device: MAKE, name: str) -> None:
    device = make_device(name)
    with subprocess.Popen(["ssh", "-F", device.config, device.alias, "setsid sleep 1000 & sleep 1000"]) as client:
        end = time.monotonic() + _GONE_S
        while len(_processes_of(device)) < 6 and time.monotonic() < end:
            time.sleep(0.05)
        running = _processes_of(device)
        assert len(running) >= 6  # sh, its watcher, sshd, sshd of the connection, the shell, sleep, …
        device.close()
        assert client.wait(_GONE_S) == 255
    assert not [process for process in running if os.path.exists(f"/proc/{process}")]


def test_a_killed_test_leaves_no_device_running(tmp_path: Path, make_device: MAKE) -> None:
    make_device("amd64")  # skips where there are none
    script = (
        "import os, signal\n"
        "from tests.device.devices import Device\n"
        "with Device('amd64') as device:\n"
        "    print(device.first_process(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    first, end = Path(f"/proc/{int(done.stdout)}"), time.monotonic() + _GONE_S
    while first.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not first.exists()  # and with it, the kernel promises, all others


def test_the_home_is_shared_with_the_host(amd64_device: Device) -> None:
    _text(amd64_device, "mkdir -p shared && printf hello > shared/a")
    assert (amd64_device.home / "shared/a").read_text() == "hello"
    (amd64_device.home / "shared/a").write_text("changed")
    assert _text(amd64_device, "cat shared/a; rm -r shared") == "changed"


def test_the_rest_of_the_device_is_read_only(amd64_device: Device) -> None:
    assert b"Read-only file system" in amd64_device.run("touch /usr/bin/x").stderr


def test_a_changed_host_key_is_refused(make_device: MAKE) -> None:
    device = make_device("amd64")
    assert _text(device, "echo in") == "in"
    device.change_host_key()
    assert "HOST IDENTIFICATION HAS CHANGED" in _says(device)


def test_a_removed_key_is_refused(make_device: MAKE) -> None:
    device = make_device("amd64")
    device.remove_key()
    assert "Permission denied (publickey)" in _says(device)


@pytest.mark.parametrize("name", ["amd64", pytest.param("arm64", marks=pytest.mark.arm64)])
def test_a_dropped_connection_closes_the_pipes_of_what_runs(make_device: MAKE, name: str) -> None:
    device = make_device(name)
    words = ["ssh", "-F", str(device.config), device.alias, "echo in; cat > got; echo ended > end"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stdout.readline() == b"in\n"
        client.stdin.write(b"x" * 100)
        client.stdin.flush()
        end = time.monotonic() + _GONE_S
        while time.monotonic() < end and not _size(device.home / "got"):
            time.sleep(0.05)
        assert device.drop_connections() >= 1
        assert client.wait(_GONE_S) == 255
        while time.monotonic() < end and not _size(device.home / "end"):
            time.sleep(0.05)
    assert (device.home / "end").read_text() == "ended\n"
    assert _size(device.home / "got") == 100
    assert _text(device, "echo again") == "again"


def test_a_device_that_is_off_does_not_answer_and_comes_back(make_device: MAKE) -> None:
    device = make_device("amd64")
    _text(device, "echo kept > file")
    device.stop()
    assert "Connection refused" in _says(device)
    device.start()
    assert _text(device, "cat file") == "kept"


def test_a_full_disk(make_device: MAKE) -> None:
    device = make_device("amd64", disk_bytes=4 << 20)
    filler = device.fill(leave_bytes=1 << 20)
    assert b"No space left" in device.run("head -c 2M /dev/zero > big").stderr
    filler.unlink()
    _text(device, "head -c 2M /dev/zero > big")
    assert (device.home / "big").stat().st_size == 2 << 20


def test_a_read_only_home(make_device: MAKE) -> None:
    device = make_device("amd64")
    with device.read_only_home():
        assert b"Permission denied" in device.run("mkdir .local").stderr
    _text(device, "mkdir .local")


def test_no_python(make_device: MAKE) -> None:
    device = make_device("amd64", python="none")
    assert device.run("python3 --version").returncode == 127
    assert _text(device, "uname -m | tr a-z A-Z") == "X86_64"


def test_old_pythons(make_device: MAKE) -> None:
    assert _text(make_device("amd64-bullseye"), "python3 --version").startswith("Python 3.9.")
    oldest = make_device("amd64-bullseye", python="/usr/bin/python2.7")
    assert "Python 2.7" in _text(oldest, "python3 --version 2>&1")


def test_a_clock_of_its_own(make_device: MAKE) -> None:
    there = float(_text(make_device("amd64", clock=-86400), "date +%s"))
    assert time.time() - there == pytest.approx(86400, abs=60)
