"""Removes channels from the graph and repairs what is left, without labels or training.

decide: channels of each family in the order in which they are missed least (`prune_importance`), what the output
suffers by the number that goes (`prune_damage`), how many go of each under a budget (`prune_allocate`). apply: cut them
out (`surgery`), fit the layers that are left to the float model's results (`prune_repair`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import UnsupportedOpError
from edgekit.passes import fold_graph as G
from edgekit.passes.coupling import Coupling, Family, Meter
from edgekit.passes.coupling_trace import trace
from edgekit.passes.judge import Judge
from edgekit.passes.prune_allocate import Choice, Cost, allocate, kept, widths
from edgekit.passes.prune_basis import basis, linear, rewritten
from edgekit.passes.prune_damage import curve, damage
from edgekit.passes.prune_exchange import exchanged
from edgekit.passes.prune_grams import Moments, in_parts, layer_of, moments
from edgekit.passes.prune_importance import Importance, order
from edgekit.passes.prune_plan import FamilyPlan, Measure, PruningPlan, numbers
from edgekit.passes.prune_readings import Reading, of_nodes
from edgekit.passes.prune_repair import repair
from edgekit.passes.reconstruct import affordable
from edgekit.passes.surgery import check, cut, ready
from edgekit.report.progress import Progress, silent

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]
# Shares of a family that are taken away to measure what the output suffers.
STOPS = (0.125, 0.25, 0.5, 0.75, 0.9)
JUDGES = 128  # samples that it is measured on
# Allocations are tried out, repaired on fewer samples, where that takes a second or two each: ResNet8 has 12.5 million.
EXCHANGE_MACS, EXCHANGE_SAMPLES = 5e7, 128


@dataclass(frozen=True)
class Measured:
    """A model made ready, its families, and of those that may lose channels the order and the damage."""

    model: ir.Model
    coupling: Coupling
    families: Sequence[Family]
    choices: Sequence[Choice]


@dataclass(frozen=True)
class PruneChannels:
    """The pass `prune_channels`: the same inputs and outputs, fewer channels between.

    budget: the share of `measure` to keep at most: multiply-accumulates or parameters. multiple: channel counts that
    the target's kernels like. importance: reconstruction (OBS), activation (magnitude times activation) or magnitude.
    keep: names of families that stay whole. Fitted on the data, judged on `held`, or on the last fifth without it.
    """

    budget: float = 0.5
    measure: Measure = "macs"
    multiple: int = 8
    importance: Importance = "reconstruction"
    keep: tuple[str, ...] = ()
    seed: int = 0

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model:
        if data is None:
            raise UnsupportedOpError("pruning fits layers to data", "pass a few hundred samples")
        return self.apply(model, self.plan(model, data, data), data)[0]

    def plan(self, model: ir.Model, data: Dataset, held: Dataset, progress: Progress = silent) -> PruningPlan:
        """model: float, folded. data: bound to it, channels are chosen by it. held: other samples, to judge with."""
        found = self.measured(model, data, held, progress)
        return self.decide(found, self._exchanged(found, data, held, progress))

    def measured(self, model: ir.Model, data: Dataset, held: Dataset, progress: Progress = silent) -> Measured:
        """What plans of any budget are made of; arguments as of `plan`."""
        model = prepared_for_pruning(model)
        coupling = trace(model)
        families = coupling.families()
        for family in families:
            if not family.frozen and not _readings(model, coupling, family):
                family.frozen = "no layer that reads these channels can be fitted"
        free = [f for f in families if not f.frozen and len(f.units) > 1 and f.name not in self.keep]
        if not free:
            told = "; ".join(f"{f.name}: {f.frozen or 'one channel'}" for f in families[:4]) or "no weights"
            raise UnsupportedOpError(f"nothing in this model can be pruned ({told})", "leave --prune out")
        model = self._rebased(model, coupling, free, data)
        return Measured(model, coupling, families, self._choices(model, coupling, free, data, held, progress))

    def decide(self, found: Measured, chosen: Sequence[int] | None = None) -> PruningPlan:
        """Under the budget, of what was measured. chosen: how many units each choice keeps, if that is known."""
        model, coupling, families, choices = found.model, found.coupling, found.families, found.choices
        meter = Meter(coupling, sizes(model))
        if chosen is None:
            cost = self._cost(found)
            chosen = allocate(choices, cost, self.budget * cost(np.ones(len(choices))))
        chosen = _inhabited(coupling, choices, chosen)
        plans = {}
        for choice, width in zip(choices, chosen, strict=True):
            family = choice.family
            stops = sorted(choice.order.weights)
            plans[family.name] = FamilyPlan(
                family.name, len(family.units), width, numbers(family, choice.order.units),
                tuple((s, round(choice.curve.at(s), 6)) for s in stops),
            )  # fmt: skip
        rows = [plans.get(f.name) or _whole(f, self.keep) for f in families]
        draft = PruningPlan(self.measure, self.budget, 1.0, 1.0, self.importance, tuple(rows))
        keep, everything = draft.kept(coupling), coupling.everything()
        macs, parameters = meter.macs(everything), meter.parameters(everything)
        return PruningPlan(
            self.measure, self.budget, meter.macs(keep) / max(macs, 1.0), meter.parameters(keep) / max(parameters, 1.0),
            self.importance, tuple(rows),
        )  # fmt: skip

    def apply(
        self, model: ir.Model, plan: PruningPlan, data: Dataset, progress: Progress = silent
    ) -> tuple[ir.Model, dict[str, float]]:
        """(the pruned and repaired model, per node its error as a share of that before the repair)."""
        model = prepared_for_pruning(model)
        coupling = trace(model)
        keep = plan.kept(coupling)
        names = {f.name for f in plan.families if f.keep < f.units}
        model = self._rebased(model, coupling, [f for f in coupling.families() if f.name in names], data)
        pruned = cut(model, coupling, keep)
        check(pruned)
        batches = affordable(model, data, frozenset())
        return pruned, repair(model, pruned, coupling, keep, batches, seed=self.seed, progress=progress)

    def _cost(self, found: Measured) -> Cost:
        return Cost(
            found.coupling, [c.family for c in found.choices], _terms(found.model, found.coupling, self.measure)
        )

    def _exchanged(self, found: Measured, data: Dataset, held: Dataset, progress: Progress) -> list[int]:
        """The allocation, improved by what repaired models suffer; as it is for models that this takes minutes for."""
        cost = self._cost(found)
        budget = self.budget * cost(np.ones(len(found.choices)))
        start = allocate(found.choices, cost, budget)
        if sum(w.macs for w in found.coupling.works) > EXCHANGE_MACS:
            return start
        judge = Judge(found.model, held, frozenset(), 64, most=JUDGES)
        batches = _first(affordable(found.model, data, frozenset()), EXCHANGE_SAMPLES)

        def suffered(widths: Sequence[int]) -> float:
            progress("try exchanges", 0, 0)
            keep = kept(found.coupling, found.choices, widths)
            if found.coupling.emptied(keep):
                return np.inf
            pruned = cut(found.model, found.coupling, keep)
            repair(found.model, pruned, found.coupling, keep, batches, seed=self.seed)
            session = M.FloatSession(pruned, fetch=judge.names)
            return damage(judge, [session.run(i) for i in judge.inputs])

        return exchanged(start, found.choices, cost, budget, suffered)

    def _rebased(self, model: ir.Model, coupling: Coupling, families: Sequence[Family], data: Dataset) -> ir.Model:
        """The same function, with linear families in the basis of `prune_basis`."""
        needs = {f.name: (f, _readings(model, coupling, f)) for f in linear(model, coupling, families)}
        bases = {}
        for names in in_parts({name: readings for name, (_, readings) in needs.items()}):
            found = moments(model, _distinct(needs[n][1] for n in names), data, self.seed)
            for name in names:
                if (transform := basis(coupling, needs[name][0], found)) is not None:
                    bases[name] = (needs[name][0], transform)
        return rewritten(model, coupling, bases) if bases else model

    def _choices(
        self,
        model: ir.Model,
        coupling: Coupling,
        families: Sequence[Family],
        data: Dataset,
        held: Dataset,
        progress: Progress,
    ) -> list[Choice]:
        judge = Judge(model, held, frozenset(), 64, most=JUDGES)
        needs = {f.name: _readings(model, coupling, f) for f in families}
        by_name = {f.name: f for f in families}
        choices: dict[str, Choice] = {}
        for names in in_parts(needs):
            progress("measure what channels carry", len(choices), len(families))
            found = moments(model, _distinct(needs[n] for n in names), data, self.seed)
            for name in names:
                progress("measure what the output suffers", len(choices), len(families))
                choices[name] = self._choice(model, coupling, by_name[name], found, judge)
        return [choices[f.name] for f in families]

    def _choice(
        self, model: ir.Model, coupling: Coupling, family: Family, found: Mapping[str, Moments], judge: Judge
    ) -> Choice:
        units = len(family.units)
        stops = sorted({max(1, int(units * share)) for share in STOPS} & set(range(1, units)))
        ranked = order(coupling, family, found, stops, self.importance)
        counts = widths(units, _positions(coupling, family), self.multiple)
        return Choice(family, ranked, curve(model, coupling, family, ranked, judge, len(judge.inputs)), counts)


def _inhabited(coupling: Coupling, choices: Sequence[Choice], widths: Sequence[int]) -> list[int]:
    """The widths, wider where a value would be left without channels, as a part of a Split may: it must keep one."""
    chosen = list(widths)
    while name := coupling.emptied(kept(coupling, choices, chosen)):
        labels = np.concatenate([coupling.roots(own) for own in coupling.on[name].values()])
        for index, choice in enumerate(choices):
            if np.isin(choice.family.units, labels).any() and chosen[index] < choice.widths[0]:
                chosen[index] = min(w for w in choice.widths if w > chosen[index])
    return chosen


def _readings(model: ir.Model, coupling: Coupling, family: Family) -> list[Reading]:
    """Of the layers that read the family's channels, those that can be fitted."""
    members = set(family.units.tolist())
    sites = [s for s in coupling.sites if s.role == "in" and members & set(coupling.roots(s.labels).tolist())]
    read = {(s.node, s.position) for s in sites}
    found = of_nodes(model, [s.node for s in sites])
    return [r for r in found if any((r.node.name, position) in read for position in r.first)]


