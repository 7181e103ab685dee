"""The claims as tables: what may be lost at most, what that takes, and who is ahead."""

from __future__ import annotations

from cases import BYTES, CLAIMS, DISTILL, INT8, INT8_LOSS, LABELLED, MORE, PLAIN, SECONDS, TIMED
from results import REACHES, Results, Row

ROUNDING = 1e-9  # 97.8 - 96.8 is 1.0000000000000009


def claims(results: Results) -> str:
    lines = [
        "## Claims", "",
        "The verdict is of the unlabelled samples; beside it what is lost with labels, and with all samples.", "",
        "| claim | at most | measured | verdict | labelled | all samples |", "|---|--:|--:|---|--:|--:|",
    ]  # fmt: skip
    for claim in CLAIMS:
        row = results.own(claim.model, claim.budget, claim.variant)
        unit = "% of perplexity" if claim.model == "gpt_char" else "points"
        others = [results.own(claim.model, claim.budget, v) for v in (LABELLED, MORE) if claim.variant == PLAIN]
        beside = " | ".join("" if other is None else other.loss() for other in others) or "|"
        told = "–" if row is None else row.loss()
        lines.append(f"| {claim.name}: lost | {claim.most:g} {unit} | {told} | {_within(row, claim.most)} | {beside} |")
    lines += _costs(results) + _int8(results)
    lines += ["", "What edgekit and onnxsim lose at equal MACs, like beside like.", ""]
    lines += ["| model | edgekit | onnxsim | edgekit ahead | edgekit distilled | onnxsim trained | edgekit ahead |"]
    lines += ["|---|--:|--:|---|--:|--:|---|"]
    for model, budget in results.pruned():
        told = []
        for variant, trained in ((PLAIN, False), (DISTILL, True)):
            own, peer = results.own(model, budget, variant), results.peer(model, budget, trained=trained)
            told += ["–" if row is None else row.loss() for row in (own, peer)] + [_ahead(own, peer)]
        lines.append(f"| {_at(model, budget)} | {' | '.join(told)} |")
    return "\n".join([*lines, ""])


def _at(model: str, budget: str) -> str:
    return f"{model} at {100 * float(budget):g} %"


def _within(row: Row | None, most: float) -> str:
    if row is None:
        return "not run"
    if row.error or row.lost is None:
        return f"**fails**: {row.error}"
    return _told(row.lost, most)


def _told(value: float, most: float) -> str:
    return "holds" if value <= most + ROUNDING else "**fails**"


def _costs(results: Results) -> list[str]:
    row = results.own(*TIMED)
    if row is None or row.error:
        return []
    figures = (
        ("wall time", row.seconds[0], SECONDS, "s"),
        ("CPU time", row.seconds[1], SECONDS, "s"),
        ("peak memory", row.record["peak_rss_bytes"] / 1e9, BYTES / 1e9, "GB"),
    )
    return [
        f"| {_at(*TIMED)} of the MACs: {what} | {most:g} {unit} | {value:.3g} | {_told(value, most)} | | |"
        for what, value, most, unit in figures
    ]


def _int8(results: Results) -> list[str]:
    lines = []
    for model, budget in results.pruned():
        own, int8 = results.own(model, budget), results.own(model, budget, INT8)
        if own is None or int8 is None or own.lost is None:
            continue
        start = f"| {_at(model, budget)} of the MACs: lost by int8 after pruning | {INT8_LOSS:g} points |"
        if int8.error or int8.lost is None:
            lines.append(f"{start} fails | **fails**: {int8.error} | | |")
        else:
            more = int8.lost - own.lost
            lines.append(f"{start} {more:.2f} | {_told(more, INT8_LOSS)} | | |")
    return lines


def _ahead(own: Row | None, peer: Row | None) -> str:
    if own is None or peer is None:
        return "–"
    if own.error:
        return "**fails**"
    if peer.error:
        return "holds: onnxsim fails"
    if peer.macs > REACHES * own.macs:
        return f"holds: onnxsim leaves {100 * peer.macs:.0f} % at least"
    return "holds" if own.merit >= peer.merit - ROUNDING else "**fails**"
