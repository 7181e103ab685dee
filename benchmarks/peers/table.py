"""Writes the kept results as a page of tables; nothing is computed here but which row is the best."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ISA = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
SCORES = {"classification": "accuracy", "tokens": "bits/token", "regression": "score"}
HEADER = """# edgekit and its peers

`EDGEKIT_ZOO=FOLDER python benchmarks/peers/run.py [--extra FOLDER]` writes this page. The zoo's models are in
[RESULTS.md](RESULTS.md); models that edgekit's methods were not made with, by `train_models.py` and `rescale.py`, in
[RESULTS-unseen.md](RESULTS-unseen.md).

{date}, {machine}.

{versions}

Every tool got the same float ONNX model (TensorFlow's converter and AI Edge Quantizer the Keras model that it was made
from) and the same calibration samples. Every file was judged by the same code (`evaluate.py`), against the float model
in ONNX Runtime, on test samples that no tool saw, in the runtime that it is for.

- **here**: on this CPU. **portable**: the same `.onnx` with every graph optimization off, which computes QDQ in
  float32, as on a CPU whose int8 kernels do not saturate (VNNI, ARM). LiteRT computes the same everywhere; OpenVINO has
  no such mode.
- **agreement**: equal argmax with the float model. **SQNR**: 10·log10(Σ float² / Σ difference²), of the logits where
  the model ends in a Softmax; **of outputs**: of the probabilities there, on this CPU. **time**: p50 over that of the
  float32 model in ONNX Runtime, one thread, in turns: under 1 is faster; with ~ where the machine had more to
  do than cores at that time, or that is not known: it may then be far off.
- **tool s (CPU s)**: the tool's whole process, imports included. Other work ran on the machine, which CPU seconds leave
  out. **peak MB**: resident memory of it and its children. edgekit's run makes all of its files, float32 and int8 for
  three runtimes, and proves each against the original.
"""


@dataclass(frozen=True)
class Row:
    """One file that a tool made, or why there is none."""

    record: dict[str, Any]
    file: dict[str, Any] | None
    task: str

    @property
    def own(self) -> bool:
        return bool(self.record["tool"] == "edgekit")

    @property
    def error(self) -> str:
        return str(self.record["error"] or (self.file or {}).get("error", ""))

    @property
    def runtime(self) -> str:
        """Without its version; where nothing ran, the file's name."""
        if self.file is None:
            return ""
        return str(self.file["file"] if self.error else self.file["runtime"].rsplit(" ", 1)[0])

    @property
    def name(self) -> str:
        return f"{self.runtime if self.own else self.record['tool']}, {self.record['variant']}"

    def figure(self, place: str, name: str) -> float | None:
        """place: "here" or "portable"; None where it was not or can't be measured."""
        found = (self.file or {}).get(place)
        value = None if found is None else found.get(name)
        return None if value is None else float(value)


def rows_of(record: dict[str, Any], task: str) -> list[Row]:
    return [Row(record, file, task) for file in (record["files"] or [None])]


def written(work: Path, order: list[str]) -> str:
    """The whole page, of all that is kept below `work`; tools in this order."""
    found: dict[str, list[Row]] = {}
    abouts = {}
    for folder in sorted((work / "results").iterdir()):
        abouts[folder.name] = json.loads((work / "models" / folder.name / "about.json").read_text(encoding="utf-8"))
        kept = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
        by_name = {f"{record['tool']}: {record['variant']}": record for record in kept}
        records = [by_name[name] for name in order if name in by_name]
        found[folder.name] = [row for record in records for row in rows_of(record, abouts[folder.name]["task"])]
    rows = [row for rows in found.values() for row in rows]
    head = HEADER.format(date=date.today().isoformat(), machine=machine_words(), versions=_versions(rows))
    return "\n".join(
        [
            head,
            *_left_out(rows, order),
            _summary(found),
            *(_model(name, abouts[name], rows) for name, rows in found.items()),
        ]
    )


def _left_out(rows: list[Row], order: list[str]) -> list[str]:
    """Which settings ran on no model."""
    ran = {f"{row.record['tool']}: {row.record['variant']}" for row in rows}
    missing = [f"- {name}" for name in order if name not in ran]
    return ["Settings that were not run:", "", *missing, ""] if missing else []


def _summary(found: dict[str, list[Row]]) -> str:
    lines = ["## Best of each side", "", "The best figure of all settings and files, and whose it is."]
    lines += ["", "| model | | edgekit | best peer |", "|---|---|---|---|"]
    for name, rows in found.items():
        for place in ("here", "portable"):
            own, peers = ([row for row in rows if row.own is side] for side in (True, False))
            lines.append(f"| {name} | {place} | {_best(own, place)} | {_best(peers, place)} |")
    return "\n".join([*lines, ""])


