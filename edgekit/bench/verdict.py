"""Decides which candidate of a target ships, from the rows of a bench document alone.

The rules, in order:

1. An invalid candidate, or one without a latency, is out. Without a valid float32 candidate nothing ships: there is
   nothing to judge the others by.
2. A candidate that is not float32 must keep the quality of the float reference (the target's first valid float32
   row). With `budget` = --max-accuracy-drop: accuracy (or R²) at most `budget` lower; without labels, agreement with
   float at least 1 − AGREEMENT_PER_DROP·budget, and where there are no classes, an SQNR of −10·log10(budget) dB or
   more, which is the same budget of unexplained variance. Either will do where nothing tells whether the outputs are
   class scores. What was not measured is not shown, and does not ship.
3. Each candidate competes with its fastest thread count.
4. A candidate that is not float32 must be faster than the fastest float32: the whole 95 % interval of the ratio below
   1.
5. The fastest p50 ships; among candidates that are not float32, a smaller artifact ships in its place when its p50 is
   within EQUAL of it and their intervals overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgekit.budget import AGREEMENT_PER_DROP
from edgekit.target import candidate_id

Row = Mapping[str, Any]

EQUAL = 1.03  # the bound that the harness itself is held to: benchmarks/harness_overhead.py
_SMALLER = 0.95  # a size difference below 5 % is no reason to prefer


def key(target: str, host: str | None) -> str:
    """What the verdict on a target is called: the target, and where it was measured if that was not here."""
    return f"{target} on {host}" if host else target


def decide(rows: Sequence[Row], max_accuracy_drop: float) -> dict[str, Any]:
    """rows: the artifacts of one target. Returns {"ship": id or None, "threads": int or None, "why": sentence}.

    Files that stand beside a build for comparison never ship.
    """
    compared = [r for r in rows if r.get("label")]
    rows = [r for r in rows if not r.get("label")]
    if compared and not rows:
        return {"ship": None, "threads": None, "why": f"nothing to choose: no part of a build ({_alone(compared)})"}
    timed = _best_threads(rows)
    if not timed:
        return {"ship": None, "threads": None, "why": _nothing(rows)}
    reference = next((r for r in rows if is_baseline(r) and r["valid"]), None)
    floats = [r for r in timed if is_baseline(r)]
    rejected: list[str] = [f"{name(r)} is invalid ({r['reasons'][0]})" for r in _invalid(rows)]
    if not floats:
        causes = [why for why in rejected if "-float32 is invalid" in why] or ["none was measured"]
        why = f"no valid float32 candidate to compare with: {'; '.join(causes)}"
        return {"ship": None, "threads": None, "why": why}
    best_float = min(floats, key=_p50)
    faster = []
    for row in sorted((r for r in timed if not is_baseline(r)), key=_p50):
        problem = quality_problem(row, reference, max_accuracy_drop) or _speed_problem(row)
        if problem is None:
            faster.append(row)
        else:
            rejected.append(f"{name(row)} {problem}")
    chosen = _smallest_of_the_fastest(faster) if faster else best_float
    why = _why_faster(chosen, best_float, reference) if faster else f"ship {name(chosen)}: the fastest float32"
    return {"ship": name(chosen), "threads": chosen["threads"], "why": "; ".join([why, *rejected])}


def name(row: Row) -> str:
    """As in a build folder; of a file beside it, its label."""
    return row.get("label") or candidate_id(row["backend"], row["precision"], row.get("variant") or "")


def is_baseline(row: Row) -> bool:
    """Whether it is the model as it came, which the others are judged by."""
    return row["precision"] == "float32" and not row.get("variant")


def quality_problem(row: Row, reference: Row | None, budget: float, than: str = "float") -> str | None:
    """Why this candidate does not keep the reference's quality, or None when it was shown to. than: its name."""
    own, float_ = row.get("quality") or {}, (reference or {}).get("quality") or {}
    for key, label in (("accuracy", "accuracy"), ("r2", "R²")):
        a, b = float_.get(key), own.get(key)
        if a is not None and b is not None:
            if a - b <= budget + 1e-9:
                return None
            return f"loses {_points(a - b, key)} of {label}, more than the {_points(budget, key)} allowed"
    disagrees = None
    if own.get("agreement_with_float") is not None:
        disagrees = _agreement_problem(own["agreement_with_float"], budget, than)
        if disagrees is None or own.get("task") != "unknown scores":
            return disagrees
    distant = _distance_problem(own, budget, than)
    return None if distant is None else " and ".join(filter(None, (disagrees, distant)))


def _agreement_problem(agreement: float, budget: float, than: str) -> str | None:
    floor = 1 - AGREEMENT_PER_DROP * budget
    if agreement >= floor - 1e-9:
        return None
    return f"agrees with {than} on only {100 * agreement:.1f} % of the samples, less than {100 * floor:.1f} %"


