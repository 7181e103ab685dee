"""How many multiply-accumulates to keep for a wanted latency: cut and timed in turns, before anything is fitted.

A model's time depends on its shapes and not on its weights, so what is timed needs no repair.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import BudgetError
from edgekit.passes.surgery import cut
from edgekit.report.progress import Progress

if TYPE_CHECKING:
    from edgekit.backends import About, Backend
    from edgekit.passes.prune_channels import Measured, PruneChannels

STEPS = 6  # of the bisection: a 64th of the multiply-accumulates
LEAST, MOST = 0.03, 0.97


@dataclass(frozen=True)
class Timed:
    """speedup: time of the whole model over that of the pruned one, one thread; interval of 95 %."""

    backend: str
    share: float
    speedup: float
    interval: tuple[float, float]

    def words(self) -> str:
        low, high = self.interval
        return f"{self.speedup:.2f}× faster in {self.backend} [{low:.2f}, {high:.2f}], one thread, before quantization"

    def to_json(self) -> dict[str, Any]:
        return {"backend": self.backend, "speedup": self.speedup, "speedup_ci95": list(self.interval)}


@dataclass(frozen=True)
class Stopwatch:
    """Times float models in the runtimes of a target. backends: those that have a float32 candidate, installed."""

    backends: Sequence[Backend]
    about: About
    seed: int = 0

    def fastest(self, model: ir.Model, progress: Progress) -> Backend:
        if len(self.backends) == 1:
            return self.backends[0]
        times = self._medians([(b, model) for b in self.backends], progress)
        return self.backends[times.index(min(times))]

    def speedup(self, backend: Backend, whole: ir.Model, pruned: ir.Model, share: float, progress: Progress) -> Timed:
        from edgekit.bench.statistics import ratio_of_medians

        rounds = self._rounds([(backend, whole), (backend, pruned)], progress)
        ratio = ratio_of_medians(rounds[0], rounds[1], self.seed)
        return Timed(backend.NAME, share, ratio.value, (ratio.low, ratio.high))

    def _medians(self, cases: Sequence[tuple[Backend, ir.Model]], progress: Progress) -> list[float]:
        from edgekit.bench.statistics import summarize

        return [summarize(rounds).p50 for rounds in self._rounds(cases, progress)]

    def _rounds(self, cases: Sequence[tuple[Backend, ir.Model]], progress: Progress) -> list[list[Any]]:
        import numpy as np

        from edgekit.bench import schedule
        from edgekit.verify import opened

        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder, contextlib.ExitStack() as stack:
            workers = []
            for index, (backend, model) in enumerate(cases):
                path = Path(folder) / str(index)
                path.mkdir()
                backend.lower(model, "float32", path, self.about)
                worker = stack.enter_context(opened(backend, path, batch=1))
                worker.first(M.seeded_inputs(M.signature(model), M.batch_of(M.signature(model)) or 1, self.seed))
                workers.append(worker)
            series = schedule.run(workers, schedule.QUICK, self.seed, lambda stage, done, total: progress(stage, 0, 0))
        return [[np.asarray(r, np.float64) for r in s.rounds] for s in series]


def share_for(speedup: float, step: PruneChannels, found: Measured, stopwatch: Stopwatch, progress: Progress) -> Timed:
    """The largest share of multiply-accumulates that is so much faster in the target's fastest float runtime.

    Raises BudgetError if none is.
    """
    backend = stopwatch.fastest(found.model, progress)

    def timed(share: float) -> Timed:
        progress(f"time {share:.0%} of the multiply-accumulates", 0, 0)
        plan = replace(step, budget=share, measure="macs").decide(found)
        pruned = cut(found.model, found.coupling, plan.kept(found.coupling))
        return stopwatch.speedup(backend, found.model, pruned, share, progress)

    best, low, high = timed(LEAST), LEAST, MOST
    if best.speedup < speedup:
        raise BudgetError(
            f"pruning cannot make this model {speedup:g}× faster: cut as far as it goes it is {best.words()}",
            "ask for less",
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        now = timed(middle)
        if now.speedup >= speedup:
            best, low = now, middle
        else:
            high = middle
    return best
