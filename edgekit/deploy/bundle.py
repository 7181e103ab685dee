"""A bundle: everything that a device needs to run an artifact, as a folder or one .tar; the form is in ADR 0009.

The same build, device and wheels give the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from edgekit import __version__, artifact, backends, fitting
from edgekit.bench import client, machine
from edgekit.dataset import Dataset
from edgekit.deploy import golden, sign, wheels
from edgekit.deploy.wheels import DeviceFacts
from edgekit.errors import ArtifactError, BundleError, DeviceError, OutputExistsError
from edgekit.report.progress import Progress, silent
from edgekit.target import Target

BUNDLE_SCHEMA = 1  # 1: first
MANIFEST, SIGNATURE = "manifest.json", "manifest.json.sig"
PACKAGES = ("numpy", "PIL")  # import names of which a device may have to have its own
ON_DEVICE = Path(__file__).parent / "on_device"
# what travels besides the artifact: name in the bundle -> file
TRAVELLING: Mapping[str, Path] = {
    **{name: ON_DEVICE / name for name in ("agent.py", "answers.py", "inputs.py", "run.py", "selftest.py")},
    "transform.py": ON_DEVICE.parent.parent / "transform.py",
    "worker.py": client.WORKER_FILE,
    "machine.py": Path(machine.__file__),
}
_RUN = """#!/bin/sh
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd -P) || exit 2
[ -f "$here/environment" ] || python3 "$here/agent.py" prepare "$here" >&2 || exit 2
exec "$(cat "$here/environment")/bin/python" "$here/run.py" "$@"
"""
_SLOTS = "%h/.local/share/edgekit/slots"  # in systemd's terms; where deploy puts bundles
_BLOCK = 1 << 20
_UNITS: Mapping[str, str] = {
    "edgekit-{name}.socket": """[Unit]
Description=Predictions of {name}, one line of input at a time

[Socket]
ListenStream=%t/edgekit-{name}.socket
SocketMode=0600
Accept=yes
MaxConnections=4

[Install]
WantedBy=sockets.target
""",
    "edgekit-{name}@.service": """[Unit]
Description=Predictions of {name} for one connection

