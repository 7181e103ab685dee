"""A target is a device: a TOML profile read into a frozen `Target`.

Profiles are looked up by name in, first to last: `--targets DIR`, ~/.config/edgekit/targets, the shipped ones.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from edgekit.errors import TargetFileError, UnknownTargetError
from edgekit.part import Part, read_part

TARGET_SCHEMA = 1  # 1: first
Arch = Literal["aarch64", "armv7l", "x86_64"]
_MEMORY = {"MB": 2**20, "GB": 2**30}  # as memory chips are sold

Precision = Literal[
    "float32", "float16", "bfloat16", "int8", "int8-dynamic", "int8-weights", "int4-weights", "int8x16", "fixed"
]
PRECISIONS: tuple[str, ...] = get_args(Precision)
# made by calibration: weights in int8, activations in int8 or int16
STATIC: tuple[Precision, ...] = ("int8", "int8x16")
# made of weights in few bits; activations stay float, or are rounded as they come
WEIGHTS: tuple[Precision, ...] = ("int8-dynamic", "int8-weights", "int4-weights")


# the variant of a candidate that channels or weights were removed from
PRUNED = "pruned"


@dataclass(frozen=True)
class CandidateSpec:
    """One backend × precision that could serve the target; `id` names its folder in a build.

    on_request: only made where its precision is asked for. for_models: "products" is made, unasked, only of models
    whose weights are mostly in matrix products and recurrent layers. variant: "pruned" where channels were removed.
    """

    backend: str
    precision: Precision
    on_request: bool = False
    for_models: Literal["all", "products"] = "all"
    variant: str = ""

    @property
    def id(self) -> str:
        return candidate_id(self.backend, self.precision, self.variant)


def candidate_id(backend: str, precision: str, variant: str = "") -> str:
    """What a candidate is called: its folder in a build, its name in reports."""
    return "-".join(filter(None, (backend, precision, variant)))


@dataclass(frozen=True)
class DeviceSpec:
    """A device that artifacts are taken to, where it is not the machine that converts.

    arch: of its Python. memory_bytes: the most that such a device has; None where there is no telling. cores: of its
    processor. models: one of these is part of what the device calls itself (/proc/device-tree/model); () for any.
    runtimes: backend -> "package==version" that its wheels are of, instead of the one that is installed here.
    system_packages: import name -> versions (">=1.23,<2") that its own Python must have, for want of a wheel.
    """

    arch: Arch
    memory_bytes: int | None = None
    cores: int | None = None
    models: tuple[str, ...] = ()
    runtimes: Mapping[str, str] = field(default_factory=dict)
    system_packages: Mapping[str, str] = field(default_factory=dict)

    def runtime(self, backend: str) -> tuple[str, str] | None:
        """(package, version) of the runtime there, where the profile names one."""
        package, _, version = self.runtimes.get(backend, "").partition("==")
        return (package, version) if version else None

    def is_model(self, told: str | None) -> bool:
        """Whether a device that calls itself so is one of these; True where it does not say what it is."""
        return not told or not self.models or any(model in told for model in self.models)


@dataclass(frozen=True)
class Target:
    """A device profile.

    threads: thread counts to measure with; "all" is every physical core that the process may use.
    channel_multiple: numbers of channels that its kernels like, for pruning (benchmarks/pruning/channel_multiples.py).
    weight_bits: 7 where u8×s8 kernels saturate, 8 elsewhere; "auto" asks each backend's measured probe on this machine.
    device: what it is taken to; None: the machine that converts, or one like it. part: the FPGA, where it is one.
    """

    name: str
    description: str
    candidates: tuple[CandidateSpec, ...]
    threads: tuple[int | Literal["all"], ...] = (1, "all")
    weight_bits: Literal["auto", 7, 8] = "auto"
    channel_multiple: int = 8
    device: DeviceSpec | None = None
    part: Part | None = None
    path: Path | None = field(default=None, compare=False)


_KEYS = {"schema", "name", "description", "threads", "weight_bits", "channel_multiple", "candidates", "device", "part"}
_DEVICE_KEYS = {"arch", "memory", "cores", "models", "runtimes", "system_packages"}
_CANDIDATE_KEYS = {"backend", "precision", "on_request", "for_models"}


def shipped_dir() -> Path:
    """The profiles inside the installed package, or beside it in a source checkout."""
    packaged = Path(__file__).parent / "_targets"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "targets"


def search_path(extra: Path | None = None) -> list[Path]:
    dirs = [Path.home() / ".config" / "edgekit" / "targets", shipped_dir()]
    if extra is not None:
        if not extra.is_dir():
            raise TargetFileError(f"no folder '{extra}'", "pass --targets a folder of .toml profiles")
        dirs.insert(0, extra)
    return dirs


def target_files(extra: Path | None = None) -> dict[str, Path]:
    """Profile name -> file; an earlier folder wins."""
    found: dict[str, Path] = {}
    for directory in search_path(extra):
        for path in sorted(directory.glob("*.toml")) if directory.is_dir() else ():
            found.setdefault(path.stem, path)
    return found


def load_target(name: str, extra: Path | None = None) -> Target:
    """Read the profile called `name`. Raises UnknownTargetError (with the nearest name) or TargetFileError."""
    files = target_files(extra)
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else "known: " + ", ".join(sorted(files))
        raise UnknownTargetError(f"no target '{name}'", hint + " (`edgekit targets` lists them)")
    target = read_target(files[name])
    _check_offered(target)
    return target


def _check_offered(target: Target) -> None:
    """Only for a target that is used: asking a backend imports it, and listing profiles must stay light."""
    from edgekit import backends

    for candidate in target.candidates:
        offered = backends.get(candidate.backend).PRECISIONS
        if candidate.precision not in offered:
            raise TargetFileError(
                f"target file '{target.path}': {candidate.backend} has no precision '{candidate.precision}'",
                "it offers " + ", ".join(offered),
            )


def read_target(path: Path) -> Target:
    """Parse one TOML profile, refusing unknown or missing keys; does not ask the backends what they offer."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TargetFileError(f"cannot read target file '{path}': {error}", "fix the TOML") from error
    _check_keys(path, data, _KEYS, required={"schema", "description", "candidates"})
    if data["schema"] != TARGET_SCHEMA:
        raise TargetFileError(
            f"target file '{path}' has schema {data['schema']!r}", f"this edgekit reads schema {TARGET_SCHEMA}"
        )
    if data.get("name", path.stem) != path.stem:
        raise TargetFileError(f"target file '{path}' calls itself '{data['name']}'", f"name it '{path.stem}'")
    return Target(
        name=path.stem,
        description=_choice(path, "description", data["description"], str),
        candidates=_candidates(path, data["candidates"]),
        threads=_threads(path, data.get("threads", [1, "all"])),
        weight_bits=_one_of(path, "weight_bits", data.get("weight_bits", "auto"), ("auto", 7, 8)),
        channel_multiple=_one_of(path, "channel_multiple", data.get("channel_multiple", 8), (1, 2, 4, 8, 16, 32)),
        device=_device(path, data["device"]) if "device" in data else None,
        part=read_part(path, data["part"]) if "part" in data else None,
        path=path,
    )


