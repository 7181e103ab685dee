"""How near a quantized model is to its float model, on samples held back from choosing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import NonFiniteError
from edgekit.passes.calibrate import feeds
from edgekit.passes.roundings import PRODUCTS, idle, leave_out

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]
# Bytes of held-back inputs kept in memory to judge with.
JUDGE_BYTES = 64 * 2**20
# Shares of equal labels that differ by less than two standard deviations (at 97 %) tell nothing: 0.05 on 50 samples.
NOISE_VARIANCE = 4 * 0.97 * 0.03
SAMPLES = 96
DRAWS, CONFIDENCE = 400, 0.75


@dataclass(frozen=True)
class Score:
    """sqnr_db: mean over the float outputs. agreement: share of equal classes, None where nothing tells of classes.

    drop: accuracy lost against the float model, where there are labels. errors: squared error over the output's mean
    square, summed over outputs, of each sample. samples: how many.
    """

    sqnr_db: float
    agreement: float | None
    drop: float | None
    errors: Array

    def figures(self) -> dict[str, float]:
        """For a plan."""
        known = {"sqnr_db": self.sqnr_db, "agreement": self.agreement, "accuracy_drop": self.drop}
        return {name: value for name, value in known.items() if value is not None}


def best(scores: Mapping[str, Score]) -> str:
    """The first name, unless a later one is surely better: by labels beyond noise, or else by the error's bootstrap.

    A few samples of a heavy-tailed error say little: what was tried first has the prior.
    """
    names = list(scores)
    leader = names[0]
    for name in names[1:]:
        if better(scores[name], scores[leader]):
            leader = name
    return leader


def better(challenger: Score, leader: Score) -> bool:
    if challenger.agreement is not None and leader.agreement is not None:
        gain = challenger.agreement - leader.agreement
        if abs(gain) > np.sqrt(NOISE_VARIANCE / max(1, len(leader.errors))):
            return gain > 0
    if len(challenger.errors) != len(leader.errors) or not len(leader.errors):
        return challenger.sqnr_db > leader.sqnr_db
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(leader.errors), (DRAWS, len(leader.errors)))
    wins = challenger.errors[rows].sum(axis=1) < leader.errors[rows].sum(axis=1)
    return bool(wins.mean() > CONFIDENCE)


class Judge:
    """Holds some samples and what the float model makes of them, within JUDGE_BYTES.

    model: float, prepared. data: bound to it. rows: positions of the samples that judge; all if there are none.
    """

    def __init__(
        self, model: ir.Model, data: Dataset, rows: frozenset[int], batch_size: int, most: int = SAMPLES
    ) -> None:
        self.names = judged(model)
        fixed = M.batch_of(M.signature(model))
        self.inputs: list[M.Tensors] = []
        labels: list[Array] = []
        size = count = 0
        for feed in feeds(M.signature(model), data, batch_size):
            picked = [i for i in range(feed.rows) if not rows or feed.first + i in rows]
            if not picked:
                continue
            # a fixed batch is kept whole: its other rows judge as well
            inputs = feed.inputs if fixed else {k: v[picked] for k, v in feed.inputs.items()}
            self.inputs.append(inputs)
            if feed.labels is not None:
                labels.append(feed.labels if fixed else feed.labels[picked])
            size += sum(v.nbytes for v in inputs.values())
            count += len(next(iter(inputs.values())))
            if size > JUDGE_BYTES or count >= most:
                break
        session = M.FloatSession(model, fetch=self.names)
        self.wanted = [{k: v for k, v in session.run(i).items() if k in self.names} for i in self.inputs]
        for outputs in self.wanted:
            for name, array in outputs.items():
                if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                    raise NonFiniteError(
                        f"NaN or Inf in output '{name}' of the float model",
                        "run it on this data and repair what makes it",
                    )
        self.labels = np.concatenate(labels) if labels else None
        self.classes = class_scores(model, self.wanted, self.labels)
        self.samples = count

    def score(self, quantized: ir.Model, *, everything: bool = False) -> Score:
        """A QDQ model in QDQ arithmetic, as a runtime that leaves idle roundings out computes it.

        everything: as hardware that has no floats computes it.
        """
        if not everything and (names := idle(quantized, PRODUCTS)):
            quantized = leave_out(quantized, names)
        session = M.FloatSession(quantized, fetch=self.names, optimize=False)
        return self.compare([session.run(i) for i in self.inputs])

    def compare(self, got: list[M.Tensors]) -> Score:
        """got: the judged values for each of `inputs`."""
        ratios, agreements, errors, drop = [], [], [], None
        for name in self.names:
            if not np.issubdtype(self.wanted[0][name].dtype, np.floating):
                continue
            a = np.concatenate([w[name] for w in self.wanted]).astype(np.float64)
            b = np.concatenate([g[name] for g in got]).astype(np.float64)
            signal, noise = _energy(a), _energy(a - b)
            ratios.append(10 * np.log10(max(float(signal.sum()), 1e-30) / max(float(noise.sum()), 1e-30)))
            errors.append(noise / max(float(signal.mean()), 1e-30))
            if name in self.classes:
                chosen, float_chosen = b.argmax(-1), a.argmax(-1)
                agreements.append(float((chosen == float_chosen).mean()))
                if name == self.names[0] and self.labels is not None and self.labels.shape == chosen.shape:
                    drop = float((float_chosen == self.labels).mean() - (chosen == self.labels).mean())
        return Score(
            float(np.mean(ratios)) if ratios else 0.0,
            float(np.mean(agreements)) if agreements else None,
            drop,
            np.sum(errors, axis=0) if errors and len({len(e) for e in errors}) == 1 else np.zeros(0),
        )


def _energy(values: Array) -> Array:
    return (
        np.asarray(np.square(values).reshape(len(values), -1).sum(axis=1)) if values.ndim else np.square(values)[None]
    )


def class_scores(model: ir.Model, wanted: list[M.Tensors], labels: Array | None) -> frozenset[str]:
    """The judged values whose largest entry means a class: a Softmax's inputs, distributions, or what labels say."""
    out = set()
    for value, name in zip(model.graph.outputs, judged(model), strict=True):
        array = wanted[0][name]
        if not np.issubdtype(array.dtype, np.floating) or array.ndim not in {2, 3} or array.shape[-1] < 2:
            continue
        softmax = name != value.name
        distribution = bool((array >= 0).all() and (np.abs(array.sum(axis=-1) - 1) <= 1e-3).all())
        # class numbers have one axis less than the scores; the first output is the one that labels are for
        first = value is model.graph.outputs[0]
        labelled = first and labels is not None and labels.dtype.kind in "biu" and labels.ndim == array.ndim - 1
        if softmax or distribution or labelled:
            out.add(name)
    return frozenset(out)


def judged(model: ir.Model) -> list[str]:
    """The outputs; for a Softmax what goes in, for what comes out is ruled by the few samples that are in doubt."""
    names = []
    for value in model.graph.outputs:
        producer = value.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type == "Softmax" else None
        names.append((value if source is None else source).name or "")
    return names
