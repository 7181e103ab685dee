"""Takes out channels that were masked: those that nothing reads, and those that carry a number known beforehand.

Models pruned elsewhere often keep their size, with zeros in whole channels. A unit of channels is needed only if a
needed channel reads it by a weight that is not 0 (a search from the outputs backwards, as a garbage collector's); a
unit whose value is the same whatever the input is, behind a filter of zeros say, is not read either: what it adds goes
into the reader's bias. Behind the border of zeros of a padded convolution only 0 is the same everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.passes import fold_graph as G
from edgekit.passes import surgery
from edgekit.passes.coupling import Coupling, Site
from edgekit.passes.coupling_layers import GATES
from edgekit.passes.coupling_trace import trace
from edgekit.passes.known_values import Known, known_values

if TYPE_CHECKING:
    from edgekit.dataset import Dataset

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PruneZeros:
    """The pass `prune_zeros`: the same function within rounding (1e-5 relative), of fewer channels.

    At least one unit of every family stays, and what an operator that is not understood reads.
    """

    def __call__(self, model: ir.Model, data: Dataset | None) -> ir.Model:
        """A shrunk copy; `data` is not looked at."""
        return prune_zeros(model)[0]


@dataclass(frozen=True)
class _Reading:
    """Weights that read channels. rows: label of each output, cols: of each position read.

    reads: bool (rows, cols), whether the output needs that channel. adds: float64 (rows, cols), what the channel's
    constant adds to the output; 0 where it has none.
    """

    node: ir.Node
    rows: Array
    cols: Array
    reads: Array
    adds: Array


def prune_zeros(model: ir.Model) -> tuple[ir.Model, dict[str, Any]]:
    """The shrunk copy, and a record of what went.

    removed: {node that makes them: [units gone, units there were]}. absorbed: units that carried a constant other than
    0, which their readers' biases have now. words: the same in a line.
    """
    out = surgery.ready(model)
    before: dict[str, int] = {}
    gone: Counter[str] = Counter()
    absorbed = 0
    while True:
        found = trace(out)
        known = known_values(out)
        readings = list(_readings(out, found, known))
        keep = _needed(out, found, known, readings)
        if keep.all():
            break
        out, count = _absorbed(out, found, readings, keep)
        absorbed += count
        for family in found.families():
            before.setdefault(family.name, len(family.units))
            gone[family.name] += int((~keep[family.units]).sum())
        out = surgery.cut(out, trace(out), keep)  # traced anew: biases may be new
    removed = {name: [count, before[name]] for name, count in gone.items() if count}
    record = {"removed": removed, "absorbed": absorbed, "words": _words(removed, absorbed)}
    return out if removed else M.clone(model), record


def _words(removed: dict[str, list[int]], absorbed: int) -> str:
    if not removed:
        return "no channel is masked: each is read, and changes with the input"
    gone, there = (sum(counts[i] for counts in removed.values()) for i in (0, 1))
    moved = f", {absorbed} of them constants that biases have now" if absorbed else ""
    return f"{gone} of {there} channels of {len(removed)} layers were masked and are gone{moved}"


# --- what reads what ----------------------------------------------------------------------------------
def _readings(model: ir.Model, found: Coupling, known: dict[str, Known]) -> Iterator[_Reading]:
    nodes = {n.name: n for n in model.graph}
    makes = {(s.node, s.position, s.axis): s for s in found.sites}
    for site in found.sites:
        if site.role != "in":
            continue
        node = nodes[site.node]
        recurrent = node.op_type in GATES
        weight = G.array(node.inputs[site.position])
        made = makes[site.node, site.position, 1 if recurrent else 1 - site.axis]
        if weight is None:
            raise TypeError(f"input {site.position} of '{site.node}' is computed")
        matrix = np.moveaxis(weight.astype(np.float64), (made.axis, site.axis), (0, 1)).reshape(
            len(made.labels), len(site.labels), -1
        )
        constants = _constants(node, site, known, len(made.labels))
        any_weight = (matrix != 0).any(axis=2)
        same = np.isfinite(constants) & ((constants == 0) | _evenly(node))
        adds = np.where(same & any_weight, matrix.sum(axis=2) * np.where(same, constants, 0), 0)
        if node.op_type == "Gemm":
            adds = adds * G.number(node, "alpha", 1.0)
        yield _Reading(node, made.labels, site.labels, any_weight & ~same, adds)


def _constants(node: ir.Node, site: Site, known: dict[str, Known], rows: int) -> Array:
    """float64 (rows or 1, cols): the number that each output finds at each position it reads, NaN where it varies."""
    value, axis = _data(node, site)
    seen = None if value is None else known.get(value.name or "")
    if seen is None:
        return np.full((1, len(site.labels)), np.nan)
    flat, unknown = (np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1) for a in (seen.value, seen.unknown))
    varies = unknown.any(axis=1) | (flat != flat[:, :1]).any(axis=1)
    each = np.where(varies, np.nan, flat[:, 0].astype(np.float64))
    groups = G.integer(node, "group", 1)
    return np.repeat(each.reshape(groups, -1), rows // groups if groups > 1 else 1, axis=0)


def _data(node: ir.Node, site: Site) -> tuple[ir.Value | None, int]:
    """The value that weights read, and its axis."""
    if node.op_type in GATES:
        if site.position == 1:
            return node.inputs[0], 2
        return (node.outputs[0], 3) if node.outputs[0].name else (node.outputs[1], 2)
    value = node.inputs[0]
    return value, len(value.shape or ()) - 1 if value is not None and node.op_type == "MatMul" else 1


def _evenly(node: ir.Node) -> bool:
    """Whether a constant channel adds the same everywhere, and there is a bias to take it."""
    if node.op_type == "Conv":
        return not any(G.integers(node, "pads") or ()) and not G.text(node, "auto_pad", "").startswith("SAME")
    return node.op_type == "Gemm" or (node.op_type == "MatMul" and not node.outputs[0].is_graph_output())


# --- what is needed -----------------------------------------------------------------------------------
def _needed(model: ir.Model, found: Coupling, known: dict[str, Known], readings: list[_Reading]) -> Array:
    """bool per label: what stays."""
    roots = found.roots(np.arange(found.count))
    live = np.zeros(found.count, bool)  # of roots
    families = found.families()
    everywhere = np.bincount(roots[np.concatenate([n for axes in found.on.values() for n in axes.values()])])
    for family in families:
        if family.frozen:
            live[family.units] = True
    live[roots[_contracted(model, found, known)]] = True
    while True:
        _spread(live, roots, readings)
        revived = [f.units[np.argmax(everywhere[f.units])] for f in families if not live[f.units].any()]
        if not revived and (name := found.emptied(live[roots])):
            axes = found.on[name].values()
            revived = [roots[labels[0]] for labels in axes if not live[roots[labels]].any()]
        if not revived:
            return live[roots]
        live[revived] = True


def _spread(live: Array, roots: Array, readings: list[_Reading]) -> None:
    """Mark what is read by what is marked, until nothing is new; in place."""
    while True:
        count = int(live.sum())
        for reading in readings:
            wanted = reading.reads[live[roots[reading.rows]]].any(axis=0)
            live[roots[reading.cols[wanted]]] = True
        if int(live.sum()) == count:
            return


def _contracted(model: ir.Model, found: Coupling, known: dict[str, Known]) -> Array:
    """Labels over which a product of two computed values sums: they stay, unless one side is known to be 0."""
    stay = [np.array([], np.int64)]
    for node in model.graph:
        if not G.is_op(node, "MatMul") or any(G.array(v) is not None for v in node.inputs):
            continue
        for value, back in zip(node.inputs, (1, 2), strict=True):
            axis = len(value.shape) - back if value is not None and value.shape is not None else -1
            labels = found.axes(value).get(axis)
            if labels is None:
                continue
            zero = np.zeros(len(labels), bool)
            for other, from_end in zip(node.inputs, (1, 2), strict=True):
                seen = known.get(other.name or "") if other is not None else None
                if seen is not None:
                    zero |= np.moveaxis(seen.zero, seen.zero.ndim - from_end, 0).reshape(len(labels), -1).all(axis=1)
            stay.append(labels[~zero])
    return np.concatenate(stay)


# --- what they added ----------------------------------------------------------------------------------
def _absorbed(model: ir.Model, found: Coupling, readings: list[_Reading], keep: Array) -> tuple[ir.Model, int]:
    """A copy whose biases have what the channels that go add, and how many units that were."""
    out = M.clone(model)
    nodes = {n.name: n for n in out.graph}
    units: set[int] = set()
    for reading in readings:
        gone, kept = ~keep[reading.cols], keep[reading.rows]
        adds = np.where(kept[:, None], reading.adds, 0)[:, gone]
        units.update(found.roots(reading.cols[gone][(adds != 0).any(axis=0)]).tolist())
        if adds.any():
            _add_to_bias(nodes[reading.node.name], adds.sum(axis=1))
    return out, len(units)


def _add_to_bias(node: ir.Node, by: Array) -> None:
    """by: float64 (outputs,)."""
    weight = G.array(node.inputs[1])
    if weight is None:
        raise TypeError(f"the weights of '{node.name}' are computed")
    if node.op_type == "MatMul":
        _add_behind(node, by.astype(weight.dtype))
        return
    old = G.array(node.inputs[2]) if len(node.inputs) > 2 else None
    scale = G.number(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    bias = by if old is None else old.astype(np.float64) * scale + by
    node.attributes.pop("beta", None)
    G.set_constant(node, 2, f"{node.name}/bias", bias.astype(weight.dtype))


def _add_behind(node: ir.Node, by: Array) -> None:
    """To the Add of a constant that follows, or to one of its own."""
    product = node.outputs[0]
    readers = [use.node for use in product.uses()]
    follows = readers[0] if len(readers) == 1 and not product.is_graph_output() else None
    if follows is not None and G.is_op(follows, "Add"):
        for index, value in enumerate(follows.inputs):
            old = G.array(value)
            if old is not None and old.ndim <= len(product.shape or ()):
                G.set_constant(follows, index, f"{follows.name}/bias", old + by)
                return
    name = f"{node.name}/bias"
    total = ir.node("Add", [product, G.new_constant(G.graph_of(node), name, by)], name=name)
    total.outputs[0].name, total.outputs[0].shape, total.outputs[0].type = name + "/sum", product.shape, product.type
    uses = [(use.node, use.idx) for use in product.uses() if use.node is not total]
    G.graph_of(node).insert_after(node, total)
    for reader, index in uses:
        reader.replace_input_with(index, total.outputs[0])
