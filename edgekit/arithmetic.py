"""How near a quantized artifact is to its float model on each class of CPU: the same file computes different things.

x86 before VNNI multiplies u8 by s8 with VPMADDUBSW, whose pair sums saturate in 16 bits. CPUs with VNNI, AMX or Arm's
dot products sum exactly, which the integer reference does bit for bit wherever it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M

if TYPE_CHECKING:
    from edgekit.backends import Backend

Array = np.ndarray[Any, Any]

EXACT = "exact sums (x86 with VNNI or AMX, Arm)"
PAIRS = "pair sums that saturate (x86 before VNNI)"


@dataclass
class Distance:
    """How far outputs are from a reference's, summed up batch by batch; of the worst output where there are several."""

    samples: int = 0
    worst: float = 0.0
    same: int = 0
    labels: int = 0
    powers: dict[str, list[float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, expected: M.Tensors, got: M.Tensors) -> None:
        self.samples += len(next(iter(expected.values())))
        for name, value in expected.items():
            if name not in got or got[name].shape != value.shape:
                shape = got[name].shape if name in got else "none"
                self.problems.append(f"output '{name}' has shape {shape}, not {value.shape}")
                continue
            self.worst = max(self.worst, M.difference(value, got[name]))
            if np.issubdtype(value.dtype, np.floating):
                power = self.powers.setdefault(name, [0.0, 0.0])
                exact = value.astype(np.float64)
                power[0] += float((exact**2).sum())
                power[1] += float(((got[name] - exact) ** 2).sum())
                if value.ndim < 2 or value.shape[-1] < 2:
                    continue
                equal = value.argmax(-1) == got[name].argmax(-1)
                self.same, self.labels = self.same + int(equal.sum()), self.labels + equal.size

    def sqnr_db(self) -> float | None:
        """None for no error at all."""
        found = [10 * np.log10(max(p, 1e-300) / e) for p, e in self.powers.values() if e]
        return float(min(found)) if found else None

    def figures(self) -> dict[str, Any]:
        return {"label_agreement": self.same / self.labels if self.labels else None, "sqnr_db": self.sqnr_db()}


class Distances:
    """Of the integer reference, and of the artifact on this CPU's own kernels, from the float model.

    natively: runs the artifact on those, where it was proved on others.
    """

    natively: Callable[[M.Tensors], M.Tensors] | None = None

    def __init__(self, original: ir.Model, labels: Iterator[Array | None]) -> None:
        self._float, self._labels = M.FloatSession(original, optimize=False), labels
        self._first = original.graph.outputs[0].name or ""
        self.reference, self.here = Distance(), Distance()
        self._right: dict[str, list[int]] = {"float": [], "reference": [], "here": []}

    def add(self, inputs: M.Tensors, expected: M.Tensors, got: M.Tensors) -> None:
        wanted = self._float.run(inputs)
        got = got if self.natively is None else self.natively(inputs)
        self.reference.add(wanted, expected)
        self.here.add(wanted, got)
        labels = next(self._labels, None)
        for name, outputs in (("float", wanted), ("reference", expected), ("here", got)):
            scores = outputs.get(self._first)
            if labels is not None and labels.dtype.kind in "iu" and scores is not None and scores.ndim:
                chosen = scores.argmax(-1)
                if chosen.shape == labels.shape:
                    self._right[name] += (chosen == labels).reshape(-1).astype(int).tolist()

    def _figures(self, distance: Distance, name: str) -> dict[str, Any]:
        """Labels as the float model's, SQNR, and what accuracy is lost where there are labels."""
        right = self._right
        drop = float(np.mean(right["float"]) - np.mean(right[name])) if right[name] else None
        return {**distance.figures(), "accuracy_drop": drop}

    def lost_db(self) -> float | None:
        """How much nearer to the float model the reference is than the artifact; None without an error to compare."""
        exact, here = self.reference.sqnr_db(), self.here.sqnr_db()
        return None if exact is None or here is None else exact - here

    def classes(self, backend: Backend, *, saturates: bool, safe: bool) -> list[dict[str, Any]]:
        """One row per class: "cpu", "how", "label_agreement", "sqnr_db", "accuracy_drop"; None where nobody could tell.

        saturates: this CPU, by the probe. safe: no weight is large enough to saturate.
        """
        measured = not saturates or safe
        name, how = ("here", "measured here") if measured else ("reference", "simulated by the integer reference")
        exact = self._figures(self.here if measured else self.reference, name)
        if not backend.PAIR_SUMS:
            return [{"cpu": "every CPU", "how": how, **exact}]
        rows = [{"cpu": EXACT, "how": how, **exact}]
        if safe:
            rows.append({"cpu": PAIRS, "how": "the same: 7-bit weights cannot saturate", **exact})
        elif saturates:
            rows.append({"cpu": PAIRS, "how": "measured here", **self._figures(self.here, "here")})
        else:
            rows.append({"cpu": PAIRS, "how": "not run: needs such a CPU", **dict.fromkeys(exact)})
        return rows
