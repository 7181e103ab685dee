"""Turns a bench document into lines of text cells that the terminal and the markdown report share.

Works on the document alone (schema 1, as `edgekit bench --json` prints it); a figure that is null is shown as "–".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.bench.verdict import is_baseline, key, name
from edgekit.errors import ArtifactError

DOCUMENT_SCHEMA = 1
NONE = "–"
MINUS = "−"

Document = Mapping[str, Any]

# The figure that stands for quality, first found wins; its heading, and the factor and digits it is shown with.
QUALITY = (
    ("accuracy", "accuracy", 100, 2),
    ("r2", "R²", 1, 4),
    ("perplexity", "perplexity", 1, 3),
    ("mae", "MAE", 1, 4),
)
# Warned of because a user who reads only the table would be misled.
_SMALL_TEST_SET = 100
_INFINITE = "sqnr_db is infinite"
HERE = "this machine"
# Percentiles that the table does not show, and what its SQNR column says by itself.
_NOT_SHOWN = ("p90 needs", "p99 needs", _INFINITE)


@dataclass(frozen=True)
class Line:
    """One candidate at one thread count; every cell is ready to print. ships: the verdict's choice."""

    candidate: str
    host: str
    threads: str
    p50: str
    ratio: str
    quality: str
    delta: str
    agreement: str
    sqnr: str
    size: str
    load: str
    rss: str
    parity: str
    ships: bool


HEADINGS: Mapping[str, str] = {
    "candidate": "candidate",
    "host": "host",
    "threads": "threads",
    "p50": "p50 ms",
    "ratio": "× float32 [95 %]",
    "quality": "accuracy",
    "delta": "Δ",
    "agreement": "agrees",
    "sqnr": "SQNR dB",
    "size": "size",
    "load": "load ms",
    "rss": "peak RSS",
    "parity": "parity",
}

LEGEND = (
    "× float32: this p50 over that of the fastest float32 candidate with as many threads, below 1 is faster, with its "
    "95 % interval; "
    "Δ: to the float32 model, in points; agrees: same top-1 as float; parity: int8, largest difference of one "
    "operator from the exact integer reference on the reference's own inputs, and label agreement end to end; "
    "float, largest difference from the original, relative"
)


def check(document: Document) -> Document:
    """Raise ArtifactError for a document of another schema."""
    if document.get("schema") != DOCUMENT_SCHEMA:
        raise ArtifactError(
            f"a bench document of schema {document.get('schema')!r}", f"this edgekit reads schema {DOCUMENT_SCHEMA}"
        )
    return document


def targets(document: Document) -> list[str]:
    """In the order of the artifacts."""
    return list(dict.fromkeys(a["target"] for a in document["artifacts"]))


def hosts(document: Document, target: str) -> list[str | None]:
    """Where the target was measured; None for the machine that edgekit ran on."""
    return list(dict.fromkeys(a.get("host") for a in document["artifacts"] if a["target"] == target))


def verdicts(document: Document, target: str) -> list[tuple[str, str]]:
    """Of each host ("TARGET" or "TARGET on HOST", one sentence, first letter upper case)."""
    out = []
    for host in hosts(document, target):
        title = key(target, host)
        found = (document.get("verdict") or {}).get(title) or {}
        why = found.get("why") or (f"ship {found['ship']}" if found.get("ship") else "no verdict was reached")
        out.append((title, str(why)[:1].upper() + str(why)[1:]))
    return out


def headings(document: Document, target: str) -> dict[str, str]:
    """Column name -> heading; the quality column is called by the figure it holds; the host's is for several."""
    rows = [a for a in document["artifacts"] if a["target"] == target]
    found = {**HEADINGS, "quality": _quality_figure(rows)[1]}
    return found if len(hosts(document, target)) > 1 else {k: v for k, v in found.items() if k != "host"}


def lines(document: Document, target: str) -> list[Line]:
    """The table of one target, in the document's order; every host is judged by its own float32.

    Where a host gave no times (an emulated one, one of another processor), a candidate is one line, not one for each
    number of threads.
    """
    rows = [a for a in document["artifacts"] if a["target"] == target]
    column, _, factor, digits = _quality_figure(rows)
    out = []
    for host in hosts(document, target):
        own = [r for r in rows if r.get("host") == host]
        reference: Mapping[str, Any] = next((r for r in own if is_baseline(r) and not r.get("label")), {})
        chosen = (document.get("verdict") or {}).get(key(target, host)) or {}
        out += [_line(row, reference, column, factor, digits, chosen) for row in _told_apart(own)]
    return out


