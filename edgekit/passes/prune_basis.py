"""Writes channels that nothing but linear operators touch in a basis whose last directions are missed least.

Exact: writers are multiplied by T, readers by T⁻¹. Where a residual stream has no activation on it, as between the
linear bottlenecks of a MobileNet, directions can go instead of channels (SliceGPT, Ashkboos et al. 2024). T comes from
the weighted principal components of the stream: of all subspaces of a size, that which changes the results of the
readers least, with A = M^½, M = Σ W Wᵀ / energy over the readers' weights W, and A C A = V Λ Vᵀ: T = Vᵀ A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_graph as G
from edgekit.passes.coupling import Coupling, Family, Site
from edgekit.passes.prune_grams import Moments

Array = np.ndarray[Any, Any]
# Operators that treat all channels alike and linearly, whatever their basis.
_ALIKE = (
    "AveragePool", "Dropout", "Flatten", "GlobalAveragePool", "Identity", "ReduceMean", "ReduceSum", "Reshape",
    "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
_WEIGHTED = ("Conv", "Gemm", "MatMul")
DAMPING = 1e-3  # of M's mean eigenvalue: T stays well conditioned


def linear(model: ir.Model, coupling: Coupling, families: Sequence[Family]) -> list[Family]:
    """Those of the families that may be written in any basis. model: `ready`, what `coupling` was traced on."""
    return [f for f in families if _is_linear(model, coupling, f)]


def _is_linear(model: ir.Model, coupling: Coupling, family: Family) -> bool:
    sites = _sites(coupling, family)
    if not all(np.array_equal(coupling.roots(s.labels), family.units) for s in sites):
        return False
    made = {s.node for s in sites if s.role == "out"}
    read = {s.node for s in sites if s.role == "in"}
    if any(s.role == "along" and not (s.node in made and s.position == 2) for s in sites):
        return False
    carried = {name: axis for name, axis in _values(coupling, family)}
    if None in carried.values():
        return False
    for node in model.graph:
        name = node.name or ""
        takes = [v is not None and v.name in carried for v in node.inputs]
        gives = any(v.name in carried for v in node.outputs)
        if not any(takes) and not gives:
            continue
        if G.is_op(node, *_WEIGHTED):
            if (any(takes) and name not in read) or (gives and name not in made):
                return False
        elif not (gives and (all(takes) if G.is_op(node, "Add") else G.is_op(node, *_ALIKE) and takes[0])):
            return False
    return bool(made and read)


def _values(coupling: Coupling, family: Family) -> Iterator[tuple[str, int | None]]:
    """(value, the axis along which it has the family's channels in order, or None if it has them otherwise)."""
    members = set(family.units.tolist())
    for name, axes in coupling.on.items():
        found = [axis for axis, labels in axes.items() if members & set(coupling.roots(labels).tolist())]
        if found:
            alone = len(found) == 1 and np.array_equal(coupling.roots(axes[found[0]]), family.units)
            yield name, found[0] if alone else None


def _sites(coupling: Coupling, family: Family) -> list[Site]:
    members = set(family.units.tolist())
    return [s for s in coupling.sites if members & set(coupling.roots(s.labels).tolist())]


def basis(coupling: Coupling, family: Family, moments: Mapping[str, Moments]) -> Array | None:
    """T, (n, n) float64, rows by falling importance; None if a layer that reads the family was not measured."""
    metric = np.zeros((len(family.units),) * 2)
    covariance = np.zeros_like(metric)
    found = {m.reading.node.name: m for m in moments.values()}
    for site in _sites(coupling, family):
        if site.role != "in":
            continue
        if site.node not in found:
            return None
        own = channel_covariance(found[site.node].covariance[0], len(family.units))
        weight = found[site.node].weight[0].reshape(len(family.units), -1)
        squares = weight @ weight.T
        metric += squares / max(float((squares * own).sum()), 1e-12)
        covariance += own
    metric += DAMPING * np.trace(metric) / len(metric) * np.eye(len(metric))
    values, vectors = np.linalg.eigh(metric)
    half = (vectors * np.sqrt(values)) @ vectors.T
    _, components = np.linalg.eigh(half @ covariance @ half)
    return np.asarray(components[:, ::-1].T @ half)


def channel_covariance(covariance: Array, channels: int) -> Array:
    """(channels, channels): mean over the taps of (channels × taps) features."""
    taps = len(covariance) // channels
    return np.asarray(np.einsum("itjt->ij", covariance.reshape(channels, taps, channels, taps)) / taps)


def rewritten(model: ir.Model, coupling: Coupling, transforms: Mapping[str, tuple[Family, Array]]) -> ir.Model:
    """A copy that computes the same, with the families' channels in their new bases."""
    out = M.clone(model)
    nodes = {n.name: n for n in out.graph}
    for family, forward in transforms.values():
        back = np.linalg.inv(forward)
        for site in _sites(coupling, family):
            node = nodes[site.node]
            array = G.array(node.inputs[site.position])
            if array is None:
                raise TypeError(f"input {site.position} of '{site.node}' is computed")
            by = back.T if site.role == "in" else forward
            moved = np.moveaxis(np.tensordot(by, array.astype(np.float64), (1, site.axis)), 0, site.axis)
            G.set_constant(node, site.position, f"{site.node}/{site.position}", moved.astype(array.dtype))
    return out