[Service]
ExecStart={run} --stdin
StandardInput=socket
StandardError=journal
NoNewPrivileges=yes
""",
}


@dataclass(frozen=True)
class Part:
    """Bytes of a file. offset: where they begin; size: how many."""

    path: Path
    offset: int
    size: int


Source = bytes | Part


@dataclass(frozen=True)
class Bundle:
    """text: manifest.json. sources: every other file. signature: manifest.json.sig. notes: for the user."""

    text: bytes
    sources: Mapping[str, Source]
    signature: bytes | None = None
    notes: tuple[str, ...] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """By which it is known: sha256 of the manifest, which has those of all files."""
        return sha256(self.text).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return len(self.text) + sum(int(f["size_bytes"]) for f in self.manifest["files"].values())

    def files(self) -> Iterator[tuple[str, Source]]:
        """(name, content) of every file, the manifest first, its signature next, the others in order."""
        yield MANIFEST, self.text
        if self.signature is not None:
            yield SIGNATURE, self.signature
        yield from sorted(self.sources.items())

    def tar_stream(self, skip: Collection[str] = ()) -> Iterator[bytes]:
        """The bundle as a tar, block by block. skip: sha256 of files that are left out."""
        for name, source in self.files():
            if name in self.manifest["files"] and self.manifest["files"][name]["sha256"] in skip:
                continue
            size = _size(source)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = size, 0o755 if name == "run" else 0o644
            yield entry.tobuf(tarfile.PAX_FORMAT)
            yield from _blocks(source)
            yield b"\0" * (-size % tarfile.BLOCKSIZE)
        yield b"\0" * (2 * tarfile.BLOCKSIZE)

    def disk_bytes(self, store: Collection[str] = ()) -> int:
        """What installing takes at most. store: sha256 of wheels that are unpacked there already."""
        needed = self.size_bytes
        for wheel in self.manifest["wheels"]:
            if wheel["sha256"] in store:
                needed -= int(self.manifest["files"][wheel["file"]]["size_bytes"])
            else:
                needed += int(wheel["unpacked_bytes"])
        return needed

    def signed(self, key: Path) -> Bundle:
        """The same with a signature by an ssh key. Raises SignatureError."""
        return replace(self, signature=sign.sign(self.text, key))

    def verify(self, signers: Path) -> str:
        """Who signed it, of those in an allowed_signers file. Raises SignatureError."""
        return sign.verify(self.text, self.signature, signers)

    def write(self, out: Path) -> Path:
        """As a folder or, where `out` ends in .tar, as one file; nothing of that name is there before it is whole."""
        if out.suffix == ".tar":
            _write_tar(self, out)
        else:
            _write_folder(self, out)
        return out

    def to_json(self) -> dict[str, Any]:
        """What it is, for a summary."""
        told = self.manifest
        listed = [
            {"name": w["name"], "version": w["version"], "size_bytes": told["files"][w["file"]]["size_bytes"]}
            for w in told["wheels"]
        ]
        kept = ("name", "target", "ship", "runtimes", "requires")
        return {
            "digest": self.digest,
            "size_bytes": self.size_bytes,
            **{key: told[key] for key in kept},
            "candidates": sorted(told["candidates"]),
            "wheels": listed,
            "signed": self.signature is not None,
            "notes": list(self.notes),
        }


def make(
    root: Path,
    target: Target,
    candidates: Sequence[str],
    device: DeviceFacts,
    *,
    online: bool = False,
    service: bool = False,
    data: str | Path | Dataset | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Bundle:
    """A bundle of artifacts of the build `root`; the first is what `run` runs.

    One that needs more memory than the device has is left out, with a note, where there are others.

    online: without wheels, the device fetches them. service: with systemd user units. data: for the golden inputs.
    Raises ArtifactError, BundleError, WheelError, and DeviceError for a device that cannot run it.
    """
    if not candidates:
        raise BundleError("no candidate was named", "name one at least")
    folders = {candidate: root / target.name / candidate for candidate in candidates}
    manifests = {candidate: _read(folder) for candidate, folder in folders.items()}
    called = name or name_of(root)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", called):
        raise BundleError(f"'{called}' is no name for a bundle", "letters, digits, '_', '-', '+' and '.'")
    first = manifests[candidates[0]]
    used = list(dict.fromkeys(m.backend for m in manifests.values()))
    for candidate, folder in folders.items():
        if target.device is not None:
            fitting.check_runtime(target.device, backends.get(manifests[candidate].backend), folder)
    sources: dict[str, Source] = {}
    entries: dict[str, Any] = {}
    left_out = []
    for candidate, folder in folders.items():
        progress(f"golden inputs of {candidate}", 0, 0)
        run = golden.make(root, folder, manifests[candidate], target.device, data, seed)
        too_large = _too_large(candidate, run, device)
        if too_large is not None:
            left_out.append(too_large)
            continue
        entries[candidate] = _entry(manifests[candidate], run)
        sources[entries[candidate]["golden"]] = run.npz()
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            sources[f"{entries[candidate]['folder']}/{path.relative_to(folder).as_posix()}"] = _part(path)
    if not entries:
        raise DeviceError("; ".join(left_out), "use int8, or a smaller model")
    sources.update({f"runners/{n}.py": backends.get(n).RUNNER.read_bytes() for n in used})
    sources.update({file: path.read_bytes() for file, path in TRAVELLING.items()})
    sources["run"] = _RUN.encode()
    if service:
        sources.update({f"service/{file}": text.encode() for file, text in units(called).items()})
    chosen = wheels.choose(used, device, target.device, images=takes_images(first.signature), progress=progress)
    listed: list[dict[str, Any]] = []
    for wheel in () if online else chosen.wheels:
        file = f"wheels/{wheel.path.name}"
        sources[file] = _part(wheel.path)
        listed.append(
            {
                "file": file,
                "name": wheel.name,
                "version": wheel.version,
                "sha256": wheel.sha256,
                "unpacked_bytes": _unpacked(wheel.path),
            }
        )
    hashed = {file: {"sha256": _sha256(source), "size_bytes": _size(source)} for file, source in sources.items()}
    requires: dict[str, Any] = {
        "arch": device.arch,
        "bits": device.bits,
        "python": device.python,
        "glibc": chosen.glibc,
        # at least; what a run takes was measured, which is not the same twice, and is checked above
        "memory_bytes": max(manifests[candidate].size_bytes for candidate in entries),
        "disk_bytes": sum(f["size_bytes"] for f in hashed.values()) + sum(w["unpacked_bytes"] for w in listed),
        "device_packages": dict(chosen.system_packages),
    }
    manifest = {
        "schema": BUNDLE_SCHEMA,
        "kind": "bundle",
        "name": called,
        "target": target.name,
        "edgekit": __version__,
        "ship": next(iter(entries)),
        "candidates": entries,
        "requires": requires,
        "wheels": listed,
        "online": chosen.requirements if online else [],
        "runtimes": {n: _runtime(n, target, chosen) for n in used},
        "inputs": list(first.signature["inputs"]),
        "outputs": list(first.signature["outputs"]),
        "preprocessing": first.preprocessing,
        "labels": list(first.labels),
        "threads": device.cores or (target.device.cores if target.device is not None else None) or 1,
        "files": hashed,
    }
    return _bundle(manifest, sources, (*left_out, *chosen.notes))


def _bundle(manifest: dict[str, Any], sources: Mapping[str, Source], notes: tuple[str, ...]) -> Bundle:
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    return Bundle(text.encode(), sources, notes=notes, manifest=manifest)


def _read(folder: Path) -> artifact.Manifest:
    """An artifact that may be shipped: whole, and not proved wrong."""
    if not (folder / artifact.MANIFEST).is_file():
        there = sorted(p.name for p in folder.parent.glob("*") if (p / artifact.MANIFEST).is_file())
        raise ArtifactError(
            f"no artifact '{folder}'" + (f" (there are {', '.join(there)})" if there else ""), "convert the model first"
        )
    manifest = artifact.read_manifest(folder)
    reasons = (manifest.parity or {}).get("reasons") or ()
    if reasons:
        raise BundleError(f"{manifest.id} was proved wrong when it was made: {'; '.join(reasons)}", "ship another one")
    return manifest


def _entry(manifest: artifact.Manifest, run: golden.Golden) -> dict[str, Any]:
    return {
        "backend": manifest.backend,
        "precision": manifest.precision,
        "variant": manifest.variant,
        "folder": f"artifacts/{manifest.id}",
        "runner": f"runners/{manifest.backend}.py",
        "sha256": manifest.sha256,
        "golden": f"golden/{manifest.id}.npz",
        "tolerance": run.tolerance,
    }


def _runtime(backend: str, target: Target, chosen: wheels.Chosen) -> str:
    """The version there; with the package's name where the profile chooses another than the usual one."""
    told = target.device.runtime(backend) if target.device is not None else None
    return " ".join(told) if told is not None else chosen.versions[backends.get(backend).WHEELS[0]]