def _told_apart(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All rows, or the first of each candidate where none has a time."""
    if any((row.get("latency_s") or {}).get("p50") is not None for row in rows):
        return rows
    first = {candidate(row): row for row in reversed(rows)}
    return [{**row, "threads": None} for row in rows if first[candidate(row)] is row]


def _quality_figure(rows: list[Mapping[str, Any]]) -> tuple[str, str, int, int]:
    for figure in QUALITY:
        if any((row.get("quality") or {}).get(figure[0]) is not None for row in rows):
            return figure
    return QUALITY[0]


def _line(
    row: Mapping[str, Any], reference: Mapping[str, Any], key: str, factor: int, digits: int, chosen: Mapping[str, Any]
) -> Line:
    latency, quality = row.get("latency_s") or {}, row.get("quality") or {}
    own, base = quality.get(key), (reference.get("quality") or {}).get(key)
    percent = " %" if factor == 100 else ""
    baseline = is_baseline(row) and not row.get("label")
    delta = None if own is None or base is None or baseline else own - base
    name = candidate(row)
    same_threads = chosen.get("threads") in (None, row.get("threads"))
    return Line(
        candidate=name,
        host=row.get("host") or HERE,
        threads=_text(row.get("threads")),
        p50=milliseconds(latency.get("p50")),
        ratio=_ratio(latency),
        quality=NONE if own is None else f"{factor * own:.{digits}f}{percent}",
        delta=NONE if delta is None else signed(factor * delta, digits),
        agreement=percentage(quality.get("agreement_with_float")),
        sqnr=_sqnr(quality, row.get("reasons", ())),
        size=size(row.get("size_bytes")),
        load=milliseconds(row.get("load_s")),
        rss=size(row.get("peak_rss_bytes")),
        parity=parity(row.get("parity")),
        ships=chosen.get("ship") == name and same_threads,
    )


def gains(document: Document, target: str) -> list[str]:
    """Of each pruned candidate what pruning claims and what was measured, against the same runtime's unpruned one."""
    rows = [r for r in document["artifacts"] if r["target"] == target and not r.get("label")]
    several = len(hosts(document, target)) > 1
    out = []
    for row in rows:
        claims = row.get("pruning")
        if not claims or row.get("variant") is None:
            continue
        alike = ("host", "backend", "threads")
        same = [r for r in rows if not r.get("variant") and all(r.get(k) == row.get(k) for k in alike)]
        base = next((r for r in same if r["precision"] == row["precision"]), None) or next(iter(same), None)
        if base is None:
            continue
        claimed = " and ".join(
            f"{100 * claims[key]:.0f} % of the {word}"
            for key, word in (("macs_kept", "MACs"), ("parameters_kept", "parameters"))
            if key in claims
        )
        figures = (
            ("the time", (row.get("latency_s") or {}).get("p50"), (base.get("latency_s") or {}).get("p50")),
            ("the size", row.get("size_bytes"), base.get("size_bytes")),
            ("the memory", row.get("peak_rss_bytes"), base.get("peak_rss_bytes")),
        )
        measured = ", ".join(f"{own / other:.2f}× {word}" for word, own, other in figures if own and other)
        threads = f" at {row['threads']} threads" if (row["threads"] or 1) > 1 else ""
        threads += f" on {row.get('host') or HERE}" if several else ""
        out.append(
            f"{candidate(row)}{threads}: claimed {claimed}; measured {measured or 'nothing'} of {candidate(base)}"
        )
    return out


def candidate(row: Mapping[str, Any]) -> str:
    return name(row)


def _sqnr(quality: Mapping[str, Any], reasons: Iterable[str]) -> str:
    if quality.get("sqnr_db") is not None:
        return f"{quality['sqnr_db']:.1f}"
    return "∞" if any(r.startswith(_INFINITE) for r in reasons) else NONE


def _ratio(latency: Mapping[str, Any]) -> str:
    ratio, interval = latency.get("ratio_to_float"), latency.get("ratio_ci95")
    if ratio is None:
        return NONE
    return f"{ratio:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def parity(record: Mapping[str, Any] | None) -> str:
    """int8: "≤ 1 LSB, 99.6 %"; float: "2e-07"; a record that failed starts with "FAILED"."""
    if not record:
        return NONE
    parts = []
    if record.get("max_rel_error") is not None:
        parts.append(f"{record['max_rel_error']:.0e}")
    if record.get("per_op_max_lsb") is not None:
        parts.append(f"{'≤ ' if record['per_op_max_lsb'] else ''}{record['per_op_max_lsb']} LSB")
    if record.get("label_agreement") is not None and record.get("max_rel_error") is None:
        parts.append(percentage(record["label_agreement"]))
    text = ", ".join(parts) or NONE
    return f"FAILED ({text})" if record.get("ok") is False else text


def remarks(document: Document, target: str) -> list[str]:
    """What a reader must know of single candidates: why a figure is missing, notes on stability; repeated ones once.

    Reasons for percentiles that the table does not show are left out.
    """
    told: dict[str, dict[str | None, list[str]]] = {}
    where = hosts(document, target)
    for host in where:
        rows = [a for a in document["artifacts"] if a["target"] == target and a.get("host") == host]
        for row in rows:
            for text in (*row.get("reasons", ()), *row.get("notes", ())):
                if str(text).startswith(_NOT_SHOWN):
                    continue
                names = told.setdefault(str(text), {}).setdefault(host, [])
                alike = [r for r in rows if text in (*r.get("reasons", ()), *r.get("notes", ()))]
                names.append(_place(row, alike, rows))
    return [f"{_whose(by_host, where)}: {text}" for text, by_host in told.items()]


def _whose(by_host: Mapping[str | None, list[str]], where: list[str | None]) -> str:
    """The candidates, and on which hosts where that is not all of them."""
    names = {host: ", ".join(dict.fromkeys(found)) for host, found in by_host.items()}
    if list(names) == where and len(set(names.values())) == 1:
        return next(iter(names.values()))
    return "; ".join(f"{found} on {host or HERE}" for host, found in names.items())


def _place(row: Mapping[str, Any], alike: list[Mapping[str, Any]], rows: list[Mapping[str, Any]]) -> str:
    """The candidate, with its threads where the remark does not hold for all its thread counts."""
    name = candidate(row)
    if sum(candidate(r) == name for r in alike) == sum(candidate(r) == name for r in rows):
        return name
    return f"{name} on {row.get('threads')} thread{'s' if row.get('threads') != 1 else ''}"


def warnings(document: Document) -> list[str]:
    """What limits the trust in the whole document, worst first."""
    found = [str(w) for w in document.get("warnings") or ()]
    for host, record in machines(document):
        found += [f"{host}: {w}" if host else str(w) for w in record.get("warnings") or ()]
    if (document.get("settings") or {}).get("quick"):
        found.append("quick run: few samples, the intervals are wide")
    dataset = document.get("dataset")
    if dataset is None:
        found.append("no test data: accuracy was not measured")
    elif dataset.get("samples", 0) < _SMALL_TEST_SET:
        found.append(f"only {dataset['samples']} test samples: an accuracy from so few is rough")
    return list(dict.fromkeys(found))


def machines(document: Document) -> list[tuple[str, Mapping[str, Any]]]:
    """(host, record) of every machine that measured; "" for the one that edgekit ran on."""
    only = document.get("machine") or {}
    several = document.get("machines")
    return [(only.get("host") or "", only)] if several is None else list(several.items())


def measured_on(document: Document) -> list[str]:
    """A line for each machine: its host, CPU, cores, instruction sets, system, and its state before measuring."""
    several = len(machines(document)) > 1
    return [f"{host or HERE}: {_machine(m)}" if host or several else _machine(m) for host, m in machines(document)]


def failed(document: Document) -> list[str]:
    """A line for each host that could not be measured on."""
    return [f"{row['host']} was not measured: {row['error']}" for row in document.get("failed") or ()]


def _machine(known: Mapping[str, Any]) -> str:
    before, after = known.get("before") or {}, known.get("after") or {}
    parts = [_text(known.get("cpu")), f"{_text(known.get('cores_allowed') or known.get('cores_physical'))} cores"]
    parts += [" ".join(known.get("isa") or ()) or "instruction sets unknown", _text(known.get("os"))]
    for field, label, unit in (("load_1min", "load", ""), ("governor", "governor", ""), ("temperature_c", "", " °C")):
        if before.get(field) is not None:
            was, now = before[field], after.get(field)
            was, now = (round(v, 2) if isinstance(v, float) else v for v in (was, now))
            change = f" → {now}" if now is not None and now != was else ""
            parts.append(f"{label} {was}{change}{unit}".strip())
    return ", ".join(p for p in parts if p != NONE)


def dataset(document: Document) -> str:
    data = document.get("dataset")
    if not data:
        return "none"
    return f"{_text(data.get('name'))}, {_text(data.get('samples'))} samples, digest {str(data.get('digest'))[:12]}"


# --- numbers as a person reads them -------------------------------------------------------------------


def _text(value: Any) -> str:
    return NONE if value is None else str(value)


def milliseconds(seconds: float | None) -> str:
    """Three significant digits."""
    return NONE if seconds is None else significant(1000 * seconds)


def significant(value: float, digits: int = 3) -> str:
    """Without an exponent: 0.0123, 1.23, 1230."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 999.9 is 1.00e3
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def size(count: float | None) -> str:
    """Decimal units, as disks are sold: 941 kB."""
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{significant(count)} {unit}"
        count /= 1000
    return f"{significant(count)} GB"


def percentage(share: float | None) -> str:
    """Never 100.0 % for less than all."""
    if share is None:
        return NONE
    return f"{min(100 * share, 99.9) if share < 1 else 100 * share:.1f} %"


def signed(value: float, digits: int) -> str:
    rounded = round(value, digits) + 0.0
    return f"{rounded:+.{digits}f}".replace("-", MINUS) if rounded else f"{0:.{digits}f}"
