"""Keeps measurements: one JSON line each, with its schema number, appended and never rewritten."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgekit.errors import ArtifactError, DiskError

RESULTS_SCHEMA = 4  # 1: first; 2: label; 3: variant; 4: host
_READABLE = (1, 2, 3, 4)
RESULTS_FILE = "results.jsonl"


@dataclass(frozen=True)
class Measurement:
    """One metric of one artifact on one machine.

    host: the machine's name, as ssh calls it; "" for the one that edgekit ran on.
    run: the id shared by all measurements of one `bench`. taken: UTC, ISO 8601.
    threads, batch: of a latency or layers measurement, else None.
    valid: False when the artifact must not ship, or the time is no latency; reasons: why, and why figures are missing.
    notes: what to know before trusting the samples.
    samples: raw nanoseconds of each run, one tuple per round; round i of all latencies of a run and target
        belongs to the same cycle. Empty but for latency.
    figures: latency: import_s, load_s, first_inference_s, peak_rss_bytes, runtime_version; quality: as named by
        bench.metrics; layers: layers [{name, op, seconds, calls}] or None.
    machine: {"facts", "before", "after", "warnings"} (bench.machine). settings: the pace, the seed,
        max_accuracy_drop, and warnings: what limits the trust in the data.
    variant: "pruned", or "". pruning: the shares of macs_kept and parameters_kept that its manifest claims.
    label: of a file that is measured for comparison and is no part of the build, else "".
    """

    run: str
    taken: str
    metric: Literal["latency", "quality", "layers"]
    target: str
    backend: str
    precision: str
    path: str
    sha256: str
    size_bytes: int
    threads: int | None = None
    batch: int | None = None
    valid: bool = True
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    samples: tuple[tuple[int, ...], ...] = ()
    unit: str = "ns"
    figures: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] | None = None
    label: str = ""
    variant: str = ""
    pruning: dict[str, float] | None = None
    host: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"schema": RESULTS_SCHEMA, **asdict(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Measurement:
        """Raises KeyError or TypeError for a line that is no measurement."""
        known = {k: v for k, v in data.items() if k != "schema"}
        for name in ("reasons", "notes"):
            known[name] = tuple(known[name])
        known["samples"] = tuple(tuple(r) for r in known["samples"])
        return Measurement(**known)


def append(path: Path, measurements: Sequence[Measurement]) -> None:
    """Add lines to `path` (made if missing): all of them or none, flushed to the disk. Raises DiskError."""
    lines = [json.dumps(m.to_json(), separators=(",", ":"), allow_nan=False) for m in measurements]
    data = "".join(line + "\n" for line in lines).encode()
    if not data:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file, _locked(file.fileno()):
            _write(file.fileno(), data)
    except OSError as error:
        raise DiskError(f"cannot write '{path}': {error.strerror or error}", "free some space or choose -o") from error


def read(path: Path, warn: Callable[[str], None] = lambda text: None) -> list[Measurement]:
    """Every measurement of a results file, in order; empty when there is none.

    A last line that a killed run left torn is passed over, with a warning. Raises ArtifactError for any other line
    that is damaged, and for an unknown schema.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror or error}", "check the path") from error
    rows = text.split("\n")
    found = []
    for number, line in enumerate(rows, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError:
            if number == len(rows):  # no newline after it
                warn(f"'{path}' ends in a torn line, from a run that was killed; passed over")
                continue
            raise ArtifactError(f"line {number} of '{path}' is damaged", "delete that line") from None
        found.append(_parse(path, number, data))
    return found


def _parse(path: Path, number: int, data: Any) -> Measurement:
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema not in _READABLE:
        raise ArtifactError(
            f"line {number} of '{path}' has schema {schema!r}, this edgekit reads {RESULTS_SCHEMA}",
            "measure again, or use the edgekit that wrote it",
        )
    try:
        return Measurement.from_json(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"line {number} of '{path}' is no measurement: {error}", "delete that line") from error


def latest(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those of the newest run of each target on each host: what a report shows."""
    newest = {(m.target, m.host): m.run for m in measurements}
    return [m for m in measurements if newest[m.target, m.host] == m.run]


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """One writer at a time, where the system has advisory locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _write(descriptor: int, data: bytes) -> None:
    """Append `data`; on a full disk the file is as long as before. A torn last line is cut off first."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    whole = _whole_lines(descriptor, size)
    if whole < size:
        os.ftruncate(descriptor, whole)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, whole)
        raise


def _whole_lines(descriptor: int, size: int) -> int:
    """Length up to and with the last newline."""
    block = 1 << 16
    end = size
    while end > 0:
        start = max(0, end - block)
        os.lseek(descriptor, start, os.SEEK_SET)
        chunk = os.read(descriptor, end - start)
        found = chunk.rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
