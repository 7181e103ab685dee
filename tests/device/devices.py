"""Devices to deploy to that are only processes here: a Debian of their own with its own sshd on the loopback address.

A device is a tree of namespaces that an ordinary user may make: its root is a system that `prepare.py` made
(read-only), its home, /usr/local and /etc/ssh are folders of its own, and its processes end with it, whatever happens.
Programs for another processor run under QEMU, which a binfmt_misc of the device's own calls (Linux 6.7); such a device
is "emulated", and no time measured there means anything. Its network and its clock are this machine's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.device.prepare import NODES, QEMU, SYSTEMS, hold, place
from tests.device.processes import children, descendants, free_port, program

FOLDER_VARIABLE = "EDGEKIT_DEVICES"
USER = "pi"
_UID = 1000
_START_S = 60.0
_END_S = 10.0
_TRIES = 5  # for a port that somebody else takes between finding and using it
_LISTENING = "Server listening on"
_NATIVE = {"x86_64": "amd64", "aarch64": "arm64"}
# ELF class and e_machine (ELF specification, "ELF Header") of the processors that QEMU is called for
_ELF = {"arm64": ("qemu-aarch64", 2, 183), "armhf": ("qemu-arm", 1, 40)}
_LIBRARIES = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu", "armhf": "arm-linux-gnueabihf"}


_UNAME = """import os

_uname = os.uname


def uname():
    return os.uname_result((*_uname()[:4], "{machine}"))


