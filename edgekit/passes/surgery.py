"""Takes channels out of a model: slices constants, sets the numbers that count channels, infers the sizes anew.

Exact: what is left computes what it computed, but for the terms of the channels that are gone.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import model as M
from edgekit.errors import ConversionMismatchError, ShapeError
from edgekit.passes import fold_graph as G
from edgekit.passes import fold_shapes
from edgekit.passes.apply_plan import prepared
from edgekit.passes.coupling import Coupling, Site

Array = np.ndarray[Any, Any]


def ready(model: ir.Model) -> ir.Model:
    """A copy to trace and to cut: named nodes, sizes known, Splits with explicit sizes."""
    out = prepared(model)
    fold_shapes.annotate(out)
    for node in out.graph:
        if G.is_op(node, "Split") and (len(node.inputs) < 2 or node.inputs[1] is None):
            parts = [v.shape[G.integer(node, "axis", 0)] if v.shape is not None else None for v in node.outputs]
            if all(isinstance(p, int) for p in parts):
                node.attributes.pop("num_outputs", None)
                G.set_constant(node, 1, f"{node.name}/split", np.array(parts, np.int64))
    return out


def cut(model: ir.Model, coupling: Coupling, keep: Array) -> ir.Model:
    """A copy of the `ready` model, which `coupling` was traced on, with the labels of `keep` only (bool per label)."""
    out = M.clone(model)
    nodes = {n.name: n for n in out.graph}
    _slice(out, nodes, coupling.sites, keep)
    for number in coupling.numbers if not keep.all() else ():  # a Slice may count from the end: all are written anew
        kept, node = int(keep[number.labels].sum()), nodes[number.node]
        if isinstance(number.where, str):
            node.attributes[number.where] = ir.AttrInt64(number.where, kept)
        else:
            array = G.array(node.inputs[number.where])
            if array is None:
                raise TypeError(f"input {number.where} of '{number.node}' is computed")
            changed = array.copy()
            changed.reshape(-1)[number.index] = kept
            if not np.array_equal(changed, array):
                G.set_constant(node, number.where, f"{node.name}/{number.where}", changed)
    fold_shapes.forget(out)
    fold_shapes.annotate(out)
    for value, before in zip(out.graph.outputs, model.graph.outputs, strict=True):
        value.shape = None if before.shape is None else before.shape.copy()  # inference may name a size anew
    return out


def _slice(model: ir.Model, nodes: dict[str | None, ir.Node], sites: list[Site], keep: Array) -> None:
    cuts: dict[tuple[str, int], list[tuple[int, Array]]] = {}
    for site in sites:
        kept = keep[site.labels]
        if not kept.all():
            cuts.setdefault((site.node, site.position), []).append((site.axis, kept))
    made: dict[tuple[str, bytes], ir.Value] = {}  # what several nodes read is cut once, where they want the same
    for (name, position), axes in cuts.items():
        value = nodes[name].inputs[position]
        array = G.array(value)
        if value is None or array is None:
            raise TypeError(f"input {position} of '{name}' is computed")
        mark = (value.name or "", b"".join(bytes([axis]) + kept.tobytes() for axis, kept in sorted(axes, key=_first)))
        if mark in made:
            G.set_input(nodes[name], position, made[mark])
            continue
        for axis, kept in axes:
            array = np.compress(kept, array, axis=axis)
        G.set_constant(nodes[name], position, value.name or f"{name}/{position}", array)
        made[mark] = nodes[name].inputs[position]  # type: ignore[assignment]


def _first(pair: tuple[int, Array]) -> int:
    return pair[0]


def check(model: ir.Model) -> None:
    """Raise ConversionMismatchError if the cut model does not run, on one sample: a rule of `coupling` is wrong.

    Of a model with unknown sizes beside the batch only that it loads.
    """
    sig = M.signature(model)
    try:
        session = M.FloatSession(model)
        with suppress(ShapeError):
            session.run(M.seeded_inputs(sig, M.batch_of(sig) or 1))
    except Exception as error:
        raise ConversionMismatchError(
            f"the pruned model does not run: {M.runtime_message(error)}", "please report this model"
        ) from error
