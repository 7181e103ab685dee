"""Turns a comparison document into the lines of text cells that the terminal shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekit.report import summary

Cells = tuple[str, str, str, str]


def lines(document: Mapping[str, Any]) -> list[Cells]:
    """(what, A's, B's, B against A)."""
    a, b = document["a"], document["b"]
    out = [
        ("file", a["path"], b["path"], ""),
        ("numbers", f"{a['backend']} {a['precision']}", f"{b['backend']} {b['precision']}", ""),
        ("size", summary.size(a["size_bytes"]), summary.size(b["size_bytes"]), f"{document['size_ratio']:.2f}×"),
    ]
    for one, two, ratio in zip(a["latency_s"], b["latency_s"], document["latency"], strict=True):
        threads = f"p50 ms, {ratio['threads']} thread{'s' if ratio['threads'] != 1 else ''}"
        out.append((threads, summary.milliseconds(one["p50"]), summary.milliseconds(two["p50"]), _ratio(ratio)))
    score = document["score"]
    if score is not None:
        _, name, factor, digits = next(figure for figure in summary.QUALITY if figure[0] == score)
        own = [f"{factor * side['quality'][score]:.{digits}f}{' %' if factor == 100 else ''}" for side in (a, b)]
        change = summary.signed(factor * document["score_difference"], digits)
        out.append((name, own[0], own[1], change + (" points" if factor == 100 else "")))
    if document["agreement"] is not None:
        out.append(("same top-1", "", "", summary.percentage(document["agreement"])))
    if document["max_difference"] is not None:
        out.append(("largest difference", "", "", summary.significant(document["max_difference"])))
    if document["sqnr_db"] is not None:
        out.append(("SQNR dB", "", "", f"{document['sqnr_db']:.1f}"))
    return out


def _ratio(ratio: Mapping[str, Any]) -> str:
    if ratio["ratio"] is None:
        return summary.NONE
    low, high = ratio["ci95"]
    return f"{ratio['ratio']:.2f}× [{low:.2f}, {high:.2f}]"


def remarks(document: Mapping[str, Any]) -> list[str]:
    """Notes on each side."""
    return [f"{name}: {note}" for name, side in (("A", document["a"]), ("B", document["b"])) for note in side["notes"]]
