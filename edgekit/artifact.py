"""Artifacts on disk: staged, hashed, renamed into place, and described by a manifest.

A build folder holds `<target>/<backend>-<precision>/` artifacts, `results.jsonl` and `.cache/` stages by content.
What is half-written lives in `.staging-*` and never carries a final name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.errors import ArtifactError, DiskError, OutputExistsError

MANIFEST_SCHEMA = 1  # 1: first
BUILD_SCHEMA = 1  # 1: first
MANIFEST = "manifest.json"
_MARKER = ".edgekit"
_STAGING = ".staging-"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and where it came from. Holds no time: the same inputs give the same manifest.

    identity: sha256 over everything that decides the content; a repeated run reuses an artifact of the same identity.
    files: name -> {"sha256", "size_bytes"}.
    """

    target: str
    backend: str
    precision: str
    identity: str
    signature: Mapping[str, Any]
    source: Mapping[str, Any]
    parents: tuple[str, ...] = ()
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    parity: Mapping[str, Any] | None = None
    tools: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.backend}-{self.precision}"

    @property
    def size_bytes(self) -> int:
        return sum(int(f["size_bytes"]) for f in self.files.values())

    @property
    def sha256(self) -> str:
        """One digest for all files."""
        return digest_json({name: f["sha256"] for name, f in self.files.items()})

    def to_json(self) -> dict[str, Any]:
        out = {"schema": MANIFEST_SCHEMA, **{k: getattr(self, k) for k in self.__dataclass_fields__}}
        out["parents"], out["notes"] = list(self.parents), list(self.notes)
        return out

    @staticmethod
    def from_json(data: Mapping[str, Any], where: Path) -> Manifest:
        if data.get("schema") != MANIFEST_SCHEMA:
            raise ArtifactError(
                f"'{where}' has schema {data.get('schema')!r}",
                f"this edgekit reads schema {MANIFEST_SCHEMA}; convert again",
            )
        try:
            fields = {k: data[k] for k in Manifest.__dataclass_fields__}
        except KeyError as error:
            raise ArtifactError(f"'{where}' lacks {error}", "convert again") from error
        fields["parents"], fields["notes"] = tuple(fields["parents"]), tuple(fields["notes"])
        return Manifest(**fields)


def digest_json(data: Any) -> str:
    """sha256 of the canonical JSON form."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(what: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one line; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise DiskError(
                f"cannot write '{what}': {error.strerror}",
                "free some space or choose another --out; what was done is kept",
            ) from error
        raise


def open_build(root: Path) -> Path:
    """Create the build folder or check that an existing one is ours; clears what a killed run left half-made."""
    if root.exists() and not root.is_dir():
        raise OutputExistsError(f"'{root}' is a file", "choose another --out")
    marker = root / _MARKER
    if root.is_dir() and any(root.iterdir()) and not marker.is_file():
        raise OutputExistsError(f"folder '{root}' is not empty and is not an edgekit build", "choose another --out")
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            marker.write_text(json.dumps({"schema": BUILD_SCHEMA, "kind": "build"}) + "\n", encoding="utf-8")
    check_build(root)
    for left in root.glob(f"{_STAGING}*"):
        if not _alive(left):
            shutil.rmtree(left, ignore_errors=True)
    return root


def check_build(root: Path) -> Path:
    """Raise ArtifactError unless `root` is a build folder of a known schema."""
    marker = root / _MARKER
    if not marker.is_file():
        raise ArtifactError(
            f"'{root}' is not an edgekit build", "make one with `edgekit convert MODEL --out " + str(root) + "`"
        )
    try:
        schema = json.loads(marker.read_text(encoding="utf-8"))["schema"]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ArtifactError(f"'{marker}' is damaged", "delete the build folder and convert again") from error
    if schema != BUILD_SCHEMA:
        raise ArtifactError(f"build '{root}' has schema {schema!r}", f"this edgekit reads schema {BUILD_SCHEMA}")
    return root


def _alive(staging: Path) -> bool:
    """Is the process that made this staging folder still running? Its id is part of the name."""
    pid = staging.name.removeprefix(_STAGING).split("-")[0]
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def staged(root: Path, final: Path) -> Iterator[Path]:
    """A folder to write into; on success it takes the name `final` in one rename, on any failure it is removed."""
    with disk_errors(final):
        folder = Path(tempfile.mkdtemp(prefix=f"{_STAGING}{os.getpid()}-", dir=root))
        try:
            yield folder
            folder.chmod(final.parent.stat().st_mode if final.parent.exists() else 0o755)  # mkdtemp makes it private
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.exists():
                old = Path(tempfile.mkdtemp(prefix=f"{_STAGING}{os.getpid()}-", dir=root)) / "old"
                os.replace(final, old)
                os.replace(folder, final)
                shutil.rmtree(old.parent, ignore_errors=True)
            else:
                os.replace(folder, final)
        finally:
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in `folder`, add the hashes to the manifest and write it last."""
    files = {
        str(p.relative_to(folder).as_posix()): {"sha256": digest_file(p), "size_bytes": p.stat().st_size}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    full = Manifest(**{**{k: getattr(manifest, k) for k in manifest.__dataclass_fields__}, "files": files})
    text = json.dumps(full.to_json(), indent=1, sort_keys=True, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return full


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """Read an artifact's manifest and (by default) check every file against its hash."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"'{folder}' has no {MANIFEST}", "convert again") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"'{path}' is damaged", "convert again") from error
    manifest = Manifest.from_json(data, path)
    if verify:
        for name, entry in manifest.files.items():
            file = folder / name
            if not file.is_file() or digest_file(file) != entry["sha256"]:
                raise ArtifactError(f"'{file}' is missing or was changed after it was written", "convert again")
    return manifest


def artifacts(root: Path, target: str | None = None) -> list[Path]:
    """Artifact folders of a build, of one target or all, in a stable order."""
    check_build(root)
    return sorted(
        p.parent for p in root.glob(f"{target or '*'}/*/{MANIFEST}") if not p.parent.parent.name.startswith(".")
    )