def name_of(root: Path | str) -> str:
    """What a build's bundles are called: as the model's file."""
    for folder in artifact.artifacts(Path(root)):
        file = Path(str(artifact.read_manifest(folder, verify=False).source.get("file") or "model")).stem
        return re.sub(r"[^A-Za-z0-9_.+-]+", "-", file).strip("-.+") or "model"
    raise ArtifactError(f"build '{root}' holds no artifact", "run `edgekit convert MODEL` first")


def takes_images(signature: Mapping[str, Any]) -> bool:
    """Whether the only input is of pixels, by its shape: (n, h, w, c) or (n, c, h, w) with 1, 3 or 4 channels."""
    inputs = signature["inputs"]
    shape = inputs[0]["shape"]
    return len(inputs) == 1 and len(shape) == 4 and bool({shape[1], shape[3]} & {1, 3, 4})


def units(name: str, run: str | None = None) -> dict[str, str]:
    """systemd user units: file name -> text. A socket, and a process for each connection, that answers line by line.

    run: the program, in systemd's terms; None: where deploy puts it.
    """
    program = run or f"{_SLOTS}/{name}/current/run"
    return {file.format(name=name): text.format(name=name, run=program) for file, text in _UNITS.items()}


# --- the device ------------------------------------------------------------------------------------
def _too_large(candidate: str, run: golden.Golden, device: DeviceFacts) -> str | None:
    have, needed = device.memory_bytes, run.peak_rss_bytes
    if have is None or needed is None or needed <= have:
        return None
    sizes = f"{needed / fitting.MIB:.0f} MB of memory (measured here), the device has {have / fitting.MIB:.0f} MB"
    return f"{device.host}: {candidate} takes {sizes}"


