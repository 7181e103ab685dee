"""ONNX operators that move, join, cut and sum up values, as Keras layers and functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G
from edgekit.sources.keras_plan import FREE, Ref, View, product, refused, sizes, view

if TYPE_CHECKING:
    from edgekit.sources.keras_lower import Lowering

Rule = Callable[["Lowering", ir.Node], None]


# --- the same numbers, seen otherwise -------------------------------------------------------------------------------
def _transpose(low: Lowering, node: ir.Node) -> None:
    given = low.view(node)
    order = G.integers(node, "perm") or tuple(reversed(range(len(given.groups))))
    low.put(node, View(given.ref, given.dims, tuple(given.groups[a] for a in order)))


def _reshape(low: Lowering, node: ir.Node) -> None:
    given, shape = low.view(node), low.shape(node.outputs[0])
    low.put(node, reshaped(low, given, shape))


def reshaped(low: Lowering, given: View, shape: Sequence[int]) -> View:
    """The value in another shape: as a view where axes are only joined or separated, else by a Reshape."""
    seen = given.regrouped(shape)
    if seen is not None:
        return seen
    order = [i for g in given.groups for i in g]
    target = [s for a, s in enumerate(shape) if s != 1 or a == 0]
    ref = low.ordered(given, order, target)
    at = iter(range(len(target)))
    return View(ref, tuple(target), tuple((next(at),) if s != 1 or a == 0 else () for a, s in enumerate(shape)))


def _squeeze(low: Lowering, node: ir.Node) -> None:
    given, axes = low.view(node), low.constant(node, 1)
    rank = len(given.groups)
    gone = (
        {int(a) % rank for a in axes.ravel()} if axes is not None else {a for a in range(rank) if given.shape[a] == 1}
    )
    low.put(node, View(given.ref, given.dims, tuple(g for a, g in enumerate(given.groups) if a not in gone)))


def _unsqueeze(low: Lowering, node: ir.Node) -> None:
    given, axes = low.view(node), low.constant(node, 1)
    if axes is None:
        raise refused("Unsqueeze", node.name, "it has no axes")
    rank = len(given.groups) + axes.size
    new, old = {int(a) % rank for a in axes.ravel()}, iter(given.groups)
    low.put(node, View(given.ref, given.dims, tuple(() if a in new else next(old) for a in range(rank))))


def _expand(low: Lowering, node: ir.Node) -> None:
    """Broadcast by adding zeros: Keras has no broadcast over a batch whose size is free."""
    given, shape = low.view(node), low.shape(node.outputs[0])
    given = given.padded(len(shape))
    grown = [a for a, s in enumerate(shape) if given.shape[a] != s]
    if not grown:
        low.put(node, given)
        return
    if any(shape[a] % FREE == 0 for a in grown) or node.outputs[0].dtype != ir.DataType.FLOAT:
        raise refused("Expand", node.name, "it repeats along the batch")
    zeros = np.zeros([s if a in grown else 1 for a, s in enumerate(shape)], np.float32)
    low.put(node, view(low.call("add", Ref(low.plain(given)), zeros), shape))


# --- joined and cut -------------------------------------------------------------------------------------------------
def _concat(low: Lowering, node: ir.Node) -> None:
    found = [low.operand(node, i) for i in range(len(node.inputs))]
    parts = [low.separate(v) for v in found if isinstance(v, View)]
    if len(parts) < len(found):
        raise refused("Concat", node.name, "one of its inputs is constant")
    axis = G.integer(node, "axis", 0) % len(parts[0].groups)
    shape = low.shape(node.outputs[0])
    # the tensor's axes in the order of the first part, the joined one last if it is not there
    order = [a for a in sorted(range(len(shape)), key=lambda a: _place(parts[0], a)) if a == axis or shape[a] != 1]
    if 0 not in order:
        order = [0, *order]
    refs = [low.arranged(p, order) for p in parts]
    at = order.index(axis)
    if len(set(refs)) == len(refs):
        ref = low.named("Concatenate", refs, node, [], axis=at)
    else:
        ref = low.call("concatenate", [Ref(r) for r in refs], axis=at)
    low.put(node, _laid(ref, order, shape))


def _place(given: View, axis: int) -> float:
    return float(given.groups[axis][0]) if given.groups[axis] else float("inf")


def _laid(ref: str, order: Sequence[int], shape: Sequence[int]) -> View:
    """The view of a tensor whose axes are these axes of a value."""
    places = {a: i for i, a in enumerate(order)}
    groups = tuple((places[a],) if a in places else () for a in range(len(shape)))
    return View(ref, tuple(shape[a] for a in order), groups)


def _split(low: Lowering, node: ir.Node) -> None:
    given, axis = _along(low, low.view(node), G.integer(node, "axis", 0))
    ends = np.cumsum([low.shape(o)[axis] for o in node.outputs])
    at = given.groups[axis][0]
    for index, value in enumerate(node.outputs):
        if not value.uses() and not value.is_graph_output():
            continue
        start = int(ends[index - 1]) if index else 0
        low.put(node, _cut(low, given, at, start, int(ends[index])), index)


def _along(low: Lowering, given: View, axis: int) -> tuple[View, int]:
    """The value with this axis alone on one of the tensor's."""
    axis %= len(given.groups)
    if given.single(axis) is None:
        given = view(low.plain(given), given.shape)
    return given, axis