def _device(path: Path, row: Any) -> DeviceSpec:
    from edgekit.backends import BACKENDS

    if not isinstance(row, dict):
        raise TargetFileError(f"target file '{path}': device = {row!r}", "give a table [device]")
    _check_keys(path, row, _DEVICE_KEYS, required={"arch"})
    models = row.get("models", [])
    if not isinstance(models, list) or not all(isinstance(m, str) and m for m in models):
        raise TargetFileError(f"target file '{path}': models = {models!r}", "give a list of texts")
    runtimes = _texts(path, "runtimes", row.get("runtimes", {}), r"[\w.-]+==[\w.]+", '"package==version"')
    for backend in runtimes:
        _one_of(path, "runtimes", backend, tuple(BACKENDS))
    cores = row.get("cores")
    if cores is not None and (not isinstance(cores, int) or isinstance(cores, bool) or cores < 1):
        raise TargetFileError(f"target file '{path}': cores = {cores!r}", "give a number from 1")
    return DeviceSpec(
        arch=_one_of(path, "arch", row["arch"], get_args(Arch)),
        memory_bytes=_memory(path, row["memory"]) if "memory" in row else None,
        cores=cores,
        models=tuple(models),
        runtimes=runtimes,
        system_packages=_texts(
            path, "system_packages", row.get("system_packages", {}), r">=[\d.]+(,<[\d.]+)?", '">=1.2" or ">=1.2,<2"'
        ),
    )


