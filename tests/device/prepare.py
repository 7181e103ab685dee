"""Makes the Debian systems that the device tests run on: python3 tests/device/prepare.py FOLDER [NAME ...]

Downloads packages with apt-get and unpacks them; needs neither root nor anything installed for the other processor, and
changes nothing of the machine's own apt. NAMEs: those of SYSTEMS, and `qemu`; without any: what the tests use.
A finished system lies in FOLDER/NAME-KEY, where KEY stands for this file's text: an edit makes new ones. It is put
together beside that and renamed, so an interrupted run leaves nothing that looks finished. Standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

QEMU = "qemu"
MIRROR_VARIABLE = "EDGEKIT_DEBIAN_MIRROR"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_APT = Path("/etc/apt")
# QEMU 7.2 (bookworm) hangs ONNX Runtime and LiteRT; 10 (trixie) does not. Linked statically: any Linux runs it.
_QEMU_SUITE, _QEMU_PACKAGE = "trixie", "qemu-user"
_QEMU_PROGRAMS = ("qemu-aarch64", "qemu-arm")
# What a small Raspberry Pi OS has too: a shell and its tools, an ssh server, Python, the C++ library; and libfaketime,
# with which a test sets a device's clock.
_PACKAGES = (
    "base-files", "base-passwd", "bash", "coreutils", "dash", "findutils", "grep", "gzip", "libc-bin", "libfaketime",
    "libstdc++6", "openssh-client", "openssh-server", "procps", "python3", "sed", "tar", "util-linux",
)  # fmt: skip
_LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/zoneinfo", "dev")
_MERGED = ("bin", "lib", "sbin")  # links into usr, as every installed Debian has since 12
_EMPTY = ("dev", "proc", "sys", "tmp", "run", "root", "home/pi", "var/tmp", "var/empty", "usr/local/bin")
# The nodes that programs expect; a device's own start mounts the machine's over these.
NODES = ("null", "zero", "full", "random", "urandom", "tty")
# Debian's name of a processor -> the loader of its programs
_LOADERS = {
    "amd64": "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    "arm64": "usr/lib/aarch64-linux-gnu/ld-linux-aarch64.so.1",
}
_COMMAND_S = 600


class Failed(Exception):
    """One line: what is missing or went wrong, and what helps."""


@dataclass(frozen=True)
class System:
    """A Debian: its release, its processor as Debian calls it, and what it has besides _PACKAGES."""

    suite: str
    arch: str
    extra: tuple[str, ...] = ()


SYSTEMS = {
    "amd64": System("bookworm", "amd64"),
    "arm64": System("bookworm", "arm64"),
    # the oldest Python that edgekit's programs for devices support, 3.9, and a real one that is too old, 2.7
    "amd64-bullseye": System("bullseye", "amd64", ("python2.7",)),
    "armhf": System("bookworm", "armhf", ("python3-numpy",)),  # no numpy wheel exists for it
}
USED = (*SYSTEMS, QEMU)


def place(folder: Path, name: str) -> Path:
    """Where the finished system lies, or would lie."""
    return folder / f"{name}-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"


def prepare(folder: Path, name: str) -> Path:
    """Make one system unless it is there."""
    final = place(folder, name)
    if final.is_dir():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".lock-{name}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if final.is_dir():  # somebody else made it while this waited
            return final
        for left in folder.glob(f".making-{name}-*"):  # of a run that was killed: it would hold the lock
            _remove(left)
        work = Path(tempfile.mkdtemp(prefix=f".making-{name}-", dir=folder))
        try:
            (work / "root").mkdir(mode=0o755)
            if name == QEMU:
                _qemu(work)
            else:
                _system(work, SYSTEMS[name])
                _compile(folder, work / "root", SYSTEMS[name])
            os.rename(work / "root", final)
        finally:
            _remove(work)
        for old in folder.glob(f"{name}-*"):
            if re.fullmatch(f"{re.escape(name)}-[0-9a-f]{{12}}", old.name) and old != final:
                _remove_unused(old)
    return final


def hold(system: Path) -> int:
    """Keeps a finished system from being removed until the descriptor is closed, or this process ends."""
    descriptor = os.open(system, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _remove_unused(system: Path) -> None:
    descriptor = os.open(system, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(system)
    except BlockingIOError:
        pass  # a device runs on it: a later preparation removes it
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    for path, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(os.path.join(path, name)):
                os.chmod(os.path.join(path, name), 0o700)
    shutil.rmtree(folder, ignore_errors=True)


# --- packages --------------------------------------------------------------------------------------
def _qemu(work: Path) -> None:
    for package in _download(work, _QEMU_SUITE, _native(), [_QEMU_PACKAGE]):
        if package.name.startswith(f"{_QEMU_PACKAGE}_"):
            _unpack(package, work / "root", [f"./usr/bin/{name}" for name in _QEMU_PROGRAMS])


def _system(work: Path, system: System) -> None:
    root = work / "root"
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    if system.arch == "amd64":
        (root / "usr/lib64").mkdir()
        (root / "lib64").symlink_to("usr/lib64")
    for package in _download(work, system.suite, system.arch, [*_PACKAGES, *system.extra]):
        _unpack(package, root)
    _configure(root)


def _download(work: Path, suite: str, arch: str, packages: Sequence[str]) -> list[Path]:
    """The packages with all that they need, in an apt of their own below `work`; apt checks the signatures."""
    for tool in ("apt-get", "apt-config", "dpkg-deb", "tar"):
        if shutil.which(tool) is None:
            raise Failed(f"{tool} is not installed: this needs a Debian-like system")
    apt = work / "apt"
    for part in ("state/lists/partial", "cache/archives/partial", "etc/parts", "etc/sources.d", "etc/trusted.d", "log"):
        (apt / part).mkdir(parents=True)
    (apt / "state/status").touch()
    mirror, keyring = _mirror()
    source = f"deb [arch={arch} signed-by={keyring}] {mirror} {suite} main\n"
    (apt / "etc/sources.list").write_text(source)
    own = {
        "Dir::State": "state", "Dir::State::status": "state/status", "Dir::Cache": "cache", "Dir::Log": "log",
        "Dir::Etc": "etc", "Dir::Etc::main": "etc/none", "Dir::Etc::parts": "etc/parts",
        "Dir::Etc::sourcelist": "etc/sources.list", "Dir::Etc::sourceparts": "etc/sources.d",
        "Dir::Etc::trustedparts": "etc/trusted.d",
    }  # fmt: skip
    lines = [f'{key} "{apt / value}";' for key, value in own.items()]
    lines += [f'APT::Architecture "{arch}";', f'APT::Architectures {{ "{arch}"; }};', 'APT::Sandbox::User "root";']
    lines += ['Acquire::Languages "none";', "APT::Install-Recommends false;"]
    lines += ['APT::Update::Error-Mode "any";']  # an index that is not there is an error, not a warning
    (apt / "apt.conf").write_text("\n".join([*_reach(), *lines]) + "\n")
    environment = {
        **os.environ,
        "APT_CONFIG": str(apt / "apt.conf"),
        "LC_ALL": "C",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    _run(["apt-get", "-qq", "update"], environment)
    _run(["apt-get", "-qq", "-y", "--download-only", "install", *packages], environment)
    found = sorted((apt / "cache/archives").glob("*.deb"))
    if not found:
        raise Failed(f"apt-get found no packages of {suite} for {arch} at {mirror}")
    return found


def _reach() -> Iterator[str]:
    """How this machine's apt gets to the network (proxies, retries), without anything else of its configuration."""
    for line in _run(["apt-config", "dump"]).splitlines():
        if line.startswith("Acquire::") and not line.startswith(("Acquire::IndexTargets", "Acquire::Languages")):
            yield line