def _cut(low: Lowering, given: View, at: int, start: int, stop: int) -> View:
    """From start to stop along a tensor axis."""
    have = given.dims[at]
    dims = tuple(stop - start if i == at else d for i, d in enumerate(given.dims))
    if (start, stop) == (0, have):
        return given
    marks = [m for m in (start, stop) if 0 < m < have]
    ref = low.call("split", Ref(given.ref), marks, axis=at, takes=1 if start else 0)
    return View(ref, dims, given.groups)


def _slice(low: Lowering, node: ir.Node) -> None:
    given = low.view(node)
    starts, ends, axes, steps = (low.constant(node, i) for i in (1, 2, 3, 4))
    if starts is None or ends is None:
        raise refused("Slice", node.name, "it has no bounds")
    along = range(len(starts)) if axes is None else axes.ravel().tolist()
    for i, axis in enumerate(along):
        axis = int(axis) % len(given.groups)
        size, step = given.shape[axis], 1 if steps is None else int(steps[i])
        start, stop, step = slice(int(starts[i]), _end(int(ends[i])), step).indices(size)
        if (start, stop, step) == (0, size, 1):
            continue
        if size % FREE == 0:
            raise refused("Slice", node.name, "it cuts the batch")
        given, axis = _along(low, given, axis)
        at = given.groups[axis][0]
        if step == 1:
            given = _cut(low, given, at, start, stop)
            continue
        picked = np.arange(start, stop, step, dtype=np.int32)
        given = _taken(low, given, at, picked)
    low.put(node, given)


def _end(value: int) -> int | None:
    """ONNX says "to the beginning" by the smallest number, which Python's slices would count from the end."""
    return None if value <= -(2**31) else value


def _taken(low: Lowering, given: View, at: int, picked: Any) -> View:
    ref = low.call("take", Ref(given.ref), picked, axis=at)
    return View(ref, tuple(len(picked) if i == at else d for i, d in enumerate(given.dims)), given.groups)


def _gather(low: Lowering, node: ir.Node) -> None:
    data, picked = low.operand(node, 0), low.operand(node, 1)
    axis = G.integer(node, "axis", 0)
    if isinstance(data, View) and isinstance(picked, np.ndarray) and picked.ndim <= 1:
        given, axis = _along(low, data, axis)
        if given.dims[given.groups[axis][0]] % FREE == 0:
            raise refused("Gather", node.name, "it picks from the batch")
        size = given.shape[axis]
        out = _taken(low, given, given.groups[axis][0], np.atleast_1d(picked % size).astype(np.int32))
        if picked.ndim == 0:
            out = View(out.ref, out.dims, tuple(g for a, g in enumerate(out.groups) if a != axis))
        low.put(node, out)
        return
    table = low.weight(node, 0) if isinstance(data, np.ndarray) else None
    if not isinstance(picked, View) or table is None or table.values.ndim != 2 or axis != 0:
        raise refused("Gather", node.name, "it is no embedding and picks by what is computed")
    if not np.issubdtype(table.values.dtype, np.floating):
        raise refused("Gather", node.name, "its table holds no numbers of a layer")
    ids = _unwrapped(low, node, table.values.shape[0]) or picked
    rows, width = table.values.shape
    ref = low.named("Embedding", ids.ref, node, [table], input_dim=rows, output_dim=width)
    low.put(node, View(ref, (*ids.dims, width), (*ids.groups, (len(ids.dims),))))


