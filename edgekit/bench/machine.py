"""Describes the machine that measures and the state it is in. Standard library and Python 3.9 only: it travels.

    python machine.py        prints {"facts": ..., "state": ...}

Every figure that a system does not give is None, and `unknown` says why; nothing here raises.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from typing import Any

# instruction sets that decide which kernels run, by the kernel's name for them; x86 first, then ARM
_ISA = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "neon": "neon",
    "asimd": "neon",
    "asimdhp": "asimdhp",
    "asimddp": "asimddp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
_THROTTLE_NOW = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_VCGENCMD = ("vcgencmd", "/opt/vc/bin/vcgencmd")  # the second: before Debian 11
# the same word as vcgencmd's, from Raspberry Pi's kernels; soc or scb, by the board
_THROTTLE_FILES = "/sys/devices/platform/*/*firmware/get_throttled"
_LOAD_PER_CORE = 0.5  # above it other processes take turns with the measured one
_COMMAND_TIMEOUT_S = 5.0


def facts() -> dict[str, Any]:
    """What does not change while measuring: CPU, instruction sets, cores, memory, system.

    board: what the device tree calls it, of single-board computers. cores_usable: `physical_cores`.
    """
    unknown: dict[str, str] = {}
    model = _cpu_model()
    if model is None:
        unknown["cpu"] = "the system does not name its CPU"
    flags = _cpu_flags()
    isa = None if flags is None else list(dict.fromkeys(name for flag, name in _ISA.items() if flag in flags))
    if isa is None:
        unknown["isa"] = f"no /proc/cpuinfo on {sys.platform}"
    emulated = emulation()
    return {
        "cpu": model,
        "board": _board(),
        "arch": architecture(),
        "isa": isa,
        "cores_physical": _physical(None),
        "cores_logical": os.cpu_count(),
        "cores_allowed": len(_allowed()),
        "cores_usable": physical_cores(),
        "cpu_quota": _quota(),
        "memory_bytes": _memory("MemTotal"),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "emulated": emulated,
        "unknown": unknown,
    }


def state() -> dict[str, Any]:
    """What changes: governor, frequency, temperature, throttling, load, free memory."""
    unknown: dict[str, str] = {}
    found: dict[str, Any] = {
        "governor": _governor(),
        "frequency_hz": _frequency(),
        "temperature_c": _temperature(),
        "throttle": _throttle(),
        "load_1min": _load(),
        "memory_available_bytes": _memory("MemAvailable"),
    }
    for key, value in found.items():
        if value is None:
            unknown[key] = f"{sys.platform} does not show it here"
    return {**found, "unknown": unknown}


def physical_cores() -> int:
    """Physical cores that this process may use (affinity and container quota counted): what threads = "all" means."""
    cores = _physical(_allowed()) or len(_allowed())
    quota = _quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def warnings_before(known: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Why latencies measured in this state deserve less trust; empty when nothing was found."""
    found = []
    if known.get("emulated"):
        found.append(f"this CPU is emulated ({known['emulated']}): a time measured here is no latency")
    load, cores = before.get("load_1min"), known.get("cores_allowed") or 1
    if load is not None and load / cores > _LOAD_PER_CORE:
        found.append(f"the machine was busy before the start: load {load:.2f} on {cores} cores")
    governor = before.get("governor")
    if governor is not None and governor != "performance":
        found.append(f"the frequency governor is '{governor}', not 'performance'")
    throttle = before.get("throttle") or {}
    now = throttle.get("now", ())
    found += [f"{name} before the start" for name in now]
    earlier = [name for name in throttle.get("ever", ()) if name not in now]
    if earlier:
        found.append(
            f"since the machine started there was once: {', '.join(earlier)}; if it comes back for a moment, that will "
            "not be seen: restart the machine to be sure"
        )
    return found


