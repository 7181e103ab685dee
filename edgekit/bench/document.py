"""Summarises the measurements of one run into the document that `edgekit bench --json` prints and reports are made of.

Pure: the same measurements always give the same document, so a report needs no second bench.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.bench import verdict
from edgekit.bench.results import Measurement
from edgekit.bench.statistics import Rounds, Summary, ratio_of_medians, summarize
from edgekit.target import candidate_id

DOCUMENT_SCHEMA = 1  # 1: first; host, machines, failed and the verdict's target and host came without a new number

Row = dict[str, Any]
_PARITY = (
    "per_op_max_lsb",
    "fraction_equal",
    "label_agreement",
    "label_agreement_unrounded",
    "sqnr_db",
    "max_rel_error",
)
_DROP = 0.01  # the budget of measurements that recorded none
_LATENCY_KEYS = ("p50", "p90", "p99", "mean", "ratio_to_float", "ratio_ci95")


def document(measurements: Sequence[Measurement], max_accuracy_drop: float | None = None) -> dict[str, Any]:
    """The bench document, schema 1; docs/reference.md, "The bench document". measurements: of one run on one machine.

    Absent figures are None and their row's `reasons` say why.
    max_accuracy_drop: judge by this budget instead of the one that was measured with.
    With a reference in the settings, both are to it.
    label: what a file is called that was measured for comparison and is no part of the build, else None.
    ratio_to_float: p50 over that of the fastest float32 row with the same number of threads.
    ratio_to_best_float: over that of the fastest float32 row of the target at any number of threads.
    """
    rows = [row for target in _targets(measurements) for row in _target_rows(target, measurements)]
    machine = measurements[-1].machine if measurements else {}
    facts = machine.get("facts", {})
    host = (measurements[-1].host if measurements else "") or None
    settings = dict(measurements[-1].settings) if measurements else {}
    drop = settings.get("max_accuracy_drop", _DROP) if max_accuracy_drop is None else max_accuracy_drop
    warnings = settings.pop("warnings", [])
    dataset = next((m.dataset for m in measurements if m.dataset is not None), None)
    return {
        "schema": DOCUMENT_SCHEMA,
        "run": measurements[-1].run if measurements else None,
        "taken": measurements[0].taken if measurements else None,
        "settings": {**settings, "max_accuracy_drop": drop},
        "warnings": list(warnings),
        "dataset": dataset,
        "preprocessing": (dataset or {}).get("preprocessing"),
        "machine": {"host": host, **facts, **{k: machine.get(k) for k in ("before", "after", "warnings")}},
        "artifacts": rows,
        "verdict": {
            verdict.key(target, host): {
                **verdict.decide([r for r in rows if r["target"] == target], drop),
                "target": target,
                "host": host,
            }
            for target in _targets(measurements)
        },
    }


def merged(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One document of several: targets that were measured after each other, machines that measured at the same time.

    `machine` is this machine's where it measured, else the first host's; where several did, `machines` holds all, by
    host ("" for this one).
    """
    machines: dict[str, dict[str, Any]] = {}
    for document in documents:
        own = document["machine"]
        known = machines.setdefault(own.get("host") or "", {**own, "warnings": []})
        machines[own.get("host") or ""] = {
            **own,
            "before": known.get("before"),
            "warnings": list(dict.fromkeys([*known["warnings"], *(own.get("warnings") or ())])),
        }
    hosts = sorted(machines)
    out = dict(documents[-1])
    out["machine"] = machines[hosts[0]]
    if len(hosts) > 1:
        out["machines"] = {host: machines[host] for host in hosts}
    out["warnings"] = list(dict.fromkeys(w for d in documents for w in d["warnings"]))
    rows = [row for d in documents for row in d["artifacts"]]
    order = list(dict.fromkeys(row["target"] for row in rows))
    out["artifacts"] = sorted(rows, key=lambda row: (order.index(row["target"]), row["host"] or ""))
    out["verdict"] = {name: v for d in documents for name, v in d["verdict"].items()}
    return out


def _targets(measurements: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(m.target for m in measurements))


def _target_rows(target: str, measurements: Sequence[Measurement]) -> list[Row]:
    own = [m for m in measurements if m.target == target]
    quality = {_candidate(m): m for m in own if m.metric == "quality"}
    layers = {_candidate(m): m for m in own if m.metric == "layers"}
    timed = [m for m in own if m.metric == "latency"]
    rounds = [[np.array(r, np.float64) for r in m.samples if r] for m in timed]
    summaries = [summarize(r) if r and m.valid else None for r, m in zip(rounds, timed, strict=True)]
    rows = []
    for index, measured in enumerate(timed):
        row = _row(measured, quality.get(_candidate(measured)), layers.get(_candidate(measured)))
        row["latency_s"] = _latency(index, timed, rounds, summaries, row)
        rows.append(row)
    return rows


