"""A bundle as bytes: its files, the .tar or folder that holds them, read back with every byte checked."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from edgekit import artifact
from edgekit.deploy import sign
from edgekit.errors import BundleError, OutputExistsError

BUNDLE_SCHEMA = 1  # 1: first
MANIFEST, SIGNATURE = "manifest.json", "manifest.json.sig"
_BLOCK = 1 << 20


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
            length = size(source)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = length, 0o755 if name == "run" else 0o644
            yield entry.tobuf(tarfile.PAX_FORMAT)
            yield from blocks(source)
            yield b"\0" * (-length % tarfile.BLOCKSIZE)
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
                found[file.relative_to(path).as_posix()] = part(file)
    return found


def _in_tar(path: Path) -> dict[str, Part]:
    found: dict[str, Part] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or not safe(member.name) or member.name in found:
                    raise BundleError(
                        f"'{path}' holds '{member.name}', which no bundle has", "take it from where it was made"
                    )
                found[member.name] = Part(path, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise BundleError(f"'{path}' is no bundle: {error}", "make the bundle again") from error
    return found


def safe(name: str) -> bool:
    """No path that leads out of its folder."""
    parts = name.split("/")
    return bool(name) and "\\" not in name and "\0" not in name and not any(p in ("", ".", "..") for p in parts)


def _checked(path: Path, found: Mapping[str, Part]) -> Bundle:
    again = "make the bundle again"
    if MANIFEST not in found:
        raise BundleError(f"'{path}' is no bundle: it has no {MANIFEST}", again)
    text = content(found[MANIFEST])
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise BundleError(f"the {MANIFEST} of '{path}' is damaged: {error}", again) from error
    _check_form(path, manifest)
    for name, entry in manifest["files"].items():
        source = found.get(name)
        if source is None:
            raise BundleError(f"'{path}' lacks '{name}'", again)
        if source.size != entry["size_bytes"] or digest(source) != entry["sha256"]:
            raise BundleError(f"'{name}' of '{path}' is not what its {MANIFEST} says: it was altered", again)
    extra = sorted(set(found) - set(manifest["files"]) - {MANIFEST, SIGNATURE})
    if extra and path.is_file():
        raise BundleError(f"'{path}' holds '{extra[0]}', which its {MANIFEST} does not name", again)
    signature = content(found[SIGNATURE]) if SIGNATURE in found else None
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
        wrong = [f"files.{name}" for name, entry in manifest["files"].items() if not safe(name) or not _known(entry)]
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
                for block in blocks(source):
                    file.write(block)
            if name == "run":
                path.chmod(0o755)


# --- bytes -----------------------------------------------------------------------------------------
def part(path: Path) -> Part:
    return Part(path, 0, path.stat().st_size)


def size(source: Source) -> int:
    return len(source) if isinstance(source, bytes) else source.size


def _open(source: Source) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    file = source.path.open("rb")
    file.seek(source.offset)
    return file


def blocks(source: Source) -> Iterator[bytes]:
    """All of it, a megabyte at a time. Raises BundleError for a file that became shorter."""
    left = size(source)
    with _open(source) as file:
        while left:
            block = file.read(min(_BLOCK, left))
            if not block:
                raise BundleError("a file of the bundle was changed while it was read", "make the bundle again")
            left -= len(block)
            yield block


def content(source: Source) -> bytes:
    return b"".join(blocks(source))


def digest(source: Source) -> str:
    found = sha256()
    for block in blocks(source):
        found.update(block)
    return found.hexdigest()