def _unwrapped(low: Lowering, node: ir.Node, rows: int) -> View | None:
    """The ids behind `ids < 0 ? ids + rows : ids`, which exporters write before an embedding, as sums of products.

    The Embedding layer counts from the end by itself; what it makes is checked against the graph like everything else.
    """
    total = node.inputs[1].producer() if node.inputs[1] is not None else None
    if not G.is_op(total, "Add") or total is None:
        return None
    read = {
        v for p in total.inputs if p is not None and (n := p.producer()) is not None for v in n.inputs if v is not None
    }
    for value in read:
        added = value.producer()
        if G.is_op(added, "Add") and added is not None:
            constants = [c for v in added.inputs if (c := G.array(v)) is not None]
            ids = next((v for v in added.inputs if v is not None and v in read), None)
            if ids is not None and len(constants) == 1 and constants[0].size == 1 and constants[0].item() == rows:
                return low.values.get(ids.name or "")
    return None


def _pad(low: Lowering, node: ir.Node) -> None:
    given, pads, value, axes = low.separate(low.view(node)), *(low.constant(node, i) for i in (1, 2, 3))
    rank, mode = len(given.groups), G.text(node, "mode", "constant")
    names = {"constant": "constant", "reflect": "reflect", "edge": "edge", "wrap": None}
    if pads is None or names.get(mode) is None or (pads < 0).any():
        raise refused("Pad", node.name, f"mode {mode}" if pads is None or (pads >= 0).all() else "it cuts")
    along = range(rank) if axes is None else [int(a) % rank for a in axes.ravel()]
    wanted = dict(
        zip(along, zip(pads[: len(pads) // 2].tolist(), pads[len(pads) // 2 :].tolist(), strict=True), strict=True)
    )
    if any(wanted.get(a, (0, 0)) != (0, 0) and given.single(a) is None for a in range(rank)):
        given = view(low.plain(given), given.shape)
    width = [[0, 0] for _ in given.dims]
    for axis, pair in wanted.items():
        at = given.single(axis)
        if at is not None:
            width[at] = [int(pair[0]), int(pair[1])]
    fill = 0.0 if value is None else float(value.item())
    dims = tuple(d + sum(w) for d, w in zip(given.dims, width, strict=True))
    if mode == "constant" and fill == 0.0 and len(width) == 4 and width[0] == width[3] == [0, 0]:
        ref = low.named("ZeroPadding2D", given.ref, node, [], padding=width[1:3])
    else:
        # other fills only where there is one: "reflect" takes none
        other: dict[str, Any] = {} if fill == 0.0 else {"constant_values": fill}
        ref = low.call(
            "pad", Ref(given.ref), width, mode="symmetric" if mode == "edge" and _thin(width) else mode, **other
        )
    low.put(node, View(ref, dims, given.groups))


def _thin(width: list[list[int]]) -> bool:
    """Padding by one repeats the edge either way; Keras on TensorFlow knows the symmetric way only."""
    if max(max(w) for w in width) > 1:
        raise refused("Pad", "", "it repeats an edge more than once")
    return True


# --- summed up ------------------------------------------------------------------------------------------------------
def _reduced(function: str, layers: str = "") -> Rule:
    """layers: what Keras calls it over all places of an image: Global…Pooling2D."""

    def rule(low: Lowering, node: ir.Node) -> None:
        given, axes = low.view(node), low.constant(node, 1)
        rank = len(given.groups)
        if axes is None or not axes.size:
            if G.integer(node, "noop_with_empty_axes", 0):
                low.put(node, given)
                return
            axes = np.arange(rank)
        gone = {int(a) % rank for a in axes.ravel()}
        keep = bool(G.integer(node, "keepdims", 1))
        low.put(node, reduce(low, node, given, gone, keep, function, layers))

    return rule


def reduce(
    low: Lowering, node: ir.Node, given: View, gone: set[int], keep: bool, function: str, layers: str = ""
) -> View:
    """The value summed up along these axes; keep: they stay with size 1."""
    along = sorted(i for a in gone for i in given.groups[a])
    if any(given.dims[i] % FREE == 0 for i in along):
        raise refused(node.op_type, node.name, "it runs over the batch")
    left = [i for i in range(len(given.dims)) if i not in along]
    places = {i: n for n, i in enumerate(left)}
    groups = tuple(
        () if a in gone else tuple(places[i] for i in g) for a, g in enumerate(given.groups) if keep or a not in gone
    )
    ref, rank = given.ref, len(given.dims)
    if along and layers and along == list(range(1, rank - 1)) and rank in (3, 4):
        ref = low.named(f"{layers}{rank - 2}D", ref, node, [])
    elif along:
        ref = low.call(function, Ref(ref), axis=along)
    return View(ref, tuple(given.dims[i] for i in left), groups)


def _global(function: str, layers: str) -> Rule:
    def rule(low: Lowering, node: ir.Node) -> None:
        given = low.view(node)
        gone = set(range(2, len(given.groups)))
        low.put(node, reduce(low, node, given, gone, True, function, layers))

    return rule


def _norm(low: Lowering, node: ir.Node, function: str) -> None:
    """Lengths along axes: the root of the summed squares, or the sum of magnitudes."""
    given, axes = low.view(node), low.constant(node, 1)
    if axes is None:
        raise refused(node.op_type, node.name, "it has no axes")
    inner = View(low.call(function, Ref(given.ref)), given.dims, given.groups)
    gone = {int(a) % len(given.groups) for a in axes.ravel()}
    out = reduce(low, node, inner, gone, bool(G.integer(node, "keepdims", 1)), "sum")
    low.put(node, out if function == "absolute" else View(low.call("sqrt", Ref(out.ref)), out.dims, out.groups))


def _chosen(function: str) -> Rule:
    def rule(low: Lowering, node: ir.Node) -> None:
        given, axis = _along(low, low.view(node), G.integer(node, "axis", 0))
        if G.integer(node, "select_last_index", 0):
            raise refused(node.op_type, node.name, "it wants the last of equals")
        at = given.groups[axis][0]
        ref = low.call("cast", Ref(low.call(function, Ref(given.ref), axis=at)), dtype="int64")
        keep, left = bool(G.integer(node, "keepdims", 1)), [i for i in range(len(given.dims)) if i != at]
        places = {i: n for n, i in enumerate(left)}
        groups = [tuple(places[i] for i in g if i != at) for g in given.groups]
        if not keep:
            del groups[axis]
        low.put(node, View(ref, tuple(given.dims[i] for i in left), tuple(groups)))

    return rule


def _resize(low: Lowering, node: ir.Node) -> None:
    """Images enlarged a whole number of times, in the two ways that Keras shares with ONNX."""
    given, out = low.view(node), low.shape(node.outputs[0])
    mode, place = G.text(node, "mode", "nearest"), G.text(node, "coordinate_transformation_mode", "half_pixel")
    if len(out) != 4 or out[:2] != given.shape[:2] or any(o % s for o, s in zip(out[2:], given.shape[2:], strict=True)):
        raise refused("Resize", node.name, "it does not enlarge images a whole number of times")
    near = mode == "nearest" and (place, G.text(node, "nearest_mode", "round_prefer_floor")) in {
        ("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "floor"),
        ("half_pixel", "round_prefer_ceil"),
    }  # fmt: skip
    if not near and (mode, place) != ("linear", "half_pixel"):
        raise refused("Resize", node.name, f"mode {mode} at {place}")
    factors = [o // s for o, s in zip(out[2:], given.shape[2:], strict=True)]
    ref = low.named(
        "UpSampling2D", low.arranged(given, (0, 2, 3, 1)), node, [],
        size=factors, interpolation="nearest" if near else "bilinear",
    )  # fmt: skip
    low.put(node, View(ref, (out[0], out[2], out[3], out[1]), ((0,), (3,), (1,), (2,))))


RULES: dict[str, Rule] = {
    "Transpose": _transpose, "Reshape": _reshape, "Flatten": _reshape, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Expand": _expand, "Concat": _concat, "Split": _split, "Slice": _slice, "Gather": _gather, "Pad": _pad,
    "ReduceMean": _reduced("mean", "GlobalAveragePooling"), "ReduceMax": _reduced("max", "GlobalMaxPooling"),
    "ReduceSum": _reduced("sum"), "ReduceMin": _reduced("min"), "ReduceProd": _reduced("prod"),
    "ReduceL1": lambda low, node: _norm(low, node, "absolute"),
    "ReduceL2": lambda low, node: _norm(low, node, "square"),
    "GlobalAveragePool": _global("mean", "GlobalAveragePooling"), "GlobalMaxPool": _global("max", "GlobalMaxPooling"),
    "ArgMax": _chosen("argmax"), "ArgMin": _chosen("argmin"), "Resize": _resize,
}  # fmt: skip

__all__ = ["RULES", "product", "reduce", "reshaped", "sizes"]