def check_fits(manifest: Mapping[str, Any], device: DeviceFacts) -> None:
    """Raise BundleError where a bundle that was made before is for another device."""
    wanted = manifest["requires"]
    remedy = "make a bundle for this device"
    for key, what in (("arch", ""), ("python", "Python ")):
        have = getattr(device, key)
        if wanted[key] != have:
            raise BundleError(f"{device.host}: the bundle is for {what}{wanted[key]}, it has {what}{have}", remedy)
    if wanted["glibc"] is not None and (
        device.glibc is None or wheels.numbers(device.glibc) < wheels.numbers(wanted["glibc"])
    ):
        told = f"glibc {device.glibc}" if device.glibc else "another C library"
        raise BundleError(f"{device.host}: the bundle needs glibc {wanted['glibc']}, it has {told}", remedy)
    if wanted["memory_bytes"] and device.memory_bytes and wanted["memory_bytes"] > device.memory_bytes:
        sizes = (
            f"{wanted['memory_bytes'] / fitting.MIB:.0f} MB of memory, it has {device.memory_bytes / fitting.MIB:.0f}"
        )
        raise BundleError(f"{device.host}: the bundle needs {sizes} MB", "use int8, or a smaller model")


# --- reading ---------------------------------------------------------------------------------------
def is_bundle(path: Path) -> bool:
    """Whether it looks like one; `open_bundle` tells what is wrong with it."""
    if path.is_dir():
        try:
            told = json.loads((path / MANIFEST).read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(told, dict) and told.get("kind") == "bundle"
    return path.is_file() and path.suffix == ".tar"


def open_bundle(path: Path) -> Bundle:
    """Read a bundle, every byte checked against its manifest. Raises BundleError."""
    try:
        return _checked(path, _in_folder(path) if path.is_dir() else _in_tar(path))
    except OSError as error:
        raise BundleError(f"cannot read '{path}': {error.strerror or error}", "make the bundle again") from error


def _in_folder(path: Path) -> dict[str, Part]:
    if not (path / MANIFEST).is_file():
        raise BundleError(f"'{path}' is no bundle: it has no {MANIFEST}", "make one with `edgekit deploy --bundle`")
    found = {}
    for folder, names, files in os.walk(path):
        # a bundle that ran in place has an environment there
        names[:] = [n for n in names if n != ".edgekit"]
        for name in files:
            file = Path(folder) / name
            if not file.is_symlink():
                found[file.relative_to(path).as_posix()] = _part(file)
    return found


def _in_tar(path: Path) -> dict[str, Part]:
    found: dict[str, Part] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or not _safe(member.name) or member.name in found:
                    raise BundleError(
                        f"'{path}' holds '{member.name}', which no bundle has", "take it from where it was made"
                    )
                found[member.name] = Part(path, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise BundleError(f"'{path}' is no bundle: {error}", "make the bundle again") from error
    return found


def _safe(name: str) -> bool:
    """No path that leads out of its folder."""
    parts = name.split("/")
    return bool(name) and "\\" not in name and "\0" not in name and not any(p in ("", ".", "..") for p in parts)


def _checked(path: Path, found: Mapping[str, Part]) -> Bundle:
    again = "make the bundle again"
    if MANIFEST not in found:
        raise BundleError(f"'{path}' is no bundle: it has no {MANIFEST}", again)
    text = _content(found[MANIFEST])
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise BundleError(f"the {MANIFEST} of '{path}' is damaged: {error}", again) from error
    _check_form(path, manifest)
    for name, entry in manifest["files"].items():
        source = found.get(name)
        if source is None:
            raise BundleError(f"'{path}' lacks '{name}'", again)
        if source.size != entry["size_bytes"] or _sha256(source) != entry["sha256"]:
            raise BundleError(f"'{name}' of '{path}' is not what its {MANIFEST} says: it was altered", again)
    extra = sorted(set(found) - set(manifest["files"]) - {MANIFEST, SIGNATURE})
    if extra and path.is_file():
        raise BundleError(f"'{path}' holds '{extra[0]}', which its {MANIFEST} does not name", again)
    signature = _content(found[SIGNATURE]) if SIGNATURE in found else None
    return Bundle(text, {n: found[n] for n in manifest["files"]}, signature, manifest=manifest)


def _check_form(path: Path, manifest: Any) -> None:
    """The fields that are used before a device sees it."""
    if not isinstance(manifest, dict) or manifest.get("kind") != "bundle":
        raise BundleError(f"'{path}' is no bundle", "make one with `edgekit deploy --bundle`")
    if manifest.get("schema") != BUNDLE_SCHEMA:
        told = f"'{path}' is a bundle of schema {manifest.get('schema')!r}"
        raise BundleError(told, f"this edgekit reads schema {BUNDLE_SCHEMA}; make it again")
    kinds = {
        "name": str,
        "target": str,
        "ship": str,
        "candidates": dict,
        "requires": dict,
        "wheels": list,
        "files": dict,
    }
    wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    if not wrong:
        wrong = [f"files.{name}" for name, entry in manifest["files"].items() if not _safe(name) or not _known(entry)]
    if not wrong:
        needed = {"arch", "python", "glibc", "memory_bytes"} - set(manifest["requires"])
        wrong = [f"requires.{key}" for key in sorted(needed)]
    if not wrong and manifest["ship"] not in manifest["candidates"]:
        wrong = ["ship"]
    if wrong:
        raise BundleError(f"the {MANIFEST} of '{path}' is damaged at '{wrong[0]}'", "make the bundle again")


def _known(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("size_bytes"), int)


# --- writing ---------------------------------------------------------------------------------------
def _write_tar(bundle: Bundle, out: Path) -> None:
    if out.is_dir():
        raise OutputExistsError(f"'{out}' is a folder", "choose another name")
    with artifact.disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{out.name}-", dir=out.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                for block in bundle.tar_stream():
                    file.write(block)
            Path(name).chmod(0o644)
            os.replace(name, out)
        finally:
            Path(name).unlink(missing_ok=True)


def _write_folder(bundle: Bundle, out: Path) -> None:
    if out.exists() and not is_bundle(out) and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"'{out}' is not empty and is no bundle", "choose another name")
    with artifact.disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with artifact.staged(out.parent, out) as folder:
        for name, source in bundle.files():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for block in _blocks(source):
                    file.write(block)
            if name == "run":
                path.chmod(0o755)


# --- bytes -----------------------------------------------------------------------------------------
def _part(path: Path) -> Part:
    return Part(path, 0, path.stat().st_size)


def _size(source: Source) -> int:
    return len(source) if isinstance(source, bytes) else source.size


def _open(source: Source) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    file = source.path.open("rb")
    file.seek(source.offset)
    return file


def _blocks(source: Source) -> Iterator[bytes]:
    """All of it, a megabyte at a time. Raises BundleError for a file that became shorter."""
    left = _size(source)
    with _open(source) as file:
        while left:
            block = file.read(min(_BLOCK, left))
            if not block:
                raise BundleError("a file of the bundle was changed while it was read", "make the bundle again")
            left -= len(block)
            yield block


def _content(source: Source) -> bytes:
    return b"".join(_blocks(source))


def _sha256(source: Source) -> str:
    digest = sha256()
    for block in _blocks(source):
        digest.update(block)
    return digest.hexdigest()


def _unpacked(wheel: Path) -> int:
    with zipfile.ZipFile(wheel) as archive:
        return sum(entry.file_size for entry in archive.infolist())
