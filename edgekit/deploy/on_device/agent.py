"""Works on the device for edgekit: looks at it, installs a bundle, tests it there, goes back to the one before.

Standard library only, Python 3.9. It comes through ssh and leaves nothing but what it installs (`edgekit.deploy.ssh`
sends it), or is run by hand in an unpacked bundle:

    python3 agent.py prepare BUNDLE      make the environment of an unpacked bundle inside it, and test it

A request is a line of JSON with "cmd"; replies are lines of JSON: {"progress": [stage, done, total]}, and one with "ok"
at the end.
What a bundle must contain stands in its manifest.json (`edgekit.deploy.bundle`). Below the base folder:

    store/SHA256          an unpacked wheel, shared by the environments
    environments/NAME     a virtual environment without pip, which finds wheels through a .pth file
    slots/SLOT/DIGEST     an installed bundle; DIGEST: of its manifest.json
    slots/SLOT/current    a link to the one in use
    slots/SLOT/history    the digests in the order in which they came into use

A bundle is put together beside its place, tested, renamed, and only then does `current` change, in one rename: whatever
interrupts this, the version before goes on working.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from typing import Any, BinaryIO, Iterator  # noqa: UP035 - Python 3.9 reads this

AGENT_SCHEMA = 1  # 1: first
BUNDLE_SCHEMA = 1
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
DEFAULT_BASE = "~/.local/share/edgekit"
SIGNERS = "~/.config/edgekit/allowed_signers"
NAMESPACE = "edgekit"  # of signatures
MANIFEST, SIGNATURE = "manifest.json", "manifest.json.sig"
_INCOMING = ".incoming-"
_MINE = f"{_INCOMING}{os.getpid()}"
_DEBIAN = {"PIL": "pil"}  # import name -> of the package, where they differ
_BLOCK = 1 << 20
_SELF_TEST_S = 600.0  # of one artifact: an emulated device takes a minute to import a runtime
_TOLD_EVERY_S = 0.25

Request = dict[str, Any]
Reply = dict[str, Any]


class Refused(Exception):
    """What cannot be done: its kind (a word that the host knows), one line, and the remedy."""

    def __init__(self, kind: str, error: str, remedy: str = "") -> None:
        super().__init__(error)
        self.kind, self.error, self.remedy = kind, error, remedy


# --- the wire --------------------------------------------------------------------------------------
def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class Progress:
    """Tells stages, not more often than somebody can read."""

    def __init__(self) -> None:
        self._stage, self._told = "", 0.0

    def __call__(self, stage: str, done: float = 0, total: float = 0) -> None:
        now = time.monotonic()
        if stage != self._stage or now - self._told >= _TOLD_EVERY_S:
            self._stage, self._told = stage, now
            say({"progress": [stage, done, total]})


def serve(payload: BinaryIO) -> int:
    """Answer the one request on `payload`; what follows it there is the request's own."""
    for name in ("SIGHUP", "SIGTERM"):  # the connection is gone: clean up
        signal.signal(getattr(signal, name), _leave)
    try:
        reply = answer(json.loads(payload.readline()), payload)
    except Refused as error:
        reply = {"ok": False, "kind": error.kind, "error": error.error, "remedy": error.remedy}
    except OSError as error:
        refused = disk_refused(error)
        if refused is None:
            reply = {"ok": False, "kind": "failed", "error": f"{type(error).__name__}: {error}", "remedy": ""}
        else:
            reply = {"ok": False, "kind": refused.kind, "error": refused.error, "remedy": refused.remedy}
    try:
        say(reply)
    except (BrokenPipeError, OSError):
        return 1
    return 0 if reply["ok"] else 1


def _leave(*_: Any) -> None:
    raise SystemExit(1)