def _first(batches: Sequence[M.Tensors], samples: int) -> list[M.Tensors]:
    """As many of the batches as hold so many samples, two at least."""
    counts = np.cumsum([len(next(iter(b.values()))) for b in batches])
    return list(batches[: max(2, int(np.searchsorted(counts, samples)) + 1)])


def _distinct(readings: Iterable[Sequence[Reading]]) -> list[Reading]:
    return list({r.key: r for part in readings for r in part}.values())


def prepared_for_pruning(model: ir.Model) -> ir.Model:
    """`ready`, every layer with a bias, which repair needs."""
    model = ready(model)
    for node in model.graph:
        if G.is_op(node, "Conv", "Gemm") and (len(node.inputs) < 3 or node.inputs[2] is None):
            layer = layer_of(node)
            if layer is not None:
                G.set_constant(
                    node, 2, f"{node.name}/bias", np.zeros(layer.weight.shape[0] * layer.weight.shape[2], np.float32)
                )
    return model


def sizes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """ "node:position" -> shape, of the floating point constants that nodes read."""
    found = {}
    for node in model.graph:
        for position, value in enumerate(node.inputs):
            array = G.array(value)
            if array is not None and np.issubdtype(array.dtype, np.floating):
                found[f"{node.name}:{position}"] = array.shape
    return found


def _terms(model: ir.Model, coupling: Coupling, measure: Measure) -> list[tuple[float, tuple[Array, ...]]]:
    if measure == "macs":
        return [(w.macs, w.factors) for w in coupling.works]
    axes: dict[str, list[Array]] = {name: [] for name in sizes(model)}
    for site in coupling.sites:
        axes.setdefault(f"{site.node}:{site.position}", []).append(site.labels)
    shapes = sizes(model)
    return [(float(np.prod(shapes[name])), tuple(found)) for name, found in axes.items() if name in shapes]


def _positions(coupling: Coupling, family: Family) -> int:
    """Channels per unit, in the constant that has fewest of them."""
    counts = [
        int(count)
        for site in coupling.sites
        if site.role != "along" and (count := (coupling.roots(site.labels) == family.units[0]).sum())
    ]
    return min(counts, default=1)


def _whole(family: Family, keep: Sequence[str]) -> FamilyPlan:
    why = family.frozen or ("asked for" if family.name in keep else "one channel")
    return FamilyPlan(family.name, len(family.units), len(family.units), tuple(range(len(family.units))), (), why)
