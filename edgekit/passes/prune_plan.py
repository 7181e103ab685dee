"""What pruning decided: which channels of which family go, and what was measured for it. Printed, saved, edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgekit.errors import ArtifactError, UsageError
from edgekit.passes.coupling import Coupling, Family

Array = np.ndarray[Any, Any]
Measure = Literal["macs", "parameters"]


@dataclass(frozen=True)
class FamilyPlan:
    """One family. units: how many there are. keep: how many stay. order: their numbers, the first to go first.

    damage: [removed, damage] pairs, measured. frozen: why none may go, or "".
    """

    name: str
    units: int
    keep: int
    order: tuple[int, ...]
    damage: tuple[tuple[int, float], ...] = ()
    frozen: str = ""

    def removed(self) -> tuple[int, ...]:
        return self.order[: self.units - self.keep]


@dataclass(frozen=True)
class PruningPlan:
    """measure, budget: what was asked for. macs, parameters: shares kept, by the plan."""

    measure: str
    budget: float
    macs: float
    parameters: float
    importance: str
    families: tuple[FamilyPlan, ...]

    def kept(self, coupling: Coupling) -> Array:
        """bool per label. Raises ArtifactError if the plan is for another model."""
        known = {f.name: f for f in coupling.families()}
        gone: list[int] = []
        for plan in self.families:
            family = known.get(plan.name)
            if family is None or len(family.units) != plan.units or (family.frozen and plan.keep < plan.units):
                raise ArtifactError(
                    f"the pruning plan has a family '{plan.name}' that the model lacks", "plan it again for this model"
                )
            if not 1 <= plan.keep <= plan.units:
                raise UsageError(
                    f"the pruning plan keeps {plan.keep} of {plan.units} in '{plan.name}'", "keep 1 or more"
                )
            gone.extend(int(family.units[i]) for i in plan.removed())
        return coupling.without(gone)

    def to_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure, "budget": self.budget, "macs": self.macs, "parameters": self.parameters,
            "importance": self.importance,
            "families": [
                {
                    "name": f.name, "units": f.units, "keep": f.keep, "order": list(f.order),
                    "damage": [list(d) for d in f.damage], "frozen": f.frozen,
                } for f in self.families
            ],
        }  # fmt: skip

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PruningPlan:
        families = tuple(
            FamilyPlan(
                f["name"], f["units"], f["keep"], tuple(f["order"]), tuple((int(n), float(d)) for n, d in f["damage"]),
                f["frozen"],
            )
            for f in data["families"]
        )  # fmt: skip
        return PruningPlan(
            data["measure"], data["budget"], data["macs"], data["parameters"], data["importance"], families
        )


def numbers(family: Family, units: Array) -> tuple[int, ...]:
    """Root labels as numbers of units in the family."""
    return tuple(int(i) for i in np.searchsorted(family.units, units))


def frozen(families: Sequence[FamilyPlan]) -> list[str]:
    """Families that stay whole, with the reason, for a report."""
    return [f"{f.name}: {f.frozen}" for f in families if f.frozen]
