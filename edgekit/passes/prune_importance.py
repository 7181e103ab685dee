"""In which order the channels of a family go, and what each costs the layers that read them.

Optimal brain surgeon for channels (Hassibi & Stork 1993; the layer-wise form of OBC, Frantar & Alistarh 2022): taking
features S away from y = x W and fitting the rest anew raises the squared error by tr(W_Sᵀ [(H⁻¹)_SS]⁻¹ W_S), with
H = xᵀx. Greedy, all layers that read the family summed, each relative to the energy of its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgekit.passes.blas import single_threaded
from edgekit.passes.coupling import Coupling, Family
from edgekit.passes.prune_grams import Moments

Array = np.ndarray[Any, Any]
Importance = Literal["reconstruction", "activation", "magnitude"]
DAMPING = 1e-2  # of H's mean diagonal
# Units that go between two updates of H⁻¹, as a share of those left.
STEP = 0.04


@dataclass(frozen=True)
class Order:
    """units: root labels, the first to go first. errors: relative error of the readers once so many have gone.

    weights: after some numbers of removals, by reading, its weights fitted anew (groups, features, outputs), those that
    are gone at 0, and what is added to the bias (groups, outputs).
    """

    units: Array
    errors: Array
    weights: Mapping[int, Mapping[str, tuple[Array, Array]]]


@dataclass
class _Reader:
    """One layer that reads the family, one group. features: (units, per unit) positions of each unit's features."""

    key: str
    inverse: Array
    weight: Array
    energy: float
    features: Array
    mean: Array
    before: Array


@single_threaded
def order(
    coupling: Coupling,
    family: Family,
    moments: Mapping[str, Moments],
    stops: Sequence[int],
    how: Importance = "reconstruction",
) -> Order:
    """moments: of each reading of the family. stops: numbers of removals to keep the fitted weights at."""
    readers = _readers(coupling, family, moments, how)
    left = np.arange(len(family.units))
    gone: list[int] = []
    errors = [0.0]
    kept: dict[int, dict[str, tuple[Array, Array]]] = {}
    total = 0.0
    while len(left) > 1:
        costs = sum((_costs(r, left) for r in readers), np.zeros(len(left)))
        next_stop = min((s for s in stops if s > len(gone)), default=len(family.units))
        count = max(1, min(int(STEP * len(left)), next_stop - len(gone), len(left) - 1))
        for at in np.argsort(costs, kind="stable")[:count]:
            unit = int(left[at])
            total += sum(_remove(r, unit) for r in readers)
            gone.append(unit)
            errors.append(total)
        left = np.setdiff1d(left, gone)
        if len(gone) in stops:
            kept[len(gone)] = _fitted(readers, moments)
    gone.extend(int(u) for u in left)
    return Order(family.units[gone], np.array(errors), kept)


def _readers(coupling: Coupling, family: Family, moments: Mapping[str, Moments], how: Importance) -> list[_Reader]:
    out = []
    for found in moments.values():
        where = _features(coupling, family, found)
        if where is None:
            continue
        for group, start in enumerate(found.weight):
            h = found.covariance[group]
            size = len(h)
            mean = float(np.trace(h)) / size
            if how == "magnitude":
                h = np.eye(size)
            elif how == "activation":
                h = np.diag(np.diag(h)) + 1e-12 * np.eye(size)
            damped = h + (DAMPING * max(mean, 1e-12)) * np.eye(size) if how == "reconstruction" else h
            energy = float((start * (h @ start)).sum())
            out.append(
                _Reader(
                    found.reading.key, np.linalg.inv(damped), start.copy(), max(energy, 1e-12), where,
                    found.mean[group], start,
                )
            )  # fmt: skip
    return out


def _features(coupling: Coupling, family: Family, found: Moments) -> Array | None:
    """(units, positions × taps): where each unit's features lie in what the reading reads; None if it reads none."""
    parts = []
    for site in found.reading.sites(coupling):
        roots, places = coupling.roots(site.labels), found.reading.places(site)
        if found.taps > 1:
            places = places[:, :1] // found.taps
        order = np.argsort(roots, kind="stable")
        first, last = (np.searchsorted(roots[order], family.units, side) for side in ("left", "right"))
        counts = np.unique(last - first)
        if len(counts) == 1 and counts[0]:
            parts.append(places[order[first[:, None] + np.arange(counts[0])]].reshape(len(family.units), -1))
    return np.concatenate(parts, axis=1) if parts else None


def _costs(reader: _Reader, left: Array) -> Array:
    """What removing each unit would add, relative."""
    at = reader.features[left]  # (units, per)
    blocks = reader.inverse[at[:, :, None], at[:, None, :]]
    weight = reader.weight[at]  # (units, per, outputs)
    if at.shape[1] == 1:
        return np.asarray(np.square(weight[:, 0]).sum(axis=1) / blocks[:, 0, 0] / reader.energy)
    solved = np.linalg.solve(blocks, weight)
    return np.asarray(np.einsum("upo,upo->u", weight, solved) / reader.energy)


def _remove(reader: _Reader, unit: int) -> float:
    """Take the unit's features away, fit the rest anew; what that adds, relative."""
    at = reader.features[unit]
    inverse, weight = reader.inverse, reader.weight
    solved = np.linalg.solve(inverse[np.ix_(at, at)], np.concatenate([weight[at], inverse[at]], axis=1))
    outputs = weight.shape[1]
    added = float((weight[at] * solved[:, :outputs]).sum()) / reader.energy
    column = inverse[:, at].copy()
    weight -= column @ solved[:, :outputs]
    inverse -= column @ solved[:, outputs:]
    weight[at] = 0
    # what is gone must not come back: its rows and columns stay 0, its own block harmless
    inverse[at], inverse[:, at] = 0, 0
    inverse[at, at] = 1
    return added


def _fitted(readers: Sequence[_Reader], moments: Mapping[str, Moments]) -> dict[str, tuple[Array, Array]]:
    """By reading (groups, features, outputs) and what its bias gains (groups, outputs)."""
    parts: dict[str, list[_Reader]] = {}
    for reader in readers:
        parts.setdefault(reader.key, []).append(reader)
    fitted = {}
    for key, found in parts.items():
        shift = np.stack([r.mean @ (r.before - r.weight) for r in found])
        weight = moments[key].by_tap(np.stack([r.weight for r in found]))
        fitted[key] = (weight, shift.reshape(len(shift), -1, weight.shape[2]).sum(axis=1))
    return fitted