def _mirror() -> tuple[str, Path]:
    """The Debian mirror that this machine's apt uses, and the keyring of its signatures."""
    if not _KEYRING.is_file():
        raise Failed(f"{_KEYRING} is missing: apt-get install debian-archive-keyring")
    if named := os.environ.get(MIRROR_VARIABLE):
        return named, _KEYRING
    for address, suites, components in _sources():
        whole = [suite for suite in suites if not re.search(r"[-/]", suite)]  # not bookworm-security, bookworm/updates
        if "debian" in address and whole and "main" in components:
            return address, _KEYRING
    raise Failed(f"{_APT} names no mirror of Debian: set {MIRROR_VARIABLE} to the address of one")


def _sources() -> Iterator[tuple[str, list[str], list[str]]]:
    """(address, suites, components) of every source in /etc/apt, in either form that apt reads."""
    for path in [_APT / "sources.list", *sorted(_APT.glob("sources.list.d/*.list"))]:
        for line in path.read_text().splitlines() if path.is_file() else ():
            words = re.sub(r"\[[^]]*\]", "", line.split("#")[0]).split()
            if len(words) > 3 and words[0] == "deb":
                yield words[1], [words[2]], words[3:]
    for path in sorted(_APT.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", stanza, re.MULTILINE))
            if "deb" in fields.get("Types", "").split():
                for address in fields.get("URIs", "").split():
                    yield address, fields.get("Suites", "").split(), fields.get("Components", "").split()


def _unpack(package: Path, root: Path, only: Sequence[str] = ()) -> None:
    """What dpkg-deb -x does, into the merged /usr, all of it owned by who runs this, without the documentation."""
    without = [f"--exclude=./{name}" for name in _LEFT_OUT]
    unpacker = ["tar", "-xp", "--no-same-owner", "--keep-directory-symlink", "-C", str(root), *without, *only]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as reader:
        done = subprocess.run(unpacker, stdin=reader.stdout, capture_output=True, text=True, check=False)
    if done.returncode or reader.returncode:
        raise Failed(f"{package.name} cannot be unpacked: {done.stderr.strip()[-200:]}")


def _configure(root: Path) -> None:
    """The little of the packages' own set-up that matters: accounts, empty folders, one BLAS and LAPACK."""
    for name in _EMPTY:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in NODES:
        (root / "dev" / name).touch()
    for name in ("pts", "shm"):
        (root / "dev" / name).mkdir()
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/bash\n"
        "sshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        "pi:x:1000:1000:,,,:/home/pi:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    )
    (root / "etc/group").write_text("root:x:0:\npi:x:1000:\nnogroup:x:65534:\n")
    (root / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    for library in (*root.glob("usr/lib/*/blas/lib*.so.3"), *root.glob("usr/lib/*/lapack/lib*.so.3")):
        (library.parents[1] / library.name).symlink_to(f"{library.parent.name}/{library.name}")


def _compile(folder: Path, root: Path, system: System) -> None:
    """Python's modules, as installing them does: else every start under QEMU compiles them, for seconds. The files are
    the same for all processors, so the Python of the same release for this one makes them."""
    native = _native()
    if native not in _LOADERS:
        raise Failed(f"this needs a machine that is one of {', '.join(_LOADERS)}, not {native}")
    if system.arch == native:
        compiler = root
    else:
        compiler = prepare(folder, next(n for n, s in SYSTEMS.items() if (s.suite, s.arch) == (system.suite, native)))
    loader = compiler / _LOADERS[native]
    python = next(path for path in compiler.glob("usr/bin/python3.*") if re.fullmatch(r"python3\.\d+", path.name))
    modules = [str(path) for path in (root / "usr/lib").glob("python3*")]
    start = [str(loader), "--library-path", str(loader.parent), str(python)]
    _run([*start, "-I", "-m", "compileall", "-q", "-s", str(root), "-p", "/", *modules])


def _native() -> str:
    """What Debian calls this machine's processor."""
    return _run(["dpkg", "--print-architecture"]).strip()


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMMAND_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"{command[0]} took more than {_COMMAND_S} s") from None
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise Failed(f"{Path(command[0]).name} failed: {' '.join(said[:1])[:300]}")
    return done.stdout


def main(words: Sequence[str]) -> int:
    if not words or words[0].startswith("-"):
        print(__doc__)
        return 2
    folder, names = Path(words[0]).resolve(), list(words[1:]) or list(USED)
    if unknown := [name for name in names if name not in USED]:
        print(f"no system '{unknown[0]}': there are {', '.join(USED)}", file=sys.stderr)
        return 2
    reasons: dict[str, list[str]] = {}
    with ThreadPoolExecutor(len(names)) as pool:
        for name, job in [(name, pool.submit(prepare, folder, name)) for name in names]:
            try:
                job.result()
            except (Failed, OSError) as error:
                reasons.setdefault(str(error), []).append(name)
    for reason, without in reasons.items():
        print(f"device system not prepared: {', '.join(without)}: {reason}", file=sys.stderr)
    return int(bool(reasons))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