def _memory(path: Path, told: Any) -> int:
    """Bytes of "512 MB" or "8 GB", of 2^20 and 2^30 bytes."""
    found = re.fullmatch(r"(\d+) (MB|GB)", told) if isinstance(told, str) else None
    if found is None or not int(found[1]):
        raise TargetFileError(f"target file '{path}': memory = {told!r}", 'give it as "512 MB" or "8 GB"')
    return int(found[1]) * _MEMORY[found[2]]


def _texts(path: Path, key: str, table: Any, form: str, example: str) -> dict[str, str]:
    if not isinstance(table, dict):
        raise TargetFileError(f"target file '{path}': {key} = {table!r}", f"give a table of {example}")
    for name, value in table.items():
        if not isinstance(value, str) or not re.fullmatch(form, value):
            raise TargetFileError(f"target file '{path}': {key}.{name} = {value!r}", f"give {example}")
    return dict(table)


def _threads(path: Path, rows: Any) -> tuple[int | Literal["all"], ...]:
    if not isinstance(rows, list) or not rows:
        raise TargetFileError(f"target file '{path}': threads = {rows!r}", 'give a list such as [1, "all"]')
    for row in rows:
        if row != "all" and (not isinstance(row, int) or isinstance(row, bool) or row < 1):
            raise TargetFileError(f"target file '{path}': threads = {row!r}", 'each is a number from 1 or "all"')
    return tuple(rows)


def _candidates(path: Path, rows: Any) -> tuple[CandidateSpec, ...]:
    from edgekit.backends import BACKENDS

    if not isinstance(rows, list) or not rows:
        raise TargetFileError(f"target file '{path}' has no [[candidates]]", "add at least one backend and precision")
    out = []
    for row in rows:
        if not isinstance(row, dict):
            raise TargetFileError(
                f"target file '{path}': candidate {row!r} is no table", "give { backend = ..., precision = ... }"
            )
        _check_keys(path, row, _CANDIDATE_KEYS, required={"backend", "precision"})
        out.append(
            CandidateSpec(
                _one_of(path, "backend", row["backend"], tuple(BACKENDS)),
                _one_of(path, "precision", row["precision"], PRECISIONS),
                _one_of(path, "on_request", row.get("on_request", False), (False, True)),
                _one_of(path, "for_models", row.get("for_models", "all"), ("all", "products")),
            )
        )
    return tuple(out)


def _check_keys(path: Path, data: dict[str, Any], known: set[str], required: set[str]) -> None:
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"perhaps you meant '{near[0]}'" if near else "known keys: " + ", ".join(sorted(known))
            raise TargetFileError(f"target file '{path}' has an unknown key '{key}'", hint)
    for key in sorted(required - set(data)):
        raise TargetFileError(f"target file '{path}' lacks the key '{key}'", "add it")


def _one_of(path: Path, key: str, value: Any, allowed: Sequence[Any]) -> Any:
    if not any(value == a and type(value) is type(a) for a in allowed):
        raise TargetFileError(
            f"target file '{path}': {key} = {value!r}", "one of " + ", ".join(repr(a) for a in allowed)
        )
    return value


def _choice(path: Path, key: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TargetFileError(f"target file '{path}': {key} = {value!r}", f"give {kind.__name__}")
    return value
