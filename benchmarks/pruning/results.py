"""What is kept of all jobs: a pruned file as a row, and whose row is the best."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import BUDGETS, EDGEKIT, PEER, PLAIN, Job, Kind

REACHES = 1.1  # times edgekit's MACs: what leaves more is not at equal MACs


@dataclass(frozen=True)
class Row:
    """One pruned file. file: its figures; error: why there is none."""

    record: dict[str, Any]
    file: dict[str, Any]
    task: str

    @property
    def error(self) -> str:
        return str(self.record["error"] or self.file.get("error", ""))

    @property
    def lost(self) -> float | None:
        """Points of accuracy or % of perplexity; None for outputs that are neither."""
        score, whole = self.file.get("score"), self.file.get("float_score")
        if score is None or whole is None:
            return None
        return float(100 * (2 ** (score - whole) - 1) if self.task == "tokens" else 100 * (whole - score))

    @property
    def trained(self) -> bool:
        return "trained" in self.file.get("setting", "")

    @property
    def merit(self) -> float:
        """The more the better."""
        lost = self.lost
        merit = self.file["output_sqnr_db"] if lost is None else -lost
        return -math.inf if math.isnan(merit) else float(merit)

    @property
    def macs(self) -> float:
        return float(self.file["macs"] / self.file["float_macs"])

    @property
    def seconds(self) -> tuple[float, float]:
        """Wall and CPU: of the file, where the tool told, or of the process."""
        source = self.file if "seconds" in self.file else self.record
        return float(source["seconds"]), float(source["cpu_seconds"])

    def loss(self) -> str:
        if self.error:
            return "fails"
        return f"{self.file['output_sqnr_db']:.1f} dB" if self.lost is None else f"{self.lost:.2f}"


class Results:
    """All that is kept below `work`."""

    def __init__(self, work: Path) -> None:
        self.records: dict[tuple[str, str], dict[str, Any]] = {}
        self.tasks: dict[str, dict[str, Any]] = {}
        for folder in sorted((work / "results").iterdir()):
            about = work / "models" / folder.name / "about.json"
            self.tasks[folder.name] = json.loads(about.read_text(encoding="utf-8"))
            for file in folder.glob("*.json"):
                self.records[folder.name, file.stem] = json.loads(file.read_text(encoding="utf-8"))

    @property
    def models(self) -> list[str]:
        order = list(BUDGETS)
        return sorted(self.tasks, key=lambda name: order.index(name) if name in order else len(order))

    def budgets(self, model: str, kind: Kind) -> list[str]:
        found = {r["budget"] for (name, _), r in self.records.items() if name == model and r["kind"] == kind}
        return sorted(found, reverse=True)

    def pruned(self) -> list[tuple[str, str]]:
        """(model, share) of all channel jobs, in order."""
        return [(model, budget) for model in self.models for budget in self.budgets(model, "channels")]

    def rows(self, job: Job) -> list[Row]:
        record = self.records.get((job.model, job.name))
        if record is None:
            return []
        return [Row(record, file, self.tasks[job.model]["task"]) for file in record["files"] or [{}]]

    def own(self, model: str, budget: str, variant: str = PLAIN, kind: Kind = "channels") -> Row | None:
        rows = self.rows(Job(model, kind, budget, EDGEKIT, variant))
        return rows[0] if rows else None

    def peer(self, model: str, budget: str, kind: Kind = "channels", trained: bool = False) -> Row | None:
        """Its best setting at equal MACs; where none reaches them, what comes nearest; an error if all fail."""
        every = self.rows(Job(model, kind, budget, PEER))
        rows = [row for row in every if row.trained == trained]
        working = [row for row in rows if not row.error]
        if not working:
            return rows[0] if rows else None
        own = self.own(model, budget, kind=kind)
        bound = REACHES * own.macs if own is not None and not own.error else math.inf
        reaching = [row for row in working if row.macs <= bound]
        return max(reaching, key=lambda row: row.merit) if reaching else min(working, key=lambda row: row.macs)
