"""Artifacts on disk: staged, hashed, renamed into place, and described by a manifest.

A build folder holds artifacts in `<target>/<backend>-<precision>[-<variant>]/`, `results.jsonl`, stages in `.cache/`.
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit import backends
from edgekit.errors import ArtifactError, DiskError, OutputExistsError
from edgekit.target import PRECISIONS, PRUNED, candidate_id

MANIFEST_SCHEMA = 3  # 1: first; 2: pruning; 3: labels, pixels
_READABLE = (2, 3)
BUILD_SCHEMA = 1  # 1: first
MANIFEST = "manifest.json"
MARKER = ".edgekit"
_STAGING = ".staging-"
_NO_ROOM = "free some space or choose another --out; what was done is kept"
_NO_RIGHT = "choose another --out, one that you may write to; what was done is kept"
_DISK_ERRORS = {errno.ENOSPC: _NO_ROOM, errno.EDQUOT: _NO_ROOM, errno.EFBIG: _NO_ROOM} | {
    errno.EROFS: _NO_RIGHT,
    errno.EACCES: _NO_RIGHT,
    errno.EPERM: _NO_RIGHT,
}
# only where the path is the user's own: inside a stage these would hide a bug
_PATH_ERRORS = {
    errno.ENOENT: "make the folder first, or choose another --out",
    errno.ENOTDIR: "a part of the path is a file; choose another --out",
    errno.EISDIR: "it is a folder; give a file's name",
}


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and where it came from. Holds no time: the same inputs give the same manifest.

    identity: sha256 over everything that decides the content; a repeated run reuses an artifact of the same identity.
    files: name -> {"sha256", "size_bytes"}.
    labels: names of the classes, or the tokens, in the model's order; empty where they are not known.
    pixels: inputs whose samples were images of 8-bit pixels before preprocessing.
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
    pruning: Mapping[str, Any] | None = None
    parity: Mapping[str, Any] | None = None
    tools: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    pixels: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return candidate_id(self.backend, self.precision, self.variant)

    @property
    def variant(self) -> str:
        return PRUNED if self.pruning is not None else ""

    @property
    def size_bytes(self) -> int:
        return sum(int(f["size_bytes"]) for f in self.files.values())

    @property
    def sha256(self) -> str:
        """One digest for all files."""
        return digest_json({name: f["sha256"] for name, f in self.files.items()})

    def to_json(self) -> dict[str, Any]:
        out = {"schema": MANIFEST_SCHEMA, **{k: getattr(self, k) for k in self.__dataclass_fields__}}
        return {**out, **{k: list(out[k]) for k in _LISTS}}

    @staticmethod
    def from_json(data: Any, where: Path) -> Manifest:
        """The inverse of `to_json`. Raises ArtifactError, naming the field that is missing or of the wrong kind."""
        if not isinstance(data, dict):
            raise ArtifactError(f"'{where}' holds no manifest: {_short(data)}", "convert again")
        if data.get("schema") not in _READABLE:
            raise ArtifactError(
                f"'{where}' has schema {data.get('schema')!r}",
                f"this edgekit reads schema {MANIFEST_SCHEMA}; convert again",
            )
        try:
            known = Manifest.__dataclass_fields__
            fields = {k: data[k] for k in known if data["schema"] >= 3 or k not in _SINCE_3}
        except KeyError as error:
            raise ArtifactError(f"'{where}' lacks {error}", "convert again") from error
        for key, value in fields.items():
            if not _FIELDS[key](value):
                raise ArtifactError(f"'{where}': {key} = {_short(value)}", "it is damaged; convert again")
        fields.update({k: tuple(fields[k]) for k in _LISTS if k in fields})
        return Manifest(**fields)


_LISTS = ("parents", "notes", "labels", "pixels")
_SINCE_3 = ("labels", "pixels")


# --- what a manifest's fields must be --------------------------------------------------------------
def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _table_or_none(value: Any) -> bool:
    return value is None or _table(value)


def _tensors(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            _table(t)
            and _text(t.get("name"))
            and _text(t.get("dtype"))
            and isinstance(t.get("shape"), list)
            and all(isinstance(size, int | str) for size in t["shape"])
            for t in value
        )
    )


def _calibration(value: Any) -> bool:
    return value is None or (
        _table(value) and isinstance(value.get("random"), bool) and isinstance(value.get("sample_ids"), list)
    )


_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "target": _text,
    "backend": lambda value: _text(value) and value in backends.BACKENDS,
    "precision": lambda value: _text(value) and value in PRECISIONS,
    "identity": _text,
    "signature": lambda value: _table(value) and _tensors(value.get("inputs")) and _tensors(value.get("outputs")),
    "source": _table,
    "parents": _texts,
    "files": lambda value: (
        _table(value)
        and all(_table(f) and _text(f.get("sha256")) and isinstance(f.get("size_bytes"), int) for f in value.values())
    ),
    "preprocessing": _table_or_none,
    "calibration": _calibration,
    "quantization": _table_or_none,
    "pruning": _table_or_none,
    "parity": lambda value: value is None or (_table(value) and _texts(value.get("reasons", []))),
    "tools": lambda value: _table(value) and all(map(_text, value.values())),
    "notes": _texts,
    "labels": _texts,
    "pixels": _texts,
}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def digest_json(data: Any) -> str:
    """sha256 of the canonical JSON form."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(what: Path, *, path: bool = True) -> Iterator[None]:
    """Turn a full or unwritable disk and, unless told otherwise, a path that cannot be into one line; others pass."""
    remedies = _DISK_ERRORS | _PATH_ERRORS if path else _DISK_ERRORS
    try:
        yield
    except OSError as error:
        if error.errno in remedies:
            raise DiskError(f"cannot write '{what}': {error.strerror}", remedies[error.errno]) from error
        raise


def open_build(root: Path) -> Path:
    """Create the build folder or check that an existing one is ours; clears what a killed run left half-made."""
    if root.exists() and not root.is_dir():
        raise OutputExistsError(f"'{root}' is a file", "choose another --out")
    marker = root / MARKER
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


def remove_if_empty(root: Path) -> None:
    """Take back a build folder in which nothing was made."""
    if [p.name for p in root.iterdir()] == [MARKER]:
        shutil.rmtree(root, ignore_errors=True)


def check_build(root: Path) -> Path:
    """Raise ArtifactError unless `root` is a build folder of a known schema."""
    marker = root / MARKER
    if not marker.is_file():
        raise ArtifactError(
            f"'{root}' is not an edgekit build", "make one with `edgekit convert MODEL --out " + str(root) + "`"
        )
    try:
        schema = json.loads(marker.read_text(encoding="utf-8"))["schema"]
    except (ValueError, TypeError, KeyError) as error:
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
    with disk_errors(final, path=False):
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
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
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
    except ValueError as error:  # no JSON, or no UTF-8
        raise ArtifactError(f"'{path}' is damaged", "convert again") from error
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror}", "convert again") from error
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