def answer(request: Request, payload: BinaryIO) -> Reply:
    commands = {
        "probe": do_probe,
        "install": do_install,
        "rollback": do_rollback,
        "remove": do_remove,
        "state": do_state,
    }
    command = commands.get(str(request.get("cmd")))
    if command is None:
        raise Refused("failed", f"no command {request.get('cmd')!r}")
    return {"ok": True, "schema": AGENT_SCHEMA, **command(request, payload)}


def base_of(request: Request) -> str:
    return os.path.abspath(os.path.expanduser(request.get("folder") or DEFAULT_BASE))


def disk_refused(error: OSError) -> Refused | None:
    """A full or closed disk in words; None for other errors."""
    where = error.filename or "the device's disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Refused("disk", f"no space left at '{where}'", "free some space, or choose another --folder")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return Refused(
            "disk", f"cannot write '{where}': {os.strerror(error.errno)}", "choose a --folder that can be written"
        )
    return None


# --- looking at the device -------------------------------------------------------------------------
def do_probe(request: Request, payload: BinaryIO) -> Reply:
    """What the device is and what is installed.

    packages: import names whose versions are wanted. slot: whose version in use is looked at byte by byte ("intact").
    """
    base, slot = base_of(request), request.get("slot")
    current = current_of(slot_path(base, slot)) if slot else None
    store = os.path.join(base, "store")
    names = os.listdir(store) if os.path.isdir(store) else []
    return {
        "device": {**facts(), "packages": packages(request.get("packages", ()))},
        "facts": sys.modules["edgekit_machine"].facts(),
        "now": time.time(),
        "folder": base,
        "writable": writable(base),
        "disk_free_bytes": free_bytes(base),
        "signers": os.path.isfile(os.path.expanduser(SIGNERS)),
        "slots": slots(base),
        "intact": current
        if current and not _differences(os.path.join(slot_path(base, slot), current), current)
        else None,
        "store": [name for name in names if not name.startswith(_INCOMING)],
    }


def facts() -> dict[str, Any]:
    """arch: of the Python, which under a 64-bit kernel may be 32-bit; machine: the kernel's. glibc: None with musl."""
    bits = struct.calcsize("P") * 8
    machine = platform.machine()
    abi = sysconfig.get_config_var("MULTIARCH") or sysconfig.get_config_var("HOST_GNU_TYPE") or ""
    libc = platform.libc_ver()
    return {
        "arch": _arch(machine, bits),
        "machine": machine,
        "bits": bits,
        "hard_float": "eabihf" in abi if bits == 32 and "arm" in abi else None,
        "python": PYTHON,
        "python_full": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "venv": _has_venv(),
        "glibc": libc[1] if libc[0] == "glibc" else None,
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "system": platform.system(),
    }


def _arch(machine: str, bits: int) -> str:
    if bits == 32:
        return {"aarch64": "armv7l", "armv8l": "armv7l", "x86_64": "i686"}.get(machine, machine)
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(machine, machine)


def _has_venv() -> bool:
    try:
        import venv  # noqa: F401
    except ImportError:
        return False
    return True


def _memory() -> int | None:
    try:
        return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return None


def packages(names: Any) -> dict[str, str | None]:
    """Import name -> version in the device's own Python, None where it is not there."""
    from importlib.util import find_spec

    found: dict[str, str | None] = {}
    for name in names:
        found[name] = None
        if find_spec(name) is not None:
            with contextlib.suppress(Exception):  # whatever is wrong with it, it is of no use
                found[name] = str(getattr(__import__(name), "__version__", ""))
    return found