def _candidate(measured: Measurement) -> str:
    return measured.label or candidate_id(measured.backend, measured.precision, measured.variant)


def _row(measured: Measurement, quality: Measurement | None, layers: Measurement | None) -> Row:
    judged = quality is not None and not quality.valid
    reasons = [*measured.reasons] if not measured.valid else []
    if quality is not None and judged:
        reasons += quality.reasons
    reasons += [*measured.reasons, *(quality.reasons if quality is not None else (_unjudged(measured),))]
    reasons += layers.reasons if layers is not None else ()
    figures = measured.figures
    seconds = figures if measured.valid else {}
    parity = measured.parity
    if parity is None and not measured.label:
        reasons.append("parity: not recorded in the manifest")
    return {
        "target": measured.target,
        "host": measured.host or None,
        "backend": measured.backend,
        "precision": measured.precision,
        "variant": measured.variant or None,
        "pruning": measured.pruning,
        "label": measured.label or None,
        "path": measured.path,
        "sha256": measured.sha256,
        "size_bytes": measured.size_bytes,
        "valid": measured.valid and not judged,
        "reasons": list(dict.fromkeys(reasons)),
        "notes": list(measured.notes),
        "latency_s": None,
        "load_s": seconds.get("load_s"),
        "import_s": seconds.get("import_s"),
        "first_inference_s": seconds.get("first_inference_s"),
        "peak_rss_bytes": figures.get("peak_rss_bytes"),
        "runtime_version": figures.get("runtime_version"),
        "threads": measured.threads,
        "batch": measured.batch,
        "quality": None if quality is None else dict(quality.figures),
        "parity": None if parity is None else {key: parity.get(key) for key in _PARITY},
        "layers": None if layers is None or not layers.valid else layers.figures["layers"],
    }


def _unjudged(measured: Measurement) -> str:
    """Why there is no quality."""
    if measured.dataset is None and measured.valid:
        return "quality: no data were given"
    return "quality: not judged, as the candidate " + ("has no outputs" if measured.valid else "is invalid")


def _latency(
    index: int, timed: Sequence[Measurement], rounds: Sequence[Rounds], summaries: Sequence[Summary | None], row: Row
) -> dict[str, Any]:
    """Seconds; adds the reasons for what is missing to the row."""
    empty: dict[str, Any] = dict.fromkeys((*_LATENCY_KEYS, "ratio_to_best_float", "ratio_to_best_float_ci95"))
    own = summaries[index]
    if own is None:
        if not row["reasons"]:
            row["reasons"].append("latency: not timed")
        return {**empty, "samples": sum(map(len, rounds[index])), "throughput_per_s": None}
    row["reasons"] += [r for r in own.reasons if r not in row["reasons"]]
    row["notes"] += [n for n in own.notes if n not in row["notes"]]
    floats = [i for i in _comparable(timed) if timed[i].valid and summaries[i] is not None]
    same = [i for i in floats if timed[i].threads == timed[index].threads]
    found = {**empty, "p50": own.p50, "p90": own.p90, "p99": own.p99, "mean": own.mean, "samples": own.samples}
    found["throughput_per_s"] = (timed[index].batch or 1) / own.mean
    for among, key, interval in (
        (same, "ratio_to_float", "ratio_ci95"),
        (floats, "ratio_to_best_float", "ratio_to_best_float_ci95"),
    ):
        fastest = min(among, key=lambda i: _p50(summaries[i]), default=None)
        if fastest is None:
            row["reasons"].append(f"{key}: no float32 candidate was timed")
            continue
        if among is floats and same and fastest == min(same, key=lambda i: _p50(summaries[i])):
            found[key], found[interval] = found["ratio_to_float"], found["ratio_ci95"]
            continue
        seed = int(timed[index].settings.get("seed", 0))
        ratio = ratio_of_medians(rounds[index], rounds[fastest], seed)
        found[key], found[interval] = ratio.value, [ratio.low, ratio.high]
    return found


def _comparable(timed: Sequence[Measurement]) -> list[int]:
    """What ratios are to: the reference of the run, or the build's float32 candidates, or, of files alone, theirs."""
    reference = timed[0].settings.get("reference") if timed else None
    if reference is not None:
        return [i for i, m in enumerate(timed) if _candidate(m) == reference]
    alone = all(m.label for m in timed)
    return [i for i, m in enumerate(timed) if m.precision == "float32" and not m.variant and (alone or not m.label)]


def _p50(summary: Summary | None) -> float:
    return float("inf") if summary is None else summary.p50
