"""Writes what is kept of all jobs as a page: claims first, then tables. Nothing is computed here but differences."""

from __future__ import annotations

import os
import platform
import re
from datetime import date
from pathlib import Path
from typing import Any

from cases import DISTILL, EDGEKIT, INT8, LABELLED, MORE, PEER, PLAIN, Job
from claims import claims
from results import REACHES, Results, Row

HEADER = """# Pruning: edgekit beside onnxsim

`EDGEKIT_ZOO=FOLDER python benchmarks/pruning/run.py [--extra FOLDER] [--distill 5m]` writes this page.

{date}, {machine}.

{versions}

Both sides got the same float model and the same {samples} samples without labels. edgekit fits layers on some of
them, chooses channels by others and judges by the rest, as `edgekit convert --prune` does. onnxsim prunes at the
sparsity that leaves fewest multiply-accumulates and not fewer than edgekit's share, rounded up to half a percent; its
rows are the best of its settings, picked on the test samples, among those that reach {reaches:.2f} times edgekit's.
Every file was judged by the same code (`judge.py`) on test samples that neither saw, 2000 where there are so many.

- **finetuned**: onnxsim's fit in closed form, with its ridge. **trained**: its training of the products' weights by the
  float model, 1000 steps. **distilled**: edgekit's training by the float model.
- **lost**: points of accuracy, or % of perplexity. **agrees**: equal argmax with the float model. **SQNR**: of what
  goes into a final Softmax. **MACs**, **parameters**: % of the float model's.
- **s (CPU s)**, **MB**: edgekit's whole process, imports included; of onnxsim what its row took by itself, and the
  memory of the process that ran all of its settings. ~: while the machine had more to do than cores.
"""


def short(record: dict[str, Any]) -> str:
    """One line for the terminal."""
    told = [
        f"{f.get('setting', '')} {f.get('score') or f.get('output_sqnr_db') or f.get('error')}".strip()
        for f in record["files"]
    ]
    return "; ".join(told) + f"; {record['seconds']:.0f} s"


def written(work: Path) -> str:
    results = Results(work)
    parts = [_header(results), claims(results), *(_model(results, name) for name in results.models)]
    return "\n".join([*parts, _settings(results), _weights(results), _quantized(results), _pairs(results)])


def _header(results: Results) -> str:
    versions: dict[str, dict[str, str]] = {}
    sizes = set()
    for record in results.records.values():
        versions.setdefault(record["tool"], {}).update(record.get("versions", {}))
        given = record.get("told", {}).get("samples")
        if given and record["variant"] == PLAIN:
            sizes.add(sum(given.values()))
    lines = [
        f"- {tool}: {', '.join(f'{k} {v}' for k, v in found.items())}" for tool, found in versions.items() if found
    ]
    return HEADER.format(
        date=date.today().isoformat(),
        machine=_machine(),
        versions="\n".join(sorted(lines)),
        reaches=REACHES,
        samples=" or ".join(str(n) for n in sorted(sizes)),
    )


def _machine() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"model name\s*:\s*(.+)", text)
    return f"{found[1] if found else platform.machine()}, {len(re.findall(r'^processor', text, re.M))} cores"


def _model(results: Results, model: str) -> str:
    about = results.tasks[model]
    score = {"classification": "accuracy %", "tokens": "bits/token", "regression": "score"}[about["task"]]
    rows = [r for b in results.budgets(model, "channels") for r in (results.own(model, b),) if r and not r.error]
    told = f"{about['task']}, trained on {about['trained_on']}"
    if rows:
        file = rows[0].file
        whole = "" if file["float_score"] is None else f"; float {score} {_score(file['float_score'], about['task'])}"
        told += f"{whole}; {file['float_macs'] / 1e6:.2f} M MACs, {file['float_parameters'] / 1e3:.0f} k parameters"
    figures = f"MACs | parameters | {score} | lost | agrees % | SQNR dB | s (CPU s) | MB"
    lines = [
        f"## {model}",
        "",
        f"{told}.",
        "",
        f"| budget | tool | settings | {figures} |",
        "|--:|---|---|" + "--:|" * 8,
    ]
    for budget in results.budgets(model, "channels"):
        for variant in (PLAIN, LABELLED, MORE, DISTILL):
            row = results.own(model, budget, variant)
            if row is not None:
                lines.append(_line(row, budget, EDGEKIT, variant))
        for trained in (False, True):
            peer = results.peer(model, budget, trained=trained)
            if peer is not None:
                lines.append(_line(peer, budget, PEER, peer.file.get("setting", "")))
    return "\n".join([*lines, ""])


def _line(row: Row, budget: str, tool: str, setting: str) -> str:
    start = f"| {100 * float(budget):g} % | {tool} | {setting} |"
    if row.error:
        return f"{start} {_cell(row.error)} | | | | | | | |"
    f = row.file
    wall, cpu = row.seconds
    busy = "~ " if row.record["load"] > (os.cpu_count() or 1) + 0.5 else ""
    figures = [
        f"{100 * row.macs:.1f}", f"{100 * f['parameters'] / f['float_parameters']:.1f}", _score(f["score"], row.task),
        "–" if row.lost is None else f"{row.lost:.2f}", _percent(f["agreement"]), f"{f['sqnr_db']:.1f}",
        f"{busy}{wall:.0f} ({cpu:.0f})", f"{row.record['peak_rss_bytes'] / 1e6:.0f}",
    ]  # fmt: skip
    return f"{start} {' | '.join(figures)} |"