def _standing(path: str) -> str:
    """The nearest folder above that is there."""
    while not os.path.isdir(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def writable(base: str) -> bool:
    return os.access(_standing(base), os.W_OK | os.X_OK)


def free_bytes(base: str) -> int:
    return shutil.disk_usage(_standing(base)).free


def do_state(request: Request, payload: BinaryIO) -> Reply:
    """The machine's facts and state, as the measuring side knows them; its module came along."""
    machine = sys.modules["edgekit_machine"]
    return {"facts": machine.facts(), "state": machine.state()}


# --- what is installed -----------------------------------------------------------------------------
def slot_path(base: str, slot: Any) -> str:
    name = str(slot)
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise Refused("failed", f"no name for an installation: {name!r}")
    return os.path.join(base, "slots", name)


def slots(base: str) -> dict[str, Any]:
    """Slot -> {"current": digest or None, "versions": digests, the newest in use last, "name", "ship", "target"}."""
    root = os.path.join(base, "slots")
    found = {}
    for name in sorted(os.listdir(root)) if os.path.isdir(root) else ():
        path = os.path.join(root, name)
        if not os.path.isdir(path) or name.startswith("."):
            continue
        current = current_of(path)
        found[name] = {"current": current, "versions": versions(path)}
        with contextlib.suppress(OSError, ValueError):
            manifest = read_json(os.path.join(path, str(current), MANIFEST))
            found[name].update({k: manifest.get(k) for k in ("name", "ship", "target", "edgekit")})
            found[name]["environment"] = read_json(os.path.join(path, str(current), "installed.json"))["environment"]
    return found


def current_of(slot: str) -> str | None:
    try:
        return os.path.basename(os.readlink(os.path.join(slot, "current")))
    except OSError:
        return None


def versions(slot: str) -> list[str]:
    """Digests that are installed, in the order in which they last came into use."""
    try:
        with open(os.path.join(slot, "history"), encoding="ascii") as file:
            order = file.read().split()
    except OSError:
        order = []
    last = {digest: index for index, digest in enumerate(order)}
    return sorted((d for d in last if os.path.isdir(os.path.join(slot, d))), key=lambda d: last[d])


def read_json(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    if not isinstance(found, dict):
        raise ValueError(f"no table in {path}")
    return found


def digest_file(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def _differences(folder: str, digest: str) -> list[str]:
    """Files of an installed bundle that are not as its manifest says, the manifest itself included."""
    path = os.path.join(folder, MANIFEST)
    try:
        if digest_file(path) != digest:
            return [MANIFEST]
        manifest = read_json(path)
        environment = read_json(os.path.join(folder, "installed.json"))["environment"]
    except (OSError, ValueError, KeyError):
        return [MANIFEST]
    wrong = [] if os.path.isfile(os.path.join(environment, "bin", "python")) else ["environment"]
    for name, entry in manifest["files"].items():
        if name in _wheel_files(manifest):
            continue
        try:
            if digest_file(os.path.join(folder, name)) != entry["sha256"]:
                wrong.append(name)
        except OSError:
            wrong.append(name)
    return wrong


def _wheel_files(manifest: dict[str, Any]) -> dict[str, str]:
    """Wheel file -> sha256: they go to the store, not into a slot."""
    return {wheel["file"]: wheel["sha256"] for wheel in manifest.get("wheels", ())}


# --- installing ------------------------------------------------------------------------------------
@contextlib.contextmanager
def locked(base: str) -> Iterator[None]:
    """One at a time on this device; what a killed one left is cleared first."""
    import fcntl

    os.makedirs(base, exist_ok=True)
    with open(os.path.join(base, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(
                "busy", "another deploy to this device is running", "wait for it, or end it on the device"
            ) from None
        _clear(base)
        yield


def _clear(base: str) -> None:
    """Remove half-made things. Nobody else is at work: the lock is ours."""
    for folder in (os.path.join(base, "store"), os.path.join(base, "environments"), *_slot_folders(base)):
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if name.startswith(_INCOMING):
                _remove(os.path.join(folder, name))


def _slot_folders(base: str) -> list[str]:
    root = os.path.join(base, "slots")
    return [os.path.join(root, name) for name in os.listdir(root)] if os.path.isdir(root) else []


def _remove(path: str) -> None:
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def do_install(request: Request, payload: BinaryIO) -> Reply:
    """Install the bundle that follows as a tar, test it, and put it in use.

    slot, digest: where, and of which manifest. keep: how many versions before this one stay. test: false for what is
    tested later, one artifact at a time, by whoever measures it.
    A version that is there already is only tested again and put in use; then no tar follows.
    """
    base, progress = base_of(request), Progress()
    slot, digest, testing = slot_path(base, request["slot"]), str(request["digest"]), bool(request.get("test", True))
    before_us = _standing(base)
    with locked(base):
        try:
            folder = os.path.join(slot, digest)
            before = current_of(slot)
            if request.get("empty"):
                if _differences(folder, digest):
                    raise Refused("bundle", "what is installed was altered", "deploy again")
                if testing:
                    _test(folder, progress)
            else:
                _install_from(payload, base, slot, digest, testing, progress)
            activate(slot, digest)
            removed = _forget(base, slot, int(request.get("keep", 1)))
            environment = read_json(os.path.join(folder, "installed.json"))["environment"]
        except BaseException:
            _tidy(base, slot, before_us)
            raise
    return {
        "digest": digest, "before": before, "folder": folder, "environment": environment, "removed": removed,
        "tested": testing,
    }  # fmt: skip


def _install_from(payload: BinaryIO, base: str, slot: str, digest: str, testing: bool, progress: Progress) -> None:
    """Put a version together beside its place, test it, and give it its name."""
    os.makedirs(slot, exist_ok=True)
    incoming, folder = os.path.join(slot, _MINE), os.path.join(slot, digest)
    try:
        _receive(base, incoming, digest, payload, progress)
        if testing:
            _test(incoming, progress)
        _sync_tree(incoming)
        if os.path.isdir(folder):  # altered, and not to be trusted
            _remove_other(slot, folder)
        os.rename(incoming, folder)
    finally:
        _remove(incoming)


def _remove_other(slot: str, folder: str) -> None:
    """Take an altered version away. Where it is the one in use, that is what is being mended."""
    aside = os.path.join(slot, _MINE + "-old")
    os.rename(folder, aside)
    _remove(aside)


def _tidy(base: str, slot: str, before_us: str) -> None:
    """After a failure: nothing that was not there before, as far as the device lets us.

    before_us: the nearest folder above that was there.
    """
    with contextlib.suppress(OSError, Refused):
        _collect(base)
        if os.path.isdir(slot) and not os.listdir(slot):
            os.rmdir(slot)
        if before_us != base and not any(files for _, _, files in os.walk(os.path.join(base, "slots"))):
            shutil.rmtree(base, ignore_errors=True)
            while os.path.dirname(base) != before_us:
                base = os.path.dirname(base)
                os.rmdir(base)


def _receive(base: str, folder: str, digest: str, payload: BinaryIO, progress: Progress) -> None:
    """Write the bundle that comes as a tar into `folder`: every file is known by its hash before it counts."""
    os.makedirs(folder)
    try:
        with tarfile.open(fileobj=payload, mode="r|") as tar:
            members = iter(tar)
            manifest = _first(members, tar, folder, digest)
            _check_fits(manifest)
            total = sum(int(entry["size_bytes"]) for entry in manifest["files"].values())
            done = 0
            seen: set[str] = set()
            for member in members:
                if member.name == SIGNATURE and not seen:
                    _write(tar.extractfile(member), os.path.join(folder, SIGNATURE), 1 << 16)
                    continue
                if not seen:
                    check_signature(folder)
                entry = manifest["files"].get(member.name)
                if entry is None or not member.isfile() or member.name in seen or not safe(member.name):
                    raise Refused("bundle", f"the bundle holds '{member.name}', which its manifest does not name")
                path = os.path.join(folder, member.name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                if _write(tar.extractfile(member), path, int(entry["size_bytes"])) != entry["sha256"]:
                    raise Refused(
                        "bundle", f"'{member.name}' is not what the bundle's manifest says", "make the bundle again"
                    )
                if member.mode & 0o100:
                    os.chmod(path, 0o755)
                seen.add(member.name)
                done += int(entry["size_bytes"])
                progress("upload", done, total)
            if not seen:
                check_signature(folder)
    except (tarfile.TarError, EOFError) as error:
        raise Refused("connection", f"the upload ended early: {error}", "deploy again") from None
    wheels = _wheel_files(manifest)
    for name in manifest["files"]:
        stored = name in wheels and os.path.isdir(os.path.join(base, "store", wheels[name]))
        if name not in seen and not stored:
            raise Refused("connection", f"the upload ended before '{name}'", "deploy again")
    _store_wheels(base, folder, manifest, progress)
    environment = make_environment(base, manifest, progress)
    write_text(os.path.join(folder, "environment"), environment + "\n")
    record = {"schema": AGENT_SCHEMA, "environment": environment, "installed": time.time()}
    write_text(os.path.join(folder, "installed.json"), json.dumps(record) + "\n")


def _first(members: Iterator[tarfile.TarInfo], tar: tarfile.TarFile, folder: str, digest: str) -> dict[str, Any]:
    """The manifest, which leads."""
    member = next(members, None)
    if member is None or member.name != MANIFEST or not member.isfile():
        raise Refused("bundle", f"the bundle does not begin with {MANIFEST}", "make the bundle again")
    path = os.path.join(folder, MANIFEST)
    if _write(tar.extractfile(member), path, 1 << 26) != digest:
        raise Refused("bundle", "the bundle's manifest was altered on its way", "deploy again")
    return check_manifest(path)


def check_manifest(path: str) -> dict[str, Any]:
    try:
        manifest = read_json(path)
    except ValueError:
        raise Refused("bundle", "the bundle's manifest is no JSON", "make the bundle again") from None
    if manifest.get("schema") != BUNDLE_SCHEMA or manifest.get("kind") != "bundle":
        raise Refused("bundle", f"the bundle has schema {manifest.get('schema')!r}, this reads 1", "make it again")
    return manifest


def safe(name: str) -> bool:
    """No path that leads out of its folder."""
    parts = name.split("/")
    return bool(name) and not name.startswith("/") and "\\" not in name and not any(p in ("", ".", "..") for p in parts)


def _write(source: Any, path: str, limit: int) -> str:
    """At most `limit` bytes into a new file, on the disk when this returns; returns their sha256."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        while True:
            block = source.read(_BLOCK)
            if not block:
                break
            size += len(block)
            if size > limit:
                raise Refused("bundle", f"'{os.path.basename(path)}' is larger than the bundle's manifest says")
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _check_fits(manifest: dict[str, Any]) -> None:
    """The host has looked before; a bundle that is installed by hand, or from elsewhere, is looked at here."""
    wanted, own = manifest.get("requires", {}), facts()
    for key, name in (("arch", ""), ("python", "Python ")):
        if wanted.get(key) and wanted[key] != own[key]:
            told = f"this bundle is for {name}{wanted[key]}, this device has {name}{own[key]}"
            raise Refused("device", told, "make a bundle for this device")
    if wanted.get("glibc") and own["glibc"] is None:
        raise Refused("device", f"this bundle needs glibc {wanted['glibc']}, this device has none")
    if wanted.get("glibc") and numbers(own["glibc"]) < numbers(wanted["glibc"]):
        told = f"this bundle needs glibc {wanted['glibc']}, this device has {own['glibc']}"
        raise Refused("device", told, "upgrade its system")
    needed = wanted.get("device_packages") or {}
    found = packages(needed)
    for name, spec in needed.items():
        if not found[name] or not satisfies(str(found[name]), spec):
            told = (
                f"the device's Python has {name} {found[name]}" if found[name] else f"the device's Python has no {name}"
            )
            remedy = f"on the device: sudo apt install python3-{_DEBIAN.get(name, name)}"
            raise Refused("device", f"{told}; {name} {spec} is needed and has no wheel for it", remedy)


def satisfies(version: str, spec: str) -> bool:
    """Whether a version is within bounds such as ">=1.23.2,<2"; a bare number is the least."""
    own = numbers(version)
    for part in filter(None, (p.strip() for p in spec.split(","))):
        below = part.startswith("<")
        if below == (own >= numbers(part)):
            return False
    return True


def numbers(version: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", str(version))[:3])


def check_signature(folder: str) -> None:
    """On a device that names whom it trusts, the manifest must be signed by one of them."""
    signers = os.path.expanduser(SIGNERS)
    if not os.path.isfile(signers):
        return
    signature, manifest = os.path.join(folder, SIGNATURE), os.path.join(folder, MANIFEST)
    if not os.path.isfile(signature):
        raise Refused("signature", "this device takes signed bundles only", "deploy with --sign KEY")
    if shutil.which("ssh-keygen") is None:
        raise Refused("signature", "the device has no ssh-keygen to check signatures with", "install openssh-client")
    find = ["ssh-keygen", "-Y", "find-principals", "-s", signature, "-f", signers]
    found = subprocess.run(find, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    who = found.stdout.decode(errors="replace").splitlines()
    if found.returncode or not who:
        told = "the bundle's signer is not among the device's allowed signers"
        raise Refused("signature", told, f"add the key to {SIGNERS} on the device")
    verify = ["ssh-keygen", "-Y", "verify", "-f", signers, "-I", who[0], "-n", NAMESPACE, "-s", signature]
    with open(manifest, "rb") as file:
        done = subprocess.run(verify, stdin=file, capture_output=True, check=False)
    if done.returncode:
        raise Refused("signature", "the bundle's signature does not fit: it was altered", "make it again and sign it")


# --- wheels and environments -----------------------------------------------------------------------
def _store_wheels(base: str, folder: str, manifest: dict[str, Any], progress: Progress) -> None:
    wheels = _wheel_files(manifest)
    for index, (name, sha) in enumerate(wheels.items()):
        progress("unpack wheels", index, len(wheels))
        path = os.path.join(folder, name)
        if not os.path.isdir(os.path.join(base, "store", sha)):
            unpack_wheel(path, os.path.join(base, "store"), sha)
        if os.path.isfile(path):
            os.unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.join(folder, "wheels"))


def unpack_wheel(path: str, store: str, sha: str) -> None:
    """Unzip a wheel, whose hash is known to be `sha`, into store/sha, its purelib and platlib where they belong."""
    os.makedirs(store, exist_ok=True)
    incoming = os.path.join(store, _MINE)
    try:
        os.makedirs(incoming)
        try:
            with zipfile.ZipFile(path) as archive:
                if not all(safe(name.rstrip("/")) for name in archive.namelist()):
                    raise Refused("bundle", f"'{os.path.basename(path)}' holds paths that lead out of it")
                archive.extractall(incoming)
        except zipfile.BadZipFile:
            raise Refused("bundle", f"'{os.path.basename(path)}' is no wheel", "make the bundle again") from None
        for data in [name for name in os.listdir(incoming) if name.endswith(".data")]:
            for part in ("purelib", "platlib"):
                source = os.path.join(incoming, data, part)
                for name in os.listdir(source) if os.path.isdir(source) else ():
                    os.rename(os.path.join(source, name), os.path.join(incoming, name))
        _sync_tree(incoming)
        os.rename(incoming, os.path.join(store, sha))
    finally:
        _remove(incoming)


def make_environment(base: str, manifest: dict[str, Any], progress: Progress) -> str:
    """The folder of the environment for this bundle, made if it is not there."""
    wheels = sorted(_wheel_files(manifest).values())
    online = sorted(manifest.get("online") or ())
    system = bool(manifest.get("requires", {}).get("device_packages"))
    identity = json.dumps([wheels, online, system, sys.version, sys.executable])
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    final = os.path.join(base, "environments", name)
    if os.path.isfile(os.path.join(final, "bin", "python")):
        return final
    progress("environment")
    if not _has_venv():
        raise Refused("device", "this Python has no venv module", "on the device: sudo apt install python3-venv")
    os.makedirs(os.path.dirname(final), exist_ok=True)
    incoming = os.path.join(base, "environments", _MINE)
    try:
        command = [sys.executable, "-m", "venv", *([] if online else ["--without-pip"])]
        _run([*command, *(["--system-site-packages"] if system else []), incoming], "make an environment")
        if online:
            pip = [os.path.join(incoming, "bin", "python"), "-m", "pip", "install", "-q", "--no-input", *online]
            _run(pip, f"install {', '.join(online)} on the device")
        site = _site_packages(incoming)
        paths = [os.path.join(base, "store", sha) for sha in wheels]
        write_text(os.path.join(site, "edgekit.pth"), "".join(path + "\n" for path in paths))
        _sync_tree(incoming)
        _remove(final)
        os.rename(incoming, final)
    finally:
        _remove(incoming)
    return final


def _site_packages(environment: str) -> str:
    return os.path.join(environment, "lib", f"python{PYTHON}", "site-packages")


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        text = done.stdout.decode(errors="replace")
        if "No space left" in text:
            raise Refused("disk", f"no space left to {what}", "free some space, or choose another --folder")
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise Refused("failed", f"cannot {what}: {lines[-1][:300]}")


def _sync_tree(folder: str) -> None:
    """All of it on the disk before its name counts: the power may go at any time."""
    for path, _, files in os.walk(folder):
        for name in [path, *(os.path.join(path, f) for f in files)]:
            if os.path.islink(name):
                continue
            descriptor = os.open(name, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # a file system that cannot
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)


# --- which one is in use ---------------------------------------------------------------------------
def activate(slot: str, digest: str) -> None:
    """Put a version in use: one rename of a link."""
    if current_of(slot) != digest:
        link = os.path.join(slot, _MINE + "-link")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)
        os.symlink(digest, link)
        os.replace(link, os.path.join(slot, "current"))
    if versions(slot)[-1:] != [digest]:
        with open(os.path.join(slot, "history"), "a", encoding="ascii") as file:
            file.write(digest + "\n")
            file.flush()
            os.fsync(file.fileno())


def do_rollback(request: Request, payload: BinaryIO) -> Reply:
    """Put the version before the current one in use, after testing it."""
    base = base_of(request)
    slot = slot_path(base, request["slot"])
    if not os.path.isdir(slot):
        raise Refused("missing", f"'{request['slot']}' was never deployed here", "deploy it first")
    with locked(base):
        current = current_of(slot)
        before = [digest for digest in versions(slot) if digest != current]
        if not before:
            raise Refused("missing", f"there is no version of '{request['slot']}' before this one", "deploy one")
        folder = os.path.join(slot, before[-1])
        wrong = _differences(folder, before[-1])
        if wrong:
            raise Refused("bundle", f"the version before was altered: {', '.join(wrong[:3])}", "deploy again")
        _test(folder, Progress())
        activate(slot, before[-1])
    return {"digest": before[-1], "before": current, "folder": folder}


def do_remove(request: Request, payload: BinaryIO) -> Reply:
    """Take everything of a slot away, and what only it used."""
    base = base_of(request)
    slot = slot_path(base, request["slot"])
    if not os.path.isdir(slot):
        raise Refused("missing", f"'{request['slot']}' is not deployed here", "")
    with locked(base):
        removed = versions(slot)
        shutil.rmtree(slot)
        _collect(base)
    return {"removed": removed}


def _forget(base: str, slot: str, keep: int) -> list[str]:
    """Remove versions older than the `keep` before the current one, and what nothing uses any more."""
    current = current_of(slot)
    old = [digest for digest in versions(slot) if digest != current]
    gone = old[: max(0, len(old) - keep)]
    for digest in gone:
        shutil.rmtree(os.path.join(slot, digest), ignore_errors=True)
    _collect(base)
    return gone


def _collect(base: str) -> None:
    """Remove environments that no installed bundle names and wheels that no environment names."""
    used, wheels = set(), set()
    for slot in _slot_folders(base):
        for digest in os.listdir(slot) if os.path.isdir(slot) else ():
            folder = os.path.join(slot, digest)
            with contextlib.suppress(OSError, ValueError, KeyError):
                used.add(read_json(os.path.join(folder, "installed.json"))["environment"])
                wheels |= set(_wheel_files(read_json(os.path.join(folder, MANIFEST))).values())
    for name, kept in (("environments", {os.path.basename(u) for u in used}), ("store", wheels)):
        root = os.path.join(base, name)
        for entry in os.listdir(root) if os.path.isdir(root) else ():
            if entry not in kept and not entry.startswith(_INCOMING):
                _remove(os.path.join(root, entry))


# --- the self-test ---------------------------------------------------------------------------------
def _test(folder: str, progress: Progress) -> None:
    """Run the golden inputs with the bundle's own environment, each artifact in a process of its own."""
    manifest = read_json(os.path.join(folder, MANIFEST))
    python = os.path.join(read_json(os.path.join(folder, "installed.json"))["environment"], "bin", "python")
    for index, name in enumerate(manifest["candidates"]):
        progress("self-test", index, len(manifest["candidates"]))
        why = run_self_test(python, folder, name)
        if why is not None:
            raise Refused("selftest", f"{name}: {why}", "please report this model and device")


def run_self_test(python: str, folder: str, candidate: str) -> str | None:
    """None where the artifact answers as it did when the bundle was made, else how it differs."""
    command = [python, os.path.join(folder, "selftest.py"), folder, candidate]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=_SELF_TEST_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer to the golden inputs in {_SELF_TEST_S:.0f} s"
    lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith("{")]
    if lines:
        difference: str | None = json.loads(lines[-1])["difference"]
        return difference
    said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()] or [""]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return f"the self-test ended with {how}: {said[-1][:300]}"


# --- by hand ---------------------------------------------------------------------------------------
def prepare(folder: str) -> None:
    """Make the environment of an unpacked bundle inside it, and test it: what `run` does when it runs first."""
    folder = os.path.abspath(folder)
    manifest = check_manifest(os.path.join(folder, MANIFEST))
    check_signature(folder)
    _check_fits(manifest)
    for name, entry in manifest["files"].items():
        if not safe(name) or digest_file(os.path.join(folder, name)) != entry["sha256"]:
            raise Refused("bundle", f"'{name}' is not what the bundle's manifest says", "unpack the bundle again")
    base = os.path.join(folder, ".edgekit")
    for name, sha in _wheel_files(manifest).items():
        if not os.path.isdir(os.path.join(base, "store", sha)):
            unpack_wheel(os.path.join(folder, name), os.path.join(base, "store"), sha)
    environment = make_environment(base, manifest, lambda *_: None)  # type: ignore[arg-type]
    write_text(os.path.join(folder, "installed.json"), json.dumps({"environment": environment}) + "\n")
    python = os.path.join(environment, "bin", "python")
    for name in manifest["candidates"]:
        why = run_self_test(python, folder, name)
        if why is not None:
            raise Refused("selftest", f"{name}: {why}")
    write_text(os.path.join(folder, "environment"), environment + "\n")


def main(words: list[str]) -> int:
    if len(words) == 2 and words[0] == "prepare":
        try:
            prepare(words[1])
        except Refused as error:
            sys.stderr.write(f"error: {' - '.join(filter(None, (error.error, error.remedy)))}\n")
            return 1
        return 0
    sys.stderr.write("usage: agent.py prepare BUNDLE\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
