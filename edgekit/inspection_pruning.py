"""What `edgekit inspect --pruning` tells: which channels can go, what the output suffers, accuracy against size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import model as M
from edgekit import pruning
from edgekit.errors import NoCalibrationDataError
from edgekit.passes import prune_plan_file
from edgekit.passes.prune_channels import PruneChannels
from edgekit.quantizing import digest
from edgekit.report.progress import Progress, silent

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

PRUNING_SCHEMA = 1  # 1: first
SHARES = (0.8, 0.65, 0.5, 0.35, 0.25)  # of the multiply-accumulates: pruned, repaired and judged, each


def inspect(
    path: Path | str,
    data: Dataset | None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    trust: bool = False,
    multiple: int = 8,
    seed: int = 0,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """path: a model. out: where the plan of half the multiply-accumulates is written, to edit and to prune by.

    "families": name, units, what may not go and why, damage by units gone, and the units kept at each share.
    "curve": per share what pruning and repair really left, judged on samples that nothing was chosen by.
    """
    from edgekit.passes.fold import Fold
    from edgekit.pipeline import load

    if data is None:
        raise NoCalibrationDataError("what channels are worth shows on data", "pass --data FILE (512 samples are good)")
    model = Fold()(load(path, shapes=shapes, trust=trust, data=data, progress=progress).model, None)
    split = pruning.samples(data.bind(M.signature(model)), seed)
    step = PruneChannels(multiple=multiple, seed=seed)
    found = step.measured(model, split.fit, split.choose, progress)
    curve, kept = [], {}
    for share in SHARES:
        tried = replace(step, budget=share)
        plan = tried.decide(found)
        made, _ = tried.apply(model, plan, split.learn, progress)
        progress("judge the pruned model", 0, 0)
        curve.append(
            {
                "asked": share,
                "macs_kept": plan.macs,
                "parameters_kept": plan.parameters,
                **pruning.verdict(model, made, split.judge).to_json(),
            }
        )
        kept[share] = {f.name: f.keep for f in plan.families}
        if out is not None and share == 0.5:
            prune_plan_file.write(out, plan, digest(model))
    return {
        "schema": PRUNING_SCHEMA,
        "families": [
            {
                "name": f.name, "units": f.units, "frozen": f.frozen or None, "damage": [list(d) for d in f.damage],
                "kept": None if f.frozen else {str(share): names[f.name] for share, names in kept.items()},
            } for f in plan.families
        ],
        "curve": curve,
        "samples": {"fit": split.fit.samples, "choose": split.choose.samples, "judge": split.judge.samples},
        "plan": None if out is None else str(out),
    }  # fmt: skip
