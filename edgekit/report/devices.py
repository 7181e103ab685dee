"""What `deploy` prints for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgekit.report import summary, terminal

if TYPE_CHECKING:
    from rich.console import Console


def print_deployed(document: Mapping[str, Any], out: Console | None = None) -> None:
    """What happened on each device, then how to use it."""
    out = out or terminal.console()
    if "path" in document:
        for text in (f"{document['candidate']} ({document['why']})", *_bundle(document["bundle"]), document["path"]):
            out.print(text, soft_wrap=True)
    for row in document["hosts"]:
        out.print(f"{row['host']}: {row['status']}", style="bold red" if row["status"] == "failed" else "bold green")
        for text in _LINES[row["status"]](row, document):
            out.print(f"  {text}", soft_wrap=True)


def _failed(row: Mapping[str, Any], _: Mapping[str, Any]) -> Iterator[str]:
    yield row["error"]


def _installed(row: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    yield f"{row['candidate']} ({row['why']})"
    yield from _bundle(row["bundle"])
    sent = summary.size(row["uploaded_bytes"]) if row["uploaded_bytes"] else "nothing"
    yield f"{sent} uploaded, {row['trips']} ssh commands; {_device(row['device'])}"
    if row["status"] == "installed":
        yield "self-test passed: the answers to the golden inputs are the same there"
    current = row["folder"].rpartition("/")[0] + "/current"
    yield f"on the device: {current}/run INPUT; from here: edgekit run BUILD --host {row['host']} --input INPUT"
    if row["before"] not in (None, row["digest"]):
        yield f"the version before, {row['before'][:12]}, is kept: --rollback puts it in use again"


def _bundle(told: Mapping[str, Any]) -> Iterator[str]:
    parts = ", ".join(f"{name} {version}" for name, version in told["runtimes"].items())
    signed = "signed" if told["signed"] else "not signed"
    yield f"bundle {told['digest'][:12]}: {summary.size(told['size_bytes'])}, {parts}, {signed}"
    yield from told["notes"]


def _rolled_back(row: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    yield f"{document['name']} {row['digest'][:12]} is in use again, {row['before'][:12]} no more; self-test passed"


def _removed(row: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    yield f"{len(row['removed'])} versions of {document['name']}"


def _looked_at(row: Mapping[str, Any], _: Mapping[str, Any]) -> Iterator[str]:
    yield _device(row["device"])
    for name, slot in row["slots"].items():
        told = f"{slot['ship']} for {slot['target']}, " if slot.get("ship") else ""
        current = (slot["current"] or "nothing")[:12]
        yield f"{name}: {told}{current} in use, {len(slot['versions'])} versions"
    if not row["slots"]:
        yield "nothing is deployed there"


def _device(told: Mapping[str, Any]) -> str:
    memory = f", {summary.size(told['memory_bytes'])} of memory" if told["memory_bytes"] else ""
    emulated = f", emulated ({told['emulated']}): no times" if told["emulated"] else ""
    return f"{told.get('cpu') or told['arch']}, {told['cores']} cores{memory}, Python {told['python']}{emulated}"


_LINES = {
    "failed": _failed,
    "installed": _installed,
    "already there": _installed,
    "rolled back": _rolled_back,
    "removed": _removed,
    "looked at": _looked_at,
}
