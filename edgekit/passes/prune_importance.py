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
from edgekit.passes.coupling import Coupling, Family, Site
from edgekit.passes.prune_grams import Moments

Array = np.ndarray[Any, Any]
Importance = Literal["reconstruction", "activation", "magnitude"]
DAMPING = 1e-2  # of H's mean diagonal
# Units that go between two updates of H⁻¹, as a share of those left.
STEP = 0.04


@dataclass(frozen=True)
class Order:
    """units: root labels, the first to go first. errors: relative error of the readers once so many have gone.

    weights: after some numbers of removals, the readers' weights fitted anew: {gone: {node: (features, outputs)}}, for
    whole features, those that are gone at 0, and {node: what is added to the bias}.
    """

    units: Array
    errors: Array
    weights: Mapping[int, Mapping[str, tuple[Array, Array]]]


@dataclass
class _Reader:
    """One layer that reads the family, one group. features: (units, per unit) positions of each unit's features."""

    node: str
    group: int
    inverse: Array
    weight: Array
    energy: float
    features: Array
    mean: Array
    before: Array


def features(site: Site, roots: Array, units: Array, taps: int) -> Array:
    """(units, positions × taps): where each unit's features lie in the rows of a layer. roots: of the site's labels."""
    order = np.argsort(roots, kind="stable")
    found = [order[np.searchsorted(roots[order], u) : np.searchsorted(roots[order], u, side="right")] for u in units]
    return np.stack([(p[:, None] * taps + np.arange(taps)).reshape(-1) for p in found])


@single_threaded
def order(
    coupling: Coupling,
    family: Family,
    moments: Mapping[str, Moments],
    stops: Sequence[int],
    how: Importance = "reconstruction",
) -> Order:
    """moments: of each layer that reads the family. stops: numbers of removals to keep the fitted weights at."""
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
            kept[len(gone)] = _fitted(readers)
    gone.extend(int(u) for u in left)
    return Order(family.units[gone], np.array(errors), kept)


def _readers(coupling: Coupling, family: Family, moments: Mapping[str, Moments], how: Importance) -> list[_Reader]:
    out = []
    members = set(family.units.tolist())
    for site in coupling.sites:
        found = moments.get(site.node)
        if site.role != "in" or found is None or not members & set(coupling.roots(site.labels).tolist()):
            continue
        layer = found.layer
        groups, size, _ = layer.weight.shape
        taps = size // len(site.labels)
        where = features(site, coupling.roots(site.labels), family.units, taps)
        for group in range(groups):
            h = found.covariance[group]
            mean = float(np.trace(h)) / size
            if how == "magnitude":
                h = np.eye(size)
            elif how == "activation":
                h = np.diag(np.diag(h)) + 1e-12 * np.eye(size)
            damped = h + (DAMPING * max(mean, 1e-12)) * np.eye(size) if how == "reconstruction" else h
            weight = layer.weight[group].copy()
            energy = float(np.einsum("io,ij,jo->", weight, h, weight, optimize=True))
            out.append(
                _Reader(
                    site.node, group, np.linalg.inv(damped), weight, max(energy, 1e-12), where,
                    found.mean[group], layer.weight[group],
                )
            )  # fmt: skip
    return out


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


def _fitted(readers: Sequence[_Reader]) -> dict[str, tuple[Array, Array]]:
    """Per node (groups, features, outputs) and what its bias gains."""
    found: dict[str, list[_Reader]] = {}
    for reader in readers:
        found.setdefault(reader.node, []).append(reader)
    return {
        node: (
            np.stack([r.weight.copy() for r in parts]),
            np.stack([r.mean @ (r.before - r.weight) for r in parts]),
        )
        for node, parts in found.items()
    }