def _score(value: float | None, task: str) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if task == "tokens" else f"{100 * value:.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _settings(results: Results) -> str:
    """onnxsim's, by what they lose; one line for each error, which many share."""
    lines = ["## onnxsim's settings", ""]
    lines += ["What each loses (points, % of perplexity; dB where there are no classes), @ its share of the MACs in %."]
    for model, budget in results.pruned():
        rows = results.rows(Job(model, "channels", budget, PEER))
        told = [f"{r.file['setting']} {r.loss()} @ {100 * r.macs:.0f}" for r in rows if not r.error]
        errors: dict[str, list[str]] = {}
        for row in rows:
            if row.error:
                errors.setdefault(row.error, []).append(row.file.get("setting", "all"))
        told += [f"{len(names)} fail, such as {names[0]}: {_cell(error)}" for error, names in errors.items()]
        if told:
            lines += ["", f"**{model} at {100 * float(budget):g} %**: {'; '.join(told)}."]
    return "\n".join([*lines, ""])


def _weights(results: Results) -> str:
    lines = [
        "## Zeros in the weights", "",
        "They make nothing faster in these runtimes; **deflated**: bytes of all constants, of the float model's.", "",
        "| model | zeros asked for | tool | settings | zeros % | deflated | lost | agrees % | SQNR dB | s (CPU s) |",
        "|---|---|---|---|" + "--:|" * 6,
    ]  # fmt: skip
    for model in results.models:
        for pattern in results.budgets(model, "weights"):
            own, peer = results.own(model, pattern, kind="weights"), results.peer(model, pattern, "weights")
            for tool, row in ((EDGEKIT, own), (PEER, peer)):
                if row is not None:
                    lines.append(_zeros(row, model, pattern, tool))
    return "\n".join([*lines, ""])


def _zeros(row: Row, model: str, pattern: str, tool: str) -> str:
    asked = pattern if ":" in pattern else f"{100 * (1 - float(pattern)):g} %"
    start = f"| {model} | {asked} | {tool} | {row.file.get('setting', '')} |"
    if row.error:
        return f"{start} {_cell(row.error)} | | | | | |"
    f, (wall, cpu) = row.file, row.seconds
    size, cost = f["deflated_bytes"] / f["float_deflated_bytes"], f"{wall:.0f} ({cpu:.0f})"
    figures = (
        f"{100 * f['zeros']:.0f}",
        f"{size:.2f}",
        row.loss(),
        _percent(f["agreement"]),
        f"{f['sqnr_db']:.1f}",
        cost,
    )
    return f"{start} {' | '.join(figures)} |"


def _quantized(results: Results) -> str:
    lines = [
        "## Pruned, then int8", "",
        "Static int8 of the pruned model with the same samples; every graph optimization of the runtime off.", "",
        "| model | budget | pruned loses | pruned and int8 loses | agrees % | s (CPU s) |", "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for model, budget in results.pruned():
        own, int8 = results.own(model, budget), results.own(model, budget, INT8)
        if own is None or int8 is None:
            continue
        start = f"| {model} | {100 * float(budget):g} % | {own.loss()} |"
        if int8.error:
            lines.append(f"{start} {_cell(int8.error)} | | |")
            continue
        wall, cpu = int8.seconds
        lines.append(f"{start} {int8.loss()} | {_percent(int8.file['agreement'])} | {wall:.0f} ({cpu:.0f}) |")
    return "\n".join([*lines, ""])


def _pairs(results: Results) -> str:
    """Agreement on test samples, what is lost there, and what `pruning.LOSSES` expects of that agreement."""
    from edgekit.pruning import Verdict

    lines = [
        "## What agreement tells of the loss", "",
        "Of edgekit's models: agreement with the float model on the test samples, the points lost on them, and what",
        "`edgekit.pruning.LOSSES` expects; and the same of the samples held back from pruning, which a user is told.",
        "", "| agrees % | lost | expected | held back: agrees % | expected | model |", "|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    found = []
    for (model, _), record in results.records.items():
        if record["tool"] != EDGEKIT or record["error"] or results.tasks[model]["task"] != "classification":
            continue
        row = Row(record, record["files"][0], "classification")
        if row.error or row.lost is None:
            continue
        held = record["told"].get("verdict", {})
        told = ("–", "–")
        if held.get("agreement") is not None:
            told = (_percent(held["agreement"]), f"{held['expected_points_lost']:.2f}")
        name = f"{model}, {record['kind']} {record['budget']}, {record['variant']}"
        agreement = row.file["agreement"]
        expected = Verdict(0, 0.0, agreement, None).expected
        figures = (f"{100 * agreement:.2f}", f"{row.lost:.2f}", f"{expected:.2f}", *told, name)
        found.append((-agreement, f"| {' | '.join(figures)} |"))
    return "\n".join([*lines, *(line for _, line in sorted(found)), ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "‹").replace(">", "›")