def _best(rows: list[Row], place: str) -> str:
    told = []
    for name, figure, text, sign in _BEST:
        values = [(figure(row, place), row) for row in rows]
        known = [(sign * value, row.name) for value, row in values if value is not None and not math.isnan(value)]
        if known:
            value, whose = max(known, key=lambda pair: pair[0])
            told.append(f"{name} {text(sign * value)} ({whose})")
    return "; ".join(told) or "–"


def _model(name: str, about: dict[str, Any], rows: list[Row]) -> str:
    score = SCORES[about["task"]]
    told = f"{about['task']}, trained on {about['trained_on']}"
    measured = [row for row in rows if row.file is not None and not row.error]
    if measured and measured[0].file:
        first = measured[0].file
        told += f"; {rows[0].record['samples']} calibration samples, {first['test_samples']} test samples"
        if first["float_score"] is not None:
            told += f"; float {score} {first['float_score']:.4f}"
    columns = (
        f"tool | settings | runtime | {score} here | portable | agreement here | portable | SQNR dB here | portable"
    )
    lines = [f"## {name}", "", told + ".", "", f"| {columns} | of outputs | kB | time | tool s (CPU s) | peak MB |"]
    return "\n".join([*lines, "|---|---|---|" + "--:|" * 11, *(_line(row) for row in rows), ""])


def _line(row: Row) -> str:
    start = f"| {row.record['tool']} | {row.record['variant']} | {row.runtime} |"
    cost = "– | – |"
    if "seconds" in row.record:
        seconds, cpu, peak = (row.record[name] for name in ("seconds", "cpu_seconds", "peak_rss_bytes"))
        cost = f"{seconds:.0f} ({cpu:.0f}) | {peak / 1e6:.0f} |"
    if row.error or row.file is None:
        return f"{start} {_cell(row.error)} | | | | | | | | | {cost}"
    shown = [(place, *pair) for pair in _SHOWN for place in ("here", "portable")] + [("here", "output_sqnr_db", _db)]
    values = [(row.figure(place, name), text) for place, name, text in shown]
    cells = ["–" if value is None else text(value) for value, text in values]
    ratio, size = row.file["p50_s"] / row.file["float_p50_s"], row.file["size_bytes"] / 1000
    busy = "" if row.file.get("load_per_core", math.inf) <= 1 else "~ "
    return f"{start} {' | '.join(cells)} | {size:.0f} | {busy}{ratio:.2f} | {cost}"


def short(record: dict[str, Any]) -> str:
    """One line for the terminal: score, agreement and SQNR here, and the same portable."""
    told = []
    for row in rows_of(record, ""):
        figures = [row.figure(place, name) for place in ("here", "portable") for name, _ in _SHOWN]
        values = " ".join("–" if value is None else f"{value:.4g}" for value in figures)
        told.append(f"{row.runtime} {row.error or values}")
    return "; ".join(told) + f"; {record['seconds']:.0f} s"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "‹").replace(">", "›")


def _share(value: float) -> str:
    return f"{value:.4f}"


def _db(value: float) -> str:
    return f"{value:.1f}"


def _bits(row: Row, place: str) -> float | None:
    return row.figure(place, "score") if row.task == "tokens" else None


_SHOWN = (("score", _share), ("agreement", _share), ("sqnr_db", _db))
_BEST: tuple[tuple[str, Callable[[Row, str], float | None], Callable[[float], str], int], ...] = (
    ("bits/token", _bits, _share, -1),  # fewer are better
    ("agreement", lambda row, place: row.figure(place, "agreement"), _share, 1),
    ("dB", lambda row, place: row.figure(place, "sqnr_db"), _db, 1),
)


def _versions(rows: list[Row]) -> str:
    """Per tool, since environments differ; the last run of a tool tells."""
    known = {row.record["tool"]: row.record["versions"] for row in rows if row.record.get("versions")}
    return "\n".join(f"- {tool}: {', '.join(f'{k} {v}' for k, v in found.items())}" for tool, found in known.items())


def machine_words() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.+)", text)
    known = set(flags[1].split()) if flags else set()
    isa = [name for name in ISA if name in known]
    lacks = "" if any("vnni" in name for name in isa) or platform.machine() != "x86_64" else ", no VNNI"
    cores = len(re.findall(r"^processor\s*:", text, re.M))
    return f"{model[1] if model else platform.machine()}, {cores} cores, {' '.join(isa)}{lacks}"