os.uname = uname
"""


class DeviceError(Exception):
    """The device cannot be started: the reason in one line."""


@functools.cache
def missing(name: str) -> str | None:
    """Why a device of this name cannot run here and what would help, or None."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return f"{FOLDER_VARIABLE} is not set: python3 tests/device/prepare.py FOLDER, and set it to FOLDER"
    needed = [name] if _qemu(name) is None else [name, QEMU]
    for part in needed:
        if not place(Path(folder), part).is_dir():
            return f"{folder} has no current '{part}': python3 tests/device/prepare.py {folder} {' '.join(needed)}"
    for tool, package in (("ssh", "openssh-client"), ("ssh-keygen", "openssh-client"), ("unshare", "util-linux")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: apt-get install {package}"
    trial = "mount -t proc proc /proc"
    if _qemu(name) is not None:
        trial += " && mount -t binfmt_misc none /proc/sys/fs/binfmt_misc"
    done = subprocess.run([*_UNSHARE, "sh", "-c", trial], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"this system lets no user make the namespaces of a device (Linux 6.7 is needed): {done.stderr.strip()}"
    return None


_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "--uts", "--pid", "--kill-child")


class Device:
    """A running device; a context manager. Every one has a folder of its own and can be broken without harm to others.

    name: of a system of prepare.py. cpu: what QEMU emulates (`cortex-a76`: Raspberry Pi 5), else all that it can.
    disk_bytes: the size of the home's file system, else the host's. clock: what its programs see as an offset in
    seconds. python: "system", "none" (no python3 in PATH), or the path on the device of what `python3` shall be.
    kernel: what its Python takes the machine for: a 64-bit kernel under 32-bit programs, which QEMU does not imitate.

    config, alias: `ssh -F config alias` logs in without a question. home: the home folder seen from here. local: its
    /usr/local. arch: as `uname -m` there says. emulated: whether QEMU runs it. log: what sshd says.
    """

    def __init__(
        self, name: str, *, cpu: str | None = None, disk_bytes: int | None = None, clock: int = 0,
        python: str = "system", kernel: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.alias = name, f"edgekit-{name}"
        self._arch = SYSTEMS[name].arch
        self.arch = {"amd64": "x86_64", "arm64": "aarch64", "armhf": "armv7l"}[self._arch]
        self.emulated = _qemu(name) is not None
        systems = Path(os.environ[FOLDER_VARIABLE]).resolve()
        self._root = place(systems, name)
        self._emulator = place(systems, QEMU) / "usr/bin" / _ELF[self._arch][0] if self.emulated else None
        self._cpu, self._disk_bytes, self._clock, self._python = cpu, disk_bytes, clock, python
        self._kernel = kernel
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self.alias}-"))
        self._held = hold(self._root)
        try:
            self._make_files()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it and remove its files. Again: nothing."""
        self.stop()
        if not self._folder.exists():
            return
        os.close(self._held)
        for path, _, _ in os.walk(self._folder):  # also what a test made read-only
            os.chmod(path, 0o700)
        shutil.rmtree(self._folder)

    # --- power -----------------------------------------------------------------------------------------
    def start(self) -> None:
        """Switch it on; after `stop`, with the same keys and the same port."""
        for _ in range(_TRIES if self.port == 0 else 1):
            port = self.port or free_port()
            self._write_settings(port)
            self._boot()
            if self._await_listening(0):
                self.port = port
                return
            self.stop()
            if "Address already in use" not in self.log.read_text():
                break
        raise DeviceError(f"{self.name} did not start: {self.log.read_text().strip()[-500:]}")

    def stop(self) -> None:
        """Switch it off: all its processes end at once."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()  # takes the first process of the device with it, and the kernel then all others
            process.wait()

    # --- use -------------------------------------------------------------------------------------------
    def run(self, command: str, stdin: bytes = b"", timeout_s: float = 300) -> subprocess.CompletedProcess[bytes]:
        """One command in the device's shell, through ssh. The exit status is not checked."""
        words = ["ssh", "-F", str(self.config), self.alias, command]
        return subprocess.run(words, input=stdin, capture_output=True, timeout=timeout_s, check=False)

    @property
    def config(self) -> Path:
        return self._folder / "config"

    @property
    def log(self) -> Path:
        return self._folder / "log"

    @property
    def local(self) -> Path:
        return self._folder / "local"

    @property
    def home(self) -> Path:
        """Also while the device is off, unless it has a disk of limited size: that is a file system of its own."""
        if self._disk_bytes is None:
            return self._folder / "home"
        return Path(f"/proc/{self.first_process()}/root{self._root}/home/{USER}")

    # --- harm ------------------------------------------------------------------------------------------
    def change_host_key(self) -> None:
        """As after an installation anew: the key that known_hosts holds is no longer the device's."""
        self._make_key("ssh/host_key")
        listened = self.log.read_text().count(_LISTENING)
        os.kill(self._sshd(), signal.SIGHUP)
        if not self._await_listening(listened):
            raise DeviceError(f"{self.name} did not take its new key: {self.log.read_text().strip()[-500:]}")

    def remove_key(self) -> None:
        """The device no longer knows who logs in."""
        (self._folder / "ssh/authorized_keys").write_text("")

    def drop_connections(self) -> int:
        """End every connection without a word, as when the network goes; what it ran finds its pipes closed. The device
        goes on listening. Returns how many processes of sshd that were."""
        dropped = [process for process in descendants(self._sshd()) if program(process) == "sshd"]
        for process in dropped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        end = time.monotonic() + _END_S
        while any(program(process) for process in dropped) and time.monotonic() < end:
            time.sleep(0.01)
        return len(dropped)

    def fill(self, leave_bytes: int = 0) -> Path:
        """Write a file into the home that leaves this much of the disk (of a device with `disk_bytes`). Remove it to
        have the space back."""
        if self._disk_bytes is None:
            raise ValueError("only a device with disk_bytes has a disk of its own")
        path = self.home / "filler"
        state = os.statvfs(self.home)
        rest = state.f_bavail * state.f_frsize - leave_bytes
        with open(path, "wb") as file, contextlib.suppress(OSError):
            while rest > 0:
                rest -= file.write(bytes(min(rest, 1 << 20)))
        return path

    @contextlib.contextmanager
    def read_only_home(self) -> Iterator[None]:
        """The user may not write into the home folder itself."""
        self.home.chmod(0o555)
        try:
            yield
        finally:
            self.home.chmod(0o755)

    # --- files -----------------------------------------------------------------------------------------
    def _make_files(self) -> None:
        for name in ("home", "local/bin", "ssh", "bin"):
            (self._folder / name).mkdir(parents=True)
        self._make_key("identity")
        self._make_key("ssh/host_key")
        shutil.copy(self._folder / "identity.pub", self._folder / "ssh/authorized_keys")
        if self._python == "none":
            for program in (self._root / "usr/bin").iterdir():
                if not program.name.startswith("python"):
                    (self.local / "bin" / program.name).symlink_to(f"/usr/bin/{program.name}")
        elif self._python != "system":
            (self.local / "bin/python3").symlink_to(self._python)
        if self._kernel is not None:
            for python in self._root.glob("usr/lib/python3.*"):
                modules = self.local / "lib" / python.name / "dist-packages"
                modules.mkdir(parents=True)
                (modules / "kernel.py").write_text(_UNAME.format(machine=self._kernel))
                (modules / "kernel.pth").write_text("import kernel\n")
        if self._emulator is not None:
            (self._folder / "binfmt").write_text(_registration(self._arch, self._emulator))

    def _make_key(self, name: str) -> None:
        path = self._folder / name
        path.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.alias, "-f", path], check=True)

    def _write_settings(self, port: int) -> None:
        settings = [
            f"Port {port}", "ListenAddress 127.0.0.1", "HostKey /etc/ssh/host_key", "UsePAM no", "StrictModes no",
            "AuthorizedKeysFile /etc/ssh/authorized_keys", "PasswordAuthentication no", "PidFile none", "UseDNS no",
            "KbdInteractiveAuthentication no", "MaxStartups 100", "MaxSessions 100", "PrintMotd no",
            "Subsystem sftp internal-sftp", *self._variables(),
        ]  # fmt: skip
        (self._folder / "ssh/sshd_config").write_text("\n".join(settings) + "\n")
        key = (self._folder / "ssh/host_key.pub").read_text()
        known = self._folder / "known_hosts"
        if not known.exists() or self.port == 0:  # a key that changed later stays unknown
            known.write_text(f"[127.0.0.1]:{port} {key}")
        options = {
            "HostName": "127.0.0.1", "Port": port, "User": USER, "IdentityFile": f'"{self._folder / "identity"}"',
            "IdentitiesOnly": "yes", "IdentityAgent": "none", "UserKnownHostsFile": f'"{known}"',
            "GlobalKnownHostsFile": "/dev/null", "StrictHostKeyChecking": "yes", "UpdateHostKeys": "no",
            "BatchMode": "yes",
        }  # fmt: skip
        lines = [f"Host {self.alias}", *(f"    {key} {value}" for key, value in options.items())]
        self.config.write_text("\n".join(lines) + "\n")

    def _variables(self) -> Iterator[str]:
        """What every session finds in its environment."""
        values = []
        if self._python == "none":
            values.append("PATH=/usr/local/bin")
        if self._cpu is not None:
            values.append(f"QEMU_CPU={self._cpu}")
        if self._clock:
            values.append(f"LD_PRELOAD=/usr/lib/{_LIBRARIES[self._arch]}/faketime/libfaketime.so.1")
            values.append(f"FAKETIME={self._clock:+d}s")
        if values:
            yield f"SetEnv {' '.join(values)}"

    # --- processes -------------------------------------------------------------------------------------
    def _boot(self) -> None:
        script = self._folder / "boot"
        script.write_text(self._script())
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [*_UNSHARE, "sh", "-e", str(script)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _script(self) -> str:
        """The device's first process: mounts its file systems, runs sshd as an ordinary user, ends when the pipe from
        here does, and then the kernel ends all others."""
        root, own = shlex.quote(str(self._root)), shlex.quote(str(self._folder))
        state = os.statvfs(self._root)  # the kernel refuses to take these away
        kept = "".join(
            f",{name}" for bit, name in ((os.ST_NOSUID, "nosuid"), (os.ST_NODEV, "nodev")) if state.f_flag & bit
        )
        if self._disk_bytes is None:
            home = f"mount --bind {own}/home {root}/home/{USER}"
        else:
            home = f"mount -t tmpfs -o size={self._disk_bytes},mode=0755 none {root}/home/{USER}"
        lines = [
            f"hostname {self.alias}",
            "mount --make-rprivate /",
            f"mount --bind {root} {root}",
            f"mount -o remount,bind,ro{kept} {root}",
            home,
            f"mount --bind {own}/local {root}/usr/local",
            f"mount --bind {own}/ssh {root}/etc/ssh",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /sys {root}/sys",
            *(f"mount -t tmpfs -o mode=1777 none {root}/{name}" for name in ("tmp", "run", "dev/shm")),
            *(f"mount --bind /dev/{name} {root}/dev/{name}" for name in NODES),
            f"mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 none {root}/dev/pts",
        ]
        if self._emulator is not None:
            handlers = f"{root}/proc/sys/fs/binfmt_misc"
            lines += [f"mount -t binfmt_misc none {handlers}", f"cat {own}/binfmt > {handlers}/register"]
        server = "/usr/sbin/sshd -D -e -f /etc/ssh/sshd_config"
        lines += [
            "exec 3<&0",
            f"unshare --user --map-user={_UID} --map-group={_UID} --root={root} --wd=/home/{USER} {server} 3<&- &",
            "server=$!",
            '{ read -r _ || true; kill -KILL "$server"; } <&3 &',
            'wait "$server"',
        ]
        return "\n".join(lines) + "\n"

    def _await_listening(self, times: int) -> bool:
        """Until sshd has said once more than `times` that it listens; False when the device ended instead."""
        assert self._process is not None
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if self.log.read_text(errors="replace").count(_LISTENING) > times:
                return True
            if self._process.poll() is not None:
                return False
            time.sleep(0.02)
        return False

    def first_process(self) -> int:
        """The device's first process, as this machine numbers it."""
        if self._process is None:
            raise DeviceError(f"{self.name} is off")
        return next(iter(children(self._process.pid)))

    def _sshd(self) -> int:
        """The sshd that listens."""
        return next(child for child in children(self.first_process()) if program(child) == "sshd")


class RealPi:
    """A Raspberry Pi that the user has: what a Device offers, without what harms it."""

    name, arch, emulated, config, home = "arm64", "aarch64", False, None, None

    def __init__(self, alias: str) -> None:
        self.alias = alias

    def run(self, command: str, stdin: bytes = b"", timeout_s: float = 300) -> subprocess.CompletedProcess[bytes]:
        words = ["ssh", "-o", "BatchMode=yes", self.alias, command]
        return subprocess.run(words, input=stdin, capture_output=True, timeout=timeout_s, check=False)


def _qemu(name: str) -> str | None:
    """The emulator that this system needs here, or None."""
    arch = SYSTEMS[name].arch
    return None if _NATIVE.get(os.uname().machine) == arch else _ELF[arch][0]


def _registration(arch: str, emulator: Path) -> str:
    """The line for binfmt_misc (Linux: Documentation/admin-guide/binfmt-misc.rst): programs of this class and machine,
    of type executable or shared. P: they keep their own name; F: the emulator is opened now, outside of their root."""
    _, bits, machine = _ELF[arch]
    magic = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9) + bytes([2, 0, machine, 0])
    mask = b"\xff" * 7 + bytes(9) + b"\xfe\xff\xff\xff"
    escaped = ["".join(f"\\x{byte:02x}" for byte in part) for part in (magic, mask)]
    return f":edgekit-{arch}:M::{escaped[0]}:{escaped[1]}:{emulator}:PF"