def _distance_problem(own: Mapping[str, Any], budget: float, than: str) -> str | None:
    error = own.get("max_abs_err")
    if error is None:
        return f"was not compared with {than} (pass --data)"
    sqnr = own.get("sqnr_db")
    floor_db = -10 * math.log10(budget) if budget > 0 else math.inf
    if error == 0 or (sqnr is not None and sqnr >= floor_db):
        return None
    return f"is too far from {than}: SQNR {'unknown' if sqnr is None else f'{sqnr:.1f} dB'}, below {floor_db:.1f} dB"


def _speed_problem(row: Row) -> str | None:
    latency = row["latency_s"]
    low, high = latency["ratio_to_best_float_ci95"]
    if high < 1:
        return None
    ratio = latency["ratio_to_best_float"]
    told = f"{ratio:.2f}× the time of the best float32 [{low:.2f}, {high:.2f}]"
    return f"is not faster here: {told}" if ratio >= 1 else f"is not shown to be faster by these samples: {told}"


def _best_threads(rows: Sequence[Row]) -> list[Row]:
    """The fastest row of each valid candidate that has a latency."""
    best: dict[str, Row] = {}
    for row in rows:
        if not row["valid"] or _p50(row) is None:
            continue
        if name(row) not in best or _p50(row) < _p50(best[name(row)]):
            best[name(row)] = row
    return list(best.values())


def _invalid(rows: Sequence[Row]) -> list[Row]:
    return list({name(r): r for r in rows if not r["valid"] and r["reasons"]}.values())


def _p50(row: Row) -> Any:
    return (row.get("latency_s") or {}).get("p50")


def _smallest_of_the_fastest(rows: Sequence[Row]) -> Row:
    """The fastest, or the smallest of those that cannot be told from it."""
    fastest = min(rows, key=_p50)
    high = fastest["latency_s"]["ratio_to_best_float_ci95"][1]
    equal = [
        r for r in rows if r["latency_s"]["ratio_to_best_float_ci95"][0] <= high and _p50(r) <= EQUAL * _p50(fastest)
    ]
    smallest = min(equal, key=lambda r: r["size_bytes"])
    return smallest if smallest["size_bytes"] < _SMALLER * fastest["size_bytes"] else fastest


def _why_faster(row: Row, best_float: Row, reference: Row | None) -> str:
    latency = row["latency_s"]
    low, high = latency["ratio_to_best_float_ci95"]
    gain = f"{1 / latency['ratio_to_best_float']:.2f}× faster than the best float32 ({name(best_float)})"
    parts = [
        f"ship {name(row)}: {gain} [{1 / high:.2f}, {1 / low:.2f}]",
        _quality_phrase(row, reference),
    ]
    if row["size_bytes"] and best_float["size_bytes"]:
        times = best_float["size_bytes"] / row["size_bytes"]
        parts.append(f"{times:.1f}× smaller" if times >= 1 else f"{1 / times:.1f}× larger")
    return ", ".join(parts)


def _quality_phrase(row: Row, reference: Row | None) -> str:
    own, float_ = row.get("quality") or {}, (reference or {}).get("quality") or {}
    for key, label in (("accuracy", "accuracy"), ("r2", "R²")):
        a, b = float_.get(key), own.get(key)
        if a is not None and b is not None:
            return f"{label} {_points(b - a, key, signed=True)}{_doubt(own)}"
    distance = f"SQNR {own['sqnr_db']:.1f} dB" if own.get("sqnr_db") is not None else "equal to float"
    if own.get("agreement_with_float") is None:
        return distance
    agreement = f"{100 * own['agreement_with_float']:.1f} % agreement with float (no labels)"
    return f"{agreement}, {distance}" if own.get("task") == "unknown scores" else agreement


def _doubt(quality: Mapping[str, Any]) -> str:
    """The standard error of the paired difference: sqrt(flips that change the score) / n."""
    wrong, right, count = (quality.get(k) for k in ("flips_to_wrong", "flips_to_right", "positions"))
    if not count or wrong is None or right is None or wrong + right == 0:
        return ""
    return f" (± {100 * math.sqrt(wrong + right) / count:.1f})"


def _points(value: float, key: str, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if key == "r2":
        return format(value, f"{sign}.4f")
    return format(round(100 * value, 1) + 0.0, f"{sign}.1f").replace("-", "−") + " points"


def _alone(rows: Sequence[Row]) -> str:
    """Each file's fate in a few words."""
    told = {name(r): "measured" if r["valid"] and _p50(r) is not None else r["reasons"][0] for r in reversed(rows)}
    return "; ".join(f"{file}: {fate}" for file, fate in reversed(told.items()))


def _nothing(rows: Sequence[Row]) -> str:
    """Each candidate's reason; what holds for all, once."""
    first = {name(r): r["reasons"][0] for r in rows if r["reasons"]}
    if len(first) > 1 and len(set(first.values())) == 1:
        return f"nothing ships: {next(iter(first.values()))}"
    causes = [f"{candidate}: {why}" for candidate, why in first.items()]
    return "nothing ships: " + ("; ".join(causes) if causes else "no candidate was measured")