def newly_throttled(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Conditions that began between two states, by the throttle bits of a Raspberry Pi: now, or since it started."""
    old, new = before.get("throttle") or {}, after.get("throttle") or {}
    names = [n for n in new.get("ever", ()) if n not in old.get("ever", ())]
    return names + [n for n in new.get("now", ()) if n not in names and n not in old.get("now", ())]


def warnings_after(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What happened to the machine while it measured."""
    old, new = before.get("throttle") or {}, after.get("throttle") or {}
    found = [f"{name} while measuring" for name in newly_throttled(before, after)]
    events = (new.get("events") or 0) - (old.get("events") or 0)
    if events > 0:
        found.append(f"the CPU was throttled {events} times while measuring")
    return found


def architecture() -> str:
    """Of this Python, which under a 64-bit kernel may be a 32-bit one: x86_64, aarch64, armv7l, ..."""
    machine = platform.machine()
    if struct.calcsize("P") == 4:
        return {"aarch64": "armv7l", "armv8l": "armv7l", "x86_64": "i686"}.get(machine, machine)
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(machine, machine)


def emulation() -> str | None:
    """'qemu-…' when this process runs on an emulated CPU, else None."""
    # QEMU's user mode answers for /proc/self and /proc/PID itself; the path through `task` shows the kernel's view: the
    # emulator. Its first word may be a name of binfmt_misc's, so the executable is looked at too.
    task = f"/proc/{os.getpid()}/task/{os.getpid()}"
    for path in (_link(f"{task}/exe"), _read(f"{task}/cmdline").split("\0")[0]):
        if os.path.basename(path).startswith("qemu-"):
            return os.path.basename(path)
    info = _read("/proc/cpuinfo")
    if platform.machine() in ("aarch64", "armv7l") and ("GenuineIntel" in info or "AuthenticAMD" in info):
        return "qemu-user"
    if "QEMU TCG" in info or (re.search(r"model name\s*:\s*QEMU Virtual CPU", info) and not _hardware_virtualized()):
        return "qemu-system"
    return None


def _hardware_virtualized() -> bool:
    return _command(["systemd-detect-virt", "--vm"]) == "kvm"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _command(words: list[str]) -> str | None:
    """The output of a small system tool, or None when it is not there or fails."""
    if shutil.which(words[0]) is None:
        return None
    try:
        done = subprocess.run(words, capture_output=True, timeout=_COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def _cpu_model() -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    if found:
        return found.group(1).strip()
    named = _board() or _read("/sys/devices/virtual/dmi/id/product_name").strip()
    if named:
        return named
    if sys.platform == "darwin":
        return _command(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or None


def _board() -> str | None:
    return _read("/proc/device-tree/model").strip("\0\n ") or None


def _cpu_flags() -> frozenset[str] | None:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    if found:
        return frozenset(found.group(1).split())
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return frozenset({"asimd", "asimddp", "asimdhp"})  # every Apple M core has them
    return None


def _allowed() -> frozenset[int]:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _physical(allowed: frozenset[int] | None) -> int | None:
    """Distinct cores among `allowed` CPUs (all online ones for None); hyper-threads of one core count once."""
    cores = set()
    for path in glob.glob("/sys/devices/system/cpu/cpu[0-9]*/topology/core_id"):
        cpu = int(re.findall(r"cpu(\d+)/topology", path)[0])
        if allowed is None or cpu in allowed:
            package = _read(os.path.join(os.path.dirname(path), "physical_package_id")).strip()
            # The sibling list is the core itself: core_id alone repeats over clusters on some ARM boards.
            siblings = _read(os.path.join(os.path.dirname(path), "thread_siblings_list")).strip()
            cores.add((package, siblings or _read(path).strip()))
    if cores:
        return len(cores)
    if sys.platform == "darwin":
        text = _command(["sysctl", "-n", "hw.physicalcpu"])
        return int(text) if text and text.isdigit() else None
    return None


def _quota() -> float | None:
    """CPUs that the control group grants, or None when it sets no limit. Looks up to the root, as the kernel does."""
    limits = []
    for line in _read("/proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3 and parts[1] == "":
            path = parts[2].strip("/")
            while True:
                words = _read(os.path.join("/sys/fs/cgroup", path, "cpu.max")).split()
                if len(words) == 2 and words[0] != "max":
                    limits.append(int(words[0]) / int(words[1]))
                if not path:
                    break
                path = os.path.dirname(path)
        elif len(parts) == 3 and "cpu" in parts[1].split(","):
            for base in (parts[2].strip("/"), ""):
                folder = os.path.join("/sys/fs/cgroup/cpu", base)
                quota = _read(os.path.join(folder, "cpu.cfs_quota_us")).strip()
                period = _read(os.path.join(folder, "cpu.cfs_period_us")).strip()
                if quota.isdigit() and period.isdigit() and int(period):
                    limits.append(int(quota) / int(period))
    return min(limits) if limits else None


def _memory(key: str) -> int | None:
    found = re.search(rf"^{key}:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if found:
        return int(found.group(1)) * 1024
    if sys.platform == "darwin" and key == "MemTotal":
        text = _command(["sysctl", "-n", "hw.memsize"])
        return int(text) if text and text.isdigit() else None
    return None


def _os_name() -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read("/etc/os-release"), re.MULTILINE)
    return found.group(1) if found else platform.platform(terse=True)


def _governor() -> str | None:
    names = {_read(p).strip() for p in glob.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")}
    return "+".join(sorted(names - {""})) or None


def _frequency() -> float | None:
    """Mean over the cores, Hz."""
    texts = [_read(p).strip() for p in glob.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    values = [int(t) * 1e3 for t in texts if t.isdigit()]
    if not values:
        values = [float(v) * 1e6 for v in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"), re.MULTILINE)]
    return sum(values) / len(values) if values else None


def _temperature() -> float | None:
    """The hottest sensor of the CPU, °C."""
    paths = glob.glob("/sys/class/thermal/thermal_zone*/temp")
    for name in glob.glob("/sys/class/hwmon/hwmon*/name"):
        if _read(name).strip() in ("coretemp", "k10temp", "cpu_thermal"):
            paths += glob.glob(os.path.join(os.path.dirname(name), "temp*_input"))
    values = [int(t) / 1000 for t in (_read(p).strip() for p in paths) if re.fullmatch(r"-?\d+", t)]
    return max(values) if values else None


def _throttle() -> dict[str, Any] | None:
    """now, ever: named conditions (Raspberry Pi); events: the count since boot (x86). None when neither is shown."""
    word = _throttle_word()
    if word is not None:
        bits = int(word, 16)
        now = [name for bit, name in _THROTTLE_NOW.items() if bits >> bit & 1]
        ever = [name for bit, name in _THROTTLE_NOW.items() if bits >> (bit + 16) & 1]
        return {"raw": word, "now": now, "ever": ever, "events": None}
    counts = [
        _read(p).strip() for p in glob.glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count")
    ]
    if counts:
        return {"raw": None, "now": [], "ever": [], "events": sum(int(c) for c in counts if c.isdigit())}
    return None


def _throttle_word() -> str | None:
    """A Raspberry Pi's throttle bits, "0x50000"; from its firmware's tool, or the kernel where that is not there."""
    for tool in _VCGENCMD:
        found = re.fullmatch(r"throttled=(0x[0-9a-fA-F]+)", _command([tool, "get_throttled"]) or "")
        if found:
            return found.group(1)
    for path in sorted(glob.glob(_THROTTLE_FILES)):
        found = re.fullmatch(r"(?:0x)?([0-9a-fA-F]+)", _read(path).strip())
        if found:
            return "0x" + found.group(1)
    return None


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # Windows has none
        return None


def main() -> int:
    print(json.dumps({"facts": facts(), "state": state()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
