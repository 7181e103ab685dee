"""Machine state: read from the kernel's files as several systems write them, and never an exception."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.bench import machine

PI_5 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
"""
XEON = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C
flags\t\t: fpu avx avx2 fma avx512f avx512_vnni avx_vnni avx512_bf16 amx_bf16 amx_tile amx_int8
cpu MHz\t\t: 2700.000
processor\t: 1
cpu MHz\t\t: 2900.000
"""


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A file system of our own: path -> text."""
    table: dict[str, str] = {}

    def matching(pattern: str) -> list[str]:
        import fnmatch

        return sorted(p for p in table if fnmatch.fnmatch(p, pattern))

    monkeypatch.setattr(machine, "_read", lambda path: table.get(path, ""))
    monkeypatch.setattr(machine.glob, "glob", matching)
    return table


def test_this_machine_is_described_in_json() -> None:
    known, now = machine.facts(), machine.state()
    json.dumps([known, now], allow_nan=False)
    assert known["cores_allowed"] >= 1
    assert 1 <= machine.physical_cores() <= (os.cpu_count() or 1)
    for found in (known, now):
        for key in found["unknown"]:
            assert found[key] is None
    if sys.platform == "linux":
        assert known["memory_bytes"] > now["memory_available_bytes"] > 0


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_a_system_that_shows_nothing_gives_reasons(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    monkeypatch.setattr(machine, "_command", lambda words: None)
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: arch)
    known, now = machine.facts(), machine.state()
    assert known["cpu"] is None
    assert known["isa"] is None
    assert set(known["unknown"]) == {"cpu", "isa"}
    assert now["governor"] is None
    assert "temperature_c" in now["unknown"]
    assert machine.physical_cores() == known["cores_allowed"]


