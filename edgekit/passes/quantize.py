"""QuantizeInt8: calibrates, decides and applies the one quantized form, by the method that leaves the least error."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import NoCalibrationDataError, UnsupportedOpError, UsageError
from edgekit.passes import draft, grids, judge, ranges
from edgekit.passes.apply_plan import apply_plan, folded, prepared
from edgekit.passes.blas import single_threaded
from edgekit.passes.calibrate import Observed, bounded, check_finite, fill_histograms, held_back, observe
from edgekit.passes.decide import Decision, candidate_values, decide, weight_axis, weight_of
from edgekit.passes.grids import Grids, LiteRT, PowerOfTwo, widths_of
from edgekit.passes.plan import Activation, Bits, Method, QuantizationPlan, Weight
from edgekit.passes.reconstruct import ROWS, affordable, reconstruct
from edgekit.passes.rescale import rescaled
from edgekit.passes.smooth import Smooth
from edgekit.report.progress import Progress, silent
from edgekit.scheme import HOST, Scheme

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

__all__ = ["QuantizeInt8", "apply_plan"]

Calibration = Literal["auto", "output", "minmax", "average", "percentile", "mse", "kl"]
PER_TENSOR, CORRECTED, ROUNDED, SMOOTHED = "range per tensor", "bias corrected", "weights reconstructed", "smoothed"
REQUESTED = "kept float on request"
# A rescaled model this much worse (dB) before its weights are repaired is not better after.
HOPELESS_DB = 3.0
TRIAL = 2  # a trial repairs weights by this part of the samples: which form of the model is better shows all the same


@dataclass(frozen=True)
class QuantizeInt8:
    """Static int8: asymmetric per-tensor activations, symmetric per-channel weights, int32 bias (LiteRT's scheme).

    weight_bits: 7 for a CPU whose u8 x s8 kernels saturate, else 8. activation_bits: 16 for symmetric int16 activations
    on the same weights, summed in 64 bits.
    scheme: "fpga" for symmetric integers of the full range of 2 to 8 bits with power-of-two scales (see `grids`), where
    the model's output keeps 8. layer_bits: of it, (node or model input, (weight bits, activation bits)).
    calibration: one range estimator for all tensors, "output" for the best of each (see `ranges`), "auto" to try both.
    rounding: of the weights, to the nearest or by reconstruction, which corrects the bias as well. bias_correction: of
    weights rounded to the nearest. smooth: whether activation channels are rescaled.
    Each "auto" is decided by what leaves held-back samples closest to the float model.
    integer_softmax: for kernels that have no float arithmetic, see `decide`.
    keep_float: names of nodes to leave alone. tensors: (name, range or estimator) of those not to be chosen for.
    search_time: seconds after which nothing further is tried.
    """

    weight_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    activation_bits: Bits = 8
    scheme: Scheme = "litert"
    layer_bits: tuple[tuple[str, tuple[int, int]], ...] = ()
    calibration: Calibration = "auto"
    rounding: Literal["auto", "nearest", "reconstruct"] = "auto"
    bias_correction: Literal["auto", "on", "off"] = "auto"
    smooth: Literal["auto", "on", "off"] = "auto"
    per_channel: bool = True
    integer_softmax: bool = False
    batch_size: int = 32
    keep_float: tuple[str, ...] = ()
    tensors: tuple[tuple[str, tuple[float, float] | Method], ...] = ()
    search_time: float | None = None
    seed: int = 0

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model:
        """The QDQ model; `model` is not edited."""
        return apply_plan(model, self.plan(model, data))

    def plan(self, model: ir.Model, data: Dataset | None, progress: Progress = silent) -> QuantizationPlan:
        """Every decision. Raises NoCalibrationDataError, NonFiniteError, UnsupportedOpError (already quantized)."""
        return self.search(model, data, progress).run()

    def search(self, model: ir.Model, data: Dataset | None, progress: Progress = silent) -> Search:
        """What `plan` runs. Raises the same."""
        if data is None:
            raise NoCalibrationDataError(
                "int8 needs calibration data", "pass --data FILE with samples like those at run time"
            )
        self._check_widths()
        model = prepared(model)
        draft.check_weights(model)
        data = data.bind(M.signature(model))  # may change what a sample is: tokens become windows
        names = {node.name for node in model.graph}
        for name in self.keep_float:
            if name not in names:
                raise UnsupportedOpError(f"no node '{name}' to keep in float", "`edgekit inspect` lists the names")
        names |= {spec.name for spec in M.signature(model).inputs}
        for name, _ in self.layer_bits:
            if name not in names:
                raise UnsupportedOpError(f"no node or input '{name}' to give bits", "`edgekit inspect` lists the names")
        if self.scheme == "fpga":
            forced = dict.fromkeys(self.keep_float, REQUESTED)
            _check_integer(model, decide(model, forced, self.activation_bits, scheme="fpga"))
        return Search(self, model, data, progress)

    def _check_widths(self) -> None:
        """Raises UsageError for bits that the scheme does not have."""
        widths = {self.weight_bits, self.activation_bits, *(b for _, pair in self.layer_bits for b in pair)}
        if self.scheme == "fpga":
            if not widths <= set(range(2, 9)):
                raise UsageError(f"{max(widths)} bits for an FPGA", "2 to 8 bits")
        elif self.layer_bits or self.weight_bits not in (7, 8) or self.activation_bits not in (8, 16):
            raise UsageError(
                f"{self.weight_bits}-bit weights, {self.activation_bits}-bit activations, or widths by layer, in int8",
                "7 or 8 bits of weights and 8 or 16 of activations; fewer, and by layer, for an FPGA",
            )


def as_planned(step: QuantizeInt8, plan: QuantizationPlan) -> QuantizeInt8:
    """The step with what the search chose, so that nothing is searched again."""
    words = plan.method.split(", ")
    return replace(
        step,
        calibration="output" if words[0] == PER_TENSOR else words[0],  # type: ignore[arg-type]
        rounding="reconstruct" if ROUNDED in words else "nearest",
        bias_correction="on" if CORRECTED in words else "off",
        smooth="on" if SMOOTHED in words else "off",
        layer_bits=tuple(plan.layer_bits.items()),
    )


@dataclass(frozen=True)
class _Variant:
    """A model to quantize, the imported one or a rescaled form of it, with what was seen of it."""

    model: ir.Model
    factors: Mapping[str, tuple[float, ...]]
    decision: Decision
    seen: dict[str, Observed]
    best: Mapping[str, Method]  # estimator of each value by the error at the layers' outputs; empty if not asked for


class Search:
    """Tries methods in order of their price, judges each on the held-back samples, then repeats the best on all.

    chosen: of the last run, (variant, estimators, finish).
    """

    chosen: tuple[_Variant, Method | Mapping[str, Method], str]

    def __init__(self, step: QuantizeInt8, model: ir.Model, data: Dataset, progress: Progress) -> None:
        self.step, self.model, self.data, self.progress = step, model, data, progress
        self.held = held_back(data.samples, step.seed)
        self.scores: dict[str, judge.Score] = {}
        self.start = time.monotonic()
        self.judge = judge.Judge(model, data, self.held, step.batch_size)

    @single_threaded
    def run(self) -> QuantizationPlan:
        trials: dict[str, tuple[_Variant, Method | Mapping[str, Method], str]] = {}

        def attempt(variant: _Variant | None, method: Method | Mapping[str, Method], finish: str) -> str:
            assert variant is not None
            parts = [_word(method), *([SMOOTHED] if variant.factors else []), *([finish] if finish else [])]
            name = ", ".join(parts)
            if name not in self.scores:
                self.progress(f"try {name}", 0, 0)
                plan = self._finished(variant, method, finish, everything=not self.held)
                written = apply_plan(self.model, plan)
                self.scores[name] = self.judge.score(written, everything=self.step.scheme == "fpga")
                trials[name] = variant, method, finish
            return name

        first = "" if self.step.bias_correction == "off" else CORRECTED
        plain = self._variant(self.model, {}) if self.step.smooth != "on" else None
        for method in self._methods(plain) if plain is not None else ():
            attempt(plain, method, first)
        smoothed = self._smoothed(needed=plain is None)
        if smoothed is not None:
            attempt(smoothed, self._methods(smoothed)[0], first)
        if self.step.rounding != "nearest":
            most = max(score.sqnr_db for score in self.scores.values())
            for variant in (plain, smoothed):
                own = {name: score for name, score in self.scores.items() if trials[name][0] is variant}
                # of each form the ranges that are best already: repairing the weights hardly changes which these are
                name = judge.best(own) if own else ""
                if own and own[name].sqnr_db > most - HOPELESS_DB and not self._late():
                    attempt(variant, trials[name][1], ROUNDED)
        if self.step.rounding == "auto" and self.step.bias_correction == "auto" and not self._late():
            variant, method, finish = trials[judge.best(self.scores)]
            if finish != ROUNDED:  # which keeps, layer by layer, nothing that is worse
                attempt(variant, method, "")
        # the repaired weights go first: it takes evidence to prefer another to what is better nearly everywhere
        ranked = sorted(
            self.scores,
            key=lambda n: (trials[n][2] != ROUNDED, trials[n][0] is not plain, _word(trials[n][1]) != PER_TENSOR),
        )
        if self.step.rounding == "reconstruct":
            ranked = [n for n in ranked if trials[n][2] == ROUNDED] or ranked
        self.chosen = trials[judge.best({n: self.scores[n] for n in ranked})]
        self.progress("quantize with all samples", 0, 0)
        plan = self._finished(*self.chosen, everything=True)
        return replace(plan, scores={name: score.figures() for name, score in self.scores.items()})

    @single_threaded
    def again(self, keep_float: Sequence[str]) -> QuantizationPlan:
        """The plan of the last run with other nodes in float; what was observed is not observed again."""
        variant, method, finish = self.chosen
        forced = dict.fromkeys((*self.step.keep_float, *keep_float), REQUESTED)
        decision = self._decided(variant.model, variant.seen, forced)
        if not isinstance(method, str):
            method = {name: method.get(name, "minmax") for name in decision.activations}
        return self._finished(replace(variant, decision=decision), method, finish, everything=True)

    def _late(self) -> bool:
        return self.step.search_time is not None and time.monotonic() - self.start > self.step.search_time

    def _methods(self, variant: _Variant) -> list[Method | Mapping[str, Method]]:
        if self.step.calibration == "auto":
            if self.step.scheme == "fpga":
                return [variant.best, "minmax"]
            return ["minmax"] if self.step.activation_bits == 16 else [variant.best, "minmax", "mse"]
        return [variant.best if self.step.calibration == "output" else self.step.calibration]

    # --- variants ------------------------------------------------------------------------------------
    def _smoothed(self, needed: bool) -> _Variant | None:
        """The rescaled model; None if nothing is gained, unless one is `needed`."""
        if self.step.smooth == "off" or (self._late() and not needed):
            return None
        self.progress("smooth activations", 0, 0)
        factors = Smooth(seed=self.step.seed).factors(self.model, self.data)
        if not factors and not needed:
            return None
        return self._variant(rescaled(self.model, factors), factors)

    def _variant(self, model: ir.Model, factors: Mapping[str, tuple[float, ...]]) -> _Variant:
        self.progress("calibrate", 0, 0)
        step = self.step
        seen = observe(
            model,
            self.data,
            list(candidate_values(model, step.activation_bits, step.scheme)),
            batch_size=step.batch_size,
            held=self.held,
            means=draft.multiplied(model),
        )
        decision = self._decided(model, seen, dict.fromkeys(step.keep_float, REQUESTED))
        check_finite(seen, decision.activations)
        best: Mapping[str, Method] = {}
        if step.activation_bits != 16 and step.calibration not in ("minmax", "average"):
            used = {name: seen[name] for name in decision.activations}
            _note_bounded(model, used)
            gathered = ranges.Gathered(model, decision, self.data.samples, self.held, step.seed)
            chosen = step.calibration in ("auto", "output")
            fill_histograms(
                model,
                self.data,
                used,
                batch_size=step.batch_size,
                held=self.held,
                reader=gathered.take if chosen else None,
            )
            best = ranges.by_output(decision, seen, gathered, self._grids(model, decision)) if chosen else {}
        return _Variant(model, factors, decision, seen, best)

    def _decided(self, model: ir.Model, seen: dict[str, Observed], forced: dict[str, str]) -> Decision:
        def decided() -> Decision:
            step = self.step
            softmax = step.integer_softmax
            return decide(model, forced, step.activation_bits, integer_softmax=softmax, scheme=step.scheme)

        decision = decided()
        while extra := draft.unfit(model, decision, seen):
            forced |= extra
            decision = decided()
        if self.step.scheme == "fpga":
            _check_integer(model, decision)
        return decision

    def _grids(self, model: ir.Model, decision: Decision) -> Grids:
        step = self.step
        if step.scheme != "fpga":
            return LiteRT(step.activation_bits)
        return PowerOfTwo(step.activation_bits, widths_of(model, decision, dict(step.layer_bits)))

    # --- plans -----------------------------------------------------------------------------------------
    def _finished(
        self, variant: _Variant, method: Method | Mapping[str, Method], finish: str, *, everything: bool
    ) -> QuantizationPlan:
        plan = self._assemble(variant, method, everything=everything)
        if finish == CORRECTED:
            plan = replace(plan, bias_shifts=draft.bias_shifts(variant.model, plan, variant.seen))
        elif finish == ROUNDED:
            batches = affordable(variant.model, self.data, frozenset() if everything else self.held)
            part = 1 if everything else TRIAL
            plan, _ = reconstruct(
                variant.model, plan, batches[: -(-len(batches) // part)], self.step.seed, ROWS // part
            )
        return replace(plan, method=", ".join(p for p in (plan.method, finish) if p), factors=dict(variant.factors))

    def _assemble(
        self, variant: _Variant, method: Method | Mapping[str, Method], *, everything: bool
    ) -> QuantizationPlan:
        step, decision = self.step, variant.decision
        activations = draft.activations(
            variant.model,
            decision,
            variant.seen,
            method,
            everything,
            self._grids(variant.model, decision),
            dict(step.tensors),
        )
        nodes = {node.name: node for node in variant.model.graph}
        weights = {}
        for name in decision.quantized:
            weight = weight_of(nodes[name])
            if weight is not None:
                weights[name] = self._weight(nodes[name], weight.name or "", activations)
        return QuantizationPlan(
            weight_bits=step.weight_bits,
            activation_bits=step.activation_bits,
            method=", ".join([_word(method), *([SMOOTHED] if variant.factors else [])]),
            quantized=decision.quantized,
            fused={name: draft.fate(nodes[name], activations) for name in decision.fused},
            float_nodes=decision.float_nodes,
            activations=activations,
            weights=weights,
            groups=decision.groups,
            samples=self.data.samples,
            seed=step.seed,
            scheme=step.scheme,
            layer_bits=dict(step.layer_bits),
        )

    def _weight(self, node: ir.Node, value: str, activations: dict[str, Activation]) -> Weight:
        source = node.inputs[0]
        scale = activations[(source.name or "") if source is not None else ""].scale
        axis = weight_axis(node)
        array, bias = folded(node)
        if self.step.scheme == "fpga":
            bits = dict(self.step.layer_bits).get(node.name or "", (self.step.weight_bits, 0))[0]
            least = draft.least_scales(bias, scale, array.shape[axis])
            scales = grids.weight_scales(array, axis, bits, least, per_channel=self.step.per_channel)
            return Weight(value, axis, bits, tuple(float(s) for s in scales), full=True)
        limit = 2 ** (self.step.weight_bits - 1) - 1
        scales = draft.weight_scales(array, axis, limit, scale, bias, wraps=self.step.activation_bits == 8)
        if not self.step.per_channel:
            scales = np.full_like(scales, scales.max())
        return Weight(value, axis, self.step.weight_bits, tuple(float(s) for s in scales))


def _check_integer(model: ir.Model, decision: Decision) -> None:
    """Raises UnsupportedOpError for the first operator, but one at the end that is the host's, that must stay float."""
    for node in model.graph:
        why = decision.float_nodes.get(node.name or "")
        if why is not None and not (node.op_type in HOST and node.outputs[0].is_graph_output()):
            raise UnsupportedOpError(
                f"{node.op_type} '{node.name}' cannot become integers of an FPGA: {why}",
                "train without it, or end the model before it and leave it to the host",
            )


def _note_bounded(model: ir.Model, seen: Mapping[str, Observed]) -> None:
    """Let values know of the one bounded function that reads them."""
    for node in model.graph:
        value = node.inputs[0] if node.inputs else None
        function = bounded(node)
        found = seen.get(value.name or "") if value is not None and len(value.uses()) == 1 else None
        if function is not None and found is not None:
            found.through = function


def _word(method: Method | Mapping[str, Method]) -> str:
    return method if isinstance(method, str) else PER_TENSOR
