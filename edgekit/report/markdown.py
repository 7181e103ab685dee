"""The bench document as markdown: the verdict first, then the table, then what limits it and where it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgekit.report import summary

_HEAVIEST = 10  # layers listed per candidate


def render_markdown(document: summary.Document) -> str:
    """A whole report. Raises ArtifactError for a document of another schema."""
    summary.check(document)
    parts = ["# edgekit report"]
    for target in summary.targets(document):
        parts += _target(document, target)
    parts.append(summary.LEGEND + ".")
    warnings = summary.warnings(document)
    if warnings:
        parts += ["## Warnings", _bullets(warnings)]
    if summary.failed(document):
        parts += ["## Not measured", _bullets(summary.failed(document))]
    parts += ["## Measured on", _bullets(_conditions(document))]
    if document.get("preprocessing"):
        parts += [
            "## Preprocessing",
            _bullets(f"{k}: {v}" for k, v in document["preprocessing"].items() if v is not None),
        ]
    parts += ["## Provenance", _provenance(document)]
    return "\n\n".join(parts) + "\n"


def _target(document: summary.Document, target: str) -> list[str]:
    lines = summary.lines(document, target)
    headings = summary.headings(document, target)
    rows = []
    for line in lines:
        cells = [_cell(getattr(line, name)) for name in headings]
        rows.append([f"**{c}**" for c in cells] if line.ships else cells)
    verdicts = summary.verdicts(document, target)
    parts = [f"## {_cell(target if len(verdicts) > 1 else verdicts[0][0])}"]
    parts += [f"**{_cell(f'{title}: {v}' if len(verdicts) > 1 else v)}**" for title, v in verdicts]
    parts.append(_table([_cell(h) for h in headings.values()], rows, left=2 if "host" in headings else 1))
    gains = summary.gains(document, target)
    if gains:
        parts += ["### Pruning: claimed and measured", _bullets(gains)]
    remarks = summary.remarks(document, target)
    if remarks:
        parts.append(_bullets(remarks))
    parts += _blame(document, target)
    several = len(verdicts) > 1
    profiled = {
        summary.candidate(r) + (f" on {r.get('host') or summary.HERE}" if several else ""): r["layers"]
        for r in document["artifacts"]
        if r["target"] == target and r["layers"]
    }
    for name, layers in profiled.items():
        parts += [f"### Time per layer: {name}", _layers(layers)]
    return parts


def _blame(document: summary.Document, target: str) -> list[str]:
    """Layers by the int8 error that they do, once for artifacts of the same plan."""
    whose: dict[str, list[str]] = {}
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in document["artifacts"]:
        if row["target"] == target and row.get("blame"):
            key = repr(row["blame"])
            tables[key] = row["blame"]
            if summary.candidate(row) not in whose.setdefault(key, []):
                whose[key].append(summary.candidate(row))
    parts = []
    for key, layers in tables.items():
        rows = [
            [_cell(r["node"]), _cell(r["op"]), f"{r['alone']:.1%}", f"{r['without']:+.1%}", _cell(r["cause"] or "")]
            for r in layers[:_HEAVIEST]
        ]
        parts += [
            f"### int8 error per layer: {', '.join(whose[key])}",
            "Shares of the whole int8 error at the outputs: of the layer alone, and what vanishes when only it stays "
            "float.",
            _table(["layer", "operator", "alone", "without", "cause"], rows, left=2),
        ]
    return parts


def _layers(layers: list[Mapping[str, Any]]) -> str:
    total = sum(r["seconds"] for r in layers) or 1.0
    heaviest = sorted(layers, key=lambda r: -r["seconds"])[:_HEAVIEST]
    rows = [
        [_cell(r["name"]), _cell(r["op"]), summary.milliseconds(r["seconds"]), summary.percentage(r["seconds"] / total)]
        for r in heaviest
    ]
    return _table(["layer", "operator", "ms", "share"], rows, left=2)


def _conditions(document: summary.Document) -> list[str]:
    settings = ", ".join(f"{k} {v}" for k, v in (document.get("settings") or {}).items() if v is not None)
    found = [*summary.measured_on(document), f"test data: {summary.dataset(document)}"]
    if document.get("taken"):
        found.append(f"run {document.get('run')}, taken {document['taken']}")
    return [*found, *([f"settings: {settings}"] if settings else [])]


def _provenance(document: summary.Document) -> str:
    rows: dict[str, list[str]] = {}
    for row in document["artifacts"]:
        runtime = f"{row['backend']} {row.get('runtime_version') or ''}".strip()
        rows[str(row["path"])] = [f"`{row['path']}`", _cell(runtime), f"`{str(row['sha256'])[:16]}`"]
    return _table(["artifact", "runtime", "sha256"], list(rows.values()), left=3)


def _table(headings: list[str], rows: Iterable[list[str]], left: int) -> str:
    """A pipe table; the first `left` columns are left-aligned, the others right."""
    rule = ["---" if i < left else "---:" for i in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {_cell(item)}" for item in items)


def _cell(text: Any) -> str:
    """One line, with what markdown would take for its own made literal."""
    flat = " ".join(str(text).split())
    for mark in ("\\", "|", "*", "_", "`", "<", "["):
        flat = flat.replace(mark, "\\" + mark)
    return flat