def test_arm_features(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    files["/proc/cpuinfo"] = PI_5
    files["/proc/device-tree/model"] = "Raspberry Pi 5 Model B Rev 1.0\0"
    known = machine.facts()
    assert known["isa"] == ["neon", "asimdhp", "asimddp"]
    assert known["cpu"] == known["board"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert known["emulated"] is None


def test_x86_features_and_frequency(files: dict[str, str]) -> None:
    files["/proc/cpuinfo"] = XEON
    known = machine.facts()
    assert known["cpu"] == "Intel(R) Xeon(R) Platinum 8481C"
    assert {"avx2", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8"} <= set(known["isa"])
    assert machine.state()["frequency_hz"] == 2.8e9


def test_hyper_threads_count_once(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(8):
        base = f"/sys/devices/system/cpu/cpu{cpu}/topology"
        files[f"{base}/core_id"] = f"{cpu % 4}\n"
        files[f"{base}/physical_package_id"] = "0\n"
        files[f"{base}/thread_siblings_list"] = f"{cpu % 4},{cpu % 4 + 4}\n"
    monkeypatch.setattr(machine, "_allowed", lambda: frozenset(range(8)))
    assert machine.physical_cores() == 4
    monkeypatch.setattr(machine, "_allowed", lambda: frozenset({0, 4, 1}))
    assert machine.physical_cores() == 2


@pytest.mark.parametrize(
    ("table", "quota"),
    [
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "/proc/self/cgroup": "5:cpu,cpuacct:/x\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        ({"/proc/self/cgroup": "5:cpu:/x\n", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, None),
    ],
)
def test_the_quota_of_a_container(files: dict[str, str], table: dict[str, str], quota: float | None) -> None:
    files.update(table)
    assert machine._quota() == quota


def test_half_a_cpu_still_runs_one_thread(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_quota", lambda: 0.5)
    assert machine.physical_cores() == 1


@pytest.mark.parametrize(
    ("word", "now", "ever"),
    [
        ("0x0", [], []),
        ("0x50005", ["under-voltage", "throttled"], ["under-voltage", "throttled"]),
        ("0x20000", [], ["frequency capped"]),
        ("0x80008", ["soft temperature limit"], ["soft temperature limit"]),
    ],
)
def test_a_raspberry_pi_tells_of_throttling(
    monkeypatch: pytest.MonkeyPatch, word: str, now: list[str], ever: list[str]
) -> None:
    monkeypatch.setattr(machine, "_command", lambda words: f"throttled={word}" if words[0] == "vcgencmd" else None)
    found = machine._throttle()
    assert found is not None
    assert (found["now"], found["ever"]) == (now, ever)


@pytest.mark.parametrize("text", ["50005\n", "0x50005\n"])
def test_the_kernel_tells_where_the_firmwares_tool_is_missing(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(machine, "_command", lambda words: None)
    files["/sys/devices/platform/scb/soc:firmware/get_throttled"] = text
    found = machine._throttle()
    assert found is not None
    assert (found["raw"], found["now"]) == ("0x50005", ["under-voltage", "throttled"])


def test_what_was_seen_before_cannot_be_seen_again() -> None:
    known = {"cores_allowed": 4, "emulated": None}
    before = {"throttle": {"now": ["throttled"], "ever": ["throttled", "under-voltage"]}}
    texts = machine.warnings_before(known, before)
    assert texts[0] == "throttled before the start"
    assert "once: under-voltage;" in texts[1]


@pytest.mark.parametrize(
    ("before", "after", "began"),
    [
        ("0x0", "0x0", []),
        ("0x50000", "0x50000", []),
        ("0x0", "0x10000", ["under-voltage"]),
        ("0x0", "0x1", ["under-voltage"]),
        ("0x10000", "0x10001", ["under-voltage"]),
        ("0x10001", "0x10001", []),
        ("0x50000", "0xd0008", ["soft temperature limit"]),
        ("0x0", "0x60006", ["frequency capped", "throttled"]),
    ],
)
def test_throttling_that_begins(monkeypatch: pytest.MonkeyPatch, before: str, after: str, began: list[str]) -> None:
    words = iter([before, after])
    monkeypatch.setattr(machine, "_command", lambda command: f"throttled={next(words)}")
    one, two = ({"throttle": machine._throttle()} for _ in range(2))
    assert machine.newly_throttled(one, two) == began


def test_as_a_script_it_needs_nothing_but_itself(tmp_path: Path) -> None:
    alone = tmp_path / "machine.py"
    alone.write_bytes(Path(machine.__file__).read_bytes())
    done = subprocess.run([sys.executable, "-I", "-S", str(alone)], capture_output=True, timeout=60, check=True)
    told = json.loads(done.stdout)
    assert told["facts"]["cores_usable"] == machine.physical_cores()
    assert set(told["state"]) == set(machine.state())


def test_warnings_before() -> None:
    known = {"cores_allowed": 4, "emulated": None}
    quiet = {"load_1min": 1.9, "governor": "performance", "throttle": None}
    assert machine.warnings_before(known, quiet) == []
    busy = {"load_1min": 2.1, "governor": "powersave", "throttle": {"now": ["throttled"]}}
    texts = machine.warnings_before({**known, "emulated": "qemu-aarch64"}, busy)
    assert len(texts) == 4
    assert "no latency" in texts[0]
    assert "load 2.10 on 4 cores" in texts[1]


def test_warnings_after_tell_only_what_is_new() -> None:
    before = {"throttle": {"now": [], "ever": ["throttled"], "events": 3}}
    assert machine.warnings_after(before, before) == []
    after = {"throttle": {"now": ["throttled"], "ever": ["throttled", "under-voltage"], "events": 5}}
    assert machine.warnings_after(before, after) == [
        "under-voltage while measuring",
        "throttled while measuring",
        "the CPU was throttled 2 times while measuring",
    ]
    assert machine.warnings_after({"throttle": None}, {"throttle": None}) == []


def test_emulation_is_seen(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"/proc/{os.getpid()}/task/{os.getpid()}/cmdline"
    files[own] = "/usr/bin/qemu-aarch64-static\0-0\0python3\0"
    assert machine.emulation() == "qemu-aarch64-static"
    files[own] = "/usr/bin/python3\0"
    files["/proc/cpuinfo"] = XEON
    assert machine.emulation() is None
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")  # ARM code on an Intel CPU
    assert machine.emulation() == "qemu-user"


def test_a_tool_that_fails_or_is_missing_is_no_exception(tmp_path: Path) -> None:
    assert machine._command(["no-such-tool-here"]) is None
    assert machine._command([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert machine._command([sys.executable, "-c", "print('x')"]) == "x"
