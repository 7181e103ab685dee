"""LSTM and GRU as Keras layers. ONNX has time first and its own order of gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import fold_graph as G
from edgekit.sources.keras_plan import Array, Ref, View, Weight, refused

if TYPE_CHECKING:
    from edgekit.sources.keras_lower import Lowering

Rule = Callable[["Lowering", ir.Node], None]
# ONNX's gates in the order of Keras: input, output, forget, cell -> input, forget, cell, output; GRU's are the same
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (0, 1, 2)}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}
_DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


def _recurrent(low: Lowering, node: ir.Node) -> None:
    kind, given = node.op_type, low.view(node)
    way = G.text(node, "direction", "forward")
    directions = _DIRECTIONS[way]
    _check(low, node, directions)
    kernel, recurrent, bias = (low.weight(node, i) for i in (1, 2, 3))
    if kernel is None or recurrent is None:
        raise refused(kind, node.name, "it has no weights")
    units = recurrent.values.shape[2]
    after = bool(G.integer(node, "linear_before_reset", 0))
    weights = [
        w for d in range(directions) for w in _weights(kind, kernel, recurrent, bias, d, units, after)
    ]  # fmt: skip
    config: dict[str, Any] = {"units": units, "use_bias": bias is not None}
    if kind == "GRU":
        config["reset_after"] = after
    whole, last = _uses(node)
    ref = low.arranged(given, (1, 0, 2))
    steps, batch = given.shape[0], given.shape[1]
    config["return_sequences"] = whole
    if way == "bidirectional":
        out = low.named("Bidirectional", ref, node, weights, inner=kind, wraps=config, merge_mode="concat")
    else:
        out = low.named(kind, ref, node, weights, **config, **({"go_backwards": True} if way == "reverse" else {}))
    if whole and way == "reverse":  # Keras gives them in the order in which it read
        out = low.call("flip", Ref(out), axis=1)
    if whole:
        _put(low, node, out, True, directions, (steps, batch, units))
    if last:
        _put(low, node, _ends(low, out, way, units, steps) if whole else out, False, directions, (steps, batch, units))


def _ends(low: Lowering, ref: str, way: str, units: int, steps: int) -> str:
    """Of all steps (batch, steps, directions * units) the one that each direction read last."""
    last, first = (low.call("take", Ref(ref), at, axis=1) for at in (steps - 1, 0))
    if way != "bidirectional":
        return first if way == "reverse" else last
    parts = [low.call("split", Ref(r), [units], axis=-1, takes=i) for i, r in enumerate((last, first))]
    return low.call("concatenate", [Ref(p) for p in parts], axis=-1)


def _put(low: Lowering, node: ir.Node, ref: str, every: bool, directions: int, sizes: tuple[int, int, int]) -> None:
    """Tensor (batch, [steps,] directions * units) as Y (steps, directions, batch, units) or Y_h."""
    steps, batch, units = sizes
    dims = (batch, steps, directions * units) if every else (batch, directions * units)
    groups: tuple[tuple[int, ...], ...] = ((1,), (), (0,), (2,)) if every else ((), (0,), (1,))
    if directions == 2:
        split = (*dims[:-1], 2, units)
        ref, dims = low.reshape(ref, dims, split), split
        groups = ((1,), (2,), (0,), (3,)) if every else ((1,), (0,), (2,))
    made = View(ref, dims, groups)
    if every:
        low.put(node, made, 0)
        return
    if len(node.outputs) > 1 and node.outputs[1].uses():
        low.put(node, made, 1)
    if _only_last(node):  # the graph cuts the last step out of Y: that is Y_h already
        low.put(node, View(ref, dims, ((), *groups)), 0)


def _uses(node: ir.Node) -> tuple[bool, bool]:
    """Whether all steps are wanted, and the last one."""
    y = node.outputs[0]
    used = bool(tuple(y.uses())) or y.is_graph_output()
    last = len(node.outputs) > 1 and (bool(tuple(node.outputs[1].uses())) or node.outputs[1].is_graph_output())
    only = used and _only_last(node)
    return used and not only, last or only


def _only_last(node: ir.Node) -> bool:
    """True if nothing but the last step of Y is read, in one direction: Squeezes, then a Slice of the end."""
    value = node.outputs[0]
    if G.text(node, "direction", "forward") != "forward" or value.is_graph_output():
        return False
    if value.shape is None or not isinstance(value.shape[0], int):
        return False
    steps = value.shape[0]
    for _ in range(2):
        users = [u.node for u in value.uses()]
        if len(users) != 1:
            return False
        if G.is_op(users[0], "Slice"):
            bounds = [G.array(v) for v in users[0].inputs[1:4]]
            if any(b is None or b.size != 1 for b in bounds) or len(bounds) < 3:
                return False
            start, end, axis = (int(b.item()) for b in bounds if b is not None)
            return axis == 0 and start == -1 and end >= steps
        if not G.is_op(users[0], "Squeeze") or users[0].outputs[0].is_graph_output():
            return False
        value = users[0].outputs[0]
    return False


def _check(low: Lowering, node: ir.Node, directions: int) -> None:
    kind = node.op_type
    wanted = _ACTIVATIONS[kind] * directions
    found = node.attributes.get("activations")
    if found is not None and [str(a).capitalize() for a in found.value] != wanted:
        raise refused(kind, node.name, "its activations are not sigmoid and tanh")
    if "clip" in node.attributes or G.integer(node, "input_forget", 0) or G.integer(node, "layout", 0):
        raise refused(kind, node.name, "clip, input_forget or layout")
    if low.operand(node, 4) is not None:
        raise refused(kind, node.name, "it has sequences of different length")
    for index in (5, 6, 7)[: 3 if kind == "LSTM" else 1]:
        start = low.operand(node, index)
        if isinstance(start, View) or (start is not None and np.any(start)):
            raise refused(kind, node.name, "it has an initial state or peepholes")
    if kind == "LSTM" and len(node.outputs) > 2 and (node.outputs[2].uses() or node.outputs[2].is_graph_output()):
        raise refused(kind, node.name, "its cell state is used")


def _weights(
    kind: str, kernel: Weight, recurrent: Weight, bias: Weight | None, direction: int, units: int, after: bool
) -> list[Weight]:
    """Kernel (features, gates * units), recurrent kernel, bias, as Keras keeps them."""

    def gates(array: Array) -> Array:
        """(gates * units, …) -> the same in Keras's order."""
        parts = array.reshape(len(_GATES[kind]), units, *array.shape[1:])[list(_GATES[kind])]
        return parts.reshape(array.shape)

    out = [w.moved(lambda v: gates(v[direction]).T) for w in (kernel, recurrent)]
    if bias is None:
        return out
    size = bias.values.shape[1] // 2
    pair = [bias.moved(lambda v, s=s: gates(v[direction][s * size : (s + 1) * size])) for s in (0, 1)]  # type: ignore[misc]
    if kind == "GRU" and after:
        both = bias.moved(lambda v: np.stack([gates(v[direction][:size]), gates(v[direction][size:])]))
        return [*out, both]
    # Keras has one bias: the sum. What training changes goes to the input's half.
    total = pair[0].values + pair[1].values
    return [*out, Weight(total, bias.name, pair[0].index, 1.0, pair[1].values)]


RULES: dict[str, Rule] = {"LSTM": _recurrent, "GRU": _recurrent}
